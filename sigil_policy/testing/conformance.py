"""For authors of stores: one entry for every kind of store, which finds the suite by what the store can do.

    await check_store(MyStore)                                  # limits, slots, revocations, tickets, used proofs, keys

    @pytest.mark.parametrize("check", store_checks(MySlots()), ids=str)
    async def test_my_slots(check: StoreCheck) -> None:
        await check(MySlots)

| a store with | is one of | checked are the guarantees in |
|---|---|---|
| `admit`, `settle` | limits | `sigil_policy.stores.limits`; see `check_limit_store`, which has more options |
| `take`, `give_back` | slots | `sigil_policy.stores.slots` |
| `revoke`, `revoked` | revocations | `sigil_policy.stores.revocations` |
| `issue`, `redeem` | tickets | `sigil_policy.stores.tickets` |
| `claim` | used proofs | `sigil_policy.stores.replays` |
| `find` | API keys; with `save` and `end` a ledger | `sigil_policy.identity.api_keys` |

Each check makes a store of its own and closes it. Names are new each time, so the storage behind may be shared and need
not be empty.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from inspect import isawaitable
from secrets import token_bytes, token_hex
from typing import Any, Literal

import anyio

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.identity.api_keys import ApiKeyExistsError, ApiKeyRecord, ApiKeyUnknownError
from sigil_policy.stores.revocations import MARGIN
from sigil_policy.stores.slots import Claim, Refusal, Slot
from sigil_policy.testing.stores import at_once, awaited, check_limit_store, holds, same, told

Kind = Literal["limits", "slots", "revocations", "tickets", "replays", "keys", "ledger"]
MakeStore = Callable[[], Any]
Advance = Callable[[float], object]

_SIGNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("limits", ("admit", "settle")),
    ("slots", ("take", "give_back")),
    ("revocations", ("revoke", "revoked")),
    ("tickets", ("issue", "redeem")),
    ("replays", ("claim",)),
    ("ledger", ("find", "get", "records", "save", "end")),
    ("keys", ("find",)),
)
_TTL = 15.0
_SOON = 0.6


def store_kind(store: Any) -> Kind:
    """Which kind of store this is. Raises `TypeError` for none."""
    for kind, methods in _SIGNS:
        if all(callable(getattr(store, method, None)) for method in methods):
            return kind
    raise TypeError(f"{type(store).__name__} is no store: it has none of {', '.join('+'.join(m) for _, m in _SIGNS)}")


class StoreTrial:
    """One store under one check."""

    def __init__(self, store: Any, clock: Clock, advance: Advance | None) -> None:
        self.store = store
        self.clock = clock
        self.run = token_hex(8)
        self._advance = advance

    @property
    def wall(self) -> float:
        return self.clock.time()

    @property
    def hand(self) -> float:
        """The monotonic one."""
        return self.clock.monotonic()

    def name(self, text: str) -> str:
        """One that no other check knows."""
        return f"check:{self.run}:{text}"

    async def ask(self, given: Any) -> Any:
        return await awaited(given)

    def prompt(self, given: Any) -> Any:
        """An answer of a store that says whether it is remote."""
        if not self.store.remote and isawaitable(given):
            getattr(given, "close", lambda: None)()
            raise AssertionError("a store that is not remote answers at once")
        return given

    async def together(self, count: int, ask: Callable[[], Any]) -> list[Any]:
        return await at_once(count, ask)

    async def advance(self, seconds: float) -> None:
        assert self._advance is not None
        await awaited(self._advance(seconds))


class StoreCheck:
    """One check: `await check(make_store)`; its name says what must hold. Options as of `check_store`."""

    def __init__(self, kind: Kind, run: Callable[[StoreTrial], Awaitable[None]], timed: bool) -> None:
        self.kind = kind
        self.name = run.__name__
        self.timed = timed
        self._run = run

    def __repr__(self) -> str:
        return self.name

    async def __call__(
        self, make_store: MakeStore, *, clock: Clock = SYSTEM_CLOCK, advance: Advance | None = None
    ) -> None:
        if self.timed and advance is None:
            raise TypeError(f"{self.name} needs advance=...; without, ask store_checks(timed=False)")
        store = await awaited(make_store())
        try:
            with told(self.name):
                await self._run(StoreTrial(store, clock, advance))
        finally:
            await _close(store)


_CHECKS: list[StoreCheck] = []


def store_checks(kind: Kind | Any, *, timed: bool = True) -> list[StoreCheck]:
    """The checks of a kind of store, or of the kind that a store is of; those of limits are `limit_store_checks()`."""
    wanted = kind if isinstance(kind, str) else store_kind(kind)
    kinds = {"keys", "ledger"} if wanted == "ledger" else {wanted}
    return [check for check in _CHECKS if check.kind in kinds and (timed or not check.timed)]


async def check_store(
    make_store: MakeStore, *, clock: Clock = SYSTEM_CLOCK, advance: Advance | None = None, **options: Any
) -> None:
    """Run every check that fits against stores that `make_store` makes.

        clock = FrozenClock()
        await check_store(MySlots, clock=clock, advance=clock.advance)

    Options:
        make_store: makes a fresh store, or an awaitable of one.
        clock: where `now` comes from (default: the machine's).
        advance: moves `clock`, and the store's own, forwards by so many seconds; may be async. Without it (default) the
            checks that need it are left out.
        options: of `check_limit_store`, for stores of limits; `algorithm` is all that the store has if it is not given.

    Raises `AssertionError` at the first that fails, `TypeError` for what is no store.
    """
    store = await awaited(make_store())
    try:
        kind = store_kind(store)
        algorithms = tuple(getattr(store, "algorithms", ()))
    finally:
        await _close(store)
    if kind == "limits":
        wanted = (options.pop("algorithm"),) if "algorithm" in options else algorithms
        for algorithm in wanted:
            await check_limit_store(make_store, algorithm=algorithm, clock=clock, advance=advance, **options)
        return
    if options:
        raise TypeError(f"{', '.join(options)}: only stores of limits take options")
    for check in store_checks(kind, timed=advance is not None):
        await check(make_store, clock=clock, advance=advance)


async def _close(store: Any) -> None:
    if hasattr(store, "aclose"):
        await store.aclose()


def _check(kind: Kind, *, timed: bool = False) -> Callable[[Callable[[StoreTrial], Awaitable[None]]], StoreCheck]:
    def named(run: Callable[[StoreTrial], Awaitable[None]]) -> StoreCheck:
        check = StoreCheck(kind, run, timed)
        _CHECKS.append(check)
        return check

    return named


# --- slots -----------------------------------------------------------------------------------------------------------


async def _take(trial: StoreTrial, *claims: tuple[str, int]) -> Slot | Refusal:
    made = tuple(Claim(trial.name(key), limit) for key, limit in claims)
    taken: Slot | Refusal = await trial.ask(trial.prompt(trial.store.take(made, _TTL, trial.wall)))
    holds(isinstance(taken, Slot | Refusal), f"a Slot or a Refusal, not {type(taken).__name__}")
    return taken


async def _taken(trial: StoreTrial, *claims: tuple[str, int]) -> Slot:
    slot = await _take(trial, *claims)
    if not isinstance(slot, Slot):
        raise AssertionError(f"there is room: {slot}")
    return slot


@_check("slots")
async def as_many_are_in_flight_as_the_limit_and_not_one_more(trial: StoreTrial) -> None:
    first = await _taken(trial, ("a", 2))
    same(first.in_flight, (1,), "the first is counted")
    second = await _taken(trial, ("a", 2))
    same(second.in_flight, (2,), "and the second")
    same(await _take(trial, ("a", 2)), Refusal((2,), (0,)), "a third is refused, and told how many there are")
    await trial.ask(trial.store.give_back(first))
    same((await _taken(trial, ("a", 2))).in_flight, (2,), "what was given back is free")


@_check("slots")
async def what_one_claim_refuses_takes_no_place_under_any(trial: StoreTrial) -> None:
    await _taken(trial, ("full", 1))
    for _ in range(3):
        same(await _take(trial, ("a", 5), ("full", 1)), Refusal((0, 1), (1,)), "the claim that is full is named")
    same((await _taken(trial, ("a", 5))).in_flight, (1,), "nothing was taken under the other")


@_check("slots")
async def giving_back_twice_changes_nothing(trial: StoreTrial) -> None:
    first, second = await _taken(trial, ("a", 2)), await _taken(trial, ("a", 2))
    for _ in range(3):
        await trial.ask(trial.store.give_back(first))
    same((await _taken(trial, ("a", 2))).in_flight, (2,), "one place was free, not more")
    holds(isinstance(await _take(trial, ("a", 2)), Refusal), "the limit is kept")
    await trial.ask(trial.store.give_back(second))


@_check("slots")
async def a_lower_limit_ends_nothing(trial: StoreTrial) -> None:
    slots = [await _taken(trial, ("a", 4)) for _ in range(4)]
    same(await _take(trial, ("a", 2)), Refusal((4,), (0,)), "a lower limit refuses")
    for slot in slots[:3]:
        await trial.ask(trial.store.give_back(slot))
    same((await _taken(trial, ("a", 2))).in_flight, (2,), "once enough has ended it admits")


@_check("slots")
async def what_is_held_counts_over_the_limit(trial: StoreTrial) -> None:
    """At once, or where a store is remote with its next sign of life: nobody waits for it."""
    await _taken(trial, ("a", 1))
    held = trial.store.hold((Claim(trial.name("a"), 1),), _SOON)
    holds(isinstance(held, Slot), "hold never waits, and never refuses")
    refused = await _take(trial, ("a", 2))
    for _ in range(40):
        if not trial.store.remote or not isinstance(refused, Slot):
            break
        await trial.ask(trial.store.give_back(refused))
        await anyio.sleep(_SOON / 10)
        refused = await _take(trial, ("a", 2))
    same(refused, Refusal((2,), (0,)), "it is counted")
    await trial.ask(trial.store.give_back(held))
    same((await _taken(trial, ("a", 2))).in_flight, (2,), "and given back")


@_check("slots")
async def of_many_at_once_exactly_the_limit_passes(trial: StoreTrial) -> None:
    claims = (Claim(trial.name("many"), 7),)
    answers = await trial.together(40, lambda: trial.store.take(claims, _TTL, trial.wall))
    same(sum(isinstance(answer, Slot) for answer in answers), 7, "as many pass as the limit allows")


@_check("slots")
async def a_slot_names_no_caller(trial: StoreTrial) -> None:
    slot = await _taken(trial, ("alice@example.com", 2))
    holds("alice" not in repr(slot) + repr(trial.store), "keys name callers, and stand in no repr")


# --- revocations -----------------------------------------------------------------------------------------------------


class _Token:
    """What a token says of itself, with names that no other check knows."""

    def __init__(self, trial: StoreTrial) -> None:
        self.trial = trial
        self.now = trial.wall
        self.token = {
            "jti": trial.name("t1"), "subject": trial.name("ann"), "issuer": trial.name("i"), "issued": self.now - 100,
        }  # fmt: skip

    async def revoked(self, *, now: float | None = None, **changes: Any) -> bool:
        store = self.trial.store
        if store.remote:
            await self.trial.ask(store.refresh(self.trial.hand))
        answer = store.revoked(**{**self.token, **changes}, now=self.now if now is None else now)
        holds(isinstance(answer, bool), "no look-up waits: revoked answers at once")
        return bool(answer)


@_check("revocations")
async def what_is_named_is_met_and_nothing_else(trial: StoreTrial) -> None:
    ann = _Token(trial)
    other = trial.name("other")
    cases: tuple[tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]], ...] = (
        ({"jti": ann.token["jti"]}, [{}, {"issuer": other}, {"subject": other}], [{"jti": other}, {"jti": None}]),
        (
            {"jti": ann.token["jti"], "issuer": ann.token["issuer"]},
            [{}, {"subject": other}],
            [{"issuer": other}, {"issuer": None}],
        ),
        ({"subject": ann.token["subject"]}, [{}, {"issuer": None, "jti": None}], [{"subject": other}]),
        ({"issuer": ann.token["issuer"]}, [{}, {"subject": other}], [{"issuer": other}, {"issuer": None}]),
    )
    for what, met, not_met in cases:
        same(await ann.revoked(), False, f"nothing is revoked before {sorted(what)}")
        await trial.ask(trial.store.revoke(**what))
        for token in met:
            same(await ann.revoked(**token), True, f"{sorted(what)} meets {token}")
        for token in not_met:
            same(await ann.revoked(**token), False, f"{sorted(what)} does not meet {token}")
        same(await trial.ask(trial.store.restore(**what)), True, "restore says that there was something")
        same(await trial.ask(trial.store.restore(**what)), False, "and then that there was not")
    same(await ann.revoked(), False, "all of it was taken back")


@_check("revocations")
async def what_was_issued_before_the_moment_and_nothing_later(trial: StoreTrial) -> None:
    ann = _Token(trial)
    await trial.ask(trial.store.revoke(subject=ann.token["subject"], issued_before=ann.now - 50))
    same(await ann.revoked(issued=ann.now - 51), True, "it was issued before")
    same(await ann.revoked(issued=None), True, "without a date it is old")
    same(await ann.revoked(issued=ann.now), False, "it was issued later")


@_check("revocations")
async def an_entry_holds_until_its_end_and_a_margin(trial: StoreTrial) -> None:
    ann = _Token(trial)
    await trial.ask(trial.store.revoke(jti=ann.token["jti"], until=ann.now + 500))
    same(await ann.revoked(now=ann.now + 500 + MARGIN - 1), True, "clocks may differ by the margin")
    same(await ann.revoked(now=ann.now + 500 + MARGIN + 1), False, "then it has ended")


@_check("revocations")
async def revoking_again_takes_nothing_back(trial: StoreTrial) -> None:
    ann, subject = _Token(trial), _Token(trial).token["subject"]
    await trial.ask(trial.store.revoke(subject=subject, issued_before=ann.now - 10, until=ann.now + 500))
    await trial.ask(trial.store.revoke(subject=subject, issued_before=ann.now - 90, until=ann.now + 5))
    same(await ann.revoked(issued=ann.now - 20, now=ann.now + 400), True, "the later moment and the later end hold")
    await trial.ask(trial.store.revoke(subject=subject))
    same(await ann.revoked(issued=ann.now + 9, now=ann.now + 99_999_999), True, "for ever, without an end")
    same(await trial.ask(trial.store.restore(subject=subject)), True, "both are taken back")
    same(await ann.revoked(), False, "both are gone")


@_check("revocations")
async def what_names_nothing_is_refused(trial: StoreTrial) -> None:
    for what in ({"jti": ""}, {"jti": "a", "subject": "b"}, {"jti": "a", "issued_before": trial.wall}, {"subject": 5}):
        try:
            await trial.ask(trial.store.revoke(**what))
        except ValueError:
            continue
        raise AssertionError(f"{what} names nothing, and was taken")


# --- tickets ---------------------------------------------------------------------------------------------------------


async def _issue(trial: StoreTrial, digest: bytes, holder: str = "ann", most: int = 3, ttl: float = 30.0) -> float:
    given = trial.store.issue(digest, b"record", holder=trial.name(holder), most=most, ttl=ttl, now=trial.hand)
    return float(await trial.ask(given))


async def _redeem(trial: StoreTrial, digest: bytes) -> bytes | None:
    record: bytes | None = await trial.ask(trial.store.redeem(digest, trial.hand))
    return record


@_check("tickets")
async def a_ticket_is_redeemed_once(trial: StoreTrial) -> None:
    digest = token_bytes(32)
    same(await _redeem(trial, digest), None, "a ticket that never was has no record")
    same(await _issue(trial, digest), 0.0, "it is issued")
    same(await _redeem(trial, digest), b"record", "it gives its record")
    same(await _redeem(trial, digest), None, "and not a second time")


@_check("tickets")
async def of_many_who_redeem_at_once_one_gets_the_record(trial: StoreTrial) -> None:
    digest = token_bytes(32)
    await _issue(trial, digest)
    answers = await trial.together(20, lambda: trial.store.redeem(digest, trial.hand))
    same(sorted(answer for answer in answers if answer is not None), [b"record"], "one of them gets it")


@_check("tickets")
async def a_holder_has_so_many_and_no_more(trial: StoreTrial) -> None:
    digests = [token_bytes(32) for _ in range(3)]
    for digest in digests:
        same(await _issue(trial, digest), 0.0, "there is room")
    more = token_bytes(32)
    wait = await _issue(trial, more)
    holds(0 < wait <= 30, f"a further one has to wait, at most for as long as a ticket holds: {wait}")
    same(await _redeem(trial, more), None, "it was not kept")
    same(await _issue(trial, token_bytes(32), holder="bob"), 0.0, "another holder has room")
    await _redeem(trial, digests[0])
    same(await _issue(trial, more), 0.0, "one that was redeemed makes room")


@_check("tickets", timed=True)
async def a_ticket_ends(trial: StoreTrial) -> None:
    digest, later = token_bytes(32), token_bytes(32)
    await _issue(trial, digest, ttl=10.0)
    await _issue(trial, later, ttl=60.0)
    await trial.advance(11.0)
    same(await _redeem(trial, digest), None, "its time is over")
    same(await _redeem(trial, later), b"record", "that of another is not")


# --- used proofs -----------------------------------------------------------------------------------------------------


async def _claim(trial: StoreTrial, name: bytes, seconds: float = 60.0) -> bool:
    return bool(await trial.ask(trial.prompt(trial.store.claim(name, seconds, trial.hand))))


@_check("replays")
async def a_name_passes_once(trial: StoreTrial) -> None:
    name, other = token_bytes(32), token_bytes(32)
    same(await _claim(trial, name), True, "nobody had it before")
    for _ in range(3):
        same(await _claim(trial, name), False, "it was used")
    same(await _claim(trial, other), True, "another was not")


@_check("replays")
async def of_many_claims_at_once_one_passes(trial: StoreTrial) -> None:
    name = token_bytes(32)
    answers = await trial.together(30, lambda: trial.store.claim(name, 60.0, trial.hand))
    same(sum(map(bool, answers)), 1, "exactly one passes")


@_check("replays", timed=True)
async def a_name_is_free_when_its_time_is_over_and_no_claim_prolongs_it(trial: StoreTrial) -> None:
    name = token_bytes(32)
    await _claim(trial, name, 10.0)
    await trial.advance(8.0)
    same(await _claim(trial, name, 10.0), False, "it is used")
    await trial.advance(3.0)
    same(await _claim(trial, name, 10.0), True, "its time is over: a refused claim has not prolonged it")


# --- API keys --------------------------------------------------------------------------------------------------------


@_check("keys")
async def an_id_that_is_not_there_is_none(trial: StoreTrial) -> None:
    same(await trial.ask(trial.store.find(token_hex(6))), None, "no record for an id that nobody made")


def _record(trial: StoreTrial, **changes: Any) -> ApiKeyRecord:
    fields: dict[str, Any] = {
        "id": token_hex(6), "digest": token_hex(32), "subject": f"job-{trial.run}", "scopes": frozenset(("a:read",)),
        "tier": "pro", "expires": None, "prefix": "sk_test", "created": trial.wall,
    }  # fmt: skip
    return ApiKeyRecord(**{**fields, **changes})


async def _found(trial: StoreTrial, key_id: str) -> Any:
    """What `find` finds; a store may look for changes once in a second."""
    for _ in range(60):
        found = await trial.ask(trial.store.find(key_id))
        if found is not None:
            return replace(found, last_used=None)
        await anyio.sleep(0.05)
    return None


@_check("ledger")
async def what_is_saved_is_found(trial: StoreTrial) -> None:
    record = _record(trial)
    same(await trial.store.get(record.id), None, "it is not there yet")
    await trial.store.save(record)
    same(await _found(trial, record.id), record, "the record is found as it was saved")
    same(await trial.store.get(record.id), record, "get gives the same")
    holds(record.id in {one.id for one in await trial.store.records()}, "and it is listed")


@_check("ledger")
async def an_id_is_taken_once(trial: StoreTrial) -> None:
    record = _record(trial)
    await trial.store.save(record)
    try:
        await trial.store.save(_record(trial, id=record.id, subject="mallory"))
    except ApiKeyExistsError:
        same((await _found(trial, record.id)).subject, record.subject, "the first stays")
        return
    raise AssertionError("a second record with the same id was saved")


@_check("ledger")
async def an_end_stands_and_is_never_put_off(trial: StoreTrial) -> None:
    record = _record(trial)
    await trial.store.save(record)
    ended = await trial.store.end(record.id, trial.wall + 10)
    same(ended.expires, trial.wall + 10 if trial.clock is not SYSTEM_CLOCK else ended.expires, "it ends then")
    later = await trial.store.end(record.id, trial.wall + 10_000)
    same(later.expires, ended.expires, "a later end changes nothing")
    same((await trial.store.get(record.id)).expires, ended.expires, "it is stored")
    same(await trial.store.end(token_hex(6), trial.wall), None, "there is no end of what is not there")


@_check("ledger")
async def a_rotation_is_one_step_or_none(trial: StoreTrial) -> None:
    old, new = _record(trial), _record(trial)
    await trial.store.save(old)
    at = trial.wall + 60
    await trial.store.save(new, ends=(old.id, at))
    same((await trial.store.get(old.id)).expires, at, "the old one ends")
    orphan = _record(trial)
    with suppress(ApiKeyUnknownError):
        await trial.store.save(orphan, ends=(token_hex(6), at))
        raise AssertionError("a key that is not there was ended")
    same(await trial.store.get(orphan.id), None, "where the old one is not there, nothing is saved")


@_check("ledger")
async def of_many_who_save_one_id_one_has_it(trial: StoreTrial) -> None:
    key_id = token_hex(6)

    async def save() -> bool:
        try:
            await trial.store.save(_record(trial, id=key_id, subject=token_hex(4)))
        except ApiKeyExistsError:
            return False
        return True

    same(sum(await trial.together(10, save)), 1, "one of them")

"""Our stores pass the suites that any author can run, and stores that break a promise do not."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from sigil_policy.identity.api_keys import FileApiKeyStore, MemoryApiKeyStore
from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore
from sigil_policy.stores.memory import FixedWindows, memory_limits
from sigil_policy.stores.replays import MemoryReplays
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.stores.slots import MemorySlots, Slot
from sigil_policy.stores.tickets import MemoryTickets
from sigil_policy.testing import Faulty, FrozenClock, check_store
from sigil_policy.testing.conformance import store_checks, store_kind

pytestmark = pytest.mark.anyio

CLOCK = FrozenClock()
STORES: dict[str, Callable[[], Any]] = {
    "limits": lambda: memory_limits("sliding"),
    "slots": MemorySlots,
    "replays": MemoryReplays,
    "tickets": MemoryTickets,
    "revocations": lambda: MemoryRevocations(clock=CLOCK),
    "keys": MemoryApiKeyStore,
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
async def test_the_stores_of_this_process(make: Any) -> None:
    await check_store(make, clock=CLOCK, advance=CLOCK.advance)


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
async def test_the_same_behind_an_await(make: Any) -> None:
    made: list[Faulty] = []

    async def remote() -> Any:
        made.append(Faulty(make()))
        return made[-1]

    await check_store(remote, clock=CLOCK, advance=CLOCK.advance)
    assert made and all(store.closed for store in made)


@pytest.mark.parametrize("kind", ["file", "sqlite"])
async def test_stores_of_keys_in_files(kind: str, tmp_path: Any) -> None:
    if kind == "file":
        await check_store(lambda: FileApiKeyStore(tmp_path / "keys.jsonl"))
    else:
        await check_store(lambda: SqliteApiKeyStore(str(tmp_path / "keys.db"), deadline=60))


def test_a_kind_is_known_by_what_a_store_can_do() -> None:
    class Keys:
        def find(self, key_id: str) -> None:
            return None

    kinds = {name: store_kind(make()) for name, make in STORES.items()}
    assert kinds == {**{name: name for name in STORES}, "keys": "ledger"}
    assert store_kind(Keys()) == "keys" and [check.name for check in store_checks("keys")]
    assert {check.kind for check in store_checks("ledger")} == {"keys", "ledger"}
    assert not any(check.timed for check in store_checks("replays", timed=False))
    with pytest.raises(TypeError, match="object is no store"):
        store_kind(object())


async def test_options_are_for_limits() -> None:
    await check_store(FixedWindows, algorithm="fixed", weaker={"months"})
    with pytest.raises(TypeError, match="only stores of limits take options"):
        await check_store(MemorySlots, weaker={"months"})
    (check,) = [check for check in store_checks("replays") if check.timed]
    with pytest.raises(TypeError, match="needs advance"):
        await check(MemoryReplays)


# --- stores that break a promise -------------------------------------------------------------------------------------


class TakesSome(MemorySlots):
    def take(self, claims: Any, ttl: float, now: float) -> Any:
        taken = super().take(claims, ttl, now)
        if not isinstance(taken, Slot):
            super().take(claims[:1], ttl, now)
        return taken


class GivesBackTwice(MemorySlots):
    def give_back(self, slot: Slot) -> None:
        slot.open = True
        if any(self.in_flight(claim.key) for claim in slot.claims):
            super().give_back(slot)


class OneTooMany(MemorySlots):
    def take(self, claims: Any, ttl: float, now: float) -> Any:
        return super().take(tuple(claim._replace(limit=claim.limit + 1) for claim in claims), ttl, now)


class Twice(MemoryTickets):
    def redeem(self, digest: bytes, now: float) -> Any:
        entry = self._entries.get(digest)
        return entry.record if entry else None


class NoEnd(MemoryTickets):
    def redeem(self, digest: bytes, now: float) -> Any:
        return super().redeem(digest, 0.0)


class Unbounded(MemoryTickets):
    def issue(self, digest: bytes, record: bytes, *, holder: str, most: int, ttl: float, now: float) -> float:
        return super().issue(digest, record, holder=holder, most=1_000, ttl=ttl, now=now)


class Forgets(MemoryReplays):
    def claim(self, name: bytes, seconds: float, now: float) -> bool:
        super().claim(name, seconds, now)
        return True


class Prolongs:
    remote = False

    def __init__(self) -> None:
        self.used: dict[bytes, float] = {}

    def claim(self, name: bytes, seconds: float, now: float) -> bool:
        free = self.used.get(name, 0.0) <= now
        self.used[name] = now + seconds
        return free


class Late(MemoryReplays):
    async def claim(self, name: bytes, seconds: float, now: float) -> Any:
        return super().claim(name, seconds, now)


class NoMargin(MemoryRevocations):
    def __init__(self) -> None:
        super().__init__(clock=CLOCK)
        holds = self.revoked
        self.revoked = lambda *, now, **token: holds(**token, now=now + 59)  # type: ignore[assignment]


class TakesBack(MemoryRevocations):
    async def revoke(self, *, subject: Any = None, **options: Any) -> None:
        if subject is not None:
            await self.restore(subject=subject)
        await super().revoke(subject=subject, **options)


class AnyIssuer(MemoryRevocations):
    async def revoke(self, *, issuer: Any = None, **options: Any) -> None:
        await super().revoke(issuer=issuer if "jti" not in options else None, **options)


class Overwrites(MemoryApiKeyStore):
    async def save(self, record: Any, *, ends: Any = None) -> None:
        self.add(record)


class PutsOff(MemoryApiKeyStore):
    async def end(self, key_id: str, at: float) -> Any:
        record = await self.get(key_id)
        if record is not None:
            self.add(replace(record, expires=at))
        return await self.get(key_id)


class EndsTheOthers(MemorySlots):
    def take(self, claims: Any, ttl: float, now: float) -> Any:
        taken = super().take(claims, ttl, now)
        return taken if isinstance(taken, Slot) else super().take([c._replace(limit=99) for c in claims], ttl, now)


class HoldsNothing(MemorySlots):
    def hold(self, claims: Any, ttl: float) -> Slot:
        held = super().hold(claims, ttl)
        super().give_back(held)
        return held


class NamesCallers(MemorySlots):
    def take(self, claims: Any, ttl: float, now: float) -> Any:
        self.last = claims
        return super().take(claims, ttl, now)

    def __repr__(self) -> str:
        return f"NamesCallers({[claim.key for claim in self.last]})"


class AnyMoment(MemoryRevocations):
    async def revoke(self, *, issued_before: Any = None, **options: Any) -> None:
        await super().revoke(**options)


class TakesNothing(MemoryRevocations):
    async def revoke(self, **options: Any) -> None:
        with suppress(ValueError):
            await super().revoke(**options)


class Invents(MemoryApiKeyStore):
    def find(self, key_id: str) -> Any:
        return super().find(key_id) or key_id


class LosesScopes(MemoryApiKeyStore):
    async def save(self, record: Any, *, ends: Any = None) -> None:
        await super().save(replace(record, scopes=frozenset()), ends=ends)


class Raises(MemoryReplays):
    def claim(self, name: bytes, seconds: float, now: float) -> bool:
        raise KeyError(name)


BROKEN: tuple[tuple[Callable[[], Any], str, str], ...] = (
    (TakesSome, "what_one_claim_refuses_takes_no_place_under_any", "the claim that is full is named: answered"),
    (GivesBackTwice, "giving_back_twice_changes_nothing", "one place was free, not more"),
    (OneTooMany, "as_many_are_in_flight_as_the_limit_and_not_one_more", "a third is refused, and told"),
    (OneTooMany, "of_many_at_once_exactly_the_limit_passes", "as many pass as the limit allows: answered 8"),
    (Twice, "a_ticket_is_redeemed_once", "and not a second time"),
    (Twice, "of_many_who_redeem_at_once_one_gets_the_record", "one of them gets it: answered"),
    (NoEnd, "a_ticket_ends", "its time is over: answered b'record'"),
    (Unbounded, "a_holder_has_so_many_and_no_more", "a further one has to wait, .*: 0.0"),
    (Forgets, "a_name_passes_once", "it was used: answered True"),
    (Forgets, "of_many_claims_at_once_one_passes", "exactly one passes: answered 30"),
    (
        Prolongs,
        "a_name_is_free_when_its_time_is_over_and_no_claim_prolongs_it",
        "a refused claim has not prolonged it: answered False",
    ),
    (Late, "a_name_passes_once", "a store that is not remote answers at once"),
    (NoMargin, "an_entry_holds_until_its_end_and_a_margin", "clocks may differ by the margin: answered False"),
    (
        lambda: TakesBack(clock=CLOCK),
        "revoking_again_takes_nothing_back",
        "the later moment and the later end hold: answered False",
    ),
    (lambda: AnyIssuer(clock=CLOCK), "what_is_named_is_met_and_nothing_else", r"\['issuer', 'jti'\] does not meet"),
    (Overwrites, "an_id_is_taken_once", "a second record with the same id was saved"),
    (Overwrites, "a_rotation_is_one_step_or_none", "the old one ends: answered None"),
    (Overwrites, "of_many_who_save_one_id_one_has_it", "one of them: answered 10"),
    (PutsOff, "an_end_stands_and_is_never_put_off", "a later end changes nothing"),
    (EndsTheOthers, "a_lower_limit_ends_nothing", "a lower limit refuses: answered Slot"),
    (HoldsNothing, "what_is_held_counts_over_the_limit", "it is counted: answered Slot"),
    (NamesCallers, "a_slot_names_no_caller", "keys name callers"),
    (
        lambda: AnyMoment(clock=CLOCK),
        "what_was_issued_before_the_moment_and_nothing_later",
        "it was issued later: answered True",
    ),
    (lambda: TakesNothing(clock=CLOCK), "what_names_nothing_is_refused", "names nothing, and was taken"),
    (Invents, "an_id_that_is_not_there_is_none", "no record for an id that nobody made: answered"),
    (LosesScopes, "what_is_saved_is_found", "the record is found as it was saved"),
    (Raises, "a_name_passes_once", "a name passes once: KeyError"),
)


@pytest.mark.parametrize(("make", "name", "words"), BROKEN)
async def test_a_store_that_breaks_a_promise_is_told_which(make: Any, name: str, words: str) -> None:
    (check,) = [check for check in store_checks(make()) if check.name == name]
    with pytest.raises(AssertionError, match=words):
        await check(make, clock=CLOCK, advance=CLOCK.advance)


def test_for_every_check_there_is_a_store_that_fails_it() -> None:
    kinds = ("slots", "revocations", "tickets", "replays", "ledger")
    assert {name for _, name, _ in BROKEN} == {check.name for kind in kinds for check in store_checks(kind)}

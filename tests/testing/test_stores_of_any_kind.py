"""Our stores pass the suites that any author can run, and stores that break a promise do not."""

from collections.abc import Callable
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
        await check_store(lambda: SqliteApiKeyStore(str(tmp_path / "keys.db")))


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
        for claim in claims:
            taken = super().take((claim,), ttl, now)
            if not isinstance(taken, Slot):
                return super().take(claims, ttl, now)
        return super().take(claims, ttl, now)


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
        from dataclasses import replace

        record = await self.get(key_id)
        if record is not None:
            self.add(replace(record, expires=at))
        return await self.get(key_id)


BROKEN: tuple[tuple[Callable[[], Any], str], ...] = (
    (TakesSome, "what_one_claim_refuses_takes_no_place_under_any"),
    (GivesBackTwice, "giving_back_twice_changes_nothing"),
    (OneTooMany, "as_many_are_in_flight_as_the_limit_and_not_one_more"),
    (OneTooMany, "of_many_at_once_exactly_the_limit_passes"),
    (Twice, "a_ticket_is_redeemed_once"),
    (Twice, "of_many_who_redeem_at_once_one_gets_the_record"),
    (NoEnd, "a_ticket_ends"),
    (Unbounded, "a_holder_has_so_many_and_no_more"),
    (Forgets, "a_name_passes_once"),
    (Forgets, "of_many_claims_at_once_one_passes"),
    (Prolongs, "a_name_is_free_when_its_time_is_over_and_no_claim_prolongs_it"),
    (Late, "a_name_passes_once"),
    (NoMargin, "an_entry_holds_until_its_end_and_a_margin"),
    (lambda: TakesBack(clock=CLOCK), "revoking_again_takes_nothing_back"),
    (lambda: AnyIssuer(clock=CLOCK), "what_is_named_is_met_and_nothing_else"),
    (Overwrites, "an_id_is_taken_once"),
    (Overwrites, "a_rotation_is_one_step_or_none"),
    (Overwrites, "of_many_who_save_one_id_one_has_it"),
    (PutsOff, "an_end_stands_and_is_never_put_off"),
)


@pytest.mark.parametrize(("make", "name"), BROKEN)
async def test_a_store_that_breaks_a_promise(make: Any, name: str) -> None:
    (check,) = [check for check in store_checks(make()) if check.name == name]
    with pytest.raises(AssertionError):
        await check(make, clock=CLOCK, advance=CLOCK.advance)

"""Every store in a real server passes the suite that any author can run, and so does one that is slow to answer."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from sigil_policy.identity.api_keys.redis import RedisApiKeyStore
from sigil_policy.stores.redis.limits import RedisLimits
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.replays import RedisReplays
from sigil_policy.stores.redis.revocations import RedisRevocations
from sigil_policy.stores.redis.slots import RedisSlots
from sigil_policy.stores.redis.tickets import RedisTickets
from sigil_policy.testing import FrozenClock, check_store, limit_store_checks
from sigil_policy.testing.conformance import StoreCheck, store_checks, store_kind
from sigil_policy.testing.stores import Check
from tests.stores.redis.conftest import LimitsServer
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

# A store that is well may still be slow on a machine that is busy with other things.
PATIENT = 30.0
CLOCK = FrozenClock()
STORES: dict[str, Callable[..., Any]] = {
    "slots": RedisSlots,
    "revocations": lambda url, **options: RedisRevocations(url, clock=CLOCK, **options),
    "tickets": RedisTickets,
    "replays": RedisReplays,
    "ledger": lambda url, **options: RedisApiKeyStore(url, clock=CLOCK, **options),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def patient(server: LimitsServer) -> RedisLink:
    return RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT)


def passing(server: LimitsServer) -> Callable[[float], None]:
    """Moves time: that of the tests, and that of a server, whose keys end so much earlier."""

    def advance(seconds: float) -> None:
        CLOCK.advance(seconds)
        for key in server.found():
            left = int(server.call("PTTL", key))
            if left > 0:
                server.call("PEXPIRE", key, left - round(seconds * 1_000))  # below 0 it is gone at once

    return advance


@pytest.mark.parametrize(
    ("kind", "check"),
    [(kind, check) for kind in STORES for check in store_checks(kind)],
    ids=lambda value: str(value),
)
@steady()
async def test_the_checks_of_every_store(kind: str, check: StoreCheck, limits_server: LimitsServer) -> None:
    def make() -> Any:
        return STORES[kind](patient(limits_server))

    store = make()
    assert store_kind(store) == kind
    await store.aclose()
    await check(make, clock=CLOCK, advance=passing(limits_server))
    if kind not in ("ledger", "revocations"):
        assert limits_server.without_ttl() == [], "every key has an end"


@pytest.mark.parametrize("kind", STORES)
@steady()
async def test_all_of_them_in_one_call_over_one_link(kind: str, limits_server: LimitsServer) -> None:
    """A link that other stores share is closed by each of them, and opens again."""
    link = patient(limits_server)
    await check_store(lambda: STORES[kind](link), clock=CLOCK, advance=passing(limits_server))
    await link.aclose()


async def test_stores_of_limits_are_found_by_what_they_can_do(limits_server: LimitsServer) -> None:
    """The rest of their suite, by every algorithm and with time that moves, is in `test_limits`."""

    async def make() -> RedisLimits:
        await anyio.lowlevel.checkpoint()
        return RedisLimits(patient(limits_server))

    await check_store(make, algorithm="gcra")


class Twice(RedisTickets):
    """Reads the record, and forgets to take it."""

    async def redeem(self, digest: bytes, now: float) -> bytes | None:
        record = await super().redeem(digest, now)
        if record is not None:
            await self.issue(digest, record, holder="again", most=9, ttl=30.0, now=now)
        return record


class TakesOneByOne(RedisSlots):
    """One trip for each claim."""

    async def take(self, claims: Any, ttl: float, now: float) -> Any:
        for claim in claims:
            taken = await super().take((claim,), ttl, now)
        return taken


class AsksAndSets(RedisReplays):
    """Two trips where there has to be one."""

    used: set[bytes] = set()  # one for all, as a server is

    async def claim(self, name: bytes, seconds: float, now: float) -> bool:
        await anyio.lowlevel.checkpoint()
        free = name not in self.used
        await super().claim(name, seconds, now)
        self.used.add(name)
        return free


class NeverRefreshed(RedisRevocations):
    """Keeps no copy."""

    async def revoke(self, **options: Any) -> None:
        pass


class LosesTheStep(RedisApiKeyStore):
    """A rotation in two steps, of which the second is forgotten."""

    async def save(self, record: Any, *, ends: Any = None) -> None:
        await super().save(record)


BROKEN: list[tuple[Callable[..., Any], str, str]] = [
    (Twice, "a_ticket_is_redeemed_once", "and not a second time: answered b'record'"),
    (TakesOneByOne, "what_one_claim_refuses_takes_no_place_under_any", "the claim that is full is named: answered"),
    (AsksAndSets, "of_many_claims_at_once_one_passes", "exactly one passes: answered"),
    (NeverRefreshed, "what_is_named_is_met_and_nothing_else", "meets .*: answered False"),
    (LosesTheStep, "a_rotation_is_one_step_or_none", "the old one ends: answered None"),
]


@pytest.mark.parametrize(("make", "name", "words"), BROKEN, ids=[f"{make.__name__}-{name}" for make, name, _ in BROKEN])
async def test_a_store_that_breaks_a_promise_is_told_which(
    make: Callable[..., Any], name: str, words: str, limits_server: LimitsServer
) -> None:
    store = make(patient(limits_server))
    (check,) = [check for check in store_checks(store) if check.name == name]
    with pytest.raises(AssertionError, match=words):
        await check(lambda: make(patient(limits_server)), clock=CLOCK, advance=passing(limits_server))


async def test_a_server_that_is_away_is_told_as_what_it_is(tmp_path: Any) -> None:
    """A suite that runs without its server fails, and says why."""
    url = f"unix://{tmp_path}/nobody"
    checks: list[Callable[[], Awaitable[None]]] = [
        lambda: store_checks("replays")[0](lambda: RedisReplays(url)),
        lambda: limit_check("the_limit_passes_and_not_one_more")(lambda: RedisLimits(url), algorithm="fixed"),
    ]
    for check in checks:
        with pytest.raises(AssertionError, match=r"StoreUnavailableError\(.*came out"):
            await check()


def limit_check(name: str) -> Check:
    (check,) = [check for check in limit_store_checks() if check.name == name]
    return check

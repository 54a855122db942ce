"""Revocations on a real server: several processes' copies, bounded trips, and a server that goes, or forgets."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis import RedisLink, revocations
from sigil_policy.stores.redis.revocations import RedisRevocations
from sigil_policy.stores.revocations import MARGIN, RevocationsFullError
from sigil_policy.testing import FrozenClock
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

NOW = 1_700_000_000.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.call("FLUSHALL")
    return running


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(NOW)


def patient(server: Server) -> RedisLink:
    """A store that is well may still be slow on a machine that is busy with other things."""
    return RedisLink(server.url, deadline=30.0, connect_timeout=30.0)


class Processes(list[RedisRevocations]):
    """Stores that know nothing of each other."""

    async def refresh(self) -> None:
        for store in self:
            await store.refresh(1.0)


@pytest.fixture
async def stores(server: Server, clock: FrozenClock) -> AsyncIterator[Processes]:
    made = Processes(RedisRevocations(patient(server), clock=clock, page=50) for _ in range(2))
    await made.refresh()
    yield made
    for store in made:
        await store.aclose()


def revoked(store: RedisRevocations, *, now: float = NOW, **token: Any) -> bool:
    known: Any = {"jti": "t1", "subject": "ann", "issuer": "https://a.example", "issued": NOW - 100, **token}
    return store.revoked(**known, now=now)


async def test_what_one_process_revokes_the_others_know_after_a_refresh(stores: Processes) -> None:
    one, other = stores
    await one.revoke(subject="ann", issued_before=NOW)
    assert revoked(one), "at once where it was done"
    assert not revoked(other)
    await other.refresh(2.0)
    assert revoked(other) and not revoked(other, issued=NOW) and not revoked(other, subject="bob")
    assert await other.restore(subject="ann")
    assert not await other.restore(subject="ann")
    await one.refresh(3.0)
    assert not revoked(one) and not revoked(other)
    await one.revoke(subject="ann", issued_before=NOW - 50)
    await other.refresh(4.0)
    assert revoked(other) and not revoked(other, issued=NOW - 50), "what was taken back does not come back"


async def test_moments_of_several_processes_are_merged(stores: Processes) -> None:
    one, other = stores
    await one.revoke(subject="ann", issued_before=NOW - 10, until=NOW + 5)
    await other.revoke(subject="ann", issued_before=NOW - 90, until=NOW + 500)
    await stores.refresh()
    for store in stores:
        assert revoked(store, issued=NOW - 20, now=NOW + 500) and not revoked(store, issued=NOW - 10)
        assert not revoked(store, now=NOW + 500 + MARGIN)


async def test_what_has_ended_is_not_merged_into_what_is_new(stores: Processes) -> None:
    one, other = stores
    clock: Any = one._clock
    for number in range(150):  # more than one call forgets
        await one.revoke(jti=f"x{number}", until=NOW - 1)
    await one.revoke(subject="ann", issued_before=NOW + 50_000, until=NOW)
    clock.advance(MARGIN)
    await other.revoke(subject="ann", issued_before=NOW)
    await stores.refresh()
    for store in stores:
        assert revoked(store, now=clock.time()) and not revoked(store, issued=NOW + 1, now=clock.time())


async def test_a_log_out_does_not_prolong_a_suspension(stores: Processes) -> None:
    one, other = stores
    await one.revoke(subject="ann", until=NOW + 600)
    await other.revoke(subject="ann", issued_before=NOW)
    await stores.refresh()
    later = NOW + 600 + MARGIN
    for store in stores:
        assert revoked(store, issued=NOW + 1, now=later - 1) and not revoked(store, issued=NOW + 1, now=later)
    assert await one.restore(subject="ann")
    await stores.refresh()
    assert not any(revoked(store) for store in stores)


async def test_many_changes_come_page_by_page_and_each_once(stores: Processes, server: Server) -> None:
    one, other = stores
    await asyncio.gather(*(one.revoke(jti=f"t{number}", until=NOW + 99) for number in range(470)))
    before = server.calls("evalsha")
    await other.refresh(2.0)
    assert server.calls("evalsha") - before == 10
    assert len(other) == 470 and all(revoked(other, jti=f"t{number}") for number in range(470))
    await other.refresh(3.0)
    assert server.calls("evalsha") - before == 11
    late = RedisRevocations(patient(server), clock=FrozenClock(NOW), page=47)
    await late.refresh(0.0)
    assert len(late) == 470
    await late.aclose()


async def test_several_who_ask_at_once_share_a_trip(stores: Processes, server: Server) -> None:
    store = stores[0]
    before = server.calls("evalsha")
    await asyncio.gather(*(store.refresh(5.0) for _ in range(100)))
    assert server.calls("evalsha") - before == 1
    assert store.age(5.5) == 0.5


async def test_who_leads_and_is_cancelled_leaves_it_to_another(
    stores: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = stores
    await one.revoke(subject="ann")
    run, opened = other.link.run, asyncio.Event()

    async def gated(*args: Any) -> Any:
        await opened.wait()
        return await run(*args)

    monkeypatch.setattr(other.link, "run", gated)
    leader = asyncio.create_task(other.refresh(2.0))
    followers = [asyncio.create_task(other.refresh(2.0)) for _ in range(5)]
    for _ in range(5):
        await asyncio.sleep(0)
    leader.cancel()
    followers[0].cancel()
    opened.set()
    done = await asyncio.gather(leader, *followers, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in done] == [True, True, False, False, False, False]
    assert revoked(other) and not other.resting(2.0)


async def test_what_ended_is_forgotten_by_the_server_and_nothing_before(stores: Processes, server: Server) -> None:
    clock: Any = stores[0]._clock
    for number in range(120):
        await stores[0].revoke(jti=f"t{number}", until=NOW + number)
    clock.advance(60 + MARGIN)
    await stores[1].revoke(jti="new", until=NOW + 999)
    names = server.client.zcard("sigil:1:revoked:{sigil}:log")
    assert names == 120 - 61 + 1
    await stores.refresh()
    for store in stores:
        assert revoked(store, jti="t61", now=clock.time()) and not revoked(store, jti="t60", now=clock.time())


async def test_one_wrong_clock_ends_nothing(stores: Processes, server: Server) -> None:
    """A process whose clock is far ahead forgets nothing for the others."""
    import time

    await stores[0].revoke(jti="t1", until=time.time() + 600)
    ahead = RedisRevocations(patient(server), clock=FrozenClock(time.time() + 10_000_000))
    await ahead.revoke(jti="x")
    await stores.refresh()
    assert all(revoked(store, now=time.time()) for store in stores)
    await ahead.aclose()


async def test_a_full_server_refuses_and_forgets_nothing(server: Server, clock: FrozenClock) -> None:
    store = RedisRevocations(patient(server), clock=clock, max_entries=5)
    for number in range(5):
        await store.revoke(jti=f"t{number}", until=NOW + 10)
    with pytest.raises(RevocationsFullError):
        await store.revoke(jti="more", until=NOW + 10)
    await store.revoke(jti="t1", until=NOW + 20)
    clock.advance(11 + MARGIN)
    await store.revoke(jti="more", until=clock.time() + 10)
    assert revoked(store, jti="more", now=clock.time()) and revoked(store, jti="t1", now=clock.time())
    await store.aclose()


async def test_a_server_that_has_lost_everything_takes_nothing_from_who_knows(
    stores: Processes, server: Server
) -> None:
    one, other = stores
    await one.revoke(subject="ann")
    await other.refresh(2.0)
    server.call("FLUSHALL")
    await other.refresh(3.0)
    assert revoked(other)
    await one.revoke(subject="bob")
    await stores.refresh()
    for store in stores:
        assert revoked(store) and revoked(store, subject="bob")
    assert await other.restore(subject="ann"), "also what only processes know"
    assert not revoked(other)


async def test_a_server_that_is_behind_takes_nothing_either(stores: Processes, server: Server) -> None:
    """As a replica that was promoted before it had the newest."""
    one, other = stores
    await one.revoke(subject="ann")
    keys = server.client.keys("sigil*")
    raw = {key: server.client.execute_command("DUMP", key, NEVER_DECODE=True) for key in keys}
    await one.revoke(subject="bob")
    await other.refresh(2.0)
    for key, value in raw.items():
        server.call("RESTORE", key, 0, value, "REPLACE")
    await one.revoke(subject="carol")
    await other.refresh(3.0)
    assert all(revoked(other, subject=name) for name in ("ann", "bob", "carol"))


async def test_who_was_away_for_long_reads_everything_again(stores: Processes, server: Server) -> None:
    one, other = stores
    clock: Any = one._clock
    await one.revoke(subject="ann")
    await other.refresh(2.0)
    await one.restore(subject="ann")
    clock.advance(3_601)
    for number in range(120):
        await one.revoke(jti=f"x{number}")
    assert server.client.hexists("sigil:1:revoked:{sigil}", "floor")
    assert revoked(other)
    await other.refresh(3.0)
    assert not revoked(other) and len(other) == 120


async def test_a_server_that_is_away_is_left_alone_for_a_while(clock: FrozenClock) -> None:
    with Server() as server:
        store = RedisRevocations(patient(server), clock=clock)
        await store.revoke(subject="ann")
        await store.refresh(1.0)
        server.kill()
        with pytest.raises(StoreUnavailableError):
            await store.refresh(2.0)
        assert store.resting(2.0) and revoked(store) and store.age(2.0) == 1.0
        runs = store.link.counters.runs
        for _ in range(20):
            with pytest.raises(StoreUnavailableError):
                await store.refresh(2.0)
        assert store.link.counters.runs == runs
        with pytest.raises(StoreUnavailableError):
            await store.revoke(subject="bob")
        assert not revoked(store, subject="bob")
        await store.aclose()


async def test_keys_name_nobody_and_end_with_the_last_entry(stores: Processes, server: Server) -> None:
    store = stores[0]
    await store.revoke(subject="ann@example.com", until=NOW + 10_000)
    keys = server.client.keys("*")
    assert len(keys) == 4 and all(9_900_000 < server.client.pttl(key) < 11_000_000 for key in keys)
    whole = b"".join(server.client.execute_command("DUMP", key, NEVER_DECODE=True) for key in keys)
    assert b"ann@" not in whole
    await store.revoke(jti="for ever")
    assert all(server.client.pttl(key) == -1 for key in keys)
    await store.restore(jti="for ever")
    clock: Any = store._clock
    clock.advance(3_601)
    await store.revoke(jti="short", until=clock.time() + 1)
    assert all(server.client.pttl(key) > 0 for key in keys)


async def test_a_digest_key_and_a_prefix_set_stores_apart(server: Server, clock: FrozenClock) -> None:
    link = patient(server)
    plain, keyed, apart = (
        RedisRevocations(link, clock=clock, **options)
        for options in ({}, {"digest_key": SecretStr("canary")}, {"prefix": "other"})
    )
    await keyed.revoke(subject="ann")
    await plain.refresh(1.0)
    await apart.refresh(1.0)
    assert revoked(keyed) and not revoked(plain) and not revoked(apart)
    assert len(plain) == 1 and len(apart) == 0
    assert "canary" not in repr(keyed)
    await link.aclose()


NAME = b"s" + b"d" * 18
PAGE = [b"", 0, b"0", 1]


@pytest.mark.parametrize(
    "reply",
    [
        None, 5, True, 2, -2, [], b"x", PAGE[:3], [b"", 0, b"x", 1], [*PAGE, NAME], ["", 0, b"0", 1], [b"", 3, b"0", 1],
        [b"", 0, b"0", 2], [b"", 0, b"0", True], [b"", 0, b"0", 0], [b"", 0, b"9" * 5_000, 1], [b"e" * 999, 0, b"0", 1],
        *([*PAGE, NAME, value] for value in (b"1", b"a b", b"1 2 3", 5, None, b"nan 2", b"1 nan", b"1 inf", b"-1 2")),
        *([*PAGE, name, b"1 2"] for name in (b"", b"name", 5, None, NAME * 2)),
        PAGE + [NAME, b"1 2"] * 6,
    ],
    ids=lambda reply: repr(reply)[:60],
)  # fmt: skip
async def test_what_no_script_returns_is_a_store_that_is_away(reply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisRevocations("redis://127.0.0.1:1", page=5)

    async def answer(*_: Any) -> Any:
        return reply

    monkeypatch.setattr(store.link, "run", answer)
    with pytest.raises(StoreUnavailableError, match="does not return"):
        await store.refresh(1.0)
    with pytest.raises(StoreUnavailableError, match="does not return"):
        await store.revoke(subject="ann")
    assert len(store) == 0 and store.age(1.0) == float("inf")
    assert store.link.counters.errors == store.link.counters.failures == 2
    await store.aclose()


async def test_a_server_that_never_comes_to_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "MAX_ENTRIES", 1_000)
    store = RedisRevocations("redis://127.0.0.1:1", max_entries=500, page=500)
    asked = 0

    async def answer(*_: Any) -> Any:
        nonlocal asked
        asked += 1
        names = [b"s%018d" % (asked * 500 + number) for number in range(500)]
        return [b"epoch", int(asked == 1), b"%d" % asked, 0, *[part for name in names for part in (name, b"1 9")]]

    monkeypatch.setattr(store.link, "run", answer)
    with pytest.raises(StoreUnavailableError, match="does not return"):
        await store.refresh(1.0)
    assert asked < 50 and len(store) == 0
    await store.aclose()

"""Tickets on a real server: once for all processes, one trip each, and closed when in doubt."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from sigil_policy.core.facts import Principal
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.tickets import RedisTickets
from sigil_policy.stores.tickets import Ticket, new_ticket, ticket_digest
from tests.stores.redis.proxy import Proxy
from tests.stores.redis.servers import Server, cluster
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

# A store that is well may still be slow on a machine that is busy with other things.
PATIENT = 30.0
SETS = {"sigil:1:tickets:{sigil}:ends", "sigil:1:tickets:{sigil}:names"}


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
async def stores(server: Server) -> AsyncIterator[list[RedisTickets]]:
    """Of processes that know nothing of each other."""
    made = [RedisTickets(patient(server.url)) for _ in range(2)]
    yield made
    for store in made:
        await store.aclose()


def patient(url: str) -> RedisLink:
    return RedisLink(url, deadline=PATIENT, connect_timeout=PATIENT)


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(6_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come true")


def issue(store: RedisTickets, name: str, *, holder: str = "ann", most: int = 10, ttl: float = 30) -> Any:
    return store.issue(ticket_digest(name), name.encode(), holder=holder, most=most, ttl=ttl, now=0)


def redeem(store: RedisTickets, name: str) -> Any:
    return store.redeem(ticket_digest(name), 0)


async def test_a_ticket_of_one_process_holds_once_in_all(stores: list[RedisTickets]) -> None:
    one, other = stores
    assert await issue(one, "a") == 0
    assert await redeem(other, "a") == b"a"
    assert await redeem(one, "a") is None and await redeem(other, "a") is None
    assert await redeem(one, "never was") is None


async def test_of_two_connections_that_redeem_at_once_exactly_one_gets_it(stores: list[RedisTickets]) -> None:
    for number in range(100):
        await issue(stores[0], str(number), holder=str(number))
    got = await asyncio.gather(*(redeem(store, str(number)) for number in range(100) for store in stores * 2))
    assert sorted(found for found in got if found) == sorted(str(number).encode() for number in range(100))


async def test_records_come_back_byte_by_byte(stores: list[RedisTickets]) -> None:
    caller = Principal(
        subject="ann", scopes=frozenset(("a", "b")), claims={"jti": "t1", "x": ("\0é", 1.5)}, expires=2e9
    )
    record, text = Ticket(caller, "https://app.example").encode(), new_ticket()
    await stores[0].issue(ticket_digest(text), record, holder=caller.key, most=1, ttl=5, now=0)
    ticket = Ticket.decode(await redeem(stores[1], text))
    assert ticket is not None and ticket.principal.claims == caller.claims and ticket.origin == "https://app.example"


async def test_a_ticket_ends_by_the_servers_clock(stores: list[RedisTickets], server: Server) -> None:
    await issue(stores[0], "a", most=1, ttl=0.05)
    await asyncio.sleep(0.07)
    assert await redeem(stores[0], "a") is None
    assert await issue(stores[1], "b", most=1, ttl=0.0) == 0, "what has ended counts no more"
    await issue(stores[0], "c", ttl=30)
    assert server.client.zcard("sigil:1:tickets:{sigil}:ends") == server.client.zcard("sigil:1:tickets:{sigil}:names")


# As if their time had passed, for all of them at once.
ENDED = "for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], 1, name) end"


async def test_what_has_ended_is_forgotten_some_at_a_time_and_counts_no_more(
    stores: list[RedisTickets], server: Server
) -> None:
    await asyncio.gather(*(issue(stores[0], f"x{number}", holder=f"x{number}") for number in range(150)))
    await issue(stores[0], "a", most=1)
    server.call("EVAL", ENDED, 1, "sigil:1:tickets:{sigil}:ends")
    assert await issue(stores[1], "b", most=1) == 0, "although there are others to be forgotten first"
    ends, names = (server.client.zcard(key) for key in sorted(SETS))
    assert 1 < ends == names < 100
    await issue(stores[1], "c", most=2)
    assert [server.client.zcard(key) for key in sorted(SETS)] == [2, 2]


async def test_a_caller_has_so_many_in_all_processes_together(stores: list[RedisTickets]) -> None:
    one, other = stores
    assert [await issue(store, f"a{n}", most=3, ttl=200 + n) for n, store in enumerate((one, other, one))] == [0, 0, 0]
    assert 100 < await issue(other, "a3", most=3) <= 200, "until the first of them ends"
    assert await redeem(one, "a3") is None, "what was refused is no ticket"
    assert await issue(other, "b0", holder="bob", most=1) == 0
    assert await redeem(other, "a2") == b"a2"
    assert await issue(one, "a4", most=3) == 0
    assert await issue(one, "a5", most=3) > 0


@steady()
async def test_a_full_store_is_one_that_is_away(server: Server) -> None:
    store = RedisTickets(patient(server.url), max_tickets=2)
    await issue(store, "a", ttl=0.5)
    await issue(store, "b", holder="bob")
    with pytest.raises(StoreUnavailableError, match="as many") as caught:
        await issue(store, "c", holder="cleo")
    assert caught.value.retry_after == 1.0
    await asyncio.sleep(0.55)
    assert await issue(store, "c", holder="cleo") == 0
    assert await redeem(store, "b") == b"b"
    await store.aclose()


async def test_each_takes_one_trip(stores: list[RedisTickets], server: Server) -> None:
    store = stores[0]
    await issue(store, "warm"), await redeem(store, "warm")
    before = server.calls("evalsha") + server.calls("eval")
    await issue(store, "a")
    await redeem(store, "a")
    assert server.calls("evalsha") + server.calls("eval") - before == 2
    assert store.link.counters.runs == 4


async def test_keys_name_nobody_and_every_key_has_an_end(stores: list[RedisTickets], server: Server) -> None:
    text = new_ticket()
    await issue(stores[0], text, holder="bearer:0::ann@example.com")
    keys = set(server.client.keys("*"))
    assert keys - SETS == {"sigil:1:tickets:{sigil}:" + ticket_digest(text).hex()}
    assert keys >= SETS and all(0 < server.client.pttl(key) <= 360_000 for key in keys)
    for key in SETS:
        assert b"ann@" not in server.client.execute_command("DUMP", key, NEVER_DECODE=True)
    assert text not in str(keys)
    await redeem(stores[0], text)
    assert server.client.keys("*") == []


async def test_an_issue_that_nobody_waits_for_is_taken_back(server: Server) -> None:
    async with Proxy(server.port) as proxy:
        store = RedisTickets(patient(proxy.url))
        await issue(store, "warm"), await redeem(store, "warm")
        proxy.mode, proxy.delay = "slow", 0.1
        task = asyncio.create_task(issue(store, "a", most=1))
        await until(lambda: server.client.keys("*"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not server.client.keys("*"))
        proxy.mode = "pass"
        assert await issue(store, "b", most=1) == 0
        await store.aclose()


@steady()
async def test_a_redemption_that_nobody_hears_of_has_used_the_ticket(server: Server) -> None:
    async with Proxy(server.port) as proxy:
        store = RedisTickets(proxy.url, deadline=0.2)
        await issue(store, "a")
        proxy.mode = "hang"
        with pytest.raises(StoreUnavailableError):
            await redeem(store, "a")
        proxy.mode = "pass"
        await store.aclose()
    other = RedisTickets(patient(server.url))
    assert await redeem(other, "a") is None
    await other.aclose()


async def test_a_server_that_is_away_is_said_to_be() -> None:
    store = RedisTickets("redis://127.0.0.1:1", deadline=0.2)
    for work in (issue(store, "a"), redeem(store, "a")):
        with pytest.raises(StoreUnavailableError):
            await work
    await store.aclose()


async def test_a_cluster_has_all_of_a_prefix_on_one_node() -> None:
    with cluster(2) as nodes:
        store = RedisTickets(patient("redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)))
        for number in range(5):
            assert await issue(store, str(number)) == 0
        assert [await redeem(store, str(number)) for number in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        await store.aclose()


@pytest.mark.parametrize("reply", [None, b"x", [], [0], "0"])
async def test_what_no_script_returns_is_a_store_that_is_away(reply: Any) -> None:
    class Link(RedisLink):
        async def run(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]  # as something between may answer
            return reply

    store = RedisTickets(Link("redis://127.0.0.1:1"))
    with pytest.raises(StoreUnavailableError, match="does not return"):
        await issue(store, "a")
    if reply is not None and type(reply) is not bytes:
        with pytest.raises(StoreUnavailableError, match="does not return"):
            await redeem(store, "a")
    await store.aclose()


def test_options_that_cannot_be_are_refused() -> None:
    link = RedisLink("redis://:canary-password@127.0.0.1:1")
    for options in ({"prefix": "a b"}, {"max_tickets": 0}, {"deadline": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RedisTickets(link, **options)
    assert "canary" not in repr(RedisTickets(link))

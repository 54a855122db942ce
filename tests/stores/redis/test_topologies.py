"""Several servers: a cluster whose slots move and whose nodes fail, a primary that is replaced, sentinels."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis.crc
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink, Script
from sigil_policy.stores.redis.topology import slot_of
from tests.stores.redis.servers import NODE_TIMEOUT, Server, cluster, info, replicated, wait_until, watched

pytestmark = pytest.mark.anyio

COUNT = Script("count", "return redis.call('incrby', KEYS[1], ARGV[1])")
BOTH = Script("both", "return {redis.call('incr', KEYS[1]), redis.call('incr', KEYS[2])}")
PATIENT = 30.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Server]]:
    with cluster() as nodes:
        yield nodes


def address(nodes: list[Server]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


@pytest.fixture
async def link(nodes: list[Server]) -> AsyncIterator[RedisLink]:
    for node in nodes:
        node.call("FLUSHALL")
    # One node is enough to find the others.
    link = RedisLink(address(nodes[1:2]), deadline=PATIENT, connect_timeout=PATIENT)
    yield link
    await link.aclose()


def owns(node: Server, slot: int) -> bool:
    """Whether a node holds itself for the owner of a slot."""
    rows = node.call("CLUSTER", "SLOTS")
    return any(start <= slot <= end and primary[1] == node.port for start, end, primary, *_ in rows)


async def eventually(link: RedisLink, script: Script, keys: list[bytes], *args: Any, seconds: float = 100.0) -> float:
    """Ask until there is a reply; returns how long that took."""
    began = time.monotonic()
    while True:
        try:
            await link.run(script, keys, args)
            return time.monotonic() - began
        except StoreUnavailableError:
            assert time.monotonic() - began < seconds
            await asyncio.sleep(0.02)


@given(st.one_of(st.binary(max_size=40), st.lists(st.sampled_from([b"{", b"}", b"a", b"b"]), max_size=8).map(b"".join)))
def test_the_slot_of_a_key_is_that_of_its_hash_tag(key: bytes) -> None:
    assert slot_of(key) == redis.crc.key_slot(key)


async def test_each_run_goes_to_the_node_of_its_key(nodes: list[Server], link: RedisLink) -> None:
    keys = [b"{caller %d}" % number for number in range(200)]
    replies = await asyncio.gather(*[link.run(BOTH, [key + b":1", key + b":2"], []) for key in keys])
    assert replies == [[1, 1]] * 200
    assert sum(node.call("DBSIZE") for node in nodes) == 400
    assert all(node.call("DBSIZE") > 50 for node in nodes)
    # The map was right from the start, and each node got its script once.
    assert link.counters.redirected == 0
    assert link.counters.connections == 3
    # (A node may not have seen yet that another link has gone.)
    await asyncio.to_thread(wait_until, lambda: [len(node.clients()) for node in nodes] == [1, 1, 1])


async def test_keys_of_several_slots_in_one_run_are_an_error_that_is_reported(link: RedisLink) -> None:
    with capture_logs() as logs, pytest.raises(StoreUnavailableError, match="CROSSSLOT"):
        await link.run(BOTH, [b"a", b"b"], [])
    assert [line["event"] for line in logs] == ["store_script_refused"]


async def test_a_link_for_one_server_that_finds_a_cluster_says_so(nodes: list[Server]) -> None:
    link = RedisLink(nodes[0].url, deadline=PATIENT, connect_timeout=PATIENT)
    with capture_logs() as logs:
        answers = await asyncio.gather(
            *[link.run(COUNT, [b"{caller %d}" % number], [1]) for number in range(50)], return_exceptions=True
        )
    assert any("redis+cluster://" in str(answer) for answer in answers)
    assert len(logs) == 1
    await link.aclose()


async def test_a_link_for_a_cluster_that_finds_one_server_says_so() -> None:
    with Server() as server:
        link = RedisLink(address([server]), deadline=PATIENT, connect_timeout=PATIENT)
        with capture_logs() as logs, pytest.raises(StoreUnavailableError):
            await link.run(COUNT, [b"k"], [1])
        assert [line["event"] for line in logs] == ["store_unavailable"]
        assert "cluster support disabled" in logs[0]["reason"]
        await link.aclose()


async def test_a_slot_that_moves_while_it_is_used_loses_and_repeats_nothing(
    nodes: list[Server], link: RedisLink
) -> None:
    key = b"{moving}"
    slot = slot_of(key)
    asked: list[asyncio.Future[Any]] = []
    stop = False

    async def keep_asking() -> None:
        while not stop:
            asked.extend(asyncio.ensure_future(link.run(COUNT, [key], [1])) for _ in range(3))
            await asyncio.sleep(0.001)

    await link.run(COUNT, [key], [0])
    asking = asyncio.ensure_future(keep_asking())
    names = [await asyncio.to_thread(node.call, "CLUSTER", "MYID") for node in nodes]
    for _ in range(3):
        owner = next(index for index in range(3) if owns(nodes[index], slot))
        other = (owner + 1) % 3
        for index, state, name in ((other, "IMPORTING", owner), (owner, "MIGRATING", other)):
            await asyncio.to_thread(nodes[index].call, "CLUSTER", "SETSLOT", slot, state, names[name])
        await asyncio.sleep(0.05)
        await asyncio.to_thread(
            nodes[owner].call, "MIGRATE", "127.0.0.1", nodes[other].port, "", 0, 5000, "KEYS", key.decode()
        )
        await asyncio.sleep(0.05)
        for index in (other, owner):
            await asyncio.to_thread(nodes[index].call, "CLUSTER", "SETSLOT", slot, "NODE", names[other])
        await asyncio.sleep(0.05)
    stop = True
    await asking
    replies = await asyncio.gather(*asked)
    assert sorted(replies) == list(range(1, len(asked) + 1))
    assert link.counters.redirected > 3
    assert link.counters.failures == link.counters.opened == 0


async def test_a_map_that_is_out_of_date_is_corrected(nodes: list[Server], link: RedisLink) -> None:
    await link.run(COUNT, [b"k"], [0])
    (line,) = link._lines.values()
    cluster_map: Any = line._route
    refresh = cluster_map.refresh
    # As if all slots had moved behind our back.
    cluster_map._owners = cluster_map._owners[::-1]
    cluster_map._mapped_at = float("-inf")
    asked = [link.run(COUNT, [b"{caller %d}" % number], [1]) for number in range(100)]
    cluster_map.refresh = lambda: False
    assert await asyncio.gather(*asked) == [1] * 100
    assert 20 < link.counters.redirected <= 100
    redirected = link.counters.redirected
    # What moved is known at once,
    assert (
        await asyncio.gather(*[link.run(COUNT, [b"{caller %d}" % number], [1]) for number in range(100)]) == [2] * 100
    )
    assert link.counters.redirected == redirected
    # and all else as soon as the map has been read.
    cluster_map.refresh = refresh
    assert cluster_map.refresh()
    end = time.monotonic() + 60
    while cluster_map._task is not None:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    asked = [link.run(COUNT, [b"{other caller %d}" % number], [1]) for number in range(100)]
    assert await asyncio.gather(*asked) == [1] * 100
    assert link.counters.redirected == redirected
    assert await link.run(Script("keyless", "return ARGV[1]"), [], ["anywhere"]) == b"anywhere"


async def test_a_cluster_that_is_down_is_away_until_it_is_whole(nodes: list[Server], link: RedisLink) -> None:
    key = b"{down}"
    owner = next(node for node in nodes if owns(node, slot_of(key)))
    other = next(slot for slot in range(16_384) if slot != slot_of(key) and owns(owner, slot))
    await link.run(COUNT, [key], [1])
    with capture_logs() as logs:
        owner.call("CLUSTER", "DELSLOTS", other)
        wait_until(lambda: "cluster_state:fail" in info(owner))
        answers = await asyncio.gather(*[link.run(COUNT, [key], [1]) for _ in range(10)], return_exceptions=True)
        assert all(isinstance(answer, StoreUnavailableError) for answer in answers)
        assert not link.available
        owner.call("CLUSTER", "ADDSLOTS", other)
        await eventually(link, COUNT, [key], 1)
    assert "CLUSTERDOWN" in logs[0]["reason"]
    assert [line["event"] for line in logs] == ["store_unavailable", "store_available"]
    for node in nodes:
        await asyncio.to_thread(wait_until, lambda node=node: "cluster_state:ok" in info(node))


async def test_a_node_that_fails_is_away_alone_and_its_replica_takes_over() -> None:
    with cluster() as nodes, Server(cluster_enabled="yes", cluster_node_timeout=NODE_TIMEOUT) as replica:
        for node in nodes:
            replica.call("CLUSTER", "MEET", "127.0.0.1", node.port)
        victim = nodes[2]
        name = victim.call("CLUSTER", "MYID")
        await asyncio.to_thread(wait_until, lambda: replica.call("CLUSTER", "REPLICATE", name))
        await asyncio.to_thread(
            wait_until, lambda: replica.client.info("replication").get("master_link_status") == "up"
        )
        # The others know of it too, and follow it once it has taken over.
        for node in nodes:
            await asyncio.to_thread(wait_until, lambda node=node: "cluster_known_nodes:4" in info(node))
        link = RedisLink(address(nodes), deadline=PATIENT, connect_timeout=PATIENT)
        keys = [b"{caller %d}" % number for number in range(60)]
        mine = [key for key in keys if owns(victim, slot_of(key))]
        others = [key for key in keys if key not in mine]
        restored: list[bool] = []
        link.on_restored(lambda: restored.append(True))
        for key in (mine[0], others[0], others[1], others[2]):
            await eventually(link, COUNT, [key], 0)
        with capture_logs() as logs:
            victim.kill()
            for _ in range(20):
                began = time.monotonic()
                answers = await asyncio.gather(*[link.run(COUNT, [key], [1]) for key in mine], return_exceptions=True)
                assert all(isinstance(answer, StoreUnavailableError) for answer in answers)
                assert time.monotonic() - began < PATIENT / 2, "nobody waits for the deadline"
                await asyncio.gather(*[link.run(COUNT, [key], [1]) for key in others])
            assert not link.available
            # The cluster elects it after the node was silent for some time; here it is told to.
            replica.call("CLUSTER", "FAILOVER", "TAKEOVER")
            await eventually(link, COUNT, [mine[0]], 1)
            await asyncio.gather(*[link.run(COUNT, [key], [1]) for key in keys])
        assert link.available
        # It was the victim that went away, and its keys that came back.
        assert [(line["event"], line["store"]) for line in logs] == [
            ("store_unavailable", f"127.0.0.1:{victim.port}"),
            ("store_available", f"127.0.0.1:{victim.port}"),
        ]
        assert restored == [True]
        await link.aclose()


async def test_a_primary_that_becomes_a_replica_is_left_for_the_one_that_its_name_means_now(monkeypatch: Any) -> None:
    with replicated() as (primary, replica):
        current = primary
        loop = asyncio.get_running_loop()
        resolve = loop.getaddrinfo

        async def by_name(host: Any, port: Any, **options: Any) -> Any:
            # The name of a service that points to whatever is the primary.
            return await resolve("127.0.0.1", current.port, **options)

        monkeypatch.setattr(loop, "getaddrinfo", by_name)
        link = RedisLink("redis://primary.internal:6379", deadline=PATIENT, connect_timeout=PATIENT)
        with capture_logs() as logs:
            assert await link.run(COUNT, [b"k"], [5]) == 5
            assert primary.call("WAIT", 1, 20_000) == 1
            replica.call("REPLICAOF", "NO", "ONE")
            primary.call("REPLICAOF", "127.0.0.1", replica.port)
            current = replica
            # The server itself says that it did not do it: it is done where it belongs, and nobody notices.
            replies = await asyncio.gather(*[link.run(COUNT, [b"k"], [1]) for _ in range(64)])
        assert replies == list(range(6, 70))
        assert link.counters.failures == link.counters.opened == 0
        assert logs == []
        await link.aclose()


async def test_the_primary_that_sentinels_name_is_followed_when_it_fails() -> None:
    with replicated() as (primary, replica), watched("main", primary, replica) as sentinel:
        dead = "127.0.0.1:1"
        url = f"redis+sentinel://{dead},127.0.0.1:{sentinel.port}/main/2"
        link = RedisLink(url, deadline=PATIENT, connect_timeout=PATIENT)
        await eventually(link, COUNT, [b"k"], 7)
        assert primary.client.info("keyspace")["db2"]["keys"] == 1
        assert primary.call("WAIT", 1, 20_000) == 1
        with capture_logs() as logs:
            primary.kill()
            # Not earlier: it is not to be replaced because it stood still.
            sentinel.call("SENTINEL", "SET", "main", "down-after-milliseconds", 500)
            await eventually(link, COUNT, [b"k"], 1)
            replica.call("SELECT", 2)
        assert replica.client.info("replication")["role"] == "master"
        assert replica.client.info("keyspace")["db2"]["keys"] == 1
        assert [line["event"] for line in logs] == ["store_unavailable", "store_available"]
        await link.aclose()


@pytest.mark.parametrize("service", ["main", "unknown"])
async def test_sentinels_that_cannot_say_where_the_primary_is(service: str) -> None:
    with Server(sentinel=True) as sentinel:
        port = 1 if service == "main" else sentinel.port
        link = RedisLink(
            f"redis+sentinel://:s3cret@127.0.0.1:{port}/{service}", deadline=PATIENT, connect_timeout=PATIENT
        )
        with capture_logs() as logs, pytest.raises(StoreUnavailableError) as caught:
            await link.run(COUNT, [b"k"], [1])
        assert ("knows no primary" if service == "unknown" else "Connect") in logs[0]["reason"]
        assert "s3cret" not in f"{caught.value}{logs}{link!r}"
        await link.aclose()

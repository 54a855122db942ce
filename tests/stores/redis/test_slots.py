"""Slots in a real Valkey: over processes, after kill -9, with a server that hangs, forgets or is away."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.concurrency import ConcurrencyLimit
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink, Script
from sigil_policy.stores.redis.slots import RedisSlots
from sigil_policy.stores.slots import Claim, Refusal, Slot
from sigil_policy.testing import drive
from tests.stores.redis.servers import Server, cluster, wait_until
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
NOW = 0.0
# A store that is well may still be slow on a machine that is busy with other things.
PATIENT = 30.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(limits_server: Any) -> Any:
    return limits_server


@contextlib.asynccontextmanager
async def slots_at(server: Any, *, deadline: float = PATIENT, **options: Any) -> Any:
    slots = RedisSlots(RedisLink(server.url, deadline=deadline, connect_timeout=max(deadline, 1.0)), **options)
    try:
        yield slots
    finally:
        await slots.aclose()


def claims(*pairs: tuple[str, int]) -> tuple[Claim, ...]:
    return tuple(Claim(*pair) for pair in pairs)


async def taken(slots: RedisSlots, *pairs: tuple[str, int], ttl: float = 15.0) -> Slot:
    slot = await slots.take(claims(*pairs), ttl, NOW)
    assert isinstance(slot, Slot)
    return slot


def members(server: Any, slots: RedisSlots, key: str) -> int:
    return int(server.client.zcard(slots.redis_key(key)))  # type: ignore[arg-type]


async def eventually(is_true: Callable[[], bool], within: float = 30.0) -> float:
    """Wait for it; returns how long it took."""
    start = time.monotonic()
    while not is_true():
        assert time.monotonic() - start < within, "it did not happen"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


# --- one decision, one trip -------------------------------------------------------------------------------------------


async def test_all_or_nothing_in_one_trip(server: Any) -> None:
    async with slots_at(server) as slots:
        first = await taken(slots, ("alice", 2), ("route", 1))
        assert first.in_flight == (1, 1)
        before = slots.link.counters.runs
        for _ in range(3):
            assert await slots.take(claims(("alice", 2), ("route", 1)), 15.0, NOW) == Refusal((1, 1), (1,))
        assert slots.link.counters.runs - before == 3
        assert members(server, slots, "alice") == 1
        assert (await taken(slots, ("alice", 2))).in_flight == (2,)
        assert await slots.take(claims(("alice", 2), ("route", 1)), 15.0, NOW) == Refusal((2, 1), (0, 1))
        assert slots.give_back(first) is None
        slots.give_back(first)
        await eventually(lambda: members(server, slots, "route") == 0)
        assert (await taken(slots, ("alice", 2), ("route", 1))).in_flight == (2, 1)


async def test_keys_expire_name_nobody_and_are_on_one_node(server: Any) -> None:
    async with slots_at(server, prefix="shop") as slots:
        await taken(slots, ("alice@example.com", 2), ("route \udcff {x}", 9), ttl=2_000.0)
        keys = server.client.keys()
        assert isinstance(keys, list) and len(keys) == 2
        for key in keys:
            assert b"alice" not in key
            assert key.startswith(b"shop:1:c:{shop}:")
            assert len(key) < 64
            assert 1_900_000 < int(server.client.pttl(key)) <= 2_000_000  # type: ignore[arg-type]
        link = slots.link
        secrets = (None, SecretStr("x"), SecretStr("y"))
        names = {RedisSlots(link, digest_key=secret).redis_key("a") for secret in secrets}
        assert len(names | {slots.redis_key("a")}) == 4


async def test_a_key_lives_as_long_as_the_longest_slot_in_it(server: Any) -> None:
    async with slots_at(server) as slots:
        await taken(slots, ("alice", 2), ttl=600.0)
        await taken(slots, ("alice", 2), ttl=2.0)
        assert int(server.client.pttl(slots.redis_key("alice"))) > 500_000  # type: ignore[arg-type]


async def test_what_has_expired_does_not_count_and_is_removed_little_by_little(server: Any) -> None:
    async with slots_at(server) as slots:
        key = slots.redis_key("alice")
        server.client.zadd(key, {f"dead {number}": number for number in range(250)})
        for left in (150, 50, 0):
            slot = await taken(slots, ("alice", 1))
            assert slot.in_flight == (1,)
            assert members(server, slots, "alice") == left + 1
            slots.give_back(slot)


def test_options_that_cannot_be_are_refused_and_no_secret_is_shown() -> None:
    url = "redis://:s3cret@localhost:1/0"
    for wrong in ("", "a b", "{a}", "x" * 65, "ä"):
        with pytest.raises(ValueError, match="prefix must be"):
            RedisSlots(url, prefix=wrong)
    for key in ("", "s3cret" * 20):
        with pytest.raises(ValueError, match="digest_key must be 1 to 64 bytes") as raised:
            RedisSlots(url, digest_key=SecretStr(key))
        assert "s3cret" not in str(raised.value)
    with pytest.raises(ValueError, match="deadline is an option of the link"):
        RedisSlots(RedisLink(url), deadline=1.0)
    assert "s3cret" not in repr(RedisSlots(url, digest_key=SecretStr("s3cret"), deadline=1.0))


# --- the heartbeat ----------------------------------------------------------------------------------------------------


@steady()
async def test_the_heartbeat_keeps_what_lasts_longer_than_the_ttl(server: Any) -> None:
    async with slots_at(server) as slots:
        slot = await taken(slots, ("alice", 1), ("route", 1), ttl=0.9)
        for _ in range(10):
            await asyncio.sleep(0.2)
            assert isinstance(await slots.take(claims(("alice", 1)), 0.9, NOW), Refusal)
        slots.give_back(slot)
        await taken(slots, ("alice", 1), ("route", 1))


async def test_one_trip_renews_everything_and_no_task_is_made_for_a_request(server: Any) -> None:
    async with slots_at(server) as slots:
        # So long that no beat of the timer falls into the count.
        await taken(slots, ("warm", 1), ttl=600.0)
        tasks = asyncio.all_tasks()
        held = [await taken(slots, (f"caller {number % 7}", 200), ("route", 1_000), ttl=600.0) for number in range(600)]
        assert asyncio.all_tasks() <= tasks
        first = min(float(score) for _, score in server.client.zrange(slots.redis_key("route"), 0, -1, withscores=True))
        before = slots.link.counters.runs
        await slots._heartbeat(600.0).renew()
        # 601 slots in parts of 100, written together.
        assert slots.link.counters.runs - before == 7
        scores = [score for _, score in server.client.zrange(slots.redis_key("route"), 0, -1, withscores=True)]
        assert len(scores) == 600
        assert min(scores) > first
        assert asyncio.all_tasks() <= tasks
        for slot in held:
            slots.give_back(slot)


async def test_a_process_that_is_idle_sends_nothing(server: Any) -> None:
    async with slots_at(server) as slots:
        slots.give_back(await taken(slots, ("alice", 1), ttl=0.15))
        await eventually(lambda: slots._heartbeat(0.15)._timer is None)
        before = slots.link.counters.runs
        await asyncio.sleep(0.3)
        assert slots.link.counters.runs == before
        slot = await taken(slots, ("alice", 1), ttl=0.15)
        await eventually(lambda: slots.link.counters.runs > before + 2)  # it beats again
        slots.give_back(slot)


class Mute:
    """A link that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[Any], asyncio.Future[Any]]] = []
        self.late: list[Callable[[Any], None]] = []

    def on_restored(self, callback: Callable[[], Any]) -> None:
        pass

    def run(self, script: Script, keys: Any, args: Any, *, abandoned: Any = None) -> Awaitable[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.append((script.name, list(args), answer))
        self.late.append(abandoned)
        return answer

    def send(self, script: Script, keys: Any, args: Any) -> None:
        self.run(script, keys, args)


async def test_many_slots_are_renewed_some_at_a_time() -> None:
    link: Any = Mute()
    slots = RedisSlots(link)
    held = [slots.hold(claims((f"caller {number}", 1)), 15.0) for number in range(450)]
    heartbeat = slots._heartbeat(15.0)
    renewing = asyncio.ensure_future(heartbeat.renew())
    for sent in (2, 4, 5):
        for _ in range(8):
            await asyncio.sleep(0)
        assert [name for name, _, _ in link.asked if name == "slots_renew"] == ["slots_renew"] * sent
        if sent == 2:
            # What is late does not keep the others from being renewed.
            link.asked[0][2].set_exception(StoreUnavailableError("too late"))
            link.asked[1][2].set_result(0)
            for slot in held[:20] + held[420:]:
                slots.give_back(slot)
        elif sent == 4:
            for asked in link.asked[-2:]:
                asked[2].set_result(0)
    assert len(link.asked[-1][1]) == 1 + 2 * 20, "what has ended is not renewed"
    link.asked[-1][2].set_result(0)
    await renewing
    assert len(heartbeat.open) == 400
    heartbeat.stop()


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
async def test_what_ended_while_it_was_renewed_is_given_back_once_more(late: bool) -> None:
    """The renewal may have come to the server after the giving back, if it had to be sent again."""
    link: Any = Mute()
    slots = RedisSlots(link)
    taking = asyncio.ensure_future(slots.take(claims(("alice", 2)), 0.06, NOW))
    await asyncio.sleep(0)
    link.asked[0][2].set_result([1, 1])
    slot = await taking
    assert isinstance(slot, Slot)
    await eventually(lambda: len(link.asked) == 2)
    renew, args, answer = link.asked[1]
    assert renew == "slots_renew"
    slots.give_back(slot)
    assert [name for name, _, _ in link.asked[2:]] == ["slots_release"]
    if late:
        answer.set_exception(StoreUnavailableError("too late"))
        await asyncio.sleep(0.01)
        assert len(link.asked) == 3
        link.late[1](0)
    else:
        answer.set_result(0)
        await asyncio.sleep(0.01)
    assert [(name, given) for name, given, _ in link.asked[2:]] == [("slots_release", [slot.mark[1]])] * 2
    assert args[-1] == slot.mark[1]


@pytest.mark.parametrize("reply", [None, 1, b"OK", "OK", [], [1], [1, 5, 5], [1, b"1"], [0, 1], {1: 1}], ids=repr)
async def test_a_reply_that_is_no_decision_is_a_store_that_is_not_there(server: Any, reply: Any) -> None:
    async with slots_at(server) as slots:
        late: list[Any] = []

        async def answer(*_: Any, abandoned: Any) -> Any:
            late.append(abandoned)
            return reply

        slots.link.run = answer  # type: ignore[method-assign]
        before = slots.link.counters.failures
        with pytest.raises(StoreUnavailableError, match="something that its script does not return"):
            await slots.take(claims(("alice", 2)), 15.0, NOW)
        assert slots.link.counters.failures == before + 1
        late[0](reply)
        assert not any(heartbeat.open for heartbeat in slots._heartbeats.values())


# --- cancelled, late, lost ---------------------------------------------------------------------------------------


async def test_a_take_that_is_cancelled_anywhere_leaves_no_slot(server: Any) -> None:
    async with slots_at(server) as slots:
        await taken(slots, ("warm", 1))
        cancelled = 0
        for turns in range(80):
            take = asyncio.ensure_future(slots.take(claims(("alice", 1_000), ("route", 1_000)), 15.0, NOW))
            for _ in range(turns % 4):
                await asyncio.sleep(0)
            if turns >= 60:
                await asyncio.sleep(0.0001 * (turns - 59))
            take.cancel()
            try:
                slots.give_back(await take)  # type: ignore[arg-type]
            except asyncio.CancelledError:
                cancelled += 1
        assert cancelled >= 30
        await eventually(lambda: members(server, slots, "alice") == members(server, slots, "route") == 0)
        assert sum(len(heartbeat.open) for heartbeat in slots._heartbeats.values()) == 1


@steady()
async def test_a_take_that_is_given_up_is_undone_when_its_answer_comes(server: Any) -> None:
    async with slots_at(server, deadline=0.05) as slots:
        slots.give_back(await taken(slots, ("alice", 1)))
        await eventually(lambda: members(server, slots, "alice") == 0)
        server.client.client_pause(200, all=True)
        with pytest.raises(StoreUnavailableError):
            await slots.take(claims(("alice", 1)), 15.0, NOW)
        server.client.ping()  # it is back
        await eventually(lambda: members(server, slots, "alice") == 0)
        assert not any(heartbeat.open for heartbeat in slots._heartbeats.values())


@steady()
async def test_a_server_that_has_forgotten_learns_of_everything_in_flight(server: Any) -> None:
    async with slots_at(server) as slots:
        await taken(slots, ("alice", 2), ttl=0.3)
        held = slots.hold(claims(("alice", 2), ("route", 1)), 0.3)
        assert held.in_flight == ()
        server.client.flushall()
        server.client.script_flush()
        await eventually(lambda: members(server, slots, "alice") == 2)
        assert await slots.take(claims(("alice", 2)), 0.3, NOW) == Refusal((2,), (0,))
        slots.give_back(held)
        await eventually(lambda: members(server, slots, "route") == 0)
        assert (await taken(slots, ("alice", 2), ("route", 1), ttl=0.3)).in_flight == (2, 1)


async def test_a_server_that_is_out_of_memory_takes_nothing(server: Any) -> None:
    async with slots_at(server) as slots:
        first = await taken(slots, ("alice", 2))
        server.client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailableError):
                await slots.take(claims(("bob", 1), ("alice", 2)), 15.0, NOW)
            assert members(server, slots, "bob") == 0
            slots.give_back(first)
            await eventually(lambda: members(server, slots, "alice") == 0)
        finally:
            server.client.config_set("maxmemory", "0")


# --- several processes ------------------------------------------------------------------------------------------------

WORKER = """
import asyncio, sys
from sigil_policy.stores.redis.link import RedisLink, Script
from sigil_policy.stores.redis.slots import RedisSlots
from sigil_policy.stores.slots import Claim, Slot

ENTER = Script("enter", "local n = redis.call('INCR', KEYS[1]) "
    "if n > tonumber(redis.call('GET', KEYS[2]) or '0') then redis.call('SET', KEYS[2], n) end "
    "return redis.call('INCR', KEYS[3])")
LEAVE = Script("leave", "return redis.call('DECR', KEYS[1])")
url, task, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

async def hammer(link, slots, claims, end):
    admitted = 0
    # For a while; and for longer, where a slow machine has not done much in it.
    while asyncio.get_running_loop().time() < end or admitted < 400:
        slot = await slots.take(claims, 60.0, 0.0)
        if isinstance(slot, Slot):
            admitted = await link.run(ENTER, [b"inside", b"most", b"admitted"], [])
            await asyncio.sleep(0.0005)
            await link.run(LEAVE, [b"inside"], [])
            slots.give_back(slot)
        else:
            await asyncio.sleep(0.001)

async def main():
    link = RedisLink(url, deadline=30.0, connect_timeout=30.0)
    slots = RedisSlots(link)
    if task == "hammer":
        claims = (Claim("alice", 5), Claim("route", 40))
        end = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*[hammer(link, slots, claims, end) for _ in range(16)])
        # What comes after it on the connection is run after what was given back.
        await link.run(Script("last", "return 1"), [b"any"], [])
    else:
        for _ in range(3):
            assert isinstance(await slots.take((Claim("alice", 3),), seconds, 0.0), Slot)
        print("holding", flush=True)
        await asyncio.sleep(60)
    await link.aclose()

asyncio.run(main())
"""


def worker(server: Any, task: str, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", "-c", WORKER, server.url, task, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


async def test_four_processes_never_have_more_in_flight_than_the_limit(server: Any) -> None:
    processes = [worker(server, "hammer", 1.0) for _ in range(4)]
    try:
        for process in processes:
            assert await asyncio.to_thread(process.wait, 200) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert int(server.client.get("most")) == 5  # type: ignore[arg-type]
    assert int(server.client.get("inside")) == 0  # type: ignore[arg-type]
    assert int(server.client.get("admitted")) >= 400  # type: ignore[arg-type]
    assert server.client.keys("sigil:*") == [], "all were given back"


@steady(others=True)
async def test_what_a_killed_process_held_comes_free_after_the_ttl_and_not_before_it_dies(server: Any) -> None:
    ttl = 1.2
    process = worker(server, "hold", ttl)
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"holding\n"
        async with slots_at(server) as slots:
            end = time.monotonic() + 2 * ttl
            while time.monotonic() < end:
                assert isinstance(await slots.take(claims(("alice", 3)), ttl, NOW), Refusal)
                await asyncio.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            killed = time.monotonic()
            assert isinstance(await slots.take(claims(("alice", 3)), ttl, NOW), Refusal)
            asked = killed
            while isinstance(slot := await slots.take(claims(("alice", 3)), ttl, NOW), Refusal):
                assert asked - killed < ttl + 0.2
                await asyncio.sleep(0.01)
                asked = time.monotonic()
            assert slot.in_flight == (1,)
            assert time.monotonic() - killed > ttl / 3, "its last heartbeat was at most a third of that ago"
    finally:
        process.kill()
        process.communicate()


async def test_event_loops_of_several_threads_share_a_store(server: Any) -> None:
    link = RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT)
    slots = RedisSlots(link)
    inside: list[int] = []
    most: list[int] = []

    async def hammer() -> None:
        for _ in range(60):
            slot = await slots.take(claims(("alice", 3)), 15.0, NOW)
            if isinstance(slot, Slot):
                inside.append(1)
                most.append(len(inside))
                await asyncio.sleep(0)
                inside.pop()
                slots.give_back(slot)

    async def loop() -> None:
        await asyncio.gather(*[hammer() for _ in range(8)])
        await slots.take(claims(("other", 100)), 15.0, NOW)  # behind everything that was given back

    threads = [Thread(target=asyncio.run, args=(loop(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 120)
    assert 1 <= max(most) <= 3
    assert members(server, slots, "alice") == 0
    assert members(server, slots, "other") == 3
    await taken(slots, ("alice", 3))
    assert len(slots._heartbeats) == 1, "loops that were closed are forgotten"
    await slots.aclose()
    assert slots._heartbeats == {}
    assert (await taken(slots, ("alice", 3))).in_flight == (2,), "it opens again"
    await slots.aclose()


# --- the policy on it -------------------------------------------------------------------------------------------------


def address_key(slots: RedisSlots) -> bytes:
    return slots.redis_key(" address ip4-203.0.113.7")


class Gate:
    def __init__(self) -> None:
        self.inside = 0
        self.opened = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside += 1
        await self.opened.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def test_two_processes_share_the_places_of_a_caller(server: Any) -> None:
    async with slots_at(server) as here, slots_at(server) as there:
        gate = Gate()
        apps = [PolicyStack(gate, policies=[ConcurrencyLimit(limits=2, store=slots)]) for slots in (here, there)]
        running = [asyncio.ensure_future(drive(app)) for app in apps]
        await eventually(lambda: gate.inside == 2)
        for app in apps:
            sent = await drive(app)
            assert sent.status == 429
            assert sent.header("ratelimit") == '"concurrency";r=0'
        gate.opened.set()
        answers = [sent.header("ratelimit") for sent in await asyncio.gather(*running)]
        assert sorted(map(str, answers)) == ['"concurrency";r=0', '"concurrency";r=1']
        await eventually(lambda: not server.client.exists(address_key(here)))


async def test_a_request_that_is_cancelled_anywhere_leaves_no_slot(server: Any) -> None:
    async with slots_at(server) as slots:
        await taken(slots, ("warm", 1))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(0.001)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b""})

        built = PolicyStack(app, policies=[ConcurrencyLimit(limits=1_000, store=slots)])
        for turns in range(40):
            request = asyncio.ensure_future(drive(built))
            for _ in range(turns % 20):
                await asyncio.sleep(0.0002 if turns >= 20 else 0)
            request.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await request
        await eventually(lambda: not server.client.exists(address_key(slots)))


@steady(others=True)
async def test_a_store_that_goes_away_and_comes_back() -> None:
    """Degraded while it is away; then everything that is in flight counts, although the server has forgotten it."""
    with Server() as server:
        async with slots_at(server, deadline=0.05) as slots:
            gate = Gate()
            modes = {
                mode: PolicyStack(
                    gate,
                    policies=[ConcurrencyLimit(limits=4, store=slots, on_store_loss=mode, expected_replicas=2)],  # type: ignore[arg-type]
                )
                for mode in ("closed", "local", "open")
            }
            running = [asyncio.ensure_future(drive(modes["local"]))]
            await eventually(lambda: gate.inside == 1)
            server.kill()
            refused = await drive(modes["closed"])
            assert refused.status == 503
            assert int(refused.header("retry-after") or 0) >= 1
            running += [asyncio.ensure_future(drive(modes["local"])) for _ in range(2)]
            await eventually(lambda: gate.inside == 3)
            sent = await drive(modes["local"])
            assert sent.status == 429
            assert sent.header("ratelimit-policy") == '"concurrency";q=2;qu="concurrent-requests";sigil-degraded'
            running.append(asyncio.ensure_future(drive(modes["open"])))
            await eventually(lambda: gate.inside == 4)
            server.start()
            await asyncio.to_thread(server.ready)
            await eventually(lambda: slots.link.available)
            await eventually(lambda: server.client.zcard(address_key(slots)) == 4, within=1)
            assert (await drive(modes["local"])).status == 429
            gate.opened.set()
            await asyncio.gather(*running)
            await eventually(lambda: not server.client.exists(address_key(slots)))
            assert (await drive(modes["local"])).header("ratelimit") == '"concurrency";r=3'


ENDS = """
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], ARGV[1], id) end
"""


async def test_in_a_cluster_all_that_is_taken_together_is_on_one_node() -> None:
    with cluster() as nodes:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        slots = RedisSlots(RedisLink(url, deadline=PATIENT, connect_timeout=PATIENT))
        first = await taken(slots, ("alice", 2), ("route", 1), ttl=600.0)
        held = [await taken(slots, (f"caller {number}", 1), ("other route", 50), ttl=600.0) for number in range(20)]
        assert sorted(node.call("DBSIZE") for node in nodes) == [0, 0, 23]
        (node,) = [node for node in nodes if node.call("DBSIZE")]
        keys = node.client.keys("*")
        soon = time.time() * 1_000 + 60_000
        for key in keys:
            node.call("EVAL", ENDS, 1, key, soon)
        assert sum(node.call("ZCOUNT", key, f"({soon}", "+inf") for key in keys) == 0
        await slots._heartbeat(600.0).renew()
        assert sum(node.call("ZCOUNT", key, f"({soon}", "+inf") for key in keys) == 42, "all were renewed"
        assert await slots.take(claims(("alice", 2), ("route", 1)), 600.0, NOW) == Refusal((1, 1), (1,))
        for slot in (first, *held):
            slots.give_back(slot)
        await asyncio.to_thread(wait_until, lambda: sum(node.call("DBSIZE") for node in nodes) == 0)
        await slots.aclose()

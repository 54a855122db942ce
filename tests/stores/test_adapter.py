"""What storages of `limits` can promise, kept over memcached's protocol, a real Valkey and a storage in memory."""

import asyncio
import contextlib
import gc
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import anyio
import limits.util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage
from limits.storage import MemoryStorage as BlockingStorage
from limits.storage import storage_from_string
from packaging.version import Version
from structlog.testing import capture_logs

from sigil_policy.stores import adapter
from sigil_policy.stores.adapter import LimitsStorage
from sigil_policy.stores.limits import MONTH, Decision, Plan, StoreUnavailableError, Window
from sigil_policy.testing import FrozenClock
from sigil_policy.testing.stores import Check, limit_store_checks
from tests.stores.oracle import Oracle
from tests.stores.redis.proxy import Lag, Proxy
from tests.stores.redis.servers import Server
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0
PLAN = Plan(name="free", windows=(Window(3, 1), Window(5, 10), Window(8, 60), Window(100, 10, "tokens")))
REQUESTS = Plan(name="requests", windows=(Window(3, 1), Window(5, 10), Window(8, 60)))
DAY = Plan(name="day", windows=(Window(40, 86_400), Window(100_000, 86_400, "tokens")))
PATIENT = 30.0  # a deadline that no test of something else runs into


@pytest.fixture
def anyio_backend() -> str:
    """The storages of `limits` are asyncio's."""
    return "asyncio"


# --- where it counts -------------------------------------------------------------------------------------------------


class Memcached:
    """As much of memcached as is needed, by its text protocol; `hang` makes it read and never answer."""

    def __init__(self) -> None:
        self.items: dict[bytes, tuple[bytes, float]] = {}
        self.commands: list[bytes] = []
        self.hang = False
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        writers = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            while line := await reader.readline():
                name, *words = line.split()
                self.commands.append(line.strip())
                data = (await reader.readexactly(int(words[3]) + 2))[:-2] if name in (b"add", b"set") else b""
                if not self.hang:
                    writer.write(self.answer(name, words, data))
                    await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"memcached://127.0.0.1:{self.port}"
        finally:
            server.close()
            for writer in writers:
                writer.close()
            await asyncio.sleep(0)

    def get(self, key: bytes) -> bytes | None:
        value, until = self.items.get(key, (None, 0.0))
        return value if until > time.time() else None

    def answer(self, name: bytes, words: list[bytes], data: bytes) -> bytes:
        if name == b"get":
            found = [(key, value) for key in words if (value := self.get(key)) is not None]
            return b"".join(b"VALUE %s 0 %d\r\n%s\r\n" % (k, len(v), v) for k, v in found) + b"END\r\n"
        known = self.get(words[0])
        if name == b"delete":
            return b"DELETED\r\n" if self.items.pop(words[0], None) else b"NOT_FOUND\r\n"
        if name in (b"incr", b"decr"):
            if known is None:
                return b"NOT_FOUND\r\n"
            by = int(words[1]) if name == b"incr" else -int(words[1])
            self.items[words[0]] = (b"%d" % max(int(known) + by, 0), self.items[words[0]][1])
            return self.items[words[0]][0] + b"\r\n"
        if name == b"add" and known is not None:
            return b"NOT_STORED\r\n"
        expiry = int(words[2])
        self.items[words[0]] = (data, expiry if expiry > 30 * 86_400 else time.time() + expiry)
        return b"STORED\r\n"


@pytest.fixture(scope="module")
def memcached() -> Iterator[int]:
    for _ in range(10):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = ["memcached", "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            end = time.monotonic() + 60
            # It ends by itself where somebody else took the port in the meantime.
            while process.poll() is None and time.monotonic() < end:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0 and process.poll() is None:
                        yield port
                        process.kill()
                        return
                time.sleep(0.01)
            process.kill()
    pytest.fail("memcached does not start")


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    with Server() as server:
        yield f"{server.url}/0"


class Hand:
    """The clock of a storage."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    monotonic = time


Make = Callable[..., Any]


@asynccontextmanager
async def making() -> AsyncIterator[Make]:
    """Makes stores, and closes them."""
    made = []

    def make(storage: Any = None, **options: Any) -> Any:
        given = MemoryStorage() if storage is None else storage
        store = LimitsStorage(given, **{"deadline": PATIENT, "memory_for_tests": True, **options})
        made.append(store)
        return store

    yield make
    for store in made:
        await store.aclose()
    # Drivers leave their sockets to the loop.
    await asyncio.sleep(0)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    async with making() as make:
        yield make


# memcached itself where it is installed; its protocol everywhere.
SERVERS = ["wire", "valkey"] + (["memcached"] if shutil.which("memcached") else [])


@pytest.fixture(params=SERVERS)
async def uri(request: pytest.FixtureRequest, valkey: str) -> AsyncIterator[str]:
    """A server that nobody has counted in."""
    if request.param == "wire":
        async with Memcached().running() as uri:
            yield uri
    elif request.param == "memcached":
        port = request.getfixturevalue("memcached")
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"flush_all\r\n")
            assert connection.recv(4) == b"OK\r\n"
        yield f"memcached://127.0.0.1:{port}"
    else:
        storage = storage_from_string(f"async+{valkey}", implementation="redispy")
        client: Any = storage.bridge.storage
        await client.flushall()
        await client.aclose()
        yield valkey


async def admitted(store: Any, count: int, *, key: Any = "a", plan: Plan = PLAN, now: float = START) -> int:
    return sum([(await store.admit(key, plan, 1, None, now)).admitted for _ in range(count)])


async def left(store: Any, *, key: Any = "a", plan: Plan = PLAN, now: float = START) -> tuple[int, ...]:
    decision: Decision = await store.admit(key, plan, 0, None, now)
    return decision.remaining


# --- decisions -------------------------------------------------------------------------------------------------------


async def test_every_window_holds_and_a_refused_request_takes_nothing(make: Make, uri: str) -> None:
    store = make(uri)
    assert await admitted(store, 7) == 3
    assert await admitted(store, 7, now=START + 1) == 2
    assert await admitted(store, 7, now=START + 2) == 0
    assert await admitted(store, 7, now=START + 10) == 3
    assert await admitted(store, 7, now=START + 60) == 3
    # Nine were refused in these ten seconds, and the minute has counted the five that were not.
    assert await left(store, now=START + 2) == (3, 0, 0, 100)


async def test_headers_are_of_the_windows_and_the_wait_is_for_the_longest_that_refused(make: Make, uri: str) -> None:
    store = make(uri)
    first = await store.admit("a", PLAN, 1, (60,), START + 0.25)
    assert first.admitted
    assert first.remaining == (2, 4, 7, 40)
    assert first.reset == (START + 1, START + 10, START + 60, START + 10)
    assert (first.at, first.key, first.refused_by) == (START + 0.25, "a", ())
    assert first.lease.reserved == (60,)
    refused = await store.admit("a", PLAN, 3, (50,), START + 0.25)
    assert not refused.admitted
    assert refused.lease is None
    assert refused.remaining == (2, 4, 7, 40)
    assert refused.refused_by == (3, 0)
    assert refused.retry_after == 9.75


amounts = st.integers(0, 140)
steps = st.one_of(
    st.tuples(
        st.just("admit"),
        st.sampled_from(["a", "b", ("a", "org"), ("b", "org")]),
        st.sampled_from([1, 1, 2, 0, 6]),
        st.one_of(st.none(), st.tuples(st.integers(0, 100), st.integers(0, 60))),
    ),
    st.tuples(st.just("extend"), st.integers(0, 5), st.tuples(amounts, amounts)),
    st.tuples(st.just("settle"), st.integers(0, 5), st.tuples(amounts, amounts)),
    st.tuples(st.just("charge"), st.sampled_from(["a", "b"]), st.integers(0, 4), st.tuples(amounts, amounts)),
    st.tuples(st.just("pass"), st.sampled_from([0.25, 0.5, 1.0, 10.0, 60.0])),
)
MEMBER = Plan(
    name="member",
    windows=(
        Window(2, 1),
        Window(5, 10),
        Window(100, 10, "tokens"),
        Window(60, MONTH, "input-tokens", calendar="month"),
    ),
)
ORG = Plan(name="org", windows=(Window(3, 1), Window(9, 60), Window(150, 10, "tokens"), Window(90, 60, "input-tokens")))
TEAM = Plan(name="team", levels=(MEMBER, ORG))


@settings(max_examples=150)
@given(trace=st.lists(steps, max_size=30))
def test_one_after_the_other_it_answers_as_the_exact_count_does(trace: list[Any]) -> None:
    async def replay() -> None:
        async with making() as make:
            await _replay(make(), trace)

    anyio.run(replay)


async def _replay(store: Any, trace: list[Any]) -> None:
    oracle, now = Oracle("fixed"), START
    leases: list[Any] = []
    for step in trace:
        if step[0] == "pass":
            now += step[1]
        elif step[0] == "admit":
            key, plan = step[1], MEMBER if isinstance(step[1], str) else TEAM
            estimate = None if step[3] is None else step[3][: len(plan.tokens)] * (len(plan.tokens) // 2)
            decision = await store.admit(key, plan, step[2], estimate, now)
            answer = oracle.admit(key, plan, step[2], estimate, now)
            assert (decision.admitted, decision.remaining) == (answer.admitted, answer.remaining)
            assert set(decision.refused_by) == answer.refused_by
            assert (decision.lease is None) == (answer.hold is None)
            if decision.lease is not None:
                leases.append((decision.lease, answer.hold))
        elif step[0] == "charge":
            given = (step[2],) * len(MEMBER.requests) + step[3]
            assert await store.charge(step[1], MEMBER, given, now) == oracle.charge(step[1], MEMBER, given, now)
        elif leases:
            lease, hold = leases[step[1] % len(leases)]
            given = step[2] * (len(lease.plan.tokens) // 2)
            if step[0] == "extend":
                assert await store.extend(lease, given, now) == oracle.extend(hold, given, now)
                assert lease.reserved == hold.reserved
            else:
                leases.remove((lease, hold))
                remaining = oracle.settle(hold, given, now)
                assert await store.settle(lease, given, now) == remaining
                # Settled already: nothing changes.
                assert await store.settle(lease, (1_000,) * len(given), now) == remaining
                assert await store.extend(lease, (0,) * len(given), now) is None


async def test_levels_share_what_they_share(make: Make, uri: str) -> None:
    store = make(uri)
    assert await admitted(store, 2, key=("a", "org"), plan=TEAM) == 2
    assert await admitted(store, 2, key=("b", "org"), plan=TEAM) == 1
    assert await left(store, key=("b", "org"), plan=TEAM) == (1, 4, 0, 6, 100, 60, 150, 90)
    # A level is the plan that it is: its key is counted alike with and without the others.
    assert await left(store, key="a", plan=MEMBER) == (0, 3, 100, 60)


async def test_other_numbers_start_from_what_was_used(make: Make, uri: str) -> None:
    store = make(uri)
    await admitted(store, 3)
    larger = Plan(name="pro", windows=(Window(10, 1), Window(100, 60)))
    assert await left(store, plan=larger) == (7, 97)


WEAKER = limit_store_checks(weaker={"concurrency"})


@pytest.mark.parametrize("check", WEAKER, ids=str)
async def test_it_passes_the_checks_of_all_stores_but_for_many_at_once(check: Check, make: Make, uri: str) -> None:
    clock = FrozenClock(time.time() // 86_400 * 86_400 + 3_600)
    await check(lambda: make(uri), algorithm="fixed", clock=clock, advance=clock.advance)


# --- many at once ----------------------------------------------------------------------------------------------------


async def test_processes_that_hammer_one_caller_are_admitted_no_more_than_the_limit(make: Make, uri: str) -> None:
    stores = [make(uri) for _ in range(3)]
    leases = []

    async def hammer(store: Any) -> None:
        for _ in range(4):
            decision = await store.admit("a", DAY, 1, (2_000,), START)
            leases.extend([decision.lease] if decision.admitted else [])

    async with anyio.create_task_group() as group:
        for store in stores:
            for _ in range(8):
                group.start_soon(hammer, store)
    assert 0 < len(leases) <= 40
    # What the losers of a race took has come back: nothing is counted but what was admitted.
    assert await left(stores[0], plan=DAY) == (40 - len(leases), 100_000 - 2_000 * len(leases))
    async with anyio.create_task_group() as group:
        for lease in leases:
            group.start_soon(stores[0].settle, lease, (1,), START)
    assert await left(stores[1], plan=DAY) == (40 - len(leases), 100_000 - len(leases))


class Gated(MemoryStorage):
    """A storage that does something in front of a change of its counters, or behind it."""

    STORAGE_SCHEME = ["async+gated"]

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[int] = []
        self.before: Callable[[int], Awaitable[None]] | None = None
        self.after: Callable[[int], Awaitable[None]] | None = None

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        self.changes.append(amount)
        number = len(self.changes)
        if self.before is not None:
            await self.before(number)
        value = await super().incr(key, expiry, amount)
        if self.after is not None:
            await self.after(number)
        return value


async def test_who_loses_a_race_gives_back_what_it_took_of_the_windows_before(make: Make) -> None:
    storage = Gated()
    store, rival = make(storage), make(storage)

    async def overtake(number: int) -> None:
        if number == 1:
            storage.before = None
            assert await admitted(rival, 3) == 3

    storage.before = overtake
    decision = await store.admit("a", PLAN, 1, (10,), START)
    assert not decision.admitted
    assert decision.refused_by == (0,)
    assert decision.remaining[0] == 0
    assert await left(store) == (0, 2, 5, 100)
    storage.changes.clear()

    async def spend(number: int) -> None:
        if number == 2:
            storage.before = None
            await rival.charge("b", PLAN, (0, 0, 0, 95), START)

    storage.before = spend
    decision = await store.admit("b", PLAN, 1, (10,), START)
    assert decision.refused_by == (3,)
    assert decision.remaining == (3, 5, 8, 5)
    assert await left(store, key="b") == (3, 5, 8, 5)


# --- tokens ----------------------------------------------------------------------------------------------------------


async def test_what_was_not_used_comes_back_and_what_was_used_beyond_it_is_charged(make: Make, uri: str) -> None:
    store = make(uri)
    less = (await store.admit("a", PLAN, 1, (60,), START)).lease
    assert await store.settle(less, (10,), START + 1) == (90,)
    assert await store.settle(less, (10,), START + 1) == (90,)
    more = (await store.admit("a", PLAN, 1, (60,), START + 1)).lease
    assert await store.extend(more, (31,), START + 1) is None
    assert more.reserved == (60,)
    assert await store.extend(more, (20,), START + 1) == (10,)
    assert more.reserved == (80,)
    assert await store.settle(more, (95,), START + 1) == (0,)
    assert await left(store, now=START + 1) == (2, 3, 6, 0)
    assert await store.charge("a", PLAN, (0, 1, 0, 7), START + 11) == (93,)
    assert await left(store, now=START + 11) == (3, 4, 6, 93)


async def test_nothing_comes_back_into_a_later_window(make: Make, uri: str) -> None:
    store = make(uri)
    lease = (await store.admit("a", PLAN, 1, (60,), START)).lease
    later = (await store.admit("a", PLAN, 1, (30,), START + 10)).lease
    assert await store.settle(lease, (0,), START + 10) == (70,)
    # Of what a lease took in two windows, only the present one's comes back.
    assert await store.extend(later, (20,), START + 20) == (80,)
    assert await store.charge("a", PLAN, (0, 0, 0, 30), START + 20) == (50,)
    assert await store.settle(later, (5,), START + 20) == (70,)
    assert await left(store, now=START + 10) == (2, 4, 6, 70)
    assert await left(store, now=START) == (2, 4, 6, 40)


async def test_a_storage_that_forgot_a_counter_is_not_left_with_more_than_the_limit(make: Make, uri: str) -> None:
    store = make(uri)
    lease = (await store.admit("a", PLAN, 1, (60,), START)).lease
    storage = store.storage
    for key in [counter.name for counter in store._counters("a", PLAN, START)]:
        await storage.clear(key)
    assert await store.settle(lease, (0,), START) == (100,)
    assert (await store.admit("a", PLAN, 1, (101,), START)).admitted is False


async def test_a_settlement_that_meets_an_outage_is_made_once_it_is_over_and_never_twice(make: Make) -> None:
    storage = Gated()
    store = make(storage)
    plan = Plan(name="two", windows=(Window(100, 10, "tokens"), Window(200, 10, "input-tokens")))
    lease = (await store.admit("a", plan, 1, (60, 60), START)).lease

    async def fail(number: int) -> None:
        raise ConnectionResetError("the answer never came")

    storage.after = fail
    with pytest.raises(StoreUnavailableError):
        await store.settle(lease, (10, 10), START)
    storage.after = None
    # The first window has been settled, as far as anybody can know, and is not settled again.
    assert await store.settle(lease, (10, 10), START) == (90, 190)
    assert await left(store, plan=plan) == (90, 190)


async def test_a_lease_that_is_settled_while_it_is_extended_keeps_nothing(make: Make) -> None:
    storage = Gated()
    store = make(storage)
    lease = (await store.admit("a", PLAN, 1, (60,), START)).lease

    async def settle(number: int) -> None:
        storage.after = None
        await store.settle(lease, (5,), START)

    storage.after = settle
    assert await store.extend(lease, (20,), START) is None
    assert await left(store) == (2, 4, 7, 95)


# --- cancelled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1, 2, 3, 4])
async def test_a_decision_that_is_cancelled_leaves_nothing(make: Make, change: int) -> None:
    storage = Gated()
    store = make(storage)
    with anyio.CancelScope() as scope:

        async def cancel(number: int) -> None:
            if number == change:
                scope.cancel()
                await asyncio.sleep(0.001)

        storage.after = cancel
        await store.admit("a", PLAN, 1, (10,), START)
        pytest.fail("a cancelled decision is no decision")
    storage.after = None
    assert scope.cancelled_caught
    assert storage.changes == [1, 1, 1, 10, -1, -1, -1, -10]
    assert await left(store) == (3, 5, 8, 100)


async def test_a_task_cancelled_from_outside_of_anyio_gives_back_all_but_the_change_under_way(make: Make) -> None:
    storage = Gated()
    store = make(storage)
    reached = asyncio.Event()

    async def wait(number: int) -> None:
        if number == 3:
            reached.set()
            await asyncio.sleep(60)

    storage.after = wait
    task = asyncio.create_task(store.admit("a", PLAN, 1, (10,), START))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    storage.after = None
    # Whether the third was made, nobody can know: to give it back might admit one too many.
    assert await left(store) == (3, 5, 7, 100)


async def test_what_is_given_back_when_a_task_is_cancelled_is_given_back_once(make: Make) -> None:
    storage = Gated()
    store = make(storage)
    await store.charge("a", PLAN, (1, 1, 1, 95), START)
    reached = asyncio.Event()

    tokens = next(key for key in storage.storage if ":tokens:" in key)

    async def spend(number: int) -> None:
        if storage.changes[-1] == 10:
            # Too late for the tokens, of which there were enough when they were looked at.
            storage.storage[tokens] = 95

    async def hang(number: int) -> None:
        if storage.changes[-1] == -1:
            storage.after = None
            reached.set()
            await asyncio.sleep(60)

    storage.storage[tokens] = 50
    storage.before, storage.after = spend, hang
    task = asyncio.create_task(store.admit("a", PLAN, 1, (10,), START))
    await reached.wait()
    storage.before = None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await left(store) == (2, 4, 7, 5)


async def test_a_settlement_is_not_cancelled(make: Make) -> None:
    storage = Gated()
    store = make(storage)
    lease = (await store.admit("a", PLAN, 1, (60,), START)).lease
    storage.before = lambda number: asyncio.sleep(0.001)
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await store.settle(lease, (10,), START) == (90,)
    assert await left(store) == (2, 4, 7, 90)


# --- away ------------------------------------------------------------------------------------------------------------


@steady()
async def test_a_storage_that_hangs_costs_the_deadline_and_what_was_taken_comes_back(make: Make) -> None:
    storage = Gated()
    store = make(storage, deadline=0.05)

    async def hang(number: int) -> None:
        if number == 3:
            await asyncio.sleep(60)

    storage.before = hang
    async with Lag() as lag:
        begun = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=r"did not decide in 0\.05 seconds") as caught:
            await store.admit("a", PLAN, 1, (10,), START)
        waited = time.monotonic() - begun
    assert 0.05 <= waited < 0.07 + 2 * lag.worst
    assert caught.value.retry_after == 1.0
    assert storage.changes == [1, 1, 1, -1, -1]
    assert await left(store) == (3, 5, 8, 100)


@steady()
async def test_giving_back_to_a_storage_that_hangs_is_bounded(make: Make) -> None:
    storage = Gated()
    store = make(storage, deadline=0.05)

    async def hang(number: int) -> None:
        if number > 1:
            await asyncio.sleep(60)

    storage.before = hang
    async with Lag() as lag:
        begun = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await store.admit("a", PLAN, 1, (10,), START)
        waited = time.monotonic() - begun
    assert waited < 0.07 + 2 * lag.worst
    assert storage.changes == [1, 1, -1]


@pytest.mark.parametrize("mode", ["hang", "slow", "cut", "flap", "refuse"])
@steady(others=True)
async def test_a_server_that_fails_costs_nobody_more_than_the_deadline(
    make: Make, uri: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_PAUSE", 0.05)
    target = urlsplit(uri)
    async with Proxy(target.port or 0) as proxy:
        # In a space of its own: what another attempt has counted is not seen.
        store = make(f"{target.scheme}://127.0.0.1:{proxy.port}", namespace=f"at-{proxy.port}")
        lease = (await store.admit("a", PLAN, 1, (60,), START)).lease
        store.deadline = 0.05
        if mode == "refuse":
            proxy.refuse()
        else:
            proxy.mode = mode
            if mode == "flap":
                proxy.cut_off()
        waits = []
        for number in range(3 + adapter._FAILURES):
            async with Lag() as lag:
                asked = [
                    lambda: store.admit("a", PLAN, 1, (1,), START),
                    lambda: store.extend(lease, (1,), START),
                    lambda: store.settle(lease, (10,), START),
                ][number % 3]
                begun = time.monotonic()
                with pytest.raises(StoreUnavailableError):
                    await asked()
                waits.append(time.monotonic() - begun - 2 * lag.worst)
        assert max(waits) < 0.07
        store.deadline = PATIENT
        proxy.mode = "pass"
        if not proxy.listening:
            await proxy.listen()
        for _ in range(600):
            await asyncio.sleep(0.05)
            with contextlib.suppress(StoreUnavailableError):
                # What is counted is what was admitted; a settlement whose answer was lost may have been made, or not.
                decision = await store.admit("a", PLAN, 0, None, START)
                break
        assert decision.remaining[:3] in ((2, 4, 7), (2, 4, 6), (2, 3, 6), (1, 3, 6))
        assert decision.remaining[3] <= 90


async def test_who_cannot_connect_is_told_that_the_store_is_unavailable(make: Make) -> None:
    # Bound, so that nobody else takes it, and not listening.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for uri in (f"memcached://127.0.0.1:{port}", f"redis://:hunter2@127.0.0.1:{port}"):
            store = make(uri)
            with pytest.raises(StoreUnavailableError, match="Storage of limits failed: ") as caught:
                await store.admit("a", PLAN, 1, None, START)
            assert "hunter2" not in str(caught.value)
            with pytest.raises(StoreUnavailableError):
                await store.charge("a", PLAN, (0, 0, 0, 1), START)


async def test_a_server_that_hangs_is_asked_by_few_and_serves_all_once_it_is_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(0.0)
    monkeypatch.setattr(adapter, "time", hand)
    server = Memcached()
    async with server.running() as uri:
        store = make(uri)
        assert await admitted(store, 1) == 1
        store.deadline = 0.05
        server.hang = True
        with capture_logs() as logs:
            for _ in range(adapter._FAILURES):
                with pytest.raises(StoreUnavailableError, match="did not decide"):
                    await store.admit("a", PLAN, 1, None, START)
            asked = len(server.commands)
            begun = time.monotonic()
            for _ in range(200):
                with pytest.raises(StoreUnavailableError, match="is away") as caught:
                    await store.admit("a", PLAN, 1, None, START)
                assert 0 < caught.value.retry_after <= adapter._PAUSE
            # Each would be a deadline.
            assert time.monotonic() - begun < 200 * store.deadline
            assert len(server.commands) == asked
            hand.now += adapter._PAUSE
            # One request tries; it fails, and the others go on without waiting.
            results = await asyncio.gather(
                *(store.admit("a", PLAN, 1, None, START) for _ in range(20)), return_exceptions=True
            )
            assert sorted("is away" in str(result) for result in results) == [False] + [True] * 19
            server.hang = False
            store.deadline = PATIENT
            hand.now += adapter._PAUSE
            assert await admitted(store, 5) == 2
            assert await admitted(store, 5, key="b") == 3
        assert [log["event"] for log in logs] == ["limits_storage_away", "limits_storage_back"]


async def test_a_pool_that_cancelled_tasks_have_emptied_is_made_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """memcachio has two places for connections; whoever is cancelled while it connects takes one away for ever."""
    monkeypatch.setattr(adapter, "_PAUSE", 0.05)
    server = Memcached()
    async with server.running() as uri:
        store = make(uri)
        pool = (await store.storage.bridge.get_storage()).connection_pool

        async def never(*_: Any, **__: Any) -> None:
            await asyncio.sleep(60)

        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "create_connection", never)
            for _ in range(2):
                task = asyncio.create_task(store.admit("a", PLAN, 1, None, START))
                await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        store.deadline = 0.05
        for _ in range(adapter._FAILURES):
            with pytest.raises(StoreUnavailableError):
                await store.admit("a", PLAN, 1, None, START)
        await asyncio.sleep(0.06)
        store.deadline = PATIENT
        assert await admitted(store, 4) == 3
        assert (await store.storage.bridge.get_storage()).connection_pool is not pool


# --- counters --------------------------------------------------------------------------------------------------------


async def test_keys_are_bounded_plain_and_tell_nobody_who_it_is(make: Make) -> None:
    server = Memcached()
    awkward = ["alice@example.com", "a b\r\nflush_all", "\ud800", "é" * 10_000, "", "a/b", "a"]
    async with server.running() as uri:
        store, keyed = make(uri), make(uri, namespace="other", digest_key=b"sixteen bytes ok")
        for key in awkward:
            assert await admitted(store, 5, key=key) == 3
            assert await admitted(keyed, 5, key=key) == 3
        names = set(server.items)
    assert len(names) == 2 * 3 * len(awkward)
    assert all(len(name) < 120 and name.isascii() and name.decode().isprintable() for name in names)
    assert not any(b"alice" in name or b" " in name for name in names)
    plain, secret = ({name.split(b":")[2] for name in names if name.startswith(p)} for p in (b"sigil:1:", b"other:1:"))
    assert len(plain) == len(secret) == len(awkward)
    assert not plain & secret


async def test_every_counter_has_an_expiry_behind_the_end_of_its_window(make: Make, valkey: str) -> None:
    store = make(valkey)
    begun = time.monotonic()
    lease = (await store.admit("ttl", PLAN, 1, (10,), START + 0.5)).lease
    await store.settle(lease, (0,), START + 0.5)
    client = store.storage.bridge.storage
    ends = {counter.name: counter.end - START for counter in store._counters("ttl", PLAN, START)}
    for name, end in ends.items():
        ttl = await client.pttl(f"LIMITS:{name}") / 1_000
        assert end + 3 - (time.monotonic() - begun) < ttl <= end + 5
    # A refund that comes after the window, and its counter, are gone is not left there for ever.
    lease = (await store.admit("ttl", PLAN, 1, (10,), START + 1)).lease
    await client.flushall()
    await store.settle(lease, (0,), START + 1)
    assert [await client.ttl(key) > 0 for key in await client.keys()] == [True]


async def test_memcached_counts_months(make: Make) -> None:
    """It reads an expiry of more than thirty days as a moment, one long ago."""
    server = Memcached()
    month = Plan(name="month", windows=(Window(2, MONTH, calendar="month"), Window(3, 400 * 86_400)))
    async with server.running() as uri:
        store = make(uri)
        now = 1_701_388_800.0  # 2023-12-01
        assert await admitted(store, 5, plan=month, now=now) == 2
        assert await admitted(store, 5, plan=month, now=now + 30 * 86_400) == 0
        decision = await store.admit("a", month, 1, None, now)
        assert decision.reset[0] == 1_704_067_200  # 2024-01-01
        assert await admitted(store, 5, plan=month, now=1_704_067_200) == 1
        assert all(until > time.time() + 86_400 for _, until in server.items.values())


# --- sliding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand(START)
    for module in ("limits.aio.storage.memory", "limits.aio.storage.redis.redispy"):
        monkeypatch.setattr(f"{module}.time", hand)
    return hand


# Long windows: a server keeps an entry for so long by its own clock, which goes on.
SLIDING = Plan(name="sliding", windows=(Window(3, 60), Window(5, 600)), algorithm="sliding")


@pytest.fixture(params=["memory", "valkey"])
async def sliding(request: pytest.FixtureRequest, make: Make, valkey: str, hand: Hand) -> Any:
    if request.param == "memory":
        return make()
    store = make(valkey)
    await store.storage.bridge.storage.flushall()
    return store


async def test_a_moving_window_admits_the_limit_in_any_interval(sliding: Any, hand: Hand) -> None:
    oracle = Oracle("sliding")
    for seconds in (0, 0.25, 0.5, 0.75, 1.125, 1.25, 2.5, 9.0, 10.125, 10.25, 10.5, 12.75, 13.5, 30.0):
        hand.now = START + 60 * seconds
        for cost in (1, 2):
            answer = oracle.admit("a", SLIDING, cost, None, hand.now)
            decision = await sliding.admit("a", SLIDING, cost, None, hand.now)
            assert (decision.admitted, decision.remaining) == (answer.admitted, answer.remaining)
            assert set(decision.refused_by) == answer.refused_by


async def test_a_moving_window_says_when_it_has_room(sliding: Any, hand: Hand) -> None:
    for seconds in (0, 15, 30):
        hand.now = START + seconds
        decision = await sliding.admit("a", SLIDING, 1, None, hand.now)
        assert decision.reset[1] == START + seconds + 600
    # Nothing is left of the minute: it has room when its oldest request leaves it.
    assert decision.reset[0] == pytest.approx(START + 60, rel=0, abs=1e-3)
    refused = await sliding.admit("a", SLIDING, 1, None, hand.now)
    assert refused.refused_by == (0,)
    assert refused.retry_after == pytest.approx(30)
    # Room for two: never said too early, and by Redis exactly.
    refused = await sliding.admit("a", SLIDING, 2, None, hand.now)
    exact = not isinstance(sliding.storage, MemoryStorage)
    assert refused.retry_after == pytest.approx(45 if exact else 60)
    assert refused.remaining == (0, 2)


async def test_a_cost_over_the_limit_takes_a_whole_moving_window(sliding: Any, hand: Hand) -> None:
    assert (await sliding.admit("a", SLIDING, 4, None, START)).remaining == (0, 1)
    assert await sliding.charge("b", SLIDING, (7, 2), START) == ()
    assert await left(sliding, key="b", plan=SLIDING) == (0, 3)


async def test_who_loses_a_race_for_a_moving_window_is_refused(make: Make, hand: Hand) -> None:
    storage = MemoryStorage()
    store, rival = make(storage), make(storage)
    acquire = storage.acquire_entry

    async def overtaken(*arguments: Any) -> bool:
        storage.acquire_entry = acquire
        assert await admitted(rival, 9, plan=SLIDING) == 3
        return await acquire(*arguments)

    storage.acquire_entry = overtaken
    decision = await store.admit("a", SLIDING, 1, None, START)
    assert (decision.admitted, decision.refused_by, decision.remaining) == (False, (0,), (0, 5))
    assert decision.retry_after == pytest.approx(60)


# --- construction ----------------------------------------------------------------------------------------------------


async def test_what_it_promises_is_logged_once_at_the_start(make: Make) -> None:
    with capture_logs() as logs:
        store = make()
        await admitted(store, 5)
    [log] = logs
    assert (log["event"], log["storage"]) == ("limits_storage_promise", "MemoryStorage")
    assert "not all or nothing" in log["promise"]
    assert store.remote
    assert repr(store) == f"LimitsStorage(MemoryStorage, deadline={PATIENT})"


async def test_algorithms_are_those_that_the_storage_can_count_by(make: Make) -> None:
    memcached = make("memcached://127.0.0.1:1")
    assert memcached.algorithms == {"fixed"}
    assert make().algorithms == make("redis://127.0.0.1:1").algorithms == {"fixed", "sliding"}
    with pytest.raises(ValueError, match="MemcachedStorage of limits counts by fixed, not by sliding"):
        memcached.prepare(SLIDING)
    tokens = Plan(name="tokens", windows=(Window(9, 60, "tokens"),), algorithm="sliding")
    with pytest.raises(ValueError, match="counts tokens by 'fixed' only"):
        make().prepare(tokens)
    make().prepare(SLIDING)
    memcached.prepare(PLAN)


@pytest.mark.parametrize(
    ("storage", "options", "message"),
    [
        ("nowhere", {}, "must be a URI such as"),
        ("nowhere://:hunter2@host", {}, "limits cannot open a storage nowhere:// so; it knows memcached://"),
        ("redis+sentinel://:hunter2@host:1", {}, "cannot open a storage redis.sentinel:// so"),
        ("memory://", {}, "use sigil_policy.stores.memory.memory_limits"),
        ("async+memory://", {}, "use sigil_policy.stores.memory.memory_limits"),
        (BlockingStorage(), {}, "must be an asynchronous one, of limits.aio.storage, not MemoryStorage"),
        (MemoryStorage(), {"pool": 3}, r"options \['pool'\] are those of a URI"),
        ("memcached://host:1", {"deadline": 0}, "deadline must be more than 0 seconds, not 0"),
        ("memcached://host:1", {"namespace": "a:b"}, "namespace 'a:b' must be"),
        ("memcached://host:1", {"digest_key": b"hunter2"}, "digest_key must have 16 to 64 bytes, not 7"),
    ],
)
async def test_what_cannot_work_is_said_at_construction(storage: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LimitsStorage(storage, **options)
    assert "hunter2" not in str(caught.value)


async def test_a_client_that_may_leave_counters_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_from_string("async+redis://127.0.0.1:1", implementation="redispy")
    coredis = object.__new__(adapter.CoredisBridge)
    monkeypatch.setattr(storage, "bridge", coredis)
    with pytest.raises(ValueError, match="coredis is not used"):
        LimitsStorage(storage)


@pytest.mark.parametrize(
    ("uri", "package"),
    [("memcached://:hunter2@host:1", "memcachio"), ("mongodb://a:hunter2@host:1", "motor"), ("redis://host", "redis")],
)
@pytest.mark.filterwarnings("ignore:.*MongoDBStorage.__del__")  # it closes what it never opened
async def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch, uri: str, package: str) -> None:
    for found in (limits.util.MissingModule, None), (ModuleType(package), Version("0.0.1")):
        monkeypatch.setattr(limits.util, "get_dependency", lambda name, found=found: found)
        if package == "motor" and found[1]:
            continue  # limits takes it in any version
        with pytest.raises(ImportError, match=f"needs the package {package}: pip install -U {package}") as caught:
            LimitsStorage(uri)
        assert "hunter2" not in str(caught.value)
        del caught
    gc.collect()


async def test_closing_closes_what_was_opened_and_nothing_else(valkey: str, make: Make) -> None:
    store = LimitsStorage(valkey, deadline=PATIENT)
    await admitted(store, 1, key="closed")
    pool = store.storage.bridge.storage.connection_pool
    assert pool._available_connections
    await store.aclose()
    assert not any(connection.is_connected for connection in pool._available_connections)
    given = storage_from_string(f"async+{valkey}", implementation="redispy")
    await admitted(LimitsStorage(given, deadline=PATIENT), 1, key="given")
    pool = given.bridge.storage.connection_pool
    assert any(connection.is_connected for connection in pool._available_connections)
    await given.bridge.storage.aclose()

"""What goes wrong on the way to a server: no run lasts longer than its deadline, and all is well afterwards."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink, Script
from tests.stores.redis.proxy import Lag, Proxy
from tests.stores.redis.servers import Server, wait_until
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

COUNT = Script("count", "return redis.call('incrby', KEYS[1], ARGV[1])")
DEADLINE = 0.05
SLACK = 0.02


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    server.call("FLUSHALL")
    async with Proxy(server.port) as proxy:
        yield proxy


class Watch:
    """Asks through a link, and holds what came of it against what was promised."""

    def __init__(self, link: RedisLink, logs: list[Any], lag: Lag) -> None:
        self.link = link
        self.logs = logs
        self.lag = lag
        self.restored = 0
        self.took: list[float] = []
        self.retries: list[float] = []
        link.on_restored(self._restored)

    def _restored(self) -> None:
        self.restored += 1

    async def ask(self, amount: int = 1, key: bytes = b"k", **options: Any) -> Any:
        """The reply, or the error as `StoreUnavailableError`; any other error is a failure of the test."""
        began = time.monotonic()
        try:
            return await self.link.run(COUNT, [key], [amount], **options)
        except StoreUnavailableError as error:
            self.retries.append(error.retry_after)
            return error
        finally:
            self.took.append(time.monotonic() - began)

    async def ask_many(self, count: int = 20, **options: Any) -> list[Any]:
        return await asyncio.gather(*[self.ask(**options) for _ in range(count)])

    async def until(self, seconds: float, pause: float = 0.01, *, refusals: int = 0) -> list[Any]:
        """What was answered in this time; and for longer, where a slow machine has not seen enough of what it must."""
        answers: list[Any] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or refused(answers) < refusals:
            answers += await self.ask_many(4)
            assert time.monotonic() < end + 30, (len(answers), self.logs)
            await asyncio.sleep(pause)
        return answers

    async def well_again(self, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while isinstance(await self.ask(), StoreUnavailableError):
            assert time.monotonic() < end, self.logs
            await asyncio.sleep(0.02)
        assert self.link.available

    def judge(self, *transitions: str) -> None:
        """Nobody waited too long, and the log has one line for each transition."""
        assert max(self.took) <= DEADLINE + SLACK + 2 * self.lag.worst, (max(self.took), self.lag.worst)
        assert all(0 < seconds <= 5 for seconds in self.retries)
        events = [line["event"].removeprefix("store_") for line in self.logs]
        assert tuple(events) == transitions, self.logs
        assert self.link.counters.opened == transitions.count("unavailable")
        assert self.restored == transitions.count("available")
        for line in self.logs:
            assert line["log_level"] == {"unavailable": "warning", "available": "info"}[line["event"][6:]]


@contextlib.asynccontextmanager
async def watching(url: str, *, warm: bool = True, **options: Any) -> AsyncIterator[Watch]:
    link = RedisLink(url, **{"deadline": DEADLINE, **options})
    try:
        if warm:
            # On a machine that is busy the first attempts may be too slow; that is not what is tested, so that each
            # is the first one of its link.
            for _ in range(50):
                with contextlib.suppress(StoreUnavailableError):
                    await link.run(COUNT, [b"k"], [0])
                    break
                await link.aclose()
                link = RedisLink(url, **{"deadline": DEADLINE, **options})
                await asyncio.sleep(0.05)
            assert link.counters.failures == link.counters.opened == 0
        async with Lag() as lag:
            with capture_logs() as logs:
                yield Watch(link, logs, lag)
    finally:
        await link.aclose()


def refused(answers: list[Any]) -> int:
    return sum(isinstance(answer, StoreUnavailableError) for answer in answers)


@steady()
async def test_a_server_that_refuses_costs_nobody_a_wait_and_is_found_again(proxy: Proxy) -> None:
    async with watching(proxy.url) as watch:
        proxy.refuse()
        await asyncio.sleep(0.01)
        assert refused(await watch.ask_many()) == 20
        assert not watch.link.available
        watch.took.clear()
        accepted = proxy.accepted
        for _ in range(20):
            assert refused(await watch.ask_many(50)) == 50
        # At once, not at the deadline; and no request connects.
        assert sorted(watch.took)[len(watch.took) // 2] < DEADLINE / 2
        assert proxy.accepted == accepted
        await proxy.listen()
        await watch.well_again()
        watch.judge("unavailable", "available")
        assert watch.link.counters.refused >= 1000


@pytest.mark.parametrize("warm", [True, False], ids=["while in use", "from the start"])
@steady()
async def test_a_server_that_accepts_and_says_nothing(proxy: Proxy, warm: bool) -> None:
    proxy.mode = "pass" if warm else "hang"
    async with watching(proxy.url, warm=warm) as watch:
        proxy.mode = "hang"
        assert refused(await watch.ask_many(64)) == 64
        assert sum(watch.took) / 64 >= DEADLINE * 0.9
        assert not watch.link.available
        watch.took.clear()
        await watch.until(0.5, refusals=50)
        assert sorted(watch.took)[len(watch.took) // 2] < DEADLINE / 2
        proxy.mode = "pass"
        await watch.well_again()
        watch.judge("unavailable", "available")
        # Those that were written first; when they end, what waits yet for a connection is refused.
        assert watch.link.counters.timeouts >= 32


@steady()
async def test_few_failures_in_a_row_shut_nothing_and_a_success_between_forgets_them(proxy: Proxy) -> None:
    async with watching(proxy.url, failures=40) as watch:
        for _ in range(3):
            proxy.mode = "hang"
            assert refused(await watch.ask_many(20)) == 20
            proxy.mode = "pass"
            await watch.well_again()
        watch.judge()
        assert watch.link.counters.stuck >= 3


@steady()
async def test_late_replies_are_handed_over_and_what_undoes_them_arrives(server: Server, proxy: Proxy) -> None:
    async with watching(proxy.url) as watch:
        undone: list[int] = []

        def undo(reply: int) -> None:
            undone.append(reply)
            watch.link.send(COUNT, [b"late"], [-1])

        proxy.mode = "slow"
        assert refused(await watch.ask_many(20, key=b"late", abandoned=undo)) == 20
        assert not watch.link.available
        assert server.call("GET", "late") == "20"
        await watch.until(1.0)
        assert undone == list(range(1, 21))
        assert server.call("GET", "late") == "0"
        # A probe that takes 200 ms is no sign that the deadline could be kept: still away.
        assert not watch.link.available
        proxy.mode = "pass"
        await watch.well_again()
        watch.judge("unavailable", "available")


@steady()
async def test_what_was_cut_off_in_the_middle_of_a_reply_is_unknown_and_never_done_twice(
    server: Server, proxy: Proxy
) -> None:
    async with watching(proxy.url) as watch:
        for number in range(1, 4):
            proxy.mode = "cut"
            answers = await watch.ask_many(30, key=b"cut")
            proxy.mode = "pass"
            assert 1 <= refused(answers) <= 30
            assert server.call("GET", "cut") == str(30 * number)
            await watch.well_again()
        # A connection that breaks is one failure, whatever was in flight on it.
        watch.judge()
        assert watch.link.counters.broken == 3
        assert watch.link.counters.resent == 0


@steady()
async def test_a_connection_that_breaks_while_idle_is_nobodys_failure(server: Server, proxy: Proxy) -> None:
    async with watching(proxy.url) as watch:
        for _ in range(10):
            proxy.cut_off()
            await asyncio.sleep(0.01)
            assert refused(await watch.ask_many(3)) == 0
        watch.judge()
        assert watch.link.counters.failures == 0
        assert watch.link.counters.connections == 11


@steady()
async def test_a_network_that_flaps_is_reported_once_for_each_turn(proxy: Proxy) -> None:
    async with watching(proxy.url) as watch:
        for _ in range(3):
            proxy.mode = "flap"
            proxy.cut_off()
            await watch.until(0.2, refusals=20)
            proxy.mode = "pass"
            await watch.well_again()
            await watch.until(0.1)
        watch.judge(*("unavailable", "available") * 3)
        # Probes come ever less often while it goes on.
        assert proxy.accepted < 25


@steady()
async def test_scripts_that_are_flushed_again_and_again_are_nobodys_failure(server: Server, proxy: Proxy) -> None:
    async with watching(proxy.url, deadline=30, connect_timeout=30) as watch:
        answers: list[Any] = []
        while watch.link.counters.resent <= 20:
            asking = asyncio.ensure_future(watch.until(0.1, pause=0.001))
            while not asking.done():
                await asyncio.to_thread(server.call, "SCRIPT", "FLUSH")
                await asyncio.sleep(0.005)
            answers += await asking
            assert len(answers) < 100_000
        assert sorted(answers) == list(range(1, len(answers) + 1))


@contextlib.contextmanager
def out_of_memory(server: Server) -> Iterator[str]:
    server.call("CONFIG", "SET", "maxmemory", "1")
    try:
        yield "OOM"
    finally:
        server.call("CONFIG", "SET", "maxmemory", "0")


@contextlib.contextmanager
def demoted(server: Server) -> Iterator[str]:
    server.call("REPLICAOF", "127.0.0.1", "1")
    try:
        yield "READONLY"
    finally:
        server.call("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def without_its_primary(server: Server) -> Iterator[str]:
    server.call("CONFIG", "SET", "replica-serve-stale-data", "no")
    server.call("REPLICAOF", "127.0.0.1", "1")
    try:
        yield "READONLY"
    finally:
        server.call("REPLICAOF", "NO", "ONE")
        server.call("CONFIG", "SET", "replica-serve-stale-data", "yes")


@contextlib.contextmanager
def without_replicas(server: Server) -> Iterator[str]:
    server.call("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        yield "NOREPLICAS"
    finally:
        server.call("CONFIG", "SET", "min-replicas-to-write", "0")


@pytest.mark.parametrize("fault", [out_of_memory, demoted, without_its_primary, without_replicas])
@steady()
async def test_a_server_that_takes_no_writes_is_away_until_it_takes_them(
    server: Server, fault: Callable[[Server], Any]
) -> None:
    async with watching(server.url) as watch:
        with fault(server) as word:
            assert refused(await watch.ask_many(10)) == 10
            assert not watch.link.available
            # It answers PING all the time.
            await watch.until(0.3, refusals=10)
            assert word in watch.logs[0]["reason"]
            watch.judge("unavailable")
        await watch.well_again()
        watch.judge("unavailable", "available")


def loads(server: Server) -> bool:
    """Whether it says that it loads; it may not have been started yet."""
    try:
        server.call("GET", "key:1")
    except redis.BusyLoadingError:
        return True
    raise AssertionError("it has its data already")


@steady()
async def test_a_server_that_loads_its_data_is_away_until_it_has() -> None:
    with Server(key_load_delay=10_000, loading_process_events_interval_bytes=1024, rdbcompression="no") as server:
        async with watching(server.url) as watch:
            server.call("DEBUG", "POPULATE", 100, "key", 5_000)
            server.call("SAVE")
            server.kill()
            assert refused(await watch.ask_many(5)) == 5
            server.start()
            await asyncio.to_thread(wait_until, lambda: loads(server))
            await watch.until(0.2)
            assert not watch.link.available
            await watch.well_again()
            assert server.call("DBSIZE") == 101
            watch.judge("unavailable", "available")


@steady()
async def test_a_server_that_is_busy_for_longer_than_the_deadline(server: Server, proxy: Proxy) -> None:
    async with watching(proxy.url) as watch:
        busy = asyncio.ensure_future(asyncio.to_thread(server.call, "DEBUG", "SLEEP", 0.6))
        await asyncio.sleep(0.15)
        undone: list[int] = []
        assert refused(await watch.ask_many(10, abandoned=undone.append)) == 10
        await busy
        await watch.well_again()
        watch.judge("unavailable", "available")
        assert undone == list(range(1, 11))


@steady()
async def test_a_stuck_connection_is_left_though_all_waiters_went_before_the_deadline(proxy: Proxy) -> None:
    async with watching(proxy.url) as watch:
        proxy.mode = "hang"
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE / 5):
                    await watch.link.run(COUNT, [b"k"], [1])
        end = time.monotonic() + 30
        while not watch.link.counters.stuck:
            assert time.monotonic() < end
            await asyncio.sleep(DEADLINE)
        assert watch.link.counters.stuck == 1
        proxy.mode = "pass"
        # Nobody waits for it any more: the next one goes by another connection.
        await watch.well_again()
        watch.judge()
        assert watch.link.counters.connections >= 2


@steady()
async def test_whatever_happens_each_run_gets_its_own_reply_or_an_error_and_is_done_once_at_most(
    server: Server, proxy: Proxy
) -> None:
    random = Random(5)
    outcomes: dict[bytes, Any] = {}
    undone: list[bytes] = []

    async def ask(watch: Watch, number: int) -> None:
        key = b"%d" % number
        run = {"key": key, "amount": number, "abandoned": lambda reply: undone.append(key)}
        outcomes[key] = await watch.ask(**run)

    async with watching(proxy.url) as watch:
        number = 0
        tasks = []
        for mode in ("pass", "slow", "hang", "pass", "cut", "slow", "flap", "refuse", "pass", "cut", "cut", "pass"):
            if mode == "refuse":
                proxy.refuse()
            else:
                if not proxy.listening:
                    await proxy.listen()
                if mode == "slow":
                    proxy.mode = "pass"
                    await watch.well_again()
                proxy.mode = mode
            for _ in range(16):
                proxy.delay = random.uniform(0.04, 0.07)
                for _ in range(random.randrange(6)):
                    number += 1
                    tasks.append(asyncio.ensure_future(ask(watch, number)))
                await asyncio.sleep(random.uniform(0, 0.02))
        await asyncio.gather(*tasks)
        await watch.well_again()
        watch.judge(*[line["event"].removeprefix("store_") for line in watch.logs])
    values = dict(zip(outcomes, server.call("MGET", *outcomes), strict=True))
    assert len(outcomes) == number
    for key, outcome in outcomes.items():
        done = values[key] is not None
        # Never twice.
        assert values[key] in (None, key.decode())
        if not isinstance(outcome, StoreUnavailableError):
            assert outcome == int(key)
            assert done
            assert key not in undone
        elif key in undone:
            assert done
        elif "is away" in str(outcome):
            assert not done
    assert len(undone) == len(set(undone))
    kinds = {type(outcome) for outcome in outcomes.values()}
    assert kinds == {int, StoreUnavailableError}
    assert undone


@steady()
async def test_a_name_that_takes_for_ever_to_resolve_delays_nobody(server: Server, monkeypatch: Any) -> None:
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def never(*args: Any, **options: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(loop, "getaddrinfo", never)
    async with watching(f"redis://localhost:{server.port}", warm=False) as watch:
        assert refused(await watch.ask_many(30)) == 30
        await watch.until(0.2, refusals=8)
        watch.judge("unavailable")
        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        await watch.well_again()
        watch.judge("unavailable", "available")


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": use}) for use in (False, True)], ids=["", "uv"])
@steady()
async def test_a_loop_that_was_blocked_itself_finds_its_replies(server: Server, anyio_backend: Any) -> None:
    link = RedisLink(server.url, deadline=DEADLINE)
    await asyncio.gather(*[link.run(COUNT, [b"k"], [1]) for _ in range(10)], return_exceptions=True)
    for _ in range(5):
        asked = [asyncio.ensure_future(link.run(COUNT, [b"blocked"], [1])) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(DEADLINE * 2)  # noqa: ASYNC251  # a handler that computes
        await asyncio.gather(*asked)
    assert link.counters.opened == 0
    await link.aclose()


@steady()
async def test_a_loss_belongs_to_no_request_and_a_callback_that_fails_stops_no_other(proxy: Proxy) -> None:
    import contextvars

    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def fails() -> None:
        raise LookupError("callback")

    async def notes() -> None:
        await asyncio.sleep(0)
        seen.append(request.get())

    link = RedisLink(proxy.url, deadline=DEADLINE)
    link.on_restored(fails)
    link.on_restored(notes)
    async with Lag() as lag:
        with capture_logs() as logs:
            watch = Watch(link, logs, lag)
            request.set("somebody's")
            proxy.refuse()
            await watch.ask()
            await proxy.listen()
            await watch.well_again()
            await asyncio.sleep(0.01)
    await link.aclose()
    assert seen == ["none"]
    assert watch.restored == 1
    assert [line["event"] for line in logs] == [
        "store_unavailable",
        "store_available",
        "store_restored_callback_failed",
    ]


@steady()
async def test_closing_while_the_server_is_away_ends_the_probes(proxy: Proxy) -> None:
    before = asyncio.all_tasks()
    link = RedisLink(proxy.url, deadline=DEADLINE)
    proxy.mode = "flap"
    with capture_logs() as logs, pytest.raises(StoreUnavailableError):
        await link.run(COUNT, [b"k"], [1])
    await link.aclose()
    assert {task for task in asyncio.all_tasks() if "store" in task.get_name()} <= before
    accepted = proxy.accepted
    await asyncio.sleep(0.3)
    assert proxy.accepted == accepted
    assert len(logs) == 1
    assert link.available

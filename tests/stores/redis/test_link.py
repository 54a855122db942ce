"""Runs on one server that is well: what is sent, what comes back, and what is left behind."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Any

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink, Script
from tests.stores.redis.proxy import Proxy
from tests.stores.redis.servers import Server, wait_until

pytestmark = pytest.mark.anyio

COUNT = Script("count", "return redis.call('incrby', KEYS[1], ARGV[1])")
ECHO = Script("echo", "return {KEYS[1], ARGV[1], tonumber(ARGV[2]), false}")
BROKEN = Script("broken", "return redis.call('incrby', KEYS[1], 'x')")
LONG = Script("long", "return string.rep('x', ARGV[1])")

# A store that is well may still be slow on a machine that is busy with other things.
PATIENT = 30.0


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return ("asyncio", {"use_uvloop": request.param == "uvloop"})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
async def link(server: Server) -> AsyncIterator[RedisLink]:
    server.call("FLUSHALL")
    link = RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT)
    yield link
    await link.aclose()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    server.call("FLUSHALL")
    async with Proxy(server.port) as proxy:
        yield proxy


@contextlib.contextmanager
def errors_of_the_loop() -> Iterator[list[dict[str, Any]]]:
    """What would have been logged as an unhandled error."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    seen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: seen.append(context))
    try:
        yield seen
    finally:
        loop.set_exception_handler(before)


async def test_a_run_gives_what_the_script_returned(link: RedisLink) -> None:
    assert await link.run(ECHO, [b"{a}:1"], ["text", 7.9]) == [b"{a}:1", b"text", 7, None]
    assert await link.run(COUNT, [b"{a}:2"], [5]) == 5
    assert await link.run(Script("nil", "return false"), [], []) is None


async def test_what_is_asked_in_one_turn_is_a_few_writes_on_one_connection(proxy: Proxy) -> None:
    link = RedisLink(proxy.url, deadline=PATIENT, connect_timeout=PATIENT)
    await link.run(COUNT, [b"one"], [0])
    proxy.chunks.clear()
    tasks_before = len(asyncio.all_tasks())

    async def ask(number: int) -> Any:
        link.send(COUNT, [b"sent"], [number])
        return await link.run(COUNT, [b"c%d" % number], [number])

    asked = [asyncio.ensure_future(ask(number)) for number in range(60)]
    await asyncio.sleep(0)
    # The tasks are the test's: a run has none.
    assert len(asyncio.all_tasks()) == tasks_before + len(asked)
    assert [await answer for answer in asked] == list(range(60))
    assert await link.run(COUNT, [b"sent"], [0]) == sum(range(60))
    assert proxy.accepted == 1
    # 32 at a time: the server is not idle while the rest of a long turn is still asking.
    *turn, last = [chunk.count(b"EVALSHA") for chunk in proxy.chunks]
    assert (sum(turn), last) == (120, 1)
    assert len(turn) <= 4
    await link.aclose()


async def test_replies_find_those_who_asked_whatever_the_order_of_waiting(link: RedisLink) -> None:
    asked = [(number, link.run(ECHO, [b"k"], [number, number])) for number in range(300)]
    for number, answer in reversed(asked):
        assert (await answer)[2] == number


async def test_a_script_that_the_server_does_not_know_is_brought_once(server: Server, link: RedisLink) -> None:
    # The first run over a connection brings the text.
    await link.run(COUNT, [b"a"], [1])
    for _ in range(2):
        server.call("SCRIPT", "FLUSH")
        before = server.calls("eval"), server.calls("evalsha")
        answers = await asyncio.gather(*[link.run(COUNT, [b"{k}%d" % number], [1]) for number in range(64)])
        evals, evalshas = server.calls("eval") - before[0], server.calls("evalsha") - before[1]
        # The text comes once with each of the two writes; the others were refused, and went behind it.
        assert evals in (1, 2)
        assert evals + evalshas <= 64 + 64
    assert answers == [2] * 64
    assert link.counters.failures == 0


async def test_the_first_run_takes_two_trips_after_connecting(server: Server, proxy: Proxy) -> None:
    server.call("SCRIPT", "FLUSH")
    # Late enough that what is asked in one turn has come before the first of it is answered.
    proxy.mode, proxy.delay = "slow", 0.1
    link = RedisLink(proxy.url, deadline=PATIENT, connect_timeout=PATIENT)
    assert await link.run(COUNT, [b"cold"], [1]) == 1
    assert link.counters.resent == 0
    # The name, the probe; then the script itself.
    assert proxy.trips == 2
    assert proxy.chunks[-1].startswith(b"*5\r\n$4\r\nEVAL\r\n")
    assert await link.run(COUNT, [b"cold"], [1]) == 2
    assert proxy.chunks[-1].startswith(b"*5\r\n$7\r\nEVALSHA\r\n")
    await link.aclose()


async def test_who_is_gone_is_not_told_that_the_store_is_back(server: Server) -> None:
    class Policy:
        async def restored(self) -> None:
            told.append(self)

    told: list[Any] = []
    link = RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT)
    kept = Policy()
    link.on_restored(kept.restored)
    for _ in range(100):
        link.on_restored(Policy().restored)
    link.on_restored(lambda: told.append(None))
    gc.collect()
    assert len(link._on_restored) == 2
    await link.run(COUNT, [b"back"], [1])
    (line,) = link._lines.values()
    line.restored()
    for _ in range(10):
        await asyncio.sleep(0)
    assert told == [kept, None]
    await link.aclose()


async def test_the_error_of_a_script_is_an_unavailable_store_reported_once(link: RedisLink) -> None:
    undone: list[Any] = []
    with capture_logs() as logs:
        for _ in range(20):
            with pytest.raises(StoreUnavailableError, match="not an integer"):
                await link.run(BROKEN, [b"k"], [], abandoned=undone.append)
    assert [(line["event"], line["log_level"], line["script"]) for line in logs] == [
        ("store_script_refused", "error", "broken")
    ]
    # The server is well: others go on.
    assert link.available
    assert await link.run(COUNT, [b"k"], [1]) == 1
    assert link.counters.errors == 20
    assert undone == []


async def test_a_run_that_was_cancelled_before_it_was_written_is_not_sent(server: Server, link: RedisLink) -> None:
    await link.run(COUNT, [b"k"], [0])
    before = server.calls("evalsha")
    gone = [asyncio.ensure_future(link.run(COUNT, [b"k"], [1])) for _ in range(3)]
    stays = link.run(COUNT, [b"k"], [10])
    for task in gone:
        task.cancel()
    assert await stays == 10
    assert server.calls("evalsha") - before == 1


async def test_a_run_that_was_cancelled_after_it_was_written_can_be_undone(proxy: Proxy) -> None:
    link = RedisLink(proxy.url, deadline=PATIENT, connect_timeout=PATIENT)
    await link.run(COUNT, [b"undone"], [0])
    undone: list[Any] = []
    proxy.mode, proxy.delay = "slow", 0.15

    async def ask() -> Any:
        return await link.run(COUNT, [b"undone"], [7], abandoned=undone.append)

    task = asyncio.ensure_future(ask())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []
    assert await link.run(COUNT, [b"undone"], [0]) == undone[0] == 7
    assert link.counters.failures == 0
    await link.aclose()


async def test_a_run_that_is_cancelled_as_its_reply_arrives_can_be_undone(link: RedisLink) -> None:
    await link.run(COUNT, [b"race"], [0])
    undone: list[Any] = []
    task: asyncio.Task[Any]

    async def ask() -> Any:
        run: Any = link.run(COUNT, [b"race"], [7], abandoned=undone.append)
        # Called before the task is woken, in the turn in which the reply came.
        run.add_done_callback(lambda _: task.cancel())
        return await run

    task = asyncio.ensure_future(ask())
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert undone == [7]


async def test_a_run_in_a_coroutine_that_is_closed_can_be_undone(link: RedisLink) -> None:
    await link.run(COUNT, [b"closed"], [0])
    undone: list[Any] = []

    async def ask() -> Any:
        return await link.run(COUNT, [b"closed"], [7], abandoned=undone.append)

    coroutine = ask()
    coroutine.send(None)
    await asyncio.sleep(0)
    coroutine.close()
    assert await link.run(COUNT, [b"closed"], [0]) == 7
    await asyncio.sleep(0)
    assert undone == [7]


async def test_of_runs_that_are_cancelled_at_any_moment_each_is_undone_iff_it_was_done_for_nobody(
    server: Server, link: RedisLink
) -> None:
    random = Random(3)
    loop = asyncio.get_running_loop()
    await link.run(COUNT, [b"-"], [0])
    delivered: set[bytes] = set()
    undone: list[bytes] = []

    async def ask(key: bytes) -> None:
        await asyncio.sleep(random.choice([0, 0, 0.0005, 0.001]))
        await link.run(COUNT, [key], [1], abandoned=lambda reply: undone.append(key))
        delivered.add(key)

    keys = [b"%d" % number for number in range(2_000)]
    for first in range(0, len(keys), 200):
        tasks = [asyncio.ensure_future(ask(key)) for key in keys[first : first + 200]]
        for task in tasks:
            if random.random() < 0.5:
                loop.call_later(random.uniform(0, 0.004), task.cancel)
            elif random.random() < 0.5:
                for _ in range(random.randrange(8)):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await link.run(COUNT, [b"-"], [0])
    await asyncio.sleep(0.01)
    done = {key for key, value in zip(keys, server.call("MGET", *keys), strict=True) if value == "1"}
    assert len(undone) == len(set(undone))
    assert set(undone).isdisjoint(delivered)
    assert done == set(undone) | delivered
    # All of it happened.
    assert undone
    assert delivered
    assert len(done) < len(keys)


async def test_an_undoing_that_fails_does_not_touch_the_connection(link: RedisLink) -> None:
    def undo(reply: Any) -> None:
        raise LookupError(reply)

    await link.run(COUNT, [b"k"], [0])
    with errors_of_the_loop() as seen:
        run: Any = link.run(COUNT, [b"k"], [1], abandoned=undo)
        await asyncio.sleep(0)
        run.cancel()
        assert await link.run(COUNT, [b"k"], [1]) == 2
        await asyncio.sleep(0)
    assert [type(context["exception"]) for context in seen] == [LookupError]
    assert link.counters.connections == 1


async def test_what_is_sent_and_fails_is_counted_and_raises_nowhere(server: Server, link: RedisLink) -> None:
    with capture_logs() as logs:
        link.send(BROKEN, [b"k"], [])
        link.send(COUNT, [b"k"], [1])
        assert await link.run(COUNT, [b"k"], [1]) == 2
        gc.collect()
        await asyncio.sleep(0)
    assert link.counters.lost == 1
    assert link.counters.runs == 3
    assert len(logs) == 1


async def test_more_than_may_be_in_flight_are_refused_at_once(server: Server, proxy: Proxy) -> None:
    link = RedisLink(proxy.url, deadline=PATIENT, connect_timeout=PATIENT, max_in_flight=10)
    await link.run(COUNT, [b"k"], [0])
    proxy.mode, proxy.delay = "slow", 0.05
    first = [link.run(COUNT, [b"k"], [1]) for _ in range(6)]
    await asyncio.sleep(0)
    second = [link.run(COUNT, [b"k"], [1]) for _ in range(14)]
    began = time.monotonic()
    answers = await asyncio.gather(*second, return_exceptions=True)
    assert [type(answer) for answer in answers] == [int] * 4 + [StoreUnavailableError] * 10
    answers = await asyncio.gather(*[link.run(COUNT, [b"k"], [1]) for _ in range(11)], return_exceptions=True)
    assert [type(answer) for answer in answers] == [int] * 10 + [StoreUnavailableError]
    assert "more than 10 calls" in str(answers[-1])
    assert await asyncio.gather(*first) == [1, 2, 3, 4, 5, 6]
    assert link.counters.refused == 11
    assert time.monotonic() - began < PATIENT
    await link.aclose()


async def test_what_was_answered_is_not_kept_until_its_deadline(link: RedisLink) -> None:
    for number in range(1_000):
        await link.run(COUNT, [b"k"], [number])
    (line,) = link._lines.values()
    assert len(line._asked) <= 256


async def test_an_argument_that_cannot_be_sent_is_the_callers_error_alone(link: RedisLink) -> None:
    other = link.run(COUNT, [b"k"], [1])
    with pytest.raises(TypeError):
        link.run(COUNT, [b"k"], [None])  # type: ignore[list-item]
    assert await other == 1


async def test_a_reply_that_is_too_long_breaks_the_connection_and_the_next_one_works(server: Server) -> None:
    link = RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT, max_reply=100_000)
    assert len(await link.run(LONG, [], [90_000])) == 90_000
    with pytest.raises(StoreUnavailableError, match="too long"):
        await link.run(LONG, [], [5_000_000])
    assert len(await link.run(LONG, [], [1_000])) == 1_000
    assert link.counters.connections == 2
    await link.aclose()


async def test_closing_fails_what_is_in_flight_and_using_it_again_opens_it_again(proxy: Proxy, server: Server) -> None:
    link = RedisLink(proxy.url, deadline=PATIENT, connect_timeout=PATIENT)
    await link.run(COUNT, [b"k"], [0])
    proxy.mode = "hang"
    sent = link.run(COUNT, [b"k"], [1])
    await asyncio.sleep(0)
    asked = link.run(COUNT, [b"k"], [1])
    await link.aclose()
    for answer in (sent, asked):
        with pytest.raises(StoreUnavailableError, match="closed"):
            await answer
    proxy.mode = "pass"
    assert await link.run(ECHO, [b"k"], ["again", 1])
    assert link.counters.runs == 4
    assert link.counters.connections == 2
    await link.aclose()
    await link.aclose()
    # The proxy passes the end on.
    await asyncio.to_thread(wait_until, lambda: not server.clients())


async def test_each_event_loop_has_a_connection_of_its_own(server: Server, link: RedisLink) -> None:
    await link.run(COUNT, [b"loops"], [1])
    seen: list[Any] = []

    def other() -> None:
        async def main() -> None:
            seen.append(await asyncio.gather(*[link.run(COUNT, [b"loops"], [1]) for _ in range(100)]))
            seen.append(len(server.clients()))

        asyncio.run(main())

    threads = [threading.Thread(target=other) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        await link.run(COUNT, [b"loops"], [0])
    for thread in threads:
        thread.join()
    assert await link.run(COUNT, [b"loops"], [0]) == 301
    # The loops have ended, and with them their connections, though nobody closed the link there.
    await asyncio.to_thread(wait_until, lambda: server.clients() == ["sigil-policy"])
    assert link.counters.connections == 4


async def test_closing_closes_also_what_other_loops_have_open(server: Server, link: RedisLink) -> None:
    await link.run(COUNT, [b"k"], [1])
    asked, leave = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def other() -> None:
        async def main() -> None:
            await link.run(COUNT, [b"k"], [1])
            asked.set()
            await asyncio.to_thread(leave.wait)

        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    await asyncio.to_thread(asked.wait)
    await asyncio.to_thread(wait_until, lambda: len(server.clients()) == 2)
    await link.aclose()
    await asyncio.to_thread(wait_until, lambda: not server.clients())
    leave.set()
    thread.join()
    assert errors == []


PROGRAM = """
import asyncio, gc, sys
from sigil_policy.stores.redis.link import RedisLink, Script
from sigil_policy.stores.limits import StoreUnavailableError

count = Script("count", "return redis.call('incrby', KEYS[1], 1)")
link = RedisLink(sys.argv[1], deadline=30.0, connect_timeout=30.0)
dead = RedisLink("redis://127.0.0.1:1", deadline=30.0, connect_timeout=30.0)

async def wait():
    await asyncio.sleep(0)
    await link.run(count, [b"k"], [], abandoned=lambda reply: link.send(count, [b"k"], []))

async def main():
    for _ in range(20):
        try:
            await link.run(count, [b"k"], [])
            break
        except StoreUnavailableError:   # a busy machine
            await asyncio.sleep(0.1)
    try:
        await dead.run(count, [b"k"], [])
    except StoreUnavailableError:
        pass
    asyncio.ensure_future(wait())
    link.run(count, [b"k"], []).cancel()
    await asyncio.sleep(0)
    link.send(count, [b"k"], [])
    if sys.argv[2] == "close":
        await link.aclose()
        await dead.aclose()

for _ in range(3):
    asyncio.run(main())
gc.collect()
print("done")
"""


@pytest.mark.parametrize("ending", ["close", "leave"])
def test_a_loop_that_ends_leaves_nothing_behind(server: Server, ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, server.url, ending],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONASYNCIODEBUG": ""},
    )
    lines = done.stdout.splitlines()
    assert lines.pop() == "done", done.stderr
    # Three losses of the dead server, and nothing of tasks, transports or sockets.
    assert all("store_unavailable" in line and "127.0.0.1:1" in line for line in lines)
    assert len(lines) == 3
    slow = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert slow == [], done.stderr


def test_what_is_asked_of_a_loop_that_is_shutting_down_opens_nothing_again(server: Server) -> None:
    link = RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT)
    loop = asyncio.new_event_loop()

    async def ask() -> Any:
        return await link.run(COUNT, [b"shutting down"], [1])

    assert loop.run_until_complete(ask()) == 1
    loop.run_until_complete(loop.shutdown_asyncgens())
    with pytest.raises(StoreUnavailableError, match="shutting down"):
        loop.run_until_complete(ask())
    loop.close()
    gc.collect()
    wait_until(lambda: not server.clients())
    assert link.counters.runs == 2


async def test_under_another_library_than_asyncio_it_says_what_it_needs() -> None:
    import trio

    link = RedisLink("redis://localhost")

    async def main() -> None:
        link.run(COUNT, [b"k"], [1])

    with pytest.raises(RuntimeError, match="needs asyncio"):
        await asyncio.to_thread(trio.run, main)


def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['hiredis'] = None\nimport sigil_policy\nimport sigil_policy.stores.redis.link"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "pip install 'sigil-policy[redis]'" in done.stderr.splitlines()[-1]


async def test_user_password_database_and_socket_file_of_the_url_are_used() -> None:
    with Server(requirepass="s3cret/@:") as server:
        server.call("ACL", "SETUSER", "app", "on", ">pass word", "~*", "+@all", "-client", "-setrange")
        name = Script("db", "redis.call('set', KEYS[1], 1) return ARGV[1]")
        for url in (
            f"redis://:s3cret%2F%40%3A@127.0.0.1:{server.port}/3",
            f"valkey://app:pass%20word@localhost:{server.port}/3",
            f"unix://app:pass%20word@{server.path}?db=3",
            f"valkey+unix://:s3cret%2F%40%3A@{server.path}?db=3&client_name=mine",
        ):
            link = RedisLink(url, deadline=PATIENT, connect_timeout=PATIENT)
            assert await link.run(name, [url.encode()], ["x"]) == b"x"
            await link.aclose()
        assert server.client.info("keyspace")["db3"]["keys"] == 4
        for url in (f"redis://127.0.0.1:{server.port}", f"redis://:wr0ng@127.0.0.1:{server.port}"):
            link = RedisLink(url, deadline=PATIENT, connect_timeout=PATIENT)
            with capture_logs() as logs, pytest.raises(StoreUnavailableError):
                await link.run(name, [b"k"], ["x"])
            assert len(logs) == 1
            assert "NOAUTH" in logs[0]["reason"] or "WRONGPASS" in logs[0]["reason"]
            assert "wr0ng" not in str(logs)
            await link.aclose()


def certificates(directory: Path) -> tuple[str, Any]:
    """An authority's file, and the context of a server that it vouches for, named 127.0.0.1."""
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server of the tests")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = directory / "public.pem", directory / "private.pem"
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return str(public), context


async def test_over_tls_the_certificate_is_verified(server: Server, tmp_path: Path) -> None:
    authority, context = certificates(tmp_path)
    async with Proxy(server.port, context) as proxy:
        for host, query, fits in (
            ("127.0.0.1", f"?ssl_ca_certs={authority}", True),
            ("localhost", f"?ssl_ca_certs={authority}", False),
            ("localhost", f"?ssl_ca_certs={authority}&ssl_check_hostname=false", True),
            ("127.0.0.1", "", False),
            ("127.0.0.1", "?ssl_cert_reqs=none", True),
        ):
            link = RedisLink(f"rediss://{host}:{proxy.port}/{query}", deadline=PATIENT, connect_timeout=PATIENT)
            if fits:
                replies = await asyncio.gather(*[link.run(COUNT, [b"{tls}%d" % i], [0]) for i in range(64)])
                assert replies == [0] * 64
            else:
                # The proxy's end of the handshake is refused too.
                with errors_of_the_loop(), capture_logs() as logs, pytest.raises(StoreUnavailableError):
                    await link.run(COUNT, [b"tls"], [0])
                assert "CERTIFICATE_VERIFY_FAILED" in logs[0]["reason"]
            await link.aclose()


async def test_sixty_four_at_once_are_three_times_as_fast_as_a_pool(server: Server, link: RedisLink) -> None:
    pool = redis.asyncio.Redis(port=server.port, max_connections=64)
    sha = await pool.script_load(COUNT.text)
    ratios: list[float] = []

    async def ours() -> None:
        for _ in range(15):
            await link.run(COUNT, [b"{a}"], [1])

    async def theirs() -> None:
        for _ in range(15):
            await pool.evalsha(sha, 1, b"{a}", 1)

    # One undisturbed round shows it: what else the machine does can only hide it.
    while not ratios or (max(ratios) < 3 and len(ratios) < 20):
        seconds = []
        for ask in (ours, theirs):
            began = time.perf_counter()
            await asyncio.gather(*[ask() for _ in range(64)])
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    await pool.aclose()
    assert max(ratios) >= 3, ratios

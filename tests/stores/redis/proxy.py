"""A TCP proxy between the tests and a server, which can fail in the ways that networks do.

    async with Proxy(server.port) as proxy:
        link = RedisLink(proxy.url)
        proxy.mode = "hang"

It runs in the test's own event loop; what is late in that is the loop's lag, which `Lag` measures.
"""

import asyncio
import ssl
import time
from collections import deque
from typing import Any, Literal, Self

Mode = Literal["pass", "hang", "slow", "cut", "flap"]


class _Side(asyncio.Protocol):
    """One end of a proxied connection: the client's (`of_client`), or the server's."""

    def __init__(self, proxy: "Proxy", other: "_Side | None" = None) -> None:
        self.proxy = proxy
        self.other = other
        self.of_client = other is None
        self.transport: Any = None
        self.early: list[bytes] = []
        self.late: deque[bytes] = deque()
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.proxy.sides.add(self)
        if not self.of_client:
            return
        self.proxy.accepted += 1
        if self.proxy.mode == "flap":
            self.transport.abort()
        else:
            self.proxy.spawn(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: _Side(self.proxy, self), "127.0.0.1", self.proxy.target)
        for data in self.early:
            self.other.transport.write(data)
        if self.transport.is_closing():
            self.other.transport.abort()

    def data_received(self, data: bytes) -> None:
        proxy = self.proxy
        if self.of_client:
            proxy.chunks.append(data)
            proxy.trips += not proxy.asked
            proxy.asked = True
            if self.other is None:
                self.early.append(data)
            else:
                self.other.transport.write(data)
        elif proxy.mode == "slow":
            # Each comes late by its own time, but never before what was said earlier.
            loop = asyncio.get_running_loop()
            self.due = max(self.due, loop.time() + proxy.delay)
            self.late.append(data)
            loop.call_at(self.due, self._pass_on)
        elif proxy.mode == "cut":
            self.other.transport.write(data[: len(data) // 2].rstrip(b"\r\n"))  # type: ignore[union-attr]
            self.other.transport.close()  # type: ignore[union-attr]
        elif proxy.mode != "hang":
            self.late.append(data)
            self._pass_on(len(self.late))

    def _pass_on(self, count: int = 1) -> None:
        self.proxy.asked = False
        for _ in range(min(count, len(self.late))):
            self.other.transport.write(self.late.popleft())  # type: ignore[union-attr]

    def connection_lost(self, error: Exception | None) -> None:
        self.proxy.sides.discard(self)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.abort()


class Proxy:
    """Between a port of its own and `target`.

    `mode` is what happens to what the server says: it may "pass", "hang" (go nowhere), come "slow" (after `delay`
    seconds) or be "cut" (in the middle of a reply, and the connection with it); "flap" cuts connections as they come.
    `refuse` and `listen` close and open the door.
    """

    def __init__(self, target: int, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self.mode: Mode = "pass"
        self.delay = 0.2
        self.accepted = 0
        self.chunks: list[bytes] = []
        # Turns of asking: what is asked before an answer has come is of one trip.
        self.trips = 0
        self.asked = False
        self.sides: set[_Side] = set()
        self.port = 0
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listen(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Side(self), "127.0.0.1", self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def listening(self) -> bool:
        return self._server is not None

    def refuse(self) -> None:
        """No more connections, and an end to those that there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut_off()

    def cut_off(self) -> None:
        for side in self.sides.copy():
            side.transport.abort()

    async def renew(self) -> None:
        """As it was at first, at the same port."""
        self.refuse()
        await asyncio.sleep(0)
        self.mode, self.delay, self.accepted = "pass", 0.2, 0
        self.chunks.clear()
        await self.listen()

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        for task in self._tasks.copy():
            task.cancel()
        for _turn in range(5):
            await asyncio.sleep(0)


class Lag:
    """How much later than asked this event loop, or this machine, wakes a task: `worst`, in seconds.

    It is the sum of what comes close together: a machine that is busy does not hold a process up just once.
    """

    def __init__(self) -> None:
        self.worst = 0.0
        self._late: deque[tuple[float, float]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def _measure(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(0.002)
            now = time.monotonic()
            late, before = now - before - 0.002, now
            self.worst = max(self.worst, late)
            # (A timer that is rounded up to the next millisecond holds nobody up.)
            if late > 0.002:
                while self._late and self._late[0][0] < now - late - 0.15:
                    self._late.popleft()
                self._late.append((now, late))
                self.worst = max(self.worst, sum(seconds for _, seconds in self._late))

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self._measure())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

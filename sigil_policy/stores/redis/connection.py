"""One connection to one server, shared by everything that one event loop asks.

    connection = await connect(endpoint, address, owner, max_reply=1 << 20)
    connection.write(runs)                                # one write, whatever their number
    reply = await connection.ask(b"CLUSTER", b"SLOTS")

Replies come in the order of what was written (RESP2), so what waits is a queue, and no task and no lock is needed.

Guarantees:

* A run that is answered after its waiter has gone hands the reply to its `abandoned`, unless that is an error.
* When a connection breaks, what it had not answered is handed to its owner, once: nobody knows whether it was done.
* A reply above `max_reply` bytes, one that nobody asked for, and anything that is not RESP, break the connection.
* A **retired** connection is written to no more, but read for a while: late replies can still be undone.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sigil_policy.stores.redis.address import Address, Credentials, Endpoint
from sigil_policy.stores.redis.driver import MORE, ProtocolError, Reader, ReplyError, pack

if TYPE_CHECKING:
    from sigil_policy.stores.redis.line import Script

Argument = bytes | str | int | float


class ServerError(Exception):
    """The server answered with an error; its first word says which."""

    @property
    def word(self) -> str:
        return str(self).partition(" ")[0]


class Run(asyncio.Future[Any]):
    """One script, asked once. Awaiting it gives the reply."""

    __slots__ = ("abandoned", "args", "gate", "keys", "packed", "script", "silent", "tries")

    script: "Script | None"
    keys: Sequence[bytes]
    args: Sequence[Argument]
    packed: bytes
    abandoned: Callable[[Any], None] | None
    gate: Any
    silent: bool
    tries: int

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.done():
            self._asyncio_future_blocking = True
            try:
                yield self
            except BaseException:
                # Cancelled in the very turn in which the reply came: the task never sees it, but it was done.
                if not self.cancel() and not self.cancelled() and self.exception() is None and self.abandoned:
                    self.get_loop().call_soon(self.abandoned, self.result())
                raise
        return self.result()

    __iter__ = __await__


class Owner(Protocol):
    """Who is told what became of the runs on a connection."""

    def answered(self) -> None:
        """Somebody got the reply that they waited for."""

    def refused(self, connection: "Connection", run: Run, error: str) -> None:
        """The server answered `run` with an error."""

    def lost(self, connection: "Connection", runs: list[Run], reason: str) -> None:
        """The connection has ended, before it answered these."""


class Nobody:
    """The owner of a connection that carries no runs."""

    def answered(self) -> None:
        pass

    def refused(self, connection: "Connection", run: Run, error: str) -> None:
        pass

    def lost(self, connection: "Connection", runs: list[Run], reason: str) -> None:
        pass


class Connection(asyncio.Protocol):
    """Made by `connect`."""

    __slots__ = (
        "_clock",
        "_max_reply",
        "_owner",
        "_reader",
        "_transport",
        "_unread",
        "closed",
        "endpoint",
        "pending",
        "probed",
        "probed_at",
        "quiet_since",
        "retired_at",
    )

    def __init__(self, endpoint: Endpoint, owner: Owner, loop: asyncio.AbstractEventLoop, max_reply: int) -> None:
        self.endpoint = endpoint
        self.pending: deque[Run] = deque()
        self.probed: Run | None = None
        self.probed_at = 0.0
        self.closed = False
        self.retired_at = 0.0
        self.quiet_since = 0.0
        self._clock = loop.time
        self._owner = owner
        self._reader = Reader(notEnoughData=MORE)
        self._transport: asyncio.Transport | None = None
        self._max_reply = max_reply
        self._unread = 0

    def write(self, runs: Sequence[Run]) -> None:
        """Send them as one write."""
        if not self.pending:
            self.quiet_since = self._clock()
        self.pending.extend(runs)
        if self._transport is not None:
            self._transport.write(b"".join([run.packed for run in runs]))

    def ask(self, *command: Argument) -> Run:
        """Send one command of our own. Awaiting it gives the reply or raises `ServerError`, `ConnectionError`."""
        run = Run()
        run.script = run.abandoned = None
        run.packed = pack(command)
        if self.closed:
            run.set_exception(ConnectionResetError("the connection is closed"))
        else:
            self.write((run,))
        return run

    def check(self) -> None:
        """Raises `ConnectionResetError` if it has ended."""
        if self.closed:
            raise ConnectionResetError("the server closed the connection")

    def drop(self, reason: str) -> None:
        """Close at once; what is pending is lost."""
        if self._transport is not None:
            self._transport.abort()
        self._end(reason)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream transport, as `create_connection` promises
        if self.closed:
            transport.abort()  # type: ignore[attr-defined]  # the same
        elif not self.endpoint.path:
            # What stands between may forget connections that are silent for minutes, and say nothing of it.
            opened = transport.get_extra_info("socket")
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)

    def data_received(self, data: bytes) -> None:
        self.quiet_since = self._clock()
        self._reader.feed(data)
        gets = self._reader.gets
        pending = self.pending
        taken = in_time = False
        wrong = ""
        errors: list[tuple[Run, str]] = []
        try:
            while (reply := gets()) is not MORE:
                if not pending:
                    wrong = "a reply that nobody asked for"
                    break
                run = pending.popleft()
                taken = True
                if reply.__class__ is ReplyError:
                    errors.append((run, str(reply)[:200]))
                elif not run.done():
                    run.set_result(reply)
                    in_time = True
                elif run.abandoned is not None:
                    # In a turn of its own: an error in it is not one of the connection.
                    run.get_loop().call_soon(run.abandoned, reply)
        except ProtocolError:
            wrong = "something that is not RESP"
        if in_time:
            self._owner.answered()
        if taken:
            self._unread = 0
        else:
            self._unread += len(data)
            if self._unread > self._max_reply:
                wrong = "a reply that is too long"
        if wrong:
            self.drop(wrong)
        for run, error in errors:
            if run.script is not None:
                self._owner.refused(self, run, error)
            elif not run.done():
                run.set_exception(ServerError(error))

    def eof_received(self) -> None:
        self._end("the server closed the connection")

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection broke")

    def _end(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        runs = []
        for run in self.pending:
            if run.script is not None:
                runs.append(run)
            elif not run.done():
                run.set_exception(ConnectionResetError(reason))
        self.pending.clear()
        self._owner.lost(self, runs, reason)


async def connect(
    endpoint: Endpoint,
    address: Address,
    owner: Owner,
    *,
    max_reply: int,
    credentials: Credentials | None = None,
    probe: tuple[Argument, ...] = (),
) -> Connection:
    """Connect and log in. Raises `OSError` (no way there) or `ServerError` (not let in); leaves nothing behind then.

    `probe` is a command that goes out with the login; `connection.probed` is its answer.
    """
    loop = asyncio.get_running_loop()
    connection = Connection(endpoint, owner, loop, max_reply)
    who = address.credentials if credentials is None else credentials
    try:
        if endpoint.path:
            await loop.create_unix_connection(lambda: connection, endpoint.path)
        else:
            await loop.create_connection(lambda: connection, endpoint.host, endpoint.port, ssl=address.tls)
        await _log_in(connection, who, address, probe, select=credentials is None)
    except BaseException:
        if connection.probed is not None:
            connection.probed.cancel()
        connection.drop("given up while connecting")
        raise
    return connection


async def _log_in(
    connection: Connection, who: Credentials, address: Address, probe: tuple[Argument, ...], *, select: bool
) -> None:
    commands: list[tuple[Argument, ...]] = []
    if who.password:
        commands.append((b"AUTH", who.username, who.password) if who.username else (b"AUTH", who.password))
    if address.db and select:
        commands.append((b"SELECT", address.db))
    # Our name is a courtesy, which a server may refuse; that there is an answer is what counts.
    commands.append((b"CLIENT", b"SETNAME", address.client_name))
    answers = [connection.ask(*command) for command in commands]
    if probe:
        connection.probed = connection.ask(*probe)
        connection.probed_at = connection.quiet_since
    try:
        await asyncio.wait(answers)
    finally:
        for answer in answers:
            answer.cancel()
    *needed, named = [answer.exception() for answer in answers]
    for error in needed:
        if error is not None:
            raise error
    if named is not None and not isinstance(named, ServerError):
        raise named
    connection.check()

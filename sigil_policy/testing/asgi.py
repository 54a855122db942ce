"""Drive an ASGI application with one request and see every message it sends, in process.

    sent = await drive(app, "GET", "/v7/agents", headers={"authorization": f"Bearer {token}"})
    assert sent.status == 200 and sent.header("x-request-id")

    async with connect(app, "/v7/chat") as socket:                      # a conversation, step by step
        await socket.accepted()
        await socket.send_text("hello")
        assert await socket.receive_text() == "hello, too"

Runs under asyncio and trio. The body can come in parts, the client can leave, a `send` can fail. What does not come
within a conversation's `timeout` fails the test, and says what came instead.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import anyio.lowlevel

Message = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
Headers = Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]
OnSend = Callable[[Message], Awaitable[None] | None] | None


class Sent:
    """What came back: every message in order, and the exception that came out of the application, if any."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.error: BaseException | None = None

    @property
    def start(self) -> Message:
        for message in self.messages:
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                return message
        raise AssertionError(
            f"no response was started; sent: {[m['type'] for m in self.messages]}, error: {self.error!r}"
        )

    @property
    def status(self) -> int:
        return int(self.start.get("status", 101))

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(bytes(name), bytes(value)) for name, value in self.start.get("headers") or ()]

    def header(self, name: str) -> str | None:
        """The value of `name`, None without it; more than one line is an assertion error."""
        values = self.header_lines(name)
        _expect(len(values) < 2, f"{name} was sent {len(values)} times: {values}")
        return values[0] if values else None

    def header_lines(self, name: str) -> list[str]:
        wanted = name.lower().encode()
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == wanted]

    @property
    def body(self) -> bytes:
        kinds = ("http.response.body", "websocket.http.response.body")
        return b"".join(m.get("body", b"") for m in self.messages if m["type"] in kinds)

    def json(self) -> Any:
        return json.loads(self.body)


def _expect(it: bool, otherwise: str) -> None:
    if not it:  # no `assert`: a test that is run with -O still tests
        raise AssertionError(otherwise)


def _pairs(headers: Headers) -> list[tuple[bytes, bytes]]:
    items = headers.items() if isinstance(headers, Mapping) else headers
    return [(_bytes(name).lower(), _bytes(value)) for name, value in items]


def _bytes(value: str | bytes) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else value


async def drive(
    app: App,
    method: str = "GET",
    path: str = "/",
    *,
    headers: Headers = (),
    body: bytes | Iterable[bytes] = b"",
    query: str | bytes = b"",
    kind: str = "http",
    scope: Mapping[str, Any] | None = None,
    client: tuple[str, int] | None = ("203.0.113.7", 50_000),
    incoming: Iterable[Message] | None = None,
    on_send: OnSend = None,
    raise_errors: bool = True,
) -> Sent:
    """One exchange with `app`.

    `body`: bytes, or the parts in which they arrive. `incoming`: the exact messages that `receive` hands out instead of
    the body (of a WebSocket instead of `websocket.connect`, of a lifespan instead of its startup and shutdown); after
    the last one it waits for ever, so that an application which waits for the client to leave does not end: use
    `connect`. `scope`: keys added to, or replacing those of, the scope. `on_send` sees each message before it is
    recorded and may raise, as a broken connection does. `raise_errors=False` keeps an exception of the application in
    `Sent.error` instead of raising it.
    """
    if incoming is None:
        if kind == "websocket":
            incoming = [{"type": "websocket.connect"}]
        elif kind == "lifespan":
            incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        else:
            parts = [body] if isinstance(body, bytes) else list(body) or [b""]
            incoming = [
                {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
                for index, part in enumerate(parts)
            ]
    waiting = iter(list(incoming))

    async def receive() -> Message:
        for message in waiting:
            await anyio.lowlevel.checkpoint()
            return message
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    sent = Sent()

    async def send(message: Message) -> None:
        if on_send is not None:
            waited = on_send(message)
            if waited is not None:
                await waited
        sent.messages.append(message)

    if kind == "lifespan":
        full = _lifespan(scope)
    else:
        full = _scope(method, path, headers=headers, query=query, kind=kind, scope=scope, client=client)
    try:
        await app(full, receive, send)
    except BaseException as error:
        if raise_errors or not isinstance(error, Exception):
            raise
        sent.error = error
    return sent


def _scope(
    method: str,
    path: str,
    *,
    headers: Headers,
    query: str | bytes,
    kind: str,
    scope: Mapping[str, Any] | None,
    client: tuple[str, int] | None,
) -> dict[str, Any]:
    full: dict[str, Any] = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "https" if kind == "http" else "wss",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": _bytes(query),
        "root_path": "",
        "headers": _pairs(headers),
        "client": client,
        "server": ("testserver", 443),
        "state": {},
    }
    if kind == "http":
        full["method"] = method
    else:
        full["subprotocols"] = []
        full["extensions"] = {"websocket.http.response": {}}
    full.update(scope or {})
    return full


def _lifespan(scope: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}, **(scope or {})}


class Conversation:
    """One exchange, message by message; `connect` makes it.

        async with connect(app, "/v7/chat", headers=auth_headers()) as socket:
            await socket.accepted()
            await socket.send_json({"text": "hello"})
            assert (await socket.receive_json())["text"] == "hello, too"
            await socket.silence()                          # and nothing else
            await socket.send_text("bye")
            assert await socket.closed() == 1000

        async with connect(app, "/v7/events", kind="http") as stream:
            assert (await stream.receive("http.response.start"))["status"] == 200
            assert await stream.receive_body() == b"data: 1\\n\\n"
            await stream.disconnect()                       # the client leaves, and the application has to end
            assert (await stream.ended()).error is None

    `sent` has what the application has sent so far, also what was not received yet. What does not come within the
    timeout, and another message than the one that was expected, are an `AssertionError` that tells what came; what the
    application raises is raised where the test asks for what comes next.
    """

    def __init__(self, kind: str, timeout: float, window: int) -> None:
        self.kind = kind
        self.timeout = timeout
        self.sent = Sent()
        self._to_app, self._inbox = anyio.create_memory_object_stream[Message](10_000)
        self._outbox, self._from_app = anyio.create_memory_object_stream[Message](window)
        self._scope = anyio.CancelScope()
        self._over = anyio.Event()

    async def receive(self, expected: str | None = None) -> Message:
        """The next message of the application; with `expected`, one of that type.

        Raises `AssertionError` when none comes within the timeout, or another one; and what the application raised, if
        that is why nothing comes.
        """
        with anyio.move_on_after(self.timeout):
            try:
                message = await self._from_app.receive()
            except anyio.EndOfStream:
                if self.sent.error is not None:
                    raise self.sent.error from None
                raise AssertionError(f"the application has ended, and sent nothing more; {self._so_far()}") from None
            got = message["type"]
            if expected is not None and got != expected:
                raise AssertionError(f"expected {expected}, got {message!r}; {self._so_far()}")
            return message
        wanted = expected or "a message"
        raise AssertionError(f"no {wanted} came within {self.timeout} s; {self._so_far()}")

    async def send(self, message: Message) -> None:
        """What the application receives next."""
        await self._to_app.send(message)

    async def accepted(self) -> Message:
        """Open a WebSocket: `websocket.connect`, which the application answers with `websocket.accept`."""
        await self.send({"type": "websocket.connect"})
        return await self.receive("websocket.accept")

    async def send_text(self, text: str) -> None:
        await self.send({"type": "websocket.receive", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        await self.send({"type": "websocket.receive", "bytes": data})

    async def send_json(self, value: Any) -> None:
        await self.send_text(json.dumps(value))

    async def receive_text(self) -> str:
        message = await self.receive("websocket.send")
        _expect(isinstance(message.get("text"), str), f"expected text, got {message!r}")
        return str(message["text"])

    async def receive_bytes(self) -> bytes:
        message = await self.receive("websocket.send")
        _expect(message.get("bytes") is not None, f"expected bytes, got {message!r}")
        return bytes(message["bytes"])

    async def receive_json(self) -> Any:
        return json.loads(await self.receive_text())

    async def receive_body(self) -> bytes:
        """The next part of the body of a response, whose start may come before it."""
        message = await self.receive()
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            message = await self.receive()
        _expect(message["type"].endswith(".response.body"), f"expected a part of the body, got {message!r}")
        return bytes(message.get("body", b""))

    async def closed(self) -> int:
        """The code with which the application closes the WebSocket; what it sends until then is passed over."""
        while True:
            message = await self.receive()
            if message["type"] == "websocket.close":
                return int(message.get("code", 1000))

    async def silence(self, seconds: float = 0.05) -> None:
        """Nothing is sent for so long: an `AssertionError` if something is."""
        with anyio.move_on_after(seconds):
            try:
                message = await self._from_app.receive()
            except anyio.EndOfStream:
                return
            raise AssertionError(f"expected nothing for {seconds} s, got {message!r}")

    async def disconnect(self, code: int = 1005, reason: str = "") -> None:
        """The client leaves."""
        if self.kind == "websocket":
            await self.send({"type": "websocket.disconnect", "code": code, "reason": reason})
        else:
            await self.send({"type": "http.disconnect"})

    def cancel(self) -> None:
        """The server gives the application up, as at a shutdown."""
        self._scope.cancel()

    async def ended(self) -> Sent:
        """Wait until the application has returned; what was not received yet is passed over.

        Raises what it raised, and `AssertionError` if it goes on.
        """
        with anyio.move_on_after(self.timeout):
            async for _ in self._from_app:
                pass
            await self._over.wait()
            if self.sent.error is not None:
                raise self.sent.error
            return self.sent
        raise AssertionError(f"the application has not ended within {self.timeout} s; {self._so_far()}")

    def _so_far(self) -> str:
        return f"sent so far: {[message['type'] for message in self.sent.messages]}, error: {self.sent.error!r}"

    async def _run(self, app: App, scope: dict[str, Any], on_send: OnSend) -> None:
        async def send(message: Message) -> None:
            if on_send is not None:
                waited = on_send(message)
                if waited is not None:
                    await waited
            self.sent.messages.append(message)
            await self._outbox.send(message)

        try:
            with self._scope:
                await app(scope, self._inbox.receive, send)
        except Exception as error:  # noqa: BLE001  raised where the test asks for what comes next
            self.sent.error = error
        finally:
            self._outbox.close()
            self._over.set()

    def _close(self) -> None:
        for stream in (self._to_app, self._inbox, self._outbox, self._from_app):
            stream.close()


@asynccontextmanager
async def connect(
    app: App,
    path: str = "/",
    *,
    kind: Literal["websocket", "http", "lifespan"] = "websocket",
    method: str = "GET",
    headers: Headers = (),
    query: str | bytes = b"",
    body: bytes | None = b"",
    subprotocols: Iterable[str] = (),
    scope: Mapping[str, Any] | None = None,
    client: tuple[str, int] | None = ("203.0.113.7", 50_000),
    on_send: OnSend = None,
    timeout: float = 5.0,  # noqa: ASYNC109  of each step, not of the block
    window: int = 16,
    raise_errors: bool = True,
) -> AsyncIterator[Conversation]:
    """A whole conversation with `app`: a WebSocket, a request with a long stream for an answer, a lifespan.

        async with connect(app, "/v7/events", kind="http") as stream:
            assert await stream.receive_body() == b"data: 1\\n\\n"

    At the end of the block the client leaves, unless it has; the application then has to end within the timeout (in a
    lifespan after the shutdown). What it raises comes out of the block. If the test itself fails, it is cancelled.

    Options:
        kind: `"websocket"` (default), `"http"`, or `"lifespan"`, whose startup and shutdown the test sends itself.
        body: of an HTTP request, sent at once (default empty); None: the test sends `http.request` itself.
        subprotocols: what a WebSocket client offers (default none).
        timeout: seconds that any step may take, by the machine's clock (default 5).
        window: how many messages the application may be ahead of the test before its `send` waits, as it does for a
            slow client (default 16).
        method, headers, query, scope, client, on_send, raise_errors: as of `drive`.
    """
    conversation = Conversation(kind, timeout, window)
    if kind == "lifespan":
        full = _lifespan(scope)
    else:
        full = _scope(method, path, headers=headers, query=query, kind=kind, scope=scope, client=client)
    if kind == "websocket" and subprotocols:
        full["subprotocols"] = list(subprotocols)
        offer = (b"sec-websocket-protocol", ", ".join(full["subprotocols"]).encode("latin-1"))
        full["headers"] = [*full["headers"], offer]
    if kind == "http" and body is not None:
        await conversation.send({"type": "http.request", "body": body, "more_body": False})
    raised: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(conversation._run, app, full, on_send)  # noqa: SLF001
            try:
                yield conversation
                if kind != "lifespan":
                    await conversation.disconnect()
                await conversation.ended()
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:  # noqa: BLE001  raised below: a task group would put it into a group
                conversation.cancel()
                raised = error
        if raised is not None and (raise_errors or raised is not conversation.sent.error):
            raise raised
    finally:
        del raised
        conversation._close()  # noqa: SLF001

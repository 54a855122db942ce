"""Drive an ASGI application with one request and see every message it sends, in process.

    sent = await drive(app, "GET", "/v7/agents", headers={"authorization": f"Bearer {token}"})
    assert sent.status == 200 and sent.header("x-request-id")

Runs under asyncio and trio. The body can come in parts, the client can leave, a `send` can fail.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import anyio
import anyio.lowlevel

Message = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
Headers = Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]


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
        assert len(values) < 2, f"{name} was sent {len(values)} times: {values}"
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
    on_send: Callable[[Message], Awaitable[None] | None] | None = None,
    raise_errors: bool = True,
) -> Sent:
    """One exchange with `app`.

    `body`: bytes, or the parts in which they arrive. `incoming`: the exact messages that `receive` hands out instead;
    after the last one it waits for ever. `scope`: keys added to, or replacing those of, the scope. `on_send` sees each
    message before it is recorded and may raise, as a broken connection does. `raise_errors=False` keeps an exception
    of the application in `Sent.error` instead of raising it.
    """
    if incoming is None:
        if kind == "websocket":
            incoming = [{"type": "websocket.connect"}]
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
    try:
        await app(full, receive, send)
    except BaseException as error:
        if raise_errors or not isinstance(error, Exception):
            raise
        sent.error = error
    return sent

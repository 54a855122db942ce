"""An exchange that is over is freed at once, with all that the server made for it: nothing waits for the garbage
collector, whose work would otherwise be a tenth of what a small service does. (An exception that came out of the
application has the frames in which it was raised; it is collected later, with them.)"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from sigil_policy import (
    AccessLog,
    CacheControl,
    Conditional,
    JSONLines,
    Policy,
    PolicyStack,
    Principal,
    Problems,
    RateLimit,
    RequestID,
    Scopes,
    Versioning,
)
from sigil_policy.core.exchange import SCOPE_KEY, Exchange

pytestmark = pytest.mark.anyio


class Cycle:
    """As servers have one for each request: it has the scope, and the application receives and sends through it."""

    def __init__(self, kind: str, path: str, incoming: list[Any]) -> None:
        self.scope: dict[str, Any] = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http" if kind == "http" else "ws",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "client": ("203.0.113.7", 50_000),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        if kind == "http":
            self.scope["method"] = "GET"
        self.incoming = incoming
        self.sent: list[str] = []

    async def receive(self) -> Any:
        return self.incoming.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message["type"])


class Caller(Policy):
    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        ex.give(Principal("ada"))


def policies() -> list[Any]:
    return [
        RequestID(),
        AccessLog(logger=JSONLines(StringIO(), batch=1_000)),
        Problems(),
        Versioning(versions={}),
        Caller(),
        Scopes(public=("/**",), routes={"/closed": "some:scope"}),
        RateLimit(over_messages="close"),
        CacheControl(),
        Conditional(),
    ]


async def bare(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        await send({"type": "websocket.close"})
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def whole(request: Request) -> JSONResponse:
    await request.body()
    return JSONResponse({})


async def streamed(request: Request) -> StreamingResponse:
    async def parts() -> Any:
        for _ in range(3):
            yield b"part"

    return StreamingResponse(parts())


async def talks(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.receive_text()
    await websocket.close()


def starlette() -> Any:
    inner = Starlette(routes=[Route("/whole", whole)])
    app = Starlette(
        routes=[
            Route("/whole", whole),
            Route("/streamed", streamed),
            Route("/closed", whole),
            WebSocketRoute("/talks", talks),
            Mount("/inner", PolicyStack(inner, policies())),
        ]
    )
    app.add_middleware(PolicyStack, policies=policies())
    return app


def fastapi() -> Any:
    app = FastAPI()
    app.add_api_route("/whole", whole)
    app.add_api_route("/streamed", streamed)
    app.add_api_websocket_route("/talks", talks)
    app.add_middleware(PolicyStack, policies=policies())
    return app


@contextmanager
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("make", "kind", "path"),
    [
        *[(lambda: PolicyStack(bare, policies()), kind, "/whole") for kind in ("http", "websocket")],
        *[(lambda: PolicyStack(bare, policies()), "http", path) for path in ("/closed",)],
        *[(starlette, "http", f"/{path}") for path in ("whole", "streamed", "closed", "none", "inner/whole")],
        (starlette, "websocket", "/talks"),
        *[(fastapi, "http", f"/{path}") for path in ("whole", "streamed", "none")],
        (fastapi, "websocket", "/talks"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_what_a_server_made_for_an_exchange_goes_with_it(make: Callable[[], Any], kind: str, path: str) -> None:
    app = make()
    opening = [{"type": "http.request", "body": b"", "more_body": False}]
    if kind == "websocket":
        opening = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x", "bytes": None}]

    async def serve() -> tuple[Any, Any]:
        cycle = Cycle(kind, path, [*opening])
        await app(cycle.scope, cycle.receive, cycle.send)
        assert cycle.sent
        return weakref.ref(cycle), weakref.ref(cycle.scope[SCOPE_KEY])

    await serve()  # what is made once stays
    with without_collections():
        assert [one() for one in await serve()] == [None, None]


@pytest.mark.parametrize(
    ("kind", "message"), [("http", "http.disconnect"), ("websocket", "websocket.disconnect")], ids=["http", "websocket"]
)
async def test_a_task_that_outlives_its_exchange_hears_that_the_client_has_left(kind: str, message: str) -> None:
    late: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        late.append(receive)
        await bare(scope, receive, send)

    opening = (
        [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "x"}] if kind == "websocket" else [{}]
    )
    opening[0].setdefault("type", "http.request")
    cycle = Cycle(kind, "/whole", opening)
    await PolicyStack(app, [RequestID()])(cycle.scope, cycle.receive, cycle.send)
    assert [(await late[0]())["type"] for _ in range(2)] == [message] * 2

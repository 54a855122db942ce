"""The same small service in each framework, and one list of policies around it.

| route | what it does |
|---|---|
| `GET /` | `{"hello": "world"}`; for everybody |
| `GET /items/{number}` | `{"number": 5}`; takes `items:read` |
| `GET /limited/{number}` | the same, twice a minute |
| `GET /status/{code}` | refuses in the framework's own way, with that status |
| `GET /boom` | raises |
| `GET /stream` | three parts |
| `/ws` | a WebSocket that echoes; takes `chat` |
"""

import importlib
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from pydantic import SecretStr

from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.foreign import reply_to, text_headers
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.conditional import Conditional
from sigil_policy.policies.problems import Problems, from_http_error
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes

SECRET = "0123456789abcdef0123456789abcdef"
ISSUER, AUDIENCE = "https://auth.example.com", "items"
PASSWORD = "correct-horse-battery-staple"


def policies() -> list[Any]:
    issuer = Issuer(url=ISSUER, audience=AUDIENCE, keys=[Key(algorithm="HS256", secret=SecretStr(SECRET))])
    return [
        RequestID(),
        Problems(),
        BearerAuth(issuers=[issuer]),
        Scopes(
            routes={"GET /items/{number}": "items:read", "WEBSOCKET /ws": "chat"},
            public=["GET /", "GET /stream", "GET /status/{code}", "GET /boom"],
        ),
        RateLimit(tiers={"free": "1000/minute"}, limits={"GET /limited/{number}": "2/minute"}),
        Conditional(),
    ]


def token(*scopes: str, subject: str = "ada") -> dict[str, str]:
    claims = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "scope": " ".join(scopes), "exp": int(time.time()) + 600,
    }  # fmt: skip
    return {"authorization": f"Bearer {jwt.encode(claims, SECRET, 'HS256')}"}


def boom() -> None:
    raise RuntimeError(PASSWORD)


async def parts() -> AsyncIterator[bytes]:
    for part in (b"one ", b"two ", b"three"):
        yield part


# --- one function for each framework -------------------------------------------------------------------------------


def fastapi() -> Any:
    from fastapi import APIRouter, FastAPI, HTTPException, WebSocket
    from fastapi.responses import StreamingResponse

    app, router = FastAPI(), APIRouter()

    @app.get("/")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    @router.get("/items/{number}")
    @router.get("/limited/{number}")
    async def item(number: int) -> dict[str, int]:
        return {"number": number}

    @router.get("/status/{code}")
    async def status(code: int) -> None:
        raise HTTPException(code)

    @router.get("/boom")
    async def failing() -> None:
        boom()

    @router.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(parts())

    @router.websocket("/ws")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app.include_router(router)
    app.add_middleware(PolicyStack, policies=policies())
    return app


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket

    async def hello(request: Request) -> JSONResponse:
        return JSONResponse({"hello": "world"})

    async def item(request: Request) -> JSONResponse:
        return JSONResponse({"number": request.path_params["number"]})

    async def status(request: Request) -> None:
        raise HTTPException(request.path_params["code"])

    async def failing(request: Request) -> None:
        boom()

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app = Starlette(
        routes=[
            Route("/", hello),
            Route("/items/{number:int}", item),
            Route("/limited/{number:int}", item),
            Route("/status/{code:int}", status),
            Route("/boom", failing),
            Route("/stream", stream),
            WebSocketRoute("/ws", talk),
        ]
    )
    app.add_middleware(PolicyStack, policies=policies())
    return app


def litestar() -> Any:
    from litestar import Litestar, WebSocket, get, websocket
    from litestar.exceptions import HTTPException, WebSocketDisconnect
    from litestar.params import FromPath
    from litestar.response import Stream

    @get("/")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    @get(["/items/{number:int}", "/limited/{number:int}"])
    async def item(number: FromPath[int]) -> dict[str, int]:
        return {"number": number}

    @get("/status/{code:int}")
    async def status(code: FromPath[int]) -> None:
        raise HTTPException(status_code=code)

    @get("/boom")
    async def failing() -> None:
        boom()

    @get("/stream")
    async def stream() -> Stream:
        return Stream(parts())

    @websocket("/ws")
    async def talk(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text(await socket.receive_text())
        except WebSocketDisconnect:
            pass

    return PolicyStack(Litestar([hello, item, status, failing, stream, talk], openapi_config=None), policies())


def quart() -> Any:
    from quart import Quart, abort
    from quart import websocket as socket

    app = Quart(__name__)

    @app.get("/")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    @app.get("/items/<int:number>")
    @app.get("/limited/<int:number>")
    async def item(number: int) -> dict[str, int]:
        return {"number": number}

    @app.get("/status/<int:code>")
    async def status(code: int) -> None:
        abort(code)

    @app.get("/boom")
    async def failing() -> None:
        boom()

    @app.get("/stream")
    async def stream() -> AsyncIterator[bytes]:
        return parts()

    @app.websocket("/ws")
    async def talk() -> None:
        while True:
            await socket.send(await socket.receive())

    return PolicyStack(app, policies())


def falcon() -> Any:
    import falcon.asgi
    from falcon import HTTPError, WebSocketDisconnected

    class Hello:
        async def on_get(self, req: Any, resp: Any) -> None:
            resp.media = {"hello": "world"}

    class Item:
        async def on_get(self, req: Any, resp: Any, number: int) -> None:
            resp.media = {"number": number}

    class Status:
        async def on_get(self, req: Any, resp: Any, code: int) -> None:
            raise HTTPError(code)

    class Failing:
        async def on_get(self, req: Any, resp: Any) -> None:
            boom()

    class Stream:
        async def on_get(self, req: Any, resp: Any) -> None:
            resp.stream = parts()

    class Talk:
        async def on_websocket(self, req: Any, ws: Any) -> None:
            await ws.accept()
            try:
                while True:
                    await ws.send_text(await ws.receive_text())
            except WebSocketDisconnected:
                pass

    app = falcon.asgi.App()
    resources = {
        "/": Hello(), "/items/{number:int}": Item(), "/limited/{number:int}": Item(), "/status/{code:int}": Status(),
        "/boom": Failing(), "/stream": Stream(), "/ws": Talk(),
    }  # fmt: skip
    for path, resource in resources.items():
        app.add_route(path, resource)
    return PolicyStack(app, policies())


def blacksheep() -> Any:
    from blacksheep import Application, Response, StreamedContent, WebSocket, WebSocketDisconnectError
    from blacksheep.exceptions import HTTPException
    from blacksheep.server.routing import Router

    router = Router()

    @router.get("/")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    async def item(number: int) -> dict[str, int]:
        return {"number": number}

    router.add_get("/items/{int:number}", item)
    router.add_get("/limited/{int:number}", item)

    @router.get("/status/{int:code}")
    async def status(code: int) -> None:
        raise HTTPException(code, "")

    @router.get("/boom")
    async def failing() -> None:
        boom()

    @router.get("/stream")
    async def stream() -> Response:
        return Response(200, content=StreamedContent(b"text/plain", parts))

    @router.ws("/ws")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnectError:
            pass

    return PolicyStack(Application(router=router), policies())


def configured_django() -> Any:
    """Django is configured once in a process: the example does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", SECRET)
        importlib.import_module("examples.django_app")
    from django.core.handlers.asgi import ASGIHandler

    return ASGIHandler()


def django_urls() -> Any:
    from types import ModuleType

    configured_django()
    from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
    from django.urls import path
    from django.views.decorators.http import require_safe

    async def hello(request: Any) -> JsonResponse:
        return JsonResponse({"hello": "world"})

    @require_safe
    async def item(request: Any, number: int) -> JsonResponse:
        return JsonResponse({"number": number})

    async def status(request: Any, code: int) -> HttpResponse:
        # Django has no exceptions for these; this is the way that `sigil_policy.frameworks.foreign` shows.
        reply = reply_to(from_http_error(code, None, None))
        return HttpResponse(reply.body, status=reply.status, headers=dict(text_headers(reply)))

    async def failing(request: Any) -> None:
        boom()

    async def stream(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(parts())

    urls: Any = ModuleType("service_urls")
    urls.urlpatterns = [
        path("", hello),
        path("items/<int:number>", item),
        path("limited/<int:number>", item),
        path("status/<int:code>", status),
        path("boom", failing),
        path("stream", stream),
    ]
    return urls


def django() -> Any:
    return PolicyStack(configured_django(), policies())


def fastmcp() -> Any:
    if os.environ.get("CI") != "true":
        pytest.importorskip("fastmcp", reason="the extra `mcp` is not installed")
    from fastmcp import FastMCP
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, StreamingResponse

    server = FastMCP("items")

    @server.custom_route("/", methods=["GET"])
    async def hello(request: Request) -> JSONResponse:
        return JSONResponse({"hello": "world"})

    @server.custom_route("/items/{number:int}", methods=["GET"])
    @server.custom_route("/limited/{number:int}", methods=["GET"])
    async def item(request: Request) -> JSONResponse:
        return JSONResponse({"number": request.path_params["number"]})

    @server.custom_route("/status/{code:int}", methods=["GET"])
    async def status(request: Request) -> JSONResponse:
        raise HTTPException(request.path_params["code"])

    @server.custom_route("/boom", methods=["GET"])
    async def failing(request: Request) -> None:
        boom()

    @server.custom_route("/stream", methods=["GET"])
    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    return PolicyStack(server.http_app(), policies())


SERVICES = {
    "fastapi": fastapi,
    "starlette": starlette,
    "litestar": litestar,
    "quart": quart,
    "falcon": falcon,
    "blacksheep": blacksheep,
    "django": django,
    "fastmcp": fastmcp,
}

"""What the servers serve; it writes down what happens, a JSON value a line, into the file that `HAPPENED` names."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import Close, Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.body_limit import BodyLimit
from sigil_policy.policies.conditional import Conditional
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes

SECRET = "0123456789abcdef0123456789abcdef"
ISSUER, AUDIENCE = "https://auth.example.com", "items"
GAP = 0.3
LARGEST = 150_000


def happened(*what: Any) -> None:
    with Path(os.environ["HAPPENED"]).open("a") as file:
        file.write(json.dumps(what) + "\n")


class Watched(Policy):
    """Ends `/checked` a moment after it was accepted; hears of `never` and `over`."""

    def on_check(self, ex: Exchange) -> Close | float | None:
        if ex.path != "/checked":
            return None
        asked = (ex.note(self) or 0) + 1
        ex.keep(self, asked)
        return Close(4401, "the credential has ended") if asked > 1 else 0.1

    def on_message(self, ex: Exchange, message: Any) -> Any:
        if message.get("text") == "over":
            return Close(4000, "over")
        return RATE_EXCEEDED("not that often", retry_after=3) if message.get("text") == "never" else None


class Outcomes(Policy):
    def on_finish(self, ex: Exchange) -> None:
        happened("outcome", ex.path, str(ex.outcome), ex.status)


async def hello(request: Request) -> JSONResponse:
    return JSONResponse({"hello": "world"})


async def about(request: Request) -> JSONResponse:
    scope = request.scope
    return JSONResponse({"version": scope.get("http_version"), "raw": (scope.get("raw_path") or b"").decode()})


async def item(request: Request) -> JSONResponse:
    return JSONResponse({"number": request.path_params["number"]})


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def boom(request: Request) -> None:
    raise RuntimeError("correct-horse-battery-staple")


async def stream(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        await anyio.sleep(GAP)
        yield b"two"

    return StreamingResponse(parts())


async def endless(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield b"data: tick\n\n"
            await anyio.sleep(0.02)

    return StreamingResponse(parts(), media_type="text/event-stream")


async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
    happened("startup")
    yield {"shared": "state"}
    happened("shutdown")


application = Starlette(
    routes=[
        Route("/", hello),
        Route("/about/{rest:path}", about),
        Route("/items/{number:int}", item),
        Route("/limited/{number:int}", item),
        Route("/echo", echo, methods=["POST"]),
        Route("/boom", boom),
        Route("/stream", stream),
        Route("/endless", endless),
        WebSocketRoute("/ws", talk),
        WebSocketRoute("/checked", talk),
    ],
    lifespan=lifespan,
)

app = PolicyStack(
    application,
    [
        RequestID(),
        Outcomes(),
        Problems(),
        BearerAuth(
            issuers=[Issuer(url=ISSUER, audience=AUDIENCE, keys=[Key(algorithm="HS256", secret=SecretStr(SECRET))])]
        ),
        Scopes(
            routes={"GET /items/{number}": "items:read", "WEBSOCKET /ws": "chat"},
            public=[
                "GET /",
                "GET /about/**",
                "POST /echo",
                "GET /stream",
                "GET /endless",
                "GET /boom",
                "WEBSOCKET /checked",
                "GET /nowhere",
                "DELETE /",
            ],
        ),
        BodyLimit(limit=LARGEST),
        RateLimit(tiers={"free": "10000/minute"}, limits={"GET /limited/{number}": "2/day"}),
        Conditional(),
        Watched(),
    ],
)

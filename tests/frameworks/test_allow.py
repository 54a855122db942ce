"""RFC 9110 section 15.5.6: a 405 names all methods of the resource, whichever route the router stopped at."""

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio


def endpoint() -> Any:
    async def answer() -> None: ...

    return answer


def api() -> FastAPI:
    app = FastAPI()
    router = APIRouter(prefix="/agents")
    router.add_api_route("", endpoint(), methods=["GET"])
    router.add_api_route("", endpoint(), methods=["POST"])
    router.add_api_route("/search", endpoint(), methods=["POST"])
    router.add_api_route("/{name}", endpoint(), methods=["GET"])
    router.add_api_route("/{name}", endpoint(), methods=["DELETE", "PATCH"])
    app.include_router(router, prefix="/v7")
    return app


async def allowed(app: Any, path: str, method: str = "PUT") -> set[str]:
    sent = await drive(PolicyStack(app, [Problems()]), method, path)
    assert sent.status == 405
    (line,) = sent.header_lines("allow")
    return set(line.split(", "))


@pytest.mark.parametrize("prefix", ["", "/inner"])
@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v7/agents", {"GET", "POST"}),
        ("/v7/agents/x", {"GET", "DELETE", "PATCH"}),
        # GET would be served by the route of another resource.
        ("/v7/agents/search", {"POST"}),
    ],
)
async def test_allow_names_the_methods_of_all_routes(prefix: str, path: str, methods: set[str]) -> None:
    app = api()
    outer = FastAPI(routes=[Mount(prefix, app=app)]) if prefix else app
    assert await allowed(outer, prefix + path) == methods


async def test_an_endpoint_that_raises_405_itself_says_itself_what_it_allows() -> None:
    app = FastAPI()

    @app.get("/busy")
    async def busy() -> None:
        raise HTTPException(405, headers={"allow": "POST"})

    assert await allowed(app, "/busy", "GET") == {"POST"}


async def test_methods_that_the_client_makes_up_are_none() -> None:
    assert await allowed(api(), "/v7/agents", "MAKEUP") == {"GET", "POST"}


async def test_what_the_application_allows_stays() -> None:
    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/x", page, methods=["PROPFIND"]), Route("/x", page)])
    assert await allowed(app, "/x") >= {"PROPFIND", "GET", "HEAD"}

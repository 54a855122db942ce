"""A rule holds for every spelling of a path that the application serves as the route of that rule."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import RateLimit, Tier
from sigil_policy.policies.scopes import Scopes
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio

PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "GET"}


class Known(Policy):
    """Everybody is a caller, with the scopes in `x-scopes`; nobody is for an `x-nobody`."""

    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        if b"x-nobody" not in ex.headers:
            scopes = ex.headers.get(b"x-scopes", b"").decode().split()
            ex.authenticate(Principal(subject="ann", scopes=frozenset(scopes)))


async def served(request: Request) -> PlainTextResponse:
    return PlainTextResponse("served")


def guarded(app: Any, **options: Any) -> PolicyStack:
    return PolicyStack(app, policies=[Known(), Scopes(**options)])


@pytest.mark.parametrize(
    "path", ["/v7/agents\n", "/v7/agents/x/run\n", "/sub/y\n", "/sub/y/\n", "//v7/agents\n", "/v7//agents/"]
)
async def test_a_line_feed_at_the_end_dodges_no_rule(path: str) -> None:
    """Starlette's `^/v7/agents$` matches `/v7/agents%0A`: Python's `$` stands before a last line feed, too."""
    app = Starlette(
        routes=[
            Route("/v7/agents", served),
            Route("/v7/agents/{name}/run", served),
            Mount("/sub", Starlette(routes=[Route("/y", served), Route("/y/", served)])),
        ]
    )
    stack = guarded(app, routes={"GET /v7/agents": "a", "GET /v7/agents/{name}/run": "a", "GET /sub/y": "a"})
    assert (await drive(stack, path=path)).status == 403
    assert (await drive(stack, path=path, headers={"x-scopes": "a"})).status in (200, 404)


async def test_a_line_feed_at_the_end_dodges_no_cost() -> None:
    limit = RateLimit(tiers={"free": Tier(requests="10/minute")}, costs={"GET /dear": 10})
    stack = PolicyStack(Starlette(routes=[Route("/dear", served)]), policies=[limit], clock=FrozenClock())
    assert [(await drive(stack, path="/dear\n")).status for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(
    "path",
    ["/admin/./secret.txt", "/admin/x/../secret.txt", "/open/../admin/secret.txt", "/open/..\n", "../open", "/open/."],
)
async def test_dot_segments_lead_around_no_rule(path: str, tmp_path: Path) -> None:
    """StaticFiles, for one, serves `/admin/./secret.txt` as `/admin/secret.txt`."""
    (tmp_path / "secret.txt").write_text("secret")
    app = Starlette(routes=[Mount("/admin", StaticFiles(directory=tmp_path))])
    stack = guarded(app, routes={"/admin/**": "admin:read"}, public=["/open/**"])
    refused = await drive(stack, path=path, headers={"x-scopes": "other"})
    assert (refused.status, refused.json()["error_code"]) == (400, "REQ_400")
    assert (await drive(stack, path=path, headers={"x-nobody": "1"})).status == 401
    # The superscope opens everything anyway, however it is spelled.
    assert (await drive(stack, path=path, headers={"x-scopes": "admin"})).status in (200, 404)


async def test_a_name_that_begins_with_dots_is_no_dot_segment() -> None:
    app = Starlette(routes=[Route("/files/{name}", served)])
    for name in (".hidden", "..x", "...", "a..", "a.b"):
        assert (await drive(guarded(app), path=f"/files/{name}")).status == 200


async def test_what_looks_like_a_preflight_opens_no_route_that_names_options() -> None:
    """Anybody can send `Origin` and `Access-Control-Request-Method`."""
    app = Starlette(routes=[Route("/{path:path}", served, methods=["GET", "OPTIONS"])])
    shared = "jobs:read"
    stack = guarded(app, routes={"OPTIONS /v7/jobs": shared, "/v7/**": shared}, public=["OPTIONS /v7/open"])
    nobody = {**PREFLIGHT, "x-nobody": "1"}
    assert (await drive(stack, "OPTIONS", "/v7/jobs", headers=nobody)).status == 401
    assert (await drive(stack, "OPTIONS", "/v7/jobs", headers={**PREFLIGHT, "x-scopes": "other"})).status == 403
    # Rules for any method leave preflights alone (AU-18), and so does a public one.
    assert (await drive(stack, "OPTIONS", "/v7/other", headers=nobody)).status == 200
    assert (await drive(stack, "OPTIONS", "/v7/open", headers=nobody)).status == 200


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
async def test_a_root_path_that_the_application_sets_itself_dodges_no_rule() -> None:
    """`FastAPI(root_path=...)` takes its prefix off the path, after a stack around it has looked at it."""
    app = FastAPI(root_path="/api")
    app.add_api_route("/v7/agents", lambda: "served")
    stack = guarded(app, routes={"GET /v7/agents": "a"})
    assert (await drive(stack, path="/v7/agents")).status == 403
    assert (await drive(stack, path="/api/v7/agents")).status == 403

"""What endpoints take as parameters: read from the stack, never verified twice, never open."""

import logging
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI, Security, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal, TokenUsage
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks import fastapi as parameters
from sigil_policy.frameworks.fastapi import (
    ApiKey,
    BearerToken,
    Budget,
    CurrentPrincipal,
    OptionalPrincipal,
    PolicyMissingError,
    current_principal,
    require_scopes,
)
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit, Tier
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio


class Caller(Policy):
    """Authenticates by a header: the scopes; `asked` is told how often."""

    gives = (Principal,)
    asked: Any = None

    def on_request(self, ex: Exchange) -> None:
        scopes = ex.headers.get(b"x-scopes")
        if scopes is not None:
            if self.asked is not None:
                self.asked.append(scopes.decode())
            kind = "api_key" if b"x-api-key" in ex.headers else "bearer"
            ex.authenticate(Principal("ada", scopes=frozenset(scopes.decode().split()), kind=kind))


def service() -> FastAPI:
    app = FastAPI()

    @app.get("/me")
    async def me(caller: CurrentPrincipal) -> str:
        return caller.subject

    @app.get("/maybe")
    async def maybe(caller: OptionalPrincipal) -> str:
        return "nobody" if caller is None else caller.subject

    @app.get("/read", dependencies=[require_scopes("agents:read", "agents:list")])
    async def read() -> str:
        return "read"

    @app.get("/written")
    async def written(caller: Annotated[Principal, require_scopes("agents:write")]) -> str:
        return caller.subject

    @app.get("/how")
    async def how(
        token: Annotated[Principal | None, Security(BearerToken())],
        key: Annotated[Principal | None, Security(ApiKey())],
    ) -> list[bool]:
        return [token is not None, key is not None]

    @app.get("/id")
    async def id_(request_id: parameters.RequestID) -> str:
        return request_id

    @app.get("/budget")
    async def budget(quota: Budget) -> list[str]:
        return [quota.tier, *(window.name for window in quota.requests)]

    @app.post("/spend")
    async def spend(usage: parameters.TokenUsage) -> list[int]:
        before = usage.so_far.total_tokens
        usage.report(input_tokens=2)
        return [before, usage.report(output_tokens=3).total_tokens, usage.so_far.input_tokens]

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, caller: Annotated[Principal, require_scopes("agents:read")]) -> None:
        await websocket.accept()
        await websocket.send_text(caller.subject)
        await websocket.close()

    return app


def mounted(*policies: Policy, app: FastAPI | None = None) -> FastAPI:
    app = service() if app is None else app
    app.add_middleware(PolicyStack, policies=[RequestID(), Problems(), *policies], clock=FrozenClock())
    return app


async def ask(app: Any, path: str, scopes: str | None = None, method: str = "GET", **headers: str) -> Any:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await drive(app, method, path, headers=given if scopes is None else {**given, "x-scopes": scopes})


@pytest.mark.parametrize(
    ("path", "scopes", "status"),
    [
        ("/me", None, 401),
        ("/me", "", 200),
        ("/maybe", None, 200),
        ("/read", None, 401),
        ("/read", "agents:read", 403),
        ("/read", "agents:read agents:list", 200),
        ("/written", "agents:read", 403),
        ("/written", "agents:write", 200),
    ],
)
async def test_a_caller_is_let_in_by_scopes_also_where_no_policy_asks_for_them(
    path: str, scopes: str | None, status: int
) -> None:
    assert (await ask(mounted(Caller()), path, scopes)).status == status


async def test_refusals_are_the_problems_of_the_catalogue() -> None:
    app = mounted(Caller())
    nobody, lacking = await ask(app, "/read"), await ask(app, "/read", "agents:list")
    assert nobody.json()["error_code"] == "AUTH_001"
    assert nobody.header("www-authenticate") == 'Bearer realm="api"'
    body = lacking.json()
    assert (body["error_code"], body["missing_scopes"]) == ("AUTH_004", ["agents:read"])
    assert body["required_scopes"] == ["agents:read", "agents:list"]
    assert 'error="insufficient_scope"' in (lacking.header("www-authenticate") or "")
    assert 'scope="agents:read agents:list"' in (lacking.header("www-authenticate") or "")


async def test_without_problems_refusals_are_answered_by_the_framework() -> None:
    app = service()
    app.add_middleware(PolicyStack, policies=[Caller()])
    nobody, lacking = await ask(app, "/read"), await ask(app, "/read", "")
    assert (nobody.status, lacking.status) == (401, 403)
    assert nobody.header("www-authenticate") == 'Bearer realm="api"'
    assert nobody.json() == {"detail": "This route takes an authenticated caller"}


async def test_nothing_is_verified_twice() -> None:
    asked: list[str] = []
    assert (await ask(mounted(Caller(asked=asked)), "/written", "agents:write")).status == 200
    assert asked == ["agents:write"]


async def test_the_superscope_opens_what_it_opens_for_the_policy() -> None:
    assert (await ask(mounted(Caller(), Scopes()), "/written", "admin")).status == 200
    assert (await ask(mounted(Caller(), Scopes(superscope=None)), "/written", "admin")).status == 403


async def test_scopes_of_an_endpoint_are_asked_before_its_body_is_read() -> None:
    app = FastAPI()

    @app.post("/write", dependencies=[require_scopes("agents:write")])
    async def write(body: dict[str, int]) -> None: ...

    for policies, status in (((), 400), ((Scopes(),), 403)):
        made = FastAPI()
        made.include_router(app.router)
        sent = await drive(
            mounted(Caller(), *policies, app=made),
            "POST",
            "/write",
            headers={"x-scopes": "", "content-type": "application/json"},
            body=b"no json",
        )
        assert sent.status == status


async def test_scopes_of_a_router_hold_for_its_endpoints() -> None:
    app = FastAPI()
    router = APIRouter(dependencies=[Security(current_principal, scopes=["admin:all"])])

    @router.get("/list")
    async def list_() -> None: ...

    app.include_router(router, prefix="/admin")
    app = mounted(Caller(), app=app)
    assert [(await ask(app, "/admin/list", scopes)).status for scopes in (None, "a", "admin:all")] == [401, 403, 200]


async def test_the_schemes_say_how_a_caller_has_come() -> None:
    app = mounted(Caller())
    assert (await ask(app, "/how")).json() == [False, False]
    assert (await ask(app, "/how", "a")).json() == [True, False]
    assert (await ask(app, "/how", "a", x_api_key="k")).json() == [False, True]


async def test_the_id_is_that_of_the_response() -> None:
    sent = await ask(mounted(), "/id")
    assert sent.json() == sent.header("x-request-id")


async def test_the_budget_is_what_the_policy_counts_and_empty_where_it_counts_nothing() -> None:
    app = mounted(RateLimit(tiers={"free": "10/minute"}))
    assert (await ask(app, "/budget")).json() == ["free", "minute"]
    app = mounted(RateLimit(tiers={"free": "10/minute"}, exempt=["/budget"]))
    assert (await ask(app, "/budget")).json() == [""]


async def test_what_is_reported_is_known_to_the_stack() -> None:
    known: list[Any] = []

    class Watch(Policy):
        def on_finish(self, ex: Exchange) -> None:
            known.append(ex.get(TokenUsage))

    tier = Tier(requests="10/minute", tokens=100)
    sent = await ask(mounted(Watch(), RateLimit(tiers={"free": tier}, tokens={"/spend": 5})), "/spend", method="POST")
    assert sent.json() == [0, 5, 2]
    assert known == [TokenUsage(2, 3, 5)]
    assert sent.header("x-tokens-used") == "5"


@pytest.mark.parametrize("path", ["/me", "/maybe", "/read", "/how", "/id", "/budget"])
def test_without_a_stack_they_fail_loudly(path: str, caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(service(), raise_server_exceptions=False)
    with caplog.at_level(logging.ERROR, logger="sigil_policy"):
        assert client.get(path, headers={"x-scopes": "agents:read agents:list"}).status_code == 500
    assert "PolicyStack" in caplog.text
    with pytest.raises(PolicyMissingError, match="mount"):
        TestClient(service()).get(path)


@pytest.mark.parametrize(
    ("path", "policy"), [("/me", "BearerAuth"), ("/maybe", "BearerAuth"), ("/budget", "RateLimit")]
)
def test_without_the_policy_they_read_from_they_fail_loudly(path: str, policy: str) -> None:
    app = service()
    app.add_middleware(PolicyStack, policies=[Problems()])
    with pytest.raises(PolicyMissingError, match=policy):
        TestClient(app).get(path)
    assert TestClient(app, raise_server_exceptions=False).get(path).status_code == 500


def test_a_websocket_is_refused_with_a_close_code() -> None:
    client = TestClient(mounted(Caller()))
    for headers in ({}, {"x-scopes": "b"}):
        with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/ws", headers=headers):
            pass
        assert closed.value.code == 1008
    with client.websocket_connect("/ws", headers={"x-scopes": "agents:read"}) as socket:
        assert socket.receive_text() == "ada"


@pytest.mark.parametrize("scopes", [(), ("a b",), ("",), ('a"',), (["a"],)])
def test_scopes_that_cannot_be_are_refused_where_they_are_written(scopes: Any) -> None:
    with pytest.raises(ValueError, match="scope"):
        require_scopes(*scopes)

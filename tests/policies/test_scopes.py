"""Scopes: what is public, what takes a caller, what takes which scopes."""

import json

import pytest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal, Public
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.scopes import AllOf, AnyOf, Scopes
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, good_claims, make_issuer, token

pytestmark = pytest.mark.anyio

ROUTES = {
    "GET /v7/agents": "agents:read",
    "POST /v7/agents": ["agents:read", "agents:write"],
    "POST /v7/agents/{name}/run": AllOf("agents:read", "agents:execute"),
    "/v7/memory/**": AnyOf("memory:read", "memory:write"),
    "/v7/**": "api",
    "GET /v7/me": [],
    "WEBSOCKET /v7/stream": "stream",
}
PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


class As(Policy):
    """Whoever sends `x-scopes` is a caller with them."""

    gives = (Principal,)

    def on_request(self, ex):
        scopes = ex.headers.get(b"x-scopes")
        if scopes is None:
            ex.anonymous()
        else:
            ex.authenticate(Principal(subject="ann", scopes=frozenset(scopes.decode().split()), realm="agents"))


async def answer(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    public = get_exchange(scope).get(Public)
    body = json.dumps({"public": public and public.rule, "everything": "whatever" in scope["auth"].scopes}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def make_app(*, app=answer, outer=(), **options):
    options = {"routes": ROUTES, "public": ["GET /health", "/v7/public/**"], **options}
    return PolicyStack(app, policies=[*outer, As(), Scopes(**options)], clock=FrozenClock(NOW))


async def ask(method, path, scopes=None, app=None, **options):
    headers = {**options.pop("headers", {}), **({} if scopes is None else {"x-scopes": scopes})}
    return await drive(app or make_app(), method, path, headers=headers, **options)


@pytest.mark.parametrize(
    ("method", "path", "scopes", "status"),
    [
        pytest.param("GET", "/v7/agents", "agents:read", 200, id="one scope"),
        pytest.param("GET", "/v7/agents", "z agents:read a", 200, id="AU-09 among others"),
        pytest.param("HEAD", "/v7/agents", "agents:read", 200, id="a GET rule covers HEAD"),
        pytest.param("HEAD", "/v7/agents", "api", 403, id="a GET rule binds HEAD"),
        pytest.param("GET", "/v7/agents", "agents:readonly", 403, id="AU-09 no prefix match"),
        pytest.param("GET", "/v7/agents", "agents", 403, id="AU-09 no prefix of the scope"),
        pytest.param("GET", "/v7/agents", "Agents:Read", 403, id="AU-09 case matters"),
        pytest.param("GET", "/v7/agents", "", 403, id="no scopes"),
        pytest.param("POST", "/v7/agents", "agents:write agents:read", 200, id="all of a list, in any order"),
        pytest.param("POST", "/v7/agents", "agents:write", 403, id="one of a list is missing"),
        pytest.param("POST", "/v7/agents/x/run", "agents:execute agents:read", 200, id="AllOf"),
        pytest.param("POST", "/v7/agents/x/run", "agents:execute", 403, id="AllOf, one missing"),
        pytest.param("GET", "/v7/memory/a/b", "memory:write", 200, id="AnyOf"),
        pytest.param("GET", "/v7/memory/a/b", "api", 403, id="AnyOf, none"),
        pytest.param("DELETE", "/v7/agents", "api", 200, id="the wider rule"),
        pytest.param("DELETE", "/v7/agents", "agents:read", 403, id="the wider rule binds"),
        pytest.param("GET", "/v7/me", "", 200, id="an empty list takes a caller and no scope"),
        pytest.param("GET", "/v7/me", None, 401, id="an empty list takes a caller"),
        pytest.param("GET", "/elsewhere", "", 200, id="no rule: a caller, no scope"),
        pytest.param("GET", "/elsewhere", None, 401, id="no rule: a caller"),
        pytest.param("GET", "/health", None, 200, id="public"),
        pytest.param("HEAD", "/health", None, 200, id="public, HEAD"),
        pytest.param("POST", "/health", None, 401, id="public for GET only"),
        pytest.param("GET", "/health/", None, 200, id="public with a slash, as rules are"),
        pytest.param("GET", "/healthy", None, 401, id="not public: another segment"),
        pytest.param("DELETE", "/v7/public/a", None, 200, id="public below"),
        pytest.param("GET", "/v7/public/../agents", None, 401, id="no way out of what is public"),
        pytest.param("GET", "/v7//agents/", "api", 403, id="slashes do not dodge a rule"),
        pytest.param("GET", "/v7/agents", None, 401, id="nobody"),
        pytest.param("GET", "/v7/agents", "admin", 200, id="the superscope"),
        pytest.param("GET", "/v7/agents", "administrator", 403, id="no prefix of the superscope"),
    ],
)
async def test_who_may_pass(method, path, scopes, status):
    assert (await ask(method, path, scopes)).status == status


async def test_nobody_is_asked_for_credentials_without_blame():
    """AU-02, AU-03: RFC 6750 section 3.1."""
    sent = await ask("GET", "/v7/agents")
    assert sent.header_lines("www-authenticate") == ['Bearer realm="api"']
    assert sent.json()["error_code"] == "AUTH_001"
    assert sent.header("cache-control") == "no-store", "AU-17"


async def test_nobody_gets_the_challenges_that_were_offered():
    """AU-13."""
    tokens = BearerAuth(issuers=[make_issuer()], realm="agents")
    app = PolicyStack(answer, policies=[tokens, Scopes()], clock=FrozenClock(NOW))
    sent = await drive(app)
    assert (sent.status, sent.header_lines("www-authenticate")) == (401, ['Bearer realm="agents"'])


@pytest.mark.parametrize(
    ("method", "path", "required", "missing"),
    [
        ("GET", "/v7/agents", ["agents:read"], ["agents:read"]),
        ("POST", "/v7/agents", ["agents:read", "agents:write"], ["agents:read"]),
        ("GET", "/v7/memory/x", ["memory:read", "memory:write"], ["memory:read", "memory:write"]),
    ],
    ids=["one", "all of", "any of"],
)
async def test_somebody_learns_which_scopes_are_missing(method, path, required, missing):
    """AU-06."""
    sent = await ask(method, path, "agents:write")
    assert sent.status == 403
    scope = " ".join(required)
    assert sent.header("www-authenticate") == f'Bearer realm="agents", error="insufficient_scope", scope="{scope}"'
    body = sent.json()
    assert (body["error_code"], body["required_scopes"], body["missing_scopes"]) == ("AUTH_004", required, missing)
    assert sent.header("cache-control") == "no-store", "AU-17"


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("OPTIONS", PREFLIGHT, 200),
        ("OPTIONS", {}, 401),
        ("OPTIONS", {"origin": "https://app.example"}, 401),
        ("OPTIONS", {"access-control-request-method": "POST"}, 401),
        ("POST", PREFLIGHT, 401),
        ("GET", PREFLIGHT, 401),
    ],
)
async def test_preflights_and_nothing_else_pass(method, headers, status):
    """AU-18: Fetch, CORS preflight."""
    assert (await ask(method, "/v7/agents", headers=headers)).status == status


async def test_public_is_a_fact():
    assert (await ask("GET", "/health")).json()["public"] == "GET /health"
    assert (await ask("GET", "/health", "agents:read")).json()["public"] == "GET /health"
    assert (await ask("GET", "/health", "admin")).json() == {"public": "GET /health", "everything": True}
    assert (await ask("GET", "/v7/me", "")).json()["public"] is None


async def test_the_superscope_can_be_another_or_none():
    app = make_app(superscope="root")
    assert [(await ask("GET", "/v7/agents", s, app)).status for s in ("root", "admin")] == [200, 403]
    assert (await ask("GET", "/v7/agents", "admin", make_app(superscope=None))).status == 403


async def test_the_superscope_counts_for_starlettes_requires_too():
    @requires("agents:delete")
    async def delete(request):
        return PlainTextResponse("deleted")

    app = Starlette(
        routes=[Route("/agents", delete)],
        middleware=[
            Middleware(PolicyStack, policies=[BearerAuth(issuers=[make_issuer()]), Scopes()], clock=FrozenClock(NOW))
        ],
    )
    for scope, status in (("admin", 200), ("agents:delete", 200), ("agents:read", 403)):
        headers = {"authorization": b"Bearer " + token(good_claims(scope=scope))}
        assert (await drive(app, path="/agents", headers=headers)).status == status


async def test_a_websocket_has_its_own_rule():
    assert (await ask("GET", "/v7/stream", "stream", kind="websocket")).messages[0]["type"] == "websocket.accept"
    denied = await ask("GET", "/v7/stream", "api", kind="websocket")
    assert denied.status == 403 and denied.start["type"] == "websocket.http.response.start"
    closed = await ask("GET", "/v7/stream", kind="websocket", scope={"extensions": {}})
    assert closed.messages[0]["type"] == "websocket.close" and closed.messages[0]["code"] == 1008


async def test_head_is_refused_without_a_body():
    sent = await ask("HEAD", "/v7/agents")
    assert sent.status == 401 and sent.body == b""


async def test_streams_and_errors_of_the_application_pass_untouched():
    async def stream(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise RuntimeError("broken")

    sent = await ask("GET", "/health", app=make_app(app=stream), raise_errors=False)
    assert sent.body == b"a" and isinstance(sent.error, RuntimeError)


async def test_two_in_one_stack_both_hold():
    app = PolicyStack(answer, policies=[As(), Scopes(routes={"/a": "x"}), Scopes(routes={"/a": "y"})])
    assert [(await ask("GET", "/a", s, app)).status for s in ("x y", "x", "y")] == [200, 403, 403]


def test_without_an_auth_policy_outside_the_order_is_wrong():
    with pytest.raises(PolicyOrderError, match="Scopes"):
        PolicyStack(answer, policies=[Scopes(), BearerAuth(issuers=[make_issuer()])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"routes": {"GET /a": ["a b"]}}, "6749", id="a space inside a scope"),
        pytest.param({"routes": {"GET /a": 'a"b'}}, "6749", id="AU-08 a quote"),
        pytest.param({"routes": {"GET /a": ["a\\b"]}}, "6749", id="AU-08 a backslash"),
        pytest.param({"routes": {"GET /a": ["é"]}}, "6749", id="AU-08 beyond ASCII"),
        pytest.param({"routes": {"GET /a": [5]}}, "6749", id="a number"),
        pytest.param({"routes": {"GET /a": ""}}, "any caller", id="an empty text"),
        pytest.param({"routes": {"GET /a": " "}}, "any caller", id="a blank text"),
        pytest.param({"routes": {"GET /a": 5}}, "any caller", id="no scopes at all"),
        pytest.param({"routes": {"GET /a": {"all_of": "a"}}}, "any caller", id="a mapping"),
        pytest.param({"routes": {"get /a": "a"}}, "METHOD", id="no route"),
        pytest.param({"routes": {"GET /a/*/b": "a"}}, "last segment", id="a star inside"),
        pytest.param({"public": ["health"]}, "METHOD", id="no public route"),
        pytest.param({"public": "GET /health"}, "public", id="public as text"),
        pytest.param({"routes": {"GET /a": "a"}, "public": ["GET /a"]}, "keep one", id="public and not"),
        pytest.param(
            {"routes": {"GET /a/{x}": "a"}, "public": ["GET /a/{y}/"]}, "keep one", id="the same, spelt otherwise"
        ),
        pytest.param({"superscope": "a b"}, "6749", id="superscope with a space"),
        pytest.param({"rules": {}}, "rules", id="unknown option"),
    ],
)
def test_a_wrong_configuration_fails_at_construction(options, message):
    with pytest.raises(ValidationError, match=message):
        Scopes(**options)


def test_any_of_nothing_lets_nobody_pass_and_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        AnyOf()


def test_equal_requirements_are_equal():
    assert AllOf("a", "b") == AllOf("b", "a") != AnyOf("a", "b")
    assert len({AllOf("a"), AllOf("a", "a"), AnyOf("a")}) == 2
    assert repr(AnyOf("a", "b")) == "AnyOf('a', 'b')"
    assert Scopes(routes={"/a": "x y"}) == Scopes(routes={"/a": AllOf("y", "x")})

"""CacheControl: RFC 9111, RFC 9110 section 12.5.5. Rows CA-01 to CA-11 and CR-27 as named, ST-16."""

import pytest

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.cache_control import CacheControl, CacheRule
from sigil_policy.policies.conditional import Conditional
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio

GUIDELINES = {
    "GET /v7/agents": "private, max-age=60",
    "GET /v7/agents/{name}": "private, max-age=300",
    "GET /v7/agents/{name}/status": "private, max-age=10",
    "POST /v7/memory/search": "private, max-age=30",
    "GET /health": "no-cache",
}


class Known(Policy):
    """Everybody is somebody, as after an authenticating policy."""

    kind: str = "bearer"

    def on_request(self, ex: Exchange) -> None:
        ex.authenticate(Principal("alice", kind=self.kind))


class Refuse(Policy):
    def on_request(self, ex: Exchange) -> Problem:
        return RATE_EXCEEDED("Too many requests.")


def answering(*headers, status=200):
    async def app(scope, receive, send):
        pairs = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": b"" if status in (204, 304) else b"{}"})

    return app


def stack(app, *policies):
    return PolicyStack(app, policies=policies or [CacheControl()], clock=FrozenClock())


async def says(app, *policies, method="GET", path="/v7/agents", headers=()):
    sent = await drive(stack(app, *policies), method, path, headers=headers)
    return sent.header("cache-control"), sent.header("vary")


# --- rules by route --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "value"),
    [
        ("GET", "/v7/agents", "private, max-age=60"),
        ("HEAD", "/v7/agents", "private, max-age=60"),
        ("GET", "/v7/agents/x", "private, max-age=300"),
        ("GET", "/v7/agents/x/status", "private, max-age=10"),
        ("POST", "/v7/memory/search", "private, max-age=30"),
        ("GET", "/health", "no-cache"),
        ("POST", "/v7/agents", None),
        ("GET", "/v7/other", None),
    ],
)
async def test_the_table_of_the_guidelines(method, path, value):
    """CA-01, D-16: written as asked; anonymous successes without a rule get nothing."""
    assert await says(answering(), CacheControl(routes=GUIDELINES), method=method, path=path) == (value, None)


@pytest.mark.parametrize("status", [200, 201, 204, 206, 304])
async def test_rules_are_for_successes_and_304(status):
    """CR-27: a 304 says what the 200 would."""
    policy = CacheControl(routes={"/v7/agents": CacheRule("private, max-age=60", vary=("Accept",))})
    assert await says(answering(status=status), policy) == ("private, max-age=60", "Accept")


async def test_a_304_of_conditional_inside_says_the_same_as_the_200():
    """CR-27, CA-11, D-15"""
    policies = [Known(kind="api_key"), CacheControl(routes=GUIDELINES), Conditional()]
    full = await drive(stack(answering(), *policies), path="/v7/agents")
    again = await drive(
        stack(answering(), *policies), path="/v7/agents", headers={"if-none-match": full.header("etag")}
    )
    assert (full.status, again.status) == (200, 304)
    for name in ("cache-control", "vary", "etag"):
        assert again.header(name) == full.header(name) is not None


@pytest.mark.parametrize("status", [200, 302, 304, 404, 500])
async def test_the_applications_own_word_wins(status):
    """CA-08"""
    app = answering(("Cache-Control", "public, max-age=9"), status=status)
    assert (await says(app, Known(), CacheControl(routes=GUIDELINES)))[0] == "public, max-age=9"


# --- who asks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 204, 301, 304, 308])
async def test_what_is_for_an_authenticated_caller_is_private(status):
    """CA-04"""
    assert await says(answering(status=status), Known(), CacheControl()) == ("private", None)


async def test_what_was_asked_with_an_api_key_also_varies_by_it():
    """CA-05: shared caches do not know that X-API-Key is personal."""
    assert await says(answering(), Known(kind="api_key"), CacheControl()) == ("private", "X-API-Key")
    assert await says(answering(), CacheControl(), headers={"X-API-Key": "k"}) == ("private", "X-API-Key")


async def test_the_header_of_the_key_can_be_another():
    policy = CacheControl(api_key_header="Sigil-Key")
    assert await says(answering(), policy, headers={"sigil-key": "k"}) == ("private", "Sigil-Key")
    assert await says(answering(), policy, headers={"x-api-key": "k"}) == (None, None)


async def test_a_credential_that_only_the_application_reads_counts_too():
    """CA-04: it came with `Authorization`."""
    rule = CacheControl(routes={"/v7/agents": "public, max-age=60"})
    assert await says(answering(), rule, headers={"authorization": "Basic x"}) == ("private, max-age=60", None)


@pytest.mark.parametrize(
    ("value", "personal"),
    [
        ("public, max-age=60", "private, max-age=60"),
        ("max-age=60, s-maxage=600", "private, max-age=60"),
        ("max-age=60", "private, max-age=60"),
        ("no-store", "no-store"),
        ("no-cache", "no-cache"),
    ],
)
async def test_a_shared_rule_becomes_private_for_an_authenticated_caller(value, personal):
    """CA-04"""
    policy = CacheControl(routes={"/v7/agents": value})
    assert (await says(answering(), policy))[0] == value
    assert (await says(answering(), Known(), policy))[0] == personal


async def test_sharing_with_everybody_has_to_be_said():
    """CA-04: an explicit opt-in, and the key is still in Vary (CA-05)."""
    policy = CacheControl(routes={"/v7/agents": CacheRule("public, max-age=60", dangerously_share_authenticated=True)})
    assert await says(answering(), Known(), policy) == ("public, max-age=60", None)
    assert await says(answering(), Known(kind="api_key"), policy) == ("public, max-age=60", "X-API-Key")


async def test_the_defaults_can_be_changed():
    """CA-07"""
    policy = CacheControl(authenticated="no-store", errors="no-cache")
    assert (await says(answering(), Known(), policy))[0] == "no-store"
    assert (await says(answering(status=404), policy))[0] == "no-cache"
    silent = CacheControl(authenticated=None, errors=None)
    assert await says(answering(), Known(), silent) == (None, None)
    assert await says(answering(status=404), silent) == (None, None)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 405, 410, 414, 500, 501])
async def test_errors_of_the_application_are_not_stored(status):
    """CA-07"""
    policy = CacheControl(routes={"/v7/agents": "public, max-age=60"})
    assert (await says(answering(status=status), policy))[0] == "no-store"
    assert (await says(answering(status=status), Known(), policy))[0] == "no-store"


async def test_refusals_are_not_stored():
    for policies in ([CacheControl(), Refuse()], [Refuse(), CacheControl()]):
        assert (await says(answering(), *policies))[0] == "no-store"


async def test_an_error_of_the_application_passes():
    async def app(scope, receive, send):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await drive(stack(app))


# --- Vary ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "rule", "merged"),
    [
        ([], ("Accept",), ["Accept"]),
        ([], ("Accept", "accept", "Origin"), ["Accept, Origin"]),
        (["Accept"], ("Origin",), ["Accept, Origin"]),
        (["accept"], ("Accept",), ["accept"]),
        (["Accept", "Origin"], ("X-API-Key",), ["Accept, Origin, X-API-Key"]),
        (["*"], ("Accept",), ["*"]),
        (["Accept"], ("*",), ["*"]),
        (["Accept", "Accept-Encoding"], (), ["Accept", "Accept-Encoding"]),
    ],
)
async def test_vary_is_merged(own, rule, merged):
    """CA-09, CA-11"""
    policy = CacheControl(routes={"/v7/agents": CacheRule("max-age=1", vary=rule)})
    sent = await drive(stack(answering(*(("Vary", value) for value in own)), policy), path="/v7/agents")
    assert sent.header_lines("vary") == merged


async def test_authorization_needs_no_vary():
    """CA-10"""
    assert (await says(answering(), Known(), CacheControl()))[1] is None


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_two_in_one_stack_say_it_once():
    """ST-16: the inner one speaks first."""
    inner = CacheControl(routes={"/v7/agents": CacheRule("private, max-age=1", vary=("Accept",))})
    outer = CacheControl(routes={"/v7/agents": CacheRule("private, max-age=2", vary=("accept", "Origin"))})
    assert await says(answering(), Known(kind="api_key"), outer, inner) == (
        "private, max-age=1",
        "Accept, X-API-Key, Origin",
    )


async def test_a_stream_is_decorated_and_not_delayed():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    sent = await drive(stack(app, CacheControl(routes=GUIDELINES)), path="/v7/agents")
    assert sent.header("cache-control") == "private, max-age=60"
    assert [m.get("body") for m in sent.messages] == [None, b"a", b"b", b""]


async def test_a_websocket_is_not_cached():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        await send({"type": "websocket.close"})

    sent = await drive(stack(app, Known(kind="api_key"), CacheControl(routes={"/**": "private"})), kind="websocket")
    assert sent.headers == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": {"GET /a": "max-age=1.5"}}, "whole number of seconds"),
        ({"routes": {"GET /a": "max-age=-1"}}, "not negative"),
        ({"routes": {"GET /a": 'max-age="60"'}}, "not quoted"),
        ({"routes": {"GET /a": "privat"}}, "not a response directive"),
        ({"routes": {"GET /a": 60}}, "routes"),
        ({"routes": {"GET a": "private"}}, "must be 'METHOD /path'"),
        ({"routes": {"GET /a": {"value": "public, private"}}}, "contradicts itself"),
        ({"routes": {"GET /a": {"value": "private", "vary": ["a b"]}}}, "not a header name"),
        ({"routes": {"GET /a": {"value": "private", "vry": ["a"]}}}, "vry"),
        ({"authenticated": "public"}, "dangerously_share_authenticated"),
        ({"authenticated": "max-age=60"}, "dangerously_share_authenticated"),
        ({"errors": "never"}, "not a response directive"),
        ({"api_key_header": ""}, "api_key_header"),
        ({"api_key_header": "a:b"}, "not a header name"),
        ({"route": {}}, "route"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    """CA-01, CA-02, CA-03"""
    with pytest.raises(ValueError, match=message):
        CacheControl(**options)


def test_rules_can_be_data():
    policy = CacheControl(routes={"GET /a": {"value": "public, max-age=1", "vary": ["Accept"]}})
    assert policy.routes["GET /a"] == CacheRule("public, max-age=1", vary=("Accept",))

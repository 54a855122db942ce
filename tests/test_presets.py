"""The presets as they come: what is refused, what is counted, what is said."""

import json

import pytest

from sigil_policy.core.exchange import report_tokens
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.rate_limit import Level, Tier
from sigil_policy.presets import Tool, mcp_server
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, good_claims, make_issuer, token

pytestmark = pytest.mark.anyio

RESOURCE = "https://api.example.com/mcp"
TIERS = {"free": "100/minute"}
METADATA = 'resource_metadata="https://api.example.com/.well-known/oauth-protected-resource/mcp"'


async def server(scope, receive, send):
    """Executes the body; a tool named `model` spends 30 tokens."""
    body = (await receive()).get("body") or b"{}"
    if json.loads(body).get("params", {}).get("name") == "model":
        report_tokens(scope, total_tokens=30)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def make_app(**options):
    settings = {
        "resource": RESOURCE,
        "issuers": [make_issuer(audience=RESOURCE)],
        "tools": {"search": "documents:read"},
        "limits": {"tiers": TIERS, "default_tier": "free"},
        **options,
    }
    return PolicyStack(server, policies=mcp_server(**settings), clock=FrozenClock(NOW))


async def call(app, tool="search", *, scope="documents:read", path="/mcp", subject="ann", headers=(), **claims):
    credential = token(good_claims(**{"aud": RESOURCE, "scope": scope, "sub": subject, "tier": "free", **claims}))
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool}}).encode()
    pairs = {"authorization": b"Bearer " + credential, **dict(headers)}
    return await drive(app, "POST", path, headers=pairs, body=body)


async def test_who_has_the_scope_calls_the_tool():
    app = make_app()
    sent = await call(app)
    assert (sent.status, sent.json()["params"]) == (200, {"name": "search"})
    assert sent.header("x-request-id")
    assert sent.header("x-ratelimit-remaining") == "99"
    refused = await call(app, scope="other")
    assert (refused.status, refused.header("www-authenticate").endswith(METADATA)) == (403, True)


async def test_tokens_for_others_are_refused():
    """RFC 8707: what was issued for another server does not open this one."""
    for audience in ("https://api.example.com", "https://api.example.com/mcp/", "sigil-api", None):
        sent = await call(make_app(), aud=audience)
        assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_002")
        assert METADATA in sent.header("www-authenticate")


@pytest.mark.parametrize("audience", ["sigil-api", [RESOURCE, "sigil-api"], None])
def test_issuers_take_tokens_for_this_server_only(audience):
    with pytest.raises(ValueError, match="RFC 8707"):
        make_app(issuers=[make_issuer(audience=audience)])


async def test_metadata_says_what_was_configured():
    sent = await drive(make_app(metadata={"resource_name": "Docs"}), "GET", "/.well-known/oauth-protected-resource/mcp")
    assert sent.json() == {
        "resource": RESOURCE,
        "authorization_servers": ["https://auth.sigil.acti.ai"],
        "scopes_supported": ["documents:read"],
        "bearer_methods_supported": ["header"],
        "resource_name": "Docs",
    }


async def test_nobody_gets_anywhere_but_to_what_is_public():
    app = make_app(public=["GET /health"])
    assert (await drive(app, "GET", "/health")).status == 200
    for method, path in (("POST", "/mcp"), ("GET", "/mcp"), ("GET", "/other"), ("POST", "/health"), ("GET", "/x/../y")):
        sent = await drive(app, method, path, body=b"{}")
        assert sent.status == 401
        # What a dot segment leads to, and so whose metadata to name, is not guessed.
        assert METADATA in sent.header("www-authenticate") or ".." in path


async def test_web_pages_are_refused_unless_listed():
    app = make_app(origins=["https://app.example"])
    assert (await call(app, headers={"origin": "https://app.example"})).status == 200
    assert (await call(app, headers={"origin": "null"})).status == 403
    assert (await call(make_app(errors="oauth"), headers={"origin": "null"})).json()["jsonrpc"] == "2.0"


@pytest.mark.parametrize("path", ["/mcp", "/mcp/", "//mcp", "/", "/mounted/elsewhere", "/mcp/../mcp"])
async def test_no_path_leads_around_the_rules(path):
    """The endpoint is everything, wherever the application is mounted."""
    assert (await call(make_app(), "delete", path=path)).status in (400, 403)
    assert (await call(make_app(), "search", scope="other", path=path)).status in (400, 403)


async def test_a_tool_has_limits_of_its_own_for_each_caller():
    app = make_app(tools={"search": Tool(limits="2/minute"), "list": [], "*": Tool(limits="1/minute")})
    assert [(await call(app)).status for _ in range(3)] == [200, 200, 429]
    assert (await call(app, subject="bob")).status == 200
    assert (await call(app, "list")).status == 200
    # Names that a client makes up share one counter.
    assert [(await call(app, f"made-up-{n}")).status for n in range(2)] == [200, 429]
    refused = await call(app)
    assert refused.json()["violated_policies"] == ["tool-minute"]
    assert refused.header("retry-after")


async def test_a_tool_has_a_budget_of_tokens():
    tools = {"model": Tool(limits=Tier(tokens="100/hour"), estimate=40), "search": []}
    app = make_app(tools=tools, limits={"tiers": {"free": Tier(requests="100/minute", tokens="1000/hour")}})
    remaining = [(await call(app, "model")).header("x-tokens-remaining") for _ in range(2)]
    assert remaining == ["70", "40"]  # what was used, not what was reserved
    assert (await call(app, "model")).status == 200
    refused = await call(app, "model")
    assert (refused.status, refused.json()["error_code"]) == (429, "CTX_003")
    assert refused.json()["violated_policies"] == ["tool-tokens-hour"]
    assert (await call(app, "search")).status == 200
    assert (await call(app, "model", subject="bob")).status == 200


async def test_what_is_not_reported_is_counted_whether_it_is_streamed_or_not():
    answer = b'data: {"result":"' + b"x" * 377 + b'"}\n\n'
    assert len(answer) == 398

    async def streaming(scope, receive, send):
        headers = [(b"content-type", scope["headers"][-1][1])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    for media_type in ("text/event-stream", "text/plain"):
        policies = mcp_server(
            resource=RESOURCE,
            issuers=[make_issuer(audience=RESOURCE)],
            tools={"search": Tool(limits=Tier(tokens="50/hour"))},
            limits={"tiers": TIERS},
        )
        app = PolicyStack(streaming, policies, clock=FrozenClock(NOW))
        sent = await call(app, headers={"x-media-type": media_type})
        assert (sent.status, sent.body) == (200, answer)  # the work was done, so its result goes out whole
        assert (await call(app, headers={"x-media-type": media_type})).status == 429


async def test_a_client_may_begin_with_several_requests():
    app = make_app(limits={})
    assert [(await call(app, tier=None)).status for _ in range(8)] == [200] * 8


async def test_levels_and_token_rules_of_ones_own_stay():
    shared = Level("everybody", key=lambda ex: "all", limits="3/minute")
    app = make_app(tools={"search": Tool(limits="2/minute")}, limits={"tiers": TIERS, "levels": [shared]})
    assert [(await call(app, subject=name)).status for name in ("a", "b", "c", "d")] == [200, 200, 200, 429]


async def test_another_policy_may_authenticate():
    own = BearerAuth(issuers=[make_issuer(audience=RESOURCE)], realm="documents")
    sent = await drive(make_app(auth=[own]), "POST", "/mcp", body=b"{}")
    assert 'realm="documents"' in sent.header("www-authenticate")


def test_plain_http_takes_a_word():
    resource = "http://localhost:8000/mcp"
    issuers = [make_issuer(audience=resource)]
    with pytest.raises(ValueError, match="allow_loopback"):
        mcp_server(resource=resource, issuers=issuers)
    assert mcp_server(resource=resource, issuers=issuers, allow_loopback=True)

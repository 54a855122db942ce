"""RFC 9728: the metadata document, and its place in challenges. RM-nn are the rules of the standards checklist."""

import json

import pytest
from pydantic import SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.problems import ProblemType
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.protected_resource import ProtectedResource, ProtectedResourceMetadata
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.scopes import Scopes
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, good_claims, make_issuer, token

pytestmark = pytest.mark.anyio

WELL_KNOWN = "/.well-known/oauth-protected-resource"
MCP = ProtectedResource(
    resource="https://api.example.com/mcp",
    authorization_servers=["https://auth.example.com"],
    scopes_supported=["documents:read"],
    resource_name="Documents",
)
V7 = ProtectedResource(resource="https://api.example.com/v7/")
NAMED = 'resource_metadata="https://api.example.com/.well-known/oauth-protected-resource/mcp"'


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def make_app(*documents, app=answer, policies=None, **options):
    metadata = ProtectedResourceMetadata(documents=documents or [MCP, V7], **options)
    auth = [
        BearerAuth(issuers=[make_issuer()]),
        ApiKeyAuth(store=MemoryApiKeyStore([]), pepper=SecretStr("p" * 32), scheme="ApiKey"),
        Scopes(routes={"/mcp/write": "documents:write"}),
    ]
    return PolicyStack(app, [metadata, *(auth if policies is None else policies)], clock=FrozenClock(NOW))


async def test_the_document_is_served_to_anybody_at_the_inserted_path():
    """RM-01, RM-02, RM-03, RM-05, RM-08"""
    sent = await drive(make_app(), "GET", f"{WELL_KNOWN}/mcp", headers={"host": "evil.example"})
    assert (sent.status, sent.header("content-type")) == (200, "application/json")
    assert sent.json() == {
        "resource": "https://api.example.com/mcp",
        "authorization_servers": ["https://auth.example.com"],
        "scopes_supported": ["documents:read"],
        "bearer_methods_supported": ["header"],
        "resource_name": "Documents",
    }
    assert sent.header("content-length") == str(len(sent.body))
    assert sent.header("cache-control") == "public, max-age=3600"
    assert sent.header("access-control-allow-origin") == "*"
    assert sent.header("x-content-type-options") == "nosniff"


async def test_members_without_a_value_are_left_out():
    """RM-04"""
    bare = ProtectedResource(resource="https://api.example.com", bearer_methods_supported=[])
    sent = await drive(make_app(bare), "GET", WELL_KNOWN)
    assert sent.json() == {"resource": "https://api.example.com"}


async def test_further_members_and_flags_are_written():
    full = ProtectedResource(
        resource="https://api.example.com",
        jwks_uri="https://api.example.com/keys",
        dpop_bound_access_tokens_required=True,
        tls_client_certificate_bound_access_tokens=True,
        resource_signing_alg_values_supported=["ES256"],
        extra={"resource_name#fr": "Documents", "nothing": [], "zero": 0},
    )
    document = json.loads(full.document)
    assert document["dpop_bound_access_tokens_required"] is True
    assert document["tls_client_certificate_bound_access_tokens"] is True
    assert document["resource_name#fr"] == "Documents"
    assert document["zero"] == 0
    assert "nothing" not in document


async def test_several_resources_each_have_their_document():
    for path, resource in (("/mcp", MCP), ("/v7/", V7)):
        sent = await drive(make_app(), "GET", WELL_KNOWN + path)
        assert sent.json()["resource"] == resource.resource
    unknown = await drive(make_app(policies=[]), "GET", f"{WELL_KNOWN}/other")
    assert unknown.body == b"inside"  # somebody else's, if anybody's


async def test_head_is_the_head_of_get():
    got, head = [await drive(make_app(), method, f"{WELL_KNOWN}/mcp") for method in ("GET", "HEAD")]
    assert head.body == b""
    assert (head.status, head.headers) == (got.status, got.headers)


async def test_a_browser_may_ask_first():
    """RM-08: an MCP client sends its protocol version, so the browser sends a preflight."""
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "GET",
        "access-control-request-headers": "mcp-protocol-version",
    }
    sent = await drive(make_app(), "OPTIONS", f"{WELL_KNOWN}/mcp", headers=headers)
    assert (sent.status, sent.body) == (204, b"")
    assert sent.header("access-control-allow-origin") == "*"
    assert sent.header("access-control-allow-methods") == "GET, HEAD"
    assert sent.header("access-control-allow-headers") == "*"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "QUERY"])
async def test_it_can_only_be_read(method):
    sent = await drive(make_app(), method, f"{WELL_KNOWN}/mcp")
    assert (sent.status, sent.header("allow")) == (405, "GET, HEAD, OPTIONS")
    assert sent.json()["error_code"] == "REQ_405"


async def test_who_has_it_already_is_told_so():
    tag = (await drive(make_app(), "GET", f"{WELL_KNOWN}/mcp")).header("etag")
    for known in (tag, f'"x", W/{tag}', "*"):
        sent = await drive(make_app(), "GET", f"{WELL_KNOWN}/mcp", headers={"if-none-match": known})
        assert (sent.status, sent.body, sent.header("etag")) == (304, b"", tag)
    other = ProtectedResource(resource="https://api.example.com/mcp")
    sent = await drive(make_app(other, max_age=60), "GET", f"{WELL_KNOWN}/mcp", headers={"if-none-match": tag})
    assert (sent.status, sent.header("cache-control")) == (200, "public, max-age=60")


async def test_it_is_not_counted_against_a_caller():
    """RM-08"""
    app = make_app(policies=[RateLimit(tiers={"free": "1/hour"})])
    for _ in range(3):
        sent = await drive(app, "GET", f"{WELL_KNOWN}/mcp")
        assert (sent.status, sent.header("x-ratelimit-limit")) == (200, None)


async def test_every_challenge_names_the_metadata():
    """RM-07: each of several schemes."""
    sent = await drive(make_app(), "GET", "/mcp", headers={"host": "evil.example"})
    assert sent.status == 401
    assert sent.header_lines("www-authenticate") == [f'Bearer realm="api", {NAMED}', f'ApiKey realm="api", {NAMED}']


@pytest.mark.parametrize(
    ("headers", "path", "status", "code"),
    [
        ({"authorization": "Bearer a.b.c"}, "/mcp", 401, "AUTH_002"),
        ({"authorization": "Bearer"}, "/mcp", 400, "AUTH_003"),
        ({"x-api-key": "sk_wrong"}, "/mcp/below", 401, "AUTH_005"),
        ({"authorization": "Bearer a", "x-api-key": "b"}, "/mcp", 400, "AUTH_006"),
        ({"authorization": b"Bearer " + token(good_claims())}, "/mcp/write", 403, "AUTH_004"),
    ],
)
async def test_so_does_every_refusal_of_a_credential(headers, path, status, code):
    sent = await drive(make_app(), "POST", path, headers=headers)
    assert (sent.status, sent.json()["error_code"]) == (status, code)
    assert sent.header_lines("www-authenticate")
    assert all(line.count(NAMED) == 1 for line in sent.header_lines("www-authenticate"))


async def test_each_resource_is_named_in_its_own_challenges():
    sent = await drive(make_app(), "GET", "/v7/agents")
    assert f"{WELL_KNOWN}/v7/" in sent.header_lines("www-authenticate")[0]
    elsewhere = await drive(make_app(), "GET", "/elsewhere")
    assert "resource_metadata" not in str(elsewhere.header_lines("www-authenticate"))
    outer = ProtectedResource(resource="https://api.example.com")
    both = await drive(make_app(outer, MCP), "GET", "/mcp")
    assert NAMED in both.header_lines("www-authenticate")[0]


async def test_the_public_path_counts_below_a_root_path_too():
    document = ProtectedResource(resource="https://api.example.com/behind/mcp")
    sent = await drive(make_app(document), "GET", "/behind/mcp", scope={"root_path": "/behind"})
    assert f"{WELL_KNOWN}/behind/mcp" in sent.header_lines("www-authenticate")[0]


async def test_paths_say_where_a_resource_is_when_a_proxy_moves_it():
    document = ProtectedResource(resource="https://api.example.com/moved", paths=["/inside/**"])
    sent = await drive(make_app(document), "GET", "/inside/x")
    assert f"{WELL_KNOWN}/moved" in sent.header_lines("www-authenticate")[0]


async def test_an_application_that_refuses_by_itself_names_it_too():
    async def bare(request):
        raise HTTPException(401, headers={"WWW-Authenticate": 'Digest realm="x", Basic realm="y"'})

    async def own(request):
        line = 'Bearer resource_metadata="https://own.example/meta"'
        return PlainTextResponse("no", 403, headers={"WWW-Authenticate": line})

    async def fails(request):
        raise ProblemType(code="DOC_401", title="NoError", status=401)(
            headers=((b"www-authenticate", b'Bearer realm="app"'),)
        )

    routes = [Route("/bare", bare), Route("/own", own), Route("/fails", fails), Mount("/sub", routes=[])]
    app = make_app(app=Starlette(routes=[Mount("/mcp", routes=routes)]), policies=[Problems()])
    sent = await drive(app, "GET", "/mcp/bare")
    assert sent.header("www-authenticate") == f'Digest realm="x", {NAMED}, Basic realm="y", {NAMED}'
    sent = await drive(app, "GET", "/mcp/own")
    assert sent.header("www-authenticate") == 'Bearer resource_metadata="https://own.example/meta"'
    sent = await drive(app, "GET", "/mcp/fails")
    assert sent.header("www-authenticate") == f'Bearer realm="app", {NAMED}'


async def test_two_of_them_share_the_work():
    inner = ProtectedResourceMetadata(documents=[MCP])
    app = make_app(
        ProtectedResource(resource="https://api.example.com"),
        policies=[inner, BearerAuth(issuers=[make_issuer()]), Scopes()],
    )
    assert (await drive(app, "GET", WELL_KNOWN)).json()["resource"] == "https://api.example.com"
    assert (await drive(app, "GET", f"{WELL_KNOWN}/mcp")).json()["resource"] == MCP.resource
    assert (await drive(app, "GET", "/mcp")).header("www-authenticate") == f'Bearer realm="api", {NAMED}'


async def test_a_websocket_that_is_refused_names_it():
    sent = await drive(make_app(), path="/mcp", kind="websocket")
    assert NAMED in sent.header_lines("www-authenticate")[0]


async def test_answers_that_are_no_refusal_are_left_alone():
    async def odd(scope, receive, send):
        line = (b"www-authenticate", b"Bearer")
        await send({"type": "http.response.start", "status": 200, "headers": [line]})
        await send({"type": "http.response.body", "body": b""})

    sent = await drive(make_app(app=odd, policies=[]), "GET", "/mcp")
    assert sent.header("www-authenticate") == "Bearer"


def test_it_stands_outside_of_who_asks_for_credentials():
    with pytest.raises(PolicyOrderError, match="ProtectedResourceMetadata"):
        PolicyStack(answer, [BearerAuth(issuers=[make_issuer()]), ProtectedResourceMetadata(documents=[MCP])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resource": "http://api.example.com"}, "https"),
        ({"resource": "https://api.example.com#x"}, "fragment"),
        ({"authorization_servers": ["https://auth.example.com/?x"]}, "query"),
        ({"jwks_uri": "http://api.example.com/keys"}, "jwks_uri"),
        ({"resource_signing_alg_values_supported": ["RS256", "none"]}, "none"),  # RM-06
        ({"dpop_signing_alg_values_supported": ["None"]}, "none"),
        ({"scopes_supported": ["a b"]}, "scope"),
        ({"extra": {"resource": "https://other.example"}}, "extra"),
        ({"extra": {"odd": float("nan")}}, "JSON"),
        ({"extra": {"odd": object()}}, "JSON"),
        ({"bearer_methods_supported": ["cookie"]}, "header"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_metadata_fails_when_it_is_written(options, message):
    with pytest.raises(ValidationError, match=message):
        ProtectedResource(**{"resource": "https://api.example.com", **options})


def test_two_resources_cannot_have_one_path():
    """RM-01: a document's path names one resource."""
    with pytest.raises(ValidationError, match=r"same route|two resources"):
        ProtectedResourceMetadata(documents=[MCP, ProtectedResource(resource="https://other.example/mcp")])
    with pytest.raises(ValidationError, match=r"same route|two resources"):
        ProtectedResourceMetadata(documents=[MCP, ProtectedResource(resource="https://api.example.com/mcp/")])

"""The two guards of an MCP server: origins, and tools by scope, judged by what the server executes."""

import json

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.challenges import Challenges, challenge_line, offer
from sigil_policy.policies.mcp import McpCall, McpEndpoint, McpTools
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio

TODAY = "2026-07-28"
TOOLS = {"search": "read", "purge": ["read", "write"], "ping": [], "*": "other"}


class As(Policy):
    """Whoever sends `x-scopes` is a caller with them."""

    gives = (Principal, Challenges)

    def on_request(self, ex):
        scopes = ex.headers.get(b"x-scopes")
        if scopes is None:
            ex.anonymous()
            offer(ex, (challenge_line("Bearer", "mcp"), challenge_line("ApiKey", "mcp")))
        else:
            ex.authenticate(Principal(subject="ann", scopes=frozenset(scopes.decode().split()), realm="mcp"))


class Server:
    """Executes whatever is in the body, and says what it was."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.bodies.append(message.get("body", b""))
        call = get_exchange(scope).get(McpCall)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(call).encode()})


def make_app(*, endpoint=None, server=None, inner=(), **options):
    policies = [As(), McpTools(**{"tools": TOOLS, **options}), *inner]
    if endpoint is not None:
        policies.insert(0, McpEndpoint(**endpoint))
    return PolicyStack(server or Server(), [Problems(), *policies], clock=FrozenClock(1_700_000_000.0))


def body_of(tool="search", method="tools/call", key="name", **changes):
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {key: tool}, **changes}
    return json.dumps(message).encode()


async def post(body=None, *, scopes="read", app=None, path="/mcp", verb="POST", **headers):
    """A POST; `mcp_name="x"` is the header Mcp-Name."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if scopes is not None:
        sent["x-scopes"] = scopes
    return await drive(app or make_app(), verb, path, headers=sent, body=body_of() if body is None else body)


async def mirrored(tool="search", *, method="tools/call", **options):
    return await post(body_of(tool, method), mcp_protocol_version=TODAY, mcp_method=method, mcp_name=tool, **options)


# --- origins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("https://app.example", 200),
        ("http://localhost:3000", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("https://app.example.evil", 403),
        ("https://app.example:8443", 403),
        ("http://app.example", 403),
        ("https://app.example/", 403),
        ("HTTPS://APP.EXAMPLE", 403),
        ("https://app.example, https://app.example", 403),
        (b"\xff", 403),
    ],
)
async def test_web_pages_come_from_listed_origins(origin, status):
    app = make_app(endpoint={"origins": ["https://app.example", "http://localhost:3000"]})
    for verb in ("POST", "GET", "DELETE"):
        sent = await post(app=app, verb=verb, **({} if origin is None else {"origin": origin}))
        assert sent.status == status


async def test_two_origins_are_none():
    app = make_app(endpoint={"origins": ["https://app.example"]})
    sent = await drive(app, "POST", "/mcp", headers=[("origin", "https://app.example")] * 2, body=body_of())
    assert sent.status == 403


async def test_an_origin_is_asked_before_the_credential():
    server = Server()
    sent = await post(app=make_app(endpoint={}, server=server), scopes=None, origin="https://evil.example")
    assert (sent.status, sent.json()["error_code"]) == (403, "REQ_403")
    assert "evil" not in sent.body.decode()
    assert server.bodies == []


async def test_exempt_routes_and_other_paths_are_not_the_endpoint():
    app = make_app(endpoint={"exempt": ["GET /health"]}, exempt=["GET /health"])
    assert (await post(app=app, verb="GET", path="/health", scopes=None, origin="https://any.example")).status == 200
    assert (await post(app=app, verb="POST", path="/health", origin="https://any.example")).status == 403
    app = make_app(endpoint={"paths": ["/mcp"]}, paths=["/mcp"])
    assert (await post(app=app, path="/other", scopes=None, origin="https://any.example")).status == 200
    for dodge in ("//mcp", "/mcp/", "/mcp\n", "/x/../mcp"):
        assert (await post(app=app, path=dodge, origin="https://any.example")).status == 403


async def test_a_dot_segment_leads_nowhere():
    """Some applications resolve it: then the rules would speak of another path than the one that is served."""
    server = Server()
    app = make_app(paths=["/mcp"], server=server)
    for path in ("/x/../mcp", "/./mcp", "/mcp/."):
        assert (await post(body_of("purge"), app=app, path=path)).status == 400
        assert (await post(body_of("purge"), app=app, path=path, scopes=None)).status == 401
    assert server.bodies == []


@pytest.mark.parametrize("origin", ["null", "*", "https://app.example/", "https://A.example", "app.example"])
def test_origins_are_written_as_browsers_do(origin):
    with pytest.raises(ValidationError, match="origin"):
        McpEndpoint(origins=[origin])


# --- the form of errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scopes", "headers", "status", "body"),
    [
        (None, {}, 401, {"error": "invalid_token"}),
        ("none", {}, 403, {"error": "insufficient_scope", "scope": "read"}),
        ("read", {"origin": "https://evil.example"}, 403, {"jsonrpc": "2.0"}),
    ],
)
async def test_errors_can_be_what_mcp_clients_read(scopes, headers, status, body):
    sent = await post(app=make_app(endpoint={"errors": "oauth"}), scopes=scopes, **headers)
    assert (sent.status, sent.header("content-type")) == (status, "application/json")
    assert sent.json().items() >= body.items()
    assert sent.header("cache-control") == "no-store"
    if "jsonrpc" in body:
        assert "id" not in sent.json()
        assert sent.json()["error"]["data"] == {"error_code": "REQ_403"}
    else:
        assert sent.json()["error_description"]
        assert sent.header_lines("www-authenticate")[0].startswith('Bearer realm="mcp"')


async def test_limits_keep_their_headers_in_either_form():
    app = make_app(endpoint={"errors": "oauth"}, inner=[RateLimit(tiers={"free": "1/hour"})])
    assert (await post(app=app)).status == 200
    sent = await post(app=app)
    assert (sent.status, sent.json()["error"]["data"]) == (429, {"error_code": "RATE_001"})
    assert sent.header("retry-after")


# --- tools by scope ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "scopes", "status"),
    [
        ("search", "read", 200),
        ("search", "readonly write", 403),
        ("purge", "read write", 200),
        ("purge", "write", 403),
        ("ping", "", 200),
        ("unknown", "read write", 403),
        ("unknown", "other", 200),
        ("*", "read", 403),
        ("Search", "read", 403),
        (" search", "read", 403),
        ("unknown", "admin", 200),
    ],
)
@pytest.mark.parametrize("verify", ["body", "headers"])
async def test_a_call_takes_the_scopes_of_its_tool(tool, scopes, status, verify):
    sent = await mirrored(tool, scopes=scopes, app=make_app(verify=verify))
    assert sent.status == status
    if status == 200:
        assert sent.json() == ["tools/call", tool if tool in ("search", "purge", "ping") else "*"]


async def test_all_scopes_that_a_call_takes_are_told_at_once():
    sent = await mirrored("purge", scopes="read")
    assert (sent.status, sent.json()["error_code"]) == (403, "AUTH_004")
    assert sent.header("www-authenticate") == 'Bearer realm="mcp", error="insufficient_scope", scope="read write"'
    assert (sent.json()["required_scopes"], sent.json()["missing_scopes"]) == (["read", "write"], ["write"])


async def test_tools_that_are_not_listed_are_closed_without_a_rule_for_them():
    app = make_app(tools={"search": []})
    sent = await mirrored("other", scopes="read", app=app)
    assert (sent.status, sent.json()["required_scopes"]) == (403, ["admin"])
    assert (await mirrored("other", scopes="admin", app=app)).status == 200
    closed = make_app(tools={"search": []}, superscope=None)
    assert (await mirrored("other", scopes="admin", app=closed)).status == 403


async def test_a_broad_scope_contains_narrower_ones():
    app = make_app(implies={"all": ["write"], "write": ["read"], "read": ["all"]})
    assert (await mirrored("purge", scopes="all", app=app)).status == 200
    assert (await mirrored("purge", scopes="other", app=app)).status == 403


async def test_other_methods_have_rules_too():
    app = make_app(methods={"resources/read": "files"})
    assert (await post(body_of("docs://x", "resources/read", "uri"), app=app)).status == 403
    assert (await post(body_of("docs://x", "resources/read", "uri"), app=app, scopes="files")).status == 200
    assert (await post(body_of(method="tools/list"), app=app, scopes="")).json() == ["tools/list", None]
    strict = make_app(methods={"*": "member"})
    assert (await post(body_of(method="tools/list"), app=strict)).status == 403
    assert (await post(app=strict, verb="GET", body=b"")).status == 403


async def test_nobody_is_asked_for_what_the_call_would_take():
    server = Server()
    app = make_app(server=server)
    sent = await mirrored("purge", scopes=None, app=app)
    assert sent.status == 401
    assert sent.header_lines("www-authenticate") == ['Bearer realm="mcp", scope="read write"', 'ApiKey realm="mcp"']
    plain = await post(scopes=None, app=app)
    assert plain.header_lines("www-authenticate") == ['Bearer realm="mcp"', 'ApiKey realm="mcp"']
    for verb in ("GET", "DELETE", "PUT"):
        assert (await post(b"", scopes=None, app=app, verb=verb)).status == 401
    assert server.bodies == []


async def test_a_preflight_has_no_credentials():
    headers = {"origin": "https://app.example", "access_control_request_method": "POST"}
    assert (await post(b"", scopes=None, verb="OPTIONS", **headers)).status == 200


async def test_a_websocket_would_carry_calls_that_nobody_judges():
    for scopes, status in (("admin", 403), (None, 401)):
        headers = {} if scopes is None else {"x-scopes": scopes}
        assert (await drive(make_app(), path="/mcp", kind="websocket", headers=headers)).status == status
    app = make_app(endpoint={"origins": ["https://app.example"]}, paths=["/mcp"])
    headers = {"x-scopes": "read", "origin": "https://evil.example"}
    assert (await drive(app, path="/elsewhere", kind="websocket", headers=headers)).status == 403


# --- what a call is judged by -----------------------------------------------------------------------------------------


async def test_the_server_gets_the_very_body_that_was_judged():
    server = Server()
    body = body_of() + b" " * 100
    await drive(make_app(server=server), "POST", "/mcp", headers={"x-scopes": "read"}, body=[body[:20], body[20:]])
    assert server.bodies == [body]


async def test_clients_of_older_versions_are_judged_by_their_body():
    assert (await post(body_of("purge"), scopes="read")).status == 403
    assert (await post(body_of("purge"), scopes="read write", mcp_protocol_version="2025-11-25")).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"mcp_method": "tools/call", "mcp_name": "ping"},
        {"mcp_method": "tools/list"},
        {"mcp_name": "ping"},
        {"mcp_method": "tools/list", "mcp_protocol_version": TODAY},
        {"mcp_method": "tools/call", "mcp_name": "ping", "mcp_protocol_version": TODAY},
        {"mcp_method": "tools/call", "mcp_name": "=?base64?cGluZw==?=", "mcp_protocol_version": TODAY},
        {"mcp_method": "tools/call", "mcp_name": "=?base64?!?=", "mcp_protocol_version": TODAY},
        {"mcp_method": "TOOLS/CALL", "mcp_name": "purge", "mcp_protocol_version": TODAY},
        {"mcp_name": "purge", "mcp_protocol_version": TODAY},
        {"mcp_method": "tools/call", "mcp_protocol_version": TODAY},
        {"mcp_protocol_version": TODAY},
    ],
)
async def test_headers_that_contradict_the_body_are_refused(headers):
    """A name that opens less must not stand in front of a call that does more."""
    server = Server()
    sent = await post(body_of("purge"), scopes="read write", app=make_app(server=server), **headers)
    assert (sent.status, sent.json()["error"]["code"], sent.json()["id"]) == (400, -32020, 1)
    assert server.bodies == []


async def test_the_version_in_the_body_is_the_one_in_the_header():
    meta = {"_meta": {"io.modelcontextprotocol/protocolVersion": "2027-01-01"}, "name": "search"}
    sent = await post(body_of(params=meta), mcp_protocol_version=TODAY, mcp_method="tools/call", mcp_name="search")
    assert (sent.status, sent.json()["error"]["code"]) == (400, -32020)


@pytest.mark.parametrize("name", ["mcp-method", "mcp-name", "mcp-protocol-version"])
@pytest.mark.parametrize("verify", ["body", "headers"])
async def test_a_header_that_comes_twice_says_nothing(name, verify):
    values = {"mcp-method": "tools/call", "mcp-name": "search", "mcp-protocol-version": TODAY}
    headers = [("x-scopes", "read"), *values.items(), (name, values[name])]
    sent = await drive(make_app(verify=verify), "POST", "/mcp", headers=headers, body=body_of())
    assert (sent.status, sent.json()["error"]["code"]) == (400, -32020)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\x1f\x8b\x08", -32700),
        (b'{"method":"tools/list","method":"tools/call","params":{"name":"purge"}}', -32700),
        (b"[" + body_of("purge") + b"]", -32600),
        (body_of(method=["tools/call"]), -32600),
        (body_of(tool=None), -32602),
        (body_of(tool=5), -32602),
        (body_of(params=["purge"]), -32602),
    ],
)
async def test_what_is_no_single_message_is_refused(body, code):
    server = Server()
    sent = await post(body, scopes="read other", app=make_app(server=server))
    assert (sent.status, sent.json()["error"]["code"]) == (400, code)
    assert server.bodies == []


MEMBERS = st.sampled_from(
    [
        '"jsonrpc":"2.0"',
        '"id":1',
        '"method":"tools/call"',
        '"method":"tools/list"',
        '"meth\\u006fd":"tools/call"',
        '"Method":"tools/call"',
        '"params":{"name":"purge"}',
        '"params":{"name":"ping"}',
        '"params":{"name":"ping","name":"purge"}',
        '"params":{"name":"purge","n\\u0061me":"ping"}',
        '"params":{"name":"p\\u0075rge"}',
        '"params":[{"name":"purge"}]',
        '"other":{"method":"tools/list","params":{"name":"ping"}}',
    ]
)
BODIES = st.builds(
    lambda members, form, coding: form.format("{" + ",".join(members) + "}").encode(coding),
    st.lists(MEMBERS, min_size=1, max_size=6),
    st.sampled_from(["{}", " {}\n", "[{}]", "[{}, 1]", "{} {{}}", "{}\x00"]),
    st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "mcp-protocol-version": st.sampled_from([TODAY, "2025-11-25", "x"]),
        "mcp-method": st.sampled_from(["tools/call", "tools/list", ""]),
        "mcp-name": st.sampled_from(["ping", "purge", "=?base64?cGluZw==?=", "=?base64?cHVyZ2U=?="]),
        "content-type": st.sampled_from(["application/json", "application/json; charset=utf-16"]),
    },
)


PARSERS = {
    "last": dict,
    "first": lambda pairs: dict(reversed(pairs)),
    "any case": lambda pairs: {name.lower(): value for name, value in pairs},
}


@pytest.mark.parametrize("parser", PARSERS)
@given(body=BODIES, headers=HEADERS)
@example(body=b'{"method":"tools/list","Method":"tools/call","params":{"name":"purge"}}', headers={})
@example(body=b'{"method":"tools/call","method":"tools/list","params":{"name":"purge"}}', headers={})
@settings(max_examples=200, deadline=None)
def test_whatever_is_sent_no_server_executes_what_the_scopes_do_not_open(parser, body, headers):
    """The server is a careless one: takes any coding, either of two members, any case, and the first of a batch."""
    executed = []

    async def careless(scope, receive, send):
        try:
            message = json.loads((await receive())["body"], object_pairs_hook=PARSERS[parser])
        except ValueError:
            message = {}
        message = message[0] if isinstance(message, list) else message
        params = message.get("params")
        if message.get("method") == "tools/call" and isinstance(params, dict):
            executed.append(params.get("name"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run():
        return await drive(make_app(server=careless), "POST", "/mcp", headers={"x-scopes": "x", **headers}, body=body)

    sent = anyio.run(run)
    assert sent.status in (200, 400, 403)
    assert set(executed) <= {"ping"}


async def test_a_message_has_its_limit():
    app = make_app(body_limit=1_024)
    assert (await post(body_of() + b" " * 2_000, app=app)).status == 413
    assert (await post(body_of() + b" " * 500, app=app)).status == 200


async def test_a_client_that_leaves_halfway_calls_nothing():
    server = Server()
    incoming = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    app = make_app(server=server)
    await drive(app, "POST", "/mcp", headers={"x-scopes": "read"}, incoming=incoming, raise_errors=False)
    assert server.bodies == []


async def test_notifications_and_responses_take_a_caller():
    notification = json.dumps({"jsonrpc": "2.0", "method": "notifications/initialized"}).encode()
    assert (await post(notification, scopes="", mcp_protocol_version=TODAY)).status == 200
    response = json.dumps({"jsonrpc": "2.0", "id": 3, "result": {}}).encode()
    assert (await post(response, scopes="")).json() == [None, None]


@pytest.mark.parametrize("version", [None, "2025-11-25", "draft", ""])
async def test_headers_alone_count_only_where_the_server_has_to_compare_them(version):
    headers = {} if version is None else {"mcp_protocol_version": version}
    app = make_app(verify="headers")
    sent = await post(app=app, mcp_method="tools/call", mcp_name="search", **headers)
    assert (sent.status, sent.json()["error"]["code"]) == (400, -32020)
    for missing in ({"mcp_method": "tools/call"}, {"mcp_name": "search"}, {"mcp_method": b"\xff", "mcp_name": "x"}):
        assert (await post(app=app, mcp_protocol_version=TODAY, **missing)).status == 400


async def test_by_headers_the_body_is_not_read():
    server = Server()
    app = make_app(verify="headers", server=server)
    headers = {"x-scopes": "read", "mcp-protocol-version": TODAY, "mcp-method": "tools/call", "mcp-name": "search"}
    await drive(app, "POST", "/mcp", headers=headers, body=[b"first", b"second"])
    assert server.bodies == [b"first"]  # as it came in, part by part


async def test_two_tables_both_hold():
    app = make_app(tools={"search": "read"}, inner=[McpTools(tools={"search": "write"})])
    assert (await mirrored(scopes="read", app=app)).json()["required_scopes"] == ["write"]
    assert (await mirrored(scopes="write", app=app)).json()["required_scopes"] == ["read"]
    assert (await mirrored(scopes="read write", app=app)).status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": {"a": "x y", "b": ""}}, "'b'"),
        ({"tools": {"a": 'quote"'}}, "scope"),
        ({"tools": {"a": 5}}, "'a'"),
        ({"methods": {"tools/call": "x"}}, "tools"),
        ({"paths": ["POST /mcp"]}, "path alone"),
        ({"paths": ["/mcp"], "exempt": ["/mcp"]}, "keep one"),
        ({"paths": []}, "paths"),
        ({"body_limit": 0}, "body_limit"),
    ],
)
def test_bad_tables_fail_when_they_are_written(options, message):
    with pytest.raises(ValidationError, match=message):
        McpTools(**options)


def test_order_is_checked():
    with pytest.raises(PolicyOrderError, match="McpTools"):
        PolicyStack(Server(), [McpTools(), As()])
    with pytest.raises(PolicyOrderError, match="McpEndpoint"):
        PolicyStack(Server(), [As(), McpEndpoint()])

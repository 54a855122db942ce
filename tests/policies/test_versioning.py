"""Versioning: RFC 9745, 8594, 5829, 8288. Rows DP-01 to DP-14 as named, D-01, D-02, ST-16."""

import re
from datetime import UTC, date, datetime, timedelta, timezone
from urllib.parse import parse_qsl, unquote, urlsplit

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.versioning import Deprecation, Version, Versioning
from sigil_policy.telemetry.sensitive import SecretRules
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
V6 = Version(phase="deprecated", deprecated=date(2026, 1, 11), sunset=date(2027, 1, 11), successor="v7")
VERSIONS = {"v6": V6, "v7": Version(phase="current"), "v8": Version(phase="preview")}
ANNOUNCED = ("@1768089600", "Mon, 11 Jan 2027 00:00:00 GMT")


def answering(*headers, status=200, body=b"{}"):
    async def app(scope, receive, send):
        pairs = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    return app


async def never(scope, receive, send):
    raise AssertionError("a retired version reached the application")


def stack(*policies, app=None, now=NOW):
    return PolicyStack(app or answering(), policies=policies or [Versioning(versions=VERSIONS)], clock=FrozenClock(now))


async def link_of(policy, path, query="", scope=None):
    return (await drive(stack(policy), "GET", path, query=query, scope=scope)).header("link")


# --- what a deprecated version says ----------------------------------------------------------------------------------


async def test_a_deprecated_version_says_so_and_names_its_successor():
    """DP-01, DP-03, DP-09, D-01, D-02"""
    sent = await drive(stack(), "GET", "/v6/agents/x", query="page=2")
    assert (sent.header("deprecation"), sent.header("sunset")) == ANNOUNCED
    assert sent.header("link") == '</v7/agents/x?page=2>; rel="successor-version"'
    moment, parameters = http_sf.parse(sent.header("deprecation").encode(), tltype="item")
    assert (moment, parameters) == (datetime(2026, 1, 11, tzinfo=UTC), {})


@pytest.mark.parametrize(
    "path", ["/v7/agents", "/v8/agents", "/v60/agents", "/v6x", "/V6/agents", "/", "/agents/v6", "/v6/../v7", "/v"]
)
async def test_versions_are_whole_segments_and_others_say_nothing(path):
    sent = await drive(stack(), "GET", path)
    assert (sent.status, sent.headers) == (200, [])


@pytest.mark.parametrize(
    ("path", "successor"),
    [
        ("/v6", "/v7"),
        ("/v6/", "/v7/"),
        ("/v6/a/v6/b/", "/v7/a/v6/b/"),
        ("//v6//a", "/v7/a"),
        ("/v6//evil.example", "/v7/evil.example"),
        ("/v6/Zoë Ω", "/v7/Zo%C3%AB%20%CE%A9"),
        ('/v6/a>; rel="x"', "/v7/a%3E;%20rel=%22x%22"),
        ("/v6/100%", "/v7/100%25"),
        ("/v6/a?b#c", "/v7/a%3Fb%23c"),
        ("/v6/\udce9", "/v7/%ED%B3%A9"),
    ],
)
async def test_the_path_of_the_successor_is_encoded(path, successor):
    """DP-09, DP-10"""
    sent = await drive(stack(), "GET", path, scope={"raw_path": b""})
    assert sent.header("link") == f'<{successor}>; rel="successor-version"'


async def test_a_mounted_application_links_below_its_root():
    sent = await drive(stack(), "GET", "/root/v6/a", scope={"root_path": "/root"})
    assert sent.header("link") == '</root/v7/a>; rel="successor-version"'


async def test_versions_may_stand_behind_a_prefix():
    policy = Versioning(versions=VERSIONS, prefix="/api")
    assert await link_of(policy, "/api/v6/a") == '</api/v7/a>; rel="successor-version"'
    assert await link_of(policy, "/v6/a") is None


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("page=2&per_page=10", "?page=2&per_page=10"),
        ("token=x", ""),
        ("page=2&access_token=x&sort=-name", "?page=2&sort=-name"),
        ("API_KEY=x&api-key=y&apiKey=z&a=1", "?a=1"),
        ("%74oken=x&a=1", "?a=1"),
        ("a=1;token=x&b=2", "?b=2"),
        ("q=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln&a=1", "?a=1"),
        ("max_tokens=5&page_token=7", "?max_tokens=5&page_token=7"),
        ("q=a%20b+c", "?q=a%20b+c"),
        ("q=<>\"' é", "?q=%3C%3E%22'%20%E9"),
        ("q=%zz", "?q=%25zz"),
    ],
)
async def test_the_query_is_kept_without_credentials(query, kept):
    """DP-09"""
    assert await link_of(Versioning(versions=VERSIONS), "/v6/a", query) == f'</v7/a{kept}>; rel="successor-version"'


@pytest.mark.parametrize(
    "name",
    ["password", "secret", "api_key", "token", "access_token", "signature", "sig", "client_secret", "X-Amz-Signature"],
)
async def test_no_credential_goes_into_a_link(name):
    link = await link_of(Versioning(versions=VERSIONS), "/v6/a", f"{name}=hunter2&{name.upper()}=hunter2")
    assert link == '</v7/a>; rel="successor-version"'


async def test_other_parameters_can_be_secret():
    policy = Versioning(versions=VERSIONS, secret_parameters=("crumb",))
    assert await link_of(policy, "/v6/a", "crumb=1&page=2") == '</v7/a?page=2>; rel="successor-version"'


@pytest.mark.parametrize(
    ("path", "query", "link"),
    [
        ("/v6/a", "q=" + "x" * 3_000, "</v7/a>"),
        ("/v6/a", "a&" * 40, "</v7/a>"),
        ("/v6/" + "x" * 1_900, "q=" + "%" * 90, "</v7/" + "x" * 1_900 + ">"),
        ("/v6/" + "x" * 3_000, "", None),
    ],
)
async def test_a_link_stays_short_enough_to_be_sent(path, query, link):
    made = await link_of(Versioning(versions=VERSIONS), path, query)
    assert made == (link and f'{link}; rel="successor-version"')


@given(st.text(max_size=40), st.binary(max_size=40))
def test_whatever_is_asked_the_link_is_one_link_to_the_same_host(path, query):
    policy = Versioning(versions=VERSIONS)
    notice = policy.rules()["/v6/**"]
    scope = {"type": "http", "method": "GET", "path": f"/v6/{path}", "query_string": query, "headers": []}
    ex = Exchange(scope, None, FrozenClock(NOW), None, None)
    head = Head(200, [])
    policy._announce(ex, notice, policy._reference(ex, notice), head.headers)
    link = head.get(b"link").decode("ascii")
    found = re.fullmatch(r'<([^<>"\s]*)>; rel="successor-version"', link)
    assert found
    target = urlsplit(found[1])
    assert (target.scheme, target.netloc, target.fragment) == ("", "", "")
    kept = [part for part in path.split("/") if part]
    assert [unquote(part) for part in target.path.split("/") if part] == ["v7", *kept]
    assert not any(SecretRules().is_secret(key) for key, _ in parse_qsl(target.query))


async def test_behaviour_is_unchanged():
    """DP-06"""
    app = answering(("content-type", "application/json"), ("content-length", "2"), status=201)
    plain, sent = await drive(app, "POST", "/v6/a"), await drive(stack(app=app), "POST", "/v6/a")
    assert (sent.status, sent.body) == (plain.status, plain.body)
    assert sent.headers[:2] == plain.headers


@pytest.mark.parametrize("status", [204, 304, 400, 401, 404, 500])
async def test_errors_of_a_deprecated_route_say_so_too(status):
    """DP-13"""
    sent = await drive(stack(app=answering(status=status, body=b"")), "GET", "/v6/a")
    assert (sent.status, sent.header("deprecation"), sent.header("sunset")) == (status, *ANNOUNCED)


class Refuse(Policy):
    def on_request(self, ex: Exchange) -> Problem:
        return RATE_EXCEEDED("Too many requests.")


async def test_refusals_from_inside_say_so_and_those_from_outside_pass():
    """DP-13"""
    inside = await drive(stack(Versioning(versions=VERSIONS), Refuse()), "GET", "/v6/a")
    assert (inside.status, inside.header("deprecation")) == (429, ANNOUNCED[0])
    outside = await drive(stack(Refuse(), Versioning(versions=VERSIONS)), "GET", "/v6/a")
    assert (outside.status, outside.header("deprecation")) == (429, None)


# --- beside what is there --------------------------------------------------------------------------------------------


async def test_links_of_the_application_are_kept():
    """DP-11"""
    own = '</v6/a?page=2>; rel="next", </v6/a>; rel="first"'
    sent = await drive(stack(app=answering(("Link", own), ("Link", "</x>; rel=help"))), "GET", "/v6/a")
    assert sent.header_lines("link") == [own, "</x>; rel=help", '</v7/a>; rel="successor-version"']


async def test_what_the_application_says_itself_is_not_overwritten():
    own = [
        ("Deprecation", "@1"),
        ("Sunset", "Fri, 01 Jan 2027 00:00:00 GMT"),
        ("Link", '</v7/a>; rel="successor-version"'),
    ]
    sent = await drive(stack(app=answering(*own)), "GET", "/v6/a")
    assert sent.headers == [(name.lower().encode(), value.encode()) for name, value in own]


async def test_two_in_one_stack_say_it_once():
    """ST-16"""
    policies = [Versioning(versions=VERSIONS), Versioning(versions=VERSIONS)]
    sent = await drive(stack(*policies), "GET", "/v6/a")
    assert [name for name, _ in sent.headers] == [b"deprecation", b"sunset", b"link"]
    assert sent.header("link") == '</v7/a>; rel="successor-version"'


async def test_a_refusal_of_the_inner_one_of_two_says_it_once():
    """ST-16"""
    outer = Versioning(versions=VERSIONS, after_sunset="pass")
    late = datetime(2028, 1, 1, tzinfo=UTC).timestamp()
    sent = await drive(stack(outer, Versioning(versions=VERSIONS), app=never, now=late), "GET", "/v6/a")
    assert sent.status == 410
    assert (sent.header("deprecation"), sent.header("sunset")) == ANNOUNCED
    assert sent.header("link") == '</v7/a>; rel="successor-version"'


# --- styles and documents --------------------------------------------------------------------------------------------


async def test_the_literal_of_the_guidelines_by_option():
    """D-01: only once it is true."""
    policy = Versioning(versions=VERSIONS, deprecation_style="literal")
    assert (await drive(stack(policy), "GET", "/v6/a")).header("deprecation") == "true"
    early = await drive(stack(policy, now=datetime(2026, 1, 10, tzinfo=UTC).timestamp()), "GET", "/v6/a")
    assert (early.header("deprecation"), early.header("sunset")) == (None, ANNOUNCED[1])


async def test_the_literal_needs_no_date():
    policy = Versioning(versions={"v6": Version(phase="deprecated")}, deprecation_style="literal")
    assert (await drive(stack(policy), "GET", "/v6/a")).headers == [(b"deprecation", b"true")]


async def test_a_deprecation_may_lie_ahead():
    """DP-02"""
    policy = Versioning(versions={"v6": Version(phase="deprecated", deprecated=date(2030, 1, 1))})
    assert (await drive(stack(policy), "GET", "/v6/a")).headers == [(b"deprecation", b"@1893456000")]


async def test_documents_are_linked():
    """DP-07, DP-08: also before anything is deprecated."""
    info = {"info": "https://docs.example/v6", "sunset_info": "/policy"}
    documents = (
        '<https://docs.example/v6>; rel="deprecation"; type="text/html", </policy>; rel="sunset"; type="text/html"'
    )
    current = await drive(stack(Versioning(versions={"v6": Version(**info)})), "GET", "/v6/a")
    assert current.headers == [(b"link", documents.encode())]
    policy = Versioning(
        versions={**VERSIONS, "v6": Version(phase="deprecated", deprecated=date(2026, 1, 1), successor="v7", **info)}
    )
    assert await link_of(policy, "/v6/a") == f'</v7/a>; rel="successor-version", {documents}'


# --- single routes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "successor", "path", "link"),
    [
        ("GET /v7/search", "/v7/memory/search", "/v7/search", "/v7/memory/search"),
        ("/v7/agents/{name}/state", "/v7/agents/{name}/status", "/v7/agents/Zoë/state", "/v7/agents/Zo%C3%AB/status"),
        ("/v7/{a}/{b:int}", "/v7/{b}/of/{a}", "/v7/x/y", "/v7/y/of/x"),
        ("/v7/old/**", "/v7/new/**", "/v7/old/a/b/", "/v7/new/a/b/"),
        ("/v7/old/{rest:path}", "/v7/new/{rest:path}", "/v7/old/a", "/v7/new/a"),
        ("/v7/old/**", "/v7/new", "/v7/old/a/b/", "/v7/new"),
        ("/v7/old/**", "https://api.example:8443/v1/**", "/v7/old/a", "https://api.example:8443/v1/a"),
        ("/v7/old", "https://api.example", "/v7/old", "https://api.example/"),
        ("/{tenant}/v6/**", "/{tenant}/v7/**", "/t/v6/a", "/t/v7/a"),
        ("GET /v7/agents/{name}", "v8", "/v7/agents/x", "/v8/agents/x"),
        ("/v7/files/**", "v8", "/v7/files/a/b", "/v8/files/a/b"),
    ],
)  # fmt: skip
async def test_routes_have_successors_of_their_own(route, successor, path, link):
    """DP-09"""
    policy = Versioning(
        versions=VERSIONS, routes={route: Deprecation(deprecated=date(2026, 1, 1), successor=successor)}
    )
    assert await link_of(policy, path) == f'<{link}>; rel="successor-version"'
    mounted = link if link.startswith("https:") else f"/root{link}"
    assert (
        await link_of(policy, f"/root{path}", scope={"root_path": "/root"}) == f'<{mounted}>; rel="successor-version"'
    )


async def test_a_route_replaces_what_its_version_says():
    policy = Versioning(
        versions=VERSIONS,
        routes={"GET /v6/a": Deprecation(deprecated=date(2026, 2, 1)), "GET /v6/b": Version(phase="current")},
    )
    assert (await drive(stack(policy), "GET", "/v6/a")).headers == [(b"deprecation", b"@1769904000")]
    assert (await drive(stack(policy), "GET", "/v6/b")).headers == []
    assert (await drive(stack(policy), "POST", "/v6/a")).header("deprecation") == ANNOUNCED[0]


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "status"),
    [(datetime(2027, 1, 10, 23, 59, 59, tzinfo=UTC), 200), (datetime(2027, 1, 11, tzinfo=UTC), 410)],
)
async def test_after_the_sunset_the_version_is_gone(now, status):
    """DP-14"""
    sent = await drive(stack(now=now.timestamp()), "GET", "/v6/agents", query="page=2&token=x")
    assert sent.status == status
    assert (sent.header("deprecation"), sent.header("sunset")) == ANNOUNCED
    assert sent.header("link") == '</v7/agents?page=2>; rel="successor-version"'


async def test_the_410_is_a_problem_that_names_the_successor():
    """DP-14"""
    policy = Versioning(versions={**VERSIONS, "v6": Version(phase="retired", successor="v7")})
    sent = await drive(stack(policy, app=never), "POST", "/v6/agents", query="secret=hunter2&page=2")
    assert sent.header("content-type") == "application/problem+json"
    assert sent.header("cache-control") == "no-store"
    assert sent.header("link") == '</v7/agents?page=2>; rel="successor-version"'
    problem = sent.json()
    assert (problem["status"], problem["error_code"]) == (410, "API_001")
    assert problem["successor"] == "/v7/agents?page=2"
    assert problem["detail"] == "Version v6 of this API is no longer available."
    assert b"hunter2" not in sent.body


async def test_without_a_successor_the_410_promises_none():
    policy = Versioning(versions={"v6": Version(phase="retired")})
    sent = await drive(stack(policy, app=never), "GET", "/v6/a")
    assert (sent.status, sent.header("link")) == (410, None)
    assert "successor" not in sent.body.decode()


async def test_a_sunset_can_be_announced_only():
    """DP-04: in the past it means any time now."""
    late = datetime(2028, 1, 1, tzinfo=UTC).timestamp()
    sent = await drive(stack(Versioning(versions=VERSIONS, after_sunset="pass"), now=late), "GET", "/v6/a")
    assert (sent.status, sent.header("sunset")) == (200, ANNOUNCED[1])


async def test_a_preview_may_have_a_sunset_too():
    policy = Versioning(versions={"v8": Version(phase="preview", sunset=date(2026, 6, 1))})
    assert (await drive(stack(policy, app=never), "GET", "/v8/a")).status == 410


async def test_a_retired_route():
    policy = Versioning(routes={"GET /v7/a": Version(phase="retired", successor="/v7/b")})
    sent = await drive(stack(policy, app=never), "GET", "/v7/a")
    assert (sent.status, sent.json()["detail"]) == (410, "This operation is no longer available.")
    assert (await drive(stack(policy), "POST", "/v7/a")).status == 200


async def test_head_gets_no_body():
    policy = Versioning(versions={"v6": Version(phase="retired")})
    sent = await drive(stack(policy, app=never), "HEAD", "/v6/a")
    assert (sent.status, sent.body) == (410, b"")


# --- other kinds -----------------------------------------------------------------------------------------------------


async def test_a_stream_is_decorated():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    sent = await drive(stack(app=app), "GET", "/v6/a")
    assert sent.header("deprecation") == ANNOUNCED[0]
    assert [m.get("body") for m in sent.messages] == [None, b"a", b""]


async def test_websockets():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        await send({"type": "websocket.close"})

    accepted = await drive(stack(app=app), path="/v6/ws", kind="websocket")
    assert accepted.header("link") == '</v7/ws>; rel="successor-version"'
    policy = Versioning(versions={"v6": Version(phase="retired", deprecated=date(2026, 1, 1))})
    refused = await drive(stack(policy, app=never), path="/v6/ws", kind="websocket")
    assert (refused.status, refused.header("deprecation")) == (410, "@1767225600")


async def test_an_error_of_the_application_passes():
    async def app(scope, receive, send):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await drive(stack(app=app), "GET", "/v6/a")


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [
        date(2026, 1, 11),
        datetime(2026, 1, 11, tzinfo=UTC),
        datetime(2026, 1, 11, 2, tzinfo=timezone(timedelta(hours=2))),
        "2026-01-11",
        "2026-01-11T00:00:00Z",
        "2026-01-10T23:00:00-01:00",
    ],
    ids=str,
)
def test_moments(moment):
    assert Version(phase="deprecated", deprecated=moment).deprecated == datetime(2026, 1, 11, tzinfo=UTC)


DEPRECATED = {"phase": "deprecated", "deprecated": "2026-01-11"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"versions": {"v6": {**DEPRECATED, "sunset": "2026-01-10"}}}, "cannot be earlier"),
        ({"versions": {"v6": {**DEPRECATED, "sunset": "2026-01-10T23:59:59Z"}}}, "cannot be earlier"),
        ({"versions": {"v6": {**DEPRECATED, "sunset": datetime(2027, 1, 1)}}}, "no time zone"),  # noqa: DTZ001
        ({"versions": {"v6": {**DEPRECATED, "sunset": "2027-01-01T00:00:00"}}}, "no time zone"),
        ({"versions": {"v6": {**DEPRECATED, "sunset": "soon"}}}, "ISO 8601"),
        ({"versions": {"v6": {**DEPRECATED, "sunset": 1_800_000_000}}}, "not int"),
        ({"versions": {"v6": {"phase": "deprecated"}}}, "not since when"),
        ({"versions": {"v6": {"deprecated": "2026-01-11"}}}, "announce it"),
        ({"versions": {"v6": {"phase": "old"}}}, "phase"),
        ({"versions": {"v6": {**DEPRECATED, "successor": "v9"}}}, "neither a known version"),
        ({"versions": {"v6": {**DEPRECATED, "successor": "v6"}}}, "its own successor"),
        ({"versions": {"v6": {**DEPRECATED, "successor": "v5"}, "v5": {"phase": "retired"}}}, "is retired"),
        ({"versions": {"v6": {**DEPRECATED, "successor": "/v7/a?b"}}}, "without '\\?'"),
        ({"versions": {"v6": {**DEPRECATED, "successor": "/v7/{x}"}}}, "does not have"),
        ({"versions": {"v6": {**DEPRECATED, "successor": "/v7/ a"}}}, "successor: route"),
        ({"versions": {"v6": {**DEPRECATED, "info": "a b"}}}, "URI reference"),
        ({"versions": {"v6": {**DEPRECATED, "sunst": "2027-01-01"}}}, "sunst"),
        ({"versions": {"v/6": {}}}, "one path segment"),
        ({"versions": {"": {}}}, "one path segment"),
        ({"versions": {"v6": {}}, "prefix": "api"}, "prefix"),
        ({"versions": {"v6": {}}, "prefix": "/api/"}, "prefix"),
        ({"versions": {"v6": {}}, "routes": {"/v6/**": {}}}, "describe it in versions"),
        ({"versions": {"v6": {}}, "routes": {"GET /a": {"phase": "retired", "successor": "v6"}}}, "below none"),
        ({"routes": {"GET /a": {"phase": "retired", "successor": "/b/**"}}}, "the route does not"),
        ({"routes": {"a": {}}}, "must be 'METHOD /path'"),
        ({"deprecation_style": "date"}, "deprecation_style"),
        ({"after_sunset": "redirect"}, "after_sunset"),
        ({"version": {}}, "version"),
        ({"secret_parameters": ["1"]}, "no word"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    """DP-05"""
    with pytest.raises(ValueError, match=message):
        Versioning(**options)


def test_lifecycles_can_be_data():
    assert (
        Versioning(versions={"v6": {**DEPRECATED, "sunset": "2027-01-11", "successor": "v7"}, "v7": {}}).versions["v6"]
        == V6
    )

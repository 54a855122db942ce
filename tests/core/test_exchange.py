"""What the policies of a stack know of an exchange, and what they may tell each other."""

from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
from starlette.authentication import UnauthenticatedUser
from starlette.requests import Request
from starlette.websockets import WebSocket

from sigil_policy.core.exchange import (
    SCOPE_KEY,
    BodyTooLargeError,
    Exchange,
    Head,
    MissingFactError,
    get_exchange,
    report_tokens,
)
from sigil_policy.core.facts import Principal, TokenUsage
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import DEFAULT_STYLE
from sigil_policy.testing import FrozenClock

pytestmark = pytest.mark.anyio


def exchange(*incoming: Any, kind: str = "http", **scope: Any) -> Exchange:
    waiting = iter(incoming)

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return next(waiting)

    full = {"type": kind, "method": "GET", "path": "/v7/agents", "headers": [], **scope}
    return Exchange(full, receive, FrozenClock(), PLAIN, DEFAULT_STYLE)


# --- request -----------------------------------------------------------------------------------------------------


def test_what_the_request_line_said() -> None:
    ex = exchange(method="POST", path="/v7/ä b", query_string=b"a=%20")
    assert (ex.kind, ex.method, ex.path, ex.query) == ("http", "POST", "/v7/ä b", b"a=%20")
    assert ex.started == FrozenClock().time()


def test_a_websocket_has_a_method_of_its_own() -> None:
    ex = exchange(kind="websocket")
    assert (ex.kind, ex.method, ex.query) == ("websocket", "WEBSOCKET", b"")


@pytest.mark.parametrize(
    ("pairs", "headers", "repeated"),
    [
        ([], {}, {}),
        (None, {}, {}),
        ([(b"a", b"1"), (b"b", b"")], {b"a": b"1", b"b": b""}, {}),
        ([(b"AuthoriZation", b"x")], {b"authorization": b"x"}, {}),
        ([[b"a", b"1"]], {b"a": b"1"}, {}),
        (((b"a", b"1"),), {b"a": b"1"}, {}),
        ([(b"a", b"1"), (b"a", b"2")], {b"a": b"1, 2"}, {b"a": (b"1", b"2")}),
        ([(b"A", b"1"), (b"a", b"2")], {b"a": b"1, 2"}, {b"a": (b"1", b"2")}),
        ([(b"cookie", b"a=1"), (b"cookie", b"b=2")], {b"cookie": b"a=1; b=2"}, {b"cookie": (b"a=1", b"b=2")}),
        ([(b"123", b"1")], {b"123": b"1"}, {}),
    ],
    ids=["none", "null", "plain", "case", "lists", "tuple", "list field", "case of a list field", "cookie", "digits"],
)
def test_headers_by_lower_case_name_and_repeated_ones_joined(pairs: Any, headers: Any, repeated: Any) -> None:
    """AS-08, AS-09, RFC 9110 section 5.3; cookies by RFC 9113 section 8.2.3. Lines that came twice can be told."""
    ex = exchange(headers=pairs)
    assert ex.headers == headers
    assert ex.repeated == repeated


@pytest.mark.parametrize(("given", "client"), [(("203.0.113.7", 1), "203.0.113.7"), (["::1", 2], "::1"), (None, None)])
def test_the_client_is_the_peer_of_the_server(given: Any, client: str | None) -> None:
    """AS-10: a unix socket has none. Headers of proxies are not believed."""
    assert exchange(client=given, headers=[(b"x-forwarded-for", b"6.6.6.6")]).client == client
    assert exchange().client is None


# --- facts and notes ---------------------------------------------------------------------------------------------


class Weather(NamedTuple):
    sky: str


def test_a_fact_is_found_by_its_type_and_the_newest_holds() -> None:
    ex = exchange()
    assert Weather not in ex
    assert ex.get(Weather) is None
    ex.give(Weather("grey"))
    ex.give(Weather("blue"))
    assert Weather in ex
    assert ex[Weather] == ex.get(Weather) == Weather("blue")


def test_a_missing_fact_says_what_to_do() -> None:
    with pytest.raises(MissingFactError) as caught:
        exchange()[Weather]
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith("no policy has given a Weather to this exchange; mount a policy that gives")


def test_equal_owners_keep_separate_notes() -> None:
    ex, one, other = exchange(), [1], [1]
    ex.keep(one, "mine")
    assert ex.note(one) == "mine"
    assert ex.note(other) is None


def test_without_route_tables_there_is_no_rule() -> None:
    assert exchange().rule(object()) is None


# --- who calls ---------------------------------------------------------------------------------------------------


def test_an_authenticated_caller_is_starlettes_user_too() -> None:
    ex = exchange()
    principal = Principal(subject="ada", scopes=frozenset({"agents:read"}))
    ex.authenticate(principal)
    assert ex[Principal] is ex.principal is principal
    request = Request(ex.scope)
    assert request.user is principal
    assert request.user.is_authenticated
    assert "agents:read" in request.auth.scopes
    assert "agents:write" not in request.auth.scopes


def test_nobody_is_an_unauthenticated_user() -> None:
    ex = exchange()
    ex.anonymous()
    request = Request(ex.scope)
    assert isinstance(request.user, UnauthenticatedUser)
    assert list(request.auth.scopes) == []
    assert ex.principal is None


def test_anonymous_does_not_undo_what_another_middleware_knows() -> None:
    auth, user = object(), object()
    ex = exchange(auth=auth, user=user)
    ex.anonymous()
    assert ex.scope["auth"] is auth
    assert ex.scope["user"] is user


def test_who_holds_everything_holds_any_scope() -> None:
    ex = exchange()
    ex.authenticate(Principal(subject="root", scopes=frozenset({"admin"})))
    ex.grant_all()
    assert "anything:at-all" in Request(ex.scope).auth.scopes


# --- the request body --------------------------------------------------------------------------------------------


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_the_body_is_put_together_and_may_be_asked_for_again() -> None:
    ex = exchange(part(b"he", more=True), part(b"", more=True), {"type": "http.request"})
    assert await ex.body(10) == b"he"
    assert await ex.body(2) == b"he"


async def test_a_body_as_large_as_the_limit_is_not_too_large() -> None:
    assert await exchange(part(b"12345")).body(5) == b"12345"


async def test_a_stated_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BodyTooLargeError):
        await exchange(headers=[(b"content-length", b"6")]).body(5)


@pytest.mark.parametrize(
    "length", [b"3", b"nonsense", b"-1", b"9" * 5000], ids=["a lie", "no number", "negative", "huge"]
)
async def test_no_more_is_read_than_shows_that_it_is_too_much(length: bytes) -> None:
    ex = exchange(part(b"123", more=True), part(b"456", more=True), headers=[(b"content-length", length)])
    with pytest.raises(BodyTooLargeError):
        await ex.body(5)
    with pytest.raises(BodyTooLargeError):
        await ex.body(5)


async def test_after_a_refusal_a_larger_limit_goes_on_reading() -> None:
    ex = exchange(part(b"123", more=True), part(b"456", more=True), part(b"7"))
    with pytest.raises(BodyTooLargeError):
        await ex.body(5)
    assert await ex.body(10) == b"1234567"


async def test_a_client_that_leaves_while_sending_ends_disconnected() -> None:
    ex = exchange(part(b"123", more=True), {"type": "http.disconnect"})
    with pytest.raises(ConnectionError):
        await ex.body(100)
    assert ex.outcome == "disconnected"


# --- how it ended ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        ({}, "ok"),
        ({"refused_by": "Scopes"}, "refused"),
        ({"error": ValueError()}, "error"),
        ({"error": TimeoutError()}, "timeout"),
        ({"error": KeyboardInterrupt()}, "cancelled"),
        ({"error": ValueError(), "refused_by": "Scopes"}, "error"),
        ({"gone": True, "error": OSError(), "refused_by": "Scopes"}, "disconnected"),
    ],
)
def test_the_outcome_follows_from_what_is_known(state: Any, outcome: str) -> None:
    """Gone before error before refused before ok."""
    ex = exchange()
    for name, value in state.items():
        setattr(ex, name, value)
    assert ex.outcome == outcome


# --- from an application -----------------------------------------------------------------------------------------


def test_an_application_finds_the_exchange_in_its_request() -> None:
    for kind, source in (("http", Request), ("websocket", WebSocket)):
        ex = exchange(kind=kind)
        ex.scope[SCOPE_KEY] = ex

        async def nothing(*_: Any) -> Any: ...

        given = Request(ex.scope) if source is Request else WebSocket(ex.scope, nothing, nothing)
        assert get_exchange(given) is ex
        assert get_exchange(ex.scope) is ex


def test_without_a_stack_the_error_says_how_to_mount_one() -> None:
    with pytest.raises(LookupError, match="add_middleware"):
        get_exchange({"type": "http"})


def test_reported_tokens_add_up() -> None:
    ex = exchange()
    ex.scope[SCOPE_KEY] = ex
    assert report_tokens(ex.scope, input_tokens=3, output_tokens=4) == TokenUsage(3, 4, 7)
    assert report_tokens(ex.scope, total_tokens=5) == ex[TokenUsage] == TokenUsage(3, 4, 12)


@pytest.mark.parametrize(
    "usage", [{"input_tokens": -1}, {"output_tokens": -1, "input_tokens": 5}, {"total_tokens": -2}]
)
def test_negative_tokens_are_refused(usage: Any) -> None:
    ex = exchange()
    ex.scope[SCOPE_KEY] = ex
    with pytest.raises(ValueError, match="negative"):
        report_tokens(ex.scope, **usage)
    assert ex.get(TokenUsage) is None


# --- heads -------------------------------------------------------------------------------------------------------


def test_a_head_reads_and_changes_in_place() -> None:
    head = Head(200, [(b"Vary", b"a"), [b"vary", b"b"], (b"etag", b"x")])
    assert head.get(b"vary") == b"a"
    assert head.get_all(b"vary") == [b"a", b"b"]
    assert head.get(b"none") is None
    lines = head.headers
    head.replace(b"vary", b"*")
    assert head.headers == [(b"etag", b"x"), (b"vary", b"*")]
    head.remove(b"etag", b"none")
    assert head.headers == [(b"vary", b"*")]
    assert lines is head.headers


def test_a_head_does_not_write_into_what_it_was_given() -> None:
    given = [(b"a", b"1")]
    head = Head(200, given)
    head.headers.append((b"b", b"2"))
    head.replace(b"a", b"3")
    assert given == [(b"a", b"1")]


def test_the_repr_of_a_head_shows_no_values() -> None:
    """Set-Cookie is a secret."""
    assert repr(Head(200, [(b"set-cookie", b"session=s3cret")])) == "Head(200, ['set-cookie'])"

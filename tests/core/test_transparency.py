"""What a stack must not change: an empty one, and one whose policy has every hook and uses none of them.

Row ids (AS-..) are those of the ASGI 3.0 table that the project keeps.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import SCOPE_KEY, Exchange, Head, current_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing import FrozenClock, drive
from sigil_policy.testing.rules import broken_rules

pytestmark = pytest.mark.anyio


class Permissive(Policy):
    """Overrides every hook and lets everything pass."""

    async def on_request(self, ex: Exchange) -> None:
        await anyio.lowlevel.checkpoint()

    def around(self, ex: Exchange) -> Any:
        return contextlib.AsyncExitStack()

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        return True

    async def on_body(self, ex: Exchange, head: Head, body: bytes) -> None:
        await anyio.lowlevel.checkpoint()

    def on_response(self, ex: Exchange, head: Head) -> None:
        pass

    def on_chunk(self, ex: Exchange, chunk: bytes) -> None:
        pass

    def on_error(self, ex: Exchange, error: Exception) -> None:
        pass

    async def on_finish(self, ex: Exchange) -> None:
        await anyio.lowlevel.checkpoint()


class Tag(Policy):
    """Adds one header."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-tag", b"1"))


class Upper(Policy):
    """Wants every body."""

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> bytes:
        return body.upper()


class Answer(Policy):
    """Answers every request itself."""

    def on_request(self, ex: Exchange) -> Reply:
        return Reply(status=403, headers=[(b"content-type", b"text/plain")], body=b"no", code=4403)


class Refuse(Policy):
    def on_request(self, ex: Exchange) -> Any:
        return RATE_EXCEEDED("slow down")


class Endings(Policy):
    """Writes down how each exchange ended."""

    seen: Any

    def on_finish(self, ex: Exchange) -> None:
        self.seen.append(ex.outcome)


def empty(app: Any) -> Any:
    return PolicyStack(app)


def permissive(app: Any) -> Any:
    return PolicyStack(app, [Permissive(), Permissive()], clock=FrozenClock())


def permissive_nested(app: Any) -> Any:
    inner = PolicyStack(app, [Permissive()])

    async def between(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    return PolicyStack(between, [Permissive()])


@pytest.fixture(params=[empty, permissive, permissive_nested], ids=lambda wrap: wrap.__name__)
def wrap(request: pytest.FixtureRequest) -> Any:
    return request.param


def sends(*messages: Any) -> Any:
    """An application that sends exactly these message objects."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
OK = (START, {"type": "http.response.body", "body": b"ok"})


# --- messages ----------------------------------------------------------------------------------------------------

PASSING = {
    "early hint": [{"type": "http.response.early_hint", "links": [b"</a>; rel=preload"]}, *OK],
    "push": [{"type": "http.response.push", "path": "/a.css", "headers": []}, *OK],
    "debug": [{"type": "http.response.debug", "info": {"template": object()}}, *OK],
    "pathsend": [START, {"type": "http.response.pathsend", "path": "/srv/file"}],
    "zerocopysend": [START, {"type": "http.response.zerocopysend", "file": 7, "offset": 1}],
    "trailers": [
        {**START, "trailers": True},
        {"type": "http.response.body", "body": b"ok", "more_body": False},
        {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": True},
        {"type": "http.response.trailers", "headers": [(b"x-end", b"1")]},
    ],
    "unheard of": [*OK, {"type": "acme.future", "value": object()}],
}


@pytest.mark.parametrize("messages", PASSING.values(), ids=PASSING)
async def test_messages_it_does_not_know_pass_as_they_are(wrap: Any, messages: Any) -> None:
    """AS-11, AS-12, AS-13: same objects, same order, unknown keys kept."""
    sent = await drive(wrap(sends(*messages)))
    assert sent.messages == messages
    for ours, theirs in zip(sent.messages, messages, strict=True):
        assert ours is theirs or ours["type"] == "http.response.start"


@pytest.mark.parametrize("name", ["x-unknown", "trailers"])
async def test_keys_it_does_not_know_survive_a_decorated_start(name: str) -> None:
    """AS-11."""
    sent = await drive(PolicyStack(sends({**START, name: True}, {"type": "http.response.body"}), [Tag()]))
    assert sent.start[name] is True
    assert sent.header("x-tag") == "1"


async def test_a_file_sent_by_path_goes_out_untouched_by_who_wants_bodies() -> None:
    """AS-13: what cannot be seen is neither held nor changed, but its head is still decorated."""
    messages = PASSING["pathsend"]
    sent = await drive(PolicyStack(sends(*messages), [Tag(), Upper()]))
    assert sent.messages[1] is messages[1]
    assert sent.header("x-tag") == "1"
    assert len(sent.messages) == 2


async def test_optional_keys_may_be_absent(wrap: Any) -> None:
    """AS-10: no headers, no body, no more_body."""
    sent = await drive(wrap(sends({"type": "http.response.start", "status": 204}, {"type": "http.response.body"})))
    assert sent.status == 204
    assert sent.headers == []
    assert sent.body == b""
    assert not broken_rules(sent.messages)


@pytest.mark.parametrize("shape", [list, tuple, iter, lambda pairs: [list(pair) for pair in pairs]])
async def test_response_headers_of_any_shape_keep_order_and_duplicates(shape: Any) -> None:
    """AS-09: read once, whatever it is."""
    headers = shape([(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])
    app = sends({"type": "http.response.start", "status": 200, "headers": headers}, {"type": "http.response.body"})
    sent = await drive(PolicyStack(app, [Tag(), Upper(), Tag()]))
    assert sent.headers == [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-tag", b"1"), (b"x-tag", b"1")]


async def test_duplicate_set_cookie_survives(wrap: Any) -> None:
    cookies = [(b"set-cookie", b"a=1"), (b"vary", b"accept"), (b"set-cookie", b"b=2"), (b"set-cookie", b"a=1")]
    sent = await drive(wrap(sends({**START, "headers": cookies}, OK[1])))
    assert sent.headers == cookies


async def test_names_of_headers_leave_in_lower_case() -> None:
    """AS-07: also where the application wrote them otherwise."""
    sent = await drive(PolicyStack(sends({**START, "headers": [(b"Content-Type", b"a/b")]}, OK[1]), [Tag()]))
    assert not broken_rules(sent.messages)
    assert sent.headers == [(b"content-type", b"a/b"), (b"x-tag", b"1")]


async def test_messages_of_the_application_are_never_written_to(wrap: Any) -> None:
    """AS-28: an application may send one constant again and again, even a read-only one."""
    start = MappingProxyType({**START, "headers": ((b"a", b"1"),)})
    body = MappingProxyType({"type": "http.response.body", "body": b"x"})
    app = wrap(sends(start, body))
    first, second = await drive(app), await drive(app)
    assert first.messages == second.messages
    assert first.headers == [(b"a", b"1")]


async def test_a_constant_start_is_decorated_afresh_each_time() -> None:
    """AS-28: headers of one exchange never leak into the next."""
    constant, before = OK, deepcopy(OK)
    app = PolicyStack(sends(*constant), [Tag(), Upper()])
    for _ in range(3):
        sent = await drive(app)
        assert sent.header("x-tag") == "1"
        assert sent.body == b"OK"
    assert constant == before


async def test_an_answer_to_head_keeps_its_length_and_its_body_is_left_to_the_server(wrap: Any) -> None:
    """AS-29 (RFC 9110 section 9.3.2): Starlette and others send no body, others do; both pass."""
    for body in (b"hello", b""):
        app = sends({**START, "headers": [(b"content-length", b"5")]}, {"type": "http.response.body", "body": body})
        sent = await drive(wrap(app), "HEAD")
        assert sent.header("content-length") == "5"
        assert sent.body == body


# --- streams -----------------------------------------------------------------------------------------------------


async def test_each_chunk_is_forwarded_before_the_next_is_produced(wrap: Any) -> None:
    arrived: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        for number in range(5):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
            assert len(arrived) == number + 1
        await send({"type": "http.response.body"})

    def on_send(message: Any) -> None:
        if message["type"] == "http.response.body":
            arrived.append(message.get("body", b""))

    assert (await drive(wrap(app), on_send=on_send)).body == b"01234"


@pytest.mark.parametrize("length", [None, b"5"], ids=["no length", "length stated"])
async def test_server_sent_events_are_never_held(length: bytes | None) -> None:
    """Not even an event stream that says its length: the head leaves before the first event is produced."""
    arrived: list[str] = []
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": headers + ([(b"content-length", length)] if length else [])})
        assert arrived == ["http.response.start"]
        await send({"type": "http.response.body", "body": b"data\n", "more_body": False})

    sent = await drive(PolicyStack(app, [Upper()]), on_send=lambda message: arrived.append(message["type"]))
    assert sent.body == b"data\n"


async def test_a_stream_is_released_with_its_first_chunk() -> None:
    """A held head waits for no more than the first body message, however long the next one takes."""
    arrived: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        assert arrived == ["http.response.start", "http.response.body"]
        await send({"type": "http.response.body", "body": b"b"})

    sent = await drive(PolicyStack(app, [Upper()]), on_send=lambda message: arrived.append(message["type"]))
    assert sent.body == b"ab"


# --- scope and receive -------------------------------------------------------------------------------------------


def recording_scope() -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await sends(*OK)(scope, receive, send)

    return app, seen


def http_scope(**more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "GET",
        "path": "/v7/a b",
        "raw_path": b"/v7/a%20b",
        "query_string": b"q=1",
        "headers": [(b"host", b"h"), (b"AuthoriZation", b"x"), (b"cookie", b"a"), (b"cookie", b"b")],
        "extensions": {"http.response.pathsend": {}, "http.response.trailers": {}, "tls": {"v": 1}},
        "state": {"db": 1},
        **more,
    }


async def call(app: Any, scope: Any, incoming: Any = ()) -> list[Any]:
    """One call with exactly this scope; the messages that came out."""
    out: list[Any] = []
    waiting: Iterator[Any] = iter(incoming)

    async def receive() -> Any:
        return next(waiting)

    async def send(message: Any) -> None:
        out.append(message)

    await app(scope, receive, send)
    return out


async def test_the_scope_is_passed_on_itself_and_gains_only_our_key(wrap: Any) -> None:
    """The scope is written in place (this overrides AS-01): routers and servers read what was put in it."""
    app, seen = recording_scope()
    scope = http_scope()
    before, extensions, headers = deepcopy(scope), scope["extensions"], scope["headers"]
    await call(wrap(app), scope)
    assert seen[0] is scope
    assert {key: value for key, value in scope.items() if key != SCOPE_KEY} == before
    assert scope["extensions"] is extensions
    assert scope["headers"] is headers
    assert (SCOPE_KEY in scope) == (wrap is not empty)


async def test_an_authenticated_exchange_writes_user_and_auth_and_nothing_else() -> None:
    class Known(Policy):
        def on_request(self, ex: Exchange) -> None:
            ex.authenticate(Principal(subject="ada", scopes=frozenset({"agents:read"})))

    app, _ = recording_scope()
    scope = http_scope()
    before = set(scope)
    await call(PolicyStack(app, [Known()]), scope)
    assert set(scope) - before == {SCOPE_KEY, "user", "auth"}
    assert scope["user"].display_name == "ada"


@pytest.mark.parametrize(
    "headers",
    [[(b"A", b"1"), (b"a", b"2")], ((b"a", b"1"), [b"b", b"2"]), [], None],
    ids=["mixed case", "tuple", "none sent", "null"],
)
async def test_request_headers_are_never_altered(wrap: Any, headers: Any) -> None:
    """AS-08, AS-09, AS-10."""
    app, seen = recording_scope()
    before = deepcopy(headers)
    await call(wrap(app), http_scope(headers=headers))
    assert seen[0]["headers"] is headers
    assert headers == before


@pytest.mark.parametrize(
    "missing", ["headers", "client", "server", "extensions", "root_path", "raw_path", "state", "asgi"]
)
async def test_a_scope_may_lack_what_asgi_calls_optional(wrap: Any, missing: str) -> None:
    """AS-05, AS-10: Daphne has no state, a unix socket no client."""
    for kind in ("http", "websocket"):
        scope = http_scope(type=kind, client=None, server=None, root_path="", subprotocols=[])
        del scope[missing]
        out = await call(wrap(sends(*OK) if kind == "http" else sends({"type": "websocket.accept"})), scope)
        assert out[0]["type"] in ("http.response.start", "websocket.accept")


async def test_scopes_of_an_unknown_type_are_not_touched(wrap: Any) -> None:
    """AS-02."""
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.extend(arguments)

    given = ({"type": "mqtt"}, object(), object())
    await wrap(app)(*given)
    assert all(one is other for one, other in zip(seen, given, strict=True))
    assert given[0] == {"type": "mqtt"}


async def test_an_empty_stack_calls_the_application_straight() -> None:
    seen: list[Any] = []

    async def app(*arguments: Any) -> None:
        seen.extend(arguments)

    given = (http_scope(), object(), object())
    await PolicyStack(app)(*given)
    assert all(one is other for one, other in zip(seen, given, strict=True))


async def test_nothing_is_received_that_the_application_did_not_ask_for() -> None:
    """AS-21 (RFC 9110 section 10.1.1): a premature receive would answer `Expect: 100-continue`."""

    async def receive() -> Any:
        raise AssertionError("received")

    async def send(message: Any) -> None:
        pass

    for policies in ([Permissive()], [Refuse()], [Answer()]):
        await PolicyStack(sends(*OK), policies)(http_scope(), receive, send)
        websocket = http_scope(type="websocket", subprotocols=[])
        # Refused without waiting for `websocket.connect` (this overrides AS-17): no server needs it.
        await PolicyStack(sends({"type": "websocket.accept"}), policies)(websocket, receive, send)


class Reads(Policy):
    limit: int = 100
    seen: Any

    async def on_request(self, ex: Exchange) -> None:
        self.seen.append(await ex.body(self.limit))


async def test_a_body_that_a_policy_has_read_is_replayed_once() -> None:
    """AS-20: afterwards `receive` is the server's own again, so a disconnect still arrives."""
    got: list[Any] = []
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.extend([await receive(), await receive()])

    incoming = [
        {"type": "http.request", "body": b"he", "more_body": True},
        {"type": "http.request", "body": b"llo"},
        {"type": "http.disconnect"},
    ]
    await call(PolicyStack(app, [Reads(seen=seen), Reads(seen=seen)]), http_scope(), incoming)
    assert seen == [b"hello", b"hello"]
    assert got == [{"type": "http.request", "body": b"hello", "more_body": False}, {"type": "http.disconnect"}]


# --- websockets --------------------------------------------------------------------------------------------------


async def test_frames_pass_as_they_are(wrap: Any) -> None:
    """WS-12, AS-19, AS-31."""
    frames = [
        {"type": "websocket.accept", "subprotocol": "v7", "headers": [(b"a", b"1")]},
        {"type": "websocket.send", "text": "hi", "bytes": None},
        {"type": "websocket.send", "bytes": b"\x00"},
        {"type": "websocket.close", "code": 4401, "reason": "bye"},
    ]
    incoming = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "x"},
        {"type": "websocket.disconnect"},
    ]
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.extend([await receive() for _ in incoming])
        await sends(*frames)(scope, receive, send)

    sent = await drive(wrap(app), kind="websocket", incoming=incoming)
    assert sent.messages == frames
    assert all(one is other for one, other in zip(received, incoming, strict=True))


async def test_a_refused_websocket_gets_a_response_where_the_server_can_send_one() -> None:
    """AS-15, AS-16, WS-01: start and body, and nothing after."""
    sent = await drive(PolicyStack(sends(), [Tag(), Answer()]), kind="websocket")
    assert [message["type"] for message in sent.messages] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (sent.status, sent.body, sent.header("x-tag")) == (403, b"no", "1")
    assert not broken_rules(sent.messages)


@pytest.mark.parametrize("extensions", [{}, None], ids=["none", "null"])
async def test_a_refused_websocket_is_closed_where_the_server_cannot_answer(extensions: Any) -> None:
    """AS-15: a close before accept, which servers turn into 403."""
    stack = PolicyStack(sends(), [Tag(), Answer()])
    sent = await drive(stack, kind="websocket", scope={"extensions": extensions})
    assert sent.messages == [{"type": "websocket.close", "code": 4403, "reason": ""}]


@pytest.mark.parametrize(
    ("version", "tagged"), [("2.0", False), (None, False), ("2.1", True), ("2.10", True), ("3.0", True)]
)
async def test_an_accept_gets_headers_only_where_it_can_have_them(version: str | None, tagged: bool) -> None:
    """AS-18."""
    asgi = {"version": "3.0", "spec_version": version} if version else {"version": "3.0"}
    stack = PolicyStack(sends({"type": "websocket.accept"}), [Tag()])
    sent = await drive(stack, kind="websocket", scope={"asgi": asgi})
    assert (sent.header("x-tag") == "1") == tagged
    assert "status" not in sent.start


# --- frameworks --------------------------------------------------------------------------------------------------

NAME: ContextVar[str] = ContextVar("NAME", default="nobody")


class Names(Policy):
    def on_request(self, ex: Exchange) -> None:
        NAME.set("ada")


class NamesLater(Policy):
    async def on_request(self, ex: Exchange) -> None:
        await anyio.lowlevel.checkpoint()
        NAME.set("ada")


@pytest.mark.parametrize("policy", [Names(), NamesLater()], ids=["plain hook", "awaiting hook"])
@pytest.mark.parametrize("path", ["/sync", "/async"])
async def test_context_variables_set_in_a_hook_reach_the_endpoint(policy: Policy, path: str) -> None:
    """AS-25: no task of our own stands between; `current_exchange` works in sync endpoints too."""

    def sync_endpoint(request: Request) -> PlainTextResponse:
        assert current_exchange() is request.scope[SCOPE_KEY]
        return PlainTextResponse(NAME.get())

    async def async_endpoint(request: Request) -> PlainTextResponse:
        assert current_exchange() is request.scope[SCOPE_KEY]
        return PlainTextResponse(NAME.get())

    app = Starlette(routes=[Route("/sync", sync_endpoint), Route("/async", async_endpoint)])
    app.add_middleware(PolicyStack, policies=[policy])
    assert (await drive(app, path=path)).body == b"ada"
    assert current_exchange() is None


async def test_background_tasks_run_after_the_response_and_before_the_end() -> None:
    """AS-25: `on_finish` waits for them; they run inside the application's call."""
    order: list[str] = []

    class Finishes(Policy):
        def on_finish(self, ex: Exchange) -> None:
            order.append(f"finish {ex.outcome}")

    def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(order.append, "task"))

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(PolicyStack, policies=[Finishes()])
    await drive(app, on_send=lambda message: order.append(message["type"].rpartition(".")[2]))
    assert order == ["start", "body", "task", "finish ok"]


async def test_a_failing_background_task_ends_in_error_after_a_fine_response() -> None:
    endings: list[str] = []

    def fails() -> None:
        raise LookupError("task")

    def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(fails))

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(PolicyStack, policies=[Endings(seen=endings)])
    sent = await drive(app, raise_errors=False)
    assert (sent.status, sent.body, endings) == (200, b"ok", ["error"])
    assert isinstance(sent.error, LookupError)


async def test_a_starlette_stream_arrives_whole() -> None:
    async def parts() -> Any:
        for part in ("a", "b", "c"):
            yield part

    app = Starlette(routes=[Route("/", lambda request: StreamingResponse(parts()))])
    app.add_middleware(PolicyStack, policies=[Permissive(), Tag(), Upper()])
    sent = await drive(app)
    assert (sent.body, sent.header("x-tag")) == (b"abc", "1")
    assert not broken_rules(sent.messages)


# --- lifespan ----------------------------------------------------------------------------------------------------

LIFESPAN = ({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})


async def test_lifespan_passes(wrap: Any) -> None:
    """AS-03: the application gets every event and its answers reach the server, state included."""
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for name in ("startup", "shutdown"):
            received.append(await receive())
            scope["state"][name] = True
            await send({"type": f"lifespan.{name}.complete"})

    state: dict[str, Any] = {}
    out = await call(wrap(app), {"type": "lifespan", "asgi": {"version": "3.0"}, "state": state}, LIFESPAN)
    assert received == list(LIFESPAN)
    assert [message["type"] for message in out] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert state == {"startup": True, "shutdown": True}


async def test_a_failed_startup_passes(wrap: Any) -> None:
    failed = {"type": "lifespan.startup.failed", "message": "no database"}
    assert await call(wrap(sends(failed)), {"type": "lifespan"}, LIFESPAN) == [failed]


async def test_an_application_without_lifespan_says_so_as_it_always_did(wrap: Any) -> None:
    """AS-04: it raises, and the server goes on without."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "no lifespan here"
        await sends(*OK)(scope, receive, send)

    stack = wrap(app)
    with pytest.raises(AssertionError, match="no lifespan here"):
        await call(stack, {"type": "lifespan"}, LIFESPAN)
    assert (await drive(stack)).body == b"ok"


# --- errors and endings ------------------------------------------------------------------------------------------


async def test_an_error_that_nobody_answers_comes_out_itself(wrap: Any) -> None:
    """AS-23: the engine has no answer of its own."""
    error = LookupError("app")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    sent = await drive(wrap(app), raise_errors=False)
    assert sent.error is error
    assert sent.messages == []


class Apologises(Policy):
    reraise: bool = False

    def on_error(self, ex: Exchange, error: Exception) -> Reply:
        return Reply(status=500, body=b"sorry", reraise=self.reraise)


@pytest.mark.parametrize("reraise", [False, True])
async def test_an_error_before_the_start_is_answered_once(reraise: bool) -> None:
    """AS-23."""
    error = LookupError("app")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    stack = PolicyStack(app, [Apologises(), Tag(), Apologises(reraise=reraise)])
    sent = await drive(stack, raise_errors=False)
    assert (sent.status, sent.body, sent.header("x-tag")) == (500, b"sorry", "1")
    assert sent.error is (error if reraise else None)
    assert not broken_rules(sent.messages)


async def test_an_error_after_the_start_is_only_raised() -> None:
    """AS-23."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        raise LookupError("app")

    sent = await drive(PolicyStack(app, [Apologises()]), raise_errors=False)
    assert sent.messages == [START]
    assert isinstance(sent.error, LookupError)


async def test_a_broken_connection_is_not_answered() -> None:
    """AS-22: what `send` raises reaches the application and comes out again, and the exchange ends disconnected."""
    endings: list[str] = []

    def on_send(message: Any) -> None:
        raise OSError("gone")

    stack = PolicyStack(sends(*OK), [Endings(seen=endings), Apologises()])
    sent = await drive(stack, on_send=on_send, raise_errors=False)
    assert isinstance(sent.error, OSError)
    assert sent.messages == []
    assert endings == ["disconnected"]


async def _normal(scope: Any, receive: Any, send: Any) -> None:
    await sends(*OK)(scope, receive, send)


async def _raises(scope: Any, receive: Any, send: Any) -> None:
    raise LookupError("app")


async def _times_out(scope: Any, receive: Any, send: Any) -> None:
    raise TimeoutError


async def _hangs(scope: Any, receive: Any, send: Any) -> None:
    scope["cancel"].cancel()
    await anyio.sleep_forever()


async def _hears_the_client_leave(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _long_poll_after_the_end(scope: Any, receive: Any, send: Any) -> None:
    await sends(*OK)(scope, receive, send)
    await _hears_the_client_leave(scope, receive, send)


ENDINGS = {
    "normal": (_normal, "ok"),
    "error": (_raises, "error"),
    "timeout": (_times_out, "timeout"),
    "cancelled": (_hangs, "cancelled"),
    "disconnected": (_hears_the_client_leave, "disconnected"),
    "left after the end": (_long_poll_after_the_end, "ok"),
}


@pytest.mark.parametrize(("app", "outcome"), ENDINGS.values(), ids=ENDINGS)
async def test_on_finish_runs_once_and_knows_how_it_ended(app: Any, outcome: str) -> None:
    """AS-24: each policy, whatever it and the others do, with and without awaiting."""
    seen: list[str] = []

    class Later(Policy):
        async def on_finish(self, ex: Exchange) -> None:
            await anyio.lowlevel.checkpoint()
            seen.append(ex.outcome)

    stack = PolicyStack(app, [Endings(seen=seen), Permissive(), Later(), Endings(seen=seen)])
    incoming = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]
    with anyio.CancelScope() as cancelling:
        await drive(stack, incoming=incoming, scope={"cancel": cancelling}, raise_errors=False)
    assert cancelling.cancelled_caught == (outcome == "cancelled")
    assert seen == [outcome] * 3


async def test_a_client_that_left_unnoticed_ends_ok() -> None:
    """A server that sends silently into nothing gives no sign: nobody can know."""
    seen: list[str] = []
    await drive(PolicyStack(_normal, [Endings(seen=seen)]))
    assert seen == ["ok"]


async def test_a_refusal_is_an_ending_too_and_names_who_refused() -> None:
    seen: list[Any] = []

    class Watches(Policy):
        def on_finish(self, ex: Exchange) -> None:
            seen.append((ex.outcome, ex.refused_by, ex.status))

    await drive(PolicyStack(_normal, [Watches(), Refuse(), Watches()]))
    assert seen == [("refused", "Refuse", 429)], "a policy whose turn never came is not finished"


async def test_an_awaiting_on_finish_is_bounded_in_time(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    class Stuck(Policy):
        async def on_finish(self, ex: Exchange) -> None:
            await anyio.sleep_forever()

    with anyio.fail_after(60):
        await drive(PolicyStack(_normal, [Endings(seen=seen), Stuck()], finish_timeout=0.01))
    assert seen == ["ok"]
    assert "Stuck" in caplog.text


async def test_an_awaiting_on_finish_survives_cancellation() -> None:
    seen: list[str] = []

    class Settles(Policy):
        async def on_finish(self, ex: Exchange) -> None:
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            seen.append(ex.outcome)

    with anyio.CancelScope() as cancelling:
        await drive(PolicyStack(_hangs, [Settles()]), scope={"cancel": cancelling})
    assert seen == ["cancelled"]


async def test_a_failing_on_finish_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    class Fails(Policy):
        def on_finish(self, ex: Exchange) -> None:
            raise LookupError("settling failed")

    class FailsLater(Policy):
        async def on_finish(self, ex: Exchange) -> None:
            raise LookupError("settling failed")

    sent = await drive(PolicyStack(_normal, [Endings(seen=seen), Fails(), FailsLater()]))
    assert (sent.body, seen) == (b"ok", ["ok"])
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


@pytest.mark.parametrize("place", ["await in the application", "await in send"])
def test_a_coroutine_that_is_closed_from_outside_still_finishes(place: str) -> None:
    """An event loop that is torn down closes what still waits: `on_finish` runs, and nothing is awaited any more."""
    seen: list[str] = []

    class Later(Policy):
        async def on_finish(self, ex: Exchange) -> None:
            raise AssertionError("awaited while closing")

    class Suspend:
        def __await__(self) -> Any:
            yield

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if place == "await in the application":
            await Suspend()
        await send(START)

    async def send(message: Any) -> None:
        await Suspend()

    coroutine = PolicyStack(app, [Endings(seen=seen), Later(), Tag()])(http_scope(), None, send)
    coroutine.send(None)
    coroutine.close()
    assert seen == ["cancelled"]


def test_one_stack_serves_event_loops_one_after_the_other() -> None:
    """AS-30: nothing of a stack is bound to a loop."""
    stack = PolicyStack(_normal, [Permissive(), Tag()])

    async def once() -> bytes:
        return (await drive(stack)).body

    assert [anyio.run(once, backend=backend) for backend in ("asyncio", "trio", "asyncio")] == [b"ok"] * 3


async def test_exchanges_at_the_same_time_do_not_mix() -> None:
    notes: dict[str, Any] = {}

    class Remembers(Policy):
        def on_request(self, ex: Exchange) -> None:
            ex.keep(self, ex.path)

        def on_response(self, ex: Exchange, head: Head) -> None:
            head.headers.append((b"x-path", ex.note(self).encode()))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        await sends(*OK)(scope, receive, send)

    stack = PolicyStack(app, [Remembers()])

    async def one(path: str) -> None:
        notes[path] = (await drive(stack, path=path)).header("x-path")

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, f"/{number}")
    assert all(path == noted for path, noted in notes.items())
    assert len(notes) == 20

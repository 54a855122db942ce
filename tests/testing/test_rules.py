"""The validator fails on what ASGI forbids and on nothing else; AS-.. and WS-.. are rows of the project's tables."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.testing import ProtocolViolation, broken_rules, connect, drive, validated

pytestmark = pytest.mark.anyio

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
BODY = {"type": "http.response.body", "body": b"ok"}
PART = {**BODY, "more_body": True}
ACCEPT = {"type": "websocket.accept"}
DENY = {"type": "websocket.http.response.start", "status": 403, "headers": []}
DENIED = {"type": "websocket.http.response.body", "body": b"no"}
CLOSE = {"type": "websocket.close", "code": 1000}


def sends(*messages: Any, first: int = 0) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(first):
            await receive()
        for message in messages:
            await send(message)

    return validated(app)


def start(**changes: Any) -> dict[str, Any]:
    return {**START, **changes}


def headers(*pairs: Any) -> dict[str, Any]:
    return start(headers=list(pairs))


ALL = {
    "extensions": {
        f"http.response.{name}": {} for name in ("trailers", "push", "early_hint", "pathsend", "zerocopysend", "debug")
    }
}
TRAILERS = {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")]}

FORBIDDEN_HTTP = {
    "AS-06 no start": ([BODY], "before the response was started"),
    "AS-06 two starts": ([START, START, BODY], "a second start"),
    "AS-06 after the last body": ([START, BODY, BODY], "after the response was complete"),
    "AS-06 a start after the end": ([START, BODY, START], "a second start"),
    "AS-06 no end": ([START, PART], "before the response was complete"),
    "AS-06 no answer": ([], "returned without a response"),
    "AS-07 name is text": ([headers(("x-a", b"1")), BODY], "not a pair of bytes"),
    "AS-07 value is text": ([headers((b"x-a", "1")), BODY], "not a pair of bytes"),
    "AS-07 capitals": ([headers((b"X-A", b"1")), BODY], "not lower-case"),
    "AS-07 no pair": ([headers((b"x-a",)), BODY], "is no pair"),
    "AS-07 a mapping": ([start(headers={b"x-a": b"1"}), BODY], "pairs of bytes, not a dict"),
    "pseudo header": ([headers((b":status", b"200")), BODY], "pseudo header"),
    "no token": ([headers((b"x a", b"1")), BODY], "no token"),
    "response splitting": ([headers((b"x-a", b"1\r\nset-cookie: a=b")), BODY], "CR, LF or NUL"),
    "status is text": ([start(status="200"), BODY], "status is an int"),
    "status is true": ([start(status=True), BODY], "status is an int"),
    "status 99": ([start(status=99), BODY], "none of 100 to 599"),
    "no status": ([{"type": "http.response.start"}, BODY], "status is an int, not None"),
    "body is text": ([START, {**BODY, "body": "ok"}], "body is a bytes"),
    "more_body is text": ([START, {**BODY, "more_body": "no"}], "more_body is a bool"),
    "body is None": ([START, {**BODY, "body": None}], "body is a bytes"),
    "too long": ([headers((b"content-length", b"1")), BODY], "2 bytes of content, and content-length is 1"),
    "too short": ([headers((b"content-length", b"3")), BODY], "2 bytes of content, and content-length is 3"),
    "content in a 204": ([start(status=204), BODY], "content in a 204"),
    "content in a 304": ([start(status=304), BODY], "content in a 304"),
    "another kind": ([ACCEPT], "no message that the application may send"),
    "unknown": ([START, {"type": "http.response.unknown"}, BODY], "no message that the application may send"),
    "no dict": (["http.response.start"], "is no message"),
    "no type": ([{"status": 200}], "is no message"),
    "AS-14 push": ([{"type": "http.response.push", "path": "/"}, START, BODY], "not offered this extension"),
    "AS-14 pathsend": ([START, {"type": "http.response.pathsend", "path": "/x"}], "not offered this extension"),
    "AS-12 trailers": ([start(trailers=True), BODY, TRAILERS], "not offered this extension"),
    "headers are None": ([start(headers=None), BODY], "pairs of bytes, not a NoneType"),
    "headers are a number": ([start(headers=5), BODY], "pairs of bytes, not a int"),
    "interim": ([start(status=103), BODY], "is interim"),
}

FORBIDDEN_EXTENSIONS = {
    "AS-12 before the body ends": ([start(trailers=True), PART, TRAILERS], "that is started"),
    "AS-12 not announced": ([START, BODY, TRAILERS], "that is complete"),
    "AS-12 promised and not sent": ([start(trailers=True), BODY], "before the trailers"),
    "AS-12 a body after the last": ([start(trailers=True), BODY, BODY], "only trailers follow"),
    "AS-12 twice": ([start(trailers=True), BODY, TRAILERS, TRAILERS], "that is complete"),
    "AS-13 a hint too late": (
        [START, {"type": "http.response.early_hint", "links": []}, BODY],
        "after the response was",
    ),
    "AS-13 pathsend after a part": ([START, PART, {"type": "http.response.pathsend", "path": "/x"}], "after a part"),
    "AS-13 pathsend without path": ([START, {"type": "http.response.pathsend"}], "path is missing"),
    "AS-13 pathsend of a relative path": (
        [START, {"type": "http.response.pathsend", "path": "x"}],
        "is not absolute",
    ),
    "AS-13 pathsend after a copy": (
        [
            START,
            {"type": "http.response.zerocopysend", "file": 1, "more_body": True},
            {"type": "http.response.pathsend", "path": "/x"},
        ],
        "after a part",
    ),
    "AS-13 zerocopysend of nothing": ([START, {"type": "http.response.zerocopysend"}], "file is missing"),
    "AS-13 zerocopysend from a text": (
        [START, {"type": "http.response.zerocopysend", "file": 1, "offset": "0"}],
        "offset is a int",
    ),
    "AS-13 push of nothing": ([{"type": "http.response.push", "headers": []}, START, BODY], "path is missing"),
    "AS-13 a hint of nothing": ([{"type": "http.response.early_hint"}, START, BODY], "links is missing"),
    "AS-13 a hint of texts": (
        [{"type": "http.response.early_hint", "links": ["</a>"]}, START, BODY],
        "links are byte strings",
    ),
    "AS-13 debug without info": ([{"type": "http.response.debug"}, START, BODY], "info is missing"),
    "AS-13 pathsend, then body": ([START, {"type": "http.response.pathsend", "path": "/x"}, BODY], "was complete"),
}


@pytest.mark.parametrize(("messages", "words"), FORBIDDEN_HTTP.values(), ids=FORBIDDEN_HTTP)
async def test_a_response_that_asgi_forbids(messages: Any, words: str) -> None:
    with pytest.raises(ProtocolViolation, match=words):
        await drive(sends(*messages))


@pytest.mark.parametrize(("messages", "words"), FORBIDDEN_EXTENSIONS.values(), ids=FORBIDDEN_EXTENSIONS)
async def test_extensions_that_are_used_wrongly(messages: Any, words: str) -> None:
    with pytest.raises(ProtocolViolation, match=words):
        await drive(sends(*messages), scope=ALL)


ALLOWED_HTTP = {
    "plain": ([START, BODY], {}),
    "no headers": ([{"type": "http.response.start", "status": 200}, BODY], {}),
    "headers are tuples of lists": ([start(headers=([b"a", b"1"],)), BODY], {}),
    "no body": ([START, {"type": "http.response.body"}], {}),
    "parts": ([START, PART, PART, BODY], {}),
    "AS-11 further keys": ([start(x=1), {**BODY, "y": 2}], {}),
    "AS-11 trailers that nobody has offered": ([start(trailers=True), BODY], {}),
    "AS-12 trailers": ([start(trailers=True), PART, BODY, {**TRAILERS, "more_trailers": True}, TRAILERS], ALL),
    "AS-13 hint": ([{"type": "http.response.early_hint", "links": [b"</a>"]}, START, BODY], ALL),
    "AS-13 push": ([{"type": "http.response.push", "path": "/", "headers": []}, START, BODY], ALL),
    "AS-13 debug": ([{"type": "http.response.debug", "info": {}}, START, BODY], ALL),
    "AS-13 pathsend": ([headers((b"content-length", b"9")), {"type": "http.response.pathsend", "path": "/x"}], ALL),
    "AS-13 zerocopysend": (
        [
            headers((b"content-length", b"9")),
            PART,
            {"type": "http.response.zerocopysend", "file": 1, "more_body": True},
            {"type": "http.response.zerocopysend", "file": 1},
        ],
        ALL,
    ),
    "an extension of somebody else": ([{"type": "acme.push"}, START, BODY], {"extensions": {"acme.push": {}}}),
    "AS-29 a body for a HEAD": ([headers((b"content-length", b"9")), BODY], {"method": "HEAD"}),
    "a 304 with a length": ([{**headers((b"content-length", b"9")), "status": 304}, {**BODY, "body": b""}], {}),
    "a length that is none": ([headers((b"content-length", b"x")), BODY], {}),
    "a memoryview": ([START, {**BODY, "body": memoryview(b"ok")}], {}),
    "AS-10 nearly no scope": ([START, BODY], {"headers": None, "state": None, "extensions": None, "raw_path": None}),
    "AS-08 capitals in the request": ([START, BODY], {"headers": [(b"Accept", b"*/*")]}),
    "AS-09 headers that are read once": ([START, BODY], {"headers": iter([[b"accept", b"*/*"]])}),
}


@pytest.mark.parametrize(("messages", "scope"), ALLOWED_HTTP.values(), ids=ALLOWED_HTTP)
async def test_a_response_that_asgi_allows(messages: Any, scope: Any) -> None:
    assert (await drive(sends(*messages), scope=scope)).messages == messages


FORBIDDEN_WEBSOCKET = {
    "AS-15 denied where nobody offers it": ([DENY, DENIED], {"extensions": {}}, "not offered this extension"),
    "AS-16 after a denial": ([DENY, DENIED, CLOSE], {}, "after the handshake was denied"),
    "AS-16 in a denial": ([DENY, CLOSE], {}, "after the handshake was denied"),
    "AS-16 accepted before": ([ACCEPT, DENY], {}, "after websocket.accept"),
    "a denial without an end": ([DENY], {}, "before the response was complete"),
    "AS-18 headers on an old server": (
        [{**ACCEPT, "headers": [(b"x-a", b"1")]}, CLOSE],
        {"asgi": {"version": "3.0", "spec_version": "2.0"}},
        "spec_version 2.1",
    ),
    "AS-18 subprotocol in a header": (
        [{**ACCEPT, "headers": [(b"sec-websocket-protocol", b"chat")]}, CLOSE], {}, "not by a header",
    ),
    "AS-18 reason on an old server": (
        [ACCEPT, {**CLOSE, "reason": "why"}], {"asgi": {"version": "3.0", "spec_version": "2.2"}}, "spec_version 2.3",
    ),
    "AS-19 neither": ([ACCEPT, {"type": "websocket.send"}], {}, "exactly one of bytes and text"),
    "AS-19 both": ([ACCEPT, {"type": "websocket.send", "text": "", "bytes": b""}], {}, "exactly one of bytes and text"),
    "AS-19 text is bytes": ([ACCEPT, {"type": "websocket.send", "text": b"a"}], {}, "text is a str"),
    "before accept": ([{"type": "websocket.send", "text": "a"}], {}, "before websocket.accept"),
    "two accepts": ([ACCEPT, ACCEPT], {}, "a second one"),
    "after close": ([ACCEPT, CLOSE, {"type": "websocket.send", "text": "a"}], {}, "after websocket.close"),
    "two closes": ([ACCEPT, CLOSE, CLOSE], {}, "after websocket.close"),
    "no answer": ([], {}, "without an answer to the handshake"),
    "WS-04 not offered": ([{**ACCEPT, "subprotocol": "chat"}, CLOSE], {"subprotocols": ["soap"]}, "has not offered"),
    "WS-05 1005": ([ACCEPT, {**CLOSE, "code": 1005}], {}, "in no close frame"),
    "WS-05 1006": ([ACCEPT, {**CLOSE, "code": 1006}], {}, "in no close frame"),
    "WS-05 2000": ([ACCEPT, {**CLOSE, "code": 2000}], {}, "in no close frame"),
    "WS-05 5000": ([ACCEPT, {**CLOSE, "code": 5000}], {}, "in no close frame"),
    "WS-07 a long reason": ([ACCEPT, {**CLOSE, "reason": "\u00e4" * 62}], {}, "over 123 bytes"),
    "a reason that is no text": ([ACCEPT, {**CLOSE, "reason": ["why"]}], {}, "reason is a str"),
    "an answer of HTTP": ([START], {}, "no message that the application may send"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "scope", "words"), FORBIDDEN_WEBSOCKET.values(), ids=FORBIDDEN_WEBSOCKET)
async def test_a_websocket_that_asgi_forbids(messages: Any, scope: Any, words: str) -> None:
    with pytest.raises(ProtocolViolation, match=words):
        await drive(sends(*messages, first=1), kind="websocket", scope=scope)


ALLOWED_WEBSOCKET = {
    "closed": ([ACCEPT, CLOSE], {}),
    "left open": ([ACCEPT], {}),
    "refused": ([{"type": "websocket.close"}], {}),
    "denied": ([DENY, {**DENIED, "more_body": True}, DENIED], {}),
    "headers": ([{**ACCEPT, "headers": [(b"x-a", b"1")], "subprotocol": "chat"}], {"subprotocols": ["chat"]}),
    "None beside text": ([ACCEPT, {"type": "websocket.send", "text": "a", "bytes": None}], {}),
    "4401": ([ACCEPT, {**CLOSE, "code": 4401, "reason": "\u00e4" * 61}], {}),
    "1013": ([{**CLOSE, "code": 1013, "reason": None}], {}),
    "no version": ([{**ACCEPT, "headers": [(b"x-a", b"1")]}], {"asgi": None}),
    "empty words on an old server": (
        [{**ACCEPT, "headers": []}, {**CLOSE, "reason": ""}], {"asgi": {"version": "3.0", "spec_version": "2.0"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "scope"), ALLOWED_WEBSOCKET.values(), ids=ALLOWED_WEBSOCKET)
async def test_a_websocket_that_asgi_allows(messages: Any, scope: Any) -> None:
    assert (await drive(sends(*messages, first=1), kind="websocket", scope=scope)).messages == messages


SERVERS_FAULTS = {
    "a body after the last part": (
        "http", [{"type": "http.request"}, {"type": "http.request", "body": b"x"}], "after the last part",
    ),
    "a body after the disconnect": (
        "http", [{"type": "http.disconnect"}, {"type": "http.request"}], "after http.disconnect",
    ),
    "a body that is text": ("http", [{"type": "http.request", "body": "x"}], "body is a bytes"),
    "a response": ("http", [START], "no message that the server may send"),
    "AS-17 a message before connect": ("websocket", [{"type": "websocket.receive", "text": "a"}], "before websocket"),
    "a message before accept": (
        "websocket", [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "a"}], "has accepted",
    ),
    "two connects": ("websocket", [{"type": "websocket.connect"}] * 2, "a second one"),
    "a message after a handshake that was refused": (
        "refused", [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "a"}], "has accepted",
    ),
    "AS-31 a message after disconnect": (
        "websocket",
        [{"type": "websocket.connect"}, {"type": "websocket.disconnect"}, {"type": "websocket.receive", "text": "a"}],
        "after websocket.disconnect",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "incoming", "words"), SERVERS_FAULTS.values(), ids=SERVERS_FAULTS)
async def test_what_a_server_or_an_outer_middleware_must_not_hand_on(kind: str, incoming: Any, words: str) -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(CLOSE)
        await receive()

    app = validated(refuses) if kind == "refused" else sends(START, BODY, first=len(incoming))
    with pytest.raises(ProtocolViolation, match=words):
        await drive(app, kind="http" if kind == "http" else "websocket", incoming=incoming)


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        ({"method": None}, "method is missing"),
        ({"method": "get"}, "not upper-case"),
        ({"path": b"/"}, "path is a str"),
        ({"query_string": ""}, "query_string is a bytes"),
        ({"headers": {"a": "b"}}, "pairs of bytes"),
        ({"headers": [("a", "b")]}, "not a pair of bytes"),
        ({"headers": [5, b"ab"]}, "not a pair of bytes"),
        ({"extensions": ["x"]}, "extensions is a Mapping"),
    ],
)
async def test_a_scope_that_asgi_forbids(scope: Any, words: str) -> None:
    with pytest.raises(ProtocolViolation, match=words):
        await drive(sends(START, BODY), scope=scope)


async def test_a_scope_of_another_kind_passes_untouched() -> None:
    """AS-02."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    scope = {"type": "mqtt"}
    await validated(app)(scope, 1, 2)
    assert seen == [(scope, 1, 2)] and seen[0][0] is scope


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["startup.complete"], None),
        (["startup.failed"], None),
        (["startup.complete", "startup.complete"], "a second answer"),
        (["shutdown.complete"], "before lifespan.shutdown was received"),
        (["startup.started"], "no message that the application may send"),
    ],
)
async def test_a_lifespan(given: Any, words: str | None) -> None:
    """AS-03."""
    messages = [{"type": f"lifespan.{name}"} for name in given]
    app, incoming = sends(*messages, first=1), [{"type": "lifespan.startup"}]
    if words is None:
        assert len((await drive(app, kind="lifespan", incoming=incoming)).messages) == 1
    else:
        with pytest.raises(ProtocolViolation, match=words):
            await drive(app, kind="lifespan", incoming=incoming)


async def test_an_application_that_raises_breaks_no_rule() -> None:
    """AS-04, AS-23: also in a lifespan, and in the middle of a response."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send(START)
        raise KeyError(scope["type"])

    for kind in ("http", "websocket", "lifespan"):
        with pytest.raises(KeyError):
            await drive(validated(app), kind=kind)


async def test_a_client_that_has_left_waits_for_nothing() -> None:
    """AS-22: neither is the OSError of a send a violation, nor that the response ends there."""

    async def leaves(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(START)

    await drive(validated(leaves), incoming=[{"type": "http.disconnect"}])

    def gone(message: Any) -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        await drive(sends(START, BODY), on_send=gone)


async def test_a_violation_that_somebody_swallows_is_raised_at_the_end() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send(BODY)
        except Exception:
            await send(START)
            await send(BODY)

    with pytest.raises(ProtocolViolation, match="before the response was started"):
        await drive(validated(app))
    stack = PolicyStack(validated(sends(BODY).app), policies=[Problems()])
    with pytest.raises(ProtocolViolation, match="before the response was started"):
        await drive(stack)


async def test_headers_that_can_be_read_once_reach_the_server() -> None:
    """ASGI says "iterable": judging them must not use them up."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(headers=(pair for pair in [(b"x-a", b"1"), (b"content-length", b"2")])))
        await send(BODY)

    sent = await drive(validated(validated(app)))
    assert list(sent.start["headers"]) == [(b"x-a", b"1"), (b"content-length", b"2")]
    assert broken_rules([start(headers=iter([(b"content-length", b"1")])), BODY], scope={"type": "http"})


async def test_names_in_mixed_case_are_forgiven_by_option() -> None:
    """Django sends them, and servers take them."""
    app = sends(headers((b"Content-Type", b"text/plain")), BODY)
    app.lower_case = False
    await drive(app)


def test_messages_alone_are_judged_by_the_same_rules() -> None:
    assert not broken_rules([START, BODY])
    assert not broken_rules([])
    assert not broken_rules([START, {"type": "http.response.pathsend", "path": "/x"}]), "who knows what was offered"
    assert broken_rules([START, BODY, BODY]) == [
        "message 2: http.response.body: after the response was complete (ASGI HTTP, Response Body)"
    ]
    assert broken_rules([{"type": "mqtt.start"}])
    nonsense: Any = [{"type": 5}], ["http.response.start"], [None], [{}], [START, None]
    assert all(broken_rules(messages) for messages in nonsense)
    scope = {"type": "http", "method": "GET", "path": "/"}
    assert broken_rules([headers((b"content-length", b"1")), BODY], scope=scope)


def test_frameworks_break_no_rule(tmp_path: Any) -> None:
    """Starlette, also behind a stack: every response that it has, a mount, a WebSocket, a lifespan, HEAD and 405."""
    file = tmp_path / "file.txt"
    file.write_text("x" * 100_000)

    async def home(request: Any) -> Any:
        return PlainTextResponse("ok")

    async def stream(request: Any) -> Any:
        return StreamingResponse(iter([b"a", b"b"]))

    async def download(request: Any) -> Any:
        return FileResponse(file)

    async def echo(socket: Any) -> None:
        await socket.accept(subprotocol="chat", headers=[(b"x-a", b"1")])
        await socket.send_text(await socket.receive_text())
        await socket.close(4000, "done")

    routes = [Route("/", home), Route("/stream", stream), Route("/file", download), WebSocketRoute("/ws", echo)]
    app = Starlette(routes=[*routes, Mount("/sub", Starlette(routes=routes))])
    for wrapped in (validated(app), validated(PolicyStack(validated(app), [RequestID(), Problems()]))):
        with TestClient(wrapped) as client:
            for prefix in ("", "/sub"):
                for path in ("/", "/stream", "/file", "/nowhere"):
                    for method in ("GET", "HEAD", "POST"):
                        client.request(method, prefix + path)
                assert client.get(f"{prefix}/file", headers={"range": "bytes=0-9,20-29"}).status_code == 206
                with client.websocket_connect(f"{prefix}/ws", subprotocols=["chat"]) as socket:
                    socket.send_text("hello")
                    assert socket.receive_text() == "hello"


async def test_fastapi_breaks_no_rule() -> None:
    import fastapi

    app = fastapi.FastAPI()

    @app.get("/items/{number}")
    def read(number: int) -> dict[str, int]:
        return {"number": number}

    for path, status in (("/items/1", 200), ("/items/x", 422), ("/openapi.json", 200), ("/docs", 200)):
        assert (await drive(validated(app), path=path)).status == status


async def test_a_conversation_is_judged_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(ACCEPT)
        await receive()
        await send({"type": "websocket.send"})

    with pytest.raises(ProtocolViolation, match="exactly one"):  # noqa: PT012  the block is what is judged
        async with connect(validated(app)) as socket:
            await socket.accepted()
            await socket.send_text("hello")
            await socket.receive()

"""Bodies that are too large, announced or not."""

import socket
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sigil_policy.core.catalogue import CREDENTIALS_MISSING
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.stack import PolicyStack
from sigil_policy.middleware import BodyLimitMiddleware
from sigil_policy.policies.body_limit import BodyLimit
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.timeout import Timeout
from sigil_policy.testing import check_policy, connect, drive, validated
from tests.served import on_uvicorn

pytestmark = pytest.mark.anyio

CHUNKED = {"transfer-encoding": "chunked"}
HTTP_2 = {"http_version": "2"}


class Echo:
    """Answers with the length of the body; knows what it was handed."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0
        while True:
            message = await receive()
            self.heard.append(message)
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        said = b"%d" % size
        head = [(b"content-length", b"%d" % len(said))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else said})


def stack(app: Any = None, **options: Any) -> Any:
    return validated(PolicyStack(app or Echo(), [RequestID(), Problems(), BodyLimit(**{"limit": 10, **options})]))


def announced(size: int) -> dict[str, str]:
    return {"content-length": str(size)}


async def test_a_body_within_the_limit_arrives_as_it_comes() -> None:
    app = Echo()
    sent = await drive(stack(app), "POST", headers=announced(10), body=[b"12345", b"67890"])
    assert (sent.status, sent.body) == (200, b"10")
    assert [message["body"] for message in app.heard] == [b"12345", b"67890"]


@pytest.mark.parametrize("length", ["11", "99999999999999999999999999", "00000000000000000000005"])
async def test_an_announced_body_over_the_limit_is_refused_unread(length: str) -> None:
    app = Echo()
    sent = await drive(stack(app), "POST", headers={"content-length": length}, incoming=[])
    body = sent.json()
    assert (sent.status, body["error_code"], body["title"]) == (413, "REQ_003", "RequestTooLargeError")
    assert body["max_bytes"] == 10
    assert body["request_id"] == sent.header("x-request-id")
    assert sent.header("connection") == "close"
    assert app.heard == []


@pytest.mark.parametrize(
    ("headers", "scope"),
    [
        (CHUNKED, {}),
        ({}, HTTP_2),
        ({}, {"http_version": "1.1"}),
        (CHUNKED | announced(3), {}),
        ({"content-length": "3, 3"}, {}),
        ({"content-length": "+3"}, {}),
        ({"content-length": "\xb2"}, {}),
    ],
)
async def test_a_body_that_is_not_announced_is_counted(headers: dict[str, str], scope: dict[str, Any]) -> None:
    app = Echo()
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    raw = PolicyStack(app, [Problems(), BodyLimit(limit=10)])
    sent = await drive(raw, "POST", headers=pairs, body=[b"12345", b"67890"], scope=scope)
    assert (sent.status, sent.body) == (200, b"10")
    app.heard.clear()
    taken: list[bytes] = []

    def parts() -> Iterator[bytes]:
        for _ in range(1_000):
            taken.append(b"12345")
            yield b"12345"

    incoming = [{"type": "http.request", "body": part, "more_body": True} for part in parts()]
    sent = await drive(raw, "POST", headers=pairs, incoming=incoming, scope=scope)
    assert (sent.status, sent.json()["error_code"]) == (413, "REQ_003")
    assert (sent.header("connection") == "close") == (scope != HTTP_2)
    assert app.heard == []


async def test_it_stops_to_read_at_the_bound() -> None:
    taken = 0

    async def receive() -> Any:
        nonlocal taken
        taken += 1
        await checkpoint()
        return {"type": "http.request", "body": b"12345", "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
    await PolicyStack(Echo(), [BodyLimit(limit=10)])(scope, receive, send)
    assert (sent[0]["status"], taken) == (413, 3)


async def test_what_is_not_announced_has_a_limit_of_its_own() -> None:
    app = stack(limit=1_000, unannounced=10)
    assert (await drive(app, "POST", headers=announced(20), body=b"x" * 20)).status == 200
    sent = await drive(app, "POST", headers=CHUNKED, body=b"x" * 20)
    assert (sent.status, sent.json()["max_bytes"]) == (413, 10)
    assert "Content-Length" in sent.json()["detail"]


async def test_routes_have_limits_of_their_own() -> None:
    app = stack(routes={"POST /files": 100, "POST /free": None, "/none": 0})
    for path, size, status in (
        ("/files", 100, 200), ("/files", 101, 413), ("/free", 5_000, 200), ("/none", 0, 200), ("/none", 1, 413),
        ("/x", 11, 413),
    ):  # fmt: skip
        sent = await drive(app, "POST", path, headers=announced(size), body=b"x" * size)
        assert sent.status == status, (path, size)
    sent = await drive(app, "POST", "/free", headers=CHUNKED, body=[b"x" * 5_000] * 3)
    assert sent.body == b"15000"
    assert (await drive(stack(limit=None), "POST", headers=announced(500), body=b"x" * 500)).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_request_without_a_body_is_not_read(method: str) -> None:
    app = Echo()
    raw = PolicyStack(app, [BodyLimit(limit=0)])
    assert (await drive(raw, method)).status == 200
    assert (await drive(raw, method, headers=announced(1), body=b"x")).status == 413
    assert (await drive(raw, method, headers=CHUNKED, body=b"x")).status == 413
    assert (await drive(raw, method, scope=HTTP_2, body=b"x")).status == 413
    assert (await drive(raw, method, scope=HTTP_2)).status == 200


async def test_a_client_that_leaves_in_the_middle_is_no_error_of_the_application() -> None:
    app = Echo()
    incoming: list[Any] = [{"type": "http.request", "body": b"12", "more_body": True}, {"type": "http.disconnect"}]
    sent = await drive(PolicyStack(app, [Problems(), BodyLimit()]), "POST", headers=CHUNKED, incoming=incoming)
    assert (sent.status, sent.json()["error_code"], app.heard) == (400, "REQ_400", [])


async def test_who_is_slow_is_cut_by_the_timeout_outside() -> None:
    incoming = [{"type": "http.request", "body": b"1", "more_body": True}]
    app = PolicyStack(Echo(), [Problems(), Timeout(seconds=0.05), BodyLimit()])
    with anyio.fail_after(60):
        sent = await drive(app, "POST", headers=CHUNKED, incoming=incoming)
    assert sent.status == 504


async def test_whoever_is_refused_outside_is_not_read() -> None:
    class Gate(Policy):
        def on_request(self, ex: Exchange) -> Problem | None:
            return CREDENTIALS_MISSING()

    sent = await drive(PolicyStack(Echo(), [Gate(), BodyLimit()]), "POST", headers=CHUNKED, incoming=[])
    assert sent.status == 401


async def test_policies_further_in_read_what_was_read() -> None:
    class Reads(Policy):
        async def on_request(self, ex: Exchange) -> None:
            assert await ex.body(100) == b"12345"

    app = Echo()
    sent = await drive(
        PolicyStack(app, [BodyLimit(), BodyLimit(limit=5), Reads()]), "POST", headers=CHUNKED, body=[b"12", b"345"]
    )
    assert sent.body == b"5"
    assert app.heard == [{"type": "http.request", "body": b"12345", "more_body": False}]
    sent = await drive(PolicyStack(Echo(), [BodyLimit(), BodyLimit(limit=4)]), "POST", headers=CHUNKED, body=b"12345")
    assert (sent.status, sent.json()["max_bytes"]) == (413, 4)


async def test_messages_of_websockets_are_left_alone() -> None:
    async def talks(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        await send({"type": "websocket.send", "text": str(len(message["text"]))})
        await send({"type": "websocket.close"})

    async with connect(PolicyStack(talks, [BodyLimit(limit=1)])) as talk:
        await talk.accepted()
        await talk.send_text("x" * 5_000)
        assert await talk.receive_text() == "5000"


async def test_it_holds_what_every_policy_holds() -> None:
    await check_policy(BodyLimit())
    await check_policy(BodyLimit(limit=0, unannounced=0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": -1}, "limit"),
        ({"limit": "much"}, "limit"),
        ({"routes": {"POST /x": -1}}, "routes"),
        ({"unannounced": None}, "unannounced"),
        ({"size": 5}, "size"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BodyLimit(**options)


def test_a_wrong_route_is_refused_when_the_stack_is_built() -> None:
    with pytest.raises(ValueError, match="x"):
        PolicyStack(Echo(), [BodyLimit(routes={"x": 5})])


@given(st.lists(st.binary(max_size=8), max_size=8), st.integers(0, 30), st.booleans())
def test_the_application_gets_all_of_a_body_or_nothing(parts: list[bytes], limit: int, tell: bool) -> None:
    size = sum(map(len, parts))
    app = Echo()
    headers = announced(size) if tell else CHUNKED

    async def run() -> Any:
        return await drive(PolicyStack(app, [BodyLimit(limit=limit)]), "POST", headers=headers, body=parts)

    sent = anyio.run(run)
    assert sent.status == (413 if size > limit else 200)
    assert b"".join(message["body"] for message in app.heard) == (b"" if size > limit else b"".join(parts))


def _speak(port: int, *parts: bytes) -> bytes:
    """What the server says until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as talk:
        for part in parts:
            talk.sendall(part)
        said = b""
        while more := talk.recv(65_536):
            said += more
        return said


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_on_a_real_socket_nobody_waits_for_what_is_refused(http: str) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    with on_uvicorn(BodyLimitMiddleware(Echo(), limit=10), http=http) as port:
        said = _speak(port, head + b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 413 ")
        assert b"REQ_003" in said
        said = _speak(port, head + b"Transfer-Encoding: chunked\r\n\r\n", b"6\r\n123456\r\n", b"6\r\n123456\r\n")
        assert b"HTTP/1.1 413 " in said
        said = _speak(port, head + b"Content-Length: 3\r\nConnection: close\r\n\r\n123")
        assert said.startswith(b"HTTP/1.1 200 ")
        assert said.endswith(b"3")

"""RequestID over every kind of exchange. Rows ST-18, TC-05, TC-15."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import Exchange, Head, get_exchange
from sigil_policy.core.facts import Correlation, Principal
from sigil_policy.core.host import PLAIN
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import DEFAULT_STYLE
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


class Asked:
    """An application that remembers what it saw and answers as told."""

    def __init__(self, *headers, parts=(b"ok",), error=None):
        self.headers = [(name.encode(), value.encode()) for name, value in headers]
        self.parts = parts
        self.error = error
        self.correlation = None

    async def __call__(self, scope, receive, send):
        self.correlation = get_exchange(scope).get(Correlation)
        if self.error is not None:
            raise self.error
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "headers": self.headers})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for index, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": index < len(self.parts) - 1})


class Refuse(Policy):
    def on_request(self, ex):
        return RATE_EXCEEDED("no")


class GivesPrincipal(Policy):
    gives = (Principal,)


def is_uuid4(text):
    parsed = uuid.UUID(text)
    return parsed.version == 4 and str(parsed) == text


async def test_the_callers_id_is_taken_and_sent_back():
    app = Asked()
    sent = await drive(PolicyStack(app, [RequestID()]), headers={"X-Request-ID": "checkout-42"})
    assert sent.header("x-request-id") == "checkout-42"
    assert app.correlation == Correlation("checkout-42")


async def test_an_id_is_made_where_none_came():
    app = Asked()
    sent = await drive(PolicyStack(app, [RequestID()]))
    assert is_uuid4(sent.header("x-request-id"))
    assert app.correlation.request_id == sent.header("x-request-id")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"a" * 129, id="too-long"),
        pytest.param(b"a\r\nset-cookie: x=1", id="ST-18-crlf"),
        pytest.param(b"a\x00b", id="ST-18-nul"),
        pytest.param(b"a\x1bb", id="ST-18-escape"),
        pytest.param(b"caf\xe9", id="ST-18-obs-text"),
        pytest.param(b"a" * 10_000, id="ST-18-10kB"),
        pytest.param(b"a,b", id="list"),
        pytest.param(b"{1}", id="braces"),
    ],
)
async def test_nothing_else_is_ever_echoed(value):
    app = Asked()
    sent = await drive(PolicyStack(app, [RequestID()]), headers=[("x-request-id", value)])
    assert is_uuid4(sent.header("x-request-id"))
    assert is_uuid4(app.correlation.request_id)


async def test_two_lines_are_no_id():
    sent = await drive(PolicyStack(Asked(), [RequestID()]), headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert is_uuid4(sent.header("x-request-id"))


async def test_the_other_ids_are_known_if_they_are_ids():
    app = Asked()
    headers = {"X-Session-ID": "session_abc123", "X-Client-ID": "web-app-v2", "X-Client-Version": "2.1.0"}
    await drive(PolicyStack(app, [RequestID()]), headers=headers)
    assert app.correlation[1:] == ("session_abc123", "web-app-v2", "2.1.0", None)
    await drive(PolicyStack(app, [RequestID()]), headers=dict.fromkeys(headers, "not an id"))
    assert app.correlation[1:] == (None, None, None, None)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param([("traceparent", TRACEPARENT)], TRACE, id="valid"),
        pytest.param([("traceparent", "00-zz")], None, id="TC-01-invalid"),
        pytest.param([("traceparent", TRACEPARENT)] * 2, None, id="TC-05-twice"),
        pytest.param([("traceparent", f"cc{TRACEPARENT[2:]}-x")] * 2, None, id="TC-05-twice-higher-version"),
    ],
)
async def test_the_trace_is_known_if_its_header_is_valid(headers, expected):
    app = Asked()
    await drive(PolicyStack(app, [RequestID()]), headers=headers)
    assert app.correlation.trace_id == expected


async def test_request_id_and_trace_are_independent():
    """TC-15."""
    app = Asked()
    await drive(PolicyStack(app, [RequestID()]), headers={"traceparent": TRACEPARENT})
    assert app.correlation.trace_id == TRACE
    assert is_uuid4(app.correlation.request_id)
    sent = await drive(PolicyStack(app, [RequestID(), Refuse()]), headers={"traceparent": TRACEPARENT})
    assert sent.json()["trace_id"] == TRACE
    assert sent.json()["request_id"] == sent.header("x-request-id") != TRACE


async def test_a_refusal_by_another_policy_carries_it():
    sent = await drive(PolicyStack(Asked(), [RequestID(), Refuse()]), headers={"x-request-id": "r1"})
    assert sent.status == 429
    assert sent.header("x-request-id") == "r1"
    assert sent.json()["request_id"] == "r1"


async def test_the_answer_to_an_unhandled_error_carries_it():
    stack = PolicyStack(Asked(error=RuntimeError("secret")), [RequestID(), Problems()])
    sent = await drive(stack, headers={"x-request-id": "r1"}, raise_errors=False)
    assert sent.status == 500
    assert sent.header("x-request-id") == "r1"
    assert isinstance(sent.error, RuntimeError)


async def test_a_stream_and_head_carry_it_once():
    stack = PolicyStack(Asked(parts=(b"a", b"b", b"c")), [RequestID()])
    for method in ("GET", "HEAD"):
        sent = await drive(stack, method, headers={"x-request-id": "r1"})
        assert sent.header("x-request-id") == "r1"
    assert sent.body == b"abc"


async def test_websocket_accept_carries_it():
    sent = await drive(PolicyStack(Asked(), [RequestID()]), kind="websocket", headers={"x-request-id": "r1"})
    assert sent.messages[0]["type"] == "websocket.accept"
    assert sent.header("x-request-id") == "r1"


async def test_a_refused_websocket_carries_it():
    stack = PolicyStack(Asked(), [RequestID(), Refuse()])
    sent = await drive(stack, kind="websocket", headers={"x-request-id": "r1"})
    assert sent.start["type"] == "websocket.http.response.start"
    assert sent.header("x-request-id") == "r1"


@pytest.mark.parametrize("name", ["x-request-id", "X-Request-Id"])
async def test_what_the_application_set_is_replaced(name):
    app = Asked((name, "mine"), (name, "again"), ("x-other", "stays"))
    for kind in ("http", "websocket"):
        sent = await drive(PolicyStack(app, [RequestID()]), kind=kind, headers={"x-request-id": "r1"})
        assert sent.header("x-request-id") == "r1"
        assert sent.header("x-other") == "stays"


@pytest.mark.parametrize("nested", [False, True], ids=["one-stack", "stack-on-a-mount"])
async def test_of_two_the_outer_one_holds(nested):
    app = Asked()
    inner = PolicyStack(app, [RequestID(header="X-Inner-ID")])

    async def between(scope, receive, send):
        await inner(scope, receive, send)

    stack = PolicyStack(between, [RequestID()]) if nested else PolicyStack(inner, [RequestID()])
    sent = await drive(stack, headers={"x-request-id": "outer", "x-inner-id": "inner"})
    assert sent.header("x-request-id") == "outer"
    assert sent.header("x-inner-id") is None
    assert app.correlation.request_id == "outer"


async def test_two_equal_ones_send_it_once():
    sent = await drive(PolicyStack(Asked(), [RequestID(), RequestID()]))
    assert is_uuid4(sent.header("x-request-id"))


async def test_every_exchange_has_an_id_of_its_own():
    stack = PolicyStack(Asked(), [RequestID()])
    assert len({(await drive(stack)).header("x-request-id") for _ in range(300)}) == 300


async def test_another_name_for_the_header():
    stack = PolicyStack(Asked(), [RequestID(header="X-Correlation-ID")])
    sent = await drive(stack, headers={"x-correlation-id": "c1", "x-request-id": "r1"})
    assert sent.header("x-correlation-id") == "c1"
    assert sent.header("x-request-id") is None


@pytest.mark.parametrize("name", ["", "X Request", "X-Request:", "X-\r\nA", "Ünï"])
def test_a_name_that_is_no_header_name_is_refused(name):
    with pytest.raises(ValidationError, match="is no header name"):
        RequestID(header=name)


def test_one_header_cannot_mean_two_things():
    with pytest.raises(ValidationError, match="must all be different"):
        RequestID(header="X-ID", session_header="x-id")
    with pytest.raises(ValidationError, match="must all be different"):
        RequestID(client_header="traceparent")


def test_it_stands_outside_of_authentication():
    with pytest.raises(PolicyOrderError, match="list RequestID before GivesPrincipal"):
        PolicyStack(Asked(), [GivesPrincipal(), RequestID()])


@given(st.binary(max_size=150))
def test_whatever_comes_the_response_is_well_formed(value):
    policy = RequestID()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", value)]}
    ex = Exchange(scope, None, SYSTEM_CLOCK, PLAIN, DEFAULT_STYLE)
    policy.on_request(ex)
    head = Head(200, [])
    policy.on_response(ex, head)
    assert len(head.headers) == 1
    sent = head.headers[0][1]
    assert 1 <= len(sent) <= 128
    assert sent.decode("ascii").isprintable()
    assert b" " not in sent
    assert b"," not in sent

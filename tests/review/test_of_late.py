"""What was new last, attacked: bodies in parts, stacks behind middlewares, marks three levels deep, echoes of input."""

from typing import Any, Literal, Self

import anyio
import attrs
import litestar
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from sigil_policy.core.exchange import BodyTooLargeError, Exchange
from sigil_policy.core.marks import policy
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import MarksIgnoredError, PolicyStack
from sigil_policy.frameworks.chain import chain
from sigil_policy.policies.body_limit import BodyLimit
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.timeout import Timeout
from sigil_policy.telemetry.echoes import hide_echoes
from sigil_policy.telemetry.redaction import redact
from sigil_policy.testing import drive
from tests.review.test_routes_are_all_seen import Passing, guarded, status

pytestmark = pytest.mark.anyio

CHUNKED = {"transfer-encoding": "chunked"}
SECRET = "hunter2zzz"


# --- bodies ------------------------------------------------------------------------------------------------------


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def measuring(*policies: Policy) -> PolicyStack:
    return PolicyStack(Starlette(routes=[Route("/", length, methods=["POST"])]), policies)


class Kept(bytes):
    """A part of a body that knows how many of it are alive."""

    alive = most = 0

    def __new__(cls, value: bytes) -> Self:
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, value)

    def __del__(self) -> None:
        Kept.alive -= 1


@pytest.mark.parametrize(("part", "expected"), [(b"", 200), (b"ab", 413)])
async def test_a_body_in_very_many_parts_is_held_as_one(part: bytes, expected: int) -> None:
    Kept.alive = Kept.most = asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": Kept(part), "more_body": asked < 5_000}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
    await measuring(BodyLimit(limit=8_000))(scope, receive, send)
    assert (sent[0]["status"], asked) == (expected, 5_000 if expected == 200 else 4_001)
    assert Kept.most < 5


@pytest.mark.parametrize("length", ["+5", "5, 5", "5,6", "", " 5", "0x5", "1_0", "-5", "\u0665"])
@pytest.mark.parametrize("version", ["1.0", "1.1", "2"])
async def test_an_odd_length_announces_nothing(length: str, version: str) -> None:
    headers = [(b"content-length", length.encode())]
    for size, expected in ((10, 200), (11, 413)):
        sent = await drive(
            measuring(BodyLimit(limit=10)), "POST", headers=headers, body=b"x" * size, scope={"http_version": version}
        )
        assert sent.status == expected


@given(
    st.lists(st.one_of(st.binary(max_size=5), st.binary(max_size=5).map(bytearray)), max_size=6),
    st.lists(st.integers(0, 20), max_size=3),
    st.booleans(),
)
def test_however_often_a_body_is_read_the_application_gets_it_whole(
    parts: list[bytes], limits: list[int], wrapped: bool
) -> None:
    whole = b"".join(parts)

    class Asks(Policy):
        limit: int

        async def on_request(self, ex: Exchange) -> None:
            try:
                body = await ex.body(self.limit)
            except BodyTooLargeError:
                assert len(whole) > self.limit
            else:
                assert (body, type(body)) == (whole, bytes)
                assert len(whole) <= self.limit

    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(await receive())
        while heard[-1]["more_body"]:
            heard.append(await receive())
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    def within(scope: Any, receive: Any, send: Any) -> Any:
        async def listen() -> Any:
            return await receive()

        return inner(scope, listen if wrapped else receive, send)

    inner = PolicyStack(app, [Asks(limit=limit) for limit in limits[1:]] or [RequestID()])
    stack = PolicyStack(within, [Asks(limit=limit) for limit in limits[:1]] or [RequestID()])
    last = len(parts) - 1
    incoming = [{"type": "http.request", "body": part, "more_body": i < last} for i, part in enumerate(parts)]
    incoming = incoming or [{"type": "http.request", "body": b"", "more_body": False}]

    async def run() -> Any:
        with anyio.fail_after(60):
            return await drive(stack, "POST", headers=CHUNKED, incoming=incoming)

    assert anyio.run(run).status == 204
    assert b"".join(message["body"] for message in heard) == whole


class Reads(BaseHTTPMiddleware):
    """Has read the body before the application gets it, if `first`."""

    def __init__(self, app: Any, *, first: bool) -> None:
        super().__init__(app)
        self.first = first

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        if self.first:
            assert await request.body() == b"12345"
        return await call_next(request)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("outer", [RequestID(), BodyLimit(limit=5)], ids=["unread", "read"])
async def test_a_stack_behind_a_middleware_that_has_read_the_body_reads_it_too(first: bool, outer: Policy) -> None:
    app = PolicyStack(Reads(measuring(BodyLimit(limit=5)), first=first), [outer])
    with anyio.fail_after(60):
        sent = await drive(app, "POST", headers=CHUNKED, body=[b"123", b"45"])
    assert (sent.status, sent.body) == (200, b"5")
    with anyio.fail_after(60):
        sent = await drive(
            PolicyStack(Reads(measuring(BodyLimit(limit=4)), first=first), [outer]),
            "POST",
            headers=CHUNKED,
            body=[b"123", b"45"],
        )
    assert sent.status == 413


async def test_in_an_inner_stack_the_body_is_what_the_middleware_around_it_makes_of_it() -> None:
    heard: list[bytes] = []

    class Asks(Policy):
        async def on_request(self, ex: Exchange) -> None:
            heard.append(await ex.body(100))

    def doubling(app: Any) -> Any:
        async def serve(scope: Any, receive: Any, send: Any) -> None:
            async def doubled() -> Any:
                message = await receive()
                return {**message, "body": message.get("body", b"") * 2}

            await app(scope, doubled, send)

        return serve

    app = PolicyStack(doubling(measuring(Asks(), Asks())), [Asks()])
    with anyio.fail_after(60):
        sent = await drive(app, "POST", headers=CHUNKED, body=[b"123", b"45"])
    assert heard == [b"12345", b"1234512345", b"1234512345"]
    assert sent.body == b"10"


# --- marks -------------------------------------------------------------------------------------------------------


class Opaque:
    """Nobody can read what is in here."""

    def __init__(self, app: Any) -> None:
        self._serve = [lambda: app]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._serve[0]()(scope, receive, send)


class Wrapped:
    """A stack as a middleware that Starlette knows nothing of."""

    def __init__(self, app: Any, policies: list[Policy]) -> None:
        self.app = PolicyStack(Passing(app), policies)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def answering(*scopes: str) -> Any:
    async def serve(request: Request) -> PlainTextResponse:
        return PlainTextResponse("x")

    return policy(scopes=scopes)(serve) if scopes else serve


async def test_marks_that_only_policies_outside_would_understand_do_not_pass_for_understood() -> None:
    @litestar.get("/x", sync_to_thread=False)
    @policy(scopes="inner")
    def inner() -> str:
        return "inner"

    foreign = PolicyStack(litestar.Litestar([inner], openapi_config=None), [Timeout()])
    app = guarded(Starlette(routes=[policy(scopes="area")(Mount("/m", app=Passing(foreign)))]))
    assert await status(app, "/m/x") == 403
    with pytest.raises(MarksIgnoredError, match="scopes"):
        await status(app, "/m/x", "area")


@pytest.mark.parametrize("inside", [[Scopes()], [Timeout()]], ids=["understood", "not"])
async def test_behind_a_middleware_somebody_has_to_understand_what_is_marked_there(inside: list[Policy]) -> None:
    marked = Mount("/y", routes=[Route("/x", answering("near"))], middleware=[Middleware(Wrapped, inside)])
    between = PolicyStack(Starlette(routes=[marked]), [RequestID()])
    app = guarded(Starlette(routes=[policy(scopes="far")(Mount("/m", app=Opaque(between)))]), strict_routes=True)
    assert await status(app, "/m/y/x") == 403
    if type(inside[0]) is Scopes:
        assert [await status(app, "/m/y/x", scopes) for scopes in ("far", "far near")] == [403, 200]
    else:
        with pytest.raises(MarksIgnoredError, match="scopes"):
            await status(app, "/m/y/x", "far")
    assert app.mismatches == 0


async def test_a_mount_in_a_mount_is_heard_by_the_stack_inside_both() -> None:
    innermost = PolicyStack(Starlette(routes=[Route("/x", answering())]), [Scopes()])
    between = PolicyStack(Starlette(routes=[policy(scopes="near")(Mount("/y", app=Opaque(innermost)))]), [Scopes()])
    app = guarded(Starlette(routes=[policy(scopes="far")(Mount("/m", app=Opaque(between)))]))
    answers = {scopes: await status(app, "/m/y/x", scopes) for scopes in ("", "far", "near", "far near")}
    assert answers == {"": 403, "far": 403, "near": 403, "far near": 200}

    rules: list[Any] = []

    class Notes(Policy):
        marks = frozenset(("scopes", "public"))

        def marked(self, marks: Any, rule: Any, resolution: Any) -> Any:
            return marks

        def on_request(self, ex: Exchange) -> None:
            rules.append(ex.rule(self))

    innermost = PolicyStack(Starlette(routes=[Route("/x", answering())]), [Notes()])
    between = PolicyStack(Starlette(routes=[policy(scopes="near")(Mount("/y", app=Opaque(innermost)))]), [Notes()])
    app = PolicyStack(Starlette(routes=[policy(public=True)(Mount("/m", app=Opaque(between)))]), [Notes()])
    await drive(app, "GET", "/m/y/x")
    assert [(rule.public, rule.scopes) for rule in rules] == [(True, None), (None, ("near",)), (None, ("near",))]


class _Private:
    __slots__ = ("__app",)

    def __init__(self, app: Any) -> None:
        self.__app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.__app(scope, receive, send)


class Elsewhere:
    """A proxy: outside of its context it answers nothing."""

    @property
    def app(self) -> Any:
        raise RuntimeError("outside of its context")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError


async def test_marks_are_seen_behind_private_slots() -> None:
    app = guarded(_Private(Starlette(routes=[Route("/x", answering("near"))])))
    assert [await status(app, "/x", scopes) for scopes in ("", "near")] == [403, 200]


def test_a_stack_is_built_around_what_answers_no_question() -> None:
    assert [type(one) for one in chain(Elsewhere())] == [Elsewhere]
    PolicyStack(Elsewhere(), [RequestID()])


# --- echoes ------------------------------------------------------------------------------------------------------


class Tabby(BaseModel):
    kind: Literal["tabby"]


class Rex(BaseModel):
    kind: Literal["rex"]


class Pets(BaseModel):
    pet: Tabby | Rex = Field(discriminator="kind")


def _said(refuse: Any) -> list[str]:
    with pytest.raises((ValidationError, msgspec.ValidationError, ValueError, TypeError)) as caught:
        refuse()
    error = caught.value
    texts = [str(error), repr(error), repr(str(error)), f"refused: {error}"]
    return [*texts, repr(str(error.errors())), str(error.errors())] if isinstance(error, ValidationError) else texts


class First(msgspec.Struct, tag="first"):
    a: int = 1


class Second(msgspec.Struct, tag="second"):
    a: int = 1


class Lines:
    def __repr__(self) -> str:
        return f"<Lines\n {SECRET!r}\n\n {SECRET}>"


checks: Any = attrs.validators


@attrs.define
class Checked:
    number: Any = attrs.field(default=1, validator=checks.instance_of(int))
    call: Any = attrs.field(default=print, validator=checks.is_callable())
    no_text: Any = attrs.field(default=1, validator=checks.not_(checks.instance_of(str)))
    one_of: Any = attrs.field(default=1, validator=checks.or_(*map(checks.instance_of, (int, bytes))))


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: msgspec.convert({"type": SECRET}, First | Second),
        lambda: msgspec.convert({"type": f"it's {SECRET}"}, First | Second),
        lambda: Checked(number=Lines()),
        lambda: Checked(call=SECRET),
        lambda: Checked(no_text=SECRET),
        lambda: Checked(one_of=SECRET),
    ],
)
def test_what_a_validation_has_refused_is_not_repeated(refuse: Any) -> None:
    texts = _said(refuse)
    assert any(SECRET in text for text in texts)
    for text in texts:
        clean = redact(text)
        assert SECRET not in clean
        assert redact(clean) == clean


@pytest.mark.parametrize("tag", [SECRET, f"it's ' found using {SECRET}", f'"{SECRET}"'])
def test_a_refused_tag_is_not_repeated_however_it_is_quoted(tag: str) -> None:
    for text in _said(lambda: Pets.model_validate({"pet": {"kind": tag}})):
        assert SECRET not in redact(text)
        assert "does not match any of the expected tags" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "Invalid value 'x' for '--port'",
        "Invalid value for --x\nthen: Expected `int`, got `str` - at `$.a`",
        "Invalid value 'x' for '--port'; Expected `int`, got `str` - at `$.a`",
        "the caller must pass NotCallable",
        "the condition is satisfied for values over 5",
    ],
)
def test_what_only_looks_like_an_echo_stays(text: str) -> None:
    assert hide_echoes(text) is text

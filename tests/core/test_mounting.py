"""The ways to mount a stack: they fuse where they can, and share one exchange where they cannot."""

import functools
import subprocess
import sys
import textwrap
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import Exchange, Head, current_exchange, get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.middleware import ProblemsMiddleware, RequestIDMiddleware, as_middleware
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio


class Mark(Policy):
    """Says its name on the way in, on the way out and at the end."""

    name: str
    log: Any = None

    def on_request(self, ex: Exchange) -> None:
        self._say("in", ex)

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-mark", self.name.encode()))

    def on_finish(self, ex: Exchange) -> None:
        self._say(f"finish {ex.outcome} {ex.status}", ex)

    def _say(self, what: str, ex: Exchange) -> None:
        if self.log is not None:
            self.log.append((self.name, what, ex))


class Badge(tuple[str]):
    """A fact."""

    __slots__ = ()


class Gives(Policy):
    gives: ClassVar[tuple[type, ...]] = (Badge,)

    def on_request(self, ex: Exchange) -> None:
        ex.give(Badge(("given",)))


class Needs(Policy):
    needs: ClassVar[tuple[type, ...]] = (Badge,)

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-badge", ex[Badge][0].encode()))


class Knows(Policy):
    def on_request(self, ex: Exchange) -> None:
        ex.authenticate(Principal(subject="ada"))


class Counter(tuple[int]):
    """A fact."""

    __slots__ = ()


class ActsOnce(Policy):
    """Looks for its own fact: mounted twice, it acts once."""

    gives: ClassVar[tuple[type, ...]] = (Counter,)

    def on_request(self, ex: Exchange) -> None:
        if Counter not in ex:
            ex.give(Counter((1,)))
            ex.keep(self, True)

    def on_response(self, ex: Exchange, head: Head) -> None:
        if ex.note(self):
            head.headers.append((b"x-counted", b"1"))


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def endpoint(request: Request) -> Response:
    return PlainTextResponse(type(get_exchange(request)).__name__)


class Foreign:
    """Somebody's plain ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-foreign", b"1")]}
            await send(message)

        await self.app(scope, receive, sending)


async def dispatch(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    response.headers["x-foreign"] = "1"
    return response


class ForeignBase(BaseHTTPMiddleware):
    def __init__(self, app: Any) -> None:
        super().__init__(app, dispatch)


def stacks_of(app: Any) -> list[PolicyStack]:
    """The stacks that `app` leads to, outermost first, each with what it runs."""
    found, inner = [], app.build_middleware_stack()
    while inner is not None:
        if isinstance(inner, PolicyStack):
            found.append(inner)
        inner = getattr(inner, "app", None)
    return found


def names(stack: PolicyStack) -> list[str]:
    return [getattr(policy, "name", type(policy).__name__) for policy in stack.policies]


# --- add_middleware ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Starlette, FastAPI])
async def test_one_add_middleware_call_mounts_all_policies_outermost_first(make: Any) -> None:
    log: list[Any] = []
    app = make()
    app.router.routes.append(Route("/", endpoint))
    app.add_middleware(PolicyStack, policies=[Mark(name="outer", log=log), Mark(name="inner", log=log)])
    sent = await drive(app)
    assert sent.body == b"Exchange"
    assert sent.header_lines("x-mark") == ["inner", "outer"]
    assert [(name, what) for name, what, _ in log] == [
        ("outer", "in"),
        ("inner", "in"),
        ("inner", "finish ok 200"),
        ("outer", "finish ok 200"),
    ]


MarkMiddleware = as_middleware(Mark)


@pytest.mark.parametrize("make", [Starlette, FastAPI])
async def test_one_call_for_each_policy_fuses_into_one_stack(make: Any) -> None:
    """The last added is the outermost, as with every middleware."""
    app = make()
    app.router.routes.append(Route("/", endpoint))
    app.add_middleware(MarkMiddleware, name="inner")
    app.add_middleware(PolicyStack, policies=[Mark(name="middle"), Gives()])
    app.add_middleware(MarkMiddleware, name="outer")
    app.add_middleware(PolicyStack)
    (stack,) = stacks_of(app)
    assert names(stack) == ["outer", "middle", "Gives", "inner"]
    assert (await drive(app)).header_lines("x-mark") == ["inner", "middle", "outer"]


async def test_the_shipped_middlewares_fuse_with_stacks_and_each_other() -> None:
    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(PolicyStack, policies=[Mark(name="inner")])
    app.add_middleware(ProblemsMiddleware)
    app.add_middleware(RequestIDMiddleware)
    (stack,) = stacks_of(app)
    assert names(stack) == ["RequestID", "Problems", "inner"]
    sent = await drive(app)
    assert sent.header("x-request-id")
    assert sent.header_lines("x-mark") == ["inner"]


async def test_middleware_given_to_the_constructor_fuses_too() -> None:
    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[
            Middleware(PolicyStack, policies=[Mark(name="outer")]),
            Middleware(MarkMiddleware, name="inner"),
        ],
    )
    (stack,) = stacks_of(app)
    assert names(stack) == ["outer", "inner"]


def test_a_fused_stack_has_the_clock_of_the_outermost_that_names_one() -> None:
    clock = FrozenClock()
    stack = PolicyStack(PolicyStack(PolicyStack(ok, [Mark(name="c")]), [Mark(name="b")]), [Mark(name="a")], clock=clock)
    assert names(stack) == ["a", "b", "c"]
    assert stack.app is ok
    assert stack.clock is clock
    other = FrozenClock()
    assert PolicyStack(stack, [Mark(name="d")], clock=other).clock is other
    assert PolicyStack(stack, [Mark(name="d")]).clock is clock, "who says nothing of it changes none"
    assert PolicyStack(ok, [Mark(name="d")]).clock is SYSTEM_CLOCK


async def test_fusing_leaves_the_inner_stack_usable_on_its_own() -> None:
    inner = PolicyStack(ok, [Mark(name="inner")])
    outer = PolicyStack(inner, [Mark(name="outer")])
    assert (await drive(inner)).header_lines("x-mark") == ["inner"]
    assert (await drive(outer)).header_lines("x-mark") == ["inner", "outer"]


# --- around anything ---------------------------------------------------------------------------------------------


class Application:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await ok(scope, receive, send)

    async def method(self, scope: Any, receive: Any, send: Any) -> None:
        await ok(scope, receive, send)


async def _with_option(option: int, scope: Any, receive: Any, send: Any) -> None:
    await ok(scope, receive, send)


@pytest.mark.parametrize(
    "app",
    [
        ok,
        Application(),
        Application().method,
        functools.partial(_with_option, 7),
        Starlette(routes=[Route("/", endpoint)]),
    ],
    ids=["function", "object", "method", "partial", "starlette"],
)
async def test_any_asgi_callable_can_be_wrapped(app: Any) -> None:
    sent = await drive(PolicyStack(app, policies=[Mark(name="only")]))
    assert (sent.status, sent.header_lines("x-mark")) == (200, ["only"])


async def test_a_stack_inside_and_one_around_a_whole_application_share_the_exchange() -> None:
    log: list[Any] = []
    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(PolicyStack, policies=[Mark(name="inner", log=log)])
    sent = await drive(PolicyStack(app, [Mark(name="outer", log=log)]))
    assert sent.header_lines("x-mark") == ["inner", "outer"]
    assert len({id(ex) for _, _, ex in log}) == 1


# --- mounts and routes -------------------------------------------------------------------------------------------


def mounted(log: list[Any], *inner: Policy, outer: tuple[Policy, ...] = ()) -> Starlette:
    sub = Starlette(routes=[Route("/agents", endpoint), WebSocketRoute("/ws", accepts)])
    app = Starlette(
        routes=[
            Mount("/v7", PolicyStack(sub, [Mark(name="mount", log=log), *inner])),
            Route(
                "/route", endpoint, middleware=[Middleware(PolicyStack, policies=[Mark(name="route", log=log), *inner])]
            ),
            Route("/plain", endpoint),
        ]
    )
    app.add_middleware(PolicyStack, policies=[Mark(name="app", log=log), *outer])
    return app


async def accepts(websocket: WebSocket) -> None:
    assert get_exchange(websocket) is current_exchange()
    await websocket.accept()
    await websocket.close()


@pytest.mark.parametrize(("path", "inner"), [("/v7/agents", "mount"), ("/route", "route")])
async def test_a_stack_on_a_mount_or_route_shares_the_exchange(path: str, inner: str) -> None:
    """AS-26: each policy once, in order, one exchange, one status, whoever sent what."""
    log: list[Any] = []
    sent = await drive(mounted(log), path=path)
    assert sent.header_lines("x-mark") == [inner, "app"]
    assert [(name, what) for name, what, _ in log] == [
        ("app", "in"),
        (inner, "in"),
        (inner, "finish ok 200"),
        ("app", "finish ok 200"),
    ]
    assert len({id(ex) for _, _, ex in log}) == 1
    assert log[0][2].path == path
    assert log[0][2].sent_bytes == len(sent.body)


async def test_elsewhere_the_stack_of_the_mount_does_not_run() -> None:
    assert (await drive(mounted([]), path="/plain")).header_lines("x-mark") == ["app"]


async def test_a_websocket_on_a_mount_passes_both_stacks() -> None:
    log: list[Any] = []
    sent = await drive(mounted(log), path="/v7/ws", kind="websocket")
    assert sent.messages[0]["type"] == "websocket.accept"
    assert sent.header_lines("x-mark") == ["mount", "app"]
    assert len({id(ex) for _, _, ex in log}) == 1


async def test_facts_of_the_outer_stack_are_known_on_the_mount() -> None:
    sent = await drive(mounted([], Needs(), outer=(Gives(),)), path="/v7/agents")
    assert sent.header("x-badge") == "given"


def who(request: Request) -> Response:
    return JSONResponse({"user": request.user.display_name})


async def test_a_caller_authenticated_on_a_mount_is_the_user_of_its_endpoints() -> None:
    app = Starlette(routes=[Mount("/v7", PolicyStack(Starlette(routes=[Route("/me", who)]), [Knows()]))])
    app.add_middleware(PolicyStack, policies=[Mark(name="app")])
    assert (await drive(app, path="/v7/me")).json() == {"user": "ada"}


async def test_the_caller_is_written_into_the_scope_that_the_stack_was_called_with() -> None:
    """AS-01: a middleware in between may have handed a copy of the scope on."""
    inner = PolicyStack(Starlette(routes=[Route("/me", who)]), [Knows()])

    async def copies(scope: Any, receive: Any, send: Any) -> None:
        await inner(dict(scope), receive, send)

    assert (await drive(PolicyStack(copies, [Mark(name="app")]), path="/me")).json() == {"user": "ada"}


@pytest.mark.parametrize("path", ["/v7/agents", "/route"])
async def test_a_policy_that_must_not_act_twice_looks_for_its_own_fact(path: str) -> None:
    sent = await drive(mounted([], ActsOnce(), outer=(ActsOnce(),)), path=path)
    assert sent.header_lines("x-counted") == ["1"]


async def test_a_refusal_on_a_mount_is_decorated_by_the_stack_of_the_application() -> None:
    class Refuses(Policy):
        def on_request(self, ex: Exchange) -> Reply:
            return Reply(status=403, body=b"no")

    log: list[Any] = []
    sent = await drive(mounted(log, Refuses()), path="/v7/agents")
    assert (sent.status, sent.body) == (403, b"no")
    assert sent.header_lines("x-mark") == ["mount", "app"]
    assert [what for _, what, _ in log if what.startswith("finish")] == ["finish refused 403"] * 2
    assert log[0][2].refused_by == "Refuses"


async def test_a_scope_that_is_used_again_gets_an_exchange_of_its_own() -> None:
    log: list[Any] = []
    stack = PolicyStack(ok, [Mark(name="only", log=log)])
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}

    async def receive() -> Any:
        raise AssertionError("received")

    async def send(message: Any) -> None:
        pass

    await stack(scope, receive, send)
    await stack(scope, receive, send)
    assert len({id(ex) for _, _, ex in log}) == 2


# --- others in between -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [Foreign, ForeignBase])
async def test_with_another_middleware_in_between_the_stacks_share_the_exchange(foreign: Any) -> None:
    log: list[Any] = []
    app = Starlette(routes=[Route("/", endpoint), WebSocketRoute("/ws", accepts)])
    app.add_middleware(PolicyStack, policies=[Needs(), Mark(name="inner", log=log)])
    app.add_middleware(foreign)
    app.add_middleware(PolicyStack, policies=[Gives(), Mark(name="outer", log=log)])
    assert [names(stack) for stack in stacks_of(app)] == [["Gives", "outer"], ["Needs", "inner"]]
    sent = await drive(app)
    assert sent.body == b"Exchange"
    assert sent.header_lines("x-mark") == ["inner", "outer"]
    assert (sent.header("x-badge"), sent.header("x-foreign")) == ("given", "1")
    assert [(name, what) for name, what, _ in log] == [
        ("outer", "in"),
        ("inner", "in"),
        ("inner", "finish ok 200"),
        ("outer", "finish ok 200"),
    ]
    assert len({id(ex) for _, _, ex in log}) == 1
    sent = await drive(app, path="/ws", kind="websocket")
    assert sent.header_lines("x-mark") == ["inner", "outer"]


@pytest.mark.parametrize("foreign", [Foreign, ForeignBase])
async def test_an_error_passes_another_middleware_on_its_way_out(foreign: Any) -> None:
    class Apologises(Policy):
        def on_error(self, ex: Exchange, error: Exception) -> Reply:
            return Reply(status=500, body=type(error).__name__.encode())

    def fails(request: Request) -> Response:
        raise LookupError("app")

    app = Starlette(routes=[Route("/", fails)])
    app.add_middleware(PolicyStack, policies=[Mark(name="inner")])
    app.add_middleware(foreign)
    app.add_middleware(PolicyStack, policies=[Mark(name="outer"), Apologises()])
    sent = await drive(app)
    assert (sent.status, sent.body, sent.header_lines("x-mark")) == (500, b"LookupError", ["outer"])


SENTRY = """
import anyio, sentry_sdk
from sentry_sdk.integrations.starlette import StarletteIntegration
from sentry_sdk.transport import Transport

events = []

class Nowhere(Transport):
    def capture_envelope(self, envelope):
        event = envelope.get_event()
        if event is not None:
            events.append(event)

sentry_sdk.init(
    dsn="https://key@sentry.invalid/1", transport=Nowhere, traces_sample_rate=1.0, auto_enabling_integrations=False,
    integrations=[StarletteIntegration(middleware_spans=True)],
)

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from sigil_policy.core.stack import PolicyStack
from sigil_policy.middleware import ProblemsMiddleware, RequestIDMiddleware
from sigil_policy.testing import drive

def hello(request):
    return PlainTextResponse("ok")

def fails(request):
    raise LookupError("app")

app = Starlette(routes=[Route("/", hello), Route("/fails", fails)])
app.add_middleware(PolicyStack, policies=[])
app.add_middleware(ProblemsMiddleware)
app.add_middleware(RequestIDMiddleware)
inner = app.build_middleware_stack()
found = []
while inner is not None:
    if isinstance(inner, PolicyStack):
        found.append([type(policy).__name__ for policy in inner.policies])
    inner = getattr(inner, "app", None)
assert found == [["RequestID", "Problems"]], found

async def main():
    sent = await drive(app)
    assert (sent.status, sent.body) == (200, b"ok")
    assert sent.header("x-request-id")
    sent = await drive(app, path="/fails", raise_errors=False)
    assert (sent.status, type(sent.error)) == (500, LookupError)
    assert sent.header("x-request-id")
    assert sent.header("content-type") == "application/problem+json"

anyio.run(main)
sentry_sdk.flush()
reported = [event["exception"]["values"][-1]["type"] for event in events if "exception" in event]
assert reported == ["LookupError"], reported
"""


def test_stacks_fuse_under_sentry_which_sees_the_error_once() -> None:
    """sentry-sdk patches Starlette and every middleware class for good: so in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(SENTRY)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- order and options -------------------------------------------------------------------------------------------


def test_a_wrong_order_fails_at_construction_and_says_the_swap() -> None:
    with pytest.raises(PolicyOrderError, match="list Gives before Needs"):
        PolicyStack(ok, [Needs(), Gives()])


def test_a_wrong_order_between_fusing_stacks_fails_at_construction() -> None:
    app = Starlette()
    app.add_middleware(PolicyStack, policies=[Gives()])
    app.add_middleware(PolicyStack, policies=[Needs()])
    with pytest.raises(PolicyOrderError, match="list Gives before Needs"):
        app.build_middleware_stack()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"policies": [Mark]}, TypeError, r"write Mark\(\.\.\.\)"),
        ({"policies": [object()]}, TypeError, "not object"),
        ({"policies": Mark(name="x")}, TypeError, "Mark"),
        ({"policies": [], "finish_timeout": 0}, ValueError, "above 0"),
        ({"policies": [], "finish_timeout": float("nan")}, ValueError, "above 0"),
        ({"polices": []}, TypeError, "polices"),
        ({"app": None}, TypeError, "ASGI application"),
    ],
    ids=["a class", "no policy", "not in a list", "no time", "not a number", "unknown option", "no application"],
)
def test_wrong_options_of_a_stack_fail_at_construction(options: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        PolicyStack(**{"app": ok, **options})


async def lifespan(app: Any, *incoming: str, out: list[Any] | None = None) -> list[Any]:
    """What `app` answers to these lifespan events."""
    out = [] if out is None else out
    waiting = iter(incoming)

    async def receive() -> Any:
        return {"type": f"lifespan.{next(waiting)}"}

    async def send(message: Any) -> None:
        out.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return out


@pytest.mark.parametrize("foreign", [Foreign, ForeignBase])
async def test_an_unfused_stack_without_its_fact_fails_the_startup(foreign: Any) -> None:
    """AS-03: with a message, not in silence, and before the application starts."""
    started: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["type"])

    stack = PolicyStack(foreign(PolicyStack(app, [Needs()])), [Mark(name="outer")])
    out: list[Any] = []
    with pytest.raises(PolicyOrderError):
        await lifespan(stack, "startup", out=out)
    (failed,) = out
    assert failed["type"] == "lifespan.startup.failed"
    assert "Needs needs a Badge" in failed["message"]
    assert "mount a policy that gives Badge" in failed["message"]
    assert started == []


@pytest.mark.parametrize("foreign", [Foreign, ForeignBase])
async def test_an_unfused_stack_with_its_fact_starts_up(foreign: Any) -> None:
    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(PolicyStack, policies=[Needs()])
    app.add_middleware(foreign)
    app.add_middleware(PolicyStack, policies=[Gives()])
    out = await lifespan(app, "startup", "shutdown")
    assert [message["type"] for message in out] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert (await drive(app)).header("x-badge") == "given"


async def test_without_a_lifespan_a_missing_fact_fails_at_the_first_exchange() -> None:
    """Never in silence: the application is not called without what its policies rely on."""
    for path in ("/v7/agents", "/route"):
        sent = await drive(mounted([], Needs()), path=path, raise_errors=False)
        assert isinstance(sent.error, PolicyOrderError)
        assert "Needs needs a Badge" in str(sent.error)
    assert (await drive(mounted([], Needs()), path="/plain")).status == 200


# --- what policies own -------------------------------------------------------------------------------------------


class Connection:
    def __init__(self, log: list[str], error: Exception | None = None) -> None:
        self.log, self.error = log, error

    async def aclose(self) -> None:
        self.log.append("closed")
        if self.error is not None:
            raise self.error


class Owns(Policy):
    connection: Any

    def resources(self) -> Any:
        return [self.connection]


@pytest.mark.parametrize("error", [None, OSError("already gone")], ids=["closes", "fails to close"])
async def test_what_policies_own_is_closed_when_the_application_has_shut_down(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for name in ("startup", "shutdown"):
            await receive()
            log.append(f"application: {name}")
            await send({"type": f"lifespan.{name}.complete"})

    stack = PolicyStack(app, [Owns(connection=Connection(log, error)), Owns(connection=Connection(log))])
    out = await lifespan(stack, "startup", "shutdown")
    assert log == ["application: startup", "application: shutdown", "closed", "closed"]
    assert [message["type"] for message in out] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert ("Connection" in caplog.text) == (error is not None)

"""Whatever an application is made of, what is said of an endpoint holds, and nothing becomes more open in silence."""

import logging
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import litestar
import pytest
import quart
from fastapi import APIRouter, FastAPI, Security, WebSocket
from fastapi.security import SecurityScopes
from litestar.types import Receive, Scope, Send
from starlette.applications import Starlette
from starlette.convertors import CONVERTOR_TYPES, Convertor
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Match, Mount, Route, Router, WebSocketRoute

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.marks import policy
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import MarksIgnoredError, PolicyStack, RouteMismatchError
from sigil_policy.frameworks.routes import RouteIndex
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit, Tier
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.timeout import Timeout
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio

LOCAL = {"host": "localhost"}


class Known(Policy):
    """Everybody is a caller, with the scopes in `x-scopes`."""

    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        scopes = ex.headers.get(b"x-scopes", b"").decode().split()
        ex.authenticate(Principal(subject="ann", scopes=frozenset(scopes)))


class Passing:
    """A middleware that does nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def policies() -> list[Policy]:
    return [Known(), Scopes()]


def guarded(app: Any, **options: Any) -> PolicyStack:
    return PolicyStack(app, policies(), **options)


def endpoint(name: str = "free") -> Any:
    async def serve(request: Request) -> PlainTextResponse:
        return PlainTextResponse(name)

    serve.__name__ = serve.__qualname__ = name
    return serve


def secret(name: str = "secret") -> Any:
    return policy(scopes="admin")(endpoint(name))


def public() -> Any:
    return policy(public=True)(endpoint())


async def status(app: Any, path: str, scopes: str = "", method: str = "GET", **options: Any) -> int:
    return (await drive(app, method, path, headers={"x-scopes": scopes}, **options)).status


async def is_closed(app: Any, path: str, **options: Any) -> bool:
    """Whether `path` is for those with the scope `admin`."""
    return [await status(app, path, scopes, **options) for scopes in ("", "admin")] == [403, 200]


def scope_of(path: str, method: str = "GET") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "headers": []}


# --- routes that change ------------------------------------------------------------------------------------------


def _replaced_in_place(app: Starlette) -> None:
    app.router.routes[0] = Route("/x", secret())


def _list_replaced(app: Starlette) -> None:
    app.router.routes = [Route("/x", secret()), Route("/other", secret())]


def _one_taken_one_added(app: Starlette) -> None:
    del app.router.routes[0]
    app.router.routes.append(Route("/x", secret()))


def _reordered(app: Starlette) -> None:
    app.router.routes.insert(0, app.router.routes.pop())


@pytest.mark.parametrize("change", [_replaced_in_place, _list_replaced, _one_taken_one_added, _reordered])
@pytest.mark.parametrize("already", [True, False], ids=["marked", "unmarked"])
async def test_as_many_routes_as_before_are_not_the_same_routes(change: Any, already: bool) -> None:
    routes = [Route("/x", endpoint()), Route("/other", secret() if already else endpoint())]
    if change is _reordered:
        routes.append(Route("/x", secret()))
    app = Starlette(routes=routes)
    stack = guarded(app)
    assert await status(stack, "/x") == 200
    change(app)
    assert await is_closed(stack, "/x")


async def test_another_router_before_the_start_is_seen_and_one_that_serves_nobody_is_not() -> None:
    app = Starlette(routes=[Route("/x", endpoint()), Route("/other", secret())])
    stack = guarded(app)
    assert stack.host.marked()
    app.router = Router([Route("/x", secret())])
    assert await is_closed(stack, "/x")
    # The application has started: it keeps the router that it has.
    app.router = Router([Route("/x", public())])
    assert await is_closed(stack, "/x")


async def test_what_an_included_router_says_outlasts_routes_that_fastapi_does_not_know() -> None:
    """`Router.mount` tells FastAPI nothing; its tree of routes and the lists of routers have different lengths then."""
    admin = policy(scopes="admin")(APIRouter(prefix="/admin"))
    admin.add_api_route("/a", lambda: 1)
    app = FastAPI()
    app.include_router(admin)
    stack = guarded(app)
    assert await is_closed(stack, "/admin/a")
    admin.mount("/m", Starlette())
    assert await is_closed(stack, "/admin/a")
    app.add_api_route("/late", lambda: 1)
    assert await is_closed(stack, "/admin/a")


def test_routes_that_change_while_threads_ask_are_never_half_read() -> None:
    for number in range(10):
        literals = [Route(f"/lit{one}/{{x}}", endpoint()) for one in range(100)]
        app = Starlette(
            routes=[Route("/items/special", public()), *literals, Route("/items/{name}", secret())],
        )
        index, wrong = RouteIndex(app), []

        def ask(first: bool, app: Any = app, index: Any = index, wrong: Any = wrong, number: int = number) -> None:
            for turn in range(20):
                if first and turn == 5:
                    app.router.routes.append(Route(f"/late{number}", endpoint()))
                for path, expected in (("/items/special", "free"), ("/items/ada", "secret"), ("/items/bob", "secret")):
                    found = index.find(scope_of(path), path)
                    if found is None or found.endpoint.__name__ != expected:
                        wrong.append((path, found))

        threads = [threading.Thread(target=ask, args=(one == 0,)) for one in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# --- what is remembered of paths ---------------------------------------------------------------------------------


async def test_a_method_that_a_client_calls_websocket_spoils_no_websocket() -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    stack = guarded(Starlette(routes=[WebSocketRoute("/ws", policy(scopes="admin")(talk))]))
    assert await status(stack, "/ws", method="WEBSOCKET") == 404
    assert await status(stack, "/ws", method="WEBSOCKET", kind="websocket") == 403
    assert await status(stack, "/ws", "admin", method="WEBSOCKET", kind="websocket") == 101


@pytest.fixture
def rest() -> Iterator[None]:
    class Rest(Convertor[str]):
        regex = "[^?]*"

        def convert(self, value: str) -> str:
            return value

        def to_string(self, value: str) -> str:
            return value

    CONVERTOR_TYPES["rest"] = Rest()
    yield
    del CONVERTOR_TYPES["rest"]


@pytest.mark.usefixtures("rest")
@pytest.mark.parametrize("kind", ["path", "rest"])
async def test_parameters_that_span_segments_mix_nothing_up(kind: str) -> None:
    inside = [Route("/open", public()), Route("/closed", secret())]
    stack = guarded(
        Starlette(
            routes=[
                Mount(f"/m/{{where:{kind}}}", routes=inside),
                Route(f"/r/{{where:{kind}}}/open", public()),
                Route(f"/r/{{where:{kind}}}/closed", secret()),
            ]
        )
    )
    for top in ("/m", "/r"):
        assert await status(stack, f"{top}/a/b/c/d/e/open") == 200
        assert await is_closed(stack, f"{top}/a/b/c/d/e/closed")


async def test_a_route_that_chooses_its_endpoint_itself_has_the_marks_of_that() -> None:
    first, second = public(), secret()

    class Choosing(Route):
        def matches(self, scope: Any) -> Any:
            match, child = super().matches(scope)
            if match is Match.FULL:
                child = {**child, "endpoint": second if (b"x-v", b"2") in scope["headers"] else first}
            return match, child

    stack = guarded(Starlette(routes=[Choosing("/x", first)]))
    for version, expected in (("1", 200), ("2", 403), ("1", 200)):
        assert (await drive(stack, path="/x", headers={"x-v": version, "x-scopes": ""})).status == expected


async def test_a_path_at_which_the_router_fails_fails_there_alone() -> None:
    """`int` takes 4,300 digits. What fails is answered by `Problems`, and says nothing of others of that form."""
    app = Starlette(routes=[Route("/items/{number:int}", secret())])
    stack = PolicyStack(app, [RequestID(), Problems(), *policies()])
    sent = await drive(stack, path="/items/" + "9" * 5_000, raise_errors=False)
    assert (sent.status, sent.json()["error_code"]) == (500, "SRV_500")
    assert await is_closed(stack, "/items/5")


def _spelled(word: str, number: int) -> str:
    """`word` in one of its spellings."""
    return "".join(letter.upper() if number >> place & 1 else letter for place, letter in enumerate(word))


def test_made_up_methods_push_nothing_out() -> None:
    class Items(HTTPEndpoint):
        @policy(scopes="read")
        async def get(self, request: Request) -> None: ...

        async def method_of_our_own(self, request: Request) -> None: ...

    index = RouteIndex(Starlette(routes=[Route("/x", secret()), Route("/items", Items)]))
    for number in range(200):
        for method in (f"M{number}", _spelled("get", number), _spelled("method_of_our_own", number)):
            for path in ("/x", "/items"):
                index.find(scope_of(path, method), path)
    for method in ("GET", "HEAD"):
        assert index.find(scope_of("/x", method), "/x") is not None
    shape = index.now._start
    for segment in ("", "x"):
        shape = index.now._step(shape, segment)
    assert "GET" in shape.found
    assert len(shape.found) <= 12
    assert len(index.now._resolutions) < 12


def test_hostile_paths_ask_few_of_ten_thousand_routes() -> None:
    asked: list[str] = []
    matches = Route.matches

    def counted(self: Route, scope: Any) -> Any:
        asked.append(self.path)
        return matches(self, scope)

    app = Starlette(routes=[Route(f"/v7/kind{number}/{{name}}/state", endpoint()) for number in range(10_000)])
    late = "/v7/kind5/x/state\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "matches", counted)
        index = RouteIndex(app)
        for path in ("/nowhere", "/" + "a/" * 20_000, "/v7/kind9/kind8/kind7", "/v7/" + "x" * 50_000, late, "//"):
            for method in ("GET", "MADEUP"):
                index.find(scope_of(path, method), path)
        found = index.find(scope_of(late), late)
    assert len(asked) < 20
    assert found is not None
    assert found.template == "/v7/kind5/{name}/state"


# --- what applications are made of -------------------------------------------------------------------------------


def _function(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return middleware


class _Slots:
    __slots__ = ("_wrapped",)

    def __init__(self, app: Any) -> None:
        self._wrapped = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._wrapped(scope, receive, send)


def _partial(app: Any) -> Any:
    async def middleware(inner: Any, scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    return partial(middleware, app)


@pytest.mark.parametrize("wrap", [Passing, _function, _Slots, _partial])
async def test_a_middleware_hides_no_marks_however_it_keeps_its_application(wrap: Any) -> None:
    app = Starlette(routes=[Route("/x", secret())])
    app.add_middleware(wrap)
    app.add_middleware(PolicyStack, policies=policies())
    assert await is_closed(app, "/x")
    assert await is_closed(guarded(wrap(Starlette(routes=[Route("/x", secret())]))), "/x")


async def test_a_router_is_read_wherever_a_stack_is_around_it() -> None:
    def routes() -> list[Any]:
        return [Route("/x", secret())]

    around = [Middleware(PolicyStack, policies=policies())]
    assert await is_closed(guarded(Router(routes())), "/x")
    assert await is_closed(guarded(APIRouter(routes=routes())), "/x")
    assert await is_closed(Router(routes(), middleware=around), "/x")
    assert await is_closed(Starlette(routes=[Mount("/m", routes=routes(), middleware=around)]), "/m/x")
    assert await is_closed(Starlette(routes=[Route("/x", secret(), middleware=around)]), "/x")

    class Items(HTTPEndpoint):
        @policy(scopes="admin")
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("items")

    assert await is_closed(Starlette(routes=[Route("/x", Items, middleware=around)]), "/x")


async def test_a_stack_of_a_route_or_a_router_may_be_the_one_that_understands() -> None:
    around = [Middleware(PolicyStack, policies=[Scopes()])]
    inner = Router([Route("/x", secret())], middleware=around)
    app = Starlette(routes=[Mount("/m", app=inner), Route("/r", secret(), middleware=around), Route("/bare", secret())])
    stack = PolicyStack(app, [Known()])
    assert await is_closed(stack, "/m/x")
    assert await is_closed(stack, "/r")
    with pytest.raises(MarksIgnoredError):
        await status(stack, "/bare", "admin")


async def test_an_application_is_marked_as_a_whole() -> None:
    async def raw(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("raw")(scope, receive, send)

    def api() -> FastAPI:
        app = FastAPI()
        app.add_api_route("/x", lambda: 1)
        app.add_api_route("/open", policy(public=True)(lambda: 1))
        return policy(scopes="admin")(app)

    mounted = FastAPI()
    mounted.mount("/sub", api())
    mounted.mount("/raw", policy(scopes="admin")(raw))
    mounted.router.routes.append(Mount("/behind", app=raw, middleware=[Middleware(Passing)]))
    for path in ("/sub/x", "/raw/x", "/behind/x"):
        assert await is_closed(guarded(mounted), path)
    inside = api()
    inside.add_middleware(PolicyStack, policies=policies())
    for app in (inside, guarded(api())):
        assert await is_closed(app, "/x")
        assert await status(app, "/open") == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_application_of_another_framework_is_marked_as_a_whole() -> None:
    app = policy(scopes="admin")(quart.Quart(__name__))
    app.add_url_rule("/x", view_func=_quart_view)
    sent = [await drive(guarded(app), path="/x", headers={**LOCAL, "x-scopes": one}) for one in ("", "admin")]
    assert [one.status for one in sent] == [403, 200]


async def _quart_view() -> str:
    return "x"


@pytest.mark.skipif(not hasattr(APIRouter, "frontend"), reason="this FastAPI has no frontends")
async def test_frontends_obey_their_routers(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("hello")
    (tmp_path / "open.html").write_text("hello")
    deep, admin = APIRouter(), policy(scopes="admin")(APIRouter(prefix="/admin"))
    deep.frontend("/deep", directory=tmp_path)
    admin.frontend("/", directory=tmp_path)
    admin.include_router(deep)
    app = policy(public=True)(FastAPI())
    app.include_router(admin)
    app.frontend("/site", directory=tmp_path)
    stack = guarded(app)
    for path in ("/admin/", "/admin/open.html", "/admin/deep/", "/admin/deep/open.html"):
        assert await is_closed(stack, path)
    assert await status(stack, "/site/open.html") == 200
    assert await status(stack, "/site/open.html", method="POST") == 405


async def test_a_foreign_application_with_a_stack_of_its_own_keeps_its_marks() -> None:
    """The stack outside cannot read what is mounted, and must not speak for it."""

    @litestar.get("/x", sync_to_thread=False)
    @policy(scopes="admin")
    def closed() -> str:
        return "x"

    inner = PolicyStack(litestar.Litestar([closed], openapi_config=None), [Scopes()])
    hidden = {"inner": PolicyStack(Starlette(routes=[Route("/x", secret())]), [Scopes()])}

    async def dispatch(scope: Any, receive: Any, send: Any) -> None:
        await hidden["inner"](scope, receive, send)

    app = Starlette(routes=[Mount("/lit", app=inner), Mount("/hidden", app=dispatch), Route("/other", secret())])
    stack = guarded(app, strict_routes=True)
    assert await is_closed(stack, "/lit/x")
    assert await is_closed(stack, "/hidden/x")
    assert stack.mismatches == 0


async def test_an_application_mounted_in_litestar_keeps_its_marks() -> None:
    inner = PolicyStack(Starlette(routes=[Route("/x/", secret())]), [Scopes()])

    @litestar.get("/open", sync_to_thread=False)
    @policy(public=True)
    def open_() -> str:
        return "open"

    @litestar.asgi("/m", is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)  # type: ignore[arg-type]

    stack = guarded(litestar.Litestar([open_, mounted], openapi_config=None), strict_routes=True)
    assert await is_closed(stack, "/m/x")
    assert stack.mismatches == 0


async def test_a_marked_mount_and_the_endpoints_of_the_application_in_it_are_both_heard() -> None:
    @litestar.get("/inner", sync_to_thread=False)
    @policy(scopes="inner")
    def inner() -> str:
        return "inner"

    @litestar.get("/quick", sync_to_thread=False)
    @policy(timeout=5)
    def quick() -> str:
        return "quick"

    @litestar.get("/plain", sync_to_thread=False)
    def plain() -> str:
        return "plain"

    foreign = PolicyStack(litestar.Litestar([inner, quick, plain], openapi_config=None), [Timeout(), Scopes()])
    stack = guarded(Starlette(routes=[policy(scopes="area")(Mount("/m", app=Passing(foreign)))]))
    asked = {
        (path, scopes): await status(stack, f"/m/{path}", scopes)
        for path in ("inner", "quick", "plain")
        for scopes in ("", "inner", "area", "area inner")
    }
    assert asked == {
        (path, scopes): 200 if "area" in scopes and (path != "inner" or "inner" in scopes) else 403
        for path, scopes in asked
    }
    assert stack.mismatches == 0


async def test_marks_in_what_cannot_be_read_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    held = {"app": Starlette(routes=[Route("/x", secret()), Route("/free", endpoint())])}

    async def dispatch(scope: Any, receive: Any, send: Any) -> None:
        await held["app"](scope, receive, send)

    stack = guarded(dispatch)
    with caplog.at_level(logging.ERROR, logger="sigil_policy"):
        assert await status(stack, "/x") == 200
    assert "policies were chosen for None" in caplog.text
    assert stack.mismatches == 1
    assert await status(stack, "/free") == 200
    assert stack.mismatches == 1
    sent = await drive(guarded(dispatch, strict_routes=True), path="/x", raise_errors=False)
    assert isinstance(sent.error, RouteMismatchError)
    sent = await drive(PolicyStack(dispatch, [Known()]), path="/x", raise_errors=False)
    assert isinstance(sent.error, MarksIgnoredError), "nobody here understands what /x asks for"
    assert (await drive(PolicyStack(dispatch, [Known()]), path="/free")).status == 200


async def test_a_request_whose_method_is_called_websocket_meets_no_rule_of_websockets() -> None:
    scopes = Scopes(routes={"WEBSOCKET /x": "chat", "/x": "admin"})
    app = PolicyStack(Starlette(routes=[Route("/x", endpoint(), methods=["WEBSOCKET"])]), [Known(), scopes])
    assert await status(app, "/x", "chat", method="WEBSOCKET") == 403
    assert await status(app, "/x", "admin", method="WEBSOCKET") == 200


async def test_what_starlette_knows_is_read_with_the_prefix_of_where_fastapi_includes_it() -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    sub = FastAPI()
    sub.add_api_route("/x", policy(scopes="admin")(lambda: 1))
    inner = APIRouter(prefix="/r")
    inner.add_api_websocket_route("/ws/{room}", policy(scopes="admin")(talk))
    inner.routes += [
        Route("/r/plain/{number:int}", secret()),
        WebSocketRoute("/r/old", policy(scopes="admin")(talk)),
        Mount("/r/m", app=sub),
        Host("api.example", app=Router([Route("/hosted", secret())])),
    ]
    middle, app = APIRouter(prefix="/mid"), FastAPI()
    middle.include_router(inner)
    app.include_router(middle, prefix="/p")
    for number in range(20):
        app.add_api_route(f"/lit{number}/a", lambda: 1)
    stack = guarded(app, strict_routes=True)
    templates = {found.template for found in stack.host.endpoints() if found.marks is not None}
    assert templates == {
        "/p/mid/r/ws/{room}", "/p/mid/r/plain/{number}", "/p/mid/r/old", "/p/mid/r/m/x", "/p/mid/hosted",
    }  # fmt: skip
    for path in ("/p/mid/r/plain/5", "/p/mid/r/m/x"):
        assert await is_closed(stack, path)
    for path in ("/p/mid/r/ws/lobby", "/p/mid/r/old"):
        asked = [await status(stack, path, one, method="WEBSOCKET", kind="websocket") for one in ("", "admin")]
        assert asked == [403, 101]
    for scopes, expected in (("", 403), ("admin", 200)):
        sent = await drive(stack, path="/p/mid/hosted", headers={"host": "api.example", "x-scopes": scopes})
        assert sent.status == expected


# What paths are made of, and what may stand there.
_WRITTEN = ["a", "b", "{}", "{:int}", "{:path}", "c.json", "{}.json", "{}-{}", "\u00e9", "%2F", "", "A"]
_SENT = [
    "a",
    "b",
    "z",
    "12",
    "c.json",
    "q.json",
    "a-b",
    "\u00e9",
    "%2F",
    "",
    "A",
    ".",
    "..",
    "x\n",
    "1.5",
    "-",
    "9" * 30,
]


def _tree(draw: Random, depth: int) -> list[Any]:
    """Routes at random: mounts within mounts, applications, hosts, the same path with different methods."""
    routes: list[Any] = []
    for _ in range(draw.randint(1, 5)):
        written = "/" + "/".join(draw.choice(_WRITTEN) for _ in range(draw.randint(0, 3)))
        path = re.sub(r"\{", lambda _: "{v" + str(draw.randrange(10**9)), written)
        kind = draw.random()
        if kind < 0.15 and depth:
            routes.append(Mount(path.rstrip("/"), routes=_tree(draw, depth - 1)))
        elif kind < 0.25 and depth:
            routes.append(Mount(path.rstrip("/"), app=Starlette(routes=_tree(draw, depth - 1))))
        elif kind < 0.35 and depth:
            routes.append(Host(draw.choice(["h1", "{name}.org"]), app=Router(_tree(draw, depth - 1))))
        else:
            served = secret() if draw.random() < 0.5 else endpoint()
            routes.append(Route(path, served, methods=draw.choice([None, ["GET"], ["POST"], ["GET", "DELETE"]])))
    return routes


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_routes_are_what_is_served_was_found(seed: int) -> None:
    draw = Random(seed)
    app = Starlette(routes=_tree(draw, 2) + [Route(f"/{number}/{{x}}", endpoint()) for number in range(8)])
    stack = PolicyStack(app, [Known()])
    host = stack.host
    for _ in range(60):
        path = "/" + "/".join(draw.choice(_SENT) for _ in range(draw.randint(0, 5)))
        scope = {
            **scope_of(path, draw.choice(["GET", "GET", "HEAD", "POST", "get", "MADE-UP", "WEBSOCKET"])),
            "root_path": draw.choice(["", "", "/a", "/b"]),
            "headers": [(b"host", draw.choice([b"h1", b"x.org", b"none"]))],
        }
        host.marked()  # as an exchange begins
        found = host.find({**scope})
        ran: list[Any] = []

        async def spying(given: Any, receive: Any, send: Any, ran: list[Any] = ran) -> None:
            await app(given, receive, send)
            ran.append(given.get("endpoint"))

        sent = await drive(spying, scope["method"], path, scope=scope, raise_errors=False)
        if sent.error is None and sent.status == 200:
            assert [None if found is None else found.endpoint] == ran, (scope, found)


# --- who says what -----------------------------------------------------------------------------------------------


def test_one_function_on_two_routes_does_not_get_what_was_said_last() -> None:
    function = secret()
    with pytest.raises(ValueError, match=r"scopes=\('admin',\) already.*functools\.partial"):
        policy(public=True)(function)
    assert policy(scopes="admin", cost=2)(function) is function


async def test_one_function_on_two_routes_is_marked_twice_by_partials_or_routes() -> None:
    function = endpoint()
    routes = [
        Route("/a", policy(scopes="admin")(partial(function))),
        Route("/b", policy(public=True)(partial(function))),
        policy(scopes="admin")(Route("/c", function)),
        policy(public=True)(Route("/d", function)),
    ]
    stack = guarded(Starlette(routes=routes))
    for closed, opened in (("/a", "/b"), ("/c", "/d")):
        assert await is_closed(stack, closed)
        assert await status(stack, opened) == 200


async def test_what_is_said_of_a_class_is_said_below_it() -> None:
    @policy(scopes="admin")
    class Closed(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("closed")

    @policy(cost=2)
    class Dear(Closed):
        pass

    stack = PolicyStack(Starlette(routes=[Route("/x", Dear)]), [*policies(), RateLimit(tiers={"free": "9/minute"})])
    assert await is_closed(stack, "/x")


async def test_objects_that_are_called_may_be_marked_at_their_call() -> None:
    class Raw:
        @policy(scopes="admin")
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await PlainTextResponse("raw")(scope, receive, send)

    class Handler:
        @policy(scopes="admin")
        async def __call__(self) -> int:
            return 1

        @policy(scopes="admin")
        async def bound(self) -> int:
            return 1

    app = FastAPI()
    app.add_api_route("/called", Handler())
    app.add_api_route("/bound", Handler().bound)
    app.add_api_route("/partial", partial(Handler().bound))
    app.router.routes.append(Route("/raw", Raw()))
    for path in ("/called", "/bound", "/partial", "/raw"):
        assert await is_closed(guarded(app), path)


async def test_scopes_of_websockets_and_of_what_is_around_them_are_asked_first() -> None:
    def who(scopes: SecurityScopes) -> list[str]:
        return scopes.scopes

    async def talk(websocket: WebSocket, _: Annotated[Any, Security(who, scopes=["talk"])]) -> None:
        await websocket.accept()
        await websocket.close()

    router = APIRouter(prefix="/r", dependencies=[Security(who, scopes=["area"])])
    router.add_api_websocket_route("/ws", talk)
    app = FastAPI()
    app.include_router(router)
    app.dependency_overrides[who] = lambda: None  # what runs there is the application's; what it declares stays said
    for scopes, expected in (("talk", 403), ("area", 403), ("area talk", 101)):
        assert await status(guarded(app), "/r/ws", scopes, method="WEBSOCKET", kind="websocket") == expected


async def test_limits_of_two_methods_are_two_limits() -> None:
    class Items(HTTPEndpoint):
        @policy(limit="1/minute")
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("get")

        @policy(limit="2/minute")
        async def post(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("post")

    def one() -> Any:
        return policy(limit="1/minute")(endpoint("same"))

    app = Starlette(
        routes=[Route("/c", Items), Route("/f", one(), methods=["GET"]), Route("/f", one(), methods=["POST"])],
    )
    stack = PolicyStack(app, [Known(), RateLimit(tiers={"free": Tier(requests="99/minute")})], clock=FrozenClock())
    assert [await status(stack, "/c", method="POST") for _ in range(3)] == [200, 200, 429]
    assert [await status(stack, "/c", method=method) for method in ("GET", "HEAD")] == [200, 429]
    assert [await status(stack, "/f", method=method) for method in ("POST", "GET", "HEAD", "POST")] == [
        200, 200, 429, 429,
    ]  # fmt: skip


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("method", ["get", "Get"])
async def test_no_spelling_of_a_method_dodges_a_rule(method: str) -> None:
    """Quart and Django serve `get` as `GET`; a server hands it on (h11, for one)."""
    app = quart.Quart(__name__)
    app.add_url_rule("/x", view_func=_quart_view)
    stack = PolicyStack(app, [Known(), Scopes(routes={"GET /x": "admin", "/x": "other"})])
    for scopes, expected in (("", 403), ("other", 403), ("admin", 200)):
        assert (await drive(stack, method, "/x", headers={**LOCAL, "x-scopes": scopes})).status == expected

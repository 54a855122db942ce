"""Litestar, Quart, Falcon, Django, BlackSheep: the endpoint is found by the framework's own router, before it runs."""

import asyncio
import subprocess
import sys
from types import ModuleType
from typing import Any
from urllib.parse import quote

import blacksheep
import falcon.asgi
import litestar
import pytest
import quart
import quart.views
from blacksheep.server.controllers import Controller as BlackSheepController
from blacksheep.server.routing import Router as BlackSheepRouter
from blacksheep.server.routing import RoutesRegistry
from django.conf import settings
from django.conf.urls.i18n import i18n_patterns
from django.http import HttpResponse
from django.urls import include, path, re_path
from django.views import View
from hypothesis import given
from hypothesis import strategies as st
from litestar.middleware import DefineMiddleware
from litestar.params import FromPath
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.host import PLAIN, Host, find_host
from sigil_policy.core.marks import policy
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import MarksIgnoredError, PolicyStack
from sigil_policy.frameworks.routes import RouteIndex
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.testing import FrozenClock, assert_problem, connect, drive
from tests.frameworks.services import configured_django as django_app
from tests.served import served

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # as these frameworks


class Caller(Policy):
    """Authenticates by a header: the scopes."""

    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        scopes = ex.headers.get(b"x-scopes")
        if scopes is not None:
            ex.authenticate(Principal("ada", scopes=frozenset(scopes.decode().split())))


class Spy(Policy):
    """Keeps the template that is known before the router has run, and the one that is known at the end."""

    seen: Any

    def on_request(self, ex: Exchange) -> None:
        self.seen.append(ex.route)

    def on_finish(self, ex: Exchange) -> None:
        self.seen.append(ex.route)


# --- the same service in each framework ----------------------------------------------------------------------------


def litestar_app() -> Any:
    @litestar.get("/plain/{name:str}", sync_to_thread=False)
    def plain(name: FromPath[str]) -> str:
        return f"plain {name}"

    @litestar.get("/open", sync_to_thread=False)
    @policy(public=True)
    def open_() -> str:
        return "open"

    @litestar.get("/items/{number:int}", sync_to_thread=False)
    @policy(scopes="read")
    def read(number: FromPath[int]) -> str:
        return "read"

    @litestar.post("/items/{number:int}", sync_to_thread=False)
    @policy(scopes="write")
    def write(number: FromPath[int]) -> str:
        return "write"

    @policy(scopes="admin")
    class Admin(litestar.Controller):
        path = "/admin"

        @litestar.get("/list", sync_to_thread=False)
        def list_(self) -> str:
            return "list"

        @litestar.get("/health", sync_to_thread=False)
        @policy(public=True)
        def health(self) -> str:
            return "health"

    @litestar.websocket("/ws/{room:str}")
    @policy(scopes="talk")
    async def talk(socket: litestar.WebSocket[Any, Any, Any], room: FromPath[str]) -> None:
        await socket.accept()
        await socket.close()

    return litestar.Litestar([plain, open_, read, write, Admin, talk], openapi_config=None)


def quart_app() -> Any:
    app = quart.Quart(__name__)
    admin = quart.Blueprint("admin", __name__, url_prefix="/admin")
    policy(scopes="admin")(admin)

    @app.get("/plain/<name>")
    async def plain(name: str) -> str:
        return f"plain {name}"

    @app.get("/open")
    @policy(public=True)
    async def open_() -> str:
        return "open"

    class Items(quart.views.MethodView):
        @policy(scopes="read")
        async def get(self, number: int) -> str:
            return "read"

        @policy(scopes="write")
        async def post(self, number: int) -> str:
            return "write"

    app.add_url_rule("/items/<int:number>", view_func=Items.as_view("items"))

    @admin.get("/list")
    async def list_() -> str:
        return "list"

    @admin.get("/health")
    @policy(public=True)
    async def health() -> str:
        return "health"

    @app.websocket("/ws/<room>")
    @policy(scopes="talk")
    async def talk(room: str) -> None:
        await quart.websocket.accept()

    app.register_blueprint(admin)
    return app


def falcon_app() -> Any:
    class Plain:
        async def on_get(self, req: Any, resp: Any, **params: Any) -> None:
            resp.text = "plain"

    class Items:
        @policy(scopes="read")
        async def on_get(self, req: Any, resp: Any, number: int) -> None:
            resp.text = "read"

        @policy(scopes="write")
        async def on_post(self, req: Any, resp: Any, number: int) -> None:
            resp.text = "write"

    @policy(scopes="admin")
    class Admin:
        async def on_get_list(self, req: Any, resp: Any) -> None:
            resp.text = "list"

        @policy(public=True)
        async def on_get_health(self, req: Any, resp: Any) -> None:
            resp.text = "health"

    class Talk:
        @policy(scopes="talk")
        async def on_websocket(self, req: Any, ws: Any, room: str) -> None:
            await ws.accept()

    app = falcon.asgi.App()
    app.add_route("/plain/{name}", Plain())
    app.add_route("/open", policy(public=True)(Plain()))
    app.add_route("/items/{number:int}", Items())
    app.add_route("/admin/list", Admin(), suffix="list")
    app.add_route("/admin/health", Admin(), suffix="health")
    app.add_route("/ws/{room}", Talk())
    return app


async def plain_view(request: Any, name: str) -> HttpResponse:
    return HttpResponse(f"plain {name}")


@policy(public=True)
async def open_view(request: Any) -> HttpResponse:
    return HttpResponse("open")


class ItemsView(View):
    @policy(scopes="read")
    async def get(self, request: Any, number: int) -> HttpResponse:
        return HttpResponse("read")

    @policy(scopes="write")
    async def post(self, request: Any, number: int) -> HttpResponse:
        return HttpResponse("write")


@policy(scopes="admin")
async def list_view(request: Any) -> HttpResponse:
    return HttpResponse("list")


@policy(public=True)
async def health_view(request: Any) -> HttpResponse:
    return HttpResponse("health")


def django_urls() -> Any:
    urls: Any = ModuleType("urls")
    urls.urlpatterns = [
        path("plain/<str:name>", plain_view),
        path("open", open_view),
        path("items/<int:number>", ItemsView.as_view()),
        path("admin/", include([path("list", list_view), re_path(r"^health$", health_view)])),
        re_path(r"^years/(?P<year>[0-9]{4})/(?:x/)?$", policy(scopes="years")(list_view_of_year)),
    ]
    urls.urlpatterns += i18n_patterns(path("greeting", policy(scopes="greet")(list_view_of_language)))
    return urls


async def list_view_of_year(request: Any, year: str) -> HttpResponse:
    return HttpResponse(year)


async def list_view_of_language(request: Any) -> HttpResponse:
    return HttpResponse("hello")


def blacksheep_app() -> Any:
    router = BlackSheepRouter()
    controllers = RoutesRegistry()
    router.controllers_routes = controllers

    @router.get("/plain/{name}")
    async def plain(name: str) -> str:
        return f"plain {name}"

    @router.get("/open")
    @policy(public=True)
    async def open_() -> str:
        return "open"

    @router.get("/items/{int:number}")
    @policy(scopes="read")
    async def read(number: int) -> str:
        return "read"

    @router.post("/items/{int:number}")
    @policy(scopes="write")
    async def write(number: int) -> str:
        return "write"

    @router.get("/admin/list")
    @policy(scopes="admin")
    async def list_() -> str:
        return "list"

    @router.get("/admin/health")
    @policy(public=True)
    async def health() -> str:
        return "health"

    @router.ws("/ws/{room}")
    @policy(scopes="talk")
    async def talk(websocket: blacksheep.WebSocket, room: str) -> None:
        await websocket.accept()

    return blacksheep.Application(router=router)


MAKERS = {
    "litestar": litestar_app,
    "quart": quart_app,
    "falcon": falcon_app,
    "django": django_app,
    "blacksheep": blacksheep_app,
}


@pytest.fixture(autouse=True)
def urls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Django's settings are the process's: these tests bring an URL configuration of their own."""
    from django.urls import clear_url_caches

    django_app()
    urls = django_urls()
    monkeypatch.setattr(settings, "ROOT_URLCONF", urls, raising=False)
    clear_url_caches()
    yield urls
    clear_url_caches()


@pytest.fixture(params=MAKERS)
async def app(request: pytest.FixtureRequest) -> Any:
    made = MAKERS[request.param]()
    if request.param == "blacksheep":
        await made.start()
    return made


def named(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["app"])


def stack(app: Any, *policies: Policy, **options: Any) -> PolicyStack:
    return PolicyStack(app, [Problems(), Caller(), *policies], clock=FrozenClock(), **options)


async def ask(app: Any, target: str, scopes: str | None = None, **options: Any) -> Any:
    method, _, where = target.partition(" ")
    headers = {"host": "localhost"} | ({} if scopes is None else {"x-scopes": scopes})
    return await drive(served(app), method, where, headers=headers, raise_errors=False, **options)


CASES = [
    ("GET /open", None, 200),
    ("GET /items/5", None, 401),
    ("GET /items/5", "write", 403),
    ("GET /items/5", "read", 200),
    ("POST /items/5", "read", 403),
    ("POST /items/5", "write", None),
    ("GET /admin/list", "read", 403),
    ("GET /admin/list", "admin", 200),
    ("GET /admin/health", None, 200),
    ("GET /plain/x", None, 401),
    ("GET /plain/x", "", 200),
    ("GET /nowhere", None, 401),
    ("GET /nowhere", "", 404),
]


@pytest.mark.parametrize(("target", "scopes", "status"), CASES)
async def test_marks_of_endpoints_hold(app: Any, target: str, scopes: str | None, status: int | None) -> None:
    around = stack(app, Scopes())
    sent = await ask(around, target, scopes)
    assert sent.status in ((200, 201) if status is None else (status,))
    assert around.mismatches == 0


@pytest.mark.parametrize(
    ("target", "template"),
    [("GET /plain/x", "/plain/{name}"), ("GET /items/5", "/items/{number}"), ("GET /nowhere", None)],
)
async def test_the_template_is_known_before_and_after(app: Any, target: str, template: str | None) -> None:
    seen: list[Any] = []
    await ask(PolicyStack(app, [Problems(), Spy(seen=seen), Caller(), Scopes()]), target, "read")
    assert seen == [template, template]


async def test_a_websocket_has_marks(app: Any, request: pytest.FixtureRequest) -> None:
    if named(request) == "django":
        with pytest.raises(ValueError, match="Django can only handle"):
            await drive(app, path="/ws/lobby", kind="websocket")
        return
    around = stack(app, Scopes())
    async with connect(around, "/ws/lobby", raise_errors=False, headers={"host": "localhost"}) as socket:
        await socket.send({"type": "websocket.connect"})
        assert (await socket.receive("websocket.http.response.start"))["status"] == 401
    async with connect(around, "/ws/lobby", headers={"host": "localhost", "x-scopes": "talk"}) as socket:
        await socket.accepted()


async def test_marks_that_nobody_understands_are_no_silent_wish(app: Any) -> None:
    around = PolicyStack(app, [Problems()])
    assert any("/items/{number}" in sentence for sentence in around.unserved())
    sent = await ask(around, "GET /items/5")
    assert (sent.status, type(sent.error)) == (500, MarksIgnoredError)
    assert_problem(sent, "SRV_500")
    assert (await ask(around, "GET /plain/x")).status == 200


async def test_tables_are_stronger(app: Any) -> None:
    around = stack(app, Scopes(routes={"GET /items/{number}": "other"}))
    assert (await ask(around, "GET /items/5", "read")).status == 403
    assert (await ask(around, "GET /items/5", "other")).status == 200
    assert (await ask(around, "POST /items/5", "other")).status == 403


@pytest.mark.parametrize("where", ["//items//5", "/items/5/", "/ITEMS/5", "/items/./5", "/x/../items/5", "/items%2F5"])
async def test_another_spelling_of_a_path_opens_nothing(app: Any, where: str) -> None:
    """Whatever the framework makes of it: nobody reaches `read` without the scope, by its marks or by a table."""
    for guard in (Scopes(), Scopes(routes={"GET /items/{number}": "read"})):
        sent = await ask(stack(app, guard), f"GET {where}", "")
        assert sent.body != b"read"
        assert sent.status in (400, 403, 404, 301, 302, 308), sent.status


async def test_a_root_path_is_part_of_the_template_where_the_router_takes_it_off(
    app: Any, request: pytest.FixtureRequest
) -> None:
    seen: list[Any] = []
    around = stack(app, Spy(seen=seen), Scopes())
    sent = await ask(around, "GET /root/items/5", "read", scope={"root_path": "/root"})
    if named(request) == "falcon":
        assert sent.status == 404  # Falcon takes no root path off
        return
    assert (sent.status, seen) == (200, ["/root/items/{number}"] * 2)
    assert (await ask(around, "GET /root/items/5", "other", scope={"root_path": "/root"})).status == 403


async def test_a_rule_of_a_table_sees_the_path_as_the_router_does(app: Any) -> None:
    around = stack(app, Scopes(routes={"GET /items/{number}": "rule"}))
    for where in ("/root/items/5", "/x/root/items/5", "/rootitems/5"):
        sent = await ask(around, f"GET {where}", "", scope={"root_path": "/root"})
        assert sent.status in (403, 404), where


async def test_a_late_route_is_seen(urls: Any) -> None:
    @policy(scopes="late")
    async def late(*args: Any, **kwargs: Any) -> Any:
        return "late"

    lite = litestar_app()
    around = stack(lite, Scopes())
    assert (await ask(around, "GET /late", "")).status == 404

    @litestar.get("/late")
    @policy(scopes="late")
    async def late_handler() -> str:
        return "late"

    lite.register(late_handler)
    assert [(await ask(around, "GET /late", scopes)).status for scopes in ("", "late")] == [403, 200]

    views = quart_app()
    around = stack(views, Scopes())
    assert around.host.marked()
    views.add_url_rule("/late", "late", late)
    assert [(await ask(around, "GET /late", scopes)).status for scopes in ("", "late")] == [403, 200]

    class Late:
        @policy(scopes="late")
        async def on_get(self, req: Any, resp: Any) -> None:
            resp.text = "late"

    resources = falcon_app()
    around = stack(resources, Scopes())
    assert (await ask(around, "GET /late", "")).status == 404
    resources.add_route("/late", Late())
    assert [(await ask(around, "GET /late", scopes)).status for scopes in ("", "late")] == [403, 200]

    async def late_view(request: Any) -> HttpResponse:
        return HttpResponse("late")

    around = stack(django_app(), Scopes())
    assert (await ask(around, "GET /late", "")).status == 404
    urls.urlpatterns.append(path("late", policy(scopes="late")(late_view)))
    assert [(await ask(around, "GET /late", scopes)).status for scopes in ("", "late")] == [403, 200]


async def test_made_up_methods_and_paths_are_not_kept(app: Any) -> None:
    around = stack(app, Scopes())
    for number in range(100):
        await ask(around, f"M{number} /items/5", "")
        await ask(around, f"GET /items/{number}", "read")
    assert len(around.host._resolutions) < 60
    assert len(around.marked) < 60


WORDS = [
    "plain", "open", "items", "admin", "list", "health", "5", "x", "-1", "5.0", "", ".", "..", "%2F", "é", "ITEMS",
    "items\n", "a:b", "{number}", "[", "\x00", "items;5", "?", "#", "*", " ", "5 ", "\u0665", "%", "//",
]  # fmt: skip
KNOWN = {b"read": {"read"}, b"write": {"write"}, b"list": {"admin"}}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_whatever_a_path_is_the_endpoint_that_runs_was_found(app: Any, request: pytest.FixtureRequest) -> None:
    examples: list[tuple[str, str]] = []

    @given(
        where=st.lists(st.sampled_from(WORDS), max_size=4).map(lambda words: "/" + "/".join(words)),
        method=st.sampled_from(["GET", "GET", "POST", "HEAD", "OPTIONS", "MADE-UP"]),
    )
    def draw(where: str, method: str) -> None:
        examples.append((where, method))

    draw()
    host = find_host(app)
    for where, method in examples:
        scope = {"root_path": "", "raw_path": quote(where, safe="/%;:?#*[]").encode()}
        found = host.find({"type": "http", "method": method, "path": where, "headers": [], **scope})
        sent = await ask(app, f"{method} {where}", scope=scope)
        if sent.messages and sent.body in KNOWN and sent.status < 300:
            assert found is not None, (method, where)
            assert found.marks is not None, (method, where)
            assert set(found.marks.scopes or ()) == KNOWN[sent.body], (method, where)


def test_made_up_methods_are_not_kept_for_a_class_of_starlette() -> None:
    @policy(scopes="class")
    class Items(HTTPEndpoint):
        @policy(scopes="read")
        async def get(self, request: Any) -> None: ...

        @policy(scopes="purge")
        async def purge(self, request: Any) -> None: ...

    index = RouteIndex(Starlette(routes=[Route("/items", Items)]))
    said = {}
    for method in [*(f"M{number}" for number in range(100)), "GET", "HEAD", "PURGE", "M1", "POST"]:
        found = index.find({"type": "http", "method": method, "path": "/items", "headers": []}, "/items")
        assert found is not None
        said[method] = found.marks.scopes if found.marks else None
    assert len(index.now._resolutions) < 10
    assert {name: said[name] for name in ("GET", "HEAD", "PURGE", "M1", "POST")} == {
        "GET": ("read",), "HEAD": ("read",), "PURGE": ("purge",), "M1": ("class",), "POST": ("class",),
    }  # fmt: skip


async def test_a_path_outside_of_its_root_does_not_make_starlette_forget_the_one_inside() -> None:
    @policy(scopes="read")
    async def read(request: Any) -> PlainTextResponse:
        return PlainTextResponse("read")

    app = Starlette(routes=[Mount("/in", app=Starlette(routes=[Route("/items", read)]))])
    around = stack(app, Scopes())
    for where, status in (("/in/items", 404), ("/behind/in/items", 403), ("/in/items", 404), ("/behind/in/items", 403)):
        assert (await ask(around, f"GET {where}", "", scope={"root_path": "/behind"})).status == status
    assert around.mismatches == 0


async def test_a_method_of_nobody_elses_has_its_own_marks() -> None:
    class Items(quart.views.MethodView):
        methods = {"GET", "PURGE"}

        @policy(scopes="read")
        async def get(self) -> str:
            return "read"

        @policy(scopes="purge")
        async def purge(self) -> str:
            return "purge"

    app = quart.Quart(__name__)
    app.add_url_rule("/items", view_func=Items.as_view("items"))
    around = stack(app, Scopes())
    assert [(await ask(around, f"{method} /items", "read")).status for method in ("GET", "PURGE")] == [200, 403]
    assert (await ask(around, "PURGE /items", "purge")).status == 200


# --- each framework's own -----------------------------------------------------------------------------------------


async def test_litestar_in_its_own_middleware_list() -> None:
    @litestar.get("/items/{number:int}")
    @policy(scopes="read")
    async def read(number: FromPath[int]) -> str:
        return "read"

    guarded = DefineMiddleware(PolicyStack, policies=[Problems(), Caller(), Scopes()])
    app = litestar.Litestar([read], middleware=[guarded], openapi_config=None)
    assert [(await ask(app, "GET /items/5", scopes)).status for scopes in (None, "", "read")] == [401, 403, 200]
    bare = DefineMiddleware(PolicyStack, policies=[Problems()])
    app = litestar.Litestar([read], middleware=[bare], openapi_config=None)
    assert (await ask(app, "GET /items/5")).status == 500


async def test_litestar_tags_and_marks_above_the_decorator() -> None:
    @litestar.get("/tagged", tags=["internal"])
    async def tagged() -> str:
        return ""

    @policy(scopes="above")
    @litestar.get("/above")
    async def above() -> str:
        return ""

    app = litestar.Litestar([litestar.Router("/r", route_handlers=[tagged, above])], openapi_config=None)
    around = stack(app, Scopes(), tags={"internal": policy(scopes="internal")})
    assert [(await ask(around, "GET /r/tagged", scopes)).status for scopes in ("", "internal")] == [403, 200]
    assert [(await ask(around, "GET /r/above", scopes)).status for scopes in ("", "above")] == [403, 200]


async def test_quart_around_its_inner_application() -> None:
    app = quart_app()
    app.asgi_app = stack(app.asgi_app, Scopes())
    assert [(await ask(app, "GET /items/5", scopes)).status for scopes in (None, "read")] == [401, 200]


async def test_a_request_to_quart_waits_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quart runs what listens to its signals in a thread, if it is no coroutine: a response would come a turn late."""

    def taken(*_: Any) -> Any:
        raise AssertionError("a thread was taken")

    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", taken)
    around = stack(quart_app(), Scopes())
    assert (await ask(around, "GET /items/5", "read")).status == 200
    async with connect(around, "/ws/lobby", headers={"host": "localhost", "x-scopes": "talk"}) as socket:
        await socket.accepted()
    assert around.mismatches == 0


async def test_quart_with_hosts() -> None:
    app = quart.Quart(__name__, host_matching=True, static_host="localhost")
    for host in ("localhost", "elsewhere"):

        @app.get("/x", host=host, endpoint=host)
        @policy(scopes=host)
        async def x() -> str:
            return "x"

    around = stack(app, Scopes())
    assert [(await ask(around, "GET /x", scopes)).status for scopes in ("elsewhere", "localhost")] == [403, 200]
    assert around.mismatches == 0


@pytest.mark.parametrize("strict", [False, True])
async def test_falcon_middleware_that_sends_elsewhere_is_noticed(strict: bool) -> None:
    class Elsewhere:
        async def process_request(self, req: Any, resp: Any) -> None:
            if req.path == "/open":
                req.path = "/items/5"

    app = falcon_app()
    app.add_middleware(Elsewhere())
    around = stack(app, Scopes(), strict_routes=strict)
    sent = await ask(around, "GET /open")
    assert around.mismatches >= 1
    assert (sent.body == b"read") is not strict


async def test_falcon_methods_that_are_none_are_no_mismatch() -> None:
    """A client may send `get`, which Falcon refuses; that is no endpoint that ran."""
    around = stack(falcon_app(), Scopes(), strict_routes=True)
    assert (await ask(around, "get /items/5", "read")).status == 400
    assert around.mismatches == 0


async def test_falcon_sinks_and_foreign_routers() -> None:
    async def sink(req: Any, resp: Any, **params: Any) -> None:
        resp.text = "sink"

    app = falcon_app()
    app.add_sink(policy(scopes="deep")(sink), "/deep")
    around = stack(app, Scopes())
    assert [(await ask(around, "GET /deep/x", scopes)).status for scopes in ("", "deep")] == [403, 200]

    class Items:
        @policy(scopes="read")
        async def on_get(self, req: Any, resp: Any) -> None:
            resp.text = "read"

    items = Items()

    class Own:
        options = None

        def find(self, uri: str, req: Any = None) -> Any:
            return (items, {"GET": items.on_get}, {}, "/own")

    around = stack(falcon.asgi.App(router=Own()), Scopes(), strict_routes=True)
    assert (await ask(around, "GET /own")).status == 401  # the default holds
    sent = await ask(around, "GET /own", "")
    assert (sent.status, around.mismatches) == (500, 1)


async def test_django_regular_expressions_and_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    around = stack(django_app(), Spy(seen=seen), Scopes())
    assert [(await ask(around, "GET /years/2026/", scopes)).status for scopes in ("", "years")] == [403, 200]
    assert seen[0] == "/years/{year}/"
    assert (await ask(around, "GET /en-us/greeting", "")).status == 403
    assert (await ask(around, "GET /en-us/greeting", "greet")).status == 200
    monkeypatch.setattr(settings, "MIDDLEWARE", ["django.middleware.locale.LocaleMiddleware"])
    around = stack(django_app(), Scopes())
    assert [(await ask(around, "GET /de/greeting", scopes)).status for scopes in ("", "greet")] == [403, 200]
    assert around.mismatches == 0


async def test_django_urlconf_that_a_middleware_sets_is_noticed() -> None:
    app = django_app()
    around = stack(app, Scopes())

    async def other(request: Any, view: Any, args: Any, kwargs: Any) -> None: ...

    app._view_middleware.append(other)  # what is there stays

    async def elsewhere(request: Any) -> HttpResponse:
        request.urlconf = ModuleType("elsewhere")
        request.urlconf.urlpatterns = [path("open", ItemsView.as_view(), {"number": 5})]
        return await inner(request)

    inner, app._middleware_chain = app._middleware_chain, elsewhere
    sent = await ask(around, "GET /open")
    assert (sent.status, around.mismatches) == (200, 1)


async def test_blacksheep_that_has_not_started_says_so() -> None:
    around = stack(blacksheep_app(), Scopes())
    sent = await ask(around, "GET /open")
    assert (sent.status, "start()" in str(sent.error)) == (500, True)


async def test_blacksheep_without_marks_starts_with_its_first_request() -> None:
    router = BlackSheepRouter()

    @router.get("/items/{number}")
    async def read(number: str) -> str:
        return "read"

    seen: list[Any] = []
    around = PolicyStack(blacksheep.Application(router=router), [Spy(seen=seen)])
    assert [(await ask(around, "GET /items/5")).status for _ in range(2)] == [200, 200]
    assert seen[2:] == ["/items/{number}"] * 2


async def test_blacksheep_rules_hold_in_any_case_of_letters() -> None:
    router = BlackSheepRouter()

    @router.get("/Items/{number}")
    async def read(number: str) -> str:
        return "read"

    app = blacksheep.Application(router=router)
    await app.start()
    around = stack(app, Scopes(routes={"GET /Items/{number}": "read"}))
    for where in ("/items/5", "/ITEMS/5", "/Items/5"):
        assert [(await ask(around, f"GET {where}", scopes)).status for scopes in ("", "read")] == [403, 200]


@pytest.mark.parametrize("guard", [Scopes(), Scopes(routes={"WEBSOCKET /ws/{room}": "talk"})])
async def test_blacksheep_websockets_in_another_spelling(guard: Scopes) -> None:
    app = blacksheep_app()
    await app.start()
    scope = {"raw_path": b"/w%73/lobby"}
    sent = await drive(
        stack(app, guard), path="/ws/lobby", kind="websocket", headers={"x-scopes": "other"}, scope=scope
    )
    assert sent.status == 403


async def test_blacksheep_middlewares_hide_no_marks() -> None:
    app = blacksheep_app()

    async def around_all(request: Any, handler: Any) -> Any:
        return await handler(request)

    app.middlewares.append(around_all)
    await app.start()
    around = stack(app, Scopes())
    assert [(await ask(around, "GET /items/5", scopes)).status for scopes in ("", "read")] == [403, 200]


async def test_blacksheep_paths_that_are_no_text_are_its_own_affair() -> None:
    """Its router fails at them. We would as well, before any policy has had its turn."""
    app = blacksheep_app()
    await app.start()
    around = PolicyStack(app, [RequestID(), Problems(), Caller(), Scopes()])
    sent = await drive(
        around, "GET", "/plain/x", scope={"raw_path": b"/plain/\xff"}, headers={"host": "localhost", "x-scopes": ""},
        raise_errors=False,
    )  # fmt: skip
    assert sent.status == 500
    assert sent.json()["error_code"] == "SRV_500"


@pytest.mark.parametrize("name", MAKERS)
async def test_a_middleware_that_is_a_function_hides_no_marks(name: str) -> None:
    app = MAKERS[name]()
    if name == "blacksheep":
        await app.start()

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    around = stack(middleware, Scopes())
    assert [(await ask(around, "GET /items/5", scopes)).status for scopes in ("write", "read")] == [403, 200]


async def test_a_view_of_quart_that_is_exchanged_has_its_own_marks() -> None:
    app = quart.Quart(__name__)

    async def free() -> str:
        return "free"

    @policy(scopes="admin")
    async def closed() -> str:
        return "closed"

    app.add_url_rule("/x", "x", free)
    around = stack(app, Scopes())
    assert (await ask(around, "GET /x", "")).status == 200
    app.view_functions["x"] = closed
    assert [(await ask(around, "GET /x", scopes)).status for scopes in ("", "admin")] == [403, 200]


async def test_blacksheep_controllers() -> None:
    app = blacksheep.Application(router=BlackSheepRouter())
    get = app.router.controllers_routes.get

    @policy(scopes="cats")
    class Cats(BlackSheepController):
        @get("/cats")
        async def cats(self) -> str:
            return "cats"

    app.register_controllers([Cats])
    await app.start()
    around = stack(app, Scopes())
    assert [(await ask(around, "GET /cats", scopes)).status for scopes in ("", "cats")] == [403, 200]


# --- finding ------------------------------------------------------------------------------------------------------


def test_nothing_of_a_framework_is_imported_before_the_application_has() -> None:
    code = (
        "import sys, sigil_policy.core.stack as s; s.PolicyStack(print, []);"
        "print([n for n in ('litestar', 'quart', 'falcon', 'django', 'blacksheep', 'fastapi') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_plain_application_has_no_host() -> None:
    async def plain(scope: Any, receive: Any, send: Any) -> None: ...

    class Loop:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    loop = Loop()
    loop.app = loop  # type: ignore[attr-defined]
    assert find_host(plain) is PLAIN
    assert find_host(loop) is PLAIN
    assert isinstance(find_host(litestar_app()), Host)

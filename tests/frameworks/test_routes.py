"""RouteIndex finds the endpoint that the router of Starlette and FastAPI will choose, before it chooses."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import policy
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.routes import RouteIndex
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio


def endpoint(name: str) -> Any:
    async def serve(request: Request) -> PlainTextResponse:
        return PlainTextResponse(name)

    serve.__name__ = serve.__qualname__ = name
    return serve


def socket(name: str) -> Any:
    async def serve(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    serve.__name__ = serve.__qualname__ = name
    return serve


class Resource(HTTPEndpoint):
    async def get(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("get")


async def opaque(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("opaque")(scope, receive, send)


def fastapi_app() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    direct, nested, deep = APIRouter(), APIRouter(prefix="/n"), APIRouter(prefix="/d")

    @app.get("/items/{name}")
    async def item(name: str) -> str:
        return name

    @app.get("/items/{number:int}/parts")
    async def parts(number: int) -> int:
        return number

    @app.post("/items/{name}")
    async def change(name: str) -> str:
        return name

    @app.get("/items/special")
    async def never_reached() -> str:
        return ""

    @direct.get("/x/{y}")
    async def x(y: str) -> str:
        return y

    @nested.get("/{kind}.json")
    async def document(kind: str) -> str:
        return kind

    @deep.get("/{rest:path}")
    async def rest(rest: str) -> str:
        return rest

    @nested.websocket("/ws/{room}")
    async def room(websocket: WebSocket, room: str) -> None:
        await websocket.accept()
        await websocket.close()

    nested.include_router(deep)
    direct.include_router(nested, prefix="/again")
    app.include_router(direct, prefix="/v7")
    app.include_router(nested)
    sub = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @sub.get("/s/{z}")
    async def s(z: str) -> str:
        return z

    app.mount("/sub/{tenant}", sub)
    app.mount("/star", Starlette(routes=[Route("/a", endpoint("a")), Mount("/b", routes=[Route("/c", endpoint("c"))])]))
    app.mount("/opaque", opaque)
    return app


def starlette_app() -> Starlette:
    return Starlette(
        routes=[
            Route("/", endpoint("home")),
            Route("/r/", endpoint("slash")),
            Route("/class", Resource),
            Route("/f/{price:float}", endpoint("price")),
            Route("/f/{id:uuid}", endpoint("by_id")),
            Route("/f/{name}", endpoint("by_name"), methods=["GET", "DELETE"]),
            Route("/files/{rest:path}", endpoint("files")),
            Route("/{a}-{b}", endpoint("two")),
            WebSocketRoute("/ws", socket("ws")),
            Mount("/m", routes=[Route("/in/{x}", endpoint("inside")), Mount("/deeper", app=opaque)]),
            Mount("", routes=[Route("/last/{x}", endpoint("last"))]),
        ]
    )


class Spy(Policy):
    """Keeps the template that is known before the router has run."""

    seen: Any

    def on_request(self, ex: Any) -> None:
        self.seen.append(ex.route)


APPS = {"fastapi": fastapi_app(), "starlette": starlette_app()}
INDEXES = {name: RouteIndex(app) for name, app in APPS.items()}
WORDS = [
    "items", "special", "x", "v7", "again", "n", "d", "ws", "sub", "s", "star", "a", "b", "c", "opaque", "r", "class",
    "f", "files", "m", "in", "deeper", "last", "parts", "12", "1.5", "a.json", "p-q", "ümlaut", "%2F", "", "-", "é-x",
    "7b9c6e4a-58a5-4d8e-9b59-6a6a35c0f7d1", ".", "..", "x y", "items\n",
]  # fmt: skip
paths = st.lists(st.sampled_from(WORDS), min_size=0, max_size=6).map(lambda words: "/" + "/".join(words))


def scope_of(path: str, method: str) -> dict[str, Any]:
    return {"type": "websocket" if method == "WEBSOCKET" else "http", "method": method, "path": path, "headers": []}


async def chosen(app: Any, path: str, method: str) -> Any:
    """The endpoint that the router really chooses."""
    scopes: list[Any] = []

    async def spying(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await app(scope, receive, send)

    kind = "websocket" if method == "WEBSOCKET" else "http"
    await drive(spying, method, path, kind=kind, raise_errors=False)
    return scopes[0].get("endpoint")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("app", APPS)
async def test_it_finds_what_the_router_chooses(app: str) -> None:
    """Over random paths, with shapes that are remembered from one to the next; a router that has gone stays unasked."""
    examples: list[tuple[str, str]] = []

    @given(path=paths, method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "DELETE", "WEBSOCKET"]))
    def draw(path: str, method: str) -> None:
        examples.append((path, method))

    draw()
    known = [
        "/items/ada", "/items/special", "/items/12/parts", "/items/x/parts", "/v7/x/1", "/v7/again/n/a.json",
        "/v7/again/n/d/p/q/r", "/n/a.json", "/n/d/", "/n/ws/lobby", "/sub/acme/s/1", "/sub/acme/none", "/star/a",
        "/star/b/c", "/opaque/anything", "/", "/r/", "/r", "/class", "/f/1.5", "/f/12", "/f/x", "/f/", "/files/a/b",
        "/p-q", "/ws", "/m/in/1", "/m/deeper/x/y", "/last/1", "/nowhere", "/m", "/sub/acme", "/items//parts",
        "/f/7b9c6e4a-58a5-4d8e-9b59-6a6a35c0f7d1",
    ]  # fmt: skip
    examples += [(path, method) for path in known for method in ("GET", "HEAD", "POST", "WEBSOCKET")]
    index = INDEXES[app]
    for path, method in [*examples, *examples]:
        found = index.find(scope_of(path, method), path)
        expected = await chosen(APPS[app], path, method)
        if expected is None and found is not None:
            # A slash too many or too few: the router answers with a redirect.
            pytest.fail(f"{method} {path!r}: {found} was found, and nothing ran")
        assert expected is None or (found is not None and found.endpoint == expected), (method, path, found, expected)


@pytest.mark.parametrize(
    ("app", "path", "template"),
    [
        ("fastapi", "/items/ada", "/items/{name}"),
        ("fastapi", "/v7/x/1", "/v7/x/{y}"),
        ("fastapi", "/v7/again/n/a.json", "/v7/again/n/{kind}.json"),
        ("fastapi", "/n/d/p/q", "/n/d/{rest}"),
        ("fastapi", "/sub/acme/s/1", "/sub/{tenant}/s/{z}"),
        ("fastapi", "/star/b/c", "/star/b/c"),
        ("fastapi", "/nowhere", None),
        ("starlette", "/m/in/5", "/m/in/{x}"),
        ("starlette", "/f/1.5", "/f/{price}"),
        ("starlette", "/last/1", "/last/{x}"),
    ],
)
def test_the_template_is_whole_with_all_prefixes(app: str, path: str, template: str | None) -> None:
    found = INDEXES[app].find(scope_of(path, "GET"), path)
    assert (None if found is None else found.template) == template


async def test_a_policy_knows_the_template_before_the_router_runs() -> None:
    seen: list[Any] = []
    app = fastapi_app()
    app.add_middleware(PolicyStack, policies=[Spy(seen=seen)])
    await drive(app, "GET", "/v7/x/1")
    await drive(app, "GET", "/nowhere")
    assert seen == ["/v7/x/{y}", None]


async def test_what_is_mounted_and_opaque_is_no_route_of_the_application() -> None:
    """The mount has moved the root of the path: what is left of it would fit the first route."""
    seen: list[Any] = []

    class Late(Policy):
        def on_finish(self, ex: Any) -> None:
            seen.append(ex.route)

    app = Starlette(routes=[Route("/{name}", endpoint("first")), Mount("/opaque", app=opaque)])
    app.add_middleware(PolicyStack, policies=[Late()])
    assert (await drive(app, "GET", "/opaque/x")).body == b"opaque"
    assert seen == ["/opaque"]


async def test_parameters_of_a_mount_are_parameters_in_the_template() -> None:
    seen: list[Any] = []

    class Late(Policy):
        def on_finish(self, ex: Any) -> None:
            seen.append(ex.route)

    app = fastapi_app()
    app.add_middleware(PolicyStack, policies=[Late()])
    await drive(app, "GET", "/behind/sub/acme/s/1", scope={"root_path": "/behind"})
    await drive(app, "GET", "/sub/acme/s/1")
    assert seen == ["/behind/sub/{tenant}/s/{z}", "/sub/{tenant}/s/{z}"]


@pytest.mark.filterwarnings("ignore:The `root_path` parameter")
async def test_a_root_path_is_part_of_the_template_and_not_of_the_match() -> None:
    seen: list[Any] = []
    app = FastAPI(root_path="/proxy")

    @app.get("/items/{name}")
    async def item(name: str, request: Request) -> str | None:
        return get_exchange(request).route

    app.add_middleware(PolicyStack, policies=[Spy(seen=seen)])
    sent = await drive(app, "GET", "/items/ada")
    assert sent.json() == "/proxy/items/{name}"
    sent = await drive(PolicyStack(app, [Spy(seen=seen)]), "GET", "/items/ada")
    assert sent.status == 200
    assert all(template is not None and template.endswith("/items/{name}") for template in seen)


async def test_a_route_that_is_added_at_run_time_is_seen() -> None:
    app = FastAPI()
    inner, sub = APIRouter(), FastAPI()
    app.include_router(inner, prefix="/inner")
    app.mount("/sub", sub)
    index = RouteIndex(app)

    def find(path: str) -> Resolution | None:
        return index.find(scope_of(path, "GET"), path)

    assert find("/late") is None
    for router, prefix in ((app, ""), (inner, "/inner"), (sub, "/sub")):
        path = f"{prefix}/late"
        before = find(path)
        assert before is None or before.template is None
        router.add_api_route("/late", endpoint("late"))
        found = find(path)
        assert found is not None
        assert found.template == path
    later = APIRouter()
    later.add_api_route("/x", endpoint("x"))
    app.include_router(later, prefix="/later")
    found = find("/later/x")
    assert found is not None
    assert found.template == "/later/x"


async def test_a_host_is_asked_with_its_header_each_time() -> None:
    app = Starlette(
        routes=[
            Host("api.example.org", app=Router([Route("/x", endpoint("api"))])),
            Host("www.example.org", app=Router([Route("/x", endpoint("www"))])),
        ]
    )
    index = RouteIndex(app)
    for name in ("api", "www", "api"):
        scope = {**scope_of("/x", "GET"), "headers": [(b"host", f"{name}.example.org".encode())]}
        found = index.find(scope, "/x")
        assert found is not None
        assert found.endpoint.__name__ == name


async def test_a_route_with_a_mind_of_its_own_is_asked_each_time() -> None:
    class Beta(Route):
        def matches(self, scope: Any) -> Any:
            from starlette.routing import Match

            return super().matches(scope) if (b"x-beta", b"1") in scope["headers"] else (Match.NONE, {})

    index = RouteIndex(Starlette(routes=[Beta("/x", endpoint("beta")), Route("/x", endpoint("stable"))]))
    for headers, name in (([], "stable"), ([(b"x-beta", b"1")], "beta"), ([], "stable")):
        found = index.find({**scope_of("/x", "GET"), "headers": headers}, "/x")
        assert found is not None
        assert found.endpoint.__name__ == name


def test_what_clients_make_up_is_not_remembered_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigil_policy.frameworks.routes._MOST_SHAPES", 50)
    index = RouteIndex(starlette_app())
    words = ["files", "f", "m", "in", "last", "x"]

    def made_up() -> Iterator[str]:
        for number in range(600):
            yield "/" + "/".join(words[number // 6**place % 6] for place in range(5))

    for number, path in enumerate(made_up()):
        index.find(scope_of(path, f"M{number}"), path)
        assert index.now._shapes <= 60
    for number in range(200):
        index.find(scope_of("/f/x", f"MADE{number}"), "/f/x")
    shape = index.now._start
    for segment in ("", "f", "x"):
        shape = index.now._step(shape, segment)
    assert len(shape.found) <= 32


def test_a_million_names_are_one_shape() -> None:
    index = RouteIndex(starlette_app())
    for number in range(500):
        index.find(scope_of(f"/m/in/name{number}", "GET"), f"/m/in/name{number}")
    assert index.now._shapes < 10


async def test_without_marks_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Starlette(routes=[Route("/", endpoint("home"))])
    monkeypatch.setattr("sigil_policy.frameworks.routes._Reading.find", lambda *_: pytest.fail("looked up"))
    assert (await drive(PolicyStack(app, [Policy()]), "GET", "/")).status == 200
    app.router.routes.append(Route("/marked", policy(cost=2)(endpoint("marked"))))
    with pytest.raises(BaseException, match="looked up"):
        await drive(PolicyStack(app, [Policy()]), "GET", "/")

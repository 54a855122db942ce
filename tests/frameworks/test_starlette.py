"""Starlette and FastAPI: one add_middleware call maps every error; the application's own handlers win."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import ProblemType
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems

Missing = ProblemType(code="AGT_904", title="MissingError", status=404)


class Body(BaseModel):
    name: int
    password: str = "x"


class Pass(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Any:
        return await call_next(request)


ROUTES: list[str | None] = []


class RouteSpy(Policy):
    def on_finish(self, ex: Exchange) -> None:
        ROUTES.append(ex.route)


def application(**options: Any) -> FastAPI:
    app = FastAPI(**options)
    router = APIRouter(prefix="/r")
    nested = APIRouter(prefix="/n")
    sub = FastAPI()

    @app.get("/boom")
    def boom() -> None:
        raise ValueError("hunter2")

    @app.post("/body")
    def body(body: Body) -> Body:
        return body

    @app.get("/missing")
    async def missing() -> None:
        raise Missing(detail="not here")

    @app.get("/conflict")
    def conflict() -> None:
        raise HTTPException(409, "taken", {"X-Kept": "1"})

    @nested.get("/x/{y}")
    def x(y: int) -> int:
        return y

    @sub.get("/s/{z}")
    def s(z: int) -> None:
        raise HTTPException(401, "who")

    @sub.get("/boom")
    def sub_boom() -> None:
        raise ValueError("hunter2")

    router.include_router(nested)
    app.include_router(router)
    app.mount("/sub", sub)
    return app


def added(app: FastAPI) -> Any:
    app.add_middleware(PolicyStack, policies=[RouteSpy(), Problems()])
    return app


def added_under_others(app: FastAPI) -> Any:
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(Pass)
    app.add_middleware(PolicyStack, policies=[RouteSpy(), Problems()])
    return app


def wrapped(app: FastAPI) -> Any:
    return PolicyStack(app, policies=[RouteSpy(), Problems()])


def wrapped_early(app: FastAPI) -> Any:
    client = TestClient(app)
    client.get("/missing-route")  # the application has built its own middleware already
    return PolicyStack(app, policies=[RouteSpy(), Problems()])


MOUNTS = [added, added_under_others, wrapped, wrapped_early]


@pytest.fixture(params=MOUNTS, ids=lambda mount: mount.__name__)
def mount(request: pytest.FixtureRequest) -> Callable[[FastAPI], Any]:
    mount: Callable[[FastAPI], Any] = request.param
    return mount


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "REQ_404"),
        ("DELETE", "/conflict", {}, 405, "REQ_405"),
        ("GET", "/conflict", {}, 409, "REQ_409"),
        ("GET", "/missing", {}, 404, "AGT_904"),
        ("POST", "/body", {"json": {"name": "hunter2"}}, 400, "REQ_001"),
        ("POST", "/body", {"content": b"{"}, 400, "REQ_001"),
        ("GET", "/r/n/x/hunter2", {}, 400, "REQ_001"),
        ("GET", "/boom", {}, 500, "SRV_500"),
        ("GET", "/sub/s/1", {}, 401, "REQ_401"),
        ("GET", "/sub/s/q", {}, 400, "REQ_001"),
        ("GET", "/sub/nowhere", {}, 404, "REQ_404"),
        ("GET", "/sub/boom", {}, 500, "SRV_500"),
    ],
)
def test_every_error_is_a_problem(
    mount: Any, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    response = TestClient(mount(application()), raise_server_exceptions=False).request(method, path, **options)
    assert (response.status_code, response.json()["error_code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "hunter2" not in response.text.replace(path, "")
    assert response.json()["status"] == status  # PD-03


def test_headers_of_handled_errors_survive(mount: Any) -> None:
    """ST-01, PD-26."""
    client = TestClient(mount(application()), raise_server_exceptions=False)
    assert client.delete("/conflict").headers["allow"] == "GET"
    assert client.get("/conflict").headers["x-kept"] == "1"
    assert client.get("/sub/s/1").headers["www-authenticate"].startswith("Bearer")


def test_unhandled_errors_reach_the_server(mount: Any) -> None:
    client = TestClient(mount(application()))
    with pytest.raises(ValueError, match="hunter2"):
        client.get("/boom")


def test_422_by_option() -> None:
    app = application()
    app.add_middleware(PolicyStack, policies=[Problems(validation_status=422)])
    response = TestClient(app).post("/body", json={})
    assert (response.status_code, response.json()["error_code"]) == (422, "REQ_002")


def test_the_applications_own_handlers_win(mount: Any) -> None:
    app = application()

    @app.exception_handler(HTTPException)
    async def own(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"own": True}, error.status_code)

    response = TestClient(mount(app)).get("/conflict")
    assert (response.status_code, response.json()) == (409, {"own": True})


def test_the_applications_own_status_handler_wins(mount: Any) -> None:
    app = application()

    async def own(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("gone fishing", 404)

    app.add_exception_handler(404, own)
    assert TestClient(mount(app)).get("/nowhere").text == "gone fishing"


class Tag(Policy):
    def on_response(self, ex: Any, head: Any) -> None:
        head.headers.append((b"x-tag", b"1"))


@pytest.mark.parametrize("key", [500, Exception])
@pytest.mark.parametrize("sync", [False, True])
def test_the_applications_own_500_is_called_through_our_send(key: Any, sync: bool) -> None:
    app = application()

    async def own(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"own": request.url.path}, 503, {"Retry-After": "9"})

    def own_sync(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"own": request.url.path}, 503, {"Retry-After": "9"})

    app.add_exception_handler(key, own_sync if sync else own)
    app.add_middleware(PolicyStack, policies=[Tag(), Problems()])
    response = TestClient(app, raise_server_exceptions=False).get("/boom")
    assert (response.status_code, response.json()) == (503, {"own": "/boom"})
    assert (response.headers["x-tag"], response.headers["retry-after"]) == ("1", "9")
    with pytest.raises(ValueError, match="hunter2"):
        TestClient(app).get("/boom")


def test_with_debug_the_exception_is_only_raised_on() -> None:
    app = application(debug=True)
    app.add_middleware(PolicyStack, policies=[Problems()])
    response = TestClient(app, raise_server_exceptions=False).get("/boom", headers={"accept": "text/html"})
    assert response.status_code == 500
    assert response.headers["content-type"].startswith("text/html")


def test_an_http_exception_of_a_middleware_inside_is_its_status() -> None:
    class Strict:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            raise HTTPException(418, "short and stout")

    app = application()
    app.add_middleware(Strict)
    app.add_middleware(PolicyStack, policies=[Problems()])
    response = TestClient(app).get("/missing")
    assert (response.status_code, response.json()["detail"]) == (418, "short and stout")


def test_cookies_of_an_http_exception_and_dict_details_survive() -> None:
    app = FastAPI()

    @app.get("/")
    def read() -> None:
        raise HTTPException(403, {"reason": "x"}, {"Set-Cookie": "a=1"})  # type: ignore[arg-type]

    app.add_middleware(PolicyStack, policies=[Problems()])
    response = TestClient(app).get("/")
    assert (response.json()["data"], response.headers["set-cookie"]) == ({"reason": "x"}, "a=1")


def test_an_error_that_is_no_error_status_is_left_to_the_framework() -> None:
    app = FastAPI()

    @app.get("/")
    def read() -> None:
        raise HTTPException(304)

    app.add_middleware(PolicyStack, policies=[Problems()])
    response = TestClient(app).get("/")
    assert (response.status_code, response.content) == (304, b"")


def test_plain_starlette_and_its_mounts() -> None:
    async def teapot(request: Request) -> None:
        raise HTTPException(418)

    inner = Starlette(routes=[Route("/tea", teapot)])
    app = Starlette(
        routes=[Mount("/a", routes=[Mount("/b", inner)])], middleware=[Middleware(PolicyStack, policies=[Problems()])]
    )
    client = TestClient(app)
    assert client.get("/a/b/tea").json()["error_code"] == "REQ_418"
    assert client.get("/a/b/nope").json()["error_code"] == "REQ_404"
    assert client.get("/nope").json()["error_code"] == "REQ_404"


def test_a_mounted_application_used_without_a_stack_answers_as_before() -> None:
    inner = FastAPI()

    @inner.get("/")
    def read() -> None:
        raise HTTPException(409, "taken")

    @inner.post("/")
    def write(body: Body) -> None: ...

    outer = FastAPI()
    outer.mount("/in", inner)
    TestClient(PolicyStack(outer, policies=[Problems()])).get("/in/")
    assert TestClient(inner).get("/").json() == {"detail": "taken"}
    assert TestClient(inner).post("/", json={}).status_code == 422


def test_an_http_exception_before_accept_denies_the_websocket() -> None:
    async def closed(websocket: WebSocket) -> None:
        raise HTTPException(403, "not you")

    app = Starlette(routes=[WebSocketRoute("/ws", closed)])
    app.add_middleware(PolicyStack, policies=[Problems()])
    from starlette.testclient import WebSocketDenialResponse

    with pytest.raises(WebSocketDenialResponse) as denied, TestClient(app).websocket_connect("/ws"):
        pass
    assert denied.value.status_code == 403
    assert denied.value.json()["error_code"] == "REQ_403"


def test_an_error_in_a_stream_is_raised_on() -> None:
    async def stream(request: Request) -> StreamingResponse:
        async def parts() -> Any:
            yield b"one"
            raise ValueError("hunter2")

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", stream)])
    app.add_middleware(PolicyStack, policies=[Problems()])
    with pytest.raises(ValueError, match="hunter2"):
        TestClient(app).get("/")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/r/n/x/1", "/r/n/x/{y}"),
        ("/sub/s/1", "/sub/s/{z}"),
        ("/missing", "/missing"),
        ("/nowhere", None),
    ],
)
def test_the_route_is_the_whole_template(mount: Any, path: str, route: str | None) -> None:
    ROUTES.clear()
    TestClient(mount(application()), raise_server_exceptions=False).get(path)
    assert ROUTES[-1] == route

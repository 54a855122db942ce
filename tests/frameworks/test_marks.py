"""What endpoints say of themselves: read from the routes, applied by the policies, never silently ignored."""

import asyncio
import logging
from datetime import date
from functools import partial, wraps
from typing import Annotated, Any

import anyio
import pytest
import structlog
import trio.testing
from fastapi import APIRouter, Depends, FastAPI, Security, WebSocket
from fastapi.security import OAuth2PasswordBearer, SecurityScopes
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.marks import Marks, marks_of, policy
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import MarksIgnoredError, PolicyStack, RouteMismatchError
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.cache_control import CacheControl, CacheRule
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit, Tier
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.timeout import Timeout
from sigil_policy.policies.versioning import Deprecation, Versioning
from sigil_policy.testing import FrozenClock, assert_problem, drive
from sigil_policy.testing.marks import check_app

pytestmark = pytest.mark.anyio


class Caller(Policy):
    """Authenticates by a header: the scopes."""

    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        scopes = ex.headers.get(b"x-scopes")
        if scopes is not None:
            ex.authenticate(Principal("ada", scopes=frozenset(scopes.decode().split())))


def mounted(app: Any, *policies: Policy, **options: Any) -> Any:
    app.add_middleware(PolicyStack, policies=[Problems(), Caller(), *policies], clock=FrozenClock(), **options)
    return app


async def ask(app: Any, path: str, scopes: str | None = None, method: str = "GET", **options: Any) -> int:
    headers = {} if scopes is None else {"x-scopes": scopes}
    return (await drive(app, method, path, headers=headers, **options)).status


# --- what may be said --------------------------------------------------------------------------------------------


def test_a_mark_wraps_nothing() -> None:
    async def run(name: str) -> str:
        return name

    assert policy(scopes="a b", cost=3)(run) is run
    assert marks_of(run) == Marks(scopes=("a", "b"), cost=3)


def test_marks_add_up_and_the_upper_decorator_wins() -> None:
    @policy(cost=5)
    @policy(cost=2, limit="10/minute")
    async def run() -> None: ...

    assert marks_of(run) == Marks(cost=5, limit="10/minute")


@pytest.mark.parametrize("stronger", [{"scopes": "a"}, {"any_scope": "a"}, {"public": True}, {"public": False}])
def test_who_says_who_may_call_has_said_all_of_it(stronger: Any) -> None:
    said = policy(**stronger).over(policy(any_scope="b", cost=2))
    assert said == policy(**stronger, cost=2)


def test_marks_are_found_behind_wrappers_and_partials() -> None:
    @policy(cost=2)
    async def run(name: str) -> None: ...

    @wraps(run)
    async def wrapped(*args: Any) -> None: ...

    assert marks_of(partial(run, "x")) == marks_of(wrapped) == Marks(cost=2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"public": True, "scopes": "a"}, "keep one"),
        ({"scopes": "a", "any_scope": "b"}, "keep one"),
        ({"scopes": 'a"b'}, "RFC 6749"),
        ({"any_scope": []}, "nobody"),
        ({"public": "no"}, "True, False or None"),
        ({"cost": -1}, "cost"),
        ({"cost": True}, "cost"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(said: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**said)


def test_what_cannot_be_marked_says_so() -> None:
    with pytest.raises(TypeError, match="right above the function"):
        policy(cost=2)(object())


# --- Scopes ------------------------------------------------------------------------------------------------------


def guarded() -> FastAPI:
    app = FastAPI()
    admin = policy(scopes="admin:all")(APIRouter(prefix="/admin"))
    below = APIRouter(prefix="/below")

    @app.get("/open")
    @policy(public=True)
    async def open_() -> None: ...

    @app.get("/one")
    @policy(scopes="a b")
    async def one() -> None: ...

    @app.get("/any")
    @policy(any_scope=["a", "b"])
    async def any_() -> None: ...

    @app.get("/plain")
    async def plain() -> None: ...

    @app.get("/tagged", tags=["internal"])
    async def tagged() -> None: ...

    @admin.get("/list")
    async def list_() -> None: ...

    @admin.get("/health")
    @policy(public=True)
    async def health() -> None: ...

    @below.get("/deep")
    async def deep() -> None: ...

    @below.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    admin.include_router(below)
    app.include_router(admin)
    app.include_router(below, prefix="/other")
    return app


@pytest.mark.parametrize(
    ("path", "scopes", "status"),
    [
        ("/open", None, 200),
        ("/one", None, 401),
        ("/one", "a", 403),
        ("/one", "a b", 200),
        ("/any", "b", 200),
        ("/any", "c", 403),
        ("/plain", None, 401),
        ("/plain", "", 200),
        ("/tagged", "a", 403),
        ("/tagged", "internal", 200),
        ("/admin/list", "a", 403),
        ("/admin/list", "admin:all", 200),
        ("/admin/health", None, 200),
        ("/admin/below/deep", "a", 403),
        ("/admin/below/deep", "admin:all", 200),
        # The same router, included elsewhere, where nobody says anything.
        ("/other/below/deep", "a", 200),
        ("/nowhere", None, 401),
    ],
)
async def test_who_may_call_is_said_at_the_endpoint_its_tag_or_its_router(
    path: str, scopes: str | None, status: int
) -> None:
    app = mounted(guarded(), Scopes(), tags={"internal": policy(scopes="internal")})
    assert await ask(app, path, scopes) == status


async def test_a_websocket_obeys_what_is_said_of_it() -> None:
    app = mounted(guarded(), Scopes(), tags={"internal": policy(scopes="internal")})
    for scopes, status in ((None, 401), ("a", 403), ("admin:all", 101)):
        assert await ask(app, "/admin/below/ws", scopes, "WEBSOCKET", kind="websocket") == status


async def test_a_table_that_opens_what_an_endpoint_closes_is_told_of_once() -> None:
    @policy(scopes="admin")
    async def closed(request: Request) -> PlainTextResponse:
        return PlainTextResponse("closed")

    @policy(scopes="read")
    async def same(request: Request) -> PlainTextResponse:
        return PlainTextResponse("same")

    app = Starlette(routes=[Route("/v7/closed", closed), Route("/v7/same", same)])
    mounted(app, Scopes(routes={"/v7/**": "read"}))
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            assert [await ask(app, f"/v7/{name}", "read") for name in ("closed", "same")] == [200, 200]
    (told,) = logs
    assert (told["event"], told["log_level"]) == ("scopes_mark_overridden", "warning")
    assert "/v7/closed" in told["route"] and "admin" in told["mark"] and "read" in told["table"]


async def test_tables_are_stronger_than_endpoints() -> None:
    app = mounted(guarded(), Scopes(routes={"GET /one": "c"}, public=["/admin/list"]))
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") != "/tagged"]
    assert await ask(app, "/one", "a b") == 403
    assert await ask(app, "/one", "c") == 200
    assert await ask(app, "/admin/list") == 200


async def test_scopes_of_fastapi_are_enforced_before_the_body_is_read() -> None:
    scheme = OAuth2PasswordBearer("token", auto_error=False)
    asked: list[Any] = []

    async def who(scopes: SecurityScopes, token: Annotated[str | None, Depends(scheme)]) -> None:
        asked.append(scopes.scopes)

    app = FastAPI()
    router = APIRouter(dependencies=[Security(who, scopes=["area"])])

    @router.post("/run")
    async def run(body: dict[str, int], _: Annotated[None, Security(who, scopes=["agents:run"])]) -> None: ...

    @app.post("/else")
    @policy(scopes="own")
    async def other(_: Annotated[None, Security(who, scopes=["declared"])]) -> None: ...

    app.include_router(router)
    mounted(app, Scopes())
    for scopes, status in ((None, 401), ("agents:run", 403), ("agents:run area", 400)):
        sent = await drive(
            app, "POST", "/run", headers={"x-scopes": scopes} if scopes else {}, body=b"{no json", raise_errors=False
        )
        assert sent.status == status
    # What the endpoint marks is stronger than what it declares.
    assert await ask(app, "/else", "own", "POST") == 200


async def test_fastapi_apps_with_their_own_security_need_no_scopes_policy() -> None:
    app = FastAPI()

    def who(scopes: SecurityScopes) -> None: ...

    @app.get("/run")
    async def run(_: Annotated[None, Security(who, scopes=["agents:run"])]) -> None: ...

    app.add_middleware(PolicyStack, policies=[RequestID(), Problems()])
    assert await ask(app, "/run") == 200


# --- the other policies ------------------------------------------------------------------------------------------


async def test_cost_and_limit_are_said_at_the_endpoint() -> None:
    app = FastAPI()

    @app.get("/dear")
    @policy(cost=5)
    async def dear() -> None: ...

    @app.get("/rare")
    @policy(limit="2/minute")
    async def rare() -> None: ...

    @app.get("/seldom")
    @policy(limit=Tier(requests="1/minute"))
    async def seldom() -> None: ...

    mounted(app, RateLimit(tiers={"free": "20/minute"}))
    assert [await ask(app, "/rare") for _ in range(3)] == [200, 200, 429]
    assert [await ask(app, "/seldom") for _ in range(2)] == [200, 429]
    # 3 were counted, and what was refused was not: 20 - 3 - 5 - 5 - 5 leaves 2.
    assert [await ask(app, "/dear") for _ in range(4)] == [200, 200, 200, 429]
    assert [await ask(app, "/rare", "x") for _ in range(3)] == [200, 200, 429]
    sent = await drive(app, "GET", "/rare", headers={"x-scopes": "x"})
    assert sent.json()["violated_policies"] == ["route-minute"]


async def test_a_limit_of_a_route_can_be_written_in_the_table() -> None:
    app = Starlette(routes=[Route("/a/{x}", PlainTextResponse("a")), Route("/b", PlainTextResponse("b"))])
    mounted(app, RateLimit(tiers={"free": "20/minute"}, limits={"GET /a/{x}": "2/minute"}, costs={"/a/{x}": 3}))
    assert [await ask(app, f"/a/{number}") for number in range(2)] == [200, 429]
    assert await ask(app, "/b") == 200
    sent = await drive(app, "GET", "/b")
    assert sent.header("x-ratelimit-remaining") == str(20 - 3 - 2)


async def test_the_cost_of_the_table_holds_and_the_limit_of_the_endpoint_beside_it() -> None:
    @policy(cost=9, limit="4/minute")
    async def run(request: Request) -> PlainTextResponse:
        return PlainTextResponse("run")

    app = mounted(Starlette(routes=[Route("/run", run)]), RateLimit(tiers={"free": "20/minute"}, costs={"/run": 2}))
    assert [await ask(app, "/run") for _ in range(3)] == [200, 200, 429]


async def test_cache_is_said_at_the_endpoint() -> None:
    app = FastAPI()

    @app.get("/kept")
    @policy(cache="public, max-age=60")
    async def kept() -> None: ...

    @app.get("/varied")
    @policy(cache=CacheRule("public, max-age=60", vary=("Accept-Language",)))
    async def varied() -> None: ...

    mounted(app, CacheControl(routes={"GET /varied": "no-cache"}))
    assert (await drive(app, "GET", "/kept")).header("cache-control") == "public, max-age=60"
    assert (await drive(app, "GET", "/varied")).header("cache-control") == "no-cache"


async def test_deprecation_is_said_at_the_endpoint_and_is_stronger_than_its_versions() -> None:
    app = FastAPI()

    @app.get("/v6/agents/{name}")
    @policy(deprecated=Deprecation(deprecated=date(2023, 1, 2), successor="/v7/agents/{name}/state"))
    async def show(name: str) -> None: ...

    mounted(app, Versioning(versions={"v6": Deprecation(deprecated=date(2022, 1, 2))}))
    sent = await drive(app, "GET", "/v6/agents/ada")
    assert sent.header("deprecation") == "@1672617600"
    assert "</v7/agents/ada/state>" in str(sent.header("link"))


async def test_a_timeout_is_said_at_the_endpoint() -> None:
    app = FastAPI()

    @app.get("/slow")
    @policy(timeout=0.01)
    async def slow() -> None:
        await anyio.sleep_forever()

    mounted(app, Timeout(seconds=600))
    with anyio.fail_after(60):
        assert await ask(app, "/slow") == 504


async def test_methods_of_a_class_speak_for_themselves() -> None:
    @policy(scopes="a")
    class Resource(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("")

        @policy(scopes="w")
        async def put(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("")

    app = mounted(Starlette(routes=[Route("/r", Resource)]), Scopes())
    assert [await ask(app, "/r", "a", method) for method in ("GET", "HEAD", "PUT")] == [200, 200, 403]
    assert await ask(app, "/r", "w", "PUT") == 200


# --- never silently ----------------------------------------------------------------------------------------------


def marked_app(**marks: Any) -> Starlette:
    async def run(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ran")

    return Starlette(routes=[Route("/run", policy(**marks)(run)), Route("/free", PlainTextResponse("free"))])


@pytest.mark.parametrize(
    "marks",
    [{"scopes": "a"}, {"public": False}, {"cost": 2}, {"limit": "1/minute"}, {"cache": "no-cache"}, {"timeout": 1}],
)
async def test_an_endpoint_whose_marks_nobody_understands_does_not_run(marks: Any) -> None:
    app = mounted(marked_app(**marks))
    with pytest.raises(MarksIgnoredError, match=next(iter(marks))):
        await drive(app, "GET", "/run")
    sent = await drive(app, "GET", "/run", raise_errors=False)
    assert sent.status == 500
    assert await ask(app, "/free") == 200


@pytest.mark.parametrize("marks", [{"cost": 2}, {"cache": "max-age=x"}], ids=["nobody understands", "cannot be read"])
async def test_what_is_wrong_with_marks_is_answered_and_logged_like_any_error(marks: Any) -> None:
    """It stands in the place of the application: every policy sees it, from Problems to the access log."""
    events: list[Any] = []
    logger = structlog.wrap_logger(None, processors=[lambda _, __, event: events.append(event)])
    around = [RequestID(), AccessLog(logger=logger), Problems(), CacheControl()]
    sent = await drive(PolicyStack(marked_app(**marks), around), "GET", "/run", raise_errors=False)
    assert isinstance(sent.error, MarksIgnoredError | ValueError)
    assert_problem(sent, "SRV_500")
    assert sent.header("x-request-id")
    assert [(event["outcome"], event["status"]) for event in events] == [("error", 500)]
    assert str(sent.error) not in sent.body.decode()


async def test_a_refusal_does_not_hide_that_rules_could_not_be_read() -> None:
    """Who refuses has not seen the rules: an endpoint that everybody may call would seem to be closed."""
    app = mounted(marked_app(public=True, cost=2), Scopes())
    sent = await drive(app, "GET", "/run", raise_errors=False)
    assert (sent.status, type(sent.error)) == (500, MarksIgnoredError)


def test_a_server_with_lifespan_does_not_start() -> None:
    app = mounted(marked_app(cost=2))
    with pytest.raises(RuntimeError, match="cost"), TestClient(app):
        pass
    with TestClient(mounted(marked_app(cost=2), RateLimit())):
        pass


@pytest.mark.parametrize(
    ("marks", "around", "message"),
    [
        ({"limit": 5}, RateLimit(), "10/minute"),
        ({"limit": "often"}, RateLimit(), "often"),
        ({"limit": Tier(tokens=5)}, RateLimit(tiers={"free": "1/minute"}), "token budget"),
        ({"cache": "max-age=x"}, CacheControl(), "max-age"),
        ({"cache": 5}, CacheControl(), "CacheRule"),
        ({"deprecated": True}, Versioning(), "Deprecation"),
    ],
)
def test_what_a_policy_cannot_read_fails_at_startup_with_the_route(marks: Any, around: Policy, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as failed, TestClient(mounted(marked_app(**marks), around)):
        pass
    assert "/run" in str(failed.value)


async def test_a_stack_further_in_may_be_the_one_that_understands() -> None:
    class Foreign:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    app = marked_app(scopes="a")
    app.add_middleware(PolicyStack, policies=[Scopes()])
    app.add_middleware(Foreign)
    app.add_middleware(PolicyStack, policies=[Problems(), Caller()])
    assert [await ask(app, "/run", scopes) for scopes in (None, "b", "a")] == [401, 403, 200]


async def test_a_stack_of_a_mounted_application_may_be_the_one_that_understands() -> None:
    inner = marked_app(scopes="a")
    inner.add_middleware(PolicyStack, policies=[Scopes()])
    bare = marked_app(scopes="a")
    app = mounted(Starlette(routes=[Mount("/in", app=inner), Mount("/bare", app=bare)]))
    assert [await ask(app, "/in/run", scopes) for scopes in (None, "b", "a")] == [401, 403, 200]
    with pytest.raises(MarksIgnoredError):
        await ask(app, "/bare/run", "a")


async def test_a_stack_outside_applies_what_a_mounted_application_says() -> None:
    app = mounted(Starlette(routes=[Mount("/in", app=marked_app(scopes="a"))]), Scopes())
    assert [await ask(app, "/in/run", scopes) for scopes in (None, "b", "a")] == [401, 403, 200]


class Detour:
    """A middleware that sends requests elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/front":
            scope["path"] = "/run"
        await self.app(scope, receive, send)


async def test_an_endpoint_that_was_not_the_one_expected_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    app = Detour(marked_app(scopes="a"))
    stack = PolicyStack(app, [Problems(), Caller(), Scopes()])
    with caplog.at_level(logging.ERROR, logger="sigil_policy"):
        assert await ask(stack, "/front", "b") == 200
    assert stack.mismatches == 1
    assert "policies were chosen for" in caplog.text
    assert await ask(stack, "/free", "b") == 200
    assert stack.mismatches == 1


async def test_strict_routes_answer_500_instead() -> None:
    stack = PolicyStack(Detour(marked_app(scopes="a")), [Problems(), Caller(), Scopes()], strict_routes=True)
    sent = await drive(stack, "GET", "/front", headers={"x-scopes": "b"}, raise_errors=False)
    assert sent.status == 500
    assert isinstance(sent.error, RouteMismatchError)
    assert b"ran" not in sent.body


def test_check_app_finds_marks_that_nobody_hears() -> None:
    check_app(mounted(marked_app(cost=2), RateLimit()))
    check_app(PolicyStack(marked_app(cost=2), [RateLimit()]))
    check_app(mounted(Starlette(routes=[Mount("/in", app=mounted(marked_app(cost=2), RateLimit()))])))
    check_app(Starlette(routes=[Route("/free", PlainTextResponse("free"))]))
    for app in (
        marked_app(cost=2),
        mounted(marked_app(cost=2)),
        PolicyStack(marked_app(cost=2), [Scopes()]),
        mounted(Starlette(routes=[Mount("/in", routes=marked_app(cost=2).routes)]), Scopes()),
    ):
        with pytest.raises(AssertionError, match="cost"):
            check_app(app)

    async def bare(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(TypeError, match="cannot be read"):
        check_app(bare)


def test_check_app_looks_into_what_is_mounted_behind_middlewares() -> None:
    """What stands there may have a stack of its own; a stack outside only assumes that it has."""

    class Passing:
        def __init__(self, app: Any) -> None:
            self.app = app

    def api(*policies: Policy) -> Starlette:
        inner = marked_app(cost=2)
        inner.add_middleware(PolicyStack, policies=policies) if policies else inner.add_middleware(Passing)
        return inner

    heard, unheard = api(RateLimit()), api()
    around = [Middleware(PolicyStack, policies=[RateLimit()])]
    check_app(Starlette(routes=[Mount("/in", app=heard)]))
    check_app(mounted(Starlette(routes=[Mount("/in", app=heard)])))
    check_app(Starlette(routes=[Mount("/in", routes=marked_app(cost=2).routes, middleware=around)]))
    check_app(Starlette(routes=[Route("/in", policy(cost=2)(guarded), middleware=around)]))
    check_app(mounted(Starlette(routes=[Mount("/in", app=unheard)]), RateLimit()))
    for app in (
        Starlette(routes=[Mount("/in", app=unheard)]),
        mounted(Starlette(routes=[Mount("/in", app=unheard)])),
        Starlette(routes=[Mount("/in", app=Starlette(routes=[Mount("/deep", app=unheard)]), middleware=around[:0])]),
        Starlette(routes=[Mount("/in", app=marked_app(scopes="a"), middleware=around)]),
        Starlette(routes=[Route("/in", policy(scopes="a")(guarded), middleware=around)]),
    ):
        with pytest.raises(AssertionError, match=r"scopes|cost"):
            check_app(app)


def test_check_app_does_not_pass_what_it_cannot_read() -> None:
    held = {"app": marked_app(cost=2)}

    async def dispatch(scope: Any, receive: Any, send: Any) -> None:
        await held["app"](scope, receive, send)

    with pytest.raises(TypeError, match="cannot be read"):
        check_app(PolicyStack(dispatch, [Problems()]))


def test_a_tag_takes_marks() -> None:
    with pytest.raises(TypeError, match="policy"):
        PolicyStack(marked_app(cost=1), [], tags={"internal": "admin"})  # type: ignore[dict-item]


# --- Timeout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "anyio_backend", ["asyncio", pytest.param(("trio", {"clock": trio.testing.MockClock()}), id="trio")]
)
async def test_only_the_beginning_of_a_response_is_limited(
    anyio_backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own time passes when the test says so: a machine that stands still is in time all the same."""
    passed = 0.0
    clock: Any = None
    if anyio_backend_name == "trio":
        clock = trio.lowlevel.current_clock()
    else:
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + passed)

    async def wait(seconds: float) -> None:
        nonlocal passed
        passed += seconds
        if clock is not None:
            clock.jump(seconds)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()

    async def stream(request: Request) -> StreamingResponse:
        async def parts() -> Any:
            for _ in range(3):
                yield b"x"
                await wait(2_000)

        await wait(2_000)
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", stream)])
    sent = await drive(PolicyStack(app, [Problems(), Timeout(seconds=3_000)]), "GET", "/")
    assert (sent.status, sent.body, passed) == (200, b"xxx", 8_000)
    with pytest.raises(TimeoutError):
        await drive(PolicyStack(app, [Problems(), Timeout(seconds=3_000, whole=True)]), "GET", "/")
    assert (await drive(PolicyStack(app, [Problems(), Timeout(seconds=1_000)]), "GET", "/")).status == 504


async def test_a_timeout_of_the_application_is_its_own() -> None:
    async def fails(request: Request) -> PlainTextResponse:
        raise TimeoutError("mine")

    app = PolicyStack(Starlette(routes=[Route("/", fails)]), [Problems(), Timeout()])
    sent = await drive(app, "GET", "/", raise_errors=False)
    assert sent.status == 500


async def test_a_route_may_have_more_time_or_all_of_it() -> None:
    async def slow(request: Request) -> PlainTextResponse:
        await anyio.sleep(0.03)
        return PlainTextResponse("done")

    app = Starlette(routes=[Route(path, slow) for path in ("/short", "/long", "/free")])
    stack = PolicyStack(app, [Problems(), Timeout(seconds=0.005, routes={"/long": 10, "/free": None})])
    assert [await ask(stack, path) for path in ("/short", "/long", "/free")] == [504, 200, 200]


async def test_who_is_cancelled_cleans_up() -> None:
    cleaned: list[bool] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        try:
            await anyio.sleep(30)
        finally:
            cleaned.append(True)

    assert await ask(PolicyStack(slow, [Problems(), Timeout(seconds=0.005)]), "/") == 504
    assert cleaned == [True]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 86_401])
def test_what_is_no_limit_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        Timeout(seconds=seconds)

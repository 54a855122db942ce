"""Litestar, Quart, Django, Falcon and BlackSheep as they are: their own errors leave as problems, and say no secret."""

import importlib
import io
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import falcon.asgi
import pytest
from blacksheep import Application, FromJSON
from blacksheep.server.routing import Router
from falcon.media.validators import jsonschema
from fastapi import FastAPI
from litestar import Litestar, get, post
from litestar.exceptions import HTTPException, NotAuthorizedException
from litestar.params import JSONBody
from litestar.plugins.pydantic import PydanticDTO
from msgspec import Struct
from pydantic import BaseModel, field_validator
from quart import Quart, Response, abort, request

from sigil_policy.core.problems import Problem, ProblemType
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.foreign import reply_to, text_headers
from sigil_policy.frameworks.litestar import ProblemsPlugin
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.telemetry.redaction import RedactionFilter
from sigil_policy.testing import drive
from tests.served import served

pytestmark = pytest.mark.anyio

Gone = ProblemType(code="AGT_961", title="GoneError", status=410)
SECRET = "hunter2-Tr0ub4dor"
HEADERS = {"host": "localhost", "content-type": "application/json"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # these frameworks run on it alone


class Person(BaseModel):
    age: int
    password: str = ""

    @field_validator("password")
    @classmethod
    def _strong(cls, value: str) -> str:
        if value:
            raise ValueError(f"{value} is too weak")
        return value


class Row(Struct):
    age: int


@dataclass
class Record:
    age: int


def connect() -> None:
    raise ConnectionError(f"postgres://app:{SECRET}@db/main password={SECRET}")


def litestar_app(*, debug: bool = False, plugin: bool = False) -> Any:
    @get("/boom")
    async def boom() -> None:
        connect()

    @post("/person")
    async def person(data: JSONBody[Person]) -> None: ...

    @post("/row")
    async def row(data: JSONBody[Row]) -> None: ...

    @post("/dto", dto=PydanticDTO[Person], return_dto=None)
    async def dto(data: JSONBody[Person]) -> None: ...

    @get("/gone")
    async def gone() -> None:
        raise Gone(detail="went", headers=[(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])

    @get("/taken")
    async def taken() -> None:
        raise HTTPException("taken", status_code=409, headers={"x-kept": "1"}, extra={"by": "ada"})

    @get("/who")
    async def who() -> None:
        raise NotAuthorizedException

    return Litestar(
        [boom, person, row, dto, gone, taken, who],
        debug=debug,
        openapi_config=None,
        logging_config=None,
        plugins=[ProblemsPlugin()] if plugin else [],
    )


def quart_app(*, debug: bool = False) -> Any:
    app = Quart(__name__)
    app.debug = debug
    app.config["MAX_CONTENT_LENGTH"] = 1_000

    @app.get("/boom")
    async def boom() -> None:
        connect()

    @app.post("/person")
    async def person() -> Any:
        return Person.model_validate(await request.get_json()).model_dump()

    @app.get("/taken")
    async def taken() -> None:
        abort(409, description="taken")

    @app.get("/gone")
    async def gone() -> None:
        raise Gone(detail="went", headers=[(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")])

    @app.errorhandler(Problem)
    async def problem(error: Problem) -> Any:
        reply = reply_to(error)
        return Response(reply.body, reply.status, text_headers(reply))

    return app


def falcon_app(*, debug: bool = False) -> Any:
    class Boom:
        async def on_get(self, req: Any, resp: Any) -> None:
            connect()

    class Validated:
        @jsonschema.validate({"properties": {"age": {"type": "integer"}}})
        async def on_post(self, req: Any, resp: Any) -> None: ...

    class Taken:
        async def on_get(self, req: Any, resp: Any) -> None:
            raise falcon.HTTPConflict(description="taken")

    app = falcon.asgi.App()
    app.add_route("/boom", Boom())
    app.add_route("/person", Validated())
    app.add_route("/taken", Taken())
    return app


async def blacksheep_app(*, debug: bool = False) -> Any:
    router = Router()

    @router.get("/boom")
    async def boom() -> None:
        connect()

    @router.post("/person")
    async def person(data: FromJSON[Person]) -> None: ...

    @router.post("/record")
    async def record(data: FromJSON[Record]) -> None: ...

    @router.get("/n")
    async def number(n: int) -> None: ...

    app = Application(router=router, show_error_details=debug)
    await app.start()
    return app


@pytest.fixture(scope="module")
def django_service() -> Any:
    """Django is configured once in a process: the example does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "0123456789abcdef0123456789abcdef")
        module = importlib.import_module("examples.django_app")
    from django.core.exceptions import BadRequest, PermissionDenied
    from django.http import Http404
    from django.urls import path

    def boom(request: Any) -> None:
        connect()

    def bad(request: Any) -> None:
        raise BadRequest(f"password={SECRET}")

    def denied(request: Any) -> None:
        raise PermissionDenied(f"password={SECRET}")

    def missing(request: Any) -> None:
        raise Http404(f"password={SECRET}")

    views = {"boom": boom, "bad": bad, "denied": denied, "missing": missing}
    module.urlpatterns.extend(
        path(name, view)
        for name, view in views.items()
        if not any(name == known.pattern._route for known in module.urlpatterns)
    )
    from django.urls import clear_url_caches

    clear_url_caches()
    return module.app.app


@pytest.fixture
def log() -> Any:
    """A service's log, with our filter on its handler."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactionFilter())
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in ("django", "blacksheep.server", "falcon", "litestar"))]
    for logger in loggers:
        logger.addHandler(handler)
    yield stream
    for logger in loggers:
        logger.removeHandler(handler)


def stacked(app: Any) -> Any:
    return served(PolicyStack(app, [RequestID(), Problems()]))


async def made(name: str, django_service: Any, **options: Any) -> Any:
    if name == "django":
        return django_service
    app = {"litestar": litestar_app, "quart": quart_app, "falcon": falcon_app, "blacksheep": blacksheep_app}[name](
        **options
    )
    return await app if name == "blacksheep" else app


ALL = ["litestar", "quart", "django", "falcon", "blacksheep"]


@pytest.mark.parametrize("name", ALL)
async def test_an_exception_that_holds_a_password_reaches_neither_client_nor_log(
    name: str, django_service: Any, log: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    app = await made(name, django_service)
    if name == "quart":
        for handler in [*app.logger.handlers]:
            app.logger.removeHandler(handler)
    sent = await drive(stacked(app), path="/boom", headers=HEADERS)
    assert (sent.status, sent.json()["error_code"]) == (500, "SRV_500")
    for said in (sent.body.decode(), str(sent.headers), log.getvalue()):
        assert SECRET not in said
        assert "Traceback" not in said or said == log.getvalue()
    if name in ("quart", "django", "blacksheep"):
        assert "ConnectionError" in log.getvalue()  # it was logged, without the secret
    capfd.readouterr()


@pytest.mark.parametrize(
    ("name", "path", "status", "code"),
    [
        ("litestar", "/person", 400, "REQ_001"),
        ("litestar", "/row", 400, "REQ_001"),
        ("litestar", "/dto", 400, "REQ_001"),
        ("quart", "/person", 500, "SRV_500"),
        ("falcon", "/person", 400, "REQ_001"),
        ("blacksheep", "/person", 400, "REQ_001"),
        ("blacksheep", "/record", 400, "REQ_400"),
    ],
)
@pytest.mark.parametrize("plugin", [False, True])
async def test_a_failed_validation_that_holds_a_password_reaches_neither_client_nor_log(
    name: str, path: str, status: int, code: str, plugin: bool, django_service: Any, log: Any
) -> None:
    app = await made(name, django_service, **({"plugin": plugin} if name == "litestar" else {}))
    if name == "quart":
        app.logger.handlers.clear()
    body = json.dumps({"age": SECRET, "password": SECRET}).encode()
    if path == "/dto":
        body = json.dumps({"age": 1, "password": SECRET}).encode()
    if path == "/record":
        body = json.dumps({"agee": SECRET}).encode()
    sent = await drive(stacked(app), "POST", path, headers=HEADERS, body=body)
    assert (sent.status, sent.json()["error_code"]) == (status, code)
    assert SECRET not in sent.body.decode()
    assert SECRET not in log.getvalue()
    if path in ("/person", "/row") and name in ("litestar", "blacksheep"):
        assert {"field": "age"}.items() <= sent.json()["validation_errors"][0].items()


async def test_a_parameter_that_does_not_fit_is_not_repeated() -> None:
    sent = await drive(stacked(await blacksheep_app()), path="/n", query=f"n={SECRET}", headers=HEADERS)
    assert (sent.status, sent.json()["error_code"]) == (400, "REQ_400")
    assert SECRET not in sent.body.decode()


@pytest.mark.parametrize(("path", "status"), [("/bad", 400), ("/denied", 403), ("/missing", 404)])
async def test_what_djangos_exceptions_say_is_not_repeated(
    path: str, status: int, django_service: Any, log: Any
) -> None:
    sent = await drive(stacked(django_service), path=path, headers=HEADERS)
    assert (sent.status, sent.json()["status"]) == (status, status)
    assert SECRET not in sent.body.decode() + log.getvalue()


@pytest.mark.parametrize("name", ["litestar", "quart", "blacksheep"])
async def test_a_debug_page_is_what_the_developer_asked_for(name: str, django_service: Any) -> None:
    app = await made(name, django_service, debug=True)
    plain = await drive(served(app), path="/boom", headers=HEADERS, raise_errors=False)
    sent = await drive(stacked(app), path="/boom", headers=HEADERS, raise_errors=False)
    if plain.error is None:
        assert sent.status == plain.status == 500
        assert sent.header("content-type") == plain.header("content-type")
        assert "ConnectionError" in sent.body.decode()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "accept",
    ["*/*", "text/html", "application/xml", "text/html,application/xml;q=0.9,*/*;q=0.8", "application/problem+json"],
)
async def test_a_path_that_is_not_there_is_a_problem_whatever_is_accepted(
    name: str, accept: str, django_service: Any
) -> None:
    """PD-19."""
    app = await made(name, django_service)
    sent = await drive(stacked(app), path="/nowhere", headers={**HEADERS, "accept": accept})
    assert (sent.status, sent.json()["error_code"]) == (404, "REQ_404")
    assert sent.header("x-request-id") == sent.json()["request_id"]


@pytest.mark.parametrize("name", ["litestar", "quart", "falcon"])
async def test_words_that_the_application_gave_to_an_error_stay(name: str, django_service: Any) -> None:
    options = {"plugin": True} if name == "litestar" else {}
    sent = await drive(stacked(await made(name, django_service, **options)), path="/taken", headers=HEADERS)
    assert (sent.status, sent.json()["detail"]) == (409, "taken")


@pytest.mark.parametrize("name", ["litestar", "quart"])
async def test_a_problem_is_raised_inside_of_a_framework_that_lets_nothing_out(name: str, django_service: Any) -> None:
    app = await made(name, django_service, **({"plugin": True} if name == "litestar" else {}))
    sent = await drive(stacked(app), path="/gone", headers=HEADERS)
    assert (sent.status, sent.json()["error_code"], sent.json()["detail"]) == (410, "AGT_961", "went")
    assert sent.header_lines("set-cookie") == ["a=1", "b=2"]
    assert sent.header("content-length") == str(len(sent.body))
    assert sent.json()["request_id"] == sent.header("x-request-id")


async def test_the_litestar_plugin_keeps_headers_and_extras() -> None:
    sent = await drive(stacked(litestar_app(plugin=True)), path="/taken", headers=HEADERS)
    assert (sent.header("x-kept"), sent.json()["data"]) == ("1", {"by": "ada"})
    sent = await drive(stacked(litestar_app(plugin=True)), path="/who", headers=HEADERS)
    assert (sent.status, sent.header("www-authenticate")) == (401, 'Bearer realm="api"')


async def test_the_litestar_plugin_works_without_a_stack() -> None:
    sent = await drive(litestar_app(plugin=True), path="/gone", headers=HEADERS)
    assert (sent.status, sent.json()["error_code"]) == (410, "AGT_961")


async def test_the_litestar_applications_own_handlers_win() -> None:
    from litestar.response import Response as Answer

    def own(request: Any, error: Any) -> Answer[str]:
        return Answer("own", status_code=404)

    app = Litestar(
        [],
        openapi_config=None,
        logging_config=None,
        plugins=[ProblemsPlugin()],
        exception_handlers={HTTPException: own},
    )
    assert (await drive(stacked(app), path="/nowhere", headers=HEADERS)).body == b"own"


def test_a_litestar_plugin_with_a_wrong_status_is_refused() -> None:
    with pytest.raises(ValueError, match="400 or 422"):
        ProblemsPlugin(validation_status=418)  # type: ignore[arg-type]


async def test_a_problem_has_no_answer_where_no_stack_is() -> None:
    with pytest.raises(LookupError, match="PolicyStack"):
        reply_to(Gone())


async def test_djangos_header_names_come_out_in_lower_case(django_service: Any) -> None:
    """AS-07: Django sends `Content-Type`."""
    plain = await drive(django_service, path="/", headers=HEADERS)
    assert any(name != name.lower() for name, _ in plain.headers)
    sent = await drive(stacked(django_service), path="/", headers=HEADERS)
    assert all(name == name.lower() for name, _ in sent.headers)
    assert sent.header("content-type") == plain.header("content-type")


async def test_djangos_refusal_of_a_lifespan_reaches_the_server(django_service: Any) -> None:
    """A server takes an exception before `startup.complete` as "there is none", and goes on; so may nothing be sent."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(ValueError, match="lifespan"):
        await PolicyStack(django_service, [Problems()])({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert sent == []


def test_the_frameworks_are_imported_by_nothing_of_ours() -> None:
    import subprocess

    program = "import sys, sigil_policy; from sigil_policy import *; print(*sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"litestar", "quart", "falcon", "blacksheep", "django"} & set(shown)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "REQ_404"),
        ("DELETE", "/person", 405, "REQ_405"),
        ("POST", "/person", 400, "REQ_001"),
        ("GET", "/boom", 500, "SRV_500"),
    ],
)
async def test_an_application_behind_a_router_of_ones_own_is_no_exception(
    method: str, path: str, status: int, code: str
) -> None:
    """No handler of ours can be put into FastAPI where nobody sees it."""
    fastapi = FastAPI()

    @fastapi.post("/person")
    async def person(data: Person) -> None: ...

    @fastapi.get("/boom")
    async def boom() -> None:
        connect()

    async def router(scope: Any, receive: Any, send: Any) -> None:
        await fastapi(scope, receive, send)

    body = json.dumps({"age": SECRET, "password": SECRET}).encode()
    sent = await drive(stacked(router), method, path, headers=HEADERS, body=body, raise_errors=False)
    assert (sent.status, sent.json()["error_code"]) == (status, code)
    assert SECRET not in sent.body.decode()
    assert (sent.header("allow") == "POST") == (status == 405)
    assert isinstance(sent.error, ConnectionError) == (status == 500)

"""What the comparison stands on: applications are wrapped, differences are seen, exceptions are explained.

The suites of Starlette and FastAPI themselves are run by `python -m tests.transparency`.
"""

import asyncio
import json
import os
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.cache_control import CacheControl
from sigil_policy.testing import FrozenClock
from sigil_policy.testing.rules import Validated
from tests.transparency import injection
from tests.transparency.__main__ import CONTROL
from tests.transparency.exceptions import EXCEPTIONS, unexplained

ROOT = Path(__file__).resolve().parents[2]


async def home(request: Any) -> Any:
    return PlainTextResponse("ok")


KINDS = {"stack": PolicyStack, "headers": PolicyStack, "validated": Validated, "base-http": BaseHTTPMiddleware}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_every_client_gets_its_application_inside_of_it(name: str, kind: type) -> None:
    app = Starlette(routes=[Route("/", home)])
    end = injection.inject(injection._INJECTIONS[name]())
    try:
        client = TestClient(app)
    finally:
        end()
    assert type(client.app) is kind
    with client:
        assert client.get("/").text == "ok"
    assert TestClient(app).app is app, "and no longer"


def test_the_permissive_stack_holds_nearly_every_policy_and_adds_nothing() -> None:
    app = Starlette(routes=[Route("/", home)])
    plain = TestClient(app).get("/").headers
    stack = injection.stack()(app)
    names = {type(policy).__name__ for policy in stack.policies}
    assert len(names) >= 16
    assert TestClient(stack).get("/").headers == plain
    more = TestClient(injection.stack(headers=True)(app)).get("/").headers
    assert {"x-request-id", "etag"} <= set(more) and len(more) > len(plain) + 3


def test_the_permissive_stack_has_the_clock_of_the_stack_inside() -> None:
    """An exchange has one clock, that of the outermost stack: with another one tokens of the suite would have ended."""
    clock = FrozenClock()
    app = Starlette(middleware=[Middleware(PolicyStack, policies=[CacheControl()], clock=clock)])
    wrap = injection.stack()
    assert wrap(app).clock is wrap(PolicyStack(home, [CacheControl()], clock=clock)).clock is clock
    assert wrap(home).clock is SYSTEM_CLOCK


def test_an_application_of_a_class_is_wrapped_once_where_it_is_called_from_outside() -> None:
    told: list[str] = []

    class App:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            assert scope == {"type": "http"}
            told.append("app")

    def wrap(app: Any) -> Any:
        told.append("made")

        async def around(scope: Any, receive: Any, send: Any) -> None:
            told.append("in")
            await app(scope, receive, send)

        return around

    app: Any = App()
    end = injection.inject_into(App, wrap)
    try:
        asyncio.run(app({"type": "http"}, None, None))
        asyncio.run(app({"type": "http"}, None, None))
    finally:
        end()
    assert told == ["made", "in", "app", "in", "app"]
    asyncio.run(app({"type": "http"}, None, None))
    assert told[5:] == ["app"], "and no longer"


@pytest.mark.parametrize("name", ["litestar", "quart"])
def test_litestar_and_quart_are_wrapped_where_they_are_called(name: str) -> None:
    """Their own clients do that: a middleware around everything changes what they hear."""

    def litestar_says() -> int:
        from litestar import Litestar
        from litestar.testing import TestClient as LitestarClient

        return LitestarClient(Litestar([])).get("/").status_code

    def quart_says() -> int:
        from quart import Quart

        async def ask() -> int:
            return (await Quart(__name__).test_client().get("/")).status_code

        return asyncio.run(ask())

    says = {"litestar": litestar_says, "quart": quart_says}[name]
    end = injection._PLACES[name](injection.teapot())
    try:
        assert says() == 418
    finally:
        end()
    assert says() == 404


def test_a_no_op_base_http_middleware_is_seen() -> None:
    """Of the reasons: what an endpoint sets in a context variable does not come out of it."""
    told: ContextVar[str] = ContextVar("told", default="nothing")

    async def tells(request: Any) -> Any:
        told.set("told")
        return PlainTextResponse("ok")

    def outcome(wrap: Any) -> str:
        seen = []

        async def outside(scope: Any, receive: Any, send: Any) -> None:
            await wrap(Starlette(routes=[Route("/", tells)]))(scope, receive, send)
            seen.append(told.get())

        TestClient(outside).get("/")
        return seen[0]

    assert outcome(lambda app: app) == outcome(injection.stack()) == outcome(injection.validated()) == "told"
    assert outcome(injection.base_http()) == "nothing"


SUITE = """
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

def fails(request): raise KeyError("x")

client = TestClient(Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok")), Route("/fails", fails)]))

def test_errors_are_raised_on():
    with pytest.raises(KeyError):
        client.get("/fails")

def test_answers():
    assert client.get("/").text == "ok"
    assert client.get("/nowhere").status_code == 404

@pytest.mark.skip
def test_left_out(): pass

@pytest.mark.xfail
def test_expected(): assert False
"""


def results(folder: Path, name: str, *paths: str, cwd: Path | None = None) -> dict[str, str]:
    """The result of each test below `paths`, by the plugin itself."""
    out = folder / f"{name}.json"
    environment = {
        **os.environ, "INJECT": name, "RESULTS": str(out), "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": f"{Path(injection.__file__).parent}{os.pathsep}{ROOT}",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "anyio", "-p", "injection", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=300)
    assert out.exists(), done.stdout + done.stderr
    found: dict[str, str] = json.loads(out.read_text())
    return found


def test_results_are_written_and_a_middleware_that_swallows_is_seen(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    plain = results(tmp_path, "nothing", "test_suite.py")
    assert {test.partition("::")[2]: result for test, result in plain.items()} == {
        "test_errors_are_raised_on": "passed",
        "test_answers": "passed",
        "test_left_out": "skipped",
        "test_expected": "skipped",
    }
    assert results(tmp_path, "stack", "test_suite.py") == plain
    swallowed = results(tmp_path, "swallowing", "test_suite.py")
    assert [test for test in plain if swallowed[test] != plain[test]] == ["test_suite.py::test_errors_are_raised_on"]


def test_an_example_application_is_undisturbed(tmp_path: Path) -> None:
    """A further stack around it changes no result: it has one of its own, which joins. The command runs all of them."""
    plain = results(tmp_path, "nothing", "tests/examples/test_quickstart.py", cwd=ROOT)
    assert len(plain) > 3 and "failed" not in plain.values()
    assert results(tmp_path, "stack", "tests/examples/test_quickstart.py", cwd=ROOT) == plain


def test_every_exception_has_a_suite_an_injection_and_a_reason() -> None:
    for entry in EXCEPTIONS:
        assert entry.suite in CONTROL
        assert set(entry.injections) <= set(injection._INJECTIONS)
        assert entry.test.startswith("tests/") and "::" in entry.test
        assert entry.reason.endswith(".")


def test_what_is_not_listed_or_not_seen_is_told() -> None:
    listed = {entry.test for entry in EXCEPTIONS if entry.suite == "starlette" and "headers" in entry.injections}
    strangers, unseen = unexplained("starlette", "headers", {"tests/test_x.py::test_y"})
    assert (strangers, unseen) == ({"tests/test_x.py::test_y"}, listed)
    assert unexplained("starlette", "headers", {f"{test}[trio]" for test in listed}) == (set(), set())
    assert unexplained("starlette", "stack", set()) == (set(), set()), "the permissive stack needs no exception there"

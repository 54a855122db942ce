"""A pytest plugin: the applications of a suite run inside something else, and the results are written.

    PYTHONPATH=tests/transparency INJECT=stack RESULTS=results.json python -m pytest -p injection ...

`INJECT` names what is put around each application:

| name | what it is |
|---|---|
| `nothing` | nothing: the results to compare with |
| `stack` | `PolicyStack` with the policies, permissive: nothing is refused, no header added that can be left out |
| `headers` | the same with the headers: request ids, limits, entity tags, defaults for caches |
| `validated` | `sigil_policy.testing.validated`: an exchange that ASGI forbids fails |
| `base-http` | Starlette's `BaseHTTPMiddleware`, doing nothing: it changes results, so the comparison can fail |
| `swallowing` | a middleware that answers errors and does not raise them on, as error mappers do: the same |
| `teapot` | every response has status 418: the same, where nothing subtler changes a result |

`INTO` says where: `starlette` (the default) is whatever its `TestClient` is given, `litestar` and `quart` are each call
of one of their applications that comes from outside.

The plugin imports nothing of the suites, and stands alone: their own package is called `tests` too.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_OUTCOMES: dict[str, str] = {}
_ORDER = ("passed", "skipped", "failed")


def stack(*, headers: bool = False) -> Callable[[Any], Any]:
    """Every policy that can refuse nothing, in the order that works."""
    from pydantic import SecretStr

    from sigil_policy import (
        AccessLog,
        AllowedOrigins,
        ApiKeyAuth,
        AuthFailureLimit,
        CacheControl,
        ConcurrencyLimit,
        Conditional,
        McpEndpoint,
        MemoryApiKeyStore,
        MemoryRevocations,
        MemoryTickets,
        Policy,
        PolicyStack,
        Problems,
        ProtectedResource,
        ProtectedResourceMetadata,
        RateLimit,
        RequestID,
        Revocation,
        Tier,
        Timeout,
        Versioning,
        WebSocketTicketAuth,
        WebSocketTickets,
    )
    from sigil_policy.core.clock import SYSTEM_CLOCK

    class Silent:
        def info(self, event: str, **fields: Any) -> None:
            pass

    class Passing(Policy):
        """`Problems`, as far as it is not about the application's own errors: those pass."""

        inner: Any

        def on_request(self, ex: Any) -> Any:
            return self.inner.on_request(ex)

        def on_error(self, ex: Any, error: Exception) -> None:
            return None

    class Everything(Policy):
        """Has every hook, and lets everything pass."""

        def on_request(self, ex: Any) -> None:
            return None

        def around(self, ex: Any) -> Any:
            return contextlib.AsyncExitStack()

        def wants_body(self, ex: Any, head: Any) -> bool:
            return head.get(b"content-length") is not None

        def on_body(self, ex: Any, head: Any, body: bytes) -> None:
            return None

        def on_response(self, ex: Any, head: Any) -> None:
            return None

        def on_chunk(self, ex: Any, chunk: bytes) -> None:
            return None

        def on_message(self, ex: Any, message: Any) -> None:
            return None

        def on_check(self, ex: Any) -> None:
            return None

        def on_error(self, ex: Any, error: Exception) -> None:
            return None

        async def on_finish(self, ex: Any) -> None:
            return None

    tier = Tier(requests="1000000/second")
    resource = ProtectedResource(
        resource="https://api.example.com/of-nobody", authorization_servers=["https://auth.example.com"]
    )
    fields = {} if headers else {"draft": None, "x_headers": False}
    cache = {} if headers else {"authenticated": None, "errors": None}

    def clock_of(app: Any) -> Any:
        """The clock of a stack that the application has itself: an exchange has one, that of the outermost stack."""
        if isinstance(app, PolicyStack):
            return app.clock
        inner = [middleware.kwargs.get("clock") for middleware in getattr(app, "user_middleware", ())]
        return next((clock for clock in inner if clock is not None), SYSTEM_CLOCK)

    def wrap(app: Any) -> Any:
        tickets = MemoryTickets()
        policies: list[Any] = [
            *([RequestID()] if headers else []),
            AccessLog(logger=Silent()),
            ProtectedResourceMetadata(documents=[resource]),
            Passing(inner=Problems()),
            Versioning(),
            Timeout(seconds=86_400),
            AllowedOrigins(origins=[], exempt=["/**"]),
            McpEndpoint(paths=["/mcp/of/nobody"]),
            AuthFailureLimit(addresses="1000000/second", credentials=None, everywhere=None),
            ApiKeyAuth(
                store=MemoryApiKeyStore(), pepper=SecretStr("x" * 40), header="X-Key-Of-Nobody", conflicts_with=None
            ),
            WebSocketTicketAuth(store=tickets, query="ticket-of-nobody", conflicts_with=()),
            Revocation(store=MemoryRevocations()),
            # Not permissive: `BearerAuth` would refuse the tokens that the suites make up, `McpTools` paths with a dot
            # segment, wherever it is mounted; what `Scopes` makes public is limited by nobody, here or further in.
            ConcurrencyLimit(limits=1_000_000, **({} if headers else {"draft": None})),
            RateLimit(tiers={"free": tier}, **fields),
            WebSocketTickets(path="/tickets/of/nobody", store=tickets),
            CacheControl(**cache),
            *([Conditional()] if headers else []),
            Everything(),
        ]
        return PolicyStack(app, policies=policies, clock=clock_of(app))

    return wrap


def validated() -> Callable[[Any], Any]:
    from sigil_policy.testing.rules import validated

    return validated


def base_http() -> Callable[[Any], Any]:
    from starlette.middleware.base import BaseHTTPMiddleware

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    return lambda app: BaseHTTPMiddleware(app, dispatch=dispatch)


def swallowing() -> Callable[[Any], Any]:
    def wrap(app: Any) -> Any:
        async def swallows(scope: Any, receive: Any, send: Any) -> None:
            with contextlib.suppress(Exception):
                await app(scope, receive, send)

        return swallows

    return wrap


def teapot() -> Callable[[Any], Any]:
    def wrap(app: Any) -> Any:
        async def answers(scope: Any, receive: Any, send: Any) -> None:
            async def answer(message: Any) -> None:
                await send({**message, "status": 418} if message["type"] == "http.response.start" else message)

            await app(scope, receive, answer)

        return answers

    return wrap


_INJECTIONS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "stack": stack,
    "headers": lambda: stack(headers=True),
    "validated": validated,
    "base-http": base_http,
    "swallowing": swallowing,
    "teapot": teapot,
}


def pytest_configure(config: pytest.Config) -> None:
    name = os.environ.get("INJECT", "nothing")
    if name != "nothing":
        _PLACES[os.environ.get("INTO", "starlette")](_INJECTIONS[name]())


def inject(wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let every `TestClient` from now on put its application into `wrap`; what is returned ends that."""
    from starlette.testclient import TestClient

    plain: Any = TestClient.__init__

    def make(self: Any, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        self.app = self._transport.app = wrap(self.app)

    TestClient.__init__ = make  # type: ignore[method-assign]

    def end() -> None:
        TestClient.__init__ = plain  # type: ignore[method-assign]

    return end


def inject_into(kind: Any, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let every application of class `kind` that is called from now on run in `wrap`; what is returned ends that."""
    plain: Any = kind.__call__
    wrapped: dict[int, Any] = {}

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope.pop("transparency.inside", False):
            await plain(self, scope, receive, send)
            return
        around = wrapped.get(id(self))
        if around is None:
            # It holds the application: as long as it is kept, the number stands for no other.
            around = wrapped[id(self)] = wrap(self)
        scope["transparency.inside"] = True
        await around(scope, receive, send)

    kind.__call__ = call

    def end() -> None:
        kind.__call__ = plain

    return end


def litestar(wrap: Callable[[Any], Any]) -> Callable[[], None]:
    from litestar import Litestar

    return inject_into(Litestar, wrap)


def quart(wrap: Callable[[Any], Any]) -> Callable[[], None]:
    from quart import Quart

    return inject_into(Quart, wrap)


_PLACES = {"starlette": inject, "litestar": litestar, "quart": quart}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = report.outcome if not hasattr(report, "wasxfail") else "skipped"
    if outcome not in _ORDER:
        return  # a plugin's own word for what is not decided yet
    before = _OUTCOMES.get(report.nodeid, "passed")
    _OUTCOMES[report.nodeid] = max(before, outcome, key=_ORDER.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := os.environ.get("RESULTS")) and not hasattr(session.config, "workerinput"):
        Path(path).write_text(json.dumps(_OUTCOMES, indent=0, sort_keys=True))

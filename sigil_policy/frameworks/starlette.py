"""Starlette and FastAPI: what a stack has to know of them.

Found by itself, in both ways to mount a stack: `app.add_middleware(PolicyStack, ...)` and `PolicyStack(app, ...)`.
FastAPI is never imported from here; what is needed of it is looked up only where the application has imported it.

* `HTTPException` and `RequestValidationError` are answered by Starlette's own `ExceptionMiddleware`, inside of every
  middleware. With `Problems` mounted, its handlers are replaced where they are the framework's defaults; the
  application's own stay.
* The name of a route is its whole template, with the prefixes of included routers and mounts.
"""

import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router

from sigil_policy.core.exchange import SCOPE_KEY, Exchange
from sigil_policy.core.host import Host, Resolution
from sigil_policy.core.marks import Marks, marks_of, speaker_of
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem, Reply
from sigil_policy.core.routing import below
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.chain import chain
from sigil_policy.frameworks.routes import RouteIndex, is_known
from sigil_policy.policies.problems import Problems, from_http_error, from_validation_errors

logger = logging.getLogger("sigil_policy")

_MOST_ENDPOINTS = 1_000
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "TRACE")


def find_host(app: Any) -> Host | None:
    """A host for `app` when it is, or leads straight to, a Starlette application, a router of one, or an endpoint."""
    inner = app
    for inner in chain(app, is_known):
        if isinstance(inner, Starlette | ExceptionMiddleware | Router):
            return StarletteHost(app)
    return EndpointHost() if is_known(inner) or _is_endpoint(inner) else None


def _is_endpoint(app: Any) -> bool:
    return isinstance(app, type) and issubclass(app, HTTPEndpoint | WebSocketEndpoint)


class EndpointHost(Host):
    """What a stack in the `middleware` of a single route is around: the router has run, and says what it has chosen."""

    def __init__(self) -> None:
        self._known: dict[Any, Resolution] = {}

    def marked(self) -> bool:
        return True

    def find(self, scope: dict[str, Any]) -> Resolution | None:
        endpoint, route = scope.get("endpoint"), scope.get("route")
        if endpoint is None:
            return None
        method: str = scope["method"] if scope["type"] == "http" else ""
        speaker = speaker_of(endpoint, method)
        known = self._known.get(id(speaker))
        if known is None or known.endpoint is not endpoint:
            marks, around = marks_of(endpoint, method), marks_of(route)
            marks = around if marks is None else marks.over(around)
            own = frozenset() if marks is None else marks.names
            known = Resolution(endpoint, _template(scope), marks, own, speaker=speaker)
            if len(self._known) >= _MOST_ENDPOINTS:
                self._known.clear()  # a route that makes its endpoints
            self._known[id(speaker)] = known
        return known

    def route(self, scope: dict[str, Any], root: str) -> str | None:
        return _template(scope)


def _template(scope: dict[str, Any]) -> str | None:
    """What the router has said, once it has run."""
    route = scope.get("route")
    # FastAPI keeps included routers as a tree: the route alone does not know its prefix.
    context = scope.get("fastapi")
    if isinstance(context, dict):
        route = context.get("effective_route_context") or route
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    return None if template is None else f"{scope.get('root_path') or ''}{template}"


class StarletteHost(Host):
    """A Starlette or FastAPI application, what is left of it inside `add_middleware`, or a router."""

    readable = True

    def __init__(self, app: Any) -> None:
        self.app = app
        # `FastAPI(root_path=...)` takes it off the path behind a stack that is around the whole application.
        roots = (getattr(inner, "root_path", "") for inner in chain(app, is_known) if isinstance(inner, Starlette))
        self.root_path = next((root for root in roots if root), "")
        self.index = RouteIndex(app)

    def marked(self) -> bool:
        return self.index.marked

    def find(self, scope: dict[str, Any]) -> Resolution | None:
        """The endpoint; None as well for an application that cannot be read, of which a stack in there knows more."""
        reading = self.index.latest
        found = self._find(scope)
        return None if found is not None and id(found.endpoint) in reading.opaque else found

    def _find(self, scope: dict[str, Any]) -> Resolution | None:
        root = scope.get("root_path")
        if self.root_path and self.root_path != root:
            root = self.root_path
            scope = {**scope, "root_path": root}
        path: str = scope["path"]
        if root:
            inner = below(root, path)
            # Routes and mounts do not agree on a path outside of its root: they are asked, and nothing is remembered.
            path = "" if inner is path else inner
        return self.index.latest.find(scope, path)

    def ran(self, scope: dict[str, Any]) -> Any:
        """Of an application that cannot be read, a stack in there knows more."""
        endpoint = scope.get("endpoint")
        return None if id(endpoint) in self.index.latest.opaque else endpoint

    def endpoints(self) -> Iterable[Resolution]:
        return self.index.all()

    def tag(self, tags: Mapping[str, Marks]) -> None:
        self.index.tag(tags)

    def inner_policies(self) -> Iterator[Policy]:
        for inner in chain(self.app, is_known):
            if isinstance(inner, PolicyStack):
                yield from inner.policies

    def bind(self, policies: Sequence[Policy]) -> None:
        for policy in policies:
            if isinstance(policy, Problems):
                for target in _targets(self.app):
                    _Handlers(policy).install(target)

    def route(self, scope: dict[str, Any], root: str) -> str | None:
        now = scope.get("root_path") or ""
        if "endpoint" not in scope or (now != root and now != self.root_path):
            # The router has not run yet, or a mount has moved the root, in which parameters are what was sent for them.
            found = self._find({**scope, "root_path": root})
            template = None if found is None else found.template
            return None if template is None else f"{self.root_path or root}{template}"
        return _template(scope)

    def debug(self, scope: dict[str, Any]) -> bool:
        return getattr(scope.get("app"), "debug", False) is True

    def answer(self, ex: Exchange, error: Exception) -> Awaitable[Reply | None] | None:
        if isinstance(error, HTTPException):
            return _http_error(ex, error)
        if ex.kind != "http":
            return None  # a handler takes a Request; Starlette calls none for a WebSocket either
        handlers = getattr(ex.scope.get("app"), "exception_handlers", None) or {}
        handler = None
        for key, value in handlers.items():
            if key in (500, Exception):
                handler = value
        return None if handler is None else _call(handler, ex, error)


async def _http_error(ex: Exchange, error: HTTPException) -> Reply | None:
    """Raised by a middleware inside of us, where Starlette itself would make a 500 of it."""
    if error.status_code < 400:
        return None
    return ex.style.render(from_http_error(error.status_code, error.detail, error.headers), ex)


async def _call(handler: Callable[..., Any], ex: Exchange, error: Exception) -> Reply | None:
    """Run the application's own handler for unhandled errors and take its response as a reply that is raised on."""
    from starlette._utils import is_async_callable
    from starlette.concurrency import run_in_threadpool

    request = Request(ex.scope)
    response = await (
        handler(request, error) if is_async_callable(handler) else run_in_threadpool(handler, request, error)
    )
    if response is None:
        return None
    start: dict[str, Any] = {}
    parts: list[bytes] = []

    async def collect(message: dict[str, Any]) -> None:
        if message["type"].endswith(".start"):
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    async def nothing() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    # Background tasks run once the client has its answer; that they fail must not take it away.
    background: Callable[[], Awaitable[None]] | None = getattr(response, "background", None)
    response.background = None
    await response(ex.scope, nothing, collect)
    if not start:
        return None

    return Reply(
        status=start["status"],
        headers=tuple(start.get("headers") or ()),
        body=b"".join(parts),
        code=1011,
        reraise=True,
        after=None if background is None else partial(_quietly, background),
    )


async def _quietly(background: Callable[[], Awaitable[None]]) -> None:
    try:
        await background()
    except Exception:
        logger.exception("what follows the answer to an unhandled error failed")


class _Handlers:
    """The exception handlers that speak for one `Problems` policy."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def install(self, target: Any) -> None:
        """Give `target` (an application or its `ExceptionMiddleware`) our handlers, where it has only defaults."""
        handlers = target._exception_handlers if isinstance(target, ExceptionMiddleware) else target.exception_handlers  # noqa: SLF001
        wanted: list[tuple[type[Exception], Callable[..., Any]]] = [
            (HTTPException, self.http_error),
            (Problem, self.problem),
        ]
        fastapi = sys.modules.get("fastapi.exceptions")
        if fastapi is not None:
            wanted.append((fastapi.RequestValidationError, self.validation_error))
        for kind, handler in wanted:
            if _is_default(handlers.get(kind)):
                target.add_exception_handler(kind, handler)

    async def http_error(self, request: Request, error: HTTPException) -> Response | None:
        ex = request.scope.get(SCOPE_KEY)
        if not isinstance(ex, Exchange) or error.status_code < 400:
            return await _default(request, error)
        headers = error.headers
        methods = _methods(ex) if error.status_code == 405 else ()
        if methods:
            # RFC 9110 section 15.5.6: the methods of the resource; a route of the framework knows only its own.
            said = {name.lower(): value for name, value in (headers or {}).items()}
            known = [name.strip() for name in said.get("allow", "").split(",") if name.strip()]
            headers = {**said, "allow": ", ".join(dict.fromkeys((*known, *methods)))}
        return self._response(from_http_error(error.status_code, error.detail, headers), ex)

    async def validation_error(self, request: Request, error: Any) -> Response | None:
        ex = request.scope.get(SCOPE_KEY)
        if not isinstance(ex, Exchange):
            return await _default(request, error)
        return self._response(from_validation_errors(error.errors(), self.problems.validation_status), ex)

    async def problem(self, request: Request, error: Problem) -> Response:
        ex = request.scope.get(SCOPE_KEY)
        if not isinstance(ex, Exchange):
            raise error
        return self._response(error, ex)

    def _response(self, problem: Problem, ex: Exchange) -> Response:
        reply = self.problems.style.render(problem, ex)
        response = Response(b"" if ex.method == "HEAD" else reply.body, reply.status)
        response.raw_headers = [(name, value) for name, value in reply.headers]
        return response


def _methods(ex: Exchange) -> Sequence[str]:
    """The methods that the resource has at which the router stopped."""
    # A mount has moved the root since.
    scope = {**ex.scope, "root_path": ex._root}  # noqa: SLF001
    stopped = ex.host.find(scope)
    if stopped is None or stopped.template is not None:
        return ()
    served = {method: ex.host.find({**scope, "method": method}) for method in _METHODS}
    # The template of that resource; for another method, the path may be one of a less specific template.
    own = {found.template for found in served.values() if found is not None and found.endpoint is stopped.endpoint}
    return [
        method
        for method, found in served.items()
        if found is not None and found.template is not None and found.template in own
    ]


def _is_default(handler: Any) -> bool:
    """Whether `handler` is nobody's choice: none, the framework's own, or ours from an earlier binding."""
    if handler is None:
        return True
    owner = getattr(handler, "__self__", None)
    if isinstance(owner, _Handlers) or getattr(handler, "__func__", None) is ExceptionMiddleware.http_exception:
        return True
    fastapi = sys.modules.get("fastapi.exception_handlers")
    return fastapi is not None and handler in (
        fastapi.http_exception_handler,
        fastapi.request_validation_exception_handler,
    )


async def _default(request: Request, error: Exception) -> Response | None:
    """What the framework would have answered: the request did not come through a stack."""
    fastapi = sys.modules.get("fastapi.exception_handlers")
    if isinstance(error, HTTPException):
        if fastapi is not None:
            return await fastapi.http_exception_handler(request, error)  # type: ignore[no-any-return]
        return await ExceptionMiddleware(_nowhere).http_exception(request, error)
    assert fastapi is not None  # noqa: S101  its exception is here
    return await fastapi.request_validation_exception_handler(request, error)  # type: ignore[no-any-return]


async def _nowhere(scope: Any, receive: Any, send: Any) -> None:
    raise NotImplementedError


def _targets(app: Any) -> Iterator[Any]:
    """Everything reachable from `app` that answers exceptions: itself, and mounted applications."""
    waiting, seen = [app], set[int]()
    while waiting and len(seen) < 10_000:
        start = waiting.pop()
        if isinstance(start, Starlette):
            if id(start) in seen:
                continue
            seen.add(id(start))
            if start.middleware_stack is None:
                yield start
                waiting.extend(_mounted(start.router))
                continue
            yield start  # also for a stack that is rebuilt later
            start = start.middleware_stack
        for inner in chain(start, is_known):
            if id(inner) in seen:
                break
            seen.add(id(inner))
            if isinstance(inner, ExceptionMiddleware):
                yield inner
            elif inner is not start and isinstance(inner, Starlette):
                waiting.append(inner)
                break
            waiting.extend(_mounted(inner))


def _mounted(router: Any) -> Iterator[Any]:
    """Applications below a router's routes; FastAPI keeps included routers as nodes of a tree."""
    for route in getattr(router, "routes", None) or ():
        included = getattr(route, "original_router", None)
        if included is not None:
            yield included
        app = getattr(route, "_base_app", None) or getattr(route, "app", None)
        if app is not None and (isinstance(app, Starlette) or hasattr(app, "routes") or hasattr(app, "app")):
            yield app

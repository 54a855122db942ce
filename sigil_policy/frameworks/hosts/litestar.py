"""Litestar: handlers, their controllers and their tags.

The router's own cached `handle_routing` is asked, with the arguments with which it asks itself a moment later: the
answer is computed once. Guards, dependencies and middlewares of the application stay what they are.

A stack in `middleware=` sees what the router has found already. What 2.x keeps private, and is needed here, is
`asgi_router`; without it nothing is known of the application.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from litestar import Litestar
from litestar.exceptions import HTTPException
from litestar.handlers import ASGIRouteHandler
from litestar.routes import ASGIRoute, HTTPRoute, WebSocketRoute
from litestar.utils import normalize_path

from sigil_policy.core.host import Host, Resolution
from sigil_policy.core.marks import marks_of
from sigil_policy.frameworks.hosts import RoutedHost, method_of

_PARAMETER = re.compile(r"\{([^{}:]+):[^{}]*\}")


def host_for(app: Any, around: Any) -> Host | None:
    if isinstance(app, Litestar) and hasattr(getattr(app, "asgi_router", None), "handle_routing"):
        return LitestarHost(app, around)
    if isinstance(app, HTTPRoute | WebSocketRoute | ASGIRoute):
        return RouteHost(app, around)
    return None


class LitestarHost(RoutedHost):
    def version(self) -> list[Any]:
        return [*self.app.routes]

    def path(self, scope: dict[str, Any]) -> str:
        path: str = scope["path"]
        root = scope.get("root_path")
        return path.split(root, maxsplit=1)[-1] if root else path

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        method = scope["method"] if scope["type"] == "http" else None
        try:
            _, handler, _, _, template = self.app.asgi_router.handle_routing(
                path=normalize_path(self.path(scope)), method=method
            )
        except HTTPException:
            return None
        if not template:
            template = None  # a mount: its handler does not know where it is
        found = self._resolve(handler, template, method_of(scope))
        # Of an ASGI application of which nothing is said, a stack in there knows more.
        return None if found.marks is None and isinstance(handler, ASGIRouteHandler) else found

    def route(self, scope: dict[str, Any], root: str) -> str | None:
        said: str | None = scope.get("path_template")  # the router has run, and has changed the path
        return root + self.template(said) if said else super().route(scope, root)

    def ran(self, scope: dict[str, Any]) -> Any:
        handler = scope.get("route_handler")
        if handler is None or (isinstance(handler, ASGIRouteHandler) and marks_of(handler.fn) is None):
            return None
        return handler.fn

    def endpoints(self) -> Iterable[Resolution]:
        for route in self._routes():
            handlers = getattr(route, "route_handlers", None) or [route.route_handler]
            for handler in handlers:
                for method in sorted(getattr(handler, "http_methods", None) or ("WEBSOCKET",)):
                    yield self._resolve(handler, route.path, method)

    def _routes(self) -> Iterator[Any]:
        yield from self.app.routes

    def template(self, written: str) -> str:
        return _PARAMETER.sub(r"{\1}", written)

    def _resolve(self, handler: Any, written: str | None, method: str) -> Resolution:
        def speaking() -> Iterator[Any]:
            yield from (handler, handler.fn)
            tags = handler.resolve_tags() if hasattr(handler, "resolve_tags") else ()
            yield from (self._tags[tag] for tag in tags if tag in self._tags)
            yield getattr(handler.fn, "__self__", None)  # a controller
            yield from (layer for layer in reversed(handler.ownership_layers) if layer is not handler)

        return self.resolution(handler, handler.fn, written, method, speaking)


class RouteHost(LitestarHost):
    """A stack in `middleware=`: behind the router, around the handlers of one route."""

    def version(self) -> list[Any]:
        return []

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        handler = scope.get("route_handler")
        return None if handler is None else self._resolve(handler, scope.get("path_template"), method_of(scope))

    def _routes(self) -> Iterator[Any]:
        yield self.app

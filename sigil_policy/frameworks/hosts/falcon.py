"""Falcon: responders and their resources.

The default router is asked (0.5 µs; it is compiled), then sinks, as Falcon does it. A router of the application's own
may look at the request, so it is not asked before: its endpoints are compared once they run, and marks that were not
applied are counted as a mismatch, with `strict_routes` answered as 500. What of Falcon 4 is private, and is needed
here, is `_router`, `_sink_and_static_routes`, and the nodes of the router.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import falcon.asgi
from falcon.routing import CompiledRouter

from sigil_policy.core.exchange import SCOPE_KEY, Exchange
from sigil_policy.core.host import Host, Resolution
from sigil_policy.core.policy import Policy
from sigil_policy.frameworks.hosts import RAN, RoutedHost, method_of


def host_for(app: Any, around: Any) -> Host | None:
    return FalconHost(app, around) if isinstance(app, falcon.asgi.App) else None


class _Notes:
    """Falcon's middleware: leaves in the scope whose turn it is."""

    async def process_resource(self, req: Any, resp: Any, resource: Any, params: Any) -> None:
        if req.method.isupper():  # else there is no such method for Falcon
            _note(req.scope, resource, f"on_{req.method.lower()}")

    async def process_resource_ws(self, req: Any, ws: Any, resource: Any, params: Any) -> None:
        _note(req.scope, resource, "on_websocket")


def _note(scope: dict[str, Any], resource: Any, name: str) -> None:
    ex = scope.get(SCOPE_KEY)
    resolution = ex._resolution if isinstance(ex, Exchange) else None  # noqa: SLF001
    expected = None if resolution is None else resolution.endpoint
    same = getattr(expected, "__self__", None) is resource
    scope[RAN] = expected if same else getattr(resource, name, resource)


class FalconHost(RoutedHost):
    takes_root_off = False

    def __init__(self, app: Any, around: Any) -> None:
        super().__init__(app, around)
        router = getattr(app, "_router", None)
        readable = type(router) is CompiledRouter and hasattr(router, "_find") and hasattr(router, "_roots")
        self._router: Any = router if readable else None
        self.readable = readable

    def version(self) -> Any:
        # The router forgets its compiled search when a route is added.
        return None if self._router is None else (self._router._find, self._sinks())  # noqa: SLF001

    def marked(self) -> bool:
        return super().marked() or self._router is None

    def path(self, scope: dict[str, Any]) -> str:
        path: str = scope["path"] or "/"  # Falcon takes no root path off
        stripped = self.app.req_options.strip_url_path_trailing_slash and len(path) > 1 and path.endswith("/")
        return path[:-1] if stripped else path

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        if self._router is None:
            return None
        path, method = self.path(scope), method_of(scope)
        found = self._router.find(path)
        if found is not None:
            resource, responders, _, template = found
            responder = responders.get(method)
            return None if responder is None else self._resolve(resource, responder, template, method)
        for matcher, target, is_sink in self._sinks():
            if matcher.match(path):
                return self.resolution(target, target, None, method, partial(tuple, [target])) if is_sink else None
        return None

    def endpoints(self) -> Iterable[Resolution]:
        if self._router is None:
            return
        waiting = list(self._router._roots)  # noqa: SLF001
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children)
            if node.resource is not None:
                for method, responder in sorted((node.method_map or {}).items()):
                    yield self._resolve(node.resource, responder, node.uri_template, method)
        for _, target, is_sink in self._sinks():
            if is_sink:
                yield self.resolution(target, target, None, "", partial(tuple, [target]))

    def bind(self, policies: Sequence[Policy]) -> None:
        known = getattr(self.app, "_unprepared_middleware", None)
        if known is not None and not any(isinstance(one, _Notes) for one in known):
            self.app.add_middleware(_Notes())

    def _sinks(self) -> tuple[Any, ...]:
        return tuple(getattr(self.app, "_sink_and_static_routes", ()))

    def template(self, written: str) -> str:
        """`/reports/{number:int(2)}` as `/reports/{number}`."""
        parts = written.split("{")
        for place, part in enumerate(parts[1:], 1):
            inside, _, behind = part.partition("}")
            parts[place] = f"{inside.partition(':')[0].strip()}}}{behind}"
        return "{".join(parts)

    def _resolve(self, resource: Any, responder: Any, written: str | None, method: str) -> Resolution:
        return self.resolution(resource, responder, written, method, lambda: (responder, resource))

"""BlackSheep: handlers and their controllers.

The application's router is asked as BlackSheep asks it: for the path as it was sent, still percent-encoded (decoded
for a WebSocket), whatever the case of its letters; most answers come from its own cache. Tables of the policies are
matched in the same way here, so that `/REPORTS/5` does not dodge a rule for `/reports/{number}`.

Its routes are settled when it starts. An application with marks that is asked before refuses, with what to do.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from blacksheep import Request
from blacksheep.server import Application
from blacksheep.server.routing import RouteMethod
from blacksheep.url import InvalidURL

from sigil_policy.core.host import Host, Resolution
from sigil_policy.frameworks.hosts import NotStartedError, RoutedHost, method_of

_DEEPEST = 100
_WEBSOCKET = RouteMethod.GET_WS


def host_for(app: Any, around: Any) -> Host | None:
    return BlackSheepHost(app, around) if isinstance(app, Application) else None


class BlackSheepHost(RoutedHost):
    folds = True

    def version(self) -> int:
        # Sizes only: the router makes an empty list for each method that a client makes up.
        routers = list(_routers(self.app.router))
        waiting = sum(len(router.registered_routes) for router in routers)
        return waiting + sum(len(routes) for router in routers for routes in router.routes.values())

    def path(self, scope: dict[str, Any]) -> str:
        if scope["type"] == "http":
            return self._raw(scope).decode("latin-1")
        root, path = scope.get("root_path") or "", scope["path"]  # it takes the decoded path for a WebSocket
        return path[len(root) :] or "/" if root and path.startswith(root) else path

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        if not self.app.started:
            if not self.marked():
                return None
            raise NotStartedError(
                "this BlackSheep application has marked endpoints and has not started, so it has no routes yet; serve "
                "it with a lifespan (uvicorn --lifespan on), or await app.start() first"
            )
        if any(mount.match_by_path(_sent(scope)) for mount in self._mounts()):
            return None
        if scope["type"] == "websocket":
            found = self.app.router.get_match_by_method_and_path(_WEBSOCKET, self.path(scope))
        else:
            query, headers = scope.get("query_string") or b"", list(scope["headers"])
            try:
                found = self.app.router.get_match(Request.incoming(scope["method"], self._raw(scope), query, headers))
            except InvalidURL:
                return None
        if found is None:
            return None
        return self._resolve(found, method_of(scope))

    def endpoints(self) -> Iterable[Resolution]:
        for router in _routers(self.app.router):
            known = [(method, route) for method, route in router.registered_routes]
            known += [(method.decode(), route) for method, routes in router.routes.items() for route in routes]
            for method, route in known:
                yield self._resolve(route, "WEBSOCKET" if method == _WEBSOCKET else method)

    def _raw(self, scope: dict[str, Any]) -> bytes:
        raw, root = _sent(scope), (scope.get("root_path") or "").encode()
        return raw[len(root) :] or b"/" if root and raw.startswith(root) else raw

    def _mounts(self) -> Any:
        registry = getattr(self.app, "mount_registry", None)
        return () if registry is None else registry.mounted_apps

    def template(self, written: str) -> str:
        return _template(written)

    def _resolve(self, route: Any, method: str) -> Resolution:
        handler = _innermost(route.handler)
        written = None if route.pattern == b"*" else route.pattern.decode("utf-8", "replace")
        speaking = (handler, getattr(handler, "controller_type", None))
        return self.resolution(route.handler, handler, written, method, lambda: speaking)


def _innermost(handler: Any) -> Any:
    """What was written, behind what BlackSheep has put around it."""
    for _ in range(_DEEPEST):
        inner = getattr(handler, "root_fn", None)
        if inner is None:
            break
        handler = inner
    return handler


def _sent(scope: dict[str, Any]) -> bytes:
    raw: bytes | None = scope.get("raw_path")
    return scope["path"].encode() if raw is None else raw


def _routers(router: Any) -> Iterator[Any]:
    yield router
    for inner in router._sub_routers or ():  # noqa: SLF001
        yield from _routers(inner)


def _template(pattern: str) -> str:
    """`/a/:b/<int:c>/{d}` as `/a/{b}/{c}/{d}`."""
    parts = []
    for part in pattern.split("/"):
        if part.startswith(":"):
            parts.append(f"{{{part[1:]}}}")
        elif part[:1] in "<{" and part[-1:] in ">}" and len(part) > 2:
            parts.append(f"{{{part[1:-1].rpartition(':')[2]}}}")
        else:
            parts.append(part)
    return "/".join(parts)

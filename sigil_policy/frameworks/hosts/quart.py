"""Quart: views, the classes of views and blueprints.

The application's own URL adapter is asked, for the request as Quart will see it, so that host and subdomain matching
and converters hold. That is done for each request: it costs what Quart's routing costs (some 15 µs). Quart says by its
signals which rule it has chosen.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from quart import Quart, request, request_started, websocket, websocket_started
from werkzeug.exceptions import HTTPException

from sigil_policy.core.host import Host, Resolution
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.chain import chain
from sigil_policy.frameworks.hosts import RAN, RoutedHost, method_of

_PARAMETER = re.compile(r"<(?:[A-Za-z_]\w*(?:\(.*?\))?:)?([A-Za-z_]\w*)>")
_noted: WeakKeyDictionary[Quart, bool] = WeakKeyDictionary()


def host_for(app: Any, around: Any) -> Host | None:
    return QuartHost(app, around) if isinstance(app, Quart) else None


class _Asked:
    """What a URL adapter wants to know of a request."""

    def __init__(self, scope: dict[str, Any], path: str) -> None:
        self.scope = scope
        self.path = path
        self.method = scope["method"] if scope["type"] == "http" else "GET"
        self.is_websocket = scope["type"] == "websocket"
        self.scheme = scope.get("scheme") or ("ws" if self.is_websocket else "http")
        self.root_path = scope.get("root_path") or ""
        self.query_string = scope.get("query_string") or b""
        hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
        self.host = hosts[0].decode("latin-1") if hosts else ""


class QuartHost(RoutedHost):
    def version(self) -> list[Any]:
        app = self.app
        return [*app.view_functions.values(), *app.blueprints.values(), app.url_map.host_matching]

    def path(self, scope: dict[str, Any]) -> str:
        path: str = scope["path"]
        root = scope.get("root_path") or ""
        if root and (path == root or not path.startswith(root)):
            return " "  # as Quart says it: no path that anything matches
        return path.removeprefix(root)

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        asked = _Asked(scope, self.path(scope))
        try:
            adapter = self.app.create_url_adapter(asked)
            adapter.websocket = asked.is_websocket
            rule, _ = adapter.match(return_rule=True)
        except (HTTPException, UnicodeError):
            return None  # nothing is there, or a redirect
        return self._resolve(rule, method_of(scope))

    def endpoints(self) -> Iterable[Resolution]:
        for rule in self.app.url_map.iter_rules():
            methods: Sequence[str] = ("WEBSOCKET",) if rule.websocket else sorted(rule.methods or ("GET",))
            for method in methods:
                yield self._resolve(rule, method)

    def bind(self, policies: Sequence[Policy]) -> None:
        if self.app not in _noted:
            _noted[self.app] = True
            request_started.connect(_note_request, self.app)
            websocket_started.connect(_note_websocket, self.app)

    def inner_policies(self) -> Iterator[Policy]:
        yield from super().inner_policies()
        for inner in chain(self.app.asgi_app, lambda one: one is self.app):
            if isinstance(inner, PolicyStack):
                yield from inner.policies

    def template(self, written: str) -> str:
        return _PARAMETER.sub(r"{\1}", written)

    def _resolve(self, rule: Any, method: str) -> Resolution:
        view = self.app.view_functions.get(rule.endpoint)

        def speaking() -> Iterator[Any]:
            yield from (view, getattr(view, "view_class", None))
            names = rule.endpoint.split(".")[:-1]
            yield from (self.app.blueprints.get(".".join(names[:size])) for size in range(len(names), 0, -1))

        return self.resolution(rule, view, rule.rule, method, speaking)


# Coroutines, though they wait for nothing: Quart sends other receivers to a thread, for each request.
async def _note_request(sender: Quart, **_: Any) -> None:
    _note(sender, request)


async def _note_websocket(sender: Quart, **_: Any) -> None:
    _note(sender, websocket)


def _note(app: Quart, asked: Any) -> None:
    if asked.url_rule is not None and asked.routing_exception is None:
        asked.scope[RAN] = app.view_functions.get(asked.url_rule.endpoint)

"""Litestar, Quart, Falcon, Django and BlackSheep: which endpoint will serve an exchange, by their own routers.

    app = PolicyStack(litestar_app, policies=[...])         # found by itself; the endpoints' marks are read and applied

| framework | router that is asked | marks are read from | said afterwards, and compared |
|---|---|---|---|
| Litestar | its cached `handle_routing` | the handler, its function, controllers, tags | yes |
| Quart | `create_url_adapter(...).match` | the view, the class of a view, blueprints | yes |
| Falcon | the default router's `find`, then sinks | responders, resources | yes; not for sinks |
| Django | the URL resolver, with the language of the path | the view, the class of a view | yes |
| BlackSheep | `router.get_match` | the handler, its controller | no |

An application may be marked as a whole, where it lets attributes be set: that is the weakest.

Nothing of a framework is imported before the application has imported it. Applications that are mounted below one of
these are not read: their own stacks, and the tables of the policies, speak for them. What a router does not find has no
marks: the tables hold, and the default of each policy. Routes that are added while the application runs are seen.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from sigil_policy.core.host import Host, Resolution
from sigil_policy.core.marks import Marks, marks_of, speaker_of
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.chain import chain

RAN = "sigil_policy.endpoint"
"""Where in the scope a framework's hook leaves the endpoint that it has chosen."""

_FOUND = "sigil_policy.resolution"
_FRAMEWORKS = ("litestar", "quart", "falcon", "django", "blacksheep")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "WEBSOCKET"))


def find_host(app: Any) -> Host | None:
    """A host for `app` when it is, or leads straight to, an application of one of these frameworks."""
    here = [import_module(f"{__name__}.{name}") for name in _FRAMEWORKS if name in sys.modules]

    def host_of(inner: Any) -> Host | None:
        hosts = (module.host_for(inner, app) for module in here)
        return next((host for host in hosts if host is not None), None)

    hosts = map(host_of, chain(app, lambda inner: host_of(inner) is not None)) if here else iter(())
    return next((host for host in hosts if host is not None), None)


def method_of(scope: Mapping[str, Any]) -> str:
    return scope["method"] if scope["type"] == "http" else "WEBSOCKET"


class NotStartedError(RuntimeError):
    """An application has no routes before it starts, and is asked for them: nobody can know what they say."""


class RoutedHost(Host):
    """What these frameworks have in common: endpoints are read again when there are others than before."""

    readable = True
    takes_root_off = True
    """Templates begin behind the root path."""

    def __init__(self, app: Any, around: Any) -> None:
        self.app = app
        self.around = around
        self._tags: Mapping[str, Marks] = {}
        self._resolutions: dict[Any, Resolution] = {}
        self._version: Any = self
        self._marked = False

    def version(self) -> Any:
        """Another value than before when routes have been added."""
        raise NotImplementedError

    def marked(self) -> bool:
        version = self.version()
        if version != self._version:
            self._resolutions = {}
            self._marked = any(resolution.marks is not None for resolution in self.endpoints())
            self._version = version
        return self._marked

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        """What the router finds for `scope`."""
        raise NotImplementedError

    def find(self, scope: dict[str, Any]) -> Resolution | None:
        key = (self, scope["path"], scope.get("root_path"))
        known = scope.get(_FOUND)
        if known is None or known[0] != key:
            try:
                found = self.ask(scope)
            except NotStartedError:
                raise
            except Exception:  # noqa: BLE001  its router fails at such a path, and will say so itself
                found = None
            known = scope[_FOUND] = (key, found)
        answer: Resolution | None = known[1]
        return answer

    def route(self, scope: dict[str, Any], root: str) -> str | None:
        found = self.find(scope)
        if found is None or found.template is None:
            return None
        return f"{root}{found.template}" if self.takes_root_off else found.template

    def ran(self, scope: dict[str, Any]) -> Any:
        return scope.get(RAN)

    def tag(self, tags: Mapping[str, Marks]) -> None:
        self._tags = tags
        self._version = self

    def inner_policies(self) -> Iterator[Policy]:
        for inner in chain(self.around, lambda one: one is self.app):
            if isinstance(inner, PolicyStack):
                yield from inner.policies

    def template(self, written: str) -> str:
        """The framework's notation as ours: `/items/{number}`."""
        return written

    def resolution(
        self, route: Any, endpoint: Any, written: str | None, method: str, speaking: Callable[[], Iterable[Any]]
    ) -> Resolution:
        """The one resolution of `endpoint` at `route`; who is `speaking` may carry marks, the strongest first."""
        if method not in _METHODS:
            # Methods are a client's to make up; only those of a class, in any case, say something of their own.
            own = any(isinstance(one, type) and speaker_of(one, method) is not one for one in speaking())
            method = method.lower() if own else ""
        key = (id(route), written, method)
        known = self._resolutions.get(key)
        if known is None or known.endpoint != endpoint:
            marks: Marks | None = None
            names: frozenset[str] = frozenset()
            speaker = endpoint
            for one in (*speaking(), self.app):
                said = one if isinstance(one, Marks) else marks_of(one, method)
                if said is not None:
                    marks = said if marks is None else marks.over(said)
                    names |= said.names
                if isinstance(one, type) and speaker_of(one, method) is not one:
                    speaker = speaker_of(one, method)
            template = None if written is None else self.template(written)
            known = self._resolutions[key] = Resolution(endpoint, template, marks, names, speaker=speaker)
        return known

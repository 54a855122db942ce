"""Which endpoint of a Starlette or FastAPI application will serve an exchange, known before its router runs.

The routes are asked themselves (`matches`, in the router's own order), through included routers, mounts, mounted
applications and hosts; FastAPI's by its public `iter_route_contexts`. Nothing is guessed from path patterns.

What was found is remembered by the shape of the path: a segment that is a literal somewhere stands for itself, any
other for what it could be (a number, a UUID, any text). So a million ids are one entry, and an exchange costs a walk
along its segments. Applications with routes that look at more than method and path (`Host`, a `matches` of their own)
are asked each time. Routes that are added while the application runs are seen by the next exchange.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Host as HostRoute
from starlette.routing import Match, Mount, Route, Router, WebSocketRoute

from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks, marks_of

_DEEPEST = 100  # middlewares, mounts or routers: a bound against what contains itself
_MOST_SHAPES = 20_000
_PART = re.compile(r"\{([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?\}")

Said = tuple[Marks, ...]


class _Declared(Marks):
    """What FastAPI knows of an endpoint: its own dependencies enforce it, and policies may do so before them."""

    __slots__ = ()


class _Entry:
    """One route at its place: what is said around it, strongest first, and what is mounted there."""

    __slots__ = ("behind", "below", "context", "gate", "said", "template")

    def __init__(
        self, context: Any, template: str, said: Said, below: "_Table | None", *, gate: Any, behind: bool
    ) -> None:
        self.context = context
        self.gate = gate  # an included router that has its own mind
        self.behind = behind  # other middlewares
        self.template = template
        self.said = said
        self.below = below


class _Table:
    """The routes of one router, and of all that it includes, in the order in which they are asked."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: list[_Entry] = []


class _Shape:
    """A path so far: where a literal leads, text that is none, and text that could be something else as well."""

    __slots__ = ("found", "kinds", "literals", "text")

    def __init__(self) -> None:
        self.literals: dict[str, _Shape] = {}
        self.text: _Shape | None = None
        self.kinds: dict[tuple[str, ...], _Shape] = {}
        self.found: dict[str, Resolution | None] = {}


class RouteIndex:
    """The endpoints of `app`; `find` tells the one that its router will choose.

    index = RouteIndex(app)
    index.find(scope)       # Resolution('/v7/agents/{name}', <function show>)
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._tags: dict[str, Marks] = {}
        self._lists: list[Any] = []
        self._size = 0
        self._table = _Table()
        self._resolutions: dict[Any, Resolution] = {}
        self._stock = True
        self._literals: set[str] = set()
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._longest = 0
        self._start = _Shape()
        self._shapes = 0
        self._marked = False
        self._fresh = False

    def tag(self, tags: Mapping[str, Marks]) -> None:
        self._tags = dict(tags)
        self._fresh = False

    @property
    def marked(self) -> bool:
        """Whether something is said of any endpoint."""
        self._refresh()
        return self._marked

    def _refresh(self) -> None:
        if not self._fresh or self._size != sum(map(len, self._lists)):
            self._read()

    def find(self, scope: dict[str, Any], path: str) -> Resolution | None:
        """The endpoint for `scope`; `path` is the part of its path behind the root path."""
        self._refresh()
        if not self._stock or "\n" in path or path[:1] != "/":
            # `$` of a regular expression matches in front of a last line feed.
            return self._ask(scope)
        shape = self._start
        segments = path.split("/", self._longest)
        for segment in segments:
            known = shape.literals.get(segment)
            if known is None:
                if segment in self._literals:
                    return self._learn(scope, segments)
                known = shape.kinds.get(self._kinds(segment)) if self._patterns else shape.text
                if known is None:
                    return self._learn(scope, segments)
            shape = known
        try:
            return shape.found[scope["method"] if scope["type"] == "http" else "WEBSOCKET"]
        except KeyError:
            return self._learn(scope, segments)

    def all(self) -> Iterator[Resolution]:
        """Every endpoint once for each method that it serves."""
        self._refresh()
        waiting = [("", self._table)]
        while waiting:
            prefix, table = waiting.pop()
            for entry in table.entries:
                if entry.below is not None:
                    waiting.append((prefix + entry.template, entry.below))
                    continue
                endpoint = getattr(entry.context, "endpoint", None)
                if endpoint is None:
                    continue
                methods = getattr(entry.context, "methods", None) or ("GET",)
                for method in sorted(methods):
                    yield self._resolution(entry, prefix + entry.template, endpoint, method)

    # --- asking the routes -----------------------------------------------------------------------------------------

    def _ask(self, scope: dict[str, Any]) -> Resolution | None:
        return self._ask_table(self._table, scope, "", _DEEPEST)

    def _ask_table(self, table: _Table, scope: dict[str, Any], prefix: str, deepest: int) -> Resolution | None:
        partial: Any = None
        for entry in table.entries:
            if entry.gate is not None and entry.gate.matches({**scope})[0] is Match.NONE:
                continue
            match, child = entry.context.matches(scope)
            if match is Match.FULL:
                if entry.below is not None and deepest:
                    inner = self._ask_table(entry.below, {**scope, **child}, prefix + entry.template, deepest - 1)
                    # A mount has claimed the path: what its application does not know is not asked elsewhere.
                    return inner or self._unknown(child.get("endpoint"))
                method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
                return self._resolution(entry, prefix + entry.template, child.get("endpoint"), method)
            if match is Match.PARTIAL and partial is None:
                partial = child.get("endpoint")
        return None if partial is None else self._unknown(partial)

    def _unknown(self, endpoint: Any) -> Resolution:
        """The router stops at `endpoint`, which will not serve the exchange: no template, and nothing is said."""
        return self._remembered((id(endpoint),), endpoint, None, (), behind=False)

    def _resolution(self, entry: _Entry, template: str, endpoint: Any, method: str) -> Resolution:
        own = marks_of(endpoint, method)
        said = entry.said if own is None else (own, *entry.said)
        # Methods are a client's to make up; only those of the class say something of their own.
        speaks = isinstance(endpoint, type) and (method == "HEAD" or hasattr(endpoint, method.lower()))
        key = (id(entry), method if speaks else "")
        return self._remembered(key, endpoint, template, said, behind=entry.behind)

    def _remembered(self, key: Any, endpoint: Any, template: str | None, said: Said, *, behind: bool) -> Resolution:
        known = self._resolutions.get(key)
        if known is None:
            marks: Marks | None = None
            for weaker in said:
                marks = weaker if marks is None else marks.over(weaker)
            own = frozenset(name for one in said if not isinstance(one, _Declared) for name in one.names)
            known = self._resolutions[key] = Resolution(endpoint, template, marks, own, behind=behind)
        return known

    # --- shapes ----------------------------------------------------------------------------------------------------

    def _kinds(self, segment: str) -> tuple[str, ...]:
        """What a segment that is no literal could be, beside text."""
        return tuple([name for name, pattern in self._patterns.items() if pattern.fullmatch(segment)])

    def _step(self, shape: _Shape, segment: str) -> _Shape:
        """Where `segment` leads, also for the first time."""
        table: dict[Any, _Shape] = shape.literals
        key: Any = segment
        if segment not in self._literals:
            if not self._patterns:
                if shape.text is None:
                    shape.text = _Shape()
                    self._shapes += 1
                return shape.text
            table, key = shape.kinds, self._kinds(segment)
        if key not in table:
            table[key] = _Shape()
            self._shapes += 1
        return table[key]

    def _learn(self, scope: dict[str, Any], segments: Sequence[str]) -> Resolution | None:
        found = self._ask(scope)
        if self._shapes > _MOST_SHAPES:
            self._start, self._shapes = _Shape(), 0
        shape = self._start
        for segment in segments:
            shape = self._step(shape, segment)
        if len(shape.found) < 32:  # methods are a client's to make up
            shape.found[scope["method"] if scope["type"] == "http" else "WEBSOCKET"] = found
        return found

    # --- reading the routes ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        self._lists, self._literals, self._patterns = [], {""}, {}
        self._resolutions = {}
        self._stock, self._longest, self._marked = True, 0, False
        self._start, self._shapes = _Shape(), 0
        root = find_router(self._app)
        self._table = _Table() if root is None else self._read_router(root, (), 0, _DEEPEST, behind=False)
        self._size = sum(map(len, self._lists))
        self._fresh = True
        self._marked = any(resolution.marks is not None for resolution in self.all())

    def _read_router(self, router: Any, said: Said, depth: int, deepest: int, *, behind: bool) -> _Table:
        """The table of `router`, whose paths begin `depth` segments into the path."""
        table = _Table()
        own = marks_of(router)
        said = said if own is None else (own, *said)
        self._lists.append(router.routes)
        for node in list(router.routes):
            contexts = list(_contexts(node))
            chains = self._chains(node, said, deepest)
            if len(chains) != len(contexts):
                chains = [said] * len(contexts)
            gate = node if _has_its_own_mind(node) else None
            for context, around in zip(contexts, chains, strict=True):
                table.entries.append(self._read_route(context, around, depth, deepest, gate=gate, behind=behind))
        return table

    def _chains(self, node: Any, said: Said, deepest: int) -> list[Said]:
        """What the routers around each route below `node` say, in the order of its contexts."""
        included = getattr(node, "original_router", None)
        if included is None or not deepest:
            return [said]
        self._lists.append(included.routes)
        own = marks_of(included)
        inner = said if own is None else (own, *said)
        return [chain for route in list(included.routes) for chain in self._chains(route, inner, deepest - 1)]

    def _read_route(self, context: Any, said: Said, depth: int, deepest: int, *, gate: Any, behind: bool) -> _Entry:
        route = getattr(context, "original_route", context)
        tags = [str(getattr(tag, "value", tag)) for tag in getattr(context, "tags", None) or ()]
        said = (*(self._tags[tag] for tag in tags if tag in self._tags), *said)
        scopes = tuple(dict.fromkeys(_security_scopes(getattr(context, "dependant", None))))
        if scopes:
            said = (_Declared(scopes=scopes), *said)
        effective = getattr(context, "starlette_route", None) or route
        own = marks_of(effective)
        said = said if own is None else (own, *said)
        below = None
        if isinstance(effective, Mount | HostRoute):
            template = effective.path if isinstance(effective, Mount) else ""
            depth += self._know(template, depth)
            behind = behind or (isinstance(effective, Mount) and effective.app is not effective._base_app)  # noqa: SLF001
            # Whatever is mounted, its paths go on behind the mount's.
            self._longest = max(self._longest, depth + 1)
            router = find_router(effective.app)
            if router is not None and deepest:
                # Middlewares of its own, among them perhaps a stack.
                further = router is not effective.app and bool(getattr(effective.app, "user_middleware", True))
                below = self._read_router(router, said, depth, deepest - 1, behind=behind or further)
        else:
            template = getattr(context, "path_format", None) or getattr(context, "path", None) or ""
            self._know(getattr(context, "path", None) or template, depth)
        if gate is not None or _looks_further(effective):
            self._stock = False
        return _Entry(context, template, said, below, gate=gate, behind=behind)

    def _know(self, path: str, depth: int) -> int:
        """Take the literals and patterns of a route's path; how many segments it has."""
        segments = path.strip("/").split("/") if path.strip("/") else []
        self._longest = max(self._longest, depth + len(segments) + 1)
        for place, segment in enumerate(segments):
            if "{" not in segment:
                self._literals.add(segment)
                continue
            whole = _PART.fullmatch(segment)
            kind = None if whole is None else whole.group(2) or "str"
            if kind == "str":
                continue
            if kind == "path" and place == len(segments) - 1:
                continue
            if "path}" in segment:
                self._stock = False  # spans segments in the middle of a path
            else:
                self._patterns[segment] = _pattern(segment)
        return len(segments)


def find_router(app: Any) -> Any:
    """The router that `app` leads to, behind the middlewares in front of it."""
    for _ in range(_DEEPEST):
        if isinstance(app, Router):
            return app
        if isinstance(app, Starlette):
            return app.router
        app = getattr(app, "app", None)
        if app is None:
            return None
    return None


def _contexts(node: Any) -> Iterable[Any]:
    """The routes that `node` stands for: itself, or all of an included router's."""
    fastapi = sys.modules.get("fastapi.routing")
    return (node,) if fastapi is None else fastapi.iter_route_contexts([node])


def _security_scopes(dependant: Any, deepest: int = _DEEPEST) -> Iterator[str]:
    """The scopes of FastAPI's `Security(...)`, from the outside in."""
    if dependant is None or not deepest:
        return
    yield from getattr(dependant, "own_oauth_scopes", None) or ()
    for inner in dependant.dependencies:
        yield from _security_scopes(inner, deepest - 1)


def _pattern(segment: str) -> re.Pattern[str]:
    """A segment with parameters, as its route reads it."""
    from starlette.convertors import CONVERTOR_TYPES

    parts, end = [], 0
    for found in _PART.finditer(segment):
        parts += [re.escape(segment[end : found.start()]), CONVERTOR_TYPES[found.group(2) or "str"].regex]
        end = found.end()
    return re.compile("".join([*parts, re.escape(segment[end:])]))


def _looks_further(route: Any) -> bool:
    """Whether a route may look at more than the method and the path."""
    fastapi = sys.modules.get("fastapi.routing")
    stock: list[Any] = [Route, WebSocketRoute, Mount]
    if fastapi is not None:
        stock += [fastapi.APIRoute, fastapi.APIWebSocketRoute]
    return type(route).matches not in [kind.matches for kind in stock]


def _has_its_own_mind(node: Any) -> bool:
    """Whether an included router decides itself what it matches."""
    included = getattr(node, "original_router", None)
    fastapi = sys.modules.get("fastapi.routing")
    return included is not None and fastapi is not None and type(included).matches is not fastapi.APIRouter.matches

"""Which endpoint of a Starlette or FastAPI application will serve an exchange, known before its router runs.

The routes are asked themselves (`matches`, in the router's own order), through included routers, mounts, mounted
applications, hosts and FastAPI's frontends. Nothing is guessed from path patterns; those whose first segments are
others are passed over, so that ten thousand routes cost what ten cost.

What was found is remembered by the shape of the path: a segment that is a literal somewhere stands for itself, any
other for what it could be (a number, a UUID, any text). So a million ids are one entry, and an exchange costs a walk
along its segments. Applications with routes that look at more than method and path (`Host`, a `matches` of their own,
frontends, parameters that span segments before the end) are asked each time.

Routes that are added, removed, exchanged or reordered while the application runs are seen by the next exchange. What is
known of them is exchanged as a whole, so that threads may ask at once. Where a route fails at a path (`{number:int}` at
5,000 digits), nothing is found, and the router says so itself.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import CONVERTOR_TYPES
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Host as HostRoute
from starlette.routing import Match, Mount, Route, Router, WebSocketRoute

from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks, marks_of, speaker_of
from sigil_policy.core.routing import below
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.chain import chain

_DEEPEST = 100  # middlewares, mounts or routers: a bound against what contains itself
_MOST_SHAPES = 20_000
_LONGEST_SEGMENT = 200
"""What is longer is not tried against patterns: some of them take the square of its length."""
_PART = re.compile(r"\{([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?\}")
_TEXT, _REST = "[^/]+", ".*"
# A convertor that surely matches no slash: letters, digits and ranges of these, `\d`, `\w`, groups, repetitions.
_ONE_SEGMENT = re.compile(r"(?:[0-9A-Za-z]-[0-9A-Za-z]|[\]}]-|\\[dw.-]|\(\?:|[0-9A-Za-z_{},+*?|()\[\]])+")
_LONGEST_BEGINNING = 4
_SOCKET = ("websocket",)  # no method that a client could name
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "CONNECT", _SOCKET))

Said = tuple[Marks, ...]


class _Declared(Marks):
    """What FastAPI knows of an endpoint: its own dependencies enforce it, and policies may do so before them."""

    __slots__ = ()


class _Entry:
    """One route at its place: what is said around it, strongest first, and what is mounted there."""

    __slots__ = ("app", "behind", "below", "context", "gate", "root", "said", "template", "view")

    def __init__(
        self,
        context: Any,
        view: Any,
        template: str,
        said: Said,
        below: "_Table | None",
        *,
        gate: Any,
        behind: bool,
        app: Any,
        root: str,
    ) -> None:
        self.context = context
        self.view = view  # says what `context` is
        self.app = app  # what is mounted
        self.root = root  # which root path that sets itself
        self.gate = gate  # an included router that has its own mind
        self.behind = behind  # other middlewares
        self.template = template
        self.said = said
        self.below = below


class _Table:
    """The routes of one router, and of all that it includes, in the order in which they are asked."""

    __slots__ = ("_by_beginning", "entries", "low", "router")

    def __init__(self, router: Any = None) -> None:
        self.router = router
        self.entries: list[_Entry] = []
        self.low: list[tuple[Any, Said]] = []  # FastAPI's frontends
        self._by_beginning: dict[tuple[str, ...], list[tuple[int, _Entry]]] = {}

    def add(self, entry: _Entry, *, anywhere: bool) -> None:
        """Add a route, which may match paths that begin otherwise than its template where it matches `anywhere`."""
        beginning = () if anywhere else _beginning(entry.template)
        self._by_beginning.setdefault(beginning, []).append((len(self.entries), entry))
        self.entries.append(entry)

    def candidates(self, scope: dict[str, Any]) -> Iterable[_Entry]:
        """The routes that may match, in their order: most need not be asked."""
        path = below(scope.get("root_path") or "", scope["path"])
        if path[:1] != "/" or len(self.entries) < 8:
            return self.entries
        # `$` of a regular expression matches in front of a last line feed.
        segments = tuple(path.removesuffix("\n").split("/", _LONGEST_BEGINNING + 1)[1 : _LONGEST_BEGINNING + 1])
        known = self._by_beginning
        found = [one for size in range(len(segments) + 1) for one in known.get(segments[:size], ())]
        found.sort(key=_first)
        return [entry for _, entry in found]


def _beginning(template: str) -> tuple[str, ...]:
    """The first segments of a template that stand for themselves."""
    segments = template.split("/")[1 : _LONGEST_BEGINNING + 1]
    return tuple(takewhile(lambda segment: "{" not in segment, segments))


class _Shape:
    """A path so far: where a literal leads, text that is none, and text that could be something else as well."""

    __slots__ = ("found", "kinds", "literals", "text")

    def __init__(self) -> None:
        self.literals: dict[str, _Shape] = {}
        self.text: _Shape | None = None
        self.kinds: dict[tuple[str, ...], _Shape] = {}
        self.found: dict[Any, Resolution | None] = {}


class RouteIndex:
    """The endpoints of `app`; `find` tells the one that its router will choose.

    index = RouteIndex(app)
    index.find(scope, "/v7/agents/ada")     # Resolution('/v7/agents/{name}', <function show>)
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._tags: dict[str, Marks] = {}
        self._reading: _Reading | None = None

    def tag(self, tags: Mapping[str, Marks]) -> None:
        self._tags = dict(tags)
        self._reading = None

    @property
    def latest(self) -> "_Reading":
        """The routes as they were when they were last looked at."""
        return self._reading or self.now

    @property
    def now(self) -> "_Reading":
        """The routes as they are. Read anew, and exchanged as a whole, when they are others than before."""
        reading = self._reading
        # What stands in both lists is compared by identity, in C.
        if reading is None or [*map(_routes_of, reading.sources)] != reading.copies:
            reading = self._reading = _Reading(self._app, self._tags)
        return reading

    @property
    def marked(self) -> bool:
        """Whether something is said of any endpoint."""
        return self.now.marked

    def find(self, scope: dict[str, Any], path: str) -> Resolution | None:
        """The endpoint for `scope`; `path` is the part of its path behind the root path."""
        return self.now.find(scope, path)

    def all(self) -> Iterator[Resolution]:
        """Every endpoint once for each method that it serves, and what is mounted and cannot be read."""
        return self.now.all()

    def behind(self) -> Iterator[tuple[Any, Resolution | None]]:
        """What other middlewares may have in them: a mounted application, or that of a route with its endpoint."""
        return self.now.behind()


class _Reading:
    """The routes of an application as they were at one time. What is remembered of paths belongs to it."""

    def __init__(self, app: Any, tags: Mapping[str, Marks]) -> None:
        self.sources: list[Any] = []
        self.copies: list[list[Any]] = []
        self.opaque: set[int] = set()
        """What is mounted and cannot be read, and of which nothing is said."""
        self._tags = tags
        self._resolutions: dict[Any, Resolution] = {}
        self._stock = True
        self._literals = {""}
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._methods = set(_METHODS)
        self._longest = 0
        self._start = _Shape()
        self._shapes = 0
        said, inner = _said_along(app, ())
        router = find_router(inner)
        self._table = _Table()
        if router is not None:
            self._watch(inner if isinstance(inner, Starlette) and inner.middleware_stack is None else router)
            self._table = self._read_router(router, said, 0, _DEEPEST, behind=False)
        self.marked = any(resolution.marks is not None for resolution in self.all())

    def find(self, scope: dict[str, Any], path: str) -> Resolution | None:
        if not self._stock or "\n" in path or path[:1] != "/":
            # `$` of a regular expression matches in front of a last line feed.
            return self._asked(scope)
        shape = self._start
        segments = path.split("/", self._longest)
        for segment in segments:
            known = shape.literals.get(segment)
            if known is None:
                if segment in self._literals:
                    return self._learn(scope, segments)
                if self._patterns:
                    if len(segment) > _LONGEST_SEGMENT:
                        return self._asked(scope)
                    known = shape.kinds.get(self._kinds(segment))
                else:
                    known = shape.text
                if known is None:
                    return self._learn(scope, segments)
            shape = known
        try:
            return shape.found[scope["method"] if scope["type"] == "http" else _SOCKET]
        except KeyError:
            return self._learn(scope, segments)

    def all(self) -> Iterator[Resolution]:
        waiting = [("", self._table)]
        while waiting:
            prefix, table = waiting.pop()
            for group, said in table.low:
                yield self._low(group, said, prefix)
            for entry in table.entries:
                if entry.below is not None:
                    waiting.append((prefix + entry.template, entry.below))
                    continue
                endpoint = getattr(entry.view, "endpoint", None) or entry.app
                if endpoint is None:
                    continue
                for method in sorted(_methods_of(entry.view, endpoint)):
                    yield self._resolution(entry, prefix + entry.template, endpoint, method)

    def behind(self) -> Iterator[tuple[Any, Resolution | None]]:
        waiting = [("", self._table)]
        while waiting:
            prefix, table = waiting.pop()
            for entry in table.entries:
                if entry.behind and entry.app is not None:
                    yield entry.app, None
                elif entry.behind:
                    endpoint = entry.view.endpoint
                    for method in sorted(_methods_of(entry.view, endpoint)):
                        yield entry.view.app, self._resolution(entry, prefix + entry.template, endpoint, method)
                elif entry.below is not None:
                    waiting.append((prefix + entry.template, entry.below))

    # --- asking the routes -----------------------------------------------------------------------------------------

    def _asked(self, scope: dict[str, Any]) -> Resolution | None:
        try:
            return self._ask_table(self._table, scope, "", _DEEPEST)
        except Exception:  # noqa: BLE001  a route that fails (`int` at 5,000 digits) will fail in the router as well
            return None

    def _ask_table(self, table: _Table, scope: dict[str, Any], prefix: str, deepest: int) -> Resolution | None:
        partial: Any = None
        for entry in table.candidates(scope):
            if entry.gate is not None and entry.gate.matches({**scope})[0] is Match.NONE:
                continue
            match, child = entry.context.matches(scope)
            if match is Match.FULL:
                if entry.below is not None and deepest:
                    inside = {**scope, **child}
                    if entry.root:
                        inside["root_path"] = entry.root
                    inner = self._ask_table(entry.below, inside, prefix + entry.template, deepest - 1)
                    # A mount has claimed the path: what its application does not know is not asked elsewhere.
                    return inner or self._unknown(child.get("endpoint"))
                method = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
                return self._resolution(entry, prefix + entry.template, child.get("endpoint"), method)
            if match is Match.PARTIAL and partial is None:
                partial = child.get("endpoint")
        if partial is not None:
            return self._unknown(partial)
        return self._ask_low(table, scope, prefix) if table.low else None

    def _ask_low(self, table: _Table, scope: dict[str, Any], prefix: str) -> Resolution | None:
        """FastAPI's frontends: what they serve has no endpoint; the routers around them speak for it."""
        match, _, route, context = table.router._match_low_priority(scope)  # noqa: SLF001
        chosen = route if context is None else context
        for group, said in table.low:
            if group is chosen and match is Match.FULL:
                return self._low(group, said, prefix)
        return None

    def _low(self, group: Any, said: Said, prefix: str) -> Resolution:
        template = f"{prefix}{getattr(group, 'frontend_prefix', '')}/{{path}}"
        return self._remembered((id(group), "low"), None, template, said, behind=False)

    def _unknown(self, endpoint: Any) -> Resolution:
        """The router stops at `endpoint`, which will not serve the exchange: no template, and nothing is said."""
        return self._remembered((id(endpoint),), endpoint, None, (), behind=False)

    def _resolution(self, entry: _Entry, template: str, endpoint: Any, method: str) -> Resolution:
        # Methods are a client's to make up; only those of a class, in any case, say something of their own.
        speaker = speaker_of(endpoint, method)
        key = (id(entry), "" if speaker is endpoint else method.lower())
        known = self._resolutions.get(key)
        if known is not None and known.endpoint is endpoint:
            return known
        own = marks_of(endpoint, method)
        said = entry.said if own is None else (own, *entry.said)
        label = ",".join(sorted((getattr(entry.view, "methods", None) or set()) - {"HEAD"}))
        self._resolutions.pop(key, None)  # a route of its own mind may name another endpoint each time
        return self._remembered(key, endpoint, template, said, behind=entry.behind, speaker=speaker, label=label)

    def _remembered(
        self,
        key: Any,
        endpoint: Any,
        template: str | None,
        said: Said,
        *,
        behind: bool,
        speaker: Any = None,
        label: str = "",
    ) -> Resolution:
        known = self._resolutions.get(key)
        if known is None:
            marks: Marks | None = None
            for weaker in said:
                marks = weaker if marks is None else marks.over(weaker)
            own = frozenset(name for one in said if not isinstance(one, _Declared) for name in one.names)
            known = Resolution(endpoint, template, marks, own, behind=behind, speaker=speaker, label=label)
            self._resolutions[key] = known
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
        method = scope["method"] if scope["type"] == "http" else _SOCKET
        if method not in self._methods or (self._patterns and max(map(len, segments)) > _LONGEST_SEGMENT):
            return self._asked(scope)  # methods are a client's to make up
        try:
            found = self._ask_table(self._table, scope, "", _DEEPEST)
        except Exception:  # noqa: BLE001  see `_asked`; of others of this shape nothing is known
            return None
        if self._shapes > _MOST_SHAPES:
            self._start, self._shapes = _Shape(), 0
        shape = self._start
        for segment in segments:
            shape = self._step(shape, segment)
        shape.found[method] = found
        return found

    # --- reading the routes ----------------------------------------------------------------------------------------

    def _watch(self, source: Any) -> None:
        """Other routes of `source` than now make this reading an old one."""
        self.sources.append(source)
        self.copies.append([*source.routes])

    def _read_router(self, router: Any, said: Said, depth: int, deepest: int, *, behind: bool) -> _Table:
        """The table of `router`, whose paths begin `depth` segments into the path."""
        table = _Table(router)
        own = marks_of(router)
        said = said if own is None else (own, *said)
        nodes = list(router.routes)
        for node in nodes:
            chains = self._chains(node, said, deepest)
            gate = node if _has_its_own_mind(node) else None
            for context, around in zip(_contexts(node), chains, strict=True):
                entry, further = self._read_route(context, around, depth, deepest, gate=gate, behind=behind)
                self._stock = self._stock and not further
                table.add(entry, anywhere=further)
        table.low = [(group, said) for group in getattr(router, "_low_priority_routes", ())]
        for node in nodes:
            candidates: Iterable[Any] = getattr(node, "effective_low_priority_routes", tuple)()
            table.low += zip(candidates, self._low_chains(node, said, deepest), strict=True)
        if table.low:
            self._stock = False  # they look at files
        return table

    def _chains(self, node: Any, said: Said, deepest: int) -> list[Said]:
        """What the routers around each route below `node` say, in the order of its contexts."""
        included = getattr(node, "original_router", None)
        if included is None or not deepest:
            return [said]
        self._watch(included)
        inner = _with(included, said)
        # What FastAPI chooses from: routes that have not been added by its own methods are not among it.
        return [chain for one in node.effective_candidates() for chain in self._chains(one, inner, deepest - 1)]

    def _low_chains(self, node: Any, said: Said, deepest: int) -> list[Said]:
        """The same for the frontends below `node`."""
        included = getattr(node, "original_router", None)
        if included is None or not deepest:
            return []
        inner = _with(included, said)
        below = [chain for one in included.routes for chain in self._low_chains(one, inner, deepest - 1)]
        return [*[inner] * len(getattr(included, "_low_priority_routes", ())), *below]

    def _read_route(
        self, context: Any, said: Said, depth: int, deepest: int, *, gate: Any, behind: bool
    ) -> tuple[_Entry, bool]:
        """What is known of one route, and whether it may look at more than the method and the path."""
        route = getattr(context, "original_route", context)
        tags = [str(getattr(tag, "value", tag)) for tag in getattr(context, "tags", None) or ()]
        said = (*(self._tags[tag] for tag in tags if tag in self._tags), *said)
        # FastAPI's tree has routes of its own making where Starlette's are included, with the prefix of where they are.
        made = getattr(getattr(context, "_route_context", None), "starlette_route", None)
        effective = made or getattr(context, "starlette_route", None) or route
        view = context if made is None else made
        dependant = getattr(context, "dependant", None) or getattr(effective, "dependant", None)
        scopes = tuple(dict.fromkeys(_security_scopes(dependant)))
        if scopes:
            said = (_Declared(scopes=scopes), *said)
        said = _with(effective, said)
        self._methods.update(getattr(view, "methods", None) or ())
        table, app, root = None, None, ""
        if isinstance(effective, Mount | HostRoute):
            template = effective.path if isinstance(effective, Mount) else ""
            depth += self._know(template, depth, mounts=True)
            behind = behind or (isinstance(effective, Mount) and effective.app is not effective._base_app)  # noqa: SLF001
            # Whatever is mounted, its paths go on behind the mount's.
            self._longest = max(self._longest, depth + 1)
            said, app = _said_along(effective.app, said)
            router = find_router(app)
            if router is not None and deepest:
                # Middlewares of its own, among them perhaps a stack.
                further = bool(getattr(app, "user_middleware", ())) or _has_middlewares(router)
                behind = behind or app is not effective.app or further
                self._watch(app if isinstance(app, Starlette) and app.middleware_stack is None else router)
                root = getattr(app, "root_path", "")
                if root:
                    self._stock = False  # in the place of where it is mounted
                table = self._read_router(router, said, depth, deepest - 1, behind=behind)
            app = effective.app
            if table is None and not said:
                self.opaque.add(id(app))
        else:
            template = getattr(view, "path_format", None) or getattr(view, "path", None) or ""
            self._know(getattr(view, "path", None) or template, depth)
            behind = behind or any(
                isinstance(one, PolicyStack) for one in chain(getattr(effective, "app", None), is_known)
            )
        entry = _Entry(context, view, template, said, table, gate=gate, behind=behind, app=app, root=root)
        return entry, gate is not None or _looks_further(effective)

    def _know(self, path: str, depth: int, *, mounts: bool = False) -> int:
        """Take the literals and patterns of a route's path; how many segments it has."""
        segments = path.strip("/").split("/") if path.strip("/") else []
        self._longest = max(self._longest, depth + len(segments) + 1)
        for place, segment in enumerate(segments):
            if "{" not in segment:
                self._literals.add(segment)
                continue
            kinds = [CONVERTOR_TYPES[kind or "str"].regex for _, kind in _PART.findall(segment)]
            whole = _PART.fullmatch(segment) is not None
            if whole and kinds == [_TEXT]:
                continue
            if whole and kinds == [_REST] and place == len(segments) - 1 and not mounts:
                continue
            if all(kind == _TEXT or _ONE_SEGMENT.fullmatch(kind) for kind in kinds):
                self._patterns[segment] = _pattern(segment)
            else:
                self._stock = False  # may span segments in the middle of a path
        return len(segments)


_routes_of = attrgetter("routes")
_first = itemgetter(0)


def _with(target: Any, said: Said) -> Said:
    own = marks_of(target)
    return said if own is None else (own, *said)


def _said_along(app: Any, said: Said) -> tuple[Said, Any]:
    """What `app`, and all that it wraps, say of themselves, and the last of these."""
    for inner in chain(app, is_known):
        app = inner
        if isinstance(app, Router):
            break  # speaks for itself
        said = _with(app, said)
        if isinstance(app, Starlette):
            break
    return said, app


def is_known(app: Any) -> bool:
    """Whether `app` is of Starlette's make, so that nobody has to look what it holds."""
    if isinstance(app, FunctionType):
        return app.__module__ in ("starlette.routing", "fastapi.routing")
    return isinstance(app, Starlette | Router | ExceptionMiddleware | PolicyStack)


def _has_middlewares(router: Any) -> bool:
    return bool(getattr(router, "middleware_stack", router.app) != router.app)


def _methods_of(context: Any, endpoint: Any) -> Iterable[str]:
    methods = getattr(context, "methods", None)
    if methods is None and isinstance(endpoint, type):
        methods = [name for name in _METHODS if isinstance(name, str) and hasattr(endpoint, name.lower())]
    return methods or ("GET",)


def find_router(app: Any) -> Any:
    """The router that `app` leads to, behind the middlewares in front of it."""
    for inner in chain(app, is_known):
        if isinstance(inner, Router):
            return inner
        if isinstance(inner, Starlette):
            # An application that has started keeps the router that it had.
            return inner.router if inner.middleware_stack is None else find_router(inner.middleware_stack)
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

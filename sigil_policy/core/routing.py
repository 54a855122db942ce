"""Routes as data: every table of a stack compiled into one matcher, asked once per exchange.

A route is `"METHOD /v7/agents/{name}"` or, for any method, `"/v7/agents/{name}"`:

* a segment is literal, or a parameter in braces that stands for exactly one segment;
* a last segment `**` (or Starlette's `{rest:path}`) stands for any number of segments, also none;
* a `GET` rule covers `HEAD`, unless there is a rule for `HEAD`; `WEBSOCKET /path` names a WebSocket;
* it covers `get` as well, unlike RFC 9110 section 9.1: Django and Quart serve one for the other.

The most specific rule wins, segment by segment from the left: a literal before a parameter before `**`; then a rule
that names the method before one that does not. The order in which rules are written does not matter.

Paths are compared as the application's router sees them (decoded, after `root_path`); empty segments are dropped, so
neither `//` nor a trailing slash dodges a rule. Nor does a line feed at the end, which Starlette's routes overlook. A
path with a dot segment matches no rule at all, so that `/public/../admin` never gets the setting of `/public/**`;
what must not be reached that way looks at `has_dot_segment`.

Matching walks one dictionary per segment: ten thousand routes cost what ten cost.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_ROUTE = re.compile(r"(?:([A-Z][A-Z0-9-]*) +)?(/\S*)")
_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*(?::[A-Za-z_][A-Za-z0-9_]*)?\}")
_TAIL = re.compile(r"\*\*|\{[A-Za-z_][A-Za-z0-9_]*:path\}")

# How specific a segment is; the end of a route is more specific than a `**` that may be empty.
_END, _LITERAL, _ONE, _ANY = 3, 2, 1, 0

Settings = Mapping[int, Any]
_NOTHING: Settings = MappingProxyType({})


def has_dot_segment(path: str) -> bool:
    """Whether a segment of `path` is `.` or `..`, which some applications resolve and others take as a name."""
    return "." in path and not {".", ".."}.isdisjoint(path.removesuffix("\n").split("/"))


def below(root: str, path: str) -> str:
    """The path as the application's router sees it: after `root_path` (ASGI `path` includes it)."""
    if path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


class Route(NamedTuple):
    """A parsed route: `method` is None for any; a segment is a literal, or None for a parameter."""

    method: str | None
    segments: tuple[str | None, ...]
    tail: bool

    @property
    def rank(self) -> tuple[int, ...]:
        """Compares routes that match one path: the greater is the more specific."""
        kinds = tuple(_ONE if segment is None else _LITERAL for segment in self.segments)
        return (*kinds, _ANY if self.tail else _END)


def parse_route(text: str) -> Route:
    """Read `"METHOD /path"`; `ValueError` says what is wrong with it and how to write it."""
    found = _ROUTE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"route {text!r} must be 'METHOD /path' or '/path', for example 'GET /v7/agents/{{name}}' or '/v7/**'"
        )
    method, path = found.groups()
    parts = [part for part in path.split("/") if part]
    tail = bool(parts) and _TAIL.fullmatch(parts[-1]) is not None
    segments: list[str | None] = []
    for part in parts[:-1] if tail else parts:
        if _PARAMETER.fullmatch(part) and not _TAIL.fullmatch(part):
            segments.append(None)
        elif "{" in part or "}" in part or "*" in part:
            raise ValueError(
                f"route {text!r}: a parameter fills a whole segment ('/agents/{{name}}'), and '**' is the last segment"
            )
        elif part in (".", ".."):
            raise ValueError(f"route {text!r} has a dot segment; write the path that it means")
        else:
            segments.append(part)
    return Route(method, tuple(segments), tail)


class _Rule(NamedTuple):
    rank: tuple[int, ...]
    method: str | None
    table: int
    setting: Any


class _Node:
    """Routes as written: one step per segment."""

    __slots__ = ("ends", "literals", "parameter", "tails")

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.ends: list[_Rule] = []
        self.tails: list[_Rule] = []


class _State:
    """All routes that a path may still match, and what they say if the path ends here."""

    __slots__ = ("any_method", "by_method", "literals", "other")

    def __init__(self) -> None:
        self.literals: dict[str, _State] = {}
        self.other: _State = self
        self.any_method: Settings = _NOTHING
        self.by_method: dict[str, Settings] = {}


class RouteMatcher:
    """Answers for every table at once: `match(method, path)` maps a table's number to its setting.

    matcher = RouteMatcher({1: {"GET /v7/**": "read"}, 2: {"/v7/agents/{name}": 5}})
    matcher.match("HEAD", "/v7/agents/x")    # {1: "read", 2: 5}

    `folds`: `/A` is `/a` (default False), for applications whose router takes one for the other.
    """

    __slots__ = ("_folds", "_start")

    def __init__(self, tables: Mapping[int, Mapping[str, Any]], *, folds: bool = False) -> None:
        self._folds = folds
        root = _Node()
        for table, rules in tables.items():
            seen: dict[Route, str] = {}
            for text, setting in rules.items():
                route = parse_route(text)
                if folds:
                    segments = tuple(None if segment is None else segment.lower() for segment in route.segments)
                    route = route._replace(segments=segments)
                if route in seen:
                    raise ValueError(f"routes {seen[route]!r} and {text!r} are the same route; keep one of them")
                seen[route] = text
                node = root
                for segment in route.segments:
                    if segment is None:
                        node.parameter = node.parameter or _Node()
                        node = node.parameter
                    else:
                        node = node.literals.setdefault(segment, _Node())
                rule = _Rule(route.rank, route.method, table, setting)
                (node.tails if route.tail else node.ends).append(rule)
        self._start = _compile((root,), (), {})

    def match(self, method: str, path: str) -> Settings:
        if path[-1:] == "\n":
            # `$` in a regular expression, with which Starlette ends every route, matches in front of it.
            path = path[:-1]
        if ("/." in path or path[:1] == ".") and has_dot_segment(path):
            return _NOTHING
        if self._folds:
            path = path.lower()
        state = self._start
        for segment in path.split("/"):
            if segment:
                state = state.literals.get(segment, state.other)
        found = state.by_method.get(method)
        if found is None:
            found = state.any_method if method.isupper() else state.by_method.get(method.upper(), state.any_method)
        return found


def _compile(nodes: tuple[_Node, ...], tails: tuple[_Rule, ...], known: dict[Any, _State]) -> _State:
    """The state for a path that has led to `nodes`, with the `**` rules met on the way."""
    tails = (*tails, *(rule for node in nodes for rule in node.tails))
    key = (tuple(map(id, nodes)), tuple(map(id, tails)))
    if key in known:
        return known[key]
    state = known[key] = _State()
    _settle(state, [*tails, *(rule for node in nodes for rule in node.ends)])
    parameters = tuple(node.parameter for node in nodes if node.parameter is not None)
    if parameters or tails:
        state.other = _compile(parameters, tails, known)
    else:
        state.other = known.setdefault("dead", _State())
    for segment in {segment for node in nodes for segment in node.literals}:
        literal = tuple(node.literals[segment] for node in nodes if segment in node.literals)
        state.literals[segment] = _compile((*literal, *parameters), tails, known)
    return state


def _settle(state: _State, rules: list[_Rule]) -> None:
    """Decide now, for every method, which rule of each table wins when a path ends here."""
    if not rules:
        return
    methods = {rule.method for rule in rules if rule.method is not None}
    if "GET" in methods:
        methods.add("HEAD")
    state.any_method = _best(rules, None)
    state.by_method = {method: _best(rules, method) for method in methods}


def _best(rules: Iterable[_Rule], method: str | None) -> Settings:
    best: dict[int, tuple[tuple[tuple[int, ...], int], Any]] = {}
    for rule in rules:
        if rule.method is None:
            fit = 0
        elif rule.method == method:
            fit = 2
        elif rule.method == "GET" and method == "HEAD":
            fit = 1
        else:
            continue
        strength = (rule.rank, fit)
        if rule.table not in best or strength > best[rule.table][0]:
            best[rule.table] = (strength, rule.setting)
    return {table: setting for table, (_, setting) in best.items()}

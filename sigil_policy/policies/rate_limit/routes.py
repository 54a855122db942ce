"""What the tables of `RateLimit` say about one route, together."""

from collections.abc import Mapping, Sequence
from typing import Any

from sigil_policy.core.routing import RouteMatcher, parse_route
from sigil_policy.policies.rate_limit.counted import RouteLimit
from sigil_policy.policies.rate_limit.tokens import TokenRule


class RouteRule:
    """`cost` in requests (None: 1, as nobody said another), the rule for `tokens`, and what each caller may do on this
    route alone."""

    __slots__ = ("cost", "limit", "said", "tokens")

    def __init__(self, cost: int | None, tokens: TokenRule | None = None, limit: RouteLimit | None = None) -> None:
        self.cost = 1 if cost is None else cost
        self.said = cost is not None
        self.tokens = tokens
        self.limit = limit


EXEMPT = RouteRule(0)
PLAIN = RouteRule(None)


def route_rules(
    costs: Mapping[str, int], tokens: Mapping[str, TokenRule], limits: Mapping[str, Any], exempt: Sequence[str]
) -> Mapping[str, RouteRule]:
    """One table of all: for each route that is named in any, what the most specific rules say there."""
    named = (*costs, *limits, *tokens, *exempt)
    kinds = {route: route in exempt for route in named}
    matcher = RouteMatcher({0: costs, 1: tokens, 2: kinds, 3: limits})
    parsed = [parse_route(route) for route in named]
    methods = {route.method for route in parsed} - {None}
    deepest = max((len(route.segments) for route in parsed), default=0)
    table: dict[str, RouteRule] = {}
    for route in parsed:
        path = "/" + "/".join("{_}" if segment is None else segment for segment in route.segments)
        # A path that only rules match that cover the whole route.
        probe = path + "/**" * (deepest + 1 if route.tail else 0)
        for method in {route.method} if route.method else {None, *methods}:
            found = matcher.match(method or "", probe)
            rule = EXEMPT if found.get(2) else RouteRule(found.get(0), found.get(1), found.get(3))
            table[(f"{method} " if method else "") + path.rstrip("/") + ("/**" if route.tail else "") or "/"] = rule
    return table

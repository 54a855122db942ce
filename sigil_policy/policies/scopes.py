"""Decides who may call which route: the public ones, the authenticated ones, and the scopes that the others take.

    Scopes(
        routes={
            "GET /v7/agents": "agents:read",
            "POST /v7/agents": "agents:write",
            "POST /v7/agents/{name}/run": AllOf("agents:read", "agents:execute"),
            "/v7/memory/**": AnyOf("memory:read", "memory:write"),
        },
        public=["GET /health"],
    )

A route that is not listed takes an authenticated caller, and no scope: what was forgotten is closed. Public routes are
listed; CORS preflights pass, because a browser sends them without credentials, and nothing else does. Anybody can send
what looks like one: where the application does more with `OPTIONS` than answer it, a rule that names that method
(`"OPTIONS /v7/jobs": "jobs:read"`) takes the preflights of the route too. A path with a dot segment is refused with
400, except to the superscope: nobody can tell what the application makes of it. Nobody gets 401 with every challenge
that the auth policies outside offered, somebody with too few scopes 403 `insufficient_scope`, with what is required.
Scopes are compared exactly, in any order.

Goes inside `BearerAuth` and `ApiKeyAuth`, outside `RateLimit` and whatever works on behalf of the caller. RFC 6750
section 3.1, RFC 6749 section 3.3.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from sigil_policy.core.catalogue import CREDENTIALS_MISSING, SCOPE_INSUFFICIENT, http_problem
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal, Public
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.routing import has_dot_segment, parse_route
from sigil_policy.identity.challenges import Challenges, challenge_line, is_preflight
from sigil_policy.identity.fields import Scope
from sigil_policy.wire.authorization import challenge, is_scope_token, split_scopes

_DEFAULT_CHALLENGE = (challenge_line("Bearer", "api"),)


class _ScopeSet:
    """Scopes named by a rule, in the order in which they were written."""

    __slots__ = ("_known", "scopes")

    def __init__(self, *scopes: str) -> None:
        for scope in scopes:
            if not isinstance(scope, str) or not is_scope_token(scope):
                raise ValueError(
                    f"scope {scope!r} must be printable ASCII without space, quote and backslash, for example "
                    "'agents:read' (RFC 6749 section 3.3); write several scopes as a list"
                )
        self.scopes = tuple(dict.fromkeys(scopes))
        self._known = frozenset(scopes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.scopes))})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, _ScopeSet) and other._known == self._known

    def __hash__(self) -> int:
        return hash((type(self), self._known))


class AllOf(_ScopeSet):
    """Every one of these scopes: `AllOf("agents:read", "agents:execute")`. `AllOf()` takes none, but a caller."""

    __slots__ = ()

    def allows(self, held: frozenset[str]) -> bool:
        return self._known <= held

    def missing(self, held: frozenset[str]) -> list[str]:
        return [scope for scope in self.scopes if scope not in held]


class AnyOf(_ScopeSet):
    """At least one of these scopes: `AnyOf("memory:read", "memory:write")`."""

    __slots__ = ()

    def __init__(self, *scopes: str) -> None:
        if not scopes:
            raise ValueError("AnyOf() without a scope lets nobody pass; name at least one")
        super().__init__(*scopes)

    def allows(self, held: frozenset[str]) -> bool:
        return not self._known.isdisjoint(held)

    def missing(self, held: frozenset[str]) -> list[str]:
        return list(self.scopes)


class Scopes(Policy):
    """Callers reach only the routes that are public, or that their scopes open.

        Scopes(routes={"GET /v7/agents": "agents:read"}, public=["GET /health"])

    Answers 401 `AUTH_001` to nobody, 403 `AUTH_004` with `required_scopes` and `missing_scopes` to somebody with too
    few scopes, and 400 `REQ_400` to a path with a dot segment. Gives `Public` on public routes. Raises
    `ValidationError` (a `ValueError`) for a scope that cannot be one, a route that is none, and a route that is both
    public and not.
    """

    needs: ClassVar[tuple[type, ...]] = (Principal,)
    gives: ClassVar[tuple[type, ...]] = (Public,)

    routes: Mapping[str, str | AllOf | AnyOf | Sequence[str]] = Field(default_factory=dict)
    """From route to what it takes: one scope, several separated by spaces or as a list (all of them), `AllOf(...)` or
    `AnyOf(...)` (default: no route takes a scope). `[]` takes a caller, but no scope. The most specific route holds."""

    public: Listed[str] = ()
    """Routes that anybody may call (default: none)."""

    superscope: Scope | None = "admin"
    """The scope that opens every route; `request.auth` then has all scopes (default `"admin"`; None: no such scope)."""

    @field_validator("routes", mode="before")
    @classmethod
    def _requirements(cls, routes: Any) -> Any:
        if not isinstance(routes, Mapping):
            return routes
        return {route: _requirement(route, value) for route, value in routes.items()}

    @model_validator(mode="after")
    def _prepare(self) -> "Scopes":
        _ = self._table, self._preflights_too
        return self

    @cached_property
    def _table(self) -> Mapping[str, AllOf | AnyOf | Public]:
        # One requirement may stand for several routes, and must not speak for all of them: see `_preflights_too`.
        table: dict[str, Any] = {route: copy(rule) for route, rule in self.routes.items()}
        owners = {parse_route(route): route for route in self.routes}
        for route in self.public:
            owner = owners.get(parse_route(route))
            if owner is not None:
                raise ValueError(
                    f"route {route!r} is public, and routes= has a rule for it ({owner!r}); keep one of them"
                )
            table[route] = Public(route)
        return table

    @cached_property
    def _preflights_too(self) -> frozenset[int]:
        """The requirements of routes that name `OPTIONS`, by identity: each is in the table for itself."""
        return frozenset(id(rule) for route, rule in self._table.items() if parse_route(route).method == "OPTIONS")

    def rules(self) -> Mapping[str, AllOf | AnyOf | Public]:
        return self._table

    def on_request(self, ex: Exchange) -> Problem | None:
        rule: AllOf | AnyOf | Public | None = ex.rule(self)
        principal = ex.principal
        everything = principal is not None and self.superscope in principal.scopes
        if everything:
            ex.grant_all()
        if isinstance(rule, Public):
            ex.give(rule)
            return None
        if principal is None:
            return None if is_preflight(ex) and id(rule) not in self._preflights_too else self._unknown(ex)
        if everything:
            return None
        if rule is None:
            # No rule covers such a path (see `core.routing`), but an application that resolves it would serve
            # `/admin/./x`, or `/open/../admin/x`, as what a rule is there for.
            return _dot_segment() if has_dot_segment(ex.path) else None
        if rule.allows(principal.scopes):
            return None
        return self._forbidden(principal, rule)

    def _unknown(self, ex: Exchange) -> Problem:
        offered = ex.get(Challenges)
        # No error code: who sent no credential made no mistake (RFC 6750 section 3.1).
        return CREDENTIALS_MISSING(
            "This route takes an authenticated caller",
            headers=_DEFAULT_CHALLENGE if offered is None else offered.lines,
        )

    def _forbidden(self, principal: Principal, rule: AllOf | AnyOf) -> Problem:
        line = challenge("Bearer", realm=principal.realm, error="insufficient_scope", scope=rule.scopes)
        which = (
            "one of the scopes" if isinstance(rule, AnyOf) else "the scopes" if len(rule.scopes) > 1 else "the scope"
        )
        return SCOPE_INSUFFICIENT(
            f"This route takes {which} {', '.join(rule.scopes)}",
            headers=((b"www-authenticate", line),),
            required_scopes=list(rule.scopes),
            missing_scopes=rule.missing(principal.scopes),
        )


def _dot_segment() -> Problem:
    return http_problem(400)("The path has a dot segment; ask for the path that it means (RFC 3986 section 5.2.4)")


def _requirement(route: object, value: Any) -> AllOf | AnyOf:
    if isinstance(value, AllOf | AnyOf):
        return value
    scopes = split_scopes(value) if isinstance(value, str) else value
    if not isinstance(scopes, Sequence) or (isinstance(value, str) and not scopes):
        raise ValueError(
            f"route {route!r} takes a scope, a list of scopes, AllOf(...) or AnyOf(...); [] stands for any caller"
        )
    try:
        return AllOf(*scopes)
    except ValueError as error:
        raise ValueError(f"route {route!r}: {error}") from None

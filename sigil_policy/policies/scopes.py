"""Decides who may call which route: the public ones, the authenticated ones, and the scopes that the others take.

    Scopes(
        routes={
            "GET /v7/agents": "agents:read",
            "POST /v7/agents": "agents:write",
            "POST /v7/agents/{name}/run": AllOf("agents:read", "agents:execute"),
            "/v7/memory/**": AnyOf("memory:read", "memory:write"),
            "GET /v7/usage": FromIssuer("https://auth.example.com", scopes="usage") | FromApiKey("usage"),
            "POST /v7/payouts": FromIssuer("https://auth.example.com", scopes="pay") & FromApiKey(),
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

Who vouches for the caller is said with `FromIssuer` and `FromApiKey`; `|` takes one of two requirements, `&` both, and
`sigil_policy.identity.requirements` says what holds. Two credentials in one request pass the policies outside only with
`conflicts_with=None` on both of them; then the outer one's caller acts, and the other one's cosigns. For such a route

* 401 asks for a credential that was not presented and could help, with the challenges of the policies that saw none
  (of those that let a second one through; else with that of `Bearer`);
* 403 `insufficient_scope` says which scopes are missing where the credentials are right, of the first way that scopes
  would open;
* 403 `REQ_403` says only that others have to vouch: another issuer, another kind, or one subject for both;
* the superscope opens what its own credential's scopes would; it replaces no issuer, and no second credential.

Goes inside `BearerAuth` and `ApiKeyAuth`, outside `RateLimit` and whatever works on behalf of the caller. RFC 6750
section 3.1, RFC 6749 section 3.3.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, ClassVar

import structlog
from pydantic import Field, field_validator, model_validator

from sigil_policy.core.catalogue import CREDENTIALS_MISSING, SCOPE_INSUFFICIENT, http_problem
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal, Public
from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.routing import has_dot_segment, parse_route
from sigil_policy.identity.challenges import Challenges, challenge_line, is_preflight, token_scheme
from sigil_policy.identity.fields import Scope
from sigil_policy.identity.requirements import (
    AllOf,
    AnyOf,
    Case,
    Lack,
    Requirement,
    Standing,
    scopes_of,
)
from sigil_policy.wire.authorization import challenge

logger = structlog.get_logger("sigil_policy")

__all__ = ["AllOf", "AnyOf", "Scopes"]

_DEFAULT_CHALLENGE = (challenge_line("Bearer", "api"),)
# What takes nothing but scopes of the caller.
_SCOPES_ALONE = frozenset((AllOf, AnyOf, type(None)))


class Scopes(Policy):
    """Callers reach only the routes that are public, or that their scopes open.

        Scopes(routes={"GET /v7/agents": "agents:read"}, public=["GET /health"])

    Answers 401 `AUTH_001` to nobody, 403 `AUTH_004` with `required_scopes` and `missing_scopes` to somebody with too
    few scopes, 401 `AUTH_001` or 403 `REQ_403` to somebody for whom others have to vouch, and 400 `REQ_400` to a path
    with a dot segment. Gives `Public` on public routes. Raises `ValidationError` (a `ValueError`) for a scope that
    cannot be one, a route that is none, and a route that is both public and not.
    """

    needs: ClassVar[tuple[type, ...]] = (Principal,)
    gives: ClassVar[tuple[type, ...]] = (Public,)
    marks: ClassVar[frozenset[str]] = frozenset(("scopes", "any_scope", "public"))

    routes: Mapping[str, str | Requirement | Sequence[str]] = Field(default_factory=dict)
    """From route to what it takes: one scope, several separated by spaces or as a list (all of them), `AllOf(...)`,
    `AnyOf(...)`, or who has to vouch: `FromIssuer(...)`, `FromApiKey(...)`, with `&` and `|` (default: no route takes a
    scope). `[]` takes a caller, but no scope. The most specific route holds."""

    public: Listed[str] = ()
    """Routes that anybody may call (default: none)."""

    superscope: Scope | None = "admin"
    """The scope that opens every route, as far as scopes open it; `request.auth` then has all scopes (default
    `"admin"`; None: no such scope)."""

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
    def _table(self) -> Mapping[str, Requirement | Public]:
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

    def rules(self) -> Mapping[str, Requirement | Public]:
        return self._table

    def marked(self, marks: Marks, rule: Any, resolution: Resolution) -> Any:
        said: Requirement | Public | None = None
        if marks.public:
            said = Public(resolution.template or "")
        elif marks.any_scope is not None:
            said = AnyOf(*marks.any_scope)
        elif marks.scopes is not None:
            said = AllOf(*marks.scopes)
        if rule is None:
            return said
        if isinstance(said, Requirement) and said != rule:
            # The table holds, and who wrote `/v7/**` may not have meant what is marked below it: said once for each.
            logger.warning("scopes_mark_overridden", route=resolution.name, mark=str(said), table=str(rule))
        return rule

    def describe(self, operation: Operation, rule: Requirement | Public | None) -> None:
        if isinstance(rule, Public):
            operation.public = True
            return
        operation.requires = rule = AllOf() if rule is None else rule
        operation.answers(CREDENTIALS_MISSING, headers=("WWW-Authenticate",))
        if rule != AllOf():
            operation.answers(
                SCOPE_INSUFFICIENT, headers=("WWW-Authenticate",), required_scopes=["a"], missing_scopes=["a"]
            )
        if type(rule) not in _SCOPES_ALONE:
            operation.answers(http_problem(403))
        if "{" in operation.path:
            operation.answers(http_problem(400))  # a dot segment

    def on_request(self, ex: Exchange) -> Problem | None:
        rule: Requirement | Public | None = ex.rule(self)
        principal = ex.principal
        everything = principal is not None and self.superscope in principal.scopes
        if everything:
            ex.grant_all()
        if isinstance(rule, Public):
            ex.give(rule)
            return None
        if principal is None:
            return None if is_preflight(ex) and id(rule) not in self._preflights_too else self._unknown(ex)
        if everything and type(rule) in _SCOPES_ALONE:
            return None
        if rule is None:
            # No rule covers such a path (see `core.routing`), but an application that resolves it would serve
            # `/admin/./x`, or `/open/../admin/x`, as what a rule is there for.
            return _dot_segment() if has_dot_segment(ex.path) else None
        if rule.allows(principal.scopes):
            return None
        return self._judge(ex, rule)

    def _judge(self, ex: Exchange, rule: Requirement) -> Problem | None:
        """The answer to a caller for whom scopes alone did not decide."""
        case = Case(ex.principals, self.superscope)
        standing = rule.standing(case)
        if standing is Standing.HELD:
            return None
        if standing is Standing.LACKING:
            return self._forbidden(ex, rule.lacks(case))
        if standing is Standing.ABSENT:
            return self._unknown(ex, "This route takes another credential, or a further one")
        # Whose would do is not told: it would help only who looks for a way in.
        return http_problem(403)("This route takes a caller for whom others vouch")

    def _unknown(self, ex: Exchange, detail: str = "This route takes an authenticated caller") -> Problem:
        offered = ex.get(Challenges)
        # No error code: who sent no credential made no mistake (RFC 6750 section 3.1).
        return CREDENTIALS_MISSING(
            detail,
            headers=_DEFAULT_CHALLENGE if offered is None else offered.lines,
        )

    def _forbidden(self, ex: Exchange, lacks: list[Lack]) -> Problem:
        required = list(dict.fromkeys(scope for lack in lacks for scope in lack.scopes.scopes))
        missing = (scope for lack in lacks for scope in lack.scopes.missing(lack.principal.scopes))
        line = challenge(token_scheme(ex), realm=lacks[0].principal.realm, error="insufficient_scope", scope=required)
        return SCOPE_INSUFFICIENT(
            f"This route takes {' and '.join(dict.fromkeys(map(str, lacks)))}",
            headers=((b"www-authenticate", line),),
            required_scopes=required,
            missing_scopes=list(dict.fromkeys(missing)),
        )


def _dot_segment() -> Problem:
    return http_problem(400)("The path has a dot segment; ask for the path that it means (RFC 3986 section 5.2.4)")


def _requirement(route: object, value: Any) -> Requirement:
    return value if isinstance(value, Requirement) else scopes_of(value, f"route {route!r}")

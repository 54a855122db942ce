"""Whom a request is counted for, and by which plan: what the options of `RateLimit` say, before there is a request."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import structlog

from sigil_policy.core.exchange import Exchange
from sigil_policy.identity.callers import LONG, Addresses, bounded, by_address, by_principal, own
from sigil_policy.policies.rate_limit.fields import Face
from sigil_policy.policies.rate_limit.tiers import Tier, tier
from sigil_policy.stores.limits import LimitStore, Plan

if TYPE_CHECKING:
    from sigil_policy.policies.rate_limit.policy import RateLimit

logger = structlog.get_logger("sigil_policy")

ROUTE = "route"
"""What limits of a route alone are called in headers, where a level has its name."""

_MOST_NAMED = 100  # unknown tiers that are logged: a token may name any

RouteLimit = tuple[str, Tier, Plan]
"""A limit of one route: the route's name, and what each caller may do there."""


class Counted:
    """The faces of a policy, by tier and by the levels above a caller; `store` counts them all."""

    def __init__(self, limits: "RateLimit", store: LimitStore) -> None:
        self._store = store
        self._name = limits.name
        self._prefix = "" if limits.name is None else f"{limits.name} "
        self._planned = partial(Plan, algorithm=limits.algorithm, lease=limits.lease, lapsed=limits.lapsed)
        self._face_options: dict[str, Any] = {
            "headline": limits.headline,
            "x_headers": limits.x_headers,
            "drafted": limits.draft is not None,
        }
        self._key = limits.key
        self._own_key = limits.key not in (by_principal, by_address)
        self._address = Addresses(limits.trusted_proxies, limits.ipv6_prefix)
        self._levels = limits.levels
        tiers = cast("Mapping[str, Tier]", limits.tiers)
        # By tier; under None that of anonymous callers.
        self.faces: dict[str | None, Face] = {name: self._single(name, tiers[name]) for name in tiers}
        self.faces[None] = self._single(limits.anonymous_tier, tiers[limits.anonymous_tier], anonymous=True)
        self._default = limits.default_tier
        self._unknown: set[str | None] = set()
        # For each level its plans by row; the first row is for tiers that are not in the table.
        self._level_plans = [
            {name: self._plan(name, row, f"@{level.name} {name}") for name, row in level.rows.items()}
            for level in limits.levels
        ]
        # As they turn up: at most one for each combination of rows.
        self._combined: dict[tuple[Any, ...], Face] = {}
        self.budgeted = (
            any(face.budgets for face in self.faces.values())
            or any(plan.tokens for rows in self._level_plans for plan in rows.values())
            or any(window.unit != "requests" for row in limits.limits.values() for window in tier(row).windows)
        )

    def prepare(self) -> None:
        """Tell the store which plans it will count."""
        for face in self.faces.values():
            self._store.prepare(face.plan)
        for rows in self._level_plans:
            for plan in rows.values():
                self._store.prepare(plan)

    def route_limit(self, name: str, limits: Tier | str) -> RouteLimit:
        """`limits`, for each caller on the route `name` alone."""
        row = tier(limits)
        plan = self._plan(ROUTE, row, f"@{ROUTE} {name}")
        self._store.prepare(plan)
        return name, row, plan

    def by(self, ex: Exchange, limit: RouteLimit | None) -> tuple[Face, Any]:
        """The face, and the name under which the caller is counted; with levels or a `limit`, their names."""
        principal = ex.principal
        face = self.faces.get(None if principal is None else principal.tier)
        if face is None or (principal is not None and principal.tier is None):
            face = self._unnamed(principal.tier if principal is not None else None)
        name = self._key(ex)
        if name is None:
            name = self._address(ex)
        elif self._own_key:
            name = own(name)
        elif len(name) > LONG:
            name = bounded(name)
        if self._name is not None:
            name = f"{self._name} {name}"
        return self._levelled(ex, face, name, limit) if self._levels or limit is not None else (face, name)

    def _plan(self, name: str, row: Tier, overflow: str, *, anonymous: bool = False) -> Plan:
        named = f"{self._prefix}overflow {overflow}"
        return self._planned(name=name, windows=row.windows, anonymous=anonymous, overflow=named)

    def _single(self, name: str, row: Tier, *, anonymous: bool = False) -> Face:
        plan = self._plan(name, row, "anonymous" if anonymous else name, anonymous=anonymous)
        return self._face(plan, [(plan, "")])

    def _face(self, plan: Plan, levels: Iterable[tuple[Plan, str]]) -> Face:
        prefix = "" if self._name is None else f"{self._name}-"
        levels = list(levels)
        names = [f"{prefix}{level}{window.name}" for part, level in levels for window in part.requests]
        names += [f"{prefix}{level}{window.name}" for part, level in levels for window in part.tokens]
        return Face(plan, self._store, names, **self._face_options)

    def _unnamed(self, name: str | None) -> Face:
        """For a principal without a tier, or with one that is not in the table."""
        unknown = self._unknown
        if name not in unknown and len(unknown) < _MOST_NAMED:
            unknown.add(name)
            logger.warning("rate_limit_tier_unknown", tier=None if name is None else name[:64], used=self._default)
        return self.faces[self._default]

    def _levelled(self, ex: Exchange, face: Face, name: str, limit: RouteLimit | None) -> tuple[Face, Any]:
        """With what holds for the caller on this route alone, and with the levels above."""
        keys = [name]
        rows: list[Any] = [face]
        if limit is not None:
            rows.append((ROUTE, limit[2]))
            keys.append(f"{self._prefix}@{ROUTE} {bounded(f'{len(limit[0])} {limit[0]} {name}')}")
        for level, plans in zip(self._levels, self._level_plans, strict=True):
            shared = level.key(ex)
            if shared is None:
                continue
            named = level.tier(ex) if level.tier is not None else ex.principal.tier if ex.principal else None
            row = named if isinstance(named, str) and named in plans else next(iter(plans))
            rows.append((level.name, plans[row]))
            # No caller's name begins like that: neither an address nor a principal nor a key of the application.
            keys.append(f"{self._prefix}@{level.name} {bounded(shared)}")
        if len(keys) == 1:
            return face, name
        combined = tuple(rows)
        known = self._combined.get(combined)
        if known is None:
            parts = [(face.plan, ""), *((plan, f"{name}-") for name, plan in rows[1:])]
            plan = Plan(name=face.plan.name, levels=tuple(part for part, _ in parts))
            self._store.prepare(plan)
            known = self._combined[combined] = self._face(plan, parts)
        return known, tuple(keys)

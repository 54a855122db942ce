"""Tiered limits on requests and language-model tokens, decided together.

    app.add_middleware(PolicyStack, policies=[RequestID(), Problems(), BearerAuth(...), Scopes(...), RateLimit(
        tiers={"free": Tier(requests="1/second;20/minute;100/hour", tokens="10000/minute"), "pro": "50/second"},
        costs={"POST /v7/memory/search": 2},
        tokens={"POST /v7/agents/{name}/run": TokenRule(estimate=1_500)},
        exempt=["GET /health"],
    )])

    HTTP/1.1 200 OK                                     HTTP/1.1 429 Too Many Requests
    X-RateLimit-Limit: 20                               X-RateLimit-Limit: 1
    X-RateLimit-Remaining: 19                           X-RateLimit-Remaining: 0
    X-RateLimit-Reset: 1704978000                       X-RateLimit-Reset: 1704977968
    X-RateLimit-Window: 60                              X-RateLimit-Window: 1
    RateLimit-Policy: "second";q=1;w=1, "minute"...     Retry-After: 1
    RateLimit: "second";r=0;t=1, "minute";r=19...       {"error_code": "RATE_001", "limit": 1, "window": 1, ...}
    X-Tokens-Used: 640
    X-Tokens-Remaining: 9360

What it guarantees:

* All windows and the token budget of a caller are one decision: a refused request consumes nothing anywhere.
* What each algorithm promises is written in `sigil_policy.stores.memory`: "fixed" (default) aligned windows,
  "sliding" never more than the limit in any interval, "gcra" a smooth flow.
* Tokens are reserved before and settled once, however the exchange ends. What was reported is charged. Where nothing
  was reported, nothing is charged if nothing was produced (no byte of a 2xx response went out), else the estimate.
  A report after the settlement is charged as well.
* A request whose estimate is above the budget of its tier is refused for good: 422, not 429.
* A caller is the principal, else the client's address (IPv6: its /64), read from `X-Forwarded-For` only behind
  `trusted_proxies`. Nobody can evict a counter by coming under many names.
* Public routes (see `Scopes`), exempt routes and CORS preflights are neither counted nor given headers.
* Fields that the application or a policy inside has set are kept: members of `RateLimit` and `RateLimit-Policy` are
  appended, and `X-RateLimit-*` is never doubled: it describes what leaves the caller fewer requests.

Place it inside the authentication and `Scopes`. One more outside of them, `RateLimit(name="address", key=by_address)`,
bounds what callers without a valid credential may try; what an inner policy refuses has counted in the outer one.
Counted in this process unless a `store` says otherwise. A WebSocket counts as one request: its handshake.

draft-ietf-httpapi-ratelimit-headers-11; RFC 6585 section 4; API guidelines, "Rate Limiting" and "Token Budget
Management".
"""

import json
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cached_property, partial
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network
from math import ceil
from threading import Lock
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import limits as limit_strings
import structlog
from anyio import move_on_after
from cachetools import LRUCache
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass

from sigil_policy.core.catalogue import BUDGET_EXCEEDED, BUDGET_TOO_SMALL, RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal, Public, Quota, TokenUsage, WindowState
from sigil_policy.core.policy import Answer, Closable, Listed, Policy
from sigil_policy.core.problems import Problem, Reply
from sigil_policy.core.routing import RouteMatcher, parse_route
from sigil_policy.stores.limits import Algorithm, Decision, Lease, LimitStore, Plan, Unit, Window
from sigil_policy.stores.memory import memory_limits
from sigil_policy.wire.forwarded import address_key, client_address
from sigil_policy.wire.ratelimit import limit_template, member_names, policy_field
from sigil_policy.wire.structured import sf_string

logger = structlog.get_logger("sigil_policy")

Pair = tuple[bytes, bytes]
Key = Callable[[Exchange], str | None]
Estimate = Callable[[Exchange], int | Awaitable[int | None] | None]

USAGE_PATHS = ("metadata.tokens_used.total_tokens", "usage.total_tokens")

_CONFIG = ConfigDict(extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)
_LARGEST = 999_999_999_999_999
_LONG_KEY = 256
_TAIL = 8_192
_ROUNDING = 1e-6
_PATIENCE = 1.0  # seconds that a response waits for a store to settle
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_X_FIELDS = (b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset", b"x-ratelimit-window")
_FIELDS = frozenset((*_X_FIELDS, b"ratelimit", b"ratelimit-policy"))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def by_principal(ex: Exchange) -> str | None:
    """Counts per authenticated caller; who is anonymous counts by address."""
    principal = ex.principal
    return None if principal is None else principal.key


def by_address(ex: Exchange) -> str | None:
    """Counts per client address, whoever calls. The only key that may stand outside the authentication."""
    return None


@validated_dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Tier:
    """What the callers of one tier may do.

        Tier(requests="1/second;20/minute;100/hour", tokens="10000/minute")
        Tier(requests="5 per 15 minutes", tokens=2_000_000)

    Options:
        requests: limits in the notation of `limits` (default None: requests are not limited).
        tokens: the same for tokens, or a number of tokens per minute (default None: no budget).

    Each needs windows of different lengths. Raises `ValueError` for what cannot be read, and for a limit of 0.
    """

    requests: str | None = None
    tokens: str | int | None = None

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if not self.windows:
            raise ValueError(
                'a tier needs limits: write Tier(requests="20/minute"), Tier(tokens="10000/minute") or both'
            )
        return self

    @property
    def windows(self) -> tuple[Window, ...]:
        tokens = f"{self.tokens}/minute" if isinstance(self.tokens, int) else self.tokens
        return (*_windows(self.requests, "requests"), *_windows(tokens, "tokens"))


def _windows(text: str | None, unit: Unit) -> Iterable[Window]:
    if text is None:
        return
    try:
        parsed = limit_strings.parse_many(text)
    except ValueError:
        raise ValueError(f"limits {text!r} must be like '10/second;100/minute' or '5 per 15 minutes'") from None
    lengths = set()
    for item in sorted(parsed, key=lambda item: item.get_expiry()):
        seconds = item.get_expiry()
        if not 1 <= item.amount <= _LARGEST or seconds < 1:
            raise ValueError(f"limits {text!r}: a limit is 1 to {_LARGEST} in at least one second")
        if seconds in lengths:
            raise ValueError(f"limits {text!r}: two limits for {seconds} seconds; keep the smaller one")
        lengths.add(seconds)
        length = item.GRANULARITY.name if item.multiples == 1 else f"{item.multiples}-{item.GRANULARITY.name}s"
        yield Window(item.amount, seconds, unit, length if unit == "requests" else f"tokens-{length}")


GUIDELINE_TIERS: Mapping[str, Tier] = MappingProxyType(
    {
        "free": Tier(requests="1/second;20/minute;100/hour", tokens=10_000),
        "standard": Tier(requests="10/second;100/minute;1000/hour", tokens=100_000),
        "pro": Tier(requests="50/second;500/minute;5000/hour", tokens=500_000),
        "enterprise": Tier(requests="200/second;2000/minute;20000/hour", tokens=2_000_000),
    }
)
"""The table of the API guidelines, "Rate Limit Tiers"."""


@validated_dataclass(frozen=True, kw_only=True, config=_CONFIG)
class TokenRule:
    """A route that spends language-model tokens.

        TokenRule(estimate=1_500)
        TokenRule(estimate=by_max_tokens)    # def by_max_tokens(ex): ..., may be async and read `await ex.body(limit)`

    Options:
        estimate: tokens to reserve: a number, or a function from the exchange to one, which may be async. None
            (default, also as an answer): none are reserved, and requests are refused once nothing remains.
        usage: where a JSON response, or an event of a stream of server-sent events, tells what was used, as paths of
            member names (default: "metadata.tokens_used.total_tokens", "usage.total_tokens"). Asked only when the
            application did not `report_tokens`.
    """

    estimate: int | Estimate | None = None
    usage: Listed[str] = USAGE_PATHS

    @field_validator("estimate")
    @classmethod
    def _not_negative(cls, estimate: int | Estimate | None) -> int | Estimate | None:
        if isinstance(estimate, bool) or (isinstance(estimate, int) and not 0 <= estimate <= _LARGEST):
            raise ValueError(f"an estimate is a number of tokens from 0 to {_LARGEST}, a function, or None")
        return estimate

    @cached_property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(path.split(".")) for path in self.usage)


class _Rule:
    """What the tables say about one route."""

    __slots__ = ("cost", "tokens")

    def __init__(self, cost: int, tokens: TokenRule | None) -> None:
        self.cost = cost
        self.tokens = tokens


_EXEMPT = _Rule(0, None)


class _Spending:
    """The tokens of one exchange: `used` as far as it is known, `left` once it is settled."""

    __slots__ = ("lease", "left", "rule", "tail", "used")

    def __init__(self, lease: Lease, rule: TokenRule) -> None:
        self.lease = lease
        self.rule = rule
        self.used: int | None = None
        self.left: tuple[int, ...] | None = None
        self.tail: bytearray | None = None


class _Face:
    """A plan as clients see it: everything that can be encoded before there is a request."""

    def __init__(self, plan: Plan, policy: "RateLimit") -> None:
        self.plan = plan
        prefix = "" if policy.name is None else f"{policy.name}-"
        self.names = [prefix + window.name for window in plan.windows]
        self.units = [window.unit for window in plan.windows]
        self.limits = [window.limit for window in plan.windows]
        self.lengths = [window.seconds for window in plan.windows]
        self.fixed = list(zip(self.names, self.units, self.limits, self.lengths, strict=True))
        self.split = len(plan.requests)
        self.budget = min((window.limit for window in plan.tokens), default=None)
        headline = next(
            (i for i, w in enumerate(plan.requests) if w.name == (policy.headline or "minute")), self.split - 1
        )
        self.headline = headline if policy.x_headers and plan.requests else None
        self.x_headers = policy.x_headers
        self.drafted = policy.draft is not None
        self.limit_pairs = [(b"x-ratelimit-limit", b"%d" % limit) for limit in self.limits]
        self.length_pairs = [(b"x-ratelimit-window", b"%d" % seconds) for seconds in self.lengths]
        rows = zip(self.names, self.limits, self.lengths, self.units, strict=True)
        self.policy_pair = (
            b"ratelimit-policy",
            policy_field((n, limit, length, None if u == "requests" else u) for n, limit, length, u in rows),
        )
        self.template = limit_template(self.names)
        # Stores that align windows answer with one and the same tuple of resets for a while.
        self.known: tuple[Any, float, bytes, bytes] = (None, 0.0, b"", b"")

    def quoted(self, suffix: str) -> list[bytes]:
        """The names as they stand in the fields."""
        return [sf_string(name + suffix) for name in self.names]

    def pairs(self, decision: Decision, now: float, shown: int | None) -> list[Pair]:
        """The fields for `decision`, made at `now`; `shown` is the window that `X-RateLimit-*` describes."""
        remaining, resets = decision.remaining, decision.reset
        known, second, moment, template = self.known
        if resets is not known or not second <= now < second + 1 or shown != self.headline:
            moment = b"" if shown is None else b"%d" % ceil(resets[shown] - _ROUNDING)
            template = self.template % tuple([_seconds(reset - now) for reset in resets])
            if shown == self.headline:
                self.known = (resets, now // 1, moment, template)
        pairs = []
        if shown is not None:
            pairs = [
                self.limit_pairs[shown],
                (b"x-ratelimit-remaining", b"%d" % remaining[shown]),
                (b"x-ratelimit-reset", moment),
                self.length_pairs[shown],
            ]
        if self.drafted:
            pairs += [self.policy_pair, (b"ratelimit", template % remaining)]
        return pairs

    def windows(self, decision: Decision) -> tuple[WindowState, ...]:
        rows = zip(self.fixed, decision.remaining, decision.reset, strict=True)
        return tuple(WindowState(name, unit, limit, r, at, sec) for (name, unit, limit, sec), r, at in rows)

    def quota(self, decision: Decision) -> Quota:
        return Quota(self.plan.name, partial(self.windows, decision))


def _seconds(wait: float) -> int:
    """Whole seconds, never too few; a moment of time is exact to a quarter of a microsecond."""
    return max(ceil(wait - _ROUNDING), 0)


class RateLimit(Policy):
    """Limits the requests and tokens of each caller by tier; the module says what it guarantees.

        RateLimit()                                             # the guidelines' tiers
        RateLimit(tiers={"free": "10/second;100/minute"})
        RateLimit(name="address", key=by_address, tiers={"free": "600/minute"})

    Options:
        tiers: name to `Tier`, or to a string of request limits (default: the guidelines' free, standard, pro,
            enterprise).
        default_tier: for principals without a tier, or with one that is not in the table; logged once for each name
            (default "free").
        anonymous_tier: for callers without a principal (default "free").
        key: who counts as one caller: `by_principal` (default), `by_address`, or a function from the exchange to a
            name, or to None for the client's address. A principal's own name is `ex.principal.key`.
        costs: route to how many requests one request counts as (default 1). 0 counts nothing, and is never refused.
            One that is over a window's limit takes the whole window.
        tokens: route to `TokenRule`, or to an estimate. Only these routes are gated by the token windows.
        exempt: routes that are not counted. The most specific route of the three tables wins; where no rule covers
            the other, write the overlap out.
        trusted_proxies: networks of proxies, and "unix" for one on a unix socket, whose `X-Forwarded-For` is believed
            (default none). A server that rewrites the client's address itself needs none here.
        ipv6_prefix: bits of an IPv6 address that make one caller (default 64).
        headline: name of the window in `X-RateLimit-*` (default None: "minute", else the tier's longest). On 429 they
            describe the window that refused.
        algorithm: "fixed" (default), "sliding" or "gcra"; see `sigil_policy.stores.memory`.
        store: where the counters are (default None: a fresh one in this process). Policies that share one share the
            counters of a caller, unless they have different names.
        name: sets this policy apart: in front of its windows' names in headers, and of its counters in a shared store
            (default None).
        draft: 11 sends `RateLimit-Policy` and `RateLimit` as that draft writes them (default), None sends neither. The
            unit "tokens" is not registered there.
        x_headers: send `X-RateLimit-*` and `X-Tokens-*` (default True).
        on_redirects: send the fields on redirects too (default True); some clients wait before they follow.
        retry_spread: up to so many seconds, drawn at random, are added to `Retry-After`, so that refused callers do
            not all come back at once (default 0).
        usage_header: response header in which the application tells the tokens it used (default "X-Tokens-Used", which
            stays; any other name is taken off the response). None: no header is read.
        bound: bytes of a JSON response that is read for its usage (default 32768); over it only reports count.

    Raises `ValueError` for an unknown tier or headline, limits that cannot be read, an estimate that fits into no tier.
    """

    reads: ClassVar[tuple[type, ...]] = (Principal, Public)
    gives: ClassVar[tuple[type, ...]] = (Quota,)

    tiers: Mapping[str, Tier | str] = Field(default_factory=lambda: dict(GUIDELINE_TIERS))
    default_tier: str = "free"
    anonymous_tier: str = "free"
    key: Key = by_principal
    costs: Mapping[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    tokens: Mapping[str, TokenRule | Annotated[int, Field(ge=0, le=_LARGEST)]] = Field(default_factory=dict)
    exempt: Listed[str] = ()
    trusted_proxies: Listed[IPv4Network | IPv6Network | Literal["unix"]] = ()
    ipv6_prefix: Annotated[int, Field(ge=16, le=128)] = 64
    headline: str | None = None
    algorithm: Algorithm = "fixed"
    store: Any = None
    name: str | None = None
    draft: Literal[11] | None = 11
    x_headers: bool = True
    on_redirects: bool = True
    retry_spread: Annotated[int, Field(ge=0)] = 0
    usage_header: str | None = "X-Tokens-Used"
    bound: Annotated[int, Field(ge=0)] = 32_768  # type: ignore[misc]  # `Policy.bound` may be made a field

    @field_validator("tiers")
    @classmethod
    def _tiers_readable(cls, tiers: Mapping[str, Tier | str]) -> Mapping[str, Tier | str]:
        if not tiers:
            raise ValueError('tiers is empty; write at least tiers={"free": "20/minute"}')
        return {name: Tier(requests=tier) if isinstance(tier, str) else tier for name, tier in tiers.items()}

    @field_validator("name")
    @classmethod
    def _name_plain(cls, name: str | None) -> str | None:
        if name is not None and not _NAME.fullmatch(name):
            raise ValueError(f"name {name!r} must be letters, digits, '.', '_' and '-': it stands in response headers")
        return name

    @field_validator("trusted_proxies")
    @classmethod
    def _somebody_untrusted(cls, proxies: tuple[Any, ...]) -> tuple[Any, ...]:
        for proxy in proxies:
            if proxy != "unix" and proxy.prefixlen == 0:
                raise ValueError(
                    f"trusted_proxies has {proxy}, everybody: then each caller chooses its own address; "
                    "name the networks that the proxies are in"
                )
        return proxies

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        tiers = cast("Mapping[str, Tier]", self.tiers)
        for option in ("default_tier", "anonymous_tier"):
            if getattr(self, option) not in tiers:
                raise ValueError(
                    f"{option} {getattr(self, option)!r} is not in tiers ({', '.join(tiers)}); name one of them"
                )
        names = {window.name for tier in tiers.values() for window in tier.windows if window.unit == "requests"}
        if self.headline is not None and self.headline not in names:
            raise ValueError(
                f"headline {self.headline!r} is no request window of any tier ({', '.join(sorted(names))})"
            )
        budgets = [face.budget for face in self._faces.values() if face.budget is not None]
        if self.tokens and not budgets:
            raise ValueError("tokens has rules, but no tier has a token budget; write Tier(requests=..., tokens=...)")
        for route, rule in self.tokens.items():
            estimate = rule.estimate if isinstance(rule, TokenRule) else rule
            if isinstance(estimate, int) and estimate > max(budgets):
                raise ValueError(
                    f"tokens[{route!r}] has the estimate {estimate}, which fits into no tier's budget "
                    f"(at most {max(budgets)}): every such request would be refused"
                )
        for route in self.exempt:
            if route in self.costs or route in self.tokens:
                raise ValueError(f"route {route!r} is exempt and has a cost or a token rule; keep one of them")
        if not all(callable(getattr(self.counters, method, None)) for method in ("prepare", "admit", "settle")):
            raise ValueError(
                f"store must be a LimitStore with prepare, admit and settle, not {type(self.store).__name__}"
            )
        if self.algorithm not in getattr(self.counters, "algorithms", ()):
            known = ", ".join(sorted(self.counters.algorithms))
            raise ValueError(
                f"this store counts by {known}, not by {self.algorithm}; write algorithm= as the store does"
            )
        for face in self._faces.values():
            self.counters.prepare(face.plan)
        self.rules()
        # A hook that has nothing to do here is taken out of the pass.
        if not self.tokens:
            object.__setattr__(self, "on_body", None)
            object.__setattr__(self, "on_chunk", None)
        if not budgets:
            object.__setattr__(self, "on_finish", None)
        if self.key is by_address:
            # Needs to know nobody: may stand outside the authentication.
            object.__setattr__(self, "reads", ())
        return self

    # --- what is known before a request ----------------------------------------------------------------------------

    @cached_property
    def counters(self) -> LimitStore:
        """The store that counts: the one that was given, or this policy's own."""
        return memory_limits(self.algorithm) if self.store is None else self.store

    @cached_property
    def _faces(self) -> dict[str | None, _Face]:
        """By tier; under None that of anonymous callers."""
        prefix = "" if self.name is None else f"{self.name} "
        faces: dict[str | None, _Face] = {}
        for tier, anonymous in (*((tier, False) for tier in self.tiers), (self.anonymous_tier, True)):
            plan = Plan(
                name=tier,
                windows=cast("Mapping[str, Tier]", self.tiers)[tier].windows,
                algorithm=self.algorithm,
                anonymous=anonymous,
                overflow=f"{prefix}overflow anonymous" if anonymous else f"{prefix}overflow {tier}",
            )
            faces[None if anonymous else tier] = _Face(plan, self)
        return faces

    @cached_property
    def _unknown_tiers(self) -> set[str | None]:
        return set()

    @cached_property
    def _addresses(self) -> tuple[LRUCache[Any, str], Lock]:
        """What addresses were understood as; a flood of new ones keeps those that come often."""
        return LRUCache(maxsize=4_096), Lock()

    @cached_property
    def _networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(proxy for proxy in self.trusted_proxies if proxy != "unix")

    @cached_property
    def _usage_field(self) -> bytes | None:
        return None if self.usage_header is None else self.usage_header.lower().encode("ascii")

    def rules(self) -> Mapping[str, _Rule]:
        """One table of all three: for each route that is named in any, what the most specific rules say there."""
        tokens = {
            r: rule if isinstance(rule, TokenRule) else TokenRule(estimate=rule) for r, rule in self.tokens.items()
        }
        named = (*self.costs, *tokens, *self.exempt)
        kinds = {route: route in self.exempt for route in named}
        matcher = RouteMatcher({0: self.costs, 1: tokens, 2: kinds})
        parsed = [parse_route(route) for route in named]
        methods = {route.method for route in parsed} - {None}
        deepest = max((len(route.segments) for route in parsed), default=0)
        table: dict[str, _Rule] = {}
        for route in parsed:
            path = "/" + "/".join("{_}" if segment is None else segment for segment in route.segments)
            # A path that only rules match that cover the whole route.
            probe = path + "/**" * (deepest + 1 if route.tail else 0)
            for method in {route.method} if route.method else {None, *methods}:
                found = matcher.match(method or "", probe)
                rule = _EXEMPT if found.get(2) else _Rule(found.get(0, 1), found.get(1))
                table[(f"{method} " if method else "") + path.rstrip("/") + ("/**" if route.tail else "") or "/"] = rule
        return table

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.counters),) if hasattr(self.counters, "aclose") else ()

    # --- the pass --------------------------------------------------------------------------------------------------

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        if ex.get(Public) is not None:
            return None
        if ex.method == "OPTIONS" and b"origin" in ex.headers and b"access-control-request-method" in ex.headers:
            return None
        rule = ex.rule(self) if self._ruled else None
        if rule is _EXEMPT:
            return None
        principal = ex.principal
        face = self._faces.get(None if principal is None else principal.tier)
        if face is None or (principal is not None and principal.tier is None):
            face = self._default_face(principal.tier if principal is not None else None)
        key = self.key(ex)
        if key is None:
            key = self._address(ex)
        elif self._own_key:
            # Not an address, nor a bucket that is shared: whatever it says, it is a name of its own.
            key = f"key {sha256(key.encode('utf-8', 'surrogatepass')).hexdigest() if len(key) > _LONG_KEY else key}"
        elif len(key) > _LONG_KEY:
            key = f"sha256 {sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
        if self.name is not None:
            key = f"{self.name} {key}"
        if rule is None:
            now = ex.clock.time()
            decision = self._admit(key, face.plan, 1, None, now)
            if type(decision) is not Decision:
                return self._decided_later(ex, face, decision, now, None)
            if not decision.admitted:
                return self._refuse(face, decision, now)
            ex.keep(self, (face, decision, now, None))
            ex.give(face.quota(decision))
            return None
        if rule.tokens is None or face.budget is None:
            return self._ask(ex, face, key, rule, None)
        estimate = rule.tokens.estimate
        if callable(estimate):
            estimate = estimate(ex)
            if estimate is not None and not isinstance(estimate, int):
                return self._estimated_later(ex, face, key, rule, estimate)
        return self._ask(ex, face, key, rule, estimate or 0)

    def _ask(
        self, ex: Exchange, face: _Face, key: str, rule: _Rule, estimate: int | None
    ) -> Answer | Awaitable[Answer]:
        if estimate is not None:
            if estimate < 0:
                raise ValueError(f"the estimate for {ex.path} is {estimate} tokens; it must be 0 or more, or None")
            if face.budget is not None and estimate > face.budget:
                return self._never(face, estimate)
        now = ex.clock.time()
        tokens = None if estimate is None else rule.tokens
        decision = self._admit(key, face.plan, rule.cost, estimate, now)
        if type(decision) is Decision:
            return self._decided(ex, face, decision, now, tokens)
        return self._decided_later(ex, face, decision, now, tokens)

    async def _estimated_later(
        self, ex: Exchange, face: _Face, key: str, rule: _Rule, estimate: Awaitable[int | None]
    ) -> Answer:
        answer = self._ask(ex, face, key, rule, await estimate or 0)
        return answer if answer is None or isinstance(answer, Problem | Reply) else await answer

    async def _decided_later(
        self, ex: Exchange, face: _Face, decision: Awaitable[Decision], now: float, tokens: TokenRule | None
    ) -> Answer:
        return self._decided(ex, face, await decision, now, tokens)

    def _decided(
        self, ex: Exchange, face: _Face, decision: Decision, now: float, tokens: TokenRule | None
    ) -> Problem | None:
        if not decision.admitted:
            return self._refuse(face, decision, now)
        lease = decision.lease
        spending = None if lease is None or tokens is None else _Spending(lease, tokens)
        ex.keep(self, (face, decision, now, spending))
        ex.give(face.quota(decision))
        return None

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        note = ex.note(self)
        if note is None or note[3] is None or ex.method == "HEAD":
            return False
        # Whatever it is, if the application has told already: a whole body can be settled before it leaves.
        return TokenUsage in ex or self._usage_in(head) is not None or _is_json(head)

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> Awaitable[None] | None:
        spending: _Spending | None = ex.note(self)[3]
        if spending is None or spending.left is not None:
            return None
        used = self._told(ex, head)
        if used is None and _is_json(head):
            used = _reported(ex, body, spending.rule)
        if used is None:
            return None
        spending.used = used
        settled = self.counters.settle(spending.lease, used, ex.clock.time())
        if isinstance(settled, tuple):
            spending.left = settled
            return None
        return _settled_later(spending, settled)

    def on_response(self, ex: Exchange, head: Head) -> None:
        note = ex.note(self)
        if note is None:
            return
        face, decision, now, spending = note
        headers = head.headers
        if spending is not None:
            decision = self._show_tokens(ex, head, face, decision, spending)
        if head.status in _REDIRECTS and not self.on_redirects:
            return
        pairs = face.pairs(decision, now, face.headline)
        if _FIELDS.isdisjoint(dict(headers)):
            headers += pairs
        else:
            _merge(head, pairs, face)

    def on_chunk(self, ex: Exchange, chunk: bytes) -> None:
        note = ex.note(self)
        if note is not None and note[3] is not None and note[3].tail is not None:
            tail = note[3].tail
            tail += chunk
            if len(tail) > 2 * _TAIL:
                del tail[:-_TAIL]

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        note = ex.note(self)
        if note is None:
            return None
        face, decision, now, spending = note
        usage = ex.get(TokenUsage)
        if spending is None:
            if usage is None or not face.plan.tokens:
                return None
            # Reported on a route without a rule: what is used is used.
            lease, used = Lease(decision.key, face.plan, 0, now), usage.total_tokens
        elif spending.left is not None:
            late = 0 if usage is None else usage.total_tokens - (spending.used or 0)
            if late <= 0:
                return None
            lease, used = Lease(decision.key, face.plan, 0, now), late
        else:
            lease = spending.lease
            if usage is not None:
                used = usage.total_tokens
            elif spending.used is not None:
                used = spending.used
            elif spending.tail and (found := _last_event(ex, spending.tail, spending.rule)) is not None:
                used = found
            else:
                used = lease.reserved if _produced(ex) else 0
        settled = self.counters.settle(lease, used, ex.clock.time())
        return None if isinstance(settled, tuple) else _wait(settled)

    # --- parts of it -----------------------------------------------------------------------------------------------

    @cached_property
    def _own_key(self) -> bool:
        return self.key not in (by_principal, by_address)

    @cached_property
    def _ruled(self) -> bool:
        return bool(self.costs or self.tokens or self.exempt)

    @cached_property
    def _admit(self) -> Callable[[str, Plan, int, int | None, float], Any]:
        return self.counters.admit

    def _default_face(self, tier: str | None) -> _Face:
        unknown = self._unknown_tiers
        if tier not in unknown and len(unknown) < 100:
            unknown.add(tier)
            logger.warning("rate_limit_tier_unknown", tier=None if tier is None else tier[:64], used=self.default_tier)
        return self._faces[self.default_tier]

    def _address(self, ex: Exchange) -> str:
        forwarded = ex.headers.get(b"x-forwarded-for") if self.trusted_proxies else None
        asked = (ex.client, forwarded)
        addresses, lock = self._addresses
        with lock:
            known = addresses.get(asked)
        if known is None:
            address = client_address(*asked, self._networks, trust_socket="unix" in self.trusted_proxies)
            known = address_key(address, self.ipv6_prefix)
            if forwarded is None or len(forwarded) < 200:
                with lock:
                    addresses[asked] = known
        return known

    def _never(self, face: _Face, estimate: int) -> Problem:
        window = min(face.plan.tokens)
        return BUDGET_TOO_SMALL(
            f"This request may need {estimate} tokens; the budget is {window.limit} in {window.seconds} seconds.",
            required=estimate,
            limit=window.limit,
            window=window.seconds,
        )

    def _refuse(self, face: _Face, decision: Decision, now: float) -> Problem:
        index = decision.refused_by[0]
        window = face.plan.windows[index]
        # Never before the moment that any of the refusing windows gives (draft section 6).
        waits = [_seconds(decision.reset[i] - now) for i in decision.refused_by]
        wait = max(1, _seconds(decision.retry_after), *waits)
        if self.retry_spread:
            wait += random.randint(0, self.retry_spread)  # noqa: S311  spreads load, keeps no secret
        pairs = face.pairs(decision, now, index if self.x_headers else None)
        pairs.append((b"retry-after", b"%d" % wait))
        if window.unit == "tokens" and self.x_headers:
            pairs.append((b"x-tokens-remaining", b"%d" % min(decision.remaining[face.split :])))
        kind = BUDGET_EXCEEDED if window.unit == "tokens" else RATE_EXCEEDED
        return kind(
            f"{window.limit} {window.unit} in {window.seconds} seconds are allowed; try again in {wait} seconds.",
            headers=pairs,
            limit=window.limit,
            window=window.seconds,
            unit=window.unit,
            retry_after=wait,
            violated_policies=[face.names[i] for i in decision.refused_by],
        )

    def _usage_in(self, head: Head) -> int | None:
        value = None if self._usage_field is None else head.get(self._usage_field)
        return int(value) if value is not None and value.isdigit() and len(value) < 16 else None

    def _told(self, ex: Exchange, head: Head) -> int | None:
        """What the application says that it used, as far as it has."""
        usage = ex.get(TokenUsage)
        return self._usage_in(head) if usage is None else usage.total_tokens

    def _show_tokens(self, ex: Exchange, head: Head, face: _Face, decision: Decision, spending: _Spending) -> Decision:
        """Add the token headers; returns the decision with the tokens that remain as far as is known now."""
        if spending.left is None:
            spending.used = self._told(ex, head)
            media_type = head.get(b"content-type")
            if media_type is not None and media_type[:17].lower() == b"text/event-stream":
                spending.tail = bytearray()
        left = spending.left
        if left is None:
            over = 0 if spending.used is None else spending.used - spending.lease.reserved
            left = tuple([max(number - over, 0) for number in decision.remaining[face.split :]])
        if self._usage_field is not None and self._usage_field != b"x-tokens-used":
            head.remove(self._usage_field)
        if self.x_headers:
            if spending.used is not None:
                head.replace(b"x-tokens-used", b"%d" % spending.used)
            head.replace(b"x-tokens-remaining", b"%d" % min(left))
        return decision._replace(remaining=decision.remaining[: face.split] + left)


async def _wait(settled: Awaitable[Any]) -> None:
    await settled


async def _settled_later(spending: _Spending, settled: Awaitable[tuple[int, ...]]) -> None:
    """A store that fails or hangs takes no response away: `on_finish` settles again, and a lease settles once."""
    try:
        with move_on_after(_PATIENCE):
            spending.left = await settled
    except Exception:
        logger.exception("rate_limit_settlement_failed")


def _produced(ex: Exchange) -> bool:
    """Whether the client may have got something for its tokens."""
    status = ex.status
    return status is not None and (status == 101 or (200 <= status < 300 and ex.sent_bytes > 0))


def _is_json(head: Head) -> bool:
    media_type = (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()
    return (media_type == b"application/json" or media_type.endswith(b"+json")) and head.get(
        b"content-encoding"
    ) is None


def _reported(ex: Exchange, text: bytes, rule: TokenRule) -> int | None:
    """The tokens that a JSON text tells of; then they are a fact, for logs and others."""
    # Most texts that say nothing are not parsed.
    if not any(path[-1].encode() in text for path in rule.paths):
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for path in rule.paths:
        within: Any = None
        found = document
        for member in path:
            within = found
            found = found.get(member) if isinstance(found, dict) else None
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= _LARGEST:
            parts = [within.get(member) for member in ("input_tokens", "output_tokens")]
            known = [part if isinstance(part, int) and 0 <= part <= found else 0 for part in parts]
            ex.give(TokenUsage(known[0], known[1], found))
            return found
    return None


def _last_event(ex: Exchange, tail: bytearray, rule: TokenRule) -> int | None:
    """The usage in the newest server-sent event that tells one; it is usually the last, or the last but one."""
    lines = re.split(rb"\r\n|\r|\n", bytes(tail))
    told = (_reported(ex, line[5:], rule) for line in reversed(lines[-64:]) if line.startswith(b"data:"))
    return next((used for used in told if used is not None), None)


def _merge(head: Head, pairs: list[Pair], face: _Face) -> None:
    """Add `pairs` to a head that has such fields already: from the application, or from a policy inside."""
    ours = dict(pairs)
    remaining = head.get(b"x-ratelimit-remaining")
    if not any(head.get(name) is not None for name in _X_FIELDS):
        head.headers += [pair for pair in pairs if pair[0] in _X_FIELDS]
    elif (
        b"x-ratelimit-remaining" in ours
        and head.status != 429  # they say which window refused
        and remaining is not None
        and remaining.isdigit()
        and int(remaining[:20]) > int(ours[b"x-ratelimit-remaining"])
    ):
        head.remove(*_X_FIELDS)
        head.headers += [pair for pair in pairs if pair[0] in _X_FIELDS]
    if not face.drafted:
        return
    theirs = [b", ".join(head.get_all(name)) for name in (b"ratelimit-policy", b"ratelimit")]
    names = [member_names(value) if value else frozenset[bytes]() for value in theirs]
    if names[0] is None or names[1] is None:
        return  # an older draft's: a mixture could be read by nobody
    taken = names[0] | names[1]
    suffix, number = "", 1
    while not taken.isdisjoint(face.quoted(suffix)):
        number += 1
        suffix = f"-{number}"
    for name, value in zip((b"ratelimit-policy", b"ratelimit"), theirs, strict=True):
        mine = ours[name]
        if suffix:
            for plain, other in zip(face.quoted(""), face.quoted(suffix), strict=True):
                mine = mine.replace(plain, other)
        head.replace(name, value + b", " + mine if value else mine)

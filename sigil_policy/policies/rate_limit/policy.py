"""Tiered limits on requests and language-model tokens, decided together.

    app.add_middleware(PolicyStack, policies=[RequestID(), Problems(), BearerAuth(...), Scopes(...), RateLimit(
        tiers={"free": Tier(requests="1/second;20/minute;100/hour", tokens="10000/minute"), "pro": "50/second"},
        costs={"POST /v7/memory/search": 2},
        tokens={"POST /v7/agents/{name}/run": TokenRule(estimate=1_500)},
        levels=[Level("organisation", key=by_claim("org"), limits="10000/hour")],
        exempt=["GET /health"],
        store="redis://limits.internal",
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

* All windows, the token budget and the `levels` above a caller are one decision: a refused request consumes nothing
  anywhere.
* What each algorithm promises is written in `sigil_policy.stores.memory`: "fixed" (default) aligned windows,
  "sliding" never more than the limit in any interval, "gcra" a smooth flow.
* Tokens are reserved before and settled once, however the exchange ends. What was reported is charged. Where nothing
  was reported, nothing is charged if nothing was produced (no byte of a 2xx response went out), else what was counted
  while it went out. A report after the settlement is charged as well.
* A stream that outgrows its estimate reserves more as it goes. When the budget has no more it is ended with a last
  event that says so, or overdraws: `TokenRule.overrun`. What is over the budget is at most one part of the stream.
* With a `store` on another machine the limits hold over all processes that share it. `on_store_loss` says what holds
  while it is away.
* A request whose estimate is above the budget of its tier is refused for good: 422, not 429.
* A caller is the principal, else the client's address (IPv6: its /64), read from `X-Forwarded-For` only behind
  `trusted_proxies`. Nobody can evict a counter by coming under many names.
* Public routes (see `Scopes`), exempt routes and CORS preflights are neither counted nor given headers.
* Fields that the application or a policy inside has set are kept: members of `RateLimit` and `RateLimit-Policy` are
  appended, and `X-RateLimit-*` is never doubled: it describes what leaves the caller fewer requests.

Place it inside the authentication and `Scopes`. One more outside of them, `RateLimit(name="address", key=by_address)`,
bounds what callers without a valid credential may try; what an inner policy refuses has counted in the outer one.
On a WebSocket the handshake is a request, and each message of the client is one more: one that the limits refuse does
not reach the application, and is answered with a message that holds the problem (`ProblemStyle.message`), or ends the
connection. Tokens are reserved for each anew; what was used is settled with the next message, and at the end.

draft-ietf-httpapi-ratelimit-headers-11; RFC 6585 section 4; API guidelines, "Rate Limiting" and "Token Budget
Management".
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import structlog
from anyio import move_on_after
from pydantic import Field, field_validator, model_validator

from sigil_policy.core.catalogue import (
    BUDGET_EXCEEDED,
    BUDGET_TOO_SMALL,
    LIMITS_UNAVAILABLE,
    RATE_EXCEEDED,
    SEMANTICS_FAILED,
)
from sigil_policy.core.exchange import Exchange, Head, Message
from sigil_policy.core.facts import Principal, Public, Quota, TokenUsage
from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import OVER_LIMIT, Answer, Closable, Close, EndOfStream, Listed, Policy
from sigil_policy.core.problems import Problem, Reply, encode_json
from sigil_policy.identity.callers import Key, TrustedProxies, by_address, by_principal
from sigil_policy.identity.challenges import is_preflight
from sigil_policy.identity.fields import Label
from sigil_policy.policies.rate_limit.answers import exhausted, never_fits, refusal
from sigil_policy.policies.rate_limit.counted import ROUTE, Counted
from sigil_policy.policies.rate_limit.fields import FIELDS, MEANINGS, TOKEN_MEANINGS, WAIT, X_MEANINGS, Face, merge
from sigil_policy.policies.rate_limit.loss import Fallback, OnStoreLoss
from sigil_policy.policies.rate_limit.routes import EXEMPT, PLAIN, RouteRule, route_rules
from sigil_policy.policies.rate_limit.tiers import GUIDELINE_TIERS, LARGEST, Level, Tier, tier
from sigil_policy.policies.rate_limit.tokens import (
    Estimated,
    Spending,
    TokenRule,
    as_usage,
    is_json,
    last_words,
    reported,
)
from sigil_policy.stores.limits import Algorithm, Decision, LimitStore, Plan, StoreUnavailableError
from sigil_policy.stores.memory import memory_limits
from sigil_policy.stores.urls import found_by, limit_store

logger = structlog.get_logger("sigil_policy")

_PATIENCE = 1.0  # seconds that a response waits for a store to settle
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


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
            One that is over a window's limit takes the whole window. Endpoints may say `cost` and `limit` themselves;
            see `sigil_policy.core.marks`.
        limits: route to what each caller may do there, beside its tier: a `Tier`, or a string of request limits
            (default none). A rule that covers several routes counts them together.
        tokens: route to `TokenRule`, or to an estimate. Only these routes are gated by the token windows.
        exempt: routes that are not counted. The most specific route of the four tables wins; where no rule covers
            the other, write the overlap out.
        trusted_proxies: networks of proxies, and "unix" for one on a unix socket, whose `X-Forwarded-For` is believed
            (default none). A server that rewrites the client's address itself needs none here.
        ipv6_prefix: bits of an IPv6 address that make one caller (default 64).
        headline: name of the window in `X-RateLimit-*` (default None: "minute", else the tier's longest). On 429 they
            describe the window that refused.
        algorithm: "fixed" (default), "sliding" or "gcra"; see `sigil_policy.stores.memory`.
        levels: limits that callers share, from the narrowest `Level` to the widest; decided together with the caller's
            own (default none).
        store: where the counters are: a URL such as "redis://host" or "valkey://host", a `LimitStore`, or None for a
            fresh one in this process (default). Policies that share one share the counters of a caller, unless they
            have different names.
        on_store_loss: what holds while the store is away: "closed" (default) admits nobody, "open" everybody, "local"
            this process's share; see `sigil_policy.policies.rate_limit.loss`.
        expected_replicas: how many processes share the limits; wanted for "local".
        lease: seconds that a reservation holds in a shared store after its process was last heard of (default 60).
        lapsed: what becomes of it then: "returned" (default) or "charged".
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
        message_cost: how many requests a message on a WebSocket counts as (default 1; 0: messages are not counted, and
            tokens are settled at the end).
        over_messages: what a message over the limit gets: "answer" (default), or "close": the end of the connection
            with code 4429.

    Raises `ValueError` for an unknown tier or headline, limits that cannot be read, an estimate that fits into no tier.
    """

    reads: ClassVar[tuple[type, ...]] = (Principal, Public)
    gives: ClassVar[tuple[type, ...]] = (Quota,)
    marks: ClassVar[frozenset[str]] = frozenset(("cost", "limit"))

    tiers: Mapping[str, Tier | str] = Field(default_factory=lambda: dict(GUIDELINE_TIERS))
    default_tier: str = "free"
    anonymous_tier: str = "free"
    key: Key = by_principal
    costs: Mapping[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    limits: Mapping[str, Tier | str] = Field(default_factory=dict)
    tokens: Mapping[str, TokenRule | Annotated[int, Field(ge=0, le=LARGEST)]] = Field(default_factory=dict)
    exempt: Listed[str] = ()
    trusted_proxies: TrustedProxies = ()
    ipv6_prefix: Annotated[int, Field(ge=16, le=128)] = 64
    headline: str | None = None
    algorithm: Algorithm = "fixed"
    levels: Listed[Level] = ()
    store: Annotated[Any, found_by(limit_store)] = None
    on_store_loss: OnStoreLoss = "closed"
    expected_replicas: Annotated[int, Field(ge=1)] | None = None
    lease: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    lapsed: Literal["returned", "charged"] = "returned"
    name: Label | None = None
    draft: Literal[11] | None = 11
    x_headers: bool = True
    on_redirects: bool = True
    retry_spread: Annotated[int, Field(ge=0)] = 0
    usage_header: str | None = "X-Tokens-Used"
    message_cost: Annotated[int, Field(ge=0)] = 1
    over_messages: Literal["answer", "close"] = "answer"
    bound: Annotated[int, Field(ge=0)] = 32_768  # type: ignore[misc]  # `Policy.bound` may be made a field

    @field_validator("tiers")
    @classmethod
    def _tiers_readable(cls, tiers: Mapping[str, Tier | str]) -> Mapping[str, Tier | str]:
        if not tiers:
            raise ValueError('tiers is empty; write at least tiers={"free": "20/minute"}')
        return {name: tier(limits) for name, limits in tiers.items()}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        tiers = cast("Mapping[str, Tier]", self.tiers)
        if not self.message_cost:
            # A hook that has nothing to do here is taken out of the pass.
            object.__setattr__(self, "on_message", None)
        for option in ("default_tier", "anonymous_tier"):
            if getattr(self, option) not in tiers:
                raise ValueError(
                    f"{option} {getattr(self, option)!r} is not in tiers ({', '.join(tiers)}); name one of them"
                )
        names = {window.name for row in tiers.values() for window in row.windows if window.unit == "requests"}
        if self.headline is not None and self.headline not in names:
            raise ValueError(
                f"headline {self.headline!r} is no request window of any tier ({', '.join(sorted(names))})"
            )
        if len({level.name for level in self.levels}) < len(self.levels):
            raise ValueError("two levels have the same name; it tells their windows apart in headers")
        self._names_differ()
        self._estimates_fit()
        for route in self.exempt:
            if route in self.costs or route in self.tokens or route in self.limits:
                raise ValueError(f"route {route!r} is exempt and has a cost, a limit or a token rule; keep one of them")
        methods = ("prepare", "admit", "extend", "settle", "charge")
        if not all(callable(getattr(self.counters, method, None)) for method in methods):
            raise ValueError(
                f"store must be a URL or a LimitStore with {', '.join(methods)}, not {type(self.store).__name__}"
            )
        if self.algorithm not in getattr(self.counters, "algorithms", ()):
            known = ", ".join(sorted(self.counters.algorithms))
            raise ValueError(
                f"this store counts by {known}, not by {self.algorithm}; write algorithm= as the store does"
            )
        if self.on_store_loss == "local" and self.expected_replicas is None:
            raise ValueError('on_store_loss="local" needs expected_replicas: how many processes share the limits')
        self._counted.prepare()
        self.rules()
        # Made now: the places of one policy in several stacks have it in common, as they have the store.
        self._fallback  # noqa: B018
        # A hook that has nothing to do here is taken out of the pass.
        if not self.tokens:
            object.__setattr__(self, "on_body", None)
            object.__setattr__(self, "on_chunk", None)
        if not self._counted.budgeted and not self._remote:
            object.__setattr__(self, "on_finish", None)
        if self.key is by_address and not self.levels:
            # Needs to know nobody: may stand outside the authentication.
            object.__setattr__(self, "reads", ())
        return self

    def _names_differ(self) -> None:
        own_names = {window.name for row in cast("Mapping[str, Tier]", self.tiers).values() for window in row.windows}
        taken = dict.fromkeys(own_names, "a tier")
        for level in self.levels:
            if level.name == ROUTE:
                raise ValueError(
                    f"level {ROUTE!r} has the name that limits= and marked endpoints use; call it something else"
                )
            mine = {f"{level.name}-{window.name}" for row in level.rows.values() for window in row.windows}
            for name in mine & taken.keys():
                raise ValueError(
                    f"level {level.name!r} has a window {name!r}, and so has {taken[name]}: headers tell windows "
                    "apart by these names; call the level something else"
                )
            taken |= dict.fromkeys(mine, f"level {level.name!r}")

    def _estimates_fit(self) -> None:
        if self.tokens and not self._counted.budgeted:
            raise ValueError("tokens has rules, but no tier has a token budget; write Tier(requests=..., tokens=...)")
        faces = [face for face in self._counted.faces.values() if face.budgets]
        for route, rule in self.tokens.items():
            estimate = rule.estimate if isinstance(rule, TokenRule) else rule
            if isinstance(estimate, int | TokenUsage) and faces:
                usage = as_usage(estimate)
                if all(face.too_large(face.amounts(usage)) is not None for face in faces):
                    most = max(window.limit for face in faces for window, _ in face.budgets)
                    raise ValueError(
                        f"tokens[{route!r}] has the estimate {estimate}, which fits into no tier's budget "
                        f"(at most {most}): every such request would be refused"
                    )

    # --- what is known before a request ----------------------------------------------------------------------------

    @cached_property
    def counters(self) -> LimitStore:
        """The store that counts: the one that was given, or this policy's own."""
        return memory_limits(self.algorithm) if self.store is None else self.store

    @cached_property
    def _remote(self) -> bool:
        return bool(getattr(self.counters, "remote", False))

    @cached_property
    def _fallback(self) -> Fallback:
        return Fallback(self.counters, self.expected_replicas or 1, self.algorithm)

    @cached_property
    def _counted(self) -> Counted:
        return Counted(self, self.counters)

    @cached_property
    def _usage_field(self) -> bytes | None:
        return None if self.usage_header is None else self.usage_header.lower().encode("ascii")

    def rules(self) -> Mapping[str, RouteRule]:
        tokens = {
            r: rule if isinstance(rule, TokenRule) else TokenRule(estimate=rule) for r, rule in self.tokens.items()
        }
        limits = {route: self._counted.route_limit(route, limits) for route, limits in self.limits.items()}
        return route_rules(self.costs, tokens, limits, self.exempt)

    def marked(self, marks: Marks, rule: Any, resolution: Resolution) -> Any:
        if rule is EXEMPT or (marks.cost is None and marks.limit is None):
            return rule
        table: RouteRule = rule or PLAIN
        limit = table.limit
        if limit is None and marks.limit is not None:
            if not isinstance(marks.limit, str | Tier):
                raise ValueError(f"limit= takes a string like '10/minute', or a Tier, not {type(marks.limit).__name__}")
            limit = self._counted.route_limit(resolution.name, marks.limit)
            if limit[2].tokens and not self._counted.budgeted:
                raise ValueError("limit= has a token budget, and RateLimit knows none; give its tiers one")
        return RouteRule(table.cost if table.said else marks.cost, table.tokens, limit)

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.counters),) if hasattr(self.counters, "aclose") else ()

    def describe(self, operation: Operation, rule: RouteRule | None) -> None:
        if operation.public or rule is EXEMPT:
            return
        fields = {} if self.draft is None else dict(MEANINGS)
        if any(face.headline is not None for face in self._counted.faces.values()):
            fields |= X_MEANINGS
        counted = rule is not None and rule.tokens is not None and self._counted.budgeted
        spent = TOKEN_MEANINGS if counted and self.x_headers else {}
        for name, (meaning, schema) in (fields | spent).items():
            operation.sends(name, meaning, schema)
        waits = {**fields, **WAIT}
        operation.answers(RATE_EXCEEDED, headers=waits, limit=20, window=60, unit="requests", retry_after=12)
        if counted:
            operation.answers(BUDGET_EXCEEDED, headers=waits, limit=10_000, window=60, unit="tokens", retry_after=12)
            operation.answers(BUDGET_TOO_SMALL, SEMANTICS_FAILED)
        if self._remote and self.on_store_loss == "closed":
            operation.answers(LIMITS_UNAVAILABLE, headers=("Retry-After",))

    # --- the pass --------------------------------------------------------------------------------------------------

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        if Public in ex:
            return None
        if ex.method == "OPTIONS" and is_preflight(ex):
            return None
        rule: RouteRule | None = ex.rule(self)
        if rule is EXEMPT:
            return None
        face, key = self._counted.by(ex, None if rule is None else rule.limit)
        if rule is None:
            decision = self._admit(key, face.plan, 1, None, ex.clock.time())
            if type(decision) is not Decision:
                return self._decided_later(ex, face, key, PLAIN, None, decision)
            if not decision.admitted:
                return refusal(face, decision, x_headers=self.x_headers, spread=self.retry_spread)
            ex.keep(self, (face, decision, None))
            ex.give(face.quota(decision))
            return None
        return self._weigh(ex, face, key, rule)

    def _weigh(self, ex: Exchange, face: Face, key: Any, rule: RouteRule) -> Answer | Awaitable[Answer]:
        """Decide with the tokens that `rule` reserves."""
        if rule.tokens is None or not face.budgets:
            return self._ask(ex, face, key, rule, None)
        estimate: Any = rule.tokens.estimate
        if callable(estimate):
            estimate = estimate(ex)
            if isinstance(estimate, Awaitable):
                return self._estimated_later(ex, face, key, rule, estimate)
        return self._estimated(ex, face, key, rule, estimate)

    def _estimated(
        self, ex: Exchange, face: Face, key: Any, rule: RouteRule, estimate: Any
    ) -> Answer | Awaitable[Answer]:
        try:
            usage = as_usage(estimate)
        except ValueError:
            return SEMANTICS_FAILED("The number of tokens that this request asks for is none.")
        return self._ask(ex, face, key, rule, usage)

    def _ask(
        self, ex: Exchange, face: Face, key: Any, rule: RouteRule, estimate: TokenUsage | None
    ) -> Answer | Awaitable[Answer]:
        amounts = None
        if estimate is not None:
            amounts = face.amounts(estimate)
            too_large = face.too_large(amounts)
            if too_large is not None:
                return never_fits(face, amounts, too_large)
        decision = self._admit(key, face.plan, rule.cost, amounts, ex.clock.time())
        if type(decision) is Decision:
            return self._decided(ex, face, rule, estimate, decision)
        return self._decided_later(ex, face, key, rule, estimate, decision)

    async def _estimated_later(
        self, ex: Exchange, face: Face, key: Any, rule: RouteRule, estimate: Awaitable[Estimated]
    ) -> Answer:
        answer = self._estimated(ex, face, key, rule, await estimate)
        return answer if answer is None or isinstance(answer, Problem | Reply) else await answer

    async def _decided_later(
        self,
        ex: Exchange,
        face: Face,
        key: Any,
        rule: RouteRule,
        estimate: TokenUsage | None,
        asked: Awaitable[Decision],
    ) -> Answer:
        try:
            decision = await asked
        except StoreUnavailableError as lost:
            fallback = self._fallback
            fallback.lost(lost, ex.clock)
            if self.on_store_loss == "open":
                return None
            amounts = None if estimate is None else face.amounts(estimate)
            if self.on_store_loss == "closed" or (
                amounts is not None and fallback.share(face).too_large(amounts) is not None
            ):
                return LIMITS_UNAVAILABLE("Limits cannot be checked at the moment.", retry_after=lost.retry_after)
            decision = fallback.decide(face, key, rule.cost, amounts, ex.clock)
            face = fallback.share(face)
        return self._decided(ex, face, rule, estimate, decision)

    def _decided(
        self, ex: Exchange, face: Face, rule: RouteRule, estimate: TokenUsage | None, decision: Decision
    ) -> Problem | None:
        if not decision.admitted:
            return refusal(face, decision, x_headers=self.x_headers, spread=self.retry_spread)
        lease = decision.lease
        spending = None
        if lease is not None and rule.tokens is not None and estimate is not None:
            spending = Spending(lease, face, rule.tokens, estimate)
        ex.keep(self, (face, decision, spending))
        ex.give(face.quota(decision))
        return None

    def on_message(self, ex: Exchange, message: Message) -> Awaitable[Problem | Close | None] | None:
        note = ex.note(self)
        return None if note is None else self._take_turn(ex, note[2])

    async def _take_turn(self, ex: Exchange, last: Spending | None) -> Problem | Close | None:
        """A message is a request of its own: what was used since the last one is settled, then this one is decided."""
        accounted = TokenUsage()
        if last is not None:
            if last.left is None:
                used, told = last.final(ex), ex.get(TokenUsage)
                settled = self._settled(ex, last, used)
                last.close(told or last.before)
                if not isinstance(settled, tuple):
                    await self._settle(ex, last, used, settled)
            accounted = last.used or accounted
        rule: RouteRule = ex.rule(self) or PLAIN
        answer = self._weigh(ex, *self._counted.by(ex, rule.limit), RouteRule(self.message_cost, rule.tokens))
        if isinstance(answer, Awaitable):
            answer = await answer
        if isinstance(answer, Problem):
            return Close(OVER_LIMIT, answer.type.title) if self.over_messages == "close" else answer
        spending: Spending | None = ex.note(self)[2]
        if spending is not None and spending is not last:
            spending.begin(accounted, ex.sent_bytes)
        return None

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        note = ex.note(self)
        if note is None or note[2] is None or ex.method == "HEAD":
            return False
        # Whatever it is, if the application has told already: a whole body can be settled before it leaves.
        return TokenUsage in ex or self._usage_in(head) is not None or is_json(head)

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> Awaitable[None] | None:
        spending: Spending | None = ex.note(self)[2]
        if spending is None or spending.left is not None:
            return None
        used = self._told(ex, head)
        if used is None and is_json(head):
            used = reported(ex, body, spending.rule)
        if used is None:
            return None
        spending.used = used
        settled = self._settled(ex, spending, used)
        if isinstance(settled, tuple):
            spending.left = settled
            return None
        return _settled_later(spending, settled)

    def on_response(self, ex: Exchange, head: Head) -> None:
        note = ex.note(self)
        if note is None:
            return
        face, decision, spending = note
        headers = head.headers
        if spending is not None:
            decision = self._show_tokens(ex, head, decision, spending)
        if head.status in _REDIRECTS and not self.on_redirects:
            return
        pairs = face.pairs(decision, face.headline)
        if FIELDS.isdisjoint(dict(headers)):
            headers += pairs
        else:
            merge(head, pairs, face)

    def wants_chunks(self, ex: Exchange, head: Head) -> bool:
        note = ex.note(self)
        return note is not None and note[2] is not None and note[2].counts

    def on_chunk(self, ex: Exchange, chunk: bytes) -> Awaitable[EndOfStream | None] | None:
        spending: Spending = ex.note(self)[2]
        spending.add(chunk)
        if spending.left is not None or spending.overdrawn:
            return None
        missing = spending.missing(spending.known(ex))
        return None if missing is None else self._top_up(ex, spending, missing)

    async def _top_up(self, ex: Exchange, spending: Spending, missing: tuple[int, ...]) -> EndOfStream | None:
        """Reserve more for a stream that outgrows its estimate; where the budget has no more, what the rule says."""
        face = spending.face
        step = spending.step
        problem = None
        try:
            while True:
                more = tuple([number and max(number, step) for number in missing])
                held = face.store.extend(spending.lease, more, ex.clock.time())
                if (held if held is None or isinstance(held, tuple) else await held) is not None:
                    return None
                if more == missing:
                    break
                step //= 4
            spending.overdrawn = True
            problem = exhausted(face, missing)
        except StoreUnavailableError as lost:
            # Charged when the exchange ends; meanwhile the store is not asked again for every part.
            spending.overdrawn = True
            if self.on_store_loss == "closed":
                problem = LIMITS_UNAVAILABLE("Limits cannot be checked at the moment.", retry_after=lost.retry_after)
        if problem is None or spending.rule.overrun == "overdraw" or spending.ending is None:
            return None
        return EndOfStream(last_words(spending.ending, encode_json(ex.style.members(problem, ex))))

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        note = ex.note(self)
        if note is None:
            return None
        face, decision, spending = note
        if spending is None and TokenUsage not in ex:
            return self._catch_up(ex)
        if spending is not None and spending.left is None:
            used = spending.final(ex)
            settled = self._settled(ex, spending, used)
            return self._catch_up(ex) if isinstance(settled, tuple) else self._settle(ex, spending, used, settled)
        usage = ex.get(TokenUsage)
        # Reported on a route without a rule, or after the settlement: what is used is used.
        if usage is not None and face.budgets:
            before = None if spending is None else spending.used
            late = usage if before is None else TokenUsage(*(max(n - m, 0) for n, m in zip(usage, before, strict=True)))
            if any(late):
                amounts = (0,) * face.split + face.amounts(late)
                now = ex.clock.time()
                charged = face.store.charge(decision.key, face.plan, amounts, now)
                if not isinstance(charged, tuple):
                    return self._charge(ex, charged, face, decision.key, amounts)
                if face.whole is not None:
                    self._fallback.owe(face, decision.key, amounts, now)
        return self._catch_up(ex)

    def _settled(self, ex: Exchange, spending: Spending, usage: TokenUsage) -> Any:
        """Settle where it was decided. What was decided without the store, that is told once it is back."""
        face = spending.face
        used = face.amounts(usage)
        if face.whole is not None:
            change = [n - m for n, m in zip(used, face.amounts(spending.estimate), strict=True)]
            self._fallback.owe(face, spending.lease.key, (0,) * face.split + tuple(change), ex.clock.time())
        return face.store.settle(spending.lease, used, ex.clock.time())

    async def _settle(self, ex: Exchange, spending: Spending, usage: TokenUsage, settled: Awaitable[Any]) -> None:
        try:
            await settled
        except BaseException as error:
            # Also when the time that an exchange has for this is over, or somebody has cancelled even that.
            self._fallback.unsettled(spending.lease, spending.face.amounts(usage))
            if not isinstance(error, StoreUnavailableError):
                raise
            self._fallback.lost(error, ex.clock)
        else:
            reconciling = self._catch_up(ex)
            if reconciling is not None:
                await reconciling

    async def _charge(
        self, ex: Exchange, charged: Awaitable[Any], face: Face, key: Any, amounts: tuple[int, ...]
    ) -> None:
        try:
            await charged
        except StoreUnavailableError as lost:
            # Rather once too often than never: what was used is used. It is told once more, and then no more.
            self._fallback.lost(lost, ex.clock)
            self._fallback.owe(face, key, amounts, ex.clock.time())

    def _catch_up(self, ex: Exchange) -> Awaitable[None] | None:
        return self._fallback.reconcile(ex.clock) if self._remote and self._fallback.pending(ex.clock) else None

    # --- parts of it -----------------------------------------------------------------------------------------------

    @cached_property
    def _admit(self) -> Callable[[Any, Plan, int, tuple[int, ...] | None, float], Any]:
        return self.counters.admit

    def _usage_in(self, head: Head) -> TokenUsage | None:
        value = None if self._usage_field is None else head.get(self._usage_field)
        if value is None or not value.isdigit() or len(value) > 15:
            return None
        return TokenUsage(0, 0, int(value))

    def _told(self, ex: Exchange, head: Head) -> TokenUsage | None:
        """What the application says that it used, as far as it has."""
        usage = ex.get(TokenUsage)
        return self._usage_in(head) if usage is None else usage

    def _show_tokens(self, ex: Exchange, head: Head, decision: Decision, spending: Spending) -> Decision:
        """Add the token headers; returns the decision with the tokens that remain as far as is known now."""
        face = spending.face
        if spending.left is None:
            spending.used = self._told(ex, head)
            spending.watch(head)
        left = spending.left
        if left is None:
            held = spending.lease.reserved
            amounts = held if spending.used is None else face.amounts(spending.used)
            rows = zip(decision.remaining[face.split :], amounts, held, strict=True)
            left = tuple([max(number + reserved - used, 0) for number, used, reserved in rows])
        if self._usage_field is not None and self._usage_field != b"x-tokens-used":
            head.remove(self._usage_field)
        if self.x_headers:
            if spending.used is not None:
                head.replace(b"x-tokens-used", b"%d" % spending.used.total_tokens)
            head.replace(b"x-tokens-remaining", b"%d" % face.left(left))
        return decision._replace(remaining=decision.remaining[: face.split] + left)


async def _settled_later(spending: Spending, settled: Awaitable[tuple[int, ...]]) -> None:
    """A store that fails or hangs takes no response away: `on_finish` settles again, and a lease settles once."""
    try:
        with move_on_after(_PATIENCE):
            spending.left = await settled
    except StoreUnavailableError:
        pass
    except Exception:
        logger.exception("rate_limit_settlement_failed")

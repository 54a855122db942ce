"""Limits how many exchanges a caller, and a route, may have in flight at the same time.

    app.add_middleware(PolicyStack, policies=[RequestID(), Problems(), BearerAuth(...), Scopes(...), ConcurrencyLimit(
        limits={"free": 2, "pro": 20},
        routes={"POST /v7/agents/{name}/run": 5},
    ), RateLimit()])

    HTTP/1.1 200 OK                                              HTTP/1.1 429 Too Many Requests
    RateLimit-Policy: "concurrency";q=2;qu="concurrent-requests" Retry-After: 1
    RateLimit: "concurrency";r=1                                 {"error_code": "RATE_002", "limit": 2, ...}

What it guarantees:

* The place of the caller and that of the route are one decision: what is refused takes neither. Nobody waits in line.
* A place is taken when the exchange reaches this policy, and given back exactly once when it leaves it, however it
  ends: answered, refused by a policy inside, failed, timed out, cancelled, left by the client. A WebSocket holds its
  place until it is closed, a stream until its last byte.
* In this process (the default) there are never more in flight than the limit. So it is with a store that several
  processes share; what a killed process held comes free `ttl` seconds later.
* A rule of `routes` is one pool for all callers and all that it covers: `"/v7/jobs/**"` counts everything below. A
  path with a dot segment is in no pool, as no rule matches it; `Scopes` refuses such paths.
* `Retry-After` is a polite guess, because nobody knows when a request will end. It is at least 1.
* Public routes (see `Scopes`), exempt routes and CORS preflights are neither counted nor given headers.
* Members of `RateLimit` and `RateLimit-Policy` that others have set are kept; no name occurs twice.

**When the store is away**, `on_store_loss` says what holds. "closed": 503 with `Retry-After`. "open": everybody passes,
without headers. "local": each process admits `limit // expected_replicas` (at least 1) of its own, so that all of them
together admit at most the limit (or one each, if that is more), beside what was in flight when the store went; the
fields are marked `sigil-degraded`. What was let pass is counted as soon as the store is back (at the latest a third of
`ttl` later), until it ends.

Place it inside the authentication, and outside `RateLimit`: what it refuses has then used up no quota. An exchange that
passes two of these policies with one store and one name takes two places.

draft-ietf-httpapi-ratelimit-headers-11 (the unit is registered in section 10.3; without a window there is no `w`, and
nothing to say in `t`); RFC 6585 section 4.
"""

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import structlog
from pydantic import Field, model_validator

from sigil_policy.core.catalogue import CONCURRENCY_EXCEEDED, LIMITS_UNAVAILABLE
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal, Public
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Answer, Closable, Listed, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.routing import RouteMatcher
from sigil_policy.identity.callers import Addresses, Key, TrustedProxies, by_address, by_principal
from sigil_policy.identity.challenges import is_preflight
from sigil_policy.identity.fields import Label
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.slots import Claim, MemorySlots, Refusal, Slot, SlotStore
from sigil_policy.stores.urls import found_by, slot_store
from sigil_policy.wire.ratelimit import member_names
from sigil_policy.wire.structured import sf_string

logger = structlog.get_logger("sigil_policy")

Limit = Annotated[int, Field(ge=1, le=999_999_999_999_999, strict=True)]

_UNIT = "concurrent-requests"
_ROUTE = "route-concurrency"
_LONG_KEY = 256
_POLICY, _STATE = b"ratelimit-policy", b"ratelimit"
_FIELDS = frozenset((_POLICY, _STATE))

_new = tuple.__new__
_readable = lru_cache(256)(member_names)


class _Face:
    """The limits that an exchange meets, by their `names`: all of the fields that is known before there is one."""

    __slots__ = ("degraded", "limits", "names", "policy", "quoted", "state")

    def __init__(self, names: Sequence[str], limits: Sequence[int], *, degraded: bool = False) -> None:
        self.names = tuple(names)
        self.limits = tuple(limits)
        self.degraded = degraded
        quoted = [sf_string(name) for name in names]
        self.quoted = frozenset(quoted)
        mark = b";sigil-degraded" if degraded else b""
        rows = zip(quoted, limits, strict=True)
        self.policy = b", ".join(b'%b;q=%d;qu="concurrent-requests"%b' % (name, limit, mark) for name, limit in rows)
        self.state = b", ".join(name + b";r=%d" for name in quoted)

    def left(self, in_flight: Sequence[int]) -> bytes:
        """The field `RateLimit`."""
        rows = zip(self.limits, in_flight, strict=True)
        return self.state % tuple([limit - count if count < limit else 0 for limit, count in rows])

    def beside(self, taken: frozenset[bytes]) -> "_Face":
        """This face, under names that are not taken."""
        face, number = self, 1
        while not taken.isdisjoint(face.quoted):
            number += 1
            face = _Face([f"{name}-{number}" for name in self.names], self.limits, degraded=self.degraded)
        return face


class _Rule:
    """What a route claims, and by the limit of the caller what the two together look like."""

    __slots__ = ("claim", "faces")

    def __init__(self, claim: Claim | None) -> None:
        self.claim = claim
        self.faces: dict[int | None, _Face] = {}


_EXEMPT = _Rule(None)


class ConcurrencyLimit(Policy):
    """Limits the exchanges in flight of each caller by tier, and of routes; the module says what it guarantees.

        ConcurrencyLimit(limits=10)
        ConcurrencyLimit(limits={"free": 2, "pro": 20, "internal": None}, routes={"POST /v7/agents/{name}/run": 5})

    Options:
        limits: how many exchanges one caller may have in flight: a number, or tier to number. None (default, or for a
            tier) does not limit callers.
        routes: route to how many may be in flight there, over all callers (default none).
        default_tier: for principals without a tier, or with one that is not in `limits`; logged once for each name
            (default "free").
        anonymous_tier: for callers without a principal (default "free").
        key: who is one caller: `by_principal` (default), `by_address`, or a function from the exchange to a name, or to
            None for the client's address.
        exempt: routes that are not counted. The most specific of these and of `routes` holds.
        trusted_proxies: networks of proxies, and "unix" for one on a unix socket, whose `X-Forwarded-For` is believed
            (default none).
        ipv6_prefix: bits of an IPv6 address that make one caller (default 64).
        store: where slots are counted: a `SlotStore`, or the URL of a Redis or Valkey server (see
            `sigil_policy.stores.urls`); None counts in this process (default). Policies that share one share the
            places of a caller and of a route, unless they have different names.
        ttl: seconds after which what a killed process held comes free (default 15). The heartbeat comes three times as
            often. In this process it means nothing.
        on_store_loss: "closed" (default), "open" or "local"; see the module.
        expected_replicas: how many processes share the limits; wanted for "local".
        retry_after: seconds that `Retry-After` tells (default 1).
        name: sets this policy apart: in front of its limits' names in headers, and of its keys in a shared store
            (default None).
        draft: 11 sends `RateLimit-Policy` and `RateLimit` as that draft writes them (default), None sends neither.

    Raises `ValueError` for no limit at all, an unknown tier, a route that is none.
    """

    reads: ClassVar[tuple[type, ...]] = (Principal, Public)

    limits: Limit | Mapping[str, Limit | None] | None = None
    routes: Mapping[str, Limit] = Field(default_factory=dict)
    default_tier: str = "free"
    anonymous_tier: str = "free"
    key: Key = by_principal
    exempt: Listed[str] = ()
    trusted_proxies: TrustedProxies = ()
    ipv6_prefix: Annotated[int, Field(ge=16, le=128)] = 64
    store: Annotated[Any, found_by(slot_store)] = None
    ttl: Annotated[float, Field(ge=1, le=3_600)] = 15.0
    on_store_loss: Literal["closed", "open", "local"] = "closed"
    expected_replicas: Annotated[int, Field(ge=1)] | None = None
    retry_after: Annotated[int, Field(ge=1, le=86_400)] = 1
    name: Label | None = None
    draft: Literal[11] | None = 11

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        limits = self.limits
        if not self.routes and (limits is None or (isinstance(limits, Mapping) and not any(limits.values()))):
            raise ValueError('nothing is limited; write limits=10, limits={"free": 2} or routes={"POST /run": 5}')
        if isinstance(limits, Mapping):
            for option in ("default_tier", "anonymous_tier"):
                if getattr(self, option) not in limits:
                    raise ValueError(
                        f"{option} {getattr(self, option)!r} is not in limits ({', '.join(limits)}); name one of them"
                    )
        for route in self.exempt:
            if route in self.routes:
                raise ValueError(f"route {route!r} is exempt and has a limit; keep one of them")
        if self.on_store_loss == "local" and self.expected_replicas is None:
            raise ValueError('on_store_loss="local" needs expected_replicas: how many processes share the limits')
        if not all(callable(getattr(self.slots, method, None)) for method in ("take", "hold", "give_back")):
            raise ValueError(
                f"store must be a SlotStore with take, hold and give_back, not {type(self.store).__name__}"
            )
        RouteMatcher({0: self.rules()})
        # Made now: the places of one policy in several stacks have it in common, as they have the store.
        self._local  # noqa: B018
        if self.key is by_address and not isinstance(limits, Mapping):
            # Needs to know nobody: may stand outside the authentication.
            object.__setattr__(self, "reads", ())
        if self.draft is None:
            # A hook that has nothing to do here is taken out of the pass.
            object.__setattr__(self, "on_response", None)
        return self

    # --- what is known before a request ----------------------------------------------------------------------------

    @cached_property
    def slots(self) -> SlotStore:
        """The store that counts: the one that was given, or this policy's own."""
        return MemorySlots() if self.store is None else self.store

    @cached_property
    def _local(self) -> MemorySlots:
        """What this process admits while the store is away."""
        return MemorySlots()

    @cached_property
    def _tiers(self) -> Mapping[str | None, int | None] | None:
        """The limit of each tier, under None that of anonymous callers. None: one limit for all."""
        limits = self.limits
        return dict([*limits.items(), (None, limits[self.anonymous_tier])]) if isinstance(limits, Mapping) else None

    @cached_property
    def _unknown_tiers(self) -> set[str | None]:
        return set()

    @cached_property
    def _prefix(self) -> str:
        """In front of each key. Without a name it is a space: no two policies' keys are one."""
        return f"{self.name or ''} "

    @cached_property
    def _head(self) -> str:
        """In front of the name of a caller who is no address."""
        return self._prefix + ("caller" if self.key is by_principal else "key")

    @cached_property
    def _anywhere(self) -> _Rule:
        """The rule where there is none."""
        return _Rule(None)

    @cached_property
    def _address(self) -> Addresses:
        return Addresses(self.trusted_proxies, self.ipv6_prefix)

    @cached_property
    def _ruled(self) -> bool:
        return bool(self.routes or self.exempt)

    def rules(self) -> Mapping[str, _Rule]:
        """What each route claims. The text of a rule names its pool."""
        rules = {route: _Rule(Claim(f"{self._prefix}route {route}", limit)) for route, limit in self.routes.items()}
        return {**rules, **dict.fromkeys(self.exempt, _EXEMPT)}

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.slots),) if hasattr(self.slots, "aclose") else ()

    def describe(self, operation: Operation, rule: _Rule | None) -> None:
        if operation.public or rule is _EXEMPT:
            return
        if self.draft is not None:
            operation.sends("RateLimit-Policy", "How many requests may be in flight: q")
            operation.sends("RateLimit", "How many more may be in flight now: r")
        operation.answers(CONCURRENCY_EXCEEDED, headers=("Retry-After",), limit=2, retry_after=1)
        if getattr(self.slots, "remote", False) and self.on_store_loss == "closed":
            operation.answers(LIMITS_UNAVAILABLE, headers=("Retry-After",))

    # --- the pass --------------------------------------------------------------------------------------------------

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        if ex.get(Public) is not None or (ex.method == "OPTIONS" and is_preflight(ex)):
            return None
        rule: _Rule = (ex.rule(self) if self._ruled else None) or self._anywhere
        if rule is _EXEMPT:
            return None
        tiers = self._tiers
        limit = cast("int | None", self.limits) if tiers is None else self._limit(ex.principal, tiers)
        claim = rule.claim
        claims: tuple[Claim, ...]
        if limit is not None:
            own: Claim = _new(Claim, (self._caller(ex), limit))
            claims = (own,) if claim is None else (own, claim)
        elif claim is not None:
            claims = (claim,)
        else:
            return None
        face = rule.faces.get(limit) or self._face(rule, limit)
        try:
            taken = self.slots.take(claims, self.ttl, ex.clock.time())
        except StoreUnavailableError as error:
            return self._without_store(ex, claims, face, error)
        if type(taken) is Slot:
            ex.keep(self, (face, taken.in_flight, taken, None))
            return None
        if isinstance(taken, Slot | Refusal):
            return self._decided(ex, face, taken)
        return self._decided_later(ex, claims, face, taken)

    def on_response(self, ex: Exchange, head: Head) -> None:
        note = ex.note(self)
        if note is None or note[1] is None:
            return
        face: _Face = note[0]
        headers = head.headers
        known = dict(headers)
        policy, state = face.policy, face.left(note[1])
        if not _FIELDS.isdisjoint(known):
            # There are members already: from the application, or from a policy inside.
            if len(known) < len(headers):  # something is on several lines
                known.update([(name, b", ".join(head.get_all(name))) for name in _FIELDS])
            others, counts = known.get(_POLICY), known.get(_STATE)
            # The text of the policies is the same for many responses, and what `RateLimit` names is in it.
            taken = _readable(others) if others else member_names(counts or b"")
            if taken is None or (counts and counts[:1] != b'"'):
                return  # an older draft's: a mixture could be read by nobody
            if not taken.isdisjoint(face.quoted):
                face = face.beside(taken)
                policy, state = face.policy, face.left(note[1])
            headers[:] = [pair for pair in headers if pair[0] not in _FIELDS]
            policy = others + b", " + policy if others else policy
            state = counts + b", " + state if counts else state
        headers += ((_POLICY, policy), (_STATE, state))

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        note = ex.note(self)
        if note is None:
            return None
        slot, local = note[2:]
        if local is not None:
            self._local.give_back(local)
        given = self.slots.give_back(slot)
        return None if given is None else _unless_away(given)

    # --- parts of it -----------------------------------------------------------------------------------------------

    def _limit(self, principal: Principal | None, tiers: Mapping[str | None, int | None]) -> int | None:
        if principal is None:
            return tiers[None]
        tier = principal.tier
        if tier is None or tier not in tiers:
            unknown = self._unknown_tiers
            if tier not in unknown and len(unknown) < 100:
                unknown.add(tier)
                logger.warning(
                    "concurrency_tier_unknown", tier=None if tier is None else tier[:64], used=self.default_tier
                )
            tier = self.default_tier
        return tiers[tier]

    def _caller(self, ex: Exchange) -> str:
        """The caller's key. The word in it says where it is from: whatever a name says, it is no other kind's."""
        key = self.key(ex)
        if key is None:
            return f"{self._prefix}address {self._address(ex)}"
        if len(key) > _LONG_KEY:
            return f"{self._head}sha256 {sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
        return f"{self._head}= {key}"

    def _face(self, rule: _Rule, limit: int | None) -> _Face:
        prefix = "" if self.name is None else f"{self.name}-"
        rows = [] if limit is None else [(f"{prefix}concurrency", limit)]
        if rule.claim is not None:
            rows.append((prefix + _ROUTE, rule.claim.limit))
        names, limits = zip(*rows, strict=True)
        rule.faces[limit] = face = _Face(names, limits)
        return face

    def _decided(self, ex: Exchange, face: _Face, taken: Slot | Refusal) -> Problem | None:
        if isinstance(taken, Refusal):
            return self._refuse(face, taken)
        ex.keep(self, (face, taken.in_flight, taken, None))
        return None

    async def _decided_later(
        self, ex: Exchange, claims: tuple[Claim, ...], face: _Face, waiting: Awaitable[Slot | Refusal]
    ) -> Problem | None:
        try:
            taken = await waiting
        except StoreUnavailableError as error:
            return self._without_store(ex, claims, face, error)
        return self._decided(ex, face, taken)

    def _without_store(
        self, ex: Exchange, claims: tuple[Claim, ...], face: _Face, error: StoreUnavailableError
    ) -> Problem | None:
        if self.on_store_loss == "closed":
            return LIMITS_UNAVAILABLE("Limits cannot be checked at the moment.", retry_after=error.retry_after)
        local: Slot | None = None
        in_flight: tuple[int, ...] | None = None
        if self.on_store_loss == "local":
            replicas = self.expected_replicas or 1
            shares = tuple(Claim(key, max(1, limit // replicas)) for key, limit in claims)
            face = _Face(face.names, [share.limit for share in shares], degraded=True)
            taken = self._local.take(shares, self.ttl, ex.clock.time())
            if isinstance(taken, Refusal):
                return self._refuse(face, taken)
            local, in_flight = taken, taken.in_flight
        ex.keep(self, (face, in_flight, self.slots.hold(claims, self.ttl), local))
        return None

    def _refuse(self, face: _Face, refused: Refusal) -> Problem:
        index = refused.refused_by[0]
        limit = face.limits[index]
        whose = "on this route" if face.names[index].endswith(_ROUTE) else "of one caller"
        pairs = () if self.draft is None else ((_POLICY, face.policy), (_STATE, face.left(refused.in_flight)))
        return CONCURRENCY_EXCEEDED(
            f"At most {limit} requests {whose} may be in flight at the same time; try again when one has ended.",
            headers=pairs,
            limit=limit,
            unit=_UNIT,
            retry_after=self.retry_after,
            violated_policies=[face.names[i] for i in refused.refused_by],
        )


async def _unless_away(given: Awaitable[None]) -> None:
    """What cannot be given back now comes free after its time to live."""
    with suppress(StoreUnavailableError):
        await given

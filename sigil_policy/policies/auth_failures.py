"""Limits failed authentications, so that credentials cannot be tried out: by address, and by what was tried.

    app.add_middleware(PolicyStack, policies=[
        RequestID(), Problems(), AuthFailureLimit(), BearerAuth(...), ApiKeyAuth(...), Scopes(...), RateLimit(...),
    ])

    HTTP/1.1 429 Too Many Requests
    Retry-After: 41
    {"error_code": "RATE_004", "detail": "Too many failed authentications.", ...}

A failure is a 401 that a policy inside answers to a request that carries a credential: in a header, or in a WebSocket's
handshake as a ticket (`ticket_queries`) or behind a subprotocol (`websocket_protocols`). One without a credential is
none, nor is a malformed header (400), nor what the application answers, nor one that a second credential is asked of,
nor a proof of possession that only lacks this service's nonce.

What it guarantees:

* **Three counts, none of them anybody's quota.** `addresses`: failures of a client address (IPv6: its /64).
  `credentials`: failures of one API key's id, or of tokens with one header (those of one key of an issuer), from that
  address; a client with an outdated key is stopped before it uses up what its neighbours behind the same address have.
  `everywhere`: failures of one API key's id from all addresses together.
* **Refused before anything is verified**, with 429, `Retry-After` and the same words whatever was presented: a guess
  that is right gets the answer of a wrong one. The refusal itself counts nothing.
* **Nobody is locked out from elsewhere.** A key's id is public: whoever knows it can make it fail. So failures at one
  address never refuse a credential at another. Beyond `everywhere`, each address still has one failure with that id, in
  place of those in `credentials`: the owner's right key passes at the first try, from wherever it comes, and an attack
  from many addresses has one guess for each.
* **Who was let in lately, is let through.** A credential that was accepted here in the last `accepted_for` seconds goes
  on to be verified also while its address is over the limit: neighbours who guess cannot lock it out, whichever id they
  try. It is known by a digest of exactly what was presented, so nobody can guess under its cover. A failure ends it.
  Each process knows those that it has accepted itself; tickets, which hold once, are none of them.
* **Once for each exchange**, when it has ended, however it ends, over HTTP and WebSockets, also where two of these
  policies with one store stand in each other. What is being verified at the moment in which a limit is reached is not
  called back.
* Everything is bounded. A store in this process knows 250,000 of these names at once; beyond that, addresses that are
  new are let through, rather than refused for what others did. Names are cut to digests. No credential is kept, logged
  or shown.

What it cannot: tell neighbours apart who come from one address. While that is over its limit, those wait whose
credential was not accepted lately.

A credential that was accepted lately costs a digest and a look-up; another one asks the store once, and once or twice
more where there were failures. Who is refused is refused in this process until then, and asks the store nothing.

**When a store on another machine is away**, or raises anything else, `on_store_loss` says what holds. "closed": 503
with `Retry-After`, except for who was let in lately. "open": nobody is refused, and nothing counted. "local": each
process counts by itself `limit // expected_replicas` (at least 1) of each window. What failed meanwhile is not made
good.

Place it outside of the policies that authenticate. A WebSocket whose server cannot send a response to a refused
handshake hides its status: there every refusal by a policy that authenticates counts, also one with 400 or 503.
RFC 6585 section 4; RFC 9110 section 10.2.3; RFC 4291 section 2.5.1.
"""

from collections.abc import Awaitable, Generator, Iterable
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, cast

import limits as limit_strings
from pydantic import Field, model_validator

from sigil_policy.core.catalogue import AUTH_FAILURES_EXCEEDED, LIMITS_UNAVAILABLE
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Answer, Closable, Listed, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.identity.api_keys import key_id
from sigil_policy.identity.callers import Addresses, TrustedProxies
from sigil_policy.identity.dpop import NonceRequired
from sigil_policy.identity.fields import HeaderName, Label, QueryName
from sigil_policy.identity.store_failures import StoreFailures
from sigil_policy.identity.subprotocols import SubprotocolPair
from sigil_policy.stores.limits import Algorithm, Decision, LimitStore, Plan, Window
from sigil_policy.stores.memory import memory_limits
from sigil_policy.stores.tickets import is_ticket
from sigil_policy.stores.urls import found_by, limit_store
from sigil_policy.wire.authorization import MAX_QUERY
from sigil_policy.wire.jws import MAX_TOKEN

_LONGEST = MAX_TOKEN + len("Bearer ")
# So many names that are over a limit are remembered.
_BLOCKED = 10_000
# Whose refusal of a handshake is a 401, where the server shows no status.
_AUTHENTICATORS = frozenset(("BearerAuth", "ApiKeyAuth", "WebSocketTicketAuth"))


class AuthFailureLimit(Policy):
    """Limits failed authentications by address and by credential; the module says what it guarantees.

        AuthFailureLimit()
        AuthFailureLimit(addresses="10/minute;50/hour", trusted_proxies=["10.0.0.0/8"], store="redis://limits.internal")

    Options:
        addresses: how many failures one address may have, in the notation of `limits` (default "20/minute;200/hour").
        credentials: how many of them with one API key's id, or one header of tokens; each window is as long as one of
            `addresses` (default "5/minute;50/hour"; None: not limited).
        everywhere: how many failures one key's id may have from all addresses, before each address has one only
            (default "100/hour"; None: not limited). Takes `credentials`. Tokens of one header are many callers', so
            they have no such limit.
        headers: where credentials are presented (default "Authorization" and "X-API-Key").
        websocket_protocols: the subprotocols in front of credentials, as `websocket_protocol` of the policies inside
            names them (default none).
        ticket_queries: the query parameters of WebSockets that carry tickets, as `query` of `WebSocketTicketAuth` names
            them (default "ticket").
        accepted: how many credentials that were accepted lately are let through, of 100 bytes each (default 10,000;
            0: none, a right credential from an address over its limit is refused too).
        accepted_for: for how many seconds after it was last accepted (default 3600).
        trusted_proxies: networks of proxies, and "unix" for one on a unix socket, whose `X-Forwarded-For` is believed
            (default none). Without it all that comes through a proxy is one address.
        ipv6_prefix: bits of an IPv6 address that make one caller (default 64).
        algorithm: "fixed" (default), "sliding" or "gcra"; see `sigil_policy.stores.memory`.
        store: where failures are counted: a URL such as "redis://host", a `LimitStore`, or None for this process
            (default). It may be that of `RateLimit`.
        on_store_loss: "closed" (default), "open" or "local"; see the module.
        expected_replicas: how many processes share the limits; wanted for "local".
        name: sets the counters of this policy apart in a shared store (default "failures").

    Answers 429 `RATE_004`, and 503 `RATE_003` while the store is away. Raises `ValueError` for limits that cannot be
    read.
    """

    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    addresses: str = "20/minute;200/hour"
    credentials: str | None = "5/minute;50/hour"
    everywhere: str | None = "100/hour"
    headers: Annotated[Listed[HeaderName], Field(min_length=1, max_length=8)] = ("Authorization", "X-API-Key")
    websocket_protocols: Annotated[Listed[HeaderName], Field(max_length=8)] = ()
    ticket_queries: Annotated[Listed[QueryName], Field(max_length=8)] = ("ticket",)
    accepted: Annotated[int, Field(ge=0, le=10_000_000)] = 10_000
    accepted_for: Annotated[float, Field(gt=0, le=31_536_000)] = 3_600.0
    trusted_proxies: TrustedProxies = ()
    ipv6_prefix: Annotated[int, Field(ge=16, le=128)] = 64
    algorithm: Algorithm = "fixed"
    store: Annotated[Any, found_by(limit_store)] = None
    on_store_loss: Literal["closed", "open", "local"] = "closed"
    expected_replicas: Annotated[int, Field(ge=1)] | None = None
    name: Label = "failures"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.everywhere is not None and self.credentials is None:
            raise ValueError("everywhere takes credentials, which says what is left of them then; or write None")
        plans = self._plans
        if plans.credentials is not None:
            known = {window.seconds for window in plans.addresses.windows}
            if not known.issuperset(window.seconds for window in plans.credentials.windows):
                raise ValueError(
                    f"credentials {self.credentials!r} has windows of other lengths than addresses "
                    f"({self.addresses!r}); give addresses a window of each length"
                )
        if self.on_store_loss == "local" and self.expected_replicas is None:
            raise ValueError('on_store_loss="local" needs expected_replicas: how many processes share the limits')
        if not all(callable(getattr(self.counters, method, None)) for method in ("prepare", "admit", "charge")):
            raise ValueError(
                f"store must be a URL or a LimitStore with prepare, admit and charge, not {type(self.store).__name__}"
            )
        if self.algorithm not in getattr(self.counters, "algorithms", ()):
            counts = ", ".join(sorted(self.counters.algorithms))
            raise ValueError(f"this store counts by {counts}, not by {self.algorithm}; write algorithm= as it does")
        for plan in plans:
            if plan is not None:
                self.counters.prepare(plan)
        # Made now: the places of one policy in several stacks have them in common, as they have the store.
        _ = self._local, self._accepted, self._blocked, self._address, self._names, self._pairs, self._queries
        _ = self._failures
        return self

    # --- what is known before a request ----------------------------------------------------------------------------

    @cached_property
    def counters(self) -> LimitStore:
        """The store that counts: the one that was given, or this policy's own."""
        return memory_limits(self.algorithm) if self.store is None else self.store

    @cached_property
    def _plans(self) -> "_Plans":
        return self._shared(1)

    def _shared(self, replicas: int) -> "_Plans":
        """The limits of one of so many processes."""

        def plan(option: str) -> Plan | None:
            text = getattr(self, option)
            if text is None:
                return None
            windows = tuple(w._replace(limit=max(w.limit // replicas, 1)) for w in _windows(option, text))
            overflow = f"!{self.name} overflow {option}"
            return Plan(
                name=f"{self.name}-{option}",
                windows=windows,
                algorithm=self.algorithm,
                anonymous=True,  # in a store that is shared, a flood leaves room for callers that are known
                overflow=overflow,
            )

        return _Plans(cast("Plan", plan("addresses")), plan("credentials"), plan("everywhere"))

    @cached_property
    def _local(self) -> "tuple[LimitStore, _Plans]":
        """What this process counts by while the store is away."""
        return memory_limits(self.algorithm), self._shared(self.expected_replicas or 1)

    @cached_property
    def _failures(self) -> StoreFailures:
        return StoreFailures("failure_store_failed")

    @cached_property
    def _accepted(self) -> "_Lately":
        """Digests of credentials. Only right ones get in, so that no flood pushes one out."""
        return _Lately(self.accepted)

    @cached_property
    def _blocked(self) -> "_Lately":
        """Names that are over a limit."""
        return _Lately(_BLOCKED)

    @cached_property
    def _address(self) -> Addresses:
        return Addresses(self.trusted_proxies, self.ipv6_prefix)

    @cached_property
    def _names(self) -> tuple[bytes, ...]:
        return tuple(dict.fromkeys(name.lower().encode("ascii") for name in self.headers))

    @cached_property
    def _pairs(self) -> tuple[SubprotocolPair, ...]:
        return tuple(map(SubprotocolPair, dict.fromkeys(self.websocket_protocols)))

    @cached_property
    def _queries(self) -> tuple[bytes, ...]:
        return tuple(f"&{name}=".encode("ascii") for name in dict.fromkeys(self.ticket_queries))

    @cached_property
    def _remote(self) -> bool:
        return bool(getattr(self.counters, "remote", False))

    @cached_property
    def _guarded(self) -> "_Guarded":
        return _Guarded(frozenset(((id(self.counters), self.name),)))

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.counters),) if hasattr(self.counters, "aclose") else ()

    # --- the pass --------------------------------------------------------------------------------------------------

    def describe(self, operation: Operation, rule: Any) -> None:
        operation.answers(AUTH_FAILURES_EXCEEDED, headers=("Retry-After",), retry_after=12)
        if self._remote and self.on_store_loss == "closed":
            operation.answers(LIMITS_UNAVAILABLE, headers=("Retry-After",))

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        presented = [ex.headers[name] for name in self._names if name in ex.headers]
        if ex.kind == "websocket":
            presented += self._in_handshake(ex)
        if not presented:
            return None
        guarded, mine = ex.get(_Guarded), self._guarded
        if guarded is None:
            ex.give(mine)
        elif mine.counts <= guarded.counts:
            return None  # an outer one counts this exchange
        else:
            ex.give(_Guarded(guarded.counts | mine.counts))
        digest = None if any(map(is_ticket, presented)) else _digest(presented)
        attempt = _Attempt(presented, digest, ex.principal)
        ex.keep(self, attempt)
        now = ex.clock.monotonic()
        if digest is not None and self._accepted.left(digest, now):
            attempt.judged = True
            return None
        attempt.address = self._address(ex)
        wait = self._blocked.left(self._address_key(attempt), now)
        if wait:
            return _refusal(wait)
        if self._remote:
            return self._judge_later(ex, attempt)
        return self._judge(ex, attempt, self.counters, self._plans)

    def on_response(self, ex: Exchange, head: Head) -> None:
        attempt: _Attempt | None = ex.note(self)
        if attempt is not None:
            attempt.status = head.status

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        attempt: _Attempt | None = ex.note(self)
        if attempt is None or not attempt.judged:
            return None
        if not _has_failed(ex, attempt):
            principal = ex.principal
            if principal is not None and principal is not attempt.principal and attempt.digest is not None:
                # (A ticket has none: it is accepted once, and would only push out what comes again.)
                self._accepted.add(attempt.digest, ex.clock.monotonic() + self.accepted_for)
            return None
        if attempt.digest is not None:
            self._accepted.discard(attempt.digest)
        attempt.address = attempt.address or self._address(ex)
        if self._remote:
            return self._count_later(ex, attempt)
        self._count(ex, attempt, self.counters, self._plans)
        return None

    # --- parts of it -----------------------------------------------------------------------------------------------

    def _in_handshake(self, ex: Exchange) -> list[bytes]:
        """Credentials where browsers can put them. What cannot be read is refused with 400, and no guess."""
        found = []
        for pair in self._pairs:
            with suppress(ValueError):
                offered = pair.credential(ex)
                if offered is not None:
                    found.append(offered)
        if ex.query:
            query = b"&" + ex.query[:MAX_QUERY]
            for name in self._queries:
                _, stands, rest = query.partition(name)
                if stands:
                    found.append(rest.partition(b"&")[0])
        return found

    def _judge(self, ex: Exchange, attempt: "_Attempt", store: LimitStore, plans: "_Plans") -> Problem | None:
        """Ask a store in this process."""
        questions = self._questions(attempt, plans, ex.clock.monotonic())
        try:
            key, plan = next(questions)
            while True:
                key, plan = questions.send(cast("Decision", store.admit(key, plan, 0, None, ex.clock.time())))
        except StopIteration as answer:
            attempt.judged = not answer.value
            return _refusal(answer.value) if answer.value else None

    async def _judge_later(self, ex: Exchange, attempt: "_Attempt") -> Problem | None:
        """Ask a store on another machine."""
        questions = self._questions(attempt, self._plans, ex.clock.monotonic())
        try:
            key, plan = next(questions)
            while True:
                decision = await cast("Awaitable[Decision]", self.counters.admit(key, plan, 0, None, ex.clock.time()))
                key, plan = questions.send(decision)
        except StopIteration as answer:
            attempt.judged = not answer.value
            return _refusal(answer.value) if answer.value else None
        except Exception as error:  # noqa: BLE001  a store is somebody else's, and may raise anything
            wait = self._failures.report(self.counters, error, ex.clock)
            if self.on_store_loss == "local":
                return self._judge(ex, attempt, *self._local)
            if self.on_store_loss == "open":
                attempt.judged = True
                return None
            return LIMITS_UNAVAILABLE("Limits cannot be checked at the moment.", retry_after=wait)

    def _questions(
        self, attempt: "_Attempt", plans: "_Plans", now: float
    ) -> Generator[tuple[str, Plan], Decision, float]:
        """What has to be known of a store, one thing after the other; returns for how long to refuse.

        Each question is asked only if the one before found failures: there can be none without. An answer under another
        name comes from a store that is full: these are others' failures.
        """
        key = self._address_key(attempt)
        decision = yield key, plans.addresses
        if decision.key != key or not _spent(decision, plans.addresses):
            return 0.0
        wait = _wait(decision, plans.addresses, 0)
        credential = attempt.credential
        if not wait and plans.credentials is not None and credential is not None:
            key = self._credential_key(attempt, credential)
            wait = self._blocked.left(key, now)
            if wait:
                return wait
            decision = yield key, plans.credentials
            if decision.key != key or not _spent(decision, plans.credentials):
                return 0.0
            wait = _wait(decision, plans.credentials, 0)
            if not wait and plans.everywhere is not None and credential.owned:
                anywhere_key = self._everywhere_key(credential)
                anywhere = yield anywhere_key, plans.everywhere
                if anywhere.key == anywhere_key and _wait(anywhere, plans.everywhere, 0):
                    # Under attack, and from here it has been wrong already.
                    wait = _wait(decision, plans.credentials, None)
        if wait and plans is self._plans:
            # What one process's share says holds no longer than the store is away.
            self._blocked.add(key, now + wait)
        return wait

    def _counted(self, attempt: "_Attempt", plans: "_Plans") -> Iterable[tuple[str, Plan]]:
        """Under which names a failure counts, by which plan."""
        yield self._address_key(attempt), plans.addresses
        credential = attempt.credential
        if credential is not None and plans.credentials is not None:
            yield self._credential_key(attempt, credential), plans.credentials
            if credential.owned and plans.everywhere is not None:
                yield self._everywhere_key(credential), plans.everywhere

    def _count(self, ex: Exchange, attempt: "_Attempt", store: LimitStore, plans: "_Plans") -> None:
        for key, plan in self._counted(attempt, plans):
            store.charge(key, plan, (1,) * len(plan.windows), ex.clock.time())

    async def _count_later(self, ex: Exchange, attempt: "_Attempt") -> None:
        now = ex.clock.time()
        try:
            for key, plan in self._counted(attempt, self._plans):
                await cast("Awaitable[Any]", self.counters.charge(key, plan, (1,) * len(plan.windows), now))
        except Exception as error:  # noqa: BLE001  as above
            self._failures.report(self.counters, error, ex.clock)
            if self.on_store_loss == "local":
                self._count(ex, attempt, *self._local)

    # No counter of a `RateLimit` begins with an exclamation mark.
    def _address_key(self, attempt: "_Attempt") -> str:
        return f"!{self.name} address {attempt.address}"

    def _credential_key(self, attempt: "_Attempt", credential: "_Credential") -> str:
        return f"!{self.name} credential {credential.name} {attempt.address}"

    def _everywhere_key(self, credential: "_Credential") -> str:
        return f"!{self.name} everywhere {credential.name}"


class _Guarded(NamedTuple):
    """Which counts of failures watch this exchange already. Given by `AuthFailureLimit`."""

    counts: frozenset[tuple[int, str]]


class _Plans(NamedTuple):
    """The three limits."""

    addresses: Plan
    credentials: Plan | None
    everywhere: Plan | None


class _Credential(NamedTuple):
    """What can be known of a credential before it is verified: a digest of its `name`, and whether that is of one
    owner."""

    name: str
    owned: bool


class _Attempt:
    """What one exchange presents, and how it ended. `judged` is whether it was let through to be verified."""

    __slots__ = ("_known", "_presented", "address", "digest", "judged", "principal", "status")

    def __init__(self, presented: list[bytes], digest: bytes | None, principal: Principal | None) -> None:
        self._presented = presented
        self._known: tuple[_Credential | None] | None = None
        self.address = ""
        self.digest = digest
        self.principal = principal
        self.judged = False
        self.status: int | None = None

    @property
    def credential(self) -> _Credential | None:
        """Looked for when somebody asks, and once."""
        if self._known is None:
            # An API key before a token: nobody tries out keys under the cover of a token.
            found = filter(None, map(_credential, self._presented))
            self._known = (max(found, key=attrgetter("owned"), default=None),)
        return self._known[0]


class _Lately:
    """Until when something holds, by name: bounded, in two generations, of which the older one is forgotten when the
    younger one has half of `size`."""

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, size: int) -> None:
        self._half = -(-size // 2)
        self._young: dict[Any, float] = {}
        self._old: dict[Any, float] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __repr__(self) -> str:
        return f"_Lately({len(self)} names)"

    def left(self, name: bytes | str, now: float) -> float:
        """For how many seconds it holds still; 0 if it does not."""
        until = self._young.get(name)
        if until is None:
            until = self._old.get(name, 0.0)
        return until - now if until > now else 0.0

    def add(self, name: bytes | str, until: float) -> None:
        if not self._half:
            return
        if name not in self._young and len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[name] = until

    def discard(self, name: bytes | str) -> None:
        self._young.pop(name, None)
        self._old.pop(name, None)


def _has_failed(ex: Exchange, attempt: _Attempt) -> bool:
    if ex.refused_by is None or NonceRequired in ex:
        return False  # who is only asked for a nonce has proved all else
    if attempt.status is not None:
        # `Scopes` asks for a further credential; what was presented is right.
        return attempt.status == 401 and (ex.refused_by != "Scopes" or ex.principal is None)
    # Closed before it was accepted, and no status was to be seen.
    unknown = ex.principal is None
    return ex.kind == "websocket" and unknown and (ex.refused_by in _AUTHENTICATORS or ex.refused_by == "Scopes")


def _refusal(wait: float) -> Problem:
    return AUTH_FAILURES_EXCEEDED("Too many failed authentications.", retry_after=wait)


def _digest(presented: list[bytes]) -> bytes | None:
    """Names exactly what was presented; None for what is longer than any credential."""
    if len(presented) == 1:
        value = presented[0]
        return sha256(value).digest() if len(value) <= _LONGEST else None
    if sum(map(len, presented)) > _LONGEST:
        return None
    return sha256(b"".join([b"%d:%b" % (len(value), value) for value in presented])).digest()


def _credential(value: bytes) -> _Credential | None:
    """What the value of a header says of the credential in it. Nothing is decoded: that would cost as much as it is to
    save, and whoever makes tokens up writes what they like."""
    if len(value) > _LONGEST:
        return None
    token = value
    if value[:7].lower() == b"bearer ":
        token = value[7:].lstrip(b" ")
    elif value[:5].lower() == b"dpop ":
        token = value[5:].lstrip(b" ")
    if len(token) > MAX_TOKEN:
        return None
    known = key_id(token)
    if known is not None:
        return _Credential(_named("key", known.encode()), True)
    # The header of a token names algorithm and key: an issuer writes the same one into all that it signs with a key.
    header, dot, _ = token.partition(b".")
    return _Credential(_named("token", header), False) if dot and header else None


def _named(kind: str, name: bytes) -> str:
    return f"{kind}-{sha256(name).hexdigest()[:32]}"


def _spent(decision: Decision, plan: Plan) -> bool:
    """Whether there was a failure in any window."""
    rows = zip(decision.remaining, plan.windows, strict=True)
    return any(left < window.limit for left, window in rows)


def _wait(decision: Decision, plan: Plan, least: int | None) -> float:
    """How long until no window has as little as `least` left (None: until none has a failure); 0 if none has."""
    rows = zip(decision.remaining, decision.reset, plan.windows, strict=True)
    ends = [end for left, end, window in rows if left <= (window.limit - 1 if least is None else least)]
    return max(max(ends) - decision.at, 1.0) if ends else 0.0


def _windows(option: str, text: str) -> tuple[Window, ...]:
    try:
        items = limit_strings.parse_many(text)
    except ValueError:
        raise ValueError(f"{option} {text!r} must be like '20/minute;200/hour' or '5 per 15 minutes'") from None
    found = tuple(Window(item.amount, item.get_expiry(), name=item.GRANULARITY.name) for item in items)
    if len({window.seconds for window in found}) < len(found):
        raise ValueError(f"{option} {text!r} has two limits for one length of time; keep the smaller one")
    if not all(1 <= window.limit <= 1_000_000_000 and window.seconds >= 1 for window in found):
        raise ValueError(f"{option} {text!r}: a limit is 1 to 1000000000 in at least one second")
    return found

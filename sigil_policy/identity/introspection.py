"""Token introspection: the authorization server is asked what an opaque token means, and its answers are remembered.

    BearerAuth(introspection=Introspection(
        url="https://auth.example.com/introspect",
        issuer="https://auth.example.com",
        audience="sigil-api",
        client_id="sigil-api",
        client_secret=SecretStr(os.environ["INTROSPECTION_SECRET"]),
    ))

What holds:

* **A revoked token ends in time.** An answer is used for `cache_seconds` after it was asked for, and never beyond the
  token's `exp`. Measured by a clock that nobody can set back. A WebSocket asks anew for as long as it lasts, and ends
  with its token.
* **Hardly any request waits.** One call serves all who wait for the same token. From 80 % of `cache_seconds` on, a
  request that has already had its response asks anew. A call ends at its `deadline`, and is not given up when the
  request that makes it is.
* **Invented tokens cost the endpoint little.** A refusal is remembered for `refused_seconds`, apart from the good
  answers, which it cannot push out. Tokens that are not known to have been active are asked about `burst` at once, then
  `rate` in a second, in each process and whatever is presented; over that 503 with `Retry-After`. A call that a closed
  connection took with it is made once more.
* **Who is known goes on.** Tokens that were active when they were last asked about count against neither of these, and
  half of `max_concurrent` calls are theirs alone. A flood can make new tokens wait, and no others: put
  `AuthFailureLimit` outside to meet it by address.
* **The endpoint is away**: 503 with `Retry-After`, never 401. Where nobody answers, or the answer is 401, 429, 502, 503
  or 504, the endpoint is asked again after `retry` seconds, or what its `Retry-After` says, at most a minute. This is
  found out for known and for other tokens apart: nobody can make up a token that takes the endpoint from known ones.
  Any other answer that is none concerns its token alone, which is asked about again after `retry` seconds.
  `stale_if_error` says for how long a good answer is used beyond its time meanwhile (default 0: not at all, for a
  revocation would be missed).

The answer is read as strictly as a token: `application/json` with status 200, one JSON object without duplicate
members, `active` a boolean. A member that is there must be right: `iss` (exactly), `aud`, `exp`, `nbf`, `iat`, `scope`,
`token_type` (Bearer; DPoP where it names a key in `cnf`). `sub` may be missing, as it is for a client that acts for
itself: then `client_id` is the subject; never `username`, which people can choose and change. A response that is signed
(RFC 9701) is not understood, and not asked for.

RFC 7662; client authentication as in RFC 6749 section 2.3.1, or by a bearer token (RFC 6750).
"""

import logging
import math
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar
from urllib.parse import quote_plus, urlencode

from anyio import CancelScope, Semaphore, fail_after, move_on_after, to_thread
from anyio.lowlevel import checkpoint, current_token
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.clock import Clock
from sigil_policy.core.facts import Principal
from sigil_policy.identity.fields import CONFIG
from sigil_policy.identity.flights import Flight
from sigil_policy.identity.issuers import ClaimRules, Reading, Text
from sigil_policy.identity.provider import (
    ProviderError,
    check_url,
    load_client,
    make_client,
    read_body,
    read_object,
    trust,
)
from sigil_policy.identity.tokens import TokenError, frozen, judge
from sigil_policy.wire.authorization import is_token68

Value = TypeVar("Value")
AuthMethod = Literal["client_secret_basic", "client_secret_post"]
Credential = Annotated[SecretStr, Field(min_length=1, max_length=8_192)]

_AHEAD = 0.8
_LINE = 1_024
_ATTEMPTS = 3
_LONGEST_PAUSE = 60.0
_AWAY = frozenset((401, 429, 502, 503, 504))
_SECONDS = re.compile(r"[0-9]{1,9}")
# A JWT as its compact form looks from the outside: three parts of base64url, the signature possibly empty.
_JWT = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")

logger = logging.getLogger("sigil_policy")


class IntrospectionUnavailableError(Exception):
    """Nobody can say now what a token means; after `retry_after` seconds it is worth another try."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the token cannot be introspected now")
        self.retry_after = max(1, math.ceil(retry_after))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Introspection(ClaimRules):
    """An authorization server's introspection endpoint (RFC 7662). All times are in seconds.

        Introspection(url="https://auth.example.com/introspect", issuer="https://auth.example.com",
                      audience="api", client_id="api", client_secret=SecretStr(os.environ["INTROSPECTION_SECRET"]))

    Options:
        url: where it is, over https.
        issuer: whose tokens they are. An answer that has an `iss` must have exactly this one.
        audience: the `aud` that an answer must have; several: any of them. None: answers must have none, and every
            token that the endpoint knows is accepted, whomever it was issued for.
        client_id, client_secret: what the endpoint knows this service by.
        auth_method: how they are sent: `"client_secret_basic"` (default) or `"client_secret_post"`.
        access_token: a bearer token that the endpoint takes in place of id and secret (default None).
        leeway, max_lifetime, scope_claims, roles, tier_claim, client_tiers, tier: as `Issuer` has them.
        accept_tokens_without_end: take an answer without `exp` (default False: it is refused). Such a token holds until
            the endpoint calls it inactive, and ends no WebSocket.
        introspect_jwts: ask about tokens that look like a JWT, too (default False: they are never sent). Not beside
            `issuers`.
        cache_seconds: for how long an active token is not asked about again, 0 to 3,600 (default 30; 0: requests share
            the answer that they wait for, and no other).
        refused_seconds: for how long a refused one is not, 0 to 300 (default 10).
        cache_size: how many answers of each kind are remembered, 2 to 1,000,000 (default 10,000).
        stale_if_error: for how long an active token goes on beyond `cache_seconds` while the endpoint fails, 0 to
            86,400 (default 0). A revocation is missed as long.
        deadline: for a call, and as long again for the wait until it is made, 0.1 to 30 (default 3).
        retry: between two attempts while the endpoint fails, 1 to 300 (default 5).
        burst: how many tokens that are not known are asked about at once, 1 to 100,000 (default 200).
        rate: how many more in each second, 0.01 to 10,000 (default 50).
        max_concurrent: calls on their way at once, 2 to 100 (default 16). Of each kind of tokens 1,024 are in line.
        max_bytes: a longer answer is not read, 1,024 to 1,048,576 (default 16,384).
        allow_insecure_loopback: take `http` to this machine's loopback, for tests (default False).
        transport: an `httpx2.AsyncBaseTransport` to ask through, for a proxy or a private CA (default None: direct,
            with the certificates that the machine trusts). It is closed with the application.

    Raises `ValidationError` (a `ValueError`) for a URL that is not https and for credentials that are missing or two,
    `ImportError` without the extra `identity`.
    """

    url: Annotated[str, Field(max_length=2_048)]
    issuer: Text
    client_id: Text | None = None
    client_secret: Credential | None = None
    auth_method: AuthMethod = "client_secret_basic"
    access_token: Credential | None = None
    accept_tokens_without_end: bool = False
    introspect_jwts: bool = False
    cache_seconds: Annotated[float, Field(ge=0, le=3_600)] = 30.0
    refused_seconds: Annotated[float, Field(ge=0, le=300)] = 10.0
    cache_size: Annotated[int, Field(ge=2, le=1_000_000)] = 10_000
    stale_if_error: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    deadline: Annotated[float, Field(ge=0.1, le=30)] = 3.0
    retry: Annotated[float, Field(ge=1, le=300)] = 5.0
    burst: Annotated[int, Field(ge=1, le=100_000)] = 200
    rate: Annotated[float, Field(ge=0.01, le=10_000)] = 50.0
    max_concurrent: Annotated[int, Field(ge=2, le=100)] = 16
    max_bytes: Annotated[int, Field(ge=1_024, le=1_048_576)] = 16_384
    allow_insecure_loopback: bool = False
    transport: Any = Field(default=None, repr=False)

    @field_validator("issuer")
    @classmethod
    def _one_word(cls, issuer: str) -> str:
        if not issuer.isprintable() or " " in issuer:
            raise ValueError("issuer is the exact value of iss, for example 'https://auth.example.com'")
        return issuer

    @model_validator(mode="after")
    def _usable(self) -> "Introspection":
        danger = "whoever reads them on the way can use them"
        check_url(self.url, loopback=self.allow_insecure_loopback, goods="tokens go", danger=danger)
        both = self.client_id is not None and self.client_secret is not None
        if both is (self.access_token is not None) or (self.client_id is None) is not (self.client_secret is None):
            raise ValueError("the endpoint takes client_id= and client_secret=, or access_token= in their place")
        if self.access_token is not None:
            token = self.access_token.get_secret_value()
            if not token.isascii() or not is_token68(token.encode()):
                raise ValueError("access_token has characters that no bearer token has (RFC 6750 section 2.1)")
        httpx2 = load_client()
        if self.transport is not None and not isinstance(self.transport, httpx2.AsyncBaseTransport):
            raise ValueError("transport is an httpx2.AsyncBaseTransport, for example httpx2.AsyncHTTPTransport(...)")
        _ = self.introspector
        return self

    @cached_property
    def introspector(self) -> "Introspector":
        """What is known of its tokens, shared by all who were given this value."""
        return Introspector(self)

    def takes(self, token: bytes) -> bool:
        """Whether `token` is one to ask about."""
        return self.introspect_jwts or _JWT.fullmatch(token) is None

    @property
    def named(self) -> str:
        return self.issuer

    def _subject(self, claims: Mapping[str, Any]) -> Any:
        return claims["sub"] if "sub" in claims else claims.get("client_id")

    def _end(self, claims: Mapping[str, Any]) -> float:
        if self.accept_tokens_without_end and "exp" not in claims:
            return math.inf
        return super()._end(claims)

    def read(self, claims: Mapping[str, Any]) -> Reading:
        # First: of an inactive token nothing else is said (RFC 7662 section 2.2).
        if claims.get("active") is not True:
            raise ValueError("inactive")
        return super().read(claims)

    def _check_profile(self, claims: Mapping[str, Any]) -> None:
        if "iss" in claims and claims["iss"] != self.issuer:
            raise ValueError("iss")
        if "token_type" in claims:
            kind = claims["token_type"]
            # Not a refresh token, nor one of a kind that is presented in another way (RFC 7662 section 2.2).
            if not isinstance(kind, str) or kind.lower() not in ("bearer", "dpop"):
                raise ValueError("token_type")
            if kind.lower() == "dpop" and not _is_bound(claims):
                raise ValueError("cnf")

    def credentials(self) -> tuple[dict[str, str], dict[str, str]]:
        """What says who asks: members of the form, and header fields."""
        if self.access_token is not None:
            return {}, {"authorization": f"Bearer {self.access_token.get_secret_value()}"}
        name = self.client_id or ""
        secret = self.client_secret.get_secret_value() if self.client_secret is not None else ""
        if self.auth_method == "client_secret_post":
            return {"client_id": name, "client_secret": secret}, {}
        # RFC 6749 section 2.3.1: each form-encoded first, so that a colon or an umlaut arrives as what it is.
        pair = f"{quote_plus(name)}:{quote_plus(secret)}".encode("ascii")
        return {}, {"authorization": f"Basic {b64encode(pair).decode('ascii')}"}


def _is_bound(claims: Mapping[str, Any]) -> bool:
    """Whether the token is bound to a key that proves itself (RFC 9449 section 6.2)."""
    confirmation = claims.get("cnf")
    return isinstance(confirmation, Mapping) and isinstance(confirmation.get("jkt"), str)


class ActiveToken:
    """What the endpoint said of an active token, and when it was asked (by the monotonic clock)."""

    __slots__ = ("_principals", "asked", "claims", "reading")

    def __init__(self, reading: Reading, claims: Mapping[str, Any], asked: float) -> None:
        self.reading = reading
        self.claims = claims
        self.asked = asked
        self._principals: dict[str, Principal] = {}

    def principal(self, rules: ClaimRules, realm: str) -> Principal:
        """The caller: the same one for every request of `realm`, until the token is asked about again."""
        known = self._principals.get(realm)
        if known is None:
            known = self._principals[realm] = rules.principal(self.reading, self.claims, realm)
        return known


class _Recent(Generic[Value]):
    """Values by digest: bounded, in two generations, of which the older is forgotten when the younger is full."""

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, size: int) -> None:
        self._half = size // 2
        self._young: dict[bytes, Value] = {}
        self._old: dict[bytes, Value] = {}

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    def get(self, digest: bytes) -> Value | None:
        found = self._young.get(digest)
        if found is None:
            found = self._old.get(digest)
            if found is not None:
                self.put(digest, found)
        return found

    def put(self, digest: bytes, value: Value) -> None:
        if digest not in self._young and len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[digest] = value

    def discard(self, digest: bytes) -> None:
        self._young.pop(digest, None)
        self._old.pop(digest, None)


class _AwayError(ProviderError):
    """The endpoint answers nobody now, and says perhaps for how long."""

    def __init__(self, complaint: str, wait: float = 0.0) -> None:
        super().__init__(complaint)
        self.wait = wait


class _Lane:
    """One of two ways to the endpoint: for tokens that are known, and for all others."""

    __slots__ = ("quiet", "resting", "told")

    def __init__(self) -> None:
        self.resting = self.quiet = -math.inf
        self.told: str | None = None


class _Call(Flight):
    """One call on its way. `answer` is what came of it; None where the event loop has ended it."""

    __slots__ = ("answer",)

    def __init__(self) -> None:
        super().__init__()
        self.answer: ActiveToken | TokenError | IntrospectionUnavailableError | None = None


class _Harbour:
    """What belongs to one event loop: connections, and the calls that are on their way."""

    __slots__ = ("client", "flights", "lines", "loop", "slots")

    def __init__(self, calls: int) -> None:
        self.loop: object = current_token()
        self.client: Any = None
        self.flights: dict[bytes, _Call] = {}
        # A call for a token that nobody knows never takes the place of one for a token that is known.
        new = calls // 2
        self.slots = {True: Semaphore(calls - new), False: Semaphore(new)}
        self.lines = {True: _LINE, False: _LINE}


class Introspector:
    """What is known of one endpoint's tokens. Durations are measured by the exchange's clock.

    `recall` is asked for every token and never waits; `obtain` asks the endpoint, `refresh` does so ahead of time. A
    token is named by its SHA-256 digest, and not kept.
    """

    def __init__(self, options: Introspection) -> None:
        self._options = options
        self._active: _Recent[ActiveToken] = _Recent(options.cache_size)
        # Until when, and whether that is a refusal; else nobody could say.
        self._others: _Recent[tuple[float, bool]] = _Recent(options.cache_size)
        self._lanes = {True: _Lane(), False: _Lane()}
        self._arrival = -math.inf
        self._harbour: _Harbour | None = None
        self._url = load_client().URL(options.url)

    def __repr__(self) -> str:
        return f"Introspector({self._options.url!r}, {len(self._active)} active tokens)"

    # --- what is known now, without waiting ------------------------------------------------------------------------

    def recall(self, digest: bytes, clock: Clock) -> ActiveToken | None:
        """What is known of the token; None if the endpoint has to be asked.

        Raises `TokenError` for one that it has refused, `IntrospectionUnavailableError` where it cannot be asked now.
        """
        found, now = self._active.get(digest), clock.monotonic()
        if found is not None and now < found.asked + self._options.cache_seconds and _holds(found, clock):
            return found
        other = self._others.get(digest)
        if other is not None and other[1] and now < other[0]:
            raise TokenError("inactive")
        wait = self._wait(digest, known=found is not None, now=now)
        if wait <= 0 or self._on_its_way(digest) is not None:
            return None
        if self._may_stay(found, clock):
            return found
        raise IntrospectionUnavailableError(wait)

    def fresh_for(self, found: ActiveToken, clock: Clock) -> float:
        """For how many seconds an answer need not be asked for again; at least one."""
        return max(1.0, found.asked + self._options.cache_seconds - clock.monotonic())

    def is_due(self, digest: bytes, clock: Clock) -> bool:
        """Whether it is time to ask about a token that is in use, and nobody does."""
        found, now = self._active.get(digest), clock.monotonic()
        if found is None:
            return False
        lifetime = self._options.cache_seconds
        if not found.asked + _AHEAD * lifetime <= now < found.asked + lifetime:
            return False
        return self._wait(digest, known=True, now=now) <= 0 and self._on_its_way(digest) is None

    def _may_stay(self, found: ActiveToken | None, clock: Clock) -> bool:
        """Whether an answer is used beyond its time, because there is none that is newer."""
        stale = self._options.stale_if_error
        if found is None or not stale:
            return False
        return clock.monotonic() < found.asked + self._options.cache_seconds + stale and _holds(found, clock)

    def _wait(self, digest: bytes, *, known: bool, now: float) -> float:
        """Seconds until the endpoint may be asked about the token."""
        wait = max(0.0, self._lanes[known].resting - now)
        other = self._others.get(digest)
        if other is not None:
            wait = max(wait, other[0] - now)
        if not known:
            # A token bucket: `burst` at once, then `rate` in a second, whoever presents whatever.
            options = self._options
            wait = max(wait, max(self._arrival, now) - now - (options.burst - 1) / options.rate)
        return wait

    def _on_its_way(self, digest: bytes) -> _Call | None:
        """The call to wait for. One on another event loop, which may have ended with it, is nobody's to wait for."""
        call = None if self._harbour is None else self._harbour.flights.get(digest)
        return call if call is not None and call.loop == current_token() else None

    def _here(self) -> _Harbour:
        """Connections and calls of this event loop. Those of another may have ended with it."""
        harbour = self._harbour
        if harbour is None or harbour.loop != current_token():
            harbour = self._harbour = _Harbour(self._options.max_concurrent)
        return harbour

    # --- asking ----------------------------------------------------------------------------------------------------

    async def refresh(self, token: bytes, digest: bytes, clock: Clock) -> None:
        """Ask if it is due. Tells of a failure nobody but the log; who comes next is told what there is to tell."""
        if self.is_due(digest, clock):
            await self._depart(token, digest, clock)

    async def obtain(self, token: bytes, digest: bytes, clock: Clock) -> ActiveToken:
        """Wait for what the endpoint says; one call serves all who wait.

        Raises `TokenError` for a token that it refuses, `IntrospectionUnavailableError` where it does not say.
        """
        for _ in range(_ATTEMPTS):
            found = self.recall(digest, clock)
            if found is not None:
                return found
            flight = self._on_its_way(digest)
            if flight is None:
                flight = await self._depart(token, digest, clock)
            else:
                await flight.done.wait()
            answer = flight.answer
            if isinstance(answer, ActiveToken):
                return answer
            if isinstance(answer, TokenError):
                raise TokenError(answer.reason)
            if isinstance(answer, IntrospectionUnavailableError):
                found = self._active.get(digest)
                if found is not None and self._may_stay(found, clock):
                    return found
                raise IntrospectionUnavailableError(answer.retry_after)
            # The event loop itself has ended the call. Whoever waits tries again, within bounds.
        raise IntrospectionUnavailableError(1)

    async def _depart(self, token: bytes, digest: bytes, clock: Clock) -> _Call:
        """Make a call, and wait until it has ended."""
        harbour, flight, now = self._here(), _Call(), clock.monotonic()
        known = self._active.get(digest) is not None
        wait = self._wait(digest, known=known, now=now)
        if wait <= 0 and not harbour.lines[known]:
            wait = 1.0
        if wait > 0:
            flight.answer = IntrospectionUnavailableError(wait)
            return flight
        if not known:
            self._arrival = max(self._arrival, now) + 1 / self._options.rate
        harbour.lines[known] -= 1
        harbour.flights[digest] = flight

        def land() -> None:
            harbour.lines[known] += 1
            del harbour.flights[digest]

        # As for key sets: those who leave cannot end it for the others.
        await flight.fly(lambda: self._fly(flight, harbour, token, digest, clock, known=known), land)
        return flight

    async def _fly(
        self, flight: _Call, harbour: _Harbour, token: bytes, digest: bytes, clock: Clock, *, known: bool
    ) -> None:
        options, slots = self._options, harbour.slots[known]
        # Shielded: a client that leaves takes nothing from those who wait with it. The deadlines bound it.
        with CancelScope(shield=True):
            with move_on_after(options.deadline) as line:
                await slots.acquire()
            if line.cancelled_caught:
                # It was not asked about, and nothing was found out: there are too many before it.
                flight.answer = IntrospectionUnavailableError(1)
                return
            try:
                flight.answer = await self._call(harbour, token, digest, clock, known=known)
            finally:
                slots.release()

    async def _call(
        self, harbour: _Harbour, token: bytes, digest: bytes, clock: Clock, *, known: bool
    ) -> ActiveToken | TokenError | IntrospectionUnavailableError:
        options, asked = self._options, clock.monotonic()
        try:
            with fail_after(options.deadline):
                claims = await self._ask(harbour, token)
        except _AwayError as error:
            return self._rest(known, str(error), error.wait, clock)
        except ProviderError as error:
            # This token's own trouble: whoever makes one up that the endpoint cannot bear takes it from nobody else.
            self._others.put(digest, (clock.monotonic() + options.retry, False))
            self._tell(known, str(error), clock)
            return IntrospectionUnavailableError(options.retry)
        except TimeoutError:
            return self._rest(known, f"gives no answer within {options.deadline:g} seconds", 0.0, clock)
        except Exception as error:  # noqa: BLE001
            # What a network can do to a client has no end, and no request may fail with it.
            return self._rest(known, f"cannot be reached ({type(error).__name__})", 0.0, clock)
        self._content(known)
        return self._take(digest, claims, asked, clock)

    async def _ask(self, harbour: _Harbour, token: bytes) -> Mapping[str, Any]:
        client = harbour.client
        if client is None:
            options = self._options
            if options.transport is None and not trust.cache_info().currsize:
                await to_thread.run_sync(trust)
            client = harbour.client
            if client is None:
                client = make_client(options.transport, True if options.transport is not None else trust())
                harbour.client = client
        httpx2 = load_client()
        await checkpoint()
        try:
            return await self._post(client, token)
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
            # Most likely a connection that was kept open, and that the endpoint has closed at this moment. To ask twice
            # changes nothing there.
            return await self._post(client, token)

    async def _post(self, client: Any, token: bytes) -> Mapping[str, Any]:
        """Everything of the answer that is used; what is wrong with it is a `ProviderError`."""
        options = self._options
        members, fields = options.credentials()
        form = urlencode({"token": token.decode("ascii"), "token_type_hint": "access_token", **members})
        headers = {
            "accept": "application/json",
            "accept-encoding": "identity",
            "content-type": "application/x-www-form-urlencoded",
            **fields,
        }
        async with client.stream("POST", self._url, content=form.encode("ascii"), headers=headers) as response:
            status = response.status_code
            if status in _AWAY:
                # RFC 7662 section 2.3: 401 is about this service, not about the token.
                complaint = "refuses the credentials of this service (401)" if status == 401 else f"answers {status}"
                raise _AwayError(complaint, _retry_after(response.headers))
            if status != 200:
                # A redirection is none either: who could cause one would choose where tokens go.
                raise ProviderError("refuses this service (403)" if status == 403 else f"answers {status}")
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise ProviderError("answers compressed, which was not asked for")
            media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise ProviderError("answers with something that is not application/json")
            claims = read_object(await read_body(response, options.max_bytes))
        # Neither a word nor a number is a yes, nor is it a no: whoever answers so is not an introspection endpoint.
        if type(claims.get("active")) is not bool:
            raise ProviderError("answers without saying whether the token is active")
        return frozen(claims)

    def _take(self, digest: bytes, claims: Mapping[str, Any], asked: float, clock: Clock) -> ActiveToken | TokenError:
        try:
            found = ActiveToken(judge(self._options, claims, clock.time()), claims, asked)
        except TokenError as error:
            self._active.discard(digest)
            if self._options.refused_seconds:
                self._others.put(digest, (clock.monotonic() + self._options.refused_seconds, True))
            return error
        self._active.put(digest, found)
        return found

    # --- what the endpoint is like ---------------------------------------------------------------------------------

    def _rest(self, known: bool, complaint: str, wait: float, clock: Clock) -> IntrospectionUnavailableError:
        wait = max(self._options.retry, min(wait, _LONGEST_PAUSE))
        self._lanes[known].resting = clock.monotonic() + wait
        self._tell(known, complaint, clock)
        return IntrospectionUnavailableError(wait)

    def _tell(self, known: bool, complaint: str, clock: Clock) -> None:
        # Once for each change, and not more often than `retry`: what is presented must not fill a log.
        lane, now = self._lanes[known], clock.monotonic()
        if lane.told != complaint and now >= lane.quiet:
            lane.told, lane.quiet = complaint, now + self._options.retry
            logger.warning("the introspection endpoint of %s %s", self._options.issuer, complaint)

    def _content(self, known: bool) -> None:
        lane = self._lanes[known]
        if lane.told is not None:
            lane.told = None
            logger.info("the introspection endpoint of %s answers again", self._options.issuer)

    async def aclose(self) -> None:
        """Wait for the calls that are on their way, each to its deadline, and close the connections."""
        harbour, self._harbour = self._harbour, None
        if harbour is not None and harbour.loop == current_token():
            for flight in list(harbour.flights.values()):
                await flight.done.wait()
            if harbour.client is not None:
                await harbour.client.aclose()
                return
        if self._options.transport is not None:
            await self._options.transport.aclose()


def _holds(found: ActiveToken, clock: Clock) -> bool:
    # The wall clock may have been set back since: both ends are asked.
    return found.reading.not_before <= clock.time() < found.reading.not_after


def _retry_after(headers: Any) -> float:
    text = headers.get("retry-after", "").strip()
    return float(text) if _SECONDS.fullmatch(text) else 0.0

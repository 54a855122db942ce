"""Verifies bearer tokens: `Authorization: Bearer <JWT>` becomes the exchange's `Principal`.

    BearerAuth(issuers=[
        Issuer(
            url="https://auth.sigil.acti.ai",
            audience="sigil-api",
            keys=[Key(algorithm="HS256", secret=SecretStr(os.environ["JWT_SECRET"]))],
        ),
    ])

    BearerAuth(issuers=[Issuer(url="https://login.example.com", audience="sigil-api", discovery=True)])

    BearerAuth(introspection=Introspection(
        url="https://login.example.com/introspect",
        issuer="https://login.example.com",
        audience="sigil-api",
        client_id="sigil-api",
        client_secret=SecretStr(os.environ["INTROSPECTION_SECRET"]),
    ))

A token that is presented is verified or refused here (401 `invalid_token`; 400 for a header that is no bearer
credential). A caller without one goes on as nobody, and `Scopes`, further in, decides whether that will do; without
`Scopes`, write `required=True`. Verified tokens are remembered until they expire or the keys of an issuer change;
refused ones are not. Where a token needs keys that have to be fetched and cannot be had now: 503, not 401
(`identity/key_sets.py` says what holds). A token that is known waits for nothing.

Opaque tokens are introspected (RFC 7662): the authorization server is asked what a token means, and its answer holds
for `cache_seconds`. That goes for whatever does not look like a JWT, three parts of base64url; a JWT is verified by the
issuers' keys or refused, and never sent anywhere. What the endpoint refuses gets the same 401, and 503 where it does
not answer. A WebSocket is closed with 4401 when its token is refused later, or means less than it did; with 1013 when
nobody can say. `identity/introspection.py` says what holds, also in a flood of invented tokens.

Guarantees: whatever is presented, an answer is all that comes out; no answer says which check failed; a token's
algorithm never chooses the key; no token is kept, logged or shown. A token that is bound to its sender (`cnf`) is good
only from that one, in each request, and is refused where nobody can tell (`sender`). WebSocket handshakes obey the same
rules, and a connection whose token ends while it lasts is closed with code 4401.

Goes inside `Problems`, `BodyLimit` and `Timeout`, outside `Scopes` and `RateLimit`. RFC 6750, RFC 9110 section 11,
RFC 7519, RFC 7662, RFC 8725, RFC 9068.
"""

from collections.abc import Awaitable, Iterable
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sigil_policy.core.catalogue import (
    CREDENTIALS_CONFLICTING,
    CREDENTIALS_IN_QUERY,
    CREDENTIALS_MALFORMED,
    CREDENTIALS_MISSING,
    KEYS_UNAVAILABLE,
    PROOF_INVALID,
    PROOF_NONCE_REQUIRED,
    TOKEN_INVALID,
    http_problem,
)
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Closable, Close, Listed, Policy
from sigil_policy.core.problems import Problem, ProblemType
from sigil_policy.identity.challenges import (
    Challenges,
    HeaderLines,
    is_preflight,
    offer,
)
from sigil_policy.identity.dpop import DPoP
from sigil_policy.identity.endings import ENDED, close_for, until_credentials_end
from sigil_policy.identity.fields import HeaderName, Realm
from sigil_policy.identity.introspection import (
    ActiveToken,
    Introspection,
    IntrospectionUnavailableError,
    Introspector,
)
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import FetchedKeys, KeySet, KeysUnavailableError, Name
from sigil_policy.identity.presented import TicketUsed, TokenInHandshake
from sigil_policy.identity.senders import Sender, Senders
from sigil_policy.identity.subprotocols import SubprotocolPair
from sigil_policy.identity.tokens import KeyUnknownError, TokenCache, TokenError, TokenVerifier, VerifiedToken
from sigil_policy.wire.authorization import QueryNames, is_token68
from sigil_policy.wire.jws import MAX_TOKEN

_ACCESS_TOKEN = QueryNames("access_token")
_MAX_VALUE = len("Bearer ") + MAX_TOKEN


def _is_found(issuer: Issuer) -> bool:
    """Whether the issuer's own metadata says where its keys are."""
    return issuer.discovery or (isinstance(issuer.keys, KeySet) and issuer.keys.url is None)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


class BearerAuth(Policy):
    """Who presents a valid bearer token is the `Principal`; who presents an invalid one is refused.

        BearerAuth(issuers=[Issuer(url="https://auth.sigil.acti.ai", audience="sigil-api", keys=[key])])

    Answers 401 `AUTH_002` (the token), 400 `AUTH_003` (the header), 400 `AUTH_006` (two credentials), 400 `AUTH_007` (a
    token in the query), and with `required=True` 401 `AUTH_001` (no token); each with a `WWW-Authenticate` line. 503
    `AUTH_008` with `Retry-After`: the keys cannot be fetched now, or the token cannot be introspected. With `sender`
    also 401 `AUTH_010` (the proof), 401 `AUTH_011` (it takes a nonce), and 503 `SRV_503` with `Retry-After`: whether a
    proof was used before cannot be known now.
    """

    gives: ClassVar[tuple[type, ...]] = (Principal, Challenges)

    issuers: Annotated[Listed[Issuer], Field(max_length=256)] = ()
    """Whose tokens are accepted (default none: then give `introspection`). The keys of one never verify the tokens of
    another. Claims are read once the signature was verified. Only where keys of several issuers may have signed, and
    the `kid` does not tell which, they are read first; then those that take long are refused: over 64 objects and
    arrays, or 192 commas."""

    introspection: Introspection | None = None
    """Who is asked about tokens that do not look like a JWT (default None: they are refused)."""

    realm: Realm = "api"
    """The protection space that challenges name (default `"api"`)."""

    required: bool = False
    """Refuse callers without a token here, CORS preflights excepted (default False: that is for `Scopes` to decide)."""

    cache_size: Annotated[int, Field(ge=0, le=10_000_000)] = 10_000
    """How many verified tokens are remembered, about 1 kB each (default 10,000; 0: none)."""

    conflicts_with: HeaderName | None = "X-API-Key"
    """Refuse requests that carry this header beside `Authorization` (default `"X-API-Key"`). None: no header; where an
    outer policy knows the caller already, the token is verified all the same, and cosigns (`Exchange.principals`)."""

    foreign_prefix: Annotated[str, Field(min_length=1)] | None = None
    """Leave bearer tokens that begin so alone: `"sk_"` beside `ApiKeyAuth(bearer=True)` (default None: none)."""

    tolerate_leaked_query_tokens: bool = False
    """Let requests pass that carry `access_token=` in their query, where logs and histories keep it (default False:
    400). It is never used as a credential, either way (RFC 9700 section 4.3.2)."""

    sender: Annotated[Listed[Sender], BeforeValidator(_listed)] = ()
    """How the sender of a token that is bound to one (`cnf`) is confirmed, for every request anew: `DPoP(...)`,
    `ClientCertificate(...)`, or one of each (default none: bound tokens are refused). See `identity/senders.py`."""

    sender_required: bool = False
    """Refuse tokens that are bound to nobody (default False). Takes `sender`."""

    accept_bound_tokens_without_proof: bool = False
    """Accept tokens that are bound in a way for which there is no `sender` here, as if they were not (default False:
    401): whoever has stolen one can use it."""

    websocket_protocol: HeaderName | None = None
    """On a WebSocket also take the token behind this subprotocol, as a browser can send it (default None):
    `new WebSocket(url, ["sigil.bearer", token])` for `"sigil.bearer"`. See `identity/subprotocols.py`. Name it in
    `websocket_protocols` of `AuthFailureLimit` too, which counts guesses there."""

    @field_validator("issuers")
    @classmethod
    def _distinct(cls, issuers: tuple[Issuer, ...]) -> tuple[Issuer, ...]:
        if len({issuer.url for issuer in issuers}) != len(issuers):
            raise ValueError("two issuers have the same url; put the keys of both into one")
        return issuers

    @model_validator(mode="after")
    def _prepare(self) -> "BearerAuth":
        if not self.issuers and self.introspection is None:
            raise ValueError("nobody's tokens would be accepted: give issuers=, introspection=, or both")
        if self.issuers and self.introspection is not None and self.introspection.introspect_jwts:
            raise ValueError("introspect_jwts leaves nothing to issuers=: a JWT is introspected or verified, not both")
        _ = self._verifier, self._cache, self._rival, self._foreign, self._challenge
        _ = self._senders, self._invalid_request, self._trusted
        for keys in self._verifier.fetched.values():
            keys.watch(self._cache.clear)
        # A hook that has nothing to do here is taken out of the pass.
        if not self._verifier.fetched and self.introspection is None:
            object.__setattr__(self, "on_finish", None)
        if not self._senders.has_nonces and self._pair is None:
            object.__setattr__(self, "on_response", None)
        return self

    @cached_property
    def _verifier(self) -> TokenVerifier:
        # Before the cache: it has to know of changed keys before what they verified is forgotten.
        return TokenVerifier(self.issuers, realm=self.realm)

    @cached_property
    def _cache(self) -> TokenCache:
        return TokenCache(self.cache_size)

    @cached_property
    def _trusted(self) -> frozenset[str]:
        asked = () if self.introspection is None else (self.introspection.issuer,)
        return frozenset((*(issuer.url for issuer in self.issuers), *asked))

    @cached_property
    def _rival(self) -> bytes:
        # Never a header's name: without a rival the question is asked all the same, and the answer is no.
        return self.conflicts_with.lower().encode("ascii") if self.conflicts_with is not None else b""

    @cached_property
    def _foreign(self) -> bytes | None:
        return self.foreign_prefix.encode() if self.foreign_prefix is not None else None

    @cached_property
    def _pair(self) -> SubprotocolPair | None:
        return None if self.websocket_protocol is None else SubprotocolPair(self.websocket_protocol)

    @cached_property
    def _senders(self) -> Senders:
        return Senders(
            self.sender,
            realm=self.realm,
            required=self.sender_required,
            accept_bound_tokens_without_proof=self.accept_bound_tokens_without_proof,
        )

    @cached_property
    def _challenge(self) -> HeaderLines:
        return self._senders.challenge

    @cached_property
    def _invalid_request(self) -> HeaderLines:
        return self._senders.invalid_request

    def describe(self, operation: Operation, rule: Any) -> None:
        found = [issuer for issuer in self.issuers if _is_found(issuer)]
        for number, issuer in enumerate(found, start=1):
            operation.accepts(
                "OpenIdConnect" if len(found) == 1 else f"OpenIdConnect{number}",
                {
                    "type": "openIdConnect",
                    "openIdConnectUrl": f"{issuer.url.rstrip('/')}/.well-known/openid-configuration",
                    "description": "An access token of this issuer, in the header Authorization",
                },
                kind="bearer",
                issuers=frozenset((issuer.url,)),
            )
        others = [issuer.url for issuer in self.issuers if not _is_found(issuer)]
        if self.introspection is not None:
            others.append(self.introspection.named)
        if others:
            scheme = {"type": "http", "scheme": "bearer", "description": "An access token, in the header Authorization"}
            if self.introspection is None:
                scheme["bearerFormat"] = "JWT"
            operation.accepts("BearerToken", scheme, kind="bearer", issuers=frozenset(others))
        operation.required = operation.required or self.required
        if self.required:
            operation.answers(CREDENTIALS_MISSING, headers=("WWW-Authenticate",))
        operation.answers(TOKEN_INVALID, CREDENTIALS_MALFORMED, headers=("WWW-Authenticate",))
        if self.conflicts_with is not None:
            operation.answers(CREDENTIALS_CONFLICTING, headers=("WWW-Authenticate",))
        if not self.tolerate_leaked_query_tokens:
            operation.answers(CREDENTIALS_IN_QUERY, headers=("WWW-Authenticate",))
        if self._verifier.fetched or self.introspection is not None:
            operation.answers(KEYS_UNAVAILABLE, headers=("Retry-After",))
        if any(isinstance(sender, DPoP) for sender in self.sender):
            operation.answers(PROOF_INVALID, PROOF_NONCE_REQUIRED, headers=("WWW-Authenticate",))
            operation.answers(http_problem(503), headers=("Retry-After",))

    def on_request(self, ex: Exchange) -> Problem | Awaitable[Problem | None] | None:
        value = ex.headers.get(b"authorization")
        if ex.method == "OPTIONS" and is_preflight(ex):
            ex.anonymous()
            return None
        if ex.query and not self.tolerate_leaked_query_tokens and _ACCESS_TOKEN.found_in(ex.query):
            return self._bad_request(CREDENTIALS_IN_QUERY, "The query string carries an access token")
        if self._pair is not None:
            try:
                offered = self._pair.credential(ex)
            except ValueError:
                return self._bad_request(CREDENTIALS_MALFORMED, "The subprotocols carry no token")
            if offered is not None:
                if value is not None or (self._rival and TicketUsed in ex):
                    return self._bad_request(CREDENTIALS_CONFLICTING, "The handshake carries two credentials")
                value = b"Bearer " + offered
                if self._foreign is None or not offered.startswith(self._foreign):
                    ex.give(TokenInHandshake(self.websocket_protocol or ""))
        if value is None:
            if TokenInHandshake in ex:
                # An outer BearerAuth looks where this one does not, and may trust other issuers.
                return self._senders.refused(ex)
            return self._without_token(ex)
        if self._rival in ex.headers:
            return self._bad_request(CREDENTIALS_CONFLICTING, "The request carries two kinds of credentials")
        if b"authorization" in ex.repeated:
            return self._bad_request(CREDENTIALS_MALFORMED, "The request carries more than one Authorization header")
        known = ex.principal
        if known is not None and self._rival and all(map(_is_another, ex.principals)):
            return None  # an outer policy of another kind has answered for the caller
        if len(value) > _MAX_VALUE:
            # Nobody makes us copy what is too long anyway. Spaces in front of a token may be any number.
            return self._verify(ex, value if b"  " in value[:8] else value[: _MAX_VALUE + 1], None)
        # What is remembered is the whole field value: a token that is known needs no parsing at all.
        digest = sha256(value).digest()
        principal = self._cache.get(digest, ex.clock.time())
        if principal is None:
            return self._verify(ex, value, digest)
        if self._senders.active:
            return self._admit(ex, principal)
        if known is None:
            ex.authenticate(principal)
        else:
            _accept_again(ex, principal)
        return None

    def _verify(self, ex: Exchange, value: bytes, digest: bytes | None) -> Problem | Awaitable[Problem | None] | None:
        try:
            token = self._senders.token(value)
        except ValueError:
            return self._bad_request(CREDENTIALS_MALFORMED, "The Authorization header carries no token")
        if token is None or (self._foreign is not None and token.startswith(self._foreign)):
            if (token is not None or value[:5].lower() == b"dpop ") and not all(map(_is_another, ex.principals)):
                # An outer BearerAuth takes a scheme, or tokens, that this one does not, and may trust other issuers.
                return self._senders.refused(ex)
            return self._without_token(ex)
        if len(token) > MAX_TOKEN:
            return self._senders.refused(ex)
        if not is_token68(token):
            return self._bad_request(CREDENTIALS_MALFORMED, "The token has characters that no bearer token has")
        if self.introspection is not None and self.introspection.takes(token):
            return self._introspect(ex, self.introspection, token)
        return self._judge(ex, token, digest)

    def _introspect(
        self, ex: Exchange, introspection: Introspection, token: bytes
    ) -> Problem | Awaitable[Problem | None] | None:
        """The answer for an opaque token; to be waited for only where the endpoint has to be asked."""
        digest, introspector = sha256(token).digest(), introspection.introspector
        try:
            found = introspector.recall(digest, ex.clock)
        except TokenError:
            return self._senders.refused(ex)
        except IntrospectionUnavailableError as error:
            return _unavailable(error.retry_after)
        if found is None:
            return self._introspect_later(ex, introspection, token, digest)
        return self._admit_active(ex, introspection, found, token, digest)

    async def _introspect_later(
        self, ex: Exchange, introspection: Introspection, token: bytes, digest: bytes
    ) -> Problem | None:
        try:
            found = await introspection.introspector.obtain(token, digest, ex.clock)
        except TokenError:
            return self._senders.refused(ex)
        except IntrospectionUnavailableError as error:
            return _unavailable(error.retry_after)
        answer = self._admit_active(ex, introspection, found, token, digest)
        return await answer if isinstance(answer, Awaitable) else answer

    def _admit_active(
        self, ex: Exchange, introspection: Introspection, found: ActiveToken, token: bytes, digest: bytes
    ) -> Problem | Awaitable[Problem | None] | None:
        introspector = introspection.introspector
        if ex.kind == "websocket" or introspector.is_due(digest, ex.clock):
            ex.keep(self, _Introspected(introspector, token, digest, found))
        principal = found.principal(introspection, self.realm)
        if self._senders.refuses(principal):
            return self._senders.refused(ex)
        return self._admit(ex, principal)

    def _judge(
        self, ex: Exchange, token: bytes, digest: bytes | None, *, fetched: bool = False
    ) -> Problem | Awaitable[Problem | None] | None:
        """The answer for `token`; to be waited for only where keys have to be fetched, and once at most."""
        clock = ex.clock
        now = clock.time()
        try:
            verified = self._verifier.verify(token, now)
        except KeyUnknownError as unknown:
            keys = unknown.issuer.fetched
            if keys is None or fetched or (keys.is_absent(unknown.name, clock) and keys.remaining(clock)):
                return self._senders.refused(ex)
            wait = keys.ask(unknown.name, clock)
            # Refused without a wait: a flood of invented ids is answered as cheaply as one of forged signatures.
            return self._later(ex, token, digest, keys, unknown.name) if wait <= 0 else _unavailable(wait)
        except TokenError:
            return self._senders.refused(ex)
        changing = self._verifier.fetched.get(verified.principal.issuer or "")
        if changing is not None:
            remaining = changing.remaining(clock)
            if not remaining:
                return _unavailable(1) if fetched else self._later(ex, token, digest, changing, None)
            if changing.is_due(clock):
                ex.keep(self, changing)
            # It is looked at again when its keys are: what is remembered never outlives what may be believed.
            verified = VerifiedToken(verified.principal, verified.not_before, min(verified.not_after, now + remaining))
        if self._senders.refuses(verified.principal):
            return self._senders.refused(ex)
        if digest is not None:
            self._cache.put(digest, verified)
        return self._admit(ex, verified.principal)

    def _admit(self, ex: Exchange, principal: Principal) -> Problem | Awaitable[Problem | None] | None:
        """The caller is `principal`, if the exchange is by the one whom that one's token is bound to."""
        answer = self._senders.confirm(ex, principal) if self._senders.active else None
        if answer is None:
            _accept_again(ex, principal)
        elif isinstance(answer, Awaitable):
            return self._admit_later(ex, principal, answer)
        return answer

    async def _admit_later(
        self, ex: Exchange, principal: Principal, confirming: Awaitable[Problem | None]
    ) -> Problem | None:
        answer = await confirming
        if answer is None:
            _accept_again(ex, principal)
        return answer

    def on_check(self, ex: Exchange) -> Close | float | Awaitable[Close | float | None] | None:
        left, note = until_credentials_end(ex), ex.note(self)
        # An opaque token may be revoked at any time, and only the endpoint knows.
        return note.check(ex.clock, left) if isinstance(note, _Introspected) and not isinstance(left, Close) else left

    def on_response(self, ex: Exchange, head: Head) -> None:
        self._senders.supply_nonce(ex, head)
        if self._pair is not None:
            self._pair.select(ex, head)

    async def _later(
        self, ex: Exchange, token: bytes, digest: bytes | None, keys: FetchedKeys, name: Name | None
    ) -> Problem | None:
        try:
            await keys.obtain(ex.clock, name)
        except KeysUnavailableError as error:
            return _unavailable(error.retry_after)
        answer = self._judge(ex, token, digest, fetched=True)
        return await answer if isinstance(answer, Awaitable) else answer

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        # The caller has the response: whoever comes next finds what is fresh, and nobody has waited for it.
        due: FetchedKeys | _Introspected | None = ex.note(self)
        return due.refresh(ex.clock) if due is not None else None

    async def fetch_keys(self, clock: Clock = SYSTEM_CLOCK) -> None:
        """Fetch the keys of all issuers now, where that is needed: in the application's lifespan, so that it does not
        start without them. `clock` is the stack's, if that has its own. Raises `KeysUnavailableError`."""
        for keys in self._verifier.fetched.values():
            await keys.obtain(clock)

    def resources(self) -> Iterable[Closable]:
        asked = () if self.introspection is None else (self.introspection.introspector,)
        return (*self._verifier.fetched.values(), *asked, *self._senders.resources())

    def _without_token(self, ex: Exchange) -> Problem | None:
        known = ex.principal
        if known is not None:
            if TicketUsed in ex and not _is_another(known) and known.issuer not in self._trusted:
                # Sold where others are trusted, too.
                return self._senders.refused(ex)
            if not self._rival:
                offer(ex, self._challenge)  # a route may take both
            return None
        ex.anonymous()
        offered = offer(ex, self._challenge)
        if self.required:
            return CREDENTIALS_MISSING("This API takes a bearer token", headers=offered.lines)
        return None

    def _bad_request(self, problem_type: ProblemType, detail: str) -> Problem:
        return problem_type(detail, headers=self._invalid_request)


class _Introspected(NamedTuple):
    """The token of an exchange that lasts, or that is due to be asked about again; `found` is what let it in."""

    introspector: Introspector
    token: bytes
    digest: bytes
    found: ActiveToken

    def refresh(self, clock: Clock) -> Awaitable[None]:
        return self.introspector.refresh(self.token, self.digest, clock)

    async def check(self, clock: Clock, left: float | None) -> Close | float:
        """For how long the connection may go on, `left` at most: until the answer is as old as it may be."""
        try:
            now = await self.introspector.obtain(self.token, self.digest, clock)
        except TokenError:
            return ENDED
        except IntrospectionUnavailableError as error:
            return close_for(_unavailable(error.retry_after)) or ENDED
        before, after = self.found.reading, now.reading
        # It speaks for somebody else now, or for less than what the connection was opened with.
        if after.subject != before.subject or not after.scopes >= before.scopes:
            return ENDED
        fresh = self.introspector.fresh_for(now, clock)
        return fresh if left is None else min(left, fresh)


def _unavailable(wait: float) -> Problem:
    return KEYS_UNAVAILABLE("Tokens cannot be verified at the moment", retry_after=wait)


def _is_another(known: Principal) -> bool:
    """Whether another kind of credential has told who calls."""
    return known.issuer is None or known.kind != "bearer"


def _accept_again(ex: Exchange, principal: Principal) -> None:
    """A token that an outer BearerAuth has accepted is verified here too: this one may trust fewer issuers. Where both
    agree, the outer one's answer stays, with what others have made of it since. Beside a credential of another kind,
    which acts, it cosigns."""
    known = ex.principal
    if known is not None and _is_another(known):
        ex.cosign(principal)
    elif known is None or known.key != principal.key or known.scopes != principal.scopes:
        ex.authenticate(principal)

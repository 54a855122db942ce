"""Verifies bearer tokens: `Authorization: Bearer <JWT>` becomes the exchange's `Principal`.

    BearerAuth(issuers=[
        Issuer(
            url="https://auth.sigil.acti.ai",
            audience="sigil-api",
            keys=[Key(algorithm="HS256", secret=SecretStr(os.environ["JWT_SECRET"]))],
        ),
    ])

    BearerAuth(issuers=[Issuer(url="https://login.example.com", audience="sigil-api", discovery=True)])

A token that is presented is verified or refused here (401 `invalid_token`; 400 for a header that is no bearer
credential). A caller without one goes on as nobody, and `Scopes`, further in, decides whether that will do; without
`Scopes`, write `required=True`. Verified tokens are remembered until they expire or the keys of an issuer change;
refused ones are not. Where a token needs keys that have to be fetched and cannot be had now: 503, not 401
(`identity/key_sets.py` says what holds). A token that is known waits for nothing.

Guarantees: whatever is presented, an answer is all that comes out; no answer says which check failed; a token's
algorithm never chooses the key; no token is kept, logged or shown. WebSocket handshakes obey the same rules.

Goes inside `Problems`, `BodyLimit` and `Timeout`, outside `Scopes` and `RateLimit`. RFC 6750, RFC 9110 section 11,
RFC 7519, RFC 8725, RFC 9068.
"""

from collections.abc import Awaitable, Iterable
from functools import cached_property
from hashlib import sha256
from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator

from sigil_policy.core.catalogue import (
    CREDENTIALS_CONFLICTING,
    CREDENTIALS_IN_QUERY,
    CREDENTIALS_MALFORMED,
    CREDENTIALS_MISSING,
    KEYS_UNAVAILABLE,
    TOKEN_INVALID,
)
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Closable, Listed, Policy
from sigil_policy.core.problems import Problem, ProblemType
from sigil_policy.identity.challenges import (
    Challenges,
    HeaderLines,
    challenge_line,
    is_preflight,
    offer,
)
from sigil_policy.identity.fields import HeaderName, Realm
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import FetchedKeys, KeysUnavailableError, Name
from sigil_policy.identity.tokens import KeyUnknownError, TokenCache, TokenError, TokenVerifier, VerifiedToken
from sigil_policy.wire.authorization import QueryNames, bearer_token, is_token68
from sigil_policy.wire.jws import MAX_TOKEN

_ACCESS_TOKEN = QueryNames("access_token")
_MAX_VALUE = len("Bearer ") + MAX_TOKEN


class BearerAuth(Policy):
    """Who presents a valid bearer token is the `Principal`; who presents an invalid one is refused.

        BearerAuth(issuers=[Issuer(url="https://auth.sigil.acti.ai", audience="sigil-api", keys=[key])])

    Answers 401 `AUTH_002` (the token), 400 `AUTH_003` (the header), 400 `AUTH_006` (two credentials), 400 `AUTH_007` (a
    token in the query), and with `required=True` 401 `AUTH_001` (no token); each with a `WWW-Authenticate` line. 503
    `AUTH_008` with `Retry-After`: the keys cannot be fetched now.
    """

    gives: ClassVar[tuple[type, ...]] = (Principal, Challenges)

    issuers: Annotated[Listed[Issuer], Field(min_length=1, max_length=256)]
    """Whose tokens are accepted. The keys of one never verify the tokens of another. Claims are read once the signature
    was verified. Only where keys of several issuers may have signed, and the `kid` does not tell which, they are read
    first; then those that take long are refused: over 64 objects and arrays, or 192 commas."""

    realm: Realm = "api"
    """The protection space that challenges name (default `"api"`)."""

    required: bool = False
    """Refuse callers without a token here, CORS preflights excepted (default False: that is for `Scopes` to decide)."""

    cache_size: Annotated[int, Field(ge=0, le=10_000_000)] = 10_000
    """How many verified tokens are remembered, about 1 kB each (default 10,000; 0: none)."""

    conflicts_with: HeaderName | None = "X-API-Key"
    """Refuse requests that carry this header beside `Authorization` (default `"X-API-Key"`; None: no header)."""

    foreign_prefix: Annotated[str, Field(min_length=1)] | None = None
    """Leave bearer tokens that begin so alone: `"sk_"` beside `ApiKeyAuth(bearer=True)` (default None: none)."""

    tolerate_leaked_query_tokens: bool = False
    """Let requests pass that carry `access_token=` in their query, where logs and histories keep it (default False:
    400). It is never used as a credential, either way (RFC 9700 section 4.3.2)."""

    @field_validator("issuers")
    @classmethod
    def _distinct(cls, issuers: tuple[Issuer, ...]) -> tuple[Issuer, ...]:
        if len({issuer.url for issuer in issuers}) != len(issuers):
            raise ValueError("two issuers have the same url; put the keys of both into one")
        return issuers

    @model_validator(mode="after")
    def _prepare(self) -> "BearerAuth":
        _ = self._verifier, self._cache, self._rival, self._foreign, self._challenge
        _ = self._invalid_request, self._invalid_token
        for keys in self._verifier.fetched.values():
            keys.watch(self._cache.clear)
        if not self._verifier.fetched:
            # A hook that has nothing to do here is taken out of the pass.
            object.__setattr__(self, "on_finish", None)
        return self

    @cached_property
    def _verifier(self) -> TokenVerifier:
        # Before the cache: it has to know of changed keys before what they verified is forgotten.
        return TokenVerifier(self.issuers, realm=self.realm)

    @cached_property
    def _cache(self) -> TokenCache:
        return TokenCache(self.cache_size)

    @cached_property
    def _rival(self) -> bytes:
        # Never a header's name: without a rival the question is asked all the same, and the answer is no.
        return self.conflicts_with.lower().encode("ascii") if self.conflicts_with is not None else b""

    @cached_property
    def _foreign(self) -> bytes | None:
        return self.foreign_prefix.encode() if self.foreign_prefix is not None else None

    @cached_property
    def _challenge(self) -> HeaderLines:
        return (challenge_line("Bearer", self.realm),)

    @cached_property
    def _invalid_request(self) -> HeaderLines:
        return (challenge_line("Bearer", self.realm, "invalid_request"),)

    @cached_property
    def _invalid_token(self) -> HeaderLines:
        return (challenge_line("Bearer", self.realm, "invalid_token"),)

    def on_request(self, ex: Exchange) -> Problem | Awaitable[Problem | None] | None:
        value = ex.headers.get(b"authorization")
        if ex.method == "OPTIONS" and is_preflight(ex):
            ex.anonymous()
            return None
        if ex.query and not self.tolerate_leaked_query_tokens and _ACCESS_TOKEN.found_in(ex.query):
            return self._bad_request(CREDENTIALS_IN_QUERY, "The query string carries an access token")
        if value is None:
            return self._without_token(ex)
        if self._rival in ex.headers:
            return self._bad_request(CREDENTIALS_CONFLICTING, "The request carries two kinds of credentials")
        if b"authorization" in ex.repeated:
            return self._bad_request(CREDENTIALS_MALFORMED, "The request carries more than one Authorization header")
        known = ex.principal
        if known is not None and (known.issuer is None or known.kind != "bearer"):
            return None  # an outer policy of another kind has answered for the caller
        if len(value) > _MAX_VALUE:
            return self._verify(ex, value, None)
        # What is remembered is the whole field value: a token that is known needs no parsing at all.
        digest = sha256(value).digest()
        principal = self._cache.get(digest, ex.clock.time())
        if principal is None:
            return self._verify(ex, value, digest)
        if known is None:
            ex.authenticate(principal)
        else:
            _accept_again(ex, principal)
        return None

    def _verify(self, ex: Exchange, value: bytes, digest: bytes | None) -> Problem | Awaitable[Problem | None] | None:
        try:
            token = bearer_token(value)
        except ValueError:
            return self._bad_request(CREDENTIALS_MALFORMED, "The Authorization header carries no token")
        if token is None or (self._foreign is not None and token.startswith(self._foreign)):
            return self._without_token(ex)
        if len(token) > MAX_TOKEN:
            return self._refused()
        if not is_token68(token):
            return self._bad_request(CREDENTIALS_MALFORMED, "The token has characters that no bearer token has")
        return self._judge(ex, token, digest)

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
                return self._refused()
            wait = keys.ask(unknown.name, clock)
            # Refused without a wait: a flood of invented ids is answered as cheaply as one of forged signatures.
            return self._later(ex, token, digest, keys, unknown.name) if wait <= 0 else _unavailable(wait)
        except TokenError:
            return self._refused()
        changing = self._verifier.fetched.get(verified.principal.issuer or "")
        if changing is not None:
            remaining = changing.remaining(clock)
            if not remaining:
                return _unavailable(1) if fetched else self._later(ex, token, digest, changing, None)
            if changing.is_due(clock):
                ex.keep(self, changing)
            # It is looked at again when its keys are: what is remembered never outlives what may be believed.
            verified = VerifiedToken(verified.principal, verified.not_before, min(verified.not_after, now + remaining))
        if digest is not None:
            self._cache.put(digest, verified)
        _accept_again(ex, verified.principal)
        return None

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
        # The caller has the response: whoever comes next finds fresh keys, and nobody has waited for them.
        keys: FetchedKeys | None = ex.note(self)
        return keys.refresh(ex.clock) if keys is not None else None

    async def fetch_keys(self, clock: Clock = SYSTEM_CLOCK) -> None:
        """Fetch the keys of all issuers now, where that is needed: in the application's lifespan, so that it does not
        start without them. `clock` is the stack's, if that has its own. Raises `KeysUnavailableError`."""
        for keys in self._verifier.fetched.values():
            await keys.obtain(clock)

    def resources(self) -> Iterable[Closable]:
        return self._verifier.fetched.values()

    def _without_token(self, ex: Exchange) -> Problem | None:
        if ex.principal is not None:
            return None
        ex.anonymous()
        offered = offer(ex, self._challenge)
        if self.required:
            return CREDENTIALS_MISSING("This API takes a bearer token", headers=offered.lines)
        return None

    def _refused(self) -> Problem:
        # One answer for every cause (RFC 9457 section 5): which check failed would help only whoever forges tokens.
        return TOKEN_INVALID("The access token is not valid", headers=self._invalid_token)

    def _bad_request(self, problem_type: ProblemType, detail: str) -> Problem:
        return problem_type(detail, headers=self._invalid_request)


def _unavailable(wait: float) -> Problem:
    return KEYS_UNAVAILABLE("Tokens cannot be verified at the moment", retry_after=wait)


def _accept_again(ex: Exchange, principal: Principal) -> None:
    """A token that an outer BearerAuth has accepted is verified here too: this one may trust fewer issuers. Where both
    agree, the outer one's answer stays, with what others have made of it since."""
    known = ex.principal
    if known is None or known.key != principal.key or known.scopes != principal.scopes:
        ex.authenticate(principal)

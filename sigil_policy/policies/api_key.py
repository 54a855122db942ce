"""Verifies API keys: `X-API-Key: sk_live_...` becomes the exchange's `Principal`.

    plain, record = new_key(pepper=pepper, subject="nightly-job", scopes=["agents:read"], tier="pro")
    ApiKeyAuth(store=MemoryApiKeyStore([record]), pepper=pepper)

A key that is presented is verified or refused here (401). A caller without one goes on as nobody, and `Scopes`, further
in, decides whether that will do; without `Scopes`, write `required=True`.

Guarantees: mistyped, unknown, expired, revoked and wrong keys get the same answer, and an unknown id costs the same
digest and the same comparison in constant time as a known one; a typing error is refused without a look-up; a store
that fails or is slow lets nobody in, and is answered with 503 and `Retry-After`, never 500; the store holds only keyed
digests; no key is logged or shown. WebSocket handshakes obey the same rules, and a connection whose key expires or is
revoked while it lasts is closed with code 4401.

How soon a key that was made or revoked elsewhere is known, and what callers who make ids up cost, is the store's to
say: see `RemoteApiKeyStore`. `ApiKeys`, and `sigil-policy key` on the command line, make and end keys.

Goes inside `Problems`, `BodyLimit` and `Timeout`, outside `Scopes` and `RateLimit`, before or after `BearerAuth`.
RFC 9110 section 11; RFC 6750 for the challenges.
"""

import traceback
from collections.abc import Awaitable, Callable, Iterable
from functools import cached_property, partial
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, ClassVar, cast

import anyio
import structlog
from pydantic import Field, SecretStr, field_validator, model_validator

from sigil_policy.core.catalogue import (
    CREDENTIALS_CONFLICTING,
    CREDENTIALS_IN_QUERY,
    CREDENTIALS_MALFORMED,
    CREDENTIALS_MISSING,
    KEY_INVALID,
    http_problem,
)
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Closable, Close, Policy
from sigil_policy.core.problems import Problem, ProblemType
from sigil_policy.identity.api_keys import (
    ApiKeyRecord,
    ApiKeyStore,
    RemoteApiKeyStore,
    is_issued_id,
    key_digest,
    key_id,
    key_store,
    pepper_bytes,
)
from sigil_policy.identity.challenges import (
    Challenges,
    HeaderLines,
    challenge_line,
    is_preflight,
    offer,
)
from sigil_policy.identity.endings import close_for, until_credentials_end
from sigil_policy.identity.fields import HeaderName, Realm, Scheme
from sigil_policy.identity.subprotocols import SubprotocolPair
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.urls import found_by
from sigil_policy.wire.authorization import QueryNames, bearer_token

logger = structlog.get_logger("sigil_policy")

Record = ApiKeyRecord | None
Find = Callable[[str], "Record | Awaitable[Record]"]

# What no key's digest is: an unknown id is compared with this, so that it takes as long as a known one.
_NO_DIGEST = bytes(32)

# Seconds between two lines in the log about a store that fails.
_REPORT_EVERY = 10.0

_QUERY_NAMES = QueryNames("api_key", "api-key", "apikey", "x-api-key", any_case=True)


class ApiKeyAuth(Policy):
    """Who presents a valid API key is the `Principal`; who presents an invalid one is refused.

        ApiKeyAuth(store="sqlite:///keys.db", pepper=SecretStr(os.environ["SIGIL_PEPPER"]))

    Answers 401 `AUTH_005` (the key), 400 `AUTH_003` (the header), 400 `AUTH_006` (two credentials), 400 `AUTH_007`
    (a key in the query), and with `required=True` 401 `AUTH_001` (no key); each with `WWW-Authenticate` lines.
    Answers 503 `SRV_503` with `Retry-After` while the store cannot say who calls: whatever it raises, or at `deadline`.
    What it raised is in the log (`api_key_store_failed`), at most once in 10 seconds.
    """

    gives: ClassVar[tuple[type, ...]] = (Principal, Challenges)

    store: Annotated[ApiKeyStore | str, found_by(key_store)]
    """Where the records are: a store, or the URL of one as in `sigil_policy.identity.api_keys.urls`."""

    pepper: SecretStr
    """The secret under which digests were made, at least 32 bytes; keep it out of the store."""

    header: HeaderName = "X-API-Key"
    """The header that carries the key (default `"X-API-Key"`)."""

    bearer: bool = False
    """Also take `Authorization: Bearer sk_...` (default False). `BearerAuth` then takes `foreign_prefix="sk_"`."""

    bearer_prefix: Annotated[str, Field(min_length=1)] = "sk_"
    """How a bearer token begins that is an API key (default `"sk_"`)."""

    realm: Realm = "api"
    """The protection space that challenges name (default `"api"`)."""

    scheme: Scheme | None = "ApiKey"
    """The scheme of the second challenge line (default `"ApiKey"`, which is not registered; None: only `Bearer`)."""

    required: bool = False
    """Refuse callers without a key here, CORS preflights excepted (default False: that is for `Scopes` to decide)."""

    conflicts_with: HeaderName | None = "Authorization"
    """Refuse requests that carry this header beside a key (default `"Authorization"`). None: no header; where an outer
    policy knows the caller already, the key is verified all the same, and cosigns (`Exchange.principals`)."""

    tolerate_leaked_query_keys: bool = False
    """Let requests pass that carry `api_key=`, `apikey=` or `x-api-key=` in their query, where logs and histories
    keep it (default False: 400). It is never used as a credential, either way."""

    deadline: Annotated[float, Field(ge=0.001, le=60)] = 2.0
    """Seconds that the store may take to find a key (default 2); then 503. A store may have a shorter one itself."""

    recheck: Annotated[float, Field(ge=0.05, le=3_600)] = 30.0
    """Seconds after which the key of an open WebSocket is looked up again (default 30). A connection whose key cannot
    be looked up three times in a row is closed with code 1013."""

    websocket_protocol: HeaderName | None = None
    """On a WebSocket also take the key behind this subprotocol, as a browser can send it (default None):
    `new WebSocket(url, ["sigil.key", key])` for `"sigil.key"`. With `bearer`, what begins with `bearer_prefix`."""

    @field_validator("pepper")
    @classmethod
    def _long_enough(cls, pepper: SecretStr) -> SecretStr:
        pepper_bytes(pepper)
        return pepper

    @model_validator(mode="after")
    def _prepare(self) -> "ApiKeyAuth":
        _ = self._pepper, self._header, self._rival, self._prefix
        _ = self._challenge, self._invalid_request, self._invalid_token
        _ = self._find, self._note_use, self._reported, self._pair
        if self._pair is None:
            # A hook that has nothing to do here is taken out of the pass.
            object.__setattr__(self, "on_response", None)
        return self

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.store),) if hasattr(self.store, "aclose") else ()

    @cached_property
    def _find(self) -> Find:
        store = cast("ApiKeyStore", self.store)
        if isinstance(store, RemoteApiKeyStore):
            return partial(store.find, is_issued=partial(is_issued_id, self._pepper))
        return store.find

    @cached_property
    def _note_use(self) -> Callable[[str], object] | None:
        return getattr(self.store, "note_use", None)

    @cached_property
    def _reported(self) -> list[float]:
        # When the log was last told of a store that fails, by the monotonic clock.
        return [float("-inf")]

    @cached_property
    def _pepper(self) -> bytes:
        return pepper_bytes(self.pepper)

    @cached_property
    def _header(self) -> bytes:
        return self.header.lower().encode("ascii")

    @cached_property
    def _rival(self) -> bytes:
        # Never a header's name: without a rival the question is asked all the same, and the answer is no.
        return self.conflicts_with.lower().encode("ascii") if self.conflicts_with is not None else b""

    @cached_property
    def _pair(self) -> SubprotocolPair | None:
        return None if self.websocket_protocol is None else SubprotocolPair(self.websocket_protocol)

    @cached_property
    def _prefix(self) -> bytes:
        return self.bearer_prefix.encode()

    @cached_property
    def _challenge(self) -> HeaderLines:
        return self._lines(None)

    @cached_property
    def _invalid_request(self) -> HeaderLines:
        return self._lines("invalid_request")

    @cached_property
    def _invalid_token(self) -> HeaderLines:
        return self._lines("invalid_token")

    def _lines(self, error: str | None) -> HeaderLines:
        bearer = challenge_line("Bearer", self.realm, error)
        return (bearer,) if self.scheme is None else (bearer, challenge_line(self.scheme, self.realm))

    def on_request(self, ex: Exchange) -> Problem | Awaitable[Problem | None] | None:
        if ex.method == "OPTIONS" and is_preflight(ex):
            ex.anonymous()
            return None
        if ex.query and not self.tolerate_leaked_query_keys and _QUERY_NAMES.found_in(ex.query):
            return self._bad_request(CREDENTIALS_IN_QUERY, "The query string carries an API key")
        try:
            presented, as_bearer = self._presented(ex)
        except ValueError:
            return self._bad_request(CREDENTIALS_MALFORMED, "The subprotocols carry no API key, or a second one")
        if presented is None:
            return self._without_key(ex) if ex.principal is None or not self._rival else None
        if not as_bearer and self._rival in ex.headers:
            return self._bad_request(CREDENTIALS_CONFLICTING, "The request carries two kinds of credentials")
        if (b"authorization" if as_bearer else self._header) in ex.repeated:
            return self._bad_request(CREDENTIALS_MALFORMED, "The request carries more than one credential of a kind")
        known = ex.principal
        if known is not None and known.kind != "api_key" and self._rival:
            return None  # an outer policy of another kind has answered for the caller
        refusal = self._invalid_token if as_bearer else self._challenge
        name = key_id(presented)
        if name is None:
            return KEY_INVALID("The API key is not valid", headers=refusal)
        digest = key_digest(self._pepper, presented)
        try:
            found = self._find(name)
        except Exception as error:  # noqa: BLE001  a store is somebody else's: whatever it raises, nobody is let in
            return self._unavailable(ex, error)
        if found is None or isinstance(found, ApiKeyRecord):
            return self._judge(ex, found, digest, refusal)
        return self._judge_later(ex, found, digest, refusal)

    def _presented(self, ex: Exchange) -> tuple[bytes | None, bool]:
        """The key, and whether it came as a bearer token. `ValueError`: subprotocols with no key, or one too many."""
        presented = ex.headers.get(self._header)
        offered = None if self._pair is None else self._pair.credential(ex)
        if offered is not None and (not self.bearer or offered.startswith(self._prefix)):
            if presented is not None:
                raise ValueError("a key in the header, and one as a subprotocol")
            return offered, False
        if presented is None and self.bearer:
            return self._from_bearer(ex.headers.get(b"authorization")), True
        return presented, False

    def on_response(self, ex: Exchange, head: Head) -> None:
        if self._pair is not None:
            self._pair.select(ex, head)

    async def on_check(self, ex: Exchange) -> float | Close | None:
        if self._presented(ex)[0] is None:
            return None
        answer = self.on_request(ex)
        if isinstance(answer, Awaitable):
            answer = await answer
        failures = 0 if answer is None or answer.status < 500 else (ex.note(self) or 0) + 1
        ex.keep(self, failures)
        if answer is not None and failures not in (1, 2):
            return close_for(answer)
        return until_credentials_end(ex, self.recheck)

    async def _judge_later(
        self, ex: Exchange, finding: Awaitable[ApiKeyRecord | None], digest: bytes, refusal: HeaderLines
    ) -> Problem | None:
        try:
            with anyio.fail_after(self.deadline):
                found = await finding
        except Exception as error:  # noqa: BLE001  as above
            return self._unavailable(ex, error)
        return self._judge(ex, found, digest, refusal)

    def _unavailable(self, ex: Exchange, error: Exception) -> Problem:
        self._report(ex, error)
        wait = error.retry_after if isinstance(error, StoreUnavailableError) else 1
        return http_problem(503)("API keys cannot be checked at the moment.", retry_after=wait)

    def _report(self, ex: Exchange, error: Exception) -> None:
        now = ex.clock.monotonic()
        if now - self._reported[0] < _REPORT_EVERY:
            return
        self._reported[0] = now
        # What it says may hold an address with its password, unless it is one of ours; where it happened never does.
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None
        reason = str(error) if isinstance(error, StoreUnavailableError) else None
        logger.error(
            "api_key_store_failed",
            store=type(self.store).__name__,
            error=type(error).__name__,
            where=where,
            reason=reason,
        )

    def _judge(self, ex: Exchange, record: ApiKeyRecord | None, digest: bytes, refusal: HeaderLines) -> Problem | None:
        same = compare_digest(digest, _NO_DIGEST if record is None else record.digest_bytes)
        if record is None or not same or record.is_expired(ex.clock.time()):
            return KEY_INVALID("The API key is not valid", headers=refusal)
        if self._note_use is not None:
            try:
                self._note_use(record.id)
            except Exception as error:  # noqa: BLE001  a note that is lost is no reason to refuse
                self._report(ex, error)
        principal, known = record.principal(self.realm), ex.principal
        # A key that an outer ApiKeyAuth has accepted is verified here too: this store may know fewer. Where both agree,
        # the outer one's answer stays, with what others have made of it since.
        if known is not None and known.kind != "api_key":
            ex.cosign(principal)
        elif known is None or known.key != principal.key or known.scopes != principal.scopes:
            ex.authenticate(principal)
        return None

    def _from_bearer(self, authorization: bytes | None) -> bytes | None:
        if authorization is None:
            return None
        try:
            token = bearer_token(authorization)
        except ValueError:
            # Not a key in any case; what to answer is for a BearerAuth to say, or for Scopes.
            return None
        return token if token is not None and token.startswith(self._prefix) else None

    def _without_key(self, ex: Exchange) -> Problem | None:
        ex.anonymous()
        offered = offer(ex, self._challenge)
        if self.required and ex.principal is None:
            return CREDENTIALS_MISSING("This API takes an API key", headers=offered.lines)
        return None

    def _bad_request(self, problem_type: ProblemType, detail: str) -> Problem:
        return problem_type(detail, headers=self._invalid_request)

"""Verifies API keys: `X-API-Key: sk_live_...` becomes the exchange's `Principal`.

    plain, record = new_key(pepper=pepper, subject="nightly-job", scopes=["agents:read"], tier="pro")
    ApiKeyAuth(store=MemoryApiKeyStore([record]), pepper=pepper)

A key that is presented is verified or refused here (401). A caller without one goes on as nobody, and `Scopes`, further
in, decides whether that will do; without `Scopes`, write `required=True`.

Guarantees: mistyped, unknown, expired, revoked and wrong keys get the same answer, and an unknown id costs the same
digest and the same comparison in constant time as a known one; a typing error is refused without a look-up; a store
that fails or is slow lets nobody in, and is answered with 503 and `Retry-After`, never 500; the store holds only keyed
digests; no key is logged or shown. WebSocket handshakes obey the same rules, and a connection whose key expires, is
revoked, or may do less while it lasts is closed with code 4401.

How soon a key that was made or revoked elsewhere is known, and what callers who make ids up cost, is the store's to
say: see `RemoteApiKeyStore`. `ApiKeys`, and `sigil-policy key` on the command line, make and end keys.

Goes inside `Problems`, `BodyLimit` and `Timeout`, outside `Scopes` and `RateLimit`, before or after `BearerAuth`.
RFC 9110 section 11; RFC 6750 for the challenges.
"""

from collections.abc import Awaitable, Callable, Iterable
from functools import cached_property, partial
from hmac import compare_digest
from typing import Annotated, Any, ClassVar, cast

import anyio
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
from sigil_policy.core.operations import Operation
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
from sigil_policy.identity.endings import ENDED, close_for, until_credentials_end
from sigil_policy.identity.fields import HeaderName, Realm, Scheme
from sigil_policy.identity.presented import KeyUsed, TicketUsed
from sigil_policy.identity.store_failures import StoreFailures
from sigil_policy.identity.subprotocols import SubprotocolPair
from sigil_policy.stores.urls import found_by
from sigil_policy.wire.authorization import QueryNames, bearer_token

Record = ApiKeyRecord | None
Find = Callable[[str], "Record | Awaitable[Record]"]

# What no key's digest is: an unknown id is compared with this, so that it takes as long as a known one.
_NO_DIGEST = bytes(32)

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
    `new WebSocket(url, ["sigil.key", key])` for `"sigil.key"`. With `bearer`, what begins with `bearer_prefix`.
    Name it in `websocket_protocols` of `AuthFailureLimit` too, which counts guesses there."""

    @field_validator("pepper")
    @classmethod
    def _long_enough(cls, pepper: SecretStr) -> SecretStr:
        pepper_bytes(pepper)
        return pepper

    @model_validator(mode="after")
    def _prepare(self) -> "ApiKeyAuth":
        _ = self._pepper, self._header, self._rival, self._prefix
        _ = self._challenge, self._invalid_request, self._invalid_token
        _ = self._find, self._note_use, self._failures, self._pair
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
    def _failures(self) -> StoreFailures:
        return StoreFailures("api_key_store_failed")

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

    def describe(self, operation: Operation, rule: Any) -> None:
        operation.accepts(
            "ApiKey", {"type": "apiKey", "in": "header", "name": self.header, "description": "A key"}, kind="api_key"
        )
        operation.required = operation.required or self.required
        if self.required:
            operation.answers(CREDENTIALS_MISSING, headers=("WWW-Authenticate",))
        operation.answers(KEY_INVALID, CREDENTIALS_MALFORMED, headers=("WWW-Authenticate",))
        if self.conflicts_with is not None:
            operation.answers(CREDENTIALS_CONFLICTING, headers=("WWW-Authenticate",))
        if not self.tolerate_leaked_query_keys:
            operation.answers(CREDENTIALS_IN_QUERY, headers=("WWW-Authenticate",))
        operation.answers(http_problem(503), headers=("Retry-After",))

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
            used = ex.get(KeyUsed)
            if used is not None and used.place is not None:
                # An outer ApiKeyAuth looks where this one does not, and its store may know more keys.
                return KEY_INVALID("The API key is not valid", headers=self._challenge)
            bought = _buyer(ex)
            if bought is not None and bought.header.lower() == self.header.lower():
                return self._look_up(ex, bought.id, partial(self._judge_ticket, ex))
            return self._without_key(ex) if ex.principal is None or not self._rival else None
        if not as_bearer and self._rival in ex.headers:
            return self._bad_request(CREDENTIALS_CONFLICTING, "The request carries two kinds of credentials")
        if self._rival and TicketUsed in ex:
            return self._bad_request(CREDENTIALS_CONFLICTING, "The handshake carries a ticket and an API key")
        if (b"authorization" if as_bearer else self._header) in ex.repeated:
            return self._bad_request(CREDENTIALS_MALFORMED, "The request carries more than one credential of a kind")
        known = ex.principal
        if known is not None and self._rival and all(other.kind != "api_key" for other in ex.principals):
            return None  # an outer policy of another kind has answered for the caller
        refusal = self._invalid_token if as_bearer else self._challenge
        name = key_id(presented)
        if name is None:
            return KEY_INVALID("The API key is not valid", headers=refusal)
        digest = key_digest(self._pepper, presented)
        return self._look_up(ex, name, partial(self._judge, ex, digest=digest, refusal=refusal, as_bearer=as_bearer))

    def _look_up(
        self, ex: Exchange, name: str, judge: Callable[[Record], Problem | None]
    ) -> Problem | Awaitable[Problem | None] | None:
        """The answer of `judge` to the record that the store has by this name."""
        try:
            found = self._find(name)
        except Exception as error:  # noqa: BLE001  a store is somebody else's: whatever it raises, nobody is let in
            return self._unavailable(ex, error)
        if found is None or isinstance(found, ApiKeyRecord):
            return judge(found)
        return self._look_up_later(ex, found, judge)

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
        if self._presented(ex)[0] is None and _buyer(ex) is None:
            return None
        before = ex.principals
        answer = self.on_request(ex)
        if isinstance(answer, Awaitable):
            answer = await answer
        if not all(any(now.key == old.key and now.scopes >= old.scopes for now in ex.principals) for old in before):
            return ENDED  # it speaks for somebody else now, or for less than what the connection was opened with
        failures = 0 if answer is None or answer.status < 500 else (ex.note(self) or 0) + 1
        ex.keep(self, failures)
        if answer is not None and failures not in (1, 2):
            return close_for(answer)
        return until_credentials_end(ex, self.recheck)

    async def _look_up_later(
        self, ex: Exchange, finding: Awaitable[Any], judge: Callable[[Record], Problem | None]
    ) -> Problem | None:
        try:
            with anyio.fail_after(self.deadline):
                found = await finding
        except Exception as error:  # noqa: BLE001  as above
            return self._unavailable(ex, error)
        if found is not None and not isinstance(found, ApiKeyRecord):
            return self._unavailable(ex, TypeError("find returns an ApiKeyRecord or None"))
        return judge(found)

    def _unavailable(self, ex: Exchange, error: Exception) -> Problem:
        wait = self._failures.report(self.store, error, ex.clock)
        return http_problem(503)("API keys cannot be checked at the moment.", retry_after=wait)

    def _judge_ticket(self, ex: Exchange, record: Record) -> Problem | None:
        """The ticket of this connection was bought with a key: does that hold still, and say as much?"""
        caller = ex.principal
        if record is None or caller is None or record.is_expired(ex.clock.time()):
            return KEY_INVALID("The API key is not valid", headers=self._challenge)
        if record.subject != caller.subject or not record.scopes >= caller.scopes:
            return KEY_INVALID("The API key is not valid", headers=self._challenge)
        return None

    def _judge(
        self, ex: Exchange, record: Record, digest: bytes, refusal: HeaderLines, as_bearer: bool
    ) -> Problem | None:
        same = compare_digest(digest, _NO_DIGEST if record is None else record.digest_bytes)
        if record is None or not same or record.is_expired(ex.clock.time()):
            return KEY_INVALID("The API key is not valid", headers=refusal)
        if self._note_use is not None:
            try:
                self._note_use(record.id)
            except Exception as error:  # noqa: BLE001  a note that is lost is no reason to refuse
                self._failures.report(self.store, error, ex.clock)
        principal, known = record.principal(self.realm), ex.principal
        # A key that an outer ApiKeyAuth has accepted is verified here too: this store may know fewer. Where both agree,
        # the outer one's answer stays, with what others have made of it since.
        if known is not None and known.kind != "api_key":
            ex.cosign(principal)
        elif known is None or known.key != principal.key or known.scopes != principal.scopes:
            ex.authenticate(principal)
        place = "authorization" if as_bearer else None if self._header in ex.headers else self.websocket_protocol
        ex.give(KeyUsed(record.id, self.header, place))
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


def _buyer(ex: Exchange) -> KeyUsed | None:
    """The key that has bought the ticket of this connection, if one has."""
    ticket = ex.get(TicketUsed)
    return None if ticket is None else ticket.key

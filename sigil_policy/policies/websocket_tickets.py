"""One-time tickets for WebSockets: a browser cannot set headers on `new WebSocket(...)`, so it buys a ticket first.

    tickets = MemoryTickets()           # or "redis://auth.internal:6379/0", where there are several processes

    app.add_middleware(PolicyStack, policies=[
        RequestID(), Problems(), AllowedOrigins(origins=["https://app.example.com"]),
        WebSocketTicketAuth(store=tickets), BearerAuth(...), Revocation(...), Scopes(...), RateLimit(...),
        WebSocketTickets(path="/ws-ticket", store=tickets),
    ])

    POST /ws-ticket                     201 Created
    Authorization: Bearer eyJ...        {"ticket": "wst_...", "expires_in": 30}

    new WebSocket(`wss://api.example.com/ws?ticket=${ticket}`)

What they guarantee:

* **One connection for each ticket**, also where two handshakes come at once, in one process or in several. A ticket
  that is presented is used up, also if the handshake is then refused.
* **A ticket is its caller**: subject, scopes, tier, kind, issuer, realm and claims are those of the credential that
  bought it. Policies further in see no difference: a revoked token's ticket is refused by `Revocation`, and counts
  against the same limits.
* **It never outlives the credential**: it holds for `ttl` seconds, or until the credential ends, if that is sooner. A
  connection ends when the credential ends that bought its ticket, with close code 4401. Where an `ApiKeyAuth` judges
  the connection too, that goes for an API key that is revoked, or may do less: it looks the key up, in the handshake
  and then every `recheck` seconds. A `BearerAuth` further in takes tickets of its own issuers' tokens alone.
* **Bound to the page that bought it**: where the purchase had an `Origin`, the handshake has the same. With `audience`
  it opens the routes of that audience alone.
* **One answer for every wrong ticket**: unknown, used, ended, bought elsewhere: 401 `AUTH_009`, in the same words.
* 256 random bits; the store has a digest of the ticket and, until it is used, what is known of the caller. A caller has
  at most `per_caller` unused ones. The answer is never cached.
* **Closed when the store is away**, whatever it raises, or does not answer within `deadline`: 503 with `Retry-After`,
  for handshakes with a ticket and for purchases. What it raised is in the log (`ticket_store_failed`), at most once in
  10 seconds.

What it cannot: show again what was checked at the purchase. That an opaque token was revoked, or an API key where no
`ApiKeyAuth` judges the connection, is noticed by the next purchase, and not by the connection; `Revocation` ends that.
A token that is bound to its sender proves that when it buys; the ticket is good for whoever has it. Several credentials
that vouch together buy none: a ticket stands for one.

A ticket is no credential for anything but a WebSocket. It may stand in a query, where logs of servers and proxies keep
it: when they are read, it is long used up. `AccessLog` logs no query unasked. The other way is a pair of subprotocols,
see `websocket_protocol`.

`WebSocketTicketAuth` goes beside the other policies that authenticate, outside those of them that have `required=True`;
`WebSocketTickets` inside of everything that judges the caller. Where the page has another origin than the service, CORS
goes outside, as for its other requests. RFC 6455 sections 4.1, 4.2.2 and 10.5; RFC 6750 section 2.3 for why a bearer
token itself does not go into the query.
"""

from collections.abc import Awaitable, Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self, cast

from anyio import fail_after
from pydantic import Field, model_validator

from sigil_policy.core.catalogue import (
    CREDENTIALS_CONFLICTING,
    CREDENTIALS_MALFORMED,
    CREDENTIALS_MISSING,
    TICKET_INVALID,
    TICKETS_EXCEEDED,
    http_problem,
)
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation, Served
from sigil_policy.core.policy import Answer, Closable, Close, Listed, Policy
from sigil_policy.core.problems import Problem, Reply, encode_json
from sigil_policy.core.routing import has_dot_segment, parse_route
from sigil_policy.identity.challenges import Challenges, HeaderLines, challenge_line, offer, token_scheme
from sigil_policy.identity.endings import until_credentials_end
from sigil_policy.identity.fields import HeaderName, Label, QueryName, Realm
from sigil_policy.identity.presented import KeyUsed, TicketUsed
from sigil_policy.identity.store_failures import StoreFailures
from sigil_policy.identity.subprotocols import SubprotocolPair
from sigil_policy.stores.tickets import MAX_TTL, Ticket, TicketStore, is_ticket, new_ticket, ticket_digest
from sigil_policy.stores.urls import found_by, ticket_store
from sigil_policy.wire.authorization import MAX_QUERY

_EVENT = "ticket_store_failed"
_LONGEST_ORIGIN = 512
_DEFAULT_CHALLENGE = (challenge_line("Bearer", "api"),)


def _check_store(store: Any) -> None:
    if not all(callable(getattr(store, method, None)) for method in ("issue", "redeem")):
        raise ValueError(f"store must be a URL or a TicketStore with issue and redeem, not {type(store).__name__}")


class WebSocketTicketAuth(Policy):
    """Who opens a WebSocket with a valid ticket is the `Principal` that bought it; who has a wrong one is refused.

        WebSocketTicketAuth(store=tickets)
        WebSocketTicketAuth(store=tickets, query=None, websocket_protocol="sigil.ticket")

    Answers 401 `AUTH_009` (the ticket), 400 `AUTH_003` (more than one, or a list of subprotocols that cannot be read),
    400 `AUTH_006` (another credential beside it), each with a `WWW-Authenticate` line, and 503 `SRV_503` with
    `Retry-After` while the store is away. A handshake without a ticket goes on as it came. Gives `TicketUsed`.
    """

    gives: ClassVar[tuple[type, ...]] = (Principal, Challenges)

    store: Annotated[Any, found_by(ticket_store)]
    """Where the tickets are, that of `WebSocketTickets`: a `TicketStore`, or the URL of a Redis or Valkey server."""

    query: QueryName | None = "ticket"
    """The query parameter that carries the ticket, in exactly this spelling and within the first 8 KiB (default
    `"ticket"`; None: no parameter)."""

    websocket_protocol: HeaderName | None = None
    """The subprotocol in front of a ticket: `new WebSocket(url, ["sigil.ticket", ticket])` (default None: none). It is
    what the answer selects, if the application selects nothing else. Name it in `websocket_protocols` of
    `AuthFailureLimit` too, which counts guesses there."""

    audiences: Mapping[str, Label] = Field(default_factory=dict)
    """From route to the audience whose tickets open it, and no others: `{"/ws/admin/**": "admin"}` (default none)."""

    realm: Realm = "api"
    """The protection space that challenges name (default `"api"`)."""

    conflicts_with: Annotated[Listed[HeaderName], Field(max_length=8)] = ("Authorization", "X-API-Key")
    """Refuse handshakes that carry one of these headers beside a ticket (default `"Authorization", "X-API-Key"`)."""

    deadline: Annotated[float, Field(ge=0.001, le=60)] = 2.0
    """Seconds that the store may take (default 2); then 503. A store may have a shorter one itself."""

    @model_validator(mode="after")
    def _prepare(self) -> Self:
        _check_store(self.store)
        if self.query is None and self.websocket_protocol is None:
            raise ValueError("a ticket has to travel somewhere: give query or websocket_protocol")
        for route in self.audiences:
            parse_route(route)
        _ = self._parameter, self._pair, self._rivals, self._challenge, self._invalid_request, self._invalid_token
        _ = self._failures
        if self.websocket_protocol is None:
            # A hook that has nothing to do here is taken out of the pass.
            object.__setattr__(self, "on_response", None)
        return self

    @cached_property
    def _parameter(self) -> bytes | None:
        return None if self.query is None else f"&{self.query}=".encode("ascii")

    @cached_property
    def _pair(self) -> SubprotocolPair | None:
        return None if self.websocket_protocol is None else SubprotocolPair(self.websocket_protocol)

    @cached_property
    def _failures(self) -> StoreFailures:
        return StoreFailures(_EVENT)

    @cached_property
    def _rivals(self) -> tuple[bytes, ...]:
        return tuple(name.lower().encode("ascii") for name in self.conflicts_with)

    @cached_property
    def _challenge(self) -> HeaderLines:
        return (challenge_line("Bearer", self.realm),)

    @cached_property
    def _invalid_request(self) -> HeaderLines:
        return (challenge_line("Bearer", self.realm, "invalid_request"),)

    @cached_property
    def _invalid_token(self) -> HeaderLines:
        return (challenge_line("Bearer", self.realm, "invalid_token"),)

    def rules(self) -> Mapping[str, str]:
        return self.audiences

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.store),) if hasattr(self.store, "aclose") else ()

    def on_request(self, ex: Exchange) -> Problem | Awaitable[Problem | None] | None:
        if ex.kind != "websocket":
            return None
        try:
            presented = self._presented(ex)
        except ValueError:
            return CREDENTIALS_MALFORMED("The ticket cannot be read", headers=self._invalid_request)
        if not presented:
            if ex.principal is None:
                ex.anonymous()
                offer(ex, self._challenge)
            return None
        if len(presented) > 1 or any(rival in ex.headers for rival in self._rivals):
            return CREDENTIALS_CONFLICTING(
                "The handshake carries a ticket and another credential", headers=self._invalid_request
            )
        used = ex.get(TicketUsed)
        if used is not None:
            # An outer one has taken it, and may know less of what it is for.
            return None if self._opens(ex, used.audience) else self._refused()
        if ex.principal is not None:
            return None  # an outer policy has answered for the caller
        if not is_ticket(presented[0]):
            return self._refused()
        try:
            record = cast("TicketStore", self.store).redeem(ticket_digest(presented[0]), ex.clock.monotonic())
        except Exception as error:  # noqa: BLE001  a store is somebody else's: whatever it raises, nobody is let in
            return self._unavailable(ex, error)
        return self._judge_later(ex, record) if isinstance(record, Awaitable) else self._judge(ex, record)

    def on_check(self, ex: Exchange) -> Close | float | None:
        return until_credentials_end(ex)

    def on_response(self, ex: Exchange, head: Head) -> None:
        if self._pair is not None:
            self._pair.select(ex, head)

    # --- parts of it -----------------------------------------------------------------------------------------------

    def _presented(self, ex: Exchange) -> list[bytes]:
        """The tickets that came, each way. `ValueError` for what cannot be read in one way alone."""
        presented = []
        if self._parameter is not None and ex.query:
            values = (b"&" + ex.query[:MAX_QUERY]).split(self._parameter, 2)[1:]
            if len(values) > 1:
                raise ValueError("the parameter stands in the query twice")
            presented += [value.partition(b"&")[0] for value in values]
        ticket = None if self._pair is None else self._pair.credential(ex)
        return presented if ticket is None else [*presented, ticket]

    async def _judge_later(self, ex: Exchange, redeeming: Awaitable[bytes | None]) -> Problem | None:
        try:
            with fail_after(self.deadline):
                record = await redeeming
        except Exception as error:  # noqa: BLE001  as above
            return self._unavailable(ex, error)
        return self._judge(ex, record)

    def _unavailable(self, ex: Exchange, error: Exception) -> Problem:
        return _unavailable(self._failures.report(self.store, error, ex.clock))

    def _judge(self, ex: Exchange, record: object) -> Problem | None:
        if record is not None and not isinstance(record, bytes):
            return self._unavailable(ex, TypeError("redeem returns bytes or None"))
        ticket = None if record is None else Ticket.decode(record)
        if ticket is None or not self._fits(ex, ticket):
            return self._refused()
        ex.authenticate(ticket.principal)
        known = ticket.key_id is not None and ticket.key_header is not None
        key = KeyUsed(ticket.key_id or "", ticket.key_header or "") if known else None
        ex.give(TicketUsed(key, ticket.audience))
        return None

    def _fits(self, ex: Exchange, ticket: Ticket) -> bool:
        expires = ticket.principal.expires
        if expires is not None and ex.clock.time() >= expires:
            return False
        if ticket.origin is not None and ex.headers.get(b"origin") != ticket.origin.encode("latin-1"):
            return False
        return self._opens(ex, ticket.audience)

    def _opens(self, ex: Exchange, audience: str | None) -> bool:
        # A path with a dot segment has no rule, and may lead to a route that has one.
        return audience == ex.rule(self) and not (self.audiences and has_dot_segment(ex.path))

    def _refused(self) -> Problem:
        return TICKET_INVALID("The ticket is not valid", headers=self._invalid_token)


class WebSocketTickets(Policy):
    """Sells tickets for WebSockets to authenticated callers.

        WebSocketTickets(path="/ws-ticket", store=tickets)

    `POST` there answers 201 with `{"ticket": "wst_...", "expires_in": 30}`; its body is not read. Nobody gets 401
    `AUTH_001`, other methods 405, a caller with too many unused tickets 429 `RATE_005` with `Retry-After`, a credential
    that says more than a ticket carries (8 KiB) 422 `REQ_422`, and all 503 `SRV_503` with `Retry-After` while the store
    is away or full. The application never sees a request to this path.
    """

    needs: ClassVar[tuple[type, ...]] = (Principal,)

    store: Annotated[Any, found_by(ticket_store)]
    """Where the tickets are: a `TicketStore`, or the URL of a Redis or Valkey server."""

    path: str = "/ws-ticket"
    """The route at which tickets are sold (default `"/ws-ticket"`)."""

    ttl: Annotated[int, Field(ge=1, le=int(MAX_TTL))] = 30
    """Seconds that a ticket holds, 1 to 300 (default 30), and never longer than the credential that bought it."""

    per_caller: Annotated[int, Field(ge=1, le=1_000)] = 10
    """How many unused tickets a caller may have at once (default 10)."""

    bind_origin: bool = True
    """Whether a ticket that a web page has bought opens WebSockets of pages of the same `Origin` alone (default True).
    """

    audience: Label | None = None
    """Which routes the tickets open, as `audiences` of `WebSocketTicketAuth` names them (default None: those that are
    not in its table)."""

    deadline: Annotated[float, Field(ge=0.001, le=60)] = 2.0
    """Seconds that the store may take (default 2); then 503. A store may have a shorter one itself."""

    @model_validator(mode="after")
    def _prepare(self) -> Self:
        _check_store(self.store)
        _ = self._failures
        if parse_route(self.path).method is not None:
            raise ValueError(f"path is {self.path!r}; write the path alone, tickets are sold by POST")
        return self

    @cached_property
    def _failures(self) -> StoreFailures:
        return StoreFailures(_EVENT)

    def rules(self) -> Mapping[str, bool]:
        return {self.path: True}

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.store),) if hasattr(self.store, "aclose") else ()

    def describe(self, operation: Operation, rule: bool | None) -> None:
        if not rule:
            return
        if operation.method != "POST":
            operation.answers(http_problem(405), headers={"Allow": ("The method that this path has: POST", {})})
            return
        operation.required = operation.answered = True
        operation.answers(CREDENTIALS_MISSING, CREDENTIALS_CONFLICTING, headers=("WWW-Authenticate",))
        operation.answers(http_problem(422))
        if self.bind_origin:
            operation.answers(http_problem(400))
        operation.answers(TICKETS_EXCEEDED, http_problem(503), headers=("Retry-After",), retry_after=self.ttl)

    def serves(self) -> Iterable[Served]:
        ticket = {"type": "string", "description": "Good for one WebSocket"}
        lifetime = {"type": "integer", "description": "Seconds for which it holds", "maximum": self.ttl}
        schema = {
            "type": "object",
            "required": ["ticket", "expires_in"],
            "properties": {"ticket": ticket, "expires_in": lifetime},
        }
        sold = {"description": "A ticket", "content": {"application/json": {"schema": schema}}}
        yield Served("POST", self.path, {"summary": "Buy a ticket for a WebSocket", "responses": {"201": sold}})

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        if not ex.rule(self) or ex.kind != "http":
            return None
        if ex.method != "POST":
            return http_problem(405)("Tickets are sold by POST", headers=((b"allow", b"POST"),))
        principal = ex.principal
        if principal is None:
            offered = ex.get(Challenges)
            return CREDENTIALS_MISSING(
                "Tickets are sold to authenticated callers",
                headers=_DEFAULT_CHALLENGE if offered is None else offered.lines,
            )
        if len(ex.principals) > 1:
            return CREDENTIALS_CONFLICTING(
                "A ticket stands for one credential",
                headers=(challenge_line(token_scheme(ex), principal.realm, "invalid_request"),),
            )
        origin = ex.headers.get(b"origin") if self.bind_origin else None
        if origin is not None and (b"origin" in ex.repeated or len(origin) > _LONGEST_ORIGIN):
            return http_problem(400)("The Origin header cannot be read")
        ttl = float(self.ttl)
        if principal.expires is not None:
            ttl = max(0.0, min(ttl, principal.expires - ex.clock.time()))
        try:
            record = _ticket(ex, principal, origin, self.audience).encode()
        except ValueError:
            return http_problem(422)("This credential says more of its caller than a ticket can carry")
        text = new_ticket()
        try:
            wait = cast("TicketStore", self.store).issue(
                ticket_digest(text),
                record,
                holder=principal.key,
                most=self.per_caller,
                ttl=ttl,
                now=ex.clock.monotonic(),
            )
        except Exception as error:  # noqa: BLE001  a store is somebody else's, and may raise anything
            return self._unavailable(ex, error)
        return self._later(ex, text, ttl, wait) if isinstance(wait, Awaitable) else self._answer(ex, text, ttl, wait)

    async def _later(self, ex: Exchange, text: str, ttl: float, issuing: Awaitable[float]) -> Answer:
        try:
            with fail_after(self.deadline):
                wait = await issuing
        except Exception as error:  # noqa: BLE001  as above
            return self._unavailable(ex, error)
        return self._answer(ex, text, ttl, wait)

    def _unavailable(self, ex: Exchange, error: Exception) -> Problem:
        return _unavailable(self._failures.report(self.store, error, ex.clock))

    def _answer(self, ex: Exchange, text: str, ttl: float, wait: float) -> Answer:
        if type(wait) not in (int, float):
            return self._unavailable(ex, TypeError("issue returns seconds"))
        if wait > 0:
            return TICKETS_EXCEEDED(
                f"This caller has {self.per_caller} tickets that were not used yet", retry_after=wait
            )
        body = encode_json({"ticket": text, "expires_in": int(ttl)})
        return Reply(
            status=201,
            headers=(
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"),
                (b"x-content-type-options", b"nosniff"),
            ),
            body=body,
        )


def _ticket(ex: Exchange, principal: Principal, origin: bytes | None, audience: str | None) -> Ticket:
    key = ex.get(KeyUsed) if principal.kind == "api_key" else None
    return Ticket(
        principal,
        None if origin is None else origin.decode("latin-1"),
        audience,
        None if key is None else key.id,
        None if key is None else key.header,
    )


def _unavailable(wait: float) -> Problem:
    return http_problem(503)("Tickets cannot be issued or checked at the moment", retry_after=wait)

"""One request and its response, or one WebSocket, as the policies of a stack see it."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from starlette.authentication import UnauthenticatedUser

from sigil_policy.core.clock import Clock
from sigil_policy.core.facts import Cosigners, Credentials, Principal, TokenUsage

if TYPE_CHECKING:
    from sigil_policy.core.host import Host, Resolution
    from sigil_policy.core.problems import ProblemStyle

SCOPE_KEY = "sigil_policy"

Fact = TypeVar("Fact")
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Outcome = Literal["ok", "refused", "error", "timeout", "cancelled", "disconnected"]

_ANYONE = UnauthenticatedUser()
_NO_CREDENTIALS = Credentials()
_NO_RULES: dict[int, Any] = {}
_NONE_REPEATED: Mapping[bytes, tuple[bytes, ...]] = MappingProxyType({})
_MOST_TOKENS = 999_999_999_999_999  # what an Integer of RFC 9651 can say
_KNOWN_NAMES: set[bytes] = set()
_NO_FACTS: frozenset[type] = frozenset()
_NO_NAMES: frozenset[str] = frozenset()
_CURRENT: ContextVar["Exchange | None"] = ContextVar("sigil_policy.exchange", default=None)


class _AllScopes(frozenset[str]):
    """Every scope is in it: what `admin` holds."""

    __slots__ = ()

    def __contains__(self, scope: object) -> bool:
        return True


class MissingFactError(KeyError):
    """A fact was asked for that no policy of this exchange has given."""

    def __str__(self) -> str:
        return str(self.args[0])


class BodyTooLargeError(ValueError):
    """`Exchange.body(limit)` met a request body over its limit."""


class StreamEndedError(OSError):
    """What `send` raises in the application once a policy has ended the stream (see `EndOfStream`).

    An `OSError`, as servers raise for a client that has left: code that handles that one handles this one.

        try:
            await send(message)
        except StreamEndedError:
            await model.stop()
            raise
    """


class Head:
    """Status and headers of a response on their way out; a hook reads and changes them in place.

    Names are lower-case bytes. `headers` is a plain list of pairs: appending a pre-encoded pair is the fast way to add
    a header. `get` returns the first value; `replace` leaves exactly one.

        def on_response(self, ex, head):
            if head.get(b"cache-control") is None:
                head.headers.append((b"cache-control", b"no-store"))
    """

    __slots__ = ("headers", "status")

    def __init__(self, status: int, headers: Iterable[Iterable[bytes]]) -> None:
        self.status = status
        # Servers hand names on as they are; Django sends `Content-Type`. HTTP compares names without case.
        self.headers: list[tuple[bytes, bytes]] = [
            (name if name.islower() else name.lower(), value) for name, value in headers
        ]

    def get(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def get_all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    def remove(self, *names: bytes) -> None:
        self.headers[:] = [pair for pair in self.headers if pair[0] not in names]

    def replace(self, name: bytes, value: bytes) -> None:
        self.headers[:] = [pair for pair in self.headers if pair[0] != name]
        self.headers.append((name, value))

    def __repr__(self) -> str:
        return f"Head({self.status}, {[name.decode('latin-1') for name, _ in self.headers]})"


class Inlet:
    """What the application of an inner stack hears, behind a middleware that has a `receive` of its own.

    That one may have read the body already, or hand it on otherwise than it came: in there, it is the body.
    """

    __slots__ = ("receive", "replay")

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.replay: Message | None = None

    async def hear(self) -> Message:
        replay = self.replay
        if replay is None:
            return await self.receive()
        self.replay = None
        return replay


async def _over() -> Message:
    return {"type": "http.disconnect"}


async def _over_for_socket() -> Message:
    return {"type": "websocket.disconnect", "code": 1005, "reason": ""}


_OVER: Mapping[str, Receive] = {"http": _over, "websocket": _over_for_socket}


def _are_lower_case(names: Iterable[bytes]) -> bool:
    """Whether no name has an upper-case letter. Names that were seen once are remembered, up to a bound."""
    for name in names:
        if name != name.lower():
            return False
        if len(name) <= 64 and len(_KNOWN_NAMES) < 4_096:
            _KNOWN_NAMES.add(name)
    return True


class Exchange(dict[type, Any]):
    """What is known of one exchange. Made by the outermost stack, shared by the stacks inside it.

    It maps the type of a fact to the fact: `ex[Principal]`, `ex.get(Quota)`, `Correlation in ex`; see `give`. (It is a
    dict because every policy asks it something, on every exchange.)

    Read-only for policies: `kind` (`"http"` or `"websocket"`), `method` (`"WEBSOCKET"` for a WebSocket), `path`
    (decoded, as the outermost stack saw it), `query` (raw bytes), `headers`, `repeated`, `client`, `clock`, `started`
    (seconds since the epoch), and once known `status`, `sent_bytes`, `first_byte`, `last_byte`, `error`, `outcome`,
    `refused_by`.
    """

    # Slots: making one costs half as much as with an instance dictionary.
    __slots__ = (
        "__weakref__", "_closing", "_ended", "_given", "_inlet", "_notes", "_outer_scope", "_receive", "_replay",
        "_resolution", "_root", "_rules", "_said", "_scope", "_understood", "clock", "done", "error", "finished",
        "first_byte", "gone", "headers", "host", "kind", "last_byte", "method", "path", "principal", "query",
        "refused_by", "repeated", "sent_bytes", "started", "started_monotonic", "status", "style",
    )  # fmt: skip

    def __init__(self, scope: Message, receive: Receive, clock: Clock, host: "Host", style: "ProblemStyle") -> None:
        self.status: int | None = None
        self.sent_bytes = 0
        self.first_byte: float | None = None
        self.last_byte: float | None = None
        self.done = self.gone = self.finished = self._ended = False
        self.error: BaseException | None = None
        self.refused_by: str | None = None
        self.principal: Principal | None = None
        self.repeated: Mapping[bytes, tuple[bytes, ...]] = _NONE_REPEATED
        self._rules: Mapping[int, Any] = _NO_RULES
        self._replay: Message | None = None
        self._inlet: Inlet | None = None
        self._closing: Message | None = None
        self._given: frozenset[type] = _NO_FACTS
        self._understood: frozenset[str] = _NO_NAMES
        # What the outermost stack has found, and with it what the stacks around the code that runs have found.
        self._resolution: Resolution | None = None
        self._said: Resolution | None = None
        self._scope = self._outer_scope = scope
        self._receive = receive
        self._notes: dict[int, Any] = {}
        self.clock = clock
        self.host = host
        self.style = style
        self.started = clock.time()
        self.started_monotonic = clock.monotonic()
        self.kind: str = scope["type"]
        self.method: str = scope["method"] if self.kind == "http" else "WEBSOCKET"
        self.path: str = scope["path"]
        self._root: str = scope.get("root_path") or ""
        self.query: bytes = scope.get("query_string") or b""
        pairs: Any = scope.get("headers") or ()
        if type(pairs) is not list:
            pairs = list(pairs)
        try:
            headers: dict[bytes, bytes] = dict(pairs)
            plain = len(headers) == len(pairs) and (_KNOWN_NAMES.issuperset(headers) or _are_lower_case(headers))
        except (TypeError, ValueError):
            plain = False
        self.headers: dict[bytes, bytes] = headers if plain else self._gather(pairs)

    def _gather(self, pairs: Iterable[Iterable[bytes]]) -> dict[bytes, bytes]:
        lines: dict[bytes, list[bytes]] = {}
        for name, value in pairs:
            lines.setdefault(bytes(name).lower(), []).append(bytes(value))
        self.repeated = {name: tuple(values) for name, values in lines.items() if len(values) > 1}
        return {
            name: values[0] if len(values) == 1 else (b"; " if name == b"cookie" else b", ").join(values)
            for name, values in lines.items()
        }

    async def _hear(self) -> Message:
        """What the application receives: notices a client that leaves, replays a body that a policy has read."""
        replay = self._replay
        if replay is not None:
            if self._closing is None:  # a WebSocket that a policy has closed stays closed
                self._replay = None
            return replay
        message = await self._receive()
        kind = message["type"]
        if (kind == "http.disconnect" or kind == "websocket.disconnect") and not self.done:
            self.gone = True
        return message

    def close(self) -> None:
        """The exchange is over. The scope, in which it is, and the server, which has that scope, are let go: a cycle
        would wait for the garbage collector. Whoever still receives hears that the client has left."""
        self.finished = True
        self._scope = self._outer_scope = {}
        self._receive = _OVER[self.kind]

    # --- facts and notes -------------------------------------------------------------------------------------------

    if TYPE_CHECKING:

        def __getitem__(self, kind: type[Fact]) -> Fact: ...

        def get(self, kind: type[Fact]) -> Fact | None: ...  # type: ignore[override]

    def __missing__(self, kind: type) -> Any:
        raise MissingFactError(
            f"no policy has given a {kind.__name__} to this exchange; "
            f"mount a policy that gives {kind.__name__} outside, or ask with ex.get({kind.__name__})"
        )

    # One exchange is never another, whatever is known of them.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Exchange({self.method} {self.path!r}, {self.outcome}, knows {[kind.__name__ for kind in self]})"

    def give(self, fact: object) -> None:
        """Make `fact` known to every policy and to the application; the newest of a type holds."""
        if type(fact) is Principal:
            self.authenticate(fact)
        self[type(fact)] = fact

    def note(self, policy: object) -> Any:
        """What `policy` itself kept with `keep`, or None. Two equal policies never share a note."""
        return self._notes.get(id(policy))

    def keep(self, policy: object, note: Any) -> None:
        self._notes[id(policy)] = note

    def rule(self, policy: object) -> Any:
        """The setting of the most specific route rule of `policy` that covers this exchange, or None."""
        return self._rules.get(id(policy))

    # --- who calls -------------------------------------------------------------------------------------------------

    @property
    def client(self) -> str | None:
        """The peer's address as the server saw it (None on a unix socket). Never taken from a header."""
        client = self._outer_scope.get("client")
        return client[0] if client else None

    def authenticate(self, principal: Principal) -> None:
        """Make `principal` the caller: the fact, `request.user` and `request.auth`."""
        self[Principal] = principal
        self.principal = principal
        self._scope["user"] = principal
        self._scope["auth"] = principal.credentials

    def cosign(self, principal: Principal) -> None:
        """A further credential was verified, and speaks for `principal`. Who acts stays the caller: `ex.principal`,
        `request.user`, quotas. Verified again, by a policy further in, only the newest of a `principal.key` counts."""
        if self.principal is None:
            self.authenticate(principal)
            return
        others = (other for other in self.get(Cosigners) or () if other.key != principal.key)
        self[Cosigners] = Cosigners((*others, principal))

    @property
    def principals(self) -> tuple[Principal, ...]:
        """Whom the verified credentials of this exchange speak for: the caller first, then the cosigners."""
        caller = self.principal
        return () if caller is None else (caller, *(self.get(Cosigners) or ()))

    def anonymous(self) -> None:
        """Nobody has said who they are; `request.user` and `request.auth` say so too."""
        if "auth" not in self._scope:
            self._scope["user"] = _ANYONE
            self._scope["auth"] = _NO_CREDENTIALS

    def grant_all(self) -> None:
        """`request.auth.scopes` holds every scope from here on: what a superscope means."""
        self._scope["auth"] = Credentials(_AllScopes(self.principal.scopes if self.principal else ()))

    # --- the request body ------------------------------------------------------------------------------------------

    async def body(self, limit: int) -> bytes:
        """The whole request body; the application still receives it.

        Nothing reads the body unless a policy asks. Raises `BodyTooLargeError` as soon as more than `limit` bytes
        have come (what was read is still replayed), `ConnectionError` if the client left first, and `TypeError` on a
        WebSocket.
        """
        if self.kind != "http":
            raise TypeError("a WebSocket has no request body; look at ex.kind before you ask for one")
        inlet = self._inlet
        replay, receive = (self._replay, self._receive) if inlet is None else (inlet.replay, inlet.receive)
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and len(length) < 20 and int(length) > limit and replay is None:
            raise BodyTooLargeError(f"the request body is over {limit} bytes")
        body = b""
        # One buffer: a client that sends it in a million parts, or in empty ones, costs no more than its bytes.
        parts: bytearray | None = None
        more = True
        if replay is not None and replay["type"] == "http.request":
            body, more = replay["body"], replay["more_body"]
        while more and len(body if parts is None else parts) <= limit:
            message = replay if replay is not None and replay["type"] != "http.request" else await receive()
            if message["type"] != "http.request":
                self._keep_body(message)
                self.gone = self.gone or not self.done
                raise ConnectionError("the client left before the request body was complete")
            part = message.get("body", b"")
            if not body:  # it nearly always comes at once
                body = part
            elif part:
                if parts is None:
                    parts = bytearray(body)
                parts += part
            more = message.get("more_body", False)
        if parts is not None or type(body) is not bytes:
            body = bytes(body if parts is None else parts)
        self._keep_body({"type": "http.request", "body": body, "more_body": more})
        if len(body) > limit:
            raise BodyTooLargeError(f"the request body is over {limit} bytes")
        return body

    def _keep_body(self, message: Message) -> None:
        """What the application hears next: all that was read."""
        if self._inlet is None:
            self._replay = message
        else:
            self._inlet.replay = message

    @property
    def route(self) -> str | None:
        """The template of the route that serves this exchange (`/v7/agents/{name}`), with its prefixes and root.

        What the framework has said, and before that what its routes say; None where neither can be read.
        """
        return self.host.route(self._outer_scope, self._root)

    @property
    def debug(self) -> bool:
        """Whether the application asked for its own debug pages."""
        return self.host.debug(self._outer_scope)

    @property
    def scope(self) -> Message:
        """The ASGI scope, for what knows a framework. A policy reads the exchange instead, and writes neither."""
        return self._outer_scope

    # --- how it ended ----------------------------------------------------------------------------------------------

    @property
    def outcome(self) -> Outcome:
        """How the exchange ended, as far as is known now. `refused` is also a stream that a policy has ended.

        `disconnected` needs a sign: an `http.disconnect` that somebody received or a `send` that raised. A server that
        sends silently to a client that has left makes that exchange end `ok`.
        """
        if self.gone:
            return "disconnected"
        error = self.error
        if error is not None:
            if isinstance(error, TimeoutError):
                return "timeout"
            return "error" if isinstance(error, Exception) else "cancelled"
        return "ok" if self.refused_by is None else "refused"


def current_exchange() -> Exchange | None:
    """The exchange that the running code serves, or None outside of one. Works in sync endpoints and in tasks too."""
    return _CURRENT.get()


def get_exchange(source: Any) -> Exchange:
    """The exchange of a Starlette/FastAPI `Request` or `WebSocket`, or of an ASGI scope.

        @app.get("/v7/whoami")
        async def whoami(request: Request) -> dict[str, str]:
            return {"subject": get_exchange(request)[Principal].subject}

    Raises `LookupError` when no `PolicyStack` is mounted around the application.
    """
    scope = source if isinstance(source, dict) else source.scope
    exchange = scope.get(SCOPE_KEY)
    if not isinstance(exchange, Exchange):
        raise LookupError(
            "this request did not pass a PolicyStack; mount one with app.add_middleware(PolicyStack, ...)"
        )
    return exchange


def report_tokens(
    source: Any, *, input_tokens: int = 0, output_tokens: int = 0, total_tokens: int | None = None
) -> TokenUsage:
    """Add language-model tokens to what this exchange has used; call it as often as there is news.

        report_tokens(request, input_tokens=120, output_tokens=48)

    `total_tokens` defaults to input plus output. Returns the sum so far. Raises `TypeError` for what is no int,
    `ValueError` for a negative or absurd number.
    """
    for count in (input_tokens, output_tokens, 0 if total_tokens is None else total_tokens):
        if type(count) is not int:
            raise TypeError(f"a token count is an int, not {type(count).__name__}")
        if not 0 <= count <= _MOST_TOKENS:
            raise ValueError("a token count cannot be negative or over 999,999,999,999,999; report what was used since")
    total = input_tokens + output_tokens if total_tokens is None else total_tokens
    exchange = get_exchange(source)
    so_far = exchange.get(TokenUsage) or TokenUsage()
    usage = TokenUsage(so_far[0] + input_tokens, so_far[1] + output_tokens, so_far[2] + total)
    exchange.give(usage)
    return usage

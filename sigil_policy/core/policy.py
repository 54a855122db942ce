"""What the author of a policy writes.

    class Greeting(Policy):
        '''Says hello on every response.'''

        name: str = "world"

        def on_response(self, ex: Exchange, head: Head) -> None:
            head.headers.append((b"greeting", self.name.encode()))

    app.add_middleware(PolicyStack, policies=[Greeting(name="moon")])

A subclass is a frozen, keyword-only, validated dataclass by itself; there is nothing to register. Every hook is
optional, and one that is not overridden costs nothing.
"""

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as validated_dataclass

from sigil_policy.core.exchange import Exchange, Head, Message
from sigil_policy.core.marks import Marks
from sigil_policy.core.problems import Problem, Reply

if TYPE_CHECKING:
    from sigil_policy.core.host import Resolution
    from sigil_policy.core.operations import Operation, Served

Answer = Problem | Reply | None

Item = TypeVar("Item")
Listed = Annotated[Sequence[Item], AfterValidator(tuple)]
"""A list or a tuple, as whoever writes it likes; kept as a tuple, because a policy is a value."""

OVER_LIMIT = 4429
CREDENTIAL_ENDED = 4401
"""Close codes of ours, named after the status that says the same on HTTP."""
_CODES = {*range(1000, 1015), *range(3000, 5000)} - {1004, 1005, 1006, 1010}
_CONFIG = ConfigDict(extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """What `on_chunk` returns to end a stream here: the chunk still goes out, then `last`, then nothing more.

        def on_chunk(self, ex: Exchange, chunk: bytes) -> EndOfStream | None:
            return EndOfStream(b"event: error\\ndata: {}\\n\\n") if self.is_over(ex) else None

    The client sees a response that is complete. Policies outside see both as chunks. What comes from inside after that
    is not sent: the application's next `send` raises `StreamEndedError`, an `OSError` as for a client that has left,
    and `receive` gives what servers give after a complete response, `http.disconnect`. The outcome is `refused`, by
    this policy. What the application raises because of it (that OSError, what was raised from it or while it was
    handled, a group of only such) is no error of the exchange, and no policy sees it; anything else still is one. A
    failure that hides behind it, as of a clean-up, is logged.

    Only what can be cut is ended. It has no effect on a response that has promised a `content-length` (RFC 9112
    section 8) or trailers, as its head left this policy, nor on the last chunk, after which nothing comes anyway.
    """

    last: bytes = b""


@dataclass(frozen=True, slots=True)
class Close:
    """What `on_message` and `on_check` return to close a WebSocket.

        def on_check(self, ex: Exchange) -> Close | float:
            return Close(4401, "the credential has ended") if self.is_over(ex) else 30.0

    The close frame goes out, and nothing after it: the application's next `send` raises `StreamEndedError`, and
    `receive` gives `websocket.disconnect` with this code, as if the client had left. The outcome is `refused`, by this
    policy; what the application raises because of it (also Starlette's `WebSocketDisconnect`) is no error.

    Options:
        code: one that a server may send: 1000 to 1014 without 1004, 1005, 1006 and 1010, or 3000 to 4999, of which
            those from 4000 are nobody else's (RFC 6455 section 7.4; default 1008, "policy violation").
        reason: at most 123 bytes of UTF-8 (section 5.5); servers before ASGI 2.3 don't send it (default empty).

    Raises `ValueError` for what no close frame can hold.
    """

    code: int = 1008
    reason: str = ""

    def __post_init__(self) -> None:
        if self.code not in _CODES:
            raise ValueError(f"close code {self.code} cannot be sent; take 1008, or one from 4000 to 4999 (RFC 6455)")
        if len(self.reason.encode()) > 123:
            raise ValueError("a close reason is at most 123 bytes of UTF-8 (RFC 6455 section 5.5)")


class Closable(Protocol):
    """What a policy owns beyond an exchange: a store with connections."""

    async def aclose(self) -> None: ...


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, field))
class Policy:
    """One rule about an exchange. Subclass it, override the hooks you need.

    Hooks, in the order in which an exchange meets them (policies are listed outermost first):

    * `on_request(ex)`: outermost first. `None` goes on; a `Problem` or a `Reply` answers here.
    * `around(ex)`: an async context manager that wraps everything inside this policy, or None.
    * `on_body(ex, head, body)`: the whole response body, if it is complete and at most `bound` bytes; see `wants_body`.
      May change `head`; may return other bytes. Innermost first, like all that follow.
    * `on_response(ex, head)`: just before the head leaves this policy. No IO.
    * `on_chunk(ex, chunk)`: each body part that leaves this policy, before it goes on; see `wants_chunks`. Watch, don't
      delay. May return `EndOfStream` to cut the stream short.
    * `on_message(ex, message)`: each message of the client on an accepted WebSocket, before the application gets it.
      Outermost first.
    * `on_check(ex)`: asked on an accepted WebSocket, and again after as many seconds as it says.
    * `on_error(ex, error)`: an exception came out of what is inside, and no response has left outwards yet.
    * `on_finish(ex)`: exactly once for every policy whose turn came, however it ended (`ex.outcome`).

    All but `around`, `wants_body`, `on_response` and `wants_chunks` may return an awaitable when they have real IO to
    wait for. One from `on_chunk` holds the chunk, and the application that sends it, until it is done.

    Order is declared, not remembered: `gives` names the facts this policy gives, `needs` those an outer policy must
    have given, `reads` those it uses where an outer policy gives them, `precedes` those whose givers belong inside.
    """

    needs: ClassVar[tuple[type, ...]] = ()
    gives: ClassVar[tuple[type, ...]] = ()
    reads: ClassVar[tuple[type, ...]] = ()
    precedes: ClassVar[tuple[type, ...]] = ()

    marks: ClassVar[frozenset[str]] = frozenset()
    """Which marks of endpoints this policy understands; see `sigil_policy.core.marks` and `marked`."""

    bound: ClassVar[int] = 65_536
    """How many bytes of a body `on_body` may see; a subclass may make it a field."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        validated_dataclass(cls, frozen=True, kw_only=True, config=_CONFIG)

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        return None

    def around(self, ex: Exchange) -> AbstractAsyncContextManager[Any] | None:
        return None

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        """Whether `on_body` should see this response at all; asked once, with the head as it reached this policy."""
        return True

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> bytes | Awaitable[bytes | None] | None:
        return None

    def on_response(self, ex: Exchange, head: Head) -> None:
        return None

    def wants_chunks(self, ex: Exchange, head: Head) -> bool:
        """Whether `on_chunk` should see this response; asked once, with the head as it leaves this policy.

        A policy that has nothing to watch in a response costs its messages nothing.
        """
        return True

    def on_chunk(self, ex: Exchange, chunk: bytes) -> EndOfStream | Awaitable[EndOfStream | None] | None:
        return None

    def on_message(self, ex: Exchange, message: Message) -> Problem | Close | Awaitable[Problem | Close | None] | None:
        """What holds for `message` (`websocket.receive`): None hands it on.

        With a `Problem` it is not handed on, and the client gets the problem as a message (see
        `ProblemStyle.message`); with a `Close` it was the last one.
        """
        return None

    def on_check(self, ex: Exchange) -> float | Close | Awaitable[float | Close | None] | None:
        """Whether the connection may go on: for so many seconds, until it is asked again; None for ever.

        It is asked when the application next receives or sends after that time, and where it waits for a message just
        then, also without one coming. An application that does neither is not disturbed, and nothing passes.
        """
        return None

    def on_error(self, ex: Exchange, error: Exception) -> Answer | Awaitable[Answer]:
        return None

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        return None

    def rules(self) -> Mapping[str, Any] | None:
        """This policy's table from route to setting, read once when the stack is built; `ex.rule(self)` is its answer.

        A route is `"METHOD /v7/agents/{name}"` or `"/v7/**"` (any method, anything below).
        """
        return None

    def marked(self, marks: Marks, rule: Any, resolution: "Resolution") -> Any:
        """The setting for an endpoint that carries `marks`, where `rule` (or None) is what the table says.

        Asked once for each endpoint, which is that of `resolution`; `ex.rule(self)` is the answer. The table is the
        stronger. Raises `ValueError` for a mark that cannot be.
        """
        return rule

    def describe(self, operation: "Operation", rule: Any) -> None:
        """Say what this policy adds to an endpoint, for its OpenAPI document; `rule` is its setting there, or None."""

    def serves(self) -> "Iterable[Served]":
        """The operations that this policy answers by itself, for the OpenAPI document."""
        return ()

    def resources(self) -> Iterable[Closable]:
        """What the stack closes when the application shuts down."""
        return ()

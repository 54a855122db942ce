"""One exchange on its way through a stack: what it meets going in is `PolicyStack.__call__`, the rest is here.

Policies are numbered outer to inner, and a message on its way out passes them from the highest number to the lowest.
What must hold is written beside the code that does it; `tests/fusion` compares it with one stack per policy and with a
naive interpreter of the rules.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from inspect import isawaitable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from anyio import move_on_after
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from sigil_policy.core.exchange import Exchange, Head, Message, StreamEndedError
from sigil_policy.core.policy import Answer, EndOfStream, Policy
from sigil_policy.core.problems import Problem, Reply

if TYPE_CHECKING:
    from sigil_policy.core.socket import Socket
    from sigil_policy.core.stack import PolicyStack

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("sigil_policy")

_BODY = "http.response.body"
_STARTS = frozenset(("http.response.start", "websocket.accept", "websocket.http.response.start"))
_LAST = frozenset((_BODY, "http.response.pathsend", "websocket.close", "websocket.http.response.body"))
_LONGEST_CHAIN = 100
_ENDED = "a policy has ended this stream; nothing more is sent"
_NO_END = "on_chunk returns None, EndOfStream, or an awaitable of one of them, not {}"
_PROTOCOL = b"sec-websocket-protocol"
_HOOKS = (
    "on_request", "around", "on_body", "on_response", "on_chunk", "on_message", "on_check", "on_error", "on_finish",
)  # fmt: skip


class Layer:
    """One policy at its place: its hooks, None where it has none."""

    on_request: Any
    around: Any
    on_body: Any
    on_response: Any
    on_chunk: Any
    on_message: Any
    on_check: Any
    on_error: Any
    on_finish: Any

    __slots__ = ("bound", "index", "name", "wants_body", "wants_chunks", *_HOOKS)

    def __init__(self, index: int, policy: Policy) -> None:
        self.index = index
        self.name = type(policy).__name__
        self.bound: int = policy.bound
        self.wants_body = policy.wants_body
        asks = type(policy).wants_chunks is not Policy.wants_chunks
        self.wants_chunks = policy.wants_chunks if asks else None
        for hook in _HOOKS:
            overridden = getattr(type(policy), hook) is not getattr(Policy, hook)
            setattr(self, hook, getattr(policy, hook) if overridden else None)


class _Hold:
    """A response start that a policy keeps until it has seen the body, with the body messages so far."""

    __slots__ = ("head", "message", "messages", "size", "whole")

    def __init__(self, message: Message, head: Head) -> None:
        self.message = message
        self.head = head
        self.messages: list[Message] = []
        self.size = 0
        self.whole = False

    def waits_after(self, message: Message, bound: int) -> bool:
        """Add a body message; whether there is more to wait for."""
        self.messages.append(message)
        self.size += len(message.get("body", b""))
        fits = self.size <= bound
        if not message.get("more_body", False):
            self.whole = fits
            return False
        return fits and self.head.get(b"content-length") is not None

    def body(self) -> bytes:
        messages = self.messages
        if len(messages) == 1:
            body: bytes = messages[0].get("body", b"")
            return body
        return b"".join(message.get("body", b"") for message in messages)


# A message on its way: from which level, and for a start that was held its head and who held it.
_Outgoing = tuple[Message, int, Head | None, int]
# The index of a policy, its `on_chunk`, and whether it may end the stream.
_Watch = tuple[int, Any, bool]
# What most exchanges never have; replaced, not written to.
_NOTHING_HELD: dict[int, _Hold] = {}
_NO_AROUNDS: dict[int, AbstractAsyncContextManager[Any]] = {}
_NOBODY: list[_Watch] = []


def _replaced(head: Head, body: bytes) -> Message:
    """The body message for what `on_body` returned, with a head that agrees with it."""
    if head.status in (204, 304):
        head.remove(b"content-length")
    elif head.get(b"content-length") is not None:
        head.replace(b"content-length", b"%d" % len(body))
    return {"type": _BODY, "body": body, "more_body": False}


def _may_wait(message: Message, head: Head, bound: int) -> bool:
    """Whether a start may wait for its body, because nothing is delayed by it: never an event stream, and without a
    length it waits for the first body message only."""
    if message.get("trailers") or message["type"] != "http.response.start":
        return False  # trailers would follow a body that is gone (RFC 9110 section 15.4.5)
    for name, value in head.headers:
        if name == b"content-length":
            if not (value.isdigit() and len(value) < 20 and int(value) <= bound):
                return False
        elif name == b"content-type" and len(value) > 16 and value[:17].lower() == b"text/event-stream":
            return False
    return True


class Pass:
    """One exchange going through one stack."""

    __slots__ = (
        "arounds",
        "ex",
        "flowing",
        "held",
        "left",
        "marked",
        "outermost",
        "scope",
        "send",
        "socket",
        "stack",
        "watching",
    )

    def __init__(self, stack: "PolicyStack", ex: Exchange, scope: Scope, send: Send, outermost: bool) -> None:
        self.stack = stack
        self.ex = ex
        self.scope = scope
        self.send = send
        self.outermost = outermost
        # The outermost policy that a response start (or a WebSocket close) has left outwards: only what is outside of
        # it may still answer an error. It only ever decreases.
        self.left = stack.depth
        self.held = _NOTHING_HELD
        # Who watches the chunks of this response, innermost first.
        self.watching = _NOBODY
        # A stream that nobody watches is under way: what follows is sent and counted.
        self.flowing = False
        self.arounds = _NO_AROUNDS
        self.socket: Socket | None = None
        # Endpoints say things of themselves: the one that runs has to be the one that was asked.
        self.marked = False

    @property
    def version(self) -> tuple[int, ...]:
        """Of the WebSocket part of ASGI, as the server speaks it."""
        version = str((self.scope.get("asgi") or {}).get("spec_version") or "2.0")
        return tuple(int(part) for part in version.split(".") if part.isdigit())

    # --- outwards --------------------------------------------------------------------------------------------------

    async def emit(self, message: Message) -> None:
        """What the application sends. A start that nobody holds, and what follows it, take the short way."""
        ex, send = self.ex, self.send  # a slot that is called as if it was a method costs twice as much
        if self.flowing and message.get("more_body", False) and not ex._ended:  # noqa: SLF001
            try:
                await send(message)
            except Exception:
                self._lost()
                raise
            ex.sent_bytes += len(message.get("body", b""))
            return
        kind = message["type"]
        if self.held or ex._ended:  # noqa: SLF001
            if kind == _BODY and not message.get("more_body", False) and not ex._ended:  # noqa: SLF001
                await self._complete(message)
            else:
                await self.carry(message, self.stack.depth)
        elif kind == _BODY:
            body = message.get("body", b"")
            for index, on_chunk, open_end in self.watching:
                heard = on_chunk(ex, body)
                if heard is not None and await self._ends(index, heard, message, open_end):
                    return
            try:
                await send(message)
            except Exception:
                self._lost()
                raise
            if self.outermost:
                ex.sent_bytes += len(body)
                if message.get("more_body", False):
                    self.flowing = not self.watching
                else:
                    ex.done = True
                    ex.last_byte = ex.clock.monotonic()
        elif kind == "http.response.start":
            self.flowing = False
            if self.marked and self.outermost:
                self.stack.confirm(ex)
            if self.stack.starts[-1]:
                head = Head(message["status"], message.get("headers") or ())
                holder = self._decorate(message, head, self.stack.depth, -1)
                if holder >= 0:
                    self.held = {holder: _Hold(message, head)}
                    return
                message = {**message, "status": head.status, "headers": head.headers}
            self.left = 0
            if self.outermost:
                ex.status = int(message["status"])
                ex.first_byte = ex.clock.monotonic()
            try:
                await send(message)
            except Exception:
                self._lost()
                raise
        else:
            if kind == "websocket.accept" and self.marked and self.outermost:
                self.stack.confirm(ex)
            await self.carry(message, self.stack.depth)

    async def _complete(self, message: Message) -> None:
        """The last body message meets a start that is held; nearly always it is the only one, and one policy holds."""
        ex = self.ex
        [(index, hold), *others] = self.held.items()
        layer = self.stack.layers[index]
        body = message.get("body", b"")
        if others or hold.messages or self.watching or len(body) > layer.bound:
            await self.carry(message, self.stack.depth)
            return
        self.held = _NOTHING_HELD
        start, head = hold.message, hold.head
        body = layer.on_body(ex, head, body)
        if body is not None:
            if not isinstance(body, bytes):
                body = await body
            if body is not None:
                message = _replaced(head, body)
        holder = self._decorate(start, head, index + 1, index)
        if holder >= 0:
            self.held = {holder: _Hold(start, head)}
            await self.carry(message, index + 1)
            return
        start = {**start, "status": head.status, "headers": head.headers}
        if self.outermost:
            self._record(start, "http.response.start")
        try:
            await self.send(start)
        except Exception:
            self._lost()
            raise
        await self.emit(message)

    async def carry(self, message: Message, level: int, head: Head | None = None, released: int = -1) -> None:
        """Carry a message out through the layers below `level`.

        `head` and `released` go with a start that layer `released` held until now. What a policy lets go travels in
        the same loop: one coroutine for each message of the application, whatever the number of policies.
        """
        stack, ex = self.stack, self.ex
        if ex._ended or (ex._closing is not None and message is not ex._closing):  # noqa: SLF001
            raise StreamEndedError(_ENDED)
        waiting: list[_Outgoing] = []
        while True:
            kind = message["type"]
            held = self.held
            holder = let_go = -1
            through = True
            if kind == _BODY:
                for index in held:
                    if holder < index < level:
                        holder = index
                # Policies inside of who holds the start watch what follows it pass.
                for index, on_chunk, open_end in self.watching:
                    if holder < index < level:
                        heard = on_chunk(ex, message.get("body", b""))
                        if heard is not None and await self._ends(index, heard, message, open_end):
                            through = False
                            break
                else:
                    if holder >= 0:
                        through = False
                        hold = held[holder]
                        layer = stack.layers[holder]
                        messages = hold.messages
                        if not hold.waits_after(message, layer.bound):
                            let_go = holder
                            del held[let_go]
                            if hold.whole:
                                body = layer.on_body(ex, hold.head, hold.body())
                                if body is not None and not isinstance(body, bytes):
                                    body = await body
                                if body is not None:
                                    messages = [_replaced(hold.head, body)]
            elif kind in _STARTS:
                if stack.starts[level] or self.socket is not None:
                    if head is None:
                        head = Head(message.get("status", 101), message.get("headers") or ())
                    if kind == "websocket.accept":
                        message = self._accept(message, head, level)
                    else:
                        holder = self._decorate(message, head, level, released)
                        if holder < 0:
                            message = {**message, "status": head.status, "headers": head.headers}
                        else:
                            through = False
                            if holder in held:
                                # A second start meets a policy that still holds the first, which goes first.
                                hold = held.pop(holder)
                                let_go, messages = holder, hold.messages
                                waiting.append((message, holder + 1, head, released))
                            else:
                                self.held = {**held, holder: _Hold(message, head)}
                if through:
                    self.left = 0
            else:
                for index in held:
                    if let_go < index < level:
                        let_go = index
                if let_go >= 0:
                    # Any other message: whatever is held on its way goes first.
                    through = False
                    hold = held.pop(let_go)
                    messages = hold.messages
                    waiting.append((message, level, None, -1))
                elif kind == "websocket.close":
                    self.left = 0
                    if self.socket is not None:
                        self.socket.opened = stack.depth
                elif self.socket is not None:
                    await self.socket.check(level)
            if through:
                if self.outermost and kind != _BODY:
                    self._record(message, kind)
                try:
                    await self.send(message)
                except Exception:
                    self._lost()
                    raise
                if self.outermost and kind not in _STARTS:
                    if kind == _BODY:
                        ex.sent_bytes += len(message.get("body", b""))
                    elif kind == "websocket.send":
                        ex.sent_bytes += len(message.get("bytes") or message.get("text") or b"")
                    if kind in _LAST and not message.get("more_body", False):
                        ex.done = True
                        ex.last_byte = ex.clock.monotonic()
            elif let_go >= 0:
                # The start goes on from where it was held, then its body messages.
                level = let_go + 1
                waiting += [(body_message, level, None, -1) for body_message in reversed(messages)]
                message, head, released = hold.message, hold.head, let_go
                continue
            if not waiting or ex._ended:  # noqa: SLF001
                return
            message, level, head, released = waiting.pop()

    def _record(self, message: Message, kind: str) -> None:
        """Note what is handed to the server."""
        ex = self.ex
        if kind in _STARTS:
            ex.status = int(message.get("status", 101))
            ex.first_byte = ex.clock.monotonic()
        elif kind == "websocket.close" and ex.status is None:
            ex.status = 403  # what a server answers when a WebSocket is closed before it was accepted

    def _lost(self) -> None:
        """The server could not send: the client has gone."""
        if self.outermost:
            self.ex.gone = self.ex.gone or not self.ex.done

    def _decorate(self, message: Message, head: Head, level: int, released: int) -> int:
        """Run the head outwards from `level`; the policy that wants to hold it, or holds another, stops it there.

        Returns the index of that policy, -1 when the head has left them all.
        """
        ex = self.ex
        index = level
        try:
            for index, on_response, layer in self.stack.starts[level]:
                if layer is None:
                    on_response(ex, head)
                    continue
                if (
                    layer.on_body is not None
                    and index != released
                    and (index in self.held or (layer.wants_body(ex, head) and _may_wait(message, head, layer.bound)))
                ):
                    break
                if on_response is not None:
                    on_response(ex, head)
                if layer.on_chunk is not None and message["type"] == "http.response.start":
                    self._watch(layer, message, head)
            else:
                index = -1
        finally:
            # Wherever it stopped, it has left the policies inside of there.
            if self.left > index + 1:
                self.left = index + 1
        return index

    def _accept(self, message: Message, head: Head, level: int) -> Message:
        """Run `websocket.accept` outwards. What cannot be said of it must not reach the policies outside either.

        In the head, the chosen subprotocol is the field that it will be; ASGI has a key of its own for it.
        """
        ex = self.ex
        old = self.version < (2, 1)  # before 2.1 an accept had no other headers
        named: str | None = message.get("subprotocol")
        chosen = None if named is None else named.encode("latin-1")
        if chosen is not None:
            head.replace(_PROTOCOL, chosen)
        try:
            for index, on_response, _ in self.stack.starts[level]:
                self.left = min(self.left, index + 1)
                if on_response is not None:
                    on_response(ex, head)
                    head.status = 101
                    chosen = head.get(_PROTOCOL)
                    if old:
                        head = Head(101, message.get("headers") or ())
                    if chosen is not None:
                        head.replace(_PROTOCOL, chosen)
            head.remove(_PROTOCOL)
            self.left = 0
        finally:
            if self.socket is not None:
                self.socket.opened = self.left
        if not old:
            message = {**message, "headers": head.headers}
        now = None if chosen is None else chosen.decode("latin-1")
        return message if now == named else {**message, "subprotocol": now}

    def _watch(self, layer: Layer, message: Message, head: Head) -> None:
        """Ask a policy whether it watches the chunks behind this head, which is about to leave it."""
        index = layer.index
        wanted = layer.wants_chunks is None or layer.wants_chunks(self.ex, head)
        watching = self.watching
        if watching and watching[-1][0] <= index:  # a second start asks again
            watching = [watch for watch in watching if watch[0] != index]
        if wanted:
            open_end = head.get(b"content-length") is None and not message.get("trailers")
            watching = [*watching, (index, layer.on_chunk, open_end)]
            if len(watching) > 1:
                watching.sort(key=itemgetter(0), reverse=True)
        self.watching = watching

    async def _ends(self, index: int, heard: Any, message: Message, open_end: bool) -> bool:
        """Wait for what `on_chunk` of policy `index` returned; whether it has ended the stream with this message."""
        if not isinstance(heard, EndOfStream):
            if not isawaitable(heard):
                raise TypeError(_NO_END.format(type(heard).__name__))
            heard = await heard
            if heard is not None and not isinstance(heard, EndOfStream):
                raise TypeError(_NO_END.format(type(heard).__name__))
        if heard is None or not open_end or not message.get("more_body", False):
            return False
        ex = self.ex
        await self.carry(message, index)
        if not ex._ended:  # noqa: SLF001  by a policy outside, with this very chunk
            await self.carry({"type": _BODY, "body": heard.last, "more_body": False}, index)
            ex._ended = True  # noqa: SLF001
            ex.refused_by = self.stack.layers[index].name
        return True

    async def reply(self, answer: Problem | Reply, level: int) -> None:
        """Send a whole response from `level` outwards."""
        reply = answer if isinstance(answer, Reply) else self.ex.style.render(answer, self.ex)
        status, body, headers = reply.status, reply.body, list(reply.headers)
        if status in (204, 304):
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        if status in (204, 304) or self.ex.method == "HEAD":
            body = b""
        kind = "http.response"
        if self.ex.kind == "websocket":
            kind = "websocket.http.response"
            if kind not in (self.scope.get("extensions") or ()):
                await self.carry({"type": "websocket.close", "code": reply.code, "reason": ""}, level)
                kind = ""
        if kind:
            await self.carry({"type": f"{kind}.start", "status": status, "headers": headers}, level)
            await self.carry({"type": f"{kind}.body", "body": body, "more_body": False}, level)
        if reply.after is not None:
            await reply.after()

    async def _release(self, index: int) -> None:
        """Let go unchanged what layer `index` holds; a policy further out may take it over."""
        hold = self.held.pop(index)
        await self.carry(hold.message, index + 1, hold.head, index)
        for message in hold.messages:
            if not self.ex._ended:  # noqa: SLF001
                await self.carry(message, index + 1)

    # --- unwinding -------------------------------------------------------------------------------------------------

    async def unwind(self, error: BaseException | None, origin: int, entered: int) -> BaseException | None:
        """Inner to outer, per policy: flush or drop what it holds, leave `around`, `on_error`, `on_finish`.

        Returns the exception that is still pending. What came out of policy `origin`'s own `on_request` or reply is
        for the policies outside of it.
        """
        ex = self.ex
        if error is not None:
            ex.error = error
        for layer in self.stack.unwinds[entered]:
            index = layer.index
            if index in self.held:
                if error is None and not ex._ended:  # noqa: SLF001
                    try:
                        await self._release(index)
                    except BaseException as raised:
                        ex.error = error = raised
                else:
                    # Dropped, so that `on_error` may still answer.
                    del self.held[index]
            around = self.arounds.get(index)
            if around is not None:
                error = await self._leave(around, error)
            if isinstance(error, Exception) and layer.on_error is not None and index != origin and self.left > index:
                error = await self._answer(layer, error)
            if layer.on_finish is not None:
                waiting = self.finish(layer)
                if waiting is not None:
                    error = await self.wait(layer, waiting, error)
        return error

    async def _leave(
        self, around: AbstractAsyncContextManager[Any], error: BaseException | None
    ) -> BaseException | None:
        try:
            if error is None:
                await around.__aexit__(None, None, None)
                return None
            try:
                raise error  # so that it is the current exception there, as in a `with` block
            except BaseException:
                return None if await around.__aexit__(type(error), error, error.__traceback__) else error
        except BaseException as raised:
            self.ex.error = raised
            return raised

    async def _answer(self, layer: Layer, error: Exception) -> BaseException | None:
        try:
            try:
                raise error  # so that `logger.exception` and `raise ... from` work in the hook
            except Exception:
                answer = layer.on_error(self.ex, error)
                if answer is not None:
                    answer = await settled(answer)
            if answer is None:
                return error
            await self.reply(answer, layer.index)
        except BaseException as raised:
            self.ex.error = raised
            return raised
        return error if isinstance(answer, Reply) and answer.reraise else None

    def finish(self, layer: Layer) -> Awaitable[Any] | None:
        """Call `on_finish`; what is returned has to be waited for. It tells of its failure nobody but the log."""
        try:
            waiting: Awaitable[Any] | None = layer.on_finish(self.ex)
        except Exception:
            logger.exception("on_finish of %s failed", layer.name)
        except BaseException as raised:
            return _raise(raised)
        else:
            return waiting
        return None

    async def wait(self, layer: Layer, waiting: Awaitable[Any], error: BaseException | None) -> BaseException | None:
        """Wait for an `on_finish`, shielded and bounded; only a cancellation passes."""
        if isinstance(error, GeneratorExit):
            # The coroutine is being closed from outside: nothing may be awaited any more.
            getattr(waiting, "close", lambda: None)()
            return error
        try:
            with move_on_after(self.stack.finish_timeout, shield=True) as limit:
                await waiting
            if limit.cancelled_caught:
                logger.error("on_finish of %s was given up after %s s", layer.name, self.stack.finish_timeout)
        except Exception:
            logger.exception("on_finish of %s failed", layer.name)
        except BaseException as raised:
            self.ex.error = raised
            return raised
        return error


def because_ended(error: BaseException | None) -> bool:
    """Whether `error` is what became of a `StreamEndedError` in the application.

    Itself, what was raised from it or while it was handled (Starlette's `ClientDisconnect`), or a group of only such.
    """
    link = error
    for _ in range(_LONGEST_CHAIN):
        if isinstance(link, ExceptionGroup):
            return all(map(because_ended, link.exceptions))
        if isinstance(link, StreamEndedError | WebSocketDisconnect):
            if not isinstance(error, OSError | ClientDisconnect | WebSocketDisconnect):
                logger.warning("raised by the application because its stream was ended", exc_info=error)
            return True
        if not isinstance(link, Exception):
            return False
        link = link.__context__ if link.__cause__ is None else link.__cause__
    return False


async def _raise(error: BaseException) -> None:
    raise error


async def settled(answer: Any) -> Answer:
    """What a hook answered, awaited if need be."""
    if isinstance(answer, Problem | Reply):
        return answer
    if isawaitable(answer):
        answer = await answer
        if answer is None or isinstance(answer, Problem | Reply):
            return answer
    raise TypeError(f"a hook answers with None, a Problem or a Reply, not with {type(answer).__name__}")

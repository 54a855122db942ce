"""The pass: any number of policies around one application, in a single middleware.

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(), Problems()])    # outermost first
    app = PolicyStack(app, policies=[RequestID()])                                      # any ASGI application

This is the only file that sees `scope`, `receive` and `send`. Policies are numbered outer to inner, and a message on
its way out passes them from the highest number to the lowest. What must hold, and what the property test in
`tests/fusion` compares with one stack per policy and with a naive interpreter, is written beside the code that does it.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from copy import copy
from inspect import isawaitable
from typing import Any

from anyio import move_on_after

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.exchange import _CURRENT, SCOPE_KEY, Exchange, Head, Message, Receive
from sigil_policy.core.host import find_host
from sigil_policy.core.ordering import PolicyOrderError, check_order, missing_text
from sigil_policy.core.policy import Answer, Policy
from sigil_policy.core.problems import DEFAULT_STYLE, Problem, Reply
from sigil_policy.core.routing import RouteMatcher

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("sigil_policy")

_BODY = "http.response.body"
_STARTS = frozenset(("http.response.start", "websocket.accept", "websocket.http.response.start"))
_LAST = frozenset((_BODY, "http.response.pathsend", "websocket.close", "websocket.http.response.body"))
_OVER = frozenset(("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"))
_HOOKS = ("on_request", "around", "on_body", "on_response", "on_chunk", "on_error", "on_finish")


class _Layer:
    """One policy at its place: its hooks, None where it has none."""

    on_request: Any
    around: Any
    on_body: Any
    on_response: Any
    on_chunk: Any
    on_error: Any
    on_finish: Any

    __slots__ = ("bound", "index", "name", "wants_body", *_HOOKS)

    def __init__(self, index: int, policy: Policy) -> None:
        self.index = index
        self.name = type(policy).__name__
        self.bound: int = policy.bound
        self.wants_body = policy.wants_body
        for hook in _HOOKS:
            overridden = getattr(type(policy), hook) is not getattr(Policy, hook)
            setattr(self, hook, getattr(policy, hook) if overridden else None)


class PolicyStack:
    """ASGI middleware that runs `policies` (outermost first) around `app` in one pass.

    Stacks that are constructed directly around each other fuse: they are one program at the cost of one. A stack
    further in (on a mount, behind another middleware) shares the exchange of the outer one.

    Options:
        policies: policy instances, outermost first. An empty stack calls the application straight.
        clock: where time comes from (default: the machine's).
        finish_timeout: seconds that an awaiting `on_finish` may take; it runs shielded from cancellation (default 5).

    Raises `PolicyOrderError` for an order that cannot work, `TypeError` and `ValueError` for wrong options.
    """

    def __init__(
        self,
        app: Any,
        policies: Iterable[Policy] = (),
        *,
        clock: Clock = SYSTEM_CLOCK,
        finish_timeout: float = 5.0,
    ) -> None:
        given = list(policies)
        for policy in given:
            if not isinstance(policy, Policy):
                hint = f"; write {policy.__name__}(...)" if isinstance(policy, type) else ""  # type: ignore[unreachable]
                raise TypeError(f"policies must be Policy instances, not {type(policy).__name__}{hint}")
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {type(app).__name__}")
        if not finish_timeout > 0:
            raise ValueError(f"finish_timeout must be a number of seconds above 0, not {finish_timeout!r}")
        # A place in a stack is an object of its own: two equal policies never share notes.
        placed = tuple(copy(policy) for policy in given)
        if isinstance(app, PolicyStack):
            placed, app = placed + app.policies, app.app
        self.app: App = app
        self.policies: tuple[Policy, ...] = placed
        self.clock = clock
        self.finish_timeout = finish_timeout
        self.gives = frozenset(fact for policy in placed for fact in policy.gives)
        self.missing = check_order(placed)
        self.host = find_host(app)
        self.host.bind(placed)
        self._compile()

    def _compile(self) -> None:
        """Everything that can be known before the first exchange."""
        self.layers = layers = [_Layer(index, policy) for index, policy in enumerate(self.policies)]
        self.depth = len(layers)
        self.entries = [
            (layer.index, layer.on_request, layer.around) for layer in layers if layer.on_request or layer.around
        ]
        # Indexed by the level a message comes from: the layers outside of it that may act, innermost first.
        levels = range(self.depth + 1)

        def outside(level: int, *hooks: str) -> tuple[_Layer, ...]:
            acting = [layer for layer in layers[:level] if any(getattr(layer, hook) for hook in hooks)]
            return tuple(reversed(acting))

        self.starts = [
            tuple(
                (layer.index, layer.wants_body if layer.on_body else None, layer.on_response)
                for layer in outside(level, "on_response", "on_body")
            )
            for level in levels
        ]
        self.bodies = [outside(level, "on_body", "on_chunk") for level in levels]
        self.chunks = [tuple(layer.on_chunk for layer in outside(level, "on_chunk")) for level in levels]
        self.finishes = [outside(level, "on_finish") for level in levels]
        self.unwinds = [outside(level, "on_body", "around", "on_error", "on_finish") for level in levels]
        tables = {id(policy): rules for policy in self.policies if (rules := policy.rules())}
        self.matcher = RouteMatcher(tables) if tables else None
        self.resources = [resource for policy in self.policies for resource in policy.resources()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif not self.policies or (kind != "http" and kind != "websocket"):
            await self.app(scope, receive, send)
        else:
            ex: Exchange | None = scope.get(SCOPE_KEY)
            if ex is not None and not ex.finished:
                await _Pass(self, ex, scope, receive, send, False).run()
                return
            # The outermost stack makes the exchange, and alone sees what really goes to the server.
            ex = Exchange(scope, receive, self.clock, self.host, DEFAULT_STYLE)
            scope[SCOPE_KEY] = ex
            token = _CURRENT.set(ex)
            try:
                await _Pass(self, ex, scope, _watched(ex, receive), send, True).run()
            finally:
                ex.close()
                try:  # noqa: SIM105  `suppress` costs half a microsecond
                    _CURRENT.reset(token)
                except ValueError:
                    pass  # closed from another context, as an interrupted event loop does

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        outside: frozenset[type] = scope.get(SCOPE_KEY) or frozenset()
        missing = self.missing - outside
        if missing:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": missing_text(self.policies, missing)})
            return
        if not self.policies:
            await self.app(scope, receive, send)
            return
        scope[SCOPE_KEY] = outside | self.gives
        if not self.resources:
            await self.app(scope, receive, send)
            return

        async def send_after_closing(message: Message) -> None:
            if message["type"] in _OVER:
                await self.aclose()
            await send(message)

        await self.app(scope, receive, send_after_closing)

    async def aclose(self) -> None:
        """Close what the policies own; the lifespan does it where the server sends one. May be called again."""
        for resource in self.resources:
            try:
                await resource.aclose()
            except Exception:
                logger.exception("closing %s failed", type(resource).__name__)

    def __repr__(self) -> str:
        return f"PolicyStack({', '.join(map(repr, self.policies))})"


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
_NOTHING: list[_Outgoing] = []


def _replaced(head: Head, body: bytes) -> Message:
    """The body message for what `on_body` returned, with a head that agrees with it."""
    if head.status in (204, 304):
        head.remove(b"content-length")
    elif head.get(b"content-length") is not None:
        head.replace(b"content-length", b"%d" % len(body))
    return {"type": _BODY, "body": body, "more_body": False}


def _may_wait(message: Message, head: Head, layer: _Layer) -> bool:
    """Whether a start may wait for its body, because nothing is delayed by it: never an event stream, and without a
    length it waits for the first body message only."""
    if message["type"] != "http.response.start" or message.get("trailers"):
        return False  # trailers would follow a body that is gone (RFC 9110 section 15.4.5)
    fields = dict(reversed(head.headers))
    media_type = fields.get(b"content-type")
    if media_type is not None and media_type[:17].lower() == b"text/event-stream":
        return False
    length = fields.get(b"content-length")
    return length is None or (length.isdigit() and len(length) < 20 and int(length) <= layer.bound)


def _watched(ex: Exchange, receive: Receive) -> Receive:
    """What the application receives from: notices a client that leaves, replays a body that a policy has read."""

    async def watched() -> Message:
        replay = ex._replay  # noqa: SLF001
        if replay is not None:
            ex._replay = None  # noqa: SLF001
            return replay
        message = await receive()
        kind = message["type"]
        if (kind == "http.disconnect" or kind == "websocket.disconnect") and not ex.done:
            ex.gone = True
        return message

    return watched


class _Pass:
    """One exchange going through one stack."""

    __slots__ = ("arounds", "ex", "held", "left", "outermost", "receive", "scope", "send", "stack")

    def __init__(
        self, stack: PolicyStack, ex: Exchange, scope: Scope, receive: Receive, send: Send, outermost: bool
    ) -> None:
        self.stack = stack
        self.ex = ex
        self.scope = scope
        self.receive = receive
        self.send = send
        self.outermost = outermost
        # The outermost policy that a response start (or a WebSocket close) has left outwards: only what is outside of
        # it may still answer an error. It only ever decreases.
        self.left = stack.depth
        self.held: dict[int, _Hold] = {}
        self.arounds: dict[int, AbstractAsyncContextManager[Any]] = {}

    async def run(self) -> None:
        stack, ex = self.stack, self.ex
        error: BaseException | None = None
        origin = 0
        try:
            self._prepare()
            for origin, on_request, around in stack.entries:
                if on_request is not None:
                    answer = on_request(ex)
                    if answer is not None:
                        answer = await _settled(answer)
                        if answer is not None:
                            # Seen by the policies outside only: never by this one's own hooks or `around`.
                            if answer.status >= 400 and ex.refused_by is None:
                                ex.refused_by = stack.layers[origin].name
                            await self._reply(answer, origin)
                            break
                if around is not None:
                    context = around(ex)
                    if context is not None:
                        await context.__aenter__()
                        self.arounds[origin] = context
            else:
                origin = stack.depth
                await stack.app(self.scope, self.receive, self.emit)
        except BaseException as raised:
            error = raised
        # A policy is entered once its turn comes, also if its own hook raises.
        entered = min(origin + 1, stack.depth)
        if error is None and not self.held and not self.arounds:
            for layer in stack.finishes[entered]:
                waiting = self._finish(layer)
                if waiting is not None:
                    error = await self._wait(layer, waiting, error)
        else:
            error = await self._unwind(error, origin, entered)
        if error is not None:
            try:
                raise error
            finally:
                del error  # else the exception and this frame would hold each other

    def _prepare(self) -> None:
        stack, ex = self.stack, self.ex
        if stack.missing and not stack.missing <= ex._given:  # noqa: SLF001
            missing = stack.missing - ex._given  # noqa: SLF001
            raise PolicyOrderError(missing_text(stack.policies, missing))
        ex._given = ex._given | stack.gives if ex._given else stack.gives  # noqa: SLF001
        ex._scope = self.scope  # noqa: SLF001  a mount gives its application a copy
        if stack.matcher is not None:
            path = self.scope["path"]
            root = stack.host.root_path or self.scope.get("root_path")
            found = stack.matcher.match(ex.method, _below(root, path) if root else path)
            ex._rules = {**ex._rules, **found} if ex._rules else found  # noqa: SLF001

    # --- outwards --------------------------------------------------------------------------------------------------

    async def emit(self, message: Message, level: int = -1, head: Head | None = None, released: int = -1) -> None:
        """Carry a message out through the layers below `level` (default: from the application).

        `head` and `released` go with a start that layer `released` held until now. What a policy lets go travels in
        the same loop: one coroutine for each message of the application, whatever the number of policies.
        """
        stack, ex, held = self.stack, self.ex, self.held
        waiting: list[_Outgoing] = _NOTHING
        if level < 0:
            level = stack.depth
            if message["type"] == _BODY and not held:
                # One of the many messages of a stream: watched, sent, counted.
                body = message.get("body", b"")
                for watch in stack.chunks[level]:
                    watch(ex, body)
                try:
                    await self.send(message)
                except Exception:
                    self._lost()
                    raise
                if self.outermost:
                    ex.sent_bytes += len(body)
                    if not message.get("more_body", False):
                        self._done()
                return
        while True:
            kind = message["type"]
            let_go = -1
            through = True
            if kind == _BODY:
                if held:
                    layer = self._taker(message, level)
                    if layer is not None:
                        through = False
                        hold = held[layer.index]
                        messages = hold.messages
                        if not hold.waits_after(message, layer.bound):
                            let_go = layer.index
                            del held[let_go]
                            if hold.whole:
                                body = layer.on_body(ex, hold.head, hold.body())
                                if body is not None and not isinstance(body, bytes):
                                    body = await body
                                if body is not None:
                                    messages = [_replaced(hold.head, body)]
                else:
                    for watch in stack.chunks[level]:
                        watch(ex, message.get("body", b""))
            elif kind in _STARTS:
                if stack.starts[level]:
                    if head is None:
                        head = Head(message.get("status", 101), message.get("headers") or ())
                    if kind == "websocket.accept":
                        message = self._accept(message, head, level)
                    else:
                        stopped = self._decorate(message, head, level, released)
                        if stopped is None:
                            message = {**message, "status": head.status, "headers": head.headers}
                        else:
                            through = False
                            if stopped in held:
                                # A second start meets a policy that still holds the first, which goes first.
                                hold = held.pop(stopped)
                                let_go, messages = stopped, hold.messages
                                waiting = [*waiting, (message, stopped + 1, head, released)]
                            else:
                                held[stopped] = _Hold(message, head)
                if through:
                    self.left = 0
            else:
                let_go = max([index for index in held if index < level], default=-1) if held else -1
                if let_go >= 0:
                    # Any other message: whatever is held on its way goes first.
                    through = False
                    hold = held.pop(let_go)
                    messages = hold.messages
                    waiting = [*waiting, (message, level, None, -1)]
                elif kind == "websocket.close":
                    self.left = 0
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
                    if kind in _LAST and not message.get("more_body", False):
                        self._done()
            elif let_go >= 0:
                # The start goes on from where it was held, then its body messages.
                level = let_go + 1
                waiting = [*waiting, *[(body_message, level, None, -1) for body_message in reversed(messages)]]
                message, head, released = hold.message, hold.head, let_go
                continue
            if not waiting:
                return
            message, level, head, released = waiting.pop()

    def _record(self, message: Message, kind: str) -> None:
        """Note what is handed to the server."""
        ex = self.ex
        if kind in _STARTS:
            ex.status = message.get("status", 101)
            ex.first_byte = ex.clock.monotonic()
        elif kind == "websocket.close" and ex.status is None:
            ex.status = 403  # what a server answers when a WebSocket is closed before it was accepted

    def _lost(self) -> None:
        """The server could not send: the client has gone."""
        if self.outermost:
            self.ex.gone = self.ex.gone or not self.ex.done

    def _done(self) -> None:
        """The last that the client waits for has been sent."""
        self.ex.done = True
        self.ex.last_byte = self.ex.clock.monotonic()

    def _decorate(self, message: Message, head: Head, level: int, released: int) -> int | None:
        """Run the head outwards from `level`; the policy that wants to hold it, or holds another, stops it there."""
        ex = self.ex
        index = level
        try:
            for index, wants_body, on_response in self.stack.starts[level]:
                if (
                    wants_body is not None
                    and index != released
                    and (
                        index in self.held
                        or (wants_body(ex, head) and _may_wait(message, head, self.stack.layers[index]))
                    )
                ):
                    return index
                if on_response is not None:
                    on_response(ex, head)
            index = -1
        finally:
            # Wherever it stopped, it has left the policies inside of there.
            if self.left > index + 1:
                self.left = index + 1
        return None

    def _accept(self, message: Message, head: Head, level: int) -> Message:
        """Run `websocket.accept` outwards. What cannot be said of it must not reach the policies outside either."""
        ex = self.ex
        old = _websocket_version(self.scope) < (2, 1)  # before 2.1 an accept had no headers
        for index, _, on_response in self.stack.starts[level]:
            self.left = min(self.left, index + 1)
            if on_response is not None:
                on_response(ex, head)
                head.status = 101
                if old:
                    head = Head(101, message.get("headers") or ())
        return message if old else {**message, "headers": head.headers}

    def _taker(self, message: Message, level: int) -> _Layer | None:
        """The policy whose hold a body message from `level` completes; policies inside of it watch it pass."""
        for layer in self.stack.bodies[level]:
            if layer.index in self.held:
                return layer
            if layer.on_chunk is not None:
                layer.on_chunk(self.ex, message.get("body", b""))
        return None

    async def _reply(self, answer: Problem | Reply, level: int) -> None:
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
                await self.emit({"type": "websocket.close", "code": reply.code, "reason": ""}, level)
                kind = ""
        if kind:
            await self.emit({"type": f"{kind}.start", "status": status, "headers": headers}, level)
            await self.emit({"type": f"{kind}.body", "body": body, "more_body": False}, level)
        if reply.after is not None:
            await reply.after()

    async def _release(self, index: int) -> None:
        """Let go unchanged what layer `index` holds; a policy further out may take it over."""
        hold = self.held.pop(index)
        await self.emit(hold.message, index + 1, hold.head, index)
        for message in hold.messages:
            await self.emit(message, index + 1)

    # --- unwinding -------------------------------------------------------------------------------------------------

    async def _unwind(self, error: BaseException | None, origin: int, entered: int) -> BaseException | None:
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
                if error is None:
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
                waiting = self._finish(layer)
                if waiting is not None:
                    error = await self._wait(layer, waiting, error)
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

    async def _answer(self, layer: _Layer, error: Exception) -> BaseException | None:
        try:
            try:
                raise error  # so that `logger.exception` and `raise ... from` work in the hook
            except Exception:
                answer = layer.on_error(self.ex, error)
                if answer is not None:
                    answer = await _settled(answer)
            if answer is None:
                return error
            await self._reply(answer, layer.index)
        except BaseException as raised:
            self.ex.error = raised
            return raised
        return error if isinstance(answer, Reply) and answer.reraise else None

    def _finish(self, layer: _Layer) -> Awaitable[Any] | None:
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

    async def _wait(self, layer: _Layer, waiting: Awaitable[Any], error: BaseException | None) -> BaseException | None:
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


async def _raise(error: BaseException) -> None:
    raise error


async def _settled(answer: Any) -> Answer:
    """What a hook answered, awaited if need be."""
    if isinstance(answer, Problem | Reply):
        return answer
    if isawaitable(answer):
        answer = await answer
        if answer is None or isinstance(answer, Problem | Reply):
            return answer
    raise TypeError(f"a hook answers with None, a Problem or a Reply, not with {type(answer).__name__}")


def _below(root: str, path: str) -> str:
    """The path as the application's router sees it: after `root_path` (ASGI `path` includes it)."""
    if path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def _websocket_version(scope: Scope) -> tuple[int, ...]:
    version = str((scope.get("asgi") or {}).get("spec_version") or "2.0")
    return tuple(int(part) for part in version.split(".") if part.isdigit())

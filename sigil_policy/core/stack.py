"""The pass: any number of policies around one application, in a single middleware.

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(), Problems()])    # outermost first
    app = PolicyStack(app, policies=[RequestID()])                                      # any ASGI application

This is the only file that sees `scope`, `receive` and `send`. Policies are numbered outer to inner, and a message on
its way out passes them from the highest number to the lowest. What must hold, and what the property test in
`tests/fusion` compares with one stack per policy and with a naive interpreter, is written beside the code that does it.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from copy import copy
from inspect import isawaitable
from operator import itemgetter
from typing import Any

from anyio import move_on_after
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.exchange import _CURRENT, SCOPE_KEY, Exchange, Head, Message, Receive, StreamEndedError
from sigil_policy.core.host import Resolution, find_host
from sigil_policy.core.marks import Marks, marks_of
from sigil_policy.core.ordering import PolicyOrderError, check_order, missing_text
from sigil_policy.core.policy import Answer, EndOfStream, Policy
from sigil_policy.core.problems import DEFAULT_STYLE, Problem, Reply
from sigil_policy.core.routing import RouteMatcher
from sigil_policy.core.socket import Socket

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("sigil_policy")

_BODY = "http.response.body"
_STARTS = frozenset(("http.response.start", "websocket.accept", "websocket.http.response.start"))
_LAST = frozenset((_BODY, "http.response.pathsend", "websocket.close", "websocket.http.response.body"))
_LONGEST_CHAIN = 100
_MOST_MARKED = 20_000
_NO_RULES: Mapping[int, Any] = {}
_ENDED = "a policy has ended this stream; nothing more is sent"
_NO_END = "on_chunk returns None, EndOfStream, or an awaitable of one of them, not {}"
_OVER = frozenset(("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"))
_PROTOCOL = b"sec-websocket-protocol"
_HOOKS = (
    "on_request", "around", "on_body", "on_response", "on_chunk", "on_message", "on_check", "on_error", "on_finish",
)  # fmt: skip


class MarksIgnoredError(RuntimeError):
    """An endpoint carries marks that no policy around it understands: what it asks for would silently not happen.

    PolicyStack(app, [RequestID()])     # @policy(scopes="agents:read") somewhere in app: Scopes is missing
    """

    def __init__(self, resolution: Resolution, names: Iterable[str]) -> None:
        marks = ", ".join(sorted(names))
        super().__init__(
            f"the endpoint of {resolution.template} is marked with {marks}, and no policy of the stack understands "
            "that: mount the policy for it (Scopes, RateLimit, CacheControl, Versioning, Timeout), or take the mark off"
        )


class RouteMismatchError(RuntimeError):
    """Another endpoint ran than the one that was found before, whose marks were applied.

    Raised in the application that begins to answer, with `PolicyStack(app, policies, strict_routes=True)`.
    """


class _Layer:
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


class PolicyStack:
    """ASGI middleware that runs `policies` (outermost first) around `app` in one pass.

    Stacks that are constructed directly around each other fuse: they are one program at the cost of one. A stack
    further in (on a mount, behind another middleware) shares the exchange of the outer one.

    Options:
        policies: policy instances, outermost first. An empty stack calls the application straight.
        clock: where time comes from (default: the machine's).
        tags: what the tags of FastAPI's endpoints mean, for those that say nothing else; see `sigil_policy.core.marks`
            (default: nothing).
        strict_routes: answer 500 where another endpoint ran than the one that was found before, whose marks were
            applied (default False: it is logged and counted in `mismatches`).
        finish_timeout: seconds that an awaiting `on_finish` may take; it runs shielded from cancellation (default 5).

    Raises `PolicyOrderError` for an order that cannot work, `TypeError` and `ValueError` for wrong options.
    """

    def __init__(
        self,
        app: Any,
        policies: Iterable[Policy] = (),
        *,
        clock: Clock = SYSTEM_CLOCK,
        tags: Mapping[str, Marks] | None = None,
        strict_routes: bool = False,
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
        meanings = dict(tags or {})
        for tag, marks in meanings.items():
            if not isinstance(marks, Marks):
                raise TypeError(f"tag {tag!r} takes policy(...), not {type(marks).__name__}")
        strict = strict_routes
        if isinstance(app, PolicyStack):
            meanings, strict = {**app.tags, **meanings}, strict or app.strict_routes
            placed, app = placed + app.policies, app.app
        self.app: App = app
        self.policies: tuple[Policy, ...] = placed
        self.clock = clock
        self.finish_timeout = finish_timeout
        self.gives = frozenset(fact for policy in placed for fact in policy.gives)
        self.missing = check_order(placed)
        self.tags: Mapping[str, Marks] = meanings
        self.strict_routes: bool = strict
        self.mismatches = 0
        self.host = find_host(app)
        self.host.tag(meanings)
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

        # Only who may hold a start, or watch what follows it, comes with its layer; the others have an `on_response`.
        self.starts = [
            tuple(
                (layer.index, layer.on_response, layer if layer.on_body or layer.on_chunk else None)
                for layer in outside(level, "on_response", "on_body", "on_chunk")
            )
            for level in levels
        ]
        self.finishes = [outside(level, "on_finish") for level in levels]
        self.unwinds = [outside(level, "on_body", "around", "on_error", "on_finish") for level in levels]
        self.watchers = tuple(layer for layer in layers if layer.on_message or layer.on_check)
        tables = {id(policy): rules for policy in self.policies if (rules := policy.rules())}
        self.matcher = RouteMatcher(tables, folds=self.host.folds) if tables else None
        inner = tuple(self.host.inner_policies())
        self.understood = frozenset(name for policy in (*self.policies, *inner) for name in policy.marks)
        self.marked: dict[Any, Any] = {}
        self.resources = [resource for policy in self.policies for resource in policy.resources()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if (kind != "http" and kind != "websocket") or not self.policies:
            await (self._lifespan if kind == "lifespan" else self.app)(scope, receive, send)
            return
        ex: Exchange | None = scope.get(SCOPE_KEY)
        outermost = ex is None or ex.finished
        if ex is None or outermost:
            # The outermost stack makes the exchange, and alone sees what really goes to the server.
            ex = Exchange(scope, receive, self.clock, self.host, DEFAULT_STYLE)
            scope[SCOPE_KEY] = ex
            token = _CURRENT.set(ex)
            receive = ex._hear  # noqa: SLF001
        passing = _Pass(self, ex, scope, send, outermost)
        error: BaseException | None = None
        origin = 0
        try:
            if self.missing or not outermost:
                self._join(ex, scope)
            else:
                ex._given = self.gives  # noqa: SLF001
            passing.marked = self.host.marked()
            if self.matcher is not None or passing.marked:
                self._match(ex, scope, passing.marked)
            for origin, on_request, around in self.entries:
                if on_request is not None:
                    answer = on_request(ex)
                    if answer is not None:
                        answer = await _settled(answer)
                        if answer is not None:
                            # Seen by the policies outside only: never by this one's own hooks or `around`.
                            if answer.status >= 400 and ex.refused_by is None:
                                ex.refused_by = self.layers[origin].name
                            await passing.reply(answer, origin)
                            break
                if around is not None:
                    context = around(ex)
                    if context is not None:
                        await context.__aenter__()
                        passing.arounds = {**passing.arounds, origin: context}
            else:
                origin = self.depth
                if self.watchers and kind == "websocket":
                    passing.socket = Socket(passing, self.watchers, receive)
                    receive = passing.socket.receive
                await self.app(scope, receive, passing.emit)
        except BaseException as raised:
            if not ex._ended or not _because_ended(raised):  # noqa: SLF001
                error = raised
        try:
            # A policy is entered once its turn comes, also if its own hook raises.
            entered = origin + 1 if origin < self.depth else origin
            if error is None and not passing.held and not passing.arounds:
                for layer in self.finishes[entered]:
                    waiting = passing.finish(layer)
                    if waiting is not None:
                        error = await passing.wait(layer, waiting, error)
            else:
                error = await passing.unwind(error, origin, entered)
            if error is not None:
                raise error
        finally:
            del error  # else the exception and this frame would hold each other
            if outermost:
                ex.close()
                try:  # noqa: SIM105  `suppress` costs half a microsecond
                    _CURRENT.reset(token)
                except ValueError:
                    pass  # closed from another context, as an interrupted event loop does

    def _join(self, ex: Exchange, scope: Scope) -> None:
        """Take part in an exchange that stacks outside have made, or say what they have not given."""
        given = ex._given  # noqa: SLF001
        if not self.missing <= given:
            raise PolicyOrderError(missing_text(self.policies, self.missing - given))
        ex._given = given | self.gives  # noqa: SLF001
        ex._scope = scope  # noqa: SLF001  a mount gives its application a copy

    def _match(self, ex: Exchange, scope: Scope, marked: bool) -> None:
        found: Any = _NO_RULES
        if self.matcher is not None:
            found = self.matcher.match(ex.method, self.host.path(scope))
        if marked:
            resolution = ex._resolution = ex._resolution or self.host.find(scope)  # noqa: SLF001
            if resolution is not None and resolution.marks is not None:
                found = self._marked(found, resolution, resolution.marks, ex)
        ex._rules = {**ex._rules, **found} if ex._rules else found  # noqa: SLF001

    def _marked(
        self, found: Mapping[int, Any], resolution: Resolution, marks: Marks, ex: Exchange
    ) -> Mapping[int, Any]:
        """What the tables have found, with what the endpoint says of itself where they say nothing."""
        ex._understood |= self.understood  # noqa: SLF001
        if not resolution.behind and not resolution.own <= ex._understood:  # noqa: SLF001
            raise MarksIgnoredError(resolution, resolution.own - ex._understood)  # noqa: SLF001
        # The matcher hands out the same mapping for the same rules.
        key = (id(found), resolution)
        rules = self.marked.get(key)
        if rules is None:
            if len(self.marked) > _MOST_MARKED:
                self.marked.clear()
            rules = self.marked[key] = dict(found)
            for policy in self.policies:
                if policy.marks:
                    rule = policy.marked(marks, found.get(id(policy)), resolution)
                    if rule is not None:
                        rules[id(policy)] = rule
        return rules

    def confirm(self, ex: Exchange) -> None:
        """The application begins to answer: was it the endpoint whose marks were applied?"""
        endpoint = self.host.ran(ex.scope)
        if endpoint is None:
            return
        resolution = ex._resolution  # noqa: SLF001
        expected = None if resolution is None else resolution.endpoint
        if (
            endpoint is not expected
            and endpoint != expected
            and (expected is not None or marks_of(endpoint, ex.method))
        ):
            self.mismatches += 1
            logger.error("%s was served by %r, but policies were chosen for %r", ex.method, endpoint, expected)
            if self.strict_routes:
                raise RouteMismatchError(f"another endpoint ran than the one that was found before: {endpoint!r}")
        elif resolution is not None and not resolution.own <= ex._understood:  # noqa: SLF001
            raise MarksIgnoredError(resolution, resolution.own - ex._understood)  # noqa: SLF001

    def unserved(self, outside: Iterable[str] = ()) -> list[str]:
        """For each endpoint that carries marks which nobody here understands, a sentence that says what to mount."""
        known = self.understood.union(outside)
        return [
            str(MarksIgnoredError(resolution, resolution.own - known))
            for resolution in self.host.endpoints()
            if not resolution.behind and not resolution.own <= known
        ]

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What stacks outside give, and, as text, which marks they understand.
        outside: frozenset[Any] = scope.get(SCOPE_KEY) or frozenset()
        missing = self.missing - outside
        complaints = [missing_text(self.policies, missing)] if missing else self._complaints(outside)
        if complaints:
            text = "; ".join(complaints[:10])
            await receive()
            await send({"type": "lifespan.startup.failed", "message": text})
            # As Starlette does: who drives an application in a test would wait for it otherwise.
            raise PolicyOrderError(text) if missing else RuntimeError(text)
        if not self.policies:
            await self.app(scope, receive, send)
            return
        scope[SCOPE_KEY] = outside | self.gives | self.understood
        if not self.resources:
            await self.app(scope, receive, send)
            return

        async def send_after_closing(message: Message) -> None:
            if message["type"] in _OVER:
                await self.aclose()
            await send(message)

        await self.app(scope, receive, send_after_closing)

    def _complaints(self, outside: frozenset[Any]) -> list[str]:
        """What is wrong with the marks of the application."""
        complaints = self.unserved(name for name in outside if isinstance(name, str))
        for resolution in self.host.endpoints():
            for policy in self.policies:
                if resolution.marks is not None and policy.marks:
                    try:
                        policy.marked(resolution.marks, None, resolution)
                    except (TypeError, ValueError) as error:
                        complaints.append(f"{resolution.template}: {error}")
        return complaints

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


class _Pass:
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

    def __init__(self, stack: PolicyStack, ex: Exchange, scope: Scope, send: Send, outermost: bool) -> None:
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
        ex = self.ex
        if self.flowing and message.get("more_body", False) and not ex._ended:  # noqa: SLF001
            try:
                await self.send(message)
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
                await self.send(message)
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
                await self.send(message)
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

    def _watch(self, layer: _Layer, message: Message, head: Head) -> None:
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
            await self.reply(answer, layer.index)
        except BaseException as raised:
            self.ex.error = raised
            return raised
        return error if isinstance(answer, Reply) and answer.reraise else None

    def finish(self, layer: _Layer) -> Awaitable[Any] | None:
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

    async def wait(self, layer: _Layer, waiting: Awaitable[Any], error: BaseException | None) -> BaseException | None:
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


def _because_ended(error: BaseException | None) -> bool:
    """Whether `error` is what became of a `StreamEndedError` in the application.

    Itself, what was raised from it or while it was handled (Starlette's `ClientDisconnect`), or a group of only such.
    """
    link = error
    for _ in range(_LONGEST_CHAIN):
        if isinstance(link, ExceptionGroup):
            return all(map(_because_ended, link.exceptions))
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


async def _settled(answer: Any) -> Answer:
    """What a hook answered, awaited if need be."""
    if isinstance(answer, Problem | Reply):
        return answer
    if isawaitable(answer):
        answer = await answer
        if answer is None or isinstance(answer, Problem | Reply):
            return answer
    raise TypeError(f"a hook answers with None, a Problem or a Reply, not with {type(answer).__name__}")

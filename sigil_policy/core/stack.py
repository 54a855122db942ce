"""Any number of policies around one application, in a single middleware.

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(), Problems()])    # outermost first
    app = PolicyStack(app, policies=[RequestID()])                                      # any ASGI application

What is known before the first exchange, and an exchange's way in, are here; its way out is in `passing`, and what an
application hears on a WebSocket in `socket`. Nobody else sees `scope`, `receive` and `send`.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from copy import copy
from typing import Any

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.exchange import _CURRENT, SCOPE_KEY, Exchange, Inlet, Message, Receive
from sigil_policy.core.host import Resolution, find_host
from sigil_policy.core.marks import Marks, marks_of
from sigil_policy.core.ordering import PolicyOrderError, check_order, missing_text
from sigil_policy.core.passing import Layer, Pass, Scope, Send, because_ended, settled
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import DEFAULT_STYLE
from sigil_policy.core.routing import RouteMatcher
from sigil_policy.core.socket import Socket

App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("sigil_policy")

_MOST_MARKED = 20_000
_NO_RULES: Mapping[int, Any] = {}
_OVER = frozenset(("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"))


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


class PolicyStack:
    """ASGI middleware that runs `policies` (outermost first) around `app` in one pass.

    Stacks that are constructed directly around each other fuse: they are one program at the cost of one. A stack
    further in (on a mount, behind another middleware) shares the exchange of the outer one.

    Options:
        policies: policy instances, outermost first. An empty stack calls the application straight.
        clock: where time comes from (default: that of the stack it is directly around, else the machine's).
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
        clock: Clock | None = None,
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
            clock = app.clock if clock is None else clock
            placed, app = placed + app.policies, app.app
        self.app: App = app
        self.policies: tuple[Policy, ...] = placed
        self.clock: Clock = SYSTEM_CLOCK if clock is None else clock
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
        self.layers = layers = [Layer(index, policy) for index, policy in enumerate(self.policies)]
        self.depth = len(layers)
        self.entries = [
            (layer.index, layer.on_request, layer.around) for layer in layers if layer.on_request or layer.around
        ]
        # Indexed by the level a message comes from: the layers outside of it that may act, innermost first.
        levels = range(self.depth + 1)

        def outside(level: int, *hooks: str) -> tuple[Layer, ...]:
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
        self.mounted: dict[tuple[Resolution, Resolution], Resolution] = {}
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
        else:
            outside = ex._inlet, ex._said  # noqa: SLF001
            if kind == "http" and receive != (ex._hear if outside[0] is None else outside[0].hear):  # noqa: SLF001
                ex._inlet = inlet = Inlet(receive)  # noqa: SLF001
                receive = inlet.hear
        passing = Pass(self, ex, scope, send, outermost)
        error: BaseException | None = None
        unmatched: Exception | None = None
        origin = 0
        try:
            if self.missing or not outermost:
                self._join(ex, scope)
            else:
                ex._given = self.gives  # noqa: SLF001
            passing.marked = self.host.marked() or ex._said is not None  # noqa: SLF001  what a mount says
            if self.matcher is not None or passing.marked:
                try:
                    self._match(ex, scope, passing.marked)
                except Exception as raised:
                    unmatched = raised
            for origin, on_request, around in self.entries:
                if on_request is not None:
                    answer = on_request(ex)
                    if answer is not None:
                        answer = await settled(answer)
                        if answer is not None:
                            if unmatched is not None:
                                raise unmatched
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
                if unmatched is not None:
                    # In the place of the application (or of a refusal, which did not know the rules), so that
                    # policies see it: it has an id, is logged, and answered as a problem.
                    raise unmatched
                if self.watchers and kind == "websocket":
                    passing.socket = Socket(passing, self.watchers, receive)
                    receive = passing.socket.receive
                await self.app(scope, receive, passing.emit)
        except BaseException as raised:
            if not ex._ended or not because_ended(raised):  # noqa: SLF001
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
            # Else an exception and this frame would hold each other, and so would the two sides of a WebSocket.
            del error, unmatched
            passing.socket = None
            if outermost:
                ex.close()
                try:  # noqa: SIM105  `suppress` costs half a microsecond
                    _CURRENT.reset(token)
                except ValueError:
                    pass  # closed from another context, as an interrupted event loop does
            else:
                ex._inlet, ex._said = outside  # noqa: SLF001

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
            # A client may call its method WEBSOCKET: such a request is none, and no rule names its method.
            method = ex.method if ex.method != "WEBSOCKET" or ex.kind == "websocket" else ""
            found = self.matcher.match(method, self.host.path(scope))
        if marked:
            resolution = self._resolve(ex, scope)
            if resolution is not None and resolution.marks is not None:
                found = self._marked(found, resolution, resolution.marks, ex)
        ex._rules = {**ex._rules, **found} if ex._rules else found  # noqa: SLF001

    def _resolve(self, ex: Exchange, scope: Scope) -> Resolution | None:
        """The endpoint, as the outermost stack that could see it has found it: that one knows what is said around it.

        What such a stack cannot read is mounted as a whole; a stack in there finds the endpoint, and the mount speaks
        for it where it says nothing itself.
        """
        outer, found = ex._said, self.host.find(scope)  # noqa: SLF001
        if outer is None:
            ex._resolution = ex._said = found  # noqa: SLF001
            return found
        if found is None or found.endpoint is outer.endpoint or found.endpoint == outer.endpoint:
            return outer
        # Policies outside understand such marks, but have not seen these.
        ex._understood -= found.own  # noqa: SLF001
        both = self.mounted.get((outer, found))
        if both is None:
            if len(self.mounted) > _MOST_MARKED:
                self.mounted.clear()
            both = self.mounted[outer, found] = found.within(outer)
        ex._said = both  # noqa: SLF001
        return both

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
        if endpoint is None or ex.refused_by is not None:  # a policy further in has answered
            return
        resolution = ex._resolution  # noqa: SLF001
        expected = None if resolution is None else resolution.endpoint
        for known in (ex._said, resolution):  # noqa: SLF001
            if known is not None and (endpoint is known.endpoint or endpoint == known.endpoint):
                if not known.own <= ex._understood:  # noqa: SLF001
                    raise MarksIgnoredError(known, known.own - ex._understood)  # noqa: SLF001
                return
        marks = marks_of(endpoint, ex.method)
        if expected is None and not marks:
            return
        self.mismatches += 1
        logger.error("%s was served by %r, but policies were chosen for %r", ex.method, endpoint, expected)
        if self.strict_routes:
            raise RouteMismatchError(f"another endpoint ran than the one that was found before: {endpoint!r}")
        if marks is not None and not marks.names <= (heard := self.understood | ex._understood):  # noqa: SLF001
            raise MarksIgnoredError(Resolution(endpoint, ex.path), marks.names - heard)

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

"""Random exchanges for the property test of the pass: policies, an application, a server, and what is written down.

A `Program` is plain data, so a failing one can be read and pasted into a test. `run` plays it against one build of the
stack and returns the log: each hook with what it saw, each message that the server got, each thing that the
application met, and the exception that came out, in order.
"""

import asyncio
import atexit
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.lowlevel
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.policy import Close, EndOfStream, Policy
from sigil_policy.core.problems import Reply
from sigil_policy.testing import FrozenClock

Log = list[Any]


class Halt(BaseException):
    """Neither an `Exception` nor a cancellation of the event loop: a KeyboardInterrupt that tests may raise."""


ERRORS: dict[str, type[BaseException]] = {"value": ValueError, "timeout": TimeoutError, "halt": Halt}


@dataclass(frozen=True)
class Act:
    """What a hook does: `do`, with `arg`, after an await if it `waits`."""

    do: str = "pass"
    arg: Any = None
    waits: bool = False


@dataclass(frozen=True)
class Script:
    """One policy: the hooks it overrides and what each does."""

    acts: dict[str, Act] = field(default_factory=dict)
    bound: int = 65_536


@dataclass(frozen=True)
class Step:
    """One thing that the application does; `catches`: it goes on when `send` raises, or raises what it makes of it."""

    do: str
    message: Any = None
    catches: bool | str = False


@dataclass(frozen=True)
class Program:
    policies: tuple[Script, ...] = ()
    app: tuple[Step, ...] = ()
    kind: str = "http"
    method: str = "GET"
    incoming: tuple[Any, ...] = ()
    send_fails_at: int | None = None
    send_waits: bool = False
    denial: bool = True
    spec_version: str = "2.4"
    cuts: tuple[bool, ...] = ()
    """Where the random partition cuts between two policies."""


# --- policies ----------------------------------------------------------------------------------------------------


class Scripted(Policy):
    """A policy that does what its script says and writes down what it sees."""

    name: str
    acts: Any
    world: Any
    bound: int = 65_536

    def _seen(self, hook: str, *what: Any) -> Act:
        self.world.log.append((self.name, hook, *what))
        act: Act = self.acts[hook]
        return act

    def _fail(self, act: Act, hook: str) -> None:
        if act.do == "raise":
            raise ERRORS[act.arg](f"{self.name}.{hook}")

    async def _later(self, hook: str, act: Act, finish: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        self.world.log.append((self.name, hook, "resumed"))
        return await finish() if act.do in ("hang", "read") else finish()

    def _run(self, hook: str, act: Act, answer: Any) -> Any:
        def finish() -> Any:
            self._fail(act, hook)
            return answer() if callable(answer) else answer

        if act.do == "hang":
            return self._later(hook, act, self.world.hang)
        return self._later(hook, act, finish) if act.waits else finish()


def _answer(act: Act) -> Any:
    if act.do == "problem":
        return RATE_EXCEEDED("slow down", headers=((b"retry-after", b"3"),))
    if act.do == "reply":
        status, body, reraise = act.arg
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        return Reply(status=status, headers=headers, body=body, code=4000 + status, reraise=reraise)
    return None


def on_request(self: Scripted, ex: Exchange) -> Any:
    act = self._seen("on_request", ex.method)
    if act.do == "read":

        async def read() -> None:
            self.world.log.append((self.name, "read", await ex.body(act.arg)))

        return self._later("on_request", act, read)
    return self._run("on_request", act, lambda: _answer(act))


def around(self: Scripted, ex: Exchange) -> Any:
    act = self._seen("around")
    if act.do == "none":
        return None
    if act.do == "raise at once":
        raise ERRORS[act.arg](f"{self.name}.around")
    return Around(self, act)


def wants_body(self: Scripted, ex: Exchange, head: Head) -> bool:
    act = self._seen("wants_body", *_look(head))
    self._fail(act, "wants_body")
    return act.do != "no"


def on_body(self: Scripted, ex: Exchange, head: Head, body: bytes) -> Any:
    act = self._seen("on_body", *_look(head), body)

    def change() -> Any:
        _change(head, act, self.name)
        return act.arg if act.do == "bytes" else b"" if act.do == "not modified" else None

    return self._run("on_body", act, change)


def on_response(self: Scripted, ex: Exchange, head: Head) -> None:
    act = self._seen("on_response", *_look(head))
    self._fail(act, "on_response")
    _change(head, act, self.name)


def wants_chunks(self: Scripted, ex: Exchange, head: Head) -> bool:
    act = self._seen("wants_chunks", *_look(head))
    self._fail(act, "wants_chunks")
    return act.do != "no"


def on_chunk(self: Scripted, ex: Exchange, chunk: bytes) -> Any:
    act = self._seen("on_chunk", chunk)
    if act.do == "raise" and act.arg == "value" and len(chunk) <= 2:
        return None
    least, last = act.arg if act.do == "end" else (0, None)
    return self._run("on_chunk", act, None if last is None or len(chunk) < least else EndOfStream(last))


def on_message(self: Scripted, ex: Exchange, message: Any) -> Any:
    act = self._seen("on_message", message.get("text"))
    refused = act.do in ("close", "problem") and message.get("text") == act.arg
    return self._run("on_message", act, _close(act) if refused else None)


def on_check(self: Scripted, ex: Exchange) -> Any:
    act = self._seen("on_check")
    self.world.asked[self.name] = asked = self.world.asked.get(self.name, 0) + 1
    return self._run("on_check", act, _close(act) if act.do == "close" and asked > act.arg else CHECKS.get(act.do))


CHECKS = {"always": 0, "soon": 4, "close": 2.5, "late": 1_000}


def _close(act: Act) -> Any:
    return Close(4401, "ended") if act.do == "close" else RATE_EXCEEDED("slow down")


def on_error(self: Scripted, ex: Exchange, error: Exception) -> Any:
    act = self._seen("on_error", label(error), label(ex.error), ex.outcome)
    return self._run("on_error", act, lambda: _answer(act))


def on_finish(self: Scripted, ex: Exchange) -> Any:
    act = self._seen(
        "on_finish", ex.outcome, ex.status, ex.sent_bytes, ex.refused_by, label(ex.error), ex.done, ex.gone
    )
    return self._run("on_finish", act, None)


def _look(head: Head) -> tuple[Any, ...]:
    return head.status, tuple(head.headers)


def _change(head: Head, act: Act, name: str) -> None:
    if act.do == "add":
        head.headers.append((b"x-by", name.encode()))
    elif act.do == "status":
        head.status = act.arg
    elif act.do == "not modified":
        head.status = 304
    elif act.do == "length":
        head.replace(b"content-length", b"%d" % act.arg)
    elif act.do == "no length":
        head.remove(b"content-length")
    elif act.do == "stream":
        head.replace(b"content-type", b"text/event-stream")
    elif act.do == "protocol":
        head.replace(b"sec-websocket-protocol", act.arg)


HOOKS = {
    hook.__name__: hook
    for hook in (
        on_request,
        around,
        wants_body,
        on_body,
        on_response,
        wants_chunks,
        on_chunk,
        on_message,
        on_check,
        on_error,
        on_finish,
    )
}


@functools.cache
def scripted(hooks: frozenset[str]) -> type[Scripted]:
    """A policy class that overrides exactly `hooks`: what is not overridden must cost, and do, nothing."""
    name = "_".join(["Scripted", *sorted(hooks)])
    return type(name, (Scripted,), {"__module__": __name__, **{hook: HOOKS[hook] for hook in hooks}})


class Around:
    """What `around` returns: it may fail on entering, swallow, replace, fail on leaving, or be a time limit."""

    def __init__(self, policy: Scripted, act: Act) -> None:
        self.policy, self.act = policy, act

    async def __aenter__(self) -> Self:
        if self.act.waits:
            await anyio.lowlevel.checkpoint()
        self._write("enter")
        if self.act.do == "raise on entering":
            raise ERRORS[self.act.arg](f"{self.policy.name}.enter")
        if self.act.do == "limit":
            self.scope = self.policy.world.limits[self.policy.name] = anyio.CancelScope().__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._write("exit", label(error))
        if self.act.do == "limit":
            del self.policy.world.limits[self.policy.name]
            self.scope.__exit__(kind, error, trace)
            if self.scope.cancelled_caught:
                raise TimeoutError(f"{self.policy.name}.limit")
            return False
        if self.act.waits:
            await anyio.lowlevel.checkpoint()
        if self.act.do == "raise on leaving" or (self.act.do == "replace" and isinstance(error, Exception)):
            raise ERRORS[self.act.arg](f"{self.policy.name}.exit") from error
        return self.act.do == "swallow" and isinstance(error, Exception)

    def _write(self, *what: Any) -> None:
        self.policy.world.log.append((self.policy.name, *what))


# --- application and server --------------------------------------------------------------------------------------


def label(error: BaseException | None) -> str | None:
    """A name for `error` that is the same on all sides."""
    if error is None:
        return None
    if isinstance(error, tuple(ERRORS.values())):
        return f"{type(error).__name__}({error})"
    return "cancelled" if isinstance(error, anyio.get_cancelled_exc_class()) else type(error).__name__


def plain(message: Any) -> Any:
    """`message` with the defaults of ASGI filled in, in a form that prints well and compares."""
    message = dict(message)
    if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
        pairs = message.get("headers") or ()
        message["headers"] = tuple((bytes(name).lower(), bytes(value)) for name, value in pairs)
    if message["type"].endswith("http.response.body"):
        message = {"body": b"", "more_body": False, **message}
    return tuple(sorted(message.items()))


def made_of(error: Exception, what: str) -> None:
    """Raise what an application, or its framework, makes of an exception that `send` raised."""
    if what == "other":
        raise ClientDisconnect  # as Starlette does
    if what == "left":
        raise WebSocketDisconnect(4401)  # likewise, for what `receive` gave
    if what == "from":
        raise ValueError("from") from error
    if what == "group":
        raise ExceptionGroup("group", [error, ExceptionGroup("inner", [error])])
    raise ExceptionGroup("mixed", [error, ValueError("mixed")])


class World:
    """One side's run of a program: its log, its application, its server."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.log: Log = []
        self.limits: dict[str, anyio.CancelScope] = {}
        self.clock = FrozenClock()
        self.asked: dict[str, int] = {}
        self.sent = 0
        self.incoming = iter(program.incoming)
        self.policies = [
            scripted(frozenset(script.acts))(name=f"p{index}", acts=script.acts, world=self, bound=script.bound)
            for index, script in enumerate(program.policies)
        ]

    async def hang(self, target: str | None = None) -> None:
        """Wait until cancelled: by the time limit of policy `target` if it has one, else by the server."""
        self.limits.get(target or "", self.cancelling).cancel()
        await anyio.sleep_forever()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        for step in self.program.app:
            try:
                if step.do == "send":
                    # A message of our own: whoever writes into it does not change the program.
                    await send(dict(step.message))
                elif step.do == "receive":
                    message = await receive()
                    self.log.append(("app", plain(message)))
                    if step.message == "or leave" and message["type"] == "websocket.disconnect":
                        raise WebSocketDisconnect(4401)  # as Starlette does
                elif step.do == "wait":
                    await anyio.lowlevel.checkpoint()
                elif step.do == "tick":
                    self.clock.advance(step.message)
                elif step.do == "hang":
                    await self.hang(step.message)
                elif step.do == "raise":
                    raise ERRORS[step.message]("app")
                elif step.do == "return":
                    return
            except Exception as error:
                if not step.catches:
                    raise
                self.log.append(("app", "caught", label(error)))
                if step.catches is not True:
                    made_of(error, step.catches)

    async def receive(self) -> Any:
        await anyio.lowlevel.checkpoint()
        return next(self.incoming, {"type": f"{self.program.kind}.disconnect"})

    async def send(self, message: Any) -> None:
        if self.program.send_waits:
            await anyio.lowlevel.checkpoint()
        self.sent += 1
        if self.program.send_fails_at is not None and self.sent > self.program.send_fails_at:
            self.log.append(("server", "left"))
            raise OSError("the client is gone")
        self.log.append(("server", plain(message)))

    def scope(self) -> dict[str, Any]:
        program = self.program
        scope: dict[str, Any] = {
            "type": program.kind,
            "asgi": {"version": "3.0", "spec_version": program.spec_version},
            "path": "/v7/agents",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "extensions": {"websocket.http.response": {}} if program.denial else {},
        }
        if program.kind == "http":
            scope["method"] = program.method
        return scope

    async def play(self, build: Any) -> Log:
        app = build(self)
        try:
            with anyio.CancelScope() as self.cancelling:
                await app(self.scope(), self.receive, self.send)
            self.log.append(("end", "cancelled" if self.cancelling.cancelled_caught else None))
        except BaseException as error:
            self.log.append(("end", label(error)))
            if not isinstance(error, (Exception, Halt)):
                raise
        return self.log


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


def run(program: Program, build: Any, backend: str = "asyncio") -> Log:
    """What happens when `program` runs in the application that `build` makes of its world."""
    play = World(program).play
    if backend != "asyncio":
        return anyio.run(play, build, backend=backend)
    # One loop for tens of thousands of programs: to make and to end one takes longer than most of them.
    loop = _loop()
    try:
        return loop.run_until_complete(play(build))
    finally:
        assert not asyncio.all_tasks(loop), "what one program leaves running would disturb the next"


# --- drawing -----------------------------------------------------------------------------------------------------

BODIES = (b"", b"x", b"hello", b"0123456789", b"0123456789" * 4)
OTHERS = ("http.response.debug", "http.response.early_hint", "sigil.unheard-of")
REQUESTS: tuple[tuple[Any, ...], ...] = (
    ({"type": "http.request", "body": b"", "more_body": False},),
    ({"type": "http.request", "body": b"ask"},),
    ({"type": "http.request", "body": b"as", "more_body": True}, {"type": "http.request", "body": b"king"}),
    ({"type": "http.request", "body": b"as", "more_body": True},),
    (),
)
FRAMES: tuple[tuple[Any, ...], ...] = (
    ({"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}),
    ({"type": "websocket.connect"},),
    (
        {"type": "websocket.connect"},
        *({"type": "websocket.receive", "text": text} for text in ("hello", "more", "last", "more")),
    ),
)


def draw_program(seed: int) -> Program:
    """The program of `seed`, drawn by hand: much faster than strategies, and denser. `smallest` shrinks it."""
    return Draw(seed).program()


class Draw(Random):
    """Draws what happens in one exchange, mostly well-behaved: stacks in which everything fails show little."""

    def often(self, chance: float = 0.5) -> bool:
        return self.random() < chance

    def program(self) -> Program:
        kind = "http" if self.often(0.75) else "websocket"
        trouble = self.choice((0.03, 0.1, 0.1, 0.3))
        # Streams that policies may end are rare among all the rest: some programs are made of them.
        self.streams = kind == "http" and self.often(0.25)
        # Likewise connections that policies may close, and talk on them.
        self.talk = kind == "websocket" and self.often(0.6)
        trouble = 0.03 if self.streams or self.talk else trouble
        return Program(
            policies=tuple(self.script(kind, trouble) for _ in range(self.choice((0, 1, 2, 2, 3, 3, 4, 5, 6, 8)))),
            app=(
                *[Step("receive")] * self.choice((0, 0, 1, 2, 3)),
                *self.steps(self.http() if kind == "http" else self.websocket()),
            ),
            kind=kind,
            method=self.choice(("GET", "GET", "GET", "POST", "HEAD")),
            incoming=self.choice(REQUESTS if kind == "http" else FRAMES[2:] if self.talk else FRAMES),
            send_fails_at=self.randrange(4) if self.often(0.1) else None,
            send_waits=self.often(),
            denial=self.often(),
            spec_version=self.choice(("2.0", "2.1", "2.3", "2.4", "2.4")),
            cuts=tuple(self.often() for _ in range(7)),
        )

    def script(self, kind: str, trouble: float) -> Script:
        hooks = {hook for hook in HOOKS if self.often(0.45)}
        # Only who looks at bodies can be asked whether it wants one.
        hooks |= {"on_body"} if "wants_body" in hooks else set()
        hooks |= {"on_chunk"} if "wants_chunks" in hooks or (self.streams and self.often()) else set()
        acts = {hook: self.act(hook, kind, trouble) for hook in HOOKS if hook in hooks}
        return Script(acts, self.choice((65_536, 65_536, 65_536, 10, 5, 0)))

    def act(self, hook: str, kind: str, trouble: float) -> Act:
        waits = self.often()
        failing = Act("raise", self.choice(("value", "timeout", "value", "halt")), waits)
        if hook == "on_error":
            return self.choice((Act(waits=waits), self.answer(waits), self.answer(waits), self.answer(waits), failing))
        if self.often(trouble):
            if hook == "on_request":
                return self.choice((self.answer(waits), self.answer(waits), failing, Act("hang")))
            if hook == "around":
                where = self.choice(("raise at once", "raise on entering", "raise on leaving"))
                return Act(where, failing.arg, waits)
            return Act("hang") if hook == "on_body" and self.often(0.3) else failing
        if hook == "on_request" and kind == "http" and self.often(0.1):
            return Act("read", self.choice((3, 100)))
        if hook == "around":
            do = self.choice(("none", "pass", "pass", "swallow", "replace", "limit", "limit"))
            return Act(do, failing.arg, waits)
        if hook in ("wants_body", "wants_chunks") and self.often(0.2):
            return Act("no")
        if hook == "on_chunk" and self.often(0.4):
            return Act("end", (self.choice((0, 0, 1, 6)), self.choice(BODIES)), waits)
        if hook == "on_message" and self.often(0.4):
            return Act(self.choice(("close", "problem")), self.choice(("hello", "more", "last")), waits)
        if hook == "on_check":
            do = self.choice(("pass", "always", "soon", "soon", "late", "close"))
            return Act(do, self.choice((0, 1, 2)) if do == "close" else None, waits)
        if hook in ("on_body", "on_response") and self.often(0.7):
            return self.change(hook, waits)
        return Act(waits=waits)

    def answer(self, waits: bool) -> Act:
        if self.often(0.3):
            return Act("problem", waits=waits)
        reply = (self.choice((200, 204, 304, 400, 401, 503)), self.choice(BODIES), self.often())
        return Act("reply", reply, waits)

    def change(self, hook: str, waits: bool) -> Act:
        if hook == "on_body" and self.often():
            return Act("bytes", self.choice(BODIES), waits) if self.often(0.8) else Act("not modified", waits=waits)
        if self.talk and self.often(0.2):
            return Act("protocol", self.choice((b"one", b"two")), waits)
        do = self.choice(("add", "add", "add", "status", "no length", "stream", "add" if self.streams else "length"))
        arg = self.choice((201, 204, 304, 418)) if do == "status" else self.choice((0, 5, 30))
        return Act(do, arg, waits)

    def http(self) -> list[Any]:
        kinds = [(b"content-type", b"application/json"), (b"Set-Cookie", b"a=1"), (b"set-cookie", b"b=2")]
        headers = [pair for pair in kinds if self.often(0.4)]
        if self.often(0.1):
            headers.insert(0, (b"content-type", self.choice((b"text/event-stream", b"Text/Event-Stream; q=1"))))
        parts = [self.choice(BODIES) for _ in range(self.choice((3, 4, 5) if self.streams else (0, 1, 1, 1, 2, 3, 4)))]
        total = len(b"".join(parts))
        length = self.choice((None, None, None, total, total, total, "5,5", 70_000, 2))
        if length is not None and not (self.streams and self.often(0.9)):
            headers.append((b"content-length", str(length).encode()))
        start: dict[str, Any] = {"type": "http.response.start", "status": self.choice((200, 200, 204, 404, 500))}
        if headers or self.often():
            start["headers"] = headers
        if self.often(0.1 if self.streams else 0.2):
            start["trailers"] = True
        messages: list[Any] = [start]
        for index, part in enumerate(parts):
            message: dict[str, Any] = {"type": "http.response.body"}
            if part or self.often():
                message["body"] = part
            if index < len(parts) - 1:
                message["more_body"] = True
            elif self.often():
                message["more_body"] = self.often(0.2)
            messages.append(message)
        if not parts and self.often():
            messages.append({"type": "http.response.pathsend", "path": "/srv/file"})
        if "trailers" in start and self.often():
            messages.append({"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False})
        return messages

    def websocket(self) -> list[Any]:
        accept: dict[str, Any] = {"type": "websocket.accept"}
        if self.often():
            accept["headers"] = [(b"x-app", b"1")]
        close = {"type": "websocket.close", "code": 1000}
        denial = [
            {"type": "websocket.http.response.start", "status": 403, "headers": [(b"x-app", b"1")]},
            {"type": "websocket.http.response.body", "body": b"no", "more_body": True},
            {"type": "websocket.http.response.body"},
        ]
        text = {"type": "websocket.send", "text": "hi"}
        if self.often(0.3):
            accept["subprotocol"] = self.choice((None, "chat"))
        if self.talk:
            return [accept, *[text] * self.choice((0, 1, 2, 3)), *([close] if self.often() else ())]
        return self.choice(([accept, text, close], [accept, text], [close], denial, denial[:1], []))

    def steps(self, messages: list[Any]) -> tuple[Step, ...]:
        """`messages` sent in order, with a few other things in between, and now and then one too many or too few."""
        catches = self.often(0.4) and self.choice((True, True, "other", "left", "from", "group", "mixed", "mixed"))
        steps = [Step("send", message, catches if self.often(0.6) else False) for message in messages]
        for _ in range(self.choice((2, 4, 6)) if self.talk else 0):
            do = self.choice((Step("receive"), Step("receive", "or leave"), Step("tick", 3)))
            steps.insert(self.randint(1, len(steps)), do)
        for _ in range(self.choice((0, 0, 1, 1, 2, 3))):
            steps.insert(self.randint(0, len(steps)), self.noise(catches))
        if steps and self.often(0.12):
            index = self.randrange(len(steps))
            if self.often():
                del steps[index]
            else:
                steps.insert(self.randint(0, len(steps)), steps[index])
        return tuple(steps)

    def noise(self, catches: bool | str) -> Step:
        do = self.choice(("receive", "receive", "wait", "raise", "raise", "hang", "return", "other"))
        if do == "raise":
            return Step("raise", self.choice(("value", "timeout", "halt")))
        if do == "hang":
            return Step("hang", self.choice((None, "p0", "p1", "p2", "p3")))
        return Step("send", {"type": self.choice(OTHERS)}, catches) if do == "other" else Step(do)


programs = st.integers(0, 2**48).map(draw_program)


def smallest(program: Program, fails: Any) -> Program:
    """`program` with everything left out that is not needed for `fails` to stay true."""
    while True:
        smaller = next((candidate for candidate in _smaller(program) if fails(candidate)), None)
        if smaller is None:
            return program
        program = smaller


def _smaller(program: Program) -> Iterator[Program]:
    for index in range(len(program.policies)):
        yield replace(program, policies=program.policies[:index] + program.policies[index + 1 :])
    for index in range(len(program.app)):
        yield replace(program, app=program.app[:index] + program.app[index + 1 :])
    for index, script in enumerate(program.policies):
        rest = program.policies[index + 1 :]
        for hook, act in script.acts.items():
            fewer = {name: other for name, other in script.acts.items() if name != hook}
            yield replace(program, policies=(*program.policies[:index], replace(script, acts=fewer), *rest))
            for simpler in (Act(), replace(act, waits=False)):
                if act != simpler:
                    acts = {**script.acts, hook: simpler}
                    yield replace(program, policies=(*program.policies[:index], replace(script, acts=acts), *rest))
    for index, step in enumerate(program.app):
        if step.catches:
            yield replace(program, app=(*program.app[:index], replace(step, catches=False), *program.app[index + 1 :]))
    for name in ("send_fails_at", "send_waits", "method", "denial", "spec_version"):
        usual = getattr(Program(), name)
        if getattr(program, name) != usual:
            yield replace(program, **{name: usual})

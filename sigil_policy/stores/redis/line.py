"""What one event loop has of a link: the runs of its present turn, their deadlines, and the way to the servers.

    line = Line(address, settings, loop)
    reply = await line.ask(script, keys, args, abandoned=None)

Runs that are asked in one turn of the loop are written together at its end, or as soon as there are 32 of them. One
timer watches them all: it is set for the oldest, and looks again when that is due.

Guarantees:

* A run ends at its deadline, whatever happens to connections, name servers and servers. It is counted from the moment
  when it is written, in the turn in which it was asked. A loop that was blocked itself reads first what came meanwhile.
* A connection on which nothing is read for the length of a deadline, while there is something to read, is retired.
* When the loop shuts down (`loop.shutdown_asyncgens`, as `asyncio.run`, anyio and the ASGI servers call it) or `close`
  is called, what is in flight fails, and sockets, timers and tasks are gone.
"""

import asyncio
import contextlib
import contextvars
import inspect
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple

import structlog

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.address import Address
from sigil_policy.stores.redis.connection import Argument, Run
from sigil_policy.stores.redis.driver import pack
from sigil_policy.stores.redis.node import Gate, Node
from sigil_policy.stores.redis.topology import find_route

logger = structlog.get_logger("sigil_policy")

# A timer that comes so late was held up by the loop, not by the store; and how long it then waits once more.
_LATE = 0.005
_GRACE = 0.002
# So many runs are written together: the server decides these while the rest of the turn is still asking.
_PART = 32
# So many turns are remembered before those that are done are sorted out.
_MANY = 256
# So many different script errors are reported in a line of their own.
_REPORTS = 64


class Script:
    """A Lua script of this package: `scripts/<name>.lua`, or another `text` under that name.

    `sha` is what servers know it by.
    """

    __slots__ = ("name", "sha", "text")

    def __init__(self, name: str, text: str | None = None) -> None:
        if text is None:
            text = files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")
        self.name = name
        self.text = text.encode()
        # The name of a script, by the protocol; nothing is kept secret by it.
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest().encode()

    def __repr__(self) -> str:
        return f"Script({self.name!r})"


class Settings(NamedTuple):
    """What `RedisLink` was given; it says what each means."""

    deadline: float = 0.05
    connect_timeout: float = 1.0
    failures: int = 5
    max_in_flight: int = 10_000
    max_reply: int = 1 << 20
    linger: float = 1.0


class Counters:
    """What happened since the link was made."""

    __slots__ = (
        "broken",
        "connections",
        "errors",
        "failures",
        "lost",
        "opened",
        "redirected",
        "refused",
        "resent",
        "runs",
        "stuck",
        "timeouts",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    runs: int
    """Runs asked for, also those of `send`."""
    failures: int
    """Runs that raised `StoreUnavailableError`, for any reason."""
    timeouts: int
    """Runs that ended at their deadline."""
    refused: int
    """Runs that were refused at once: a breaker was open, or too many were in flight."""
    errors: int
    """Runs that the server answered with an error."""
    lost: int
    """Runs of `send` that failed."""
    resent: int
    """Runs that were sent again, for the server said it had not run them."""
    redirected: int
    """Runs that followed MOVED or ASK."""
    connections: int
    """Connections that were made and used."""
    broken: int
    """Connections that broke while somebody waited."""
    stuck: int
    """Connections that were retired, for nothing came from them in time."""
    opened: int
    """How often a breaker opened."""

    def add(self, other: "Counters") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{name}={getattr(self, name)}' for name in self.__slots__)})"


class Line:
    """Made by `RedisLink` for each event loop in which it is used."""

    def __init__(
        self,
        address: Address,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        on_restored: list[Callable[[], Callable[[], Any] | None]],
        on_close: Callable[["Line", bool], None],
    ) -> None:
        self.address = address
        self.settings = settings
        self.loop = loop
        self.counters = Counters()
        self.closed = False
        self._turn: list[Run] = []
        self._asked: deque[tuple[float, list[Run]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._held_up = False
        self._many = _MANY
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported: set[tuple[str, str]] = set()
        self._on_restored = on_restored
        self._on_close = on_close
        # What runs in the background belongs to no request: not its context variables, nor what they add to logs.
        self._context = contextvars.Context()
        self.nodes: list[Node] = []
        self._route: Gate = find_route(self)
        # A loop that shuts down closes the asynchronous generators that it knows. It knows those that were started in
        # it: so this one is, by hand.
        self._ending = self._close_with_loop()
        with contextlib.suppress(StopIteration):
            self._ending.__anext__().send(None)

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close(for_good=True)

    def close(self, *, for_good: bool = False) -> set[asyncio.Task[None]]:
        """Fail what is in flight; leave no socket and no timer, and tasks that are about to end. Returns those.

        `for_good` says that the loop ends too.
        """
        if self.closed:
            return set()
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        for run in self._turn:
            self.fail(run, "the store was closed")
        self._turn.clear()
        for gate in self._gates():
            gate.close()
        for _, runs in self._asked:
            for run in runs:
                self.fail(run, "the store was closed")
        self._asked.clear()
        tasks = self._tasks.copy()
        for task in tasks:
            task.cancel()
        self._on_close(self, for_good)
        if not for_good:
            with contextlib.suppress(StopIteration):
                self._ending.aclose().send(None)
        return tasks

    def _gates(self) -> list[Gate]:
        return [*self.nodes, *([] if self._route in self.nodes else [self._route])]

    @property
    def available(self) -> bool:
        return not any(gate.breaker.is_open for gate in self._gates())

    # What is asked.

    def ask(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Argument],
        abandoned: Callable[[Any], None] | None,
        silent: bool,
    ) -> Run:
        run = Run(loop=self.loop)
        run.script = script
        run.keys = keys
        run.args = args
        run.packed = pack((b"EVALSHA", script.sha, len(keys), *keys, *args))
        run.abandoned = abandoned
        run.gate = None
        run.silent = silent
        run.tries = 0
        self.counters.runs += 1
        turn = self._turn
        if self.closed:
            self.fail(run, "the event loop is shutting down")
            return run
        if not turn:
            self.loop.call_soon(self._end_turn, context=self._context)
        elif len(turn) >= self.settings.max_in_flight:
            self._refuse_excess([run])
            return run
        turn.append(run)
        if len(turn) >= _PART:
            self._end_turn()
        return run

    def _end_turn(self) -> None:
        runs, self._turn = self._turn, []
        if not runs:
            return
        excess = len(runs) - self.settings.max_in_flight
        for gate in self._gates():
            excess += gate.in_flight()
        if excess > 0:
            self._refuse_excess(runs[-excess:])
            del runs[-excess:]
        due = self.loop.time() + self.settings.deadline
        self._asked.append((due, runs))
        if len(self._asked) > self._many:
            self._forget_done()
        if self._timer is None:
            self._timer = self.loop.call_at(due, self._look, context=self._context)
        self._route.write(runs)

    def _forget_done(self) -> None:
        # Otherwise a long deadline would keep what was answered long ago.
        left = [(due, [run for run in runs if not run.done()]) for due, runs in self._asked]
        self._asked = deque([(due, runs) for due, runs in left if runs])
        self._many = max(_MANY, 2 * len(self._asked))

    def _refuse_excess(self, runs: list[Run]) -> None:
        for run in runs:
            self.counters.refused += 1
            self.fail(run, f"more than {self.settings.max_in_flight} calls of the store are in flight", unsent=True)

    def fail(self, run: Run, reason: str, retry_after: float = 1.0, *, unsent: bool = False) -> None:
        """End a run without a reply; `unsent` says that the server surely has not seen it."""
        if run.done():
            return
        self.counters.failures += 1
        if run.silent:
            self.counters.lost += 1
            run.cancel()
        else:
            run.set_exception(StoreUnavailableError(reason, retry_after, unsent=unsent))

    # Time.

    def watch(self) -> None:
        """See to it that the timer runs."""
        if self._timer is None and not self.closed:
            self._timer = self.loop.call_later(self.settings.deadline, self._look, context=self._context)

    def _look(self) -> None:
        now = self.loop.time()
        asked = self._asked
        self._timer = None
        if asked and now - asked[0][0] > _LATE and not self._held_up:
            # The loop was blocked: what the store said in the meantime is still to be read.
            self._held_up = True
            self._timer = self.loop.call_later(_GRACE, self._look, context=self._context)
            return
        self._held_up = False
        late: dict[Gate, int] = {}
        while asked and asked[0][0] <= now:
            for run in asked.popleft()[1]:
                if not run.done():
                    gate: Gate = run.gate
                    late[gate] = late.get(gate, 0) + 1
                    self.counters.timeouts += 1
                    self.fail(run, f"no answer from the store at {gate.name} within {self._milliseconds}")
        more = False
        for gate in self._gates():
            more = gate.tick(now) or more
        for gate, count in late.items():
            gate.failed(count, f"no answer within {self._milliseconds}")
        if asked:
            self._timer = self.loop.call_at(asked[0][0], self._look, context=self._context)
        elif more:
            self.watch()

    @property
    def _milliseconds(self) -> str:
        return f"{self.settings.deadline * 1000:g} ms"

    # What gates use.

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.loop.call_soon(callback, *args, context=self._context)

    def call_later(self, seconds: float, callback: Callable[..., None], *args: Any) -> None:
        self.loop.call_later(seconds, callback, *args, context=self._context)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # Not by the loop's factory, which may start it at once, before it is known.
        task = asyncio.Task(work, loop=self.loop, context=self._context, name="sigil-policy store")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def restored(self) -> None:
        """A breaker has closed: tell those who asked for it, if no other is open."""
        if self._on_restored and self.available and not self.closed:
            self.spawn(self._tell())

    async def _tell(self) -> None:
        for known in tuple(self._on_restored):
            callback = known()
            if callback is None:
                continue
            try:
                answer = callback()
                if inspect.isawaitable(answer):
                    await answer
            except Exception:  # one callback's fault is not the next one's
                logger.exception("store_restored_callback_failed")

    def report(self, run: Run, name: str, error: str) -> None:
        """Log an error that is the script's or the account's, once."""
        script = run.script.name if run.script is not None else ""
        kind = (script, error.partition(" ")[0])
        if kind not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(kind)
            logger.error("store_script_refused", store=name, script=script, error=error)

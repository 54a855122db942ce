"""One server, from the point of view of one event loop: its connection, its breaker, and who waits for them.

A **gate** is something that runs need and that is made in the background when it is missing: the connection to a
server, or the map of a cluster. While it is being made runs wait before it, each until its deadline. Where that fails,
or where too many runs in a row fail behind it, it is shut: runs are refused at once, and one task tries again, ever
less often, until it can be opened.

Guarantees:

* No run pays for a probe, and there is one task at most for each gate.
* A connection is used only after it answered a probe, which goes out with the login, within the deadline. The probe is
  a write that changes nothing (`SETRANGE key 0 ""`), so a server that takes no writes (read-only, out of memory,
  loading) is not taken for well.
* One log line and one count for each opening and each closing of a breaker.
* A run is sent again only if the server said that it did not run it: `NOSCRIPT`, `READONLY`, `LOADING`, `MASTERDOWN`,
  `CLUSTERDOWN`, `TRYAGAIN`, `MOVED` and `ASK`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from sigil_policy.stores.redis.address import Endpoint
from sigil_policy.stores.redis.breaker import Breaker
from sigil_policy.stores.redis.connection import Connection, Run, ServerError, connect
from sigil_policy.stores.redis.driver import pack

if TYPE_CHECKING:
    from sigil_policy.stores.redis.line import Line, Script

logger = structlog.get_logger("sigil_policy")

# The server did not run it, and another connection or another server may.
_ELSEWHERE = frozenset(("READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN"))
# The server cannot now, whatever the script: these count as failures. Other errors are the script's, or the account's.
_UNWELL = _ELSEWHERE | frozenset(("OOM", "MISCONF", "NOREPLICAS", "BUSY", "NOAUTH", "UNKILLABLE"))
# How often a run is sent again, at most: a key that moves just now can take it there and back.
_TRIES = 5
# How many connections are read for late replies.
_RETIRED = 2
# Of so many scripts is known that they were sent over a connection.
_SCRIPTS = 256


class Gate(ABC):
    """Runs pass, wait or are refused. Options: `line`, the event loop's; `name`, what log lines and errors call it."""

    def __init__(self, line: "Line", name: str) -> None:
        self.line = line
        self.name = name
        self.breaker = Breaker(line.settings.failures)
        self.waiting: list[Run] = []
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    async def make(self) -> None:
        """Make what is missing. Raises `OSError` or `ServerError`."""

    @abstractmethod
    def write(self, runs: list[Run]) -> None:
        """Send them, let them wait, or refuse them."""

    def start(self) -> None:
        """Make what is missing in the background, if nobody does yet."""
        if self._task is None and not self.line.closed:
            self._task = self.line.spawn(self._keep_making())

    async def _keep_making(self) -> None:
        line = self.line
        while True:
            if self.breaker.is_open:
                await asyncio.sleep(self.breaker.wait(line.loop.time()))
            try:
                async with asyncio.timeout(line.settings.connect_timeout):
                    await self.make()
            except Exception as error:  # noqa: BLE001  # whatever it is, runs are refused, and this goes on trying
                self.shut(f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": "))
            else:
                break
        self._task = None
        if self.breaker.is_open:
            away = self.breaker.close(line.loop.time())
            logger.info("store_available", store=self.name, away_seconds=round(away, 3))
            line.restored()
        waiting, self.waiting = self.waiting, []
        if waiting:
            self.write(waiting)

    def failed(self, count: int, reason: str) -> None:
        """Runs behind this gate failed."""
        if self.breaker.failed(count):
            self.shut(reason)

    def shut(self, reason: str) -> None:
        """Refuse everything until a probe succeeds."""
        if not self.breaker.is_open:
            self.breaker.open(self.line.loop.time())
            self.line.counters.opened += 1
            logger.warning("store_unavailable", store=self.name, reason=reason)
        waiting, self.waiting = self.waiting, []
        self.refuse(waiting)
        self.start()

    def refuse(self, runs: list[Run]) -> None:
        """Fail runs that were not sent."""
        retry_after = max(self.breaker.until - self.line.loop.time(), 0.05)
        for run in runs:
            if not run.done():
                self.line.counters.refused += 1
                self.line.fail(run, f"the store at {self.name} is away", retry_after, unsent=True)

    def in_flight(self) -> int:
        """How many runs wait here or for an answer from behind it."""
        return len(self.waiting)

    def tick(self, now: float) -> bool:
        """Forget what is overdue; says whether there is more to watch."""
        self.waiting = [run for run in self.waiting if not run.done()]
        return bool(self.waiting)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        waiting, self.waiting = self.waiting, []
        for run in waiting:
            self.line.fail(run, "the store was closed")

    # What servers say.

    @abstractmethod
    def failing(self, node: "Node") -> None:
        """`node` cannot be reached."""

    @abstractmethod
    def elsewhere(self, run: Run, node: "Node") -> None:
        """`node` does not do such things now: try `run` where they are done."""

    @abstractmethod
    def redirected(self, run: Run, node: "Node", ask: bool, target: str) -> bool:
        """`node` says that the key of `run` is at `target`, or for once only (`ask`); whether it was sent there."""


class Node(Gate):
    """One server.

    Options:
        locate: where it is now; asked before each connection.
        home: the gate that knows the other servers (default: there are none).
        probe_key: a key that this server would write.
    """

    def __init__(
        self,
        line: "Line",
        name: str,
        locate: Callable[[], Awaitable[Endpoint]],
        *,
        home: Gate | None = None,
        probe_key: Callable[["Node"], bytes] = lambda node: b"sigil:probe",
    ) -> None:
        super().__init__(line, name)
        self.connection: Connection | None = None
        self.connected_to = Endpoint("")
        self._retired: list[Connection] = []
        self._again: list[Run] = []
        self._asking: list[Run] = []
        self._loading: set[Script] = set()
        self._sent: set[bytes] = set()
        self._home = home or self
        self._locate = locate
        self._probe_key = probe_key

    async def make(self) -> None:
        settings = self.line.settings
        self.connected_to = await self._locate()
        probe = (b"SETRANGE", self._probe_key(self), 0, b"")
        connection = await connect(
            self.connected_to, self.line.address, self, max_reply=settings.max_reply, probe=probe
        )
        try:
            await self._probed(connection)
            connection.check()
        except BaseException:
            connection.drop("given up while connecting")
            raise
        self.line.counters.connections += 1
        self.connection = connection
        self._sent.clear()
        self._write_asking()

    async def _probed(self, connection: Connection) -> None:
        deadline = self.line.settings.deadline
        assert connection.probed is not None  # noqa: S101  # it was asked for
        # It was sent when the login was, and may have been answered too late before anybody could look.
        due = connection.probed_at + deadline
        late = False
        try:
            async with asyncio.timeout_at(due):
                await connection.probed
        except TimeoutError:
            late = True
        except ServerError as error:
            if error.word in _UNWELL:
                raise
            # NOPERM, WRONGTYPE, MOVED: it lives, and more it does not say.
        if late or connection.quiet_since > due:
            raise ConnectionError(f"no answer to a probe within {deadline * 1000:g} ms")

    def write(self, runs: list[Run]) -> None:
        connection = self.connection
        for run in runs:
            run.gate = self
        if connection is not None:
            live = [run for run in runs if not run.done()]
            if live:
                self._send(connection, live)
        elif not self.breaker.is_open:
            self.waiting += runs
            self.start()
        else:
            if self._retired:
                # What undoes a late reply can go where that came from.
                self._retired[-1].write([run for run in runs if run.silent])
                runs = [run for run in runs if not run.silent]
            self.refuse(runs)

    def _send(self, connection: Connection, runs: list[Run]) -> None:
        """Write to the present connection. A script's first run there brings its text: nobody waits for `NOSCRIPT`."""
        for run in runs:
            script = run.script
            if script is not None and script.sha not in self._sent:
                if len(self._sent) >= _SCRIPTS:
                    self._sent.clear()
                self._sent.add(script.sha)
                run.packed = pack((b"EVAL", script.text, len(run.keys), *run.keys, *run.args))
        connection.write(runs)

    def again(self, run: Run) -> None:
        """Send a run once more, with the others of this turn."""
        if not self._again:
            self.line.call_soon(self._write_again)
        self._again.append(run)

    def _write_again(self) -> None:
        runs, self._again = self._again, []
        self._loading.clear()
        self.write(runs)

    def ask_once(self, run: Run) -> None:
        """Send a run whose key this server is about to take over."""
        run.gate = self
        self._asking.append(run)
        if self.connection is not None:
            self._write_asking()
        elif self.breaker.is_open:
            self._refuse_asking()
        else:
            self.start()

    def _write_asking(self) -> None:
        runs, self._asking = self._asking, []
        for run in runs:
            if not run.done() and self.connection is not None:
                self.connection.ask(b"ASKING")
                self._send(self.connection, [run])

    def _refuse_asking(self) -> None:
        runs, self._asking = self._asking, []
        self.refuse(runs)

    def elsewhere(self, run: Run, node: "Node") -> None:
        # The name may stand for another server by now.
        self.again(run)

    def redirected(self, run: Run, node: "Node", ask: bool, target: str) -> bool:
        return False

    def shut(self, reason: str) -> None:
        self.retire()
        super().shut(reason)
        self._refuse_asking()
        self._home.failing(self)

    def failing(self, node: "Node") -> None:
        """There is no other to ask."""

    def retire(self) -> None:
        """Write to the connection no more, but read it for a while."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        connection.retired_at = self.line.loop.time()
        self._retired.append(connection)
        if not connection.pending:
            connection.drop("no longer used")
        elif len(self._retired) > _RETIRED:
            self._retired[0].drop("no longer used")
        self.line.watch()

    def in_flight(self) -> int:
        count = len(self.waiting) + len(self._again) + len(self._asking)
        if self.connection is not None:
            count += len(self.connection.pending)
        for connection in self._retired:
            count += len(connection.pending)
        return count

    def tick(self, now: float) -> bool:
        more = super().tick(now)
        settings = self.line.settings
        connection = self.connection
        if connection is not None and connection.pending:
            if now - connection.quiet_since >= settings.deadline:
                self.line.counters.stuck += 1
                self.retire()
            more = True
        for connection in self._retired.copy():
            # What it said last may still be undone over it.
            silent = not connection.pending and now - connection.quiet_since >= settings.deadline
            if silent or now - connection.retired_at >= settings.linger:
                connection.drop("no longer used")
        return more or bool(self._retired)

    def close(self) -> None:
        for connection in (*self._retired, self.connection):
            if connection is not None:
                connection.drop("the store was closed")
        self.waiting += self._again + self._asking
        self._again.clear()
        self._asking.clear()
        super().close()

    # What a connection tells.

    def answered(self) -> None:
        self.breaker.failures = 0

    def lost(self, connection: Connection, runs: list[Run], reason: str) -> None:
        if connection is self.connection:
            self.connection = None
        elif connection in self._retired:
            self._retired.remove(connection)
        line = self.line
        waited = [run for run in runs if not run.done()]
        for run in waited:
            line.fail(run, f"the store at {self.name} did not answer: {reason}")
        if waited and not line.closed:
            line.counters.broken += 1
            self.failed(1, reason)

    def refused(self, connection: Connection, run: Run, error: str) -> None:
        if run.done():
            return
        line = self.line
        word, _, rest = error.partition(" ")
        run.tries += 1
        if word == "NOSCRIPT" and run.tries <= _TRIES:
            script = run.script
            assert script is not None  # noqa: S101  # what a connection asks for itself is no script
            # The first that is refused brings the text along; the others, sent behind it, find the script loaded.
            if run.tries > 1 or script not in self._loading:
                self._loading.add(script)
                run.packed = pack((b"EVAL", script.text, len(run.keys), *run.keys, *run.args))
            line.counters.resent += 1
            self.again(run)
        elif word in ("MOVED", "ASK") and run.tries <= _TRIES and self._home.redirected(run, self, word == "ASK", rest):
            line.counters.redirected += 1
        elif word == "TRYAGAIN" and run.tries <= _TRIES:
            line.counters.resent += 1
            line.call_later(line.settings.deadline / 4, self.again, run)
        elif word in _ELSEWHERE and run.tries <= 1:
            line.counters.resent += 1
            if connection is self.connection:
                self.retire()
            self._home.elsewhere(run, self)
        else:
            line.counters.errors += 1
            if word in _UNWELL:
                self.failed(1, error)
            elif word in ("MOVED", "ASK"):
                error = "it is a node of a cluster; the URL of one begins with redis+cluster://"
                line.report(run, self.name, error)
            else:
                line.report(run, self.name, error)
            line.fail(run, f"the store at {self.name} refused: {error}")

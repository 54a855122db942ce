"""The way to a Redis or Valkey server: scripts, run within a deadline, or an error at once.

    link = RedisLink("redis://limits.internal:6379/0", deadline=0.05)
    script = Script("answer", "return {KEYS[1], ARGV[1]}")
    reply = await link.run(script, [b"{caller}:minute"], [1])
    await link.aclose()

What is asked in one turn of the event loop is written at once on one connection (one for each node of a cluster), 32
runs at a time, and one reader hands out the replies: there is no pool, no lock, and no task for a run.

Guarantees:

* **No run lasts longer than its deadline** (plus what the event loop itself is late), also while connecting, while a
  name is resolved, and with a server that accepts and says nothing. It ends with a reply or `StoreUnavailableError`.
* **Nothing is done twice.** A run is sent again only if the server said that it did not run it. One whose answer was
  cut off is unknown: it raises.
* **Nothing is done unseen.** A run whose waiter has gone before it was sent is not sent. If it was sent, and its reply
  comes after all, `abandoned(reply)` is called, so that it can be undone.
* **A store that is away costs nothing.** After `failures` runs in a row, or one failed attempt to connect, runs are
  refused at once; one task looks after the server, ever less often, up to 5 s. One log line tells of the loss
  (`store_unavailable`) and one of the return (`store_available`).
* Everything is bounded: runs in flight, the length of a reply, connections, waits.

It needs asyncio (uvloop is fine); under trio a run raises `RuntimeError`. It opens when it is first used, in each event
loop by itself, also in several threads, and may be used again after `aclose`.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from threading import Lock
from types import MethodType
from typing import Any
from weakref import WeakMethod

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.address import Address
from sigil_policy.stores.redis.connection import Argument
from sigil_policy.stores.redis.line import Counters, Line, Script, Settings

__all__ = ["Counters", "RedisLink", "Script", "readable"]


def readable(reply: Any, length: int, *, text: bool = False) -> bool:
    """Whether a reply is a list of so many integers, with `text` perhaps bytes behind them.

    Something between, or another script under the same name, can answer anything.
    """
    if reply.__class__ is not list:
        return False
    if text and len(reply) == length + 1 and reply[-1].__class__ is bytes:
        reply = reply[:-1]
    return len(reply) == length and all(number.__class__ is int for number in reply)


class RedisLink:
    """The way to the server of a URL; `sigil_policy.stores.redis.address` lists the forms of URLs.

    Options:
        url: where the server is, for example `"redis://:password@host:6379/0"`.
        deadline: how long a run may take, in seconds (default 0.05).
        connect_timeout: how long an attempt to connect may take in the background, in seconds (default 1); runs that
            wait for it still end at their deadline.
        failures: so many failures in a row open the breaker (default 5). A connection that breaks counts once, and one
            that cannot be made opens it at once.
        max_in_flight: how many runs may wait at once, in one event loop (default 10,000); more are refused.
        max_reply: the longest reply that is read, in bytes (default 1 MiB).

    Raises `ValueError` for a URL or an option that cannot work, and `ImportError` without the extra `redis`.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline: float = 0.05,
        connect_timeout: float = 1.0,
        failures: int = 5,
        max_in_flight: int = 10_000,
        max_reply: int = 1 << 20,
    ) -> None:
        if not 0.001 <= deadline <= 60:
            raise ValueError(f"deadline is how long a run may take, 0.001 to 60 seconds, not {deadline!r}")
        if not deadline <= connect_timeout <= 60:
            raise ValueError(f"connect_timeout is from the deadline up to 60 seconds, not {connect_timeout!r}")
        if failures < 1 or max_in_flight < 1:
            raise ValueError(f"failures and max_in_flight are at least 1, not {failures!r} and {max_in_flight!r}")
        if max_reply < 1024:
            raise ValueError(f"max_reply is the longest reply in bytes, at least 1024, not {max_reply!r}")
        self._address = Address.parse(url)
        self._settings = Settings(
            deadline, connect_timeout, failures, max_in_flight, max_reply, linger=max(1.0, 4 * deadline)
        )
        self._lines: dict[asyncio.AbstractEventLoop, Line] = {}
        self._past = Counters()
        self._lock = Lock()
        self._on_restored: list[Callable[[], Callable[[], Any] | None]] = []

    @classmethod
    def at(cls, url: "str | RedisLink", deadline: float | None) -> "RedisLink":
        """The link of a store that was given a URL, and perhaps a deadline, or a link that is there already.

        Raises `ValueError` for a deadline beside a link: it has its own.
        """
        if isinstance(url, str):
            return cls(url) if deadline is None else cls(url, deadline=deadline)
        if deadline is not None:
            raise ValueError("deadline is an option of the link that was given: RedisLink(url, deadline=...)")
        return url

    def __repr__(self) -> str:
        return f"RedisLink({str(self._address)!r}, deadline={self._settings.deadline})"

    def run(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Argument],
        *,
        abandoned: Callable[[Any], None] | None = None,
    ) -> Awaitable[Any]:
        """Run a script in this turn of the loop; awaiting the answer gives the reply.

        In a cluster all `keys` share a hash tag. The reply is what the script returned: bytes, int, list or None.
        Raises `StoreUnavailableError` at the deadline, on a broken connection, for an error that the server answered,
        or at once while the store is away. `abandoned` gets the reply if nobody waits for it any more.
        """
        line = self._lines.get(_loop()) or self._open()
        return line.ask(script, keys, args, abandoned, False)

    def send(self, script: Script, keys: Sequence[bytes], args: Sequence[Argument]) -> asyncio.Future[Any]:
        """Run a script, and don't wait for it. What fails is counted (`counters.lost`).

        The future is done when it was answered, and cancelled when it failed; nobody need look at it.
        """
        line = self._lines.get(_loop()) or self._open()
        return line.ask(script, keys, args, None, True)

    def unreadable(self) -> StoreUnavailableError:
        """The error to raise for a reply that is not what the script returns; it is counted as one of the server."""
        line = self._lines.get(_loop()) or self._open()
        line.counters.errors += 1
        line.counters.failures += 1
        return StoreUnavailableError("the store answered something that its script does not return")

    def _open(self) -> Line:
        loop = _loop()
        line = Line(self._address, self._settings, loop, self._on_restored, self._closed)
        with self._lock:
            # Lines that ended with their loops.
            for other in [other for other in self._lines if other.is_closed()]:
                self._past.add(self._lines.pop(other).counters)
            self._lines[loop] = line
        return line

    def _closed(self, line: Line, for_good: bool) -> None:
        # What is asked of a loop that is shutting down must not open anything again: there its line stays, closed.
        with self._lock:
            if not for_good and self._lines.get(line.loop) is line:
                del self._lines[line.loop]
                self._past.add(line.counters)

    @property
    def clustered(self) -> bool:
        """Whether it is a cluster, where all keys of a run share a hash tag; elsewhere they need not."""
        return self._address.kind == "cluster"

    @property
    def max_in_flight(self) -> int:
        """How many runs may wait at once, in one event loop."""
        return self._settings.max_in_flight

    @property
    def available(self) -> bool:
        """Whether no breaker is open, in this event loop (outside of one: in any)."""
        try:
            line = self._lines.get(asyncio.get_running_loop())
        except RuntimeError:
            return all(line.available for line in tuple(self._lines.values()))
        return line is None or line.available

    @property
    def counters(self) -> Counters:
        """What happened so far, in all event loops: a copy."""
        total = Counters()
        with self._lock:
            total.add(self._past)
            for line in self._lines.values():
                total.add(line.counters)
        return total

    def on_restored(self, callback: Callable[[], Any]) -> None:
        """Call `callback` whenever the store is back after a breaker was open, and await what it returns if it can be.

        It is called in the event loop in which the store was away, in a task that is no request's. A bound method is
        forgotten with its object: a link outlives those who use it.
        """
        if isinstance(callback, MethodType):
            self._on_restored.append(WeakMethod(callback, self._on_restored.remove))
        else:
            self._on_restored.append(lambda: callback)

    def call_later(self, delay: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `work` in `delay` seconds, in a task that is no request's; not if the link is closed until then."""
        line = self._lines.get(_loop()) or self._open()

        def begin() -> None:
            if not line.closed:
                line.spawn(work())

        line.call_later(delay, begin)

    async def aclose(self) -> None:
        """Close the connections. What is in flight raises `StoreUnavailableError`; using the link opens it again."""
        here = _loop()
        for loop, line in tuple(self._lines.items()):
            if loop is here:
                tasks = line.close()
                if tasks:
                    await asyncio.wait(tasks)
                # The transports end in the turns after this one.
                for _ in range(3):
                    await asyncio.sleep(0)
            elif not loop.is_closed():
                # It may close in this very moment.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(line.close)


def _loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError("a store on a Redis or Valkey server needs asyncio: no loop of asyncio runs here") from None

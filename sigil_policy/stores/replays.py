"""What must not be used twice: the proofs of a client, each for as long as it would be accepted.

    replays = MemoryReplays()                                   # this process
    replays = RedisReplays("redis://auth.internal:6379/0")      # all that share a server

    replays.claim(name, 125.0, clock.monotonic())               # True: nobody had it before
    replays.claim(name, 125.0, clock.monotonic())               # False

Guarantees of every store:

* **Exactly one claim of a name passes**, however many come in the same moment, for as many seconds as it was given.
* **Nothing is forgotten to make room.** A store that is full, or away, raises `StoreUnavailableError`, and whoever
  asked decides what holds then.
* **Seconds are seconds**: a wall clock that is set does not shorten them.

A store in this process knows nothing of the others: with several processes, a proof passes once in each of them.
"""

from collections import deque
from collections.abc import Awaitable
from threading import Lock
from typing import ClassVar, Protocol

from sigil_policy.stores.limits import StoreUnavailableError

MAX_ENTRIES = 1_000_000

# So many entries are looked at with each claim: more than one, so that fewer and fewer are left that have ended.
_LOOKS = 4


class ReplaysFullError(StoreUnavailableError):
    """The store has as many entries as it takes: whether this one was used before will not be known."""


class ReplayStore(Protocol):
    """Where used names are. A store may have `async def aclose(self)`."""

    @property
    def remote(self) -> bool:
        """Whether `claim` returns an awaitable, and other processes are seen."""
        ...

    def claim(self, name: bytes, seconds: float, now: float) -> bool | Awaitable[bool]:
        """Whether nobody has claimed `name` before; from now on, and for so many seconds, somebody has.

        `now` is by the monotonic clock; a store with a clock of its own ignores it. Names are digests of at most 32
        bytes. Raises `StoreUnavailableError`.
        """
        ...


class MemoryReplays:
    """Used names of this process, also of several threads.

        DPoP(origin="https://api.example.com", replays=MemoryReplays(max_entries=100_000))

    A claim costs the same however many there are. What has ended is forgotten in the order in which it came; where
    claims of different lengths share a store, a long one keeps those that came after it.

    Options:
        max_entries: how many there may be, of about 200 bytes each (default 1,000,000: more proofs than a process
            verifies while they count, so that no caller can fill it for the others).
    """

    remote: ClassVar[bool] = False

    __slots__ = ("__weakref__", "_line", "_lock", "_used", "max_entries")

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries is at least 1, not {max_entries!r}")
        self.max_entries = max_entries
        self._lock = Lock()
        # When each ends; and the same names in the order in which they came.
        self._used: dict[bytes, float] = {}
        self._line: deque[bytes] = deque()

    def __len__(self) -> int:
        """How many entries there are, those included that have ended and were not looked at since."""
        return len(self._used)

    def __repr__(self) -> str:
        return f"MemoryReplays({len(self)} entries)"

    def claim(self, name: bytes, seconds: float, now: float) -> bool:
        """Claim, as `ReplayStore.claim` says. Raises `ReplaysFullError`."""
        used, line = self._used, self._line
        with self._lock:
            for _ in range(_LOOKS):
                if not line or used[line[0]] > now:
                    break
                del used[line.popleft()]
            if name in used:
                # One that has ended and waits for its turn behind a longer one counts too: used is used.
                return False
            if len(used) >= self.max_entries:
                raise ReplaysFullError("the store of used proofs is full", max(1.0, used[line[0]] - now))
            used[name] = now + seconds
            line.append(name)
            return True

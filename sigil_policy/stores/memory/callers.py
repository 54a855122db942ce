"""What the three algorithms share: many callers in bounded memory, and a time that never runs backwards.

Callers live in a thousand dictionaries of at most some thousand each, so that growing one is a matter of microseconds
also with a million callers. What is known of them are bytes: the garbage collector does not visit them, so a million
callers do not make its collections slow.

Guarantees:

* A hit costs the same whatever the number of callers, but for what the processor's cache no longer holds.
* At most `max_callers` are known at once. Only a caller whose windows have all ended is forgotten, so nobody evicts a
  counter (their own, or somebody else's) by coming under many names. When the room is used up, new callers of a plan
  share one bucket; anonymous ones from half of `max_callers` on, so that a flood of addresses leaves room for the
  callers that somebody vouched for.
* Memory falls back after the windows end: every so many hits, and every second in which there is one, some more callers
  are looked at; at every hit, while many of them have ended.
* **A clock that is set back** locks nobody out and gives nobody a fresh quota: time goes on from the latest moment
  seen, at the speed of the clock, and the store returns to the wall clock once that has caught up. Until then windows
  are aligned to the shifted time, `reset` is given in the time of the wall clock, and a wait may be prolonged once, by
  at most what the clock was set back. A clock that is set forward ends windows early: time is what the clock says.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import islice
from threading import Lock
from typing import Any, ClassVar

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan

MAX_CALLERS = 500_000
MOST = 999_999_999_999_999
"""No counter goes beyond this: it is the largest number that a header can say (RFC 9651 section 3.3.1)."""

# So few dictionaries that their heads stay in the processor's cache, so many that none holds more than this.
_SHARDS = 1_024
_SHARD = 1_024
# One look for ended callers visits so many of them, in so many dictionaries, and comes again after so many hits.
_VISITS = 50
_LOOKS = 4
_HITS_PER_SWEEP = 256


class Callers(ABC):
    """Callers by key, in `mask + 1` shards: the one of `key` is `shards[hash(key) & mask]`."""

    __slots__ = ("_place", "_turn", "mask", "shards", "size")

    shards: Any

    def __init__(self, most: int) -> None:
        self.mask = max(_SHARDS, 1 << (most // _SHARD).bit_length()) - 1
        self.size = 0
        self._turn = self._place = 0

    @abstractmethod
    def _known(self, index: int) -> dict[str, Any]:
        """The callers of a shard."""

    @abstractmethod
    def _forget(self, index: int, callers: Iterable[tuple[str, Any]]) -> int:
        """Forget which of these callers of a shard have ended; returns how many."""

    @abstractmethod
    def _shrink(self, index: int) -> None:
        """Give the memory of forgotten callers back, if it is worth the while."""

    def sweep(self) -> bool:
        """Forget the ended among the next callers; says whether there were many, so that more are likely."""
        seen = ended = 0
        for _ in range(_LOOKS):
            known = self._known(self._turn)
            part = list(islice(known.items(), self._place, self._place + _VISITS - seen))
            gone = self._forget(self._turn, part) if part else 0
            seen += len(part)
            ended += gone
            self._place += len(part) - gone
            if self._place < len(known):
                break
            self._shrink(self._turn)
            self._turn = (self._turn + 1) & self.mask
            self._place = 0
        self.size -= ended
        return ended > 16 and 2 * ended > seen


class Records(Callers):
    """Callers whose state is a record of fixed width.

    A shard is where each caller's record stands, all records one behind the other, and the places that are free again.
    A hit writes in place: nothing is allocated, and few lines of memory are touched.
    """

    __slots__ = ("_ended", "_offsets", "width")

    shards: list[tuple[dict[str, int], bytearray, list[int]]]

    def __init__(self, most: int, width: int, ended: Callable[[bytearray, int], bool]) -> None:
        super().__init__(most)
        self.width = width
        self._ended = ended
        # Shared by all shards: an integer of its own would cost each caller 32 bytes.
        self._offsets: list[int] = []
        self.shards = [({}, bytearray(), []) for _ in range(self.mask + 1)]

    def add(self, key: str) -> int:
        """A place for the record of `key`, which is not known yet."""
        known, records, free = self.shards[hash(key) & self.mask]
        if free:
            place = free.pop()
        else:
            number = len(records) // self.width
            if number == len(self._offsets):
                self._offsets.append(number * self.width)
            place = self._offsets[number]
            records += bytes(self.width)
        known[key] = place
        self.size += 1
        return place

    def widen(self, width: int) -> None:
        """Records are `width` bytes from here on; what is new in them is zero."""
        for index in range(self.mask + 1 if self.size else 0):
            self._copy(index, width)
        self.width = width
        self._offsets = [number * width for number in range(len(self._offsets))]

    def _copy(self, index: int, width: int) -> None:
        known, records, _ = self.shards[index]
        more = bytes(width - self.width)
        copied = bytearray().join([records[place : place + self.width] + more for place in known.values()])
        places = dict(zip(known, range(0, len(copied), width), strict=True)) if known else {}
        self.shards[index] = (places, copied, [])

    def _known(self, index: int) -> dict[str, int]:
        return self.shards[index][0]

    def _forget(self, index: int, callers: Iterable[tuple[str, int]]) -> int:
        known, records, free = self.shards[index]
        gone = [caller for caller in callers if self._ended(records, caller[1])]
        for key, place in gone:
            del known[key]
            free.append(place)
        return len(gone)

    def _shrink(self, index: int) -> None:
        known, _, free = self.shards[index]
        if len(free) > 8 and len(free) > 3 * len(known):
            self._copy(index, self.width)


class Logs(Callers):
    """Callers whose state is a log that grows and shrinks."""

    __slots__ = ("_ended", "_gone")

    shards: list[dict[str, bytearray]]

    def __init__(self, most: int, ended: Callable[[bytearray], bool]) -> None:
        super().__init__(most)
        self._ended = ended
        self._gone = 0
        self.shards = [{} for _ in range(self.mask + 1)]

    def get(self, key: str) -> bytearray | None:
        return self.shards[hash(key) & self.mask].get(key)

    def add(self, key: str, log: bytearray) -> None:
        """Keep the log of `key`, which is not known yet."""
        self.shards[hash(key) & self.mask][key] = log
        self.size += 1

    def _known(self, index: int) -> dict[str, bytearray]:
        return self.shards[index]

    def _forget(self, index: int, callers: Iterable[tuple[str, bytearray]]) -> int:
        gone = [key for key, log in callers if self._ended(log)]
        for key in gone:
            del self.shards[index][key]
        self._gone += len(gone)
        return len(gone)

    def _shrink(self, index: int) -> None:
        if self._gone > 8 and self._gone > 3 * len(self.shards[index]):
            # A dictionary never shrinks by itself.
            self.shards[index] = dict(self.shards[index])
        self._gone = 0


class MemoryLimits(ABC):
    """Limits counted in this process, also by several threads; the module says what it guarantees.

    Options:
        max_callers: how many callers are known at once (default 500,000; some 200 bytes each, and by "sliding" also
            8 bytes for each request of the longest window).
    """

    remote: ClassVar[bool] = False
    algorithms: ClassVar[frozenset[Algorithm]]

    _callers: Callers

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        if max_callers < 2:
            raise ValueError(f"max_callers must be at least 2, not {max_callers}")
        self.max_callers = max_callers
        # Event loops in several threads may share a store.
        self._lock = Lock()
        self._until_sweep = _HITS_PER_SWEEP
        # A hit from `_seen` to before `_edge` is in the present second of a clock that nobody has set back.
        self._seen = 0.0
        self._edge = 0.0
        self._second = 0
        self._shift = 0.0
        # Where each kind of window stands in a state. It only ever grows: a state that is shorter is one that has used
        # nothing of the newer kinds, whatever plan wrote it.
        self._places: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        """How many callers are known now."""
        return self._callers.size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_callers={self.max_callers})"

    @abstractmethod
    def prepare(self, plan: Plan) -> None:
        """Make room for the windows of `plan`, as `LimitStore.prepare` says."""

    def admit(self, key: str, plan: Plan, cost: int, estimate: int | None, now: float) -> Decision:
        with self._lock:
            return self._admit(key, plan, cost, estimate, now)

    def settle(self, lease: Lease, used: int, now: float) -> tuple[int, ...]:
        with self._lock:
            return self._settle(lease, used, now)

    @abstractmethod
    def _admit(self, key: str, plan: Plan, cost: int, estimate: int | None, now: float) -> Decision:
        """Decide one request, as `LimitStore.admit` says."""

    @abstractmethod
    def _settle(self, lease: Lease, used: int, now: float) -> tuple[int, ...]:
        """Replace a reservation by what was used, as `LimitStore.settle` says."""

    def _advance(self, now: float) -> float:
        """The time that the store goes by, where it is not simply `now`: a new second, or a clock that was set back."""
        steady = now + self._shift
        if steady < self._seen:
            steady = self._seen
        elif now >= self._seen:
            steady = now
        shift = steady - now
        second = int(steady)
        if second != self._second or shift != self._shift:
            self._shift = shift
            self._second = second
            self._new_second()
        self._edge = 0.0 if shift else second + 1.0
        return steady

    def _new_second(self) -> None:
        """The first hit of a second: here goes what need not be done more often."""
        self._until_sweep = 0

    def _sweep(self) -> None:
        self._until_sweep = 0 if self._callers.sweep() else _HITS_PER_SWEEP

    def _bucket(self, key: str, plan: Plan) -> str:
        """Where a caller that is not known yet is counted: under its own name while there is room."""
        if self._callers.size < (self.max_callers >> plan.anonymous):
            return key
        # Look for room more often than on other hits, but not on each: this may be a flood.
        self._until_sweep -= _HITS_PER_SWEEP // 8
        return plan.overflow

    def _place(self, plan: Plan) -> list[int]:
        """The places of the plan's windows, in its order."""
        for window in plan.windows:
            self._places.setdefault((window.unit, window.seconds), len(self._places))
        return [self._places[window.unit, window.seconds] for window in plan.windows]

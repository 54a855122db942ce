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
* **Levels** are all asked before one of them is counted, so a refusal leaves every level as it was. Each is kept under
  its own name, with its own plan: a name has the same counters on whatever level it stands, or without levels. Two
  levels of one request must have different names (`ValueError`), and share no bucket while the store is full.
* **Threads** may share a store, each with its event loop: one is inside at a time, for some microseconds.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import chain, islice
from operator import add
from threading import Lock
from time import sleep
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

from sigil_policy.stores.limits import Algorithm, Decision, Key, Lease, Plan, Window

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

_P = ParamSpec("_P")
_T = TypeVar("_T")


# CPython takes the interpreter from a thread at a call or at a jump backwards, and nowhere else. Between looking at a
# flag and taking it there is neither, so a flag keeps others out, at a tenth of what a lock costs.
_TURNS = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


def exclusive(method: Callable[_P, _T], turns: bool = _TURNS) -> Callable[_P, _T]:
    """Marks a method that begins with waiting for `_busy` and taking it. Where threads do not take turns (no global
    interpreter lock), it is put under a lock."""
    if turns:
        return method

    @wraps(method)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        store: Any = args[0]
        with store._lock:  # noqa: SLF001  it is the store's method
            return method(*args, **kwargs)

    return locked


class Callers(ABC):
    """Callers by key, in `mask + 1` shards: the one of `key` is `shards[hash(key) & mask]`."""

    __slots__ = ("_place", "_turn", "mask", "shards", "size")

    shards: Any

    def __init__(self, most: int) -> None:
        self.mask = max(_SHARDS, 1 << (most // _SHARD).bit_length()) - 1
        self.size = 0
        self._turn = self._place = 0

    def knows(self, key: str) -> bool:
        """Whether there is a state of `key`."""
        return key in self._known(hash(key) & self.mask)

    @abstractmethod
    def enter(self, key: str) -> Any:
        """What stands for `key` in its shard; one who has used nothing, if it is not known yet."""

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

    def enter(self, key: str) -> int:
        place = self.shards[hash(key) & self.mask][0].get(key)
        return self.add(key) if place is None else place

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

    def enter(self, key: str) -> bytearray:
        log = self.get(key)
        if log is None:
            self.add(key, log := bytearray())
        return log

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


class Weighed(NamedTuple):
    """What a store would say of one request, and has not counted.

    `said` is what remains of each window, and when that is renewed: as if the request was counted, or where some
    windows are `refused`, as it stands (and of these, when they would admit it). `state` is what the store needs to
    count it.
    """

    said: list[tuple[int, float]]
    refused: list[int]
    state: Any = None
    lease: Lease | None = None


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
        # Whether a thread is inside.
        self._busy = False
        self._lock = Lock()
        self._until_sweep = _HITS_PER_SWEEP
        # A hit from `_seen` to before `_edge` is in the present second of a clock that nobody has set back.
        self._seen = 0.0
        self._edge = 0.0
        self._second = 0
        self._shift = 0.0
        # Where each measure stands in a state, and a window of it. They only ever grow: a state that is shorter is one
        # that has used nothing of the newer measures, whatever plan wrote it.
        self._places: dict[str, int] = {}
        self._orders: dict[Plan, list[int]] = {}

    def __len__(self) -> int:
        """How many callers are known now."""
        return self._callers.size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_callers={self.max_callers})"

    @exclusive
    def prepare(self, plan: Plan) -> None:
        """Make room for the windows of `plan`, as `LimitStore.prepare` says."""
        while self._busy:
            sleep(0)
        self._busy = True
        try:
            for level in plan.levels or (plan,):
                self._prepare(level)
        finally:
            self._busy = False

    @exclusive
    def extend(self, lease: Lease, more: tuple[int, ...], now: float) -> tuple[int, ...] | None:
        """Reserve more for an open lease, as `LimitStore.extend` says; None for one that is settled."""
        while self._busy:
            sleep(0)
        self._busy = True
        try:
            time = self._time(now)
            parts = list(zip(_names(lease.key), _leases(lease), _by_level(lease.plan, more), strict=True))
            for key, part, amounts in parts:
                left = self._left(key, part.plan, time)
                if lease.settled or any(amount and amount > rest for amount, rest in zip(amounts, left, strict=True)):
                    return None
            for key, part, amounts in parts:
                self._reserve(key, part, amounts, time)
            if lease.plan.levels:
                lease.reserved = tuple(map(add, lease.reserved, more))
            return self._remaining(lease.key, lease.plan, time)
        finally:
            self._busy = False

    @exclusive
    def settle(self, lease: Lease, used: tuple[int, ...], now: float) -> tuple[int, ...]:
        """Replace a reservation by what was used, as `LimitStore.settle` says."""
        while self._busy:
            sleep(0)
        self._busy = True
        try:
            time = now if self._seen <= now < self._edge else self._advance(now)
            self._seen = time
            if len(used) != len(lease.plan.tokens):
                raise _uneven(lease.plan, "token windows", lease.plan.tokens, used)
            if not lease.plan.levels:
                return self._settle(lease.key, lease, used, time)
            parts = zip(_names(lease.key), _leases(lease), _by_level(lease.plan, used), strict=True)
            left = [self._settle(key, part, amounts, time) for key, part, amounts in parts]
            lease.settled = True
            return tuple(chain.from_iterable(left))
        finally:
            self._busy = False

    @exclusive
    def charge(self, key: Key, plan: Plan, amounts: tuple[int, ...], now: float) -> tuple[int, ...]:
        """Count what has happened, as `LimitStore.charge` says."""
        while self._busy:
            sleep(0)
        self._busy = True
        try:
            time = self._time(now)
            buckets = self._buckets(key, plan)
            for bucket, level, part in zip(buckets, plan.levels or (plan,), _by_window(plan, amounts), strict=True):
                self._charge(bucket, level, [min(amount, MOST) for amount in part], time)
            return self._remaining(buckets, plan, time)
        finally:
            self._busy = False

    @abstractmethod
    def _prepare(self, plan: Plan) -> None:
        """Make room for the windows of a plan without levels."""

    @abstractmethod
    def admit(self, key: Any, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Decision:
        """Decide one request, as `LimitStore.admit` says; one of a plan with levels by `_admit_levels`."""

    @abstractmethod
    def _weigh(self, key: str, plan: Plan, cost: int, estimate: tuple[int, ...] | None, time: float) -> Weighed:
        """What `admit` would say of a request to a plan without levels; nothing is counted."""

    @abstractmethod
    def _count(self, key: str, weighed: Weighed, time: float) -> None:
        """Count what was weighed, and not refused, at this moment."""

    @abstractmethod
    def _left(self, key: str, plan: Plan, time: float) -> list[float]:
        """What is left in each token window, below 0 where it is overdrawn."""

    @abstractmethod
    def _reserve(self, key: str, lease: Lease, more: tuple[int, ...], time: float) -> None:
        """Charge `more` to the present windows, whether or not it fits; the lease then holds it."""

    @abstractmethod
    def _settle(self, key: Any, lease: Lease, used: tuple[int, ...], time: float) -> tuple[int, ...]:
        """Settle the lease of a plan without levels, unless it is settled already; returns what remains."""

    @abstractmethod
    def _charge(self, key: str, plan: Plan, amounts: list[int], time: float) -> None:
        """Count what has happened, in each window an amount."""

    def _admit_levels(
        self, keys: tuple[str, ...], plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float
    ) -> Decision:
        """Ask every level, then count in all of them or in none."""
        time = self._time(now)
        self._until_sweep -= 1
        if self._until_sweep < 0:
            self._sweep()
        order = self._orders.get(plan) or self._order(plan)
        buckets = self._buckets(keys, plan)
        amounts = [None] * len(buckets) if estimate is None else _by_level(plan, estimate)
        levels = list(zip(buckets, plan.levels, amounts, strict=True))
        all_weighed = [self._weigh(bucket, level, cost, amount, time) for bucket, level, amount in levels]
        said: list[tuple[int, float]] = []
        refused: list[int] = []
        for weighed in all_weighed:
            refused += [len(said) + index for index in weighed.refused]
            said += weighed.said
        if refused:
            # Of the levels that do not refuse, what is there now.
            present = [
                weighed.said if weighed.refused else self._weigh(bucket, level, 0, None, time).said
                for weighed, (bucket, level, _) in zip(all_weighed, levels, strict=True)
            ]
            said = [row for rows in present for row in rows]
            return self._refusal(buckets, [said[place] for place in order], [*map(order.index, refused)], now)
        for bucket, weighed in zip(buckets, all_weighed, strict=True):
            self._count(bucket, weighed, time)
        remaining, resets = [], []
        for place in order:
            left, end = said[place]
            remaining.append(left)
            resets.append(end - self._shift)
        lease = None
        if estimate is not None:
            lease = Lease(buckets, plan, estimate, time, [weighed.lease for weighed in all_weighed])
        return Decision(True, tuple(remaining), tuple(resets), buckets, now, lease)

    def _order(self, plan: Plan) -> list[int]:
        """Where the windows of a plan stand when its levels say theirs one after the other."""
        # A state is not to be made wider between weighing and counting.
        for level in plan.levels:
            self._prepare(level)
        units = [window.unit for level in plan.levels for window in level.windows]
        self._orders[plan] = sorted(range(len(units)), key=lambda place: units[place] != "requests")
        return self._orders[plan]

    def _refuse(self, key: str, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Decision:
        """Refuse a request, from the state as it was: what the first windows would have taken is not taken."""
        weighed = self._weigh(key, plan, cost, estimate, self._seen)
        return self._refusal(key, weighed.said, weighed.refused, now)

    def _refusal(self, key: Key, said: list[tuple[int, float]], refused: list[int], now: float) -> Decision:
        refused = sorted(refused, key=lambda index: said[index][1], reverse=True)
        resets = tuple([end - self._shift for _, end in said])
        wait = said[refused[0]][1] - self._seen
        return Decision(False, tuple([left for left, _ in said]), resets, key, now, None, tuple(refused), wait)

    def _remaining(self, key: Key, plan: Plan, time: float) -> tuple[int, ...]:
        """What remains in each token window of all levels."""
        levels = zip(_names(key), plan.levels or (plan,), strict=True)
        return tuple([max(int(left), 0) for name, level in levels for left in self._left(name, level, time)])

    def _time(self, now: float) -> float:
        """The time that the store goes by."""
        if not self._seen <= now < self._edge:
            now = self._advance(now)
        self._seen = now
        return now

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
        self._orders.clear()

    def _sweep(self) -> None:
        self._until_sweep = 0 if self._callers.sweep() else _HITS_PER_SWEEP

    def _bucket(self, key: str, plan: Plan, coming: int = 0) -> str:
        """Where a caller that is not known yet is counted: under its own name while there is room, also for the
        `coming`."""
        if self._callers.size + coming < (self.max_callers >> plan.anonymous):
            return key
        # Look for room more often than on other hits, but not on each: this may be a flood.
        self._until_sweep -= _HITS_PER_SWEEP // 8
        return plan.overflow

    def _buckets(self, key: Key, plan: Plan) -> tuple[str, ...]:
        """Where a request is counted, on each level."""
        names = _names(key)
        if isinstance(key, str) is bool(plan.levels) or len(names) != len(plan.levels or (plan,)):
            wanted = f"a tuple of {len(plan.levels)} names" if plan.levels else "one name, not a tuple"
            raise ValueError(f"plan {plan.name!r} has {len(plan.levels)} levels: its key must be {wanted}")
        if len(set(names)) < len(names):
            raise ValueError(
                f"plan {plan.name!r}: two levels have the same key, and would count a request twice; "
                "put the name of the level in front of each"
            )
        buckets = []
        coming = 0
        for number, (name, level) in enumerate(zip(names, plan.levels or (plan,), strict=True)):
            if not self._callers.knows(name):
                bucket = self._bucket(name, level, coming)
                coming += 1
                # Levels whose plans have one name share no bucket.
                name = bucket if bucket == name or not number else f"{bucket}, level {number}"
            buckets.append(name)
        return tuple(buckets)

    def _place(self, plan: Plan) -> list[int]:
        """The places of the plan's windows, in its order."""
        for window in plan.windows:
            self._places.setdefault(window.measure, len(self._places))
        return [self._places[window.measure] for window in plan.windows]


def _names(key: Key) -> tuple[str, ...]:
    """The names of all levels."""
    return (key,) if isinstance(key, str) else key


def _leases(lease: Lease) -> list[Lease]:
    """The leases of all levels: the lease itself, if there are none."""
    plan = lease.plan
    if not plan.levels:
        return [lease]
    if lease.mark is None:
        reserved = _by_level(plan, lease.reserved)
        levels = zip(_names(lease.key), plan.levels, reserved, strict=True)
        lease.mark = [Lease(key, level, amounts, lease.at) for key, level, amounts in levels]
    leases: list[Lease] = lease.mark
    return leases


def _by_level(plan: Plan, amounts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Amounts of tokens, level by level."""
    if len(amounts) != len(plan.tokens):
        raise ValueError(
            f"plan {plan.name!r} has {len(plan.tokens)} token windows: {amounts} must have so many numbers"
        )
    rest = iter(amounts)
    return [tuple(islice(rest, len(level.tokens))) for level in plan.levels or (plan,)]


def _by_window(plan: Plan, amounts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Amounts of all windows, level by level."""
    if len(amounts) != len(plan.windows):
        raise _uneven(plan, "windows", plan.windows, amounts)
    requests = iter(amounts[: len(plan.requests)])
    tokens = _by_level(plan, amounts[len(plan.requests) :])
    levels = zip(plan.levels or (plan,), tokens, strict=True)
    return [(*islice(requests, len(level.requests)), *part) for level, part in levels]


def _uneven(plan: Plan, what: str, windows: tuple[Window, ...], amounts: tuple[int, ...]) -> ValueError:
    return ValueError(f"plan {plan.name!r} has {len(windows)} {what}: {amounts} must have so many numbers")

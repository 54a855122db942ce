"""Fixed windows, aligned to the epoch: `Reset` is a round moment, the same for everybody.

    store = FixedWindows()

Windows of a length begin at its multiples since the epoch; calendar months with the first second of a month (UTC).

**Promise:** at most `limit` in each aligned window, and all of it in any of them. Two windows that touch may both be
spent close to where they meet: up to twice the limit in an interval that straddles a boundary. Who must not allow that
takes `SlidingLog`.

A caller is a record of the second of the last hit and a counter for each window: with 4 windows some 150 bytes in all,
with the key and its place in a dictionary.
"""

from datetime import date, timedelta
from operator import add
from struct import Struct
from time import sleep
from typing import Any

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan, Window
from sigil_policy.stores.memory.callers import MAX_CALLERS, MOST, MemoryLimits, Records, Weighed, exclusive

# What `Decision(...)` does, in half the time.
_new = tuple.__new__

_DAY = 86_400
_EPOCH = date(1970, 1, 1).toordinal()


def _bounds(window: Window, second: int) -> tuple[int, int]:
    """The first second of the window that `second` is in, and the first after it."""
    if window.calendar is None:
        start = second - second % window.seconds
        return start, start + window.seconds
    first = date.fromordinal(_EPOCH + second // _DAY).replace(day=1)
    after = (first + timedelta(days=31)).replace(day=1)
    return (first.toordinal() - _EPOCH) * _DAY, (after.toordinal() - _EPOCH) * _DAY


class _View:
    """A plan during one second."""

    __slots__ = ("ends", "requests", "resets", "rows", "tokens")

    def __init__(self, plan: Plan, places: list[int], ends: list[int], shift: float) -> None:
        # In a state the counters stand behind the second of the last hit.
        self.rows = [(place + 1, window.limit) for place, window in zip(places, plan.windows, strict=True)]
        self.requests = self.rows[: len(plan.requests)]
        self.tokens = self.rows[len(plan.requests) :]
        self.ends: tuple[float, ...] = tuple([ends[place] for place in places])
        self.resets = tuple(end - shift for end in self.ends) if shift else self.ends


class FixedWindows(MemoryLimits):
    """Counts in windows aligned to the epoch, or to the months; the module states the promise.

    Options:
        max_callers: how many callers are known at once (default 500,000).
    """

    algorithms = frozenset[Algorithm](("fixed",))

    _callers: Records

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        super().__init__(max_callers=max_callers)
        self._views: dict[Plan, _View] = {}
        # Of each place: a window that it counts, where the present one begins, and where it ends.
        self._windows: list[Window] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._rolls: list[tuple[int, int]] = []
        self._newest = 0
        self._oldest = b""
        self._callers = Records(max_callers, 8, lambda records, place: records[place : place + 8] < self._oldest)
        self._shape()

    def _shape(self) -> None:
        # Big-endian: eight bytes compare as the second that they are.
        struct = Struct(f">{len(self._places) + 1}Q")
        self._pack, self._unpack = struct.pack_into, struct.unpack_from
        self._blank = [0] * (len(self._places) + 1)
        self._callers.widen(struct.size)

    def _prepare(self, plan: Plan) -> None:
        known = len(self._places)
        for place, window in zip(self._place(plan), plan.windows, strict=True):
            if place == len(self._windows):
                self._windows.append(window)
        if len(self._places) > known:
            self._shape()
            self._new_second()

    @exclusive
    def admit(self, key: Any, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Decision:
        """Decide one request, as `LimitStore.admit` says."""
        while self._busy:
            sleep(0)
        self._busy = True
        try:
            time = now
            if not self._seen <= time < self._edge:
                time = self._advance(time)
            self._seen = time
            view = self._views.get(plan)
            if view is None:
                if plan.levels:
                    return self._admit_levels(key, plan, cost, estimate, now)
                view = self._view(plan)
            self._until_sweep -= 1
            if self._until_sweep < 0:
                self._sweep()
            callers = self._callers
            known, records, _ = callers.shards[hash(key) & callers.mask]
            at = known.get(key)
            if at is None:
                key = self._bucket(key, plan)
                known, records, _ = callers.shards[hash(key) & callers.mask]
                at = known.get(key)
            if at is None:
                state = self._blank.copy()
            else:
                state = [*self._unpack(records, at)]
                if state[0] < self._newest:
                    self._roll(state)
            remaining = []
            for place, limit in view.requests:
                used = state[place] + cost
                if used > limit:
                    if cost:
                        if cost <= limit or state[place]:
                            return self._refuse(key, plan, cost, estimate, now)
                        used = limit
                    remaining.append(0)
                else:
                    remaining.append(limit - used)
                state[place] = used
            lease = None
            if estimate is None:
                for place, limit in view.tokens:
                    left = limit - state[place]
                    remaining.append(left if left > 0 else 0)  # noqa: FURB136  a call costs four times as much
            else:
                for (place, limit), amount in zip(view.tokens, estimate, strict=True):
                    left = limit - state[place] - amount
                    # Without an estimate: as long as anything remains.
                    if left < 0 or (left == 0 and not amount):
                        return self._refuse(key, plan, cost, estimate, now)
                    state[place] += amount
                    remaining.append(left)
                lease = Lease(key, plan, estimate, time)
            state[0] = self._second
            self._pack(records, callers.add(key) if at is None else at, *state)
            return _new(Decision, (True, tuple(remaining), view.resets, key, now, lease, (), 0.0))
        finally:
            self._busy = False

    def _refuse(self, key: str, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Decision:
        # With the very tuple that admissions of this second have: who writes headers from it, does so once.
        return super()._refuse(key, plan, cost, estimate, now)._replace(reset=self._view(plan).resets)

    def _weigh(self, key: str, plan: Plan, cost: int, estimate: tuple[int, ...] | None, time: float) -> Weighed:
        view = self._view(plan)
        records, at, state = self._read(key)
        left = [limit - state[place] for place, limit in view.rows]
        # Without an estimate the tokens are not asked; what costs nothing is never refused.
        needs = [min(cost, limit) for _, limit in view.requests]
        least = needs if estimate is None else needs + [amount or 1 for amount in estimate]
        refused = [index for index, need in enumerate(least) if need and left[index] < need]
        lease = None
        if not refused:
            if estimate is not None:
                needs += estimate
                lease = Lease(key, plan, estimate, time)
            for index, need in enumerate(needs):
                state[view.rows[index][0]] += need
                left[index] -= need
        said = [(max(rest, 0), end) for rest, end in zip(left, view.ends, strict=True)]
        return Weighed(said, refused, (records, at, state), lease)

    def _count(self, key: str, weighed: Weighed, time: float) -> None:
        self._write(key, *weighed.state)

    def _left(self, key: str, plan: Plan, time: float) -> list[float]:
        _, _, state = self._read(key)
        return [limit - state[place] for place, limit in self._view(plan).tokens]

    def _reserve(self, key: str, lease: Lease, more: tuple[int, ...], time: float) -> None:
        rows = self._view(lease.plan).tokens
        records, at, state = self._read(key)
        then, held = lease.mark or (lease.at, lease.reserved)
        now_held = []
        for (place, _), amount, before in zip(rows, more, held, strict=True):
            state[place] += amount
            # What was reserved in a window that has ended is gone with it.
            now_held.append(amount + before if then >= self._starts[place - 1] else amount)
        self._write(key, records, at, state)
        lease.mark = (time, tuple(now_held))
        lease.reserved = tuple(map(add, lease.reserved, more))

    def _settle(self, key: Any, lease: Lease, used: tuple[int, ...], time: float) -> tuple[int, ...]:
        view = self._views.get(lease.plan) or self._view(lease.plan)
        records, at, state = self._read(key)
        if lease.settled:
            return tuple([max(limit - state[place], 0) for place, limit in view.tokens])
        remaining = []
        excess = False
        then, held = lease.mark or (lease.at, lease.reserved)
        for (place, limit), amount, reserved, kept in zip(view.tokens, used, lease.reserved, held, strict=True):
            over = min(amount, MOST) - reserved
            if over > 0:
                excess = True
            elif then < self._starts[place - 1]:
                # What the reservation left unused comes back only if the window that was charged is still the present
                # one: a refund into a later window would let more than the limit through in that one.
                over = 0
            elif over < -kept:
                over = -kept
            total = state[place] + over
            state[place] = 0 if total < 0 else min(total, MOST)
            remaining.append(limit - total if total < limit else 0)
        if excess or at is not None:
            self._write(key, records, at, state)
        lease.settled = True
        return tuple(remaining)

    def _charge(self, key: str, plan: Plan, amounts: list[int], time: float) -> None:
        view = self._view(plan)
        records, at, state = self._read(key)
        for (place, _), amount in zip(view.rows, amounts, strict=True):
            state[place] = min(state[place] + amount, MOST)
        self._write(key, records, at, state)

    def _read(self, key: str) -> tuple[bytearray, int | None, list[int]]:
        """Where the record of a caller stands, and the counters now."""
        known, records, _ = self._callers.shards[hash(key) & self._callers.mask]
        at = known.get(key)
        if at is None:
            return records, at, self._blank.copy()
        state = [*self._unpack(records, at)]
        if state[0] < self._newest:
            self._roll(state)
        return records, at, state

    def _write(self, key: str, records: bytearray, at: int | None, state: list[int]) -> None:
        state[0] = self._second
        self._pack(records, self._callers.add(key) if at is None else at, *state)

    def _roll(self, state: list[int]) -> None:
        """The counters of windows that have ended since the last hit are 0."""
        last = state[0]
        for start, place in self._rolls:
            if last >= start:
                break
            state[place] = 0

    def _new_second(self) -> None:
        super()._new_second()
        bounds = [_bounds(window, self._second) for window in self._windows]
        self._starts = [start for start, _ in bounds]
        self._ends = [end for _, end in bounds]
        # The latest first: of the windows that a hit finds ended, there are mostly few.
        self._rolls = sorted(((start, place) for place, start in enumerate(self._starts, 1)), reverse=True)
        self._newest = max(self._starts, default=0)
        self._oldest = min(self._starts, default=0).to_bytes(8, "big")
        self._views.clear()

    def _view(self, plan: Plan) -> _View:
        view = self._views.get(plan)
        if view is None:
            self._prepare(plan)
            view = self._views[plan] = _View(plan, self._place(plan), self._ends, self._shift)
        return view

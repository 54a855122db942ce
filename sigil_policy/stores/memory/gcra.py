"""A smooth limit: what was used drains away evenly, so a caller who waits for one request's share may send one.

    store = Gcra()

**Promise:** at most `limit` at once, and at most `limit * (1 + t / seconds)` in any interval of `t` seconds: after a
burst of `limit` one more for each `seconds / limit`. It is the generic cell rate algorithm with a burst of `limit`,
kept as the level of a bucket that leaks: a level is an amount, so another tier goes on from the same use.

Headers: `reset` is when the bucket is empty again, but no sooner than the window's own rate would allow what remains;
otherwise a full quota at the start of a long window would invite a burst every second (draft-ietf-httpapi-ratelimit-
headers-11 section 8.5). When nothing remains it is when one more is free.

A caller is a record of two moments, a level for each window and, for tokens, the sum of refunds.
"""

from collections.abc import Sequence
from operator import add
from struct import Struct
from time import sleep
from typing import Any, NamedTuple

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan
from sigil_policy.stores.memory.callers import MAX_CALLERS, MemoryLimits, Records, Weighed, exclusive

_new = tuple.__new__
_MOMENT = Struct("d")

# A state is: until when it says anything, the moment of its levels, then by place a level or a sum of refunds.
_UNTIL, _AT, _FIRST = 0, 1, 2


class _Row(NamedTuple):
    """A window of a plan: the place of its level, its limit, what drains in a second, the seconds in which one drains,
    and what rounding may add."""

    place: int
    limit: int
    rate: float
    share: float
    slack: float

    def said(self, level: float, time: float) -> tuple[int, float]:
        """What remains at a level, and when that is renewed."""
        left = self.limit - level
        if left + self.slack < 1:
            return int(left + self.slack) if left > 0 else 0, time + (1 - left) * self.share
        return int(left + self.slack), time + max(level, left) * self.share


class _Part(NamedTuple):
    """What a lease reserved at a time: of each token window the amount, the level reached and the refunds so far."""

    at: float
    amounts: tuple[int, ...]
    marks: list[tuple[float, float]]


class _View:
    """A plan, as this store counts it. `others` are the places of other plans' windows, with their drain; `drains` are
    all."""

    __slots__ = ("drains", "others", "refunds", "requests", "rows", "tokens")

    def __init__(self, rows: list[_Row], split: int, refunds: list[int], others: list[tuple[int, float]]) -> None:
        self.rows = rows
        self.requests = rows[:split]
        self.tokens = rows[split:]
        self.refunds = refunds
        self.others = others
        self.drains = [*((row.place, row.rate) for row in rows), *others]


class Gcra(MemoryLimits):
    """Counts by the level of a leaking bucket; the module states the promise.

    Options:
        max_callers: how many callers are known at once (default 500,000).
    """

    algorithms = frozenset[Algorithm](("gcra",))

    _callers: Records

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        super().__init__(max_callers=max_callers)
        self._views: dict[Plan, _View] = {}
        # The slowest drain of a place in any plan: what a window drains by while its caller is on another plan.
        self._rates: dict[int, float] = {}
        self._callers = Records(
            max_callers, 8, lambda records, place: _MOMENT.unpack_from(records, place)[0] <= self._seen
        )
        self._shape()

    def _shape(self) -> None:
        struct = Struct(f"{len(self._places) + _FIRST}d")
        self._pack, self._unpack = struct.pack_into, struct.unpack_from
        self._blank = [0.0] * (len(self._places) + _FIRST)
        self._callers.widen(struct.size)

    def _prepare(self, plan: Plan) -> None:
        known = len(self._places)
        places = self._place(plan)
        for window in plan.tokens:
            self._places.setdefault(f"refunds {window.measure}", len(self._places))
        rates = self._rates.copy()
        for place, window in zip(places, plan.windows, strict=True):
            rate = window.limit / window.seconds
            self._rates[place + _FIRST] = min(rate, rates.get(place + _FIRST, rate))
        if len(self._places) > known:
            self._shape()
        if self._rates != rates:
            self._views.clear()

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
            state = self._blank.copy() if at is None else [*self._unpack(records, at)]
            elapsed = time - state[_AT]
            longest = 0.0
            remaining = []
            resets = []
            for place, limit, rate, share, slack in view.requests:
                level = state[place] - elapsed * rate
                level = level + cost if level > 0 else cost
                left = limit - level
                if left + slack < 0 and cost:
                    if cost <= limit or level > cost + slack:
                        return self._refuse(key, plan, cost, estimate, now)
                    level, left = limit, 0
                state[place] = level
                drain = level * share
                if drain > longest:
                    longest = drain
                remaining.append(int(left + slack) if left > 0 else 0)
                if left + slack < 1:
                    resets.append(now + (1 - left) * share)
                else:
                    resets.append(now + (drain if level > left else left * share))
            marks = []
            for index, (place, limit, rate, share, slack) in enumerate(view.tokens):
                level = state[place] - elapsed * rate
                if level < 0:
                    level = 0.0
                if estimate is not None:
                    amount = estimate[index]
                    level += amount
                    if limit - level + slack < (0 if amount else 1):
                        return self._refuse(key, plan, cost, estimate, now)
                    marks.append((level, state[view.refunds[index]]))
                left = limit - level
                state[place] = level
                drain = level * share
                if drain > longest:
                    longest = drain
                remaining.append(int(left + slack) if left > 0 else 0)
                if left + slack < 1:
                    resets.append(now + (1 - left) * share)
                else:
                    resets.append(now + (drain if level > left else left * share))
            for place, rate in view.others:
                state[place] = max(state[place] - elapsed * rate, 0.0)
            lease = None
            if estimate is not None:
                lease = Lease(key, plan, estimate, time, [_Part(time, estimate, marks)])
            # A refund does not bring this forward: a lease must find what it marked.
            if time + longest > state[_UNTIL]:
                state[_UNTIL] = time + longest
            state[_AT] = time
            self._pack(records, callers.add(key) if at is None else at, *state)
            return _new(Decision, (True, tuple(remaining), tuple(resets), key, now, lease, (), 0.0))
        finally:
            self._busy = False

    def _weigh(self, key: str, plan: Plan, cost: int, estimate: tuple[int, ...] | None, time: float) -> Weighed:
        view = self._view(plan)
        records, at, state = self._drained(key, view, time)
        split = len(view.requests)
        refused, levels, needs = [], [], []
        for index, row in enumerate(view.rows):
            level = state[row.place]
            # In the words of `admit`: rounding must not make the two differ.
            if index < split:
                need = min(cost, row.limit)
                level += cost
                no = cost > 0 and row.limit - level + row.slack < 0
                if no and cost > row.limit and level <= cost + row.slack:
                    no, level = False, row.limit
            else:
                amount = 0 if estimate is None else estimate[index - split]
                need = amount or 1
                level += amount
                no = estimate is not None and row.limit - level + row.slack < (0 if amount else 1)
            if no:
                refused.append(index)
            levels.append(level)
            needs.append(need)
        if refused:
            said = [row.said(state[row.place], time) for row in view.rows]
            for index in refused:
                row = view.rows[index]
                wait = (needs[index] - row.limit + state[row.place]) * row.share
                said[index] = (said[index][0], time + wait)
            return Weighed(said, refused)
        for row, level in zip(view.rows, levels, strict=True):
            state[row.place] = level
        lease = None
        if estimate is not None:
            marks = [(state[row.place], state[sum_]) for row, sum_ in zip(view.tokens, view.refunds, strict=True)]
            lease = Lease(key, plan, estimate, time, [_Part(time, estimate, marks)])
        said = [row.said(state[row.place], time) for row in view.rows]
        return Weighed(said, refused, (records, at, state, view), lease)

    def _count(self, key: str, weighed: Weighed, time: float) -> None:
        self._write(key, *weighed.state)

    def _left(self, key: str, plan: Plan, time: float) -> list[float]:
        view = self._view(plan)
        _, _, state = self._drained(key, view, time)
        return [row.limit - state[row.place] + row.slack for row in view.tokens]

    def _reserve(self, key: str, lease: Lease, more: tuple[int, ...], time: float) -> None:
        view = self._view(lease.plan)
        records, at, state = self._drained(key, view, time)
        rows = view.tokens
        marks = []
        for row, place, amount in zip(rows, view.refunds, more, strict=True):
            state[row.place] += amount
            marks.append((state[row.place], state[place]))
        self._write(key, records, at, state, view)
        # Parts that have drained from every window hold nothing any more.
        parts = [
            part
            for part in lease.mark or ()
            if any(level > (time - part.at) * row.rate for row, (level, _) in zip(rows, part.marks, strict=True))
        ]
        lease.mark = [*parts, _Part(time, more, marks)]
        lease.reserved = tuple(map(add, lease.reserved, more))

    def _settle(self, key: Any, lease: Lease, used: tuple[int, ...], time: float) -> tuple[int, ...]:
        view = self._views.get(lease.plan) or self._view(lease.plan)
        records, at, state = self._drained(key, view, time)
        if not lease.settled:
            excess = False
            parts = lease.mark or ()
            rows = zip(view.tokens, view.refunds, used, lease.reserved, strict=True)
            for index, (row, place, amount, reserved) in enumerate(rows):
                if amount < reserved:
                    back = _unused(parts, index, reserved - amount, row.rate, state[place], time)
                    back = min(back, state[row.place])
                    state[row.place] -= back
                    state[place] += back
                elif amount > reserved:
                    excess = True
                    _pour(state, row, amount - reserved)
            if excess or at is not None:
                self._write(key, records, at, state, view)
            lease.settled = True
        return tuple([max(int(row.limit - state[row.place] + row.slack), 0) for row in view.tokens])

    def _charge(self, key: str, plan: Plan, amounts: list[int], time: float) -> None:
        view = self._view(plan)
        records, at, state = self._drained(key, view, time)
        for row, amount in zip(view.rows, amounts, strict=True):
            _pour(state, row, amount)
        self._write(key, records, at, state, view)

    def _drained(self, key: str, view: _View, time: float) -> tuple[bytearray, int | None, list[float]]:
        """Where the record of a caller stands, and the state as it stands now."""
        known, records, _ = self._callers.shards[hash(key) & self._callers.mask]
        at = known.get(key)
        if at is None:
            state = self._blank.copy()
        else:
            state = [*self._unpack(records, at)]
            elapsed = time - state[_AT]
            for place, rate in view.drains:
                level = state[place] - elapsed * rate
                state[place] = level if level > 0 else 0.0
        state[_AT] = time
        return records, at, state

    def _write(self, key: str, records: bytearray, at: int | None, state: list[float], view: _View) -> None:
        """Keep the state of a caller whose tokens, or requests, have changed."""
        until = state[_UNTIL]
        for row in view.rows:
            end = state[_AT] + state[row.place] * row.share
            if end > until:
                until = end
        state[_UNTIL] = until
        self._pack(records, self._callers.add(key) if at is None else at, *state)

    def _new_second(self) -> None:
        super()._new_second()
        self._views.clear()

    def _view(self, plan: Plan) -> _View:
        known = self._views.get(plan)
        if known is not None:
            return known
        self._prepare(plan)
        # A level is exact to some 1e-15 of itself, a moment of time to 2.4e-7 seconds.
        rows = [
            _Row(place + _FIRST, w.limit, rate := w.limit / w.seconds, w.seconds / w.limit, 1e-6 * (1 + rate))
            for place, w in zip(self._place(plan), plan.windows, strict=True)
        ]
        mine = {row.place for row in rows}
        others = [(place, rate) for place, rate in self._rates.items() if place not in mine]
        refunds = [self._places[f"refunds {window.measure}"] + _FIRST for window in plan.tokens]
        view = self._views[plan] = _View(rows, len(plan.requests), refunds, others)
        return view


def _pour(state: list[float], row: _Row, amount: int) -> None:
    """Count what was used beyond all reservations."""
    # A report that is absurd must not lock the caller out for ever: the debt is two windows at most.
    state[row.place] = max(state[row.place], min(state[row.place] + amount, 2 * row.limit))


def _unused(parts: Sequence[_Part], index: int, amount: int, rate: float, refunds: float, time: float) -> float:
    """How much of a lease's `amount` of unused tokens comes back, in its token window `index`."""
    back = 0.0
    # The newest part was reserved for what came last: it is the first that was not needed.
    shares = []
    for part in reversed(parts):
        shares.append(min(amount, part.amounts[index]))
        amount -= shares[-1]
    for part, share in zip(parts, reversed(shares), strict=True):
        # Only what has not drained yet comes back. Of a reservation and those before it that is what still stands
        # under the level it reached, which drains, and sinks with each refund that others had since.
        level, then = part.marks[index]
        kept = level - (time - part.at) * rate - max(refunds - then, 0.0)
        back = max(min(back + share, kept), 0.0)
    return back

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

from struct import Struct
from typing import NamedTuple

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan
from sigil_policy.stores.memory.callers import MAX_CALLERS, MOST, MemoryLimits, Records

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


class _View:
    """A plan, as this store counts it. `others` are the places of other plans' windows, with their drain."""

    __slots__ = ("others", "refunds", "requests", "tokens")

    def __init__(self, rows: list[_Row], split: int, refunds: list[int], others: list[tuple[int, float]]) -> None:
        self.requests = rows[:split]
        self.tokens = rows[split:]
        self.refunds = refunds
        self.others = others


class Gcra(MemoryLimits):
    """Counts by the level of a leaking bucket; the module states the promise.

    Options:
        max_callers: how many callers are known at once (default 500,000).
    """

    algorithms = frozenset[Algorithm](("gcra",))

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        super().__init__(max_callers=max_callers)
        self._views: dict[Plan, _View] = {}
        # The slowest drain of a place in any plan: what a window drains by while its caller is on another plan.
        self._rates: dict[int, float] = {}
        self._callers: Records = Records(
            max_callers, 8, lambda records, place: _MOMENT.unpack_from(records, place)[0] <= self._seen
        )
        self._shape()

    def _shape(self) -> None:
        struct = Struct(f"{len(self._places) + _FIRST}d")
        self._pack, self._unpack = struct.pack_into, struct.unpack_from
        self._blank = [0.0] * (len(self._places) + _FIRST)
        self._callers.widen(struct.size)

    def prepare(self, plan: Plan) -> None:
        known = len(self._places)
        places = self._place(plan)
        for window in plan.tokens:
            self._places.setdefault(("refunds", window.seconds), len(self._places))
        for place, window in zip(places, plan.windows, strict=True):
            rate = window.limit / window.seconds
            self._rates[place + _FIRST] = min(rate, self._rates.get(place + _FIRST, rate))
        if len(self._places) > known:
            self._shape()
        self._views.clear()

    def _admit(self, key: str, plan: Plan, cost: int, estimate: int | None, now: float) -> Decision:
        if not self._seen <= now < self._edge:
            now = self._advance(now)
        self._seen = now
        view = self._views.get(plan) or self._view(plan)
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
        elapsed = now - state[_AT]
        wall = now - self._shift
        longest = 0.0
        remaining = []
        resets = []
        for place, limit, rate, share, slack in view.requests:
            level = state[place] - elapsed * rate
            level = level + cost if level > 0 else cost
            left = limit - level
            if left + slack < 0:
                if cost <= limit or level > cost:
                    return self._refuse(key, view, cost, estimate, now)
                level, left = limit, 0
            state[place] = level
            drain = level * share
            if drain > longest:
                longest = drain
            remaining.append(int(left + slack))
            if left + slack < 1:
                resets.append(wall + (1 - left) * share)
            else:
                resets.append(wall + (drain if level > left else left * share))
        for place, limit, rate, share, slack in view.tokens:
            level = state[place] - elapsed * rate
            if level < 0:
                level = 0.0
            if estimate is not None:
                level += estimate
                if limit - level + slack < (0 if estimate else 1):
                    return self._refuse(key, view, cost, estimate, now)
            left = limit - level
            state[place] = level
            drain = level * share
            if drain > longest:
                longest = drain
            remaining.append(int(left + slack) if left > 0 else 0)
            if left + slack < 1:
                resets.append(wall + (1 - left) * share)
            else:
                resets.append(wall + (drain if level > left else left * share))
        for place, rate in view.others:
            state[place] = max(state[place] - elapsed * rate, 0.0)
        lease = None
        if estimate is not None:
            mark = [(state[row.place], state[sum_]) for row, sum_ in zip(view.tokens, view.refunds, strict=True)]
            lease = Lease(key, plan, estimate, now, mark)
        # A refund does not bring this forward: a lease must find what it marked.
        if now + longest > state[_UNTIL]:
            state[_UNTIL] = now + longest
        state[_AT] = now
        self._pack(records, callers.add(key) if at is None else at, *state)
        return _new(Decision, (True, tuple(remaining), tuple(resets), key, lease, (), 0.0))

    def _settle(self, lease: Lease, used: int, now: float) -> tuple[int, ...]:
        if not self._seen <= now < self._edge:
            now = self._advance(now)
        self._seen = now
        view = self._views.get(lease.plan) or self._view(lease.plan)
        callers = self._callers
        known, records, _ = callers.shards[hash(lease.key) & callers.mask]
        at = known.get(lease.key)
        state = self._drained(lease.key, view, now)
        if not lease.settled:
            lease.settled = True
            over = min(used, MOST) - lease.reserved
            marks = lease.mark or [(0.0, 0.0)] * len(view.tokens)
            for row, place, (level, refunds) in zip(view.tokens, view.refunds, marks, strict=True):
                if over < 0:
                    # Only what has not drained yet comes back. Of a reservation that is what still stands under the
                    # level it reached, which drains, and sinks with each refund that others had since.
                    kept = level - (now - lease.at) * row.rate - max(state[place] - refunds, 0.0)
                    back = min(-over, max(kept, 0.0), state[row.place])
                    state[row.place] -= back
                    state[place] += back
                else:
                    # A report that is absurd must not lock the caller out for ever: the debt is two windows at most.
                    state[row.place] = max(state[row.place], min(state[row.place] + over, 2 * row.limit))
                    state[_UNTIL] = max(state[_UNTIL], now + state[row.place] / row.rate)
            if at is not None or over > 0:
                self._pack(records, callers.add(lease.key) if at is None else at, *state)
        return tuple([max(int(row.limit - state[row.place] + row.slack), 0) for row in view.tokens])

    def _drained(self, key: str, view: _View, now: float) -> list[float]:
        """The state of a caller as it stands now."""
        known, records, _ = self._callers.shards[hash(key) & self._callers.mask]
        state = [*self._unpack(records, known[key])] if key in known else self._blank.copy()
        elapsed = now - state[_AT]
        for place, rate in (*((row.place, row.rate) for row in (*view.requests, *view.tokens)), *view.others):
            state[place] = max(state[place] - elapsed * rate, 0.0)
        state[_AT] = now
        return state

    def _refuse(self, key: str, view: _View, cost: int, estimate: int | None, now: float) -> Decision:
        # From the state as it was: what the first windows would have taken is not taken.
        state = self._drained(key, view, now)
        remaining, waits, refused = [], [], []
        rows = (*view.requests, *view.tokens)
        for index, row in enumerate(rows):
            level = state[row.place]
            left = row.limit - level
            need = min(cost, row.limit) if index < len(view.requests) else 0 if estimate is None else estimate or 1
            if left + row.slack < need:
                refused.append(index)
                waits.append((need - left) / row.rate)
            else:
                waits.append((max(level, left) if left + row.slack >= 1 else 1 - left) / row.rate)
            remaining.append(max(int(left + row.slack), 0))
        refused.sort(key=waits.__getitem__, reverse=True)
        wall = now - self._shift
        resets = tuple([wall + wait for wait in waits])
        wait = waits[refused[0]]
        return Decision(False, tuple(remaining), resets, key, refused_by=tuple(refused), retry_after=wait)

    def _new_second(self) -> None:
        super()._new_second()
        self._views.clear()

    def _view(self, plan: Plan) -> _View:
        self.prepare(plan)
        # A level is exact to some 1e-15 of itself, a moment of time to 2.4e-7 seconds.
        rows = [
            _Row(place + _FIRST, w.limit, rate := w.limit / w.seconds, w.seconds / w.limit, 1e-6 * (1 + rate))
            for place, w in zip(self._place(plan), plan.windows, strict=True)
        ]
        mine = {row.place for row in rows}
        others = [(place, rate) for place, rate in self._rates.items() if place not in mine]
        refunds = [self._places["refunds", window.seconds] + _FIRST for window in plan.tokens]
        view = self._views[plan] = _View(rows, len(plan.requests), refunds, others)
        return view

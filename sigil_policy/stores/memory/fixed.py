"""Fixed windows, aligned to the epoch: `Reset` is a round moment, the same for everybody.

    store = FixedWindows()

**Promise:** at most `limit` in each aligned window, and all of it in any of them. Two windows that touch may both be
spent close to where they meet: up to twice the limit in an interval that straddles a boundary. Who must not allow that
takes `SlidingLog`.

A caller is a record of the second of the last hit and a counter for each window: with 4 windows some 150 bytes in all,
with the key and its place in a dictionary.
"""

from struct import Struct

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan
from sigil_policy.stores.memory.callers import MAX_CALLERS, MOST, MemoryLimits, Records

# What `Decision(...)` does, in half the time.
_new = tuple.__new__


class _View:
    """A plan during one second."""

    __slots__ = ("ends", "requests", "resets", "tokens")

    def __init__(self, plan: Plan, places: list[int], starts: list[int], shift: float) -> None:
        # In a state the counters stand behind the second of the last hit.
        rows = [(place + 1, window.limit) for place, window in zip(places, plan.windows, strict=True)]
        self.requests = rows[: len(plan.requests)]
        self.tokens = rows[len(plan.requests) :]
        self.ends = tuple(starts[place] + w.seconds for place, w in zip(places, plan.windows, strict=True))
        self.resets: tuple[float, ...] = tuple(end - shift for end in self.ends) if shift else self.ends


class FixedWindows(MemoryLimits):
    """Counts in windows aligned to the epoch; the module states the promise.

    Options:
        max_callers: how many callers are known at once (default 500,000).
    """

    algorithms = frozenset[Algorithm](("fixed",))

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        super().__init__(max_callers=max_callers)
        self._views: dict[Plan, _View] = {}
        self._starts: list[int] = []
        self._rolls: list[tuple[int, int]] = []
        self._newest = 0
        self._oldest = b""
        self._callers: Records = Records(
            max_callers, 8, lambda records, place: records[place : place + 8] < self._oldest
        )
        self._shape()

    def _shape(self) -> None:
        # Big-endian: eight bytes compare as the second that they are.
        struct = Struct(f">{len(self._places) + 1}Q")
        self._pack, self._unpack = struct.pack_into, struct.unpack_from
        self._blank = [0] * (len(self._places) + 1)
        self._callers.widen(struct.size)

    def prepare(self, plan: Plan) -> None:
        known = len(self._places)
        self._place(plan)
        if len(self._places) > known:
            self._shape()
            self._new_second()

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
                if cost <= limit or state[place]:
                    return self._refuse(key, view, cost, estimate, now)
                used = limit
            state[place] = used
            remaining.append(limit - used)
        lease = None
        if estimate is None:
            for place, limit in view.tokens:
                left = limit - state[place]
                remaining.append(left if left > 0 else 0)  # noqa: FURB136  a call costs four times as much
        else:
            for place, limit in view.tokens:
                left = limit - state[place] - estimate
                # Without an estimate: as long as anything remains.
                if left < 0 or (left == 0 and not estimate):
                    return self._refuse(key, view, cost, estimate, now)
                state[place] += estimate
                remaining.append(left)
            lease = Lease(key, plan, estimate, now)
        state[0] = self._second
        self._pack(records, callers.add(key) if at is None else at, *state)
        return _new(Decision, (True, tuple(remaining), view.resets, key, lease, (), 0.0))

    def _settle(self, lease: Lease, used: int, now: float) -> tuple[int, ...]:
        if not self._seen <= now < self._edge:
            now = self._advance(now)
        self._seen = now
        view = self._views.get(lease.plan) or self._view(lease.plan)
        callers = self._callers
        known, records, _ = callers.shards[hash(lease.key) & callers.mask]
        at = known.get(lease.key)
        state = self._read(lease.key)
        if not lease.settled:
            lease.settled = True
            over = min(used, MOST) - lease.reserved
            for place, _ in view.tokens:
                # What the reservation left unused comes back only if the window that was charged is still the present
                # one: a refund into a later window would let more than the limit through in that one.
                if over > 0 or lease.at >= self._starts[place - 1]:
                    state[place] = min(max(state[place] + over, 0), MOST)
            state[0] = self._second
            if at is not None or over > 0:
                self._pack(records, callers.add(lease.key) if at is None else at, *state)
        return tuple([max(limit - state[place], 0) for place, limit in view.tokens])

    def _read(self, key: str) -> list[int]:
        """The counters of a caller now."""
        known, records, _ = self._callers.shards[hash(key) & self._callers.mask]
        if key not in known:
            return self._blank.copy()
        state = [*self._unpack(records, known[key])]
        if state[0] < self._newest:
            self._roll(state)
        return state

    def _roll(self, state: list[int]) -> None:
        """The counters of windows that have ended since the last hit are 0."""
        last = state[0]
        for start, place in self._rolls:
            if last >= start:
                break
            state[place] = 0

    def _refuse(self, key: str, view: _View, cost: int, estimate: int | None, now: float) -> Decision:
        # From the state as it was: what the first windows would have taken is not taken.
        state = self._read(key)
        left = [limit - state[place] for place, limit in (*view.requests, *view.tokens)]
        count = len(view.requests)
        refused = [index for index in range(count) if left[index] < min(cost, view.requests[index][1])]
        if estimate is not None:
            refused += [index for index in range(count, len(left)) if left[index] < (estimate or 1)]
        refused.sort(key=view.ends.__getitem__, reverse=True)
        return Decision(
            False,
            tuple([max(number, 0) for number in left]),
            view.resets,
            key,
            refused_by=tuple(refused),
            retry_after=view.ends[refused[0]] - now,
        )

    def _new_second(self) -> None:
        super()._new_second()
        second = self._second
        self._starts = [second - second % seconds for _, seconds in self._places]
        # The latest first: of the windows that a hit finds ended, there are mostly few.
        self._rolls = sorted(((start, place) for place, start in enumerate(self._starts, 1)), reverse=True)
        self._newest = max(self._starts, default=0)
        self._oldest = min(self._starts, default=0).to_bytes(8, "big")
        self._views.clear()

    def _view(self, plan: Plan) -> _View:
        self.prepare(plan)
        view = self._views[plan] = _View(plan, self._place(plan), self._starts, self._shift)
        return view

"""An exact sliding window: the moment of every request is kept.

    store = SlidingLog(max_callers=50_000)

**Promise:** never more than `limit` in any interval of `seconds`, wherever it begins. The price is memory: 8 bytes for
each request of the longest window, 16 for each request that spent tokens.

Headers: `reset` is when the window would be empty again if no more requests came; when nothing remains, when the
oldest request leaves it.

The log of a caller is one `bytearray`, from which ended requests are cut off in front as new ones come behind.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from struct import Struct

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan
from sigil_policy.stores.memory.callers import MAX_CALLERS, MOST, Logs, MemoryLimits

_new = tuple.__new__
_ONE = Struct("d")
_TWO = Struct("dd")


class _Spent:
    """Who spent how many tokens when, for one length of window. A log is their sum, then pairs of moment and amount."""

    __slots__ = ("callers", "now", "seconds")

    def __init__(self, seconds: int, most: int) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.callers = Logs(most, self._ended)

    def total(self, key: str, now: float) -> int:
        """What `key` has spent in the window that ends now; what was spent before it is cut off."""
        log = self.callers.get(key)
        if log is None:
            return 0
        cutoff = now - self.seconds
        if len(log) > 8 and _ONE.unpack_from(log, 8)[0] <= cutoff:
            pairs = memoryview(log)[8:].cast("d")
            gone = bisect_right(pairs[::2], cutoff)
            left = _ONE.unpack_from(log)[0] - sum(pairs[1 : 2 * gone : 2])
            pairs.release()
            # The last eight bytes that go are the place of the new sum.
            del log[: 16 * gone]
            _ONE.pack_into(log, 0, left)
        return int(_ONE.unpack_from(log)[0])

    def state(self, key: str, now: float) -> tuple[int, float]:
        """What is spent, and when the newest of it will have left the window; without any, when that of now would."""
        log = self.callers.get(key)
        if log is None:
            return 0, now + self.seconds
        total = self.total(key, now)
        return total, (now if len(log) == 8 else _TWO.unpack_from(log, len(log) - 16)[0]) + self.seconds

    def spend(self, key: str, amount: int, now: float) -> None:
        log = self.callers.get(key)
        if log is None:
            self.callers.add(key, bytearray(_ONE.pack(amount) + _TWO.pack(now, amount)))
            return
        if len(log) > 8 and _TWO.unpack_from(log, len(log) - 16)[0] == now:
            _ONE.pack_into(log, len(log) - 8, _ONE.unpack_from(log, len(log) - 8)[0] + amount)
        else:
            log += _TWO.pack(now, amount)
        _ONE.pack_into(log, 0, _ONE.unpack_from(log)[0] + amount)

    def refund(self, key: str, amount: int, at: float) -> None:
        """Take back what was spent at `at`; nothing, if that has left the window."""
        log = self.callers.get(key)
        if log is None:
            return
        with memoryview(log) as whole, whole[8:].cast("d") as pairs:
            index = bisect_left(pairs[::2], at)
            if 2 * index < len(pairs) and pairs[2 * index] == at:
                pairs[2 * index + 1] -= amount
                _ONE.pack_into(log, 0, _ONE.unpack_from(log)[0] - amount)

    def free(self, key: str, amount: int) -> float:
        """When `amount` of what was spent will have left the window."""
        log = self.callers.shards[hash(key) & self.callers.mask][key]
        with memoryview(log) as whole, whole[8:].cast("d") as pairs:
            index = bisect_left(list(accumulate(pairs[1::2])), amount)
            return float(pairs[2 * min(index, len(pairs) // 2 - 1)]) + self.seconds

    def _ended(self, log: bytearray) -> bool:
        return len(log) == 8 or _TWO.unpack_from(log, len(log) - 16)[0] <= self.now - self.seconds


class SlidingLog(MemoryLimits):
    """Counts the requests of the last `seconds`, exactly; the module states the promise.

    Options:
        max_callers: how many callers are known at once (default 500,000). Memory grows with their limits too: 20,000
            requests in the longest window are 160 kB for a caller who uses them.
    """

    algorithms = frozenset[Algorithm](("sliding",))

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        super().__init__(max_callers=max_callers)
        self._callers: Logs = Logs(max_callers, self._ended)
        self._spent: dict[int, _Spent] = {}
        self._planned: dict[Plan, list[tuple[int, _Spent]]] = {}
        self._lasting = self._longest = self._largest = 0

    def prepare(self, plan: Plan) -> None:
        self._place(plan)
        for window in plan.tokens:
            self._spent.setdefault(window.seconds, _Spent(window.seconds, self.max_callers))
        self._lasting = max(seconds for _, seconds in self._places)
        self._longest = max((seconds for unit, seconds in self._places if unit == "requests"), default=0)
        self._largest = max(self._largest, *(window.limit for window in plan.requests), 0)
        self._planned[plan] = [(window.limit, self._spent[window.seconds]) for window in plan.tokens]

    def _admit(self, key: str, plan: Plan, cost: int, estimate: int | None, now: float) -> Decision:
        if not self._seen <= now < self._edge:
            now = self._advance(now)
        self._seen = now
        spent = self._planned.get(plan)
        if spent is None:
            self.prepare(plan)
            spent = self._planned[plan]
        self._until_sweep -= 1
        if self._until_sweep < 0:
            self._sweep()
        callers = self._callers
        log = callers.shards[hash(key) & callers.mask].get(key)
        if log is None:
            key = self._bucket(key, plan)
            log = callers.shards[hash(key) & callers.mask].get(key)
        known = log is not None
        if log is None:
            log = bytearray()
        times = memoryview(log).cast("d")
        count = len(times)
        if count and times[0] <= now - self._longest:
            gone = bisect_right(times, now - self._longest)
            times.release()
            del log[: 8 * gone]
            times = memoryview(log).cast("d")
            count -= gone
        wall = now - self._shift
        remaining = []
        resets = []
        for limit, seconds, _, _ in plan.requests:
            cutoff = now - seconds
            if not count or times[-1] <= cutoff:
                first = count
            elif times[0] > cutoff:
                first = 0
            else:
                first = bisect_right(times, cutoff)
            left = limit - (count - first) - cost
            if left < 0:
                if cost <= limit or first < count:
                    times.release()
                    return self._refuse(key, plan, log, cost, estimate, now)
                left = 0
            remaining.append(left)
            resets.append((wall if left or first == count else times[first] - self._shift) + seconds)
        times.release()
        lease = None
        if estimate is not None:
            for limit, spending in spent:
                if limit - spending.total(key, now) < (estimate or 1):
                    return self._refuse(key, plan, log, cost, estimate, now)
            if estimate:
                for _, spending in spent:
                    spending.spend(key, estimate, now)
            lease = Lease(key, plan, estimate, now)
        for limit, spending in spent:
            total, end = spending.state(key, now)
            left = limit - total
            remaining.append(left if left > 0 else 0)  # noqa: FURB136  a call costs four times as much
            resets.append((end if left > 0 else spending.free(key, 1 - left)) - self._shift)
        # A cost above every limit takes all windows whole: more moments than the largest limit say nothing more.
        log += _ONE.pack(now) * min(cost, self._largest)
        if not known:
            self._callers.add(key, log)
        return _new(Decision, (True, tuple(remaining), tuple(resets), key, lease, (), 0.0))

    def _settle(self, lease: Lease, used: int, now: float) -> tuple[int, ...]:
        if not self._seen <= now < self._edge:
            now = self._advance(now)
        self._seen = now
        if lease.plan not in self._planned:
            self.prepare(lease.plan)
        spent = self._planned[lease.plan]
        key = lease.key
        if not lease.settled:
            lease.settled = True
            over = min(used, MOST) - lease.reserved
            for _, spending in spent:
                spending.total(key, now)
                if over > 0:
                    spending.spend(key, over, now)
                elif over < 0:
                    spending.refund(key, -over, lease.at)
        return tuple([max(limit - spending.total(key, now), 0) for limit, spending in spent])

    def _refuse(self, key: str, plan: Plan, log: bytearray, cost: int, estimate: int | None, now: float) -> Decision:
        remaining, ends, refused = [], [], []
        with memoryview(log) as whole, whole.cast("d") as times:
            for index, window in enumerate(plan.requests):
                first = bisect_right(times, now - window.seconds)
                need = min(cost, window.limit)
                left = window.limit - (len(times) - first)
                if left < need:
                    refused.append(index)
                    ends.append(times[first + need - left - 1] + window.seconds)
                elif left < 1:
                    ends.append(times[first - left] + window.seconds)
                else:
                    ends.append((times[-1] if first < len(times) else now) + window.seconds)
                remaining.append(max(left, 0))
        for index, (limit, spending) in enumerate(self._planned[plan], len(plan.requests)):
            total, end = spending.state(key, now)
            left = limit - total
            need = 0 if estimate is None else estimate or 1
            if left < need:
                refused.append(index)
            ends.append(spending.free(key, max(need, 1) - left) if left < max(need, 1) else end)
            remaining.append(max(left, 0))
        refused.sort(key=ends.__getitem__, reverse=True)
        return Decision(
            False,
            tuple(remaining),
            tuple([end - self._shift for end in ends]),
            key,
            refused_by=tuple(refused),
            retry_after=ends[refused[0]] - now,
        )

    def _new_second(self) -> None:
        super()._new_second()
        self._planned.clear()

    def _sweep(self) -> None:
        super()._sweep()
        for spending in self._spent.values():
            spending.now = self._seen
            spending.callers.sweep()

    def _bucket(self, key: str, plan: Plan) -> str:
        # Who spent tokens may be known for longer than for the requests: that log is bounded as well.
        known = max((spending.callers.size for spending in self._spent.values()), default=0)
        return plan.overflow if known >= self.max_callers else super()._bucket(key, plan)

    def _ended(self, log: bytearray) -> bool:
        return not log or _ONE.unpack_from(log, len(log) - 8)[0] <= self._seen - self._lasting

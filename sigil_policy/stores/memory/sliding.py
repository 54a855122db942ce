"""An exact sliding window: the moment of every request is kept.

    store = SlidingLog(max_callers=50_000)

**Promise:** never more than `limit` in any interval of `seconds`, wherever it begins. The price is memory: 8 bytes for
each request of the longest window, 16 for each request that spent tokens.

Headers: `reset` is when the window would be empty again if no more requests came; when nothing remains, when the
oldest request leaves it. Where more than 512 that spent tokens would have to leave it, it is when all have: never too
early.

The log of a caller is one `bytearray`, from which ended requests are cut off in front as new ones come behind.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from operator import add
from struct import Struct
from time import sleep
from typing import Any

from sigil_policy.stores.limits import Algorithm, Decision, Lease, Plan
from sigil_policy.stores.memory.callers import MAX_CALLERS, MOST, Logs, MemoryLimits, Weighed, exclusive

_new = tuple.__new__
_ONE = Struct("d")
_TWO = Struct("dd")
# So many entries are read to say when tokens come back: nobody's large request costs the others more.
_WALKED = 512


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

    def refund(self, key: str, amount: int, at: float) -> int:
        """Take back what was spent at `at`; nothing, if that has left the window. Returns what came back."""
        log = self.callers.get(key)
        if log is None:
            return 0
        with memoryview(log) as whole, whole[8:].cast("d") as pairs:
            index = bisect_left(pairs[::2], at)
            if 2 * index < len(pairs) and pairs[2 * index] == at:
                pairs[2 * index + 1] -= amount
                _ONE.pack_into(log, 0, _ONE.unpack_from(log)[0] - amount)
                return amount
        return 0

    def free(self, key: str, amount: int, now: float) -> float:
        """When `amount` of what was spent will surely have left the window.

        Exactly then, if that is seen in the oldest entries; else, and if it is more than there is, when all of it has.
        """
        log = self.callers.get(key)
        if log is None or len(log) == 8:
            return now + self.seconds
        with memoryview(log) as whole, whole[8:].cast("d") as pairs:
            sums = list(accumulate(pairs[1 : 2 * _WALKED : 2]))
            index = bisect_left(sums, amount)
            return float(pairs[2 * index if index < len(sums) else -2]) + self.seconds

    def _ended(self, log: bytearray) -> bool:
        return len(log) == 8 or _TWO.unpack_from(log, len(log) - 16)[0] <= self.now - self.seconds


class SlidingLog(MemoryLimits):
    """Counts the requests of the last `seconds`, exactly; the module states the promise.

    Options:
        max_callers: how many callers are known at once (default 500,000). Memory grows with their limits too: 20,000
            requests in the longest window are 160 kB for a caller who uses them.
    """

    algorithms = frozenset[Algorithm](("sliding",))

    _callers: Logs

    def __init__(self, *, max_callers: int = MAX_CALLERS) -> None:
        super().__init__(max_callers=max_callers)
        self._callers = Logs(max_callers, self._ended)
        # By measure.
        self._spent: dict[str, _Spent] = {}
        self._planned: dict[Plan, list[tuple[int, _Spent]]] = {}
        self._lasting = self._longest = self._largest = 0

    def _prepare(self, plan: Plan) -> None:
        self._place(plan)
        for window in plan.tokens:
            if window.measure not in self._spent:
                self._spent[window.measure] = _Spent(window.seconds, self.max_callers)
        self._lasting = max(self._lasting, *(window.seconds for window in plan.windows))
        self._longest = max(self._longest, *(window.seconds for window in plan.requests), 0)
        self._largest = max(self._largest, *(window.limit for window in plan.requests), 0)
        self._planned[plan] = [(window.limit, self._spent[window.measure]) for window in plan.tokens]

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
            spent = self._planned.get(plan)
            if spent is None:
                if plan.levels:
                    return self._admit_levels(key, plan, cost, estimate, now)
                self._prepare(plan)
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
            if count and times[0] <= time - self._longest:
                gone = bisect_right(times, time - self._longest)
                times.release()
                del log[: 8 * gone]
                times = memoryview(log).cast("d")
                count -= gone
            remaining = []
            resets = []
            for limit, seconds, _, _, _ in plan.requests:
                cutoff = time - seconds
                if not count or times[-1] <= cutoff:
                    first = count
                elif times[0] > cutoff:
                    first = 0
                else:
                    first = bisect_right(times, cutoff)
                left = limit - (count - first) - cost
                if left < 0:
                    if cost and (cost <= limit or first < count):
                        times.release()
                        return self._refuse(key, plan, cost, estimate, now)
                    # What takes it whole ends with it; where more is counted than fits, more than one must leave.
                    first, left = (first if cost else first - left), 0
                remaining.append(left)
                resets.append((now if left or first == count else times[first] - self._shift) + seconds)
            times.release()
            lease = None
            if estimate is not None:
                for (limit, spending), amount in zip(spent, estimate, strict=True):
                    if limit - spending.total(key, time) < (amount or 1):
                        return self._refuse(key, plan, cost, estimate, now)
                for (_, spending), amount in zip(spent, estimate, strict=True):
                    if amount:
                        spending.spend(key, amount, time)
                lease = Lease(key, plan, estimate, time)
            for limit, spending in spent:
                total, end = spending.state(key, time)
                left = limit - total
                remaining.append(left if left > 0 else 0)  # noqa: FURB136  a call costs four times as much
                resets.append((end if left > 0 else spending.free(key, 1 - left, time)) - self._shift)
            # A cost above every limit takes all windows whole: more moments than the largest limit say nothing more.
            log += _ONE.pack(time) * min(cost, self._largest)
            if not known:
                self._callers.add(key, log)
            return _new(Decision, (True, tuple(remaining), tuple(resets), key, now, lease, (), 0.0))
        finally:
            self._busy = False

    def _weigh(self, key: str, plan: Plan, cost: int, estimate: tuple[int, ...] | None, time: float) -> Weighed:
        spent = self._spendings(plan)
        requests, tokens, refused = [], [], []
        with memoryview(self._callers.get(key) or b"") as whole, whole.cast("d") as times:
            count = len(times)
            for index, (limit, seconds, _, _, _) in enumerate(plan.requests):
                first = bisect_right(times, time - seconds)
                left = limit - (count - first)
                need = min(cost, limit)
                if need and left < need:
                    refused.append(index)
                requests.append((left, need, first))
            for index, (limit, spending) in enumerate(spent):
                left = limit - spending.total(key, time)
                if estimate is not None and left < (estimate[index] or 1):
                    refused.append(len(requests) + index)
                tokens.append((left, 0 if estimate is None else estimate[index]))
            said = []
            for index, (left, need, first) in enumerate(requests):
                if index in refused:
                    at = times[first + need - left - 1]
                elif need and not refused:
                    left -= need
                    at = time if left or first == count else times[first]
                elif left < 1:
                    at = times[first - left]
                else:
                    at = times[-1] if first < count else time
                said.append((max(left, 0), at + plan.requests[index].seconds))
        for index, ((_, spending), (left, amount)) in enumerate(zip(spent, tokens, strict=True), len(requests)):
            if index in refused:
                end = spending.free(key, (amount or 1) - left, time)
            elif amount and not refused:
                total = spending.total(key, time)
                left -= amount
                end = time + spending.seconds if left > 0 or 1 - left > total else spending.free(key, 1 - left, time)
            else:
                end = spending.free(key, 1 - left, time) if left < 1 else spending.state(key, time)[1]
            said.append((max(left, 0), end))
        if refused:
            return Weighed(said, refused)
        lease = None if estimate is None else Lease(key, plan, estimate, time)
        return Weighed(said, refused, (plan, cost, estimate), lease)

    def _count(self, key: str, weighed: Weighed, time: float) -> None:
        plan, cost, estimate = weighed.state
        log = self._callers.enter(key)
        log += _ONE.pack(time) * min(cost, self._largest)
        for (_, spending), amount in zip(self._spendings(plan), estimate or (), strict=False):
            if amount:
                spending.spend(key, amount, time)

    def _left(self, key: str, plan: Plan, time: float) -> list[float]:
        return [limit - spending.total(key, time) for limit, spending in self._spendings(plan)]

    def _reserve(self, key: str, lease: Lease, more: tuple[int, ...], time: float) -> None:
        for (_, spending), amount in zip(self._spendings(lease.plan), more, strict=True):
            spending.total(key, time)
            if amount:
                spending.spend(key, amount, time)
        # Parts that have left every window hold nothing any more.
        cutoff = time - max((window.seconds for window in lease.plan.tokens), default=0)
        parts = [part for part in _parts(lease) if part[0] > cutoff]
        lease.mark = [*parts, (time, more)]
        lease.reserved = tuple(map(add, lease.reserved, more))

    def _settle(self, key: Any, lease: Lease, used: tuple[int, ...], time: float) -> tuple[int, ...]:
        spent = self._planned.get(lease.plan) or self._spendings(lease.plan)
        if lease.settled:
            return tuple([max(limit - spending.total(key, time), 0) for limit, spending in spent])
        remaining = []
        rows = zip(spent, used, lease.reserved, strict=True)
        for index, ((limit, spending), amount, reserved) in enumerate(rows):
            total = spending.total(key, time)
            over = min(amount, MOST) - reserved
            if over > 0:
                spending.spend(key, over, time)
                total += over
            elif over < 0 and lease.mark is None:
                total -= spending.refund(key, -over, lease.at)
            elif over < 0:
                # The newest part was reserved for what came last: it is the first that was not needed.
                for at, amounts in reversed(lease.mark):
                    total -= spending.refund(key, min(-over, amounts[index]), at)
                    over += amounts[index]
                    if over >= 0:
                        break
            remaining.append(limit - total if total < limit else 0)
        lease.settled = True
        return tuple(remaining)

    def _charge(self, key: str, plan: Plan, amounts: list[int], time: float) -> None:
        log = self._callers.enter(key)
        if plan.requests:
            # One log serves all windows: of different amounts it takes the largest.
            log += _ONE.pack(time) * min(max(amounts[: len(plan.requests)]), self._largest)
            # Of what is older than so many requests no window has room to ask.
            del log[: -8 * self._largest]
        for (_, spending), amount in zip(self._spendings(plan), amounts[len(plan.requests) :], strict=True):
            spending.total(key, time)
            if amount:
                spending.spend(key, amount, time)

    def _spendings(self, plan: Plan) -> list[tuple[int, _Spent]]:
        if plan not in self._planned:
            self._prepare(plan)
        return self._planned[plan]

    def _new_second(self) -> None:
        super()._new_second()
        self._planned.clear()

    def _sweep(self) -> None:
        super()._sweep()
        for spending in self._spent.values():
            spending.now = self._seen
            spending.callers.sweep()

    def _bucket(self, key: str, plan: Plan, coming: int = 0) -> str:
        # Who spent tokens may be known for longer than for the requests: that log is bounded as well.
        spent = [spending.callers for spending in self._spent.values()]
        if any(callers.knows(key) for callers in spent):
            return key
        if any(callers.size >= self.max_callers for callers in spent):
            return plan.overflow
        return super()._bucket(key, plan, coming)

    def _ended(self, log: bytearray) -> bool:
        return not log or _ONE.unpack_from(log, len(log) - 8)[0] <= self._seen - self._lasting


def _parts(lease: Lease) -> list[tuple[float, tuple[int, ...]]]:
    """What a lease reserved when."""
    return lease.mark or [(lease.at, lease.reserved)]

"""What a limit does while its store is away, and what it makes good afterwards.

* `"closed"`: nobody is admitted. 503 with `Retry-After`; a stream that needs more of its budget is ended.
* `"open"`: everybody is, uncounted, and without fields that would say otherwise.
* `"local"`: this process admits its share, `limit // expected_replicas` of each window and at least 1, from counters of
  its own. With at most that many processes they admit together, from the moment of the loss, at most
  `max(limit, expected_replicas)` in a window of the algorithm's own definition. What was admitted in the window before
  the loss is not known to them, so the window in which it falls may let through up to that much again. Fields describe
  the share, and `RateLimit-Policy` marks it with `sigil-degraded`.

When the store is back, it is told what happened without it: settlements that did not reach it, and what callers used
meanwhile in windows that still last (by "sliding" and "gcra" at most what they used in twice the window). Each of it
once: what may have reached the store although no answer came is not told again, and a reservation that was told and
then not used up stays charged. A store says itself that it is back
(`on_restored`); else the exchanges that reach it bring the rest along, a few at a time. What is remembered is bounded;
the newest wins.
"""

from collections import OrderedDict, deque
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

import structlog

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.policies.rate_limit.fields import Face
from sigil_policy.stores.limits import Algorithm, Decision, Key, Lease, LimitStore, Plan, StoreUnavailableError, Window
from sigil_policy.stores.memory import memory_limits
from sigil_policy.stores.memory.callers import MemoryLimits

logger = structlog.get_logger("sigil_policy")

OnStoreLoss = Literal["closed", "open", "local"]

_REMEMBERED = 10_000
_AT_A_TIME = 16
_PATIENCE = 0.1  # seconds that an exchange, when it is over, spends on the others' behalf


class _Owed:
    """What one caller used without the store: for each window the amounts of its present stretch and of the last."""

    __slots__ = ("_rows", "_windows")

    def __init__(self, windows: tuple[Window, ...]) -> None:
        self._windows = windows
        self._rows: list[tuple[int, int, int]] = [(0, 0, 0)] * len(windows)

    def add(self, amounts: tuple[int, ...], now: float) -> None:
        for index, amount in enumerate(amounts):
            if amount:
                stretch, present, last = self._row(index, now)
                self._rows[index] = (stretch, max(present + amount, 0), last)

    def due(self, algorithm: Algorithm, now: float) -> tuple[int, ...]:
        """What of it still counts."""
        rows = [self._row(index, now) for index in range(len(self._windows))]
        return tuple([present + (0 if algorithm == "fixed" else last) for _, present, last in rows])

    def _row(self, index: int, now: float) -> tuple[int, int, int]:
        window = self._windows[index]
        if window.calendar is None:
            stretch = int(now // window.seconds)
        else:
            moment = datetime.fromtimestamp(now, UTC)
            stretch = 12 * moment.year + moment.month
        known, present, last = self._rows[index]
        if stretch == known:
            return known, present, last
        return stretch, 0, present if stretch == known + 1 else 0


class Fallback:
    """Stands in for `store` while it is away; `replicas` processes are expected to do so."""

    def __init__(self, store: LimitStore, replicas: int, algorithm: Algorithm) -> None:
        self.store = store
        self.replicas = replicas
        self.algorithm = algorithm
        self._faces: dict[Face, Face] = {}
        self._plans: dict[Plan, Plan] = {}
        self._owed: OrderedDict[tuple[Key, Face], _Owed] = OrderedDict()
        self._unsettled: deque[tuple[Lease, tuple[int, ...]]] = deque(maxlen=_REMEMBERED)
        self._busy = False
        self._clock: Clock = SYSTEM_CLOCK
        self._asleep_until = 0.0
        self._armed = False
        restored = getattr(store, "on_restored", None)
        if restored is not None:
            restored(self._restored)

    @cached_property
    def local(self) -> MemoryLimits:
        """Where this process counts meanwhile."""
        return memory_limits(self.algorithm)

    def pending(self, clock: Clock) -> bool:
        """Whether something waits for the store, which may be back."""
        if self._busy or not (self._unsettled or self._owed):
            return False
        return clock.monotonic() >= self._asleep_until

    def lost(self, error: StoreUnavailableError, clock: Clock) -> None:
        """The store was asked and is away: it is left alone for a while."""
        self._clock = clock
        self._asleep_until = clock.monotonic() + error.retry_after
        # Also in a process that nobody asks anything any more: a reservation that waits here is kept alive by it.
        later = getattr(self.store, "call_later", None)
        if later is not None and not self._armed:
            self._armed = True
            later(error.retry_after, self._again)

    def share(self, face: Face) -> Face:
        """`face` with the limits of one process."""
        known = self._faces.get(face)
        if known is None:
            known = self._faces[face] = face.shared(self._share(face.plan), self.local)
        return known

    def _share(self, plan: Plan) -> Plan:
        # A level that several plans have in common stays one plan: it is told apart by identity.
        known = self._plans.get(plan)
        if known is None:
            windows = tuple(
                Window(max(w.limit // self.replicas, 1), w.seconds, w.unit, w.name, w.calendar) for w in plan.windows
            )
            known = self._plans[plan] = Plan(
                name=plan.name,
                windows=() if plan.levels else windows,
                levels=tuple(self._share(level) for level in plan.levels),
                algorithm=plan.algorithm,
                anonymous=plan.anonymous,
                overflow=plan.overflow,
            )
            self.local.prepare(known)
        return known

    def decide(self, face: Face, key: Key, cost: int, estimate: tuple[int, ...] | None, clock: Clock) -> Decision:
        """Decide by this process's share of `face`."""
        decision = self.local.admit(key, self.share(face).plan, cost, estimate, clock.time())
        if decision.admitted:
            taken = tuple([min(cost, window.limit) for window in face.plan.requests])
            self.owe(face, key, taken + (estimate or (0,) * len(face.plan.tokens)), clock.time())
        return decision

    def owe(self, face: Face, key: Key, amounts: tuple[int, ...], now: float) -> None:
        """Tell the store once it is back that `key` used `amounts`, or less if they are negative."""
        asked = (key, face.whole or face)
        owed = self._owed.get(asked)
        if owed is None:
            owed = self._owed[asked] = _Owed(asked[1].plan.windows)
        owed.add(amounts, now)
        self._owed.move_to_end(asked)
        if len(self._owed) > _REMEMBERED:
            self._owed.popitem(last=False)

    def unsettled(self, lease: Lease, used: tuple[int, ...]) -> None:
        """Settle `lease` once the store is back."""
        self._unsettled.append((lease, used))

    async def _again(self) -> None:
        self._armed = False
        if self.pending(self._clock):
            await self.reconcile(self._clock, 2 * _REMEMBERED, 60.0)

    async def _restored(self) -> None:
        self._asleep_until = 0.0
        await self.reconcile(self._clock, 2 * _REMEMBERED, 60.0)

    async def reconcile(self, clock: Clock, most: int = _AT_A_TIME, patience: float = _PATIENCE) -> None:
        """Tell the store what happened without it; what surely does not reach it now is told later."""
        if self._busy:
            return
        self._busy = True
        settled = charged = 0
        end = clock.monotonic() + patience
        try:
            while settled + charged < most and clock.monotonic() <= end:
                if self._unsettled:
                    await self._settle()
                    settled += 1
                elif self._owed:
                    charged += await self._charge(clock)
                else:
                    break
        except StoreUnavailableError as lost:
            self.lost(lost, clock)
        finally:
            self._busy = False
        if settled or charged:
            logger.info("rate_limit_reconciled", settled=settled, charged=charged)

    async def _settle(self) -> None:
        """A settlement may be made twice: it counts once."""
        lease, used = self._unsettled.popleft()
        try:
            await _answer(self.store.settle(lease, used, lease.at))
        except BaseException:
            self._unsettled.appendleft((lease, used))
            raise

    async def _charge(self, clock: Clock) -> int:
        """A charge counts as often as it is made: it is taken off the list before."""
        (key, face), owed = self._owed.popitem(last=False)
        amounts = owed.due(self.algorithm, clock.time())
        if not any(amounts):
            return 0
        try:
            await _answer(self.store.charge(key, face.plan, amounts, clock.time()))
        except StoreUnavailableError as lost:
            if lost.unsent:
                self.owe(face, key, amounts, clock.time())
            raise
        return 1


async def _answer(answer: Any) -> Any:
    return answer if isinstance(answer, tuple) else await answer

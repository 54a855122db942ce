"""What a limit does while its store is away, and what it makes good afterwards.

* `"closed"`: nobody is admitted. 503 with `Retry-After`; a stream that needs more of its budget is ended.
* `"open"`: everybody is, uncounted, and without fields that would say otherwise.
* `"local"`: this process admits its share, `limit // expected_replicas` of each window and at least 1, from counters of
  its own. With at most that many processes they admit together, from the moment of the loss, at most
  `max(limit, expected_replicas)` in a window of the algorithm's own definition. What was admitted in the window before
  the loss is not known to them, so the window in which it falls may let through up to that much again. Fields describe
  the share, and `RateLimit-Policy` marks it with `sigil-degraded`.

When the store is back, settlements that did not reach it are made, and what was admitted locally in windows that still
last is charged: by the store's own news (`on_restored`), else by the exchanges that reach it again, a few at a time.
Both are remembered for a bounded number of callers; the newest win.
"""

from collections import OrderedDict, deque
from functools import cached_property
from typing import Any, Literal

import structlog

from sigil_policy.core.clock import Clock
from sigil_policy.policies.rate_limit.fields import Face
from sigil_policy.stores.limits import Algorithm, Decision, Key, Lease, LimitStore, Plan, StoreUnavailableError, Window
from sigil_policy.stores.memory import memory_limits
from sigil_policy.stores.memory.callers import MemoryLimits

logger = structlog.get_logger("sigil_policy")

OnStoreLoss = Literal["closed", "open", "local"]

_REMEMBERED = 10_000
_AT_A_TIME = 16


class Fallback:
    """Stands in for `store` while it is away; `replicas` processes are expected to do so."""

    def __init__(self, store: LimitStore, mode: OnStoreLoss, replicas: int, algorithm: Algorithm) -> None:
        self.mode = mode
        self.store = store
        self.replicas = replicas
        self.algorithm = algorithm
        self._faces: dict[Face, Face] = {}
        self._plans: dict[Plan, Plan] = {}
        self._admitted: OrderedDict[tuple[Key, Face], Clock] = OrderedDict()
        self._unsettled: deque[tuple[Lease, tuple[int, ...]]] = deque(maxlen=_REMEMBERED)
        self._busy = False
        self._asleep_until = 0.0
        restored = getattr(store, "on_restored", None)
        if restored is not None:
            restored(self._restored)

    @cached_property
    def local(self) -> MemoryLimits:
        """Where this process counts meanwhile."""
        return memory_limits(self.algorithm)

    def pending(self, clock: Clock) -> bool:
        """Whether something waits for the store, which may be back."""
        if self._busy or not (self._unsettled or self._admitted):
            return False
        return clock.monotonic() >= self._asleep_until

    def lost(self, error: StoreUnavailableError, clock: Clock) -> None:
        """The store was asked and is away: it is left alone for a while."""
        self._asleep_until = clock.monotonic() + error.retry_after

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
        mine = self.share(face)
        decision = self.local.admit(key, mine.plan, cost, estimate, clock.time())
        if decision.admitted:
            asked = (key, face)
            self._admitted[asked] = clock
            self._admitted.move_to_end(asked)
            if len(self._admitted) > _REMEMBERED:
                self._admitted.popitem(last=False)
        return decision

    def unsettled(self, lease: Lease, used: tuple[int, ...]) -> None:
        """Settle `lease` once the store is back."""
        self._unsettled.append((lease, used))

    async def _restored(self) -> None:
        self._asleep_until = 0.0
        await self.reconcile(2 * _REMEMBERED)

    async def reconcile(self, most: int = _AT_A_TIME) -> None:
        """Tell the store what happened without it; what does not reach it now is tried again."""
        if self._busy:
            return
        self._busy = True
        settled = charged = 0
        try:
            while self._unsettled and settled < most:
                lease, used = self._unsettled.popleft()
                try:
                    await _answer(self.store.settle(lease, used, lease.at))
                except BaseException:
                    self._unsettled.appendleft((lease, used))
                    raise
                settled += 1
            while self._admitted and settled + charged < most:
                await self._charge()
                charged += 1
        except StoreUnavailableError:
            pass
        finally:
            self._busy = False
        if settled or charged:
            logger.info("rate_limit_reconciled", settled=settled, charged=charged)

    async def _charge(self) -> None:
        """Charge one caller for what it was admitted in the windows of now."""
        (key, face), clock = next(iter(self._admitted.items()))
        now = clock.time()
        plan = self.share(face).plan
        # A cost of 0 counts nothing: this reads what was used.
        read = self.local.admit(key, plan, 0, None, now)
        amounts = tuple([window.limit - left for window, left in zip(plan.windows, read.remaining, strict=True)])
        if any(amounts):
            await _answer(self.store.charge(key, face.plan, amounts, now))
        self._admitted.pop((key, face), None)


async def _answer(answer: Any) -> Any:
    return answer if isinstance(answer, tuple) else await answer

"""The stores in this process pass the checks that any author can run, and stores that are broken do not."""

from threading import Lock
from typing import Any

import anyio
import pytest

from sigil_policy.stores.limits import Decision, Lease, Plan
from sigil_policy.stores.memory import FixedWindows, memory_limits
from sigil_policy.testing import FrozenClock
from sigil_policy.testing.stores import PROMISES, Check, check_limit_store, limit_store_checks

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
@pytest.mark.parametrize("check", limit_store_checks(), ids=str)
async def test_the_memory_stores(check: Check, algorithm: Any) -> None:
    clock = FrozenClock()
    await check(lambda: memory_limits(algorithm), algorithm=algorithm, clock=clock, advance=clock.advance)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
async def test_all_checks_in_one_call_on_the_machines_clock(algorithm: Any) -> None:
    await check_limit_store(lambda: memory_limits(algorithm), algorithm=algorithm)


class Remote:
    """A store on the other side of an `await`, with a clock of its own: what it is told of the time is wrong."""

    remote = True

    def __init__(self, store: Any, clock: FrozenClock) -> None:
        self.store = store
        self.algorithms = store.algorithms
        self.prepare = store.prepare
        self.clock = clock
        self.closed = False

    async def _pause(self) -> float:
        assert not self.closed
        await anyio.lowlevel.checkpoint()
        return self.clock.time()

    async def admit(self, key: Any, plan: Any, cost: Any, estimate: Any, now: float) -> Any:
        return self.store.admit(key, plan, cost, estimate, await self._pause())

    async def settle(self, lease: Any, used: Any, now: float) -> Any:
        return self.store.settle(lease, used, await self._pause())

    async def extend(self, lease: Any, more: Any, now: float) -> Any:
        return self.store.extend(lease, more, await self._pause())

    async def charge(self, key: Any, plan: Any, amounts: Any, now: float) -> Any:
        return self.store.charge(key, plan, amounts, await self._pause())

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
async def test_a_remote_store_with_a_clock_of_its_own(algorithm: Any) -> None:
    clock, made = FrozenClock(), []

    async def make() -> Any:
        made.append(Remote(memory_limits(algorithm), clock))
        return made[-1]

    async def advance(seconds: float) -> None:
        clock.advance(seconds)

    await check_limit_store(make, algorithm=algorithm, clock=FrozenClock(0.0), advance=advance)
    assert made and all(store.closed for store in made)


async def test_a_check_that_midnight_fell_into_is_done_again() -> None:
    class Late(FrozenClock):
        """Midnight comes after the first request."""

        def time(self) -> float:
            now = super().time()
            if now % 86_400 > 86_399:
                self.advance(1)
            return now

    clock = Late(1_700_006_399.5)
    await check_limit_store(FixedWindows, algorithm="fixed", clock=clock)
    assert clock.time() > 1_700_006_400


# --- stores that are broken ------------------------------------------------------------------------------------------


class OneByOne(FixedWindows):
    """Counts window after window: what comes before the one that refuses is consumed."""

    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        for window in plan.requests:
            if not super().admit(key, Plan(name="one", windows=(window,)), cost, None, now).admitted:
                return super().admit(key, plan, cost, estimate, now)
        decision = super().admit(key, plan, 0, estimate, now)
        return super().admit(key, plan, cost, estimate, now) if decision.refused_by else decision


class RefusalsCount(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        if not decision.admitted and not plan.levels:
            self.charge(key, plan, (1,) * len(plan.requests) + (0,) * len(plan.tokens), now)
        return decision


class SettlesAgain(FixedWindows):
    def settle(self, lease: Lease, used: Any, now: float) -> Any:
        lease.settled = False
        return super().settle(lease, used, now)


class RefundsIntoTheNextWindow(FixedWindows):
    def settle(self, lease: Lease, used: Any, now: float) -> Any:
        lease.at, lease.mark = now, None
        return super().settle(lease, used, now)


class OldestFirst(FixedWindows):
    """Gives back what was reserved first, to a window that is gone."""

    def settle(self, lease: Lease, used: Any, now: float) -> Any:
        lease.mark = None
        return super().settle(lease, used, now)


class NeverRefunds(FixedWindows):
    def settle(self, lease: Lease, used: Any, now: float) -> Any:
        return super().settle(lease, tuple(map(max, used, lease.reserved)), now)


class ForgetsExcess(FixedWindows):
    def settle(self, lease: Lease, used: Any, now: float) -> Any:
        return super().settle(lease, tuple(map(min, used, lease.reserved)), now)


class ChargesWithinTheLimit(FixedWindows):
    def charge(self, key: Any, plan: Plan, amounts: Any, now: float) -> Any:
        decision = self.admit(key, plan, amounts[0], amounts[len(plan.requests) :], now)
        return decision.remaining[len(plan.requests) :]


class ExtendsInPart(FixedWindows):
    def extend(self, lease: Lease, more: Any, now: float) -> Any:
        left = super().extend(lease, (0,) * len(more), now)
        if left is None:
            return None
        held = tuple(map(min, more, left))
        return super().extend(lease, held, now) if held == more else super().extend(lease, held, now) and None


class ExtendsForFree(FixedWindows):
    # What it breaks is the sum, not the exclusion of threads.
    alone = Lock()

    def extend(self, lease: Lease, more: Any, now: float) -> Any:
        with self.alone:
            left = super().extend(lease, more, now)
            if left is not None and not lease.plan.levels:
                self._charge(lease.key, lease.plan, [0] * len(lease.plan.requests) + [-amount for amount in more], now)
            return left


class ForgetsOtherTiers(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        named = key if plan.levels else f"{plan.name} {key}"
        return super().admit(named, plan, cost, estimate, now)._replace(key=key)


class MixesNamesUp(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        folded = key if plan.levels else key.casefold().strip()
        return super().admit(folded, plan, cost, estimate, now)._replace(key=key)


class CutsNamesOff(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        return super().admit(key if plan.levels else key[:1_000], plan, cost, estimate, now)._replace(key=key)


class MixesLevelsUp(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        joined = (
            (":".join(key), *(f"{number} {':'.join(key)}" for number in range(1, len(key)))) if plan.levels else key
        )
        return super().admit(joined, plan, cost, estimate, now)._replace(key=key)


class LevelsOneByOne(FixedWindows):
    """The first level is charged before the second is asked."""

    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        if plan.levels and decision.refused_by and min(decision.refused_by) >= len(plan.levels[0].requests):
            level = plan.levels[0]
            self.charge(key[0], level, (cost,) * len(level.requests) + (0,) * len(level.tokens), now)
        return decision


class ReportsOneMore(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        return decision._replace(remaining=(decision.remaining[0] + 1, *decision.remaining[1:]))


class ResetsLate(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        return decision._replace(reset=tuple(reset + 1 for reset in decision.reset))


class WaitsTooShort(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        return decision._replace(retry_after=decision.retry_after / 2)


class RefusesLargeCosts(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        if plan.requests and cost > min(window.limit for window in plan.requests):
            raise ValueError("the cost is over the limit")
        return super().admit(key, plan, cost, estimate, now)


class AdmitsOnAnEmptyBudget(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        if estimate and not any(estimate) and not decision.admitted:
            decision = super().admit(key, plan, cost, None, now)
            return decision._replace(lease=Lease(key, plan, estimate, now)) if decision.admitted else decision
        return decision


class RollingMonths(FixedWindows):
    def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        decision = super().admit(key, plan, cost, estimate, now)
        reset = [w.seconds + now if w.calendar else r for w, r in zip(plan.windows, decision.reset, strict=True)]
        return decision._replace(reset=tuple(reset))


class Racing(FixedWindows):
    """Reads, is interrupted, and writes."""

    remote: Any = True

    async def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Any:  # type: ignore[override]  # it is remote
        decision = super().admit(key, plan, 0, None, now)
        await anyio.lowlevel.checkpoint()
        if all(left >= cost for left in decision.remaining[: len(plan.requests)]):
            self._charge(key, plan, [cost] * len(plan.requests) + [0] * len(plan.tokens), now)
            return super().admit(key, plan, 0, estimate, now)
        return super().admit(key, plan, cost, estimate, now)


BROKEN = {
    OneByOne: ("a_refused_request_consumes_nothing", "only the last window refuses"),
    RefusalsCount: ("a_refused_request_consumes_nothing", "only the first window refuses"),
    SettlesAgain: ("what_was_not_used_comes_back_once", "only the first settlement counts"),
    RefundsIntoTheNextWindow: ("a_refund_reaches_no_later_window", "what ended with its window comes back to no other"),
    OldestFirst: ("the_newest_part_of_a_lease_comes_back_first", "200 of the new part come back"),
    NeverRefunds: ("what_was_not_used_comes_back_once", "only the first settlement counts: answered .600"),
    ForgetsExcess: ("use_beyond_the_reservation_is_charged", "more than was reserved is charged"),
    ChargesWithinTheLimit: ("what_has_happened_is_counted_whatever_the_limits_say", "a charge is not refused"),
    ExtendsInPart: ("a_lease_is_extended_by_all_or_nothing", "what did not fit is not held"),
    ExtendsForFree: (
        "of_extensions_at_once_exactly_the_budget_is_reserved",
        "exactly the budget is reserved: answered 40",
    ),
    ForgetsOtherTiers: ("another_tier_goes_on_from_what_was_used", "use is kept under a larger limit"),
    MixesNamesUp: ("callers_never_share_a_counter", "' ' is counted on its own"),
    CutsNamesOff: ("callers_never_share_a_counter", "'x*' is counted on its own"),
    MixesLevelsUp: ("levels_are_admitted_together_or_not_at_all", "the second level refuses for both"),
    LevelsOneByOne: ("levels_are_admitted_together_or_not_at_all", "what fits on all levels is admitted"),
    ReportsOneMore: ("the_limit_passes_and_not_one_more", "a request is admitted and counted"),
    ResetsLate: ("resets_say_when_windows_are_renewed", "the end of Window"),
    WaitsTooShort: ("who_waits_as_told_is_admitted_and_not_before", "the wait is over: answered False"),
    RefusesLargeCosts: ("a_cost_over_the_limit_takes_the_whole_window", "takes the whole window: ValueError"),
    AdmitsOnAnEmptyBudget: (
        "an_estimate_of_nothing_is_refused_when_nothing_remains",
        "0 is refused where nothing remains",
    ),
    RollingMonths: ("calendar_months_end_with_the_month", "the month ends where the next begins"),
    Racing: ("of_requests_at_once_exactly_the_limit_passes", "exactly the limit passes: answered 200"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=[broken.__name__ for broken in BROKEN])
async def test_a_broken_store_fails_the_check_of_what_it_breaks(broken: Any) -> None:
    name, words = BROKEN[broken]
    (check,) = [check for check in limit_store_checks() if check.name == name]
    clock = FrozenClock()
    with pytest.raises(AssertionError, match=words):
        await check(broken, algorithm="fixed", clock=clock, advance=clock.advance)


# --- what to ask -----------------------------------------------------------------------------------------------------


def test_every_promise_is_asked_for() -> None:
    asked = {promise for check in limit_store_checks() for promise in check.promises}
    assert asked == PROMISES


def test_a_weaker_store_is_not_asked_for_what_it_does_not_promise() -> None:
    names = {check.name for check in limit_store_checks(weaker={"all-or-nothing", "levels"})}
    assert "a_refused_request_consumes_nothing" not in names
    assert "a_lease_of_levels_is_settled_on_all_of_them" not in names
    assert "the_limit_passes_and_not_one_more" in names


def test_a_promise_that_is_none_is_refused() -> None:
    weaker: Any = {"speed"}
    with pytest.raises(ValueError, match=r"\['speed'\]; a store may leave out \['all-or-nothing'"):
        limit_store_checks(weaker=weaker)


async def test_a_check_of_time_needs_time_to_move() -> None:
    (check, *_) = [check for check in limit_store_checks() if check.timed]
    with pytest.raises(TypeError, match="needs advance"):
        await check(FixedWindows, algorithm="fixed")


async def test_a_store_is_asked_only_for_an_algorithm_that_it_has() -> None:
    with pytest.raises(AssertionError, match="'gcra' is one of the store's"):
        await check_limit_store(FixedWindows, algorithm="gcra")

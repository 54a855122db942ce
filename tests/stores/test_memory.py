"""Each algorithm keeps its promise, against an oracle that is exact, naive and slow."""

import gc
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.stores.limits import Decision, Lease, Plan, Window
from sigil_policy.stores.memory import FixedWindows, Gcra, SlidingLog, memory_limits

START = 1_700_000_000.0

PLANS = (
    Plan(name="free", windows=(Window(2, 1), Window(5, 10), Window(9, 60), Window(100, 10, "tokens"))),
    Plan(name="pro", windows=(Window(4, 1), Window(12, 10), Window(30, 60), Window(300, 10, "tokens"))),
    Plan(name="other", windows=(Window(7, 10), Window(80, 10, "tokens"), Window(200, 60, "tokens"))),
)


# --- the oracles -----------------------------------------------------------------------------------------------------


@dataclass
class Charge:
    """Something that was used: `at` steady time; a refund lowers `amount` where it still counts."""

    at: Fraction
    amount: int


class Oracle:
    """Remembers every charge of every caller for ever, and adds them up anew for each question."""

    def __init__(self) -> None:
        self.charges: dict[Any, list[Charge]] = defaultdict(list)
        self.seen = Fraction(0)
        self.shift = Fraction(0)

    def steady(self, now: float) -> Fraction:
        wall = Fraction(now)
        if wall >= self.seen:
            self.shift = Fraction(0)
        elif wall + self.shift < self.seen:
            self.shift = self.seen - wall
        self.seen = wall + self.shift
        return self.seen

    def kinds(self, key: str, window: Window) -> Any:
        return (key, window.unit, window.seconds)

    def used(self, key: str, window: Window, now: Fraction) -> Fraction:
        raise NotImplementedError

    def admit(self, key: str, plan: Plan, cost: int, estimate: int | None, now: float) -> Any:
        at = self.steady(now)
        needs = [min(cost, w.limit) if w.unit == "requests" else estimate or 0 for w in plan.windows]
        left = [w.limit - self.used(key, w, at) for w in plan.windows]
        for window, need, rest in zip(plan.windows, needs, left, strict=True):
            gates = window.unit == "requests" or estimate is not None
            if gates and (rest < need or (window.unit == "tokens" and not estimate and rest < 1)):
                return False, tuple(max(int(rest // 1), 0) for rest in left), None
        made = []
        for window, need in zip(plan.windows, needs, strict=True):
            charge = Charge(at, self.taken(cost, need) if window.unit == "requests" else need)
            self.charges[self.kinds(key, window)].append(charge)
            if window.unit == "tokens":
                made.append(charge)
        return True, tuple(max(int(self.left(key, w, at) // 1), 0) for w in plan.windows), made

    def taken(self, cost: int, need: int) -> int:
        return need

    def left(self, key: str, window: Window, at: Fraction) -> Fraction:
        return window.limit - self.used(key, window, at)

    def settle(self, key: str, plan: Plan, made: list[Charge], reserved: int, used: int, now: float) -> None:
        at = self.steady(now)
        for window, charge in zip(plan.tokens, made, strict=True):
            if used > reserved:
                self.charges[self.kinds(key, window)].append(Charge(at, used - reserved))
            else:
                charge.amount -= reserved - used


class FixedOracle(Oracle):
    def used(self, key: str, window: Window, now: Fraction) -> Fraction:
        present = now // window.seconds
        charges = self.charges[self.kinds(key, window)]
        return Fraction(sum(c.amount for c in charges if c.at // window.seconds == present))


class SlidingOracle(Oracle):
    def taken(self, cost: int, need: int) -> int:
        return cost  # one log for all windows: what takes the small one whole counts in full for the others

    def used(self, key: str, window: Window, now: Fraction) -> Fraction:
        charges = self.charges[self.kinds(key, window)]
        return Fraction(sum(c.amount for c in charges if c.at > now - window.seconds))


class GcraOracle(Oracle):
    def used(self, key: str, window: Window, now: Fraction) -> Fraction:
        level, last = Fraction(0), Fraction(0)
        rate = Fraction(window.limit, window.seconds)
        for charge in self.charges[self.kinds(key, window)]:
            level = max(level - (charge.at - last) * rate, Fraction(0)) + charge.amount
            last = charge.at
        return max(level - (now - last) * rate, Fraction(0))


ORACLES = {"fixed": FixedOracle, "sliding": SlidingOracle, "gcra": GcraOracle}

# Multiples of 1/8 second are exact in a float, so the oracle and the store speak of the same moments.
eighths = st.integers(0, 200).map(lambda n: n / 8)
steps = st.one_of(
    st.tuples(
        st.just("admit"),
        st.sampled_from("ab"),
        st.integers(0, 2),
        st.sampled_from([1, 1, 1, 2, 0, 6]),
        st.one_of(st.none(), st.integers(0, 80)),
    ),
    st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 140)),
    st.tuples(st.just("pass"), eighths),
    st.tuples(st.just("pass"), st.sampled_from([0.125, 0.5, 1.0, 10.0, 60.0])),
    st.tuples(st.just("jump"), st.integers(-800, 800).map(lambda n: n / 8)),
)


def started(algorithm: Any) -> Any:
    """A store that has met all plans, as one has whose policy serves several tiers."""
    store = memory_limits(algorithm)
    for plan in PLANS:
        store.admit("somebody", plan, 0, None, START)
    return store


@pytest.mark.parametrize("algorithm", ["fixed", "sliding"])
@given(trace=st.lists(steps, max_size=40))
def test_it_decides_and_reports_as_the_exact_count_does(algorithm: Any, trace: list[Any]) -> None:
    store, oracle, now = started(algorithm), ORACLES[algorithm](), START
    oracle.steady(now)
    leases: list[Any] = []
    plans = PLANS if algorithm == "fixed" else PLANS[:2]
    for step in trace:
        if step[0] in ("pass", "jump"):
            now += step[1]
        elif step[0] == "settle":
            if leases:
                decision, made, plan, key, reserved = leases.pop(step[1] % len(leases))
                store.settle(decision.lease, step[2], now)
                store.settle(decision.lease, 1_000, now)  # settled already: changes nothing
                oracle.settle(key, plan, made, reserved, step[2], now)
        else:
            _, key, number, cost, estimate = step
            plan = plans[number % len(plans)]
            decision = store.admit(key, plan, cost, estimate, now)
            admitted, remaining, made = oracle.admit(key, plan, cost, estimate, now)
            assert (decision.admitted, decision.remaining) == (admitted, remaining)
            assert (decision.lease is not None) == (admitted and estimate is not None)
            if decision.lease is not None:
                leases.append((decision, made, plan, key, estimate))


@given(trace=st.lists(steps, max_size=40))
def test_gcra_decides_and_reports_as_the_exact_bucket_does(trace: list[Any]) -> None:
    store, oracle, now = started("gcra"), GcraOracle(), START
    oracle.steady(now)
    for step in trace:
        if step[0] in ("pass", "jump"):
            now += step[1]
        elif step[0] == "admit":
            _, key, _, cost, estimate = step
            plan = PLANS[0]
            decision = store.admit(key, plan, cost, estimate, now)
            admitted, remaining, _ = oracle.admit(key, plan, cost, estimate, now)
            assert (decision.admitted, decision.remaining) == (admitted, remaining)


@given(trace=st.lists(steps, max_size=60))
def test_gcra_never_gives_back_more_than_the_reservation_still_holds(trace: list[Any]) -> None:
    """The bucket is never emptier than if every request had taken from the start what it used in the end."""
    store, oracle, now = started("gcra"), GcraOracle(), START
    plan = PLANS[0]
    leases: list[Any] = []
    for step in trace:
        if step[0] == "pass":
            now += step[1] / 4
        elif step[0] == "settle" and leases:
            lease, made, reserved = leases.pop(step[1] % len(leases))
            (left,) = store.settle(lease, step[2], now)
            oracle.settle("a", plan, made, reserved, step[2], now)
            assert left <= max(oracle.left("a", plan.tokens[0], Fraction(now)), 0)
        elif step[0] == "admit":
            decision = store.admit("a", plan, 0, step[4], now)
            at = oracle.steady(now)
            if decision.admitted and step[4] is not None:
                charge = Charge(at, step[4])
                oracle.charges["a", "tokens", 10].append(charge)
                leases.append((decision.lease, [charge], step[4]))
            assert decision.remaining[3] <= max(oracle.left("a", plan.tokens[0], at), 0)


def test_gcra_gives_a_reservation_back_that_was_just_made() -> None:
    store, plan = Gcra(), PLANS[0]
    lease = store.admit("a", plan, 1, 100, START).lease
    assert lease is not None
    assert store.settle(lease, 30, START) == (70,)


def test_gcra_keeps_a_later_reservation_whole_when_an_earlier_one_comes_back() -> None:
    store = Gcra()
    plan = Plan(name="p", windows=(Window(60, 60, "tokens"),))
    early = store.admit("a", plan, 1, 30, START).lease
    middle = store.admit("a", plan, 1, 30, START).lease
    assert early is not None
    assert middle is not None
    store.settle(early, 0, START)
    # 25 seconds on, all but 5 of the middle one has drained: only those may come back.
    late = store.admit("a", plan, 1, 30, START + 25)
    assert late.admitted
    assert store.settle(middle, 0, START + 25) == (30,)


# --- the promises, in their own words ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
@given(gaps=st.lists(st.floats(0, 3), max_size=80))
def test_the_stated_bound_holds_in_every_interval(algorithm: Any, gaps: list[float]) -> None:
    limit, seconds = 5, 10
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(limit, seconds),))
    now, passed = START, []
    for gap in gaps:
        now += gap
        if store.admit("a", plan, 1, None, now).admitted:
            passed.append(now)
    for index, first in enumerate(passed):
        within = [at for at in passed[index:] if at < first + seconds - 1e-6]
        if algorithm == "sliding":
            assert len(within) <= limit
        elif algorithm == "fixed":
            assert len([at for at in passed if at // seconds == first // seconds]) <= limit
            assert len(within) <= 2 * limit
        else:
            for count, last in enumerate(passed[index:], 1):
                assert count <= limit * (1 + (last - first) / seconds) + 1e-6


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
@given(
    spent=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3), st.one_of(st.none(), st.integers(0, 60))), max_size=40)
)
def test_a_refused_request_passes_once_it_has_waited_and_not_before(algorithm: Any, spent: list[Any]) -> None:
    store, now, plan = memory_limits(algorithm), START, PLANS[0]
    for gap, cost, estimate in spent:
        now += gap
        decision = store.admit("a", plan, cost, estimate, now)
        if decision.admitted:
            continue
        wait = decision.retry_after
        assert wait > 0
        waits = [decision.reset[index] - now for index in decision.refused_by]
        assert max(waits) == pytest.approx(wait, abs=1e-5)
        if wait > 2e-3:
            assert not store.admit("a", plan, cost, estimate, now + wait - 1e-3).admitted
        now += wait + 1e-5
        assert store.admit("a", plan, cost, estimate, now).admitted


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_a_refused_request_consumes_nothing_in_any_window(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(1, 1), Window(100, 3600), Window(1_000, 60, "tokens")))
    first = store.admit("a", plan, 1, 100, START)
    for _ in range(50):
        refused = store.admit("a", plan, 1, 100, START)
        assert not refused.admitted
        assert refused.refused_by == (0,)
        assert refused.lease is None
    assert refused.remaining == first.remaining == (0, 99, 900)
    # Refused by the tokens: the requests stay whole, too.
    refused = store.admit("a", plan, 1, 950, START + 1)
    assert not refused.admitted
    assert refused.refused_by == (2,)
    assert store.admit("a", plan, 1, None, START + 1).remaining[:2] == (0, 98)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_of_many_requests_at_one_moment_exactly_the_limit_pass(algorithm: Any) -> None:
    """RL-25."""
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(37, 10), Window(200, 60)))
    assert sum(store.admit("a", plan, 1, None, START).admitted for _ in range(500)) == 37


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_a_cost_above_the_limit_takes_the_whole_window(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(2, 1), Window(20, 60)))
    decision = store.admit("a", plan, 5, None, START)
    assert decision.admitted
    assert decision.remaining == (0, 15)
    assert not store.admit("a", plan, 1, None, START).admitted


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_without_an_estimate_tokens_are_refused_only_once_nothing_remains(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(100, 60), Window(10, 60, "tokens")))
    lease = store.admit("a", plan, 1, 0, START).lease
    assert lease is not None
    assert store.settle(lease, 25, START) == (0,)  # overdrawn: never below 0
    refused = store.admit("a", plan, 1, 0, START)
    assert not refused.admitted
    assert refused.remaining[1] == 0
    # A request on a route without a token rule does not ask the tokens.
    assert store.admit("a", plan, 1, None, START).admitted


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_another_tier_goes_on_from_what_was_used(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    small = Plan(name="s", windows=(Window(5, 60), Window(100, 60, "tokens")))
    large = Plan(name="l", windows=(Window(50, 60), Window(500, 60), Window(1_000, 60, "tokens"))[::2])
    for _ in range(5):
        store.admit("a", small, 1, 10, START)
    assert not store.admit("a", small, 1, None, START).admitted
    assert store.admit("a", large, 1, 10, START).remaining == (44, 940)
    assert not store.admit("a", small, 1, None, START).admitted


@pytest.mark.parametrize("algorithm", ["fixed", "gcra"])
def test_a_tier_without_a_window_does_not_forget_it(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    both = Plan(name="b", windows=(Window(50, 60), Window(10, 3600)))
    one = Plan(name="o", windows=(Window(50, 60),))
    store.admit("a", one, 1, None, START)
    for _ in range(10):
        assert store.admit("a", both, 1, None, START).admitted
    assert store.admit("a", one, 1, None, START).admitted
    refused = store.admit("a", both, 1, None, START)
    assert refused.refused_by == (1,)


# --- reservations ----------------------------------------------------------------------------------------------------

TOKENS = Plan(name="t", windows=(Window(1_000, 60, "tokens"),))
ALIGNED = START - START % 60


def test_a_refund_never_reaches_the_next_window() -> None:
    """A reservation of a window that has ended went with it: the next one never holds more than its limit."""
    store = FixedWindows()
    lease = store.admit("a", TOKENS, 1, 900, ALIGNED + 59).lease
    assert lease is not None
    second = store.admit("a", TOKENS, 1, 700, ALIGNED + 60)
    assert second.remaining == (300,)
    assert store.settle(lease, 100, ALIGNED + 61) == (300,)


def test_an_excess_is_charged_to_the_present_window() -> None:
    store = FixedWindows()
    lease = store.admit("a", TOKENS, 1, 100, ALIGNED + 59).lease
    assert lease is not None
    assert store.settle(lease, 350, ALIGNED + 61) == (750,)


def test_a_refund_in_the_log_reaches_the_moment_of_the_reservation() -> None:
    store = SlidingLog()
    lease = store.admit("a", TOKENS, 1, 900, START).lease
    assert lease is not None
    assert store.settle(lease, 100, START + 30) == (900,)
    assert store.admit("a", TOKENS, 1, 0, START + 60).remaining == (1_000,)
    late = store.admit("a", TOKENS, 1, 900, START + 100).lease
    assert late is not None
    assert store.settle(late, 0, START + 161) == (1_000,)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_settling_twice_is_settling_once(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    lease = store.admit("a", TOKENS, 1, 400, START).lease
    assert lease is not None
    assert [store.settle(lease, used, START) for used in (300, 0, 900)] == [(700,)] * 3


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_use_without_a_reservation_is_charged(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    assert store.settle(Lease("a", TOKENS, 0, START), 250, START) == (750,)
    assert store.admit("a", TOKENS, 1, None, START).remaining == (750,)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_an_absurd_report_overflows_nothing(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    for _ in range(3):
        assert store.settle(Lease("a", TOKENS, 0, START), 10**30, START) == (0,)
    assert not store.admit("a", TOKENS, 1, 1, START).admitted


# --- the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
@pytest.mark.parametrize("back", [0.001, 0.7, 5.0, 60.0, 3_600.0, 86_400.0 * 365])
def test_a_clock_set_back_gives_no_fresh_quota_and_locks_nobody_out(algorithm: Any, back: float) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(3, 10),))
    now = START + 7
    for _ in range(3):
        assert store.admit("a", plan, 1, None, now).admitted
    now -= back
    refused = store.admit("a", plan, 1, None, now)
    assert not refused.admitted
    assert 0 < refused.retry_after <= 10
    assert refused.reset[0] == pytest.approx(now + refused.retry_after)
    # Time goes on at its own speed: whoever waits as told, passes; where the wall clock is caught up with on the way,
    # after what it was set back in addition.
    for step in range(1, 11):
        store.admit("other", plan, 1, None, now + refused.retry_after * step / 10)
    prolonged = back if back < 1 else 0
    assert store.admit("a", plan, 1, None, now + refused.retry_after + prolonged + 1e-3).admitted


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_a_clock_that_swings_hands_out_one_quota(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(3, 10),))
    edge = START - START % 10 + 10
    passed = sum(store.admit("a", plan, 1, None, edge + swing).admitted for _ in range(50) for swing in (0.02, -0.02))
    assert passed == 3


def test_the_wall_clock_is_followed_again_once_it_has_caught_up() -> None:
    store = SlidingLog()
    plan = Plan(name="p", windows=(Window(3, 10),))
    store.admit("a", plan, 1, None, ALIGNED)
    store.admit("a", plan, 1, None, ALIGNED - 33.5)
    decision = store.admit("a", plan, 3, None, ALIGNED + 100)
    assert decision.admitted
    assert decision.reset == (ALIGNED + 110,)


def test_fixed_windows_end_at_round_moments() -> None:
    store = FixedWindows()
    plan = Plan(name="p", windows=(Window(5, 1), Window(5, 60), Window(5, 3600)))
    decision = store.admit("a", plan, 1, None, ALIGNED + 12.5)
    assert decision.reset == (ALIGNED + 13, ALIGNED + 60, START - START % 3600 + 3600)


# --- many callers --------------------------------------------------------------------------------------------------

ONE = Plan(name="free", windows=(Window(3, 60), Window(500, 60, "tokens")))
NOBODY = Plan(name="free", windows=ONE.windows, anonymous=True)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
class TestManyCallers:
    def test_a_flood_of_names_evicts_no_counter(self, algorithm: Any) -> None:
        store = memory_limits(algorithm, max_callers=1_000)
        for _ in range(3):
            store.admit("ip4-192.0.2.1", NOBODY, 1, None, START)
        for number in range(5_000):
            store.admit(f"ip4-{number}", NOBODY, 1, None, START)
        assert not store.admit("ip4-192.0.2.1", NOBODY, 1, None, START).admitted
        assert len(store) <= 502

    def test_when_full_new_anonymous_callers_share_one_bucket(self, algorithm: Any) -> None:
        store = memory_limits(algorithm, max_callers=100)
        passed = sum(store.admit(f"ip4-{number}", NOBODY, 1, None, START).admitted for number in range(300))
        assert passed == 50 + 3
        assert store.admit("new", NOBODY, 1, None, START).key == "overflow anonymous"

    def test_a_flood_of_addresses_leaves_room_for_the_authenticated(self, algorithm: Any) -> None:
        store = memory_limits(algorithm, max_callers=100)
        for number in range(300):
            store.admit(f"ip4-{number}", NOBODY, 1, None, START)
        names = [f"bearer:0::{number}" for number in range(40)]
        assert [store.admit(name, ONE, 1, None, START).key for name in names] == names

    def test_when_full_new_authenticated_callers_share_a_bucket_per_tier(self, algorithm: Any) -> None:
        store = memory_limits(algorithm, max_callers=10)
        other = Plan(name="pro", windows=(Window(5, 60),))
        for number in range(20):
            store.admit(f"bearer:0::{number}", ONE, 1, None, START)
        assert store.admit("bearer:0::new", ONE, 1, None, START).key == "overflow free"
        assert store.admit("bearer:0::new", other, 1, None, START).key == "overflow pro"

    def test_a_reservation_in_a_shared_bucket_is_settled_there(self, algorithm: Any) -> None:
        store = memory_limits(algorithm, max_callers=2)
        for number in range(2):
            store.admit(f"bearer:0::{number}", ONE, 1, None, START)
        lease = store.admit("bearer:0::new", ONE, 1, 400, START).lease
        assert lease is not None
        assert store.settle(lease, 100, START) == (400,)
        assert store.admit("bearer:0::newer", ONE, 1, None, START).remaining[1] == 400

    def test_callers_are_forgotten_once_their_windows_have_ended(self, algorithm: Any) -> None:
        store = memory_limits(algorithm)
        for number in range(20_000):
            store.admit(f"ip4-{number}", NOBODY, 1, 5, START)
        assert len(store) == 20_000
        for _ in range(500):
            store.admit("one", ONE, 0, None, START + 121)
        assert len(store) < 200

    def test_room_comes_back_when_windows_have_ended(self, algorithm: Any) -> None:
        store = memory_limits(algorithm, max_callers=1_000)
        for number in range(2_000):
            store.admit(f"bearer:0::{number}", ONE, 1, None, START)
        for number in range(500):
            store.admit(f"bearer:0::{number}", ONE, 1, None, START + 121)
        # Room is looked for every so many hits: which of them finds it depends on where the callers hash to.
        buckets = [store.admit("bearer:0::new", ONE, 1, None, START + 121).key for _ in range(500)]
        assert buckets[-1] == "bearer:0::new"

    def test_the_garbage_collector_does_not_visit_callers(self, algorithm: Any) -> None:
        store = memory_limits(algorithm)
        gc.collect()
        before = len(gc.get_objects())
        for number in range(3_000):
            store.admit(f"ip4-{number}", NOBODY, 1, None, START)
        gc.collect()
        assert len(gc.get_objects()) - before < 100


# --- construction --------------------------------------------------------------------------------------------------


def test_requests_stand_before_tokens_in_a_plan() -> None:
    plan = Plan(name="p", windows=(Window(5, 60, "tokens"), Window(1, 1)))
    assert [window.unit for window in plan.windows] == ["requests", "tokens"]


@pytest.mark.parametrize(
    "windows",
    [(), (Window(1, 1), Window(2, 1)), (Window(0, 1),), (Window(1, 0),)],
    ids=["none", "two of one length", "limit 0", "length 0"],
)
def test_a_plan_that_cannot_be_is_refused(windows: Any) -> None:
    with pytest.raises(ValueError, match="plan 'p'"):
        Plan(name="p", windows=windows)


def test_a_store_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="max_callers"):
        memory_limits(max_callers=1)


def test_a_decision_says_all_that_headers_need() -> None:
    decision = FixedWindows().admit("a", ONE, 1, 100, ALIGNED + 1)
    assert decision[:4] == Decision(True, (2, 400), (ALIGNED + 60, ALIGNED + 60), "a")[:4]
    assert decision.lease is not None
    assert decision.lease.reserved == 100

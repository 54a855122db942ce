"""Each algorithm keeps its promise, against an oracle that is exact, naive and slow."""

import dis
import gc
import re
import sys
from calendar import monthrange
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction
from operator import le
from threading import Barrier
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.stores.limits import MONTH, Lease, Plan, Window
from sigil_policy.stores.memory import FixedWindows, Gcra, SlidingLog, memory_limits
from sigil_policy.stores.memory.callers import exclusive
from tests.stores.oracle import Charge, Oracle, by_window

START = 1_700_000_000.0

FREE = Plan(
    name="free",
    windows=(Window(2, 1), Window(5, 10), Window(9, 60), Window(100, 10, "tokens"), Window(60, 10, "input-tokens")),
)
PRO = Plan(
    name="pro",
    windows=(Window(4, 1), Window(12, 10), Window(30, 60), Window(300, 10, "tokens"), Window(90, 10, "input-tokens")),
)
OTHER = Plan(
    name="other",
    windows=(
        Window(7, 10),
        Window(80, 10, "tokens"),
        Window(200, 60, "tokens"),
        Window(9, MONTH, "output-tokens", calendar="month"),
    ),
)
ORG = Plan(name="org", windows=(Window(3, 1), Window(15, 60), Window(150, 10, "tokens"), Window(400, 60, "tokens")))
TEAM = Plan(name="team", levels=(FREE, ORG))
CALLERS = ((("a", "org"), TEAM), (("b", "org"), TEAM), ("a", FREE), ("b", FREE), ("org", ORG))
# Another tier of the same callers; and one whose windows the others do not have.
TIERS = (("a", PRO), (("a", "org"), Plan(name="large team", levels=(PRO, ORG))))
WIDER = (("a", OTHER), ("org", OTHER))

# Multiples of 1/8 second are exact in a float, so the oracle and the store speak of the same moments.
eighths = st.integers(0, 200).map(lambda n: n / 8)
amounts = st.lists(st.integers(0, 60), min_size=6, max_size=6)
steps = st.one_of(
    st.tuples(st.just("admit"), st.integers(0, 9), st.sampled_from([1, 1, 1, 2, 0, 6]), st.one_of(st.none(), amounts)),
    st.tuples(st.just("extend"), st.integers(0, 5), amounts),
    st.tuples(st.just("settle"), st.integers(0, 5), st.lists(st.integers(0, 140), min_size=6, max_size=6)),
    st.tuples(
        st.just("charge"), st.integers(0, 9), st.lists(st.sampled_from([0, 1, 3, 11]), min_size=5, max_size=5), amounts
    ),
    st.tuples(st.just("pass"), eighths),
    st.tuples(st.just("pass"), st.sampled_from([0.125, 0.5, 1.0, 10.0, 60.0])),
    st.tuples(st.just("jump"), st.integers(-800, 800).map(lambda n: n / 8)),
)
traces = st.lists(steps, max_size=40)


def started(algorithm: Any, callers: Any) -> Any:
    """A store that has met all plans, as one has whose policy serves several tiers."""
    store = memory_limits(algorithm)
    for _, plan in callers:
        store.prepare(plan)
    store.admit("somebody", FREE, 0, None, START)
    return store


def renewed_as_said(oracle: Oracle, key: Any, plan: Plan, cost: int, estimate: Any, now: float, decision: Any) -> None:
    """Each window is renewed at its `reset`, not later, and for a refusal not earlier either."""
    margin, moment = Fraction(1, 100_000), Fraction(1, 1_000)
    rows = zip(by_window(key, plan), oracle.needs(plan, cost, estimate), decision.reset, strict=True)
    for index, ((name, window), need, reset) in enumerate(rows):
        at = Fraction(reset) + oracle.shift
        if index in decision.refused_by:
            assert not oracle.refuses(name, window, need, at + margin)
            assert at - moment <= oracle.seen or oracle.refuses(name, window, need, at - moment)
        elif decision.remaining[index] < 1:
            assert oracle.left(name, window, at + margin) >= 1
            assert at - moment <= oracle.seen or oracle.left(name, window, at - moment) < 1
        else:
            assert oracle.used(name, window, at + margin) == 0
    if not decision.admitted:
        waits = [decision.reset[index] - now for index in decision.refused_by]
        assert waits == sorted(waits, reverse=True)
        assert decision.retry_after == pytest.approx(waits[0], abs=1e-5)
        assert decision.retry_after > 0


def replay(algorithm: Any, trace: list[Any], callers: Any, *, refunds: bool = True) -> None:
    """Ask the store and the oracle the same, and compare all that they say."""
    store, oracle, now = started(algorithm, callers), Oracle(algorithm, one_log=algorithm == "sliding"), START
    oracle.moment(now)
    open_leases: list[Any] = []
    for step in trace:
        if step[0] in ("pass", "jump"):
            now += step[1]
            continue
        if step[0] in ("extend", "settle"):
            if not open_leases:
                continue
            index = step[1] % len(open_leases)
            lease, hold = open_leases[index]
            given = tuple(step[2][: len(hold.rows)])
            if step[0] == "extend":
                assert store.extend(lease, given, now) == oracle.extend(hold, given, now)
                assert lease.reserved == hold.reserved
                continue
            del open_leases[index]
            if not refunds:
                given = tuple(map(max, given, hold.reserved))
            left = store.settle(lease, given, now)
            assert left == oracle.settle(hold, given, now)
            # Settled already: nothing changes.
            assert store.settle(lease, (1_000,) * len(given), now) == left
            assert store.extend(lease, (0,) * len(given), now) is None
            continue
        key, plan = callers[step[1] % len(callers)]
        given = None if step[3] is None else tuple(step[3][: len(plan.tokens)])
        if step[0] == "charge":
            charged = tuple(step[2][: len(plan.requests)]) + given
            assert store.charge(key, plan, charged, now) == oracle.charge(key, plan, charged, now)
            continue
        if given is not None:
            given = tuple(map(min, given, (window.limit for window in plan.tokens)))
        decision = store.admit(key, plan, step[2], given, now)
        answer = oracle.admit(key, plan, step[2], given, now)
        assert (decision.admitted, decision.remaining) == (answer.admitted, answer.remaining)
        assert set(decision.refused_by) == answer.refused_by
        assert (decision.key, decision.at) == (key, now)
        assert (decision.lease is None) == (answer.hold is None)
        renewed_as_said(oracle, key, plan, step[2], given, now, decision)
        if decision.lease is not None:
            open_leases.append((decision.lease, answer.hold))


@given(trace=traces)
def test_fixed_windows_answer_as_the_exact_count_does(trace: list[Any]) -> None:
    replay("fixed", trace, CALLERS + TIERS + WIDER)


@given(trace=traces)
def test_the_sliding_log_answers_as_the_exact_count_does(trace: list[Any]) -> None:
    replay("sliding", trace, CALLERS + TIERS)


@given(trace=traces)
def test_gcra_answers_as_the_exact_bucket_does(trace: list[Any]) -> None:
    replay("gcra", trace, CALLERS, refunds=False)


@given(trace=traces)
def test_gcra_never_gives_back_more_than_the_reservation_still_holds(trace: list[Any]) -> None:
    """No bucket is emptier than if every request had taken from the start what it used in the end, and none is fuller
    than if nothing came back."""
    store, now = started("gcra", CALLERS), START
    exact, grudging = Oracle("gcra"), Oracle("gcra")
    plan = FREE
    open_leases: list[Any] = []

    def between(left: tuple[int, ...], at: Fraction) -> None:
        rows = by_window("a", plan)[len(plan.requests) :]
        assert all(map(le, grudging.remaining(rows, at), left))
        assert all(map(le, left, exact.remaining(rows, at)))

    for step in trace:
        if step[0] == "pass":
            now += step[1] / 4
            continue
        given = tuple(step[-1][: len(plan.tokens)]) if isinstance(step[-1], list) else None
        at = exact.moment(now)
        if step[0] == "admit":
            decision = store.admit("a", plan, 0, given, now)
            if decision.admitted and given is not None:
                # The store decides: what it admits, it was not the exact bucket that refused it.
                answers = [oracle.admit("a", plan, 0, given, now) for oracle in (exact, grudging)]
                assert answers[0].admitted
                parts = [[Charge(at, amount)] for amount in given]
                if not answers[1].admitted:
                    for (name, window), part in zip(by_window("a", plan)[len(plan.requests) :], parts, strict=True):
                        grudging.charges[name, window.measure] += part
                open_leases.append((decision.lease, answers[0].hold))
            between(decision.remaining[len(plan.requests) :], at)
        elif step[0] in ("extend", "settle") and open_leases:
            assert given is not None
            lease, hold = open_leases[step[1] % len(open_leases)]
            if step[0] == "extend":
                left = store.extend(lease, given, now)
                if left is None:
                    continue
                assert exact.extend(hold, given, now) is not None
                for (name, window), amount in zip(hold.rows, given, strict=True):
                    grudging.charges[name, window.measure].append(Charge(at, amount))
            else:
                open_leases.remove((lease, hold))
                over = [max(u - r, 0) for u, r in zip(given, lease.reserved, strict=True)]
                left = store.settle(lease, given, now)
                exact.settle(hold, given, now)
                grudging.charge("a", plan, (0,) * len(plan.requests) + tuple(over), now)
            between(left, at)


def test_gcra_gives_a_reservation_back_that_was_just_made() -> None:
    store, plan = Gcra(), TOKENS
    lease = store.admit("a", plan, 1, (100,), START).lease
    assert lease is not None
    assert store.settle(lease, (30,), START) == (970,)


def test_gcra_keeps_a_later_reservation_whole_when_an_earlier_one_comes_back() -> None:
    store = Gcra()
    plan = Plan(name="p", windows=(Window(60, 60, "tokens"),))
    early = store.admit("a", plan, 1, (30,), START).lease
    middle = store.admit("a", plan, 1, (30,), START).lease
    assert early is not None
    assert middle is not None
    store.settle(early, (0,), START)
    # 25 seconds on, all but 5 of the middle one has drained: only those may come back.
    late = store.admit("a", plan, 1, (30,), START + 25)
    assert late.admitted
    assert store.settle(middle, (0,), START + 25) == (30,)


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
def test_a_refused_request_consumes_nothing_in_any_window(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(1, 1), Window(100, 3600), Window(1_000, 60, "tokens")))
    first = store.admit("a", plan, 1, (100,), START)
    for _ in range(50):
        refused = store.admit("a", plan, 1, (100,), START)
        assert not refused.admitted
        assert refused.refused_by == (0,)
        assert refused.lease is None
    assert refused.remaining == first.remaining == (0, 99, 900)
    # Refused by the tokens: the requests stay whole, too.
    refused = store.admit("a", plan, 1, (950,), START + 1)
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
    lease = store.admit("a", plan, 1, (0,), START).lease
    assert lease is not None
    assert store.settle(lease, (25,), START) == (0,)  # overdrawn: never below 0
    refused = store.admit("a", plan, 1, (0,), START)
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
        store.admit("a", small, 1, (10,), START)
    assert not store.admit("a", small, 1, None, START).admitted
    assert store.admit("a", large, 1, (10,), START).remaining == (44, 940)
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
    lease = store.admit("a", TOKENS, 1, (900,), ALIGNED + 59).lease
    assert lease is not None
    second = store.admit("a", TOKENS, 1, (700,), ALIGNED + 60)
    assert second.remaining == (300,)
    assert store.settle(lease, (100,), ALIGNED + 61) == (300,)


def test_an_excess_is_charged_to_the_present_window() -> None:
    store = FixedWindows()
    lease = store.admit("a", TOKENS, 1, (100,), ALIGNED + 59).lease
    assert lease is not None
    assert store.settle(lease, (350,), ALIGNED + 61) == (750,)


def test_a_refund_in_the_log_reaches_the_moment_of_the_reservation() -> None:
    store = SlidingLog()
    lease = store.admit("a", TOKENS, 1, (900,), START).lease
    assert lease is not None
    assert store.settle(lease, (100,), START + 30) == (900,)
    assert store.admit("a", TOKENS, 1, (0,), START + 60).remaining == (1_000,)
    late = store.admit("a", TOKENS, 1, (900,), START + 100).lease
    assert late is not None
    assert store.settle(late, (0,), START + 161) == (1_000,)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_settling_twice_is_settling_once(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    lease = store.admit("a", TOKENS, 1, (400,), START).lease
    assert lease is not None
    assert [store.settle(lease, (used,), START) for used in (300, 0, 900)] == [(700,)] * 3


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_use_without_a_reservation_is_charged(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    assert store.settle(Lease("a", TOKENS, (0,), START), (250,), START) == (750,)
    assert store.admit("a", TOKENS, 1, None, START).remaining == (750,)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_an_absurd_report_overflows_nothing(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    for _ in range(3):
        assert store.settle(Lease("a", TOKENS, (0,), START), (10**30,), START) == (0,)
    assert not store.admit("a", TOKENS, 1, (1,), START).admitted


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_amounts_that_do_not_follow_the_plan_are_refused(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    lease = store.admit("a", TOKENS, 1, (400,), START).lease
    assert lease is not None
    with pytest.raises(ValueError, match=r"plan 't' has 1 token windows: \(1, 2\) must have so many numbers"):
        store.extend(lease, (1, 2), START)
    with pytest.raises(ValueError, match=r"plan 't' has 1 windows: \(\) must have so many numbers"):
        store.charge("a", TOKENS, (), START)
    for used in ((), (1, 2)):
        with pytest.raises(ValueError, match="has 1 token windows"):
            store.settle(lease, used, START)
    # The lease is as it was, and the store is not held up.
    assert store.settle(lease, (300,), START) == (700,)


def test_a_long_stream_leaves_no_more_than_its_window_in_a_lease() -> None:
    for store in (SlidingLog(), Gcra()):
        lease = store.admit("a", TOKENS, 1, (10,), START).lease
        assert lease is not None
        for second in range(1, 2_000):
            assert store.extend(lease, (10,), START + second) is not None
        assert lease.reserved == (20_000,)
        assert len(lease.mark) <= 61
        # All but the last minute is gone with its window.
        assert store.settle(lease, (0,), START + 2_000) == (1_000,)


def test_gcra_gives_an_extended_lease_back_whole() -> None:
    store = Gcra()
    lease = store.admit("a", TOKENS, 1, (300,), START).lease
    assert lease is not None
    store.extend(lease, (300,), START)
    store.extend(lease, (400,), START)
    assert store.settle(lease, (100,), START) == (900,)


def test_gcra_refuses_a_cost_over_the_limit_while_a_trace_of_use_is_left() -> None:
    store = Gcra()
    plan = Plan(name="p", windows=(Window(3, 7), Window(40, 70)))
    store.admit("a", plan, 3, None, START)
    for part in range(69_990, 70_001):
        decision = store.admit("a", plan, 6, None, START + part / 10_000)
        assert decision.refused_by == (() if decision.admitted else (0,))
        if decision.admitted:
            break
    assert decision.admitted


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_what_was_charged_beyond_the_limit_costs_no_memory(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="p", windows=(Window(100, 60), Window(500, 3_600)))
    for _ in range(1_000):
        store.charge("a", plan, (1_000_000, 1_000_000), START)
    states = store._callers.shards[hash("a") & store._callers.mask]
    assert len(states["a"] if algorithm == "sliding" else states[1]) <= 4_000
    assert not store.admit("a", plan, 1, None, START).admitted


def test_tokens_are_not_forgotten_with_the_requests_of_a_caller() -> None:
    store = SlidingLog(max_callers=2)
    plan = Plan(name="p", windows=(Window(5, 1), Window(1_000, 3_600, "tokens")))
    store.admit("a", plan, 1, (600,), START)
    for second in range(1, 8):
        store.admit("b", plan, 1, None, START + 3_599 + second / 8)
        store.admit("c", plan, 1, None, START + 3_599 + second / 8)
    decision = store.admit("a", plan, 0, None, START + 3_599.9)
    assert (decision.key, decision.remaining) == ("a", (5, 400))


# --- months ----------------------------------------------------------------------------------------------------------

MONTHLY = Plan(name="m", windows=(Window(5, MONTH, calendar="month"), Window(900, MONTH, "tokens", calendar="month")))


@given(st.datetimes(datetime(1970, 1, 1), datetime(2400, 12, 31)))  # noqa: DTZ001  it is UTC
def test_a_month_begins_with_its_first_second_and_ends_with_its_last(moment: datetime) -> None:
    now = moment.replace(tzinfo=UTC).timestamp()
    days = monthrange(moment.year, moment.month)[1]
    first = datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp()
    end = first + days * 86_400
    store = FixedWindows()
    assert store.admit("a", MONTHLY, 2, (100,), first).reset == (end, end)
    assert store.admit("a", MONTHLY, 1, (100,), min(now, end - 1)).remaining == (2, 700)
    last = store.admit("a", MONTHLY, 1, (100,), end - 1)
    assert (last.remaining, last.reset) == ((1, 600), (end, end))
    refused = store.admit("a", MONTHLY, 2, None, end - 0.5)
    assert (refused.refused_by, refused.retry_after, refused.reset[0]) == ((0,), 0.5, end)
    assert store.admit("a", MONTHLY, 1, None, end).remaining == (4, 900)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2023-12-31T23:59:59", "2024-01-01T00:00:00", False),
        ("2024-02-28T12:00:00", "2024-02-29T23:59:59", True),
        ("2024-02-29T23:59:59", "2024-03-01T00:00:00", False),
        ("2023-02-28T23:59:59", "2023-03-01T00:00:00", False),
        ("2100-02-28T23:59:59", "2100-03-01T00:00:00", False),
        ("2000-02-29T00:00:00", "2000-02-29T23:59:59", True),
        ("2024-01-01T00:00:00", "2024-01-31T23:59:59", True),
        ("2024-01-31T00:00:00", "2025-01-31T00:00:00", False),
    ],
)
def test_months_of_every_length_are_told_apart(first: str, second: str, same: bool) -> None:
    store = FixedWindows()
    lease = store.admit("a", MONTHLY, 3, (500,), datetime.fromisoformat(first + "+00:00").timestamp()).lease
    now = datetime.fromisoformat(second + "+00:00").timestamp()
    assert store.admit("a", MONTHLY, 0, None, now).remaining == ((2, 400) if same else (5, 900))
    assert lease is not None
    store.charge("a", MONTHLY, (0, 300), now)
    # A refund reaches the month of the reservation, and no other.
    assert store.settle(lease, (0,), now) == (600,)


def test_a_caller_is_known_until_the_month_is_over() -> None:
    store = FixedWindows()
    both = Plan(name="b", windows=(Window(5, 1), *MONTHLY.windows))
    first = datetime(2024, 2, 1, tzinfo=UTC).timestamp()
    store.admit("a", both, 3, None, first)
    for day in range(29):
        for number in range(50):
            store.admit(f"b{number}", both, 1, None, first + day * 86_400 + number / 100)
    assert store.admit("a", both, 0, None, first + 29 * 86_400 - 1).remaining == (5, 2, 900)
    for second in range(500):
        store.admit("c", both, 0, None, first + 29 * 86_400 + second)
    assert len(store) == 1


# --- levels ----------------------------------------------------------------------------------------------------------

USER = Plan(name="free", windows=(Window(3, 60), Window(500, 60, "tokens")))
FIRM = Plan(name="free", windows=(Window(4, 60), Window(700, 60, "tokens"), Window(90, 60, "output-tokens")))
BOTH = Plan(name="both", levels=(USER, FIRM))


def state_of(store: Any, key: str) -> Any:
    """All bytes that a store keeps of a caller."""
    shards = [store._callers.shards, *(s.callers.shards for s in getattr(store, "_spent", {}).values())]
    states = [shard[hash(key) & store._callers.mask] for shard in shards]
    if isinstance(store, SlidingLog):
        return [bytes(state[key]) for state in states if key in state]
    ((known, records, _),) = states
    return bytes(records[known[key] : known[key] + store._callers.width]) if key in known else None


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
@pytest.mark.parametrize("estimate", [None, (10, 10, 10), (0, 0, 91), (0, 701, 0)], ids=str)
def test_a_refusal_of_the_second_level_leaves_the_first_as_it_was(algorithm: Any, estimate: Any) -> None:
    store = memory_limits(algorithm)
    store.admit(("ann", "firm"), BOTH, 1, (100, 100, 10), START)
    store.charge("firm", FIRM, (3, 0, 0), START + 1)
    before = {key: state_of(store, key) for key in ("ann", "ben", "firm")}
    for key in ("ann", "ben"):
        refused = store.admit((key, "firm"), BOTH, 1, estimate, START + 1)
        assert not refused.admitted
        assert refused.refused_by[-1] >= 1
        assert {key: state_of(store, key) for key in ("ann", "ben", "firm")} == before
    assert len(store) == 2


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_a_level_counts_with_its_own_plan_alone(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    store.admit(("ann", "firm"), BOTH, 1, (100, 200, 10), START)
    assert store.admit("firm", FIRM, 1, (50, 20), START).remaining == (2, 450, 60)
    assert store.admit(("ben", "firm"), BOTH, 1, None, START).remaining == (2, 1, 500, 450, 60)


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
@pytest.mark.parametrize(
    ("key", "plan", "why"),
    [
        (("a", "a"), BOTH, "two levels have the same key"),
        (("a",), BOTH, "has 2 levels: its key must be a tuple of 2 names"),
        ("ab", BOTH, "has 2 levels: its key must be a tuple of 2 names"),
    ],
    ids=["equal", "too few", "one name"],
)
def test_a_key_that_does_not_name_every_level_apart_is_refused(algorithm: Any, key: Any, plan: Plan, why: str) -> None:
    store = memory_limits(algorithm)
    with pytest.raises(ValueError, match=why):
        store.admit(key, plan, 1, None, START)
    with pytest.raises(ValueError, match=why):
        store.charge(key, plan, (1,) * len(plan.windows), START)
    assert len(store) == 0


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_use_without_a_reservation_is_charged_on_all_levels(algorithm: Any) -> None:
    store = memory_limits(algorithm)
    lease = Lease(("ann", "firm"), BOTH, (0, 0, 0), START)
    assert store.settle(lease, (100, 200, 30), START) == (400, 500, 60)
    assert store.settle(lease, (1, 2, 3), START) == (400, 500, 60)


@pytest.mark.parametrize(("key", "plan"), [("a", TOKENS), (("a", "b"), Plan(name="two", levels=(TOKENS, TOKENS)))])
def test_what_came_back_brings_no_reset_forward(key: Any, plan: Plan) -> None:
    store = SlidingLog()
    everything = (1_000,) * len(plan.tokens)
    lease = store.admit(key, plan, 1, everything, START).lease
    assert lease is not None
    store.settle(lease, (0,) * len(plan.tokens), START + 1)
    decision = store.admit(key, plan, 1, everything, START + 10)
    assert (decision.remaining, set(decision.reset)) == ((0,) * len(plan.tokens), {START + 70})


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_when_full_each_level_shares_a_bucket_of_its_own(algorithm: Any) -> None:
    store = memory_limits(algorithm, max_callers=3)
    first = store.admit(("ann", "firm"), BOTH, 1, None, START)
    assert first.key == ("ann", "firm")
    # One place is left, and two are new.
    second = store.admit(("ben", "corp"), BOTH, 1, (10, 20, 30), START)
    assert second.key == ("ben", "overflow free, level 1")
    third = store.admit(("cat", "club"), BOTH, 1, (10, 20, 30), START)
    assert third.key == ("overflow free", "overflow free, level 1")
    assert third.remaining == (2, 2, 490, 660, 30)
    assert third.lease is not None
    assert store.settle(third.lease, (0, 0, 0), START) == (500, 680, 60)
    # Who is known keeps its own on the level where it is.
    assert store.admit(("ann", "inc"), BOTH, 1, None, START).key == ("ann", "overflow free, level 1")
    assert len(store) == 5


# --- threads ---------------------------------------------------------------------------------------------------------


def unguarded(kind: Any) -> Any:
    """A store that never notices that somebody is inside."""
    return type("Unguarded", (kind,), {"_busy": property(lambda self: False, lambda self, value: None)})


def hammered(store: Any, used: int = 60) -> tuple[int, tuple[int, ...]]:
    """How many of four threads' requests are admitted, and what remains once all leases of 80 are settled."""
    plan = Plan(name="p", windows=(Window(600, 86_400), Window(5_000, 3_600), Window(100_000, 86_400, "tokens")))
    team = Plan(name="t", levels=(Plan(name="u", windows=(Window(5_000, 86_400),)), plan))
    start = Barrier(4)

    def work(number: int) -> int:
        start.wait()
        admitted = 0
        for turn in range(200):
            key, asked = (("a", plan), ((f"user {number}", "a"), team))[turn % 2]
            decision = store.admit(key, asked, 1, (50,), START)
            admitted += decision.admitted
            if decision.lease is not None:
                store.extend(decision.lease, (30,), START)
                store.settle(decision.lease, (used,), START)
        return admitted

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            admitted = sum(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
    return admitted, store.admit("a", plan, 0, None, START).remaining


HAMMERED = (600, (0, 4_400, 100_000 - 600 * 60))


@pytest.mark.parametrize("kind", [FixedWindows, SlidingLog])
def test_threads_that_share_a_store_lose_and_double_nothing(kind: Any) -> None:
    assert hammered(kind()) == HAMMERED


def test_threads_that_share_a_bucket_lose_and_double_nothing() -> None:
    # What comes back to a bucket depends on what others gave back before; what is charged does not.
    assert hammered(Gcra(), used=90) == (600, (0, 4_400, 100_000 - 600 * 90))


def test_the_test_of_threads_sees_a_store_that_does_not_exclude_them() -> None:
    assert any(differs(lambda: hammered(unguarded(FixedWindows)())) for _ in range(20))


def differs(count: Any) -> bool:
    try:
        return bool(count() != HAMMERED)
    except Exception:
        return True


@pytest.mark.parametrize("kind", [FixedWindows, SlidingLog, Gcra])
@pytest.mark.parametrize("method", ["prepare", "admit", "extend", "settle", "charge"])
def test_no_other_thread_gets_a_turn_between_looking_at_the_flag_and_taking_it(kind: Any, method: str) -> None:
    """A thread loses its turn at calls and at jumps backwards. This is for the day when Python changes that order."""
    steps = list(dis.get_instructions(getattr(kind, method)))
    place = {step.offset: index for index, step in enumerate(steps)}
    looks = [index for index, step in enumerate(steps) if step.opname == "LOAD_ATTR" and step.argval == "_busy"]
    assert looks
    for index in looks:
        passed = []
        while steps[index := index + 1].opname != "STORE_ATTR":
            passed.append(steps[index].opname)
            # The flag was down.
            if "JUMP" in passed[-1] and "IF_FALSE" in passed[-1]:
                index = place[steps[index].argval] - 1
        assert all(re.fullmatch(QUIET, name) for name in passed), passed
        assert steps[index].argval == "_busy"


QUIET = r"POP_JUMP_\w*IF_(FALSE|TRUE)|CACHE|NOP|NOT_TAKEN|TO_BOOL|LOAD_(CONST|FAST|DEREF)\w*"


def test_where_threads_run_at_once_there_is_a_lock() -> None:
    """Without the global interpreter lock the flag would not do."""
    methods = {
        name: exclusive(getattr(FixedWindows, name), turns=False)
        for name in ("prepare", "admit", "extend", "settle", "charge")
    }
    locked = type("Locked", (unguarded(FixedWindows),), methods)
    assert hammered(locked()) == HAMMERED


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
        lease = store.admit("bearer:0::new", ONE, 1, (400,), START).lease
        assert lease is not None
        assert store.settle(lease, (100,), START) == (400,)
        assert store.admit("bearer:0::newer", ONE, 1, None, START).remaining[1] == 400

    def test_callers_are_forgotten_once_their_windows_have_ended(self, algorithm: Any) -> None:
        store = memory_limits(algorithm)
        for number in range(20_000):
            store.admit(f"ip4-{number}", NOBODY, 1, (5,), START)
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
    decision = FixedWindows().admit("a", ONE, 1, (100,), ALIGNED + 1)
    assert decision[:5] == (True, (2, 400), (ALIGNED + 60, ALIGNED + 60), "a", ALIGNED + 1)
    assert decision.lease is not None
    assert decision.lease.reserved == (100,)

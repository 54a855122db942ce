"""Quota by the share: never more than the limit, refused early by no more than is said, and few trips."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from fractions import Fraction
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from sigil_policy.stores import shares
from sigil_policy.stores.limits import Decision, Plan, StoreUnavailableError, Window
from sigil_policy.stores.memory import FixedWindows, SlidingLog
from sigil_policy.stores.redis import RedisLimits, RedisLink
from sigil_policy.stores.shares import QuotaShares
from sigil_policy.testing import FrozenClock
from sigil_policy.testing.stores import Check, limit_store_checks
from tests.stores.oracle import Oracle, by_window
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0
PLAN = Plan(name="batch", windows=(Window(20, 1), Window(60, 10), Window(200, 60), Window(1_000, 10, "tokens")))
CHUNK = 5
SHARE = 0.25


class Remote:
    """A store behind a wire: each call waits, and is counted; `failing` is raised, `gate` waited for.

    With a `clock` it decides by that, as a server does, not by what it is told of the time.
    """

    remote = True

    def __init__(self, store: Any = None, clock: FrozenClock | None = None) -> None:
        self.clock = clock
        self.store = FixedWindows() if store is None else store
        self.algorithms = self.store.algorithms
        self.trips: list[tuple[int, int]] = []
        self.failing: Exception | None = None
        self.gate: Callable[[], Awaitable[None]] | None = None
        self.closed = False

    def __repr__(self) -> str:
        return "Remote()"

    def prepare(self, plan: Plan) -> None:
        self.store.prepare(plan)

    async def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Any:
        self.trips.append((len(plan.requests), cost))
        await checkpoint()
        if self.gate is not None:
            await self.gate()
        if self.failing is not None:
            raise self.failing
        return self.store.admit(key, plan, cost, estimate, self.clock.time() if self.clock else now)

    async def extend(self, *arguments: Any) -> Any:
        return self.store.extend(*arguments)

    async def settle(self, *arguments: Any) -> Any:
        return self.store.settle(*arguments)

    async def charge(self, *arguments: Any) -> Any:
        return self.store.charge(*arguments)

    async def aclose(self) -> None:
        self.closed = True


def shared(remote: Any, clock: FrozenClock | None = None, **options: Any) -> QuotaShares:
    monotonic = (clock or FrozenClock()).monotonic
    return QuotaShares(remote, **{"share": SHARE, "monotonic": monotonic, **options})


async def ask(store: Any, now: float, *, key: str = "a", plan: Plan = PLAN, cost: int = 1, estimate: Any = None) -> Any:
    answer = store.admit(key, plan, cost, estimate, now)
    return answer if isinstance(answer, Decision) else await answer


# --- what one process sees -------------------------------------------------------------------------------------------


async def test_one_trip_serves_a_chunk_and_what_is_held_is_served_without_waiting() -> None:
    remote = Remote()
    store = shared(remote)
    assert store.chunk(PLAN) == CHUNK
    first = await ask(store, START)
    assert first.admitted
    assert first.remaining == (19, 59, 199, 1_000)
    for used in range(2, 6):
        decision = store.admit("a", PLAN, 1, None, START + 0.5)
        assert isinstance(decision, Decision)
        assert decision.admitted
        assert decision.remaining == (20 - used, 60 - used, 200 - used, 1_000)
        assert decision.reset == (START + 1, START + 10, START + 60, START + 10)
        assert (decision.key, decision.at, decision.lease) == ("a", START + 0.5, None)
    assert remote.trips == [(3, 5)]
    # Nobody else's.
    assert (await ask(store, START, key="b")).admitted
    assert remote.trips == [(3, 5), (3, 5)]


async def test_all_of_the_limit_is_admitted_and_the_refusals_after_it_are_free() -> None:
    remote = Remote()
    store = shared(remote)
    decisions = [await ask(store, START + 0.25) for _ in range(50)]
    assert [decision.admitted for decision in decisions] == [True] * 20 + [False] * 30
    refused = decisions[-1]
    assert refused.refused_by == (0,)
    assert refused.retry_after == 0.75
    assert refused.remaining == (0, 40, 180, 1_000)
    assert remote.trips == [(3, 5)] * 4
    assert isinstance(store.admit("a", PLAN, 1, None, START + 0.25), Decision)


async def test_a_rest_of_longer_windows_is_used_up_before_they_are_charged_again() -> None:
    remote = Remote()
    store = shared(remote)
    for second in range(5):
        assert (await ask(store, START + second)).admitted
    # The first trip took five of each window; then only the second was charged anew, each time.
    assert remote.trips == [(3, 5), (1, 5), (1, 5), (1, 5), (1, 5)]
    decision = await ask(store, START + 5)
    assert remote.trips[-1] == (3, 5)
    assert decision.remaining == (19, 54, 194, 1_000)


async def test_a_slow_caller_loses_nothing() -> None:
    """One request a second, of which each takes a chunk of its second: the minute admits all of its limit."""
    slow = Plan(name="slow", windows=(Window(20, 1), Window(40, 60)))
    store = shared(Remote())
    assert sum([(await ask(store, START + second, plan=slow)).admitted for second in range(60)]) == 40


async def test_the_end_of_a_window_ends_what_is_held_of_it() -> None:
    clock = FrozenClock(START)
    remote = Remote()
    store = shared(remote, clock)
    await ask(store, START)
    # By the clock of the requests,
    assert (await ask(store, START + 1)).remaining[0] == 19
    assert len(remote.trips) == 2
    # and by one that nobody can set back.
    clock.advance(1)
    assert (await ask(store, START + 1)).remaining[0] == 18
    assert len(remote.trips) == 3


async def test_a_window_ends_by_the_clock_of_the_store() -> None:
    class Ahead(Remote):
        async def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Any:
            return await super().admit(key, plan, cost, estimate, now + 0.75)

    store = shared(Ahead())
    first = await ask(store, START)
    assert (first.at, first.reset[0]) == (START + 0.75, START + 1)
    assert store.admit("a", PLAN, 1, None, START + 0.125).at == START + 0.875
    assert (await ask(store, START + 0.25)).reset[0] == START + 2


async def test_a_slow_trip_for_one_window_does_not_make_another_look_ended() -> None:
    """How far ahead the store's clock is, is known less well than which windows have not ended."""
    clock = FrozenClock(START)
    remote = Remote(clock=clock)
    store = shared(remote, clock)
    for _ in range(3):
        await ask(store, clock.time())
    clock.advance(1)
    for _ in range(2):
        await ask(store, clock.time())

    async def slow() -> None:
        clock.advance(0.5)

    # Of the second three are held, of the longer ones none.
    remote.gate = slow
    assert (await ask(store, clock.time())).at == START + 1.5
    assert remote.trips == [(3, 5), (1, 5), (2, 5)]
    clock.advance(0.25)
    decision = store.admit("a", PLAN, 1, None, clock.time())
    assert isinstance(decision, Decision)
    assert decision.admitted
    assert START + 1.75 <= decision.at <= decision.reset[0] == START + 2


async def test_nothing_is_served_from_a_window_that_the_store_says_has_ended() -> None:
    """Another server has taken over, whose clock goes ahead of that of the first."""

    class Moved(Remote):
        ahead = 0.0

        async def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Any:
            return await super().admit(key, plan, cost, estimate, now + self.ahead)

    remote = Moved()
    store = shared(remote)
    await ask(store, START)
    remote.ahead = 9.5
    decision = await ask(store, START + 1)
    assert decision.at == START + 10.5
    assert decision.reset == (START + 11, START + 20, START + 60, START + 20)
    assert remote.trips == [(3, 5), (1, 5), (1, 5)]


async def test_what_was_asked_before_a_window_ended_is_not_served_from_it_afterwards() -> None:
    """A request that waits for a chunk is admitted by the time at which it is, not by that at which it came."""
    clock = FrozenClock(START)
    remote = Remote()
    store = shared(remote, clock)
    opened = anyio.Event()

    async def slow() -> None:
        remote.gate = None
        await opened.wait()

    decisions = []

    async def one() -> None:
        decisions.append(await ask(store, clock.time()))

    remote.gate = slow
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(one)
        await anyio.wait_all_tasks_blocked()
        clock.advance(1)
        opened.set()
    assert all(decision.admitted for decision in decisions)
    # The first was decided by the store, in the second in which it asked; the others are of the next one.
    assert remote.trips == [(3, 5), (1, 5)]
    assert sorted(decision.reset[0] for decision in decisions) == [START + 1, START + 2, START + 2]


async def test_an_answer_about_a_window_that_has_been_left_changes_nothing() -> None:
    class Slow(Remote):
        """Decides a reservation at once, and tells of it when all else has been said."""

        async def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Any:
            if estimate is None:
                return await super().admit(key, plan, cost, estimate, now)
            decision = self.store.admit(key, plan, cost, estimate, now)
            await anyio.wait_all_tasks_blocked()
            return decision

    remote = Slow()
    store = shared(remote)
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: ask(store, START, estimate=(100,)))
        await checkpoint()
        assert (await ask(store, START + 1)).remaining == (19, 58, 198, 900)
    assert store.admit("a", PLAN, 1, None, START + 1.5).remaining == (18, 57, 197, 900)


async def test_costs_are_taken_in_every_window_and_large_ones_ask_for_themselves() -> None:
    remote = Remote()
    store = shared(remote)
    assert (await ask(store, START, cost=3)).remaining == (17, 57, 197, 1_000)
    assert (await ask(store, START, cost=2)).remaining == (15, 55, 195, 1_000)
    assert (await ask(store, START, cost=9)).remaining == (6, 46, 186, 1_000)
    assert remote.trips == [(3, 5), (3, 9)]
    refused = await ask(store, START, cost=7)
    assert (refused.admitted, refused.refused_by, refused.remaining) == (False, (0,), (6, 46, 186, 1_000))
    assert (await ask(store, START, cost=6)).remaining == (0, 40, 180, 1_000)
    # Nothing is asked by what costs nothing.
    assert (await ask(store, START, cost=0)).admitted


async def test_a_cost_over_a_limit_takes_a_whole_window_once() -> None:
    remote = Remote()
    store = shared(remote)
    decision = await ask(store, START, cost=30)
    assert (decision.admitted, decision.remaining) == (True, (0, 30, 170, 1_000))
    assert not (await ask(store, START)).admitted
    assert not (await ask(store, START, cost=30)).admitted
    assert (await ask(store, START + 1)).remaining == (19, 29, 169, 1_000)
    assert not (await ask(store, START + 1, cost=30)).admitted


async def test_the_last_requests_of_a_window_are_found_by_whoever_asks() -> None:
    remote = Remote()
    one, other = shared(remote), shared(remote)
    assert sum([(await ask(one, START)).admitted for _ in range(17)]) == 17
    # Three of a chunk are held there, nothing is left in the store: this is what is refused early.
    refused = await ask(other, START)
    assert (refused.admitted, refused.remaining[0]) == (False, 0)
    assert sum([(await ask(one, START)).admitted for _ in range(17)]) == 3
    # Less than a chunk is left: it is taken as it is.
    limit = Plan(name="odd", windows=(Window(23, 60),))
    assert sum([(await ask(one, START, plan=limit, key="b")).admitted for _ in range(30)]) == 23


async def test_tokens_are_reserved_in_the_store() -> None:
    remote = Remote()
    store = shared(remote)
    await ask(store, START)
    decision = await ask(store, START, estimate=(400,))
    assert decision.remaining == (18, 58, 198, 600)
    assert await store.extend(decision.lease, (100,), START) == (500,)
    assert await store.settle(decision.lease, (50,), START) == (950,)
    assert remote.trips == [(3, 5), (3, 1)]
    # Four are held, and the store is told of what happened anyway.
    assert await store.charge("a", PLAN, (3, 3, 3, 150), START) == (800,)
    assert store.admit("a", PLAN, 1, None, START).remaining == (14, 54, 194, 800)
    refused = await ask(store, START, estimate=(900,))
    assert (refused.refused_by, refused.remaining[3]) == ((3,), 800)


async def test_a_window_of_tokens_that_ended_is_asked_for() -> None:
    plan = Plan(name="tokens", windows=(Window(20, 60), Window(1_000, 1, "tokens")))
    remote = Remote()
    store = shared(remote)
    await ask(store, START, plan=plan, estimate=(1_000,))
    assert (await ask(store, START, plan=plan)).remaining == (18, 0)
    assert (await ask(store, START + 1, plan=plan)).remaining == (17, 1_000)
    assert remote.trips == [(1, 1), (1, 5), (0, 5)]


async def test_what_cannot_be_shared_goes_to_the_store_as_it_is() -> None:
    remote = Remote()
    store = shared(remote)
    small = Plan(name="small", windows=(Window(7, 60),))
    tokens = Plan(name="tokens", windows=(Window(7, 60, "tokens"),))
    team = Plan(name="team", levels=(PLAN, small))
    assert [store.chunk(plan) for plan in (small, tokens, team)] == [1, 0, 0]
    for plan, key in ((small, "a"), (tokens, "a"), (team, ("a", "org"))):
        store.prepare(plan)
        assert (await ask(store, START, plan=plan, key=key)).admitted
    assert [cost for _, cost in remote.trips] == [1, 1, 1]
    assert len(store) == 0


# --- many ------------------------------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2), st.sampled_from([1, 1, 1, 2, 3, 7, 25]), st.none()),
    st.tuples(st.just("ask"), st.integers(0, 2), st.just(1), st.sampled_from([None, (0,), (300,), (900,)])),
    st.tuples(st.just("run"), st.integers(0, 2), st.integers(2, 12), st.none()),
    st.tuples(st.just("pass"), st.sampled_from([0.125, 0.5, 1.0, 3.0, 10.0, 60.0]), st.none(), st.none()),
)


async def _replay(trace: list[Any], processes: int) -> None:
    remote, oracle, clock = Remote(), Oracle("fixed"), FrozenClock(START)
    stores = [shared(remote, clock) for _ in range(processes)]

    async def one(store: QuotaShares, cost: int, estimate: Any) -> None:
        at = Fraction(clock.time())
        rows = by_window("a", PLAN)
        before = [oracle.left("a", window, at) for _, window in rows]
        trips = len(remote.trips)
        decision = await ask(store, clock.time(), cost=cost, estimate=estimate)
        if len(remote.trips) > trips and remote.trips[-1][0] == 3 and not decision.admitted:
            # The store was asked for all of them just now: what others hold is not shown as left.
            assert all(shown <= left for shown, left in zip(decision.remaining, before, strict=True))
        if decision.admitted:
            answer = oracle.admit("a", PLAN, cost, estimate, clock.time())
            assert answer.admitted
            if processes == 1:
                assert decision.remaining == answer.remaining
            if decision.lease is not None:
                await store.settle(decision.lease, (100,), clock.time())
                oracle.settle(answer.hold, (100,), clock.time())
            return
        assert decision.retry_after > 0
        others = processes - 1 if cost == 1 and estimate is None else processes
        for index in decision.refused_by:
            window, left = rows[index][1], before[index]
            need = min(cost, window.limit) if window.unit == "requests" else max(estimate[0], 1)
            assert left < need + (others * (CHUNK - 1) if window.unit == "requests" else 0)

    for what, number, more, estimate in trace:
        if what == "pass":
            clock.advance(number)
        elif what == "run":
            for _ in range(more):
                await one(stores[number % processes], 1, None)
        else:
            await one(stores[number % processes], more, estimate)
    # No process holds more than a chunk, less the request that it was taken for.
    assert all(number < CHUNK for store in stores for caller in store._callers.values() for number in caller.held)


@pytest.mark.parametrize("processes", [1, 2, 3])
@settings(max_examples=60)
@given(trace=st.lists(steps, max_size=25))
def test_never_more_than_the_limit_and_refused_early_by_no_more_than_others_may_hold(
    processes: int, trace: list[Any]
) -> None:
    anyio.run(_replay, trace, processes)


bursts = st.lists(
    st.tuples(
        # Of each request: which process, what it costs, and after how many steps of others it is cancelled.
        st.lists(
            st.tuples(
                st.integers(0, 2),
                st.sampled_from([1, 1, 1, 2, 4, 9]),
                st.one_of(st.none(), st.none(), st.integers(0, 9)),
            ),
            min_size=1,
            max_size=12,
        ),
        # How long trips are in the air, after how many steps time passes, and how much.
        st.integers(0, 4),
        st.integers(0, 12),
        st.sampled_from([0.0, 0.25, 1.0, 4.0, 10.0]),
    ),
    max_size=6,
)


async def _account(bursts: list[Any]) -> None:
    clock = FrozenClock(START)
    remote = Remote(clock=clock)
    stores = [shared(remote, clock) for _ in range(3)]
    admitted: Counter[tuple[int, float]] = Counter()

    async def steps(number: int) -> None:
        for _ in range(number):
            await checkpoint()

    async def one(process: int, cost: int, patience: int | None) -> None:
        async with anyio.create_task_group() as group:

            async def lose_patience() -> None:
                await steps(patience or 0)
                group.cancel_scope.cancel()

            if patience is not None:
                group.start_soon(lose_patience)
            decision = await ask(stores[process], clock.time(), cost=cost)
            if decision.admitted:
                admitted.update({(index, decision.reset[index]): cost for index in range(3)})
            group.cancel_scope.cancel()

    async def tick(number: int, seconds: float) -> None:
        await steps(number)
        clock.advance(seconds)

    for requests, latency, number, seconds in bursts:
        remote.gate = lambda latency=latency: steps(latency)
        async with anyio.create_task_group() as group:
            group.start_soon(tick, number, seconds)
            for request in requests:
                group.start_soon(one, *request)
        # All that the store has charged was admitted, or is held; nothing was admitted that was not charged.
        truth = remote.store.admit("a", PLAN, 0, None, clock.time())
        for index, window in enumerate(PLAN.requests):
            assert max((sum_ for (i, _), sum_ in admitted.items() if i == index), default=0) <= window.limit
            callers = [caller for store in stores for caller in store._callers.values()]
            held = sum(caller.held[index] for caller in callers if caller.reset[index] == truth.reset[index])
            assert admitted[index, truth.reset[index]] + held == window.limit - truth.remaining[index]
            assert not any(caller.waiting or caller.fetch for caller in callers)


@settings(max_examples=60)
@given(bursts=bursts)
def test_every_request_that_was_charged_is_admitted_or_held_whoever_is_cancelled(bursts: list[Any]) -> None:
    anyio.run(_account, bursts)


async def test_the_bound_of_early_refusals_is_reached_and_not_passed() -> None:
    remote = Remote()
    stores = [shared(remote) for _ in range(4)]
    for store in stores[1:]:
        assert (await ask(store, START)).admitted
    admitted = sum([(await ask(stores[0], START)).admitted for _ in range(30)])
    assert 3 + admitted == 20 - 3 * (CHUNK - 1)


async def test_requests_that_come_at_once_share_a_trip() -> None:
    remote = Remote()
    store = shared(remote)
    decisions: list[Decision] = []

    async def one() -> None:
        decisions.append(await ask(store, START))

    async with anyio.create_task_group() as group:
        for _ in range(40):
            group.start_soon(one)
    assert sum(decision.admitted for decision in decisions) == 20
    assert sorted(decision.remaining[0] for decision in decisions if decision.admitted) == list(range(20))
    # One for the first of them, one for all that waited and were too many, one for what is left.
    assert remote.trips == [(3, 5), (3, 20), (3, 15)]
    assert not any(caller.waiting for caller in store._callers.values())


async def test_what_is_fetched_for_those_who_wait_is_theirs() -> None:
    remote = Remote()
    store = shared(remote)
    admitted = []

    async def patient() -> None:
        admitted.append((await ask(store, START)).admitted)

    async def greedy() -> None:
        """Asks again and again, in the very turn in which it was answered."""
        admitted.extend([(await ask(store, START)).admitted for _ in range(9)])

    async with anyio.create_task_group() as group:
        group.start_soon(greedy)
        await anyio.wait_all_tasks_blocked()
        for _ in range(6):
            group.start_soon(patient)
    assert admitted == [True] * 15
    assert len(remote.trips) <= 4


async def test_who_is_cancelled_in_front_of_its_answer_leaves_it_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote()
    store = shared(remote)
    opened = anyio.Event()
    remote.gate = opened.wait
    serve = shares._Caller.serve
    async with anyio.create_task_group() as group, anyio.create_task_group() as cancelled:

        def answered(caller: Any, *moments: float) -> None:
            serve(caller, *moments)
            cancelled.cancel_scope.cancel()

        monkeypatch.setattr(shares._Caller, "serve", answered)
        group.start_soon(ask, store, START)
        await anyio.wait_all_tasks_blocked()
        cancelled.start_soon(ask, store, START)
        await anyio.wait_all_tasks_blocked()
        opened.set()
    [caller] = store._callers.values()
    assert (caller.held, caller.waiting) == ([4, 4, 4], {})


async def test_a_request_waits_for_two_trips_of_others_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched may be of no use, again and again; then a request asks for itself."""
    remote = Remote()
    store = shared(remote)
    large = Plan(name="large", windows=(Window(1_000, 60),))
    opened = anyio.Event()
    remote.gate = opened.wait

    async def one() -> None:
        assert (await ask(store, START, plan=large)).admitted

    def emptied(caller: Any, *moments: float) -> None:
        caller.held[0] = 0

    monkeypatch.setattr(shares._Caller, "serve", emptied)
    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(one)
            await anyio.wait_all_tasks_blocked()
        opened.set()
    # Three fetched for themselves and others, whose turn never came.
    assert sorted(remote.trips) == [(1, 1)] * 3 + [(1, 250)] * 3


async def test_an_outage_fails_all_who_wait_after_one_trip() -> None:
    remote = Remote()
    store = shared(remote)
    remote.failing = StoreUnavailableError("away", 3.0)
    failed = []

    async def one() -> None:
        with pytest.raises(StoreUnavailableError, match="away") as caught:
            await ask(store, START)
        failed.append(caught.value.retry_after)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(one)
    assert failed == [3.0] * 20
    assert len(remote.trips) == 1
    remote.failing = None
    assert (await ask(store, START)).remaining == (19, 59, 199, 1_000)
    # What is held is served while the store is away.
    remote.failing = StoreUnavailableError("away")
    assert (await ask(store, START)).admitted


async def test_a_cancelled_fetch_leaves_nothing_and_who_waited_fetches_anew() -> None:
    remote = Remote()
    store = shared(remote)
    decisions = []

    async def hang() -> None:
        remote.gate = None
        await anyio.sleep_forever()

    async def one() -> None:
        decisions.append(await ask(store, START))

    remote.gate = hang
    async with anyio.create_task_group() as group, anyio.create_task_group() as first:
        first.start_soon(ask, store, START)
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            group.start_soon(one)
        # Who is cancelled while it waits leaves nothing either.
        first.start_soon(ask, store, START)
        await anyio.wait_all_tasks_blocked()
        first.cancel_scope.cancel()
    assert [decision.admitted for decision in decisions] == [True] * 3
    assert remote.trips == [(3, 5), (3, 5)]
    [caller] = store._callers.values()
    assert (caller.held, caller.waiting, caller.fetch) == ([2, 2, 2], {}, None)
    assert remote.store.admit("a", PLAN, 0, None, START).remaining == (15, 55, 195, 1_000)


async def test_memory_is_bounded_and_nobody_loses_what_is_held_to_somebody_else() -> None:
    remote = Remote()
    store = shared(remote, max_callers=10)
    for number in range(10):
        await ask(store, START, key=str(number))
    assert len(store) == 10
    trips = len(remote.trips)
    for number in range(100):
        assert (await ask(store, START, key=f"flood {number}")).admitted
    assert len(store) == 10
    assert remote.trips[trips:] == [(3, 1)] * 100
    assert all(isinstance(store.admit(str(number), PLAN, 1, None, START), Decision) for number in range(10))
    # Once their windows have ended, there is room for others.
    for number in range(100):
        assert (await ask(store, START + 60, key=f"later {number}")).admitted
    assert len(store) == 10
    assert not {key for key, _ in store._callers} & {str(number) for number in range(10)}


async def test_a_caller_whose_first_chunk_is_on_its_way_is_not_forgotten() -> None:
    remote = Remote()
    store = shared(remote)
    opened = anyio.Event()
    remote.gate = opened.wait
    async with anyio.create_task_group() as group:
        group.start_soon(ask, store, START)
        await anyio.wait_all_tasks_blocked()
        for number in range(5):
            group.start_soon(lambda number=number: ask(store, START, key=str(number)))
        await anyio.wait_all_tasks_blocked()
        opened.set()
    assert isinstance(store.admit("a", PLAN, 1, None, START), Decision)


async def test_the_store_sees_a_fraction_of_the_requests() -> None:
    remote = Remote()
    store = shared(remote, share=0.05)
    plan = Plan(name="batch", windows=(Window(1_000, 1), Window(50_000, 60)))
    now = START
    for _ in range(4):
        for _ in range(1_000):
            assert (await ask(store, now, plan=plan)).admitted
        now += 1
    # Chunks of 50, and in each new second one more that is only for it.
    assert len(remote.trips) == 80
    for _ in range(1_000):
        await ask(store, now - 1, plan=plan)
    assert len(remote.trips) == 80


class Waiting:
    """Answers late whatever is known at once: what the checks expect of a store that is remote."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.remote, self.algorithms, self.prepare = True, store.algorithms, store.prepare
        self.extend, self.settle, self.charge, self.aclose = store.extend, store.settle, store.charge, store.aclose

    async def admit(self, *arguments: Any) -> Any:
        answer = self.store.admit(*arguments)
        return answer if isinstance(answer, Decision) else await answer


# What a process holds of one plan, another does not know of, nor what reserves tokens.
@pytest.mark.parametrize("check", limit_store_checks(weaker={"changed-plans"}), ids=str)
async def test_it_passes_the_checks_of_all_stores(check: Check) -> None:
    clock = FrozenClock()

    def make() -> Any:
        return Waiting(shared(Remote(), clock, share=0.5))

    await check(make, algorithm="fixed", clock=clock, advance=clock.advance)


# --- over a real server ----------------------------------------------------------------------------------------------

HAMMER = """
import asyncio, json, sys, time
from collections import Counter
from sigil_policy.stores.limits import Decision, Plan, Window
from sigil_policy.stores.redis import RedisLimits, RedisLink
from sigil_policy.stores.shares import QuotaShares

PLAN = Plan(name="batch", windows=(Window(200, 1), Window(100_000, 60)))

async def main(url):
    redis = RedisLimits(RedisLink(url, deadline=30.0, connect_timeout=30.0), denial_cache=0)
    run, trips = redis.link.run, Counter()

    def counted(*arguments, **options):
        trips["trips"] += 1
        return run(*arguments, **options)

    redis.link.run = counted
    store = QuotaShares(redis, share=0.05)
    store.prepare(PLAN)
    admitted, refused, requests, strayed = Counter(), set(), 0, 0

    async def hammer():
        nonlocal requests, strayed
        # The demand is larger than the limit, however slow the machine.
        while (now := time.time()) < end or not refused or requests < 5_000:
            requests += 1
            decision = store.admit("a", PLAN, 1, None, now)
            local = isinstance(decision, Decision)
            if not local:
                decision = await decision
            if decision.admitted:
                admitted[round(decision.reset[0])] += 1
                # The clock of the server is that of this machine; it was decided between these two moments.
                first, last = (now, time.time()) if local else (decision.at, decision.at)
                strayed += not (first <= decision.reset[0] and decision.reset[0] - 1 <= last)
            else:
                refused.add(round(decision.reset[0]))
            if requests % 16 == 0:
                await asyncio.sleep(0.001)

    print("ready", flush=True)
    start = float(sys.stdin.readline())
    end = start + 2.25
    await asyncio.sleep(start - time.time())
    await asyncio.gather(*(hammer() for _ in range(16)))
    await store.aclose()
    print(json.dumps([admitted, sorted(refused), requests, trips["trips"], strayed]))

asyncio.run(main(sys.argv[1]))
"""


def test_four_processes_over_valkey_never_admit_more_and_the_server_sees_few_of_the_requests() -> None:
    with Server() as server:
        command = [sys.executable, "-c", HAMMER, server.url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(4)]
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 4
        # A little in front of a second, of which there are then two whole ones.
        start = time.time() // 1 + 1.875
        for worker in workers:
            worker.stdin.write(f"{start}\n")
            worker.stdin.flush()
        told = [json.loads(worker.communicate(timeout=200)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    admitted: Counter[str] = Counter()
    refused: set[int] = set()
    for counts, seconds, *_ in told:
        admitted.update(counts)
        refused.update(seconds)
    requests, trips, strayed = (sum(column) for column in list(zip(*told, strict=True))[2:])
    assert strayed == 0
    assert max(admitted.values()) <= 200
    # In seconds in which somebody was refused, as much as others cannot hold; and where a process stood still until the
    # second was over, what was on its way to it, for all of its sixteen, was of no use.
    full = [admitted[str(second)] for second in refused]
    assert max(full) >= 200 - 3 * 9
    assert min(full) >= 200 - 4 * 16
    # Chunks of ten, and what is known to be used up asks nobody.
    assert trips < sum(admitted.values())
    assert trips < requests / 10


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("check", limit_store_checks(weaker={"changed-plans"}, timed=False), ids=str)
async def test_it_passes_the_checks_of_all_stores_over_valkey(check: Check, server: Server) -> None:
    def make() -> Any:
        link = RedisLink(server.url, deadline=30.0, connect_timeout=30.0)
        return Waiting(QuotaShares(RedisLimits(link, denial_cache=0), share=0.5))

    await check(make, algorithm="fixed")


# --- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "options", "message"),
    [
        (Remote(), {"share": 0}, "share must be more than 0 and at most 0.5, not 0"),
        (Remote(), {"share": 0.6}, "share must be more than 0 and at most 0.5, not 0.6"),
        (Remote(), {"share": float("nan")}, "share must be more than 0"),
        (Remote(), {"max_callers": 0}, "max_callers must be at least 1, not 0"),
        (FixedWindows(), {}, "FixedWindows counts in this process: there is no trip to save"),
        (Remote(SlidingLog()), {}, "counts by sliding; shares are exact for 'fixed'"),
    ],
)
def test_what_cannot_work_is_said_at_construction(store: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuotaShares(store, **options)


@pytest.mark.parametrize("algorithm", ["sliding", "gcra"])
def test_windows_that_do_not_end_cannot_be_shared(algorithm: Any) -> None:
    store = shared(Remote())
    assert store.algorithms == {"fixed"}
    with pytest.raises(ValueError, match=f"plan 'p' counts by '{algorithm}': quota that is taken ahead"):
        store.prepare(Plan(name="p", windows=(Window(100, 60),), algorithm=algorithm))


async def test_it_closes_its_store_and_tells_what_it_is() -> None:
    remote = Remote()
    store = shared(remote)
    assert store.remote
    assert repr(store) == "QuotaShares(Remote(), share=0.25, max_callers=50000)"
    assert not hasattr(store, "on_restored")
    await store.aclose()
    assert remote.closed


def test_plans_that_are_thrown_away_are_forgotten() -> None:
    store = shared(Remote())
    for _ in range(3_000):
        store.prepare(Plan(name="p", windows=(Window(100, 60),)))
    assert len(store._views) <= 1_000

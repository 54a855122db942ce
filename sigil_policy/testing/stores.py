"""For authors of limit stores: the checks that every store of limits passes, and what they prove.

    @pytest.mark.parametrize("check", limit_store_checks(), ids=str)
    async def test_my_store(check: Check) -> None:
        await check(MyStore, algorithm="fixed")

    await check_limit_store(MyStore, algorithm="fixed")           # all of them, one after the other

A store in this process, whose time the test moves, is also asked what happens when windows end:

    clock = FrozenClock()
    await check_limit_store(MyStore, algorithm="gcra", clock=clock, advance=clock.advance)

Each check makes a store of its own and closes it. Its callers have names that nobody used before, so the storage behind
may be shared and need not be empty. Nothing depends on the clock that `now` is taken from: a store may have its own,
and what was decided when is read from `Decision.at`. The windows are a day long; a check that midnight (UTC) fell into
is done again.

A store that promises less says so, and is not asked for that: `limit_store_checks(weaker={"all-or-nothing"})`.
"""

import sys
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from inspect import isawaitable
from secrets import token_hex
from threading import Barrier
from typing import Any, Literal, get_args

import anyio

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.stores.limits import MONTH, Algorithm, Decision, Key, Lease, LimitStore, Plan, Unit, Window

DAY = 86_400
WEEK = 7 * DAY

Promise = Literal[
    "all-or-nothing",
    "concurrency",
    "refunds",
    "overdraft",
    "whole-cost",
    "changed-plans",
    "token-estimates",
    "extend",
    "levels",
    "months",
]
"""What a weaker store may leave out.

* "all-or-nothing": a refused request consumes nothing in any window.
* "concurrency": of many requests at once exactly those pass that the limit allows.
* "refunds": what a reservation left unused comes back, once, and never to a later window.
* "overdraft": what was used beyond a limit counts.
* "whole-cost": a cost over a window's limit takes the whole window, rather than never being admitted.
* "changed-plans": what was used is kept when a limit is changed.
* "token-estimates": an estimate of 0 is refused when no tokens remain; one that can never fit is refused, not an error.
* "extend": a reservation can be enlarged.
* "levels": several levels are decided together.
* "months": windows of calendar months (only asked of "fixed").
"""

PROMISES: frozenset[Promise] = frozenset(get_args(Promise))

MakeStore = Callable[[], LimitStore | Awaitable[LimitStore]]
Advance = Callable[[float], object]


class Trial:
    """One store under one check."""

    def __init__(
        self, store: LimitStore, algorithm: Algorithm, clock: Clock, advance: Advance | None, seconds: int
    ) -> None:
        self.store = store
        self.algorithm = algorithm
        self.clock = clock
        self.seconds = seconds
        self.moments: list[float] = []
        self._advance = advance
        self._run = token_hex(8)

    def key(self, name: str = "caller") -> str:
        """A caller that no other check knows."""
        return f"check:{self._run}:{name}"

    def plan(self, *windows: Window, name: str = "check", levels: tuple[Plan, ...] = ()) -> Plan:
        plan = Plan(name=name, windows=windows, levels=levels, algorithm=self.algorithm)
        self.store.prepare(plan)
        return plan

    async def admit(self, key: Key, plan: Plan, cost: int = 1, estimate: tuple[int, ...] | None = None) -> Decision:
        decision: Decision = await self._answer(self.store.admit(key, plan, cost, estimate, self.clock.time()))
        self.moments.append(decision.at)
        count = len(plan.windows)
        lengths = (len(decision.remaining), len(decision.reset))
        same(lengths, (count, count), "remaining and reset have an entry for each window of the plan")
        holds(min(decision.remaining) >= 0, f"remaining is never below 0: {decision.remaining}")
        holds(decision.admitted is not bool(decision.refused_by), f"refused_by is there iff refused: {decision}")
        reserved = decision.admitted and estimate is not None
        holds((decision.lease is not None) is reserved, f"a lease is there iff estimated and admitted: {decision}")
        return decision

    async def reserve(self, key: Key, plan: Plan, estimate: tuple[int, ...], cost: int = 1) -> Lease:
        """The lease of a request that must be admitted."""
        decision = await self.admit(key, plan, cost, estimate)
        holds(decision.admitted, f"an estimate of {estimate} fits: {decision}")
        assert decision.lease is not None
        same(decision.lease.reserved, estimate, "the lease says what is reserved")
        return decision.lease

    async def remaining(self, key: Key, plan: Plan) -> tuple[int, ...]:
        """What remains in each window, asked by a request that costs nothing."""
        return (await self.admit(key, plan, 0)).remaining

    async def settle(self, lease: Lease, *used: int) -> tuple[int, ...]:
        left: tuple[int, ...] = await self._answer(self.store.settle(lease, used, self.clock.time()))
        return left

    async def extend(self, lease: Lease, *more: int) -> tuple[int, ...] | None:
        left: tuple[int, ...] | None = await self._answer(self.store.extend(lease, more, self.clock.time()))
        return left

    async def charge(self, key: Key, plan: Plan, *amounts: int) -> tuple[int, ...]:
        left: tuple[int, ...] = await self._answer(self.store.charge(key, plan, amounts, self.clock.time()))
        return left

    async def together(self, count: int, ask: Callable[[], Any]) -> list[Any]:
        """The answers to `count` questions at once: from tasks, or from threads if the store is in this process."""
        if not self.store.remote:
            start = Barrier(4)

            def some() -> list[Any]:
                start.wait()
                return [ask() for _ in range(count // 4)]

            with _impatient(), ThreadPoolExecutor(4) as threads:
                return [answer for done in [threads.submit(some) for _ in range(4)] for answer in done.result()]
        return await at_once(count, ask)

    async def advance(self, seconds: float) -> None:
        assert self._advance is not None
        await awaited(self._advance(seconds))

    async def next_window(self) -> None:
        """Wait until windows of `seconds` that are open now have ended, and a next one has just begun."""
        at = (await self.admit(self.key("clock"), self.plan(Window(1_000_000, self.seconds)))).at
        await self.advance(2 * self.seconds - at % self.seconds + self.seconds / 50)

    async def _answer(self, given: Any) -> Any:
        same(isawaitable(given), self.store.remote, "answers are awaitables iff the store is remote")
        return await awaited(given)


class Check:
    """One check: `await check(make_store, algorithm="fixed")`; its name says what must hold.

    Options of the call:
        make_store: makes a fresh store, or an awaitable of one.
        algorithm: the one to count by.
        clock: where `now` comes from (default: the machine's).
        advance: moves `clock` and the store forwards by so many seconds; may be async, and may be `anyio.sleep`. Only
            checks that are `timed` need it.
        seconds: how long the windows of timed checks are (default 60); a few where `advance` sleeps.

    Raises `AssertionError` with what was promised and what was answered.
    """

    def __init__(self, run: Callable[[Trial], Awaitable[None]], promises: frozenset[Promise], timed: bool) -> None:
        self.name = run.__name__
        self.promises = promises
        self.timed = timed
        self._run = run

    def __repr__(self) -> str:
        return self.name

    async def __call__(
        self,
        make_store: MakeStore,
        *,
        algorithm: Algorithm,
        clock: Clock = SYSTEM_CLOCK,
        advance: Advance | None = None,
        seconds: int = 60,
    ) -> None:
        if self.timed and advance is None:
            raise TypeError(f"{self.name} needs advance=...; without, ask limit_store_checks(timed=False)")
        for last in (False, False, True):
            store = await awaited(make_store())
            trial = Trial(store, algorithm, clock, advance, seconds)
            try:
                holds(algorithm in store.algorithms, f"{algorithm!r} is one of the store's {set(store.algorithms)}")
                with told(self.name):
                    await self._run(trial)
            except AssertionError:
                # Windows of a day that ended in the middle explain much, and do not happen twice.
                days = {moment // DAY for moment in trial.moments}
                if last or self.timed or len(days) < 2:
                    raise
            else:
                return
            finally:
                if hasattr(store, "aclose"):
                    await store.aclose()


_CHECKS: list[Check] = []


def limit_store_checks(*, weaker: Collection[Promise] = (), timed: bool = True) -> list[Check]:
    """The checks, to be given to `pytest.mark.parametrize(..., ids=str)`.

    Options:
        weaker: promises that the store does not make; whatever needs one of them is left out (default none).
        timed: with the checks that move time (default True).
    """
    unknown = set(weaker) - PROMISES
    if unknown:
        raise ValueError(f"weaker has {sorted(unknown)}; a store may leave out {sorted(PROMISES)}")
    return [check for check in _CHECKS if not check.promises & set(weaker) and (timed or not check.timed)]


async def check_limit_store(
    make_store: MakeStore,
    *,
    algorithm: Algorithm,
    clock: Clock = SYSTEM_CLOCK,
    advance: Advance | None = None,
    seconds: int = 60,
    weaker: Collection[Promise] = (),
) -> None:
    """Run every check against stores that `make_store` makes.

    Options as of `Check` and `limit_store_checks`; without `advance` those that move time are left out. Raises
    `AssertionError` at the first that fails.
    """
    for check in limit_store_checks(weaker=weaker, timed=advance is not None):
        await check(make_store, algorithm=algorithm, clock=clock, advance=advance, seconds=seconds)


def same(answered: object, promised: object, what: str) -> None:
    if answered != promised:
        raise AssertionError(f"{what}: answered {answered!r}, promised {promised!r}")


async def awaited(given: Any) -> Any:
    """What a store gave, awaited if need be."""
    return await given if isawaitable(given) else given


async def at_once(count: int, ask: Callable[[], Any]) -> list[Any]:
    """The answers to `count` questions that are asked by as many tasks."""
    answers: list[Any] = []

    async def one() -> None:
        answers.append(await awaited(ask()))

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
    return answers


def holds(it: bool, what: str) -> None:
    if not it:  # no `assert`: a suite that is run with -O still checks
        raise AssertionError(what)


@contextmanager
def told(name: str) -> Iterator[None]:
    """Whatever comes out of a check is told as its failure, also what nobody has promised."""
    try:
        yield
    except Exception as error:
        cause: Exception = error
        while isinstance(cause, ExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if isinstance(error, AssertionError):
            raise
        if isinstance(cause, AssertionError):
            raise AssertionError(str(cause)) from error
        raise AssertionError(f"{name.replace('_', ' ')}: {cause!r:.500} came out") from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Threads take turns as often as they can: what is not excluded shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _check(*promises: Promise, timed: bool = False) -> Callable[[Callable[[Trial], Awaitable[None]]], Check]:
    def named(run: Callable[[Trial], Awaitable[None]]) -> Check:
        check = Check(run, frozenset(promises), timed)
        _CHECKS.append(check)
        return check

    return named


# --- requests --------------------------------------------------------------------------------------------------------


@_check()
async def the_limit_passes_and_not_one_more(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(3, DAY), Window(10, WEEK))
    for left in (2, 1, 0):
        decision = await trial.admit(key, plan)
        same((decision.admitted, decision.remaining), (True, (left, left + 7)), "a request is admitted and counted")
        same((decision.key, decision.retry_after), (key, 0.0), "the decision names the caller, and no wait")
    refused = await trial.admit(key, plan)
    same((refused.admitted, refused.remaining), (False, (0, 7)), "the limit is kept")
    same(refused.refused_by, (0,), "the window that refused is named")


@_check()
async def resets_say_when_windows_are_renewed(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(2, DAY), Window(3, 2 * DAY), Window(1_000, DAY, "tokens"))
    first = await trial.admit(key, plan, 1, (400,))
    second = await trial.admit(key, plan, 1, (400,))
    refused = await trial.admit(key, plan, 2, (600,))
    same(set(refused.refused_by), {0, 1, 2}, "every window that refuses is named")
    for decision in (first, second, refused):
        for reset, window in zip(decision.reset, plan.windows, strict=True):
            wait = reset - decision.at
            holds(0 < wait <= window.seconds + 0.001, f"{window} is renewed within its length: {wait} s")
            if trial.algorithm == "fixed":
                same(reset, decision.at // window.seconds * window.seconds + window.seconds, f"the end of {window}")
    waits = [refused.reset[index] - refused.at for index in refused.refused_by]
    same(waits, sorted(waits, reverse=True), "the longest wait comes first in refused_by")
    holds(abs(refused.retry_after - waits[0]) < 0.001, f"retry_after {refused.retry_after} is the longest of {waits}")


@_check("months")
async def calendar_months_end_with_the_month(trial: Trial) -> None:
    if trial.algorithm != "fixed":
        return
    key = trial.key()
    plan = trial.plan(Window(5, DAY), Window(20, MONTH, "tokens", calendar="month"))
    decision = await trial.admit(key, plan, 1, (3,))
    same(decision.remaining, (4, 17), "a month counts as every window does")
    first = datetime.fromtimestamp(decision.at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    after = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    same(decision.reset[1], after.timestamp(), "the month ends where the next begins")
    rolling = trial.plan(Window(20, MONTH, "tokens"))
    same(await trial.remaining(key, rolling), (20,), "31 days are another window than a month")


@_check("all-or-nothing")
async def a_refused_request_consumes_nothing(trial: Trial) -> None:
    windows = (Window(2, DAY), Window(100, WEEK), Window(1_000, DAY, "tokens"), Window(300, DAY, "output-tokens"))
    plan = trial.plan(*windows)
    key = trial.key("requests")
    await trial.admit(key, plan, 2, (100, 100))
    for _ in range(3):
        refused = await trial.admit(key, plan, 1, (100, 100))
        same((refused.refused_by, refused.remaining), ((0,), (0, 98, 900, 200)), "only the first window refuses")
    key = trial.key("tokens")
    await trial.admit(key, plan, 1, (100, 100))
    for _ in range(3):
        refused = await trial.admit(key, plan, 1, (100, 201))
        same((refused.refused_by, refused.remaining), ((3,), (1, 99, 900, 200)), "only the last window refuses")
    key = trial.key("cost")
    await trial.admit(key, plan, 1, (0, 0))
    refused = await trial.admit(key, plan, 2, (0, 0))
    same((refused.refused_by, refused.remaining), ((0,), (1, 99, 1_000, 300)), "a cost is not admitted in part")


@_check()
async def what_costs_nothing_is_never_refused_and_counts_nothing(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(2, DAY))
    same(await trial.remaining(key, plan), (2,), "a cost of 0 counts nothing")
    await trial.admit(key, plan, 2)
    decision = await trial.admit(key, plan, 0)
    same((decision.admitted, decision.remaining), (True, (0,)), "a cost of 0 passes where nothing remains")


@_check("whole-cost")
async def a_cost_over_the_limit_takes_the_whole_window(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(2, DAY), Window(20, WEEK))
    decision = await trial.admit(key, plan, 5)
    same((decision.admitted, decision.remaining), (True, (0, 15)), "a whole window pays for a cost over its limit")
    same((await trial.admit(key, plan, 1)).refused_by, (0,), "nothing is left of that window")
    other = trial.key("other")
    await trial.admit(other, plan, 1)
    refused = await trial.admit(other, plan, 5)
    same((refused.admitted, refused.remaining), (False, (1, 19)), "a window that was begun is not whole")


@_check()
async def windows_of_other_lengths_and_units_count_apart(trial: Trial) -> None:
    key = trial.key()
    units: tuple[Unit, ...] = ("tokens", "input-tokens", "output-tokens")
    plan = trial.plan(Window(9, DAY), Window(9, WEEK), *(Window(900, DAY, unit) for unit in units))
    decision = await trial.admit(key, plan, 1, (100, 200, 300))
    same(decision.remaining, (8, 8, 800, 700, 600), "amounts follow the plan's token windows")
    weekly = trial.plan(Window(9, WEEK), Window(900, WEEK, "tokens"))
    same((await trial.remaining(key, weekly))[1:], (900,), "a week of tokens is not a day of them")


@_check("changed-plans")
async def another_tier_goes_on_from_what_was_used(trial: Trial) -> None:
    key = trial.key()
    small = trial.plan(Window(5, DAY), Window(100, DAY, "tokens"), name="small")
    large = trial.plan(Window(50, DAY), Window(1_000, DAY, "tokens"), name="large")
    for _ in range(5):
        await trial.admit(key, small, 1, (10,))
    same(await trial.remaining(key, large), (45, 950), "use is kept under a larger limit")
    await trial.admit(key, large, 1, (10,))
    refused = await trial.admit(key, small)
    same((refused.admitted, refused.remaining), (False, (0, 40)), "use is kept under a smaller limit")
    decision = await trial.admit(key, small, 0)
    same((decision.admitted, decision.remaining), (True, (0, 40)), "what costs nothing passes, however much was used")


@_check()
async def callers_never_share_a_counter(trial: Trial) -> None:
    plan = trial.plan(Window(1, DAY), Window(100, DAY, "tokens"))
    apart = ["", " ", ":", "::", "a", "a ", "A", "a:", ":a", "a:b", "a::b", "a\0", "a\0b", "a\n", "a\r\nb", "a*", "{a}"]
    apart += ["{a}b", "a{b}", "}{", "%61", "a%3Ab", "\\a", '"a"', "a/b", "a/../b", "\xe4", "a\u0308", "\u212b", "\xc5"]
    apart += ["\udce4", "\udc80a", "\U0001f600", "\u0130", "i", "x" * 5_000, "x" * 5_001, "x" * 5_000 + "y", "0", "00"]
    for name in apart:
        key = trial.key(name)
        decision = await trial.admit(key, plan, 1, (100,))
        same((decision.admitted, decision.key), (True, key), f"{name[:20]!r} is counted on its own")
    for name in apart:
        same((await trial.admit(trial.key(name), plan, 1, (1,))).admitted, False, f"{name[:20]!r} is known again")


@_check("concurrency")
async def of_requests_at_once_exactly_the_limit_passes(trial: Trial) -> None:
    key = trial.key()
    # Of no window anything comes back for minutes: on the machine's clock, time passes.
    plan = trial.plan(Window(200, WEEK), Window(137, DAY), Window(2_000, WEEK, "tokens"))
    now = trial.clock.time()
    decisions: list[Decision] = await trial.together(200, lambda: trial.store.admit(key, plan, 1, (10,), now))
    same(sum(decision.admitted for decision in decisions), 137, "exactly the limit passes")
    lefts = sorted(decision.remaining[1] for decision in decisions if decision.admitted)
    same(lefts, list(range(137)), "each is told of another rest")
    same(await trial.remaining(key, plan), (63, 0, 630), "what was refused consumed nothing")
    key = trial.key("tokens")
    plan = trial.plan(Window(1_000, DAY), Window(15_005, 4 * WEEK, "tokens"))
    decisions = await trial.together(200, lambda: trial.store.admit(key, plan, 1, (100,), now))
    same(sum(decision.admitted for decision in decisions), 150, "exactly the budget is reserved")
    same(await trial.remaining(key, plan), (850, 5), "what was refused consumed nothing")


# --- tokens ----------------------------------------------------------------------------------------------------------


@_check()
async def without_an_estimate_tokens_are_told_and_not_asked(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(10, DAY), Window(100, DAY, "tokens"))
    await trial.reserve(key, plan, (100,))
    decision = await trial.admit(key, plan, 1, None)
    same((decision.admitted, decision.remaining), (True, (8, 0)), "None asks no token window")


@_check("token-estimates")
async def an_estimate_of_nothing_is_refused_when_nothing_remains(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(10, DAY), Window(100, DAY, "tokens"), Window(50, DAY, "input-tokens"))
    same((await trial.admit(key, plan, 1, (0, 0))).remaining, (9, 100, 50), "0 reserves nothing")
    await trial.reserve(key, plan, (99, 50))
    refused = await trial.admit(key, plan, 1, (0, 0))
    same((refused.refused_by, refused.remaining), ((2,), (8, 1, 0)), "0 is refused where nothing remains")


@_check("token-estimates")
async def an_estimate_that_can_never_fit_is_refused(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(10, DAY), Window(100, DAY, "tokens"))
    for amount in (101, 10**12):
        refused = await trial.admit(key, plan, 1, (amount,))
        same((refused.refused_by, refused.remaining), ((1,), (10, 100)), f"{amount} is over a limit of 100")
    same((await trial.admit(key, plan, 1, (100,))).remaining, (9, 0), "the whole limit can be reserved")


@_check("refunds")
async def what_was_not_used_comes_back_once(trial: Trial) -> None:
    key = trial.key()
    plan = trial.plan(Window(10, DAY), Window(1_000, DAY, "tokens"), Window(500, DAY, "output-tokens"))
    lease = await trial.reserve(key, plan, (400, 300))
    for used in ((300, 0), (0, 0), (900, 400)):
        same(await trial.settle(lease, *used), (700, 500), "only the first settlement counts")
    same(lease.settled, True, "the lease says that it is settled")
    same(await trial.remaining(key, plan), (9, 700, 500), "the request stays counted")


@_check("refunds", "concurrency")
async def settling_twice_at_once_is_settling_once(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1_000, DAY, "tokens"))
    kept = await trial.reserve(key, plan, (300,))
    lease = await trial.reserve(key, plan, (400,))
    now = trial.clock.time()
    await trial.together(8, lambda: trial.store.settle(lease, (100,), now))
    same(await trial.remaining(key, plan), (600,), "300 came back, once")
    same(await trial.settle(kept, 300), (600,), "the other lease still holds its own")


@_check("overdraft")
async def use_beyond_the_reservation_is_charged(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(10, DAY), Window(1_000, DAY, "tokens"))
    lease = await trial.reserve(key, plan, (100,))
    same(await trial.settle(lease, 350), (650,), "more than was reserved is charged")
    lease = await trial.reserve(key, plan, (0,))
    same(await trial.settle(lease, 700), (0,), "more than remained is charged too")
    same((await trial.admit(key, plan, 1, (0,))).admitted, False, "an overdrawn budget refuses")
    same((await trial.admit(key, plan, 1, None)).admitted, True, "the requests are untouched")


@_check("overdraft")
async def an_absurd_report_breaks_nothing(trial: Trial) -> None:
    plan = trial.plan(Window(10, DAY), Window(10**12, DAY, "tokens"))
    for number, used in enumerate((10**15, 2**63, 10**30)):
        key = trial.key(str(number))
        lease = await trial.reserve(key, plan, (0,))
        same(await trial.settle(lease, used), (0,), f"{used} tokens leave nothing")
        same(await trial.charge(key, plan, 1, used), (0,), f"{used} tokens more leave nothing")
        same((await trial.admit(key, plan, 1, (1,))).refused_by, (1,), "an overdrawn budget refuses")


@_check("overdraft")
async def what_has_happened_is_counted_whatever_the_limits_say(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(5, DAY), Window(1_000, DAY, "tokens"), Window(9, DAY, "input-tokens"))
    same(await trial.charge(key, plan, 2, 300, 4), (700, 5), "a charge counts")
    same(await trial.remaining(key, plan), (3, 700, 5), "a charge counts in every window")
    same(await trial.charge(key, plan, 0, 0, 0), (700, 5), "nothing changes nothing")
    same(await trial.charge(key, plan, 7, 900, 1), (0, 4), "a charge is not refused")
    refused = await trial.admit(key, plan, 1, (1, 1))
    same((set(refused.refused_by), refused.remaining), ({0, 1}, (0, 0, 4)), "what was charged is used")
    same((await trial.admit(key, plan, 0)).admitted, True, "a cost of 0 passes even then")


@_check("extend", "refunds")
async def a_lease_is_extended_by_all_or_nothing(trial: Trial) -> None:
    key = trial.key()
    plan = trial.plan(Window(10, DAY), Window(1_000, DAY, "tokens"), Window(500, DAY, "output-tokens"))
    lease = await trial.reserve(key, plan, (400, 100))
    same(await trial.extend(lease, 300, 100), (300, 300), "what is extended is reserved")
    same(lease.reserved, (700, 200), "the lease says what it holds")
    for more in ((301, 0), (0, 301), (100, 301)):
        same(await trial.extend(lease, *more), None, f"{more} does not fit")
    same(lease.reserved, (700, 200), "what did not fit is not held")
    same(await trial.remaining(key, plan), (9, 300, 300), "what did not fit is not charged; no request is counted")
    same(await trial.extend(lease, 300, 0), (0, 300), "what fits exactly is reserved")
    same(await trial.extend(lease, 0, 1), (0, 299), "a window of which nothing more is asked does not refuse")
    same(await trial.settle(lease, 650, 201), (350, 299), "a settlement is for the whole lease")
    same(await trial.extend(lease, 1, 1), None, "a settled lease is not open")
    same(await trial.remaining(key, plan), (9, 350, 299), "a settled lease holds nothing")


@_check("extend", "refunds")
async def an_extended_lease_gives_everything_back(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1_000, DAY, "tokens"))
    lease = await trial.reserve(key, plan, (200,))
    for _ in range(5):
        await trial.extend(lease, 100)
    same(await trial.settle(lease, 0), (1_000,), "all parts of a lease come back")


@_check("extend", "overdraft")
async def an_extended_lease_charges_what_it_did_not_hold(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1_000, DAY, "tokens"))
    lease = await trial.reserve(key, plan, (200,))
    await trial.extend(lease, 100)
    same(await trial.settle(lease, 450), (550,), "more than all parts is charged once")


@_check("extend", "concurrency")
async def of_extensions_at_once_exactly_the_budget_is_reserved(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(3_050, DAY, "tokens"))
    lease = await trial.reserve(key, plan, (50,))
    now = trial.clock.time()
    lefts = await trial.together(40, lambda: trial.store.extend(lease, (100,), now))
    same(sum(left is not None for left in lefts), 30, "exactly the budget is reserved")
    same(lease.reserved, (3_050,), "the lease says what it holds")
    same(await trial.settle(lease, 3_000), (50,), "and settles it")


# --- levels ----------------------------------------------------------------------------------------------------------


def _team(trial: Trial) -> tuple[Plan, Plan, Plan]:
    """A user's plan, their organisation's, and both together."""
    user = trial.plan(Window(3, DAY), Window(10, WEEK), Window(500, DAY, "tokens"), name="user")
    org = trial.plan(Window(4, DAY), Window(700, DAY, "tokens"), Window(90, DAY, "output-tokens"), name="org")
    return user, org, trial.plan(name="team", levels=(user, org))


@_check("levels", "all-or-nothing")
async def levels_are_admitted_together_or_not_at_all(trial: Trial) -> None:
    _, _, team = _team(trial)
    org = trial.key("org")
    ann, ben = (trial.key("ann"), org), (trial.key("ben"), org)
    decision = await trial.admit(ann, team, 3, (200, 300, 10))
    same(decision.remaining, (0, 7, 1, 300, 400, 80), "requests of all levels come first, then their tokens")
    same(decision.key, ann, "the decision names a bucket on each level")
    refused = await trial.admit(ben, team, 2, (0, 0, 0))
    same((refused.refused_by, refused.remaining), ((2,), (3, 10, 1, 500, 400, 80)), "the second level refuses for both")
    refused = await trial.admit(ann, team, 1, (0, 0, 0))
    same((refused.refused_by, refused.remaining), ((0,), (0, 7, 1, 300, 400, 80)), "the first level refuses for both")
    refused = await trial.admit(ann, team, 2, (301, 401, 0))
    same(set(refused.refused_by), {0, 2, 3, 4}, "every window that refuses is named, on all levels")
    waits = [refused.reset[index] - refused.at for index in refused.refused_by]
    same(waits, sorted(waits, reverse=True), "the longest wait comes first in refused_by")
    holds(abs(refused.retry_after - waits[0]) < 0.001, f"retry_after {refused.retry_after} is the longest of {waits}")
    decision = await trial.admit(ben, team, 1, (100, 100, 80))
    same(decision.remaining, (2, 9, 0, 400, 300, 0), "what fits on all levels is admitted")


@_check("levels", "refunds")
async def a_lease_of_levels_is_settled_on_all_of_them(trial: Trial) -> None:
    _, _, team = _team(trial)
    org = trial.key("org")
    ann, ben = (trial.key("ann"), org), (trial.key("ben"), org)
    lease = await trial.reserve(ann, team, (200, 300, 10))
    for used in ((150, 250, 10), (0, 0, 0)):
        same(await trial.settle(lease, *used), (350, 450, 80), "only the first settlement counts, on each level")
    same(await trial.remaining(ben, team), (3, 10, 3, 500, 450, 80), "the organisation's part is everybody's")


@_check("levels", "extend", "refunds")
async def a_lease_of_levels_is_extended_on_all_or_none(trial: Trial) -> None:
    _, _, team = _team(trial)
    key = (trial.key("ann"), trial.key("org"))
    lease = await trial.reserve(key, team, (200, 200, 10))
    same(await trial.extend(lease, 100, 501, 0), None, "the second level refuses for both")
    same(await trial.extend(lease, 301, 100, 0), None, "the first level refuses for both")
    same((await trial.remaining(key, team))[3:], (300, 500, 80), "what did not fit is not charged on any level")
    same(await trial.extend(lease, 300, 400, 0), (0, 100, 80), "what is extended is reserved on all levels")
    same(lease.reserved, (500, 600, 10), "the lease says what it holds")
    same(await trial.settle(lease, 100, 100, 0), (400, 600, 90), "and gives back on all of them")


@_check("levels", "overdraft")
async def what_has_happened_is_counted_on_all_levels(trial: Trial) -> None:
    _, _, team = _team(trial)
    key = (trial.key("ann"), trial.key("org"))
    same(await trial.charge(key, team, 2, 2, 2, 600, 600, 5), (0, 100, 85), "a charge counts on each level")
    same(await trial.remaining(key, team), (1, 8, 2, 0, 100, 85), "requests as well")


@_check("levels")
async def callers_of_levels_never_share_a_counter(trial: Trial) -> None:
    one = trial.plan(Window(1, DAY), name="one")
    team = trial.plan(name="team", levels=(one, one))
    root = trial.key("")
    apart = [("a:b", "c"), ("a", "b:c"), ("{c", "d}"), ("d}", "{c"), ("a\0", "e"), ("a", "\0e"), ("", "f"), ("f", "")]
    apart = [(first + str(number), second + str(number)) for number, (first, second) in enumerate(apart)]
    for first, second in apart:
        decision = await trial.admit((root + first, root + second), team)
        same(decision.admitted, True, f"{(first, second)} is counted on its own")


@_check("levels", "concurrency", "all-or-nothing")
async def of_requests_of_many_users_at_once_exactly_the_limit_of_all_passes(trial: Trial) -> None:
    user = trial.plan(Window(1_000, DAY), name="user")
    org = trial.plan(Window(150, DAY), name="org")
    team = trial.plan(name="team", levels=(user, org))
    users = [(trial.key(str(number)), trial.key("org")) for number in range(4)]
    now, turns = trial.clock.time(), iter(range(200))
    decisions: list[Decision] = await trial.together(
        200, lambda: trial.store.admit(users[next(turns) % 4], team, 1, None, now)
    )
    same(sum(decision.admitted for decision in decisions), 150, "exactly the limit of the organisation passes")
    spent = [1_000 - (await trial.remaining(key, team))[0] for key in users]
    same(sum(spent), 150, "what was refused consumed nothing on the users' level")


# --- time ------------------------------------------------------------------------------------------------------------


@_check(timed=True)
async def who_waits_as_told_is_admitted_and_not_before(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1, trial.seconds))
    await trial.next_window()
    await trial.admit(key, plan)
    await trial.advance(trial.seconds / 4)
    refused = await trial.admit(key, plan)
    same(refused.admitted, False, "the limit is kept")
    await trial.advance(refused.retry_after - trial.seconds / 10)
    same((await trial.admit(key, plan)).admitted, False, "it is too early")
    await trial.advance(trial.seconds / 8)
    same((await trial.admit(key, plan)).admitted, True, "the wait is over")


@_check("refunds", timed=True)
async def a_refund_reaches_no_later_window(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1_000, trial.seconds, "tokens"))
    await trial.next_window()
    lease = await trial.reserve(key, plan, (900,))
    await trial.next_window()
    later = await trial.admit(key, plan, 1, (700,))
    same(later.remaining, (300,), "the window is new")
    left = await trial.settle(lease, 100)
    _at_most(trial, (await trial.admit(key, plan, 0)).at - later.at, left, 300)


@_check("overdraft", timed=True)
async def an_excess_is_charged_to_the_present_window(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1_000, trial.seconds, "tokens"))
    await trial.next_window()
    lease = await trial.reserve(key, plan, (100,))
    await trial.next_window()
    same(await trial.settle(lease, 350), (750,), "what was not reserved is charged when it is known")


@_check("extend", "refunds", timed=True)
async def the_newest_part_of_a_lease_comes_back_first(trial: Trial) -> None:
    key, plan = trial.key(), trial.plan(Window(1_000, trial.seconds, "tokens"))
    await trial.next_window()
    lease = await trial.reserve(key, plan, (400,))
    await trial.next_window()
    begun = (await trial.admit(key, plan, 0)).at
    same(await trial.extend(lease, 300), (700,), "an extension is charged to the present window")
    left = await trial.settle(lease, 500)
    holds(left[0] >= 900, f"200 of the new part come back: {left}")
    _at_most(trial, (await trial.admit(key, plan, 0)).at - begun, left, 900)
    lease = await trial.reserve(key, plan, (400,))
    await trial.next_window()
    begun = (await trial.admit(key, plan, 0)).at
    await trial.reserve(key, plan, (500,))
    await trial.extend(lease, 300)
    left = await trial.settle(lease, 0)
    _at_most(trial, (await trial.admit(key, plan, 0)).at - begun, left, 500)


def _at_most(trial: Trial, passed: float, left: tuple[int, ...], most: int) -> None:
    """A limit of 1,000 leaves no more than `most`; "gcra" goes on draining while the check runs."""
    drained = 1_000 * passed / trial.seconds + 1 if trial.algorithm == "gcra" and passed else 0
    holds(left[0] <= most + drained, f"what ended with its window comes back to no other: {left}, at most {most}")

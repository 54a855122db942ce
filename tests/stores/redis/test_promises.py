"""What limits in a real server promise when processes die, requests are cancelled, and thousands come at once."""

import asyncio
import contextlib
import gc
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sigil_policy.stores.limits import MONTH, Plan, StoreUnavailableError, Window
from sigil_policy.stores.redis.limits import RedisLimits
from sigil_policy.stores.redis.link import RedisLink, Script
from tests.stores.redis.conftest import LimitsServer
from tests.stores.redis.servers import cluster
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
ALGORITHMS = ["fixed", "sliding", "gcra"]
WEEK = 7 * 86_400
START = 1_700_000_000.0
PATIENT = 30.0
by_every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(limits_server: LimitsServer) -> Any:
    async with a_store(limits_server) as made:
        yield made


@contextlib.asynccontextmanager
async def a_store(server: LimitsServer) -> AsyncIterator[Any]:
    made = RedisLimits(RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT))
    try:
        yield made
    finally:
        await made.aclose()


def plan_of(algorithm: Any, *windows: Window, **options: Any) -> Plan:
    return Plan(name="plan", windows=windows or (Window(1_000, WEEK, "tokens"),), algorithm=algorithm, **options)


async def tokens_left(store: RedisLimits, key: Any, plan: Plan) -> tuple[int, ...]:
    return (await store.admit(key, plan, 0, None)).remaining[len(plan.requests) :]


async def signs_of_life(store: RedisLimits) -> None:
    store.renew()
    # What comes after it on the connection is run after it.
    await store.link.run(Script("wait", "return 1"), [b"any"], [])


async def becomes(remaining: tuple[int, ...], ask: Callable[[], Any]) -> None:
    """What was answered too late is undone soon."""
    for _ in range(6_000):
        found = (await ask()).remaining
        if found == remaining:
            return
        await asyncio.sleep(0.005)
    assert found == remaining


def leases_in(server: LimitsServer) -> int:
    hashes = [key for key in server.found() if not key.endswith(b":log")]
    return sum(field.startswith(b"=") for key in hashes for field in server.call("HKEYS", key))


# --- leases ----------------------------------------------------------------------------------------------------------


@by_every_algorithm
async def test_a_lease_without_a_sign_of_life_comes_back(algorithm: Any, store: Any, move_time: Any) -> None:
    move_time(START)
    plan = plan_of(algorithm, Window(1_000, WEEK, "tokens"), Window(2_000, WEEK * 4, "tokens"), lease=10)
    lease = (await store.admit("a", plan, 1, (400, 400))).lease
    assert await store.extend(lease, (50, 50)) == (550, 1_550)
    kept = (await store.admit("a", plan, 1, (100, 100))).lease
    move_time(START + 9.9)
    assert await tokens_left(store, "a", plan) == (450, 1_450)
    await signs_of_life(store)
    move_time(START + 19)
    assert await tokens_left(store, "a", plan) == (450, 1_450), "both were renewed"
    move_time(START + 30)
    assert await tokens_left(store, "a", plan) == (1_000, 2_000), "nobody gave a sign of life since"
    assert await store.settle(kept, (70, 70)) == (930, 1_930), "who settles after all is charged what was used"
    assert await store.settle(kept, (70, 70)) == (930, 1_930)
    move_time(START + 60)
    assert await store.settle(lease, (30, 30)) == (900, 1_900), "also when the store has forgotten the lease"


@by_every_algorithm
async def test_a_lapsed_lease_stays_charged_if_the_plan_says_so(algorithm: Any, store: Any, move_time: Any) -> None:
    move_time(START)
    plan = plan_of(algorithm, lease=10, lapsed="charged")
    leases = [(await store.admit("a", plan, 1, (100,))).lease for _ in range(3)]
    move_time(START + 15)
    assert await tokens_left(store, "a", plan) == (700,)
    assert await store.settle(leases[0], (40,)) == (760,)
    move_time(START + 40)
    assert await tokens_left(store, "a", plan) == (760,)
    assert await store.settle(leases[1], (130,)) == (730,), "only what goes beyond the reservation"
    assert await store.settle(leases[2], (40,)) == (730,), "what was forgotten does not come back"


@by_every_algorithm
async def test_a_settlement_whose_reply_was_lost_may_be_repeated(
    algorithm: Any, store: Any, limits_server: LimitsServer, move_time: Any
) -> None:
    move_time(START)
    plan = plan_of(algorithm, lease=10)
    done, undone, late = [(await store.admit("a", plan, 1, (100,))).lease for _ in range(3)]
    await store.settle(done, (130,))
    # The server did it, and nobody heard.
    done.settled = False
    assert await store.settle(done, (130,)) == (670,)
    # The server did not, and nobody knows.
    undone.tried = late.tried = True
    assert await store.settle(undone, (10,)) == (760,)
    move_time(START + 12)
    assert await store.settle(late, (10,)) == (850,), "130, 10 and 10"
    assert leases_in(limits_server) == 0


@by_every_algorithm
async def test_a_lapsed_lease_is_made_whole_or_refused(algorithm: Any, store: Any, move_time: Any) -> None:
    move_time(START)
    plan = plan_of(algorithm, lease=10)
    lease = (await store.admit("a", plan, 1, (400,))).lease
    move_time(START + 11)
    other = (await store.admit("a", plan, 1, (700,))).lease
    assert await store.extend(lease, (1,)) is None
    assert await store.settle(other, (100,)) == (900,)
    assert await store.extend(lease, (1,)) == (499,)
    assert await store.settle(lease, (500,)) == (400,)


async def test_what_lapses_comes_back_to_no_later_window(store: Any, move_time: Any) -> None:
    move_time(START)
    plan = plan_of("fixed", Window(1_000, 40, "tokens"), lease=10)
    await store.admit("a", plan, 1, (900,))
    move_time(START + 40)
    assert (await store.admit("a", plan, 1, (300,))).remaining == (700,)


@by_every_algorithm
async def test_leases_of_another_tier_and_of_levels_lapse_as_well(algorithm: Any, store: Any, move_time: Any) -> None:
    move_time(START)
    units = (Window(1_000, WEEK, "input-tokens"), Window(500, WEEK, "output-tokens"), Window(9, WEEK))
    wide, narrow = plan_of(algorithm, *units, lease=10), plan_of(algorithm, Window(9, WEEK), Window(9, 60, "tokens"))
    team = Plan(name="team", levels=(wide, wide))
    await store.admit("org", wide, 1, (100, 50))
    await store.admit(("ann", "org"), team, 1, (100, 50, 100, 50))
    await store.admit(("ben", "org"), team, 1, (100, 50, 100, 50))
    move_time(START + 11)
    assert (await store.admit("org", narrow, 1, (1,))).admitted
    assert await tokens_left(store, "org", wide) == (1_000, 500)
    assert await tokens_left(store, ("ann", "org"), team) == (1_000, 500, 1_000, 500)


@by_every_algorithm
async def test_thousands_of_lapsed_leases_are_found_page_by_page(
    algorithm: Any, store: Any, limits_server: LimitsServer, move_time: Any
) -> None:
    move_time(START)
    plan = plan_of(algorithm, Window(10**9, WEEK, "tokens"), lease=10)
    for _ in range(20):
        await asyncio.gather(*[store.admit("a", plan, 1, (1_000,)) for _ in range(100)])
    move_time(START + 11)
    lefts = [await tokens_left(store, "a", plan) for _ in range(12)]
    assert lefts[0] < lefts[-1], "one request does not look at all of them"
    if algorithm != "gcra":
        # There, what lapses comes back in the order of the pages, and less of what others had refunds after.
        assert lefts[-1] == (10**9,)
    move_time(START + 100)
    for _ in range(8):
        await tokens_left(store, "a", plan)
    assert leases_in(limits_server) == 0


@steady()
async def test_open_leases_are_renewed_by_a_timer_and_forgotten_ones_are_not(limits_server: LimitsServer) -> None:
    async with a_store(limits_server) as store:
        await renewed_by_a_timer(store, limits_server)


async def renewed_by_a_timer(store: Any, limits_server: LimitsServer) -> None:
    plan = plan_of("fixed", lease=0.6)
    tasks = len(asyncio.all_tasks())
    kept = (await store.admit("a", plan, 1, (100,))).lease
    leaked = (await store.admit("b", plan, 1, (100,))).lease
    short = (await store.admit("a", plan, 1, (7,))).lease
    await store.settle(short, (7,))
    del leaked
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0.18)
        assert len(asyncio.all_tasks()) <= tasks
    assert await tokens_left(store, "a", plan) == (893,), "after three periods"
    assert await tokens_left(store, "b", plan) == (1_000,)
    assert await store.settle(kept, (100,)) == (893,)
    before = limits_server.calls()
    await asyncio.sleep(0.5)
    assert limits_server.calls() == before, "no lease is open: there is nothing to renew"
    assert all(heart.timer is None for heart in store._hearts.values())


async def test_many_open_leases_are_renewed_some_at_a_time_and_refuse_no_request(limits_server: LimitsServer) -> None:
    plan = plan_of("fixed")
    link = RedisLink(limits_server.url, deadline=PATIENT, connect_timeout=PATIENT, max_in_flight=100)
    store = RedisLimits(link)
    leases: list[Any] = []
    for start in range(0, 600, 50):
        names = [f"caller {number}" for number in range(start, start + 50)]
        leases += [got.lease for got in await asyncio.gather(*[store.admit(name, plan, 1, (10,)) for name in names])]
    (heart,) = store._hearts.values()
    before, at = link.counters, asyncio.get_running_loop().time()
    store.renew()
    assert link.counters.runs == before.runs + 50, "no more in this turn, and half of the room is for requests"
    asked = 0
    while heart.unanswered:
        await store.admit("another", plan, 1, None)
        asked += 1
    assert asked > 5, "requests go between"
    after = link.counters
    assert (after.lost, after.refused) == (before.lost, before.refused) == (0, 0)
    assert after.runs == before.runs + 600 + asked
    assert all(lease.seen >= at for lease in leases)
    await store.aclose()


async def test_leases_that_could_not_be_renewed_are_tried_again_soon(
    limits_server: LimitsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = RedisLink(limits_server.url, deadline=PATIENT, connect_timeout=PATIENT)
    store, plan = RedisLimits(link), plan_of("fixed")
    lease: Any = (await store.admit("a", plan, 1, (10,))).lease
    loop = asyncio.get_running_loop()
    (heart,) = store._hearts.values()
    seen = lease.seen
    sent: list[Any] = []

    def lose(*_: Any) -> asyncio.Future[Any]:
        sent.append(loop.create_future())
        sent[-1].cancel()
        return sent[-1]

    monkeypatch.setattr(store.link, "send", lose)
    for tries in (1, 2):
        store.renew()
        for _ in range(3):
            await asyncio.sleep(0)
        assert (lease.seen, len(sent), heart.unanswered) == (seen, tries, 0)
        assert heart.timer is not None
        assert 0 < heart.timer.when() - loop.time() <= lease.period / 3
    lease.seen -= lease.period
    before = loop.time()
    store.renew()
    for _ in range(3):
        await asyncio.sleep(0)
    soon = lease.period / 10
    assert before + soon <= heart.timer.when() <= loop.time() + soon, "not at once for ever"
    monkeypatch.undo()
    store.renew()
    await tokens_left(store, "a", plan)
    assert lease.seen >= seen
    await store.aclose()
    assert heart.timer.cancelled()


# --- who does not wait -----------------------------------------------------------------------------------------------


@by_every_algorithm
@pytest.mark.parametrize("levels", [False, True], ids=["one level", "levels"])
async def test_a_request_that_is_cancelled_leaves_nothing_behind(
    algorithm: Any, levels: bool, store: Any, limits_server: LimitsServer
) -> None:
    one = plan_of(algorithm, Window(50, WEEK), Window(3, 2 * WEEK), Window(1_000, WEEK, "tokens"))
    plan = Plan(name="team", levels=(one, one)) if levels else one
    key = ("a", "org") if levels else "a"
    count = 2 if levels else 1
    await store.admit(key, plan, 1, (10,) * count)
    before = (await store.admit(key, plan, 0, None)).remaining
    open_leases = leases_in(limits_server)
    for turns in range(120):
        task = asyncio.create_task(store.admit(key, plan, 5 if turns % 2 else 2, (100,) * count))
        for _ in range(turns // 2):
            # Sooner or later the answer is there when the cancellation comes.
            await asyncio.sleep(0 if turns < 30 else 0.0003 * (turns - 29))
        task.cancel()
        done = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(done[0], asyncio.CancelledError) and done[0].admitted:
            # It was faster: its lease is in good hands, and its requests are counted.
            await store.settle(done[0].lease, (0,) * count)
            break
        await becomes(before, lambda: store.admit(key, plan, 0, None))
    else:
        pytest.fail("every request was cancelled before it was answered")
    assert turns > 2
    assert leases_in(limits_server) == open_leases
    assert limits_server.without_ttl() == []


@by_every_algorithm
async def test_a_request_cancelled_in_the_turn_of_its_answer_leaves_nothing_behind(algorithm: Any, store: Any) -> None:
    plan = plan_of(algorithm, Window(9, WEEK), Window(90, 2 * WEEK), Window(1_000, WEEK, "tokens"))
    await store.admit("a", plan, 0, None)
    run, asked = store.link.run, []
    store.link.run = lambda *args, **options: asked.append(run(*args, **options)) or asked[-1]
    # It takes the first window whole.
    task = asyncio.create_task(store.admit("a", plan, 20, (100,)))
    while not (asked and asked[0].done()):  # noqa: ASYNC110  the turn in which it is done, not a later one
        await asyncio.sleep(0)
    assert task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
    store.link.run = run
    await becomes((9, 90, 1_000), lambda: store.admit("a", plan, 0, None))


@by_every_algorithm
@steady()
async def test_a_request_that_timed_out_leaves_nothing_behind(algorithm: Any, limits_server: LimitsServer) -> None:
    store = RedisLimits(RedisLink(limits_server.url, deadline=0.05, failures=1_000))
    plan = plan_of(algorithm, Window(9, WEEK), Window(1_000, WEEK, "tokens"))
    await store.admit("a", plan, 1, (10,))
    limits_server.call("CLIENT", "PAUSE", 100, "ALL")
    with pytest.raises(StoreUnavailableError):
        await store.admit("a", plan, 1, (100,))
    for _ in range(200):
        await asyncio.sleep(0.02)
        try:
            if (await store.admit("a", plan, 0, None)).remaining == (8, 990):
                break
        except StoreUnavailableError:
            continue
    assert (await store.admit("a", plan, 0, None)).remaining == (8, 990)
    assert leases_in(limits_server) == 1
    await store.aclose()


# --- many at once ----------------------------------------------------------------------------------------------------

LIMIT, BUDGET, HELD = 60, 450, 50
WORKER = """
import asyncio, json, sys
from collections import defaultdict
from sigil_policy.stores.limits import Plan, Window
from sigil_policy.stores.redis.limits import RedisLimits
from sigil_policy.stores.redis.link import RedisLink

async def hammer(store, key, plan, until, found, full):
    refused = False
    while True:
        decision = await store.admit(key, plan, 1, (7,))
        if decision.admitted:
            found.append(decision.at)
            await store.settle(decision.lease, (5,))
        elif decision.retry_after > 60:
            return
        else:
            refused = True
            if 0 in decision.refused_by:
                full.add(int(decision.at))
            await asyncio.sleep(min(decision.retry_after, 0.05))
        # The demand is larger than the limit, however slow the machine.
        if decision.at >= until and refused:
            return

async def main():
    url, seconds, rows = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
    # Where processes do not die, none loses a lease because it stood still.
    lease = 60.0 if seconds else 1.0
    store = RedisLimits(RedisLink(url, deadline=30.0, connect_timeout=30.0))
    plans = [
        (name, Plan(name=name, windows=[Window(*window) for window in windows], algorithm=algorithm, lease=lease))
        for name, algorithm, windows in rows
    ]
    if not seconds:
        held = [(await store.admit(*who, 1, (10,))).lease for who in plans for _ in range(50)]
        print(len(held), flush=True)
        await asyncio.sleep(60)
    until = (await store.admit("somebody", plans[0][1], 0, None)).at + seconds
    found, full = {name: [] for name, _ in plans}, defaultdict(set)
    await asyncio.gather(
        *[hammer(store, *who, until, found[who[0]], full[who[0]]) for who in plans for _ in range(64)]
    )
    print(json.dumps([found, sorted(full["fixed"])]))
    await store.aclose()

asyncio.run(main())
"""


def worker(server: LimitsServer, seconds: float, rows: list[Any]) -> subprocess.Popen[str]:
    args = [server.url, str(seconds), json.dumps(rows)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *args], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_four_processes_get_the_limit_and_never_more(limits_server: LimitsServer) -> None:
    # Tokens are reserved by sevens, and fives are used: those of one second's requests fit, and of the next only some.
    short = [[LIMIT, 1], [BUDGET, 2, "tokens"]]
    long = [[500, WEEK], [10**9, WEEK, "tokens"]]
    rows = [[algorithm, algorithm, short] for algorithm in ALGORITHMS]
    rows += [[f"all by {algorithm}", algorithm, long] for algorithm in ALGORITHMS]
    workers = [worker(limits_server, 3.3, rows) for _ in range(4)]
    outputs, fulls = zip(*[json.loads(process.communicate(timeout=200)[0]) for process in workers], strict=True)
    found = {name: sorted(round(at * 1e6) for output in outputs for at in output[name]) for name, _, _ in rows}
    for algorithm in ALGORITHMS:
        assert len(found[f"all by {algorithm}"]) == 500, "the demand was larger: all of the limit, and not one more"
        for most, length, unit in ((LIMIT, 1_000_000, 1), (BUDGET, 2_000_000, 5)):
            assert most_in_a_window(algorithm, found[algorithm], most, length, unit) <= most + 0.001
    # The seconds in which somebody was refused: all of the limit was admitted.
    seconds = set().union(*fulls)
    assert seconds
    for second in seconds:
        assert sum(at // 1_000_000 == second for at in found["fixed"]) == LIMIT


def most_in_a_window(algorithm: str, moments: list[int], most: int, length: int, unit: int) -> float:
    """The most that was used, in the words of the algorithm."""
    if algorithm == "fixed":
        counts: dict[int, int] = {}
        for at in moments:
            counts[at // length] = counts.get(at // length, 0) + unit
        return max(counts.values())
    worst = level = 0.0
    first, before = 0, moments[0]
    for last, at in enumerate(moments):
        if algorithm == "sliding":
            while moments[first] <= at - length:
                first += 1
            level = (last - first + 1) * unit
        else:
            # As if only what was used had been poured: the least that the level can have been.
            level = max(level - (at - before) * most / length, 0.0) + unit
            before = at
        worst = max(worst, level)
    return worst


@steady(others=True)
async def test_the_budget_is_whole_after_a_process_was_killed(limits_server: LimitsServer) -> None:
    async with a_store(limits_server) as store:
        await killed(store, limits_server)


async def killed(store: Any, limits_server: LimitsServer) -> None:
    windows = [[10**6, WEEK], [1_000, WEEK, "tokens"]]
    process = worker(limits_server, 0, [[algorithm, algorithm, windows] for algorithm in ALGORITHMS])
    try:
        await held_and_freed(store, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # a pipe


async def held_and_freed(store: Any, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == f"{3 * HELD}\n"
    plans = {by: plan_of(by, Window(10**6, WEEK), Window(1_000, WEEK, "tokens")) for by in ALGORITHMS}
    # Longer than the period of a lease: they are renewed while the process lives.
    await asyncio.sleep(1.2)
    assert [await tokens_left(store, *who) for who in plans.items()] == [(500,)] * 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    await asyncio.sleep(1.1)
    assert [await tokens_left(store, *who) for who in plans.items()] == [(1_000,)] * 3


@pytest.mark.parametrize(("algorithm", "rounds"), [("fixed", 50), ("sliding", 10)])
async def test_of_ten_thousand_endings_what_was_produced_is_charged(
    algorithm: Any, rounds: int, store: Any, limits_server: LimitsServer
) -> None:
    chance = random.Random(7)
    plan = plan_of(algorithm, Window(10**9, WEEK), Window(10**12, 60 * WEEK, "tokens"), lease=60)
    produced = requests = 0

    async def one() -> None:
        nonlocal produced, requests
        estimate, ending = chance.randrange(1_000), chance.randrange(6)
        asking = asyncio.create_task(store.admit("a", plan, 1, (estimate,)))
        if ending == 0:
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if asking.cancel() and isinstance(
                (await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError
            ):
                return
        decision = await asking
        requests += 1
        used = (0, chance.randrange(estimate + 1), estimate, estimate + chance.randrange(500))[ending % 4]
        if ending == 4:
            await store.extend(decision.lease, (chance.randrange(300),))
        produced += used
        await store.settle(decision.lease, (used,))
        if ending == 5:
            decision.lease.settled = False
            await store.settle(decision.lease, (used + 1,))

    for _ in range(rounds):
        await asyncio.gather(*[one() for _ in range(200)])
    await becomes((10**9 - requests, 10**12 - produced), lambda: store.admit("a", plan, 0, None))
    assert leases_in(limits_server) == 0
    assert limits_server.without_ttl() == []


# --- time and numbers ------------------------------------------------------------------------------------------------


async def test_months_of_the_calendar_end_when_they_end(store: Any, move_time: Any) -> None:
    chance = random.Random(1)
    plan = plan_of("fixed", Window(5, MONTH, calendar="month"))
    days = [
        datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=chance.randrange(140 * 31_556_952)) for _ in range(300)
    ]
    days += [datetime(year, 2, 28, 23, 59, 59, tzinfo=UTC) for year in (1972, 1999, 2000, 2024, 2100)]
    for day in days:
        move_time(day.timestamp())
        decision = await store.admit(f"{day}", plan, 1, None)
        after = day.replace(
            year=day.year + day.month // 12, month=day.month % 12 + 1, day=1, hour=0, minute=0, second=0
        )
        assert decision.reset == (after.timestamp(),)
    move_time(datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())
    assert (await store.admit("a", plan, 4, None)).remaining == (1,)
    move_time(datetime(2027, 1, 1, tzinfo=UTC).timestamp())
    assert (await store.admit("a", plan, 4, None)).remaining == (1,)


@by_every_algorithm
async def test_a_server_clock_that_is_set_back_gives_nobody_a_fresh_quota(
    algorithm: Any, store: Any, move_time: Any
) -> None:
    plan = plan_of(algorithm, Window(3, 60), Window(100, 60, "tokens"))
    move_time(START)
    lease = (await store.admit("a", plan, 3, (100,))).lease
    for back in (0.5, 59, 3_600, 10**6):
        move_time(START - back)
        decision = await store.admit("a", plan, 1, (1,))
        assert (decision.admitted, decision.remaining) == (False, (0, 0))
        assert decision.retry_after > 0
        store._denials.clear()
    assert await store.settle(lease, (40,)) == (60,)
    move_time(START + 61)
    assert (await store.admit("a", plan, 3, (1,))).admitted


@by_every_algorithm
async def test_the_largest_numbers_are_counted_exactly(algorithm: Any, store: Any) -> None:
    most = 999_999_999_999_999
    plan = plan_of(algorithm, Window(most, 60 * WEEK), Window(most, 60 * WEEK, "tokens"))
    decision = await store.admit("a", plan, 1, (most,))
    assert decision.admitted
    if algorithm != "gcra":
        assert decision.remaining == (most - 1, 0)
        assert await store.settle(decision.lease, (most - 3,)) == (3,)
        assert (await store.admit("a", plan, most - 1, (3,))).remaining == (0, 0)


async def test_what_the_server_evicts_is_forgotten_and_nothing_stays_for_ever(
    store: Any, limits_server: LimitsServer
) -> None:
    plan = plan_of("sliding", Window(5, WEEK), Window(1_000, WEEK, "tokens"))
    for part in (b":log", b"}"):
        lease = (await store.admit("a", plan, 1, (100,))).lease
        await store.admit("a", plan, 1, (100,))
        (victim,) = [key for key in limits_server.found() if key.endswith(part)]
        limits_server.call("DEL", victim)
        decision = await store.admit("a", plan, 1, (100,))
        assert decision.admitted
        await store.settle(lease, (50,))
        assert limits_server.without_ttl() == []
        for _ in range(10):
            last = await store.admit("a", plan, 1, (1,))
        assert not last.admitted
        assert last.refused_by == (0,)
        store._denials.clear()
        limits_server.empty()


async def test_a_long_log_is_cut_and_counts_on(store: Any, limits_server: LimitsServer, move_time: Any) -> None:
    plan = plan_of("sliding", Window(700, 60), Window(10**9, 60, "tokens"))
    move_time(START)
    for minute in range(6):
        for tenth in range(10):
            move_time(START + 60 * minute + 6 * tenth)
            for _ in range(7):
                decisions = await asyncio.gather(*[store.admit("a", plan, 1, (3,)) for _ in range(10)])
                assert all(decision.admitted for decision in decisions)
        assert not (await store.admit("a", plan, 1, (3,))).admitted
        store._denials.clear()
    (log,) = [key for key in limits_server.found() if key.endswith(b":log")]
    assert limits_server.call("STRLEN", log) < 2 * 2 * 1_400 * 16
    assert limits_server.without_ttl() == []


# --- a cluster -------------------------------------------------------------------------------------------------------


async def test_all_levels_of_a_request_are_on_one_node_of_a_cluster() -> None:
    with cluster() as nodes:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        store = RedisLimits(RedisLink(f"redis+cluster://{hosts}", deadline=PATIENT, connect_timeout=PATIENT))
        for algorithm in ALGORITHMS:
            one = plan_of(algorithm, Window(50, WEEK), Window(1_000, WEEK, "tokens"))
            team = Plan(name="team", levels=(one, one, one))
            for number in range(20):
                key = (f"key {number}", f"user {number}", f"org {number % 5}")
                lease = (await store.admit(key, team, 1, (100,) * 3)).lease
                assert await store.extend(lease, (10,) * 3) is not None
                assert (await store.settle(lease, (50,) * 3))[2] == 950 - 50 * (number // 5)
        await store.aclose()

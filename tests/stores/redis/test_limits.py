"""Limits in a real server answer as the definitions say, and leave nothing behind."""

import asyncio
from collections.abc import Callable
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from pydantic import SecretStr

from sigil_policy.stores.limits import Plan, StoreUnavailableError, Window
from sigil_policy.stores.memory import memory_limits
from sigil_policy.stores.redis import limits
from sigil_policy.stores.redis.limits import RedisLimits
from sigil_policy.stores.redis.link import RedisLink, Script
from sigil_policy.testing import FrozenClock
from sigil_policy.testing.stores import Check, check_limit_store, limit_store_checks
from tests.stores.oracle import Oracle
from tests.stores.redis.conftest import LimitsServer
from tests.stores.test_memory import CALLERS, START, TIERS, WIDER, renewed_as_said, traces

ALGORITHMS = ["fixed", "sliding", "gcra"]
# A store that is well may still be slow on a machine that is busy with other things.
PATIENT = 30.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


WEEK = 7 * 86_400


def made(server: LimitsServer, **options: Any) -> RedisLimits:
    return RedisLimits(RedisLink(server.url, deadline=PATIENT, connect_timeout=PATIENT), **options)


async def pass_time(store: RedisLimits, move: Any, now: float, seconds: float) -> float:
    """Move the server's time, with signs of life for open leases on the way."""
    end = now + seconds
    while now < end:
        now = min(now + 20, end)
        move(now)
        store.renew()
        # What comes after it on the connection is run after it.
        await store.link.run(Script("wait", "return 1"), [b"any"], [])
    return now


# --- the suite that every store passes -------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("check", [check for check in limit_store_checks() if check.timed], ids=str)
async def test_the_checks_of_every_store_that_move_time(
    check: Check, algorithm: Any, limits_server: LimitsServer, move_time: Callable[[float], None]
) -> None:
    clock = FrozenClock()
    store = made(limits_server, clock=clock)
    move_time(clock.time())

    async def advance(seconds: float) -> None:
        await pass_time(store, move_time, clock.time(), seconds)
        clock.advance(seconds)

    await check(lambda: store, algorithm=algorithm, clock=clock, advance=advance)


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_the_checks_of_every_store(algorithm: Any, limits_server: LimitsServer) -> None:
    await check_limit_store(lambda: made(limits_server), algorithm=algorithm)
    assert limits_server.found()
    assert limits_server.without_ttl() == []


def by(algorithm: Any, callers: Any) -> list[Any]:
    """The same callers, counted by another algorithm."""
    made: dict[Plan, Plan] = {}

    def remade(plan: Plan) -> Plan:
        if plan not in made:
            levels = tuple(map(remade, plan.levels))
            windows = () if levels else plan.windows
            made[plan] = Plan(name=plan.name, windows=windows, levels=levels, algorithm=algorithm)
        return made[plan]

    return [(key, remade(plan)) for key, plan in callers]


# --- against an exact count ------------------------------------------------------------------------------------------


def replay(
    server: LimitsServer, move: Any, algorithm: Any, trace: list[Any], callers: Any, refunds: bool = True
) -> None:
    """Ask the store and the oracle the same, and compare all that they say."""

    async def ask() -> None:
        store, oracle, now = made(server, denial_cache=0), Oracle(algorithm), START
        move(now)
        oracle.moment(now)
        open_leases: list[Any] = []
        for step in trace:
            if step[0] in ("pass", "jump"):
                now = await pass_time(store, move, now, abs(step[1]))
                continue
            if step[0] in ("extend", "settle"):
                if not open_leases:
                    continue
                index = step[1] % len(open_leases)
                lease, hold = open_leases[index]
                given = tuple(step[2][: len(hold.rows)])
                if step[0] == "extend":
                    assert await store.extend(lease, given) == oracle.extend(hold, given, now)
                    assert lease.reserved == hold.reserved
                    continue
                del open_leases[index]
                if not refunds:
                    given = tuple(map(max, given, hold.reserved))
                left = await store.settle(lease, given)
                assert left == oracle.settle(hold, given, now)
                assert await store.settle(lease, (1_000,) * len(given)) == left
                assert await store.extend(lease, (0,) * len(given)) is None
                continue
            key, plan = callers[step[1] % len(callers)]
            given = None if step[3] is None else tuple(step[3][: len(plan.tokens)])
            if step[0] == "charge":
                charged = tuple(step[2][: len(plan.requests)]) + given
                assert await store.charge(key, plan, charged) == oracle.charge(key, plan, charged, now)
                continue
            if given is not None:
                given = tuple(map(min, given, (window.limit for window in plan.tokens)))
            decision = await store.admit(key, plan, step[2], given)
            answer = oracle.admit(key, plan, step[2], given, now)
            assert (decision.admitted, decision.remaining) == (answer.admitted, answer.remaining)
            assert set(decision.refused_by) == answer.refused_by
            assert (decision.key, decision.at) == (key, now)
            assert (decision.lease is None) == (answer.hold is None)
            renewed_as_said(oracle, key, plan, step[2], given, now, decision)
            if decision.lease is not None:
                open_leases.append((decision.lease, answer.hold))
        await store.aclose()

    server.empty()
    asyncio.run(ask())
    assert server.without_ttl() == []


@given(trace=traces)
def test_fixed_windows_answer_as_the_exact_count_does(trace: list[Any], limits_server: Any, move_time: Any) -> None:
    replay(limits_server, move_time, "fixed", trace, by("fixed", CALLERS + TIERS + WIDER))


@given(trace=traces)
def test_the_sliding_log_answers_as_the_exact_count_does(trace: list[Any], limits_server: Any, move_time: Any) -> None:
    replay(limits_server, move_time, "sliding", trace, by("sliding", CALLERS + TIERS))


@given(trace=traces)
def test_gcra_answers_as_the_exact_bucket_does(trace: list[Any], limits_server: Any, move_time: Any) -> None:
    replay(limits_server, move_time, "gcra", trace, by("gcra", CALLERS), refunds=False)


# --- the shorter way -------------------------------------------------------------------------------------------------


def told(server: LimitsServer, prefix: str) -> dict[str, Any]:
    """All that is written under a prefix: fields and values, leases without their names, and the time to live."""
    found: dict[str, Any] = {}
    keys: Any = server.client.keys(f"{prefix}:1:*")
    for key in keys:
        fields: Any = server.client.hgetall(key)
        leases = sorted(value for name, value in fields.items() if name.startswith(b"="))
        known = {name: value for name, value in fields.items() if not name.startswith(b"=")}
        found[key.decode().removeprefix(prefix)] = (known, leases)
    return found


@pytest.mark.parametrize("algorithm", ["fixed", "gcra"])
@settings(max_examples=40)
@given(trace=traces)
def test_the_shorter_way_decides_and_writes_the_same(
    trace: list[Any], algorithm: Any, limits_server: LimitsServer, move_time: Any
) -> None:
    callers = by(algorithm, CALLERS + TIERS + (WIDER if algorithm == "fixed" else ()))

    async def ask() -> None:
        stores = [made(limits_server, denial_cache=0, prefix=prefix) for prefix in ("short", "long")]
        for _, plan in callers:
            short, long = (store._view(plan) for store in stores)
            longer = plan.levels or any(window.calendar for window in plan.windows)
            assert short.admission is short.scripts["admit" if longer else "admit_at_once"]
            long.admission = long.scripts["admit"]
        now = START
        move_time(now)
        open_leases: list[Any] = []
        for step in trace:
            if step[0] in ("pass", "jump"):
                # The clock may be set back, and leases lapse.
                now += step[1]
                move_time(now)
            elif step[0] in ("extend", "settle"):
                if open_leases:
                    index = step[1] % len(open_leases)
                    pair = open_leases[index] if step[0] == "extend" else open_leases.pop(index)
                    amounts = tuple(step[2][: len(pair[0].reserved)])
                    one, other = [
                        await getattr(store, step[0])(lease, amounts) for store, lease in zip(stores, pair, strict=True)
                    ]
                    assert one == other
            else:
                key, plan = callers[step[1] % len(callers)]
                given = None if step[3] is None else tuple(step[3][: len(plan.tokens)])
                if step[0] == "charge":
                    amounts = tuple(step[2][: len(plan.requests)]) + (given or (0,) * len(plan.tokens))
                    one, other = [await store.charge(key, plan, amounts) for store in stores]
                    assert one == other
                else:
                    one, other = [await store.admit(key, plan, step[2], given) for store in stores]
                    assert one._replace(lease=None) == other._replace(lease=None)
                    if one.lease is not None:
                        open_leases.append((one.lease, other.lease))
            assert told(limits_server, "short") == told(limits_server, "long")
        for store in stores:
            await store.aclose()

    limits_server.empty()
    asyncio.run(ask())


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ["fixed", "gcra"])
async def test_most_admissions_take_the_shorter_way(
    algorithm: Any, limits_server: LimitsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = limits._scripts

    def without_the_rest(algorithm: Any) -> dict[str, Script]:
        known = scripts(algorithm)
        text = known["admit_at_once"].text.decode()
        end = text.index("-- What is known of the levels of a plan")
        return {**known, "admit_at_once": Script("short", text[:end] + "return redis.error_reply('the longer way')")}

    monkeypatch.setattr(limits, "_scripts", without_the_rest)
    store, plan = made(limits_server), a_plan(algorithm=algorithm)
    for left in (4, 3, 2):
        decision = await store.admit("a", plan, 1, (10,))
        assert decision.remaining[0] == left
    assert decision.lease is not None
    await store.settle(decision.lease, (10,))
    assert (await store.admit("a", plan, 2, None)).remaining[0] == 0
    assert not (await store.admit("a", plan, 1, None)).admitted
    with pytest.raises(StoreUnavailableError, match="the longer way"):
        await store.admit("a", a_plan(Window(5, 90), algorithm=algorithm), 1, None)
    await store.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ["fixed", "gcra"])
async def test_what_other_tiers_used_is_kept_until_it_is_of_no_use(
    algorithm: Any, limits_server: LimitsServer, move_time: Any
) -> None:
    store, now = made(limits_server), START
    move_time(now)
    day = a_plan(Window(9, 86_400), algorithm=algorithm)
    assert (await store.admit("a", day, 4, None)).remaining == (5,)
    sizes = []
    for number in range(1, 100):
        now += 60
        move_time(now)
        other = a_plan(Window(9, 60 + number), Window(50, 60 + number, "tokens"), algorithm=algorithm)
        assert (await store.admit("a", other, 1, (5,))).remaining == (8, 45)
        (key,) = limits_server.found()
        sizes.append(limits_server.call("HSTRLEN", key, "w"))
    assert max(sizes) < 700, "what has ended is forgotten: all of it would be ten times as much"
    assert (await store.admit("a", day, 1, None)).remaining[0] in (4, 5), "a bucket has drained a little"
    await store.aclose()


def test_plans_that_the_scripts_cannot_name_are_refused() -> None:
    store = RedisLimits("redis://localhost")
    for plan in (a_plan(Window(1, 10**9)), a_plan(*[Window(1, seconds) for seconds in range(1, 257)])):
        with pytest.raises(ValueError, match=r"a store counts up to 255 windows of less than 10\^9 seconds"):
            store.prepare(plan)


# --- keys ------------------------------------------------------------------------------------------------------------


def a_plan(*windows: Window, **options: Any) -> Plan:
    """Weeks, unless a test moves the time: the server's clock runs, and a minute would end in the middle of a test."""
    return Plan(name="plan", windows=windows or (Window(5, WEEK), Window(100, WEEK, "tokens")), **options)


@pytest.mark.anyio
async def test_keys_are_short_say_nothing_and_end(limits_server: LimitsServer) -> None:
    names = ["alice@example.com", "a\0b", "{a}", "}{", "x" * 10_000, "\ud800", ""]
    for algorithm in ALGORITHMS:
        store = made(limits_server)
        for name in names:
            assert (await store.admit(name, a_plan(algorithm=algorithm), 1, (10,))).remaining == (4, 90)
        team = Plan(name="team", levels=(a_plan(algorithm=algorithm),) * 2)
        await store.admit((names[0], "org"), team, 1, (1, 1))
        await store.aclose()
    found = limits_server.found()
    # Two for each by "sliding". A user of the organisation is the same as without it.
    assert len(found) == 4 * (len(names) + 1)
    assert all(key.startswith(b"sigil:1:") and len(key) < 100 for key in found)
    assert not any(b"alice" in key for key in found)
    assert limits_server.without_ttl() == []
    tags = {key[key.index(b"{") : key.index(b"}")] for key in found}
    assert len(tags) == len(names) + 1


@pytest.mark.anyio
async def test_with_another_digest_key_or_prefix_callers_are_others(limits_server: LimitsServer) -> None:
    options: list[dict[str, Any]] = [{}, {"digest_key": SecretStr("one")}, {"digest_key": SecretStr("two")}]
    options.append({"prefix": "sigil.eu"})
    for option in options:
        for left in (4, 3):
            store = made(limits_server, **option)
            assert (await store.admit("a", a_plan(), 1, None)).remaining == (left, 100)
            await store.aclose()
    assert len(limits_server.found()) == 4


@pytest.mark.anyio
async def test_who_comes_less_often_than_their_window_is_long_keeps_what_was_used(limits_server: LimitsServer) -> None:
    store = made(limits_server)
    long = a_plan(Window(5, 30 * 86_400))
    await store.admit("a", long, 1, None)
    (key,) = limits_server.found()
    before = limits_server.call("PTTL", key)
    assert 30 * 86_400_000 < before < 40 * 86_400_000
    await store.admit("a", a_plan(), 1, (1,))
    assert limits_server.call("PTTL", key) > before - 60_000, "a plan of short windows does not make it end sooner"
    await store.aclose()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefix": "a{b}"}, "prefix must be 1 to 64 letters"),
        ({"prefix": ""}, "prefix must be 1 to 64 letters"),
        ({"digest_key": SecretStr("x" * 65)}, "digest_key must be 1 to 64 bytes, not 65"),
        ({"digest_key": SecretStr("")}, "digest_key must be 1 to 64 bytes, not 0"),
        ({"denial_cache": -1}, "denial_cache must be a number of callers"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RedisLimits("redis://localhost", **options)


def test_secrets_are_not_shown() -> None:
    store = RedisLimits("redis://:hunter2@localhost:6379/0", digest_key=SecretStr("swordfish"))
    assert "hunter2" not in repr(store)
    assert "swordfish" not in repr(store)


def test_a_lease_that_cannot_be_renewed_in_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a lease in a store lasts 0\.1 to 86400\.0 seconds, not 0\.01"):
        RedisLimits("redis://localhost").prepare(a_plan(lease=0.01))


@pytest.mark.anyio
async def test_keys_and_amounts_that_do_not_fit_the_plan_are_refused(limits_server: LimitsServer) -> None:
    store, plan = made(limits_server), a_plan()
    team = Plan(name="team", levels=(plan, plan))
    with pytest.raises(ValueError, match="2 levels: its key is a tuple"):
        await store.admit("a", team, 1, None)
    with pytest.raises(ValueError, match="is not 3 names"):
        await store.admit(("a", "b", "c"), team, 1, None)
    with pytest.raises(ValueError, match="two levels have the same key"):
        await store.admit(("a", "a"), team, 1, None)
    with pytest.raises(ValueError, match="1 token windows"):
        await store.admit("a", plan, 1, (1, 2))
    with pytest.raises(ValueError, match="2 windows"):
        await store.charge("a", plan, (1,))
    assert limits_server.found() == []
    await store.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_what_is_no_whole_number_is_refused_and_changes_nothing(
    algorithm: Any, limits_server: LimitsServer
) -> None:
    store, plan = made(limits_server), a_plan(algorithm=algorithm)
    lease = (await store.admit("a", plan, 1, (10,))).lease
    assert lease is not None
    wrong: list[Any] = [float("nan"), float("inf"), 1.0, "1", True, None, -1, 10**15, 10**400]
    for number in wrong:
        with pytest.raises(ValueError, match="are integers from 0"):
            await store.admit("a", plan, number, None)
        with pytest.raises(ValueError, match="are integers from 0"):
            await store.admit("a", plan, 1, (number,))
        with pytest.raises(ValueError, match="are integers from 0"):
            await store.extend(lease, (number,))
        if type(number) is not int or number < 0:
            with pytest.raises(ValueError, match="are integers from 0"):
                await store.settle(lease, (number,))
            with pytest.raises(ValueError, match="are integers from 0"):
                await store.charge("a", plan, (0, number))
    assert await store.settle(lease, (30,)) == (70,), "the lease is open yet"
    assert (await store.admit("a", plan, 1, None)).remaining == (3, 70)
    await store.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_the_scripts_refuse_what_is_no_number(
    algorithm: Any, limits_server: LimitsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_check_numbers", lambda amounts: None)
    store, plan = made(limits_server), a_plan(algorithm=algorithm)
    for number in (float("nan"), float("inf")):
        amount: Any = number
        with pytest.raises(StoreUnavailableError, match="not a number"):
            await store.admit("a", plan, 1, (amount,))
    assert limits_server.found() == []
    await store.aclose()


# --- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_caller_of_several_organisations_has_one_budget(algorithm: Any, limits_server: LimitsServer) -> None:
    """As in this process."""
    store, here = made(limits_server), memory_limits(algorithm)
    own = a_plan(Window(3, WEEK), algorithm=algorithm)
    team = Plan(name="team", levels=(own, a_plan(Window(100, WEEK), algorithm=algorithm)))
    for number, left in enumerate((2, 1, 0, 0)):
        decision = await store.admit(("ann", f"org {number}"), team, 1, None)
        same = here.admit(("ann", f"org {number}"), team, 1, None, decision.at)
        assert (decision.admitted, decision.remaining) == (same.admitted, same.remaining)
        assert (decision.admitted, decision.remaining[0]) == (number < 3, left)
    assert not (await store.admit("ann", own, 1, None)).admitted, "and it is the one without an organisation"
    await store.aclose()


def test_in_a_cluster_all_keys_of_a_call_have_the_tag_of_the_last_level() -> None:
    plan = a_plan(algorithm="sliding")
    team = Plan(name="team", levels=(plan, plan))

    def keys(url: str) -> list[bytes]:
        store = RedisLimits(url)
        return list(store._keys(("ann", "org"), team, store._view(team)))

    def tags(found: list[bytes]) -> set[bytes]:
        return {key[key.index(b"{") : key.index(b"}")] for key in found}

    clustered, single = keys("redis+cluster://a:1"), keys("redis://a:1")
    assert len(set(clustered)) == len(set(single)) == 4
    assert tags(clustered) == tags(clustered[2:]) == tags(single[2:])
    assert single == keys("redis+sentinel://a:1/main")
    assert len(tags(single)) == 2


# --- how much is read ------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_long_log_is_read_in_part_and_what_it_says_is_never_too_early(
    limits_server: LimitsServer, move_time: Any
) -> None:
    """The same as in this process: exact in the oldest 512 entries, else when all has left."""
    store, plan = made(limits_server), a_plan(Window(1_500, 1_000, "tokens"), algorithm="sliding", lease=5_000)
    here = memory_limits("sliding")
    for number in range(700):
        move_time(START + number)
        assert (await store.admit("a", plan, 1, (1,))).admitted
        assert here.admit("a", plan, 1, (1,), START + number).admitted
    now = START + 700.0
    move_time(now)
    for wanted, reset in ((801, START), (1_312, START + 511), (1_313, START + 699), (1_500, START + 699)):
        refused = await store.admit("a", plan, 1, (wanted,))
        same = here.admit("a", plan, 1, (wanted,), now)
        assert refused.reset == same.reset == (reset + 1_000,)
        assert refused.refused_by == same.refused_by == (0,)
    await store.charge("a", plan, (1_400,))
    here.charge("a", plan, (1_400,), now)
    assert (await store.admit("a", plan, 1, None)).reset == here.admit("a", plan, 1, None, now).reset == (now + 1_000,)
    await store.aclose()


@pytest.mark.anyio
async def test_a_refusal_whose_wait_is_not_exact_is_asked_again(limits_server: LimitsServer, move_time: Any) -> None:
    clock = FrozenClock(START)
    store, plan = made(limits_server, clock=clock), a_plan(Window(600, 1_000), algorithm="sliding")
    for _ in range(600):
        clock.advance(1)
        move_time(clock.time())
        assert (await store.admit("a", plan, 1, None)).admitted
    few, many = await store.admit("a", plan, 512, None), await store.admit("a", plan, 513, None)
    assert (few.reset, many.reset) == ((START + 1_512,), (START + 1_600,))
    clock.advance(913)
    move_time(clock.time())
    assert (await store.admit("a", plan, 513, None)).admitted
    await store.aclose()


# --- replies that are none -------------------------------------------------------------------------------------------

REPLIES: list[Any] = [
    None,
    1,
    b"OK",
    "OK",
    [],
    [1],
    [1, 5],
    [1, 5, b"a", 7, 8, 9],
    [0, 5, 50, 50, 5, 5],
    {1: 1},
    [True] * 6,
    pack("<5q", 1, 5, 50, 50, 5),
    pack("<6q", 1, 5, 50, 50, 5, 5) + b"a",
    pack("<6q", 1, 5, -1, 50, 5, 5),
    pack("<6q", 1, 5, 50, 50, 5, -5),
    pack("<6q", 0, 5, 50, 50, 5, 5),
    pack("<6q", *[2**63 - 1] * 6),
]


@pytest.mark.anyio
@pytest.mark.parametrize("reply", REPLIES, ids=repr)
async def test_a_reply_that_is_no_decision_is_a_store_that_is_not_there(
    reply: Any, limits_server: LimitsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = made(limits_server), a_plan()
    lease = (await store.admit("a", plan, 1, (10,))).lease
    assert lease is not None
    late: list[Any] = []

    async def answer(*_: Any, abandoned: Any = None) -> Any:
        late.append(abandoned)
        return reply

    monkeypatch.setattr(store.link, "run", answer)
    before = store.link.counters.failures
    for call in (
        lambda: store.admit("a", plan, 1, (10,)),
        lambda: store.extend(lease, (1,)),
        lambda: store.settle(lease, (1,)),
        lambda: store.charge("a", plan, (1, 1)),
    ):
        with pytest.raises(StoreUnavailableError, match="something that its script does not return"):
            await call()
    assert store.link.counters.failures == before + 4
    assert (lease.reserved, lease.settled) == ((10,), False)
    for undo in late:
        if undo is not None:
            undo(reply)
    monkeypatch.undo()
    assert await store.settle(lease, (10,)) == (90,)
    await store.aclose()


# --- one trip --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_one_trip_decides_and_one_settles(algorithm: Any, limits_server: LimitsServer) -> None:
    store = made(limits_server)
    plan = a_plan(*(Window(50, 60 * n) for n in range(1, 5)), Window(100, 60, "tokens"), algorithm=algorithm)
    team = Plan(name="team", levels=(plan, plan))
    lease = (await store.admit(("a", "org"), team, 1, (10, 10))).lease
    assert lease is not None
    before = limits_server.calls()
    lease = (await store.admit(("b", "org"), team, 1, (10, 10))).lease
    assert lease is not None
    assert limits_server.calls() == before + 1
    await store.settle(lease, (5, 5))
    # The first of its kind sends the script itself.
    assert limits_server.calls() <= before + 3
    await store.aclose()


# --- refusals that are known -----------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_flood_of_refused_requests_costs_the_server_nothing(
    algorithm: Any, limits_server: LimitsServer, move_time: Any
) -> None:
    clock = FrozenClock(START)
    move_time(clock.time())
    store, plan = made(limits_server, clock=clock), a_plan(Window(2, 60), Window(100, 3_600), algorithm=algorithm)
    await store.admit("a", plan, 2, None)
    refused = await store.admit("a", plan, 1, None)
    before = limits_server.calls()
    for _ in range(50):
        again = await store.admit("a", plan, 1, None)
        assert (again.admitted, again.refused_by, again.remaining) == (False, (0,), refused.remaining)
        assert again.reset == refused.reset
    clock.advance(refused.retry_after - 1)
    again = await store.admit("a", plan, 1, None)
    assert again.retry_after == pytest.approx(1)
    assert again.at == pytest.approx(clock.time())
    assert limits_server.calls() == before
    assert not (await store.admit("a", plan, 2, None)).admitted
    assert limits_server.calls() > before, "another cost may have another wait"
    clock.advance(1)
    move_time(clock.time())
    assert (await store.admit("a", plan, 1, None)).admitted
    await store.aclose()


@pytest.mark.anyio
async def test_what_a_known_refusal_says_of_other_windows_stays_true(
    limits_server: LimitsServer, move_time: Any
) -> None:
    clock = FrozenClock(1_700_000_040.5)
    move_time(clock.time())
    store, plan = made(limits_server, clock=clock), a_plan(Window(9, 1), Window(2, 60), Window(100, 10, "tokens"))
    await store.admit("a", plan, 2, (30,))
    refused = await store.admit("a", plan, 1, None)
    assert (refused.remaining, refused.refused_by) == ((7, 0, 70), (1,))
    assert refused.reset == (1_700_000_041, 1_700_000_100, 1_700_000_050)
    before = limits_server.calls()
    for seconds, reset in ((0.5, 1_700_000_042), (3.25, 1_700_000_045)):
        clock.advance(seconds)
        again = await store.admit("a", plan, 1, None)
        assert again.remaining == (9, 0, 70)
        assert again.reset == (reset, 1_700_000_100, 1_700_000_050)
    clock.advance(6)
    assert (await store.admit("a", plan, 1, None)).remaining == (9, 0, 100)
    assert limits_server.calls() == before
    await store.aclose()


@pytest.mark.anyio
async def test_a_window_that_has_ended_refuses_no_longer(limits_server: LimitsServer, move_time: Any) -> None:
    clock = FrozenClock(1_700_000_040)
    move_time(clock.time())
    store, plan = made(limits_server, clock=clock), a_plan(Window(2, 10), Window(2, 60))
    await store.admit("a", plan, 2, None)
    assert (await store.admit("a", plan, 1, None)).refused_by == (1, 0)
    clock.advance(15)
    known = await store.admit("a", plan, 1, None)
    assert (known.refused_by, known.remaining, known.retry_after) == ((1,), (2, 0), 45)
    await store.aclose()


@pytest.mark.anyio
async def test_a_refusal_for_tokens_is_asked_again(limits_server: LimitsServer) -> None:
    store, plan = made(limits_server), a_plan(Window(50, WEEK), Window(100, WEEK, "tokens"))
    lease = (await store.admit("a", plan, 1, (100,))).lease
    assert lease is not None
    for _ in range(3):
        assert (await store.admit("a", plan, 1, (50,))).refused_by == (1,)
    await store.settle(lease, (10,))
    assert (await store.admit("a", plan, 1, (50,))).admitted
    await store.aclose()


@pytest.mark.anyio
async def test_a_refusal_for_both_is_known_for_the_requests_only(limits_server: LimitsServer, move_time: Any) -> None:
    clock = FrozenClock(1_700_000_040)
    move_time(clock.time())
    store, plan = made(limits_server, clock=clock), a_plan(Window(1, 60), Window(100, 3_600, "tokens"))
    await store.admit("a", plan, 1, (100,))
    first = await store.admit("a", plan, 1, (50,))
    assert first.refused_by == (1, 0)
    known = await store.admit("a", plan, 1, (50,))
    assert (known.refused_by, known.retry_after) == ((0,), 60)
    await store.aclose()


@pytest.mark.anyio
async def test_a_refusal_is_not_repeated_to_who_came_with_another_tier_meanwhile(limits_server: LimitsServer) -> None:
    store = made(limits_server)
    small = a_plan(Window(1, WEEK), Window(500, 2 * WEEK), Window(1_000, 2 * WEEK, "tokens"))
    large = a_plan(Window(50, WEEK), Window(500, 2 * WEEK), Window(1_000, 2 * WEEK, "tokens"))
    await store.admit("a", small, 1, None)
    assert (await store.admit("a", small, 1, None)).remaining == (0, 499, 1_000)
    assert (await store.admit("a", large, 1, (900,))).admitted
    before = limits_server.calls()
    for _ in range(3):
        assert (await store.admit("a", small, 1, None)).remaining == (0, 498, 100)
        assert (await store.admit("a", small, 2, None)).remaining == (0, 498, 100)
    assert limits_server.calls() == before + 2, "each cost was asked for once"
    for cost in range(1, 200):
        await store.admit("a", small, cost, None)
    assert sum(len(known.by_cost) for known in store._denials.values()) <= 32
    await store.aclose()


@pytest.mark.anyio
async def test_known_refusals_are_bounded_and_can_be_switched_off(limits_server: LimitsServer) -> None:
    plan = a_plan(Window(1, WEEK))
    store = made(limits_server, denial_cache=20)
    for number in range(100):
        for _ in range(2):
            await store.admit(f"{number}", plan, 1, None)
    assert 0 < len(store._denials) <= 20
    await store.aclose()
    off = made(limits_server, denial_cache=0)
    before = limits_server.calls()
    for _ in range(3):
        assert not (await off.admit("1", plan, 1, None)).admitted
    assert limits_server.calls() == before + 3
    await off.aclose()

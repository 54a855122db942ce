"""What a decision costs: three request windows and a token budget together, for one caller up to a million.

`admit_us` is a decision by fixed windows (the default) with 1,000 callers, `ratio_1000000_to_1000` what it costs with a
million in relation to that, `bytes_per_caller` all that a caller takes where there are 100,000: key, counters, place in
a dictionary. For each algorithm: `us_1` to `us_1000000`, `reserve_us` (a decision that reserves tokens, and its
settlement, 1,000 callers), `levels_us` (a decision for a caller and their organisation together, 1,000 callers),
`stall_us`, the longest single decision while a million callers come for the first time, and while all their windows end
at once, and `stalls_per_million`, how many of those took over 200 µs.
"""

import gc
import random
import time
import tracemalloc
from typing import Any

from benchmarks.timing import Block, measure, rounds_for
from sigil_policy.stores.limits import Algorithm, Plan, Window
from sigil_policy.stores.memory import FixedWindows, Gcra, SlidingLog, memory_limits

ALGORITHMS: tuple[Algorithm, ...] = ("fixed", "sliding", "gcra")
POPULATIONS = (1, 1_000, 100_000, 1_000_000)
# As the guidelines' enterprise tier, with room for a benchmark: no decision is a refusal.
PLAN = Plan(
    name="enterprise",
    windows=(Window(200_000, 1), Window(2_000_000, 60), Window(20_000_000, 3600), Window(2_000_000_000, 60, "tokens")),
)
LEVELS = Plan(name="team", levels=(PLAN, PLAN))
START = 1_700_000_000.0
CALLS = 2_000

Store = FixedWindows | SlidingLog | Gcra


def key(number: int) -> str:
    """As `Principal.key` writes one: a new object each time."""
    return f"bearer:0::user_{number:012d}"


class _Filled:
    """A store that knows so many callers, and its time."""

    def __init__(self, algorithm: Algorithm, callers: int) -> None:
        self.store: Store = memory_limits(algorithm, max_callers=2_000_000)
        self.callers = callers
        self.now = START
        self.random = random.Random(0)
        for number in range(callers):
            self.store.admit(key(number), PLAN, 1, None, START)

    def keys(self) -> list[str]:
        return [key(self.random.randrange(self.callers)) for _ in range(CALLS)]

    def admit(self) -> float:
        keys, now, admit = self.keys(), self.now, self.store.admit
        start = time.process_time_ns()
        for one in keys:
            now += 0.001
            admit(one, PLAN, 1, None, now)
        spent = time.process_time_ns() - start
        self.now = now
        return spent / CALLS / 1000

    def reserve(self) -> float:
        keys, now, admit, settle = self.keys(), self.now, self.store.admit, self.store.settle
        start = time.process_time_ns()
        for one in keys:
            now += 0.001
            lease = admit(one, PLAN, 1, (800,), now).lease
            assert lease is not None
            settle(lease, (640,), now)
        spent = time.process_time_ns() - start
        self.now = now
        return spent / CALLS / 1000

    def levels(self) -> float:
        keys, now, admit = [(one, one[:-1]) for one in self.keys()], self.now, self.store.admit
        start = time.process_time_ns()
        for pair in keys:
            now += 0.001
            admit(pair, LEVELS, 1, None, now)
        spent = time.process_time_ns() - start
        self.now = now
        return spent / CALLS / 1000


def _stalls(algorithm: Algorithm, callers: int) -> tuple[float, float]:
    """The longest single decision in µs, and how many of a million took over 200 µs.

    CPU time of the thread, so that what else the machine does is left out as far as it can be.
    """
    store = memory_limits(algorithm, max_callers=2 * callers)
    store.prepare(PLAN)
    clock, admit, now = time.thread_time_ns, store.admit, START
    longest = many = 0
    gc.collect()
    gc.freeze()
    try:
        for count, step in ((callers, 0), (callers // 4, 7_200)):
            now += step
            for number in range(count):
                one = key(number)
                now += 1e-5
                start = clock()
                admit(one, PLAN, 1, None, now)
                spent = clock() - start
                longest = max(longest, spent)
                many += spent > 200_000
    finally:
        gc.unfreeze()
    return longest / 1000, many * 1e6 / (callers * 1.25)


def _bytes(algorithm: Algorithm, callers: int) -> float:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store = memory_limits(algorithm, max_callers=2 * callers)
        for number in range(callers):
            store.admit(key(number), PLAN, 1, None, START)
        return (tracemalloc.get_traced_memory()[0] - before) / callers
    finally:
        tracemalloc.stop()


def run(smoke: bool) -> dict[str, Any]:
    """The figures that the module names, in µs and bytes."""
    populations = (1, 100) if smoke else POPULATIONS
    small, large = (populations[1], populations[-1])
    result: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        stores = {callers: _Filled(algorithm, callers) for callers in populations}
        blocks: dict[str, Block] = {f"us_{callers}": filled.admit for callers, filled in stores.items()}
        # Its own store: what is logged of tokens would make the others dearer.
        blocks["reserve_us"] = _Filled(algorithm, small).reserve
        blocks["levels_us"] = _Filled(algorithm, small).levels
        samples = measure(blocks, rounds=rounds_for(smoke, 25))
        figures: dict[str, Any] = {name: samples.cost(name) for name in blocks}
        figures["ratio_1000000_to_1000"] = samples.ratio(f"us_{large}", to=f"us_{small}")
        del stores, blocks
        figures["bytes_per_caller"] = _bytes(algorithm, min(large, 100_000))
        figures["stall_us"], figures["stalls_per_million"] = _stalls(algorithm, large)
        if algorithm == "fixed":
            result["admit_us"] = figures[f"us_{small}"]
            result["ratio_1000000_to_1000"] = figures["ratio_1000000_to_1000"]
            result["bytes_per_caller"] = figures["bytes_per_caller"]
        result[algorithm] = figures
    return result

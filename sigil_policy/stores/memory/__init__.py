"""Limits counted in this process, by three algorithms; each states its promise.

    store = memory_limits("sliding", max_callers=50_000)

A store may be shared by the event loops of several threads. `FixedWindows` is the default: the cheapest, the one
whose `Reset` a client can put on a clock, and the only one that counts calendar months.
"""

from sigil_policy.stores.limits import Algorithm
from sigil_policy.stores.memory.callers import MAX_CALLERS
from sigil_policy.stores.memory.fixed import FixedWindows
from sigil_policy.stores.memory.gcra import Gcra
from sigil_policy.stores.memory.sliding import SlidingLog

__all__ = ["MAX_CALLERS", "FixedWindows", "Gcra", "SlidingLog", "memory_limits"]


def memory_limits(
    algorithm: Algorithm = "fixed", *, max_callers: int = MAX_CALLERS
) -> FixedWindows | SlidingLog | Gcra:
    """A fresh store that counts by `algorithm` (default "fixed") and knows at most `max_callers` at once."""
    kinds: dict[Algorithm, type[FixedWindows | SlidingLog | Gcra]] = {
        "fixed": FixedWindows,
        "sliding": SlidingLog,
        "gcra": Gcra,
    }
    return kinds[algorithm](max_callers=max_callers)

"""A clock that moves when the test says so, and a way to put it in the place of the machine's.

clock = FrozenClock(1_700_000_000)
stack = PolicyStack(app, policies=[RateLimit()], clock=clock)
clock.advance(60)

with frozen() as clock:             # stacks and stores that were given no clock go by this one
    ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from sigil_policy.core.clock import SYSTEM_CLOCK


class FrozenClock:
    """Stands still at `now` (seconds since the epoch) until `advance` or `jump`.

    clock = FrozenClock(1_700_000_000)
    stack = PolicyStack(app, policies=[RateLimit()], clock=clock)
    clock.advance(60)
    """

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now
        self._monotonic = 1_000.0

    def time(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Time passes: both hands move."""
        if seconds < 0:
            raise ValueError(f"time passes forwards, not by {seconds}; use jump() for a wall clock that was set back")
        self._now += seconds
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Somebody set the wall clock: durations do not see it."""
        self._now += seconds


_LOCK = Lock()
_FROZEN: list[FrozenClock] = []


@contextmanager
def frozen(clock: FrozenClock | None = None) -> Iterator[FrozenClock]:
    """The machine's clock, as everything of this library reads it, stands still in this block.

        with frozen() as clock:
            client = TestClient(app)        # whose author gave no clock to its stack
            clock.advance(60)

    Whatever goes by the default clock follows, also what was made before: stacks, stores of this process, key stores.
    What has a clock of its own does not: a stack that was given one, a store on a server (Redis counts by its server's
    time) or of the package `limits`, the times in a `JSONLines` log that was made before, timers of the event loop (a
    deadline still takes real seconds), `time.time()` in the application.
    Blocks may be nested: the inner clock holds, then the outer one again. Every thread of the process sees it.

    Options:
        clock: the one to go by (default None: a new one, at a fixed moment in 2023).
    """
    made = FrozenClock() if clock is None else clock
    with _LOCK:
        _FROZEN.append(made)
        _show()
    try:
        yield made
    finally:
        with _LOCK:
            del _FROZEN[max(place for place, one in enumerate(_FROZEN) if one is made)]
            _show()


def _show() -> None:
    # Attributes of the one instance that every default is: they hide the class's own hands, and go again.
    hands = vars(SYSTEM_CLOCK)
    if _FROZEN:
        hands.update(time=_FROZEN[-1].time, monotonic=_FROZEN[-1].monotonic)
    else:
        hands.clear()

"""A clock that moves when the test says so."""


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

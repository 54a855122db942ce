"""When to stop asking a server that does not answer, and when to look again.

    breaker = Breaker(threshold=5)
    if breaker.failed(now):                  # the fifth in a row
        breaker.open(now)
    await sleep(breaker.wait(now))           # 0.05 to 0.1 s, then up to 0.2, ... 5 s: then one probe
    breaker.close(now)

No clock, no IO, no randomness of its own: time and a random number are passed in.

Guarantees: waits double from `first` to `longest` and are spread over their upper half, so that processes which lost a
server together do not come back together. A breaker that opens again within `longest` of closing goes on where it was:
a server that flaps is probed, and reported, ever less often.
"""

import random
from collections.abc import Callable


class Breaker:
    """Counts failures in a row and remembers until when nobody should try.

    Options:
        threshold: how many failures in a row are too many (default 5).
        first, longest: the shortest and the longest wait before a probe, in seconds (default 0.1 and 5).
        uniform: gives a random number between two (default `random.uniform`).
    """

    __slots__ = (
        "_closed_at",
        "_doubled",
        "_uniform",
        "failures",
        "first",
        "longest",
        "opened_at",
        "threshold",
        "until",
    )

    def __init__(
        self,
        threshold: int = 5,
        first: float = 0.1,
        longest: float = 5.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.threshold = threshold
        self.first = first
        self.longest = longest
        self.failures = 0
        self.opened_at: float | None = None
        self.until = 0.0
        self._uniform = uniform
        self._doubled = 0
        self._closed_at = float("-inf")

    @property
    def is_open(self) -> bool:
        return self.opened_at is not None

    def failed(self, count: int = 1) -> bool:
        """Count failures; says whether it should be opened now."""
        self.failures += count
        return self.opened_at is None and self.failures >= self.threshold

    def open(self, now: float) -> None:
        """Nobody should try any more."""
        if now - self._closed_at > self.longest:
            self._doubled = 0
        self.opened_at = self.until = now

    def wait(self, now: float) -> float:
        """How many seconds to wait before the next probe; `until` is when that is."""
        most = min(self.longest, self.first * 2**self._doubled)
        if most < self.longest:
            self._doubled += 1
        seconds = self._uniform(most / 2, most)
        self.until = now + seconds
        return seconds

    def close(self, now: float) -> float:
        """A probe was answered; returns for how long nobody should have tried."""
        away = now - (self.opened_at if self.opened_at is not None else now)
        self.opened_at = None
        self.failures = 0
        self._closed_at = now
        return away

"""Time, passed in.

Everything in the library that depends on time asks the exchange's clock, so a test can freeze the whole stack:

    stack = PolicyStack(app, policies=[...], clock=FrozenClock(1_700_000_000))
"""

import time as machine
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Two hands: `time()` is seconds since the Unix epoch, `monotonic()` never jumps (durations)."""

    @property
    def time(self) -> Callable[[], float]: ...

    @property
    def monotonic(self) -> Callable[[], float]: ...


class SystemClock:
    """The machine's own clock. The functions themselves, not methods: a call costs what `time.time()` costs."""

    time = staticmethod(machine.time)
    monotonic = staticmethod(machine.monotonic)

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK: Clock = SystemClock()

"""For tests of services and policies: a clock that stands still and a driver that shows every ASGI message."""

from sigil_policy.testing.asgi import Sent, drive
from sigil_policy.testing.clock import FrozenClock

__all__ = ["FrozenClock", "Sent", "drive"]

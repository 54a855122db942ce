"""For tests of services, policies and stores: a clock that stands still, a driver that shows every ASGI message, and
the conformance suite of limit stores."""

from sigil_policy.testing.asgi import Sent, drive
from sigil_policy.testing.clock import FrozenClock
from sigil_policy.testing.stores import check_limit_store, limit_store_checks

__all__ = ["FrozenClock", "Sent", "check_limit_store", "drive", "limit_store_checks"]

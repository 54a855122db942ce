"""A store that fails is told of, once in a while: what it raised goes to the operator's log, and not to the caller.

    failures = StoreFailures("api_key_store_failed")
    except Exception as error:
        wait = failures.report(store, error, ex.clock)          # seconds until it is worth another try

A store is somebody else's, and may raise anything. What an error says may hold an address with its password, so only
its type and where it came from are logged, and the text of a `StoreUnavailableError`, which says what we wrote.
"""

import traceback
from math import inf
from pathlib import Path

import structlog

from sigil_policy.core.clock import Clock
from sigil_policy.stores.limits import StoreUnavailableError

logger = structlog.get_logger("sigil_policy")

# Seconds between two lines.
_EVERY = 10.0


class StoreFailures:
    """Failures of one store. `event` is what the line in the log is called."""

    __slots__ = ("_event", "_told")

    def __init__(self, event: str) -> None:
        self._event = event
        self._told = -inf

    def report(self, store: object, error: Exception, clock: Clock) -> float:
        """Log `error`, at most once in 10 seconds; returns how many seconds it says that one should wait, or 1."""
        now = clock.monotonic()
        known = isinstance(error, StoreUnavailableError)
        if now - self._told >= _EVERY:
            self._told = now
            frames = traceback.extract_tb(error.__traceback__)
            logger.error(
                self._event,
                store=type(store).__name__,
                error=type(error).__name__,
                where=f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None,
                reason=str(error) if known else None,
            )
        return error.retry_after if isinstance(error, StoreUnavailableError) else 1.0

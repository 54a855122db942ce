"""Where the records of API keys are: what a store promises, the one in this process, and what remote ones share.

    store = MemoryApiKeyStore([record])
    ApiKeyAuth(store=store, pepper=pepper)

A policy needs `find` only. `ApiKeys` and the command need an `ApiKeyLedger`. A store that waits for a file or a server
derives from `RemoteApiKeyStore`, which remembers what was found, and bounds what callers who make up ids cost.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from threading import Lock
from typing import Any, ClassVar, Protocol, runtime_checkable

import anyio
import structlog
from cachetools import LRUCache

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.identity.api_keys.records import RECORD, ApiKeyRecord
from sigil_policy.stores.limits import StoreUnavailableError

logger = structlog.get_logger("sigil_policy")

Found = ApiKeyRecord | None

# So many records that cannot be read are reported in a line of their own, in one store.
_REPORTS = 64
_UNKNOWN = 4_096


class ApiKeyExistsError(ValueError):
    """There is a key with this id already."""


class ApiKeyUnknownError(LookupError):
    """There is no key with this id."""


class ReadOnlyStoreError(Exception):
    """This store is changed by other means; the message says by which."""


@runtime_checkable
class ApiKeyStore(Protocol):
    """Where records are. Finding one may take IO: then `find` returns an awaitable.

    It may have `note_use(key_id)`, called for each key that was accepted, which must not wait, and `async aclose()`.
    """

    def find(self, key_id: str) -> "ApiKeyRecord | Awaitable[ApiKeyRecord | None] | None":
        """The record with this id, also an expired one; None without it."""
        ...


@runtime_checkable
class ApiKeyLedger(ApiKeyStore, Protocol):
    """A store of which keys can be listed and changed. Two changes at once are as if one came after the other.

    isinstance(MemoryApiKeyStore(), ApiKeyLedger)       # True
    """

    async def get(self, key_id: str) -> Found:
        """The record as it is now, remembered by nobody."""
        ...

    async def records(self) -> tuple[ApiKeyRecord, ...]:
        """All records, those of ended keys too, with `last_used` where the store keeps it."""
        ...

    async def save(self, record: ApiKeyRecord, *, ends: tuple[str, float] | None = None) -> None:
        """Store a new record; with `ends=(id, at)` another ends at `at`, in the same step or not at all.

        Raises `ApiKeyExistsError` if its id is taken, `ApiKeyUnknownError` if the other is not there.
        """
        ...

    async def end(self, key_id: str, at: float) -> Found:
        """Let a key end at `at`, or when it ends anyway if that is earlier; its record, or None if it is not there."""
        ...


class MemoryApiKeyStore:
    """Records in this process.

    store = MemoryApiKeyStore([record])
    store.add(another)
    """

    def __init__(self, records: Iterable[ApiKeyRecord] = (), *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._records = {record.id: record for record in records}
        self._used: dict[str, float] = {}
        self._clock = clock
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"MemoryApiKeyStore({len(self._records)} records)"

    def add(self, record: ApiKeyRecord) -> None:
        """Store `record`, in place of one with the same id."""
        self._records[record.id] = record

    def remove(self, key_id: str) -> None:
        """Forget a key: it is refused from now on."""
        self._records.pop(key_id, None)
        self._used.pop(key_id, None)

    def find(self, key_id: str) -> ApiKeyRecord | None:
        return self._records.get(key_id)

    def note_use(self, key_id: str) -> None:
        """Remember that a key was used now."""
        if key_id in self._records:
            self._used[key_id] = self._clock.time()

    async def get(self, key_id: str) -> Found:
        return self._records.get(key_id)

    async def records(self) -> tuple[ApiKeyRecord, ...]:
        used = self._used
        return tuple(
            replace(record, last_used=used[record.id]) if record.id in used else record
            for record in tuple(self._records.values())
        )

    async def save(self, record: ApiKeyRecord, *, ends: tuple[str, float] | None = None) -> None:
        with self._lock:
            if record.id in self._records:
                raise ApiKeyExistsError(f"there is a key {record.id} already")
            if ends is not None:
                old = self._records.get(ends[0])
                if old is None:
                    raise ApiKeyUnknownError(f"there is no key {ends[0]}")
                self._records[old.id] = old.ending(ends[1])
            self._records[record.id] = record

    async def end(self, key_id: str, at: float) -> Found:
        with self._lock:
            record = self._records.get(key_id)
            if record is not None:
                record = self._records[key_id] = record.ending(at)
            return record


class _Remembered:
    """What was found when it was last asked for, by the clock's monotonic hand."""

    __slots__ = ("asked", "at", "record")

    def __init__(self, record: ApiKeyRecord, at: float) -> None:
        self.record = record
        self.at = at
        self.asked = False


class _Budget:
    """`rate` a second, and `burst` at once."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at = 0.0

    def spend(self, now: float) -> bool:
        self._left = min(self.burst, self._left + max(0.0, now - self._at) * self.rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class RemoteApiKeyStore(ABC):
    """A store that a look-up has to wait for. Derive from it, and say how to `get`, `records`, `save`, `end`.

    Guarantees:

    * **What was found holds for `fresh_for` seconds**, and at most `deadline` longer, while one caller asks again and
      the others go on. So long may a change by another process stay unseen; one through this store is seen at once.
      After that nobody is let in on what was remembered: a store that is away raises `StoreUnavailableError`.
    * **Made-up ids cost little.** An id without the check that ids have (see `format`) is looked up at most `strays`
      times a second, five times as many at once; beyond that, whoever presents one that this process does not know
      gets `StoreUnavailableError`. That an id is unknown is remembered for `fresh_for` seconds, for 4,096 ids at most.
      Keys that were found, and all keys whose ids have the check, are served meanwhile.
    * **Uses are noted in batches**: `note_use` writes to memory. What has gathered is written every `use_every`
      seconds, by the use that comes then, which does not wait for it, and by `aclose`. A process that is killed loses
      what it has gathered. At most `remembered` keys are noted in a batch.

    Options:
        fresh_for: seconds for which what was found is taken to be true (default 5; 0 asks each time).
        deadline: seconds that a look-up may take (default 0.5).
        remembered: how many records are kept in this process, about 1 kB each (default 10,000).
        strays: look-ups a second of ids that have no check (default 20).
        use_every: seconds between two batches of uses (default 60).
        clock: asked for the life of what is remembered, and for the time of a use (default: the machine's).

    Raises `ValueError` for a number that cannot be.
    """

    remote: ClassVar[bool] = True
    _batch: ClassVar[int] = 1_000_000
    """How many uses one `_write_uses` takes; packing them is work that a request does."""

    def __init__(
        self,
        *,
        fresh_for: float = 5.0,
        deadline: float = 0.5,
        remembered: int = 10_000,
        strays: float = 20.0,
        use_every: float = 60.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not 0 <= fresh_for <= 3_600:
            raise ValueError(f"fresh_for is 0 to 3600 seconds, not {fresh_for!r}")
        if not 0.001 <= deadline <= 60:
            raise ValueError(f"deadline is how long a look-up may take, 0.001 to 60 seconds, not {deadline!r}")
        if remembered < 1:
            raise ValueError(f"remembered is how many records are kept, at least 1, not {remembered!r}")
        if not 0 < strays <= 1_000_000:
            raise ValueError(f"strays is how many unknown ids are looked up in a second, more than 0, not {strays!r}")
        if not 1 <= use_every <= 86_400:
            raise ValueError(f"use_every is 1 to 86400 seconds, not {use_every!r}")
        self.fresh_for = fresh_for
        self.deadline = deadline
        self.use_every = use_every
        self._clock = clock
        self._known: LRUCache[str, _Remembered] = LRUCache(remembered)
        self._unknown: LRUCache[str, float] = LRUCache(_UNKNOWN)
        self._strays = _Budget(strays, max(1.0, 5 * strays))
        self._used: dict[str, float] = {}
        self._write_due = 0.0
        self._changes = 0
        self._reported: set[str] = set()
        # Event loops in several threads may share a store. Nothing waits while it is held.
        self._lock = Lock()

    @abstractmethod
    async def get(self, key_id: str) -> Found: ...

    @abstractmethod
    async def records(self) -> tuple[ApiKeyRecord, ...]: ...

    @abstractmethod
    async def _save(self, record: ApiKeyRecord, ends: tuple[str, float] | None) -> None: ...

    @abstractmethod
    async def _end(self, key_id: str, at: float) -> Found: ...

    @abstractmethod
    def _write_uses(self, used: Mapping[str, float]) -> None:
        """Write when keys were used, and do not wait for it."""

    def find(
        self, key_id: str, is_issued: Callable[[str], bool] | None = None
    ) -> ApiKeyRecord | Awaitable[ApiKeyRecord | None] | None:
        """The record with this id, remembered or looked up. `is_issued` tells ids from made-up ones, see `format`."""
        now = self._clock.monotonic()
        with self._lock:
            known = self._known.get(key_id)
            if known is not None:
                age = now - known.at
                if age < self.fresh_for or (known.asked and age < self.fresh_for + self.deadline):
                    return known.record
                return self._look_up(key_id, now, known)
            if now - self._unknown.get(key_id, -1e9) < self.fresh_for:
                return None
            if (is_issued is None or not is_issued(key_id)) and not self._strays.spend(now):
                raise StoreUnavailableError("too many unknown keys are being looked up")
        return self._look_up(key_id, now, None)

    async def _look_up(self, key_id: str, now: float, known: _Remembered | None) -> Found:
        changes = self._changes
        if known is not None:
            known.asked = True
        try:
            with anyio.fail_after(self.deadline):
                record = await self.get(key_id)
        except TimeoutError:
            raise StoreUnavailableError(f"no record within {self.deadline:g} s") from None
        finally:
            if known is not None:
                known.asked = False
        with self._lock:
            if changes != self._changes:
                return record  # it may be from before a change of ours: not to be remembered
            if record is None:
                self._known.pop(key_id, None)
                self._unknown[key_id] = now
            else:
                newest = self._known.get(key_id)
                if newest is None or newest.at <= now:
                    self._known[key_id] = _Remembered(record, now)
        return record

    async def save(self, record: ApiKeyRecord, *, ends: tuple[str, float] | None = None) -> None:
        try:
            await self._save(record, ends)
        finally:
            self._forget(record.id, *(() if ends is None else ends[:1]))

    async def end(self, key_id: str, at: float) -> Found:
        try:
            return await self._end(key_id, at)
        finally:
            self._forget(key_id)

    def _forget(self, *key_ids: str) -> None:
        with self._lock:
            self._changes += 1
            for key_id in key_ids:
                self._known.pop(key_id, None)
                self._unknown.pop(key_id, None)

    def note_use(self, key_id: str) -> None:
        """Remember that a key was used now; every `use_every` seconds that is written, and nobody waits for it."""
        with self._lock:
            if len(self._used) < self._known.maxsize or key_id in self._used:
                self._used[key_id] = self._clock.time()
            now = self._clock.monotonic()
            if now < self._write_due:
                return
            # What is more than one batch may take is for the next use to write.
            self._write_due = now + (self.use_every if len(self._used) <= self._batch else 0.0)
        self._write_uses(self._taken(self._batch))

    def _taken(self, most: int) -> dict[str, float]:
        """At most so much of what has gathered, which is then the caller's to write."""
        with self._lock:
            used = self._used
            if len(used) <= most:
                self._used = {}
                return used
            return {key_id: used.pop(key_id) for key_id in tuple(islice(used, most))}

    def _put_back(self, used: Mapping[str, float]) -> None:
        """Uses that could not be written: the next batch has them, but for what was used since."""
        with self._lock:
            for key_id, at in used.items():
                if len(self._used) < self._known.maxsize:
                    self._used.setdefault(key_id, at)

    def _read(self, key_id: str, fields: Mapping[str, Any]) -> Found:
        """The record that `fields` are; None, and one line in the log, if they are none: its key is refused."""
        with suppress(ValueError):
            return RECORD.validate_python(dict(fields))
        if key_id not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(key_id)
            # Not the error: it is about what is stored.
            logger.error("api_key_record_unreadable", store=type(self).__name__, key_id=key_id)
        return None

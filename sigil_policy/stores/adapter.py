"""Limits in any asynchronous storage of the `limits` library: memcached, MongoDB, its Redis and Valkey, or your own.

    store = LimitsStorage("memcached://cache.internal:11211")
    app.add_middleware(PolicyStack, policies=[RateLimit(store=store)])

| storage | algorithms | driver |
|---|---|---|
| `memcached://host:port,host:port` | "fixed" | memcachio |
| `mongodb://host:port` | "fixed", "sliding" (requests) | motor |
| `redis://`, `rediss://`, `redis+cluster://`, `redis+sentinel://` | "fixed", "sliding" (requests) | redis |
| `valkey://`, `valkey+cluster://`, `valkey+sentinel://` | "fixed", "sliding" (requests) | valkey |

**Its promise is weaker than that of the other stores**, because such a storage changes one counter at a time. A
decision looks at every window, and only if all have room takes from one after the other. Then:

* Never more than the limit is admitted in an aligned window ("fixed"; as far as the clocks of the processes agree, and
  to within 5 seconds of skew), or in any interval ("sliding"), for as long as the storage forgets nothing: memcached
  may, when it is full or restarted, and a primary that is replaced loses what had not reached its replica.
* Not all or nothing. A request that is refused at the look takes nothing. One that loses a race after it gives back
  what it took ("fixed"); meanwhile others may be refused for it. A moving window gives nothing back: there, what such a
  request took of the earlier windows stays counted.
* What is given back never enters a later window: the name of a counter says which window it counts. If the storage
  forgot the counter meanwhile, it is put back to 0, not below.
* A cancelled decision waits for the change that is under way, at most until the deadline, and then gives back what it
  took. What stays counted until its window ends: a change whose answer never came (deadline, broken connection, a task
  cancelled from outside of AnyIO), and what could not be given back in 15 ms after the deadline.
* Tokens are counted by "fixed" only: a moving window keeps an entry for each token, and cannot take one back.
* A reservation is known to its process alone. If that dies, it stays charged until its windows end, whatever
  `Plan.lapsed` says. A settlement whose answer never came is not repeated for that window, so that nothing is given
  back twice.
* `charge` beyond the limit of a moving window is not counted there.

A decision of *n* windows is *2n* trips, one after the other; a refusal *n*. `RedisLimits` needs one.

The strategies of `limits` are not used as they are: its fixed window consumes when it refuses, and its keys name the
limit, so that other numbers are a fresh quota. Its storages are: `incr` and `get`, and the moving window as "sliding".

A store belongs to the event loop that used it first, which must be asyncio's.

limits 5.8.
"""

import re
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from hashlib import blake2b
from inspect import isawaitable
from math import ceil
from random import uniform
from typing import Any, ClassVar, NoReturn

import structlog
from anyio import CancelScope, current_time, move_on_after
from anyio.lowlevel import checkpoint_if_cancelled
from limits.aio.storage import MemcachedStorage, MemoryStorage, MovingWindowSupport, RedisStorage, Storage
from limits.aio.storage.redis.coredis import CoredisBridge
from limits.errors import ConfigurationError
from limits.storage import storage_from_string
from pydantic import SecretStr

from sigil_policy.stores.limits import Algorithm, Decision, Key, Lease, Plan, StoreUnavailableError, Window

logger = structlog.get_logger("sigil_policy")

# Seconds for which a counter outlives its window: clocks that differ by less count in the same one.
_SKEW = 5
# Seconds that giving back may take after the deadline.
_PATIENCE = 0.015
# After so many failures in a row nobody waits any more, but for one request in each so many seconds.
_FAILURES = 5
_PAUSE = 1.0
# Beyond it memcached reads an expiry as a moment.
_MEMCACHED_LONGEST = 30 * 86_400
_MOST = 999_999_999_999_999
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEME = re.compile(r"(?:async\+)?([a-z][a-z0-9+.-]*)://")
_MISSING = re.compile(r"'(\w+)[\w.]*' (?:prerequisite|could not be found)")


class _Fixed:
    """One aligned window of one caller. `held` is what this decision took of it."""

    __slots__ = ("end", "expiry", "held", "limit", "name", "storage", "used")

    def __init__(self, storage: Storage, owner: str, window: Window, now: float) -> None:
        start, self.end = _bounds(window, now)
        self.storage = storage
        self.name = f"{owner}:{window.measure}:{start}"
        self.limit = window.limit
        self.expiry = ceil(self.end - now) + _SKEW
        self.used = self.held = 0

    @property
    def left(self) -> int:
        return max(self.limit - self.used, 0)

    @property
    def reset(self) -> float:
        return float(self.end)

    async def look(self) -> None:
        self.used = await self.storage.get(self.name)

    async def take(self, amount: int) -> bool:
        """Take `amount`; if that was too much it is held nevertheless, to be given back."""
        await self.count(amount)
        self.held = amount
        return self.used <= self.limit

    async def count(self, amount: int) -> None:
        """Take `amount`, whatever the limit says."""
        storage = self.storage
        if isinstance(storage, MemcachedStorage):
            expiry = self.expiry if self.expiry <= _MEMCACHED_LONGEST else self.expiry + int(time.time())
            # Without the second key in which limits notes the expiry: the name tells it.
            self.used = await storage.incr(self.name, expiry, amount, set_expiration_key=False)
        else:
            self.used = await storage.incr(self.name, self.expiry, amount)

    async def give_back(self) -> None:
        # Before the first wait: what may have come back is not given back once more.
        amount, self.held = self.held, 0
        if isinstance(self.storage, MemcachedStorage):
            self.used = await self.storage.bridge.decr(self.name, amount)
            return
        self.used = await self.storage.incr(self.name, self.expiry, -amount)
        if self.used < 0:
            # The storage had forgotten it: a quota of more than the limit would be left behind.
            await self.count(-self.used)

    async def free(self, need: int) -> float:
        """When `need` would be admitted."""
        return self.reset


class _Moving:
    """The last seconds of one caller. What was taken of them cannot be given back."""

    __slots__ = ("held", "limit", "name", "now", "oldest", "seconds", "storage", "used")

    def __init__(self, storage: Any, owner: str, window: Window, now: float) -> None:
        self.storage = storage
        self.name = f"{owner}:{window.measure}:log"
        self.limit = window.limit
        self.seconds = window.seconds
        self.now = self.oldest = now
        self.used = self.held = 0

    @property
    def left(self) -> int:
        return max(self.limit - self.used, 0)

    @property
    def reset(self) -> float:
        return (self.now if self.left else self.oldest) + self.seconds

    async def look(self) -> None:
        oldest, self.used = await self.storage.get_moving_window(self.name, self.limit, self.seconds)
        # MongoDB answers with None where all entries have left the window.
        self.oldest = oldest or self.now

    async def take(self, amount: int) -> bool:
        taken: bool = await self.storage.acquire_entry(self.name, self.limit, self.seconds, amount)
        if taken:
            self.used += amount
        else:
            await self.look()
        return taken

    async def count(self, amount: int) -> None:
        await self.look()
        if self.left:
            await self.take(min(amount, self.left))

    async def give_back(self) -> None:
        """Nothing that the storage could do."""

    async def free(self, need: int) -> float:
        """When `need` would be admitted: never too early, and exact where the storage tells of older entries."""
        asked = self.limit - need + 1
        if asked >= self.used:
            return self.oldest + self.seconds
        # Of the newest `asked` entries the oldest is the last that has to leave.
        last, counted = await self.storage.get_moving_window(self.name, asked, self.seconds)
        return (last if last and counted <= asked else self.now) + self.seconds


_Counter = _Fixed | _Moving


class _Charge:
    """What a lease took of one token window: of which counter, and whether that is settled."""

    __slots__ = ("amount", "name", "settled")

    def __init__(self, name: str, amount: int) -> None:
        self.name = name
        self.amount = amount
        self.settled = False


class LimitsStorage:
    """Counts in a storage of `limits`, one counter after the other; the module states the promise.

        LimitsStorage("memcached://cache.internal:11211")
        LimitsStorage("mongodb://limits.internal:27017", database_name="limits", deadline=0.2)
        LimitsStorage(storage)                                     # any `limits.aio.storage.Storage`

    Options:
        storage: URI as `limits` writes it, with or without "async+", or an asynchronous storage. Of its Redis clients
            redis-py is used; coredis is refused: it counts and sets the expiry in two trips, so that a cancelled
            request leaves a counter for ever.
        deadline: seconds for one decision or settlement, all its trips together (default 0.1: there are several).
            Connecting is part of the first.
        namespace: in front of every key (default "sigil"): letters, digits, ".", "_", "-", at most 64.
        digest_key: callers stand in the keys as a digest of 128 bits. With a key of your own (16 to 64 bytes), nobody
            who reads the storage can try out addresses or names (default None: a digest without a key). Another key
            is a fresh quota for everybody.
        memory_for_tests: accept the storage in memory of `limits` (default False). It looks at all keys in each turn
            of the event loop that counts, and shares with no other process: use `memory_limits` instead.
        options: further ones of the storage, if it is given as a URI.

    Raises `ValueError` for a storage that cannot be used, `ImportError` if its driver is not installed.
    """

    remote: ClassVar[bool] = True

    def __init__(
        self,
        storage: str | Storage,
        *,
        deadline: float = 0.1,
        namespace: str = "sigil",
        digest_key: bytes | SecretStr | None = None,
        memory_for_tests: bool = False,
        **options: Any,
    ) -> None:
        if not deadline > 0:
            raise ValueError(f"deadline must be more than 0 seconds, not {deadline}")
        if not _NAMESPACE.fullmatch(namespace):
            raise ValueError(f"namespace {namespace!r} must be 1 to 64 letters, digits, '.', '_' and '-'")
        secret = digest_key.get_secret_value().encode() if isinstance(digest_key, SecretStr) else digest_key
        if secret is not None and not 16 <= len(secret) <= 64:
            raise ValueError(f"digest_key must have 16 to 64 bytes, not {len(secret)}")
        if options and not isinstance(storage, str):
            raise ValueError(f"options {sorted(options)} are those of a URI; give them to the storage itself")
        self.deadline = deadline
        self._secret = secret or b""
        self._prefix = f"{namespace}:1:"
        self._open = (lambda: _opened(storage, deadline, options)) if isinstance(storage, str) else None
        self.storage: Storage = self._open() if self._open else _checked(storage)
        if isinstance(self.storage, MemoryStorage) and not memory_for_tests:
            raise ValueError(
                "the memory storage of limits looks at all keys again and again and serves one process; "
                "leave store= out, or use sigil_policy.stores.memory.memory_limits()"
            )
        moving = isinstance(self.storage, MovingWindowSupport)
        self.algorithms: frozenset[Algorithm] = frozenset(("fixed", "sliding") if moving else ("fixed",))
        self._failures = 0
        self._probe = 0.0
        logger.info(
            "limits_storage_promise",
            storage=type(self.storage).__name__,
            algorithms=sorted(self.algorithms),
            promise="windows are decided one after the other, not all or nothing; see sigil_policy.stores.adapter",
        )

    def __repr__(self) -> str:
        return f"LimitsStorage({type(self.storage).__name__}, deadline={self.deadline})"

    def prepare(self, plan: Plan) -> None:
        if plan.algorithm not in self.algorithms:
            known = ", ".join(sorted(self.algorithms))
            raise ValueError(f"{type(self.storage).__name__} of limits counts by {known}, not by {plan.algorithm}")
        if plan.algorithm != "fixed" and plan.tokens:
            raise ValueError(
                f"plan {plan.name!r} has token windows and the algorithm {plan.algorithm!r}: a storage of limits "
                "counts tokens by 'fixed' only; write algorithm='fixed', or use RedisLimits"
            )

    async def admit(self, key: Key, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Decision:
        counters = self._counters(key, plan, now)
        split = len(plan.requests)
        asked = (0,) * len(plan.tokens) if estimate is None else estimate
        amounts = [min(cost, window.limit) for window in plan.requests] + list(asked)
        # Without an estimate: as long as anything remains.
        needs = amounts[:split] + [0 if estimate is None else amount or 1 for amount in asked]
        async with self._call() as scope:
            for counter in counters:
                await counter.look()
            refused = [index for index, need in enumerate(needs) if need and counters[index].left < need]
            if not refused and (loser := await self._take(scope, counters, amounts)) is not None:
                refused = [loser]
            free = {index: await counters[index].free(needs[index]) for index in refused}
        reset = tuple([free.get(index, counter.reset) for index, counter in enumerate(counters)])
        remaining = tuple([counter.left for counter in counters])
        if refused:
            refused.sort(key=reset.__getitem__, reverse=True)
            wait = max(reset[refused[0]] - now, 0.0)
            return Decision(False, remaining, reset, key, now, refused_by=tuple(refused), retry_after=wait)
        lease = None
        if estimate is not None:
            charges = [_Charge(c.name, amount) for c, amount in zip(counters[split:], asked, strict=True)]
            lease = Lease(key, plan, estimate, now, charges)
        return Decision(True, remaining, reset, key, now, lease)

    async def extend(self, lease: Lease, more: tuple[int, ...], now: float) -> tuple[int, ...] | None:
        if lease.settled:
            return None
        counters = self._counters(lease.key, lease.plan, now, tokens_only=True)
        async with self._call() as scope:
            for counter in counters:
                await counter.look()
            if any(counter.left < amount for counter, amount in zip(counters, more, strict=True)):
                return None
            if await self._take(scope, counters, more) is not None:
                return None
            if any(charge.settled for charge in lease.mark):
                # By somebody else, meanwhile: nobody would ever give this back.
                await self._give_back(counters)
                return None
        for charge, counter, amount in zip(lease.mark, counters, more, strict=True):
            charge.amount = charge.amount + amount if charge.name == counter.name else amount
            charge.name = counter.name
        lease.reserved = tuple([held + amount for held, amount in zip(lease.reserved, more, strict=True)])
        return tuple([counter.left for counter in counters])

    async def settle(self, lease: Lease, used: tuple[int, ...], now: float) -> tuple[int, ...]:
        counters = self._counters(lease.key, lease.plan, now, tokens_only=True)
        async with self._call(shield=True):
            for counter, charge, amount, reserved in zip(counters, lease.mark, used, lease.reserved, strict=True):
                over = min(amount, _MOST) - reserved
                if charge.settled or not over or (over < 0 and charge.name != counter.name):
                    charge.settled = True
                    await counter.look()
                    continue
                # First: if the answer never comes, it may have happened, and must not happen twice.
                charge.settled = True
                if over > 0:
                    await counter.count(over)
                else:
                    counter.held = min(-over, charge.amount)
                    await counter.give_back()
            lease.settled = True
        return tuple([counter.left for counter in counters])

    async def charge(self, key: Key, plan: Plan, amounts: tuple[int, ...], now: float) -> tuple[int, ...]:
        counters = self._counters(key, plan, now)
        split = len(plan.requests)
        async with self._call(shield=True):
            for index, (counter, amount) in enumerate(zip(counters, amounts, strict=True)):
                if amount > 0:
                    await counter.count(min(amount, _MOST))
                elif index >= split:
                    await counter.look()
        return tuple([counter.left for counter in counters[split:]])

    async def aclose(self) -> None:
        """Close the connections of a storage that was given as a URI."""
        if self._open:
            await self._close()

    # --- parts of it -----------------------------------------------------------------------------------------------

    def _counters(self, key: Key, plan: Plan, now: float, *, tokens_only: bool = False) -> list[_Counter]:
        kind: type[_Counter] = _Fixed if plan.algorithm == "fixed" else _Moving
        names = (key,) if isinstance(key, str) else key
        levels = list(zip([self._owner(name) for name in names], plan.levels or (plan,), strict=True))
        windows = [(owner, window) for owner, level in levels for window in level.tokens]
        if not tokens_only:
            windows[:0] = [(owner, window) for owner, level in levels for window in level.requests]
        return [kind(self.storage, owner, window, now) for owner, window in windows]

    def _owner(self, name: str) -> str:
        # Bounded, of letters that every storage takes, and no personal data in clear.
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret)
        return self._prefix + digest.hexdigest()

    async def _take(self, scope: CancelScope, counters: list[_Counter], amounts: Iterable[int]) -> int | None:
        """Take all of it, or nothing and say which counter had no room."""
        try:
            # A change that is under way has an end: only so is known what is to be given back.
            scope.shield = True
            for index, (counter, amount) in enumerate(zip(counters, amounts, strict=True)):
                if amount and not await counter.take(amount):
                    await self._give_back(counters)
                    return index
            scope.shield = False
            await checkpoint_if_cancelled()
        except BaseException:
            with move_on_after(_PATIENCE, shield=True):
                await self._give_back(counters)
            raise
        return None

    async def _give_back(self, counters: list[_Counter]) -> None:
        for counter in counters:
            if counter.held:
                try:
                    await counter.give_back()
                except Exception as error:  # noqa: BLE001  drivers raise what they like; the others are still given back
                    self._failed(error)

    @asynccontextmanager
    async def _call(self, *, shield: bool = False) -> AsyncGenerator[CancelScope, None]:
        """The time that the storage has; whatever goes wrong with it is a `StoreUnavailableError`."""
        away = self._failures >= _FAILURES
        if away:
            if (wait := self._probe - time.monotonic()) > 0:
                raise StoreUnavailableError(f"{type(self.storage).__name__} of limits is away", wait)
            self._probe = time.monotonic() + _PAUSE
            if isinstance(self.storage, MemcachedStorage) and self._open:
                # memcachio never gets back the places in its pool from which a task was cancelled while it connected.
                await self._close()
                self.storage = self._open()
        with CancelScope(deadline=current_time() + self.deadline, shield=shield) as scope:
            try:
                yield scope
            except Exception as error:  # noqa: BLE001  drivers raise what they like; this one raises as well
                self._unavailable(error)
        if scope.cancelled_caught:
            self._unavailable(TimeoutError())
        if self._failures:
            if self._failures >= _FAILURES:
                logger.info("limits_storage_back", storage=type(self.storage).__name__)
            self._failures = 0

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        # Not all processes at once.
        self._probe = time.monotonic() + uniform(0.5, 1.0) * _PAUSE  # noqa: S311  spreads load, keeps no secret
        if self._failures == _FAILURES:
            logger.error("limits_storage_away", storage=type(self.storage).__name__, error=type(error).__name__)

    def _unavailable(self, error: Exception) -> NoReturn:
        self._failed(error)
        name = type(self.storage).__name__
        if isinstance(error, TimeoutError):
            raise StoreUnavailableError(f"{name} of limits did not decide in {self.deadline} seconds", _PAUSE) from None
        raise StoreUnavailableError(f"{name} of limits failed: {type(error).__name__}", _PAUSE) from error

    async def _close(self) -> None:
        storage: Any = self.storage
        bridge = getattr(storage, "bridge", None)
        clients = [getattr(bridge, "storage", None), getattr(bridge, "storage_replica", None)]
        if bridge is not None and hasattr(bridge, "get_storage"):
            clients = [getattr(await bridge.get_storage(), "connection_pool", None)]
        elif bridge is None:
            clients = [getattr(storage, "storage", None)]
        with move_on_after(self.deadline, shield=True):
            for client in clients:
                close = getattr(client, "aclose", None) or getattr(client, "close", None)
                if close is not None and isawaitable(closed := close()):
                    await closed


def _bounds(window: Window, now: float) -> tuple[int, int]:
    """When the window of `now` began, and when it ends."""
    if window.calendar is None:
        start = int(now // window.seconds) * window.seconds
        return start, start + window.seconds
    first = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return int(first.timestamp()), int(following.timestamp())


def _opened(uri: str, deadline: float, options: dict[str, Any]) -> Storage:
    """The storage at `uri`. No error repeats it: it may have a password."""
    matched = _SCHEME.match(uri)
    if matched is None:
        raise ValueError("storage must be a URI such as 'memcached://host:11211', or an asynchronous storage of limits")
    scheme = matched[1]
    options = dict(options)
    if scheme.startswith("redis"):
        options.setdefault("implementation", "redispy")
    if scheme.endswith("+sentinel"):
        # A replica tells what was, and a decision must know what is.
        options.setdefault("use_replicas", False)
    if scheme == "memcached" and options.get("implementation", "memcachio") == "memcachio":
        options.setdefault("connect_timeout", deadline / 2)
    try:
        storage = storage_from_string(f"async+{uri.removeprefix('async+')}", **options)
    except ConfigurationError as error:
        missing = _MISSING.search(str(error))
        if missing:
            raise ImportError(
                f"a storage {scheme}:// of limits needs the package {missing[1]}: pip install -U {missing[1]}"
            ) from None
        known = "memcached://, mongodb://, redis://, redis+cluster://, redis+sentinel://, valkey://"
        raise ValueError(
            f"limits cannot open a storage {scheme}:// so; it knows {known} (and those that you define)"
        ) from None
    return _checked(storage)


def _checked(storage: Any) -> Storage:
    if not isinstance(storage, Storage):
        raise ValueError(
            f"storage must be an asynchronous one, of limits.aio.storage, not {type(storage).__name__}: "
            "another would stop the event loop while it waits"
        )
    if isinstance(storage, RedisStorage) and isinstance(storage.bridge, CoredisBridge):
        raise ValueError(
            "coredis is not used: its counters may be left without an expiry; write implementation='redispy'"
        )
    return storage

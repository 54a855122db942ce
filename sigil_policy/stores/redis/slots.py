"""Slots that several processes share, in Redis or Valkey.

    slots = RedisSlots("redis://limits.internal:6379/0")
    ConcurrencyLimit(limits={"free": 2, "pro": 20}, store=slots)

What it promises beside what every `SlotStore` does:

* **One trip takes a slot**, whatever the number of claims, decided by the server in one step and on its own clock.
  Giving it back is one more, for which nobody waits. It is sent also when the request was cancelled.
* **A process that is killed** holds its slots for `ttl` seconds at most: each is a member of a sorted set that expires
  by the server's clock. While the process lives, one heartbeat for each event loop renews all its slots every third
  of the `ttl`, 200 in a trip. No task waits for a request.
* **A take that is cancelled or given up at the deadline** leaves nothing: if it comes to the server after all, it is
  undone when the answer comes; if no answer comes either, it expires.
* **A server that was away** knows of everything in flight as soon as it is back, and one that has forgotten with the
  next heartbeat. The limits refuse until enough has ended. What was given back while it was away expires.
* Keys hold digests, never a name: `sigil:1:c:{sigil}:{digest}`. Each has a time to live.

What it does not: a process that stands still for longer than `ttl` loses its slots to others until its next heartbeat,
and so do all for a moment when the server fails over to one whose clock is ahead by that much, or that has not yet
heard of the newest slots. Until then there may be more in flight than the limit.

In a cluster all slots of one `prefix` are on one node, because a caller's place and a route's are taken together,
and because one heartbeat renews them together. Taking them in two trips, from two nodes, would make a caller's own
requests refuse each other for a route that is full anyway. A slot costs that node two short scripts, a few microseconds
each; what is in flight is small, however many callers there are. Who needs more than one node gives policies stores of
different prefixes.

Needs the extra `redis`, and asyncio.
"""

import asyncio
import os
from collections.abc import Iterable, Sequence
from contextvars import Context
from functools import partial
from itertools import count
from typing import Any, ClassVar

from pydantic import SecretStr

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.link import RedisLink, Script, readable
from sigil_policy.stores.slots import Claim, Refusal, Slot, refusal

_TAKE = Script("slots_take")
_RENEW = Script("slots_renew")
_RELEASE = Script("slots_release")

# So many slots are renewed by one script: the server does nothing else meanwhile.
_RENEWED = 100
# And so many in one turn of the loop.
_SLICE = 200

Held = tuple[bytes, Sequence[bytes]]
"""The id of a slot, and the keys that it is under."""


class _Heartbeat:
    """The slots of one event loop that hold for `ttl` seconds, and the timer that renews them.

    It beats from the first slot on, and stops when it finds none: a process that is idle sends nothing.
    """

    __slots__ = ("_ids", "_name", "_running", "_store", "_timer", "loop", "open", "ttl")

    def __init__(self, store: "RedisSlots", loop: asyncio.AbstractEventLoop, ttl: float) -> None:
        self.loop = loop
        self.ttl = max(1, round(ttl * 1_000))
        self.open: dict[bytes, Sequence[bytes]] = {}
        self._store = store
        # Drawn where it is used, and not when the store is made: processes may be forked from one that has made it.
        self._name = os.urandom(12)
        self._ids = count()
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None

    def new_id(self) -> bytes:
        """An id that no slot of any process has."""
        return b"%b:%x" % (self._name, next(self._ids))

    def add(self, slot_id: bytes, keys: Sequence[bytes]) -> None:
        self.open[slot_id] = keys
        if self._timer is None:
            self._beat_later()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        self._timer = None
        if self.open:
            self._beat_later()
            if self._running is None or self._running.done():
                self._running = self.loop.create_task(self.renew(), context=Context())

    def _beat_later(self) -> None:
        # In a context of its own: that of the request which came first would be kept for as long as it beats.
        self._timer = self.loop.call_later(self.ttl / 3_000, self._beat, context=Context())

    async def renew(self) -> None:
        """Tell the store of every slot that is open: some at a time, so that requests go between."""
        held = list(self.open.items())
        for start in range(0, len(held), _SLICE):
            still = [pair for pair in held[start : start + _SLICE] if pair[0] in self.open]
            await asyncio.gather(
                *[self._renew_some(still[at : at + _RENEWED]) for at in range(0, len(still), _RENEWED)]
            )
            # What is refused at once does not wait.
            await asyncio.sleep(0)

    async def _renew_some(self, held: Sequence[Held]) -> None:
        by_key: dict[bytes, list[bytes]] = {}
        for slot_id, keys in held:
            for key in keys:
                by_key.setdefault(key, []).append(slot_id)
        args: list[bytes | int] = [self.ttl]
        for ids in by_key.values():
            args += (len(ids), *ids)
        renewed = partial(self._renewed, held)
        try:
            await self._store.link.run(_RENEW, list(by_key), args, abandoned=renewed)
        except StoreUnavailableError:
            return  # the link has counted it; the next beat comes before the slots expire
        renewed()

    def _renewed(self, held: Iterable[Held], _reply: Any = None) -> None:
        """Whoever ended meanwhile was given back, perhaps before it was renewed: give it back once more."""
        for slot_id, keys in held:
            if slot_id not in self.open:
                self._store.link.send(_RELEASE, keys, [slot_id])


class RedisSlots:
    """Slots in Redis or Valkey; the module says what it guarantees.

        RedisSlots("valkey://limits.internal:6379/0")

    Options:
        url: the server's URL, or a `RedisLink` that is there already, which other stores may share.
        prefix: what all keys begin with (default "sigil"): up to 64 letters, digits and `_ . : -`. Stores of different
            prefixes do not know each other.
        digest_key: with it names become keyed digests (default None: plain ones), 1 to 64 bytes. Who does not know it
            cannot tell which caller a key belongs to. All processes need the same.
        deadline: how long a call may take, in seconds (default 0.05); only with a URL, a link has its own.

    Raises `ValueError` for an option that cannot be. `take` raises `StoreUnavailableError` when the server does not
    answer in time, or with something that is no decision, and nothing else.
    """

    remote: ClassVar[bool] = True

    def __init__(
        self,
        url: str | RedisLink,
        *,
        prefix: str = "sigil",
        digest_key: SecretStr | None = None,
        deadline: float | None = None,
    ) -> None:
        self.prefix = prefix
        self._keys = KeySpace(prefix, digest_key, use=b"sigil slots")
        self.link = RedisLink.at(url, deadline)
        self._head = self._keys.together("c") + b":"
        self._heartbeats: dict[tuple[asyncio.AbstractEventLoop, float], _Heartbeat] = {}
        self.link.on_restored(self._restored)

    def __repr__(self) -> str:
        return f"RedisSlots({self.link!r}, prefix={self.prefix!r})"

    def redis_key(self, key: str) -> bytes:
        """The key of the sorted set that counts what is in flight under `key`."""
        return self._head + self._keys.digest(key)

    async def take(self, claims: tuple[Claim, ...], ttl: float, now: float) -> Slot | Refusal:
        heartbeat = self._heartbeat(ttl)
        slot_id = heartbeat.new_id()
        keys = [self.redis_key(key) for key, _ in claims]
        args: list[bytes | int] = [slot_id, heartbeat.ttl, *[limit for _, limit in claims]]
        reply = await self.link.run(_TAKE, keys, args, abandoned=partial(self._undo, slot_id, keys))
        if not readable(reply, 1 + len(keys)):
            # If it was taken all the same, it expires.
            raise self.link.unreadable()
        in_flight = tuple(reply[1:])
        if not reply[0]:
            refused = refusal(claims, in_flight)
            if not refused.refused_by:
                raise self.link.unreadable()
            return refused
        heartbeat.add(slot_id, keys)
        return Slot(claims, in_flight, (heartbeat, slot_id, keys))

    def hold(self, claims: tuple[Claim, ...], ttl: float) -> Slot:
        heartbeat = self._heartbeat(ttl)
        slot_id = heartbeat.new_id()
        keys = [self.redis_key(key) for key, _ in claims]
        heartbeat.add(slot_id, keys)
        return Slot(claims, (), (heartbeat, slot_id, keys))

    def give_back(self, slot: Slot) -> None:
        if slot.open:
            slot.open = False
            heartbeat, slot_id, keys = slot.mark
            del heartbeat.open[slot_id]
            self.link.send(_RELEASE, keys, [slot_id])

    async def aclose(self) -> None:
        """Stop the heartbeats of this event loop, and close the link. A slot that is open yet expires."""
        loop = asyncio.get_running_loop()
        for place in [place for place in self._heartbeats if place[0] is loop]:
            self._heartbeats.pop(place).stop()
        await self.link.aclose()

    def _heartbeat(self, ttl: float) -> _Heartbeat:
        loop = asyncio.get_running_loop()
        heartbeat = self._heartbeats.get((loop, ttl))
        if heartbeat is None:
            for place in [place for place in self._heartbeats if place[0].is_closed()]:
                self._heartbeats.pop(place, None)
            heartbeat = self._heartbeats[loop, ttl] = _Heartbeat(self, loop, ttl)
        return heartbeat

    async def _restored(self) -> None:
        loop = asyncio.get_running_loop()
        for heartbeat in [beat for place, beat in self._heartbeats.items() if place[0] is loop]:
            await heartbeat.renew()

    def _undo(self, slot_id: bytes, keys: Sequence[bytes], reply: Any) -> None:
        """A take that nobody waits for any more was answered after all."""
        if readable(reply, 1 + len(keys)) and reply[0]:
            self.link.send(_RELEASE, keys, [slot_id])

"""What a store of slots promises: how many exchanges are in flight under a key, decided before one more begins.

    slots = MemorySlots()
    slot = slots.take((Claim("alice", 2), Claim("POST /run", 5)), 15.0, now)
    if isinstance(slot, Slot):
        ...
        slots.give_back(slot)

Guarantees of every store:

* **All or nothing.** What one claim refuses takes no place under any of them.
* **Never more than the limit** of a claim is in flight under its key: what was taken and not given back. A lower limit
  refuses until enough has ended; it ends nothing.
* **Given back once.** Doing it again changes nothing.
* **A cancelled take leaves nothing behind.**
* **A slot that nobody can give back comes free.** In a store on another machine it has a time to live of `ttl` seconds,
  which a heartbeat renews while its process lives. A store in this process dies with it and needs neither.

A remote store raises `StoreUnavailableError`, and nothing else, when it cannot decide in time.
"""

from collections.abc import Awaitable
from threading import Lock
from typing import Any, ClassVar, NamedTuple, Protocol


class Claim(NamedTuple):
    """At most `limit` exchanges in flight under `key`."""

    key: str
    limit: int


class Slot:
    """A place under the key of each claim, until it is given back.

    `in_flight` is how many there were under each key when it was taken, with this one. `mark` is the store's own note.
    """

    __slots__ = ("claims", "in_flight", "mark", "open")

    def __init__(self, claims: tuple[Claim, ...], in_flight: tuple[int, ...], mark: Any = None) -> None:
        self.claims = claims
        self.in_flight = in_flight
        self.mark = mark
        self.open = True

    def __repr__(self) -> str:
        # Not the keys: they name callers.
        return f"Slot({len(self.claims)} claims, in_flight={self.in_flight}, open={self.open})"


class Refusal(NamedTuple):
    """No slot: how many are `in_flight` under each key; `refused_by` are the indices of the claims that are full."""

    in_flight: tuple[int, ...]
    refused_by: tuple[int, ...]


def refusal(claims: tuple[Claim, ...], in_flight: tuple[int, ...]) -> Refusal:
    """The refusal for `claims` of which at least one is full."""
    return Refusal(in_flight, tuple(i for i, claim in enumerate(claims) if in_flight[i] >= claim.limit))


class SlotStore(Protocol):
    """Where slots are counted. The keys of the claims of one slot differ. A store may have `async def aclose(self)`.

    taken = store.take((Claim("alice", 2), Claim("POST /run", 50)), ttl=15, now=clock.time())
    if isinstance(taken, Slot):
        ...
        store.give_back(taken)
    """

    @property
    def remote(self) -> bool:
        """Whether its methods return awaitables."""
        ...

    def take(self, claims: tuple[Claim, ...], ttl: float, now: float) -> Slot | Refusal | Awaitable[Slot | Refusal]:
        """Take a place under the key of each claim, or under none.

        `ttl` is for how many seconds they are held without a sign of life from this process. `now` is seconds since the
        epoch; a store with a clock of its own may ignore it.
        """
        ...

    def hold(self, claims: tuple[Claim, ...], ttl: float) -> Slot:
        """Count an exchange that is in flight already, whatever the limits say. It never waits: a store that is away
        learns of it once it is back. Its `in_flight` is empty where nobody can know it."""
        ...

    def give_back(self, slot: Slot) -> Awaitable[None] | None:
        """Give up every place of `slot`. What need not be waited for returns None."""
        ...


class MemorySlots:
    """Slots counted in this process, also by several threads.

    A take and a giving back cost the same whatever is in flight. A key is known while something is in flight under it,
    and no longer: there are never more keys than claims of exchanges that are running.
    """

    remote: ClassVar[bool] = False

    __slots__ = ("_in_flight", "_lock")

    def __init__(self) -> None:
        # Event loops in several threads may share a store.
        self._lock = Lock()
        self._in_flight: dict[str, int] = {}

    def __len__(self) -> int:
        """Under how many keys something is in flight."""
        return len(self._in_flight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} keys)"

    def in_flight(self, key: str) -> int:
        """How many are in flight under `key`."""
        return self._in_flight.get(key, 0)

    def take(self, claims: tuple[Claim, ...], ttl: float, now: float) -> Slot | Refusal:
        known = self._in_flight
        counts = []
        full = False
        with self._lock:
            for key, limit in claims:
                count = known.get(key, 0)
                full = full or count >= limit
                counts.append(count)
            if not full:
                for index, claim in enumerate(claims):
                    counts[index] += 1
                    known[claim[0]] = counts[index]
        return refusal(claims, tuple(counts)) if full else Slot(claims, tuple(counts))

    def hold(self, claims: tuple[Claim, ...], ttl: float) -> Slot:
        known = self._in_flight
        with self._lock:
            for key, _ in claims:
                known[key] = known.get(key, 0) + 1
            return Slot(claims, tuple([known[key] for key, _ in claims]))

    def give_back(self, slot: Slot) -> None:
        known = self._in_flight
        with self._lock:
            if not slot.open:
                return
            slot.open = False
            for key, _ in slot.claims:
                left = known[key] - 1
                if left:
                    known[key] = left
                else:
                    del known[key]

"""Stores by URL: policies that name the same one share it.

    RateLimit(store="redis://limits.internal:6379/0")
    RateLimit(store="limits+memcached://cache.internal:11211")

| URL | store |
|---|---|
| `redis://`, `rediss://`, `valkey://`, `valkeys://`, `unix://` | one server |
| `redis+cluster://a:6379,b:6379` | a cluster |
| `redis+sentinel://a:26379,b:26379/name` | the primary that Sentinel names |
| `limits+...` | any storage of the `limits` package, by its own URL; see `sigil_policy.stores.adapter` |

A store connects when it is first asked, and is closed with the lifespan of the application. Options beyond the URL are
those of `RedisLimits(url, ...)` and `LimitsStorage(url, ...)`: make one and hand it to the policies.
"""

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pydantic import AfterValidator

from sigil_policy.stores.limits import LimitStore
from sigil_policy.stores.replays import ReplayStore
from sigil_policy.stores.revocations import RevocationStore
from sigil_policy.stores.slots import SlotStore
from sigil_policy.stores.tickets import TicketStore

if TYPE_CHECKING:
    from sigil_policy.stores.adapter import LimitsStorage
    from sigil_policy.stores.redis import RedisLimits, RedisLink, RedisRevocations, RedisSlots
    from sigil_policy.stores.redis.replays import RedisReplays
    from sigil_policy.stores.redis.tickets import RedisTickets

_LOCK = Lock()
_LINKS: "WeakValueDictionary[str, RedisLink]" = WeakValueDictionary()
_LIMITS: "WeakValueDictionary[str, RedisLimits | LimitsStorage]" = WeakValueDictionary()
_SLOTS: "WeakValueDictionary[str, RedisSlots]" = WeakValueDictionary()
_REVOCATIONS: "WeakValueDictionary[str, RedisRevocations]" = WeakValueDictionary()
_TICKETS: "WeakValueDictionary[str, RedisTickets]" = WeakValueDictionary()
_REPLAYS: "WeakValueDictionary[str, RedisReplays]" = WeakValueDictionary()
_ADAPTED = "limits+"


def found_by(find: Callable[[str], Any]) -> AfterValidator:
    """For an option that is a store or its URL: `store: Annotated[Any, found_by(limit_store)] = None`.

    The store is found at construction, so that a URL with a password stands in no repr.
    """
    return AfterValidator(lambda store: find(store) if isinstance(store, str) else store)


def limit_store(url: str) -> LimitStore:
    """The store of limits at `url`. Raises `ValueError` if it names none, `ImportError` for a missing extra."""
    with _LOCK:
        store = _LIMITS.get(url)
        if store is None:
            if url.startswith(_ADAPTED):
                from sigil_policy.stores.adapter import LimitsStorage

                store = LimitsStorage(url.removeprefix(_ADAPTED))
            else:
                from sigil_policy.stores.redis import RedisLimits

                store = RedisLimits(_link(url))
            _LIMITS[url] = store
        return store


def slot_store(url: str) -> SlotStore:
    """The store of slots at `url`, over the same connection as the limits there."""
    with _LOCK:
        store = _SLOTS.get(url)
        if store is None:
            from sigil_policy.stores.redis import RedisSlots

            store = _SLOTS[url] = RedisSlots(_link(url))
        return store


def revocation_store(url: str) -> RevocationStore:
    """The store of revocations at `url`, over the same connection as the limits there."""
    with _LOCK:
        store = _REVOCATIONS.get(url)
        if store is None:
            from sigil_policy.stores.redis import RedisRevocations

            store = _REVOCATIONS[url] = RedisRevocations(_link(url))
        return store


def ticket_store(url: str) -> TicketStore:
    """The store of tickets at `url`, over the same connection as the limits there."""
    with _LOCK:
        store = _TICKETS.get(url)
        if store is None:
            from sigil_policy.stores.redis.tickets import RedisTickets

            store = _TICKETS[url] = RedisTickets(_link(url))
        return store


def replay_store(url: str) -> ReplayStore:
    """The store of used proofs at `url`, over the same connection as the limits there."""
    with _LOCK:
        store = _REPLAYS.get(url)
        if store is None:
            from sigil_policy.stores.redis.replays import RedisReplays

            store = _REPLAYS[url] = RedisReplays(_link(url))
        return store


def _link(url: str) -> "RedisLink":
    from sigil_policy.stores.redis import RedisLink

    link = _LINKS.get(url)
    if link is None:
        link = _LINKS[url] = RedisLink(url)
    return link

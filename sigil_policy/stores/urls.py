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
    from sigil_policy.stores.redis import RedisLink

_LOCK = Lock()
_LINKS: "WeakValueDictionary[str, RedisLink]" = WeakValueDictionary()
_STORES: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
"""By the name of its class and its URL, each store that somebody still has."""
_ADAPTED = "limits+"


def found_by(find: Callable[[str], Any]) -> AfterValidator:
    """For an option that is a store or its URL: `store: Annotated[Any, found_by(limit_store)] = None`.

    The store is found at construction, so that a URL with a password stands in no repr.
    """
    return AfterValidator(lambda store: find(store) if isinstance(store, str) else store)


def limit_store(url: str) -> LimitStore:
    """The store of limits at `url`. Raises `ValueError` if it names none, `ImportError` for a missing extra."""
    store: LimitStore = _found("LimitsStorage" if url.startswith(_ADAPTED) else "RedisLimits", url)
    return store


def slot_store(url: str) -> SlotStore:
    """The store of slots at `url`, over the same connection as the limits there; so are those below."""
    store: SlotStore = _found("RedisSlots", url)
    return store


def revocation_store(url: str) -> RevocationStore:
    """The store of revocations at `url`."""
    store: RevocationStore = _found("RedisRevocations", url)
    return store


def ticket_store(url: str) -> TicketStore:
    """The store of tickets at `url`."""
    store: TicketStore = _found("RedisTickets", url)
    return store


def replay_store(url: str) -> ReplayStore:
    """The store of used proofs at `url`."""
    store: ReplayStore = _found("RedisReplays", url)
    return store


def _found(kind: str, url: str) -> Any:
    with _LOCK:
        store = _STORES.get((kind, url))
        if store is None:
            store = _STORES[kind, url] = _made(kind, url)
        return store


def _made(kind: str, url: str) -> Any:
    if kind == "LimitsStorage":
        from sigil_policy.stores.adapter import LimitsStorage

        return LimitsStorage(url.removeprefix(_ADAPTED))
    from sigil_policy.stores import redis

    link = _LINKS.get(url)
    if link is None:
        link = _LINKS[url] = redis.RedisLink(url)
    return getattr(redis, kind)(link)

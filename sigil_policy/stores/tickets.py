"""One-time tickets: what stands for a caller for some seconds, and once.

    tickets = MemoryTickets()                                    # this process
    tickets = RedisTickets("redis://auth.internal:6379/0")       # all that share a server

    text = new_ticket()                 # "wst_..." for the client; the store gets a digest
    record = Ticket(principal).encode()
    tickets.issue(ticket_digest(text), record, holder=principal.key, most=10, ttl=30, now=now)

    tickets.redeem(ticket_digest(text), now)            # the record, once

Guarantees of every store:

* **Once.** Of any number who redeem one ticket at the same moment, one gets its record; the others get None, as for a
  ticket that never was.
* **Not after its time**: `ttl` seconds after it was issued, by the store's own clock.
* **Bounded**: a holder has at most `most` tickets that were neither redeemed nor have ended, and all together
  `max_tickets`. Nothing is forgotten to make room: a store that is full issues no more.
* **Only digests of tickets are kept.** Whoever reads a store learns who may come, and cannot come in their place.

A remote store raises `StoreUnavailableError`, and nothing else, when it cannot decide in time; one that is full raises
it too.
"""

import json
import re
from collections.abc import Awaitable, Mapping
from hashlib import sha256
from itertools import islice
from math import ceil, isfinite
from secrets import token_urlsafe
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from sigil_policy.core.facts import Principal
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.wire.jws import MAX_CONTAINERS, MAX_DEPTH, parse_object

MAX_TTL = 300.0
"""Seconds that a ticket holds, at most."""

MAX_RECORD = 4_096
"""Bytes of what is kept for a ticket, at most."""

# What takes long for its length: members and elements, of which an object or an array counts as four; and doubles.
_MOST_ITEMS = 384
_MOST_DOUBLES = 32

_PREFIX = "wst_"  # so that one that has leaked is found
_TICKET = re.compile(rb"wst_[A-Za-z0-9_-]{43}")
_VERSION = 1
_LOOKS = 64


def new_ticket() -> str:
    """A ticket: 256 random bits, in characters that need no encoding in a URL and may stand in a subprotocol."""
    return _PREFIX + token_urlsafe(32)


def is_ticket(text: bytes) -> bool:
    """Whether `text` looks like a ticket: what does not is refused without asking a store."""
    return _TICKET.fullmatch(text) is not None


def ticket_digest(text: bytes | str) -> bytes:
    """What a ticket is known by. Nobody can guess 256 bits, so a plain digest will do."""
    return sha256(text.encode("ascii") if isinstance(text, str) else text).digest()


class Ticket(NamedTuple):
    """What a ticket says: whom it stands for, from which `Origin` alone it is taken, and what for (None: any).

    `key_id` is the public id of the API key that bought it, and `key_header` the header that such keys come in, where
    one did.
    """

    principal: Principal
    origin: str | None = None
    audience: str | None = None
    key_id: str | None = None
    key_header: str | None = None

    def encode(self) -> bytes:
        """As JSON. `ValueError` for more than `MAX_RECORD` bytes, 384 scopes, or 384 members and elements of the claims
        (an object or an array counts as four), and for what `decode` would not read."""
        record = self._encode()
        if record is None or len(record) > MAX_RECORD:
            # Outside of the handler: an error that shows the claims is not chained here.
            raise ValueError(
                f"what is known of the caller is no JSON, or has more than {MAX_RECORD} bytes or {_MOST_ITEMS} items"
            )
        return record

    def _encode(self) -> bytes | None:
        principal = self.principal
        if not principal.subject or len(principal.scopes) > _MOST_ITEMS:
            return None
        members = {
            "version": _VERSION,
            "subject": principal.subject,
            "scopes": sorted(principal.scopes),
            "tier": principal.tier,
            "kind": principal.kind,
            "issuer": principal.issuer,
            "realm": principal.realm,
            "claims": None,
            "expires": principal.expires,
            "origin": self.origin,
            "audience": self.audience,
            "key_id": self.key_id,
            "key_header": self.key_header,
        }
        try:
            members["claims"] = _plain(principal.claims, MAX_DEPTH - 1, [_MOST_ITEMS, _MOST_DOUBLES])
            # Half of a surrogate pair is no character, and fails to be encoded.
            record = _ENCODER.encode(members).encode("utf-8")
        except (TypeError, ValueError):
            return None
        # Counted in the text, as it will be when it is read.
        return record if record.count(b"[") + record.count(b"{") <= MAX_CONTAINERS else None

    @classmethod
    def decode(cls, record: bytes) -> "Ticket | None":
        """What `encode` wrote; None for anything else. The claims are a value that nobody can change."""
        try:
            members = parse_object(record, trusted=True) if len(record) <= MAX_RECORD else {}
        except ValueError:
            return None
        if members.pop("version", None) != _VERSION or members.keys() != _SHAPE.keys():
            return None
        if not all(isinstance(value, _SHAPE[name]) for name, value in members.items()):
            return None
        expires, scopes = members["expires"], members["scopes"]
        if isinstance(expires, bool) or (expires is not None and not isfinite(expires)):
            return None
        if not members["subject"] or not all(isinstance(scope, str) for scope in scopes):
            return None
        principal = Principal(
            subject=members["subject"],
            scopes=frozenset(scopes),
            tier=members["tier"],
            kind=members["kind"],
            issuer=members["issuer"],
            realm=members["realm"],
            claims=_frozen(members["claims"]),
            expires=expires,
        )
        return cls(principal, *(members[name] for name in ("origin", "audience", "key_id", "key_header")))


_TEXT, _TEXT_OR_NONE = (str,), (str, type(None))
_SHAPE: Mapping[str, tuple[type, ...]] = {
    "subject": _TEXT,
    "scopes": (list,),
    "tier": _TEXT_OR_NONE,
    "kind": _TEXT,
    "issuer": _TEXT_OR_NONE,
    "realm": _TEXT,
    "claims": (dict,),
    "expires": (int, float, type(None)),
    "origin": _TEXT_OR_NONE,
    "audience": _TEXT_OR_NONE,
    "key_id": _TEXT_OR_NONE,
    "key_header": _TEXT_OR_NONE,
}
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any, depth: int, left: list[int]) -> Any:
    """`value` as JSON's own types. `left` is how many items and doubles it may still have; `ValueError` for more, and
    for what is nothing that a token says."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        left[1] -= 1
        if left[1] < 0:
            raise ValueError("too many doubles")
        return value
    if not depth:
        raise ValueError("nested too deeply")
    if not isinstance(value, (MappingProxyType, tuple, list, dict)):
        raise ValueError("nothing that JSON can say")
    left[0] -= 4 + len(value)
    if left[0] < 0:
        raise ValueError("too many items")
    if isinstance(value, (tuple, list)):
        return [_plain(item, depth - 1, left) for item in value]
    members = {name: _plain(item, depth - 1, left) for name, item in value.items()}
    if not all(type(name) is str for name in members):
        raise ValueError("a member without a name")
    return members


def _frozen(claims: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({name: _freeze(value) for name, value in claims.items()})


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return _frozen(value)
    if isinstance(value, list):
        return tuple(map(_freeze, value))
    return value


class TicketStore(Protocol):
    """Where tickets are. `now` is monotonic; a store with a clock of its own ignores it.

    A store may have `async def aclose(self)`.
    """

    def issue(
        self, digest: bytes, record: bytes, *, holder: str, most: int, ttl: float, now: float
    ) -> float | Awaitable[float]:
        """Keep `record` for a ticket of `holder`. 0 once it is kept, else nothing is: the holder has `most` already,
        and may have another in so many seconds."""
        ...

    def redeem(self, digest: bytes, now: float) -> bytes | Awaitable[bytes | None] | None:
        """The record of a ticket that holds, once; else None."""
        ...


class _Entry(NamedTuple):
    record: bytes
    end: float
    holder: str


class MemoryTickets:
    """Tickets of this process, also of several threads.

        tickets = MemoryTickets()
        policies = [WebSocketTicketAuth(store=tickets), ..., WebSocketTickets(store=tickets)]

    What an issue costs depends on the tickets of that holder, not on how many there are.

    Options:
        max_tickets: how many there may be at once, of up to 4 KiB each (default 10,000).
    """

    __slots__ = ("_ends", "_entries", "_holders", "_lock", "max_tickets")

    def __init__(self, *, max_tickets: int = 10_000) -> None:
        if max_tickets < 1:
            raise ValueError(f"max_tickets is at least 1, not {max_tickets!r}")
        self.max_tickets = max_tickets
        self._lock = Lock()
        self._entries: dict[bytes, _Entry] = {}
        self._holders: dict[str, dict[bytes, float]] = {}
        # By the second in which they end: there are no more of them than seconds that a ticket may hold.
        self._ends: dict[int, dict[bytes, float]] = {}

    def __len__(self) -> int:
        """How many tickets there are, those included that have ended and were not looked at since."""
        return len(self._entries)

    def __repr__(self) -> str:
        return f"MemoryTickets({len(self)} tickets)"

    def issue(self, digest: bytes, record: bytes, *, holder: str, most: int, ttl: float, now: float) -> float:
        with self._lock:
            self._sweep(now)
            own = self._holders.get(holder, {})
            for ended in [known for known, end in own.items() if end <= now]:
                self._forget(ended)
            if len(own) >= most:
                return max(min(own.values()) - now, 0.001)
            if len(self._entries) >= self.max_tickets:
                first = min(self._ends)
                raise StoreUnavailableError("there are as many tickets as the store takes", max(first - now, 1.0))
            end = now + ttl
            self._entries[digest] = _Entry(record, end, holder)
            self._holders.setdefault(holder, own)[digest] = end
            self._ends.setdefault(ceil(end), {})[digest] = end
            return 0.0

    def redeem(self, digest: bytes, now: float) -> bytes | None:
        with self._lock:
            self._sweep(now)
            entry = self._forget(digest)
        return entry.record if entry is not None and now < entry.end else None

    def _sweep(self, now: float) -> None:
        """Forget some of those that have ended: more than are issued meanwhile."""
        first = min(self._ends, default=None)
        if first is not None and first <= now:
            for digest in tuple(islice(self._ends[first], _LOOKS)):
                self._forget(digest)

    def _forget(self, digest: bytes) -> _Entry | None:
        entry = self._entries.pop(digest, None)
        if entry is not None:
            _take(self._holders, entry.holder, digest)
            _take(self._ends, ceil(entry.end), digest)
        return entry


def _take(groups: dict[Any, dict[bytes, float]], name: Any, digest: bytes) -> None:
    """Take a digest out of its group, which goes with its last one."""
    group = groups[name]
    del group[digest]
    if not group:
        del groups[name]

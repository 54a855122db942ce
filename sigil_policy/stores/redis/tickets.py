"""Tickets that several processes share, in Redis or Valkey.

    tickets = RedisTickets("redis://auth.internal:6379/0")
    policies = [WebSocketTicketAuth(store=tickets), ..., WebSocketTickets(store=tickets)]

What it promises beside what every `TicketStore` does:

* **One trip** to issue, one to redeem; each is one script, so that of two processes that redeem one ticket at the same
  moment exactly one gets it. The server's clock decides what has ended.
* **Closed when in doubt.** A redemption whose answer is lost has used the ticket up, and nobody got it. An issue whose
  waiter has gone is taken back; one whose answer is lost counts for its holder until it ends.
* Keys hold digests, no ticket and no caller: `sigil:1:tickets:{sigil}:` and the ticket's digest, `:ends` and `:names`.
  A record is the caller as JSON, with the claims of the token, for as long as the ticket holds: give the server a
  password, and TLS.
* Every key has an end.

It cannot remember what the server forgets: after a failover to a replica that was behind, a ticket that was redeemed in
the last moment before may be redeemed once more, for as long as it holds.

In a cluster all of one prefix is on one node. Needs Redis 6.2 or Valkey (`GETDEL`), the extra `redis`, and asyncio.
"""

from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from math import ceil
from typing import Any

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.link import RedisLink, Script

_ISSUE = Script("tickets_issue")
_REDEEM = Script("tickets_redeem")


class RedisTickets:
    """Tickets in Redis or Valkey; the module says what it guarantees.

        RedisTickets("valkey://auth.internal:6379/0")

    Options:
        url: the server's URL, or a `RedisLink` that is there already, which other stores may share.
        prefix: what all keys begin with (default "sigil"): up to 64 letters, digits and `_ . : -`. Stores of different
            prefixes do not know each other's tickets.
        max_tickets: how many there may be at once, of up to 4 KiB each (default 100,000).
        deadline: how long a trip may take, in seconds (default 0.05); only with a URL, a link has its own.

    Raises `ValueError` for an option that cannot be.
    """

    def __init__(
        self, url: str | RedisLink, *, prefix: str = "sigil", max_tickets: int = 100_000, deadline: float | None = None
    ) -> None:
        root = KeySpace(prefix).together("tickets") + b":"
        if max_tickets < 1:
            raise ValueError(f"max_tickets is at least 1, not {max_tickets!r}")
        self.link = RedisLink.at(url, deadline)
        self.prefix = prefix
        self.max_tickets = max_tickets
        self._root = root
        self._sets = (root + b"ends", root + b"names")

    def __repr__(self) -> str:
        return f"RedisTickets({self.link!r}, prefix={self.prefix!r})"

    async def issue(self, digest: bytes, record: bytes, *, holder: str, most: int, ttl: float, now: float) -> float:
        """Keep a ticket, as `TicketStore.issue` says. Raises `StoreUnavailableError`, also where there are too many."""
        del now  # the server's clock decides
        name = blake2b(holder.encode("utf-8", "surrogatepass"), digest_size=16, person=b"sigil ticket").digest()
        args: list[bytes | int] = [name + digest, record, max(1, ceil(ttl * 1_000)), most, self.max_tickets]
        take_back: Callable[[Any], None] = partial(self._take_back, digest)
        wait = await self.link.run(_ISSUE, self._keys(digest), args, abandoned=take_back)
        if type(wait) is not int:
            raise self.link.unreadable()
        if wait < 0:
            raise StoreUnavailableError("there are as many tickets as the store takes", max(-wait / 1_000, 1.0))
        return wait / 1_000

    async def redeem(self, digest: bytes, now: float) -> bytes | None:
        """The record of a ticket, as `TicketStore.redeem` says. Raises `StoreUnavailableError`."""
        del now
        record = await self.link.run(_REDEEM, self._keys(digest), [digest])
        if record is not None and type(record) is not bytes:
            raise self.link.unreadable()
        return record

    async def aclose(self) -> None:
        """Close the link; using the store again opens it again."""
        await self.link.aclose()

    def _keys(self, digest: bytes) -> tuple[bytes, bytes, bytes]:
        return (self._root + digest.hex().encode(), *self._sets)

    def _take_back(self, digest: bytes, reply: Any) -> None:
        if reply == 0:
            self.link.send(_REDEEM, self._keys(digest), [digest])

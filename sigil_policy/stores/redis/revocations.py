"""Revocations that several processes share, in Redis or Valkey.

    revocations = RedisRevocations("redis://auth.internal:6379/0")
    Revocation(store=revocations)
    await revocations.revoke(subject="user_123", issued_before=time.time())

What it promises beside what every `RevocationStore` does:

* **A copy in each process.** Look-ups ask the copy, and never the server. A refresh asks for what has changed since the
  last one: one trip, mostly an empty one. Several who ask at once share it.
* **Once `revoke` has returned**, every copy that is refreshed later has it, and that of this process has it already.
* **Trips are bounded**: a page has `page` entries. A process that starts, or comes back after more than an hour, reads
  everything, page by page, and decides by what it knew until it has it all.
* **A server that has lost what a process knows** (restarted without its data, replaced by a replica that was behind)
  takes nothing from that process: it keeps what it has read until that ends, or is restored. Processes that start later
  know only what the server has: give it persistence.
* **After a failure** no refresh is tried for as long as the error says.
* Keys hold digests, never a name: `sigil:1:revoked:{sigil}`, with `:entries`, `:log` and `:ends`. They end with the
  last entry.

`revoke` and `restore` raise `StoreUnavailableError` when the server does not answer in time; then nobody knows whether
it was done, and doing it again is safe. In a cluster all of one prefix is on one node.

Needs the extra `redis`, and asyncio.
"""

import asyncio
import os
from math import inf
from typing import Any, ClassVar

from pydantic import SecretStr

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.link import RedisLink, Script
from sigil_policy.stores.revocations import (
    MAX_ENTRIES,
    Entry,
    RevocationsFullError,
    Revoked,
    entry_name,
    entry_names,
    new_entry,
)

_WRITE = Script("revocations_write")
_READ = Script("revocations_read")

_SWEPT = 256
# How long what the server says is: a name is a letter and a digest.
_EPOCH, _REVISION, _NAME = 64, 20, 1 + 18
# Reading everything is begun anew so often, when it is changed meanwhile, before it waits for the next refresh.
_STARTS = 3
# Another process may keep more, and what was taken back is read as well: up to so many times ours.
_MORE = 4


class RedisRevocations:
    """Revocations in Redis or Valkey; the module says what it guarantees.

        RedisRevocations("valkey://auth.internal:6379/0")

    Options:
        url: the server's URL, or a `RedisLink` that is there already, which other stores may share.
        prefix: what all keys begin with (default "sigil"): up to 64 letters, digits and `_ . : -`. Stores of different
            prefixes do not know each other.
        digest_key: with it names become keyed digests (default None: plain ones), 1 to 64 bytes. Who does not know it
            cannot tell who was revoked. All processes need the same.
        max_entries: how many there may be (default 100,000), of about 200 bytes in each process and 400 in the server.
        page: how many entries one trip reads (default 1,000).
        clock: tells `revoke` what has ended (default: the machine's).
        deadline: how long a trip may take, in seconds (default 0.05); only with a URL, a link has its own.

    Raises `ValueError` for an option that cannot be.
    """

    remote: ClassVar[bool] = True

    def __init__(
        self,
        url: str | RedisLink,
        *,
        prefix: str = "sigil",
        digest_key: SecretStr | None = None,
        max_entries: int = MAX_ENTRIES,
        page: int = 1_000,
        clock: Clock = SYSTEM_CLOCK,
        deadline: float | None = None,
    ) -> None:
        space = KeySpace(prefix, digest_key, use=b"sigil revoked")
        if max_entries < 1 or not 1 <= page <= 5_000:
            raise ValueError(f"max_entries is at least 1 and page 1 to 5000, not {max_entries!r} and {page!r}")
        self.link = RedisLink.at(url, deadline)
        self.prefix = prefix
        self.max_entries = max_entries
        self._page = page
        self._clock = clock
        root = space.together("revoked")
        self._keys = (root, root + b":entries", root + b":log", root + b":ends")
        self._digest = space.raw_digest
        self._known = Revoked(self._name)
        self._epoch: bytes = b""
        self._revision: bytes = b"0"
        self._at = -inf
        self._rest_until = -inf
        self._flights: dict[asyncio.AbstractEventLoop, asyncio.Future[StoreUnavailableError | bool]] = {}

    def __repr__(self) -> str:
        return f"RedisRevocations({self.link!r}, prefix={self.prefix!r}, {len(self._known)} entries known)"

    def __len__(self) -> int:
        """How many entries this process knows."""
        return len(self._known)

    def _name(self, name: str) -> bytes:
        # The first letter is the kind.
        return name[0].encode("ascii") + self._digest(name)

    # --- asked by the policy ---------------------------------------------------------------------------------------

    def revoked(self, *, jti: str | None, subject: str, issuer: str | None, issued: float | None, now: float) -> bool:
        """Whether such a token is revoked, by what this process knows."""
        return self._known.holds(jti=jti, subject=subject, issuer=issuer, issued=issued, now=now)

    def age(self, now: float) -> float:
        """For how many seconds changes may have been missed; infinite before the first refresh."""
        return now - self._at

    def resting(self, now: float) -> bool:
        """Whether a refresh is under way, or it is too early for another."""
        return now < self._rest_until or any(not loop.is_closed() for loop in tuple(self._flights))

    async def refresh(self, now: float) -> None:
        """Bring the copy up to date. Who is cancelled while others wait for it leaves it to one of them."""
        loop = asyncio.get_running_loop()
        while True:
            flight = self._flights.get(loop)
            if flight is None:
                break
            ended = await asyncio.shield(flight)
            if isinstance(ended, StoreUnavailableError):
                raise StoreUnavailableError("revocations could not be refreshed", ended.retry_after)
            if ended:
                return
        if now < self._rest_until:
            raise StoreUnavailableError("revocations could not be refreshed", self._rest_until - now)
        for other in [other for other in self._flights if other.is_closed()]:
            self._flights.pop(other, None)
        flight = self._flights[loop] = loop.create_future()
        result: StoreUnavailableError | bool = False
        try:
            await self._read()
            self._at = max(self._at, now)
            self._rest_until = -inf
            result = True
        except StoreUnavailableError as lost:
            result = lost
            self._rest_until = now + lost.retry_after
            raise
        finally:
            del self._flights[loop]
            flight.set_result(result)

    # --- asked by the application ----------------------------------------------------------------------------------

    async def revoke(
        self,
        *,
        jti: str | None = None,
        subject: str | None = None,
        issuer: str | None = None,
        issued_before: float | None = None,
        until: float | None = None,
    ) -> None:
        """Revoke, as `RevocationStore.revoke` says.

        Raises `StoreUnavailableError`, `RevocationsFullError`, and `ValueError` for what names nothing.
        """
        entry = new_entry(jti, issued_before, until)
        name = self._name(entry_name(jti, subject, issuer, issued_before))
        if await self._write(name, entry, 0) < 0:
            raise RevocationsFullError
        self._known.put(name, entry, self._clock.time())

    async def restore(self, *, jti: str | None = None, subject: str | None = None, issuer: str | None = None) -> bool:
        """Take back, as `RevocationStore.restore` says. Raises `StoreUnavailableError`."""
        found = False
        for name in map(self._name, entry_names(jti, subject, issuer)):
            taken = await self._write(name, Entry(0, 0), 1)
            # Also where only this process knows it still.
            found = self._known.drop(name) or bool(taken) or found
        return found

    async def aclose(self) -> None:
        """Close the link; using the store again opens it again."""
        await self.link.aclose()

    # --- trips -----------------------------------------------------------------------------------------------------

    async def _write(self, name: bytes, entry: Entry, taking: int) -> int:
        now = f"{self._clock.time():.6f}"
        args: list[bytes | str | int] = [
            now,
            name,
            f"{entry.before:.3f}",
            f"{entry.until:.3f}",
            self.max_entries,
            os.urandom(9).hex(),
            taking,
        ]
        reply = await self.link.run(_WRITE, self._keys, args)
        if type(reply) is not int or reply not in (-1, 0, 1):
            raise self.link.unreadable()
        return reply

    async def _read(self) -> None:
        """Read all changes, or everything."""
        epoch, revision = self._epoch, self._revision
        fresh: Revoked | None = None
        lost = False
        pages = starts = 0
        most = (1 + _STARTS) * (2 + _MORE * max(self.max_entries, MAX_ENTRIES) // self._page)
        while True:
            args: list[bytes | int] = [epoch, revision, self._page, int(pages > 0)]
            page = _page(await self.link.run(_READ, self._keys, args), self._page)
            pages += 1
            # Nobody has revoked so many: they are made up.
            if page is None or pages > most:
                raise self.link.unreadable()
            epoch, how, revision, complete, rows = page
            if how:
                starts += 1
                if starts > _STARTS:
                    raise StoreUnavailableError("revocations changed while they were read")
                fresh = Revoked(self._name)
                lost = lost or how == 2
            now = self._clock.time()
            _fill(self._known if fresh is None else fresh, rows, now)
            if complete:
                break
        if fresh is not None:
            if lost:
                self._keep(fresh, now)
            self._known = fresh
        self._known.sweep(now, _SWEPT)
        self._epoch, self._revision = epoch, revision

    def _keep(self, fresh: Revoked, now: float) -> None:
        """Keep what the server has lost, as far as there is room."""
        for name, entry in self._known.items():
            if entry.until > now and (fresh.knows(name) or len(fresh) < self.max_entries):
                fresh.put(name, entry, now)


_Row = tuple[bytes, float, float]


def _page(reply: Any, size: int) -> tuple[bytes, int, bytes, bool, list[_Row]] | None:
    """What the script for reading returned, if that is what it is; it says how to read `reply`."""
    if reply.__class__ is not list or not 4 <= len(reply) <= 4 + 2 * size or len(reply) % 2:
        return None
    epoch, how, revision, complete = reply[:4]
    if (type(epoch), type(how), type(revision), type(complete)) != (bytes, int, bytes, int):
        return None
    if len(epoch) > _EPOCH or how not in (0, 1, 2) or not revision.isdigit() or len(revision) > _REVISION:
        return None
    rows: list[_Row] = []
    for name, value in zip(reply[4::2], reply[5::2], strict=True):
        if type(name) is not bytes or len(name) != _NAME or type(value) is not bytes:
            return None
        try:
            before, until = map(float, value.split())
        except ValueError:
            return None
        # (Whatever is compared with a number that is none is false.)
        if not (0 <= before < inf and 0 <= until < inf):
            return None
        rows.append((name, before, until))
    # A page that is not full is the last.
    if complete not in (0, 1) or (not complete and len(rows) != size):
        return None
    return epoch, how, revision, bool(complete), rows


def _fill(known: Revoked, rows: list[_Row], now: float) -> None:
    for name, before, until in rows:
        if before == 0 or until <= now:
            known.drop(name)
        else:
            # The server has merged it with what it knew.
            known.put(name, Entry(before, until), now, instead=True)

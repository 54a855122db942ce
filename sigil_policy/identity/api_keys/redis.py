"""API keys in a Redis or Valkey server, for servers on many machines.

    store = RedisApiKeyStore("rediss://:password@keys.internal:6379/0")
    ApiKeyAuth(store=store, pepper=pepper)           # or store="rediss://..."

Guarantees: what `RemoteApiKeyStore` says of memory, made-up ids and uses; a look-up is one trip, and so is a change, in
one step on the server; a server that is away answers at once, not after a time limit each (see `RedisLink`).

The keys are in three hashes of one hash tag, `{prefix}:1:k:{...}:records`, `:ends` and `:uses`, without a time to live.
**They are the only copy**: give them a server that writes to disk, and that evicts nothing (`maxmemory-policy
noeviction`, or `volatile-...`). Needs the extra `redis`, and asyncio.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, ClassVar

from sigil_policy.identity.api_keys.records import ApiKeyRecord
from sigil_policy.identity.api_keys.stores import (
    ApiKeyExistsError,
    ApiKeyUnknownError,
    Found,
    RemoteApiKeyStore,
)
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.link import RedisLink, Script


def _script(name: str) -> Script:
    return Script(f"keys_{name}", files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8"))


_FIND, _SAVE, _END, _USE, _LIST = map(_script, ("find", "save", "end", "use", "list"))


class RedisApiKeyStore(RemoteApiKeyStore):
    """Records in Redis or Valkey; the module says what it guarantees.

        RedisApiKeyStore("valkey://keys.internal:6379/0")

    Options:
        url: the server's URL, or a `RedisLink` that is there already, which other stores may share.
        prefix: what all keys begin with (default "sigil"): up to 64 letters, digits and `_ . : -`. Stores of different
            prefixes do not know each other.
        others: those of `RemoteApiKeyStore`.

    Raises `ValueError` for an option that cannot be, `ImportError` without the extra `redis`. Every method raises
    `StoreUnavailableError` when the server does not answer in time.
    """

    # The server does nothing else while it writes them.
    _batch: ClassVar[int] = 200

    def __init__(self, url: str | RedisLink, *, prefix: str = "sigil", **options: Any) -> None:
        super().__init__(**options)
        head = KeySpace(prefix).together("k") + b":"
        self.prefix = prefix
        self.link = (
            RedisLink(url, deadline=self.deadline, connect_timeout=max(1.0, self.deadline))
            if isinstance(url, str)
            else url
        )
        self._records, self._ends, self._uses = head + b"records", head + b"ends", head + b"uses"

    def __repr__(self) -> str:
        return f"RedisApiKeyStore({self.link!r}, prefix={self.prefix!r})"

    async def get(self, key_id: str) -> Found:
        return self._found(key_id, await self.link.run(_FIND, [self._records, self._ends], [key_id]))

    async def records(self) -> tuple[ApiKeyRecord, ...]:
        found: dict[str, ApiKeyRecord] = {}
        cursor = b"0"
        while True:
            reply = await self.link.run(_LIST, [self._records, self._ends, self._uses], [cursor])
            if not _is_page(reply):
                raise self.link.unreadable()
            cursor, *page = reply
            for key_id, record, ends, used in zip(page[::4], page[1::4], page[2::4], page[3::4], strict=True):
                name = key_id.decode("ascii", "replace")
                read = self._record(name, record, ends, used)
                if read is not None:
                    found[name] = read
            if cursor == b"0":
                return tuple(sorted(found.values(), key=lambda record: (record.created or 0.0, record.id)))

    async def _save(self, record: ApiKeyRecord, ends: tuple[str, float] | None) -> None:
        fields = record.as_dict()
        expires = fields.pop("expires", None)
        args = [record.id, json.dumps(fields), "" if expires is None else _moment(expires)]
        args += ("", "") if ends is None else (ends[0], _moment(ends[1]))
        stored = await self.link.run(_SAVE, [self._records, self._ends], args)
        if type(stored) is not int or stored not in (-1, 0, 1):
            raise self.link.unreadable()
        if stored == 0:
            raise ApiKeyExistsError(f"there is a key {record.id} already")
        if stored < 0:
            raise ApiKeyUnknownError(f"there is no key {args[3]}")

    async def _end(self, key_id: str, at: float) -> Found:
        return self._found(key_id, await self.link.run(_END, [self._records, self._ends], [key_id, _moment(at)]))

    def _write_uses(self, used: Mapping[str, float]) -> None:
        self.link.send(_USE, [self._records, self._uses], _arguments(used))

    async def aclose(self) -> None:
        """Write the uses that have gathered, and close the link. Using the store opens it again."""
        try:
            while used := self._taken(self._batch):
                await self.link.run(_USE, [self._records, self._uses], _arguments(used))
        except StoreUnavailableError:
            pass  # the link has told of it; nobody is let in or out by a use that is lost
        finally:
            await self.link.aclose()

    def _found(self, key_id: str, reply: Any) -> Found:
        """The key in what `find` and `end` answer: its record and its end, each None where there is none."""
        if type(reply) is not list or len(reply) != 2 or not all(map(_is_text, reply)):
            raise self.link.unreadable()
        return self._record(key_id, reply[0], reply[1], None)

    def _record(self, key_id: str, record: bytes | None, ends: bytes | None, used: bytes | None) -> Found:
        if record is None:
            return None
        try:
            fields = json.loads(record)
        except ValueError:
            fields = {}
        if not isinstance(fields, dict):
            fields = {}
        for name, moment in (("expires", ends), ("last_used", used)):
            if moment is not None:
                fields[name] = moment.decode("ascii", "replace")
        return self._read(key_id, {**fields, "id": key_id})


def _is_text(value: Any) -> bool:
    return value is None or type(value) is bytes


def _is_page(reply: Any) -> bool:
    """Whether this is a cursor, and for each key its id, its record, its end and its last use."""
    return (
        type(reply) is list
        and len(reply) % 4 == 1
        and all(map(_is_text, reply))
        and None not in (reply[0], *reply[1::4], *reply[2::4])
    )


def _moment(at: float) -> str:
    # As Python reads it back; the server compares it as a number.
    return repr(float(at))


def _arguments(used: Mapping[str, float]) -> list[str]:
    return [text for key_id, at in used.items() for text in (key_id, _moment(at))]

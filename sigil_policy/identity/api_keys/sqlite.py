"""API keys in a SQLite file, for servers on one machine; the standard library is all it takes.

    store = SqliteApiKeyStore("keys.db")
    ApiKeyAuth(store=store, pepper=pepper)           # or store="sqlite:///keys.db"

Guarantees: what `RemoteApiKeyStore` says of memory, made-up ids and uses; no statement runs in the event loop, each in
a worker thread with a connection of its own, so that processes may fork and loops may end as they like; every change is
one transaction, also between processes. The file is made by the first key, readable by its owner only; until then there
are no keys. A server needs to write to it only to note uses.

A file that is locked for longer than `deadline`, damaged, or no database of keys, raises `StoreUnavailableError`.
Don't put it on a network file system (https://sqlite.org/faq.html#q5).
"""

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any, Final, TypeVar
from urllib.parse import quote

import structlog
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from sigil_policy.identity.api_keys.records import ApiKeyRecord
from sigil_policy.identity.api_keys.stores import (
    ApiKeyExistsError,
    ApiKeyUnknownError,
    Found,
    RemoteApiKeyStore,
)
from sigil_policy.stores.limits import StoreUnavailableError

logger = structlog.get_logger("sigil_policy")

T = TypeVar("T")

# Threads that look keys up, in one event loop: a file that is locked must not take those that the application needs.
_THREADS: Final = 8
_LIMITERS: RunVar[CapacityLimiter] = RunVar("sigil_policy api key threads")

_FORMAT: Final = 1
_COLUMNS: Final = "id, digest, subject, scopes, tier, expires, prefix, created, last_used"
_TABLE: Final = """
CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    subject TEXT NOT NULL,
    scopes TEXT NOT NULL,
    tier TEXT,
    expires REAL,
    prefix TEXT NOT NULL,
    created REAL,
    last_used REAL
)
"""


class SqliteApiKeyStore(RemoteApiKeyStore):
    """Records in the table `api_keys` of a SQLite file.

        SqliteApiKeyStore("keys.db")

    Options:
        path: the file.
        others: those of `RemoteApiKeyStore`; a statement waits for `deadline` seconds for a file that is locked.

    Every method raises `StoreUnavailableError` when the file cannot be read or written in time.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(**options)
        self.path = Path(path)
        self._writer: Thread | None = None

    def __repr__(self) -> str:
        return f"SqliteApiKeyStore({self.path.name!r})"

    async def get(self, key_id: str) -> Found:
        return await self._reading(lambda connection: self._one(connection, key_id), None)

    async def records(self) -> tuple[ApiKeyRecord, ...]:
        def everything(connection: sqlite3.Connection) -> tuple[ApiKeyRecord, ...]:
            if not _format(connection):
                return ()
            rows = connection.execute(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created, id")  # noqa: S608  a constant
            found = (self._record(row) for row in rows)
            return tuple(record for record in found if record is not None)

        return await self._reading(everything, ())

    async def _save(self, record: ApiKeyRecord, ends: tuple[str, float] | None) -> None:
        def change(connection: sqlite3.Connection) -> None:
            row = (
                record.id,
                record.digest,
                record.subject,
                " ".join(sorted(record.scopes)),
                record.tier,
                record.expires,
                record.prefix,
                record.created,
            )
            try:
                connection.execute(f"INSERT INTO api_keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)  # noqa: S608
            except sqlite3.IntegrityError:
                raise ApiKeyExistsError(f"there is a key {record.id} already") from None
            if ends is not None and not _end(connection, *ends):
                raise ApiKeyUnknownError(f"there is no key {ends[0]}")

        await to_thread.run_sync(self._change, change, True)

    async def _end(self, key_id: str, at: float) -> Found:
        def change(connection: sqlite3.Connection) -> Found:
            return self._one(connection, key_id) if _end(connection, key_id, at) else None

        if not await to_thread.run_sync(self.path.exists):
            return None
        return await to_thread.run_sync(self._change, change, False)

    def _write_uses(self, used: Mapping[str, float]) -> None:
        if self._writer is not None and self._writer.is_alive():
            self._put_back(used)  # the one before is not done: the file is locked, or the disk is slow
            return
        # One thread for each batch, which comes every minute; it ends by itself.
        self._writer = Thread(target=self._write_batch, args=(used,), name="api key uses", daemon=True)
        self._writer.start()

    def _write_batch(self, used: Mapping[str, float]) -> None:
        def change(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "UPDATE api_keys SET last_used = ? WHERE id = ? AND (last_used IS NULL OR last_used < ?)",
                [(at, key_id, at) for key_id, at in used.items()],
            )

        try:
            if used and self.path.exists():
                self._change(change, False)
        except StoreUnavailableError as error:
            self._put_back(used)
            logger.warning("api_key_uses_not_written", store="SqliteApiKeyStore", reason=str(error))

    async def aclose(self) -> None:
        """Write the uses that have gathered. The store may be used on."""
        writer = self._writer
        if writer is not None:
            await to_thread.run_sync(writer.join)
        await to_thread.run_sync(self._write_batch, self._taken(self._batch))

    async def _reading(self, read: Callable[[sqlite3.Connection], T], missing: T) -> T:
        def work() -> T:
            if not self.path.exists():
                return missing
            try:
                with closing(self._connect("ro")) as connection:
                    return read(connection)
            except sqlite3.Error as error:
                raise _unavailable(error) from None

        # Whoever asked may leave at the deadline: the thread ends by itself soon after, and changes nothing.
        return await to_thread.run_sync(work, abandon_on_cancel=True, limiter=_limiter())

    def _change(self, change: Callable[[sqlite3.Connection], T], make: bool) -> T:
        try:
            if make:
                # Made here, for its owner only; SQLite would ask the umask.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(self._connect("rw")) as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if not _format(connection):
                        connection.execute(_TABLE)
                        connection.execute(f"PRAGMA user_version = {_FORMAT}")
                    done = change(connection)
                except BaseException:
                    connection.rollback()
                    raise
                connection.commit()
                return done
        except (sqlite3.Error, OSError) as error:
            raise _unavailable(error) from None

    def _connect(self, mode: str) -> sqlite3.Connection:
        name = f"file:{quote(str(self.path.absolute()))}?mode={mode}"
        return sqlite3.connect(name, uri=True, timeout=self.deadline, isolation_level=None, check_same_thread=False)

    def _one(self, connection: sqlite3.Connection, key_id: str) -> Found:
        if not _format(connection):
            return None
        row = connection.execute(f"SELECT {_COLUMNS} FROM api_keys WHERE id = ?", (key_id,)).fetchone()  # noqa: S608
        return None if row is None else self._record(row)

    def _record(self, row: tuple[Any, ...]) -> Found:
        fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
        fields["scopes"] = str(fields["scopes"]).split()
        return self._read(str(row[0]), fields)


def _limiter() -> CapacityLimiter:
    try:
        return _LIMITERS.get()
    except LookupError:
        limiter = CapacityLimiter(_THREADS)
        _LIMITERS.set(limiter)
        return limiter


def _format(connection: sqlite3.Connection) -> int:
    """The format of the file: 0 for one that has no table yet."""
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if found not in (0, _FORMAT):
        raise StoreUnavailableError(f"the key database has format {found}; this release reads {_FORMAT}")
    return found


def _end(connection: sqlite3.Connection, key_id: str, at: float) -> bool:
    ended = "UPDATE api_keys SET expires = min(coalesce(expires, ?), ?) WHERE id = ?"
    return connection.execute(ended, (at, at, key_id)).rowcount > 0


def _unavailable(error: Exception) -> StoreUnavailableError:
    if isinstance(error, StoreUnavailableError):
        return error
    # What SQLite says of itself ("database is locked") shows nothing that was stored; of an OSError only its kind.
    said = str(error) if isinstance(error, sqlite3.Error) else type(error).__name__
    return StoreUnavailableError(f"the key database cannot be used: {said}")

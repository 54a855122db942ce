"""API keys in a file: lines of JSON that commands append to, or a table in TOML that people write.

    store = FileApiKeyStore("keys.jsonl")
    store = TomlApiKeyStore("keys.toml")

A running server notices a change within a second. Meant for some thousand keys: the whole file is read again, in a
thread, when its size or time changes. Neither keeps when a key was last used.

Guarantees: **what is wrong with one record does not lock out the others.** It is reported once in the log
(`api_key_record_unreadable`, with the line or the id, and nothing of its content), and every key whose id can be read
in it is refused, because it may be what ends that key. A file that cannot be opened lets nobody in.
"""

import contextlib
import json
import os
import re
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog
from anyio import to_thread

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.identity.api_keys.format import ID
from sigil_policy.identity.api_keys.records import RECORD, ApiKeyRecord
from sigil_policy.identity.api_keys.stores import (
    ApiKeyExistsError,
    ApiKeyUnknownError,
    Found,
    ReadOnlyStoreError,
)

try:
    import fcntl
except ImportError:  # Windows: there two commands at once may overwrite what the other one wrote of the same key
    fcntl = None  # type: ignore[assignment]

logger = structlog.get_logger("sigil_policy")

Records = dict[str, ApiKeyRecord]

_UNKNOWN = (-1,)  # no file's version
_REPORTS = 64
_ID = re.compile(ID.encode())
_NAMED = re.compile(rf'"id"\s*:\s*"({ID})"'.encode())

GRACE = 60.0
"""Seconds for which the keys of a TOML file hold that was made unreadable as a whole."""


class _WatchedFile(ABC):
    """A file that is read again when it has changed."""

    def __init__(self, path: str | os.PathLike[str], *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.path = Path(path)
        self._clock = clock
        self._reported: set[object] = set()
        self._checked = clock.monotonic()
        self._version = self._stat()
        self._records = self._parse(self._content())
        self._fault: Exception | None = None
        self._closed_from = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._records)} records)"

    @abstractmethod
    def _parse(self, content: bytes) -> Records:
        """The records in the file. Raises `ValueError` if it cannot be understood at all."""

    def find(self, key_id: str) -> ApiKeyRecord | Awaitable[ApiKeyRecord | None] | None:
        now = self._clock.monotonic()
        if now - self._checked >= 1.0:
            self._checked = now
            version = self._stat()
            if version != self._version:
                return self._reload(version, key_id)
        return self._found(key_id)

    def _found(self, key_id: str) -> Found:
        if self._fault is not None and self._clock.monotonic() >= self._closed_from:
            # Fail closed: what the file says now cannot be known, what it said before may have been taken back.
            raise ValueError("the API key file could not be read when it last changed") from self._fault
        return self._records.get(key_id)

    async def get(self, key_id: str) -> Found:
        return (await to_thread.run_sync(self._read)).get(key_id)

    async def records(self) -> tuple[ApiKeyRecord, ...]:
        return tuple((await to_thread.run_sync(self._read)).values())

    def _read(self) -> Records:
        return self._parse(self._content())

    async def _reload(self, version: tuple[int, ...] | None, key_id: str) -> Found:
        self._version = version
        try:
            # Whoever asked may leave at its deadline, also while the disk hangs.
            records = await to_thread.run_sync(self._read, abandon_on_cancel=True)
        except ValueError as error:
            if self._fault is None:
                self._closed_from = self._clock.monotonic() + GRACE
            self._fault = error
            self._report("the file", None)
            return self._found(key_id)
        except BaseException as error:
            # Nobody knows yet what the file says: a caller that left while it was read, or a machine out of file
            # handles, must not make that last until the next change.
            self._version = _UNKNOWN
            if isinstance(error, OSError):
                self._fault, self._closed_from = error, 0.0
            raise
        # A read that took so long that a later one was begun, and maybe ended, has nothing to say any more.
        if self._version is version:
            self._records, self._fault = records, None
        return self._records.get(key_id)

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def _report(self, where: str, content: object) -> None:
        if content not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(content)
            logger.error(
                "api_key_record_unreadable",
                store=type(self).__name__,
                file=self.path.name,
                where=where,
                help="correct it, or take it out; the keys that it names are refused",
            )


class FileApiKeyStore(_WatchedFile):
    """Records in a file, one JSON object a line; a running server notices a change within a second.

        store = FileApiKeyStore("keys.jsonl")
        store.append(record)

    The last line of an id holds: append the same record with `expires` to end a key. The file may be missing (no keys).
    A line that is no record is passed over, and refuses the keys whose ids it names; a last line that is not whole is
    still being written, and waits.

    Options:
        path: the file.
        clock: asked, by its monotonic hand, whether a second has passed (default: the machine's).
    """

    def append(self, record: ApiKeyRecord) -> None:
        """Add `record` to the file, which is made if need be, readable by its owner only."""
        with self._locked() as handle:
            self._write(handle, record)

    async def save(self, record: ApiKeyRecord, *, ends: tuple[str, float] | None = None) -> None:
        await to_thread.run_sync(self._save, record, ends)

    async def end(self, key_id: str, at: float) -> Found:
        return await to_thread.run_sync(self._end, key_id, at)

    def _save(self, record: ApiKeyRecord, ends: tuple[str, float] | None) -> None:
        with self._locked() as handle:
            known = self._read()
            if record.id in known:
                raise ApiKeyExistsError(f"there is a key {record.id} already")
            if ends is None:
                self._write(handle, record)
            elif (old := known.get(ends[0])) is None:
                raise ApiKeyUnknownError(f"there is no key {ends[0]}")
            else:
                self._write(handle, record, old.ending(ends[1]))

    def _end(self, key_id: str, at: float) -> Found:
        if not self.path.exists():
            return None
        with self._locked() as handle:
            record = self._read().get(key_id)
            if record is not None:
                record = record.ending(at)
                self._write(handle, record)
            return record

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, open for reading and appending, and by nobody else who asks like this."""
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)  # and with it goes the lock

    def _write(self, handle: int, *records: ApiKeyRecord) -> None:
        size = os.fstat(handle).st_size
        os.lseek(handle, max(0, size - 1), os.SEEK_SET)
        open_line = size and os.read(handle, 1) != b"\n"
        # One write at the end of the file: whoever reads meanwhile sees all of it or waits for the rest of a line.
        lines = "".join(f"{record.as_json()}\n" for record in records)
        os.write(handle, (b"\n" if open_line else b"") + lines.encode())

    def _parse(self, content: bytes) -> Records:
        lines = content.split(b"\n")
        records: Records = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = RECORD.validate_json(line)
            except ValueError:
                if number < len(lines):
                    self._report(f"line {number}", sha256(line).digest())
                    for named in _NAMED.findall(line):
                        records.pop(named.decode(), None)
            else:
                # As the last one of this id: what is listed follows the time at which it was written.
                records.pop(record.id, None)
                records[record.id] = record
        return records


class TomlApiKeyStore(_WatchedFile):
    """Records that people write, and the library only reads. A running server notices a change within a second.

        store = TomlApiKeyStore("keys.toml")

    The file has one table for each key, under its id; `sigil-policy key new --store file:keys.toml` prints one:

        [keys.4fGhT2aB9xQz]
        digest = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
        subject = "nightly-job"
        scopes = ["agents:read"]
        tier = "pro"
        expires = 2027-01-31T00:00:00Z

    Moments are dates with time and offset, or seconds since the epoch. To end a key, write `expires`, or take the table
    out. A table that is no record is passed over; a file that is no TOML at all fails at construction, and later lets
    the keys that held before hold for a minute more, then nobody.

    Options:
        path: the file, which may be missing (no keys).
        clock: asked, by its monotonic hand, whether a second has passed (default: the machine's).

    Raises `ValueError` for a file that is no TOML, and `ReadOnlyStoreError` for `save` and `end`.
    """

    async def save(self, record: ApiKeyRecord, *, ends: tuple[str, float] | None = None) -> None:
        raise ReadOnlyStoreError(f"{self.path.name} is changed by hand: add the table [keys.{record.id}]")

    async def end(self, key_id: str, at: float) -> Found:
        raise ReadOnlyStoreError(f"{self.path.name} is changed by hand: write expires in [keys.{key_id}], or remove it")

    def _parse(self, content: bytes) -> Records:
        try:
            found = tomllib.loads(content.decode()).get("keys", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            # Not its own words: they may show a piece of the file.
            raise ValueError(f"{self.path.name} is no TOML: correct it, then check it with 'key list'") from (
                error if isinstance(error, tomllib.TOMLDecodeError) else None
            )
        if not isinstance(found, dict):
            raise ValueError(f"{self.path.name} has something for 'keys' that is no table: write [keys.<id>]")
        records: Records = {}
        for key_id, fields in found.items():
            try:
                if not isinstance(fields, dict):
                    raise ValueError("no table")  # noqa: TRY301
                given = {name: _moment(value) for name, value in fields.items()}
                records[key_id] = RECORD.validate_python({**given, "id": key_id})
            except ValueError:
                named = key_id if _ID.fullmatch(key_id.encode()) else "an id of another form"
                self._report(f"[keys.{named}]", (key_id, repr(fields)))
        return records


def as_toml(record: ApiKeyRecord) -> str:
    """The table that `TomlApiKeyStore` reads."""
    fields = record.as_dict()
    key_id = fields.pop("id")
    # A string, a list of strings and a number are the same in JSON and in TOML, but for what JSON escapes in pairs.
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join([f"[keys.{key_id}]", *lines])


def _moment(value: Any) -> Any:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a moment needs its offset, for example 2027-01-31T00:00:00Z")
        return value.timestamp()
    return value

"""API keys: made once, shown once, stored only as keyed digests.

    plain, record = new_key(pepper=pepper, subject="nightly-job", scopes=["agents:read"], tier="pro")
    store = MemoryApiKeyStore([record])
    # plain: sk_live_<id>_<secret>_<checksum>

The id is public and finds the record; the secret has 190 random bits; the checksum lets a typing error, and a scanner
for leaked keys, be answered without a look-up. A digest is HMAC-SHA256 over the whole key under the pepper, which is
not in the store: whoever copies the store can neither use nor guess a key.

A rotation is a second record for the same subject, and an `expires` for the first: both hold until then.
"""

import hmac
import json
import os
import re
import secrets
import zlib
from collections.abc import Awaitable, Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

from anyio import to_thread
from pydantic import Field, SecretStr, TypeAdapter
from pydantic.dataclasses import dataclass

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.facts import Principal
from sigil_policy.identity.fields import CONFIG, Scope, Subject

MAX_KEY = 256
"""Bytes of a presented key; anything longer is refused before it is looked at."""

MIN_PEPPER = 32

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH, _SECRET_LENGTH, _CHECKSUM_LENGTH = 12, 32, 6
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,15}(?:_[a-z0-9]{1,16}){0,3}")
_KEY = re.compile(
    rb"[a-z][a-z0-9]{0,15}(?:_[a-z0-9]{1,16}){0,3}_([0-9A-Za-z]{%d})_[0-9A-Za-z]{%d}_[0-9A-Za-z]{%d}"
    % (_ID_LENGTH, _SECRET_LENGTH, _CHECKSUM_LENGTH)
)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ApiKeyRecord:
    """What a store knows of one key.

    Options:
        id: the public part of the key that finds this record.
        digest: HMAC-SHA256 of the whole key under the pepper, in hexadecimal.
        subject: who calls with it. Several keys may have one subject.
        scopes: what the caller may do (default: nothing that takes a scope).
        tier: the name of its limits (default None: the key names none).
        expires: seconds since the epoch from which on it is refused (default None: never).
    """

    id: Annotated[str, Field(pattern=rf"^[0-9A-Za-z]{{{_ID_LENGTH}}}$")]
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    subject: Subject
    scopes: frozenset[Scope] = frozenset()
    tier: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    expires: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @cached_property
    def digest_bytes(self) -> bytes:
        return bytes.fromhex(self.digest)

    def principal(self, realm: str) -> Principal:
        """The caller that this key stands for."""
        known = self._principals.get(realm)
        if known is None:
            known = Principal(subject=self.subject, scopes=self.scopes, tier=self.tier, kind="api_key", realm=realm)
            self._principals[realm] = known
        return known

    @cached_property
    def _principals(self) -> dict[str, Principal]:
        # By realm, which the configuration names: as bounded as the configuration is.
        return {}

    def is_expired(self, now: float) -> bool:
        return self.expires is not None and now >= self.expires


class NewKey(NamedTuple):
    """A key in the only moment in which it is known, and the record to store."""

    plain: SecretStr
    record: ApiKeyRecord


def new_key(
    *,
    pepper: SecretStr,
    subject: str,
    scopes: Iterable[str] = (),
    tier: str | None = None,
    expires: float | None = None,
    prefix: str = "sk_live",
    choice: Callable[[str], str] = secrets.choice,
) -> NewKey:
    """Make a key. `plain.get_secret_value()` is for its owner, once; the record is for the store.

        plain, record = new_key(pepper=pepper, subject="nightly-job", scopes=["agents:read"], tier="pro")

    `prefix` begins the key (lower-case words joined by `_`); `choice` picks a character, for tests. Raises
    `ValueError` for a scope, subject, pepper or prefix that cannot be used.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix {prefix!r} must be lower-case words joined by '_', for example 'sk_live'")
    if isinstance(scopes, str):
        raise ValueError("scopes is a list, for example ['agents:read']")
    key_id = "".join(choice(_ALPHABET) for _ in range(_ID_LENGTH))
    secret = "".join(choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    body = f"{prefix}_{key_id}_{secret}"
    plain = f"{body}_{_checksum(body.encode())}"
    record = ApiKeyRecord(
        id=key_id,
        digest=key_digest(pepper_bytes(pepper), plain.encode()).hex(),
        subject=subject,
        scopes=frozenset(scopes),
        tier=tier,
        expires=expires,
    )
    return NewKey(SecretStr(plain), record)


def pepper_bytes(pepper: SecretStr) -> bytes:
    """The pepper's bytes; `ValueError` when there are too few to keep digests from being guessed."""
    data = pepper.get_secret_value().encode()
    if len(data) < MIN_PEPPER:
        raise ValueError(
            f"the pepper has {len(data)} bytes and takes at least {MIN_PEPPER}: make one with "
            f"python -c 'import secrets; print(secrets.token_urlsafe({MIN_PEPPER}))'"
        )
    return data


def key_digest(pepper: bytes, presented: bytes) -> bytes:
    """What is stored of a key."""
    return hmac.digest(pepper, presented, "sha256")


def key_id(presented: bytes) -> str | None:
    """The public id in a key; None for what no key looks like, mistyped ones included."""
    if len(presented) > MAX_KEY:
        return None
    found = _KEY.fullmatch(presented)
    if found is None:
        return None
    body, _, checksum = presented.rpartition(b"_")
    return found[1].decode("ascii") if _checksum(body).encode("ascii") == checksum else None


def _checksum(body: bytes) -> str:
    """CRC-32 in base 62: finds typing errors, keeps no secret."""
    number, text = zlib.crc32(body), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        text = _ALPHABET[digit] + text
    return text


@runtime_checkable
class ApiKeyStore(Protocol):
    """Where records are. Finding one may take IO: then `find` returns an awaitable."""

    def find(self, key_id: str) -> "ApiKeyRecord | Awaitable[ApiKeyRecord | None] | None":
        """The record with this id, also an expired one; None without it."""
        ...


class MemoryApiKeyStore:
    """Records in this process.

    store = MemoryApiKeyStore([record])
    store.add(another)
    """

    def __init__(self, records: Iterable[ApiKeyRecord] = ()) -> None:
        self._records = {record.id: record for record in records}

    def __repr__(self) -> str:
        return f"MemoryApiKeyStore({len(self._records)} records)"

    def add(self, record: ApiKeyRecord) -> None:
        """Store `record`, in place of one with the same id."""
        self._records[record.id] = record

    def remove(self, key_id: str) -> None:
        """Forget a key: it is refused from now on."""
        self._records.pop(key_id, None)

    def find(self, key_id: str) -> ApiKeyRecord | None:
        return self._records.get(key_id)


class FileApiKeyStore:
    """Records in a file, one JSON object a line; a running server notices a change within a second.

        store = FileApiKeyStore("keys.jsonl")
        store.append(record)

    The last line of an id holds: append the same record with `expires` to end a key. The file may be missing (no keys);
    one with a line that is no record is an error at construction, and later for every caller with a key, because the
    line may be the one that ends a key. A last line that is not whole is still being written, and waits. Meant for some
    thousand keys: the whole file is read again, in a thread, when its size or time changes.

    Options:
        path: the file.
        clock: asked, by its monotonic hand, whether a second has passed (default: the machine's).
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.path = Path(path)
        self._clock = clock
        self._checked = clock.monotonic()
        self._version = self._stat()
        self._records = self._read()
        self._fault: Exception | None = None

    def __repr__(self) -> str:
        return f"FileApiKeyStore({len(self._records)} records)"

    def find(self, key_id: str) -> ApiKeyRecord | Awaitable[ApiKeyRecord | None] | None:
        now = self._clock.monotonic()
        if now - self._checked >= 1.0:
            self._checked = now
            version = self._stat()
            if version != self._version:
                return self._reload(version, key_id)
        if self._fault is not None:
            # Fail closed: what the file says now cannot be known, what it said before may have been taken back.
            raise ValueError("the API key file could not be read when it last changed") from self._fault
        return self._records.get(key_id)

    def append(self, record: ApiKeyRecord) -> None:
        """Add `record` to the file, which is made if need be, readable by its owner only."""
        line = json.dumps(
            {
                "id": record.id,
                "digest": record.digest,
                "subject": record.subject,
                "scopes": sorted(record.scopes),
                "tier": record.tier,
                "expires": record.expires,
            }
        )
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(handle).st_size
            open_line = size and os.pread(handle, 1, size - 1) != b"\n"
            # One write at the end of the file: two commands at once do not tear each other's line.
            os.write(handle, (b"\n" if open_line else b"") + line.encode() + b"\n")
        finally:
            os.close(handle)

    async def _reload(self, version: tuple[int, ...] | None, key_id: str) -> ApiKeyRecord | None:
        self._version = version
        try:
            records = await to_thread.run_sync(self._read)
        except ValueError as error:
            self._fault = error
            raise
        except BaseException as error:
            # Nobody knows yet what the file says: a caller that left while it was read, or a machine out of file
            # handles, must not make that last until the next change.
            self._version = _UNKNOWN
            if isinstance(error, OSError):
                self._fault = error
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

    def _read(self) -> dict[str, ApiKeyRecord]:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        records: dict[str, ApiKeyRecord] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = _RECORD.validate_json(line)
            except ValueError:
                record = None
            if record is not None:
                records[record.id] = record
            elif number < len(lines):
                raise ValueError(f"line {number} of the API key file is no record; correct it, or take it out")
        return records


_RECORD = TypeAdapter(ApiKeyRecord)
_UNKNOWN = (-1,)  # no file's version

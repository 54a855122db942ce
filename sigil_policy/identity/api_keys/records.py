"""What is kept of an API key, and how one is made.

    plain, record = new_key(pepper=pepper, subject="nightly-job", scopes=["agents:read"], tier="pro")

A record holds a digest of the key, HMAC-SHA256 under the pepper, which is not in the store: whoever copies the store
can neither use nor guess a key. `pepper` takes 32 random bytes or more.
"""

import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import Field, SecretStr, TypeAdapter
from pydantic.dataclasses import dataclass

from sigil_policy.core.facts import Principal
from sigil_policy.identity.api_keys.format import ID, PREFIX, key_digest, key_text
from sigil_policy.identity.fields import CONFIG, Scope, Subject

MIN_PEPPER = 32

Moment = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ApiKeyRecord:
    """What a store knows of one key.

    Options:
        id: the public part of the key that finds this record.
        digest: HMAC-SHA256 of the whole key under the pepper, in hexadecimal.
        subject: who owns it, and calls with it. Several keys may have one subject.
        scopes: what the caller may do (default: nothing that takes a scope).
        tier: the name of its limits (default None: the key names none).
        expires: seconds since the epoch from which on it is refused (default None: never). A key that was revoked has
            expired.
        prefix: how the key begins (default `"sk_live"`).
        created: when it was made, in seconds since the epoch (default None: nobody wrote it down).
        last_used: when it was last seen, to about a minute (default None: never, or the store keeps no count).
    """

    id: Annotated[str, Field(pattern=rf"^{ID}$")]
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    subject: Subject
    scopes: frozenset[Scope] = frozenset()
    tier: Subject | None = None
    expires: Moment | None = None
    prefix: Annotated[str, Field(pattern=rf"^{PREFIX}$")] = "sk_live"
    created: Moment | None = None
    last_used: Moment | None = None

    @cached_property
    def digest_bytes(self) -> bytes:
        return bytes.fromhex(self.digest)

    def principal(self, realm: str) -> Principal:
        """The caller that this key stands for."""
        known = self._principals.get(realm)
        if known is None:
            known = Principal(
                subject=self.subject,
                scopes=self.scopes,
                tier=self.tier,
                kind="api_key",
                realm=realm,
                expires=self.expires,
            )
            self._principals[realm] = known
        return known

    @cached_property
    def _principals(self) -> dict[str, Principal]:
        # By realm, which the configuration names: as bounded as the configuration is.
        return {}

    def is_expired(self, now: float) -> bool:
        return self.expires is not None and now >= self.expires

    def ending(self, at: float) -> "ApiKeyRecord":
        """This record, ending at `at`, unless it ends before that anyway: no end is ever put off."""
        return self if self.expires is not None and self.expires <= at else replace(self, expires=at)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a store writes them; what was never given is left out, and so is `last_used`."""
        fields: dict[str, Any] = {
            "id": self.id,
            "digest": self.digest,
            "subject": self.subject,
            "scopes": sorted(self.scopes),
            "tier": self.tier,
            "expires": self.expires,
            "prefix": self.prefix,
            "created": self.created,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def as_json(self) -> str:
        return json.dumps(self.as_dict())


RECORD = TypeAdapter(ApiKeyRecord)


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
    created: float | None = None,
    prefix: str = "sk_live",
    choice: Callable[[str], str] = secrets.choice,
) -> NewKey:
    """Make a key. `plain.get_secret_value()` is for its owner, once; the record is for the store.

        plain, record = new_key(pepper=pepper, subject="nightly-job", scopes=["agents:read"], tier="pro")

    `prefix` begins the key (lower-case words joined by `_`); `expires` and `created` are seconds since the epoch;
    `choice` picks a character, for tests. Raises `ValueError` for a scope, subject, pepper or prefix that cannot be
    used. `ApiKeys` makes a key and stores it.
    """
    if isinstance(scopes, str):
        raise ValueError("scopes is a list, for example ['agents:read']")
    under = pepper_bytes(pepper)
    made, plain = key_text(under, prefix, choice)
    record = ApiKeyRecord(
        id=made,
        digest=key_digest(under, plain.encode()).hex(),
        subject=subject,
        scopes=frozenset(scopes),
        tier=tier,
        expires=expires,
        prefix=prefix,
        created=created,
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

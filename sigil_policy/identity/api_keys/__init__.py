"""API keys: made once, shown once, stored only as keyed digests.

    keys = ApiKeys(MemoryApiKeyStore(), pepper=pepper)
    plain, record = await keys.new("nightly-job", scopes=["agents:read"], tier="pro")
    # plain: sk_live_<id>_<secret>_<checksum>

| file | what is in it |
|---|---|
| `format` | how a key is written: id, secret, checksum |
| `records` | what is kept of one, and how one is made |
| `lifecycle` | `ApiKeys`: new, list, rotate, revoke |
| `stores` | what a store promises; in this process; what remote ones share |
| `files`, `sqlite`, `redis` | stores |
| `urls` | stores by URL |

`SqliteApiKeyStore` and `RedisApiKeyStore` are imported from their files, for what they need.
"""

from sigil_policy.identity.api_keys.files import FileApiKeyStore, TomlApiKeyStore
from sigil_policy.identity.api_keys.format import MAX_KEY, is_issued_id, key_digest, key_id
from sigil_policy.identity.api_keys.lifecycle import ApiKeyEndedError, ApiKeys
from sigil_policy.identity.api_keys.records import MIN_PEPPER, ApiKeyRecord, NewKey, new_key, pepper_bytes
from sigil_policy.identity.api_keys.stores import (
    ApiKeyExistsError,
    ApiKeyLedger,
    ApiKeyStore,
    ApiKeyUnknownError,
    MemoryApiKeyStore,
    ReadOnlyStoreError,
    RemoteApiKeyStore,
)
from sigil_policy.identity.api_keys.urls import key_store

__all__ = [
    "MAX_KEY",
    "MIN_PEPPER",
    "ApiKeyEndedError",
    "ApiKeyExistsError",
    "ApiKeyLedger",
    "ApiKeyRecord",
    "ApiKeyStore",
    "ApiKeyUnknownError",
    "ApiKeys",
    "FileApiKeyStore",
    "MemoryApiKeyStore",
    "NewKey",
    "ReadOnlyStoreError",
    "RemoteApiKeyStore",
    "TomlApiKeyStore",
    "is_issued_id",
    "key_digest",
    "key_id",
    "key_store",
    "new_key",
    "pepper_bytes",
]

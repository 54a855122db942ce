"""Stores of API keys by URL: policies and commands that name the same one share it.

    ApiKeyAuth(store="sqlite:///keys.db", pepper=pepper)

| URL | store |
|---|---|
| `sqlite:///keys.db`, `sqlite:////var/lib/app/keys.db` | a SQLite file: relative, absolute |
| `redis://`, `rediss://`, `valkey://`, `unix://`, ... | a Redis or Valkey server, see `sigil_policy.stores.urls` |
| `file:keys.jsonl`, `file:/etc/app/keys.jsonl` | lines of JSON |
| `file:keys.toml` | TOML, which is only read |
"""

from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from sigil_policy.identity.api_keys.stores import ApiKeyLedger

_LOCK = Lock()
_STORES: "WeakValueDictionary[str, ApiKeyLedger]" = WeakValueDictionary()
_EXPECTED = "sqlite:///keys.db, redis://host:6379/0, file:keys.jsonl or file:keys.toml"


def key_store(url: str) -> ApiKeyLedger:
    """The store of keys at `url`, the same one for whoever asks.

        keys = ApiKeys(key_store("sqlite:///keys.db"), pepper=pepper)

    Raises `ValueError` if it names none, `ImportError` for a missing extra.
    """
    with _LOCK:
        store = _STORES.get(url)
        if store is None:
            store = _STORES[url] = open_key_store(url)
        return store


def open_key_store(url: str, *, deadline: float | None = None) -> ApiKeyLedger:
    """The same, with a memory of its own; `deadline` is how many seconds a look-up may take."""
    options: dict[str, Any] = {} if deadline is None else {"deadline": deadline}
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        path = rest.removeprefix("///")
        if not rest.startswith("///") or not path or "?" in path:
            raise ValueError("a SQLite file is named like sqlite:///keys.db, or sqlite:////absolute/path/keys.db")
        from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore

        return SqliteApiKeyStore(path, **options)
    if scheme == "file":
        from sigil_policy.identity.api_keys.files import FileApiKeyStore, TomlApiKeyStore

        path = rest.removeprefix("//")
        if not path:
            raise ValueError("a file is named like file:keys.jsonl or file:keys.toml")
        return TomlApiKeyStore(path) if path.endswith(".toml") else FileApiKeyStore(path)
    if scheme.partition("+")[0] in ("redis", "rediss", "valkey", "valkeys", "unix"):
        from sigil_policy.identity.api_keys.redis import RedisApiKeyStore

        return RedisApiKeyStore(url, **options)
    # Nothing of it is repeated: any part may be a piece of a password.
    raise ValueError(f"the URL of the key store has another scheme. Expected: {_EXPECTED}")

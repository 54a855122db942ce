"""Used proofs that several processes share, in Redis or Valkey.

    replays = RedisReplays("redis://auth.internal:6379/0")
    DPoP(origin="https://api.example.com", replays=replays)

What it promises beside what every `ReplayStore` does:

* **One trip claims a name**, decided by the server in one step. The entry ends by the server's clock.
* **A claim whose answer does not come** raises `StoreUnavailableError`. It may have been made: whoever asks again with
  the same name is refused, which is the safe way to be wrong. A client makes a new proof.
* Keys hold digests, never a name: `sigil:1:used:{digest}`. Each has a time to live. In a cluster they are spread over
  all nodes.

A server that forgets (restarted without its data, failed over to a replica that was behind) lets what it forgot pass
once more. One that evicts keys to make room does too: give it `maxmemory-policy noeviction`, and a claim that finds no
room raises `StoreUnavailableError`.

Needs the extra `redis`, and asyncio.
"""

from math import ceil
from typing import ClassVar

from pydantic import SecretStr

from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.link import RedisLink, Script

_CLAIM = Script("replays_claim", "return redis.call('SET', KEYS[1], '', 'NX', 'PX', ARGV[1]) and 1 or 0")


class RedisReplays:
    """Used names in Redis or Valkey; the module says what it guarantees.

        RedisReplays("valkey://auth.internal:6379/0")

    Options:
        url: the server's URL, or a `RedisLink` that is there already, which other stores may share.
        prefix: what all keys begin with (default "sigil"): up to 64 letters, digits and `_ . : -`. Stores of different
            prefixes do not know each other.
        digest_key: with it names become keyed digests (default None: plain ones), 1 to 64 bytes. All processes need the
            same.
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
        deadline: float | None = None,
    ) -> None:
        self._space = KeySpace(prefix, digest_key, use=b"sigil used")
        self._root = self._space.apart("used")
        self.link = RedisLink.at(url, deadline)
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"RedisReplays({self.link!r}, prefix={self.prefix!r})"

    async def claim(self, name: bytes, seconds: float, now: float) -> bool:
        """Claim, as `ReplayStore.claim` says. Raises `StoreUnavailableError`."""
        key = self._root + self._space.digest(name) + b"}"
        reply = await self.link.run(_CLAIM, [key], [max(1, ceil(seconds * 1_000))])
        if reply.__class__ is not int or reply not in (0, 1):
            raise self.link.unreadable()
        return bool(reply == 1)

    async def aclose(self) -> None:
        """Close the link; using the store again opens it again."""
        await self.link.aclose()

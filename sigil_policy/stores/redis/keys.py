"""How the keys of a store are named: one place for prefixes, digests and hash tags.

    space = KeySpace("sigil", digest_key=SecretStr("..."), use=b"sigil slots")
    space.together("c") + space.digest("bearer:0::alice")     # b"sigil:1:c:{sigil}:3x...": all on one node of a cluster
    space.apart("f") + space.digest("bearer:0::alice") + b"}"    # b"sigil:1:f:{3x...}": each where its digest is

Guarantees:

* **Any string is a name**, also one with halves of surrogate pairs, and every digest is 24 bytes. Among a
  thousand million names two have the same one with a probability below 2^-84.
* **Names are not in keys.** A plain digest of a name that can be guessed can be guessed as well; one with a
  `digest_key` cannot, without it. Digests for different uses tell nothing of each other.
* **Keys say their version**: a process with another format does not misread them.
"""

from base64 import urlsafe_b64encode
from hashlib import blake2b
from re import fullmatch

from pydantic import SecretStr

_FORMAT = 1
_DIGEST = 18


class KeySpace:
    """The keys of one store.

        KeySpace("sigil.eu", use=b"sigil limits")

    Options:
        prefix: what all keys begin with: up to 64 letters, digits and `_ . : -`.
        digest_key: with it names become keyed digests (default None: plain ones), 1 to 64 bytes.
        use: what the digests are for (default: nothing is digested), up to 16 bytes.

    Raises `ValueError` for an option that cannot be.
    """

    __slots__ = ("_hash", "prefix")

    def __init__(self, prefix: str, digest_key: SecretStr | None = None, *, use: bytes = b"") -> None:
        if not fullmatch(r"[A-Za-z0-9_.:-]{1,64}", prefix):
            raise ValueError(f"prefix must be 1 to 64 letters, digits and '_', '.', ':' or '-', not {prefix!r}")
        secret = b"" if digest_key is None else digest_key.get_secret_value().encode()
        if digest_key is not None and not 1 <= len(secret) <= blake2b.MAX_KEY_SIZE:
            raise ValueError(f"digest_key must be 1 to {blake2b.MAX_KEY_SIZE} bytes, not {len(secret)}")
        self.prefix = prefix
        self._hash = blake2b(digest_size=_DIGEST, key=secret, person=use)

    def __repr__(self) -> str:
        return f"KeySpace({self.prefix!r})"

    def together(self, kind: str) -> bytes:
        """What keys of a kind begin with that are on one node of a cluster: what is in braces decides."""
        return f"{self.prefix}:{_FORMAT}:{kind}:{{{self.prefix}}}".encode()

    def apart(self, kind: str) -> bytes:
        """What keys of a kind begin with that are spread over a cluster: a digest and `}` follow."""
        return f"{self.prefix}:{_FORMAT}:{kind}:{{".encode()

    def digest(self, name: str | bytes) -> bytes:
        """A name as it stands in keys: 24 letters, digits, `-` and `_`."""
        return urlsafe_b64encode(self.raw_digest(name))

    def raw_digest(self, name: str | bytes) -> bytes:
        """The same as 18 bytes."""
        digest = self._hash.copy()
        digest.update(name.encode("utf-8", "surrogatepass") if isinstance(name, str) else name)
        return digest.digest()

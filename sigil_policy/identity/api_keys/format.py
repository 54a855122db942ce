"""How an API key is written: `sk_live_<id>_<secret>_<checksum>`.

    key_id(b"sk_live_4fGhT2aB9xQz_..._0aB3cD")       # "4fGhT2aB9xQz", or None for what no key looks like

| part | characters | what it is |
|---|---|---|
| prefix | lower-case words joined by `_` | for people and scanners: `sk_live`, `sk_test` |
| id | 12 of base 62 | public, finds the record: 8 are random, 4 are a keyed check of them |
| secret | 32 of base 62 | 190 random bits |
| checksum | 6 of base 62 | CRC-32 of everything before its `_` |

Base 62 is `0-9A-Za-z`, in this order, most significant digit first, filled up with `0`. A scanner looks for
`sk_(live|test)_[0-9A-Za-z]{12}_[0-9A-Za-z]{32}_[0-9A-Za-z]{6}`, then computes the checksum.

Guarantees: **one wrong character, or two neighbours that were swapped, are always found**: a CRC-32 finds every burst
of errors up to 32 bits, and a changed checksum is another one. Other mistakes pass one time in four thousand million.
The checksum is no secret: a scanner computes it to tell a leaked key from random text, and so can anybody who makes
keys up. What these cannot make up is the check in the id (HMAC-SHA256 under the pepper): only one made-up id in
fourteen million has it. It decides nothing about the caller; it keeps made-up ids away from the store.
"""

import hmac
import re
import zlib
from collections.abc import Callable

MAX_KEY = 256
"""Bytes of a presented key; anything longer is refused before it is looked at."""

ID_LENGTH, SECRET_LENGTH, CHECKSUM_LENGTH = 12, 32, 6
PREFIX = r"[a-z][a-z0-9]{0,15}(?:_[a-z0-9]{1,16}){0,3}"
ID = rf"[0-9A-Za-z]{{{ID_LENGTH}}}"

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_CHECK_LENGTH = 4
_CHECKS = 62**_CHECK_LENGTH
_PREFIX = re.compile(PREFIX)
_KEY = re.compile(f"{PREFIX}_({ID})_[0-9A-Za-z]{{{SECRET_LENGTH}}}_[0-9A-Za-z]{{{CHECKSUM_LENGTH}}}".encode())


def key_text(pepper: bytes, prefix: str, choice: Callable[[str], str]) -> tuple[str, str]:
    """A new id, and the key that it is in."""
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix {prefix!r} must be lower-case words joined by '_', for example 'sk_live'")
    head = "".join(choice(_ALPHABET) for _ in range(ID_LENGTH - _CHECK_LENGTH))
    made = head + _check(pepper, head)
    body = f"{prefix}_{made}_{''.join(choice(_ALPHABET) for _ in range(SECRET_LENGTH))}"
    return made, f"{body}_{checksum(body.encode())}"


def key_id(presented: bytes) -> str | None:
    """The public id in a key; None for what no key looks like, mistyped ones included."""
    if len(presented) > MAX_KEY:
        return None
    found = _KEY.fullmatch(presented)
    if found is None:
        return None
    body, _, said = presented.rpartition(b"_")
    return found[1].decode("ascii") if checksum(body).encode("ascii") == said else None


def is_issued_id(pepper: bytes, made: str) -> bool:
    """Whether an id was made under this pepper. Those made before ids had a check are not known by it."""
    head, check = made[:-_CHECK_LENGTH], made[-_CHECK_LENGTH:]
    return hmac.compare_digest(_check(pepper, head).encode(), check.encode())


def key_digest(pepper: bytes, presented: bytes) -> bytes:
    """What is stored of a key: HMAC-SHA256 of the whole of it."""
    return hmac.digest(pepper, presented, "sha256")


def checksum(body: bytes) -> str:
    """CRC-32 in base 62: finds typing errors, keeps no secret."""
    return _base62(zlib.crc32(body), CHECKSUM_LENGTH)


def _check(pepper: bytes, head: str) -> str:
    # No key has a blank: what is digested here is never what is digested of a key.
    digest = hmac.digest(pepper, b"api key id " + head.encode(), "sha256")
    return _base62(int.from_bytes(digest[:16], "big") % _CHECKS, _CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    text = ""
    for _ in range(length):
        number, digit = divmod(number, 62)
        text = _ALPHABET[digit] + text
    return text

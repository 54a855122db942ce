"""The compact form of a JSON Web Signature, read strictly (RFC 7515; JSON as RFC 8259 and RFC 7493 have it).

    jws = parse_compact(b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2ln")
    jws.header["alg"], jws.claims["sub"], jws.signature, jws.signed

One token has one reading: what two parsers could read differently (padding, other characters, spare bits, duplicate
members, UTF-16, numbers beyond JSON) is refused, whatever it says. Everything is bounded, and the only exception that
comes out is `ValueError`. Nothing is verified here.
"""

import json
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from typing import Any, NamedTuple, NoReturn

MAX_TOKEN = 8_192
"""Bytes of a whole compact token; anything longer is refused before it is looked at."""

MAX_DEPTH = 16
"""Objects and arrays inside each other, the outermost counted."""

MAX_CONTAINERS = 512
"""Objects and arrays in one text: each costs time before anybody knows who wrote it."""

_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_TO_URL = bytes.maketrans(b"+/", b"-_")
_PADDING = (b"", b"===", b"==", b"=")


class CompactJws(NamedTuple):
    """The three parts of a token, decoded; `signed` is what the signature covers."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signature: bytes
    signed: bytes


def parse_compact(token: bytes) -> CompactJws:
    """Read exactly three base64url parts: an object, an object and a signature (RFC 7515 sections 5.2, 7.1)."""
    if len(token) > MAX_TOKEN:
        raise ValueError("the token is too long")
    parts = token.split(b".", 3)
    if len(parts) != 3:
        raise ValueError("a compact JWS has three parts")
    header, payload, signature = parts
    return CompactJws(
        parse_object(decode_base64url(header)),
        parse_object(decode_base64url(payload)),
        decode_base64url(signature),
        token[: len(header) + 1 + len(payload)],
    )


def decode_base64url(text: bytes) -> bytes:
    """Base64url without padding, only in its one canonical spelling (RFC 7515 section 2, RFC 4648 section 3.5)."""
    try:
        data = a2b_base64(text.translate(_TO_STANDARD) + _PADDING[len(text) % 4])
    except Base64Error:
        raise ValueError("not base64url") from None
    # Python skips what is not in the alphabet and ignores spare bits. Written back, only the one right spelling
    # stays the same; otherwise one token could be written in several ways, and a revoked one come back.
    if b2a_base64(data, newline=False).translate(_TO_URL).rstrip(b"=") != text:
        raise ValueError("not base64url")
    return data


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8: no byte order mark, no duplicate members, no NaN, no number beyond a double."""
    containers = data.count(b"[") + data.count(b"{")
    if containers > MAX_CONTAINERS:
        raise ValueError("too many objects and arrays")
    try:
        value = _DECODER.decode(data.decode("utf-8"))
        # A lone surrogate escape is no character (RFC 7493 section 2.1), and fails far away, when it is written out.
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        # Python's errors carry the text that they could not read: that stays here.
        raise ValueError("not strict JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if containers > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError("nested too deeply")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, dict | list) for item in level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0.0:
        raise ValueError("a number beyond a double")
    return number


def _refuse(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)

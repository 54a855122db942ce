"""The compact form of a JSON Web Signature, read strictly (RFC 7515; JSON as RFC 8259 and RFC 7493 have it).

    jws = parse_compact(b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2ln")
    jws.header["alg"], jws.payload, jws.signature, jws.signed
    parse_object(jws.payload)["sub"]        # `trusted=True` once the signature was verified

One token has one reading: what two parsers could read differently (padding, other characters, spare bits, duplicate
members, UTF-16, numbers beyond JSON) is refused, whatever it says. Everything is bounded, and the only exception that
comes out is `ValueError`. Nothing is verified here.
"""

import json
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from typing import Any, NamedTuple

from sigil_policy.wire.strict_json import DECODER, refuse, unique

MAX_TOKEN = 8_192
"""Bytes of a whole compact token; anything longer is refused before it is looked at."""

MAX_DEPTH = 16
"""Objects and arrays inside each other, the outermost counted."""

MAX_CONTAINERS = 512
"""Objects and arrays in one text."""

# What a text may hold that nobody has vouched for yet: reading one of these takes as long as reading a hundred letters.
# They are counted in the text, so that strings count too. What is short cannot hold many.
_WARY_CONTAINERS = 64
_WARY_COMMAS = 192
_WARY_ESCAPES = 64
_WARY_NUMBERS = 32
_WARY_DIGITS = 32
_SHORT = 512

_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_TO_URL = bytes.maketrans(b"+/", b"-_")
_PADDING = (b"", b"===", b"==", b"=")


class CompactJws(NamedTuple):
    """The three parts of a token, decoded; `signed` is what the signature covers. The header has been read, the payload
    has not: see `parse_object`."""

    header: dict[str, Any]
    payload: bytes
    signature: bytes
    signed: bytes


def parse_compact(token: bytes) -> CompactJws:
    """Read exactly three base64url parts: a header, a payload and a signature (RFC 7515 sections 5.2, 7.1)."""
    if len(token) > MAX_TOKEN:
        raise ValueError("the token is too long")
    parts = token.split(b".", 3)
    if len(parts) != 3:
        raise ValueError("a compact JWS has three parts")
    header, payload, signature = parts
    return CompactJws(
        parse_object(decode_base64url(header)),
        decode_base64url(payload),
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


def parse_object(data: bytes, *, trusted: bool = False) -> dict[str, Any]:
    """A JSON object in UTF-8: no byte order mark, no duplicate members, no NaN, no number beyond a double.

    One that is not `trusted` (its signature has not been verified) is bounded more tightly, by what it costs to read.
    """
    decoder = DECODER
    containers = data.count(b"[") + data.count(b"{")
    if containers > (MAX_CONTAINERS if trusted else _WARY_CONTAINERS):
        raise ValueError("too many objects and arrays")
    if not trusted and len(data) > _SHORT:
        if data.count(b",") > _WARY_COMMAS or data.count(b"\\") > _WARY_ESCAPES:
            raise ValueError("too many members")
        decoder = _wary_decoder()
    try:
        value = decoder.decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        # Python's errors carry the text that they could not read: that stays here.
        raise ValueError("not strict JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    _check(value)
    return value


def _check(value: dict[str, Any]) -> None:
    """Refuse what Python's parser lets pass, in one walk: a call for each number would cost more than the parsing."""
    texts: list[str] = []
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            if type(container) is dict:
                texts.extend(container)
                container = container.values()
            for item in container:
                kind = type(item)
                if kind is str:
                    texts.append(item)
                elif kind is dict or kind is list:
                    below.append(item)
                elif kind is float and item - item != 0.0:
                    raise ValueError("a number beyond a double")
        if not below:
            break
        level = below
    else:
        raise ValueError("nested too deeply")
    try:
        # A lone surrogate escape is no character (RFC 7493 section 2.1), and fails far away, when it is written out.
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("not strict JSON") from None


def _wary_decoder() -> json.JSONDecoder:
    """Reads some numbers, and no long ones: one double of many digits takes as long as a whole token."""
    left = iter(range(_WARY_NUMBERS))

    def bounded(read: Callable[[str], float]) -> Callable[[str], float]:
        def number(text: str) -> float:
            if len(text) > _WARY_DIGITS or next(left, None) is None:
                raise ValueError("too many numbers")
            return read(text)

        return number

    return json.JSONDecoder(
        object_pairs_hook=unique, parse_int=bounded(int), parse_float=bounded(float), parse_constant=refuse
    )

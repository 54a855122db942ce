"""Identifiers that travel in headers: which ones are accepted, and new ones.

    parse_id(b"session_abc123")      # 'session_abc123'
    parse_id(b"a\\r\\nset-cookie: x")  # None
    new_id()                         # '0b1d2c6e-5f0a-4c57-9a3e-8f1f6a2d9c44'

An accepted id has 1 to 128 characters of `A-Z a-z 0-9 . _ : -`: it can be put into a header, a log line, a URL or a
file name without quoting. New ids are version 4 UUIDs (RFC 9562 section 5.4) from the operating system's random source.
"""

import os

_LONGEST = 128
_ALLOWED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-"
# What is allowed stays as it is, everything else becomes something else: a third of the cost of a regular expression.
_CHECKED = bytes(byte if byte in _ALLOWED else byte ^ 0x80 for byte in range(256))

# Version 4 in the high half of byte 6, variant 10 in the two high bits of byte 8 (RFC 9562 sections 4.1, 4.2).
_VERSION = bytes(byte & 0x0F | 0x40 for byte in range(256))
_VARIANT = bytes(byte & 0x3F | 0x80 for byte in range(256))
# Where the 32 digits stand among the 36 characters.
_PLACES = [place for place, mark in enumerate("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx") if mark == "x"]
_BATCH = 128

# One system call for a batch of ids. `pop` and `extend` of a list are atomic, so threads never share an id.
_pool: list[str] = []
if hasattr(os, "register_at_fork"):
    # Parent and child would hand out the same ids.
    os.register_at_fork(after_in_child=_pool.clear)


def parse_id(value: bytes) -> str | None:
    """The id in a header value, or None if it is anything but one acceptable id."""
    if value and len(value) <= _LONGEST and value.translate(_CHECKED) == value:
        return value.decode()
    return None


def new_id() -> str:
    """A random version 4 UUID in its canonical form. Safe in threads and after a fork."""
    try:
        return _pool.pop()
    except IndexError:
        batch = _make()
        made = batch.pop()
        _pool.extend(batch)
        return made


def _make() -> list[str]:
    raw = bytearray(os.urandom(16 * _BATCH))
    raw[6::16] = raw[6::16].translate(_VERSION)
    raw[8::16] = raw[8::16].translate(_VARIANT)
    digits = raw.hex().encode()
    # One digit of all ids at a time: a third of the cost of one id at a time.
    made = bytearray(b"-" * (36 * _BATCH))
    for digit, place in enumerate(_PLACES):
        made[place::36] = digits[digit::32]
    text = made.decode()
    return [text[start : start + 36] for start in range(0, 36 * _BATCH, 36)]

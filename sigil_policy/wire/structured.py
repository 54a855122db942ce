"""Structured field values that this library writes (RFC 9651 section 4.1).

    sf_string('say "hi"')     # b'"say \\"hi\\""'
    sf_key("minute")          # b"minute"
    sf_integer(60)            # b"60"
    sf_date(1688169599)       # b"@1688169599"

What the grammar cannot say is a `ValueError` that names the value: settings are checked with these functions when a
policy is made, so that nothing fails while a response is written.
"""

import re

_PRINTABLE = re.compile(r"[ -~]*")
_KEY = re.compile(r"[a-z*][a-z0-9_.*-]*")
_LARGEST = 999_999_999_999_999


def sf_string(text: str) -> bytes:
    """A String: printable ASCII in quotes, with `"` and `\\` escaped (section 4.1.6)."""
    if not _PRINTABLE.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot be a structured field String: only printable ASCII can (RFC 9651 section 3.3.3)"
        )
    return b'"%b"' % text.replace("\\", "\\\\").replace('"', '\\"').encode("ascii")


def sf_key(name: str) -> bytes:
    """A key of a parameter or dictionary (section 4.1.1.3)."""
    if not _KEY.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be a structured field key: it starts with a-z or '*', "
            "then come a-z, 0-9, '_', '-', '.', '*' (RFC 9651 section 3.1.2)"
        )
    return name.encode("ascii")


def sf_integer(number: int) -> bytes:
    """An Integer of at most 15 digits (section 4.1.4)."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{number!r} cannot be a structured field Integer: it is a {type(number).__name__}")
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(
            f"{number} cannot be a structured field Integer: it has more than 15 digits (RFC 9651 section 3.3.1)"
        )
    return b"%d" % number


def sf_date(seconds: int) -> bytes:
    """A Date: `@` and whole seconds since the epoch (section 4.1.10)."""
    return b"@" + sf_integer(seconds)

"""Which web pages may come: the `Origin` that a browser sends, against a list (RFC 6454, RFC 6455 section 10.2).

    allowed = Origins(["https://app.example.com", "http://localhost:3000"])
    allowed.lists(b"https://app.example.com")       # True
    allowed.lists(b"https://app.example.com.evil")  # False
    allowed.lists(b"null")                          # False

Compared byte by byte as browsers write them: no patterns, no parsing of what comes in. Nothing is taken from `Host`:
a page of the service's own origin is listed like any other.
"""

import re
from collections.abc import Iterable

# A host as URLs are compared: lower case, and without the port that the scheme has anyway.
_AUTHORITY = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?")
_DEFAULT_PORTS = {"https": ":443", "http": ":80"}


def is_origin(text: str) -> bool:
    """Whether `text` is an origin as browsers write it: `https://app.example.com`, `http://localhost:3000`."""
    scheme, separator, authority = text.partition("://")
    return (
        bool(separator)
        and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) is not None
        and _AUTHORITY.fullmatch(authority) is not None
        and not authority.endswith(_DEFAULT_PORTS.get(scheme, "\0"))
    )


class Origins:
    """Origins of web pages, each as browsers write it. Raises `ValueError` for one that no browser would send."""

    __slots__ = ("_known", "listed")

    def __init__(self, listed: Iterable[str]) -> None:
        self.listed = tuple(listed)
        for origin in self.listed:
            if not isinstance(origin, str) or not is_origin(origin):
                raise ValueError(
                    f"origin {origin!r} must be written as browsers do, for example 'https://app.example.com': lower "
                    "case, no path, no default port; neither 'null' nor '*' can be trusted"
                )
        self._known = frozenset(origin.encode("ascii") for origin in self.listed)

    def lists(self, origin: bytes) -> bool:
        """Whether this field value is exactly one listed origin. Several lines joined to one are none."""
        return origin in self._known

    def __repr__(self) -> str:
        return f"Origins({list(self.listed)})"

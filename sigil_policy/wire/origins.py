"""Which web pages may come: the `Origin` that a browser sends, against a list (RFC 6454, RFC 6455 section 10.2).

    allowed = Origins(["https://app.example.com", "http://localhost:3000"])
    allowed.lists(b"https://app.example.com")       # True
    allowed.lists(b"https://app.example.com.evil")  # False
    allowed.lists(b"null")                          # False

Compared byte by byte as browsers write them: no patterns, no parsing of what comes in. Nothing is taken from `Host`:
a page of the service's own origin is listed like any other.
"""

from collections.abc import Iterable

from sigil_policy.wire.protected_resources import is_origin


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

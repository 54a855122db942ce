"""The problem for input that was rejected: where, and what is wrong with it; never what was sent."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from sigil_policy.core.catalogue import SEMANTICS_FAILED, VALIDATION_FAILED
from sigil_policy.core.problems import Problem

_MOST_ERRORS = 100
_MOST_PIECES = 200
_LONGEST_TEXT = 1_000
_LARGEST_PIECE = 10**300
_FRAGMENT = "~!$&'()*+,;=:@-._"  # what a URI fragment may hold as it is, besides "/" (RFC 3986 section 3.5)
_WHERE = {"query": "query", "path": "path", "header": "header", "cookie": "cookie"}


def from_validation_errors(errors: Sequence[Mapping[str, Any]], status: int) -> Problem:
    """The problem for a list of pydantic errors, with the members of the guidelines and of RFC 9457.

    Only where and what: never `input`, `ctx` or `url`.
    """
    fields: list[dict[str, str]] = []
    pointers: list[dict[str, str]] = []
    for error in errors[:_MOST_ERRORS]:
        location = [part if isinstance(part, int) else str(part)[:100] for part in error.get("loc") or ()]
        place, path = (location[0], location[1:]) if location else ("body", [])
        message = _message(error)
        if error.get("type") == "json_invalid":
            path = []  # the location is a position in the text
        fields.append({"field": ".".join(map(str, path)) or str(place), "message": message})
        if place in _WHERE:
            pointers.append({"detail": message, "parameter": ".".join(map(str, path)), "in": str(place)})
        else:
            pointers.append({"detail": message, "pointer": json_pointer(path)})
    kind = VALIDATION_FAILED if status == 400 else SEMANTICS_FAILED
    return kind("Request validation failed", validation_errors=fields, errors=pointers)


def json_pointer(path: Iterable[str | int]) -> str:
    """A JSON Pointer as a URI fragment (RFC 6901 sections 3 and 6): `#/a~1b`."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return "#" + "".join("/" + quote(step, safe=_FRAGMENT, errors="surrogatepass") for step in steps)


def _message(error: Mapping[str, Any]) -> str:
    text = str(error.get("msg") or "Invalid value")
    kind = str(error.get("type"))
    given = error.get("input")
    if kind in ("value_error", "assertion_error", "union_tag_invalid", "get_attribute_error", "mapping_type"):
        text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if kind not in ("value_error", "assertion_error"):
            return "Invalid value"  # these texts repeat what was sent
        return _without(text, given)[:500]
    return text[:500]


def _without(text: str, given: object) -> str:
    """A text that a validator wrote, without what was sent: the value, or, of a whole object, any of its values."""
    pieces: set[str] = set()
    waiting: list[object] = [given]
    for _ in range(_MOST_PIECES):
        if not waiting:
            break
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
            waiting.extend(value)
        elif isinstance(value, list | tuple | set | frozenset):
            waiting.extend(value)
        elif isinstance(value, str):
            pieces.update((value, value.strip(), repr(value)[1:-1]))
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_PIECE:
            pieces.add(str(value))
    if waiting or len(text) > _LONGEST_TEXT:
        return "Invalid value"  # too much to look through
    found = sorted((re.escape(piece) for piece in pieces if 2 < len(piece) <= len(text)), key=len, reverse=True)
    return re.sub("|".join(found), "…", text, flags=re.IGNORECASE) if found else text

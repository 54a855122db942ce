"""The problem for input that was rejected: where, and what is wrong with it; never what was sent.

A client can have as many errors made as it likes, of values as large as it likes: of many the first 32 are told, and
all that is looked through for them together is bounded. Beyond that a message is "Invalid value".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args
from urllib.parse import quote

from pydantic_core.core_schema import ErrorType

from sigil_policy.core.catalogue import SEMANTICS_FAILED, VALIDATION_FAILED
from sigil_policy.core.problems import Problem

MOST_ERRORS = 32
UNSAID = "Invalid value"
_MOST_STEPS = 120  # of all errors together: a value that is looked for, or so much of a text
_STEP_OF_TEXT = 100
_STEPS_OF_A_FIND = 5
_MOST_FOUND = 16  # times that one value is in one text
_LONGEST_TEXT = 1_000
_LONGEST_VALUE = 4_000
_LONGEST_MESSAGE = 500
_MOST_OF_PATHS = 800  # characters, of all errors together
_LONGEST_STEP = 100
_LARGEST_NUMBER = 10**300
_FRAGMENT = "/~!$&'()*+,;=:@-._"  # what a URI fragment may hold as it is (RFC 3986 section 3.5)
_WHERE = {"query": "query", "path": "path", "header": "header", "cookie": "cookie"}
_REPEATING = frozenset(("union_tag_invalid", "get_attribute_error", "mapping_type"))  # in ways that nobody can undo
# Texts of pydantic's own say what was wanted; those of validators say what their authors like.
_PLAIN = frozenset(get_args(ErrorType)) - _REPEATING - {"value_error", "assertion_error"}


def from_validation_errors(errors: Sequence[Mapping[str, Any]], status: int) -> Problem:
    """The problem for a list of pydantic errors, with the members of the guidelines and of RFC 9457.

    Only where and what: never `input`, `ctx` or `url`.
    """
    fields: list[dict[str, str]] = []
    pointers: list[dict[str, str]] = []
    room, steps = _MOST_OF_PATHS, _Steps()
    for error in errors[:MOST_ERRORS]:
        location: list[str | int] = []
        for part in error.get("loc") or ():
            step = part if isinstance(part, int) else str(part)[:_LONGEST_STEP]
            room -= 5 if isinstance(step, int) else 1 + len(step)
            if room < 0:
                break  # what is left out was further in
            location.append(step)
        place, path = (location[0], location[1:]) if location else ("body", [])
        message = _message(error, steps)
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
    steps = "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return "#" + quote(steps, safe=_FRAGMENT, errors="surrogatepass")


def _message(error: Mapping[str, Any], steps: "_Steps") -> str:
    text, kind = str(error.get("msg") or UNSAID), str(error.get("type", "missing"))
    if kind in _REPEATING:
        return UNSAID
    if kind in _PLAIN:
        return text[:_LONGEST_MESSAGE]
    text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return steps.without(text, error.get("input"))[:_LONGEST_MESSAGE]


class _Steps:
    """Takes what was sent out of texts that validators wrote, while there are steps left."""

    def __init__(self) -> None:
        self.left = _MOST_STEPS

    def without(self, text: str, given: object) -> str:
        """`text` without the value that was sent, or, of a whole object, without any of its values."""
        if len(text) > _LONGEST_TEXT:
            return UNSAID
        self.left -= len(text) // _STEP_OF_TEXT
        lowered = text.lower()
        found: set[str] = set()
        waiting = [given]
        while waiting:
            self.left -= 1
            if self.left < 0:
                return UNSAID
            value = waiting.pop()
            if isinstance(value, bytes):
                value = value[: _LONGEST_VALUE + 1].decode("utf-8", "backslashreplace")  # as its repr has it
            if isinstance(value, Mapping | list | tuple | set | frozenset):
                if len(value) > self.left:
                    return UNSAID
                waiting.extend(value)
                if isinstance(value, Mapping):
                    waiting.extend(value.values())
            elif isinstance(value, str):
                if len(value) > _LONGEST_VALUE:
                    if value[0].isspace() or value[-1].isspace():
                        return UNSAID  # what is left without the spaces may be short
                    continue
                form = value.lower()
                if len(form) > 2 and form in lowered:
                    found.add(form)
                if form and (form[0].isspace() or form[-1].isspace()):
                    waiting.append(form.strip())
                if not value.isprintable() or "\\" in value or "'" in value:
                    written = repr(form)[1:-1]
                    if written in lowered:
                        found.add(written)
            elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER:
                number = str(value)
                if len(number) > 2 and number in lowered:
                    found.add(number)
        for form in sorted(found, key=len, reverse=True):
            self.left -= _STEPS_OF_A_FIND
            lowered = text.lower()
            if self.left < 0 or len(lowered) != len(text) or lowered.count(form) > _MOST_FOUND:
                return UNSAID
            text = _cut(text, lowered, form)
        return text


def _cut(text: str, lowered: str, form: str) -> str:
    """`text` with an ellipsis wherever `form` is in `lowered`, its lower-case twin of the same length."""
    kept: list[str] = []
    start = 0
    while (place := lowered.find(form, start)) >= 0:
        kept.append(text[start:place])
        start = place + len(form)
    return "…".join((*kept, text[start:]))

"""Which of the languages that there are a client wants: Accept-Language and the lookup of RFC 4647 section 3.4.

    look_up(b"de-CH, en;q=0.5", ("en", "de"))       # "de"
    look_up(b"fr", ("en", "de"))                    # None: the default of whoever asks
    weighted(b"text/html;q=0.8, application/json")  # (("application/json", 1.0), ("text/html", 0.8))

RFC 9110 sections 12.4.2 (weights), 12.5.4; RFC 5646 section 2.1 (tags). Never raises for what a client sends: members
that are malformed are left out, and of a long field only the first 32 within 1,024 bytes count.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

_TAG = re.compile(r"[A-Za-z]{1,8}(?:-[A-Za-z0-9]{1,8})*")
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")
_MOST = 32
_LONGEST = 1_024


def is_language(tag: str) -> bool:
    """Whether `tag` has the form of a language tag: `de`, `pt-BR`, `zh-Hant-TW`."""
    return len(tag) <= 64 and _TAG.fullmatch(tag) is not None


def weighted(field: bytes) -> tuple[tuple[str, float], ...]:
    """The members of an Accept field in lower case with their weights, best first; weight 0 means "not this one"."""
    return _weighted(_cut(field))


def _cut(field: bytes) -> bytes:
    """So much of a field as is read, and kept in a cache; a member that was cut in the middle would be another one."""
    return field if len(field) <= _LONGEST else field[: _LONGEST + 1].rpartition(b",")[0]


@lru_cache(256)
def _weighted(field: bytes) -> tuple[tuple[str, float], ...]:
    found: list[tuple[str, float]] = []
    for member in field.decode("latin-1").lower().split(",")[:_MOST]:
        value, *parameters = (part.strip(" \t") for part in member.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if value and _WEIGHT.fullmatch(weight):
            found.append((value, float(weight)))
    return tuple(sorted(found, key=lambda pair: -pair[1]))


def look_up(field: bytes, available: Iterable[str]) -> str | None:
    """The tag of `available` that serves the client best, as it is spelled there; None when none does.

    Each wanted range is shortened from its end until a tag fits, before the next range has its turn. `*` fits nothing:
    whoever wants anything gets the default.
    """
    return _look_up(_cut(field), tuple(available))


@lru_cache(256)
def _look_up(field: bytes, available: tuple[str, ...]) -> str | None:
    tags = {tag.lower(): tag for tag in available}
    ranges = _weighted(field)
    refused = {value for value, weight in ranges if weight == 0}
    for wanted, weight in ranges:
        if weight == 0:
            break
        while wanted:
            if wanted in tags and wanted not in refused:
                return tags[wanted]
            wanted = wanted.rpartition("-")[0]
            if wanted[-2:-1] == "-":  # a single letter only introduces what follows it
                wanted = wanted[:-2]
    return None

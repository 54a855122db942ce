"""JSON that means one thing: no member twice, no NaN and no Infinity (RFC 8259 section 4, RFC 7493 section 2).

    DECODER.decode('{"a": 1}')              # {'a': 1}
    DECODER.decode('{"a": 1, "a": 2}')      # ValueError

Whoever reads a document that somebody else judges as well takes what both would read alike.
"""

import json
from typing import Any, NoReturn


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose members occur once; `ValueError` for any other."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def refuse(_: str) -> NoReturn:
    """What is made of a constant that JSON does not have."""
    raise ValueError("NaN and Infinity are not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse)

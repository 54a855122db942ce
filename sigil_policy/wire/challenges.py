"""Reading `WWW-Authenticate` far enough to add a parameter to its challenges (RFC 9110 section 11.6.1).

    with_parameter(b'Bearer realm="api", Basic realm="old"', "resource_metadata", "https://api.example.com/...")
                                    # b'Bearer realm="api", resource_metadata="...", Basic realm="old", resource_...'

One field may hold several challenges, and a comma stands between challenges as it stands between parameters. What is no
list of challenges is returned as it is. Time is linear in the field.
"""

import re

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
# Whatever stands between two commas that no quotes enclose. A quote that is never closed takes the rest: it is not
# looked for twice.
_ELEMENT = re.compile(rb'(?:"(?:[^"\\]|\\.|\\\Z)*+(?:"|\Z)|[^",])++', re.DOTALL)
_PARAMETER = re.compile(rb"(" + _TOKEN + rb")[ \t]*+=[ \t]*+(?:" + _TOKEN + rb'|"(?:[^"\\]|\\.)*+")', re.DOTALL)
_SCHEME = re.compile(rb"(" + _TOKEN + rb")(?: ++(?!=)(.++))?", re.DOTALL)
_SAFE = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]+")


def with_parameter(field: bytes, name: str, value: str, *, scheme: str | None = None) -> bytes:
    """`field` with `name="value"` in every challenge that does not have it; with `scheme`, only in those of that one.

    A challenge whose credentials are one `token68` (`Negotiate ...`) takes no parameters and stays. `ValueError` for a
    value that would break out of its quotes.
    """
    if not _SAFE.fullmatch(value):
        raise ValueError(f"{name} takes printable ASCII without quote and backslash")
    challenges = _challenges(field)
    if challenges is None:
        return field
    added = f'{name}="{value}"'.encode("ascii")
    wanted, known = None if scheme is None else scheme.lower().encode("ascii"), name.lower().encode("ascii")
    written = []
    for own, names, parts in challenges:
        if names is None or known in names or (wanted is not None and own != wanted):
            written += parts
        elif names:
            written += [*parts, added]
        else:
            written += [parts[0] + b" " + added]
    return b", ".join(written)


def _challenges(field: bytes) -> list[tuple[bytes, set[bytes] | None, list[bytes]]] | None:
    """Of every challenge the scheme, the names of its parameters (None for a token68), and its elements."""
    found: list[tuple[bytes, set[bytes] | None, list[bytes]]] = []
    for element in filter(None, (piece.strip(b" \t") for piece in _ELEMENT.findall(field))):
        parameter = _PARAMETER.fullmatch(element)
        if parameter is not None:
            if not found or found[-1][1] is None:
                return None
            found[-1][1].add(parameter[1].lower())
            found[-1][2].append(element)
            continue
        begun = _SCHEME.fullmatch(element)
        if begun is None:
            return None
        first = None if begun[2] is None else _PARAMETER.fullmatch(begun[2])
        names = set() if begun[2] is None else None if first is None else {first[1].lower()}
        found.append((begun[1].lower(), names, [element]))
    return found or None

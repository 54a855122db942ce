"""The fields that tell a client its limits: `RateLimit-Policy` and `RateLimit`, and the older `X-RateLimit-*`.

    policy_field([("minute", 20, 60, None), ("tokens-minute", 10_000, 60, "tokens")])
    # b'"minute";q=20;w=60, "tokens-minute";q=10000;w=60;qu="tokens"'

    template = limit_template(["minute", "tokens-minute"])
    template % (33, 33) % (19, 9_200)
    # b'"minute";r=19;t=33, "tokens-minute";r=9200;t=33'

draft-ietf-httpapi-ratelimit-headers-11 (`r` and `t` in seconds from now, names are Strings), in the canonical form of
RFC 9651 section 4.1. A quota unit that the draft does not register, such as "tokens", is always spelled out: without
`qu` a number means requests (section 3.1.2).
"""

import re
from collections.abc import Iterable

from sigil_policy.wire.structured import sf_integer, sf_string

# A List of Strings with parameters, as sections 3 and 4 want it. Parameter values are Integers, Decimals, Strings,
# Tokens, Byte Sequences, Booleans, Dates; what they say is none of our business.
_STRING = rb'"(?:[ !#-\[\]-~]|\\["\\])*"'
_VALUE = rb'(?:"(?:[ !#-\[\]-~]|\\["\\])*"|:[A-Za-z0-9+/=]*:|\?[01]|@?-?[0-9.]{1,17}|[A-Za-z*][!#-\'*+.^_`|~\w:/-]*)'
_MEMBER = re.compile(rb"[ \t]*(" + _STRING + rb")((?:; *[a-z*][a-z0-9_.*-]*(?:=" + _VALUE + rb")?)*)[ \t]*(?:,|\Z)")


def policy_field(members: Iterable[tuple[str, int, int, str | None]], *, degraded: bool = False) -> bytes:
    """`RateLimit-Policy` for (name, quota, seconds, unit) each; `unit=None` is requests. Raises `ValueError`.

    `degraded` marks every member with `sigil-degraded` (a vendor's parameter, section 3.1): the quota is one process's
    share, because the store that all of them count in is away.
    """
    return b", ".join(
        b"%b;q=%b;w=%b" % (sf_string(name), sf_integer(quota), sf_integer(seconds))
        + (b"" if unit is None else b";qu=" + sf_string(unit))
        + (b";sigil-degraded" if degraded else b"")
        for name, quota, seconds, unit in members
    )


def limit_template(names: Iterable[str]) -> bytes:
    """`RateLimit`, to be filled twice: with the seconds until each is renewed (the same for all callers of aligned
    windows), then with what remains of each."""
    return b", ".join(sf_string(name).replace(b"%", b"%%%%") + b";r=%%d;t=%d" for name in names)


def member_names(value: bytes) -> frozenset[bytes] | None:
    """The names (as they are written, with their quotes) in a `RateLimit` or `RateLimit-Policy` field.

    None for a value that is no List of Strings: an older draft's, or nothing that anybody could read.
    """
    names = []
    place = 0
    while place < len(value):
        found = _MEMBER.match(value, place)
        if found is None:
            return None
        names.append(found[1])
        place = found.end()
    if not names or value.rstrip(b" \t").endswith(b","):
        return None
    return frozenset(names)

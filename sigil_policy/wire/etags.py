"""Entity tags: their grammar, and comparing them with If-None-Match and If-Match (RFC 9110 sections 8.8.3, 13.1).

    parse_etags(b'"a,b", W/"c"')             # (b'"a,b"', b'W/"c"')
    same_weakly(b'"c"', b'W/"c"')            # True
    lists_weakly(b'"a,b", W/"c"', b'"c"')    # True

A field that is not a list of tags matches nothing: it never becomes a 304 by accident. Time is linear in the field.
"""

import re
from functools import lru_cache
from zlib import crc32

_TAG = rb'(?:W/)?"[!#-~\x80-\xff]*+"'
_ETAG = re.compile(_TAG)
# `#entity-tag` with the empty members that a recipient accepts (section 5.6.1.2). Possessive: never backtracks.
_LIST = re.compile(rb"[ \t,]*+" + _TAG + rb"(?:[ \t]*+,[ \t,]*+" + _TAG + rb")*+[ \t,]*+")
_LONGEST = 8_192

_CODING = re.compile(r"[ \t]*([a-z0-9!#$%&'*+.^_`|~-]+)[ \t]*(?:;[ \t]*q=(?P<q>[0-9.]*))?[ \t]*")


def is_etag(value: bytes) -> bool:
    """Whether `value` is one entity tag, strong or weak."""
    return _ETAG.fullmatch(value) is not None


def parse_etags(field: bytes) -> tuple[bytes, ...] | None:
    """The tags of a list, or None if it is not one (`*` is not). A field over 8 KiB is not read."""
    if len(field) > _LONGEST or _LIST.fullmatch(field) is None:
        return None
    return tuple(_ETAG.findall(field))


def same_weakly(one: bytes, other: bytes) -> bool:
    """Weak comparison: the same opaque tag (section 8.8.3.2). For If-None-Match."""
    return one.removeprefix(b"W/") == other.removeprefix(b"W/")


def same_strongly(one: bytes, other: bytes) -> bool:
    """Strong comparison: the same opaque tag, and neither is weak. For If-Match."""
    return one == other and not one.startswith(b"W/")


def lists_weakly(field: bytes, tag: bytes) -> bool:
    """Whether the list `field` has a member that weakly compares equal to `tag`."""
    if field == tag:
        return is_etag(tag)
    opaque = tag.removeprefix(b"W/")
    # Most fields that do not match do not contain the tag at all; only the others are read.
    at = field.find(opaque)
    if at < 0 or len(field) > _LONGEST or not is_etag(tag) or _LIST.fullmatch(field) is None:
        return False
    # In a list every tag has two quotes, so a tag begins after an even number of them. What begins after an odd
    # number is the gap between two tags: `"a","b"` does not list the tag `","`.
    quotes, start = 0, 0
    while at >= 0:
        quotes += field.count(b'"', start, at)
        if quotes % 2 == 0:
            return True
        start, at = at, field.find(opaque, at + 1)
    return False


def coding_variant(accept_encoding: bytes) -> bytes:
    """What tells apart the tags of clients to whom a response may go out in different codings; b"" for none.

    A layer further out may compress what was tagged here. One strong tag must not name two codings of a response
    (section 8.8.3.3), so it is made to depend on the codings that the client accepts.
    """
    return _variant(accept_encoding) if len(accept_encoding) <= 256 else b"-%08x" % crc32(accept_encoding)


@lru_cache(maxsize=256)
def _variant(accept_encoding: bytes) -> bytes:
    codings = set()
    for member in accept_encoding.decode("latin-1").lower().split(","):
        found = _CODING.fullmatch(member)
        if found is None:
            codings.add(member.strip())
        elif found["q"] is None or found["q"].strip("0."):
            codings.add(found[1])
    codings -= {"", "identity"}
    return b"-%08x" % crc32(",".join(sorted(codings)).encode("latin-1")) if codings else b""

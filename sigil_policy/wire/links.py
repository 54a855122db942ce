"""Link field values, and the URI references in them (RFC 8288 section 3, RFC 3986).

    link_value("/v8/agents?page=2", "successor-version")      # b'</v8/agents?page=2>; rel="successor-version"'
    encode_path("/v8/agents/Zoë")                             # "/v8/agents/Zo%C3%AB"
    query_without(b"page=2&token=x", lambda name, value: name == "token")    # "page=2"

Nothing that goes into a link can end it: every byte that a URI may not hold is percent-encoded.
"""

import re
from collections.abc import Callable
from urllib.parse import quote, unquote_plus

_PLAIN_PATH = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@/]*")
_PLAIN_QUERY = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*+")
_BARE_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_REFERENCE = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?#\[\]]|%[0-9A-Fa-f]{2})++")
# A registered relation type, or an absolute URI for any other (section 2.1).
_RELATION = re.compile(r"[a-z][a-z0-9.-]*+|[a-z][a-z0-9+.-]*+:[^\s\"<>\\^`{|}]++")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")


def link_value(target: str, rel: str, *, media_type: str | None = None) -> bytes:
    """One link: `target` is a URI reference, `rel` a registered relation type or an absolute URI.

    Raises `ValueError` for what would not be a link.
    """
    if not _REFERENCE.fullmatch(target):
        raise ValueError(f"link target {target!r} must be a URI reference; percent-encode other characters")
    if not _RELATION.fullmatch(rel):
        raise ValueError(f"link relation {rel!r} must be a registered name in lower case or an absolute URI")
    if media_type is not None and not _MEDIA_TYPE.fullmatch(media_type):
        raise ValueError(f"media type {media_type!r} must look like 'text/html'")
    tail = f'; type="{media_type}"' if media_type else ""
    return f'<{target}>; rel="{rel}"{tail}'.encode("ascii")


def encode_path(path: str) -> str:
    """A decoded path as it stands in a URI; whatever it holds, it stays a path."""
    if _PLAIN_PATH.fullmatch(path):
        return path
    return quote(path, safe="/:@!$&'()*+,;=-._~", errors="surrogatepass")


def query_without(query: bytes, drop: Callable[[str, str], bool]) -> str:
    """`query` without the parameters that `drop` chooses by their decoded name and value, fit for a URI.

    The order, the encoding and the repetition of the others stay.
    """
    # Some parsers split at ';' as well: a parameter that hides behind one goes too.
    rest = b"&".join(
        part for part in query.split(b"&") if part and not any(drop(*_decoded(piece)) for piece in part.split(b";"))
    )
    if _PLAIN_QUERY.fullmatch(rest):
        return rest.decode("ascii")
    return quote(_BARE_PERCENT.sub(b"%25", rest), safe="%/?:@!$&'()*+,;=-._~")


def _decoded(parameter: bytes) -> tuple[str, str]:
    name, _, value = parameter.partition(b"=")
    return _text(name), _text(value)


def _text(raw: bytes) -> str:
    return unquote_plus(raw.decode("latin-1"), "utf-8", "replace")

"""Cache-Control of responses, read strictly when a policy is made, and merging Vary (RFC 9111, RFC 9110 12.5.5).

directives = parse_cache_control("public, max-age=60")      # {"public": None, "max-age": "60"}
format_cache_control(made_private(directives))              # b"private, max-age=60"
merge_vary([b"Accept"], [b"X-API-Key"])                     # b"Accept, X-API-Key"
"""

import re
from collections.abc import Iterable, Mapping

Directives = Mapping[str, str | None]

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105  the token rule of the grammar
_DIRECTIVE = re.compile(rf'({_TOKEN})(?:=(?:({_TOKEN})|"([^"\\]*)"))?')
_MEMBER = re.compile(r'(?:[^",]|"[^"]*")+')
_NAMES = re.compile(rf"{_TOKEN}(?:[ \t]*,[ \t]*{_TOKEN})*")
_SECONDS = re.compile(r"[0-9]{1,10}")

# The response directives of the IANA registry, by the argument that they take.
_TIMED = frozenset(("max-age", "s-maxage", "stale-while-revalidate", "stale-if-error"))
_NAMING = frozenset(("private", "no-cache"))
_FLAGS = frozenset(
    ("public", "no-store", "no-transform", "must-revalidate", "proxy-revalidate", "must-understand", "immutable")
)
_SHARING = frozenset(("public", "s-maxage", "must-revalidate", "proxy-revalidate"))

_FIELD_NAME = re.compile(_TOKEN)


def parse_cache_control(text: str) -> Directives:
    """The directives of a Cache-Control value as it is written in a configuration.

    Raises `ValueError` for what caches would ignore or misread: unknown and repeated directives, an argument of the
    wrong kind, `private` together with `public` or `s-maxage`.
    """
    directives: dict[str, str | None] = {}
    for member in _MEMBER.findall(text) if text.count('"') % 2 == 0 else [text]:
        found = _DIRECTIVE.fullmatch(member.strip(" \t"))
        if found is None:
            raise ValueError(
                f"Cache-Control {text!r}: {member.strip()!r} is not a directive like 'no-store' or 'max-age=60'"
            )
        name, token, quoted = found[1].lower(), found[2], found[3]
        if name in directives:
            raise ValueError(f"Cache-Control {text!r} has {name!r} twice; keep one")
        if name in _TIMED:
            if token is None or not _SECONDS.fullmatch(token):
                raise ValueError(
                    f"Cache-Control {text!r}: {name} takes a whole number of seconds, not negative and not quoted, "
                    f"for example '{name}=60' (RFC 9111 section 1.2.2)"
                )
            directives[name] = token
        elif name in _NAMING:
            names = token if quoted is None else quoted
            if names is not None and not _NAMES.fullmatch(names):
                raise ValueError(
                    f"Cache-Control {text!r}: {name} takes field names, for example '{name}=\"set-cookie\"'"
                )
            directives[name] = names
        elif name in _FLAGS:
            if token is not None or quoted is not None:
                raise ValueError(f"Cache-Control {text!r}: {name} takes no argument")
            directives[name] = None
        else:
            known = ", ".join(sorted(_TIMED | _NAMING | _FLAGS))
            raise ValueError(f"Cache-Control {text!r}: {name!r} is not a response directive; known are {known}")
    if not directives:
        raise ValueError("Cache-Control is empty; write for example 'private, max-age=60', or leave the rule out")
    if is_private(directives) and not directives.keys().isdisjoint(("public", "s-maxage")):
        raise ValueError(f"Cache-Control {text!r} contradicts itself: 'private' excludes 'public' and 's-maxage'")
    return directives


def format_cache_control(directives: Directives) -> bytes:
    """`directives` on the wire: numbers as tokens, field names quoted (RFC 9111 sections 5.2.2.1, 5.2.2.4)."""
    parts = (
        name if value is None else f'{name}="{value}"' if name in _NAMING else f"{name}={value}"
        for name, value in directives.items()
    )
    return ", ".join(parts).encode("ascii")


def is_private(directives: Directives) -> bool:
    """Whether the whole response is kept out of shared caches by `private`; `private="x-foo"` keeps out one field."""
    return "private" in directives and directives["private"] is None


def may_be_shared(directives: Directives) -> bool:
    """Whether a shared cache might answer somebody else with it, unasked.

    `no-cache` alone is safe: the origin is asked each time.
    """
    if "no-store" in directives or is_private(directives):
        return False
    asks_always = "no-cache" in directives and directives["no-cache"] is None
    return not asks_always or not _SHARING.isdisjoint(directives)


def made_private(directives: Directives) -> Directives:
    """The same for the one caller whom the response is for: `private`, and nothing that speaks to shared caches."""
    if not may_be_shared(directives):
        return directives
    shared = ("public", "s-maxage", "proxy-revalidate", "private")
    return {"private": None, **{name: value for name, value in directives.items() if name not in shared}}


def field_name(name: str) -> bytes:
    """A header name as given, or `*`; `ValueError` for what is neither."""
    if not _FIELD_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a header name (RFC 9110 section 5.1)")
    return name.encode("ascii")


def merge_vary(lines: Iterable[bytes], names: Iterable[bytes]) -> bytes:
    """All members of the Vary `lines` and `names`, each once whatever its case; `*` absorbs the rest."""
    merged: dict[bytes, bytes] = {}
    for line in (*lines, *names):
        for member in line.split(b","):
            name = member.strip(b" \t")
            if name == b"*":
                return b"*"
            if name:
                merged.setdefault(name.lower(), name)
    return b", ".join(merged.values())

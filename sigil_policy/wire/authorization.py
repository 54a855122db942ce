"""The grammar of HTTP authentication: `Authorization` in, `WWW-Authenticate` out (RFC 9110 section 11, RFC 6750).

    bearer_token(b"Bearer mF_9.B5f-4.1JqM")          # b"mF_9.B5f-4.1JqM"
    bearer_token(b"Basic dXNlcjpwdw==")              # None: another scheme
    challenge("Bearer", realm="api", error="invalid_token")
                                                     # b'Bearer realm="api", error="invalid_token"'

Nothing here decides; it says what was written, and writes only what the grammar allows. No function takes more than
linear time, and none repeats what it was given in an error.
"""

import re
from collections.abc import Iterable

_TOKEN_CHARACTERS = (
    b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # RFC 9110 section 5.6.2
)
_TOKEN68_CHARACTERS = b"-._~+/0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")  # RFC 6749 section 3.3
_TEXT = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]+")  # RFC 6750 section 3; needs no escape in a quoted-string

# Longer than any registered scheme: a value without a space is not searched for its end.
_LONGEST_SCHEME = 64
_LONGEST_ENCODED = 1_024

MAX_QUERY = 8_192
"""Bytes of a query in which a credential is looked for that is used as one: a longer search keeps others waiting."""


def bearer_token(value: bytes) -> bytes | None:
    """What follows `Bearer` in one `Authorization` field line; None when the line names another scheme.

    The scheme has no case and is followed by one or more spaces (RFC 9110 section 11.4). The token is not checked:
    see `is_token68`. `ValueError` when there is no scheme, or no token after `Bearer`.
    """
    if value[:7].lower() == b"bearer ":
        token = value[7:]
        if token[:1] == b" ":
            token = token.lstrip(b" ")
        if token:
            return token
        raise ValueError("no token follows the scheme Bearer")
    scheme = value[:_LONGEST_SCHEME].partition(b" ")[0]
    if scheme.lower() == b"bearer":
        raise ValueError("no token follows the scheme Bearer")
    if not scheme or scheme.translate(None, _TOKEN_CHARACTERS):
        raise ValueError("the Authorization header does not begin with an authentication scheme")
    return None


def is_token68(token: bytes) -> bool:
    """Whether `token` is a `token68`, which RFC 6750 section 2.1 calls `b64token`: no space, comma or control."""
    text = token.rstrip(b"=")
    return bool(text) and not text.translate(None, _TOKEN68_CHARACTERS)


def is_token(text: str) -> bool:
    """Whether `text` is an HTTP token (RFC 9110 section 5.6.2): a header name, an authentication scheme."""
    return _TOKEN.fullmatch(text) is not None


def is_scope_token(text: str) -> bool:
    """Whether `text` is one scope (RFC 6749 section 3.3): visible ASCII without space, quote and backslash."""
    return _SCOPE_TOKEN.fullmatch(text) is not None


def split_scopes(text: str) -> list[str]:
    """The scopes of a space-delimited list (RFC 6749 section 3.3). Only the space delimits: a tab is no scope's end."""
    return [scope for scope in text.split(" ") if scope]


def is_challenge_text(text: str) -> bool:
    """Whether `text` may stand in `realm`, `error` and `error_description` as it is (RFC 6750 section 3)."""
    return _TEXT.fullmatch(text) is not None


def challenge(
    scheme: str,
    *,
    realm: str,
    error: str | None = None,
    error_description: str | None = None,
    scope: Iterable[str] = (),
) -> bytes:
    """One `WWW-Authenticate` field value; each parameter stands in it at most once (RFC 6750 section 3).

    `ValueError` for a character that the grammar excludes: nothing can break out of its quotes.
    """
    if not is_token(scheme):
        raise ValueError("an authentication scheme is a token, for example Bearer (RFC 9110 section 11.1)")
    parameters = [("realm", realm)]
    if error is not None:
        parameters.append(("error", error))
    if error_description is not None:
        parameters.append(("error_description", error_description))
    for name, value in parameters:
        if not is_challenge_text(value):
            raise ValueError(f"{name} takes printable ASCII without quote and backslash (RFC 6750 section 3)")
    scopes = list(scope)
    if not all(map(is_scope_token, scopes)):
        raise ValueError("a scope takes printable ASCII without space, quote and backslash (RFC 6749 section 3.3)")
    if scopes:
        parameters.append(("scope", " ".join(scopes)))
    written = ", ".join(f'{name}="{value}"' for name, value in parameters)
    return f"{scheme} {written}".encode("ascii")


class QueryNames:
    """Finds out whether a raw query string has one of some parameters, however their names are percent-encoded.

        QueryNames("access_token").found_in(b"page=1&access%5Ftoken=x")     # True
        QueryNames("access_token").found_in(b"q=access_token&my_access_token=x")   # False

    A name without `=` carries nothing and is not found. `any_case` ignores the case of ASCII letters. Encoded names are
    looked for in the first 1 KiB: what needs no encoding is not encoded by accident, and the search takes its time.
    """

    __slots__ = ("_any_case", "_encoded", "_names")

    def __init__(self, *names: str, any_case: bool = False) -> None:
        self._any_case = any_case
        self._names = tuple(f"&{name.lower() if any_case else name}=".encode("ascii") for name in names)
        spelled = ("".join(_spellings(letter, any_case) for letter in name) for name in names)
        begun = re.escape("".join(sorted({name[1:2].decode() for name in self._names})))
        self._encoded = re.compile(f"&(?=[%{begun}])(?:{'|'.join(spelled)})=".encode("ascii")).search

    def found_in(self, query: bytes) -> bool:
        query = b"&" + (query.lower() if self._any_case else query)
        for name in self._names:
            if name in query:
                return True
        return b"%" in query and self._encoded(query, 0, _LONGEST_ENCODED) is not None


def _spellings(letter: str, any_case: bool) -> str:
    """A pattern for one letter of a name, as itself or percent-encoded; with `any_case` for a query in lower case."""
    if any_case:
        # The codes of both cases differ in their first digit: %61, %41.
        lower, upper = ord(letter.lower()), ord(letter.upper())
        letter, code = letter.lower(), f"[{lower >> 4:x}{upper >> 4:x}]{lower & 15:x}"
    else:
        code = re.sub("[a-f]", lambda digit: f"[{digit[0]}{digit[0].upper()}]", f"{ord(letter):02x}")
    return f"(?:{re.escape(letter)}|%{code})"

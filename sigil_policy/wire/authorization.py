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

    A name without `=` carries nothing and is not found. `any_case` ignores the case of ASCII letters.
    """

    __slots__ = ("_any_case", "_names", "_spellings")

    def __init__(self, *names: str, any_case: bool = False) -> None:
        self._any_case = any_case
        self._names = tuple(f"&{name.lower() if any_case else name}=".encode("ascii") for name in names)
        spellings: dict[bytes, bytes] = {}
        for letter in sorted(set("".join(names))):
            for one in {letter.lower(), letter.upper()} if any_case else {letter}:
                code = f"%{ord(one):02x}"
                spellings[code.encode("ascii")] = spellings[code.upper().encode("ascii")] = letter.encode("ascii")
        # Codes with a letter in them come first: what another code stands for never completes them.
        self._spellings = tuple(sorted(spellings.items(), key=lambda pair: pair[0][1:].isdigit()))

    def found_in(self, query: bytes) -> bool:
        if b"%" in query:
            for code, letter in self._spellings:
                query = query.replace(code, letter)
        query = b"&" + (query.lower() if self._any_case else query)
        for name in self._names:  # noqa: SIM110  asked for every query: a generator costs more than the search
            if name in query:
                return True
        return False

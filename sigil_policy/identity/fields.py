"""The kinds of text that policies are configured with, checked when they are given: `realm: Realm = "api"`.

Each says what was expected and which RFC says so. None of them is a secret, so an error may show it.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from sigil_policy.wire.authorization import is_challenge_text, is_scope_token, is_token

CONFIG = ConfigDict(extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)
"""How the values of this room are validated: unknown options refused, nothing that was given shown in an error."""


_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ValueError(
            f"name {text!r} must be letters, digits, '.', '_' and '-': it stands in response headers and in keys"
        )
    return text


def _realm(text: str) -> str:
    if not is_challenge_text(text):
        raise ValueError(
            "a realm is printable ASCII without quote and backslash, for example 'api' (RFC 6750 section 3)"
        )
    return text


def _scope(text: str) -> str:
    if not is_scope_token(text):
        raise ValueError(
            f"scope {text!r} must be printable ASCII without space, quote and backslash, for example 'agents:read' "
            "(RFC 6749 section 3.3); write several scopes as a list"
        )
    return text


def _token(text: str) -> str:
    if not is_token(text):
        raise ValueError(f"{text!r} must be an HTTP token, for example 'X-API-Key' (RFC 9110 section 5.6.2)")
    return text


def _subject(text: str) -> str:
    if not is_subject(text):
        raise ValueError("a subject has 1 to 255 printable characters, for example 'user_123'")
    return text


def is_subject(text: str) -> bool:
    """Whether `text` may name a caller: it goes into logs, keys of counters and `request.user`."""
    return 0 < len(text) <= 255 and text.isprintable()


Label = Annotated[str, AfterValidator(_label)]
"""Sets a policy, or a part of one, apart: in front of its limits' names and of its counters."""
Realm = Annotated[str, AfterValidator(_realm)]
Scope = Annotated[str, AfterValidator(_scope)]
HeaderName = Annotated[str, AfterValidator(_token)]
Scheme = Annotated[str, AfterValidator(_token)]
Subject = Annotated[str, AfterValidator(_subject)]

QueryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
"""A query parameter that needs no encoding."""

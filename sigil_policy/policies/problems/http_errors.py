"""The problems for what an application raises or sends as a plain HTTP error."""

from collections.abc import Iterable, Mapping

from sigil_policy.core.catalogue import http_problem
from sigil_policy.core.problems import Problem

_CHALLENGE = (b"www-authenticate", b'Bearer realm="api"')


def unhandled() -> Problem:
    """The problem of an exception that nobody expected: says nothing of it."""
    return http_problem(500)("The server met an error that it did not expect")


def from_http_error(
    status: int, detail: object = None, headers: Mapping[str, str] | Iterable[tuple[bytes, bytes]] | None = None
) -> Problem:
    """The problem for an HTTP error of the application; a `detail` that is no text goes into the member `data`."""
    pairs = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in (headers.items() if isinstance(headers, Mapping) else ())
    ] or [*(() if isinstance(headers, Mapping) else headers or ())]
    # RFC 9110 section 15.5.2: a 401 has a challenge, also where the application forgot it.
    if status == 401 and not any(name == b"www-authenticate" for name, _ in pairs):
        pairs.append(_CHALLENGE)
    pairs = [pair for pair in pairs if pair[0] not in (b"content-type", b"content-length")]
    kind = http_problem(status)
    if detail is None or isinstance(detail, str):
        return kind(None if detail == kind.title else detail, headers=pairs)
    return kind(headers=pairs, data=detail)

"""Answers 413 to a request whose body is too large.

    BodyLimit(limit=1_048_576, routes={"POST /v7/files": 104_857_600, "POST /v7/import": None})

    POST /v7/agents                     413 Content Too Large
    Content-Length: 5000000             {"error_code": "REQ_003", "max_bytes": 1048576, ...}

What it guarantees:

* A body whose `Content-Length` is over the limit is refused before any of it is read; a client that waits for
  `100 Continue` does not send it. What is announced within the limit goes to the application as it comes, and the
  server holds the client to it (RFC 9112 section 6.3, RFC 9113 section 8.1.1).
* A body that announces no length (chunked, or HTTP/2 without the field) is counted as it is read, and refused once it
  is over the limit, or over `unannounced` if that is less. It is held in memory until it is complete; then the
  application gets all of it. No application meets a body that ends in the middle because of its size.
* On HTTP/1.1 the connection is closed after a refusal: nobody has to read what was sent in vain.
* Messages of WebSockets are not looked at.

Place it inside `Timeout`, whose time holds for the reading too, and inside of what judges the caller: the body of who
is refused is not read. Outside of policies that read the body themselves. RFC 9110 section 15.5.14.
"""

from collections.abc import Awaitable, Mapping
from math import inf
from typing import Annotated

from pydantic import Field

from sigil_policy.core.catalogue import BODY_TOO_LARGE, http_problem
from sigil_policy.core.exchange import BodyTooLargeError, Exchange
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem

Bytes = Annotated[int, Field(ge=0, le=1 << 50)]

_LONGEST_NUMBER = 19
_BODILESS = frozenset(("GET", "HEAD", "OPTIONS"))


class BodyLimit(Policy):
    """A request body has at most so many bytes.

        BodyLimit(limit=65_536, routes={"POST /v7/files": 104_857_600})

    Options:
        limit: bytes, for every route without a limit of its own (default 1 MiB; None: no limit).
        routes: from route to its bytes, or to None for no limit (default: none).
        unannounced: bytes of a body without `Content-Length`, at most; so many are held in memory (default 1 MiB).

    Answers 413 `REQ_003`, and 400 `REQ_400` where the client leaves in the middle of a body that is read. Raises
    `ValueError` for what is no number of bytes, 0 or more.
    """

    limit: Bytes | None = 1_048_576
    routes: Mapping[str, Bytes | None] = Field(default_factory=dict)
    unannounced: Annotated[int, Field(ge=0, le=1 << 30)] = 1_048_576

    def rules(self) -> Mapping[str, float]:
        return {route: inf if limit is None else limit for route, limit in self.routes.items()}

    def describe(self, operation: Operation, rule: float | None) -> None:
        if operation.method not in _BODILESS and self._limit(rule) < inf:
            operation.answers(BODY_TOO_LARGE, max_bytes=self._limit(rule))

    def _limit(self, rule: float | None) -> float:
        return rule if rule is not None else inf if self.limit is None else self.limit

    def on_request(self, ex: Exchange) -> Problem | Awaitable[Problem | None] | None:
        if ex.kind != "http":
            return None
        headers = ex.headers
        length = headers.get(b"content-length")
        chunked = b"transfer-encoding" in headers  # it overrides a Content-Length (RFC 9112 section 6.3)
        if length is None and not chunked and ex.method in _BODILESS and _is_http_1(ex):
            return None  # there is no body (RFC 9112 section 6.3)
        limit = self._limit(ex.rule(self))
        if limit == inf:
            return None
        if length is None or chunked or not length.isdigit():
            return self._read(ex, int(min(limit, self.unannounced)))
        if len(length) <= _LONGEST_NUMBER and int(length) <= limit:
            return None
        return _too_large(ex, f"The body of this request has at most {int(limit)} bytes", int(limit))

    async def _read(self, ex: Exchange, limit: int) -> Problem | None:
        try:
            await ex.body(limit)
        except BodyTooLargeError:
            return _too_large(
                ex, f"The body of this request has at most {limit} bytes where no Content-Length announces it", limit
            )
        except ConnectionError:
            return http_problem(400)("The request ended before its body was complete")
        return None


def _too_large(ex: Exchange, detail: str, limit: int) -> Problem:
    # Versions from 2 on have no such field, and end the stream alone (RFC 9113 section 8.2.2).
    headers = ((b"connection", b"close"),) if _is_http_1(ex) else ()
    return BODY_TOO_LARGE(detail, headers=headers, max_bytes=limit)


def _is_http_1(ex: Exchange) -> bool:
    return str(ex.scope.get("http_version", "")).startswith("1")

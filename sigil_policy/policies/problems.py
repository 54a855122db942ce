"""Every error leaves as an RFC 9457 problem.

    app.add_middleware(PolicyStack, policies=[RequestID(), Problems()])

    AgentNotFound = ProblemType(code="AGT_001", title="AgentNotFoundError", status=404)
    raise AgentNotFound(detail="Agent 'x' not found")           # anywhere in the application

What it does with the application's errors:

* a raised `Problem` is answered as it is;
* on Starlette and FastAPI, `HTTPException`, 404, 405 and `RequestValidationError` become problems, also in mounted
  applications; `Allow`, `WWW-Authenticate`, `Retry-After` and every other header of the exception survive. A handler
  that the application has registered itself wins;
* an unhandled exception is answered 500 without any of its text, and then raised on, so that the server's log, Sentry
  and `TestClient` see it. The application's own handler for 500 is called instead where there is one, and with
  `debug=True` the exception is only raised on;
* once a response has started an error is only raised on.

Without this policy nothing of the application's is answered for it; what other policies refuse is a problem anyway.
Rejected input is never repeated to the client.

Goes inside RequestID (so that the unhandled 500 carries the id) and outside everything that may fail.
"""

import re
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import field_validator

from sigil_policy.core.catalogue import SEMANTICS_FAILED, VALIDATION_FAILED, http_problem
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Correlation, Principal
from sigil_policy.core.policy import Answer, Policy
from sigil_policy.core.problems import Problem, ProblemStyle, Reply

_BARE_500 = b"Internal Server Error"
_CHALLENGE = (b"www-authenticate", b'Bearer realm="api"')
_MOST_ERRORS = 100
_MOST_PIECES = 200
_LONGEST_TEXT = 1_000
_LARGEST_PIECE = 10**300
_FRAGMENT = "~!$&'()*+,;=:@-._"  # what a URI fragment may hold as it is, besides "/" (RFC 3986 section 3.5)
_WHERE = {"query": "query", "path": "path", "header": "header", "cookie": "cookie"}


class Problems(Policy):
    """Answers the application's errors as problems, and says how all problems look.

    Options:
        base_url: absolute URI that, with the slug of a code, makes a problem's `type`
            (default `https://sigil.acti.ai/errors/`, giving `https://sigil.acti.ai/errors/agt-001`).
        validation_status: 400 (default, the guidelines' choice; code `REQ_001`) or 422 (code `REQ_002`).
        instance: `"path"` (default) or `"urn"`, which names the occurrence by its request id (RFC 9457 section 3.1.5).
        media_type: `application/problem+json` (default), or `application/json` for clients that know no other.

    Raises `ValueError` at construction for a relative `base_url`.
    """

    base_url: str = "https://sigil.acti.ai/errors/"
    validation_status: Literal[400, 422] = 400
    instance: Literal["path", "urn"] = "path"
    media_type: Literal["application/problem+json", "application/json"] = "application/problem+json"

    reads: ClassVar[tuple[type, ...]] = (Correlation,)
    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    @field_validator("base_url")
    @classmethod
    def _absolute(cls, value: str) -> str:
        ProblemStyle(base_url=value)
        return value

    @cached_property
    def style(self) -> ProblemStyle:
        return ProblemStyle(base_url=self.base_url, media_type=self.media_type, instance=self.instance)

    def on_request(self, ex: Exchange) -> Answer:
        ex.style = self.style
        return None

    def on_error(self, ex: Exchange, error: Exception) -> Answer | Awaitable[Answer]:
        if isinstance(error, Problem):
            return error
        if ex.debug:
            return None
        own = ex.host.answer(ex, error)
        return self._unhandled(ex) if own is None else self._own(ex, own)

    async def _own(self, ex: Exchange, own: Awaitable[Reply | None]) -> Answer:
        return await own or self._unhandled(ex)

    def _unhandled(self, ex: Exchange) -> Reply:
        return self.style.render(unhandled(), ex, reraise=True)

    # A whole Starlette application inside has answered its unhandled error already, as plain text.

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        return head.status == 500 and (head.get(b"content-type") or b"").startswith(b"text/plain")

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> bytes | None:
        if body != _BARE_500 and not (body == b"" and ex.method == "HEAD"):
            return None
        reply = self.style.render(unhandled(), ex)
        own = {name for name, _ in reply.headers}
        head.headers[:] = [*(pair for pair in head.headers if pair[0] not in own), *reply.headers]
        return b"" if ex.method == "HEAD" else reply.body


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


def from_validation_errors(errors: Sequence[Mapping[str, Any]], status: int) -> Problem:
    """The problem for a list of pydantic errors, with the members of the guidelines and of RFC 9457.

    Only where and what: never `input`, `ctx` or `url`.
    """
    fields: list[dict[str, str]] = []
    pointers: list[dict[str, str]] = []
    for error in errors[:_MOST_ERRORS]:
        location = [part if isinstance(part, int) else str(part)[:100] for part in error.get("loc") or ()]
        place, path = (location[0], location[1:]) if location else ("body", [])
        message = _message(error)
        if error.get("type") == "json_invalid":
            path = []  # the location is a position in the text
        fields.append({"field": ".".join(map(str, path)) or str(place), "message": message})
        if place in _WHERE:
            pointers.append({"detail": message, "parameter": ".".join(map(str, path)), "in": str(place)})
        else:
            pointers.append({"detail": message, "pointer": json_pointer(path)})
    kind = VALIDATION_FAILED if status == 400 else SEMANTICS_FAILED
    return kind("Request validation failed", validation_errors=fields, errors=pointers)


def json_pointer(path: Iterable[str | int]) -> str:
    """A JSON Pointer as a URI fragment (RFC 6901 sections 3 and 6): `#/a~1b`."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return "#" + "".join("/" + quote(step, safe=_FRAGMENT, errors="surrogatepass") for step in steps)


def _message(error: Mapping[str, Any]) -> str:
    text = str(error.get("msg") or "Invalid value")
    kind = str(error.get("type"))
    given = error.get("input")
    if kind in ("value_error", "assertion_error", "union_tag_invalid", "get_attribute_error", "mapping_type"):
        text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if kind not in ("value_error", "assertion_error"):
            return "Invalid value"  # these texts repeat what was sent
        return _without(text, given)[:500]
    return text[:500]


def _without(text: str, given: object) -> str:
    """A text that a validator wrote, without what was sent: the value, or, of a whole object, any of its values."""
    pieces: set[str] = set()
    waiting: list[object] = [given]
    for _ in range(_MOST_PIECES):
        if not waiting:
            break
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
            waiting.extend(value)
        elif isinstance(value, list | tuple | set | frozenset):
            waiting.extend(value)
        elif isinstance(value, str):
            pieces.update((value, value.strip(), repr(value)[1:-1]))
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_PIECE:
            pieces.add(str(value))
    if waiting or len(text) > _LONGEST_TEXT:
        return "Invalid value"  # too much to look through
    found = sorted((re.escape(piece) for piece in pieces if 2 < len(piece) <= len(text)), key=len, reverse=True)
    return re.sub("|".join(found), "…", text, flags=re.IGNORECASE) if found else text

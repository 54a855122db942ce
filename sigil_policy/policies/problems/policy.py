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
* the bare errors that other frameworks send (Litestar, Quart, Django, Falcon, BlackSheep, a plain ASGI application, one
  that is mounted) are rewritten: same status, same headers but for those that describe the content, and the words that
  the application gave to the error as `detail`. Only whole and known forms, at most 8 KiB, see
  `sigil_policy.policies.problems.bare`; everything else leaves byte for byte as it came, and so do compressed bodies,
  streams and debug pages. Of a HEAD whose framework leaves the body out, the length that it would have has to be that
  of a form, and nothing else may be said of it;
* once a response has started an error is only raised on.

Without this policy nothing of the application's is answered for it; what other policies refuse is a problem anyway.
Rejected input is never repeated to the client.

Goes inside RequestID (so that the unhandled 500 carries the id) and outside everything that may fail.
"""

from collections.abc import Awaitable
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from sigil_policy.core.catalogue import SEMANTICS_FAILED, VALIDATION_FAILED, http_problem
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Correlation, Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Answer, Policy
from sigil_policy.core.problems import Messages, Problem, ProblemStyle, Reply
from sigil_policy.policies.problems import bare
from sigil_policy.policies.problems.http_errors import unhandled

_BARE_500 = b"Internal Server Error"
_EXAMPLE = [{"field": "name", "message": "Field required"}]
# What describes a body that is replaced, or is said anew.
_OF_CONTENT = frozenset(
    (
        b"accept-ranges", b"content-digest", b"content-disposition", b"content-language", b"content-length",
        b"content-md5", b"content-type", b"digest", b"etag", b"last-modified", b"repr-digest", b"trailer",
        b"transfer-encoding", b"x-content-type-options",
    )
)  # fmt: skip
# What no framework says of an error that it makes up itself.
_OF_ONES_OWN = frozenset((b"content-disposition", b"content-language", b"etag", b"last-modified"))


class Problems(Policy):
    """Answers the application's errors as problems, and says how all problems look.

    Options:
        base_url: absolute URI that, with the slug of a code, makes a problem's `type`
            (default `https://sigil.acti.ai/errors/`, giving `https://sigil.acti.ai/errors/agt-001`).
        validation_status: 400 (default, the guidelines' choice; code `REQ_001`) or 422 (code `REQ_002`).
        instance: `"path"` (default) or `"urn"`, which names the occurrence by its request id (RFC 9457 section 3.1.5).
        media_type: `application/problem+json` (default), or `application/json` for clients that know no other.
        foreign_errors: whether the bare errors of other frameworks are rewritten (default True). False leaves all but
            the plain 500 of a Starlette application as they are.
        messages: titles in other languages, `{"de": {"AGT_001": "Agent nicht gefunden"}}` (default: none). The client's
            Accept-Language chooses (RFC 4647 section 3.4); Content-Language and Vary say so. `detail` stays as written.
        language: the language of all other titles (default "en").

    Raises `ValueError` at construction for a relative `base_url`, and for tags and codes that are none.
    """

    base_url: str = "https://sigil.acti.ai/errors/"
    validation_status: Literal[400, 422] = 400
    instance: Literal["path", "urn"] = "path"
    media_type: Literal["application/problem+json", "application/json"] = "application/problem+json"
    foreign_errors: bool = True
    messages: Messages = Field(default_factory=dict)
    language: str = "en"

    bound: ClassVar[int] = 8_192

    reads: ClassVar[tuple[type, ...]] = (Correlation,)
    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    @field_validator("base_url")
    @classmethod
    def _absolute(cls, value: str) -> str:
        ProblemStyle(base_url=value)
        return value

    @field_validator("messages")
    @classmethod
    def _by_tag_and_code(cls, value: Messages) -> Messages:
        ProblemStyle(messages=value)
        return value

    @field_validator("language")
    @classmethod
    def _is_language(cls, value: str) -> str:
        ProblemStyle(language=value)
        return value

    @cached_property
    def style(self) -> ProblemStyle:
        return ProblemStyle(
            base_url=self.base_url,
            media_type=self.media_type,
            instance=self.instance,
            messages=self.messages,
            language=self.language,
        )

    def describe(self, operation: Operation, rule: Any) -> None:
        operation.style = self.style
        operation.answers(unhandled().type)
        if operation.takes_input:
            operation.validation = VALIDATION_FAILED if self.validation_status == 400 else SEMANTICS_FAILED
            # The second: a body that cannot be read at all.
            operation.answers(operation.validation, inside=True, validation_errors=_EXAMPLE)
            operation.answers(http_problem(400), inside=True)

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

    # A whole application inside has answered its errors already, in its framework's own way.

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        if not 400 <= head.status < 600 or head.get(b"content-encoding") is not None:
            return False
        kind = head.get(b"content-type")
        if not self.foreign_errors:
            return head.status == 500 and kind is not None and kind.startswith(b"text/plain")
        return bare.may_be(kind)

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> bytes | None:
        no_content = ex.method == "HEAD" and not body
        kept = [pair for pair in head.headers if pair[0] not in _OF_CONTENT]
        kind = head.get(b"content-type") or b""
        if not self.foreign_errors and body != _BARE_500 and not no_content:
            return None
        if no_content:
            if any(name in _OF_ONES_OWN for name, _ in head.headers):
                return None
            problem = bare.read_head(head.status, kind, head.get(b"content-length"), kept)
        else:
            problem = bare.read(head.status, kind, body, kept, self.validation_status)
        if problem is None:
            return None
        reply = self.style.render(problem, ex)
        head.status = reply.status
        head.headers[:] = reply.headers
        if no_content:
            return None
        if ex.method == "HEAD":
            head.remove(b"content-length")  # what is sent is not what it would be the length of
            return b""
        return reply.body

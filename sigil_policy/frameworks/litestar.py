"""Litestar: what its handlers raise, answered as problems by its own plugin convention.

    app = Litestar([...], plugins=[ProblemsPlugin()])
    app = PolicyStack(app, policies=[RequestID(), Problems(), ...])

A raised `Problem` is answered as it is. `HTTPException` and all below it become problems with their headers and their
words; what stands in `extra` is the member `data`, failed validations are said as everywhere else, without what was
sent. A 500 loses its words. The application's own exception handlers win.

The stack goes around the application, not into `middleware=`: Litestar answers 404 and 405 outside of that, so they
would have no request id and count against no limit. Litestar is imported from here only; measured with 2.25.0.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from litestar import Request
from litestar.config.app import AppConfig
from litestar.exceptions import HTTPException
from litestar.plugins import InitPlugin
from litestar.response import Response
from litestar.response.base import ASGIResponse

from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import SCOPE_KEY, Exchange
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import DEFAULT_STYLE, Problem, Reply
from sigil_policy.frameworks.foreign import text_headers
from sigil_policy.policies.problems import from_http_error, from_validation_errors, unhandled
from sigil_policy.policies.problems.bare import msgspec_errors, pydantic_errors, signature_errors


class ProblemsPlugin(InitPlugin):
    """Answers what a Litestar application raises as problems, in the style of the `Problems` policy around it.

    Options:
        validation_status: 400 (default) or 422, as `Problems(validation_status=...)` says it.
    """

    __slots__ = ("validation_status",)

    def __init__(self, *, validation_status: Literal[400, 422] = 400) -> None:
        if validation_status not in (400, 422):
            raise ValueError(f"validation_status is 400 or 422, not {validation_status!r}")
        self.validation_status = validation_status

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        app_config.exception_handlers = {
            Problem: self._answer,
            HTTPException: self._answer,
            **app_config.exception_handlers,
        }
        return app_config

    def _answer(self, request: Request[Any, Any, Any], error: Any) -> Response[bytes]:
        problem = error if isinstance(error, Problem) else self._problem(error)
        ex = request.scope.get(SCOPE_KEY)
        if not isinstance(ex, Exchange):
            scope, receive = cast("tuple[Any, Any]", (request.scope, request.receive))
            ex = Exchange(scope, receive, SYSTEM_CLOCK, PLAIN, DEFAULT_STYLE)
        return _Answer(ex.style.render(problem, ex), without_body=ex.method == "HEAD")

    def _problem(self, error: HTTPException) -> Problem:
        headers: Mapping[str, str] = error.headers or {}
        if error.status_code == 500:
            return unhandled()
        if error.status_code == 400:
            given = error.extra if isinstance(error.extra, list) else []
            errors = signature_errors(given) or pydantic_errors(given, "body") or msgspec_errors(error.detail or "")
            if errors:
                return from_validation_errors(errors, self.validation_status)
        problem = from_http_error(error.status_code, error.detail or None, headers)
        if error.extra:
            problem.extensions = {**problem.extensions, "data": error.extra}
        return problem


class _Answer(Response[bytes]):
    """A reply as Litestar sends it: every header, also two of one name."""

    def __init__(self, reply: Reply, *, without_body: bool) -> None:
        super().__init__(reply.body, status_code=reply.status)
        self._reply = reply
        self._without_body = without_body

    def to_asgi_response(self, *args: Any, **options: Any) -> ASGIResponse:
        return ASGIResponse(
            body=b"" if self._without_body else self._reply.body,
            status_code=self._reply.status,
            headers=text_headers(self._reply),
            is_head_response=self._without_body,
        )

"""Answers 504 where the application takes too long to begin its response.

    Timeout(seconds=30, routes={"POST /v7/agents/{name}/run": 120})

    @policy(timeout=5)
    async def search() -> Results: ...

What it guarantees:

* The application is cancelled at the limit, with everything that it waits for; `finally` blocks run. What does not wait
  (a computation, code in a thread) is not interrupted, and is cancelled when it next waits.
* The limit ends with the first byte of the response: streams and server-sent events are never cut. With `whole=True` it
  holds until the application has returned, background tasks included; a response that has begun is then broken off.
* Only its own limit is answered: a `TimeoutError` of the application is the application's.
* A WebSocket has to be accepted within the limit; then it may last.

Place it inside `Problems`, and outside of whatever waits: stores that policies ask are inside the limit too. Time is
the event loop's, not the stack's clock. RFC 9110 section 15.6.5.
"""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from math import inf
from types import TracebackType
from typing import Annotated, Any, ClassVar

from anyio import CancelScope, current_time
from pydantic import Field

from sigil_policy.core.catalogue import http_problem
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class _LimitReachedError(TimeoutError):
    """Ours, and nobody else's."""


class _Limit(AbstractAsyncContextManager[None]):
    """The time that one exchange has."""

    def __init__(self, seconds: float) -> None:
        self.scope = CancelScope(deadline=current_time() + seconds)

    async def __aenter__(self) -> None:
        # In a context of its own: a timer of asyncio keeps the one it was made in, and so the exchange, until its time.
        Context().run(self.scope.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        answer = self.scope.__exit__(kind, error, trace)
        if self.scope.cancelled_caught:
            raise _LimitReachedError
        return answer


class Timeout(Policy):
    """The application begins its response in time, or is cancelled and answered for.

        Timeout(seconds=30, routes={"POST /v7/agents/{name}/run": 120, "GET /v7/export": None})

    Options:
        seconds: for every route without a limit of its own (default 30; None: no limit).
        routes: from route to its seconds, or to None for no limit (default: none).
        whole: until the application has returned, not until its response begins (default False).

    Answers 504 `SRV_504`. Endpoints may say `timeout` themselves; see `sigil_policy.core.marks`. Raises `ValueError`
    for what is no number of seconds above 0, and at most a day.
    """

    marks: ClassVar[frozenset[str]] = frozenset(("timeout",))

    seconds: Seconds | None = 30.0
    routes: Mapping[str, Seconds | None] = Field(default_factory=dict)
    whole: bool = False

    def rules(self) -> Mapping[str, float]:
        return {route: inf if seconds is None else seconds for route, seconds in self.routes.items()}

    def marked(self, marks: Marks, rule: Any, resolution: Resolution) -> Any:
        return marks.timeout if rule is None else rule

    def describe(self, operation: Operation, rule: float | None) -> None:
        if (rule or self.seconds or inf) < inf:
            operation.answers(http_problem(504))

    def around(self, ex: Exchange) -> _Limit | None:
        seconds: float | None = ex.rule(self) or self.seconds
        if seconds is None or seconds == inf:
            return None
        limit = _Limit(seconds)
        ex.keep(self, limit)
        return limit

    def on_response(self, ex: Exchange, head: Head) -> None:
        limit: _Limit | None = ex.note(self)
        if limit is not None and not self.whole:
            limit.scope.deadline = inf

    def on_error(self, ex: Exchange, error: Exception) -> Problem | None:
        if not isinstance(error, _LimitReachedError):
            return None
        return http_problem(504)("The request took too long")

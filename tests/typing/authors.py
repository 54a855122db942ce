"""What pyright (strict) must accept of people who write and mount policies, and what it must refuse."""

from collections.abc import Awaitable
from typing import assert_type

from starlette.applications import Starlette
from starlette.requests import Request

from sigil_policy import (
    Exchange,
    Head,
    Policy,
    PolicyStack,
    Principal,
    Problem,
    Problems,
    ProblemType,
    Reply,
    RequestID,
    TokenUsage,
    as_middleware,
    get_exchange,
    report_tokens,
)
from sigil_policy.middleware import ProblemsMiddleware

Busy = ProblemType(code="ORCH_002", title="OrchestratorBusyError", status=503)


class Greeting(Policy):
    name: str = "world"
    shouting: bool = False

    def on_request(self, ex: Exchange) -> Problem | None:
        return Busy(detail="come back later") if self.shouting else None

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"greeting", self.name.encode()))


class Waiting(Policy):
    seconds: float

    def on_request(self, ex: Exchange) -> Awaitable[Problem | Reply | None]:
        return self._wait(ex)

    async def _wait(self, ex: Exchange) -> Reply | None:
        return None


app = Starlette()
app.add_middleware(PolicyStack, policies=[RequestID(), Problems(validation_status=422), Greeting(name="moon")])
app.add_middleware(as_middleware(Greeting), name="moon")
app.add_middleware(ProblemsMiddleware, base_url="https://errors.example.com/")
PolicyStack(app, [Waiting(seconds=1.5)])


def facts(request: Request) -> None:
    ex = get_exchange(request)
    assert_type(ex[Principal], Principal)
    assert_type(ex.get(TokenUsage), TokenUsage | None)
    assert_type(report_tokens(request, input_tokens=3), TokenUsage)


Greeting("moon")  # pyright: ignore[reportCallIssue]
Greeting(nmae="moon")  # pyright: ignore[reportCallIssue]
Waiting()  # pyright: ignore[reportCallIssue]
Greeting().name = "sun"  # pyright: ignore[reportAttributeAccessIssue]
Problems(validation_status=418)  # pyright: ignore[reportArgumentType]
app.add_middleware(as_middleware(Greeting), nmae="moon")  # pyright: ignore[reportCallIssue]

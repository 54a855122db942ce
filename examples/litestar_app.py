"""The stack around Litestar. uvicorn examples.litestar_app:app"""

from collections.abc import AsyncIterator

from litestar import Litestar, get
from litestar.params import FromPath
from litestar.response import Stream

from examples.one_stack import POLICIES
from sigil_policy import PolicyStack
from sigil_policy.frameworks.litestar import ProblemsPlugin


@get("/")
async def hello() -> dict[str, str]:
    return {"hello": "world"}


@get("/reports/{number:int}")
async def report(number: FromPath[int]) -> dict[str, float]:
    return {"share": 100 / number}


@get("/stream")
async def stream() -> Stream:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"one ", b"two ", b"three"):
            yield part

    return Stream(parts)


service = Litestar([hello, report, stream], plugins=[ProblemsPlugin()], openapi_config=None, logging_config=None)
app = PolicyStack(service, POLICIES)

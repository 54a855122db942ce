"""The stack around Litestar. uvicorn examples.litestar_app:app"""

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
    return Stream(iter((b"one ", b"two ", b"three")))


service = Litestar([hello, report, stream], plugins=[ProblemsPlugin()], openapi_config=None, logging_config=None)
app = PolicyStack(service, POLICIES)

"""The stack around Quart. uvicorn examples.quart_app:app"""

from collections.abc import AsyncIterator

from quart import Quart

from examples.one_stack import POLICIES
from sigil_policy import PolicyStack

quart = Quart(__name__)


@quart.get("/")
async def hello() -> dict[str, str]:
    return {"hello": "world"}


@quart.get("/reports/<int:number>")
async def report(number: int) -> dict[str, float]:
    return {"share": 100 / number}


@quart.get("/stream")
async def stream() -> AsyncIterator[bytes]:
    for part in (b"one ", b"two ", b"three"):
        yield part


app = PolicyStack(quart, POLICIES)

"""The stack around BlackSheep. uvicorn examples.blacksheep_app:app"""

from collections.abc import AsyncIterator

from blacksheep import Application, Response, StreamedContent
from blacksheep.server.routing import Router

from examples.one_stack import POLICIES
from sigil_policy import PolicyStack

router = Router()


@router.get("/")
async def hello() -> dict[str, str]:
    return {"hello": "world"}


@router.get("/reports/{int:number}")
async def report(number: int) -> dict[str, float]:
    return {"share": 100 / number}


@router.get("/stream")
async def stream() -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"one ", b"two ", b"three"):
            yield part

    return Response(200, content=StreamedContent(b"text/plain", parts))


app = PolicyStack(Application(router=router), POLICIES)

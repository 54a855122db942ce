"""The stack around Falcon. uvicorn examples.falcon_app:app"""

from collections.abc import AsyncIterator

from falcon.asgi import App, Request, Response

from examples.one_stack import POLICIES
from sigil_policy import PolicyStack


class Hello:
    async def on_get(self, req: Request, resp: Response) -> None:
        resp.media = {"hello": "world"}


class Report:
    async def on_get(self, req: Request, resp: Response, number: int) -> None:
        resp.media = {"share": 100 / number}


class Stream:
    async def on_get(self, req: Request, resp: Response) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for part in (b"one ", b"two ", b"three"):
                yield part

        resp.stream = parts()


service = App()
for path, resource in {"/": Hello(), "/reports/{number:int}": Report(), "/stream": Stream()}.items():
    service.add_route(path, resource)

app = PolicyStack(service, POLICIES)

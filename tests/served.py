"""An application as it meets a server, in process or behind a real socket.

sent = await drive(served(app))
with on_uvicorn(app, http="h11") as port: ...
with held_port() as port: subprocess.Popen([..., "--port", str(port)])
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import uvicorn


@contextlib.contextmanager
def on_uvicorn(app: Any, **options: Any) -> Iterator[int]:
    """`app` on uvicorn, behind a real socket on this machine; its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical", **options))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port for a uvicorn that is started as a process, and for nobody else until the block ends: it is bound here,
    where nobody listens, and shared with who reuses addresses (SO_REUSEADDR), as asyncio's servers do."""
    with socket.socket() as holding:
        # First alone, so that it is a port that no other block holds.
        holding.bind(("127.0.0.1", 0))
        holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holding.getsockname()[1]


def served(app: Any) -> Any:
    """`app`, for which `receive` says that the client has gone once the response is complete: some frameworks wait for
    the end of the connection before they return."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        heard, complete = False, anyio.Event()

        async def hear() -> Any:
            nonlocal heard
            if not heard or scope["type"] == "websocket":
                heard = True
                return await receive()
            await complete.wait()
            return {"type": "http.disconnect"}

        async def say(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                complete.set()

        await app(scope, hear, say)

    return serve

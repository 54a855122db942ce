"""An application as it meets a server: some frameworks wait for the end of the connection before they return.

sent = await drive(served(app))
"""

from typing import Any

import anyio


def served(app: Any) -> Any:
    """`app`, for which `receive` says that the client has gone once the response is complete."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        heard, complete = False, anyio.Event()

        async def hear() -> Any:
            nonlocal heard
            if not heard:
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

"""No framework at all: the same policies around a bare ASGI callable.

uvicorn examples.plain_asgi:app
"""

from typing import Any

from sigil_policy import AccessLog, Conditional, PolicyStack, Problems, RateLimit, RequestID, report_tokens


async def hello(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers everything with a greeting, and says what it cost."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    report_tokens(scope, input_tokens=3, output_tokens=2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"Hello, world!"})


app = PolicyStack(hello, policies=[RequestID(), AccessLog(), Problems(), RateLimit(tokens={"/**": 5}), Conditional()])

"""What the whole stack adds to each message of a stream: fused in one pass, and as one stack per policy."""

from functools import partial
from typing import Any

from benchmarks.apart import measure_apart
from benchmarks.stack import policies, requests
from benchmarks.timing import App, Block, Loop, Message, rounds_for, scopes
from sigil_policy.core.stack import PolicyStack

MESSAGES = 200
_HEAD = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]


def streaming(messages: int) -> App:
    """An application that answers with a stream of events."""

    async def app(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEAD})
        for _ in range(messages - 1):
            await send({"type": "http.response.body", "body": b"data: token\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


def nested(app: App) -> App:
    """One stack per policy, with something between them that keeps them from fusing."""
    for policy in reversed(policies()):
        app = PolicyStack(_opaque(app), [policy])
    return app


def _opaque(app: App) -> App:
    async def call(scope: Message, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return call


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `fused_us` and `nested_us`, added per message of a stream of 200, the cost of the exchange as a whole
    included; `fused_more_us` and `nested_more_us`, what one more message adds; `bare_us`, a message without a stack."""
    requests()
    names = [f"{kind}{size}" for kind in ("bare", "fused", "nested") for size in ("", " 1")]
    samples = measure_apart(partial(_block, smoke=smoke), names, rounds=rounds_for(smoke, 40))
    whole = {kind: samples.added(kind, over="bare") for kind in ("fused", "nested")}
    fixed = {kind: samples.added(f"{kind} 1", over="bare 1") for kind in ("fused", "nested")}
    return {
        **{f"{kind}_us": whole[kind] / MESSAGES for kind in whole},
        **{f"{kind}_more_us": (whole[kind] - fixed[kind]) / (MESSAGES - 1) for kind in whole},
        "bare_us": samples.cost("bare") / MESSAGES,
    }


def _block(name: str, *, smoke: bool) -> Block:
    """The block of one variant, in the process that calls this."""
    kind, _, one = name.partition(" ")
    app = streaming(1 if one else MESSAGES)
    if kind == "fused":
        app = PolicyStack(app, policies())
    elif kind == "nested":
        app = nested(app)
    return Loop().requests(app, scopes(requests()[:50]), count=2 if smoke else 50)

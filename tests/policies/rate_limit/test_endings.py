"""However exchanges end, what was produced is charged, to the token: in process, and on a real Valkey."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sigil_policy.core.exchange import report_tokens
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import RateLimit, Tier, TokenRule
from sigil_policy.stores.memory import FixedWindows
from sigil_policy.stores.redis import RedisLimits
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.testing import drive
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

ENDINGS = {"in process": 2_000, "valkey": 10_000} if os.environ.get("CI") == "true" else {}
BUDGET = 1_000_000_000
EVENT = b"data: x\n\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["in process", "valkey"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "in process":
        yield FixedWindows()
        return
    with Server() as server:
        redis = RedisLimits(RedisLink(server.url, deadline=60, connect_timeout=60))
        yield redis
        await redis.aclose()


class Ending:
    """One exchange that ends at random, and what it produced until then."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.kind = chance.choice(["ok", "error", "timeout", "cancel", "disconnect", "refused"])
        self.events = chance.randrange(40)
        self.stop = chance.randrange(40)
        self.reports = chance.random() < 0.5
        self.late = chance.random() < 0.5
        self.reached = asyncio.Event()
        self.produced = 0
        self.sent = 0
        self.delivered = 0

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if self.kind == "refused":
            await send({"type": "http.response.start", "status": 409, "headers": []})
            await send({"type": "http.response.body", "body": b"no"})
            return
        if self.kind == "error" and not self.stop:
            raise RuntimeError("before anything")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(self.events):
            if number == self.stop:
                if self.kind == "error":
                    raise RuntimeError("in mid-stream")
                if self.kind == "timeout":
                    raise TimeoutError
                if self.kind == "cancel":
                    self.reached.set()
                    await asyncio.sleep(3_600)
            tokens = 1 + number % 3 if self.reports else 1
            if self.reports:
                report_tokens(scope, output_tokens=tokens)
            self.produced += tokens
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            if number % 7 == 0:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    def hear(self, message: Any) -> None:
        self.sent += 1
        if self.kind == "disconnect" and self.sent > self.stop:
            raise OSError("gone")
        self.delivered += len(message.get("body", b""))

    @property
    def charged(self) -> int:
        """What is to be charged: nothing if the client left before the first byte, unless it was reported."""
        return self.produced if self.reports or self.delivered else 0


async def run(store: Any, endings: list[Ending]) -> int:
    """Run all, a hundred at a time, and return what was charged for them."""
    limit = RateLimit(
        tiers={"free": Tier(requests="999999999/calendar month", tokens=f"{BUDGET}/calendar month")},
        tokens={"/**": TokenRule(estimate=20)},
        store=store,
        exempt=["/exempt"],
    )
    waiting = iter(endings)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await scope["ending"].app(scope, receive, send)

    stack = PolicyStack(app, policies=[limit], finish_timeout=60)

    async def worker() -> None:
        for ending in waiting:
            exchange = asyncio.create_task(
                drive(stack, "POST", "/run", scope={"ending": ending}, on_send=ending.hear, raise_errors=False)
            )
            if ending.kind == "cancel":
                # Half of them wherever they are, the others where they stop by themselves, if they come there.
                if ending.late:
                    exchange.add_done_callback(lambda _, ending=ending: ending.reached.set())
                    await ending.reached.wait()
                else:
                    await asyncio.sleep(random.random() * 0.01)
                exchange.cancel()
            await asyncio.gather(exchange, return_exceptions=True)

    await asyncio.gather(*(worker() for _ in range(100)))

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    # Once to be behind the replies that nobody waited for any more, and what they gave back.
    for _ in range(2):
        sent = await drive(PolicyStack(nothing, policies=[limit]), "POST", "/run")
    return BUDGET - int(sent.header("x-tokens-remaining") or 0) - 20


async def test_whatever_was_produced_is_charged_to_the_token(store: Any) -> None:
    count = ENDINGS.get("valkey" if store.remote else "in process", 1_000)
    endings = [Ending(seed) for seed in range(count)]
    charged = await run(store, endings)
    assert charged == sum(ending.charged for ending in endings)
    kinds = {ending.kind for ending in endings if ending.produced or ending.kind == "refused"}
    assert kinds == {"ok", "error", "timeout", "cancel", "disconnect", "refused"}

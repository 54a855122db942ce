"""RateLimit on a real Valkey: one limit over stacks that know nothing of each other, and a light touch on the loop."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import http_sf
import pytest

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.concurrency import ConcurrencyLimit
from sigil_policy.policies.rate_limit import Level, RateLimit, Tier, by_claim
from sigil_policy.stores.redis import RedisLimits, RedisSlots
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.urls import limit_store, slot_store
from sigil_policy.testing import Sent, drive
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def url() -> Any:
    with Server() as server:
        yield f"{server.url}/3"


@pytest.fixture
async def store(url: str) -> AsyncIterator[RedisLimits]:
    store = RedisLimits(RedisLink(url, deadline=60, connect_timeout=60))
    yield store
    await store.aclose()


class Caller(Policy):
    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        subject, _, organisation = ex.headers[b"x-caller"].decode().partition("@")
        ex.authenticate(Principal(subject, claims={"org": organisation}))


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        await send({"type": "websocket.close", "code": 1000})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"usage": {"total_tokens": 30}}'})


def remaining(sent: Sent) -> dict[str, int]:
    found = http_sf.parse((sent.header("ratelimit") or "").encode(), tltype="list")
    return {name: row["r"] for name, row in found}


def limited(store: Any, **options: Any) -> PolicyStack:
    options.setdefault("tiers", {"free": Tier(requests="1000/day", tokens="5000/day")})
    return PolicyStack(hello, policies=[Caller(), RateLimit(store=store, tokens={"/run": 100}, **options)])


async def test_two_services_share_the_limits_of_a_caller(store: RedisLimits) -> None:
    one, other = limited(store), limited(store)
    caller = {"x-caller": "ada"}
    assert remaining(await drive(one, "POST", "/run", headers=caller)) == {"day": 999, "tokens-day": 4_970}
    assert remaining(await drive(other, headers=caller)) == {"day": 998, "tokens-day": 4_970}


async def test_levels_are_shared_over_their_callers(store: RedisLimits) -> None:
    levels = [Level("organisation", key=by_claim("org"), limits=Tier(requests="3/day", tokens="90/calendar month"))]
    app = limited(store, levels=levels)
    sent = [await drive(app, headers={"x-caller": f"user{number}@acme"}) for number in range(4)]
    assert [answer.status for answer in sent] == [200, 200, 200, 429]
    assert sent[3].json()["violated_policies"] == ["organisation-day"]
    other = await drive(app, "POST", "/run", headers={"x-caller": "eve@other"})
    assert other.status == 422  # 100 tokens never fit into 90


async def test_a_websocket_and_a_head_request_count(store: RedisLimits) -> None:
    app = limited(store)
    caller = {"x-caller": "grace"}
    await drive(app, "HEAD", headers=caller)
    await drive(app, kind="websocket", headers=caller)
    assert remaining(await drive(app, headers=caller))["day"] == 997


async def test_no_task_is_made_for_a_request(store: RedisLimits, url: str) -> None:
    slots = ConcurrencyLimit(limits=5, store=RedisSlots(store.link))
    app = PolicyStack(
        hello,
        policies=[Caller(), slots, RateLimit(store=store, tiers={"free": Tier(tokens=9_000)}, tokens={"/**": 10})],
    )
    caller = {"x-caller": "lin"}
    assert (await drive(app, "POST", "/run", headers=caller)).status == 200
    loop = asyncio.get_running_loop()
    made = []

    def factory(loop: Any, work: Any, **options: Any) -> Any:
        made.append(work)
        return asyncio.Task(work, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        for _ in range(50):
            assert (await drive(app, "POST", "/run", headers=caller)).status == 200
    finally:
        loop.set_task_factory(None)
    assert made == []
    await app.aclose()


async def test_policies_with_one_url_share_one_store(url: str) -> None:
    assert RateLimit(store=url).counters is RateLimit(store=url).counters is limit_store(url)
    assert slot_store(url).link is limit_store(url).link  # type: ignore[attr-defined]


async def test_no_password_is_shown() -> None:
    for made in (
        RateLimit(store="redis://user:hunter2@localhost:1"), ConcurrencyLimit(limits=1, store="redis://:hunter2@localhost:1")
    ):  # fmt: skip
        assert "hunter2" not in repr(made)
        assert "hunter2" not in repr(PolicyStack(hello, policies=[made]))


@pytest.mark.parametrize("url", ["http://localhost", "redis://local host", "limits+nothing://x", "embedded", ""])
async def test_a_url_that_names_no_store_fails_at_construction(url: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)url|scheme|storage|://"):
        RateLimit(store=url)

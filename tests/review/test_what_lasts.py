"""What outlives one exchange: counters under threads, stores that fail, reports that are absurd, late tasks."""

import sys
import threading
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse

from sigil_policy import PolicyStack, Problems, RateLimit, Tier, TokenRule, get_exchange, memory_limits, report_tokens
from sigil_policy.stores.limits import Algorithm, Lease, Plan, Window
from sigil_policy.testing import FrozenClock, drive

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
def test_threads_share_a_store_without_letting_more_through(algorithm: Algorithm) -> None:
    store = memory_limits(algorithm)
    plan = Plan(name="one", windows=(Window(1_000, 3_600),), algorithm=algorithm)
    store.prepare(plan)
    admitted, failed = [], []
    interval = sys.getswitchinterval()

    def hammer(number: int) -> None:
        try:
            for hit in range(600):
                key = "shared" if hit % 2 else f"{number} {hit}"
                if store.admit(key, plan, 1, None, 1_700_000_000.0).admitted and hit % 2:
                    admitted.append(1)
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=hammer, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []
    assert len(admitted) == 1_000


def test_an_absurd_report_locks_nobody_out_for_ever() -> None:
    store = memory_limits("gcra")
    plan = Plan(name="one", windows=(Window(1_000, 60, "tokens", "tokens"),), algorithm="gcra")
    store.prepare(plan)
    lease = store.admit("a", plan, 1, (10,), 1_700_000_000.0).lease
    assert isinstance(lease, Lease)
    store.settle(lease, (10**30,), 1_700_000_000.0)
    refused = store.admit("a", plan, 1, (10,), 1_700_000_000.0)
    assert not refused.admitted
    assert refused.retry_after <= 120


@pytest.mark.parametrize("count", [1.5, float("nan"), True, "3", None])
async def test_a_token_count_is_an_int(count: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(TypeError, match="a token count is an int"):
            report_tokens(scope, input_tokens=count)

    await drive(PolicyStack(app, [Problems()]))


@pytest.mark.parametrize("count", [-1, 10**15, 10**5000], ids=["negative", "over", "absurd"])
async def test_a_token_count_is_bounded(count: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(ValueError, match="a token count cannot be negative"):
            report_tokens(scope, input_tokens=count)

    await drive(PolicyStack(app, [Problems()]))


class FailingStore:
    """Far away: admits everything, and cannot settle."""

    remote = True
    algorithms = frozenset(("fixed",))

    def __init__(self) -> None:
        self.near = memory_limits("fixed")

    def prepare(self, plan: Plan) -> None:
        self.near.prepare(plan)

    async def admit(self, *args: Any) -> Any:
        return self.near.admit(*args)

    async def settle(self, *args: Any) -> Any:
        raise OSError("hunter2")

    extend = charge = settle


async def test_a_store_that_cannot_settle_takes_no_response_away() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"usage": {"total_tokens": 5}}'})

    limit = RateLimit(store=FailingStore(), tokens={"/**": TokenRule(estimate=10)})
    sent = await drive(PolicyStack(app, [Problems(), limit], clock=FrozenClock()))
    assert (sent.status, sent.json()) == (200, {"usage": {"total_tokens": 5}})


async def test_a_key_of_ones_own_names_no_foreign_bucket() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    store = memory_limits("fixed")
    tiers = {"free": Tier(requests="2/minute")}
    by_header = RateLimit(tiers=tiers, store=store, key=lambda ex: ex.headers[b"x-team"].decode())
    by_client = RateLimit(tiers=tiers, store=store)
    clock = FrozenClock()
    for _ in range(2):
        await drive(PolicyStack(app, [by_client], clock=clock))
    for name in ("ip4-203.0.113.7", "203.0.113.7", "overflow anonymous"):
        assert (await drive(PolicyStack(app, [by_header], clock=clock), headers={"x-team": name})).status == 200


async def test_what_happens_to_an_exchange_that_is_over_stays_with_it() -> None:
    kept = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kept.append(get_exchange(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    stack = PolicyStack(app, [Problems()])
    await drive(stack)
    await drive(stack)
    kept[0].anonymous()
    assert "user" not in kept[1].scope


async def test_background_tasks_of_the_applications_500_run_after_its_answer() -> None:
    app = FastAPI()
    order: list[str] = []

    @app.get("/")
    def fail() -> None:
        raise ValueError("hunter2")

    async def own(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({}, 500, background=BackgroundTask(order.append, "task"))

    app.add_exception_handler(Exception, own)
    app.add_middleware(PolicyStack, policies=[Problems()])

    def saw(message: Any) -> None:
        order.append(message["type"])

    await drive(app, on_send=saw, raise_errors=False)
    assert order == ["http.response.start", "http.response.body", "task"]

"""What befalls a server befalls no request: none waits longer, none ends in a 500, and the limit holds."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit, Tier
from sigil_policy.stores.redis import RedisLimits
from sigil_policy.testing import Sent, drive
from tests.stores.redis.proxy import Lag, Proxy
from tests.stores.redis.servers import Server
from tests.stores.redis.steady import steady

pytestmark = pytest.mark.anyio

DEADLINE, SLACK = 0.05, 0.02
LIMIT, BUDGET, REPLICAS = 20, 4_000, 4


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
async def proxy(running: Server) -> AsyncIterator[Proxy]:
    running.call("FLUSHALL")
    async with Proxy(running.port) as proxy:
        yield proxy


# --- what befalls it --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing(server: Server, proxy: Proxy) -> Iterator[None]:
    proxy.refuse()
    yield


@contextlib.contextmanager
def out_of_memory(server: Server, proxy: Proxy) -> Iterator[None]:
    server.call("CONFIG", "SET", "maxmemory", "1")
    try:
        yield
    finally:
        server.call("CONFIG", "SET", "maxmemory", "0")


@contextlib.contextmanager
def read_only(server: Server, proxy: Proxy) -> Iterator[None]:
    server.call("REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        server.call("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def without_its_scripts(server: Server, proxy: Proxy) -> Iterator[None]:
    server.call("SCRIPT", "FLUSH")
    yield


def network(mode: Any) -> Callable[[Server, Proxy], Any]:
    @contextlib.contextmanager
    def befall(server: Server, proxy: Proxy) -> Iterator[None]:
        proxy.mode = mode
        if mode == "flap":
            proxy.cut_off()
        yield
        proxy.mode = "pass"

    befall.__name__ = mode
    return befall


FAULTS = [
    refusing, network("hang"), network("slow"), network("cut"), network("flap"), without_its_scripts, read_only,
    out_of_memory,
]  # fmt: skip


class Service:
    """One process of a service that has this limit."""

    def __init__(self, url: str, on_store_loss: Any) -> None:
        self.store = RedisLimits(url, deadline=DEADLINE)
        self.ran = 0
        self.waits: list[float] = []
        self.statuses: list[int] = []
        self.app = PolicyStack(
            self._answer,
            policies=[
                Problems(),
                RateLimit(
                    store=self.store,
                    tiers={"free": Tier(requests=f"{LIMIT}/day", tokens=f"{BUDGET}/day")},
                    tokens={"/run": 100},
                    on_store_loss=on_store_loss,
                    expected_replicas=REPLICAS if on_store_loss == "local" else None,
                ),
            ],
        )

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.ran += 1
        self.waits.append(time.monotonic() - float(dict(scope["headers"])[b"x-began"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"usage": {"total_tokens": 30}}'})

    async def ask(self) -> Sent:
        began = time.monotonic()
        sent = await drive(self.app, "POST", "/run", headers={"x-began": repr(began)})
        if sent.status != 200:
            # (What runs is not waited for; and it is settled when its answer has left.)
            self.waits.append(time.monotonic() - began)
        if sent.status == 503:
            assert int(sent.header("retry-after") or 0) >= 1
        self.statuses.append(sent.status)
        return sent

    async def well_again(self) -> None:
        end = time.monotonic() + 30
        while not self.store.link.available or (await self.ask()).status == 503:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("on_store_loss", ["closed", "open", "local"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@steady()
async def test_none_waits_longer_none_is_a_500_and_the_limit_holds(
    fault: Callable[[Server, Proxy], Any], on_store_loss: str, running: Server, proxy: Proxy
) -> None:
    service = Service(proxy.url, on_store_loss)
    # On a machine that is busy the first attempt may be too slow; that is not what is tested.
    await service.well_again()
    service.waits.clear()
    with capture_logs() as logs:
        async with Lag() as lag:
            before = len(service.statuses)
            with fault(running, proxy):
                end = time.monotonic() + 0.2
                while time.monotonic() < end:
                    await asyncio.gather(*[service.ask() for _ in range(4)])
                    await asyncio.sleep(0.01)
            during = set(service.statuses[before:])
            assert max(service.waits) <= DEADLINE + SLACK + 2 * lag.worst, (max(service.waits), lag.worst)
        if not proxy.listening:
            await proxy.listen()
        await service.well_again()
        for _ in range(LIMIT + 10):
            last = await service.ask()
    lost = fault is not without_its_scripts
    assert during <= {"closed": {200, 429, 503}, "open": {200, 429}, "local": {200, 429}}[on_store_loss]
    assert (503 in during) == (lost and on_store_loss == "closed")
    assert last.status == 429, "the limit is there again"
    if on_store_loss == "closed" or not lost:
        assert service.ran <= LIMIT
    elif on_store_loss == "local":
        assert service.ran <= LIMIT + LIMIT // REPLICAS
    # One line for the loss and one for the return of it, not one for each request.
    assert len(logs) <= 12, logs
    await service.app.aclose()
    await service.store.aclose()

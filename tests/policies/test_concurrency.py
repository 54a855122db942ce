"""ConcurrencyLimit: places that are taken before, and given back once, however an exchange ends."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import http_sf
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sigil_policy.core.catalogue import SCOPE_INSUFFICIENT
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal, Public
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.concurrency import ConcurrencyLimit, by_address
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.slots import Claim, MemorySlots, Refusal, Slot
from sigil_policy.testing import FrozenClock, Sent, drive

pytestmark = pytest.mark.anyio

ADDRESS = " address ip4-203.0.113.7"


class Caller(Policy):
    """Authenticates by a header, as an auth policy of the test."""

    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        name = ex.headers.get(b"x-caller")
        if name is not None:
            subject, _, tier = name.decode().partition("@")
            ex.authenticate(Principal(subject, tier=tier or None))


class Open(Policy):
    """Lists everything under /public as public."""

    gives = (Public,)

    def on_request(self, ex: Exchange) -> None:
        if ex.path.startswith("/public"):
            ex.give(Public("/public/**"))


class Deny(Policy):
    def on_request(self, ex: Exchange) -> Problem:
        return SCOPE_INSUFFICIENT("no")


class Watch(Policy):
    """Writes down what is in flight as each exchange passes, on the way in and at the end."""

    store: Any
    key: str = ADDRESS
    seen: Any

    def on_request(self, ex: Exchange) -> None:
        self.seen.append(self.store.in_flight(self.key))

    def on_finish(self, ex: Exchange) -> None:
        self.seen.append(self.store.in_flight(self.key))


class Later:
    """Slots on another machine, as far as a policy can see: every answer takes a while, and the store may be away."""

    remote = True

    def __init__(self) -> None:
        self.here = MemorySlots()
        self.away = False
        self.at_once = self.forgets = False
        self.given_back = 0
        self.held = 0

    def in_flight(self, key: str) -> int:
        return self.here.in_flight(key)

    def take(self, claims: tuple[Claim, ...], ttl: float, now: float) -> Awaitable[Slot | Refusal]:
        if self.away and self.at_once:
            raise StoreUnavailableError("away", 2.5)
        return self._take(claims, ttl, now)

    async def _take(self, claims: tuple[Claim, ...], ttl: float, now: float) -> Slot | Refusal:
        await anyio.lowlevel.checkpoint()
        if self.away:
            raise StoreUnavailableError("away", 2.5)
        return self.here.take(claims, ttl, now)

    def hold(self, claims: tuple[Claim, ...], ttl: float) -> Slot:
        self.held += 1
        return self.here.hold(claims, ttl)

    async def give_back(self, slot: Slot) -> None:
        await anyio.lowlevel.checkpoint()
        self.given_back += 1
        if self.away and self.forgets:
            raise StoreUnavailableError("away")
        self.here.give_back(slot)


class Gate:
    """An application that keeps every exchange until it is opened."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.opened = anyio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.opened.wait()
        finally:
            self.inside -= 1
        await answering()(scope, receive, send)


def answering(
    status: int = 200, body: bytes = b"{}", headers: Any = ((b"content-type", b"application/json"),)
) -> Callable[[Any, Any, Any], Awaitable[None]]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "headers": []})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def stack(*policies: Policy, app: Any = None) -> PolicyStack:
    return PolicyStack(app or answering(), policies=policies, clock=FrozenClock())


def state(sent: Sent) -> dict[str, dict[str, Any]]:
    value = sent.header("ratelimit")
    assert value is not None
    parsed = http_sf.parse(value.encode(), tltype="list")
    assert http_sf.ser(parsed) == value
    return dict(parsed)


def policies(sent: Sent) -> dict[str, dict[str, Any]]:
    value = sent.header("ratelimit-policy")
    assert value is not None
    parsed = http_sf.parse(value.encode(), tltype="list")
    assert http_sf.ser(parsed) == value
    return dict(parsed)


async def settle(until: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not until():
            await anyio.lowlevel.checkpoint()


async def crowd(app: Any, gate: Gate, size: int, **options: Any) -> list[Sent]:
    """So many exchanges at once; those that get in end when all others were refused."""
    answers: list[Sent] = []

    async def one() -> None:
        answers.append(await drive(app, **options))

    async with anyio.create_task_group() as tasks:
        for _ in range(size):
            tasks.start_soon(one)
        await settle(lambda: len(answers) + gate.inside == size)
        gate.opened.set()
    return answers


# --- how many, and what it says --------------------------------------------------------------------------------------


async def test_a_caller_has_no_more_in_flight_than_its_limit() -> None:
    gate = Gate()
    answers = await crowd(stack(ConcurrencyLimit(limits=3), app=gate), gate, 10)
    assert sorted(sent.status for sent in answers) == [200] * 3 + [429] * 7
    assert gate.most == 3


async def test_places_come_free_when_exchanges_end() -> None:
    app = stack(ConcurrencyLimit(limits=1))
    for _ in range(5):
        assert (await drive(app)).status == 200


async def test_the_fields_say_the_limit_and_what_is_left() -> None:
    """RL-01, RL-04, RL-09, RL-11, RL-13: the unit is registered, and there is no window."""
    sent = await drive(stack(ConcurrencyLimit(limits=3)))
    assert sent.header("ratelimit-policy") == '"concurrency";q=3;qu="concurrent-requests"'
    assert sent.header("ratelimit") == '"concurrency";r=2'
    assert state(sent).keys() == policies(sent).keys()
    assert sent.header("retry-after") is None
    assert sent.header("x-ratelimit-limit") is None
    app = stack(ConcurrencyLimit(limits=3, routes={"GET /": 7}, name="edge"))
    sent = await drive(app)
    assert policies(sent) == {
        "edge-concurrency": {"q": 3, "qu": "concurrent-requests"},
        "edge-route-concurrency": {"q": 7, "qu": "concurrent-requests"},
    }
    assert state(sent) == {"edge-concurrency": {"r": 2}, "edge-route-concurrency": {"r": 6}}


async def test_a_refusal_says_which_limit_and_when_to_ask_again() -> None:
    gate = Gate()
    app = stack(ConcurrencyLimit(limits=9, routes={"/": 2}), app=gate)
    refused = [sent for sent in await crowd(app, gate, 3) if sent.status == 429]
    assert len(refused) == 1
    sent = refused[0]
    assert sent.header("retry-after") == "1"
    assert sent.header("cache-control") == "no-store"
    assert state(sent) == {"concurrency": {"r": 7}, "route-concurrency": {"r": 0}}
    body = sent.json()
    assert (body["status"], body["error_code"], body["title"]) == (429, "RATE_002", "ConcurrencyLimitExceededError")
    assert body["detail"] == (
        "At most 2 requests on this route may be in flight at the same time; try again when one has ended."
    )
    assert (body["limit"], body["unit"], body["retry_after"]) == (2, "concurrent-requests", 1)
    assert body["violated_policies"] == ["route-concurrency"]
    assert set(body["violated_policies"]) <= set(policies(sent))


async def test_a_refusal_names_every_limit_that_is_reached() -> None:
    gate = Gate()
    app = stack(ConcurrencyLimit(limits=1, routes={"/": 1}, retry_after=5), app=gate)
    (body,) = [sent.json() for sent in await crowd(app, gate, 2) if sent.status == 429]
    assert body["violated_policies"] == ["concurrency", "route-concurrency"]
    assert "requests of one caller" in body["detail"]
    assert body["retry_after"] == 5


async def test_rl_09_what_is_left_is_never_negative() -> None:
    """More may be in flight than the limit allows: others admitted it with a greater one."""
    store = MemorySlots()
    for _ in range(5):
        store.take((Claim(ADDRESS, 5),), 15.0, 0.0)
    sent = await drive(stack(ConcurrencyLimit(limits=2, store=store)))
    assert sent.status == 429
    assert state(sent) == {"concurrency": {"r": 0}}


async def test_without_a_draft_there_are_no_fields() -> None:
    gate = Gate()
    app = stack(ConcurrencyLimit(limits=1, draft=None), app=gate)
    for sent in await crowd(app, gate, 2):
        assert sent.header("ratelimit") is None
        assert sent.header("ratelimit-policy") is None
        assert sent.header("retry-after") == ("1" if sent.status == 429 else None)


# --- whose places ----------------------------------------------------------------------------------------------------


async def test_each_tier_has_its_limit() -> None:
    app = stack(Caller(), ConcurrencyLimit(limits={"free": 2, "pro": 20, "internal": None}, anonymous_tier="pro"))
    limits = {
        "alice": 2,
        "bob@free": 2,
        "carol@pro": 20,
        None: 20,
    }
    for caller, limit in limits.items():
        sent = await drive(app, headers={} if caller is None else {"x-caller": caller})
        assert policies(sent)["concurrency"]["q"] == limit
    sent = await drive(app, headers={"x-caller": "dave@internal"})
    assert sent.status == 200
    assert sent.header("ratelimit") is None


async def test_an_unknown_tier_is_the_default_one_and_is_logged_once() -> None:
    app = stack(Caller(), ConcurrencyLimit(limits={"free": 2, "pro": 20}, default_tier="pro"))
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            sent = await drive(app, headers={"x-caller": "alice@gold"})
            assert policies(sent)["concurrency"]["q"] == 20
    assert [(line["event"], line["tier"], line["used"]) for line in logs] == [
        ("concurrency_tier_unknown", "gold", "pro")
    ]


async def test_callers_do_not_take_each_others_places() -> None:
    gate = Gate()
    app = stack(Caller(), ConcurrencyLimit(limits=1), app=gate)
    callers: list[dict[str, Any]] = [
        {"headers": {"x-caller": "alice"}},
        {"headers": {"x-caller": "bob"}},
        {"client": ("203.0.113.8", 1)},
        {"client": ("203.0.113.9", 1)},
        {"client": ("2001:db8:1:2::1", 1)},
        {"client": ("2001:db8:1:3::1", 1)},
        {"client": None},
    ]
    async with anyio.create_task_group() as tasks:
        for caller in callers:
            tasks.start_soon(partial(drive, app, **caller))
        await settle(lambda: gate.inside == len(callers))
        for caller in callers:
            assert (await drive(app, **caller)).status == 429
        assert (await drive(app, client=("2001:db8:1:2:ffff::9", 1))).status == 429, "the same /64"
        gate.opened.set()


@pytest.mark.parametrize(
    ("key", "caller"),
    [
        (lambda ex: "203.0.113.7", ADDRESS),
        (lambda ex: "ip4-203.0.113.7", ADDRESS),
        (lambda ex: "bearer:0::alice", " caller= bearer:0::alice"),
        (lambda ex: "x" * 1_000, " key= " + "x" * 1_000),
        (lambda ex: "\udcff", " caller= \udcff"),
    ],
    ids=["address", "address key", "principal", "long", "surrogate"],
)
async def test_a_key_of_ones_own_is_no_other_kinds_and_bounded(key: Any, caller: str) -> None:
    store = MemorySlots()
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(store._in_flight)
        await answering()(scope, receive, send)

    assert (await drive(stack(ConcurrencyLimit(limits=1, key=key, store=store), app=app))).status == 200
    assert len(seen) == 1
    assert seen[0] != caller
    assert len(seen[0]) < 300


async def test_the_address_is_the_clients_behind_trusted_proxies_only() -> None:
    store = MemorySlots()
    policy = ConcurrencyLimit(limits=1, key=by_address, trusted_proxies=["10.0.0.0/8", "unix"], store=store)
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(store._in_flight)
        await answering()(scope, receive, send)

    forwarded = {"x-forwarded-for": "198.51.100.9"}
    for client in (("10.0.0.1", 1), ("203.0.113.7", 1), None):
        await drive(stack(policy, app=app), client=client, headers=forwarded)
    long = {"x-forwarded-for": ", ".join(["192.0.2.1"] * 100)}
    await drive(stack(policy, app=app), client=("10.0.0.1", 1), headers=long)
    assert [key.rpartition("-")[2] for key in seen] == ["198.51.100.9", "203.0.113.7", "198.51.100.9", "192.0.2.1"]


async def test_by_address_may_stand_outside_the_authentication() -> None:
    stack(ConcurrencyLimit(limits=5, key=by_address), Caller())
    with pytest.raises(PolicyOrderError, match="list Caller before ConcurrencyLimit"):
        stack(ConcurrencyLimit(limits=5), Caller())
    with pytest.raises(PolicyOrderError, match="list Caller before ConcurrencyLimit"):
        stack(ConcurrencyLimit(limits={"free": 5}, key=by_address), Caller())


# --- routes ----------------------------------------------------------------------------------------------------------


async def test_a_route_is_one_pool_for_all_callers_and_all_that_it_covers() -> None:
    gate = Gate()
    app = stack(Caller(), ConcurrencyLimit(routes={"POST /agents/{name}/run": 2, "/jobs/**": 1}), app=gate)
    async with anyio.create_task_group() as tasks:
        for name in ("ada", "bob"):
            tasks.start_soon(partial(drive, app, "POST", f"/agents/{name}/run", headers={"x-caller": name}))
        tasks.start_soon(partial(drive, app, "PUT", "/jobs/1"))
        await settle(lambda: gate.inside == 3)
        sent = await drive(app, "POST", "/agents/eve/run", headers={"x-caller": "eve"})
        assert sent.status == 429
        assert state(sent) == {"route-concurrency": {"r": 0}}
        assert (await drive(app, "DELETE", "/jobs/2/logs")).status == 429
        gate.opened.set()
    unlimited = await drive(app, "GET", "/agents/ada/run")
    assert unlimited.status == 200
    assert unlimited.header("ratelimit") is None


async def test_what_a_full_route_refuses_takes_no_place_of_the_caller() -> None:
    gate = Gate()
    store = MemorySlots()
    app = stack(Caller(), ConcurrencyLimit(limits=2, routes={"/run": 1}, store=store), app=gate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(drive, app, path="/run", headers={"x-caller": "alice"}))
        await settle(lambda: gate.inside == 1)
        for _ in range(5):
            sent = await drive(app, path="/run", headers={"x-caller": "bob"})
            assert sent.json()["violated_policies"] == ["route-concurrency"]
        assert store.in_flight(" caller= bearer:0::bob") == 0
        assert store.in_flight(" route /run") == 1
        gate.opened.set()
    assert len(store) == 0


async def test_exempt_and_public_routes_and_preflights_take_no_place() -> None:
    store = MemorySlots()
    seen: list[int] = []
    policy = ConcurrencyLimit(limits=1, routes={"/health/**": 1}, exempt=["GET /health"], store=store)
    app = stack(Open(), policy, Watch(store=store, seen=seen))
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answers = [
        await drive(app, "GET", "/health"),
        await drive(app, "HEAD", "/health"),
        await drive(app, "GET", "/public/x"),
        await drive(app, "OPTIONS", "/x", headers=preflight),
    ]
    assert seen == [0] * 8
    assert all(sent.header("ratelimit") is None for sent in answers)
    del seen[:]
    await drive(app, "OPTIONS", "/x", headers={"origin": "https://a.example"})
    await drive(app, "POST", "/health")
    assert seen == [1] * 4


# --- beside other fields -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False], ids=["outside RateLimit", "inside RateLimit"])
async def test_members_of_other_policies_are_kept(outside: bool) -> None:
    ours, theirs = ConcurrencyLimit(limits=3), RateLimit(tiers={"free": "20/minute"})
    sent = await drive(stack(*((ours, theirs) if outside else (theirs, ours))))
    assert policies(sent) == {
        "concurrency": {"q": 3, "qu": "concurrent-requests"},
        "minute": {"q": 20, "w": 60},
    }
    assert state(sent)["concurrency"] == {"r": 2}
    assert state(sent)["minute"]["r"] == 19
    assert sent.header("x-ratelimit-limit") == "20"


async def test_what_is_refused_uses_up_no_quota_of_a_rate_limit_inside() -> None:
    gate = Gate()
    app = stack(ConcurrencyLimit(limits=1), RateLimit(tiers={"free": "20/minute"}), app=gate)
    await crowd(app, gate, 10)
    assert state(await drive(app))["minute"]["r"] == 18


async def test_no_name_occurs_twice() -> None:
    app = answering(
        headers=[
            (b"ratelimit-policy", b'"concurrency";q=5'),
            (b"RateLimit-Policy", b'"concurrency-2";q=6;w=1'),
            (b"ratelimit", b'"concurrency";r=5, "concurrency-2";r=6'),
        ]
    )
    sent = await drive(stack(ConcurrencyLimit(limits=3), app=app))
    assert policies(sent) == {
        "concurrency": {"q": 5},
        "concurrency-2": {"q": 6, "w": 1},
        "concurrency-3": {"q": 3, "qu": "concurrent-requests"},
    }
    assert state(sent) == {"concurrency": {"r": 5}, "concurrency-2": {"r": 6}, "concurrency-3": {"r": 2}}


@pytest.mark.parametrize(
    "fields",
    [
        [(b"ratelimit", b"limit=10, remaining=5, reset=3")],
        [(b"ratelimit-policy", b"10;w=60"), (b"ratelimit", b"limit=10, remaining=5, reset=3")],
        [(b"ratelimit-policy", b'"a";q=1'), (b"ratelimit", b"limit=10, remaining=5, reset=3")],
        [(b"ratelimit-policy", b"10;w=60")],
    ],
)
async def test_fields_of_an_older_draft_are_left_alone(fields: list[tuple[bytes, bytes]]) -> None:
    sent = await drive(stack(ConcurrencyLimit(limits=3), app=answering(headers=fields)))
    assert sent.headers == fields


async def test_fields_that_are_there_alone_are_completed() -> None:
    sent = await drive(stack(ConcurrencyLimit(limits=3), app=answering(headers=[(b"ratelimit", b'"concurrency";r=9')])))
    assert sent.header("ratelimit") == '"concurrency";r=9, "concurrency-2";r=2'
    assert sent.header("ratelimit-policy") == '"concurrency-2";q=3;qu="concurrent-requests"'


# --- every way to end ----------------------------------------------------------------------------------------------


async def raising(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("app")


async def streaming_then_raising(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x", "more_body": True})
    raise ValueError("app")


async def timing_out(scope: Any, receive: Any, send: Any) -> None:
    raise TimeoutError


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(3):
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await anyio.lowlevel.checkpoint()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def hearing_a_disconnect(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def broken(message: Any) -> None:
    raise OSError("the client has gone")


@dataclass
class Ending:
    app: Any = None
    options: dict[str, Any] | None = None
    inside: tuple[Policy, ...] = ()


ENDINGS = {
    "answered": Ending(),
    "HEAD": Ending(options={"method": "HEAD"}),
    "stream": Ending(streaming),
    "websocket": Ending(options={"kind": "websocket"}),
    "websocket denied inside": Ending(options={"kind": "websocket"}, inside=(Deny(),)),
    "websocket closed inside": Ending(options={"kind": "websocket", "scope": {"extensions": {}}}, inside=(Deny(),)),
    "refused inside": Ending(inside=(Deny(),)),
    "application error": Ending(raising),
    "error in mid-stream": Ending(streaming_then_raising),
    "timeout": Ending(timing_out),
    "send fails": Ending(options={"on_send": broken}),
    "disconnect": Ending(hearing_a_disconnect, {"incoming": [{"type": "http.disconnect"}]}),
}


@pytest.mark.parametrize("remote", [False, True], ids=["here", "on another machine"])
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_a_place_is_given_back_once_however_it_ends(ending: Ending, remote: bool) -> None:
    store: Any = Later() if remote else MemorySlots()
    seen: list[int] = []
    policy = ConcurrencyLimit(limits=1, store=store)
    app = stack(policy, Watch(store=store, seen=seen), *ending.inside, app=ending.app)
    for times in range(1, 4):
        await drive(app, **{"raise_errors": False, **(ending.options or {})})
        assert store.in_flight(ADDRESS) == 0
        assert seen == [1, 1] * times, "taken while it runs"
        if remote:
            assert store.given_back == times


@pytest.mark.parametrize("remote", [False, True], ids=["here", "on another machine"])
@pytest.mark.parametrize("app", [None, streaming, raising], ids=["answered", "stream", "application error"])
async def test_a_place_is_given_back_when_the_exchange_is_cancelled_at_any_point(app: Any, remote: bool) -> None:
    store: Any = Later() if remote else MemorySlots()
    built = stack(ConcurrencyLimit(limits=1, store=store), app=app)
    for point in range(12):
        with anyio.CancelScope() as scope:

            async def cancel_after(_: Any, scope: anyio.CancelScope = scope, point: int = point) -> None:
                for _ in range(point):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
                await anyio.lowlevel.checkpoint()

            if point < 6:
                # Before the exchange has begun, and while it waits for a place.
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(drive, built, raise_errors=False))
                    for _ in range(point):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
            else:
                await drive(built, on_send=cancel_after, raise_errors=False)
        assert store.in_flight(ADDRESS) == 0
    assert (await drive(stack(ConcurrencyLimit(limits=1, store=store)))).status == 200


async def test_what_is_refused_outside_takes_no_place() -> None:
    store = MemorySlots()
    sent = await drive(stack(Deny(), ConcurrencyLimit(limits=1, store=store)))
    assert sent.status == 403
    assert sent.header("ratelimit") is None
    assert len(store) == 0


async def test_a_refusal_gives_back_nothing_of_others() -> None:
    gate = Gate()
    store = MemorySlots()
    app = stack(ConcurrencyLimit(limits=1, store=store), app=gate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drive, app)
        await settle(lambda: gate.inside == 1)
        for _ in range(3):
            assert (await drive(app)).status == 429
            assert store.in_flight(ADDRESS) == 1
        gate.opened.set()


async def test_a_websocket_holds_its_place_until_it_is_closed_and_is_refused_in_its_own_way() -> None:
    gate = Gate()
    app = stack(ConcurrencyLimit(limits=1), app=gate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(drive, app, kind="websocket"))
        await settle(lambda: gate.inside == 1)
        sent = await drive(app, kind="websocket")
        assert sent.messages[0]["type"] == "websocket.http.response.start"
        assert sent.status == 429
        assert sent.json()["error_code"] == "RATE_002"
        sent = await drive(app, kind="websocket", scope={"extensions": {}})
        assert sent.messages == [{"type": "websocket.close", "code": 1013, "reason": ""}]
        gate.opened.set()
    sent = await drive(app, kind="websocket")
    assert sent.start["type"] == "websocket.accept"
    assert state(sent) == {"concurrency": {"r": 0}}


async def test_an_exchange_that_is_closed_by_the_garbage_collector_gives_its_place_back() -> None:
    store = MemorySlots()
    app = stack(ConcurrencyLimit(limits=1, store=store), app=Gate())
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("203.0.113.7", 1)}
    running: Any = app(scope, None, None).__await__()  # type: ignore[arg-type]
    running.send(None)
    assert store.in_flight(ADDRESS) == 1
    running.close()
    assert store.in_flight(ADDRESS) == 0


async def test_twice_in_one_stack_each_keeps_its_own_account() -> None:
    gate = Gate()
    outer, inner = ConcurrencyLimit(limits=4), ConcurrencyLimit(limits=2)
    app = stack(outer, inner, app=gate)
    answers = await crowd(app, gate, 5)
    assert sorted(sent.status for sent in answers) == [200, 200, 429, 429, 429]
    for sent in answers:
        assert len(sent.header_lines("ratelimit")) == 1
    sent = await drive(app)
    assert state(sent) == {"concurrency": {"r": 1}, "concurrency-2": {"r": 3}}
    assert policies(sent)["concurrency-2"]["q"] == 4


async def test_policies_of_one_store_are_told_apart_by_their_names() -> None:
    store = MemorySlots()
    one, other = (ConcurrencyLimit(limits=1, name=name, store=store) for name in ("a", "b"))
    assert (await drive(stack(one, other))).status == 200
    sent = await drive(stack(one, ConcurrencyLimit(limits=1, name="a", store=store)))
    assert sent.status == 429, "one store and one name: two places"
    assert len(store) == 0


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ENDINGS)), st.booleans(), st.integers(0, 8)), min_size=1, max_size=10),
    st.integers(1, 3),
    st.booleans(),
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_any_mixture_of_endings_keeps_the_limit_and_leaves_nothing(
    anyio_backend: str, crowded: list[tuple[str, bool, int]], limit: int, remote: bool
) -> None:
    """Exchanges that overlap at random, each with an ending of its own, some of them cancelled somewhere."""
    store: Any = Later() if remote else MemorySlots()
    inside: set[int] = set()
    most = 0

    async def one(number: int, name: str, cancelled: bool, after: int) -> None:
        ending = ENDINGS[name]

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            nonlocal most
            inside.add(number)
            most = max(most, len(inside))
            try:
                for _ in range(after):
                    await anyio.lowlevel.checkpoint()
                await (ending.app or answering())(scope, receive, send)
            finally:
                inside.discard(number)

        app = stack(ConcurrencyLimit(limits=limit, store=store), *ending.inside, app=counted)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                if cancelled:
                    tasks.start_soon(cancel_later, scope, after + number)
                await drive(app, **{"raise_errors": False, **(ending.options or {})})

    async def cancel_later(scope: anyio.CancelScope, turns: int) -> None:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async def together() -> None:
        async with anyio.create_task_group() as tasks:
            for number, drawn in enumerate(crowded):
                tasks.start_soon(one, number, *drawn)

    anyio.run(together)
    assert most <= limit
    assert store.in_flight(ADDRESS) == 0


# --- when the store is away ------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["later", "at once"])
def away(request: pytest.FixtureRequest) -> Later:
    store = Later()
    store.away = True
    store.at_once = request.param
    return store


async def test_closed_answers_503_with_retry_after(away: Later) -> None:
    sent = await drive(stack(ConcurrencyLimit(limits=1, store=away)))
    assert sent.status == 503
    assert sent.header("retry-after") == "3"
    assert sent.header("ratelimit") is None
    body = sent.json()
    assert (body["error_code"], body["retry_after"]) == ("RATE_003", 3)
    assert body["detail"] == "Limits cannot be checked at the moment."
    assert away.held == away.given_back == 0
    away.away = False
    assert (await drive(stack(ConcurrencyLimit(limits=1, store=away)))).status == 200


async def test_open_lets_everybody_pass_and_says_nothing(away: Later) -> None:
    gate = Gate()
    app = stack(ConcurrencyLimit(limits=1, store=away, on_store_loss="open"), app=gate)
    answers: list[Sent] = []

    async def one() -> None:
        answers.append(await drive(app))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(one)
        await settle(lambda: gate.inside == 3)
        away.away = False
        with anyio.fail_after(60):
            assert (await drive(app)).status == 429, "the store is back, and knows of those that passed"
        gate.opened.set()
    assert [(sent.status, sent.header("ratelimit")) for sent in answers] == [(200, None)] * 3
    assert away.in_flight(ADDRESS) == 0
    assert (away.held, away.given_back) == (3, 3)


@pytest.mark.parametrize(("limit", "replicas", "share"), [(9, 4, 2), (8, 4, 2), (3, 4, 1), (5, 1, 5)])
async def test_local_admits_the_share_of_this_process(away: Later, limit: int, replicas: int, share: int) -> None:
    gate = Gate()
    policy = ConcurrencyLimit(limits=limit, store=away, on_store_loss="local", expected_replicas=replicas)
    answers = await crowd(stack(policy, app=gate), gate, share + 2)
    assert gate.most == share
    refused = [sent for sent in answers if sent.status == 429]
    assert len(refused) == 2
    for sent in answers:
        assert sent.header("ratelimit-policy") == (f'"concurrency";q={share};qu="concurrent-requests";sigil-degraded')
        assert policies(sent) == {"concurrency": {"q": share, "qu": "concurrent-requests", "sigil-degraded": True}}
    assert state(refused[0]) == {"concurrency": {"r": 0}}
    assert refused[0].json()["limit"] == share
    assert (away.held, away.given_back) == (share, share)
    assert away.in_flight(ADDRESS) == 0


async def test_local_places_are_given_back_too(away: Later) -> None:
    app = stack(ConcurrencyLimit(limits=1, store=away, on_store_loss="local", expected_replicas=9))
    for _ in range(4):
        assert (await drive(app)).status == 200
    assert away.in_flight(ADDRESS) == 0


async def test_what_passed_locally_counts_when_the_store_is_back(away: Later) -> None:
    gate = Gate()
    policy = ConcurrencyLimit(limits=2, store=away, on_store_loss="local", expected_replicas=1)
    app = stack(policy, app=gate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drive, app)
        await settle(lambda: gate.inside == 1)
        away.away = False
        tasks.start_soon(drive, app)
        await settle(lambda: gate.inside == 2)
        with anyio.fail_after(60):
            sent = await drive(app)
        assert sent.status == 429
        assert sent.header("ratelimit-policy") == '"concurrency";q=2;qu="concurrent-requests"'
        away.away = True
        assert (await drive(stack(policy))).status == 200, "another share: this process's own account"
        gate.opened.set()
    assert away.in_flight(ADDRESS) == 0


async def test_a_store_that_goes_away_meanwhile_takes_no_response_away_and_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Later()
    store.forgets = True

    async def app(scope: Any, receive: Any, send: Any) -> None:
        store.away = True
        await answering()(scope, receive, send)

    sent = await drive(stack(ConcurrencyLimit(limits=1, store=store), app=app))
    assert (sent.status, sent.error, store.given_back) == (200, None, 1)
    assert not caplog.records


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing is limited"),
        ({"limits": {"free": None}}, "nothing is limited"),
        ({"limits": {}}, "nothing is limited"),
        ({"limits": 0}, "greater than or equal to 1"),
        ({"limits": True}, "valid integer"),
        ({"limits": {"free": 0}}, "greater than or equal to 1"),
        ({"limits": {"pro": 2}}, "default_tier 'free' is not in limits"),
        ({"limits": {"free": 2}, "anonymous_tier": "none"}, "anonymous_tier 'none' is not in limits"),
        ({"routes": {"/x": 0}}, "greater than or equal to 1"),
        ({"routes": {"x": 1}}, "must be 'METHOD /path'"),
        ({"routes": {"/a/{b}": 1, "/a/{c}": 2}}, "are the same route"),
        ({"routes": {"/x": 1}, "exempt": ["/x"]}, "is exempt and has a limit"),
        ({"limits": 1, "store": object()}, "store must be a SlotStore"),
        ({"limits": 1, "ttl": 0.5}, "greater than or equal to 1"),
        ({"limits": 1, "retry_after": 0}, "greater than or equal to 1"),
        ({"limits": 1, "name": "a b"}, "stands in response headers"),
        ({"limits": 1, "trusted_proxies": ["::/0"]}, "everybody"),
        ({"limits": 1, "on_store_loss": "local"}, "needs expected_replicas"),
        ({"limits": 1, "on_store_loss": "shut"}, "'closed', 'open' or 'local'"),
        ({"limits": 1, "size": 3}, "[Uu]nexpected keyword"),
    ],
)
def test_wrong_configuration_fails_at_construction(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ConcurrencyLimit(**options)


def test_a_store_is_found_by_its_url_and_its_password_shown_nowhere() -> None:
    url = "redis://:s3cret@localhost:1/0"
    one, other = (ConcurrencyLimit(limits=1, store=url) for _ in range(2))
    assert one.slots is other.slots
    assert one.slots.remote
    assert "s3cret" not in repr(one)
    with pytest.raises(ValidationError, match="scheme") as raised:
        ConcurrencyLimit(limits=1, store="http://:s3cret@localhost")
    assert "s3cret" not in str(raised.value)


def test_a_store_that_can_be_closed_is_closed_with_the_stack() -> None:
    class Closing(MemorySlots):
        async def aclose(self) -> None:
            pass

    store = Closing()
    assert list(ConcurrencyLimit(limits=1, store=store).resources()) == [store]
    assert list(ConcurrencyLimit(limits=1).resources()) == []


class Late(Policy):
    """Adds a header when the head leaves it, so that the order of decoration shows."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-late", b"yes"))


async def test_a_refusal_is_decorated_by_the_policies_outside_only() -> None:
    gate = Gate()
    app = stack(Late(), ConcurrencyLimit(limits=1), app=gate)
    refused = [sent for sent in await crowd(app, gate, 2) if sent.status == 429]
    assert refused[0].header("x-late") == "yes"

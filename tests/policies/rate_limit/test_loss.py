"""What holds while the store is away, and what is made good when it is back."""

from typing import Any

import anyio
import http_sf
import pytest
import structlog
from pydantic import ValidationError

from sigil_policy.core.exchange import report_tokens
from sigil_policy.core.facts import Quota
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import Level, RateLimit, Tier, TokenRule
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.policies.rate_limit.faults import Remote, Telling

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0
TIERS = {"free": Tier(requests="8/minute;80/hour", tokens=1_000)}


def answering(used: int = 0) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if used:
            report_tokens(scope, total_tokens=used)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    return app


def limited(store: Remote, app: Any = None, clock: FrozenClock | None = None, **options: Any) -> PolicyStack:
    options.setdefault("tiers", TIERS)
    return PolicyStack(
        app or answering(), policies=[RateLimit(store=store, **options)], clock=clock or FrozenClock(START)
    )


def remaining(sent: Sent) -> dict[str, int]:
    value = sent.header("ratelimit")
    assert value is not None
    return {name: found["r"] for name, found in http_sf.parse(value.encode(), tltype="list")}


async def test_closed_is_the_default_and_says_when_to_come_back() -> None:
    store = Remote()
    app = limited(store)
    store.away = True
    sent = await drive(app)
    assert (sent.status, sent.json()["error_code"], sent.header("retry-after")) == (503, "RATE_003", "3")
    assert sent.header("ratelimit") is None
    assert sent.header("cache-control") == "no-store"
    store.away = False
    assert remaining(await drive(app))["minute"] == 7


async def test_open_admits_everybody_and_claims_nothing() -> None:
    store = Remote()
    app = limited(store, on_store_loss="open")
    store.away = True
    for _ in range(20):
        sent = await drive(app)
        assert sent.status == 200
        assert not [name for name, _ in sent.headers if b"ratelimit" in name or b"tokens" in name]


async def test_local_admits_this_process_share_and_says_so() -> None:
    store = Remote()
    app = limited(store, on_store_loss="local", expected_replicas=4)
    store.away = True
    sent = await drive(app)
    assert dict(http_sf.parse((sent.header("ratelimit-policy") or "").encode(), tltype="list")) == {
        "minute": {"q": 2, "w": 60, "sigil-degraded": True},
        "hour": {"q": 20, "w": 3_600, "sigil-degraded": True},
        "tokens-minute": {"q": 250, "w": 60, "qu": "tokens", "sigil-degraded": True},
    }
    assert sent.header("x-ratelimit-limit") == "2"
    assert [(await drive(app)).status for _ in range(3)] == [200, 429, 429]


async def test_four_replicas_together_admit_no_more_than_the_limit() -> None:
    """The bound that `on_store_loss="local"` states."""
    store = Remote()
    store.away = True
    replicas = [limited(store, on_store_loss="local", expected_replicas=4) for _ in range(4)]
    admitted = sum([(await drive(app)).status == 200 for _ in range(10) for app in replicas])
    assert admitted == 8


async def test_a_share_is_at_least_one() -> None:
    store = Remote()
    store.away = True
    app = limited(store, tiers={"free": "1/minute"}, on_store_loss="local", expected_replicas=9)
    assert [(await drive(app)).status for _ in range(2)] == [200, 429]


async def test_levels_have_shares_too() -> None:
    store = Remote()
    store.away = True
    level = Level("all", key=lambda ex: "everybody", limits="8/minute")
    app = limited(store, levels=[level], tiers={"free": "80/minute"}, on_store_loss="local", expected_replicas=4)
    seen = [await drive(app, client=(f"10.0.{n}.1", 1)) for n in range(3)]
    assert [sent.status for sent in seen] == [200, 200, 429]
    assert seen[2].json()["violated_policies"] == ["all-minute"]


async def test_an_estimate_that_fits_the_budget_but_not_the_share_waits_for_the_store() -> None:
    store = Remote()
    store.away = True
    app = limited(store, tokens={"/run": 400}, on_store_loss="local", expected_replicas=4)
    assert (await drive(app, "POST", "/run")).status == 503


async def test_what_was_admitted_meanwhile_is_charged_when_the_store_is_back() -> None:
    store = Telling()
    clock = FrozenClock(START)
    app = limited(store, answering(used=30), clock=clock, on_store_loss="local", expected_replicas=2)
    await drive(app)
    store.away = True
    for _ in range(3):
        await drive(app)
    with structlog.testing.capture_logs() as logs:
        await store.return_()
    assert [log["event"] for log in logs] == ["rate_limit_reconciled"]
    assert (logs[0]["charged"], logs[0]["settled"]) == (1, 0)
    seen = remaining(await drive(app))
    assert (seen["minute"], seen["hour"], seen["tokens-minute"]) == (3, 75, 880)
    await store.return_()
    assert remaining(await drive(app))["minute"] == 2


async def test_only_windows_that_still_last_are_charged() -> None:
    store = Telling()
    clock = FrozenClock(START)
    app = limited(store, clock=clock, on_store_loss="local", expected_replicas=2)
    store.away = True
    for _ in range(3):
        await drive(app)
    clock.advance(60)
    await store.return_()
    seen = remaining(await drive(app))
    assert (seen["minute"], seen["hour"]) == (7, 76)


@pytest.mark.parametrize("kind", [Remote, Telling])
async def test_a_settlement_that_did_not_reach_the_store_is_made_later(kind: type[Remote]) -> None:
    store = kind()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/run":
            store.away = True
            report_tokens(scope, total_tokens=70)
        await answering()(scope, receive, send)

    clock = FrozenClock(START)
    under = limited(store, app, clock=clock, tokens={"/run": 500}, on_store_loss="open")
    assert (await drive(under, "POST", "/run")).status == 200
    if isinstance(store, Telling):
        await store.return_()
    else:
        store.away = False
        # A store that does not tell: the first exchange that reaches it brings the rest along.
        clock.advance(3)
        await drive(under)
    assert remaining(await drive(under))["tokens-minute"] == 930
    assert store.calls.count("settle") == 1


async def test_a_settlement_that_was_cut_off_is_made_later() -> None:
    """`on_finish` has a bounded time: what it did not do then is not forgotten."""
    store = Telling()
    settle = store.settle
    hang = True

    async def slow(*arguments: Any) -> tuple[int, ...]:
        if hang:
            await anyio.sleep_forever()
        return await settle(*arguments)

    store.settle = slow  # type: ignore[method-assign]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answering(used=70 if scope["path"] == "/run" else 0)(scope, receive, send)

    limit = RateLimit(store=store, tiers=TIERS, tokens={"/run": TokenRule(estimate=500)})
    clock = FrozenClock(START)
    cutting = PolicyStack(app, policies=[limit], clock=clock, finish_timeout=0.05)
    await drive(cutting, "POST", "/run", raise_errors=False)
    hang = False
    under = PolicyStack(app, policies=[limit], clock=clock, finish_timeout=60)
    await drive(under)
    assert remaining(await drive(under))["tokens-minute"] == 930


async def test_a_loss_in_the_middle_of_reconciling_forgets_nothing() -> None:
    store = Telling()
    app = limited(store, on_store_loss="local", expected_replicas=1)
    store.away = True
    for n in range(5):
        await drive(app, client=(f"10.0.0.{n}", 1))
    reach = store._reach

    async def once(what: str) -> None:
        await reach(what)
        store.away = len(store.calls) == 2

    store._reach = once  # type: ignore[method-assign]
    await store.return_()
    assert store.calls == ["charge"] * 2
    await store.return_()
    assert store.calls.count("charge") == 5


async def test_what_is_remembered_is_bounded() -> None:
    store = Telling()
    limit = RateLimit(
        store=store, tiers={"free": "9/minute"}, on_store_loss="local", expected_replicas=1, key=lambda ex: ex.path
    )
    app = PolicyStack(answering(), policies=[limit], clock=FrozenClock(START))
    store.away = True
    for n in range(10_050):
        await drive(app, "GET", f"/{n}")
    await store.return_()
    assert store.calls.count("charge") == 10_000


async def test_the_quota_is_that_of_the_share() -> None:
    store = Remote()
    store.away = True
    seen: list[Quota] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["sigil_policy"][Quota])
        await answering()(scope, receive, send)

    await drive(limited(store, app, on_store_loss="local", expected_replicas=4))
    assert [(window.limit, window.remaining) for window in seen[0].requests] == [(2, 1), (20, 19)]


async def test_local_wants_to_know_how_many_processes_there_are() -> None:
    with pytest.raises(ValidationError, match="expected_replicas"):
        RateLimit(store=Remote(), on_store_loss="local")

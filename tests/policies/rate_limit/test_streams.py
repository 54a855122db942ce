"""Streams that outgrow their estimate: more is reserved as they go, and they end when the budget does."""

import json
from typing import Any

import http_sf
import pytest

from sigil_policy.core.exchange import Exchange, report_tokens
from sigil_policy.core.facts import TokenUsage
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import RateLimit, Tier, TokenRule
from sigil_policy.stores.memory import FixedWindows
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.policies.rate_limit.faults import Remote

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0
EVENT = b"data: x\n\n"


class Source:
    """An application that streams `count` events under /run; `made` is how many it got to."""

    def __init__(
        self, count: int, *, media: bytes = b"text/event-stream", event: bytes = EVENT, report: int = 0
    ) -> None:
        self.count = count
        self.media = media
        self.event = event
        self.report = report
        self.made = 0
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", self.media), *self.headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/run":
            for _ in range(self.count):
                self.made += 1
                if self.report:
                    report_tokens(scope, output_tokens=self.report)
                await send({"type": "http.response.body", "body": self.event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture(params=["in process", "remote"])
def store(request: pytest.FixtureRequest) -> Any:
    return FixedWindows() if request.param == "in process" else Remote()


def limited(source: Source, store: Any, *outside: Policy, budget: int = 1_000, **rule: Any) -> PolicyStack:
    limit = RateLimit(
        tiers={"free": Tier(requests="99/minute", tokens=budget)}, tokens={"/run": TokenRule(**rule)}, store=store
    )
    return PolicyStack(source, policies=[*outside, limit], clock=FrozenClock(START))


async def left(app: PolicyStack) -> int:
    sent = await drive(app)
    found = dict(http_sf.parse((sent.header("ratelimit") or "").encode(), tltype="list"))
    return int(found["tokens-minute"]["r"])


def last_event(sent: Sent) -> dict[str, Any]:
    event = sent.body.rstrip(b"\n").split(b"\n\n")[-1]
    assert event.startswith(b"event: error\ndata: ")
    return dict(json.loads(event.split(b"data: ", 1)[1]))


async def test_a_stream_that_outgrows_its_estimate_reserves_more(store: Any) -> None:
    source = Source(500)
    app = limited(source, store, estimate=100)
    sent = await drive(app, "POST", "/run")
    assert sent.body == EVENT * 500
    assert await left(app) == 500


async def test_more_is_held_while_the_stream_runs(store: Any) -> None:
    """Others see what a stream in flight may use."""
    held: list[int] = []

    class Peek(Source):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def watched(message: Any) -> None:
                await send(message)
                if scope["path"] == "/run" and self.made in (50, 150, 400):
                    held.append(1_000 - await left(app))

            await super().__call__(scope, receive, watched)

    source = Peek(400)
    app = limited(source, store, estimate=100)
    await drive(app, "POST", "/run")
    assert held[0] == 100
    assert 150 <= held[1] <= 250
    assert 400 <= held[2] <= 500


async def test_it_ends_with_a_last_event_when_the_budget_does(store: Any) -> None:
    source = Source(5_000)
    app = limited(source, store, estimate=100)
    sent = await drive(app, "POST", "/run")
    problem = last_event(sent)
    assert (problem["error_code"], problem["status"], problem["limit"]) == ("CTX_003", 429, 1_000)
    assert problem["violated_policies"] == ["tokens-minute"]
    assert sent.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False} or not sent.messages[
        -1
    ].get("more_body")
    # The application is stopped, and over the budget is at most the part that found it spent.
    assert source.made <= 1_002
    assert 1_000 <= sent.body.count(EVENT) <= 1_001
    assert await left(app) == 0


async def test_it_may_overdraw_and_is_charged(store: Any) -> None:
    source = Source(1_500)
    app = limited(source, store, estimate=100, overrun="overdraw")
    sent = await drive(app, "POST", "/run")
    assert sent.body == EVENT * 1_500
    assert await left(app) == 0
    extends = [call for call in getattr(store, "calls", ()) if call == "extend"]
    assert len(extends) < 30  # not one for every part


async def test_a_stream_without_an_estimate_reserves_as_it_goes(store: Any) -> None:
    app = limited(Source(300), store)
    await drive(app, "POST", "/run")
    assert await left(app) == 700


async def test_what_the_application_reports_on_the_way_is_what_counts(store: Any) -> None:
    source = Source(100, report=20)
    app = limited(source, store, estimate=100)
    sent = await drive(app, "POST", "/run")
    assert last_event(sent)["error_code"] == "CTX_003"
    assert source.made <= 52  # the one after learns that it is over
    assert await left(app) == 0


async def test_tokens_may_be_counted_by_a_function_of_the_rule(store: Any) -> None:
    source = Source(30)
    app = limited(source, store, estimate=100, count=lambda part: 10 * part.count(b"x"))
    await drive(app, "POST", "/run")
    assert await left(app) == 700


async def test_json_lines_end_with_a_line(store: Any) -> None:
    app = limited(Source(5_000, media=b"application/x-ndjson", event=b'{"token": "x"}\n'), store, estimate=900)
    sent = await drive(app, "POST", "/run")
    assert json.loads(sent.body.splitlines()[-1])["error_code"] == "CTX_003"


@pytest.mark.parametrize(
    "headers",
    [[(b"content-length", b"18000")], [(b"content-encoding", b"gzip")], [(b"content-type", b"text/plain")]],
    ids=["a promised length", "compressed", "no events"],
)
async def test_what_cannot_be_ended_cleanly_overdraws(store: Any, headers: Any) -> None:
    source = Source(2_000)
    if headers[0][0] == b"content-type":
        source.media = headers[0][1]
    else:
        source.headers = headers
    app = limited(source, store, estimate=100)
    assert len((await drive(app, "POST", "/run")).body) == 18_000


async def test_a_stream_that_uses_exactly_its_budget_is_whole(store: Any) -> None:
    app = limited(Source(1_000), store, estimate=1_000)
    assert (await drive(app, "POST", "/run")).body == EVENT * 1_000
    assert await left(app) == 0


async def test_a_log_outside_sees_a_refusal(store: Any) -> None:
    seen = []

    class Log(Policy):
        def on_finish(self, ex: Exchange) -> None:
            seen.append((ex.outcome, ex.refused_by))

    await drive(limited(Source(5_000), store, Log(), estimate=100), "POST", "/run")
    assert seen == [("refused", "RateLimit")]


@pytest.mark.parametrize(("mode", "whole"), [("closed", False), ("open", True)])
async def test_a_store_that_is_lost_in_mid_stream(mode: Any, whole: bool) -> None:
    store = Remote()

    class Cut(Source):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            store.away = scope["path"] == "/run"
            await super().__call__(scope, receive, send)

    source = Cut(300)
    limit = RateLimit(
        tiers={"free": Tier(requests="99/minute", tokens=1_000)}, tokens={"/run": 100}, store=store, on_store_loss=mode
    )
    clock = FrozenClock(START)
    app = PolicyStack(source, policies=[limit], clock=clock)
    sent = await drive(app, "POST", "/run")
    if whole:
        assert sent.body == EVENT * 300
    else:
        assert last_event(sent)["error_code"] == "RATE_003"
        assert source.made <= 103
    store.away = False
    clock.advance(3)
    await drive(app)
    assert await left(app) == 1_000 - (300 if whole else 101)


async def test_budgets_of_input_and_output_are_apart(store: Any) -> None:
    tier = Tier(requests="99/minute", input_tokens=500, output_tokens="200/minute")
    estimate = TokenUsage(input_tokens=50, output_tokens=20)
    limit = RateLimit(tiers={"free": tier}, tokens={"/run": TokenRule(estimate=estimate)}, store=store)
    app = PolicyStack(Source(300), policies=[limit], clock=FrozenClock(START))
    sent = await drive(app, "POST", "/run")
    assert last_event(sent)["violated_policies"] == ["output-tokens-minute"]
    found = dict(http_sf.parse(((await drive(app)).header("ratelimit") or "").encode(), tltype="list"))
    assert (found["input-tokens-minute"]["r"], found["output-tokens-minute"]["r"]) == (450, 0)


async def test_what_was_not_told_apart_counts_as_output() -> None:
    tier = Tier(requests="99/minute", input_tokens=500, output_tokens=200)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/run":
            report_tokens(scope, total_tokens=80)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    limit = RateLimit(tiers={"free": tier}, tokens={"/run": TokenRule()})
    under = PolicyStack(app, policies=[limit], clock=FrozenClock(START))
    await drive(under, "POST", "/run")
    found = dict(http_sf.parse(((await drive(under)).header("ratelimit") or "").encode(), tltype="list"))
    assert (found["input-tokens-minute"]["r"], found["output-tokens-minute"]["r"]) == (500, 120)

"""RateLimit on a WebSocket: each message is a request of its own, with windows and tokens."""

import json
from typing import Any

import pytest

from sigil_policy.core.exchange import Exchange, report_tokens
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import RateLimit, Tier, TokenRule
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.policies.rate_limit.faults import Remote

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0  # a whole minute


class Caller(Policy):
    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        ex.authenticate(Principal("ada"))


class Desk:
    """An application that answers each message; what it hears may say how many tokens that takes, and how long."""

    def __init__(self, clock: FrozenClock) -> None:
        self.clock = clock
        self.heard: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            self.heard.append(message["text"])
            kind, _, number = message["text"].partition(" ")
            if kind == "wait":
                self.clock.advance(float(number))
            elif kind == "use":
                report_tokens(scope, total_tokens=int(number))
            elif kind == "say":
                await send({"type": "websocket.send", "text": "x" * int(number)})


async def talk(app: Any, *texts: str) -> Sent:
    messages = [{"type": "websocket.receive", "text": text} for text in texts]
    incoming = [{"type": "websocket.connect"}, *messages, {"type": "websocket.disconnect", "code": 1000}]
    return await drive(app, kind="websocket", path="/ws", incoming=incoming)


def answers(sent: Sent) -> list[dict[str, Any]]:
    """What was refused: the problems that the client got."""
    texts = [message["text"] for message in sent.messages if message["type"] == "websocket.send"]
    return [json.loads(text)["data"] for text in texts if text.startswith("{")]


def mounted(limit: RateLimit) -> tuple[Any, Desk, FrozenClock]:
    clock = FrozenClock(START)
    desk = Desk(clock)
    return PolicyStack(desk, [Caller(), limit], clock=clock), desk, clock


async def test_a_message_over_the_limit_is_answered_and_never_reaches_the_application() -> None:
    app, desk, _ = mounted(RateLimit(tiers={"free": "3/minute"}))
    sent = await talk(app, "one", "two", "three", "wait 60", "four")
    # The handshake was the first.
    assert desk.heard == ["one", "two"]
    three = answers(sent)[0]
    assert (three["error_code"], three["status"], three["limit"]) == ("RATE_001", 429, 3)
    assert three["retry_after"] == 60
    assert three["violated_policies"] == ["minute"]


async def test_a_connection_goes_on_when_the_window_has_passed() -> None:
    app, desk, clock = mounted(RateLimit(tiers={"free": "2/second;100/minute"}))
    await talk(app, "wait 1", "a", "b", "c")
    assert desk.heard == ["wait 1", "a", "b"]
    clock.advance(60)
    await talk(app, "a")
    assert desk.heard[3:] == ["a"]


async def test_messages_and_requests_are_one_quota() -> None:
    app, desk, _ = mounted(RateLimit(tiers={"free": "5/minute"}))
    for _ in range(2):
        assert (await drive(app)).status == 200
    await talk(app, "a", "b", "c")
    assert desk.heard == ["a", "b"]
    assert (await drive(app)).status == 429


async def test_a_connection_may_be_closed_instead() -> None:
    app, desk, _ = mounted(RateLimit(tiers={"free": "2/minute"}, over_messages="close"))
    sent = await talk(app, "a", "b", "c")
    assert desk.heard == ["a"]
    assert sent.messages[-1] == {"type": "websocket.close", "code": 4429, "reason": "RateLimitExceededError"}


async def test_messages_may_cost_more_or_nothing() -> None:
    app, desk, _ = mounted(RateLimit(tiers={"free": "10/minute"}, message_cost=4))
    await talk(app, "a", "b", "c")
    assert desk.heard == ["a", "b"]
    app, desk, _ = mounted(RateLimit(tiers={"free": "1/minute"}, message_cost=0))
    await talk(app, *["a"] * 20)
    assert len(desk.heard) == 20


async def test_messages_on_a_route_that_is_exempt_are_free() -> None:
    app, desk, _ = mounted(RateLimit(tiers={"free": "1/minute"}, exempt=["WEBSOCKET /ws"]))
    await talk(app, *["a"] * 20)
    assert len(desk.heard) == 20


BUDGET = {"free": Tier(requests="1000/minute", tokens="100/minute")}


def budgeted(**options: Any) -> tuple[Any, Desk, FrozenClock]:
    return mounted(RateLimit(tiers=BUDGET, tokens={"WEBSOCKET /ws": TokenRule(estimate=40)}, **options))


async def test_tokens_are_reserved_for_each_message_and_settled_with_the_next() -> None:
    app, desk, _ = budgeted()
    sent = await talk(app, "use 30", "use 30", "use 30", "use 30")
    # 30 + 30 are spent, and the next may need 40: it fits; then 90 are, and it does not.
    assert desk.heard == ["use 30", "use 30", "use 30"]
    assert [(answer["error_code"], answer["unit"]) for answer in answers(sent)] == [("CTX_003", "tokens")]


async def test_what_was_used_is_charged_once() -> None:
    app, _, clock = budgeted()
    await talk(app, "use 10", "say 3", "use 10", "idle")
    # 10 + 10 were reported; what was said, and not reported, is a token for 4 bytes, of the estimate's output.
    sent = await talk(app)
    assert sent.header("x-tokens-remaining") == str(100 - 10 - 10 - 1 - 40)
    clock.advance(60)
    sent = await talk(app)
    assert sent.header("x-tokens-remaining") == "60"


async def test_a_long_connection_spends_the_budget_of_the_minute_that_it_is_in() -> None:
    app, desk, _ = budgeted()
    await talk(app, *["use 50", "wait 60"] * 5)
    assert len(desk.heard) == 10


async def test_tokens_of_a_message_that_was_the_last_are_charged() -> None:
    app, _, _ = budgeted()
    await talk(app, "use 55")
    assert (await talk(app)).header("x-tokens-remaining") == "5"


async def test_tokens_that_are_reported_after_a_refusal_are_charged() -> None:
    """The application goes on with what it has begun."""
    clock = FrozenClock(START)

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        report_tokens(scope, total_tokens=70)
        await receive()
        report_tokens(scope, total_tokens=5)

    limit = RateLimit(tiers=BUDGET, tokens={"WEBSOCKET /ws": TokenRule(estimate=40)})
    app = PolicyStack(late, [Caller(), limit], clock=clock)
    sent = await talk(app, "a", "b")
    assert len(answers(sent)) == 1
    clock.advance(0.5)
    assert (await talk(app)).status == 429


async def test_a_store_that_is_away_refuses_messages_as_it_does_requests() -> None:
    store = Remote()
    app, desk, clock = mounted(RateLimit(tiers={"free": "100/minute"}, store=store))

    class Cuts(Policy):
        def on_message(self, ex: Exchange, message: Any) -> None:
            store.away = message["text"] == "away"

    app = PolicyStack(desk, [Caller(), Cuts(), RateLimit(tiers={"free": "100/minute"}, store=store)], clock=clock)
    sent = await talk(app, "a", "away", "b")
    assert desk.heard == ["a", "b"]
    assert [answer["status"] for answer in answers(sent)] == [503]
    store.away = False
    opened = RateLimit(tiers={"free": "100/minute"}, store=store, on_store_loss="open")
    app = PolicyStack(desk, [Caller(), Cuts(), opened], clock=clock)
    assert not answers(await talk(app, "a", "away", "b"))

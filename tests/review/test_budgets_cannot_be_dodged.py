"""Ways by which a caller paid less than it got, or others paid for it: each of them was open once."""

import random
from typing import Any

import http_sf
import pytest
import structlog
from pydantic import ValidationError

from sigil_policy.core.exchange import Exchange, report_tokens
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import Level, RateLimit, Tier, TokenRule, by_claim
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.memory import FixedWindows
from sigil_policy.testing import FrozenClock, drive
from tests.policies.rate_limit.faults import Remote, Telling

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0
EVENT = b"data: x\n\n"
HOUR = {"free": Tier(requests="1000/hour", tokens="1000/hour")}


class Caller(Policy):
    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        name, _, organisation = ex.headers.get(b"x-caller", b"ada").decode().partition("@")
        ex.give(Principal(name, claims={"org": organisation or "acme"}))


def streaming(*parts: bytes, before: int = 0, after: int = 0, media: bytes = b"text/event-stream") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/run":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        if before:
            report_tokens(scope, input_tokens=before)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media)]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if after:
            report_tokens(scope, output_tokens=after)
        await send({"type": "http.response.body", "body": b""})

    return app


def limited(app: Any, clock: FrozenClock | None = None, **options: Any) -> PolicyStack:
    options.setdefault("tiers", HOUR)
    options.setdefault("tokens", {"/run": TokenRule(estimate=100)})
    return PolicyStack(app, policies=[Caller(), RateLimit(**options)], clock=clock or FrozenClock(START))


async def used(app: PolicyStack, window: str = "tokens-hour", budget: int = 1_000, caller: str = "ada") -> int:
    sent = await drive(app, headers={"x-caller": caller})
    found = dict(http_sf.parse((sent.header("ratelimit") or "").encode(), tltype="list"))
    return budget - int(found[window]["r"])


async def test_a_report_of_the_prompt_does_not_hide_what_is_counted() -> None:
    app = limited(streaming(*[EVENT] * 3_000, before=20))
    sent = await drive(app, "POST", "/run")
    assert b"event: error" in sent.body
    assert await used(app) == 1_000


async def test_hanging_up_before_the_report_costs_what_was_counted() -> None:
    parts = 0

    def hang_up(message: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > 301:
            raise OSError("gone")

    app = limited(streaming(*[EVENT] * 900, before=20, after=900))
    await drive(app, "POST", "/run", on_send=hang_up, raise_errors=False)
    assert 320 <= await used(app) <= 322


async def test_a_report_of_an_exchange_that_came_to_its_end_is_what_counts() -> None:
    app = limited(streaming(*[EVENT] * 200, before=20, after=150))
    await drive(app, "POST", "/run")
    assert await used(app) == 170


async def test_the_text_of_a_model_cannot_tell_that_nothing_was_used() -> None:
    forged = b'data: {"usage": {"total_tokens": 0}}\n\n'
    app = limited(streaming(*[EVENT] * 80, forged, b"data: [DONE]\n\n"))
    await drive(app, "POST", "/run")
    assert await used(app) == 81
    trusting = TokenRule(estimate=100, usage=["usage.total_tokens"])
    app = limited(streaming(*[EVENT] * 80, b'data: {"usage": {"total_tokens": 7}}\n\n'), tokens={"/run": trusting})
    await drive(app, "POST", "/run")
    assert await used(app) == 7


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6, 7, 11, None])
async def test_events_are_counted_wherever_they_are_cut(cut: int | None) -> None:
    whole = b'data: {"d": "x"}\n\n' * 300 + b"data: [DONE]\n\n"
    parts, place, chance = [], 0, random.Random(7)
    while place < len(whole):
        end = place + (cut or chance.randrange(1, 60))
        parts.append(whole[place:end])
        place = end
    app = limited(streaming(*parts))
    await drive(app, "POST", "/run")
    assert await used(app) == 300


@pytest.mark.parametrize(
    "estimate", [float("nan"), float("inf"), 1.5, -5, "abc", True, [1], 10**18, {"max": 3}], ids=str
)
@pytest.mark.parametrize("later", [False, True], ids=["now", "awaited"])
async def test_an_estimate_that_is_no_number_of_tokens_is_refused(estimate: Any, later: bool) -> None:
    async def wait(ex: Exchange) -> Any:
        return estimate

    rule = TokenRule(estimate=wait if later else lambda ex: estimate)
    app = limited(streaming(EVENT), tokens={"/run": rule}, levels=[Level("org", key=by_claim("org"), limits="9/hour")])
    sent = await drive(app, "POST", "/run")
    assert (sent.status, sent.json()["error_code"]) == (422, "REQ_002")
    assert await used(app) == 0


async def test_an_outage_charges_a_level_once_for_each_request() -> None:
    store = Telling()
    clock = FrozenClock(START)
    level = Level("org", key=by_claim("org"), limits="1000/hour")
    app = limited(streaming(), clock, store=store, levels=[level], on_store_loss="local", expected_replicas=1)
    store.away = True
    for number in range(20):
        await drive(app, headers={"x-caller": f"user{number}@acme"})
    await store.return_()
    assert await used(app, "org-hour", caller="eve@acme") == 21


async def test_a_store_that_flaps_is_told_of_each_request_once() -> None:
    store = Telling()
    app = limited(streaming(), store=store, on_store_loss="local", expected_replicas=1)
    for _ in range(3):
        store.away = True
        for _ in range(3):
            await drive(app)
        await store.return_()
    assert await used(app, "hour") == 10


async def test_a_charge_that_may_have_been_made_is_not_made_again() -> None:
    store = Telling()
    app = limited(streaming(), store=store, on_store_loss="local", expected_replicas=1)
    store.away = True
    for _ in range(4):
        await drive(app)
    charge = store.charge

    async def unanswered(*arguments: Any) -> Any:
        await charge(*arguments)
        raise StoreUnavailableError("no answer")

    store.charge = unanswered  # type: ignore[method-assign]
    await store.return_()
    await store.return_()
    assert await used(app, "hour") == 5


async def test_a_stream_that_outlives_the_outage_is_charged_whole() -> None:
    store = Telling()
    clock = FrozenClock(START)
    inner = streaming(*[EVENT] * 400)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/run":
            await store.return_()
        await inner(scope, receive, send)

    under = limited(app, clock, store=store, on_store_loss="local", expected_replicas=1)
    store.away = True
    await drive(under, "POST", "/run")
    clock.advance(3)
    await drive(under)
    assert await used(under) == 400


async def test_what_was_reserved_in_an_outage_and_not_used_comes_back() -> None:
    store = Telling()
    app = limited(streaming(EVENT), store=store, on_store_loss="local", expected_replicas=1)
    store.away = True
    await drive(app, "POST", "/run")
    await store.return_()
    assert await used(app) == 1


async def test_a_late_report_that_did_not_reach_the_store_is_charged_later() -> None:
    store = Remote()
    clock = FrozenClock(START)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        if scope["path"] == "/report":
            report_tokens(scope, total_tokens=300)
            store.away = True

    under = limited(app, clock, store=store)
    await drive(under, "GET", "/report")
    store.away = False
    clock.advance(3)
    await drive(under)
    assert await used(under) == 300


async def test_a_name_is_never_the_short_form_of_another() -> None:
    store = FixedWindows()
    long = "x" * 5_000
    level = Level("org", key=by_claim("org"), limits="2/hour")
    app = limited(streaming(), store=store, levels=[level])
    seen = []

    admit = store.admit

    def watch(key: Any, *arguments: Any) -> Any:
        seen.append(key[1])
        return admit(key, *arguments)

    store.admit = watch  # type: ignore[method-assign]
    app = limited(streaming(), store=store, levels=[level])
    await drive(app, headers={"x-caller": f"ada@{long}"})
    assert (await drive(app, headers={"x-caller": f"eve@{seen[0].removeprefix('@org ')}"})).status == 200
    assert len(set(seen)) == 2
    assert len(seen[0]) < 100


async def test_a_policys_name_is_no_kind_of_key() -> None:
    store = FixedWindows()
    unnamed = limited(streaming(), store=store, key=lambda ex: "tenant")
    named = limited(streaming(), store=store, name="key", key=lambda ex: "tenant")
    other = limited(streaming(), store=store, name="key")
    await drive(unnamed)
    assert await used(named, "key-hour") == 1
    assert await used(other, "key-hour", caller="tenant") == 1


@pytest.mark.parametrize("value", [7, 1.5, True, ["a"], {"a": 1}], ids=str)
async def test_a_level_key_of_another_type_names_somebody(value: Any) -> None:
    level = Level("org", key=lambda ex: value, limits="2/hour", tier=lambda ex: value)
    app = limited(streaming(), levels=[level])
    assert [(await drive(app)).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(
    "levels",
    [
        [Level("tokens", key=by_claim("org"), limits="100/hour")],
        [
            Level("org", key=by_claim("org"), limits=Tier(tokens="9/hour")),
            Level("org-tokens", key=by_claim("org"), limits="9/hour"),
        ],
    ],
    ids=["as a tier's", "as another level's"],
)
async def test_names_of_windows_are_unique(levels: Any) -> None:
    with pytest.raises(ValidationError, match="headers tell windows apart"):
        RateLimit(tiers=HOUR, levels=levels)


async def test_the_headline_is_the_callers_own() -> None:
    app = limited(streaming(), levels=[Level("org", key=by_claim("org"), limits="20000/minute")])
    assert (await drive(app)).header("x-ratelimit-limit") == "1000"


@pytest.mark.parametrize("media", [b"text/plain", b"application/octet-stream", b"text/event-stream"])
async def test_the_rules_own_count_counts_any_body(media: bytes) -> None:
    rule = TokenRule(estimate=10, count=lambda part: len(part.split()), overrun="overdraw")
    app = limited(streaming(b"one two ", b"three", media=media), tokens={"/run": rule})
    await drive(app, "POST", "/run")
    assert await used(app) == 3


async def test_a_whole_body_is_counted_once() -> None:
    async def whole(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"13")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"a": "b c d"'})

    app = limited(whole, tokens={"/run": TokenRule(estimate=10, count=len)})
    await drive(app, "POST", "/run")
    assert await used(app) == 13


@pytest.mark.parametrize("count", [lambda part: 1 // 0, lambda part: -3, lambda part: float("nan"), lambda part: None])
async def test_a_count_that_fails_breaks_no_stream_and_costs_what_is_always_known(count: Any) -> None:
    app = limited(streaming(*[EVENT] * 30), tokens={"/run": TokenRule(estimate=10, count=count)})
    with structlog.testing.capture_logs() as logs:
        sent = await drive(app, "POST", "/run")
    assert sent.body == EVENT * 30
    assert len([log for log in logs if log["event"].startswith("rate_limit_count")]) == 1
    assert await used(app) == 30


async def test_a_principal_that_is_given_is_the_caller() -> None:
    seen = []

    class Look(Policy):
        def on_request(self, ex: Exchange) -> None:
            seen.append((ex.principal, ex.scope["user"]))

    await drive(PolicyStack(streaming(), policies=[Caller(), Look()]))
    assert seen[0][0] is seen[0][1]
    assert seen[0][0].subject == "ada"

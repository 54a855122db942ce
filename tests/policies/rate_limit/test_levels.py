"""Levels: limits that callers share, decided together with their own."""

from typing import Any

import http_sf
import pytest
from pydantic import ValidationError

from sigil_policy.core.exchange import Exchange, report_tokens
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import Level, RateLimit, Tier, TokenRule, by_claim, by_subject
from sigil_policy.stores.memory import FixedWindows
from sigil_policy.testing import FrozenClock, Sent, drive

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0


class Caller(Policy):
    """`x-caller: key/user@organisation` says who calls."""

    gives = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        name = ex.headers.get(b"x-caller")
        if name is not None:
            who, _, organisation = name.decode().partition("@")
            key, _, user = who.partition("/")
            claims = {"org": organisation} if organisation else {}
            ex.authenticate(Principal(user, kind=key, claims=claims))


USER = Level("user", key=by_subject, limits="4/minute")
ORGANISATION = Level(
    "organisation", key=by_claim("org"), limits=Tier(requests="6/minute", tokens="1000/calendar month")
)


def answering(used: int = 0) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if used:
            report_tokens(scope, total_tokens=used)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    return app


def limited(used: int = 0, **options: Any) -> PolicyStack:
    options.setdefault("tiers", {"free": "3/minute"})
    options.setdefault("levels", [USER, ORGANISATION])
    return PolicyStack(answering(used), policies=[Caller(), RateLimit(**options)], clock=FrozenClock(START))


async def ask(app: PolicyStack, caller: str, path: str = "/") -> Sent:
    return await drive(app, "POST", path, headers={"x-caller": caller})


def remaining(sent: Sent) -> dict[str, int]:
    value = sent.header("ratelimit")
    assert value is not None
    return {name: found["r"] for name, found in http_sf.parse(value.encode(), tltype="list")}


async def test_a_response_tells_the_windows_of_every_level() -> None:
    sent = await ask(limited(), "k1/alice@acme")
    assert remaining(sent) == {
        "minute": 2,
        "user-minute": 3,
        "organisation-minute": 5,
        "organisation-tokens-calendar-month": 1_000,
    }
    policy = dict(http_sf.parse((sent.header("ratelimit-policy") or "").encode(), tltype="list"))
    assert policy["organisation-tokens-calendar-month"] == {"q": 1_000, "w": 31 * 86_400, "qu": "tokens"}
    assert sent.header("x-ratelimit-remaining") == "2"


async def test_keys_share_their_user_and_users_their_organisation() -> None:
    app = limited()
    assert [(await ask(app, caller)).status for caller in ["k1/alice@acme"] * 3] == [200] * 3
    assert (await ask(app, "k1/alice@acme")).json()["violated_policies"] == ["minute"]
    assert (await ask(app, "k2/alice@acme")).status == 200
    assert (await ask(app, "k2/alice@acme")).json()["violated_policies"] == ["user-minute"]
    assert [(await ask(app, f"k{n}/bob@acme")).status for n in (3, 4, 5)] == [200, 200, 429]
    assert (await ask(app, "k6/bob@other")).status == 200


async def test_a_refusal_on_one_level_takes_nothing_on_another() -> None:
    app = limited(tiers={"free": "100/minute"}, levels=[Level("user", key=by_subject, limits="9/minute"), ORGANISATION])
    for _ in range(6):
        await ask(app, "k1/alice@acme")
    for _ in range(20):
        assert (await ask(app, "k2/bob@acme")).json()["violated_policies"] == ["organisation-minute"]
    assert remaining(await ask(app, "k2/bob@elsewhere"))["minute"] == 99
    assert remaining(await ask(app, "k1/alice@elsewhere"))["user-minute"] == 2


async def test_a_level_that_names_nobody_is_left_out() -> None:
    app = limited()
    assert list(remaining(await ask(app, "k1/alice"))) == ["minute", "user-minute"]
    assert list(remaining(await drive(app))) == ["minute"]


async def test_a_level_may_have_rows_by_tier() -> None:
    level = Level(
        "organisation", key=by_claim("org"), limits={"small": "5/minute", "large": "50/minute"},
        tier=lambda ex: "large" if ex.principal and ex.principal.claims["org"] == "acme" else None,
    )  # fmt: skip
    app = limited(levels=[level])
    assert remaining(await ask(app, "k/alice@acme"))["organisation-minute"] == 49
    assert remaining(await ask(app, "k/bob@tiny"))["organisation-minute"] == 4


async def test_tokens_are_reserved_and_settled_on_every_level() -> None:
    levels = [Level("organisation", key=by_claim("org"), limits=Tier(tokens="1000/hour"))]
    app = limited(
        used=120, tiers={"free": Tier(requests="99/minute", tokens=500)}, levels=levels, tokens={"/run": 300}
    )  # fmt: skip
    await ask(app, "k1/alice@acme", "/run")
    seen = remaining(await ask(app, "k2/bob@acme", "/run"))
    assert (seen["tokens-minute"], seen["organisation-tokens-hour"]) == (380, 760)


async def test_a_budget_of_the_organisation_refuses_and_names_itself() -> None:
    levels = [Level("organisation", key=by_claim("org"), limits=Tier(tokens="500/calendar month"))]
    app = limited(used=400, levels=levels, tokens={"/run": TokenRule(estimate=200)})
    assert (await ask(app, "k1/alice@acme", "/run")).status == 200
    refused = await ask(app, "k2/bob@acme", "/run")
    assert (refused.status, refused.json()["error_code"]) == (429, "CTX_003")
    assert refused.json()["violated_policies"] == ["organisation-tokens-calendar-month"]
    assert "500 tokens in a calendar month" in refused.json()["detail"]
    # 2023-12-01 comes 1,382,760 seconds after the evening of 2023-11-14.
    assert refused.header("retry-after") == str(1_701_388_800 - int(START))


async def test_nobody_can_name_a_level_of_somebody_else() -> None:
    """An address, a principal and a key of the application are never a level's bucket."""
    store = FixedWindows()
    app = limited(store=store)
    await ask(app, "k1/alice@acme")
    own = PolicyStack(
        answering(),
        policies=[RateLimit(tiers={"free": "6/minute"}, store=store, key=lambda ex: "@organisation acme")],
        clock=FrozenClock(START),
    )
    assert remaining(await drive(own))["minute"] == 5


async def test_the_same_value_on_two_levels_is_counted_on_each() -> None:
    levels = [
        Level("user", key=by_claim("org"), limits="6/minute"),
        Level("organisation", key=by_claim("org"), limits="6/minute"),
    ]
    app = limited(levels=levels)
    seen = remaining(await ask(app, "k/alice@acme"))
    assert (seen["user-minute"], seen["organisation-minute"]) == (5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [USER, USER]}, "same name"),
        ({"levels": [Level("u", key=by_subject, limits="1/minute")], "algorithm": "leaky"}, "algorithm"),
        ({"levels": [ORGANISATION], "algorithm": "gcra"}, "only the algorithm 'fixed' counts calendar months"),
        ({"levels": [ORGANISATION], "algorithm": "sliding"}, "only the algorithm 'fixed' counts calendar months"),
    ],
)
async def test_wrong_levels_fail_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RateLimit(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a b", by_subject, "1/minute"), "name 'a b'"),
        (("user", by_subject, {}), "empty table"),
        (("user", by_subject, "often"), "must be like"),
    ],
)
async def test_a_wrong_level_fails_at_construction(arguments: Any, message: str) -> None:
    name, key, limits = arguments
    with pytest.raises(ValidationError, match=message):
        Level(name, key=key, limits=limits)

"""RateLimit: windows and tokens in one decision, and what it tells the client."""

import json
from collections.abc import Awaitable
from typing import Any

import anyio
import http_sf
import pytest
import structlog
from pydantic import ValidationError

from sigil_policy.core.catalogue import SCOPE_INSUFFICIENT
from sigil_policy.core.exchange import Exchange, current_exchange, report_tokens
from sigil_policy.core.facts import Principal, Public, Quota, TokenUsage
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.rate_limit import RateLimit, Tier, TokenRule, by_address, by_principal
from sigil_policy.stores.limits import Decision, Lease, Plan
from sigil_policy.stores.memory import FixedWindows, Gcra
from sigil_policy.testing import FrozenClock, Sent, drive

pytestmark = pytest.mark.anyio

START = 1_700_000_040.0  # a whole minute
FREE = {"free": Tier(requests="3/second;20/minute", tokens=1_000)}
RUN = {"POST /run": TokenRule(estimate=100)}


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


def answering(
    status: int = 200, body: bytes = b"{}", headers: Any = ((b"content-type", b"application/json"),), used: int = 0
) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if used:
            report_tokens(scope, total_tokens=used)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "headers": []})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def stack(*policies: Policy, app: Any = None, clock: FrozenClock | None = None) -> PolicyStack:
    return PolicyStack(app or answering(), policies=policies, clock=clock or FrozenClock(START))


def limits(sent: Sent) -> dict[str, tuple[int, int]]:
    value = sent.header("ratelimit")
    assert value is not None
    return {name: (found["r"], found["t"]) for name, found in http_sf.parse(value.encode(), tltype="list")}


def policies(sent: Sent) -> dict[str, dict[str, Any]]:
    value = sent.header("ratelimit-policy")
    assert value is not None
    return dict(http_sf.parse(value.encode(), tltype="list"))


def fields(sent: Sent) -> tuple[str | None, ...]:
    return tuple(sent.header(f"x-ratelimit-{name}") for name in ("limit", "remaining", "reset", "window"))


# --- headers -------------------------------------------------------------------------------------------------------


async def test_a_response_tells_every_window_and_the_headline() -> None:
    """RL-01, RL-10, RL-11, RL-24 as the guidelines' table is shipped."""
    sent = await drive(stack(RateLimit()))
    assert fields(sent) == ("20", "19", "1700000100", "60")
    assert policies(sent) == {
        "second": {"q": 1, "w": 1},
        "minute": {"q": 20, "w": 60},
        "hour": {"q": 100, "w": 3600},
        "tokens-minute": {"q": 10_000, "w": 60, "qu": "tokens"},
    }
    assert limits(sent) == {"second": (0, 1), "minute": (19, 60), "hour": (99, 2760), "tokens-minute": (10_000, 60)}
    assert sent.header("retry-after") is None
    assert sent.header("x-tokens-remaining") is None


async def test_the_guidelines_tiers_are_the_default() -> None:
    table = {
        "free": (1, 20, 100, 10_000),
        "standard": (10, 100, 1_000, 100_000),
        "pro": (50, 500, 5_000, 500_000),
        "enterprise": (200, 2_000, 20_000, 2_000_000),
    }
    app = stack(Caller(), RateLimit())
    for tier, quotas in table.items():
        sent = await drive(app, headers={"x-caller": f"alice@{tier}"})
        assert tuple(policy["q"] for policy in policies(sent).values()) == quotas


async def test_rl_08_the_policy_is_stable_and_rl_10_t_never_exceeds_w() -> None:
    clock = FrozenClock(START + 0.3)
    app = stack(RateLimit(tiers={"free": "5/second;100/minute"}), clock=clock)
    seen = set()
    for _ in range(100):
        sent = await drive(app)
        seen.add(sent.header("ratelimit-policy"))
        for name, (_, seconds) in limits(sent).items():
            assert 0 <= seconds <= policies(sent)[name]["w"]
        if sent.status == 200:
            reset = int(sent.header("x-ratelimit-reset") or 0)
            assert reset - int(clock.time()) in (limits(sent)["minute"][1], limits(sent)["minute"][1] + 1)
        clock.advance(0.37)
    assert len(seen) == 1


async def test_429_describes_the_window_that_refused() -> None:
    """RL-15, RL-23, RL-24."""
    clock = FrozenClock(START + 20.25)
    app = stack(RateLimit(tiers={"free": "2/minute;3/hour"}), clock=clock)
    for _ in range(2):
        assert (await drive(app)).status == 200
    sent = await drive(app)
    assert sent.status == 429
    assert fields(sent) == ("2", "0", "1700000100", "60")
    assert sent.header("retry-after") == "40"
    assert limits(sent)["minute"] == (0, 40)
    assert sent.header("cache-control") == "no-store"
    body = sent.json()
    assert body["error_code"] == "RATE_001"
    assert (body["limit"], body["window"], body["unit"], body["retry_after"]) == (2, 60, "requests", 40)
    assert set(body["violated_policies"]) == {"minute"} <= set(policies(sent))
    clock.advance(40)
    assert (await drive(app)).status == 200
    sent = await drive(app)
    assert sent.json()["violated_policies"] == ["hour"]
    assert fields(sent) == ("3", "0", "1700002800", "3600")


@pytest.mark.parametrize("algorithm", ["fixed", "sliding", "gcra"])
async def test_retry_after_is_true(algorithm: Any) -> None:
    """RL-15: waiting as long as told is enough, whatever the algorithm; and it is never 0."""
    clock = FrozenClock(START + 0.4)
    app = stack(RateLimit(tiers={"free": "2/second;7/minute"}, algorithm=algorithm), clock=clock)
    for _ in range(40):
        sent = await drive(app)
        if sent.status == 429:
            wait = int(sent.header("retry-after") or 0)
            assert wait >= 1
            assert wait >= max(limits(sent)[name][1] for name in sent.json()["violated_policies"])
            clock.advance(wait)
            assert (await drive(app)).status == 200
        clock.advance(0.11)


async def test_rl_16_a_long_window_that_drains_does_not_invite_a_burst() -> None:
    """r / t is never above q / w: not 999 in one second for 1000 in 1000."""
    app = stack(RateLimit(tiers={"free": "1000 per 1000 seconds"}, algorithm="gcra"))
    for _ in range(3):
        remaining, seconds = limits(await drive(app))["1000-seconds"]
        assert remaining / seconds <= 1000 / 990


async def test_the_headline_can_be_another_window() -> None:
    sent = await drive(stack(RateLimit(headline="hour")))
    assert fields(sent)[::3] == ("100", "3600")
    sent = await drive(stack(RateLimit(tiers={"free": "5/second;9/day"})))
    assert fields(sent)[::3] == ("9", "86400")


async def test_each_kind_of_header_can_be_left_out() -> None:
    sent = await drive(stack(RateLimit(x_headers=False)))
    assert fields(sent) == (None,) * 4
    assert sent.header("ratelimit") is not None
    sent = await drive(stack(RateLimit(draft=None)))
    assert sent.header("ratelimit") is sent.header("ratelimit-policy") is None
    assert fields(sent)[0] == "20"
    app = stack(RateLimit(tiers={"free": "1/minute"}, x_headers=False, draft=None))
    await drive(app)
    sent = await drive(app)
    assert sent.status == 429
    assert sent.header("retry-after") == "60"


@pytest.mark.parametrize(("option", "sent_there"), [(True, True), (False, False)])
async def test_rl_14_redirects_can_do_without(option: bool, sent_there: bool) -> None:
    app = stack(RateLimit(on_redirects=option), app=answering(307))
    assert ((await drive(app)).header("ratelimit") is not None) is sent_there
    app = stack(RateLimit(on_redirects=option), app=answering(304, b""))
    assert (await drive(app)).header("ratelimit") is not None


async def test_the_applications_own_retry_after_stays() -> None:
    app = stack(RateLimit(), app=answering(503, headers=[(b"retry-after", b"7")]))
    assert (await drive(app)).header("retry-after") == "7"


async def test_rl_29_fields_of_the_application_are_kept_and_added_to() -> None:
    app = stack(
        RateLimit(tiers={"free": "20/minute"}),
        app=answering(headers=[(b"RateLimit-Policy", b'"up";q=5;w=1'), (b"ratelimit", b'"up";r=4;t=1')]),
    )
    sent = await drive(app)
    assert sent.header("ratelimit-policy") == '"up";q=5;w=1, "minute";q=20;w=60'
    assert sent.header("ratelimit") == '"up";r=4;t=1, "minute";r=19;t=60'
    assert fields(sent)[0] == "20"


async def test_rl_11_names_stay_unique_beside_those_of_the_application() -> None:
    app = stack(RateLimit(tiers={"free": "20/minute"}), app=answering(headers=[(b"ratelimit", b'"minute";r=4;t=1')]))
    sent = await drive(app)
    assert sent.header("ratelimit") == '"minute";r=4;t=1, "minute-2";r=19;t=60'
    assert sent.header("ratelimit-policy") == '"minute-2";q=20;w=60'


async def test_an_older_drafts_field_is_left_alone() -> None:
    app = stack(RateLimit(), app=answering(headers=[(b"ratelimit", b"limit=100, remaining=50, reset=5")]))
    sent = await drive(app)
    assert sent.header("ratelimit") == "limit=100, remaining=50, reset=5"
    assert sent.header("ratelimit-policy") is None


@pytest.mark.parametrize(("theirs", "expected"), [(b"4", "4"), (b"400", "19"), (b"soon", "soon")])
async def test_x_fields_describe_what_leaves_fewer_requests(theirs: bytes, expected: str) -> None:
    own = [(b"x-ratelimit-limit", b"500"), (b"x-ratelimit-remaining", theirs)]
    sent = await drive(stack(RateLimit(), app=answering(headers=own)))
    assert sent.header("x-ratelimit-remaining") == expected
    assert len(sent.header_lines("x-ratelimit-limit")) == 1


# --- who is counted --------------------------------------------------------------------------------------------------


async def used(app: PolicyStack, **request: Any) -> int:
    sent = await drive(app, **request)
    return 20 - int(sent.header("x-ratelimit-remaining") or 0)


async def test_principals_are_counted_apart_and_the_anonymous_by_address() -> None:
    app = stack(Caller(), RateLimit(tiers=FREE))
    assert await used(app, headers={"x-caller": "alice"}) == 1
    assert await used(app, headers={"x-caller": "bob"}) == 1
    assert await used(app, headers={"x-caller": "alice"}, client=("198.51.100.1", 1)) == 2
    assert await used(app) == 1
    assert await used(app, client=("198.51.100.1", 1)) == 1
    assert await used(app, client=("203.0.113.7", 60_000)) == 2


async def test_a_subject_that_looks_like_an_address_is_somebody_else() -> None:
    app = stack(Caller(), RateLimit(tiers=FREE))
    for subject in ("ip4-203.0.113.7", "203.0.113.7", "overflow anonymous"):
        assert await used(app, headers={"x-caller": subject}) == 1
    assert await used(app) == 1


async def test_an_ipv6_network_is_one_caller() -> None:
    app = stack(RateLimit(tiers=FREE))
    assert [await used(app, client=(f"2001:db8::{n}", 1)) for n in range(3)] == [1, 2, 3]
    app = stack(RateLimit(tiers=FREE, ipv6_prefix=128))
    assert [await used(app, client=(f"2001:db8::{n}", 1)) for n in range(3)] == [1, 1, 1]


async def test_forwarded_addresses_count_only_behind_trusted_proxies() -> None:
    spoof = {"x-forwarded-for": "198.51.100.1"}
    app = stack(RateLimit(tiers=FREE))
    assert [await used(app, headers=spoof), await used(app)] == [1, 2]
    app = stack(RateLimit(tiers=FREE, trusted_proxies=("10.0.0.0/8",)))
    behind: Any = {"client": ("10.0.0.1", 1)}
    assert await used(app, headers={"x-forwarded-for": "9.9.9.9, 198.51.100.1"}, **behind) == 1
    assert await used(app, headers={"x-forwarded-for": "8.8.8.8, 198.51.100.1"}, **behind) == 2
    assert await used(app, headers={"x-forwarded-for": "198.51.100.2"}, **behind) == 1
    assert await used(app, headers=spoof) == 1
    assert await used(app) == 2


async def test_behind_a_unix_socket_the_proxy_is_trusted_by_name() -> None:
    app = stack(RateLimit(tiers=FREE, trusted_proxies=("unix",)))
    for address in ("198.51.100.1", "198.51.100.2"):
        assert await used(app, headers={"x-forwarded-for": address}, client=None) == 1
    assert await used(stack(RateLimit(tiers=FREE)), client=None) == 1


async def test_many_addresses_keep_their_own_counters() -> None:
    """More than are remembered."""
    app = stack(RateLimit(tiers=FREE))
    for _ in range(2):
        for number in range(1_100):
            await drive(app, client=(f"10.0.{number // 250}.{number % 250}", 1))
    assert await used(app, client=("10.0.0.0", 1)) == 3


async def test_the_key_is_one_function() -> None:
    def by_tenant(ex: Exchange) -> str | None:
        return None if ex.principal is None else ex.principal.subject.split("/")[0]

    app = stack(Caller(), RateLimit(tiers=FREE, key=by_tenant))
    assert [await used(app, headers={"x-caller": f"acme/{n}"}) for n in range(3)] == [1, 2, 3]
    assert await used(app) == 1
    long = "a" * 5_000
    assert [await used(app, headers={"x-caller": long + str(n)}) for n in range(2)] == [1, 1]


async def test_tiers_come_from_the_principal() -> None:
    tiers = {"free": "20/minute", "pro": "500/minute"}
    app = stack(Caller(), RateLimit(tiers=tiers))
    assert fields(await drive(app, headers={"x-caller": "alice@pro"}))[:2] == ("500", "499")
    assert fields(await drive(app, headers={"x-caller": "alice@free"}))[:2] == ("20", "18")
    assert fields(await drive(app))[:2] == ("20", "19")
    app = stack(Caller(), RateLimit(tiers=tiers, anonymous_tier="pro"))
    assert fields(await drive(app))[0] == "500"


async def test_an_unknown_tier_is_the_default_one_and_logged_once() -> None:
    app = stack(Caller(), RateLimit(tiers={"free": "20/minute", "basic": "30/minute"}, default_tier="basic"))
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            for name in ("alice@gold", "alice", "alice@" + "x" * 500):
                assert fields(await drive(app, headers={"x-caller": name}))[0] == "30"
        for number in range(300):
            await drive(app, headers={"x-caller": f"alice@{number}"})
    assert [log["tier"] for log in logs[:3]] == ["gold", None, "x" * 64]
    assert len(logs) == 100


async def test_public_routes_preflights_and_exempt_routes_are_not_counted() -> None:
    """RL-26."""
    app = stack(Open(), RateLimit(tiers=FREE, exempt=["GET /health"]))
    preflight = {"origin": "https://a.example", "access-control-request-method": "PUT"}
    for method, path, headers in (
        ("GET", "/public/x", {}),
        ("GET", "/health", {}),
        ("HEAD", "/health", {}),
        ("OPTIONS", "/v7/agents", preflight),
    ):
        sent = await drive(app, method, path, headers=headers)
        assert sent.header("ratelimit") is sent.header("x-ratelimit-limit") is None
    assert await used(app, method="OPTIONS") == 1
    assert await used(app, method="POST", path="/health") == 2


async def test_a_websocket_counts_by_its_handshake() -> None:
    app = stack(RateLimit(tiers={"free": "1/minute"}))
    sent = await drive(app, kind="websocket")
    assert [message["type"] for message in sent.messages] == ["websocket.accept", "websocket.close"]
    assert sent.header("x-ratelimit-remaining") == "0"
    sent = await drive(app, kind="websocket")
    assert sent.messages[0]["type"] == "websocket.http.response.start"
    assert sent.status == 429
    assert sent.header("retry-after") == "60"
    sent = await drive(app, kind="websocket", scope={"extensions": {}})
    assert [(message["type"], message["code"]) for message in sent.messages] == [("websocket.close", 1013)]


async def test_a_head_request_counts() -> None:
    app = stack(RateLimit(tiers=FREE))
    assert [await used(app, method="HEAD") for _ in range(2)] == [1, 2]


async def test_a_refusal_by_an_inner_policy_has_counted_and_carries_the_fields() -> None:
    app = stack(RateLimit(tiers=FREE), Deny())
    sent = await drive(app)
    assert sent.status == 403
    assert fields(sent)[1] == "19"


async def test_a_refusal_by_an_outer_policy_does_not_count() -> None:
    limit = RateLimit(tiers=FREE)
    await drive(stack(Deny(), limit))
    assert await used(stack(limit)) == 1


# --- costs ---------------------------------------------------------------------------------------------------------


async def test_costs_by_route() -> None:
    app = stack(RateLimit(tiers={"free": "20/minute"}, costs={"POST /search": 5, "/free": 0, "/v7/**": 2}))
    routes = [("GET", "/"), ("POST", "/search"), ("GET", "/search"), ("GET", "/free"), ("GET", "/v7/agents")]
    spent = [await used(app, method=method, path=path) for method, path in routes]
    assert spent == [1, 6, 7, 7, 9]


async def test_the_tables_are_independent_of_each_other() -> None:
    limit = RateLimit(
        tiers={"free": Tier(requests="20/minute", tokens=1_000)},
        costs={"/v7/**": 2, "GET /v7/agents/{name}": 3},
        tokens={"POST /v7/agents/{name}/run": 100, "POST /v7/x/**": 50},
        exempt=["/v7/status/**"],
    )
    table = limit.rules()
    found = {route: (rule.cost, rule.tokens and rule.tokens.estimate) for route, rule in table.items()}
    assert found["POST /v7/agents/{_}/run"] == (2, 100)
    assert found["/v7/**"] == (2, None)
    assert found["GET /v7/agents/{_}"] == (3, None)
    assert found["POST /v7/x/**"] == (2, 50)
    assert found["/v7/status/**"] == (0, None)
    app = stack(limit)
    assert await used(app, method="POST", path="/v7/agents/a/run") == 2
    assert await used(app, method="GET", path="/v7/agents/a") == 5
    assert (await drive(app, path="/v7/status/x")).header("ratelimit") is None


# --- tokens --------------------------------------------------------------------------------------------------------


def tokens(sent: Sent) -> tuple[str | None, str | None]:
    return sent.header("x-tokens-used"), sent.header("x-tokens-remaining")


async def left(app: PolicyStack) -> int:
    """What remains of the budget, asked on a route that spends nothing."""
    return limits(await drive(app, path="/status"))["tokens-minute"][0]


BIG = {"free": Tier(requests="1000/minute", tokens=1_000)}


@pytest.mark.parametrize(
    ("body", "total"),
    [
        (b'{"metadata": {"tokens_used": {"total_tokens": 40, "input_tokens": 10, "output_tokens": 30}}}', 40),
        (b'{"usage": {"total_tokens": 70}}', 70),
        (b'{"usage": {"total_tokens": 0}}', 0),
    ],
)
async def test_usage_is_read_from_json(body: bytes, total: int) -> None:
    app = stack(RateLimit(tiers=BIG, tokens=RUN), app=answering(body=body))
    sent = await drive(app, "POST", "/run")
    assert tokens(sent) == (str(total), str(1_000 - total))
    assert limits(sent)["tokens-minute"][0] == 1_000 - total
    assert sent.body == body
    assert await left(app) == 1_000 - total


@pytest.mark.parametrize(
    "body",
    [
        b'{"usage": {"total_tokens": true}}',
        b'{"usage": {"total_tokens": -5}}',
        b'{"usage": {"total_tokens": 1e3}}',
        b'{"usage": [{"total_tokens": 5}]}',
        b'{"usage": {"total_tokens": "5"}}',
        b'{"total_tokens": 5',
        b"[" * 30_000 + b'"total_tokens"',
        b'{"usage": {"total_tokens": ' + b"9" * 5_000 + b"}}",
    ],
    ids=["bool", "negative", "float", "list", "string", "cut", "deep", "long"],
)
async def test_what_is_no_usage_is_charged_by_the_bytes_of_the_body(body: bytes) -> None:
    app = stack(
        RateLimit(tiers={"free": Tier(requests="9/minute", tokens=10_000)}, tokens=RUN), app=answering(body=body)
    )
    assert tokens(await drive(app, "POST", "/run")) == (None, "9900")
    assert await left(app) == 10_000 - -(-len(body) // 4)


async def test_only_routes_with_a_rule_are_read() -> None:
    app = stack(RateLimit(tiers=BIG, tokens=RUN), app=answering(body=b'{"usage": {"total_tokens": 70}}'))
    assert tokens(await drive(app, "GET", "/run")) == (None, None)
    assert await left(app) == 1_000


async def test_usage_is_read_from_paths_of_the_rule() -> None:
    rule = TokenRule(estimate=100, usage=("meta.spent",))
    app = stack(RateLimit(tiers=BIG, tokens={"/run": rule}), app=answering(body=b'{"meta": {"spent": 7}}'))
    assert tokens(await drive(app, "POST", "/run")) == ("7", "993")


@pytest.mark.parametrize("media", [b"application/json", b"text/plain"])
async def test_a_report_of_the_application_counts_before_anything_else(media: bytes) -> None:
    app = stack(
        RateLimit(tiers=BIG, tokens=RUN),
        app=answering(
            body=b'{"usage": {"total_tokens": 70}}',
            headers=[(b"content-type", media), (b"x-tokens-used", b"5")],
            used=150,
        ),
    )
    assert tokens(await drive(app, "POST", "/run")) == ("150", "850")
    assert await left(app) == 850


async def test_a_report_on_a_route_without_a_rule_is_charged() -> None:
    app = stack(RateLimit(tiers=BIG), app=answering(used=30))
    await drive(app)
    assert await left(app) == 970


@pytest.mark.parametrize(
    ("option", "name", "stays"), [("X-Tokens-Used", b"x-tokens-used", True), ("LLM-Usage", b"llm-usage", False)]
)
async def test_usage_is_read_from_a_response_header(option: str, name: bytes, stays: bool) -> None:
    app = stack(
        RateLimit(tiers=BIG, tokens=RUN, usage_header=option),
        app=answering(headers=[(name, b"33"), (b"content-type", b"text/plain")]),
    )
    sent = await drive(app, "POST", "/run")
    assert tokens(sent) == ("33", "967")
    assert (sent.header(name.decode()) is not None) is stays
    assert await left(app) == 967


async def test_an_estimate_is_reserved_while_the_request_runs() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ex = current_exchange()
        assert ex is not None
        seen.append(ex[Quota].tokens[0].remaining)
        await answering(body=b'{"usage": {"total_tokens": 20}}')(scope, receive, send)

    under = stack(RateLimit(tiers=BIG, tokens=RUN), app=app)
    for _ in range(3):
        await drive(under, "POST", "/run")
    assert seen == [900, 880, 860]


async def test_the_budget_refuses_what_does_not_fit_now() -> None:
    clock = FrozenClock(START + 12)
    app = stack(RateLimit(tiers=BIG, tokens={"/run": 600}), app=answering(used=600), clock=clock)
    assert (await drive(app, "POST", "/run")).status == 200
    sent = await drive(app, "POST", "/run")
    assert sent.status == 429
    body = sent.json()
    assert (body["error_code"], body["limit"], body["window"], body["unit"]) == ("CTX_003", 1_000, 60, "tokens")
    assert body["violated_policies"] == ["tokens-minute"]
    assert sent.header("retry-after") == "48"
    assert sent.header("x-tokens-remaining") == "400"
    assert fields(sent) == ("1000", "400", "1700000100", "60")
    assert limits(sent)["minute"][0] == 999  # a refused request has used no request either
    clock.advance(48)
    assert (await drive(app, "POST", "/run")).status == 200


async def test_an_estimate_that_never_fits_is_refused_for_good() -> None:
    def wanted(ex: Exchange) -> int:
        return int(ex.headers[b"x-max"])

    app = stack(RateLimit(tiers=BIG, tokens={"/run": TokenRule(estimate=wanted)}))
    sent = await drive(app, "POST", "/run", headers={"x-max": "1001"})
    assert sent.status == 422
    assert sent.json()["error_code"] == "CTX_004"
    assert sent.json()["required"] == 1_001
    assert sent.header("retry-after") is None
    assert limits(await drive(app))["minute"][0] == 999
    assert (await drive(app, "POST", "/run", headers={"x-max": "1000"})).status == 200


async def test_an_estimate_may_be_awaited_and_read_the_body() -> None:
    async def by_max_tokens(ex: Exchange) -> int | None:
        return json.loads(await ex.body(10_000)).get("max_tokens")

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await answering(body=body)(scope, receive, send)

    app = stack(RateLimit(tiers=BIG, tokens={"/run": TokenRule(estimate=by_max_tokens)}), app=echo)
    sent = await drive(app, "POST", "/run", body=b'{"max_tokens": 300}')
    assert sent.body == b'{"max_tokens": 300}'
    assert tokens(sent) == (None, "700")
    # 5 tokens for the 19 bytes of the first response.
    assert tokens(await drive(app, "POST", "/run", body=b"{}")) == (None, "995")
    assert (await drive(app, "POST", "/run", body=b'{"max_tokens": 3000}')).status == 422


async def test_without_an_estimate_requests_pass_until_nothing_remains() -> None:
    app = stack(
        RateLimit(tiers=BIG, tokens={"/run": TokenRule()}), app=answering(body=b'{"usage": {"total_tokens": 700}}')
    )
    assert tokens(await drive(app, "POST", "/run")) == ("700", "300")
    assert tokens(await drive(app, "POST", "/run")) == ("700", "0")
    sent = await drive(app, "POST", "/run")
    assert sent.status == 429
    assert tokens(sent) == (None, "0")
    # The token windows gate no other route.
    assert (await drive(app, "GET", "/status")).status == 200
    assert limits(await drive(app, "GET", "/status"))["tokens-minute"] == (0, 60)  # RL-09: clamped


async def test_a_late_report_is_charged_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        report_tokens(scope, total_tokens=30)
        await answering(body=b'{"usage": {"total_tokens": 30}}')(scope, receive, send)
        if scope["path"] == "/run":
            report_tokens(scope, total_tokens=12)  # a background task

    under = stack(RateLimit(tiers=BIG, tokens=RUN), app=app)
    assert tokens(await drive(under, "POST", "/run")) == ("30", "970")
    assert await left(under) == 958


async def test_a_whole_response_is_settled_before_it_leaves() -> None:
    """A client that comes back at once does not meet its own reservation, though a background task still runs."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answering(body=b'{"usage": {"total_tokens": 30}}')(scope, receive, send)
        if scope["path"] == "/run":
            seen.append(await left(under))

    under = stack(RateLimit(tiers=BIG, tokens=RUN), app=app)
    await drive(under, "POST", "/run")
    assert seen == [970]


# --- every kind of ending ------------------------------------------------------------------------------------------


def failing(after: int, *, status: int = 200, reported: int = 0, error: BaseException | None = None) -> Any:
    """Sends `after` messages of a stream, then raises."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/run":
            await answering()(scope, receive, send)
            return
        messages = [
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/event-stream")]},
            *({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True} for _ in range(3)),
        ]
        for message in messages[:after]:
            await send(message)
        if reported:
            report_tokens(scope, total_tokens=reported)
        raise error or RuntimeError("broken")

    return app


@pytest.mark.parametrize(
    ("app", "charged"),
    [
        pytest.param(failing(0), 0, id="error before anything"),
        pytest.param(failing(1), 0, id="error after the head"),
        pytest.param(failing(3), 2, id="error in mid-stream, nothing told"),
        pytest.param(failing(2, reported=17), 17, id="error in mid-stream, what was produced is known"),
        pytest.param(failing(0, reported=17), 17, id="error before anything, but tokens were used"),
        pytest.param(failing(2, status=500), 0, id="an error response of the application"),
        pytest.param(failing(0, error=TimeoutError()), 0, id="timeout"),
    ],
)
async def test_every_ending_settles(app: Any, charged: int) -> None:
    under = stack(RateLimit(tiers=BIG, tokens=RUN), app=app)
    sent = await drive(under, "POST", "/run", raise_errors=False)
    assert sent.error is not None
    assert await left(under) == 1_000 - charged


async def test_an_error_response_is_not_charged_and_a_body_without_usage_is() -> None:
    for status, body, charged in ((500, b"{}", 0), (404, b"{}", 0), (200, b"", 0), (204, b"", 0), (201, b"{}", 1)):
        under = stack(RateLimit(tiers=BIG, tokens=RUN), app=answering(status, body))
        await drive(under, "POST", "/run")
        assert await left(under) == 1_000 - charged, status


@pytest.mark.parametrize(("produced", "charged"), [(0, 0), (1, 0), (2, 1)])
async def test_a_cancelled_request_settles(produced: int, charged: int) -> None:
    async def hang(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/run":
            await answering()(scope, receive, send)
            return
        messages: list[Any] = [
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]},
            {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True},
        ]
        for message in messages[:produced]:
            await send(message)
        scope["cancel"].cancel()
        await anyio.sleep_forever()

    under = stack(RateLimit(tiers=BIG, tokens=RUN), app=hang)
    with anyio.CancelScope() as cancelling:
        await drive(under, "POST", "/run", scope={"cancel": cancelling})
    assert cancelling.cancelled_caught
    assert await left(under) == 1_000 - charged


# Whether a body message whose `send` raised has reached the client is not known.
@pytest.mark.parametrize(("allowed", "charged"), [(0, {0}), (1, {0, 1}), (2, {1, 2})])
async def test_a_client_that_leaves_settles(allowed: int, charged: set[int]) -> None:
    sent_so_far = 0

    def break_after(message: Any) -> None:
        nonlocal sent_so_far
        sent_so_far += 1
        if sent_so_far > allowed:
            raise OSError("gone")

    under = stack(RateLimit(tiers=BIG, tokens=RUN), app=failing(4))
    await drive(under, "POST", "/run", on_send=break_after, raise_errors=False)
    assert 1_000 - await left(under) in charged


async def test_an_inner_refusal_gives_the_reservation_back() -> None:
    limit = RateLimit(tiers=BIG, tokens=RUN)
    assert (await drive(stack(limit, Deny()), "POST", "/run")).status == 403
    assert await left(stack(limit)) == 1_000


async def test_a_window_that_rolled_meanwhile_is_not_refunded_into() -> None:
    clock = FrozenClock(START + 59)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/run":
            clock.advance(2)
        await answering(500)(scope, receive, send)

    app = stack(RateLimit(tiers=BIG, tokens={"/run": 900}), app=slow, clock=clock)
    await drive(app, "POST", "/run")
    assert await left(app) == 1_000


def streaming(*events: bytes, media: bytes = b"text/event-stream") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/run":
            await answering()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media)]})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


LONG_EVENT = b"data: " + b"x" * 5_000 + b"\n\n"


@pytest.mark.parametrize(
    ("events", "charged"),
    [
        pytest.param([b'data: {"usage": {"total_tokens": 42}}\n\n', b"data: [DONE]\n\n"], 42, id="last but one"),
        pytest.param([b'data: {"usa', b'ge": {"total_tokens": 42}}\r\n\r\n'], 42, id="cut in two"),
        pytest.param([b'data:{"usage":{"total_tokens":%d}}\n\n' % total for total in (1, 9)], 9, id="newest"),
        pytest.param([LONG_EVENT] * 20 + [b'data: {"usage": {"total_tokens": 42}}\n\n'], 42, id="long"),
        pytest.param([b"data: hello\n\n"], 1, id="nothing told: what was counted"),
    ],
)  # fmt: skip
async def test_usage_is_read_from_the_last_events_of_a_stream(events: list[bytes], charged: int) -> None:
    app = stack(RateLimit(tiers=BIG, tokens=RUN), app=streaming(*events))
    sent = await drive(app, "POST", "/run")
    assert sent.body == b"".join(events)
    assert len(sent.messages) == len(events) + 2
    assert tokens(sent) == (None, "900")
    assert await left(app) == 1_000 - charged


async def test_the_usage_that_was_read_is_a_fact_for_others() -> None:
    seen = []

    class Log(Policy):
        def on_finish(self, ex: Exchange) -> None:
            seen.append(ex.get(TokenUsage))

    body = b'{"usage": {"input_tokens": 10, "output_tokens": 32, "total_tokens": 42}}'
    await drive(stack(Log(), RateLimit(tiers=BIG, tokens=RUN), app=answering(body=body)), "POST", "/run")
    assert seen == [TokenUsage(10, 32, 42)]


# --- two in one stack ----------------------------------------------------------------------------------------------


async def test_one_per_address_outside_and_one_per_principal_inside() -> None:
    app = stack(
        RateLimit(name="address", key=by_address, tiers={"free": "4/minute"}),
        Caller(),
        RateLimit(tiers={"free": "3/minute"}),
    )
    sent = await drive(app, headers={"x-caller": "alice"})
    assert fields(sent)[:2] == ("3", "2")
    assert list(limits(sent)) == ["minute", "address-minute"]
    assert list(policies(sent)) == ["minute", "address-minute"]
    for name in ("alice", "bob"):
        sent = await drive(app, headers={"x-caller": name})
    assert fields(sent)[:2] == ("4", "1")  # one more from this address; bob alone would have two
    assert (await drive(app, headers={"x-caller": "alice"})).status == 200
    sent = await drive(app, headers={"x-caller": "carol"})
    assert sent.status == 429
    assert sent.json()["violated_policies"] == ["address-minute"]
    assert list(limits(sent)) == ["address-minute"]


async def test_the_inner_refusal_keeps_its_own_fields() -> None:
    app = stack(
        RateLimit(name="address", key=by_address, tiers={"free": "4/minute"}),
        Caller(),
        RateLimit(tiers={"free": "1/minute"}),
    )
    for _ in range(2):
        sent = await drive(app, headers={"x-caller": "alice"})
    assert sent.status == 429
    assert fields(sent)[:2] == ("1", "0")
    assert list(limits(sent)) == ["minute", "address-minute"]
    assert len(sent.header_lines("retry-after")) == 1


async def test_two_alike_count_apart_and_keep_their_names_apart() -> None:
    app = stack(RateLimit(tiers=FREE), RateLimit(tiers=FREE))
    sent = await drive(app)
    assert fields(sent)[:2] == ("20", "19")
    assert list(limits(sent)) == [
        "second", "minute", "tokens-minute", "second-2", "minute-2", "tokens-minute-2",
    ]  # fmt: skip
    assert set(limits(sent)) == set(policies(sent))


async def test_who_reads_the_principal_belongs_inside_the_authentication() -> None:
    with pytest.raises(PolicyOrderError, match="RateLimit"):
        stack(RateLimit(), Caller())
    assert stack(RateLimit(key=by_address), Caller())


# --- the store -----------------------------------------------------------------------------------------------------


async def test_policies_share_counters_by_sharing_a_store() -> None:
    store = FixedWindows()
    one, other = (stack(RateLimit(tiers=FREE, store=store)) for _ in range(2))
    assert [await used(one), await used(other)] == [1, 2]
    named = stack(RateLimit(tiers=FREE, store=store, name="admin"))
    assert await used(named) == 1
    assert await used(stack(RateLimit(tiers=FREE))) == 1


class Remote:
    """A store on another machine, as far as a policy can tell: every answer is awaited."""

    remote = True
    algorithms = frozenset(("fixed",))

    def __init__(self) -> None:
        self.inner = FixedWindows()
        self.closed = False
        self.calls: list[str] = []

    def prepare(self, plan: Plan) -> None:
        self.inner.prepare(plan)

    async def admit(self, key: Any, plan: Plan, cost: int, estimate: Any, now: float) -> Decision:
        await anyio.lowlevel.checkpoint()
        self.calls.append("admit")
        return self.inner.admit(key, plan, cost, estimate, now)

    async def extend(self, lease: Lease, more: tuple[int, ...], now: float) -> tuple[int, ...] | None:
        await anyio.lowlevel.checkpoint()
        self.calls.append("extend")
        return self.inner.extend(lease, more, now)

    async def settle(self, lease: Lease, used: tuple[int, ...], now: float) -> tuple[int, ...]:
        await anyio.lowlevel.checkpoint()
        self.calls.append("settle")
        return self.inner.settle(lease, used, now)

    async def charge(self, key: Any, plan: Plan, amounts: tuple[int, ...], now: float) -> tuple[int, ...]:
        await anyio.lowlevel.checkpoint()
        self.calls.append("charge")
        return self.inner.charge(key, plan, amounts, now)

    async def aclose(self) -> None:
        self.closed = True


async def test_a_store_may_be_awaited() -> None:
    store = Remote()
    app = stack(RateLimit(tiers=BIG, tokens=RUN, store=store), app=answering(body=b'{"usage": {"total_tokens": 30}}'))
    assert tokens(await drive(app, "POST", "/run")) == ("30", "970")
    assert store.calls == ["admit", "settle"]
    assert await left(app) == 970
    assert store.calls == ["admit", "settle", "admit"]
    with pytest.raises(RuntimeError):
        await drive(stack(RateLimit(tiers=BIG, tokens=RUN, store=store), app=failing(2)), "POST", "/run")
    assert await left(app) == 969
    await app.aclose()
    assert store.closed


async def test_a_remote_refusal_and_an_awaited_estimate() -> None:
    async def estimate(ex: Exchange) -> int:
        await anyio.lowlevel.checkpoint()
        return 700

    app = stack(
        RateLimit(tiers=BIG, tokens={"/run": TokenRule(estimate=estimate)}, store=Remote()), app=answering(used=700)
    )
    assert [(await drive(app, "POST", "/run")).status for _ in range(2)] == [200, 429]


async def test_the_quota_is_known_to_the_endpoint() -> None:
    found: list[Quota] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ex: Exchange = scope["sigil_policy"]
        found.append(ex[Quota])
        await answering()(scope, receive, send)

    await drive(stack(RateLimit(), app=app))
    (quota,) = found
    assert quota.tier == "free"
    assert [window.name for window in quota.requests] == ["second", "minute", "hour"]
    (budget,) = quota.tokens
    assert budget == ("tokens-minute", "tokens", 10_000, 10_000, START + 60, 60)


async def test_rl_17_retry_after_can_be_spread() -> None:
    app = stack(RateLimit(tiers={"free": "1/minute"}, retry_spread=30))
    await drive(app)
    waits = {int((await drive(app)).header("retry-after") or 0) for _ in range(200)}
    assert min(waits) >= 60
    assert max(waits) <= 90
    assert len(waits) > 10


async def test_the_status_of_a_stream_is_not_delayed() -> None:
    """Each message leaves before the next is made, also on a route with a token rule."""
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(3):
            order.append(f"made {number}")
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": number < 2})

    await drive(
        stack(RateLimit(tiers=BIG, tokens=RUN), app=app), "POST", "/run", on_send=lambda m: order.append(m["type"][14:])
    )
    assert order == ["start", "made 0", "body", "made 1", "body", "made 2", "body"]


# --- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": {}}, "tiers is empty"),
        ({"tiers": {"free": "ten per minute"}}, "must be like '10/second;100/minute'"),
        ({"tiers": {"free": "-1/minute"}}, "must be like"),
        ({"tiers": {"free": "0/minute"}}, "a limit is 1 to"),
        ({"tiers": {"free": "9999999999999999/minute"}}, "a limit is 1 to"),
        ({"tiers": {"free": "5/minute;9/minute"}}, "two limits for 60 seconds"),
        ({"tiers": {"gold": "5/minute"}}, "default_tier 'free' is not in tiers"),
        ({"anonymous_tier": "none"}, "anonymous_tier 'none' is not in tiers"),
        ({"headline": "week"}, "headline 'week'"),
        ({"algorithm": "leaky"}, "algorithm"),
        ({"store": Gcra()}, "this store counts by gcra"),
        ({"store": object()}, "LimitStore"),
        ({"costs": {"/x": -1}}, "costs"),
        ({"costs": {"x": 1}}, "route 'x'"),
        ({"tokens": {"/x": TokenRule(estimate=10**9)}}, "fits into no tier"),
        ({"tokens": {"/x": 5}, "tiers": {"free": "5/minute"}}, "no tier has a token budget"),
        ({"tokens": {"/x": 5}, "exempt": ["/x"]}, "exempt and has"),
        ({"trusted_proxies": ("0.0.0.0/0",)}, "everybody"),
        ({"trusted_proxies": ("proxy.local",)}, "trusted_proxies"),
        ({"name": "a b"}, "name 'a b'"),
        ({"draft": 7}, "draft"),
        ({"burst": 3}, "burst"),
    ],
)
async def test_wrong_configuration_fails_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RateLimit(**options)


@pytest.mark.parametrize("options", [{}, {"tokens": "x"}, {"requests": ""}], ids=str)
async def test_a_tier_that_cannot_be_read_fails(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="limits"):
        Tier(**options)


@pytest.mark.parametrize("estimate", [-1, 10**16])
async def test_an_estimate_that_is_no_number_of_tokens_fails(estimate: Any) -> None:
    with pytest.raises(ValidationError):
        TokenRule(estimate=estimate)


async def test_a_tier_may_limit_tokens_only() -> None:
    app = stack(RateLimit(tiers={"free": Tier(tokens="100/hour;50/minute")}, tokens={"/run": 40}))
    sent = await drive(app, "POST", "/run")
    assert fields(sent) == (None,) * 4
    assert limits(sent) == {"tokens-minute": (10, 60), "tokens-hour": (60, 2760)}
    assert sent.header("x-tokens-remaining") == "10"


async def test_limits_are_written_as_the_limits_package_has_them() -> None:
    windows = Tier(requests="10/second;100 per 15 minutes", tokens="5000/hour").windows
    assert [(w.limit, w.seconds, w.unit, w.name) for w in windows] == [
        (10, 1, "requests", "second"),
        (100, 900, "requests", "15-minutes"),
        (5_000, 3_600, "tokens", "tokens-hour"),
    ]


async def test_a_policy_is_a_value() -> None:
    assert RateLimit() == RateLimit()
    assert RateLimit(name="a") != RateLimit(name="b")
    assert RateLimit().key is by_principal
    assert "store=None" in repr(RateLimit())


async def test_a_key_that_fails_is_the_authors_error() -> None:
    def broken(ex: Exchange) -> Awaitable[str] | str | None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        await drive(stack(RateLimit(key=broken)))

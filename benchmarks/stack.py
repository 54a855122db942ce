"""The whole stack over a bare application, beside one empty BaseHTTPMiddleware and beside the usual packages.

Each variant runs in a process of its own, one at a time, in interleaved rounds (see `apart`).

Every policy is on; a thousand callers with HS256 tokens, verified before and remembered; a JSON body of 100 bytes,
seven request headers; the log is JSON and goes to /dev/null.
"""

import os
import time
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

import jwt
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.apart import measure_apart
from benchmarks.timing import App, Block, Loop, Message, rounds_for, scopes
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.cache_control import CacheControl
from sigil_policy.policies.conditional import Conditional
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit, Tier, TokenRule
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.versioning import Version, Versioning
from sigil_policy.telemetry.logs import JSONLines

CALLERS = 1_000
ISSUER, AUDIENCE = "https://auth.example.com", "sigil-api"
SECRET = "benchmark-" * 4
PEPPER = SecretStr("benchmark-pepper-" * 2)
TIER = "bench"

BODY = b'{"name":"ada","status":"active","strata":"L3","tasks":1234567,"updated_at":"2026-01-11T00:00:00.000Z"}'[:100]
HEAD = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]

Headers = list[tuple[bytes, bytes]]


async def bare(scope: Message, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEAD})
    await send({"type": "http.response.body", "body": BODY})


async def _endpoint(request: Request) -> Response:
    return Response(BODY, media_type="application/json")


ROUTES = [Route("/v7/agents/{name}", _endpoint)]


class Empty(BaseHTTPMiddleware):
    """What a middleware costs that is written as the tutorials say, and does nothing."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@cache
def requests() -> list[Headers]:
    """The headers of one request of each caller."""
    return [
        [
            (b"host", b"api.example.com"),
            (b"user-agent", b"sigil-python/7.4.1 (linux; x86_64) httpx2/2.12"),
            (b"accept", b"application/json"),
            (b"accept-encoding", b"gzip, deflate"),
            (b"connection", b"keep-alive"),
            (b"authorization", b"Bearer " + token.encode()),
            (b"x-request-id", f"{number:08x}-1f3b-4c5d-8e9f-{number:012x}".encode()),
        ]
        for number, token in enumerate(tokens())
    ]


@cache
def tokens() -> list[str]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 86_400, "tier": TIER}
    return [
        jwt.encode({**claims, "sub": f"caller-{number}", "scope": "agents:read agents:write"}, SECRET, "HS256")
        for number in range(CALLERS)
    ]


@cache
def dev_null() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def policies(*, batch: int = 64) -> list[Policy]:
    """Every policy of the library, outermost first, as a service would configure them; `batch` log lines a write."""
    _, record = new_key(pepper=PEPPER, subject="nightly-job", scopes=["agents:read"], tier=TIER)
    return [
        RequestID(),
        AccessLog(logger=JSONLines(dev_null(), batch=batch)),
        Problems(),
        Versioning(
            versions={
                "v7": Version(),
                "v6": Version(phase="deprecated", deprecated=date(2026, 1, 1), successor="v7"),
            }
        ),
        BearerAuth(
            issuers=(Issuer(url=ISSUER, audience=AUDIENCE, keys=(Key(algorithm="HS256", secret=SecretStr(SECRET)),)),)
        ),
        ApiKeyAuth(store=MemoryApiKeyStore([record]), pepper=PEPPER),
        Scopes(
            routes={"GET /v7/agents/{name}": "agents:read", "POST /v7/agents/{name}/run": "agents:execute"},
            public=("GET /health",),
        ),
        # Limits that nobody reaches. All four windows are told to every caller; a token rule is for what spends tokens.
        RateLimit(
            tiers={TIER: Tier(requests="1000000/second;60000000/minute;1000000000/hour", tokens="1000000000/minute")},
            default_tier=TIER,
            anonymous_tier=TIER,
            tokens={"POST /v7/agents/{name}/run": TokenRule(estimate=500)},
        ),
        CacheControl(routes={"GET /v7/agents/{name}": "private, max-age=300", "GET /health": "no-cache"}),
        Conditional(),
    ]


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `stack_us`, `base_http_us`, `ratio_to_base_http`, `stack_on_starlette_us`, `peers_us`, `ratio_peers`, all
    added costs per request; `stack_unbatched_us`, with every log line written by itself; `per_policy_us`, what each
    policy adds to those outside of it; `notes`."""
    count = len(policies())
    names = ["bare", "BaseHTTPMiddleware", "starlette", "starlette+stack", "unbatched"]
    names += [f"first {depth}" for depth in range(1, count + 1)]
    loop = Loop()
    notes = [f"event loop: {loop.name}; 64 log lines a write; one process for each variant"]
    try:
        from benchmarks import peers  # noqa: F401  whether it can be
    except ImportError as missing:
        notes.append(f"peers skipped: {missing.name} is not installed; pip install 'sigil-policy[bench]'")
    else:
        names.append("peers")
    loop.close()
    requests()
    samples = measure_apart(partial(_block, smoke=smoke), names, rounds=rounds_for(smoke, 60))

    whole = f"first {count}"
    stack_us = samples.added(whole, over="bare")
    base_http_us = samples.added("BaseHTTPMiddleware", over="bare")
    on_starlette = samples.added("starlette+stack", over="starlette")
    peers_us = samples.added("peers", over="starlette") if "peers" in names else None
    steps = ["bare", *(f"first {depth}" for depth in range(1, count + 1))]
    return {
        "stack_us": stack_us,
        "stack_unbatched_us": samples.added("unbatched", over="bare"),
        "stack_us_spread": samples.spread(whole, over="bare"),
        "base_http_us": base_http_us,
        "ratio_to_base_http": stack_us / base_http_us,
        "stack_on_starlette_us": on_starlette,
        "peers_us": peers_us,
        "ratio_peers": None if peers_us is None else peers_us / on_starlette,
        "bare_us": samples.cost("bare"),
        "per_policy_us": {
            type(policy).__name__: samples.added(steps[place + 1], over=steps[place])
            for place, policy in enumerate(policies())
        },
        "notes": notes,
    }


def _block(name: str, *, smoke: bool) -> Block:
    """The block of one variant, in the process that calls this."""
    loop, app, make = Loop(), _app(name), scopes(requests())
    if not smoke:
        # Everybody has called once: tokens are verified and remembered, counters exist.
        loop.requests(app, make, count=CALLERS)()
    return loop.requests(app, make)


def _app(name: str) -> App:
    if name == "bare":
        return bare
    if name == "BaseHTTPMiddleware":
        return Empty(bare)
    if name == "unbatched":
        return PolicyStack(bare, policies(batch=1))
    if name == "peers":
        return _peers()
    if name.startswith("first "):
        return PolicyStack(bare, policies()[: int(name.removeprefix("first "))])
    starlette = Starlette(routes=ROUTES)
    if name == "starlette+stack":
        starlette.add_middleware(PolicyStack, policies=policies())
    return starlette


def _peers() -> App:
    from benchmarks import peers

    return peers.build(
        ROUTES,
        secret=SECRET,
        issuer=ISSUER,
        audience=AUDIENCE,
        limits=["1000000/second", "60000000/minute", "1000000000/hour"],
        log=dev_null(),
    )

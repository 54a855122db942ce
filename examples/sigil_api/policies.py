"""Everything this service tells the library: ten rules, each a value, in the order in which a request meets them."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TextIO, TypeVar

from examples.sigil_api.home import ALGORITHM, AUDIENCE, ISSUER, Home
from sigil_policy import (
    AccessLog,
    ApiKeyAuth,
    BearerAuth,
    CacheControl,
    Conditional,
    Exchange,
    FileApiKeyStore,
    Issuer,
    JSONLines,
    Key,
    Policy,
    Problems,
    RateLimit,
    RequestID,
    Scopes,
    Tier,
    TokenRule,
    Version,
    Versioning,
)
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.policies.rate_limit import GUIDELINE_TIERS

CURRENT, DEPRECATED = "v7", "v6"

SCOPES: Mapping[str, str] = {
    "GET /agents": "agents:read",
    "GET /agents/{name}": "agents:read",
    "GET /agents/{name}/status": "agents:read",
    "POST /agents": "agents:write",
    "PATCH /agents/{name}": "agents:write",
    "DELETE /agents/{name}": "agents:write",
    "POST /agents/{name}/run": "agents:execute",
    "POST /memory/search": "memory:read",
    "GET /memory/{memory_id}": "memory:read",
    "POST /memory": "memory:write",
    "POST /evolution/evaluate": "evolution:read",
    "GET /evolution/evaluations": "evolution:read",
    "GET /evolution/evaluations/{evaluation_id}": "evolution:read",
    "GET /operations/{operation_id}": "evolution:read",
    "POST /evolution/optimize": "evolution:write",
}
"""What a caller must have been granted; `admin` opens all, and what is not listed needs a caller but no scope."""

PUBLIC = ("/health", "GET /docs", "GET /docs/oauth2-redirect", "GET /openapi.json")

CACHING: Mapping[str, str] = {
    "GET /agents": "private, max-age=60",
    "GET /agents/{name}": "private, max-age=300",
    "GET /agents/{name}/status": "private, max-age=10",
    "POST /memory/search": "private, max-age=30",
    "GET /operations/{operation_id}": "no-store",
    "GET /budget/status": "no-store",
}


def by_length(ex: Exchange) -> int:
    """About a token for every four bytes of the request, and as many as an answer usually has."""
    length = ex.headers.get(b"content-length", b"")
    return 256 + int(length) // 4 if length.isdigit() and len(length) < 10 else 1_000


TOKENS: Mapping[str, TokenRule] = {
    "POST /agents/{name}/run": TokenRule(estimate=by_length),
    "POST /evolution/evaluate": TokenRule(estimate=500),
}
"""What is held of the caller's token budget before a run; what it really took is settled after."""

Setting = TypeVar("Setting")


def policies(
    home: Home,
    *,
    log: TextIO,
    clock: Clock = SYSTEM_CLOCK,
    store: str | None = None,
    replicas: int = 1,
    tiers: Mapping[str, Tier | str] | None = None,
) -> list[Policy]:
    """The stack, outermost first. While a shared store is away, each replica admits its share."""
    issuer = Issuer(url=ISSUER, audience=AUDIENCE, keys=(Key(algorithm=ALGORITHM, secret=home.signing_secret()),))
    return [
        RequestID(),
        AccessLog(logger=JSONLines(log, clock=clock), include_query=True),
        Problems(),
        Versioning(versions=versions(clock)),
        BearerAuth(issuers=(issuer,)),
        ApiKeyAuth(store=FileApiKeyStore(home.keys_file, clock=clock), pepper=home.pepper()),
        Scopes(routes=in_every_version(SCOPES), public=PUBLIC),
        RateLimit(
            tiers=GUIDELINE_TIERS if tiers is None else tiers,
            tokens=in_every_version(TOKENS),
            store=store,
            on_store_loss="local",
            expected_replicas=replicas,
        ),
        CacheControl(routes={**in_every_version(CACHING), "GET /health": "no-cache"}),
        Conditional(),
    ]


def versions(clock: Clock) -> dict[str, Version]:
    """v6 was deprecated ninety days ago and goes a year after that; whole days, so that all answers of a day agree."""
    today = datetime.fromtimestamp(clock.time(), UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    deprecated = today - timedelta(days=90)
    return {
        CURRENT: Version(phase="current"),
        DEPRECATED: Version(
            phase="deprecated", deprecated=deprecated, sunset=deprecated + timedelta(days=365), successor=CURRENT
        ),
    }


def in_every_version(table: Mapping[str, Setting]) -> Mapping[str, Setting]:
    """`"GET /agents"` as `"GET /v7/agents"` and `"GET /v6/agents"`."""
    return {
        route.replace(" /", f" /{version}/", 1): setting
        for version in (CURRENT, DEPRECATED)
        for route, setting in table.items()
    }

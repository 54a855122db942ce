"""Nothing of the application is asked of a token that no key has signed, and what it raises is its own error."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.tokens import KeyUnknownError, TokenVerifier
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, b64, good_claims, make_issuer, token
from tests.identity.provider import Pair, Provider

pytestmark = pytest.mark.anyio

KNOWN, UNKNOWN = Pair("known"), Pair("unknown")


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def test_a_token_of_an_unknown_key_is_refused_before_the_tier_is_asked() -> None:
    """It is read before anybody has signed it, to see whether its key is worth a fetch; anybody may write such a one,
    without the claims that the application counts on."""
    asked: list[object] = []

    def tier(claims: Mapping[str, Any]) -> str:
        asked.append(claims["sub"])
        return str(claims["plan"])

    policy = BearerAuth(issuers=[Provider(KNOWN).issuer(issuer={"tier": tier})])
    app = PolicyStack(hello, [policy], clock=FrozenClock(NOW))
    for presented, status in (
        (UNKNOWN.token(sub="mallory"), 401),
        (b64(json.dumps({"alg": "ES256", "kid": "x"})) + b"." + b64(json.dumps(good_claims())) + b".AA", 401),
        (KNOWN.token(plan="pro"), 200),
    ):
        sent = await drive(app, "GET", "/", headers={"authorization": b"Bearer " + presented})
        assert sent.error is None
        assert sent.status == status
    assert asked == ["user_123"]


@pytest.mark.parametrize("claims", [{"aud": "other"}, {"exp": int(NOW) - 60}, {"scope": 5}])
def test_what_would_be_refused_anyway_is_no_reason_for_a_fetch(claims: dict[str, Any]) -> None:
    verifier = TokenVerifier([Provider(KNOWN).issuer()])
    with pytest.raises(Exception) as refused:  # noqa: PT011  which one is asked below
        verifier.verify(UNKNOWN.token(**claims), NOW)
    assert type(refused.value).__name__ == "TokenError"
    with pytest.raises(KeyUnknownError):
        verifier.verify(UNKNOWN.token(), NOW)


def test_an_error_of_the_function_that_names_the_tier_is_not_taken_for_a_bad_token() -> None:
    def tier(claims: Mapping[str, Any]) -> str:
        raise ValueError("the price list is closed")

    with pytest.raises(ValueError, match="price list"):
        TokenVerifier([make_issuer(tier=tier)]).verify(token(), NOW)

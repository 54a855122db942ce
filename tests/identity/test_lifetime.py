"""A token that was issued for too long is refused, whoever has signed it."""

import pytest
from pydantic import ValidationError

from sigil_policy.identity.tokens import TokenError, TokenVerifier
from tests.identity.material import NOW, good_claims, make_issuer, token

ISSUED = int(NOW) - 10


def verdict(max_lifetime, **changes) -> str:
    """How a token with these claims fares; "good" or the reason."""
    issuer = make_issuer(max_lifetime=max_lifetime, leeway=60)
    try:
        TokenVerifier([issuer]).verify(token(good_claims(**{"iat": ISSUED, **changes})), NOW)
    except TokenError as error:
        return error.reason
    return "good"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"exp": ISSUED + 600}, "good", id="exactly as long"),
        pytest.param({"exp": ISSUED + 601}, "lifetime", id="a second longer"),
        pytest.param({"exp": ISSUED + 600.5}, "lifetime", id="half a second longer"),
        pytest.param({"exp": ISSUED + 630}, "lifetime", id="longer by less than the leeway"),
        pytest.param({"exp": ISSUED + 100}, "good", id="shorter"),
        pytest.param({"exp": ISSUED + 600, "iat": None}, "lifetime", id="no iat"),
        pytest.param({"exp": int(NOW) + 10, "iat": None, "nbf": ISSUED}, "lifetime", id="nbf is no iat"),
        pytest.param({"exp": int(NOW) + 40, "iat": int(NOW) + 30}, "good", id="a clock that is ahead"),
        pytest.param({"exp": int(NOW) + 900, "iat": int(NOW) + 300}, "early", id="issued in the future"),
        pytest.param({"exp": 253_402_300_799, "iat": 0}, "lifetime", id="until the year 9999"),
        pytest.param({"exp": ISSUED + 600, "iat": str(ISSUED)}, "iat", id="iat a string"),
        pytest.param({"exp": ISSUED + 600, "iat": True}, "iat", id="iat a bool"),
        pytest.param({"exp": 1, "iat": ISSUED}, "expired", id="over before it began"),
    ],
)
def test_a_token_lasts_at_most_as_long_as_its_issuer_may_say(changes, expected):
    assert verdict(600, **changes) == expected


def test_without_a_bound_nothing_is_asked():
    assert verdict(None, exp=int(NOW) + 31_536_000, iat=None) == "good"


@pytest.mark.parametrize("max_lifetime", [0, -1, float("inf"), float("nan"), "soon"])
def test_a_bound_is_a_number_of_seconds(max_lifetime):
    with pytest.raises(ValidationError, match="max_lifetime"):
        make_issuer(max_lifetime=max_lifetime)


def test_a_bound_of_one_issuer_is_not_that_of_another():
    strict = make_issuer(max_lifetime=60)
    other = make_issuer(url="https://other.example")
    verifier = TokenVerifier([strict, other])
    with pytest.raises(TokenError) as caught:
        verifier.verify(token(), NOW)
    assert caught.value.reason == "lifetime"
    assert verifier.verify(token(good_claims(iss="https://other.example")), NOW).principal.subject == "user_123"

"""An issuer whose tokens could not be told apart, or not be verified, is refused when it is configured."""

import pytest
from pydantic import ValidationError

from sigil_policy.identity.issuers import MAX_TRIALS, Issuer
from sigil_policy.identity.keys import Key
from tests.identity.material import SECRET, make_issuer, make_key, public_jwk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"leeway": 61}, "60", id="leeway over a minute"),
        pytest.param({"leeway": -1}, "0", id="negative leeway"),
        pytest.param({"leeway": float("nan")}, "leeway", id="leeway NaN"),
        pytest.param({"url": ""}, "url", id="no url"),
        pytest.param({"url": "https://a b"}, "iss", id="url with a space"),
        pytest.param({"audience": ""}, "audience", id="empty audience"),
        pytest.param({"audience": ()}, "empty", id="no audience in a list"),
        pytest.param({"strict": True, "audience": None}, "9068", id="strict without audience"),
        pytest.param({"keys": ()}, "keys", id="no keys"),
        pytest.param({"scope_claims": {"scp": "list"}}, "array", id="unknown form"),
        pytest.param({"scopes": "scope"}, "scopes", id="unknown option"),
    ],
)
def test_an_unusable_issuer_is_refused(options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        make_issuer(**options) if "keys" not in options else Issuer(url="https://a", audience="b", **options)
    assert SECRET not in str(caught.value)


def test_two_keys_of_one_algorithm_cannot_share_an_id():
    """JK-04: RFC 7517 section 4.5; keys of different algorithms may."""
    with pytest.raises(ValidationError, match="guess"):
        make_issuer(make_key("HS256", id="k"), Key(algorithm="HS256", secret="x" * 32, id="k"))
    with pytest.raises(ValidationError, match="guess"):
        make_issuer(make_key("EdDSA", id="k"), Key(algorithm="Ed25519", jwk=public_jwk("EdDSA"), id="k"))
    assert make_issuer(make_key("HS256", id="k"), make_key("RS256", id="k"))


def test_keys_without_id_are_bounded():
    """JK-10."""
    keys = [Key(algorithm="HS256", secret=f"{number:032}") for number in range(MAX_TRIALS)]
    assert make_issuer(*keys[1:])
    with pytest.raises(ValidationError, match="kid"):
        make_issuer(*keys)


def test_nothing_secret_is_in_the_repr():
    assert SECRET not in repr(make_issuer())


def test_the_audience_has_to_be_said():
    with pytest.raises(ValidationError, match="audience"):
        Issuer(url="https://a", keys=(make_key("HS256"),))

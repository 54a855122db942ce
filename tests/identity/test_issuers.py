"""An issuer whose tokens could not be told apart, or not be verified, is refused when it is configured."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import MAX_TRIALS, KeySet
from sigil_policy.identity.keys import Key
from sigil_policy.identity.tokens import TokenError, TokenVerifier
from tests.identity.material import (
    AUDIENCE,
    NOW,
    SECRET,
    URL,
    good_claims,
    make_issuer,
    make_key,
    public_jwk,
    token,
)


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


# --- where keys come from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "exactly one", id="no keys at all"),
        pytest.param({"discovery": True, "jwks_url": f"{URL}/jwks"}, "exactly one", id="two sources"),
        pytest.param({"keys": KeySet(), "discovery": True}, "exactly one", id="keys and discovery"),
        pytest.param({"jwks_url": "http://auth.example.com/jwks"}, "https", id="jwks_url over http"),
        pytest.param({"url": "http://auth.example.com", "discovery": True}, "https", id="discovery over http"),
        pytest.param({"url": "accounts.example.com", "discovery": True}, "URL", id="discovery of no URL"),
        pytest.param({"url": f"{URL}?tenant=1", "discovery": True}, "8414", id="discovery with a query"),
        pytest.param({"discovery": True, "algorithms": ["HS256"]}, "secret", id="HS in a published set"),
        pytest.param({"discovery": True, "algorithms": []}, "algorithms", id="no algorithm"),
        pytest.param({"discovery": True, "algorithms": ["none"]}, "algorithms", id="none"),
        pytest.param({"keys": [make_key("HS256")], "algorithms": ["RS256"]}, "HS256", id="a key of another algorithm"),
    ],
)
def test_keys_come_from_one_place_that_can_be_trusted(options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        Issuer(**{"url": URL, "audience": AUDIENCE, **options})
    assert SECRET not in str(caught.value)


def test_the_short_forms_are_key_sets():
    named = Issuer(url=URL, audience=AUDIENCE, jwks_url=f"{URL}/jwks")
    found = Issuer(url=URL, audience=AUDIENCE, discovery=True)
    assert named.fetched is not None and found.fetched is not None
    assert make_issuer().fetched is None
    assert Issuer(url=URL, audience=AUDIENCE, keys=KeySet("https://keys.example/")).fetched is not None


def test_the_extra_is_loaded_where_a_set_is_configured_and_nowhere_else():
    code = (
        "import sys; from sigil_policy.policies.bearer import BearerAuth; from sigil_policy.identity.issuers import *;"
        "assert 'httpx2' not in sys.modules; sys.modules['httpx2'] = None\n"
        "try: Issuer(url='https://a', audience='b', discovery=True)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'sigil-policy[identity]'" in done.stdout


# --- scopes and tiers ------------------------------------------------------------------------------------------------


def who_with(issuer: Issuer, claims: dict):
    return TokenVerifier([issuer]).verify(token({**good_claims(scope=None, tier=None), **claims}), NOW).principal


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        pytest.param({"scope": "a b"}, {"a", "b"}, id="scope"),
        pytest.param({"scp": ["c"]}, {"c"}, id="scp"),
        pytest.param({"permissions": ["d:e"]}, {"d:e"}, id="permissions"),
        pytest.param({"scope": "a", "scp": ["c"], "permissions": ["d:e"]}, {"a", "c", "d:e"}, id="all"),
    ],
)
def test_scopes_come_from_the_claims_that_are_named(claims, scopes):
    """JW-24: by explicit mapping only."""
    forms = {"scope": "string", "scp": "array", "permissions": "array"}
    issuer = make_issuer(scope_claims=forms)
    assert who_with(issuer, claims).scopes == scopes
    assert who_with(make_issuer(), {"scp": ["c"], "permissions": ["d"]}).scopes == frozenset()


ROLES = {
    "roles": {"editor": ["agents:read", "agents:write"], "reader": ["agents:read"]},
    "/realm_access/roles": {"root": ["admin:all"]},
    "https://x.example/role": {"root": ["admin:all"]},
    "/a~1b/c~0d": {"root": ["admin:all"]},
}


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        pytest.param({"roles": ["editor"]}, {"agents:read", "agents:write"}, id="one"),
        pytest.param({"roles": ["reader", "nobody"]}, {"agents:read"}, id="one that is not listed"),
        pytest.param({"roles": "reader"}, {"agents:read"}, id="a string"),
        pytest.param({"roles": "reader editor"}, set(), id="no list in a string"),
        pytest.param({"roles": ["EDITOR", "edit", ""]}, set(), id="exactly"),
        pytest.param({"roles": ["root"]}, set(), id="a role of another claim"),
        pytest.param({"realm_access": {"roles": ["root"]}}, {"admin:all"}, id="nested"),
        pytest.param({"realm_access": ["roles"]}, set(), id="nested in an array"),
        pytest.param({"realm_access": "roles"}, set(), id="nested in a string"),
        pytest.param({"https://x.example/role": "root"}, {"admin:all"}, id="a claim that is a URL"),
        pytest.param({"a/b": {"c~d": "root"}}, {"admin:all"}, id="RFC 6901 escapes"),
        pytest.param({}, set(), id="none"),
        pytest.param({"roles": ["reader"], "scope": "x"}, {"agents:read", "x"}, id="with scopes"),
    ],
)
def test_roles_give_the_scopes_that_are_written_for_them(claims, scopes):
    assert who_with(make_issuer(roles=ROLES), claims).scopes == scopes


@pytest.mark.parametrize("roles", [7, True, {"editor": True}, [7], [["editor"]]], ids=repr)
def test_roles_of_another_form_are_no_token_of_this_issuer(roles):
    with pytest.raises(TokenError) as caught:
        who_with(make_issuer(roles=ROLES), {"roles": roles})
    assert caught.value.reason == "roles"


def test_a_scope_that_cannot_be_one_is_refused_when_it_is_mapped():
    with pytest.raises(ValidationError, match="agents read"):
        make_issuer(roles={"roles": {"editor": ["agents read"]}})


@pytest.mark.parametrize(
    ("options", "claims", "tier"),
    [
        pytest.param({}, {"tier": "pro"}, "pro", id="a claim"),
        pytest.param({"tier_claim": "/plan/name"}, {"plan": {"name": "pro"}}, "pro", id="a path"),
        pytest.param({"tier_claim": None}, {"tier": "pro"}, None, id="no claim"),
        pytest.param({}, {"tier": ["pro"]}, None, id="another type"),
        pytest.param({"client_tiers": {"job": "internal"}}, {"client_id": "job", "tier": "x"}, "internal", id="client"),
        pytest.param({"client_tiers": {"job": "internal"}}, {"azp": "job"}, "internal", id="azp"),
        pytest.param({"client_tiers": {"job": "internal"}}, {"client_id": "a", "azp": "job"}, None, id="not azp"),
        pytest.param({"client_tiers": {"job": "internal"}}, {"client_id": ["job"]}, None, id="client of another type"),
        pytest.param({"client_tiers": {"job": "x"}}, {"client_id": "a", "tier": "pro"}, "pro", id="another client"),
        pytest.param({"tier": lambda claims: claims["org"]}, {"org": "big", "tier": "x"}, "big", id="a function"),
        pytest.param({"tier": lambda claims: None}, {"tier": "x"}, None, id="a function that names none"),
        pytest.param({"tier": lambda claims: 7}, {"tier": "x"}, None, id="a function of another type"),
    ],
)
def test_the_tier_comes_from_a_claim_the_client_or_a_function(options, claims, tier):
    assert who_with(make_issuer(**options), claims).tier == tier


def test_algorithms_narrow_what_a_key_verifies():
    """Both spellings of EdDSA, unless one is chosen."""
    key = make_key("EdDSA")
    presented = token(algorithm="EdDSA")
    assert TokenVerifier([make_issuer(key)]).verify(presented, NOW)
    with pytest.raises(TokenError):
        TokenVerifier([make_issuer(key, algorithms=["Ed25519"])]).verify(presented, NOW)

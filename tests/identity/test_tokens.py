"""RFC 7519, 7515, 8725 and 9068: every token that is not exactly right is refused, and nothing else comes out."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.core.facts import Principal
from sigil_policy.identity import tokens
from sigil_policy.identity.keys import Key
from sigil_policy.identity.tokens import KeyUnknownError, TokenCache, TokenError, TokenVerifier, VerifiedToken
from sigil_policy.testing import FrozenClock
from tests.identity.material import (
    ALGORITHMS,
    HS,
    NOW,
    RSA,
    SECRET,
    URL,
    b64,
    good_claims,
    make_issuer,
    make_key,
    private_key,
    public_jwk,
    public_pem,
    raw_token,
    sign,
    token,
)
from tests.identity.provider import Pair, Provider

LENIENT = TokenVerifier([make_issuer()])
STRICT = TokenVerifier([make_issuer(strict=True)])
CLAIMS = json.dumps(good_claims())
STRICT_CLAIMS = good_claims(client_id="app", jti="1")


def refusal(verifier: TokenVerifier, presented: bytes, now: float = NOW) -> str:
    """Why it was refused; the test fails when it was not, or when anything but a TokenError came out."""
    with pytest.raises(TokenError) as caught:
        verifier.verify(presented, now)
    assert str(caught.value) == "the token is refused"
    assert caught.value.__cause__ is None
    return caught.value.reason


def test_a_good_token_says_who_calls():
    verified = TokenVerifier([make_issuer(leeway=0)], realm="agents").verify(token(), NOW)
    who = verified.principal
    assert (who.subject, who.scopes, who.tier) == ("user_123", {"agents:read", "agents:write"}, "pro")
    assert (who.kind, who.issuer, who.realm) == ("bearer", URL, "agents")
    assert who.claims["sub"] == "user_123"
    assert verified.not_after == NOW + 3600
    assert verified.not_before == NOW - 10


def test_the_claims_of_a_verified_token_cannot_be_changed():
    """A verified token is remembered: a change would be seen by the next request."""
    who = LENIENT.verify(token(good_claims(roles=["a", {"b": ["c"]}])), NOW).principal
    assert who.claims["roles"] == ("a", {"b": ("c",)})
    with pytest.raises(TypeError):
        who.claims["sub"] = "root"
    with pytest.raises(TypeError):
        who.claims["roles"][1]["b"] = "root"


SIGNED_BUT_WRONG = [
    # header and claims are rightly signed: only the rule itself can refuse them
    ("JW-03 header UTF-16", raw_token('{"alg":"HS256"}'.encode("utf-16"), CLAIMS), "form"),
    ("JW-03 claims UTF-16", raw_token('{"alg":"HS256"}', CLAIMS.encode("utf-16")), "form"),
    ("JW-03 header with BOM", raw_token(b'\xef\xbb\xbf{"alg":"HS256"}', CLAIMS), "form"),
    ("JW-03 claims an array", raw_token('{"alg":"HS256"}', "[]"), "form"),
    ("JW-04 alg twice", raw_token('{"alg":"none","alg":"HS256"}', CLAIMS), "form"),
    ("JW-04 sub twice", raw_token('{"alg":"HS256"}', CLAIMS[:-1] + ',"sub":"root"}'), "form"),
    ("JW-29 nesting bomb in the claims", raw_token('{"alg":"HS256"}', '{"a":' + "[" * 2000 + "]" * 2000 + "}"), "form"),
    ("JW-29 nesting bomb in the header", raw_token('{"alg":' + "[" * 2000 + "]" * 2000 + "}", CLAIMS), "form"),
    ("JW-05 no alg", raw_token("{}", CLAIMS), "alg"),
    ("JW-05 alg a number", raw_token('{"alg":256}', CLAIMS), "alg"),
    ("JW-05 alg a list", raw_token('{"alg":["HS256"]}', CLAIMS), "alg"),
    ("JW-05 alg in lower case", token(header={"alg": "hs256"}), "key"),
    ("JW-07 alg of no key", token(header={"alg": "HS512"}), "key"),
    *((f"JW-06 alg {name}", token(header={"alg": name}), "key") for name in ("none", "None", "NONE", "nOnE", "")),
    ("JW-10 unknown crit", token(header={"crit": ["exp"], "exp": 1}), "crit"),
    ("JW-10 empty crit", token(header={"crit": []}), "crit"),
    ("JW-10 crit of nothing", token(header={"crit": ["x"]}), "crit"),
    ("JW-11 b64 false", token(header={"b64": False}), "crit"),
    ("JW-11 b64 false and crit", token(header={"b64": False, "crit": ["b64"]}), "crit"),
    ("JW-12 kid a number", token(header={"kid": 5}), "kid"),
    ("JW-12 kid null", token(header={"kid": None}), "kid"),
    ("JW-12 kid too long", token(header={"kid": "k" * 257}), "kid"),
    ("JW-14 typ logout+jwt", token(header={"typ": "logout+jwt"}), "typ"),
    ("JW-14 typ dpop+jwt", token(header={"typ": "dpop+jwt"}), "typ"),
    ("JW-14 typ null", token(header={"typ": None}), "typ"),
    ("JW-14 typ a list", token(header={"typ": ["JWT"]}), "typ"),
    ("JW-25 nested token", token(header={"cty": "JWT"}), "cty"),
    ("JW-25 nested token, spelt out", token(header={"cty": "application/jwt"}), "cty"),
    ("JW-15 no iss", token(good_claims(iss=None)), "iss"),
    ("JW-15 iss with a slash more", token(good_claims(iss=URL + "/")), "iss"),
    ("JW-15 iss in upper case", token(good_claims(iss=URL.upper())), "iss"),
    ("JW-15 iss a list", token(good_claims(iss=[URL])), "iss"),
    ("JW-15 iss another", token(good_claims(iss="https://evil.example")), "iss"),
    ("JW-17 no aud", token(good_claims(aud=None)), "aud"),
    ("JW-17 aud another", token(good_claims(aud="other-api")), "aud"),
    ("JW-17 aud others", token(good_claims(aud=["a", "b"])), "aud"),
    ("JW-17 aud empty", token(good_claims(aud=[])), "aud"),
    ("JW-17 aud a number", token(good_claims(aud=5)), "aud"),
    ("JW-17 aud with a number", token(good_claims(aud=["sigil-api", 5])), "aud"),
    ("JW-17 aud an object", token(good_claims(aud={"sigil-api": 1})), "aud"),
    ("JW-17 aud a prefix", token(good_claims(aud="sigil-api-2")), "aud"),
    ("JW-19 no exp", token(good_claims(exp=None)), "exp"),
    ("JW-19 expired", token(good_claims(exp=int(NOW) - 3600)), "expired"),
    ("JW-20 exp a string", token(good_claims(exp=str(int(NOW) + 3600))), "exp"),
    ("JW-20 exp a bool", token(good_claims(exp=True)), "exp"),
    ("JW-20 exp a list", token(good_claims(exp=[int(NOW) + 3600])), "exp"),
    ("JW-20 exp null", raw_token('{"alg":"HS256"}', CLAIMS.replace(f'"exp": {int(NOW) + 3600}', '"exp": null')), "exp"),
    ("JW-20 exp NaN", raw_token('{"alg":"HS256"}', CLAIMS.replace(str(int(NOW) + 3600), "NaN")), "form"),
    ("JW-20 exp Infinity", raw_token('{"alg":"HS256"}', CLAIMS.replace(str(int(NOW) + 3600), "Infinity")), "form"),
    ("JW-20 exp 1e999", raw_token('{"alg":"HS256"}', CLAIMS.replace(str(int(NOW) + 3600), "1e999")), "form"),
    ("JW-20 exp in milliseconds", token(good_claims(exp=(int(NOW) + 3600) * 1000)), "exp"),
    ("JW-20 exp of 400 digits", token(good_claims(exp=10**400)), "exp"),
    ("JW-20 exp negative", token(good_claims(exp=-1)), "exp"),
    ("JW-20 nbf a string", token(good_claims(nbf="0")), "nbf"),
    ("JW-20 iat a bool", token(good_claims(iat=False)), "iat"),
    ("JW-20 iat a string", token(good_claims(iat="0")), "iat"),
    ("JW-22 nbf ahead", token(good_claims(nbf=int(NOW) + 60)), "early"),
    ("JW-22 iat ahead", token(good_claims(iat=int(NOW) + 60)), "early"),
    ("JW-23 no sub", token(good_claims(sub=None)), "sub"),
    ("JW-23 sub empty", token(good_claims(sub="")), "sub"),
    ("JW-23 sub a number", token(good_claims(sub=5)), "sub"),
    ("JW-23 sub a list", token(good_claims(sub=["root"])), "sub"),
    ("JW-23 sub too long", token(good_claims(sub="u" * 256)), "sub"),
    ("JW-23 sub with a line feed", token(good_claims(sub="user\nroot")), "sub"),
    ("JW-23 sub with a lone surrogate", raw_token('{"alg":"HS256"}', CLAIMS.replace("user_123", "\\ud800")), "form"),
    ("JW-24 scope a list", token(good_claims(scope=["admin"])), "scope"),
    ("JW-24 scope a number", token(good_claims(scope=5)), "scope"),
    ("JW-24 scope an object", token(good_claims(scope={"admin": 1})), "scope"),
]


@pytest.mark.parametrize(
    ("presented", "reason"), [row[1:] for row in SIGNED_BUT_WRONG], ids=[row[0] for row in SIGNED_BUT_WRONG]
)
def test_a_rightly_signed_token_that_breaks_a_rule_is_refused(presented, reason):
    assert refusal(LENIENT, presented) == reason


GOOD = token()
HEAD, BODY, TAIL = GOOD.split(b".")


@pytest.mark.parametrize(
    "presented",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(GOOD + b"=", id="JW-01 padded signature"),
        pytest.param(HEAD + b"=." + BODY + b"." + TAIL, id="JW-01 padded header"),
        pytest.param(GOOD + b"\n", id="JW-01 line feed"),
        pytest.param(b" " + GOOD, id="JW-01 space"),
        pytest.param(GOOD.replace(b".", b". ", 1), id="JW-01 space inside"),
        pytest.param(b"{" + GOOD + b"}", id="JW-01 braces"),
        pytest.param(HEAD + b"." + BODY, id="two parts"),
        pytest.param(HEAD + b"." + BODY + b".", id="JW-06 no signature"),
        pytest.param(GOOD + b"." + TAIL, id="four parts"),
        pytest.param(b".".join((HEAD, TAIL, TAIL, TAIL, TAIL)), id="JW-25 five parts"),
        pytest.param(HEAD + b".." + TAIL, id="JW-11 detached payload"),
        pytest.param(
            json.dumps({"payload": BODY.decode(), "protected": HEAD.decode(), "signature": TAIL.decode()}).encode(),
            id="JW-02 JSON serialisation",
        ),
        pytest.param(b"A" * 8193, id="JW-29 8193 bytes"),
        pytest.param(b64('{"alg":"none"}') + b"." + BODY + b".", id="JW-06 none, unsigned"),
    ],
)
def test_a_token_of_another_form_is_refused(presented):
    assert refusal(LENIENT, presented) in ("form", "size", "key", "signature")


def test_every_spelling_of_the_last_signature_character_but_one_is_refused():
    """JW-01, JW-30: 43 characters hold two spare bits; only one of four spellings is canonical."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    passed = []
    for last in alphabet:
        try:
            LENIENT.verify(GOOD[:-1] + bytes([last]), NOW)
        except TokenError:
            continue
        passed.append(last)
    assert passed == [GOOD[-1]]


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "Application/AT+jwt"])
def test_ordinary_types_pass(typ):
    """JW-14."""
    assert LENIENT.verify(token(header={"typ": typ}), NOW).principal.subject == "user_123"


@pytest.mark.parametrize(
    ("typ", "passes"),
    [
        ("at+jwt", True),
        ("AT+JWT", True),
        ("application/at+jwt", True),
        ("JWT", False),
        ("id_token", False),
        (None, False),
    ],
)
def test_strict_takes_access_tokens_only(typ, passes):
    """JW-13: RFC 9068 section 4."""
    presented = token(STRICT_CLAIMS, header={} if typ is None else {"typ": typ})
    if passes:
        assert STRICT.verify(presented, NOW).principal.subject == "user_123"
    else:
        assert refusal(STRICT, presented) == "typ"


@pytest.mark.parametrize("claim", ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"])
def test_strict_takes_every_claim_of_the_profile(claim):
    """JW-21: RFC 9068 section 2.2."""
    claims = {name: value for name, value in STRICT_CLAIMS.items() if name != claim}
    assert refusal(STRICT, token(claims, header={"typ": "at+jwt"})) == claim
    assert refusal(STRICT, token({**claims, claim: ""}, header={"typ": "at+jwt"})) == claim


def test_aud_may_be_an_array():
    """JW-17."""
    assert LENIENT.verify(token(good_claims(aud=["other", "sigil-api"])), NOW)
    either = TokenVerifier([make_issuer(audience=("a", "b"))])
    assert either.verify(token(good_claims(aud="b")), NOW)
    assert refusal(either, token(good_claims(aud="c"))) == "aud"


def test_an_audience_that_nobody_expects_is_refused():
    """JW-18: RFC 7519 section 4.1.3."""
    nobody = TokenVerifier([make_issuer(audience=None)])
    assert nobody.verify(token(good_claims(aud=None)), NOW)
    assert refusal(nobody, token()) == "aud"
    assert refusal(nobody, token(good_claims(aud=[]))) == "aud"


@pytest.mark.parametrize("leeway", [0, 30, 60])
def test_a_token_ends_in_its_exact_second(leeway):
    """JW-19."""
    verifier = TokenVerifier([make_issuer(leeway=leeway)])
    presented = token(good_claims(exp=NOW + 100.5))
    assert verifier.verify(presented, NOW + 100.4 + leeway)
    assert refusal(verifier, presented, NOW + 100.5 + leeway) == "expired"


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_a_token_begins_in_its_exact_second(claim):
    """JW-22."""
    verifier = TokenVerifier([make_issuer(leeway=10)])
    presented = token(good_claims(**{claim: int(NOW)}))
    assert refusal(verifier, presented, NOW - 10.1) == "early"
    assert verifier.verify(presented, NOW - 10)


def test_keys_of_one_issuer_never_verify_tokens_of_another():
    """JW-16: RFC 8725 section 3.8; both have a key with the same id."""
    a = make_issuer(make_key("HS256", id="k"), url="https://a.example")
    b = make_issuer(make_key("ES256", id="k"), url="https://b.example")
    both = TokenVerifier([a, b])
    header = {"kid": "k"}
    assert both.verify(token(good_claims(iss="https://a.example"), header=header), NOW).principal.issuer == a.url
    assert both.verify(token(good_claims(iss="https://b.example"), algorithm="ES256", header=header), NOW)
    assert refusal(both, token(good_claims(iss="https://b.example"), header=header)) == "key"
    assert refusal(both, token(good_claims(iss="https://a.example"), algorithm="ES256", header=header)) == "key"


def test_nothing_is_read_of_claims_that_no_key_has_signed(monkeypatch):
    """JW-29: where the header says whose key it would be, a forged token ends at its signature."""
    read = []
    monkeypatch.setattr(tokens, "parse_object", lambda data, **_: read.append(data))
    forged = raw_token('{"alg":"HS256","kid":"k"}', CLAIMS)[:-4] + b"AAAA"
    unnamed = raw_token('{"alg":"HS256"}', CLAIMS)[:-4] + b"AAAA"
    a = make_issuer(make_key("HS256", id="k"), url="https://a.example")
    b = make_issuer(make_key("HS256", id="l"), url="https://b.example")
    for verifier in (TokenVerifier([a]), TokenVerifier([a, b])):
        assert refusal(verifier, forged) == "signature"
    assert refusal(TokenVerifier([a]), unnamed) == "signature"
    assert read == []


@pytest.mark.parametrize("others", [0, 1])
def test_a_large_token_passes_where_its_key_is_named(others):
    claims = good_claims(permissions=[f"read:{number}" for number in range(300)])
    a = make_issuer(make_key("HS256", id="k"))
    b = [make_issuer(make_key("HS256", id="l"), url="https://b.example")] * others
    assert TokenVerifier([a, *b]).verify(token(claims, header={"kid": "k"}), NOW).principal.subject == "user_123"


@pytest.mark.parametrize("other", [make_key("HS256", id="k"), make_key("HS256")], ids=["the same id", "no id"])
def test_an_id_that_two_issuers_may_know_leaves_the_choice_to_the_claims(other):
    """JW-16."""
    a = make_issuer(make_key("HS256", id="k"), url="https://a.example")
    b = make_issuer(other, url="https://b.example")
    both = TokenVerifier([a, b])
    for url in (a.url, b.url):
        assert both.verify(token(good_claims(iss=url), header={"kid": "k"}), NOW).principal.issuer == url


def test_the_kid_chooses_among_keys_and_is_no_more_than_a_hint():
    """JW-12, JK-10."""
    right, wrong = make_key("HS256", id="right"), Key(algorithm="HS256", secret="x" * 32, id="wrong")
    verifier = TokenVerifier([make_issuer(wrong, right)])
    assert verifier.verify(token(header={"kid": "right"}), NOW)
    assert verifier.verify(token(), NOW), "without kid every key of the algorithm is tried"
    assert refusal(verifier, token(header={"kid": "wrong"})) == "signature"
    for kid in ("../../etc/passwd", "' OR 1=1 --", "https://canary.example/jwks", "", "k" * 256):
        assert refusal(verifier, token(header={"kid": kid})) == "key"
    unnamed = TokenVerifier([make_issuer(make_key("HS256"))])
    assert unnamed.verify(token(header={"kid": "whatever"}), NOW), "a key without id fits any kid"


def test_without_kid_the_number_of_trials_is_bounded():
    """JK-10."""
    keys = [Key(algorithm="HS256", secret=f"{number:032}", id=str(number)) for number in range(8)]
    verifier = TokenVerifier([make_issuer(*keys, make_key("HS256", id="right"))])
    assert verifier.verify(token(header={"kid": "right"}), NOW)
    assert refusal(verifier, token()) == "key"


@pytest.mark.parametrize("offered", ["jwk", "jku", "x5u", "x5c", "x5t"])
@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_a_key_in_the_header_is_never_used(offered, algorithm):
    """JW-09: the attacker signs with a key of his own, and sends it along."""
    header = {
        "jwk": {"jwk": public_jwk(algorithm)},
        "jku": {"jku": "https://canary.example/jwks.json"},
        "x5u": {"x5u": "https://canary.example/cert.pem"},
        "x5c": {"x5c": [b64(public_pem(private_key(algorithm))).decode()]},
        "x5t": {"x5t": "AAAA"},
    }[offered]
    presented = token(algorithm=algorithm, header=header)
    assert refusal(LENIENT, presented) == "key"
    other = TokenVerifier([make_issuer(make_key("PS256"), make_key("ES384"))])
    assert refusal(other, presented) == "key"
    assert TokenVerifier([make_issuer(make_key(algorithm))]).verify(presented, NOW), "it is ignored, not forbidden"


@pytest.mark.parametrize("of_key", ALGORITHMS)
@pytest.mark.parametrize("of_token", ALGORITHMS)
def test_confusion_matrix_of_algorithms_and_keys(of_token, of_key):
    """JW-05, JW-07, JW-31: a token passes exactly where its algorithm is the key's."""
    verifier = TokenVerifier([make_issuer(make_key(of_key))])
    eddsa = {"EdDSA", "Ed25519"}
    presented = token(algorithm=of_token)
    if of_token == of_key or {of_token, of_key} <= eddsa:
        assert verifier.verify(presented, NOW).principal.subject == "user_123"
    else:
        assert refusal(verifier, presented) == "key"
        # The same signature under the name that the key expects.
        assert refusal(verifier, raw_token(json.dumps({"alg": of_key}), CLAIMS, of_token)) == "signature"


@pytest.mark.parametrize("claimed", [*ALGORITHMS, "none", "None", ""])
@pytest.mark.parametrize("of_key", [name for name in ALGORITHMS if name not in HS])
def test_confusion_matrix_of_public_keys_as_secrets(of_key, claimed):
    """JW-08: signed by HMAC under the public key, in all the forms in which it is published."""
    import hashlib
    import hmac as hmac_

    verifier = TokenVerifier([make_issuer(make_key(of_key))])
    pem = public_pem(private_key(of_key))
    signed = b64(json.dumps({"alg": claimed})) + b"." + b64(CLAIMS)
    for secret in (pem.encode(), pem.strip().encode(), json.dumps(public_jwk(of_key)).encode(), b""):
        forged = hmac_.new(secret, signed, hashlib.sha256).digest()
        assert refusal(verifier, signed + b"." + b64(forged)) in ("key", "signature")
    assert refusal(verifier, signed + b".") in ("key", "signature")


@pytest.mark.parametrize("algorithm", [name for name in RSA if name.startswith("PS")])
def test_pss_tokens_pass_with_a_key_that_says_so(algorithm):
    """JW-07."""
    verifier = TokenVerifier([make_issuer(Key(jwk=public_jwk(algorithm, alg=algorithm)))])
    assert verifier.verify(token(algorithm=algorithm), NOW)


@pytest.mark.parametrize(
    ("mapping", "claims", "scopes"),
    [
        pytest.param({"scp": "array"}, {"scp": ["a", "b"], "scope": "c"}, {"a", "b"}, id="JW-24 scp array"),
        pytest.param({"scp": "string"}, {"scp": "a b"}, {"a", "b"}, id="JW-24 scp string"),
        pytest.param(
            {"scope": "string", "permissions": "array"},
            {"permissions": ["p"], "scope": "s"},
            {"p", "s"},
            id="JW-24 both",
        ),
        pytest.param({"scope": "string"}, {"scope": None}, set(), id="none at all"),
        pytest.param({"scope": "string"}, {"scope": "  a   b "}, {"a", "b"}, id="spaces"),
        pytest.param({"scope": "string"}, {"scope": 'a"b é c'}, {"c"}, id="what is no scope is dropped"),
        pytest.param({"scp": "array"}, {"scp": ["a b", ""]}, set(), id="an element is one scope"),
        pytest.param({}, {"scope": "admin"}, set(), id="nothing is mapped"),
    ],
)
def test_scopes_come_from_the_mapped_claims_only(mapping, claims, scopes):
    verifier = TokenVerifier([make_issuer(scope_claims=mapping)])
    assert verifier.verify(token(good_claims(**claims)), NOW).principal.scopes == scopes


@pytest.mark.parametrize(
    ("option", "claims", "tier"),
    [
        ("tier", {}, "pro"),
        ("plan", {"plan": "enterprise"}, "enterprise"),
        (None, {}, None),
        ("tier", {"tier": None}, None),
        ("tier", {"tier": 5}, None),
        ("tier", {"tier": ["enterprise"]}, None),
        ("tier", {"tier": "pro\n"}, None),
    ],
)
def test_the_tier_is_text_or_none(option, claims, tier):
    verifier = TokenVerifier([make_issuer(tier_claim=option)])
    assert verifier.verify(token(good_claims(**claims)), NOW).principal.tier == tier


EVERYTHING = TokenVerifier([make_issuer(*(make_key(name) for name in ALGORITHMS))])
SIGNED = {name: token(algorithm=name) for name in ALGORITHMS}


@given(name=st.sampled_from(ALGORITHMS), data=st.data())
def test_a_mutated_token_never_passes_and_nothing_else_comes_out(name, data):
    presented = bytearray(SIGNED[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(presented) - 1))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "truncate", "double"]))
        if kind == "flip":
            presented[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            presented[place] = data.draw(st.sampled_from(b"ABCabc019-_.=+/ {}\x00\xff"))
        elif kind == "cut":
            del presented[place : place + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            presented[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        elif kind == "truncate":
            del presented[place:]
        else:
            presented[place:place] = presented[place : place + 20]
        if not presented:
            break
    # A later mutation may undo an earlier one; everything else is refused.
    if bytes(presented) != SIGNED[name]:
        refusal(EVERYTHING, bytes(presented))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
HEADER_NAMES = st.sampled_from(["alg", "kid", "typ", "cty", "crit", "b64", "jwk", "jku", "x5u", "x5c", "zip", "enc"])
CLAIM_NAMES = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "scope", "tier", "jti", "client_id"])


@given(
    header=st.dictionaries(HEADER_NAMES, JSON | st.sampled_from(["HS256", "none", "at+jwt"]), max_size=4),
    claims=st.dictionaries(CLAIM_NAMES, JSON, max_size=4),
    strict=st.booleans(),
)
def test_whatever_an_issuer_signs_is_accepted_or_refused_cleanly(header, claims, strict):
    presented = token({**good_claims(), **claims}, header=header)
    try:
        verified = (STRICT if strict else LENIENT).verify(presented, NOW)
    except TokenError:
        return
    who = verified.principal
    assert header.get("alg", "HS256") == "HS256" and "crit" not in header
    assert 0 < len(who.subject) <= 255 and all(isinstance(scope, str) for scope in who.scopes)
    assert verified.not_before <= NOW < verified.not_after


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(presented):
    refusal(EVERYTHING, presented)


@pytest.mark.parametrize("reason", ["x", "form", "iss"])
def test_the_verdict_says_no_more_than_that_it_is_one(reason):
    """AU-20, JW-32."""
    assert str(TokenError(reason)) == "the token is refused"


def test_no_secret_and_no_claim_is_in_an_error_or_a_repr():
    """JW-32."""
    canary = "canary-claim-0a9d"
    presented = raw_token('{"alg":"HS256"}', '{"sub":"' + canary + '",')
    with pytest.raises(TokenError) as caught:
        LENIENT.verify(presented, NOW)
    assert caught.value.__context__ is None, "the parser's error, with the text in it, is not chained"
    shown = f"{caught.value} {caught.value!r} {LENIENT!r} {make_issuer()!r}"
    assert canary not in shown and SECRET not in shown


def verified(number: int = 0, *, not_before: float = 0.0, not_after: float = NOW + 10) -> VerifiedToken:
    return VerifiedToken(Principal(subject=f"user_{number}"), not_before, not_after)


def test_a_remembered_token_holds_until_its_time_and_not_longer():
    """JW-30."""
    cache = TokenCache(10)
    cache.put(b"a", verified(not_before=NOW - 5))
    assert cache.get(b"b", NOW) is None
    found = cache.get(b"a", NOW)
    assert found is not None and found.subject == "user_0"
    assert cache.get(b"a", NOW + 9.9) is not None
    assert cache.get(b"a", NOW + 10) is None
    assert cache.get(b"a", NOW - 6) is None, "the clock was set back"


def test_the_memory_is_bounded_and_keeps_what_is_in_use():
    cache = TokenCache(100)
    cache.put(b"used", verified())
    for number in range(10_000):
        cache.put(b"%d" % number, verified(number))
        assert cache.get(b"used", NOW) is not None
        assert len(cache) <= 100
    assert cache.get(b"9999", NOW) is not None
    assert cache.get(b"1", NOW) is None


@pytest.mark.parametrize("size", [0, 1])
def test_a_memory_without_room_remembers_nothing(size):
    cache = TokenCache(size)
    cache.put(b"a", verified())
    assert cache.get(b"a", NOW) is None and len(cache) == 0


def test_threads_share_the_memory():
    cache = TokenCache(64)
    failures: list[str] = []

    def work(seed: int) -> None:
        try:
            for number in range(3_000):
                name = b"%d" % ((number * seed) % 200)
                found = cache.get(name, NOW)
                if found is not None and found.subject != f"user_{int(name)}":
                    failures.append(found.subject)
                cache.put(name, verified(int(name)))
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(cache) <= 64


def test_the_signature_covers_header_and_claims():
    other = b64('{"alg":"HS256","typ":"JWT"}')
    assert refusal(LENIENT, other + b"." + BODY + b"." + TAIL) == "signature"
    assert refusal(LENIENT, HEAD + b"." + b64(json.dumps(good_claims(sub="root"))) + b"." + TAIL) == "signature"
    assert sign("HS256", HEAD + b"." + BODY) is not None


# --- keys that are fetched -------------------------------------------------------------------------------------------

A, B = Pair("a"), Pair("b")
_HMAC_WITH_PUBLIC_KEY = raw_token('{"alg":"HS256","kid":"a"}', CLAIMS)


@pytest.fixture
def published() -> Provider:
    return Provider(A)


async def known(provider: Provider, *others, **options) -> TokenVerifier:
    issuer = provider.issuer(f"{provider.url}/jwks.json", **options)
    verifier = TokenVerifier([issuer, *others])
    await issuer.fetched.obtain(FrozenClock(NOW))
    return verifier


@pytest.mark.anyio
async def test_a_key_that_may_have_been_published_since_is_asked_for_by_name(published):
    verifier = await known(published)
    with pytest.raises(KeyUnknownError) as caught:
        verifier.verify(B.token(), NOW)
    assert caught.value.name == ("ES256", "b")
    assert caught.value.issuer.url == URL
    assert caught.value.reason == "key"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("presented", "reason"),
    [
        pytest.param(B.token(exp=int(NOW) - 10), "expired", id="expired"),
        pytest.param(B.token(iat=int(NOW) + 60), "early", id="early"),
        pytest.param(B.token(aud="other"), "aud", id="aud"),
        pytest.param(B.token(iss="https://evil.example"), "iss", id="iss"),
        pytest.param(B.token(sub=7), "sub", id="sub"),
        pytest.param(B.token(header={"alg": "HS512"}), "key", id="HS"),
        pytest.param(B.token(header={"alg": "none"}), "key", id="none"),
        pytest.param(A.token()[:-4] + b"AAAA", "signature", id="signature"),
        pytest.param(_HMAC_WITH_PUBLIC_KEY, "key", id="JW-08"),
    ],
)
async def test_no_key_is_asked_for_that_could_not_make_the_token_good(published, presented, reason):
    verifier = await known(published)
    with pytest.raises(TokenError) as caught:
        verifier.verify(presented, NOW)
    assert type(caught.value) is TokenError
    assert caught.value.reason == reason


@pytest.mark.anyio
async def test_a_large_token_is_read_when_its_key_is_there(published):
    verifier = await known(published)
    with pytest.raises(KeyUnknownError):
        verifier.verify(B.token(groups=[{"id": number} for number in range(100)]), NOW)
    with pytest.raises(KeyUnknownError):
        verifier.verify(raw_token('{"alg":"ES256","kid":"b"}', "[" * 900), NOW)


@pytest.mark.anyio
async def test_whose_a_key_is_follows_the_sets(published):
    """JW-16: a key that one issuer has published since never verifies the other's tokens."""
    other = Provider(B, url="https://other.example")
    issuer = other.issuer(f"{other.url}/jwks.json")
    clock = FrozenClock(NOW)
    verifier = await known(published, issuer)
    await issuer.fetched.obtain(clock)
    assert verifier.verify(B.token(iss=other.url), NOW).principal.issuer == other.url
    large = B.token(iss=other.url, groups=[{"id": number} for number in range(100)])
    assert verifier.verify(large, NOW), "the key's name tells whose it is; the claims need not be read first"
    twin = Pair("a")
    other.publish(twin)
    clock.advance(600)
    await issuer.fetched.obtain(clock)
    assert verifier.verify(twin.token(iss=other.url), NOW).principal.issuer == other.url
    assert verifier.verify(A.token(), NOW).principal.issuer == URL
    for forged in (twin.token(), A.token(iss=other.url), B.token(iss=other.url)):
        with pytest.raises(TokenError):
            verifier.verify(forged, NOW)


def test_a_cache_that_is_cleared_knows_nothing():
    cache = TokenCache(4)
    who = Principal(subject="a")
    for number in range(4):
        cache.put(bytes([number]), VerifiedToken(who, 0, NOW + 10))
    assert len(cache)
    cache.clear()
    assert len(cache) == 0
    assert cache.get(b"\x03", NOW) is None

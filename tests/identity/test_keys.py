"""A key has one algorithm, is long enough, public, and made for signatures; otherwise it is no key."""

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr, ValidationError

from sigil_policy.identity.keys import Key
from tests.identity.material import (
    ALGORITHMS,
    EC,
    HS,
    SECRET,
    b64,
    make_key,
    private_key,
    private_pem,
    public_jwk,
    public_pem,
    sign,
    small_rsa,
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_verifies_what_it_signed_and_nothing_else(algorithm):
    """JW-28."""
    key = make_key(algorithm)
    signature = sign(algorithm, b"message")
    assert key.verify(b"message", signature)
    assert not key.verify(b"massage", signature)
    for wrong in (b"", b"\x00", signature[:-1], signature + b"\x00", bytes(len(signature)), b"\xff" * len(signature)):
        assert not key.verify(b"message", wrong)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in HS])
def test_a_jwk_says_the_same_as_a_pem(algorithm):
    key = Key(jwk=public_jwk(algorithm, kid="k1", alg=algorithm, use="sig", x5u="https://canary.example/"))
    assert key.id == "k1"
    assert key.algorithm == algorithm
    assert key.verify(b"message", sign(algorithm, b"message"))


def test_an_oct_jwk_is_a_secret():
    key = Key(jwk={"kty": "oct", "alg": "HS256", "k": b64(SECRET).decode()})
    assert key.verify(b"message", sign("HS256", b"message"))


@pytest.mark.parametrize(("curve", "algorithm"), [*((name, name) for name in EC), ("EdDSA", "EdDSA")])
def test_a_curve_that_fits_one_algorithm_names_it(curve, algorithm):
    assert Key(jwk=public_jwk(curve)).algorithm == algorithm


def test_both_spellings_of_eddsa_are_one_algorithm():
    """JW-28: RFC 9864."""
    for name in ("EdDSA", "Ed25519"):
        assert make_key(name).accepts == {"EdDSA", "Ed25519"}
    assert Key(algorithm="EdDSA", jwk=public_jwk("EdDSA", alg="Ed25519")).accepts == {"EdDSA", "Ed25519"}
    assert make_key("RS256").accepts == {"RS256"}


def der_text() -> str:
    return private_key("EdDSA").public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "exactly one", id="nothing"),
        pytest.param({"algorithm": "HS256", "secret": SECRET, "pem": "x"}, "exactly one", id="two forms"),
        pytest.param({"secret": SECRET}, "never guessed", id="no algorithm"),
        pytest.param({"jwk": public_jwk("RS256")}, "never guessed", id="JW-07 an RSA JWK without alg"),
        pytest.param({"algorithm": "none", "secret": SECRET}, "algorithm", id="JW-06 none"),
        pytest.param({"algorithm": "HS1", "secret": SECRET}, "algorithm", id="JW-05 unknown"),
        pytest.param({"algorithm": "ES256K", "pem": "x"}, "algorithm", id="JW-05 not offered"),
        pytest.param({"algorithm": "HS256", "secret": "x" * 31}, "at least 32", id="JW-26 HS256 31 bytes"),
        pytest.param({"algorithm": "HS384", "secret": "x" * 47}, "at least 48", id="JW-26 HS384 47 bytes"),
        pytest.param({"algorithm": "HS512", "secret": "x" * 63}, "at least 64", id="JW-26 HS512 63 bytes"),
        pytest.param({"algorithm": "HS256", "secret": ""}, "at least 32", id="JW-26 empty"),
        pytest.param({"algorithm": "RS256", "pem": public_pem(small_rsa())}, "at least 2048", id="JW-27 RSA 1024"),
        pytest.param(
            {"algorithm": "HS256", "secret": public_pem(private_key("RS256"))}, "no secret", id="JW-08 PEM as secret"
        ),
        pytest.param({"algorithm": "HS256", "pem": public_pem(private_key("RS256"))}, "RS256", id="JW-08 PEM for HS"),
        pytest.param(
            {"algorithm": "HS256", "secret": str(public_jwk("RS256")).replace("'", '"')},
            "no secret",
            id="JW-08 JWK text",
        ),
        pytest.param({"algorithm": "HS256", "jwk": public_jwk("RS256")}, "oct", id="JW-08 JWK for HS"),
        pytest.param(
            {"algorithm": "HS256", "jwk": {"kty": "oct", "k": b64(bytes.fromhex(der_text())).decode()}},
            "no secret",
            id="JW-08 DER as secret",
        ),
        pytest.param({"algorithm": "RS256", "secret": SECRET}, "public key", id="JW-08 secret for RS"),
        pytest.param({"algorithm": "RS256", "pem": private_pem(private_key("RS256"))}, "private", id="a private PEM"),
        pytest.param(
            {"algorithm": "RS256", "jwk": {**public_jwk("RS256"), "d": "AQAB"}}, "private", id="a private JWK"
        ),
        pytest.param({"algorithm": "RS256", "pem": public_pem(private_key("ES256"))}, "another type", id="EC for RS"),
        pytest.param({"algorithm": "ES256", "pem": public_pem(private_key("ES384"))}, "another type", id="wrong curve"),
        pytest.param({"algorithm": "ES256", "pem": public_pem(private_key("RS256"))}, "another type", id="RSA for ES"),
        pytest.param({"algorithm": "EdDSA", "pem": public_pem(private_key("Ed448"))}, "another type", id="Ed448"),
        pytest.param({"algorithm": "RS256", "pem": "-----BEGIN NONSENSE-----"}, "not a readable", id="not a PEM"),
        pytest.param({"algorithm": "RS256", "jwk": {"kty": "RSA", "n": "AQAB"}}, "not a readable", id="half a JWK"),
        pytest.param({"algorithm": "RS256", "jwk": {"kty": "RSA", "n": 5, "e": []}}, "not a readable", id="odd JWK"),
        pytest.param({"algorithm": "ES256", "jwk": {"kty": ["EC"]}}, "not a readable", id="odd kty"),
        pytest.param({"jwk": {"kty": "EC", "crv": ["P-256"], "alg": ["ES256"]}}, "supported", id="odd alg"),
        pytest.param({"jwk": public_jwk("RS256", alg="RSA-OAEP")}, "supported", id="an encryption algorithm"),
        pytest.param({"jwk": public_jwk("RS256", alg="none")}, "supported", id="JW-06 none in the JWK"),
        pytest.param(
            {"algorithm": "RS256", "jwk": public_jwk("RS256", alg="PS256")}, "one algorithm", id="JW-07 two algs"
        ),
        pytest.param({"jwk": public_jwk("RS256", alg="RS256", use="enc")}, "use", id="JK-03 use enc"),
        pytest.param({"jwk": public_jwk("RS256", alg="RS256", key_ops=["encrypt"])}, "key_ops", id="JK-03 key_ops"),
        pytest.param({"jwk": public_jwk("RS256", alg="RS256", key_ops="verify")}, "key_ops", id="JK-03 odd key_ops"),
        pytest.param({"id": "a", "jwk": public_jwk("ES256", kid="b")}, "kid", id="two ids"),
        pytest.param({"jwk": public_jwk("ES256", kid=5)}, "kid", id="a number as kid"),
        pytest.param({"algorithm": "HS256", "jwk": {"kty": "oct", "k": "a+b="}}, "base64url", id="padded k"),
        pytest.param({"algorithm": "HS256", "jwk": {"kty": "oct"}}, "base64url", id="no k"),
        pytest.param({"algorithm": "HS256", "secret": SECRET, "strength": 5}, "strength", id="unknown option"),
    ],
)
def test_an_unfit_key_is_refused_when_it_is_configured(options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        Key(**options)
    shown = f"{caught.value} {caught.value!r}"
    assert SECRET not in shown and "PRIVATE" not in shown.replace("PRIVATE KEY-----'", "") and "AQAB" not in shown


def test_an_rsa_exponent_of_one_is_no_key():
    """With e = 1 every signature would fit."""
    with pytest.raises(ValidationError, match="not a readable"):
        Key(algorithm="RS256", jwk={**public_jwk("RS256"), "e": "AQ"})


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256", "EdDSA"])
def test_no_key_material_is_shown(algorithm):
    """JW-32."""
    key = make_key(algorithm, id="k1")
    assert key.verify(b"message", sign(algorithm, b"message"))
    shown = f"{key} {key!r} {key._check!r}"
    assert "k1" in shown
    assert SECRET not in shown and "BEGIN" not in shown
    oct_key = Key(jwk={"kty": "oct", "alg": "HS256", "k": b64(SECRET).decode()})
    assert b64(SECRET).decode() not in repr(oct_key)


def test_a_key_does_not_change():
    key = make_key("HS256")
    with pytest.raises(AttributeError):
        key.algorithm = "none"
    assert key == Key(algorithm="HS256", secret=SecretStr(SECRET))

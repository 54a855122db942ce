"""RFC 9449 sections 4.2 and 4.3: the grammar of a proof; RFC 7638: thumbprints; RFC 3986 section 6.2: URLs."""

import json
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from sigil_policy.wire.dpop import MAX_PATH, MAX_PROOF, normal_path, normal_url, parse_proof, token_hash
from tests.identity.material import b64, private_key, small_rsa
from tests.identity.proofs import (
    RFC_HASH,
    RFC_RESOURCE_REQUEST,
    RFC_THUMBPRINT,
    RFC_TOKEN,
    RFC_TOKEN_REQUEST,
    claims_of,
    client_jwk,
    proof,
    raw_proof,
    thumbprint,
)

ALGORITHMS = ("RS256", "RS512", "PS256", "PS384", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")


def test_the_proof_of_the_token_request_is_read():
    """RFC 9449 section 4.2, figure 3."""
    found = parse_proof(RFC_TOKEN_REQUEST)
    assert found.algorithm == "ES256"
    assert found.thumbprint == RFC_THUMBPRINT
    assert (found.id, found.method, found.url) == ("-BwC3ESc6acc2lTc", "POST", "https://server.example.com/token")
    assert (found.issued, found.token_hash, found.nonce) == (1562262616, None, None)


def test_the_proof_of_the_resource_request_is_read():
    """RFC 9449 section 7.1, figures 12 and 13; section 6.1, figure 9, for the thumbprint."""
    found = parse_proof(RFC_RESOURCE_REQUEST)
    assert found.thumbprint == RFC_THUMBPRINT
    assert (found.id, found.method) == ("e1j3V_bKic8-LAEB", "GET")
    assert (found.url, found.issued) == ("https://resource.example.org/protectedresource", 1562262618)
    assert found.token_hash == RFC_HASH == token_hash(RFC_TOKEN)


def test_the_thumbprint_of_rfc_7638():
    """RFC 7638 section 3.1; the members beside those that make the key do not count."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknj"
        "hMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQ"
        "vRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzK"
        "nqDKgw"
    )
    jwk = {"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256", "kid": "2011-04-29"}
    found = parse_proof(proof(header={"alg": "RS256", "jwk": jwk}))
    assert found.thumbprint == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_brings_the_key_that_fits(algorithm):
    found = parse_proof(proof(algorithm=algorithm))
    assert found.key == client_jwk(algorithm)
    assert found.thumbprint == thumbprint(client_jwk(algorithm))


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"typ": None}, id="no typ"),
        pytest.param({"typ": "JWT"}, id="typ JWT"),
        pytest.param({"typ": "at+jwt"}, id="an access token"),
        pytest.param({"typ": ["dpop+jwt"]}, id="typ a list"),
        pytest.param({"alg": None}, id="no alg"),
        pytest.param({"alg": "none"}, id="none"),
        pytest.param({"alg": "NONE"}, id="NONE"),
        pytest.param({"alg": "HS256"}, id="HS256"),
        pytest.param({"alg": 7}, id="alg a number"),
        pytest.param({"alg": "ES384"}, id="alg of another curve"),
        pytest.param({"alg": "RS256"}, id="alg of another kind"),
        pytest.param({"alg": "ES256K"}, id="alg unknown"),
        pytest.param({"jwk": None}, id="no jwk"),
        pytest.param({"jwk": "key"}, id="jwk a string"),
        pytest.param({"jwk": {}}, id="jwk empty"),
        pytest.param({"alg": "HS256", "jwk": {"kty": "oct", "k": "AAAA"}}, id="a secret"),
        pytest.param({"jwk": {**client_jwk(), "d": "AAAA"}}, id="a private key"),
        pytest.param({"jwk": {**client_jwk(), "d": None}}, id="a private member without value"),
        pytest.param({"jwk": {**client_jwk(), "p": "AAAA"}}, id="a private prime"),
        pytest.param({"jwk": {**client_jwk(), "use": "enc"}}, id="for encryption"),
        pytest.param({"jwk": {**client_jwk(), "key_ops": ["sign"]}}, id="to sign"),
        pytest.param({"jwk": {**client_jwk(), "key_ops": "verify"}}, id="key_ops a string"),
        pytest.param({"jwk": {**client_jwk(), "alg": "ES384"}}, id="for another algorithm"),
        pytest.param({"jwk": {**client_jwk(), "alg": []}}, id="for a list of algorithms"),
        pytest.param({"jwk": {**client_jwk(), "crv": "secp256k1"}}, id="another curve"),
        pytest.param({"jwk": {**client_jwk(), "crv": ["P-256"]}}, id="a list of curves"),
        pytest.param({"jwk": {**client_jwk(), "x": client_jwk()["x"] + "="}}, id="padding"),
        pytest.param({"jwk": {**client_jwk(), "x": client_jwk()["x"][:-4]}}, id="short x"),
        pytest.param({"jwk": {**client_jwk(), "x": 7}}, id="x a number"),
        pytest.param({"jwk": {**client_jwk(), "x": "é" * 43}}, id="x beyond ASCII"),
        pytest.param({"jwk": {"crv": "P-256", "kty": "EC", "x": client_jwk()["x"]}}, id="no y"),
        pytest.param({"crit": ["exp"], "exp": 1}, id="crit"),
        pytest.param({"b64": False}, id="b64"),
    ],
)  # fmt: skip
def test_a_header_that_is_none_of_a_proof(header):
    """RFC 9449 section 4.3, checks 4 (typ), 5 (an asymmetric algorithm), 6 (the jwk) and 7 (no private key)."""
    with pytest.raises(ValueError, match=r"."):
        parse_proof(proof(header=header))


def rsa_jwk(private, **members):
    jwk = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
    return {"kty": "RSA", "n": jwk["n"], "e": jwk["e"], **members}


def integer(number: int) -> str:
    return b64(number.to_bytes((number.bit_length() + 7) // 8)).decode()


@pytest.mark.parametrize(
    "jwk",
    [
        pytest.param(rsa_jwk(small_rsa()), id="1024 bits"),
        pytest.param(rsa_jwk(private_key("RS256"), n=integer((1 << 2046) + 1)), id="2047 bits"),
        pytest.param(rsa_jwk(private_key("RS256"), n=integer((1 << 4096) + 1)), id="4097 bits"),
        pytest.param(rsa_jwk(private_key("RS256"), n="AP" + "_" * 341), id="a zero in front"),
        pytest.param(rsa_jwk(private_key("RS256"), n=""), id="no modulus"),
        pytest.param(rsa_jwk(private_key("RS256"), e=integer(1)), id="exponent 1"),
        pytest.param(rsa_jwk(private_key("RS256"), e=integer(4)), id="an even exponent"),
        pytest.param(rsa_jwk(private_key("RS256"), e=integer((1 << 32) + 1)), id="a long exponent"),
        pytest.param(rsa_jwk(private_key("RS256"), e=""), id="no exponent"),
        pytest.param(rsa_jwk(private_key("RS256"), oth=[]), id="more primes"),
    ],
)  # fmt: skip
def test_an_rsa_key_that_is_weak_or_takes_long(jwk):
    """RFC 7518 section 3.3, and what a client must not make us compute."""
    with pytest.raises(ValueError, match=r"."):
        parse_proof(proof(header={"alg": "RS256", "jwk": jwk}))


def test_an_rsa_key_of_an_odd_size_is_read():
    private = rsa.generate_private_key(public_exponent=3, key_size=2049)
    assert parse_proof(proof(header={"alg": "PS256", "jwk": rsa_jwk(private)})).key["e"] == "Aw"


@pytest.mark.parametrize(
    "claims",
    [
        pytest.param({name: None}, id=f"no {name}")
        for name in ("jti", "htm", "htu", "iat")
    ]
    + [
        pytest.param({name: value}, id=f"{name} {value!r:.20}")
        for name in ("jti", "htm", "htu", "ath", "nonce")
        for value in (7, "", [], {}, True, "x" * 4_000)
    ]
    + [
        pytest.param({name: value}, id=f"{name} {value!r}")
        for name in ("iat", "exp", "nbf")
        for value in ("1700000000", True, -1, 1_700_000_000_000, [1], {})
    ],
)  # fmt: skip
def test_claims_that_are_none_of_a_proof(claims):
    """RFC 9449 section 4.3, check 3: what has to be there, and of which type."""
    with pytest.raises(ValueError, match=r"."):
        parse_proof(proof(**claims))


def test_a_claim_that_is_null_is_not_left_out():
    for name in ("ath", "nonce", "exp", "nbf"):
        text = json.dumps({**claims_of(), name: None})
        with pytest.raises(ValueError, match=name):
            parse_proof(raw_proof(json.dumps({"typ": "dpop+jwt", "alg": "ES256", "jwk": client_jwk()}), text))


@pytest.mark.parametrize(
    "value",
    [
        b"", b".", b"..", b"...", b"a.b.c", b"\xff.\xff.\xff", b"." * MAX_PROOF,
        RFC_RESOURCE_REQUEST + b"=", RFC_RESOURCE_REQUEST + b" ", b" " + RFC_RESOURCE_REQUEST,
        RFC_RESOURCE_REQUEST + b", " + RFC_RESOURCE_REQUEST, RFC_RESOURCE_REQUEST[:-1],
        RFC_RESOURCE_REQUEST + b"A" * MAX_PROOF,
        raw_proof(b"[" * 1_000, b"{}"), raw_proof(b"{}", b"{}"), raw_proof(b'"x"', b'"y"'),
    ],
    ids=range(16),
)  # fmt: skip
def test_what_is_no_compact_jws(value):
    """RFC 9449 section 4.3, check 2: a single, well-formed JWT."""
    with pytest.raises(ValueError, match=r"."):
        parse_proof(value)


@given(st.data())
def test_nothing_but_a_value_error_comes_out(data):
    made = bytearray(RFC_RESOURCE_REQUEST)
    for _ in range(data.draw(st.integers(1, 5))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        parse_proof(bytes(made))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from(["typ", "alg", "jwk", "crit"]), JSON),
    st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "use", "key_ops", "alg", "d"]), JSON),
    st.dictionaries(st.sampled_from(["jti", "htm", "htu", "iat", "ath", "nonce", "exp", "nbf"]), JSON),
)
def test_whatever_stands_in_it_it_is_read_or_refused(header, key, claims):
    head = {"typ": "dpop+jwt", "alg": "ES256", "jwk": {**client_jwk(), **key}, **header}
    made = b64(json.dumps(head)) + b"." + b64(json.dumps({**claims_of(), **claims})) + b".c2ln"
    with suppress(ValueError):
        found = parse_proof(made)
        assert found.thumbprint == thumbprint(dict(found.key))


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        pytest.param("https://api.example.com/a", "https://api.example.com/a", id="as it is"),
        pytest.param("HTTPS://API.Example.COM/A", "https://api.example.com/A", id="6.2.2.1 case"),
        pytest.param("https://h/%7eann/%2f%3a", "https://h/~ann/%2F%3A", id="6.2.2.1, 6.2.2.2 escapes"),
        pytest.param("https://h/a/./b/../c", "https://h/a/c", id="6.2.2.3 dot segments"),
        pytest.param("https://h/%2e%2E/x/%2e", "https://h/x/", id="6.2.2.3 dot segments in escapes"),
        pytest.param("https://h/../../a", "https://h/a", id="5.2.4 above the root"),
        pytest.param("https://h/a/..", "https://h/", id="5.2.4 at the end"),
        pytest.param("https://h/a..b/.c/...", "https://h/a..b/.c/...", id="dots in names"),
        pytest.param("https://h//a//", "https://h//a//", id="empty segments stay"),
        pytest.param("https://h", "https://h/", id="6.2.3 the empty path"),
        pytest.param("https://h:443", "https://h/", id="6.2.3 https"),
        pytest.param("http://h:80/", "http://h/", id="6.2.3 http"),
        pytest.param("https://h:/", "https://h/", id="6.2.3 the empty port"),
        pytest.param("https://h:0443/", "https://h/", id="zeros before a port"),
        pytest.param("https://h:80/", "https://h:80/", id="another port"),
        pytest.param("https://h:0/", "https://h:0/", id="port 0 is not the default"),
        pytest.param("https://[2001:DB8::1]:8443/", "https://[2001:db8::1]:8443/", id="IPv6"),
        pytest.param("https://%61pi.example/", "https://api.example/", id="an escape in the host"),
        pytest.param("https://h/a?b=c#d", "https://h/a", id="9449 4.3 query and fragment"),
        pytest.param("https://h?b", "https://h/", id="a query and no path"),
        pytest.param("https://h/a b/é", "https://h/a%20b/%C3%A9", id="what has to be escaped"),
        pytest.param("https://h/100%", "https://h/100%", id="a lone percent sign"),
        pytest.param("https://h/%252e", "https://h/%252e", id="nothing twice"),
    ],
)  # fmt: skip
def test_a_url_has_one_spelling(url, normal):
    """RFC 3986 section 6.2; RFC 9449 section 4.3."""
    assert normal_url(url) == normal
    assert normal_url(normal) == normal


@pytest.mark.parametrize(
    "url",
    ["", "/a", "api.example.com/a", "//api.example.com/a", "ftp://h/", "https:/h/", "https:///a", "https://user@h/",
     "https://user:pw@h/", "https://h:port/", "https://h:123456/", "https://h\\@evil/", "https://h /", "https://é/",
     "https://[::1/", "https://[x]/", " https://h/", "javascript://h/", "wss://h/"],
)  # fmt: skip
def test_what_is_no_url_of_a_request(url):
    with pytest.raises(ValueError, match="not an absolute"):
        normal_url(url)


def test_a_path_of_many_letters_beyond_ascii_is_read():
    assert normal_path(("/" + "語" * 130).encode()) == "/" + "%E8%AA%9E" * 130


@pytest.mark.parametrize(
    "path", [b"", b"a", b"*", b"?x", b"/" + b"a" * MAX_PATH, b"/" + b"%41" * 401, b"/" + b" " * 401]
)
def test_what_is_no_path_of_a_request(path):
    with pytest.raises(ValueError, match="path"):
        normal_path(path)


@given(st.binary(max_size=200))
def test_every_path_is_normal_ascii_or_refused(path):
    assert normal_path(b"/" + path).isascii()


@given(st.lists(st.sampled_from(["a", ".", "..", "", "%2e", "%2F", "~", "é"]), max_size=12))
def test_a_normal_path_stays(segments):
    path = normal_path(("/" + "/".join(segments)).encode())
    assert normal_path(path.encode()) == path
    assert not {".", ".."} & set(path.split("/"))


@given(st.text(max_size=100))
def test_every_text_is_a_url_or_refused(text):
    for url in (text, f"https://{text}", f"https://h/{text}"):
        with suppress(ValueError):
            assert normal_url(url).isascii()

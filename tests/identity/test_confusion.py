"""The confusion matrix: every algorithm in a token's header against every key, signed in every way that people have
tried. What is not signed by the key of that algorithm is 401, whatever else the token brings along; nothing is 5xx.

RFC 8725 sections 2.1 and 3.1, RFC 7515 section 4.1; standards JW-05 to JW-09, JW-31.
"""

import hashlib
import hmac
import json
import socket
import threading
from functools import cache

import anyio
import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms
from pydantic import SecretStr

from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import KeySet
from sigil_policy.identity.keys import Key
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import (
    ALGORITHMS,
    AUDIENCE,
    EC,
    HS,
    NOW,
    RSA,
    SECRET,
    URL,
    b64,
    good_claims,
    private_key,
    public_jwk,
    public_pem,
)

PUBLIC = tuple(algorithm for algorithm in ALGORITHMS if algorithm not in HS)
EDDSA = ("EdDSA", "Ed25519")
WRONG_SECRET = "wrong-" * 16
HASHES = {"256": "sha256", "384": "sha384", "512": "sha512"}
KID = "2026-01"
CLAIMS = b64(json.dumps(good_claims()))


@cache
def other_key(algorithm: str):
    """An attacker's own key pair for `algorithm`."""
    if algorithm in RSA:
        return _other_rsa()
    if algorithm in EC:
        return ec.generate_private_key(EC[algorithm]())
    return ed25519.Ed25519PrivateKey.generate()


@cache
def _other_rsa():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def sign_with(whose: str, algorithm: str, message: bytes) -> bytes:
    """A right signature of `algorithm`, by `ours` or by `theirs`; ours of another key type is no key of the issuer."""
    if algorithm in HS:
        secret = SECRET if whose == "ours" else WRONG_SECRET
        return hmac_of(secret.encode(), algorithm, message)
    private = private_key(algorithm) if whose == "ours" else other_key(algorithm)
    return get_default_algorithms()["EdDSA" if algorithm in EDDSA else algorithm].sign(message, private)


def hmac_of(secret: bytes, algorithm: str, message: bytes) -> bytes:
    return hmac.new(secret, message, HASHES.get(algorithm[2:], "sha256")).digest()


def made(header: dict, signature) -> bytes:
    signed = b64(json.dumps(header)) + b"." + CLAIMS
    return signed + b"." + b64(signature(signed))


# --- the canary: a key set of the attacker's, that nobody must ask for ------------------------------------------------


class Canary:
    """Listens on loopback, and counts who connects."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/jwks.json"
        self.asked = 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.asked += 1
            connection.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def canary():
    canary = Canary()
    yield canary
    assert canary.asked == 0, "a URL in a token's header was asked"
    with socket.create_connection(("127.0.0.1", int(canary.url.split(":")[2].split("/")[0]))):
        pass
    for _ in range(6_000):
        if canary.asked:
            break
        threading.Event().wait(0.01)
    assert canary.asked == 1, "the canary would have noticed"
    canary.close()


# --- the services: one for each key ----------------------------------------------------------------------------------


@cache
def service(held: str, source: str) -> PolicyStack:
    """Trusts one key, which is for the algorithm `held`."""
    return PolicyStack(nothing, policies=[BearerAuth(issuers=[_issuer(held, source)])], clock=FrozenClock(NOW))


def _issuer(held: str, source: str) -> Issuer:
    if source == "fetched":
        body = {"keys": [public_jwk(held, kid=KID, alg=held)]}
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=body))
        # In time for every row: the first token makes the set be fetched.
        keys = KeySet(f"{URL}/jwks.json", transport=transport, burst=10, deadline=30)
        return Issuer(url=URL, audience=AUDIENCE, keys=keys)
    if held in HS:
        jwk = {"kty": "oct", "k": b64(SECRET).decode(), "alg": held}
        key = Key(algorithm=held, secret=SecretStr(SECRET)) if source == "configured" else Key(jwk=jwk)
    elif source == "configured":
        key = Key(algorithm=held, pem=public_pem(private_key(held)))
    else:
        key = Key(jwk=public_jwk(held, alg=held))
    return Issuer(url=URL, audience=AUDIENCE, keys=[key])


async def nothing(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


# --- the rows --------------------------------------------------------------------------------------------------------


def public_bytes(held: str) -> dict[str, bytes]:
    """What everybody knows of the key for `held`, in the forms in which it may end up as an HMAC secret."""
    private = private_key(held if held not in HS else "RS256")
    public = private.public_key()
    pem = public_pem(private).encode()
    jwk = public_jwk(held if held not in HS else "RS256")
    forms = {
        "PEM": pem,
        "PEM without line feed": pem.rstrip(b"\n"),
        "DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "JWK": json.dumps(jwk).encode(),
        "compact JWK": json.dumps(jwk, separators=(",", ":"), sort_keys=True).encode(),
        "nothing": b"",
    }
    if isinstance(public, rsa.RSAPublicKey):
        forms["PKCS1"] = public.public_bytes(Encoding.DER, PublicFormat.PKCS1)
        forms["n"] = jwk["n"].encode()
    else:
        forms["x"] = jwk["x"].encode()
    return forms


def rows(held: str, alg: str, canary_url: str):
    """Tokens that say `alg`, for a service whose one key is for `held`: (what it is, the token, whether it passes)."""
    fits = alg in (EDDSA if held in EDDSA else (held,))
    head = {"alg": alg, "kid": KID}

    def row(name: str, passes: bool, signature, header: dict = head):
        return name, made(header, signature), passes

    def ours(message: bytes) -> bytes:
        # RS and PS share their key pair here, as a careless issuer's would: still each key has one algorithm.
        return sign_with("ours", alg, message)

    def theirs(message: bytes) -> bytes:
        return sign_with("theirs", alg, message)

    yield row("right", fits, ours)
    yield row("wrong", False, theirs)
    yield row("no signature", False, lambda _: b"")
    if not fits:
        yield row("signed as the key would", False, lambda message: sign_with("ours", held, message))
    for form, secret in public_bytes(held).items():
        yield row(f"HMAC with {form}", False, lambda message, secret=secret: hmac_of(secret, alg, message))
    for member in ("jwk", "jku", "x5u", "x5c", "x5t"):
        offering = {**head, member: offered(member, alg, canary_url)}
        yield row(f"wrong with {member}", False, theirs, offering)
        # Ignored is ignored: such a member neither helps nor harms.
        yield row(f"right with {member}", fits, ours, offering)


NONE = (
    "none",
    "None",
    "NONE",
    "nOnE",
    "none ",
    " none",
    "non\u0435",
    "",
    None,
    False,
    True,
    0,
    [],
    ["none"],
    {"alg": "none"},
)


def unsigned_rows(held: str):
    """Tokens that say that they are not signed, in every spelling; or say nothing at all."""
    for spelling in (*NONE, [held], held.lower(), f"{held} ", f"{held}\0"):
        head = {"alg": spelling, "kid": KID}
        yield f"{spelling!r}, no signature", made(head, lambda _: b""), False
        yield f"{spelling!r}, right signature", made(head, lambda message: sign_with("ours", held, message)), False
    yield "no alg", made({"kid": KID}, lambda message: sign_with("ours", held, message)), False


@cache
def offered(name: str, alg: str, canary_url: str):
    """The attacker's own key, as the header member `name` would carry it or point to it."""
    alg = alg if alg not in HS else "RS256"
    public = other_key(alg).public_key()
    if name == "jwk":
        jwk = get_default_algorithms()["EdDSA" if alg in EDDSA else alg].to_jwk(public, as_dict=True)
        return {**jwk, "kid": KID}
    if name == "x5c":
        return [public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex()]
    return canary_url if name != "x5t" else hashlib.sha1(canary_url.encode()).hexdigest()


# --- the matrix ------------------------------------------------------------------------------------------------------

SERVICES = [(held, source) for source in ("configured", "JWK") for held in ALGORITHMS]
SERVICES += [(held, "fetched") for held in PUBLIC]


async def verdicts(app: PolicyStack, presented) -> list[str]:
    """The rows whose verdict is another than the expected one."""
    wrong = []
    for name, token, passes in presented:
        sent = await drive(app, headers={"authorization": b"Bearer " + token})
        expected = 200 if passes else 401
        if sent.status != expected:
            wrong.append(f"{name}: {sent.status}, not {expected}")
        elif not passes and (sent.json()["error_code"], sent.header("www-authenticate")) != (
            "AUTH_002",
            'Bearer realm="api", error="invalid_token"',
        ):
            wrong.append(f"{name}: {sent.json()}, {sent.header('www-authenticate')}")
    return wrong


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize(("held", "source"), SERVICES, ids=[f"{held} {source}" for held, source in SERVICES])
def test_only_the_key_of_the_tokens_algorithm_verifies_it(held, source, alg, canary):
    assert anyio.run(verdicts, service(held, source), rows(held, alg, canary.url)) == []


@pytest.mark.parametrize(("held", "source"), SERVICES, ids=[f"{held} {source}" for held, source in SERVICES])
def test_no_key_verifies_a_token_that_says_it_is_not_signed(held, source):
    assert anyio.run(verdicts, service(held, source), unsigned_rows(held)) == []


def test_the_matrix_has_every_algorithm_and_finds_a_verifier_that_is_confused(canary):
    """It can fail: a service that takes the public key for a secret lets exactly the classic row pass."""
    confused = Key(algorithm="HS256", secret=SecretStr(SECRET))
    secret = public_pem(private_key("RS256")).encode()
    object.__setattr__(confused, "_check", lambda message, given: given == hmac_of(secret, "HS256", message))
    app = PolicyStack(
        nothing,
        policies=[BearerAuth(issuers=[Issuer(url=URL, audience=AUDIENCE, keys=[confused])])],
        clock=FrozenClock(NOW),
    )
    found = anyio.run(verdicts, app, rows("RS256", "HS256", canary.url))
    assert found == ["HMAC with PEM: 200, not 401"]
    assert {held for held, _ in SERVICES} == set(ALGORITHMS)

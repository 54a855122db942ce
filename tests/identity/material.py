"""Keys of every kind, and tokens as an issuer, or a forger, would write them."""

import hashlib
import hmac
import json
from base64 import urlsafe_b64encode
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import get_default_algorithms
from pydantic import SecretStr

from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key

NOW = 1_700_000_000.0
URL = "https://auth.sigil.acti.ai"
AUDIENCE = "sigil-api"
SECRET = "canary-secret-5c1b0d7e-long-enough-for-hs512-with-64-bytes-of-text"
HS = ("HS256", "HS384", "HS512")
RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
EC = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
ALGORITHMS = (*HS, *RSA, *EC, "EdDSA", "Ed25519")


@cache
def private_key(algorithm: str):
    """One key pair per key type; RS and PS share theirs, as a careless issuer would."""
    if algorithm in RSA:
        return _rsa()
    if algorithm in EC:
        return ec.generate_private_key(EC[algorithm]())
    if algorithm == "Ed448":
        return ed448.Ed448PrivateKey.generate()
    return ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else private_key("EdDSA")


@cache
def _rsa():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def small_rsa():
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)


def public_pem(private) -> str:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def private_pem(private) -> str:
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_jwk(algorithm: str, **members) -> dict:
    name = "EdDSA" if algorithm == "Ed25519" else algorithm
    jwk = get_default_algorithms()[name].to_jwk(private_key(algorithm).public_key(), as_dict=True)
    return {**jwk, **members}


def make_key(algorithm: str, **options) -> Key:
    if algorithm in HS:
        return Key(algorithm=algorithm, secret=SecretStr(SECRET), **options)
    return Key(algorithm=algorithm, pem=public_pem(private_key(algorithm)), **options)


def make_issuer(*keys: Key, **options) -> Issuer:
    return Issuer(**{"url": URL, "audience": AUDIENCE, "keys": keys or (make_key("HS256"),), **options})


def good_claims(**changes) -> dict:
    """Claims that pass; a change to None takes the claim out."""
    claims = {
        "iss": URL,
        "aud": AUDIENCE,
        "sub": "user_123",
        "exp": int(NOW) + 3600,
        "iat": int(NOW) - 10,
        "scope": "agents:read agents:write",
        "tier": "pro",
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not None}


def b64(data: bytes | str) -> bytes:
    return urlsafe_b64encode(data.encode() if isinstance(data, str) else data).rstrip(b"=")


def sign(algorithm: str, message: bytes) -> bytes:
    if algorithm in HS:
        return hmac.new(SECRET.encode(), message, getattr(hashlib, f"sha{algorithm[2:]}")).digest()
    name = "EdDSA" if algorithm == "Ed25519" else algorithm
    return get_default_algorithms()[name].sign(message, private_key(algorithm))


def token(claims: dict | None = None, *, algorithm: str = "HS256", header: dict | None = None) -> bytes:
    """A signed token; `header` is merged into `{"alg": algorithm}`."""
    head = {"alg": algorithm, **(header or {})}
    return raw_token(json.dumps(head), json.dumps(good_claims() if claims is None else claims), algorithm)


def raw_token(header: bytes | str, claims: bytes | str, algorithm: str = "HS256") -> bytes:
    """A rightly signed token over exactly these texts, whatever they are."""
    signed = b64(header) + b"." + b64(claims)
    return signed + b"." + b64(sign(algorithm, signed))

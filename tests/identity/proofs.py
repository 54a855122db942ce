"""Proofs as a client, or a forger, would make them, and tokens that are bound to a key or a certificate."""

import json
from base64 import b64encode, urlsafe_b64encode
from hashlib import sha256
from itertools import count
from typing import Any

from jwt.algorithms import get_default_algorithms

from tests.identity.material import NOW, b64, good_claims, private_key, public_jwk, token

ORIGIN = "https://api.example.com"
_numbers = count()

# RFC 9449 section 4.1, figure 2 and section 7.1, figure 12; the key of both, and its thumbprint (section 6.1).
RFC_HEADER = (
    "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJo"
    "RjQyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19"
)
RFC_TOKEN_REQUEST = (
    f"{RFC_HEADER}.eyJqdGkiOiItQndDM0VTYzZhY2MybFRjIiwiaHRtIjoiUE9TVCIsImh0dSI6Imh0dHBzOi8vc2VydmVyLmV4YW1wbGUuY29tL3R"
    "va2VuIiwiaWF0IjoxNTYyMjYyNjE2fQ.2-GxA6T8lP4vfrg8v-FdWP0A0zdrj8igiMLvqRMUvwnQg4PtFLbdLXiOSsX0x7NVY-FNyJK70nfbV37xRZ"
    "T3Lg"
).encode()
RFC_RESOURCE_REQUEST = (
    f"{RFC_HEADER}.eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9w"
    "cm90ZWN0ZWRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNFc05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFb"
    "yJ9.2oW9RP35yRqzhrtNP86L-Ey71EOptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
).encode()
RFC_TOKEN = b"Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU"
RFC_THUMBPRINT = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
RFC_HASH = "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo"


def base64url_hash(data: bytes) -> str:
    return urlsafe_b64encode(sha256(data).digest()).rstrip(b"=").decode()


def client_jwk(algorithm: str = "ES256") -> dict[str, Any]:
    """The public key of a client, with the members that RFC 7638 counts and no others."""
    jwk = public_jwk(algorithm)
    return {name: jwk[name] for name in ("crv", "e", "kty", "n", "x", "y") if name in jwk}


def thumbprint(jwk: dict[str, Any]) -> str:
    return base64url_hash(json.dumps(jwk, sort_keys=True, separators=(",", ":")).encode())


def bound_token(algorithm: str = "ES256", **claims: Any) -> bytes:
    return token(good_claims(cnf={"jkt": thumbprint(client_jwk(algorithm))}, **claims))


def claims_of(presented: bytes = b"", **changes: Any) -> dict[str, Any]:
    """Claims that pass for `GET /`; a change to None takes the claim out."""
    claims = {
        "jti": f"proof-{next(_numbers)}",
        "htm": "GET",
        "htu": f"{ORIGIN}/",
        "iat": int(NOW),
        "ath": base64url_hash(presented),
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not None}


def proof(
    presented: bytes = b"", *, algorithm: str = "ES256", header: dict[str, Any] | None = None, **claims: Any
) -> bytes:
    """A proof for `presented`, rightly signed whatever stands in it."""
    head = {"typ": "dpop+jwt", "alg": algorithm, "jwk": client_jwk(algorithm), **(header or {})}
    head = {name: value for name, value in head.items() if value is not None}
    return raw_proof(json.dumps(head), json.dumps(claims_of(presented, **claims)), algorithm)


def raw_proof(header: str | bytes, claims: str | bytes, algorithm: str = "ES256") -> bytes:
    signed = b64(header) + b"." + b64(claims)
    name = "EdDSA" if algorithm == "Ed25519" else algorithm
    return signed + b"." + b64(get_default_algorithms()[name].sign(signed, private_key(algorithm)))


def dpop_headers(presented: bytes, made: bytes | None = None, **claims: Any) -> dict[str, bytes]:
    """The two headers of a request with a token and a proof."""
    return {
        "authorization": b"DPoP " + presented,
        "dpop": proof(presented, **claims) if made is None else made,
    }


def escaped(der: bytes) -> bytes:
    return b":" + b64encode(der) + b":"

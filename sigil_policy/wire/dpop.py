"""DPoP proofs, read strictly: what a client signs to show that it holds the key of its token (RFC 9449).

    proof = parse_proof(field_value)                # ValueError, whatever is wrong with it
    proof.method, proof.url, proof.issued           # htm, htu, iat
    proof.thumbprint                                # of the key in its header: what the token's cnf.jkt is
    normal_url("HTTPS://API.example.com:443/%7eann?page=2")      # "https://api.example.com/~ann"
    token_hash(b"Kz~8mXK1EalYznwH")                 # what ath is for this token

Nothing is verified here: not the signature, and not that the proof is for this request. Everything is bounded before it
is read, and the only exception that comes out is `ValueError`, which repeats nothing of what was given.

RFC 9449 sections 4.2 and 4.3; thumbprints as RFC 7638, URLs as RFC 3986 section 6.2.
"""

import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

from sigil_policy.wire.jws import decode_base64url, parse_compact, parse_object

MAX_PROOF = 4_096
"""Bytes of a whole proof; anything longer is refused before it is looked at."""

MAX_PATH = 4_096
"""Bytes of a path that is compared; hardly a proof has room for a longer one."""

# Each takes its time. Who writes a URL twice mostly writes it alike, and then nobody needs its normal form.
_MAX_ESCAPES = 400
_MAX_ID = 512
_MAX_NONCE = 512
# A NumericDate beyond the year 9999 is a mistake (milliseconds).
_LAST_SECOND = 253_402_300_799
# RFC 7518 section 6: what makes a key private, or a shared secret.
_PRIVATE = frozenset(("d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"))
_COORDINATES = {"P-256": 32, "P-384": 48, "P-521": 66}
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_EDDSA = ("EdDSA", "Ed25519")
# A client chooses its key, and verifying with a long modulus or exponent takes long.
_RSA_BITS = (2_048, 4_096)
_EXPONENT_BYTES = 4

_UNRESERVED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
# What may stand in a path as it is (RFC 3986 section 3.3), and the lone percent sign; all else is written as an escape.
_PATH = _UNRESERVED + b"!$&'()*+,;=:@/%"
# By what follows a percent sign, in any case: what the escape is written as.
_ESCAPES = {
    spelling.encode(): bytes((code,)) if code in _UNRESERVED else b"%%%02X" % code
    for code in range(256)
    for spelling in (f"{code:02x}", f"{code:02X}", f"{code:02x}".title(), f"{code:02x}"[0] + f"{code:02X}"[1])
}
_URL = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9\-._~%!$&'()*+,;=]{1,255})(?::([0-9]{0,5}))?(/[^?#]*)?(?:[?#].*)?",
    re.IGNORECASE | re.DOTALL,
)
_PORTS = {"http": "80", "https": "443"}


class Proof(NamedTuple):
    """A proof as it was written. `key` has only the members that make the key, and `signed` is what `signature` covers.

    `ends` and `begins` are its `exp` and `nbf`, which a proof need not have.
    """

    algorithm: str
    key: Mapping[str, str]
    thumbprint: str
    id: str
    method: str
    url: str
    issued: float
    token_hash: str | None
    nonce: str | None
    begins: float | None
    ends: float | None
    signed: bytes
    signature: bytes


def parse_proof(value: bytes) -> Proof:
    """Read a `DPoP` field value (RFC 9449 section 4.3, checks 2 to 6 but for the signature)."""
    if len(value) > MAX_PROOF:
        raise ValueError("the proof is too long")
    jws = parse_compact(value)
    header = jws.header
    # No extension is understood here (RFC 7515 section 4.1.11); b64 changes what was signed (RFC 7797).
    if header.get("typ") != "dpop+jwt" or "crit" in header or "b64" in header:
        raise ValueError("not a proof")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str):
        raise ValueError("the proof names no algorithm")
    key, thumbprint = _read_key(header.get("jwk"), algorithm)
    claims = parse_object(jws.payload)
    issued = _date(claims, "iat")
    if issued is None:
        raise ValueError("the proof has no iat")
    return Proof(
        algorithm=algorithm,
        key=key,
        thumbprint=thumbprint,
        id=_required(claims, "jti", _MAX_ID),
        method=_required(claims, "htm", 64),
        url=_required(claims, "htu", MAX_PROOF),
        issued=issued,
        token_hash=_optional(claims, "ath", 64),
        nonce=_optional(claims, "nonce", _MAX_NONCE),
        begins=_date(claims, "nbf"),
        ends=_date(claims, "exp"),
        signed=jws.signed,
        signature=jws.signature,
    )


def _optional(claims: Mapping[str, Any], name: str, longest: int) -> str | None:
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise ValueError(f"{name} is no text, or too long")
    return value


def _required(claims: Mapping[str, Any], name: str, longest: int) -> str:
    value = _optional(claims, name, longest)
    if value is None:
        raise ValueError(f"the proof has no {name}")
    return value


def _date(claims: Mapping[str, Any], name: str) -> float | None:
    if name not in claims:
        return None
    value = claims[name]
    # Not isinstance: a bool is an int to Python, and no NumericDate (RFC 7519 section 2).
    if type(value) not in (int, float) or not 0 <= value <= _LAST_SECOND:
        raise ValueError(f"{name} is no moment")
    return float(value)


# --- the key ----------------------------------------------------------------------------------------------------------


def _read_key(jwk: Any, algorithm: str) -> tuple[dict[str, str], str]:
    """The members of a public key that `algorithm` may be used with, and its thumbprint (RFC 7638 section 3)."""
    if not isinstance(jwk, dict):
        raise ValueError("the proof brings no key")
    if not _PRIVATE.isdisjoint(jwk):
        raise ValueError("the proof brings a private key")
    operations = jwk.get("key_ops", ["verify"])
    if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise ValueError("the key is not meant for signatures")
    named = jwk.get("alg", algorithm)
    if named != algorithm and not (named in _EDDSA and algorithm in _EDDSA):
        raise ValueError("the key is for another algorithm")
    kind, curve = jwk.get("kty"), jwk.get("crv")
    # Members in the order of their names, and only those that make the key. None has to be escaped: they are base64url.
    if algorithm[:2] in ("RS", "PS") and kind == "RSA":
        key = {"e": _member(jwk, "e"), "kty": "RSA", "n": _member(jwk, "n")}
        modulus, exponent = decode_base64url(key["n"].encode()), decode_base64url(key["e"].encode())
        shortest, longest = _RSA_BITS
        # No zeros in front (RFC 7518 section 6.3.1.1).
        if not 0 < len(modulus) <= longest // 8 or not modulus[0]:
            raise ValueError("the modulus is out of range")
        if not shortest <= 8 * (len(modulus) - 1) + modulus[0].bit_length():
            raise ValueError("the modulus is too short")
        if not 0 < len(exponent) <= _EXPONENT_BYTES or not exponent[0] or not exponent[-1] & 1 or exponent == b"\x01":
            raise ValueError("the exponent is out of range")
    elif algorithm in _CURVES and kind == "EC" and curve == _CURVES[algorithm]:
        size = _COORDINATES[curve]
        key = {"crv": curve, "kty": "EC", "x": _coordinate(jwk, "x", size), "y": _coordinate(jwk, "y", size)}
    elif algorithm in _EDDSA and kind == "OKP" and curve == "Ed25519":
        key = {"crv": curve, "kty": "OKP", "x": _coordinate(jwk, "x", 32)}
    else:
        raise ValueError("the key does not fit the algorithm")
    text = ",".join(f'"{name}":"{value}"' for name, value in key.items())
    return key, _base64url(sha256(f"{{{text}}}".encode("ascii")).digest())


def _member(jwk: Mapping[str, Any], name: str) -> str:
    value = jwk.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise ValueError(f"the key has no {name}")
    return value


def _coordinate(jwk: Mapping[str, Any], name: str, size: int) -> str:
    text = _member(jwk, name)
    if len(decode_base64url(text.encode())) != size:
        raise ValueError(f"{name} has another length than the curve's")
    return text


def token_hash(token: bytes) -> str:
    """What `ath` is for an access token: of its bytes as they were sent (RFC 9449 section 4.2)."""
    return _base64url(sha256(token).digest())


def _base64url(digest: bytes) -> str:
    return urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


# --- the URL ----------------------------------------------------------------------------------------------------------


def normal_url(url: str) -> str:
    """`url` without query and fragment, in the one spelling of all that mean the same (RFC 3986 sections 6.2.2, 6.2.3).

    `ValueError` for what is no absolute http or https URL, or has user information.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("not an absolute http or https URL")
    scheme, host, port, path = found.groups()
    return normal_origin(scheme, host, port or "") + normal_path((path or "/").encode("utf-8", "surrogatepass"))


def normal_origin(scheme: str, host: str, port: str = "") -> str:
    """Scheme, host and port, the default port left out."""
    scheme = scheme.lower()
    port = str(int(port)) if port else ""
    # A host is a registered name, which knows no case, or an address: escapes of letters are spelled out.
    host = _escapes(host.encode("ascii")).decode("ascii").lower()
    return f"{scheme}://{host}" if port in ("", _PORTS[scheme]) else f"{scheme}://{host}:{port}"


def normal_path(path: bytes) -> str:
    """A path as it was sent, with the escapes and dot segments that mean nothing taken out.

    `/` is not an escape's equal: `%2F` stays. `ValueError` for one that is too long, has too many escapes, or does not
    begin with `/`.
    """
    if len(path) > MAX_PATH or path[:1] != b"/":
        raise ValueError("the path is too long, or does not begin with a slash")
    foreign = path.translate(None, _PATH)
    if len(foreign) + path.count(b"%") > _MAX_ESCAPES:
        raise ValueError("the path has too many escapes")
    if b"%" in path:
        path = _escapes(path)
    if foreign:
        path = quote_from_bytes(path, safe=_PATH).encode("ascii")
    if b"/." in path:
        path = _without_dots(path)
    return path.decode("ascii")


def _escapes(text: bytes) -> bytes:
    """Escapes of unreserved characters spelled out, the others in upper case; a lone `%` stays as it is."""
    first, *rest = text.split(b"%")
    written = [first]
    for part in rest:
        written += _ESCAPES.get(part[:2], b"%" + part[:2]), part[2:]
    return b"".join(written)


def _without_dots(path: bytes) -> bytes:
    """RFC 3986 section 5.2.4, for a path that begins with a slash."""
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            if kept:
                kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)

"""Keys that verify tokens: each is bound to one algorithm, and unfit ones are refused when they are configured.

    Key(algorithm="HS256", secret=SecretStr(os.environ["JWT_SECRET"]))
    Key(algorithm="RS256", pem=Path("issuer.pem").read_text(), id="2026-01")
    Key(jwk={"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "ed-1"})

Because the key names its algorithm, the token cannot: an RS256 public key never becomes an HMAC secret, and no header
talks a verifier into anything weaker (RFC 8725 section 3.1). Only public halves are taken: a service that verifies has
no use for a private key, and one that leaks it lets others sign. No key material is in a repr or an error.
RFC 7515, 7517, 7518; Ed25519 as in RFC 8037 and RFC 9864.
"""

import hmac
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key
from jwt.algorithms import get_default_algorithms
from jwt.exceptions import PyJWTError
from pydantic import Field, SecretStr, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.identity.fields import CONFIG
from sigil_policy.wire.jws import decode_base64url

Algorithm = Literal[
    "HS256", "HS384", "HS512",
    "RS256", "RS384", "RS512",
    "PS256", "PS384", "PS512",
    "ES256", "ES384", "ES512",
    "EdDSA", "Ed25519",
]  # fmt: skip
Check = Callable[[bytes, bytes], bool]

_ALGORITHMS = get_default_algorithms()
_HASHES = {"HS256": ("sha256", 32), "HS384": ("sha384", 48), "HS512": ("sha512", 64)}
_CURVES = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}
_BY_CURVE: dict[str, Algorithm] = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}
_EDDSA = frozenset(("EdDSA", "Ed25519"))
_MIN_RSA_BITS = 2048
_MAX_RSA_BITS, _END_OF_EXPONENTS = 8_192, 1 << 32
_UNREADABLE = (ValueError, TypeError, KeyError, PyJWTError, UnsupportedAlgorithm)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Key:
    """One verification key and the one algorithm it is used with.

        Key(algorithm="ES256", pem=public_key_pem, id="2026-01")

    Options:
        algorithm: HS256/384/512, RS…, PS…, ES…, or EdDSA (also written Ed25519, RFC 9864: a key verifies both
            spellings). Taken from the JWK's `alg`, or from its curve, where only one fits; else it has to be given.
        secret: the shared secret of an HS algorithm, as text; at least as many bytes as its hash (32, 48, 64).
        pem: a public key in PEM.
        jwk: a public key, or an `oct` secret, as a JSON Web Key.
        id: the `kid` of tokens signed with it (default: the JWK's `kid`; None fits any token).

    Exactly one of `secret`, `pem` and `jwk`. Raises `ValidationError` (a `ValueError`) for a key that is too short,
    private, of another type than its algorithm, or not meant for signatures (`use`, `key_ops`).
    """

    algorithm: Algorithm | None = None
    secret: SecretStr | None = None
    pem: str | None = Field(default=None, repr=False)
    jwk: dict[str, Any] | None = Field(default=None, repr=False)
    id: Annotated[str | None, Field(min_length=1, max_length=256)] = None

    @model_validator(mode="after")
    def _prepare(self) -> "Key":
        if sum(given is not None for given in (self.secret, self.pem, self.jwk)) != 1:
            raise ValueError("a key is given by exactly one of secret=, pem= and jwk=")
        if self.jwk is not None:
            self._read_jwk_members(self.jwk)
        if self.algorithm is None:
            raise ValueError("say which algorithm the key is for, for example algorithm='RS256'; it is never guessed")
        _ = self._check
        return self

    def _read_jwk_members(self, jwk: dict[str, Any]) -> None:
        if jwk.get("use", "sig") != "sig":
            raise ValueError("the JWK's use is not 'sig': it is no key for signatures (RFC 7517 section 4.2)")
        operations = jwk.get("key_ops", ["verify"])
        if not isinstance(operations, list) or "verify" not in operations:
            raise ValueError("the JWK's key_ops do not contain 'verify' (RFC 7517 section 4.3)")
        declared = jwk.get("alg", self.algorithm or _BY_CURVE.get(str(jwk.get("crv"))))
        if declared is not None and declared not in get_args(Algorithm):
            raise ValueError("the JWK's alg is no signature algorithm that is supported here")
        if self.algorithm is not None and declared not in _spellings(self.algorithm):
            raise ValueError(f"the JWK's alg is not {self.algorithm}; a key is used with one algorithm only")
        kid = jwk.get("kid", self.id)
        if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= 256):
            raise ValueError("the JWK's kid must be a string of 1 to 256 characters")
        if self.id is not None and kid != self.id:
            raise ValueError("the JWK's kid differs from id=; leave id= out")
        object.__setattr__(self, "algorithm", declared)
        object.__setattr__(self, "id", kid)

    @property
    def accepts(self) -> frozenset[str]:
        """The values of a token's `alg` that this key verifies: one, or both spellings of EdDSA."""
        return _spellings(self.algorithm or "")

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's over `message`. Never raises for what a token can hold."""
        return self._check(message, signature)

    @cached_property
    def _check(self) -> Check:
        name = self.algorithm or ""
        if name in _HASHES:
            return _hmac_check(self._secret_bytes(name), name)
        if self.secret is not None:
            raise ValueError(f"{name} verifies with a public key: give pem= or jwk=, not secret=")
        return _public_check(self._public_key(name), name)

    def _secret_bytes(self, name: str) -> bytes:
        if self.pem is not None:
            # The classic confusion: everybody knows the public key, so everybody could sign (RFC 8725 section 2.1).
            raise ValueError(f"{name} takes a secret, and a public key is none; did you mean algorithm='RS256'?")
        if self.jwk is not None:
            if self.jwk.get("kty") != "oct":
                raise ValueError(f"{name} takes a JWK of kty 'oct'; a public key is no secret")
            try:
                secret = decode_base64url(self.jwk["k"].encode("ascii"))
            except (KeyError, AttributeError, ValueError):
                raise ValueError("the JWK's member k must be base64url without padding") from None
        else:
            secret = self.secret.get_secret_value().encode() if self.secret is not None else b""
        shortest = _HASHES[name][1]
        if len(secret) < shortest:
            raise ValueError(
                f"the secret has {len(secret)} bytes; {name} takes at least {shortest} (RFC 7518 section 3.2): "
                f"make one with python -c 'import secrets; print(secrets.token_urlsafe({shortest}))'"
            )
        if _is_public(secret, name):
            raise ValueError(f"the secret of {name} looks like a public key, certificate or JWK; that is no secret")
        return secret

    def _public_key(self, name: str) -> Any:
        private = "PRIVATE KEY" in self.pem if self.pem is not None else "d" in (self.jwk or {})
        if private:
            raise ValueError(
                "this is a private key; a service that only verifies should not hold one: give the public half "
                "(openssl pkey -pubout)"
            )
        try:
            if self.pem is not None:
                public: Any = load_pem_public_key(self.pem.encode())
            else:
                public = _ALGORITHMS[name if name != "Ed25519" else "EdDSA"].from_jwk(self.jwk or {})
        except _UNREADABLE:
            public = None
        if public is None:
            given = "PEM ('-----BEGIN PUBLIC KEY-----')" if self.pem is not None else "JWK"
            raise ValueError(f"not a readable public key for {name} as {given}")
        return public


def _is_public(secret: bytes, name: str) -> bool:
    """Whether what was given as a secret is something that everybody knows (RFC 8725 section 2.1)."""
    try:
        _ALGORITHMS[name].prepare_key(secret)
    except _UNREADABLE:
        return True  # a PEM, an SSH key, a JWK as text
    try:
        load_der_public_key(secret)
    except _UNREADABLE:
        return False
    return True


def _spellings(algorithm: str) -> frozenset[str]:
    return _EDDSA if algorithm in _EDDSA else frozenset((algorithm,))


def _hmac_check(secret: bytes, name: str) -> Check:
    compare, digest, hash_name = hmac.compare_digest, hmac.digest, _HASHES[name][0]

    def check(message: bytes, signature: bytes) -> bool:
        return compare(digest(secret, message, hash_name), signature)

    return check


def _public_check(public: Any, name: str) -> Check:
    if name[:2] in ("RS", "PS"):
        fits = isinstance(public, RSAPublicKey)
        if fits and public.key_size < _MIN_RSA_BITS:
            raise ValueError(
                f"the RSA key has {public.key_size} bits; {name} takes at least {_MIN_RSA_BITS} (RFC 7518 section 3.3)"
            )
        if fits and (public.key_size > _MAX_RSA_BITS or public.public_numbers().e >= _END_OF_EXPONENTS):
            raise ValueError(
                f"the RSA key has {public.key_size} bits; one of more than {_MAX_RSA_BITS}, or with a public exponent "
                "of more than 32, takes too long to verify with"
            )
    elif name in _CURVES:
        fits = isinstance(public, EllipticCurvePublicKey) and public.curve.name == _CURVES[name]
    else:
        fits = isinstance(public, Ed25519PublicKey)
    if not fits:
        raise ValueError(f"the public key is of another type, or on another curve, than {name} uses")
    verify: Callable[[bytes, Any, bytes], bool] = _ALGORITHMS[name if name != "Ed25519" else "EdDSA"].verify

    def check(message: bytes, signature: bytes) -> bool:
        try:
            return verify(message, public, signature)
        except (ValueError, TypeError):
            return False

    return check

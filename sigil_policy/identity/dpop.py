"""Confirms that who presents a token holds the key that it is bound to, by a proof for this very request (DPoP).

    BearerAuth(issuers=[...], sender=DPoP(origin="https://api.example.com"))
    BearerAuth(issuers=[...], sender=DPoP(origin="https://api.example.com", replays="redis://auth.internal:6379/0"))

    GET /v7/agents HTTP/1.1
    Authorization: DPoP eyJhbGciOi...
    DPoP: eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7...

Guarantees:

* **A proof is good for one request**: its method, its URL without query and fragment, its token, within `max_age`
  seconds, once. The URL is compared with `origin`, which is configured, and with the path as it was sent. What `Host`
  and `X-Forwarded-*` say is not asked.
* **Cheap first.** Only the proof of a caller whose token was verified is looked at, and only one by the key that this
  token is bound to has its signature verified, once. Nothing else gets into the store of used proofs.
* **Once in each process, or once altogether.** `replays` without a URL knows this process only: with four workers a
  proof may pass four times. With a URL it passes once wherever that store is asked, also where two requests come in the
  same moment. An entry is kept for a minute longer than its proof would be accepted; when clocks differ by more, or are
  set back by more, a proof may pass once more.
* **Where the store is full or away**, or raises anything else, nobody is let in whose proof may have been used: 503
  with `Retry-After`, unless `on_store_loss="open"`.
* A WebSocket's handshake takes a proof too: `htm` is `GET`, `htu` the URL with `https` for `wss`. A browser cannot send
  one, and has to use a ticket.

RFC 9449 sections 4.3, 7, 8, 9 and 11.1.
"""

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable
from functools import cached_property
from hashlib import blake2b
from threading import Lock
from typing import Annotated, Any, Literal, NamedTuple, cast
from urllib.parse import quote

import anyio
from cachetools import LRUCache, cached
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.policy import Listed
from sigil_policy.identity.fields import CONFIG
from sigil_policy.identity.keys import Key
from sigil_policy.identity.store_failures import StoreFailures
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.replays import MemoryReplays, ReplayStore
from sigil_policy.stores.urls import replay_store
from sigil_policy.wire.dpop import Proof, normal_path, normal_url, parse_proof, token_hash

ProofAlgorithm = Literal[
    "RS256", "RS384", "RS512",
    "PS256", "PS384", "PS512",
    "ES256", "ES384", "ES512",
    "EdDSA", "Ed25519",
]  # fmt: skip

_HEADER = b"dpop"
_MARGIN = 60.0
_KEYS = 4_096
_MIN_SECRET = 32
_EDDSA = frozenset(("EdDSA", "Ed25519"))
_SCHEMES = ("http", "https")


class ProofError(Exception):
    """The proof is refused. `reason` is one word for the operator; a client learns only that it was refused."""

    def __init__(self, reason: str) -> None:
        super().__init__("the proof is refused")
        self.reason = reason


class UsedProof(NamedTuple):
    """The stores that know of the proof of this exchange: a policy further in need not find it used."""

    stores: tuple[ReplayStore, ...]


class NonceRequired(NamedTuple):
    """The caller has proved all else, and is only asked to put this nonce into its proof: that is no failure of it."""

    nonce: bytes


class NonceDue(NamedTuple):
    """The nonce that this exchange's response brings."""

    nonce: bytes


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class DPoP:
    """Tokens bound to a client's key (`cnf.jkt`) take a proof by that key; the module says what holds.

        DPoP(origin=["https://api.example.com", "https://eu.api.example.com"], algorithms=["ES256"])

    Options:
        origin: what stands in front of the path in the URLs that clients use; several: any of them. With a path, where
            a proxy takes one off before the server sees it. Or a function of the exchange that names it, or None where
            nobody knows; what it raises is an error of the application.
        algorithms: which a proof may be signed with (default ES256, EdDSA, PS256 and RS256; EdDSA and Ed25519 are the
            same). RSA keys have 2048 to 4096 bits.
        max_age: for how many seconds after it was made a proof is accepted, 1 to 600 (default 60).
        leeway: seconds by which a client's clock may be ahead, 0 to 60 (default 30: clients are devices of all kinds).
        replays: where used proofs are: a URL such as "redis://host", a `ReplayStore`, or None for this process
            (default).
        on_store_loss: "closed" (default) or "open": what holds when that store is full or away. "open" lets a proof
            pass that may have been used before.
        deadline: seconds that the store may take (default 2). A store may have a shorter one itself.
        nonce_secret: with it, proofs have to carry a nonce that this service has made lately (default None: none has
            to), so that none can be made in advance. At least 32 bytes, the same in all processes. Nothing is stored.
        nonce_period: seconds after which there is a new nonce, 10 to 86,400 (default 300). Each is accepted until the
            next one has ended.

    Raises `ValidationError` (a `ValueError`) for an option that cannot be.
    """

    origin: str | Annotated[Listed[str], Field(min_length=1, max_length=256)] | Callable[[Exchange], str | None]
    algorithms: Annotated[Listed[ProofAlgorithm], Field(min_length=1)] = ("ES256", "EdDSA", "PS256", "RS256")
    max_age: Annotated[float, Field(ge=1, le=600)] = 60.0
    leeway: Annotated[float, Field(ge=0, le=60)] = 30.0
    replays: Any = None
    on_store_loss: Literal["closed", "open"] = "closed"
    deadline: Annotated[float, Field(ge=0.001, le=60)] = 2.0
    nonce_secret: SecretStr | None = None
    nonce_period: Annotated[int, Field(ge=10, le=86_400)] = 300

    @field_validator("replays")
    @classmethod
    def _found_by_url(cls, replays: Any) -> Any:
        # Here, so that a URL with a password stands in no repr.
        found = replay_store(replays) if isinstance(replays, str) else replays
        if found is not None and not callable(getattr(found, "claim", None)):
            raise ValueError(f"replays must be a URL or a ReplayStore with claim, not {type(found).__name__}")
        return found

    @field_validator("nonce_secret")
    @classmethod
    def _long_enough(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret.get_secret_value().encode()) < _MIN_SECRET:
            raise ValueError(
                f"nonce_secret takes at least {_MIN_SECRET} bytes: "
                "make one with python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        return secret

    @model_validator(mode="after")
    def _prepare(self) -> "DPoP":
        _ = self.store, self._failures, self._origins, self._accepted, self._key, self._secret
        return self

    @cached_property
    def store(self) -> ReplayStore:
        """Where used proofs are."""
        return MemoryReplays() if self.replays is None else cast("ReplayStore", self.replays)

    @cached_property
    def _failures(self) -> StoreFailures:
        return StoreFailures("replay_store_failed")

    @cached_property
    def _origins(self) -> tuple[str, ...] | None:
        if callable(self.origin):
            return None
        return tuple(map(_origin, (self.origin,) if isinstance(self.origin, str) else self.origin))

    @cached_property
    def _accepted(self) -> frozenset[str]:
        named = frozenset(self.algorithms)
        return named if named.isdisjoint(_EDDSA) else named | _EDDSA

    @cached_property
    def _key(self) -> Callable[[str, str, Proof], Key]:
        # Only of keys that a verified token is bound to, so that nobody else can fill it.
        def make(algorithm: str, thumbprint: str, proof: Proof) -> Key:
            return Key(algorithm=cast("Any", algorithm), jwk=dict(proof.key))

        def name(algorithm: str, thumbprint: str, proof: Proof) -> tuple[str, str]:
            return algorithm, thumbprint

        return cached(LRUCache[Any, Key](_KEYS), key=name, lock=Lock())(make)

    @cached_property
    def _secret(self) -> bytes:
        return b"" if self.nonce_secret is None else self.nonce_secret.get_secret_value().encode()

    # --- the proof -------------------------------------------------------------------------------------------------

    def verify(self, ex: Exchange, token: bytes, thumbprint: str) -> bytes:
        """The name of the proof that `ex` carries, when it is good for `token` and this exchange, but for its use.

        Raises `ProofError`, whose `reason` is "key" for one by another key than `thumbprint` names, and "nonce" for one
        without a nonce that holds.
        """
        value = ex.headers.get(_HEADER)
        if value is None or _HEADER in ex.repeated:
            raise ProofError("header")
        try:
            proof = parse_proof(value)
        except ValueError:
            raise ProofError("form") from None
        if proof.algorithm not in self._accepted:
            raise ProofError("alg")
        if proof.thumbprint != thumbprint:
            raise ProofError("key")
        self._check_claims(ex, proof, token)
        self._check_signature(proof)
        if self._secret:
            self._check_nonce(ex, proof.nonce)
        digest = blake2b(f"{thumbprint}:".encode(), digest_size=16)
        digest.update(proof.id.encode())
        return digest.digest()

    def _check_claims(self, ex: Exchange, proof: Proof, token: bytes) -> None:
        if proof.method != (ex.method if ex.kind == "http" else "GET"):
            raise ProofError("htm")
        now = ex.clock.time()
        if not now - self.max_age < proof.issued <= now + self.leeway:
            raise ProofError("iat")
        if proof.ends is not None and now >= proof.ends + self.leeway:
            raise ProofError("exp")
        if proof.begins is not None and now < proof.begins - self.leeway:
            raise ProofError("nbf")
        if proof.token_hash != token_hash(token):
            raise ProofError("ath")
        if not self._is_for(ex, proof.url):
            raise ProofError("htu")

    def _is_for(self, ex: Exchange, url: str) -> bool:
        origins = self._origins
        if callable(self.origin):
            named = self.origin(ex)
            if named is None:
                return False
            origins = (_origin(named),)
        raw = _raw_path(ex)
        if raw.isascii() and url in (origin + raw.decode("ascii") for origin in origins or ()):
            return True
        try:
            path, url = normal_path(raw), normal_url(url)
        except ValueError:
            return False
        return any(url == origin + path for origin in origins or ())

    def _check_signature(self, proof: Proof) -> None:
        try:
            good = self._key(proof.algorithm, proof.thumbprint, proof).verify(proof.signed, proof.signature)
        except ValueError:
            good = False  # a point that is on no curve
        if not good:
            raise ProofError("signature")

    # --- its use ---------------------------------------------------------------------------------------------------

    def claim(self, ex: Exchange, name: bytes) -> bool | Awaitable[bool]:
        """Whether this proof is used for the first time. Raises `StoreUnavailableError`, unless that is "open"."""
        if any(store is self.store for store in _stores(ex)):
            return True  # a policy further out has used it, for this very exchange
        first: object
        try:
            first = self.store.claim(name, self.max_age + self.leeway + _MARGIN, ex.clock.monotonic())
        except Exception as error:  # noqa: BLE001  a store is somebody else's, and may raise anything
            return self._lost(ex, error)
        return self._claim_later(ex, first) if isinstance(first, Awaitable) else self._claimed(ex, first)

    async def _claim_later(self, ex: Exchange, claiming: Awaitable[object]) -> bool:
        try:
            with anyio.fail_after(self.deadline):
                first = await claiming
        except Exception as error:  # noqa: BLE001  as above
            return self._lost(ex, error)
        return self._claimed(ex, first)

    def _claimed(self, ex: Exchange, first: object) -> bool:
        if type(first) is not bool:
            return self._lost(ex, TypeError("claim returns True or False"))
        if first:
            ex.give(UsedProof((*_stores(ex), self.store)))
        return first

    def _lost(self, ex: Exchange, error: Exception) -> bool:
        """Whether to go on without knowing."""
        wait = self._failures.report(self.store, error, ex.clock)
        if self.on_store_loss == "closed":
            raise StoreUnavailableError("whether a proof was used cannot be known now", wait) from None
        ex.give(UsedProof((*_stores(ex), self.store)))
        return True

    # --- nonces ----------------------------------------------------------------------------------------------------

    @property
    def has_nonces(self) -> bool:
        return self.nonce_secret is not None

    def _nonce_of(self, period: int) -> bytes:
        # Anybody may know it; only who knows the secret knows the next (section 8).
        text = b"sigil dpop nonce %d %d" % (self.nonce_period, period)
        return urlsafe_b64encode(hmac.digest(self._secret, text, "sha256")[:18])

    def _check_nonce(self, ex: Exchange, nonce: str | None) -> None:
        period = int(ex.clock.time() // self.nonce_period)
        given = b"" if nonce is None else nonce.encode()
        # The next one too: another process, whose clock is ahead, may have given it.
        known = [hmac.compare_digest(given, self._nonce_of(other)) for other in (period, period + 1, period - 1)]
        if not any(known):
            ex.give(NonceRequired(self._nonce_of(period)))
            raise ProofError("nonce")
        if known[2]:
            ex.give(NonceDue(self._nonce_of(period)))

    def supply_nonce(self, ex: Exchange, head: Head) -> None:
        """A caller whose nonce ends soon is given the next one with a response that nobody stores (section 8.2)."""
        due = ex.get(NonceDue)
        if due is None or head.get(b"dpop-nonce") is not None:
            return
        kept = head.get(b"cache-control")
        if kept is None:
            head.headers.append((b"cache-control", b"no-store"))
        elif b"no-store" not in kept.lower():
            return
        head.headers.append((b"dpop-nonce", due.nonce))


def _stores(ex: Exchange) -> tuple[ReplayStore, ...]:
    used = ex.get(UsedProof)
    return () if used is None else used.stores


def _origin(text: str) -> str:
    """A configured origin in its normal form, without a slash at its end."""
    try:
        found = normal_url(text).rstrip("/")
    except ValueError:
        found = ""
    if not found or "?" in text or "#" in text:
        raise ValueError(
            "origin is the scheme, host and port under which clients reach the service, for example "
            f"'https://api.example.com', not {'one with a user or a password' if '@' in text else repr(text)}"
        )
    return found


def _raw_path(ex: Exchange) -> bytes:
    """The path as it was sent. A server that does not say leaves the decoded one."""
    raw = ex.scope.get("raw_path")
    if isinstance(raw, bytes):
        return raw.partition(b"?")[0] or b"/"
    return quote(ex.path, safe="/:@!$&'()*+,;=~", errors="surrogatepass").encode("ascii")

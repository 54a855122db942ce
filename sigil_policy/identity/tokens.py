"""Verifies signed tokens and remembers the verdicts that were good.

    verifier = TokenVerifier([Issuer(url=..., audience=..., keys=[...])])
    verified = verifier.verify(token, now=clock.time())      # TokenError, whatever is wrong
    verified.principal.subject

Header first, then the signature, then the claims: nobody makes us read what no key has signed. Where keys of several
issuers may have signed, only the claims can tell which, and they are read first, within tight bounds.

Every refusal is the same `TokenError`; its `reason` is for the operator and never leaves the service. Whatever bytes
come in, nothing else comes out. What is refused, and why, stands beside the check: RFC 7515, 7519, 8725 (and its
successor's draft), 9068.
"""

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from sigil_policy.core.facts import Principal
from sigil_policy.identity.issuers import ClaimRules, Issuer, Reading
from sigil_policy.identity.key_sets import FetchedKeys, Name
from sigil_policy.wire.jws import MAX_TOKEN, CompactJws, parse_compact, parse_object

Parsed = TypeVar("Parsed")

_MAX_KID = 256
_LENIENT_TYPES = frozenset(("jwt", "at+jwt"))
_STRICT_TYPES = frozenset(("at+jwt",))


class TokenError(Exception):
    """The token is refused. `reason` is one word for the operator; a client learns only that it was refused."""

    def __init__(self, reason: str) -> None:
        super().__init__("the token is refused")
        self.reason = reason


class KeyUnknownError(TokenError):
    """No key is there that could have signed, but it may be in the issuer's key set by now.

    Were it signed by that key, it would be accepted, as far as its claims can be read quickly.
    """

    def __init__(self, issuer: Issuer, name: Name) -> None:
        super().__init__("key")
        self.issuer = issuer
        self.name = name


class VerifiedToken(NamedTuple):
    """Whom a token speaks for, and when: from `not_before` until just before `not_after` (leeway included)."""

    principal: Principal
    not_before: float
    not_after: float


class TokenVerifier:
    """Verifies compact signed JWTs of some issuers.

    Options:
        issuers: each is found by its exact `iss`, and only its own keys verify its tokens.
        realm: the protection space that the principals name in challenges.
    """

    __slots__ = ("__weakref__", "_issuers", "_only", "_owners", "_realm", "fetched")

    def __init__(self, issuers: Iterable[Issuer], *, realm: str = "api") -> None:
        self._issuers = {issuer.url: issuer for issuer in issuers}
        self._only = next(iter(self._issuers.values())) if len(self._issuers) == 1 else None
        self._realm = realm
        self.fetched: Mapping[str, FetchedKeys] = {
            url: issuer.fetched for url, issuer in self._issuers.items() if issuer.fetched is not None
        }
        """By issuer, the key sets that change."""
        self._owners: Mapping[Name, Issuer] = {}
        self._know_owners()
        for keys in self.fetched.values():
            keys.watch(self._know_owners)

    def _know_owners(self) -> None:
        # Where there is but one issuer, nobody asks.
        self._owners = {} if self._only is not None else _owners(self._issuers.values())

    def verify(self, token: bytes, now: float) -> VerifiedToken:
        """The verdict on `token` at `now` (seconds since the epoch). Raises `TokenError`, and nothing else.

        That is a `KeyUnknownError` where fetching the issuer's keys may change it.
        """
        if len(token) > MAX_TOKEN:
            raise TokenError("size")
        jws = _read(parse_compact, token)
        try:
            issuer, claims = self._signed(jws)
        except KeyUnknownError as unknown:
            # A token that would be refused anyway (expired, of another issuer) is no reason to ask the provider. One
            # that takes long to read is read when its key has signed it.
            unsigned = _read_or_leave(jws.payload)
            if unsigned is None:
                raise
            if self._issuer(unsigned) is not unknown.issuer:
                raise TokenError("iss") from None
            judge(unknown.issuer, frozen(unsigned), now)
            raise
        held = frozen(claims)
        reading = judge(issuer, held, now)
        # Only now: the application is asked of nothing that no key has signed.
        return VerifiedToken(issuer.principal(reading, held, self._realm), reading.not_before, reading.not_after)

    def _signed(self, jws: CompactJws) -> tuple[Issuer, Mapping[str, Any]]:
        """The issuer whose key has signed, and what it has signed."""
        owner = self._only or self._owner(jws.header)
        if owner is not None:
            try:
                _check_signature(owner, jws)
            except TokenError as error:
                # Another issuer may have published a key of the same name since: its tokens are not this one's.
                if owner is self._only or not self.fetched or error.reason != "signature":
                    raise
            else:
                claims = _read(_parse_trusted, jws.payload)
                if self._issuer(claims) is not owner:
                    raise TokenError("key")
                return owner, claims
        claims = _read(parse_object, jws.payload)
        issuer = self._issuer(claims)
        if issuer is owner:
            raise TokenError("signature")
        _check_signature(issuer, jws)
        return issuer, claims

    def _owner(self, header: Mapping[str, Any]) -> Issuer | None:
        """The issuer whose keys alone the header can mean, or None where nobody can tell."""
        algorithm, kid = header.get("alg"), header.get("kid")
        return self._owners.get((algorithm, kid)) if isinstance(algorithm, str) and isinstance(kid, str) else None

    def _issuer(self, claims: Mapping[str, Any]) -> Issuer:
        url = claims.get("iss")
        issuer = self._issuers.get(url) if isinstance(url, str) else None
        if issuer is None:
            raise TokenError("iss")
        return issuer


def _owners(issuers: Iterable[Issuer]) -> dict[Name, Issuer]:
    """By algorithm and `kid`, the issuer that alone has keys for them."""
    named: dict[Name, list[Issuer]] = {}
    unnamed: dict[str, list[Issuer]] = {}
    for issuer in issuers:
        for key in issuer.ring.keys:
            for algorithm in key.accepts:
                if key.id is None:
                    unnamed.setdefault(algorithm, []).append(issuer)
                else:
                    named.setdefault((algorithm, key.id), []).append(issuer)
    return {
        pair: found[0]
        for pair, found in named.items()
        if all(issuer is found[0] for issuer in (*found, *unnamed.get(pair[0], ())))
    }


def _read(parse: Callable[[bytes], Parsed], text: bytes) -> Parsed:
    try:
        return parse(text)
    except ValueError:
        pass
    # Outside of the handler: a parser's error carries the text it could not read, and is not chained here.
    raise TokenError("form")


def _read_or_leave(payload: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(payload)
    except ValueError:
        return None


def _parse_trusted(payload: bytes) -> dict[str, Any]:
    return parse_object(payload, trusted=True)


def _check_header(header: Mapping[str, Any], types: frozenset[str]) -> None:
    # No extension is understood here, so a token that insists on one is refused (RFC 7515 section 4.1.11); b64 takes
    # crit, and changes what was signed (RFC 7797).
    if "crit" in header or "b64" in header:
        raise TokenError("crit")
    # Where the header offers a key of its own (jwk, jku, x5u, x5c), nobody looks: keys come from the configuration
    # (RFC 8725 section 3.10).
    if "typ" in header:
        # A token made for another purpose (logout+jwt, dpop+jwt, an id token) is no access token.
        if _media_type(header["typ"]) not in types:
            raise TokenError("typ")
    elif types is _STRICT_TYPES:
        raise TokenError("typ")
    if "cty" in header and _media_type(header["cty"]) == "jwt":
        raise TokenError("cty")


def _media_type(value: Any) -> str | None:
    # RFC 7515 section 4.1.9: a media type without case, whose "application/" may be left out.
    return value.lower().removeprefix("application/") if isinstance(value, str) else None


def _check_signature(issuer: Issuer, jws: CompactJws) -> None:
    _check_header(jws.header, _STRICT_TYPES if issuer.strict else _LENIENT_TYPES)
    algorithm = jws.header.get("alg")
    kid = jws.header.get("kid")
    if not isinstance(algorithm, str):
        raise TokenError("alg")
    # A hint and no more: compared with the ids of the configured keys, never a path, a query or a URL.
    if "kid" in jws.header and not (isinstance(kid, str) and len(kid) <= _MAX_KID):
        raise TokenError("kid")
    # The key names the algorithm. "none", in any case, is the algorithm of no key.
    keys = issuer.candidates(algorithm, kid)
    if not keys:
        fetched = issuer.fetched
        if fetched is not None and fetched.may_bring(algorithm) and not fetched.ring.fitting(algorithm, kid):
            raise KeyUnknownError(issuer, (algorithm, kid))
        raise TokenError("key")
    if not any(key.verify(jws.signed, jws.signature) for key in keys):
        raise TokenError("signature")


def judge(rules: ClaimRules, claims: Mapping[str, Any], now: float) -> Reading:
    """What `claims` say by `rules`, which hold `now`. Raises `TokenError`."""
    try:
        reading = rules.read(claims)
    except ValueError as error:
        raise TokenError(str(error)) from None
    if now < reading.not_before:
        raise TokenError("early")
    if now >= reading.not_after:
        raise TokenError("expired")
    return reading


def frozen(claims: Mapping[str, Any]) -> Mapping[str, Any]:
    """`claims` as a value: a verified token is shared by the requests that present it, and nobody may change it."""
    return MappingProxyType({name: _freeze(value) for name, value in claims.items()})


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return frozen(value)
    if isinstance(value, list):
        return tuple(map(_freeze, value))
    return value


class TokenCache:
    """Remembers verified tokens by a digest of exactly what was presented: bounded, and never beyond their time.

    Two generations: new entries go into the young one; when it has half of `size`, it becomes the old one, and what
    was old and not asked for since is forgotten. A hit is one look-up in a dictionary, which needs no lock (an LRU
    reorders on every hit, and therefore does); a burst of new tokens cannot push out one that is in use. Only verified
    tokens get in, so that nobody without a key can fill it. The token itself is not kept.
    """

    __slots__ = ("__weakref__", "_half", "_lock", "_old", "_young")

    def __init__(self, size: int) -> None:
        self._half = size // 2
        self._young: dict[bytes, VerifiedToken] = {}
        self._old: dict[bytes, VerifiedToken] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    def get(self, digest: bytes, now: float) -> Principal | None:
        """The caller, if this token was verified before and holds `now`."""
        found = self._young.get(digest)
        if found is None:
            found = self._old.get(digest)
            if found is None:
                return None
            self.put(digest, found)
        principal, not_before, not_after = found
        # The clock may have been set back since: both ends are asked.
        return principal if not_before <= now < not_after else None

    def put(self, digest: bytes, verified: VerifiedToken) -> None:
        if not self._half:
            return
        with self._lock:
            if len(self._young) >= self._half:
                self._old = self._young
                self._young = {}
            self._young[digest] = verified

    def clear(self) -> None:
        """Forget all: the keys that verified them are no longer the same."""
        with self._lock:
            self._young = {}
            self._old = {}

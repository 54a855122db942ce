"""Who may issue tokens, with which keys, and how their claims are read.

    Issuer(
        url="https://auth.sigil.acti.ai",
        audience="sigil-api",
        keys=[Key(algorithm="RS256", pem=public_key)],
    )
    Issuer(url="https://login.example.com", audience="sigil-api", discovery=True)

A key belongs to its issuer: it never verifies a token that names another one (RFC 8725 section 3.8). `url` and
`audience` are compared exactly, without forgiving a trailing slash.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Listed
from sigil_policy.identity.fields import CONFIG, Scope, Subject, is_subject
from sigil_policy.identity.key_sets import MAX_TRIALS, PUBLIC_ALGORITHMS, FetchedKeys, KeyRing, KeySet
from sigil_policy.identity.keys import Algorithm, Key
from sigil_policy.identity.provider import ProviderError, check_url
from sigil_policy.wire.authorization import is_scope_token, split_scopes

ClaimForm = Literal["string", "array"]
Text = Annotated[str, Field(min_length=1, max_length=2_048)]

_SCOPE: Mapping[str, ClaimForm] = {"scope": "string"}

# A NumericDate beyond the year 9999 is a mistake (milliseconds), and would make a token that never ends.
_LAST_SECOND = 253_402_300_799


class Reading(NamedTuple):
    """What claims say, whoever has signed them: of whom, and from when until when (leeway included)."""

    subject: str
    scopes: frozenset[str]
    not_before: float
    not_after: float


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ClaimRules:
    """Which claims are accepted, and what caller they make; the options that `Issuer` and `Introspection` share."""

    audience: Text | Listed[Text] | None
    leeway: Annotated[float, Field(ge=0, le=60)] = 5.0
    max_lifetime: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    scope_claims: Mapping[Text, ClaimForm] = field(default_factory=lambda: dict(_SCOPE))
    roles: Mapping[Text, Mapping[str, Listed[Scope]]] | None = None
    tier_claim: Text | None = "tier"
    client_tiers: Mapping[Text, Subject] | None = None
    tier: Callable[[Mapping[str, Any]], str | None] | None = None

    @field_validator("audience")
    @classmethod
    def _somebody(cls, audience: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if audience == ():
            raise ValueError("audience is empty: no token would fit; None means that tokens name no audience")
        return audience

    @property
    def named(self) -> str:
        """The issuer that the principals name."""
        raise NotImplementedError

    @cached_property
    def _audiences(self) -> frozenset[str]:
        if self.audience is None:
            return frozenset()
        return frozenset((self.audience,) if isinstance(self.audience, str) else self.audience)

    def read(self, claims: Mapping[str, Any]) -> Reading:
        """What `claims` say; also before a key has signed them, because nothing of the application is asked.

        Arrays in `claims` are tuples. `ValueError` names the claim that these tokens cannot have. Time is not asked
        here.
        """
        subject = self._subject(claims)
        if not isinstance(subject, str) or not is_subject(subject):
            raise ValueError("sub")
        self._check_audience(claims)
        not_after = self._end(claims) + self.leeway
        not_before = 0.0
        for name in ("nbf", "iat"):
            if name in claims:
                not_before = max(not_before, _date(claims[name], name) - self.leeway)
        self._check_lifetime(claims)
        self._check_profile(claims)
        return Reading(subject, self._scopes(claims), not_before, not_after)

    def principal(self, reading: Reading, claims: Mapping[str, Any], realm: str) -> Principal:
        """The caller that verified `claims` speak of, as they were read."""
        tier = self._tier(claims)
        return Principal(
            subject=reading.subject,
            scopes=reading.scopes,
            # A tier of another type names no tier: limits then fall back to the lowest, never to a higher one.
            tier=tier if isinstance(tier, str) and is_subject(tier) else None,
            issuer=self.named,
            realm=realm,
            claims=claims,
            expires=reading.not_after if reading.not_after < math.inf else None,
        )

    def _subject(self, claims: Mapping[str, Any]) -> Any:
        return claims.get("sub")

    def _end(self, claims: Mapping[str, Any]) -> float:
        return _date(claims.get("exp"), "exp")

    def _check_lifetime(self, claims: Mapping[str, Any]) -> None:
        # By the issuer's own clock at both ends: leeway is for the difference between two.
        if self.max_lifetime is not None and (
            "exp" not in claims
            or "iat" not in claims
            or _date(claims["exp"], "exp") - _date(claims["iat"], "iat") > self.max_lifetime
        ):
            raise ValueError("lifetime")

    def _check_profile(self, claims: Mapping[str, Any]) -> None:
        """`ValueError` names a claim that tokens of this kind cannot have."""

    def _check_audience(self, claims: Mapping[str, Any]) -> None:
        if "aud" not in claims:
            fits = self.audience is None
        else:
            audience = claims["aud"]
            named = (audience,) if isinstance(audience, str) else audience
            # RFC 7519 section 4.1.3: whoever does not find itself in aud must refuse, also when it expects none.
            fits = (
                isinstance(named, tuple)
                and all(isinstance(name, str) for name in named)
                and not self._audiences.isdisjoint(named)
            )
        if not fits:
            raise ValueError("aud")

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[str]:
        scopes: list[str] = []
        for name, form in self.scope_claims.items():
            value = claims.get(name)
            if value is None:
                continue
            if form == "string" and isinstance(value, str):
                scopes.extend(split_scopes(value))
            elif form == "array" and isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                scopes.extend(value)
            else:
                raise ValueError(name)
        for name, given in (self.roles or {}).items():
            value = _find(claims, name)
            if value is None:
                continue
            held = (value,) if isinstance(value, str) else value
            if not isinstance(held, tuple) or not all(isinstance(role, str) for role in held):
                raise ValueError(name)
            for role in held:
                scopes.extend(given.get(role, ()))
        return frozenset(filter(is_scope_token, scopes))

    def _tier(self, claims: Mapping[str, Any]) -> Any:
        if self.tier is not None:
            return self.tier(claims)
        if self.client_tiers is not None:
            client = claims.get("client_id", claims.get("azp"))
            if isinstance(client, str) and client in self.client_tiers:
                return self.client_tiers[client]
        return None if self.tier_claim is None else _find(claims, self.tier_claim)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Issuer(ClaimRules):
    """One issuer of access tokens.

        Issuer(url="https://auth.example.com", audience="api", discovery=True,
               roles={"/realm_access/roles": {"editor": ["agents:read", "agents:write"]}},
               client_tiers={"nightly-job": "internal"})

    Options:
        url: the exact `iss` of its tokens.
        audience: the `aud` that a token must be meant for; several: any of them. None: tokens must name no audience.
        keys: its verification keys, at most 64, or a `KeySet` to fetch. A key without id fits any `kid`.
        jwks_url: where its key set is published: short for `keys=KeySet(jwks_url)`.
        discovery: its metadata says where (OpenID Connect, RFC 8414): short for `keys=KeySet()`. Exactly one of
            `keys`, `jwks_url` and `discovery`.
        algorithms: which a token may be signed with (default None: those of its keys; of a fetched set RS, PS, ES and
            EdDSA). A fetched RSA key that names none is used with the first RS or PS of these, else RS256.
        leeway: seconds by which the clocks may differ, 0 to 60 (default 5); counts for `exp`, `nbf` and `iat`.
        max_lifetime: for how many seconds its tokens may be issued (default None: for any time). One whose `exp` is
            further from its `iat`, or that has no `iat`, is refused: a mistake of the issuer makes no token for years.
        strict: only RFC 9068 access tokens: `typ` is `at+jwt`, and `client_id`, `iat` and `jti` are required too
            (default False: `typ` may also be absent or `JWT`).
        scope_claims: claims that hold scopes, and their form (default `{"scope": "string"}`: space-delimited). Name
            others here, for example `{"scp": "array"}`; the scopes of all of them count.
        roles: by claim, the scopes that each of its values gives (default None: roles give nothing). The claim is a
            string or an array of them; values that are not listed give nothing. A name that begins with `/` is a path
            into nested claims (RFC 6901).
        tier_claim: the claim that names the tier, or a path to it (default `"tier"`; None: tokens name no tier).
        client_tiers: the tier by the client that a token was issued to, its `client_id` or else `azp` (default None).
            A client that is listed has this tier, whatever the token says.
        tier: a function of the verified claims (arrays are tuples) that names the tier or returns None. It decides
            alone (default None). What it raises is an error of the application.
    """

    url: Text
    keys: KeySet | Annotated[Listed[Key], Field(min_length=1, max_length=64)] | None = None
    jwks_url: Text | None = None
    discovery: bool = False
    algorithms: Annotated[Listed[Algorithm], Field(min_length=1)] | None = None
    strict: bool = False

    @field_validator("url")
    @classmethod
    def _one_word(cls, url: str) -> str:
        if not url.isprintable() or " " in url:
            raise ValueError("url is the exact value of the claim iss, for example 'https://auth.example.com'")
        return url

    @model_validator(mode="after")
    def _consistent(self) -> "Issuer":
        if self.strict and self.audience is None:
            raise ValueError("strict tokens name an audience (RFC 9068 section 2.2): give audience=")
        if (self.keys is not None) + (self.jwks_url is not None) + self.discovery != 1:
            raise ValueError("the keys of an issuer come from exactly one of keys=, jwks_url= and discovery=True")
        if self.fetched is not None:
            return self
        ring = self._ring
        for _, kid in ring.doubles():
            raise ValueError(f"two keys of one algorithm have the id {kid!r}; which one signed would be a guess")
        if ring.crowded:
            raise ValueError(f"{MAX_TRIALS} or more keys of one algorithm have no id; give each the kid of its tokens")
        for key in ring.keys:
            if self.algorithms is not None and key.accepts.isdisjoint(self.algorithms):
                raise ValueError(f"a key is for {key.algorithm}, which algorithms= does not have")
        return self

    @cached_property
    def _ring(self) -> KeyRing:
        return KeyRing(() if self.keys is None or isinstance(self.keys, KeySet) else self.keys)

    @cached_property
    def fetched(self) -> FetchedKeys | None:
        """What is known of the keys that have to be fetched; None where all were configured."""
        options = self.keys if isinstance(self.keys, KeySet) else None
        if self.jwks_url is not None:
            options = KeySet(self.jwks_url)
        elif self.discovery:
            options = KeySet()
        if options is None:
            return None
        if options.url is None:
            check_url(self.url, loopback=options.allow_insecure_loopback)
            if "?" in self.url:
                raise ValueError("discovery takes an issuer without query (RFC 8414 section 2); give jwks_url=")
        algorithms = PUBLIC_ALGORITHMS if self.algorithms is None else tuple(self.algorithms)
        secret = [name for name in algorithms if name not in PUBLIC_ALGORITHMS]
        if secret:
            raise ValueError(f"{secret[0]} takes a secret, and a key set that is published holds none")
        try:
            fetched = FetchedKeys(options, self.url, algorithms)
        except ProviderError as error:
            raise ValueError(f"initial {error}") from None
        if options.initial is not None and not fetched.ring.keys:
            raise ValueError("initial has no key that can be used: give a JWK set, as {'keys': [...]}, of public keys")
        return fetched

    @property
    def ring(self) -> KeyRing:
        """Its keys, as they are known now."""
        return self._ring if self.fetched is None else self.fetched.ring

    def candidates(self, algorithm: str, kid: str | None) -> tuple[Key, ...]:
        """The keys that may have signed: of this algorithm, with this id or none.

        None at all when more than `MAX_TRIALS` would fit, which takes a token without `kid`.
        """
        if self.algorithms is not None and algorithm not in self.algorithms:
            return ()
        keys = self.ring.fitting(algorithm, kid)
        return keys if len(keys) <= MAX_TRIALS else ()

    @property
    def named(self) -> str:
        return self.url

    def _check_profile(self, claims: Mapping[str, Any]) -> None:
        if not self.strict:
            return
        for name in ("client_id", "jti"):
            if not isinstance(claims.get(name), str) or not claims[name]:
                raise ValueError(name)
        if "iat" not in claims:
            raise ValueError("iat")


def _find(claims: Mapping[str, Any], name: str) -> Any:
    """The claim of this name or, where that begins with `/`, at this path (RFC 6901, members of objects only)."""
    if not name.startswith("/"):
        return claims.get(name)
    found: Any = claims
    for step in name[1:].split("/"):
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _date(value: Any, name: str) -> float:
    # Not isinstance: a bool is an int to Python, and no NumericDate (RFC 7519 section 2).
    if type(value) not in (int, float) or not 0 <= value <= _LAST_SECOND:
        raise ValueError(name)
    return float(value)

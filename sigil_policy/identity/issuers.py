"""Who may issue tokens, with which keys, and how their claims are read.

    Issuer(
        url="https://auth.sigil.acti.ai",
        audience="sigil-api",
        keys=[Key(algorithm="RS256", pem=public_key)],
    )

A key belongs to its issuer: it never verifies a token that names another one (RFC 8725 section 3.8). `url` and
`audience` are compared exactly, without forgiving a trailing slash.
"""

from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Listed
from sigil_policy.identity.fields import CONFIG, is_subject
from sigil_policy.identity.keys import Key
from sigil_policy.wire.authorization import is_scope_token, split_scopes

MAX_TRIALS = 8
"""Keys that are tried for one token, at most: every trial costs the service, and the token is not yet trusted."""

ClaimForm = Literal["string", "array"]
Text = Annotated[str, Field(min_length=1, max_length=2_048)]

_SCOPE: Mapping[str, ClaimForm] = {"scope": "string"}

# A NumericDate beyond the year 9999 is a mistake (milliseconds), and would make a token that never ends.
_LAST_SECOND = 253_402_300_799


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Issuer:
    """One issuer of access tokens.

    Options:
        url: the exact `iss` of its tokens.
        audience: the `aud` that a token must be meant for; several: any of them. None: tokens must name no audience.
        keys: its verification keys, at most 64. A key without id fits any `kid`.
        leeway: seconds by which the clocks may differ, 0 to 60 (default 5); counts for `exp`, `nbf` and `iat`.
        strict: only RFC 9068 access tokens: `typ` is `at+jwt`, and `client_id`, `iat` and `jti` are required too
            (default False: `typ` may also be absent or `JWT`).
        scope_claims: claims that hold scopes, and their form (default `{"scope": "string"}`: space-delimited). Name
            others here, for example `{"scp": "array"}`; the scopes of all of them count.
        tier_claim: the claim that names the tier (default `"tier"`; None: tokens name no tier).
    """

    url: Text
    audience: Text | Listed[Text] | None
    keys: Annotated[Listed[Key], Field(min_length=1, max_length=64)]
    leeway: Annotated[float, Field(ge=0, le=60)] = 5.0
    strict: bool = False
    scope_claims: Mapping[Text, ClaimForm] = field(default_factory=lambda: dict(_SCOPE))
    tier_claim: Text | None = "tier"

    @field_validator("url")
    @classmethod
    def _one_word(cls, url: str) -> str:
        if not url.isprintable() or " " in url:
            raise ValueError("url is the exact value of the claim iss, for example 'https://auth.example.com'")
        return url

    @model_validator(mode="after")
    def _consistent(self) -> "Issuer":
        if self.audience == ():
            raise ValueError("audience is empty: no token would fit; None means that tokens name no audience")
        if self.strict and self.audience is None:
            raise ValueError("strict tokens name an audience (RFC 9068 section 2.2): give audience=")
        seen: set[tuple[str, str]] = set()
        for key in self.keys:
            for algorithm in key.accepts if key.id is not None else ():
                if (algorithm, str(key.id)) in seen:
                    raise ValueError(
                        f"two {key.algorithm} keys have the id {key.id!r}; which one signed would be a guess"
                    )
                seen.add((algorithm, str(key.id)))
        if any(sum(key.id is None for key in keys) >= MAX_TRIALS for keys in self._by_algorithm.values()):
            raise ValueError(f"{MAX_TRIALS} or more keys of one algorithm have no id; give each the kid of its tokens")
        return self

    @cached_property
    def _by_algorithm(self) -> dict[str, tuple[Key, ...]]:
        found: dict[str, tuple[Key, ...]] = {}
        for key in self.keys:
            for algorithm in key.accepts:
                found[algorithm] = (*found.get(algorithm, ()), key)
        return found

    def candidates(self, algorithm: str, kid: str | None) -> tuple[Key, ...]:
        """The keys that may have signed: of this algorithm, with this id or none.

        None at all when more than `MAX_TRIALS` would fit, which takes a token without `kid`.
        """
        keys = self._by_algorithm.get(algorithm, ())
        if kid is not None:
            keys = tuple(key for key in keys if key.id is None or key.id == kid)
        return keys if len(keys) <= MAX_TRIALS else ()

    @cached_property
    def _audiences(self) -> frozenset[str]:
        if self.audience is None:
            return frozenset()
        return frozenset((self.audience,) if isinstance(self.audience, str) else self.audience)

    def read(self, claims: Mapping[str, Any], realm: str) -> tuple[Principal, float, float]:
        """The caller that verified `claims` speak of, and from when until when (leeway included).

        Arrays in `claims` are tuples. `ValueError` names the claim that this issuer's tokens cannot have. Time is not
        asked here.
        """
        subject = claims.get("sub")
        if not isinstance(subject, str) or not is_subject(subject):
            raise ValueError("sub")
        self._check_audience(claims)
        not_after = _date(claims.get("exp"), "exp") + self.leeway
        not_before = 0.0
        for name in ("nbf", "iat"):
            if name in claims:
                not_before = max(not_before, _date(claims[name], name) - self.leeway)
        if self.strict:
            self._check_profile(claims)
        tier = claims.get(self.tier_claim) if self.tier_claim is not None else None
        principal = Principal(
            subject=subject,
            scopes=self._scopes(claims),
            # A tier of another type names no tier: limits then fall back to the lowest, never to a higher one.
            tier=tier if isinstance(tier, str) and is_subject(tier) else None,
            issuer=self.url,
            realm=realm,
            claims=claims,
        )
        return principal, not_before, not_after

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

    def _check_profile(self, claims: Mapping[str, Any]) -> None:
        for name in ("client_id", "jti"):
            if not isinstance(claims.get(name), str) or not claims[name]:
                raise ValueError(name)
        if "iat" not in claims:
            raise ValueError("iat")

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
        return frozenset(filter(is_scope_token, scopes))


def _date(value: Any, name: str) -> float:
    # Not isinstance: a bool is an int to Python, and no NumericDate (RFC 7519 section 2).
    if type(value) not in (int, float) or not 0 <= value <= _LAST_SECOND:
        raise ValueError(name)
    return float(value)

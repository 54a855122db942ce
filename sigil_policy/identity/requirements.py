"""What a route takes of its callers, as values: which scopes, who has to vouch for them, and both together.

    read = FromIssuer("https://auth.example.com", scopes="agents:read") | FromApiKey("agents:read")
    pay = FromIssuer("https://auth.example.com", scopes="pay") & FromApiKey("till")

`&` takes both of its sides, `|` one of them; `&` binds tighter, as everywhere in Python. A requirement is a value: it
never changes, equal ones are equal in whatever order their sides were written, and its repr is how it is written.
`and`, `or` and `not` raise, because Python would drop a side without a word.

What it guarantees:

* **Scopes are never added up.** `FromIssuer(...)` and `FromApiKey(...)` hold where one single credential fits them: who
  vouches, and all the scopes. In the example, `pay` must be in the token, and `till` in the key. One credential may
  fulfil several terms, each for itself.
* **A scope that stands alone is one of the caller's**, which is `ex.principal`: the one who acts, as in a table that
  knows nothing of credentials. `AllOf("x") & FromApiKey()` with a token and a key takes `x` of whichever of them acts.
* **A superscope stands for scopes, of the credential that has it**, and for nothing else: never for an issuer, for a
  second credential, or for the scopes of another one.
* Two credentials may speak for different subjects, as a till and its cashier; `Both(..., same_subject=True)` takes
  those of one. Subjects are compared as text: write it only where issuer and keys name the same people the same way.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, NoReturn

from sigil_policy.core.facts import Principal
from sigil_policy.identity.issuers import Issuer
from sigil_policy.wire.authorization import is_scope_token, split_scopes

Principals = tuple[Principal, ...]

_MOST_TERMS = 64
_DEEPEST = 16
_MOST_ISSUER = 2_048


class Standing(IntEnum):
    """How a requirement stands with the credentials of an exchange. `&` is the least of its sides, `|` the greatest."""

    FOREIGN = 0
    """Somebody else would have to vouch: what was presented does not fit, whatever scopes it had."""
    ABSENT = 1
    """A credential that was not presented could help."""
    LACKING = 2
    """The credentials are there, scopes of them are not."""
    HELD = 3


class Lack(NamedTuple):
    """Scopes that one credential does not have; reads as `the scopes a, b of the token`."""

    whose: str
    scopes: "AllOf | AnyOf"
    principal: Principal

    def __str__(self) -> str:
        named = self.scopes.scopes
        which = "one of the scopes" if isinstance(self.scopes, AnyOf) else "the scope" + "s" * (len(named) > 1)
        return f"{which} {', '.join(named)}{self.whose}"


class Case:
    """What a requirement is judged by: `counted` of all credentials that were presented, of which the first one acts.
    There is one at least."""

    __slots__ = ("counted", "everybody", "superscope")

    def __init__(self, everybody: Principals, superscope: str | None, counted: Principals | None = None) -> None:
        self.everybody = everybody
        self.superscope = superscope
        self.counted = everybody if counted is None else counted

    def is_held(self, scopes: "AllOf | AnyOf", principal: Principal) -> bool:
        held = principal.scopes
        return scopes.allows(held) or (self.superscope is not None and self.superscope in held)

    def by_subject(self) -> "Iterable[Case]":
        """The same case for each subject, of whose credentials alone it is judged then."""
        for subject in dict.fromkeys(principal.subject for principal in self.counted):
            yield Case(self.everybody, self.superscope, tuple(p for p in self.counted if p.subject == subject))


class Requirement:
    """What a route takes: `AllOf`, `AnyOf`, `FromIssuer`, `FromApiKey`, and what `&` and `|` make of them."""

    __slots__ = ()

    def allows(self, held: frozenset[str]) -> bool:
        """Whether the caller's scopes decide alone, whoever vouches for them, and are enough."""
        return False

    def standing(self, case: Case) -> Standing:
        raise NotImplementedError

    def lacks(self, case: Case) -> list[Lack]:
        """What is missing, where the standing is `LACKING`: of the first way that scopes would open."""
        raise NotImplementedError

    def __and__(self, other: "Requirement | str") -> "Both":
        return Both(self, other) if isinstance(other, Requirement | str) else NotImplemented

    def __rand__(self, other: str) -> "Both":
        return Both(other, self) if isinstance(other, str) else NotImplemented

    def __or__(self, other: "Requirement | str") -> "Either":
        return Either(self, other) if isinstance(other, Requirement | str) else NotImplemented

    def __ror__(self, other: str) -> "Either":
        return Either(other, self) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a requirement is neither true nor false; combine requirements with & and |, not `and` and `or`"
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is a value; {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is a value; {name} cannot be deleted")

    def __getstate__(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._slots())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        for name, value in zip(self._slots(), state, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def _slots(cls) -> list[str]:
        return [name for kind in cls.__mro__ for name in getattr(kind, "__slots__", ())]


class _ScopeSet(Requirement):
    """Scopes named by a rule, in the order in which they were written."""

    __slots__ = ("_known", "scopes")

    scopes: tuple[str, ...]
    _known: frozenset[str]

    def __init__(self, *scopes: str) -> None:
        for scope in scopes:
            if not isinstance(scope, str) or not is_scope_token(scope):
                raise ValueError(
                    f"scope {scope!r} must be printable ASCII without space, quote and backslash, for example "
                    "'agents:read' (RFC 6749 section 3.3); write several scopes as a list"
                )
        object.__setattr__(self, "scopes", tuple(dict.fromkeys(scopes)))
        object.__setattr__(self, "_known", frozenset(scopes))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.scopes))})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, _ScopeSet) and other._known == self._known

    def __hash__(self) -> int:
        return hash((type(self), self._known))


class AllOf(_ScopeSet):
    """Every one of these scopes: `AllOf("agents:read", "agents:execute")`. `AllOf()` takes none, but a caller."""

    __slots__ = ()

    def allows(self, held: frozenset[str]) -> bool:
        return self._known <= held

    def missing(self, held: frozenset[str]) -> list[str]:
        return [scope for scope in self.scopes if scope not in held]

    def standing(self, case: Case) -> Standing:
        return _standing_of_caller(self, case)

    def lacks(self, case: Case) -> list[Lack]:
        return [Lack("", self, case.everybody[0])]


class AnyOf(_ScopeSet):
    """At least one of these scopes: `AnyOf("memory:read", "memory:write")`."""

    __slots__ = ()

    def __init__(self, *scopes: str) -> None:
        if not scopes:
            raise ValueError("AnyOf() without a scope lets nobody pass; name at least one")
        super().__init__(*scopes)

    def allows(self, held: frozenset[str]) -> bool:
        return not self._known.isdisjoint(held)

    def missing(self, held: frozenset[str]) -> list[str]:
        return list(self.scopes)

    def standing(self, case: Case) -> Standing:
        return _standing_of_caller(self, case)

    def lacks(self, case: Case) -> list[Lack]:
        return [Lack("", self, case.everybody[0])]


class _From(Requirement):
    """One credential of a kind, with these scopes."""

    __slots__ = ("scopes",)

    scopes: AllOf | AnyOf
    whose: ClassVar[str]

    def fits(self, principal: Principal) -> bool:
        """Whether this is who has to vouch."""
        raise NotImplementedError

    def replaces(self, principal: Principal) -> bool:
        """Whether this one stands where the credential would have to stand."""
        raise NotImplementedError

    def standing(self, case: Case) -> Standing:
        fitting = [principal for principal in case.counted if self.fits(principal)]
        if any(case.is_held(self.scopes, principal) for principal in fitting):
            return Standing.HELD
        if fitting:
            return Standing.LACKING
        return Standing.FOREIGN if any(map(self.replaces, case.everybody)) else Standing.ABSENT

    def lacks(self, case: Case) -> list[Lack]:
        return [Lack(self.whose, self.scopes, next(filter(self.fits, case.counted)))]

    def _scopes_text(self) -> str:
        if isinstance(self.scopes, AnyOf):
            return repr(self.scopes)
        named = self.scopes.scopes
        return repr(named[0]) if len(named) == 1 else repr(list(named))


class FromIssuer(_From):
    """A token of this issuer vouches for the caller, and has these scopes.

        FromIssuer("https://auth.example.com")
        FromIssuer(AUTH, scopes="agents:read")      # AUTH = Issuer(...), the one that BearerAuth has: no typing errors

    Options:
        issuer: an `Issuer`, or its `url`, which is compared exactly. No policy knows all issuers, so none can tell one
            that nobody accepts: such a term never holds.
        scopes: one scope, several separated by spaces or as a list (all of them), `AllOf(...)` or `AnyOf(...)`; all of
            the same token (default `[]`: any).

    Raises `ValueError` for what can be no issuer, or no scope.
    """

    __slots__ = ("issuer",)

    issuer: str
    whose: ClassVar[str] = " of the token"

    def __init__(self, issuer: str | Issuer, scopes: "str | Sequence[str] | AllOf | AnyOf" = ()) -> None:
        url = issuer.url if isinstance(issuer, Issuer) else issuer
        if not isinstance(url, str) or not 0 < len(url) <= _MOST_ISSUER or not url.isprintable() or " " in url:
            raise ValueError(
                f"FromIssuer takes an Issuer or its url, such as 'https://auth.example.com', not {issuer!r}; "
                "several issuers are written FromIssuer(a) | FromIssuer(b)"
            )
        object.__setattr__(self, "issuer", url)
        object.__setattr__(self, "scopes", scopes_of(scopes, "FromIssuer"))

    def fits(self, principal: Principal) -> bool:
        return principal.issuer == self.issuer

    def replaces(self, principal: Principal) -> bool:
        return principal.issuer is not None or principal.kind == "bearer"

    def __repr__(self) -> str:
        scopes = f", scopes={self._scopes_text()}" if _is_any(self.scopes) else ""
        return f"FromIssuer({self.issuer!r}{scopes})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FromIssuer) and (other.issuer, other.scopes) == (self.issuer, self.scopes)

    def __hash__(self) -> int:
        return hash((FromIssuer, self.issuer, self.scopes))


class FromApiKey(_From):
    """An API key vouches for the caller, and has these scopes: `FromApiKey()`, `FromApiKey("agents:read")`.

    `scopes` is as of `FromIssuer` (default `[]`: any key). Raises `ValueError` for what can be no scope.
    """

    __slots__ = ()

    whose: ClassVar[str] = " of the API key"

    def __init__(self, scopes: "str | Sequence[str] | AllOf | AnyOf" = ()) -> None:
        object.__setattr__(self, "scopes", scopes_of(scopes, "FromApiKey"))

    def fits(self, principal: Principal) -> bool:
        return principal.kind == "api_key"

    replaces = fits

    def __repr__(self) -> str:
        return f"FromApiKey({self._scopes_text() if _is_any(self.scopes) else ''})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FromApiKey) and other.scopes == self.scopes

    def __hash__(self) -> int:
        return hash((FromApiKey, self.scopes))


class _Combined(Requirement):
    """Several requirements as one. `a & b & c` is one of three, in whatever parentheses."""

    __slots__ = ("sides",)

    sides: tuple[Requirement, ...]
    sign: ClassVar[str]

    def __init__(self, *sides: Requirement | str) -> None:
        name = type(self).__name__
        if len(sides) < 2:
            raise ValueError(f"{name} takes two requirements or more, not {len(sides)}")
        given = [side if isinstance(side, Requirement) else scopes_of(side, name) for side in sides]
        object.__setattr__(self, "sides", tuple(part for side in given for part in self._parts(side)))
        terms, depth = _size(self)
        if terms > _MOST_TERMS or depth > _DEEPEST:
            raise ValueError(f"{name} has {terms} terms, nested {depth} deep; at most {_MOST_TERMS}, {_DEEPEST} deep")

    def _parts(self, side: Requirement) -> tuple[Requirement, ...]:
        return side.sides if type(side) is type(self) and isinstance(side, _Combined) else (side,)

    def __repr__(self) -> str:
        return f" {self.sign} ".join(
            f"({side!r})" if isinstance(side, Either) and self.sign == "&" else repr(side) for side in self.sides
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, _Combined) and other._value() == self._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def _value(self) -> tuple[Any, ...]:
        return type(self), frozenset(self.sides)


class Both(_Combined):
    """All of its sides: `FromIssuer("https://auth.example.com") & FromApiKey()`, two credentials in one request.

        Both(FromIssuer("https://auth.example.com"), FromApiKey(), same_subject=True)

    `same_subject=True`: all of its sides hold among the credentials of one subject (default False). The policies that
    authenticate let two credentials through with `conflicts_with=None`. Raises `ValueError` for less than two sides,
    more than 64 terms, and what is nested more than 16 deep.
    """

    __slots__ = ("same_subject",)

    sign: ClassVar[str] = "&"
    same_subject: bool

    def __init__(self, *sides: Requirement | str, same_subject: bool = False) -> None:
        super().__init__(*sides)
        if type(same_subject) is not bool:
            raise ValueError(f"same_subject is True or False, not {same_subject!r}")
        object.__setattr__(self, "same_subject", same_subject)

    def standing(self, case: Case) -> Standing:
        if not self.same_subject:
            return self._least(case)
        return max(self._least(one) for one in case.by_subject())

    def lacks(self, case: Case) -> list[Lack]:
        if self.same_subject:
            case = next(one for one in case.by_subject() if self._least(one) is Standing.LACKING)
        lacking = (side for side in self.sides if side.standing(case) is Standing.LACKING)
        return [lack for side in lacking for lack in side.lacks(case)]

    def _parts(self, side: Requirement) -> tuple[Requirement, ...]:
        return (side,) if isinstance(side, Both) and side.same_subject else super()._parts(side)

    def _least(self, case: Case) -> Standing:
        return min(side.standing(case) for side in self.sides)

    def __repr__(self) -> str:
        return (
            f"Both({', '.join(map(repr, self.sides))}, same_subject=True)" if self.same_subject else super().__repr__()
        )

    def _value(self) -> tuple[Any, ...]:
        return (*super()._value(), self.same_subject)


class Either(_Combined):
    """One of its sides: `FromIssuer("https://auth.example.com") | FromApiKey()`, `AllOf("a") | AllOf("b", "c")`."""

    __slots__ = ()

    sign: ClassVar[str] = "|"

    def standing(self, case: Case) -> Standing:
        return max(side.standing(case) for side in self.sides)

    def lacks(self, case: Case) -> list[Lack]:
        return next(side for side in self.sides if side.standing(case) is Standing.LACKING).lacks(case)


def scopes_of(value: Any, what: str) -> AllOf | AnyOf:
    """The scopes that `value` names. Raises `ValueError`, which says `what` they are for."""
    if isinstance(value, AllOf | AnyOf):
        return value
    scopes = split_scopes(value) if isinstance(value, str) else value
    if not isinstance(scopes, Sequence) or (isinstance(value, str) and not scopes):
        raise ValueError(f"{what} takes a scope, a list of scopes, AllOf(...) or AnyOf(...); [] stands for any caller")
    try:
        return AllOf(*scopes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _standing_of_caller(scopes: AllOf | AnyOf, case: Case) -> Standing:
    caller = case.everybody[0]
    if caller not in case.counted:
        return Standing.FOREIGN
    return Standing.HELD if case.is_held(scopes, caller) else Standing.LACKING


def _size(requirement: Requirement) -> tuple[int, int]:
    """How many terms it has, and how deep it is nested."""
    if not isinstance(requirement, _Combined):
        return 1, 0
    sizes = [_size(side) for side in requirement.sides]
    return sum(terms for terms, _ in sizes), 1 + max(depth for _, depth in sizes)


def _is_any(scopes: AllOf | AnyOf) -> bool:
    return scopes.scopes != ()

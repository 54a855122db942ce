"""Facts: what one policy learned about an exchange and every other may read, keyed by type.

    principal = ex[Principal]            # KeyError that says which policy to add
    principal = ex.get(Principal)        # or None
    ex.give(TokenUsage(input_tokens=12, output_tokens=40))

Facts are small immutable values. A policy that gives one names it in `gives`, one that relies on it in `needs`
or `reads`: the order of a stack is checked from these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from starlette.authentication import AuthCredentials

_NO_CLAIMS: Mapping[str, Any] = MappingProxyType({})


class Correlation(NamedTuple):
    """The ids that tie this exchange to others: in every log line and every problem. Given by `RequestID`."""

    request_id: str
    session_id: str | None = None
    client_id: str | None = None
    client_version: str | None = None
    trace_id: str | None = None


class Credentials(AuthCredentials):
    """Starlette's `request.auth`, which many requests share: nobody changes it for the others."""

    def __init__(self, scopes: frozenset[str] = frozenset()) -> None:
        object.__setattr__(self, "scopes", scopes)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"request.auth is shared by all requests of a caller; {name} cannot be set")


@dataclass(frozen=True, eq=False)
class Principal:
    """Who calls. Given by `BearerAuth` and `ApiKeyAuth`; also `request.user` in Starlette and FastAPI.

    `kind` tells how the caller was authenticated (`"bearer"` or `"api_key"`), `tier` names the set of limits
    (`None`: the credential named none), `claims` are the verified claims of the token (empty for keys), `realm` is the
    protection space that a challenge to this caller names. `expires` is the moment, in seconds since the epoch, from
    which the credential speaks for nobody (leeway included; `None`: it has no end): what lasts longer than a request,
    such as a WebSocket, ends there.
    """

    subject: str
    scopes: frozenset[str] = frozenset()
    tier: str | None = None
    kind: str = "bearer"
    issuer: str | None = None
    realm: str = "api"
    claims: Mapping[str, Any] = field(default_factory=lambda: _NO_CLAIMS, repr=False)
    expires: float | None = None

    # What Starlette's `request.user` promises.
    is_authenticated = True

    @property
    def display_name(self) -> str:
        return self.subject

    @property
    def identity(self) -> str:
        return self.subject

    @cached_property
    def key(self) -> str:
        """Names this caller among all callers, for counters: two issuers may know the same subject."""
        issuer = self.issuer or ""
        return f"{self.kind}:{len(issuer)}:{issuer}:{self.subject}"

    @cached_property
    def credentials(self) -> Credentials:
        """What Starlette's `request.auth` promises, so that `@requires("agents:read")` works."""
        return Credentials(self.scopes)


class Cosigners(tuple[Principal, ...]):
    """Whom further credentials of this exchange speak for, beside the `Principal`; ask `Exchange.principals`. Given by
    `BearerAuth` and `ApiKeyAuth`, where `conflicts_with=None` lets a caller present both.

        caller, *cosigners = get_exchange(request).principals
    """

    __slots__ = ()


class Public(NamedTuple):
    """This route was listed as public: nobody has to say who they are. Given by `Scopes`."""

    rule: str


class TokenUsage(NamedTuple):
    """Language-model tokens that this exchange has used so far. Given by the application, see `report_tokens`."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class WindowState(NamedTuple):
    """One window of a caller after the decision: `reset` is seconds since the epoch, `seconds` the window's length."""

    name: str
    unit: str
    limit: int
    remaining: int
    reset: float
    seconds: int


class Quota:
    """What the caller may still do. Given by `RateLimit` to every exchange that it counted.

    `tier` is the caller's, `requests` and `tokens` are its windows: made when somebody asks.
    """

    __slots__ = ("_windows", "tier")

    def __init__(self, tier: str, windows: Callable[[], tuple[WindowState, ...]]) -> None:
        self.tier = tier
        self._windows = windows

    @property
    def requests(self) -> tuple[WindowState, ...]:
        return tuple(window for window in self._windows() if window.unit == "requests")

    @property
    def tokens(self) -> tuple[WindowState, ...]:
        return tuple(window for window in self._windows() if window.unit != "requests")

    def __repr__(self) -> str:
        return f"Quota({self.tier!r}, {list(self._windows())})"

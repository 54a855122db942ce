"""What an endpoint says of itself: its scopes, its cost, its limit, how its responses may be kept.

    @app.post("/v7/agents/{name}/run")
    @policy(scopes=["agents:read", "agents:execute"], cost=5, limit="10/minute", timeout=30)
    async def run(name: str) -> Run: ...

    router = policy(scopes="admin")(APIRouter(prefix="/admin"))       # for all its endpoints that say nothing else

    app.add_middleware(PolicyStack, policies=[...], tags={"internal": policy(scopes="internal")})

A mark wraps nothing: the function, its signature and its name stay what they are. It is read from the routes of the
application, by the stack that is mounted around it. Strongest first: the tables of the policies, the endpoint, scopes
in FastAPI's `Security(..., scopes=[...])`, the tags, the routers from the inside out. `scopes`, `any_scope` and
`public` are one thing: who says one of them has said who may call.

Marks that no policy of the stack understands fail: at startup, else each exchange with 500.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import isfinite
from typing import Any, TypeVar

from sigil_policy.wire.authorization import is_scope_token, split_scopes

Target = TypeVar("Target")

_ATTRIBUTE = "__sigil_marks__"
_ACCESS = frozenset(("scopes", "any_scope", "public"))
_DEEPEST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What was said; None is nothing. Call it with an endpoint, or a router, to say it there; see `policy`."""

    scopes: tuple[str, ...] | None = None
    any_scope: tuple[str, ...] | None = None
    public: bool | None = None
    cost: int | None = None
    limit: Any = None
    cache: Any = None
    deprecated: Any = None
    timeout: float | None = None

    def __call__(self, target: Target) -> Target:
        """Mark `target`. What it says already, by a decorator below, is the weaker."""
        known = vars(target).get(_ATTRIBUTE) if hasattr(target, "__dict__") else None
        try:
            setattr(target, _ATTRIBUTE, self.over(known))
        except (AttributeError, TypeError):
            raise TypeError(
                f"{type(target).__name__} cannot be marked; put @policy(...) right above the function, under the "
                "decorator of the route"
            ) from None
        return target

    def over(self, weaker: "Marks | None") -> "Marks":
        """These, and of `weaker` what these say nothing of."""
        if weaker is None:
            return self
        said = {name: getattr(weaker, name) for name in weaker.names}
        if self.names & _ACCESS:
            said = {name: value for name, value in said.items() if name not in _ACCESS}
        return Marks(**said | {name: getattr(self, name) for name in self.names})

    @property
    def names(self) -> frozenset[str]:
        """What is said here."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)


def policy(
    *,
    scopes: str | Sequence[str] | None = None,
    any_scope: str | Sequence[str] | None = None,
    public: bool | None = None,
    cost: int | None = None,
    limit: Any = None,
    cache: Any = None,
    deprecated: Any = None,
    timeout: float | None = None,
) -> Marks:
    """Mark an endpoint, or what a router or a tag says where its endpoints say nothing.

        @policy(scopes="agents:write", cost=5)
        async def create(agent: Agent) -> Agent: ...

    Options (each None by default: nothing is said):
        scopes: one, several separated by spaces or as a list: a caller needs all of them (`[]`: any caller). `Scopes`.
        any_scope: one of these is enough. `Scopes`.
        public: True for everybody; False takes a caller, also where the router is public. `Scopes`.
        cost: how many requests one counts as. `RateLimit`.
        limit: what each caller may do here, beside its tier: `"10/minute"`, or a `Tier`. `RateLimit`.
        cache: a Cache-Control value or a `CacheRule`, for successes. `CacheControl`.
        deprecated: a `Deprecation`. `Versioning`.
        timeout: seconds until the answer is 504. `Timeout`.

    Raises `ValueError` and `TypeError` for what cannot be; what only a policy can judge fails at startup.
    """
    if public and (scopes is not None or any_scope is not None):
        raise ValueError("public=True lets everybody pass, and scopes would refuse them; keep one of them")
    if scopes is not None and any_scope is not None:
        raise ValueError("scopes= and any_scope= are two answers to one question; keep one of them")
    if cost is not None and (type(cost) is not int or cost < 0):
        raise ValueError(f"cost is a number of requests, 0 or more, not {cost!r}")
    if timeout is not None and not (isinstance(timeout, int | float) and isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout is a number of seconds above 0, not {timeout!r}")
    if any_scope is not None and not _scopes(any_scope):
        raise ValueError("any_scope=[] lets nobody pass; name at least one scope")
    return Marks(
        scopes=None if scopes is None else _scopes(scopes),
        any_scope=None if any_scope is None else _scopes(any_scope),
        public=public,
        cost=cost,
        limit=limit,
        cache=cache,
        deprecated=deprecated,
        timeout=timeout,
    )


def _scopes(given: str | Sequence[str]) -> tuple[str, ...]:
    scopes = tuple(split_scopes(given) if isinstance(given, str) else given)
    for scope in scopes:
        if not isinstance(scope, str) or not is_scope_token(scope):
            raise ValueError(
                f"scope {scope!r} must be printable ASCII without space, quote and backslash, for example "
                "'agents:read' (RFC 6749 section 3.3)"
            )
    return scopes


def marks_of(target: Any, method: str | None = None) -> Marks | None:
    """What `target`, an endpoint or a router, says of itself; of a class also what it says at `method`."""
    found: Marks | None = None
    for _ in range(_DEEPEST):
        said = getattr(target, _ATTRIBUTE, None)
        if isinstance(said, Marks):
            found = said if found is None else found.over(said)
        inner: Callable[..., Any] | None = target.func if isinstance(target, partial) else None
        inner = inner or getattr(target, "__wrapped__", None)
        if inner is None:
            break
        target = inner
    if isinstance(target, type) and method is not None:
        handler = getattr(target, method.lower(), None) or (method == "HEAD" and getattr(target, "get", None))
        own = marks_of(handler) if handler else None
        found = own.over(found) if own is not None else found
    return found

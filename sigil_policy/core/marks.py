"""What an endpoint says of itself: its scopes, its cost, its limit, how its responses may be kept.

    @app.post("/v7/agents/{name}/run")
    @policy(scopes=["agents:read", "agents:execute"], cost=5, limit="10/minute", timeout=30)
    async def run(name: str) -> Run: ...

    router = policy(scopes="admin")(APIRouter(prefix="/admin"))       # for all its endpoints that say nothing else
    app = policy(scopes="internal")(FastAPI())                        # the weakest: for all that nobody speaks for

    app.add_middleware(PolicyStack, policies=[...], tags={"internal": policy(scopes="internal")})

A mark wraps nothing: the function, its signature and its name stay what they are. It is read from the routes of the
application, by the stack that is mounted around it; behind decorators that are written with `functools.wraps` too, but
not behind others, so write it above those. Strongest first: the tables of the policies, the endpoint, scopes
in FastAPI's `Security(..., scopes=[...])`, the tags, the routers from the inside out. `scopes`, `any_scope` and
`public` are one thing: who says one of them has said who may call.

Marks that no policy of the stack understands fail: at startup, else each exchange with 500.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import isfinite
from typing import Any, TypeVar

from sigil_policy.wire.authorization import is_scope_token, split_scopes

Target = TypeVar("Target")

_ATTRIBUTE = "__sigil_marks__"
_ACCESS = frozenset(("scopes", "any_scope", "public"))
_DEEPEST = 100
_marked = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What was said; None is nothing. Call it with an endpoint, or a router, to say it there; see `policy`.

    marks_of(run)       # Marks(scopes=("agents:execute",), cost=5, ...)
    """

    scopes: tuple[str, ...] | None = None
    any_scope: tuple[str, ...] | None = None
    public: bool | None = None
    cost: int | None = None
    limit: Any = None
    cache: Any = None
    deprecated: Any = None
    timeout: float | None = None

    def __call__(self, target: Target) -> Target:
        """Mark `target`. What it says already, by a decorator below, is the weaker.

        Raises `ValueError` where it says already, otherwise, who may call it: it is one function on two routes, which
        would both get what was said last.
        """
        known = vars(target).get(_ATTRIBUTE) if hasattr(target, "__dict__") else None
        if isinstance(known, Marks) and known is not getattr(getattr(target, "__wrapped__", None), _ATTRIBUTE, None):
            before = {name: getattr(known, name) for name in known.names & _ACCESS}
            now = {name: getattr(self, name) for name in self.names & _ACCESS}
            if before and now and before != now:
                raise ValueError(
                    f"{getattr(target, '__qualname__', target)!r} says {_written(before)} already, and cannot say "
                    f"{_written(now)} as well; for another route mark functools.partial(function), or the route itself"
                )
        global _marked
        try:
            setattr(target, _ATTRIBUTE, self.over(known))
            # The application of a framework is served by its router, which is all that a stack inside of it can see.
            router = getattr(target, "router", None)
            if hasattr(router, "routes") and callable(router):
                self(router)
        except (AttributeError, TypeError):
            raise TypeError(
                f"{type(target).__name__} cannot be marked; put @policy(...) right above the function, under the "
                "decorator of the route"
            ) from None
        _marked = True
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
    if public is not None and type(public) is not bool:
        raise ValueError(f"public is True, False or None, not {public!r}")
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


def is_anything_marked() -> bool:
    """Whether anything in this process has been marked."""
    return _marked


def _written(said: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in said.items())


def marks_of(target: Any, method: str | None = None) -> Marks | None:
    """What `target`, an endpoint or a router, says of itself; of a class also what it says at `method`."""
    found: Marks | None = None
    speaker = speaker_of(target, method)
    if speaker is not target:
        found = marks_of(speaker)
    for _ in range(_DEEPEST):
        for said in _said(target):
            found = said if found is None else found.over(said)
        inner: Callable[..., Any] | None = target.func if isinstance(target, partial) else None
        inner = inner or getattr(target, "__wrapped__", None)
        if inner is None:
            break
        target = inner
    return found


def speaker_of(target: Any, method: str | None) -> Any:
    """Who says something of its own at `method`: of a class its method, if that is marked, else `target`."""
    if isinstance(target, type) and method is not None:
        handler = getattr(target, method.lower(), None) or (method == "HEAD" and getattr(target, "get", None))
        if handler and marks_of(handler) is not None:
            return handler
    return target


def _said(target: Any) -> Iterator[Marks]:
    """The marks of `target`, then those of its classes: what is marked stays marked below it."""
    speaking = [*target.__mro__] if isinstance(target, type) else [target, *type(target).__mro__]
    if not isinstance(target, type):
        # An object that is called is served by its class's `__call__`.
        speaking.insert(1, next((vars(kind)["__call__"] for kind in speaking[1:] if "__call__" in vars(kind)), None))
    for one in speaking:
        said = getattr(one, "__dict__", {}).get(_ATTRIBUTE)
        if isinstance(said, Marks):
            yield said

"""Says who may keep a response, and for how long: by route, and safely where nothing was said.

    CacheControl(routes={
        "GET /v7/agents": "private, max-age=60",
        "GET /v7/agents/{name}": "private, max-age=300",
        "GET /health": "no-cache",
        "GET /v7/models": CacheRule("public, max-age=3600", vary=("Accept-Language",)),
    })

What it guarantees:

* The application's own Cache-Control wins, always.
* A response to somebody who has said who they are never reaches another through a shared cache: without a rule it is
  `private`, and a rule's `public` or `s-maxage` becomes `private` for it, unless the rule says
  `dangerously_share_authenticated`. Shared caches know that `Authorization` is personal, but not that `X-API-Key` is:
  such responses also get `Vary: X-API-Key`.
* Errors of the application are `no-store` (404, 405, 410, 414 and 501 may be cached otherwise); a rule never applies to
  them. Anonymous successes without a rule get nothing.
* A rule's `public` or `s-maxage` becomes `private` for a response that sets a cookie, too.
* `Vary` is merged with what is there, on 200 and 304 alike, never overwritten.

Cookies that came with a request, and credentials that only the application knows, are not seen here: such responses
need the application's own `Cache-Control`. Place it around Conditional and inside everything that authenticates.

RFC 9111; RFC 9110 section 12.5.5 (Vary).
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks
from sigil_policy.core.operations import Operation, is_success
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.core.routing import parse_route
from sigil_policy.wire.caching import (
    field_name,
    format_cache_control,
    made_private,
    may_be_shared,
    merge_vary,
    parse_cache_control,
)

Pair = tuple[bytes, bytes]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class CacheRule:
    """What a route's successes say: `value` as Cache-Control, `vary` the request headers that they depend on.

    `dangerously_share_authenticated=True` lets `public` and `s-maxage` stand on responses to authenticated callers:
    only for what is the same for everybody.
    """

    value: str
    vary: Listed[str] = ()
    dangerously_share_authenticated: bool = False

    @field_validator("value")
    @classmethod
    def _is_valid(cls, value: str) -> str:
        parse_cache_control(value)
        return value

    @field_validator("vary")
    @classmethod
    def _are_names(cls, vary: tuple[str, ...]) -> tuple[str, ...]:
        for name in vary:
            field_name(name)
        return vary


class _Lines(NamedTuple):
    """What a rule, or having none, means: ready to append."""

    anonymous: Pair | None
    authenticated: Pair | None
    vary: bytes
    vary_with_key: bytes


class CacheControl(Policy):
    """Sets `Cache-Control` and `Vary` where the application has not.

    Options:
        routes: from route to a Cache-Control value or a `CacheRule`; for successes and 304 (default: none).
        authenticated: for successes and redirects to authenticated callers without a rule (default "private"); None
            leaves them as they are.
        errors: for responses from 400 up (default "no-store"); None leaves them as they are.
        api_key_header: the request header that carries API keys (default "X-API-Key").

    A value that caches would misread is refused at construction. RFC 9111 sections 3.5 and 5.2.2.
    """

    routes: Mapping[str, str | CacheRule] = Field(default_factory=dict)
    authenticated: str | None = "private"
    errors: str | None = "no-store"
    api_key_header: Annotated[str, Field(min_length=1)] = "X-API-Key"

    reads = (Principal,)
    marks: ClassVar[frozenset[str]] = frozenset(("cache",))

    @field_validator("routes")
    @classmethod
    def _are_rules(cls, routes: Mapping[str, str | CacheRule]) -> Mapping[str, str | CacheRule]:
        for route, rule in routes.items():
            parse_route(route)
            if isinstance(rule, str):
                parse_cache_control(rule)
        return routes

    @field_validator("authenticated")
    @classmethod
    def _is_personal(cls, value: str | None) -> str | None:
        if value is not None and may_be_shared(parse_cache_control(value)):
            raise ValueError(
                f"authenticated={value!r} lets shared caches answer one caller with what was for another; "
                "use 'private' or 'no-store', and CacheRule(..., dangerously_share_authenticated=True) for a route"
            )
        return value

    @field_validator("errors")
    @classmethod
    def _is_valid(cls, value: str | None) -> str | None:
        if value is not None:
            parse_cache_control(value)
        return value

    @field_validator("api_key_header")
    @classmethod
    def _is_name(cls, name: str) -> str:
        field_name(name)
        return name

    @cached_property
    def _key(self) -> bytes:
        return field_name(self.api_key_header).lower()

    @cached_property
    def _error(self) -> Pair | None:
        return _pair(self.errors)

    @cached_property
    def _unruled(self) -> _Lines:
        return _Lines(None, _pair(self.authenticated), b"", field_name(self.api_key_header))

    def rules(self) -> Mapping[str, _Lines]:
        return {route: self._lines(given) for route, given in self.routes.items()}

    def _lines(self, given: str | CacheRule) -> _Lines:
        rule = CacheRule(given) if isinstance(given, str) else given
        directives = parse_cache_control(rule.value)
        personal = directives if rule.dangerously_share_authenticated else made_private(directives)
        vary = merge_vary((), map(field_name, rule.vary))
        return _Lines(
            (b"cache-control", format_cache_control(directives)),
            (b"cache-control", format_cache_control(personal)),
            vary,
            merge_vary((vary,), (self._unruled.vary_with_key,)),
        )

    def marked(self, marks: Marks, rule: Any, resolution: Resolution) -> Any:
        if rule is not None or marks.cache is None:
            return rule
        if not isinstance(marks.cache, str | CacheRule):
            raise ValueError(f"cache= takes a Cache-Control value or a CacheRule, not {type(marks.cache).__name__}")
        return self._lines(marks.cache)

    def describe(self, operation: Operation, rule: _Lines | None) -> None:
        if rule is not None or self.authenticated is not None:
            operation.sends("Cache-Control", "Who may keep this, and for how long (RFC 9111)", when=is_success)
        if self.errors is not None:
            operation.sends("Cache-Control", "Who may keep this, and for how long (RFC 9111)", when=_is_error)

    def on_response(self, ex: Exchange, head: Head) -> None:
        status = head.status
        if status < 200:
            return
        caller, headers = ex.principal, head.headers
        with_key = self._key in ex.headers or (caller is not None and caller.kind == "api_key")
        rule: _Lines = ((status < 300 or status == 304) and ex.rule(self)) or self._unruled
        for name, _ in headers:
            if name == b"cache-control":
                break
        else:
            if status >= 400:
                chosen = self._error
            elif with_key or caller is not None or b"authorization" in ex.headers:
                chosen = rule.authenticated
            elif rule.anonymous is not None and head.get(b"set-cookie") is not None:
                chosen = rule.authenticated  # a shared cache would hand out the cookie with the rest (RFC 9111, 7.3)
            else:
                chosen = rule.anonymous
            if chosen is not None:
                headers.append(chosen)
        vary = rule.vary_with_key if with_key else rule.vary
        if vary:
            present = head.get_all(b"vary")
            if present:
                head.replace(b"vary", merge_vary(present, (vary,)))
            else:
                headers.append((b"vary", vary))


def _is_error(status: int) -> bool:
    return status >= 400


def _pair(value: str | None) -> Pair | None:
    return None if value is None else (b"cache-control", format_cache_control(parse_cache_control(value)))

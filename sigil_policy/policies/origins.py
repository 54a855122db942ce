"""Refuses WebSockets that a foreign web page opens.

    app.add_middleware(PolicyStack, policies=[
        RequestID(), Problems(), AllowedOrigins(origins=["https://app.example.com"]), BearerAuth(...), Scopes(...),
    ])

    HTTP/1.1 403 Forbidden
    {"error_code": "REQ_403", "detail": "This origin may not open a WebSocket here", ...}

Any page may open a WebSocket to any server: CORS does not ask, cookies and a client certificate go along, and the page
reads what comes back. Only the `Origin` that the browser sends tells where it comes from.

What it guarantees:

* **An `Origin` that is not listed is refused** before the connection is accepted and before a credential is looked at;
  `null` too, which sandboxed pages send, and more than one. What is listed is compared byte by byte. A page of the
  service's own origin is listed like any other: nothing is concluded from `Host`, which is the client's to write.
* **No `Origin`, no browser.** Browsers send it with every WebSocket. Other clients write what they like, so it is no
  proof of who they are; they pass without one, unless `required`.
* `unsafe_methods=True` asks the same of HTTP requests with a method that changes something, also one that is unknown.
  Older browsers send no `Origin` with some of them: where cookies authenticate, that alone is no protection.

Goes inside `Problems`, outside the policies that authenticate. An MCP server takes `McpEndpoint` instead. RFC 6455
sections 4.2.2 and 10.2; RFC 6454 section 7; RFC 9110 section 9.2.1 for safe methods.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Self

from pydantic import field_validator, model_validator

from sigil_policy.core.catalogue import http_problem
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.routing import parse_route
from sigil_policy.wire.origins import Origins

_SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))


class AllowedOrigins(Policy):
    """WebSockets come from the listed web pages, or from no web page.

        AllowedOrigins(origins=["https://app.example.com", "http://localhost:3000"])

    Answers 403 `REQ_403` to any other `Origin`. Raises `ValidationError` (a `ValueError`) for an origin that no browser
    would send, and a route that is none.
    """

    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    origins: Listed[str]
    """Origins of web pages that may come, as browsers write them: `"https://app.example.com"`; `[]`: no web page."""

    required: bool = False
    """Refuse what comes without an `Origin` as well (default False: that is no browser)."""

    unsafe_methods: bool = False
    """Ask it also of HTTP requests whose method is none of GET, HEAD, OPTIONS and TRACE (default False)."""

    exempt: Listed[str] = ()
    """Routes of which it is not asked, such as `"WEBSOCKET /public/ticker"` (default none)."""

    @field_validator("origins")
    @classmethod
    def _as_browsers_write_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return Origins(origins).listed

    @model_validator(mode="after")
    def _prepare(self) -> Self:
        for route in self.exempt:
            parse_route(route)
        _ = self._allowed
        return self

    @cached_property
    def _allowed(self) -> Origins:
        return Origins(self.origins)

    def rules(self) -> Mapping[str, bool]:
        return dict.fromkeys(self.exempt, True)

    def describe(self, operation: Operation, rule: bool | None) -> None:
        if self.unsafe_methods and operation.method not in _SAFE and not rule:
            operation.answers(http_problem(403))

    def on_request(self, ex: Exchange) -> Problem | None:
        socket = ex.kind == "websocket"
        if not (socket or (self.unsafe_methods and ex.method not in _SAFE)) or (self.exempt and ex.rule(self)):
            return None
        origin = ex.headers.get(b"origin")
        if (not self.required) if origin is None else self._allowed.lists(origin):
            return None
        what = "open a WebSocket here" if socket else "call this service"
        return http_problem(403)(f"This origin may not {what}")

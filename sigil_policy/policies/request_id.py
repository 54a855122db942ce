"""Gives every exchange an id, and says it on every response.

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(), Problems()])

    curl -i localhost:8000/ -H 'X-Request-ID: checkout-42'      # X-Request-ID: checkout-42

What it guarantees:

* The caller's `X-Request-ID` is taken if it is one value of 1 to 128 characters of `A-Z a-z 0-9 . _ : -`; else a random
  UUID is made. Nothing else is ever echoed: no CR, LF or other control, nothing over 128 bytes, no list.
* Every response that passes this policy carries the id exactly once, refusals by inner policies and
  `websocket.accept` included; a value that the application set is replaced. With `Problems` inside, the answer to
  an unhandled error carries it too.
* In a second RequestID further in, the first one's id holds.

The id is known to everybody as `ex[Correlation].request_id`, and so are `X-Session-ID`, `X-Client-ID`,
`X-Client-Version` (same characters, else None) and the trace id of a valid `traceparent`. None of them proves anything:
the caller chooses them. Place it outermost: what stands outside of it has no id.

W3C Trace Context for `traceparent`; RFC 9110 section 5.5 for what a field value may hold.
"""

import re
from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Correlation, Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Policy
from sigil_policy.wire.ids import new_id, parse_id
from sigil_policy.wire.trace import parse_traceparent

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_new = tuple.__new__


class RequestID(Policy):
    """Takes the caller's request id or makes one, and puts it on every response.

    RequestID(header="X-Correlation-ID")

    Options:
        header: name of the header that carries the id, both ways (default "X-Request-ID").
        session_header: request header with the caller's session (default "X-Session-ID").
        client_header: request header that names the calling client (default "X-Client-ID").
        client_version_header: request header with that client's version (default "X-Client-Version").

    Raises `ValidationError` (a `ValueError`) for a name that is no header name, and for one that is given twice.
    """

    gives: ClassVar[tuple[type, ...]] = (Correlation,)
    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    header: str = "X-Request-ID"
    session_header: str = "X-Session-ID"
    client_header: str = "X-Client-ID"
    client_version_header: str = "X-Client-Version"

    @field_validator("header", "session_header", "client_header", "client_version_header")
    @classmethod
    def _is_header_name(cls, name: str) -> str:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is no header name; write one like 'X-Request-ID' (RFC 9110 section 5.1)")
        return name

    @model_validator(mode="after")
    def _says_each_once(self) -> Self:
        names = (*self._names, b"traceparent")
        if len(set(names)) < len(names):
            raise ValueError("header, session_header, client_header and client_version_header must all be different")
        return self

    @cached_property
    def _names(self) -> tuple[bytes, bytes, bytes, bytes]:
        """As the exchange spells them."""
        return (
            self.header.lower().encode(),
            self.session_header.lower().encode(),
            self.client_header.lower().encode(),
            self.client_version_header.lower().encode(),
        )

    @cached_property
    def _asked(self) -> tuple[bytes, frozenset[bytes]]:
        """The header of the id, and those that most requests do not carry."""
        return self._names[0], frozenset((*self._names[1:], b"traceparent"))

    def describe(self, operation: Operation, rule: Any) -> None:
        operation.sends(self.header, "The id of this exchange: the client's own, or a new one", required=True)

    def on_request(self, ex: Exchange) -> None:
        if Correlation in ex:
            return
        headers = ex.headers
        name, rare = self._asked
        raw = headers.get(name)
        # Two lines were joined by a comma, which no id may hold.
        request_id = None if raw is None else parse_id(raw)
        if raw is None or request_id is None:
            request_id = new_id()
            raw = request_id.encode()
        if rare.isdisjoint(headers):
            # What `Correlation(request_id)` is; the constructor of a named tuple costs twice as much.
            ex[Correlation] = _new(Correlation, (request_id, None, None, None, None))
        else:
            ex[Correlation] = self._all(ex, request_id)
        ex.keep(self, (name, raw))

    def _all(self, ex: Exchange, request_id: str) -> Correlation:
        headers = ex.headers
        session, client, version = (parse_id(headers[name]) if name in headers else None for name in self._names[1:])
        trace = None
        if b"traceparent" in headers and b"traceparent" not in ex.repeated:
            trace = parse_traceparent(headers[b"traceparent"])
        return Correlation(request_id, session, client, version, None if trace is None else trace.trace_id)

    def on_response(self, ex: Exchange, head: Head) -> None:
        pair = ex.note(self)
        if pair is None:
            return
        headers, name = head.headers, pair[0]
        for said, _ in headers:
            if said == name:
                head.remove(name)
                break
        headers.append(pair)

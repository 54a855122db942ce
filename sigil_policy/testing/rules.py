"""Whether both sides of an exchange keep to ASGI: a middleware that fails on what the specification forbids.

    app = validated(PolicyStack(validated(app), policies=[MyPolicy()]))     # what goes in and out of the stack
    sent = await drive(app)                                                 # raises ProtocolViolation

    assert not broken_rules(sent.messages)                                  # the same rules, of messages alone

It stands between whoever calls it (a server, a driver, an outer middleware) and its application, and judges both: the
scope and what `receive` gives, and everything that is sent, for HTTP, WebSocket and lifespan (ASGI 3.0, messages of
2.0 to 2.5, and the extensions). The violation is raised where it happens, and again at the end of the exchange if
somebody has swallowed it; its text says which message, what is wrong, and which rule that is.

What is judged: the types of messages and of their values, their order, header names (bytes, lower-case, no pseudo
headers) and values, what extensions need, what follows the end of a response, a body that is longer or shorter than its
`content-length`, content in a 204 or 304, an interim status, extensions that nobody has offered, subprotocols that
nobody has offered, close codes and reasons that no frame can hold, what an old `spec_version` does not have, and an
application that returns without an answer.

What is not, because the specification allows it: keys that are not known, headers of requests in mixed case, keys of
the scope that are absent or None, a scope that is written to, messages to a client that has left, a WebSocket that is
accepted before `websocket.connect` was received. A scope of another type passes untouched.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sigil_policy.testing.asgi import App, Message

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNSENDABLE = frozenset((1004, 1005, 1006, 1015))
_HTTP = "ASGI HTTP"
_WEBSOCKET = "ASGI WebSocket"
_LIFESPAN = "ASGI Lifespan"


class ProtocolViolation(AssertionError):  # noqa: N818  what it is, rather than what became of it
    """A message, a scope or an ending that ASGI forbids.

    with pytest.raises(ProtocolViolation, match="http.response.start"):
        await drive(validated(app))
    """


def validated(app: App, *, lower_case: bool = True) -> "Validated":
    """`app`, with everything judged that passes between it and whoever calls it.

    Options:
        lower_case: response header names are lower-case, as ASGI says (default True). Django's are not, and servers
            forgive it.

    Raises `ProtocolViolation` (an `AssertionError`) out of `send`, `receive` or the call itself.
    """
    return Validated(app, lower_case=lower_case)


class Validated:
    """The middleware that `validated` makes; `app` is what it wraps."""

    def __init__(self, app: App, *, lower_case: bool = True) -> None:
        self.app = app
        self.lower_case = lower_case

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = _KINDS.get(scope["type"])
        if kind is None:
            await self.app(scope, receive, send)
            return
        talk = kind(scope, lower_case=self.lower_case)
        violation: ProtocolViolation | None = None

        def judge(wrong: list[str]) -> None:
            nonlocal violation
            if wrong:
                raised = ProtocolViolation("; ".join(wrong))
                violation = violation or raised
                raise raised

        async def judged_receive() -> Message:
            message: Message = await receive()
            judge(talk.received(message))
            return message

        async def judged_send(message: Message) -> None:
            message = _readable(message)
            judge(talk.sent(message))
            try:
                await send(message)
            except Exception:
                talk.lost = True
                raise

        judge(_scope(scope))
        try:
            await self.app(scope, judged_receive, judged_send)
            judge(talk.ended())
        except Exception:
            if violation is not None:
                raise violation from None
            raise
        if violation is not None:
            raise violation

    def __repr__(self) -> str:
        return f"validated({self.app!r})"


def broken_rules(
    messages: Iterable[Mapping[str, Any]], *, scope: Mapping[str, Any] | None = None, lower_case: bool = True
) -> list[str]:
    """What is wrong with `messages` that an application has sent, in words; empty when nothing is.

    A response may be cut short, as every exception does; what was sent until then has to be in order.

    Options:
        scope: of the exchange (default None: what was offered and asked for is not known, and not judged).
        lower_case: as of `validated`.
    """
    sent = [_readable(message) for message in messages]
    if not sent:
        return []
    first = sent[0].get("type") if isinstance(sent[0], Mapping) else sent[0]
    kind = scope["type"] if scope is not None else str(first).partition(".")[0]
    rules = _KINDS.get(kind)
    if rules is None:
        return [f"message 0: no message of HTTP, WebSocket or lifespan is {first!r}"]
    talk = rules(scope, lower_case=lower_case)
    return [f"message {place}: {wrong}" for place, message in enumerate(sent) for wrong in talk.sent(message)]


def _readable(message: Any) -> Any:
    """`message`, with headers that can be read more than once: ASGI lets them be any iterable."""
    pairs = message.get("headers") if isinstance(message, Mapping) else None
    if pairs is None or isinstance(pairs, list | tuple | Mapping | str | bytes) or not isinstance(pairs, Iterable):
        return message
    return {**message, "headers": list(pairs)}


class _Talk:
    """One exchange, as far as it has come."""

    room = ""
    outgoing: frozenset[str] = frozenset()
    extensions: frozenset[str] = frozenset()

    def __init__(self, scope: Mapping[str, Any] | None, *, lower_case: bool) -> None:
        self.scope = scope
        self.lower_case = lower_case
        self.offered = None if scope is None else frozenset(scope.get("extensions") or ())
        self.lost = False
        """The other side has gone: nobody waits for the rest."""

    def received(self, message: Any) -> list[str]:
        raise NotImplementedError

    def sent(self, message: Any) -> list[str]:
        raise NotImplementedError

    def ended(self) -> list[str]:
        return []

    def wrong(self, message: Any, text: str, section: str) -> str:
        kind = message.get("type") if isinstance(message, Mapping) else message
        return f"{kind}: {text} ({self.room}, {section})"

    def shape(self, message: Any, known: Iterable[str], side: str) -> str | None:
        """Why `message` is no message at all for this side."""
        if not isinstance(message, Mapping) or not isinstance(message.get("type"), str):
            return f"{message!r} is no message: a dict with the key 'type' ({self.room}, Events)"
        kind = message["type"]
        if kind in known or (side == "application" and (self.offered is None or self.is_offered(kind))):
            return None
        if kind in self.extensions:
            return self.wrong(message, "the server has not offered this extension in scope['extensions']", "Extensions")
        return self.wrong(message, f"no message that the {side} may send", "Events")

    def is_offered(self, kind: str) -> bool:
        """Whether this message belongs to an extension that the other side has offered, as far as that is known."""
        return kind in self.extensions if self.offered is None else kind in self.offered

    def headers(self, message: Mapping[str, Any], section: str) -> list[str]:
        wrong = []
        pairs = message.get("headers", ())
        if isinstance(pairs, Mapping | str | bytes) or not isinstance(pairs, Iterable):
            return [self.wrong(message, f"headers are pairs of bytes, not a {type(pairs).__name__}", section)]
        for pair in pairs:
            try:
                name, value = pair
            except (TypeError, ValueError):
                wrong.append(self.wrong(message, f"header {pair!r} is no pair", section))
                continue
            if not (isinstance(name, bytes) and isinstance(value, bytes)):
                wrong.append(self.wrong(message, f"header {pair!r} is not a pair of bytes", section))
            elif name.startswith(b":"):
                wrong.append(self.wrong(message, f"header {name!r} is a pseudo header", section))
            elif not _NAME.fullmatch(name):
                wrong.append(f"{message['type']}: header name {name!r} is no token (RFC 9110, section 5.1)")
            elif self.lower_case and name != name.lower():
                wrong.append(self.wrong(message, f"header name {name!r} is not lower-case", section))
            elif any(byte in value for byte in b"\r\n\0"):
                wrong.append(f"{message['type']}: header {name!r} has CR, LF or NUL in it (RFC 9110, section 5.5)")
        return wrong

    def types(self, message: Mapping[str, Any], section: str, /, **expected: Any) -> list[str]:
        """What is there and has another type than it may have; keys that are absent have a default."""
        wrong = []
        for key, kinds in expected.items():
            value = message.get(key)
            if (key in message and not isinstance(value, kinds)) or (isinstance(value, bool) and kinds is int):
                names = "|".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
                wrong.append(self.wrong(message, f"{key} is a {names}, not {value!r:.80}", section))
        return wrong

    def lacks(self, message: Mapping[str, Any], section: str, *keys: str) -> list[str]:
        return [self.wrong(message, f"{key} is missing", section) for key in keys if key not in message]


_BYTES = (bytes, bytearray, memoryview)
_OPTIONAL_TEXT = (str, type(None))


class _Response(_Talk):
    """The messages of a response, also of one that denies a WebSocket."""

    prefix = "http.response"
    method: str | None = None

    def __init__(self, scope: Mapping[str, Any] | None, *, lower_case: bool) -> None:
        super().__init__(scope, lower_case=lower_case)
        self.state = "waiting"  # started, trailing, complete
        self.status = 200
        self.trailers = False
        self.promised: int | None = None
        self.counted = 0

    def start(self, message: Any) -> list[str]:
        wrong = self.headers(message, "Response Start")
        if self.state != "waiting":
            wrong.append(self.wrong(message, f"a second start, of a response that is {self.state}", "Response Start"))
        status = message.get("status")
        if isinstance(status, bool) or not isinstance(status, int):
            wrong.append(self.wrong(message, f"status is an int, not {status!r}", "Response Start"))
        elif not 100 <= status <= 599:
            wrong.append(f"{message['type']}: status {status} is none of 100 to 599 (RFC 9110, section 15)")
        elif status < 200:
            wrong.append(f"{message['type']}: status {status} is interim, and no response (RFC 9110, section 15.2)")
        else:
            self.status = status
        wrong += self.types(message, "Response Start", trailers=bool)
        self.trailers = bool(message.get("trailers")) and self.is_offered("http.response.trailers")
        self.state, self.promised, self.counted = "started", None, 0
        if not wrong and self.scope is not None and self.method != "HEAD" and self.status not in (204, 304):
            lengths = {value for name, value in message.get("headers") or () if name.lower() == b"content-length"}
            if len(lengths) == 1 and (length := lengths.pop()).isdigit() and len(length) < 20:
                self.promised = int(length)
        return wrong

    def body(self, message: Any) -> list[str]:
        wrong = self.types(message, "Response Body", body=_BYTES, more_body=bool)
        wrong += self.follows(message, "Response Body")
        if wrong:
            return wrong
        size = len(message.get("body", b""))
        self.counted += size
        last = not message.get("more_body", False)
        if size and self.status in (204, 304) and self.scope is not None and self.method != "HEAD":
            wrong.append(f"{message['type']}: content in a {self.status} (RFC 9110, section 6.4.1)")
        if self.promised is not None and (self.counted > self.promised or (last and self.counted < self.promised)):
            wrong.append(
                f"{message['type']}: {self.counted} bytes of content, and content-length is {self.promised} "
                "(RFC 9110, section 8.6)"
            )
        if last:
            self.state = "trailing" if self.trailers else "complete"
        return wrong

    def follows(self, message: Any, section: str) -> list[str]:
        """What follows a start, and comes before the end."""
        if self.state == "started":
            return []
        text = {
            "waiting": "before the response was started",
            "trailing": "after the last body; only trailers follow it",
            "complete": "after the response was complete",
        }[self.state]
        return [self.wrong(message, text, section)]

    def ended(self) -> list[str]:
        if self.lost or self.state == "complete":
            return []
        text = {
            "waiting": "without a response",
            "started": "before the response was complete: a last body message has no more_body",
            "trailing": "before the trailers that it has promised",
        }[self.state]
        return [f"the application returned {text} ({self.room}, Response Body)"]


class _Http(_Response):
    room = _HTTP
    outgoing = frozenset(("http.response.start", "http.response.body"))
    extensions = frozenset(
        f"http.response.{name}" for name in ("trailers", "push", "early_hint", "pathsend", "zerocopysend", "debug")
    )

    def __init__(self, scope: Mapping[str, Any] | None, *, lower_case: bool) -> None:
        super().__init__(scope, lower_case=lower_case)
        self.method = None if scope is None else scope.get("method")
        self.whole = False
        self.left = False
        self.copied = False

    def received(self, message: Any) -> list[str]:
        broken = self.shape(message, ("http.request", "http.disconnect"), "server")
        if broken:
            return [broken]
        if message["type"] == "http.disconnect":
            self.left = self.lost = True
            return []
        wrong = self.types(message, "Request", body=_BYTES, more_body=bool)
        if self.left:
            wrong.append(self.wrong(message, "after http.disconnect", "Disconnect"))
        elif self.whole:
            wrong.append(self.wrong(message, "after the last part of the body", "Request"))
        self.whole = not message.get("more_body", False)
        return wrong

    def sent(self, message: Any) -> list[str]:
        broken = self.shape(message, self.outgoing, "application")
        if broken:
            return [broken]
        kind = message["type"]
        if kind == "http.response.start":
            return self.start(message)
        if kind == "http.response.body":
            return self.body(message)
        if kind == "http.response.trailers":
            wrong = self.headers(message, "Trailers") + self.types(message, "Trailers", more_trailers=bool)
            if self.state != "trailing":
                text = f"trailers of a response that is {self.state}; its start says trailers=True, its body is sent"
                wrong.append(self.wrong(message, text, "Trailers"))
            if not message.get("more_trailers", False):
                self.state = "complete"
            return wrong
        if kind == "http.response.pathsend":
            wrong = self.follows(message, "Path Send") + self.types(message, "Path Send", path=str)
            wrong += self.lacks(message, "Path Send", "path")
            if isinstance(message.get("path"), str) and not Path(message["path"]).is_absolute():
                wrong.append(self.wrong(message, "path is not absolute", "Path Send"))
            if self.counted or self.copied:
                wrong.append(self.wrong(message, "after a part of the body", "Path Send"))
            self.state = "trailing" if self.trailers else "complete"
            return wrong
        if kind == "http.response.zerocopysend":
            wrong = self.follows(message, "Zero Copy Send") + self.lacks(message, "Zero Copy Send", "file")
            wrong += self.types(message, "Zero Copy Send", more_body=bool, offset=int, count=int)
            self.promised, self.copied = None, True
            if not wrong and not message.get("more_body", False):
                self.state = "trailing" if self.trailers else "complete"
            return wrong
        if kind == "http.response.early_hint":
            wrong = self.lacks(message, "Early Hint", "links")
            links = message.get("links", ())
            if isinstance(links, str | bytes | Mapping) or not isinstance(links, Iterable):
                wrong.append(self.wrong(message, f"links are byte strings, not a {type(links).__name__}", "Early Hint"))
            elif isinstance(links, list | tuple) and not all(isinstance(link, bytes) for link in links):
                wrong.append(self.wrong(message, "links are byte strings", "Early Hint"))
            if self.state != "waiting":
                wrong.append(self.wrong(message, "after the response was started", "Early Hint"))
            return wrong
        if kind == "http.response.push":
            wrong = self.headers(message, "Server Push") + self.types(message, "Server Push", path=str)
            wrong += self.lacks(message, "Server Push", "path")
            if self.state == "complete":
                wrong.append(self.wrong(message, "after the response was complete", "Server Push"))
            return wrong
        if kind == "http.response.debug":
            return self.types(message, "Debug", info=Mapping) + self.lacks(message, "Debug", "info")
        return []


class _WebSocket(_Response):
    room = _WEBSOCKET
    prefix = "websocket.http.response"
    outgoing = frozenset(("websocket.accept", "websocket.send", "websocket.close"))
    extensions = frozenset(("websocket.http.response.start", "websocket.http.response.body"))

    def __init__(self, scope: Mapping[str, Any] | None, *, lower_case: bool) -> None:
        super().__init__(scope, lower_case=lower_case)
        self.socket = "connecting"  # accepted, denied, closed
        self.opened = False
        self.heard: str | None = None
        spoken = ((scope or {}).get("asgi") or {}).get("spec_version")
        # Where nobody says it, ASGI means 2.0; drivers leave it out and mean the newest.
        parts = str(spoken).split(".") if spoken else []
        self.version = tuple(int(part) for part in parts if part.isdigit()) or (9,)

    def is_offered(self, kind: str) -> bool:
        if self.offered is not None and kind in self.extensions:
            return "websocket.http.response" in self.offered
        return super().is_offered(kind)

    def received(self, message: Any) -> list[str]:
        known = ("websocket.connect", "websocket.receive", "websocket.disconnect")
        broken = self.shape(message, known, "server")
        if broken:
            return [broken]
        kind, before = message["type"], self.heard
        self.heard = kind
        if kind == "websocket.disconnect":
            self.lost = True
            return self.types(message, "Disconnect", code=(int, type(None)), reason=_OPTIONAL_TEXT)
        if before == "websocket.disconnect":
            return [self.wrong(message, "after websocket.disconnect", "Disconnect")]
        if kind == "websocket.connect":
            return [self.wrong(message, "a second one", "Connect")] if before is not None else []
        wrong = self.payload(message, "Receive")
        if before is None:
            wrong.append(self.wrong(message, "before websocket.connect", "Connect"))
        if not self.opened:
            wrong.append(self.wrong(message, "before the application has accepted", "Connect"))
        return wrong

    def payload(self, message: Any, section: str) -> list[str]:
        wrong = self.types(message, section, bytes=(*_BYTES, type(None)), text=_OPTIONAL_TEXT)
        if (message.get("bytes") is None) == (message.get("text") is None):
            wrong.append(self.wrong(message, "exactly one of bytes and text has to be there", section))
        return wrong

    def sent(self, message: Any) -> list[str]:
        broken = self.shape(message, self.outgoing, "application")
        if broken:
            return [broken]
        kind = message["type"]
        if kind not in self.outgoing and kind not in self.extensions:
            return []
        if self.socket == "denied" and not (kind == f"{self.prefix}.body" and self.state == "started"):
            return [self.wrong(message, "after the handshake was denied with a response", "Denial Response")]
        if self.socket == "closed":
            return [self.wrong(message, "after websocket.close", "Close")]
        if kind == "websocket.accept":
            return self.accept(message)
        if kind == "websocket.send":
            wrong = self.payload(message, "Send")
            if self.socket != "accepted":
                wrong.append(self.wrong(message, "before websocket.accept", "Send"))
            return wrong
        if kind == "websocket.close":
            self.socket = "closed"
            return self.close(message)
        if self.socket == "accepted":
            return [self.wrong(message, "after websocket.accept", "Denial Response")]
        self.socket = "denied"
        return self.start(message) if kind == f"{self.prefix}.start" else self.body(message)

    def accept(self, message: Any) -> list[str]:
        wrong = self.headers(message, "Accept") + self.types(message, "Accept", subprotocol=_OPTIONAL_TEXT)
        if self.socket != "connecting":
            wrong.append(self.wrong(message, "a second one", "Accept"))
        self.socket, self.opened = "accepted", True
        if wrong:
            return wrong
        names = {name.lower() for name, _ in message.get("headers") or ()}
        if names and self.version < (2, 1):
            wrong.append(self.wrong(message, "headers came with spec_version 2.1; this server's is older", "Accept"))
        if b"sec-websocket-protocol" in names:
            wrong.append(self.wrong(message, "the subprotocol is named by 'subprotocol', not by a header", "Accept"))
        chosen = message.get("subprotocol")
        if chosen is not None and self.scope is not None and chosen not in (self.scope.get("subprotocols") or ()):
            wrong.append(f"websocket.accept: the client has not offered {chosen!r} (RFC 6455, section 4.2.2)")
        return wrong

    def close(self, message: Any) -> list[str]:
        wrong = self.types(message, "Close", code=int, reason=_OPTIONAL_TEXT)
        if wrong:
            return wrong
        code, reason = message.get("code", 1000), message.get("reason") or ""
        if code in _UNSENDABLE or not (1000 <= code <= 1014 or 3000 <= code <= 4999):
            wrong.append(f"websocket.close: code {code} is in no close frame (RFC 6455, section 7.4)")
        if len(reason.encode()) > 123:
            wrong.append("websocket.close: the reason is over 123 bytes of UTF-8 (RFC 6455, section 5.5)")
        if reason and self.version < (2, 3):
            wrong.append(self.wrong(message, "reasons came with spec_version 2.3; this server's is older", "Close"))
        return wrong

    def ended(self) -> list[str]:
        if self.socket == "denied":
            return super().ended()
        if self.lost or self.socket != "connecting":
            return []
        return [f"the application returned without an answer to the handshake ({self.room}, Connect)"]


class _Lifespan(_Talk):
    room = _LIFESPAN
    outgoing = frozenset(
        f"lifespan.{phase}.{end}" for phase in ("startup", "shutdown") for end in ("complete", "failed")
    )

    def __init__(self, scope: Mapping[str, Any] | None, *, lower_case: bool) -> None:
        super().__init__(scope, lower_case=lower_case)
        self.heard: list[str] = []
        self.said: list[str] = []

    def received(self, message: Any) -> list[str]:
        broken = self.shape(message, ("lifespan.startup", "lifespan.shutdown"), "server")
        if broken:
            return [broken]
        kind = message["type"]
        wrong = [self.wrong(message, "a second one", "Startup")] if kind in self.heard else []
        if kind == "lifespan.shutdown" and "lifespan.startup" not in self.heard:
            wrong.append(self.wrong(message, "before lifespan.startup", "Shutdown"))
        self.heard.append(kind)
        return wrong

    def sent(self, message: Any) -> list[str]:
        broken = self.shape(message, self.outgoing, "application")
        if broken:
            return [broken]
        kind = message["type"]
        phase = kind.rpartition(".")[0]
        section = phase.removeprefix("lifespan.").capitalize()
        wrong = self.types(message, section, message=str)
        if self.scope is not None and phase not in self.heard:
            wrong.append(self.wrong(message, f"before {phase} was received", section))
        if any(said.startswith(phase) for said in self.said):
            wrong.append(self.wrong(message, f"a second answer to {phase}", section))
        if "lifespan.startup.failed" in self.said and phase == "lifespan.shutdown":
            wrong.append(self.wrong(message, "after lifespan.startup.failed", section))
        self.said.append(kind)
        return wrong


_KINDS: Mapping[str, type[_Talk]] = {"http": _Http, "websocket": _WebSocket, "lifespan": _Lifespan}


def _is_pair(pair: Any) -> bool:
    if not isinstance(pair, Sequence):
        return isinstance(pair, Iterable)  # which may be read once, by the application
    return len(pair) == 2 and all(isinstance(part, bytes) for part in pair)


def _scope(scope: Mapping[str, Any]) -> list[str]:
    """What is wrong with a scope; what is absent or None is allowed to be."""
    kind = scope["type"]
    room = {"http": _HTTP, "websocket": _WEBSOCKET, "lifespan": _LIFESPAN}[kind]
    expected: dict[str, Any] = {"asgi": Mapping, "state": Mapping, "extensions": Mapping}
    required: tuple[str, ...] = ()
    if kind != "lifespan":
        expected |= {"path": str, "raw_path": bytes, "query_string": bytes, "root_path": str, "scheme": str}
        required = ("path",)
    if kind == "http":
        expected |= {"method": str, "http_version": str}
        required = ("path", "method")
    wrong = [f"scope: {key} is missing ({room}, Connection Scope)" for key in required if scope.get(key) is None]
    for key, kinds in expected.items():
        value = scope.get(key)
        if (
            value is not None
            and not isinstance(value, kinds)
            and not (key == "state" and hasattr(value, "__getitem__"))
        ):
            wrong.append(f"scope: {key} is a {kinds.__name__}, not {value!r:.80} ({room}, Connection Scope)")
    if kind == "http" and isinstance(scope.get("method"), str) and scope["method"] != scope["method"].upper():
        wrong.append(f"scope: method {scope['method']!r} is not upper-case ({room}, Connection Scope)")
    # Headers may be an iterable that can be read once: only what can be read again is looked at.
    headers = scope.get("headers")
    if isinstance(headers, list | tuple):
        wrong += [
            f"scope: header {pair!r} is not a pair of bytes ({room}, Connection Scope)"
            for pair in headers
            if not _is_pair(pair)
        ]
    elif isinstance(headers, Mapping | str | bytes):
        wrong.append(f"scope: headers are pairs of bytes, not a {type(headers).__name__} ({room}, Connection Scope)")
    return wrong

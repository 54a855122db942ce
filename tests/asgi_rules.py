"""Whether a sequence of messages is one that an ASGI server accepts (ASGI 3.0, HTTP and WebSocket, with extensions).

    sent = await drive(app)
    assert not broken_rules(sent.messages)

A response may be cut short, as every exception does; what was sent until then has to be in order.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Allowed before a response starts; the debug message at any time.
_HINTS = frozenset(("http.response.early_hint", "http.response.push"))
_ENDS = frozenset(("http.response.pathsend", "http.response.zerocopysend"))


def broken_rules(messages: Iterable[Mapping[str, Any]], *, lower_case: bool = True) -> list[str]:
    """What is wrong with `messages`, in words; empty when nothing is.

    `lower_case=False` forgives header names in mixed case, which servers do (AS-07 is about ours).
    """
    wrong: list[str] = []
    state = "waiting"
    trailers = False
    for place, message in enumerate(messages):
        kind = message["type"]
        where = f"message {place} ({kind})"
        for pair in message.get("headers") or ():
            name, value = pair
            if not (isinstance(name, bytes) and isinstance(value, bytes)):
                wrong.append(f"{where}: header {pair!r} is not a pair of bytes")
            elif lower_case and name != name.lower():
                wrong.append(f"{where}: header name {name!r} is not lower-case")
        if kind in _HINTS:
            if state != "waiting":
                wrong.append(f"{where}: after the response has started")
        elif kind in ("http.response.start", "websocket.http.response.start"):
            if state != "waiting":
                wrong.append(f"{where}: a second start")
            if not 100 <= message.get("status", 403) <= 599:
                wrong.append(f"{where}: status {message['status']}")
            state, trailers = "started", bool(message.get("trailers", False))
        elif kind in ("http.response.body", "websocket.http.response.body"):
            if state != "started":
                wrong.append(f"{where}: while the response is {state}")
            if not isinstance(message.get("body", b""), bytes):
                wrong.append(f"{where}: body is {type(message['body']).__name__}, not bytes")
            if not message.get("more_body", False):
                state = "waiting for trailers" if trailers else "over"
        elif kind in _ENDS:
            if state != "started":
                wrong.append(f"{where}: while the response is {state}")
            state = "waiting for trailers" if trailers else "over"
        elif kind == "http.response.trailers":
            if state != "waiting for trailers":
                wrong.append(f"{where}: while the response is {state}")
            state = "waiting for trailers" if message.get("more_trailers", False) else "over"
        elif kind == "websocket.accept":
            if state != "waiting":
                wrong.append(f"{where}: while the socket is {state}")
            state = "accepted"
        elif kind == "websocket.send":
            if state != "accepted":
                wrong.append(f"{where}: while the socket is {state}")
            if (message.get("bytes") is None) == (message.get("text") is None):
                wrong.append(f"{where}: exactly one of bytes and text has to be there")
        elif kind == "websocket.close":
            if state not in ("waiting", "accepted"):
                wrong.append(f"{where}: while the socket is {state}")
            state = "over"
    return wrong

"""A credential in `Sec-WebSocket-Protocol`: what a browser can send, which sets no header on a WebSocket.

    new WebSocket("wss://api.example.com/ws", ["sigil.bearer", token])

    GET /ws HTTP/1.1
    Sec-WebSocket-Protocol: sigil.bearer, eyJhbGciOi...

    find_pair(b"chat.v2, sigil.bearer, eyJhbGciOi", b"sigil.bearer")    # b"eyJhbGciOi"
    choose(None, b"sigil.bearer", b"eyJhbGciOi")                        # b"sigil.bearer"

The credential is the value behind the name. A subprotocol is an HTTP token, so what fits is what is written in these
characters: a compact JWT, an API key, a ticket; no `=`, no `/`, no comma.

The server selects one of the offered names, or the browser ends the connection: another subprotocol that the client
has offered beside the pair, or the pair's own name. The credential is never selected, since it would stand in the
answer. RFC 6455 sections 4.1, 4.2.2 and 11.3.4; RFC 9110 sections 5.6.1 and 5.6.2; WHATWG WebSockets.
"""

import re

FIELD = b"sec-websocket-protocol"
"""The field's name. Several lines of it are one list, joined with commas (RFC 6455 section 11.3.4)."""

MAX_FIELD = 10_240
"""Bytes of the field that are read: the longest token that is verified, and names beside it."""

MAX_OFFERED = 32
"""Subprotocols that one client offers, at most."""

_NOT_TOKEN = re.compile(rb"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")


def find_pair(field: bytes, name: bytes) -> bytes | None:
    """The credential behind `name` in a list of subprotocols; None where `name` is not offered.

    Names have a case. Empty elements say nothing (RFC 9110 section 5.6.1.2). `ValueError` for a malformed list with
    `name` in it: nothing behind the name, what is no token, one value twice, too long. It repeats nothing of the list.
    """
    if name not in field:
        return None
    if len(field) > MAX_FIELD:
        raise ValueError("the list of subprotocols is too long")
    if field.count(b",") >= 2 * MAX_OFFERED:
        raise ValueError("the list offers too many subprotocols")
    offered = [value for element in field.split(b",") if (value := element.strip(b" \t"))]
    if name not in offered:
        return None
    if len(offered) > MAX_OFFERED:
        raise ValueError("the list offers too many subprotocols")
    if any(map(_NOT_TOKEN.search, offered)):
        raise ValueError("a subprotocol is an HTTP token (RFC 6455 section 4.1)")
    if len(set(offered)) != len(offered):
        raise ValueError("a subprotocol is offered twice (RFC 6455 section 4.1)")
    place = offered.index(name) + 1
    if place == len(offered):
        raise ValueError("no credential follows the name")
    return offered[place]


def choose(chosen: bytes | None, name: bytes, credential: bytes) -> bytes:
    """What the answer to a handshake with a pair selects: what the application chose, unless that is nothing or the
    credential."""
    return name if chosen is None or chosen == credential else chosen

"""A credential that a browser sends as a pair of WebSocket subprotocols: taken from the handshake, never in the answer.

    pair = SubprotocolPair("sigil.bearer")      # new WebSocket(url, ["sigil.bearer", token])

    def on_request(self, ex: Exchange) -> Problem | None:
        token = pair.credential(ex)

    def on_response(self, ex: Exchange, head: Head) -> None:
        pair.select(ex, head)

`sigil_policy.wire.subprotocols` has the grammar. RFC 6455 sections 4.1, 4.2.2 and 11.3.4.
"""

from contextlib import suppress

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.wire.subprotocols import FIELD, choose, find_pair


class SubprotocolPair:
    """The pair whose first value is `name`."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name.encode("ascii")

    def credential(self, ex: Exchange) -> bytes | None:
        """What stands behind the name in this handshake; None without it, and for HTTP. `ValueError` for a list that
        cannot be read."""
        if ex.kind != "websocket":
            return None
        field = ex.headers.get(FIELD)
        if field is None:
            # Some servers (uvicorn with wsproto) take the field out of the headers and hand on what it lists alone.
            field = ",".join(ex.scope.get("subprotocols") or ()).encode("latin-1")
        return find_pair(field, self._name)

    def select(self, ex: Exchange, head: Head) -> None:
        """Select the pair's name where the handshake has a pair and the application has selected nothing else: a
        browser ends a connection whose answer selects nothing of what it has offered."""
        if head.status == 101:
            with suppress(ValueError):  # who offers what cannot be read was refused
                credential = self.credential(ex)
                if credential is not None:
                    head.replace(FIELD, choose(head.get(FIELD), self._name, credential))

"""Where a policy has found the credential that it accepted, for those further in.

Of two policies of one kind, the inner one verifies by its own rules what the outer one has accepted. That takes a
credential which it can see: one that came in a way in which it does not look was never judged by it, and is refused.
"""

from typing import NamedTuple


class TokenInHandshake(NamedTuple):
    """A token that was accepted came behind a subprotocol. Given by `BearerAuth`."""

    name: str


class KeyUsed(NamedTuple):
    """The API key that was accepted. Given by `ApiKeyAuth`.

    `id` is its public part, and `header` the one in which that policy looks. `place` is where it came instead:
    "authorization", or the name of a subprotocol.
    """

    id: str
    header: str
    place: str | None = None


class TicketUsed(NamedTuple):
    """The caller has come with a ticket for `audience`. Given by `WebSocketTicketAuth`. `key` is what bought it, if a
    key did."""

    key: KeyUsed | None
    audience: str | None = None

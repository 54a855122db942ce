"""What the auth policies tell a caller who has not said who they are.

An auth policy that lets an anonymous caller pass gives its `Challenges`; the policy further in that refuses the caller
answers with them, so that every way to authenticate is named: one `WWW-Authenticate` line for each, `Bearer` first
(RFC 9110 sections 11.3 and 11.6.1).
"""

from collections.abc import Iterable
from typing import NamedTuple

from sigil_policy.core.exchange import Exchange
from sigil_policy.wire.authorization import challenge
from sigil_policy.wire.challenges import with_parameter

HeaderLines = tuple[tuple[bytes, bytes], ...]


class Challenges(NamedTuple):
    """The ways to authenticate that this exchange was offered, as header lines. Given to anonymous callers only."""

    lines: HeaderLines


def challenge_line(scheme: str, realm: str, error: str | None = None) -> tuple[bytes, bytes]:
    """One `WWW-Authenticate` line, ready to be sent."""
    return (b"www-authenticate", challenge(scheme, realm=realm, error=error))


def token_scheme(ex: Exchange) -> str:
    """The scheme in which this exchange presents a token, which is the one that a challenge to it names (RFC 9449
    section 7.1): `DPoP`, or else `Bearer`."""
    return "DPoP" if ex.headers.get(b"authorization", b"")[:5].lower() == b"dpop " else "Bearer"


def asking_for(lines: HeaderLines, scopes: Iterable[str]) -> HeaderLines:
    """`lines` whose `Bearer` challenges say which scopes the request takes (RFC 6750 section 3)."""
    scope = " ".join(scopes)
    return tuple((name, with_parameter(line, "scope", scope, scheme="Bearer")) for name, line in lines)


def naming_metadata(lines: Iterable[tuple[bytes, bytes]], url: str) -> list[tuple[bytes, bytes]]:
    """Header lines in which every challenge, of any scheme, says where the resource's metadata is.

    A challenge that says so already is left as it is. RFC 9728 section 5.1.
    """
    return [
        (name, with_parameter(value, "resource_metadata", url) if name == b"www-authenticate" else value)
        for name, value in lines
    ]


def offer(ex: Exchange, lines: HeaderLines) -> Challenges:
    """Add `lines` to what outer auth policies have offered; returns all of them."""
    known = ex.get(Challenges)
    if known is not None:
        # Stable: within Bearer, and within the others, outer policies stay first.
        both = sorted(dict.fromkeys(known.lines + lines), key=lambda line: not line[1].startswith(b"Bearer "))
        lines = tuple(both)
    offered = Challenges(lines)
    ex.give(offered)
    return offered


def is_preflight(ex: Exchange) -> bool:
    """Whether this is a CORS preflight: `OPTIONS` with both headers that make one (Fetch standard, 3.2.2).

    A browser sends it without credentials, so nobody can ask for them.
    """
    return ex.method == "OPTIONS" and b"origin" in ex.headers and b"access-control-request-method" in ex.headers

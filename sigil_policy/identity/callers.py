"""Who counts as one caller: a principal, something it says of itself, or a client's address.

    RateLimit(key=by_address)
    RateLimit(levels=[Level("organisation", key=by_claim("org"), limits="10000/hour")])

A key is a name; None means that there is nobody to name: a caller is then counted by address, a level is left out.
"""

from collections.abc import Callable, Iterable
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network
from threading import Lock
from typing import Annotated, Any, Literal

from cachetools import LRUCache, cached
from pydantic import AfterValidator

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import Listed
from sigil_policy.wire.forwarded import address_key, client_address

Proxy = IPv4Network | IPv6Network | Literal["unix"]

Key = Callable[[Exchange], str | None]

LONG = 256


def by_principal(ex: Exchange) -> str | None:
    """Counts per authenticated caller; who is anonymous counts by address.

    RateLimit(key=by_principal)                                     # the default
    """
    principal = ex.principal
    return None if principal is None else principal.key


def by_address(ex: Exchange) -> str | None:
    """Counts per client address, whoever calls. The only key that may stand outside the authentication.

    RateLimit(name="address", key=by_address, tiers={"free": "600/minute"})
    """
    return None


def by_subject(ex: Exchange) -> str | None:
    """Counts per subject, whichever credential it shows: for a level over the keys and tokens of one user.

        Level("user", key=by_subject, limits="1000/hour")

    Subjects are compared as text: where several issuers may know the same one, write a key of your own.
    """
    principal = ex.principal
    return None if principal is None else principal.subject


def by_claim(name: str) -> Key:
    """Counts per value of a claim of the caller's token.

        Level("organisation", key=by_claim("org"), limits="10000/hour")

    A string or a number counts; without the claim there is nobody to count.
    """

    def key(ex: Exchange) -> str | None:
        value = None if ex.principal is None else ex.principal.claims.get(name)
        return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None

    return key


def _somebody_untrusted(proxies: tuple[Proxy, ...]) -> tuple[Proxy, ...]:
    for proxy in proxies:
        if proxy != "unix" and proxy.prefixlen == 0:
            raise ValueError(
                f"trusted_proxies has {proxy}, everybody: then each caller chooses its own address; "
                "name the networks that the proxies are in"
            )
    return proxies


TrustedProxies = Annotated[Listed[Proxy], AfterValidator(_somebody_untrusted)]
"""Networks of proxies, and "unix" for one on a unix socket, whose `X-Forwarded-For` is believed."""


class Addresses:
    """Names the client's address: by the peer that the server saw, or by what a trusted proxy says of it.

    What was understood is remembered; a flood of new addresses keeps those that come often.
    """

    __slots__ = ("_known", "_trusting", "_understand")

    def __init__(self, proxies: Iterable[Proxy], ipv6_prefix: int) -> None:
        networks = tuple(proxy for proxy in proxies if proxy != "unix")
        trust_socket = "unix" in proxies

        def understand(peer: str | None, forwarded: bytes | None) -> str:
            return address_key(client_address(peer, forwarded, networks, trust_socket=trust_socket), ipv6_prefix)

        self._understand = understand
        self._known = cached(LRUCache[Any, str](4_096), lock=Lock())(understand)
        self._trusting = trust_socket or bool(networks)

    def __call__(self, ex: Exchange) -> str:
        forwarded = ex.headers.get(b"x-forwarded-for") if self._trusting else None
        if forwarded is not None and len(forwarded) > 200:
            return self._understand(ex.client, forwarded)  # an absurdly long list is not kept
        return self._known(ex.client, forwarded)


def bounded(key: object) -> str:
    """`key` in few enough characters for a store; no name is the short form of another."""
    text = str(key)
    if len(text) <= LONG:
        return f"={text}"
    return f"sha256 {sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def own(key: object) -> str:
    """The key of a function of the application: not an address, nor a bucket that is shared, whatever it says."""
    return f"key{bounded(key)}"

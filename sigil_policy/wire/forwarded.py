"""Who is at the other end: the client's address behind proxies that are trusted, and nobody else's word for it.

    trusted = (ip_network("10.0.0.0/8"),)
    client_address("10.0.0.2", b"198.51.100.9, 203.0.113.7", trusted)    # IPv4Address('203.0.113.7')
    client_address("203.0.113.7", b"127.0.0.1", trusted)                 # IPv4Address('203.0.113.7')
    address_key(ip_address("2001:db8:1:2:3::4"))                         # 'ip6-20010db800010002'

Anybody can send `X-Forwarded-For`, and every proxy appends to what came. So the list is read from its right end, where
the proxy next to us wrote, and only for as long as the one who wrote is trusted: the first address that is not a
trusted proxy's is the client's. Reading from the left would take the caller's word, and each request could come from
another "address".

There is no RFC for `X-Forwarded-For`; its successor, `Forwarded` (RFC 7239), says the same in section 7.4. A host on
an IPv6 network usually owns a whole /64 (RFC 4291 section 2.5.1), so that is what counts as one caller.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_HOPS = 32
_LONGEST = 64


def parse_address(text: str) -> Address | None:
    """An address, also in brackets, with a port, or with a zone; an IPv4 address that came as IPv6 is IPv4."""
    if len(text) > _LONGEST:
        return None
    text = text.strip(" \t").strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_trusted(address: Address | None, trusted: Sequence[Network]) -> bool:
    return address is not None and any(address in network for network in trusted)


def client_address(
    peer: str | None, forwarded: bytes | None, trusted: Sequence[Network] = (), *, trust_socket: bool = False
) -> Address | None:
    """The client's address, or None where nobody can know it.

    `peer` is the address that the connection comes from (None: a unix socket, whose proxy is trusted only with
    `trust_socket`), `forwarded` the whole `X-Forwarded-For`, lines joined with commas. Of what a trusted proxy could
    not read, the proxy's own address is left.
    """
    address = None if peer is None else parse_address(peer)
    believed = trust_socket if peer is None else is_trusted(address, trusted)
    if not believed or not forwarded:
        return address
    # The rest of an absurdly long list is a caller's.
    for hop in reversed(forwarded.decode("latin-1").rsplit(",", _HOPS)[-_HOPS:]):
        candidate = parse_address(hop)
        if candidate is None:
            return address
        address = candidate
        if not is_trusted(address, trusted):
            return address
    return address


def address_key(address: Address | None, ipv6_prefix: int = 64) -> str:
    """A name for a counter: the address, of IPv6 the first `ipv6_prefix` bits. It holds no colon."""
    if address is None:
        return "ip-unknown"
    if address.version == 4:
        return f"ip4-{address}"
    return f"ip6-{int(address) >> (128 - ipv6_prefix):0{-(-ipv6_prefix // 4)}x}"

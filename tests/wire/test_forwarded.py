"""The client's address: nobody's word but a trusted proxy's."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.forwarded import address_key, client_address, parse_address

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("2001:db8:ffff::/48"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        pytest.param("203.0.113.7", None, "203.0.113.7", id="no proxy"),
        pytest.param("203.0.113.7", b"198.51.100.1", "203.0.113.7", id="an untrusted peer is not believed"),
        pytest.param("10.0.0.1", None, "10.0.0.1", id="a trusted peer that says nothing"),
        pytest.param("10.0.0.1", b"203.0.113.7", "203.0.113.7", id="one hop"),
        pytest.param("10.0.0.1", b"1.1.1.1, 203.0.113.7", "203.0.113.7", id="what the client wrote is left out"),
        pytest.param("10.0.0.1", b"1.1.1.1, 203.0.113.7, 10.9.9.9", "203.0.113.7", id="two proxies"),
        pytest.param("10.0.0.1", b"10.0.0.3, 10.0.0.2", "10.0.0.3", id="all of it is ours"),
        pytest.param("10.0.0.1", b"203.0.113.7, unknown", "10.0.0.1", id="what the proxy could not read"),
        pytest.param("10.0.0.1", b"203.0.113.7,", "10.0.0.1", id="an empty hop"),
        pytest.param("10.0.0.1", b"203.0.113.7:4711", "203.0.113.7", id="with a port"),
        pytest.param("10.0.0.1", b"[2001:db8::7]:4711", "2001:db8::7", id="IPv6 with a port"),
        pytest.param("10.0.0.1", b'"[2001:db8::7]"', "2001:db8::7", id="quoted"),
        pytest.param("10.0.0.1", b"fe80::1%eth0", "fe80::1", id="with a zone"),
        pytest.param("::ffff:10.0.0.1", b"::ffff:203.0.113.7", "203.0.113.7", id="IPv4 that came as IPv6"),
        pytest.param("2001:db8:ffff::1", b"203.0.113.7", "203.0.113.7", id="an IPv6 proxy"),
        pytest.param("testclient", b"203.0.113.7", None, id="a peer without an address"),
        pytest.param(None, b"203.0.113.7", None, id="a unix socket is not believed by itself"),
        pytest.param("10.0.0.1", b"\xff\xfe", "10.0.0.1", id="no text"),
        pytest.param("10.0.0.1", b"203.0.113.07", "10.0.0.1", id="leading zeros"),
    ],
)
def test_the_first_address_that_no_trusted_proxy_has_is_the_client(
    peer: str | None, forwarded: bytes | None, expected: str | None
) -> None:
    found = client_address(peer, forwarded, TRUSTED)
    assert found == (None if expected is None else ip_address(expected))


def test_a_unix_socket_is_believed_where_that_was_said() -> None:
    assert client_address(None, b"203.0.113.7", (), trust_socket=True) == ip_address("203.0.113.7")
    assert client_address(None, None, (), trust_socket=True) is None


@given(prefix=st.binary(max_size=2_000))
def test_no_prefix_of_the_list_changes_who_the_client_is(prefix: bytes) -> None:
    assert client_address("10.0.0.1", prefix + b",203.0.113.7", TRUSTED) == ip_address("203.0.113.7")


@given(peer=st.one_of(st.none(), st.text(max_size=40)), forwarded=st.one_of(st.none(), st.binary(max_size=400)))
def test_no_input_raises(peer: str | None, forwarded: bytes | None) -> None:
    address_key(client_address(peer, forwarded, TRUSTED, trust_socket=True))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("203.0.113.7", "203.0.113.8", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("203.0.113.7", "::ffff:203.0.113.7", True),
        ("::1", "::2", True),
    ],
)
def test_an_ipv6_network_is_one_caller(one: str, other: str, same: bool) -> None:
    assert (address_key(parse_address(one)) == address_key(parse_address(other))) is same


def test_the_prefix_can_be_another() -> None:
    keys = {address_key(ip_address(f"2001:db8:1:{number:x}::1"), 48) for number in range(50)}
    assert keys == {"ip6-20010db80001"}
    assert address_key(ip_address("2001:db8::1"), 57) != address_key(ip_address("2001:db8:0:80::1"), 57)


@given(address=st.ip_addresses())
def test_a_key_of_an_address_has_no_colon_so_it_is_no_principals(address: Any) -> None:
    assert ":" not in address_key(address)


def test_who_has_no_address_has_a_name_all_the_same() -> None:
    assert address_key(None) == "ip-unknown"

"""Origins of web pages, compared as browsers write them (RFC 6454, RFC 6455 section 10.2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.origins import Origins

LISTED = Origins(["https://app.example.com", "http://localhost:3000", "http://[::1]:8080"])


@pytest.mark.parametrize("origin", [b"https://app.example.com", b"http://localhost:3000", b"http://[::1]:8080"])
def test_what_is_listed_is_listed(origin):
    assert LISTED.lists(origin)


@pytest.mark.parametrize(
    "origin",
    [
        b"", b"null", b"*", b"https://app.example.com/", b"https://app.example.com:443", b"HTTPS://APP.EXAMPLE.COM",
        b"http://app.example.com", b"https://app.example.com.evil", b"https://evil.app.example.com",
        b"https://app.example.com, https://app.example.com", b" https://app.example.com", b"https://app.example.com\n",
        b"http://localhost:3001", b"http://localhost", b"\xff",
    ],
)  # fmt: skip
def test_nothing_else_is(origin):
    assert not LISTED.lists(origin)


@given(st.binary(max_size=60))
def test_bytes_are_compared_and_never_read(origin):
    assert LISTED.lists(origin) == (origin.decode("latin-1") in LISTED.listed)


@pytest.mark.parametrize(
    "origin", ["null", "*", "https://*.example.com", "https://app.example/", "https://A.example", "app.example", "", 5]
)
def test_what_no_browser_would_send_is_refused(origin):
    with pytest.raises(ValueError, match="as browsers do"):
        Origins([origin])

"""Link values, RFC 8288 section 3. Rows DP-10, DP-12."""

import re
import time
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.links import encode_path, link_value, query_without

SAFE = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*")


def test_a_link():
    assert link_value("/v8/agents", "successor-version") == b'</v8/agents>; rel="successor-version"'


def test_a_link_with_a_type():
    """DP-07"""
    link = link_value("https://docs.example/v6", "deprecation", media_type="text/html")
    assert link == b'<https://docs.example/v6>; rel="deprecation"; type="text/html"'


@pytest.mark.parametrize("target", ["/a,b;c=d", "?page=2", "#x", "https://[::1]:8080/a", "/a%20b"])
def test_targets(target):
    """DP-10: comma and semicolon survive, they are inside the angle brackets."""
    assert link_value(target, "next") == f'<{target}>; rel="next"'.encode()


@pytest.mark.parametrize("target", ["", "/a b", "/a>; rel=next", '/"', "/ä", "/a\r\nx: y", "/100%", "/%zz", "/a\n"])
def test_what_is_no_uri_reference_is_refused(target):
    with pytest.raises(ValueError, match="URI reference"):
        link_value(target, "next")


@pytest.mark.parametrize("rel", ["Next", "", "next prev", 'a"b', "my_rel", "a\n", "/relative"])
def test_a_relation_is_registered_or_an_absolute_uri(rel):
    """DP-12"""
    with pytest.raises(ValueError, match="relation"):
        link_value("/a", rel)


def test_an_extension_relation():
    """DP-12"""
    assert link_value("/a", "https://example.com/rel/x") == b'</a>; rel="https://example.com/rel/x"'


def test_a_media_type_is_one():
    with pytest.raises(ValueError, match="media type"):
        link_value("/a", "next", media_type='text/html"; x="')


@given(st.text(st.characters(codec=None)).map(lambda text: "/" + text))
def test_any_path_is_encoded_and_read_back(path):
    encoded = encode_path(path)
    assert SAFE.fullmatch(encoded)
    assert "?" not in encoded
    assert unquote(encoded, errors="surrogatepass") == path


def test_a_query_keeps_order_encoding_and_repetition():
    assert query_without(b"b=1&a=%20x+y&b=2&c", lambda key, value: False) == "b=1&a=%20x+y&b=2&c"


@pytest.mark.parametrize(
    "query",
    [
        b"token=x&page=2",
        b"page=2&token=x",
        b"page=2&token",
        b"page=2&%74oken=x",
        b"page=2&to%6Ben=x",
        b"page=2&a=1;token=x",
        b"&page=2&&token=&",
    ],
)
def test_dropped_parameters_are_found_however_they_are_written(query):
    assert query_without(query, lambda key, value: key == "token") == "page=2"


@given(st.binary(max_size=60) | st.text('a=&;%2token\r\n<>"', max_size=40).map(str.encode))
def test_nothing_in_a_query_ends_the_link(query):
    made = query_without(query, lambda key, value: key == "token")
    assert SAFE.fullmatch(made)
    assert not any(key == "token" for key, _ in parse_qsl(urlsplit(f"?{made}").query, keep_blank_values=True))


def test_hostile_queries_cost_little():
    begun = time.thread_time()
    for query in (b"%" * 10_000, b"&" * 10_000, b";" * 10_000, b"a%4" * 3_000, b"<" * 10_000):
        query_without(query, lambda key, value: False)
        encode_path("/" + query.decode())
    assert time.thread_time() - begun < 0.5

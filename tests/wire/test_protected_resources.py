"""Resource identifiers, where their metadata is, and origins as browsers write them."""

import pytest

from sigil_policy.wire.origins import is_origin
from sigil_policy.wire.protected_resources import check_url, metadata_url


@pytest.mark.parametrize(
    ("resource", "url"),
    [
        ("https://h.example", "https://h.example/.well-known/oauth-protected-resource"),
        ("https://h.example/", "https://h.example/.well-known/oauth-protected-resource"),
        ("https://h.example/v7", "https://h.example/.well-known/oauth-protected-resource/v7"),
        ("https://h.example/v7/", "https://h.example/.well-known/oauth-protected-resource/v7/"),
        ("https://h.example:8443/a/b", "https://h.example:8443/.well-known/oauth-protected-resource/a/b"),
    ],
)
def test_the_well_known_path_stands_between_host_and_path(resource, url):
    """RM-01"""
    check_url(resource)
    assert metadata_url(resource) == url


@pytest.mark.parametrize(
    "url",
    [
        "h.example/mcp", "http://h.example/mcp", "https://h.example/mcp#x", "https://h.example/mcp?x=1", "https://",
        "https://H.example", "https://u:p@h.example", "https://h.example:443", "https://h.example/a/../b",
        "https://h.example/%2e", "https://h.example/a b", "ftp://h.example", "https:///mcp", "http://", "",
        "http://localhost:8000", "http://127.0.0.1:8000/mcp",
    ],
)  # fmt: skip
def test_an_identifier_is_https_and_nothing_that_could_be_written_twice(url):
    """RM-03"""
    with pytest.raises(ValueError, match="http"):
        check_url(url)


@pytest.mark.parametrize("url", ["http://localhost:8000/mcp", "http://127.0.0.1", "http://[::1]:8000/mcp"])
def test_plain_http_to_this_machine_takes_a_word(url):
    with pytest.raises(ValueError, match="allow_loopback"):
        check_url(url)
    check_url(url, allow_loopback=True)
    with pytest.raises(ValueError, match="https"):
        check_url("http://localhost.example", allow_loopback=True)


def test_origins_are_written_as_browsers_do():
    for origin in ("https://app.example.com", "http://localhost:3000", "http://[::1]:8080", "vscode-webview://abc-1"):
        assert is_origin(origin)
    for text in (
        "null", "*", "https://app.example.com/", "https://App.example", "https://a.example:443", "http://a:80",
        "app.example", "https://", "https://a.example, https://b.example", "https://a.example\n",
    ):  # fmt: skip
        assert not is_origin(text)

"""RFC 9110 section 11 and RFC 6750: what an Authorization line says, what a challenge may say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.authorization import (
    QueryNames,
    bearer_token,
    challenge,
    is_scope_token,
    is_token,
    is_token68,
    split_scopes,
)


@pytest.mark.parametrize(
    ("value", "token"),
    [
        pytest.param(b"Bearer mF_9.B5f-4.1JqM", b"mF_9.B5f-4.1JqM", id="AU-01 RFC 6750 2.1 example"),
        pytest.param(b"bearer abc", b"abc", id="AU-01 lower case"),
        pytest.param(b"BEARER abc", b"abc", id="AU-01 upper case"),
        pytest.param(b"Bearer  abc", b"abc", id="AU-01 two spaces"),
        pytest.param(b"Bearer " + b" " * 50 + b"abc", b"abc", id="AU-01 many spaces"),
        pytest.param(b"Bearer a b", b"a b", id="the token itself is not judged here"),
        pytest.param(b"Basic dXNlcjpwdw==", None, id="AU-12 basic"),
        pytest.param(b"Negotiate", None, id="AU-12 a scheme alone"),
        pytest.param(b"Bearerx abc", None, id="AU-12 another scheme that begins alike"),
        pytest.param(b'Digest username="a", realm="b"', None, id="AU-12 digest"),
    ],
)
def test_the_scheme_is_told_from_the_token(value, token):
    assert bearer_token(value) == token


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"Bearer", id="AU-05 scheme alone"),
        pytest.param(b"Bearer ", id="AU-05 scheme and a space"),
        pytest.param(b"bearer    ", id="AU-05 scheme and spaces"),
        pytest.param(b" Bearer abc", id="AU-05 leading space"),
        pytest.param(b"Bearer\tabc", id="AU-05 a tab is no space"),
        pytest.param(b'"Bearer" abc', id="AU-05 a quoted scheme"),
        pytest.param(b"\xff\xfe abc", id="AU-05 bytes that no scheme has"),
        pytest.param(b"@" * 100_000, id="AU-05 no scheme, and long"),
    ],
)
def test_a_line_without_scheme_or_token_is_malformed(value):
    with pytest.raises(ValueError, match=r"scheme"):
        bearer_token(value)


@given(st.binary(max_size=200))
def test_any_line_is_a_token_another_scheme_or_malformed(value):
    try:
        token = bearer_token(value)
    except ValueError:
        return
    assert token is None or token in value


@pytest.mark.parametrize("text", [b"abc", b"a-._~+/9", b"abc=", b"abc=="])
def test_token68_takes_its_alphabet_and_padding(text):
    assert is_token68(text)


@pytest.mark.parametrize(
    "text", [b"", b"=", b"a=b", b"a b", b"a,b", b'a"b', b"a\nb", b"a\x00", b"\xc3\xa9", b"{}", b"a\t"]
)
def test_token68_takes_nothing_else(text):
    """AU-05, RFC 6750 section 2.1."""
    assert not is_token68(text)


def test_a_challenge_names_realm_error_and_scope_once_and_quoted():
    """AU-02, AU-07: RFC 6750 section 3."""
    line = challenge("Bearer", realm="example", error="insufficient_scope", scope=["a:read", "b:write"])
    assert line == b'Bearer realm="example", error="insufficient_scope", scope="a:read b:write"'
    described = challenge("Bearer", realm="x", error="invalid_token", error_description="The token expired")
    assert described == b'Bearer realm="x", error="invalid_token", error_description="The token expired"'


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"realm": 'a"b'}, id="quote in realm"),
        pytest.param({"realm": "a\\b"}, id="backslash in realm"),
        pytest.param({"realm": "a\r\nset-cookie: x=1"}, id="header injection"),
        pytest.param({"realm": ""}, id="empty realm"),
        pytest.param({"realm": "é"}, id="beyond ASCII"),
        pytest.param({"realm": "a", "error": 'x"'}, id="quote in error"),
        pytest.param({"realm": "a", "error_description": "x\x7f"}, id="control in description"),
        pytest.param({"realm": "a", "scope": ["a b"]}, id="space in scope"),
        pytest.param({"realm": "a", "scope": ['a"']}, id="quote in scope"),
        pytest.param({"realm": "a", "scope": [""]}, id="empty scope"),
    ],
)
def test_nothing_breaks_out_of_a_challenge(options):
    """AU-08."""
    with pytest.raises(ValueError, match=r"6750|6749"):
        challenge("Bearer", **options)


def test_a_scheme_is_a_token():
    with pytest.raises(ValueError, match=r"11\.1"):
        challenge("Api Key", realm="a")
    assert is_token("X-API-Key") and not is_token("X API") and not is_token("")


def test_only_the_space_separates_scopes():
    """AU-09: RFC 6749 section 3.3."""
    assert split_scopes("a  b c ") == ["a", "b", "c"]
    assert split_scopes("a\tb") == ["a\tb"]
    assert split_scopes("a\u00a0b") == ["a\u00a0b"]


@given(st.text(max_size=5))
def test_a_scope_token_is_what_the_grammar_says(text):
    allowed = {0x21, *range(0x23, 0x5C), *range(0x5D, 0x7F)}
    assert is_scope_token(text) == (bool(text) and all(ord(letter) in allowed for letter in text))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (b"access_token=x", True),
        (b"page=1&access_token=x", True),
        (b"access_token=", True),
        (b"access%5Ftoken=x", True),
        (b"access%5ftoken=x", True),
        (b"%61%63%63%65%73%73%5f%74%6f%6b%65%6e=x", True),
        (b"a=1&%61ccess_token=x", True),
        (b"access_token", False),
        (b"", False),
        (b"q=access_token", False),
        (b"q=1%26access_token=x", False),
        (b"my_access_token=x", False),
        (b"access_token2=x", False),
        (b"access_tokens=x", False),
        (b"Access_Token=x", False),
        (b"access%255Ftoken=x", False),
        (b"q=a;access_token=x", False),
    ],
)
def test_a_parameter_is_found_by_its_exact_name(query, found):
    """AU-11: RFC 6750 section 2.3."""
    assert QueryNames("access_token").found_in(query) is found


def test_names_can_be_found_in_any_case():
    names = QueryNames("api_key", "x-api-key", any_case=True)
    assert names.found_in(b"X-API-Key=1") and names.found_in(b"API%5FKEY=1") and names.found_in(b"%58-api-key=1")
    assert not names.found_in(b"my-api-key=1")


def test_a_name_is_found_however_it_is_encoded():
    for name, any_case in (("access_token", False), ("x-api-key", True), ("apikey", True)):
        names = QueryNames(name, any_case=any_case)
        encoded = "".join(f"%{ord(letter):02x}" for letter in name)
        for query in (encoded, encoded.upper(), f"{name[:3]}{encoded[9:]}", f"{encoded[:9]}{name[3:]}"):
            assert names.found_in(f"a=%20&{query}=x".encode())
            assert not names.found_in(f"a=%26{query}%3Dx".encode()), "a value"
            assert not names.found_in(f"a=%20&{query.replace('%', '%25')}=x".encode()), "encoded twice"
    assert not QueryNames("access_token").found_in(b"%41ccess_token=x"), "another name where case counts"


def test_a_long_query_is_searched_for_plain_names_to_its_end():
    names = QueryNames("api_key", any_case=True)
    assert names.found_in(b"&%" * 30_000 + b"&API_KEY=x")
    assert names.found_in(b"a=%20" + b"b" * 900 + b"&%41PI_KEY=x")

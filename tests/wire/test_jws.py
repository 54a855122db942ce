"""RFC 7515, RFC 8259, RFC 7493: one token, one reading."""

import json
from base64 import urlsafe_b64encode
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.jws import MAX_TOKEN, decode_base64url, parse_compact, parse_object


def test_the_example_of_rfc_7515_is_read():
    """RFC 7515 appendix A.1."""
    jws = parse_compact(
        b"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9"
        b".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
        b".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    )
    assert jws.header == {"typ": "JWT", "alg": "HS256"}
    assert parse_object(jws.payload) == {"iss": "joe", "exp": 1300819380, "http://example.com/is_root": True}
    assert len(jws.signature) == 32
    assert jws.signed.count(b".") == 1


@given(st.binary(max_size=70))
def test_what_was_encoded_is_decoded(data):
    assert decode_base64url(urlsafe_b64encode(data).rstrip(b"=")) == data


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"YQ==", id="JW-01 padding"),
        pytest.param(b"YQ=", id="JW-01 half a padding"),
        pytest.param(b"YR", id="JW-01 spare bits"),
        pytest.param(b"YWJ", id="JW-01 spare bits of two bytes"),
        pytest.param(b"Y", id="JW-01 one character"),
        pytest.param(b"YWJjY", id="JW-01 a character too many"),
        pytest.param(b"YW Jj", id="JW-01 space"),
        pytest.param(b"YWJj\n", id="JW-01 line feed"),
        pytest.param(b"YW\nJj", id="JW-01 line feed inside"),
        pytest.param(b"++//", id="JW-01 the other alphabet"),
        pytest.param(b"YW{}", id="JW-01 braces"),
        pytest.param(b"YWJj\x00", id="JW-01 NUL"),
        pytest.param(b"\xff\xff\xff\xff", id="JW-01 beyond ASCII"),
    ],
)
def test_base64url_has_one_spelling(text):
    with pytest.raises(ValueError, match="not base64url"):
        decode_base64url(text)


@given(st.binary(max_size=40))
def test_whatever_decodes_was_the_one_spelling(text):
    try:
        data = decode_base64url(text)
    except ValueError:
        return
    assert urlsafe_b64encode(data).rstrip(b"=") == text


@pytest.mark.parametrize(
    "data",
    [
        pytest.param('{"a":1}'.encode("utf-16"), id="JW-03 UTF-16"),
        pytest.param('{"a":1}'.encode("utf-16-le"), id="JW-03 UTF-16 without mark"),
        pytest.param('{"a":1}'.encode("utf-32"), id="JW-03 UTF-32"),
        pytest.param(b'\xef\xbb\xbf{"a":1}', id="JW-03 byte order mark"),
        pytest.param(b'{"a":"\xff"}', id="JW-03 not UTF-8"),
        pytest.param(b'{"a":"\xed\xa0\x80"}', id="JW-03 a surrogate in UTF-8"),
        pytest.param(b"[]", id="JW-03 array"),
        pytest.param(b'"a"', id="JW-03 string"),
        pytest.param(b"null", id="JW-03 null"),
        pytest.param(b"", id="JW-03 nothing"),
        pytest.param(b'{"a":1}{', id="JW-03 more after the object"),
        pytest.param(b'{"a":1,}', id="JW-03 trailing comma"),
        pytest.param(b"{'a':1}", id="JW-03 other quotes"),
        pytest.param(b'{"a":1,"a":2}', id="JW-04 duplicate member"),
        pytest.param(b'{"b":{"a":1,"\\u0061":2}}', id="JW-04 duplicate member, escaped, further in"),
        pytest.param(b'{"a":NaN}', id="JW-20 NaN"),
        pytest.param(b'{"a":-Infinity}', id="JW-20 Infinity"),
        pytest.param(b'{"a":1e999}', id="JW-20 beyond a double"),
        pytest.param(b'{"a":1E+0999}', id="JW-20 beyond a double, spelt otherwise"),
        pytest.param(b'{"a":-1.5e309}', id="JW-20 just beyond a double"),
        pytest.param(b'{"a":' + b"9" * 400 + b".0}", id="JW-20 beyond a double without exponent"),
        pytest.param(b'{"a":' + b"9" * 250 + b"e99}", id="JW-20 beyond a double, by digits and exponent"),
        pytest.param(b'{"a":[' + b"[]," * 600 + b"0]}", id="JW-29 hundreds of arrays side by side"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", id="JW-20 thousands of digits"),
        pytest.param(b'{"a":"\\ud800"}', id="RFC 7493 2.1 lone surrogate"),
        pytest.param(b'{"\\udfff":1}', id="RFC 7493 2.1 lone surrogate in a name"),
        pytest.param(b'{"a":' + b"[" * 17 + b"]" * 17 + b"}", id="JW-29 seventeen arrays"),
        pytest.param(b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}", id="JW-29 thousands of arrays"),
        pytest.param(b'{"a":' * 1200 + b"1" + b"}" * 1200, id="JW-29 thousands of objects"),
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(data):
    for trusted in (False, True):
        with pytest.raises(ValueError, match=r"strict JSON|JSON object|nested|too many|beyond a double"):
            parse_object(data, trusted=trusted)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b' {"a": 1.5e3} ', {"a": 1500.0}),
        (b'{"a":"\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('{"a":"é"}'.encode(), {"a": "é"}),
        (b'{"a":' + b"[" * 15 + b"]" * 15 + b"}", None),
        (json.dumps({"a": [{"b": [i]} for i in range(40)]}).encode(), None),
        (b'{"a":"' + b"[" * 40 + b'"}', {"a": "[" * 40}),
    ],
    ids=["spaces and exponent", "surrogate pair", "UTF-8", "sixteen deep", "broad, not deep", "brackets in a text"],
)
def test_ordinary_objects_are_read(data, value):
    assert parse_object(data, trusted=True) == (json.loads(data) if value is None else value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" + "{}," * 64 + "0]", id="objects"),
        pytest.param("[" + "[]," * 64 + "0]", id="arrays"),
        pytest.param('["' + '","'.join("abc" for _ in range(200)) + '"]', id="members"),
        pytest.param('"' + "\\n" * 300 + '"', id="escapes"),
        pytest.param("[" + ",".join(["1.5"] * 40) + "]" + " " * 500, id="doubles"),
        pytest.param("[" + ",".join(["15"] * 40) + "]" + " " * 500, id="integers"),
        pytest.param("9" * 600, id="an integer of many digits"),
        pytest.param("0." + "9" * 600, id="a double of many digits"),
    ],
)
def test_what_takes_long_to_read_is_read_only_where_it_is_trusted(text):
    """JW-29: whoever may send a token must not make others wait."""
    data = f'{{"a":{text}}}'.encode()
    assert parse_object(data, trusted=True) == json.loads(data)
    with pytest.raises(ValueError, match=r"strict JSON|too many"):
        parse_object(data)


def test_ordinary_claims_are_read_before_they_are_trusted():
    claims = {
        "iss": "https://auth.example.com/realms/agents",
        "exp": 1767225600.5,
        "aud": ["a", "b"],
        "groups": [f"0b1d2c6e-5f0a-4c57-9a3e-8f1f6a2d{number:04x}" for number in range(100)],
        "resource_access": {f"client-{number}": {"roles": ["reader", "writer"]} for number in range(25)},
        "name": "山田太郎",
    }
    for data in (json.dumps(claims).encode(), json.dumps(claims, ensure_ascii=False).encode()):
        assert parse_object(data) == claims


@pytest.mark.parametrize(
    "token",
    [b"", b".", b"..", b"e30.e30", b"e30.e30.e30.e30.e30", b"e30.e30.e30.", b"." * 8000, b"a" * 8193],
    ids=["nothing", "one dot", "two dots", "two parts", "JW-25 five parts", "four parts", "dots", "long"],
)
def test_a_compact_token_has_three_parts(token):
    with pytest.raises(ValueError):  # noqa: PT011  any of them
        parse_compact(token)


def test_a_token_may_have_8192_bytes_and_no_more():
    fits = b"e30.e30." + b"A" * (MAX_TOKEN - 8)
    assert parse_compact(fits).payload == b"{}"
    with pytest.raises(ValueError, match="too long"):
        parse_compact(fits + b"AAAA")


@given(st.binary(max_size=300))
def test_nothing_but_a_value_error_comes_out(token):
    with suppress(ValueError):
        parse_compact(token)
    for trusted in (False, True):
        with suppress(ValueError):
            parse_object(token, trusted=trusted)


@given(st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers(), st.lists, max_leaves=5)))
def test_what_is_read_is_what_python_reads(value):
    try:
        data = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    if abs(max((v for v in value.values() if isinstance(v, int)), default=0, key=abs)) < 2**64:
        assert parse_object(data, trusted=True) == value

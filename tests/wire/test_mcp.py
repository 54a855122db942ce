"""What an MCP request says in its headers and in its body."""

import json
from base64 import b64encode
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.mcp import (
    MOST_CONTAINERS,
    Message,
    NotOneMessageError,
    decode_value,
    has_mirrored_headers,
    read_message,
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"get_weather", "get_weather"),
        (b"=?base64?SGVsbG8sIOS4lueVjA==?=", "Hello, 世界"),
        (b"=?base64?IHBhZGRlZCA=?=", " padded "),
        (b"=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?=", "=?base64?literal?="),
        (b"=?BASE64?eA==?=", "=?BASE64?eA==?="),  # the markers have a case
    ],
)
def test_names_may_be_wrapped_in_base64(written, meant):
    assert decode_value(written) == meant


@pytest.mark.parametrize("written", [b"caf\xc3\xa9", b"a\x00b", b"=?base64?abc?=", b"=?base64?/w==?=", b"a\tb"])
def test_names_that_cannot_be_read_are_refused(written):
    with pytest.raises(ValueError):  # noqa: PT011  any of them
        decode_value(written)


@given(st.text())
def test_every_name_survives_the_wrapping(name):
    text = name.encode("utf-8", "replace")
    assert decode_value(b"=?base64?" + b64encode(text) + b"?=") == text.decode()


def test_the_versions_that_mirror():
    assert has_mirrored_headers(b"2026-07-28")
    assert has_mirrored_headers(b"2027-01-01")
    for version in (None, b"", b"2025-11-25", b"DRAFT-2026", b"9", b"2026-07-28, 2026-07-28"):
        assert not has_mirrored_headers(version)


def test_a_message_tells_what_it_names():
    for method, member in (("tools/call", "name"), ("prompts/get", "name"), ("resources/read", "uri")):
        body = json.dumps({"id": 7, "method": method, "params": {member: "x", "other": {"name": "y"}}}).encode()
        assert read_message(body) == Message(method, "x", 7)
    assert read_message(b'{"method":"tools/list","params":{"name":"x"}}') == Message("tools/list", None, None)
    assert read_message(b'{"id":1,"result":{}}') == Message(None, None, 1)
    assert read_message(b'{"id":null,"error":{}}') == Message(None, None, None)


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b'[{"method":"tools/call"}]', b'"x"', b"1", b"null", b'{"method":1}',
        b'{"method":"tools/list","Method":"tools/call"}', b'{"method":"tools/call","params":{"NAME":"x"}}',
        '{"method":"tools/list","param\u017f":{"name":"x"}}'.encode(),
        b'{"method":"x","id":null}', b'{"method":"x","id":true}', b'{"method":"x","id":1.5}', b'{"id":[]}',
        b'{"method":"x","id":9223372036854775808}', b'{"method":"x","id":"' + b"x" * 257 + b'"}',
    ],
)  # fmt: skip
def test_a_batch_is_not_one_message(body):
    with pytest.raises(NotOneMessageError):
        read_message(body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xef\xbb\xbf{}", b"\xff", '{"method":"x"}'.encode("utf-16"), b'{"a":NaN}', b"[" * 19_000,
        b'{"method":"tools/list","method":"tools/call"}', b'{"params":{"name":"a","name":"b"}}',
        b'{"params":{"n\\u0061me":"a","name":"b"}}', b"[" + b"{}," * MOST_CONTAINERS + b"{}]",
    ],
)  # fmt: skip
def test_what_parsers_could_read_in_two_ways_is_refused(body):
    with pytest.raises(ValueError, match=r"JSON|deeply|objects") as caught:
        read_message(body)
    assert not isinstance(caught.value, NotOneMessageError)


@given(st.binary(max_size=300))
def test_no_body_is_another_error(body):
    with suppress(ValueError):
        read_message(body)

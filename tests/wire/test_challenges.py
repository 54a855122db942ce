"""Adding a parameter to challenges, whoever wrote them."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.challenges import with_parameter

URL = "https://api.example.com/.well-known/oauth-protected-resource"
ADDED = f'resource_metadata="{URL}"'.encode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'Bearer realm="api"', b'Bearer realm="api", ' + ADDED),
        (b"Bearer", b"Bearer " + ADDED),
        (b"bearer realm=api , error=x", b"bearer realm=api, error=x, " + ADDED),
        (b'Bearer realm = "a, b=c \\" Basic d"', b'Bearer realm = "a, b=c \\" Basic d", ' + ADDED),
        (b'Bearer a="1", Basic b="2"', b'Bearer a="1", ' + ADDED + b', Basic b="2", ' + ADDED),
        (b'Bearer, ApiKey realm="k"', b"Bearer " + ADDED + b', ApiKey realm="k", ' + ADDED),
        (b"Negotiate YWJj==", b"Negotiate YWJj=="),
        (b'Negotiate YWJj==, Basic realm="x"', b'Negotiate YWJj==, Basic realm="x", ' + ADDED),
    ],
)
def test_every_challenge_that_takes_parameters_gets_it(before, after):
    assert with_parameter(before, "resource_metadata", URL) == after
    assert with_parameter(after, "resource_metadata", "https://elsewhere.example") == after  # once is enough


@pytest.mark.parametrize(
    "field", [b"", b",", b'Bearer realm="open', b'realm="api"', b"Negotiate abc, realm=x", b"\xff"]
)
def test_what_is_no_list_of_challenges_stays(field):
    assert with_parameter(field, "scope", "a") == field


def test_it_may_be_for_one_scheme_only():
    field = b'Bearer realm="a", ApiKey realm="b"'
    assert with_parameter(field, "scope", "x y", scheme="bearer") == b'Bearer realm="a", scope="x y", ApiKey realm="b"'


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\r\nb", "é", ""])
def test_nothing_breaks_out_of_its_quotes(value):
    with pytest.raises(ValueError, match="scope"):
        with_parameter(b"Bearer", "scope", value)


@given(st.binary(max_size=200))
def test_no_field_is_an_error(field):
    with_parameter(field, "scope", "a")


@pytest.mark.parametrize("piece", [b",", b'"', b'\\"', b"a=b,", b"Basic ", b"a ", b'x="\\', b'"\\'])
def test_long_fields_take_linear_time(piece):
    started = time.thread_time()
    with_parameter(piece * 20_000, "scope", "a")
    assert time.thread_time() - started < 1

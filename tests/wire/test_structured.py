"""What is written against an independent implementation of RFC 9651. Rows SF-01, SF-02, SF-03, SF-05."""

from datetime import UTC, datetime, timedelta

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.structured import sf_date, sf_integer, sf_key, sf_string

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E))


@given(PRINTABLE)
def test_strings_are_those_of_the_oracle(text):
    """SF-01"""
    assert sf_string(text).decode() == http_sf.ser(text)
    assert http_sf.parse(sf_string(text), tltype="item") == (text, {})


@given(st.text())
def test_what_is_not_printable_ascii_is_no_string(text):
    """SF-01: serialisation fails where it fails in the oracle."""
    try:
        expected = http_sf.ser(text)
    except ValueError:
        with pytest.raises(ValueError, match="printable ASCII"):
            sf_string(text)
    else:
        assert sf_string(text).decode() == expected


@given(st.text(st.sampled_from("ab*_-.09AZ é\n"), max_size=6))
def test_keys_are_those_of_the_oracle(name):
    """SF-02"""
    try:
        expected = http_sf.ser({name: 1}).split("=")[0]
    except ValueError:
        with pytest.raises(ValueError, match="key"):
            sf_key(name)
    else:
        assert sf_key(name).decode() == expected


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", "a b", "a\n", "ä", "_a"])
def test_a_key_starts_with_a_letter_or_a_star(name):
    """SF-02"""
    with pytest.raises(ValueError, match="key"):
        sf_key(name)


@given(st.integers(-(10**15) + 1, 10**15 - 1))
def test_integers_have_at_most_fifteen_digits(number):
    """SF-03"""
    assert sf_integer(number).decode() == http_sf.ser(number)


@pytest.mark.parametrize("number", [10**15, -(10**15), True, 1.0, "1", None])
def test_anything_else_is_no_integer(number):
    """SF-03"""
    with pytest.raises(ValueError, match="Integer"):
        sf_integer(number)


@given(st.integers(-62_000_000_000, 253_000_000_000))
def test_dates_are_those_of_the_oracle(seconds):
    """SF-05"""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    assert http_sf.parse(sf_date(seconds), tltype="item")[0] == moment


def test_the_date_of_rfc_9745():
    """DP-01: RFC 9745 section 2.1."""
    assert sf_date(1_688_169_599) == b"@1688169599"

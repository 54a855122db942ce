"""Cache-Control and Vary, RFC 9111 and RFC 9110 section 12.5.5. Rows CA-01 to CA-05, CA-09."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.caching import (
    field_name,
    format_cache_control,
    made_private,
    may_be_shared,
    merge_vary,
    parse_cache_control,
)


@pytest.mark.parametrize(
    ("given_", "written"),
    [
        ("private, max-age=60", b"private, max-age=60"),
        ("Private,Max-Age=60", b"private, max-age=60"),
        ("no-cache", b"no-cache"),
        ("no-store", b"no-store"),
        (" public ,  s-maxage=5 ", b"public, s-maxage=5"),
        ("private=x-foo", b'private="x-foo"'),
        ('no-cache="set-cookie, x-foo", max-age=1', b'no-cache="set-cookie, x-foo", max-age=1'),
        ("max-age=60, stale-while-revalidate=30, stale-if-error=300, immutable", None),
        ("no-transform, must-revalidate, proxy-revalidate, must-understand, no-store", None),
    ],
)
def test_values_are_written_in_the_preferred_form(given_, written):
    """CA-01, CA-03: numbers as tokens, field names quoted."""
    assert format_cache_control(parse_cache_control(given_)) == (written or given_.encode())


@pytest.mark.parametrize(
    "value",
    [
        "", " ", ",", "max-age", 'max-age="60"', "max-age=-1", "max-age=1.5", "max-age=60s", "max-age=", "max-age=1e3",
        "max-age=99999999999", "private max-age=60", "max_age=60", "privat", "public, private", "private, s-maxage=1",
        "no-store, no-store", "max-age=1, Max-Age=2", "no-store=1", 'public="x"', 'private="', 'private="a b"',
        "private, max-age=60\r\nx: y", "öffentlich", "max-stale=1", 'no-cache=""',
    ],
)  # fmt: skip
def test_what_caches_would_ignore_or_misread_is_refused(value):
    """CA-02: seconds are whole and not negative."""
    with pytest.raises(ValueError, match="Cache-Control"):
        parse_cache_control(value)


@pytest.mark.parametrize(
    ("value", "personal"),
    [
        ("public, max-age=60", b"private, max-age=60"),
        ("max-age=60, s-maxage=600", b"private, max-age=60"),
        ("max-age=60", b"private, max-age=60"),
        ("max-age=60, must-revalidate", b"private, max-age=60, must-revalidate"),
        ("max-age=60, proxy-revalidate", b"private, max-age=60"),
        ("private=x-foo, max-age=60", b"private, max-age=60"),
        ("no-cache, public", b"private, no-cache"),
        ('no-cache="set-cookie"', b'private, no-cache="set-cookie"'),
        ("private, max-age=60", b"private, max-age=60"),
        ("no-store", b"no-store"),
        ("no-cache", b"no-cache"),
    ],
)
def test_the_variant_for_one_caller_is_never_shared(value, personal):
    """CA-04, CA-05"""
    made = made_private(parse_cache_control(value))
    assert format_cache_control(made) == personal
    assert not may_be_shared(made)
    assert parse_cache_control(personal.decode()) == made


@pytest.mark.parametrize(
    ("lines", "names", "merged"),
    [
        ([], [b"Accept"], b"Accept"),
        ([b"Accept"], [b"Origin"], b"Accept, Origin"),
        ([b"accept, ORIGIN"], [b"Origin", b"X-API-Key"], b"accept, ORIGIN, X-API-Key"),
        ([b"a", b"b,A"], [b"c"], b"a, b, c"),
        ([b"Accept, *"], [b"Origin"], b"*"),
        ([b"Accept"], [b"*"], b"*"),
        ([b" , ,Accept,"], [b"Origin"], b"Accept, Origin"),
        ([b""], [b"Origin"], b"Origin"),
    ],
)
def test_vary_is_merged(lines, names, merged):
    """CA-09: de-duplicated without case, `*` absorbs."""
    assert merge_vary(lines, names) == merged


@given(st.lists(st.binary(max_size=20), max_size=4))
def test_merging_loses_no_member(lines):
    merged = {name.lower() for name in merge_vary(lines, [b"origin"]).split(b", ")}
    members = {part.strip(b" \t").lower() for line in lines for part in line.split(b",")} - {b""}
    assert b"*" in merged or members <= merged | {b""}


@pytest.mark.parametrize("name", ["", "a b", "a,b", "ä", "a:"])
def test_a_header_name_is_a_token(name):
    with pytest.raises(ValueError, match="header name"):
        field_name(name)

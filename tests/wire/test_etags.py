"""Entity tags, RFC 9110 sections 8.8.3 and 13.1. Rows CR-01, CR-04, CR-07, CR-08, CR-11, CR-12."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.etags import (
    coding_variant,
    is_etag,
    lists_weakly,
    parse_etags,
    same_strongly,
    same_weakly,
)

OPAQUE = st.lists(st.sampled_from([0x21, *range(0x23, 0x7F), 0x80, 0xFF]), max_size=8).map(
    lambda codes: b'"%b"' % bytes(codes)
)
TAG = st.tuples(st.sampled_from([b"", b"W/"]), OPAQUE).map(b"".join)
# Tags made of what separates tags: a comparison by substring would go wrong here.
COMMA_TAG = st.tuples(st.sampled_from([b"", b"W/"]), st.text(",/W", max_size=3).map(lambda t: f'"{t}"'.encode())).map(
    b"".join
)


@pytest.mark.parametrize("value", [b'"abc"', b'W/"abc"', b'""', b'"a,b"', b'"\xff"', b'"a\\b"', b'"!#"'])
def test_tags(value):
    """CR-01"""
    assert is_etag(value)


@pytest.mark.parametrize(
    "value",
    [b"abc", b'w/"abc"', b'"a b"', b'"a"b"', b'"abc', b'abc"', b"", b"W/abc", b'"a\x7f"', b'"a\n"', b'W/ "a"', b"*"],
)
def test_not_tags(value):
    """CR-01"""
    assert not is_etag(value)


@pytest.mark.parametrize(
    ("one", "other", "strongly", "weakly"),
    [
        (b'W/"1"', b'W/"1"', False, True),
        (b'W/"1"', b'W/"2"', False, False),
        (b'W/"1"', b'"1"', False, True),
        (b'"1"', b'"1"', True, True),
    ],
)
def test_the_table_of_section_8_8_3_2(one, other, strongly, weakly):
    """CR-07, CR-08"""
    assert same_strongly(one, other) is strongly
    assert same_strongly(other, one) is strongly
    assert same_weakly(one, other) is weakly
    assert lists_weakly(one, other) is weakly
    assert lists_weakly(other, one) is weakly


@pytest.mark.parametrize(
    ("field", "tags"),
    [
        (b'"a"', (b'"a"',)),
        (b'"a,b", ,"c"', (b'"a,b"', b'"c"')),
        (b' ,, "a" ,\tW/"b",', (b'"a"', b'W/"b"')),
        (b'"a","b"', (b'"a"', b'"b"')),
        (b'W/"a", "W/b"', (b'W/"a"', b'"W/b"')),
    ],
)
def test_lists_are_read_with_commas_in_quotes_and_empty_members(field, tags):
    """CR-11"""
    assert parse_etags(field) == tags
    assert all(lists_weakly(field, tag) for tag in tags)


@pytest.mark.parametrize(
    "field",
    [
        b'*, "a"',
        b'"a", *',
        b'"a", b',
        b'b, "a"',
        b'w/"a"',
        b'"a", w/"b"',
        b'"a" "b"',
        b'"a"; "b"',
        b'"a',
        b'"a", "b',
        b"a",
        b"",
        b",",
    ],
)
def test_what_is_no_list_matches_nothing(field):
    """CR-12: never a 304 by accident."""
    assert parse_etags(field) is None
    assert not lists_weakly(field, b'"a"')
    assert not lists_weakly(field, b'W/"a"')


def test_the_gap_between_two_tags_is_no_tag():
    assert not lists_weakly(b'"a","b"', b'","')
    assert lists_weakly(b'"a","b",","', b'","')


@pytest.mark.parametrize("tag", [b"", b"abc", b'"a b"', b"*"])
def test_an_invalid_tag_of_the_application_matches_nothing(tag):
    assert not lists_weakly(tag, tag)
    assert not lists_weakly(b'"a", ' + tag, tag)


@given(st.lists(TAG | COMMA_TAG, max_size=5), TAG | COMMA_TAG, st.sampled_from([b",", b", ", b" ,\t, "]))
def test_membership_is_weak_comparison_with_each_member(tags, wanted, comma):
    field = comma.join(tags)
    if tags:
        assert parse_etags(field) == tuple(tags)
    assert lists_weakly(field, wanted) == any(same_weakly(tag, wanted) for tag in tags)


@given(st.binary(max_size=30) | st.text('"W/, a*', max_size=20).map(str.encode), TAG)
def test_any_field_is_read_as_its_members_say(field, tag):
    members = parse_etags(field)
    assert lists_weakly(field, tag) == any(same_weakly(member, tag) for member in members or ())


@pytest.mark.parametrize(
    "field",
    [
        b'"' * 10_000,
        b"," * 10_000,
        b" " * 10_000,
        b'"",' * 3_400,
        b'"a' * 5_000,
        b'W/"' * 3_400,
        b'"a" ' * 2_500,
        b", \t" * 3_400,
    ],
)
def test_hostile_fields_cost_little(field):
    begun = time.thread_time()
    for _ in range(10):
        lists_weakly(field, b'""')
        lists_weakly(field[:8_190], b'"a"')
        lists_weakly(field[:8_190], b'","')
        parse_etags(field)
    assert time.thread_time() - begun < 0.5


def test_a_field_beyond_any_real_one_is_not_read():
    assert parse_etags(b'"a",' * 3_000) is None
    assert not lists_weakly(b'"a",' * 3_000, b'"a"')


@pytest.mark.parametrize("accepted", [b"", b"identity", b"identity, gzip;q=0", b" , ", b"gzip;q=0.000, br; q=0"])
def test_a_client_that_accepts_no_coding_gets_the_plain_tag(accepted):
    """CR-04"""
    assert coding_variant(accepted) == b""


@pytest.mark.parametrize("same", [b"br, gzip", b"gzip;q=0.5,br", b"GZIP, BR, identity", b"gzip, br, zstd;q=0"])
def test_the_order_of_codings_does_not_matter(same):
    """CR-04"""
    assert coding_variant(same) == coding_variant(b"gzip, br")


def test_clients_that_accept_different_codings_get_different_tags():
    """CR-04"""
    fields = [b"gzip", b"br", b"gzip, br", b"*", b"gzip, deflate, br, zstd", b"", b"no;such;thing", b"x" * 300]
    assert len({coding_variant(field) for field in fields}) == len(fields)


@given(st.binary(max_size=300))
def test_a_variant_fits_into_a_tag(accepted):
    assert is_etag(b'"abc%b"' % coding_variant(accepted))

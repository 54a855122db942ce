"""RateLimit-Policy and RateLimit as draft-ietf-httpapi-ratelimit-headers-11 writes them."""

import string

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.ratelimit import limit_template, member_names, policy_field

names = st.lists(st.text(string.printable[:95], min_size=1, max_size=12), min_size=1, max_size=5, unique=True)
numbers = st.integers(0, 999_999_999_999_999)


def test_rl_01_to_rl_05_a_policy_is_a_list_of_strings_with_quota_window_and_unit() -> None:
    value = policy_field([("second", 1, 1, None), ("tokens-minute", 10_000, 60, "tokens")])
    assert value == b'"second";q=1;w=1, "tokens-minute";q=10000;w=60;qu="tokens"'
    assert http_sf.parse(value, tltype="list") == [
        ("second", {"q": 1, "w": 1}),
        ("tokens-minute", {"q": 10_000, "w": 60, "qu": "tokens"}),
    ]


@given(names=names, quota=numbers, window=st.integers(1, 10**9), unit=st.sampled_from([None, "tokens"]))
def test_rl_13_policies_are_in_canonical_form(names: list[str], quota: int, window: int, unit: str | None) -> None:
    value = policy_field([(name, quota, window, unit) for name in names])
    assert http_sf.ser(http_sf.parse(value, tltype="list")).encode() == value
    assert [name for name, _ in http_sf.parse(value, tltype="list")] == names


@given(names=names, left=numbers, seconds=st.integers(0, 10**9))
def test_rl_09_rl_13_limits_are_in_canonical_form(names: list[str], left: int, seconds: int) -> None:
    value = limit_template(names) % ((seconds,) * len(names)) % ((left,) * len(names))
    parsed = http_sf.parse(value, tltype="list")
    assert parsed == [(name, {"r": left, "t": seconds}) for name in names]
    assert http_sf.ser(parsed).encode() == value
    assert member_names(value) is not None


@pytest.mark.parametrize("name", ["größe", "a\nb", "\x7f"])
def test_rl_01_a_name_that_no_string_can_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="structured field"):
        policy_field([(name, 1, 1, None)])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b'"a";r=1;t=2', {b'"a"'}),
        (b'"a";r=1, "b"; r=1;pk=:YQ==:;x=?1;y=tok/en:x;z', {b'"a"', b'"b"'}),
        (b'"a\\"b";r=1,\t"c, d"', {b'"a\\"b"', b'"c, d"'}),
        (b"", None),
        (b'"a";r=1,', None),
        (b"100;w=60", None),
        (b"limit=100, remaining=5, reset=5", None),
        (b'"a', None),
        (b"default;r=1", None),
    ],
)
def test_rl_29_the_names_of_upstream_members_are_read(value: bytes, expected: set[bytes] | None) -> None:
    assert member_names(value) == expected


@given(value=st.binary(max_size=200))
def test_no_field_value_raises(value: bytes) -> None:
    member_names(value)

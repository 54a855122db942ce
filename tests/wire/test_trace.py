"""W3C Trace Context, `traceparent`. Rows TC-01 to TC-05 (as far as one line goes; TC-05 is with RequestID)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.trace import TraceParent, parse_traceparent

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = TraceParent(TRACE, PARENT, 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param(f"00-{TRACE}-{PARENT}-01", VALID, id="TC-01-the-specification's-example"),
        pytest.param(f"00-{TRACE}-{PARENT}-00", TraceParent(TRACE, PARENT, 0), id="TC-01-not-sampled"),
        pytest.param(f" \t00-{TRACE}-{PARENT}-01 ", VALID, id="TC-01-white-space-around"),
        pytest.param(f"00-{TRACE}-{PARENT}-ff", TraceParent(TRACE, PARENT, 255), id="TC-11-unknown-flags"),
        pytest.param("", None, id="TC-01-empty"),
        pytest.param(f"00-{TRACE.upper()}-{PARENT}-01", None, id="TC-01-upper-case-trace"),
        pytest.param(f"00-{TRACE}-{PARENT.upper()}-01", None, id="TC-01-upper-case-parent"),
        pytest.param(f"00-{TRACE}-{PARENT}-0A", None, id="TC-01-upper-case-flags"),
        pytest.param(f"00-{TRACE[:-1]}-{PARENT}-01", None, id="TC-01-short-trace"),
        pytest.param(f"00-{TRACE}0-{PARENT}-01", None, id="TC-01-long-trace"),
        pytest.param(f"00-{TRACE}-{PARENT[:-1]}-01", None, id="TC-01-short-parent"),
        pytest.param(f"00-{TRACE}-{PARENT}0-01", None, id="TC-01-long-parent"),
        pytest.param(f"00-{TRACE}-{PARENT}-1", None, id="TC-01-short-flags"),
        pytest.param(f"00-{TRACE}-{PARENT}", None, id="TC-01-no-flags"),
        pytest.param(f"00-{TRACE}-{PARENT}-", None, id="TC-01-empty-flags"),
        pytest.param(f"00_{TRACE}_{PARENT}_01", None, id="TC-01-other-separator"),
        pytest.param(f"00-{TRACE[:-1]}.-{PARENT}-01", None, id="TC-01-illegal-character"),
        pytest.param(f"00-{TRACE}-{PARENT}-01\n", None, id="TC-01-line-feed"),
        pytest.param(f"00-{'0' * 32}-{PARENT}-01", None, id="TC-02-all-zero-trace"),
        pytest.param(f"00-{TRACE}-{'0' * 16}-01", None, id="TC-02-all-zero-parent"),
        pytest.param(f"ff-{TRACE}-{PARENT}-01", None, id="TC-03-version-ff"),
        pytest.param(f"0-{TRACE}-{PARENT}-01", None, id="TC-03-short-version"),
        pytest.param(f"000-{TRACE}-{PARENT}-01", None, id="TC-03-long-version"),
        pytest.param(f".0-{TRACE}-{PARENT}-01", None, id="TC-03-illegal-version"),
        pytest.param(f"CC-{TRACE}-{PARENT}-01", None, id="TC-03-upper-case-version"),
        pytest.param(f"00-{TRACE}-{PARENT}-01-what-comes", None, id="TC-04-more-in-version-00"),
        pytest.param(f"00-{TRACE}-{PARENT}-01-", None, id="TC-04-dash-in-version-00"),
        pytest.param(f"cc-{TRACE}-{PARENT}-01", VALID, id="TC-04-higher-version"),
        pytest.param(f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", VALID, id="TC-04-higher-version-more"),
        pytest.param(f"cc-{TRACE}-{PARENT}-01.what", None, id="TC-04-higher-version-no-dash"),
        pytest.param(f"cc-{TRACE}-{PARENT}-01X", None, id="TC-04-higher-version-too-long"),
        pytest.param(f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01", None, id="TC-05-joined"),
    ],
)
def test_traceparent(line, expected):
    assert parse_traceparent(line.encode()) == expected


@pytest.mark.parametrize(("flags", "sampled"), [(0, False), (1, True), (2, False), (3, True)])
def test_sampled_is_the_lowest_bit(flags, sampled):
    assert TraceParent(TRACE, PARENT, flags).sampled is sampled


@given(st.binary(max_size=80))
def test_anything_is_either_a_trace_or_none(line):
    trace = parse_traceparent(line)
    assert trace is None or (len(trace.trace_id) == 32 and len(trace.parent_id) == 16)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255), st.integers(0, 254))
def test_every_valid_line_is_read(trace, parent, flags, version):
    line = f"{version:02x}-{trace:032x}-{parent:016x}-{flags:02x}".encode()
    assert parse_traceparent(line) == TraceParent(f"{trace:032x}", f"{parent:016x}", flags)


def test_a_long_line_costs_no_more_than_its_length():
    assert parse_traceparent(b"cc-" + b"0" * 100_000) is None
    assert parse_traceparent(f"cc-{TRACE}-{PARENT}-01-".encode() + b"-" * 100_000) == VALID

"""HTTP-date, RFC 9110 section 5.6.7. Rows CR-22, CR-23, D-02."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.dates import format_http_date, parse_http_date

NOV_1994 = 784_111_777
NOW = 1_767_225_600.0  # 2026-01-01T00:00:00Z

FORMS = {
    "IMF-fixdate": b"Sun, 06 Nov 1994 08:49:37 GMT",
    "RFC 850": b"Sunday, 06-Nov-94 08:49:37 GMT",
    "asctime": b"Sun Nov  6 08:49:37 1994",
}

NOT_DATES = {
    "empty": b"",
    "number": b"784111777",
    "lower-case month": b"Sun, 06 nov 1994 08:49:37 GMT",
    "lower-case day": b"sun, 06 Nov 1994 08:49:37 GMT",
    "no such day name": b"Sux, 06 Nov 1994 08:49:37 GMT",
    "UTC": b"Sun, 06 Nov 1994 08:49:37 UTC",
    "offset": b"Sun, 06 Nov 1994 08:49:37 +0000",
    "one-digit day": b"Sun, 6 Nov 1994 08:49:37 GMT",
    "31 June": b"Sun, 31 Jun 1994 08:49:37 GMT",
    "29 February of a common year": b"Mon, 29 Feb 2027 08:49:37 GMT",
    "day 0": b"Sun, 00 Nov 1994 08:49:37 GMT",
    "year 0": b"Sun, 06 Nov 0000 08:49:37 GMT",
    "hour 24": b"Sun, 06 Nov 1994 24:00:00 GMT",
    "minute 60": b"Sun, 06 Nov 1994 08:60:00 GMT",
    "second 60 that is no leap second": b"Sun, 06 Nov 1994 08:49:60 GMT",
    "second 61": b"Sun, 06 Nov 1994 23:59:61 GMT",
    "list": b"Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
    "trailing text": b"Sun, 06 Nov 1994 08:49:37 GMTx",
    "newline": b"Sun, 06 Nov 1994 08:49:37 GMT\n",
    "non-ASCII digits": "Sun, ٠٦ Nov 1994 08:49:37 GMT".encode(),
    "RFC 850 with a short day": b"Sun, 06-Nov-94 08:49:37 GMT",
    "RFC 850 with four digits": b"Sunday, 06-Nov-1994 08:49:37 GMT",
    "asctime with a zone": b"Sun Nov  6 08:49:37 GMT 1994",
    "RFC 3339": b"1994-11-06T08:49:37Z",
}


@pytest.mark.parametrize("value", FORMS.values(), ids=FORMS)
def test_all_three_forms_are_read(value):
    """CR-22"""
    assert parse_http_date(value, now=NOW) == NOV_1994


@pytest.mark.parametrize("value", NOT_DATES.values(), ids=NOT_DATES)
def test_anything_else_is_no_date(value):
    """CR-18: a recipient ignores what is not an HTTP-date."""
    assert parse_http_date(value, now=NOW) is None


@pytest.mark.parametrize(
    "value",
    [b"Sat, 11 Jan 2026 12:00:00 GMT", b"Saturday, 11-Jan-26 12:00:00 GMT", b"Sat Jan 11 12:00:00 2026"],
    ids=["IMF-fixdate", "RFC 850", "asctime"],
)
def test_a_wrong_day_name_is_tolerated(value):
    """CR-23, D-02: 11 January 2026 is a Sunday."""
    assert parse_http_date(value, now=NOW) == datetime(2026, 1, 11, 12, tzinfo=UTC).timestamp()


def test_a_leap_second_is_the_second_after():
    assert parse_http_date(b"Sat, 31 Dec 2016 23:59:60 GMT", now=NOW) == datetime(2017, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "year"),
    [
        (b"Monday, 31-Dec-75 00:00:00 GMT", 2075),
        (b"Monday, 01-Jan-76 00:00:00 GMT", 2076),
        (b"Monday, 01-Jan-76 00:00:01 GMT", 1976),
        (b"Monday, 02-Jan-76 00:00:00 GMT", 1976),
        (b"Monday, 01-Jan-77 00:00:00 GMT", 1977),
        (b"Monday, 01-Jan-99 00:00:00 GMT", 1999),
        (b"Monday, 01-Jan-00 00:00:00 GMT", 2000),
        (b"Monday, 01-Jan-26 00:00:00 GMT", 2026),
    ],
)
def test_two_digit_years_are_at_most_fifty_years_ahead(value, year):
    """CR-22: seen from 1 January 2026, more than 50 years ahead is in the past."""
    read = parse_http_date(value, now=NOW)
    assert read is not None
    assert datetime.fromtimestamp(read, UTC).year == year


@given(st.integers(0, 99), st.integers(1_000_000_000, 7_000_000_000))
def test_two_digit_years_stay_within_fifty_years_of_now(year, now):
    read = parse_http_date(b"Monday, 15-Jun-%02d 12:00:00 GMT" % year, now=now)
    assert read is not None
    today = datetime.fromtimestamp(now, UTC)
    then = datetime.fromtimestamp(0, UTC) + timedelta(seconds=read)
    assert then.year % 100 == year
    assert today.year - 50 <= then.year <= today.year + 50


@given(st.integers(-62_135_596_800, 253_402_300_799))
def test_what_is_written_is_read_back_and_has_the_right_day_name(timestamp):
    """CR-23: the day name is computed."""
    text = format_http_date(timestamp)
    assert parse_http_date(text, now=NOW) == timestamp
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=timestamp)
    assert text[:3].decode() == ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.weekday()]


def test_the_example_of_the_guidelines_gets_its_true_day_name():
    """D-02: 11 January 2027 is a Monday."""
    assert format_http_date(datetime(2027, 1, 11, tzinfo=UTC).timestamp()) == b"Mon, 11 Jan 2027 00:00:00 GMT"


def test_fractions_of_a_second_are_dropped():
    assert format_http_date(784_111_777.999) == FORMS["IMF-fixdate"]
    assert format_http_date(-0.5) == b"Wed, 31 Dec 1969 23:59:59 GMT"


@pytest.mark.parametrize("timestamp", [float("nan"), float("inf"), 1e15, -1e15])
def test_a_time_that_no_date_can_say_is_refused(timestamp):
    with pytest.raises(ValueError, match="timestamp"):
        format_http_date(timestamp)


@given(st.binary(max_size=40))
def test_no_bytes_raise(value):
    assert parse_http_date(value, now=NOW) is None or isinstance(parse_http_date(value, now=NOW), int)


@given(st.text("SunModay,0123456789: -GMTNovJan", min_size=24, max_size=33))
def test_nothing_like_a_date_raises(text):
    parse_http_date(text.encode(), now=NOW)

"""HTTP dates: reading the three forms that exist, writing the one that may be written (RFC 9110 section 5.6.7).

    parse_http_date(b"Sun, 06 Nov 1994 08:49:37 GMT", now=time.time())    # 784111777
    format_http_date(784111777)                                           # b"Sun, 06 Nov 1994 08:49:37 GMT"

A received day name may be the wrong one for its date (specifications themselves have such examples); everything else
must be exact, and what is not a date is None. What is written always has the right day name.
"""

import math
import re
from datetime import date
from functools import lru_cache

_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")
_DAYS = (b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat", b"Sun")
_LONG_DAYS = (b"Monday", b"Tuesday", b"Wednesday", b"Thursday", b"Friday", b"Saturday", b"Sunday")
_MONTH_NUMBERS = {name: number for number, name in enumerate(_MONTHS, 1)}

_TIME = rb"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_MONTH = rb"(?P<month>" + b"|".join(_MONTHS) + rb")"
_IMF_FIXDATE = re.compile(
    rb"(?:" + b"|".join(_DAYS) + rb"), (?P<day>\d\d) " + _MONTH + rb" (?P<year>\d{4}) " + _TIME + rb" GMT"
)
_RFC850 = re.compile(
    rb"(?:" + b"|".join(_LONG_DAYS) + rb"), (?P<day>\d\d)-" + _MONTH + rb"-(?P<year>\d\d) " + _TIME + rb" GMT"
)
_ASCTIME = re.compile(
    rb"(?:" + b"|".join(_DAYS) + rb") " + _MONTH + rb" (?P<day>[ \d]\d) " + _TIME + rb" (?P<year>\d{4})"
)

_EPOCH = date(1970, 1, 1).toordinal()
_DAY = 86_400


def parse_http_date(value: bytes, *, now: float) -> int | None:
    """Seconds since the epoch, or None for anything that is not one HTTP-date.

    `now` is needed for the two-digit years of the RFC 850 form: a year that seems to be more than 50 years ahead is
    the latest past year with these digits.
    """
    length = len(value)
    if length == 29 or length == 24:
        return _parse_full(value)
    if 30 <= length <= 33:
        found = _RFC850.fullmatch(value)
        return None if found is None else _parse_rfc850(found, now)
    return None


# Clients repeat the date that they were given. The keys are 24 or 29 bytes: the memory is bounded.
@lru_cache(maxsize=1024)
def _parse_full(value: bytes) -> int | None:
    found = (_IMF_FIXDATE if len(value) == 29 else _ASCTIME).fullmatch(value)
    return None if found is None else _seconds(found, int(found["year"]))


def _parse_rfc850(found: re.Match[bytes], now: float) -> int | None:
    this_year = date.fromordinal(_EPOCH + math.floor(now / _DAY)).year
    year = this_year - this_year % 100 + 100 + int(found["year"])
    while year - 50 >= this_year:
        # Fifty years ahead to the second, as a calendar counts them.
        if year - 50 == this_year:
            fifty_years_ago = _seconds(found, this_year)
            if fifty_years_ago is not None and fifty_years_ago <= now:
                break
        year -= 100
    return _seconds(found, year)


def _seconds(found: re.Match[bytes], year: int) -> int | None:
    hour, minute, second = int(found["hour"]), int(found["minute"]), int(found["second"])
    # 23:59:60 is a leap second.
    if hour > 23 or minute > 59 or second > 60 or (second == 60 and (hour, minute) != (23, 59)):
        return None
    try:
        day = date(year, _MONTH_NUMBERS[found["month"]], int(found["day"]))
    except ValueError:
        return None
    return (day.toordinal() - _EPOCH) * _DAY + hour * 3600 + minute * 60 + second


def format_http_date(timestamp: float) -> bytes:
    """`timestamp` (seconds since the epoch, rounded down) as IMF-fixdate.

    Raises `ValueError` outside the years 1 to 9999.
    """
    if not math.isfinite(timestamp):
        raise ValueError(f"a timestamp must be a finite number of seconds since the epoch, not {timestamp}")
    return _format(math.floor(timestamp))


@lru_cache(maxsize=256)
def _format(timestamp: int) -> bytes:
    days, rest = divmod(timestamp, _DAY)
    try:
        day = date.fromordinal(_EPOCH + days)
    except (ValueError, OverflowError):
        raise ValueError(f"timestamp {timestamp} is outside the years 1 to 9999") from None
    minutes, second = divmod(rest, 60)
    hour, minute = divmod(minutes, 60)
    # Never strftime: its names follow the machine's locale.
    return b"%b, %02d %b %04d %02d:%02d:%02d GMT" % (
        _DAYS[day.weekday()], day.day, _MONTHS[day.month - 1], day.year, hour, minute, second,
    )  # fmt: skip

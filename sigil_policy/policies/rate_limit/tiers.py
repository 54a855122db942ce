"""What the callers of a tier may do, as people write it.

    Tier(requests="1/second;20/minute;100/hour", tokens="10000/minute;5000000/calendar month")
    Level("organisation", key=by_claim("org"), limits="10000/hour")

The notation is that of the `limits` package, and `calendar month` beside it: a window that begins with each month, in
UTC. A day of the default algorithm is a day of the calendar, in UTC, and its hours and minutes are aligned likewise.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Self

import limits as limit_strings
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange
from sigil_policy.identity.fields import CONFIG, Label
from sigil_policy.stores.limits import MONTH, Unit, Window

LARGEST = 999_999_999_999_999
"""The largest number that a header can say (RFC 9651 section 3.3.1)."""

_MONTHLY = re.compile(r"\s*(\d{1,16})\s*(?:/|per)\s*(?:1\s+)?calendar[ -]month\s*", re.IGNORECASE)

Limits = str | int | None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tier:
    """What the callers of one tier may do.

        Tier(requests="1/second;20/minute;100/hour", tokens="10000/minute")
        Tier(requests="5 per 15 minutes", tokens=2_000_000)
        Tier(input_tokens=400_000, output_tokens=80_000)

    Options:
        requests: limits in the notation of `limits` (default None: requests are not limited).
        tokens: the same for tokens, input and output together, or a number of tokens per minute (default None: no
            budget).
        input_tokens, output_tokens: budgets of their own for either (default None). What is reported without being
            told apart counts as output.

    Each needs windows of different lengths. Raises `ValueError` for what cannot be read, and for a limit of 0.
    """

    requests: str | None = None
    tokens: Limits = None
    input_tokens: Limits = None
    output_tokens: Limits = None

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if not self.windows:
            raise ValueError(
                'a tier needs limits: write Tier(requests="20/minute"), Tier(tokens="10000/minute") or both'
            )
        return self

    @property
    def windows(self) -> tuple[Window, ...]:
        return (
            *_windows(self.requests, "requests"),
            *_windows(self.tokens, "tokens"),
            *_windows(self.input_tokens, "input-tokens"),
            *_windows(self.output_tokens, "output-tokens"),
        )


def _windows(text: Limits, unit: Unit) -> Iterable[Window]:
    if text is None:
        return
    if isinstance(text, int):
        text = f"{text}/minute"
    prefix = "" if unit == "requests" else f"{unit}-"
    found = []
    for piece in re.split(r"[,;|]", text):
        monthly = _MONTHLY.fullmatch(piece)
        if monthly:
            found.append(Window(int(monthly[1]), MONTH, unit, f"{prefix}calendar-month", "month"))
            continue
        try:
            item = limit_strings.parse(piece)
        except ValueError:
            raise ValueError(
                f"limits {text!r} must be like '10/second;100/minute', '5 per 15 minutes' or '1000/calendar month'"
            ) from None
        length = item.GRANULARITY.name if item.multiples == 1 else f"{item.multiples}-{item.GRANULARITY.name}s"
        found.append(Window(item.amount, item.get_expiry(), unit, prefix + length))
    known = set()
    for window in sorted(found, key=lambda window: window.seconds):
        if not 1 <= window.limit <= LARGEST or window.seconds < 1:
            raise ValueError(f"limits {text!r}: a limit is 1 to {LARGEST} in at least one second")
        if window.measure in known:
            raise ValueError(f"limits {text!r}: two limits for {window.seconds} seconds; keep the smaller one")
        known.add(window.measure)
        yield window


GUIDELINE_TIERS: Mapping[str, Tier] = MappingProxyType(
    {
        "free": Tier(requests="1/second;20/minute;100/hour", tokens=10_000),
        "standard": Tier(requests="10/second;100/minute;1000/hour", tokens=100_000),
        "pro": Tier(requests="50/second;500/minute;5000/hour", tokens=500_000),
        "enterprise": Tier(requests="200/second;2000/minute;20000/hour", tokens=2_000_000),
    }
)
"""The table of the API guidelines, "Rate Limit Tiers"."""


def tier(limits: Tier | str) -> Tier:
    return Tier(requests=limits) if isinstance(limits, str) else limits


@dataclass(frozen=True, config=CONFIG)
class Level:
    """Limits that several callers share: those of a user's keys, of an organisation's users.

        Level("organisation", key=by_claim("org"), limits=Tier(requests="10000/hour", tokens="5000000/calendar month"))

    Options:
        name: stands in front of the level's windows in headers.
        key: from the exchange to who shares, or None where this exchange has nobody on this level.
        limits: a `Tier`, a string of request limits, or a table of them by tier.
        tier: with a table, from the exchange to a name in it (default None: the principal's tier). What is not in the
            table is limited by its first row.
    """

    name: Label
    key: Callable[[Exchange], str | None]
    limits: Tier | str | Mapping[str, Tier | str]
    tier: Callable[[Exchange], str | None] | None = None

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if not self.rows:
            raise ValueError(f"level {self.name!r} has an empty table of limits; write at least one row")
        return self

    @property
    def rows(self) -> Mapping[str, Tier]:
        """The table by tier; a single row is under the level's own name."""
        if isinstance(self.limits, Mapping):
            return {name: tier(row) for name, row in self.limits.items()}
        return {self.name: tier(self.limits)}

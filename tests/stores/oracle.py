"""What a store of limits must answer, from the definitions: exact, naive and slow.

    oracle = Oracle("sliding")
    answer = oracle.admit("a", plan, 1, (800,), now)
    assert answer.admitted and answer.remaining == (19, 9_200)
    oracle.settle(answer.hold, (640,), now)

It remembers every charge of every caller for ever, and adds all of them up anew for each question. Amounts and moments
are fractions, so nothing is ever rounded.

* "fixed": what was charged since the window began that the moment is in: a multiple of its length, or a month (UTC).
* "sliding": what was charged in the `seconds` that end now.
* "gcra": the level of a bucket into which every charge is poured, and from which `limit / seconds` leak. A charge that
  no limit was asked for fills it to two limits at most.

A part of a lease that was not used is given back as if it had never been reserved, the newest part first. That is what
"fixed" and "sliding" promise; a store that counts by "gcra" gives back no more than that.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from math import floor
from typing import Any

from sigil_policy.stores.limits import Algorithm, Key, Plan, Window


@dataclass
class Charge:
    """Something that was used `at` a moment. A refund lowers its `amount`; `asked` says that a limit allowed it."""

    at: Fraction
    amount: int
    asked: bool = True


@dataclass
class Hold:
    """A lease: of each token window its charges, the oldest first."""

    rows: list[tuple[str, Window]]
    parts: list[list[Charge]]
    settled: bool = False

    @property
    def reserved(self) -> tuple[int, ...]:
        return tuple(sum(charge.amount for charge in charges) for charges in self.parts)


@dataclass
class Answer:
    admitted: bool
    remaining: tuple[int, ...]
    refused_by: set[int] = field(default_factory=set)
    hold: Hold | None = None


class Oracle:
    """Answers as a store that counts by `algorithm` must.

    `one_log` says that a store keeps one log of requests for all windows of a caller: a cost that takes a small window
    whole then counts in full for it, too, and of different amounts that are charged the largest does.
    """

    def __init__(self, algorithm: Algorithm, *, one_log: bool = False) -> None:
        self.algorithm = algorithm
        self.one_log = one_log
        self.charges: dict[tuple[str, str], list[Charge]] = defaultdict(list)
        self.seen = Fraction(0)
        self.shift = Fraction(0)

    # --- the definitions ---------------------------------------------------------------------------------------------

    def used(self, key: str, window: Window, at: Fraction) -> Fraction:
        charges = self.charges[key, window.measure]
        if self.algorithm == "fixed":
            return Fraction(sum(charge.amount for charge in charges if began(window, charge.at) == began(window, at)))
        if self.algorithm == "sliding":
            return Fraction(sum(charge.amount for charge in charges if at - window.seconds < charge.at <= at))
        level, last = Fraction(0), Fraction(0)
        rate = Fraction(window.limit, window.seconds)
        for charge in charges:
            level = max(level - (charge.at - last) * rate, Fraction(0))
            full = level + charge.amount
            level = full if charge.asked else max(level, min(full, Fraction(2 * window.limit)))
            last = charge.at
        return max(level - (at - last) * rate, Fraction(0))

    def left(self, key: str, window: Window, at: Fraction) -> Fraction:
        return window.limit - self.used(key, window, at)

    def refuses(self, key: str, window: Window, need: int, at: Fraction) -> bool:
        """Whether a window refuses a cost, or an estimate, of `need`."""
        left = self.left(key, window, at)
        if window.unit == "requests":
            return need > 0 and left < min(need, window.limit)
        return left < (need or 1)

    # --- what a store is asked ---------------------------------------------------------------------------------------

    def admit(self, key: Key, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Answer:
        at = self.moment(now)
        rows = by_window(key, plan)
        needs = self.needs(plan, cost, estimate)
        refused = {
            index
            for index, ((name, window), need) in enumerate(zip(rows, needs, strict=True))
            if need is not None and self.refuses(name, window, need, at)
        }
        hold = None
        if not refused:
            parts = []
            for (name, window), need in zip(rows, needs, strict=True):
                amount = need or 0
                if window.unit == "requests" and not self.one_log:
                    amount = min(amount, window.limit)
                charge = Charge(at, amount)
                self.charges[name, window.measure].append(charge)
                if window.unit != "requests":
                    parts.append([charge])
            if estimate is not None:
                hold = Hold(rows[len(plan.requests) :], parts)
        return Answer(not refused, self.remaining(rows, at), refused, hold)

    def extend(self, hold: Hold, more: tuple[int, ...], now: float) -> tuple[int, ...] | None:
        at = self.moment(now)
        pairs = list(zip(hold.rows, more, strict=True))
        if hold.settled or any(amount and self.left(*row, at) < amount for row, amount in pairs):
            return None
        for ((name, window), amount), part in zip(pairs, hold.parts, strict=True):
            part.append(Charge(at, amount))
            self.charges[name, window.measure].append(part[-1])
        return self.remaining(hold.rows, at)

    def settle(self, hold: Hold, used: tuple[int, ...], now: float) -> tuple[int, ...]:
        at = self.moment(now)
        if not hold.settled:
            hold.settled = True
            for (name, window), part, amount, held in zip(hold.rows, hold.parts, used, hold.reserved, strict=True):
                unused = max(held - amount, 0)
                for charge in reversed(part):
                    back = min(unused, charge.amount)
                    charge.amount -= back
                    unused -= back
                if amount > held:
                    self.charges[name, window.measure].append(Charge(at, amount - held, asked=False))
        return self.remaining(hold.rows, at)

    def charge(self, key: Key, plan: Plan, amounts: tuple[int, ...], now: float) -> tuple[int, ...]:
        at = self.moment(now)
        rows = by_window(key, plan)
        for (name, window), amount in zip(rows, amounts, strict=True):
            if self.one_log and window.unit == "requests":
                amount = max(
                    a for row, a in zip(rows, amounts, strict=True) if row[0] == name and row[1].unit == "requests"
                )
            self.charges[name, window.measure].append(Charge(at, amount, asked=False))
        return self.remaining(rows[len(plan.requests) :], at)

    # --- a clock that may be set back --------------------------------------------------------------------------------

    def moment(self, now: float) -> Fraction:
        """Goes on from the latest moment seen, at the speed of the clock, until the clock has caught up."""
        wall = Fraction(now)
        if wall >= self.seen:
            self.shift = Fraction(0)
        elif wall + self.shift < self.seen:
            self.shift = self.seen - wall
        self.seen = wall + self.shift
        return self.seen

    # --- counting ----------------------------------------------------------------------------------------------------

    def needs(self, plan: Plan, cost: int, estimate: tuple[int, ...] | None) -> list[int | None]:
        """What is asked of each window; None: it is not asked."""
        return [cost] * len(plan.requests) + ([None] * len(plan.tokens) if estimate is None else list(estimate))

    def remaining(self, rows: list[tuple[str, Window]], at: Fraction) -> tuple[int, ...]:
        return tuple(max(floor(self.left(name, window, at)), 0) for name, window in rows)


def by_window(key: Key, plan: Plan) -> list[tuple[str, Window]]:
    """Who is counted by which window, in the order of the plan's windows."""
    levels = [(key, plan)] if not plan.levels else list(zip(key, plan.levels, strict=True))
    rows: list[Any] = [(name, window) for name, level in levels for window in level.windows]
    return sorted(rows, key=lambda row: row[1].unit != "requests")


def began(window: Window, at: Fraction) -> Any:
    """Which window a moment is in."""
    if window.calendar == "month":
        return datetime.fromtimestamp(floor(at), UTC).strftime("%Y-%m")
    return at // window.seconds

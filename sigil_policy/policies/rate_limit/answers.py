"""What a caller is told whose request, or whose stream, goes no further.

RFC 6585 section 4; draft-ietf-httpapi-ratelimit-headers-11 section 6; API guidelines, "Rate Limiting".
"""

import random

from sigil_policy.core.catalogue import BUDGET_EXCEEDED, BUDGET_TOO_SMALL, RATE_EXCEEDED
from sigil_policy.core.problems import Problem
from sigil_policy.policies.rate_limit.fields import Face
from sigil_policy.stores.limits import Decision, Window


def refusal(face: Face, decision: Decision, *, x_headers: bool, spread: int) -> Problem:
    """429: which limit refused, and when another try is worth it, put off by at most `spread` seconds at random."""
    index = decision.refused_by[0]
    window = face.plan.windows[index]
    # Never before the moment that any of the refusing windows gives (draft section 6).
    wait = max(decision.retry_after, *[decision.reset[i] - decision.at for i in decision.refused_by])
    if spread:
        wait += random.randint(0, spread)  # noqa: S311  spreads load, keeps no secret
    pairs = face.pairs(decision, index if x_headers else None)
    if window.unit != "requests" and x_headers:
        pairs.append((b"x-tokens-remaining", b"%d" % face.left(decision.remaining[face.split :])))
    kind = RATE_EXCEEDED if window.unit == "requests" else BUDGET_EXCEEDED
    return kind(
        f"{_words(window)} are allowed.",
        headers=pairs,
        limit=window.limit,
        window=window.seconds,
        unit=window.unit,
        retry_after=wait,
        violated_policies=[face.names[i] for i in decision.refused_by],
    )


def never_fits(face: Face, amounts: tuple[int, ...], index: int) -> Problem:
    """422: no wait will help a request that needs more than the whole budget `index`."""
    window, _ = face.budgets[index]
    return BUDGET_TOO_SMALL(
        f"This request may need {amounts[index]} {window.unit.replace('-', ' ')}; the budget is {_words(window)}.",
        required=amounts[index],
        limit=window.limit,
        window=window.seconds,
    )


def exhausted(face: Face, missing: tuple[int, ...]) -> Problem:
    """Why a stream that had begun is ended."""
    lacking = [row for row, number in zip(face.budgets, missing, strict=True) if number]
    window, _ = lacking[0]
    return BUDGET_EXCEEDED(
        f"The budget of {_words(window)} is spent; the response ends here.",
        limit=window.limit,
        window=window.seconds,
        unit=window.unit,
        violated_policies=[name for _, name in lacking],
    )


def _words(window: Window) -> str:
    length = "a calendar month" if window.calendar else f"{window.seconds} seconds"
    return f"{window.limit} {window.unit.replace('-', ' ')} in {length}"

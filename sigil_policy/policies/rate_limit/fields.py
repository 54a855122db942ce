"""A plan as clients see it: its header fields, most of which are encoded before there is a request."""

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

from sigil_policy.core.exchange import Head
from sigil_policy.core.facts import Quota, TokenUsage, WindowState
from sigil_policy.stores.limits import Decision, LimitStore, Plan
from sigil_policy.wire.ratelimit import limit_template, member_names, policy_field
from sigil_policy.wire.structured import sf_string

Pair = tuple[bytes, bytes]

X_FIELDS = (b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset", b"x-ratelimit-window")
FIELDS = frozenset((*X_FIELDS, b"ratelimit", b"ratelimit-policy"))
_ROUNDING = 1e-6

_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
MEANINGS = {
    "RateLimit-Policy": ("The caller's limits: q in w seconds (draft-ietf-httpapi-ratelimit-headers-11)", _TEXT),
    "RateLimit": ("What is left of each limit: r, for t seconds (draft-ietf-httpapi-ratelimit-headers-11)", _TEXT),
}
X_MEANINGS = {
    "X-RateLimit-Limit": ("The requests that the caller has in one window", _COUNT),
    "X-RateLimit-Remaining": ("The requests that are left of them", _COUNT),
    "X-RateLimit-Reset": ("When the window ends, in seconds since 1970", _COUNT),
    "X-RateLimit-Window": ("The length of the window in seconds", _COUNT),
}
TOKEN_MEANINGS = {
    "X-Tokens-Used": ("The language-model tokens that this request has used", _COUNT),
    "X-Tokens-Remaining": ("The tokens that are left in the caller's budget", _COUNT),
}
WAIT = {
    "Retry-After": (
        "Seconds after which another try is worth it (RFC 9110 section 10.2.3)",
        {"type": "integer", "minimum": 1},
    )
}


def whole_seconds(wait: float) -> int:
    """Whole seconds, never too few; a moment of time is exact to a quarter of a microsecond."""
    return max(ceil(wait - _ROUNDING), 0)


class Face:
    """The windows of `plan` under the `names` that clients see; `store` counts them.

    `headline` is the window that `X-RateLimit-*` describes on a success, None for none of these fields, and `drafted`
    says whether `RateLimit` and `RateLimit-Policy` are sent. `whole` is the face of which this is one process's
    share (None: it is nobody's): `shared(plan, store)` makes one, with the same names.
    """

    def __init__(
        self,
        plan: Plan,
        store: LimitStore,
        names: Sequence[str],
        *,
        headline: str | None,
        x_headers: bool,
        drafted: bool,
        whole: "Face | None" = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.names = list(names)
        self.whole = whole
        self.shared = partial(Face, names=names, headline=headline, x_headers=x_headers, drafted=drafted, whole=self)
        self.limits = [window.limit for window in plan.windows]
        self.lengths = [window.seconds for window in plan.windows]
        units = [window.unit for window in plan.windows]
        self.fixed = list(zip(self.names, units, self.limits, self.lengths, strict=True))
        self.split = len(plan.requests)
        self.budgets = list(zip(plan.tokens, self.names[self.split :], strict=True))
        # Those that `X-Tokens-Remaining` speaks of: input and output together, where that has a budget.
        self.told = [i for i, w in enumerate(plan.tokens) if w.unit == "tokens"] or list(range(len(plan.tokens)))
        # The caller's own windows come first; those of levels above are never the headline.
        mine = plan.levels[0].requests if plan.levels else plan.requests
        shown = next((i for i, w in enumerate(mine) if w.name == (headline or "minute")), len(mine) - 1)
        self.headline = shown if x_headers and mine else None
        self.x_headers = x_headers
        self.drafted = drafted
        self.limit_pairs = [(b"x-ratelimit-limit", b"%d" % limit) for limit in self.limits]
        self.length_pairs = [(b"x-ratelimit-window", b"%d" % seconds) for seconds in self.lengths]
        rows = zip(self.names, self.limits, self.lengths, units, strict=True)
        self.policy_pair = (
            b"ratelimit-policy",
            policy_field(
                ((n, limit, length, None if u == "requests" else u) for n, limit, length, u in rows),
                degraded=whole is not None,
            ),
        )
        self.template = limit_template(self.names)
        self._single = all(window.unit == "tokens" for window in plan.tokens)
        # Stores that align windows answer with one and the same tuple of resets for a while.
        self.known: tuple[Any, float, bytes, bytes] = (None, 0.0, b"", b"")

    def amounts(self, usage: TokenUsage) -> tuple[int, ...]:
        """What `usage` takes from each token window. What nobody told apart counts as output."""
        if self._single:
            return (usage.total_tokens,) * len(self.plan.tokens)
        counts = {
            "tokens": usage.total_tokens,
            "input-tokens": usage.input_tokens,
            "output-tokens": max(usage.output_tokens, usage.total_tokens - usage.input_tokens),
        }
        return tuple([counts[window.unit] for window in self.plan.tokens])

    def too_large(self, amounts: Sequence[int]) -> int | None:
        """The first token window that could never hold its amount."""
        for index, ((window, _), amount) in enumerate(zip(self.budgets, amounts, strict=True)):
            if amount > window.limit:
                return index
        return None

    def left(self, tokens: Sequence[int]) -> int:
        """What `X-Tokens-Remaining` says of what remains in each token window."""
        return min([tokens[index] for index in self.told])

    def quoted(self, suffix: str) -> list[bytes]:
        """The names as they stand in the fields."""
        return [sf_string(name + suffix) for name in self.names]

    def pairs(self, decision: Decision, shown: int | None) -> list[Pair]:
        """The fields for `decision`; `shown` is the window that `X-RateLimit-*` describes."""
        remaining, resets, now = decision.remaining, decision.reset, decision.at
        known, second, moment, template = self.known
        if resets is not known or not second <= now < second + 1 or shown != self.headline:
            moment = b"" if shown is None else b"%d" % ceil(resets[shown] - _ROUNDING)
            template = self.template % tuple([whole_seconds(reset - now) for reset in resets])
            if shown == self.headline:
                self.known = (resets, now // 1, moment, template)
        pairs = []
        if shown is not None:
            pairs = [
                self.limit_pairs[shown],
                (b"x-ratelimit-remaining", b"%d" % remaining[shown]),
                (b"x-ratelimit-reset", moment),
                self.length_pairs[shown],
            ]
        if self.drafted:
            pairs += [self.policy_pair, (b"ratelimit", template % remaining)]
        return pairs

    def windows(self, decision: Decision) -> tuple[WindowState, ...]:
        rows = zip(self.fixed, decision.remaining, decision.reset, strict=True)
        return tuple(WindowState(name, unit, limit, r, at, sec) for (name, unit, limit, sec), r, at in rows)

    def quota(self, decision: Decision) -> Quota:
        return Quota(self.plan.name, partial(self.windows, decision))


def merge(head: Head, pairs: list[Pair], face: Face) -> None:
    """Add `pairs` to a head that has such fields already: from the application, or from a policy inside."""
    ours = dict(pairs)
    remaining = head.get(b"x-ratelimit-remaining")
    if not any(head.get(name) is not None for name in X_FIELDS):
        head.headers += [pair for pair in pairs if pair[0] in X_FIELDS]
    elif (
        b"x-ratelimit-remaining" in ours
        and head.status != 429  # they say which window refused
        and remaining is not None
        and remaining.isdigit()
        and int(remaining[:20]) > int(ours[b"x-ratelimit-remaining"])
    ):
        head.remove(*X_FIELDS)
        head.headers += [pair for pair in pairs if pair[0] in X_FIELDS]
    if not face.drafted:
        return
    theirs = [b", ".join(head.get_all(name)) for name in (b"ratelimit-policy", b"ratelimit")]
    names = [member_names(value) if value else frozenset[bytes]() for value in theirs]
    if names[0] is None or names[1] is None:
        return  # an older draft's: a mixture could be read by nobody
    taken = names[0] | names[1]
    suffix, number = "", 1
    while not taken.isdisjoint(face.quoted(suffix)):
        number += 1
        suffix = f"-{number}"
    for name, value in zip((b"ratelimit-policy", b"ratelimit"), theirs, strict=True):
        mine = ours[name]
        if suffix:
            for plain, other in zip(face.quoted(""), face.quoted(suffix), strict=True):
                mine = mine.replace(plain, other)
        head.replace(name, value + b", " + mine if value else mine)

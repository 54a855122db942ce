"""The tokens of one exchange: what was estimated, what was counted on the way, what was used in the end.

    TokenRule(estimate=1_500)
    TokenRule(estimate=by_max_tokens)    # def by_max_tokens(ex): ..., may be async and read `await ex.body(limit)`
    TokenRule(estimate=TokenUsage(input_tokens=900, output_tokens=600, total_tokens=1_500), overrun="overdraw")

What is charged, the first that is known: what the application reported; what the response told; what was counted while
it went out. Never nothing for something, never the whole estimate blindly.
"""

import json
import re
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, Literal

from pydantic import field_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import TokenUsage
from sigil_policy.core.policy import Listed
from sigil_policy.policies.rate_limit.fields import Face
from sigil_policy.policies.rate_limit.tiers import LARGEST, OPTIONS
from sigil_policy.stores.limits import Lease

Estimated = int | TokenUsage | None
Estimate = Callable[[Exchange], Estimated | Awaitable[Estimated]]

USAGE_PATHS = ("metadata.tokens_used.total_tokens", "usage.total_tokens")

_TAIL = 8_192
_BYTES_PER_TOKEN = 4  # of text, as providers estimate it
_LEAST_STEP = 64
_EVENTS = re.compile(rb"(?:\A|(?<=[\r\n]))data:(?! ?\[DONE\])")


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TokenRule:
    """A route that spends language-model tokens.

        TokenRule(estimate=1_500)
        TokenRule(estimate=by_max_tokens, overrun="overdraw")

    Options:
        estimate: tokens to reserve: a number of input and output together, a `TokenUsage` where these have budgets of
            their own, or a function from the exchange to either, which may be async. None (default, also as an
            answer): none are reserved, and requests are refused once nothing remains.
        usage: where a JSON response, or an event of a stream of server-sent events, tells what was used, as paths of
            member names (default: "metadata.tokens_used.total_tokens", "usage.total_tokens"). Asked only when the
            application did not `report_tokens`.
        count: output tokens in a part of a response body, from its bytes to a number (default None: each event of a
            stream of server-sent events, and each line of one of JSON lines, is one token, and 4 bytes of any other
            body are). Used while nothing better is known, and charged when nothing is in the end.
        overrun: what happens to a stream that outgrows its estimate when the budget has no more: "end" (default)
            finishes it with a last event that holds the problem, "overdraw" lets it go on and charges it. Only streams
            of events or of JSON lines can be ended; any other response overdraws.
    """

    estimate: int | TokenUsage | Estimate | None = None
    usage: Listed[str] = USAGE_PATHS
    count: Callable[[bytes], int] | None = None
    overrun: Literal["end", "overdraw"] = "end"

    @field_validator("estimate")
    @classmethod
    def _not_negative(cls, estimate: Any) -> Any:
        numbers = estimate if isinstance(estimate, TokenUsage) else (estimate,) if isinstance(estimate, int) else ()
        if isinstance(estimate, bool) or any(not 0 <= number <= LARGEST for number in numbers):
            raise ValueError(f"an estimate is a number of tokens from 0 to {LARGEST}, a function, or None")
        return estimate

    @cached_property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(path.split(".")) for path in self.usage)


def as_usage(estimate: Estimated, path: str) -> TokenUsage:
    """An estimate as the parts it speaks of. Raises `ValueError` for what is negative."""
    usage = estimate if isinstance(estimate, TokenUsage) else TokenUsage(0, 0, estimate or 0)
    if min(usage) < 0:
        raise ValueError(f"the estimate for {path} is {tuple(usage)} tokens; it must be 0 or more, or None")
    if usage.total_tokens < usage.input_tokens + usage.output_tokens:
        return usage._replace(total_tokens=usage.input_tokens + usage.output_tokens)
    return usage


class Spending:
    """The tokens of one exchange: `used` as far as it was told, `left` of the budget once it is settled.

    `events` says that the response is a stream whose parts are counted, and that can be ended; `overdrawn` that the
    budget was asked for more and has none.
    """

    __slots__ = ("counted", "estimate", "events", "face", "lease", "left", "overdrawn", "rule", "step", "tail", "used")

    def __init__(self, lease: Lease, face: Face, rule: TokenRule, estimate: TokenUsage) -> None:
        self.lease = lease
        self.face = face
        self.rule = rule
        self.estimate = estimate
        self.used: TokenUsage | None = None
        self.left: tuple[int, ...] | None = None
        self.events: re.Pattern[bytes] | None = None
        self.tail = bytearray()
        self.counted = 0
        self.overdrawn = False
        self.step = max(estimate.total_tokens // 2, _LEAST_STEP)

    def watch(self, head: Head) -> None:
        """Look at the head of a response: is it a stream that is counted while it goes out?"""
        if head.get(b"content-encoding") is not None:
            return
        media_type = (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()
        if media_type == b"text/event-stream":
            self.events = _EVENTS
        elif media_type in (b"application/x-ndjson", b"application/jsonl", b"application/json-seq"):
            self.events = _LINES

    def add(self, chunk: bytes) -> None:
        """Count a part of the stream that goes out now."""
        events, count = self.events, self.rule.count
        if events is None:
            return
        self.counted += len(events.findall(chunk)) if count is None else max(count(chunk), 0)
        self.tail += chunk
        if len(self.tail) > 2 * _TAIL:
            del self.tail[:-_TAIL]

    def known(self, ex: Exchange) -> TokenUsage:
        """What the exchange has used so far, by the best source there is."""
        told = ex.get(TokenUsage)
        if told is not None:
            return told
        spent = self.estimate.input_tokens
        return TokenUsage(spent, self.counted, spent + self.counted)

    def missing(self, usage: TokenUsage) -> tuple[int, ...] | None:
        """What the reservation lacks of `usage`; None if it covers it."""
        lacking = tuple([n - held for n, held in zip(self.face.amounts(usage), self.lease.reserved, strict=True)])
        return tuple([max(number, 0) for number in lacking]) if max(lacking) > 0 else None

    def final(self, ex: Exchange) -> TokenUsage:
        """What is charged when the exchange is over."""
        usage = ex.get(TokenUsage) or self.used
        if usage is None and self.tail:
            usage = last_event(ex, self.tail, self.rule)
        if usage is not None:
            return usage
        if not _produced(ex):
            return TokenUsage()
        if self.events is None and not self.counted:
            self.counted = -(-ex.sent_bytes // _BYTES_PER_TOKEN)
        spent = self.estimate.input_tokens
        counted = max(self.counted, 1)
        return TokenUsage(spent, counted, spent + counted)


_LINES = re.compile(rb"\n")


def _produced(ex: Exchange) -> bool:
    """Whether the client may have got something for its tokens."""
    status = ex.status
    return status is not None and (status == 101 or (200 <= status < 300 and ex.sent_bytes > 0))


def last_words(head_events: re.Pattern[bytes], problem: bytes) -> bytes:
    """What ends a stream: its last event, or its last line, is the problem."""
    if head_events is _EVENTS:
        return b"event: error\ndata: " + problem + b"\n\n"
    return problem + b"\n"


def is_json(head: Head) -> bool:
    media_type = (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()
    return (media_type == b"application/json" or media_type.endswith(b"+json")) and head.get(
        b"content-encoding"
    ) is None


def reported(ex: Exchange, text: bytes, rule: TokenRule) -> TokenUsage | None:
    """The tokens that a JSON text tells of; then they are a fact, for logs and others."""
    # Most texts that say nothing are not parsed.
    if not any(path[-1].encode() in text for path in rule.paths):
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for path in rule.paths:
        within: Any = None
        found = document
        for member in path:
            within = found
            found = found.get(member) if isinstance(found, dict) else None
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= LARGEST:
            parts = [within.get(member) for member in ("input_tokens", "output_tokens")]
            known = [part if isinstance(part, int) and 0 <= part <= found else 0 for part in parts]
            usage = TokenUsage(known[0], known[1], found)
            ex.give(usage)
            return usage
    return None


def last_event(ex: Exchange, tail: bytearray, rule: TokenRule) -> TokenUsage | None:
    """The usage in the newest event that tells one; it is usually the last, or the last but one."""
    lines = re.split(rb"\r\n|\r|\n", bytes(tail))
    told = (reported(ex, line[5:] if line.startswith(b"data:") else line, rule) for line in reversed(lines[-64:]))
    return next((used for used in told if used is not None), None)

"""The tokens of one exchange: what was estimated, what was counted on the way, what was used in the end.

    TokenRule(estimate=1_500)
    TokenRule(estimate=by_max_tokens)    # def by_max_tokens(ex): ..., may be async and read `await ex.body(limit)`
    TokenRule(estimate=TokenUsage(input_tokens=900, output_tokens=600, total_tokens=1_500), overrun="overdraw")

What is charged: what the application reported, if the exchange came to its end; else the larger of what it had reported
and what was counted while it went out. Without a report: what the response tells, else what was counted. Never nothing
for something, never the whole estimate blindly. A stream's own events are the text of a model to a sceptic: by default
they may only tell of more than was counted. What was compressed inside the stack cannot be counted by its events, nor
ended.
"""

import json
import re
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, Literal

import structlog
from pydantic import field_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import TokenUsage
from sigil_policy.core.policy import Listed
from sigil_policy.identity.fields import CONFIG
from sigil_policy.policies.rate_limit.fields import Face
from sigil_policy.policies.rate_limit.tiers import LARGEST
from sigil_policy.stores.limits import Lease

Estimated = int | TokenUsage | None
Estimate = Callable[[Exchange], Estimated | Awaitable[Estimated]]

USAGE_PATHS = ("metadata.tokens_used.total_tokens", "usage.total_tokens")

logger = structlog.get_logger("sigil_policy")

_NONE = TokenUsage()
_TAIL = 8_192
_BYTES_PER_TOKEN = 4  # of text, as providers estimate it
_LEAST_STEP = 64
_LINES = (b"application/x-ndjson", b"application/jsonl", b"application/json-seq")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TokenRule:
    """A route that spends language-model tokens.

        TokenRule(estimate=1_500)
        TokenRule(estimate=by_max_tokens, overrun="overdraw")

    Options:
        estimate: tokens to reserve: a number of input and output together, a `TokenUsage` where these have budgets of
            their own, or a function from the exchange to either, which may be async. None (default, also as an
            answer): none are reserved, and requests are refused once nothing remains.
        usage: where a JSON response, or an event of a stream of server-sent events, tells what was used, as paths of
            member names (default None: "metadata.tokens_used.total_tokens" and "usage.total_tokens"; what the events of
            a stream tell there then counts only as far as it is more than was counted). Asked only when the application
            did not `report_tokens`.
        count: output tokens in a part of a response body, from its bytes to a number (default None: each event of a
            stream of server-sent events, and each line of one of JSON lines, is one token, and 4 bytes of any other
            body are). Used while nothing better is known, and charged when nothing is in the end.
        overrun: what happens to a stream that outgrows its estimate when the budget has no more: "end" (default)
            finishes it with a last event that holds the problem, "overdraw" lets it go on and charges it. Only streams
            of events or of JSON lines can be ended; any other response overdraws.
    """

    estimate: int | TokenUsage | Estimate | None = None
    usage: Listed[str] | None = None
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
        return tuple(tuple(path.split(".")) for path in (USAGE_PATHS if self.usage is None else self.usage))


def as_usage(estimate: Any) -> TokenUsage:
    """An estimate as the parts it speaks of. Raises `ValueError` for what is no number of tokens.

    A function of the application may have read it from the request: not even a NaN may come near a counter.
    """
    usage = estimate if isinstance(estimate, TokenUsage) else TokenUsage(0, 0, 0 if estimate is None else estimate)
    if not all(type(number) is int and 0 <= number <= LARGEST for number in usage):
        raise ValueError(f"an estimate is a number of tokens from 0 to {LARGEST}")
    if usage.total_tokens < usage.input_tokens + usage.output_tokens:
        return usage._replace(total_tokens=usage.input_tokens + usage.output_tokens)
    return usage


class Spending:
    """The tokens of one exchange: `used` as far as it was told, `left` of the budget once it is settled.

    `counts` says that the parts of the response are counted as they go out, `ending` what would end it cleanly before
    the problem (None: nothing), and `overdrawn` that the budget was asked for more and has none.
    """

    __slots__ = (
        "before",
        "counted",
        "counting",
        "counts",
        "ending",
        "estimate",
        "face",
        "lease",
        "left",
        "overdrawn",
        "rule",
        "sent_before",
        "step",
        "tail",
        "used",
    )  # fmt: skip

    def __init__(self, lease: Lease, face: Face, rule: TokenRule, estimate: TokenUsage) -> None:
        self.lease = lease
        self.face = face
        self.rule = rule
        self.estimate = estimate
        self.used: TokenUsage | None = None
        self.left: tuple[int, ...] | None = None
        self.counting = rule.count
        self.counts = False
        self.ending: bytes | None = None
        # What went out last, behind the line feed that a first line has not.
        self.tail = bytearray(b"\n")
        self.counted = 0
        self.overdrawn = False
        self.before = _NONE
        self.sent_before = 0
        self.step = max(estimate.total_tokens // 2, _LEAST_STEP)

    def begin(self, before: TokenUsage, sent_before: int) -> None:
        """One of several in an exchange: what was reported and sent `before` is another's."""
        self.before = before
        self.sent_before = sent_before

    def close(self, reported: TokenUsage) -> None:
        """It is settled, and the next one begins: `reported` is what all of them have reported so far."""
        self.used = reported
        self.left = ()

    def told(self, ex: Exchange) -> TokenUsage | None:
        """What was reported."""
        told = ex.get(TokenUsage)
        if told is None or self.before is _NONE:
            return told
        since = TokenUsage(*[max(number - before, 0) for number, before in zip(told, self.before, strict=True)])
        return since if any(since) else None

    def watch(self, head: Head) -> None:
        """Look at the head of a response: is it counted while it goes out, and can it be ended?"""
        media_type = (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()
        if head.get(b"content-encoding") is None:
            if media_type == b"text/event-stream":
                self.ending = b"event: error\ndata: "
            elif media_type in _LINES:
                self.ending = b""
        self.counts = self.counting is not None or self.ending is not None

    def add(self, chunk: bytes) -> None:
        """Count a part of the response that goes out now."""
        self.counted += self._count(chunk)
        self.tail += chunk
        if len(self.tail) > 2 * _TAIL:
            del self.tail[:-_TAIL]

    def _count(self, chunk: bytes) -> int:
        if self.counting is not None:
            # The stream has begun, and somebody pays for it: where the function fails, go on by what is always known.
            try:
                count = self.counting(chunk)
            except Exception:
                logger.exception("rate_limit_count_failed")
            else:
                if type(count) is int and 0 <= count <= LARGEST:
                    return count
                logger.error("rate_limit_count_is_no_number", kind=type(count).__name__)
            self.counting = None
        if self.ending is None:
            return -(-len(chunk) // _BYTES_PER_TOKEN)
        if not self.ending:
            return chunk.count(b"\n")
        # Names may be cut in two wherever a proxy likes: look from before the cut.
        text = bytes(self.tail[-5:]) + chunk
        done = (bytes(self.tail[-12:]) + chunk).count(b"\ndata: [DONE]")
        return text.count(b"\ndata:") + text.count(b"\rdata:") - done

    def known(self, ex: Exchange) -> TokenUsage:
        """What the exchange has used so far: at least what was reported, at least what was counted."""
        told = self.told(ex) or self.used or _NONE
        spent = max(told.input_tokens, self.estimate.input_tokens) if told.total_tokens else self.estimate.input_tokens
        output = max(told.total_tokens - told.input_tokens, told.output_tokens, self.counted)
        return TokenUsage(spent, output, max(told.total_tokens, spent + output))

    def missing(self, usage: TokenUsage) -> tuple[int, ...] | None:
        """What the reservation lacks of `usage`; None if it covers it."""
        lacking = tuple([n - held for n, held in zip(self.face.amounts(usage), self.lease.reserved, strict=True)])
        return tuple([max(number, 0) for number in lacking]) if max(lacking) > 0 else None

    def final(self, ex: Exchange) -> TokenUsage:
        """What is charged when the exchange is over."""
        told = self.told(ex) or self.used
        if told is not None:
            return told if ex.outcome == "ok" or not self.counted else self.known(ex)
        if len(self.tail) > 1:
            told = last_event(ex, self.tail, self.rule)
            if told is not None:
                return told if self.rule.usage is not None else self.known(ex)
        if not self._produced(ex):
            return _NONE
        if not self.counted and not self.counts:
            self.counted = -(-(ex.sent_bytes - self.sent_before) // _BYTES_PER_TOKEN)
        self.counted = max(self.counted, 1)
        return self.known(ex)

    def _produced(self, ex: Exchange) -> bool:
        """Whether the client may have got something for its tokens."""
        status = ex.status
        return status is not None and (status == 101 or 200 <= status < 300) and ex.sent_bytes > self.sent_before


def last_words(ending: bytes, problem: bytes) -> bytes:
    """What ends a stream: its last event, or its last line, is the problem."""
    return ending + problem + (b"\n\n" if ending else b"\n")


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

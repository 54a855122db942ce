"""W3C Trace Context: reading `traceparent` (https://www.w3.org/TR/trace-context-2/ section 3.2).

    trace = parse_traceparent(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    trace.trace_id      # '4bf92f3577b34da6a3ce929d0e0e4736'
    trace.sampled       # True

What is not a valid `traceparent` is none at all: a reader ignores it whole and starts a trace of its own. A request
with two such lines has no valid one; give this function the single line.
"""

import re
from typing import NamedTuple

# Higher versions may add fields after another dash; the four that are known keep their meaning (section 3.2.4).
_FIELDS = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*+)?", re.DOTALL).fullmatch
_NO_TRACE = b"0" * 32
_NO_PARENT = b"0" * 16


class TraceParent(NamedTuple):
    """A valid `traceparent`: the trace, the caller's span in it, and the flags."""

    trace_id: str
    parent_id: str
    flags: int = 0

    @property
    def sampled(self) -> bool:
        """Whether the caller may have recorded its part (bit 0 of the flags)."""
        return bool(self.flags & 1)


def parse_traceparent(line: bytes) -> TraceParent | None:
    """The fields of one `traceparent` line, or None if it is not valid."""
    found = _FIELDS(line.strip(b" \t"))
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == b"ff" or trace_id == _NO_TRACE or parent_id == _NO_PARENT or (more is not None and version == b"00"):
        return None
    return TraceParent(trace_id.decode("ascii"), parent_id.decode("ascii"), int(flags, 16))

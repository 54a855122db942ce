"""Log lines that belong together: the ids of the exchange on the application's own events, and a sink for JSON lines.

    structlog.configure(
        processors=[add_correlation, add_log_level, TimeStamper(fmt="iso"), Redaction()],
        logger_factory=JSONLines(sys.stdout),
        cache_logger_on_first_use=True,
    )

    handler.addFilter(CorrelationFilter())          # plain logging: %(request_id)s, %(trace_id)s

    AccessLog(logger=JSONLines(sys.stdout))         # without structlog

Nothing here configures structlog or logging: the application does.
"""

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.exchange import current_exchange
from sigil_policy.core.facts import Correlation
from sigil_policy.core.problems import encode_json

_MOST_BYTES = 65_536
_FRACTIONS = tuple(b".%03dZ" % milliseconds for milliseconds in range(1000))


def add_correlation(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: adds `request_id`, and `trace_id` if there is one, of the exchange that the code serves.

    What the event has already stays; outside of an exchange, and without `RequestID`, nothing is added.
    """
    exchange = current_exchange()
    correlation = exchange.get(Correlation) if exchange is not None else None
    if correlation is not None:
        event.setdefault("request_id", correlation.request_id)
        if correlation.trace_id is not None:
            event.setdefault("trace_id", correlation.trace_id)
    return event


class CorrelationFilter(logging.Filter):
    """A `logging.Filter` that gives every record a `request_id` and a `trace_id`; `missing` where there is none.

    handler.addFilter(CorrelationFilter())
    handler.setFormatter(logging.Formatter("%(levelname)s [%(request_id)s] %(message)s"))

    Put it on handlers. It lets every record through.
    """

    def __init__(self, missing: str | None = "-") -> None:
        super().__init__()
        self.missing = missing

    def filter(self, record: logging.LogRecord) -> bool:
        found = add_correlation(None, "", {})
        for name in ("request_id", "trace_id"):
            if not hasattr(record, name):
                setattr(record, name, found.get(name, self.missing))
        return True


class JSONLines:
    """Writes events as JSON, one line each: a logger by itself, and a `logger_factory` for structlog.

    log = JSONLines(sys.stdout)
    log.info("started", port=8700)
    # {"timestamp":"2026-11-23T12:00:00.000Z","level":"info","event":"started","port":8700}

    Options:
        file: a file, text or binary (default: standard output). It is never closed.
        batch: how many lines are written together; 1 writes and flushes each (default 1).
        seconds: how long a line of a batch waits at most, in seconds (default 1).
        clock: where the timestamps come from (default: the machine's).

    `timestamp` and `level` are added where the event has none. What JSON cannot say is written as text, never an error;
    orjson is used if it is installed. A batch is also written once it has 64 KiB, by `flush`, and when the interpreter
    exits. Safe in threads; a fork does not write the parent's lines again. As structlog's factory it renders: let the
    last processor return the event (no renderer); a line that a renderer has made into bytes is written as it is.

    Raises `ValueError` for a batch below 1 or a time that is not positive.
    """

    def __init__(self, file: Any = None, *, batch: int = 1, seconds: float = 1.0, clock: Clock = SYSTEM_CLOCK) -> None:
        if batch < 1:
            raise ValueError(f"batch is how many lines are written together, 1 or more, not {batch!r}")
        if not seconds > 0:
            raise ValueError(f"seconds is how long a line waits at most, more than 0, not {seconds!r}")
        self._sink = _Sink(sys.stdout if file is None else file)
        self._batch = batch
        self._seconds = seconds
        self._time = clock.time
        # One tuple: two threads may make it anew at once, and each uses what it made itself.
        self._second = (-1, b"")
        self._line = _find_encoder()
        weakref.finalize(self, self._sink.flush_quietly)

    def __call__(self, *args: Any) -> "JSONLines":
        """What structlog calls for a logger."""
        return self

    def debug(self, event: Any = None, **fields: Any) -> None:
        self._log("debug", event, fields)

    def info(self, event: Any = None, **fields: Any) -> None:
        self._log("info", event, fields)

    def warning(self, event: Any = None, **fields: Any) -> None:
        self._log("warning", event, fields)

    def error(self, event: Any = None, **fields: Any) -> None:
        self._log("error", event, fields)

    def critical(self, event: Any = None, **fields: Any) -> None:
        self._log("critical", event, fields)

    # structlog's other names
    msg = log = info
    warn = warning
    exception = error
    fatal = critical

    def _log(self, level: str, event: Any, fields: dict[str, Any]) -> None:
        if isinstance(event, bytes):
            self._sink.add(event + b"\n", self._batch, self._seconds)
        else:
            self.emit(level, event, fields)

    def emit(self, level: str, event: Any, fields: Mapping[str, Any]) -> None:
        """Write an event whose fields are a mapping already."""
        line = self._line({"timestamp": self._stamp().decode(), "level": level, "event": event, **fields})
        self._sink.add(line, self._batch, self._seconds)

    def writer(self, level: str, event: str) -> Callable[[dict[str, Any]], None]:
        """What writes many events of one name, each from its fields: how their lines begin is encoded once.

        The fields are at least one, and none of them is `timestamp`, `level` or `event`.
        """
        named = self._line({"level": level, "event": event})[1:-2]
        stamp, encode, add, batch, seconds = self._stamp, self._line, self._sink.add, self._batch, self._seconds

        def write(fields: dict[str, Any]) -> None:
            add(b'{"timestamp":"%b",%b,%b' % (stamp(), named, encode(fields)[1:]), batch, seconds)

        return write

    def _stamp(self) -> bytes:
        """RFC 3339, in UTC, with milliseconds."""
        second, milliseconds = divmod(int(self._time() * 1000 + 0.5), 1000)
        said, stamp = self._second
        if second != said:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
            self._second = (second, stamp)
        return stamp + _FRACTIONS[milliseconds]

    def flush(self) -> None:
        """Write what waits."""
        self._sink.flush()

    def __repr__(self) -> str:
        return f"JSONLines(batch={self._batch}, seconds={self._seconds})"


class _Sink:
    """The file and the lines that wait for it. It outlives its `JSONLines` until they are written."""

    def __init__(self, file: Any) -> None:
        self.given = file  # a text file that nobody holds closes its buffer
        self.file = getattr(file, "buffer", file)
        self.text = not hasattr(file, "buffer") and hasattr(file, "encoding")
        self.lock = threading.Lock()
        self.lines: list[bytes] = []
        self.size = 0
        self.timer: threading.Timer | None = None
        _sinks.add(self)

    def add(self, line: bytes, batch: int, seconds: float) -> None:
        lock = self.lock  # a fork puts another in its place
        lock.acquire()  # a `with` costs half as much as all of this
        try:
            lines = self.lines
            lines.append(line)
            self.size += len(line)
            if len(lines) >= batch or self.size >= _MOST_BYTES:
                self._write()
            elif self.timer is None:
                # It is not cancelled when a batch is full: one thread per `seconds`, however many batches there are.
                self.timer = threading.Timer(seconds, self.flush_in_time)
                self.timer.daemon = True
                self.timer.start()
        finally:
            lock.release()

    def flush(self) -> None:
        with self.lock:
            self._write()

    def flush_quietly(self) -> None:
        """Where nobody could hear of it: a file that is gone takes its last lines with it."""
        with suppress(OSError, ValueError):
            self.flush()

    def flush_in_time(self) -> None:
        self.timer = None
        self.flush_quietly()

    def forget(self) -> None:
        """In a forked child: the lines, the timer and whoever holds the lock are the parent's."""
        self.lock = threading.Lock()
        self.lines, self.size, self.timer = [], 0, None

    def _write(self) -> None:
        if not self.lines:
            return
        data = self.lines[0] if len(self.lines) == 1 else b"".join(self.lines)
        # Forgotten first: a file that cannot be written must not make lines pile up.
        self.lines, self.size = [], 0
        if self.text:
            self.file.write(data.decode("utf-8", "replace"))
        else:
            # A raw file may take a part only.
            while data:
                taken = self.file.write(data)
                if taken is None or taken >= len(data):
                    break
                data = data[taken:]
        self.file.flush()


_sinks: weakref.WeakSet[_Sink] = weakref.WeakSet()


def _forget_all() -> None:
    for sink in list(_sinks):
        sink.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _find_encoder() -> Callable[[Any], bytes]:
    """What makes one line of a value."""
    try:
        orjson = import_module("orjson")
    except ImportError:
        return _encode
    fast, line = orjson.dumps, orjson.OPT_APPEND_NEWLINE

    def encode(value: Any) -> bytes:
        try:
            made: bytes = fast(value, None, line)
        except (TypeError, ValueError):  # a lone surrogate, an object, a key that is no string
            return _encode(value)
        return made

    return encode


def _encode(value: Any) -> bytes:
    return encode_json(value) + b"\n"

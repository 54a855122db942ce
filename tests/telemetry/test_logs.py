"""Correlation of log events, and the sink for JSON lines."""

import gc
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import structlog

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.request_id import RequestID
from sigil_policy.telemetry.logs import CorrelationFilter, JSONLines, add_correlation
from sigil_policy.telemetry.redaction import Redaction
from sigil_policy.testing import FrozenClock, drive

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
HEADERS = {"x-request-id": "r1", "traceparent": TRACEPARENT}
CLOCK = FrozenClock(1_700_000_000.123)


def app_that(does):
    async def app(scope, receive, send):
        does()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


class Raw(io.RawIOBase):
    """A raw file that takes at most `most` bytes at a time."""

    def __init__(self, most=10_000):
        self.most = most
        self.written = b""
        self.writes = 0
        self.broken = False

    def writable(self):
        return True

    def write(self, data):
        if self.broken:
            raise OSError("no space left")
        self.writes += 1
        self.written += bytes(data[: self.most])
        return min(len(data), self.most)


def events(file):
    return [json.loads(line) for line in file.getvalue().splitlines()]


# --- correlation -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_events_of_the_application_carry_the_ids_of_their_exchange():
    seen = []
    app = app_that(lambda: seen.append(add_correlation(None, "info", {"event": "x"})))
    await drive(PolicyStack(app, [RequestID()]), headers=HEADERS)
    assert seen == [{"event": "x", "request_id": "r1", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}]


@pytest.mark.anyio
async def test_what_an_event_has_stays():
    seen = []
    app = app_that(lambda: seen.append(add_correlation(None, "info", {"request_id": "mine"})))
    await drive(PolicyStack(app, [RequestID()]), headers={"x-request-id": "r1"})
    assert seen == [{"request_id": "mine"}]


def test_outside_of_an_exchange_nothing_is_added():
    assert add_correlation(None, "info", {"event": "x"}) == {"event": "x"}


@pytest.mark.anyio
async def test_plain_logging_gets_the_ids_too(monkeypatch):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(request_id)s %(trace_id)s %(message)s"))
    handler.addFilter(CorrelationFilter())
    logger = logging.getLogger("tests.correlation")
    logger.propagate = False
    logger.setLevel("INFO")
    monkeypatch.setattr(logger, "handlers", [handler])
    await drive(PolicyStack(app_that(lambda: logger.info("in")), [RequestID()]), headers=HEADERS)
    logger.info("out")
    logger.info("given", extra={"request_id": "mine"})
    assert out.getvalue().splitlines() == [
        "r1 4bf92f3577b34da6a3ce929d0e0e4736 in",
        "- - out",
        "mine - given",
    ]


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_an_event_is_one_line_with_time_and_level():
    out = io.BytesIO()
    log = JSONLines(out, clock=CLOCK)
    log.info("started", port=8700)
    log.warning("slow\nline", seconds=1.5)
    assert out.getvalue().count(b"\n") == 2
    stamp = "2023-11-14T22:13:20.123Z"
    assert events(out) == [
        {"timestamp": stamp, "level": "info", "event": "started", "port": 8700},
        {"timestamp": stamp, "level": "warning", "event": "slow\nline", "seconds": 1.5},
    ]


def test_the_seconds_of_timestamps_go_on():
    out, clock = io.BytesIO(), FrozenClock(1_700_000_000.5)
    log = JSONLines(out, clock=clock)
    for step in (0, 0.25, 0.5, 60):
        clock.advance(step)
        log.info("x")
    assert [event["timestamp"][-10:] for event in events(out)] == [
        "13:20.500Z",
        "13:20.750Z",
        "13:21.250Z",
        "14:21.250Z",
    ]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_levels(level):
    out = io.BytesIO()
    getattr(JSONLines(out), level)("x")
    assert events(out)[0]["level"] == level


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("\ud800", id="lone-surrogate"),
        pytest.param(object(), id="object"),
        pytest.param({1: 2}, id="number-as-a-name"),
        pytest.param(float("nan"), id="nan"),
        pytest.param(2**80, id="big-number"),
        pytest.param(b"bytes", id="bytes"),
        pytest.param({"a"}, id="set"),
    ],
)
@pytest.mark.parametrize("encoder", ["found", "none"])
def test_what_json_cannot_say_is_no_error(value, encoder, monkeypatch):
    if encoder == "none":
        monkeypatch.setitem(sys.modules, "orjson", None)
    out = io.BytesIO()
    JSONLines(out).info("x", value=value)
    assert events(out)[0]["event"] == "x"


@pytest.mark.parametrize("encoder", ["orjson", "json"])
@pytest.mark.parametrize(
    "fields", [{"a": 1}, {"path": '/é"\\', "b": [1, {"c": None}]}, {"odd": {1, 2}, "lone": "\ud800"}]
)
def test_a_writer_writes_the_lines_that_emit_writes(fields, encoder, monkeypatch):
    if encoder == "json":
        monkeypatch.setitem(sys.modules, "orjson", None)
    out, clock = io.BytesIO(), FrozenClock(1_700_000_000.9996)
    log = JSONLines(out, clock=clock)
    log.emit("warning", 'exchange "x"', fields)
    log.writer("warning", 'exchange "x"')(fields)
    one, other = out.getvalue().splitlines()
    assert one == other
    assert list(json.loads(one))[:3] == ["timestamp", "level", "event"]
    assert json.loads(one)["timestamp"] == "2023-11-14T22:13:21.000Z"


def test_the_last_lines_of_a_writer_are_written_once_nobody_holds_it():
    out = io.BytesIO()
    write = JSONLines(out, batch=3, seconds=60).writer("info", "exchange")
    gc.collect()
    write({"a": 1})
    write({"a": 2})
    assert out.getvalue() == b""
    del write
    gc.collect()
    assert out.getvalue().count(b"\n") == 2


def test_each_line_is_written_at_once_by_default():
    raw = Raw()
    log = JSONLines(raw)
    log.info("a")
    assert raw.writes == 1


def test_text_files_and_files_with_a_buffer():
    text = io.StringIO()
    JSONLines(text).info("é")
    assert json.loads(text.getvalue())["event"] == "é"
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding="latin-1")
    JSONLines(file).info("日本")
    assert events(buffer)[0]["event"] == "日本"


def test_standard_output_is_the_default(capfdbinary):
    JSONLines().info("x")
    assert b'"event":"x"' in capfdbinary.readouterr().out


def test_a_raw_file_that_takes_a_part_gets_the_rest():
    raw = Raw(most=7)
    JSONLines(raw).info("started", port=8700)
    assert json.loads(raw.written)["port"] == 8700


def test_a_batch_is_written_when_it_is_full():
    raw = Raw()
    log = JSONLines(raw, batch=3, seconds=60)
    log.info("a")
    log.info("b")
    assert raw.written == b""
    log.info("c")
    assert (raw.writes, raw.written.count(b"\n")) == (1, 3)


def test_a_batch_is_written_when_it_is_big():
    raw = Raw(most=1_000_000)
    log = JSONLines(raw, batch=1_000_000, seconds=60)
    for _ in range(10):
        log.info("x" * 10_000)
    assert len(raw.written) >= 65_536
    assert log._sink.size < 65_536


def test_a_batch_is_written_after_its_time():
    raw = Raw()
    log = JSONLines(raw, batch=100, seconds=0.01)
    log.info("a")
    for _ in range(6_000):
        if raw.written:
            break
        time.sleep(0.01)
    assert json.loads(raw.written)["event"] == "a"


def test_flush_writes_what_waits_and_nothing_twice():
    raw = Raw()
    log = JSONLines(raw, batch=100, seconds=60)
    log.info("a")
    log.flush()
    log.flush()
    assert raw.written.count(b"\n") == 1


def test_a_sink_that_nobody_holds_any_more_has_written_everything():
    raw = Raw()
    log = JSONLines(raw, batch=100, seconds=60)
    log.info("a")
    del log
    assert raw.written.count(b"\n") == 1


def test_the_last_batch_is_written_when_the_interpreter_exits():
    program = (
        "import sys; from sigil_policy.telemetry.logs import JSONLines\n"
        "log = JSONLines(sys.stdout, batch=100, seconds=60)\n"
        "log.info('last words')\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(out.stdout)["event"] == "last words"
    assert out.stderr == b""


def test_a_file_that_fails_does_not_make_lines_pile_up():
    raw = Raw()
    log = JSONLines(raw, batch=2, seconds=60)
    raw.broken = True
    log.info("a")
    with pytest.raises(OSError, match="no space"):
        log.info("b")
    assert log._sink.lines == []
    raw.broken = False
    log.info("c")
    log.flush()
    assert json.loads(raw.written)["event"] == "c"


def test_threads_write_whole_lines():
    raw = Raw()
    log = JSONLines(raw, batch=7, seconds=60)
    threads = [threading.Thread(target=lambda: [log.info("x" * 50) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.flush()
    assert [json.loads(line)["event"] for line in raw.written.splitlines()] == ["x" * 50] * 800


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_write_its_parents_lines(tmp_path):
    path = tmp_path / "log"
    with path.open("wb", 0) as file:
        log = JSONLines(file, batch=100, seconds=60)
        log.info("parent")
        child = os.fork()
        if child == 0:
            log.info("child")
            log.flush()
            os._exit(0)
        os.waitpid(child, 0)
        log.flush()
    assert sorted(json.loads(line)["event"] for line in path.read_text().splitlines()) == ["child", "parent"]


@pytest.mark.parametrize("options", [{"batch": 0}, {"seconds": 0}, {"seconds": -1}, {"seconds": float("nan")}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="not "):
        JSONLines(io.BytesIO(), **options)


def test_as_structlogs_factory_it_renders():
    out = io.BytesIO()
    log = structlog.wrap_logger(JSONLines(out)(), processors=[structlog.processors.add_log_level, Redaction()])
    log.error("failed", token="hunter2")
    (event,) = events(out)
    assert event["level"] == "error"
    assert event["token"] == "[REDACTED]"
    factory = JSONLines(out)
    assert factory("any", "arguments") is factory


def test_lines_that_a_renderer_made_are_written_as_they_are():
    out = io.BytesIO()
    JSONLines(out).info(b'{"event":"x"}')
    assert out.getvalue() == b'{"event":"x"}\n'


def test_a_repr_says_how_it_writes():
    assert repr(JSONLines(io.BytesIO(), batch=2)) == "JSONLines(batch=2, seconds=1.0)"

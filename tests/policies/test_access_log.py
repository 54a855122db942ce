"""AccessLog over every kind of exchange. Rows JW-32, AU-11 (no credential in a log), TC-15."""

import io
import json
import logging
from typing import ClassVar

import anyio
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import Exchange, report_tokens
from sigil_policy.core.facts import Correlation, Principal, Quota
from sigil_policy.core.host import Host
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import DEFAULT_STYLE
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.access_log import AccessLog, by_outcome
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.telemetry.logs import JSONLines
from sigil_policy.telemetry.redaction import Redaction
from sigil_policy.testing import FrozenClock, drive
from tests.telemetry.planted import VALUES

pytestmark = pytest.mark.anyio

H = "[REDACTED]"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Collect:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.events = []

    def _log(self, level, event, fields):
        assert event == "exchange"
        self.events.append((level, fields))

    def info(self, event, **fields):
        self._log("info", event, fields)

    def warning(self, event, **fields):
        self._log("warning", event, fields)

    def error(self, event, **fields):
        self._log("error", event, fields)

    @property
    def only(self):
        ((_, fields),) = self.events
        return fields


class Caller(Policy):
    """Somebody calls, with a quota if `counted`."""

    gives: ClassVar[tuple[type, ...]] = (Principal,)
    subject: str = "user_123"
    tier: str | None = "pro"
    counted: str | None = None

    def on_request(self, ex):
        ex.authenticate(Principal(subject=self.subject, tier=self.tier))
        if self.counted is not None:
            ex.give(Quota(self.counted, lambda: ()))


class Refuse(Policy):
    def on_request(self, ex):
        return RATE_EXCEEDED("no")


class Limit(Policy):
    def around(self, ex):
        return _expiring()


class _expiring:
    async def __aenter__(self):
        return None

    async def __aexit__(self, kind, error, traceback):
        raise TimeoutError


def app(*parts, status=200, error=None, after=None, tokens=0, clock=None):
    async def application(scope, receive, send):
        if tokens:
            report_tokens(scope, input_tokens=tokens)
        if error is not None:
            raise error
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": status, "headers": []})
        for index, part in enumerate(parts):
            if clock is not None:
                clock.advance(0.25)
            await send({"type": "http.response.body", "body": part, "more_body": index < len(parts) - 1})
        if clock is not None:
            clock.advance(5)
        if after is not None:
            raise after

    return application


async def logged(application, *policies, around=(), options=None, **request):
    log = Collect()
    stack = PolicyStack(
        application,
        [*around, AccessLog(logger=log, **(options or {})), *policies],
        clock=request.pop("clock", FrozenClock()),
    )
    await drive(stack, **{"raise_errors": False, **request})
    return log.only


async def test_an_exchange_is_one_event_with_all_that_is_known():
    clock = FrozenClock()
    log = Collect()
    stack = PolicyStack(
        app(b"hello ", b"world", tokens=412, clock=clock), [RequestID(), AccessLog(logger=log), Caller()], clock=clock
    )
    headers = {"x-request-id": "r1", "x-session-id": "s1", "x-client-id": "web", "traceparent": TRACEPARENT}
    await drive(stack, "POST", "/v7/agents", headers=headers, query="page=2")
    assert log.events == [
        (
            "info",
            {
                "method": "POST",
                "path": "/v7/agents",
                "status": 200,
                "duration_ms": 500.0,
                "bytes": 11,
                "request_id": "r1",
                "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
                "session_id": "s1",
                "client_id": "web",
                "subject": "user_123",
                "tier": "pro",
                "tokens": 412,
                "outcome": "ok",
            },
        )
    ]


async def test_what_is_not_known_is_left_out():
    assert await logged(app(b"")) == {
        "method": "GET", "path": "/", "status": 200, "duration_ms": 0.0, "bytes": 0, "outcome": "ok"
    }  # fmt: skip


async def test_the_route_is_its_template():
    class Routed(Host):
        def route(self, scope, root):
            return "/v7/agents/{name}"

    log = Collect()
    scope = {"type": "http", "method": "GET", "path": "/v7/agents/alpha"}
    AccessLog(logger=log).on_finish(Exchange(scope, None, SYSTEM_CLOCK, Routed(), DEFAULT_STYLE))
    assert log.only["route"] == "/v7/agents/{name}"
    assert log.only["path"] == "/v7/agents/alpha"


async def test_the_tier_that_was_counted_wins():
    assert (await logged(app(b""), Caller(counted="free")))["tier"] == "free"
    assert (await logged(app(b""), Caller(tier=None, counted="free")))["tier"] == "free"
    assert "tier" not in await logged(app(b""), Caller(tier=None))


async def test_a_refusal_names_who_refused():
    fields = await logged(app(b""), Refuse())
    assert (fields["status"], fields["outcome"], fields["refused_by"]) == (429, "refused", "Refuse")
    assert fields["bytes"] > 0


async def test_an_error_is_named_and_its_text_is_not():
    for policies in ((), (Problems(),)):
        fields = await logged(app(error=ValueError("password=hunter2")), *policies)
        assert (fields["outcome"], fields["error"]) == ("error", "ValueError")
        assert fields.get("status") == (500 if policies else None)
        assert "hunter2" not in repr(fields)


async def test_an_error_after_a_fine_response():
    fields = await logged(app(b"x", after=RuntimeError("late")))
    assert (fields["status"], fields["outcome"], fields["error"]) == (200, "error", "RuntimeError")


async def test_a_timeout():
    fields = await logged(app(b""), Limit())
    assert (fields["outcome"], fields["error"]) == ("timeout", "TimeoutError")


async def test_a_cancellation():
    log = Collect()
    stack = PolicyStack(_forever, [AccessLog(logger=log)])
    with anyio.move_on_after(0.01):
        await drive(stack)
    assert log.only["outcome"] == "cancelled"
    assert "status" not in log.only


async def _forever(scope, receive, send):
    await anyio.sleep_forever()


async def test_a_client_that_left():
    async def reads(scope, receive, send):
        assert (await receive())["type"] == "http.disconnect"

    fields = await logged(reads, incoming=[{"type": "http.disconnect"}])
    assert fields["outcome"] == "disconnected"


async def test_a_connection_that_broke():
    def broken(message):
        raise OSError("gone")

    fields = await logged(app(b""), on_send=broken)
    assert (fields["outcome"], fields["error"]) == ("disconnected", "OSError")


async def test_head_and_streams_count_the_bytes_that_were_sent():
    assert (await logged(app(b"a" * 10, b"b" * 20, b"c")))["bytes"] == 31
    fields = await logged(app(b""), method="HEAD")
    assert (fields["method"], fields["bytes"]) == ("HEAD", 0)


async def test_a_websocket():
    fields = await logged(app(), kind="websocket", path="/v7/stream")
    assert fields == {"method": "WEBSOCKET", "path": "/v7/stream", "status": 101, "duration_ms": 0.0, "outcome": "ok"}


async def test_a_refused_websocket():
    fields = await logged(app(), Refuse(), kind="websocket")
    assert (fields["status"], fields["outcome"]) == (429, "refused")


async def test_two_log_twice_and_do_not_disturb_each_other():
    one, two = Collect(), Collect()
    await drive(PolicyStack(app(b""), [RequestID(), AccessLog(logger=one), AccessLog(logger=two)]))
    assert one.only == two.only


# --- options ---------------------------------------------------------------------------------------------------------


async def test_routes_that_are_not_logged():
    log = Collect()
    stack = PolicyStack(app(b""), [AccessLog(logger=log, skip=("GET /health", "/internal/**"))])
    for path in ("/health", "/internal/metrics", "/internal"):
        await drive(stack, path=path)
    assert log.events == []
    await drive(stack, "POST", "/health")
    await drive(stack, path="/healthy")
    assert [fields["path"] for _, fields in log.events] == ["/health", "/healthy"]


async def test_a_level_for_all():
    log = Collect()
    await drive(PolicyStack(app(b""), [AccessLog(logger=log, level="warning")]))
    assert log.events[0][0] == "warning"


@pytest.mark.parametrize(
    ("application", "policies", "level"),
    [
        (app(b""), (), "info"),
        (app(b"", status=404), (), "info"),
        (app(b"", status=503), (), "error"),
        (app(b""), (Refuse(),), "info"),
        (app(b""), (Limit(),), "error"),
        (app(error=ValueError()), (), "error"),
    ],
    ids=["ok", "not-found", "503", "refused", "timeout", "error"],
)
async def test_a_level_by_outcome(application, policies, level):
    log = Collect()
    stack = PolicyStack(application, [AccessLog(logger=log, level=by_outcome), *policies])
    await drive(stack, raise_errors=False)
    assert log.events[0][0] == level


async def test_a_client_that_left_is_a_warning():
    log = Collect()
    stack = PolicyStack(_forever, [AccessLog(logger=log, level=by_outcome)])
    with anyio.move_on_after(0.01):
        await drive(stack)
    assert log.events[0][0] == "warning"


async def test_the_query_is_logged_on_request_only_and_redacted():
    query = "page=2&api_key=hunter2&to=Bearer+hunter22"
    assert "query" not in await logged(app(b""), query=query)
    fields = await logged(app(b""), query=query, options={"include_query": True})
    assert fields["query"] == f"page=2&api_key={H}&to=Bearer%20{H}"
    assert "query" not in await logged(app(b""), options={"include_query": True})


@pytest.mark.parametrize("logger", [object(), "access", 3], ids=["object", "name", "number"])
def test_a_logger_that_cannot_log_is_refused(logger):
    with pytest.raises(ValidationError, match="logger must have info"):
        AccessLog(logger=logger)


@pytest.mark.parametrize("options", [{"level": "loud"}, {"skip": "/health"}, {"redaction": 1}, {"unknown": 1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        AccessLog(**options)


def test_a_skip_that_is_no_route_is_refused():
    with pytest.raises(ValidationError, match="'health' must be"):
        AccessLog(skip=("health",))


def test_a_level_that_the_logger_lacks_is_refused():
    with pytest.raises(ValidationError, match="no method for the level 'critical'"):
        AccessLog(logger=Collect(), level="critical")


def test_equal_options_are_equal_policies():
    assert AccessLog() == AccessLog()
    assert "logger" not in repr(AccessLog(logger=Collect()))


def test_its_place_is_checked():
    with pytest.raises(PolicyOrderError):
        PolicyStack(app(b""), [AccessLog(), RequestID()])
    with pytest.raises(PolicyOrderError):
        PolicyStack(app(b""), [Caller(), AccessLog()])


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"json-escapes", "json-doubled"}))  # only a whole text is JSON
async def test_no_credential_reaches_the_log_wherever_it_was_put(name):
    """JW-32, AU-11: in the path, the query, a header, the subject, an error."""
    text, secret = VALUES[name]
    ids = {"x-request-id": text, "x-session-id": text, "x-client-id": text, "authorization": text, "cookie": text}
    headers = [(key, value.encode().replace(b"\n", b" ").replace(b"\r", b" ")) for key, value in ids.items()]
    fields = await logged(
        app(error=ValueError(text)),
        Caller(subject=text, tier=text),
        around=[RequestID()],
        path=f"/hook/{text}",
        query=text.encode(),
        headers=headers,
        options={"include_query": True},
    )
    assert secret not in repr(fields)


async def test_an_id_that_is_a_credential_is_hidden():
    key = "sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc"
    fields = await logged(app(b""), around=[RequestID()], headers={"x-request-id": key, "x-session-id": key})
    assert fields["request_id"] == fields["session_id"] == H


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/a\nb", "/a%0Ab"),
        ("/a\r\nlevel=error", "/a%0D%0Alevel=error"),
        ("/\x1b[31m", "/%1B[31m"),
        ("/caf\u00e9", "/caf\u00e9"),
        ("/\udc80", "/%ED%B2%80"),
        ("/a\u2028b", "/a%E2%80%A8b"),
        ("/" + "x" * 70_000, "/" + "x" * 1_023 + "..."),
    ],
    ids=["line-feed", "forged-line", "escape", "letter", "surrogate", "line-separator", "long"],
)
async def test_a_path_is_shown_on_one_line(path, shown):
    for _ in range(2):
        fields = await logged(app(b""), Caller(subject=path), path=path, scope={"raw_path": b""})
        assert fields["path"] == shown
        assert fields["subject"] == shown


@given(st.text(), st.text(max_size=20), st.binary(max_size=60))
def test_every_event_is_one_line_of_json(path, subject, query):
    out = io.BytesIO()
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query}
    ex = Exchange(scope, None, SYSTEM_CLOCK, Host(), DEFAULT_STYLE)
    ex.authenticate(Principal(subject=subject))
    AccessLog(logger=JSONLines(out), include_query=True).on_finish(ex)
    assert out.getvalue().count(b"\n") == 1
    event = json.loads(out.getvalue())
    assert all(value.isprintable() for value in event.values() if isinstance(value, str))


async def test_a_redaction_of_ones_own():
    own = Redaction(patterns=[r"acme_[a-z0-9]{8}"])
    assert (await logged(app(b""), path="/acme_01234567", options={"redaction": own}))["path"] == f"/{H}"
    assert (await logged(app(b""), path="/acme_01234567"))["path"] == "/acme_01234567"


# --- loggers ---------------------------------------------------------------------------------------------------------


async def test_a_logger_that_fails_does_not_fail_the_exchange(caplog):
    class Broken:
        def info(self, event, **fields):
            raise OSError("disk full")

    sent = await drive(PolicyStack(app(b"fine"), [AccessLog(logger=Broken())]))
    assert sent.body == b"fine"
    assert "on_finish of AccessLog failed" in caplog.text


@pytest.fixture
def _structlog():
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_structlog")
@pytest.mark.parametrize("cached", [False, True])
async def test_structlogs_configuration_is_used_as_it_is_when_the_event_is_written(cached):
    stack = PolicyStack(app(b""), [RequestID(), AccessLog()])
    for name in ("one", "two"):
        out = io.BytesIO()
        structlog.configure(
            processors=[structlog.processors.add_log_level, Redaction(), structlog.processors.JSONRenderer()],
            logger_factory=structlog.WriteLoggerFactory(io.TextIOWrapper(out, write_through=True)),
            cache_logger_on_first_use=cached,
        )
        await drive(stack, headers={"x-request-id": name})
        await drive(stack, headers={"x-request-id": name})
        if cached and name == "two":
            break  # what the application asked for: the first configuration stays
        events = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [event["request_id"] for event in events] == [name, name]
        assert events[0]["event"] == "exchange"
        assert events[0]["level"] == "info"


@pytest.mark.usefixtures("_structlog")
async def test_structlogs_own_capture_sees_it():
    with structlog.testing.capture_logs() as events:
        await drive(PolicyStack(app(b""), [AccessLog()]))
    assert [(event["event"], event["log_level"], event["status"]) for event in events] == [("exchange", "info", 200)]


@pytest.mark.usefixtures("_structlog")
async def test_nothing_configures_structlog():
    await drive(PolicyStack(app(b""), [RequestID(), AccessLog(logger=structlog.wrap_logger(structlog.ReturnLogger()))]))
    assert not structlog.is_configured()


async def test_a_bound_logger_keeps_what_it_is_bound_to():
    log = structlog.testing.CapturingLogger()
    bound = structlog.wrap_logger(log, processors=[lambda logger, name, event: event]).bind(service="api")
    await drive(PolicyStack(app(b""), [AccessLog(logger=bound)]))
    assert log.calls[0].method_name == "info"
    assert log.calls[0].kwargs["service"] == "api"


@pytest.mark.parametrize("level", ["info", "warning"])
async def test_a_filtering_logger_filters(level):
    log = structlog.testing.CapturingLogger()
    bound = structlog.wrap_logger(
        log,
        processors=[structlog.processors.KeyValueRenderer(key_order=["event", "service", "status"])],
        wrapper_class=structlog.make_filtering_bound_logger("warning"),
    ).bind(service="api")
    await drive(PolicyStack(app(b""), [AccessLog(logger=bound, level=level)]))
    shown = [(call.method_name, call.args[0][:44]) for call in log.calls]
    assert shown == ([("warning", "event='exchange' service='api' status=200 me")] if level == "warning" else [])


async def test_a_processor_may_drop_the_event(caplog):
    def drop(logger, name, event):
        raise structlog.DropEvent

    log = structlog.testing.CapturingLogger()
    bound = structlog.wrap_logger(log, processors=[drop], wrapper_class=structlog.make_filtering_bound_logger(0)).bind()
    await drive(PolicyStack(app(b""), [AccessLog(logger=bound)]))
    assert log.calls == []
    assert caplog.text == ""


async def test_through_structlog_over_the_standard_library(caplog):
    log = structlog.wrap_logger(
        logging.getLogger("tests.access"),
        processors=[structlog.stdlib.add_log_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    with caplog.at_level("INFO", "tests.access"):
        await drive(PolicyStack(app(b""), [AccessLog(logger=log)]))
    (record,) = caplog.records
    assert record.message == "exchange"
    assert (record.status, record.outcome, record.level) == (200, "ok", "info")


@pytest.mark.parametrize("adapted", [False, True])
async def test_a_logger_of_the_standard_library_gets_the_fields_as_extra(caplog, adapted):
    logger = logging.getLogger("tests.access")
    given = logging.LoggerAdapter(logger, {"service": "api"}) if adapted else logger
    with caplog.at_level("INFO", "tests.access"):
        await drive(PolicyStack(app(b"ok"), [AccessLog(logger=given), Caller(subject="Ada L")]), path="/a b")
        await drive(PolicyStack(app(b"ok"), [AccessLog(logger=given, level="debug")]))
    (record,) = caplog.records
    assert record.msg == "exchange %s"
    assert record.message == (
        'exchange method=GET path="/a b" status=200 duration_ms='
        f'{record.duration_ms} bytes=2 subject="Ada L" tier=pro outcome=ok'
    )
    assert (record.status, record.bytes, record.subject) == (200, 2, "Ada L")
    assert getattr(record, "service", None) == ("api" if adapted else None)


async def test_json_lines_without_any_configuration():
    out = io.BytesIO()
    clock = FrozenClock(1_700_000_000)
    log = AccessLog(logger=JSONLines(out, clock=clock), level=by_outcome)
    await drive(PolicyStack(app(error=ValueError()), [log], clock=clock), raise_errors=False)
    assert json.loads(out.getvalue()) == {
        "timestamp": "2023-11-14T22:13:20.000Z", "level": "error", "event": "exchange", "method": "GET", "path": "/",
        "duration_ms": 0.0, "bytes": 0, "outcome": "error", "error": "ValueError",
    }  # fmt: skip


async def test_ids_agree_with_the_response_and_the_problem():
    """TC-15: the request id and the trace, in the log, the header and the problem."""
    log = Collect()
    sent = await drive(
        PolicyStack(app(b""), [RequestID(), AccessLog(logger=log), Refuse()]), headers={"traceparent": TRACEPARENT}
    )
    assert log.only["request_id"] == sent.header("x-request-id") == sent.json()["request_id"]
    assert log.only["trace_id"] == sent.json()["trace_id"] == TRACEPARENT[3:35]
    assert Correlation in AccessLog.reads

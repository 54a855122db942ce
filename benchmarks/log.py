"""What a log event costs: AccessLog through structlog with redaction, the sink alone, and redaction by itself."""

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import structlog

from benchmarks.timing import Block, calls, measure, rounds_for
from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Correlation, Principal, TokenUsage
from sigil_policy.core.host import Host
from sigil_policy.core.problems import DEFAULT_STYLE, encode_json
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.request_id import RequestID
from sigil_policy.telemetry.logs import JSONLines
from sigil_policy.telemetry.redaction import Redaction

try:
    import orjson
except ImportError:  # the extra `bench` brings it
    orjson = None

CLEAN_LINE = "GET /v7/agents/alpha 200 in 12.3ms for user_12345 request 550e8400-e29b-41d4-a716-446655440000"
SECRET_EVENT = {
    "event": "calling upstream",
    "headers": {"authorization": "Bearer abc.def", "x-api-key": "sk_live_0123456789", "accept": "*/*"},
    "url": "https://api.example.com/v1/run?api_key=abc&limit=10",
    "max_tokens": 100,
}
HOSTILE = {
    "names": "a=",
    "secrets": 'token="',
    "jwt": "eyJ.",
    "urls": "://a:@",
    "schemes": "bearer ",
    "pem": "-----BEGIN RSA PRIVATE KEY-----",
    "percent": "%25",
    "escapes": 'pw:\\\\"',
    "brackets": "token=[",
    "words": "a",
}
HOSTILE_LENGTH = 100_000


class _Routed(Host):
    def route(self, scope: dict[str, Any], root: str) -> str | None:
        return "/v7/agents/{name}"


def _exchanges() -> Callable[[], list[Exchange]]:
    """Finished exchanges with all that an access log says: 100 paths, 100 subjects, and every request its own id."""
    policy, host, numbers = RequestID(), _Routed(), itertools.count()

    def make() -> list[Exchange]:
        made = []
        for _ in range(100):
            number = next(numbers)
            scope = {
                "type": "http",
                "method": "GET",
                "path": f"/v7/agents/agent-{number % 100}",
                "headers": [(b"x-session-id", b"session_abc123"), (b"x-client-id", b"web-app-v2")],
            }
            ex = Exchange(scope, None, SYSTEM_CLOCK, host, DEFAULT_STYLE)  # type: ignore[arg-type]
            policy.on_request(ex)
            correlation = ex[Correlation]
            ex.give(correlation._replace(trace_id="4bf92f3577b34da6a3ce929d0e0e4736"))
            ex.authenticate(Principal(subject=f"user_{number % 100}", tier="pro"))
            ex.give(TokenUsage(total_tokens=412))
            ex.status, ex.sent_bytes, ex.last_byte, ex.done = 200, 100, ex.clock.monotonic(), True
            made.append(ex)
        return made

    return make


def _bound(file: Any, dumps: Callable[..., Any] | None, *, redaction: bool) -> Any:
    processors: list[Any] = [Redaction()] if redaction else []
    processors.append(structlog.processors.JSONRenderer(serializer=dumps or json.dumps))
    sink = structlog.BytesLogger(file) if dumps is not None else structlog.PrintLogger(file)
    return structlog.wrap_logger(
        sink, processors=processors, wrapper_class=structlog.make_filtering_bound_logger(20)
    ).bind()


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys, in µs: `event_us`, an exchange's event through structlog with redaction, as orjson, to /dev/null;
    `event_stdlib_json_us`, the same with json; `event_unredacted_us`, without the processor; `structlog_us`, a plain
    call of structlog with these fields, and `ratio_to_structlog` to it; `event_json_lines_us` and `event_batched_us`,
    straight to `JSONLines`; `event_fields_us`, what AccessLog itself does. `request_*_us` and `response_us` are
    RequestID's hooks, `redact_*_us` the redaction of a clean line, of an event and of one with secrets. In ms:
    `hostile_ms`, the slowest of the hostile texts of 100 KB through the rules, unshortened, `hostile_cut_ms`, as a log
    sees it; `hostile_growth` is the largest ratio of the cost of a doubled one.
    """
    events, redaction = _exchanges(), Redaction()
    policy = RequestID()
    fast = orjson.dumps if orjson is not None else lambda event, **_: encode_json(event)
    plain_events = _plain_events(events)
    fields = plain_events()[0]
    with open(os.devnull, "wb", 0) as binary, open(os.devnull, "w") as text:  # noqa: PTH123
        blocks: dict[str, Block] = {
            "event_us": calls(AccessLog(logger=_bound(binary, fast, redaction=True)).on_finish, events),
            "event_stdlib_json_us": calls(AccessLog(logger=_bound(text, None, redaction=True)).on_finish, events),
            "event_unredacted_us": calls(AccessLog(logger=_bound(binary, fast, redaction=False)).on_finish, events),
            "structlog_us": calls(_structlog_alone(binary, fast), lambda: [fields] * 100),
            "event_json_lines_us": calls(AccessLog(logger=JSONLines(binary)).on_finish, events),
            "event_batched_us": calls(AccessLog(logger=JSONLines(binary, batch=64)).on_finish, events),
            "event_fields_us": calls(AccessLog(logger=_Nowhere()).on_finish, events),
            "redact_line_us": calls(redaction.rules.scrub, lambda: [f"{CLEAN_LINE}"] * 500),
            "redact_event_us": calls(lambda event: redaction(None, "info", event), plain_events),
            "redact_secrets_us": calls(lambda event: redaction(None, "info", event), lambda: [SECRET_EVENT] * 200),
        }
        samples = measure(blocks, rounds=rounds_for(smoke, 60))
    result: dict[str, Any] = {name: samples.cost(name) for name in blocks}
    result["ratio_to_structlog"] = samples.ratio("event_us", to="structlog_us")
    result |= _request_id(policy, smoke)
    result |= _hostile(redaction, smoke)
    return result


def _structlog_alone(file: Any, dumps: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    log = _bound(file, dumps, redaction=False)
    return lambda fields: log.info(**fields)


class _Nowhere:
    def info(self, event: str, **fields: Any) -> None: ...


def _plain_events(exchanges: Callable[[], list[Exchange]]) -> Callable[[], list[Any]]:
    seen: list[Any] = []

    class Collect:
        def info(self, event: str, **fields: Any) -> None:
            seen.append({"event": event, **fields})

    policy = AccessLog(logger=Collect(), redaction=Redaction())

    def make() -> list[Any]:
        seen.clear()
        for ex in exchanges():
            policy.on_finish(ex)
        return list(seen)

    return make


def _request_id(policy: RequestID, smoke: bool) -> dict[str, float]:
    def exchanges(*headers: tuple[bytes, bytes]) -> Callable[[], list[Exchange]]:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": list(headers)}
        return lambda: [Exchange(scope, None, SYSTEM_CLOCK, Host(), DEFAULT_STYLE) for _ in range(500)]  # type: ignore[arg-type]

    ex = exchanges()()[0]
    policy.on_request(ex)
    given = exchanges((b"x-request-id", b"550e8400-e29b-41d4-a716-446655440000"))
    samples = measure(
        {
            "request_new_us": calls(policy.on_request, exchanges()),
            "request_given_us": calls(policy.on_request, given),
            "response_us": calls(
                lambda head: policy.on_response(ex, head),
                lambda: [Head(200, [(b"content-type", b"text/plain"), (b"content-length", b"2")]) for _ in range(500)],
            ),
        },
        rounds=rounds_for(smoke, 60),
    )
    return {name: samples.cost(name) for name in samples.costs}


def _hostile(redaction: Redaction, smoke: bool) -> dict[str, float]:
    scrub = redaction.rules.scrub
    blocks: dict[str, Block] = {}
    for name, unit in HOSTILE.items():
        for times in (1, 2):
            length = HOSTILE_LENGTH * times // (50 if smoke else 1)
            text = (unit * length)[:length]
            blocks[f"{name}{times}"] = calls(scrub, lambda text=text: [text])  # type: ignore[misc]
            if times == 1:
                blocks[f"{name}0"] = calls(redaction.value, lambda text=text: [text])  # type: ignore[misc]
    samples = measure(blocks, rounds=rounds_for(smoke, 7))
    return {
        "hostile_ms": max(samples.cost(f"{name}1") for name in HOSTILE) / 1000,
        "hostile_cut_ms": max(samples.cost(f"{name}0") for name in HOSTILE) / 1000,
        "hostile_growth": max(samples.ratio(f"{name}2", to=f"{name}1") for name in HOSTILE),
    }

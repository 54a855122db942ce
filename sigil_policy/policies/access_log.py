"""Writes one structured event for every exchange, however it ended.

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(skip=["/health"]), Problems()])

    {"event": "exchange", "method": "GET", "route": "/v7/agents/{name}", "path": "/v7/agents/alpha", "status": 200,
     "duration_ms": 3.271, "bytes": 412, "request_id": "...", "subject": "user_123", "tier": "pro", "outcome": "ok"}

What it guarantees:

* Exactly one event per exchange that reached this policy: answered, refused, failed, timed out, cancelled, left.
* No secret in it, also where no redaction is configured: no header and no body is ever logged, the query only by
  `include_query`, redacted; paths, subjects and ids are searched for credentials; of an error there is its type, never
  its text.
* One event is one line: control characters in a path or a subject are escaped, and both are cut at 1,024 characters.
* It never fails an exchange: what a logger raises is logged by the stack, and that is all.

Fields that are not known are left out: `method`, `route`, `path`, `query`, `status`, `duration_ms` (until the last byte
was sent), `bytes` (of the body), `request_id`, `trace_id`, `session_id`, `client_id`, `subject`, `tier`, `tokens`,
`outcome` (`ok`, `refused`, `error`, `timeout`, `cancelled`, `disconnected`), `refused_by`, `error`.

Place it inside RequestID and outside of everything whose refusals should be logged.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, get_args
from urllib.parse import quote

import structlog
from pydantic import Field, field_validator, model_validator

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Correlation, Principal, Quota, TokenUsage
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.core.routing import parse_route
from sigil_policy.telemetry.logs import JSONLines
from sigil_policy.telemetry.redaction import Redaction

Level = Literal["debug", "info", "warning", "error", "critical"]

Write = Callable[[dict[str, Any]], Any]

_EVENT = "exchange"
_LONGEST = 1_024


def by_outcome(ex: Exchange) -> Level:
    """A level for `AccessLog(level=by_outcome)`: `error` where the service failed, `warning` where it was cut short.

    `error` is an unhandled error, a timeout or a 5xx; `warning` a cancellation or a client that left; else `info`.
    """
    outcome = ex.outcome
    if outcome in ("error", "timeout") or (ex.status is not None and ex.status >= 500):
        return "error"
    return "warning" if outcome in ("cancelled", "disconnected") else "info"


class AccessLog(Policy):
    """Logs one event per exchange.

    AccessLog()                                         # to structlog's logger "sigil_policy.access"
    AccessLog(logger=logging.getLogger("access"))       # to logging; the fields are in `extra`
    AccessLog(logger=JSONLines(sys.stdout))             # straight to a file, without any configuration
    AccessLog(skip=["/health", "/internal/**"], level=by_outcome)

    Options:
        logger: a structlog logger, a `logging.Logger`, or anything with `info(event, **fields)` and the other levels
            (default None: `structlog.get_logger("sigil_policy.access")`, as structlog is configured at that time).
        level: a level's name, or a function from the exchange to one, such as `by_outcome` (default "info").
        skip: routes that are not logged, as `"GET /health"` or `"/internal/**"` (default none).
        include_query: whether the query string is logged, redacted (default False).
        redaction: what is secret, as a `Redaction` (default None: the default rules).

    Raises `ValidationError` (a `ValueError`) for a logger that cannot log (at its level) and a route that is none.
    """

    reads: ClassVar[tuple[type, ...]] = (Correlation,)
    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    logger: Any = Field(default=None, repr=False)
    level: Level | Callable[[Exchange], Level] = "info"
    skip: Listed[str] = ()
    include_query: bool = False
    redaction: Redaction | None = None

    @field_validator("logger")
    @classmethod
    def _can_log(cls, logger: Any) -> Any:
        if logger is not None and not isinstance(logger, _Proxy) and not callable(getattr(logger, "info", None)):
            raise ValueError(
                f"logger must have info(event, **fields), as structlog's have; {type(logger).__name__} has none"
            )
        return logger

    @field_validator("skip")
    @classmethod
    def _are_routes(cls, skip: tuple[str, ...]) -> tuple[str, ...]:
        for route in skip:
            parse_route(route)
        return skip

    @model_validator(mode="after")
    def _can_log_at_its_level(self) -> Self:
        logger, level = self.logger, self.level
        if logger is None or isinstance(logger, _Proxy) or not isinstance(level, str):
            return self
        if not callable(getattr(logger, level, None)):
            raise ValueError(f"logger {type(logger).__name__} has no method for the level {level!r}")
        return self

    def rules(self) -> Mapping[str, Any] | None:
        return dict.fromkeys(self.skip, True)

    @cached_property
    def _redaction(self) -> Redaction:
        return self.redaction or Redaction()

    @cached_property
    def _tools(self) -> tuple[set[str], Callable[[str], Any], Write | None]:
        """What every event takes: the texts known to be clean, the test for harmless ones, and what writes it if its
        level is always the same."""
        rules = self._redaction.rules
        return rules.clean, rules.harmless, self._writers[self.level] if isinstance(self.level, str) else None

    @cached_property
    def _writers(self) -> Mapping[str, Write]:
        """By level, what writes an event with these fields."""
        logger = self.logger
        if logger is None:
            logger = structlog.get_logger("sigil_policy.access")
        if isinstance(logger, JSONLines):
            return {level: logger.writer(level, _EVENT) for level in _LEVELS}
        if isinstance(logger, _Proxy):
            return {level: _through_structlog(logger, level) for level in _LEVELS}
        if isinstance(logger, logging.Logger | logging.LoggerAdapter):
            return {level: _through_logging(logger, level) for level in _LEVELS}
        return {level: _through(logger, level) for level in _LEVELS if hasattr(logger, level)}

    def on_finish(self, ex: Exchange) -> None:
        if self.skip and ex.rule(self):
            return
        # Nearly every text was logged before: what is known to be clean is asked first.
        clean, harmless, write = self._tools
        method, path, route, status, ended = ex.method, ex.path, ex.route, ex.status, ex.last_byte
        if ended is None:
            ended = ex.clock.monotonic()
        fields: dict[str, Any] = {
            "method": method if method in clean else self._shown(method),
            "route": route,
            "path": path if path in clean else self._shown(path),
            "status": status,
            "duration_ms": int((ended - ex.started_monotonic) * 1_000_000) / 1000,
            "bytes": ex.sent_bytes,
        }
        if route is None:
            del fields["route"]
        if status is None:
            del fields["status"]
        if method == "WEBSOCKET":
            del fields["bytes"]
        if self.include_query and ex.query:
            # A plus is a space in a form, and "Bearer+abc" a credential.
            fields["query"] = self._shown(ex.query.decode("latin-1").replace("+", "%20"))
        correlation = ex.get(Correlation)
        if correlation is not None:
            request_id, session_id, client_id, _, trace_id = correlation
            fields["request_id"] = request_id if harmless(request_id) else self._shown(request_id)
            if trace_id is not None:
                fields["trace_id"] = trace_id
            if session_id is not None:
                fields["session_id"] = session_id if session_id in clean else self._shown(session_id)
            if client_id is not None:
                fields["client_id"] = client_id if client_id in clean else self._shown(client_id)
        quota = ex.get(Quota)
        tier = None if quota is None else quota.tier
        principal = ex.principal
        if principal is not None:
            subject = principal.subject
            fields["subject"] = subject if subject in clean else self._shown(subject)
            tier = tier or principal.tier
        if tier is not None:
            fields["tier"] = tier if tier in clean else self._shown(tier)
        usage = ex.get(TokenUsage)
        if usage is not None:
            fields["tokens"] = usage.total_tokens
        fields["outcome"] = ex.outcome
        if ex.refused_by is not None:
            fields["refused_by"] = ex.refused_by
        if ex.error is not None:
            fields["error"] = type(ex.error).__name__
        if write is None:
            write = self._writers[self.level(ex)]  # type: ignore[operator]  # a function: else its writer is known
        write(fields)

    def _shown(self, text: str) -> str:
        """`text` without secrets, on one line, and no longer than a log line should be."""
        if len(text) > _LONGEST:
            text = f"{text[:_LONGEST]}..."
        text = self._redaction.text(text)
        return text if text.isprintable() else quote(text, safe=_VISIBLE, errors="surrogatepass")


_NUMBERS = logging.getLevelNamesMapping()
_FILTERING = frozenset(map(structlog.make_filtering_bound_logger, (0, 10, 20, 30, 40, 50)))
_LEVELS: tuple[str, ...] = get_args(Level)
_VISIBLE = "".join(map(chr, range(0x20, 0x7F)))
_Proxy = type(structlog.get_logger())


def _through(logger: Any, level: str) -> Write:
    method = getattr(logger, level)
    if type(logger) not in _FILTERING or not logger.is_enabled_for(_NUMBERS[level.upper()]):
        return lambda fields: method(_EVENT, **fields)
    # structlog's own loggers copy the fields twice on their way to this call, which is theirs for wrapper classes.
    process, output = logger._process_event, getattr(logger._logger, level)  # noqa: SLF001

    def write(fields: dict[str, Any]) -> None:
        try:
            arguments, named = process(level, _EVENT, fields)
        except structlog.DropEvent:
            return
        output(*arguments, **named)

    return write


def _through_structlog(proxy: Any, level: str) -> Write:
    """Bind a logger once, and again when structlog has been configured anew: a proxy binds one for every event."""
    through: Write | None = None
    seen: tuple[Any, ...] = ()
    forever = False

    def write(fields: dict[str, Any]) -> None:
        nonlocal through, seen, forever
        if not forever or through is None:
            config = structlog.get_config()
            now = tuple(config[name] for name in ("processors", "wrapper_class", "context_class", "logger_factory"))
            if through is None or any(one is not other for one, other in zip(now, seen, strict=True)):
                through, seen = _through(proxy.bind(), level), now
                forever = config["cache_logger_on_first_use"]
        through(fields)

    return write


def _through_logging(logger: Any, level: str) -> Write:
    own: Mapping[str, Any] = {}
    if isinstance(logger, logging.LoggerAdapter):
        # It would put its own `extra` in the place of ours.
        logger, own = logger.logger, logger.extra or {}
    number = _NUMBERS[level.upper()]

    def write(fields: dict[str, Any]) -> None:
        if logger.isEnabledFor(number):
            # The template is the same for every event, as tools that group by it expect.
            logger.log(number, "exchange %s", _Pairs(fields), extra={**own, **fields})

    return write


class _Pairs(dict[str, Any]):
    """Fields that print as `name=value`, once somebody prints them."""

    def __str__(self) -> str:
        return " ".join(
            f'{name}="{value}"' if isinstance(value, str) and " " in value else f"{name}={value}"
            for name, value in self.items()
        )

"""Keeps secrets out of logs: a structlog processor, a `logging.Filter`, and a function for everything else.

    redact({"user": "ada", "password": "hunter2", "max_tokens": 100})
    # {'user': 'ada', 'password': '[REDACTED]', 'max_tokens': 100}

    structlog.configure(processors=[..., format_exc_info, Redaction(), JSONRenderer()])

    handler.addFilter(RedactionFilter())            # plain logging

What it guarantees:

* It looks everywhere: mappings, lists, tuples, sets, pairs such as raw headers, dataclasses, JSON inside of strings,
  query strings, URLs, tracebacks, bytes, the texts of objects, keys. What is secret, `SecretRules` says.
* What a validation has refused is not repeated: of the errors of pydantic, msgspec, attrs and Django, as texts or as
  lists, the input is hidden, whatever its field is called.
* What it is given is never changed: a value with nothing secret in it comes back as it is, else a copy.
* It never raises, it is idempotent, and its time is linear in what it reads: at most 10,000 values and 20 levels of an
  event, and texts of 32 KiB (of a longer one the beginning is kept). What lies beyond is hidden, not shown.
* `None`, booleans and empty values of a secret name stay: they say that there is no secret.

It knows what secrets usually look like; a secret in a sentence that looks like any other word is not found. Place the
processor last before the renderer. An `exc_info` that nobody has rendered until then is rendered by it.
"""

import dataclasses
import datetime as dt
import decimal
import json
import logging
import sys
import traceback
import uuid
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from typing import Any

from sigil_policy.telemetry.literals import REDACTED
from sigil_policy.telemetry.sensitive import CLEAR, COUNT, SECRET, SecretRules, is_empty, is_number

_DEPTH = 20
_VALUES = 10_000
_LONGEST = 32_768
_KEPT = 8_192  # scrubbing makes a text longer, at most fourfold: what was cut once is not cut again
_REMEMBERED = 4_096
_SHORT = 128
_COUNTED = 8

_NUMBERS = (int, float, complex, decimal.Decimal)
_PLAIN = (*_NUMBERS, dt.date, dt.time, dt.timedelta, uuid.UUID, type(None), logging.LogRecord)
_PLAIN_TYPES = frozenset((*_NUMBERS, bool, type(None)))

# Mappings that describe another value: HAR and OpenTelemetry attributes, pydantic's errors.
_DESCRIBED = (("name", "value"), ("key", "value"), ("header", "value"), ("field", "value"), ("loc", "input"))

# One of pydantic's errors, and what it repeats of the input. `msg` is a text.
_PYDANTIC = frozenset(("loc", "msg", "input"))
_REPEATED = frozenset(("input", "ctx"))

# What a LogRecord has by itself.
_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_DEFAULT_RULES = SecretRules()


class Redaction:
    """A structlog processor that hides secrets; its methods serve everything else.

    redaction = Redaction(names=["x-internal"], safe=["csrf_token"], patterns=[r"acme_[a-z0-9]{32}"])
    redaction.value({"x_internal": "abc"})      # {'x_internal': '[REDACTED]'}

    Options:
        names: more endings of secret names, in any spelling (default none).
        safe: endings of names that are readable after all (default none).
        patterns: regular expressions of more secret values (default none). They see hostile text: bound their repeats.

    Raises `ValueError` for a pattern or a name that is none, `TypeError` for one string where a list belongs.
    """

    def __init__(self, *, names: Iterable[str] = (), safe: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
        options = (tuple(names), tuple(safe), tuple(patterns))
        # What one user of the default rules has found clean, no other has to read again.
        self.rules = SecretRules(*options) if any(options) else _DEFAULT_RULES

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """What structlog calls."""
        try:
            rules = self.rules
            if event.keys() <= rules.clear_names and self._is_clean(event):
                for name in rules.counted_names:
                    if name in event and type(event[name]) not in _PLAIN_TYPES:
                        break
                else:
                    return event
            if event.get("exc_info"):
                event = _with_traceback(event)
            redacted: MutableMapping[str, Any] = _Walk(self.rules).visit(event, _DEPTH)
            self._learn(event)
        except Exception:  # noqa: BLE001  a log line that cannot be read must not be shown, and must not break anything
            return {"event": REDACTED}
        return redacted

    def _is_clean(self, event: Mapping[str, Any]) -> bool:
        """Whether nothing in the values is secret, whatever their names are; says no to what is not flat."""
        clean, harmless, plain = self.rules.clean, self.rules.harmless, _PLAIN_TYPES
        try:
            for value in event.values():
                if value not in clean:
                    kind = type(value)
                    if kind not in plain and (kind is not str or not (harmless(value) or self.text(value) is value)):
                        return False
        except TypeError:  # something in there is a container
            return False
        return True

    def value(self, value: Any) -> Any:
        """`value` without secrets: the same object if there are none."""
        try:
            return _Walk(self.rules).visit(value, _DEPTH)
        except Exception:  # noqa: BLE001  see above
            return REDACTED

    def text(self, text: str) -> str:
        """`text` without secrets: the same object if there are none. JSON stays JSON."""
        rules = self.rules
        if text in rules.clean or rules.harmless(text):
            return text
        redacted = _Walk(rules).text(text, _DEPTH)
        if redacted is text and len(text) <= _SHORT and text.isprintable():
            if len(rules.clean) >= _REMEMBERED:
                rules.clean.clear()
            rules.clean.add(text)
        return redacted

    def is_secret(self, name: str) -> bool:
        """Whether a value of this name must not be shown."""
        return self.rules.is_secret(name)

    def _learn(self, event: Mapping[str, Any]) -> None:
        rules = self.rules
        if len(rules.clear_names) >= _REMEMBERED:
            rules.clear_names.clear()
            rules.counted_names.clear()
        for name in event:
            verdict = rules.verdict(name)
            if verdict == SECRET or name == "exc_info" or self.text(name) is not name:
                continue
            if verdict == COUNT:
                if len(rules.counted_names) >= _COUNTED:
                    continue
                rules.counted_names.add(name)
            rules.clear_names.add(name)

    def __repr__(self) -> str:
        return "Redaction(...)" if self.rules.extended else "Redaction()"


class _Walk:
    """One visit to a value and all that is in it. Every method returns what it was given if nothing is secret."""

    __slots__ = ("left", "path", "rules")

    def __init__(self, rules: SecretRules) -> None:
        self.rules = rules
        self.left = _VALUES
        self.path: set[int] = set()

    def visit(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self.text(value, depth) if self._spend() else REDACTED
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, bytes | bytearray | memoryview):
            return self.bytes(value, depth) if self._spend() else REDACTED
        if depth <= 0 or not self._spend():
            return REDACTED
        if id(value) in self.path:
            return "[CYCLE]"
        self.path.add(id(value))
        try:
            return self.inside(value, depth - 1)
        except Exception:  # noqa: BLE001  an object that cannot be read is not shown
            return REDACTED
        finally:
            self.path.discard(id(value))

    def _spend(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self.mapping(value, dict(value.items()), depth)
        if isinstance(value, list | tuple | set | frozenset):
            return self.items(value, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self.mapping(
                value, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, depth
            )
        if hasattr(type(value), "__structlog__"):
            return self.visit(value.__structlog__(), depth)
        # Whatever it is, it will be shown as a text.
        for shown in (repr(value), str(value)):
            clean = self.text(shown, depth)
            if clean is not shown:
                return clean
        return value

    def mapping(self, whole: Any, members: dict[Any, Any], depth: int) -> Any:
        hidden = _REPEATED if members.keys() >= _PYDANTIC else self.described(members)
        made: dict[Any, Any] = {}
        changed = False
        for name, value in members.items():
            clean_name = name if type(name) in _PLAIN_TYPES else self.name(name, depth)
            clean = REDACTED if name in hidden else self.named(name, value, depth)
            made[clean_name] = clean
            changed = changed or clean is not value or clean_name is not name
        return made if changed else whole

    def name(self, name: Any, depth: int) -> Any:
        if isinstance(name, str | bytes):
            return self.visit(name, depth)
        shown = repr(name)
        clean = self.text(shown, depth)
        return name if clean is shown else clean

    def described(self, members: Mapping[Any, Any]) -> Collection[str]:
        """The member whose name another member says: `{"name": "Cookie", "value": "..."}`."""
        for label, holder in _DESCRIBED:
            if label in members and holder in members:
                named = members[label]
                names = named if isinstance(named, list | tuple) else (named,)
                if any(self.verdict(name) == SECRET for name in names):
                    return (holder,)
        return ()

    def verdict(self, name: Any) -> int:
        if isinstance(name, bytes):
            name = name.decode("latin-1")
        return self.rules.verdict(name) if isinstance(name, str) else CLEAR

    def named(self, name: Any, value: Any, depth: int) -> Any:
        """A value under its name."""
        verdict = self.verdict(name)
        if verdict == CLEAR or value is None or isinstance(value, bool):
            return self.visit(value, depth)
        if verdict == COUNT:
            if isinstance(value, (Mapping, *_NUMBERS)):
                return self.visit(value, depth)
            if isinstance(value, list | tuple | set | frozenset):
                return self.items(value, depth, name)
        if isinstance(value, str) and (is_empty(value) or (verdict == COUNT and is_number(value))):
            return value
        if isinstance(value, bytes):
            return value if is_empty(value.decode("latin-1")) else REDACTED.encode()
        return REDACTED

    def items(self, value: Any, depth: int, name: str = "") -> Any:
        fields = getattr(value, "_fields", None) if isinstance(value, tuple) else None
        if fields is not None and len(fields) == len(value):
            made = [self.named(field, item, depth) for field, item in zip(fields, value, strict=True)]
        elif isinstance(value, tuple) and self.is_pair(value):
            made = self.pair(value, depth)
        else:
            made = [self.item(item, depth, name) for item in value]
        if all(clean is item for clean, item in zip(made, value, strict=True)):
            return value
        if isinstance(value, list):
            return made
        if isinstance(value, tuple):
            return tuple(made)
        try:
            return type(value)(made)
        except TypeError:  # a clean copy of a member may not be hashable
            return made

    def item(self, item: Any, depth: int, name: str) -> Any:
        if isinstance(item, list) and self.is_pair(item):
            return self.pair(item, depth - 1) if depth > 0 and self._spend() else REDACTED
        return self.named(name, item, depth) if name else self.visit(item, depth)

    def is_pair(self, value: list[Any] | tuple[Any, ...]) -> bool:
        """A secret name and its value, as raw headers have them."""
        return len(value) == 2 and self.verdict(value[0]) == SECRET

    def pair(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        return [self.name(value[0], depth), self.named(value[0], value[1], depth)]

    def bytes(self, value: bytes | bytearray | memoryview, depth: int) -> Any:
        raw = bytes(value)
        for encoding in ("utf-8", "latin-1"):
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError:
                continue
            clean = self.text(text, depth)
            return value if clean is text else clean.encode(encoding)
        return REDACTED.encode()  # pragma: no cover  every byte is a character of latin-1

    def text(self, text: str, depth: int) -> str:
        if text in self.rules.clean:
            return text
        if len(text) > _LONGEST:
            return f"{self.rules.scrub(text[:_KEPT])}\n[CUT: {len(text)} characters]"
        if text[:1] in ("{", "[", '"', " ", "\n", "\t", "\r") and depth > 0:
            redacted = self.json(text, depth)
            if redacted is not None:
                return redacted
        clean = self.rules.scrub(text)
        return text if clean == text else clean

    def json(self, text: str, depth: int) -> str | None:
        """A text that is JSON, redacted as what it says; None for any other text."""
        if text.strip()[:1] not in ("{", "[", '"'):
            return None
        doubled = False

        def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            nonlocal doubled
            made = dict(pairs)
            doubled = doubled or len(made) < len(pairs)
            return made

        try:
            value = json.loads(text, object_pairs_hook=members)
            clean = self.visit(value, depth - 1)
            # Of two members of one name only one was read: what is written must be what was read.
            return text if clean is value and not doubled else json.dumps(clean, separators=(",", ":"))
        except (ValueError, TypeError, RecursionError):
            return None


def _with_traceback(event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The event with its `exc_info` rendered, since a later renderer would show it as it is."""
    given = event["exc_info"]
    if isinstance(given, tuple):
        given = given[1]
    error = given if isinstance(given, BaseException) else sys.exc_info()[1]
    made = dict(event)
    del made["exc_info"]
    if error is not None:
        made.setdefault("exception", "".join(traceback.format_exception(error)).rstrip("\n"))
    return made


class RedactionFilter(logging.Filter):
    """A `logging.Filter` that hides secrets in the message, its arguments, `extra` fields and the traceback.

    handler.addFilter(RedactionFilter())

    Put it on handlers: a filter on a logger does not see the records of the loggers below it. It lets every record
    through. `redaction` is the `Redaction` to use (default: one with the default rules).
    """

    def __init__(self, redaction: Redaction | None = None) -> None:
        super().__init__()
        self.redaction = redaction or _DEFAULT

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            self._redact(record)
        except Exception:  # noqa: BLE001  logging must not break what logs
            record.msg, record.args, record.exc_info, record.exc_text, record.stack_info = (
                REDACTED,
                (),
                None,
                None,
                None,
            )
        return True

    def _redact(self, record: logging.LogRecord) -> None:
        redaction = self.redaction
        if isinstance(record.msg, Mapping) and not record.args:
            record.msg = redaction.value(record.msg)  # how structlog hands its event on
        else:
            said = self._message(record)
            clean = redaction.text(said)
            if clean is not said:
                record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
            shown = logging.Formatter().formatException(record.exc_info)
            clean = redaction.text(shown)
            if clean is not shown:
                record.exc_text, record.exc_info = clean, None
        elif record.exc_text:
            record.exc_text = redaction.text(record.exc_text)
        if record.stack_info:
            record.stack_info = redaction.text(record.stack_info)
        extra = {name: value for name, value in vars(record).items() if name not in _RECORD}
        if extra:
            record.__dict__.update(redaction.value(extra))

    def _message(self, record: logging.LogRecord) -> str:
        """The message with its arguments redacted by name, if it can be put together with them."""
        given = record.args
        if given:
            record.args = self.redaction.value(given)
            try:
                return record.getMessage()
            except (TypeError, ValueError, KeyError):  # a "%d" whose number was hidden
                record.args = given
        return record.getMessage()


_DEFAULT = Redaction()


def redact(value: Any) -> Any:
    """`value` without secrets, by the default rules: the same object if there are none, else a copy.

    redact({"headers": {"Authorization": "Bearer abc"}})    # {'headers': {'Authorization': '[REDACTED]'}}
    """
    return _DEFAULT.value(value)

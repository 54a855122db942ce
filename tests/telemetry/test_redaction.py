"""Redaction of values, of structlog's events and of logging's records. Rows JW-32, AU-11 (logs)."""

import dataclasses
import io
import json
import logging
import sys
import types
from collections import OrderedDict
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from string import ascii_letters
from typing import NamedTuple
from uuid import UUID

import pydantic
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from sigil_policy.telemetry.redaction import Redaction, RedactionFilter, redact
from tests.telemetry.planted import READABLE_NAMES, SECRET_NAMES, VALUES

H = "[REDACTED]"


class Login(pydantic.BaseModel):
    user: str
    password: str


@dataclasses.dataclass
class Account:
    user: str
    password: str = dataclasses.field(repr=False)


class Credentials(NamedTuple):
    user: str
    password: str


class Key(Enum):
    MAIN = "sk_" + "live_0123456789"


class Opaque:
    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return f"<Opaque {self.text}>"


class Broken:
    def __repr__(self):
        raise RuntimeError("no")


class Rendered:
    def __structlog__(self):
        return {"password": "hunter2"}


NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param({"password": "a", "user": "ada"}, {"password": H, "user": "ada"}, id="name"),
        pytest.param({"a": [{"b": ({"token": "x"},)}]}, {"a": [{"b": ({"token": H},)}]}, id="nested"),
        pytest.param({"password": {"old": "a", "new": "b"}}, {"password": H}, id="container-under-a-secret-name"),
        pytest.param({"otp": 123456}, {"otp": H}, id="number-under-a-secret-name"),
        pytest.param({"password": None, "token": True, "secret": ""}, None, id="nothing-to-hide"),
        pytest.param({"tokens": 5, "X-Tokens": "12", "total_tokens": 1.5}, None, id="counted-tokens"),
        pytest.param({"tokens": ["a", 1], "refresh_tokens": "x"}, {"tokens": [H, 1], "refresh_tokens": H}, id="tokens"),
        pytest.param(
            {"tokens": {"total_tokens": 3, "token": "x"}}, {"tokens": {"total_tokens": 3, "token": H}}, id="usage"
        ),
        pytest.param({"headers": {b"Authorization": b"abc"}}, {"headers": {b"Authorization": H.encode()}}, id="bytes"),
        pytest.param(
            [(b"x-api-key", b"abc"), (b"accept", b"*/*")],
            [(b"x-api-key", H.encode()), (b"accept", b"*/*")],
            id="asgi-headers",
        ),
        pytest.param([["cookie", "a=b"], ["accept", "x"]], [["cookie", H], ["accept", "x"]], id="headers-from-json"),
        pytest.param(["password", "email"], None, id="list-of-names"),
        pytest.param({"loc": ("body", "password")}, {"loc": ("body", "password")}, id="location"),
        pytest.param({"name": "Cookie", "value": "a=b"}, {"name": "Cookie", "value": H}, id="har"),
        pytest.param(
            {"type": "too_short", "loc": ["body", "password"], "input": "abc"},
            {"type": "too_short", "loc": ["body", "password"], "input": H},
            id="pydantic-error",
        ),
        pytest.param('{"token":"a","page":2}', '{"token":"[REDACTED]","page":2}', id="json"),
        pytest.param('{"pin": 1234, "ok": true}', '{"pin":"[REDACTED]","ok":true}', id="json-stays-json"),
        pytest.param('{"page": 2}', None, id="clean-json"),
        pytest.param('{"token": tru', "{" + f'"token": {H}', id="no-json"),
        pytest.param('[{"password": "a"}]', f'[{{"password":"{H}"}}]', id="json-list"),
        pytest.param(
            {"a": '{"b": "{\\"token\\": \\"x\\"}"}'}, {"a": '{"b":"{\\"token\\":\\"[REDACTED]\\"}"}'}, id="json-twice"
        ),
        pytest.param({"sk_" + "live_0123456789": 1}, {H: 1}, id="secret-as-a-name"),
        pytest.param({("a", "Bearer abc"): 1}, {f"('a', 'Bearer {H}')": 1}, id="secret-in-a-tuple-name"),
        pytest.param({"Bearer abcdef"}, {f"Bearer {H}"}, id="set"),
        pytest.param(frozenset({"Bearer abcdef"}), frozenset({f"Bearer {H}"}), id="frozenset"),
        pytest.param(Credentials("ada", "x"), (("ada", H)), id="named-tuple"),
        pytest.param(Account("ada", "x"), {"user": "ada", "password": H}, id="dataclass"),
        pytest.param(Login(user="ada", password="x"), f"Login(user='ada', password='{H}')", id="pydantic-model"),
        pytest.param(Login(user="ada", password=""), None, id="pydantic-model-clean"),
        pytest.param(Opaque("token=abc"), f"<Opaque token={H}", id="object"),
        pytest.param(Rendered(), {"password": H}, id="object-that-structlog-renders"),
        pytest.param(Key.MAIN, f"<Key.MAIN: '{H}'>", id="enum"),
        pytest.param(ValueError("password=abc"), f"ValueError('password={H}", id="exception"),
        pytest.param(KeyError("page"), None, id="clean-exception"),
        pytest.param(Broken(), H, id="broken-object"),
        pytest.param(types.MappingProxyType({"token": "x"}), {"token": H}, id="mapping"),
        pytest.param(OrderedDict(a=1), None, id="clean-mapping"),
        pytest.param(b"Bearer abcdef", b"Bearer [REDACTED]", id="bytes-text"),
        pytest.param(b"\xff\xfe Bearer abcdef", b"\xff\xfe Bearer [REDACTED]", id="bytes-that-are-no-text"),
        pytest.param("é Bearer abcdef".encode(), "é Bearer [REDACTED]".encode(), id="bytes-utf-8"),
        pytest.param(bytearray(b"token=a"), b"token=[REDACTED]", id="bytearray"),
        pytest.param(memoryview(b"token=a"), b"token=[REDACTED]", id="memoryview"),
        pytest.param([1, 1.5, None, True, Decimal(1), NOW, UUID(int=1), 1j], None, id="plain"),
        pytest.param("\ud800 token=a", f"\ud800 token={H}", id="lone-surrogate"),
        pytest.param('{"token": "\\ud800"}', f'{{"token":"{H}"}}', id="lone-surrogate-in-json"),
    ],
)
def test_redact(value, expected):
    """`expected` None: the very same object comes back."""
    result = redact(value)
    if expected is None:
        assert result is value
    else:
        assert result == expected
        assert redact(result) == result


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_name_hides_its_value_wherever_it_stands(name):
    for wrapped in (
        {name: "hunter2"},
        {"a": [{name: "hunter2"}]},
        {"h": [(name, "hunter2")]},
        json.dumps({name: "hunter2"}),
    ):
        assert "hunter2" not in repr(redact(wrapped))


@pytest.mark.parametrize("name", READABLE_NAMES)
def test_a_name_that_only_looks_like_it_stays_readable(name):
    assert redact({name: "12"}) == {name: "12"}


@pytest.mark.parametrize("name", VALUES)
def test_a_secret_value_is_hidden_under_any_name(name):
    text, secret = VALUES[name]
    assert secret not in repr(redact({"note": text, "more": [text.encode()]}))


# --- properties ------------------------------------------------------------------------------------------------------

words = st.text("abcxyz0189 -_/.", max_size=12)
# No letters in bytes either, of which a name or `pw=` could be spelled.
raw = st.lists(st.sampled_from(sorted({*range(256)} - {*ascii_letters.encode()})), max_size=5).map(bytes)
clean = st.one_of(words, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), raw)
planted = st.sampled_from(sorted(VALUES)).map(lambda name: VALUES[name][0])
SECRETS = {secret for _, secret in VALUES.values()}


def wrap(inner):
    keys = st.one_of(words, st.sampled_from(["headers", "data", "max_tokens", "tokens", "password", "note"]))
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.tuples(st.sampled_from([b"authorization", "x-api-key", "accept"]), inner),
        inner.map(lambda value: {"body": _as_json(value)}),
    )


def _as_json(value):
    return json.dumps(value, default=lambda other: other.decode("latin-1") if isinstance(other, bytes) else str(other))


FEWER = settings(max_examples=400)
nested = st.recursive(st.one_of(clean, planted), wrap, max_leaves=12)


@given(nested)
@FEWER
def test_no_planted_secret_survives(value):
    shown = repr(redact(value))
    assert not [secret for secret in SECRETS if secret in shown]


@given(nested)
@FEWER
def test_redacting_twice_is_redacting_once(value):
    once = redact(value)
    assert redact(once) == once


@given(nested)
@FEWER
def test_what_was_given_is_not_changed(value):
    before = repr(value)
    redact(value)
    assert repr(value) == before


@given(st.recursive(clean, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=12))
@FEWER
def test_what_holds_nothing_secret_comes_back_itself(value):
    assert redact(value) is value or isinstance(value, bytes)


@given(
    st.recursive(
        st.text() | st.binary(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )
)
@FEWER
def test_it_never_raises(value):
    redact(value)


@given(st.dictionaries(st.text(max_size=8), nested, max_size=5))
@FEWER
def test_the_result_can_be_written_as_json(event):
    shown = json.dumps(redact(event), default=repr)
    assert not [secret for secret in SECRETS if secret in shown]


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_cycles_end():
    loop = {"a": 1}
    loop["self"] = [loop, loop]
    assert redact(loop) == {"a": 1, "self": ["[CYCLE]", "[CYCLE]"]}


def test_shared_values_are_no_cycle():
    shared = {"a": 1}
    value = [shared, shared]
    assert redact(value) is value


def test_depth_is_bounded_and_what_lies_deeper_is_hidden():
    value = "Bearer abcdef"
    for _ in range(10_000):
        value = [value]
    shown = redact(value)
    for _ in range(20):
        (shown,) = shown
    assert shown == H


def test_the_number_of_values_is_bounded():
    value = ["Bearer abcdef"] * 20_000
    shown = redact(value)
    assert len(shown) == 20_000
    assert set(shown) == {f"Bearer {H}", H}
    assert redact(shown) == shown


def test_a_million_copies_of_one_list_cost_what_ten_thousand_cost():
    value = ["x y"]
    for _ in range(19):
        value = [value] * 10
    assert "x y" in repr(redact(value))


def test_a_long_text_keeps_its_beginning():
    text = "word " * 10_000
    shown = redact(text)
    assert shown.startswith("word word")
    assert shown.endswith("\n[CUT: 50000 characters]")
    assert redact(shown) == shown
    worst = "pw=a " * 10_000
    assert redact(redact(worst)) == redact(worst)


def test_deep_json_is_no_error():
    redact("[" * 30_000)
    redact('{"a":' * 5_000 + '"Bearer abcdef"' + "}" * 5_000)
    assert redact("[1" + "0" * 10_000 + "]")


def test_memory_of_what_was_clean_is_bounded():
    redaction = Redaction(names=["of-its-own"])
    for number in range(10_000):
        redaction(None, "info", {"event": f"event {number}", f"name{number}": "x" * 200})
    assert len(redaction.rules.clean) <= 4_096
    assert len(redaction.rules.clear_names) <= 4_096 + 2
    assert max(map(len, redaction.rules.clean)) <= 128


# --- structlog -------------------------------------------------------------------------------------------------------


def lines(*processors):
    out = io.StringIO()
    log = structlog.wrap_logger(
        structlog.WriteLogger(out), processors=[*processors, structlog.processors.JSONRenderer()]
    )
    return log, lambda: [json.loads(line) for line in out.getvalue().splitlines()]


def test_as_a_processor():
    log, written = lines(Redaction())
    log.info("login of Bearer abcdef", password="x", max_tokens=5, headers={"cookie": "a=b"})
    assert written() == [
        {"event": f"login of Bearer {H}", "password": H, "max_tokens": 5, "headers": {"cookie": H}},
    ]


def test_a_clean_event_passes_as_it_is_and_is_checked_every_time():
    redaction = Redaction()
    for _ in range(3):
        event = {"event": "run", "note": "plain", "n": 1, "f": 0.5, "none": None}
        assert redaction(None, "info", event) is event
        assert redaction(None, "info", {**event, "note": "Bearer abcdef"})["note"] == f"Bearer {H}"
        assert redaction(None, "info", {**event, "note": ["Bearer abcdef"]})["note"] == [f"Bearer {H}"]
        assert redaction(None, "info", {**event, "note": Opaque("token=abc")})["note"] == f"<Opaque token={H}"
        assert redaction(None, "info", {**event, "password": "plain"})["password"] == H


@pytest.mark.parametrize("how", ["true", "exception", "tuple"])
def test_a_traceback_that_nobody_rendered_is_rendered_without_secrets(how):
    log, written = lines(Redaction())
    try:
        raise ValueError("password=hunter2")
    except ValueError as error:
        log.error("failed", exc_info={"true": True, "exception": error, "tuple": sys.exc_info()}[how])
    (event,) = written()
    assert "exc_info" not in event
    assert "Traceback" in event["exception"]
    assert f"ValueError: password={H}" in event["exception"]
    assert "hunter2" not in event["exception"]


def test_exc_info_without_an_exception_adds_nothing():
    assert Redaction()(None, "info", {"event": "x", "exc_info": True}) == {"event": "x"}
    event = {"event": "x", "exc_info": None}
    assert Redaction()(None, "info", event) == event


@pytest.mark.parametrize("processor", [structlog.processors.format_exc_info, structlog.processors.dict_tracebacks])
def test_rendered_tracebacks(processor):
    log, written = lines(processor, Redaction())
    try:
        password = "hunter" + "2"
        raise ValueError(f"postgres://u:{password}@db")
    except ValueError:
        log.exception("failed", api_key="abc")
    assert "hunter2" not in json.dumps(written())
    assert written()[0]["api_key"] == H


def test_it_never_raises_into_the_logging_call():
    class Angry(dict):
        def items(self):
            raise RuntimeError

        def keys(self):
            raise RuntimeError

    assert Redaction()(None, "info", Angry(event="x", password="a")) == {"event": H}


def test_through_the_standard_library_with_structlogs_formatter():
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.stdlib.PositionalArgumentsFormatter(),
                Redaction(),
                structlog.processors.JSONRenderer(),
            ]
        )
    )
    logger = _logger(handler)
    log = structlog.wrap_logger(
        logger,
        processors=[Redaction(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    log.info("with structlog", token="hunter2")
    logger.info("plain password=%s", "hunter2")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"event": "with structlog", "token": H}
    assert second["event"] == f"plain password={H}"


# --- logging ---------------------------------------------------------------------------------------------------------


def _logger(handler):
    logger = logging.getLogger("tests.redaction")
    logger.propagate = False
    logger.setLevel("INFO")
    logger.handlers[:] = [handler]
    return logger


def logged(call, form="%(message)s"):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter(form))
    handler.addFilter(RedactionFilter())
    call(_logger(handler))
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(("plain",), "plain", id="clean"),
        pytest.param(("password=hunter2",), f"password={H}", id="message"),
        pytest.param(("user %s, password=%s", "ada", "hunter2"), f"user ada, password={H}", id="arguments"),
        pytest.param(("%s is %s", "password", "hunter2"), f"password is {H}", id="name-and-value"),
        pytest.param(("%(user)s %(password)s", {"user": "ada", "password": "hunter2"}), f"ada {H}", id="by-name"),
        pytest.param(("%s", {"headers": {"cookie": "hunter2"}}), f"{{'headers': {{'cookie': '{H}'}}}}", id="dict"),
        pytest.param(("otp %(otp)d ok", {"otp": 1234}), "otp 1234 ok", id="number-that-cannot-be-hidden-by-name"),
        pytest.param(("otp=%(otp)d", {"otp": 1234}), f"otp={H}", id="number-hidden-in-the-text"),
        pytest.param((Opaque("token=hunter2"),), f"<Opaque token={H}", id="object-as-message"),
        pytest.param(({"event": "x", "password": "hunter2"},), f"{{'event': 'x', 'password': '{H}'}}", id="mapping"),
        pytest.param(("%d of %d", 3, 4), "3 of 4", id="numbers"),
    ],
)
def test_as_a_filter(arguments, expected):
    assert logged(lambda log: log.info(*arguments)) == expected + "\n"


def test_extra_fields():
    form = "%(message)s %(api_key)s %(context)s %(status)s"
    extra = {"api_key": "hunter2", "context": {"token": "hunter2"}, "status": 200}
    assert logged(lambda log: log.info("x", extra=extra), form) == f"x {H} {{'token': '{H}'}} 200\n"
    assert extra["api_key"] == "hunter2"


def test_tracebacks_and_stacks():
    def fail(log):
        try:
            raise ValueError("password=hunter2")
        except ValueError:
            log.exception("failed", stack_info=True)

    shown = logged(fail)
    assert "hunter2" not in shown
    assert "Traceback" in shown
    assert "Stack (most recent call last)" in shown


def test_a_clean_traceback_stays_with_the_record():
    """Other handlers (an error tracker's) still get the exception itself."""
    try:
        raise ValueError("nothing")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "p", 1, "failed", (), sys.exc_info())
    assert RedactionFilter().filter(record)
    assert record.exc_info is not None
    assert record.exc_text is None


def test_what_was_rendered_before_is_redacted_too():
    record = logging.LogRecord("n", logging.ERROR, "p", 1, "failed", (), None)
    record.exc_text = "ValueError: token=hunter2"
    RedactionFilter().filter(record)
    assert record.exc_text == f"ValueError: token={H}"


def test_a_record_that_cannot_be_read_is_hidden_and_passes():
    record = logging.LogRecord("n", logging.INFO, "p", 1, Broken(), (), None)
    record.msg = "%d"
    record.args = ("password=hunter2",)
    assert RedactionFilter().filter(record) is True
    assert record.getMessage() == H


def test_a_redaction_of_ones_own():
    own = Redaction(names=["codename"], patterns=[r"acme_[a-z0-9]{8}"])
    assert own.value({"codename": "x", "note": "acme_01234567"}) == {"codename": H, "note": H}
    assert own.text("deadbeef") == "deadbeef"
    assert own.is_secret("Code-Name") is False
    assert own.is_secret("X-Codename")
    assert redact({"codename": "x", "note": "acme_01234567"}) == {"codename": "x", "note": "acme_01234567"}
    record = logging.LogRecord("n", logging.INFO, "p", 1, "acme_01234567", (), None)
    RedactionFilter(own).filter(record)
    assert record.getMessage() == H
    assert repr(own) == "Redaction(...)"
    assert repr(Redaction()) == "Redaction()"


def test_patterns_of_ones_own_see_digits_too():
    assert Redaction(patterns=[r"\b[0-9]{16}\b"]).text("4111111111111111") == H

"""What validations repeat of the input: by the libraries themselves, in every form in which it comes into a log."""

import enum
import io
import json
import logging
import traceback
from typing import Annotated, Any, Literal

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from sigil_policy.telemetry.literals import REDACTED
from sigil_policy.telemetry.redaction import Redaction, RedactionFilter, redact
from sigil_policy.telemetry.sensitive import SecretRules

SECRET = "hunter2-Tr0ub4dor"
REDACTION = Redaction()


class Odd:
    def __repr__(self) -> str:
        return f"<Odd\n  {SECRET}>"


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Everything(BaseModel):
    age: int = 1
    colour: Literal["red"] = "red"
    short: Annotated[str, Field(max_length=3)] = ""
    said: str = ""
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat(kind="cat")

    @field_validator("said")
    @classmethod
    def _speaks(cls, said: str) -> str:
        if said:
            raise ValueError(f"we do not say {said!r},\nnor {said} [type=secret] of [REDACTED]")
        return said

    @model_validator(mode="after")
    def _whole(self) -> "Everything":
        assert self.age < 100, f"{SECRET} is {self.age} years old"
        return self


REFUSED: dict[str, dict[str, Any]] = {
    "type": {"age": SECRET},
    "literal": {"colour": SECRET},
    "long": {"short": SECRET * 40},
    "message": {"said": SECRET},
    "assertion": {"age": 1_000},
    "tag": {"pet": {"kind": SECRET}},
    "missing": {"pet": {"name": SECRET}},
    "inside": {"age": {"a": [SECRET, "}]'"], "b": SECRET}},
    "object": {"age": Odd()},
    "bytes": {"age": SECRET.encode()},
    "like-the-end": {"age": f"x, input_type=str] {SECRET}"},
    "quotes": {"age": f"'\"\\' {SECRET}"},
    "lines": {"age": f"a\n{SECRET}\n\tb", "said": f"a\n{SECRET}"},
    "all": {"age": SECRET, "colour": SECRET, "short": SECRET, "said": SECRET, "pet": {"kind": SECRET}},
}


def refusal(name: str) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Everything.model_validate(REFUSED[name])
    return caught.value


def texts_of(error: ValidationError) -> dict[str, str]:
    said, members = str(error), error.errors()
    made = {
        "str": said,
        "repr": repr(error),
        "repr-of-str": repr(said),
        "traceback": "".join(traceback.format_exception(error)),
        "errors": str(members),
        "one-error": f"{members[0]} and more",
        "message": f"refused: {members[0]['msg']}",
        "in-json": json.dumps({"error": said}),
        "in-json-in-a-text": "sent " + json.dumps({"error": said}),
        "twice-in-json": "sent " + json.dumps(json.dumps({"error": said})),
        "in-a-dict": str({"error": said}),
        "cut": said[: said.find("input_value=") + 20],
    }
    if "object" not in said and "Odd" not in said and "bytes" not in said:
        made["json"] = error.json()
        made["json-in-a-text"] = f"sent {error.json()} at once"
        made["json-in-json"] = f"sent {json.dumps(error.json())} at once"
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_what_pydantic_repeats_is_hidden_in_every_form(name: str) -> None:
    error = refusal(name)
    for form, text in texts_of(error).items():
        clean = REDACTION.text(text)
        assert SECRET[:6] not in clean, (form, clean)
        assert REDACTED in clean or form in ("message", "cut"), form
        assert REDACTION.text(clean) == clean, form


def test_what_the_rule_was_and_where_stays() -> None:
    clean = REDACTION.text(str(refusal("all")))
    for kept in (
        "age\n",
        "unable to parse string as an integer [type=int_parsing, ",
        "input_type=str]\n",
        "expected tags",
    ):
        assert kept in clean
    assert clean.count("For further information") == 5
    assert clean.count("\n") == 5 * 3
    assert redact(refusal("all").errors(include_url=False)[1]) == {
        "type": "literal_error",
        "loc": ("colour",),
        "msg": "Input should be 'red'",
        "input": REDACTED,
        "ctx": REDACTED,
    }


@pytest.mark.parametrize("name", REFUSED)
def test_lists_of_errors_are_read_as_what_they_are(name: str) -> None:
    error = refusal(name)
    given = {"event": "refused", "errors": error.errors()}
    before = repr(given)
    clean = REDACTION(None, "info", given)
    assert SECRET[:6] not in repr(clean)
    assert [found["loc"] for found in clean["errors"]] == [found["loc"] for found in error.errors()]
    assert repr(given) == before


@pytest.mark.parametrize("name", REFUSED)
def test_log_records_hold_it_in_the_message_its_arguments_and_the_traceback(name: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactionFilter())
    log = logging.getLogger("refusals")
    log.addHandler(handler)
    log.propagate = False
    error = refusal(name)
    log.error("refused: %s, %r", error, error.errors())
    log.error("refused", exc_info=error)
    log.error(f"refused {error.errors()[0]['msg']}")  # noqa: G004
    log.removeHandler(handler)
    assert "refused" in stream.getvalue()
    assert SECRET[:6] not in stream.getvalue()


def test_fastapis_error_is_a_text_of_dictionaries() -> None:
    from fastapi.exceptions import RequestValidationError

    for name in REFUSED:
        assert SECRET[:6] not in REDACTION.text(str(RequestValidationError(refusal(name).errors())))


class Colour(enum.Enum):
    RED = "red"


class Row(msgspec.Struct):
    age: int = 1
    colour: Colour = Colour.RED
    number: Literal[1] = 1


@pytest.mark.parametrize("body", [{"age": SECRET}, {"colour": SECRET}, {"colour": f"it's '{SECRET}"}])
def test_msgspec(body: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(json.dumps(body), type=Row)
    for text in (str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert SECRET not in REDACTION.text(text)
        assert "$.colour" in REDACTION.text(text) or "colour" not in body


@attrs.define
class Plain:
    kind: int = attrs.field(default=1, validator=attrs.validators.instance_of(int))
    chosen: str = attrs.field(default="a", validator=attrs.validators.in_(["a", "(b"]))
    regex: str = attrs.field(default="a", validator=attrs.validators.matches_re(r"(a)"))


@pytest.mark.parametrize("field", ["kind", "chosen", "regex"])
@pytest.mark.parametrize("value", [SECRET, f"it's) {SECRET}", f'"{SECRET}'])
def test_attrs(field: str, value: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        Plain(**{field: value})  # type: ignore[arg-type]  # that is what is refused
    said = str(caught.value)
    for text in (
        said,
        repr(caught.value),
        str(caught.value.args[0]),
        "".join(traceback.format_exception(caught.value)),
    ):
        assert SECRET not in REDACTION.text(text), text
        assert "must " in REDACTION.text(text)


def test_django() -> None:
    """By its templates as they are written: translating them needs settings, which are one for a whole process."""
    from django.db import models
    from django.forms import ChoiceField

    fields = (models.IntegerField, models.DateField, models.UUIDField, models.DecimalField, models.BooleanField)
    templates: list[Any] = [field.default_error_messages["invalid"] for field in fields]
    for template in (*templates, ChoiceField.default_error_messages["invalid_choice"]):
        said = template._args[0] % {"value": SECRET}
        assert SECRET in said
        for text in (said, str([said]), f"refused: {said}", json.dumps({"age": [{"message": said}]})):
            assert SECRET not in REDACTION.text(text)


@pytest.mark.parametrize(
    "text",
    [
        "the model got input_value=5 and input='x'",
        '{"input": "what the model was asked", "msg": "hello"}',
        "took 3 positional arguments (got 4)",
        "the \u201cbig\u201d one is not a value",
        "a value error was raised",
        "{'loc': 'Paris', 'msg': 'hello', 'inputs': 5}",
        "('password',) is missing",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert REDACTION.text(text) == text


@given(st.text(max_size=80), st.text(max_size=20))
def test_any_input_of_any_text_is_hidden(value: str, around: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Everything.model_validate({"age": f"{value}{SECRET}"[-50:], "colour": f"{SECRET[:10]}{value}"[:50]})
    for text in (str(caught.value), f"{around} {caught.value.errors()}"):
        assert "hunter2" not in REDACTION.text(text)


def test_hostile_echoes_are_read_in_linear_time_and_hidden_to_the_end() -> None:
    text = "Value error, " + "x" * 100_000
    assert SecretRules().scrub(text) == f"Value error, {REDACTED}"
    assert SecretRules().scrub(", input_value=" * 1_000) == f", input_value={REDACTED}"

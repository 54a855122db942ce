"""What libraries that validate repeat of the input they refuse, in their errors' texts.

    hide_echoes("age: Value error, 'hunter2' is weak [type=value_error, input_value='hunter2', input_type=str]")
    # "age: Value error, [REDACTED] [type=value_error, input_value=[REDACTED], input_type=str]"

Known are the texts of pydantic (also its `errors()` as a text), msgspec, attrs and Django. What is said of the rule
that was broken stays; what the input was goes, whatever its field is called: what is refused is often what belongs
into another field. Where an echo has no end that is known, the rest of the text is hidden. A text is read a bounded
number of times from left to right.
"""

import re
from collections.abc import Callable, Iterator

from sigil_policy.telemetry.literals import REDACTED, end_of_brackets, end_of_literal, end_of_quoted

_INPUT_VALUE = re.compile(r", input_value=")
# Pydantic shows 50 characters. Their last ", input_type=" is its own; `repr` breaks no line, a class of one's own may.
_TO_INPUT_TYPE = re.compile(r"[^\n]{0,100}(?=, input_type=)|[\s\S]{0,100}?(?=, input_type=)|[^\n]*+")
_MESSAGE = re.compile(r"(?:Value error|Assertion failed), ")
_MESSAGE_END = re.compile(r" \[type=(?:value|assertion)_error, ")
_BEFORE = re.compile(r"""(\\{0,8}+)(["'])\Z""")
_TAG = re.compile(r"Input tag (\\{0,8}+)'")
_SENTENCE = 2_000
_TAG_END = " does not match any of the expected tags"
_MEMBER = re.compile(r"""(\\{0,8}+["'])(?:input|ctx)\1:[ ]?+""")
_NOT_CALLABLE = re.compile(r"\bNotCallableError\(")
_SATISFIED = re.compile(r"\bsatisfied for value ")
_VALUE = re.compile(r"""Invalid value (?=\\{0,8}+["']|-?[0-9])""")
_AT = " - at `$"
_ENUM = re.compile(r"Invalid enum value ")
_GOT = re.compile(r"\(got ")
_ATTRIBUTE = re.compile(r"\bAttribute\(name=")
_REGEX = re.compile(r"must match regex ")
_CHOICE = re.compile(r"Select a valid choice\. ")
_CURLY = re.compile("\u201c[^\u201c\u201d]*+\u201d(?= value | is not a valid )")


def hide_echoes(text: str) -> str:
    """`text` without the input that a validation has refused. The same object if none is in it."""
    if "nput" in text or "ctx" in text:
        # pydantic: str() and repr() of an error, and `errors()` that was made a text
        if ", input_value=" in text:
            text = _hide(text, _INPUT_VALUE, _end_of_input_value)
        if "Input tag " in text:
            text = _hide(text, _TAG, _end_of_tag)
        if "loc" in text and "msg" in text:
            text = _hide(text, _MEMBER, _end_of_literal)
    if "Value error, " in text or "Assertion failed, " in text:
        text = _hide(text, _MESSAGE, _end_of_message)
    # attrs
    if "must " in text:
        if "NotCallableError(" in text:
            text = _hide(text, _NOT_CALLABLE, _end_of_arguments)
        if "(got " in text:
            text = _hide(text, _GOT, _end_of_got)
        if "must match regex " in text:
            text = _hide(text, _REGEX, _before(" doesn't)"))
    if "satisfied for value " in text:
        text = _hide(text, _SATISFIED, _end_of_literal)
    if "Attribute(name=" in text:  # the arguments behind the message, of which the last is the value
        text = _hide(text, _ATTRIBUTE, _end_of_attribute)
    # msgspec
    if "Invalid enum value " in text:
        text = _hide(text, _ENUM, _end_of_literal)
    if "Invalid value " in text and _AT in text:
        text = _hide_values(text)
    if "Select a valid choice. " in text:  # Django
        text = _hide(text, _CHOICE, _before(" is not one of the available choices"))
    if "\u201d " in text:
        text = _CURLY.sub(f"\u201c{REDACTED}\u201d", text)
    return text


def _hide(text: str, opening: re.Pattern[str], end: Callable[[str, re.Match[str]], int]) -> str:
    parts: list[str] = []
    done = 0
    for start, stop in _spans(text, opening, end):
        parts += (text[done:start], REDACTED)
        done = stop
    if not parts:
        return text
    parts.append(text[done:])
    return "".join(parts)


def _spans(text: str, opening: re.Pattern[str], end: Callable[[str, re.Match[str]], int]) -> Iterator[tuple[int, int]]:
    found = opening.search(text)
    while found is not None:
        start = stop = found.end()
        if not text.startswith(REDACTED, start):
            stop = end(text, found)
            if stop > start:
                yield start, stop
        found = opening.search(text, stop)


def _before(closer: str) -> Callable[[str, re.Match[str]], int]:
    def end(text: str, found: re.Match[str]) -> int:
        stop = text.find(closer, found.end())
        return len(text) if stop < 0 else stop

    return end


def _end_of_input_value(text: str, found: re.Match[str]) -> int:
    value = _TO_INPUT_TYPE.match(text, found.end())
    return len(text) if value is None else value.end()


def _end_of_tag(text: str, found: re.Match[str]) -> int:
    closer = f"{found[1]}' found using "
    stop = text.find(closer, found.end())
    if stop >= 0:
        # A tag may read like what follows a tag: the last of it in the sentence is pydantic's.
        end = text.find(_TAG_END, stop, stop + _SENTENCE)
        stop = stop if end < 0 else text.rfind(closer, stop, end)
    return len(text) if stop < 0 else stop


def _end_of_message(text: str, found: re.Match[str]) -> int:
    quoted = _BEFORE.search(text, max(0, found.start() - 9), found.start())
    if quoted is not None:  # a member of `errors()`
        return end_of_quoted(text, found.end(), len(quoted[1]), quoted[2])
    end = _MESSAGE_END.search(text, found.end())
    return len(text) if end is None else end.start()


def _end_of_literal(text: str, found: re.Match[str]) -> int:
    return end_of_literal(text, found.end())


def _end_of_arguments(text: str, found: re.Match[str]) -> int:
    return end_of_brackets(text, found.end() - 1) - 1


def _end_of_attribute(text: str, found: re.Match[str]) -> int:
    """The end of the line, and of the brackets around it: what `repr` says of a value may have many lines."""
    line = text.find("\n", found.end())
    return len(text) if line < 0 else max(line, end_of_brackets(text, found.start(), depth=1) - 1)


def _hide_values(text: str) -> str:
    """Without what stands between "Invalid value" and where in the input it was."""
    parts: list[str] = []
    for part in text.split(_AT):
        value = _VALUE.search(part)
        ends = part[-1:] in "\"'0123456789"
        parts.append(f"{part[: value.end()]}{REDACTED}" if value is not None and ends else part)
    parts[-1] = text[text.rfind(_AT) + len(_AT) :]
    clean = _AT.join(parts)
    return text if clean == text else clean


def _end_of_got(text: str, found: re.Match[str]) -> int:
    end = end_of_brackets(text, found.end() - len("(got "))
    return end - 1 if text.endswith(")", 0, end) else end

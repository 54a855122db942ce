"""Where a quoted or bracketed value ends that stands in a text: Python's and JSON's, also inside of one another.

All of them read a text once from left to right, and answer its end where nothing closes.
"""

import re
from functools import cache

REDACTED = "[REDACTED]"

OPENING = re.compile(r"""[bBrRuUfF]{0,2}+(\\{0,8}+)(["'])""")
_NESTED = re.compile(r"""[\[{(\])}]|'(?:[^'\\]|\\.)*+'?+|"(?:[^"\\]|\\.)*+"?+""", re.DOTALL)
_FIRST_QUOTE = re.compile(r"[^\"'\\]{0,64}+(\\{1,8}+)[\"']")
_NAMED = re.compile(r"[^\s,;\"'()\[\]{}]*+")


@cache
def closing(escapes: int, quote: str) -> re.Pattern[str]:
    """The quote that closes one which opened behind `escapes` backslashes: JSON inside of JSON has some."""
    return re.compile(rf"(?<!\\)\\{{{escapes}}}{quote}")


@cache
def _nested(escapes: int) -> re.Pattern[str]:
    """Brackets and quoted values, where quotes stand behind `escapes` backslashes."""
    mark = rf"(?<!\\)\\{{{escapes}}}"
    quoted = "|".join(rf"{mark}{quote}.*?(?:{mark}{quote}|\Z)" for quote in ("'", '"'))
    return re.compile(rf"[\[{{(\])}}]|{quoted}", re.DOTALL) if escapes else _NESTED


def end_of_quoted(text: str, start: int, escapes: int, quote: str) -> int:
    """Where the quote is that closes the text which begins at `start`."""
    found = closing(escapes, quote).search(text, start)
    return len(text) if found is None else found.start()


def end_of_brackets(text: str, start: int, depth: int = 0) -> int:
    """What is behind the bracket that closes the one at `start`, or the outermost of `depth` that are open there;
    those inside of quotes do not count."""
    escaped = _FIRST_QUOTE.match(text, start)
    for found in _nested(len(escaped[1]) if escaped is not None else 0).finditer(text, start):
        mark = found[0]
        if mark in "[{(":
            depth += 1
        elif mark in ")}]":
            depth -= 1
            if depth == 0:
                return found.end()
    return len(text)


def end_of_literal(text: str, start: int) -> int:
    """What is behind the value that `repr` or JSON wrote at `start`: quoted, in brackets, `Name(...)` or a number."""
    opened = OPENING.match(text, start)
    if opened is not None:
        found = closing(len(opened[1]), opened[2]).search(text, opened.end())
        return len(text) if found is None else found.end()
    named = _NAMED.match(text, start)
    end = start if named is None else named.end()
    if text.startswith("<", start):
        end = text.find(">", start) + 1 or len(text)
    return end_of_brackets(text, end) if text[end : end + 1] in ("(", "[", "{") else end

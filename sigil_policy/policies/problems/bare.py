"""The errors that frameworks send when nobody has said how an error looks, recognised by their exact form.

    read(404, b"application/json", b'{"title": "404 Not Found"}')           # a Problem, REQ_404
    read(404, b"application/json", b'{"error": "own", "code": 7}')          # None: somebody meant it

A form counts only whole: the status inside it is the status of the response, its names are the names of that status,
and there is no other member. Words that the application gave to the framework's error stay, as `detail`. A form into
which a framework writes exceptions or what was sent loses those words.

====================  ======================  ====================================================================
sent by               measured with           forms
====================  ======================  ====================================================================
Starlette, plain ASGI Starlette 1.10.0        text: the status phrase
FastAPI               0.165.0                 `{"detail": phrase}`, `{"detail": [pydantic's errors]}`, and its own
                                              words about credentials and bodies that cannot be read
Litestar              2.25.0                  `{"status_code", "detail"}`; with `extra`: failed validations only
Quart, Flask          Quart 0.22.0, 0.23.1,   Werkzeug's page: title, heading, one paragraph
                      Werkzeug 3.1.9
Falcon                4.4.0                   `{"title": "404 Not Found"}`, with `description`; the same in XML;
                                              nothing at all where neither is accepted
BlackSheep            2.6.4                   text: the phrase, "Resource not found", "Bad Request: ...";
                                              a list of pydantic's errors
Django                5.2.19, 6.1.3           four pages; the page of a failed CSRF check; an empty 405
====================  ======================  ====================================================================

A debug page has none of these forms. Looking takes bounded time, also at what was made to take long: a body with more
values in it than any form has is not parsed, and no expression is tried on a long text.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from http import HTTPStatus
from typing import Any

from sigil_policy.core.problems import Problem
from sigil_policy.policies.problems.http_errors import from_http_error, unhandled
from sigil_policy.policies.problems.validation import MOST_ERRORS, UNSAID, from_validation_errors

Pairs = Iterable[tuple[bytes, bytes]]

# Several names are used for these: RFC 9110 has renamed them, and Python and the frameworks follow at their own pace.
_ALSO = {
    413: ("Content Too Large", "Request Entity Too Large", "Payload Too Large"),
    414: ("URI Too Long", "Request-URI Too Long", "Request URI Too Long"),
    416: ("Range Not Satisfiable", "Requested Range Not Satisfiable"),
    418: ("I'm a teapot",),
    422: ("Unprocessable Content", "Unprocessable Entity"),
}
_FASTAPI = {400: "There was an error parsing the body", 401: "Not authenticated", 403: "Not authenticated"}
_MEDIA = frozenset((b"text/plain", b"text/html", b"application/json", b"application/xml", b"text/xml"))
_LONGEST_DETAIL = 500
_LONGEST_TEXT = 1_000  # that an expression is tried on
_MOST_VALUES = 512  # in a body that is parsed
_LONGEST_NUMBER = 20  # digits: reading one takes time with their square

_WERKZEUG = re.compile(
    r"<!doctype html>\n<html lang=en>\n<title>(?P<status>\d{3}) (?P<name>[^<]{1,80})</title>\n"
    r"<h1>(?P=name)</h1>\n(?:<p>(?P<text>[^<]*+)</p>\n)?"
)
_DJANGO = re.compile(
    r'\n<!doctype html>\n<html lang="en">\n<head>\n  <title>(?P<title>[^<]{1,80})</title>\n</head>\n<body>\n'
    r"  <h1>(?P=title)</h1><p>(?P<text>[^<]*+)</p>\n</body>\n</html>\n"
)
_DJANGO_TITLES = {
    400: "Bad Request (400)", 403: "403 Forbidden", 404: "Not Found", 500: "Server Error (500)"
}  # fmt: skip
_DJANGO_CSRF = '<!DOCTYPE html>\n<html lang="en">\n<head>'
_DJANGO_CSRF_TITLE = "<h1>Forbidden <span>(403)</span></h1>"
_DJANGO_CSRF_SAYS = re.compile(
    r"\s{1,20}<p>CSRF [^<]{1,200}</p>(?:\s{1,20}<p>[^<]{1,600}</p>){0,6}\s{1,20}</div>\s{1,20}"
)
# The help that is there with DEBUG=True stands where this wants the end.
_DJANGO_CSRF_LAST = '<div id="explanation">'
_DJANGO_CSRF_END = re.compile(
    r"\s{1,20}<p><small>[^<]{1,200}</small></p>\s{1,20}</div>\s{1,20}</body>\s{1,20}</html>\s{0,20}"
)
_ESCAPED = (
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&#39;", "'"),
    ("&#x27;", "'"),
    ("&#34;", '"'),
    ("&quot;", '"'),
    ("&amp;", "&"),
)
_FALCON_XML = re.compile(
    r'<\?xml version="1\.0" encoding="UTF-8"\?><error><title>(?P<title>[^<]{1,200})</title>'
    r"(?:<description>(?P<text>[^<]*+)</description>)?</error>"
)
_FALCON_INPUT = re.compile(
    r'The (?:value provided for the )?"[^"]{1,200}" (?:parameter|header) is (?:required|invalid)\.'
)
_FALCON_TITLES = frozenset(("Invalid parameter", "Missing parameter", "Invalid header value", "Missing header value"))
_LITESTAR_VALIDATION = re.compile(r"Validation failed for [A-Z]+ /.*", re.DOTALL)
_MSGSPEC = re.compile(
    r"(?P<said>(?:Expected `|Object missing required |Object contains unknown |Invalid (?:enum )?value )[^\n]{0,500}?)"
    r"(?: - at `(?:key in )?\$(?P<path>[^`\n]{0,200})`)?"
)
_BLACKSHEEP = "Bad Request: "
_BLACKSHEEP_TEXTS = re.compile(
    r"Missing (?:query|header|route|cookie|form|file) parameter `[^`]+`|Missing body payload|Invalid body payload|"
    r"Expected request content|Declared Content-Type is [^ ]+ but the content cannot be parsed as JSON\.|"
    r"Cannot parse content as JSON|Invalid input: expected a list of objects\.|Invalid parameter\.|Missing Host header"
)
_FIRST_MEMBER = re.compile(r'\{\s*"(?:detail|status_code|title)"\s*:|\[\s*\{\s*"type"\s*:')
_PYDANTIC = frozenset(("type", "loc", "msg", "input", "ctx", "url"))
_DEEPEST = 50
_PLACES = frozenset(("body", "query", "path", "header", "cookie"))
# What validators say of what they wanted. Any other text may repeat what they got.
_SAYS_WHAT_WAS_WANTED = re.compile(
    r"Expected `[^']*|Object missing required field [^']*|Field required|Missing required [^']*|"
    r"Input should [^:]*|(?:String|Value|List|Set|Tuple|Dictionary|Data|Bytes|Decimal) should [^:]*|"
    r"Extra inputs are not permitted"
)


def may_be(head_type: bytes | None) -> bool:
    """Whether a body of this media type can be a form that is known here."""
    return head_type is not None and _media(head_type) in _MEDIA


def read(
    status: int, media_type: bytes, body: bytes, headers: Pairs = (), validation_status: int = 400
) -> Problem | None:
    """The problem that a framework's bare error means, with `headers`; None for what is no such error."""
    kind = _media(media_type)
    if not body:
        return _empty(status, media_type, headers)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if text[0] in "{[":
        return _json(status, kind, text, headers, validation_status)
    found = None
    if kind == b"text/plain":
        found = _plain(status, text)
    elif kind == b"text/html":
        found = _page(status, text)
    elif kind != b"application/json":
        match = _FALCON_XML.fullmatch(text)
        if match is not None:
            said = {"title": _unescaped(match["title"]), "description": _unescaped(match["text"] or "")}
            return _falcon(status, said, headers)
    return None if found is None else _problem(status, found, headers)


def read_head(status: int, media_type: bytes, length: bytes | None, headers: Pairs = ()) -> Problem | None:
    """The same for HEAD without a body, where only the length that it would have tells of it."""
    if length == b"0":
        return _empty(status, media_type, headers)
    if length is None or length not in _lengths(status).get(_media(media_type), ()):
        return None
    return _problem(status, "", headers)


@cache  # of at most 200 statuses
def _phrases(status: int) -> frozenset[str]:
    try:
        own = HTTPStatus(status).phrase
    except ValueError:
        return frozenset()
    return frozenset((own, *_ALSO.get(status, ())))


@cache
def _lengths(status: int) -> Mapping[bytes, frozenset[bytes]]:
    phrases = _phrases(status)
    bare = {
        b"text/plain": [*phrases, *(["Resource not found"] if status == 404 else ())],
        b"application/json": [
            form % value
            for phrase in phrases
            for form, value in (
                ('{"title": "%s"}', f"{status} {phrase}"),
                ('{"detail":"%s"}', phrase),
                ('{"status_code":%s}', f'{status},"detail":"{phrase}"'),
            )
        ],
    }
    return {kind: frozenset(b"%d" % len(form) for form in forms) for kind, forms in bare.items()}


def _media(value: bytes) -> bytes:
    return value.partition(b";")[0].strip().lower()


def _unescaped(text: str) -> str:
    """What Werkzeug, Django and Falcon write for the characters that mean something in HTML, and nothing else."""
    for written, character in _ESCAPED:
        text = text.replace(written, character)
    return text


def _problem(status: int, detail: str, headers: Pairs) -> Problem:
    if status == 500:
        problem = unhandled()
        return Problem(problem.type, problem.detail, headers=tuple(headers))
    return from_http_error(status, None if not detail or detail in _phrases(status) else detail, headers)


def _empty(status: int, media_type: bytes, headers: Pairs) -> Problem | None:
    pairs = list(headers)
    names = {name for name, _ in pairs}
    if media_type == b"application/json" and any(
        b"accept" in map(bytes.strip, value.lower().split(b",")) for name, value in pairs if name == b"vary"
    ):
        return _problem(status, "", pairs)  # Falcon, for a client that accepts neither JSON nor XML
    if status == 405 and b"allow" in names and media_type.startswith(b"text/html"):
        return _problem(status, "", pairs)  # Django's HttpResponseNotAllowed
    return None


def _plain(status: int, text: str) -> str | None:
    if text in _phrases(status) or (status == 404 and text == "Resource not found"):
        return ""
    if status == 400 and text.startswith(_BLACKSHEEP):
        # BlackSheep writes the text of any ValueError here: only what is known to be its own may stay.
        text = text.removeprefix(_BLACKSHEEP)
        return text if len(text) <= _LONGEST_DETAIL and _BLACKSHEEP_TEXTS.fullmatch(text) else ""
    return None


def _page(status: int, text: str) -> str | None:
    match = _WERKZEUG.fullmatch(text)
    if match is not None:
        known = match["status"] == str(status) and _unescaped(match["name"]) in _phrases(status)
        return _unescaped(match["text"] or "")[:_LONGEST_DETAIL] if known else None
    match = _DJANGO.fullmatch(text)
    if match is not None:
        return _unescaped(match["text"])[:_LONGEST_DETAIL] if match["title"] == _DJANGO_TITLES.get(status) else None
    return "CSRF verification failed" if status == 403 and _is_csrf_page(text) else None


def _is_csrf_page(text: str) -> bool:
    if not text.startswith(_DJANGO_CSRF):
        return False
    says, _, end = text.partition(_DJANGO_CSRF_TITLE)[2].partition(_DJANGO_CSRF_LAST)
    return _DJANGO_CSRF_SAYS.fullmatch(says) is not None and _DJANGO_CSRF_END.fullmatch(end) is not None


def _number(digits: str) -> float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else 0.0


_JSON = json.JSONDecoder(parse_int=_number)


def _json(status: int, kind: bytes, text: str, headers: Pairs, validation_status: int) -> Problem | None:
    if not _FIRST_MEMBER.match(text) or sum(map(text.count, ",[{")) > _MOST_VALUES:
        return None  # an application's own words are not parsed
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError):
        return None
    if kind != b"application/json":
        # Litestar keeps the type of the endpoint that has failed.
        known = isinstance(value, dict) and "status_code" in value
        return _litestar(status, value, headers, validation_status) if known else None
    if isinstance(value, list):
        # BlackSheep's list is of the body alone, and does not say so.
        errors = pydantic_errors(value, "body") if status == 400 else None
        return None if errors is None else _invalid(errors, headers, validation_status)
    names = value.keys()
    if names == {"detail"}:
        detail = value["detail"]
        if isinstance(detail, list) and status == 422:
            errors = pydantic_errors(detail, None)
            return None if errors is None else _invalid(errors, headers, validation_status)
        known = isinstance(detail, str) and (detail in _phrases(status) or detail == _FASTAPI.get(status))
        return _problem(status, detail, headers) if known else None
    if "status_code" in names:
        return _litestar(status, value, headers, validation_status)
    return _falcon(status, value, headers, validation_status)


def _litestar(status: int, value: dict[str, Any], headers: Pairs, validation_status: int) -> Problem | None:
    detail, names = value.get("detail"), value.keys()
    if value["status_code"] != status or type(value["status_code"]) is not int or not isinstance(detail, str):
        return None
    if names == {"status_code", "detail"}:
        errors = msgspec_errors(detail) if status == 400 else None
        if errors is not None:
            return _invalid(errors, headers, validation_status)
        return _problem(status, detail[:_LONGEST_DETAIL], headers)
    extra = value.get("extra")
    if names != {"status_code", "detail", "extra"} or status != 400 or not isinstance(extra, list):
        return None
    if _LITESTAR_VALIDATION.fullmatch(detail):
        errors = signature_errors(extra)
    else:
        errors = pydantic_errors(extra, "body") if detail in _phrases(status) else None
    return None if errors is None else _invalid(errors, headers, validation_status)


def _falcon(status: int, value: dict[str, Any], headers: Pairs, validation_status: int = 400) -> Problem | None:
    title, text, names = value.get("title"), value.get("description", ""), value.keys()
    if not {"title"} <= names <= {"title", "description"} or not isinstance(title, str) or not isinstance(text, str):
        return None
    number, _, phrase = title.partition(" ")
    if number == str(status) and phrase in _phrases(status):
        # This one repeats the media type that was sent.
        return _problem(
            status, "" if text.endswith("is an unsupported media type.") else text[:_LONGEST_DETAIL], headers
        )
    if status != 400:
        return None
    if title in _FALCON_TITLES and _FALCON_INPUT.match(text):
        return _problem(status, text[:_LONGEST_DETAIL], headers)
    if title.startswith("Invalid ") and text.startswith("Could not parse "):
        return _problem(status, text.partition(" - ")[0][:_LONGEST_DETAIL], headers)
    if title == "Request data failed validation":
        return _invalid([{"msg": "Invalid value"}], headers, validation_status)
    return None


def pydantic_errors(given: list[Any], place: str | None) -> list[dict[str, Any]] | None:
    """`given` if it is a list of pydantic's errors, with `place` before each location."""
    if not given:
        return None
    errors = []
    for error in given[:MOST_ERRORS]:
        if not (isinstance(error, dict) and {"type", "loc", "msg"} <= error.keys() <= _PYDANTIC):
            return None
        location = error["loc"]
        if not (isinstance(error["type"], str) and isinstance(error["msg"], str)):
            return None
        if not (isinstance(location, list | tuple) and all(isinstance(step, str | int) for step in location)):
            return None
        errors.append({**error, "loc": location if place is None else [place, *location]})
    return errors


def signature_errors(given: list[Any]) -> list[dict[str, Any]] | None:
    """Litestar's list of what does not fit the signature of a handler, as pydantic would say it."""
    if not given:
        return None
    errors = []
    for error in given[:MOST_ERRORS]:
        if not (isinstance(error, dict) and {"message"} <= error.keys() <= {"message", "key", "source"}):
            return None
        message, key, source = error["message"], error.get("key"), error.get("source", "body")
        if not isinstance(message, str):
            return None
        path = key[:_LONGEST_DETAIL].split(".", _DEEPEST) if isinstance(key, str) and key else ()
        wanted = len(message) <= _LONGEST_DETAIL and _SAYS_WHAT_WAS_WANTED.fullmatch(message)
        location = [source if source in _PLACES else "body", *path]
        errors.append({"loc": location, "msg": message if wanted else UNSAID})
    return errors


def msgspec_errors(text: str) -> list[dict[str, Any]] | None:
    """What msgspec says of a value that does not fit, which Litestar sends as it is, as pydantic would say it."""
    match = _MSGSPEC.fullmatch(text) if len(text) <= _LONGEST_TEXT else None
    if match is None:
        return None
    path = [part for part in re.split(r"[.\[\]]+", match["path"] or "") if part and part != "..."]
    wanted = _SAYS_WHAT_WAS_WANTED.fullmatch(match["said"])
    return [{"loc": ["body", *path], "msg": match["said"] if wanted else UNSAID}]


def _invalid(errors: list[dict[str, Any]], headers: Pairs, status: int) -> Problem:
    problem = from_validation_errors(errors, status)
    return problem.type(problem.detail, headers=tuple(headers), **problem.extensions)

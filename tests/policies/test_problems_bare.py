"""Bare errors of other frameworks: their exact forms become problems, everything else leaves byte for byte."""

import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems, bare
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio

TEXT, JSON, HTML, XML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8", "application/xml"


def werkzeug(status: int, name: str, text: str | None = "Some words.") -> bytes:
    paragraph = "" if text is None else f"<p>{text}</p>\n"
    return f"<!doctype html>\n<html lang=en>\n<title>{status} {name}</title>\n<h1>{name}</h1>\n{paragraph}".encode()


def django(title: str, text: str = "") -> bytes:
    return (
        f'\n<!doctype html>\n<html lang="en">\n<head>\n  <title>{title}</title>\n</head>\n<body>\n'
        f"  <h1>{title}</h1><p>{text}</p>\n</body>\n</html>\n"
    ).encode()


def django_csrf(end: str = '<div id="explanation">\n  <p><small>More.</small></p>\n</div>') -> bytes:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <title>403 Forbidden</title>\n</head>\n<body>\n<div>\n'
        "  <h1>Forbidden <span>(403)</span></h1>\n  <p>CSRF verification failed. Request aborted.</p>\n</div>\n\n"
        f"{end}\n\n</body>\n</html>\n"
    ).encode()


def litestar(status: int, detail: str, **extra: Any) -> bytes:
    return json.dumps({"status_code": status, "detail": detail, **extra}, separators=(",", ":")).encode()


def falcon(**members: Any) -> bytes:
    return json.dumps(members).encode()


UNHANDLED = "The server met an error that it did not expect"
OURS = (b"content-type", b"content-length", b"x-content-type-options")
PYDANTIC = {
    "type": "int_parsing", "loc": ["body", "age"], "msg": "Input should be a valid integer", "input": "hunter2",
    "url": "https://errors.pydantic.dev/2.14/v/int_parsing",
}  # fmt: skip


FALCON_XML = b'<?xml version="1.0" encoding="UTF-8"?><error><title>404 Not Found</title></error>'


def app_that_sends(status: int, headers: dict[str, str], *parts: bytes, length: bool = True) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        if length:
            pairs.append((b"Content-Length", b"%d" % sum(map(len, parts))))
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        for index, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": index < len(parts) - 1})

    return app


@pytest.mark.parametrize(
    ("status", "kind", "body", "code", "detail"),
    [
        # Starlette, BlackSheep, any ASGI application: the phrase, by its newer and its older name.
        (404, TEXT, b"Not Found", "REQ_404", None),
        (405, "text/plain", b"Method Not Allowed", "REQ_405", None),
        (413, TEXT, b"Content Too Large", "REQ_413", None),
        (413, TEXT, b"Request Entity Too Large", "REQ_413", None),
        (422, TEXT, b"Unprocessable Entity", "REQ_422", None),
        (503, TEXT, b"Service Unavailable", "SRV_503", None),
        # FastAPI, where no handler of ours can be: behind a router of the application's own.
        (404, JSON, b'{"detail":"Not Found"}', "REQ_404", None),
        (405, JSON, b'{"detail":"Method Not Allowed"}', "REQ_405", None),
        (422, JSON, json.dumps({"detail": [PYDANTIC]}).encode(), "REQ_001", "Request validation failed"),
        # Litestar 2.25.0
        (404, JSON, litestar(404, "Not Found"), "REQ_404", None),
        (405, JSON, litestar(405, "Method Not Allowed"), "REQ_405", None),
        (413, JSON, litestar(413, "Request Entity Too Large"), "REQ_413", None),
        (400, JSON, litestar(400, "Input data was truncated"), "REQ_400", "Input data was truncated"),
        (404, TEXT, litestar(404, "No agent 7"), "REQ_404", "No agent 7"),
        (500, JSON, litestar(500, "Internal Server Error"), "SRV_500", UNHANDLED),
        (
            400, JSON,
            litestar(400, "Validation failed for POST /x", extra=[{"message": "Expected `int`", "key": "a.b"}]),
            "REQ_001", "Request validation failed",
        ),
        # Werkzeug 3.1.9
        (404, HTML, werkzeug(404, "Not Found"), "REQ_404", "Some words."),
        (405, HTML, werkzeug(405, "Method Not Allowed", None), "REQ_405", None),
        (416, HTML, werkzeug(416, "Requested Range Not Satisfiable"), "REQ_416", "Some words."),
        (418, HTML, werkzeug(418, "I&#39;m a teapot", "a &lt;b&gt;"), "REQ_418", "a <b>"),
        (500, HTML, werkzeug(500, "Internal Server Error", "hunter2"), "SRV_500", UNHANDLED),
        # Falcon 4.4.0
        (404, JSON, b'{"title": "404 Not Found"}', "REQ_404", None),
        (404, JSON, b'{"title":"404 Not Found","description":"No agent 7"}', "REQ_404", "No agent 7"),
        (415, JSON, falcon(title="415 Unsupported Media Type", description="a/b is an unsupported media type."),
         "REQ_415", None),
        (400, JSON, falcon(title="Invalid JSON", description="Could not parse JSON body - Expecting x"), "REQ_400",
         "Could not parse JSON body"),
        (400, JSON, falcon(title="Missing parameter", description='The "n" parameter is required.'), "REQ_400",
         'The "n" parameter is required.'),
        (400, JSON, falcon(title="Request data failed validation", description="'hunter2' is bad"), "REQ_001",
         "Request validation failed"),
        (404, XML, FALCON_XML, "REQ_404", None),
        # BlackSheep 2.6.4
        (404, TEXT, b"Resource not found", "REQ_404", None),
        (400, TEXT, b"Bad Request: Expected request content", "REQ_400", "Expected request content"),
        (400, TEXT, b"Bad Request: invalid literal for int() with base 10: 'hunter2'", "REQ_400", None),
        (400, JSON, json.dumps([{**PYDANTIC, "loc": ["age"]}]).encode(), "REQ_001", "Request validation failed"),
        # Django 5.2.19 and 6.1.3
        (404, HTML, django("Not Found", "Not on this server."), "REQ_404", "Not on this server."),
        (400, HTML, django("Bad Request (400)"), "REQ_400", None),
        (403, HTML, django("403 Forbidden"), "REQ_403", None),
        (403, HTML, django_csrf(), "REQ_403", "CSRF verification failed"),
        (500, HTML, django("Server Error (500)"), "SRV_500", UNHANDLED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parts", ["whole", "in two"])
async def test_a_bare_error_becomes_a_problem(
    status: int, kind: str, body: bytes, code: str, detail: str | None, parts: str
) -> None:
    pieces = [body] if parts == "whole" else [body[:5], body[5:]]
    sent = await drive(PolicyStack(app_that_sends(status, {"Content-Type": kind}, *pieces), [Problems()]))
    problem = sent.json()
    assert (problem["error_code"], problem.get("detail")) == (code, detail)
    assert problem["status"] == sent.status
    assert sent.header("content-type") == "application/problem+json"
    assert sent.header("content-length") == str(len(sent.body))
    assert b"hunter2" not in sent.body


DEBUG_WERKZEUG = werkzeug(400, "Bad Request", "Some words.<br>KeyError: &#39;k&#39;")
OWN_CSRF = django_csrf().replace(b"</p>\n</div>", b"</p>\n<p>Ask <b>us</b>: 555-1234</p>\n</div>")
DEBUG_CSRF = django_csrf('<div id="info">\n  <h2>Help</h2>\n<p>DEBUG</p>\n</div>')


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (404, JSON, b'{"error": "own", "code": 7}'),
        (404, JSON, b'{"detail":"No agent 7"}'),
        (404, JSON, b'{"detail":"Not Found","code":7}'),
        (409, JSON, b'{"detail":"Not Found"}'),
        (404, JSON, litestar(409, "Conflict")),
        (409, JSON, litestar(409, "Conflict", extra={"a": 1})),
        (409, JSON, litestar(409, "Conflict", code=7)),
        (404, JSON, b'{"status_code":404.0,"detail":"Not Found"}'),
        (400, JSON, litestar(400, "Validation failed for POST /x", extra=[{"message": "m", "mine": 1}])),
        (404, JSON, b'{"title": "404 Not Found", "code": 7}'),
        (404, JSON, b'{"title": "Own", "description": "words"}'),
        (404, JSON, b'{"title": "409 Conflict"}'),
        (404, JSON, b"[]"),
        (400, JSON, b'[{"type":"a","loc":["b"],"msg":"c","mine":1}]'),
        (404, JSON, b'{"title": "404 Not Found"'),
        (404, JSON, b"[" * 5_000),
        (404, JSON, b""),
        (404, HTML, b""),
        (404, TEXT, b"Not found"),
        (404, TEXT, b"Not Found\n"),
        (404, TEXT, b"Conflict"),
        (404, TEXT, b"\xff\xfe"),
        (403, TEXT, b"Bad Request: x"),
        (404, HTML, b"Not Found"),
        (404, HTML, werkzeug(404, "Not Found", "<b>own</b>")),
        (404, HTML, werkzeug(409, "Conflict")),
        (400, HTML, DEBUG_WERKZEUG),
        (404, HTML, werkzeug(404, "Not Found") + b"\n"),
        (404, HTML, django("Server Error (500)")),
        (403, HTML, DEBUG_CSRF),
        (403, HTML, OWN_CSRF),
        (404, XML, FALCON_XML.replace(b"1.0", b"1x0")),
        (404, "application/problem+json", b'{"detail":"Not Found"}'),
        (404, "application/vnd.own+json", b'{"detail":"Not Found"}'),
        (404, "text/markdown", b"Not Found"),
        (200, TEXT, b"Not Found"),
        (499, TEXT, b"Client Error"),
        (404, JSON, b'{"detail":"Not Found"}' + b" " * 20_000),
    ],
)
async def test_what_an_application_meant_is_untouched(status: int, kind: str, body: bytes) -> None:
    """PD-27."""
    app = app_that_sends(status, {"content-type": kind, "x-own": "1", "etag": '"a"'}, body)
    plain, sent = await drive(app), await drive(PolicyStack(app, [Problems()]))
    assert (sent.status, sent.body) == (plain.status, body)
    assert [(name.lower(), value) for name, value in plain.headers] == sent.headers


async def test_a_compressed_body_is_not_looked_into() -> None:
    body = gzip.compress(b"Not Found")
    app = app_that_sends(404, {"content-type": "text/plain", "content-encoding": "gzip"}, body)
    assert (await drive(PolicyStack(app, [Problems()]))).body == body


async def test_a_stream_of_an_error_is_not_held_back() -> None:
    app = app_that_sends(500, {"content-type": "text/plain"}, b"Internal ", b"Server ", b"Error", length=False)
    sent = await drive(PolicyStack(app, [Problems()]))
    assert [message.get("body") for message in sent.messages[1:]] == [b"Internal ", b"Server ", b"Error"]


async def test_headers_of_the_error_stay_and_those_of_its_content_go() -> None:
    """PD-26, ST-01: Allow, WWW-Authenticate, Retry-After, Location, Set-Cookie twice."""

    kept = [
        (b"Allow", b"GET"), (b"WWW-Authenticate", b"Basic"), (b"WWW-Authenticate", b"Digest"),
        (b"Retry-After", b"3"), (b"Location", b"/x"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"),
        (b"Vary", b"Accept"), (b"Content-Range", b"bytes */10"), (b"Cache-Control", b"max-age=1"),
    ]  # fmt: skip
    gone = [
        (b"Content-Type", b"text/plain"), (b"ETag", b'"a"'), (b"Last-Modified", b"x"), (b"Content-Language", b"en"),
        (b"X-Content-Type-Options", b"nosniff"), (b"Content-Disposition", b"inline"),
    ]  # fmt: skip

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [*gone, *kept]})
        await send({"type": "http.response.body", "body": b"Unauthorized"})

    sent = await drive(PolicyStack(app, [Problems()]))
    assert [pair for pair in sent.headers if pair[0] not in OURS] == [(name.lower(), value) for name, value in kept]
    assert sent.header("content-type") == "application/problem+json"
    assert sent.header("content-length") == str(len(sent.body))


async def test_a_bare_401_gets_a_challenge() -> None:
    """RFC 9110 section 15.5.2."""
    sent = await drive(
        PolicyStack(app_that_sends(401, {"content-type": JSON}, falcon(title="401 Unauthorized")), [Problems()])
    )
    assert sent.header("www-authenticate") == 'Bearer realm="api"'


@pytest.mark.parametrize(
    ("kind", "body", "headers"),
    [
        (TEXT, b"Not Found", {}),
        (TEXT, b"Resource not found", {}),
        (JSON, b'{"title": "404 Not Found"}', {"vary": "Accept"}),
        (JSON, litestar(404, "Not Found"), {}),
        (JSON, b'{"detail":"Not Found"}', {}),
    ],
)
@pytest.mark.parametrize("sends_body", [True, False])
async def test_head_has_no_body(kind: str, body: bytes, headers: dict[str, str], sends_body: bool) -> None:
    """PD-21, RFC 9110 section 9.3.2: also where the framework sends one."""
    own = {"content-type": kind, "content-length": str(len(body)), **headers}
    app = app_that_sends(404, own, body if sends_body else b"", length=False)
    sent = await drive(PolicyStack(app, [Problems()]), "HEAD")
    assert (sent.status, sent.body, sent.header("content-type")) == (404, b"", "application/problem+json")
    whole = await drive(PolicyStack(app_that_sends(404, own, body, length=False), [Problems()]))
    assert sent.header("content-length") in (None, str(len(whole.body)))


async def test_head_of_something_else_is_untouched() -> None:
    app = app_that_sends(404, {"content-type": TEXT, "content-length": "77"}, b"", length=False)
    sent = await drive(PolicyStack(app, [Problems()]), "HEAD")
    assert (sent.header("content-type"), sent.header("content-length")) == (TEXT, "77")


@pytest.mark.parametrize(
    ("status", "headers"),
    [(405, {"Content-Type": HTML, "Allow": "GET"}), (404, {"content-type": JSON, "vary": "Accept"})],
    ids=["Django's 405", "Falcon, for a client that accepts neither JSON nor XML"],
)
async def test_an_error_without_a_word_gets_some(status: int, headers: dict[str, str]) -> None:
    sent = await drive(PolicyStack(app_that_sends(status, headers, b""), [Problems()]))
    assert (sent.json()["status"], sent.header("allow")) == (status, headers.get("Allow"))


async def test_it_can_be_switched_off() -> None:
    for status, kind, body in ((404, TEXT, b"Not Found"), (404, JSON, litestar(404, "Not Found"))):
        sent = await drive(
            PolicyStack(app_that_sends(status, {"content-type": kind}, body), [Problems(foreign_errors=False)])
        )
        assert sent.body == body
    app = app_that_sends(500, {"content-type": TEXT}, b"Internal Server Error")
    assert (await drive(PolicyStack(app, [Problems(foreign_errors=False)]))).json()["error_code"] == "SRV_500"


async def test_failed_validations_look_the_same_whoever_found_them() -> None:
    forms = [
        (422, json.dumps({"detail": [PYDANTIC]}).encode()),
        (400, json.dumps([{**PYDANTIC, "loc": ["age"]}]).encode()),
        (400, litestar(400, "Bad Request", extra=[{**PYDANTIC, "loc": ["age"]}])),
        (
            400,
            litestar(
                400,
                "Validation failed for POST /",
                extra=[{"message": PYDANTIC["msg"], "key": "age", "source": "body"}],
            ),
        ),
    ]
    for wanted, code in ((400, "REQ_001"), (422, "REQ_002")):
        for status, body in forms:
            stack = PolicyStack(
                app_that_sends(status, {"content-type": JSON}, body), [Problems(validation_status=wanted)]
            )
            sent = await drive(stack)
            assert (sent.status, sent.json()["error_code"]) == (wanted, code)
            assert sent.json()["errors"] == [{"detail": "Input should be a valid integer", "pointer": "#/age"}]


@pytest.mark.parametrize(
    "message", ["Invalid enum value 'hunter2'", "Value error, 'hunter2' is bad", "Input should be: 'hunter2'"]
)
async def test_a_message_that_may_repeat_the_input_is_not_shown(message: str) -> None:
    body = litestar(400, "Validation failed for POST /", extra=[{"message": message, "key": "password"}])
    sent = await drive(PolicyStack(app_that_sends(400, {"content-type": JSON}, body), [Problems()]))
    assert sent.json()["errors"] == [{"detail": "Invalid value", "pointer": "#/password"}]


@pytest.mark.parametrize(
    ("detail", "error"),
    [
        ("Expected `int`, got `str` - at `$.a[0].b`", {"detail": "Expected `int`, got `str`", "pointer": "#/a/0/b"}),
        ("Object missing required field `age`", {"detail": "Object missing required field `age`", "pointer": "#"}),
        ("Invalid enum value 'hunter2' - at `$.a`", {"detail": "Invalid value", "pointer": "#/a"}),
        ("Invalid value 'hunter2'", {"detail": "Invalid value", "pointer": "#"}),
    ],
)
async def test_what_msgspec_says_to_litestar_is_a_failed_validation(detail: str, error: dict[str, str]) -> None:
    app = app_that_sends(400, {"content-type": JSON}, litestar(400, detail))
    sent = await drive(PolicyStack(app, [Problems()]))
    assert (sent.json()["error_code"], sent.json()["errors"]) == ("REQ_001", [error])


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["Not Found", "404 Not Found", 404, 400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["detail", "status_code", "title", "description", "extra", "type", "loc", "msg", "key", "message"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from([400, 404, 422, 500]), JSON_VALUES)
def test_no_json_is_an_error(status: int, value: Any) -> None:
    bare.read(status, b"application/json", json.dumps(value).encode())


@given(st.sampled_from([400, 403, 404, 405, 599]), st.sampled_from([TEXT, JSON, HTML, XML]), st.binary(max_size=200))
def test_no_bytes_are_an_error(status: int, kind: str, body: bytes) -> None:
    bare.read(status, kind.encode(), body)
    bare.read_head(status, kind.encode(), body)

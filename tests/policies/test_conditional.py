"""Conditional: RFC 9110 sections 8.8, 13, 15.4.5. Rows CR-01 to CR-43 as named, ST-16."""

import gzip
import os
import subprocess
import sys
from datetime import UTC, datetime
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.conditional import Conditional
from sigil_policy.testing import FrozenClock, drive
from sigil_policy.wire.etags import is_etag

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 1, 15, tzinfo=UTC).timestamp()
JAN_11 = "Sun, 11 Jan 2026 12:00:00 GMT"
JAN_12 = "Mon, 12 Jan 2026 12:00:00 GMT"
TOMORROW = "Fri, 16 Jan 2026 00:00:00 GMT"


def answering(*headers, body=b'{"agents":[]}', status=200, length=True, parts=None):
    """An application that always says the same."""

    async def app(scope, receive, send):
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        if length:
            pairs.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        chunks = parts or [body]
        for place, chunk in enumerate(chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": place < len(chunks) - 1})

    return app


def stack(app, *policies, outside=()):
    return PolicyStack(app, policies=[*outside, *(policies or [Conditional()])], clock=FrozenClock(NOW))


async def tag_of(app, **headers):
    sent = await drive(stack(app), headers=headers)
    return sent.header("etag")


# --- making tags -----------------------------------------------------------------------------------------------------


async def test_a_complete_get_gets_a_strong_tag():
    """CR-01, CR-02"""
    tag = await tag_of(answering())
    assert is_etag(tag.encode())
    assert not tag.startswith("W/")
    assert "\\" not in tag


@given(st.binary(max_size=200), st.integers(0, 199))
def test_any_changed_byte_changes_the_tag(body, place):
    """CR-03"""
    changed = bytearray(body or b"x")
    changed[place % len(changed)] ^= 1
    opaque = Conditional()._opaque
    assert opaque(body) != opaque(bytes(changed))


def test_every_worker_makes_the_same_tag():
    """CR-06"""
    program = "from sigil_policy.policies.conditional import Conditional as C; print(C()._opaque(b'abc').decode())"
    made = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)}
    assert made == {Conditional()._opaque(b"abc") + b"\n"}


async def test_weak_tags_are_marked():
    """CR-05"""
    app = stack(answering(), Conditional(weak=True))
    sent = await drive(app)
    assert sent.header("etag").startswith('W/"')
    again = await drive(app, headers={"if-none-match": sent.header("etag")})
    assert again.status == 304


@pytest.mark.parametrize("digest", [lambda body: blake2b(body).digest(), lambda body: blake2b(body).hexdigest()])
async def test_another_digest_can_be_given(digest):
    sent = await drive(stack(answering(body=b"abc"), Conditional(digest=digest)))
    assert sent.header("etag") == f'"{blake2b(b"abc").hexdigest()}"'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digest": blake2b}, "must return bytes or str"),
        ({"digest": lambda body: 'a"b'}, "cannot stand in an ETag"),
        ({"digest": lambda body: "a b"}, "cannot stand in an ETag"),
        ({"digest": lambda body: b"same"}, "the same for different bodies"),
        ({"digest": "md5"}, "sha256"),
        ({"bound": -1}, "greater than or equal to 0"),
        ({"wek": True}, "wek"),
    ],
)
def test_wrong_options_fail_at_construction(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Conditional(**options)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_only_get_and_head_are_tagged(method):
    """CR-33, CR-34: a hash of that body is not the resource's validator."""
    sent = await drive(stack(answering()), method, headers={"if-none-match": "*"})
    assert (sent.status, sent.header("etag")) == (200, None)


@pytest.mark.parametrize("status", [201, 202, 204, 206, 301, 400, 404, 500])
async def test_only_200_is_tagged(status):
    """CR-33, CR-37"""
    body = b"" if status == 204 else b"{}"
    sent = await drive(stack(answering(status=status, body=body)), headers={"if-none-match": "*"})
    assert (sent.status, sent.header("etag"), sent.body) == (status, None, body)


async def test_the_applications_own_validators_stand():
    """CR-35"""
    sent = await drive(stack(answering(("ETag", '"mine"'), ("Last-Modified", JAN_11))))
    assert sent.header("etag") == '"mine"'
    assert sent.header("last-modified") == JAN_11


async def test_two_in_one_stack_tag_once():
    """ST-16"""
    app = stack(answering(), Conditional(weak=True), Conditional(), Conditional())
    sent = await drive(app)
    assert not sent.header("etag").startswith("W/")
    again = await drive(app, headers={"if-none-match": sent.header("etag")})
    assert (again.status, again.body) == (304, b"")
    assert again.header("etag") == sent.header("etag")


# --- If-None-Match ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_known_tag_is_answered_304(method):
    """CR-09, CR-29, CR-31"""
    tag = await tag_of(answering())
    sent = await drive(stack(answering()), method, headers={"if-none-match": tag})
    assert (sent.status, sent.body, sent.header("etag")) == (304, b"", tag)
    assert [m["type"] for m in sent.messages] == ["http.response.start", "http.response.body"]
    assert sent.header("content-length") is None


@pytest.mark.parametrize(
    ("tag", "field", "status"),
    [
        ('"1"', '"1"', 304),
        ('W/"1"', '"1"', 304),
        ('"1"', 'W/"1"', 304),
        ('W/"1"', 'W/"1"', 304),
        ('W/"1"', 'W/"2"', 200),
        ('"c"', '"a,b", ,"c"', 304),
        ('"a,b"', '"a,b", ,"c"', 304),
        ('"1"', "*", 304),
        ('"1"', " * ", 304),
        ('"1"', '*, "1"', 200),
        ('"1"', '"1", *', 200),
        ('"1"', "1", 200),
        ("1", "1", 200),
        ('"1"', 'w/"1"', 200),
        ('"1"', '"1", w/"2"', 200),
        ('"1"', "", 200),
        ('"1"', '"1', 200),
    ],
)
async def test_if_none_match(tag, field, status):
    """CR-07, CR-10, CR-11, CR-12"""
    sent = await drive(stack(answering(("ETag", tag))), headers={"if-none-match": field})
    assert sent.status == status
    assert sent.header("etag") == tag
    assert sent.body == (b"" if status == 304 else b'{"agents":[]}')


async def test_several_lines_are_one_list():
    """CR-11"""
    lines = [("If-None-Match", '"a"'), ("if-none-match", '"mine", "c"')]
    assert (await drive(stack(answering(("ETag", '"mine"'))), headers=lines)).status == 304


# --- If-Modified-Since -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since", "status"),
    [
        (JAN_11, 304),
        (JAN_12, 304),
        (TOMORROW, 304),
        ("Sun, 11 Jan 2026 11:59:59 GMT", 200),
        ("Sunday, 11-Jan-26 12:00:00 GMT", 304),
        ("Sun Jan 11 12:00:00 2026", 304),
        ("Sat, 11 Jan 2026 12:00:00 GMT", 304),
        ("2026-01-12", 200),
        ("", 200),
        (f"{JAN_12}, {JAN_12}", 200),
    ],
)
async def test_if_modified_since(since, status):
    """CR-18, CR-20, CR-22, CR-23"""
    sent = await drive(stack(answering(("Last-Modified", JAN_11))), headers={"if-modified-since": since})
    assert sent.status == status


async def test_repeated_dates_are_ignored():
    """CR-18"""
    lines = [("if-modified-since", JAN_12), ("if-modified-since", JAN_12)]
    assert (await drive(stack(answering(("Last-Modified", JAN_11))), headers=lines)).status == 200


async def test_without_last_modified_a_date_decides_nothing():
    """CR-18"""
    assert (await drive(stack(answering()), headers={"if-modified-since": JAN_12})).status == 200
    assert (
        await drive(stack(answering(("Last-Modified", "nonsense"))), headers={"if-modified-since": JAN_12})
    ).status == 200


@pytest.mark.parametrize(
    ("tag", "since", "status"),
    [
        ('"1"', JAN_11, 304),
        ('"1"', "Sat, 10 Jan 2026 12:00:00 GMT", 304),
        ('"2"', JAN_12, 200),
        ("nonsense", JAN_12, 200),
    ],
    ids=["both agree", "tag same, date changed", "tag changed, date same", "unreadable list"],
)
async def test_a_tag_decides_before_a_date(tag, since, status):
    """CR-17"""
    app = stack(answering(("ETag", '"1"'), ("Last-Modified", JAN_11)))
    assert (await drive(app, headers={"if-none-match": tag, "if-modified-since": since})).status == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_dates_are_for_get_and_head(method):
    """CR-18"""
    app = stack(answering(("Last-Modified", JAN_11)))
    assert (await drive(app, method, headers={"if-modified-since": JAN_12})).status == 200


@pytest.mark.parametrize("status", [200, 201, 206])
async def test_last_modified_is_never_later_than_now(status):
    """CR-36"""
    sent = await drive(stack(answering(("Last-Modified", TOMORROW), status=status)))
    assert sent.header("last-modified") == "Thu, 15 Jan 2026 00:00:00 GMT"


async def test_a_future_last_modified_counts_as_now():
    """CR-36: what was handed out is what comes back."""
    sent = await drive(
        stack(answering(("Last-Modified", TOMORROW))), headers={"if-modified-since": "Thu, 15 Jan 2026 00:00:00 GMT"}
    )
    assert sent.status == 304


@pytest.mark.parametrize("value", ["nonsense", JAN_11])
async def test_any_other_last_modified_is_left_alone(value):
    assert (await drive(stack(answering(("Last-Modified", value))))).header("last-modified") == value


# --- what a 304 says -------------------------------------------------------------------------------------------------

KEPT = [
    ("cache-control", "private, max-age=60"),
    ("content-location", "/v7/agents"),
    ("date", JAN_12),
    ("expires", JAN_12),
    ("vary", "Accept"),
    ("access-control-allow-origin", "*"),
    ("x-request-id", "r-1"),
    ("x-ratelimit-limit", "100"),
    ("deprecation", "@1768089600"),
    ("sunset", TOMORROW),
    ("link", "</v8>; rel=next"),
    ("set-cookie", "a=1"),
    ("set-cookie", "b=2"),
]
DROPPED = [
    ("content-type", "application/json"),
    ("content-encoding", "gzip"),
    ("content-language", "en"),
    ("content-range", "bytes 0-1/2"),
    ("content-digest", "sha-256=:AAAA:"),
    ("last-modified", JAN_11),
]


async def test_a_304_says_what_the_200_would_and_nothing_of_its_content():
    """CR-27, CR-28, CR-29, CR-30, D-15"""
    app = stack(answering(*DROPPED, *KEPT, ("etag", '"1"')))
    full = await drive(app)
    sent = await drive(app, headers={"if-none-match": '"1"'})
    assert sent.status == 304
    gone = {name.encode() for name, _ in DROPPED} | {b"content-length"}
    assert sent.headers == [pair for pair in full.headers if pair[0] not in gone]


async def test_last_modified_stays_where_it_is_the_only_validator():
    """CR-28: a HEAD whose content is not known has no tag."""
    app = stack(answering(("Last-Modified", JAN_11), ("Content-Length", "13"), body=b"", length=False))
    sent = await drive(app, "HEAD", headers={"if-modified-since": JAN_11})
    assert (sent.status, sent.header("last-modified"), sent.header("etag")) == (304, JAN_11, None)


# --- HEAD ------------------------------------------------------------------------------------------------------------


async def test_head_has_the_tag_of_get_where_the_application_shows_the_body():
    """CR-31, CR-32"""
    app = stack(answering())
    get, head = await drive(app), await drive(app, "HEAD")
    assert head.header("etag") == get.header("etag")
    assert head.header("content-length") == get.header("content-length") == "13"


@pytest.mark.parametrize(("length", "tagged"), [("13", False), (None, False), ("0", True)])
async def test_head_without_content_is_tagged_only_if_get_would_be_empty_too(length, tagged):
    """CR-31, CR-32: no tag is better than that of the wrong content."""
    headers = [] if length is None else [("content-length", length)]
    app = stack(answering(*headers, body=b"", length=False))
    sent = await drive(app, "HEAD")
    assert (sent.header("etag") is not None) is tagged
    assert sent.header("content-length") == length
    assert (await drive(app, "HEAD", headers={"if-none-match": '"x"'})).status == 200
    assert (await drive(app, "HEAD", headers={"if-none-match": "*"})).status == 304


async def test_an_empty_200_is_content_too():
    tag = await tag_of(answering(body=b""))
    assert (await drive(stack(answering(body=b"")), headers={"if-none-match": tag})).status == 304


# --- what passes untouched -------------------------------------------------------------------------------------------


async def test_a_stream_is_not_delayed():
    """CR-39: each part leaves before the next is made."""
    order = []

    async def app(scope, receive, send):
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]}
        )
        for place in range(3):
            order.append(f"made {place}")
            await send({"type": "http.response.body", "body": b"%d" % place, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    sent = await drive(
        stack(app), headers={"if-none-match": "*"}, on_send=lambda m: order.append(m.get("body", b"start"))
    )
    assert order == ["made 0", b"start", b"0", "made 1", b"1", "made 2", b"2", b""]
    assert (sent.status, sent.header("etag"), sent.body) == (200, None, b"012")


async def test_an_event_stream_is_never_held():
    """CR-39: not even one that ends with its first message."""
    sent = await drive(
        stack(answering(("content-type", "text/event-stream"), length=False)), headers={"if-none-match": "*"}
    )
    assert (sent.status, sent.header("etag")) == (200, None)


@pytest.mark.parametrize(("size", "tagged"), [(100, True), (101, False)])
async def test_a_body_over_the_bound_is_not_tagged(size, tagged):
    """CR-39"""
    for length in (True, False):
        sent = await drive(stack(answering(body=b"x" * size, length=length), Conditional(bound=100)))
        assert (sent.header("etag") is not None) is tagged
        assert sent.body == b"x" * size


async def test_a_body_in_parts_of_known_length_is_tagged():
    app = stack(answering(parts=[b'{"agents"', b":[]}", b""]))
    tag = await tag_of(answering())
    assert (await drive(app)).header("etag") == tag
    assert (await drive(app, headers={"if-none-match": tag})).status == 304


async def test_pathsend_passes():
    """CR-39"""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.pathsend", "path": "/srv/file"})

    sent = await drive(stack(app), headers={"if-none-match": "*"})
    assert sent.status == 200
    assert sent.header("etag") is None
    assert sent.messages[-1] == {"type": "http.response.pathsend", "path": "/srv/file"}


@pytest.fixture
def file_app(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"0123456789")
    os.utime(path, (NOW - 60, NOW - 60))

    async def file(request: Request) -> Response:
        return FileResponse(path)

    return Starlette(routes=[Route("/", file)])


async def test_ranges_pass(file_app):
    """CR-37: neither hashed nor altered."""
    app = stack(file_app)
    for headers, status in (({"range": "bytes=0-1"}, 206), ({"range": "bytes=90-"}, 416)):
        plain, sent = await drive(file_app, headers=headers), await drive(app, headers=headers | {"if-none-match": "*"})
        assert sent.status == status
        assert (sent.headers, sent.body) == (plain.headers, plain.body)


async def test_the_validators_of_a_file_are_honoured(file_app):
    app = stack(file_app)
    full = await drive(app)
    assert full.body == b"0123456789"
    assert (await drive(app, headers={"if-none-match": full.header("etag")})).status == 304
    assert (await drive(app, headers={"if-modified-since": full.header("last-modified")})).status == 304


async def test_websockets_pass():
    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        await send({"type": "websocket.close"})

    sent = await drive(stack(app), kind="websocket", headers={"if-none-match": "*"})
    assert [m["type"] for m in sent.messages] == ["websocket.accept", "websocket.close"]
    assert sent.header("etag") is None


class Refuse(Policy):
    def on_request(self, ex: Exchange) -> Problem:
        return RATE_EXCEEDED("Too many requests.")


class Stamp(Policy):
    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-stamp", b"1"))


async def test_refusals_are_not_tagged():
    for policies in ([Conditional(), Refuse()], [Refuse(), Conditional()]):
        sent = await drive(stack(answering(), *policies), headers={"if-none-match": "*"})
        assert (sent.status, sent.header("etag")) == (429, None)


async def test_outer_policies_decorate_200_and_304_alike():
    """CR-30"""
    app = stack(answering(), outside=[Stamp()])
    for headers in ({}, {"if-none-match": "*"}):
        assert (await drive(app, headers=headers)).header("x-stamp") == "1"


async def test_an_error_of_the_application_passes():
    async def app(scope, receive, send):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await drive(stack(app))


# --- variants --------------------------------------------------------------------------------------------------------


async def test_the_tag_is_that_of_the_selected_variant():
    """CR-43"""

    async def hello(request: Request) -> Response:
        german = request.headers.get("accept-language") == "de"
        return JSONResponse({"hello": "Welt" if german else "world"}, headers={"Vary": "Accept-Language"})

    app = stack(Starlette(routes=[Route("/", hello)]))
    english, german = await drive(app), await drive(app, headers={"accept-language": "de"})
    assert english.header("etag") != german.header("etag")
    crossed = await drive(app, headers={"accept-language": "de", "if-none-match": english.header("etag")})
    assert crossed.status == 200


LARGE = b'{"agents":[' + b"0," * 600 + b"0]}"


@pytest.mark.parametrize("side", ["inside", "outside"])
async def test_two_codings_never_share_a_strong_tag(side):
    """CR-04: whichever side of the stack compresses."""
    if side == "inside":
        app = stack(GZipMiddleware(answering(body=LARGE)))
    else:
        app = GZipMiddleware(stack(answering(body=LARGE)))
    plain, packed = await drive(app), await drive(app, headers={"accept-encoding": "gzip"})
    assert plain.header("content-encoding") is None
    assert packed.header("content-encoding") == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    assert plain.header("etag") != packed.header("etag")
    for sent, headers in ((plain, {}), (packed, {"accept-encoding": "gzip"})):
        again = await drive(app, headers=headers | {"if-none-match": sent.header("etag")})
        assert (again.status, again.header("etag"), again.body) == (304, sent.header("etag"), b"")


async def test_streaming_responses_of_starlette_pass():
    async def parts(request: Request) -> Response:
        async def produce():
            yield b"a"
            yield b"b"

        return StreamingResponse(produce())

    sent = await drive(stack(Starlette(routes=[Route("/", parts)])), headers={"if-none-match": "*"})
    assert (sent.status, sent.body, sent.header("etag")) == (200, b"ab", None)


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=40))
def test_no_request_header_raises(listed, since, accepted):
    headers = {b"if-none-match": listed, b"if-modified-since": since, b"accept-encoding": accepted}
    scope = {"type": "http", "method": "GET", "path": "/", "headers": list(headers.items())}
    ex = Exchange(scope, None, FrozenClock(NOW), None, None)
    head = Head(200, [(b"last-modified", JAN_11.encode())])
    Conditional().on_body(ex, head, b"abc")
    assert head.status == 200 or listed.strip(b" \t") == b"*" or b'"' in listed

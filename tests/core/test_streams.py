"""What a policy may do to a stream while it goes by: choose which to watch, hold it back, end it."""

import logging
import threading
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from sigil_policy.core.exchange import Exchange, Head, StreamEndedError
from sigil_policy.core.policy import EndOfStream, Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing import drive
from sigil_policy.testing.rules import broken_rules
from tests.served import on_uvicorn

pytestmark = pytest.mark.anyio

LAST = b"event: error\ndata: {}\n\n"
EVENTS = [(b"content-type", b"text/event-stream")]


class After(Policy):
    """Ends every stream with its chunk number `count`, after `waiting` turns of the loop."""

    count: int
    waiting: int = 0

    def on_chunk(self, ex: Exchange, chunk: bytes) -> Awaitable[EndOfStream | None] | EndOfStream | None:
        seen = (ex.note(self) or 0) + 1
        ex.keep(self, seen)
        end = EndOfStream(LAST) if seen == self.count else None
        return self._later(end) if self.waiting else end

    async def _later(self, end: EndOfStream | None) -> EndOfStream | None:
        for _ in range(self.waiting):
            await anyio.lowlevel.checkpoint()
        return end


class Watches(Policy):
    """Writes down the chunks that it sees and how the exchange ended."""

    chunks: Any
    endings: Any

    def on_chunk(self, ex: Exchange, chunk: bytes) -> None:
        self.chunks.append(chunk)

    def on_finish(self, ex: Exchange) -> None:
        self.endings.append((ex.outcome, ex.refused_by, ex.error, ex.done, ex.sent_bytes))


def streaming(count: int, headers: Any = EVENTS, *, caught: Any = None) -> Any:
    """An application that sends `count` chunks; `caught` are the exceptions that its `send` has raised."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for number in range(count):
                await send({"type": "http.response.body", "body": b"%d" % number, "more_body": number < count - 1})
        except OSError as error:
            if caught is None:
                raise
            caught.append((number, error))

    return app


# --- ending ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waiting", [0, 2], ids=["at once", "after waiting"])
async def test_a_stream_ends_with_the_chunk_that_went_over_and_the_last_words(waiting: int) -> None:
    caught: list[Any] = []
    sent = await drive(PolicyStack(streaming(9, caught=caught), [After(count=3, waiting=waiting)]))
    assert not broken_rules(sent.messages)
    assert [message.get("body") for message in sent.messages[1:]] == [b"0", b"1", b"2", LAST]
    assert [message["more_body"] for message in sent.messages[1:]] == [True, True, True, False]
    [(number, error)] = caught
    assert number == 3
    assert isinstance(error, StreamEndedError)


async def test_policies_outside_see_the_last_words_and_those_inside_do_not() -> None:
    outside: list[bytes] = []
    inside: list[bytes] = []
    endings: list[Any] = []
    stack = PolicyStack(
        streaming(9),
        [Watches(chunks=outside, endings=endings), After(count=2), Watches(chunks=inside, endings=endings)],
    )
    await drive(stack)
    assert outside == [b"0", b"1", LAST]
    assert inside == [b"0", b"1"]
    # Refused by who ended it, for all of them; the application's OSError is no error of the exchange.
    assert endings == [("refused", "After", None, True, 2 + len(LAST))] * 2


async def test_the_last_words_may_be_nothing() -> None:
    class Cuts(Policy):
        def on_chunk(self, ex: Exchange, chunk: bytes) -> EndOfStream:
            return EndOfStream()

    sent = await drive(PolicyStack(streaming(9), [Cuts()]))
    assert sent.body == b"0"
    assert not broken_rules(sent.messages)


@pytest.mark.parametrize(
    ("count", "headers"),
    [(3, [(b"content-length", b"3")]), (1, EVENTS)],
    ids=["a promised length", "the last chunk"],
)
async def test_what_cannot_be_cut_is_not_ended(count: int, headers: Any) -> None:
    endings: list[Any] = []
    sent = await drive(PolicyStack(streaming(count, headers), [Watches(chunks=[], endings=endings), After(count=1)]))
    assert len(sent.body) == count
    assert endings == [("ok", None, None, True, count)]


async def test_a_response_that_announced_trailers_is_not_ended() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        await send({"type": "http.response.trailers", "headers": []})

    sent = await drive(PolicyStack(app, [After(count=1)]))
    assert sent.body == b"ab"
    assert not broken_rules(sent.messages)


async def test_a_length_that_a_policy_inside_took_away_is_no_promise() -> None:
    class NoLength(Policy):
        def on_response(self, ex: Exchange, head: Head) -> None:
            head.remove(b"content-length")

    app = streaming(3, [(b"content-length", b"3")])
    assert (await drive(PolicyStack(app, [After(count=1), NoLength()]))).body == b"0" + LAST
    assert (await drive(PolicyStack(app, [NoLength(), After(count=1)]))).body == b"012"


@pytest.mark.parametrize(
    ("raised", "is_error"),
    [
        (lambda error: error, False),
        (lambda error: ClientDisconnect(), False),
        (lambda error: ExceptionGroup("g", [error, ExceptionGroup("h", [error])]), False),
        (lambda error: ExceptionGroup("g", [error, ValueError("mine")]), True),
        (lambda error: KeyboardInterrupt(), True),
    ],
    ids=["itself", "what Starlette makes of it", "a group of it", "a group with another", "no Exception"],
)
async def test_what_the_application_raises_because_of_the_end_is_no_error(raised: Any, is_error: bool) -> None:
    endings: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await streaming(9)(scope, receive, send)
        except OSError as error:
            raise raised(error)  # noqa: B904  as code does that knows nothing of us

    stack = PolicyStack(app, [Watches(chunks=[], endings=endings), After(count=1)])
    if is_error:
        with pytest.raises((ExceptionGroup, KeyboardInterrupt)):
            await drive(stack)
    else:
        await drive(stack)
    assert (endings[0][2] is not None) == is_error


async def test_another_error_after_the_end_is_still_one() -> None:
    endings: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await streaming(9, caught=[])(scope, receive, send)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await drive(PolicyStack(app, [Watches(chunks=[], endings=endings), After(count=1)]))
    assert endings[0][0] == "error"


async def test_a_failing_clean_up_after_the_end_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Its cause is the end, so the exchange is fine; but nobody should have to guess."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await streaming(9)(scope, receive, send)
        finally:
            raise ValueError("while closing")

    with caplog.at_level(logging.WARNING, logger="sigil_policy"):
        await drive(PolicyStack(app, [After(count=1)]))
    assert "while closing" in caplog.text


async def test_a_client_that_left_before_the_end_was_sent_has_left() -> None:
    endings: list[Any] = []

    def on_send(message: Any) -> None:
        if message.get("body") == LAST:
            raise OSError("gone")

    stack = PolicyStack(streaming(9), [Watches(chunks=[], endings=endings), After(count=1)])
    with pytest.raises(OSError, match="gone"):
        await drive(stack, on_send=on_send)
    assert endings[0][0] == "disconnected"


@pytest.mark.parametrize("heard", [b"end", True], ids=["bytes", "a flag"])
async def test_another_answer_of_on_chunk_is_a_type_error_that_says_so(heard: Any) -> None:
    class Wrong(Policy):
        def on_chunk(self, ex: Exchange, chunk: bytes) -> Any:
            return heard

    class WrongLater(Policy):
        async def on_chunk(self, ex: Exchange, chunk: bytes) -> Any:
            return heard

    for policy in (Wrong(), WrongLater()):
        with pytest.raises(TypeError, match="EndOfStream"):
            await drive(PolicyStack(streaming(9), [policy]))


# --- waiting and watching ----------------------------------------------------------------------------------------


async def test_an_awaiting_on_chunk_holds_its_chunk_and_who_sends_it() -> None:
    order: list[str] = []

    class Slow(Policy):
        async def on_chunk(self, ex: Exchange, chunk: bytes) -> None:
            order.append(f"in {chunk.decode()}")
            await anyio.lowlevel.checkpoint()
            order.append(f"out {chunk.decode()}")

    def on_send(message: Any) -> None:
        if "body" in message:
            order.append(f"sent {message['body'].decode()}")

    await drive(PolicyStack(streaming(2), [Slow()]), on_send=on_send)
    assert order == ["in 0", "out 0", "sent 0", "in 1", "out 1", "sent 1"]


async def test_who_wants_no_chunks_of_a_response_sees_none() -> None:
    asked: list[Any] = []
    seen: list[bytes] = []

    class Picky(Policy):
        def on_response(self, ex: Exchange, head: Head) -> None:
            head.headers.append((b"x-mine", b"1"))

        def wants_chunks(self, ex: Exchange, head: Head) -> bool:
            asked.append(head.get(b"x-mine"))
            return ex.path == "/watched"

        def on_chunk(self, ex: Exchange, chunk: bytes) -> None:
            seen.append(chunk)

    stack = PolicyStack(streaming(3), [Picky()])
    await drive(stack, path="/other")
    assert (asked, seen) == ([b"1"], [])
    await drive(stack, path="/watched")
    assert (asked, seen) == ([b"1", b"1"], [b"0", b"1", b"2"])


# --- frameworks and servers --------------------------------------------------------------------------------------


class Events:
    """A stream without end. (Of a generator that Starlette leaves behind, trio would complain.)"""

    def __init__(self) -> None:
        self.produced = 0

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        self.produced += 1
        return b"data: %d\n\n" % self.produced


def service(events: Any) -> Starlette:
    def endpoint(request: Request) -> StreamingResponse:
        return StreamingResponse(events, media_type="text/event-stream")

    return Starlette(routes=[Route("/", endpoint)])


EXPECTED = b"data: 1\n\ndata: 2\n\ndata: 3\n\n" + LAST


@pytest.mark.parametrize("version", ["2.3", "2.4"], ids=["waits for a disconnect", "waits for an OSError"])
async def test_a_starlette_stream_stops_producing(version: str) -> None:
    """Both of the ways in which Starlette notices that nobody listens."""
    endings: list[Any] = []
    events = Events()
    app = service(events)
    app.add_middleware(PolicyStack, policies=[Watches(chunks=[], endings=endings), After(count=3)])
    sent = await drive(app, scope={"asgi": {"version": "3.0", "spec_version": version}})
    assert sent.body == EXPECTED
    assert events.produced == 4
    assert not broken_rules(sent.messages)
    assert endings == [("refused", "After", None, True, len(sent.body))]


async def test_foreign_middleware_in_between_changes_nothing() -> None:
    endings: list[Any] = []
    inner = PolicyStack(service(Events()), [Watches(chunks=[], endings=endings), After(count=3)])

    async def between(scope: Any, receive: Any, send: Any) -> None:
        async def passing(message: Any) -> None:
            await send(message)

        await inner(scope, receive, passing)

    outer_chunks: list[bytes] = []
    sent = await drive(PolicyStack(between, [Watches(chunks=outer_chunks, endings=endings)]))
    assert sent.body == EXPECTED
    assert outer_chunks[-1] == LAST
    assert [ending[:3] for ending in endings] == [("refused", "After", None)] * 2


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("pause", [0, 300], ids=["a busy stream", "a stream that is waiting"])
def test_on_a_real_server_the_client_reads_a_whole_response_and_the_generator_stops(http: str, pause: float) -> None:
    """No protocol error at the client, the connection can be used again, and nothing goes on producing."""
    closed = threading.Event()
    endings: list[Any] = []

    async def events() -> AsyncIterator[bytes]:
        try:
            for number in range(1, 1_000_000):
                yield b"data: %d\n\n" % number
                await anyio.sleep(pause if number == 3 else 0)
        finally:
            closed.set()

    def endpoint(request: Request) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(PolicyStack, policies=[Watches(chunks=[], endings=endings), After(count=3, waiting=1)])
    with on_uvicorn(app, http=http) as port, httpx2.Client(trust_env=False, timeout=60) as client:
        for _ in range(2):
            closed.clear()
            with client.stream("GET", f"http://127.0.0.1:{port}/") as response:
                assert response.headers["transfer-encoding"] == "chunked"
                assert b"".join(response.iter_raw()) == EXPECTED
            assert closed.wait(60)
    assert [ending[:2] for ending in endings] == [("refused", "After")] * 2

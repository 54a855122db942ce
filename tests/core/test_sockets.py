"""WebSockets that policies watch: what a real client sees, and what waits for nobody.

The order of things is a property of its own: `tests/fusion`.
"""

import json
import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from sigil_policy.core.catalogue import RATE_EXCEEDED
from sigil_policy.core.exchange import Exchange, Head, StreamEndedError
from sigil_policy.core.policy import Close, Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing import FrozenClock, drive
from tests.served import on_uvicorn

pytestmark = pytest.mark.anyio


class Ends(Policy):
    """Closes every connection at its check number `count` after `when`; checks are `every` seconds apart."""

    count: int = 1
    every: float = 0.0
    when: Any = None

    def on_check(self, ex: Exchange) -> Close | float:
        if self.when is not None and not self.when.is_set():
            return self.every
        asked = (ex.note(self) or 0) + 1
        ex.keep(self, asked)
        return Close(4401, "the credential has ended") if asked >= self.count else self.every


class Never(Policy):
    """Keeps what says `never` from the application, and closes at `over`."""

    async def on_message(self, ex: Exchange, message: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        if message.get("text") == "over":
            return Close(4000)
        return RATE_EXCEEDED("not that often", retry_after=3) if message.get("text") == "never" else None


class Outcome(Policy):
    """Writes down how exchanges end."""

    seen: Any

    def on_finish(self, ex: Exchange) -> None:
        self.seen.append((ex.outcome, ex.refused_by))


class Chooses(Policy):
    """Chooses a subprotocol where the application has not."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        if head.get(b"sec-websocket-protocol") is None:
            head.headers.append((b"sec-websocket-protocol", b"sigil.bearer"))


def accepting(*then: Any) -> Any:
    """An application that accepts, then does `then` in order: a text to send, or a list for what it hears."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for act in then:
            if isinstance(act, list):
                act.append(await receive())
            else:
                await send({"type": "websocket.send", "text": act})

    return app


PATIENT: Any = {"proxy": None, "open_timeout": 60}
IMPLEMENTATIONS = pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])


@IMPLEMENTATIONS
def test_an_idle_connection_is_closed_when_its_time_has_come(ws: str) -> None:
    seen: list[Any] = []
    heard: list[Any] = []
    idle = threading.Event()

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
                idle.set()
        except Exception as error:
            heard.append(error)
            raise

    app = Starlette(routes=[WebSocketRoute("/", echo)])
    app.add_middleware(PolicyStack, policies=[Outcome(seen=seen), Ends(count=3, every=0.05, when=idle)])
    with on_uvicorn(app, ws=ws) as port, connect(f"ws://127.0.0.1:{port}/", **PATIENT) as client:
        client.send("hello")
        assert client.recv(timeout=60) == "hello"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "the credential has ended")
    assert [error.code for error in heard] == [4401]
    # What Starlette makes of it is no error of the exchange.
    assert seen == [("refused", "Ends")]


@IMPLEMENTATIONS
def test_no_message_is_lost_however_often_somebody_is_asked(ws: str) -> None:
    """A wait for a message is given up again and again, while they come."""

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app = Starlette(routes=[WebSocketRoute("/", echo)])
    app.add_middleware(PolicyStack, policies=[Ends(count=1_000_000, every=0.0), Never()])
    pauses = threading.Event()
    with on_uvicorn(app, ws=ws) as port, connect(f"ws://127.0.0.1:{port}/", **PATIENT) as client:
        for burst in range(60):
            for number in range(5):
                client.send(f"{burst} {number}")
            assert [client.recv(timeout=60) for _ in range(5)] == [f"{burst} {number}" for number in range(5)]
            pauses.wait(0.001 * (burst % 16))


@IMPLEMENTATIONS
def test_a_message_that_is_refused_is_answered_and_the_connection_goes_on(ws: str) -> None:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app = Starlette(routes=[WebSocketRoute("/", echo)])
    app.add_middleware(PolicyStack, policies=[Never()])
    with on_uvicorn(app, ws=ws) as port, connect(f"ws://127.0.0.1:{port}/", **PATIENT) as client:
        for text in ("one", "never", "two"):
            client.send(text)
        assert client.recv(timeout=60) == "one"
        answer = json.loads(client.recv(timeout=60))
        assert answer["type"] == "error"
        assert answer["data"]["error_message"] == answer["data"]["detail"] == "not that often"
        assert (answer["data"]["error_code"], answer["data"]["retry_after"]) == ("RATE_001", 3)
        assert client.recv(timeout=60) == "two"
        client.send("over")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4000


@IMPLEMENTATIONS
def test_the_subprotocol_that_a_policy_chooses_is_the_one_the_client_gets(ws: str) -> None:
    """RFC 6455 section 4.2.2; ASGI has a key of its own for it, and no header (AS-18)."""
    app = PolicyStack(accepting("hi"), [Chooses()])
    with (
        on_uvicorn(app, ws=ws) as port,
        connect(f"ws://127.0.0.1:{port}/", subprotocols=["sigil.bearer"], **PATIENT) as client,
    ):  # type: ignore[list-item]
        assert client.subprotocol == "sigil.bearer"
        assert client.recv(timeout=60) == "hi"


async def test_what_the_application_has_chosen_is_seen_and_kept() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept", "subprotocol": "chat"})

    for version in ("2.0", "2.4"):
        asgi = {"asgi": {"version": "3.0", "spec_version": version}}
        sent = await drive(PolicyStack(app, [Chooses()]), kind="websocket", scope=asgi)
        assert sent.start["subprotocol"] == "chat"
        assert not sent.header_lines("sec-websocket-protocol")
        sent = await drive(PolicyStack(accepting(), [Chooses()]), kind="websocket", scope=asgi)
        assert sent.start["subprotocol"] == "sigil.bearer"
        assert not sent.header_lines("sec-websocket-protocol")


async def test_an_application_that_only_sends_is_ended_at_its_next_message() -> None:
    clock = FrozenClock()
    seen: list[Any] = []

    async def pushes(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for number in range(10):
            clock.advance(10)
            await send({"type": "websocket.send", "text": str(number)})

    app = PolicyStack(pushes, [Outcome(seen=seen), Ends(count=3, every=25)], clock=clock)
    sent = await drive(app, kind="websocket")
    assert [message.get("text") or message.get("code") for message in sent.messages[1:]] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        4401,
    ]
    assert seen == [("refused", "Ends")]


async def test_after_the_end_nothing_is_heard_or_sent() -> None:
    heard: list[Any] = []

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        heard.extend([await receive(), await receive()])
        with pytest.raises(StreamEndedError):
            await send({"type": "websocket.send", "text": "still here"})
        heard.append(await receive())

    talk = [{"type": "websocket.connect"}, *[{"type": "websocket.receive", "text": "hi"}] * 5]
    sent = await drive(PolicyStack(stubborn, [Ends()]), kind="websocket", incoming=talk)
    gone = {"type": "websocket.disconnect", "code": 4401, "reason": "the credential has ended"}
    assert heard == [gone] * 3
    assert [message["type"] for message in sent.messages] == ["websocket.accept", "websocket.close"]


async def test_a_client_that_has_left_cannot_be_told() -> None:
    """The close frame meets a broken connection: nobody sees an error, and it is over all the same."""
    heard: list[Any] = []

    def broken(message: Any) -> None:
        if message["type"] == "websocket.close":
            raise OSError("the client is gone")

    sent = await drive(PolicyStack(accepting(heard), [Ends()]), kind="websocket", on_send=broken)
    assert heard[0]["code"] == 4401
    assert [message["type"] for message in sent.messages] == ["websocket.accept"]


async def test_two_tasks_of_an_application_end_one_connection_once() -> None:
    """One waits for the client, one sends, as most do; both find that the time has come."""
    clock = FrozenClock()
    errors: list[Any] = []

    class Slow(Ends):
        async def on_check(self, ex: Exchange) -> Close | float:  # type: ignore[override]
            await anyio.lowlevel.checkpoint()
            return super().on_check(ex)

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})

        async def listen() -> None:
            while (await receive())["type"] != "websocket.disconnect":
                pass

        async def talk() -> None:
            try:
                for _ in range(100):
                    await anyio.lowlevel.checkpoint()
                    clock.advance(1)
                    await send({"type": "websocket.send", "text": "news"})
            except OSError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            tasks.start_soon(talk)

    with anyio.fail_after(60):
        sent = await drive(PolicyStack(both, [Slow(count=4, every=0.02)], clock=clock), kind="websocket")
    assert [message["type"] for message in sent.messages].count("websocket.close") == 1
    assert sent.messages[-1]["type"] == "websocket.close"
    assert [type(error) for error in errors] == [StreamEndedError]


async def test_who_could_not_find_out_is_asked_again() -> None:
    """A check that fails is no permission."""
    clock = FrozenClock()
    heard: list[Any] = []

    class Fails(Policy):
        def on_check(self, ex: Exchange) -> Close:
            if ex.note(self) is None:
                ex.keep(self, True)
                raise RuntimeError("the store is away")
            return Close(4401)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        with pytest.raises(RuntimeError):
            await receive()
        heard.append(await receive())

    await drive(PolicyStack(app, [Fails()], clock=clock), kind="websocket")
    assert heard[0]["code"] == 4401


@pytest.mark.parametrize("answer", [True, "close", object()])
async def test_what_is_no_answer_is_an_error_that_says_what_is(answer: Any) -> None:
    class Odd(Policy):
        def on_message(self, ex: Exchange, message: Any) -> Any:
            return answer

    talk = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hi"}]
    with pytest.raises(TypeError, match="None, a Problem or a Close"):
        await drive(PolicyStack(accepting([]), [Odd()]), kind="websocket", incoming=talk)


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1010, 1015, 1016, 2_999, 5_000, -1])
def test_a_code_that_no_close_frame_can_hold_is_refused(code: int) -> None:
    """RFC 6455 section 7.4 (WS-05)."""
    with pytest.raises(ValueError, match="close code"):
        Close(code)


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1013, 3000, 4000, 4401, 4999])
def test_the_other_codes_are_fine(code: int) -> None:
    assert Close(code).code == code


def test_a_reason_is_at_most_123_bytes() -> None:
    """RFC 6455 section 5.5 (WS-07): bytes, not characters."""
    assert Close(4000, "é" * 61).reason
    with pytest.raises(ValueError, match="123 bytes"):
        Close(4000, "é" * 62)


async def test_a_server_that_knows_no_reason_gets_none() -> None:
    """Close reasons came with version 2.3 (AS-18)."""
    for version, reason in (("2.2", ""), ("2.3", "the credential has ended")):
        asgi = {"asgi": {"version": "3.0", "spec_version": version}}
        sent = await drive(PolicyStack(accepting([]), [Ends()]), kind="websocket", scope=asgi)
        assert sent.messages[-1]["reason"] == reason

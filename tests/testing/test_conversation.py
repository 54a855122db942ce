"""A conversation with an application: step by step, bounded, and honest about what went wrong."""

import inspect
import json
import textwrap
import time
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.applications import Starlette

from sigil_policy.testing import Conversation, Mint, connect, drive, validated

pytestmark = pytest.mark.anyio


async def echo(scope: Any, receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": next(iter(scope["subprotocols"]), None)})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "bye":
            await send({"type": "websocket.close", "code": 4001})
            return
        await send({"type": "websocket.send", **{k: v for k, v in message.items() if k in ("text", "bytes")}})


async def test_a_websocket_step_by_step() -> None:
    async with connect(echo, "/chat", subprotocols=["chat"]) as socket:
        assert (await socket.accepted())["subprotocol"] == "chat"
        await socket.send_text("hello")
        assert await socket.receive_text() == "hello"
        await socket.send_bytes(b"\x00")
        assert await socket.receive_bytes() == b"\x00"
        await socket.send_json({"a": 1})
        assert await socket.receive_json() == {"a": 1}
        await socket.silence(0.01)
        await socket.send_text("bye")
        assert await socket.closed() == 4001
    assert [message["type"] for message in socket.sent.messages][-1] == "websocket.close"


async def test_a_long_stream_and_a_client_that_leaves() -> None:
    ended = []

    async def ticks(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def forever() -> None:
            for number in range(1_000_000):
                await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forever)
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()
        ended.append(True)

    async with connect(ticks, kind="http", window=1) as stream:
        assert [await stream.receive_body() for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert len(stream.sent.messages) < 12, "the application waits for a slow client"
    assert ended


async def test_a_request_whose_body_comes_in_time() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        while True:
            message = await receive()
            more = message["more_body"]
            await send({"type": "http.response.body", "body": message["body"].upper(), "more_body": more})
            if not more:
                return

    async with connect(app, method="POST", kind="http", body=None) as exchange:
        for part, more in ((b"a", True), (b"b", True), (b"", False)):
            await exchange.send({"type": "http.request", "body": part, "more_body": more})
            assert await exchange.receive_body() == part.upper()
    assert exchange.sent.body == b"AB"


async def test_a_lifespan() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for phase in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{phase}"
            await send({"type": f"lifespan.{phase}.complete"})

    async with connect(app, kind="lifespan") as lifespan:
        for phase in ("startup", "shutdown"):
            await lifespan.send({"type": f"lifespan.{phase}"})
            await lifespan.receive(f"lifespan.{phase}.complete")


async def test_the_examples_of_the_documentation() -> None:
    """What `Conversation` shows is what it does."""

    async def chat(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            if message["text"] == "bye":
                await send({"type": "websocket.close"})
                return
            text = json.loads(message["text"])["text"]
            await send({"type": "websocket.send", "text": json.dumps({"text": f"{text}, too"})})

    example = inspect.cleandoc(Conversation.__doc__ or "").partition("\n\n")[2].partition("\n\n`sent`")[0]
    code = "async def run():\n" + textwrap.indent(textwrap.dedent(example), "    ")
    names: dict[str, Any] = {"app": validated(chat), "connect": connect, "auth_headers": Mint().auth_headers}
    exec(compile(code, "Conversation", "exec"), names)
    assert example.count("async with") == 2
    await names["run"]()


async def test_a_lifespan_in_one_call() -> None:
    sent = await drive(validated(Starlette()), kind="lifespan")
    assert [message["type"] for message in sent.messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def fails(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    raise KeyError("canary")


async def test_what_the_application_raises_comes_out_bare() -> None:
    with pytest.raises(KeyError, match="canary"):
        async with connect(fails) as socket:
            await socket.accepted()
    with pytest.raises(KeyError, match="canary"):
        async with connect(fails, kind="http"):
            pass
    async with connect(fails, kind="http", raise_errors=False) as exchange:
        pass
    assert isinstance(exchange.sent.error, KeyError)


async def test_what_the_test_raises_comes_out_bare_and_ends_the_application() -> None:
    cancelled = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)

    with pytest.raises(ZeroDivisionError):  # noqa: PT012  so is it
        async with connect(waits, kind="http"):
            await anyio.lowlevel.checkpoint()
            raise ZeroDivisionError
    with pytest.raises(pytest.fail.Exception):  # noqa: PT012  so is it
        async with connect(waits, kind="http"):
            await anyio.lowlevel.checkpoint()
            pytest.fail("the test's own")
    assert cancelled == [True, True]


async def test_nothing_waits_for_ever() -> None:
    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await anyio.sleep_forever()

    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(AssertionError, match=r"no websocket.accept came within 0.05 s; sent so far: \[\]"):
            async with connect(deaf, timeout=0.05) as socket:
                await socket.accepted()
        with pytest.raises(AssertionError, match=r"has not ended within 0\.05 s"):
            async with connect(deaf, timeout=0.05):
                pass
        took = time.monotonic() - began
        if took < 3:
            break  # else the machine may have stood still: once more
    assert took < 3


async def test_what_came_instead_is_said() -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close", "code": 1008})

    with pytest.raises(AssertionError, match=r"expected websocket\.accept, got .*1008"):
        async with connect(refuses) as socket:
            await socket.accepted()
    with pytest.raises(AssertionError, match="has ended, and sent nothing more"):  # noqa: PT012  so is it
        async with connect(refuses) as socket:
            await socket.receive()
            await socket.receive()
    with pytest.raises(AssertionError, match="expected nothing for"):
        async with connect(refuses) as socket:
            await socket.silence()


async def test_a_server_that_gives_up_cancels() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            seen.append(isinstance(error, anyio.get_cancelled_exc_class()))
            raise

    async with connect(app, kind="http") as exchange:
        await anyio.lowlevel.checkpoint()
        exchange.cancel()
    assert seen == [True]


async def test_a_block_can_be_cancelled_from_outside() -> None:
    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.05) as limit:
        async with connect(deaf) as socket:
            await socket.receive()
    assert limit.cancelled_caught


async def test_one_exchange_and_a_conversation_have_the_same_scope() -> None:
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(dict(scope))

    await drive(app, "POST", "/a", headers={"X-A": "1"}, query="b=c")
    async with connect(app, "/a", kind="http", method="POST", headers={"X-A": "1"}, query="b=c"):
        pass
    assert scopes[0] == scopes[1]

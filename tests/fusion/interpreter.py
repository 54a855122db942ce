"""The rules of the pass, said as plainly as they can be: one policy, one layer, one `try`/`finally`.

This is the specification of `core/stack.py` and shares no line with it. It is slow on purpose, and it must stay so
simple that each line can be checked against the rules by reading. `test_fusion.py` breaks it line by line to see that
the comparison notices.
"""

import contextlib
import inspect
import math
from typing import Any

import anyio
from starlette.websockets import WebSocketDisconnect

from sigil_policy.core.exchange import Exchange, Head, StreamEndedError
from sigil_policy.core.host import PLAIN
from sigil_policy.core.policy import Close, Policy
from sigil_policy.core.problems import DEFAULT_STYLE, Problem

STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")


def interpret(app: Any, policies: Any, clock: Any) -> Any:
    """`app` with `policies` around it (outermost first): an ASGI application."""

    async def interpreted(scope: Any, receive: Any, send: Any) -> None:
        if not policies:
            return await app(scope, receive, send)
        ex = Exchange(scope, receive, clock, PLAIN, DEFAULT_STYLE)

        async def hear() -> Any:
            if ex._closing:
                return ex._closing
            message, ex._replay = ex._replay, None
            message = message or await receive()
            if message["type"] in ("http.disconnect", "websocket.disconnect") and not ex.done:
                ex.gone = True
            return message

        async def deliver(message: Any) -> None:
            if ex._ended:
                raise StreamEndedError
            # The status says what was handed to the server; what a dying connection did with it, nobody knows.
            kind = message["type"]
            if kind in STARTS:
                ex.status = message.get("status", 101)
            elif kind == "websocket.close":
                ex.status = ex.status or 403  # what servers answer to a handshake that is closed
            try:
                await send(message)
            except Exception:
                ex.gone = ex.gone or not ex.done
                raise
            if kind == "http.response.body":
                ex.sent_bytes += len(message.get("body", b""))
            if kind == "websocket.send":
                ex.sent_bytes += len(message.get("bytes") or message.get("text") or b"")
            last = kind.endswith("response.body") and not message.get("more_body", False)
            ex.done = ex.done or last or kind in ("http.response.pathsend", "websocket.close")

        async def innermost(inward: Any, outward: Any) -> None:
            try:
                await app(scope, inward, outward)
            except Exception as error:
                if not (ex._ended and because_of_the_end(error)):
                    raise

        inner = innermost
        for policy in reversed(policies):
            inner = Layer(policy, ex, scope, inner).run
        return await inner(hear, deliver)

    return interpreted


class Layer:
    """One policy around `inner`; `outward` is the send of the next layer out."""

    def __init__(self, policy: Any, ex: Any, scope: Any, inner: Any) -> None:
        self.policy, self.ex, self.scope, self.inner = policy, ex, scope, inner
        self.held: Any = None  # a head and the body messages gathered behind it
        self.left = False  # a response start has left this layer outwards
        self.watches = False  # its policy wants the chunks of this response
        self.promised = False  # the head that left says how the body ends: it cannot be cut
        self.opened = False  # a websocket.accept has left this layer outwards
        self.due = 0.0  # when its policy wants to be asked again

    async def run(self, inward: Any, outward: Any) -> None:
        self.inward, self.outward = inward, outward
        try:
            await self.guarded()
        except BaseException as error:
            self.ex.error = error
            raise
        finally:
            await self.finish()

    async def guarded(self) -> None:
        policy, ex = self.policy, self.ex
        own = True  # an error of our own on_request, reply or entering is for the policies outside
        try:
            answer = await settled(policy.on_request(ex))
            if answer is not None:
                answer = rendered(answer, ex)
                if answer.status >= 400:
                    ex.refused_by = ex.refused_by or type(policy).__name__
                return await self.reply(answer)
            async with policy.around(ex) or contextlib.nullcontext():
                own = False
                try:
                    await self.inner(self.hear, self.send)
                    await self.release()
                except BaseException as error:
                    ex.error = error
                    raise
        except Exception as error:
            ex.error = error
            if own or self.left:
                raise
            answer = await settled(policy.on_error(ex, error))
            if answer is None:
                raise
            answer = rendered(answer, ex)
            await self.reply(answer)
            if answer.reraise:
                raise

    async def finish(self) -> None:
        try:
            waiting = self.policy.on_finish(self.ex)
            if waiting is not None:
                with anyio.move_on_after(5, shield=True):
                    await waiting
        except Exception:
            pass
        except BaseException as error:
            self.ex.error = error
            raise

    async def hear(self) -> Any:
        while True:
            if await self.check():
                return self.ex._closing
            message = await self.inward()
            if self.ex._closing or message["type"] != "websocket.receive" or not self.opened:
                return message
            if await self.check():
                return self.ex._closing
            answer = await settled(self.policy.on_message(self.ex, message))
            if answer is None:
                return message
            if isinstance(answer, Close):
                await self.close(answer)
                return self.ex._closing
            with contextlib.suppress(StreamEndedError):  # a policy outside has closed it with this very message
                await self.outward({"type": "websocket.send", "text": DEFAULT_STYLE.message(answer, self.ex)})

    async def check(self) -> bool:
        """Ask the policy if its time has come; whether that has closed the connection."""
        if self.opened and not self.ex._closing and self.due <= self.ex.clock.monotonic():
            self.due = 0.0
            answer = await settled(self.policy.on_check(self.ex))
            if isinstance(answer, Close):
                await self.close(answer)
                return True
            self.due = math.inf if answer is None else self.ex.clock.monotonic() + answer
        return False

    async def close(self, end: Any) -> None:
        reason = end.reason if self.scope.get("asgi", {}).get("spec_version", "2.0") >= "2.3" else ""
        self.ex.refused_by = type(self.policy).__name__
        with contextlib.suppress(Exception):  # who has left cannot be told
            await self.outward({"type": "websocket.close", "code": end.code, "reason": reason})
        self.ex._closing = {"type": "websocket.disconnect", "code": end.code, "reason": end.reason}
        self.ex._ended = True

    async def send(self, message: Any) -> None:
        if self.ex._ended:
            raise StreamEndedError
        kind = message["type"]
        if kind in STARTS:
            await self.release()
            if self.ex._ended:
                return
            head = Head(message.get("status", 101), message.get("headers") or ())
            if self.holds(message, head):
                self.held = message, head, []
            else:
                await self.depart(message, head, [])
        elif kind == "http.response.body" and self.held:
            await self.gather(message)
        elif kind == "http.response.body":
            await self.chunk(message)
        else:
            await self.release()
            if self.ex._ended:
                return
            self.left = self.left or kind == "websocket.close"
            self.opened = self.opened and kind != "websocket.close"
            if await self.check():
                raise StreamEndedError
            await self.outward(message)

    def holds(self, message: Any, head: Any) -> bool:
        if message["type"] == "websocket.accept" or type(self.policy).on_body is Policy.on_body:
            return False
        if not self.policy.wants_body(self.ex, head) or message["type"] != "http.response.start":
            return False
        if (head.get(b"content-type") or b"").lower().startswith(b"text/event-stream"):
            return False
        if message.get("trailers"):
            return False
        length = head.get(b"content-length")
        return length is None or (length.isdigit() and int(length) <= self.policy.bound)

    async def gather(self, message: Any) -> None:
        start, head, parts = self.held
        parts.append(message)
        more = message.get("more_body", False)
        body = b"".join(part.get("body", b"") for part in parts)
        if len(body) > self.policy.bound or (more and head.get(b"content-length") is None):
            return await self.release()
        if more:
            return None
        self.held = None
        new = await settled(self.policy.on_body(self.ex, head, body))
        if new is not None:
            parts = [{"type": "http.response.body", "body": new, "more_body": False}]
            if head.status in (204, 304):
                head.remove(b"content-length")
            elif head.get(b"content-length") is not None:
                head.replace(b"content-length", b"%d" % len(new))
        return await self.depart(start, head, parts)

    async def release(self) -> None:
        if self.held:
            held, self.held = self.held, None
            if not self.ex._ended:
                await self.depart(*held)

    async def depart(self, start: Any, head: Any, parts: Any) -> None:
        if start.get("subprotocol") is not None:
            head.replace(b"sec-websocket-protocol", start["subprotocol"].encode())
        self.policy.on_response(self.ex, head)
        if start["type"] == "http.response.start":
            self.watches = self.policy.wants_chunks(self.ex, head)
            self.promised = head.get(b"content-length") is not None or start.get("trailers", False)
        self.left = True
        if start["type"] == "websocket.accept":
            self.opened = True
            if chosen := head.get(b"sec-websocket-protocol"):
                start = {**start, "subprotocol": chosen.decode()}
            head.remove(b"sec-websocket-protocol")
        if start["type"] != "websocket.accept":
            await self.outward({**start, "status": head.status, "headers": head.headers})
        elif self.scope.get("asgi", {}).get("spec_version", "2.0") >= "2.1":
            await self.outward({**start, "headers": head.headers})
        else:
            await self.outward(start)
        for part in parts:
            if not self.ex._ended:
                await self.chunk(part)

    async def chunk(self, message: Any) -> None:
        end = await settled(self.policy.on_chunk(self.ex, message.get("body", b""))) if self.watches else None
        if end is None or self.promised or not message.get("more_body", False):
            return await self.outward(message)
        await self.outward(message)
        if self.ex._ended:
            return None  # a policy outside has ended it with this very chunk
        await self.outward({"type": "http.response.body", "body": end.last})
        self.ex._ended = True
        self.ex.refused_by = type(self.policy).__name__
        return None

    async def reply(self, answer: Any) -> None:
        headers, body, prefix = list(answer.headers), answer.body, ""
        if self.scope["type"] == "websocket":
            prefix = "websocket."
            if "websocket.http.response" not in (self.scope.get("extensions") or {}):
                return await self.outward({"type": "websocket.close", "code": answer.code, "reason": ""})
        if answer.status in (204, 304):
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        if answer.status in (204, 304) or self.ex.method == "HEAD":
            body = b""
        await self.outward({"type": f"{prefix}http.response.start", "status": answer.status, "headers": headers})
        return await self.outward({"type": f"{prefix}http.response.body", "body": body})


async def settled(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def rendered(answer: Any, ex: Any) -> Any:
    return DEFAULT_STYLE.render(answer, ex) if isinstance(answer, Problem) else answer


def because_of_the_end(error: Any) -> bool:
    if isinstance(error, ExceptionGroup):
        return all(because_of_the_end(one) for one in error.exceptions)
    if not isinstance(error, Exception) or isinstance(error, StreamEndedError | WebSocketDisconnect):
        return isinstance(error, Exception)
    return because_of_the_end(error.__cause__ or error.__context__)

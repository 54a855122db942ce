"""What an application hears on a WebSocket, where policies watch the connection.

Rules, for each policy by itself, as if there were one stack for each:

* Nobody is asked before `websocket.accept` has left the policy outwards, or after `websocket.close` has.
* `on_message` sees what the client sends, outermost first. A `Problem` answers it with a message and it goes no further
  in; `Close` ends the connection.
* `on_check` is asked before the application hears or sends anything once its time has come, and at that time if the
  application is waiting to hear something.
* After a `Close` the application hears `websocket.disconnect`, and can send nothing.

There is no task beside the application's: an idle connection costs a timer, and only where somebody asked for one.
"""

from inspect import isawaitable
from math import inf
from typing import TYPE_CHECKING, Any

from anyio import move_on_after

from sigil_policy.core.exchange import Message, Receive, StreamEndedError
from sigil_policy.core.policy import Close
from sigil_policy.core.problems import Problem

if TYPE_CHECKING:
    from sigil_policy.core.passing import Layer, Pass

_SHORTEST = 0.01  # seconds: a policy that always wants to be asked again does not spin


class Socket:
    """The receiving side of one WebSocket in one stack."""

    __slots__ = ("_due", "_layers", "_pass", "_receive", "opened")

    def __init__(self, passing: "Pass", layers: "tuple[Layer, ...]", receive: Receive) -> None:
        self._pass = passing
        self._layers = layers
        self._receive = receive
        self.opened = passing.stack.depth
        """`websocket.accept` has left the policies from this one inwards, and no close."""
        self._due = {layer.index: -inf for layer in layers if layer.on_check is not None}

    async def receive(self) -> Message:
        """The next message for the application."""
        ex = self._pass.ex
        level = self._pass.stack.depth
        while True:
            try:
                await self.check(level)
                # Which is answered for good once a policy has closed the connection.
                message = await self._hear()
                if message is None:
                    level = self._pass.stack.depth
                    continue
                if message["type"] != "websocket.receive" or ex._closing is not None:  # noqa: SLF001
                    return message if ex._closing is None else await self._receive()  # noqa: SLF001
                refused = await self._refuses(message)
                if refused is None:
                    return message
                # As in a stack of its own: who is further in has not noticed anything.
                level = refused + 1
            except StreamEndedError:
                if ex._closing is None:  # noqa: SLF001
                    raise
                return await self._receive()

    async def _hear(self) -> Message | None:
        """A message, or None when somebody's time has come before one."""
        due = min((at for index, at in self._due.items() if index >= self.opened), default=inf)
        ex = self._pass.ex
        if due == inf:
            return await self._receive()
        with move_on_after(max(due - ex.clock.monotonic(), _SHORTEST)):
            return await self._receive()
        return None

    async def _refuses(self, message: Message) -> int | None:
        """The policy that keeps `message` from the application, if there is one."""
        ex = self._pass.ex
        for layer in self._layers:
            if layer.index < self.opened:
                continue
            await self._check(layer)
            if layer.on_message is None:
                continue
            heard = layer.on_message(ex, message)
            if isawaitable(heard):
                heard = await heard
            if isinstance(heard, Close):
                await self._close(layer, heard)
            elif isinstance(heard, Problem):
                text = ex.style.message(heard, ex)
                await self._pass.carry({"type": "websocket.send", "text": text}, layer.index)
                return layer.index
            elif heard is not None:
                raise TypeError(f"on_message returns None, a Problem or a Close, not {type(heard).__name__}")
        return None

    async def check(self, level: int) -> None:
        """A message is about to pass the layers below `level` outwards."""
        for layer in reversed(self._layers):
            if layer.index < level:
                await self._check(layer)

    async def _check(self, layer: "Layer") -> None:
        """Ask `layer` if its time has come. Raises `StreamEndedError` if that was the end."""
        index, ex = layer.index, self._pass.ex
        clock = ex.clock
        if index < self.opened or self._due.get(index, inf) > clock.monotonic() or ex._closing is not None:  # noqa: SLF001
            return
        # Nobody else asks meanwhile. Who could not find out is asked again.
        self._due[index], again = inf, -inf
        try:
            heard: Any = layer.on_check(ex)
            if isawaitable(heard):
                heard = await heard
            if isinstance(heard, Close):
                await self._close(layer, heard)
            if heard is not None and not isinstance(heard, int | float):
                raise TypeError(f"on_check returns seconds, None or a Close, not {type(heard).__name__}")
            again = inf if heard is None else clock.monotonic() + heard
        finally:
            self._due[index] = again

    async def _close(self, layer: "Layer", close: Close) -> None:
        """End the connection at `layer`. Always raises `StreamEndedError`."""
        passing, ex = self._pass, self._pass.ex
        if ex._closing is None:  # noqa: SLF001
            spoken = close.reason if passing.version >= (2, 3) else ""
            ex._closing = {"type": "websocket.close", "code": close.code, "reason": spoken}  # noqa: SLF001
            ex._replay = {**ex._closing, "type": "websocket.disconnect", "reason": close.reason}  # noqa: SLF001
            ex.refused_by = layer.name
            try:
                await passing.carry(ex._closing, layer.index)  # noqa: SLF001
            except Exception:  # noqa: BLE001, S110  the client has left already: it is over, either way
                pass
            finally:
                ex._ended = True  # noqa: SLF001
        raise StreamEndedError("a policy has closed this WebSocket; nothing more is sent")

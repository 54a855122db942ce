"""Work that many wait for, and that is not given up when the one who has begun it leaves.

    flight = Flight()
    await flight.fly(work, land)        # whoever begins it
    await flight.done.wait()            # whoever comes meanwhile

On asyncio the work has a task of its own, without the context variables of who has begun it: no scope shields from
`Task.cancel` and `asyncio.timeout`, and those who leave could end it for the others, time after time. On trio it is
done by the one who begins it, and has to shield itself from cancellation. Either way it has to bound its own time.
"""

from asyncio import Task, get_running_loop
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from anyio import Event
from anyio.lowlevel import current_token


class Flight:
    """Work on its way, and the event loop that it is on. `done` is set when it has ended, however it did."""

    __slots__ = ("done", "loop", "task")

    def __init__(self) -> None:
        self.done = Event()
        self.loop: object = current_token()
        self.task: Task[None] | None = None

    async def fly(self, work: Callable[[], Coroutine[Any, Any, None]], land: Callable[[], None]) -> None:
        """Do `work`, and wait until it has ended. `land` is called before those who wait go on, also where the event
        loop has ended the work, or never begun it."""

        def ended(_: object) -> None:
            try:
                land()
            finally:
                self.done.set()

        try:
            loop = get_running_loop()
        except RuntimeError:  # trio
            try:
                await work()
            finally:
                ended(None)
            return
        self.task = loop.create_task(work(), context=Context())
        self.task.add_done_callback(ended)
        await self.done.wait()

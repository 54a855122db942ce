"""A store on another machine, as far as a policy can tell, that can be taken away."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from sigil_policy.stores.limits import Decision, Lease, Plan, StoreUnavailableError
from sigil_policy.stores.memory import FixedWindows


class Remote:
    """Counts in this process and answers later; raises while `away`."""

    remote = True
    algorithms = frozenset(("fixed",))

    def __init__(self) -> None:
        self.inner = FixedWindows()
        self.away = False
        self.calls: list[str] = []
        self.closed = False

    async def _reach(self, what: str) -> None:
        await anyio.lowlevel.checkpoint()
        if self.away:
            raise StoreUnavailableError("away", 2.5, unsent=True)
        self.calls.append(what)

    def prepare(self, plan: Plan) -> None:
        self.inner.prepare(plan)

    async def admit(self, key: Any, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float) -> Decision:
        await self._reach("admit")
        return self.inner.admit(key, plan, cost, estimate, now)

    async def extend(self, lease: Lease, more: tuple[int, ...], now: float) -> tuple[int, ...] | None:
        await self._reach("extend")
        return self.inner.extend(lease, more, now)

    async def settle(self, lease: Lease, used: tuple[int, ...], now: float) -> tuple[int, ...]:
        await self._reach("settle")
        return self.inner.settle(lease, used, now)

    async def charge(self, key: Any, plan: Plan, amounts: tuple[int, ...], now: float) -> tuple[int, ...]:
        await self._reach("charge")
        return self.inner.charge(key, plan, amounts, now)

    async def aclose(self) -> None:
        self.closed = True


class Telling(Remote):
    """One that says when it is back."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Callable[[], Awaitable[None]]] = []

    def on_restored(self, callback: Callable[[], Awaitable[None]]) -> None:
        self.told.append(callback)

    async def return_(self) -> None:
        self.away = False
        for callback in self.told:
            await callback()

"""A store that fails on command.

    store = Faulty(memory_limits("fixed"))
    app = PolicyStack(app, policies=[Problems(), RateLimit(store=store, on_store_loss="open")])
    store.away()
    assert (await drive(app)).status == 200
    store.back()

It stands in front of any store of limits, slots, revocations, API keys, tickets or used proofs, and makes one that is
in this process look like one on a server: what may wait is answered later, `remote` is True.
"""

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel

from sigil_policy.stores.limits import StoreUnavailableError

_WAITING = frozenset(
    (
        "admit", "charge", "extend", "settle",  # limits
        "give_back", "take",  # slots
        "refresh", "restore", "revoke",  # revocations
        "end", "find", "get", "records", "save",  # API keys
        "issue", "redeem",  # tickets
        "claim",  # used proofs
    )
)  # fmt: skip
_NOTHING: Any = object()


class Faulty:
    """`store`, until it is told otherwise; each command holds until the next one.

        faulty = Faulty(MemoryApiKeyStore([record]))
        faulty.slow(0.2)

    `calls` are the names of the methods that were waited for, in order, those that failed too. What never waits
    (`prepare`, `hold`, `revoked`, `note_use`) goes to the store whatever is commanded, as it does where a server is
    away. `closed` says whether `aclose` was called.
    """

    remote = True

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls: list[str] = []
        self.closed = False
        self._refreshed: float | None = None
        self.back()

    def back(self) -> None:
        """It answers as it should."""
        self._error: Callable[[], BaseException] | None = None
        self._delay = 0.0
        self._answer = _NOTHING

    def away(self, retry_after: float = 2.5) -> None:
        """Nobody is there: `StoreUnavailableError` at once, nothing was done."""
        self.back()
        self._error = lambda: StoreUnavailableError("away", retry_after, unsent=True)

    def raises(self, error: BaseException) -> None:
        """It raises `error`: also what no store may raise."""
        self.back()
        self._error = lambda: error

    def slow(self, seconds: float) -> None:
        """It answers after so many real seconds."""
        self.back()
        self._delay = seconds

    def hangs(self) -> None:
        """It never answers; whoever asks must have a deadline of its own. (The stores of limits have theirs inside: a
        policy may rely on it.)"""
        self.slow(float("inf"))

    def answers(self, nonsense: Any) -> None:
        """It answers `nonsense`, whatever it is asked."""
        self.back()
        self._answer = nonsense

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy that is being made has no store yet
            raise AttributeError(name)
        found = getattr(self.store, name)
        if name not in _WAITING:
            return found

        async def later(*given: Any, **options: Any) -> Any:
            self.calls.append(name)
            answer, error = self._answer, self._error
            if self._delay:
                await anyio.sleep(self._delay)
            else:
                await anyio.lowlevel.checkpoint()
            if error is not None:
                raise error()
            if answer is not _NOTHING:
                return answer
            done = found(*given, **options)
            return await done if hasattr(done, "__await__") else done

        return later

    # A copy of revocations that has to be refreshed, also where the store itself is the truth.

    def age(self, now: float) -> float:
        return float("inf") if self._refreshed is None else now - self._refreshed

    def resting(self, now: float) -> bool:
        return False

    async def refresh(self, now: float) -> None:
        await self.__getattr__("refresh")(now)
        self._refreshed = now

    async def aclose(self) -> None:
        self.closed = True
        if hasattr(self.store, "aclose"):
            await self.store.aclose()

    def __repr__(self) -> str:
        return f"Faulty({self.store!r})"

"""What a store of limits promises: every window of a caller and the token budget, decided together.

    plan = Plan(name="free", windows=(Window(20, 60, name="minute"), Window(10_000, 60, "tokens", "tokens-minute")))
    decision = store.admit("bearer:0::alice", plan, 1, (800,), now)    # one request, 800 tokens reserved
    if decision.admitted:
        ...
        store.settle(decision.lease, (640,), now)                      # what was used; 160 come back

Guarantees of every store:

* **All or nothing.** A request that one window refuses consumes nothing in any of them, on no level.
* **One call decides, one call settles.** They may return an awaitable (a store on another machine); a store that does
  says so with `remote = True`.
* **A lease settles once.** Settling it again changes nothing. More than was reserved is charged to the present window;
  less is given back only to the window that was charged, never to a later one.
* **Numbers may change, use does not.** What a caller used is kept per unit and length of window, so another tier, or a
  tier with other numbers, starts from it.

A remote store raises `StoreUnavailableError`, and nothing else, when it cannot decide in time.
"""

from collections.abc import Awaitable
from typing import Any, Literal, NamedTuple, Protocol

Unit = Literal["requests", "tokens", "input-tokens", "output-tokens"]
Algorithm = Literal["fixed", "sliding", "gcra"]
Calendar = Literal["month"]

MONTH = 31 * 86_400
"""What the longest calendar month has of seconds: the length that a window of one is said to have."""


class StoreUnavailableError(ConnectionError):
    """The store cannot decide now. `retry_after` is when to ask again, in seconds.

        raise StoreUnavailableError("no answer within 50 ms", retry_after=0.5)

    `unsent` says that the store surely has not done what it was asked.
    """

    def __init__(self, message: str, retry_after: float = 1.0, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.unsent = unsent


class Window(NamedTuple):
    """At most `limit` of `unit` in `seconds`. `name` is what headers and problems call it.

    With `calendar="month"` it begins with each month (UTC); its `seconds` are then `MONTH`, and only the algorithm
    "fixed" counts it.
    """

    limit: int
    seconds: int
    unit: Unit = "requests"
    name: str = ""
    calendar: Calendar | None = None

    @property
    def measure(self) -> str:
        """What it counts over what time, whatever the limit: use is kept under this name."""
        return f"{self.unit}:{self.calendar or self.seconds}"


class Plan:
    """The windows of one tier, request windows first. Made once; compared and hashed by identity.

    `overflow` names the bucket that new callers of this plan share while the store is full, and `anonymous` says that
    nobody vouched for these callers: they cannot take the last half of a store's room.

    A plan of several `levels` (a key, its user, their organisation) is decided as one: `windows` are the request
    windows of all levels in their order, then their token windows, and callers are named by a tuple of keys, one for
    each level. Nothing else of it is used: the levels are plans of their own.

    `lease` is for how many seconds a reservation holds without a sign of life from the process that made it. It then
    comes back (`lapsed="returned"`) or stays charged (`lapsed="charged"`). A store in this process dies with it and
    needs neither.
    """

    __slots__ = (
        "algorithm",
        "anonymous",
        "lapsed",
        "lease",
        "levels",
        "name",
        "overflow",
        "requests",
        "tokens",
        "windows",
    )

    def __init__(
        self,
        *,
        name: str,
        windows: tuple[Window, ...] = (),
        levels: tuple["Plan", ...] = (),
        algorithm: Algorithm = "fixed",
        anonymous: bool = False,
        overflow: str = "",
        lease: float = 60.0,
        lapsed: Literal["returned", "charged"] = "returned",
    ) -> None:
        if levels:
            if windows or any(level.levels or level.algorithm != levels[0].algorithm for level in levels):
                raise ValueError(f"plan {name!r}: levels are plans without levels, all of one algorithm")
            windows = tuple(window for level in levels for window in level.windows)
            algorithm = levels[0].algorithm
        self.name = name
        self.levels: tuple[Plan, ...] = levels
        self.requests = tuple(window for window in windows if window.unit == "requests")
        self.tokens = tuple(window for window in windows if window.unit != "requests")
        self.windows: tuple[Window, ...] = self.requests + self.tokens
        self.algorithm: Algorithm = algorithm
        self.anonymous = anonymous
        # A key of a principal has colons, one of an address has none: this one is no caller's.
        self.overflow = overflow or ("overflow anonymous" if anonymous else f"overflow {name}")
        self.lease = lease
        self.lapsed: Literal["returned", "charged"] = lapsed
        if not windows or (not levels and len({window.measure for window in windows}) < len(windows)):
            raise ValueError(f"plan {name!r} needs windows of different lengths, not {list(windows)}")
        if any(window.limit < 1 or window.seconds < 1 for window in windows):
            raise ValueError(f"plan {name!r}: a window has a limit and a length of at least 1, not {list(windows)}")
        if algorithm != "fixed" and any(window.calendar for window in windows):
            raise ValueError(f"plan {name!r}: only the algorithm 'fixed' counts calendar months, not {algorithm!r}")

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, {list(self.windows)})"


Key = str | tuple[str, ...]
"""Who is counted: one name, or for a plan of several levels one for each of them."""


class Lease:
    """Tokens that one request holds until it is settled: `reserved` of each token window of the plan.

    `at` is when they were reserved, and `mark` the store's own note.
    """

    __slots__ = ("at", "key", "mark", "plan", "reserved", "settled")

    def __init__(self, key: Key, plan: Plan, reserved: tuple[int, ...], at: float, mark: Any = None) -> None:
        self.key = key
        self.plan = plan
        self.reserved = reserved
        self.at = at
        self.mark = mark
        self.settled = False

    def __repr__(self) -> str:
        return f"Lease({self.plan.name!r}, reserved={self.reserved}, settled={self.settled})"


class Decision(NamedTuple):
    """The answer to one request. All tuples follow `Plan.windows`.

    `remaining` is what the caller may still spend (never below 0), `reset` when that is renewed (seconds since the
    epoch): for a window that refused, when this request would be admitted. `key` is the bucket that was counted: the
    caller's, or the one it shares while the store is full. `at` is the moment of the decision, by the clock that
    `reset` is in. `lease` is there iff an estimate was given and the request admitted. `refused_by` are the indices of
    the windows that refused, the one to wait for longest first, and `retry_after` is that wait in seconds.
    """

    admitted: bool
    remaining: tuple[int, ...]
    reset: tuple[float, ...]
    key: Key
    at: float
    lease: Lease | None = None
    refused_by: tuple[int, ...] = ()
    retry_after: float = 0.0


class LimitStore(Protocol):
    """Where the counters live. `now` is seconds since the epoch; a store with a clock of its own may ignore it.

        await check_limit_store(MyStore, algorithm="fixed")             # sigil_policy.testing: what every store keeps

    Amounts of tokens are tuples that follow `Plan.tokens`. A store may have `async def aclose(self)`.
    """

    @property
    def remote(self) -> bool:
        """Whether its methods return awaitables."""
        ...

    @property
    def algorithms(self) -> frozenset[Algorithm]:
        """The algorithms it can count by."""
        ...

    def prepare(self, plan: Plan) -> None:
        """Be told of a plan before there are requests: work that need not be done while one waits goes here."""
        ...

    def admit(
        self, key: Key, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float
    ) -> Decision | Awaitable[Decision]:
        """Decide one request that costs `cost` in each request window.

        `estimate` is how many tokens to reserve; 0 reserves none, but is refused when nothing remains; with None the
        token windows are reported and don't decide. A cost over a window's limit takes the whole window. An estimate
        over a token window's limit is never admitted: ask for no such thing.
        """
        ...

    def extend(
        self, lease: Lease, more: tuple[int, ...], now: float
    ) -> tuple[int, ...] | Awaitable[tuple[int, ...] | None] | None:
        """Reserve `more` for a lease that is open: all of it, or nothing and None. `lease.reserved` says what is held.

        Returns what remains in each token window. What is charged to a window that has ended since comes back with
        nothing: it is gone with it.
        """
        ...

    def settle(self, lease: Lease, used: tuple[int, ...], now: float) -> tuple[int, ...] | Awaitable[tuple[int, ...]]:
        """Replace the reservation of `lease` by what was `used`; returns what remains in each token window."""
        ...

    def charge(
        self, key: Key, plan: Plan, amounts: tuple[int, ...], now: float
    ) -> tuple[int, ...] | Awaitable[tuple[int, ...]]:
        """Count what has happened already, whatever the limits say: an amount for each of `plan.windows`.

        Returns what remains in each token window.
        """
        ...

"""What a store of limits promises: every window of a caller and the token budget, decided together.

    plan = Plan(name="free", windows=(Window(20, 60, name="minute"), Window(10_000, 60, "tokens", "tokens-minute")))
    decision = store.admit("bearer:0::alice", plan, 1, 800, now)    # one request, 800 tokens reserved
    if decision.admitted:
        ...
        store.settle(decision.lease, 640, now)                      # what was used; 160 come back

Guarantees of every store:

* **All or nothing.** A request that one window refuses consumes nothing in any of them.
* **One call decides, one call settles.** Both may return an awaitable (a store on another machine); a store that does
  says so with `remote = True`.
* **A lease settles once.** Settling it again changes nothing. More than was reserved is charged to the present window;
  less is given back only to the window that was charged, never to a later one.
* **Numbers may change, use does not.** What a caller used is kept per unit and length of window, so another tier, or a
  tier with other numbers, starts from it.
"""

from collections.abc import Awaitable
from typing import Any, Literal, NamedTuple, Protocol

Unit = Literal["requests", "tokens"]
Algorithm = Literal["fixed", "sliding", "gcra"]


class Window(NamedTuple):
    """At most `limit` of `unit` in `seconds`. `name` is what headers and problems call it."""

    limit: int
    seconds: int
    unit: Unit = "requests"
    name: str = ""


class Plan:
    """The windows of one tier, request windows first. Made once; compared and hashed by identity.

    `overflow` names the bucket that new callers of this plan share while the store is full, and `anonymous` says that
    nobody vouched for these callers: they cannot take the last half of a store's room.
    """

    __slots__ = ("algorithm", "anonymous", "name", "overflow", "requests", "tokens", "windows")

    def __init__(
        self,
        *,
        name: str,
        windows: tuple[Window, ...],
        algorithm: Algorithm = "fixed",
        anonymous: bool = False,
        overflow: str = "",
    ) -> None:
        self.name = name
        self.requests = tuple(window for window in windows if window.unit == "requests")
        self.tokens = tuple(window for window in windows if window.unit == "tokens")
        self.windows = self.requests + self.tokens
        self.algorithm: Algorithm = algorithm
        self.anonymous = anonymous
        # A key of a principal has colons, one of an address has none: this one is no caller's.
        self.overflow = overflow or ("overflow anonymous" if anonymous else f"overflow {name}")
        measured = [(window.unit, window.seconds) for window in windows]
        if not windows or len(set(measured)) < len(measured):
            raise ValueError(f"plan {name!r} needs windows of different lengths, not {list(windows)}")
        if any(window.limit < 1 or window.seconds < 1 for window in windows):
            raise ValueError(f"plan {name!r}: a window has a limit and a length of at least 1, not {list(windows)}")

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, {list(self.windows)})"


class Lease:
    """Tokens that one request holds until it is settled. `mark` is the store's own note."""

    __slots__ = ("at", "key", "mark", "plan", "reserved", "settled")

    def __init__(self, key: str, plan: Plan, reserved: int, at: float, mark: Any = None) -> None:
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
    epoch): for a window that refused, when this request would be admitted. `refused_by` are the indices of the windows
    that refused, the one to wait for longest first, and `retry_after` is that wait in seconds. `key` is the bucket that
    was counted: the caller's, or the one it shares while the store is full. `lease` is there iff an estimate was given
    and the request admitted.
    """

    admitted: bool
    remaining: tuple[int, ...]
    reset: tuple[float, ...]
    key: str
    lease: Lease | None = None
    refused_by: tuple[int, ...] = ()
    retry_after: float = 0.0


class LimitStore(Protocol):
    """Where the counters live. `now` is seconds since the epoch; a store with a clock of its own may ignore it."""

    @property
    def remote(self) -> bool:
        """Whether `admit` and `settle` return awaitables."""
        ...

    @property
    def algorithms(self) -> frozenset[Algorithm]:
        """The algorithms it can count by."""
        ...

    def prepare(self, plan: Plan) -> None:
        """Be told of a plan before there are requests: work that need not be done while one waits goes here."""
        ...

    def admit(
        self, key: str, plan: Plan, cost: int, estimate: int | None, now: float
    ) -> Decision | Awaitable[Decision]:
        """Decide one request that costs `cost` in each request window.

        `estimate` is how many tokens to reserve; 0 reserves none, but is refused when nothing remains; with None the
        token windows are reported and don't decide. A cost over a window's limit takes the whole window. An estimate
        over a token window's limit is never admitted: ask for no such thing.
        """
        ...

    def settle(self, lease: Lease, used: int, now: float) -> tuple[int, ...] | Awaitable[tuple[int, ...]]:
        """Replace the reservation of `lease` by what was `used`; returns what remains in each token window."""
        ...

"""Leased quota: a process takes a share of a caller's windows in one trip, and serves requests from it by itself.

    store = QuotaShares(RedisLimits(link), share=0.05)
    app.add_middleware(PolicyStack, policies=[RateLimit(tiers={"free": "1000/second"}, store=store)])

Of that tier's requests the store sees one in fifty: a trip takes a chunk of `share` x the smallest request limit, and
what it holds is admitted without waiting.

**Promise**, for windows that are aligned ("fixed"; other algorithms are refused, because what is charged now and used
later would lie in an interval in which nobody counted it):

* **Never over-admits.** A chunk is charged before any of it is used, each window of it is used only until that window
  ends by the store's clock, and a request needs its cost in every window. When a short window has ended, only that one
  is charged anew: what is held of the longer ones is used up first.
* **Refuses early, by a stated bound.** What other processes hold of a caller's windows and have not used is used up: in
  each window at most `(processes - 1) x (chunk - 1)` for requests that cost 1. For requests that cost more, or reserve
  tokens, it is `processes x (chunk - 1)`: they do not use a rest that is too small for them. What was taken for
  requests that were cancelled while they waited is held as well, and what was held under another tier.
* **Fields tell what is known**: `remaining` is what the store had left at the last trip, less what this process has
  admitted since. What other processes took since then is not known here, as it is not to any response that left before.
* What is known to be used up is refused without a trip until its window ends.

The rest of a chunk ends with its windows. No store can take requests back, so that closing gives none back either; the
bound holds for a process that has ended, or was killed, until these windows end. Setting the clock back lets no chunk
live longer, and one that runs slower than the store's by up to 1 in 10,000 is allowed for. In the last moments of a
window (the time of a trip, and 1/10,000 of what was left of it) requests ask the store although a rest is held, and a
process may then hold two rests.

Requests that reserve tokens, plans of several levels, and plans whose chunk would be 1, go to the store as they are. So
do new callers while `max_callers` are known. Requests of one caller that come while its chunk is fetched wait for it,
for two trips at most; a chunk is fetched for all that wait.

An object of this kind belongs to one event loop.
"""

from collections.abc import Awaitable, Callable
from itertools import islice
from time import monotonic as machine_monotonic
from typing import Any, ClassVar

from anyio import Event

from sigil_policy.stores.limits import Algorithm, Decision, Key, Lease, LimitStore, Plan, StoreUnavailableError

# What a clock may run slower than the store's.
_DRIFT = 1e-4
# Moments that differ by less are the end of the same window: another one ends a second later, or more.
_SAME = 0.5
# Plans that are remembered; more than anybody has, unless plans are made and thrown away.
_PLANS = 1_000

_new = tuple.__new__


class _View:
    """A plan as it is shared: the size of its chunks, and the plans of some of its request windows."""

    __slots__ = ("chunk", "plan", "smallest", "some")

    def __init__(self, plan: Plan, share: float) -> None:
        self.plan = plan
        self.smallest = min((window.limit for window in plan.requests), default=0)
        self.chunk = 0 if plan.levels else int(share * self.smallest)
        self.some: dict[tuple[int, ...], Plan] = {tuple(range(len(plan.requests))): plan}

    def of(self, indices: tuple[int, ...], store: LimitStore) -> Plan:
        """The plan of these request windows and all token windows. Use is kept by window, whatever the plan."""
        known = self.some.get(indices)
        if known is None:
            plan = self.plan
            known = self.some[indices] = Plan(
                name=plan.name,
                windows=tuple(plan.requests[index] for index in indices) + plan.tokens,
                algorithm=plan.algorithm,
                anonymous=plan.anonymous,
                overflow=plan.overflow,
                lease=plan.lease,
                lapsed=plan.lapsed,
            )
            store.prepare(known)
        return known


class _Fetch:
    """A trip that others wait for."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = Event()
        self.error: StoreUnavailableError | None = None


class _Wait:
    """A request that waits for the trip of another. That one may decide it, too."""

    __slots__ = ("cost", "decision")

    def __init__(self, cost: int) -> None:
        self.cost = cost
        self.decision: Decision | None = None


class _Caller:
    """What this process holds of one caller's windows. Lists follow `Plan.windows`, `held` its request windows.

    `told` is what the store had left when it was last asked, at `asked` by its clock. A window is known until `until`
    by the clock of the requests, and until `until_steady` by one that nobody can set.
    """

    __slots__ = (
        "ahead",
        "asked",
        "fetch",
        "first",
        "held",
        "key",
        "last",
        "reset",
        "resets",
        "steady",
        "told",
        "until",
        "until_steady",
        "valid",
        "waiting",
    )

    def __init__(self, key: Key, requests: int, windows: int) -> None:
        self.key = key
        self.held = [0] * requests
        self.told = [0] * windows
        self.asked = [0.0] * windows
        self.reset = [0.0] * windows
        self.until = [0.0] * windows
        self.until_steady = [0.0] * windows
        # All windows are known before `valid` and `steady`, none is from `last` on.
        self.valid = self.steady = self.last = 0.0
        self.resets: tuple[float, ...] = ()
        # What the store's clock is ahead of that of the requests, at most: it was read when a trip was half done.
        self.ahead = 0.0
        # When the first window ends by the store's clock.
        self.first = 0.0
        self.fetch: _Fetch | None = None
        # In the order in which they came.
        self.waiting: dict[_Wait, None] = {}

    def missing(self, cost: int, now: float, steady: float) -> tuple[int, ...]:
        """The request windows of which too little is held."""
        ends = zip(self.held, self.until, self.until_steady, strict=False)
        return tuple([i for i, (held, end, last) in enumerate(ends) if held < cost or now >= end or steady >= last])

    def decide(self, cost: int, now: float, steady: float) -> Decision | None:
        """The answer, as far as it is known here."""
        if now >= self.valid or steady >= self.steady:
            return None
        held = self.held
        # No window has ended, whatever time the trip took that told of the store's clock.
        at = min(now + self.ahead, self.first)
        if min(held) >= cost:
            return self.spend(cost, at)
        # Without this request the store had less left than it needs, and nothing comes back before the window ends.
        short = [index for index, own in enumerate(held) if own < cost and own + self.told[index] < cost]
        return self.refuse(short, at) if short else None

    def spend(self, cost: int, at: float) -> Decision:
        """Admit a request from what is held."""
        held = self.held
        for index in range(len(held)):
            held[index] -= cost
        return _new(Decision, (True, self.remaining(), self.resets, self.key, at, None, (), 0.0))

    def refuse(self, indices: list[int], at: float) -> Decision:
        indices.sort(key=self.reset.__getitem__, reverse=True)
        wait = max(self.reset[indices[0]] - at, 0.0)
        return Decision(False, self.remaining(), self.resets, self.key, at, refused_by=tuple(indices), retry_after=wait)

    def serve(self, now: float, steady: float) -> None:
        """Decide those who wait, before anybody who comes after them."""
        for wait in list(self.waiting):
            wait.decision = self.decide(wait.cost, now, steady)
            if wait.decision is not None:
                del self.waiting[wait]

    def leave(self, wait: _Wait) -> None:
        """Somebody who waited was cancelled: what was spent for it is held again, as far as it is of these windows."""
        self.waiting.pop(wait, None)
        decision = wait.decision
        if decision is not None and decision.admitted:
            for index in range(len(self.held)):
                if abs(decision.reset[index] - self.reset[index]) <= _SAME:
                    self.held[index] += wait.cost

    def remaining(self) -> tuple[int, ...]:
        told, held = self.told, self.held
        return tuple([told[index] + own for index, own in enumerate(held)] + told[len(held) :])

    def learn(self, indices: tuple[int, ...], answer: Decision, gained: int, now: float, steady: float) -> None:
        """Note what the store answered to a question of `now` about these windows and all token windows."""
        count = len(self.held)
        rows = (*indices, *range(count, len(self.told)))
        for index, remaining, reset in zip(rows, answer.remaining, answer.reset, strict=True):
            later = reset - self.reset[index]
            if later < -_SAME:
                # An answer that comes late, about a window that has been left.
                continue
            if index < count:
                self.held[index] = gained if later > _SAME else self.held[index] + gained
            if later > _SAME or answer.at >= self.asked[index]:
                self.told[index] = remaining
                self.asked[index] = answer.at
            # From when it was asked, not answered: the store may have decided at once.
            lasts = (reset - answer.at) * (1 - _DRIFT)
            self.reset[index] = reset
            self.until[index] = now + lasts
            self.until_steady[index] = steady + lasts
        for index, reset in enumerate(self.reset):
            if reset <= answer.at:
                self.until[index] = 0.0
        self.ahead = answer.at - now
        self.valid, self.steady, self.last = min(self.until), min(self.until_steady), max(self.until)
        self.resets, self.first = tuple(self.reset), min(self.reset)


class QuotaShares:
    """Takes quota from `store` by the chunk; the module states the promise.

        QuotaShares(RedisLimits(link), share=0.05)

    Options:
        store: a store on another machine.
        share: of the smallest request limit of a plan, to be taken in one trip: more than 0, at most 0.5 (default
            0.05). The store sees about one request in `share x limit`; with *n* processes, callers are refused early
            by up to `(n - 1) x share` of that limit in each window.
        max_callers: how many callers are known at once (default 50,000; some 1.5 kB each).
        monotonic: a clock that nobody sets, in seconds (default the machine's).

    Raises `ValueError` for a share out of bounds, and for a store that is in this process or does not count by "fixed".
    """

    remote: ClassVar[bool] = True
    algorithms: ClassVar[frozenset[Algorithm]] = frozenset(("fixed",))

    def __init__(
        self,
        store: LimitStore,
        *,
        share: float = 0.05,
        max_callers: int = 50_000,
        monotonic: Callable[[], float] = machine_monotonic,
    ) -> None:
        if not 0 < share <= 0.5:
            raise ValueError(f"share must be more than 0 and at most 0.5, not {share}")
        if max_callers < 1:
            raise ValueError(f"max_callers must be at least 1, not {max_callers}")
        if not store.remote:
            raise ValueError(
                f"{type(store).__name__} counts in this process: there is no trip to save; use it without QuotaShares"
            )
        if "fixed" not in store.algorithms:
            raise ValueError(
                f"{type(store).__name__} counts by {', '.join(sorted(store.algorithms))}; shares are exact for 'fixed'"
            )
        self.store = store
        self.share = share
        self.max_callers = max_callers
        self._monotonic = monotonic
        self._views: dict[Plan, _View] = {}
        self._callers: dict[tuple[Key, Plan], _Caller] = {}
        if hasattr(store, "on_restored"):
            self.on_restored: Any = store.on_restored

    def __len__(self) -> int:
        """How many callers are known now."""
        return len(self._callers)

    def __repr__(self) -> str:
        return f"QuotaShares({self.store!r}, share={self.share}, max_callers={self.max_callers})"

    def chunk(self, plan: Plan) -> int:
        """How many requests one trip takes for a caller of `plan`; below 2 none are taken ahead."""
        return self._view(plan).chunk

    def prepare(self, plan: Plan) -> None:
        if plan.algorithm != "fixed":
            raise ValueError(
                f"plan {plan.name!r} counts by {plan.algorithm!r}: quota that is taken ahead and used later would let "
                "more than the limit through in some interval; write algorithm='fixed', or leave QuotaShares out"
            )
        self.store.prepare(plan)
        self._view(plan)

    def admit(
        self, key: Key, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float
    ) -> Decision | Awaitable[Decision]:
        view = self._views.get(plan) or self._view(plan)
        if view.chunk < 2:
            return self.store.admit(key, plan, cost, estimate, now)
        caller = self._callers.get((key, plan)) or self._meet(key, plan, now)
        if caller is None:
            return self.store.admit(key, plan, cost, estimate, now)
        if estimate is not None:
            return self._through(caller, view, cost, estimate, now)
        return caller.decide(cost, now, self._monotonic()) or self._fetched(caller, view, cost, now)

    async def extend(self, lease: Lease, more: tuple[int, ...], now: float) -> tuple[int, ...] | None:
        answer = self.store.extend(lease, more, now)
        left = await answer if isinstance(answer, Awaitable) else answer
        if left is not None:
            self._tell(lease.key, lease.plan, left)
        return left

    async def settle(self, lease: Lease, used: tuple[int, ...], now: float) -> tuple[int, ...]:
        answer = self.store.settle(lease, used, now)
        left = await answer if isinstance(answer, Awaitable) else answer
        self._tell(lease.key, lease.plan, left)
        return left

    async def charge(self, key: Key, plan: Plan, amounts: tuple[int, ...], now: float) -> tuple[int, ...]:
        answer = self.store.charge(key, plan, amounts, now)
        left = await answer if isinstance(answer, Awaitable) else answer
        caller = self._callers.get((key, plan))
        if caller is not None:
            caller.told = [max(told - amount, 0) for told, amount in zip(caller.told, amounts, strict=True)]
            self._tell(key, plan, left)
        return left

    async def aclose(self) -> None:
        """Close the store. What is held ends with its windows."""
        close = getattr(self.store, "aclose", None)
        if close is not None:
            await close()

    # --- parts of it -----------------------------------------------------------------------------------------------

    def _view(self, plan: Plan) -> _View:
        known = self._views.get(plan)
        if known is None:
            if len(self._views) >= _PLANS:
                self._views.clear()
            known = self._views[plan] = _View(plan, self.share)
        return known

    def _tell(self, key: Key, plan: Plan, left: tuple[int, ...]) -> None:
        """Note what is left of the tokens."""
        caller = self._callers.get((key, plan))
        if caller is not None and left:
            caller.told[-len(left) :] = left

    def _meet(self, key: Key, plan: Plan, now: float) -> _Caller | None:
        """A place for a new caller, if there is one. Nobody who holds something is forgotten for somebody else."""
        callers = self._callers
        for known in list(islice(callers, 2)):
            oldest = callers.pop(known)
            if now < oldest.last or oldest.fetch is not None or oldest.waiting:
                callers[known] = oldest
        if len(callers) >= self.max_callers:
            return None
        caller = callers[key, plan] = _Caller(key, len(plan.requests), len(plan.windows))
        return caller

    async def _through(
        self, caller: _Caller, view: _View, cost: int, estimate: tuple[int, ...] | None, now: float
    ) -> Decision:
        """Let the store decide, and learn from it."""
        steady = self._monotonic()
        answer = self.store.admit(caller.key, view.plan, cost, estimate, now)
        decision = answer if isinstance(answer, Decision) else await answer
        caller.learn(tuple(range(len(caller.held))), decision, 0, now, steady)
        # What is held is left, too, but not for a request that was refused.
        return decision._replace(remaining=caller.remaining()) if decision.admitted else decision

    async def _fetched(self, caller: _Caller, view: _View, cost: int, now: float) -> Decision:
        """Wait for the chunk that is being fetched, or fetch one."""
        since = now - self._monotonic()
        wait = _Wait(cost)
        # Once for a trip that was under way, once for one that knows of this request.
        for _ in range(2):
            fetch = caller.fetch
            if fetch is None:
                break
            caller.waiting[wait] = None
            try:
                await fetch.done.wait()
            except BaseException:
                caller.leave(wait)
                raise
            if wait.decision is not None:
                return wait.decision
            del caller.waiting[wait]
            if fetch.error is not None:
                raise StoreUnavailableError(str(fetch.error), fetch.error.retry_after)
        now = since + self._monotonic()
        if caller.fetch is not None:
            return await self._through(caller, view, cost, None, now)
        fetch = caller.fetch = _Fetch()
        try:
            return await self._take(caller, view, cost, now)
        except StoreUnavailableError as error:
            fetch.error = error
            raise
        finally:
            caller.fetch = None
            steady = self._monotonic()
            caller.serve(since + steady, steady)
            fetch.done.set()

    async def _take(self, caller: _Caller, view: _View, cost: int, now: float) -> Decision:
        """Take a chunk of the windows of which too little is held, and decide one request."""
        # Never more than a limit: that would be understood as the whole window.
        waiting = sum([wait.cost for wait in caller.waiting])
        amount = max(min(max(view.chunk, cost + waiting), view.smallest), cost)
        for _ in range(2):
            steady = self._monotonic()
            known = caller.decide(cost, now, steady)
            if known is not None:
                return known
            missing = caller.missing(cost, now, steady)
            answer = self.store.admit(caller.key, view.of(missing, self.store), amount, None, now)
            decision = answer if isinstance(answer, Decision) else await answer
            caller.learn(missing, decision, amount if decision.admitted else 0, now, steady)
            if decision.admitted:
                # Meanwhile others may have spent what was held of the other windows, or those have ended.
                if min(caller.held) >= cost and min(caller.until[: len(caller.held)]) > 0:
                    return caller.spend(cost, decision.at)
                continue
            left = decision.remaining[: len(missing)]
            if min(left) < cost:
                return caller.refuse([i for i, own in zip(missing, left, strict=True) if own < cost], decision.at)
            amount = max(min(amount, *left), cost)
        return await self._through(caller, view, cost, None, now)

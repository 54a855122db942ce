"""Limits that hold over any number of processes and machines, counted by a Redis or Valkey server.

    store = RedisLimits("redis://limits.internal:6379/0", digest_key=SecretStr(os.environ["LIMITS_DIGEST_KEY"]))
    policies = [RateLimit(store=store, ...)]

One call decides all windows of a caller and the tokens that the request reserves, on all levels of its plan, by the
server's clock; one more settles. Nothing else costs a trip. It needs the extra `redis`, Redis 7.0 or any Valkey, and
asyncio.

Guarantees:

* **The promises of the algorithms** are those of the stores in this process (`sigil_policy.stores.memory`), over all
  processes together: a script runs alone on the server. A replica that is promoted may lack what the primary did last.
  By "gcra" a refund is what surely still stands of a reservation, never more; the rest drains.
* **A reservation is a lease.** One background timer of each event loop says for all open leases that they are alive,
  every third of their period, so a stream may last as long as it likes. The leases of a process that dies lapse after a
  period (`Plan.lease`); then the budget is whole again, or stays charged (`Plan.lapsed`). A settlement that comes after
  that is charged what was used.
* **A settlement counts once**, also when its reply was lost and it is repeated.
* **Who stops waiting leaves nothing behind.** An admission whose answer finds nobody is taken back, requests and
  lease. If the connection broke before the answer, the lease lapses and the request stays counted.
* **A flood costs the server nothing.** Who was refused by a window of requests is refused in this process until that
  window admits that cost, by the local monotonic clock; it is told of the windows as they were then. Nothing is
  remembered of a refusal for tokens (they may come back), of one whose wait is not exact ("sliding", where more than
  512 entries would have to leave), and of a caller who comes with another tier meanwhile.
* **No key lives for ever**, and none says who the caller is: names are digests of one length, so any string is a name.
  A plain digest of a name that can be guessed (an address, a short number) can be guessed as well: give a `digest_key`
  where the server's operators must not know the callers. The same callers need the same key in all processes.
* **Another tier starts from what was used**: use is kept for each measure (`Window.measure`). Only another algorithm
  starts anew.
* **A caller has one budget**, whatever the levels above. Not so in a cluster, where all keys of a call must be on one
  node: there a caller's own windows are kept per organisation (per last level of the plan), so a user with tokens for
  four organisations has their own limit four times.

Keys are `sigil:1:f:{digest}`: the prefix, the version of the format, the algorithm, the digest of the name. In a
cluster the digest in braces, the hash tag of a call, is the last level's, and other levels have theirs behind it.
"""

import asyncio
import contextvars
import os
from collections.abc import Awaitable, Callable, Coroutine
from functools import cache, partial
from importlib.resources import files
from itertools import count, islice
from math import ceil
from struct import Struct, pack
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from pydantic import SecretStr

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.stores.limits import Algorithm, Decision, Key, Lease, Plan
from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.link import RedisLink, Script, readable

_MICROSECONDS = 1_000_000
_PLANS = 10_000
# The refusals of so many different costs are remembered of a caller.
_COSTS = 32
_MOST = 999_999_999_999_999
# So many leases are renewed by one call: the server is not held up for longer than by some requests. And so many in one
# turn of the loop, which is not held up either.
_RENEWED = 100
_SLICE = 200
_SHORTEST_LEASE, _LONGEST_LEASE = 0.1, 86_400.0
# The name of a measure is a letter and so many digits, and a byte says how many a level has.
_DIGITS = 9
_WINDOWS = 255

_UNITS = {"requests": "r", "tokens": "t", "input-tokens": "i", "output-tokens": "o"}
# So many bytes says the note of an admission of each request window.
_NOTES: dict[Algorithm, int] = {"fixed": 0, "sliding": 24, "gcra": 32}
_new = tuple.__new__


@cache
def _scripts(algorithm: Algorithm) -> dict[str, Script]:
    """The scripts of an algorithm by operation. Each is made of the files that scripts/prelude.lua names."""
    folder = files(__package__).joinpath("scripts")

    def text(*names: str) -> str:
        return "\n".join([folder.joinpath(f"{name}.lua").read_text("utf-8") for name in names])

    known = ("levels", "sliding") if algorithm == "sliding" else ("levels", "measures", algorithm)
    scripts = {"admit": text("prelude", *known, "leases", "admit")}
    if algorithm != "sliding":
        scripts["admit_at_once"] = text("prelude", f"{algorithm}_at_once", *known, "leases", "admit")
    for operation in ("extend", "settle", "charge", "undo"):
        scripts[operation] = text("prelude", *known, "leases", "held", operation)
    return {operation: Script(f"{algorithm} {operation}", text) for operation, text in scripts.items()}


@cache
def _renewal() -> Script:
    return Script("renew")


class _Lease(Lease):
    """A lease in the store: the field `name` of `hashes`, which are among the `keys` of its levels.

    `period` is how soon it lapses without a sign of life, `seen` when the server had the last one (monotonic), and
    `tried` says that a settlement was sent.
    """

    __slots__ = ("__weakref__", "hashes", "keys", "name", "period", "seen", "tried")

    def __init__(
        self, key: Key, plan: Plan, reserved: tuple[int, ...], at: float, keys: tuple[bytes, ...], name: bytes
    ) -> None:
        super().__init__(key, plan, reserved, at)
        self.keys = keys
        self.hashes = keys[::2] if plan.algorithm == "sliding" else keys
        self.name = name
        self.period = 0.0
        self.seen = 0.0
        self.tried = False


class _View:
    """A plan as the scripts want it."""

    __slots__ = (
        "admission",
        "asked",
        "head",
        "limits",
        "log",
        "names",
        "nothing",
        "packed",
        "period",
        "replies",
        "requests",
        "row",
        "scripts",
        "tokens",
        "windows",
    )

    def __init__(self, plan: Plan, space: KeySpace) -> None:
        levels = plan.levels or (plan,)
        self.scripts = _scripts(plan.algorithm)
        self.head = space.apart(plan.algorithm[0])
        # By "sliding" a level has a second key.
        self.log = plan.algorithm == "sliding"
        self.requests = len(plan.requests)
        self.tokens = len(plan.tokens)
        self.windows = len(plan.windows)
        self.limits = tuple(window.limit for window in plan.requests)
        self.nothing = (0,) * self.tokens
        # The shorter way is for one level without calendar months.
        simple = "admit_at_once" in self.scripts and not plan.levels and not any(w.calendar for w in plan.windows)
        self.admission = self.scripts["admit_at_once" if simple else "admit"]
        self.asked = Struct(f"<{2 + self.tokens}d").pack
        self.row = Struct(f"<{2 + 2 * self.windows}q")
        # An admission may have a note behind it.
        self.replies = (self.row.size, self.row.size + _NOTES[plan.algorithm] * self.requests)
        self.names = tuple(_names(level) for level in levels)
        self.period = min((level.lease for level in levels if level.tokens), default=0.0)
        numbers: list[float] = [self.requests, self.windows]
        ends: list[float] = []
        requests, tokens = count(1), count(self.requests + 1)
        first = 1
        for level in levels:
            if level.tokens and not _SHORTEST_LEASE <= level.lease <= _LONGEST_LEASE:
                raise ValueError(
                    f"plan {level.name!r}: a lease in a store lasts {_SHORTEST_LEASE} to {_LONGEST_LEASE} seconds, "
                    f"not {level.lease}"
                )
            for window in level.windows:
                place = next(requests if window.unit == "requests" else tokens)
                numbers += (place, window.limit, 0 if window.calendar else _micro(window.seconds))
            # A bucket that is in debt drains two windows; a lease that lapsed is remembered for another period.
            longest = max(window.seconds for window in level.windows) * (2 if plan.algorithm == "gcra" else 1)
            lasting = max(longest, 3 * level.lease if level.tokens else 0)
            final = first + len(level.windows) - 1
            ends += (_micro(lasting), _micro(level.lease), level.lapsed == "charged", first, final)
            first = final + 1
        numbers += ends
        self.packed = Struct(f"<{len(numbers)}d").pack(*numbers)


class _Denial(NamedTuple):
    """A refusal by windows of requests: until when it holds, and when it was heard (monotonic)."""

    decision: Decision
    until: float
    heard: float


class _Denied(NamedTuple):
    """The refusals of one caller by one plan."""

    plan: Plan
    by_cost: dict[int, _Denial]


class _Heart:
    """The open leases of one event loop, and the timer that says they are alive.

    `due` are the names of those to say it of now, and `unanswered` is how many calls do so just now.
    """

    __slots__ = ("due", "leases", "timer", "unanswered")

    def __init__(self) -> None:
        # A lease that its owner has forgotten is not renewed: it lapses.
        self.leases: WeakValueDictionary[bytes, _Lease] = WeakValueDictionary()
        self.timer: asyncio.TimerHandle | None = None
        self.due: list[bytes] = []
        self.unanswered = 0


class RedisLimits:
    """Limits in a Redis or Valkey server; the module states what they promise.

        store = RedisLimits("valkey://limits.internal:6379/0")

    Options:
        url: the server's URL, or a `RedisLink` that is there already.
        prefix: what all keys begin with (default "sigil"): up to 64 letters, digits and `_ . : -`.
        digest_key: with it names become keyed digests (default None: plain ones), 1 to 64 bytes. Who does not know it
            cannot tell which caller a key belongs to.
        denial_cache: how many refused callers are remembered in this process (default 10,000; 0: none).
        clock: measures how long a refusal is remembered (default: the machine's).
        deadline: how long a call may take, in seconds (default 0.05); only with a URL, a link has its own.

    Raises `ValueError` for an option that cannot be. Calls raise `StoreUnavailableError` when the server does not
    answer in time, or with something that is no decision, and nothing else; a cost or an amount that is no integer from
    0 to 10^15 - 1 is a `ValueError` (more than that was used counts as that).
    """

    remote = True
    algorithms = frozenset[Algorithm](("fixed", "sliding", "gcra"))

    def __init__(
        self,
        url: str | RedisLink,
        *,
        prefix: str = "sigil",
        digest_key: SecretStr | None = None,
        denial_cache: int = 10_000,
        clock: Clock = SYSTEM_CLOCK,
        deadline: float | None = None,
    ) -> None:
        self._space = KeySpace(prefix, digest_key, use=b"sigil limits")
        if denial_cache < 0:
            raise ValueError(f"denial_cache must be a number of callers, or 0 for none, not {denial_cache}")
        self.link = RedisLink.at(url, deadline)
        self.prefix = prefix
        self.denial_cache = denial_cache
        self._digest = self._space.digest
        self._monotonic = clock.monotonic
        self._views: dict[Plan, _View] = {}
        self._denials: dict[tuple[bytes, ...], _Denied] = {}
        self._hearts: dict[asyncio.AbstractEventLoop, _Heart] = {}

    def __repr__(self) -> str:
        return f"RedisLimits({self.link!r}, prefix={self.prefix!r}, denial_cache={self.denial_cache})"

    def on_restored(self, callback: Callable[[], Any]) -> None:
        """Call `callback` whenever the server is back after it was away; see `RedisLink.on_restored`."""
        self.link.on_restored(callback)

    def call_later(self, delay: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `work` in `delay` seconds; see `RedisLink.call_later`."""
        self.link.call_later(delay, work)

    async def aclose(self) -> None:
        """Close the link, also for others who share it, and stop renewing the leases of this event loop.

        Using the store again opens it again.
        """
        heart = self._hearts.pop(asyncio.get_running_loop(), None)
        if heart is not None and heart.timer is not None:
            heart.timer.cancel()
        await self.link.aclose()

    def prepare(self, plan: Plan) -> None:
        """Make what the scripts want of `plan`. Raises `ValueError` for a lease that is too short to be renewed."""
        self._view(plan)

    async def admit(
        self, key: Key, plan: Plan, cost: int, estimate: tuple[int, ...] | None, now: float = 0.0
    ) -> Decision:
        """Decide one request, as `LimitStore.admit` says."""
        view = self._views.get(plan) or self._view(plan)
        keys = self._keys(key, plan, view)
        known = self._denials.get(keys)
        if known is not None:
            denial = known.by_cost.get(cost) if known.plan is plan else None
            if denial is not None:
                decision = self._denied(denial, plan, key)
                if decision is not None:
                    return decision
                known.by_cost.pop(cost, None)
            elif known.plan is not plan:
                # What another tier spends now, the refusal does not know of.
                self._denials.pop(keys, None)
        name = b""
        if type(cost) is not int or not 0 <= cost <= _MOST:
            _check_numbers((cost,))
        if estimate is None:
            asked = view.asked(cost, 0, *view.nothing)
        else:
            _check(plan, estimate)
            _check_numbers(estimate)
            asked = view.asked(cost, 1, *estimate)
            if estimate:
                name = b"=" + os.urandom(12)

        abandoned = partial(self._undo, view, keys, cost, name)
        reply = await self.link.run(view.admission, keys, [view.packed, asked, name, *view.names], abandoned=abandoned)
        if reply.__class__ is not bytes or len(reply) not in view.replies:
            raise self.link.unreadable()
        found = view.row.unpack_from(reply)
        if min(found) < 0:
            raise self.link.unreadable()
        end = 2 + view.windows
        remaining = found[2:end]
        at = found[1] / _MICROSECONDS
        resets = tuple([moment / _MICROSECONDS for moment in found[end:]])
        if found[0] == 1:
            lease = None
            if estimate is not None:
                lease = _Lease(key, plan, estimate, at, keys, name)
                if name:
                    self._keep(lease, view.period)
            return _new(Decision, (True, remaining, resets, key, at, lease, (), 0.0))
        refused = [i for i, limit in enumerate(view.limits) if cost and remaining[i] < min(cost, limit)]
        by_requests = len(refused)
        refused += [i for i, amount in enumerate(estimate or (), view.requests) if remaining[i] < (amount or 1)]
        if not refused:
            raise self.link.unreadable()
        refused.sort(key=resets.__getitem__, reverse=True)
        wait = (found[end + refused[0]] - found[1]) / _MICROSECONDS
        decision = Decision(False, remaining, resets, key, at, None, tuple(refused), wait)
        # Else the wait is not exact: who asks again may be admitted sooner.
        if by_requests and not found[0] and self.denial_cache:
            self._remember(keys, plan, cost, decision)
        return decision

    def _undo(self, view: "_View", keys: tuple[bytes, ...], cost: int, name: bytes, reply: Any) -> None:
        """Take back what was admitted, as nobody waits for it. If it cannot be read, what it reserved lapses."""
        if reply.__class__ is bytes and len(reply) in view.replies:
            admitted, moment, *_ = view.row.unpack_from(reply)
            if admitted == 1:
                args = [view.packed, _pack(cost, moment), name, *view.names]
                if len(reply) > view.row.size:
                    args.append(reply[view.row.size :])
                self.link.send(view.scripts["undo"], keys, args)

    async def extend(self, lease: Lease, more: tuple[int, ...], now: float = 0.0) -> tuple[int, ...] | None:
        """Reserve `more` for an open lease, as `LimitStore.extend` says; None for one that is settled.

        If it raises, nobody knows whether it is reserved: the settlement gives back what is too much.
        """
        lease, view = self._known(lease, more)
        _check_numbers(more)
        if lease.settled:
            return None
        if not more:
            return ()
        reply = await self._run("extend", view, lease.keys, _pack(*more, *lease.reserved), lease.name)
        if readable(reply, 2) and not reply[0]:
            return None
        left = self._remaining(reply, view)
        if not reply[0]:
            raise self.link.unreadable()
        # Others may have been extended at once.
        lease.reserved = tuple([had + new for had, new in zip(lease.reserved, more, strict=True)])
        return left

    async def settle(self, lease: Lease, used: tuple[int, ...], now: float = 0.0) -> tuple[int, ...]:
        """Replace the reservation of `lease` by what was `used`, as `LimitStore.settle` says.

        If it raises, it may be asked again, with the same amounts, within two periods of the lease: they are charged
        once.
        """
        lease, view = self._known(lease, used)
        used = _counted(used)
        if not used:
            lease.settled = True
            return ()
        first = not lease.tried
        lease.tried = True
        asked = _pack(first, *used, *lease.reserved)
        try:
            reply = await self._run("settle", view, lease.keys, asked, lease.name)
        except asyncio.CancelledError:
            # Who waited is gone, perhaps before it was sent; what was used is used. Charged once, also if it was sent.
            again = _pack(False, *used, *lease.reserved)
            self.link.send(view.scripts["settle"], lease.keys, [view.packed, again, lease.name, *view.names])
            lease.settled = True
            raise
        left = self._remaining(reply, view)
        lease.settled = True
        heart = self._hearts.get(asyncio.get_running_loop())
        if heart is not None:
            heart.leases.pop(lease.name, None)
        return left

    async def charge(self, key: Key, plan: Plan, amounts: tuple[int, ...], now: float = 0.0) -> tuple[int, ...]:
        """Count what has happened already, as `LimitStore.charge` says.

        If it raises, nobody knows whether it was counted.
        """
        view = self._views.get(plan) or self._view(plan)
        if len(amounts) != view.windows:
            raise ValueError(f"plan {plan.name!r} has {view.windows} windows: {amounts} must have so many numbers")
        asked = _pack(*_counted(amounts))
        return self._remaining(await self._run("charge", view, self._keys(key, plan, view), asked, b""), view)

    def _run(self, operation: str, view: _View, keys: tuple[bytes, ...], asked: bytes, name: bytes) -> Awaitable[Any]:
        return self.link.run(view.scripts[operation], keys, [view.packed, asked, name, *view.names])

    def _remaining(self, reply: Any, view: _View) -> tuple[int, ...]:
        if not readable(reply, 2 + view.tokens):
            raise self.link.unreadable()
        return tuple([max(left, 0) for left in reply[2:]])

    # Plans and keys.

    def _view(self, plan: Plan) -> _View:
        view = _View(plan, self._space)
        if len(self._views) >= _PLANS:
            self._views.clear()
        self._views[plan] = view
        return view

    def _known(self, lease: Lease, amounts: tuple[int, ...]) -> tuple["_Lease", _View]:
        if not isinstance(lease, _Lease):
            raise ValueError(f"{lease!r} is a lease of another store: settle it there, or charge what was used")
        _check(lease.plan, amounts)
        return lease, self._views.get(lease.plan) or self._view(lease.plan)

    def _keys(self, key: Key, plan: Plan, view: _View) -> tuple[bytes, ...]:
        if isinstance(key, str):
            if plan.levels:
                raise ValueError(
                    f"plan {plan.name!r} has {len(plan.levels)} levels: its key is a tuple of so many names, not one"
                )
            keys: tuple[bytes, ...] = (view.head + self._digest(key) + b"}",)
        else:
            if len(key) != len(plan.levels):
                raise ValueError(f"plan {plan.name!r} has {len(plan.levels)} levels: its key is not {len(key)} names")
            if len(set(key)) < len(key):
                raise ValueError(
                    f"plan {plan.name!r}: two levels have the same key and would count a request twice; "
                    "put the name of the level in front of it"
                )
            if self.link.clustered:
                root = view.head + self._digest(key[-1]) + b"}"
                keys = (*[root + b":" + self._digest(name) for name in key[:-1]], root)
            else:
                keys = tuple([view.head + self._digest(name) + b"}" for name in key])
        if view.log:
            keys = tuple([each for hash_ in keys for each in (hash_, hash_ + b":log")])
        return keys

    # Signs of life.

    def _keep(self, lease: "_Lease", period: float) -> None:
        """Renew the lease while somebody holds it."""
        loop = asyncio.get_running_loop()
        heart = self._hearts.get(loop)
        if heart is None:
            for other in [other for other in self._hearts if other.is_closed()]:
                self._hearts.pop(other, None)
            heart = self._hearts[loop] = _Heart()
        lease.period = period
        lease.seen = loop.time()
        heart.leases[lease.name] = lease
        due = lease.seen + period / 3
        if heart.timer is None or heart.timer.when() > due:
            self._set(heart, loop, due)

    def _set(self, heart: _Heart, loop: asyncio.AbstractEventLoop, due: float) -> None:
        if heart.timer is not None:
            heart.timer.cancel()
        # It belongs to no request: not to the context of the one that happened to be first.
        heart.timer = loop.call_at(due, self._beat, heart, loop, context=contextvars.Context())

    def _beat(self, heart: _Heart, loop: asyncio.AbstractEventLoop) -> None:
        """Renew what is due, and say when to do it next."""
        heart.timer = None
        if heart.unanswered:
            # What runs yet says when it ends.
            return
        now = loop.time()
        # What is due soon goes along.
        heart.due += [lease.name for lease in heart.leases.values() if now >= lease.seen + lease.period * 0.3]
        self._renew(heart, loop)

    def renew(self) -> None:
        """Say of all leases that are open in this event loop that they are alive, now rather than in time.

        Some are sent in this turn of the loop, the rest when these are answered.
        """
        loop = asyncio.get_running_loop()
        heart = self._hearts.get(loop)
        if heart is not None:
            heart.due = list(heart.leases)
            if not heart.unanswered:
                self._renew(heart, loop)

    def _renew(self, heart: _Heart, loop: asyncio.AbstractEventLoop) -> None:
        """Send some of what is due. The rest waits for the answers: requests go between, and find room."""
        by_keys: dict[tuple[bytes, ...], list[bytes]] = {}
        some = min(_SLICE, max(self.link.max_in_flight // 2, 1))
        while heart.due and not by_keys:
            for name in heart.due[:some]:
                lease = heart.leases.get(name)
                if lease is not None:
                    by_keys.setdefault(lease.hashes, []).append(name)
            del heart.due[:some]
        now = loop.time()
        for keys, names in by_keys.items():
            for at in range(0, len(names), _RENEWED):
                part = names[at : at + _RENEWED]
                heart.unanswered += 1
                sent = self.link.send(_renewal(), keys, part)
                sent.add_done_callback(partial(self._renewed, heart, loop, part, now), context=contextvars.Context())
        if not by_keys:
            self._rest(heart, loop)

    def _renewed(
        self, heart: _Heart, loop: asyncio.AbstractEventLoop, names: list[bytes], now: float, sent: asyncio.Future[Any]
    ) -> None:
        heart.unanswered -= 1
        if sent.cancelled():
            # The store is away, or late: what is not renewed is tried again soon, and no more until then.
            heart.due.clear()
        else:
            for name in names:
                lease = heart.leases.get(name)
                if lease is not None:
                    lease.seen = now
        if not heart.unanswered:
            if heart.due:
                self._renew(heart, loop)
            else:
                self._rest(heart, loop)

    def _rest(self, heart: _Heart, loop: asyncio.AbstractEventLoop) -> None:
        """Set the timer for what is due next."""
        leases = list(heart.leases.values())
        if leases and self._hearts.get(loop) is heart:
            # What failed is due already: tried a few times more before it lapses.
            soon = loop.time() + min([lease.period for lease in leases]) / 10
            self._set(heart, loop, max(soon, min([lease.seen + lease.period / 3 for lease in leases])))

    # Refusals that are known.

    def _remember(self, keys: tuple[bytes, ...], plan: Plan, cost: int, decision: Decision) -> None:
        requests = len(plan.requests)
        # Tokens may come back: of a refusal for both, that for requests is what is known to last.
        refused = tuple([index for index in decision.refused_by if index < requests])
        wait = decision.reset[refused[0]] - decision.at
        heard = self._monotonic()
        known = self._denials.get(keys)
        if known is None or known.plan is not plan:
            if known is None and len(self._denials) >= self.denial_cache:
                self._forget(heard)
            known = self._denials[keys] = _Denied(plan, {})
        elif len(known.by_cost) >= _COSTS:
            known.by_cost.clear()
        # Without the caller's name, which may be long, and is nobody's business here.
        known.by_cost[cost] = _Denial(decision._replace(key="", refused_by=refused), heard + wait, heard)

    def _forget(self, now: float) -> None:
        """Make room: the oldest goes, with others near it that have ended."""
        for who in list(islice(self._denials, 8)):
            known = self._denials.get(who)
            if known is not None:
                ended = all(denial.until <= now for denial in tuple(known.by_cost.values()))
                if ended or len(self._denials) >= self.denial_cache:
                    self._denials.pop(who, None)

    def _denied(self, denial: _Denial, plan: Plan, key: Key) -> Decision | None:
        """What the server said, as it stands now; None when it must be asked again."""
        now = self._monotonic()
        if now >= denial.until:
            return None
        known = denial.decision
        at = known.at + now - denial.heard
        remaining, resets = [*known.remaining], [*known.reset]
        for index, window in enumerate(plan.windows):
            if resets[index] <= at:
                if plan.algorithm != "fixed" or window.calendar:
                    return None
                # Nobody was admitted since this window began.
                remaining[index] = window.limit
                resets[index] += ceil((at - resets[index]) / window.seconds + 1e-9) * window.seconds
        refused = tuple([index for index in known.refused_by if known.reset[index] > at])
        wait = resets[refused[0]] - at
        return Decision(False, tuple(remaining), tuple(resets), key, at, None, refused, wait)


def _names(level: Plan) -> bytes:
    """How many measures a level has, and their names: as the scripts want them."""
    names = [
        f"{_UNITS[window.unit]}{0 if window.calendar else window.seconds:0{_DIGITS}}".encode()
        for window in level.windows
    ]
    if len(names) > _WINDOWS or any(len(name) > 1 + _DIGITS for name in names):
        raise ValueError(
            f"plan {level.name!r}: a store counts up to {_WINDOWS} windows of less than 10^{_DIGITS} seconds, "
            f"not {list(level.windows)[:5]}"
        )
    return bytes((len(names),)) + b"".join(names)


def _micro(seconds: float) -> int:
    return round(seconds * _MICROSECONDS)


def _pack(*numbers: float) -> bytes:
    return pack(f"<{len(numbers)}d", *numbers)


def _check_numbers(amounts: tuple[int, ...]) -> None:
    """Only whole numbers go to the server: whatever is compared with one that is none is false, and admitted."""
    for amount in amounts:
        if type(amount) is not int or not 0 <= amount <= _MOST:
            raise ValueError(f"costs and amounts are integers from 0 to {_MOST}, not {str(amount)[:40]!r}")


def _counted(amounts: tuple[int, ...]) -> tuple[int, ...]:
    """No report counts for more: it is the largest number that a header can say (RFC 9651 section 3.3.1)."""
    for amount in amounts:
        if type(amount) is not int or amount < 0:
            raise ValueError(f"amounts that were used are integers from 0 on, not {str(amount)[:40]!r}")
    return tuple([min(amount, _MOST) for amount in amounts])


def _check(plan: Plan, amounts: tuple[int, ...]) -> None:
    if len(amounts) != len(plan.tokens):
        raise ValueError(
            f"plan {plan.name!r} has {len(plan.tokens)} token windows: {amounts} must have so many numbers"
        )

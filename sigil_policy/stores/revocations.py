"""What was revoked: tokens by id, callers by subject, and whatever was issued before a moment.

    revocations = MemoryRevocations()                                    # this process
    revocations = RedisRevocations("redis://auth.internal:6379/0")       # all that share a server

    await revocations.revoke(jti="d3f8", until=claims["exp"])            # one token, for as long as it would hold
    await revocations.revoke(subject="user_123", issued_before=now)      # log out everywhere; new tokens hold
    await revocations.revoke(subject="user_123")                         # nothing of this caller holds, until restored
    await revocations.revoke(issuer="https://auth.example", issued_before=now)
    await revocations.restore(subject="user_123")

Guarantees of every store:

* **What is revoked stays revoked** until its `until`, which is prolonged by the minute that clocks may differ at most,
  or for ever without one. Revoking again never takes anything back: of two moments of issue the later holds, and of two
  ends. Only `restore` takes back.
* **A suspension and a log-out are apart**: what is revoked altogether ends by itself, whatever is revoked before a
  moment beside it.
* **Nothing is forgotten to make room.** A store that is full refuses to take more (`RevocationsFullError`).
* **No look-up waits.** `revoked` asks a copy in this process. `age` tells how old the copy is; in a store of this
  process it never is.

A token without `jti` is met by its subject, its issuer and the rest. One without `iat` counts as issued before every
moment. Subjects and ids are compared as text. Moments are seconds since the epoch, and `iat` is compared with them as
the issuer wrote it: mostly whole seconds by its own clock. So a token that was issued in the very second of the moment
is revoked too, and who does not trust the issuer's clock gives a later moment.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from threading import Lock
from typing import ClassVar, NamedTuple, Protocol

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock

MAX_ENTRIES = 100_000
FOREVER = 1e15
"""A moment after all others: an entry without an end, a moment before which everything was issued."""

MARGIN = 60.0
"""Seconds that an entry outlasts its token: the most by which clocks may differ (see `Issuer.leeway`)."""

_LONGEST = 8_192
_LOOKS = 4


class RevocationsFullError(RuntimeError):
    """The store has as many entries as it takes; nothing was revoked. Give entries an end, or the store more room."""

    def __init__(self) -> None:
        super().__init__(
            "the store of revocations is full; give entries an end (until=), or it more room (max_entries=)"
        )


class Entry(NamedTuple):
    """Tokens issued before `before` are revoked, until `until`; both are seconds since the epoch."""

    before: float
    until: float


class RevocationStore(Protocol):
    """Where revocations are. `now` of `revoked` is seconds since the epoch, that of the others is monotonic.

    A store may have `async def aclose(self)`.
    """

    @property
    def remote(self) -> bool:
        """Whether there is a copy that has to be refreshed."""
        ...

    def revoked(self, *, jti: str | None, subject: str, issuer: str | None, issued: float | None, now: float) -> bool:
        """Whether such a token is revoked, by what this process knows."""
        ...

    def age(self, now: float) -> float:
        """For how many seconds changes may have been missed; infinite before the first refresh."""
        ...

    def resting(self, now: float) -> bool:
        """Whether a refresh is under way, or the last one failed so lately that it is too early for another."""
        ...

    def refresh(self, now: float) -> Awaitable[None]:
        """Bring the copy up to date, once for all who ask at the same time.

        Raises `StoreUnavailableError`; at once, if the last one failed so lately.
        """
        ...

    def revoke(
        self,
        *,
        jti: str | None = None,
        subject: str | None = None,
        issuer: str | None = None,
        issued_before: float | None = None,
        until: float | None = None,
    ) -> Awaitable[None]:
        """Revoke one token (`jti`), or what a `subject`, an `issuer` or (with neither) anybody was issued before a
        moment; without a moment all of it. `issuer` beside the others narrows them."""
        ...

    def restore(
        self, *, jti: str | None = None, subject: str | None = None, issuer: str | None = None
    ) -> Awaitable[bool]:
        """Take back what was revoked under exactly these; whether there was anything."""
        ...


class Revoked:
    """The entries themselves, in one process: bounded, looked up without a lock, forgotten when they have ended."""

    __slots__ = ("_entries", "_kinds", "_line", "_lock", "_name")

    def __init__(self, name: Callable[[str], str | bytes] = str) -> None:
        self._name = name
        self._entries: dict[str | bytes, Entry] = {}
        # How many entries of each kind: of what there is none, nobody looks for.
        self._kinds: dict[str, int] = {}
        # Names that are still to be looked at before all are looked at again.
        self._line: list[str | bytes] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, name: str | bytes) -> bool:
        return name in self._entries

    def items(self) -> Iterable[tuple[str | bytes, Entry]]:
        with self._lock:
            return list(self._entries.items())

    def put(self, name: str | bytes, entry: Entry, now: float, *, instead: bool = False) -> None:
        """Add an entry; with what was known under that name, the later moments hold, if it is not `instead` of that."""
        with self._lock:
            known = self._entries.get(name)
            if known is None:
                self._kinds[_kind(name)] = self._kinds.get(_kind(name), 0) + 1
            elif not instead and known.until > now:
                entry = Entry(max(known.before, entry.before), max(known.until, entry.until))
            # Never taken out meanwhile: others look without the lock.
            self._entries[name] = entry
            self._sweep(now, _LOOKS)

    def drop(self, name: str | bytes) -> bool:
        with self._lock:
            return self._drop(name)

    def sweep(self, now: float, looks: int) -> None:
        """Look at so many entries, others each time, and forget those that have ended."""
        with self._lock:
            self._sweep(now, looks)

    def _drop(self, name: str | bytes) -> bool:
        if self._entries.pop(name, None) is None:
            return False
        self._kinds[_kind(name)] -= 1
        return True

    def _sweep(self, now: float, looks: int) -> None:
        for _ in range(min(looks, len(self._entries))):
            if not self._line:
                self._line = list(self._entries)
            name = self._line.pop()
            entry = self._entries.get(name)
            if entry is not None and entry.until <= now:
                self._drop(name)

    def holds(self, *, jti: str | None, subject: str, issuer: str | None, issued: float | None, now: float) -> bool:
        entries, name = self._entries, self._name
        if entries:
            for key in _names_of(self._kinds, jti, subject, issuer):
                entry = entries.get(name(key))
                if entry is not None and now < entry.until and (issued is None or issued < entry.before):
                    return True
        return False


def _kind(name: str | bytes) -> str:
    return name[0] if isinstance(name, str) else chr(name[0])


# What is revoked until a moment of issue is apart from what is revoked altogether: each has an end of its own.
_MOMENTS = {"S": "T", "s": "t", "i": "k", "*": "+"}


def _names_of(kinds: Mapping[str, int], jti: str | None, subject: str, issuer: str | None) -> Iterable[str]:
    """Under which names, of the kinds that there are, something that is revoked may be found."""
    count = kinds.get
    if jti is not None and count("J"):
        yield f"J{jti}"
    for kind in "ST":
        if count(kind):
            yield kind + subject
    if issuer is not None:
        if jti is not None and count("j"):
            yield f"j{len(issuer)}:{issuer}:{jti}"
        for kind in "st":
            if count(kind):
                yield f"{kind}{len(issuer)}:{issuer}:{subject}"
        for kind in "ik":
            if count(kind):
                yield kind + issuer
    for kind in "*+":
        if count(kind):
            yield kind


def entry_names(jti: str | None, subject: str | None, issuer: str | None) -> tuple[str, ...]:
    """The names of what is revoked by these: altogether, and but for a `jti` by a moment of issue.

    Raises `ValueError` for what names nothing.
    """
    for option, text in (("jti", jti), ("subject", subject), ("issuer", issuer)):
        if text is not None and (not isinstance(text, str) or not 0 < len(text) <= _LONGEST):
            raise ValueError(f"{option} is a text of 1 to {_LONGEST} characters, as the token has it")
    if jti is not None and subject is not None:
        raise ValueError("a token is revoked by jti, or a caller by subject: give one of them")
    kind, text = ("j", jti) if jti is not None else ("s", subject)
    if text is None:
        name = "*" if issuer is None else f"i{issuer}"
    else:
        name = f"{kind.upper()}{text}" if issuer is None else f"{kind}{len(issuer)}:{issuer}:{text}"
    return (name,) if jti is not None else (name, _MOMENTS[name[0]] + name[1:])


def entry_name(jti: str | None, subject: str | None, issuer: str | None, issued_before: float | None = None) -> str:
    """The name under which this is revoked."""
    return entry_names(jti, subject, issuer)[0 if jti is not None or issued_before is None else 1]


def new_entry(jti: str | None, issued_before: float | None, until: float | None) -> Entry:
    """The entry for these moments. Raises `ValueError` for what is no moment."""
    if jti is not None and issued_before is not None:
        raise ValueError("jti names one token: issued_before says nothing of it")
    for option, moment in (("issued_before", issued_before), ("until", until)):
        if moment is not None and not 0 < moment < FOREVER:
            raise ValueError(f"{option} is a moment in seconds since the epoch, or None, not {moment!r}")
    return Entry(
        FOREVER if issued_before is None else float(issued_before),
        FOREVER if until is None else float(until) + MARGIN,
    )


class MemoryRevocations:
    """Revocations of this process.

        revocations = MemoryRevocations()
        Revocation(store=revocations)

    Options:
        max_entries: how many there may be, of about 300 bytes each (default 100,000).
        clock: tells what has ended, so that it is forgotten (default: the machine's).
    """

    remote: ClassVar[bool] = False

    def __init__(self, *, max_entries: int = MAX_ENTRIES, clock: Clock = SYSTEM_CLOCK) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries is at least 1, not {max_entries!r}")
        self.max_entries = max_entries
        self._clock = clock
        self._known = Revoked()
        self.revoked = self._known.holds

    def __len__(self) -> int:
        """How many entries there are, those included that have ended and were not looked at since."""
        return len(self._known)

    def __repr__(self) -> str:
        return f"MemoryRevocations({len(self)} entries)"

    def age(self, now: float) -> float:
        """Nothing is ever missed."""
        return 0.0

    def resting(self, now: float) -> bool:
        """There is nothing to refresh."""
        return True

    async def refresh(self, now: float) -> None:
        """There is nothing to refresh."""

    async def revoke(
        self,
        *,
        jti: str | None = None,
        subject: str | None = None,
        issuer: str | None = None,
        issued_before: float | None = None,
        until: float | None = None,
    ) -> None:
        """Revoke, as `RevocationStore.revoke` says. Raises `RevocationsFullError`, and `ValueError` for what names
        nothing."""
        name, entry = entry_name(jti, subject, issuer, issued_before), new_entry(jti, issued_before, until)
        now = self._clock.time()
        if len(self._known) >= self.max_entries and not self._known.knows(name):
            self._known.sweep(now, len(self._known))
            if len(self._known) >= self.max_entries:
                raise RevocationsFullError
        self._known.put(name, entry, now)

    async def restore(self, *, jti: str | None = None, subject: str | None = None, issuer: str | None = None) -> bool:
        """Take back, as `RevocationStore.restore` says."""
        # Both, also if the first was there.
        dropped = [self._known.drop(name) for name in entry_names(jti, subject, issuer)]
        return any(dropped)

"""Sets of keys: configured, or fetched from the issuer and kept fresh without making anybody wait.

    Issuer(url="https://auth.example.com", audience="api", discovery=True)
    Issuer(url="https://auth.example.com", audience="api", keys=KeySet("https://auth.example.com/jwks", lifetime=900))

What holds for a fetched set:

* Fetched when the first token needs it, by one request for all that wait. From 80 % of its lifetime on it is fetched
  anew by a request that has already had its response; nobody waits for that. One that nobody has used until its
  lifetime was over is fetched before it is used.
* A token that names a key that is not there (a rotation) makes the set be fetched anew at once: `burst` times, then at
  most once per `cool_down`, whatever is presented. A key that a fetch has not brought: the token is refused. While no
  fetch is allowed it is not known: 503 with `Retry-After`.
* The provider is away: the keys go on for `max_stale` beyond their lifetime, then 503 with `Retry-After`, never 401. It
  is asked again every `retry` seconds.
* A key that has left the set verifies nothing from then on, tokens that were verified before included.
* A fetch ends at its `deadline`, and is not given up when the request that makes it is.
* A rotation is noticed by the new key's id. A provider that gives its keys no id, or the old one's, is noticed when the
  set is fetched anew.

RFC 7517, OpenID Connect Core 1.0 section 10.1.1, RFC 8725 section 3.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any
from weakref import WeakMethod

from anyio import CancelScope, fail_after, to_thread
from anyio.lowlevel import checkpoint, current_token
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.clock import Clock
from sigil_policy.identity.fields import CONFIG
from sigil_policy.identity.flights import Flight
from sigil_policy.identity.keys import Key
from sigil_policy.identity.provider import (
    ProviderError,
    check_url,
    fetch,
    find_key_set,
    load_client,
    make_client,
    read_object,
    trust,
)

MAX_TRIALS = 8
"""Keys that are tried for one token, at most: every trial costs the service, and the token is not yet trusted."""

PUBLIC_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519",
)  # fmt: skip
"""What a fetched key may be used with. Never HS: a secret that is published is none."""

Name = tuple[str, str | None]
"""An algorithm and a `kid`, as a token's header names its key."""

_AHEAD = 0.8
_MAX_LIFETIME = 86_400.0
_REMEMBERED = 1_024
_FAMILIES = frozenset(("RSA", "EC", "OKP"))
# Those that a public key has, and `d`, so that a private one is noticed. What else a provider writes is not kept.
_MEMBERS = frozenset(("kty", "use", "key_ops", "alg", "kid", "n", "e", "crv", "x", "y", "d"))

logger = logging.getLogger("sigil_policy")


class KeysUnavailableError(Exception):
    """The keys that a token needs cannot be had now; after `retry_after` seconds it is worth another try.

    try:
        await auth.fetch_keys()
    except KeysUnavailableError as error:
        print(f"the provider is away; try again in {error.retry_after} s")
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__("the issuer's keys are not available")
        self.retry_after = max(1, math.ceil(retry_after))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class KeySet:
    """An issuer's key set, fetched over https. All times are in seconds.

        KeySet("https://auth.example.com/.well-known/jwks.json")
        KeySet(lifetime=900)                                        # found by discovery

    Options:
        url: where it is (default None: the issuer's metadata says, by OpenID Connect discovery or RFC 8414; the
            metadata must name exactly this issuer).
        lifetime: for how long a set is used where the provider's `max-age` does not say, 10 to 86,400 (default 600).
            `max-age` is taken between `cool_down` and a day.
        max_stale: for how long it is used beyond that while the provider fails, 0 to 604,800 (default 21,600).
        deadline: for a fetch, discovery included, 0.1 to 30 (default 3).
        retry: between two attempts while the provider fails, 1 to 300 (default 5).
        burst: how many fetches unknown keys may cause at once, 2 to 10 (default 3).
        cool_down: the time after which they may cause one more, 1 to 3,600 (default 30).
        max_keys: a set with more entries is not used, 1 to 256 (default 64).
        max_bytes: a longer document is not read, 1,024 to 1,048,576 (default 65,536).
        initial: a JWK set to start with where the provider cannot be reached (default None: without the provider there
            are no keys at first, and tokens get 503). It goes on for `max_stale`, and is replaced by the first fetch.
        allow_insecure_loopback: take `http` from this machine's loopback, for tests (default False).
        transport: an `httpx2.AsyncBaseTransport` to fetch through, for a proxy or a private CA (default None: direct,
            with the certificates that the machine trusts). It is closed with the application.

    Raises `ValidationError` (a `ValueError`) for a URL that is not https and an `initial` set without usable keys,
    `ImportError` without the extra `identity`.
    """

    url: Annotated[str, Field(max_length=2_048)] | None = field(default=None, kw_only=False)
    lifetime: Annotated[float, Field(ge=10, le=86_400)] = 600.0
    max_stale: Annotated[float, Field(ge=0, le=604_800)] = 21_600.0
    deadline: Annotated[float, Field(ge=0.1, le=30)] = 3.0
    retry: Annotated[float, Field(ge=1, le=300)] = 5.0
    burst: Annotated[int, Field(ge=2, le=10)] = 3
    cool_down: Annotated[float, Field(ge=1, le=3_600)] = 30.0
    max_keys: Annotated[int, Field(ge=1, le=256)] = 64
    max_bytes: Annotated[int, Field(ge=1_024, le=1_048_576)] = 65_536
    initial: Mapping[str, Any] | None = Field(default=None, repr=False)
    allow_insecure_loopback: bool = False
    transport: Any = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _usable(self) -> "KeySet":
        if self.url is not None:
            check_url(self.url, loopback=self.allow_insecure_loopback)
        httpx2 = load_client()
        if self.transport is not None and not isinstance(self.transport, httpx2.AsyncBaseTransport):
            raise ValueError("transport is an httpx2.AsyncBaseTransport, for example httpx2.AsyncHTTPTransport(...)")
        return self


class KeyRing:
    """Keys by what a token's header says of them. A value: a changed set is another ring."""

    __slots__ = ("_by_algorithm", "keys")

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.keys = tuple(keys)
        self._by_algorithm: dict[str, tuple[Key, ...]] = {}
        for key in self.keys:
            for algorithm in key.accepts:
                self._by_algorithm[algorithm] = (*self._by_algorithm.get(algorithm, ()), key)

    def __repr__(self) -> str:
        return f"KeyRing({len(self.keys)} keys)"

    def fitting(self, algorithm: str, kid: str | None) -> tuple[Key, ...]:
        """The keys that may have signed: of this algorithm, with this id or none; without `kid`, of any id."""
        keys = self._by_algorithm.get(algorithm, ())
        return keys if kid is None else tuple(key for key in keys if key.id is None or key.id == kid)

    def doubles(self) -> Iterator[tuple[str, str]]:
        """Algorithm and id of keys that cannot be told apart (RFC 7517 section 4.5)."""
        seen: set[tuple[str, str]] = set()
        for key in self.keys:
            for name in [(algorithm, key.id) for algorithm in key.accepts if key.id is not None]:
                if name in seen:
                    yield name
                seen.add(name)

    @property
    def crowded(self) -> bool:
        """Whether `MAX_TRIALS` keys of one algorithm have no id, so that no token could be tried with all that fit."""
        return any(sum(key.id is None for key in keys) >= MAX_TRIALS for keys in self._by_algorithm.values())


class FetchedKeys:
    """The key set of one issuer, as it is known now. Durations are measured by the exchange's clock.

    `ring` is asked for every new token and never waits; `remaining` says for how long its answer holds, `refresh` and
    `obtain` fetch.
    """

    def __init__(self, options: KeySet, issuer: str, algorithms: tuple[str, ...]) -> None:
        self.ring = KeyRing()
        self._options = options
        self._issuer = issuer
        self._algorithms = frozenset(algorithms)
        # OpenID Connect Core section 2 makes RS256 the default; an RSA key that names none is used with one only.
        self._rsa = next((name for name in algorithms if name[:2] in ("RS", "PS")), "RS256")
        self._url = options.url
        self._body: bytes | None = None
        self._known: dict[str, Key] = {}
        self._watchers: list[WeakMethod[Callable[[], None]]] = []
        # Until when no fetch is due, the set is in its lifetime, and it is used at all.
        self._due = self._fresh = self._last = -math.inf
        self._failed_at: float | None = None
        self._flight: Flight | None = None
        self._begun = self._interrupted = 0
        self._answered, self._answered_at = 0, -math.inf
        self._arrival = -math.inf
        self._asked: dict[Name, int] = {}
        self._initial = options.initial is not None
        if options.initial is not None:
            entries = self._entries(json.dumps(dict(options.initial)).encode())
            for entry in entries:
                self._read(entry, self._known)
            self._known = self._distinct(self._known)
            self.ring = KeyRing(self._known.values())

    def __repr__(self) -> str:
        return f"FetchedKeys({self._issuer!r}, {len(self.ring.keys)} keys)"

    def watch(self, changed: Callable[[], None]) -> None:
        """Call the method `changed` whenever the keys have changed, for as long as its object lives."""
        self._watchers = [known for known in self._watchers if known() is not None]
        self._watchers.append(WeakMethod(changed))

    # --- what holds now, without waiting ---------------------------------------------------------------------------

    def remaining(self, clock: Clock) -> float:
        """For how many seconds the keys may be used without asking again; 0: not before they were fetched."""
        now = clock.monotonic()
        if self._initial:
            self._initial, self._failed_at = False, -math.inf
            self._last = now + self._options.max_stale
        if now < self._due:
            return self._due - now
        if now < self._fresh:
            return min(self._options.retry, self._fresh - now)
        # Beyond the lifetime: first ask, and go on with what is there only when that has failed.
        if now < self._last and self._failed_at is not None:
            return min(self._options.retry, self._last - now)
        return 0.0

    def is_due(self, clock: Clock) -> bool:
        """Whether it is time to fetch, and nobody does."""
        return clock.monotonic() >= self._due and self._on_its_way() is None and self._pause(clock) <= 0

    def may_bring(self, algorithm: str) -> bool:
        """Whether a fetch could bring a key for `algorithm` at all."""
        return algorithm in self._algorithms

    def is_absent(self, name: Name, clock: Clock) -> bool:
        """Whether a fetch since `name` was asked for has not brought it. Holds for `cool_down` after that fetch."""
        asked = self._asked.get(name)
        if asked is None or asked >= self._answered:
            return False
        if clock.monotonic() < self._answered_at + self._options.cool_down:
            return True
        del self._asked[name]
        return False

    def ask(self, name: Name, clock: Clock) -> float:
        """Remember that `name` is wanted; the seconds until a fetch for it is allowed (0: now)."""
        self._remember(name)
        return 0.0 if self._on_its_way() else self._wait(name, clock)

    # --- fetching --------------------------------------------------------------------------------------------------

    async def refresh(self, clock: Clock) -> None:
        """Fetch if it is due. Tells of its failure nobody but the log."""
        if self.is_due(clock):
            await self._fetch(clock)

    async def obtain(self, clock: Clock, name: Name | None = None) -> None:
        """Wait until the keys can be used or, with `name`, until it is known whether the key is there.

        One fetch serves all who wait. Raises `KeysUnavailableError`.
        """
        while not self._serves(name, clock):
            if name is not None:
                self._remember(name)
            flight = self._on_its_way()
            if flight is not None:
                await flight.done.wait()
                continue
            wait = self._wait(name, clock)
            if wait > 0:
                raise KeysUnavailableError(wait)
            if name is not None and self.remaining(clock):
                now = clock.monotonic()
                self._arrival = max(self._arrival, now) + self._options.cool_down
            await self._fetch(clock)

    def _serves(self, name: Name | None, clock: Clock) -> bool:
        if not self.remaining(clock):
            return False
        return name is None or bool(self.ring.fitting(*name)) or self.is_absent(name, clock)

    def _on_its_way(self) -> Flight | None:
        """The fetch to wait for. One on another event loop, which may have ended with it, is nobody's to wait for."""
        flight = self._flight
        return flight if flight is not None and flight.loop == current_token() else None

    def _wait(self, name: Name | None, clock: Clock) -> float:
        """Seconds until a fetch is allowed."""
        wait = self._pause(clock)
        if name is not None and self.remaining(clock):
            # A token bucket: `burst` at once, then one per cool-down, whoever asks for whatever (JK-06).
            options = self._options
            now = clock.monotonic()
            wait = max(wait, max(self._arrival, now) - now - (options.burst - 1) * options.cool_down)
        return wait

    def _pause(self, clock: Clock) -> float:
        """Seconds until the provider is asked again after it has failed."""
        if self._failed_at is None:
            return 0.0
        return max(0.0, self._failed_at + self._options.retry - clock.monotonic())

    def _remember(self, name: Name) -> None:
        if name in self._asked:
            return
        if len(self._asked) >= _REMEMBERED:
            del self._asked[next(iter(self._asked))]
        self._asked[name] = self._begun

    async def _fetch(self, clock: Clock) -> None:
        """Fetch, and wait until that has ended."""
        flight = self._flight = Flight()
        await flight.fly(lambda: self._fly(clock), lambda: self._land(flight))

    def _land(self, flight: Flight) -> None:
        if self._flight is flight:
            self._flight = None

    async def _fly(self, clock: Clock) -> None:
        self._begun += 1
        number = self._begun
        options = self._options
        complaint: str | None = None
        ended = False
        try:
            # Shielded: a client that leaves takes nothing from those who wait with it. The deadline bounds it.
            with CancelScope(shield=True), fail_after(options.deadline):
                max_age, found = await self._load()
            self._take(found, max_age, number, clock)
            ended = True
        except ProviderError as error:
            complaint, ended = str(error), True
        except TimeoutError:
            complaint, ended = f"gives no answer within {options.deadline:g} seconds", True
        except Exception as error:  # noqa: BLE001
            # What a network can do to a client has no end, and no request may fail with it.
            complaint, ended = f"cannot be reached ({type(error).__name__})", True
        finally:
            if not ended:
                # The event loop itself cancelled it. Whoever waits tries again, within bounds.
                self._interrupted += 1
                if self._interrupted > options.burst:
                    complaint = "could not be asked: fetches were interrupted"
            if complaint is not None:
                self._fail(complaint, clock)

    async def _load(self) -> tuple[float | None, dict[str, Key] | None]:
        """What the set may be used for, and its keys; None for the same as before."""
        options = self._options
        if options.transport is None and not trust.cache_info().currsize:
            await to_thread.run_sync(trust)
        client = make_client(options.transport, True if options.transport is not None else trust())
        try:
            await checkpoint()
            if self._url is None:
                self._url = await find_key_set(
                    client, self._issuer, limit=options.max_bytes, loopback=options.allow_insecure_loopback
                )
            body, max_age = await fetch(client, self._url, limit=options.max_bytes)
        finally:
            if options.transport is None:
                await client.aclose()
        if body == self._body:
            return max_age, None
        found: dict[str, Key] = {}
        for entry in self._entries(body):
            # Reading a key takes a tenth of a millisecond: the others have their turn in between.
            await checkpoint()
            self._read(entry, found)
        found = self._distinct(found)
        if not found:
            # Also an empty set: nothing could be verified with it, and emptiness is more often a mistake than a wish.
            raise ProviderError("publishes no key that can be used")
        self._body = body
        return max_age, found

    def _entries(self, body: bytes) -> list[dict[str, Any]]:
        entries = read_object(body).get("keys")
        if not isinstance(entries, list):
            raise ProviderError("answers with something that is no JWK set")
        if len(entries) > self._options.max_keys:
            raise ProviderError(f"publishes more than {self._options.max_keys} keys")
        return [entry for entry in entries if isinstance(entry, dict)]

    def _read(self, entry: dict[str, Any], found: dict[str, Key]) -> None:
        """Add the key in `entry` to `found`, by what it says; one that cannot be used is skipped (JK-02)."""
        jwk = {name: value for name, value in entry.items() if name in _MEMBERS}
        text = json.dumps(jwk, sort_keys=True)
        key = self._known.get(text) or self._key(jwk)
        if key is not None:
            found[text] = key

    def _key(self, jwk: dict[str, Any]) -> Key | None:
        family = jwk.get("kty")
        # An `oct` key in a published set is a secret that everybody knows (JK-05, RFC 8725 section 3.1).
        if not isinstance(family, str) or family not in _FAMILIES:
            return None
        algorithm: Any = self._rsa if family == "RSA" and "alg" not in jwk else None
        try:
            key = Key(jwk=jwk, algorithm=algorithm)
        except (ValueError, TypeError):
            return None
        return key if key.algorithm in self._algorithms else None

    def _distinct(self, found: dict[str, Key]) -> dict[str, Key]:
        """Without those of one id and algorithm: which of them signed would be a guess (JK-04)."""
        doubles = set(KeyRing(found.values()).doubles())
        if not doubles:
            return found
        logger.warning("the key set of %s has several keys of one id; they are not used", self._issuer)
        return {
            text: key
            for text, key in found.items()
            if key.id is None or doubles.isdisjoint((algorithm, key.id) for algorithm in key.accepts)
        }

    def _take(self, found: dict[str, Key] | None, max_age: float | None, number: int, clock: Clock) -> None:
        options, now = self._options, clock.monotonic()
        lifetime = options.lifetime if max_age is None else min(max(max_age, options.cool_down), _MAX_LIFETIME)
        self._due = now + _AHEAD * lifetime
        self._fresh = now + lifetime
        self._last = self._fresh + options.max_stale
        self._failed_at, self._interrupted, self._initial = None, 0, False
        self._answered, self._answered_at = max(self._answered, number), now
        if found is None:
            return
        unchanged = found.keys() == self._known.keys()
        self._known = found
        if unchanged:
            return
        self.ring = KeyRing(found.values())
        for watcher in self._watchers:
            changed = watcher()
            if changed is not None:
                changed()

    def _fail(self, complaint: str, clock: Clock) -> None:
        self._failed_at, self._interrupted = clock.monotonic(), 0
        # Where the keys are may have changed, too.
        self._url = self._options.url
        logger.warning("the provider of the keys of %s %s", self._issuer, complaint)

    async def aclose(self) -> None:
        """Close the transport that was given; a fetch's own connection ends with the fetch."""
        if self._options.transport is not None:
            await self._options.transport.aclose()

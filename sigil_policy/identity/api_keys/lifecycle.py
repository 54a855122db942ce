"""The life of API keys: made, listed, rotated, revoked.

    keys = ApiKeys(SqliteApiKeyStore("keys.db"), pepper=pepper)
    plain, record = await keys.new("nightly-job", scopes=["agents:read"], tier="pro", lifetime=90 * 86_400)
    plain, record = await keys.rotate(record.id, overlap=86_400)       # the old key holds for a day yet
    await keys.revoke(record.id)

`sigil-policy key` is the same on the command line. Guarantees: a key is in `NewKey.plain` and nowhere else; no change
puts off an end that is there already, whatever happens at once, so a revocation always stands; servers see a change
within the `fresh_for` of their stores (files: a second).
"""

from collections.abc import Iterable

from pydantic import SecretStr

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.identity.api_keys.records import ApiKeyRecord, NewKey, new_key, pepper_bytes
from sigil_policy.identity.api_keys.stores import ApiKeyExistsError, ApiKeyLedger, ApiKeyUnknownError

DAY = 86_400.0


class ApiKeyEndedError(ValueError):
    """This key has ended: there is nothing to rotate."""


class ApiKeys:
    """Makes and ends the keys in a store.

        ApiKeys(MemoryApiKeyStore(), pepper=SecretStr(os.environ["SIGIL_PEPPER"]))

    Options:
        store: where the records are.
        pepper: the secret under which digests are made, at least 32 random bytes, the same as in `ApiKeyAuth`. Without
            it (None, the default) keys can be listed and revoked, and none made.
        prefix: how new keys begin (default `"sk_live"`; tests may want `"sk_test"`).
        clock: the time of all this (default: the machine's).

    Methods raise `StoreUnavailableError` for a store that is away, `ReadOnlyStoreError` for one that is only read,
    `ApiKeyUnknownError` for an id that is not there, and `ValueError` for what no key can have.
    """

    def __init__(
        self,
        store: ApiKeyLedger,
        *,
        pepper: SecretStr | None = None,
        prefix: str = "sk_live",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(store, ApiKeyLedger):
            raise TypeError(f"{type(store).__name__} cannot list and change keys: it needs get, records, save and end")
        if pepper is not None:
            pepper_bytes(pepper)
        self.store = store
        self.prefix = prefix
        self._pepper = pepper
        self._clock = clock

    def __repr__(self) -> str:
        return f"ApiKeys({self.store!r})"

    async def new(
        self, owner: str, *, scopes: Iterable[str] = (), tier: str | None = None, lifetime: float | None = None
    ) -> NewKey:
        """Make a key and store its record; `plain` is its only copy.

        `owner` is the subject of whoever calls with it, `lifetime` for how many seconds it holds (None: until it is
        revoked).
        """
        now = self._clock.time()
        expires = None if lifetime is None else now + _positive("lifetime", lifetime)
        return await self._store(owner, frozenset(_listed(scopes)), tier, expires, self.prefix, None)

    async def list(self, owner: str | None = None) -> tuple[ApiKeyRecord, ...]:
        """The records of all keys, or of one owner's, those that have ended too, oldest first."""
        records = await self.store.records()
        chosen = [record for record in records if owner is None or record.subject == owner]
        return tuple(sorted(chosen, key=lambda record: (record.created or 0.0, record.id)))

    async def rotate(self, key_id: str, *, overlap: float = DAY, lifetime: float | None = None) -> NewKey:
        """Make a key with owner, scopes, tier and prefix of another one, which holds for `overlap` seconds yet.

        `lifetime` is the new one's; without it, it is given what the old one has had from its making to its end, or no
        end if that has none. Raises `ApiKeyEndedError` if the old one has ended, `ValueError` if nobody knows how long
        it was to live.
        """
        now = self._clock.time()
        old = await self.store.get(key_id)
        if old is None:
            raise ApiKeyUnknownError(f"there is no key {key_id}")
        if old.is_expired(now):
            raise ApiKeyEndedError(f"key {key_id} has ended: make a new one")
        if not 0 <= overlap <= 3_650 * DAY:
            raise ValueError(f"overlap is for how many seconds the old key holds, 0 or more, not {overlap!r}")
        if lifetime is not None:
            expires: float | None = now + _positive("lifetime", lifetime)
        elif old.expires is None:
            expires = None
        elif old.created is None:
            raise ValueError(f"key {key_id} ends, and nobody wrote down when it was made: say lifetime")
        else:
            expires = now + _positive("lifetime", old.expires - old.created)
        return await self._store(old.subject, old.scopes, old.tier, expires, old.prefix, (key_id, now + overlap))

    async def revoke(self, key_id: str) -> ApiKeyRecord:
        """Let a key end now."""
        record = await self.store.end(key_id, self._clock.time())
        if record is None:
            raise ApiKeyUnknownError(f"there is no key {key_id}")
        return record

    async def _store(
        self,
        subject: str,
        scopes: frozenset[str],
        tier: str | None,
        expires: float | None,
        prefix: str,
        ends: tuple[str, float] | None,
    ) -> NewKey:
        if self._pepper is None:
            raise ValueError("to make a key takes the pepper: ApiKeys(store, pepper=...)")
        # Ids have 47 random bits: among a million keys, one new one in a hundred million finds its id taken.
        for _ in range(3):
            made = new_key(
                pepper=self._pepper,
                subject=subject,
                scopes=scopes,
                tier=tier,
                expires=expires,
                created=self._clock.time(),
                prefix=prefix,
            )
            try:
                await self.store.save(made.record, ends=ends)
            except ApiKeyExistsError:
                continue
            return made
        raise ApiKeyExistsError("three ids in a row were taken: the source of random numbers is broken")


def _listed(scopes: Iterable[str]) -> Iterable[str]:
    if isinstance(scopes, str):
        raise ValueError("scopes is a list, for example ['agents:read']")
    return scopes


def _positive(name: str, seconds: float) -> float:
    if not 0 < seconds <= 36_500 * DAY:
        raise ValueError(f"{name} is a number of seconds above 0, not {seconds!r}")
    return seconds

"""Every store of API keys keeps the same promises; those that are remote remember, and bound what they are asked."""

import asyncio
import contextlib
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from pydantic import SecretStr

from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import (
    ApiKeyEndedError,
    ApiKeyExistsError,
    ApiKeyLedger,
    ApiKeyRecord,
    ApiKeys,
    ApiKeyStore,
    ApiKeyUnknownError,
    FileApiKeyStore,
    MemoryApiKeyStore,
    RemoteApiKeyStore,
    key_store,
    new_key,
)
from sigil_policy.identity.api_keys.redis import RedisApiKeyStore
from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.testing import FrozenClock, drive
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
NOW = 1_700_000_000.0
DAY = 86_400.0

KINDS = ["memory", "file", "sqlite", "redis"]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(
    params=[
        pytest.param((kind, backend), id=f"{kind}-{backend}")
        for kind in KINDS
        for backend in ("asyncio", "trio")
        if (kind, backend) != ("redis", "trio")
    ]
)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A kind of store, and the event loop that it is asked in. One that talks to a server needs asyncio."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> str:
    if "place" in request.fixturenames:
        return str(request.getfixturevalue("place")[1])
    return "asyncio"


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(NOW)


@pytest.fixture
async def store(place: tuple[str, str], clock: FrozenClock, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    kind, _ = place
    if kind == "redis":
        server = request.getfixturevalue("valkey")
        server.client.flushall()
        made: Any = RedisApiKeyStore(server.url, clock=clock, deadline=30.0)
        yield made
        await made.aclose()
    elif kind == "sqlite":
        yield SqliteApiKeyStore(tmp_path / "keys.db", clock=clock, deadline=30.0)
    elif kind == "file":
        yield FileApiKeyStore(tmp_path / "keys.jsonl", clock=clock)
    else:
        yield MemoryApiKeyStore(clock=clock)


def make(**options: Any) -> ApiKeyRecord:
    given = {"subject": "nightly-job", "scopes": ["b:write", "a:read"], "tier": "pro", "created": NOW, **options}
    return new_key(pepper=PEPPER, **given).record


async def found(store: ApiKeyStore, key_id: str) -> ApiKeyRecord | None:
    answer = store.find(key_id)
    return await answer if isinstance(answer, Awaitable) else answer


# --- what every store promises ----------------------------------------------------------------------------------------


async def test_an_empty_store_knows_no_key(store: Any) -> None:
    assert isinstance(store, ApiKeyLedger)
    assert await found(store, "a" * 12) is None
    assert await store.get("a" * 12) is None
    assert await store.records() == ()
    assert await store.end("a" * 12, NOW) is None


async def test_what_was_saved_is_found_as_it_was(store: Any, clock: FrozenClock) -> None:
    full = make(expires=NOW + 0.1, prefix="sk_test", subject='É "quoted" \\ \U0001f511')
    bare = make(scopes=(), tier=None, created=None, subject="a")
    for record in (full, bare):
        await store.save(record)
    clock.advance(10)
    for record in (full, bare):
        assert await store.get(record.id) == record
        assert await found(store, record.id) == record
    assert sorted(await store.records(), key=lambda record: record.subject) == [bare, full]


async def test_an_id_is_saved_once(store: Any) -> None:
    first = make()
    await store.save(first)
    with pytest.raises(ApiKeyExistsError, match=first.id):
        await store.save(make(subject="eve", tier="ultra").__class__(**{**first.as_dict(), "subject": "eve"}))
    assert await store.get(first.id) == first


async def test_a_key_ends_and_its_end_is_never_put_off(store: Any, clock: FrozenClock) -> None:
    record = make()
    await store.save(record)
    for at, holds in ((NOW + 60.25, NOW + 60.25), (NOW + 90, NOW + 60.25), (NOW + 30, NOW + 30), (1e12, NOW + 30)):
        ended = await store.end(record.id, at)
        assert ended.expires == holds and ended.subject == record.subject
        assert await store.get(record.id) == ended
    clock.advance(10)
    assert (await found(store, record.id)).expires == NOW + 30


async def test_one_key_replaces_another_in_one_step_or_not_at_all(store: Any) -> None:
    old, new = make(), make()
    with pytest.raises(ApiKeyUnknownError, match=old.id):
        await store.save(new, ends=(old.id, NOW + 60))
    assert await store.records() == ()
    await store.save(old)
    await store.save(new, ends=(old.id, NOW + 60))
    assert (await store.get(old.id)).expires == NOW + 60
    with pytest.raises(ApiKeyExistsError):
        await store.save(new, ends=(old.id, NOW + 30))
    assert (await store.get(old.id)).expires == NOW + 60
    assert await store.get(new.id) == new
    await store.save(make(), ends=(old.id, NOW + 90))
    assert (await store.get(old.id)).expires == NOW + 60, "it is never put off"
    await store.save(make(), ends=(old.id, NOW + 30))
    assert (await store.get(old.id)).expires == NOW + 30


async def test_a_key_that_was_refused_is_accepted_soon_after_it_was_made(store: Any, clock: FrozenClock) -> None:
    record = make()
    assert await found(store, record.id) is None
    await store.save(record)
    clock.advance(1)
    assert await found(store, record.id) == record


async def test_many_changes_at_once_all_hold(store: Any, clock: FrozenClock) -> None:
    keys = ApiKeys(store, pepper=PEPPER, clock=clock)
    old = (await keys.new("job")).record.id

    async def revoke() -> None:
        await keys.revoke(old)

    async def rotate() -> None:
        try:
            await keys.rotate(old, overlap=DAY)
        except ApiKeyEndedError:
            return

    async with anyio.create_task_group() as group:
        for index in range(12):
            group.start_soon(rotate if index % 2 else revoke)
    assert (await store.get(old)).expires == NOW, "a rotation takes no revocation back"


async def test_a_store_shows_no_digest(store: Any) -> None:
    record = make()
    await store.save(record)
    assert record.digest not in f"{store!r}{store}{await store.records()!r}"


# --- the life of a key ------------------------------------------------------------------------------------------------


async def ask(app: Any, plain: SecretStr) -> int:
    return (await drive(app, headers={"x-api-key": plain.get_secret_value()})).status


async def test_old_and_new_key_hold_until_the_overlap_is_over(store: Any, clock: FrozenClock) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    stack = PolicyStack(app, policies=[ApiKeyAuth(store=store, pepper=PEPPER)], clock=clock)
    keys = ApiKeys(store, pepper=PEPPER, prefix="sk_test", clock=clock)
    old, record = await keys.new("job", scopes=["a:read"], tier="pro", lifetime=90 * DAY)
    assert old.get_secret_value().startswith(f"sk_test_{record.id}_")
    clock.advance(DAY)
    new, follower = await ApiKeys(store, pepper=PEPPER, clock=clock).rotate(record.id, overlap=3_600)
    assert (follower.subject, follower.scopes, follower.tier, follower.prefix) == ("job", {"a:read"}, "pro", "sk_test")
    assert follower.created == NOW + DAY and follower.expires == NOW + 91 * DAY
    clock.advance(1)
    assert [await ask(stack, key) for key in (old, new)] == [200, 200]
    clock.advance(3_598.5)
    assert [await ask(stack, key) for key in (old, new)] == [200, 200]
    clock.advance(0.5)
    assert [await ask(stack, key) for key in (old, new)] == [401, 200]
    with pytest.raises(ApiKeyEndedError, match="make a new one"):
        await keys.rotate(record.id)
    await keys.revoke(follower.id)
    clock.advance(1)
    assert await ask(stack, new) == 401
    assert [known.subject for known in await keys.list("job")] == ["job", "job"]
    assert await keys.list("nobody") == ()


async def test_what_cannot_be_is_refused_before_anything_is_stored(store: Any, clock: FrozenClock) -> None:
    keys = ApiKeys(store, pepper=PEPPER, clock=clock)
    for change in (
        keys.new("job", lifetime=0),
        keys.new("job", lifetime=float("nan")),
        keys.new(""),
        keys.new("job", scopes="a b"),
        keys.new("job", scopes=["a b"]),
        ApiKeys(store, clock=clock).new("job"),
        ApiKeys(store, pepper=PEPPER, prefix="SK").new("job"),
    ):
        with pytest.raises(ValueError, match=r"lifetime|subject|scope|pepper|prefix"):
            await change
    assert await keys.list() == ()
    for gone in (keys.rotate("a" * 12), keys.revoke("a" * 12)):
        with pytest.raises(ApiKeyUnknownError, match="aaaa"):
            await gone
    unknown_age = make(created=None, expires=NOW + 10)
    await store.save(unknown_age)
    with pytest.raises(ValueError, match="say lifetime"):
        await keys.rotate(unknown_age.id)
    with pytest.raises(ValueError, match="overlap"):
        await keys.rotate(unknown_age.id, overlap=-1, lifetime=DAY)
    assert (await keys.rotate(unknown_age.id, lifetime=DAY)).record.expires == NOW + DAY


def test_what_cannot_list_and_change_is_no_ledger() -> None:
    class OnlyFinds:
        def find(self, key_id: str) -> None:
            return None

    with pytest.raises(TypeError, match="records, save and end"):
        ApiKeys(OnlyFinds())  # type: ignore[arg-type]


# --- uses -------------------------------------------------------------------------------------------------------------


async def last_used(store: Any, key_id: str, expected: float | None) -> None:
    """It is written in the background: wait for it."""
    with anyio.fail_after(60):
        while True:
            (record,) = [record for record in await store.records() if record.id == key_id]
            if record.last_used == expected:
                return
            await anyio.sleep(0.005)


@pytest.mark.parametrize("place", [("sqlite", "asyncio"), ("sqlite", "trio"), ("redis", "asyncio")], ids=str)
async def test_uses_are_written_in_batches(store: Any, clock: FrozenClock) -> None:
    first, second = make(), make()
    for record in (first, second):
        await store.save(record)
    batches = []
    write = store._write_uses
    store._write_uses = lambda used: (batches.append(dict(used)), write(used))
    store.note_use(first.id)
    await last_used(store, first.id, NOW)
    for _ in range(59):
        clock.advance(1)
        store.note_use(first.id)
        store.note_use(second.id)
        store.note_use("z" * 12)  # a key that has gone
    assert len(batches) == 1
    clock.advance(1)
    store.note_use(first.id)
    await last_used(store, first.id, NOW + 60)
    await last_used(store, second.id, NOW + 59)
    assert len(batches) == 2
    clock.advance(1)
    store.note_use(second.id)
    await store.aclose()
    await last_used(store, second.id, NOW + 61)
    clock.jump(-1000)
    store.note_use(second.id)
    await store.aclose()
    await last_used(store, second.id, NOW + 61)
    assert len(await store.records()) == 2


async def test_uses_that_gather_are_bounded(clock: FrozenClock, tmp_path: Path) -> None:
    store = SqliteApiKeyStore(tmp_path / "keys.db", clock=clock, remembered=100)
    store.note_use("a" * 12)
    for number in range(10_000):
        store.note_use(f"{number:012}")
    assert len(store._used) == 100


async def test_no_use_writes_more_than_one_batch(valkey: Server, clock: FrozenClock) -> None:
    valkey.client.flushall()
    store = RedisApiKeyStore(valkey.url, clock=clock, deadline=30.0)
    records = [make() for _ in range(450)]
    for record in records:
        await store.save(record)
    store.note_use(records[0].id)
    for record in records:
        store.note_use(record.id)
    clock.advance(60)
    before = store.link.counters.runs
    batches = []
    for _ in range(5):
        store.note_use(records[0].id)
        batches.append(store.link.counters.runs - before)
    assert batches == [1, 2, 3, 3, 3]
    await last_used(store, records[-1].id, NOW)
    assert [record.last_used for record in await store.records()].count(None) == 0
    await store.aclose()


async def test_uses_that_could_not_be_written_are_written_later(clock: FrozenClock, tmp_path: Path) -> None:
    path, record = tmp_path / "keys.db", make()
    store = SqliteApiKeyStore(path, clock=clock, deadline=0.01)
    await store.save(record)  # it waits for that long only where somebody else has locked the file
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    with structlog.testing.capture_logs() as lines:
        store.note_use(record.id)
        await store.aclose()
    assert {line["event"] for line in lines} == {"api_key_uses_not_written"}
    locker.close()
    await store.aclose()
    await last_used(store, record.id, NOW)


# --- remote stores: memory --------------------------------------------------------------------------------------------


class Gated(RemoteApiKeyStore):
    """A server that answers when it is told to."""

    def __init__(self, *records: ApiKeyRecord, **options: Any) -> None:
        # Real seconds: a machine that stands still does not end a look-up.
        super().__init__(**{"deadline": 60, **options})
        self.here = {record.id: record for record in records}
        self.trips = 0
        self.gate = anyio.Event()
        self.gate.set()

    async def get(self, key_id: str) -> ApiKeyRecord | None:
        self.trips += 1
        answer = self.here.get(key_id)
        await self.gate.wait()
        return answer

    async def records(self) -> tuple[ApiKeyRecord, ...]:
        return tuple(self.here.values())

    async def _save(self, record: ApiKeyRecord, ends: tuple[str, float] | None) -> None:
        self.here[record.id] = record

    async def _end(self, key_id: str, at: float) -> ApiKeyRecord | None:
        self.here[key_id] = self.here[key_id].ending(at)
        return self.here[key_id]

    def _write_uses(self, used: Mapping[str, float]) -> None:
        raise AssertionError


@pytest.mark.parametrize("place", [("memory", "asyncio"), ("memory", "trio")], ids=str)
class TestRemembering:
    async def test_a_record_is_asked_for_once_in_a_while(self, place: Any, clock: FrozenClock) -> None:
        record = make()
        store = Gated(record, clock=clock, fresh_for=5)
        for _ in range(4):
            for _ in range(100):
                assert await found(store, record.id) == record
            clock.advance(2.5)
        assert store.trips == 2

    async def test_one_asks_again_and_the_others_go_on_until_the_deadline(self, place: Any, clock: FrozenClock) -> None:
        record = make()
        store = Gated(record, clock=clock, fresh_for=5, deadline=60)
        await found(store, record.id)
        clock.advance(5)
        store.gate = anyio.Event()
        let_in = []

        async def late() -> None:
            let_in.append(await found(store, record.id))

        async with anyio.create_task_group() as group:
            group.start_soon(found, store, record.id)
            await anyio.wait_all_tasks_blocked()
            assert store.find(record.id) == record
            clock.advance(60)
            group.start_soon(late)
            await anyio.wait_all_tasks_blocked()
            assert not let_in, "let in on what was too old"
            assert store.trips == 3
            store.gate.set()
        assert let_in == [record]

    async def test_who_leaves_while_asking_leaves_it_to_the_next(self, place: Any, clock: FrozenClock) -> None:
        record = make()
        store = Gated(record, clock=clock, fresh_for=5)
        await found(store, record.id)
        clock.advance(5)
        store.gate = anyio.Event()
        with anyio.move_on_after(0.01):
            await found(store, record.id)
        store.here[record.id] = record.ending(1.0)
        store.gate.set()
        answer = await found(store, record.id)
        assert answer is not None and answer.expires == 1.0

    async def test_a_look_up_that_is_slow_ends_at_the_deadline(self, place: Any, clock: FrozenClock) -> None:
        store = Gated(clock=clock, deadline=0.01)
        store.gate = anyio.Event()
        with pytest.raises(StoreUnavailableError, match=r"0\.01 s"):
            await found(store, "a" * 12)

    async def test_an_answer_from_before_a_revocation_is_not_remembered(self, place: Any, clock: FrozenClock) -> None:
        record = make()
        store = Gated(record, clock=clock, deadline=30)
        store.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(found, store, record.id)
            await anyio.wait_all_tasks_blocked()
            await store.end(record.id, 1.0)
            store.gate.set()
        answer = await found(store, record.id)
        assert answer is not None and answer.expires == 1.0

    async def test_an_unknown_id_is_remembered_for_as_long(self, place: Any, clock: FrozenClock) -> None:
        store = Gated(clock=clock, fresh_for=5)
        for _ in range(100):
            assert await found(store, "a" * 12) is None
        assert store.trips == 1
        clock.advance(5)
        await found(store, "a" * 12)
        assert store.trips == 2

    async def test_memory_is_bounded(self, place: Any, clock: FrozenClock) -> None:
        records = [make() for _ in range(30)]
        store = Gated(*records, clock=clock, remembered=10, strays=1_000_000)
        for record in records:
            await found(store, record.id)
        for number in range(5_000):
            await found(store, f"{number:012}")
        assert len(store._known) == 10 and len(store._unknown) == 4_096

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fresh_for": -1}, "fresh_for"),
            ({"fresh_for": float("nan")}, "fresh_for"),
            ({"deadline": 0}, "deadline"),
            ({"remembered": 0}, "remembered"),
            ({"strays": 0}, "strays"),
            ({"use_every": 0}, "use_every"),
        ],
        ids=str,
    )
    async def test_numbers_that_cannot_be(self, place: Any, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Gated(**options)


# --- SQLite -----------------------------------------------------------------------------------------------------------


async def test_a_database_is_its_owners_alone_and_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    plain, record = await ApiKeys(SqliteApiKeyStore(path, deadline=30), pepper=PEPPER).new("job")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert record.digest.encode() in content
    assert plain.get_secret_value().split("_")[3].encode() not in content
    assert PEPPER.get_secret_value().encode() not in content


@contextlib.contextmanager
def only_read(path: Path) -> Iterator[None]:
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        yield
    finally:
        path.parent.chmod(0o700)


async def test_a_database_that_is_only_read_serves(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    record = make()
    await SqliteApiKeyStore(path).save(record)
    with only_read(path):
        store = SqliteApiKeyStore(path, deadline=30)
        assert await found(store, record.id) == record


@pytest.mark.parametrize("content", [b"no database at all " * 100, b"SQLite format 3\0" + b"x" * 4_000])
async def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.db"
    path.write_bytes(content)
    store = SqliteApiKeyStore(path)
    for attempt in (store.get("a" * 12), store.records(), store.save(make()), store.end("a" * 12, 1.0)):
        with pytest.raises(StoreUnavailableError, match="cannot be used"):
            await attempt
    assert path.read_bytes() == content


async def test_a_database_of_another_release_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    await SqliteApiKeyStore(path).save(make())
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(StoreUnavailableError, match="format 9"):
        await SqliteApiKeyStore(path).get("a" * 12)


async def test_a_database_that_is_locked_is_unavailable_in_time(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    await SqliteApiKeyStore(path).save(make())
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await found(SqliteApiKeyStore(path, deadline=0.05), "a" * 12)
        took = time.monotonic() - start
        if took < 2:
            break  # else the machine may have stood still: once more
    assert took < 2
    locker.close()


@pytest.mark.parametrize("place", [("sqlite", "asyncio"), ("sqlite", "trio")], ids=str)
async def test_a_database_that_is_locked_leaves_threads_for_others(place: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    await SqliteApiKeyStore(path).save(make())
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    store = SqliteApiKeyStore(path, deadline=30.0, strays=1_000)
    unavailable = []

    async def look(number: int) -> None:
        try:
            await found(store, f"{number:012}")
        except StoreUnavailableError:
            unavailable.append(number)

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(look, number)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(20):
            await anyio.to_thread.run_sync(time.monotonic)
        assert not unavailable
        locker.rollback()
    assert not unavailable
    locker.execute("BEGIN EXCLUSIVE")
    store = SqliteApiKeyStore(path, deadline=0.5, strays=1_000)
    async with anyio.create_task_group() as group:
        for number in range(60, 120):
            group.start_soon(look, number)
    assert len(unavailable) == 60, "those who had no thread, too"
    locker.close()


async def test_a_row_that_is_no_record_is_unknown_and_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    store = SqliteApiKeyStore(path, fresh_for=0, deadline=30)
    good, bad = make(), make()
    for record in (good, bad):
        await store.save(record)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE api_keys SET digest = 'canary' WHERE id = ?", (bad.id,))
    connection.close()
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            assert await found(store, bad.id) is None
            assert await store.records() == (good,)
    assert [line["key_id"] for line in lines] == [bad.id] and "canary" not in str(lines)


WORKER = """
import asyncio, sys
from pydantic import SecretStr
from sigil_policy.identity.api_keys import ApiKeys
from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore

async def main(path, number):
    keys = ApiKeys(SqliteApiKeyStore(path, deadline=30), pepper=SecretStr("p" * 32))
    for _ in range(15):
        made = (await keys.new(f"job-{number}")).record
        made = (await keys.rotate(made.id, overlap=5)).record
        await keys.revoke(made.id)

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def two_processes(code: str, path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], cwd=ROOT) for n in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]


async def test_two_processes_share_a_database(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    two_processes(WORKER, path)
    records = await SqliteApiKeyStore(path).records()
    assert len(records) == 60 and all(record.expires is not None for record in records)
    assert {record.subject for record in records} == {"job-0", "job-1"}


async def test_two_processes_append_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    code = WORKER.replace("SqliteApiKeyStore(path, deadline=30)", "FileApiKeyStore(path)")
    code = code.replace("api_keys.sqlite import SqliteApiKeyStore", "api_keys import FileApiKeyStore")
    two_processes(code, path)
    records = await FileApiKeyStore(path).records()
    assert len(records) == 60 and all(record.expires is not None for record in records)


@pytest.mark.skipif(sys.platform == "win32", reason="files cannot be locked like this")
async def test_a_change_waits_for_the_one_that_another_process_is_about_to_write(tmp_path: Path) -> None:
    import fcntl

    path, record = tmp_path / "keys.jsonl", make()
    store = FileApiKeyStore(path)
    await store.save(record)
    before = path.read_bytes()
    with path.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        async with anyio.create_task_group() as group:
            group.start_soon(store.end, record.id, NOW + 60)
            await anyio.sleep(0.05)
            assert path.read_bytes() == before
            other.write(f"{record.ending(NOW).as_json()}\n".encode())
            fcntl.flock(other, fcntl.LOCK_UN)
    assert (await store.get(record.id)).expires == NOW  # type: ignore[union-attr]


# --- Redis ------------------------------------------------------------------------------------------------------------


async def test_keys_in_a_server_are_in_one_slot_and_stay(valkey: Server) -> None:
    valkey.client.flushall()
    link = RedisLink(valkey.url, deadline=30.0, connect_timeout=30.0)
    store, other = RedisApiKeyStore(link, prefix="shop"), RedisApiKeyStore(link)
    plain, record = await ApiKeys(store, pepper=PEPPER).new("job", lifetime=60)
    store.note_use(record.id)
    assert await other.get(record.id) is None
    names = sorted(valkey.client.keys())
    assert names == [f"shop:1:k:{{shop}}:{name}" for name in ("ends", "records", "uses")]
    assert all(valkey.client.ttl(name) == -1 for name in names)
    assert plain.get_secret_value() not in str([valkey.client.hgetall(name) for name in names])
    store.note_use("z" * 12)
    await store.aclose()
    assert valkey.client.hkeys(names[2]) == [record.id], "a key that is not there leaves nothing behind"


async def test_a_thousand_keys_are_listed_by_pages(valkey: Server) -> None:
    valkey.client.flushall()
    store = RedisApiKeyStore(valkey.url, deadline=30.0)
    records = [make(created=NOW + number) for number in range(1_000)]
    await asyncio.gather(*(store.save(record) for record in records))
    before = valkey.calls("hscan")
    assert await store.records() == tuple(records)
    assert 4 < valkey.calls("hscan") - before < 20
    await store.aclose()


async def test_what_is_no_record_in_a_server_is_unknown(valkey: Server) -> None:
    valkey.client.flushall()
    store = RedisApiKeyStore(valkey.url, deadline=30.0)
    await store.save(make())
    for number, content in enumerate(["{", "[]", '{"digest": "canary"}', "\udcff".encode("utf-8", "surrogateescape")]):
        valkey.client.hset("sigil:1:k:{sigil}:records", f"{number:012}", content)
        with structlog.testing.capture_logs() as lines:
            assert await store.get(f"{number:012}") is None
        assert len(lines) == 1 and "canary" not in str(lines)
    assert len(await store.records()) == 1
    await store.aclose()


async def test_a_server_that_is_away_is_unavailable() -> None:
    store = RedisApiKeyStore("redis://:canary@127.0.0.1:1/0")
    for attempt in (store.get("a" * 12), store.records(), store.save(make()), store.end("a" * 12, 1.0)):
        with pytest.raises(StoreUnavailableError):
            await attempt
    store.note_use("a" * 12)
    store.note_use("b" * 12)
    await store.aclose()
    assert "canary" not in repr(store)


# --- by URL -----------------------------------------------------------------------------------------------------------


def test_a_url_names_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = {
        "sqlite:///keys.db": "SqliteApiKeyStore('keys.db')",
        f"sqlite:///{tmp_path}/b.db": "SqliteApiKeyStore('b.db')",
        "file:keys.jsonl": "FileApiKeyStore(0 records)",
        f"file:{tmp_path}/keys.toml": "TomlApiKeyStore(0 records)",
        "valkey://:canary@localhost/1": "RedisApiKeyStore(RedisLink('localhost:6379', deadline=0.5), prefix='sigil')",
    }
    made = {url: key_store(url) for url in named}
    assert {url: repr(store) for url, store in made.items()} == named
    assert all(key_store(url) is store for url, store in made.items())
    assert made[f"sqlite:///{tmp_path}/b.db"].path == tmp_path / "b.db"  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == [], "nothing is made before it is needed"

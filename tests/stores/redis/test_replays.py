"""Used proofs on a real server: one trip, exactly one winner, keys that end, and a server that is away."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from pydantic import SecretStr

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis import RedisLink
from sigil_policy.stores.redis.replays import RedisReplays
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.call("FLUSHALL")
    return running


def patient(server: Server) -> RedisLink:
    """A store that is well may still be slow on a machine that is busy with other things."""
    return RedisLink(server.url, deadline=30.0, connect_timeout=30.0)


@pytest.fixture
async def replays(server: Server) -> AsyncIterator[RedisReplays]:
    made = RedisReplays(patient(server))
    yield made
    await made.aclose()


async def test_a_name_passes_once_in_one_trip(replays: RedisReplays, server: Server) -> None:
    assert await replays.claim(b"a", 60.0, 0.0) is True
    before = server.calls("evalsha")
    assert await replays.claim(b"a", 60.0, 0.0) is False
    assert await replays.claim(b"b", 60.0, 0.0) is True
    assert server.calls("evalsha") - before == 2


async def test_an_entry_ends_by_itself(replays: RedisReplays, server: Server) -> None:
    assert await replays.claim(b"b", 60.0, 0.0)
    assert await replays.claim(b"c", 90.0, 0.0)
    assert sorted(-(-server.call("PTTL", key) // 30_000) for key in server.client.keys("*")) == [2, 3]
    assert await replays.claim(b"a", 0.4, 0.0)
    await asyncio.sleep(0.45)
    assert await replays.claim(b"a", 60.0, 0.0)
    assert not await replays.claim(b"b", 60.0, 0.0)


async def test_of_many_processes_exactly_one_has_it(server: Server) -> None:
    stores = [RedisReplays(patient(server)) for _ in range(4)]
    claims = [store.claim(b"%d" % number, 60.0, 0.0) for number in range(50) for store in stores]
    passed = await asyncio.gather(*claims)
    assert [sum(passed[index : index + 4]) for index in range(0, 200, 4)] == [1] * 50
    for store in stores:
        await store.aclose()


async def test_keys_hold_no_name(replays: RedisReplays, server: Server) -> None:
    secret = RedisReplays(patient(server), digest_key=SecretStr("canary-key"))
    other = RedisReplays(patient(server), prefix="other")
    for store in (replays, secret, other):
        assert await store.claim(b"canary-name", 60.0, 0.0), "prefixes and keys are apart"
    found = " ".join(server.client.keys("*"))
    assert "canary" not in found
    assert found.count("sigil:1:used:{") == 2
    assert found.count("other:1:used:{") == 1
    assert "canary" not in repr(secret)
    await secret.aclose()
    await other.aclose()


async def test_a_server_that_is_away_is_an_error_and_soon() -> None:
    replays = RedisReplays("redis://127.0.0.1:1", deadline=0.5)
    with pytest.raises(StoreUnavailableError) as lost:
        await replays.claim(b"a", 60.0, 0.0)
    assert lost.value.retry_after > 0
    await replays.aclose()


async def test_a_server_without_room_refuses_rather_than_forgets(server: Server, replays: RedisReplays) -> None:
    assert await replays.claim(b"a", 60.0, 0.0)
    server.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.call("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailableError):
            await replays.claim(b"b", 60.0, 0.0)
    finally:
        server.call("CONFIG", "SET", "maxmemory", "0")
    assert not await replays.claim(b"a", 60.0, 0.0)


async def test_an_answer_of_another_script_is_not_believed(server: Server) -> None:
    class Odd(RedisLink):
        def run(self, script, keys, args, *, abandoned=None):  # type: ignore[no-untyped-def, override]
            async def answer() -> object:
                return b"OK"

            return answer()

    replays = RedisReplays(Odd(server.url))
    with pytest.raises(StoreUnavailableError):
        await replays.claim(b"a", 60.0, 0.0)
    await replays.aclose()


@pytest.mark.parametrize(
    "options",
    [{"prefix": "a b"}, {"prefix": ""}, {"digest_key": SecretStr("")}, {"digest_key": SecretStr("x" * 65)}],
    ids=["prefix", "no prefix", "no key", "long key"],
)
def test_options_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RedisReplays("redis://localhost", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deadline"):
        RedisReplays(RedisLink("redis://localhost"), deadline=1.0)

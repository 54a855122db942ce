"""BearerAuth against a certified provider: a process of its own, real HTTP, real rotations, real outages."""

import json
import time
from collections import Counter
from itertools import cycle
from uuid import uuid4

import anyio
import anyio.lowlevel
import pytest

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import KeySet
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.scopes import Scopes
from sigil_policy.testing import Sent, drive
from sigil_policy.wire.jws import parse_compact
from tests.identity.material import b64
from tests.identity.oidc.server import ALGORITHMS, OidcProvider, install

pytestmark = pytest.mark.anyio


class Ahead:
    """The machine's clock, and as far ahead of it as the test has gone: the provider's dates are real ones."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def time(self) -> float:
        return time.time() + self._ahead

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


@pytest.fixture(scope="module")
def node() -> str:
    return install()


@pytest.fixture(scope="module")
def process(node, tmp_path_factory):
    provider = OidcProvider(node, tmp_path_factory.mktemp("oidc-provider"))
    yield provider
    provider.close()


@pytest.fixture
def provider(process):
    yield process
    process.restore()


@pytest.fixture
def clock() -> Ahead:
    return Ahead()


async def whoami(scope, receive, send):
    principal = get_exchange(scope).principal
    body = json.dumps([principal.subject, sorted(principal.scopes)]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Service:
    """A service that trusts the provider, and counts how it has answered."""

    def __init__(self, provider: OidcProvider, clock: Ahead, **options) -> None:
        self.keys = KeySet(**{"allow_insecure_loopback": True, "deadline": 30, **options})
        issuer = Issuer(url=provider.url, audience="sigil-api", keys=self.keys, strict=True)
        policies = [Problems(), BearerAuth(issuers=[issuer]), Scopes(routes={"/**": "agents:read"})]
        self.app = PolicyStack(whoami, policies=policies, clock=clock)
        self.answers: Counter[int] = Counter()

    def waits(self, deadline: float) -> None:
        """As if it had been made with this `deadline`: a short one for a provider that hangs, and only then, since a
        machine that stands still for as long would end a fetch from one that does not."""
        object.__setattr__(self.keys, "deadline", deadline)

    async def ask(self, token: bytes) -> Sent:
        sent = await drive(self.app, headers={"authorization": b"Bearer " + token})
        self.answers[sent.status] += 1
        if sent.status == 503:
            assert 1 <= int(sent.header("retry-after") or 0) <= 30
        return sent

    async def status(self, token: bytes) -> int:
        return (await self.ask(token)).status


def kid(token: bytes) -> str:
    return str(parse_compact(token).header["kid"])


async def test_tokens_of_every_algorithm_are_verified_by_keys_that_discovery_finds(provider, clock):
    service = Service(provider, clock)
    before = await provider.fetches()
    for algorithm in ALGORITHMS:
        token = await provider.token(algorithm, "agents:read agents:write")
        assert parse_compact(token).header["alg"] == algorithm
        for _ in range(2):
            sent = await service.ask(token)
            assert (sent.status, sent.json()) == (200, ["nightly-job", ["agents:read", "agents:write"]])
        assert await service.status(await provider.token(algorithm, "agents:write")) == 403
        forged = token[:-8] + (b"A" * 8 if token[-8:] != b"A" * 8 else b"B" * 8)
        assert await service.status(forged) == 401
    assert await provider.fetches() - before == 1


async def test_discovery_alone_does_not_take_plain_http(provider):
    """The name of the option that allows it says what it is; `discovery=True` does not imply it."""
    with pytest.raises(ValueError, match="allow_insecure_loopback"):
        Issuer(url=provider.url, audience="sigil-api", discovery=True)


async def test_a_rotation_under_load_fails_no_valid_request(provider, clock):
    """JK-07: clients go on with the tokens they have and get new ones, while the keys are rotated three times."""
    service = Service(provider, clock)
    tokens = [await provider.token(algorithm) for algorithm in ALGORITHMS]
    assert await service.status(tokens[0]) == 200
    before = await provider.fetches()
    served: set[str] = set()
    more = anyio.Event()
    done = False

    async def get_tokens() -> None:
        for algorithm in cycle(ALGORITHMS):
            tokens.append(await provider.token(algorithm))
            if done:
                return

    async def call(number: int) -> None:
        while not done:
            for token in (tokens[-1], tokens[number % len(tokens)]):
                assert await service.status(token) == 200
                if kid(token) not in served:
                    served.add(kid(token))
                    more.set()
            number += 7
            await anyio.lowlevel.checkpoint()

    async def served_with(kids: int) -> None:
        with anyio.fail_after(120):
            while len(served) < kids:
                nonlocal more
                more = anyio.Event()
                await more.wait()

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(call, number)
        for _ in range(3):
            tasks.start_soon(get_tokens)
        for rotation in range(1, 4):
            await provider.rotate()
            await served_with(len(ALGORITHMS) * (rotation + 1))
        while service.answers[200] <= 100:
            await anyio.lowlevel.checkpoint()
        done = True
    for token in tokens:
        assert await service.status(token) == 200
    assert service.answers[200] > 100
    assert set(service.answers) == {200}
    assert await provider.fetches() - before == 3, "one for each rotation"


async def test_a_retired_key_verifies_nothing_once_the_set_was_refreshed(provider, clock):
    service = Service(provider, clock, lifetime=600)
    old = [await provider.token(algorithm) for algorithm in ALGORITHMS]
    assert [await service.status(token) for token in old] == [200] * 3
    await provider.rotate()
    new = [await provider.token(algorithm) for algorithm in ALGORITHMS]
    assert [await service.status(token) for token in (*old, *new)] == [200] * 6
    await provider.retire()
    clock.advance(0.8 * 600)
    # Refresh-ahead: nobody waits for it, so that the request which causes it is still answered by the old set.
    assert await service.status(new[0]) == 200
    assert [await service.status(token) for token in old] == [401] * 3
    assert [await service.status(token) for token in new] == [200] * 3


@pytest.mark.parametrize("outage", ["hangs", "is gone"])
async def test_an_outage_longer_than_the_cache_is_bridged_up_to_the_bound_and_then_said(provider, clock, outage):
    """JK-08."""
    service = Service(provider, clock, lifetime=600, max_stale=3_600, retry=5)
    known, spare = [await provider.token("ES256") for _ in range(2)]
    assert await service.status(known) == 200
    provider.freeze() if outage == "hangs" else provider.kill()
    service.waits(0.2)
    for seconds in (480, 120, 1_800, 1_740):  # and the minute that the test may take itself
        clock.advance(seconds)
        assert [await service.status(known), await service.status(spare)] == [200, 200], "stale, and bounded"
    clock.advance(60)
    for token in (known, spare):
        sent = await service.ask(token)
        assert (sent.status, sent.json()["error_code"]) == (503, "AUTH_008")
    forged = known[:-8] + b"AAAAAAAA"
    assert await service.status(forged) == 401, "nothing is lost by saying so"
    provider.thaw() if outage == "hangs" else provider.start()
    service.waits(30)
    await provider.rotate()
    fresh = await provider.token("EdDSA")
    clock.advance(5)
    assert [await service.status(token) for token in (known, spare, fresh)] == [200] * 3
    assert set(service.answers) == {200, 401, 503}


async def test_a_service_that_starts_before_its_provider_says_when_to_try_again(provider, clock):
    token = await provider.token("RS256")
    provider.kill()
    service = Service(provider, clock, retry=5)
    assert [await service.status(token) for _ in range(20)] == [503] * 20
    provider.start()
    clock.advance(5)
    assert await service.status(token) == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_ten_thousand_random_kids_cost_the_burst_and_hold_no_rotation_up(provider, clock):
    """JK-06: a hundred seconds of them. A rotation in the middle is accepted within one cool-down."""
    service = Service(provider, clock, burst=3, cool_down=30)
    valid = await provider.token("EdDSA")
    assert await service.status(valid) == 200
    _, payload, _ = valid.split(b".")
    before = await provider.fetches()
    started, accepted, fresh = clock.monotonic(), 0, b""
    for number in range(10_000):
        header = {"alg": ALGORITHMS[number % 3], "typ": "at+jwt", "kid": str(uuid4())}
        forged = b64(json.dumps(header)) + b"." + payload + b"." + b64(bytes(64))
        assert await service.status(forged) in (401, 503)
        if number == 4_000:
            await provider.rotate()
            fresh = await provider.token("EdDSA")
        if fresh and not accepted and number % 50 == 0 and await service.status(fresh) == 200:
            accepted = number
        if number % 500 == 0:
            assert await service.status(valid) == 200
        clock.advance(0.01)
    took = clock.monotonic() - started
    assert await provider.fetches() - before <= 3 + took // 30
    assert 0 <= accepted - 4_000 <= 3_000 + 50, "30 seconds, asked every half a second; a slow machine makes it fewer"
    assert service.answers[200] > 20
    assert set(service.answers) == {200, 401, 503}
    # Once fetches are allowed again, a kid that nobody has published is refused for good.
    clock.advance(90)
    assert await service.status(forged) == 401

"""Revocation: what was revoked is refused like what never held, everywhere and soon."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from pydantic import SecretStr, ValidationError

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.revocations import RedisRevocations
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.identity.material import NOW, URL, good_claims, make_issuer, token
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN, RECORD = new_key(pepper=PEPPER, subject="nightly-job")
KEY = {"x-api-key": PLAIN.get_secret_value()}


def bearer(**claims: Any) -> dict[str, bytes]:
    return {"authorization": b"Bearer " + token(good_claims(**{"jti": "t1", **claims}))}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": []})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def make_app(store: Any, *inside: Any, clock: Any = None, bearer_keys: bool = False, **options: Any) -> PolicyStack:
    keys = ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER, bearer=bearer_keys)
    tokens = BearerAuth(issuers=[make_issuer()], foreign_prefix="sk_" if bearer_keys else None)
    policies = [Problems(), tokens, keys, Revocation(store=store, **options), *inside]
    return PolicyStack(hello, policies=policies, clock=clock or FrozenClock(NOW))


def memory() -> MemoryRevocations:
    return MemoryRevocations(clock=FrozenClock(NOW))


def same(one: Sent, other: Sent) -> bool:
    return (one.status, one.body, one.headers) == (other.status, other.body, other.headers)


@pytest.mark.parametrize(
    "what",
    [
        {"jti": "t1", "until": NOW + 3_600},
        {"jti": "t1", "issuer": URL},
        {"subject": "user_123"},
        {"subject": "user_123", "issuer": URL, "issued_before": NOW},
        {"issuer": URL, "issued_before": NOW},
        {"issued_before": NOW},
    ],
)
async def test_a_revoked_token_gets_the_answer_of_a_wrong_one(what: Any) -> None:
    store = memory()
    app = make_app(store)
    assert (await drive(app, headers=bearer())).status == 200
    await store.revoke(**what)
    sent = await drive(app, headers=bearer())
    wrong = await drive(app, headers={"authorization": bearer()["authorization"][:-3] + b"AAA"})
    assert sent.status == 401 and sent.json()["error_code"] == "AUTH_002" and same(sent, wrong)
    assert await store.restore(**{name: what[name] for name in ("jti", "subject", "issuer") if name in what})
    assert (await drive(app, headers=bearer())).status == 200


@pytest.mark.parametrize(
    ("what", "claims"),
    [
        ({"jti": "t2"}, {}),
        ({"jti": "t1", "issuer": "https://other.example"}, {}),
        ({"subject": "user_124"}, {}),
        ({"subject": "user_123", "issuer": "https://other.example"}, {}),
        ({"subject": "user_123", "issued_before": NOW - 10}, {}),
        ({"subject": "user_123", "issued_before": NOW - 10}, {"iat": NOW - 9.5}),
        ({"jti": "t1"}, {"jti": None}),
        ({"jti": "5"}, {"jti": 5}),
    ],
)
async def test_what_was_not_revoked_holds(what: Any, claims: Any) -> None:
    store = memory()
    await store.revoke(**what)
    assert (await drive(make_app(store), headers=bearer(**claims))).status == 200


async def test_a_token_without_a_date_counts_as_issued_before_every_moment() -> None:
    store = memory()
    await store.revoke(subject="user_123", issued_before=1.0)
    assert (await drive(make_app(store), headers=bearer(iat=None, jti=None))).status == 401
    assert (await drive(make_app(store), headers=bearer())).status == 200


async def test_a_log_out_everywhere_leaves_the_next_log_in() -> None:
    store, clock = memory(), FrozenClock(NOW)
    app = make_app(store, clock=clock)
    await store.revoke(subject="user_123", issued_before=clock.time())
    assert (await drive(app, headers=bearer())).status == 401
    clock.advance(1)
    assert (await drive(app, headers=bearer(iat=clock.time(), jti="t2"))).status == 200


@pytest.mark.parametrize("as_bearer", [False, True])
async def test_an_api_key_is_met_by_its_subject_and_answered_as_a_wrong_one(as_bearer: bool) -> None:
    store = memory()
    app = make_app(store, bearer_keys=as_bearer)
    key = KEY["x-api-key"]

    def headers(text: str) -> dict[str, str]:
        return {"authorization": f"Bearer {text}"} if as_bearer else {"x-api-key": text}

    await store.revoke(jti="t1")
    await store.revoke(subject="nightly-job", issuer=URL)
    assert (await drive(app, headers=headers(key))).status == 200
    await store.revoke(subject="nightly-job", issued_before=NOW)
    sent, wrong = await drive(app, headers=headers(key)), await drive(app, headers=headers(key[:-1]))
    assert sent.json()["error_code"] == "AUTH_005" and same(sent, wrong)


async def test_who_says_nothing_is_asked_nothing() -> None:
    store = memory()
    await store.revoke()
    assert (await drive(make_app(store))).status == 200
    assert (await drive(make_app(store, Scopes()))).status == 401


async def test_a_websocket_is_refused_before_it_is_accepted() -> None:
    store = memory()
    app = make_app(store)
    assert (await drive(app, kind="websocket", headers=bearer())).status == 101
    await store.revoke(subject="user_123")
    sent = await drive(app, kind="websocket", headers=bearer())
    assert sent.status == 401 and sent.header("www-authenticate") == 'Bearer realm="api", error="invalid_token"'
    bare = await drive(app, kind="websocket", headers=bearer(), scope={"extensions": {}})
    assert bare.messages == [{"type": "websocket.close", "code": 1008, "reason": ""}]


async def test_a_revoked_credential_is_no_longer_let_through_where_failures_are_limited() -> None:
    store = memory()
    limit = AuthFailureLimit(addresses="3/hour", credentials=None, everywhere=None)
    inner = make_app(store)
    app = PolicyStack(inner, policies=[limit], clock=FrozenClock(NOW))
    assert (await drive(app, headers=KEY)).status == 200
    await store.revoke(subject="nightly-job")
    assert [(await drive(app, headers=KEY)).status for _ in range(4)] == [401, 401, 401, 429]


async def test_it_stands_inside_of_what_authenticates() -> None:
    revocation, tokens = Revocation(store=memory()), BearerAuth(issuers=[make_issuer()])
    with pytest.raises(PolicyOrderError, match="list BearerAuth before Revocation"):
        PolicyStack(hello, policies=[revocation, tokens])
    with pytest.raises(PolicyOrderError, match="mount a policy that gives Principal before"):
        await drive(PolicyStack(hello, policies=[revocation]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "store"),
        ({"store": 5}, "RevocationStore"),
        ({"store": "http://x"}, "(?i)url|scheme"),
        ({"store": memory(), "delay": 0}, "delay"),
        ({"store": memory(), "delay": 60}, "stale_for 30.0 is below delay"),
        ({"store": memory(), "on_store_loss": "local"}, "closed"),
        ({"store": memory(), "scheme": "a b"}, "HTTP token"),
    ],
)
def test_a_wrong_option_fails_at_construction(options: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Revocation(**options)


def test_no_password_is_shown() -> None:
    assert "hunter2" not in repr(Revocation(store="redis://:hunter2@localhost:1"))


# --- a copy of what is elsewhere --------------------------------------------------------------------------------------


class Elsewhere:
    """Revocations on another machine, as far as a policy can tell, that can be taken away."""

    remote = True

    def __init__(self) -> None:
        self.there, self.here = memory(), memory()
        self.at = float("-inf")
        self.away = self.busy = False
        self.trips = 0
        self.closed = False

    def revoked(self, **token: Any) -> bool:
        return bool(self.here.revoked(**token))

    def age(self, now: float) -> float:
        return now - self.at

    def resting(self, now: float) -> bool:
        return self.busy

    async def refresh(self, now: float) -> None:
        self.trips += 1
        await anyio.lowlevel.checkpoint()
        if self.away:
            raise StoreUnavailableError("away", 2.5)
        self.here, self.at = self.there, now

    async def revoke(self, **what: Any) -> None:
        later = memory()
        await later.revoke(**what)
        self.there = later

    async def aclose(self) -> None:
        self.closed = True


async def test_hardly_any_request_waits_for_a_trip() -> None:
    store, clock = Elsewhere(), FrozenClock(NOW)
    waited = []

    class Watch(Policy):
        def on_request(self, ex: Exchange) -> None:
            waited.append(store.trips)

    app = make_app(store, Watch(), clock=clock)
    for _ in range(100):
        await drive(app, headers=bearer())
        clock.advance(0.1)
    # The first one waits; then one exchange in five refreshes after its response.
    assert waited[0] == 1 and store.trips <= 21
    store.trips = 0
    clock.advance(60)
    await drive(app, headers=bearer())
    assert store.trips == 1 and waited[-1] == 1, "after a long silence one waits"
    clock.advance(0.6)
    store.busy = True
    await drive(app, headers=bearer())
    assert store.trips == 1, "somebody refreshes already"


async def test_a_revocation_is_known_after_the_delay_at_the_latest() -> None:
    for pause in (0.05, 0.3, 0.45, 0.9, 1.0, 7.0):
        store, clock = Elsewhere(), FrozenClock(NOW)
        app = make_app(store, clock=clock)
        await drive(app, headers=bearer())
        await store.revoke(subject="user_123")
        passed = 0.0
        while (await drive(app, headers=bearer())).status == 200:
            clock.advance(pause)
            passed += pause
        assert passed <= 1.0 + pause - 1e-9 or passed <= pause


async def test_the_copy_decides_while_the_store_is_away_and_then_nobody_is_let_in() -> None:
    store, clock = Elsewhere(), FrozenClock(NOW)
    app = make_app(store, clock=clock)
    await store.revoke(subject="nightly-job")
    await drive(app, headers=bearer())
    store.away = True
    clock.advance(29.9)
    assert (await drive(app, headers=bearer())).status == 200
    assert (await drive(app, headers=KEY)).status == 401
    clock.advance(0.1)
    sent = await drive(app, headers=bearer())
    assert (sent.status, sent.json()["error_code"], sent.header("retry-after")) == (503, "SRV_503", "3")
    assert sent.json()["retry_after"] == 3
    assert (await drive(app)).status == 200, "nobody has nothing to be revoked"
    store.away = False
    assert (await drive(app, headers=bearer())).status == 200


async def test_open_goes_on_with_what_is_known() -> None:
    store, clock = Elsewhere(), FrozenClock(NOW)
    app = make_app(store, clock=clock, on_store_loss="open")
    store.away = True
    assert (await drive(app, headers=bearer())).status == 200
    store.away = False
    await store.revoke(subject="user_123")
    assert (await drive(app, headers=bearer())).status == 401
    store.away = True
    clock.advance(9_999)
    assert (await drive(make_app(store, clock=clock, on_store_loss="open"), headers=KEY)).status == 200


async def test_a_process_that_has_never_read_lets_nobody_in() -> None:
    store = Elsewhere()
    store.away = True
    assert (await drive(make_app(store), headers=bearer())).status == 503


async def test_the_store_is_closed_with_the_application() -> None:
    store = Elsewhere()
    await make_app(store).aclose()
    assert store.closed


async def test_a_principal_of_another_kind_is_met_too() -> None:
    class Certificate(Policy):
        gives = (Principal,)

        def on_request(self, ex: Exchange) -> None:
            ex.authenticate(Principal("machine-7", kind="mtls"))

    store = memory()
    app = PolicyStack(hello, policies=[Certificate(), Revocation(store=store)], clock=FrozenClock(NOW))
    assert (await drive(app)).status == 200
    await store.revoke(subject="machine-7")
    assert (await drive(app)).json()["error_code"] == "AUTH_002"


# --- two processes on one server --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Any:
    with Server() as server:
        yield server.url


@pytest.fixture
async def processes(url: str) -> AsyncIterator[list[tuple[RedisRevocations, PolicyStack, FrozenClock]]]:
    made = []
    for _ in range(2):
        clock = FrozenClock(NOW)
        store = RedisRevocations(RedisLink(url, deadline=60, connect_timeout=60), clock=clock)
        made.append((store, make_app(store, clock=clock), clock))
    yield made
    for _, app, _ in made:
        await app.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_process_revokes_and_all_refuse(processes: list[Any]) -> None:
    (store, one, _), (_, other, clock) = processes
    for app in (one, other):
        assert (await drive(app, headers=bearer(jti="shared"))).status == 200
    await store.revoke(jti="shared", until=NOW + 600)
    assert (await drive(one, headers=bearer(jti="shared"))).status == 401
    clock.advance(1.0)
    assert (await drive(other, headers=bearer(jti="shared"))).status == 401
    assert (await drive(other, headers=bearer(jti="another"))).status == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_no_request_pays_a_trip_and_none_makes_a_task(processes: list[Any]) -> None:
    import asyncio

    store, app, clock = processes[0]
    await drive(app, headers=bearer())
    made = []

    def factory(loop: Any, work: Any, **options: Any) -> Any:
        made.append(work)
        return asyncio.Task(work, loop=loop, **options)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        runs = store.link.counters.runs
        for _ in range(100):
            assert (await drive(app, headers=bearer())).status == 200
        assert store.link.counters.runs == runs
        clock.advance(0.6)
        for _ in range(100):
            await drive(app, headers=bearer())
        assert store.link.counters.runs == runs + 1
    finally:
        loop.set_task_factory(None)
    assert made == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_crowd_that_finds_an_old_copy_waits_for_one_trip(processes: list[Any]) -> None:
    store, app, clock = processes[0]
    await drive(app, headers=bearer())
    clock.advance(100)
    runs = store.link.counters.runs
    async with anyio.create_task_group() as crowd:
        for number in range(50):
            crowd.start_soon(lambda: drive(app, headers=bearer()), name=str(number))
        with anyio.move_on_after(0):
            await drive(app, headers=bearer())
    assert store.link.counters.runs <= runs + 2

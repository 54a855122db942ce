"""AuthFailureLimit: guesses end, and nobody is locked out by somebody else's."""

import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.problems import Problem, ProblemType
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, key_id, new_key
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit, _credential
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.scopes import Scopes
from sigil_policy.stores.memory import FixedWindows, memory_limits
from sigil_policy.stores.redis import RedisLimits
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.identity.material import NOW, b64, good_claims, make_issuer, token
from tests.policies.rate_limit.faults import Remote
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN, RECORD = new_key(pepper=PEPPER, subject="nightly-job")
KEY = PLAIN.get_secret_value()
START = NOW - NOW % 3_600 + 60  # a minute into an hour


def claims(**changes: Any) -> dict[str, Any]:
    return good_claims(**{"exp": int(START) + 100_000, "iat": int(START) - 10, **changes})


TOKEN = (b"Bearer " + token(claims())).decode()
FORGED = TOKEN[:-6] + "AAAAAA"


def _checksum(body: bytes) -> str:
    """CRC-32 in base 62, as keys have it."""
    number, text = zlib.crc32(body), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        text = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[digit] + text
    return text


def guess(number: int, key: str = KEY) -> str:
    """The right id, another secret, and a right checksum."""
    body = key[:-7].rpartition("_")[0] + f"_{number:032d}"
    return f"{body}_{_checksum(body.encode())}"


def somebodys(number: int) -> str:
    """A key of an id that nobody has."""
    body = f"sk_live_{number:012d}_{'A' * 32}"
    return f"{body}_{_checksum(body.encode())}"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": []})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def make_auth() -> tuple[ApiKeyAuth, BearerAuth]:
    return ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER), BearerAuth(issuers=[make_issuer()])


WINDOWS = {"addresses": "5/hour", "credentials": "3/hour", "everywhere": "8/hour"}
HERE, THERE = "198.51.100.1", "203.0.113.9"


class Service:
    """A service, and what its clients send."""

    def __init__(self, *policies: Any, app: Any = hello, clock: Any = None, **options: Any) -> None:
        self.clock = clock or FrozenClock(START)
        self.limit = AuthFailureLimit(**{**WINDOWS, **options})
        self.app = PolicyStack(app, policies=[Problems(), self.limit, *make_auth(), *policies], clock=self.clock)

    async def key(self, key: str, address: str = HERE, **options: Any) -> Sent:
        return await drive(self.app, headers={"x-api-key": key}, client=(address, 1), **options)

    async def bearer(self, value: str, address: str = HERE, **options: Any) -> Sent:
        return await drive(self.app, headers={"authorization": value}, client=(address, 1), **options)

    async def strangers(self, times: int, address: str = HERE) -> list[int]:
        """Keys that nobody has, each with an id of its own."""
        return [(await self.key(somebodys(number), address)).status for number in range(times)]


async def test_an_address_that_fails_too_often_is_refused_until_its_window_ends() -> None:
    service = Service(accepted=0)
    assert await service.strangers(6) == [401] * 5 + [429]
    sent = await service.key(somebodys(9))
    assert sent.json()["error_code"] == "RATE_004"
    assert sent.header("retry-after") == "3540" and sent.json()["retry_after"] == 3_540
    assert sent.header("cache-control") == "no-store" and sent.header("www-authenticate") is None
    service.clock.advance(3_539.5)
    assert (await service.key(KEY)).header("retry-after") == "1"
    service.clock.advance(0.5)
    assert (await service.key(KEY)).body == b"hello"


async def test_a_blocked_address_learns_nothing_of_a_credential() -> None:
    """Right, wrong, mistyped, forged, absurd: one answer, and nothing is verified for it."""
    looked_up = []

    class Store(MemoryApiKeyStore):
        def find(self, key_id: str) -> Any:
            looked_up.append(key_id)
            return super().find(key_id)

    clock = FrozenClock(START)
    keys = ApiKeyAuth(store=Store([RECORD]), pepper=PEPPER)
    tokens = BearerAuth(issuers=[make_issuer()])
    app = PolicyStack(hello, policies=[AuthFailureLimit(**WINDOWS), keys, tokens], clock=clock)
    for number in range(5):
        await drive(app, headers={"x-api-key": somebodys(number)})
    looked_up.clear()
    answers = [
        await drive(app, headers={name: value})
        for name, value in [
            ("x-api-key", KEY), ("x-api-key", guess(1)), ("x-api-key", KEY[:-1]), ("x-api-key", "x" * 100_000),
            ("authorization", TOKEN), ("authorization", FORGED), ("authorization", "Basic YTpi"), ("x-api-key", ""),
        ]
    ]  # fmt: skip
    assert {sent.status for sent in answers} == {429}
    assert len({(sent.body, tuple(sent.headers)) for sent in answers}) == 1
    assert not looked_up


async def test_a_refusal_prolongs_nothing() -> None:
    service = Service(addresses="2/minute;5/hour", credentials=None, everywhere=None)
    await service.strangers(2)
    assert await service.strangers(50) == [429] * 50
    service.clock.advance(60)
    assert await service.strangers(3) == [401, 401, 429]


async def test_other_addresses_go_on() -> None:
    service = Service()
    await service.strangers(9)
    assert (await service.key(KEY, THERE)).body == b"hello"
    assert (await service.key(somebodys(0), THERE)).status == 401


async def test_a_v6_network_is_one_address_and_another_is_not() -> None:
    service = Service()
    for number in range(5):
        assert (await service.key(somebodys(number), f"2001:db8:1:2::{number:x}")).status == 401
    assert (await service.key(KEY, "2001:db8:1:2:ffff::1")).status == 429
    assert (await service.key(KEY, "2001:db8:1:3::1")).status == 200


async def test_the_address_is_believed_of_trusted_proxies_only() -> None:
    async def come(service: Service, peer: str, forwarded: str, key: str) -> int:
        headers = {"x-api-key": key, "x-forwarded-for": forwarded}
        return (await drive(service.app, headers=headers, client=(peer, 1))).status

    behind = Service(trusted_proxies=["10.0.0.0/8"])
    for number in range(5):
        await come(behind, "10.0.0.1", f"evil, 192.0.2.{number}, {HERE}", somebodys(number))
    assert await come(behind, "10.0.0.1", HERE, KEY) == 429
    assert await come(behind, "10.0.0.1", THERE, KEY) == 200
    straight = Service()
    statuses = [await come(straight, HERE, f"192.0.2.{number}", somebodys(number)) for number in range(6)]
    assert statuses[-1] == 429  # naming other addresses helps nobody


async def test_a_client_with_an_outdated_credential_leaves_its_neighbours_some() -> None:
    service = Service()
    assert [(await service.key(guess(0))).status for _ in range(20)] == [401] * 3 + [429] * 17
    assert (await service.bearer(TOKEN)).status == 200
    assert await service.strangers(3) == [401, 401, 429]


@pytest.mark.parametrize("kid", [None, "2026-01"])
async def test_tokens_of_one_key_are_counted_together(kid: str | None) -> None:
    service = Service()
    forged = [
        (b"Bearer " + token(claims(sub=f"user_{n}"), header={} if kid is None else {"kid": kid})[:-4] + b"AAAA")
        for n in range(9)
    ]
    assert [(await service.bearer(value.decode())).status for value in forged] == [401] * 3 + [429] * 6
    other = token(claims(iss="https://other.example"), header={"kid": "other"})
    assert (await service.bearer(f"Bearer {other.decode()}")).status == 401


async def test_an_attacker_elsewhere_does_not_lock_the_owner_out() -> None:
    """Who knows a key's id has it fail from as many addresses as they like."""
    service = Service()
    for number in range(200):
        await service.key(guess(number), f"10.1.{number // 250}.{number % 250}")
    assert (await service.key(KEY, THERE)).body == b"hello", "the owner, from an address that never came"


async def test_a_key_under_attack_has_one_guess_for_each_address() -> None:
    service = Service()
    passed = 0
    for number in range(100):
        for attempt in range(4):
            passed += (await service.key(guess(4 * number + attempt), f"10.1.0.{number}")).status == 401
    # Eight of the first three addresses; then each of the others has one.
    assert passed == 8 + 97
    service.clock.advance(3_600)
    assert [(await service.key(guess(n), "10.1.0.1")).status for n in range(3)] == [401] * 3


async def test_tokens_of_one_issuer_are_never_under_attack_everywhere() -> None:
    """They are many callers': a forger must not make one wrong token of each refuse the next right one."""
    service = Service()
    for number in range(60):
        await service.bearer(FORGED, f"10.1.0.{number}")
    assert (await service.bearer(FORGED, HERE)).status == 401
    assert (await service.bearer(TOKEN, HERE)).status == 200


async def test_who_was_let_in_lately_is_let_through() -> None:
    service = Service()
    assert (await service.key(KEY)).status == 200
    await service.strangers(5)
    assert (await service.bearer(TOKEN)).status == 429
    assert (await service.key(guess(1))).status == 429, "the same id is no cover"
    assert (await service.key(KEY)).body == b"hello"
    service.clock.advance(3_000)
    assert (await service.key(KEY)).body == b"hello"
    await service.strangers(5)  # the next window
    service.clock.advance(3_599)
    assert (await service.key(KEY)).body == b"hello", "accepted again meanwhile"


async def test_it_is_let_through_for_a_while_only() -> None:
    service = Service(accepted_for=10)
    await service.key(KEY)
    await service.strangers(5)
    service.clock.advance(10)
    assert (await service.key(KEY)).status == 429


async def test_a_credential_that_ends_is_let_through_no_more() -> None:
    service = Service()
    ended = (b"Bearer " + token(claims(exp=int(START) + 30))).decode()
    assert (await service.bearer(ended)).status == 200
    await service.strangers(5)
    assert (await service.bearer(ended)).status == 200
    service.clock.advance(60)
    assert (await service.bearer(ended)).status == 401
    assert (await service.bearer(ended)).status == 429


async def test_no_more_than_some_are_remembered_and_those_in_use_stay() -> None:
    service = Service(accepted=4)
    await service.key(KEY)
    for number in range(50):
        assert (await service.bearer(f"Bearer {token(claims(sub=f'u{number}')).decode()}")).status == 200
        assert (await service.key(KEY)).status == 200
    assert len(service.limit._accepted) <= 4
    await service.strangers(5)
    assert (await service.key(KEY)).status == 200
    assert (await service.bearer(f"Bearer {token(claims(sub='u1')).decode()}")).status == 429


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 401, id="no credential"),
        pytest.param({"authorization": "Bearer"}, 400, id="malformed"),
        pytest.param({"authorization": "Bearer a b"}, 400, id="no token68"),
        pytest.param({"authorization": TOKEN, "x-api-key": KEY}, 400, id="two kinds"),
        pytest.param({"authorization": TOKEN}, 403, id="too few scopes"),
    ],
)
async def test_what_is_no_failure_counts_nothing(headers: dict[str, str], status: int) -> None:
    service = Service(Scopes(routes={"/**": "admin:all"}))
    assert {(await drive(service.app, headers=headers)).status for _ in range(20)} == {status}


async def test_credentials_of_a_kind_that_nobody_verifies_count_where_they_are_refused() -> None:
    service = Service(Scopes())
    assert [(await service.bearer("Basic YTpi")).status for _ in range(6)] == [401] * 5 + [429]


async def test_what_the_application_refuses_is_its_own() -> None:
    async def login(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    refused = ProblemType(code="LOGIN_001", title="LoginError", status=401)

    async def raises(scope: Any, receive: Any, send: Any) -> None:
        raise Problem(refused)

    for app in (login, raises):
        service = Service(app=app)
        assert {(await service.key(KEY)).status for _ in range(9)} == {401}


async def test_a_websocket_counts_and_is_refused_before_it_is_accepted() -> None:
    service = Service()
    assert [(await service.key(somebodys(n), kind="websocket")).status for n in range(6)] == [401] * 5 + [429]
    assert (await service.key(KEY)).status == 429


async def test_a_websocket_without_a_response_counts_too() -> None:
    service = Service()
    for number in range(5):
        sent = await service.key(somebodys(number), kind="websocket", scope={"extensions": {}})
        assert sent.messages == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    sent = await service.key(KEY, kind="websocket", scope={"extensions": {}})
    assert sent.messages == [{"type": "websocket.close", "code": 1013, "reason": ""}]


async def test_a_websocket_that_is_let_in_and_closed_is_no_failure() -> None:
    service = Service()
    for _ in range(9):
        assert (await service.key(KEY, kind="websocket", scope={"extensions": {}})).status == 101


@pytest.mark.parametrize("shape", ["fused", "nested", "behind another middleware"])
async def test_two_of_them_with_one_store_count_an_exchange_once(shape: str) -> None:
    clock = FrozenClock(START)
    limit = AuthFailureLimit(**WINDOWS, store=FixedWindows())
    inner = PolicyStack(hello, policies=[limit, *make_auth()], clock=clock)
    if shape == "fused":
        app: Any = PolicyStack(hello, policies=[limit, limit, *make_auth()], clock=clock)
    elif shape == "nested":
        app = PolicyStack(inner, policies=[limit], clock=clock)
    else:

        async def between(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)

        app = PolicyStack(between, policies=[limit], clock=clock)
    statuses = [(await drive(app, headers={"x-api-key": somebodys(n)})).status for n in range(6)]
    assert statuses == [401] * 5 + [429]


async def test_one_policy_in_two_stacks_counts_together() -> None:
    limit = AuthFailureLimit(**WINDOWS)
    clock = FrozenClock(START)
    one, other = (PolicyStack(hello, policies=[limit, *make_auth()], clock=clock) for _ in range(2))
    for number in range(5):
        await drive((one, other)[number % 2], headers={"x-api-key": somebodys(number)})
    assert [(await drive(app, headers={"x-api-key": KEY})).status for app in (one, other)] == [429, 429]


async def test_a_failure_counts_also_when_the_client_does_not_wait_for_the_answer() -> None:
    service = Service()

    def gone(message: Any) -> None:
        raise OSError("gone")

    for number in range(5):
        with pytest.raises(OSError, match="gone"):
            await service.key(somebodys(number), on_send=gone)
    assert (await service.key(KEY)).status == 429


async def test_who_is_cancelled_while_a_key_is_looked_for_has_learned_and_counts_nothing() -> None:
    class Slow:
        async def find(self, key_id: str) -> Any:
            await anyio.sleep_forever()

    app = PolicyStack(
        hello, policies=[AuthFailureLimit(**WINDOWS), ApiKeyAuth(store=Slow(), pepper=PEPPER)], clock=FrozenClock(START)
    )
    for _ in range(9):
        with anyio.move_on_after(0.001) as scope:
            await drive(app, headers={"x-api-key": KEY})
        assert scope.cancelled_caught


async def test_the_callers_quota_is_not_touched() -> None:
    """Also where both count in one store."""
    store = FixedWindows()
    service = Service(RateLimit(store=store, tiers={"free": "9/hour"}), store=store)
    await service.strangers(5)
    sent = await service.key(KEY, THERE)
    assert sent.header("x-ratelimit-remaining") == "8"


@pytest.mark.parametrize("algorithm", ["sliding", "gcra"])
async def test_other_algorithms_count_too(algorithm: Any) -> None:
    for store in (None, memory_limits(algorithm)):
        service = Service(algorithm=algorithm, store=store)
        assert await service.strangers(6) == [401] * 5 + [429]
        assert (await service.key(KEY, THERE)).status == 200
        service.clock.advance(3_600)
        assert (await service.key(KEY)).status == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_flood_of_addresses_leaves_everybody_else_alone() -> None:
    """100,000 networks: each fails, none counts for another, and memory stays within its bound."""
    store = FixedWindows(max_callers=50_000)
    limit = AuthFailureLimit(**WINDOWS, store=store)
    app = PolicyStack(hello, policies=[limit, *make_auth()], clock=FrozenClock(START))
    headers = {"x-api-key": "no key at all"}
    for number in range(100_000):
        scope = {"client": (f"2001:db8:{number >> 16:x}:{number & 65_535:x}::1", 1)}
        if number < 500 or number > 99_500:
            assert (await drive(app, headers=headers, scope=scope)).status == 401
        else:
            store.charge(f"!failures address ip6-20010db8{number:08x}", limit._plans.addresses, (1,), START)
    assert len(store) <= 25_010
    assert (await drive(app, headers={"x-api-key": KEY}, client=("192.0.2.77", 1))).status == 200
    known = [(await drive(app, headers=headers, client=("2001:db8::1", 1))).status for _ in range(6)]
    assert known[-1] == 429, "who was counted before the flood still is"


HOSTILE = [
    b"", b"Bearer", b"Bearer ", b"Bearer ..", b"Bearer a.b.c", b"\xff\x00.\xfe.\x80", b"Bearer " + b"." * 100_000,
    b"Bearer " + b"x" * 1_000_000, b"sk_" * 50_000, b"Bearer " + b64(b"{}") + b"." + b64(b'{"iss":5}') + b".",
    b"Bearer " + b64(b'{"kid":[]}') + b"." + b64(b'{"iss":"x"}') + b".",
    b"Bearer " + b64(json.dumps({"kid": "k" * 3_000})) + b"." + b64(b'{"iss":"x"}') + b".",
    b"Bearer " + b64(b'{"kid":"\\ud800"}') + b"." + b64(b'{"iss":"x"}') + b".",
    b"Bearer " + b64(b"[" * 4_000) + b"." + b64(b"{}") + b".",
]  # fmt: skip


async def test_hostile_credentials_are_refused_and_named_by_nothing_they_chose() -> None:
    for number, value in enumerate(HOSTILE):
        name = _credential(value)
        assert name is None or len(name.name) < 64
        for header in ("authorization", "x-api-key"):
            service = Service()
            for _ in range(7):
                sent = await drive(service.app, headers=[(header, value)], client=(f"10.0.0.{number}", 1))
                assert sent.status in (400, 401, 429, 200)


@given(
    st.binary(max_size=600) | st.tuples(*[st.binary(max_size=200)] * 3).map(lambda parts: b".".join(map(b64, parts)))
)
def test_whatever_is_presented_can_be_named_or_not(value: bytes) -> None:
    for presented in (value, b"Bearer " + value):
        named = _credential(presented)
        assert named is None or named.name.isascii()


def test_names_are_digests_and_tell_credentials_apart() -> None:
    def named(claims: Any, kid: str | None = None) -> Any:
        return _credential(b"Bearer " + token(claims, header={"kid": kid} if kid else {}))

    assert named(claims(sub="a")) == named(claims(sub="b"))
    assert len({named(claims()), named(claims(), "1"), named(claims(), "2")}) == 3
    assert len({named(claims(sub=str(number)), "1") for number in range(9)}) == 1
    assert _credential(KEY.encode()) == _credential(b"bearer " + guess(1).encode()) != _credential(b"Basic YTpi")
    assert key_id(guess(1).encode()) == RECORD.id and key_id(somebodys(1).encode()), "the guesses look like keys"
    assert RECORD.id not in str(_credential(KEY.encode()))


async def test_it_stands_outside_of_what_authenticates() -> None:
    with pytest.raises(PolicyOrderError, match="AuthFailureLimit has to see what ApiKeyAuth refuses"):
        PolicyStack(hello, policies=[make_auth()[0], AuthFailureLimit()])
    with pytest.raises(PolicyOrderError, match="list AuthFailureLimit before BearerAuth"):
        PolicyStack(PolicyStack(hello, policies=[AuthFailureLimit()]), policies=[make_auth()[1]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"addresses": "often"}, "addresses 'often' must be like"),
        ({"addresses": "0/minute"}, "a limit is 1 to"),
        ({"addresses": "1/minute;2/minute"}, "two limits for one length"),
        ({"addresses": "9/minute"}, "give addresses a window of each length"),
        ({"credentials": None}, "everywhere takes credentials"),
        ({"on_store_loss": "local"}, "expected_replicas"),
        ({"store": 5}, "LimitStore"),
        ({"algorithm": "gcra", "store": FixedWindows()}, "not by gcra"),
        ({"headers": ["X API Key"]}, "HTTP token"),
        ({"headers": []}, "at least 1"),
        ({"name": "a b"}, "letters, digits"),
        ({"trusted_proxies": ["0.0.0.0/0"]}, "everybody"),
        ({"limit": 5}, "limit"),
    ],
)
def test_a_wrong_option_fails_at_construction(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AuthFailureLimit(**options)


async def test_nothing_that_was_presented_is_shown() -> None:
    service = Service(store=FixedWindows())
    await service.key(KEY)
    await service.bearer(FORGED)
    shown = repr(service.app) + repr(service.limit) + repr(service.limit._accepted)
    assert KEY[8:] not in shown and FORGED[20:] not in shown
    assert "hunter2" not in repr(AuthFailureLimit(store="redis://:hunter2@localhost:1"))


@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_every_method_counts_and_streams_pass(method: str) -> None:
    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": number < 2})

    service = Service(app=stream)
    sent = await service.key(KEY, method=method)
    assert [message.get("body") for message in sent.messages[1:]] == [b"0", b"1", b"2"]
    assert [(await service.key(somebodys(n), method=method)).status for n in range(6)] == [401] * 5 + [429]


async def test_a_failure_on_the_way_is_no_failed_authentication() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    service = Service(app=broken)
    for _ in range(9):
        with pytest.raises(RuntimeError):
            await service.key(KEY)
    assert await service.strangers(1) == [401]


# --- a store on another machine ---------------------------------------------------------------------------------------


async def test_closed_refuses_whoever_was_not_let_in_lately() -> None:
    store = Remote()
    service = Service(store=store)
    await service.key(KEY)
    store.away = True
    sent = await service.bearer(TOKEN)
    assert (sent.status, sent.json()["error_code"], sent.header("retry-after")) == (503, "RATE_003", "3")
    assert (await service.key(KEY)).status == 200
    assert (await drive(service.app)).status == 200, "without a credential nobody is asked"


async def test_open_refuses_nobody() -> None:
    store = Remote()
    service = Service(store=store, on_store_loss="open")
    store.away = True
    assert await service.strangers(9) == [401] * 9
    store.away = False
    assert await service.strangers(6) == [401] * 5 + [429]


async def test_local_counts_this_process_share() -> None:
    store = Remote()
    service = Service(store=store, on_store_loss="local", expected_replicas=2)
    store.away = True
    assert await service.strangers(3) == [401, 401, 429]
    store.away = False
    assert (await service.key(KEY)).status == 200


async def test_a_store_that_goes_between_the_question_and_the_count_breaks_nothing() -> None:
    store = Remote()

    class Leaving(MemoryApiKeyStore):
        def find(self, key_id: str) -> Any:
            store.away = True
            return None

    keys = ApiKeyAuth(store=Leaving(), pepper=PEPPER)
    app = PolicyStack(hello, policies=[AuthFailureLimit(**WINDOWS, store=store), keys], clock=FrozenClock(START))
    assert (await drive(app, headers={"x-api-key": KEY})).status == 401


async def test_a_remote_store_is_asked_once_and_not_at_all_for_who_was_let_in() -> None:
    store = Remote()
    service = Service(store=store)
    await service.key(KEY)
    await service.key(KEY)
    assert store.calls == ["admit"]
    await service.key(somebodys(1))
    assert store.calls == ["admit", "admit", "charge", "charge", "charge"]
    await service.strangers(4)
    assert [sent.status for sent in [await service.key(somebodys(9)) for _ in range(3)]] == [429] * 3
    calls = len(store.calls)
    for _ in range(50):
        await service.bearer(FORGED)
    assert len(store.calls) == calls, "who is refused asks it nothing"
    service.clock.advance(3_600)
    assert (await service.bearer(TOKEN)).status == 200
    await service.app.aclose()
    assert store.closed


# Two processes, as far as a server can tell.


@pytest.fixture(scope="module")
def url() -> Any:
    with Server() as server:
        yield server.url


@pytest.fixture
async def stores(url: str) -> AsyncIterator[list[RedisLimits]]:
    stores = [RedisLimits(RedisLink(url, deadline=60, connect_timeout=60)) for _ in range(2)]
    yield stores
    for store in stores:
        await store.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_failures_count_over_all_processes(stores: list[RedisLimits]) -> None:
    windows = {"addresses": "5/day", "credentials": "3/day", "everywhere": "6/day"}
    one, other = (Service(store=store, name="over-all", **windows) for store in stores)
    for number in range(5):
        assert (await (one, other)[number % 2].key(somebodys(number))).status == 401
    for service in (one, other):
        assert (await service.key(KEY)).status == 429
        assert (await service.key(KEY, THERE)).status == 200
    # Somebody knows the id, and has many addresses.
    guesses = [(await (one, other)[n % 2].key(guess(n), f"10.0.0.{n % 9}")).status for n in range(36)]
    assert guesses.count(401) <= 3 * 9 and guesses[-1] == 429
    assert (await other.key(KEY, "192.0.2.200")).status == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_kept_has_an_end_and_names_nobody(stores: list[RedisLimits], url: str) -> None:
    import redis

    service = Service(store=stores[0], name="kept")
    await service.key(guess(1))
    with redis.Redis.from_url(url) as client:
        keys: Any = client.keys("*")
        assert keys and all(client.pttl(key) != -1 for key in keys), "-1 is without an end"
        assert not any(RECORD.id.encode() in key or HERE.encode() in key for key in keys)

"""ApiKeyAuth: unknown, wrong, expired and mistyped keys are one answer; a valid one is the caller."""

import dataclasses
import logging

import anyio
import pytest
import structlog
from pydantic import SecretStr, ValidationError

from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import (
    ApiKeys,
    FileApiKeyStore,
    MemoryApiKeyStore,
    RemoteApiKeyStore,
    new_key,
)
from sigil_policy.identity.api_keys.format import checksum
from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore
from sigil_policy.identity.challenges import Challenges
from sigil_policy.policies import api_key as module
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.testing import FrozenClock, drive, frozen
from tests.identity.material import NOW, make_issuer, token

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
LINES = ['Bearer realm="api"', 'ApiKey realm="api"']
BAD_REQUEST = ['Bearer realm="api", error="invalid_request"', 'ApiKey realm="api"']


def make(**options):
    plain, record = new_key(
        pepper=PEPPER, **{"subject": "nightly-job", "scopes": ["agents:read"], "tier": "pro", **options}
    )
    return plain.get_secret_value(), record


KEY, RECORD = make()
EXPIRED, EXPIRED_RECORD = make(expires=NOW)
UNKNOWN, _ = make()
TYPO = KEY[:-8] + ("a" if KEY[-8] != "a" else "b") + KEY[-7:]


def wrong_key() -> str:
    """The right id, another secret, and a right checksum."""
    body = KEY[:-7].rpartition("_")[0] + "_" + "A" * 32
    return f"{body}_{checksum(body.encode())}"


def make_auth(**options) -> ApiKeyAuth:
    return ApiKeyAuth(**{"store": MemoryApiKeyStore([RECORD, EXPIRED_RECORD]), "pepper": PEPPER, **options})


async def whoami(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": [(b"x-user", scope["user"].display_name.encode())]})
        return
    principal = get_exchange(scope).principal
    name = principal.subject if principal else "nobody"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": name.encode()})


def make_app(*policies, app=whoami, clock=None):
    return PolicyStack(app, policies=policies or [make_auth()], clock=clock or FrozenClock(NOW))


def refused(sent, status, code, challenges):
    assert sent.status == status
    assert sent.json()["error_code"] == code
    assert sent.header_lines("www-authenticate") == challenges
    assert sent.header("cache-control") == "no-store", "AU-17"


async def test_a_valid_key_is_the_caller():
    seen = []

    class Watch(Policy):
        def on_request(self, ex):
            seen.append(ex.principal)

    app = make_app(make_auth(realm="jobs"), Watch())
    assert (await drive(app, headers={"X-API-Key": KEY})).body == b"nightly-job"
    (who,) = seen
    assert (who.subject, who.scopes, who.tier, who.kind, who.realm) == (
        "nightly-job", {"agents:read"}, "pro", "api_key", "jobs",
    )  # fmt: skip
    assert dict(who.claims) == {}


@pytest.mark.parametrize(
    "presented",
    [
        pytest.param(UNKNOWN, id="unknown"),
        pytest.param(wrong_key(), id="wrong"),
        pytest.param(EXPIRED, id="expired"),
        pytest.param(TYPO, id="mistyped"),
        pytest.param("", id="empty"),
        pytest.param("sk_live_abc123", id="malformed"),
        pytest.param("x" * 100_000, id="huge"),
        pytest.param(b"\xff\x00\xfe", id="bytes"),
    ],
)
async def test_every_key_that_does_not_fit_gets_the_same_answer(presented):
    """AU-14, AU-15."""
    sent = await drive(make_app(), headers=[("x-api-key", presented)])
    refused(sent, 401, "AUTH_005", LINES)
    assert sent.json() == (await drive(make_app(), headers={"x-api-key": UNKNOWN})).json()


async def test_unknown_and_wrong_keys_cost_the_same_work(monkeypatch):
    """AU-15: one digest and one constant-time comparison of equal lengths, whether there is a record or not."""
    compared, digested = [], []
    compare, digest = module.compare_digest, module.key_digest
    monkeypatch.setattr(module, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    monkeypatch.setattr(module, "key_digest", lambda p, k: digested.append(len(k)) or digest(p, k))
    for presented in (UNKNOWN, wrong_key(), EXPIRED, KEY):
        await drive(make_app(), headers={"x-api-key": presented})
    assert compared == [(32, 32)] * 4 and digested == [len(KEY)] * 4


async def test_a_typing_error_is_not_looked_up():
    class Never:
        def find(self, key_id):
            pytest.fail("looked up")

    refused(await drive(make_app(make_auth(store=Never())), headers={"x-api-key": TYPO}), 401, "AUTH_005", LINES)


async def test_another_pepper_opens_nothing():
    app = make_app(make_auth(pepper=SecretStr("another-pepper-that-is-long-enough-too")))
    assert (await drive(app, headers={"x-api-key": KEY})).status == 401


async def test_a_key_ends_in_its_exact_second():
    clock = FrozenClock(NOW - 0.1)
    app = make_app(clock=clock)
    assert (await drive(app, headers={"x-api-key": EXPIRED})).status == 200
    clock.advance(0.1)
    assert (await drive(app, headers={"x-api-key": EXPIRED})).status == 401


async def test_old_and_new_key_overlap_on_rotation():
    clock = FrozenClock(NOW - 60)
    fresh, record = make()
    app = make_app(make_auth(store=MemoryApiKeyStore([EXPIRED_RECORD, record])), clock=clock)
    for presented in (EXPIRED, fresh):
        assert (await drive(app, headers={"x-api-key": presented})).body == b"nightly-job"
    clock.advance(60)
    assert [(await drive(app, headers={"x-api-key": k})).status for k in (EXPIRED, fresh)] == [401, 200]


async def test_a_store_may_take_its_time():
    class Slow:
        async def find(self, key_id):
            await anyio.lowlevel.checkpoint()
            return RECORD if key_id == RECORD.id else None

    app = make_app(make_auth(store=Slow()))
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job"
    refused(await drive(app, headers={"x-api-key": UNKNOWN}), 401, "AUTH_005", LINES)


class Failing:
    """Raises what it is told to, at once or after a moment."""

    def __init__(self, error, later):
        self.error, self.later = error, later

    def find(self, key_id):
        if self.later:
            return self.fail()
        raise self.error

    async def fail(self):
        await anyio.lowlevel.checkpoint()
        raise self.error


def unavailable(sent, wait=1):
    assert sent.status == 503
    assert sent.json()["error_code"] == "SRV_503"
    assert sent.header("retry-after") == str(wait)
    assert sent.json()["retry_after"] == wait
    assert sent.header("cache-control") == "no-store"
    assert sent.header_lines("www-authenticate") == [], "nothing is wrong with the key"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("error", "wait"),
    [
        (ConnectionError("redis://:canary@host"), 1),
        (StoreUnavailableError("away", retry_after=6.2), 7),
        (KeyError("canary"), 1),
        (TimeoutError(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_store_that_fails_lets_nobody_in_and_is_no_error_of_the_server(error, wait, later):
    app = make_app(make_auth(store=Failing(error, later)))
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            unavailable(await drive(app, headers={"x-api-key": KEY}), wait)
        refused(await drive(app, headers={"x-api-key": TYPO}), 401, "AUTH_005", LINES)
        assert (await drive(app)).body == b"nobody"
    (line,) = lines
    assert line["event"] == "api_key_store_failed" and line["error"] == type(error).__name__
    assert line["where"].startswith("test_api_key.py:")
    assert "canary" not in str(lines)


async def test_a_store_that_is_slow_is_not_waited_for():
    class Slow:
        async def find(self, key_id):
            await anyio.sleep_forever()

    app = make_app(make_auth(store=Slow(), deadline=0.01))
    with structlog.testing.capture_logs():
        with anyio.fail_after(60):
            unavailable(await drive(app, headers={"x-api-key": KEY}))
        unavailable(await drive(app, kind="websocket", headers={"x-api-key": KEY}))


async def test_a_use_that_cannot_be_noted_refuses_nobody():
    class Forgetful(MemoryApiKeyStore):
        def note_use(self, key_id):
            raise OSError("full")

    app = make_app(make_auth(store=Forgetful([RECORD])))
    with structlog.testing.capture_logs() as lines:
        assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job"
    assert [line["error"] for line in lines] == ["OSError"]


async def test_only_keys_that_were_accepted_count_as_used():
    clock = FrozenClock(NOW)
    store = MemoryApiKeyStore([RECORD, EXPIRED_RECORD], clock=clock)
    app = make_app(make_auth(store=store), clock=clock)
    for presented in (EXPIRED, wrong_key(), UNKNOWN):
        await drive(app, headers={"x-api-key": presented})
    assert [record.last_used for record in await store.records()] == [None, None]
    await drive(app, headers={"x-api-key": KEY})
    assert [record.last_used for record in await store.records()] == [NOW, None]


class Counting(RemoteApiKeyStore):
    """A server that counts its visitors."""

    def __init__(self, *records, **options):
        super().__init__(**options)
        self.here = {record.id: record for record in records}
        self.trips, self.fault = [], None

    async def get(self, key_id):
        self.trips.append(key_id)
        await anyio.lowlevel.checkpoint()
        if self.fault:
            raise self.fault
        return self.here.get(key_id)

    async def records(self):
        return tuple(self.here.values())

    async def _save(self, record, ends):
        self.here[record.id] = record

    async def _end(self, key_id, at):
        record = self.here.get(key_id)
        if record is not None:
            record = self.here[key_id] = record.ending(at)
        return record

    def _write_uses(self, used):
        pass


def made_up() -> str:
    """A key that anybody can make up: everything fits but what only the pepper can say."""
    return new_key(pepper=SecretStr("somebody else's pepper, which is long"), subject="x").plain.get_secret_value()


async def test_a_flood_of_made_up_ids_costs_the_store_little_and_no_caller_anything():
    clock = FrozenClock(NOW)
    late, late_record = make()
    store = Counting(RECORD, late_record, clock=clock, strays=20)
    app = make_app(make_auth(store=store), clock=clock)
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job"
    with structlog.testing.capture_logs():
        answers = [(await drive(app, headers={"x-api-key": made_up()})).status for _ in range(1_000)]
    assert answers == [401] * 100 + [503] * 900
    assert len(store.trips) == 101
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job", "known already"
    assert (await drive(app, headers={"x-api-key": late})).body == b"nightly-job", "never seen by this process"
    clock.advance(1)
    with structlog.testing.capture_logs():
        answers = [(await drive(app, headers={"x-api-key": made_up()})).status for _ in range(100)]
    assert answers == [401] * 20 + [503] * 80


async def test_a_key_from_before_ids_had_a_check_still_works():
    old = "sk_live_" + "oldformat123" + "_" + "s" * 32
    old = f"{old}_{checksum(old.encode())}"
    record = dataclasses.replace(
        RECORD, id="oldformat123", digest=module.key_digest(PEPPER.get_secret_value().encode(), old.encode()).hex()
    )
    for store in (MemoryApiKeyStore([record]), Counting(record)):
        assert (await drive(make_app(make_auth(store=store)), headers={"x-api-key": old})).body == b"nightly-job"


async def test_a_key_is_revoked_everywhere_within_the_stores_bound():
    clock = FrozenClock(NOW)
    store = Counting(RECORD, clock=clock, fresh_for=5)
    app = make_app(make_auth(store=store), clock=clock)
    assert (await drive(app, headers={"x-api-key": KEY})).status == 200
    store.here[RECORD.id] = RECORD.ending(NOW)  # by another process
    clock.advance(4.9)
    assert (await drive(app, headers={"x-api-key": KEY})).status == 200
    clock.advance(0.1)
    refused(await drive(app, headers={"x-api-key": KEY}), 401, "AUTH_005", LINES)


async def test_a_key_that_is_revoked_through_the_same_store_is_refused_at_once():
    clock = FrozenClock(NOW)
    store = Counting(RECORD, clock=clock)
    app = make_app(make_auth(store=store), clock=clock)
    assert (await drive(app, headers={"x-api-key": KEY})).status == 200
    await ApiKeys(store, clock=clock).revoke(RECORD.id)
    assert (await drive(app, headers={"x-api-key": KEY})).status == 401


async def test_nobody_is_let_in_on_what_was_remembered_once_the_store_is_away_for_longer():
    clock = FrozenClock(NOW)
    store = Counting(RECORD, clock=clock, fresh_for=5)
    app = make_app(make_auth(store=store), clock=clock)
    assert (await drive(app, headers={"x-api-key": KEY})).status == 200
    store.fault = StoreUnavailableError("away")
    with structlog.testing.capture_logs():
        clock.advance(4.9)
        assert (await drive(app, headers={"x-api-key": KEY})).status == 200
        clock.advance(0.1)
        for _ in range(3):
            unavailable(await drive(app, headers={"x-api-key": KEY}))
    store.fault = None
    assert (await drive(app, headers={"x-api-key": KEY})).status == 200


async def test_a_store_by_its_url_is_shared_and_closed_with_the_application(tmp_path):
    url = f"sqlite:///{tmp_path}/keys.db"
    first, second = make_auth(store=url, deadline=60), make_auth(store=url, realm="other")
    assert first.store is second.store and isinstance(first.store, SqliteApiKeyStore)
    first.store.deadline = 60.0  # of real time
    with frozen(FrozenClock(NOW)):
        keys = ApiKeys(first.store, pepper=PEPPER)
        plain, _ = await keys.new("job")
        app = make_app(first, clock=SYSTEM_CLOCK)
        assert (await drive(app, headers={"x-api-key": plain.get_secret_value()})).body == b"job"
        await app.aclose()
        assert (await keys.list())[0].last_used == NOW


@pytest.mark.parametrize("url", ["keys.db", "sqlite:keys.db", "sqlite://canary/keys.db", "file:", "http://canary@x"])
def test_a_url_that_names_no_store_says_which_do(url):
    with pytest.raises(ValidationError, match=r"sqlite:///|file:keys") as caught:
        make_auth(store=url)
    assert "canary" not in str(caught.value)


async def test_a_file_that_grows_is_noticed_within_a_second(tmp_path):
    clock = FrozenClock(NOW)
    store = FileApiKeyStore(tmp_path / "keys.jsonl", clock=clock)
    app = make_app(make_auth(store=store), clock=clock)
    assert (await drive(app, headers={"x-api-key": KEY})).status == 401
    FileApiKeyStore(tmp_path / "keys.jsonl").append(RECORD)
    clock.advance(1)
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job"


async def test_without_a_key_the_caller_is_nobody():
    assert (await drive(make_app())).body == b"nobody"
    refused(await drive(make_app(make_auth(required=True))), 401, "AUTH_001", LINES)
    refused(await drive(make_app(make_auth(required=True, scheme=None))), 401, "AUTH_001", LINES[:1])


async def test_two_keys_are_one_too_many():
    """AU-05."""
    headers = [("x-api-key", KEY), ("X-API-Key", KEY)]
    refused(await drive(make_app(), headers=headers), 400, "AUTH_003", BAD_REQUEST)


async def test_a_key_beside_authorization_is_a_conflict():
    """AU-16."""
    headers = {"x-api-key": KEY, "authorization": "Basic YTpi"}
    refused(await drive(make_app(), headers=headers), 400, "AUTH_006", BAD_REQUEST)
    assert (await drive(make_app(make_auth(conflicts_with=None)), headers=headers)).body == b"nightly-job"


@pytest.mark.parametrize("query", [b"api_key=x", b"X-API-Key=x", b"a=1&ApiKey=x", b"api%5Fkey=x"])
async def test_a_key_in_the_query_is_refused_and_never_used(query):
    refused(await drive(make_app(), query=query), 400, "AUTH_007", BAD_REQUEST)
    tolerant = make_app(make_auth(tolerate_leaked_query_keys=True))
    assert (await drive(tolerant, query=b"api_key=" + KEY.encode())).body == b"nobody"
    assert (await drive(make_app(), query=b"my_api_key=1&q=api_key")).status == 200


async def test_a_key_as_bearer_token_takes_the_option():
    headers = {"authorization": f"Bearer {KEY}"}
    assert (await drive(make_app(), headers=headers)).body == b"nobody"
    app = make_app(make_auth(bearer=True))
    assert (await drive(app, headers=headers)).body == b"nightly-job"
    assert (await drive(app, headers={"authorization": "Bearer ey.x.y"})).body == b"nobody"
    assert (await drive(app, headers={"authorization": "Bearer"})).body == b"nobody"
    wrong = await drive(app, headers={"authorization": f"Bearer {UNKNOWN}"})
    refused(wrong, 401, "AUTH_005", ['Bearer realm="api", error="invalid_token"', LINES[1]])
    twice = await drive(app, headers=[("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")])
    refused(twice, 400, "AUTH_003", BAD_REQUEST)


@pytest.mark.parametrize("bearer_outside", [True, False])
async def test_with_bearer_both_ways_are_offered_bearer_first(bearer_outside):
    """AU-13: RFC 9110 section 11.3."""
    seen = []

    class Watch(Policy):
        def on_request(self, ex):
            seen.append(ex.get(Challenges))

    tokens = BearerAuth(issuers=[make_issuer()])
    both = (tokens, make_auth()) if bearer_outside else (make_auth(), tokens)
    app = make_app(*both, Watch())
    await drive(app)
    assert [line.decode() for _, line in seen[0].lines] == LINES
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job"
    assert (await drive(app, headers={"authorization": b"Bearer " + token()})).body == b"user_123"
    assert (await drive(app, headers={"x-api-key": UNKNOWN})).status == 401


async def test_preflights_are_never_asked():
    """AU-18."""
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert (await drive(make_app(make_auth(required=True)), "OPTIONS", headers=headers)).body == b"nobody"
    assert (await drive(make_app(make_auth(required=True)), "OPTIONS")).status == 401


async def test_another_header_may_carry_the_key():
    app = make_app(make_auth(header="Api-Key"))
    assert (await drive(app, headers={"api-key": KEY})).body == b"nightly-job"
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nobody"


async def test_a_websocket_obeys_the_same_rules():
    app = make_app(make_auth(required=True))
    assert (await drive(app, kind="websocket", headers={"x-api-key": KEY})).header("x-user") == "nightly-job"
    refused(await drive(app, kind="websocket", headers={"x-api-key": UNKNOWN}), 401, "AUTH_005", LINES)


async def test_head_is_refused_without_a_body():
    sent = await drive(make_app(), "HEAD", headers={"x-api-key": UNKNOWN})
    assert sent.status == 401 and sent.body == b""


async def test_streams_and_errors_of_the_application_pass_untouched():
    async def stream(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise RuntimeError("broken")

    sent = await drive(make_app(app=stream), headers={"x-api-key": KEY}, raise_errors=False)
    assert sent.body == b"a" and isinstance(sent.error, RuntimeError)


async def test_an_early_answer_of_an_outer_policy_comes_first():
    class Closed(Policy):
        def on_request(self, ex):
            return Reply(status=503)

    assert (await drive(make_app(Closed(), make_auth()), headers={"x-api-key": UNKNOWN})).status == 503


async def test_two_in_one_stack_act_once():
    app = make_app(make_auth(), make_auth(required=True))
    assert (await drive(app, headers={"x-api-key": KEY})).body == b"nightly-job"
    refused(await drive(app), 401, "AUTH_001", LINES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pepper": SecretStr("canary-brief")}, "at least 32"),
        ({"store": {}}, "ApiKeyStore"),
        ({"header": "X API"}, "5.6.2"),
        ({"scheme": "Api Key"}, "5.6.2"),
        ({"realm": ""}, "6750"),
        ({"query": True}, "query"),
        ({"deadline": 0}, "deadline"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_configuration_fails_at_construction(options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        make_auth(**options)
    assert "canary" not in str(caught.value)


async def test_no_key_is_in_a_problem_a_log_or_a_repr(caplog):
    """JW-32."""
    caplog.set_level(logging.DEBUG)
    auth = make_auth()
    app = make_app(auth)
    texts = [repr(auth), repr(app), caplog.text]
    for presented in (KEY, UNKNOWN, TYPO):
        for extra in ({}, {"authorization": f"Bearer {presented}"}):
            sent = await drive(
                app, headers={"x-api-key": presented, **extra}, query=f"api_key={presented}" if extra else ""
            )
            texts.append(str(sent.messages))
    for text in texts:
        for secret in (KEY, UNKNOWN, TYPO, RECORD.digest, PEPPER.get_secret_value(), KEY[21:53]):
            assert secret not in text

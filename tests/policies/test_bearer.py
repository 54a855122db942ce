"""BearerAuth: RFC 6750 over the wire, on every kind of exchange."""

import json
import logging

import anyio
import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sigil_policy.core.exchange import Exchange, get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.host import PLAIN
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import DEFAULT_STYLE, Problem, Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.challenges import Challenges
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import KeysUnavailableError
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import (
    AUDIENCE,
    NOW,
    SECRET,
    b64,
    good_claims,
    make_issuer,
    make_key,
    raw_token,
    sign,
    token,
)
from tests.identity.provider import Pair, Provider

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN_KEY, RECORD = new_key(pepper=PEPPER, subject="nightly-job")
KEY = PLAIN_KEY.get_secret_value()
BEARER = 'Bearer realm="api"'
INVALID = 'Bearer realm="api", error="invalid_token"'
BAD_REQUEST = 'Bearer realm="api", error="invalid_request"'
PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


def make_bearer(**options) -> BearerAuth:
    return BearerAuth(**{"issuers": [make_issuer(leeway=0)], **options})


async def whoami(scope, receive, send):
    """Says who calls; a WebSocket is accepted."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": [(b"x-user", scope["user"].display_name.encode())]})
        return
    principal = get_exchange(scope).principal
    body = json.dumps({"subject": principal and principal.subject, "named": scope["user"].is_authenticated}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def make_app(*policies, app=whoami, clock=None):
    return PolicyStack(app, policies=policies or [make_bearer()], clock=clock or FrozenClock(NOW))


def bearer(presented: bytes) -> dict[str, bytes]:
    return {"authorization": b"Bearer " + presented}


def refused(sent, status, code, *challenges):
    assert sent.status == status
    assert sent.json()["error_code"] == code
    assert sent.header_lines("www-authenticate") == list(challenges)
    assert sent.header("cache-control") == "no-store", "AU-17"
    assert sent.header("content-type") == "application/problem+json"


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER ", b"Bearer    "])
async def test_a_valid_token_is_the_caller(scheme):
    """AU-01."""
    app = make_app()
    for _ in range(2):
        sent = await drive(app, headers={"authorization": scheme + token()})
        assert sent.json() == {"subject": "user_123", "named": True}
        assert sent.header_lines("www-authenticate") == []


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Basic dXNlcjpwdw=="}, {"authorization": 'Digest username="a"'}],
    ids=["none", "AU-12 Basic", "AU-12 Digest"],
)  # fmt: skip
async def test_without_a_bearer_credential_the_caller_is_nobody(headers):
    sent = await drive(make_app(), headers=headers)
    assert sent.json() == {"subject": None, "named": False}
    refused(await drive(make_app(make_bearer(required=True)), headers=headers), 401, "AUTH_001", BEARER)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([("authorization", "Bearer")], id="no token"),
        pytest.param([("authorization", "Bearer a b")], id="a space"),
        pytest.param([("authorization", "Bearer a, Bearer b")], id="a comma"),
        pytest.param([("authorization", b"Bearer " + token() + b"\x00")], id="NUL"),
        pytest.param([("authorization", b"Bearer \xc3\xa9")], id="beyond ASCII"),
        pytest.param([("authorization", "")], id="empty"),
        pytest.param([("authorization", b"Bearer " + token()), ("authorization", b"Bearer " + token())], id="twice"),
        pytest.param([("authorization", b"Bearer " + token()), ("Authorization", b"Basic YTpi")], id="two schemes"),
    ],
)
async def test_a_malformed_header_is_a_bad_request(headers):
    """AU-05."""
    refused(await drive(make_app(), headers=headers), 400, "AUTH_003", BAD_REQUEST)


@pytest.mark.parametrize(
    "presented",
    [
        pytest.param(token(good_claims(exp=int(NOW) - 1)), id="expired"),
        pytest.param(token(good_claims(aud="other")), id="audience"),
        pytest.param(token(good_claims(iss="https://evil.example")), id="issuer"),
        pytest.param(token(good_claims(exp=str(int(NOW) + 60))), id="exp a string"),
        pytest.param(token(header={"alg": "none"}), id="none"),
        pytest.param(token()[:-2] + b"AA", id="signature"),
        pytest.param(token() + b"=", id="padding"),
        pytest.param(raw_token("[" * 3000, "[" * 2900), id="nesting bomb"),
        pytest.param(b"opaque-token", id="no JWT"),
        pytest.param(b"A" * 80_000, id="80 kB"),
        pytest.param(b"." * 8192, id="dots"),
        pytest.param(KEY.encode(), id="an API key"),
    ],
)
async def test_whatever_is_wrong_with_a_token_the_answer_is_the_same(presented):
    """AU-04, AU-20, JW-31: no cause, no part of the token, and never a 500."""
    sent = await drive(make_app(), headers=bearer(presented))
    refused(sent, 401, "AUTH_002", INVALID)
    body = sent.json()
    assert body["detail"] == "The access token is not valid"
    assert presented.decode()[:20] not in sent.body.decode()
    reference = (await drive(make_app(), headers=bearer(b"x"))).json()
    assert body == reference


async def test_both_credentials_are_one_too_many_in_any_order():
    """AU-16."""
    keys = ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER)
    headers = {**bearer(token()), "x-api-key": KEY}
    for policies in ((make_bearer(), keys), (keys, make_bearer()), (make_bearer(),), (keys,)):
        sent = await drive(make_app(*policies), headers=headers)
        assert (sent.status, sent.json()["error_code"]) == (400, "AUTH_006")
        assert sent.header_lines("www-authenticate")[0] == BAD_REQUEST
    alone = await drive(make_app(make_bearer(conflicts_with=None)), headers=headers)
    assert alone.json()["subject"] == "user_123"
    other = await drive(make_app(make_bearer(conflicts_with="X-Signature")), headers={**headers, "x-signature": "a"})
    assert other.status == 400


@pytest.mark.parametrize("query", [b"access_token=x", b"a=1&access%5Ftoken=x", b"%61ccess_token="])
async def test_a_token_in_the_query_is_refused_and_never_used(query):
    """AU-11."""
    refused(await drive(make_app(), query=query), 400, "AUTH_007", BAD_REQUEST)
    refused(await drive(make_app(), query=query, headers=bearer(token())), 400, "AUTH_007", BAD_REQUEST)
    tolerant = make_app(make_bearer(tolerate_leaked_query_tokens=True))
    sent = await drive(tolerant, query=b"access_token=" + token())
    assert sent.json() == {"subject": None, "named": False}
    assert (await drive(make_app(), query=b"q=access_token&my_access_token=1")).status == 200


@pytest.mark.parametrize("required", [True, False])
async def test_preflights_are_never_asked(required):
    """AU-18: Fetch, CORS preflight; nothing that only resembles one gets through."""
    app = make_app(make_bearer(required=required))
    assert (await drive(app, "OPTIONS", headers=PREFLIGHT)).status == 200
    if required:
        assert (await drive(app, "OPTIONS")).status == 401
        assert (await drive(app, "OPTIONS", headers={"origin": "https://app.example"})).status == 401
        assert (await drive(app, "POST", headers=PREFLIGHT)).status == 401


async def test_a_remembered_token_ends_on_time():
    """JW-30."""
    clock = FrozenClock(NOW)
    app = make_app(clock=clock)
    presented = token(good_claims(exp=int(NOW) + 10))
    assert (await drive(app, headers=bearer(presented))).status == 200
    clock.advance(9.9)
    assert (await drive(app, headers=bearer(presented))).status == 200
    clock.advance(0.1)
    refused(await drive(app, headers=bearer(presented)), 401, "AUTH_002", INVALID)


async def test_a_refusal_is_not_remembered():
    """JW-30: a token that was early is good in its time."""
    clock = FrozenClock(NOW)
    app = make_app(clock=clock)
    presented = token(good_claims(nbf=int(NOW) + 10))
    assert (await drive(app, headers=bearer(presented))).status == 401
    clock.advance(10)
    assert (await drive(app, headers=bearer(presented))).status == 200
    clock.jump(-5)
    assert (await drive(app, headers=bearer(presented))).status == 401, "and the memory does not outdo the clock"


async def test_a_remembered_token_is_remembered_exactly():
    """JW-30: a second spelling of a good token is not the good token."""
    app = make_app()
    assert (await drive(app, headers=bearer(token()))).status == 200
    for other in (token() + b"=", token() + b"A", token()[:-1]):
        assert (await drive(app, headers=bearer(other))).status == 401


async def test_the_longest_token_passes_however_many_spaces_precede_it():
    presented = token(good_claims(filler="x" * 4000))
    long = token(good_claims(filler="x" * (4000 + (8192 - len(presented)) * 3 // 4)))
    assert 8150 < len(long) <= 8192
    for spaces in (b" ", b" " * 100):
        for _ in range(2):
            sent = await drive(make_app(), headers={"authorization": b"Bearer" + spaces + long})
            assert sent.status == 200


async def test_a_foreign_prefix_is_left_to_the_policy_it_belongs_to():
    keys = ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER, bearer=True)
    tokens = make_bearer(foreign_prefix="sk_")
    for policies in ((tokens, keys), (keys, tokens)):
        app = make_app(*policies)
        assert (await drive(app, headers=bearer(KEY.encode()))).json()["subject"] == "nightly-job"
        assert (await drive(app, headers=bearer(token()))).json()["subject"] == "user_123"
    refused(await drive(make_app(make_bearer(foreign_prefix="sk_", required=True)), headers=bearer(KEY.encode())),
            401, "AUTH_001", BEARER)  # fmt: skip


async def test_a_caller_whom_an_outer_policy_knows_stays():
    class Known(Policy):
        def on_request(self, ex):
            ex.authenticate(Principal(subject="outer"))

    for headers in ({}, bearer(token()), bearer(b"nonsense")):
        sent = await drive(make_app(Known(), make_bearer(required=True)), headers=headers)
        assert sent.json()["subject"] == "outer"


async def test_challenges_are_offered_to_nobody_only():
    """AU-13: what Scopes answers with."""
    seen = []

    class Watch(Policy):
        def on_request(self, ex):
            seen.append(ex.get(Challenges))

    app = make_app(make_bearer(), Watch())
    await drive(app)
    await drive(app, headers=bearer(token()))
    assert seen == [Challenges(((b"www-authenticate", BEARER.encode()),)), None]


async def test_a_websocket_obeys_the_same_rules():
    app = make_app(make_bearer(required=True))
    sent = await drive(app, kind="websocket", headers=bearer(token()))
    assert sent.messages[0]["type"] == "websocket.accept" and sent.header("x-user") == "user_123"
    refused(await drive(app, kind="websocket", headers=bearer(b"x")), 401, "AUTH_002", INVALID)
    closed = await drive(app, kind="websocket", scope={"extensions": {}})
    assert closed.messages == [
        {"type": "websocket.close", "code": 1008, "reason": closed.messages[0].get("reason", "")}
    ]


async def test_head_is_refused_without_a_body():
    sent = await drive(make_app(make_bearer(required=True)), "HEAD")
    assert sent.status == 401 and sent.body == b"" and sent.header("www-authenticate") == BEARER


async def test_a_stream_passes_untouched():
    async def stream(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b", b""):
            await send({"type": "http.response.body", "body": part, "more_body": bool(part)})

    sent = await drive(make_app(app=stream), headers=bearer(token()))
    assert [message.get("body") for message in sent.messages[1:]] == [b"a", b"b", b""]


async def test_an_error_of_the_application_passes_untouched():
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await drive(make_app(app=broken), headers=bearer(token()))


async def test_an_early_answer_of_an_outer_policy_comes_first():
    class Closed(Policy):
        def on_request(self, ex):
            return Reply(status=503)

    assert (await drive(make_app(Closed(), make_bearer()), headers=bearer(b"x"))).status == 503


async def test_two_in_one_stack_act_once():
    app = make_app(make_bearer(), make_bearer(realm="inner", required=True))
    assert (await drive(app, headers=bearer(token()))).json()["subject"] == "user_123"
    refused(await drive(app), 401, "AUTH_001", BEARER, 'Bearer realm="inner"')


async def test_starlette_sees_the_caller():
    @requires("agents:read")
    async def read(request):
        return PlainTextResponse(request.user.display_name)

    @requires("agents:delete")
    async def delete(request):
        return PlainTextResponse("never")

    app = Starlette(
        routes=[Route("/read", read), Route("/delete", delete)],
        middleware=[Middleware(PolicyStack, policies=[make_bearer()], clock=FrozenClock(NOW))],
    )
    assert (await drive(app, path="/read", headers=bearer(token()))).body == b"user_123"
    assert (await drive(app, path="/delete", headers=bearer(token()))).status == 403
    assert (await drive(app, path="/read")).status == 403


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "PS256", "ES256", "EdDSA"])
async def test_tokens_that_pyjwt_makes_pass(algorithm):
    from tests.identity.material import private_key

    key = SECRET if algorithm == "HS256" else private_key(algorithm)
    presented = jwt.encode(good_claims(), key, algorithm, headers={"typ": "at+jwt"}).encode()
    app = make_app(make_bearer(issuers=[make_issuer(make_key(algorithm))]))
    assert (await drive(app, headers=bearer(presented))).json()["subject"] == "user_123"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"issuers": []}, "issuers"),
        ({"issuers": [make_issuer(), make_issuer()]}, "same url"),
        ({"realm": 'a"b'}, "6750"),
        ({"realm": "a\r\nb"}, "6750"),
        ({"cache_size": -1}, "cache_size"),
        ({"conflicts_with": "not a header"}, "5.6.2"),
        ({"keys": []}, "keys"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_configuration_fails_at_construction(options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        make_bearer(**options)
    assert SECRET not in str(caught.value)


async def test_no_canary_is_in_a_problem_a_log_or_a_repr(caplog):
    """JW-32."""
    caplog.set_level(logging.DEBUG)
    policy = make_bearer(required=True)
    app = make_app(policy)
    canary = "canary-claim-91b2"
    good = token(good_claims(note=canary))
    texts = [repr(policy), repr(app)]
    forged = [good, good[:-3] + b"AAA", raw_token('{"alg":"HS256","kid":"' + canary + '"}', '{"sub":"' + canary)]
    for presented in forged:
        for headers in (bearer(presented), {**bearer(presented), "x-api-key": KEY}, {"authorization": presented}):
            sent = await drive(
                app, headers=headers, query=b"access_token=" + canary.encode() if len(headers) > 1 else b""
            )
            texts.append(str(sent.messages))
    ex = exchange(good)
    assert policy.on_request(ex) is None
    texts += [repr(policy), repr(ex.principal), caplog.text]
    for text in texts:
        assert SECRET not in text and canary not in text and KEY not in text and good.decode() not in text


def exchange(presented: bytes) -> Exchange:
    headers = [(b"authorization", b"Bearer " + presented)]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    return Exchange(scope, None, FrozenClock(NOW), PLAIN, DEFAULT_STYLE)


FUZZED = make_bearer(issuers=[make_issuer(make_key("HS256"), make_key("ES256"))])


@given(st.binary(max_size=120) | st.text(alphabet="ab.=_-e30", max_size=60).map(str.encode))
def test_any_header_gets_an_answer(presented):
    ex = exchange(presented)
    answer = FUZZED.on_request(ex)
    assert ex.principal is None
    assert answer is None or (isinstance(answer, Problem) and answer.status in (400, 401))


@given(
    claims=st.dictionaries(st.sampled_from(["exp", "sub", "aud", "scope", "iat"]), st.floats() | st.text(max_size=3))
)
def test_any_signed_claims_get_an_answer(claims):
    signed = b64('{"alg":"HS256"}') + b"." + b64(json.dumps({**good_claims(), **claims}))
    ex = exchange(signed + b"." + b64(sign("HS256", signed)))
    answer = FUZZED.on_request(ex)
    assert (answer is None) == (ex.principal is not None)
    assert answer is None or answer.status == 401


# --- keys that are fetched -------------------------------------------------------------------------------------------

A, B, C = Pair("a"), Pair("b"), Pair("c")
LASTING = {"exp": int(NOW) + 1_000_000}


class Service:
    """An application behind `BearerAuth`, its clock, and the provider of its keys."""

    def __init__(self, *pairs, issuers=None, app=whoami, **options) -> None:
        self.provider = Provider(*(pairs or (A,)))
        self.clock = FrozenClock(NOW)
        self.policy = BearerAuth(issuers=issuers or [self.provider.issuer(**options)])
        self.app = make_app(self.policy, app=app, clock=self.clock)

    async def ask(self, presented: bytes, **options):
        return await drive(self.app, headers=bearer(presented), **options)

    async def status(self, presented: bytes) -> int:
        return (await self.ask(presented)).status

    def answer(self, presented: bytes):
        """What `on_request` returns for it, not waited for."""
        headers = [(b"authorization", b"Bearer " + presented)]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        return self.policy.on_request(Exchange(scope, None, self.clock, PLAIN, DEFAULT_STYLE))


def unavailable(sent, wait):
    assert sent.status == 503
    assert sent.json()["error_code"] == "AUTH_008"
    assert sent.header("retry-after") == str(wait)
    assert sent.json()["retry_after"] == wait
    assert sent.header_lines("www-authenticate") == []


async def test_the_first_token_makes_the_keys_be_fetched():
    service = Service()
    for _ in range(3):
        sent = await service.ask(A.token())
        assert sent.json() == {"subject": "user_123", "named": True}
    assert service.provider.fetches == 1


async def test_with_the_keys_there_nothing_is_waited_for():
    service = Service()
    await service.policy.fetch_keys(service.clock)
    assert service.answer(A.token()) is None
    assert service.answer(A.token()[:-4] + b"AAAA").status == 401
    assert service.answer(A.token(exp=int(NOW) - 1)).status == 401


async def test_tokens_that_would_be_refused_anyway_ask_nobody():
    """No fetch, and no 503, for what no key could make good."""
    service = Service()
    await service.policy.fetch_keys(service.clock)
    b = [
        B.token(exp=int(NOW) - 1),
        B.token(iss="https://evil.example"),
        B.token(aud="other"),
        B.token(nbf=int(NOW) + 60),
        B.token(header={"typ": "logout+jwt"}),
        B.token(header={"crit": ["exp"]}),
        B.token(header={"alg": "HS256"}),
        B.token(header={"alg": "none"}),
        B.token(header={"kid": "k" * 257}),
        B.token(header={"kid": 7}),
    ]
    for presented in b:
        assert service.answer(presented).status == 401
    assert service.provider.fetches == 1


async def test_a_rotation_costs_no_request():
    """JK-07: the new key at once, the old one no more, tokens that were remembered included."""
    service = Service()
    assert await service.status(A.token(**LASTING)) == 200
    service.provider.publish(A, B)
    assert await service.status(B.token()) == 200
    assert await service.status(A.token(**LASTING)) == 200
    service.provider.publish(C)
    assert await service.status(C.token()) == 200
    for retired in (A, B):
        refused(await service.ask(retired.token(**LASTING)), 401, "AUTH_002", INVALID)


async def test_a_rotation_costs_no_large_request():
    service = Service()
    await service.status(A.token())
    service.provider.publish(B)
    assert await service.status(B.token(groups=[{"id": number} for number in range(100)])) == 200


async def test_a_key_that_a_scheduled_refresh_retires_verifies_nothing_from_then_on():
    service = Service()
    await service.status(A.token(**LASTING))
    service.provider.publish(B)
    service.clock.advance(480)
    assert await service.status(A.token(**LASTING)) == 200, "nobody waits; the refresh follows the response"
    assert service.provider.fetches == 2
    assert await service.status(A.token(**LASTING)) == 401


async def test_no_request_waits_for_a_refresh_while_the_keys_are_good():
    service = Service()
    await service.status(A.token(**LASTING))
    service.clock.advance(480)
    service.provider.hold = anyio.Event()
    answered = anyio.Event()

    async def send(message) -> None:
        if message["type"] == "http.response.body":
            answered.set()

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    scope["headers"] = [(b"authorization", b"Bearer " + A.token(**LASTING))]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.app, scope, None, send)
        with anyio.fail_after(60):
            await answered.wait()
        await anyio.wait_all_tasks_blocked()
        assert service.provider.fetches == 2
        for _ in range(20):
            assert await service.status(A.token(**LASTING)) == 200
        assert service.provider.fetches == 2, "one refresh for all"
        service.provider.hold.set()


async def test_an_outage_beyond_the_bound_is_a_503_and_heals():
    """JK-08: longer than the cache, and than `max_stale`; also for tokens that were remembered."""
    service = Service(max_stale=3_600)
    await service.status(A.token(**LASTING))
    service.provider.down = True
    for _ in range(40):
        service.clock.advance(100)
        assert await service.status(A.token(**LASTING)) == 200
    service.clock.advance(200)
    unavailable(await service.ask(A.token(**LASTING)), 5)
    service.provider.down = False
    service.clock.advance(5)
    assert await service.status(A.token(**LASTING)) == 200


async def test_without_the_provider_at_the_start_tokens_get_a_503_and_others_are_served():
    service = Service()
    service.provider.down = True
    unavailable(await service.ask(A.token()), 5)
    assert (await drive(service.app)).status == 200
    assert await service.status(b"opaque") == 401
    assert service.provider.fetches == 1
    with pytest.raises(KeysUnavailableError):
        await service.policy.fetch_keys(service.clock)
    service.provider.down = False
    service.clock.advance(5)
    await service.policy.fetch_keys(service.clock)
    assert await service.status(A.token()) == 200


async def test_an_initial_set_serves_at_the_start():
    service = Service(initial={"keys": [A.jwk()]})
    service.provider.down = True
    assert await service.status(A.token(**LASTING)) == 200
    unavailable(await service.ask(B.token()), 5)
    service.provider.down = False
    service.clock.advance(5)
    assert await service.status(A.token(**LASTING)) == 200
    assert service.provider.fetches == 2
    assert await service.status(B.token()) == 401


async def test_ten_thousand_invented_ids_cost_a_burst_and_lock_nobody_out():
    """JK-06: 503 with Retry-After while no fetch is allowed; a rotation in the flood is accepted within a cool-down."""
    service = Service()
    await service.status(A.token(**LASTING))
    statuses = set()
    forged = B.token(**LASTING).split(b".")
    rotated = accepted = None
    for number in range(10_000):
        header = b64(json.dumps({"alg": "ES256", "kid": f"invented-{number}"}))
        answer = service.answer(b".".join([header, *forged[1:]]))
        if answer is not None and not isinstance(answer, Problem):
            answer = await answer
        statuses.add(answer.status)
        service.clock.advance(0.01)
        if number == 3_333:
            service.provider.publish(A, C)
            rotated = service.clock.time()
        if rotated is not None and accepted is None and number % 50 == 0:
            sent = await service.ask(C.token(**LASTING))
            assert sent.status in (200, 503)
            accepted = service.clock.time() if sent.status == 200 else None
    assert statuses == {401, 503}
    assert accepted - rotated <= 31
    assert service.provider.fetches <= 1 + 3 + 100 // 30 + 1
    assert await service.status(A.token(**LASTING)) == 200


async def test_an_unknown_key_is_told_to_wait_and_refused_when_it_is_known_not_to_exist():
    service = Service()
    await service.status(A.token(**LASTING))
    for number in range(3):
        invented = B.token(header={"kid": f"invented-{number}"}, **LASTING)
        for _ in range(2):
            refused(await service.ask(invented), 401, "AUTH_002", INVALID)
    assert service.provider.fetches == 4
    unavailable(await service.ask(B.token(**LASTING)), 30)
    service.clock.advance(30)
    refused(await service.ask(B.token(**LASTING)), 401, "AUTH_002", INVALID)
    assert service.provider.fetches == 5


async def test_a_hundred_requests_share_the_first_fetch():
    service = Service()
    service.provider.hold = anyio.Event()
    statuses = []

    async def ask() -> None:
        statuses.append(await service.status(A.token()))

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        service.provider.hold.set()
    assert statuses == [200] * 100
    assert service.provider.fetches == 1


async def test_each_issuer_has_its_own_keys():
    """JW-16: also where both publish a key of the same name, and one of them rotates to it."""
    one, two = Provider(Pair("k"), url="https://one.example"), Provider(url="https://two.example")
    k_one, k_two = Pair("k"), Pair("k")
    one.publish(k_one)
    two.publish(B)
    service = Service(issuers=[p.issuer(f"{p.url}/jwks.json") for p in (one, two)])
    await service.policy.fetch_keys(service.clock)
    assert await service.status(k_one.token(iss=one.url)) == 200
    assert await service.status(k_one.token(iss=two.url)) == 401
    two.publish(k_two)
    service.clock.advance(30)
    assert await service.status(k_two.token(iss=two.url)) == 200, "the key of that name at the other is not asked"
    assert await service.status(k_two.token(iss=one.url)) == 401
    assert await service.status(k_one.token(iss=two.url)) == 401
    assert (await service.ask(k_one.token(iss=one.url))).status == 200


async def test_an_issuer_that_is_away_takes_no_other_with_it():
    away = Provider(B, url="https://away.example")
    away.down = True
    service = Service(issuers=[make_issuer(make_key("HS256")), away.issuer(f"{away.url}/jwks.json")])
    assert await service.status(token()) == 200
    unavailable(await service.ask(B.token(iss=away.url)), 5)
    assert await service.status(token()) == 200


async def test_a_websocket_is_refused_and_accepted_alike():
    service = Service()
    service.provider.down = True
    sent = await service.ask(A.token(), kind="websocket")
    assert sent.status == 503
    assert not any(message["type"] == "websocket.accept" for message in sent.messages)
    service.provider.down = False
    service.clock.advance(5)
    sent = await service.ask(A.token(), kind="websocket")
    assert sent.header("x-user") == "user_123"


async def test_policies_that_share_an_issuer_share_its_keys():
    provider = Provider(A)
    issuer = provider.issuer()
    app = make_app(BearerAuth(issuers=[issuer]), BearerAuth(issuers=[issuer]))
    assert (await drive(app, headers=bearer(A.token()))).status == 200
    assert provider.fetches == 1


async def test_the_stack_closes_what_fetches():
    service = Service()
    await service.status(A.token())
    await service.app.aclose()
    assert service.provider.closed == 1


async def test_discovery_from_the_outside():
    provider = Provider(A)
    keys = provider.keys(None)
    policy = BearerAuth(issuers=[Issuer(url=provider.url, audience=AUDIENCE, keys=keys)])
    app = make_app(policy)
    assert (await drive(app, headers=bearer(A.token()))).status == 200
    assert provider.hits == ["/.well-known/openid-configuration", "/jwks.json"]


async def test_nothing_of_the_provider_is_in_a_problem():
    service = Service()
    service.provider.down = True
    sent = await service.ask(A.token())
    assert "auth.sigil" not in sent.body.decode()
    assert "canary" not in sent.body.decode()


def test_a_policy_with_configured_keys_has_no_hook_at_the_end():
    assert make_bearer().on_finish is None
    assert list(make_bearer().resources()) == []

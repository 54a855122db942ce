"""BearerAuth with opaque tokens: what the introspection endpoint says is what the caller is."""

import json
import logging
from hashlib import sha256

import anyio
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.dpop import DPoP
from sigil_policy.identity.introspection import Introspection
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.testing import FrozenClock, drive
from tests.identity.endpoint import ENDPOINT, Endpoint
from tests.identity.material import AUDIENCE, NOW, SECRET, URL, good_claims, make_issuer, token
from tests.identity.proofs import ORIGIN, client_jwk, dpop_headers, proof, thumbprint
from tests.identity.provider import Pair, Provider

pytestmark = pytest.mark.anyio

INVALID = 'Bearer realm="api", error="invalid_token"'


async def whoami(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": [(b"x-user", scope["user"].display_name.encode())]})
        return
    principal = get_exchange(scope).principal
    body = b"" if scope["method"] == "HEAD" or principal is None else principal.subject.encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Service:
    """An application behind `BearerAuth`, its clock, and the endpoint that it asks."""

    def __init__(self, *policies, issuers=(), outside=(), bearer=None, **options) -> None:
        self.endpoint = Endpoint()
        self.clock = FrozenClock(NOW)
        introspection = self.endpoint.introspection(**options)
        self.policy = BearerAuth(issuers=issuers, introspection=introspection, **(bearer or {}))
        stack = [*outside, self.policy, *policies]
        self.app = PolicyStack(whoami, policies=stack, clock=self.clock)

    async def ask(self, presented: bytes, *, scheme: bytes = b"Bearer ", **options):
        headers = {"authorization": scheme + presented, **options.pop("headers", {})}
        return await drive(self.app, headers=headers, **options)

    async def status(self, presented: bytes, **options) -> int:
        return (await self.ask(presented, **options)).status


def refused(sent) -> None:
    assert sent.status == 401
    assert sent.json()["error_code"] == "AUTH_002"
    assert sent.json()["detail"] == "The access token is not valid"
    assert sent.header_lines("www-authenticate") == [INVALID]
    assert sent.header("cache-control") == "no-store"


def unavailable(sent, wait: int) -> None:
    assert sent.status == 503
    assert sent.json()["error_code"] == "AUTH_008"
    assert sent.header("retry-after") == str(wait)
    assert sent.header_lines("www-authenticate") == []


async def test_an_opaque_token_is_the_caller():
    service = Service()
    presented = service.endpoint.issue()
    for scheme in (b"Bearer ", b"bearer ", b"Bearer   "):
        assert (await service.ask(presented, scheme=scheme)).body == b"user_123"
    assert len(service.endpoint.hits) == 1


async def test_what_the_endpoint_does_not_know_is_refused():
    service = Service()
    for _ in range(3):
        refused(await service.ask(b"invented"))
    assert len(service.endpoint.hits) == 1
    service.endpoint.issue("elsewhere", aud="another-api")
    refused(await service.ask(b"elsewhere"))


async def test_who_is_known_waits_for_nothing():
    """The answer is there without an awaitable: no task is switched to."""
    service = Service()
    presented = service.endpoint.issue()
    await service.ask(presented)
    await service.ask(b"invented")
    answers = []

    class Spy(BearerAuth):
        def on_request(self, ex):
            answers.append(super().on_request(ex))
            return answers[-1]

    spy = Spy(introspection=service.policy.introspection)
    app = PolicyStack(whoami, policies=[spy], clock=service.clock)
    for one in (presented, b"invented"):
        await drive(app, headers={"authorization": b"Bearer " + one})
    assert answers[0] is None
    assert answers[1].status == 401
    assert len(service.endpoint.hits) == 2, "and what one policy knows, all that share the value know"


async def test_a_jwt_is_verified_or_refused_and_never_sent():
    service = Service(issuers=[make_issuer(leeway=0)])
    assert (await service.ask(token())).body == b"user_123"
    refused(await service.ask(token(good_claims(exp=int(NOW) - 1))))
    refused(await service.ask(token(good_claims(iss="https://evil.example"))))
    refused(await service.ask(b"a.b.c"))
    assert service.endpoint.hits == []
    assert (await service.ask(service.endpoint.issue())).body == b"user_123"


async def test_without_issuers_a_jwt_is_refused():
    service = Service()
    service.endpoint.issue(token().decode())
    refused(await service.ask(token()))
    assert service.endpoint.hits == []


async def test_jwts_are_introspected_by_option():
    service = Service(introspect_jwts=True)
    presented = service.endpoint.issue(token().decode())
    assert await service.status(presented) == 200
    service.endpoint.revoke(presented)
    service.clock.advance(30)
    refused(await service.ask(presented))


async def test_fetched_keys_and_introspection_side_by_side():
    pair = Pair("a")
    provider = Provider(pair)
    service = Service(issuers=[provider.issuer()])
    presented = service.endpoint.issue()
    assert await service.status(pair.token()) == 200
    assert await service.status(presented) == 200
    provider.down = True
    service.clock.advance(485)
    assert await service.status(pair.token()) == 200
    assert await service.status(presented) == 200
    assert provider.fetches == 2, "refreshed after the response"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "issuers"),
        ({"issuers": []}, "introspection"),
        ({"introspection": None}, "introspection"),
        ({"introspection": ENDPOINT}, "introspection"),
        ({"introspection": {"url": ENDPOINT}}, "introspection"),
    ],
)
def test_somebody_has_to_be_believed(options, message):
    with pytest.raises(ValidationError, match=message):
        BearerAuth(**options)


def test_jwts_are_either_introspected_or_verified():
    with pytest.raises(ValidationError, match="not both"):
        BearerAuth(issuers=[make_issuer()], introspection=Endpoint().introspection(introspect_jwts=True))


def test_it_can_be_written_as_data():
    options = {"url": ENDPOINT, "issuer": URL, "audience": AUDIENCE, "client_id": "a", "client_secret": SECRET}
    policy = BearerAuth(introspection=options)
    assert isinstance(policy.introspection, Introspection)
    assert SECRET not in repr(policy)


# --- time ------------------------------------------------------------------------------------------------------------


async def test_a_revoked_token_ends_within_cache_seconds():
    service = Service(cache_seconds=10)
    presented = service.endpoint.issue()
    assert await service.status(presented) == 200
    service.endpoint.revoke(presented)
    service.clock.advance(7.9)
    assert await service.status(presented) == 200
    service.clock.advance(2.1)
    refused(await service.ask(presented))


async def test_a_token_in_use_is_asked_about_after_a_response_and_nobody_waits():
    service = Service(cache_seconds=10)
    presented = service.endpoint.issue()
    await service.ask(presented)
    service.clock.advance(8)
    service.endpoint.hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        seen = []

        async def ask() -> None:
            await service.ask(presented, on_send=lambda message: seen.append(message))

        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        assert [message["type"] for message in seen] == ["http.response.start", "http.response.body"]
        assert len(service.endpoint.hits) == 2
        service.endpoint.hold.set()
    service.clock.advance(7)
    assert await service.status(presented) == 200
    assert len(service.endpoint.hits) == 2


async def test_a_token_ends_with_its_exp():
    service = Service(cache_seconds=3_600)
    presented = service.endpoint.issue(exp=int(NOW) + 10)
    assert await service.status(presented) == 200
    service.clock.advance(10)
    refused(await service.ask(presented))


async def test_an_endpoint_that_is_away_is_a_503_and_heals():
    service = Service(cache_seconds=10)
    presented = service.endpoint.issue()
    await service.ask(presented)
    service.endpoint.down = True
    unavailable(await service.ask(b"new"), 5)
    assert await service.status(presented) == 200
    service.clock.advance(10)
    unavailable(await service.ask(presented), 5)
    assert (await drive(service.app)).status == 200, "who has no token is served"
    service.endpoint.down = False
    service.clock.advance(5)
    assert await service.status(presented) == 200


async def test_an_answer_beyond_its_time_is_used_by_option():
    service = Service(cache_seconds=10, stale_if_error=60)
    presented = service.endpoint.issue()
    await service.ask(presented)
    service.endpoint.down = True
    service.clock.advance(69)
    assert await service.status(presented) == 200
    service.clock.advance(1)
    assert await service.status(presented) == 503


async def test_a_flood_is_answered_without_a_call_and_known_callers_go_on():
    service = Service(burst=10, rate=1)
    presented = service.endpoint.issue()
    await service.ask(presented)
    for number in range(200):
        sent = await service.ask(b"invented-%d" % number)
        assert sent.status in (401, 503)
        if sent.status == 503:
            unavailable(sent, 1)
        assert await service.status(presented) == 200
    assert len(service.endpoint.hits) == 10


async def test_a_flood_is_met_by_address():
    service = Service(outside=[AuthFailureLimit()])
    statuses = [await service.status(b"invented-%d" % number) for number in range(100)]
    assert 429 in statuses
    assert len(service.endpoint.hits) == statuses.index(429)
    presented = service.endpoint.issue()
    sent = await service.ask(presented, client=("198.51.100.7", 1))
    assert sent.status == 200


# --- every kind of exchange ------------------------------------------------------------------------------------------


async def test_a_websocket_obeys_the_same_rules():
    service = Service()
    presented = service.endpoint.issue()
    sent = await service.ask(presented, kind="websocket")
    assert sent.header("x-user") == "user_123"
    extensions = {"extensions": {"websocket.http.response": {}}}
    assert await service.status(b"invented", kind="websocket", scope=extensions) == 401
    service.endpoint.down = True
    assert await service.status(b"new", kind="websocket", scope=extensions) == 503


async def test_head_is_refused_without_a_body():
    sent = await Service().ask(b"invented", method="HEAD")
    assert (sent.status, sent.body) == (401, b"")


async def test_two_in_one_stack_ask_once():
    service = Service()
    other = BearerAuth(introspection=service.policy.introspection)
    app = PolicyStack(whoami, policies=[service.policy, other], clock=service.clock)
    presented = service.endpoint.issue()
    sent = await drive(app, headers={"authorization": b"Bearer " + presented})
    assert sent.body == b"user_123"
    assert len(service.endpoint.hits) == 1


async def test_a_client_that_leaves_leaves_everything_right():
    service = Service(burst=1)
    presented = service.endpoint.issue()
    service.endpoint.hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.ask, presented)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
        service.endpoint.hold.set()
    assert await service.status(presented) == 200
    assert len(service.endpoint.hits) == 1


async def test_scopes_revocation_and_starlette_see_a_principal_like_any_other():
    revocations = MemoryRevocations(clock=FrozenClock(NOW))
    service = Service(Revocation(store=revocations), Scopes(routes={"GET /": ["agents:read"]}))
    presented = service.endpoint.issue(jti="j-1")
    assert await service.status(presented) == 200
    poor = service.endpoint.issue("poor", scope="agents:write")
    assert await service.status(poor) == 403
    await revocations.revoke(jti="j-1", until=NOW + 3600)
    refused(await service.ask(presented))

    @requires("agents:read")
    async def read(request):
        return PlainTextResponse(request.user.display_name)

    app = Starlette(
        routes=[Route("/", read)],
        middleware=[Middleware(PolicyStack, policies=[service.policy], clock=service.clock)],
    )
    assert (await drive(app, headers={"authorization": b"Bearer " + presented})).body == b"user_123"


async def test_what_the_application_decides_is_asked_in_its_own_request():
    """A callable that fails is an error of the application: it poisons no answer that others wait for."""

    def tier(claims):
        raise RuntimeError("canary")

    service = Service(tier=tier)
    presented = service.endpoint.issue()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="canary"):
            await service.ask(presented)
    assert len(service.endpoint.hits) == 1


async def test_a_bound_token_is_refused_where_nobody_can_tell_whose_it_is():
    service = Service()
    bound = {"cnf": {"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}}
    refused(await service.ask(service.endpoint.issue("plain", **bound)))
    refused(await service.ask(service.endpoint.issue("dpop", token_type="DPoP", **bound)))
    lax = Service(bearer={"accept_bound_tokens_without_proof": True})
    assert await lax.status(lax.endpoint.issue("plain", **bound)) == 200


async def test_a_bound_token_is_good_from_who_holds_its_key():
    """RFC 9449 sections 6.2 and 7: the endpoint says which key."""
    service = Service(bearer={"sender": DPoP(origin=ORIGIN)})
    bound = {"cnf": {"jkt": thumbprint(client_jwk())}}
    for name, token_type in (("typed", "DPoP"), ("plain", "Bearer")):
        presented = service.endpoint.issue(name, token_type=token_type, **bound)
        for _ in range(2):
            assert (await drive(service.app, headers=dpop_headers(presented))).status == 200
        assert await service.status(presented) == 401, "no downgrade"
        other = dpop_headers(presented, proof(presented, algorithm="ES384"))
        assert (await drive(service.app, headers=other)).status == 401
    assert await service.status(service.endpoint.issue("bound-to-nobody")) == 200
    assert service.endpoint.hits == ["typed", "plain", "bound-to-nobody"]


async def test_the_stack_closes_what_asks():
    service = Service()
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def lifespan(scope, receive, send):
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})

    async def receive():
        return messages.pop(0)

    async def send(message):
        pass

    app = PolicyStack(lifespan, policies=[service.policy], clock=service.clock)
    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert service.endpoint.closed == 1


# --- connections that last -------------------------------------------------------------------------------------------


async def talk(service, presented: bytes, *steps):
    """A connection on which each step follows a message; how many the application heard, and the last that was sent."""
    heard = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        for step in steps:
            if (await receive())["type"] == "websocket.disconnect":
                return
            heard.append(1)
            step()
        await receive()

    text = {"type": "websocket.receive", "text": "hi"}
    incoming = [{"type": "websocket.connect"}, *[text] * len(steps), {"type": "websocket.disconnect", "code": 1000}]
    stack = PolicyStack(app, policies=[service.policy], clock=service.clock)
    sent = await drive(stack, kind="websocket", headers={"authorization": b"Bearer " + presented}, incoming=incoming)
    return len(heard), sent.messages[-1]


ENDED = {"type": "websocket.close", "code": 4401, "reason": "the credential has ended"}


@pytest.mark.parametrize("endless", [False, True])
async def test_a_revoked_token_ends_its_connection_within_cache_seconds(endless):
    service = Service(cache_seconds=10, accept_tokens_without_end=endless)
    presented = service.endpoint.issue(exp=None) if endless else service.endpoint.issue()

    def revoke() -> None:
        service.endpoint.revoke(presented)
        service.clock.advance(9.9)

    wait = service.clock.advance
    heard, last = await talk(service, presented, lambda: wait(10), lambda: wait(0), revoke, lambda: wait(0.1), print)
    assert (heard, last) == (4, ENDED)
    assert len(service.endpoint.hits) == 3


async def test_a_connection_ends_with_its_token():
    service = Service()
    presented = service.endpoint.issue(exp=int(NOW) + 15)
    wait = service.clock.advance
    assert await talk(service, presented, lambda: wait(14), lambda: wait(1), print) == (2, ENDED)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"scope": "agents:read agents:write more"}, 2),
        ({"scope": "agents:read"}, 1),
        ({"sub": "another"}, 1),
        ({"aud": "another-api"}, 1),
    ],
)
async def test_a_connection_ends_where_its_token_means_less_than_it_did(changes, expected):
    service = Service(cache_seconds=10)
    presented = service.endpoint.issue()

    def change() -> None:
        service.endpoint.issue(**changes)
        service.clock.advance(10)

    heard, last = await talk(service, presented, change, lambda: None)
    assert heard == expected
    assert (last == ENDED) is (expected == 1)


@pytest.mark.parametrize(("stale", "expected"), [(0, 1), (60, 2)])
async def test_a_connection_ends_where_nobody_can_say_whether_it_may_go_on(stale, expected):
    service = Service(cache_seconds=10, stale_if_error=stale)
    presented = service.endpoint.issue()

    def fail() -> None:
        service.endpoint.down = True
        service.clock.advance(10)

    heard, last = await talk(service, presented, fail, lambda: None)
    assert heard == expected
    assert last.get("code") == (1013 if expected == 1 else None)


# --- hostile input ---------------------------------------------------------------------------------------------------


async def test_no_canary_is_in_a_problem_a_log_or_a_repr(caplog):
    caplog.set_level(logging.DEBUG)
    service = Service()
    shown = repr(service.policy)
    for answer in (None, httpx2.Response(401, text="canary-body"), httpx2.Response(200, text="canary-body")):
        service.endpoint.answer = answer
        sent = await service.ask(b"canary-presented")
        shown += sent.body.decode() + repr(sent.headers)
        service.clock.advance(60)
    service.endpoint.down = True
    shown += (await service.ask(b"canary-presented")).body.decode()
    shown += caplog.text
    assert "canary" not in shown
    assert SECRET not in shown
    assert sha256(b"canary-presented").hexdigest() not in shown


@given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40))
def test_any_token_gets_an_answer_and_arrives_as_it_is(text):
    service = Service()
    sent = anyio.run(service.ask, text.encode())
    assert sent.status in (400, 401)
    assert service.endpoint.hits in ([], [text])


@given(
    st.one_of(
        st.binary(max_size=100),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=10,
        ).map(lambda found: json.dumps(found).encode()),
    ),
    st.sampled_from(["application/json", "text/html", "", "application/json; charset=utf-16"]),
    st.sampled_from([100, 200, 204, 206, 301, 304, 400, 401, 403, 418, 429, 500, 503, 599]),
    st.dictionaries(
        st.sampled_from(["retry-after", "location", "content-encoding", "content-length"]), st.text("0123456789abc-/:")
    ),
)
def test_whatever_the_endpoint_answers_nobody_gets_in_and_nothing_breaks(body, media_type, status, headers):
    service = Service()
    fields = [("content-type", media_type), *headers.items()]
    service.endpoint.answer = httpx2.Response(status, content=body, headers=fields)
    sent = anyio.run(service.ask, b"presented")
    assert sent.status in (401, 503)


async def test_the_longest_token_is_asked_about_and_no_longer_one():
    service = Service()
    longest = service.endpoint.issue("A" * 8_192)
    assert await service.status(longest) == 200
    refused(await service.ask(b"A" * 8_193))
    assert len(service.endpoint.hits) == 1


async def test_an_api_key_with_a_prefix_is_never_sent():
    service = Service(bearer={"foreign_prefix": "sk_"})
    assert (await service.ask(b"sk_live_secret")).body == b""
    assert service.endpoint.hits == []


async def test_a_token_in_the_query_or_beside_a_key_is_never_sent():
    service = Service()
    assert await service.status(b"t", query="access_token=t") == 400
    assert await service.status(b"t", headers={"x-api-key": "k"}) == 400
    assert service.endpoint.hits == []


def test_the_module_s_example_can_be_written():
    policy = BearerAuth(
        introspection=Introspection(
            url="https://login.example.com/introspect",
            issuer="https://login.example.com",
            audience="sigil-api",
            client_id="sigil-api",
            client_secret=SecretStr(SECRET),
        )
    )
    assert policy.issuers == ()

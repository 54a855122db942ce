"""BearerAuth with a sender: RFC 9449 section 7 and RFC 8705 section 3 over the wire, on every kind of exchange."""

import contextlib
import json
import logging
from http.client import HTTPConnection
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sigil_policy.core.exchange import Exchange, get_exchange
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.client_certificates import ClientCertificate
from sigil_policy.identity.dpop import DPoP
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.scopes import Scopes
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.replays import RedisReplays
from sigil_policy.stores.replays import MemoryReplays
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, good_claims, make_issuer, token
from tests.identity.proofs import (
    ORIGIN,
    base64url_hash,
    bound_token,
    client_jwk,
    dpop_headers,
    escaped,
    proof,
    thumbprint,
)
from tests.identity.provider import Pair, Provider
from tests.served import on_uvicorn
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

PROXY = ("10.0.0.7", 50_000)
DER = b"the DER of a certificate, which is hashed and never read"
CERTIFICATE = {"client-cert": escaped(DER)}
BY_CERTIFICATE = {"x5t#S256": base64url_hash(DER)}
ALGS = 'algs="ES256 EdDSA PS256 RS256"'
BEARER, DPOP = 'Bearer realm="api"', f'DPoP realm="api", {ALGS}'
INVALID_BEARER = 'Bearer realm="api", error="invalid_token"'
INVALID_DPOP = f'DPoP realm="api", error="invalid_token", {ALGS}'
INVALID_PROOF = f'DPoP realm="api", error="invalid_dpop_proof", {ALGS}'
SECRET = SecretStr("canary-nonce-secret-0d1c-of-32-bytes-at-least")


def make_bearer(*senders: Any, **options: Any) -> BearerAuth:
    return BearerAuth(**{"issuers": [make_issuer(leeway=0)], "sender": senders, **options})


def with_dpop(**options: Any) -> BearerAuth:
    return make_bearer(DPoP(origin=ORIGIN), **options)


def with_certificate(**options: Any) -> BearerAuth:
    return make_bearer(ClientCertificate(trusted_proxies=["10.0.0.0/8"]), **options)


async def whoami(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": [(b"x-user", scope["user"].display_name.encode())]})
        return
    principal = get_exchange(scope).principal
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(principal and principal.subject).encode()})


def make_app(*policies: Policy, clock: FrozenClock | None = None) -> PolicyStack:
    return PolicyStack(whoami, policies=policies, clock=clock or FrozenClock(NOW))


def refused(sent, code: str, *challenges: str, status: int = 401) -> None:
    assert sent.status == status
    assert sent.json()["error_code"] == code
    assert sent.header_lines("www-authenticate") == list(challenges)
    assert sent.header("cache-control") == "no-store"


def bound(**cnf: Any) -> bytes:
    return token(good_claims(cnf=cnf))


# --- DPoP ------------------------------------------------------------------------------------------------------------


async def test_a_bound_token_with_its_proof_is_the_caller():
    """RFC 9449 section 7.1; the token is remembered, and each request brings a proof of its own."""
    app, presented = make_app(with_dpop()), bound_token()
    for scheme in (b"DPoP ", b"dpop ", b"DPOP   "):
        for _ in range(2):
            sent = await drive(app, headers={**dpop_headers(presented), "authorization": scheme + presented})
            assert sent.json() == "user_123"
            assert sent.header_lines("www-authenticate") == []
            assert sent.header("dpop-nonce") is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
async def test_a_proof_is_for_one_method_and_one_url(method):
    app, presented = make_app(with_dpop()), bound_token()
    headers = dpop_headers(presented, htm=method, htu=f"{ORIGIN}/v7/agents/a%20b")
    assert (
        await drive(app, method, "/v7/agents/a b", headers=headers, scope={"raw_path": b"/v7/agents/a%20b"})
    ).status == 200
    other = dpop_headers(presented, htm=method, htu=f"{ORIGIN}/v7/agents")
    sent = await drive(app, method, "/v7/other", headers=other)
    assert sent.status == 401
    assert sent.header_lines("www-authenticate") == [BEARER, INVALID_PROOF]


async def test_a_proof_is_used_once_also_when_the_token_is_remembered():
    """RFC 9449 section 11.1."""
    app, headers = make_app(with_dpop()), dpop_headers(bound_token())
    assert (await drive(app, headers=headers)).status == 200
    for _ in range(2):
        refused(await drive(app, headers=headers), "AUTH_010", BEARER, INVALID_PROOF)


async def test_a_stolen_token_and_its_proof_are_of_no_use_elsewhere():
    """RFC 9449 section 1: what DPoP is for."""
    app, presented = make_app(with_dpop()), bound_token()
    assert (await drive(app, headers=dpop_headers(presented))).status == 200
    with_own_key = await drive(app, headers=dpop_headers(presented, algorithm="EdDSA"))
    refused(with_own_key, "AUTH_002", BEARER, INVALID_DPOP)
    other = bound_token(sub="mallory")
    stolen = dpop_headers(presented, htu="https://evil.example/")
    for headers in (
        stolen,
        {**stolen, "host": "evil.example", "x-forwarded-host": "evil.example", "forwarded": "host=evil.example"},
        dpop_headers(presented, proof(other)),
        dpop_headers(presented, iat=NOW - 60),
        dpop_headers(presented, iat=NOW + 31),
        {"authorization": b"DPoP " + presented},
        dpop_headers(presented, b""),
        dpop_headers(presented, b"A" * 80_000),
        [*dpop_headers(presented).items(), ("dpop", proof(presented))],
    ):
        sent = await drive(app, headers=headers)
        refused(sent, "AUTH_010", BEARER, INVALID_PROOF)
        assert sent.json()["detail"] == "The proof of possession is not valid for this request"


async def test_a_bound_token_is_refused_as_bearer():
    """RFC 9449 section 7.2, the downgrade; a proof beside it does not help."""
    app, presented = make_app(with_dpop()), bound_token()
    assert (await drive(app, headers=dpop_headers(presented))).status == 200, "and is remembered"
    for headers in ({}, {"dpop": proof(presented)}):
        for scheme in (b"Bearer ", b"bearer "):
            sent = await drive(app, headers={"authorization": scheme + presented, **headers})
            refused(sent, "AUTH_002", INVALID_BEARER, DPOP)


async def test_a_token_that_is_bound_to_nobody_is_refused_as_dpop():
    """RFC 9449 section 7.1."""
    app = make_app(with_dpop())
    refused(await drive(app, headers=dpop_headers(token())), "AUTH_002", BEARER, INVALID_DPOP)
    sent = await drive(app, headers={"authorization": b"Bearer " + token()})
    assert sent.json() == "user_123", "as Bearer it is what it was"
    assert (await drive(app, headers={"authorization": b"Bearer " + token(), "dpop": b"nonsense"})).status == 200
    refused(await drive(app, headers=dpop_headers(bound(**BY_CERTIFICATE))), "AUTH_002", BEARER, INVALID_DPOP)


async def test_bound_tokens_only():
    app = make_app(with_dpop(sender_required=True, required=True))
    refused(await drive(app, headers={"authorization": b"Bearer " + token()}), "AUTH_002", INVALID_DPOP)
    refused(await drive(app, headers={"authorization": b"Bearer " + bound_token()}), "AUTH_002", INVALID_DPOP)
    refused(await drive(app), "AUTH_001", DPOP)
    assert (await drive(app, headers=dpop_headers(bound_token()))).json() == "user_123"
    both = make_bearer(DPoP(origin=ORIGIN), ClientCertificate(), sender_required=True, required=True)
    refused(await drive(make_app(both)), "AUTH_001", BEARER, DPOP)


@pytest.mark.parametrize(
    "cnf",
    [None, "x", 7, [], {}, {"jkt": None}, {"jkt": 7}, {"jkt": ""}, {"jkt": "é"}, {"jkt": {"a": 1}},
     {"jwk": client_jwk()}, {"x5t#S256": None}, {"x5t#S256": ""}],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("policy", [with_dpop, with_certificate, make_bearer])
async def test_a_confirmation_that_nobody_understands_confirms_nothing(policy, cnf):
    """RFC 7800 section 3.1, closed by default."""
    presented = token({**good_claims(), "cnf": cnf})
    for headers in ({"authorization": b"Bearer " + presented}, dpop_headers(presented)):
        sent = await drive(make_app(policy(required=True)), headers={**headers, **CERTIFICATE}, client=PROXY)
        assert sent.status == 401
    again = make_app(policy())
    for _ in range(2):
        assert (await drive(again, headers={"authorization": b"Bearer " + presented}, client=PROXY)).status == 401


async def test_other_members_of_a_confirmation_are_ignored_beside_one_that_holds():
    """RFC 7800 section 3.1."""
    presented = bound(jkt=thumbprint(client_jwk()), future="x")
    assert (await drive(make_app(with_dpop()), headers=dpop_headers(presented))).status == 200


async def test_a_token_that_is_not_valid_is_refused_in_its_scheme():
    app = make_app(with_dpop())
    for presented in (bound_token(exp=int(NOW) - 1), b"x.y.z", b"opaque", b"A" * 9_000):
        refused(await drive(app, headers=dpop_headers(presented)), "AUTH_002", BEARER, INVALID_DPOP)
        refused(await drive(app, headers={"authorization": b"Bearer " + presented}), "AUTH_002", INVALID_BEARER, DPOP)


@pytest.mark.parametrize("value", ["DPoP", "DPoP ", "dpop    ", "DPoP a b", "DPoP a,b", b"DPoP \xe9"])
async def test_a_malformed_header_is_a_bad_request(value):
    sent = await drive(make_app(with_dpop()), headers={"authorization": value})
    refused(sent, "AUTH_003", 'Bearer realm="api", error="invalid_request"', DPOP, status=400)


async def test_two_schemes_at_once_are_one_too_many():
    """RFC 9449 section 7.2."""
    presented = bound_token()
    lines = [
        ("authorization", b"DPoP " + presented),
        ("authorization", b"Bearer " + presented),
        ("dpop", proof(presented)),
    ]
    for headers in (lines, lines[1:2] + lines[:1] + lines[2:]):
        assert (await drive(make_app(with_dpop()), headers=headers)).status == 400


async def test_both_schemes_are_offered_where_both_are_taken():
    """RFC 9449 section 7.2; no error for who has presented nothing (section 7.1)."""
    refused(await drive(make_app(with_dpop(required=True))), "AUTH_001", BEARER, DPOP)
    refused(await drive(make_app(with_dpop(), Scopes(routes={"GET /": "admin"}))), "AUTH_001", BEARER, DPOP)
    refused(
        await drive(make_app(with_dpop(required=True)), headers={"authorization": "Basic YTpi"}),
        "AUTH_001",
        BEARER,
        DPOP,
    )
    refused(await drive(make_app(with_certificate(required=True))), "AUTH_001", BEARER)
    one = make_bearer(DPoP(origin=ORIGIN, algorithms=["ES384"]), required=True, realm="agents")
    refused(await drive(make_app(one)), "AUTH_001", 'Bearer realm="agents"', 'DPoP realm="agents", algs="ES384"')


async def test_without_a_sender_dpop_is_a_scheme_like_any_other():
    sent = await drive(make_app(make_bearer(required=True)), headers=dpop_headers(bound_token()))
    refused(sent, "AUTH_001", BEARER)


async def test_preflights_bring_no_proof():
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert (
        await drive(make_app(with_dpop(required=True, sender_required=True)), "OPTIONS", headers=headers)
    ).status == 200


# --- what is done with a bound token where nobody can tell -----------------------------------------------------------


async def test_a_bound_token_is_refused_where_nobody_can_tell_whose_it_is():
    presented = bound_token()
    app = make_app(make_bearer())
    for _ in range(2):
        refused(await drive(app, headers={"authorization": b"Bearer " + presented}), "AUTH_002", INVALID_BEARER)
    for sender, cnf in ((with_certificate, {"jkt": "x"}), (with_dpop, BY_CERTIFICATE)):
        sent = await drive(make_app(sender()), headers={"authorization": b"Bearer " + bound(**cnf)})
        assert sent.status == 401
    unbound = await drive(app, headers={"authorization": b"Bearer " + token()})
    assert unbound.json() == "user_123"


async def test_the_danger_is_spelled_out():
    presented = {"authorization": b"Bearer " + bound_token()}
    for policy in (make_bearer, with_certificate):
        app = make_app(policy(accept_bound_tokens_without_proof=True))
        assert [(await drive(app, headers=presented)).json() for _ in range(2)] == ["user_123"] * 2
    app = make_app(with_dpop(accept_bound_tokens_without_proof=True))
    assert (await drive(app, headers=presented)).status == 401, "there is a sender for these"
    assert (await drive(app, headers={"authorization": b"Bearer " + bound(**BY_CERTIFICATE)})).status == 200
    app = make_app(with_certificate(accept_bound_tokens_without_proof=True))
    assert (await drive(app, headers={"authorization": b"Bearer " + bound(**BY_CERTIFICATE)})).status == 401


# --- certificates ----------------------------------------------------------------------------------------------------


async def test_a_bound_token_with_its_certificate_is_the_caller():
    """RFC 8705 section 3."""
    app, headers = make_app(with_certificate()), {"authorization": b"Bearer " + bound(**BY_CERTIFICATE)}
    for _ in range(2):
        assert (await drive(app, headers={**headers, **CERTIFICATE}, client=PROXY)).json() == "user_123"
    for others, client in (
        ({}, PROXY),
        (CERTIFICATE, ("203.0.113.7", 1)),
        (CERTIFICATE, None),
        ({"client-cert": escaped(DER + b"x")}, PROXY),
        ({"client-cert": b"nonsense"}, PROXY),
        ({"x-forwarded-for": "10.0.0.7", **CERTIFICATE}, ("203.0.113.7", 1)),
    ):
        refused(await drive(app, headers={**headers, **others}, client=client), "AUTH_002", INVALID_BEARER)
    twice = [*headers.items(), ("client-cert", escaped(DER)), ("Client-Cert", escaped(DER))]
    refused(await drive(app, headers=twice, client=PROXY), "AUTH_002", INVALID_BEARER)


async def test_a_token_that_is_bound_to_no_certificate():
    headers = {"authorization": b"Bearer " + token(), **CERTIFICATE}
    assert (await drive(make_app(with_certificate()), headers=headers, client=PROXY)).json() == "user_123"
    strict = make_app(with_certificate(sender_required=True))
    refused(await drive(strict, headers=headers, client=PROXY), "AUTH_002", INVALID_BEARER)


async def test_a_token_that_is_bound_twice_takes_both():
    app = make_app(
        make_bearer(DPoP(origin=ORIGIN), ClientCertificate(trusted_proxies=["10.0.0.0/8"]), sender_required=True)
    )
    presented = bound(jkt=thumbprint(client_jwk()), **BY_CERTIFICATE)
    good = {**dpop_headers(presented), **CERTIFICATE}
    assert (await drive(app, headers=good, client=PROXY)).status == 200
    assert (await drive(app, headers=dpop_headers(presented), client=PROXY)).status == 401
    without = {"authorization": b"Bearer " + presented, **CERTIFICATE}
    assert (await drive(app, headers=without, client=PROXY)).status == 401
    for cnf, headers in (({"jkt": thumbprint(client_jwk())}, dpop_headers), (BY_CERTIFICATE, None)):
        one = bound(**cnf)
        presenting = {"authorization": b"Bearer " + one} if headers is None else headers(one)
        assert (await drive(app, headers={**presenting, **CERTIFICATE}, client=PROXY)).status == 200, "either alone"


# --- stores ----------------------------------------------------------------------------------------------------------


class Remote:
    """A store on another machine, and how it fails."""

    remote = True

    def __init__(self, error: Exception | None = None) -> None:
        self.kept = MemoryReplays()
        self.error = error
        self.trips = 0
        self.closed = False

    async def claim(self, name: bytes, seconds: float, now: float) -> bool:
        self.trips += 1
        await anyio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self.kept.claim(name, seconds, now)

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    "store", [Remote(StoreUnavailableError("away", 7.0)), MemoryReplays(max_entries=1)], ids=["away", "full"]
)
async def test_a_store_that_cannot_say_lets_nobody_in(store):
    if isinstance(store, MemoryReplays):
        store.claim(b"other", 1e9, 0.0)
    app = make_app(make_bearer(DPoP(origin=ORIGIN, replays=store)))
    sent = await drive(app, headers=dpop_headers(bound_token()))
    assert (sent.status, sent.json()["error_code"]) == (503, "SRV_503")
    assert int(sent.header("retry-after")) >= 7
    assert sent.header_lines("www-authenticate") == []
    opened = make_app(make_bearer(DPoP(origin=ORIGIN, replays=store, on_store_loss="open")))
    assert (await drive(opened, headers=dpop_headers(bound_token()))).status == 200
    assert (await drive(opened, headers=dpop_headers(bound_token(), iat=0))).status == 401, "all else is checked"


async def test_one_trip_and_none_for_what_is_refused():
    store = Remote()
    policy = make_bearer(DPoP(origin=ORIGIN, replays=store))
    app, presented = make_app(policy), bound_token()
    for headers in (dpop_headers(presented, htm="POST"), dpop_headers(presented, algorithm="EdDSA"), {}):
        await drive(app, headers=headers)
    assert store.trips == 0
    headers = dpop_headers(presented)
    assert (await drive(app, headers=headers)).json() == "user_123"
    assert store.trips == 1
    assert (await drive(app, headers=headers)).status == 401
    assert list(policy.resources()) == [store]


@pytest.mark.parametrize("remote", [False, True])
async def test_of_many_requests_with_one_proof_exactly_one_passes(remote):
    app = make_app(make_bearer(DPoP(origin=ORIGIN, replays=Remote() if remote else None)))
    headers, statuses = dpop_headers(bound_token()), []

    async def one() -> None:
        statuses.append((await drive(app, headers=headers)).status)

    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(one)
    assert sorted(statuses) == [200] + [401] * 29


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_of_many_processes_exactly_one_lets_a_proof_pass():
    with Server() as server:
        stores = [RedisReplays(RedisLink(server.url, deadline=60, connect_timeout=60)) for _ in range(4)]
        apps = [make_app(make_bearer(DPoP(origin=ORIGIN, replays=store, deadline=60))) for store in stores]
        presented, statuses = bound_token(), []
        for _ in range(5):
            headers = dpop_headers(presented)

            async def one(app: PolicyStack, headers: dict[str, bytes] = headers) -> None:
                statuses.append((await drive(app, headers=headers)).status)

            async with anyio.create_task_group() as group:
                for app in apps * 3:
                    group.start_soon(one, app)
        assert sorted(statuses) == [200] * 5 + [401] * 55
        for store in stores:
            await store.aclose()


async def test_a_request_that_is_cancelled_is_nobodys():
    seen = []

    class Watch(Policy):
        def on_request(self, ex: Exchange) -> None:
            seen.append(ex.principal)

    class Hangs(Remote):
        async def claim(self, name: bytes, seconds: float, now: float) -> bool:
            await anyio.sleep_forever()
            return True

    app = make_app(make_bearer(DPoP(origin=ORIGIN, replays=Hangs(), deadline=60)), Watch())
    with anyio.move_on_after(0.01):
        await drive(app, headers=dpop_headers(bound_token()))
    assert seen == []


# --- the clock, nonces -----------------------------------------------------------------------------------------------


async def test_a_clock_that_is_set_lets_no_proof_pass_twice():
    clock = FrozenClock(NOW)
    app, headers = make_app(with_dpop(), clock=clock), dpop_headers(bound_token())
    assert (await drive(app, headers=headers)).status == 200
    for jump in (30, -30, -60, 60, 3_000, -3_000, 0):
        clock.jump(jump)
        clock.advance(0.5)
        assert (await drive(app, headers=headers)).status == 401


async def test_a_proof_takes_a_nonce_of_this_service():
    """RFC 9449 sections 8 and 9."""
    clock = FrozenClock(NOW + 300 - NOW % 300)
    policy = make_bearer(DPoP(origin=ORIGIN, nonce_secret=SECRET, nonce_period=300))
    app, presented = make_app(policy, clock=clock), bound_token()
    sent = await drive(app, headers=dpop_headers(presented, iat=clock.time()))
    refused(sent, "AUTH_011", BEARER, f'DPoP realm="api", error="use_dpop_nonce", {ALGS}')
    nonce = sent.header("dpop-nonce")
    sent = await drive(app, headers=dpop_headers(presented, iat=clock.time(), nonce=nonce))
    assert (sent.status, sent.header("dpop-nonce")) == (200, None)
    clock.advance(300)
    sent = await drive(app, headers=dpop_headers(presented, iat=clock.time(), nonce=nonce))
    assert sent.status == 200
    assert sent.header("cache-control") == "no-store"
    fresh = sent.header("dpop-nonce")
    assert fresh not in (None, nonce)
    clock.advance(300)
    assert (await drive(app, headers=dpop_headers(presented, iat=clock.time(), nonce=nonce))).status == 401
    assert (await drive(app, headers=dpop_headers(presented, iat=clock.time(), nonce=fresh))).status == 200
    wrong = await drive(app, headers=dpop_headers(presented, iat=clock.time(), nonce=fresh, htm="POST"))
    assert wrong.header("dpop-nonce") is None, "a nonce is for who can prove the rest"


# --- other exchanges, several policies -------------------------------------------------------------------------------


async def test_websocket_handshakes_take_a_proof_for_get():
    app, presented = make_app(with_dpop(required=True)), bound_token()
    headers = dpop_headers(presented)
    sent = await drive(app, kind="websocket", headers=headers)
    assert (sent.messages[0]["type"], sent.header("x-user")) == ("websocket.accept", "user_123")
    for wrong in (headers, dpop_headers(presented, htm="WEBSOCKET"), dpop_headers(presented, htu="wss://api.example.com/"),
                  {"authorization": b"Bearer " + presented}):  # fmt: skip
        sent = await drive(app, kind="websocket", headers=wrong)
        assert sent.messages[0]["type"] == "websocket.http.response.start"
        assert sent.status == 401
        closed = await drive(app, kind="websocket", headers=wrong, scope={"extensions": {}})
        assert [message["type"] for message in closed.messages] == ["websocket.close"]


async def test_a_browser_cannot_send_a_proof_so_a_bound_token_is_refused_from_it():
    """RFC 9449 section 7.2: what a subprotocol carries is a bearer token."""
    app = make_app(with_dpop(websocket_protocol="sigil.bearer"))
    for presented, status in ((bound_token(), 401), (token(), 101)):
        offered = {"sec-websocket-protocol": b"sigil.bearer, " + presented, "dpop": proof(presented)}
        scope = {"subprotocols": ["sigil.bearer", presented.decode()]}
        assert (await drive(app, kind="websocket", headers=offered, scope=scope)).status == status


async def test_a_proof_is_used_once_however_many_policies_look_at_it():
    shared = MemoryReplays()
    outer, inner = (make_bearer(DPoP(origin=ORIGIN, replays=shared)) for _ in range(2))
    for app in (make_app(outer, inner), PolicyStack(make_app(inner), policies=[outer], clock=FrozenClock(NOW))):
        headers = dpop_headers(bound_token())
        assert (await drive(app, headers=headers)).json() == "user_123"
        assert (await drive(app, headers=headers)).status == 401
    strict = make_app(with_dpop(), make_bearer(DPoP(origin="https://internal.example")))
    assert (await drive(strict, headers=dpop_headers(bound_token()))).status == 401, "each has its own say"


async def test_a_policy_further_in_that_cannot_verify_the_token_believes_nobody():
    """It may trust fewer issuers than the one further out."""
    for inner in (make_bearer(), with_certificate(), make_bearer(required=True), make_bearer(foreign_prefix="ey")):
        sent = await drive(make_app(with_dpop(), inner), headers=dpop_headers(bound_token()))
        refused(sent, "AUTH_002", INVALID_BEARER)
    fewer = BearerAuth(issuers=[make_issuer(url="https://admin.example")], sender=DPoP(origin=ORIGIN))
    refused(
        await drive(make_app(with_dpop(), fewer), headers=dpop_headers(bound_token())), "AUTH_002", BEARER, INVALID_DPOP
    )


# --- real sockets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_what_a_client_signs_is_what_a_server_sees(http):
    presented, clock = bound_token(), FrozenClock(NOW)

    def status(target: str, host: str = "api.example.com", **claims: Any) -> int:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {name: value.decode() for name, value in dpop_headers(presented, **claims).items()}
        connection.request("GET", target, headers={"Host": host, **headers})
        found = connection.getresponse().status
        connection.close()
        return found

    with on_uvicorn(make_app(with_dpop(), clock=clock), http=http) as port:
        assert status("/v7/a%20b/%C3%A9%2f?page=2", htu=f"{ORIGIN}/v7/a%20b/%c3%a9%2F") == 200
        assert status("/v7/./x/../%7eann", htu=f"{ORIGIN}/v7/~ann") == 200
        assert status("/v7/a/b", htu=f"{ORIGIN}/v7/a%2Fb") == 401
        assert status("/", host="evil.example", htu="https://evil.example/") == 401
        assert status("/") == 200
    with on_uvicorn(make_app(with_dpop(), clock=clock), http=http, root_path="/billing") as port:
        assert status("/x", htu=f"{ORIGIN}/billing/x") == 200, "what a proxy took off is put back by the server"
        assert status("/x", htu=f"{ORIGIN}/x") == 401


@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
def test_a_handshake_brings_its_proof_over_a_socket(ws):
    presented = bound_token()
    with on_uvicorn(make_app(with_dpop(required=True)), ws=ws) as port:
        headers = {name: value.decode() for name, value in dpop_headers(presented, htu=f"{ORIGIN}/live").items()}
        with (
            contextlib.suppress(ConnectionClosed),
            connect(f"ws://127.0.0.1:{port}/live?a=b", additional_headers=headers, open_timeout=60) as it,
        ):
            assert it.response.headers["x-user"] == "user_123"
        with pytest.raises(InvalidStatus) as again:
            connect(f"ws://127.0.0.1:{port}/live?a=b", additional_headers=headers, open_timeout=60)
        assert again.value.response.status_code == 401


# --- hostile input ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9_999), st.integers(0, 255)), min_size=1, max_size=3))
async def test_a_mutated_proof_never_passes_and_is_never_an_error(changes):
    app, presented = make_app(APP_POLICY), bound_token()
    made = bytearray(proof(presented))
    before = bytes(made)
    for place, byte in changes:
        made[place % len(made)] = byte
    status = (await drive(app, headers=dpop_headers(presented, bytes(made)))).status
    assert status == (200 if bytes(made) == before else 401)


APP_POLICY = with_dpop()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from(["typ", "alg", "jwk", "crit", "kid"]), JSON, max_size=2),
    st.dictionaries(st.sampled_from(["jti", "htm", "htu", "iat", "ath", "exp", "nbf"]), JSON, max_size=2),
    JSON | st.fixed_dictionaries({"jkt": JSON, "x5t#S256": JSON}),
)
async def test_whatever_proofs_and_confirmations_say_the_answer_is_a_refusal_or_right(header, claims, cnf):
    bad = token({**good_claims(), "cnf": cnf})
    for headers in (dpop_headers(bad), {"authorization": b"Bearer " + bad}):
        assert (await drive(make_app(APP_POLICY), headers=headers)).status == 401
    presented = bound_token()
    sent = await drive(make_app(APP_POLICY), headers=dpop_headers(presented, header=header, **claims))
    assert sent.status in (200, 401)
    if sent.status == 200:
        # What is right may be drawn too.
        right = {"alg": "ES256", "htm": "GET"}
        changed = {name for name, value in (header | claims).items() if value not in (None, right.get(name))}
        assert not {"typ", "alg", "jwk", "crit", "htm", "htu", "ath"} & changed


async def test_nothing_of_a_proof_or_a_token_is_logged_or_shown(caplog):
    caplog.set_level(logging.DEBUG)
    presented = bound_token()
    made = proof(presented, jti="canary-jti", htu="https://canary.example/")
    sent = await drive(make_app(with_dpop()), headers=dpop_headers(presented, made))
    assert sent.status == 401
    assert "canary" not in caplog.text + sent.body.decode()
    assert made.decode()[:30] not in sent.body.decode()


# --- configuration ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_fails_when_it_is_made():
    for senders in ((DPoP(origin=ORIGIN), DPoP(origin=ORIGIN)), (ClientCertificate(), ClientCertificate())):
        with pytest.raises(ValidationError, match="two of one kind"):
            make_bearer(*senders)
    with pytest.raises(ValidationError, match="sender_required takes a sender"):
        make_bearer(sender_required=True)
    with pytest.raises(ValidationError, match="contradict"):
        with_dpop(sender_required=True, accept_bound_tokens_without_proof=True)
    with pytest.raises(ValidationError, match="sender"):
        make_bearer("DPoP")


def test_one_sender_need_not_be_a_list():
    sender = DPoP(origin=ORIGIN)
    assert BearerAuth(issuers=[make_issuer()], sender=sender).sender == (sender,)
    assert BearerAuth(issuers=[make_issuer()], sender=[sender]).sender[0] is sender


@pytest.mark.parametrize("remote", [False, True])
async def test_keys_that_are_fetched_and_proofs_go_together(remote):
    pair = Pair("k")
    provider = Provider(pair)
    sender = DPoP(origin=ORIGIN, replays=Remote() if remote else None)
    app = make_app(BearerAuth(issuers=[provider.issuer()], sender=sender))
    presented = pair.token(cnf={"jkt": thumbprint(client_jwk())})
    for _ in range(2):
        headers = dpop_headers(presented)
        assert [(await drive(app, headers=headers)).status for _ in range(2)] == [200, 401]
    assert provider.fetches == 1

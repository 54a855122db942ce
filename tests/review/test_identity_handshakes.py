"""What comes in a WebSocket's handshake is verified by every policy, counted when it is a guess, and shown nowhere."""

import io
import json
import time
from typing import Any

import pytest
from pydantic import SecretStr

from sigil_policy.core.catalogue import PROOF_NONCE_REQUIRED
from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.dpop import DPoP
from sigil_policy.identity.requirements import FromIssuer
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.mcp import McpTools
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.stores.tickets import MemoryTickets, Ticket, new_ticket
from sigil_policy.telemetry.logs import JSONLines
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.identity.material import NOW, URL, make_issuer, token
from tests.identity.proofs import ORIGIN, bound_token, dpop_headers

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN, RECORD = new_key(pepper=PEPPER, subject="nightly-job", scopes=["agents:read"])
KEY = PLAIN.get_secret_value()
TOKEN = token().decode()
OFFERS = "sec-websocket-protocol"
OTHER = "https://other.example"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": []})
        caller = get_exchange(scope).get(Principal)
        await send({"type": "websocket.send", "text": "nobody" if caller is None else caller.subject})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def stack(*policies: Policy, clock: FrozenClock | None = None, app: Any = hello) -> PolicyStack:
    return PolicyStack(app, list(policies), clock=clock or FrozenClock(NOW))


def keys(*records: Any, **options: Any) -> ApiKeyAuth:
    return ApiKeyAuth(store=MemoryApiKeyStore(records or [RECORD]), pepper=PEPPER, **options)


def codes(sent: Sent) -> tuple[int, str | None]:
    return sent.status, sent.json().get("error_code") if sent.status >= 400 else None


async def shake(app: Any, *offers: str, **options: Any) -> Sent:
    headers = {OFFERS: ", ".join(offers)} if offers else {}
    return await drive(app, kind="websocket", headers={**headers, **options.pop("headers", {})}, **options)


# --- guesses are counted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["token", "key", "ticket", "query"])
@pytest.mark.parametrize("extensions", [{"websocket.http.response": {}}, {}], ids=["a response", "a close"])
async def test_guesses_in_a_handshake_are_counted(way: str, extensions: Any) -> None:
    app = stack(
        AuthFailureLimit(addresses="3/hour", credentials=None, everywhere=None,
                         websocket_protocols=["sigil.bearer", "sigil.key", "sigil.ticket"]),
        WebSocketTicketAuth(store=MemoryTickets(), websocket_protocol="sigil.ticket"),
        BearerAuth(issuers=[make_issuer()], websocket_protocol="sigil.bearer"),
        keys(websocket_protocol="sigil.key"),
        Scopes(),
    )  # fmt: skip

    async def guess() -> Any:
        offers: tuple[str, ...] = {
            "token": ("sigil.bearer", f"{TOKEN[:-6]}AAAAAA"),
            "key": ("sigil.key", f"{KEY[:-6]}000000"),
            "ticket": ("sigil.ticket", new_ticket()),
            "query": (),
        }[way]
        query = f"x=1&ticket={new_ticket()}" if way == "query" else ""
        return await shake(app, *offers, query=query, scope={"extensions": extensions})

    answers = [await guess() for _ in range(4)]
    if extensions:
        assert [sent.status for sent in answers] == [401, 401, 401, 429]
    else:
        assert [sent.messages[0]["type"] for sent in answers] == ["websocket.close"] * 4
        assert answers[3].messages[0] != answers[2].messages[0]
    # No other address is refused, and no handshake that guesses nothing.
    assert (await shake(app, "sigil.bearer", TOKEN, client=("198.51.100.9", 1))).status == 101
    assert (await shake(app, "chat.v2", scope={"extensions": {"websocket.http.response": {}}})).status == 401


async def test_used_tickets_push_no_credential_out_of_those_that_were_accepted_lately() -> None:
    store, limit = MemoryTickets(), AuthFailureLimit(accepted=2)
    app = stack(limit, WebSocketTicketAuth(store=store), BearerAuth(issuers=[make_issuer()]), Scopes(),
                WebSocketTickets(store=store))  # fmt: skip
    auth = {"authorization": f"Bearer {TOKEN}"}
    for _ in range(5):
        sold = await drive(app, "POST", "/ws-ticket", headers=auth)
        assert (await shake(app, query=f"ticket={sold.json()['ticket']}")).status == 101
    assert len(limit._accepted) == 1


async def test_who_is_asked_for_a_nonce_has_not_failed() -> None:
    """RFC 9449 section 9: every client's first proof lacks it."""
    secret = SecretStr("canary-nonce-secret-0d1c-of-32-bytes-at-least")
    limit = AuthFailureLimit(addresses="2/hour", credentials="2/hour", everywhere=None, accepted=0)
    app = stack(limit, BearerAuth(issuers=[make_issuer()], sender=DPoP(origin=ORIGIN, nonce_secret=secret)))
    presented = bound_token()
    for _ in range(4):
        sent = await drive(app, headers=dpop_headers(presented))
        assert codes(sent) == (401, PROOF_NONCE_REQUIRED.code)
    nonce = sent.header("dpop-nonce")
    assert (await drive(app, headers=dpop_headers(presented, nonce=nonce))).status == 200
    statuses = [(await drive(app, headers=dpop_headers(presented, htm="PUT"))).status for _ in range(3)]
    assert statuses == [401, 401, 429], "what else is wrong with a proof is a failure"


async def test_a_token_is_one_credential_whichever_scheme_it_comes_with() -> None:
    limit = AuthFailureLimit(addresses="9/hour", credentials="2/hour", everywhere=None)
    app = stack(limit, BearerAuth(issuers=[make_issuer()], sender=DPoP(origin=ORIGIN)))
    forged = f"{TOKEN[:-6]}AAAAAA"
    schemes = ("Bearer", "DPoP", "dpop ", "bearer")
    statuses = [(await drive(app, headers={"authorization": f"{name} {forged}"})).status for name in schemes]
    assert statuses == [401, 401, 429, 429]


# --- who is inside verifies what somebody outside has accepted --------------------------------------------------------


@pytest.mark.parametrize("inner", [{}, {"websocket_protocol": "sigil.other"}])
async def test_a_token_that_an_inner_policy_cannot_see_is_refused(inner: Any) -> None:
    outer = BearerAuth(issuers=[make_issuer()], websocket_protocol="sigil.bearer")
    strict = BearerAuth(issuers=[make_issuer(audience="admin")], **inner)
    for app in (stack(Problems(), outer, strict, Scopes()), PolicyStack(stack(strict, Scopes()), [Problems(), outer])):
        assert codes(await shake(app, "sigil.bearer", TOKEN)) == (401, "AUTH_002")
    assert (await shake(stack(outer, Scopes()), "sigil.bearer", TOKEN)).status == 101
    same = BearerAuth(issuers=[make_issuer()], websocket_protocol="sigil.bearer")
    assert (await shake(stack(outer, same, Scopes()), "sigil.bearer", TOKEN)).status == 101
    assert (await shake(stack(Problems(), outer, strict, Scopes()))).status == 401


async def test_a_key_that_an_inner_policy_cannot_see_is_refused() -> None:
    """The inner store may know fewer."""
    _, another = new_key(pepper=PEPPER, subject="somebody")
    inner = keys(another)
    outer = keys(websocket_protocol="sigil.key")
    assert codes(await shake(stack(Problems(), outer, inner, Scopes()), "sigil.key", KEY)) == (401, "AUTH_005")
    outer = keys(bearer=True)
    app = stack(Problems(), outer, inner, Scopes())
    assert codes(await drive(app, headers={"authorization": f"Bearer {KEY}"})) == (401, "AUTH_005")
    assert codes(await drive(app, headers={"x-api-key": KEY})) == (401, "AUTH_005")
    assert (await drive(stack(outer, keys(bearer=True), Scopes()),
                        headers={"authorization": f"Bearer {KEY}"})).status == 200  # fmt: skip


async def test_keys_in_headers_of_their_own_are_two_ways_in() -> None:
    plain, legacy = new_key(pepper=PEPPER, subject="legacy-job")
    store = MemoryTickets()
    app = stack(
        Problems(), WebSocketTicketAuth(store=store), keys(), keys(legacy, header="X-Legacy-Key"), Scopes(),
        WebSocketTickets(store=store),
    )  # fmt: skip
    for name, key in (("x-api-key", KEY), ("x-legacy-key", plain.get_secret_value())):
        assert (await drive(app, headers={name: key})).status == 200
        sold = await drive(app, "POST", "/ws-ticket", headers={name: key})
        assert (await shake(app, query=f"ticket={sold.json()['ticket']}")).status == 101


async def test_a_token_that_an_inner_policy_leaves_to_others_is_refused_where_it_was_taken() -> None:
    """What begins with `foreign_prefix` is nobody's token to the inner one."""
    outer = _Says(who=Principal(subject="ann", issuer=OTHER))
    inner = BearerAuth(issuers=[make_issuer()], foreign_prefix="op_")
    sent = await drive(stack(Problems(), outer, inner, Scopes()), headers={"authorization": "Bearer op_123"})
    assert codes(sent) == (401, "AUTH_002")


class _Says(Policy):
    gives = (Principal,)

    who: Principal

    def on_request(self, ex: Any) -> None:
        ex.authenticate(self.who)


async def test_a_cosigned_token_is_verified_by_an_inner_policy_too() -> None:
    key = ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER, conflicts_with=None)
    outer = BearerAuth(issuers=[make_issuer()], conflicts_with=None)
    inner = BearerAuth(issuers=[make_issuer(audience="admin")], conflicts_with="X-Other")
    headers = {"x-api-key": KEY, "authorization": f"Bearer {TOKEN}"}
    route = Scopes(routes={"/**": FromIssuer(URL)})
    assert (await drive(stack(Problems(), key, outer, route), headers=headers)).status == 200
    assert codes(await drive(stack(Problems(), key, outer, inner, route), headers=headers)) == (401, "AUTH_002")


# --- tickets ----------------------------------------------------------------------------------------------------------


async def sell(store: Any, *policies: Policy, headers: Any, clock: FrozenClock | None = None) -> Sent:
    app = stack(Problems(), *policies, Scopes(), WebSocketTickets(store=store), clock=clock)
    return await drive(app, "POST", "/ws-ticket", headers=headers)


async def test_a_ticket_of_an_issuer_that_is_not_trusted_here_opens_nothing() -> None:
    store = MemoryTickets()
    auth = {"authorization": f"Bearer {TOKEN}"}
    tickets = [(await sell(store, BearerAuth(issuers=[make_issuer()]), headers=auth)).json()["ticket"] for _ in "12"]
    elsewhere = BearerAuth(issuers=[make_issuer(url=OTHER)])
    app = stack(Problems(), WebSocketTicketAuth(store=store), elsewhere, Scopes())
    assert codes(await shake(app, query=f"ticket={tickets[0]}")) == (401, "AUTH_002")
    app = stack(WebSocketTicketAuth(store=store), BearerAuth(issuers=[make_issuer()]), Scopes())
    assert (await shake(app, query=f"ticket={tickets[1]}")).status == 101


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("change", ["ended", "gone", "fewer scopes"])
async def test_a_connection_ends_with_the_key_that_bought_its_ticket(order: str, change: str) -> None:
    store, records = MemoryTickets(), [RECORD]

    class Keys(MemoryApiKeyStore):
        def find(self, key_id: str) -> Any:
            return next((record for record in records if record.id == key_id), None)

    clock = FrozenClock(NOW)
    auth = ApiKeyAuth(store=Keys(), pepper=PEPPER, recheck=30)
    sold = await sell(store, auth, headers={"x-api-key": KEY}, clock=clock)
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            message = await receive()
            heard.append(message["type"])
            if message["type"] == "websocket.disconnect":
                return
            clock.advance(20)
            if len(heard) == 2:
                records[:] = {
                    "ended": [RECORD.ending(NOW)],
                    "gone": [],
                    "fewer scopes": [type(RECORD)(**{**RECORD.as_dict(), "scopes": ()})],
                }[change]

    pair = [WebSocketTicketAuth(store=store), auth] if order == "inside" else [auth, WebSocketTicketAuth(store=store)]
    talk = [{"type": "websocket.connect"}, *[{"type": "websocket.receive", "text": "x"}] * 9]
    sent = await drive(stack(*pair, Scopes(), app=app, clock=clock), kind="websocket",
                       query=f"ticket={sold.json()['ticket']}", incoming=talk)  # fmt: skip
    assert sent.messages[-1] == {"type": "websocket.close", "code": 4401, "reason": "the credential has ended"}
    assert heard == ["websocket.receive"] * 2 + ["websocket.disconnect"]


@pytest.mark.parametrize(
    ("change", "stays"),
    [({"scopes": ()}, False), ({"subject": "somebody"}, False), ({"tier": "max"}, True),
     ({"scopes": ("agents:read", "agents:write")}, True)],
)  # fmt: skip
async def test_a_connection_ends_with_what_its_key_may_do(change: Any, stays: bool) -> None:
    """It was let in by scopes that the key had then."""
    records, clock, heard = [RECORD], FrozenClock(NOW), []

    class Keys(MemoryApiKeyStore):
        def find(self, key_id: str) -> Any:
            return records[-1]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            heard.append(1)
            clock.advance(31)
            records.append(type(RECORD)(**{**RECORD.as_dict(), **change}))

    policies = [ApiKeyAuth(store=Keys(), pepper=PEPPER), Scopes(routes={"/**": "agents:read"})]
    talk = [{"type": "websocket.connect"}, *[{"type": "websocket.receive", "text": "x"}] * 3]
    talk.append({"type": "websocket.disconnect", "code": 1000})
    sent = await drive(stack(*policies, app=app, clock=clock), kind="websocket", headers={"x-api-key": KEY},
                       incoming=talk)  # fmt: skip
    assert (len(heard), sent.messages[-1].get("code")) == ((3, None) if stays else (1, 4401))


async def test_a_ticket_of_a_key_that_was_ended_meanwhile_opens_nothing() -> None:
    store = MemoryTickets()
    sold = await sell(store, keys(), headers={"x-api-key": KEY})
    app = stack(Problems(), WebSocketTicketAuth(store=store), keys(RECORD.ending(NOW - 1)), Scopes())
    assert codes(await shake(app, query=f"ticket={sold.json()['ticket']}")) == (401, "AUTH_005")


async def test_a_ticket_beside_another_credential_is_a_contradiction() -> None:
    store, auth = MemoryTickets(), {"authorization": f"Bearer {TOKEN}"}
    token_pair = BearerAuth(issuers=[make_issuer()], websocket_protocol="sigil.bearer")
    app = stack(
        Problems(), WebSocketTicketAuth(store=store), token_pair, keys(websocket_protocol="sigil.key"), Scopes()
    )
    for offers in (("sigil.bearer", TOKEN), ("sigil.key", KEY)):
        sold = await sell(store, token_pair, headers=auth)
        sent = await shake(app, *offers, query=f"ticket={sold.json()['ticket']}")
        assert codes(sent) == (400, "AUTH_006")


async def test_an_inner_policy_asks_what_a_ticket_is_for() -> None:
    """The outer one has taken it, and knows no audience."""
    store, auth = MemoryTickets(), {"authorization": f"Bearer {TOKEN}"}
    inner = WebSocketTicketAuth(store=store, audiences={"/admin/**": "admin"})
    app = stack(Problems(), WebSocketTicketAuth(store=store), inner, Scopes())
    for path, status in (("/admin/x", 401), ("/open", 101), ("/open/../admin/x", 401)):
        sold = await sell(store, BearerAuth(issuers=[make_issuer()]), headers=auth)
        assert (await shake(app, path=path, query=f"ticket={sold.json()['ticket']}")).status == status


async def test_a_ticket_far_back_in_a_query_is_none() -> None:
    """Who searches long queries keeps others waiting."""
    store, auth = MemoryTickets(), {"authorization": f"Bearer {TOKEN}"}
    sold = await sell(store, BearerAuth(issuers=[make_issuer()]), headers=auth)
    app = stack(Problems(), WebSocketTicketAuth(store=store), BearerAuth(issuers=[make_issuer()]), Scopes())
    query = f"ticket={sold.json()['ticket']}"
    assert codes(await shake(app, query="%" * 9_000 + f"&{query}")) == (401, "AUTH_001")
    assert (await shake(app, query="%" * 7_000 + f"&{query}")).status == 101


async def test_two_credentials_that_vouch_together_buy_no_ticket() -> None:
    store = MemoryTickets()
    auth = [BearerAuth(issuers=[make_issuer()], conflicts_with=None), keys(conflicts_with=None)]
    both = {"x-api-key": KEY, "authorization": f"Bearer {TOKEN}"}
    sent = await sell(store, *auth, headers=both)
    assert codes(sent) == (400, "AUTH_006") and len(store) == 0
    assert sent.header("www-authenticate") == 'Bearer realm="api", error="invalid_request"'
    assert (await sell(store, *auth, headers={"x-api-key": KEY})).status == 201


@pytest.mark.parametrize(
    "claims",
    [
        {f"a{number}": {} for number in range(480)},
        {"a": [1.2345678901234567e-300] * 150},
        {"a": [""] * 1_300},
        {f"a{number}": {} for number in range(60)},
        {"a": ["\u1234"] * 300},
    ],
)
def test_a_ticket_takes_no_time_to_write_or_to_read(claims: Any) -> None:
    caller = Principal(subject="ann", claims=claims)

    def write() -> bytes | None:
        try:
            return Ticket(caller).encode()
        except ValueError:
            return None

    def least(work: Any) -> float:
        times = []
        for _ in range(30):
            begun = time.thread_time()
            work()
            times.append(time.thread_time() - begun)
        return min(times)

    # As long as reading so much JSON takes, a few times over: the machine may be slow.
    unit = least(lambda: json.loads(json.dumps(["abcdefgh"] * 400)))
    assert least(write) < 10 * unit
    record = write()
    if record is not None:
        assert least(lambda: Ticket.decode(record)) < 10 * unit


# --- a store that raises anything -------------------------------------------------------------------------------------


class Broken:
    """A store that raises `error`, at once or when it is waited for, or answers what it should not."""

    remote = True

    def __init__(self, error: BaseException | None = None, *, later: bool = False, reply: Any = None) -> None:
        self.error, self.later, self.reply = error, later, reply

    def _act(self, *_: Any, **__: Any) -> Any:
        async def act() -> Any:
            if self.error is not None:
                raise self.error
            return self.reply

        if self.later:
            return act()
        if self.error is not None:
            raise self.error
        return self.reply

    issue = redeem = claim = refresh = _act

    def age(self, now: float) -> Any:
        return float("inf") if self.later else self._act()

    def resting(self, now: float) -> Any:
        return False if self.later else self._act()

    def revoked(self, **_: Any) -> Any:
        return False if self.later else self._act()


FAULTS = [
    Broken(ZeroDivisionError("redis://:canary-password-91@host")),
    Broken(OSError("redis://:canary-password-91@host"), later=True),
    Broken(reply="yes"),
    Broken(reply="yes", later=True),
]


@pytest.mark.parametrize("store", FAULTS)
async def test_a_store_that_breaks_is_503_and_never_500(store: Any, capsys: Any, caplog: Any) -> None:
    auth = BearerAuth(issuers=[make_issuer()])
    bearer = {"authorization": f"Bearer {TOKEN}"}
    sent = await sell(store, auth, headers=bearer)
    assert codes(sent) == (503, "SRV_503") and sent.header("retry-after") == "1"
    app = stack(Problems(), WebSocketTicketAuth(store=store), auth, Scopes())
    opened = await shake(app, query=f"ticket={new_ticket()}")
    assert codes(opened) == (503, "SRV_503")
    proofs = DPoP(origin=ORIGIN, replays=store)
    presented = bound_token()
    app = stack(Problems(), BearerAuth(issuers=[make_issuer()], sender=proofs))
    proved = await drive(app, headers=dpop_headers(presented))
    assert codes(proved) == (503, "SRV_503")
    app = stack(Problems(), auth, Revocation(store=store), Scopes())
    judged = await drive(app, headers=bearer)
    assert codes(judged) == (503, "SRV_503")
    app = stack(Problems(), auth, Revocation(store=store, on_store_loss="open"), Scopes())
    assert (await drive(app, headers=bearer)).status == 200
    told = capsys.readouterr()
    everything = told.out + told.err + caplog.text + str([s.body for s in (sent, opened, proved, judged)])
    assert "canary" not in everything and repr(proofs).count("canary") == 0


@pytest.mark.parametrize(("loss", "status"), [("closed", 503), ("open", 401), ("local", 401)])
async def test_failures_that_cannot_be_counted_are_no_error(loss: Any, status: int) -> None:
    class Counters:
        remote, algorithms = True, ("fixed",)

        def prepare(self, plan: Any) -> None: ...

        async def admit(self, *_: Any) -> Any:
            raise ZeroDivisionError("redis://:canary-password-91@host")

        charge = admit

    limit = AuthFailureLimit(store=Counters(), on_store_loss=loss, expected_replicas=1)
    sent = await drive(stack(Problems(), limit, keys(), Scopes()), headers={"x-api-key": f"{KEY[:-6]}000000"})
    assert sent.status == status


# --- the scheme of a challenge, and what is shown ---------------------------------------------------------------------


async def test_a_challenge_names_the_scheme_that_was_used() -> None:
    """RFC 9449 section 7.1."""
    auth = BearerAuth(issuers=[make_issuer()], sender=DPoP(origin=ORIGIN))
    revocations = MemoryRevocations(clock=FrozenClock(NOW))
    presented, plain = bound_token(jti="t9"), {"authorization": f"Bearer {TOKEN}"}
    for policy in (Scopes(routes={"/**": "admin:all"}), McpTools(methods={"*": "admin:all"})):
        app = stack(Problems(), auth, policy)
        line = (await drive(app, headers=dpop_headers(presented))).header("www-authenticate")
        assert line == 'DPoP realm="api", error="insufficient_scope", scope="admin:all"'
        line = (await drive(app, headers=plain)).header("www-authenticate")
        assert line == 'Bearer realm="api", error="insufficient_scope", scope="admin:all"'
    await revocations.revoke(jti="t9", until=NOW + 3_600)
    app = stack(Problems(), auth, Revocation(store=revocations), Scopes())
    sent = await drive(app, headers=dpop_headers(presented))
    assert codes(sent) == (401, "AUTH_002")
    assert sent.header("www-authenticate") == 'DPoP realm="api", error="invalid_token"'


async def test_a_ticket_stands_in_no_log_no_problem_and_no_error() -> None:
    lines = io.StringIO()
    store = MemoryTickets()

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError(f"cannot serve {scope['query_string'].decode()}")

    auth = BearerAuth(issuers=[make_issuer()])
    log = AccessLog(include_query=True, logger=JSONLines(lines))
    app = stack(log, Problems(), WebSocketTicketAuth(store=store), auth, Scopes(), app=fails)
    ticket = (await sell(store, auth, headers={"authorization": f"Bearer {TOKEN}"})).json()["ticket"]
    shown = ""
    for query in (f"a=1&ticket={ticket}", f"ticket={new_ticket()}", f"t={ticket}", f"x={ticket}x", "t=wst_" + "a" * 43):
        sent = await drive(app, kind="websocket", query=query, raise_errors=False)
        shown += str(sent.messages) + lines.getvalue()
        assert query.rpartition("=")[2] not in shown
    assert lines.getvalue()

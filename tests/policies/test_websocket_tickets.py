"""Tickets for WebSockets: bought with a credential, good for one connection. WS-nn are the rules of the checklist."""

import io
import json
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.tickets import RedisTickets
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.stores.tickets import MemoryTickets, Ticket, new_ticket, ticket_digest
from sigil_policy.telemetry.logs import JSONLines
from sigil_policy.testing import FrozenClock, Sent, drive
from sigil_policy.testing.rules import broken_rules
from tests.identity.material import NOW, good_claims, make_issuer, token
from tests.stores.redis.servers import Server

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN, RECORD = new_key(pepper=PEPPER, subject="nightly-job", scopes=["agents:read"], tier="max")
PAGE = "https://app.example"


def bearer(**claims: Any) -> dict[str, bytes]:
    return {"authorization": b"Bearer " + token(good_claims(**{"jti": "t1", **claims}))}


class Inside:
    """The application: keeps the callers of the sockets that reached it, and selects a subprotocol."""

    def __init__(self, select: str | None = None) -> None:
        self.callers: list[Principal | None] = []
        self.paths: list[str] = []
        self.select = select

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        if scope["type"] == "websocket":
            self.callers.append(get_exchange(scope).get(Principal))
            selected = {} if self.select is None else {"subprotocol": self.select}
            await send({"type": "websocket.accept", "headers": [], **selected})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


class Service:
    """A whole service with tickets: `buy` one, `open` a socket."""

    def __init__(
        self,
        store: Any = None,
        *,
        auth: Any = None,
        tickets: Any = None,
        between: Any = (),
        outside: Any = (),
        within: Any = (),
        select: str | None = None,
    ) -> None:
        self.clock = FrozenClock(NOW)
        self.store = MemoryTickets() if store is None else store
        self.inside = Inside(select)
        policies = [
            Problems(),
            *outside,
            WebSocketTicketAuth(store=self.store, **(auth or {})),
            BearerAuth(issuers=[make_issuer()]),
            ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER),
            *between,
            Scopes(routes={"/ws/agents": "agents:read", "/ws/admin": "admin:all"}),
            *within,
            WebSocketTickets(store=self.store, **(tickets or {})),
        ]
        self.app = PolicyStack(self.inside, policies, clock=self.clock)

    async def post(self, headers: Any = None, *, method: str = "POST", path: str = "/ws-ticket", **more: Any) -> Sent:
        sent = await drive(self.app, method, path, headers={**(bearer() if headers is None else headers), **more})
        assert not broken_rules(sent.messages)
        return sent

    async def buy(self, headers: Any = None, **more: Any) -> str:
        sent = await self.post(headers, **more)
        assert sent.status == 201, sent.json()
        return str(sent.json()["ticket"])

    async def open(self, ticket: str | None = None, *, path: str = "/ws", query: Any = None, **options: Any) -> Sent:
        query = (b"" if ticket is None else f"ticket={ticket}") if query is None else query
        sent = await drive(self.app, kind="websocket", path=path, query=query, **options)
        assert not broken_rules(sent.messages)
        return sent


def same(one: Sent, other: Sent) -> bool:
    return (one.status, one.body, one.headers) == (other.status, other.body, other.headers)


# --- the way of a ticket ----------------------------------------------------------------------------------------------


async def test_a_ticket_opens_one_socket_as_its_caller() -> None:
    """WS-03"""
    service = Service()
    sent = await service.post()
    assert sent.status == 201
    assert sent.json() == {"ticket": sent.json()["ticket"], "expires_in": 30}
    assert (sent.header("content-type"), sent.header("cache-control")) == ("application/json", "no-store")
    assert sent.header("content-length") == str(len(sent.body))
    assert service.inside.paths == [], "the application never sees it"
    ticket = sent.json()["ticket"]
    assert (await service.open(ticket, path="/ws/agents")).status == 101
    [caller] = service.inside.callers
    assert caller is not None
    assert (caller.subject, caller.kind, caller.tier, caller.issuer) == (
        "user_123",
        "bearer",
        "pro",
        "https://auth.sigil.acti.ai",
    )
    assert caller.scopes == {"agents:read", "agents:write"} and caller.claims["jti"] == "t1"
    with pytest.raises(TypeError):
        caller.claims["jti"] = "t2"  # type: ignore[index]
    second = await service.open(ticket, path="/ws/agents")
    assert (second.status, second.json()["error_code"]) == (401, "AUTH_009")
    assert len(service.inside.callers) == 1


async def test_an_api_keys_ticket_is_that_key() -> None:
    service = Service()
    assert (await service.open(await service.buy({"x-api-key": PLAIN.get_secret_value()}))).status == 101
    [caller] = service.inside.callers
    assert caller is not None
    assert (caller.subject, caller.kind, caller.tier, caller.scopes) == (
        "nightly-job",
        "api_key",
        "max",
        {"agents:read"},
    )


async def test_scopes_are_asked_of_the_ticket_too() -> None:
    service = Service()
    sent = await service.open(await service.buy(), path="/ws/admin")
    assert (sent.status, sent.json()["error_code"]) == (403, "AUTH_004")


async def test_every_wrong_ticket_gets_the_same_answer() -> None:
    service = Service()
    used, late, foreign = await service.buy(), await service.buy(), await service.buy(origin=PAGE)
    await service.open(used)
    answers = [await service.open(used), await service.open(foreign), await service.open(new_ticket())]
    service.clock.advance(30)
    answers.append(await service.open(late))
    answers += [await service.open(text) for text in ("", "x", "wst_", "%00", "wst_" + "a" * 4_000)]
    for sent in answers:
        sent.messages[1]["body"] = sent.body.replace(b"22:13:50", b"22:13:20")  # the moment
        assert same(sent, answers[0])
    assert answers[0].status == 401
    assert answers[0].header("www-authenticate") == 'Bearer realm="api", error="invalid_token"'
    assert len(service.inside.callers) == 1, "the one who used it"


async def test_no_ticket_is_no_mistake() -> None:
    service = Service()
    sent = await service.open()
    assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_001")
    assert sent.header_lines("www-authenticate")[0] == 'Bearer realm="api"'
    assert (await service.open(headers=bearer())).status == 101
    assert (await service.open(query=b"myticket=x&ticketx=y&ticket", headers=bearer())).status == 101


async def test_alone_it_says_who_nobody_is_and_how_to_be_somebody() -> None:
    users: list[Any] = []

    async def public(scope: Any, receive: Any, send: Any) -> None:
        users.append(scope["user"])
        await send({"type": "websocket.accept"})

    policies = [WebSocketTicketAuth(store=MemoryTickets(), realm="sockets"), Scopes(public=["/ws/ticker"])]
    app = PolicyStack(public, policies, clock=FrozenClock(NOW))
    assert (await drive(app, kind="websocket", path="/ws/ticker")).status == 101
    assert not users[0].is_authenticated
    sent = await drive(app, kind="websocket", path="/ws")
    assert (sent.status, sent.header("www-authenticate")) == (401, 'Bearer realm="sockets"')


async def test_a_ticket_is_no_credential_for_http() -> None:
    service = Service()
    ticket = await service.buy()
    for method in ("GET", "POST"):
        sent = await drive(service.app, method, "/ws/agents", query=f"ticket={ticket}")
        assert sent.status == 401
    assert (await drive(service.app, "POST", "/ws-ticket", query=f"ticket={ticket}")).status == 401
    assert (await drive(service.app, headers={"authorization": f"Bearer {ticket}"})).status == 401
    assert (await service.open(ticket)).status == 101, "it was not used up"


async def test_of_two_handshakes_at_once_one_passes() -> None:
    service = Service()
    statuses: list[int] = []
    for _ in range(20):
        ticket = await service.buy()

        async def handshake(ticket: str = ticket) -> None:
            statuses.append((await service.open(ticket)).status)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(handshake)
    assert sorted(statuses) == [101] * 20 + [401] * 40


# --- how long ---------------------------------------------------------------------------------------------------------


async def test_a_ticket_never_outlives_the_credential() -> None:
    service = Service()
    leeway = make_issuer().leeway
    sent = await service.post(bearer(exp=int(NOW) + 5 - int(leeway)))
    assert sent.json()["expires_in"] == 5
    service.clock.advance(4.5)
    assert (await service.open(sent.json()["ticket"])).status == 101
    [caller] = service.inside.callers
    assert caller is not None and caller.expires == NOW + 5
    service = Service()
    ticket = await service.buy(bearer(exp=int(NOW) + 5 - int(leeway)))
    service.clock.advance(5)
    assert (await service.open(ticket)).status == 401


async def test_a_connection_ends_with_the_credential_that_bought_its_ticket() -> None:
    """WS-08"""
    service = Service()
    heard: list[Any] = []

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await receive()
        for _ in range(2):
            heard.append(await receive())
            service.clock.advance(5)

    ticket = await service.buy(bearer(exp=int(NOW) + 8 - int(make_issuer().leeway)))
    app = PolicyStack(listening, [WebSocketTicketAuth(store=service.store)], clock=service.clock)
    text = {"type": "websocket.receive", "text": "hello"}
    incoming = [{"type": "websocket.connect"}, text, text, text, text]
    sent = await drive(app, kind="websocket", query=f"ticket={ticket}", incoming=incoming)
    assert [message["type"] for message in heard] == ["websocket.receive"] * 2
    assert sent.messages[-1]["type"] == "websocket.accept"
    heard.clear()
    ticket = await service.buy(bearer(exp=int(service.clock.time()) + 4 - int(make_issuer().leeway)))
    sent = await drive(app, kind="websocket", query=f"ticket={ticket}", incoming=incoming)
    assert [message["type"] for message in heard] == ["websocket.receive", "websocket.disconnect"]
    assert (sent.messages[-1]["type"], sent.messages[-1]["code"]) == ("websocket.close", 4401)


async def test_a_clock_that_is_set_does_not_prolong_a_ticket() -> None:
    service = Service()
    ticket = await service.buy()
    service.clock.advance(30)
    service.clock.jump(-20)
    assert (await service.open(ticket)).status == 401
    service = Service()
    ticket = await service.buy()
    service.clock.jump(4_000)
    assert (await service.open(ticket)).status == 401, "the token has ended by then"


async def test_its_time_can_be_chosen() -> None:
    service = Service(tickets={"ttl": 2})
    ticket = await service.buy()
    service.clock.advance(2)
    assert (await service.open(ticket)).status == 401
    for ttl in (0, 301, 1.5):
        with pytest.raises(ValidationError, match="ttl"):
            WebSocketTickets(store=MemoryTickets(), ttl=ttl)  # type: ignore[arg-type]


async def test_a_revoked_tokens_ticket_is_refused_by_the_original_claims() -> None:
    for what in (
        {"jti": "t1"},
        {"subject": "user_123", "issued_before": NOW},
        {"issuer": "https://auth.sigil.acti.ai"},
    ):
        revocations = MemoryRevocations(clock=FrozenClock(NOW))
        service = Service(between=[Revocation(store=revocations)])
        ticket, other = await service.buy(), await service.buy(bearer(jti="t2", sub="bob"))
        await revocations.revoke(**what)  # type: ignore[arg-type]
        assert (await service.open(ticket)).status == 401
        assert (await service.open(other)).status == (401 if "issuer" in what else 101)


async def test_a_ticket_counts_as_its_caller() -> None:
    service = Service(within=[RateLimit(tiers={"free": "3/hour", "pro": "3/hour"})])
    first, second = await service.buy(), await service.buy()
    assert (await service.open(first)).status == 101
    assert (await service.open(second)).status == 429


# --- what it is bound to ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bought", "opened", "status"),
    [
        (PAGE, PAGE, 101),
        (PAGE, "https://evil.example", 401),
        (PAGE, None, 401),
        (PAGE, PAGE.upper(), 401),
        (None, PAGE, 101),
        (None, None, 101),
        ("null", "null", 101),
        ("\xff", "\xff", 101),
    ],
)
async def test_a_ticket_opens_sockets_of_the_page_that_bought_it(
    bought: str | None, opened: str | None, status: int
) -> None:
    service = Service()
    ticket = await service.buy(**({} if bought is None else {"origin": bought}))
    headers = {} if opened is None else {"origin": opened}
    assert (await service.open(ticket, headers=headers)).status == status
    assert (await service.open(ticket, headers={"origin": PAGE})).status == 401, "it is used up, either way"


async def test_the_page_need_not_be_asked() -> None:
    service = Service(tickets={"bind_origin": False})
    ticket = await service.buy(origin=PAGE)
    assert (await service.open(ticket, headers={"origin": "https://other.example"})).status == 101


async def test_an_origin_that_cannot_be_kept_buys_nothing() -> None:
    service = Service()
    assert (await service.post(origin="https://" + "a" * 600)).status == 400
    pairs = [*bearer().items(), ("origin", PAGE), ("origin", PAGE)]
    assert (await drive(service.app, "POST", "/ws-ticket", headers=pairs)).status == 400


async def test_a_ticket_of_one_audience_opens_nothing_else() -> None:
    routes = {"/ws/agents/**": "agents", "WEBSOCKET /ws/chat": "chat"}
    service = Service(auth={"audiences": routes}, tickets={"audience": "agents"})
    for path, status in (
        ("/ws/agents", 101),
        ("/ws/agents/alpha/", 101),
        ("/ws/chat", 401),
        ("/ws", 401),
        ("/x/../ws/agents", 401),
    ):
        assert (await service.open(await service.buy(), path=path)).status == status, path
    service = Service(auth={"audiences": routes})
    for path, status in (("/ws/agents", 401), ("/ws", 101), ("/x/../ws/agents", 401)):
        assert (await service.open(await service.buy(), path=path)).status == status, path


# --- how it travels ---------------------------------------------------------------------------------------------------


async def test_more_than_one_credential_is_a_mistake() -> None:
    service = Service()
    ticket = await service.buy()
    for headers in (bearer(), {"x-api-key": PLAIN.get_secret_value()}):
        sent = await service.open(ticket, headers=headers)
        assert (sent.status, sent.json()["error_code"]) == (400, "AUTH_006")
    for query in (f"ticket={ticket}&ticket={ticket}", f"ticket={ticket}&x=1&ticket=", "ticket=&ticket=&ticket="):
        sent = await service.open(query=query)
        assert (sent.status, sent.json()["error_code"]) == (400, "AUTH_003")
    assert (await service.open(query=f"a=1&ticket={ticket}&b=2")).status == 101, "it was not used up"


async def test_a_huge_query_is_read_quickly_and_refused() -> None:
    service = Service()
    for query in (b"ticket=" * 9_000, b"&ticket=" * 8_000, b"&" * 60_000 + b"ticket=x", b"ticket=" + b"a" * 60_000):
        assert (await service.open(query=query)).status in (400, 401)


PAIR = {"websocket_protocol": "sigil.ticket"}


def protocols(*values: str, **more: Any) -> dict[str, str]:
    return {"sec-websocket-protocol": ", ".join(values), **more}


async def test_a_ticket_travels_as_a_pair_of_subprotocols() -> None:
    """WS-04: the answer selects what was offered, and never the credential."""
    service = Service(auth=PAIR)
    ticket = await service.buy()
    sent = await service.open(headers=protocols("sigil.ticket", ticket))
    assert (sent.status, sent.start.get("subprotocol")) == (101, "sigil.ticket")
    assert ticket not in str(sent.messages)
    assert service.inside.callers[0] is not None
    assert (await service.open(headers=protocols("sigil.ticket", ticket))).status == 401
    lines = [("sec-websocket-protocol", "sigil.ticket"), ("sec-websocket-protocol", await service.buy())]
    assert (await service.open(headers=lines)).status == 101


@pytest.mark.parametrize(("select", "selected"), [("chat.v2", "chat.v2"), (None, "sigil.ticket"), ("", "")])
async def test_the_application_selects_what_it_speaks(select: str | None, selected: str) -> None:
    service = Service(auth=PAIR, select=select)
    sent = await service.open(headers=protocols("chat.v2", "sigil.ticket", await service.buy()))
    assert (sent.status, sent.start.get("subprotocol")) == (101, selected)


async def test_an_application_that_takes_the_last_offer_does_not_show_the_ticket() -> None:
    service = Service(auth=PAIR)
    ticket = service.inside.select = await service.buy()
    sent = await service.open(headers=protocols("sigil.ticket", ticket))
    assert sent.start["subprotocol"] == "sigil.ticket"
    assert ticket not in str(sent.messages)


async def test_a_pair_that_cannot_be_read_is_a_mistake() -> None:
    service = Service(auth=PAIR)
    ticket = await service.buy()
    for values in (
        ["sigil.ticket"],
        ["sigil.ticket", ticket, ticket],
        ["sigil.ticket", "a b"],
        [ticket, "sigil.ticket"],
    ):
        sent = await service.open(headers=protocols(*values))
        assert (sent.status, sent.json()["error_code"]) == (400, "AUTH_003")
        assert ticket not in str(sent.messages)
    both = await service.open(ticket, headers=protocols("sigil.ticket", await service.buy()))
    assert (both.status, both.json()["error_code"]) == (400, "AUTH_006")
    assert (await service.open(ticket, headers=protocols("chat.v2"))).start.get("subprotocol") is None


async def test_the_query_need_not_carry_it() -> None:
    service = Service(auth={**PAIR, "query": None})
    ticket = await service.buy()
    sent = await service.open(ticket)
    assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_001")
    assert (await service.open(headers=protocols("sigil.ticket", ticket))).status == 101
    renamed = Service(auth={"query": "t.x"})
    assert (await renamed.open(query=f"t.x={await renamed.buy()}")).status == 101
    assert (await renamed.open(query=f"tax={await renamed.buy()}")).status == 401


PIECES = st.lists(
    st.sampled_from(
        ["ticket=", "&", "sigil.ticket", ", ", ",", "wst_", "a" * 43, "%74icket=", "=", ";", "\xff", "\0", " "]
    ),
    max_size=10,
).map("".join)


@given(PIECES, st.lists(PIECES, max_size=3), PIECES)
def test_whatever_is_presented_an_answer_is_all_that_comes_out(query: str, lines: list[str], origin: str) -> None:
    async def present() -> Sent:
        service = Service(auth=PAIR)
        headers = [("origin", origin), *(("sec-websocket-protocol", line) for line in lines)]
        return await service.open(query=query.encode("latin-1"), headers=headers)

    sent = anyio.run(present)
    assert sent.json()["error_code"] in ("AUTH_001", "AUTH_003", "AUTH_006", "AUTH_009")
    assert "a" * 43 not in sent.body.decode()


# --- who may buy ------------------------------------------------------------------------------------------------------


async def test_nobody_buys_nothing_also_without_scopes() -> None:
    store = MemoryTickets()
    policies = [BearerAuth(issuers=[make_issuer()]), WebSocketTickets(store=store)]
    app = PolicyStack(Inside(), policies, clock=FrozenClock(NOW))
    sent = await drive(app, "POST", "/ws-ticket")
    assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_001")
    assert sent.header("www-authenticate") == 'Bearer realm="api"'
    assert (await drive(app, "POST", "/ws-ticket", headers={"authorization": "Bearer x.y.z"})).status == 401
    assert len(store) == 0


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_tickets_are_sold_by_post_alone(method: str) -> None:
    service = Service()
    sent = await service.post(method=method)
    assert (sent.status, sent.header("allow")) == (405, "POST")
    assert len(service.store) == 0
    assert method != "HEAD" or sent.body == b""


async def test_other_paths_are_the_applications() -> None:
    service = Service(tickets={"path": "/v7/ws/ticket"})
    assert (await service.post()).body == b"inside"
    for path in ("/v7/ws/ticket", "/v7/ws/ticket/", "//v7/ws/ticket"):
        assert (await service.post(path=path)).status == 201
    assert (await service.open(path="/v7/ws/ticket", headers=bearer())).status == 101


async def test_a_caller_has_so_many_unused_tickets() -> None:
    service = Service(tickets={"per_caller": 2})
    first, _ = await service.buy(), await service.buy()
    service.clock.advance(10)
    sent = await service.post()
    assert (sent.status, sent.json()["error_code"], sent.header("retry-after")) == (429, "RATE_005", "20")
    assert (await service.post(bearer(sub="bob"))).status == 201, "which is nothing to others"
    await service.open(first)
    assert (await service.post()).status == 201
    service.clock.advance(20)
    assert (await service.post()).status == 201


async def test_one_account_cannot_fill_the_store() -> None:
    service = Service(MemoryTickets(max_tickets=11))
    for _ in range(30):
        await service.post()
    assert len(service.store) == 10
    assert (await service.post(bearer(sub="bob"))).status == 201
    full = await service.post(bearer(sub="cleo"))
    assert (full.status, full.header("retry-after")) == (503, "30")


async def test_a_credential_that_says_too_much_buys_no_ticket() -> None:
    class Talkative(Policy):
        gives = (Principal,)

        def on_request(self, ex: Any) -> None:
            ex.authenticate(Principal(subject="ann", claims={"canary": "x" * 9_000}))

    store = MemoryTickets()
    app = PolicyStack(Inside(), [Talkative(), WebSocketTickets(store=store)], clock=FrozenClock(NOW))
    sent = await drive(app, "POST", "/ws-ticket")
    assert (sent.status, sent.json()["error_code"]) == (422, "REQ_422")
    assert b"canary" not in sent.body and len(store) == 0


# --- stores that fail -------------------------------------------------------------------------------------------------


class Away:
    """A store on another machine that does not answer."""

    async def issue(self, digest: bytes, record: bytes, **_: Any) -> float:
        raise StoreUnavailableError("canary", 2.5)

    async def redeem(self, digest: bytes, now: float) -> bytes | None:
        await anyio.lowlevel.checkpoint()
        raise StoreUnavailableError("canary", 2.5)


async def test_a_store_that_is_away_lets_nobody_in() -> None:
    service = Service(Away())
    for sent in (await service.post(), await service.open(new_ticket())):
        assert (sent.status, sent.json()["error_code"], sent.header("retry-after")) == (503, "SRV_503", "3")
        assert b"canary" not in sent.body
    assert service.inside.paths == []
    assert (await service.open(headers=bearer())).status == 101, "who needs no ticket does not notice"
    assert (await service.open("x")).status == 401, "nor is it asked of what is no ticket"


@pytest.mark.parametrize("record", [b"", b"{}", b"\xff", Ticket(Principal(subject="ann")).encode()[:-1]])
async def test_a_record_that_cannot_be_read_opens_nothing(record: bytes) -> None:
    store, text = MemoryTickets(), new_ticket()
    store.issue(ticket_digest(text), record, holder="ann", most=1, ttl=30, now=1_000.0)
    service = Service(store)
    sent = await service.open(text)
    assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_009")


async def test_a_handshake_that_is_cancelled_while_it_waits_leaves_nothing() -> None:
    class Slow(Away):
        async def redeem(self, digest: bytes, now: float) -> bytes | None:
            await anyio.sleep_forever()
            return None

    service = Service(Slow())
    with anyio.move_on_after(0.02) as scope:
        await service.open(new_ticket())
    assert scope.cancelled_caught and service.inside.paths == []


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_processes_share_tickets_and_of_all_handshakes_at_once_one_passes() -> None:
    with Server() as server:
        links = [RedisLink(server.url, deadline=60, connect_timeout=60) for _ in range(2)]
        tickets = {"per_caller": 30, "deadline": 60}
        services = [Service(RedisTickets(link), auth={"deadline": 60}, tickets=tickets) for link in links]
        one, other = services
        statuses: list[int] = []

        async def handshake(service: Service, ticket: str) -> None:
            statuses.append((await service.open(ticket, headers={"origin": PAGE})).status)

        for _ in range(10):
            ticket = await one.buy(origin=PAGE)
            async with anyio.create_task_group() as group:
                for service in services * 2:
                    group.start_soon(handshake, service, ticket)
        assert sorted(statuses) == [101] * 10 + [401] * 30
        callers = one.inside.callers + other.inside.callers
        assert all(caller is not None and caller.claims["jti"] == "t1" for caller in callers)
        ticket = await other.buy(origin=PAGE)
        assert (await one.open(ticket, headers={"origin": "https://evil.example"})).status == 401
        assert (await other.open(ticket, headers={"origin": PAGE})).status == 401, "it is used up everywhere"
        ticket = await one.buy()
    for sent in (await one.post(), await one.open(ticket)):
        assert (sent.status, sent.json()["error_code"]) == (503, "SRV_503")
        assert sent.header("retry-after")
    for service in services:
        await service.app.aclose()


# --- in a stack -------------------------------------------------------------------------------------------------------


async def test_two_of_them_in_one_stack_use_a_ticket_once() -> None:
    store = MemoryTickets()
    again = WebSocketTicketAuth(store=store, **PAIR)  # type: ignore[arg-type]
    service = Service(store, auth=PAIR, between=[again])
    assert (await service.open(await service.buy())).status == 101
    sent = await service.open(headers=protocols("sigil.ticket", await service.buy()))
    assert (sent.status, sent.start["subprotocol"]) == (101, "sigil.ticket")


async def test_it_stands_outside_of_what_requires_another_credential() -> None:
    store = MemoryTickets()
    needs = BearerAuth(issuers=[make_issuer()], required=True)
    policies = [WebSocketTicketAuth(store=store), needs, WebSocketTickets(store=store)]
    app = PolicyStack(Inside(), policies, clock=FrozenClock(NOW))
    bought = await drive(app, "POST", "/ws-ticket", headers=bearer())
    sent = await drive(app, kind="websocket", query=f"ticket={bought.json()['ticket']}")
    assert sent.status == 101
    assert (await drive(app, kind="websocket")).status == 401
    with pytest.raises(PolicyOrderError, match="WebSocketTickets uses the Principal"):
        PolicyStack(Inside(), [WebSocketTickets(store=store), needs])


async def test_a_server_that_can_send_no_response_closes_before_it_accepts() -> None:
    service = Service()
    sent = await service.open(new_ticket(), scope={"extensions": {}})
    assert sent.messages == [{"type": "websocket.close", "code": 1008, "reason": ""}]
    sent = await Service(Away()).open(new_ticket(), scope={"extensions": {}})
    assert sent.messages == [{"type": "websocket.close", "code": 1013, "reason": ""}]


async def test_no_ticket_stands_in_the_log_or_in_the_store() -> None:
    lines = io.StringIO()
    service = Service(outside=[AccessLog(logger=JSONLines(lines))], auth=PAIR)
    tickets = [await service.buy(), await service.buy()]
    await service.open(tickets[0])
    await service.open(tickets[0])
    await service.open(headers=protocols("sigil.ticket", tickets[1]))
    written = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["status"] for line in written] == [201, 201, 101, 401, 101]
    third = await service.buy()
    for text in (*tickets, third):
        assert text not in lines.getvalue() and text.encode() not in b"".join(service.store._entries)
        assert text not in repr(service.app) + repr(service.store)
    assert list(service.store._entries) == [ticket_digest(third)]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (WebSocketTicketAuth, {"store": 5}),
        (WebSocketTicketAuth, {"store": "nothing://x"}),
        (WebSocketTicketAuth, {"store": MemoryTickets(), "query": None}),
        (WebSocketTicketAuth, {"store": MemoryTickets(), "query": "a b"}),
        (WebSocketTicketAuth, {"store": MemoryTickets(), "websocket_protocol": "a b"}),
        (WebSocketTicketAuth, {"store": MemoryTickets(), "audiences": {"ws": "x"}}),
        (WebSocketTicketAuth, {}),
        (WebSocketTickets, {"store": object()}),
        (WebSocketTickets, {"store": MemoryTickets(), "path": "ws"}),
        (WebSocketTickets, {"store": MemoryTickets(), "path": "POST /ws"}),
        (WebSocketTickets, {"store": MemoryTickets(), "per_caller": 0}),
        (WebSocketTickets, {"store": MemoryTickets(), "audience": "a b"}),
    ],
)
def test_options_that_cannot_be_are_refused(policy: Any, options: Any) -> None:
    with pytest.raises(ValidationError):
        policy(**options)


def test_a_url_is_a_store_and_stands_in_no_repr() -> None:
    url = "redis://:canary-password@tickets.example:6379/4"
    auth, sale = WebSocketTicketAuth(store=url), WebSocketTickets(store=url)
    assert auth.store is sale.store and isinstance(sale.store, RedisTickets)
    assert "canary" not in repr(auth) + repr(sale)
    assert list(sale.resources()) == [sale.store] and list(auth.resources()) == [auth.store]
    assert list(WebSocketTickets(store=MemoryTickets()).resources()) == []

"""Tokens and API keys as a pair of subprotocols: what a browser can send on a WebSocket (RFC 6455 section 4.1)."""

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.origins import AllowedOrigins
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets
from sigil_policy.stores.tickets import MemoryTickets
from sigil_policy.testing import FrozenClock, Sent, drive
from sigil_policy.testing.rules import broken_rules
from tests.identity.material import NOW, make_issuer, token
from tests.served import on_uvicorn

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN, RECORD = new_key(pepper=PEPPER, subject="nightly-job", scopes=["agents:read"])
KEY = PLAIN.get_secret_value()
TOKEN = token().decode()
FIELD = "sec-websocket-protocol"


class Inside:
    """Accepts, and says who came; `select` is the subprotocol that it speaks."""

    def __init__(self, select: str | None = None) -> None:
        self.select = select

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"inside"})
            return
        selected = {} if self.select is None else {"subprotocol": self.select}
        await receive()
        await send({"type": "websocket.accept", **selected})
        caller = get_exchange(scope).get(Principal)
        await send({"type": "websocket.send", "text": "nobody" if caller is None else caller.subject})
        await send({"type": "websocket.close", "code": 1000})


def make_app(
    *, select: str | None = None, bearer: Any = None, key: Any = None, scopes: bool = True, clock: Any = None
) -> PolicyStack:
    bearer = {"websocket_protocol": "sigil.bearer"} if bearer is None else bearer
    key = {"websocket_protocol": "sigil.key"} if key is None else key
    policies = [
        Problems(),
        BearerAuth(issuers=[make_issuer()], **bearer),
        ApiKeyAuth(store=MemoryApiKeyStore([RECORD]), pepper=PEPPER, **key),
        *([Scopes()] if scopes else []),
    ]
    return PolicyStack(Inside(select), policies, clock=clock or FrozenClock(NOW))


async def open_socket(app: PolicyStack, *values: str, **headers: str) -> Sent:
    pairs = {FIELD: ", ".join(values)} if values else {}
    sent = await drive(app, kind="websocket", headers={**pairs, **headers})
    assert not broken_rules(sent.messages)
    return sent


def said(sent: Sent) -> tuple[int, str | None, str]:
    return sent.status, sent.start.get("subprotocol"), sent.messages[1]["text"]


@pytest.mark.parametrize(
    ("values", "caller"),
    [(("sigil.bearer", TOKEN), "user_123"), (("sigil.key", KEY), "nightly-job")],
    ids=["token", "key"],
)
async def test_a_credential_travels_as_a_pair_and_never_back(values: tuple[str, str], caller: str) -> None:
    """WS-03, WS-04"""
    sent = await open_socket(make_app(), *values)
    assert said(sent) == (101, values[0], caller)
    assert values[1] not in str(sent.messages)
    spoken = await open_socket(make_app(select="chat.v2"), "chat.v2", *values)
    assert said(spoken) == (101, "chat.v2", caller)
    echoed = await open_socket(make_app(select=values[1]), *values)
    assert said(echoed) == (101, values[0], caller), "an application that takes the last offer"
    lines = [(FIELD, value) for value in values]
    assert said(await drive(make_app(), kind="websocket", headers=lines)) == (101, values[0], caller)


@pytest.mark.parametrize(
    ("values", "status", "code"),
    [
        ((), 401, "AUTH_001"),
        (("chat.v2",), 401, "AUTH_001"),
        (("chat.v2", TOKEN), 401, "AUTH_001"),
        (("sigil.bearer",), 400, "AUTH_003"),
        (("sigil.key",), 400, "AUTH_003"),
        ((TOKEN, "sigil.bearer"), 400, "AUTH_003"),
        (("sigil.bearer", TOKEN, TOKEN), 400, "AUTH_003"),
        (("sigil.bearer", "a b"), 400, "AUTH_003"),
        (("sigil.bearer", "a|b"), 400, "AUTH_003"),
        (("sigil.bearer", TOKEN[:-3] + "AAA"), 401, "AUTH_002"),
        (("sigil.bearer", KEY), 401, "AUTH_002"),
        (("sigil.bearer", "a" * 9_000), 401, "AUTH_002"),
        (("sigil.bearer", "a" * 20_000), 400, "AUTH_003"),
        (("sigil.key", KEY[:-6] + "000000"), 401, "AUTH_005"),
        (("sigil.key", TOKEN), 401, "AUTH_005"),
    ],
)
async def test_wrong_pairs_are_refused_before_the_socket_is_accepted(
    values: tuple[str, ...], status: int, code: str
) -> None:
    sent = await open_socket(make_app(), *values)
    assert (sent.status, sent.json()["error_code"]) == (status, code)
    assert sent.messages[0]["type"] == "websocket.http.response.start"
    assert sent.header_lines("www-authenticate")
    assert TOKEN not in str(sent.messages) and KEY not in str(sent.messages)


@pytest.mark.parametrize(
    ("values", "headers"),
    [
        (("sigil.bearer", TOKEN), {"authorization": f"Bearer {TOKEN}"}),
        (("sigil.bearer", TOKEN), {"authorization": "Basic dXNlcjpwdw=="}),
        (("sigil.bearer", TOKEN), {"x-api-key": KEY}),
        (("sigil.key", KEY), {"x-api-key": KEY}),
        (("sigil.key", KEY), {"authorization": f"Bearer {TOKEN}"}),
    ],
)
async def test_two_credentials_at_once_are_a_mistake(values: tuple[str, str], headers: dict[str, str]) -> None:
    assert (await open_socket(make_app(), *values, **headers)).status == 400


async def test_headers_go_on_as_they_were() -> None:
    sent = await open_socket(make_app(), "chat.v2", authorization=f"Bearer {TOKEN}")
    assert said(sent) == (101, None, "user_123")
    assert said(await open_socket(make_app(), **{"x-api-key": KEY})) == (101, None, "nightly-job")


async def test_a_server_that_hands_on_the_list_alone_is_understood() -> None:
    async def offer(*values: str) -> Sent:
        return await drive(make_app(), kind="websocket", scope={"subprotocols": list(values)})

    assert said(await offer("chat.v2", "sigil.bearer", TOKEN)) == (101, "sigil.bearer", "user_123")
    for values in (("sigil.bearer",), ("sigil.bearer", "\u20ac"), ("sigil.bearer", TOKEN, TOKEN)):
        assert (await offer(*values)).status == 400
    assert (await offer()).status == 401


async def test_nothing_is_taken_unasked_and_nothing_over_http() -> None:
    plain = make_app(bearer={}, key={})
    assert (await open_socket(plain, "sigil.bearer", TOKEN)).status == 401
    assert (await open_socket(plain, "sigil.key", KEY)).status == 401
    for value in (f"sigil.bearer, {TOKEN}", f"sigil.key, {KEY}", "sigil.bearer"):
        assert (await drive(make_app(), headers={FIELD: value})).status == 401


async def test_one_name_serves_tokens_and_keys_that_are_told_apart_by_their_prefix() -> None:
    one = {"websocket_protocol": "sigil.bearer"}
    app = make_app(bearer={**one, "foreign_prefix": "sk_"}, key={**one, "bearer": True})
    assert said(await open_socket(app, "sigil.bearer", TOKEN)) == (101, "sigil.bearer", "user_123")
    assert said(await open_socket(app, "sigil.bearer", KEY)) == (101, "sigil.bearer", "nightly-job")
    assert (await open_socket(app, "sigil.bearer", KEY[:-6] + "000000")).status == 401
    assert (await open_socket(app, "sigil.bearer", "sk_")).json()["error_code"] == "AUTH_005"
    turned = PolicyStack(Inside(), [app.policies[2], app.policies[1]], clock=FrozenClock(NOW))
    assert said(await open_socket(turned, "sigil.bearer", TOKEN)) == (101, "sigil.bearer", "user_123")
    assert said(await open_socket(turned, "sigil.bearer", KEY)) == (101, "sigil.bearer", "nightly-job")


async def test_an_answer_that_accepts_nobody_selects_nothing() -> None:
    """Also where somebody further in refuses the caller."""
    policies = [*make_app(scopes=False).policies, Scopes(routes={"/": "admin:all"})]
    app = PolicyStack(Inside(), policies, clock=FrozenClock(NOW))
    for values, status in ((("sigil.bearer", TOKEN), 403), (("sigil.key", KEY), 403), (("sigil.bearer", "a.b.c"), 401)):
        sent = await open_socket(app, *values)
        assert (sent.status, sent.header(FIELD)) == (status, None)


async def test_two_of_a_kind_in_one_stack_agree() -> None:
    pair = {"websocket_protocol": "sigil.bearer"}
    policies = [BearerAuth(issuers=[make_issuer()], **pair), BearerAuth(issuers=[make_issuer()], **pair)]  # type: ignore[arg-type]
    app = PolicyStack(Inside(), policies, clock=FrozenClock(NOW))
    assert said(await open_socket(app, "sigil.bearer", TOKEN)) == (101, "sigil.bearer", "user_123")


async def test_a_key_that_is_ended_ends_the_connection_that_it_opened() -> None:
    clock, known = FrozenClock(NOW), [RECORD]
    heard: list[str] = []

    class Store:
        def find(self, key_id: str) -> Any:
            return next((record for record in known if record.id == key_id), None)

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        heard.extend([(await receive())["type"] for _ in range(3)])
        known.clear()
        clock.advance(31)
        heard.append((await receive())["type"])

    keys = ApiKeyAuth(store=Store(), pepper=PEPPER, websocket_protocol="sigil.key", recheck=30.0)  # type: ignore[arg-type]
    text = {"type": "websocket.receive", "text": "hello"}
    sent = await drive(
        PolicyStack(listening, [keys], clock=clock),
        kind="websocket",
        headers={FIELD: f"sigil.key, {KEY}"},
        incoming=[{"type": "websocket.connect"}, text, text, text],
    )
    assert heard == ["websocket.connect", "websocket.receive", "websocket.receive", "websocket.disconnect"]
    assert (sent.messages[-1]["type"], sent.messages[-1]["code"]) == ("websocket.close", 4401)


async def test_guesses_are_counted_where_the_field_is_named() -> None:
    failures = AuthFailureLimit(
        addresses="3/minute", credentials=None, everywhere=None, headers=["Authorization", "Sec-WebSocket-Protocol"]
    )
    app = PolicyStack(Inside(), [failures, *make_app().policies], clock=FrozenClock(NOW))
    statuses = [(await open_socket(app, "sigil.key", f"{KEY[:-6]}{number:06}")).status for number in range(5)]
    assert statuses == [401, 401, 401, 429, 429]


def test_a_name_is_one_that_can_be_offered() -> None:
    for name in ("a b", "a,b", "", "é"):
        with pytest.raises(ValidationError):
            BearerAuth(issuers=[make_issuer()], websocket_protocol=name)
        with pytest.raises(ValidationError):
            ApiKeyAuth(store=MemoryApiKeyStore([]), pepper=PEPPER, websocket_protocol=name)


# --- over real sockets ------------------------------------------------------------------------------------------------


def heard(url: str, **options: Any) -> tuple[str | None, str]:
    with connect(url, open_timeout=60, proxy=None, **options) as client:
        return client.subprotocol, str(client.recv(60))


def refused(url: str, **options: Any) -> int:
    with pytest.raises(InvalidStatus) as caught, connect(url, open_timeout=60, proxy=None, **options):
        pass
    return caught.value.response.status_code


@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
def test_a_real_client_takes_the_answer(ws: str) -> None:
    """It fails a connection that selects what it has not offered (RFC 6455 section 4.1)."""
    with on_uvicorn(make_app(), ws=ws) as port:
        url = f"ws://127.0.0.1:{port}/"
        assert heard(url, subprotocols=["sigil.bearer", TOKEN]) == ("sigil.bearer", "user_123")
        assert heard(url, subprotocols=["sigil.key", KEY]) == ("sigil.key", "nightly-job")
        assert refused(url, subprotocols=["sigil.bearer", "a.b.c"]) == 401
        assert refused(url, subprotocols=["sigil.bearer"]) == 400
        assert refused(url) == 401


@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
async def test_a_ticket_and_an_origin_over_real_sockets(ws: str) -> None:
    page, tickets, clock = "https://app.example", MemoryTickets(), FrozenClock(NOW)
    policies = [
        Problems(),
        AllowedOrigins(origins=[page]),
        WebSocketTicketAuth(store=tickets, websocket_protocol="sigil.ticket"),
        BearerAuth(issuers=[make_issuer()]),
        Scopes(),
        WebSocketTickets(store=tickets),
    ]
    app = PolicyStack(Inside(), policies, clock=clock)

    async def buy() -> str:
        headers = {"authorization": f"Bearer {TOKEN}", "origin": page}
        return str((await drive(app, "POST", "/ws-ticket", headers=headers)).json()["ticket"])

    first, second = await buy(), await buy()
    with on_uvicorn(app, ws=ws) as port:
        url = f"ws://127.0.0.1:{port}/"
        assert heard(f"{url}?ticket={first}", origin=page) == (None, "user_123")
        assert refused(f"{url}?ticket={first}", origin=page) == 401
        assert refused(f"{url}?ticket={second}", origin="https://evil.example") == 403
        assert heard(url, origin=page, subprotocols=["sigil.ticket", second]) == ("sigil.ticket", "user_123")
        assert refused(url, origin=page, subprotocols=["sigil.ticket", second]) == 401
        assert refused(url, origin="null", additional_headers={"authorization": f"Bearer {TOKEN}"}) == 403
        assert heard(url, additional_headers={"authorization": f"Bearer {TOKEN}"}) == (None, "user_123")

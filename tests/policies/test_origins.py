"""Web pages that may open a WebSocket. WS-nn are the rules of the standards checklist."""

from typing import Any

import pytest
from pydantic import ValidationError

from sigil_policy.core.ordering import PolicyOrderError
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.origins import AllowedOrigins
from sigil_policy.policies.problems import Problems
from sigil_policy.testing import FrozenClock, drive
from sigil_policy.testing.rules import broken_rules

pytestmark = pytest.mark.anyio

APP = "https://app.example"


class Reached(Policy):
    """Notes whom the policies outside let through."""

    calls: Any

    def on_request(self, ex):
        self.calls.append(ex.path)


async def answer(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def make_app(*inside, **options):
    policy = AllowedOrigins(**{"origins": [APP, "http://localhost:3000"], **options})
    return PolicyStack(answer, [Problems(), policy, *inside], clock=FrozenClock())


async def handshake(app, *origins, path="/ws", **options):
    return await drive(app, path=path, kind="websocket", headers=[("origin", origin) for origin in origins], **options)


@pytest.mark.parametrize(
    ("origins", "status"),
    [
        ([], 101),
        ([APP], 101),
        (["http://localhost:3000"], 101),
        (["https://evil.example"], 403),
        (["null"], 403),
        ([""], 403),
        (["https://app.example.evil"], 403),
        (["https://app.example:8443"], 403),
        (["http://app.example"], 403),
        (["https://app.example/"], 403),
        (["HTTPS://APP.EXAMPLE"], 403),
        ([b"\xff"], 403),
        ([APP, APP], 403),
        ([APP, "https://evil.example"], 403),
    ],
)
async def test_sockets_come_from_listed_pages_or_from_no_page(origins, status):
    """WS-01, WS-02; RFC 6455 section 10.2"""
    reached = Reached(calls=[])
    sent = await handshake(make_app(reached), *origins)
    assert sent.status == status
    assert not broken_rules(sent.messages)
    assert len(reached.calls) == (status == 101)
    if status == 403:
        assert sent.json()["error_code"] == "REQ_403"
        assert sent.messages[0]["type"] == "websocket.http.response.start"
        assert b"evil" not in sent.body


async def test_a_server_that_can_send_no_response_closes_before_it_accepts():
    sent = await handshake(make_app(), "https://evil.example", scope={"extensions": {}})
    assert sent.messages == [{"type": "websocket.close", "code": 1008, "reason": ""}]


async def test_the_host_says_nothing():
    headers = {"origin": "https://evil.example", "host": "evil.example", "x-forwarded-host": "evil.example"}
    assert (await drive(make_app(), kind="websocket", headers=headers)).status == 403


async def test_who_has_no_origin_can_be_refused_too():
    app = make_app(required=True)
    assert (await handshake(app)).status == 403
    assert (await handshake(app, APP)).status == 101
    assert (await drive(app, "POST")).status == 200, "nothing is asked of HTTP"


async def test_it_is_asked_before_the_credential():
    keys = ApiKeyAuth(store=MemoryApiKeyStore([]), pepper="p" * 32, required=True)
    assert (await handshake(make_app(keys), "https://evil.example")).status == 403
    assert (await handshake(make_app(keys), APP)).status == 401
    with pytest.raises(PolicyOrderError, match="AllowedOrigins"):
        PolicyStack(answer, [keys, AllowedOrigins(origins=[])])


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "PATCH", "DELETE", "BREW", "post"]
)
async def test_unsafe_methods_can_be_asked_as_well(method):
    evil, safe = {"origin": "https://evil.example"}, method in ("GET", "HEAD", "OPTIONS", "TRACE")
    assert (await drive(make_app(), method, headers=evil)).status == 200
    app = make_app(unsafe_methods=True)
    assert (await drive(app, method, headers=evil)).status == (200 if safe else 403)
    assert (await drive(app, method, headers={"origin": APP})).status == 200
    assert (await drive(app, method)).status == 200


async def test_exempt_routes_are_open_and_nothing_that_resolves_to_them():
    app = make_app(exempt=["WEBSOCKET /ticker"], unsafe_methods=True)
    assert (await handshake(app, "https://evil.example", path="/ticker")).status == 101
    assert (await handshake(app, "https://evil.example", path="/x/../ticker")).status == 403
    assert (await drive(app, "POST", "/ticker", headers={"origin": "https://evil.example"})).status == 403


async def test_no_page_at_all():
    assert (await handshake(make_app(origins=[]), APP)).status == 403
    assert (await handshake(make_app(origins=[]))).status == 101


async def test_of_two_each_has_its_say():
    app = make_app(AllowedOrigins(origins=["http://localhost:3000"]))
    assert (await handshake(app, "http://localhost:3000")).status == 101
    assert (await handshake(app, APP)).status == 403


@pytest.mark.parametrize(
    "options",
    [{"origins": ["*"]}, {"origins": ["null"]}, {"origins": ["https://a.example/"]}, {"exempt": ["ticker"]}, {}],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValidationError, match=r"origin|route"):
        AllowedOrigins(**{"origins": [APP], **options} if options else {})

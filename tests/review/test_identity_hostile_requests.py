"""Whatever comes in, every policy of identity together gives an answer: no exception, no 500, and nobody is let in."""

from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.client_certificates import ClientCertificate
from sigil_policy.identity.dpop import DPoP
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.mcp import McpEndpoint, McpTools
from sigil_policy.policies.origins import AllowedOrigins
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.protected_resource import ProtectedResource, ProtectedResourceMetadata
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.stores.tickets import MemoryTickets, new_ticket
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, good_claims, make_issuer, token
from tests.identity.proofs import ORIGIN, bound_token, proof

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
_, RECORD = new_key(pepper=PEPPER, subject="nightly-job")
STRANGE, _ = new_key(pepper=PEPPER, subject="stranger")
GOOD = token()


async def inside(scope: Any, receive: Any, send: Any) -> None:
    caller = get_exchange(scope).get(Principal)
    raise AssertionError(f"{caller!r} was let in")


def make_app(form: Any, verify: Any, errors: Any) -> PolicyStack:
    store = MemoryTickets()
    proxies = ["0.0.0.0/1", "128.0.0.0/1", "unix"]
    senders = [DPoP(origin=ORIGIN), ClientCertificate(trusted_proxies=proxies, form=form)]
    many = "1000000/hour"
    policies = [
        Problems(),
        ProtectedResourceMetadata(documents=[ProtectedResource(resource="https://api.example.com")]),
        AuthFailureLimit(addresses=many, credentials=many, everywhere=None, websocket_protocols=["a.b", "a.k", "a.t"]),
        AllowedOrigins(origins=["https://ok.example"]),
        McpEndpoint(origins=["https://ok.example"], errors=errors),
        WebSocketTicketAuth(store=store, websocket_protocol="a.t", conflicts_with=()),
        BearerAuth(
            issuers=[make_issuer(audience="nobody's")], sender=senders, websocket_protocol="a.b", conflicts_with=None
        ),
        ApiKeyAuth(
            store=MemoryApiKeyStore([RECORD]), pepper=PEPPER, bearer=True, websocket_protocol="a.k", conflicts_with=None
        ),
        Revocation(store=MemoryRevocations()),
        McpTools(paths=["/mcp"], verify=verify),
        Scopes(),
        WebSocketTickets(store=store),
    ]
    return PolicyStack(inside, policies, clock=FrozenClock(NOW))


APPS = [make_app(*options) for options in (("rfc9440", "body", "oauth"), ("pem", "headers", "problem"),
                                           ("xfcc", "body", "problem"))]  # fmt: skip

TOKENS = st.sampled_from([
    GOOD, bound_token(), token(good_claims(cnf={"x5t#S256": "AA"})), token(good_claims(cnf=[])),
    token(good_claims(cnf={"jkt": 5})), token(good_claims(cnf=None)), STRANGE.get_secret_value().encode(),
    new_ticket().encode(), b"sk_live_x", b"", b"\x00", b"\xff" * 20, b"a.b.c", b"." * 9_000, b"=", b"a" * 9_000,
]) | st.binary(max_size=60)  # fmt: skip
SCHEMES = st.sampled_from([
    b"Bearer ", b"bearer  ", b"DPoP ", b"dpop", b"BEARER", b"Basic ", b"", b" ", b"Bearer\t", b"Bearer , Bearer ",
])  # fmt: skip
URLS = ["https://api.example.com/", "https://u@api.example.com/", "https://api.example.com:0443/", "http://[::1", "//x",
        "https://api.example.com/%2e%2e/", "x" * 2_000, "https://api.example.com/" + "%41" * 300]  # fmt: skip
VALUES = st.one_of(
    st.builds(lambda scheme, value: scheme + value, SCHEMES, TOKENS),
    st.sampled_from([proof(GOOD, htu=url) for url in URLS]),
    st.builds(lambda name, value: name + b", " + value, st.sampled_from([b"a.b", b"a.k", b"a.t"]), TOKENS),
    st.sampled_from([
        b"null", b"a" * 70_000, b"," * 5_000, b"%" * 5_000, b'"' * 5_000, b"{" * 5_000, b"=?base64?w?=", b"2026-07-28",
        b"9999-99-99", b"tools/call", b"https://ok.example", b"https://ok.example, https://ok.example", b":AAAA:",
        b"Hash=" + b"a" * 64, b'By=";Hash=' + b"b" * 64 + b'";Hash=' + b"c" * 64, b"a.b, x, a.t, y, a.k, z",
        b"-----BEGIN CERTIFICATE-----" + b"A" * 16_000,
    ]),
)  # fmt: skip
NAMES = st.sampled_from([
    b"authorization", b"x-api-key", b"dpop", b"origin", b"sec-websocket-protocol", b"client-cert", b"ssl-client-cert",
    b"x-forwarded-client-cert", b"mcp-method", b"mcp-name", b"mcp-protocol-version", b"x-forwarded-for",
    b"AUTHORIZATION", b"content-length",
])  # fmt: skip
QUERIES = st.sampled_from([
    b"", b"ticket=", b"ticket=" + new_ticket().encode(), b"ticket=a&ticket=b", b"access_token=x", b"%61pi_key=x",
    b"\xff&ticket=\xff", b"ticket=" + b"a" * 60_000, b"&" * 60_000, b"%" * 60_000,
])  # fmt: skip
PATHS = st.sampled_from(["/", "/mcp", "/ws-ticket", "/a/../x", "/\x00", "/\udcff", "//x", "", "x", "*", "/ws-ticket/"])
SCOPES = st.sampled_from([
    {}, {"raw_path": b""}, {"raw_path": b"\xff"}, {"raw_path": b"/" + b"../" * 1_000}, {"raw_path": b"http://e/x"},
    {"client": None}, {"client": ("", 0)}, {"client": ("fe80::1%eth0", 1)}, {"extensions": None},
    {"extensions": {"tls": None}}, {"extensions": {"tls": {"client_cert_chain": [5]}}},
    {"extensions": {"tls": {"client_cert_chain": ["\udcff"]}}}, {"subprotocols": ["a.b", "\u1234"]},
    {"subprotocols": ["a.t", ","]}, {"subprotocols": ["a.k", ""]}, {"subprotocols": ["a.b"]},
])  # fmt: skip
BODIES = st.sampled_from([
    b"", b"\xff", b"{", b"[]", b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x"}}',
    b'{"id":"\\ud800","method":"\\ud800"}', b'{"id":' + b"9" * 5_000 + b"}",
])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(APPS), st.sampled_from(["http", "websocket"]), st.sampled_from(["GET", "POST", "HEAD", "BREW"]),
    PATHS, QUERIES, st.lists(st.tuples(NAMES, VALUES), max_size=4), SCOPES, BODIES,
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_an_answer_is_all_that_comes_out(
    app: PolicyStack, kind: str, method: str, path: str, query: bytes, headers: Any, scope: Any, body: bytes
) -> None:
    async def ask() -> Any:
        return await drive(app, method, path, kind=kind, query=query, headers=headers, scope=scope, body=body)

    sent = anyio.run(ask)
    first = sent.messages[0]
    if first["type"] == "websocket.close":
        assert first["code"] in (1008, 1013) or first["code"] >= 3_000
    else:
        assert sent.status in (400, 401, 403, 405, 413)

"""What policies say of an endpoint, for its OpenAPI document: every answer that they have."""

import pytest
from fastapi import FastAPI
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import SecretStr

import sigil_policy
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.openapi import enrich_openapi
from sigil_policy.identity.client_certificates import ClientCertificate
from sigil_policy.identity.dpop import DPoP
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.body_limit import BodyLimit
from sigil_policy.policies.concurrency import ConcurrencyLimit
from sigil_policy.policies.mcp import McpEndpoint, McpTools
from sigil_policy.policies.origins import AllowedOrigins
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.protected_resource import ProtectedResource, ProtectedResourceMetadata
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.timeout import Timeout
from sigil_policy.policies.versioning import Version, Versioning
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.stores.tickets import MemoryTickets

AWAY = "redis://localhost:1/0"
ISSUERS = [Issuer(url="https://a.example", audience="api", keys=[Key(algorithm="HS256", secret=SecretStr("s" * 32))])]
METADATA = ProtectedResourceMetadata(documents=[ProtectedResource(resource="https://api.example.com/mcp")])
WELL_KNOWN = "/.well-known/oauth-protected-resource/mcp"
TICKETS = MemoryTickets()


def described(policy: Policy, target: str = "GET /x", *outside: Policy) -> Operation:
    method, _, path = target.partition(" ")
    operation = Operation(method, path)
    stack = PolicyStack(FastAPI(), [*outside, policy])
    rules = {} if stack.matcher is None else stack.matcher.match(method, path)
    inner = stack.policies[-1]
    inner.describe(operation, rules.get(id(inner)))
    return operation


def codes(operation: Operation) -> set[str]:
    return {refusal.kind.code for refusal in operation.refusals}


SOLD = {"AUTH_001", "AUTH_006", "REQ_400", "REQ_422", "RATE_005", "SRV_503"}


@pytest.mark.parametrize(
    ("policy", "target", "expected"),
    [
        (METADATA, f"GET {WELL_KNOWN}", set()),
        (METADATA, f"POST {WELL_KNOWN}", {"REQ_405"}),
        (METADATA, "GET /mcp", set()),
        (McpEndpoint(paths=["/mcp"]), "POST /mcp", {"REQ_403"}),
        (McpEndpoint(paths=["/mcp"]), "POST /other", set()),
        (McpEndpoint(paths=["/**"], exempt=["GET /x"]), "GET /x", set()),
        (Timeout(), "GET /x", {"SRV_504"}),
        (BodyLimit(), "POST /x", {"REQ_003"}),
        (BodyLimit(), "GET /x", set()),
        (BodyLimit(limit=None, routes={"POST /y": 5}), "POST /x", set()),
        (BodyLimit(limit=5, routes={"POST /x": None}), "POST /x", set()),
        (Timeout(seconds=None, routes={"GET /x": 5.0}), "GET /x", {"SRV_504"}),
        (Timeout(seconds=None, routes={"GET /y": 5.0}), "GET /x", set()),
        (AllowedOrigins(origins=["https://a.example"]), "POST /x", set()),
        (AllowedOrigins(origins=["https://a.example"], unsafe_methods=True), "POST /x", {"REQ_403"}),
        (AllowedOrigins(origins=["https://a.example"], unsafe_methods=True), "GET /x", set()),
        (AuthFailureLimit(), "GET /x", {"RATE_004"}),
        (AuthFailureLimit(store=AWAY), "GET /x", {"RATE_004", "RATE_003"}),
        (AuthFailureLimit(store=AWAY, on_store_loss="open"), "GET /x", {"RATE_004"}),
        (ConcurrencyLimit(limits=5), "GET /x", {"RATE_002"}),
        (ConcurrencyLimit(limits=5, store=AWAY), "GET /x", {"RATE_002", "RATE_003"}),
        (BearerAuth(issuers=ISSUERS), "GET /x", {"AUTH_002", "AUTH_003", "AUTH_006", "AUTH_007"}),
        (
            BearerAuth(issuers=ISSUERS, required=True, sender=[DPoP(origin="https://api.example.com")]),
            "GET /x",
            {"AUTH_001", "AUTH_002", "AUTH_003", "AUTH_006", "AUTH_007", "AUTH_010", "AUTH_011", "SRV_503"},
        ),
        (
            BearerAuth(issuers=ISSUERS, sender=[ClientCertificate()]),
            "GET /x",
            {"AUTH_002", "AUTH_003", "AUTH_006", "AUTH_007"},
        ),
        (Versioning(versions={"v1": Version(phase="retired")}), "GET /v1/x", {"API_001"}),
    ],
)
def test_a_policy_names_what_it_answers(policy: Policy, target: str, expected: set[str]) -> None:
    assert codes(described(policy, target)) == expected


@pytest.mark.parametrize(
    ("policy", "target", "expected"),
    [
        (WebSocketTickets(store=TICKETS), "POST /ws-ticket", SOLD),
        (WebSocketTickets(store=TICKETS, bind_origin=False), "POST /ws-ticket", SOLD - {"REQ_400"}),
        (WebSocketTickets(store=TICKETS), "GET /ws-ticket", {"REQ_405"}),
        (WebSocketTickets(store=TICKETS), "POST /other", set()),
        (Revocation(store=MemoryRevocations()), "GET /x", {"AUTH_002", "AUTH_005"}),
        (Revocation(store=AWAY), "GET /x", {"AUTH_002", "AUTH_005", "SRV_503"}),
        (McpTools(paths=["/mcp"]), "POST /mcp", {"AUTH_001", "REQ_400", "REQ_003"}),
        (McpTools(paths=["/mcp"], verify="headers"), "POST /mcp", {"AUTH_001", "REQ_400"}),
        (McpTools(paths=["/mcp"], tools={"a": "x"}), "POST /mcp", {"AUTH_001", "AUTH_004", "REQ_400", "REQ_003"}),
        (McpTools(paths=["/mcp"], tools={"a": "x"}), "GET /mcp", {"AUTH_001"}),
        (McpTools(paths=["/mcp"], methods={"*": "x"}), "GET /mcp", {"AUTH_001", "AUTH_004"}),
        (McpTools(paths=["/mcp"]), "POST /other", set()),
    ],
)
def test_a_policy_that_judges_a_caller_names_what_it_answers(policy: Policy, target: str, expected: set[str]) -> None:
    operation = described(policy, target, BearerAuth(issuers=ISSUERS))
    assert codes(operation) == expected
    challenged = {one.kind.code for one in operation.refusals if "WWW-Authenticate" in one.headers}
    assert challenged == {code for code in expected if code.startswith("AUTH_")}


SILENT = {
    "AccessLog": "changes nothing that a client sees",
    "WebSocketTicketAuth": "judges handshakes of WebSockets, of which OpenAPI has none",
}


def test_every_policy_describes_itself() -> None:
    named = [getattr(sigil_policy, name) for name in sigil_policy.__all__]
    policies = {one for one in named if isinstance(one, type) and issubclass(one, Policy) and one is not Policy}
    assert {one.__name__ for one in policies if one.describe is Policy.describe} == set(SILENT)
    assert described(WebSocketTicketAuth(store=TICKETS)).refusals == []


def test_endpoints_that_an_application_documents_say_what_the_policies_make_of_them() -> None:
    app = FastAPI()

    @app.post("/mcp")
    async def mcp() -> None: ...

    policies = [
        METADATA,
        Problems(),
        McpEndpoint(paths=["/mcp"]),
        BearerAuth(issuers=ISSUERS),
        McpTools(paths=["/mcp"]),
        WebSocketTickets(store=TICKETS),
    ]
    app.add_middleware(PolicyStack, policies=policies)
    made = enrich_openapi(enrich_openapi(app)).openapi()
    OpenAPIV31SpecValidator(made).validate()
    assert made is app.openapi()
    sold = made["paths"]["/ws-ticket"]["post"]
    assert {"201", "401", "422", "429", "503"} <= set(sold["responses"])
    assert sold["security"] == [{"BearerToken": []}]
    read = made["paths"][WELL_KNOWN]["get"]
    assert {"ETag", "Cache-Control", "Access-Control-Allow-Origin"} <= set(read["responses"]["200"]["headers"])
    assert "304" in read["responses"]
    assert "401" not in read["responses"]
    assert "security" not in read
    called = made["paths"]["/mcp"]["post"]
    assert {"200", "400", "401", "403", "413"} <= set(called["responses"])
    assert called["security"] == [{"BearerToken": []}]

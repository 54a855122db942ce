"""The OpenAPI document: what the policies do, beside what the application has declared."""

import json
import subprocess
import sys
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI, Security
from fastapi.security import HTTPBearer, OAuth2PasswordBearer
from openapi_spec_validator import OpenAPIV30SpecValidator, OpenAPIV31SpecValidator
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.testclient import TestClient

from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.marks import policy
from sigil_policy.core.operations import Credential, Operation
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import ProblemType
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.fastapi import CurrentPrincipal, require_scopes
from sigil_policy.frameworks.openapi import alternatives, enrich_openapi, main, problem_responses
from sigil_policy.identity.api_keys import MemoryApiKeyStore
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key
from sigil_policy.identity.requirements import AllOf, AnyOf, FromApiKey, FromIssuer
from sigil_policy.middleware import BearerAuthMiddleware, ProblemsMiddleware, RequestIDMiddleware
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.cache_control import CacheControl
from sigil_policy.policies.concurrency import ConcurrencyLimit
from sigil_policy.policies.conditional import Conditional
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.timeout import Timeout
from sigil_policy.policies.versioning import Deprecation, Versioning

HERE = Path(__file__).resolve().parents[2]
SECRET = "not-for-any-document-0123456789abcdef"
OURS = "https://auth.example.com"
FOUND = "https://login.example.com"
LATE = ProblemType(code="LATE_001", title="TooLateError", status=409)
GONE = ProblemType(code="LATE_002", title="ItemNotFoundError", status=404)

BEARER = BearerAuth(
    issuers=[Issuer(url=OURS, audience="api", keys=[Key(algorithm="HS256", secret=SecretStr(SECRET))])],
)
KEYS = ApiKeyAuth(store=MemoryApiKeyStore([]), pepper=SecretStr(SECRET))


def service(**options: Any) -> FastAPI:
    app = FastAPI(**options)

    @app.get("/items/{name}")
    async def show(name: str) -> dict[str, str]:
        return {"name": name}

    @app.post("/items")
    async def create(item: dict[str, int]) -> None: ...

    @app.get("/health")
    async def health() -> None: ...

    return app


def document(*policies: Policy, app: FastAPI | None = None, **options: Any) -> Any:
    app = service() if app is None else app
    app.add_middleware(PolicyStack, policies=policies, **options)
    made = enrich_openapi(app).openapi()
    OpenAPIV31SpecValidator(made).validate()
    return made


def follow(made: Any, value: Any) -> Any:
    while "$ref" in value:
        found = made
        for step in value["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        value = found
    return value


def codes(made: Any, response: Any) -> list[str]:
    return list(follow(made, response)["content"]["application/problem+json"]["examples"])


def everything() -> list[Policy]:
    return [
        RequestID(),
        Problems(),
        Versioning(routes={"/items/{name}": Deprecation(deprecated=date(2026, 1, 1), sunset=date(2090, 1, 1))}),
        Timeout(),
        BEARER,
        KEYS,
        Scopes(routes={"GET /items/{name}": "items:read"}, public=["GET /health"]),
        RateLimit(tokens={"POST /items": 5}),
        CacheControl(),
        Conditional(),
    ]


# --- what is added -----------------------------------------------------------------------------------------------


def test_the_document_is_valid_and_holds_no_secret() -> None:
    made = document(*everything())
    assert made["openapi"].startswith("3.1")
    assert SECRET not in json.dumps(made)


def test_each_operation_names_the_scopes_that_its_rule_takes() -> None:
    made = document(*everything())
    assert made["paths"]["/items/{name}"]["get"]["security"] == [
        {"BearerToken": ["items:read"]},
        {"ApiKey": ["items:read"]},
    ]
    assert made["paths"]["/items"]["post"]["security"] == [{"BearerToken": []}, {"ApiKey": []}]
    assert made["paths"]["/health"]["get"]["security"] == []
    schemes = made["components"]["securitySchemes"]
    assert (schemes["BearerToken"]["scheme"], schemes["BearerToken"]["bearerFormat"]) == ("bearer", "JWT")
    assert (schemes["ApiKey"]["in"], schemes["ApiKey"]["name"]) == ("header", "X-API-Key")


def test_an_issuer_that_publishes_its_metadata_is_named_by_it() -> None:
    auth = BearerAuth(issuers=[Issuer(url=FOUND, audience="api", discovery=True), *BEARER.issuers])
    rule = FromIssuer(FOUND, scopes="a") | FromIssuer(OURS, scopes="b")
    made = document(auth, Scopes(routes={"POST /items": rule}))
    assert made["paths"]["/items"]["post"]["security"] == [{"OpenIdConnect": ["a"]}, {"BearerToken": ["b"]}]
    scheme = made["components"]["securitySchemes"]["OpenIdConnect"]
    assert scheme["openIdConnectUrl"] == f"{FOUND}/.well-known/openid-configuration"
    assert "503" in made["paths"]["/items"]["post"]["responses"]


TOKEN = Credential("T", {}, "bearer", frozenset((OURS,)))
OTHER = Credential("O", {}, "bearer", frozenset((FOUND,)))
A_KEY = Credential("K", {}, "api_key")


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        (AllOf(), [{"T": []}, {"O": []}, {"K": []}]),
        (AllOf("a", "b"), [{"T": ["a", "b"]}, {"O": ["a", "b"]}, {"K": ["a", "b"]}]),
        (AnyOf("a", "b"), [{x: [s]} for s in "ab" for x in "TOK"]),
        (FromIssuer(OURS, scopes="a"), [{"T": ["a"]}]),
        (FromIssuer("https://nobody.example.com"), []),
        (FromApiKey(AnyOf("a", "b")), [{"K": ["a"]}, {"K": ["b"]}]),
        (FromIssuer(OURS) | FromApiKey("a"), [{"T": []}, {"K": ["a"]}]),
        (FromIssuer(OURS, scopes="a") & FromApiKey("b"), [{"T": ["a"], "K": ["b"]}]),
        ((FromIssuer(OURS) | FromIssuer(FOUND)) & FromApiKey(), [{"T": [], "K": []}, {"O": [], "K": []}]),
        (FromIssuer(OURS, scopes="a") & FromIssuer(OURS, scopes=["b", "a"]), [{"T": ["a", "b"]}]),
    ],
)
def test_and_and_or_of_requirements_are_those_of_openapi(requirement: Any, expected: Any) -> None:
    named = [(one, one.name) for one in (TOKEN, OTHER, A_KEY)]
    assert alternatives(requirement, named) == expected


def test_a_requirement_with_very_many_ways_is_cut_off() -> None:
    rule: Any = AnyOf(*(f"a{n}" for n in range(60)))
    for letter in "bcd":
        rule = rule & FromApiKey(AnyOf(*(f"{letter}{n}" for n in range(60))))
    assert len(alternatives(rule, [(TOKEN, "T"), (A_KEY, "K")])) == 64


def test_a_rule_that_nobody_fulfils_is_never_documented_as_public() -> None:
    made = document(BEARER, Scopes(routes={"POST /items": FromIssuer("https://nobody.example.com")}))
    assert made["paths"]["/items"]["post"]["security"] == [{"BearerToken": []}]


def test_without_scopes_a_credential_is_required_or_optional_as_its_policy_says() -> None:
    made = document(BEARER)
    assert made["paths"]["/items"]["post"]["security"] == [{"BearerToken": []}, {}]
    made = document(BearerAuth(issuers=BEARER.issuers, required=True))
    assert made["paths"]["/items"]["post"]["security"] == [{"BearerToken": []}]


def test_problems_are_shared_responses_with_examples_from_the_catalogue() -> None:
    made = document(*everything())
    responses = made["paths"]["/items"]["post"]["responses"]
    assert list(responses) == ["200", "400", "401", "422", "429", "500", "503", "504"]
    assert all("$ref" in responses[status] for status in responses if status != "200")
    assert codes(made, responses["401"]) == ["AUTH_002", "AUTH_005", "AUTH_001"]
    assert codes(made, responses["400"]) == ["REQ_001", "REQ_400", "AUTH_003", "AUTH_006", "AUTH_007"]
    assert codes(made, responses["429"]) == ["RATE_001", "CTX_003"]
    assert codes(made, responses["422"]) == ["CTX_004", "REQ_002"]
    assert codes(made, responses["504"]) == ["SRV_504"]
    example = follow(made, responses["429"])["content"]["application/problem+json"]["examples"]["RATE_001"]["value"]
    assert example["type"] == "https://sigil.acti.ai/errors/rate-001"
    assert (example["status"], example["error_code"], example["retry_after"]) == (429, "RATE_001", 12)
    assert "403" in made["paths"]["/items/{name}"]["get"]["responses"]
    assert set(made["paths"]["/health"]["get"]["responses"]) == {"200", "304", "400", "401", "500", "503", "504"}


def test_every_example_fits_its_schema() -> None:
    from jsonschema import Draft202012Validator

    made = document(*everything())
    validator = Draft202012Validator(made["components"]["schemas"]["Problem"])
    for response in made["components"]["responses"].values():
        for example in response["content"]["application/problem+json"]["examples"].values():
            validator.validate(example["value"])


@pytest.mark.parametrize(("status", "code"), [(400, "REQ_001"), (422, "REQ_002")])
def test_rejected_input_is_documented_with_the_status_that_it_gets(status: Any, code: str) -> None:
    made = document(Problems(validation_status=status))
    responses = made["paths"]["/items"]["post"]["responses"]
    assert codes(made, responses[str(status)])[0] == code
    assert ("422" in responses) is (status == 422)
    assert "HTTPValidationError" not in json.dumps(made)
    assert "ValidationError" not in made["components"]["schemas"]
    assert "400" not in made["paths"]["/health"]["get"]["responses"]


def test_without_problems_the_framework_s_own_rejection_stays() -> None:
    made = document(RequestID())
    assert "HTTPValidationError" in json.dumps(made["paths"]["/items"]["post"]["responses"]["422"])


def test_the_style_of_problems_is_that_of_the_policy() -> None:
    made = document(Problems(base_url="https://errors.example.com/", media_type="application/json"), Timeout())
    response = follow(made, made["paths"]["/health"]["get"]["responses"]["504"])
    example = response["content"]["application/json"]["examples"]["SRV_504"]["value"]
    assert example["type"] == "https://errors.example.com/srv-504"


def test_responses_name_their_header_fields() -> None:
    made = document(*everything())
    shown = made["paths"]["/items/{name}"]["get"]["responses"]
    expected = {
        "X-Request-ID", "Deprecation", "Sunset", "RateLimit", "RateLimit-Policy", "X-RateLimit-Limit",
        "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-RateLimit-Window", "Cache-Control", "ETag",
    }  # fmt: skip
    assert set(shown["200"]["headers"]) == set(shown["304"]["headers"]) == expected
    assert follow(made, shown["200"]["headers"]["X-Request-ID"])["required"] is True
    created = made["paths"]["/items"]["post"]["responses"]
    assert {"X-Tokens-Used", "X-Tokens-Remaining"} <= set(created["200"]["headers"])
    assert not {"Deprecation", "ETag"} & set(created["200"]["headers"])
    assert {"Retry-After", "RateLimit"} <= set(follow(made, created["429"])["headers"])
    assert "RateLimit" not in made["paths"]["/health"]["get"]["responses"]["200"]["headers"]


def test_a_problem_has_the_header_fields_of_the_policies_outside_of_it_alone() -> None:
    """As on the wire: what refuses is decorated by what is further out."""

    class Outer(Policy):
        def describe(self, operation: Operation, rule: Any) -> None:
            operation.sends("X-Outer", "From outside", required=True)

        def on_response(self, ex: Exchange, head: Head) -> None:
            head.headers.append((b"x-outer", b"1"))

    class Inner(Policy):
        def describe(self, operation: Operation, rule: Any) -> None:
            operation.sends("X-Inner", "From inside", required=True)

        def on_response(self, ex: Exchange, head: Head) -> None:
            head.headers.append((b"x-inner", b"1"))

    app = service()
    made = document(Problems(), Outer(), BearerAuth(issuers=BEARER.issuers, required=True), Inner(), app=app)
    responses = made["paths"]["/items"]["post"]["responses"]
    refused = TestClient(app).post("/items", json={})
    assert ("x-outer" in refused.headers, "x-inner" in refused.headers) == (True, False)
    assert set(follow(made, responses["401"])["headers"]) == {"X-Outer", "WWW-Authenticate"}
    assert set(responses["200"]["headers"]) == {"X-Outer", "X-Inner"}
    # Of 400 some come from the policy, some from the application behind both.
    shared = follow(made, responses["400"])["headers"]
    assert follow(made, shared["X-Outer"])["required"] is True
    assert "required" not in follow(made, shared["X-Inner"])


def test_what_a_version_or_a_mark_calls_deprecated_is_deprecated() -> None:
    app = service()

    @app.get("/old")
    @policy(deprecated=Deprecation(deprecated=date(2026, 1, 1), successor="/items"))
    async def old() -> None: ...

    made = document(Versioning(routes={"POST /items": Deprecation(deprecated=date(2026, 1, 1))}), app=app)
    assert made["paths"]["/items"]["post"]["deprecated"] is True
    assert made["paths"]["/old"]["get"]["deprecated"] is True
    assert set(made["paths"]["/old"]["get"]["responses"]["200"]["headers"]) == {"Deprecation", "Link"}
    assert "deprecated" not in made["paths"]["/health"]["get"]


def test_marks_routers_and_tags_are_in_the_document() -> None:
    app = service()
    admin = policy(scopes="admin:all")(APIRouter(prefix="/admin"))

    @admin.get("/list")
    async def list_() -> None: ...

    @admin.get("/open")
    @policy(public=True)
    async def open_() -> None: ...

    @app.get("/tagged", tags=["internal"])
    async def tagged() -> None: ...

    @app.get("/patient")
    @policy(timeout=5, any_scope="a b")
    async def patient() -> None: ...

    app.include_router(admin)
    tags = {"internal": policy(scopes="internal")}
    made = document(Problems(), Timeout(seconds=None), BEARER, Scopes(), app=app, tags=tags)
    paths = made["paths"]
    assert paths["/admin/list"]["get"]["security"] == [{"BearerToken": ["admin:all"]}]
    assert paths["/admin/open"]["get"]["security"] == []
    assert paths["/tagged"]["get"]["security"] == [{"BearerToken": ["internal"]}]
    assert paths["/patient"]["get"]["security"] == [{"BearerToken": ["a"]}, {"BearerToken": ["b"]}]
    assert "504" in paths["/patient"]["get"]["responses"]
    assert "504" not in paths["/tagged"]["get"]["responses"]


def test_scopes_of_a_dependency_are_documented_as_the_policies_take_them() -> None:
    app = service()

    @app.get("/read", dependencies=[require_scopes("a", "b")])
    async def read(caller: CurrentPrincipal) -> None: ...

    plain = deepcopy(app.openapi())
    assert plain["paths"]["/read"]["get"]["security"][:2] == [{"BearerToken": ["a", "b"]}, {"ApiKey": ["a", "b"]}]
    made = document(BEARER, Scopes(), app=app)
    assert made["paths"]["/read"]["get"]["security"] == [{"BearerToken": ["a", "b"]}]
    # There is no policy for keys, so that nothing speaks of them.
    assert set(made["components"]["securitySchemes"]) == {"BearerToken"}


def test_a_dependency_that_takes_a_caller_is_documented_also_where_no_policy_asks() -> None:
    def asking() -> FastAPI:
        app = FastAPI()

        @app.get("/read", dependencies=[require_scopes("a")])
        @policy(public=True)
        async def read() -> None: ...

        return app

    for policies in ((BEARER, Scopes()), (BEARER, Scopes(routes={"/read": "a"}))):
        made = document(Problems(), *policies, app=asking())["paths"]["/read"]["get"]
        assert made["security"] == [{"BearerToken": ["a"]}]
        assert {"401", "403"} <= set(made["responses"])
    made = document(Problems(), BEARER, Scopes(routes={"/read": "b"}), app=asking())
    assert made["paths"]["/read"]["get"]["security"] == [{"BearerToken": ["b", "a"]}]


def test_in_openapi_3_0_only_oauth_has_scopes() -> None:
    app = service()
    app.openapi_version = "3.0.3"
    app.add_middleware(PolicyStack, policies=[BEARER, Scopes(routes={"POST /items": "a"})])
    made = enrich_openapi(app).openapi()
    assert made["openapi"] == "3.0.3"
    assert made["paths"]["/items"]["post"]["security"] == [{"BearerToken": []}]
    OpenAPIV30SpecValidator(made).validate()


@pytest.mark.parametrize("started", [False, True])
def test_templates_are_found_in_whatever_form_they_are_written(started: bool) -> None:
    app = FastAPI()

    @app.get("/n/{number:int}", tags=["t"])
    @policy(scopes="n")
    async def number(number: int) -> None: ...

    @app.get("/files/{rest:path}")
    @app.head("/files/{rest:path}")
    async def files(rest: str) -> None: ...

    rules = {"/files/**": "f"}
    app.add_middleware(PolicyStack, policies=[BEARER, Scopes(routes=rules), Conditional()])
    enrich_openapi(app)
    if started:
        with TestClient(app):
            made = app.openapi()
    else:
        made = app.openapi()
    assert made["paths"]["/n/{number}"]["get"]["security"] == [{"BearerToken": ["n"]}]
    for method in ("get", "head"):
        assert made["paths"]["/files/{rest}"][method]["security"] == [{"BearerToken": ["f"]}]
        assert "304" in made["paths"]["/files/{rest}"][method]["responses"]


def test_what_an_endpoint_raises_is_documented_as_all_other_problems() -> None:
    app = FastAPI()

    @app.get("/x", responses=problem_responses(GONE, LATE, GONE))
    async def x() -> None: ...

    made = document(RequestID(), Problems(), app=app)
    responses = made["paths"]["/x"]["get"]["responses"]
    assert responses["404"] == {"$ref": "#/components/responses/LATE_002"}
    assert codes(made, responses["409"]) == ["LATE_001"]
    assert "X-Request-ID" in follow(made, responses["404"])["headers"]


def test_policies_of_several_middlewares_are_all_asked() -> None:
    app = service()
    app.add_middleware(BearerAuthMiddleware, issuers=BEARER.issuers, required=True)
    app.add_middleware(ProblemsMiddleware)
    app.add_middleware(RequestIDMiddleware)
    enrich_openapi(app)
    before = app.openapi()
    assert before["paths"]["/items"]["post"]["security"] == [{"BearerToken": []}]
    with TestClient(app):  # now the stacks are made, and fused
        assert app.openapi() == before
        assert app.openapi() is not before


def test_a_stack_around_the_application_is_asked_too() -> None:
    app = service()
    stack = PolicyStack(app, [RequestID(), Timeout()])
    assert enrich_openapi(stack) is stack
    assert enrich_openapi(stack) is stack
    assert "504" in app.openapi()["paths"]["/health"]["get"]["responses"]
    assert TestClient(stack).get("/openapi.json").json() == app.openapi()


# --- what is left alone --------------------------------------------------------------------------------------------


def test_what_the_application_has_declared_stays() -> None:
    app = FastAPI()
    own = OAuth2PasswordBearer(tokenUrl="token", scopes={"a": "A"}, auto_error=False)
    declared: Any = {
        401: {"description": "Mine", "content": {"text/plain": {"schema": {"type": "string"}}}},
        200: {"headers": {"x-request-id": {"description": "Mine", "schema": {"type": "string"}}}},
    }

    @app.get("/x", responses=declared, dependencies=[Security(own, scopes=["a"])])
    async def x(q: int = 0) -> None: ...

    plain = deepcopy(app.openapi())["paths"]["/x"]["get"]
    made = document(RequestID(), Problems(), BEARER, Scopes(routes={"/x": "b"}), app=app)["paths"]["/x"]["get"]
    assert made["security"] == plain["security"] == [{"OAuth2PasswordBearer": ["a"]}]
    assert made["responses"]["401"]["description"] == "Mine"
    assert made["responses"]["401"]["content"] == plain["responses"]["401"]["content"]
    assert made["responses"]["200"]["headers"] == plain["responses"]["200"]["headers"]
    assert "X-Request-ID" in made["responses"]["401"]["headers"]


def test_names_that_are_taken_are_not_taken_away() -> None:
    app = FastAPI()

    @app.get("/x", dependencies=[Security(HTTPBearer(scheme_name="ApiKey", auto_error=False))])
    async def x() -> None: ...

    @app.get("/y")
    async def y() -> None: ...

    made = document(BEARER, KEYS, Scopes(), app=app)
    schemes = made["components"]["securitySchemes"]
    assert schemes["ApiKey"] == {"type": "http", "scheme": "bearer"}
    assert schemes["ApiKey-2"]["type"] == "apiKey"
    # A token in Authorization has a name already: the application's.
    assert made["paths"]["/y"]["get"]["security"] == [{"ApiKey": []}, {"ApiKey-2": []}]


def test_twice_is_once() -> None:
    app = service()
    app.add_middleware(PolicyStack, policies=everything())
    once = enrich_openapi(app).openapi()
    assert enrich_openapi(app).openapi() is once
    assert app.openapi() is once


def test_the_framework_s_own_document_is_not_touched() -> None:
    app = service()
    plain = deepcopy(service().openapi())
    app.add_middleware(PolicyStack, policies=everything())
    assert app.openapi_schema is None
    enrich_openapi(app)
    assert app.openapi_schema is None
    app.openapi()
    assert app.openapi_schema == plain


def test_routes_that_are_added_late_are_seen() -> None:
    app = service()
    app.add_middleware(PolicyStack, policies=[RequestID(), BEARER, Scopes(routes={"GET /late": "late"})])
    enrich_openapi(app)
    with TestClient(app) as client:
        assert "/late" not in app.openapi()["paths"]

        @app.get("/late")
        async def late() -> None: ...

        made = client.get("/openapi.json")
        assert made.status_code == 401  # the document is a route as any other
        assert app.openapi()["paths"]["/late"]["get"]["security"] == [{"BearerToken": ["late"]}]


def test_middlewares_that_are_added_after_the_first_look_are_seen() -> None:
    app = enrich_openapi(service())
    assert "504" not in app.openapi()["paths"]["/health"]["get"]["responses"]
    app.add_middleware(PolicyStack, policies=[Timeout()])
    assert "504" in app.openapi()["paths"]["/health"]["get"]["responses"]


def test_an_application_s_own_document_is_enriched_and_kept() -> None:
    app = service()

    def own() -> dict[str, Any]:
        return {
            "openapi": "3.1.0",
            "info": {"title": "mine", "version": "1"},
            "paths": {"/health": {"summary": "S", "get": {"responses": {"200": {"description": "fine"}}}}},
        }

    app.openapi = own  # type: ignore[method-assign]  # FastAPI's documented way
    made = document(RequestID(), app=app)
    assert made["info"] == {"title": "mine", "version": "1"}
    assert "X-Request-ID" in made["paths"]["/health"]["get"]["responses"]["200"]["headers"]


@pytest.mark.parametrize(
    "own",
    [
        {"paths": None, "components": None},
        {"paths": {"/x": None, "/y": {"$ref": "#/components/pathItems/Y"}}, "components": {"securitySchemes": None}},
        {"paths": {"/x": {"get": {"responses": None}, "put": None, "parameters": []}}, "components": {"schemas": None}},
        {"paths": {"/x": {"get": {"responses": {200: {"description": "A number"}, "404": None, "4XX": {}}}}}},
    ],
    ids=["nothing", "references", "empty", "numbers"],
)
def test_an_application_s_own_document_may_be_odd(own: Any) -> None:
    app = FastAPI()
    app.openapi = lambda: {"openapi": "3.1.0", "info": {"title": "Own", "version": "1"}, **own}  # type: ignore[method-assign]
    app.add_middleware(PolicyStack, policies=everything())
    made = enrich_openapi(app).openapi()
    operation = ((made["paths"] or {}).get("/x") or {}).get("get")
    assert operation is None or {"401", "429"} <= operation["responses"].keys()
    assert operation is None or all(isinstance(code, str) for code in operation["responses"])


def test_a_stack_behind_a_middleware_that_is_a_function_is_asked() -> None:
    def passing(inner: Any) -> Any:
        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            await inner(scope, receive, send)

        return middleware

    app = service()
    app.add_middleware(PolicyStack, policies=[KEYS])
    app.add_middleware(passing)
    app.middleware_stack = app.build_middleware_stack()
    assert enrich_openapi(app).openapi()["paths"]["/items"]["post"]["security"] == [{"ApiKey": []}, {}]


def test_an_application_without_policies_keeps_its_document() -> None:
    assert enrich_openapi(service()).openapi() == service().openapi()


def test_policies_that_say_nothing_are_no_matter() -> None:
    class Silent(Policy): ...

    assert document(Silent()) == service().openapi()


def test_limits_in_flight_are_documented() -> None:
    made = document(Problems(), ConcurrencyLimit(limits=2))
    assert codes(made, made["paths"]["/items"]["post"]["responses"]["429"]) == ["RATE_002"]


@pytest.mark.parametrize("app", [Starlette(), object(), None, PolicyStack(Starlette())])
def test_only_fastapi_makes_documents(app: Any) -> None:
    with pytest.raises(TypeError, match="FastAPI"):
        enrich_openapi(app)


def test_looking_is_nothing_to_the_application() -> None:
    """The document may be asked for before the start: no middleware of others is made for that."""
    made: list[Any] = []

    class Other:
        def __init__(self, app: Any) -> None:
            made.append(app)
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    app = service()
    app.add_middleware(Other)
    app.add_middleware(PolicyStack, policies=[RequestID()], clock=SYSTEM_CLOCK)
    enrich_openapi(app).openapi()
    assert made == []
    assert app.middleware_stack is None
    app.add_middleware(PolicyStack, policies=[Timeout()])  # refused once an application has started


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_the_document(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from fastapi import FastAPI\n"
        "from sigil_policy import PolicyStack, RequestID\n"
        "app = FastAPI(title='Läden')\n"
        "app.add_middleware(PolicyStack, policies=[RequestID()])\n"
        "@app.get('/x')\n"
        "async def x() -> None: ...\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "sigil_policy.frameworks.openapi", "shop:app"],
        cwd=tmp_path, env={"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8"}, capture_output=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, b"")
    made = json.loads(run.stdout)
    assert made["info"]["title"] == "Läden"
    assert "X-Request-ID" in made["paths"]["/x"]["get"]["responses"]["200"]["headers"]


def make_service() -> FastAPI:
    return service(title="made")


NOT_AN_APP = 5


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (["nothing"], "names no application"),
        ([":app"], "names no application"),
        (["json:"], "names no application"),
        (["no_such_module_here:app"], "no module 'no_such_module_here'"),
        (["json.no_such_part:app"], "no module 'json.no_such_part'"),
        (["json:app"], "has no 'app'"),
        (["json:JSONDecoder"], "is no FastAPI application"),
        (["json:dumps"], "--factory"),
        (["--factory", "string:digits"], "no function"),
        (["--factory", "builtins:dict"], "FastAPI application, not for dict"),
        (["--factory", "starlette.applications:Starlette"], "not for Starlette"),
    ],
)
def test_a_wrong_target_is_a_sentence(target: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(target) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_factory_is_called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shops", sys.modules[__name__])
    assert main(["--factory", "shops:make_service"]) == 0
    assert json.loads(capsys.readouterr().out)["info"]["title"] == "made"


def test_annotations_of_schemes_are_those_that_the_document_replaces() -> None:
    """A scheme under our name that is not ours stays: it is the application's."""
    app = FastAPI()
    own = HTTPBearer(scheme_name="BearerToken", bearerFormat="opaque", auto_error=False)

    @app.get("/x")
    async def x(token: Annotated[Any, Security(own)]) -> None: ...

    made = document(BEARER, Scopes(), app=app)
    assert made["components"]["securitySchemes"] == {
        "BearerToken": {"type": "http", "scheme": "bearer", "bearerFormat": "opaque"}
    }

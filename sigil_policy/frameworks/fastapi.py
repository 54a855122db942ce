"""What FastAPI's endpoints take as parameters: who calls, what is left of the budget, the id of the exchange.

    @app.get("/v7/agents", dependencies=[require_scopes("agents:read")])
    async def agents(caller: CurrentPrincipal, budget: Budget) -> list[Agent]: ...

    @app.post("/v7/agents/{name}/run")
    async def run(caller: Annotated[Principal, require_scopes("agents:execute")], usage: TokenUsage) -> Run:
        answer = await model(caller.subject)
        usage.report(input_tokens=answer.read, output_tokens=answer.written)

They read what the stack in front of the application has found, and verify nothing a second time:

* `CurrentPrincipal`: the caller; nobody is answered 401 `AUTH_001`, with the challenges that the stack offers;
* `OptionalPrincipal`: the caller, or None;
* `require_scopes(...)`: FastAPI's `Security(current_principal, scopes=[...])`. A caller without them is answered 403
  `AUTH_004`; the superscope of `Scopes` opens it as it opens all. Where `Scopes` is mounted it knows these scopes from
  the route, and has answered before the body was read;
* `RequestID`: the id of this exchange; `Budget`: the `Quota`, without windows where nothing is counted;
* `TokenUsage`: where the endpoint tells which tokens it has used.

(The policy `RequestID` and the fact `TokenUsage`, of which these two speak, are `sigil_policy.RequestID` and
`sigil_policy.TokenUsage`.)

They close, never open: without a stack in front, or one that lacks the policy they read from, they raise
`PolicyMissingError`, which is logged and answered with 500. On a WebSocket a refusal is a close code.

In the OpenAPI document `CurrentPrincipal` and `require_scopes` name the security schemes `BearerToken` and `ApiKey`,
with scopes; `enrich_openapi` makes of them what the policies really take.
"""

import logging
from typing import Annotated, Any

from fastapi import Depends, Security, WebSocketException
from fastapi.exceptions import HTTPException
from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from sigil_policy.core.catalogue import CREDENTIALS_MISSING, SCOPE_INSUFFICIENT
from sigil_policy.core.exchange import Exchange, get_exchange, report_tokens
from sigil_policy.core.facts import Correlation, Principal, Quota
from sigil_policy.core.facts import TokenUsage as Tokens
from sigil_policy.core.problems import DEFAULT_STYLE, Problem, close_code
from sigil_policy.frameworks.openapi import OWN_SCHEMES
from sigil_policy.identity.challenges import Challenges, challenge_line
from sigil_policy.wire.authorization import challenge, is_scope_token

logger = logging.getLogger("sigil_policy")

_ANY_CHALLENGE = (challenge_line("Bearer", "api"),)


class PolicyMissingError(RuntimeError):
    """An endpoint asks for what no policy in front of it gives: a fault of the application, never of the caller."""


def _exchange(connection: HTTPConnection, fact: type, mount: str) -> Exchange:
    """The exchange, in which a policy in front of the endpoint gives `fact` (`Exchange` itself: any stack does)."""
    try:
        ex = get_exchange(connection)
    except LookupError:
        ex = None
    if ex is None or (fact is not Exchange and fact not in ex and fact not in ex._given):  # noqa: SLF001
        lacking = "PolicyStack" if ex is None else f"policy that gives {fact.__name__}"
        text = f"an endpoint asks for {fact.__name__}, and there is no {lacking} in front of it: mount {mount}"
        logger.error(text)
        raise PolicyMissingError(text)
    return ex


# --- who calls -------------------------------------------------------------------------------------------------------


class BearerToken(SecurityBase):
    """Documents a token in `Authorization`; called, it is whom a policy has accepted such a token for, or None.

    `scheme_name` is its name in the document (default "BearerToken").
    """

    def __init__(self, *, scheme_name: str = "BearerToken", description: str | None = None) -> None:
        self.scheme_name = scheme_name
        self.model = HTTPBearer(bearerFormat="JWT", description=description)

    async def __call__(self, connection: HTTPConnection) -> Principal | None:
        return _caller(connection, "bearer")


class ApiKey(SecurityBase):
    """Documents an API key in a header; called, it is whom a policy has accepted a key for, or None.

    `name` is the header that the document names (default "X-API-Key"), `scheme_name` its own name there (default
    "ApiKey").
    """

    def __init__(self, *, name: str = "X-API-Key", scheme_name: str = "ApiKey", description: str | None = None) -> None:
        self.scheme_name = scheme_name
        location: Any = {"in": APIKeyIn.header}  # the alias is a keyword
        self.model = APIKey(**location, name=name, description=description)

    async def __call__(self, connection: HTTPConnection) -> Principal | None:
        return _caller(connection, "api_key")


def _caller(connection: HTTPConnection, kind: str) -> Principal | None:
    ex = _exchange(connection, Principal, "BearerAuth or ApiKeyAuth")
    return next((principal for principal in ex.principals if principal.kind == kind), None)


_BEARER, _API_KEY = BearerToken(), ApiKey()
for _scheme in (_BEARER, _API_KEY):
    OWN_SCHEMES[_scheme.scheme_name] = _scheme.model.model_dump(mode="json", by_alias=True, exclude_none=True)


async def optional_principal(connection: HTTPConnection) -> Principal | None:
    """The caller, or None where nobody has said who they are."""
    return _exchange(connection, Principal, "BearerAuth or ApiKeyAuth").principal


async def current_principal(
    connection: HTTPConnection,
    scopes: SecurityScopes,
    _bearer: Annotated[Principal | None, Depends(_BEARER)] = None,
    _key: Annotated[Principal | None, Depends(_API_KEY)] = None,
) -> Principal:
    """The caller, who has all scopes that `Security(current_principal, scopes=[...])` names."""
    ex = _exchange(connection, Principal, "BearerAuth or ApiKeyAuth")
    principal = ex.principal
    if principal is None:
        offered = ex.get(Challenges)
        raise _refused(
            ex,
            CREDENTIALS_MISSING(
                "This route takes an authenticated caller",
                headers=_ANY_CHALLENGE if offered is None else offered.lines,
            ),
        )
    # What the stack has granted: all of them to who has the superscope.
    auth = connection.scope.get("auth")
    held = principal.scopes if auth is None else auth.scopes
    missing = [scope for scope in scopes.scopes if scope not in held]
    if missing:
        required = list(dict.fromkeys(scopes.scopes))
        line = challenge("Bearer", realm=principal.realm, error="insufficient_scope", scope=required)
        problem = SCOPE_INSUFFICIENT(
            f"This route takes the scope{'s' * (len(required) > 1)} {', '.join(required)}",
            headers=((b"www-authenticate", line),),
            required_scopes=required,
            missing_scopes=list(dict.fromkeys(missing)),
        )
        raise _refused(ex, problem)
    return principal


def _refused(ex: Exchange, problem: Problem) -> Exception:
    """`problem` as an exception that is answered here."""
    if ex.kind == "websocket":
        return WebSocketException(close_code(problem.status), problem.type.title)
    if ex.style is not DEFAULT_STYLE:
        return problem
    # Nobody answers problems of the application here: `Problems`, which sets a style of its own, is not mounted.
    headers: dict[str, str] = {}
    for name, value in problem.headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return HTTPException(problem.status, problem.detail, headers)


CurrentPrincipal = Annotated[Principal, Security(current_principal)]
"""Who calls; nobody is refused."""

OptionalPrincipal = Annotated[Principal | None, Depends(optional_principal)]
"""Who calls, or None."""


def require_scopes(*scopes: str) -> Any:
    """A caller with all of these scopes: for `dependencies=[...]`, and for `Annotated[Principal, ...]`.

        @app.get("/v7/agents", dependencies=[require_scopes("agents:read")])

    Raises `ValueError` for what can be no scope (RFC 6749 section 3.3), and for none at all.
    """
    if not scopes:
        raise ValueError("require_scopes() names no scope; CurrentPrincipal takes any caller")
    for scope in scopes:
        if not isinstance(scope, str) or not is_scope_token(scope):
            raise ValueError(
                f"scope {scope!r} must be printable ASCII without space, quote and backslash, for example "
                "'agents:read' (RFC 6749 section 3.3); write several scopes as several arguments"
            )
    return Security(current_principal, scopes=list(scopes))


# --- what is known of the exchange -----------------------------------------------------------------------------------


async def current_request_id(connection: HTTPConnection) -> str:
    """The id of this exchange, as `RequestID` gives it."""
    return _exchange(connection, Correlation, "RequestID")[Correlation].request_id


async def current_budget(connection: HTTPConnection) -> Quota:
    """What the caller may still do; without windows where nothing is counted: on exempt routes, with a lost store."""
    found = _exchange(connection, Quota, "RateLimit").get(Quota)
    return Quota("", tuple) if found is None else found


class Usage:
    """What an exchange has used, as its endpoint tells it.

    usage.report(input_tokens=120, output_tokens=48)
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection

    def report(self, *, input_tokens: int = 0, output_tokens: int = 0, total_tokens: int | None = None) -> Tokens:
        """Add to what was told before, as `report_tokens` does; the sum."""
        told = {"input_tokens": input_tokens, "output_tokens": output_tokens}
        return report_tokens(self._connection, **told, total_tokens=total_tokens)

    @property
    def so_far(self) -> Tokens:
        """The sum of what was told until now."""
        return get_exchange(self._connection).get(Tokens) or Tokens()


async def current_usage(connection: HTTPConnection) -> Usage:
    """For an endpoint to tell what it uses."""
    _exchange(connection, Exchange, "one")
    return Usage(connection)


RequestID = Annotated[str, Depends(current_request_id)]
"""The id of this exchange, which the policy of the same name gives."""

Budget = Annotated[Quota, Depends(current_budget)]
"""What the caller may still do."""

TokenUsage = Annotated[Usage, Depends(current_usage)]
"""Where the endpoint tells which tokens it has used."""

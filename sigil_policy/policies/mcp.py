"""Guards an MCP server: which web pages may talk to it, and which caller may call which tool.

    PolicyStack(mcp.http_app(), policies=[
        McpEndpoint(paths=["/mcp"], origins=["https://app.example.com"]),
        BearerAuth(issuers=[...]),
        McpTools(paths=["/mcp"], tools={"search": "documents:read", "delete": "documents:write"}),
    ])

`sigil_policy.presets.mcp_server` makes the whole stack, metadata and limits included.

What it guarantees:

* An `Origin` that is not listed is refused with 403, `null` too; it is what keeps a page that has rebound its name from
  calling a server on this machine: browsers send it with every POST. What comes without one passes: a client that is no
  web page, or a GET of a page that has the server's own name. No page gets a token that it does not have.
* What a call is judged by is what the server executes: the message in the body. It is read up to `body_limit`, and has
  to be one message. `Mcp-Method`, `Mcp-Name` and `MCP-Protocol-Version` have to agree with it; where they contradict
  it, or are missing in a version of the protocol that requires them, the answer is 400 with the JSON-RPC error -32020.
  Clients of older versions send none of them and are judged by their body.
* With `verify="headers"` the body is not read. Then a call is judged by what its headers say, and that is as good as
  the server behind, which must refuse headers that contradict its body, as 2026-07-28 demands. Requests of versions
  that do not demand it, or that name none, are refused with 400.
* A tool that is not in the table gets the rule under `"*"`; without one nobody but the superscope may call it.
* Everything here takes a caller; what has none gets 401 with the scopes that the call would take.

Tokens are for this server: never hand the one that a caller sent to another service. MCP 2026-07-28, "Streamable HTTP"
and "Authorization"; RFC 6750 section 3.1.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from sigil_policy.core.catalogue import (
    BODY_TOO_LARGE,
    CREDENTIALS_MISSING,
    PROOF_INVALID,
    PROOF_NONCE_REQUIRED,
    SCOPE_INSUFFICIENT,
    http_problem,
)
from sigil_policy.core.exchange import BodyTooLargeError, Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Answer, Listed, Policy
from sigil_policy.core.problems import Problem, ProblemStyle, Reply, close_code, encode_json
from sigil_policy.core.routing import has_dot_segment, parse_route
from sigil_policy.identity.challenges import Challenges, asking_for, challenge_line, is_preflight, token_scheme
from sigil_policy.identity.fields import Scope
from sigil_policy.wire.authorization import challenge, is_scope_token, split_scopes
from sigil_policy.wire.mcp import (
    Message,
    NotOneMessageError,
    decode_value,
    has_mirrored_headers,
    read_message,
    takes_name,
)
from sigil_policy.wire.origins import Origins

PARSE_ERROR = -32_700
INVALID_REQUEST = -32_600
INVALID_PARAMS = -32_602
HEADER_MISMATCH = -32_020

_FAILED = -32_000  # of the range that the protocol leaves to implementations
_DEFAULT_CHALLENGE = (challenge_line("Bearer", "api"),)
_OAUTH_CODES = {
    "AUTH_001": "invalid_token",
    "AUTH_002": "invalid_token",
    "AUTH_003": "invalid_request",
    "AUTH_004": "insufficient_scope",
    "AUTH_005": "invalid_token",
    "AUTH_006": "invalid_request",
    "AUTH_007": "invalid_request",
    "AUTH_008": "temporarily_unavailable",
    PROOF_INVALID.code: "invalid_dpop_proof",
    PROOF_NONCE_REQUIRED.code: "use_dpop_nonce",
}

ErrorForm = Literal["problem", "oauth"]


class McpCall(NamedTuple):
    """What a request to an MCP server asks for. Given by `McpTools`, to callers who may have it.

        McpCall(method="tools/call", tool="search")     # what ex[McpCall] is, where a tool of the table is called

    `method` is the message's, as the client wrote it; None where there is none. `tool` is the called tool's name in the
    table, `"*"` for one that is not there, None where no tool is called: never text that a client has made up.
    """

    method: str | None
    tool: str | None


def called_tool(ex: Exchange) -> str | None:
    """The tool that is called, as the table of `McpTools` names it; for limits and logs."""
    call = ex.get(McpCall)
    return None if call is None else call.tool


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuthStyle(ProblemStyle):
    """Errors as clients of the MCP SDKs read them: OAuth JSON for credentials, JSON-RPC without an id for the rest."""

    def render(self, problem: Problem, ex: Exchange, *, reraise: bool = False) -> Reply:
        code = _OAUTH_CODES.get(problem.type.code)
        text = problem.detail or problem.type.title
        if code is None:
            error = {"code": _FAILED, "message": text, "data": {"error_code": problem.type.code}}
            members: dict[str, Any] = {"jsonrpc": "2.0", "error": error}
        else:
            members = {"error": code, "error_description": text}
            if problem.extensions.get("required_scopes"):
                members["scope"] = " ".join(problem.extensions["required_scopes"])
        return _json_reply(problem.status, members, problem.headers, reraise=reraise)


class McpEndpoint(Policy):
    """Web pages reach the server only from the listed origins; errors behind it have the form that was asked.

        McpEndpoint(paths=["/mcp"], origins=["https://app.example.com"], errors="oauth")

    Answers 403 to any other `Origin`. Goes inside `Problems`, outside the auth policies. Where browsers are to read the
    answers, mount CORS outside of it, with the same origins, and expose `WWW-Authenticate`.
    """

    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    paths: Annotated[Listed[str], Field(min_length=1)] = ("/**",)
    """Routes of the server (default: all)."""

    exempt: Listed[str] = ()
    """Routes among them that are no part of it, such as `"GET /health"` (default: none)."""

    origins: Listed[str] = ()
    """Origins of web pages that may call it, as browsers write them (default: none)."""

    errors: ErrorForm = "problem"
    """The body of what is refused from here on: `"problem"` (default), or `"oauth"`: OAuth JSON where credentials were
    refused, and JSON-RPC errors for the rest. Headers do not depend on it."""

    @field_validator("origins")
    @classmethod
    def _as_browsers_write_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return Origins(origins).listed

    @model_validator(mode="after")
    def _prepare(self) -> Self:
        _ = self.rules(), self._allowed
        return self

    @cached_property
    def _allowed(self) -> Origins:
        return Origins(self.origins)

    def rules(self) -> Mapping[str, bool]:
        return _routes(self.paths, self.exempt)

    def describe(self, operation: Operation, rule: bool | None) -> None:
        if rule:
            operation.answers(http_problem(403))

    def on_request(self, ex: Exchange) -> Answer:
        # A dot segment may lead anywhere once it is resolved: what it leads to is not guessed.
        rule = ex.rule(self)
        if not rule and (rule is False or not has_dot_segment(ex.path)):
            return None
        if self.errors == "oauth":
            style = ex.style
            ex.style = OAuthStyle(base_url=style.base_url, media_type=style.media_type, instance=style.instance)
        origin = ex.headers.get(b"origin")
        if origin is None or self._allowed.lists(origin):
            return None
        return http_problem(403)("This origin may not call the server")


class McpTools(Policy):
    """Callers call the tools that their scopes open.

        McpTools(
            tools={"search": "documents:read", "purge": ["documents:read", "documents:write"], "*": "tools:other"},
            methods={"resources/read": "documents:read"},
            implies={"documents:write": ["documents:read"]},
        )

    Answers 401 `AUTH_001` to nobody, 403 `AUTH_004` with all scopes that the call takes to somebody with too few, 400
    with a JSON-RPC error to a message that is none or that its headers contradict, 413 `REQ_003` to one over
    `body_limit`, 403 to a WebSocket. Gives `McpCall`. Goes inside the auth policies, outside `Scopes` and `RateLimit`.
    """

    needs: ClassVar[tuple[type, ...]] = (Principal,)
    gives: ClassVar[tuple[type, ...]] = (McpCall,)

    paths: Annotated[Listed[str], Field(min_length=1)] = ("/**",)
    """Routes of the MCP endpoint (default: all). Name it only where the application has other routes that take a
    body: what is not covered is not judged here, but for paths with a dot segment, which may lead anywhere."""

    exempt: Listed[str] = ()
    """Routes among them that are no part of it, such as `"GET /health"` (default: none)."""

    tools: Mapping[str, Listed[str]] = Field(default_factory=lambda: {"*": ()})
    """From tool to the scopes that calling it takes: one, several separated by spaces or as a list (all of them), `[]`
    for any caller. `"*"` is the rule of the tools that are not listed; without it they are closed (default: any
    caller may call any tool)."""

    methods: Mapping[str, Listed[str]] = Field(default_factory=dict)
    """The same for the protocol's other methods, such as `"resources/read"`. `"*"` is the rule of those that are not
    listed (default: they take a caller, and no scope)."""

    implies: Mapping[Scope, Listed[Scope]] = Field(default_factory=dict)
    """From a broad scope to the narrower ones that it contains, at any depth (default: none)."""

    superscope: Scope | None = "admin"
    """The scope that opens everything (default `"admin"`; None: no such scope)."""

    verify: Literal["body", "headers"] = "body"
    """What a call is judged by; see above (default `"body"`)."""

    body_limit: Annotated[int, Field(ge=1_024, le=67_108_864)] = 1_048_576
    """Bytes of a message that is read, at most (default 1 MiB)."""

    @field_validator("tools", "methods", mode="before")
    @classmethod
    def _requirements(cls, table: Any) -> Any:
        if not isinstance(table, Mapping):
            return table
        return {name: _scopes(name, value) for name, value in table.items()}

    @model_validator(mode="after")
    def _prepare(self) -> Self:
        if "tools/call" in self.methods:
            raise ValueError("methods has 'tools/call'; write tools={'*': ...} for every tool")
        _ = self.rules(), self._implied
        return self

    @cached_property
    def _implied(self) -> Mapping[str, frozenset[str]]:
        """From a scope to all that it contains."""
        closed: dict[str, frozenset[str]] = {}
        for scope in self.implies:
            known: set[str] = set()
            waiting = [scope]
            while waiting:
                for narrower in self.implies.get(waiting.pop(), ()):
                    if narrower not in known:
                        known.add(narrower)
                        waiting.append(narrower)
            closed[scope] = frozenset(known)
        return closed

    def rules(self) -> Mapping[str, bool]:
        return _routes(self.paths, self.exempt)

    def describe(self, operation: Operation, rule: bool | None) -> None:
        if not rule:
            return
        operation.required = True
        operation.answers(CREDENTIALS_MISSING, headers=("WWW-Authenticate",))
        if operation.method == "POST":
            operation.answers(http_problem(400))
            if self.verify == "body":
                operation.answers(BODY_TOO_LARGE, max_bytes=self.body_limit)
        if self._may_forbid(operation.method):
            operation.answers(
                SCOPE_INSUFFICIENT, headers=("WWW-Authenticate",), required_scopes=["a"], missing_scopes=["a"]
            )

    def _may_forbid(self, method: str) -> bool:
        if method != "POST":
            return bool(self.methods.get("*"))
        return "*" not in self.tools or any(self.tools.values()) or any(self.methods.values())

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        rule = ex.rule(self)
        unclear = rule is None and has_dot_segment(ex.path)
        if not (rule or unclear):
            return None
        if ex.principal is None:
            return None if is_preflight(ex) else self._unknown(ex)
        if unclear:
            return http_problem(400)("The path has a dot segment; ask for the path that it means")
        if ex.kind != "http":
            return http_problem(403)("This server is spoken to over HTTP")  # a call in a frame would not be judged
        if ex.method != "POST":
            # Listening and leaving, in versions of the protocol that have sessions: no message, so no tool.
            return self._judge(ex, ex.principal, None, None)
        if self.verify == "body":
            return self._read(ex, ex.principal)
        message = _in_headers(ex)
        return message if isinstance(message, Reply) else self._judge(ex, ex.principal, message.method, message.name)

    async def _read(self, ex: Exchange, principal: Principal) -> Answer:
        try:
            message = read_message(await ex.body(self.body_limit))
        except BodyTooLargeError:
            return BODY_TOO_LARGE(f"A message has at most {self.body_limit} bytes", max_bytes=self.body_limit)
        except ConnectionError:
            return http_problem(400)("The request ended before its body was complete")
        except NotOneMessageError:
            return _rpc_error(INVALID_REQUEST, "The body must be one JSON-RPC message")
        except ValueError:
            return _rpc_error(PARSE_ERROR, "The body must be JSON in UTF-8, without a member that occurs twice")
        if takes_name(message.method) and message.name is None:
            return _rpc_error(INVALID_PARAMS, "The message must name, in a text, what it calls", message.id)
        return _contradiction(ex, message) or self._judge(ex, principal, message.method, message.name)

    def _judge(self, ex: Exchange, principal: Principal, method: str | None, name: str | None) -> Problem | None:
        tool, scopes = self._rule(method, name)
        if self.superscope is None or self.superscope not in principal.scopes:
            if scopes is None:
                return self._forbidden(ex, principal, () if self.superscope is None else (self.superscope,), ())
            missing = [scope for scope in scopes if scope not in self._held(principal)]
            if missing:
                return self._forbidden(ex, principal, scopes, missing)
        ex.give(McpCall(method, tool))
        return None

    def _rule(self, method: str | None, name: str | None) -> tuple[str | None, Sequence[str] | None]:
        """The called tool as the table names it, and the scopes that the call takes; None where nobody may."""
        if method == "tools/call":
            tool = name if name is not None and name in self.tools else "*"
            return tool, self.tools.get(tool)
        return None, self.methods.get(method if method is not None and method in self.methods else "*", ())

    def _held(self, principal: Principal) -> frozenset[str]:
        held = principal.scopes
        return (
            held.union(*(self._implied[scope] for scope in held if scope in self._implied)) if self._implied else held
        )

    def _unknown(self, ex: Exchange) -> Problem:
        # Nobody's body is read: what a call would take is a hint, and headers are good enough for it.
        message = _in_headers(ex)
        scopes = None if isinstance(message, Reply) else self._rule(message.method, message.name)[1]
        offered = ex.get(Challenges)
        lines = _DEFAULT_CHALLENGE if offered is None else offered.lines
        return CREDENTIALS_MISSING(
            "This server takes an authenticated caller", headers=asking_for(lines, scopes) if scopes else lines
        )

    def _forbidden(self, ex: Exchange, principal: Principal, scopes: Sequence[str], missing: Sequence[str]) -> Problem:
        line = challenge(token_scheme(ex), realm=principal.realm, error="insufficient_scope", scope=scopes)
        return SCOPE_INSUFFICIENT(
            f"This call takes {'the scopes ' + ', '.join(scopes) if scopes else 'what no scope gives'}",
            headers=((b"www-authenticate", line),),
            required_scopes=list(scopes),
            missing_scopes=list(missing or scopes),
        )


def _routes(paths: Sequence[str], exempt: Sequence[str]) -> dict[str, bool]:
    for path in paths:
        if parse_route(path).method is not None:
            raise ValueError(f"paths has {path!r}; write the path alone, it stands for every method")
        if path in exempt:
            raise ValueError(f"{path!r} is in paths and in exempt; keep one of them")
    return dict.fromkeys(paths, True) | dict.fromkeys(exempt, False)


def _scopes(name: object, value: Any) -> Any:
    scopes = split_scopes(value) if isinstance(value, str) else value
    if not isinstance(scopes, list | tuple) or (isinstance(value, str) and not scopes):
        raise ValueError(f"{name!r} takes a scope or a list of scopes; [] stands for any caller")
    for scope in scopes:
        if not isinstance(scope, str) or not is_scope_token(scope):
            raise ValueError(f"{name!r}: scope {scope!r} is not printable ASCII without space, quote and backslash")
    return tuple(dict.fromkeys(scopes))


def _in_headers(ex: Exchange) -> Message | Reply:
    """What the headers say, where the protocol's version obliges the server to compare them with the body."""
    if _is_ambiguous(ex) or not has_mirrored_headers(ex.headers.get(b"mcp-protocol-version")):
        return _rpc_error(HEADER_MISMATCH, "MCP-Protocol-Version must be one that mirrors its messages, and only one")
    method = ex.headers.get(b"mcp-method")
    try:
        name = decode_value(ex.headers[b"mcp-name"]) if b"mcp-name" in ex.headers else None
    except ValueError:
        return _rpc_error(HEADER_MISMATCH, "Mcp-Name cannot be read")
    if not method or not method.isascii() or (name is None and takes_name(method.decode("ascii"))):
        return _rpc_error(HEADER_MISMATCH, "Mcp-Method, or the Mcp-Name that it takes, is missing")
    return Message(method.decode("ascii"), name, None)


def _is_ambiguous(ex: Exchange) -> bool:
    return not ex.repeated.keys().isdisjoint((b"mcp-method", b"mcp-name", b"mcp-protocol-version"))


def _contradiction(ex: Exchange, message: Message) -> Reply | None:
    """What is wrong with the headers of `message`, if anything."""
    headers = ex.headers
    version, method, name = (headers.get(h) for h in (b"mcp-protocol-version", b"mcp-method", b"mcp-name"))
    wrong = None
    if _is_ambiguous(ex):
        wrong = "MCP-Protocol-Version, Mcp-Method and Mcp-Name stand at most once"
    elif has_mirrored_headers(version):
        if message.version is not None and message.version != (version or b"").decode("ascii"):
            wrong = "MCP-Protocol-Version is not the version that the message tells"
        elif message.id is not None and (method is None or (takes_name(message.method) and name is None)):
            wrong = "Mcp-Method, or the Mcp-Name that it takes, is missing"
    if wrong is None and method is not None and method != (message.method or "").encode("utf-8", "surrogatepass"):
        wrong = "Mcp-Method is not the method of the message"
    if wrong is None and name is not None and takes_name(message.method):
        try:
            same = decode_value(name) == message.name
        except ValueError:
            same = False
        if not same:
            wrong = "Mcp-Name is not what the message names"
    return None if wrong is None else _rpc_error(HEADER_MISMATCH, wrong, message.id)


def _rpc_error(code: int, message: str, of: str | int | None = None) -> Reply:
    members: dict[str, Any] = {"jsonrpc": "2.0"}
    if of is not None:
        members["id"] = of
    return _json_reply(400, {**members, "error": {"code": code, "message": message}}, ())


def _json_reply(status: int, members: Mapping[str, Any], headers: Any, *, reraise: bool = False) -> Reply:
    body = encode_json(members)
    pairs = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-content-type-options", b"nosniff"),
        *headers,
    ]
    if all(name != b"cache-control" for name, _ in headers):
        pairs.append((b"cache-control", b"no-store"))
    return Reply(status=status, headers=pairs, body=body, code=close_code(status), reraise=reraise)

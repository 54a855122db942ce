"""Ready stacks: what a kind of server needs, in the order that works, from a few settings.

    from sigil_policy import Issuer, PolicyStack
    from sigil_policy.presets import Tool, mcp_server

    app = PolicyStack(mcp.http_app(stateless_http=True), policies=mcp_server(
        resource="https://api.example.com/mcp",
        issuers=[Issuer(url="https://auth.example.com", audience="https://api.example.com/mcp", keys=[...])],
        tools={
            "search": "documents:read",
            "summarize": Tool(scopes="documents:read", limits=Tier(tokens="5000/hour"), estimate=500),
        },
    ))

A preset is a list of policies and no more: print it, take one out, put yours between.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.identity.fields import CONFIG
from sigil_policy.identity.issuers import Issuer
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.mcp import ErrorForm, McpEndpoint, McpTools, called_tool
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.protected_resource import ProtectedResource, ProtectedResourceMetadata
from sigil_policy.policies.rate_limit import Level, RateLimit, Tier, TokenRule
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.scopes import Scopes


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tool:
    """What calling one tool takes and may spend.

        Tool(scopes="documents:read", limits=Tier(requests="10/minute", tokens="5000/hour"), estimate=500)

    Options:
        scopes: one scope, several separated by spaces, or a list: all of them (default `[]`: any caller).
        limits: what each caller may do with this tool, beside the limits of its tier: a `Tier`, or a string of request
            limits (default None: no more than the tier's).
        estimate: language-model tokens to reserve for a call (default 0). What is charged in the end is what the tool
            reports (`report_tokens`), else what its response amounts to: a token for 4 bytes.
    """

    scopes: str | Listed[str] = ()
    limits: Tier | str | None = None
    estimate: int = Field(default=0, ge=0)


def mcp_server(
    *,
    resource: str,
    issuers: Sequence[Issuer],
    tools: Mapping[str, Tool | str | Sequence[str]] | None = None,
    methods: Mapping[str, str | Sequence[str]] | None = None,
    implies: Mapping[str, Sequence[str]] | None = None,
    origins: Sequence[str] = (),
    paths: Sequence[str] = ("/**",),
    public: Sequence[str] = (),
    errors: ErrorForm = "problem",
    metadata: Mapping[str, Any] | None = None,
    auth: Sequence[Policy] = (),
    limits: Mapping[str, Any] | None = None,
    allow_loopback: bool = False,
) -> list[Policy]:
    """The policies of a protected MCP server, outermost first.

        app = PolicyStack(mcp.http_app(), policies=mcp_server(resource="https://api.example.com/mcp", issuers=[...]))

    Who may call it and what is refused is said in `sigil_policy.policies.mcp`: tokens that were issued for this server
    (`aud` is `resource`, RFC 8707), web pages from `origins` only, tools by scope, messages that agree with their
    headers. Metadata is served, and named in challenges, as `sigil_policy.policies.protected_resource` says.

    Options:
        resource: the server's public URL; it is the audience of its tokens.
        issuers: whose tokens are accepted. Each names `resource` as its audience.
        tools: tool to `Tool`, or to scopes; `"*"` stands for tools that are not listed, which are closed without it
            (default: any caller may call any tool).
        methods, implies: as of `McpTools` (default none).
        origins: origins of web pages that may call the server (default none).
        paths: routes of the MCP endpoint (default: all but `public`). Name it only where the application has other
            routes that take a body: elsewhere a call of a tool would not be judged.
        public: routes of the application that take no caller, such as `"GET /health"` (default none).
        errors: `"problem"` (default) or `"oauth"`; see `McpEndpoint`.
        metadata: further options of `ProtectedResource` (default: the issuers as `authorization_servers`, and the
            scopes of `tools` and `methods` as `scopes_supported`).
        auth: the policies that authenticate (default: `BearerAuth(issuers=issuers)`); with your own, `issuers` are only
            checked and named.
        limits: options of `RateLimit`, such as `{"tiers": ..., "store": "redis://..."}` (default: the guidelines' tiers
            in this process; who has none is "standard", because a client begins with several requests in one second).
        allow_loopback: allow plain http to this machine, for development (default False).

    Raises `ValueError` for an issuer whose audience is not `resource`, and for what the policies refuse.
    """
    for issuer in issuers:
        audiences = (issuer.audience,) if isinstance(issuer.audience, str) else issuer.audience or ()
        if tuple(audiences) != (resource,):
            raise ValueError(
                f"issuer {issuer.url!r} takes tokens for {issuer.audience!r}; an MCP server takes only those for "
                f"itself (RFC 8707): give it audience={resource!r}"
            )
    table = {
        name: tool if isinstance(tool, Tool) else Tool(scopes=tool)
        for name, tool in ({"*": ()} if tools is None else tools).items()
    }
    scopes = McpTools(
        paths=paths,
        exempt=public,
        tools={name: tool.scopes for name, tool in table.items()},
        methods=methods or {},
        implies=implies or {},
    )
    described: dict[str, Any] = {
        "authorization_servers": [issuer.url for issuer in issuers],
        "scopes_supported": _in_order((*scopes.tools.values(), *scopes.methods.values())),
        "paths": paths,
        "allow_loopback": allow_loopback,
        **(metadata or {}),
    }
    return [
        RequestID(),
        AccessLog(),
        ProtectedResourceMetadata(documents=[ProtectedResource(resource=resource, **described)]),
        Problems(),
        McpEndpoint(paths=paths, exempt=public, origins=origins, errors=errors),
        *(auth or (BearerAuth(issuers=issuers),)),
        scopes,
        Scopes(public=public),
        RateLimit(**_limits(table, paths, dict(limits or {}))),
    ]


def _in_order(scopes: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(scope for several in scopes for scope in several))


def _limits(tools: Mapping[str, Tool], paths: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """`options` of a RateLimit, with the limits of each tool as a level, and what calls reserve."""
    if "tiers" not in options:
        options.setdefault("default_tier", "standard")
    rows = {name: tool.limits for name, tool in tools.items() if tool.limits is not None}
    if rows:
        level = Level("tool", key=_per_tool(rows), limits=rows, tier=called_tool)
        options["levels"] = (level, *options.get("levels", ()))
    budgeted = any(
        isinstance(row, Tier) and any(window.unit != "requests" for window in row.windows) for row in rows.values()
    )
    estimates = {name: tool.estimate for name, tool in tools.items() if tool.estimate}
    if estimates or budgeted:
        rule = TokenRule(
            estimate=lambda ex: estimates.get(called_tool(ex) or "", 0),
            # An event is a whole result here, and no token; a tool that has done its work is heard.
            count=lambda part: -(-len(part) // 4),
            overrun="overdraw",
        )
        options["tokens"] = {**{f"POST {path}": rule for path in paths}, **options.get("tokens", {})}
    return options


def _per_tool(rows: Mapping[str, Any]) -> Callable[[Exchange], str | None]:
    """Counts per caller and tool. Tools that are not listed are one tool: a caller cannot make up counters."""

    def key(ex: Exchange) -> str | None:
        tool = called_tool(ex)
        return f"{len(tool)} {tool} {ex[Principal].key}" if tool is not None and tool in rows else None

    return key

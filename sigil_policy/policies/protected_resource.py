"""Tells clients which authorization servers issue tokens for this API (RFC 9728).

    ProtectedResourceMetadata(documents=[
        ProtectedResource(
            resource="https://api.example.com/mcp",
            authorization_servers=["https://auth.example.com"],
            scopes_supported=["documents:read"],
        ),
    ])

    GET /.well-known/oauth-protected-resource/mcp       {"resource":"https://api.example.com/mcp", ...}

    HTTP/1.1 401 Unauthorized
    WWW-Authenticate: Bearer realm="api",
        resource_metadata="https://api.example.com/.well-known/oauth-protected-resource/mcp"

What it guarantees:

* The document is served to anybody, from any web page (`Access-Control-Allow-Origin: *`), and may be cached.
* Every challenge in a 400, 401 or 403 that comes from inside for a path of a resource names that resource's metadata,
  whichever policy or application wrote it and whatever its scheme, if that takes parameters. A challenge that names
  metadata already keeps it. A path with a dot segment is of no resource.
* All of it is built from the configuration. Nothing is taken from `Host`, `Forwarded` or any other header.

Goes outside the auth policies, which would ask for credentials first; outside `Problems` too where the application
raises 401 as a problem. Behind a proxy, `/.well-known/oauth-protected-resource` of the public host has to reach this
application. RFC 9728 sections 2, 3 and 5.1.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.catalogue import http_problem
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation, Served, is_success
from sigil_policy.core.policy import Answer, Listed, Policy
from sigil_policy.core.problems import Reply
from sigil_policy.core.routing import RouteMatcher
from sigil_policy.identity.challenges import naming_metadata
from sigil_policy.identity.fields import CONFIG, Scope
from sigil_policy.wire.etags import lists_weakly
from sigil_policy.wire.protected_resources import WELL_KNOWN, check_url, metadata_url, resource_path

Text = Annotated[str, Field(min_length=1, max_length=2_048)]

_CHALLENGING = frozenset((400, 401, 403))
_ALLOWED = (b"allow", b"GET, HEAD, OPTIONS")
_ANY_ORIGIN = (b"access-control-allow-origin", b"*")
_NOT_MEMBERS = frozenset(("allow_loopback", "paths", "extra"))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ProtectedResource:
    """One resource and its metadata. Options are named as the members of RFC 9728 section 2; empty ones are left out.

        ProtectedResource(resource="https://api.example.com/mcp", authorization_servers=["https://auth.example.com"])

    Options:
        resource: the identifier: https, no query, no fragment. Tokens for it have this `aud` (RFC 8707).
        authorization_servers: issuer URLs of who issues tokens for it (default none).
        scopes_supported: scopes that clients may ask for to begin with (default none).
        bearer_methods_supported: how tokens may be sent (default "header", the only way that `BearerAuth` takes).
        jwks_uri, resource_signing_alg_values_supported: keys and algorithms of responses that the resource signs.
        resource_name, resource_documentation, resource_policy_uri, resource_tos_uri: for people.
        tls_client_certificate_bound_access_tokens, dpop_bound_access_tokens_required: True where tokens must be bound
            so (default False).
        dpop_signing_alg_values_supported, authorization_details_types_supported: as the RFC says (default none).
        signed_metadata: the same claims as a JWT that was signed elsewhere (default None).
        extra: further members, such as `{"resource_name#fr": "..."}` (default none).
        paths: the routes that are this resource (default: the path of `resource` and everything below).
        allow_loopback: allow plain http to this machine, for development (default False).
    """

    resource: Text
    authorization_servers: Annotated[Listed[Text], Field(max_length=64)] = ()
    jwks_uri: Text | None = None
    scopes_supported: Annotated[Listed[Scope], Field(max_length=1_024)] = ()
    bearer_methods_supported: Listed[Literal["header", "body", "query"]] = ("header",)
    resource_signing_alg_values_supported: Listed[Text] = ()
    resource_name: Text | None = None
    resource_documentation: Text | None = None
    resource_policy_uri: Text | None = None
    resource_tos_uri: Text | None = None
    tls_client_certificate_bound_access_tokens: bool = False
    authorization_details_types_supported: Listed[Text] = ()
    dpop_signing_alg_values_supported: Listed[Text] = ()
    dpop_bound_access_tokens_required: bool = False
    signed_metadata: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    extra: Mapping[str, Any] = Field(default_factory=dict)
    paths: Listed[str] = ()
    allow_loopback: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_url(self.resource, allow_loopback=self.allow_loopback)
        for url in self.authorization_servers:
            check_url(url, allow_loopback=self.allow_loopback)
        if self.jwks_uri is not None and not self.jwks_uri.startswith("https://"):
            raise ValueError("jwks_uri must be an https URL (RFC 9728 section 2)")
        for name in ("resource_signing_alg_values_supported", "dpop_signing_alg_values_supported"):
            if any(algorithm.lower() == "none" for algorithm in getattr(self, name)):
                raise ValueError(f"{name} has 'none', which signs nothing (RFC 9728 section 2)")
        taken = set(self.extra) & (set(self.__dataclass_fields__) - _NOT_MEMBERS)
        if taken:
            raise ValueError(f"extra has {', '.join(sorted(taken))}; write that as the option of the same name")
        _ = self.document
        return self

    @property
    def url(self) -> str:
        """Where the metadata is."""
        return metadata_url(self.resource)

    @property
    def routes(self) -> tuple[str, ...]:
        return tuple(self.paths) or (f"{resource_path(self.resource).rstrip('/')}/**",)

    @cached_property
    def document(self) -> bytes:
        """The metadata as JSON. Zero values are left out (RFC 9728 section 3.2)."""
        members = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _NOT_MEMBERS}
        try:
            text = json.dumps({**members, **self.extra}, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError):
            raise ValueError("extra has a value that JSON cannot say") from None
        return json.dumps(
            {
                name: value
                for name, value in json.loads(text).items()
                if value is not None and value is not False and value != []
            },
            separators=(",", ":"),
        ).encode("ascii")


class _Document:
    """A document that is ready to be served."""

    __slots__ = ("body", "headers", "tag")

    def __init__(self, body: bytes, max_age: int) -> None:
        self.body = body
        self.tag = b'"' + sha256(body).hexdigest()[:32].encode() + b'"'
        self.headers = (
            (b"etag", self.tag),
            (b"cache-control", b"public, max-age=%d" % max_age),
            _ANY_ORIGIN,
            (b"x-content-type-options", b"nosniff"),
        )


class ProtectedResourceMetadata(Policy):
    """Serves the metadata of the resources behind it, and names it in their challenges.

        ProtectedResourceMetadata(documents=[ProtectedResource(resource="https://api.example.com")])

    Answers `GET`, `HEAD` and `OPTIONS` on the documents' paths, and other methods there with 405. Raises
    `ValidationError` (a `ValueError`) for a resource that cannot be one, and for two with the same path or routes.
    """

    precedes: ClassVar[tuple[type, ...]] = (Principal,)

    documents: Annotated[Listed[ProtectedResource], Field(min_length=1, max_length=1_024)]
    """The resources of this application. Where the routes of several cover a path, the most specific holds."""

    max_age: Annotated[int, Field(ge=0, le=604_800)] = 3_600
    """Seconds for which a document may be cached (default 3600)."""

    @model_validator(mode="after")
    def _prepare(self) -> Self:
        RouteMatcher({0: self.rules()})
        _ = self._from_outside
        return self

    def rules(self) -> Mapping[str, _Document | str]:
        table: dict[str, _Document | str] = {}
        for resource in self.documents:
            document = WELL_KNOWN + resource_path(resource.resource)
            for route in (document, *resource.routes):
                if route in table:
                    raise ValueError(f"two resources have the route {route!r}; give each its own (paths=)")
                table[route] = resource.url
            table[document] = _Document(resource.document, self.max_age)
        return table

    @cached_property
    def _from_outside(self) -> RouteMatcher:
        # The path of a resource is that of its public URL; the one that rules are matched with is without `root_path`.
        return RouteMatcher({0: {route: rule for route, rule in self.rules().items() if isinstance(rule, str)}})

    def describe(self, operation: Operation, rule: _Document | str | None) -> None:
        if type(rule) is not _Document or operation.method == "OPTIONS":
            return
        operation.answered = True
        operation.sends("Access-Control-Allow-Origin", "Any web page may read this: *", required=True)
        if operation.method not in ("GET", "HEAD"):
            operation.answers(http_problem(405), headers={"Allow": ("The methods that this path has", {})})
            return
        operation.public = True
        operation.sends("ETag", "Names what was sent: give it back as If-None-Match (RFC 9110)", when=is_success)
        operation.sends("Cache-Control", "For how long this may be kept (RFC 9111)", when=is_success)
        operation.statuses[304] = "What the client has is still the same (RFC 9110 section 15.4.5)"

    def serves(self) -> Iterable[Served]:
        found = {"description": "The metadata", "content": {"application/json": {"schema": {"type": "object"}}}}
        for resource in self.documents:
            written = {"summary": "Who issues tokens for this resource (RFC 9728)", "responses": {"200": found}}
            yield Served("GET", WELL_KNOWN + resource_path(resource.resource), written)

    def on_request(self, ex: Exchange) -> Answer:
        rule = ex.rule(self)
        if type(rule) is not _Document or ex.kind != "http":
            return None
        if ex.method == "OPTIONS":
            # A browser asks first where a client sends more than a plain GET, as MCP clients do.
            return Reply(
                status=204,
                headers=(
                    _ALLOWED,
                    _ANY_ORIGIN,
                    (b"access-control-allow-methods", b"GET, HEAD"),
                    (b"access-control-allow-headers", b"*"),
                    (b"access-control-max-age", b"86400"),
                ),
            )
        if ex.method not in ("GET", "HEAD"):
            return http_problem(405)("Metadata can only be read", headers=(_ALLOWED, _ANY_ORIGIN))
        known = ex.headers.get(b"if-none-match")
        if known is not None and (known == b"*" or lists_weakly(known, rule.tag)):
            return Reply(status=304, headers=rule.headers)
        return Reply(
            headers=(
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(rule.body)),
                *rule.headers,
            ),
            body=b"" if ex.method == "HEAD" else rule.body,
        )

    def on_response(self, ex: Exchange, head: Head) -> None:
        if head.status not in _CHALLENGING:
            return
        url = ex.rule(self) or self._from_outside.match(ex.method, ex.path).get(0)
        if not isinstance(url, str):
            return
        head.headers[:] = naming_metadata(head.headers, url)

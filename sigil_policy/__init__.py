"""Composable ASGI policies that run in one pass.

    from sigil_policy import AccessLog, PolicyStack, Problems, RequestID

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(), Problems()])    # outermost first

Policies: `RequestID`, `AccessLog`, `Problems`, `Versioning`, `Timeout`, `BearerAuth`, `ApiKeyAuth`, `Scopes`,
`ConcurrencyLimit`, `RateLimit`, `CacheControl`, `Conditional` and more; each also as a middleware of its own
(`RequestIDMiddleware`, ...). Your own policy is a subclass of `Policy`. Endpoints say what they take with
`@policy(...)`. Names load on first use: importing the package imports nothing that you do not use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigil_policy.core.clock import Clock as Clock
    from sigil_policy.core.exchange import Exchange as Exchange
    from sigil_policy.core.exchange import Head as Head
    from sigil_policy.core.exchange import StreamEndedError as StreamEndedError
    from sigil_policy.core.exchange import current_exchange as current_exchange
    from sigil_policy.core.exchange import get_exchange as get_exchange
    from sigil_policy.core.exchange import report_tokens as report_tokens
    from sigil_policy.core.facts import Correlation as Correlation
    from sigil_policy.core.facts import Cosigners as Cosigners
    from sigil_policy.core.facts import Principal as Principal
    from sigil_policy.core.facts import Public as Public
    from sigil_policy.core.facts import Quota as Quota
    from sigil_policy.core.facts import TokenUsage as TokenUsage
    from sigil_policy.core.facts import WindowState as WindowState
    from sigil_policy.core.marks import Marks as Marks
    from sigil_policy.core.marks import policy as policy
    from sigil_policy.core.ordering import PolicyOrderError as PolicyOrderError
    from sigil_policy.core.policy import Close as Close
    from sigil_policy.core.policy import EndOfStream as EndOfStream
    from sigil_policy.core.policy import Policy as Policy
    from sigil_policy.core.problems import Problem as Problem
    from sigil_policy.core.problems import ProblemType as ProblemType
    from sigil_policy.core.problems import Reply as Reply
    from sigil_policy.core.problems import registered_types as registered_types
    from sigil_policy.core.stack import MarksIgnoredError as MarksIgnoredError
    from sigil_policy.core.stack import PolicyStack as PolicyStack
    from sigil_policy.core.stack import RouteMismatchError as RouteMismatchError
    from sigil_policy.identity.api_keys import ApiKeyLedger as ApiKeyLedger
    from sigil_policy.identity.api_keys import ApiKeyRecord as ApiKeyRecord
    from sigil_policy.identity.api_keys import ApiKeys as ApiKeys
    from sigil_policy.identity.api_keys import ApiKeyStore as ApiKeyStore
    from sigil_policy.identity.api_keys import FileApiKeyStore as FileApiKeyStore
    from sigil_policy.identity.api_keys import MemoryApiKeyStore as MemoryApiKeyStore
    from sigil_policy.identity.api_keys import RemoteApiKeyStore as RemoteApiKeyStore
    from sigil_policy.identity.api_keys import TomlApiKeyStore as TomlApiKeyStore
    from sigil_policy.identity.api_keys import key_store as key_store
    from sigil_policy.identity.api_keys import new_key as new_key
    from sigil_policy.identity.api_keys.redis import RedisApiKeyStore as RedisApiKeyStore
    from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore as SqliteApiKeyStore
    from sigil_policy.identity.callers import by_address as by_address
    from sigil_policy.identity.callers import by_claim as by_claim
    from sigil_policy.identity.callers import by_principal as by_principal
    from sigil_policy.identity.callers import by_subject as by_subject
    from sigil_policy.identity.client_certificates import ClientCertificate as ClientCertificate
    from sigil_policy.identity.dpop import DPoP as DPoP
    from sigil_policy.identity.introspection import Introspection as Introspection
    from sigil_policy.identity.issuers import Issuer as Issuer
    from sigil_policy.identity.key_sets import KeySet as KeySet
    from sigil_policy.identity.key_sets import KeysUnavailableError as KeysUnavailableError
    from sigil_policy.identity.keys import Key as Key
    from sigil_policy.identity.requirements import AllOf as AllOf
    from sigil_policy.identity.requirements import AnyOf as AnyOf
    from sigil_policy.identity.requirements import Both as Both
    from sigil_policy.identity.requirements import Either as Either
    from sigil_policy.identity.requirements import FromApiKey as FromApiKey
    from sigil_policy.identity.requirements import FromIssuer as FromIssuer
    from sigil_policy.middleware import AccessLogMiddleware as AccessLogMiddleware
    from sigil_policy.middleware import AllowedOriginsMiddleware as AllowedOriginsMiddleware
    from sigil_policy.middleware import ApiKeyAuthMiddleware as ApiKeyAuthMiddleware
    from sigil_policy.middleware import AuthFailureLimitMiddleware as AuthFailureLimitMiddleware
    from sigil_policy.middleware import BearerAuthMiddleware as BearerAuthMiddleware
    from sigil_policy.middleware import BodyLimitMiddleware as BodyLimitMiddleware
    from sigil_policy.middleware import CacheControlMiddleware as CacheControlMiddleware
    from sigil_policy.middleware import ConcurrencyLimitMiddleware as ConcurrencyLimitMiddleware
    from sigil_policy.middleware import ConditionalMiddleware as ConditionalMiddleware
    from sigil_policy.middleware import McpEndpointMiddleware as McpEndpointMiddleware
    from sigil_policy.middleware import McpToolsMiddleware as McpToolsMiddleware
    from sigil_policy.middleware import ProblemsMiddleware as ProblemsMiddleware
    from sigil_policy.middleware import ProtectedResourceMetadataMiddleware as ProtectedResourceMetadataMiddleware
    from sigil_policy.middleware import RateLimitMiddleware as RateLimitMiddleware
    from sigil_policy.middleware import RequestIDMiddleware as RequestIDMiddleware
    from sigil_policy.middleware import RevocationMiddleware as RevocationMiddleware
    from sigil_policy.middleware import ScopesMiddleware as ScopesMiddleware
    from sigil_policy.middleware import TimeoutMiddleware as TimeoutMiddleware
    from sigil_policy.middleware import VersioningMiddleware as VersioningMiddleware
    from sigil_policy.middleware import WebSocketTicketAuthMiddleware as WebSocketTicketAuthMiddleware
    from sigil_policy.middleware import WebSocketTicketsMiddleware as WebSocketTicketsMiddleware
    from sigil_policy.middleware import as_middleware as as_middleware
    from sigil_policy.policies.access_log import AccessLog as AccessLog
    from sigil_policy.policies.access_log import by_outcome as by_outcome
    from sigil_policy.policies.api_key import ApiKeyAuth as ApiKeyAuth
    from sigil_policy.policies.auth_failures import AuthFailureLimit as AuthFailureLimit
    from sigil_policy.policies.bearer import BearerAuth as BearerAuth
    from sigil_policy.policies.body_limit import BodyLimit as BodyLimit
    from sigil_policy.policies.cache_control import CacheControl as CacheControl
    from sigil_policy.policies.cache_control import CacheRule as CacheRule
    from sigil_policy.policies.concurrency import ConcurrencyLimit as ConcurrencyLimit
    from sigil_policy.policies.conditional import Conditional as Conditional
    from sigil_policy.policies.mcp import McpCall as McpCall
    from sigil_policy.policies.mcp import McpEndpoint as McpEndpoint
    from sigil_policy.policies.mcp import McpTools as McpTools
    from sigil_policy.policies.origins import AllowedOrigins as AllowedOrigins
    from sigil_policy.policies.problems import Problems as Problems
    from sigil_policy.policies.protected_resource import ProtectedResource as ProtectedResource
    from sigil_policy.policies.protected_resource import ProtectedResourceMetadata as ProtectedResourceMetadata
    from sigil_policy.policies.rate_limit import Level as Level
    from sigil_policy.policies.rate_limit import RateLimit as RateLimit
    from sigil_policy.policies.rate_limit import Tier as Tier
    from sigil_policy.policies.rate_limit import TokenRule as TokenRule
    from sigil_policy.policies.request_id import RequestID as RequestID
    from sigil_policy.policies.revocation import Revocation as Revocation
    from sigil_policy.policies.scopes import Scopes as Scopes
    from sigil_policy.policies.timeout import Timeout as Timeout
    from sigil_policy.policies.versioning import Deprecation as Deprecation
    from sigil_policy.policies.versioning import Version as Version
    from sigil_policy.policies.versioning import Versioning as Versioning
    from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth as WebSocketTicketAuth
    from sigil_policy.policies.websocket_tickets import WebSocketTickets as WebSocketTickets
    from sigil_policy.problem_docs import ProblemDocs as ProblemDocs
    from sigil_policy.stores.adapter import LimitsStorage as LimitsStorage
    from sigil_policy.stores.limits import LimitStore as LimitStore
    from sigil_policy.stores.limits import StoreUnavailableError as StoreUnavailableError
    from sigil_policy.stores.memory import memory_limits as memory_limits
    from sigil_policy.stores.redis import RedisLimits as RedisLimits
    from sigil_policy.stores.redis import RedisReplays as RedisReplays
    from sigil_policy.stores.redis import RedisRevocations as RedisRevocations
    from sigil_policy.stores.redis import RedisSlots as RedisSlots
    from sigil_policy.stores.redis import RedisTickets as RedisTickets
    from sigil_policy.stores.replays import MemoryReplays as MemoryReplays
    from sigil_policy.stores.revocations import MemoryRevocations as MemoryRevocations
    from sigil_policy.stores.shares import QuotaShares as QuotaShares
    from sigil_policy.stores.slots import SlotStore as SlotStore
    from sigil_policy.stores.tickets import MemoryTickets as MemoryTickets
    from sigil_policy.telemetry.logs import CorrelationFilter as CorrelationFilter
    from sigil_policy.telemetry.logs import JSONLines as JSONLines
    from sigil_policy.telemetry.logs import add_correlation as add_correlation
    from sigil_policy.telemetry.redaction import Redaction as Redaction
    from sigil_policy.telemetry.redaction import RedactionFilter as RedactionFilter
    from sigil_policy.telemetry.redaction import redact as redact

# Where each public name lives.
_HOMES = {
    "core.clock": ("Clock",),
    "core.exchange": ("Exchange", "Head", "StreamEndedError", "current_exchange", "get_exchange", "report_tokens"),
    "core.facts": ("Correlation", "Cosigners", "Principal", "Public", "Quota", "TokenUsage", "WindowState"),
    "core.marks": ("Marks", "policy"),
    "core.ordering": ("PolicyOrderError",),
    "core.policy": ("Close", "EndOfStream", "Policy"),
    "core.problems": ("Problem", "ProblemType", "Reply", "registered_types"),
    "core.stack": ("MarksIgnoredError", "PolicyStack", "RouteMismatchError"),
    "identity.api_keys": (
        "ApiKeyLedger",
        "ApiKeyRecord",
        "ApiKeys",
        "ApiKeyStore",
        "FileApiKeyStore",
        "MemoryApiKeyStore",
        "RemoteApiKeyStore",
        "TomlApiKeyStore",
        "key_store",
        "new_key",
    ),
    "identity.api_keys.redis": ("RedisApiKeyStore",),
    "identity.api_keys.sqlite": ("SqliteApiKeyStore",),
    "identity.callers": ("by_address", "by_claim", "by_principal", "by_subject"),
    "identity.client_certificates": ("ClientCertificate",),
    "identity.dpop": ("DPoP",),
    "identity.introspection": ("Introspection",),
    "identity.issuers": ("Issuer",),
    "identity.key_sets": ("KeySet", "KeysUnavailableError"),
    "identity.keys": ("Key",),
    "identity.requirements": ("AllOf", "AnyOf", "Both", "Either", "FromApiKey", "FromIssuer"),
    "middleware": (
        "AccessLogMiddleware",
        "AllowedOriginsMiddleware",
        "ApiKeyAuthMiddleware",
        "AuthFailureLimitMiddleware",
        "BearerAuthMiddleware",
        "BodyLimitMiddleware",
        "CacheControlMiddleware",
        "ConcurrencyLimitMiddleware",
        "ConditionalMiddleware",
        "McpEndpointMiddleware",
        "McpToolsMiddleware",
        "ProblemsMiddleware",
        "ProtectedResourceMetadataMiddleware",
        "RateLimitMiddleware",
        "RequestIDMiddleware",
        "RevocationMiddleware",
        "ScopesMiddleware",
        "TimeoutMiddleware",
        "VersioningMiddleware",
        "WebSocketTicketAuthMiddleware",
        "WebSocketTicketsMiddleware",
        "as_middleware",
    ),
    "policies.access_log": ("AccessLog", "by_outcome"),
    "policies.api_key": ("ApiKeyAuth",),
    "policies.auth_failures": ("AuthFailureLimit",),
    "policies.bearer": ("BearerAuth",),
    "policies.body_limit": ("BodyLimit",),
    "policies.cache_control": ("CacheControl", "CacheRule"),
    "policies.concurrency": ("ConcurrencyLimit",),
    "policies.conditional": ("Conditional",),
    "policies.mcp": ("McpCall", "McpEndpoint", "McpTools"),
    "policies.origins": ("AllowedOrigins",),
    "policies.problems": ("Problems",),
    "policies.protected_resource": ("ProtectedResource", "ProtectedResourceMetadata"),
    "policies.rate_limit": ("Level", "RateLimit", "Tier", "TokenRule"),
    "policies.request_id": ("RequestID",),
    "policies.revocation": ("Revocation",),
    "policies.scopes": ("Scopes",),
    "policies.timeout": ("Timeout",),
    "policies.versioning": ("Deprecation", "Version", "Versioning"),
    "policies.websocket_tickets": ("WebSocketTicketAuth", "WebSocketTickets"),
    "problem_docs": ("ProblemDocs",),
    "stores.adapter": ("LimitsStorage",),
    "stores.limits": ("LimitStore", "StoreUnavailableError"),
    "stores.memory": ("memory_limits",),
    "stores.redis": ("RedisLimits", "RedisReplays", "RedisRevocations", "RedisSlots", "RedisTickets"),
    "stores.replays": ("MemoryReplays",),
    "stores.revocations": ("MemoryRevocations",),
    "stores.shares": ("QuotaShares",),
    "stores.slots": ("SlotStore",),
    "stores.tickets": ("MemoryTickets",),
    "telemetry.logs": ("CorrelationFilter", "JSONLines", "add_correlation"),
    "telemetry.redaction": ("Redaction", "RedactionFilter", "redact"),
}
_NAMES = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    home = _NAMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

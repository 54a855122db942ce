"""Every policy as a middleware of its own, for the habit of one `add_middleware` call each.

    app.add_middleware(RateLimitMiddleware, default_tier="free")    # the last added is the outermost
    app.add_middleware(RequestIDMiddleware)

Options are the policy's own. Middlewares added one after the other fuse: they cost what one `PolicyStack` with all of
the policies costs.
"""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import App, PolicyStack
from sigil_policy.policies.access_log import AccessLog
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.body_limit import BodyLimit
from sigil_policy.policies.cache_control import CacheControl
from sigil_policy.policies.concurrency import ConcurrencyLimit
from sigil_policy.policies.conditional import Conditional
from sigil_policy.policies.mcp import McpEndpoint, McpTools
from sigil_policy.policies.origins import AllowedOrigins
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.protected_resource import ProtectedResourceMetadata
from sigil_policy.policies.rate_limit import RateLimit
from sigil_policy.policies.request_id import RequestID
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.policies.timeout import Timeout
from sigil_policy.policies.versioning import Versioning
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets

Options = ParamSpec("Options")


def as_middleware(policy: Callable[Options, Policy]) -> Callable[Concatenate[App, Options], PolicyStack]:
    """A middleware class for a policy class, also one of your own; its options are type-checked.

    GreetingMiddleware = as_middleware(Greeting)
    app.add_middleware(GreetingMiddleware, name="moon")
    """

    class PolicyMiddleware(PolicyStack):
        def __init__(self, app: Any, *args: Options.args, **options: Options.kwargs) -> None:
            super().__init__(app, [policy(*args, **options)])

    name = getattr(policy, "__name__", "Policy")
    PolicyMiddleware.__name__ = PolicyMiddleware.__qualname__ = f"{name}Middleware"
    PolicyMiddleware.__doc__ = policy.__doc__
    return PolicyMiddleware  # type: ignore[return-value]  # `app` has a name: some frameworks pass it by that


AccessLogMiddleware = as_middleware(AccessLog)
AllowedOriginsMiddleware = as_middleware(AllowedOrigins)
ApiKeyAuthMiddleware = as_middleware(ApiKeyAuth)
AuthFailureLimitMiddleware = as_middleware(AuthFailureLimit)
BearerAuthMiddleware = as_middleware(BearerAuth)
BodyLimitMiddleware = as_middleware(BodyLimit)
CacheControlMiddleware = as_middleware(CacheControl)
ConcurrencyLimitMiddleware = as_middleware(ConcurrencyLimit)
ConditionalMiddleware = as_middleware(Conditional)
McpEndpointMiddleware = as_middleware(McpEndpoint)
McpToolsMiddleware = as_middleware(McpTools)
ProblemsMiddleware = as_middleware(Problems)
ProtectedResourceMetadataMiddleware = as_middleware(ProtectedResourceMetadata)
RateLimitMiddleware = as_middleware(RateLimit)
RequestIDMiddleware = as_middleware(RequestID)
RevocationMiddleware = as_middleware(Revocation)
ScopesMiddleware = as_middleware(Scopes)
TimeoutMiddleware = as_middleware(Timeout)
VersioningMiddleware = as_middleware(Versioning)
WebSocketTicketAuthMiddleware = as_middleware(WebSocketTicketAuth)
WebSocketTicketsMiddleware = as_middleware(WebSocketTickets)

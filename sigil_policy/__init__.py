"""Composable ASGI policies that run in one pass.

    from sigil_policy import AccessLog, PolicyStack, Problems, RequestID

    app.add_middleware(PolicyStack, policies=[RequestID(), AccessLog(), Problems()])    # outermost first

Policies: `RequestID`, `AccessLog`, `Problems`, `Versioning`, `BearerAuth`, `ApiKeyAuth`, `Scopes`, `RateLimit`,
`CacheControl`, `Conditional`; each also as a middleware of its own (`RequestIDMiddleware`, ...). Your own policy is a
subclass of `Policy`. Names load on first use: importing the package imports nothing that you do not use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigil_policy.core.clock import Clock as Clock
    from sigil_policy.core.exchange import Exchange as Exchange
    from sigil_policy.core.exchange import Head as Head
    from sigil_policy.core.exchange import current_exchange as current_exchange
    from sigil_policy.core.exchange import get_exchange as get_exchange
    from sigil_policy.core.exchange import report_tokens as report_tokens
    from sigil_policy.core.facts import Correlation as Correlation
    from sigil_policy.core.facts import Principal as Principal
    from sigil_policy.core.facts import Public as Public
    from sigil_policy.core.facts import Quota as Quota
    from sigil_policy.core.facts import TokenUsage as TokenUsage
    from sigil_policy.core.facts import WindowState as WindowState
    from sigil_policy.core.ordering import PolicyOrderError as PolicyOrderError
    from sigil_policy.core.policy import Policy as Policy
    from sigil_policy.core.problems import Problem as Problem
    from sigil_policy.core.problems import ProblemType as ProblemType
    from sigil_policy.core.problems import Reply as Reply
    from sigil_policy.core.problems import registered_types as registered_types
    from sigil_policy.core.stack import PolicyStack as PolicyStack
    from sigil_policy.middleware import as_middleware as as_middleware
    from sigil_policy.policies.problems import Problems as Problems

# Where each public name lives.
_HOMES = {
    "core.clock": ("Clock",),
    "core.exchange": ("Exchange", "Head", "current_exchange", "get_exchange", "report_tokens"),
    "core.facts": ("Correlation", "Principal", "Public", "Quota", "TokenUsage", "WindowState"),
    "core.ordering": ("PolicyOrderError",),
    "core.policy": ("Policy",),
    "core.problems": ("Problem", "ProblemType", "Reply", "registered_types"),
    "core.stack": ("PolicyStack",),
    "policies.problems": ("Problems",),
}
_NAMES = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_NAMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _NAMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

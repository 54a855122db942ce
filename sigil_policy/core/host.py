"""What a stack knows of the framework it serves.

A `Host` is found when a stack is built around an application. The frameworks' rooms provide them (`HOSTS` names the
finders, so that nothing of a framework is imported before an application of that framework is met).
"""

from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sigil_policy.core.problems import Reply

if TYPE_CHECKING:
    from sigil_policy.core.exchange import Exchange
    from sigil_policy.core.policy import Policy


class Host:
    """A plain ASGI application: nothing is known of it but what it sends."""

    root_path: str = ""
    """What the application itself sets as `root_path` once a request has come in, in the place of the server's."""

    def bind(self, policies: "Sequence[Policy]") -> None:
        """Called when a stack has been built around the application, with all policies of that stack."""

    def route(self, scope: dict[str, Any]) -> str | None:
        """The template of the route that served `scope`, with its prefixes, or None."""
        return None

    def debug(self, scope: dict[str, Any]) -> bool:
        """Whether the application asked for its own debug pages."""
        return False

    def answer(self, ex: "Exchange", error: Exception) -> "Awaitable[Reply | None] | None":
        """The application's own answer to an unhandled error, or None when it has none."""
        return None


PLAIN = Host()

HOSTS: list[str] = ["sigil_policy.frameworks.starlette:find_host"]
"""Finders, as `module:function`; a finder takes the wrapped application and returns a `Host` or None."""


def find_host(app: Any) -> Host:
    for name in HOSTS:
        module, _, function = name.partition(":")
        finder: Callable[[Any], Host | None] = getattr(import_module(module), function)
        host = finder(app)
        if host is not None:
            return host
    return PLAIN

"""What a stack knows of the framework it serves.

A `Host` is found when a stack is built around an application. The frameworks' rooms provide them (`HOSTS` names the
finders, so that nothing of a framework is imported before an application of that framework is met).
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sigil_policy.core.marks import Marks, is_anything_marked
from sigil_policy.core.problems import Reply
from sigil_policy.core.routing import below

if TYPE_CHECKING:
    from sigil_policy.core.exchange import Exchange
    from sigil_policy.core.policy import Policy


class Resolution:
    """The endpoint that will serve an exchange, found before the router runs.

    `template` is its whole path with prefixes and root, `marks` what is said of it, and `own` which of these somebody
    marked with `policy`: they need a policy that understands them. `behind` says that middlewares stand between the
    stack and the endpoint, which may be such. `speaker` is the method of a class that says something of its own, and
    `label` the methods of the route: they tell endpoints apart at one path. There is one resolution for an endpoint at
    a place, until routes change.
    """

    __slots__ = ("behind", "endpoint", "label", "marks", "own", "speaker", "template")

    def __init__(
        self,
        endpoint: Any,
        template: str | None,
        marks: Marks | None = None,
        own: frozenset[str] = frozenset(),
        *,
        behind: bool = False,
        speaker: Any = None,
        label: str = "",
    ) -> None:
        self.endpoint = endpoint
        self.speaker = endpoint if speaker is None else speaker
        self.label = label
        self.template = template
        self.marks = marks
        self.own = own
        self.behind = behind

    def within(self, mount: "Resolution") -> "Resolution":
        """The same endpoint, with what `mount`, where its application is mounted, says of all that is in it."""
        marks = mount.marks if self.marks is None else self.marks.over(mount.marks)
        return Resolution(
            self.endpoint,
            self.template,
            marks,
            self.own | mount.own,
            behind=self.behind,
            speaker=self.speaker,
            label=self.label,
        )

    @property
    def name(self) -> str:
        """Names the endpoint among all of the application, in every process: for counters."""
        speaker = self.speaker
        words = (self.label, self.template, getattr(speaker, "__qualname__", type(speaker).__qualname__))
        return " ".join(word for word in words if word)

    def __repr__(self) -> str:
        return f"Resolution({self.template!r}, {self.endpoint!r})"


class Host:
    """A plain ASGI application: nothing is known of it but what it sends."""

    root_path: str = ""
    """What the application itself sets as `root_path` once a request has come in, in the place of the server's."""

    readable: bool = False
    """Whether its endpoints can be read."""

    folds: bool = False
    """Whether the router takes `/A` for `/a`; then tables of routes do as well."""

    def path(self, scope: dict[str, Any]) -> str:
        """The path as the router compares it."""
        path: str = scope["path"]
        root = self.root_path or scope.get("root_path")
        return below(root, path) if root else path

    def marked(self) -> bool:
        """Whether something is said of any endpoint; else nobody has to know which one it will be.

        Asked when an exchange begins: it is here that routes are seen which have been added since the last one. Of an
        application that cannot be read, nothing is found; where marks exist at all, it is said afterwards what ran.
        """
        return is_anything_marked()

    def find(self, scope: dict[str, Any]) -> Resolution | None:
        """The endpoint that the router will choose for `scope`, or None when it finds none."""
        return None

    def ran(self, scope: dict[str, Any]) -> Any:
        """The endpoint that has begun to answer, as the framework says it, or None where it says nothing."""
        return scope.get("endpoint")

    def endpoints(self) -> Iterable[Resolution]:
        """All endpoints there are now."""
        return ()

    def inner_policies(self) -> "Iterable[Policy]":
        """The policies of stacks further in, behind middlewares of others."""
        return ()

    def tag(self, tags: Mapping[str, Marks]) -> None:
        """What tags mean, for endpoints that say nothing else."""

    def bind(self, policies: "Sequence[Policy]") -> None:
        """Called when a stack has been built around the application, with all policies of that stack."""

    def route(self, scope: dict[str, Any], root: str) -> str | None:
        """The template of the route that serves `scope`, with its prefixes and `root`, its root path as it came."""
        return None

    def debug(self, scope: dict[str, Any]) -> bool:
        """Whether the application asked for its own debug pages."""
        return False

    def answer(self, ex: "Exchange", error: Exception) -> "Awaitable[Reply | None] | None":
        """The application's own answer to an unhandled error, or None when it has none."""
        return None


PLAIN = Host()

HOSTS: list[str] = ["sigil_policy.frameworks.starlette:find_host", "sigil_policy.frameworks.hosts:find_host"]
"""Finders, as `module:function`; a finder takes the wrapped application and returns a `Host` or None."""


def find_host(app: Any) -> Host:
    for name in HOSTS:
        module, _, function = name.partition(":")
        finder: Callable[[Any], Host | None] = getattr(import_module(module), function)
        host = finder(app)
        if host is not None:
            return host
    return PLAIN

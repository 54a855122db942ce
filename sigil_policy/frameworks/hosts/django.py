r"""Django: views, and the classes of views, through includes, regular expressions and languages.

The resolver of the settings' URL configuration is asked, for the path behind the script prefix and in the language
that the path names, for each request: it costs what Django's routing costs (some 10 µs and more with many patterns,
since it tries them in their order). A middleware that sets `request.urlconf` is seen afterwards only: Django says by a
view middleware which view it has chosen, and a mismatch is counted, with `strict_routes` answered as 500.

Regular expressions are named by their groups: `^years/(?P<year>\d{4})/$` is `/years/{year}/`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from django.conf import settings
from django.conf.urls.i18n import is_language_prefix_patterns_used
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.urls import Resolver404, URLResolver, get_resolver
from django.utils import translation

from sigil_policy.core.host import Host, Resolution
from sigil_policy.core.policy import Policy
from sigil_policy.frameworks.hosts import RAN, RoutedHost, method_of

_DEEPEST = 100
_PARAMETER = re.compile(r"<(?:[^<>:]*:)?([^<>:]+)>")
_METACHARACTERS = re.compile(r"(?<!\\)[?*+^$]|\\[bBAZ]")


def host_for(app: Any, around: Any) -> Host | None:
    return DjangoHost(app, around) if isinstance(app, ASGIHandler) else None


async def note_view(request: Any, view: Any, args: Any, kwargs: Any) -> None:
    """A view middleware: leaves in the scope whose turn it is."""
    request.scope[RAN] = view


class DjangoHost(RoutedHost):
    def __init__(self, app: Any, around: Any) -> None:
        super().__init__(app, around)
        self._lists: list[Sequence[Any]] = []

    def version(self) -> list[list[Any]]:
        if not self._lists:
            self._lists = [patterns for patterns, _ in self._tree()]
        return [[*patterns] for patterns in self._lists]

    def marked(self) -> bool:
        if self.version() != self._version:
            self._lists = []
        return super().marked()

    def path(self, scope: dict[str, Any]) -> str:
        path: str = scope["path"]
        return path.removeprefix(get_script_prefix(scope) or "")

    def ask(self, scope: dict[str, Any]) -> Resolution | None:
        path = self.path(scope)
        for language in self._languages(path):
            try:
                with nullcontext() if language is None else translation.override(language):
                    found = get_resolver().resolve(path)
            except Resolver404:
                continue
            return self._resolve(found.func, found.route, method_of(scope))
        return None

    def endpoints(self) -> Iterable[Resolution]:
        for patterns, prefix in self._tree():
            for pattern in patterns:
                if not isinstance(pattern, URLResolver):
                    view, route = pattern.callback, prefix + str(pattern.pattern).removeprefix("^")
                    methods = [name.upper() for name in getattr(_class_of(view), "http_method_names", ("get",))]
                    for method in methods:
                        yield self._resolve(view, route, method)

    def bind(self, policies: Sequence[Policy]) -> None:
        around_views = getattr(self.app, "_view_middleware", None)
        if isinstance(around_views, list) and note_view not in around_views:
            around_views.append(note_view)

    def _tree(self) -> Iterable[tuple[Sequence[Any], str]]:
        """The lists of patterns, each with what the includes before it say."""
        waiting: list[tuple[Any, str, int]] = [(get_resolver(), "", _DEEPEST)]
        while waiting:
            resolver, prefix, deepest = waiting.pop()
            patterns = resolver.url_patterns
            yield patterns, prefix
            waiting.extend(
                (inner, prefix + str(inner.pattern).removeprefix("^"), deepest - 1)
                for inner in patterns
                if isinstance(inner, URLResolver) and deepest
            )

    def _languages(self, path: str) -> Iterator[str | None]:
        """The one that is active now, and where `i18n_patterns` are used the one that a middleware will activate."""
        yield None
        if settings.USE_I18N and is_language_prefix_patterns_used(settings.ROOT_URLCONF)[0]:
            yield translation.get_language_from_path(path) or settings.LANGUAGE_CODE

    def template(self, written: str) -> str:
        return _template(written)

    def _resolve(self, view: Any, route: str, method: str) -> Resolution:
        return self.resolution(view, view, route, method, lambda: (view, _class_of(view)))


def _class_of(view: Any) -> Any:
    return getattr(view, "view_class", None) or getattr(view, "cls", None)


def _template(route: str) -> str:
    if "(" in route or "^" in route or "$" in route or "\\" in route:
        # A regular expression; what Django's own documentation makes of it.
        from django.contrib.admindocs import utils

        for simpler in (utils.remove_non_capturing_groups, utils.replace_named_groups, utils.replace_unnamed_groups):
            route = simpler(route)
        route = _METACHARACTERS.sub("", route).replace("\\", "")
    return "/" + _PARAMETER.sub(r"{\1}", route).removeprefix("/")

"""Whether everything that endpoints say of themselves is heard.

    def test_every_mark_is_heard():
        check_app(app)

A stack fails by itself at startup where a mark is not understood; an application that has lost its stack, or never had
one, does not. This finds those as well.
"""

from collections.abc import Iterator
from typing import Any

from starlette.applications import Starlette

from sigil_policy.core.host import find_host
from sigil_policy.core.stack import MarksIgnoredError, PolicyStack
from sigil_policy.frameworks.chain import chain
from sigil_policy.frameworks.routes import is_known
from sigil_policy.frameworks.starlette import StarletteHost

_DEEPEST = 100


def check_app(app: Any) -> None:
    """Fail if an endpoint of `app` carries marks that no policy around it understands.

        check_app(app)      # an application of a framework that can be read, or a PolicyStack around one

    Mounted applications are looked into. Raises `AssertionError` with a sentence for each endpoint, and `TypeError` for
    an application whose routes cannot be read.
    """
    complaints = [*_unheard(app, frozenset(), _DEEPEST)]
    if complaints:
        raise AssertionError("; ".join(dict.fromkeys(complaints)))


def _unheard(app: Any, heard: frozenset[str], deepest: int) -> Iterator[str]:
    """A sentence for each endpoint of `app` whose marks nobody hears, where those around it hear `heard`."""
    stacks = _stacks(app)
    heard = heard.union(*(stack.understood for stack in stacks))
    host = stacks[0].host if stacks else find_host(_built(app))
    if not host.readable:
        if deepest == _DEEPEST:
            raise TypeError(f"the routes of {type(app).__name__} cannot be read; give the application itself")
        return
    for found in host.endpoints():
        if not found.behind and not found.own <= heard:
            yield str(MarksIgnoredError(found, found.own - heard))
    if not isinstance(host, StarletteHost) or not deepest:
        return
    for inner, served in host.index.behind():
        if served is None:
            yield from _unheard(inner, heard, deepest - 1)
            continue
        there = heard.union(*(stack.understood for stack in _stacks(inner)))
        if not served.own <= there:
            yield str(MarksIgnoredError(served, served.own - there))


def _stacks(app: Any) -> list[PolicyStack]:
    """The stacks around `app`, outermost first, as the first request would find them."""
    found: list[PolicyStack] = []
    for _ in range(_DEEPEST):
        *around, app = chain(_built(app), is_known)
        found += [inner for inner in (*around, app) if isinstance(inner, PolicyStack)]
        if not isinstance(app, Starlette):
            break
    return found


def _built(app: Any) -> Any:
    """The application with its middlewares."""
    return app.build_middleware_stack() if isinstance(app, Starlette) else app

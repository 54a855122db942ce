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

_DEEPEST = 100


def check_app(app: Any) -> None:
    """Fail if an endpoint of `app` carries marks that no policy around it understands.

        check_app(app)      # a Starlette or FastAPI application, or a PolicyStack around one

    Raises `AssertionError` with a sentence for each endpoint, and `TypeError` for an application whose routes cannot be
    read.
    """
    stacks = [inner for inner in _chain(_built(app)) if isinstance(inner, PolicyStack)]
    if stacks:
        outer = stacks[0]
        heard = frozenset(name for stack in stacks for name in stack.understood)
        complaints = outer.unserved(heard)
    else:
        host = find_host(app)
        if not host.endpoints():
            raise TypeError(f"the routes of {type(app).__name__} cannot be read; give the application itself")
        complaints = [str(MarksIgnoredError(found, found.own)) for found in host.endpoints() if found.own]
    if complaints:
        raise AssertionError("; ".join(dict.fromkeys(complaints)))


def _built(app: Any) -> Any:
    """The application with its middlewares, as the first request would find it."""
    return app.build_middleware_stack() if isinstance(app, Starlette) else app


def _chain(app: Any) -> Iterator[Any]:
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield app
        app = _built(app.app) if isinstance(getattr(app, "app", None), Starlette) else getattr(app, "app", None)

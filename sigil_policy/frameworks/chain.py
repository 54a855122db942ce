"""What a middleware wraps: the way from the outside of an application to what it is made of.

    [*chain(CORSMiddleware(TrustedHostMiddleware(app)))]       # the two middlewares, then the application

By custom a middleware keeps its application in `app`. Where there is no such attribute, what it holds is looked
through: its other attributes, and the names that a function closes over. The only application among them is the one
that it wraps; of two, nobody can say which serves a request, and the way ends there.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

_DEEPEST = 100  # middlewares: a bound against what contains itself
_MOST_HELD = 50
_MOST_LOOKED_AT = 1_000


def chain(app: Any, is_known: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """`app` and what it wraps; `is_known` says where nothing has to be looked through.

    A bound method, such as Quart's `asgi_app`, stands for its object.
    """
    for _ in range(_DEEPEST):
        if app is None:
            return
        if isinstance(app, MethodType):
            app = app.__self__
        yield app
        inner = None
        with suppress(Exception):  # a proxy outside of its context answers no question
            inner = getattr(app, "app", None)
        if inner is None and not is_known(app):
            inner = _held(app, is_known)
        if isinstance(inner, MethodType) and inner.__self__ is app:
            return
        app = inner


def _held(app: Any, is_known: Callable[[Any], bool]) -> Any:
    """The one of all that `app` holds that leads to what is known."""
    found = {id(value): value for value in _values(app) if _leads(value, is_known, {id(app)})}
    return found.popitem()[1] if len(found) == 1 else None


def _leads(app: Any, is_known: Callable[[Any], bool], seen: set[int]) -> bool:
    waiting = [app]
    while waiting and len(seen) < _MOST_LOOKED_AT:
        one = waiting.pop()
        if type(one) is MethodType:
            one = one.__self__
        if id(one) in seen:
            continue
        seen.add(id(one))
        with suppress(Exception):  # a proxy outside of its context answers no question
            if not callable(one) or isinstance(one, type):
                continue
            if is_known(one):
                return True
            inner = getattr(one, "app", None)
            waiting.extend(_values(one) if inner is None else [inner])
    return False


def _values(app: Any) -> list[Any]:
    if isinstance(app, partial):
        return [app.func, *app.args, *app.keywords.values()]
    if isinstance(app, FunctionType):
        held = []
        for cell in app.__closure__ or ():
            with suppress(ValueError):  # a name that has no value yet
                held.append(cell.cell_contents)
        return held
    held = [*getattr(app, "__dict__", {}).values()]
    for kind in type(app).__mro__:
        slots = getattr(kind, "__slots__", ())
        held += [getattr(app, _slot(kind, name), None) for name in ((slots,) if isinstance(slots, str) else slots)]
    return held[:_MOST_HELD]


def _slot(kind: type, name: str) -> str:
    """The attribute of a slot: a private name has that of its class in front."""
    private = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if private else name

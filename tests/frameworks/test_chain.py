"""The way from a middleware to what it wraps."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from sigil_policy.frameworks.chain import chain


class App:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Holder:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


def is_app(one: Any) -> bool:
    return isinstance(one, App)


def way(app: Any) -> list[Any]:
    return [*chain(app, is_app)]


def closing_over(*held: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        print(held[0], first)

    first = held[0]
    return middleware


def test_the_attribute_app_leads_on() -> None:
    app = App()
    inner = Holder(app=app)
    outer = Holder(app=inner, other=App())
    assert way(outer) == [outer, inner, app]


def test_what_has_no_such_attribute_is_looked_through() -> None:
    app = App()
    named, closed, called = Holder(_wrapped=app), closing_over(app), partial(closing_over(print), app)
    assert way(named) == [named, app]
    assert way(closed) == [closed, app]
    assert way(called) == [called, app]
    deep = Holder(next=closing_over(Holder(after=closing_over(Holder(app=partial(closing_over(print), app))))))
    assert way(deep)[-1] is app
    assert len(way(deep)) == 7


def test_of_two_applications_none_is_the_one() -> None:
    both = Holder(one=App(), two=App())
    assert way(both) == [both]


def test_types_and_what_leads_nowhere_are_no_applications() -> None:
    outer = Holder(kind=App, name="app", other=print, empty=None)
    assert way(outer) == [outer]


def test_a_proxy_without_its_context_is_passed_over() -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("working outside of a request")

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("working outside of a request")

        def __call__(self) -> None: ...

    app = App()
    outer = Holder(request=Proxy(), after=app)
    assert way(outer) == [outer, app]


def test_a_bound_method_stands_for_its_object() -> None:
    app = App()
    assert way(app.__call__) == [app]


def test_what_contains_itself_ends() -> None:
    around, looking = Holder(), Holder()
    around.app = around  # type: ignore[attr-defined]
    looking.inner = Holder(inner=looking)  # type: ignore[attr-defined]
    assert len(way(around)) == 100
    assert way(looking) == [looking]


def test_a_name_that_has_no_value_yet_is_none() -> None:
    def made() -> Iterator[Any]:
        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            await later(scope, receive, send)

        yield middleware
        later = App()
        yield later

    found = made()
    middleware = next(found)
    assert way(middleware) == [middleware]
    later = next(found)
    assert way(middleware) == [middleware, later]

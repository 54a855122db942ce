"""What one look-up costs in a table of 10, 1,000 and 10,000 routes.

Asked are ten routes, spread over the table, under an identifier of their own each time: what grows is then the work of
the matcher. `uniform` asks for every route as often as for any other, which no traffic does: what grows then as well is
the time that the processor waits for memory.

`resolve` is the endpoint of a FastAPI application with 200 routes in included routers, found before its router runs:
the same walk, along what was found before. `fresh` is what sees, at each exchange, that no route has changed meanwhile.
"""

import random
from typing import Any

from fastapi import APIRouter, FastAPI

from benchmarks.timing import Block, calls, measure, rounds_for
from sigil_policy.core.host import find_host
from sigil_policy.core.routing import RouteMatcher

SIZES = (10, 1_000, 10_000)
ASKED = 10


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `us_10`, `us_1000`, `us_10000` (µs per match) and `ratio` (10,000 to 10); `uniform_us_10000` and
    `uniform_ratio` the same with every route asked for; `resolve_us` (µs to find the endpoint of a FastAPI
    application), `resolve_ratio` (to a match among 10) and `fresh_us` (to see that its 21 routers are as they were)."""
    matchers = {size: _matcher(size) for size in SIZES}
    blocks = {str(size): _matches(matchers[size], list(range(0, size, size // ASKED))) for size in SIZES}
    blocks["resolve"], blocks["fresh"] = _resolves()
    blocks["uniform"] = _matches(matchers[10_000], list(range(10_000)))
    samples = measure(blocks, rounds=rounds_for(smoke, 201))
    return {
        **{f"us_{size}": samples.cost(str(size)) for size in SIZES},
        "ratio": samples.ratio("10000", to="10"),
        "uniform_us_10000": samples.cost("uniform"),
        "uniform_ratio": samples.ratio("uniform", to="10"),
        "resolve_us": samples.cost("resolve"),
        "fresh_us": samples.cost("fresh"),
        "resolve_ratio": samples.ratio("resolve", to="10"),
    }


def _matcher(size: int) -> RouteMatcher:
    return RouteMatcher({1: {f"{_method(number)} /v7/kind{number}/{{name}}/state": number for number in range(size)}})


def _method(number: int) -> str:
    return "GET" if number % 2 else "POST"


def _matches(matcher: RouteMatcher, routes: list[int]) -> Block:
    numbers = random.Random(0)

    def paths() -> list[tuple[str, str]]:
        chosen = numbers.choices(routes, k=500)
        return [(_method(number), f"/v7/kind{number}/agent-{number}/state") for number in chosen]

    def match(asked: tuple[str, str]) -> object:
        return matcher.match(*asked)

    for number in routes:
        if match((_method(number), f"/v7/kind{number}/agent/state")) != {1: number}:
            raise RuntimeError(f"route {number} was not found")
    return calls(match, paths)


def _resolves() -> tuple[Block, Block]:
    """To find an endpoint, and to see that the routes are those that were read."""
    app = FastAPI()
    for number in range(20):
        router = APIRouter(prefix=f"/v7/kind{number}")
        for part in range(10):
            router.add_api_route(f"/{{name}}/part{part}", lambda name: name, methods=["GET"])
        app.include_router(router)
    host = find_host(app)
    numbers = random.Random(0)

    def scopes() -> list[dict[str, Any]]:
        return [
            {"type": "http", "method": "GET", "path": f"/v7/kind{kind}/agent-{kind}/part{part}", "headers": []}
            for kind, part in ((numbers.randrange(20), numbers.randrange(10)) for _ in range(500))
        ]

    for kind in range(20):
        for part in range(10):
            found = host.find({"type": "http", "method": "GET", "path": f"/v7/kind{kind}/agent/part{part}"})
            if found is None or found.template != f"/v7/kind{kind}/{{name}}/part{part}":
                raise RuntimeError(f"part {part} of kind {kind} was not found: {found}")
    return calls(host.find, scopes), calls(lambda _: host.marked(), scopes)

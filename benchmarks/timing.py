"""How all of this is measured: small blocks in interleaved rounds, CPU time, medians.

    loop = Loop()
    samples = measure({"bare": loop.requests(app, get), "stack": loop.requests(stack, get)}, rounds=50)
    samples.added("stack", over="bare")      # µs per request

* A **block** runs one variant a few hundred times and returns its cost per call. A **round** runs one block of each
  variant, in random order. Differences and ratios are taken within a round, so that a slow moment of the machine hits
  both sides, and the median over the rounds is reported.
* Cost is CPU time of the process (`process_time`): what other programs do meanwhile is not counted, and what a variant
  does in threads of its own is.
* ASGI applications run on uvloop where it is installed, one task per request, as servers do; that task is part of
  every variant, and therefore of no difference. Scopes and their header bytes are new objects for every request: no
  variant profits from a hash that a server's parser would not have computed.
"""

import asyncio
import gc
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import cycle
from statistics import median, quantiles
from typing import Any

try:
    import uvloop
except ImportError:  # the extra `demo` brings it where it exists
    uvloop = None

Message = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
Block = Callable[[], float]

CALLS = 200
WARM = 20


class Samples:
    """Costs in µs per call: for each variant one figure per round."""

    def __init__(self, costs: Mapping[str, list[float]]) -> None:
        self.costs = costs

    def cost(self, name: str) -> float:
        return median(self.costs[name])

    def added(self, name: str, over: str) -> float:
        """What `name` costs more than `over`."""
        return median(self._added(name, over))

    def spread(self, name: str, over: str) -> float:
        """Half the interquartile range of `added`."""
        added = self._added(name, over)
        if len(added) < 2:
            return 0.0
        lower, _, upper = quantiles(added, n=4)
        return (upper - lower) / 2

    def ratio(self, name: str, to: str) -> float:
        return median(a / b for a, b in zip(self.costs[name], self.costs[to], strict=True))

    def _added(self, name: str, over: str) -> list[float]:
        return [a - b for a, b in zip(self.costs[name], self.costs[over], strict=True)]


def measure(blocks: Mapping[str, Block], *, rounds: int) -> Samples:
    """Run every block once per round, in random order; a first round is thrown away."""
    order = list(blocks)
    shuffle = random.Random(0).shuffle
    costs: dict[str, list[float]] = {name: [] for name in order}
    for block in blocks.values():
        block()
    # What was built until now outlives the run: no collection inside a block has to walk it.
    gc.collect()
    gc.freeze()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                costs[name].append(blocks[name]())
    finally:
        gc.unfreeze()
    return Samples(costs)


def rounds_for(smoke: bool, rounds: int) -> int:
    return 1 if smoke else rounds


def calls(function: Callable[[Any], object], arguments: Callable[[], list[Any]]) -> Block:
    """A block that calls `function` with each of `arguments()`, which are made outside of the measured time."""

    def block() -> float:
        given = arguments()
        for argument in given[:WARM]:
            function(argument)
        timed = given[WARM:] or given
        start = time.process_time_ns()
        for argument in timed:
            function(argument)
        return (time.process_time_ns() - start) / len(timed) / 1000

    return block


class Loop:
    """An event loop, and a driver for ASGI applications that stands where a server would."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop() if uvloop is not None else asyncio.new_event_loop()
        self.name = "uvloop" if uvloop is not None else "asyncio"

    def close(self) -> None:
        self.loop.close()

    def requests(self, app: App, scopes: Callable[[], Message], *, count: int = CALLS, status: int = 200) -> Block:
        """A block of `count` requests; a response of another `status` is an error, not a figure."""

        def block() -> float:
            made = [scopes() for _ in range(WARM + count)]
            return self.loop.run_until_complete(_run(app, made, status))

        return block


async def _run(app: App, scopes: list[Message], status: int) -> float:
    create_task = asyncio.get_running_loop().create_task
    others = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal others
        if message["type"] == "http.response.start" and message["status"] != status:
            others += 1

    # Each scope is let go after its request, as a server does: what a request leaves behind dies with it.
    scopes.reverse()
    count = len(scopes) - WARM
    for _ in range(WARM):
        await create_task(app(scopes.pop(), receive, send))
    start = time.process_time_ns()
    while scopes:
        await create_task(app(scopes.pop(), receive, send))
    spent = time.process_time_ns() - start
    if others:
        raise RuntimeError(f"{others} of {count + WARM} responses of {app!r} were not {status}")
    return spent / count / 1000


def scopes(
    requests: list[list[tuple[bytes, bytes]]], *, path: str = "/v7/agents/ada", method: str = "GET"
) -> Callable[[], Message]:
    """Makes scopes as uvicorn does, with the headers of each of `requests` in turn."""
    turns = cycle(requests)
    raw_path = path.encode()

    def make() -> Message:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": raw_path,
            "query_string": b"",
            "root_path": "",
            # bytes(bytearray(...)) is a new object, whose hash nobody has computed yet.
            "headers": [(bytes(bytearray(name)), bytes(bytearray(value))) for name, value in next(turns)],
            "client": ("203.0.113.7", 50_000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }

    return make

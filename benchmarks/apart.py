"""Variants that are measured apart: one process for each, and one of them at work at any time.

    samples = measure_apart(block_of, ["bare", "stack"], rounds=60)
    samples.ratio("stack", to="bare")

In one process sixteen variants push each other's code and data out of the processor's caches, and each is charged for
it: more to those that are large. A service runs one. Here each variant is built in a process of its own and stays
there; a round asks each for one block, in random order, while all others wait. Otherwise as `timing` says: differences
and ratios within a round, medians over the rounds.
"""

import gc
import multiprocessing
import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from benchmarks.timing import Block, Samples

_PATIENCE = 120.0  # seconds for a variant to be built, or for one block


def measure_apart(block_of: Callable[[str], Block], names: Iterable[str], *, rounds: int) -> Samples:
    """Build `block_of(name)` for each name in a process of its own, and run every block once per round.

    `block_of` is a function of a module. Where processes fork, they share what was imported and cached before. Raises
    what a block raises, and `RuntimeError` for a process that says nothing for two minutes.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # shared pages stay shared
    with ExitStack() as ending:
        variants = {name: _Variant(context, block_of, name) for name in names}
        for variant in variants.values():
            ending.callback(variant.close)
        for variant in variants.values():
            variant.answer()  # it has been built, and has run once
        gc.unfreeze()
        order = list(variants)
        costs: dict[str, list[float]] = {name: [] for name in order}
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                costs[name].append(variants[name].cost())
    return Samples(costs)


class _Variant:
    """One variant in its process."""

    def __init__(self, context: Any, block_of: Callable[[str], Block], name: str) -> None:
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(block_of, name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def cost(self) -> float:
        self.pipe.send(True)
        return self.answer()

    def answer(self) -> float:
        if not self.pipe.poll(_PATIENCE):
            raise RuntimeError(f"the process of {self.name!r} says nothing")
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name!r} has ended") from None
        if isinstance(answer, BaseException):
            raise answer
        return float(answer)

    def close(self) -> None:
        # Asked to end: that we hang up is not seen by a process while later ones have inherited our side of its pipe.
        with suppress(OSError):
            self.pipe.send(False)
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(block_of: Callable[[str], Block], name: str, pipe: Any) -> None:
    try:
        block = block_of(name)
        first = block()
        # What was built until now outlives the run: no collection inside a block has to walk it.
        gc.collect()
        gc.freeze()
        pipe.send(first)
        while pipe.recv():
            pipe.send(block())
    except (EOFError, KeyboardInterrupt):
        pass  # nobody asks any more
    except BaseException as error:
        pipe.send(error)

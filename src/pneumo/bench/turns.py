"""Variants measured in turns: what slows the machine down for a while slows all of them."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pneumo.comm.bench.measure import turns
from pneumo.study.statistics import MIN_BLOCKS

MOST_ROUNDS = 400


class Times(NamedTuple):
    """Wall time, and CPU time of the calling thread, in one unit: other processes hardly disturb the second."""

    wall: float
    cpu: float


NO_TIME = Times(0.0, 0.0)


def stamp() -> tuple[int, int]:
    """Now, in ns: of the wall clock, and of the calling thread's CPU time."""
    return time.perf_counter_ns(), time.thread_time_ns()


def since(begin: tuple[int, int], count: int = 1) -> Times:
    """Milliseconds since a stamp, for each of `count` steps made since."""
    wall, cpu = ((b - a) / 1e6 / count for a, b in zip(begin, stamp(), strict=True))
    return Times(wall, cpu)


def in_turns(comm: Any, variants: Mapping[str, Callable[[], Times]], seconds: float) -> dict[str, NDArray[np.float64]]:
    """Call each variant once a round for about `seconds`, at least as often as an interval needs; collective.

    A variant returns what it has measured on this rank; the result has, by variant, the greatest of all ranks of each
    round, (rounds, 2): wall, CPU. The order of a round alternates.
    """
    names = list(variants)
    rounds: list[list[Times]] = []
    end = time.monotonic() + seconds
    while True:
        found = [NO_TIME] * len(names)
        for i in turns(len(names), len(rounds)):
            found[i] = variants[names[i]]()
        rounds.append(found)
        done = len(rounds) >= MIN_BLOCKS and (time.monotonic() >= end or len(rounds) >= MOST_ROUNDS)
        if comm.bcast(done):
            break
    slowest = np.max(comm.allgather(rounds), axis=0)  # (rounds, variants, 2)
    return {name: slowest[:, i] for i, name in enumerate(names)}


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's collector of cycles from running inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

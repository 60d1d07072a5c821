"""Variants measured in turns: what slows the machine down for a while slows all of them."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from pneumo.comm.bench.measure import turns
from pneumo.study.statistics import MIN_BLOCKS

MOST_ROUNDS = 400


def in_turns(comm: Any, variants: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Call each variant once a round for about `seconds`, at least as often as an interval needs; collective.

    A variant returns what it has measured on this rank; the result has, by variant, the greatest of all ranks for each
    round. The order of a round alternates.
    """
    names = list(variants)
    rounds: list[list[float]] = []
    end = time.monotonic() + seconds
    while True:
        found = [0.0] * len(names)
        for i in turns(len(names), len(rounds)):
            found[i] = variants[names[i]]()
        rounds.append(found)
        done = len(rounds) >= MIN_BLOCKS and (time.monotonic() >= end or len(rounds) >= MOST_ROUNDS)
        if comm.bcast(done):
            break
    slowest = np.max(comm.allgather(rounds), axis=0)  # (rounds, variants)
    return {name: slowest[:, i].tolist() for i, name in enumerate(names)}


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's collector of cycles from running inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

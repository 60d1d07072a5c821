"""The same training with timing and without, in turns in one world, and what timing does in a step by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumo.bench.pictures import pictures
from pneumo.bench.turns import NO_TIME, Times, in_turns, no_collection, since, stamp
from pneumo.config import Study
from pneumo.plan import Run
from pneumo.study.statistics import Comparison, Estimate, compare, hodges_lehmann, median
from pneumo.timing.clock import ThreadStamps
from pneumo.timing.steps import NoTiming, Timing
from pneumo.train import Training

if TYPE_CHECKING:
    from pneumo.comm.groups import Groups
    from pneumo.world import World

STEPS = 3  # of a block
MARGIN = 0.01
IMAGES = 640
PHASES = ("data", "forward", "backward", "optimizer")


class Watched(Training):
    """A training whose steps are timed from outside, alike with timing and without."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.collectives = 0  # of the last step
        self._begin = (0, 0)
        self._took_ms: list[Times] = []

    def _step(self, step: int) -> tuple[int, float | None]:
        self._begin = stamp()
        return super()._step(step)

    def _end_step(self, *args: Any, **kwargs: Any) -> None:
        super()._end_step(*args, **kwargs)
        self._took_ms.append(since(self._begin))

    def block(self) -> Times:
        """Train a block; returns the medians of its steps in milliseconds, 0 on ranks that sleep. Collective."""
        took = NO_TIME
        with self.awake():
            if self.active:
                self._took_ms.clear()
                rows = self.advance(1, STEPS, warmup=False)
                took = Times(*np.median(self._took_ms, axis=0).tolist())
                self.collectives = sum(row["step"] == self.next_step - 1 for row in rows.collectives)
        return took


@dataclass(frozen=True, slots=True)
class Pair:
    """One run: a step without timing in ms, what timing adds, with over without (wall, CPU), without over itself.

    `collectives` are those of a step, `waited` the part of the time for which a rank was ready to run without a core.
    """

    run: Run
    off_ms: Estimate
    more_us: Estimate
    ratio: Comparison
    cpu_ratio: Comparison
    control: Comparison
    rounds: int
    collectives: int
    waited: float


def compare_trainings(run: Run, study: Study, world: World, groups: Groups, seconds: float) -> Pair:
    """Train one run three times at once, with timing and twice without; the same on all ranks. Collective.

    A block of each in turns. The two without tell how far apart equal trainings lie here; with timing is compared with
    the geometric mean of both.
    """
    store, split = pictures(IMAGES)
    kinds: dict[str, type[Timing]] = {"on": Timing, "off": NoTiming, "again": NoTiming}
    trainings = {name: Watched(run, study, store, split, world, groups, kind) for name, kind in kinds.items()}
    for training in trainings.values():
        training.block()  # warms up
    now = ThreadStamps()
    begin = now()
    with no_collection():
        found = in_turns(world.comm, {name: training.block for name, training in trainings.items()}, seconds)
    end = now()
    now.close()
    for training in trainings.values():
        training.close()
    waited = (end.delay_ns - begin.delay_ns) / (end.wall_ns - begin.wall_ns)
    on, off, again = (found[name] for name in kinds)
    both = np.sqrt(off * again)
    return Pair(
        run,
        median(np.concatenate([off, again])[:, 0]),
        hodges_lehmann(1000 * (on - both)[:, 0]),
        _ratio(on[:, 0], both[:, 0]),
        _ratio(on[:, 1], both[:, 1]),
        _ratio(again[:, 0], off[:, 0]),
        len(on),
        world.comm.bcast(trainings["on"].collectives),
        max(world.comm.allgather(waited)),
    )


def _ratio(ours: Any, theirs: Any) -> Comparison:
    """How many times as long ours take, over the rounds."""
    found = compare(dict(enumerate(ours)), dict(enumerate(theirs)), MARGIN)
    assert found is not None, "the rounds are the same"
    return found


def stamp_cost(seconds: float) -> Estimate:
    """Microseconds of a stamp."""
    now = ThreadStamps()
    found = _samples(lambda: now(), 200, seconds)
    now.close()
    return median(found)


def step_cost(seconds: float) -> Estimate:
    """Microseconds that timing adds to a step without collectives: clock, phases and their columns."""
    timing, nothing = Timing(lambda: None), NoTiming(lambda: None)
    on: list[float] = []
    off: list[float] = []
    with no_collection():
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(on) < 10:
            for one, found in (timing, on), (nothing, off):
                found += _samples(lambda one=one: _empty_step(one), 20, 0.0, least=1)  # type: ignore[misc]
    timing.close()
    return hodges_lehmann(np.subtract(on[-200:], off[-200:]))


def _empty_step(timing: Timing) -> None:
    timing.begin()
    for name in PHASES:
        with timing.phase(name):
            pass
    timing.end()


def _samples(call: Callable[[], object], count: int, seconds: float, least: int = 10) -> list[float]:
    """Microseconds a call, a sample for each `count` calls."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(found) < least:
        begin = perf_counter_ns()
        for _ in range(count):
            call()
        found.append((perf_counter_ns() - begin) / 1000 / count)
    return found

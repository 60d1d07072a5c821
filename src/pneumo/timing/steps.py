"""What a training is timed with: its clock and its recorder, step by step; and what takes their place where none are.

`Timing` is what every study uses. `NoTiming` is its null object: the same training without a stamp and without a
record, which shows what timing costs (python -m pneumo.bench timing).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pneumo.timing.breakdown import Interval, carve
from pneumo.timing.clock import StepClock, ThreadStamps
from pneumo.timing.record import Collective, Issue, Recorder, Source


@dataclass(frozen=True, slots=True)
class Timed:
    """What was measured of one step: columns of its row in steps.parquet, its phases, and its collectives."""

    columns: dict[str, int] = field(default_factory=dict)
    intervals: list[Interval] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)


class Timing:
    """Times the steps of one training on the thread that made it; `settle` is as of StepClock."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._now = ThreadStamps()
        self._clock = StepClock(self._now, settle)
        self.recorder = Recorder(self._now)

    def begin(self) -> None:
        """Begin a step."""
        self._clock.begin()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Whatever runs inside belongs to the phase; phases do not nest."""
        return self._clock.phase(name)

    def end(self) -> Timed:
        """End the step; returns what was measured of it."""
        whole, spans, helpers_cpu_ns = self._clock.end()
        calls, waits = self.recorder.take()
        columns = {"begin_ns": whole.begin.wall_ns, "wall_ns": whole.end.wall_ns - whole.begin.wall_ns}
        intervals, phases = carve(whole, spans, waits)
        for phase, (wall, cpu, delay) in phases.items():
            columns |= {f"{phase}_ns": wall, f"{phase}_cpu_ns": cpu, f"{phase}_delay_ns": delay}
        return Timed(columns | {"helpers_cpu_ns": helpers_cpu_ns}, intervals, calls)

    def close(self) -> None:
        """Give back what the stamps need."""
        self._now.close()


class NoRecorder(Recorder):
    """Records nothing and takes no stamp; what is injected into the transport is left out too."""

    __slots__ = ()

    def __init__(self) -> None:
        """Nobody asks the recorder for the time."""
        super().__init__(_no_time)

    def attach(self) -> None:
        """Leave the sources alone: torch calls no hook."""

    def collect(self, source: Source | None = None, *, ended: bool = False) -> list[Collective]:
        """Return nothing; what a probe has seen of Horovod is forgotten."""
        (source or self.source).take(ended=ended)
        return []

    def mark(self) -> None:
        """Do nothing."""

    def tensor_of(self, future: Any) -> Any:
        """The tensor of a collective, as a future: DDP needs it, timed or not."""
        return future.then(lambda done: done.value()[0])

    def waited(self, *, to_the_end: bool = False) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def blocking(self, source: Source | None = None) -> Iterator[None]:
        """Do nothing."""
        yield

    @contextlib.contextmanager
    def issuing(self) -> Iterator[Issue]:
        """Note nothing."""
        yield Issue()

    @contextlib.contextmanager
    def waiting(self, issue: Issue, source: Source | None = None) -> Iterator[None]:
        """Do nothing."""
        yield


def _no_time() -> Any:
    raise AssertionError("a training without timing takes no stamps")


class NoTiming(Timing):
    """Times nothing: rows then have a step's images and loss alone."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.recorder = NoRecorder()

    def begin(self) -> None:
        """Do nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def end(self) -> Timed:
        """Return nothing measured."""
        self.recorder.take()
        return Timed()

    def close(self) -> None:
        """Nothing to give back."""

"""The clock of a rank's main thread: wall time, thread CPU time and run-queue delay, and the phases of a step."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stamp:
    """One moment of the calling thread, in ns: CLOCK_MONOTONIC, CPU time used, time spent runnable without a core."""

    wall_ns: int
    cpu_ns: int
    delay_ns: int


class ThreadStamps:
    """Takes stamps of the thread that made it; 2 to 4 us each, most of it the read of schedstat.

    Source of the delay: the second field of /proc/thread-self/schedstat (kernel, Documentation/scheduler/sched-stats).
    Where the kernel does not tell it, the delay is always 0.
    """

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._file = None

    def __call__(self) -> Stamp:
        """Return the present moment."""
        delay = 0
        if self._file is not None:
            delay = int(os.pread(self._file, 64, 0).split()[1])
        return Stamp(time.perf_counter_ns(), time.thread_time_ns(), delay)

    def close(self) -> None:
        """Close the kernel's file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of the main thread that lies in one phase."""

    phase: str
    begin: Stamp
    end: Stamp


class StepClock:
    """Collects the spans of one step at a time; what lies in no span is the phase `other`.

    `settle` is called before each stamp: with kernels that run asynchronously it waits for them, so that a phase holds
    the work that was started in it.
    """

    def __init__(self, now: Callable[[], Stamp], settle: Callable[[], None] = lambda: None) -> None:
        self.now, self._settle = now, settle
        self._spans: list[Span] = []
        self._begin = now()
        self._process_cpu_ns = 0

    def begin(self) -> None:
        """Begin a step."""
        self._spans = []
        self._process_cpu_ns = time.process_time_ns()
        self._begin = self.now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Whatever runs inside belongs to the phase; phases do not nest."""
        begin = self.now()
        try:
            yield
        finally:
            self._settle()
            self._spans.append(Span(name, begin, self.now()))

    def end(self) -> tuple[Span, list[Span], int]:
        """End the step; returns it as a span, its spans in order, and the CPU ns that our other threads used."""
        whole = Span("step", self._begin, self.now())
        used = time.process_time_ns() - self._process_cpu_ns
        return whole, self._spans, max(0, used - (whole.end.cpu_ns - whole.begin.cpu_ns))

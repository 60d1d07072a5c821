"""Records of collectives, and of the main thread's waits for them, as the backends report them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns, sleep
from typing import Any

from pneumo.timing.clock import Stamp


@dataclass(slots=True)
class Collective:
    """One collective on one rank; stamps in ns of CLOCK_MONOTONIC, None where the library does not tell."""

    seq: int
    op: str
    dtype: str
    bytes: int
    group: str
    enqueued_ns: int
    started_ns: int | None = None
    finished_ns: int | None = None
    wait_begin_ns: int | None = None
    wait_end_ns: int | None = None
    bound: str | None = None


@dataclass(slots=True)
class Recorder:
    """Numbers the collectives of a training and keeps them and the waits until the loop takes them after each step."""

    now: Callable[[], Stamp]
    delay_s: float = 0.0  # injected into the transport, once a step
    _delayed: bool = False
    _seq: int = 0
    _enqueued: Stamp | None = None
    _collectives: list[Collective] = field(default_factory=list)
    _waits: list[tuple[Stamp, Stamp]] = field(default_factory=list)

    def enqueue(self, op: str, tensor: Any, group: str) -> Collective:
        """Note that the main thread hands a collective over a tensor to the library now."""
        self._enqueued = self.now()
        dtype = str(tensor.dtype).removeprefix("torch.")
        size = tensor.numel() * tensor.element_size()
        call = Collective(self._seq, op, dtype, size, group, self._enqueued.wall_ns)
        self._seq += 1
        self._collectives.append(call)
        return call

    def finish(self, call: Collective) -> None:
        """Note that a collective is complete; any thread may say so."""
        self._delay()
        call.finished_ns = perf_counter_ns()

    @contextlib.contextmanager
    def waiting(self, call: Collective) -> Iterator[None]:
        """The main thread waits for the collective while it is inside."""
        begin = self.now()
        yield
        self._delay()
        end = self.now()
        call.wait_begin_ns, call.wait_end_ns = begin.wall_ns, end.wall_ns
        if call.finished_ns is None:
            call.bound = "finished between enqueued and wait_end; the library does not tell when"
        self._waits.append((begin, end))

    @contextlib.contextmanager
    def blocking(self, op: str, tensor: Any, group: str) -> Iterator[None]:
        """A collective that runs while the main thread is inside."""
        call = self.enqueue(op, tensor, group)
        with self.waiting(call):
            yield
        call.finished_ns = call.wait_end_ns
        call.bound = "finished is the return of the blocking call"

    def _delay(self) -> None:
        if self.delay_s and not self._delayed:
            self._delayed = True
            sleep(self.delay_s)

    def waited_in_order(self, calls: Sequence[Collective]) -> None:
        """The main thread has just been blocked on these calls, one after the other, since it enqueued the last."""
        if not calls:
            return
        assert self._enqueued is not None
        returned, begin = self.now(), self._enqueued
        for call in calls:
            # A callback that has not run yet cannot be later than the return of the wait that depends on it.
            finished = min(call.finished_ns or returned.wall_ns, returned.wall_ns)
            end = max(begin.wall_ns, finished)
            call.wait_begin_ns, call.wait_end_ns = begin.wall_ns, end
            call.bound = "wait from the last enqueue; started unknown"
            stop = Stamp(end, returned.cpu_ns, returned.delay_ns)
            self._waits.append((begin, stop))
            begin = stop

    def take(self) -> tuple[list[Collective], list[tuple[Stamp, Stamp]]]:
        """Return what was recorded since the last call: collectives, and waits in order, free of overlaps."""
        self._delayed = False
        taken = self._collectives, self._waits
        self._collectives, self._waits = [], []
        return taken

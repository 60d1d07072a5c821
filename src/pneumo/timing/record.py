"""Records of collectives, and of the main thread's waits for them: what the backends report, joined step by step."""

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from time import perf_counter_ns, sleep
from typing import Any

from pneumo.timing.clock import Stamp

UNTOLD = "started between enqueued and finished"
RETURNED = "finished is the return of the blocking call"
UNWAITED = "no wait for it is known"


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

    def bounded(self, how: str) -> None:
        """Note how a stamp was obtained that the library does not tell."""
        self.bound = how if self.bound is None else f"{self.bound}; {how}"

    def columns(self) -> dict[str, Any]:
        """Its columns of collectives.parquet; `dataclasses.asdict`, which copies deeply, takes 15 us for the same."""
        return {name: getattr(self, name) for name in _COLUMNS}


@dataclass(slots=True)
class Issue:
    """A collective that is waited for later: its record is the one that was enqueued meanwhile, in ns."""

    begin_ns: int = 0
    end_ns: int = 0


_COLUMNS = tuple(one.name for one in fields(Collective))


class Source:
    """Whoever sees the collectives of a training: a process group's hooks, a probe of MPI. This one sees none."""

    def attach(self) -> None:
        """Begin to see them."""

    def detach(self) -> None:
        """Stop; what was not taken is forgotten."""

    def take(self, *, ended: bool = False) -> list[Collective]:
        """Return what was issued since the last call, in order; with `ended`, what is under way stays for later."""
        return []


@dataclass(slots=True)
class Recorder:
    """Keeps the collectives of a training and the main thread's waits until the loop takes them after each step.

    The collectives come from `source`; the waits from who knows when the main thread is blocked: the backend. `small`
    sees the small sums of statistics, which travel by themselves under every backend.
    """

    now: Callable[[], Stamp]
    delay_s: float = 0.0  # injected into the transport, once a step
    source: Source = field(default_factory=Source)
    small: Source = field(default_factory=Source)
    _delayed: bool = False
    _marks: int = 0
    _late_ns: dict[int, int] = field(default_factory=dict)
    _collectives: list[Collective] = field(default_factory=list)
    _waits: list[tuple[Stamp, Stamp]] = field(default_factory=list)
    _waited: list[tuple[Issue, int, int]] = field(default_factory=list)
    _mark: Stamp | None = None

    def attach(self) -> None:
        """Have the sources see the collectives from now on."""
        self.source.attach()
        self.small.attach()

    def detach(self) -> None:
        """Have them see no more of them."""
        self.source.detach()
        self.small.detach()

    def collect(self, source: Source | None = None, *, ended: bool = False) -> list[Collective]:
        """Return what the source (or another one) has seen since the last time (and has ended), of this step."""
        found = (source or self.source).take(ended=ended)
        self._collectives += found
        return found

    def mark(self) -> None:
        """The main thread has issued a collective, or begins to wait: from the last mark on it may be blocked."""
        self._marks += 1
        self._mark = self.now()

    def tensor_of(self, future: Any) -> Any:
        """The tensor of the collective that was marked last, as a future; late by what is injected into the transport.

        DDP waits for this future, and it wants a tensor in it where c10d has a list of one.
        """
        number = self._marks - 1

        def unpacked(done: Any) -> Any:
            if self.delay_s and not self._delayed:
                self.delay()
                self._late_ns[number] = perf_counter_ns()
            return done.value()[0]

        return future.then(unpacked)

    def waited(self, *, to_the_end: bool = False) -> None:
        """The main thread has been blocked since the last mark on what was collected, one call after the other.

        For call i from the later of the mark and the end of call i - 1, until it was finished; for the last one until
        the thread went on, which a callback and the wait for a core come before. When that was is known by its CPU
        time: what it used since the mark it used after the wait. `to_the_end`: even that was a wait, and not work.
        """
        returned = self.now()  # what it takes to collect is work
        calls, begin = self.collect(), self._mark
        if not calls:
            return
        assert begin is not None, "a wait begins with a mark"
        used = 0 if to_the_end else returned.cpu_ns - begin.cpu_ns
        order = sorted(range(len(calls)), key=lambda i: self._finish_of(calls[i], i, returned))
        for i in order:
            call = calls[i]
            end = max(begin.wall_ns, self._finish_of(call, i, returned))
            if i == order[-1] and (end > begin.wall_ns or self._delayed):
                end = max(end, returned.wall_ns - used)
            call.wait_begin_ns, call.wait_end_ns = begin.wall_ns, end
            if i in self._late_ns:
                call.finished_ns = self._late_ns[i]
            call.bounded("blocked since the last issue or the end of the call before")
            stop = Stamp(end, max(begin.cpu_ns, end - returned.wall_ns + returned.cpu_ns), returned.delay_ns)
            if end > begin.wall_ns:
                self._waits.append((begin, stop))
                begin = stop

    def _finish_of(self, call: Collective, number: int, returned: Stamp) -> int:
        """When a call was over for the main thread: a stamp taken later than the return of its wait is late itself."""
        finished = self._late_ns.get(number) or call.finished_ns or returned.wall_ns
        return min(finished, returned.wall_ns)

    @contextlib.contextmanager
    def blocking(self, source: Source | None = None) -> Iterator[None]:
        """The main thread is blocked in the collectives that are issued inside; it arrives when it comes here.

        They come from the source, or from another one: what is injected into the transport does not delay those.
        """
        begin = self.now()
        yield
        if source is None:
            self.delay()
        end = self.now()
        calls = [call for call in self.collect(source, ended=True) if call.enqueued_ns >= begin.wall_ns]
        self._waits.append((begin, end))
        for i, call in enumerate(calls):
            if i == 0:
                call.enqueued_ns = begin.wall_ns
            call.wait_begin_ns = begin.wall_ns if i == 0 else calls[i - 1].wait_end_ns
            call.wait_end_ns = end.wall_ns if i == len(calls) - 1 else call.finished_ns or call.wait_end_ns
            if call.finished_ns is None:
                call.finished_ns = call.wait_end_ns
                call.bounded(RETURNED)

    @contextlib.contextmanager
    def issuing(self) -> Iterator[Issue]:
        """The main thread issues a collective inside, which it is going to wait for later."""
        issue = Issue(perf_counter_ns())
        yield issue
        issue.end_ns = perf_counter_ns()

    @contextlib.contextmanager
    def waiting(self, issue: Issue, source: Source | None = None) -> Iterator[None]:
        """The main thread waits inside for the collective that was issued then; what is injected is part of the wait.

        Its record gets the wait's stamps when the step is over: whoever has taken it from the library, and when.
        """
        begin = self.now()
        yield
        if source is None:
            self.delay()
        end = self.now()
        self._waits.append((begin, end))
        self._waited.append((issue, begin.wall_ns, end.wall_ns))

    def delay(self) -> None:
        """Sleep, the first time in a step, as long as is injected into the transport."""
        if self.delay_s and not self._delayed:
            self._delayed = True
            sleep(self.delay_s)

    def take(self) -> tuple[list[Collective], list[tuple[Stamp, Stamp]]]:
        """Return what was recorded since the last call: collectives, and waits in order, free of overlaps."""
        self.collect()
        self.collect(self.small)
        self._delayed, self._marks = False, 0
        self._late_ns.clear()
        self._note_waits()
        taken = self._collectives, self._waits
        self._collectives, self._waits = [], []
        return taken

    def _note_waits(self) -> None:
        """Stamp the records of what was waited for after its issue, and say of the others that nobody waited."""
        calls = sorted(self._collectives, key=lambda call: call.enqueued_ns) if self._waited else []
        for issue, begin, end in self._waited:
            i = bisect_left(calls, issue.begin_ns, key=lambda call: call.enqueued_ns)
            if i < len(calls) and calls[i].enqueued_ns <= issue.end_ns:
                calls[i].wait_begin_ns, calls[i].wait_end_ns = begin, end
        self._waited = []
        for call in self._collectives:
            if call.wait_begin_ns is None:
                call.bounded(UNWAITED)

    def drop(self) -> None:
        """Forget what belongs to no step: a model's first broadcast, say."""
        self.take()

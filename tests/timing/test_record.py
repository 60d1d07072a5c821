"""What the recorder makes of a wait that nobody times: since when, and until when, the main thread was blocked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import pytest

from pneumo.timing.breakdown import Triple, carve
from pneumo.timing.clock import Span, Stamp
from pneumo.timing.record import UNWAITED, Collective, Recorder

MS = 1_000_000


@dataclass
class Told:
    """Says what it was given, as a source of collectives and as a clock; stamps in ms."""

    calls: list[Collective] = field(default_factory=list)
    stamps: Iterator[tuple[int, int, int]] = field(default_factory=lambda: iter(()))

    def take(self, *, ended: bool = False) -> list[Collective]:
        taken, self.calls = self.calls, []
        return taken

    def now(self) -> Stamp:
        return Stamp(*(MS * x for x in next(self.stamps)))


def backward(
    stamps: Sequence[tuple[int, int, int]], finished: Sequence[int], *, to_the_end: bool = False
) -> tuple[list[Collective], dict[str, Triple]]:
    """A backward pass from 0 ms until the last of `stamps` (mark, return of the wait), and what is made of it."""
    told = Told(stamps=iter(stamps))
    calls = [Collective(i, "allreduce", "float32", 1, "all", 0, None, end * MS) for i, end in enumerate(finished)]
    recorder = Recorder(told.now, source=told)
    recorder.mark()
    told.calls = list(calls)
    recorder.waited(to_the_end=to_the_end)
    whole = Span("backward", Stamp(0, 0, 0), Stamp(*(MS * x for x in stamps[-1])))
    return calls, carve(whole, [whole], recorder.take()[1])[1]


def in_ms(phases: dict[str, Triple], phase: str) -> tuple[float, ...]:
    return tuple(x / MS for x in phases[phase])


def test_blocked_until_the_thread_goes_on_and_not_only_until_the_library_has_finished() -> None:
    calls, phases = backward([(20, 20, 0), (90, 24, 3)], [80])
    assert (calls[0].wait_begin_ns, calls[0].wait_end_ns, calls[0].finished_ns) == (20 * MS, 86 * MS, 80 * MS)
    assert in_ms(phases, "comm") == (66, 0, 3)
    assert in_ms(phases, "backward") == (24, 24, 0), "no sleep that nobody has a name for"


def test_work_after_the_wait_stays_work() -> None:
    _, phases = backward([(20, 20, 0), (90, 30, 0)], [80])
    assert in_ms(phases, "comm") == (60, 0, 0)
    assert in_ms(phases, "backward") == (30, 30, 0)


def test_cpu_time_of_the_wait_itself() -> None:
    _, phases = backward([(20, 20, 0), (90, 40, 0)], [80])  # 20 ms of CPU time, of which 10 fit behind the end
    assert in_ms(phases, "comm") == (60, 10, 0)
    assert in_ms(phases, "backward") == (30, 30, 0)
    _, phases = backward([(20, 20, 0), (90, 40, 0)], [80], to_the_end=True)
    assert (in_ms(phases, "comm"), in_ms(phases, "backward")) == ((70, 20, 0), (20, 20, 0))


def test_of_several_calls_the_last_to_finish_ends_with_the_thread() -> None:
    calls, phases = backward([(20, 20, 0), (90, 22, 0)], [30, 60, 50])
    ends = [call.wait_end_ns for call in calls]
    assert ends == [30 * MS, 88 * MS, 50 * MS]
    assert [call.wait_begin_ns for call in calls] == [20 * MS, 50 * MS, 30 * MS]
    assert in_ms(phases, "comm") == (68, 0, 0)


@pytest.mark.parametrize("to_the_end", [False, True])
def test_what_was_over_before_nobody_waited_for(to_the_end: bool) -> None:
    calls, phases = backward([(20, 20, 0), (25, 25, 0)], [15], to_the_end=to_the_end)
    assert calls[0].wait_begin_ns == calls[0].wait_end_ns == 20 * MS
    assert in_ms(phases, "comm") == (0, 0, 0)
    assert in_ms(phases, "backward") == (25, 25, 0)


def test_a_small_sum_between_two_buckets_is_blocked_by_itself() -> None:
    """Statistics of batch norm travel in the midst of a backward pass whose buckets are under way."""
    told, small = Told(stamps=iter([(10, 10, 0), (30, 30, 0), (34, 30, 0), (50, 46, 0), (90, 46, 0)])), Told()
    recorder = Recorder(told.now, source=told, small=small, delay_s=60.0)
    recorder.mark()
    buckets = [Collective(i, "allreduce", "float32", 1, "all", 0, None, end * MS) for i, end in enumerate((32, 80))]
    told.calls = list(buckets)
    with recorder.blocking(recorder.small):  # not held up by what is injected into the transport
        call = Collective(0, "allreduce", "float64", 8, "small", 31 * MS, None, 33 * MS)
        small.calls = [call]
    recorder._delayed = True  # the transport has had its delay
    recorder.mark()
    recorder.waited(to_the_end=True)
    assert (call.wait_begin_ns, call.wait_end_ns) == (30 * MS, 34 * MS)
    assert [(b.wait_begin_ns, b.wait_end_ns) for b in buckets] == [(50 * MS, 50 * MS), (50 * MS, 90 * MS)]
    taken, waits = recorder.take()
    assert taken == [call, *buckets]
    whole = Span("backward", Stamp(0, 0, 0), Stamp(90 * MS, 46 * MS, 0))
    phases = carve(whole, [whole], waits)[1]
    assert in_ms(phases, "comm") == (44, 0, 0)


def test_who_waits_later_finds_the_record_whoever_has_taken_it_meanwhile() -> None:
    """Three collectives are issued, and taken from the source before anybody waits for two of them."""
    told = Told(stamps=iter([(10, 0, 0), (15, 0, 0), (20, 0, 0), (90, 0, 0)]))
    recorder = Recorder(told.now, source=told)
    issues, calls = [], []
    for i in range(3):
        with recorder.issuing() as issue:
            calls.append(Collective(i, "all_gather", "float32", 1, "all", perf_counter_ns()))
        issues.append(issue)
        told.calls.append(calls[-1])
    recorder.collect(ended=True)  # as a blocking call does
    recorder.delay_s = 0.001
    with recorder.waiting(issues[1]):
        pass
    assert recorder._delayed, "what is injected into the transport is a part of the wait"
    with recorder.waiting(issues[0]):
        pass
    taken, waits = recorder.take()
    assert taken == calls
    assert [(call.wait_begin_ns, call.wait_end_ns) for call in calls] == [
        (20 * MS, 90 * MS),
        (10 * MS, 15 * MS),
        (None, None),
    ]
    assert [call.bound for call in calls] == [None, None, UNWAITED]
    assert [stop.wall_ns // MS for _, stop in waits] == [15, 90]

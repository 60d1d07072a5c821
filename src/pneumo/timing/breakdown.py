"""Carves the spans and waits of a step into phases that sum to its wall time."""

from collections.abc import Sequence

from pneumo.study.schema import PHASES
from pneumo.timing.clock import Span, Stamp

Triple = tuple[int, int, int]
Interval = tuple[str, int, int]  # phase, begin, end in ns


def carve(
    step: Span, spans: Sequence[Span], waits: Sequence[tuple[Stamp, Stamp]]
) -> tuple[list[Interval], dict[str, Triple]]:
    """Return the phases of a step as intervals in order, and (wall, CPU, delay) in ns of each phase of PHASES.

    `spans` and `waits` are each ordered and free of overlaps. A wait is taken out of the span that it lies in and
    given to `comm`; `other` is the step without its spans and their waits. The intervals are not empty, do not overlap
    and cover the step, and the wall times are their sums: both by construction. CPU time and delay of a wait are those
    between its two stamps, limited to what the span has.
    """
    intervals: list[Interval] = []
    cpu, delay = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
    now, i = step.begin.wall_ns, 0
    for span in spans:
        phase, begin, end = span.phase, span.begin, span.end
        if begin.wall_ns > now:
            intervals.append(("other", now, begin.wall_ns))
            now = begin.wall_ns
        last = end.wall_ns
        rest_cpu, rest_delay = end.cpu_ns - begin.cpu_ns, end.delay_ns - begin.delay_ns
        while i < len(waits) and waits[i][0].wall_ns < last:
            start, stop = waits[i]
            low, high = max(start.wall_ns, now), min(stop.wall_ns, last)
            if high > low:
                if low > now:
                    intervals.append((phase, now, low))
                intervals.append(("comm", low, high))
                now = high
                taken = max(0, min(stop.cpu_ns - start.cpu_ns, rest_cpu))
                rest_cpu -= taken
                cpu["comm"] += taken
                taken = max(0, min(stop.delay_ns - start.delay_ns, rest_delay))
                rest_delay -= taken
                delay["comm"] += taken
            if stop.wall_ns > last:
                break  # the rest of it may lie in the next span
            i += 1
        if last > now:
            intervals.append((phase, now, last))
            now = last
        cpu[phase] += rest_cpu
        delay[phase] += rest_delay
    if step.end.wall_ns > now:
        intervals.append(("other", now, step.end.wall_ns))
    wall = dict.fromkeys(PHASES, 0)
    for phase, first, past in intervals:
        wall[phase] += past - first
    cpu["other"] += max(0, step.end.cpu_ns - step.begin.cpu_ns - sum(cpu.values()))
    delay["other"] += max(0, step.end.delay_ns - step.begin.delay_ns - sum(delay.values()))
    return intervals, {phase: (wall[phase], cpu[phase], delay[phase]) for phase in PHASES}

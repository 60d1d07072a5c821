"""Carves the spans and waits of a step into phases that sum to its wall time."""

from collections.abc import Sequence

from pneumo.study.schema import PHASES
from pneumo.timing.clock import Span, Stamp

Triple = tuple[int, int, int]


def carve(step: Span, spans: Sequence[Span], waits: Sequence[tuple[Stamp, Stamp]]) -> dict[str, Triple]:
    """Return (wall, CPU, delay) in ns of each phase of PHASES within a step.

    `spans` and `waits` are each ordered and free of overlaps. A wait is taken out of the span that it lies in and
    given to `comm`; `other` is the step without its spans and waits, so the wall times sum to the step's exactly. CPU
    time and delay of a wait are those between its two stamps, limited to what the span has.
    """
    total: dict[str, list[int]] = {phase: [0, 0, 0] for phase in PHASES}
    for span in spans:
        rest = list(_between(span.begin, span.end))
        for begin, end in waits:
            wait = list(_between(begin, end))
            wait[0] = min(end.wall_ns, span.end.wall_ns) - max(begin.wall_ns, span.begin.wall_ns)
            if wait[0] <= 0:
                continue
            for i in range(3):
                taken = max(0, min(wait[i], rest[i]))
                rest[i] -= taken
                total["comm"][i] += taken
        for i in range(3):
            total[span.phase][i] += rest[i]
    whole = _between(step.begin, step.end)
    for i in range(3):
        total["other"][i] += max(0, whole[i] - sum(values[i] for values in total.values()))
    return {phase: (values[0], values[1], values[2]) for phase, values in total.items()}


def _between(begin: Stamp, end: Stamp) -> Triple:
    return end.wall_ns - begin.wall_ns, end.cpu_ns - begin.cpu_ns, end.delay_ns - begin.delay_ns

"""Phases are intervals that cover the step, and their sums are its wall time, whatever the spans and waits are."""

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pneumo.study.schema import PHASES
from pneumo.timing.breakdown import carve
from pneumo.timing.clock import Span, Stamp

NAMES = ("data", "forward", "backward", "optimizer")
END = 10_001
Case = tuple[Span, list[Span], list[tuple[Stamp, Stamp]]]


@st.composite
def steps(draw: st.DrawFn) -> Case:
    """A step, its spans and its waits, which may touch each other, span two phases or lie in none."""

    def stamps(walls: Sequence[int]) -> list[Stamp]:
        clock, cpu, delay = [], 0, 0
        for wall in walls:
            cpu, delay = cpu + draw(st.integers(0, 50)), delay + draw(st.integers(0, 50))
            clock.append(Stamp(wall, cpu, delay))
        return clock

    edges = stamps(sorted(draw(st.lists(st.integers(0, END), min_size=8, max_size=8))))
    spans = [Span(name, edges[2 * i], edges[2 * i + 1]) for i, name in enumerate(NAMES)]
    cuts = stamps(sorted(draw(st.lists(st.integers(-100, END + 100), max_size=9))))
    apart = list(zip(cuts[::2], cuts[1::2], strict=False))
    touching = list(pairwise(cuts))
    whole = Stamp(END, draw(st.integers(0, 500)), draw(st.integers(0, 500)))
    return Span("step", Stamp(0, 0, 0), whole), spans, draw(st.sampled_from([apart, touching]))


def moments(pieces: list[tuple[int, int]]) -> set[int]:
    """The nanoseconds that lie in any of the pieces."""
    return {ns for begin, end in pieces for ns in range(begin, end)}


@given(steps())
def test_intervals_cover_the_step_and_their_sums_are_the_phases(case: Case) -> None:
    intervals, phases = carve(*case)
    assert [begin for _, begin, _ in intervals] == [0, *[end for _, _, end in intervals[:-1]]]
    assert intervals[-1][2] == END
    assert all(begin < end for _, begin, end in intervals)
    assert tuple(phases) == PHASES
    assert all(value >= 0 for triple in phases.values() for value in triple)
    for phase, (wall, _, _) in phases.items():
        assert wall == sum(end - begin for name, begin, end in intervals if name == phase)
    assert sum(wall for wall, _, _ in phases.values()) == END


@given(steps())
def test_every_moment_is_in_the_phase_that_it_belongs_to(case: Case) -> None:
    """By another way: sets of nanoseconds."""
    _, spans, waits = case
    intervals, _ = carve(*case)
    waited = moments([(a.wall_ns, b.wall_ns) for a, b in waits])
    expected = {span.phase: moments([(span.begin.wall_ns, span.end.wall_ns)]) for span in spans}
    comm = waited & set().union(*expected.values())
    expected = {phase: found - waited for phase, found in expected.items()} | {"comm": comm}
    expected["other"] = set(range(END)) - set().union(*expected.values())
    for phase in PHASES:
        assert moments([(a, b) for name, a, b in intervals if name == phase]) == expected[phase]


@given(steps())
def test_cpu_time_and_delay_are_those_of_the_step(case: Case) -> None:
    step, spans, _ = case
    _, phases = carve(*case)
    for i, name in enumerate(("cpu_ns", "delay_ns"), start=1):
        inside = sum(getattr(span.end, name) - getattr(span.begin, name) for span in spans)
        whole = getattr(step.end, name) - getattr(step.begin, name)
        assert sum(triple[i] for triple in phases.values()) == max(inside, whole)


def test_a_wait_leaves_the_phase_it_lies_in() -> None:
    def at(wall: int) -> Stamp:
        return Stamp(wall, wall // 2, wall // 4)

    step = Span("step", at(0), at(1000))
    spans = [Span("forward", at(100), at(400)), Span("backward", at(400), at(900))]
    intervals, phases = carve(step, spans, [(at(500), at(700))])
    walls = {phase: wall for phase, (wall, _, _) in phases.items()}
    assert walls == {"data": 0, "forward": 300, "backward": 300, "comm": 200, "optimizer": 0, "other": 200}
    assert phases["comm"] == (200, 100, 50)
    assert intervals == [
        ("other", 0, 100),
        ("forward", 100, 400),
        ("backward", 400, 500),
        ("comm", 500, 700),
        ("backward", 700, 900),
        ("other", 900, 1000),
    ]

"""Phases sum to the wall time, whatever the spans and waits are."""

from hypothesis import given
from hypothesis import strategies as st

from pneumo.study.schema import PHASES
from pneumo.timing.breakdown import carve
from pneumo.timing.clock import Span, Stamp

NAMES = ("data", "forward", "backward", "optimizer")


def at(wall: int) -> Stamp:
    return Stamp(wall, wall // 2, wall // 4)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Span, list[Span], list[tuple[Stamp, Stamp]]]:
    edges = sorted(draw(st.lists(st.integers(1, 10_000), min_size=8, max_size=8, unique=True)))
    spans = [Span(name, at(edges[2 * i]), at(edges[2 * i + 1])) for i, name in enumerate(NAMES)]
    cuts = sorted(draw(st.lists(st.integers(1, 10_000), max_size=8, unique=True)))
    waits = [(at(a), at(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    waits = [
        (at(max(a.wall_ns, s.begin.wall_ns)), at(min(b.wall_ns, s.end.wall_ns)))
        for a, b in waits
        for s in spans
        if min(b.wall_ns, s.end.wall_ns) > max(a.wall_ns, s.begin.wall_ns)
    ]
    return Span("step", at(0), at(10_001)), spans, waits


@given(steps())
def test_phases_are_not_negative_and_sum_exactly(case: tuple[Span, list[Span], list[tuple[Stamp, Stamp]]]) -> None:
    step, spans, waits = case
    found = carve(step, spans, waits)
    assert tuple(found) == PHASES
    assert all(value >= 0 for triple in found.values() for value in triple)
    assert sum(wall for wall, _, _ in found.values()) == 10_001
    assert found["comm"][0] == sum(b.wall_ns - a.wall_ns for a, b in waits)


def test_a_wait_leaves_the_phase_it_lies_in() -> None:
    step = Span("step", at(0), at(1000))
    spans = [Span("forward", at(100), at(400)), Span("backward", at(400), at(900))]
    found = carve(step, spans, [(at(500), at(700))])
    walls = {phase: wall for phase, (wall, _, _) in found.items()}
    assert walls == {"data": 0, "forward": 300, "backward": 300, "comm": 200, "optimizer": 0, "other": 200}

"""A timed step's columns, and the null timing, which takes no stamp and attaches to nothing."""

import itertools
from typing import Any

import pytest

from pneumo.study.schema import PHASES
from pneumo.timing import record, steps
from pneumo.timing.record import Collective, Recorder, Source
from pneumo.timing.steps import NoRecorder, NoTiming, Timing


class Watched(Source):
    """A source that notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def attach(self) -> None:
        self.asked.append("attach")

    def detach(self) -> None:
        self.asked.append("detach")

    def take(self, *, ended: bool = False) -> list[Collective]:
        self.asked.append("take")
        return [Collective(0, "allreduce", "float32", 4, "2 ranks", 1, bound="x")]


def a_step(timing: Timing) -> steps.Timed:
    """A step whose backend does everything that backends do."""
    timing.begin()
    with timing.phase("forward"), timing.recorder.blocking():
        pass
    with timing.phase("backward"):
        with timing.recorder.issuing() as issue:
            pass
        timing.recorder.mark()
        timing.recorder.waited()
    with timing.phase("optimizer"), timing.recorder.waiting(issue):
        pass
    return timing.end()


def test_a_timed_step_has_all_columns() -> None:
    timing = Timing(lambda: None)
    source = timing.recorder.source = Watched()
    timing.recorder.attach()
    timed = a_step(timing)
    timing.recorder.detach()
    timing.close()
    kinds = ("ns", "cpu_ns", "delay_ns")
    phases = {f"{phase}_{kind}" for phase, kind in itertools.product(PHASES, kinds)}
    assert timed.columns.keys() == phases | {"begin_ns", "wall_ns", "helpers_cpu_ns"}
    assert sum(timed.columns[f"{phase}_ns"] for phase in PHASES) == timed.columns["wall_ns"]
    assert timed.intervals
    assert timed.collectives
    assert {"attach", "take", "detach"} <= set(source.asked)


def test_without_timing_nothing_is_stamped_or_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    def stamped(*_: Any) -> Any:
        raise AssertionError("a stamp was taken")

    monkeypatch.setattr(steps, "ThreadStamps", stamped)
    monkeypatch.setattr(record, "perf_counter_ns", stamped)
    monkeypatch.setattr(record, "sleep", stamped)
    timing = NoTiming(stamped)
    source = timing.recorder.source = Watched()
    timing.recorder.attach()
    timed = a_step(timing)
    timing.close()
    assert timed == steps.Timed()
    assert "attach" not in source.asked


def test_every_call_of_a_recorder_has_its_null() -> None:
    """What can take a stamp is overridden; the rest is made of it."""
    made_of_others = {"detach", "delay", "take", "drop"}
    public = {name for name, value in vars(Recorder).items() if callable(value) and not name.startswith("_")}
    assert public - made_of_others <= vars(NoRecorder).keys()
    NoRecorder().delay()


def test_columns_of_a_collective_are_its_fields() -> None:
    from dataclasses import asdict

    one = Collective(3, "allreduce", "float32", 4, "2 ranks", 1, 2, 3, bound="x")
    assert one.columns() == asdict(one)


def test_a_source_of_nothing() -> None:
    source = Source()
    source.attach()
    assert source.take() == []
    source.detach()

"""How a job divides its steps and what it says of that, without ranks."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pneumo.config import Command, Study
from pneumo.data.split import Split
from pneumo.job import Job
from pneumo.plan import make_plan


class Said:
    """Progress that is kept, but for what is only said now and then."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def __call__(self, text: str) -> None:
        self._lines.append(text)

    def now_and_then(self, text: str) -> None:
        """Forget it."""


def make(study: Study, train: int = 320, calibrate: int = 10) -> tuple[Job, list[Any], list[str]]:
    """A job on rank 0 of a world of two, its trainings by name only, and what it says."""
    plan = make_plan(study, world_size=2, cores=2, local_size=2, gpus=0)
    split = Split(np.arange(train), np.arange(calibrate), np.arange(90))
    said: list[str] = []
    world: Any = SimpleNamespace(rank=0, total_cores=2, share=lambda value: value)
    results: Any = SimpleNamespace(path=Path("/none"))
    store: Any = None
    say: Any = Said(said)
    job = Job(Command(study), plan, world, store, split, results, [], say)
    return job, [SimpleNamespace(run=run) for run in plan.runs], said


def warm_up(job: Job, trainings: list[Any], *seconds: float) -> list[int]:
    """Warm up where no time passes, and a step of every run takes so long in the first look, and in the second one.

    Returns how many steps each look took.
    """
    looks: list[int] = []
    offsets: Any = SimpleNamespace(sample=lambda: None)

    def advance(training: Any, block: int, count: int, *, warmup: bool) -> float:
        assert (block, warmup) == (0, True)
        if training is trainings[0]:
            looks.append(count)
        return seconds[len(looks) - 1]

    job._advance = advance  # type: ignore[method-assign]
    job._warm_up(trainings, offsets, time.monotonic())
    return looks


def test_a_budget_that_suffices_changes_nothing() -> None:
    job, trainings, said = make(Study(backends=("serial", "ddp"), ranks=(1, 2), budget="1h"))
    assert warm_up(job, trainings, 0.001) == [2]
    assert job._schedule.steps == 8
    assert "left out" not in job._describe(len(trainings))
    assert said == []


def test_a_budget_shortens_all_blocks_alike_and_what_is_left_out_is_said() -> None:
    job, trainings, said = make(Study(backends=("serial", "ddp"), ranks=(1, 2), threads=1, budget="100s"))
    assert warm_up(job, trainings, 2.0, 2.0) == [2, 1]
    count = job._schedule.steps
    assert 2 <= count < 8
    assert 6 * count * 2.0 * len(trainings) < 100
    text = job._describe(len(trainings))
    assert f"3 steps to warm up, 6 blocks of {count}; {50 - 3 - 6 * count} of the 50 steps of 5 epochs" in text
    assert said == []


def test_of_two_looks_the_second_counts() -> None:
    study = Study(backends=("serial", "ddp"), ranks=(1, 2), threads=1, budget="500s", epochs=50)
    made = []
    for seconds in ((1.0, 1.0), (0.8, 1.0), (1.0, 0.8)):
        job, trainings, _ = make(study)
        warm_up(job, trainings, *seconds)
        made.append(job._schedule.steps)
    assert made[0] == made[1]
    assert made[2] == pytest.approx(made[0] / 0.8, rel=0.05)


@pytest.mark.parametrize("seconds", [(20.0, 1.0), (1.0, 20.0), (1.0, 1.0)])
def test_what_disturbs_one_of_two_looks_does_not_shorten_the_study(seconds: tuple[float, float]) -> None:
    study = Study(backends=("serial", "ddp"), ranks=(1, 2), threads=1, budget="500s", epochs=50)
    job, trainings, said = make(study)
    looks = warm_up(job, trainings, *seconds)
    assert looks[0] == 2
    assert looks[1] == (3 if seconds[0] == 1.0 else 1), "an eighth of a block, as the first look has it"
    assert job._schedule.warmup == sum(looks)
    assert 20 <= job._schedule.steps <= 500 / (6 * len(trainings))
    assert job._schedule.total <= job._schedule.asked
    assert said == []


def test_all_steps_that_are_asked_for_are_never_exceeded() -> None:
    """Of 50 steps 2 and 1 warm up, which leaves 7 for each of 6 blocks where the first look left 8."""
    job, trainings, _ = make(Study(backends=("serial",), ranks=(1,), threads=1, budget="100s"))
    assert warm_up(job, trainings, 5.0, 0.001) == [2, 1]
    assert (job._schedule.warmup, job._schedule.steps, job._schedule.asked) == (3, 7, 50)


def test_a_budget_that_is_too_short_for_its_blocks_is_said_once() -> None:
    job, trainings, said = make(Study(backends=("serial", "ddp"), ranks=(1, 2), budget="1s"))
    warm_up(job, trainings, 2.0, 2.0)
    assert job._schedule.steps == 1
    assert ["too short for 6 blocks" in line for line in said] == [True]


def test_epochs_that_are_too_short_for_the_blocks_are_said() -> None:
    job, trainings, _ = make(Study(backends=("serial",), ranks=(1,), epochs=1), train=4 * 32)
    assert warm_up(job, trainings, 2.0) == [1]
    assert "1 steps to warm up, 3 blocks of 1; 1 epoch(s) have too few steps for 6 blocks" in job._describe(1)


def test_a_budget_has_room_for_the_evaluations_between_the_blocks() -> None:
    """Of ten blocks nine times the calibration images, each run's ranks sharing them; an image is 0.4 of its step."""
    counts = []
    for patience in (0, 3):
        study = Study(backends=("serial", "ddp"), ranks=(1, 2), threads=1, budget="500s", blocks=10, epochs=50)
        job, trainings, said = make(replace(study, patience=patience), calibrate=1000)
        warm_up(job, trainings, 1.0, 1.0)
        counts.append(job._schedule.steps)
        told = "all stop early when none has got better for 3 block(s)"
        assert (told in job._describe(len(trainings))) == (patience == 3)
        assert said == []
    extra_s = 0.4 / 32 * 9 * 1000 * sum(1 / training.run.ranks for training in trainings)
    assert counts[0] - counts[1] == pytest.approx(extra_s / (10 * len(trainings) * 1.0), abs=1)
    assert counts[0] - counts[1] > 5


@pytest.mark.parametrize(("epochs", "warmup", "count"), [(1, 4, 1), (2, 2, 3), (5, 2, 8)])
def test_without_a_budget_the_remainder_warms_up(epochs: int, warmup: int, count: int) -> None:
    job, trainings, _ = make(Study(backends=("serial",), ranks=(1,), epochs=epochs))
    assert warm_up(job, trainings, 2.0) == [warmup]
    assert (job._schedule.warmup, job._schedule.steps) == (warmup, count)
    assert job._describe(1) == f"training: 1 runs in turns, {warmup} steps to warm up, 6 blocks of {count}"

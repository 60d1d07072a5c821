"""How a job divides its steps and what it says of that, without ranks."""

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


def make(study: Study, train: int = 320, calibrate: int = 10) -> tuple[Job, list[Any], list[str]]:
    """A job on rank 0 of a world of two, its trainings by name only, and what it says."""
    plan = make_plan(study, world_size=2, cores=2, local_size=2, gpus=0)
    split = Split(np.arange(train), np.arange(calibrate), np.arange(90))
    said: list[str] = []
    world: Any = SimpleNamespace(rank=0, total_cores=2)
    results: Any = SimpleNamespace(path=Path("/none"))
    store: Any = None
    say: Any = said.append
    job = Job(Command(study), plan, world, store, split, results, [], say)
    return job, [SimpleNamespace(run=run) for run in plan.runs], said


def steps(job: Job, trainings: list[Any], seconds: float) -> int:
    """The steps of a block where a step of every run takes so long, and no time has passed."""
    import time

    return job._block_steps(trainings, {t.run.run: seconds for t in trainings}, time.monotonic())


def test_a_budget_that_suffices_changes_nothing() -> None:
    job, trainings, said = make(Study(backends=("serial", "ddp"), ranks=(1, 2), budget="1h"))
    assert steps(job, trainings, 0.001) == 8
    assert "left out" not in job._describe(len(trainings), 8)
    assert said == []


def test_a_budget_shortens_all_blocks_alike_and_what_is_left_out_is_said() -> None:
    job, trainings, said = make(Study(backends=("serial", "ddp"), ranks=(1, 2), threads=1, budget="100s"))
    count = steps(job, trainings, 2.0)
    assert 2 <= count < 8
    assert 6 * count * 2.0 * len(trainings) < 100
    text = job._describe(len(trainings), count)
    assert f"2 steps to warm up, 6 blocks of {count}; {50 - 2 - 6 * count} of the 50 steps of 5 epochs" in text
    assert said == []


def test_a_budget_that_is_too_short_for_its_blocks_is_said() -> None:
    job, trainings, said = make(Study(backends=("serial", "ddp"), ranks=(1, 2), budget="1s"))
    assert steps(job, trainings, 2.0) == 1
    assert ["too short for 6 blocks" in line for line in said] == [True]


def test_epochs_that_are_too_short_for_the_blocks_are_said() -> None:
    job, trainings, _ = make(Study(backends=("serial",), ranks=(1,), epochs=1), train=4 * 32)
    assert steps(job, trainings, 2.0) == 1
    assert "1 steps to warm up, 3 blocks of 1; 1 epoch(s) have too few steps for 6 blocks" in job._describe(1, 1)


def test_a_budget_has_room_for_the_evaluations_between_the_blocks() -> None:
    """Of ten blocks nine times the calibration images, each run's ranks sharing them; an image is 0.4 of its step."""
    counts = []
    for patience in (0, 3):
        study = Study(backends=("serial", "ddp"), ranks=(1, 2), threads=1, budget="500s", blocks=10, epochs=50)
        job, trainings, said = make(replace(study, patience=patience), calibrate=1000)
        counts.append(steps(job, trainings, 1.0))
        told = "all stop early when none has got better for 3 block(s)"
        assert (told in job._describe(len(trainings), 1)) == (patience == 3)
        assert said == []
    extra_s = 0.4 / 32 * 9 * 1000 * sum(1 / training.run.ranks for training in trainings)
    assert counts[0] - counts[1] == pytest.approx(extra_s / (10 * len(trainings) * 1.0), abs=1)
    assert counts[0] - counts[1] > 5


@pytest.mark.parametrize(("epochs", "warmup", "count"), [(1, 4, 1), (2, 2, 3), (5, 2, 8)])
def test_without_a_budget_the_remainder_warms_up(epochs: int, warmup: int, count: int) -> None:
    job, trainings, _ = make(Study(backends=("serial",), ranks=(1,), epochs=epochs))
    assert (job._schedule.warmup, steps(job, trainings, 2.0)) == (warmup, count)
    assert job._describe(1, count) == f"training: 1 runs in turns, {warmup} steps to warm up, 6 blocks of {count}"

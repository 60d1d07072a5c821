"""Ultralytics' trainer as the rival: blocks of steps on demand, and what is said when it fails."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from pneumo.bench import rival
from pneumo.bench.rival import Rival
from pneumo.errors import PneumoError

pytest.importorskip("torch")


def test_it_stands_still_until_steps_are_asked_for() -> None:
    """Two blocks, of 3 steps and of 1, then the end: before the fifth batch nobody asks any more."""
    asked, answers = io.StringIO("3\n1\n"), io.StringIO()
    turns = rival._Turns(asked, answers)
    for _ in range(3):
        turns.before_batch(None)
    assert answers.getvalue() == "", "a block is over when the next batch is there"
    turns.before_batch(None)
    assert len(answers.getvalue().splitlines()) == 1
    with pytest.raises(rival._End):
        turns.before_batch(None)
    for line in answers.getvalue().splitlines():
        wall_ms, cpu_ms = json.loads(line)
        assert 0 <= cpu_ms <= wall_ms * 1.1 + 0.1


def test_it_trains_blocks_of_steps(tmp_path: Path) -> None:
    from pneumo.bench.yolo import write_data_set

    with Rival(write_data_set(tmp_path, 64, count=12), size=64, batch=4) as trainer:
        times = np.array([trainer.block(2) for _ in range(3)])  # 6 steps: two epochs
    assert times.shape == (3, 2)
    assert (times > 0).all()
    assert not list(tmp_path.glob("**/*.pt")), "nothing is kept"


def test_its_last_words_are_told(tmp_path: Path) -> None:
    with Rival(tmp_path / "nothing.yaml", size=64, batch=4) as trainer, pytest.raises(PneumoError) as told:
        trainer.block(1)
    assert "nothing.yaml" in str(told.value)

"""Early stopping: answers between blocks leave the training as it was, and a study in which nothing improves stops."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from harness import Launcher
from small_study import small_data

from pneumo.backends import BACKENDS
from pneumo.installed import native_missing
from pneumo.study.results import load_run, load_summary

JOB = Path(__file__).with_name("calibrated_job.py")
CALIBRATED, BETWEEN = 4, 2  # images of the part, and how often they are answered (see the job)


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
@pytest.mark.parametrize(
    ("model", "batch_norm", "backends"),
    [
        ("cnn", "ghost", ",".join(BACKENDS)),
        ("yolo", "ghost", "serial,ddp,fsdp"),
        ("yolo", "sync", "serial,ddp"),
    ],
)
def test_answers_between_blocks_change_no_bit_of_the_training(
    mpirun: Launcher, model: str, batch_norm: str, backends: str
) -> None:
    """Losses, what each step sends, final answers, and every tensor that is kept."""
    text = mpirun(2, file=JOB, args=[model, batch_norm, backends], timeout=280).stdout
    line = next(line for line in text.splitlines() if "RESULT " in line)
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    assert found["with"].keys() == found["without"].keys()
    assert len(found["with"]) >= len(backends.split(",")) - backends.count("horovod")
    for name, run in found["with"].items():
        before = found["without"][name]
        assert (run["between"], before["between"]) == (BETWEEN * CALIBRATED, 0), name
        assert run["equal"] == before["equal"], name
        losses = [loss for one in run["equal"] for block in one["losses"] for loss in block]
        assert len(set(losses)) > 4, "it learns, so equal losses say something"


def test_a_study_in_which_nothing_improves_stops_as_soon_as_it_may(mpirun: Launcher, tmp_path: Path) -> None:
    """With steps too small to change a weight; the world has a rank more than any run."""
    flags = ["--size", "32", "--epochs", "4", "--ranks", "1,2", "--global-batch", "8", "--threads", "1", "--save"]
    flags += ["--backends", "serial,ddp", "--comm", "gloo", "--blocks", "8"]
    flags += ["--patience", "1", "--learning-rate", "1e-30"]
    done = mpirun(3, module="pneumo.launch", args=[*small_data(tmp_path), *flags], timeout=120)
    folder = (tmp_path / "out" / "main" / "latest").resolve()
    said = "stopped early after block 6 of 8: no run's AUC on the calibration patients has improved for 5 blocks"
    assert f"] {said}\n" in done.stdout
    assert " ".join(done.stdout.split()).count(said) == 2, "when it stops, and below the comparison"
    run, summary = load_run(folder), load_summary(folder)
    assert run.state == "done"
    record = run.early_stopping
    assert record is not None
    assert (record.patience, record.blocks, record.stopped_after, record.figure) == (1, 8, 6, "AUC")
    assert {number: len(figures) for number, figures in record.figures.items()} == dict.fromkeys(range(2), 6)
    assert all(len(set(figures)) == 1 for figures in record.figures.values())
    assert [(row.blocks, row.steps) for row in summary.rows] == [(6, 6)] * 2
    assert all(row.metrics["auc"] is not None for row in summary.rows)
    check_rows(pd.read_parquet(folder / "steps.parquet"), folder)


def check_rows(steps: pd.DataFrame, folder: Path) -> None:
    """Answers come after the training steps of their block, and the final ones are by themselves in a block."""
    assert not steps.duplicated(["run", "block", "rank", "step"]).any()
    trained, answered = (steps[steps["kind"] == kind] for kind in ("train", "validate"))
    assert set(trained["block"]) == set(range(7))
    assert set(answered["block"]) == set(range(1, 8))
    key = ["run", "block"]
    last = (trained["begin_ns"] + trained["wall_ns"]).groupby([trained[name] for name in key]).max()
    first = answered.groupby(key)["begin_ns"].min()
    assert all(first[where] >= last[where] for where in last.index if where in first.index)
    assert (trained.groupby(["run", "step"])["block"].nunique() == 1).all()
    made = trained.groupby("run")["step"].max() + 1
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert not predictions.duplicated(["run", "patient", "part"]).any()
    assert set(predictions["part"]) == {"calibrate", "validate"}
    saved = [json.loads(path.read_text())["steps"] for path in (folder / "checkpoints").glob("*.json")]
    assert sorted(saved) == sorted(made)

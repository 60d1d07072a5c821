"""The launcher: refusals, and a small study from DICOM files to the summary, whose figures are recomputed here."""

import json
from pathlib import Path

import pandas as pd
import pytest
from harness import Launcher

PHASES = ("data", "forward", "backward", "comm", "optimizer", "other")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", "1,64"], ["64", "2"]),
        (["--global-batch", "31", "--ranks", "1,2"], ["31", "2"]),
        (["--data", "/nonexistent-dir"], ["/nonexistent-dir"]),
        (["--out", "/proc/nowhere"], ["/proc/nowhere"]),
        (["--bakends", "ddp"], ["--bakends", "--backends"]),
    ],
)
def test_refusals_are_said_once(mpirun: Launcher, flags: list[str], words: list[str]) -> None:
    done = mpirun(2, module="pneumo.launch", args=flags, timeout=60, check=False)
    assert done.returncode == 2, done.text
    said = [line for line in done.text.splitlines() if line.startswith("pneumo: ")]
    assert len(said) == 1, done.text
    assert all(word in said[0] for word in words)
    assert "Traceback" not in done.text


def test_a_study_adds_up(mpirun: Launcher, tmp_path: Path) -> None:
    from pneumo.data.sample import SampleConfig, write_patients, write_tables

    config = SampleConfig(patients=60, seed=3, size=256)
    root = tmp_path / "rsna"
    root.mkdir()
    write_tables(root, config)
    write_patients(root, config, 0, 60)
    places = ["--data", str(root), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    flags = ["--size", "32", "--epochs", "3", "--ranks", "1,2", "--global-batch", "8", "--blocks", "6", "--save"]
    done = mpirun(2, module="pneumo.launch", args=[*places, *flags], timeout=200)
    folder = (tmp_path / "out" / "main" / "latest").resolve()
    summary = json.loads((folder / "summary.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    assert run["state"] == "done"
    rows = {(r["backend"], r["ranks"]): r for r in summary["rows"]}
    assert {("serial", 1), ("ddp", 2), ("fsdp", 2), ("horovod", 2)} <= set(rows)
    steps = pd.read_parquet(folder / "steps.parquet")
    assert (steps[[f"{p}_ns" for p in PHASES]].sum(axis=1) == steps["wall_ns"]).all()
    timed = steps[(steps["kind"] == "train") & ~steps["warmup"]]
    for entry in run["runs"]:
        mine = timed[timed["run"] == entry["run"]]
        assert set(mine["rank"]) == set(range(entry["ranks"]))
        assert (mine["comm_ns"].sum() > 0) == (entry["ranks"] > 1)
        ends = (mine["begin_ns"] + mine["wall_ns"]).groupby(mine["block"]).max()
        total_s = (ends - mine["begin_ns"].groupby(mine["block"]).min()).sum() / 1e9
        row = next(r for r in summary["rows"] if (r["backend"], r["ranks"]) == (entry["backend"], entry["ranks"]))
        if row["threads"] == entry["threads"]:
            assert row["total_s"] == pytest.approx(total_s, rel=1e-9)
    first = rows["serial", 1]["metrics"]
    for row in rows.values():
        assert row["metrics"]["auc"] == pytest.approx(first["auc"], abs=0.01)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert not predictions.duplicated(["run", "patient", "part"]).any()
    saved = list((folder / "checkpoints").glob("*.safetensors"))
    assert len(saved) == len(run["runs"])
    assert "Results: " in done.stdout


def test_a_dry_run_needs_no_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pneumo.launch import main

    assert main(["--dry-run", "--ranks", "1,2", "--json", str(tmp_path / "plan.json")]) == 0
    text = capfd.readouterr().out
    assert "ddp/gloo on 2 ranks" in text
    assert "33.6 MB of gradient" in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {r["global_batch"] for r in plan["runs"]} == {32}


def test_a_dry_run_counts_the_images_that_the_subset_leaves(tmp_path: Path) -> None:
    from pneumo.launch import main

    images = tmp_path / "stage_2_train_images"
    images.mkdir()
    rows = ["patientId,x,y,width,height,Target"]
    for i in range(40):
        (images / f"p{i}.dcm").touch()
        rows.append(f"p{i},10.0,10.0,20.0,20.0,1" if i < 10 else f"p{i},,,,,0")
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(rows) + "\n")
    for subset, expected in (("balanced", 8), ("all", 16)):
        out = tmp_path / f"{subset}.json"
        flags = ["--dry-run", "--ranks", "1,2", "--data", str(tmp_path), "--subset", subset, "--json", str(out)]
        assert main(flags) == 0
        assert {run["train_images"] for run in json.loads(out.read_text())["runs"]} == {expected}

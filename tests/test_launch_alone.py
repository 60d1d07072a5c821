"""What the launcher refuses and says, as far as one process can show it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from mpi4py import MPI

from pneumo import launch, machine
from pneumo.config import Command, Study, parse
from pneumo.data import preprocess
from pneumo.data.rsna import Quarantined
from pneumo.errors import Refused
from pneumo.plan import make_plan
from pneumo.progress import Progress


def check(study: Study, json: Path | None = None) -> None:
    """What rank 0 does before any rank starts to work."""
    plan = make_plan(study, world_size=2, cores=2, local_size=2, gpus=0)
    launch._check(Command(study, json=json), plan)


def study(tmp_path: Path, **how: Any) -> Study:
    return Study(out=tmp_path / "out", cache=tmp_path / "cache", backends=("serial", "ddp"), ranks=(1, 2), **how)


def rsna(root: Path, positives: int, negatives: int) -> Path:
    """A folder whose tables are sound; the images are looked at only later."""
    (root / "stage_2_train_images").mkdir(parents=True)
    rows = ["patientId,x,y,width,height,Target"]
    for i in range(positives + negatives):
        (root / "stage_2_train_images" / f"p{i}.dcm").touch()
        rows.append(f"p{i},10.0,10.0,20.0,20.0,1" if i < positives else f"p{i},,,,,0")
    (root / "stage_2_train_labels.csv").write_text("\n".join(rows) + "\n")
    return root


def test_a_sound_study_passes(tmp_path: Path) -> None:
    check(study(tmp_path, data=rsna(tmp_path / "rsna", 20, 30)), tmp_path / "summary.json")
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("positives", "negatives", "subset"), [(0, 30, "balanced"), (20, 0, "balanced"), (1, 1, "balanced"), (1, 1, "all")]
)
def test_data_of_one_label_or_too_few_are_refused_before_work(
    tmp_path: Path, positives: int, negatives: int, subset: Any
) -> None:
    data = rsna(tmp_path / "rsna", positives, negatives)
    with pytest.raises(Refused, match=r"needs both|no patient is left"):
        check(study(tmp_path, data=data, subset=subset))


def test_data_for_a_single_step_are_refused_before_work(tmp_path: Path) -> None:
    data = rsna(tmp_path / "rsna", 20, 20)
    with pytest.raises(Refused, match="16 training images in batches of 32"):
        check(study(tmp_path, data=data, epochs=1))


def test_a_mapping_that_is_none_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "mapping.json").write_text('[{"no": 1}]')
    with pytest.raises(Refused, match="is not RSNA's mapping"):
        check(study(tmp_path, data=rsna(tmp_path / "rsna", 20, 30), mapping=tmp_path / "mapping.json"))


def test_a_summary_that_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"--json .*nowhere"):
        check(study(tmp_path), tmp_path / "nowhere" / "summary.json")


def test_too_little_disk_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128x128 and about 0.2 MB of DICOM for each of 800 patients; for models, their parameters."""
    free = {"cache": 1 << 40, "out": 1 << 40}
    monkeypatch.setattr(
        machine, "free_bytes", lambda path: free["out" if tmp_path / "out" in path.parents else "cache"]
    )
    check(study(tmp_path))
    free["cache"] = 800 * 128 * 128
    with pytest.raises(Refused, match=r"cache has 13 MB free, and 181 MB are needed.*--cache"):
        check(study(tmp_path))
    (tmp_path / "cache" / "store-0123").mkdir()
    check(study(tmp_path))  # it may well be this data's
    free["out"] = 1 << 20
    with pytest.raises(Refused, match=r"out/main has 1 MB free, and 34 MB are needed.*--out"):
        check(study(tmp_path))
    free["out"] = 100_000_000
    check(study(tmp_path))
    with pytest.raises(Refused, match=r"out/main has 100 MB free, and 1\d\d MB are needed.*--out"):
        check(study(tmp_path, save=True))


def test_a_dry_run_refuses_a_file_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--dry-run", "--ranks", "1,2", "--json", str(tmp_path / "nowhere" / "plan.json")]) == 2
    assert "--json" in capfd.readouterr().err


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert launch._cache(Study()) == Path("/elsewhere/pneumo")


def test_a_seed_changes_the_split_and_not_the_sample() -> None:
    labels = [launch._labels(Study(seed=seed)) for seed in (0, 1)]
    assert labels[0].equals(labels[1])
    plan = make_plan(Study(), world_size=1, cores=1, local_size=1, gpus=0)
    parts = [launch._parts(Study(seed=seed), plan, labels[0]).train.tolist() for seed in (0, 1)]
    assert parts[0] != parts[1]


def test_preprocessing_speaks_every_half_minute_and_says_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute of reports every 3 s gives two lines, beside the one before and the two after."""
    now = [1000.0]
    monkeypatch.setattr("pneumo.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    reasons = ("corrupt", "corrupt", "no_label")
    left_out = [Quarantined(f"p{i}", "", reason, "") for i, reason in enumerate(reasons)]
    store = SimpleNamespace(index=pd.DataFrame({"patient": ["a"] * 17}), quarantine=left_out, path=Path("/the/store"))

    def reporting(_config: Any, _comm: Any, *, interface: Any, report: Any) -> Any:
        for done in range(20):
            now[0] += 3.0
            report(f"preprocessed {done}")
        return store

    monkeypatch.setattr(preprocess, "preprocess", reporting)
    world: Any = SimpleNamespace(rank=0, comm=MPI.COMM_SELF, interface="lo")
    found, efforts = launch._preprocess(Study(), world, Progress(world))
    assert (found, len(efforts)) == (store, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5, lines
    assert sum("preprocessed" in line for line in lines) == 2
    assert lines[-2].endswith("17 images, 3 left out (2 corrupt, 1 no_label): /the/store/quarantine.csv")
    assert "preprocessing took 0.0 rank-seconds on 1 rank(s): 100 % other" in lines[-1]
    left_out.clear()
    launch._preprocess(Study(), world, Progress(world))
    assert capsys.readouterr().out.splitlines()[-2].endswith("17 images, none left out")


def test_a_dry_run_names_the_blocks_that_the_epochs_allow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = rsna(tmp_path / "rsna", 20, 20)
    flags = ["--dry-run", "--data", str(data), "--ranks", "1,2", "--global-batch", "8", "--json", str(tmp_path / "p")]
    assert launch.main([*flags, "--epochs", "2"]) == 0
    assert "3 timed blocks of at most 1 steps" in capfd.readouterr().out
    assert {run["train_images"] for run in json.loads((tmp_path / "p").read_text())["runs"]} == {16}


def test_only_the_first_rank_of_a_launcher_prints_help(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("PMI_RANK", rank)
        assert launch.main(["--help"]) == 0
        assert capfd.readouterr().out.count("Usage:") == times


def test_the_smoke_study_is_planned_for_as_many_cores_as_the_quota_allows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "limits", lambda: machine.Limits(2, 1.0, None))
    assert parse(["--dry-run"]) is not None
    assert launch.main(["--dry-run", "--ranks", "1,2"]) == 0
    assert "2 ranks on 1 cores" in capfd.readouterr().out

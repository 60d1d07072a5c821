"""A real study, read through pneumo.study: after a whole training every backend answers as the serial run does."""

from pathlib import Path

import pandas as pd
import pytest
from harness import Launcher
from small_study import small_data

from pneumo.data.sample import SampleConfig, write_patients, write_tables
from pneumo.installed import horovod_missing, native_missing
from pneumo.study.results import load_run
from pneumo.study.schema import Summary
from pneumo.study.summary import summarize

CONFIG = SampleConfig(patients=160, seed=3, size=256)
BACKENDS = {"ddp", "fsdp", "horovod"} - ({"horovod"} if horovod_missing() else set())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a small study of all backends on 1, 2 and 3 ranks, five epochs each."""
    folder = tmp_path_factory.mktemp("study")
    write_tables(folder / "rsna", CONFIG)
    write_patients(folder / "rsna", CONFIG, 0, CONFIG.patients)
    places = ["--data", folder / "rsna", "--out", folder / "out", "--cache", folder / "cache"]
    flags = ["--size", "32", "--epochs", "5", "--ranks", "1,2,3", "--global-batch", "12", "--threads", "1"]
    Launcher(folder)(3, module="pneumo.launch", args=[*places, *flags], timeout=280)
    return (folder / "out" / "main" / "latest").resolve()


@pytest.fixture(scope="module")
def summary(study: Path) -> Summary:
    """Its summary, made anew from its files."""
    return summarize(study, write=False)


def test_every_run_has_a_row(study: Path, summary: Summary) -> None:
    assert load_run(study).state == "done"
    expected = {("serial", 1)} | {(name, ranks) for name in BACKENDS for ranks in (2, 3)}
    assert {(row.backend, row.ranks) for row in summary.rows} == expected


def test_no_accuracy_is_lost_by_going_parallel(summary: Summary) -> None:
    serial, *parallel = summary.rows
    assert serial.backend == "serial"
    assert (serial.metrics["auc"] or 0) > 0.75, "it has learnt, so equal answers say something"
    assert serial.metrics["n"] == CONFIG.patients / 2
    for row in parallel:
        name = f"{row.backend} on {row.ranks}"
        assert row.metrics["auc"] == pytest.approx(serial.metrics["auc"], abs=0.01), name
        assert row.mcnemar_p is not None, name
        assert row.mcnemar_p > 0.05, name
        assert row.auc_difference is not None, name
        assert abs(row.auc_difference.estimate) <= 0.01, name


def test_each_gradient_travels_once_a_step_and_with_fsdp_the_parameters_too(study: Path, summary: Summary) -> None:
    whole = load_run(study).runs[0].gradient_bytes
    compared = [(found.ranks, {run.backend for run in found.runs}) for found in summary.comparisons]
    assert compared == [(2, BACKENDS), (3, BACKENDS)]
    for run in (run for found in summary.comparisons for run in found.runs):
        if run.backend == "fsdp":
            assert 2 * whole < (run.bytes or 0) < 3.5 * whole
        else:
            assert run.bytes == whole, run.backend
        assert (run.calls or 0) >= 1
        assert (run.outside_s or 0) > 0
        assert run.exposed_s is not None


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
def test_a_sharded_model_is_gathered_by_its_own_library_and_recorded(tmp_path: Path) -> None:
    """DTensor would take another group of the same ranks for it, if only another training of the world made one before.

    Which it does of operations that it has seen before: of this model, not of the CNN.
    """
    flags = ["--model", "sleep", "--backends", "serial,fsdp", "--comm", "gloo,pneumo", "--ranks", "1,2"]
    arguments = [*small_data(tmp_path), *flags, "--epochs", "3", "--blocks", "1", "--save"]
    Launcher(tmp_path)(2, module="pneumo.launch", args=arguments, timeout=280)
    result = (tmp_path / "out" / "main" / "latest").resolve()
    steps, calls = (pd.read_parquet(result / f"{name}.parquet") for name in ("steps", "collectives"))
    saving = steps.loc[steps["kind"] == "checkpoint", ["run", "rank", "step"]].merge(calls, on=["run", "rank", "step"])
    gathers = saving[saving["op"] == "allgather"]
    sharded = [run for run in load_run(result).runs if run.backend == "fsdp"]
    assert [run.comm for run in sharded] == ["gloo", "pneumo"]
    for run in sharded:
        mine = gathers[gathers["run"] == run.run]
        assert set(mine["rank"]) == {0, 1}, run.comm
        assert set(mine["backend"]) == {run.comm}

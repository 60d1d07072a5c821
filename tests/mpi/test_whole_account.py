"""The account of a real study with an injected cause: its figures from the tables by other means, and whom it names."""

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from harness import Launcher
from small_study import small_data
from trace_format import faults, ns

from pneumo.study.trace import write_trace

DELAY_S = 0.05
RUNS = [("ddp", "gloo"), ("ddp", "pneumo"), ("fsdp", "gloo"), ("fsdp", "pneumo"), ("horovod", "mpi")]


@dataclass(frozen=True)
class Result:
    """What a study left behind."""

    summary: dict[str, Any]
    runs: list[dict[str, Any]]
    steps: pd.DataFrame
    collectives: pd.DataFrame
    text: str
    folder: Path

    def row(self, backend: str, comm: str) -> dict[str, Any]:
        """The row of the run on two ranks; skips where it is absent."""
        rows = [r for r in self.summary["rows"] if (r["backend"], r["comm"]) == (backend, comm) and r["ranks"] == 2]
        if not rows:
            pytest.skip(f"{backend} over {comm} is not installed")
        found: dict[str, Any] = rows[0]
        return found


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A study in which rank 1 sleeps before each backward pass."""
    folder = tmp_path_factory.mktemp("account")
    flags = ["--size", "32", "--epochs", "5", "--ranks", "1,2", "--global-batch", "8", "--comm", "gloo,pneumo"]
    inject = ["--inject", f"rank=1,phase=backward,delay={DELAY_S * 1000:.0f}ms"]
    done = Launcher(folder)(
        2, module="pneumo.launch", args=[*small_data(folder), *flags, *inject, "--trace"], timeout=250
    )
    latest = folder / "out" / "main" / "latest"
    return Result(
        json.loads((latest / "summary.json").read_text()),
        json.loads((latest / "run.json").read_text())["runs"],
        pd.read_parquet(latest / "steps.parquet"),
        pd.read_parquet(latest / "collectives.parquet"),
        done.stdout,
        latest.resolve(),
    )


@pytest.mark.parametrize(("backend", "comm"), RUNS)
def test_terms_and_residual_are_the_loss(result: Result, backend: str, comm: str) -> None:
    row = result.row(backend, comm)
    assert None not in row["loss"].values()
    assert sum(row["loss"].values()) + row["residual_rank_s"] == pytest.approx(row["lost_rank_s"], abs=1e-9)
    assert row["residual_rank_s"] == pytest.approx(row["residual_fraction"] * 2 * row["total_s"], abs=1e-9)


@pytest.mark.parametrize(("backend", "comm"), RUNS)
def test_the_late_rank_is_named(result: Result, backend: str, comm: str) -> None:
    row = result.row(backend, comm)
    worst = row["late"][0]
    assert (worst["rank"], worst["phase"], worst["cause"]) == (1, "backward", "sleep")
    assert worst["rank_s"] >= 0.5 * DELAY_S * row["steps"]
    assert f"{backend} {comm} 2" in result.text.split("Who was late")[1]


@pytest.mark.parametrize(("backend", "comm"), RUNS)
def test_peer_wait_and_transfer_from_the_tables(result: Result, backend: str, comm: str) -> None:
    row = result.row(backend, comm)
    steps = result.steps[result.steps["run"] == row["run"]]
    timed = steps[(steps["kind"] == "train") & ~steps["warmup"]]
    calls = result.collectives.merge(timed[["run", "rank", "step"]], on=["run", "rank", "step"])
    calls = calls.dropna(subset=["wait_begin_ns", "wait_end_ns"])
    arrived = calls.groupby(["group", "step", "seq"])["enqueued_ns"].transform("max")
    ready = np.clip(arrived, calls["wait_begin_ns"], np.maximum(calls["wait_begin_ns"], calls["wait_end_ns"]))
    assert row["loss"]["peer_wait"] == pytest.approx((ready - calls["wait_begin_ns"]).sum() / 1e9, rel=1e-6)
    moved = np.maximum(calls["wait_end_ns"] - ready, 0).sum() / 1e9
    assert row["loss"]["transfer"] + row["loss"]["queue"] == pytest.approx(moved, rel=1e-6)


def test_shares_are_timed_beside_the_serial_run(result: Result) -> None:
    shares = result.steps[result.steps["kind"] == "share"]
    serial = [run["run"] for run in result.runs if run["backend"] == "serial" and run["threads"] == 1]
    assert set(shares["run"]) <= set(serial)
    timed = shares[~shares["warmup"]]
    assert set(timed["images"]) <= {4, 3}  # a rank's share of 8 images, and of the last, smaller batch
    assert set(timed["block"]) == set(range(1, 7))
    own = result.steps[(result.steps["run"] == serial[0]) & (result.steps["kind"] == "train")]
    for block, rows in timed.groupby("block"):
        ends = own[own["block"] == block]
        assert rows["begin_ns"].min() >= (ends["begin_ns"] + ends["wall_ns"]).max(), "they are no part of T_1"
    assert not shares.duplicated(["run", "rank", "step"]).any()
    assert not set(shares["step"]) & set(own["step"])


def test_the_trace_has_every_rank_of_every_run_and_marks_the_late_one(result: Result) -> None:
    path = result.folder / "trace.json.gz"
    assert f"ui.perfetto.dev: {path}" in result.text
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert faults(trace) == []
    assert path.stat().st_size < 1 << 20
    events, origin = trace["traceEvents"], trace["metadata"]["origin_ns"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    drawn = Counter((e["pid"] - 1, names[e["pid"], e["tid"]]) for e in events if e.get("cat") == "step")
    expected = {(run["run"], f"rank {rank}") for run in result.runs for rank in range(run["ranks"])}
    assert set(drawn) == expected
    timed = result.steps[(result.steps["kind"] == "train") & ~result.steps["warmup"]]
    assert drawn.total() == len(timed), "so few steps are all sampled"
    begins = sorted(ns(e["ts"]) + origin for e in events if e.get("cat") == "step")
    assert begins == sorted(timed["begin_ns"])
    calls = [e for e in events if e.get("cat") == "collective" and e["name"] != "all arrived"]
    joined = result.collectives.merge(timed[["run", "rank", "step"]], on=["run", "rank", "step"])
    assert len(calls) == len(joined)
    arrows = Counter((e["pid"], e["ph"]) for e in events if e.get("cat") == "arrival")
    for run in result.runs:
        if run["ranks"] == 2:
            marks = [e for e in events if e["ph"] == "i" and e["pid"] == run["run"] + 1]
            late = [e["args"]["others_waited_us"] for e in marks if names[e["pid"], e["tid"]] == "rank 1"]
            assert sum(late) >= 0.5e6 * DELAY_S * drawn[run["run"], "rank 1"]
            mine = joined[joined["run"] == run["run"]].groupby(["group", "step", "seq"]).ngroups
            left_out = trace["metadata"]["shown"]["arrows_left_out"]
            assert mine - left_out <= arrows[run["run"] + 1, "s"] <= mine
    assert trace == json.loads(gzip.decompress(write_trace(result.folder).read_bytes())), "made later it is the same"

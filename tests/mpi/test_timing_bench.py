"""The benchmark of timing under the real mpirun: its file and exit codes; with timing and without the losses agree."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from harness import Launcher

from pneumo.installed import native_missing

BRIEF = ["timing", "--seconds", "1", "--size", "16", "--global-batch", "8"]


def names_of_runs(ranks: int) -> set[str]:
    """The runs that are made with timing and without."""
    comms = ["gloo"] if native_missing() else ["pneumo", "gloo"]
    parallel = {f"{backend} {comm} {ranks}" for backend in ("ddp", "fsdp") for comm in comms}
    return {"serial 1"} | (parallel if ranks > 1 else set())


@pytest.mark.parametrize("ranks", [None, 2, 3])
def test_the_file_has_the_promised_form(mpirun: Launcher, tmp_path: Path, ranks: int | None) -> None:
    out = tmp_path / "timing.json"
    done = mpirun(ranks, module="pneumo.bench", args=[*BRIEF, "--json", out], timeout=280)
    found: dict[str, Any] = json.loads(out.read_text())
    size = ranks or 1
    assert found["ranks"] == size
    assert f"{size} rank{'s' if size > 1 else ''} on {found['cores']} cores" in done.stdout, done.text
    for row in found["rows"]:
        assert {"name", "value", "unit"} <= row.keys()
        assert math.isfinite(row["value"]), row
        assert row["unit"] in ("us", "ms")
    names = [row["name"] for row in found["rows"]]
    assert len(names) == len(set(names))
    assert any(name.startswith("allreduce, blocking, gloo 1: record in Python") for name in names)
    runs = names_of_runs(size)
    kinds = ("step with timing / without", "CPU of a step with timing / without", "step without timing / without")
    assert {one["name"] for one in found["ratios"]} == {f"{kind}: {run}" for kind in kinds for run in runs}
    for one in found["ratios"]:
        assert 0 < one["low"] <= one["median"] <= one["high"] < 1000
        assert one["confidence"] >= 0.95  # rounds were enough for an interval
    for run in runs:
        assert run in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["timming"], "did you mean timing?"),
        ([], "known: timing"),
        ([*BRIEF, "--json", "/nowhere/x.json"], "/nowhere/x.json"),
    ],
)
def test_refusals_are_said_once(mpirun: Launcher, flags: list[str], words: str) -> None:
    done = mpirun(2, module="pneumo.bench", args=flags, timeout=60, check=False)
    assert done.returncode == 2, done.text
    said = [line for line in done.text.splitlines() if line.startswith("pneumo: ")]
    assert len(said) == 1, done.text
    assert words in said[0]
    assert "Traceback" not in done.text


LOSSES = """
import json, os
import torch
from pneumo.bench.pictures import pictures
from pneumo.comm import missing
from pneumo.comm.groups import Groups
from pneumo.config import Study
from pneumo.plan import Run
from pneumo.timing.steps import NoTiming, Timing
from pneumo.train import Training
from pneumo.world import World

with World.start() as world:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    comms = ["gloo"] if missing() else ["gloo", "pneumo"]
    kinds = [("serial", "none", 1)] + [(name, comm, 2) for name in ("ddp", "fsdp", "fsdp-async") for comm in comms]
    for ranks in (1, 2):
        world.first(ranks)
    groups = Groups(world.comm, address=world.share(world.address), wanted=[(comm, 2) for comm in comms])
    store, split = pictures(40)
    study = Study(size=16, global_batch=8, threads=1)
    found = {}
    for backend, comm, ranks in kinds:
        losses, states, columns, calls = [], [], [], []
        for timing in (Timing, NoTiming):
            run = Run(0, "cnn", backend, comm, ranks, 1, 8, "cpu")
            training = Training(run, study, store, split, world, groups, timing)
            with training.awake():
                if training.active:
                    rows = training.advance(1, 6, warmup=False)
                    losses.append([row["loss"] for row in rows.steps])
                    columns.append(len(rows.steps[0]))
                    calls.append(len(rows.collectives))
                    states.append(training.full_state())
            training.close()
        if world.rank == 0:
            apart = max(float((a - b).abs().max()) for a, b in zip(states[0].values(), states[1].values()))
            found[f"{backend} {comm}"] = {"losses": losses, "apart": apart, "columns": columns, "calls": calls}
    groups.close()
    if world.rank == 0:
        print("RESULT " + json.dumps(found))
"""


def test_with_timing_and_without_the_training_is_the_same(mpirun: Launcher) -> None:
    text = mpirun(2, LOSSES, timeout=120).stdout
    found = json.loads(next(line for line in text.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])
    assert "serial none" in found
    assert "fsdp-async gloo" in found
    for name, one in found.items():
        timed, untimed = one["losses"]
        assert timed == untimed, name
        assert timed[-1] != timed[0], name
        assert one["apart"] == 0, name
        assert one["columns"][0] > one["columns"][1], name
        assert (one["calls"][0] > 0) == (name != "serial none"), name
        assert one["calls"][1] == 0, name

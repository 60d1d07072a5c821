"""The benchmark of the detector's steps, as a whole."""

import json
from pathlib import Path

import pytest
from harness import Launcher

from pneumo.installed import native_missing


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
def test_all_trainings_in_turns(mpirun: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    flags = ["yolo", "--seconds", "1", "--size", "64", "--global-batch", "4", "--json", str(out)]
    done = mpirun(2, module="pneumo.bench", args=flags, timeout=240)
    found = json.loads(out.read_text())
    ours, both, rival = "pneumo, 1 rank", "pneumo, 2 ranks", "Ultralytics, 1 process"
    apart = f"{both} apart"
    steps = {row["name"]: row["value"] for row in found["rows"] if row["unit"] == "ms"}
    assert steps.keys() == {f"step: {name}" for name in (ours, both, apart, rival)}
    ratios = {row["name"]: row["median"] for row in found["ratios"]}
    assert ratios.keys() == {
        *(f"throughput: {name} / {rival}" for name in (ours, both, apart)),
        *(f"throughput: {name} / {ours}" for name in (both, apart)),
        f"throughput: {both} / {apart}",
    }
    assert ratios[f"throughput: {ours} / {rival}"] == pytest.approx(
        steps[f"step: {rival}"] / steps[f"step: {ours}"], 0.5
    )
    assert "Training steps of yolov8n" in done.stdout

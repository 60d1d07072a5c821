"""The detector learns the same on every backend and number of ranks: losses, answers and weights, in float64.

Training YOLO is chaotic: the same mathematics in another order of sums drifts apart from step to step. In float64 the
drift of these steps stays far below what a wrong normaliser, a wrong statistic or a lost gradient would make.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Launcher

from pneumo.backends import BACKENDS
from pneumo.installed import horovod_missing, native_missing

JOB = Path(__file__).with_name("yolo_parity_job.py")
SERIAL = "serial-none-1"
# 39 training images in batches of 12: the last batch of an epoch has 3, so of 4 ranks one gets none.
BATCH, COUNT = 12, 50


def results(mpirun: Launcher, ranks: str, n: int, mode: str, backends: str) -> dict[str, Any]:
    """What the job found of each run, by its backend, comm and ranks."""
    text = mpirun(n, file=JOB, args=[ranks, str(BATCH), str(COUNT), mode, backends], timeout=290).stdout
    line = next(line for line in text.splitlines() if "RESULT " in line)
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    return found


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
@pytest.mark.parametrize(
    ("mode", "ranks", "backends"),
    [("ghost", "1,2", "serial,ddp,fsdp,horovod"), ("sync", "1,3", "serial,ddp,fsdp"), ("ghost", "1,4", "serial,ddp")],
)
def test_the_detector_learns_what_serial_learns(mpirun: Launcher, mode: str, ranks: str, backends: str) -> None:
    n = max(int(k) for k in ranks.split(","))
    found = results(mpirun, ranks, n, mode, backends)
    wanted = [name for name in backends.split(",") if name != "horovod" or horovod_missing() is None]
    assert {name.split("-")[0] for name in found} == set(wanted)
    assert len(found) == 1 + sum(len([c for c in BACKENDS[b].comms if c != "nccl"]) for b in wanted if b != "serial")
    serial = found.pop(SERIAL)
    assert len(set(serial["images"])) == 2, "an uneven last batch belongs to the case"
    assert serial["losses"][-1] < serial["losses"][0], "it learns, so equal losses say something"
    for name, run in found.items():
        assert run["images"] == serial["images"], name
        np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(run["answers"], serial["answers"], rtol=1e-4, atol=1e-6, err_msg=name)
        moved = {tensor: distance for tensor, distance in run["state"].items() if not distance < 1e-5}
        assert not moved, f"{name}: {moved}"


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
def test_local_statistics_make_the_training_depend_on_the_ranks(mpirun: Launcher) -> None:
    """The two cases above could fail: with statistics of a rank's own images the losses differ visibly."""
    found = results(mpirun, "1,2", 2, "local", "serial,ddp")
    serial = found.pop(SERIAL)
    for run in found.values():
        assert np.abs(np.divide(run["losses"], serial["losses"]) - 1).max() > 1e-3

"""The detector learns the same on every backend and number of ranks.

Training YOLO is chaotic: the same mathematics in another order of sums drifts apart from step to step. So losses,
answers and weights of whole trainings are compared in float64, in which the drift of these steps stays far below what a
wrong normaliser, a wrong statistic or a lost gradient would make; and in float32 single steps from the same weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Launcher

from pneumo.installed import horovod_missing, native_missing

JOB = Path(__file__).with_name("yolo_parity_job.py")
FORCED = Path(__file__).with_name("yolo_forced_job.py")
SERIAL = "serial-none-1"
# 39 training images in batches of 12: the last batch of an epoch has 3, so of 4 ranks one gets none.
BATCH, COUNT = 12, 50


def results(mpirun: Launcher, job: Path, n: int, *args: str) -> dict[str, Any]:
    """What a job found of each run, by its backend, comm and ranks."""
    text = mpirun(n, file=job, args=list(args), timeout=290).stdout
    line = next(line for line in text.splitlines() if "RESULT " in line)
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    return found


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
@pytest.mark.parametrize(
    ("mode", "ranks", "backends", "steps"),
    [
        ("ghost", "1,2", "serial,ddp,fsdp,horovod", 20),
        ("sync", "1,3", "serial,ddp,fsdp", 12),
        ("ghost", "1,4", "serial,ddp", 12),
    ],
)
def test_the_detector_learns_what_serial_learns(
    mpirun: Launcher, mode: str, ranks: str, backends: str, steps: int
) -> None:
    n = max(int(k) for k in ranks.split(","))
    found = results(mpirun, JOB, n, ranks, str(BATCH), str(COUNT), mode, backends, str(steps))
    wanted = [name for name in backends.split(",") if name != "horovod" or horovod_missing() is None]
    assert {name.split("-")[0] for name in found} == set(wanted)
    assert len(found) == len(wanted)
    serial = found.pop(SERIAL)
    assert len(set(serial["images"])) == 2, "an uneven last batch belongs to the case"
    assert max(serial["state"].values()) > 0.05, "its weights move, so equal losses say something"
    for name, run in found.items():
        assert run["images"] == serial["images"], name
        sums = 1 + 114 * (mode == "sync")  # of the normaliser, and of both passes of 57 layers of batch norm
        assert run["small sums"] >= n * steps * sums, name
        np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(run["answers"], serial["answers"], rtol=1e-4, atol=1e-6, err_msg=name)
        moved = {tensor: distance for tensor, distance in run["state"].items() if not distance < 1e-5}
        assert not moved, f"{name}: {moved}"


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
def test_local_statistics_make_the_training_depend_on_the_ranks(mpirun: Launcher) -> None:
    """The two cases above could fail: with statistics of a rank's own images the losses differ visibly."""
    found = results(mpirun, JOB, 2, "1,2", str(BATCH), str(COUNT), "local", "serial,ddp", "6")
    serial = found.pop(SERIAL)
    for run in found.values():
        assert np.abs(np.divide(run["losses"], serial["losses"]) - 1).max() > 1e-3


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
@pytest.mark.parametrize(
    ("ranks", "mode", "apart", "worst"),
    [
        ("1,2,4", "ghost", [1e-5, 1e-5, 1e-3], [1e-5, 1e-5, 1e-2]),
        ("1,3", "ghost", [1e-5, 1e-5, 1e-3], [1e-5, 1e-5, 1e-2]),
        ("1,3", "sync", [5e-4] * 3, [5e-3] * 3),
    ],
)
def test_from_serials_weights_loss_and_gradients_are_serials(
    mpirun: Launcher, ranks: str, mode: str, apart: list[float], worst: list[float]
) -> None:
    """In float32: batches of 12, 12 and 3 images.

    The groups of `ghost` have the same bits on any rank, but in the last batch are of one image, whose last map is
    2 x 2: batch norm over four values is badly conditioned, and rounding shows a hundred times more. The statistics of
    `sync` are sums in another order than the plain layer's, and 57 layers enlarge that rounding a thousand times.
    """
    backends, numbers = "serial,ddp,fsdp,horovod", [int(number) for number in ranks.split(",")]
    found = results(mpirun, FORCED, numbers[-1], ranks, str(BATCH), "38", mode, "float32", backends)
    serial = found.pop(SERIAL)
    assert serial["images"] == [12, 12, 3]
    assert len(found) == len(numbers[1:]) * (4 if horovod_missing() else 5)
    for name, run in found.items():
        assert run["images"] == serial["images"], name
        np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-5, err_msg=name)
        assert np.less(run["apart"], apart).all(), f"{name}: {run['apart']}"
        assert np.less(run["worst"], worst).all(), f"{name}: {run['worst']}"

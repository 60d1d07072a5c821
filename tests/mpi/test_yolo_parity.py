"""The detector learns the same on every backend and number of ranks.

Training YOLO is chaotic: the same mathematics in another order of sums drifts apart from step to step. So losses,
answers and weights of whole trainings are compared in float64, in which the drift of these steps stays far below what a
wrong normaliser, a wrong statistic or a lost gradient would make; and single steps from the same weights in both types.
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
    """What a job found of each run, by its backend, comm and ranks; of `FORCED` by case before that."""
    text = mpirun(n, file=job, args=list(args), timeout=580 if job == FORCED else 290).stdout
    line = next(line for line in text.splitlines() if "RESULT " in line)
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    return found


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
@pytest.mark.parametrize(
    ("mode", "n", "count"), [("ghost", 2, COUNT), ("ghost", 3, COUNT + 4), ("ghost", 4, COUNT), ("sync", 3, COUNT)]
)
def test_the_detector_learns_what_serial_learns(mpirun: Launcher, mode: str, n: int, count: int) -> None:
    """20 steps with AdamW in float64, on all backends.

    Each number of ranks is a study by itself: with 2, 3 and 4 in one, the groups of `ghost` would be of one image, and
    rounding would grow to the size of the losses within the 20 steps. With 3 ranks the last batch has 7 images:
    with 3, again one for each group, the losses came as far apart as 8e-7, with 7 it is 1e-9.
    """
    steps, backends = 20, ["ddp", "fsdp", *([] if horovod_missing() else ["horovod"])]
    found = results(mpirun, JOB, n, f"1,{n}", str(BATCH), str(count), mode, ",".join(["serial", *backends]), str(steps))
    serial = found.pop(SERIAL)
    assert sorted(name.split("-")[0] for name in found) == sorted(backends)
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
    """The cases above could fail: with statistics of a rank's own images the losses differ visibly."""
    found = results(mpirun, JOB, 2, "1,2", str(BATCH), str(COUNT), "local", "serial,ddp", "4")
    serial = found.pop(SERIAL)
    for run in found.values():
        assert np.abs(np.divide(run["losses"], serial["losses"]) - 1).max() > 1e-3


@pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")
@pytest.mark.timeout(600)
def test_from_serials_weights_loss_and_gradients_are_serials(mpirun: Launcher) -> None:
    """Batches of 12 and 3 images, on all backends: in float64 every tensor of the gradient, in float32 the loss.

    In float32 the gradient is only bounded for the whole batch. The groups of `ghost` in the last batch are of one
    image, whose last map is 2 x 2: batch norm over four values is badly conditioned. The statistics of `sync` are sums
    in another order than the plain layer's, and 57 layers enlarge that rounding a thousand times.
    """
    exact = [f"float64-{mode}-1,2,3,4" for mode in ("ghost", "sync")]
    apart = {"float32-ghost-1,4": 1e-5, "float32-sync-1,3": 5e-4}
    cases = results(mpirun, FORCED, 4, str(BATCH), "26", "serial,ddp,fsdp,horovod", *exact, *apart)
    assert list(cases) == [*exact, *apart]
    for case, found in cases.items():
        serial = found.pop(SERIAL)
        assert serial["images"] == [12, 3]
        numbers = case.split("-")[-1].split(",")[1:]
        kinds = ["ddp-gloo", "ddp-pneumo", "fsdp-gloo", "fsdp-pneumo", *([] if horovod_missing() else ["horovod-mpi"])]
        assert sorted(found) == sorted(f"{kind}-{k}" for kind in kinds for k in numbers)
        for name, run in found.items():
            assert run["images"] == serial["images"], (case, name)
            if case in exact:
                np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-9, err_msg=f"{case} {name}")
                assert np.less(run["worst"], 1e-9).all(), f"{case} {name}: {run['worst']}"
            else:
                np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-5, err_msg=f"{case} {name}")
                assert run["apart"][0] < apart[case], f"{case} {name}: {run['apart']}"

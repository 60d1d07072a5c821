"""The loss of every step equals serial's for every backend and number of ranks; answers and model agree afterwards."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Launcher

from pneumo.backends import BACKENDS, COMMS
from pneumo.installed import horovod_missing
from pneumo.plan import COMM_MISSING, SHARED_GPUS

JOB = Path(__file__).with_name("parity_job.py")
SERIAL = "serial-none-1"
PARALLEL = {(name, comm) for name, entry in BACKENDS.items() if entry.parallel for comm in entry.comms}
# 75 training images in batches of 24: the last batch of an epoch has 3, so of 4 ranks one gets none.
BATCH, COUNT = 24, 86
CASES = [("1", 1), ("1,2", 2), ("1,2,3,4", 4)]


def results(mpirun: Launcher, ranks: str, n: int, comms: Collection[str]) -> dict[str, Any]:
    """What the job found of each run, by its backend, comm and ranks."""
    text = mpirun(n, file=JOB, args=[ranks, str(BATCH), str(COUNT), ",".join(comms)], timeout=280).stdout
    line = next(line for line in text.splitlines() if "RESULT " in line)
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    return found


def names(ranks: str, comms: Collection[str]) -> set[str]:
    """The runs that a job with these comms has to make: one rank is left to serial where more were asked for too."""
    numbers = [int(k) for k in ranks.split(",")]
    pairs = {(name, comm) for name, comm in PARALLEL if comm in comms}
    return {SERIAL} | {f"{name}-{comm}-{k}" for name, comm in pairs for k in numbers if k > 1 or numbers == [1]}


def assert_learnt(serial: dict[str, Any]) -> None:
    """Equality says something: batches were uneven, the loss fell, and every tensor has left its place."""
    assert len(set(serial["images"])) == 2, "an uneven last batch belongs to the case"
    assert serial["losses"][-1] < serial["losses"][0], "it learns, so equal losses say something"
    assert min(serial["state"].values()) > 0.03, "every tensor moved, so equal tensors say something"
    assert serial["collectives"] == 0


def assert_equal(found: dict[str, Any], expected: set[str]) -> None:
    """Exactly the expected runs are there, and all of them agree with serial."""
    assert found.keys() == expected
    serial = found[SERIAL]
    assert_learnt(serial)
    for name in sorted(expected - {SERIAL}):
        run = found[name]
        assert run["images"] == serial["images"], name
        np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(run["answers"], serial["answers"], atol=1e-3, err_msg=name)
        assert run["state"].keys() == serial["state"].keys(), name
        assert max(run["state"].values()) < 3e-3, f"{name}: {run['state']}"
        assert run["collectives"] > 0 or name.endswith("-1"), name


@pytest.mark.parametrize(("ranks", "n"), CASES)
def test_losses_answers_and_model_equal_serials(mpirun: Launcher, ranks: str, n: int) -> None:
    missing = {comm: COMM_MISSING[comm](n, 0) if comm in COMM_MISSING else None for comm in COMMS if comm != "nccl"}
    comms = [comm for comm, why in missing.items() if why is None]
    missing["mpi"] = horovod_missing()
    found = results(mpirun, ranks, n, comms)
    assert_equal(found, names(ranks, comms if missing["mpi"] else [*comms, "mpi"]))
    if absent := [why for why in missing.values() if why is not None]:
        pytest.skip(f"what is here agrees with serial; {'; '.join(absent)}")


def gpus_or_skip(wanted: int) -> int:
    """The GPUs that torch can use; skips the test where there are fewer than wanted."""
    import torch

    found = torch.cuda.device_count() if torch.distributed.is_nccl_available() else 0
    if found < wanted:
        pytest.skip(f"needs {wanted} GPU(s) that torch can use with NCCL; {found} found")
    return found


@pytest.mark.gpu
def test_one_gpu_learns_what_the_cpu_learns(mpirun: Launcher) -> None:
    gpus_or_skip(1)
    found, on_cpu = results(mpirun, "1", 1, ["nccl"]), results(mpirun, "1", 1, ["gloo"])[SERIAL]
    assert_equal(found, names("1", ["nccl"]))
    np.testing.assert_allclose(found[SERIAL]["losses"], on_cpu["losses"], rtol=1e-3)
    np.testing.assert_allclose(found[SERIAL]["answers"], on_cpu["answers"], atol=1e-2)


@pytest.mark.gpu
def test_ranks_with_nccl_equal_one_gpu(mpirun: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU a rank, or where there is a single one, two ranks that share it."""
    if (found := gpus_or_skip(1)) == 1:
        monkeypatch.setenv(SHARED_GPUS, "1")
    n = min(max(found, 2), 4)
    ranks = ",".join(str(k) for k in range(1, n + 1))
    assert_equal(results(mpirun, ranks, n, ["nccl"]), names(ranks, ["nccl"]))

"""Training with `sync` and `ghost` batch norm is the same for every number of ranks, FSDP's shards included."""

import json
from pathlib import Path

import pytest
from harness import Launcher

JOB = Path(__file__).with_name("norms_job.py")
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}  # of two steps, the second of which adds to what the first is off
# MPI's own sums, which poll, have a rank wait for a core where there are fewer than ranks, unless they yield.
YIELDING = {"OMPI_MCA_mpi_yield_when_idle": "1"}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_training_does_not_depend_on_the_number_of_ranks(mpirun: Launcher, n: int) -> None:
    text = mpirun(n, file=JOB, env=YIELDING, timeout=120).stdout
    ranks = json.loads(next(line for line in text.splitlines() if line.startswith("RESULT ")).split(" ", 1)[1])
    assert len(ranks) == n
    modes = ["sync", "ghost", "local", *(["fsdp"] if n == 2 else [])]
    names = {f"{mode}-{kind}-{dtype}" for mode in modes for kind in ("uneven", "empty") for dtype in TOLERANCE}
    for found in ranks:
        assert found.keys() == names
        for name, distances in found.items():
            mode, _, dtype = name.split("-")
            if mode == "local" and n > 1:
                assert max(distances.values()) > 0.01, f"{name}: the case does not tell the modes apart"
            else:
                assert max(distances.values()) < TOLERANCE[dtype], f"{name}: {distances}"

"""The loss of every step equals serial's for every backend and number of ranks; answers agree after training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Launcher

JOB = Path(__file__).with_name("parity_job.py")
BACKENDS = ("ddp", "fsdp", "horovod")
# 75 training images in batches of 24: the last batch of an epoch has 3, so of 4 ranks one gets none.
CASES = [("1,2", 2, 24, 86), ("1,2,3,4", 4, 24, 86), ("1", 1, 24, 86)]


def results(text: str) -> dict[str, Any]:
    """What the job printed."""
    line = next(line for line in text.splitlines() if "RESULT " in line)
    found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
    return found


@pytest.mark.parametrize(("ranks", "n", "batch", "count"), CASES)
def test_losses_and_answers_equal_serials(mpirun: Launcher, ranks: str, n: int, batch: int, count: int) -> None:
    done = mpirun(n, file=JOB, args=[ranks, str(batch), str(count)], timeout=200)
    found = results(done.stdout)
    serial = found["serial-1"]
    assert len(set(serial["images"])) == 2, "an uneven last batch belongs to the case"
    assert serial["losses"][-1] < serial["losses"][0], "it learns, so equal losses say something"
    wanted = [f"{backend}-{k}" for backend in BACKENDS for k in map(int, ranks.split(",")) if k > 1]
    for name in wanted:
        run = found[name]
        assert run["images"] == serial["images"], name
        np.testing.assert_allclose(run["losses"], serial["losses"], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(run["answers"], serial["answers"], atol=1e-3, err_msg=name)
        assert run["state"].keys() == serial["state"].keys(), name
        assert run["collectives"] > 0, name
    assert serial["collectives"] == 0

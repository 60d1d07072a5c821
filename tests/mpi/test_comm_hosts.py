"""`pneumo` on two hosts: network namespaces with names of their own, which launch/two_hosts.sh makes and removes."""

import os
import shutil
from pathlib import Path

import pytest
from harness import BIN, Result, run

from pneumo.installed import native_facts

ROOT = Path(__file__).parents[2]
JOB = "tests/mpi/comm_hosts_job.py"
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"),
    pytest.mark.skipif(not (native_facts() or {}).get("mpi"), reason="the native layer is not built, or without MPI"),
]


def on_two_hosts(folder: Path, ranks: int, *args: str) -> Result:
    """Run the job with so many ranks on each host; skips where namespaces are not allowed."""
    command = ["launch/two_hosts.sh", "--rate", "0", "--ranks", str(ranks), str(BIN / "python"), JOB]
    result = run([*command, "10.77.0.1", *args], timeout=120, env=None, cwd=ROOT, folder=folder)
    if result.returncode == 2 and "not allowed" in result.stderr:
        pytest.skip("network namespaces are not allowed here")
    return result


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_collective_is_right_between_hosts(ranks: int, tmp_path: Path) -> None:
    result = on_two_hosts(tmp_path, ranks, "mismatch")
    assert result.returncode == 0, result.text[-4000:]
    assert "hosts hosta hostb" in result.stdout


def test_ranks_on_another_host_learn_of_an_exception(tmp_path: Path) -> None:
    result = on_two_hosts(tmp_path, 1, "exception")
    assert result.returncode != 0
    assert "one rank fails" in result.text
    assert "the others know" in result.stdout, result.text[-4000:]

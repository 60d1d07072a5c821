"""`pneumo` on two hosts: network namespaces with names of their own, which launch/two_hosts.sh makes and removes."""

import os
import shutil
from pathlib import Path

import pytest
from harness import BIN, run

from pneumo.installed import native_facts

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"),
    pytest.mark.skipif(not (native_facts() or {}).get("mpi"), reason="the native layer is not built, or without MPI"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_collective_is_right_between_hosts(ranks, tmp_path):
    command = [
        "launch/two_hosts.sh",
        "--rate",
        "0",
        "--ranks",
        str(ranks),
        str(BIN / "python"),
        "tests/mpi/comm_hosts_job.py",
    ]
    result = run([*command, "10.77.0.1", "mismatch"], timeout=200, env=None, cwd=ROOT, folder=tmp_path)
    if result.returncode == 2 and "not allowed" in result.stderr:
        pytest.skip("network namespaces are not allowed here")
    assert result.returncode == 0, result.text[-4000:]
    assert "hosts hosta hostb" in result.stdout

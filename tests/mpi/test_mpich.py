"""The layer and the launcher over MPICH, another MPI than the environment's own.

mpi4py's wheel takes the MPI that it is told to; `_mpi` is compiled for MPICH here, into a package that is otherwise
made of links. Horovod is built for one MPI, so it is not part of this.
"""

import json
import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import BIN, Result, run
from small_study import small_data
from two_nodes import on_two_nodes, skip_where_refused

from pneumo.installed import native_missing

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MPICH = BIN.parent / "mpich"  # where launch/test.sh puts it


def has_abi(name: str) -> bool:
    """Whether this mpi4py has a module for MPIs of that kind; one that was built from source has a single one."""
    folder = Path(str(find_spec("mpi4py").origin)).parent  # type: ignore[union-attr]
    return any(folder.glob(f"MPI.{name}.*"))


pytestmark = [
    pytest.mark.skipif(not (MPICH / "bin" / "mpiexec").exists(), reason="needs MPICH, which ./launch/test.sh brings"),
    pytest.mark.skipif(not has_abi("mpich"), reason="this mpi4py is built for one MPI alone"),
    pytest.mark.skipif(native_missing() is not None, reason="the native layer is not built"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package `pneumo` whose messages between nodes go by MPICH."""
    folder = tmp_path_factory.mktemp("over-mpich")
    left_out = shutil.ignore_patterns("__pycache__", "_mpi.*", "libpneumo_probe.*")
    shutil.copytree(ROOT / "src" / "pneumo", folder / "pneumo", copy_function=os.symlink, ignore=left_out)
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    includes = ["-isystem", Path(torch.origin).parent / "include", "-isystem", sysconfig.get_path("include")]
    target = folder / "pneumo" / "comm" / f"_mpi{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [MPICH / "bin" / "mpicxx", "-std=c++20", "-O1", "-shared", "-fPIC", *includes, "-o", target]
    done = subprocess.run(
        [*command, ROOT / "src" / "native" / "mpi" / "wire.cpp"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def mpiexec(package: Path, folder: Path, ranks: int, *command: str | Path, timeout: float = 200) -> Result:
    """Run a command under MPICH's own launcher, on the loopback interface."""
    env = {
        "MPI4PY_MPIABI": "mpich",
        "LD_LIBRARY_PATH": str(MPICH / "lib"),
        "PYTHONPATH": os.pathsep.join(map(str, (package, HERE, HERE.parent))),
        "UCX_TLS": "self,sm",
        "UCX_NET_DEVICES": "lo",
        "FI_PROVIDER": "shm",
    }
    start = [str(MPICH / "bin" / "mpiexec"), "-iface", "lo", "-n", str(ranks)]
    return run([*start, *map(str, command)], timeout=timeout, env=env, cwd=ROOT, folder=folder)


def test_every_check_of_the_backend_holds(package: Path, tmp_path: Path) -> None:
    """Those that the other MPI passes too; ranks of one node find each other through mpi4py."""
    done = mpiexec(package, tmp_path, 2, BIN / "python", HERE / "comm_collectives_job.py")
    assert done.returncode == 0, done.text[-4000:]
    lines = [line.removeprefix("CHECK ") for line in done.stdout.splitlines() if line.startswith("CHECK ")]
    reports = [json.loads(line) for line in lines]
    assert len(reports) > 50
    assert {report["name"]: report["error"] for report in reports if report["error"]} == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="names of hosts of their own need root")
def test_every_collective_is_right_between_nodes(package: Path, tmp_path: Path) -> None:
    """Four ranks on two hosts by name, and what they are told of mistakes and of ranks that do not come."""
    job = [BIN / "python", HERE / "comm_hosts_job.py", "127.0.0.1", "mismatch"]
    done = mpiexec(package, tmp_path, 4, *on_two_nodes("$PMI_RANK -lt 2"), *job)
    skip_where_refused(done)
    assert done.returncode == 0, done.text[-4000:]
    assert "hosts nodea nodeb" in done.stdout


def test_a_study_runs(package: Path, tmp_path: Path) -> None:
    """Preprocessing with dask-mpi, DDP and FSDP over both comms, and the clocks, by MPICH; it says which MPI it was."""
    flags = ["--size", "32", "--epochs", "2", "--ranks", "1,2", "--global-batch", "8", "--backends", "serial,ddp,fsdp"]
    command = [BIN / "python", "-m", "pneumo.launch", *small_data(tmp_path), *flags]
    done = mpiexec(package, tmp_path, 2, *command)
    assert done.returncode == 0, done.text[-4000:]
    folder = tmp_path / "out" / "main" / "latest"
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    runs = {(row["backend"], row["comm"], row["ranks"]) for row in rows}
    assert runs >= {(backend, comm, 2) for backend in ("ddp", "fsdp") for comm in ("gloo", "pneumo")}
    serial = next(row for row in rows if row["backend"] == "serial")
    assert all(abs(row["metrics"]["auc"] - serial["metrics"]["auc"]) < 0.01 for row in rows)
    assert "MPICH" in json.loads((folder / "run.json").read_text())["provenance"]["mpi"]

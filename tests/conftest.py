"""Fixtures of all tests: `mpirun`, and a guard that fails a test which leaks its environment, threads or folder."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import BIN, Launcher

# Set for the whole process by libraries when they are imported, or by pneumo.process.stay_offline before that.
IMPORTS_SET = (
    "PYTEST_",
    "KMP_",
    "TORCHINDUCTOR_",
    "CUDA_MODULE_LOADING",
    "NO_ALBUMENTATIONS_UPDATE",
    "YOLO_OFFLINE",
    "DO_NOT_TRACK",
    "OPENCV_",
    "GDCM_",  # and the next: set by gdcm's Python package for its own libraries
    "LD_LIBRARY_PATH",
)
# Threads that dask's and pytest-timeout's own machinery keeps for the life of the process.
MACHINERY = ("Profile", "IO loop", "Dask-", "TCP-Executor", "asyncio_", "pytest_timeout")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line("markers", "mpi: starts ranks under the real mpirun")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.fixture
def mpirun(tmp_path: Path) -> Launcher:
    """Start a snippet, a file or a module on n ranks; see harness.Launcher."""
    if shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}") is None:
        pytest.skip("no mpirun in this environment or on PATH")
    return Launcher(tmp_path)


def environment() -> dict[str, str]:
    """This process's environment without what imports set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(IMPORTS_SET)}


def own_threads() -> set[threading.Thread]:
    """The Python threads that are alive, without those of the machinery."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith(MACHINERY)}


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Fail a test that leaves behind a changed environment, folder or CPU mask, a thread, or a process group."""
    variables, folder, threads, mask = environment(), Path.cwd(), own_threads(), os.sched_getaffinity(0)
    yield
    leaks = []
    now = environment()
    changed = sorted(n for n in variables.keys() | now.keys() if variables.get(n) != now.get(n))
    if changed:
        leaks.append(f"the environment: {', '.join(changed)}")
        for name in changed:
            if name in variables:
                os.environ[name] = variables[name]
            else:
                del os.environ[name]
    if Path.cwd() != folder:
        leaks.append(f"the working folder: {Path.cwd()}")
        os.chdir(folder)
    if os.sched_getaffinity(0) != mask:
        leaks.append(f"the CPU mask: {os.sched_getaffinity(0)}")
        os.sched_setaffinity(0, mask)
    deadline = time.monotonic() + 2
    while (alive := own_threads() - threads) and time.monotonic() < deadline:
        time.sleep(0.02)
    if alive:
        leaks.append(f"threads: {', '.join(thread.name for thread in alive)}")
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        leaks.append("a process group")
        distributed.destroy_process_group()
    if leaks:
        pytest.fail(f"the test leaked {'; '.join(leaks)}", pytrace=False)

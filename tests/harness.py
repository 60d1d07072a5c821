"""Run jobs under the real mpirun in tests: a hard time limit that shows every rank's stack, and no process left behind.

A job is known by an environment variable of its own, which all its processes inherit. Process groups would not do: Open
MPI gives every rank a group of its own, so that killing mpirun's group leaves the ranks behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

MARK = "PNEUMO_TEST_JOB"
BIN = Path(sys.executable).parent
# What `activate` sets for users; tests set it themselves, whatever the shell had that pytest was started from.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
NOT_INHERITED = ("OMPI_", "PRTE_", "PMIX_", "PMI_", "SLURM_", "MALLOC_", "HOROVOD_", "OMP_", "PYTEST_", MARK)
SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended; the outputs are those of all its ranks, in no order."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def text(self) -> str:
        """Both outputs."""
        return self.stdout + self.stderr


@dataclass(frozen=True, slots=True)
class Launcher:
    """What the fixture `mpirun` is: call it with a number of ranks, and a snippet, a file or a module.

    `ranks=None` starts one process without mpirun. The job has `timeout` seconds, after which the stacks of its ranks
    are printed, its processes ended, and the test fails. With `check`, any exit code but 0 fails the test.
    """

    folder: Path

    def __call__(
        self,
        ranks: int | None,
        snippet: str | None = None,
        *,
        file: str | Path | None = None,
        module: str | None = None,
        args: Sequence[str | Path] = (),
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        check: bool = True,
        options: Sequence[str] = (),
    ) -> Result:
        if (snippet is not None) + (file is not None) + (module is not None) != 1:
            raise ValueError("give a snippet, a file or a module")
        if snippet is not None:
            file = self.folder / f"snippet_{uuid.uuid4().hex[:8]}.py"
            file.write_text(snippet)
        what = ["-m", module] if module is not None else [str(file)]
        start = [] if ranks is None else ["mpirun", "-n", str(ranks), *options]
        command = [*start, sys.executable, *what, *map(str, args)]
        result = run(command, timeout=timeout, env=env, cwd=cwd or self.folder, folder=self.folder)
        if check and result.returncode:
            shown = f"--- stdout\n{result.stdout[-4000:]}\n--- stderr\n{result.stderr[-8000:]}"
            pytest.fail(f"exit {result.returncode} of {' '.join(command)}\n{shown}", pytrace=False)
        return result


def environment(job: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of a job: this one's without what would steer MPI or malloc, and the job's mark."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    return {**env, **SETTINGS, **(extra or {}), MARK: job}


def run(
    command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None, cwd: str | Path, folder: Path
) -> Result:
    """Run a command in a session of its own, with its outputs in files, which no process left over can hold open."""
    job = uuid.uuid4().hex
    before = shared_names()
    begin = time.monotonic()
    out, err = folder / f"{job}.out", folder / f"{job}.err"
    late = False
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment(job, env),
            cwd=cwd,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
            print(stacks(job), flush=True)
        finally:
            seconds = time.monotonic() - begin
            left = [] if late or sys.exc_info()[0] else remaining(job, patience=5)
            end(job)
            process.wait()
    result = Result(process.returncode, read(out), read(err), seconds)
    if late:
        shown = f"--- stdout\n{result.stdout[-4000:]}\n--- stderr\n{result.stderr[-8000:]}"
        pytest.fail(f"not done in {timeout:g} s: {' '.join(command)}\n{shown}", pytrace=False)
    if left:
        pytest.fail("left behind: " + "; ".join(f"{pid} {line}" for pid, line in left), pytrace=False)
    for name in sorted(shared_names() - before - in_use()):
        warnings.warn(f"left in {SHARED}: {name}", stacklevel=2)
    return result


def read(path: Path) -> str:
    """The text of a file, whatever bytes are in it."""
    return path.read_text(errors="replace")


def processes(job: str) -> Iterator[tuple[int, str]]:
    """(process id, command line) of every process of a job that is alive."""
    mark = f"{MARK}={job}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield int(folder.name), line.strip()


def remaining(job: str, patience: float) -> list[tuple[int, str]]:
    """The processes of a job that do not end by themselves within `patience` seconds."""
    deadline = time.monotonic() + patience
    while left := list(processes(job)):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def end(job: str) -> None:
    """End exactly the processes of a job: SIGTERM, and SIGKILL for those that are there after 2 s."""
    for number, patience in ((signal.SIGTERM, 2), (signal.SIGKILL, 10)):
        for pid, _ in processes(job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not remaining(job, patience):
            return


def stacks(job: str) -> str:
    """The stack of every Python process of a job, as py-spy sees it from outside."""
    parts = []
    for pid, line in sorted(processes(job)):
        if "python" not in line.split(" ")[0]:
            continue
        command = [str(BIN / "py-spy"), "dump", "--pid", str(pid)]
        try:
            spied = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            text = spied.stdout or spied.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            text = f"no stack: {error}\n"
        parts.append(f"=== rank {rank(pid)}, process {pid}: {line}\n{text}")
    return "\n".join(parts) or "=== no Python process of the job is alive"


def rank(pid: int) -> str:
    """The rank that Open MPI gave to a process, or "?"."""
    with contextlib.suppress(OSError):
        for setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"OMPI_COMM_WORLD_RANK="):
                return setting.split(b"=")[1].decode()
    return "?"


def shared_names() -> set[str]:
    """The names in /dev/shm that are this user's."""
    names = set()
    for path in SHARED.iterdir() if SHARED.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                names.add(path.name)
    return names


def in_use() -> set[str]:
    """The names in /dev/shm that a living process has mapped: another job's, which may be here at the same time."""
    names = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                if f"{SHARED}/" in line:
                    names.add(line.split(f"{SHARED}/", 1)[1].split("/")[0])
    return names

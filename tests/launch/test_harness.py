"""The fixture `mpirun` itself: it ends what hangs, shows where, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from harness import Launcher

HANG = """
import sys, time
from mpi4py import MPI
def hang_here():
    if MPI.COMM_WORLD.rank == 1:
        time.sleep(600)
    MPI.COMM_WORLD.Barrier()
print("up", MPI.COMM_WORLD.rank, flush=True)
hang_here()
"""


def alive_by_mark() -> list[str]:
    """The command lines of all processes that belong to some test's job, found without the harness's own search."""
    found = subprocess.run(
        ["grep", "-lsa", f"{harness.MARK}=", *map(str, Path("/proc").glob("[0-9]*/environ"))],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    return [Path(name).with_name("cmdline").read_text().replace("\0", " ") for name in found if Path(name).exists()]


def test_ranks_see_one_world(mpirun: Launcher) -> None:
    """Each of three ranks is in one world of three."""
    result = mpirun(3, "from mpi4py import MPI; w = MPI.COMM_WORLD; print(f'{w.rank} of {w.size}')")
    assert sorted(result.stdout.split("\n")) == ["", "0 of 3", "1 of 3", "2 of 3"]


def test_a_hanging_job_is_ended_with_the_stacks_of_its_ranks(
    mpirun: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    """A barrier that one rank never enters: the test fails, names both ranks' places, and no process stays."""
    with pytest.raises(pytest.fail.Exception, match="not done in 6 s"):
        mpirun(2, HANG, timeout=6)
    shown = capsys.readouterr().out
    assert shown.count("hang_here") == 2
    assert {"=== rank 0", "=== rank 1"} <= {line.split(",")[0] for line in shown.splitlines() if line.startswith("===")}
    assert not [line for line in alive_by_mark() if "snippet_" in line and str(mpirun.folder) in line]


def test_a_process_that_outlives_its_job_fails_the_test_and_is_ended(mpirun: Launcher) -> None:
    """A daemon in a session of its own, which no process group of the job holds."""
    daemon = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # left'], "
    daemon += "start_new_session=True, stdin=-3, stdout=-3, stderr=-3)"
    with pytest.raises(pytest.fail.Exception, match=r"left behind: \d+ .*# left"):
        mpirun(None, daemon)
    assert not [line for line in alive_by_mark() if "# left" in line]


def test_an_exit_code_fails_the_test_unless_it_is_expected(mpirun: Launcher) -> None:
    """`check` decides whether a code other than 0 is a failure; the outputs are kept apart."""
    snippet = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    result = mpirun(None, snippet, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")
    with pytest.raises(pytest.fail.Exception, match="exit 3"):
        mpirun(None, snippet)


def test_what_would_steer_mpi_does_not_reach_a_job(mpirun: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the shell that pytest runs in are left out, those that `activate` sets are there."""
    monkeypatch.setenv("OMPI_MCA_pml", "nonsense")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    result = mpirun(None, "import os; print(*(n for n in sorted(os.environ) if n.startswith(('OMPI', 'MALLOC'))))")
    assert result.stdout.split() == ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]


LEAKS = {
    "environment": "os.environ['PNEUMO_LEAK'] = '1'",
    "folder": "os.chdir('/')",
    "thread": "threading.Thread(target=time.sleep, args=(30,), name='leak', daemon=True).start()",
    "mask": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "nothing": "pass",
}


@pytest.mark.parametrize("leak", LEAKS)
def test_the_guard_fails_tests_that_leak(leak: str, tmp_path: Path) -> None:
    """A test file of one leaking test, run by a pytest of its own with this project's guard."""
    if leak == "mask" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("one core: its mask cannot be narrowed")
    tests = Path(harness.__file__).parent
    for name in ("conftest.py", "harness.py"):
        (tmp_path / name).symlink_to(tests / name)
    body = f"import os, threading, time\n\ndef test_leak():\n    {LEAKS[leak]}\n"
    (tmp_path / "test_leaking.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == (0 if leak == "nothing" else 1), done.stdout
    assert ("the test leaked" in done.stdout) == (leak != "nothing")

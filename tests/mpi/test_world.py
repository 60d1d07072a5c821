"""One MPI world: errors are said once and end the job, idle ranks sleep, a mixed-up launcher is explained."""

from pathlib import Path

import pytest
from harness import Launcher

START = "from pneumo.world import World\nimport os, sys, time\n"


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ranks_know_each_other(mpirun: Launcher, tmp_path: Path, n: int) -> None:
    code = START + (
        "with World.start() as w:\n"
        "    sub = w.first(2)\n"
        "    total = sub.allreduce(w.rank + 1) if sub else None\n"
        "    seen = w.comm.gather((w.rank, w.size, w.local_size, total))\n"
        "    if w.rank == 0: print('SEEN', seen, w.one_node, len(w.cores) > 0)\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    done = mpirun(n, file=script, timeout=60)
    assert done.returncode == 0, done.text
    total = {1: 1}.get(n, 3)
    expected = [(rank, n, n, total if rank < 2 else None) for rank in range(n)]
    assert f"SEEN {expected} True True" in done.stdout


@pytest.mark.parametrize(("failing", "n"), [("w.rank == 1", 2), ("True", 4)])
def test_an_exception_ends_the_job_with_one_message(mpirun: Launcher, tmp_path: Path, failing: str, n: int) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        START + f"with World.start() as w:\n    if {failing}: raise ValueError('the reason')\n    time.sleep(60)\n"
    )
    done = mpirun(n, file=script, timeout=60, check=False)
    assert done.returncode == 1
    assert done.seconds < 30
    said = [line for line in done.text.splitlines() if "failed: ValueError: the reason" in line]
    assert len(said) == 1, done.text


def test_waiting_ranks_sleep(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        START + "with World.start() as w:\n"
        "    w.wait()\n"
        "    begin = time.process_time()\n"
        "    if w.rank == 0: time.sleep(3)\n"
        "    w.wait()\n"
        "    used = w.comm.gather((time.process_time() - begin) / 3)\n"
        "    if w.rank == 0: print('USED', max(used[1:]))\n"
    )
    done = mpirun(4, file=script, timeout=60)
    assert done.returncode == 0, done.text
    share = float(done.stdout.split("USED ")[1].split()[0])
    assert share < 0.02, f"an idle rank used {share:.1%} of a core"


def test_a_foreign_launcher_is_explained(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(START + "with World.start() as w: print('never')\n")
    done = mpirun(None, file=script, timeout=60, check=False, env={"PMI_SIZE": "4", "PMI_RANK": "0"})
    assert done.returncode == 2, done.text
    assert "started 4 ranks, but each sees a world of one" in done.text
    assert "never" not in done.stdout


@pytest.mark.parametrize("n", [None, 2])
def test_mpi_listens_on_loopback_only_on_one_node(mpirun: Launcher, tmp_path: Path, n: int | None) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from pneumo import machine\n" + START + "with World.start() as w:\n"
        "    w.wait()\n"
        "    open_to_all = [a for a in machine.listening() if not machine.is_loopback(a)]\n"
        "    found = w.comm.gather(open_to_all)\n"
        "    if w.rank == 0: print('OPEN', sum(found, []))\n"
    )
    done = mpirun(n, file=script, timeout=60)
    assert "OPEN []" in done.stdout, done.text

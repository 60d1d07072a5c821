"""One MPI world: errors are said once and end the job, idle ranks sleep, a mixed-up launcher is explained."""

import time
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
    raised = tmp_path / "raised"
    script.write_text(
        START + "with World.start() as w:\n"
        "    w.on_failure = lambda: print('TOLD', w.rank, flush=True)\n"
        "    w.wait()\n"
        f"    if {failing}:\n"
        f"        open({str(raised)!r}, 'w').write(str(time.time()))\n"
        "        raise ValueError('the reason')\n"
        "    time.sleep(60)\n"
    )
    done = mpirun(n, file=script, timeout=60, check=False)
    took = time.time() - float(raised.read_text())
    assert done.returncode == 1
    assert took < 10, f"the job ended {took:.1f} s after the exception"
    said = [line for line in done.text.splitlines() if "failed: ValueError: the reason" in line]
    assert len(said) == 1, done.text
    told = done.stdout.split("TOLD ")[1:]
    assert len(told) == 1, done.text
    assert f"rank {told[0].split()[0]} on" in said[0]


def test_ranks_that_do_not_go_on_are_named(mpirun: Launcher, tmp_path: Path) -> None:
    """Ranks 0 and 1 wait for each other in different places; rank 2 has nothing to do and waits in vain."""
    script = tmp_path / "job.py"
    script.write_text(
        START + "import pneumo.world\n"
        "pneumo.world._COLLECT_S = 3.0\n"
        "with World.start() as w:\n"
        "    w.wait()\n"
        "    w.watchdog.limit_s = 1.0\n"
        "    for step in range(20):\n"
        "        if w.rank < 2: w.watchdog.at('step', step)\n"
        "        time.sleep(0.1)\n"
        "    if w.rank == 0: w.comm.recv(source=1)\n"
        "    if w.rank == 1: w.watchdog.at('a barrier'); w.comm.Barrier()\n"
        "    w.wait()\n"
    )
    done = mpirun(3, file=script, timeout=60, check=False)
    assert done.returncode == 1
    said = [line for line in done.text.splitlines() if "no progress for 1 s" in line]
    assert len(said) == 1, done.text
    assert "rank 0 in step 19; rank 1 in a barrier; 1 other rank(s) of this host" in said[0]


def test_what_all_ranks_refuse_is_told_once_too(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        START + "from pneumo.errors import PneumoError\n"
        "with World.start() as w:\n"
        "    w.on_failure = lambda: print('TOLD', w.rank, flush=True)\n"
        "    code = w.refuse(PneumoError('the reason'))\n"
        "sys.exit(code)\n"
    )
    done = mpirun(2, file=script, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout.count("TOLD 0") == 1
    assert done.stdout.count("TOLD") == 1


# What each rank does to be alone: it forgets Open MPI's launcher, but not what the launcher has said of the ranks.
ALONE = (
    "import os, sys, time\n"
    "for name in [name for name in os.environ if name.startswith(('PMIX_', 'PRTE_'))]: del os.environ[name]\n"
)


def test_worlds_of_one_are_explained_though_the_speaking_rank_is_late(mpirun: Launcher, tmp_path: Path) -> None:
    """A launcher kills the other ranks when one leaves with an error: none may before the sentence is out."""
    script = tmp_path / "job.py"
    script.write_text(
        ALONE + "time.sleep(1.5 * (os.environ['OMPI_COMM_WORLD_RANK'] == '0'))\n"
        "os.environ['OMPI_MCA_btl'] = 'self'\n" + START + "with World.start() as w: print('never')\n"
    )
    done = mpirun(2, file=script, timeout=60, check=False)
    assert done.returncode == 2, done.text
    assert done.text.count("started 2 ranks, but each sees a world of one") == 1, done.text
    assert "never" not in done.stdout


def test_too_low_a_thread_level_is_refused_once(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import mpi4py\n"
        "mpi4py.rc.initialize = mpi4py.rc.finalize = False\n"
        "from mpi4py import MPI\n"
        "MPI.Query_thread = lambda: MPI.THREAD_SERIALIZED\n" + START + "with World.start() as w: print('never')\n"
    )
    done = mpirun(2, file=script, timeout=60, check=False)
    assert done.returncode == 2, done.text
    assert [line for line in done.stderr.splitlines() if line.startswith("pneumo: ")] == [
        "pneumo: The MPI library does not offer MPI_THREAD_MULTIPLE, which Horovod's thread needs; use one that does."
    ]
    assert "Traceback" not in done.text
    assert "never" not in done.stdout


def test_an_mpi_that_cannot_be_loaded_is_refused_once(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(START + "with World.start() as w: print('never')\n")
    done = mpirun(2, file=script, timeout=60, check=False, env={"MPI4PY_LIBMPI": "/nowhere"})
    assert done.returncode == 2, done.text
    assert done.stderr.count("pneumo: MPI cannot be loaded") == 1
    assert "Traceback" not in done.text


def test_a_quota_bounds_the_cores_of_the_node(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from pneumo import machine\n"
        "machine.limits = lambda: machine.Limits(2, 0.7, None)\n" + START + "with World.start() as w:\n"
        "    found = w.comm.gather((len(w.cores), w.total_cores, len(w.cores_for(2, 1)), w.binding(2, 1)))\n"
        "    if w.rank == 0: print('FOUND', found)\n"
    )
    done = mpirun(2, file=script, timeout=60)
    assert f"FOUND {[(1, 1, 1, 'the one core')] * 2}" in done.stdout


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


# Another MPI's launcher, and the transport without which Open MPI would leave shared memory behind.
FOREIGN = {"PMI_SIZE": "4", "PMI_RANK": "0", "OMPI_MCA_btl": "self"}


def test_a_foreign_launcher_is_explained(mpirun: Launcher, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(START + "with World.start() as w: print('never')\n")
    done = mpirun(None, file=script, timeout=60, check=False, env=FOREIGN)
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

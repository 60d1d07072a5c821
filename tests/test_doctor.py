"""python -m pneumo.doctor, alone and under the real mpirun, and against installations that are wrong on purpose."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from harness import Launcher

from pneumo import checks, doctor, installed, machine
from pneumo.study.schema import Clock, ClockHost, ClockSample


def states(path: Path) -> dict[str, str]:
    """{name: state} of the list in a JSON report."""
    return {check["name"]: check["state"] for check in json.loads(path.read_text())["checks"]}


def test_two_ranks_are_one_world_and_rank_0_speaks(mpirun: Launcher, tmp_path: Path) -> None:
    """Exit 0, the list once, and both ranks' masks as the kernel gives them."""
    result = mpirun(2, module="pneumo.doctor", args=["--json", tmp_path / "d.json"])
    assert result.stdout.count("MPI library") == 1
    assert "2 seen, 2 asked for" in result.stdout
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["able"] is True
    assert [(rank["rank"], rank["affinity"]) for rank in report["ranks"]] == [
        (number, sorted(os.sched_getaffinity(0))) for number in (0, 1)
    ]
    assert "bad" not in states(tmp_path / "d.json").values()
    assert report["clock"]["hosts"][0]["ranks"] == [0, 1]
    assert (
        "one host share one clock (error below 1 us; round trips, a rougher check, exclude more than" in result.stdout
    )


def test_clocks_that_are_known_roughly_are_a_warning() -> None:
    """Beyond a millisecond; one that could not be measured too, and where nobody tried there is nothing to say."""
    hosts = [ClockHost(name="a", ranks=[0]), ClockHost(name="b", ranks=[1])]
    for bound_ns, state in ((20_000, "ok"), (3_000_000, "warn")):
        sample = ClockSample(rank=1, at_ns=5 * 10**9, offset_ns=-(10**9), bound_ns=bound_ns)
        check = checks.check_clock(Clock(resolution_ns=1, source=None, hosts=hosts, samples=[sample]))
        assert check.state == state
        assert "b is 1.000000 s behind" in check.text
    assert checks.check_clock("Rank 1 does not answer.").state == "warn"
    assert checks.check_clock(None).state == "ok"


def test_mpi_is_started_and_ended_by_the_world_alone(mpirun: Launcher) -> None:
    """mpi4py is told to do neither, and MPI has ended when the doctor returns."""
    code = (
        "import mpi4py\n"
        "from pneumo.doctor import command\n"
        "command()\n"
        "from mpi4py import MPI\n"
        "print('ENDED', mpi4py.rc.initialize, mpi4py.rc.finalize, MPI.Is_finalized())\n"
    )
    assert mpirun(2, code).stdout.count("ENDED False False True") == 2


def test_an_mpi_that_cannot_be_loaded_is_a_fault(mpirun: Launcher) -> None:
    """mpi4py's own variable names a library that is not there: exit 1, the list once, no traceback."""
    result = mpirun(2, module="pneumo.doctor", env={"MPI4PY_LIBMPI": "/nowhere"}, check=False)
    assert result.returncode == 1
    assert result.stdout.count("MPI cannot be loaded (cannot load MPI library") == 1
    assert "Traceback" not in result.text


def test_the_cache_is_looked_for_where_the_user_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By XDG_CACHE_HOME, as the main job does."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setattr(machine, "free_bytes", lambda path: 8 << 30 if str(path) == "/elsewhere" else 9 << 30)
    found = {check.name: check.text for check in checks.check_places([])}
    assert found["free disk"] == "9.0 GiB here, 8.0 GiB in the cache"


def test_without_mpirun_it_works_too(mpirun: Launcher) -> None:
    """One process, exit 0."""
    assert "started without mpirun" in mpirun(None, module="pneumo.doctor").stdout


def test_ranks_that_are_alone_are_told_why(mpirun: Launcher) -> None:
    """As under the mpirun of another MPI: a launcher's environment, and a library that knows nothing of it."""
    for rank, lines in (("0", 1), ("1", 0)):
        env = {"PMI_SIZE": "2", "PMI_RANK": rank, "OMPI_MCA_btl": "self"}
        result = mpirun(None, module="pneumo.doctor", env=env, check=False)
        assert result.returncode == (1 if rank == "0" else 0)
        assert result.stdout.count("every rank is alone; start with that library's own mpirun.") == lines


@pytest.mark.parametrize("args", [["--jsn", "x"], ["--json", "/nowhere/x.json"]])
def test_arguments_are_refused_once(mpirun: Launcher, args: list[str]) -> None:
    """Exit 2 and a sentence that names what was wrong, from one of two ranks."""
    result = mpirun(2, module="pneumo.doctor", args=args, check=False)
    assert result.returncode == 2
    assert [args[0] in line for line in result.stderr.splitlines() if line.startswith("pneumo:")] == [True]
    assert "Traceback" not in result.text


def test_a_refusal_is_heard_though_the_speaking_rank_is_late(mpirun: Launcher) -> None:
    """A launcher kills the other ranks when one leaves with an error: none may before the sentence is out."""
    late = (
        "import os, sys, time\n"
        "time.sleep(2 * (os.environ['OMPI_COMM_WORLD_RANK'] == '0'))\n"
        "sys.argv = ['doctor', '--jsn', 'x']\n"
        "from pneumo.doctor import main\n"
        "sys.exit(main())\n"
    )
    result = mpirun(2, late, check=False)
    assert result.returncode == 2
    assert sum(line.startswith("pneumo:") and "--jsn" in line for line in result.stderr.splitlines()) == 1, result.text


def test_facts_are_json_fast_and_import_neither_torch_nor_mpi() -> None:
    """In a fresh process; versions are those that pip's metadata name, and no path of this machine is in them."""
    code = "import json, sys; from pneumo.doctor import facts; print(json.dumps([facts(), sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, modules = json.loads(done.stdout)
    assert not {"torch", "mpi4py.MPI", "horovod"} & set(modules)
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["machine"]["affinity"] == sorted(os.sched_getaffinity(0))
    assert str(Path.home()) not in json.dumps(found)
    assert sys.prefix not in json.dumps(found)


def test_what_is_built_into_horovod_is_what_horovod_says(mpirun: Launcher) -> None:
    """Read from its file without loading it, and asked of the loaded library."""
    found = installed.horovod_facts()
    if found is None:
        pytest.skip("Horovod is not installed")
    code = "import horovod.torch as h; print(*(n for n in ('mpi', 'nccl', 'gloo') if getattr(h, n + '_built')()))"
    assert found["built_in"] == mpirun(None, code).stdout.split()
    assert found["torch"].split("+")[0] == metadata.version("torch")


GOOD = checks.Mpi("Open MPI v5.0.11", "", "mpirun (Open MPI) 5.0.11", "/x/mpirun", True, 1, 1)


@pytest.mark.parametrize(
    ("library", "launcher", "state"),
    [
        ("Open MPI v5.0.11", "mpirun (Open MPI) 5.0.11", "ok"),
        ("Open MPI v5.0.11", "mpirun (Open MPI) 4.1.4", "bad"),
        ("Open MPI v5.0.11", "MPICH 5.0.2", "bad"),
        ("MPICH Version:      5.0.2", "MPICH 5.0.2", "ok"),
        ("Open MPI v5.0.11", "", "warn"),
    ],
)
def test_a_launcher_has_to_belong_to_the_library(library: str, launcher: str, state: str) -> None:
    """Names and major versions are compared; without any mpirun there is only a warning."""
    mpi = checks.Mpi(library, "", launcher, "/x/mpirun", True, 1, 1)
    found = {check.name: check for check in checks.check_mpi(mpi)}["mpirun"]
    assert found.state == state
    assert bool(found.advice) == (state != "ok")


def test_too_low_a_thread_level_is_a_fault() -> None:
    """Horovod's thread calls MPI while the main thread does."""
    low = checks.Mpi(GOOD.library, "", GOOD.launcher, "/x", False, 1, 1)
    assert {check.name: check.state for check in checks.check_mpi(low)}["thread level"] == "bad"


def test_horovod_for_another_torch_is_a_warning_that_says_what_to_do() -> None:
    """The main job goes on without it, so it is no fault."""
    for found in (None, {"version": "0.28.1", "torch": "1.0.0+cpu", "built_in": ["mpi"]}):
        check = checks.check_horovod(found)
        assert check.state == "warn"
        assert "./launch/setup.sh" in check.advice


def test_more_ranks_than_cores_are_a_warning() -> None:
    """Eight ranks on one core."""
    here = machine.machine()
    ranks = [checks.Rank(rank, here.host, (0,), ()) for rank in range(8)]
    found = {check.name: check for check in checks.check_machine(here, ranks)}
    assert found["cores"].state == "warn"
    assert "8 ranks share 1 core:" in found["cores"].advice
    assert "ranks 0-7 on 0" in found["binding"].text


def test_the_advice_is_that_of_the_worst_line() -> None:
    """A fault before a warning, wherever it stands; without either, the main job's own line."""
    lines = [checks.Check("a", "warn", "", "first"), checks.Check("b", "bad", "", "second")]
    assert doctor.advise(lines) == "second"
    assert doctor.advise(lines[:1]) == "first"
    assert "mpirun -n 8 python -m pneumo.launch" in doctor.advise([checks.Check("a", "ok", "")])


@pytest.mark.parametrize(("numbers", "text"), [((0, 1, 2, 5), "0-2,5"), ((3,), "3"), ((), ""), ((4, 2), "2,4")])
def test_numbers_are_drawn_together(numbers: tuple[int, ...], text: str) -> None:
    """Runs of consecutive numbers are written as their ends."""
    assert checks.spans(numbers) == text

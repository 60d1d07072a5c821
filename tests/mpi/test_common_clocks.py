"""The clocks of real ranks: one host's are one, and those of two hosts differ by what a time namespace makes them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import BIN, Launcher, Result, run
from small_study import small_data

ROOT = Path(__file__).parents[2]
SHIFT_NS = 1000 * 10**9
SAMPLE = (
    "import json, os, time\n"
    "import msgspec\n"
    "from pneumo.world import World\n"
    "from pneumo.timing import offsets\n"
    "EDIT\n"
    "mask = os.sched_getaffinity(0)\n"
    "with World.start() as w:\n"
    "    found = offsets.Offsets(w.comm)\n"
    "    for _ in range(3):\n"
    "        time.sleep(0.2)\n"
    "        found.sample()\n"
    "    assert os.sched_getaffinity(0) == mask\n"
    "    if w.rank == 0: print('CLOCK ' + json.dumps(msgspec.to_builtins(found.clock())), flush=True)\n"
)
pytestmark = pytest.mark.mpi


def on_two_hosts(folder: Path, shift_s: int, ranks: int, *command: str, timeout: float = 120) -> Result:
    """Run Python with so many ranks on each of two hosts, the second's clock ahead; skips where that is not allowed."""
    if os.geteuid() != 0 or not shutil.which("ip", path="/usr/sbin:/sbin:" + os.environ["PATH"]):
        pytest.skip("network namespaces need root and iproute2")
    script = ["launch/two_hosts.sh", "--rate", "0", "--ranks", str(ranks), "--shift", str(shift_s)]
    done = run([*script, str(BIN / "python"), *command], timeout=timeout, env=None, cwd=ROOT, folder=folder)
    if done.returncode == 2 and "not allowed here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done


def clock_of(done: Result) -> dict[str, Any]:
    """What the ranks found."""
    assert done.returncode == 0, done.text[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.split("CLOCK ")[1].splitlines()[0])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_of_one_host_share_one_clock(mpirun: Launcher, ranks: int) -> None:
    """By construction; round trips agree within a microsecond where two cores can be had, 10 of them elsewhere."""
    clock = clock_of(mpirun(ranks, SAMPLE.replace("EDIT", "")))
    assert [host["ranks"] for host in clock["hosts"]] == [list(range(ranks))]
    assert clock["samples"] == []
    check = clock["hosts"][0]["check_ns"]
    assert (check is None) == (ranks == 1)
    assert check is None or check < 20_000
    print(f"{ranks} ranks of one host agree within {check} ns by round trips")


def test_a_clock_that_round_trips_contradict_is_measured(mpirun: Launcher) -> None:
    """Rank 1 claims to share rank 0's clock, and is 1 ms ahead."""
    edit = (
        "ahead = 10**6 * (os.environ['OMPI_COMM_WORLD_RANK'] == '1')\n"
        "offsets.now = lambda: time.perf_counter_ns() + ahead\n"
    )
    clock = clock_of(mpirun(3, SAMPLE.replace("EDIT", edit)))
    assert [host["ranks"] for host in clock["hosts"]] == [[0, 2], [1]]
    assert len(clock["samples"]) == 4
    for sample in clock["samples"]:
        assert sample["rank"] == 1
        assert abs(sample["offset_ns"] - 10**6) <= sample["bound_ns"] < 10**6


def test_a_rank_that_does_not_answer_ends_the_job_with_a_sentence(mpirun: Launcher) -> None:
    edit = (
        "offsets._LIMIT_S = 1.0\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1': offsets.answer = lambda *_: time.sleep(30)\n"
    )
    done = mpirun(2, SAMPLE.replace("EDIT", edit), check=False, timeout=60)
    assert done.returncode != 0
    assert done.text.count("Rank 1 on the other side of a clock measurement did not answer for 1 s") == 1
    assert done.seconds < 25


@pytest.mark.parametrize(("shift_s", "ranks"), [(0, 1), (1000, 2)])
def test_the_offset_of_a_host_is_that_of_its_time_namespace(tmp_path: Path, shift_s: int, ranks: int) -> None:
    """Known exactly: so much within the bound. Two network namespaces alone are hosts with one clock."""
    job = tmp_path / "job.py"
    job.write_text(SAMPLE.replace("EDIT", ""))
    clock = clock_of(on_two_hosts(tmp_path, shift_s, ranks, str(job)))
    if shift_s == 0:
        assert [host["ranks"] for host in clock["hosts"]] == [[0, 1]]
        assert clock["samples"] == []
        return
    assert [(host["name"], host["ranks"]) for host in clock["hosts"]] == [("hosta", [0, 1]), ("hostb", [2, 3])]
    assert [sample["rank"] for sample in clock["samples"]] == [2] * 4
    for sample in clock["samples"]:
        assert abs(sample["offset_ns"] - SHIFT_NS) <= sample["bound_ns"] < 10**6
    print("two hosts: bounds", [sample["bound_ns"] for sample in clock["samples"]])


def test_the_doctor_tells_the_clock_error_between_hosts(tmp_path: Path) -> None:
    done = on_two_hosts(tmp_path, 1000, 1, "-m", "pneumo.doctor", "--json", str(tmp_path / "d.json"))
    assert "hostb is 1000.00" in done.stdout, done.text[-4000:]
    sample = json.loads((tmp_path / "d.json").read_text())["clock"]["samples"][0]
    assert abs(sample["offset_ns"] - SHIFT_NS) <= sample["bound_ns"]


def test_the_account_of_a_study_on_two_hosts_closes(tmp_path: Path) -> None:
    """With 1000 s between their clocks: unmoved, each peer wait would be that long."""
    flags = ["--size", "32", "--epochs", "3", "--ranks", "1,2", "--global-batch", "8", "--threads", "1"]
    study = ["--backends", "serial,ddp", "--comm", "gloo,pneumo", *map(str, small_data(tmp_path))]
    done = on_two_hosts(tmp_path, 1000, 1, "-m", "pneumo.launch", *flags, *study, timeout=250)
    assert done.returncode == 0, done.text[-4000:]
    latest = tmp_path / "out" / "main" / "latest"
    clock = json.loads((latest / "run.json").read_text())["clock"]
    assert [host["ranks"] for host in clock["hosts"]] == [[0], [1]]
    samples = clock["samples"]
    assert len(samples) >= 1 + 3 * (1 + 6 + 1), "before, after each run's warm-up, blocks and evaluation"
    assert all(abs(s["offset_ns"] - SHIFT_NS) <= s["bound_ns"] for s in samples)
    rows = [row for row in json.loads((latest / "summary.json").read_text())["rows"] if row["ranks"] == 2]
    assert {row["comm"] for row in rows} >= {"gloo"}
    for row in rows:
        terms = row["loss"]
        assert sum(terms.values()) + row["residual_rank_s"] == pytest.approx(row["lost_rank_s"], abs=1e-9)
        for term in ("peer_wait", "queue", "transfer"):
            assert 0 <= terms[term] < 2 * row["total_s"] < 100
        assert abs(row["residual_fraction"]) < 0.1
    text = " ".join(done.stdout.split())
    assert text.count("clock 2 hosts, offsets within ") >= 4

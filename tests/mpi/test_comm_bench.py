"""The benchmark of collectives under the real mpirun: every operation, what is left out, refusals, and wrong sums."""

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Launcher

OPS = {"allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall", "barrier"}
IN_PLACE = {"allreduce", "broadcast", "reduce", "barrier"}
BRIEF = ["--repeats", "3", "--seconds", "0.5"]


def run(mpirun: Launcher, ranks: int, out: Path, *flags: str) -> dict[str, Any]:
    """The JSON file of a short run."""
    done = mpirun(ranks, module="pneumo.comm.bench", args=[*flags, *BRIEF, "--json", out], timeout=280)
    assert "us a call" in done.stdout, done.text
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_operation_has_rows_of_every_library(mpirun: Launcher, tmp_path: Path, ranks: int) -> None:
    found = run(mpirun, ranks, tmp_path / "bench.json", "--op", "all", "--bytes", "4,1K")
    assert found["ranks"] == ranks
    assert found["cores"] >= 1
    assert {row["op"] for row in found["rows"]} == OPS
    gone = {(entry["library"], entry["op"] or op) for entry in found["absent"] for op in OPS}
    for op in OPS:
        mine = [row for row in found["rows"] if row["op"] == op]
        names = {row["library"] for row in mine}
        assert {"gloo", "mpi", "mpi_plain"} <= names
        for name in {"pneumo", "horovod", "memcpy"} - names:
            assert (name, op) in gone, f"no row of {name} for {op}, and no reason"
        sizes = {row["bytes"] for row in mine}
        assert sizes == ({0} if op == "barrier" else sizes)
        assert all(size % (1 if op in IN_PLACE else 4 * ranks) == 0 for size in sizes)
        assert len(mine) == len(names) * len(sizes)
    for row in found["rows"]:
        assert row["dtype"] == "float32"
        assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
        assert len(row["samples_us"]) == 3
        assert row["calls"] >= 20
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_types_that_mpi_lacks_are_left_out_with_a_reason(mpirun: Launcher, tmp_path: Path) -> None:
    flags = ["--op", "allreduce,broadcast", "--dtype", "bfloat16,int64", "--bytes", "1K"]
    found = run(mpirun, 2, tmp_path / "bench.json", *flags, "--libraries", "gloo,mpi,memcpy")
    rows = {(row["op"], row["dtype"], row["library"]) for row in found["rows"]}
    both = {(op, dtype) for op in ("allreduce", "broadcast") for dtype in ("bfloat16", "int64")}
    expected = {(*pair, name) for pair in both for name in ("gloo", "mpi", "memcpy")}
    assert rows == expected - {("allreduce", "bfloat16", "mpi")}
    gone = {(entry["library"], entry["op"], entry["dtype"]): entry["why"] for entry in found["absent"]}
    assert "bfloat16" in gone["mpi", "allreduce", "bfloat16"]


def test_buffers_in_the_groups_memory(mpirun: Launcher, tmp_path: Path) -> None:
    """Every library's results are right on them too: each is checked before it is timed."""
    flags = ["--shared", "--op", "allreduce,reduce_scatter,allgather", "--bytes", "4,300K"]
    found = run(mpirun, 2, tmp_path / "bench.json", *flags, "--libraries", "pneumo,gloo,mpi")
    assert found["shared"] is True
    assert len(found["rows"]) == 3 * 2 * 3


def test_more_buffers_than_the_groups_memory_holds(mpirun: Launcher) -> None:
    flags = ["--shared", "--bytes", "16M", "--libraries", "pneumo", *BRIEF]
    done = mpirun(2, module="pneumo.comm.bench", args=flags, env={"PNEUMO_COMM_BYTES": "64M"}, check=False)
    assert done.returncode == 1
    assert done.stderr.count("PNEUMO_COMM_BYTES allows") == 1, done.text


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (2, ["--op", "alreduce"], "allreduce"),
        (2, ["--json", "/nowhere/x.json"], "/nowhere/x.json"),
        (1, [], "2 ranks or more"),
        (None, [], "2 ranks or more"),
    ],
)
def test_refusals_are_said_once(mpirun: Launcher, ranks: int | None, flags: list[str], words: str) -> None:
    done = mpirun(ranks, module="pneumo.comm.bench", args=flags, timeout=60, check=False)
    assert done.returncode == 2, done.text
    said = [line for line in done.text.splitlines() if line.startswith("pneumo: ")]
    assert len(said) == 1, done.text
    assert words in said[0]
    assert "Traceback" not in done.text


WRONG = """
import sys
from pneumo.comm.bench import __main__, libraries

right = libraries.Mpi.call

def call(self, op, dtype, slot):
    summed = right(self, op, dtype, slot)
    def wrong():
        summed()
        if self._comm.rank == 1:
            slot.output[-1] += 1
    return wrong

libraries.Mpi.call = call
sys.exit(__main__.main("--bytes 1K --libraries gloo,mpi --repeats 3 --json out.json".split()))
"""


def test_a_wrong_sum_ends_the_run(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(2, WRONG, timeout=120, check=False)
    assert done.returncode == 1, done.text
    said = [line for line in done.text.splitlines() if line.startswith("pneumo: ")]
    assert len(said) == 1, done.text
    assert said[0].startswith("pneumo: mpi: allreduce of 1K bytes of float32 has ")
    assert "element 255 on rank 1" in said[0]
    assert not (tmp_path / "out.json").exists()


LISTENING = """
import sys
from pneumo import machine
from pneumo.comm.bench import __main__, measure

run = measure.Bench.run

def watched(self, *args):
    samples = run(self, *args)
    outside = [where for where in machine.listening() if not machine.is_loopback(where)]
    found = self._comm.gather(outside)
    if found is not None:
        print("OUTSIDE", sum(found, []), flush=True)
    return samples

measure.Bench.run = watched
sys.exit(__main__.main("--bytes 1K --repeats 3 --seconds 0.5".split()))
"""


def test_nothing_listens_outside_of_the_node(mpirun: Launcher) -> None:
    assert "OUTSIDE []" in mpirun(2, LISTENING, timeout=120).stdout

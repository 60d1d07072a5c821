"""Dumps in the form of torch's flight recorder: torch's own analyser reads them, and names what is wrong with a run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated
from simulated import SERIAL, Network
from synthetic import entry

from pneumo import trace as command
from pneumo.errors import Refused
from pneumo.study.flight_recorder import write_flight_recorder

RANKS, STEPS, BUCKETS = 4, 8, 2  # of `result`: 16 collectives
Edit = Callable[[simulated.Rows], simulated.Rows]


def result(out: Path, edit: Edit = lambda records: records, *, comm: str = "gloo", **shape: Any) -> Path:
    """A result of a serial run, which has no collectives, and a simulated one."""
    runs = [SERIAL, ("ddp", comm, RANKS, 1)]
    rows, records = simulated.train(entry(1, *runs[1]), simulated.even(RANKS), **shape)
    serial = simulated.serial_rows(entry(0, *runs[0]), {}), []
    return simulated.write(out, [serial, (rows, edit(records))], runs)


def dumped(path: Path, **options: Any) -> Path:
    """The folder of the dumps of a result's one parallel run."""
    (found,) = write_flight_recorder(path, path / "dumps", **options)
    assert sorted(file.name for file in found.folder.iterdir()) == [f"rank_{r}" for r in range(RANKS)]
    return found.folder


def torchfrtrace(folder: Path) -> str:
    """What torch's analyser says; its table of collectives is among it, with `pass_check` for each of them."""
    tool = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", "-v", str(folder)]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def sound(said: str) -> int:
    """How many collectives the analyser has found on all their ranks, and nothing wrong with any."""
    assert "pass_check=False" not in said
    assert "missing ranks" not in said
    assert "errors" not in said.lower()
    return said.count("pass_check=True")


def without(rank: int, *numbers: int) -> Edit:
    """Records in which a rank lacks some collectives."""
    return lambda records: [row for row in records if row["rank"] != rank or row["seq"] not in numbers]


@pytest.mark.parametrize("comm", ["gloo", "pneumo"])
def test_torchs_analyser_finds_that_all_ranks_of_a_healthy_run_agree(tmp_path: Path, comm: str) -> None:
    said = torchfrtrace(dumped(result(tmp_path, comm=comm)))
    assert sound(said) == STEPS * BUCKETS
    assert f"pg_desc='4 ranks:{comm}'" in said
    assert "expected_ranks={0, 1, 2, 3}" in said
    assert f"input_sizes=[[{(1 << 20) // 4}]]" in said


def test_it_names_the_rank_that_lacks_the_last_collective(tmp_path: Path) -> None:
    last = STEPS * BUCKETS - 1
    said = torchfrtrace(dumped(result(tmp_path, without(2, last))))
    assert f"Not all ranks joining collective, sequence number: {last}" in said
    assert "missing ranks: {2}" in said
    assert f"step {STEPS - 1} of block 2 at seq:{last}" in said
    assert said.count("Not all ranks joining") == 1


def test_it_names_the_rank_that_lacks_the_first_collective(tmp_path: Path) -> None:
    said = torchfrtrace(dumped(result(tmp_path, without(1, 0))))
    assert "Not all ranks joining collective, sequence number: 0\n" in said
    assert "missing ranks: {1}" in said


def test_it_names_a_rank_that_left_no_record_at_all(tmp_path: Path) -> None:
    said = torchfrtrace(dumped(result(tmp_path, without(3, *range(STEPS * BUCKETS)))))
    assert "Not all ranks joining collective, sequence number: 0\n" in said
    assert "missing ranks: {3}" in said


def test_it_names_a_rank_that_moved_other_bytes_and_one_that_never_ended(tmp_path: Path) -> None:
    def other(records: simulated.Rows) -> simulated.Rows:
        return [row | {"bytes": 4} if (row["rank"], row["seq"]) == (1, 3) else row for row in records]

    said = torchfrtrace(dumped(result(tmp_path / "bytes", other)))
    assert "Collective sequence number: 3 has errors" in said
    assert "Culprit rank 1; Error type: SIZE_OR_SYNTAX_MISMATCH" in said

    def hung(records: simulated.Rows) -> simulated.Rows:
        nothing = dict.fromkeys(("started_ns", "finished_ns", "wait_end_ns"))
        return [row | nothing if (row["rank"], row["seq"]) == (2, 15) else row for row in records]

    said = torchfrtrace(dumped(result(tmp_path / "hung", hung)))
    assert "Culprit rank 2; Error type: COLLECTIVE_STATE_MISMATCH" in said
    assert "does not match found state: 'scheduled'" in said


def test_libraries_that_do_not_tell_the_end_and_records_that_are_doubled_do_no_harm(tmp_path: Path) -> None:
    path = result(
        tmp_path, lambda records: records + records[:9], network=Network(tells_start=False, tells_finish=False)
    )
    assert sound(torchfrtrace(dumped(path))) == STEPS * BUCKETS


def test_it_accepts_every_operation_that_records_know(tmp_path: Path) -> None:
    """Each step of three collectives; between two ranks also messages both ways, which are groups of their own."""
    names = ("allgather", "reduce_scatter", "broadcast", "reduce", "alltoall", "barrier", "gather", "scatter")
    sizes = {"gather": (1 << 20, 1 << 18, 1 << 18, 1 << 18), "barrier": (0,) * RANKS}
    kinds = ("float32", "bfloat16", "int64", "float8_e4m3fn", "bool")

    def all_kinds(records: simulated.Rows) -> simulated.Rows:
        made = []
        for row in records:
            op, dtype = names[row["seq"] % len(names)], kinds[row["seq"] % len(kinds)]
            size = sizes.get(op, (1 << 20,) * RANKS)[row["rank"]]
            made.append(row | {"op": op, "dtype": "none" if op == "barrier" else dtype, "bytes": size})
            if row["rank"] in (1, 3) and row["seq"] % 3 == 0:
                for pair in ("1 to 3", "3 to 1"):
                    sends = pair.startswith(str(row["rank"]))
                    where = {"group": f"all, {pair}", "seq": row["seq"] // 3, "op": "send" if sends else "recv"}
                    made.append(row | where | {"dtype": "float32", "bytes": 64})
        return made

    said = torchfrtrace(dumped(result(tmp_path, all_kinds, buckets=3)))
    assert sound(said) == 3 * STEPS + 2 * STEPS
    assert "expected_ranks={1, 3}" in said
    assert f"collective_name='gloo:all_gather', input_sizes=[[{1 << 16}]], output_sizes=[[{1 << 18}]]" in said


def test_shares_that_are_uneven_are_accepted(tmp_path: Path) -> None:
    def uneven(records: simulated.Rows) -> simulated.Rows:
        names = ("allgather", "reduce_scatter")
        return [row | {"op": names[row["seq"] % 2], "bytes": 4 * (row["seq"] * 4 + 3)} for row in records]

    said = torchfrtrace(dumped(result(tmp_path, uneven)))
    assert sound(said) == STEPS * BUCKETS
    assert "reduce_scatter_v" in said


def test_the_last_whole_steps_are_written_and_it_is_said_which(tmp_path: Path) -> None:
    path = result(tmp_path, without(2, STEPS * BUCKETS - 1))
    (found,) = write_flight_recorder(path, tmp_path / "dumps", most=7)
    assert (found.steps, found.steps_of_run, found.most_entries) == ([5, 6, 7], STEPS, 6)
    assert str(found).endswith("steps 5 to 7, at most 6 collectives a rank; 5 steps before them left out")
    said = torchfrtrace(found.folder)
    assert said.count("pass_check=True") == 6
    assert "sequence number: 15" in said
    (found,) = write_flight_recorder(path, tmp_path / "least", most=1)
    assert str(found).endswith(": step 7, at most 2 collectives a rank; 7 steps before them left out")


def test_only_steps_of_one_count_are_written_where_a_training_was_resumed(tmp_path: Path) -> None:
    """The process that went on has counted from 0 again, so the numbers before are others' than those after."""
    path = result(tmp_path, lambda records: [row | {"seq": row["seq"] % 10} for row in records])
    (found,) = write_flight_recorder(path, tmp_path / "dumps")
    assert found.steps == [5, 6, 7]


def test_the_command_writes_a_folder_a_run_and_says_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [SERIAL, ("ddp", "gloo", 2, 1), ("horovod", "mpi", 2, 1)]
    trained = [simulated.train(entry(i, *run), simulated.even(run[2]), style=run[0]) for i, run in enumerate(runs)]
    path, out = simulated.write(tmp_path, trained, runs), tmp_path / "dumps"
    assert command.main([str(path), "--flight-recorder", str(out)]) == 0
    folders = [out / "run1-ddp-gloo-2x1", out / "run2-horovod-mpi-2x1"]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder}: steps 0 to 7, at most 16 collectives a rank" for folder in folders]
    assert sorted(out.iterdir()) == folders
    first = {file: file.read_bytes() for file in folders[1].iterdir()}
    assert command.main([str(path), "--flight-recorder", str(out), "--run", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == said[1:]
    assert {file: file.read_bytes() for file in folders[1].iterdir()} == first
    assert not (path / "trace.json.gz").exists()


def test_what_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = result(tmp_path), str(tmp_path / "dumps")
    (tmp_path / "file").touch()
    cases = {
        "no run 7; name one of its runs with --run: 0 (serial-none-1x1), 1 (ddp-gloo-4x1)": ["--run", "7"],
        "no collectives of run 0 (serial-none-1x1)": ["--run", "0"],
        "name that too": ["--run", "1"],
        "Invalid value": ["--run", "ddp"],
        "did you mean --run?": ["--rum", "1"],
        "Cannot make": ["--flight-recorder", str(tmp_path / "file" / "x")],
    }
    for what, argv in cases.items():
        where = [] if what == "name that too" or "--flight-recorder" in argv else ["--flight-recorder", out]
        assert command.main([str(path), *where, *argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("pneumo: ")
        assert what in said
        assert said.count("\n") == 1
    with pytest.raises(Refused, match="no word for"):
        write_flight_recorder(
            result(tmp_path / "op", lambda records: [row | {"op": "split"} for row in records]), tmp_path / "x"
        )
    assert not (tmp_path / "dumps").exists()

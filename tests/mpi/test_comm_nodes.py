"""`pneumo` between nodes that share a machine: hosts by name only, so that no network has to be made."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import Launcher
from two_nodes import on_two_nodes, skip_where_refused

from pneumo.installed import native_facts

JOB = Path(__file__).with_name("comm_nodes_job.py")
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(os.geteuid() != 0, reason="names of hosts of their own need root"),
    pytest.mark.skipif(not (native_facts() or {}).get("mpi"), reason="the native layer is not built, or without MPI"),
]
Notes = list[dict[str, dict[str, Any]]]


FOUND: Notes = []  # what the one world that does all cases has found


@pytest.fixture
def notes(mpirun: Launcher, tmp_path: Path) -> Notes:
    """What each rank was told in each case."""
    if not FOUND:
        options = on_two_nodes("$OMPI_COMM_WORLD_RANK = 0")
        done = mpirun(3, file=JOB, args=[tmp_path], options=options, timeout=200, check=False)
        skip_where_refused(done)
        assert done.returncode == 0, done.text[-4000:]
        FOUND.extend(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3))
    return FOUND


@pytest.mark.parametrize("when", ["posted", "come"])
@pytest.mark.parametrize(("length", "size"), [("shorter", 12), ("much longer", 2_000_000)])
def test_a_message_of_another_length_is_refused(notes: Notes, length: str, size: int, when: str) -> None:
    told = [of_rank[f"{length}, {when}"]["told"] for of_rank in notes]
    assert told == ["", f"pneumo: rank 0 sends {size} bytes to who receives 20", ""]


def test_uneven_splits_are_told_to_all(notes: Notes) -> None:
    for of_rank in notes:
        assert "rank 0 sends 8 bytes to rank 1, which expects 12" in of_rank["uneven splits"]["told"]


def test_the_late_rank_of_another_node_is_named(notes: Notes) -> None:
    first, second, third = (of_rank["late"]["told"] for of_rank in notes)
    assert "rank 1 gave up" in first
    for told in (first, second):
        assert "all_reduce(sum, 4 x float32) (collective 1 of its group) timed out: rank 2 has not come" in told
    assert "gave up" in third
    assert notes[0]["late"]["seconds"] < 2 + 5


def test_nodes_that_disagree_are_told_who_calls_what(notes: Notes) -> None:
    for of_rank in notes:
        told = of_rank["disagree"]["told"]
        assert "the node of rank 0 calls broadcast(root 0, 4 x float32)" in told
        assert "the node of rank 1 calls all_reduce(sum, 4 x float32)" in told


@pytest.mark.parametrize("name", ["largest tag", "large gather"])
def test_what_goes_well_between_nodes(notes: Notes, name: str) -> None:
    """The job says itself where it does not."""
    assert [of_rank[name]["told"] for of_rank in notes] == ["", "", ""]

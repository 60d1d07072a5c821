"""What is wrong with the rows of steps.parquet: blocks that are left out, phases that are not parts of their step."""
# mypy: disable-error-code="import-untyped"

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulated
from accounts import account_of, row_of
from simulated import MS

from pneumo.study.faults import Fault
from pneumo.study.results import load_table
from pneumo.study.sentences import sentences

Edit = Callable[[simulated.Rows], simulated.Rows]


def edited(out: Path, edit: Edit) -> Path:
    """A result of two ranks and two blocks of four steps, its rows of steps.parquet edited."""
    path = simulated.study(out, 2)
    table = load_table(path, "steps")
    pq.write_table(pa.Table.from_pylist(edit(table.to_pylist()), schema=table.schema), path / "steps.parquet")
    return path


def is_row(row: dict[str, object]) -> bool:
    return (row["run"], row["rank"], row["step"]) == (1, 1, 5)


def is_of_block(row: dict[str, object]) -> bool:
    return (row["run"], row["rank"], row["block"]) == (1, 1, 2)


def said(path: Path) -> list[str]:
    return [one.text for one in sentences(row_of(path), account_of(path), 2)]


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda rows: [r for r in rows if not is_row(r)], "rank 1 has 3 rows for 4 steps"),
        (lambda rows: rows + [r for r in rows if is_row(r)], "rank 1 has 5 rows for 4 steps"),
        (lambda rows: [r | {"kind": "trian"} if is_row(r) else r for r in rows], "rank 1 has 3 rows for 4 steps"),
        (lambda rows: [r | {"step": 9} if is_row(r) else r for r in rows], "rank 0 has 4 rows for 5 steps"),
        (lambda rows: [r for r in rows if not is_of_block(r)], "rank 1 has 0 rows for 4 steps"),
    ],
)
def test_a_block_that_is_left_out_is_reported(tmp_path: Path, edit: Edit, where: str) -> None:
    path = edited(tmp_path, edit)
    account = account_of(path)
    assert account.blocks == (1,)
    assert account.faults["blocks"] == Fault(1, (f"block 2, {where}",))
    assert sum(f"the same steps: 1 (block 2, {where}); they are left out." in text for text in said(path)) == 1


@pytest.mark.parametrize("change", [{"backward_ns": 10**9}, {"forward_ns": -MS, "backward_ns": 46 * MS}])
def test_phases_that_are_no_parts_of_their_step_are_reported(tmp_path: Path, change: dict[str, int]) -> None:
    """The second sums to the wall time: 15 ms of forward and 30 ms of backward are a rank's half."""
    path = edited(tmp_path, lambda rows: [r | change if is_row(r) else r for r in rows])
    assert account_of(path).faults == {"phases": Fault(1, ("rank 1, block 2, step 5",))}
    assert sum("wall time: 1 (rank 1, block 2, step 5)" in text for text in said(path)) == 1


def test_a_sound_result_has_no_faults(tmp_path: Path) -> None:
    assert account_of(edited(tmp_path, lambda rows: rows)).faults == {}

"""The report of a result: its tables, from its files alone."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study import synthetic

from pneumo.report import main

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "mpi4py", "horovod"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_an_archived_result_is_told_again_without_torch_and_mpi(tmp_path: Path) -> None:
    """And left as it is: the summary comes from the other files, not from the one that a study has written."""
    path = synthetic.write_result(tmp_path / "results")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert "summary.json" not in before
    code = WITHOUT + "from pneumo.report import main\nsys.exit(main(sys.argv[1:]))"
    arguments = [str(path), "--json", str(tmp_path / "again.json")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for title in ("Comparison: main", "Where each rank's time went", "Quality on validation patients"):
        assert title in done.stdout
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    rows = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert [(row["backend"], row["comm"], row["ranks"], row["threads"]) for row in rows] == list(synthetic.DEFAULT_RUNS)


def test_training_without_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = synthetic.write_result(tmp_path)
    table = pq.read_table(path / "steps.parquet")
    rows = [row | {"images": 0} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path / "steps.parquet")
    assert main([str(path)]) == 2
    assert "images is 0 in all training steps" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["absent"], "name the folder of a result"), (["a", "--jsn", "b"], "did you mean --json?"), ([], "RESULT")],
)
def test_what_is_no_result_is_refused_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1

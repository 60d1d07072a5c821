"""The folder of a result: schemas, atomic files, refusals."""
# mypy: disable-error-code="import-untyped"

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulated
import synthetic

from pneumo.errors import PneumoError, Refused
from pneumo.study.results import (
    OF_BOXES,
    TABLES,
    ResultFolder,
    load_run,
    load_summary,
    load_table,
    table_schema,
    write_atomic,
)
from pneumo.study.schema import PHASES, EarlyStopping, RunFile, Summary
from pneumo.study.summary import summarize

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_nothing_is_overwritten_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    made = [ResultFolder.create(tmp_path, "main", now=NOW).path.name for _ in range(3)]
    assert made == ["2026-01-02T030405Z", "2026-01-02T030405Z-2", "2026-01-02T030405Z-3"]
    assert os.readlink(tmp_path / "main/latest") == made[-1]
    assert sorted(p.name for p in (tmp_path / "main").iterdir()) == sorted([*made, "latest"])


@pytest.mark.parametrize("study", ["", ".", "..", "a/b", "latest"])
def test_a_study_name_stays_in_its_place(tmp_path: Path, study: str) -> None:
    with pytest.raises(Refused, match="name"):
        ResultFolder.create(tmp_path, study)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"/proc/nowhere/main .*--out") as caught:
        ResultFolder.create(Path("/proc/nowhere"), "main")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "main").write_text("")
    with pytest.raises(Refused, match="main"):
        ResultFolder.create(tmp_path, "main")


def test_columns_are_those_of_the_contract() -> None:
    steps = ["run", "block", "rank", "step", "kind", "warmup", "images", "loss", "begin_ns", "wall_ns"]
    steps += [f"{p}_{what}" for p in PHASES for what in ("ns", "cpu_ns", "delay_ns")] + ["helpers_cpu_ns"]
    assert table_schema("steps").names == steps
    names = "run block rank step seq group op dtype bytes backend enqueued_ns started_ns finished_ns"
    assert table_schema("collectives").names == [*names.split(), "wait_begin_ns", "wait_end_ns", "bound"]
    assert table_schema("spans").names == ["run", "rank", "step", "phase", "begin_ns", "end_ns"]
    assert table_schema("predictions").names == [
        "run",
        "patient",
        "part",
        "label",
        "score",
        "view",
        "sex",
        "age",
        "person",
    ]
    sides = ["x", "y", "width", "height"]
    columns = ["run", "patient", "part", "score", *sides, "hits_coco", "hits_rsna"]
    assert table_schema("detections").names == columns
    assert table_schema("truths").names == ["patient", "part", *sides]
    assert not any(field.nullable for name in OF_BOXES for field in table_schema(name))
    types = {field.name: field.type for field in table_schema("predictions")}
    assert (types["label"], types["score"]) == (pa.int8(), pa.float32())


def test_rows_come_back_as_they_were_added(tmp_path: Path) -> None:
    folder = ResultFolder.create(tmp_path, "main")
    entry = synthetic.entry(0, "ddp", "gloo", 2, 1)
    rows = synthetic.step_rows(entry, {0: 10**9, 1: 10**9 + 7})
    collective = dict.fromkeys(table_schema("collectives").names) | {"run": 0, "block": 1, "rank": 0, "step": 4}
    collective |= {"seq": 9, "group": "world", "op": "allreduce", "dtype": "float32", "bytes": 4, "backend": "gloo"}
    collective |= {"enqueued_ns": 2**60 + 1}
    folder.add_steps(rows[:5])
    folder.flush()
    folder.add_steps(rows[5:])
    folder.add_collectives([collective])
    folder.flush()
    assert load_table(folder.path, "steps").to_pylist() == rows
    assert load_table(folder.path, "collectives").to_pylist() == [collective]
    assert load_table(folder.path, "spans").num_rows == 0
    assert pq.read_schema(folder.path / "steps.parquet").equals(table_schema("steps"))


def test_tables_of_boxes_are_written_where_there_are_boxes(tmp_path: Path) -> None:
    folder = ResultFolder.create(tmp_path, "main")
    folder.flush()
    assert {p.stem for p in folder.path.glob("*.parquet")} == set(TABLES) - set(OF_BOXES)
    for name in OF_BOXES:
        assert load_table(folder.path, name).schema.equals(table_schema(name))
    sides = {"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.5}
    truth = {"patient": "p", "part": "validate", **sides}
    detection = truth | {"run": 0, "score": 0.5, "hits_coco": 1023, "hits_rsna": 255}
    for _ in range(2):
        folder.add_detections([detection])
        folder.flush()
    assert load_table(folder.path, "detections").to_pylist() == [detection] * 2
    assert not (folder.path / "truths.parquet").exists()
    folder.add_truths([truth])
    folder.flush()
    assert load_table(folder.path, "truths").to_pylist() == [truth]


def test_a_resumed_result_keeps_its_rows(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, synthetic.DEFAULT_RUNS[:1], blocks=2)
    before = load_table(path, "steps").to_pylist()
    again = ResultFolder.open(path)
    more = synthetic.step_rows(synthetic.entry(0, *synthetic.DEFAULT_RUNS[0]), {2: 10**9}, warmup=0)
    again.add_steps(more)
    again.flush()
    assert load_table(path, "steps").to_pylist() == before + more


@pytest.mark.parametrize("change", [{"wall_ms": 1}, {"wall_ns": ...}])
def test_a_column_too_many_or_too_few_is_noticed(tmp_path: Path, change: dict[str, object]) -> None:
    folder = ResultFolder.create(tmp_path, "main")
    row = synthetic.step_rows(synthetic.entry(0, "serial", "none", 1, 1), {0: 10**9})[0] | change
    row = {name: value for name, value in row.items() if value is not ...}
    with pytest.raises(AssertionError, match="wall"):
        folder.add_steps([row])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PneumoError, match=r"run\.json \(No space left on device\)"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_json_round_trip(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, absent=[("horovod", "mpi", 2, "not built")])
    run, summary = load_run(path), summarize(path)
    assert msgspec.json.decode(msgspec.json.encode(run), type=RunFile) == run
    assert load_summary(path) == summary
    assert msgspec.json.decode(msgspec.json.encode(summary), type=Summary) == summary
    text = (path / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_figures_of_early_stopping_come_back_and_older_results_have_none(tmp_path: Path) -> None:
    found = EarlyStopping(patience=3, blocks=9, figure="AUC", figures={0: [0.5, math.nan], 2: [0.25, 1.0]})
    path = synthetic.write_result(tmp_path, synthetic.DEFAULT_RUNS[:1], early_stopping=found)
    record = load_run(path).early_stopping
    assert record is not None
    assert record.figures == {0: [0.5, None], 2: [0.25, 1.0]}
    assert record.sentence is None
    content = json.loads((path / "run.json").read_text())
    del content["early_stopping"]
    (path / "run.json").write_text(json.dumps(content))
    assert load_run(path).early_stopping is None


@pytest.mark.parametrize("where", [(), ("runs", 0), ("data",), ("data", "parts", "train")])
def test_an_unknown_field_is_refused(tmp_path: Path, where: tuple[str | int, ...]) -> None:
    path = synthetic.write_result(tmp_path, synthetic.DEFAULT_RUNS[:1])
    content = json.loads((path / "run.json").read_text())
    inner = content
    for key in where:
        inner = inner[key]
    inner["surprise"] = 1
    (path / "run.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match="surprise"):
        load_run(path)


def test_another_version_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, synthetic.DEFAULT_RUNS[:1])
    content = json.loads((path / "run.json").read_text()) | {"schema": 2}
    (path / "run.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match="schema version 2"):
        load_run(path)
    with pytest.raises(Refused, match="name the folder of a result"):
        load_run(tmp_path)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, synthetic.DEFAULT_RUNS[:1])
    content = (path / "steps.parquet").read_bytes()
    (path / "steps.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(Refused, match=r"steps\.parquet"):
        summarize(path)


Damage = Callable[[pa.Table], pa.Table]


def put(column: str, row: int, value: Any, kind: pa.DataType | None = None) -> Damage:
    """Another value, or the same values as another type."""

    def damage(table: pa.Table) -> pa.Table:
        i = table.column_names.index(column)
        values = table.column(i).to_pylist()
        values[row] = value
        return table.set_column(i, column, pa.array(values, kind or table.schema.field(i).type))

    return damage


def without_images(*blocks: int) -> Damage:
    """No images in any row of these blocks."""

    def damage(table: pa.Table) -> pa.Table:
        rows = [row | {"images": 0} if row["block"] in blocks else row for row in table.to_pylist()]
        return pa.Table.from_pylist(rows, schema=table.schema)

    return damage


def test_a_result_of_an_earlier_version_knows_no_persons(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path)
    table = pq.read_table(path / "predictions.parquet")
    pq.write_table(table.drop_columns(["person"]), path / "predictions.parquet")
    assert load_table(path, "predictions").column("person").null_count == table.num_rows > 0
    assert [row.metrics["n"] for row in summarize(path).rows if row.metrics]


@pytest.mark.parametrize(
    ("table", "damage", "said"),
    [
        ("steps", lambda t: t.drop_columns(["wall_ns"]), "has no column wall_ns"),
        ("steps", lambda t: t.drop_columns(["rank"]), "has no column rank"),
        ("collectives", lambda t: t.drop_columns(["seq"]), "has no column seq"),
        ("collectives", lambda t: t.drop_columns(["enqueued_ns"]), "has no column enqueued_ns"),
        ("collectives", lambda t: t.drop_columns(["group"]), "has no column group"),
        ("predictions", lambda t: t.drop_columns(["age"]), "has no column age"),
        ("steps", put("wall_ns", 0, 1, pa.float64()), "its column wall_ns is double, not int64"),
        ("steps", put("wall_ns", 0, None), "its column wall_ns is empty in 1 of"),
        ("collectives", put("enqueued_ns", 1, None), "its column enqueued_ns is empty in 1 of"),
        ("collectives", put("group", 1, None), "its column group is empty in 1 of"),
        ("steps", put("rank", -1, 5), "its column rank has 5 in run 1 of 2 ranks"),
        ("steps", put("rank", -1, -1), "its column rank has -1 in run 1 of 2 ranks"),
        ("steps", put("images", 0, -1), "its column images has values below 0"),
        ("steps", without_images(2), "its column images is 0 in all training steps of block 2 of run 0"),
        ("steps", without_images(1, 2, 3, 4), "its column images is 0 in all training steps of block 1 of run 0"),
    ],
)
def test_a_damaged_column_is_refused_by_name(tmp_path: Path, table: str, damage: Damage, said: str) -> None:
    path = simulated.study(tmp_path, 2, blocks=4)
    file = path / f"{table}.parquet"
    pq.write_table(damage(pq.read_table(file)), file)
    with pytest.raises(Refused) as caught:
        summarize(path)
    assert f"{file} is " in str(caught.value)
    assert said in str(caught.value)
    assert str(caught.value).count(". ") == str(caught.value).count("\n") == 0


@pytest.mark.parametrize("table", [name for name in TABLES if name not in OF_BOXES])
def test_an_absent_table_is_refused(tmp_path: Path, table: str) -> None:
    path = simulated.study(tmp_path, 2)
    (path / f"{table}.parquet").unlink()
    with pytest.raises(Refused, match=rf"{table}\.parquet is missing"):
        load_table(path, table)


def test_light_modules_stay_light() -> None:
    """schema imports msgspec alone; nothing in study imports torch, MPI, scipy or pandas."""
    code = "import sys, pneumo.study.schema; assert not {'numpy', 'pyarrow', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    heavy = {"torch", "mpi4py", "scipy", "pandas", "pyarrow"}
    code = f"import sys, pneumo.study.tables; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"

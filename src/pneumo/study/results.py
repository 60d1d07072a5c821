"""The folder of a result: made once, never overwritten, every file in it whole or absent.

A file is written beside its place, synchronised and renamed over it, so a reader (or the next run) sees the old file
or the new one, never half of either, whenever the writer was killed.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from pneumo.errors import PneumoError, Refused
from pneumo.study.schema import PHASES, RunFile, Summary, names_a_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from pneumo.study.common_clock import CommonClock

File = TypeVar("File", RunFile, Summary)

TABLES = ("steps", "collectives", "spans", "predictions", "detections", "truths")
ADDED = ("person",)  # columns that results of an earlier version lack: nothing is known there
OF_BOXES = ("detections", "truths")  # no files where a study has no boxes
STAMPS = (
    *("begin_ns", "end_ns", "enqueued_ns", "started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns"),
)  # the columns that are moments of a rank's clock, whatever the table; the others in ns are durations
CHUNK = 1 << 20  # stamps moved at a time


@cache
def table_schema(name: str) -> "pa.Schema":
    """The Arrow schema of one of TABLES; a column that may be empty (null) is nullable there."""
    import pyarrow as pa

    i32, i64, text = pa.int32(), pa.int64(), pa.string()
    phase_columns = [(f"{p}_{what}", i64) for p in PHASES for what in ("ns", "cpu_ns", "delay_ns")]
    box_columns = [(side, pa.float32()) for side in ("x", "y", "width", "height")]
    columns: dict[str, list[tuple[str, pa.DataType]]] = {
        "steps": [
            *[("run", i32), ("block", i32), ("rank", i32), ("step", i64), ("kind", text), ("warmup", pa.bool_())],
            *[("images", i64), ("loss", pa.float64()), ("begin_ns", i64), ("wall_ns", i64)],
            *[*phase_columns, ("helpers_cpu_ns", i64)],
        ],
        "collectives": [
            *[("run", i32), ("block", i32), ("rank", i32), ("step", i64), ("seq", i64), ("group", text), ("op", text)],
            *[("dtype", text), ("bytes", i64), ("backend", text), ("enqueued_ns", i64), ("started_ns", i64)],
            *[("finished_ns", i64), ("wait_begin_ns", i64), ("wait_end_ns", i64), ("bound", text)],
        ],
        "spans": [("run", i32), ("rank", i32), ("step", i64), ("phase", text), ("begin_ns", i64), ("end_ns", i64)],
        "predictions": [
            *[("run", i32), ("patient", text), ("part", text), ("label", pa.int8()), ("score", pa.float32())],
            *[("view", text), ("sex", text), ("age", i32), ("person", i32)],
        ],
        "detections": [
            *[("run", i32), ("patient", text), ("part", text), ("score", pa.float32())],
            *[*box_columns, ("hits_coco", i32), ("hits_rsna", i32)],
        ],
        "truths": [("patient", text), ("part", text), *box_columns],
    }
    return pa.schema([pa.field(column, kind, nullable=_nullable(column)) for column, kind in columns[name]])


def _nullable(column: str) -> bool:
    """A clock that the platform lacks, a stamp that a library does not tell and an unknown attribute are null."""
    if column.endswith(("_cpu_ns", "_delay_ns")) or column in ("loss", "bound", "person", "view", "sex", "age"):
        return True
    return column in ("started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns")


class ResultFolder:
    """A result that is being written: tables grow in memory, `flush` makes files of them.

    One rank writes. `flush` writes the whole tables again, so call it once a block, not once a step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
        self._chunks: dict[str, list[pa.Table]] = {name: [] for name in TABLES}

    @classmethod
    def create(cls, out: Path, study: str, *, now: datetime | None = None) -> "ResultFolder":
        """Make OUT/STUDY/<UTC time>/ (with -2, -3 ... where that exists) and point OUT/STUDY/latest to it.

        Raises Refused where the study's name is no plain name or the place cannot be written.
        """
        if not names_a_folder(study):
            raise Refused(f"The study's name {study!r} cannot name a folder; choose a plain name.")
        stamp = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H%M%SZ")
        try:
            (out / study).mkdir(parents=True, exist_ok=True)
            path = _new_folder(out / study, stamp)
            _point(out / study / "latest", path.name)
        except OSError as error:
            raise Refused(f"Cannot write results to {out / study} ({error.strerror}); choose another --out.") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "ResultFolder":
        """Go on with an existing result: the rows it has stay, new ones come after them."""
        load_run(path)
        folder = cls(path)
        for name in TABLES:
            folder._chunks[name] = [_read_table(path, name)]
        return folder

    def write_run(self, run: RunFile) -> None:
        """Write run.json; call it at the start, and again whenever the state changes."""
        write_json(self.path / "run.json", run)

    def add_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of steps.parquet: one for each (run, block, rank, step)."""
        self._add("steps", rows)

    def add_collectives(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of collectives.parquet: one for each (run, rank, collective)."""
        self._add("collectives", rows)

    def add_spans(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of spans.parquet: one for each interval of a sampled step (see `schema.Sampling`)."""
        self._add("spans", rows)

    def add_predictions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of predictions.parquet: one for each (run, patient); the last one of a patient counts."""
        self._add("predictions", rows)

    def add_detections(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of detections.parquet, one for each (run, predicted box); see `boxes.detection_rows`."""
        self._add("detections", rows)

    def add_truths(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of truths.parquet, one for each true box and not for each run; see `boxes.truth_rows`."""
        self._add("truths", rows)

    def _add(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        schema = table_schema(name)
        required = {field.name for field in schema if not field.nullable}
        known = set(schema.names)
        for row in rows:
            # Arrow drops what it does not know and fills in what it misses, silently.
            assert required <= row.keys() <= known, f"{name}: {sorted((required - row.keys()) | (row.keys() - known))}"
            self._rows[name].append(row)

    def flush(self) -> None:
        """Write all tables, but OF_BOXES only with rows; raises PneumoError where that fails (a full disk)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name in TABLES:
            schema, new = table_schema(name), bool(self._rows[name])
            if new:
                self._chunks[name].append(pa.Table.from_pylist(self._rows[name], schema=schema))
                self._rows[name] = []
            path = self.path / f"{name}.parquet"
            if not new and (name in OF_BOXES or path.exists()):
                continue
            table = pa.concat_tables(self._chunks[name]) if self._chunks[name] else schema.empty_table()
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            write_atomic(path, sink.getvalue())


def _new_folder(parent: Path, stamp: str) -> Path:
    """Make a folder that nobody else has: mkdir is the lock."""
    for attempt in range(1, 1000):
        path = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise Refused(f"{parent} has a thousand results of {stamp}; choose another --out.")


def _point(link: Path, target: str) -> None:
    """Make or move a symbolic link in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def write_atomic(path: Path, content: "bytes | memoryview | pa.Buffer") -> None:
    """Write a file so that it is whole or absent, also after a crash; raises PneumoError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise PneumoError(f"Cannot write {path} ({error.strerror}); free space or choose another --out.") from error


def write_json(path: Path, value: msgspec.Struct) -> None:
    """Write a record as indented JSON, atomically."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def load_run(folder: Path) -> RunFile:
    """Read run.json; raises Refused where there is none or it is not one of ours."""
    return _load(folder / "run.json", RunFile)


def load_summary(folder: Path) -> Summary:
    """Read summary.json; raises Refused where there is none or it is not one of ours."""
    return _load(folder / "summary.json", Summary)


def _load(path: Path, kind: type[File]) -> File:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); name the folder of a result.") from error
    except msgspec.MsgspecError as error:
        raise Refused(f"{path} is not a file that this version reads: {error}.") from error


def load_table(
    folder: Path,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    run: int | None = None,
    steps: Sequence[int] | None = None,
) -> "pa.Table":
    """Read one of TABLES, or some columns of it, or the rows of one run or of some steps.

    Stamps are on the common clock of all ranks. One of OF_BOXES is empty where it is absent. Raises Refused where
    another is absent, and where a file is damaged: not a table, without a column, or with other values than its schema
    allows.
    """
    from pneumo.study.common_clock import common_clock

    path = folder / f"{name}.parquet"
    if name not in OF_BOXES and not path.exists():
        raise Refused(f"{path} is missing; name the folder of a whole result.")
    wanted = table_schema(name).names if columns is None else list(columns)
    common = None
    if set(wanted) & set(STAMPS) and (folder / "run.json").exists():
        common = common_clock(load_run(folder).clock)
    if common is None:
        return _read_table(folder, name, columns=wanted, run=run, steps=steps)
    extra = [] if "rank" in wanted else ["rank"]
    # The file's table has no name here: its columns are let go one by one as they are moved.
    return on_common_clock(common, _read_table(folder, name, columns=wanted + extra, run=run, steps=steps)).select(
        wanted
    )


def _read_table(
    folder: Path,
    name: str,
    *,
    columns: list[str] | None = None,
    run: int | None = None,
    steps: Sequence[int] | None = None,
) -> "pa.Table":
    """As `load_table`, the stamps as they were written: each rank's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, schema = folder / f"{name}.parquet", table_schema(name)
    if not path.exists():
        return schema.empty_table() if columns is None else schema.empty_table().select(columns)
    kept: list[tuple[str, str, Any]] = [] if run is None else [("run", "==", run)]
    kept += [] if steps is None else [("step", "in", list(steps))]
    try:
        _check_columns(path, pq.read_schema(path), schema)
        table = pq.read_table(path, schema=schema, columns=columns, filters=kept or None)
    except (pa.ArrowException, OSError) as error:
        raise Refused(f"{path} is not a table that this version reads: {str(error).splitlines()[0]}.") from error
    for field in table.schema:
        if not field.nullable and (empty := table.column(field.name).null_count):
            raise Refused(f"{path} is damaged: its column {field.name} is empty in {empty} of {table.num_rows} rows.")
    return table


def _check_columns(path: Path, found: "pa.Schema", schema: "pa.Schema") -> None:
    """Arrow fills in what a file lacks and casts what it has otherwise, silently."""
    for field in schema:
        if field.name not in found.names:
            if field.name in ADDED:
                continue
            raise Refused(f"{path} is not a table that this version reads: it has no column {field.name}.")
        kind = found.field(field.name).type
        if kind != field.type:
            raise Refused(
                f"{path} is not a table that this version reads: its column {field.name} is {kind}, not {field.type}."
            )


def on_common_clock(common: "CommonClock | None", table: "pa.Table") -> "pa.Table":
    """The one place where a result's stamps are moved to rank 0's clock; every reader of a table comes by here.

    The table needs its column `rank`. Where nothing is to be moved it is returned as it is. Durations stay: the clocks'
    drift changes them by parts of a million.
    """
    if common is None:
        return table
    for column in [name for name in table.column_names if name in STAMPS]:
        moved = _moved(common, table.select([column, "rank"]))
        table = table.set_column(table.column_names.index(column), table.schema.field(column), moved)
    return table


def _moved(common: "CommonClock", table: "pa.Table") -> "pa.ChunkedArray":
    """A column of stamps, the first of the table, on the common clock; a piece at a time."""
    import pyarrow as pa

    pieces = []
    for batch in table.to_batches(max_chunksize=CHUNK):
        stamps, ranks = batch.columns
        unknown = stamps.is_null().to_numpy(zero_copy_only=False) if stamps.null_count else None
        values = (stamps.fill_null(0) if stamps.null_count else stamps).to_numpy()
        pieces.append(pa.array(common.move(values, ranks.to_numpy()), mask=unknown))
    return pa.chunked_array(pieces, type=pa.int64())

"""A run's collectives as the dumps of torch's flight recorder, one a rank, which `torchfrtrace FOLDER` analyses.

Made from run.json and collectives.parquet alone, in the pickled form (version 2.10) of
https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html. What differs from a dump of torch's own:

    which       the last whole steps with at most MOST_ENTRIES collectives a rank (one step at least), as torch's ring
                keeps the last ones; and no further back than the numbers of a group go on growing: before that, another
                process had begun to count (--resume)
    group       by its name in collectives.parquet; described by the library ("pneumo"). Its members are the ranks that
                left a record of it anywhere in the run. A rank that left none of any group belongs to all of them
    name        `gloo:` or `nccl:`: the analyser refuses names of other libraries
    sizes       flat, from bytes and dtype: a record does not know its tensors' shapes. Where the group's size does not
                divide those of an allgather or reduce-scatter, both sides are the whole, under the name for uneven
                shares (_v); a gather or scatter has none, since no record names its root
    state       completed where the library tells the end or the wait for it ended; else started or scheduled
    frames      where torch has a stack: step and block
    times       ns on the common monotonic clock, which is not the time of day
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pneumo.errors import Refused
from pneumo.study.results import load_run, load_table, write_atomic
from pneumo.study.schema import RunEntry

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = "2.10"
MOST_ENTRIES = 2000  # as TORCH_FR_BUFFER_SIZE in torch's documentation
PREFIX = "rank_"  # of the files' names; torchfrtrace takes what they have in common, and the number behind it as rank
LIBRARIES = ("gloo", "nccl")  # of ours those whose names the analyser knows; the others' collectives are as Gloo's
OPERATIONS = {"allreduce": "all_reduce", "allgather": "all_gather", "alltoall": "all_to_all"} | {
    op: op for op in ("barrier", "broadcast", "gather", "recv", "reduce", "reduce_scatter", "scatter", "send")
}
DTYPES = {
    "float64": ("Double", 8),
    "float32": ("Float", 4),
    "float16": ("Half", 2),
    "bfloat16": ("BFloat16", 2),
    "int64": ("Long", 8),
    "int32": ("Int", 4),
    "int16": ("Short", 2),
    "int8": ("Char", 1),
    "uint8": ("Byte", 1),
    "bool": ("Bool", 1),
    "complex64": ("ComplexFloat", 8),
    "complex128": ("ComplexDouble", 16),
}
COLUMNS = (
    *("rank", "block", "step", "seq", "group", "op", "dtype", "bytes", "backend"),
    *("enqueued_ns", "started_ns", "finished_ns", "wait_end_ns"),
)
MESSAGE = re.compile(r", (\d+) to (\d+)$")  # ends a group's name whose records are messages from one rank to another
Entry = dict[str, Any]
Members = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Dumps:
    """The dumps of one run: their folder, and which of the run's steps are in them."""

    folder: Path
    entry: RunEntry
    steps: list[int]
    steps_of_run: int
    most_entries: int  # of a rank

    def __str__(self) -> str:
        """One line for the terminal."""
        first, last = min(self.steps), max(self.steps)
        which = f"step {first}" if first == last else f"steps {first} to {last}"
        left = self.steps_of_run - len(self.steps)
        line = f"{self.folder}: {which}, at most {self.most_entries} collectives a rank"
        return line + (f"; {left} steps before them left out" if left else "")


def write_flight_recorder(
    folder: Path, out: Path, number: int | None = None, *, most: int = MOST_ENTRIES
) -> list[Dumps]:
    """Write the dumps of a result's runs, or of run `number` alone, each into a folder of its own in `out`.

    Raises Refused where there is no such run or none has collectives, where the result is damaged, or where `out`
    cannot be written; PneumoError where the disk is full.
    """
    run = load_run(folder)
    wanted = [entry for entry in run.runs if number in (None, entry.run)]
    if not wanted:
        known = ", ".join(f"{entry.run} ({_title(entry)})" for entry in run.runs)
        raise Refused(f"{folder} has no run {number}; name one of its runs with --run: {known}.")
    found = [(entry, members) for entry in wanted if (members := _members(folder, entry))]
    if not found:
        what = "no collectives" if number is None else f"no collectives of run {number} ({_title(wanted[0])})"
        raise Refused(f"{folder} has {what} in collectives.parquet; name a result, or a run, of several ranks.")
    return [_write(folder, out, entry, members, most) for entry, members in found]


def _title(entry: RunEntry) -> str:
    return f"{entry.backend}-{entry.comm}-{entry.ranks}x{entry.threads}"


def _members(folder: Path, entry: RunEntry) -> Members:
    """The ranks of each group; see the module's text."""
    table = load_table(folder, "collectives", columns=["group", "rank"], run=entry.run)
    found: dict[str, set[int]] = {}
    for row in table.group_by(["group", "rank"]).aggregate([]).to_pylist():
        found.setdefault(row["group"], set()).add(row["rank"])
    silent = set(range(entry.ranks)).difference(*found.values())
    return {group: sorted(ranks if MESSAGE.search(group) else ranks | silent) for group, ranks in sorted(found.items())}


def _write(folder: Path, out: Path, entry: RunEntry, members: Members, most: int) -> Dumps:
    steps, of_run = _last_steps(folder, entry, most)
    table = load_table(folder, "collectives", columns=COLUMNS, run=entry.run, steps=steps)
    place = out / f"run{entry.run}-{_title(entry)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"Cannot make {place} ({error.strerror}); choose another --flight-recorder.") from error
    longest = 0
    for rank in range(entry.ranks):
        dump = _dump(table, rank, entry, members)
        longest = max(longest, len(dump["entries"]))
        write_atomic(place / f"{PREFIX}{rank}", pickle.dumps(dump, protocol=2))
    return Dumps(place, entry, steps, of_run, longest)


def _last_steps(folder: Path, entry: RunEntry, most: int) -> tuple[list[int], int]:
    """The steps to be written, in order, and of how many of the run's that have collectives."""
    table = load_table(folder, "collectives", columns=["rank", "step", "group", "seq", "enqueued_ns"], run=entry.run)
    begins: dict[int, int] = {}
    sizes: dict[int, int] = {}  # collectives of the rank that has most of them
    numbers: dict[int, list[tuple[str, int, int]]] = {}  # the groups with their first and last number
    for row in table.group_by(["step", "rank"]).aggregate([("seq", "count"), ("enqueued_ns", "min")]).to_pylist():
        step = row["step"]
        begins[step] = min(begins.get(step, row["enqueued_ns_min"]), row["enqueued_ns_min"])
        sizes[step] = max(sizes.get(step, 0), row["seq_count"])
    for row in table.group_by(["step", "group"]).aggregate([("seq", "min"), ("seq", "max")]).to_pylist():
        numbers.setdefault(row["step"], []).append((row["group"], row["seq_min"], row["seq_max"]))
    kept: list[int] = []
    entries = 0
    first: dict[str, int] = {}  # of each group's numbers in what is kept
    for step in sorted(begins, key=lambda step: -begins[step]):
        goes_on = all(high < first.get(group, high + 1) for group, _, high in numbers[step])
        entries += sizes[step]
        if kept and (entries > most or not goes_on):
            break
        kept.append(step)
        first |= {group: low for group, low, _ in numbers[step]}
    return kept[::-1], len(begins)


def _dump(table: "pa.Table", rank: int, entry: RunEntry, members: Members) -> dict[str, Any]:
    """What one rank's flight recorder would hold; of several records of one collective the first counts."""
    import pyarrow.compute as pc

    rows: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in table.filter(pc.equal(table["rank"], rank)).to_pylist():
        rows.setdefault((row["group"], row["seq"]), row)
    ordered = sorted(rows.values(), key=lambda row: (row["step"], row["seq"], row["enqueued_ns"]))
    groups = list(members)
    # Records are numbered from 0 on each rank, whatever it lacks: the analyser drops what lies before the largest
    # first number, and a rank that lacks the first collective would hide it.
    entries = []
    for i, row in enumerate(ordered):
        entries.append(_entry(i, row, groups.index(row["group"]), len(members[row["group"]])))
    mine = {group: ranks for group, ranks in members.items() if rank in ranks}
    config = {group: {"name": group, "desc": entry.comm, "ranks": str(ranks)} for group, ranks in mine.items()}
    return {"version": VERSION, "comm_lib_version": "", "pg_config": config, "entries": entries}


def _entry(number: int, row: Mapping[str, Any], group: int, ranks: int) -> Entry:
    """One collective, of a group of so many ranks, as an entry of the ring."""
    name, inputs, outputs = _shape(row, ranks)
    dtype = [DTYPES.get(row["dtype"], (row["dtype"], 1))[0]]
    finished = row["finished_ns"] if row["finished_ns"] is not None else row["wait_end_ns"]
    message = row["op"] in ("send", "recv")
    library = row["backend"] if row["backend"] in LIBRARIES else LIBRARIES[0]
    return {
        "record_id": number,
        "pg_id": group,
        "process_group": (row["group"], row["backend"]),
        "collective_seq_id": row["seq"],
        "p2p_seq_id": row["seq"] if message else 0,
        "op_id": number,
        "is_p2p": message,
        "profiling_name": f"{library}:{name}",
        "input_sizes": [[size] for size in inputs],
        "input_dtypes": dtype * len(inputs),
        "output_sizes": [[size] for size in outputs],
        "output_dtypes": dtype * len(outputs),
        "state": _state(row["started_ns"], finished),
        "retired": finished is not None,
        "time_created_ns": row["enqueued_ns"],
        "time_discovered_started_ns": row["started_ns"],
        "time_discovered_completed_ns": finished,
        "frames": [{"name": f"step {row['step']} of block {row['block']}", "filename": "seq", "line": row["seq"]}],
    }


def _state(started: int | None, finished: int | None) -> str:
    if finished is not None:
        return "completed"
    return "scheduled" if started is None else "started"


def _shape(row: Mapping[str, Any], ranks: int) -> tuple[str, list[int], list[int]]:
    """The name of an operation in torch's words, and the elements of its inputs and of its outputs."""
    op, pair = row["op"], MESSAGE.search(row["group"])
    message = op in ("send", "recv")
    if op not in OPERATIONS or (message and not pair):
        raise Refused(f"A record says {op!r} in {row['group']!r}, which torch's flight recorder has no word for.")
    whole = row["bytes"] // DTYPES.get(row["dtype"], ("", 1))[1]
    if message and pair:
        # The pair is a group of two, who are numbered within it; its name tells who sends.
        sender = int(int(pair[1]) > int(pair[2]))
        name = f"send {sender}->{1 - sender}" if op == "send" else f"recv {1 - sender}<-{sender}"
        return name, [whole], [whole]
    if row["dtype"] == "none" or op in ("gather", "scatter"):
        return OPERATIONS[op], [], []
    if op not in ("allgather", "reduce_scatter"):
        return OPERATIONS[op], [whole], [whole]
    if whole % ranks:
        return f"{OPERATIONS[op]}_v", [whole], [whole]
    share = whole // ranks
    return (OPERATIONS[op], [share], [whole]) if op == "allgather" else (OPERATIONS[op], [whole], [share])

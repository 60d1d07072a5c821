"""The records of one run's timed steps, read and joined over its ranks; what is wrong with them is told, never dropped.

The members of a group that is named for all ranks of the run are all of these; of another one, those that have records
in it. A record without which a collective's last arrival is unknown is *lost*, and one whose stamps cannot be is taken
for lost too: by what of its collective the account then goes, says `collectives`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo.study.collectives import SMALL, STAMPS, UNKNOWN, Group, Ints, StepKeys, pair
from pneumo.study.faults import EXAMPLES, Fault
from pneumo.study.results import load_table
from pneumo.study.schema import RunEntry

if TYPE_CHECKING:
    import pyarrow as pa

ALIKE = ("allreduce", "broadcast", "reduce", "allgather", "reduce_scatter")  # what is as many bytes on every member
ORDERED = (
    ("enqueued_ns", "started_ns"),
    *(("enqueued_ns", "finished_ns"), ("started_ns", "finished_ns")),
    *(("enqueued_ns", "wait_end_ns"), ("wait_begin_ns", "wait_end_ns")),
)  # stamps of a record of which the second is never the earlier one
SLACK_NS = 1000  # far more than the rounding of a clock that is moved


def load(folder: Path, entry: RunEntry, keys: StepKeys) -> tuple[list[Group], dict[str, Fault]]:
    """Read and join the records of one run's timed steps, column by column: they may be tens of millions.

    Raises Refused where the file is damaged.
    """
    read = _Columns(folder, entry)
    pairs = pair(read("block"), read("step"))
    if not pairs.size:
        return [], {}
    index = np.minimum(np.searchsorted(keys.pairs, pairs), keys.pairs.size - 1).astype(np.int32)
    rank = read("rank").astype(np.int32)
    foreign = (rank < 0) | (rank >= entry.ranks)
    rows = np.flatnonzero((keys.pairs[index] == pairs) & ~foreign)
    stray = _stray(pairs, rank, foreign, keys)
    del pairs, foreign
    places = _places(read, rows, index[rows], rank[rows], read("seq")[rows])
    del rows, index, rank
    found = {name: [place.take(values) for place in places] for name in STAMPS for values in [read(name)]}
    size = read("bytes")
    found["bytes"] = [place.most(size) for place in places]
    block_of = np.searchsorted(keys.blocks, keys.block)
    groups = [
        Group(p.name, p.ranks, p.index, block_of[p.index], p.seq, *(values[i] for values in found.values()))
        for i, p in enumerate(places)
    ]
    mismatched = _mismatched(read, places, size)
    faults = {
        "lost": Fault.of(_lost(p, g, keys) for p, g in zip(places, groups, strict=True)),
        "gaps": Fault.of(_gaps(read, group, keys) for group in groups),
        "doubled": Fault.of((p.doubled, [f"in group {p.name}"]) for p in places),
        "stray": Fault.of([stray]),
        "mismatched": Fault.of(_at(g, differ, keys) for g, differ in zip(groups, mismatched, strict=True)),
        "impossible": Fault.of(_impossible(group, keys) for group in groups),
    }
    return groups, {kind: fault for kind, fault in faults.items() if fault.count}


def filled(column: "pa.ChunkedArray") -> NDArray[Any]:
    """A column of integers, UNKNOWN where it is null."""
    import pyarrow.compute as pc

    if column.null_count:
        column = pc.fill_null(column, UNKNOWN)
    return np.asarray(column.to_numpy())


@dataclass(frozen=True, slots=True)
class _Columns:
    """Reads a column of a run's records: integers; or texts, as the list of distinct ones and the index in it."""

    folder: Path
    entry: RunEntry

    def __call__(self, name: str) -> NDArray[Any]:
        return filled(self._read(name))

    def texts(self, name: str) -> tuple[list[str], NDArray[Any]]:
        encoded = self._read(name).combine_chunks().dictionary_encode()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def _read(self, name: str) -> "pa.ChunkedArray":
        return load_table(self.folder, "collectives", columns=["run", name], run=self.entry.run).column(name)


@dataclass(frozen=True, slots=True)
class _Place:
    """Which row of the table each (collective, rank) of a group is: `row` (K, n), -1 where the record is lost."""

    name: str
    ranks: Ints
    index: Ints
    seq: Ints
    row: NDArray[np.intp]
    doubled: int

    @property
    def silent(self) -> Ints:
        """The members that have no record of any collective."""
        return self.ranks[(self.row < 0).all(0)]

    def take(self, values: Ints) -> Ints:
        """The column of the table as a matrix (K, n)."""
        found = values[self.row]
        found[self.row < 0] = UNKNOWN
        return found

    def most(self, values: Ints) -> Ints:
        """The largest of the members' values, (K,)."""
        most: Ints = self.take(values).max(1)
        return most

    def differ(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Of which collectives the members' values differ, (K,)."""
        first = values[self.row.max(1)]
        found = np.zeros(self.seq.size, bool)
        for row in self.row.T:
            found |= (row >= 0) & (values[row] != first)
        return found


def _places(
    read: _Columns, rows: NDArray[np.intp], index: NDArray[np.int32], rank: NDArray[np.int32], seq: Ints
) -> list[_Place]:
    """The joined groups by name; `rows` are those of the run's records that count, the rest belongs to these."""
    names, group = read.texts("group")
    if not rows.size:
        return []
    group = group[rows] if len(names) > 1 else np.zeros(rows.size, np.int8)
    found = []
    for code, name in sorted(enumerate(names), key=lambda found: found[1]):
        here = slice(None) if len(names) == 1 else np.flatnonzero(group == code)
        if rows[here].size:
            found.append(_place(name, rows[here], index[here], seq[here], rank[here], read.entry.ranks))
    return found


def _place(name: str, rows: NDArray[np.intp], index: NDArray[Any], seq: Ints, rank: NDArray[Any], size: int) -> _Place:
    """Join the records of one group of a run of `size` ranks."""
    low = np.full(int(index.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(low, index, seq)
    within = seq - low[index]
    width = int(within.max()) + 1
    key, inverse = _distinct(index * np.int64(width) + within)
    of_all = name in (SMALL, f"{size} ranks")
    ranks = np.arange(size) if of_all else np.flatnonzero(np.bincount(rank)).astype(np.int64)
    cell = inverse * ranks.size
    cell += np.searchsorted(ranks, rank)
    row = np.full(key.size * ranks.size, -1, rows.dtype)
    # Of records of the same collective on the same rank the first row stays: assignment goes from the last on.
    row[cell[::-1]] = rows[::-1]
    doubled = rows.size - int((row >= 0).sum())
    step = key // width
    return _Place(name, ranks, step, key % width + low[step], row.reshape(key.size, ranks.size), doubled)


def _distinct(key: Ints) -> tuple[Ints, Ints]:
    """The distinct keys in order, and for each key which of them it is; by a table where the keys are dense."""
    if int(key.max()) > 4 * key.size:
        found, inverse = np.unique(key, return_inverse=True)
        return found, inverse
    there = np.bincount(key) > 0
    return np.flatnonzero(there), (np.cumsum(there) - 1)[key]


def _stray(pairs: Ints, rank: NDArray[Any], foreign: NDArray[np.bool_], keys: StepKeys) -> tuple[int, list[str]]:
    """Records of no step of the run, or of no rank of it."""
    index = np.minimum(np.searchsorted(keys.known, pairs), keys.known.size - 1)
    rows = np.flatnonzero(foreign | (keys.known[index] != pairs))
    lines = [f"rank {rank[i]}, block {pairs[i] >> 40}, step {pairs[i] & ((1 << 40) - 1)}" for i in rows[:EXAMPLES]]
    what = ["rank" if foreign[i] else "step" for i in rows[:EXAMPLES]]
    return rows.size, [f"{where}: no {one} of the run" for where, one in zip(lines, what, strict=True)]


def _where(group: Group, k: int, keys: StepKeys) -> str:
    step = group.step_index[k]
    return f"block {keys.block[step]}, step {keys.step[step]}, seq {group.seq[k]}, group {group.name}"


def _at(group: Group, which: NDArray[np.bool_], keys: StepKeys) -> tuple[int, list[str]]:
    """How many collectives (K,) these are, and where the first of them are."""
    return int(which.sum()), [_where(group, k, keys) for k in np.flatnonzero(which)[:EXAMPLES].tolist()]


def _on(group: Group, which: NDArray[np.bool_], keys: StepKeys) -> tuple[int, list[str]]:
    """How many records (K, n) these are, and whose the first of them are."""
    first = np.argwhere(which)[:EXAMPLES].tolist()
    return int(which.sum()), [f"rank {group.ranks[r]}, {_where(group, k, keys)}" for k, r in first]


def _lost(place: _Place, group: Group, keys: StepKeys) -> tuple[int, list[str]]:
    return _on(group, (place.row < 0) & ~np.isin(place.ranks, place.silent), keys)


def _gaps(read: _Columns, group: Group, keys: StepKeys) -> tuple[int, list[str]]:
    """Numbers within a block that no record has, not even one that does not count.

    Small sums between two steps belong to none and are dropped; of these only numbers within a step are missed.
    """
    alike = group.step_index if group.name == SMALL else group.block_index
    step = np.where(np.diff(alike) == 0, np.diff(group.seq), 1)
    before = np.flatnonzero(step > 1)
    if not before.size:
        return 0, []
    names, code = read.texts("group")
    there = np.unique(read("seq")[code == names.index(group.name)])
    low, high = group.seq[before], group.seq[before + 1]
    known = np.searchsorted(there, high, side="left") - np.searchsorted(there, low, side="right")
    missing = high - low - 1 - known
    lines = [f"after {_where(group, k, keys)}" for k in before[missing > 0][:EXAMPLES].tolist()]
    return int(missing.sum()), lines


def _mismatched(read: _Columns, places: list[_Place], size: Ints) -> Iterator[NDArray[np.bool_]]:
    """For each group, of which collectives (K,) the members' op, dtype or bytes differ."""
    ops, op = read.texts("op")
    dtype, alike = read.texts("dtype")[1], np.isin(ops, ALIKE)
    # What one sends another one receives.
    same = np.array([ops.index("send") if name == "recv" and "send" in ops else i for i, name in enumerate(ops)])
    for place in places:
        differ = place.differ(same[op]) | place.differ(dtype)
        yield differ | (place.differ(size) & alike[op[place.row.max(1)]])


def _impossible(group: Group, keys: StepKeys) -> tuple[int, list[str]]:
    """Records with stamps that cannot be, which are taken out of the group: their arrival is unknown then."""
    parts = []
    for piece in group.chunks():
        bad = np.zeros(piece.enqueued_ns.shape, bool)
        for first, second in ORDERED:
            later = getattr(piece, second)
            bad |= (later != UNKNOWN) & (later + SLACK_NS < getattr(piece, first))
        parts.append(_on(piece, bad, keys))
        if bad.any():
            for name in STAMPS:
                getattr(piece, name)[bad] = UNKNOWN
    return sum(count for count, _ in parts), [line for _, lines in parts for line in lines][:EXAMPLES]

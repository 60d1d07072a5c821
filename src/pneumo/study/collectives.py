"""The records of a run's collectives, joined over its ranks; blocked time split into peer wait, queue and transfer.

One collective is one (group, step, seq); each member of its group leaves a record of it. A rank *arrives* when it
enqueues. With A the last arrival, s the library's start and [b, e] the time in which a rank is blocked on it:

    peer wait   what of [b, e] lies before A
    queue       what of it lies between A and s; nothing where the library does not tell s
    transfer    the rest: from the later of A and s to e, a late waking up after the library's end included

so the three sum to e - b. What a rank's main thread does beside (hidden communication) needs its other waits too: see
`timeline`. A member that has no record of a collective is *lost*: its arrival is unknown, so peer wait is then a lower
bound; what is lost, doubled or belongs nowhere is counted in `Faults` and never dropped in silence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo.study.results import load_table
from pneumo.study.schema import RunEntry

if TYPE_CHECKING:
    import pyarrow as pa

    from pneumo.study.breakdown import Columns

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNKNOWN = int(np.iinfo(np.int64).min)  # a stamp that there is none of; below every stamp, so a maximum passes it by
STAMPS = ("enqueued_ns", "started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns")
EXAMPLES = 5
CHUNK = 1 << 20  # records worked on at a time: temporaries stay within tens of MB


@dataclass(frozen=True, slots=True)
class Group:
    """The collectives of one group in order of (block, step, seq): K of them on n ranks.

    `step_index` (K,) says which of the run's timed steps (see `StepKeys`), `block_index` (K,) which of its blocks,
    `bytes` (K,) how many the record says that has the most of them; stamps are (K, n) in ns, UNKNOWN where the library
    does not tell and, in `enqueued_ns`, where a record is lost.
    """

    name: str
    ranks: Ints
    step_index: Ints
    block_index: Ints
    seq: Ints
    enqueued_ns: Ints
    started_ns: Ints
    finished_ns: Ints
    wait_begin_ns: Ints
    wait_end_ns: Ints
    bytes: Ints

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which records there are, (K, n)."""
        return np.asarray(self.enqueued_ns != UNKNOWN)

    @property
    def blocked(self) -> NDArray[np.bool_]:
        """On which records the main thread is known to have been blocked, (K, n)."""
        return np.asarray((self.wait_begin_ns != UNKNOWN) & (self.wait_end_ns != UNKNOWN))

    def chunks(self) -> Iterator["Group"]:
        """The same collectives in pieces of about CHUNK records."""
        rows = max(1, CHUNK // max(1, self.ranks.size))
        for i in range(0, self.seq.size, rows):
            yield self[i : i + rows]

    def block(self, index: int) -> "Group":
        """The collectives of one block."""
        low, high = np.searchsorted(self.block_index, [index, index + 1]).tolist()
        return self[low:high]

    def __getitem__(self, rows: slice) -> "Group":
        names = ("step_index", "block_index", "seq", *STAMPS, "bytes")
        return Group(self.name, self.ranks, *(getattr(self, name)[rows] for name in names))


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a run's records; a run without faults has zeros and no examples.

    `lost`: records that a member of a group should have left, as others did: a collective that left none on any rank
    cannot be seen; `doubled`: further records of the same collective on the same rank (the first in the file counts);
    `stray`: records of no step of the run, or of no rank of it; `silent_ranks`: ranks that were blocked in collectives
    and left no record of any. `examples` say where, the first few of each.
    """

    lost: int = 0
    doubled: int = 0
    stray: int = 0
    silent_ranks: tuple[int, ...] = ()
    examples: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.stray or self.silent_ranks)


@dataclass(frozen=True, slots=True)
class StepKeys:
    """The timed steps of a run: (block, step) in order, (S,) each, `known` being those of the whole result's run."""

    block: Ints
    step: Ints
    blocks: Ints
    known: Ints = field(repr=False)

    @classmethod
    def of(cls, timed: "Columns", of_run: "Columns") -> "StepKeys":
        """From the timed rows of steps.parquet, and from all rows of the same run (warm-up and other kinds too)."""
        pairs = np.unique(_pair(timed["block"], timed["step"]))
        known = np.unique(_pair(of_run["block"], of_run["step"]))
        block = pairs >> 40
        return cls(block, pairs & ((1 << 40) - 1), np.unique(block), known)

    @property
    def pairs(self) -> Ints:
        """(block, step) as one ordered number, (S,)."""
        return _pair(self.block, self.step)


def _pair(block: NDArray[Any], step: NDArray[Any]) -> Ints:
    return (block.astype(np.int64) << 40) | step.astype(np.int64)


def load(folder: Path, entry: RunEntry, keys: StepKeys) -> tuple[list[Group], Faults]:
    """Read and join the records of one run's timed steps, column by column: they may be tens of millions.

    Raises Refused where the file is damaged.
    """

    def column(name: str) -> NDArray[Any]:
        table = load_table(folder, "collectives", columns=["run", name], run=entry.run)
        return filled(table.column(name))

    pair = _pair(column("block"), column("step"))
    if not pair.size:
        return [], Faults()
    index = np.minimum(np.searchsorted(keys.pairs, pair), keys.pairs.size - 1).astype(np.int32)
    rank = column("rank").astype(np.int32)
    foreign = (rank < 0) | (rank >= entry.ranks)
    rows = np.flatnonzero((keys.pairs[index] == pair) & ~foreign)
    stray = _stray(pair, foreign, keys)
    del pair, foreign
    places = _places(folder, entry, rows, index[rows], rank[rows], column("seq")[rows])
    del rows, index, rank
    found = {name: [place.take(values) for place in places] for name in STAMPS for values in [column(name)]}
    found["bytes"] = [place.take(values).max(1) for values in [column("bytes")] for place in places]
    block_of = np.searchsorted(keys.blocks, keys.block)
    groups = [
        Group(p.name, p.ranks, p.index, block_of[p.index], p.seq, *(values[i] for values in found.values()))
        for i, p in enumerate(places)
    ]
    said = stray[:EXAMPLES] + [line for place in places for line in place.examples(keys)]
    lost, doubled = sum(place.lost for place in places), sum(place.doubled for place in places)
    return groups, Faults(lost, doubled, len(stray), (), tuple(said))


def filled(column: "pa.ChunkedArray") -> NDArray[Any]:
    """A column of integers, UNKNOWN where it is null."""
    import pyarrow.compute as pc

    if column.null_count:
        column = pc.fill_null(column, UNKNOWN)
    return np.asarray(column.to_numpy())


def _places(
    folder: Path, entry: RunEntry, rows: NDArray[np.intp], index: NDArray[np.int32], rank: NDArray[np.int32], seq: Ints
) -> list["_Place"]:
    """The joined groups by name; `rows` are those of the run's records that count, the rest belongs to these."""
    column = load_table(folder, "collectives", columns=["run", "group"], run=entry.run).column("group")
    encoded = column.combine_chunks().dictionary_encode()
    names, group = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    del column, encoded
    if len(names) == 1:
        return [_place(names[0], rows, index, seq, rank)] if rows.size else []
    group = group[rows]
    found = []
    for code, name in sorted(enumerate(names), key=lambda pair: str(pair[1])):
        here = np.flatnonzero(group == code)
        if here.size:
            found.append(_place(name, rows[here], index[here], seq[here], rank[here]))
    return found


def _stray(pair: Ints, foreign: NDArray[np.bool_], keys: StepKeys) -> list[str]:
    """A line for each record of no step of the run, or of no rank of it."""
    index = np.minimum(np.searchsorted(keys.known, pair), keys.known.size - 1)
    stray = pair[foreign | (keys.known[index] != pair)].tolist()
    return [f"a record of no step: block {p >> 40}, step {p & ((1 << 40) - 1)}" for p in stray]


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
    def lost(self) -> int:
        return int((self.row < 0).sum())

    def take(self, values: Ints) -> Ints:
        """The column of the table as a matrix (K, n)."""
        found = values[self.row]
        found[self.row < 0] = UNKNOWN
        return found

    def examples(self, keys: StepKeys) -> list[str]:
        found = []
        for k, r in np.argwhere(self.row < 0)[:EXAMPLES].tolist():
            where = f"step {keys.step[self.index[k]]}, seq {self.seq[k]}, group {self.name}"
            found.append(f"rank {self.ranks[r]} has no record of {where}")
        return found + ([f"group {self.name}: {self.doubled} records more than once"] if self.doubled else [])


def _place(name: str, rows: NDArray[np.intp], index: NDArray[Any], seq: Ints, rank: NDArray[Any]) -> _Place:
    low = np.full(int(index.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(low, index, seq)
    within = seq - low[index]
    width = int(within.max()) + 1
    key, inverse = _distinct(index * np.int64(width) + within)
    ranks = np.flatnonzero(np.bincount(rank)).astype(np.int64)
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


@dataclass(frozen=True, slots=True)
class Split:
    """Blocked time of a piece of a group in ns, (K, n) each; `woken` is the part of transfer after the library's end.

    `last` (K,) is the column of the rank that arrived last, `arrived_ns` (K,) when.
    """

    peer_wait: Ints
    queue: Ints
    transfer: Ints
    woken: Ints
    last: NDArray[np.intp]
    arrived_ns: Ints


def split(group: Group) -> Split:
    """Split each rank's blocked time on each collective; see the module's text."""
    last = group.enqueued_ns.argmax(1)
    arrived = group.enqueued_ns.max(1)
    blocked, zero = group.blocked, np.int64(0)
    begin, end = np.where(blocked, group.wait_begin_ns, zero), np.where(blocked, group.wait_end_ns, zero)
    end = np.maximum(begin, end)
    ready = np.clip(arrived[:, None], begin, end)
    started = np.clip(group.started_ns, ready, end)
    finished = np.where(group.finished_ns == UNKNOWN, end, np.clip(group.finished_ns, started, end))
    return Split(ready - begin, started - ready, end - started, end - finished, last, arrived)


@dataclass(frozen=True, slots=True)
class Durations:
    """How long collectives took after the last arrival, in rank-seconds, blocked or hidden; by the clock and without.

    `clocked_s` sums finish minus last arrival over ranks, which needs the ranks' clocks to agree. `clock_free_s` is
    the least duration (enqueue to finish) over the ranks, for each of them: the last rank waits for nobody. Both hold
    the queue. `collectives` have a known finish on all their ranks; only these are compared. Where ranks lack cores
    the two differ on one clock too: some ranks are told later than others that it is over.
    """

    collectives: int = 0
    clocked_s: float = 0.0
    clock_free_s: float = 0.0

    @property
    def disagreement(self) -> float | None:
        """By how much the two differ, relative to the clock-free one; None where there is nothing to compare."""
        return (self.clocked_s - self.clock_free_s) / self.clock_free_s if self.clock_free_s > 0 else None


def durations(groups: list[Group]) -> Durations:
    """Compare the duration after the last arrival with the least duration over the ranks, which needs no clock."""
    count, clocked, free = 0, 0, 0
    for piece in (piece for group in groups for piece in group.chunks()):
        known = ((piece.finished_ns != UNKNOWN) & piece.present).all(1)
        enqueued, finished = piece.enqueued_ns[known], piece.finished_ns[known]
        count += int(known.sum())
        clocked += int(np.maximum(finished - enqueued.max(1, keepdims=True), 0).sum()) if enqueued.size else 0
        free += int(np.maximum(finished - enqueued, 0).min(1).sum()) * piece.ranks.size if enqueued.size else 0
    return Durations(count, clocked / 1e9, free / 1e9)

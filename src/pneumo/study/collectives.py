"""The collectives of a run, their records joined over its ranks; blocked time split into peer wait, queue and transfer.

One collective is one (group, step, seq); each member of its group leaves a record of it. A rank *arrives* when it
enqueues. With A the last arrival, s the library's start and [b, e] the time in which a rank is blocked on it:

    peer wait   what of [b, e] lies before A
    queue       what of it lies between A and s; nothing where the library does not tell s
    transfer    the rest: from the later of A and s to e, a late waking up after the library's end included

so the three sum to e - b. What a rank's main thread does beside (hidden communication) needs its other waits too: see
`timeline`. Where the arrival of a member is unknown (its record is lost, see `joined`), A is the last one that is
known: peer wait is then a lower bound, and the rest of [b, e] is *untold*, since nobody knows whether data moved yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pneumo.study.breakdown import Columns

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNKNOWN = int(np.iinfo(np.int64).min)  # a stamp that there is none of; below every stamp, so a maximum passes it by
STAMPS = ("enqueued_ns", "started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns")
SMALL = "small"  # the group of sums of a few bytes beside the training's own collectives
CHUNK = 1 << 20  # records worked on at a time: temporaries stay within tens of MB


@dataclass(frozen=True, slots=True)
class Group:
    """The collectives of one group in order of (block, step, seq): K of them on n ranks.

    `ranks` are its members. `step_index` (K,) says which of the run's timed steps (see `StepKeys`), `block_index` (K,)
    which of its blocks, `bytes` (K,) how many the record says that has the most of them; stamps are (K, n) in ns,
    UNKNOWN where the library does not tell and, in `enqueued_ns`, where a record is lost.
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
    def whole(self) -> NDArray[np.bool_]:
        """Of which collectives the arrivals of all members are known, (K,)."""
        return np.asarray(self.present.all(1))

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

    def on(self, rank: int) -> "Group":
        """The same collectives with the records of one of its ranks alone."""
        columns = np.flatnonzero(self.ranks == rank)
        return replace(self, ranks=self.ranks[columns], **{name: getattr(self, name)[:, columns] for name in STAMPS})

    def __getitem__(self, rows: slice) -> "Group":
        names = ("step_index", "block_index", "seq", *STAMPS, "bytes")
        return Group(self.name, self.ranks, *(getattr(self, name)[rows] for name in names))


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
        pairs = np.unique(pair(timed["block"], timed["step"]))
        known = np.unique(pair(of_run["block"], of_run["step"]))
        block = pairs >> 40
        return cls(block, pairs & ((1 << 40) - 1), np.unique(block), known)

    @property
    def pairs(self) -> Ints:
        """Their `pair`s, (S,)."""
        return pair(self.block, self.step)


def pair(block: NDArray[Any], step: NDArray[Any]) -> Ints:
    """(block, step) as one ordered number, (n,)."""
    return (block.astype(np.int64) << 40) | step.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Split:
    """Blocked time of a piece of a group in ns, (K, n) each; `woken` is the part of transfer after the library's end.

    `untold` is what lies after the last known arrival where another one is unknown; queue and transfer are then 0.
    `last` (K,) is the column of the rank that arrived last, `arrived_ns` (K,) when.
    """

    peer_wait: Ints
    queue: Ints
    transfer: Ints
    woken: Ints
    untold: Ints
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
    told = np.where(group.whole[:, None], end, ready)
    started = np.clip(group.started_ns, ready, told)
    finished = np.where(group.finished_ns == UNKNOWN, told, np.clip(group.finished_ns, started, told))
    return Split(ready - begin, started - ready, told - started, told - finished, end - told, last, arrived)


def beyond(begin: Ints, end: Ints, reached: Ints) -> tuple[Ints, Ints]:
    """What each interval adds to the union of those before it: where that begins, and up to where all of them reach.

    `begin` (K, ...) ascends along its first axis, `end` (K, ...), `reached` (1, ...) is where those before these reach:
    UNKNOWN for none. An interval adds nothing where the begin that is returned is not before its end.
    """
    until = np.maximum.accumulate(np.concatenate([reached, end]))
    return np.maximum(begin, until[:-1]), until[-1:]


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
        known = (piece.finished_ns != UNKNOWN).all(1) & piece.whole
        enqueued, finished = piece.enqueued_ns[known], piece.finished_ns[known]
        count += int(known.sum())
        clocked += int(np.maximum(finished - enqueued.max(1, keepdims=True), 0).sum()) if enqueued.size else 0
        free += int(np.maximum(finished - enqueued, 0).min(1).sum()) * piece.ranks.size if enqueued.size else 0
    return Durations(count, clocked / 1e9, free / 1e9)

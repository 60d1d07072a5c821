"""What a rank's main thread had done by any moment, from its steps and waits: the base of `late` and `replay`.

Phases have no stamps of their own in steps.parquet, but their order within a step is the training loop's, and waits
have stamps. So the *compute clock* of a rank, its time outside waits, runs through the phases of a step in order, and
a moment on it tells how much of each phase lies before it. `other`, which may lie anywhere, is put last; waits without
a record, which have no stamps, behind `data`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pneumo.study.collectives import UNKNOWN, Floats, Group, Ints, StepKeys

if TYPE_CHECKING:
    from pneumo.study.breakdown import Columns

PROGRAM = ("data", "forward", "backward", "optimizer", "other")  # the order of the phases within a step
BETWEEN = "between steps"
ALONE = ("validate", "checkpoint")  # kinds of rows that may lie between a rank's training steps
COMM = "comm"  # waits, after the last arrival; those without a record too
PLACES = (*PROGRAM, BETWEEN, *ALONE, COMM)


@dataclass(frozen=True, slots=True)
class Lanes:
    """The timed steps of a run as matrices (S, n) in ns, a column for each rank; of whole blocks only.

    `phases` (5, S, n) follow PROGRAM, `comm` (S, n) is the phase of that name. `before` (3, S, n) is what lies between
    a step and the one before it (or, for the first step of a block, the first rank's begin): unnamed, and the rows of
    kind validate and checkpoint.
    """

    block_index: Ints
    begin: Ints
    end: Ints
    phases: Floats
    comm: Floats
    before: Floats
    block_begin: Ints

    @property
    def first(self) -> NDArray[np.bool_]:
        """Which steps are the first of their block, (S,)."""
        return np.asarray(np.diff(self.block_index, prepend=-1) != 0)


def lanes(timed: "Columns", keys: StepKeys, ranks: int, alone: "Columns") -> Lanes:
    """Lay out the timed training steps of a run; `alone` are its rows of kinds ALONE."""
    order = np.lexsort((timed["rank"], timed["step"], timed["block"]))
    shape = (keys.step.size, ranks)
    begin = timed["begin_ns"][order].reshape(shape)
    end = begin + timed["wall_ns"][order].reshape(shape)
    *phases, comm = (timed[f"{p}_ns"][order].reshape(shape).astype(np.float64) for p in (*PROGRAM, COMM))
    block_index = np.searchsorted(keys.blocks, keys.block)
    block_begin = np.array([begin[block_index == b].min() for b in range(keys.blocks.size)])
    previous = np.vstack([begin[:1], end[:-1]])
    first = np.diff(block_index, prepend=-1) != 0
    previous[first] = block_begin[block_index[first], None]
    named = _named(alone, previous, begin)
    gap = np.maximum(begin - previous - named.sum(0), 0.0)
    return Lanes(block_index, begin, end, np.stack(phases), comm, np.concatenate([gap[None], named]), block_begin)


def _named(alone: "Columns", previous: Ints, begin: Ints) -> Floats:
    """How much of each gap [previous, begin] (S, n) rows of the kinds ALONE fill, (2, S, n)."""
    found = np.zeros((len(ALONE), *begin.shape))
    for i, kind in enumerate(ALONE):
        rows = np.flatnonzero(alone["kind"] == kind)
        start, rank = alone["begin_ns"][rows], alone["rank"][rows]
        for r in np.unique(rank).tolist():
            mine = start[rank == r]
            stop = mine + alone["wall_ns"][rows][rank == r]
            # The first step that begins after the row does: the row lies in the gap before it, or in none.
            step = np.searchsorted(begin[:, r], mine, side="left")
            inside = step < begin.shape[0]
            step, mine, stop = step[inside], mine[inside], stop[inside]
            length = np.minimum(stop, begin[step, r]) - np.maximum(mine, previous[step, r])
            np.add.at(found[i, :, r], step, np.maximum(length, 0))
    return found


class Waits:
    """The waits of one rank in order, and how much of the time up to a moment it has spent in them, in ns."""

    def __init__(self, begin: Ints, end: Ints, arrived: Ints) -> None:
        # One that ended as it began was no wait: its collective had finished before.
        waited = np.flatnonzero(end > begin)
        order = waited[np.argsort(begin[waited], kind="stable")]
        self.begin, self._arrived = begin[order], np.maximum.accumulate(arrived[order])
        # Waits of one thread cannot overlap; where records say so, the shared time counts once.
        self.end = np.maximum.accumulate(np.maximum(end[order], self.begin))
        start = np.maximum(self.begin, np.concatenate([self.begin[:1], self.end[:-1]]))
        self._start = start
        self._before = np.concatenate([[0], np.cumsum(np.maximum(self.end - start, 0))])

    @classmethod
    def of(cls, groups: list[Group], rank: int, arrived: list[Ints] | None = None) -> "Waits":
        """All waits of a rank, whatever group they are of.

        `arrived` is when the last rank came to each collective of each group, (K,); without it `arrived` says 0.
        """
        found = [np.zeros((3, 0), np.int64)]
        for group, moments in zip(groups, arrived or [np.zeros_like(group.seq) for group in groups], strict=True):
            for column in np.flatnonzero(group.ranks == rank).tolist():
                first, last = group.wait_begin_ns[:, column], group.wait_end_ns[:, column]
                known = (first != UNKNOWN) & (last != UNKNOWN)
                found.append(np.stack([first[known], last[known], moments[known]]))
        return cls(*np.concatenate(found, axis=1))

    def until(self, moment: Ints) -> Ints:
        """Time spent waiting before each moment (m,)."""
        if not self.begin.size:
            return np.zeros(moment.shape, np.int64)
        i = np.searchsorted(self.begin, moment, side="right")
        last = np.maximum(i - 1, 0)
        within = np.clip(np.minimum(moment, self.end[last]) - self._start[last], 0, None)
        return np.where(i > 0, self._before[last] + within, 0)

    def arrived(self, moment: Ints) -> Ints:
        """When the last rank came to what this one had waited for latest by each moment; 0 where it had not waited."""
        if not self.end.size:
            return np.zeros_like(moment)
        i = np.searchsorted(self.end, moment, side="right")
        return np.where(i > 0, self._arrived[np.maximum(i - 1, 0)], 0)


class Lane:
    """One rank's column of the lanes in one block, with its waits; `groups` are the block's, steps the run's.

    `arrived` is that of `Waits.of`.
    """

    def __init__(
        self, lanes: Lanes, groups: list[Group], rank: int, block: int, arrived: list[Ints] | None = None
    ) -> None:
        self.waits = Waits.of(groups, rank, arrived)
        low, high = np.searchsorted(lanes.block_index, [block, block + 1]).tolist()
        self._low = low
        self._begin, self._end = (np.ascontiguousarray(x[low:high, rank]) for x in (lanes.begin, lanes.end))
        self._waited = self.waits.until(self._begin)
        self._phases = np.ascontiguousarray(lanes.phases[:, low:high, rank])
        self._edges = np.cumsum(self._phases, 0) - self._phases
        self._phases_before = np.cumsum(self._phases, 1) - self._phases
        recorded = self.waits.until(lanes.end[low:high, rank]) - self._waited
        self._unrecorded = np.maximum(lanes.comm[low:high, rank] - recorded, 0.0)
        self._unrecorded_before = np.cumsum(self._unrecorded) - self._unrecorded
        self._gaps = np.cumsum(lanes.before[:, low:high, rank], 1)
        self._next_gap = np.diff(self._gaps, axis=1, append=self._gaps[:, -1:])
        self._gap_length = np.maximum(self._next_gap.sum(0), 1)

    def into_step(self, moment: Ints, step: NDArray[np.intp]) -> Floats:
        """How much of each phase of PROGRAM of that step lies before each moment, (5, m) ns."""
        at = step - self._low
        return self._into(at, *self._clock(moment, at, self.waits.until(moment)))

    def _into(self, at: NDArray[np.intp], clock: Floats, unrecorded: Floats) -> Floats:
        phases: Floats = np.minimum(np.maximum(clock - unrecorded - self._edges[:, at], 0.0), self._phases[:, at])
        return phases

    def _clock(self, moment: Ints, at: NDArray[np.intp], waited: Ints) -> tuple[Floats, Floats]:
        """Time outside recorded waits since the begin of a step of this block, and what of it was waiting, (m,) ns.

        `waited` is what was spent in waits before each moment.
        """
        clock = (moment - self._begin[at]) - (waited - self._waited[at])
        return clock, np.minimum(np.maximum(clock - self._edges[1, at], 0.0), self._unrecorded[at])

    def between(self, since: Ints, moment: Ints, step: NDArray[np.intp]) -> tuple[Floats, NDArray[np.intp]]:
        """What the rank did in each place from `since` (0: its block's begin) to each moment of a step.

        Returns ns (9, m) in the order of PLACES, and the step in which that stretch begins, (m,): of one that begins
        with the block the one before its first.
        """
        since = np.minimum(since, moment)
        begun = np.clip(np.searchsorted(self._begin, since, side="right") - 1, 0, step - self._low) + self._low
        spent = self._done(moment, step) - np.where(since > 0, self._done(since, begun), 0.0)
        return np.maximum(spent, 0.0), np.where(since > 0, begun, self._low - 1)

    def _done(self, moment: Ints, step: NDArray[np.intp]) -> Floats:
        """What has been done in each place since the block's begin, up to moments in a step or behind it, (9, m) ns."""
        at, waited = step - self._low, self.waits.until(moment)
        clock, unrecorded = self._clock(moment, at, waited)
        phases = self._phases_before[:, at] + self._into(at, clock, unrecorded)
        # In what order the parts of a gap come is not known.
        part = np.minimum(np.maximum(moment - self._end[at], 0) / self._gap_length[at], 1)
        gaps = self._gaps[:, at] + part * self._next_gap[:, at]
        return np.concatenate([phases, gaps, (self._unrecorded_before[at] + unrecorded + waited)[None]])


@dataclass(frozen=True, slots=True)
class Delays:
    """Run-queue delay of the timed steps of a run.

    `share` (5, S, n) is the part of each phase of PROGRAM that was delay, `before` (S, n) all delay outside `comm` of
    the block's earlier steps in ns, `of_transfer` (S, n) the part of `comm` that was none.
    """

    share: Floats
    before: Floats
    of_transfer: Floats

    @classmethod
    def of(cls, timed: "Columns", lanes: Lanes) -> "Delays":
        """From the same rows that `lanes` lays out."""
        order, shape = np.lexsort((timed["rank"], timed["step"], timed["block"])), lanes.begin.shape
        delay = np.stack([timed[f"{p}_delay_ns"][order].reshape(shape).astype(np.float64) for p in PROGRAM])
        comm, waiting = (timed[f"comm_{what}"][order].reshape(shape) for what in ("ns", "delay_ns"))
        share = np.clip(delay / np.maximum(lanes.phases, 1), 0, 1)
        each = (share * lanes.phases).sum(0)
        before = np.cumsum(each, 0) - each
        starts = np.maximum.accumulate(np.where(lanes.first, np.arange(lanes.first.size), 0))
        return cls(share, before - before[starts], 1 - np.clip(waiting / np.maximum(comm, 1), 0, 1))

    def until(self, lane: Lane, rank: int, moment: Ints, step: NDArray[np.intp]) -> Floats:
        """Delay outside `comm` since the block's begin, up to each moment of a step, (m,) ns."""
        within: Floats = (lane.into_step(moment, step) * self.share[:, step, rank]).sum(0)
        return np.asarray(self.before[step, rank] + within)

"""Who was late: the rank that the others waited for, in which phase it spent the time, and for what cause.

For each collective the last rank to arrive answers for the peer wait of all others; nobody does where it is unknown.
What each rank has done since a common moment is laid beside the median of what the others did: the phase in which the
late rank exceeds it most is where it lost the time. That moment is when the last rank came to the latest collective
that any of them has waited for: then all were there. The cause is then what grew in that phase of these steps over the
others' median:

    off_cpu   run-queue delay: the thread was ready and had no core
    compute   CPU time: it had more to compute, or computed slower
    sleep     neither of these: it was blocked; of comm: it came late out of a wait
    data      the phase is the wait for the next batch
    alone     it did what others did not: validation, a checkpoint
    unknown   it lost the time between two steps, where nothing is measured; or nothing that is measured grew
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo.study.collectives import UNKNOWN, Floats, Group, split
from pneumo.study.schema import Late
from pneumo.study.timeline import BETWEEN, COMM, PLACES, PROGRAM, Lane, Lanes

if TYPE_CHECKING:
    from pneumo.study.breakdown import Columns

CAUSES = ("off_cpu", "compute", "sleep", "data", "alone", "unknown")
Single = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Clocks:
    """CPU time and run-queue delay of each phase of PROGRAM in each step of each rank, (5, S, n) ns."""

    cpu: Single
    delay: Single

    @classmethod
    def of(cls, timed: "Columns", shape: tuple[int, int]) -> "Clocks":
        """From the same rows that `timeline.lanes` lays out."""
        order = np.lexsort((timed["rank"], timed["step"], timed["block"]))
        cpu, delay = (
            np.stack([timed[f"{p}_{what}_ns"][order].reshape(shape).astype(np.float32) for p in PROGRAM])
            for what in ("cpu", "delay")
        )
        return cls(cpu, delay)


def late(groups: list[Group], lanes: Lanes, clocks: Clocks, *, other: str = "other") -> list[Late]:
    """Name the late ranks of a run by (rank, phase, cause): first the most of the rank that cost most, then by cost.

    `other` says what the phase `other` of these rows is: one of PLACES, that of ALONE where one rank does it alone.
    """
    ranks = lanes.begin.shape[1]
    shape = (ranks, len(PLACES), len(CAUSES))
    wait, count = np.zeros(shape), np.zeros(shape, np.int64)
    for block in range(lanes.block_begin.size):
        here = [group.block(block) for group in groups]
        stretches = _stretches(here, lanes, block)
        for group, (spent, begun) in zip(here, stretches, strict=True):
            if group.ranks.size > 1 and group.seq.size:
                found = _blame(group, spent, begun, lanes, clocks, PLACES.index(other))
                np.add.at(wait, found[:3], found[3])
                np.add.at(count, found[:3], 1)
    rows = [
        Late(rank=rank, phase=PLACES[place], cause=CAUSES[cause], rank_s=float(wait[rank, place, cause]) / 1e9, count=n)
        for rank, place, cause in np.argwhere(count).tolist()
        for n in [int(count[rank, place, cause])]
    ]
    main = {one.parts[0] for one in by_rank(rows)[:1]}
    return sorted(rows, key=lambda row: (row not in main, *_order(row)))


@dataclass(frozen=True, slots=True)
class LateRank:
    """What one rank cost the others over all phases and causes; `parts` are these, worst first."""

    rank: int
    rank_s: float
    count: int
    parts: tuple[Late, ...]


def by_rank(rows: Iterable[Late]) -> list[LateRank]:
    """The late ranks themselves, the one that cost the others most first."""
    of_rank: dict[int, list[Late]] = {}
    for row in sorted(rows, key=_order):
        of_rank.setdefault(row.rank, []).append(row)
    found = [
        LateRank(rank, sum(row.rank_s for row in parts), sum(row.count for row in parts), tuple(parts))
        for rank, parts in of_rank.items()
    ]
    return sorted(found, key=lambda one: (-one.rank_s, one.rank))


def _order(row: Late) -> tuple[float, int, str, str]:
    return -row.rank_s, row.rank, row.phase, row.cause


def _stretches(groups: list[Group], lanes: Lanes, block: int) -> list[tuple[Single, NDArray[np.int32]]]:
    """For each group of one block what each rank did before each arrival since all were last there, in ns (9, K, n).

    Also the step in which that stretch begins, (K, n). Where a record is lost the stretch is not-a-number.
    """
    found, since = [], []
    for group in groups:
        shape = group.enqueued_ns.shape
        found.append((np.full((len(PLACES), *shape), np.nan, np.float32), np.zeros(shape, np.int32)))
        since.append(np.zeros(shape[0], np.int64))
    arrived = [group.enqueued_ns.max(1) for group in groups]
    on_lane = [Lane(lanes, groups, rank, block, arrived) for rank in range(lanes.begin.shape[1])]
    for lane, which, column, here in _columns(groups, on_lane):
        known = lane.waits.arrived(groups[which].enqueued_ns[here, column])
        since[which][here] = np.maximum(since[which][here], known)
    for lane, which, column, here in _columns(groups, on_lane):
        moment, step = groups[which].enqueued_ns[here, column], groups[which].step_index[here]
        spent, begun = found[which]
        spent[:, here, column], begun[here, column] = lane.between(since[which][here], moment, step)
    return found


def _columns(groups: list[Group], on_lane: list[Lane]) -> Iterator[tuple[Lane, int, int, NDArray[np.intp]]]:
    """Each rank's lane, index of a group, its column there, and the rows in which its arrival is known."""
    for which, group in enumerate(groups):
        for column, rank in enumerate(group.ranks.tolist()):
            yield on_lane[rank], which, column, np.flatnonzero(group.enqueued_ns[:, column] != UNKNOWN)


def _blame(
    group: Group, spent: Single, begun: NDArray[np.int32], lanes: Lanes, clocks: Clocks, other: int
) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.intp], Floats]:
    """Rank, place, cause and peer wait in ns of each collective that was waited for, (k,) each."""
    parts = split(group)
    wait = parts.peer_wait.sum(1).astype(np.float64)
    rows = np.flatnonzero((wait > 0) & group.whole)
    last = parts.last[rows]
    place = np.stack([_excess(spent[p][rows], last) for p in range(len(PLACES))]).argmax(0)
    place[place == PROGRAM.index("other")] = other
    low = int(np.searchsorted(lanes.block_index, lanes.block_index[group.step_index[0]]))
    steps = _steps(place, begun[rows, last], group.step_index[rows], low)
    cause = np.full(rows.size, CAUSES.index("alone"))
    cause[place == PLACES.index(BETWEEN)] = CAUSES.index("unknown")
    cause[place == PLACES.index(COMM)] = CAUSES.index("sleep")
    timed = np.flatnonzero(place < len(PROGRAM))
    cause[timed] = _cause(place[timed], (steps[0][timed], steps[1][timed]), last[timed], group.ranks, lanes, clocks)
    return group.ranks[last], place, cause, wait[rows]


def _steps(
    place: NDArray[np.intp], begun: NDArray[np.int32], now: NDArray[np.intp], low: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The first and the last step in which a stretch has gone through that place, (k,) each.

    A stretch begins with a wait, behind what comes early in its step, or with its block, whose first step is `low`.
    """
    early = place < PROGRAM.index("optimizer")
    first = np.where(early, np.minimum(begun + 1, now), np.maximum(begun, low))
    return first, np.where(early, now, np.maximum(now - 1, first))


def _excess(values: Single, last: NDArray[np.intp]) -> Single:
    """By how much each row's entry in column `last` exceeds the median of its other entries, (k, n) -> (k,)."""
    k, others = np.arange(last.size), values.copy()
    others[k, last] = np.nan
    if np.isnan(values).any():
        # Not-a-numbers, where a record is lost, sort to the end: the median is in the middle of what is before them.
        count = (~np.isnan(others)).sum(1)
        ordered = np.sort(others, axis=1)
        low, high = ordered[k, np.maximum(count - 1, 0) // 2], ordered[k, count // 2]
        return np.where(count > 0, values[k, last] - (low + high) / 2, 0).astype(np.float32)
    middle = (values.shape[1] - 2) // 2, (values.shape[1] - 1) // 2
    ordered = np.partition(others, middle, axis=1)
    return (values[k, last] - (ordered[:, middle[0]] + ordered[:, middle[1]]) / 2).astype(np.float32)


def _cause(
    place: NDArray[np.intp],
    steps: tuple[NDArray[np.intp], NDArray[np.intp]],
    last: NDArray[np.intp],
    ranks: NDArray[np.int64],
    lanes: Lanes,
    clocks: Clocks,
) -> NDArray[np.intp]:
    wall, cpu, delay = (_sums(x, place, *steps)[:, ranks] for x in (lanes.phases, clocks.cpu, clocks.delay))
    grown = np.stack([_excess(x, last) for x in (delay, cpu, wall - cpu - delay)])
    cause: NDArray[np.intp] = np.where(grown.max(0) > 0, grown.argmax(0), CAUSES.index("unknown"))
    # Whatever kept a batch away, the rank waited for data, unless it only lacked a core.
    cause[(place == PROGRAM.index("data")) & (cause != CAUSES.index("off_cpu"))] = CAUSES.index("data")
    return cause


def _sums(
    values: NDArray[np.floating[Any]], place: NDArray[np.intp], first: NDArray[np.intp], last: NDArray[np.intp]
) -> Single:
    """The sum over some steps of a place in `values` (5, S, n) for all ranks, (k, n)."""
    found = values[place, last].astype(np.float32)
    for back in range(1, int((last - first).max(initial=0)) + 1):
        rows = np.flatnonzero(last - back >= first)
        found[rows] += values[place[rows], last[rows] - back]
    return found

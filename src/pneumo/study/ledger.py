"""What a run's rows of one kind come to for each block and rank: the sums that the account is made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo.study.breakdown import COMPUTE
from pneumo.study.collectives import UNKNOWN, Floats, Group, Ints, beyond, split
from pneumo.study.schema import PHASES
from pneumo.study.timeline import ALONE, Waits

if TYPE_CHECKING:
    from pneumo.study.breakdown import Columns

IDLE = ("begins late", "ends early", "between steps", *ALONE)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Sums of one run over its timed rows of one kind, in seconds, each (blocks, ranks).

    `length` (blocks,) is from the first rank's begin to the last rank's end. `wall`, `cpu` and `delay` are by phase;
    where a platform has no CPU clock at all a phase's CPU is its wall time without delay (on a device a phase *is*
    the time of its kernels). `times` is the number of rows that have any time in a phase. `helpers_delay` is the part
    of the delay outside `comm` in which helper threads of the same process may have had the core: at most their CPU
    time in the same step. `idle` is the time of the block that lies in none of the rank's rows, by IDLE. The phases of
    all rows and the idle time sum to `length`.
    """

    blocks: tuple[int, ...]
    length: Floats
    images: Floats
    wall: dict[str, Floats]
    cpu: dict[str, Floats]
    delay: dict[str, Floats]
    times: dict[str, Floats]
    helpers_delay: Floats
    idle: dict[str, Floats]

    @property
    def compute_cpu(self) -> Floats:
        """CPU seconds of forward, backward and optimizer."""
        return sum((self.cpu[phase] for phase in COMPUTE), np.zeros_like(self.images))

    @property
    def useful(self) -> Floats:
        """Wall time of the steps outside `comm`: what POP calls useful computation."""
        return sum((self.wall[phase] for phase in PHASES if phase != "comm"), np.zeros_like(self.images))

    @property
    def delay_outside_comm(self) -> Floats:
        """Run-queue delay outside `comm`: what of it lies within a wait is part of the wait."""
        return sum((self.delay[phase] for phase in PHASES if phase != "comm"), np.zeros_like(self.images))

    def sleep(self, phase: str) -> Floats:
        """Wall time of a phase that is neither CPU time nor delay: the thread was blocked, and nobody says on what."""
        return self.wall[phase] - self.cpu[phase] - self.delay[phase]

    def only(self, blocks: tuple[int, ...]) -> "Ledger":
        """The same for some of the blocks, in that order."""
        rows = [self.blocks.index(block) for block in blocks]
        wall, cpu, delay, times, idle = (
            {name: values[rows] for name, values in parts.items()}
            for parts in (self.wall, self.cpu, self.delay, self.times, self.idle)
        )
        sums = (wall, cpu, delay, times, self.helpers_delay[rows], idle)
        return Ledger(blocks, self.length[rows], self.images[rows], *sums)


def ledger(rows: "Columns", ranks: int, alone: "Columns") -> Ledger:
    """Sum rows of steps.parquet over a run; `alone` are its rows of kinds ALONE that may lie within the blocks."""
    blocks, block = np.unique(rows["block"], return_inverse=True)
    shape = (blocks.size, ranks)
    cell = block * ranks + rows["rank"]

    def total(values: NDArray[Any]) -> Floats:
        return np.bincount(cell, weights=values, minlength=shape[0] * ranks).reshape(shape).astype(np.float64)

    wall = {phase: total(rows[f"{phase}_ns"]) / 1e9 for phase in PHASES}
    delay = {phase: total(rows[f"{phase}_delay_ns"]) / 1e9 for phase in PHASES}
    cpu = {phase: total(rows[f"{phase}_cpu_ns"]) / 1e9 for phase in PHASES}
    if not any(values.any() for values in cpu.values()):
        cpu = {phase: wall[phase] - delay[phase] for phase in PHASES}
    times = {phase: total(rows[f"{phase}_ns"] > 0) for phase in PHASES}
    outside = np.sum([rows[f"{phase}_delay_ns"] for phase in PHASES if phase != "comm"], axis=0)
    helpers = total(np.minimum(outside, rows["helpers_cpu_ns"])) / 1e9
    edges = _edges(rows, cell, shape)
    first, last = edges[0].min(1), edges[1].max(1)
    idle = _idle(edges, first, last, total(rows["wall_ns"]), _alone(alone, blocks, edges, first, last))
    length = (last - first) / 1e9
    return Ledger(tuple(blocks.tolist()), length, total(rows["images"]), wall, cpu, delay, times, helpers, idle)


def _edges(rows: "Columns", cell: NDArray[np.intp], shape: tuple[int, int]) -> tuple[Ints, Ints]:
    """First begin and last end of each rank in each block in ns; a rank without rows begins at its end."""
    size = shape[0] * shape[1]
    begin, end = np.full(size, np.iinfo(np.int64).max), np.full(size, np.iinfo(np.int64).min)
    np.minimum.at(begin, cell, rows["begin_ns"])
    np.maximum.at(end, cell, rows["begin_ns"] + rows["wall_ns"])
    begin, end = begin.reshape(shape), end.reshape(shape)
    last = np.broadcast_to(end.max(1, keepdims=True), shape)
    absent = begin > end
    return np.where(absent, last, begin), np.where(absent, last, end)


def _alone(
    alone: "Columns", blocks: Ints, edges: tuple[Ints, Ints], first: Ints, last: Ints
) -> dict[str, list[Floats]]:
    """For each kind of ALONE its ns before a rank's first step, among its steps, and after its last, within the block.

    Three (blocks, ranks) for each kind.
    """
    found: dict[str, list[Floats]] = {}
    block = np.minimum(np.searchsorted(blocks, alone["block"]), blocks.size - 1)
    rank, begin, end = alone["rank"], alone["begin_ns"], alone["begin_ns"] + alone["wall_ns"]
    own = edges[0][block, rank], edges[1][block, rank]
    spans = ((first[block], own[0]), own, (own[1], last[block]))
    for kind in ALONE:
        here = (alone["kind"] == kind) & (blocks[block] == alone["block"])
        found[kind] = []
        for low, high in spans:
            parts = np.zeros(edges[0].shape)
            shared = np.maximum(np.minimum(end, high) - np.maximum(begin, low), 0)
            np.add.at(parts, (block[here], rank[here]), shared[here])
            found[kind].append(parts)
    return found


def _idle(
    edges: tuple[Ints, Ints], first: Ints, last: Ints, busy_ns: Floats, alone: dict[str, list[Floats]]
) -> dict[str, Floats]:
    before, within, after = (np.sum([parts[i] for parts in alone.values()], axis=0) for i in range(3))
    lead = (edges[0] - first[:, None]) - before
    tail = (last[:, None] - edges[1]) - after
    between = (edges[1] - edges[0]) - busy_ns - within
    found = {"begins late": lead, "ends early": tail, "between steps": between}
    found |= {kind: np.sum(parts, axis=0) for kind, parts in alone.items()}
    return {name: values / 1e9 for name, values in found.items()}


@dataclass(frozen=True, slots=True)
class Blocked:
    """Time blocked on collectives in seconds, each (blocks, ranks); see `collectives.split`.

    `woken` is the part of `transfer` after the library had finished. `hidden` is not blocked time: it is the time in
    which the main thread was in no wait while at least one collective was under way, after its last arrival (and the
    library's start, where that is known). It counts once however many are; those count whose end and last arrival are
    known. So a rank's `hidden` is at most its time outside waits.
    """

    peer_wait: Floats
    queue: Floats
    transfer: Floats
    woken: Floats
    untold: Floats
    hidden: Floats

    @property
    def recorded(self) -> Floats:
        """All blocked time that has a record."""
        return self.peer_wait + self.queue + self.transfer + self.untold

    def only(self, rows: list[int]) -> "Blocked":
        """The same for some of the blocks, by their index."""
        return Blocked(*(getattr(self, name)[rows] for name in Blocked.__slots__))


def blocked(groups: list[Group], shape: tuple[int, int]) -> Blocked:
    """Sum a run's joined records over its blocks and ranks; `shape` is (blocks, ranks)."""
    sums = {name: np.zeros(shape) for name in Blocked.__slots__}
    for piece in (piece for group in groups for piece in group.chunks()):
        parts = split(piece)
        edges = np.flatnonzero(np.diff(piece.block_index, prepend=-1))
        for name in ("peer_wait", "queue", "transfer", "woken", "untold"):
            values = np.add.reduceat(getattr(parts, name), edges, axis=0)
            sums[name][np.ix_(piece.block_index[edges], piece.ranks)] += values
    arrived = [np.where(group.whole, group.enqueued_ns.max(1), UNKNOWN) for group in groups]
    for rank in range(shape[1]):
        mine = [(group.on(rank), last) for group, last in zip(groups, arrived, strict=True) if rank in group.ranks]
        block, hidden = _hidden(mine, rank)
        sums["hidden"][:, rank] = np.bincount(block, weights=hidden, minlength=shape[0])
    return Blocked(**{name: values / 1e9 for name, values in sums.items()})


def _hidden(groups: list[tuple[Group, Ints]], rank: int) -> tuple[Ints, Ints]:
    """Block index and hidden ns of a rank's collectives in order; each adds what was not hidden by those before it.

    Of each group the records of the rank alone, and the last arrivals (K,), UNKNOWN where one of them is.
    """
    parts = [np.zeros((3, 0), np.int64), *(_under_way(group, arrived) for group, arrived in groups)]
    found = np.concatenate(parts, axis=1)
    begin, end, block = found[:, np.argsort(found[0], kind="stable")]
    begin, _ = beyond(begin, end, np.array([UNKNOWN]))
    end = np.maximum(begin, end)
    waits = Waits.of([group for group, _ in groups], rank)
    return block, (end - begin) - (waits.until(end) - waits.until(begin))


def _under_way(group: Group, arrived: Ints) -> Ints:
    """Begin, end and block index of the collectives of one rank whose end and last arrival are known, (3, m)."""
    started, finished = group.started_ns[:, 0], group.finished_ns[:, 0]
    known = (finished != UNKNOWN) & (arrived != UNKNOWN)
    return np.stack([np.maximum(arrived, started), finished, group.block_index])[:, known]

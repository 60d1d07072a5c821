"""How much a run's collectives moved in each block, how often, and how fast once their last rank had come."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo.study.collectives import CHUNK, SMALL, UNKNOWN, Floats, Group, Ints, StepKeys, beyond


@dataclass(frozen=True, slots=True)
class Traffic:
    """A run's collectives by block, (B,) each; sums over ranks where not said otherwise.

    `steps` is the number of steps, of each rank. `calls` and `bytes` count each collective once for each member of its
    group, lost records too. `moved_bytes` and `busy_s` are about the records whose end is known, of collectives that
    have all their records, those of SMALL, no measure of a bandwidth, left out: their bytes, and the time from the last
    arrival to the end, which counts once where several are under way on a rank. So their quotient is the bandwidth
    (what nccl-tests calls the algorithm's), by the clocks of the ranks, queue included. `tells_start` and
    `tells_finish` say whether the library told these of any collective at all.
    """

    steps: Ints
    calls: Ints
    bytes: Ints
    moved_bytes: Floats
    busy_s: Floats
    tells_start: bool
    tells_finish: bool


def traffic(groups: Iterable[Group], keys: StepKeys) -> Traffic:
    """Sum a run's joined records over its blocks; `keys` are its timed steps."""
    blocks = keys.blocks.size
    steps = np.bincount(np.searchsorted(keys.blocks, keys.block), minlength=blocks)
    calls, size = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    moved, busy = np.zeros(blocks), np.zeros(blocks)
    start = finish = False
    for group in groups:
        members = group.ranks.size
        calls += members * np.bincount(group.block_index, minlength=blocks)
        np.add.at(size, group.block_index, members * group.bytes)
        start |= bool((group.started_ns != UNKNOWN).any())
        finish |= bool((group.finished_ns != UNKNOWN).any())
        if group.name != SMALL:
            for block_index, moved_bytes, busy_ns in _under_way(group):
                moved += np.bincount(block_index, weights=moved_bytes, minlength=blocks)
                busy += np.bincount(block_index, weights=busy_ns, minlength=blocks) / 1e9
    return Traffic(steps, calls, size, moved, busy, start, finish)


def _under_way(group: Group) -> Iterable[tuple[Ints, Ints, Ints]]:
    """Block index, bytes and ns from last arrival to end of collectives in order of arrival, a piece of them at a time.

    Bytes and ns are sums over the ranks whose end is known; on each rank time that was counted before does not count.
    """
    arrived = group.enqueued_ns.max(1)
    order = np.flatnonzero(group.whole)
    order = order[np.argsort(arrived[order], kind="stable")]
    reached: NDArray[np.int64] = np.full((1, group.ranks.size), UNKNOWN)
    rows = max(1, CHUNK // group.ranks.size)
    for i in range(0, order.size, rows):
        piece = order[i : i + rows]
        finished = group.finished_ns[piece]
        begin, reached = beyond(arrived[piece, None], finished, reached)
        known = (finished != UNKNOWN).sum(1)
        # An end that is unknown lies below every begin, and so adds nothing.
        yield group.block_index[piece], group.bytes[piece] * known, (np.maximum(finished, begin) - begin).sum(1)

"""What if: the time that a block would have taken without one of its causes, by replaying its recorded dependencies.

Within a block each rank's recorded stretches of computing are run again, one after the other. A collective is ready
when its last rank has enqueued it and the one before it in its group is done; then it takes what it took. A rank that
waited goes on when it is done, and after what waking up took. Changing stretches or what collectives take gives another
time of the whole block: what one rank gains is lost again where it then waits for another, which no subtraction of sums
can know.

    no transfer          a collective takes nothing, queue and waking up included
    no late peers        no rank comes to an event later than the (lower) median one of its ranks; what a rank is
                         late at one event and catches up before it is waited for gains nothing
    no oversubscription  run-queue delay is left out: of the stretches, and of the collectives in proportion to the
                         share of `comm` that was delay

Each is a bound, since the rest stays as it was: with a core more, caches are less crowded too. The replay with nothing
changed must give the recorded time; by how much it does not is `error`. Stretches of ranks whose records are lost, or
whose order differs from the other ranks', are the reasons.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pneumo.study.collectives import UNKNOWN, Floats, Group
from pneumo.study.timeline import Delays, Lane, Lanes

SCENARIOS = ("no transfer", "no late peers", "no oversubscription")


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Seconds of all blocks of a run: as recorded, as replayed, and in each of SCENARIOS."""

    recorded_s: float
    replayed_s: float
    scenarios_s: dict[str, float]

    @property
    def error(self) -> float:
        """By how much the replay with nothing changed misses the recorded time, relative to it."""
        return self.replayed_s / self.recorded_s - 1


@dataclass(frozen=True, slots=True)
class _Script:
    """One block to be replayed, in ns: E events on n ranks.

    `stretch` (E + 1, n) is what a rank computes before an event, last the rest of the block, and `undelayed` the same
    without run-queue delay. An event is of collective `call` (E,), and either its being enqueued or a wait for it,
    on the ranks `on` (E, n). `takes` (C, n) is what a collective takes on each rank once it is ready, `wakes` (C, n)
    what going on takes a rank beyond that; `previous` (C,) is the one before it in its group, or -1. `level`: no rank
    is later than the median one.
    """

    call: NDArray[np.intp]
    is_wait: NDArray[np.bool_]
    on: NDArray[np.bool_]
    stretch: Floats
    undelayed: Floats
    takes: Floats
    wakes: Floats
    prompt: Floats
    previous: NDArray[np.intp]
    level: bool = False

    def without_transfer(self) -> "_Script":
        """Collectives take nothing."""
        return replace(self, takes=np.zeros_like(self.takes), wakes=np.zeros_like(self.wakes))

    def without_delay(self) -> "_Script":
        """Nobody waits for a core; of a collective's time the part `prompt` (C, n) is left."""
        return replace(self, stretch=self.undelayed, takes=self.takes * self.prompt, wakes=self.wakes * self.prompt)


def what_if(groups: list[Group], lanes: Lanes, delays: Delays) -> WhatIf:
    """Replay all blocks of a run."""
    recorded, found = 0.0, dict.fromkeys(("as it was", *SCENARIOS), 0.0)
    for block in range(lanes.block_begin.size):
        here = [group for group in (group.block(block) for group in groups) if group.seq.size]
        last = lanes.end[lanes.block_index == block].max()
        recorded += float(last - lanes.block_begin[block]) / 1e9
        script = _script(here, lanes, delays, block)
        for name, change in _CHANGES.items():
            found[name] += _play(change(script)) / 1e9
    return WhatIf(recorded, found.pop("as it was"), found)


_CHANGES: dict[str, Callable[[_Script], _Script]] = {
    "as it was": lambda script: script,
    "no transfer": _Script.without_transfer,
    "no late peers": lambda script: replace(script, level=True),
    "no oversubscription": _Script.without_delay,
}


def _play(script: _Script) -> float:
    """The time from the block's begin to the last rank's end, in ns.

    `late` is where each rank is if it is as late as it was, since it last waited; `now` is where it is.
    """
    ranks = script.stretch.shape[1]
    late, done = np.zeros(ranks), np.zeros_like(script.takes)
    for i, call in enumerate(script.call.tolist()):
        on = script.on[i]
        late += script.stretch[i]
        now = late[on]
        if script.level:
            now = _levelled(now)
        if script.is_wait[i]:
            begins = np.where(done[call, on] < now, late[on], done[call, on])
            late[on] = begins + script.wakes[call, on]
        else:
            before = script.previous[call]
            ready = now.max()
            done[call] = (ready if before < 0 else np.maximum(ready, done[before])) + script.takes[call]
    late += script.stretch[-1]
    return float((_levelled(late) if script.level else late).max())


def _levelled(moments: Floats) -> Floats:
    middle = (moments.size - 1) // 2
    return np.asarray(np.minimum(moments, np.partition(moments, middle)[middle]))


@dataclass(frozen=True, slots=True)
class _Calls:
    """The C collectives of a block as matrices (C, n) of moments in ns since its begin, not-a-number where none.

    `waited` is when a rank began to wait and `resumed` when it went on; `step` (C,) is that of a collective, and the
    others are as in `_Script`.
    """

    sent: Floats
    waited: Floats
    resumed: Floats
    takes: Floats
    wakes: Floats
    step: NDArray[np.intp]
    previous: NDArray[np.intp]


def _calls(groups: list[Group], ranks: int, origin: int) -> _Calls:
    first = np.cumsum([0, *(group.seq.size for group in groups)]).tolist()
    found = [np.full((first[-1], ranks), np.nan) for _ in range(3)]
    takes, wakes = np.zeros((2, first[-1], ranks))
    step, previous = np.zeros(first[-1], np.intp), np.arange(-1, first[-1] - 1)
    for low, high, group in zip(first[:-1], first[1:], groups, strict=True):
        previous[low], step[low:high] = -1, group.step_index
        blocked = group.blocked
        told = ((group.present, group.enqueued_ns), (blocked, group.wait_begin_ns), (blocked, group.wait_end_ns))
        cells = np.ix_(np.arange(low, high), group.ranks)
        for matrix, (known, stamps) in zip(found, told, strict=True):
            matrix[cells] = np.where(known, stamps - origin, np.nan)
        takes[cells], wakes[cells] = _takes(group)
    sent, waited, resumed = found
    return _Calls(sent, waited, resumed, takes, wakes, step, previous)


def _script(groups: list[Group], lanes: Lanes, delays: Delays, block: int) -> _Script:
    ranks, origin = lanes.begin.shape[1], int(lanes.block_begin[block])
    calls = _calls(groups, ranks, origin)
    call, is_wait = _order(calls.sent, calls.waited)
    moments = np.where(is_wait[:, None], calls.resumed[call], calls.sent[call])
    on, final = ~np.isnan(moments), int(np.flatnonzero(lanes.block_index == block)[-1])
    stretch, undelayed = np.zeros((call.size + 1, ranks)), np.zeros((call.size + 1, ranks))
    for rank in range(ranks):
        lane = Lane(lanes, groups, rank, block)
        here = np.flatnonzero(on[:, rank])
        at = np.append(moments[here, rank].astype(np.int64) + origin, lanes.end[final, rank])
        steps = np.append(calls.step[call[here]], final)
        clock = (at - origin - lane.waits.until(at)).astype(np.float64)
        # Another order of events than the other ranks' would make a stretch negative.
        forward = np.maximum.accumulate(np.maximum(clock, 0))
        slower = np.maximum.accumulate(np.maximum(forward - delays.until(lane, rank, at, steps), 0))
        rows = np.append(here, call.size)
        stretch[rows, rank], undelayed[rows, rank] = np.diff(forward, prepend=0.0), np.diff(slower, prepend=0.0)
    prompt = delays.of_transfer[calls.step]
    return _Script(call, is_wait, on, stretch, undelayed, calls.takes, calls.wakes, prompt, calls.previous)


def _takes(group: Group) -> tuple[Floats, Floats]:
    """How long each collective took once it was ready, on each rank, and how long a rank that waited went on later.

    It ends with the library's end, or where that is not told with a waiting rank's going on.
    """
    waited = group.blocked & (group.wait_end_ns > group.wait_begin_ns)
    arrived = np.broadcast_to(group.enqueued_ns.max(1, keepdims=True), waited.shape)
    resumed = np.where(waited, np.maximum(group.wait_end_ns, arrived), arrived)
    told = group.finished_ns != UNKNOWN
    # The library may stamp its end behind the moment at which a rank that waited for it went on.
    end = np.where(told, np.where(waited, np.minimum(group.finished_ns, resumed), group.finished_ns), resumed)
    end = np.maximum(end, arrived)
    ready = np.maximum(arrived, np.vstack([arrived[:1], end[:-1]]))
    wakes = np.where(waited, resumed - np.maximum(end, group.wait_begin_ns), 0)
    return np.maximum(end - ready, 0).astype(np.float64), np.maximum(wakes, 0).astype(np.float64)


def _order(sent: Floats, waited: Floats) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The order of all events on all ranks, by their mean moment: means keep an order that all ranks have."""
    with np.errstate(invalid="ignore"):
        means = [np.nansum(x, 1) / np.maximum((~np.isnan(x)).sum(1), 1) for x in (sent, waited)]
    calls = [np.arange(sent.shape[0]), np.flatnonzero(~np.isnan(waited).all(1))]
    call = np.concatenate(calls)
    is_wait = np.repeat([False, True], [calls[0].size, calls[1].size])
    mean = np.concatenate([means[0], means[1][calls[1]]])
    order = np.lexsort((call, is_wait, mean))
    return call[order], is_wait[order]

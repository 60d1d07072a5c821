"""The account: where the rank-seconds went that N ranks took more than one.

For each block T_N is from the first rank's begin to the last rank's end, so each rank's share of N*T_N is that length.
It consists, exactly, of the wall time of the rank's steps, which is the sum of their phases, and of the time in none of
its steps. A phase other than `comm` is CPU time, run-queue delay, and sleep. `comm` is peer wait, queue and transfer as
the records say, waits without a record, and what is untold of waits on collectives with lost records. The reference's
T_1, one rank's, consists of the same, and each part of it is scaled by w, this rank's images over the reference's.
Subtracting part by part gives, for each rank,

    T_N - w*T_1 = peer wait + queue + transfer                        of the records
                + [data - its delay]                                  data stall
                + [delay outside comm]                                off-CPU
                + [CPU of forward, backward, optimizer]               = replicated + slower on CPU
                + [other - its delay] + comm without a whole record + [time in no step]     `other`, itemised
                + [sleep in forward, backward, optimizer]             residual

where [x] is x - w*x_1. Delay in `data` and `other` is off-CPU and therefore taken out of these; delay within `comm`
belongs to the wait it lies in. The CPU's growth is told apart by c(b), the CPU seconds of forward, backward and
optimizer of a serial step of b images: N ranks without any interference would need c of each one's share,

    replicated = c(share) - w*CPU_1          slower on CPU = CPU - c(share)

with c(b) the median over the rows of kind "share" with b images that the reference left in the same block (timed
before its first or after its last training step there, so that they are no part of T_1), and for each size of the
reference's own steps their mean, so that against itself it has lost nothing. Main-thread work for communication within
a phase (bucket copies, hooks) has no stamp of its own: it is CPU time beyond c, so it is part of slower on CPU.

The residual is computed as what the terms leave of N*T_N - T_1. By the identity above it is the growth of sleep in the
three compute phases, less what --inject put there; where there are no share rows, also the CPU's growth.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumo.study.breakdown import COMPUTE, select
from pneumo.study.collectives import Durations, Floats
from pneumo.study.faults import Faults
from pneumo.study.ledger import Blocked, Ledger
from pneumo.study.replay import WhatIf
from pneumo.study.schema import Late, RunEntry
from pneumo.study.statistics import Estimate, ratio_of_totals
from pneumo.study.traffic import Traffic

if TYPE_CHECKING:
    from pneumo.study.breakdown import Columns

BLOCKED = ("peer_wait", "queue", "transfer")
TERMS = (*BLOCKED, "data_stall", "off_cpu", "replicated", "slower_on_cpu", "other")
INJECTED = "injected sleep"  # an item of other
NO_SHARES = "no serial steps of the share's size were timed, so replicated and slower on CPU are not told apart"


@dataclass(frozen=True, slots=True)
class Account:
    """Rank-seconds of one run's rows of one kind, over the blocks that its reference has too.

    Everything is (blocks, ranks). `useful_s` is the steps' time outside `comm`, the reference's for as many images.
    `terms` are TERMS, None where the study cannot tell them: all but the first three
    without a reference, `replicated` and `slower_on_cpu` without share rows. `items` split a term: their sum is the
    term, except for those of `aside`, which explain without adding up. `num_waits` counts the records of blocked
    time, each part of which may be wrong by `clock_ns`, the error of the run's ranks' clocks against each other.
    """

    entry: RunEntry
    kind: str
    reference: int | None
    blocks: tuple[int, ...]
    length_s: Floats  # (blocks,)
    useful_s: Floats
    reference_useful_s: Floats | None
    lost_s: Floats | None
    terms: dict[str, Floats | None]
    items: dict[str, dict[str, Floats]]
    aside: dict[str, Floats]
    traffic: Traffic
    num_waits: int = 0
    clock_ns: float = 0.0
    faults: Faults = field(default_factory=dict)
    durations: Durations = field(default_factory=Durations)
    late: list[Late] = field(default_factory=list)
    what_if: WhatIf | None = None

    @property
    def whole_s(self) -> float:
        """N*T_N over all blocks of the account."""
        return float(self.length_s.sum()) * self.entry.ranks

    @property
    def residual_s(self) -> Floats | None:
        """What the terms leave of the loss, (blocks, ranks)."""
        if self.lost_s is None:
            return None
        return self.lost_s - sum(term for term in self.terms.values() if term is not None)

    def total(self, term: str) -> float | None:
        """A term, `lost` or `residual` in rank-seconds over all blocks and ranks."""
        found = self._values(term)
        return None if found is None else float(found.sum())

    def by_rank(self, term: str) -> Floats | None:
        """A term, `lost` or `residual` in seconds of each rank over all blocks, (ranks,)."""
        found = self._values(term)
        return None if found is None else found.sum(0)

    def points(self, term: str) -> Estimate | None:
        """A term as points of efficiency: 100 * term / (N*T_N), both over all blocks, with its interval or range.

        See `ratio_of_totals`. Limits keep to what can be: no more than all is lost, and blocked time is not below 0.
        """
        found = self._values(term)
        if found is None or not self.blocks:
            return None
        ratio = ratio_of_totals(100 * found.sum(1), self.length_s * self.entry.ranks)
        low, high = (0.0, 100.0) if term in BLOCKED else (-math.inf, 100.0 if term == "lost" else math.inf)
        return replace(ratio, low=max(ratio.low, low), high=min(ratio.high, high))

    def _values(self, term: str) -> Floats | None:
        if term == "residual":
            return self.residual_s
        return self.lost_s if term == "lost" else self.terms[term]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a serial run offers to the accounts of others: its sums, and the CPU seconds of a step of b images."""

    entry: RunEntry
    ledger: Ledger
    costs: dict[int, dict[int, float]]  # {block: {images: seconds}}

    @classmethod
    def of(cls, entry: RunEntry, timed: "Columns", shares: "Columns", sums: Ledger) -> "Reference":
        """`timed` are the run's timed steps, `shares` its rows of kind share."""
        everywhere = _by_size(shares, np.median)
        costs = {}
        for block in sums.blocks:
            found = everywhere | _by_size(select(shares, shares["block"] == block), np.median)
            costs[block] = found | _by_size(select(timed, timed["block"] == block), np.mean)
        return cls(entry, sums, costs)

    def cost(self, block: int, images: Floats) -> Floats | None:
        """CPU seconds of serial steps of these sizes (n,), by straight lines between the sizes that were timed.

        Where only one was timed the line is through no images at no cost. None unless at least half of the images are
        in steps of sizes that were timed themselves; of steps without images, unless such a step was.
        """
        known = self.costs[block]
        weights = images if images.any() else np.ones(images.shape)
        if not images.size or weights[np.isin(images, list(known))].sum() < weights.sum() / 2:
            return None
        if len(known) == 1:
            known = {0: 0.0} | known
        x = np.array(sorted(known), dtype=np.float64)
        y = np.array([known[int(size)] for size in x])
        if x.size == 1:
            return np.full(images.shape, y[0])
        i = np.clip(np.searchsorted(x, images), 1, x.size - 1)
        slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
        found: Floats = np.maximum(y[i - 1] + slope * (images - x[i - 1]), 0.0)
        return found


def _cpu(steps: "Columns") -> Floats:
    """CPU seconds of forward, backward and optimizer of each row; wall less delay where no CPU clock was read."""
    cpu = sum(steps[f"{phase}_cpu_ns"] for phase in COMPUTE)
    if not np.any(cpu):
        cpu = sum(steps[f"{phase}_ns"] - steps[f"{phase}_delay_ns"] for phase in COMPUTE)
    return np.asarray(cpu, dtype=np.float64) / 1e9


def _by_size(steps: "Columns", mean: Callable[[Floats], Any]) -> dict[int, float]:
    """The mean CPU seconds of a step by its images."""
    cpu, images = _cpu(steps), steps["images"]
    return {int(size): float(mean(cpu[images == size])) for size in np.unique(images)}


def share_cost(timed: "Columns", blocks: tuple[int, ...], ranks: int, reference: Reference) -> Floats | None:
    """c(share) summed over each rank's steps in each block, (blocks, ranks) seconds; None where it was not timed."""
    found = np.zeros((len(blocks), ranks))
    for i, block in enumerate(blocks):
        here = timed["block"] == block
        cost = reference.cost(block, timed["images"][here].astype(np.float64))
        if cost is None:
            return None
        found[i] = np.bincount(timed["rank"][here], weights=cost, minlength=ranks)
    return found


def make_account(
    entry: RunEntry,
    kind: str,
    ours: Ledger,
    waits: Blocked,
    reference: Reference | None,
    shares: Floats | None,
    injected: Mapping[tuple[int | None, str], float],
    **rest: Any,
) -> Account:
    """Write up the account of one run.

    `shares` is `share_cost`. `injected` are the seconds of sleep that were put into each row of a (rank, phase), rank
    None being all: as much of the sleep there becomes an item of `other`.
    """
    items = {"transfer": {"in transfer": waits.transfer - waits.woken, "waking up after it": waits.woken}}
    delays = {"delay within comm": ours.delay["comm"], "delay outside comm": ours.delay_outside_comm}
    aside = {"hidden": waits.hidden, **delays}
    terms: dict[str, Floats | None] = dict.fromkeys(TERMS)
    terms |= {"peer_wait": waits.peer_wait, "queue": waits.queue, "transfer": waits.transfer}
    if reference is None:
        return Account(
            entry, kind, None, ours.blocks, ours.length, ours.useful, None, None, terms, items, aside, **rest
        )
    theirs = reference.ledger
    growth = _Growth(ours, theirs)
    items |= _items(ours, theirs, waits, growth, injected)
    terms["data_stall"] = growth(ours.wall["data"] - ours.delay["data"], theirs.wall["data"] - theirs.delay["data"])
    terms |= {name: sum(items[name].values(), np.zeros_like(ours.images)) for name in ("off_cpu", "other")}
    if shares is not None:
        terms["replicated"] = shares - growth.weight * theirs.compute_cpu
        terms["slower_on_cpu"] = ours.compute_cpu - shares
    aside |= {f"sleep in {phase}": growth(ours.sleep(phase), theirs.sleep(phase)) for phase in COMPUTE}
    lost = ours.length[:, None] - growth.weight * theirs.length[:, None]
    useful = growth.weight * theirs.useful.sum(1, keepdims=True)
    about = (entry, kind, reference.entry.run, ours.blocks, ours.length, ours.useful, useful)
    return Account(*about, lost, terms, items, aside, **rest)


def _items(
    ours: Ledger,
    theirs: Ledger,
    waits: Blocked,
    growth: "_Growth",
    injected: Mapping[tuple[int | None, str], float],
) -> dict[str, dict[str, Floats]]:
    """The parts of off-CPU and of other."""
    ours_by_others = ours.delay_outside_comm - ours.helpers_delay
    theirs_by_others = theirs.delay_outside_comm - theirs.helpers_delay
    put = {(rank, phase): seconds for (rank, phase), seconds in injected.items() if phase in COMPUTE}
    return {
        "off_cpu": {
            "own helper threads, at most": growth(ours.helpers_delay, theirs.helpers_delay),
            "others": growth(ours_by_others, theirs_by_others),
        },
        "other": {
            "phase other": growth(
                ours.wall["other"] - ours.delay["other"], theirs.wall["other"] - theirs.delay["other"]
            ),
            "waits without a record": growth(ours.wall["comm"] - waits.recorded, theirs.wall["comm"]),
            "waits on collectives with lost records": waits.untold,
            **{name: growth(ours.idle[name], theirs.idle[name]) for name in ours.idle},
            **({INJECTED: _injected(ours, theirs, growth, put)} if put else {}),
        },
    }


class _Growth:
    """Ours less the reference's for as many images."""

    def __init__(self, ours: Ledger, theirs: Ledger) -> None:
        images = theirs.images.sum(1, keepdims=True)
        # Rows without images, as those of checkpoints, are one piece of work for all ranks.
        self.weight = np.where(images > 0, ours.images / np.maximum(images, 1), 1 / ours.images.shape[1])

    def __call__(self, ours: Floats, theirs: Floats) -> Floats:
        grown: Floats = ours - self.weight * theirs.sum(1, keepdims=True)
        return grown


def _injected(
    ours: Ledger, theirs: Ledger, growth: _Growth, injected: Mapping[tuple[int | None, str], float]
) -> Floats:
    """How much of the growth of sleep was put there, (blocks, ranks): at most as much as was; the rest has no name."""
    most = {phase: np.zeros_like(ours.images) for phase in COMPUTE}
    for (rank, phase), seconds in injected.items():
        ranks = slice(None) if rank is None else slice(rank, rank + 1)
        most[phase][:, ranks] += seconds * ours.times[phase][:, ranks]
    parts = (np.clip(growth(ours.sleep(phase), theirs.sleep(phase)), 0, most[phase]) for phase in COMPUTE)
    return sum(parts, np.zeros_like(ours.images))

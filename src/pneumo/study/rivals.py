"""Backends against each other: what a step takes and moves under each, and each difference with its verdict.

Everything is by block, from the accounts. With T a block's length and n its steps, a step takes T/n, and of that each
rank was, in the mean, exposed to communication (blocked on recorded collectives: peer wait, queue and transfer, see
`collectives`) and outside of it the rest: computing, waiting for data or a core, block edges. So by construction

    step = outside + exposed            exposed = peer wait + queue + transfer

in each block. Off-CPU is the part of `outside` in which a rank was ready to run and had no core. Runs are compared
within the blocks that both have, pair by pair. A term's margin is the difference that the margin of speeds allows the
whole step, MARGIN of the faster one's: a term that differs less decides nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from msgspec import structs

from pneumo.study.account import Account
from pneumo.study.collectives import Floats
from pneumo.study.schema import Difference, Figures, Pair, Rivals, RunEntry, Spread, Verdict, VerdictName
from pneumo.study.statistics import MARGIN, Comparison, CostComparison, compare, compare_costs, median

TERMS = (
    *("outside_s", "off_cpu_s", "exposed_s", "peer_wait_s", "queue_s", "transfer_s", "queue_and_transfer_s"),
    "hidden_s",
)
OPPOSITE: Mapping[VerdictName, VerdictName] = {
    "faster": "slower",
    "slower": "faster",
    "equivalent": "equivalent",
    "undecided": "undecided",
}
ByBlock = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Steps:
    """One run's steps by block: seconds a step, and of it the ranks' mean of each of TERMS that can be told."""

    entry: RunEntry
    step_s: ByBlock
    terms: dict[str, ByBlock]
    calls: ByBlock
    bytes: ByBlock
    bytes_per_s: ByBlock

    @classmethod
    def of(cls, account: Account) -> "Steps":
        """The same from a run's account."""
        moved = account.traffic
        step = account.length_s / moved.steps
        steps = moved.steps * account.entry.ranks

        def by_block(values: Floats) -> ByBlock:
            return {block: float(value) for block, value in zip(account.blocks, values, strict=True)}

        if not moved.calls.any():
            return cls(account.entry, by_block(step), {}, {}, {}, {})
        waits = {name: account.terms[name] for name in ("peer_wait", "queue", "transfer")}
        mean = {name: values.sum(1) / steps for name, values in waits.items() if values is not None}
        exposed, after = sum(mean.values(), np.zeros_like(step)), mean["queue"] + mean["transfer"]
        terms = {"outside_s": step - exposed, "exposed_s": exposed, "queue_and_transfer_s": after}
        terms |= {f"{name}_s": values for name, values in mean.items() if name != "queue" or moved.tells_start}
        terms["off_cpu_s"] = account.aside["delay outside comm"].sum(1) / steps
        if moved.tells_finish:
            terms["hidden_s"] = account.aside["hidden"].sum(1) / steps
        told = np.flatnonzero(moved.busy_s > 0)
        bandwidth = {account.blocks[i]: float(moved.moved_bytes[i] / moved.busy_s[i]) for i in told}
        by_term = {name: by_block(values) for name, values in terms.items()}
        return cls(
            account.entry,
            by_block(step),
            by_term,
            by_block(moved.calls / steps),
            by_block(moved.bytes / steps),
            bandwidth,
        )


def rivals(runs: Iterable[Steps]) -> list[Rivals]:
    """The comparisons of a study: one for each number of ranks and threads with at least two parallel runs."""
    alike: dict[tuple[int, int], list[Steps]] = {}
    for run in runs:
        if run.entry.ranks > 1:
            alike.setdefault((run.entry.ranks, run.entry.threads), []).append(run)
    return [
        Rivals(ranks=ranks, threads=threads, runs=[_figures(run) for run in found], pairs=_pairs(found))
        for (ranks, threads), found in sorted(alike.items())
        if len(found) > 1
    ]


def _pairs(runs: Iterable[Steps]) -> list[Pair]:
    """Each two runs that share a block, the later one in the study's order against the earlier one."""
    return [pair for theirs, ours in combinations(runs, 2) if (pair := compare_steps(ours, theirs)) is not None]


def _figures(run: Steps) -> Figures:
    step = median(list(run.step_s.values()))
    terms = {name: _middle(run.terms.get(name, {})) for name in TERMS if name != "queue_and_transfer_s"}
    return Figures(
        run=run.entry.run,
        backend=run.entry.backend,
        comm=run.entry.comm,
        blocks=len(run.step_s),
        step_s=Spread(median=step.value, low=step.low, high=step.high),
        calls=_middle(run.calls),
        bytes=_middle(run.bytes),
        bytes_per_s=_middle(run.bytes_per_s),
        **terms,
    )


def _middle(values: ByBlock) -> float | None:
    return median(list(values.values())).value if values else None


def compare_steps(ours: Steps, theirs: Steps) -> Pair | None:
    """Compare two runs in speed and in each term; None where they share no block."""
    speed = compare(_rates(ours.step_s), _rates(theirs.step_s))
    if speed is None:
        return None
    shared = ours.step_s.keys() & theirs.step_s.keys()
    faster = min(median([run.step_s[block] for block in shared]).value for run in (ours, theirs))
    told = set(ours.terms) & set(theirs.terms)
    if ("queue_s" in ours.terms) != ("queue_s" in theirs.terms):
        told.discard("transfer_s")
    seconds = {
        term: compare_costs(ours.terms[term], theirs.terms[term], MARGIN * faster) if term in told else None
        for term in TERMS
    }
    bandwidth = compare(ours.bytes_per_s, theirs.bytes_per_s)
    return Pair(
        ours=ours.entry.run,
        theirs=theirs.entry.run,
        blocks=speed.blocks,
        interval_kind=speed.ratio.kind,
        speed=_difference(speed),
        bandwidth=_difference(bandwidth) if bandwidth else None,
        seconds={term: _difference(found) if found else None for term, found in seconds.items()},
    )


def against(found: Rivals, ours: int, theirs: int) -> Pair | None:
    """The pair of two runs, whichever was compared with the other; None where they share no block."""
    for pair in found.pairs:
        if {pair.ours, pair.theirs} == {ours, theirs}:
            return pair if pair.ours == ours else _turned(pair)
    return None


def _turned(pair: Pair) -> Pair:
    """The same pair seen from the other run."""
    return structs.replace(
        pair,
        ours=pair.theirs,
        theirs=pair.ours,
        speed=_opposite(pair.speed, lambda x: 1 / x),
        bandwidth=_opposite(pair.bandwidth, lambda x: 1 / x) if pair.bandwidth else None,
        seconds={term: _opposite(found, lambda x: -x) if found else None for term, found in pair.seconds.items()},
    )


def _opposite(found: Difference, inverse: Callable[[float], float]) -> Difference:
    was, verdict = found.estimate, found.verdict
    estimate = Spread(median=inverse(was.median), low=inverse(was.high), high=inverse(was.low))
    return Difference(estimate=estimate, verdict=structs.replace(verdict, verdict=OPPOSITE[verdict.verdict]))


def _rates(step_s: ByBlock) -> ByBlock:
    return {block: 1 / seconds for block, seconds in step_s.items()}


def _difference(found: Comparison | CostComparison) -> Difference:
    estimate = found.ratio if isinstance(found, Comparison) else found.difference
    return Difference(
        estimate=Spread(median=estimate.value, low=estimate.low, high=estimate.high),
        verdict=Verdict(verdict=found.verdict, margin=found.margin, more_blocks=found.more_blocks),
    )

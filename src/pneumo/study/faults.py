"""What is wrong with a run's rows and records, counted by kind, with the places of the first few of each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pneumo.study.schema import PHASES, RunEntry

if TYPE_CHECKING:
    from pneumo.study.breakdown import Columns

EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Fault:
    """How many there are of one kind, and where the first few of them are, in words."""

    count: int = 0
    examples: tuple[str, ...] = ()

    @classmethod
    def of(cls, parts: Iterable[tuple[int, Sequence[str]]]) -> "Fault":
        """The counts and examples of several parts as one."""
        found = [part for part in parts if part[0]]
        lines = [line for _, examples in found for line in examples]
        return cls(sum(count for count, _ in found), tuple(lines[:EXAMPLES]))


# By kind, none where there is none of it; a run without faults has an empty one.
#     blocks      timed blocks of which the ranks have left other steps: they are left out
#     phases      rows of steps.parquet with a phase below zero, or whose phases do not sum to their wall time
#     silent      ranks without a record of a group of all ranks, or that were blocked and left none at all
#     lost        records that a member of a group should have left, as others did
#     gaps        collectives that are missing on all ranks: their numbers were left out within a block
#     doubled     further records of the same collective on the same rank (the first in the file counts)
#     stray       records of no step of the run, or of no rank of it
#     mismatched  collectives of which the members say different things: what they did, of which type, how many bytes
#     impossible  records with a stamp before another one that it cannot precede: they are taken for lost
Faults = Mapping[str, Fault]


def block_faults(training: "Columns", timed: "Columns", entry: RunEntry) -> Fault:
    """The blocks of a run's training rows that are not timed, with a rank that has not one row for each step."""
    mask = ~training["warmup"].astype(bool)
    dropped = np.setdiff1d(training["block"][mask], timed["block"]).tolist()
    lines = []
    for block in dropped[:EXAMPLES]:
        here = mask & (training["block"] == block)
        steps = np.unique(training["step"][here]).size
        rows = np.bincount(training["rank"][here], minlength=entry.ranks)
        rank = int((rows != steps).argmax())
        lines.append(f"block {block}, rank {rank} has {rows[rank]} rows for {steps} steps")
    return Fault(len(dropped), tuple(lines))


def phase_faults(rows: "Columns") -> Fault:
    """The rows whose phases are not parts of their wall time."""
    phases = [rows[f"{phase}_ns"] for phase in PHASES]
    odd = np.flatnonzero((np.sum(phases, axis=0) != rows["wall_ns"]) | (np.min(phases, axis=0) < 0))
    where = [{name: rows[name][i] for name in ("block", "step", "rank")} for i in odd[:EXAMPLES].tolist()]
    return Fault(odd.size, tuple(f"rank {one['rank']}, block {one['block']}, step {one['step']}" for one in where))

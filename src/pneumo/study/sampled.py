"""The sampled steps of a result, as far as they can be drawn: intervals of phases, and collectives joined over ranks.

Sampled steps are few, so these are Python objects; the account's joined matrices of all steps are in `collectives`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumo.study.results import load_table
from pneumo.study.schema import RunEntry, RunFile

if TYPE_CHECKING:
    import pyarrow as pa

Phases = list[tuple[str, int, int]]  # phase, begin, end in ns; in order


@dataclass(frozen=True, slots=True)
class Record:
    """One collective on one rank; stamps in ns, None where the library does not tell."""

    enqueued_ns: int
    started_ns: int | None
    finished_ns: int | None
    wait_begin_ns: int | None
    wait_end_ns: int | None
    bound: str | None

    @property
    def end_ns(self) -> int:
        """When it was over as far as is known: finished, else the wait's end; no earlier than it was enqueued."""
        known = self.finished_ns if self.finished_ns is not None else self.wait_end_ns
        return max(self.enqueued_ns, self.enqueued_ns if known is None else known)

    def blocked_ns(self, until: int | None = None) -> int | None:
        """How long the main thread was blocked, or how long of that before a moment; None where it is not told."""
        if self.wait_begin_ns is None or self.wait_end_ns is None:
            return None
        end = self.wait_end_ns if until is None else min(self.wait_end_ns, until)
        return max(0, end - self.wait_begin_ns)


@dataclass(frozen=True, slots=True)
class Call:
    """One collective with the records that its ranks left of it, by rank.

    `last` is the rank that arrived last, at `arrived_ns`, and `waited_ns` for how long the others were blocked on it
    before that, in rank-ns; a collective of one rank has no last one.
    """

    step: int
    seq: int
    group: str
    op: str
    about: dict[str, Any]
    records: dict[int, Record]
    last: int | None
    arrived_ns: int
    waited_ns: int

    @classmethod
    def of(cls, row: Mapping[str, Any], records: dict[int, Record]) -> "Call":
        """From the row of one rank and the records of all; of ranks that came at the same time the first was late."""
        arrived = max(record.enqueued_ns for record in records.values())
        last = min(rank for rank, record in records.items() if record.enqueued_ns == arrived)
        waited = sum(record.blocked_ns(arrived) or 0 for rank, record in records.items() if rank != last)
        about = {name: row[name] for name in ("dtype", "bytes", "backend")}
        found = records, last if len(records) > 1 else None, arrived, waited
        return cls(row["step"], row["seq"], row["group"], row["op"], about, *found)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled steps of one run in order, each rank's phases by (step, rank), and the collectives by arrival."""

    entry: RunEntry
    steps: list[int]
    phases: dict[tuple[int, int], Phases]
    calls: list[Call]

    def thinned(self, steps: int, ranks: int) -> "Sampled":
        """Every `steps`-th sampled step, and of these every `ranks`-th rank; who was last remains as it was."""
        kept = set(self.steps[::steps])
        phases = {(step, r): rows for (step, r), rows in self.phases.items() if step in kept and r % ranks == 0}
        calls = [call for call in self.calls if call.step in kept]
        drawn = [replace(c, records={r: record for r, record in c.records.items() if r % ranks == 0}) for c in calls]
        return Sampled(self.entry, self.steps[::steps], phases, drawn)


def sampled(folder: Path, run: RunFile) -> list[Sampled]:
    """The sampled steps of all runs that have any, on the common clock; raises Refused where a file is damaged."""
    table = load_table(folder, "spans").sort_by([("run", "ascending"), ("begin_ns", "ascending")])
    columns = (table.column(name).to_pylist() for name in ("run", "step", "rank", "phase", "begin_ns", "end_ns"))
    phases: dict[int, dict[tuple[int, int], Phases]] = {}
    for number, step, rank, phase, begin, end in zip(*columns, strict=True):
        phases.setdefault(number, {}).setdefault((step, rank), []).append((phase, begin, end))
    found = []
    for entry in run.runs:
        if entry.run in phases:
            steps = sorted({step for step, _ in phases[entry.run]})
            records = load_table(folder, "collectives", run=entry.run, steps=steps)
            found.append(Sampled(entry, steps, phases[entry.run], _joined(records)))
    return found


def _joined(table: "pa.Table") -> list[Call]:
    """Collectives from their records; of several records of one collective on one rank the first counts."""
    rows: dict[tuple[int, str, int], Mapping[str, Any]] = {}
    records: dict[tuple[int, str, int], dict[int, Record]] = {}
    stamps = ("enqueued_ns", "started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns", "bound")
    for row in table.to_pylist():
        key = row["step"], row["group"], row["seq"]
        rows.setdefault(key, row)
        records.setdefault(key, {}).setdefault(row["rank"], Record(*(row[name] for name in stamps)))
    return sorted((Call.of(rows[key], records[key]) for key in rows), key=lambda call: (call.arrived_ns, call.seq))


def thinning(found: Sequence[Sampled], most: int, *, a_record: int, a_rank: int) -> tuple[int, int]:
    """The least k for which every k-th step of each run, and beside it every l-th rank, makes at most `most` events.

    A phase or a step makes one event, a record `a_record`, a rank of a run `a_rank`. Steps are thinned first, to one of
    each run; only then ranks. Returns (k, l).
    """
    weights: dict[tuple[int, int, int], int] = {}
    for one in found:
        index = {step: i for i, step in enumerate(one.steps)}
        for (step, rank), rows in one.phases.items():
            weights[one.entry.run, index[step], rank] = 1 + len(rows)
        for call in one.calls:
            for rank in call.records:
                key = one.entry.run, index[call.step], rank
                weights[key] = weights.get(key, 0) + a_record
    cells = np.array([(*key, weight) for key, weight in weights.items()], np.int64)

    def events(every_step: int, every_rank: int) -> int:
        kept = cells[(cells[:, 1] % every_step == 0) & (cells[:, 2] % every_rank == 0)]
        return int(kept[:, 3].sum()) + a_rank * len(np.unique(kept[:, [0, 2]], axis=0))

    steps, ranks = int(cells[:, 1].max()) + 1, int(cells[:, 2].max()) + 1
    every_step = next((k for k in range(1, steps) if events(k, 1) <= most), steps)
    return every_step, next((k for k in range(1, ranks) if events(every_step, k) <= most), ranks)

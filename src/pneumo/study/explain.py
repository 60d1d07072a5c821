"""From a result's files to the accounts of its runs: what is read, in which order, for which blocks."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo.inject import read_delay
from pneumo.study import breakdown
from pneumo.study.account import Account, Reference, make_account, share_cost
from pneumo.study.breakdown import Columns, select
from pneumo.study.collectives import Group, StepKeys, durations
from pneumo.study.common_clock import bound_ns
from pneumo.study.faults import EXAMPLES, Fault, block_faults, phase_faults
from pneumo.study.joined import load
from pneumo.study.late import Clocks, late
from pneumo.study.ledger import Ledger, blocked, ledger
from pneumo.study.replay import WhatIf, what_if
from pneumo.study.schema import PHASES, Late, RunEntry, RunFile
from pneumo.study.timeline import ALONE, Delays, lanes
from pneumo.study.traffic import traffic

KINDS = ("train", "validate", "checkpoint")


class Explainer:
    """Makes the accounts of a result one run after the other, so that one run's records are in memory at a time.

    `references` says which serial run each run is compared with; `replay` adds the what-if times, which cost as much
    again.
    """

    def __init__(self, folder: Path, run: RunFile, references: Mapping[int, int], *, replay: bool = False) -> None:
        self._folder, self._chosen, self._replay = folder, references, replay
        self._entries = {entry.run: entry for entry in run.runs}
        self._config, self._clock = run.config, run.clock
        self._latest: tuple[int, Columns] | None = None
        self._made: dict[tuple[int, str], Reference | None] = {}

    def account(self, entry: RunEntry, kind: str = "train") -> Account | None:
        """The account of a run's rows of one kind; None where it has none. Raises Refused for a damaged file.

        Against its reference over the blocks that both have, without one over all blocks that are timed.
        """
        of_run = self._steps_of(entry.run)
        rows = self._timed(of_run, entry, kind)
        reference = self._reference(self._chosen.get(entry.run), kind)
        shared = set(rows["block"].tolist()) & set(reference.ledger.blocks if reference else ())
        if reference is not None and shared:
            rows = select(rows, np.isin(rows["block"], sorted(shared)))
        if not rows["block"].size:
            return None
        alone = select(of_run, np.isin(of_run["kind"], ALONE) & (kind == "train"))
        sums = ledger(rows, entry.ranks, alone)
        keys = StepKeys.of(rows, of_run)
        groups, faults = load(self._folder, entry, keys)
        faults |= {"silent": _silent(sums, groups), "phases": phase_faults(rows)}
        if kind == "train":
            faults["blocks"] = block_faults(breakdown.of_kind(of_run, kind), self._timed(of_run, entry, kind), entry)
        shares = None
        if reference is not None and shared:
            reference = replace(reference, ledger=reference.ledger.only(sums.blocks))
            shares = share_cost(rows, sums.blocks, entry.ranks, reference)
        lateness, replayed = self._dynamics(kind, groups, rows, keys, entry, alone)
        return make_account(
            entry,
            kind,
            sums,
            blocked(groups, sums.images.shape),
            reference if shared else None,
            shares,
            injected(self._config, kind),
            num_waits=sum(int(group.blocked.sum()) for group in groups),
            clock_ns=bound_ns(self._clock, entry.ranks),
            faults={kind: fault for kind, fault in faults.items() if fault.count},
            durations=durations(groups),
            late=lateness,
            what_if=replayed,
            traffic=traffic(groups, keys),
        )

    def _dynamics(
        self, kind: str, groups: list[Group], rows: Columns, keys: StepKeys, entry: RunEntry, alone: Columns
    ) -> tuple[list[Late], WhatIf | None]:
        """Who was late, and of training the replay where it was asked for; of rows that all ranks have."""
        if not groups or breakdown.timed(rows, entry)["step"].size < rows["step"].size:
            return [], None
        laid = lanes(rows, keys, entry.ranks, alone)
        clocks = Clocks.of(rows, (keys.step.size, entry.ranks))
        found = late(groups, laid, clocks, other="checkpoint" if kind == "checkpoint" else "other")
        replay = self._replay and kind == "train"
        return found, what_if(groups, laid, Delays.of(rows, laid)) if replay else None

    def _steps_of(self, run: int) -> Columns:
        """All steps of a run, kept until another run's are asked for: the kinds of one are asked for in turn."""
        if self._latest is None or self._latest[0] != run:
            self._latest = None  # not two at a time: they may be millions of rows
            self._latest = run, breakdown.all_steps(self._folder, run)
        return self._latest[1]

    def _timed(self, steps: Columns, entry: RunEntry, kind: str) -> Columns:
        rows = breakdown.of_kind(steps, kind)
        if kind == "train":
            return breakdown.timed(rows, entry)
        return select(rows, ~rows["warmup"].astype(bool) & ~_amid_training(rows, steps))

    def _reference(self, run: int | None, kind: str) -> Reference | None:
        if run is None:
            return None
        if (run, kind) not in self._made:
            entry = self._entries[run]
            of_run = self._steps_of(run)
            rows = self._timed(of_run, entry, kind)
            if rows["block"].size:
                alone = select(of_run, np.isin(of_run["kind"], ALONE) & (kind == "train"))
                # A share of a training step says nothing of a step of another kind.
                shares = select(of_run, (of_run["kind"] == "share") & (kind == "train"))
                self._made[run, kind] = Reference.of(entry, rows, shares, ledger(rows, entry.ranks, alone))
            else:
                self._made[run, kind] = None
        return self._made[run, kind]


def _amid_training(rows: Columns, steps: Columns) -> NDArray[np.bool_]:
    """Which rows (n,) begin before their block's training has ended: its account has them, as what a rank did alone."""
    training = breakdown.of_kind(steps, "train")
    blocks, index = np.unique(training["block"], return_inverse=True)
    if not blocks.size:
        return np.zeros(rows["block"].shape, bool)
    end = np.full(blocks.size, np.iinfo(np.int64).min)
    np.maximum.at(end, index, training["begin_ns"] + training["wall_ns"])
    found = np.minimum(np.searchsorted(blocks, rows["block"]), blocks.size - 1)
    return np.asarray((blocks[found] == rows["block"]) & (rows["begin_ns"] < end[found]))


def _silent(sums: Ledger, groups: Iterable[Group]) -> Fault:
    """Members of a group that have no record in it, and ranks that were blocked on others and have none in any."""
    said: dict[bool, set[int]] = {True: set(), False: set()}
    for group in groups:
        there = group.present.any(0)
        for some in said:
            said[some].update(group.ranks[there == some].tolist())
    comm = sums.wall["comm"].sum(0)
    blocked = set(np.flatnonzero(comm > 0).tolist()) if comm.size > 1 else set()
    ranks = sorted(said[False] | (blocked - said[True]))
    return Fault(len(ranks), tuple(f"rank {rank}" for rank in ranks[:EXAMPLES]))


def injected(config: Mapping[str, Any], kind: str = "train") -> dict[tuple[int | None, str], float]:
    """Seconds of sleep that --inject put into each row of a kind, by (rank or None for all, phase).

    `inject` is one text as on the command line ("rank=1,phase=backward,delay=20ms") or a mapping, or a list of these.
    What delays a validation sleeps in its forward pass, in each batch.
    """
    found: dict[tuple[int | None, str], float] = {}
    phases = {"train": {phase: phase for phase in PHASES}, "validate": {"validate": "forward"}}.get(kind, {})
    given = config.get("inject") or ()
    for one in [given] if isinstance(given, str | Mapping) else given:
        fields = dict(part.split("=", 1) for part in one.split(",")) if isinstance(one, str) else dict(one)
        if fields.get("cause") in (None, "sleep") and fields.get("phase") in phases:
            rank = None if fields.get("rank") in (None, "all") else int(fields["rank"])
            key = rank, phases[str(fields["phase"])]
            delay = fields.get("delay_s") or fields.get("delay") or 0.0
            with_unit = read_delay(str(delay))
            found[key] = found.get(key, 0.0) + (float(delay) if with_unit is None else with_unit)
    return found

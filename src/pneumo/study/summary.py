"""summary.json from the other files of a result: the same files give the same summary, whenever it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pneumo.study import breakdown, entries
from pneumo.study.account import Account
from pneumo.study.boxes import Detections, load_detections
from pneumo.study.breakdown import Block
from pneumo.study.detection import detection_quality, map_difference
from pneumo.study.explain import KINDS, Explainer
from pneumo.study.metrics import Predictions, natural_prevalence, persons, quality, subgroups, youden_threshold
from pneumo.study.results import load_run, load_table, write_json
from pneumo.study.rivals import Steps, rivals
from pneumo.study.schema import AucDifference, MapDifference, Row, RunEntry, RunFile, Spread, Summary, Verdict
from pneumo.study.statistics import Estimate, compare, delong_difference, mcnemar, median


@dataclass(frozen=True, slots=True)
class Timing:
    """What the timed steps of one run come to."""

    entry: RunEntry
    blocks: dict[int, Block]
    steps: int
    warmup_steps: int
    cpu_s: float

    @property
    def total_s(self) -> float:
        """Seconds over all timed blocks."""
        return math.fsum(block.seconds for block in self.blocks.values())

    @property
    def images(self) -> int:
        """Images of all ranks over all timed blocks."""
        return sum(block.images for block in self.blocks.values())


@dataclass(frozen=True, slots=True)
class Answers:
    """One run's predictions on validation patients, ordered by patient, and its threshold from the calibration part."""

    validate: Predictions
    threshold: float
    boxes: Mapping[str, Detections] | None = None  # of a detector, by part

    @property
    def right(self) -> Any:
        """Which answers were right, (n,) bool."""
        return (self.validate.score >= self.threshold) == self.validate.label.astype(bool)


@dataclass(frozen=True, slots=True)
class Derived:
    """What a result's files come to: its summary, and the accounts of its rows by kind and run number."""

    summary: Summary
    accounts: dict[str, dict[int, Account]]


def summarize(folder: Path, *, write: bool = True) -> Summary:
    """Derive the summary of a result, and write it to summary.json unless told otherwise; raises as `derive` does."""
    return derive(folder, write=write).summary


def derive(folder: Path, *, write: bool = False) -> Derived:
    """Derive the summary and accounts of a result, and write the summary to summary.json where told to.

    A run without a whole timed block has no row. Raises Refused where run.json or a table is missing or damaged.
    """
    run = load_run(folder)
    answers = load_answers(folder)
    timings = [t for entry in run.runs if (t := _timing(breakdown.training_steps(folder, entry.run), entry)).blocks]
    chosen = references(timings)
    explainer = Explainer(folder, run, chosen, replay=True)
    by_run = {timing.entry.run: timing for timing in timings}
    first = quality_reference(timings)
    rows, accounts = [], {kind: dict[int, Account]() for kind in KINDS}
    for timing in timings:
        reference = by_run.get(chosen.get(timing.entry.run, -1))
        made = {kind: found for kind in KINDS if (found := explainer.account(timing.entry, kind)) is not None}
        rows.append(_row(run, timing, reference, made, answers, first))
        for kind, account in made.items():
            accounts[kind][timing.entry.run] = account
    steps = [Steps.of(account) for account in accounts["train"].values()]
    summary = Summary(study=run.study, cores=run.cores, rows=rows, comparisons=rivals(steps))
    if write:
        write_json(folder / "summary.json", summary)
    return Derived(summary, accounts)


def _timing(steps: breakdown.Columns, entry: RunEntry) -> Timing:
    timed = breakdown.timed(steps, entry)
    count = len(set(zip(timed["block"].tolist(), timed["step"].tolist(), strict=True)))
    warmup = breakdown.warmup_steps(steps, entry)
    return Timing(entry, breakdown.blocks(timed), count, warmup, breakdown.cpu_seconds(timed))


def _speed(timing: Timing) -> float:
    return timing.images / timing.total_s


def references(timings: list[Timing]) -> dict[int, int]:
    """Which serial run each run is compared with, by run number; empty where there is no serial run.

    The fastest serial run with as many threads a rank, else the one with the fewest threads; serial runs with other
    threads are compared with that one too.
    """
    serial = [timing for timing in timings if timing.entry.backend == "serial"]
    if not serial:
        return {}
    fewest = min(timing.entry.threads for timing in serial)
    main = max((t for t in serial if t.entry.threads == fewest), key=_speed)
    chosen = {}
    for timing in timings:
        alike = [t for t in serial if t.entry.threads == timing.entry.threads]
        is_serial = timing.entry.backend == "serial"
        chosen[timing.entry.run] = (main if is_serial or not alike else max(alike, key=_speed)).entry.run
    return chosen


def quality_reference(timings: list[Timing]) -> int | None:
    """The run whose answers the others are compared with: the serial one that `references` gives to serial runs."""
    chosen = references(timings)
    return next((chosen[t.entry.run] for t in timings if t.entry.backend == "serial"), None)


def attainable(entry: RunEntry, reference: RunEntry, cores: int) -> float:
    """The largest speedup that the hardware allows: by the cores that both can use, on other devices by the ranks."""
    if entry.device != "cpu":
        return float(entry.ranks)
    return min(entry.ranks * entry.threads, cores) / min(reference.ranks * reference.threads, cores)


def _spread(estimate: Estimate, divisor: float = 1.0) -> Spread:
    return Spread(median=estimate.value / divisor, low=estimate.low / divisor, high=estimate.high / divisor)


def _row(
    run: RunFile,
    timing: Timing,
    reference: Timing | None,
    accounts: Mapping[str, Account],
    answers: Mapping[int, Answers],
    first: int | None,
) -> Row:
    entry = timing.entry
    time = median([block.seconds for block in timing.blocks.values()])
    return Row(
        run=entry.run,
        model=entry.model,
        backend=entry.backend,
        comm=entry.comm,
        ranks=entry.ranks,
        threads=entry.threads,
        blocks=len(timing.blocks),
        steps=timing.steps,
        images=timing.images,
        warmup_steps=timing.warmup_steps,
        total_s=timing.total_s,
        time_s=_spread(time),
        images_per_s=_speed(timing),
        state_bytes=entry.state_bytes,
        step_peak_bytes=entry.step_peak_bytes,
        cpu_s=timing.cpu_s,
        **entries.of_training(accounts.get("train")),
        accounts={kind: entries.of_kind(account) for kind, account in accounts.items() if kind != "train"},
        **({"interval_kind": time.kind} | _against(timing, reference, run.cores)),
        **_quality(run, answers.get(entry.run), answers.get(first) if first not in (None, entry.run) else None),
    )


def _against(timing: Timing, reference: Timing | None, cores: int) -> dict[str, Any]:
    """The fields of a row that need a serial reference."""
    found: dict[str, Any] = {"speedup": None, "efficiency": None}
    if reference is None:
        return found
    ranks = timing.entry.ranks
    comparison = compare(_speeds(timing), _speeds(reference))
    if comparison is None:
        return found
    found |= {
        "speedup": _spread(comparison.ratio),
        "efficiency": _spread(comparison.ratio, ranks),
        "attainable": comparison.ratio.value / attainable(timing.entry, reference.entry, cores),
        "reference_threads": reference.entry.threads,
        "interval_kind": comparison.ratio.kind,
    }
    if reference is not timing:
        found["verdict"] = Verdict(
            verdict=comparison.verdict, margin=comparison.margin, more_blocks=comparison.more_blocks
        )
    return found


def _speeds(timing: Timing) -> dict[int, float]:
    return {number: block.images_per_s for number, block in timing.blocks.items()}


def load_answers(folder: Path) -> dict[int, Answers]:
    """The answers of each run that has validated; of a patient that occurs more than once the last row counts.

    Raises Refused where a table is damaged.
    """
    table = breakdown.columns(load_table(folder, "predictions"))
    # Compared with a threshold as doubles everywhere: NumPy would round the threshold to the scores' precision.
    table["score"] = table["score"].astype(np.float64)
    boxes, found = load_detections(folder), {}
    for run in np.unique(table["run"]).tolist():
        parts = {}
        for part in ("calibrate", "validate"):
            where = np.flatnonzero((table["run"] == run) & (table["part"] == part))
            last = {table["patient"][i]: i for i in where.tolist()}
            index = np.array([last[patient] for patient in sorted(last)], dtype=np.int64)
            parts[part] = Predictions(*(table[name][index] for name in Predictions.__slots__))
        if parts["validate"].label.size:
            threshold = youden_threshold(parts["calibrate"].label, parts["calibrate"].score)
            found[int(run)] = Answers(parts["validate"], threshold, boxes.get(int(run)))
    return found


def _quality(run: RunFile, ours: Answers | None, theirs: Answers | None) -> dict[str, Any]:
    """The fields of a row about quality; `theirs` are the serial reference's answers, None for itself."""
    if ours is None:
        return {"metrics": {}, "intervals": {}}
    part, prevalence = ours.validate, natural_prevalence(run)
    person = persons(part.person)
    measured = quality(part.label, part.score, threshold=ours.threshold, natural_prevalence=prevalence, person=person)
    found: dict[str, Any] = {"metrics": measured.metrics, "intervals": measured.intervals}
    if ours.boxes is not None:
        located = detection_quality(ours.boxes["validate"], ours.boxes["calibrate"])
        found = {"metrics": measured.metrics | located.metrics, "intervals": measured.intervals | located.intervals}
    found["subgroups"] = subgroups(part, ours.threshold)
    if theirs is not None and np.array_equal(part.patient, theirs.validate.patient):
        found["mcnemar_p"] = mcnemar(ours.right, theirs.right)
        if 0 < part.label.sum() < part.label.size:
            d = delong_difference(part.label, part.score, theirs.validate.score)
            found["auc_difference"] = AucDifference(estimate=d.value, low=d.low, high=d.high, p=d.p)
        if ours.boxes is not None and theirs.boxes is not None and ours.boxes["validate"].positive.any():
            e = map_difference(ours.boxes["validate"], theirs.boxes["validate"])
            found["map_difference"] = MapDifference(estimate=e.value, low=e.low, high=e.high)
    return found

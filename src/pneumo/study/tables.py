"""The printed tables: comparison, breakdown, account, quality; readable in 120 columns by someone new to them."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console, RenderableType
from rich.text import Text

from pneumo.study import breakdown, losses
from pneumo.study.breakdown import RankPhases
from pneumo.study.cells import (
    NOTHING,
    add_columns,
    between,
    compared_blocks,
    decimals,
    legend,
    limits,
    name_of,
    names_of,
    new_table,
    number,
    percent,
    put,
    spread,
)
from pneumo.study.common_clock import describe
from pneumo.study.metrics import MIN_SUBGROUP, is_sample, natural_prevalence
from pneumo.study.results import load_run
from pneumo.study.schema import PHASES, Row, RunEntry, RunFile, Summary
from pneumo.study.standings import standings
from pneumo.study.summary import Derived, derive

WIDTH = 100
MAX_RANKS = 16


def make_console(file: IO[str] | None = None) -> Console:
    """A console for tables: as wide as the terminal, or 100 columns and plain where the output is none."""
    file = file or sys.stdout
    # Launchers give their ranks a pseudo-terminal whatever their own output is: it says nothing of where lines end up.
    terminal = file.isatty() and "PMIX_RANK" not in os.environ and "PMI_RANK" not in os.environ
    width = None if terminal else WIDTH
    return Console(file=file, width=width, force_terminal=terminal, highlight=False, emoji=False, markup=False)


def show(folder: Path, console: Console | None = None, derived: Derived | None = None) -> None:
    """Print everything about a result: comparison, verdicts, breakdown, account, quality, and where the files are.

    What is derived from the files is made anew unless given. Raises Refused where they are missing or damaged.
    """
    console, run = console or make_console(), load_run(folder)
    derived = derived or derive(folder)
    summary, accounts = derived.summary, derived.accounts
    parts = (
        *(comparison(run, summary), per_rank(folder, run, summary)),
        *(losses.losses(run, summary, accounts), standings(run, summary)),
        *(losses.per_rank(run, summary, accounts["train"]), losses.late(run, summary)),
        *(losses.what_if(run, summary, accounts["train"]), localization(run, summary)),
        *(quality(run, summary), groups(summary)),
    )
    for part in parts:
        shown = False
        for item in part:
            put(console, item)
            shown = True
        if shown:
            console.print()
    console.print(Text.assemble("Results: ", (str(folder), "bold")), soft_wrap=True)
    if run.state != "done":
        console.print(Text(f"This study is not complete (state: {run.state}).", style="bold"))


def comparison(run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """The comparison: time, speed, speedup and efficiency of every run, absent ones marked, and how to read it."""
    table, reasons = new_table(f"Comparison: {run.study}"), list(dict.fromkeys(absent.why for absent in run.absent))
    add_columns(table, "backend<", "comm<", "ranks x\nthreads", "block s\nlow-high", "images\n/s", "speedup\nlow-high")
    located = any("map50" in row.metrics for row in summary.rows)
    add_columns(table, "efficiency\nlow-high", "of\nmax", "mAP\n@0.5" if located else "accu-\nracy %", "AUC")
    second_digits = decimals([row.time_s.median for row in summary.rows])
    image_digits = decimals([row.images_per_s for row in summary.rows])
    for row in summary.rows:
        table.add_row(
            *(row.backend, row.comm, f"{row.ranks} x {row.threads}"),
            *(spread(row.time_s, second_digits), number(row.images_per_s, image_digits)),
            *(spread(row.speedup), spread(row.efficiency), number(row.attainable, 2)),
            number(row.metrics.get("map50"), 3) if located else percent(row.metrics.get("accuracy")),
            number(row.metrics.get("auc"), 3),
        )
    for absent in run.absent:
        mark = f"absent {_mark(reasons.index(absent.why))}"
        cells = [f"{absent.ranks} x -", NOTHING, NOTHING, mark, *[NOTHING] * 4]
        table.add_row(absent.backend, absent.comm, *cells, style="dim")
    yield table
    for i, why in enumerate(reasons):
        yield Text(f"{_mark(i)} {why}")
    yield legend(
        [*_how_to_read(run, summary), *_shared_cores(run, summary), *_conditions(run, summary), *_verdicts(summary)]
    )


def _mark(i: int) -> str:
    return f"({chr(ord('a') + i % 26)})"


def _how_to_read(run: RunFile, summary: Summary) -> Iterable[tuple[str, str]]:
    rows = summary.rows
    if not rows:
        yield "runs", "none has a whole timed block yet"
        return
    steps = between(steps for row in rows for steps in (row.steps // row.blocks, -(-row.steps // row.blocks)))
    steps += " step each" if steps == "1" else " steps each"
    yield (
        "block",
        f"from the first rank's begin to the last rank's end: median of {between(r.blocks for r in rows)} timed blocks "
        f"({steps}), the runs in turns; {between(r.warmup_steps for r in rows)} warm-up steps not counted",
    )
    if run.early_stopping is not None and (said := run.early_stopping.sentence):
        yield "blocks", said
    yield "clock", describe(run)
    if any(row.speedup for row in rows):
        yield "speedup", "against the fastest serial run with as many threads a rank, block by block"
        yield "efficiency", "speedup / ranks"
        resources = "ranks"
        if {entry.device for entry in run.runs} == {"cpu"}:
            resources = "(cores that the run can use / cores that its serial run can use)"
        yield "of max", f"speedup / {resources}: how much of what the hardware allows was reached"
        yield from compared_blocks(rows)
    else:
        yield "speedup", "none, since no serial run is there to compare with"
    ranges = [row for row in rows if row.interval_kind == "range"]
    if len(ranges) < len(rows):
        yield "low-high", "95 % interval (of the median: sign test; of ratios: Hodges-Lehmann, exact signed rank)"
    if ranges:
        which = "" if len(ranges) == len(rows) else f" for {names_of(ranges)}"
        yield "low-high", f"only the range of the blocks{which}: an interval needs 6 blocks"
    majority = next((row.metrics["majority"] for row in rows if "majority" in row.metrics), None)
    if majority is not None:
        yield "accuracy", f"always giving the more frequent answer would score {percent(majority)} % (majority rate)"


def _shared_cores(run: RunFile, summary: Summary) -> Iterable[tuple[str, str]]:
    """What must be said where there are more ranks than cores, and of the serial run that has them all."""
    devices = {entry.run: entry.device for entry in run.runs}
    cpu = [row for row in summary.rows if devices[row.run] == "cpu" and row.ranks > 1]
    crowded = sorted({row.ranks for row in cpu if row.ranks * row.threads > run.cores})
    if crowded:
        cores = f"{run.cores} core{'s' if run.cores > 1 else ''}"
        told = ", ".join(f"{ranks} ranks on {cores}" for ranks in crowded)
        yield "cores", f"{told}: they take turns, so {run.cores}x is the most there is"
    several = [row for row in summary.rows if row.backend == "serial" and row.threads > 1]
    if several:
        row = several[0]
        beat = f"one process with {row.threads} threads: what ranks on a node have to beat"
        counted = "compared with serial of fewer threads; its efficiency counts processes, not cores"
        yield f"{row.ranks} x {row.threads}", f"{beat} ({counted})"


def _conditions(run: RunFile, summary: Summary) -> Iterable[tuple[str, str]]:
    """In what the runs compared differ, beside what their names say."""
    unlike = [row for row in summary.rows if row.backend != "serial" and row.reference_threads != row.threads]
    if any(row.speedup for row in unlike):
        yield "threads", f"compared with a serial run of other threads: {names_of(unlike)}"
    bound: dict[str, list[RunEntry]] = defaultdict(list)
    for entry in run.runs:
        bound[entry.binding].append(entry)
    yield "binding", "; ".join(f"{binding} ({names_of(entries)})" for binding, entries in bound.items())


def _verdicts(summary: Summary) -> Iterable[tuple[str, str]]:
    """Which runs are faster than serial, slower, as fast, or undecided."""
    together: dict[tuple[str, int | None], list[Row]] = defaultdict(list)
    margin = 0.0
    for row in summary.rows:
        if row.verdict is not None:
            together[row.verdict.verdict, row.verdict.more_blocks].append(row)
            margin = row.verdict.margin
    for word in ("faster", "slower", "equivalent", "undecided"):
        phrases = []
        for (verdict, more), rows in together.items():
            if verdict == word:
                blocks = f"block{'s' if more != 1 else ''}"
                each = "each: " if len(rows) > 1 else ""
                phrases.append(names_of(rows) + (f" ({each}about {more} more {blocks} would decide)" if more else ""))
        if phrases:
            meaning = {"equivalent": f"as fast as serial within {margin:.0%}", "undecided": "against serial"}
            yield word, f"{meaning.get(word, 'than serial')}: {'; '.join(phrases)}"


def per_rank(folder: Path, run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """The breakdown: for each rank of each run the seconds of the six phases, which sum to the wall time."""
    if not summary.rows:
        return
    steps, entries = breakdown.training_steps(folder), {entry.run: entry for entry in run.runs}
    table = new_table("Where each rank's time went (seconds over the timed steps)")
    add_columns(table, "run<", "rank", *PHASES, "= wall", "compute\n%", "comm\n%")
    for row in summary.rows:
        ranks = breakdown.by_rank(breakdown.timed(steps, entries[row.run]))
        shown = _notable(ranks)
        digits = min(2, decimals([max(rank.wall_s for rank in ranks)]))
        for i, rank in enumerate(shown):
            table.add_row(name_of(row) if i == 0 else "", str(rank.rank), *_seconds(rank, digits))
        if len(shown) < len(ranks):
            table.add_row("", f"+{len(ranks) - len(shown)}", *["..."] * 9, style="dim")
        if len(ranks) > 1:
            table.add_row("", "mean", *_seconds(breakdown.mean_of(ranks), digits), style="bold")
    yield table
    yield legend(_about_phases(run, summary))


def _seconds(rank: RankPhases, digits: int) -> list[str]:
    seconds = [number(rank.seconds[phase], digits) for phase in PHASES]
    return [*seconds, number(rank.wall_s, digits), percent(rank.compute), percent(rank.comm)]


def _notable(ranks: list[RankPhases]) -> list[RankPhases]:
    """All ranks where they are few, else those that compute least and most."""
    if len(ranks) <= MAX_RANKS:
        return ranks
    by_compute = sorted(ranks, key=lambda rank: rank.compute)
    return sorted(by_compute[: MAX_RANKS // 4] + by_compute[-MAX_RANKS // 4 :], key=lambda rank: rank.rank)


def _about_phases(run: RunFile, summary: Summary) -> Iterable[tuple[str, str]]:
    yield "data", "waiting for the next batch"
    yield "comm", "blocked: on ranks that come later, or on data on its way"
    yield "other", "what is in none of the phases named"
    yield "compute", "forward, backward and optimizer, in per cent of the wall time"
    yield "clock", describe(run)
    if any(row.ranks > MAX_RANKS for row in summary.rows):
        yield "+n", "that many more ranks are in steps.parquet; shown are those that compute least and most"
    notes: dict[str, list[RunEntry]] = defaultdict(list)
    for entry in run.runs:
        if entry.note:
            notes[entry.note].append(entry)
    for note, entries in notes.items():
        yield "note", f"{names_of(entries)}: {note}"


def localization(run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """How well a detector finds where the opacities are, on validation patients."""
    rows = [row for row in summary.rows if "map50" in row.metrics]
    if not rows:
        return
    table = new_table("Localization on validation patients")
    add_columns(table, "run<", "mAP@0.5\nlow-high", "positives\nalone", "mAP@\n.5:.95", "RSNA score\nlow-high")
    add_columns(table, "preci-\nsion %", "re-\ncall %", "FROC\nmean", "sens at\n1 FP %")
    for row in rows:
        m = row.metrics
        table.add_row(
            name_of(row),
            limits(m["map50"], row.intervals.get("map50"), lambda value: number(value, 3)),
            *(number(m["map50_positives"], 3), number(m["map50_95"], 3)),
            limits(m["rsna_map"], row.intervals.get("rsna_map"), lambda value: number(value, 3)),
            *(percent(m["precision"]), percent(m["recall"]), number(m["froc_mean"], 3), percent(m["froc_1"])),
        )
    yield table
    yield legend(_about_localization(run, rows))


def _about_localization(run: RunFile, rows: Sequence[Row]) -> Iterable[tuple[str, str]]:
    m = rows[0].metrics
    yield "mAP", f"COCO's, over {m['n']} images, {m['positives']} of them positive (positives: over these alone)"
    yield (
        "RSNA score",
        "the challenge's: IoU above 0.4 to 0.75, means over images; boxes from a confidence on that was chosen on the "
        "calibration part, for each run its own; precision and recall at the same, IoU 0.5",
    )
    yield "FROC", "sensitivity, of true boxes, with at most 1/8 to 8 false positives an image"
    yield "low-high", f"95 % interval (bootstrap over {_independent(run, m)})"
    differences = [row.map_difference for row in rows if row.map_difference]
    if differences:
        d = max(differences, key=lambda found: abs(found.estimate))
        yield (
            "mAP@0.5",
            f"largest difference from serial {d.estimate:+.3f}, paired interval {d.low:+.3f} to {d.high:+.3f}, of the "
            "same images: beside it, rounding makes trainings of a detector end elsewhere",
        )


def quality(run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """The quality on validation patients, and whether it differs from the serial run's."""
    rows = [row for row in summary.rows if "accuracy" in row.metrics]
    if not rows:
        return
    table = new_table("Quality on validation patients")
    add_columns(table, "run<", "accuracy %\nlow-high", "sens\n%", "spec\n%", "PPV\n%", "NPV\n%", "PPV\nnat%")
    add_columns(table, "NPV\nnat%", "AUC\nlow-high", "Brier", "p vs\nserial")
    for row in rows:
        m = row.metrics
        table.add_row(
            name_of(row),
            limits(m["accuracy"], row.intervals.get("accuracy"), percent),
            *(percent(m[name]) for name in ("sensitivity", "specificity", "ppv", "npv", "ppv_natural", "npv_natural")),
            limits(m["auc"], row.intervals.get("auc"), lambda value: number(value, 3)),
            *(number(m["brier"], 3), number(row.mcnemar_p, 2)),
        )
    yield table
    yield legend(_about_quality(run, rows))


def _about_quality(run: RunFile, rows: Sequence[Row]) -> Iterable[tuple[str, str]]:
    m = rows[0].metrics
    disjoint = "no person is in two parts"
    if run.data.split_by == "image" and not is_sample(run):
        disjoint = "no mapping to persons was given, so images, not persons, are disjoint from the training's"
    yield "patients", f"{m['n']} images never trained on, {m['positives']} of them positive; {disjoint}"
    yield "accuracy", f"always giving the more frequent answer would score {percent(m['majority'])} % (majority rate)"
    yield "threshold", "Youden's J on the calibration part, for each run its own"
    whose = "of all the data's images"
    if is_sample(run):
        whose = "of RSNA's patients: half of the sample is positive by construction"
    yield "nat%", f"PPV and NPV at the natural prevalence, {percent(natural_prevalence(run))} % {whose}"
    methods = "accuracy Wilson, AUC DeLong"
    if "persons" in m:
        methods = f"bootstrap over {_independent(run, m)}; p and differences of AUC take images as independent"
    yield "low-high", f"95 % interval ({methods})"
    if any(row.mcnemar_p is not None for row in rows):
        yield "p vs serial", "McNemar's exact test of the answers to the same patients; small: they differ"
    differences = [row.auc_difference for row in rows if row.auc_difference]
    if differences:
        d = max(differences, key=lambda found: abs(found.estimate))
        yield "AUC", f"largest difference from serial {d.estimate:+.4f}, paired interval {d.low:+.4f} to {d.high:+.4f}"


def _independent(run: RunFile, metrics: Mapping[str, int | float | None]) -> str:
    """What a bootstrap draws."""
    if "persons" in metrics:
        return f"{metrics['persons']} persons"
    return "images" if is_sample(run) else "images, as if each were of another person"


def groups(summary: Summary) -> Iterable[RenderableType]:
    """The quality by view, sex and age group: of the first run, with the range over all runs beside it."""
    rows = [row for row in summary.rows if row.subgroups]
    if not rows:
        return
    table = new_table(f"Quality by view, sex and age ({name_of(rows[0])})")
    add_columns(
        table, "group<", "images", "positive\n%", "accuracy %\nlow-high", "AUC\nlow-high", "accuracy %\nall runs"
    )
    everywhere: dict[tuple[str, str], list[float]] = defaultdict(list)
    for group in (group for row in rows for group in row.subgroups):
        everywhere[group.by, group.group].append(group.accuracy)
    for group in rows[0].subgroups:
        accuracies = everywhere[group.by, group.group]
        table.add_row(
            *(f"{group.by} {group.group}", str(group.n), percent(group.positives / group.n)),
            limits(group.accuracy, group.accuracy_interval, percent),
            limits(group.auc, group.auc_interval, lambda value: number(value, 3)),
            f"{percent(min(accuracies))}-{percent(max(accuracies))}",
        )
    yield table
    yield Text(f"Groups of at least {MIN_SUBGROUP} images with both labels.")

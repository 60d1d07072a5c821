"""The report on a data folder: read in parallel by Dask's threads, shown as tables, written as JSON."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pneumo.data import metadata
from pneumo.data.rsna import (
    CLASSES,
    Patient,
    Quarantined,
    count_reasons,
    read_mapping,
    read_tables,
)

if TYPE_CHECKING:
    from rich.table import Table

    from pneumo.data.inspect import Inspection

REPORT_EVERY_S: Final = 30.0
MOST_ROWS: Final = 100
"""Rows of the quarantine's table; its JSON has them all."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a data folder holds: the sound images, in the label table's order, and what is left out."""

    folder: str
    subjects: tuple[metadata.Subject, ...]
    quarantine: tuple[Quarantined, ...]
    by_person: bool
    """Whether a mapping told persons from images."""

    @property
    def classes(self) -> dict[str, int]:
        """Return the sound images of each class."""
        counts = Counter(metadata.class_of(subject) for subject in self.subjects)
        names = dict.fromkeys((*CLASSES, *sorted(counts)) if any(s.detailed for s in self.subjects) else sorted(counts))
        return {name: counts[name] for name in names}

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values; `images` and `classes` count sound images, `patients` distinct keys."""
        return {
            "images": len(self.subjects),
            "patients": len({subject.person for subject in self.subjects}),
            "patients_are": "persons" if self.by_person else "images",
            "positive": sum(subject.label for subject in self.subjects),
            "classes": self.classes,
            "quarantine": [asdict(entry) for entry in self.quarantine],
            "reasons": count_reasons(self.quarantine),
            "metadata": {
                "groups": metadata.tabulate(self.subjects),
                "positive_rate": {field: self._rates(field) for field in metadata.GROUPS},
                "prediction": [asdict(one) for one in metadata.predict(self.subjects)],
            },
        }

    def _rates(self, field: str) -> dict[str, dict[str, Any]]:
        rates = metadata.positive_rates(self.subjects, field)
        return {group: asdict(rate) for group, rate in rates.items()}


def check(root: Path, mapping: Path | None, threads: int) -> Report:
    """Read a whole data folder. Raises Refused where its tables or the mapping cannot be read."""
    from pneumo.data.inspect import quarantine_of

    persons = read_mapping(mapping) if mapping else {}
    patients, quarantine = read_tables(root)
    inspections = inspect_all(patients, threads)
    inside = quarantine_of(patients, inspections)
    left_out = {entry.patient for entry in inside}
    subjects = tuple(
        metadata.Subject(
            label=patient.label,
            detailed=patient.detailed,
            sex=seen.sex,
            age=seen.age,
            view=seen.view,
            person=persons.get(patient.patient_id, patient.patient_id),
        )
        for patient, seen in zip(patients, inspections, strict=True)
        if patient.patient_id not in left_out
    )
    return Report(root.resolve().name, subjects, (*quarantine, *inside), bool(persons))


def inspect_all(patients: Sequence[Patient], threads: int) -> list["Inspection"]:
    """Inspect every patient's file with Dask's threads (decoders release the GIL); the order given is kept."""
    import dask.bag

    from pneumo.data.dicom import quiet_decoders
    from pneumo.data.inspect import inspect

    if not patients:
        return []
    progress = _Progress(len(patients))

    def some(part: Sequence[Patient]) -> list["Inspection"]:
        found = []
        for patient in part:
            found.append(inspect(patient, ())[0])
            progress.advance()
        return found

    at_once = max(1, min(64, len(patients) // (4 * threads)))
    bag = dask.bag.from_sequence(patients, partition_size=at_once)  # type: ignore[no-untyped-call]
    with quiet_decoders():
        return list(bag.map_partitions(some).compute(scheduler="threads", num_workers=threads))


def show(report: Report) -> None:
    """Print the report. Off a terminal lines are as long as they need to be, so that no id is cut."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 250, highlight=False, markup=False, emoji=False)
    images, positive = len(report.subjects), sum(subject.label for subject in report.subjects)
    persons = len({subject.person for subject in report.subjects})
    people = f"of {persons:,} persons" if report.by_person else "(images, not persons: no --mapping was given)"
    console.print(
        f"{report.folder}: {images:,} sound images {people}, {len(report.quarantine):,} left out", soft_wrap=True
    )
    if images:
        console.print(_classes_table(report, images))
        console.print(f"Lung opacity: {positive:,} of {images:,} ({positive / images:.1%})\n")
    if report.quarantine:
        console.print(_reasons_table(report))
        console.print(_quarantine_table(report))
        if len(report.quarantine) > MOST_ROWS:
            console.print(f"and {len(report.quarantine) - MOST_ROWS:,} more: --json FILE lists all\n")
    if images:
        console.print(_groups_table(report))
        _show_prediction(console.print, report)


def _table(title: str, *columns: str, texts: int = 1) -> "Table":
    """Return a table whose first `texts` columns are text, the others numbers; nothing in it is cut short."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right", overflow="fold")
    return table


def _classes_table(report: Report, images: int) -> "Table":
    table = _table("Sound images by class", "class", "images", "share")
    for name, count in report.classes.items():
        table.add_row(name, f"{count:,}", f"{count / images:.1%}")
    return table


def _reasons_table(report: Report) -> "Table":
    table = _table("Left out, by reason", "reason", "entries")
    for reason, count in count_reasons(report.quarantine).items():
        table.add_row(reason, f"{count:,}")
    return table


def _quarantine_table(report: Report) -> "Table":
    from rich.text import Text

    table = _table("Left out", "patient", "reason", "detail", texts=3)
    for entry in report.quarantine[:MOST_ROWS]:
        table.add_row(Text(entry.patient), entry.reason, Text(entry.detail))
    return table


def _groups_table(report: Report) -> "Table":
    """Return sex, age and view by class, with the rate of positives and its interval."""
    names = list(report.classes)
    table = _table("Metadata by class", "", "group", "images", *names, "positive", "95 %", texts=2)
    for field, groups in metadata.tabulate(report.subjects).items():
        rates = metadata.positive_rates(report.subjects, field)
        for i, (group, counts) in enumerate(groups.items()):
            rate = rates[group]
            numbers = [f"{counts.get(name, 0):,}" for name in names]
            interval = f"{rate.low:.1%} to {rate.high:.1%}"
            first = field if i == 0 else ""
            last = i == len(groups) - 1
            table.add_row(first, group, f"{rate.images:,}", *numbers, f"{rate.rate:.1%}", interval, end_section=last)
    return table


def _show_prediction(say: Any, report: Report) -> None:
    """Print how well the metadata foretell the label, and what that means for a network."""
    found = metadata.predict(report.subjects)
    if not found:
        say(f"Metadata alone: too few images to say (at least {metadata.FEWEST} of either label are needed)")
        return
    table = _table("The label foretold without the picture (logistic regression, out of fold)", "from", "AUC", "95 %",
                   "accuracy", "95 %", "majority")  # fmt: skip
    for one in found:
        table.add_row(
            one.features,
            f"{one.auc:.3f}",
            f"{one.auc_low:.3f} to {one.auc_high:.3f}",
            f"{one.accuracy:.1%}",
            f"{one.accuracy_low:.1%} to {one.accuracy_high:.1%}",
            f"{one.majority:.1%}",
        )
    say(table)
    say("A network has to beat these AUCs: up to there it may have learned no more than how the image was taken.")


class _Progress:
    """Says every REPORT_EVERY_S how many files are read and how long the rest will take; plain lines on stderr."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._begin = self._said = time.monotonic()
        self._lock = threading.Lock()

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            now = time.monotonic()
            if now - self._said < REPORT_EVERY_S:
                return
            self._said = now
            left = (now - self._begin) / self._done * (self._total - self._done)
            print(
                f"read {self._done:,} of {self._total:,} images, about {left:.0f} s left", file=sys.stderr, flush=True
            )

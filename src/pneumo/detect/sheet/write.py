"""From a result's folder to its sheet."""

from pathlib import Path

from pneumo import places
from pneumo.detect.sheet import cases
from pneumo.detect.sheet.images import edge
from pneumo.detect.sheet.panels import Runs, box_threshold, panels
from pneumo.errors import Refused
from pneumo.study.cells import name_of
from pneumo.study.metrics import is_sample
from pneumo.study.results import load_run, write_atomic
from pneumo.study.schema import RunEntry, RunFile
from pneumo.study.summary import Answers, load_answers

LONGEST = 60  # letters of a study's name


def write(result: Path, target: Path | None, number: int | None) -> tuple[Path, list[str]]:
    """Write a result's sheet as a PNG file; returns the file, and sentences about what it lacks.

    `target` is RESULT/sheet.png where it is None. `number` is the run whose answers are shown; None is the first serial
    one, where there is one, else the first. Raises Refused where the folder is no result that is done, has no such run
    or no answers, or the file cannot be written.
    """
    run = load_run(result)
    if run.state != "done":
        raise Refused(f"{result} is a result that is not done (state: {run.state}); a sheet is made of one that is.")
    runs = _runs(result, run, number)
    target = result / "sheet.png" if target is None else target
    places.require_file(target, "--sheet")
    entry = next(one for one in runs.entries if one.run == runs.chosen)
    shown, notes = cases.load(result, run, entry, runs.answered)

    from pneumo.detect.sheet.figure import Sheet, draw

    detector = runs.answered.boxes is not None
    score, kept = ("best box", box_threshold(runs.answered)) if detector else ("probability", None)
    sheet = Sheet(
        title=_title(run),
        subtitle=_subtitle(entry, runs.answered, score, kept),
        run=name_of(entry),
        score=score,
        threshold=runs.answered.threshold,
        kept=kept,
        counts={kind: len(found) for kind, found in cases.sort(runs.answered).items()},
        cases=shown,
        panels=panels(runs),
        notes=notes,
    )
    write_atomic(target, draw(sheet))
    return target, notes


def _runs(result: Path, run: RunFile, number: int | None) -> Runs:
    """The runs with answers, and of them the one to highlight and the one that is chosen."""
    known = {entry.run: entry for entry in run.runs}
    if number is not None and number not in known:
        raise Refused(f"--run {number}: {result} has the runs {', '.join(map(_numbered, run.runs))}.")
    answers = load_answers(result)
    entries = [entry for entry in run.runs if entry.run in answers]
    if not entries or (number is not None and number not in answers):
        whose = result if number is None else f"run {_numbered(known[number])} of {result}"
        raise Refused(f"There are no answers to validation images of {whose}, so there is nothing to show of it.")
    first = next((entry.run for entry in entries if entry.backend == "serial"), entries[0].run)
    return Runs(entries, answers, first, first if number is None else number)


def _numbered(entry: RunEntry) -> str:
    return f"{entry.run} ({name_of(entry)})"


def _title(run: RunFile) -> str:
    """Study, time, model and patients."""
    study = "".join(letter if letter.isprintable() else "?" for letter in run.study)
    study = study if len(study) <= LONGEST else f"{study[:LONGEST]}..."
    whose = " of the built-in, generated sample" if is_sample(run) else ""
    parts = ", ".join(f"{part.images} {name}" for name, part in run.data.parts.items())
    when = run.started.replace("T", " ").removesuffix("Z")
    return (
        f"Study {study} of {when} UTC: {run.runs[0].model} at {edge(run)} x {edge(run)} pixels, "
        f"{run.data.patients} patients{whose} (images: {parts})"
    )


def _subtitle(entry: RunEntry, answers: Answers, score: str, kept: float | None) -> str:
    """Whose answers are shown, and from which scores on: a detector has two thresholds, each for its own question."""
    label, threshold = answers.validate.label, answers.threshold
    positive = f"An image is called positive from a {score} of {threshold:#.3g} on (Youden's J)"
    if kept is not None:
        positive += f", a box is kept from a score of {kept:#.3g} on (the RSNA challenge's score)"
    return (
        f"Shown are answers of run {_numbered(entry)} to {label.size} validation images, {int(label.sum())} of them "
        f"with pneumonia.\n{positive}: chosen on the calibration part."
    )

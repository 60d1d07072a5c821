"""Which validation images a sheet shows, and what is drawn on each: true and predicted boxes, or the evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pneumo.detect import model
from pneumo.detect.files import Picture
from pneumo.detect.sheet.images import Shown, find
from pneumo.models import MODELS
from pneumo.study.breakdown import columns, select
from pneumo.study.results import load_table
from pneumo.study.schema import RunEntry, RunFile
from pneumo.study.summary import Answers

# A kind of answer, whether the image is positive, and whether it is called so.
KINDS: Final = {
    "true positive": (True, True),
    "false positive": (False, True),
    "false negative": (True, False),
    "true negative": (False, False),
}
EACH, EACH_WITH_EVIDENCE = 4, 3  # images of a kind; those of which the evidence is shown need twice the room
MOST_BOXES: Final = 5  # of an image, the best; an untrained detector keeps hundreds
SAME: Final = 0.01  # probabilities that differ by less are those of one model, on whatever machine

Found = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Case:
    """An image with the answer to it: its picture, uint8 (size, size), and all that is drawn on it, in its pixels.

    `truths` (t, 4) and `boxes` (p, 4), which have `scores` (p,), best first, are x, y, width, height; `evidence` (size,
    size) is from 0 to 1, the largest of this image. `score` is the image's own.
    """

    patient: str
    score: float
    picture: Picture
    truths: NDArray[np.float64]
    boxes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    evidence: NDArray[np.float32] | None = None


def sort(answers: Answers) -> Found:
    """Return of each kind the validation images that are of it, as positions, by descending score, then by patient."""
    part = answers.validate
    called, positive = part.score >= answers.threshold, part.label.astype(bool)
    order = np.lexsort((part.patient, -part.score))
    return {
        kind: order[(positive[order] == truth) & (called[order] == answer)] for kind, (truth, answer) in KINDS.items()
    }


def choose(found: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return so many of these, evenly spaced: the first, the last, and those between."""
    spaced = np.linspace(0, found.size - 1, min(most, found.size)).round().astype(int)
    return np.asarray(found[np.unique(spaced)], dtype=np.int64)


def load(result: Path, run: RunFile, entry: RunEntry, answers: Answers) -> tuple[dict[str, list[Case]], list[str]]:
    """Return the cases of each kind, and sentences about what is missing or is not as it was.

    No cases where the pictures cannot be had. Raises Refused where a table or the checkpoint is damaged.
    """
    part = answers.validate
    each = EACH_WITH_EVIDENCE if MODELS[entry.model].maps_evidence else EACH
    chosen = {kind: choose(found, each) for kind, found in sort(answers).items()}
    patients = [str(part.patient[i]) for positions in chosen.values() for i in positions]
    pictures, note = find(run, patients)
    if not pictures:
        return {}, [note] if note else []
    drawn, notes = _drawn(result, entry, {patient: pictures[patient] for patient in patients}, answers)
    scores = dict(zip(part.patient.tolist(), part.score.tolist(), strict=True))
    cases = {
        kind: [
            Case(name, scores[name], pictures[name].picture, pictures[name].truths, **drawn.get(name, {}))
            for name in map(str, part.patient[positions])
        ]
        for kind, positions in chosen.items()
    }
    return cases, ([note] if note else []) + notes


def _drawn(
    result: Path, entry: RunEntry, pictures: Mapping[str, Shown], answers: Answers
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the run says of each patient's picture, as the fields of a case, and sentences about it."""
    if entry.answers == "boxes":
        return _boxes(result, entry, pictures), []
    if not MODELS[entry.model].maps_evidence:
        return {}, []
    return _evidence(result, entry, pictures, answers)


def _boxes(result: Path, entry: RunEntry, pictures: Mapping[str, Shown]) -> dict[str, dict[str, Any]]:
    """The best boxes of each picture."""
    names = ("patient", "part", "score", "x", "y", "width", "height")
    rows = columns(load_table(result, "detections", columns=names, run=entry.run))
    rows = select(rows, rows["part"] == "validate")
    found = {}
    for patient, shown in pictures.items():
        ours = select(rows, rows["patient"] == patient)
        best = np.argsort(-ours["score"], kind="stable")[:MOST_BOXES]
        boxes = np.column_stack([ours[side][best] for side in ("x", "y", "width", "height")]).astype(np.float64)
        found[patient] = {"boxes": shown.in_picture(boxes), "scores": ours["score"][best].astype(np.float64)}
    return found


def _evidence(
    result: Path, entry: RunEntry, pictures: Mapping[str, Shown], answers: Answers
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Grad-CAM of each picture, where the run's model was kept."""
    kept = _checkpoint(result, entry)
    if kept is None:
        return {}, ["Grad-CAM needs the trained model, and this result keeps none: train with --save."]
    trained = model.load(*kept)
    if trained.size != next(iter(pictures.values())).picture.shape[0]:
        return {}, [f"There is no Grad-CAM: {kept[0]} is of another size than the pictures."]
    shown = [one.picture for one in pictures.values()]
    given = trained.answer(shown).scores
    recorded = dict(zip(answers.validate.patient.tolist(), answers.validate.score.tolist(), strict=True))
    off = float(np.max(np.abs(given - np.array([recorded[patient] for patient in pictures]))))
    notes = []
    if off > SAME:
        notes = [f"{kept[0].name} and these pictures do not give the recorded probabilities: they differ by {off:.2f}."]
    return {
        patient: {"evidence": _of_largest(evidence)}
        for patient, evidence in zip(pictures, trained.evidence(shown), strict=True)
    }, notes


def _of_largest(evidence: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = evidence.max()
    return evidence / largest if largest > 0 else evidence


def _checkpoint(result: Path, entry: RunEntry) -> tuple[Path, model.About] | None:
    """The file of a run's trained model and what it says of itself; None where it was not kept."""
    identity = (entry.model, entry.backend, entry.comm, entry.ranks, entry.threads)
    for path in _files(result / "checkpoints"):
        about = model.about(path, None)
        if (about.model, about.backend, about.comm, about.ranks, about.threads) == identity:
            return path, about
    return None


def _files(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.with_suffix(".json").is_file())

"""The curves of a sheet: of all runs, one of them highlighted, with the point at which the chosen run answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from pneumo.study import points
from pneumo.study.boxes import Detections
from pneumo.study.curves import RATES, RECALLS
from pneumo.study.detection import choose_threshold, measure
from pneumo.study.schema import RunEntry
from pneumo.study.statistics import delong
from pneumo.study.summary import Answers

LEAST_RATE: Final = min(RATES.values()) / 2  # false positives an image at the left edge, which stands for fewer as well
MOST_RATE: Final = max(RATES.values())

Floats = NDArray[np.float64]
Role = Literal["highlighted", "chosen", "other"]


@dataclass(frozen=True, slots=True)
class Line:
    """One run's curve, (p,) and (p,), with the figure that sums it up; not-a-number is left out."""

    run: RunEntry
    role: Role
    x: Floats
    y: Floats
    figure: float


@dataclass(frozen=True, slots=True)
class Panel:
    """A set of axes: what is on them (all from 0 to 1 but `rates`, false positives an image), and what a line sums to.

    `step` says which side of a point its value holds on, None that points are joined. `chance` is a line that answers
    drawn by lot would give, if any; `point` is where the chosen run answers, if that is defined. `legend` is a place
    that the curves of a good model leave free.
    """

    title: str
    x: str
    y: str
    figure: str
    lines: Sequence[Line]
    legend: str
    step: Literal["pre", "post"] | None = None
    chance: tuple[tuple[float, float], tuple[float, float]] | None = None
    point: tuple[float, float] | None = None
    rates: bool = False


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs that have answered, with their answers; `highlighted` is the one that the others are compared with."""

    entries: Sequence[RunEntry]
    answers: Mapping[int, Answers]
    highlighted: int
    chosen: int

    @property
    def answered(self) -> Answers:
        """The chosen run's answers."""
        return self.answers[self.chosen]

    def lines(self, curve: Callable[[Answers], tuple[Floats, Floats, float]]) -> list[Line]:
        """One line a run, the highlighted one first: it is broad, and the others, mostly the same, lie upon it."""
        roles: dict[int, Role] = {self.chosen: "chosen", self.highlighted: "highlighted"}
        found = [Line(run, roles.get(run.run, "other"), *curve(self.answers[run.run])) for run in self.entries]
        return sorted(found, key=lambda line: ("highlighted", "other", "chosen").index(line.role))


def panels(runs: Runs) -> list[Panel]:
    """The curves of classifiers: ROC and precision over recall; of detectors also those of the boxes."""
    label = runs.answered.validate.label
    if not 0 < label.sum() < label.size:
        return []
    if runs.answered.boxes is None:
        return [roc(runs), precision_recall(runs)]
    return [replace(roc(runs), title="ROC of images, by their best box"), box_precision_recall(runs), froc(runs)]


def roc(runs: Runs) -> Panel:
    """Sensitivity over the false positive rate, of images."""

    def curve(answers: Answers) -> tuple[Floats, Floats, float]:
        part = answers.validate
        return *points.roc(part.label, part.score), delong(part.label, part.score).value

    called, positive = _called(runs.answered), runs.answered.validate.label.astype(bool)
    return Panel(
        title="ROC",
        x="false positive rate (1 - specificity)",
        y="true positive rate (sensitivity)",
        figure="AUC",
        lines=runs.lines(curve),
        legend="lower right",
        chance=((0.0, 0.0), (1.0, 1.0)),
        point=(float(called[~positive].mean()), float(called[positive].mean())),
    )


def precision_recall(runs: Runs) -> Panel:
    """Precision over recall, of images."""

    def curve(answers: Answers) -> tuple[Floats, Floats, float]:
        recall, precision = points.precision_recall(answers.validate.label, answers.validate.score)
        area = points.average_precision(recall, precision)
        return np.append(0.0, recall), np.append(precision[0], precision), area

    called, positive = _called(runs.answered), runs.answered.validate.label.astype(bool)
    share = float(positive.mean())
    return Panel(
        title="Precision and recall",
        x="recall (sensitivity)",
        y="precision (positive predictive value)",
        figure="average precision",
        lines=runs.lines(curve),
        legend="lower left",
        step="pre",
        chance=((0.0, share), (1.0, share)),
        point=(float(called[positive].mean()), float(positive[called].mean())) if called.any() else None,
    )


def box_precision_recall(runs: Runs) -> Panel:
    """COCO's precision over recall, of boxes; the point of a threshold lies on or below it."""

    def curve(answers: Answers) -> tuple[Floats, Floats, float]:
        precision = points.box_precision(_boxes(answers))
        return RECALLS, precision, float(precision.mean())

    boxes = _boxes(runs.answered)
    at = measure(boxes, box_threshold(runs.answered), np.ones((boxes.truths.size, 1), np.int32))
    point = float(at["recall"][0]), float(at["precision"][0])
    return Panel(
        title="Precision and recall of boxes, IoU 0.5",
        x="recall (share of true boxes found)",
        y="precision (best at that recall or beyond)",
        figure="mAP@0.5",
        lines=runs.lines(curve),
        legend="lower left",
        step="pre",
        point=point if np.isfinite(point).all() else None,
    )


def froc(runs: Runs) -> Panel:
    """The share of true boxes found over false positives an image; the figure is the mean at the RATES."""

    def curve(answers: Answers) -> tuple[Floats, Floats, float]:
        rate, found = points.froc(_boxes(answers))
        mean = float(np.mean([found[rate <= at].max() for at in RATES.values()]))
        ends = max(MOST_RATE, float(rate[-1]))
        return np.append(np.maximum(rate, LEAST_RATE), ends), np.append(found, found[-1]), mean

    boxes = _boxes(runs.answered)
    kept = boxes.score >= box_threshold(runs.answered)
    hits, truths = int(boxes.hits_coco[kept, 0].sum()), int(boxes.truths.sum())
    rate = (int(kept.sum()) - hits) / boxes.truths.size
    return Panel(
        title="FROC, IoU 0.5",
        x="false positive boxes an image",
        y="share of true boxes found",
        figure="mean at 1/8 to 8",
        lines=runs.lines(curve),
        legend="lower right",
        step="post",
        point=(max(rate, LEAST_RATE), hits / truths) if truths and kept.any() and rate <= MOST_RATE else None,
        rates=True,
    )


def box_threshold(answers: Answers) -> float:
    """The score from which on a detector's boxes are kept, which its calibration part has chosen."""
    assert answers.boxes is not None, "a detector's answers"
    return choose_threshold(answers.boxes["calibrate"])


def _boxes(answers: Answers) -> Detections:
    assert answers.boxes is not None, "a detector's answers"
    return answers.boxes["validate"]


def _called(answers: Answers) -> NDArray[np.bool_]:
    """Which validation images are called positive -> (n,)."""
    return np.asarray(answers.validate.score >= answers.threshold)

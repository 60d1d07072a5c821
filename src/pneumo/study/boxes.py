"""The boxes of a result: an image's rows of detections.parquet and truths.parquet, and back from the files to arrays.

Images are matched with their true boxes where they are predicted; what is gathered and kept is a row a box.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pneumo.errors import Refused
from pneumo.study.breakdown import Columns, columns, select
from pneumo.study.matching import COCO_THRESHOLDS, RSNA_THRESHOLDS, match, pack, unpack
from pneumo.study.metrics import persons
from pneumo.study.results import load_table

Array = NDArray[Any]
PARTS = ("calibrate", "validate")


@dataclass(frozen=True, slots=True)
class Detections:
    """One run's d boxes on the n images of a part.

    image (d,) int: which of the n images; score (d,) float64; hits_coco (d, 10) bool and hits_rsna (d, 8) bool: what
    each box finds (see `matching`); truths (n,) int: true boxes; positive (n,) bool: at least those that have some;
    person (n,): equal for images of one person, None if nothing tells persons from images.
    Boxes of one image are in the order in which they were given to the match; images come in any order.
    """

    image: Array
    score: Array
    hits_coco: Array
    hits_rsna: Array
    truths: Array
    positive: Array
    person: Array | None = None

    def __post_init__(self) -> None:
        d, n = self.score.size, self.truths.size
        assert self.image.shape == (d,), "each box is in an image"
        assert self.hits_coco.shape == (d, COCO_THRESHOLDS.size), "each box is matched by COCO's rule"
        assert self.hits_rsna.shape == (d, RSNA_THRESHOLDS.size), "each box is matched by the challenge's rule"
        assert self.positive.shape == (n,), "each image is positive or not"
        assert self.person is None or self.person.shape == (n,), "each image is of a person"
        assert self.positive[self.truths > 0].all(), "an image with a true box is positive"
        assert np.isfinite(self.score).all(), "a score is a number"
        assert d == 0 or 0 <= self.image.min() <= self.image.max() < n, "an image is one of n"

    @classmethod
    def of(cls, boxes: Columns, known: Columns, truths: Array) -> "Detections":
        """From one run's rows of one part, its boxes and its answers, and the patients of that part's true boxes."""
        # Of a patient who occurs more than once the last label counts.
        label = dict(zip(known["patient"].tolist(), known["label"].tolist(), strict=True))
        person = dict(zip(known["patient"].tolist(), known["person"], strict=True)) if "person" in known else {}
        index = {patient: i for i, patient in enumerate(sorted(label))}
        of_truths = np.array([index[patient] for patient in truths.tolist() if patient in index], dtype=np.int64)
        return cls(
            image=np.array([index[patient] for patient in boxes["patient"].tolist()], dtype=np.int64),
            score=boxes["score"].astype(np.float64),
            hits_coco=unpack(boxes["hits_coco"], COCO_THRESHOLDS.size),
            hits_rsna=unpack(boxes["hits_rsna"], RSNA_THRESHOLDS.size),
            truths=np.bincount(of_truths, minlength=len(index)),
            positive=np.array([label[patient] for patient in index], dtype=np.int64) > 0,
            person=persons([person[patient] for patient in index]) if person else None,
        )


def detection_rows(
    run: int, patient: str, part: str, boxes: ArrayLike, scores: ArrayLike, truths: ArrayLike
) -> list[dict[str, Any]]:
    """Rows of detections.parquet of one image: boxes (p, 4) with scores (p,), matched with its true boxes (t, 4).

    Boxes are x, y, width, height in pixels of the original. They are matched as they are kept, in float32.
    """
    b = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    s, t = np.asarray(scores, dtype=np.float32), np.asarray(truths, dtype=np.float32)
    coco = pack(match(b, s, t, COCO_THRESHOLDS, strict=False)).tolist()
    rsna = pack(match(b, s, t, RSNA_THRESHOLDS, strict=True)).tolist()
    common: dict[str, Any] = {"run": run, "patient": patient, "part": part}
    return [
        common | {"score": score, **_box(box), "hits_coco": c, "hits_rsna": r}
        for score, box, c, r in zip(s.tolist(), b.tolist(), coco, rsna, strict=True)
    ]


def truth_rows(patient: str, part: str, boxes: ArrayLike) -> list[dict[str, Any]]:
    """Rows of truths.parquet of one image: its true boxes (t, 4), as x, y, width, height in pixels of the original."""
    found = np.asarray(boxes, dtype=np.float32).reshape(-1, 4).tolist()
    return [{"patient": patient, "part": part, **_box(box)} for box in found]


def _box(box: list[float]) -> dict[str, float]:
    return dict(zip(("x", "y", "width", "height"), box, strict=True))


def load_detections(folder: Path) -> dict[int, dict[str, Detections]]:
    """The boxes of each run that has predictions, by run and part (PARTS), images ordered by patient.

    Empty where the result has no boxes at all, true or predicted: its runs are classifiers. A run's boxes of a patient
    are all that it has rows of. Raises Refused where a table is damaged or at odds with another.
    """
    answers = columns(load_table(folder, "predictions", columns=("run", "patient", "part", "label", "person")))
    names = ("run", "patient", "part", "score", "hits_coco", "hits_rsna")
    boxes = columns(load_table(folder, "detections", columns=names))
    truths = columns(load_table(folder, "truths", columns=("patient", "part")))
    if not boxes["run"].size and not truths["part"].size:
        return {}
    found: dict[int, dict[str, Detections]] = {}
    for run in np.unique(answers["run"]).tolist():
        found[run] = {}
        for part in PARTS:
            ours, known = (select(c, (c["run"] == run) & (c["part"] == part)) for c in (boxes, answers))
            if not set(ours["patient"].tolist()) <= set(known["patient"].tolist()):
                raise Refused(f"{folder / 'detections.parquet'} has boxes of patients whom predictions.parquet lacks.")
            found[run][part] = Detections.of(ours, known, truths["patient"][truths["part"] == part])
    return found

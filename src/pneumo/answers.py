"""What a rank answered, as rows of a result's tables; boxes are matched with the true ones where they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo.data.geometry import to_pixels
from pneumo.study.boxes import Detections, detection_rows, truth_rows
from pneumo.study.curves import Curves
from pneumo.study.statistics import delong

if TYPE_CHECKING:
    import pandas as pd

    from pneumo.train import Answered

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of predictions.parquet, an image each, and of detections.parquet, a box each."""

    predictions: Rows = field(default_factory=list)
    detections: Rows = field(default_factory=list)


def rows(
    run: int, index: "pd.DataFrame", parts: "Mapping[str, Answered]", person: NDArray[np.int64] | None = None
) -> Found:
    """Make the rows of a run's answers to each part of the split, which are positions in a store's index.

    `person` is the split's: the number of each image's person, where they are known.
    """
    found = Found()
    for part, answered in parts.items():
        images = list(index.iloc[answered.positions].itertuples())
        people = [None] * len(images) if person is None else person[answered.positions].tolist()
        for image, score, who in zip(images, answered.answers.scores, people, strict=True):
            about = {"run": run, "part": part, "score": float(score), "person": who}
            found.predictions.append(about | _about(image))
        for image, boxes in zip(images, answered.answers.boxes, strict=bool(answered.answers.boxes)):
            pixels, scored = in_pixels(boxes, image.rows, image.columns)
            found.detections.extend(detection_rows(run, image.patient, part, pixels, scored, image.boxes))
    return found


def in_pixels(boxes: NDArray[np.float32], rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """From a model's boxes (k, 5) of a picture to those that have a size in it: pixels of it (p, 4), and scores (p,).

    A box beyond the picture, in the black beside it, has no size there.
    """
    pixels = to_pixels(boxes[:, :4], rows, columns)
    kept = (pixels[:, 2:] > 0).all(axis=1)
    return pixels[kept], boxes[kept, 4]


def truths(index: "pd.DataFrame", parts: Mapping[str, Any]) -> Rows:
    """Make the rows of truths.parquet, a true box each, of the images of these parts."""
    return [
        row
        for part, positions in parts.items()
        for image in index.iloc[positions].itertuples()
        for row in truth_rows(image.patient, part, image.boxes)
    ]


def auc(answered: Sequence[Found]) -> float:
    """The AUC of what all ranks answered of one part, in which both labels occur."""
    predictions = [row for found in answered for row in found.predictions]
    return delong(_column(predictions, "label"), _column(predictions, "score")).value


def map50(answered: Sequence[Found], truths: Rows) -> float:
    """The mAP@0.5 of what all ranks answered of one part, given its rows of `truths`; not-a-number without any."""
    predictions = [row for found in answered for row in found.predictions]
    boxes = [row for found in answered for row in found.detections]
    d = Detections.of(
        {name: _column(boxes, name) for name in ("patient", "score", "hits_coco", "hits_rsna")},
        {name: _column(predictions, name) for name in ("patient", "label")},
        _column(truths, "patient"),
    )
    once = np.ones((d.truths.size, 1), dtype=np.int32)
    return float(Curves.of(d).measure(once)["map50"][0])


def _column(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([row[name] for row in rows])


def _about(image: Any) -> dict[str, Any]:
    return {
        "patient": image.patient,
        "label": int(image.label),
        "view": _known(image.view),
        "sex": _known(image.sex),
        "age": None if np.isnan(image.age) else int(image.age),
    }


def _known(text: Any) -> str | None:
    """A text of the index, in which an unknown one is not-a-number."""
    return text if isinstance(text, str) and text else None

"""What a rank answered, as rows of a result's tables; boxes are matched with the true ones where they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pneumo.data.geometry import to_pixels
from pneumo.study.matching import COCO_THRESHOLDS, RSNA_THRESHOLDS, match

if TYPE_CHECKING:
    import pandas as pd

    from pneumo.train import Answered

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of predictions.parquet, an image each, and of detections.parquet, a box each."""

    predictions: Rows = field(default_factory=list)
    detections: Rows = field(default_factory=list)


def rows(run: int, index: "pd.DataFrame", parts: "Mapping[str, Answered]") -> Found:
    """Make the rows of a run's answers to each part of the split, which are positions in a store's index."""
    found = Found()
    for part, answered in parts.items():
        images = index.iloc[answered.positions]
        answers = answered.answers
        for image, score in zip(images.itertuples(), answers.scores, strict=True):
            found.predictions.append({"run": run, "part": part, **_image(image), "score": float(score)})
        for image, boxes in zip(images.itertuples(), answers.boxes, strict=bool(answers.boxes)):
            found.detections.extend({"run": run, "part": part, **box} for box in _boxes(image, boxes))
    return found


def truths(index: "pd.DataFrame", parts: Mapping[str, Any]) -> Rows:
    """Make the rows of truths.parquet, a true box each, of the images that are evaluated."""
    return [
        {"patient": image.patient, "part": part, **_box(box)}
        for part, positions in parts.items()
        for image in index.iloc[positions].itertuples()
        for box in image.boxes
    ]


def _image(image: Any) -> dict[str, Any]:
    return {
        "patient": image.patient,
        "label": int(image.label),
        "view": image.view or None,
        "sex": image.sex or None,
        "age": None if np.isnan(image.age) else int(image.age),
    }


def _boxes(image: Any, found: Any) -> Rows:
    """The boxes (k, 5) that were found in an image, in pixels of the original, and which true ones they hit."""
    boxes, scores = to_pixels(found[:, :4], image.rows, image.columns), found[:, 4]
    true = np.asarray(image.boxes, np.float64).reshape(-1, 4)
    coco = _bits(match(boxes, scores, true, COCO_THRESHOLDS, strict=False))
    rsna = _bits(match(boxes, scores, true, RSNA_THRESHOLDS, strict=True))
    return [
        {"patient": image.patient, "score": float(score), **_box(box), "hits_coco": at_coco, "hits_rsna": at_rsna}
        for box, score, at_coco, at_rsna in zip(boxes, scores, coco, rsna, strict=True)
    ]


def _box(box: Any) -> dict[str, float]:
    return dict(zip(("x", "y", "width", "height"), map(float, box), strict=True))


def _bits(hits: np.ndarray) -> list[int]:
    """Pack (k, t) bools into k numbers: bit i is the i-th threshold."""
    packed: list[int] = (hits.astype(np.int64) << np.arange(hits.shape[1])).sum(axis=1).tolist()
    return packed

"""Pictures with true and predicted boxes, and what others say of them: COCO's evaluators, and the challenge's text."""
# mypy: disable-error-code="import-untyped"

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import strategies as st

from pneumo.study.boxes import Detections
from pneumo.study.matching import COCO_THRESHOLDS, RSNA_THRESHOLDS, match

Box = tuple[float, float, float, float]
# faster-coco-eval can take pycocotools' name, and would then be compared with itself.
assert pycocotools.cocoeval.COCOeval.__module__ == "pycocotools.cocoeval"


@dataclass(frozen=True, slots=True)
class Picture:
    """Predicted boxes with their scores, and true boxes; all as x, y, width, height."""

    boxes: Sequence[Box] = ()
    scores: Sequence[float] = ()
    truths: Sequence[Box] = ()


@dataclass(slots=True)
class _Set:
    """A data set in COCO's form, and the answers to it."""

    content: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


def detections(pictures: Sequence[Picture]) -> Detections:
    """Pictures, matched, as one table; those with true boxes are positive."""
    coco = [match(p.boxes, p.scores, p.truths, COCO_THRESHOLDS, strict=False) for p in pictures]
    rsna = [match(p.boxes, p.scores, p.truths, RSNA_THRESHOLDS, strict=True) for p in pictures]
    truths = np.array([len(p.truths) for p in pictures], dtype=np.int64)
    return Detections(
        image=np.repeat(np.arange(len(pictures)), [len(p.scores) for p in pictures]),
        score=np.array([score for p in pictures for score in p.scores], dtype=np.float64),
        hits_coco=np.concatenate(coco),
        hits_rsna=np.concatenate(rsna),
        truths=truths,
        positive=truths > 0,
    )


def _set(pictures: Sequence[Picture]) -> _Set:
    images = [{"id": i, "width": 1024, "height": 1024, "file_name": f"{i}.png"} for i in range(1, len(pictures) + 1)]
    found = _Set({"images": images, "annotations": [], "categories": [{"id": 1, "name": "opacity"}], "info": []})
    for i, picture in enumerate(pictures, 1):
        for box in picture.truths:
            row = {"id": len(found.content["annotations"]) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
            found.content["annotations"].append(row | {"bbox": list(box), "area": box[2] * box[3]})
        for box, score in zip(picture.boxes, picture.scores, strict=True):
            row = {"id": len(found.answers) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
            found.answers.append(row | {"bbox": list(box), "area": box[2] * box[3], "score": score})
    return found


def pycocotools_evaluation(pictures: Sequence[Picture], *, quick: bool = True) -> Any:
    """pycocotools' COCOeval after `accumulate`; `quick`: only what concerns boxes of all sizes and 100 an image."""
    both, data = [], _set(pictures)
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (data.content["annotations"], data.answers):
            # Its loadRes fails where there are no answers at all.
            coco = pycocotools.coco.COCO()
            coco.dataset = data.content | {"annotations": rows}
            coco.createIndex()
            both.append(coco)
        found = pycocotools.cocoeval.COCOeval(*both, "bbox")
        return _evaluate(found, quick)


def faster_evaluation(pictures: Sequence[Picture], *, quick: bool = True) -> Any:
    """faster-coco-eval's COCOeval_faster likewise."""
    data = _set(pictures)
    truths = COCO(data.content)
    return _evaluate(COCOeval_faster(truths, truths.loadRes(data.answers), "bbox"), quick)


def _evaluate(evaluation: Any, quick: bool) -> Any:
    if quick:
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
    if not quick:
        evaluation.summarize()
    return evaluation


def average_precisions(evaluation: Any) -> tuple[float, float]:
    """An evaluation's mAP at 0.5 and at 0.5 to 0.95; not-a-number without true boxes."""
    precision = np.asarray(evaluation.eval["precision"])[:, :, 0, 0, -1]
    if (precision == -1).all():
        return np.nan, np.nan
    return float(precision[0].mean()), float(precision.mean())


def overlap(a: Box, b: Box) -> Fraction:
    """The intersection over union of two boxes of whole numbers, exactly."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(0, int(width)) * max(0, int(height))
    union = int(a[2] * a[3] + b[2] * b[3]) - shared
    return Fraction(shared, union) if shared else Fraction(0)


def challenge_hits(picture: Picture, percent: int, confidence: float = 0.0) -> int:
    """TP of one picture by the challenge's text, in exact arithmetic, at a threshold in percent."""
    order = sorted(range(len(picture.scores)), key=lambda i: -picture.scores[i])
    left = list(range(len(picture.truths)))
    for i in order:
        if picture.scores[i] < confidence or not left:
            continue
        best = max(left, key=lambda j: (overlap(picture.boxes[i], picture.truths[j]), j))
        if overlap(picture.boxes[i], picture.truths[best]) > Fraction(percent, 100):
            left.remove(best)
    return len(picture.truths) - len(left)


def challenge_score(pictures: Sequence[Picture], confidence: float = 0.0) -> Fraction | None:
    """The challenge's score of pictures, exactly; None where none counts."""
    scores = []
    for picture in pictures:
        boxes = sum(score >= confidence for score in picture.scores)
        if boxes + len(picture.truths) == 0:
            continue
        hits = [challenge_hits(picture, percent, confidence) for percent in range(40, 80, 5)]
        scores.append(sum(Fraction(k, boxes + len(picture.truths) - k) for k in hits) / 8)
    return sum(scores, Fraction(0)) / len(scores) if scores else None


def drawn_pictures(n: int, seed: int) -> list[Picture]:
    """Pictures as a detector leaves them: tied scores, doubled boxes, too many boxes, no boxes, shifted true boxes."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        truths = np.round(rng.uniform(50, 500, size=(rng.integers(0, 4) if i % 2 else 0, 4)))
        shifted = truths[rng.permutation(len(truths))] + rng.normal(scale=rng.choice([3, 10, 60]), size=truths.shape)
        others = rng.uniform(20, 600, size=(rng.choice([0, 1, 3, 150], p=[0.3, 0.4, 0.27, 0.03]), 4))
        boxes = np.concatenate([shifted, shifted[: len(shifted) // 2], others])
        boxes[:, 2:] = np.abs(boxes[:, 2:])
        scores = np.concatenate([rng.beta(4, 2, len(boxes) - len(others)), rng.beta(1, 4, len(others))]).round(2)
        order = rng.permutation(len(boxes))
        found.append(Picture(boxes[order].tolist(), scores[order].tolist(), truths.tolist()))
    return found


_sides = st.integers(0, 5)
_box = st.tuples(_sides, _sides, _sides, _sides)
_tenths = st.integers(1, 9).map(lambda i: i / 10)


@st.composite
def small_pictures(draw: st.DrawFn, most: int = 4) -> list[Picture]:
    """Up to `most` pictures on a coarse grid: equal overlaps and scores, doubled and empty boxes are frequent."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        truths = draw(st.lists(_box, max_size=3))
        near = st.sampled_from(truths) | _box if truths else _box
        boxes = draw(st.lists(near, max_size=6))
        scores = draw(st.lists(_tenths, min_size=len(boxes), max_size=len(boxes)))
        found.append(Picture(boxes, scores, truths))
    return found

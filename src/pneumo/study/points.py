"""The points of the curves that are drawn of a run: ROC, precision over recall, FROC; nothing is interpolated.

A threshold is one of the distinct scores, from the highest on: what scores alike is called positive together.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pneumo.study.boxes import Detections
from pneumo.study.curves import RECALLS, Array, counted

Floats = NDArray[np.float64]
Points = tuple[Floats, Floats]


def roc(labels: ArrayLike, scores: ArrayLike) -> Points:
    """The false and true positive rates at each threshold -> (p,), (p,), from (0, 0) to (1, 1); labels, scores (n,).

    Both labels have to occur.
    """
    hits, false = _so_far(np.asarray(labels).astype(bool), np.asarray(scores))
    assert hits[-1] > 0, "there are positives"
    assert false[-1] > 0, "there are negatives"
    return np.append(0.0, false / false[-1]), np.append(0.0, hits / hits[-1])


def precision_recall(labels: ArrayLike, scores: ArrayLike) -> Points:
    """Recall and precision at each threshold -> (p,), (p,), recall ascending; of labels, not all 0, and scores (n,).

    The precision of a threshold holds from the recall before it up to its own.
    """
    hits, false = _so_far(np.asarray(labels).astype(bool), np.asarray(scores))
    assert hits[-1] > 0, "there are positives"
    return hits / hits[-1], hits / (hits + false)


def average_precision(recall: Floats, precision: Floats) -> float:
    """The area below the steps of `precision_recall`."""
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def box_precision(d: Detections) -> Floats:
    """COCO's precision at an IoU of 0.5 -> (101,): the best one at or beyond each of RECALLS, 0 where none reaches it.

    Its mean is `map50`. Not-a-number where there is no true box.
    """
    truths = int(d.truths.sum())
    if not truths:
        return np.full(RECALLS.size, np.nan)
    hits = np.cumsum(d.hits_coco[counted(d), 0])
    precision = hits / np.arange(1, hits.size + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return np.asarray(best[np.searchsorted(hits / truths, RECALLS, side="left")])


def froc(d: Detections) -> Points:
    """False positives an image and the share of true boxes found (IoU 0.5) at each threshold -> (p,), (p,).

    From (0, 0) on. Not-a-number where there is no true box.
    """
    order = counted(d)
    hits, false = _so_far(d.hits_coco[order, 0], d.score[order])
    with np.errstate(invalid="ignore"):
        return np.append(0.0, false / d.truths.size), np.append(0.0, hits) / np.float64(d.truths.sum())


def _so_far(hit: NDArray[np.bool_], score: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many that score at least a threshold are hits, and how many are none, at each distinct score downwards."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=-np.inf))
    hits = np.cumsum(hit[order], dtype=np.int64)[ends]
    return hits, np.asarray(ends + 1 - hits, dtype=np.int64)

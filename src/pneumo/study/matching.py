"""Which predicted boxes of one image find a true one, at several thresholds of overlap.

Predictions choose in descending order of score (of equal ones the earlier first), so the match of the first k of them
is the same whatever comes after. One match therefore holds that of every confidence threshold, and that of the best
hundred boxes, to which COCO limits an image: leave out the rows of the others.

Two rules, which differ in what counts as enough overlap:

COCO        at least the threshold (or 1 - 1e-10 if that is less), as pycocotools has it.
RSNA        the Pneumonia Detection Challenge's text: "greater than" the threshold, predictions "in order of their
            confidence levels". `strict` is this rule.

By both a prediction takes the true box that it overlaps most among those that none has taken. The challenge's text
leaves open which one of several; this is COCO's way, and does not depend on the order of the label table (but for true
boxes that it overlaps equally, of which the last is taken, as by pycocotools).
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# As pycocotools makes them: at equality the last digit decides.
COCO_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
# Each the double next to its decimal, so that an overlap of exactly 3 in 5 is not greater than 0.6.
RSNA_THRESHOLDS: NDArray[np.float64] = np.arange(40, 80, 5) / 100

Bools = NDArray[np.bool_]


def iou(predictions: ArrayLike, truths: ArrayLike) -> NDArray[np.float64]:
    """The intersection over union of each two boxes (p, 4), (t, 4) -> (p, t), 0 where they share no area.

    A box is x, y, width, height. Formed as pycocotools does it for objects that are no crowd, to the last bit.
    """
    p, t = _boxes(predictions)[:, None], _boxes(truths)[None]
    sides = np.minimum(p[..., :2] + p[..., 2:], t[..., :2] + t[..., 2:]) - np.maximum(p[..., :2], t[..., :2])
    shared = np.where((sides > 0).all(-1), sides[..., 0] * sides[..., 1], 0.0)
    union = p[..., 2] * p[..., 3] + t[..., 2] * t[..., 3] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def match(boxes: ArrayLike, scores: ArrayLike, truths: ArrayLike, thresholds: ArrayLike, *, strict: bool) -> Bools:
    """Which of an image's boxes (p, 4) with scores (p,) find one of its true boxes (t, 4) -> bool (p, thresholds).

    At each threshold a true box is found once. `strict`: the overlap has to exceed the threshold, not only to reach it.
    """
    s, cuts = np.asarray(scores, dtype=np.float64), np.asarray(thresholds, dtype=np.float64)
    overlap = iou(boxes, truths)[:, ::-1]  # the last of equal ones is now the first, which argmax takes
    assert s.shape == overlap.shape[:1], "each box has a score"
    assert np.isfinite(s).all(), "a score is a number"
    hits = np.zeros((s.size, cuts.size), dtype=np.bool_)
    if not overlap.size:
        return hits
    enough, cuts = (np.greater, cuts) if strict else (np.greater_equal, np.minimum(cuts, 1 - 1e-10))
    taken = np.zeros((cuts.size, overlap.shape[1]), dtype=np.bool_)
    every = np.arange(cuts.size)
    order = np.argsort(-s, kind="stable")
    # Most boxes of a detector lie nowhere near a true one.
    for i in order[enough(overlap.max(axis=1), cuts.min())[order]]:
        left = np.where(taken, -1.0, overlap[i])
        best = left.argmax(axis=1)
        hits[i] = enough(left[every, best], cuts)
        taken[every[hits[i]], best[hits[i]]] = True
    return hits


def pack(hits: Bools) -> NDArray[np.int32]:
    """Hits (n, thresholds) as integers (n,): bit i is that of the i-th threshold, of which there are at most 31."""
    bits = hits.astype(np.int32) << np.arange(hits.shape[1], dtype=np.int32)
    return np.asarray(bits.sum(axis=1), dtype=np.int32)


def unpack(bits: NDArray[Any], thresholds: int) -> Bools:
    """The inverse of `pack`: integers (n,) -> bool (n, thresholds)."""
    whole = bits.astype(np.int32)[:, None]
    return (whole >> np.arange(thresholds, dtype=np.int32) & 1).astype(np.bool_)


def _boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(boxes, dtype=np.float64)
    found = found.reshape(0, 4) if found.size == 0 else found
    assert found.ndim == 2, "boxes are rows"
    assert found.shape[1] == 4, "a box is x, y, width, height"
    assert np.isfinite(found).all(), "a box is made of numbers"
    return found

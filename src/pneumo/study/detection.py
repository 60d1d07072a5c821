"""How well a detector answers: from one table of matched boxes to the metrics of a row, with intervals.

The confidence threshold comes from the calibration part and is then applied to validation patients, whom it has never
seen. Nothing here depends on the order of images in the table, so nothing depends on which rank predicted which.

`rsna_map` is the score of the RSNA Pneumonia Detection Challenge by its text: for each image the mean over the
thresholds 0.4 to 0.75 of TP / (TP + FP + FN), and of that the mean over images. An image without true boxes scores 0 if
anything is predicted in it, and counts; if nothing is, there is no score and the image does not count.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo.study.boxes import Detections
from pneumo.study.curves import RATES, Curves, best_first, places
from pneumo.study.metrics import RESOLUTION, Quality
from pneumo.study.statistics import CHUNK, LEVEL, Estimate, auc_of_groups, delong, percentiles, resamples

METRICS = (
    *("map50", "map50_95", "map50_positives", "map50_95_positives", "rsna_map", "rsna_threshold"),
    *("precision", "recall", "froc_mean", *(f"froc_{name}" for name in RATES), "auc", "n", "positives"),
)  # what `detection_quality` tells, in this order
NO_THRESHOLD = 0.5  # where the calibration part says nothing
SAME = 1e-9  # challenge scores closer than this are one: sums in another order differ by less
DRAWS = 1000

Array = NDArray[Any]
Floats = NDArray[np.float64]


def image_scores(d: Detections) -> Floats:
    """The highest score of each image's boxes -> (n,); 0 where there is none."""
    found = np.zeros(d.truths.size)
    np.maximum.at(found, d.image, d.score)
    return found


def rsna_scores(d: Detections, threshold: float) -> Floats:
    """Each image's score in the challenge, by its boxes of at least this score -> (n,); not-a-number: not counted."""
    kept, n = d.score >= threshold, d.truths.size
    boxes, found = np.bincount(d.image[kept], minlength=n), np.zeros((n, d.hits_rsna.shape[1]))
    np.add.at(found, d.image[kept], d.hits_rsna[kept])
    # TP + FP + FN: a hit is both a box and a true box.
    union = (boxes + d.truths)[:, None] - found
    return np.where(boxes + d.truths > 0, (found / np.maximum(union, 1)).mean(axis=1), np.nan)


def choose_threshold(d: Detections) -> float:
    """The score from which on to keep boxes: that with the highest `rsna_map` on these images, the calibration part.

    Only gaps between scores wider than RESOLUTION are considered (the one from 0 to the lowest score among them), and
    the threshold is the middle of one, so scores that differ in the fifth digit lead to the same boxes. Of equally good
    gaps the middle one is taken. NO_THRESHOLD where there is nothing to gain by any.
    """
    if not d.score.size:
        return NO_THRESHOLD
    order = best_first(d)
    score, means = d.score[order], _means_so_far(d, order)
    below = np.append(score[1:], 0.0)
    # A model that has learnt next to nothing scores all alike: then its own spread sets the scale.
    candidates = np.flatnonzero(score - below > min(RESOLUTION, float(score[0] - score[-1]) / 20))
    if not candidates.size or means[candidates].max() <= 0:
        return NO_THRESHOLD
    best = candidates[means[candidates] >= means[candidates].max() - SAME]
    gap = best[best.size // 2]
    return float((score[gap] + below[gap]) / 2)


def _means_so_far(d: Detections, order: Array) -> Floats:
    """`rsna_map` with the first box of this order alone, with the first two, and so on -> (d,)."""
    by_image = order[np.argsort(d.image[order], kind="stable")]
    image, hits = d.image[by_image], d.hits_rsna[by_image]
    place, truths = places(image, d.truths.size), d.truths[image]
    sums = np.cumsum(hits, axis=0)
    found = sums - (sums - hits)[np.arange(image.size) - place]  # less those of the images before
    score = (found / ((place + 1 + truths)[:, None] - found)).mean(axis=1)
    change = np.empty((2, image.size))
    # What a box adds to the sum of scores; and an image without true boxes counts from its first box on.
    change[:, by_image] = score - np.where(place > 0, np.roll(score, 1), 0.0), (place == 0) & (truths == 0)
    total, more = np.cumsum(change[:, order], axis=1)
    return np.asarray(total / (np.count_nonzero(d.truths) + more))


def measure(d: Detections, threshold: float, weights: Array) -> dict[str, Floats]:
    """Metrics of each resample of the n images, weights int (n, draws) -> (draws,) each; not-a-number where undefined.

    Those of `Curves.measure`, and at the threshold `rsna_map`, `precision` and `recall` (at an IoU of 0.5).
    """
    curves, kept, n = Curves.of(d), d.score >= threshold, d.truths.size
    challenge = rsna_scores(d, threshold)
    counts = np.isfinite(challenge)
    boxes, hits = (np.bincount(d.image[which], minlength=n) for which in (kept, kept & d.hits_coco[:, 0]))
    ratios = {
        "rsna_map": (np.where(counts, challenge, 0.0), counts),
        "precision": (hits, boxes),
        "recall": (hits, d.truths),
    }
    pieces: list[dict[str, Floats]] = []
    for begin in range(0, weights.shape[1], CHUNK):
        w = weights[:, begin : begin + CHUNK]
        with np.errstate(invalid="ignore"):
            pieces.append(curves.measure(w) | {name: (a @ w) / (b @ w) for name, (a, b) in ratios.items()})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _estimate_and_resamples(d: Detections, seed: int, draws: int) -> Array:
    """Weights (n, 1 + draws): of the images as they are, and of resamples of their persons."""
    n = d.truths.size
    groups = np.arange(n) if d.person is None else d.person
    return np.hstack([np.ones((n, 1), dtype=np.int32), resamples(groups, seed=seed, draws=draws)])


def _interval(drawn: Floats) -> tuple[float, float] | None:
    """Of a metric (draws,) in those resamples that have what defines it; None where none has."""
    drawn = drawn[np.isfinite(drawn)]
    return percentiles(drawn) if drawn.size else None


def detection_quality(validate: Detections, calibrate: Detections, *, seed: int = 0, draws: int = DRAWS) -> Quality:
    """The METRICS of a detector on the validation part, at the threshold that the calibration part gives.

    Intervals are from a bootstrap over persons with this seed, in which the threshold stays; where each image may be of
    another person, that of `auc` is DeLong's; of one person there are none. `auc` is that of `image_scores`, for an
    image being positive. An undefined metric is None and has no interval.
    """
    n, positives = validate.truths.size, int(validate.positive.sum())
    assert n > 0, "metrics need images"
    threshold = choose_threshold(calibrate)
    found: dict[str, int | float | None] = {"rsna_threshold": threshold, "auc": None, "n": n, "positives": positives}
    intervals: dict[str, tuple[float, float]] = {}
    weights = _estimate_and_resamples(validate, seed, draws)
    for name, values in measure(validate, threshold, weights).items():
        found[name] = float(values[0]) if np.isfinite(values[0]) else None
        if found[name] is not None and (interval := _interval(values[1:])) is not None:
            intervals[name] = interval
    if 0 < positives < n:
        scores = image_scores(validate)
        auc = delong(validate.positive, scores)
        found["auc"], intervals["auc"] = auc.value, (auc.low, auc.high)
        if validate.person is not None:
            drawn = auc_of_groups(validate.positive, scores, validate.person, weights[:, 1:])
            intervals["auc"] = drawn or intervals["auc"]
    if validate.person is not None and np.unique(validate.person).size == 1:
        intervals = {}
    return Quality({name: found[name] for name in METRICS}, intervals)


def map_difference(
    ours: Detections, theirs: Detections, *, name: str = "map50", seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """An average precision of `Curves.measure`, ours less theirs, with its paired interval: a resample is both's.

    Both on the same images, with true boxes.
    """
    assert np.array_equal(ours.truths, theirs.truths), "paired on the same images"
    weights = _estimate_and_resamples(ours, seed, draws)
    a, b = (measure(d, NO_THRESHOLD, weights)[name] for d in (ours, theirs))
    interval = _interval((a - b)[1:])
    assert interval is not None, "a difference needs true boxes"
    return Estimate(float(a[0] - b[0]), *interval, LEVEL)

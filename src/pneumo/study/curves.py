"""Average precision and FROC of one run, for any number of resamples of its images at once.

A resample is a column of whole weights: how often it has each image. All weights 1 gives the estimate itself, so both
come from the same lines. Boxes are sorted once, by descending score (of equal ones by image, then in the order in
which they were matched, as pycocotools has it). What is needed of them are sums of weights up to each box that is a
hit; there are few of those, and between two of them only the number of boxes counts.

Average precision is COCO's: the best precision at or beyond each of 101 recalls, averaged; 0 where a recall is never
reached. Of each image the CAP boxes with the highest scores count, here and in FROC.

FROC's sensitivity at f is the largest share of true boxes found (IoU of at least 0.5) by any confidence threshold that
leaves at most f false positives an image; those are the boxes that find nothing, a second one on a true box among them.
It is a step function: nothing is interpolated between thresholds, and boxes of equal score come together.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pneumo.study.boxes import Detections

CAP = 100
# As pycocotools makes them: at equality the last digit decides.
RECALLS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
RATES = {"0125": 0.125, "025": 0.25, "05": 0.5, "1": 1.0, "2": 2.0, "4": 4.0, "8": 8.0}

Array = NDArray[Any]
Floats = NDArray[np.float64]


def best_first(d: Detections) -> Array:
    """The index that sorts boxes by descending score -> (d,); of equal ones by image, then as they were matched."""
    return np.lexsort((d.image, -d.score))


def places(image: Array, n: int) -> Array:
    """For boxes (d,) of n images in some order: how many of the same image come before each -> (d,)."""
    by_image = np.argsort(image, kind="stable")
    counts = np.bincount(image, minlength=n)
    found = np.empty_like(by_image)
    found[by_image] = np.arange(image.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def counted(d: Detections) -> Array:
    """The index of the boxes that count, best first: of each image the CAP ones with the highest scores."""
    order = best_first(d)
    return np.asarray(order[places(d.image[order], d.truths.size) < CAP])


@dataclass(frozen=True, slots=True)
class Curves:
    """A run's sorted boxes, and where among them the hits are.

    image (d,): of each box, best first. hits: at each of COCO's thresholds the boxes that are hits. stops (k,): numbers
    of first boxes whose weights are needed. boxes (k, n), sparse: how many of each image lie before each stop and not
    before an earlier one. ends (e,) of the stops: up to where each score goes that has a hit at IoU 0.5, and last (e,):
    the last such hit within it.
    """

    image: Array
    hits: tuple[Array, ...]
    stops: Array
    boxes: Any
    ends: Array
    last: Array
    truths: Array
    positive: Array

    @classmethod
    def of(cls, d: Detections) -> "Curves":
        """Sort a run's boxes."""
        from scipy.sparse import csr_array

        order = counted(d)
        image, score = d.image[order], d.score[order]
        hits = tuple(np.flatnonzero(column) for column in d.hits_coco[order].T)
        ends = np.unique(np.searchsorted(-score, -score[hits[0]], side="right"))
        last = np.searchsorted(hits[0], ends) - 1
        stops = np.unique(np.concatenate([*(h + 1 for h in hits), ends]))
        needed = np.arange(stops[-1] if stops.size else 0)
        between = np.searchsorted(stops, needed, side="right")
        ones = np.ones(needed.size, dtype=np.int32)
        boxes = csr_array((ones, (between, image[needed])), shape=(stops.size, d.truths.size))
        return cls(image, hits, stops, boxes, ends, last, d.truths, d.positive)

    def measure(self, weights: Array) -> dict[str, Floats]:
        """Metrics by their names in a summary, of each resample of the n images: weights int (n, draws) -> (draws,).

        Not-a-number where there is no true box. Those on positives leave out the boxes of other images.
        """
        truths = self.truths @ weights
        totals = np.cumsum(self.boxes @ weights, axis=0)
        of_positives = np.cumsum(self.boxes @ (weights * self.positive[:, None]), axis=0)
        recalls = np.arange(truths.max(initial=0) + 1)[:, None] / np.maximum(truths, 1)
        reached = np.searchsorted(RECALLS, recalls, side="right")  # how many of RECALLS by so many hits
        each: list[list[Floats]] = [[], []]
        for hits in self.hits:
            found = np.cumsum(weights[self.image[hits]], axis=0)
            here = np.diff(np.take_along_axis(reached, found, axis=0), axis=0, prepend=0)
            # A hit is the last of the boxes up to its stop.
            stops = np.searchsorted(self.stops, hits + 1)
            for precisions, total in zip(each, (totals, of_positives), strict=True):
                precisions.append(np.where(truths > 0, _average_precision(found, total[stops], here), np.nan))
        whole, positives = each
        return {
            **{"map50": whole[0], "map50_95": np.mean(whole, axis=0)},
            **{"map50_positives": positives[0], "map50_95_positives": np.mean(positives, axis=0)},
            **self._froc(weights, totals, truths),
        }

    def _froc(self, weights: Array, totals: Array, truths: Array) -> dict[str, Floats]:
        found = np.cumsum(weights[self.image[self.hits[0]]], axis=0)[self.last]
        false = totals[np.searchsorted(self.stops, self.ends)] - found
        images, curve = weights.sum(axis=0), {}
        for name, rate in RATES.items():
            most = np.where(false <= rate * images, found, 0).max(axis=0, initial=0)
            curve[f"froc_{name}"] = np.where(truths > 0, most / np.maximum(truths, 1), np.nan)
        return {"froc_mean": np.mean(list(curve.values()), axis=0)} | curve


def _average_precision(found: Array, total: Array, here: Array) -> Floats:
    """From hits and boxes up to each hit, and how many recalls it is the first to reach, all (h, draws) -> (draws,)."""
    # A resample may lack all images so far.
    precision = found / np.maximum(total, 1)
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    return np.asarray((best * here).sum(axis=0) / RECALLS.size)

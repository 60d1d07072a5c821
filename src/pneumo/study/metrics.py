"""How well a classifier answers: from labels and scores to the metrics of a row, with intervals.

The threshold comes from the calibration part and is then applied to validation patients, which it has never seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pneumo.study.schema import RunFile, Subgroup
from pneumo.study.statistics import (
    auc_of_groups,
    bootstrap_counts,
    bootstrap_mean,
    delong,
    percentiles,
    resamples,
    wilson,
    wilson_of_groups,
)

# Scores closer than this are one score: the same training differs by less between backends (sums in another order).
RESOLUTION = 1e-4
MIN_SUBGROUP = 20
DRAWS = 2000
# The patients with a lung opacity among all 26,684 of the RSNA challenge's training set (its class table, stage 2).
RSNA_PREVALENCE = 6_012 / 26_684
AGE_GROUPS = ((0, 17, "under 18"), (18, 39, "18 to 39"), (40, 59, "40 to 59"), (60, 79, "60 to 79"), (80, 999, "80 up"))

Array = NDArray[Any]
Functions = dict[str, Callable[[Array], Array]]
Intervals = dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Predictions:
    """One run's answers on one part; all (n,): patient, label 0 or 1, score in [0, 1], person, view, sex, age.

    Images of one person have the same number as person. What is unknown of person and age is not-a-number, of view and
    sex, which are texts, None.
    """

    patient: Array
    label: Array
    score: Array
    person: Array
    view: Array
    sex: Array
    age: Array

    def take(self, where: Array) -> "Predictions":
        """Those at a boolean mask or an index."""
        return Predictions(*(getattr(self, name)[where] for name in self.__slots__))


def persons(numbers: ArrayLike) -> Array | None:
    """The column `person` of predictions.parquet (n,) where it tells persons from images; None where it is empty."""
    found = np.asarray(numbers, dtype=np.float64)
    return found if found.size and np.isfinite(found).all() else None


def youden_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The score from which on to answer "pneumonia", by Youden's J on the calibration part; labels and scores (n,).

    Only gaps wider than RESOLUTION are considered, and the threshold is the middle of one, so scores that differ in
    the fifth digit lead to the same answers. Of equally good gaps the middle one is taken. 0.5 where no gap separates
    the classes better than chance (or one class is missing).
    """
    truth, s = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    if truth.all() or not truth.any():
        return 0.5
    order = np.argsort(s, kind="stable")
    s, truth = s[order], truth[order]
    gaps = np.diff(s)
    # A model that has learnt next to nothing answers 0.5 +- little: then its own spread sets the scale.
    candidates = np.flatnonzero(gaps > min(RESOLUTION, float(s[-1] - s[0]) / 20))
    if candidates.size == 0:
        return 0.5
    positives, negatives = int(truth.sum()), int((~truth).sum())
    missed, rejected = np.cumsum(truth)[candidates], np.cumsum(~truth)[candidates]
    # J * positives * negatives, in integers: equal is equal.
    j = rejected.astype(np.int64) * positives - missed.astype(np.int64) * negatives
    if j.max() <= 0:
        return 0.5
    best = candidates[np.flatnonzero(j == j.max())]
    gap = int(best[(best.size - 1) // 2])
    return float((s[gap] + s[gap + 1]) / 2)


def is_sample(run: RunFile) -> bool:
    """Whether a result is about the built-in sample and not about a folder of data."""
    return run.config.get("data") is None


def natural_prevalence(run: RunFile) -> float:
    """The share of positives for `ppv_natural` and `npv_natural`: RSNA's for the sample, else that of all sound images.

    Half of the sample is positive by construction, which is nobody's prevalence; the rest of it is drawn like RSNA's.
    A balanced subset of a data folder leaves that folder's own share as it is.
    """
    return RSNA_PREVALENCE if is_sample(run) else run.data.natural_prevalence


@dataclass(frozen=True, slots=True)
class Quality:
    """The metrics of one run on its validation part; an undefined one (0/0) is None and has no interval."""

    metrics: dict[str, int | float | None]
    intervals: Intervals


# Functions of a confusion table (..., 4) of true positives, false positives, true negatives, false negatives.
_SHARES: dict[str, tuple[list[int], list[int]]] = {  # which of them, of which
    "accuracy": ([0, 2], [0, 1, 2, 3]),
    "sensitivity": ([0], [0, 3]),
    "specificity": ([2], [2, 1]),
    "ppv": ([0], [0, 1]),
    "npv": ([2], [2, 3]),
}


def _share(name: str, counts: Sequence[int]) -> tuple[int, int]:
    which, of = _SHARES[name]
    return sum(counts[i] for i in which), sum(counts[i] for i in of)


def _proportion(name: str, c: Array) -> Array:
    which, of = _SHARES[name]
    return np.asarray(c[..., which].sum(axis=-1) / c[..., of].sum(axis=-1))


PROPORTIONS: Functions = {name: partial(_proportion, name) for name in _SHARES}


def _balanced(c: Array) -> Array:
    return np.asarray((c[..., 0] / (c[..., 0] + c[..., 3]) + c[..., 2] / (c[..., 2] + c[..., 1])) / 2)


def _f1(c: Array) -> Array:
    return np.asarray(2 * c[..., 0] / (2 * c[..., 0] + c[..., 1] + c[..., 3]))


def _ppv_at(prevalence: float, c: Array) -> Array:
    true = prevalence * c[..., 0] / (c[..., 0] + c[..., 3])
    return np.asarray(true / (true + (1 - prevalence) * c[..., 1] / (c[..., 1] + c[..., 2])))


def _npv_at(prevalence: float, c: Array) -> Array:
    true = (1 - prevalence) * c[..., 2] / (c[..., 1] + c[..., 2])
    return np.asarray(true / (true + prevalence * c[..., 3] / (c[..., 0] + c[..., 3])))


def quality(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    threshold: float,
    natural_prevalence: float,
    person: ArrayLike | None = None,
    seed: int = 0,
) -> Quality:
    """All metrics of a binary classifier at a threshold; labels 0 or 1 and scores in [0, 1], both (n,), n > 0.

    PPV and NPV are given as found and, by Bayes, at the natural prevalence. Intervals: Wilson for proportions, DeLong
    for the AUC, a bootstrap with this seed for the rest; with `person` (n,), equal for images of one person, a
    bootstrap over persons for all of them, whose number is `persons` (of one person there are none).
    """
    truth, s = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    says = s >= threshold
    cells = np.stack([says & truth, says & ~truth, ~says & ~truth, ~says & truth])
    n, positives = int(truth.size), int(truth.sum())
    metrics: dict[str, int | float | None] = {"n": n, "positives": positives, "threshold": float(threshold)}
    metrics |= {"natural_prevalence": natural_prevalence, "majority": max(positives, n - positives) / n}
    functions = PROPORTIONS | {
        "balanced_accuracy": _balanced,
        "f1": _f1,
        "ppv_natural": partial(_ppv_at, natural_prevalence),
        "npv_natural": partial(_npv_at, natural_prevalence),
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {name: float(function(cells.sum(axis=1).astype(np.float64))) for name, function in functions.items()}
    metrics |= {name: value if np.isfinite(value) else None for name, value in values.items()}
    error = (s - truth) ** 2
    metrics["brier"] = float(error.mean())
    auc = delong(truth, s) if 0 < positives < n else None
    metrics["auc"] = None if auc is None else auc.value
    defined = {name: function for name, function in functions.items() if metrics[name] is not None}
    if person is None:
        intervals = _over_images(error, cells, defined, seed)
        return Quality(metrics, intervals if auc is None else intervals | {"auc": (auc.low, auc.high)})
    metrics["persons"] = persons = int(np.unique(person).size)
    intervals = _over_persons(truth, s, cells, defined, np.asarray(person), seed) if persons > 1 else {}
    return Quality(metrics, intervals)


def _over_images(error: Array, cells: Array, functions: Functions, seed: int) -> Intervals:
    """Intervals of functions of a confusion table, and of the mean of an error (n,), if images are independent."""
    tp, fp, tn, fn = counts = tuple(cells.sum(axis=1).tolist())
    found: Intervals = {}
    for name, function in functions.items():
        if name in PROPORTIONS:
            found[name] = wilson(*_share(name, counts))
        elif (interval := bootstrap_counts((tp, fp, tn, fn), function, seed=seed)) is not None:
            found[name] = interval
    found["brier"] = bootstrap_mean(error, seed=seed)
    return found


def _over_persons(truth: Array, s: Array, cells: Array, functions: Functions, person: Array, seed: int) -> Intervals:
    """Intervals of metrics by a bootstrap over persons, whose images need not be independent of each other.

    A proportion of 0 or 1 is one in every resample: it has that of `wilson_of_groups`.
    """
    weights = resamples(person, seed=seed, draws=DRAWS)
    counts = (cells.astype(np.float64) @ weights).T
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = {name: function(counts) for name, function in functions.items()}
    drawn["brier"] = ((s - truth) ** 2 @ weights) / weights.sum(axis=0)
    finite = {name: values[np.isfinite(values)] for name, values in drawn.items()}
    found = {name: percentiles(values) for name, values in finite.items() if values.size}
    if (auc := auc_of_groups(truth, s, person, weights)) is not None:
        found["auc"] = auc
    for name in functions.keys() & PROPORTIONS.keys():
        k, of = _share(name, cells.sum(axis=1).tolist())
        if k in (0, of):
            found[name] = wilson_of_groups(k > 0, of, person)
    return found


def subgroups(p: Predictions, threshold: float) -> list[Subgroup]:
    """Accuracy and AUC within each view, sex and age group of at least MIN_SUBGROUP patients that has both labels."""
    found: list[Subgroup] = []
    for by, name, where in _groups(p):
        truth, s = p.label[where].astype(bool), p.score[where]
        n, positives = int(truth.size), int(truth.sum())
        if n < MIN_SUBGROUP or positives in (0, n):
            continue
        right, auc = int(((s >= threshold) == truth).sum()), delong(truth, s)
        found.append(
            Subgroup(
                by=by,
                group=name,
                n=n,
                positives=positives,
                accuracy=right / n,
                accuracy_interval=wilson(right, n),
                auc=auc.value,
                auc_interval=(auc.low, auc.high),
            )
        )
    return found


def _groups(p: Predictions) -> list[tuple[Literal["view", "sex", "age"], str, Array]]:
    groups: list[tuple[Literal["view", "sex", "age"], str, Array]] = []
    for name in sorted({value for value in p.view.tolist() if value is not None}):
        groups.append(("view", name, p.view == name))
    for name in sorted({value for value in p.sex.tolist() if value is not None}):
        groups.append(("sex", name, p.sex == name))
    for low, high, name in AGE_GROUPS:
        groups.append(("age", name, (p.age >= low) & (p.age <= high)))
    return groups

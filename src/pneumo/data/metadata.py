"""Sex, age and view position by class, and how well these alone foretell the label, without a look at the picture.

In RSNA's data 38 % of the AP images (patients too ill to stand) are positive and 9 % of the PA images: a network that
learns to tell the views apart looks better than it is. What is found here is the mark that it has to beat.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from pneumo.data.rsna import CLASSES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

UNKNOWN: Final = "unknown"
AGE_BANDS: Final = ((0, 17), (18, 39), (40, 59), (60, 79), (80, 120))
FOLDS: Final = 5
FEWEST: Final = 30
"""Patients of either label below which nothing is said about prediction."""

Z95: Final = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Subject:
    """What is known of an image besides the picture; `person` is equal for images of one and the same person."""

    label: int
    detailed: str | None
    sex: str | None
    age: int | None
    view: str | None
    person: str


@dataclass(frozen=True, slots=True)
class Rate:
    """Images and positives of one group, and the 95 % interval (Wilson) of its positive rate."""

    images: int
    positive: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """How well some of the metadata foretell the label, out of fold; intervals are 95 %.

    `majority` is the accuracy of always answering with the more frequent label: the mark for `accuracy`.
    """

    features: str
    images: int
    auc: float
    auc_low: float
    auc_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    majority: float


def age_band(age: int | None) -> str:
    """Return the name of an age's band, such as "40-59" (years), or "unknown"."""
    for low, high in AGE_BANDS:
        if age is not None and low <= age <= high:
            return f"{low}-{high}" if (low, high) != AGE_BANDS[-1] else f"{low}+"
    return UNKNOWN


def class_of(subject: Subject) -> str:
    """Return a subject's class; where no table of classes tells it, what its label alone says."""
    return subject.detailed or (CLASSES[-1] if subject.label else f"No {CLASSES[-1]}")


GROUPS: Final[Mapping[str, Callable[[Subject], str]]] = {
    "sex": lambda subject: subject.sex or UNKNOWN,
    "age": lambda subject: age_band(subject.age),
    "view": lambda subject: subject.view or UNKNOWN,
}


def tabulate(subjects: Sequence[Subject]) -> dict[str, dict[str, dict[str, int]]]:
    """Return the images as {sex, age or view: {group: {class: images}}}; ages in bands, "unknown" last."""
    tables: dict[str, dict[str, dict[str, int]]] = {}
    for field, group_of in GROUPS.items():
        table: dict[str, dict[str, int]] = {}
        for subject in subjects:
            row = table.setdefault(group_of(subject), {})
            name = class_of(subject)
            row[name] = row.get(name, 0) + 1
        tables[field] = {group: table[group] for group in sorted(table, key=_rank)}
    return tables


def positive_rates(subjects: Sequence[Subject], field: str) -> dict[str, Rate]:
    """Return the rate of positives in each group of "sex", "age" or "view"."""
    labels: dict[str, list[int]] = {}
    for subject in subjects:
        labels.setdefault(GROUPS[field](subject), []).append(subject.label)
    rates = {}
    for group in sorted(labels, key=_rank):
        images, positive = len(labels[group]), sum(labels[group])
        low, high = wilson(positive, images)
        rates[group] = Rate(images, positive, positive / images, low, high)
    return rates


def predict(subjects: Sequence[Subject], seed: int = 0) -> list[Prediction]:
    """Return how well view, sex, age, and all three foretell the label: logistic regression, out of fold.

    Five folds, stratified by label, a person's images in one fold. Empty where there are fewer than FEWEST positive or
    negative images, or persons: then nothing can be said.
    """
    labels = np.array([subject.label for subject in subjects], np.int64)
    persons = [subject.person for subject in subjects]
    if min(int(labels.sum()), int((1 - labels).sum())) < FEWEST or len(set(persons)) < 2 * FEWEST:
        return []
    folds = _folds(labels, persons, np.random.default_rng(seed))
    found = []
    for name in ("view", "sex", "age", "view, sex and age"):
        fields = ("view", "sex", "age") if "," in name else (name,)
        columns = [_encode(subjects, field) for field in fields]
        chance = _out_of_fold(np.concatenate(columns, axis=1), labels, folds)
        right = int(((chance >= 0.5) == (labels == 1)).sum())
        area, low, high = auc(labels, chance, folds)
        majority = max(labels.mean(), 1 - labels.mean())
        accuracy = wilson(right, labels.size)
        found.append(Prediction(name, labels.size, area, low, high, right / labels.size, *accuracy, float(majority)))
    return found


def auc(labels: Ints, scores: Floats, strata: Ints) -> tuple[float, float, float]:
    """Return the area under the ROC curve and its 95 % interval; labels, scores and strata are (n,).

    Only images of one stratum (a fold) are compared with each other: a fit that has seen the other folds is biased
    against their labels, and pooled over folds useless features would get an AUC well below 0.5. Ties count half (Mann
    and Whitney). The variance is that of DeLong, DeLong and Clarke-Pearson (1988), the interval symmetric on the logit
    scale so that it stays between 0 and 1. Needs a stratum with at least two images of either label.
    """
    areas, variances, weights = [], [], []
    for stratum in np.unique(strata):
        inside = strata == stratum
        positive = np.sort(scores[inside & (labels == 1)])
        negative = np.sort(scores[inside & (labels == 0)])
        if min(positive.size, negative.size) < 2:
            continue
        above, below = _placements(positive, negative), 1 - _placements(negative, positive)
        areas.append(above.mean())
        variances.append(above.var(ddof=1) / above.size + below.var(ddof=1) / below.size)
        weights.append(positive.size * negative.size)
    share = np.array(weights) / sum(weights)
    area = float(share @ areas)
    if not 0 < area < 1:
        return area, area, area
    half = Z95 * math.sqrt(share**2 @ variances) / (area * (1 - area))
    centre = math.log(area / (1 - area))
    return area, 1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-half - centre))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion (1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def fit_logistic(features: Floats, labels: Ints, ridge: float = 1.0) -> Floats:
    """Return the weights (k + 1,), intercept first, of a logistic regression on features (n, k), by Newton's method.

    The intercept is free, the others are held by `ridge` / 2 times their squares, which keeps groups without a single
    positive finite.
    """
    design = np.column_stack([np.ones(len(features)), features])
    penalty = np.diag([1e-9] + [ridge] * features.shape[1])
    weights = np.zeros(design.shape[1])
    loss = _loss(design, labels, weights, penalty)
    for _ in range(100):
        chance = _logistic(design @ weights)
        slope = design.T @ (chance - labels) + penalty @ weights
        step = np.linalg.solve(design.T @ (design * (chance * (1 - chance))[:, None]) + penalty, slope)
        length = 1.0
        while (lower := _loss(design, labels, weights - length * step, penalty)) > loss and length > 1e-8:
            length /= 2  # a full step may overshoot where nearly all labels are alike
        if lower > loss:
            break
        weights, loss = weights - length * step, lower
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _loss(design: Floats, labels: Ints, weights: Floats, penalty: Floats) -> float:
    score = design @ weights
    return float((np.logaddexp(0, score) - labels * score).sum() + 0.5 * weights @ penalty @ weights)


def _logistic(score: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(score, -500, 500))))


def _placements(values: Floats, among: Floats) -> Floats:
    """Return for each value the fraction of the other (sorted) sample that lies below it, ties half."""
    below = np.searchsorted(among, values, "left") + np.searchsorted(among, values, "right")
    return np.asarray(below / (2 * among.size))


def _encode(subjects: Sequence[Subject], field: str) -> Floats:
    """Return a field as numbers (n, k): age about 50 in steps of 20, its square, no age; or a column a group."""
    if field == "age":
        ages = np.array([math.nan if subject.age is None else subject.age for subject in subjects])
        absent = np.isnan(ages)
        steps = np.where(absent, 0.0, (ages - 50) / 20)
        return np.column_stack([steps, steps**2, absent])
    groups = [GROUPS[field](subject) for subject in subjects]
    names = sorted(set(groups))
    return np.array([[group == name for name in names] for group in groups], np.float64)


def _folds(labels: Ints, persons: Sequence[str], random: np.random.Generator) -> Ints:
    """Return each image's fold (n,): persons are dealt out like cards, those with a positive image first."""
    of_person: dict[str, list[int]] = {}
    for position, person in enumerate(persons):
        of_person.setdefault(person, []).append(position)
    names = list(of_person)
    order = [names[i] for i in random.permutation(len(names))]
    order.sort(key=lambda name: -max(labels[of_person[name]]))
    folds = np.empty(labels.size, np.int64)
    for dealt, name in enumerate(order):
        folds[of_person[name]] = dealt % FOLDS
    return folds


def _out_of_fold(features: Floats, labels: Ints, folds: Ints) -> Floats:
    """Return each image's chance of being positive (n,), from a fit on the other folds."""
    chance = np.empty(labels.size)
    for fold in np.unique(folds):
        held = folds == fold
        weights = fit_logistic(features[~held], labels[~held])
        chance[held] = _logistic(weights[0] + features[held] @ weights[1:])
    return np.round(chance, 9)  # ties must stay ties, however the product was summed


def _rank(group: str) -> tuple[bool, int, str]:
    """Return what groups are sorted by: ages by number, the rest by name, unknown last."""
    digits = group.split("-")[0].rstrip("+")
    return group == UNKNOWN, int(digits) if digits.isdigit() else 0, group

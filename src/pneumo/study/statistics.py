"""Estimates, intervals and verdicts: for times (within blocks) and for quality (on the same patients).

Every interval states 95 % unless told otherwise. The exact ones cover at least that, never less.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pneumo.study.schema import VerdictName

LEVEL = 0.95
CHUNK = 100  # resamples at a time: more would leave the processor's cache
MARGIN = 0.05
MIN_BLOCKS = 6

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A centre with an interval of known confidence, or with the range of the values (confidence None)."""

    value: float
    low: float
    high: float
    confidence: float | None

    @property
    def kind(self) -> Literal["interval", "range"]:
        """What low and high are."""
        return "range" if self.confidence is None else "interval"


@lru_cache(maxsize=64)
def signed_rank_cut(n: int, level: float = LEVEL) -> tuple[int, float] | None:
    """How many Walsh averages to leave out at either end for an interval of at least `level`, and its confidence.

    The exact null distribution of the signed-rank statistic of n values: each rank carries either sign. None where n
    is too small for the level (below 6 for 95 %). Source: Hollander, Wolfe, Nonparametric Statistical Methods, 3.1-3.3.
    """
    probability = np.zeros(n * (n + 1) // 2 + 1)
    probability[0] = 1.0
    for rank in range(1, n + 1):
        shifted = np.concatenate([np.zeros(rank), probability[:-rank]])
        probability = (probability + shifted) / 2
    tail = np.cumsum(probability)
    # The smallest doubles above a half level are rounding, not probability.
    allowed = int(np.searchsorted(tail, (1 - level) / 2 * (1 + 1e-9), side="right"))
    return None if allowed == 0 else (allowed - 1, float(1 - 2 * tail[allowed - 1]))


def hodges_lehmann(values: ArrayLike, level: float = LEVEL) -> Estimate:
    """The median of all pairs' means (n,) -> Estimate, with the exact signed-rank interval or else the range."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    assert x.size > 0, "Hodges-Lehmann needs values"
    assert np.isfinite(x).all(), "Hodges-Lehmann needs finite values"
    upper = np.triu_indices(x.size)
    walsh = np.sort((x[upper[0]] + x[upper[1]]) / 2)
    centre, cut = float(np.median(walsh)), signed_rank_cut(x.size, level)
    if cut is None:
        return Estimate(centre, float(x[0]), float(x[-1]), None)
    return Estimate(centre, float(walsh[cut[0]]), float(walsh[-1 - cut[0]]), cut[1])


def median(values: ArrayLike, level: float = LEVEL) -> Estimate:
    """The median (n,) -> Estimate, with the exact interval between two order statistics or else the range.

    Each value is as likely above the true median as below it, whatever the distribution. From 6 values on for 95 %.
    Source: Hollander, Wolfe, Nonparametric Statistical Methods, 3.6 (the sign test's interval).
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    assert x.size > 0, "a median needs values"
    tail = np.cumsum([math.comb(x.size, k) / 2**x.size for k in range(x.size // 2 + 1)])
    allowed = int(np.searchsorted(tail, (1 - level) / 2 * (1 + 1e-9), side="right"))
    if allowed == 0:
        return Estimate(float(np.median(x)), float(x[0]), float(x[-1]), None)
    low, high = float(x[allowed - 1]), float(x[-allowed])
    return Estimate(float(np.median(x)), low, high, float(1 - 2 * tail[allowed - 1]))


def ratio_of_totals(parts: ArrayLike, wholes: ArrayLike, level: float = LEVEL) -> Estimate:
    """sum(parts) / sum(wholes) of blocks (n,), (n,), with its interval from MIN_BLOCKS blocks on, else the range.

    `wholes` are above 0. The interval is the delete-one jackknife's: the spread of the ratios without one block each,
    with Student's t of n - 1 degrees of freedom, around the ratio itself. The range is that of each block's own ratio,
    of which the ratio of totals is a weighted mean. So the ratio lies within either. Sources: Miller, The jackknife - a
    review, Biometrika 61 (1974); Efron, Tibshirani, An Introduction to the Bootstrap, chapter 11.
    """
    x, y = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    assert x.size > 0, "a ratio of totals needs blocks"
    ratio = float(x.sum() / y.sum())
    if x.size < MIN_BLOCKS:
        own = x / y
        return Estimate(ratio, min(ratio, float(own.min())), max(ratio, float(own.max())), None)
    from scipy.stats import t

    without = (x.sum() - x) / (y.sum() - y)
    error = math.sqrt((x.size - 1) * float(without.var()))
    half = float(t.ppf((1 + level) / 2, x.size - 1)) * error
    return Estimate(ratio, ratio - half, ratio + half, level)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ratio of speeds over the blocks that both have, and what can be said of it.

    `more_blocks` (undecided only): about how many further blocks would decide.
    """

    ratio: Estimate
    blocks: int
    margin: float
    verdict: VerdictName
    more_blocks: int | None


def compare(ours: Mapping[int, float], theirs: Mapping[int, float], margin: float = MARGIN) -> Comparison | None:
    """Compare two runs' speeds (any unit, by block number) by the log ratio within each block that both have.

    A ratio above 1 says that `ours` is faster. Equivalent means: the whole interval lies within 1/(1 + margin) to
    1 + margin. None where they share no block.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    found, verdict, more = _judge([math.log(ours[block] / theirs[block]) for block in shared], math.log1p(margin))
    ratio = Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.confidence)
    return Comparison(ratio, len(shared), margin, verdict, more)


@dataclass(frozen=True, slots=True)
class CostComparison:
    """A difference of costs over the blocks that both have, and what can be said of it; see `Comparison`."""

    difference: Estimate
    blocks: int
    margin: float
    verdict: VerdictName
    more_blocks: int | None


def compare_costs(ours: Mapping[int, float], theirs: Mapping[int, float], margin: float) -> CostComparison | None:
    """Compare two runs' costs (any unit, which may be 0, by block number) by `ours` less `theirs` within each block.

    Faster means: `ours` costs less. Equivalent: the whole interval lies within +-margin, in the costs' unit and above
    0. None where they share no block.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    saved, verdict, more = _judge([theirs[block] - ours[block] for block in shared], margin)
    difference = Estimate(-saved.value, -saved.high, -saved.low, saved.confidence)
    return CostComparison(difference, len(shared), margin, verdict, more)


def _judge(gains: Sequence[float], limit: float) -> tuple[Estimate, VerdictName, int | None]:
    """The pseudo-median of gains, the verdict on whether it is one, and how many blocks an undecided one still needs.

    No gain is 0; what lies within +-limit is equivalent.
    """
    values = np.array(gains)
    found = hodges_lehmann(values)
    if found.confidence is not None:
        if -limit <= found.low and found.high <= limit:
            return found, "equivalent", None
        if found.low > 0 or found.high < 0:
            return found, "faster" if found.low > 0 else "slower", None
    return found, "undecided", _more_blocks(values, found.value, limit)


def _more_blocks(gains: Floats, centre: float, limit: float) -> int:
    """About how many more blocks would make the interval narrow enough to clear zero or to fit into the margin."""
    n = gains.size
    if n < 2:
        return MIN_BLOCKS - n
    narrow_enough = max(abs(centre), limit - abs(centre))
    need = (NormalDist().inv_cdf((1 + LEVEL) / 2) * float(gains.std(ddof=1)) / narrow_enough) ** 2
    return max(1, MIN_BLOCKS - n, math.ceil(need) - n)


def wilson(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) where nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the limits are exact; rounding would leave them a hair inside.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def mcnemar(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The exact two-sided p-value that two classifiers err equally often on the same patients (n,) bool, (n,) bool."""
    a, b = np.asarray(ours, dtype=bool), np.asarray(theirs, dtype=bool)
    only_ours, only_theirs = int((a & ~b).sum()), int((b & ~a).sum())
    n, least = only_ours + only_theirs, min(only_ours, only_theirs)
    # Fractions are exact; floats would overflow from about a thousand discordant patients on.
    tail: int = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


@dataclass(frozen=True, slots=True)
class Auc:
    """The area under the ROC curve with its interval and DeLong's variance."""

    value: float
    low: float
    high: float
    variance: float


def _midranks(sorted_values: Floats, values: Floats) -> Floats:
    """For each value: how many of `sorted_values` lie below it, ties counting a half."""
    below = np.searchsorted(sorted_values, values, side="left")
    return (below + np.searchsorted(sorted_values, values, side="right")) / 2.0


def _components(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """DeLong's structural components: of each positive (m,) and each negative (n,); the mean of either is the AUC."""
    truth, s = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    positive, negative = s[truth], s[~truth]
    assert min(positive.size, negative.size) > 0, "an AUC needs both labels"
    of_positive = _midranks(np.sort(negative), positive) / negative.size
    of_negative = 1 - _midranks(np.sort(positive), negative) / positive.size
    return of_positive, of_negative


def _mean_variance(a: Floats, b: Floats) -> float:
    """The variance of mean(a) + mean(b) of independent samples; a sample of one says nothing of its spread."""
    return sum(float(x.var(ddof=1)) / x.size if x.size > 1 else 0.25 for x in (a, b))


def delong(labels: ArrayLike, scores: ArrayLike, level: float = LEVEL) -> Auc:
    """AUC with DeLong's variance and an interval on the logit scale, which cannot leave [0, 1]; labels and scores (n,).

    At an AUC of 0 or 1 that variance is zero and says nothing: Wilson's interval for the smaller class stands in.
    Both labels must occur. Source: DeLong, DeLong, Clarke-Pearson, Biometrics 44 (1988); Sun, Xu, IEEE SPL 21 (2014).
    """
    of_positive, of_negative = _components(labels, scores)
    auc, variance = float(of_positive.mean()), _mean_variance(of_positive, of_negative)
    if auc in (0.0, 1.0) or variance == 0.0:
        smaller = min(of_positive.size, of_negative.size)
        low, high = wilson(round(auc * smaller), smaller, level)
        return Auc(auc, min(low, auc), max(high, auc), variance)
    z = NormalDist().inv_cdf((1 + level) / 2)
    logit, half = math.log(auc / (1 - auc)), z * math.sqrt(variance) / (auc * (1 - auc))
    return Auc(auc, _expit(logit - half), _expit(logit + half), variance)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference with its interval and the p-value against none."""

    value: float
    low: float
    high: float
    p: float


def delong_difference(labels: ArrayLike, ours: ArrayLike, theirs: ArrayLike, level: float = LEVEL) -> Difference:
    """AUC(ours) - AUC(theirs) on the same patients, paired (DeLong 1988); all (n,), both labels must occur."""
    (a_positive, a_negative), (b_positive, b_negative) = _components(labels, ours), _components(labels, theirs)
    difference = float(a_positive.mean() - b_positive.mean())
    error = math.sqrt(_mean_variance(a_positive - b_positive, a_negative - b_negative))
    if error == 0.0:
        return Difference(difference, difference, difference, 1.0 if difference == 0.0 else 0.0)
    half = NormalDist().inv_cdf((1 + level) / 2) * error
    p = math.erfc(abs(difference) / error / math.sqrt(2))
    return Difference(difference, difference - half, difference + half, p)


def bootstrap_mean(values: ArrayLike, *, seed: int, level: float = LEVEL, draws: int = 2000) -> tuple[float, float]:
    """The percentile interval of a mean (n,) under resampling; the same seed gives the same interval."""
    x, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // x.size)
    means = [x[rng.integers(x.size, size=(min(chunk, draws - i), x.size))].mean(1) for i in range(0, draws, chunk)]
    return percentiles(np.concatenate(means), level)


def bootstrap_counts(
    counts: tuple[int, int, int, int],
    statistic: Callable[[NDArray[Any]], NDArray[Any]],
    *,
    seed: int,
    level: float = LEVEL,
    draws: int = 2000,
) -> tuple[float, float] | None:
    """The percentile interval of a function of a confusion table under resampling of its patients.

    Resampling patients makes the four counts multinomial, so they are drawn directly. `statistic` takes float64
    (draws, 4) in the order of `counts` and returns (draws,), not-a-number where undefined; None if that is everywhere.
    """
    n = sum(counts)
    drawn = np.random.default_rng(seed).multinomial(n, np.asarray(counts) / n, size=draws).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(drawn)
    values = values[np.isfinite(values)]
    return percentiles(values, level) if values.size else None


def resamples(groups: ArrayLike, *, seed: int, draws: int) -> NDArray[np.int32]:
    """How often each of n items occurs in each resample of the groups that they are in, (n,) -> (n, draws).

    Groups are drawn with replacement, as many as there are, and come with all their items: so items of one group need
    not be independent of each other (the images of one person).
    """
    names, member = np.unique(groups, return_inverse=True)
    k, rng = names.size, np.random.default_rng(seed)
    counts = np.empty((k, draws), dtype=np.int32)
    for i in range(draws):
        counts[:, i] = np.bincount(rng.integers(k, size=k), minlength=k)
    return counts[member]


def resampled_auc(labels: ArrayLike, scores: ArrayLike, weights: NDArray[np.int32]) -> Floats:
    """The AUC of each resample, weights (n, draws) -> (draws,), of labels and scores (n,); ties count half.

    Not-a-number where a resample lacks a label.
    """
    s = np.asarray(scores, dtype=np.float64)
    order = np.argsort(s, kind="stable")
    s, truth = s[order], np.asarray(labels).astype(bool)[order]
    first, last = np.searchsorted(s, s[truth]), np.searchsorted(s, s[truth], side="right")
    pieces = []
    for begin in range(0, weights.shape[1], CHUNK):
        w = weights[order, begin : begin + CHUNK]
        below = np.zeros((s.size + 1, w.shape[1]), dtype=np.int64)  # negatives before each place
        np.cumsum(np.where(truth[:, None], 0, w), axis=0, out=below[1:])
        wins = (w[truth] * (below[first] + below[last])).sum(axis=0) / 2
        with np.errstate(invalid="ignore"):
            pieces.append(wins / (w[truth].sum(axis=0) * below[-1]))
    return np.concatenate(pieces)


def auc_of_groups(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: NDArray[np.int32]
) -> tuple[float, float] | None:
    """The percentile interval of an AUC over these `resamples` of groups; None where no resample has both labels.

    An AUC of 0 or 1 is one in every resample: it has that of `wilson_of_groups`, of the rarer label's items.
    """
    drawn = resampled_auc(labels, scores, weights)
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return None
    low, high = percentiles(drawn)
    if low == high and low in (0.0, 1.0):
        truth = np.asarray(labels).astype(bool)
        return wilson_of_groups(bool(low), min(int(truth.sum()), int((~truth).sum())), groups)
    return low, high


def wilson_of_groups(every: bool, items: int, groups: ArrayLike) -> tuple[float, float]:
    """Wilson's interval of a proportion of 1 (`every`) or 0 of so many of the items that are in groups, (n,).

    They count as the groups that so many items make on average.
    """
    member = np.asarray(groups)
    several = max(1, round(items * np.unique(member).size / member.size))
    return wilson(several if every else 0, several)


def percentiles(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The range of values (n,), n > 0, without half of 1 - level at either end: a bootstrap's interval."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

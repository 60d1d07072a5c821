"""Estimates against scipy, scikit-learn, closed forms and enumeration."""
# mypy: disable-error-code="import-untyped"

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from pneumo.study import statistics as s

finite = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


def test_resamples_hold_as_many_items_and_each_as_often() -> None:
    weights = s.resamples(range(50), seed=1, draws=2000)
    assert weights.shape == (50, 2000)
    assert (weights.sum(axis=0) == 50).all()
    assert weights.mean(axis=1) == pytest.approx(1.0, abs=5 / np.sqrt(2000))
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.05)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_a_group_is_drawn_with_all_its_items(groups: list[int]) -> None:
    weights = s.resamples(groups, seed=2, draws=20)
    for group in set(groups):
        assert len({tuple(row) for row, member in zip(weights.tolist(), groups, strict=True) if member == group}) == 1
    firsts = [groups.index(group) for group in set(groups)]
    assert (weights[firsts].sum(axis=0) == len(firsts)).all()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=12))
def test_the_auc_of_a_resample_is_that_of_so_many_copies(items: list[tuple[bool, int, int]]) -> None:
    labels, scores, times = (np.array(column) for column in zip(*items, strict=True))
    weights = np.stack([times, np.ones_like(times)], axis=1)
    found = s.resampled_auc(labels, scores, weights.astype(np.int32))
    for value, copies in zip(found.tolist(), weights.T, strict=True):
        truth = np.repeat(labels, copies)
        if 0 < truth.sum() < truth.size:
            assert value == pytest.approx(roc_auc_score(truth, np.repeat(scores, copies)), abs=1e-12)
        else:
            assert math.isnan(value)


@pytest.mark.parametrize(("n", "confidence"), [(6, 0.96875), (7, 0.953125), (8, 0.9609375), (10, 0.951171875)])
def test_exact_interval_has_the_tabulated_confidence(n: int, confidence: float) -> None:
    cut = s.signed_rank_cut(n)
    assert cut is not None
    assert cut[1] == pytest.approx(confidence, abs=1e-12)


@pytest.mark.parametrize("n", range(1, 6))
def test_no_interval_below_six_blocks(n: int) -> None:
    assert s.signed_rank_cut(n) is None
    found = s.hodges_lehmann(list(range(n)))
    assert (found.kind, found.low, found.high, found.confidence) == ("range", 0, n - 1, None)


@pytest.mark.parametrize("n", range(6, 13))
def test_cut_against_the_enumeration_of_all_signs(n: int) -> None:
    sums = [sum(r * sign for r, sign in enumerate(signs, 1)) for signs in itertools.product((0, 1), repeat=n)]
    cut, confidence = s.signed_rank_cut(n) or (None, None)
    assert cut is not None
    tail = [sum(w <= k for w in sums) / 2**n for k in (cut, cut + 1)]
    assert tail[0] <= 0.025 < tail[1]
    assert confidence == pytest.approx(1 - 2 * tail[0], abs=1e-12)


@given(st.lists(finite, min_size=6, max_size=14, unique=True), st.sampled_from([0.8, 0.9, 0.95]))
@settings(deadline=None, max_examples=40)
def test_interval_holds_exactly_the_centres_that_wilcoxon_does_not_reject(values: list[float], level: float) -> None:
    x = np.array(values)
    found = s.hodges_lehmann(x, level)
    walsh = sorted({(a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2)})
    for low, high in itertools.pairwise(walsh):
        centre = (low + high) / 2
        distances = np.abs(x - centre)
        if high - low < 1e-6 or np.unique(distances.round(9)).size < x.size or distances.min() < 1e-9:
            continue
        accepted = stats.wilcoxon(x - centre, method="exact").pvalue > 1 - level + 1e-12
        assert accepted == (found.low < centre < found.high)


@given(st.lists(finite, min_size=1, max_size=12), st.floats(-50, 50), st.floats(0.1, 10))
@settings(deadline=None)
def test_estimate_moves_and_scales_with_the_values(values: list[float], shift: float, scale: float) -> None:
    plain, moved = s.hodges_lehmann(values), s.hodges_lehmann([scale * v + shift for v in values])
    for a, b in ((plain.value, moved.value), (plain.low, moved.low), (plain.high, moved.high)):
        assert b == pytest.approx(scale * a + shift, abs=1e-6)
    assert plain.low <= plain.value <= plain.high


def test_interval_covers_what_it_states() -> None:
    draws = np.random.default_rng(0).laplace(1.0, 1.0, size=(4000, 6))
    covered = np.mean([(e := s.hodges_lehmann(x)).low <= 1.0 <= e.high for x in draws])
    assert covered == pytest.approx(0.96875, abs=4 * math.sqrt(0.969 * 0.031 / 4000))


@given(st.lists(finite, min_size=6, max_size=40))
@settings(deadline=None, max_examples=40)
def test_median_and_its_interval_against_numpy_and_scipy(values: list[float]) -> None:
    found, theirs = s.median(values), stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert found.value == np.median(values)
    assert (found.low, found.high, found.kind) == (theirs.low, theirs.high, "interval")


@pytest.mark.parametrize("n", range(1, 6))
def test_a_median_of_few_blocks_has_their_range(n: int) -> None:
    found = s.median([5.0] + [1.0] * (n - 1))
    assert (found.kind, found.low, found.high) == ("range", 1.0 if n > 1 else 5.0, 5.0)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.5, 1.6, 1.55, 1.52, 1.58, 1.49], "faster"),
        ([0.5, 0.6, 0.55, 0.52, 0.58, 0.49], "slower"),
        ([1.01, 0.99, 1.02, 1.0, 0.98, 1.015], "equivalent"),
        ([1.01, 1.02, 1.02, 1.01, 1.03, 1.015], "equivalent"),
        ([1.3, 0.8, 1.2, 0.9, 1.1, 0.95], "undecided"),
        ([1.5, 1.6, 1.55], "undecided"),
        ([1.5], "undecided"),
    ],
)
def test_verdicts(ratios: list[float], verdict: str) -> None:
    theirs = {i: 2.0 + i for i in range(len(ratios))}
    found = s.compare({i: ratio * theirs[i] for i, ratio in enumerate(ratios)}, theirs)
    assert found is not None
    assert found.verdict == verdict
    assert (found.more_blocks is not None) == (verdict == "undecided")
    assert found.ratio.low == pytest.approx(min(ratios))
    assert found.ratio.high == pytest.approx(max(ratios))
    if len(ratios) < 6:
        assert found.more_blocks is not None
        assert len(ratios) + found.more_blocks >= 6


def test_the_blocks_asked_for_decide_about_half_the_time_or_more() -> None:
    rng, decided, tried = np.random.default_rng(3), 0, 0
    while tried < 60:
        logs = rng.normal(0.12, 0.2, size=120)
        first = s.compare(dict(enumerate(np.exp(logs[:8]))), dict.fromkeys(range(8), 1.0))
        assert first is not None
        if first.verdict != "undecided" or first.more_blocks is None or first.more_blocks > 100:
            continue
        n, tried = 8 + first.more_blocks, tried + 1
        second = s.compare(dict(enumerate(np.exp(logs[:n]))), dict.fromkeys(range(n), 1.0))
        decided += second is not None and second.verdict != "undecided"
    assert decided >= 0.4 * tried


def test_comparison_uses_only_the_blocks_that_both_have() -> None:
    found = s.compare({1: 2.0, 2: 2.0, 9: 50.0}, {0: 7.0, 1: 1.0, 2: 1.0})
    assert found is not None
    assert found.blocks == 2
    assert found.ratio.value == pytest.approx(2.0)
    assert s.compare({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-3.0, -2.5, -2.8, -3.1, -2.2, -2.7], "faster"),
        ([3.0, 2.5, 2.8, 3.1, 2.2, 2.7], "slower"),
        ([0.9, -1.0, 0.3, -0.2, 0.0, 0.1], "equivalent"),
        ([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "equivalent"),
        ([0.0] * 6, "equivalent"),
        ([0.5, 0.6, 0.7, 0.8, 0.9, 1.1], "slower"),
        ([3.0, -2.0, 1.0, -1.0, 2.0, 0.0], "undecided"),
        ([-3.0] * 5, "undecided"),
    ],
)
def test_verdicts_of_costs(differences: list[float], verdict: str) -> None:
    """Costs may be 0 on both sides; the margin is in their unit."""
    theirs = {i: float(i) for i in range(len(differences))}
    found = s.compare_costs({i: theirs[i] + d for i, d in enumerate(differences)}, theirs, 1.0)
    assert found is not None
    assert (found.verdict, found.blocks, found.margin) == (verdict, len(differences), 1.0)
    assert (found.more_blocks is not None) == (verdict == "undecided")
    limits = (found.difference.low, found.difference.high)
    assert limits == pytest.approx((min(differences), max(differences)))
    assert s.compare_costs({0: 1.0}, {1: 1.0}, 1.0) is None


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=9), st.floats(0.1, 100))
@settings(deadline=None)
def test_costs_turned_round_differ_in_sign(pairs: list[tuple[float, float]], margin: float) -> None:
    ours, theirs = (dict(enumerate(values)) for values in zip(*pairs, strict=True))
    forth, back = s.compare_costs(ours, theirs, margin), s.compare_costs(theirs, ours, margin)
    assert forth is not None
    assert back is not None
    a, b = forth.difference, back.difference
    assert (b.value, b.low, b.high) == (-a.value, -a.high, -a.low)
    estimate = s.hodges_lehmann([x - y for x, y in pairs])
    assert (a.value, a.low, a.high) == pytest.approx((estimate.value, estimate.low, estimate.high))
    turned = {"faster": "slower", "slower": "faster"}
    assert back.verdict == turned.get(forth.verdict, forth.verdict)
    assert back.more_blocks == forth.more_blocks


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=9))
@settings(deadline=None)
def test_comparison_turned_round_is_its_inverse(speeds: list[float]) -> None:
    ours, theirs = dict(enumerate(speeds)), dict(enumerate(reversed(speeds)))
    forth, back = s.compare(ours, theirs), s.compare(theirs, ours)
    assert forth is not None
    assert back is not None
    assert forth.ratio.value * back.ratio.value == pytest.approx(1)
    assert forth.ratio.low * back.ratio.high == pytest.approx(1)
    opposite = {"faster": "slower", "slower": "faster"}
    assert back.verdict == opposite.get(forth.verdict, forth.verdict)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_wilson_against_scipy(case: tuple[int, int]) -> None:
    k, n = case
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert s.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_is_everything() -> None:
    assert s.wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
@settings(deadline=None)
def test_mcnemar_against_scipy(only_ours: int, only_theirs: int, both: int) -> None:
    ours = [True] * only_ours + [False] * only_theirs + [True] * both
    theirs = [False] * only_ours + [True] * only_theirs + [True] * both
    n = only_ours + only_theirs
    expected = stats.binomtest(only_ours, n).pvalue if n else 1.0
    assert s.mcnemar(ours, theirs) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_discordant_patients_does_not_overflow() -> None:
    p = s.mcnemar([True] * 1500 + [False] * 1600, [False] * 1500 + [True] * 1600)
    assert p == pytest.approx(stats.binomtest(1500, 3100).pvalue, rel=1e-9)


def two_classes(seed: int, n: int = 80, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    labels[:2] = 0, 1
    common = labels + rng.normal(size=n)
    a, b = common + 0.5 * rng.normal(size=n), common + rng.normal(size=n)
    return labels, a.round(1) if ties else a, b.round(1) if ties else b


@pytest.mark.parametrize("seed", range(5))
def test_auc_against_sklearn_and_variance_by_its_definition(seed: int) -> None:
    labels, scores, _ = two_classes(seed)
    found = s.delong(labels, scores)
    assert found.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    expected = wins.mean(1).var(ddof=1) / positive.size + wins.mean(0).var(ddof=1) / negative.size
    assert found.variance == pytest.approx(expected, rel=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("seed", range(5))
def test_paired_difference_by_its_definition(seed: int) -> None:
    labels, a, b = two_classes(seed)
    found = s.delong_difference(labels, a, b)

    def wins(scores: np.ndarray) -> np.ndarray:
        positive, negative = scores[labels == 1], scores[labels == 0]
        return np.asarray((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative))

    wa, wb = wins(a), wins(b)
    variance = np.zeros(())
    for axis in (0, 1):  # var(a) + var(b) - 2 cov(a, b) of the components, DeLong's covariance matrix
        covariance = np.cov(wa.mean(axis), wb.mean(axis)) / wa.mean(axis).size
        variance = variance + covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    z = found.value / math.sqrt(variance)
    assert found.value == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b), abs=1e-12)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)
    assert found.high - found.value == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(variance), rel=1e-9)


def test_auc_interval_covers() -> None:
    truth, covered = float(stats.norm.cdf(1.5 / math.sqrt(2))), 0
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 50)
    for _ in range(800):
        found = s.delong(labels, rng.normal(size=100) + 1.5 * labels)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 800 <= 0.975


def test_a_perfect_auc_does_not_claim_to_be_certain() -> None:
    found = s.delong([0] * 10 + [1] * 20, list(range(30)))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.6 < found.low < 0.8


def test_equal_scores_do_not_differ() -> None:
    labels, a, _ = two_classes(1)
    found = s.delong_difference(labels, a, a)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_bootstrap_of_a_mean_is_seeded_and_close_to_the_normal_interval() -> None:
    x = np.random.default_rng(0).normal(size=400)
    low, high = s.bootstrap_mean(x, seed=1)
    half = 1.96 * x.std() / 20
    assert (low, high) == s.bootstrap_mean(x, seed=1) != s.bootstrap_mean(x, seed=2)
    assert low == pytest.approx(x.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.2 * half)


def test_bootstrap_of_counts_agrees_with_resampled_patients() -> None:
    counts, rng = (40, 10, 35, 15), np.random.default_rng(0)
    cells = np.repeat(np.arange(4), counts)

    def f1(c: np.ndarray) -> np.ndarray:
        return np.asarray(2 * c[:, 0] / (2 * c[:, 0] + c[:, 1] + c[:, 3]))

    resampled = np.array([np.bincount(rng.choice(cells, 100), minlength=4) for _ in range(4000)])
    expected = np.quantile(f1(resampled), [0.025, 0.975])
    assert s.bootstrap_counts(counts, f1, seed=0) == pytest.approx(expected, abs=0.015)
    assert s.bootstrap_counts((0, 0, 5, 0), f1, seed=0) is None


@given(st.lists(st.floats(-100, 100), min_size=6, max_size=30))
def test_a_ratio_of_totals_of_equal_wholes_is_a_mean_with_students_interval(values: list[float]) -> None:
    found = s.ratio_of_totals(values, [2.0] * len(values))
    x = np.array(values) / 2
    error = float(stats.sem(x))
    assert found.value == pytest.approx(x.mean(), abs=1e-9)
    half = stats.t.ppf(0.975, len(values) - 1) * error
    assert [found.low, found.high] == pytest.approx([x.mean() - half, x.mean() + half], abs=1e-6)
    assert found.kind == "interval"


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 10)), min_size=1, max_size=5))
def test_a_ratio_of_few_totals_lies_within_the_range_of_its_blocks(pairs: list[tuple[float, float]]) -> None:
    found = s.ratio_of_totals(*zip(*pairs, strict=True))
    own = [x / y for x, y in pairs]
    assert [found.low, found.high] == pytest.approx([min(own), max(own)], abs=1e-9)
    assert found.low <= found.value <= found.high
    assert found.kind == "range"


def test_the_interval_of_a_ratio_of_totals_covers_it() -> None:
    """Of blocks whose lengths differ by a fifth, and whose loss is a fifth of them and noise."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        wholes = np.exp(rng.normal(0, 0.2, 8))
        parts = 0.2 * wholes + rng.normal(0, 0.05, 8)
        found = s.ratio_of_totals(parts, wholes)
        covered += found.low <= 0.2 <= found.high
    assert 0.93 < covered / 2000 < 0.97

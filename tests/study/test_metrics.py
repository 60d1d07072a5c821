"""Metrics against scikit-learn, and the threshold against brute force and perturbation."""
# mypy: disable-error-code="import-untyped"

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pneumo.study.metrics import AGE_GROUPS, PROPORTIONS, Predictions, quality, subgroups, youden_threshold

labels_and_grid = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 1), min_size=n, max_size=n), st.lists(st.integers(0, 1000), min_size=n, max_size=n)
    )
)


def youden(labels: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    says = scores >= threshold
    return float(says[labels == 1].mean() - says[labels == 0].mean())


@given(labels_and_grid, st.integers(0, 2**31))
@settings(deadline=None)
def test_threshold_is_best_and_answers_survive_the_fifth_digit(case: tuple[list[int], list[int]], seed: int) -> None:
    labels, scores = np.array(case[0]), np.array(case[1]) / 1000
    threshold = youden_threshold(labels, scores)
    noise = np.random.default_rng(seed).uniform(-1e-5, 1e-5, scores.size)
    other = youden_threshold(labels, scores + noise)
    if np.ptp(scores) > 0.01:
        assert abs(other - threshold) <= 1.1e-5
    if len(set(labels.tolist())) == 2:
        grid = np.unique(scores)
        best = max([youden(labels, scores, t) for t in grid], default=0.0)
        if best > 1e-12:
            assert youden(labels, scores, threshold) == pytest.approx(best, abs=1e-12)
            assert np.abs(scores - threshold).min() > 4e-4
        else:
            assert threshold == 0.5


def test_threshold_lies_midway_and_ignores_gaps_of_rounding_size() -> None:
    assert youden_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)
    # The best cut is between two scores that differ in the sixth digit; the next best gap is taken.
    scores, labels = [0.1, 0.3, 0.300001, 0.9], [0, 0, 1, 1]
    assert youden_threshold(labels, scores) in (pytest.approx(0.2), pytest.approx(0.6000005))


def test_threshold_takes_the_middle_one_of_equals() -> None:
    labels, scores = [0, 1, 0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert youden_threshold(labels, scores) == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("labels", "scores"), [([], []), ([1, 1], [0.2, 0.8]), ([0, 0], [0.2, 0.8]), ([1, 0], [0.2, 0.8]), ([0, 1], [1, 1])]
)
def test_threshold_without_anything_to_learn_from(labels: list[int], scores: list[float]) -> None:
    assert youden_threshold(labels, scores) == 0.5


def test_threshold_of_a_model_that_hardly_moved_from_a_half() -> None:
    threshold = youden_threshold([0, 0, 1, 1], [0.5, 0.50001, 0.50004, 0.50005])
    assert 0.50001 < threshold < 0.50004


@given(labels_and_grid, st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=40)
def test_metrics_against_sklearn(case: tuple[list[int], list[int]], threshold: float) -> None:
    labels, scores = np.array(case[0]), np.array(case[1]) / 1000
    found = quality(labels, scores, threshold=threshold, natural_prevalence=0.2)
    says, m = (scores >= threshold).astype(int), found.metrics
    tn, fp, fn, tp = sk.confusion_matrix(labels, says, labels=[0, 1]).ravel().tolist()
    assert (m["n"], m["positives"]) == (labels.size, labels.sum())
    assert m["accuracy"] == pytest.approx(sk.accuracy_score(labels, says))
    assert m["brier"] == pytest.approx(float(np.mean((scores - labels) ** 2)))
    assert m["majority"] == pytest.approx(max(labels.mean(), 1 - labels.mean()))
    for name, top, rest in (("sensitivity", tp, fn), ("specificity", tn, fp), ("ppv", tp, fp), ("npv", tn, fn)):
        assert m[name] == (pytest.approx(top / (top + rest)) if top + rest else None)
    if len(set(labels.tolist())) == 2:
        assert m["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, says))
        assert m["auc"] == pytest.approx(sk.roc_auc_score(labels, scores))
    else:
        assert m["auc"] is None
        assert m["balanced_accuracy"] is None
    if tp + fp + fn:
        assert m["f1"] == pytest.approx(sk.f1_score(labels, says))
    for name, (low, high) in found.intervals.items():
        assert low - 1e-9 <= high
        if name in ("accuracy", "sensitivity", "specificity", "ppv", "npv", "auc"):
            value = m[name]
            assert value is not None
            assert low - 1e-12 <= value <= high + 1e-12


@given(labels_and_grid)
@settings(deadline=None, max_examples=25)
def test_predictive_values_at_the_prevalence_found_are_the_plain_ones(case: tuple[list[int], list[int]]) -> None:
    labels, scores = np.array(case[0]), np.array(case[1]) / 1000
    m = quality(labels, scores, threshold=0.5, natural_prevalence=float(labels.mean())).metrics
    for name in ("ppv", "npv"):
        if m[f"{name}_natural"] is not None and m[name] is not None:
            assert m[f"{name}_natural"] == pytest.approx(m[name])


def test_predictive_values_by_a_worked_example() -> None:
    # Sensitivity 0.9, specificity 0.8, prevalence 0.1: 9 of 27 positive answers in a hundred are right.
    labels = np.repeat([1, 0], 10)
    scores = np.array([1] * 9 + [0] + [1] * 2 + [0] * 8)
    m = quality(labels, scores, threshold=0.5, natural_prevalence=0.1).metrics
    assert m["ppv_natural"] == pytest.approx(9 / 27)
    assert m["npv_natural"] == pytest.approx(72 / 73)


def test_the_bootstrap_is_seeded() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=50), rng.random(50)
    first, again, other = (
        quality(labels, scores, threshold=0.5, natural_prevalence=0.2, seed=seed).intervals for seed in (0, 0, 1)
    )
    assert first == again
    assert first["brier"] != other["brier"]


@pytest.mark.parametrize("right", [0.8, 1.0])
def test_images_of_one_person_count_as_one_in_an_interval(right: float) -> None:
    """Three times the same answers say no more than the answers once, if it is known whose they are."""
    rng, n = np.random.default_rng(1), 150
    labels = rng.integers(2, size=n)
    scores = np.where(rng.random(n) < right, labels, 1 - labels) * 0.5 + rng.random(n) / 2

    def intervals(times: int, person: np.ndarray | None) -> dict[str, tuple[float, float]]:
        answers = np.tile(labels, times), np.tile(scores, times)
        return quality(*answers, threshold=0.5, natural_prevalence=0.2, person=person).intervals

    known, unknown, single = intervals(3, np.tile(np.arange(n), 3)), intervals(3, None), intervals(1, None)
    assert known.keys() == unknown.keys() == single.keys()
    for name, (low, high) in known.items():
        assert high > low or (right == 1.0 and name not in (*PROPORTIONS, "auc")), name
        if low > 0 and high < 1:
            assert high - low > 1.4 * (unknown[name][1] - unknown[name][0]), name
            assert high - low == pytest.approx(single[name][1] - single[name][0], rel=0.2), name
    if right == 1.0:
        for name in PROPORTIONS:
            assert known[name] == pytest.approx(single[name], abs=0.01), name
        assert known["auc"] == pytest.approx(single["auc"], abs=0.01)


def test_of_one_person_nothing_is_said_beyond_the_figures() -> None:
    found = quality([0, 1, 1], [0.2, 0.6, 0.7], threshold=0.5, natural_prevalence=0.2, person=[4, 4, 4])
    assert (found.metrics["persons"], found.metrics["accuracy"], found.intervals) == (1, 1.0, {})


def predictions(n: int, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    view = np.array([("PA", "AP", None)[i % 3] for i in range(n)], dtype=object)
    sex = np.array(["F" if i < 15 else "M" for i in range(n)], dtype=object)
    age = np.where(np.arange(n) < 5, np.nan, rng.integers(1, 99, size=n))
    return Predictions(np.arange(n), label, rng.random(n), np.full(n, np.nan), view, sex, age)


def test_subgroups_are_those_that_are_large_enough() -> None:
    p = predictions(120)
    found = {(g.by, g.group): g for g in subgroups(p, 0.5)}
    assert ("sex", "F") not in found
    assert {group for by, group in found if by == "view"} == {"PA", "AP"}
    group, where = found["sex", "M"], p.sex == "M"
    assert group.n == 105
    assert group.accuracy == pytest.approx(sk.accuracy_score(p.label[where], p.score[where] >= 0.5))
    assert group.auc == pytest.approx(sk.roc_auc_score(p.label[where], p.score[where]))
    assert all(g.n >= 20 for g in found.values())


def test_a_group_with_one_label_is_left_out() -> None:
    p = predictions(120)
    p.label[p.view == "AP"] = 1
    assert ("view", "AP") not in {(g.by, g.group) for g in subgroups(p, 0.5)}


def test_age_groups_cover_every_age_once() -> None:
    for age in range(121):
        assert sum(low <= age <= high for low, high, _ in AGE_GROUPS) == 1

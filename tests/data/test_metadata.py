"""Tables of the metadata, and how well they foretell the label, against scikit-learn, scipy and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pneumo.data.metadata import (
    AGE_BANDS,
    FEWEST,
    Subject,
    age_band,
    auc,
    fit_logistic,
    positive_rates,
    predict,
    tabulate,
    wilson,
)


def population(count: int, seed: int, rate_ap: float, rate_pa: float) -> list[Subject]:
    """Return subjects of which every other one is an AP image; sex and age are noise."""
    random = np.random.default_rng(seed)
    views = ["AP" if i % 2 else "PA" for i in range(count)]
    labels = [int(random.random() < (rate_ap if view == "AP" else rate_pa)) for view in views]
    sexes, ages = random.choice(["M", "F"], count), random.integers(1, 95, count)
    return [
        Subject(label, None, str(sex), int(age), view, str(i))
        for i, (label, view, sex, age) in enumerate(zip(labels, views, sexes, ages, strict=True))
    ]


def test_tables_count_every_subject_once_in_each_field() -> None:
    subjects = [
        Subject(1, "Lung Opacity", "M", 81, "AP", "a"),
        Subject(0, "Normal", "M", 17, "PA", "b"),
        Subject(0, "Normal", None, None, None, "c"),
        Subject(0, None, "F", 18, "PA", "d"),
    ]
    tables = tabulate(subjects)
    assert tables["sex"] == {
        "F": {"No Lung Opacity": 1},
        "M": {"Lung Opacity": 1, "Normal": 1},
        "unknown": {"Normal": 1},
    }
    assert list(tables["age"]) == ["0-17", "18-39", "80+", "unknown"]
    assert list(tables["view"]) == ["AP", "PA", "unknown"]
    for table in tables.values():
        assert sum(sum(row.values()) for row in table.values()) == len(subjects)
    rates = positive_rates(subjects, "view")
    assert (rates["AP"].rate, rates["PA"].positive, rates["PA"].images) == (1.0, 0, 2)


def test_age_bands_cover_all_ages_once() -> None:
    bands = [age_band(age) for age in range(121)]
    assert len(dict.fromkeys(bands)) == len(AGE_BANDS)
    assert [key for key, _ in itertools.groupby(bands)] == list(dict.fromkeys(bands))
    assert age_band(None) == age_band(121) == "unknown"


@given(trials=st.integers(1, 400), data=st.data())
@settings(max_examples=50, deadline=None)
def test_wilson_agrees_with_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=4, max_size=60))
@settings(max_examples=60, deadline=None)
def test_auc_agrees_with_scikit_learn_ties_included(rows: list[tuple[int, int]]) -> None:
    labels, scores = np.array([0, 0, 1, 1] + [r[0] for r in rows]), np.array([0.0, 9, 0, 9] + [r[1] for r in rows])
    area, low, high = auc(labels, scores, np.zeros(labels.size, np.int64))
    assert area == pytest.approx(roc_auc_score(labels, scores))
    assert 0 <= low <= area <= high <= 1


def test_auc_interval_covers_the_truth() -> None:
    truth = 0.5 * (1 + math.erf(0.5))  # of two normal distributions one standard deviation apart
    covered = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        labels = np.repeat([0, 1], 60)
        low, high = auc(labels, random.normal(labels, 1.0), np.zeros(120, np.int64))[1:]
        covered += low <= truth <= high
    assert 180 <= covered <= 199


@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_logistic_regression_agrees_with_scikit_learn(ridge: float) -> None:
    random = np.random.default_rng(3)
    features = random.normal(size=(300, 4))
    labels = (random.random(300) < 1 / (1 + np.exp(-(features @ [1.0, -2, 0, 0.5] - 0.7)))).astype(np.int64)
    theirs = LogisticRegression(C=1 / ridge, tol=1e-12, max_iter=10000).fit(features, labels)
    expected = [theirs.intercept_[0], *theirs.coef_[0]]
    assert fit_logistic(features, labels, ridge) == pytest.approx(expected, abs=1e-5)


def test_logistic_regression_stays_finite_where_classes_are_separable() -> None:
    labels = np.array([0] * 50 + [1] * 50)
    weights = fit_logistic(labels[:, None].astype(float), labels)
    assert np.isfinite(weights).all()
    assert weights[0] < 0 < weights[0] + weights[1]


def test_the_view_foretells_the_label_where_it_does_and_noise_does_not() -> None:
    found = {one.features: one for one in predict(population(3000, 1, rate_ap=0.38, rate_pa=0.09))}
    ap_of_positive, ap_of_negative = 0.38 / 0.47, 0.62 / 1.53
    expected = 0.5 + (ap_of_positive - ap_of_negative) / 2
    assert found["view"].auc_low < expected < found["view"].auc_high
    assert abs(found["view, sex and age"].auc - expected) < 0.03
    for noise in ("sex", "age"):
        assert abs(found[noise].auc - 0.5) < 0.04
    for one in found.values():
        assert one.accuracy_low <= one.accuracy <= one.accuracy_high
        assert one.majority == pytest.approx(1 - 0.235, abs=0.03)


def test_useless_metadata_are_not_below_chance() -> None:
    """Pooled over folds they would be: this is why ranks are compared inside of folds."""
    areas = [predict(population(120, seed, 0.5, 0.5))[0].auc for seed in range(40)]
    assert abs(np.mean(areas) - 0.5) < 0.035


def test_images_of_one_person_are_never_on_both_sides() -> None:
    """Each person's own two images agree, in view and label; across persons the view means nothing."""
    random = np.random.default_rng(0)
    subjects = []
    for person in range(200):
        label, age = int(random.integers(2)), int(random.integers(1, 95))
        subjects += [Subject(label, None, "M", age, "PA", str(person))] * 2
    assert abs(predict(subjects)[2].auc - 0.5) < 0.12


def test_too_few_say_nothing() -> None:
    subjects = population(400, 0, 0.5, 0.5)
    few = [s for s in subjects if s.label == 0] + [s for s in subjects if s.label == 1][: FEWEST - 1]
    assert predict(few) == []
    assert predict([]) == []
    assert predict([Subject(i % 2, None, "M", 50, "PA", "one person") for i in range(200)]) == []
    assert tabulate([]) == {"sex": {}, "age": {}, "view": {}}

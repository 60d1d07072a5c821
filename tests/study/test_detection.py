"""A detector's metrics against COCO's evaluators, the challenge's text in exact arithmetic, and plain loops."""
# mypy: disable-error-code="import-untyped"

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    Picture,
    average_precisions,
    challenge_score,
    detections,
    drawn_pictures,
    faster_evaluation,
    pycocotools_evaluation,
    small_pictures,
)
from sklearn.metrics import roc_auc_score

from pneumo.study.boxes import Detections
from pneumo.study.curves import RATES, RECALLS
from pneumo.study.detection import (
    METRICS,
    NO_THRESHOLD,
    choose_threshold,
    detection_quality,
    image_scores,
    map_difference,
    measure,
    rsna_scores,
)
from pneumo.study.statistics import resamples

A, B = (0, 0, 10, 10), (10, 0, 10, 10)
FAR = (500, 500, 10, 10)
AVERAGES = ("map50", "map50_95", "map50_positives", "map50_95_positives")
EVALUATIONS = (pycocotools_evaluation, faster_evaluation)


def once(d: Detections) -> np.ndarray:
    return np.ones((d.truths.size, 1), dtype=np.int32)


def estimates(pictures: Sequence[Picture], threshold: float = 0.5) -> dict[str, float]:
    d = detections(pictures)
    return {name: float(values[0]) for name, values in measure(d, threshold, once(d)).items()}


def rsna_map(pictures: Sequence[Picture], threshold: float = 0.0) -> float:
    return estimates(pictures, threshold)["rsna_map"]


@given(small_pictures())
@settings(deadline=None)
def test_map_equals_that_of_others(pictures: list[Picture]) -> None:
    found = estimates(pictures)
    for name, chosen in (("", pictures), ("_positives", [p for p in pictures if p.truths])):
        ours = found[f"map50{name}"], found[f"map50_95{name}"]
        for evaluate in EVALUATIONS:
            theirs = average_precisions(evaluate(chosen)) if chosen else (np.nan, np.nan)
            assert ours == pytest.approx(theirs, abs=1e-9, nan_ok=True)


def test_map_of_hundreds_of_pictures_equals_that_of_others() -> None:
    pictures = drawn_pictures(300, seed=2)
    assert sum(len(p.scores) > 100 for p in pictures) > 3
    ours = estimates(pictures)
    for evaluate in EVALUATIONS:
        stats = evaluate(pictures, quick=False).stats
        assert (ours["map50_95"], ours["map50"]) == pytest.approx((stats[0], stats[1]), abs=1e-9)
    theirs = pycocotools_evaluation([p for p in pictures if p.truths]).eval["precision"]
    assert ours["map50_95_positives"] == pytest.approx(theirs.mean(), abs=1e-9)
    assert ours["map50"] + 0.01 < ours["map50_positives"] < 0.99


def test_a_recall_that_is_missed_by_rounding() -> None:
    """The first recall that linspace puts above its decimal: as many hits in a hundred do not reach it."""
    k = int(np.flatnonzero(np.arange(101) / 100 < RECALLS)[0])
    pictures = [Picture([A], [0.9 - i / 1000], [A]) for i in range(k)]
    pictures += [Picture(truths=[A]) for _ in range(100 - k)]
    ours = estimates(pictures)["map50"]
    for evaluate in EVALUATIONS:
        assert ours == pytest.approx(average_precisions(evaluate(pictures))[0], abs=1e-9)
    assert ours == pytest.approx(k / 101, abs=1e-9)


def test_beyond_a_hundred_boxes_of_an_image_none_counts() -> None:
    wrong = [FAR] * 100
    late = Picture([*wrong, A], [0.9] * 100 + [0.8], [A])
    assert estimates([late])["map50"] == 0.0
    assert estimates([late])["froc_8"] == 0.0
    early = replace(late, scores=[0.8] * 100 + [0.9])
    assert estimates([early])["map50"] == 1.0


# Of each case the pictures, the challenge's score, and what a usual mistake would make of it.
CASES = {
    "an overlap of exactly 0.5 is no hit at 0.5": ([Picture([(0, 0, 10, 5)], [0.9], [A])], 2 / 8, 3 / 8),
    "a true box is found once": ([Picture([A, A], [0.9, 0.8], [A])], 1 / 2, 2 / 2),
    "an image with neither does not count": ([Picture([A], [0.9], [A]), Picture()], 1.0, 1 / 2),
    "an image with false boxes counts, as 0": ([Picture([A], [0.9], [A]), Picture([A], [0.9])], 1 / 2, 1.0),
    "an image with neither is not right either": (
        [Picture([A], [0.9], [A]), Picture(), Picture([A], [0.9])],
        1 / 2,
        2 / 3,
    ),
    # The box over both, (1, 0, 19, 10), overlaps A by 0.45 and B by 0.526; it comes second in the list.
    "in order of confidence, not of the list": (
        [Picture([B, (1, 0, 19, 10)], [0.8, 0.9], [A, B])],
        1 / 3,
        (1 + 7 / 3) / 8,
    ),
    "a box takes the true box that it overlaps most, not the first": (
        [Picture([(1, 0, 19, 10), A], [0.9, 0.8], [A, B])],
        (3 + 5 / 3) / 8,
        (2 + 6 / 3) / 8,
    ),
    "the mean over images, not over all boxes": (
        [Picture([A], [0.9], [A]), Picture([FAR] * 3, [0.9, 0.8, 0.7], [A])],
        1 / 2,
        1 / 5,
    ),
    "missed true boxes count, too": ([Picture([A], [0.9], [A, B])], 1 / 2, 1.0),
    "no box at all in an image with a true one is 0": ([Picture([A], [0.9], [A]), Picture(truths=[A])], 1 / 2, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_worked_cases_of_the_challenge(case: str) -> None:
    pictures, right, wrong = CASES[case]
    assert right != pytest.approx(wrong)
    assert rsna_map(pictures) == pytest.approx(right, abs=1e-12)
    assert float(challenge_score(pictures) or 0) == pytest.approx(right, abs=1e-12)


@given(small_pictures(), st.integers(0, 10))
@settings(deadline=None, max_examples=50)
def test_the_challenges_score_is_that_of_its_text(pictures: list[Picture], tenths: int) -> None:
    expected = challenge_score(pictures, tenths / 10)
    found = rsna_map(pictures, tenths / 10)
    assert found == pytest.approx(np.nan if expected is None else float(expected), abs=1e-9, nan_ok=True)


@given(small_pictures(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_threshold_is_the_best_and_survives_the_fifth_digit(pictures: list[Picture], seed: int) -> None:
    d = detections(pictures)
    threshold = choose_threshold(d)
    scores = sorted({score for p in pictures for score in p.scores})
    best = max((float(challenge_score(pictures, score) or 0) for score in scores), default=0.0)
    if best == 0 or len(scores) == 1:
        assert best > 0 or threshold == NO_THRESHOLD
        return
    assert float(challenge_score(pictures, threshold) or 0) == pytest.approx(best, abs=1e-12)
    assert np.abs(d.score - threshold).min() > 0.04
    noise = np.random.default_rng(seed).uniform(-1e-5, 1e-5, d.score.size)
    # The scores' order within an image is that of the match, which is given here.
    assert choose_threshold(replace(d, score=d.score + noise)) == pytest.approx(threshold, abs=1.1e-5)


def test_threshold_of_many_boxes_is_the_best_of_all() -> None:
    d = detections(drawn_pictures(60, seed=3))
    between = np.unique(d.score)[:-1] + 0.005
    best = max(np.nanmean(rsna_scores(d, t)) for t in between)
    assert np.nanmean(rsna_scores(d, choose_threshold(d))) == pytest.approx(best, abs=1e-12)
    assert best > np.nanmean(rsna_scores(d, 0.0)) + 0.01


def test_threshold_lies_midway_and_of_equals_in_the_middle_one() -> None:
    assert choose_threshold(detections([Picture([A, FAR], [0.8, 0.4], [A])])) == pytest.approx(0.6)
    # Everything may be kept, too.
    assert choose_threshold(detections([Picture([A], [0.8], [A])])) == pytest.approx(0.4)
    # Once an image without true boxes has one box, further ones change nothing.
    hit = Picture([A], [0.5], [A])
    assert choose_threshold(detections([hit, Picture([FAR] * 3, [0.9, 0.3, 0.1])])) == pytest.approx(0.2)
    assert choose_threshold(detections([hit, Picture([FAR] * 2, [0.9, 0.3])])) == pytest.approx(0.15)


@pytest.mark.parametrize("others", range(1, 9))
def test_thresholds_are_equally_good_whatever_rounding_says(others: int) -> None:
    """1 of 3 true boxes by one box, or 2 of 3 by five, is a score of 1/3; the sums on the way there differ."""
    truths = [A, B, (20, 0, 10, 10)]
    picture = Picture([A, FAR, FAR, FAR, B], [0.9, 0.7, 0.6, 0.5, 0.4], truths)
    other = Picture([A], [0.95], [(20 * i, 0, 10, 10) for i in range(others)])
    assert choose_threshold(detections([picture, other])) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "pictures", [[Picture()], [Picture(truths=[A])], [Picture([A], [0.3])], [Picture([FAR], [0.3], [A])]]
)
def test_threshold_without_anything_to_learn_from(pictures: list[Picture]) -> None:
    assert choose_threshold(detections(pictures)) == NO_THRESHOLD


def test_threshold_of_a_model_that_scores_all_alike() -> None:
    pictures = [Picture([A], [0.01005], [A]), Picture([FAR], [0.01001])]
    assert 0.01001 < choose_threshold(detections(pictures)) < 0.01005


def froc(pictures: Sequence[Picture], rate: float) -> float:
    """The most true boxes found by any threshold with at most so many false boxes an image, as a share; by loops."""
    d, best = detections(pictures), 0.0
    for threshold in np.unique(d.score):
        kept = d.score >= threshold
        hits = int(d.hits_coco[kept, 0].sum())
        if kept.sum() - hits <= rate * len(pictures):
            best = max(best, hits / d.truths.sum())
    return best


@given(small_pictures())
@settings(deadline=None, max_examples=50)
def test_froc_against_all_thresholds(pictures: list[Picture]) -> None:
    found = estimates(pictures)
    if not sum(len(p.truths) for p in pictures):
        assert np.isnan(found["froc_1"])
        return
    expected = {name: froc(pictures, rate) for name, rate in RATES.items()}
    assert {name: found[f"froc_{name}"] for name in RATES} == pytest.approx(expected)
    assert found["froc_mean"] == pytest.approx(np.mean(list(expected.values())))


def test_froc_by_a_worked_example() -> None:
    """Boxes of equal score come together: at one false box in two images the second true box is not yet found."""
    pictures = [Picture([A, FAR, B], [0.9, 0.8, 0.7], [A, B]), Picture([FAR], [0.7])]
    found = estimates(pictures)
    assert [found[f"froc_{name}"] for name in ("0125", "025", "05", "1")] == [0.5, 0.5, 0.5, 1.0]


def test_precision_and_recall_at_the_threshold() -> None:
    pictures = [Picture([A, FAR, B], [0.9, 0.8, 0.4], [A, B]), Picture([FAR], [0.7]), Picture()]
    found = estimates(pictures, 0.5)
    assert (found["precision"], found["recall"]) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    found = estimates(pictures, 0.95)
    assert np.isnan(found["precision"])
    assert found["recall"] == 0.0


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_weights_are_copies_of_images(seed: int) -> None:
    """A resample's metrics are those of a table that holds each image as often as its weight says."""
    rng = np.random.default_rng(seed)
    d = detections(drawn_pictures(12, seed))
    # No ties: two copies of an image take turns where one of weight two comes at once.
    d = replace(d, score=rng.permutation(d.score.size) / max(d.score.size, 1))
    weights = resamples(range(12), seed=seed, draws=3)
    found = measure(d, 0.5, weights)
    for column in range(3):
        copies = np.repeat(np.arange(12), weights[:, column])
        places = [np.flatnonzero(d.image == image) for image in copies]
        where = np.concatenate(places)
        image = np.repeat(np.arange(12), [place.size for place in places])
        copied = Detections(
            image, d.score[where], d.hits_coco[where], d.hits_rsna[where], d.truths[copies], d.positive[copies]
        )
        expected = {name: values[0] for name, values in measure(copied, 0.5, once(copied)).items()}
        assert {name: values[column] for name, values in found.items()} == pytest.approx(
            expected, abs=1e-12, nan_ok=True
        )


def shuffled(d: Detections, seed: int) -> Detections:
    """The same table as other ranks would have gathered it: images in another order, each one's boxes in theirs."""
    order = np.random.default_rng(seed).permutation(d.truths.size)
    where = np.concatenate([np.flatnonzero(d.image == image) for image in order])
    return Detections(d.image[where], d.score[where], d.hits_coco[where], d.hits_rsna[where], d.truths, d.positive)


def test_the_order_of_images_changes_nothing() -> None:
    validate, calibrate = detections(drawn_pictures(80, seed=4)), detections(drawn_pictures(40, seed=5))
    first = detection_quality(validate, calibrate, draws=50)
    assert detection_quality(shuffled(validate, 1), shuffled(calibrate, 2), draws=50) == first


def test_quality_has_all_metrics_and_intervals_around_them() -> None:
    validate, calibrate = detections(drawn_pictures(80, seed=4)), detections(drawn_pictures(40, seed=5))
    found = detection_quality(validate, calibrate)
    assert tuple(found.metrics) == METRICS
    assert (found.metrics["n"], found.metrics["positives"]) == (80, int(validate.positive.sum()))
    assert found.metrics["rsna_threshold"] == choose_threshold(calibrate) != choose_threshold(validate)
    assert found.metrics["auc"] == pytest.approx(roc_auc_score(validate.positive, image_scores(validate)))
    assert found.intervals.keys() == set(METRICS) - {"rsna_threshold", "n", "positives"}
    for name, (low, high) in found.intervals.items():
        value = found.metrics[name]
        assert value is not None
        assert low < high
        assert 0 <= low <= value <= high <= 1, name
    assert found == detection_quality(validate, calibrate)
    assert found.intervals["map50"] != detection_quality(validate, calibrate, seed=1).intervals["map50"]


def test_images_of_one_person_count_as_one_in_an_interval() -> None:
    """Three times the same pictures say no more than the pictures once, if it is known whose they are."""
    rng, n = np.random.default_rng(0), 200
    right = rng.random(n) < 0.7
    scores = np.where(right, 0.6, 0.4) + rng.normal(0, 0.15, n)
    pictures = [Picture([A if right[i] else FAR], [scores[i]], [A] if right[i] or i % 2 else []) for i in range(n)]
    once_each, thrice, calibrate = detections(pictures), detections(pictures * 3), detections(pictures[:50])
    single = detection_quality(replace(once_each, person=np.arange(n)), calibrate)
    known = detection_quality(replace(thrice, person=np.tile(np.arange(n), 3)), calibrate)
    unknown = detection_quality(thrice, calibrate)
    assert known.metrics == unknown.metrics
    assert known.intervals.keys() == single.intervals.keys() == unknown.intervals.keys()
    for name in ("recall", "precision", "auc", "rsna_map"):
        (low, high), (narrow_low, narrow_high) = known.intervals[name], unknown.intervals[name]
        assert (low, high) == pytest.approx(single.intervals[name], abs=1e-12)
        assert high - low == pytest.approx(np.sqrt(3) * (narrow_high - narrow_low), rel=0.15)


def test_an_interval_is_as_wide_as_the_spread_of_new_pictures() -> None:
    """Of a rate among independent images the interval is the normal one: 1.96 standard errors to either side."""
    rng, n = np.random.default_rng(0), 400
    pictures = [Picture([A if right else FAR], [0.9], [A]) for right in rng.random(n) < 0.7]
    found = detection_quality(detections(pictures), detections(pictures[:50]))
    recall, (low, high) = found.metrics["recall"], found.intervals["recall"]
    assert recall is not None
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(recall * (1 - recall) / n), rel=0.1)


@pytest.mark.parametrize(
    ("pictures", "undefined"),
    [
        ([Picture()], {*AVERAGES, "rsna_map", "precision", "recall", "auc"}),
        ([Picture(truths=[A])], {"precision", "auc"}),
        ([Picture([A], [0.9])], {*AVERAGES, "recall", "auc"}),
    ],
)
def test_what_is_undefined_is_none_and_has_no_interval(pictures: list[Picture], undefined: set[str]) -> None:
    found = detection_quality(detections(pictures), detections([Picture()]), draws=20)
    nones = {name for name, value in found.metrics.items() if value is None}
    assert {name for name in nones if not name.startswith("froc")} == undefined
    assert ("froc_1" in nones) == ("recall" in nones)
    assert not nones & found.intervals.keys()


def test_a_paired_difference_is_narrower_than_the_intervals() -> None:
    pictures = drawn_pictures(150, seed=6)
    ours = detections(pictures)
    noise = np.random.default_rng(0).normal(scale=0.02, size=ours.score.size)
    theirs = replace(ours, score=np.clip(ours.score + noise, 0, 1))
    found = map_difference(ours, theirs)
    quality = [detection_quality(d, ours) for d in (ours, theirs)]
    a, b = (q.metrics["map50"] for q in quality)
    assert a is not None
    assert b is not None
    assert found.value == pytest.approx(a - b, abs=1e-12)
    low, high = quality[0].intervals["map50"]
    assert found.low <= found.value <= found.high
    assert found.high - found.low < (high - low) / 2
    same = map_difference(ours, ours)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(AssertionError, match="same images"):
        map_difference(ours, detections(pictures[:-1]))

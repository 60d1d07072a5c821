"""The points of the curves against scikit-learn, pycocotools, and the metrics of a row."""
# mypy: disable-error-code="import-untyped"

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import Picture, detections, drawn_pictures, pycocotools_evaluation
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from pneumo.study.curves import RATES
from pneumo.study.detection import measure
from pneumo.study.points import average_precision, box_precision, froc, precision_recall, roc

tied = st.lists(st.tuples(st.booleans(), st.integers(0, 5).map(lambda i: i / 5)), min_size=2, max_size=30)
both = tied.filter(lambda rows: len({label for label, _ in rows}) == 2)


@given(both)
@settings(deadline=None)
def test_roc_is_scikit_learns(rows: list[tuple[bool, float]]) -> None:
    labels, scores = map(np.array, zip(*rows, strict=True))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    ours = roc(labels, scores)
    np.testing.assert_allclose(ours[0], false)
    np.testing.assert_allclose(ours[1], true)


@given(both)
@settings(deadline=None)
def test_precision_and_recall_are_scikit_learns(rows: list[tuple[bool, float]]) -> None:
    labels, scores = map(np.array, zip(*rows, strict=True))
    precision, recall, _ = precision_recall_curve(labels, scores)
    ours = precision_recall(labels, scores)
    # Theirs descend, and end in a point of no threshold.
    np.testing.assert_allclose(ours[0], recall[-2::-1])
    np.testing.assert_allclose(ours[1], precision[-2::-1])
    assert average_precision(*ours) == pytest.approx(average_precision_score(labels, scores))


def test_precision_of_boxes_is_pycocotools() -> None:
    for seed, n in ((1, 40), (2, 300)):
        pictures = drawn_pictures(n, seed=seed)
        theirs = np.asarray(pycocotools_evaluation(pictures).eval["precision"])[0, :, 0, 0, -1]
        np.testing.assert_allclose(box_precision(detections(pictures)), theirs, atol=1e-9)


def test_froc_steps_through_the_metrics_of_a_row() -> None:
    d = detections(drawn_pictures(200, seed=3))
    row = measure(d, 0.5, np.ones((200, 1), np.int32))
    rate, found = froc(d)
    assert (rate[0], found[0]) == (0.0, 0.0)
    assert (np.diff(rate) >= 0).all()
    for name, at in RATES.items():
        assert found[rate <= at].max() == pytest.approx(row[f"froc_{name}"][0])


def test_without_boxes() -> None:
    silent = detections([Picture(truths=[(0, 0, 10, 10)]), Picture()])
    assert (box_precision(silent) == 0).all()
    assert [values.tolist() for values in froc(silent)] == [[0.0], [0.0]]
    healthy = detections([Picture([(0, 0, 1, 1)], [0.5]), Picture()])
    assert np.isnan(box_precision(healthy)).all()
    rate, found = froc(healthy)
    assert rate.tolist() == [0.0, 0.5]
    assert np.isnan(found).all()

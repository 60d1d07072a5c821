"""Matching against pycocotools, and against the challenge's text in exact arithmetic."""
# mypy: disable-error-code="import-untyped"

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    Picture,
    challenge_hits,
    drawn_pictures,
    faster_evaluation,
    overlap,
    pycocotools_evaluation,
    small_pictures,
)

from pneumo.study.matching import COCO_THRESHOLDS, RSNA_THRESHOLDS, iou, match, pack, unpack

some_floats = st.lists(st.tuples(*[st.floats(0, 1000)] * 4), min_size=1, max_size=5)


def coco(picture: Picture) -> np.ndarray:
    return match(picture.boxes, picture.scores, picture.truths, COCO_THRESHOLDS, strict=False)


def rsna(picture: Picture) -> np.ndarray:
    return match(picture.boxes, picture.scores, picture.truths, RSNA_THRESHOLDS, strict=True)


def theirs(picture: Picture) -> np.ndarray:
    """pycocotools' own matches of one picture, of its hundred best boxes; the others find nothing."""
    found = np.zeros((len(picture.scores), 10), dtype=bool)
    evaluated = pycocotools_evaluation([picture]).evalImgs[0]
    if evaluated is not None:
        found[np.array(evaluated["dtIds"], dtype=int) - 1] = np.array(evaluated["dtMatches"]).T > 0
    return found


def test_thresholds_are_pycocotools_own_and_the_challenges_decimals() -> None:
    assert COCO_THRESHOLDS.tolist() == pycocotools_evaluation([Picture()]).params.iouThrs.tolist()
    assert RSNA_THRESHOLDS.tolist() == [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]


@given(some_floats, some_floats)
@settings(deadline=None, max_examples=50)
def test_iou_against_pycocotools(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> None:
    expected = pycocotools.mask.iou([list(box) for box in a], [list(box) for box in b], [0] * len(b))
    assert iou(a, b) == pytest.approx(np.nan_to_num(expected), rel=1e-12)


@given(small_pictures(1))
@settings(deadline=None, max_examples=50)
def test_iou_of_whole_numbers_is_the_double_next_to_it(pictures: list[Picture]) -> None:
    picture = pictures[0]
    found = iou(picture.boxes, picture.truths)
    assert found.shape == (len(picture.boxes), len(picture.truths))
    assert found.tolist() == [[float(overlap(a, b)) for b in picture.truths] for a in picture.boxes]


@given(small_pictures(1))
@settings(deadline=None)
def test_coco_matches_are_pycocotools(pictures: list[Picture]) -> None:
    assert np.array_equal(coco(pictures[0]), theirs(pictures[0]))


def test_coco_matches_of_drawn_pictures_are_pycocotools() -> None:
    seen = 0
    for picture in drawn_pictures(80, seed=1):
        few = np.argsort(-np.array(picture.scores), kind="stable")[:100]
        assert np.array_equal(coco(picture)[few], theirs(picture)[few])
        seen += coco(picture).any()
    assert seen > 20


def test_of_equal_overlaps_the_last_true_box_is_taken() -> None:
    """Which of two equal ones matters to the next prediction; both evaluators take the last."""
    picture = Picture([(5, 0, 10, 10), (10, 0, 10, 10)], [0.9, 0.8], [(0, 0, 10, 10), (10, 0, 10, 10)])
    wide = Picture([(0, 0, 20, 10), (10, 0, 10, 10)], [0.9, 0.8], picture.truths)
    assert coco(wide)[:, 0].tolist() == [True, False] == theirs(wide)[:, 0].tolist()
    assert coco(picture)[:, 0].tolist() == [False, True]
    recall = faster_evaluation([wide]).eval["recall"]
    assert np.asarray(recall)[0].ravel()[-1] == 0.5


@given(small_pictures(1), st.integers(0, 7))
@settings(deadline=None)
def test_strict_matches_follow_the_challenges_text(pictures: list[Picture], which: int) -> None:
    assert rsna(pictures[0])[:, which].sum() == challenge_hits(pictures[0], 40 + 5 * which)


@given(small_pictures(1), st.integers(0, 6), st.booleans())
@settings(deadline=None)
def test_the_first_predictions_match_alike_whatever_comes_after(pictures: list[Picture], k: int, strict: bool) -> None:
    picture, thresholds = pictures[0], RSNA_THRESHOLDS if strict else COCO_THRESHOLDS
    kept = np.argsort(-np.array(picture.scores), kind="stable")[:k]
    boxes, scores = np.array(picture.boxes).reshape(-1, 4), np.array(picture.scores)
    whole = match(boxes, scores, picture.truths, thresholds, strict=strict)
    assert np.array_equal(match(boxes[kept], scores[kept], picture.truths, thresholds, strict=strict), whole[kept])


def test_an_overlap_at_the_threshold_is_a_hit_for_coco_alone() -> None:
    picture = Picture([(0, 0, 10, 5)], [0.9], [(0, 0, 10, 10)])
    assert coco(picture).tolist() == [[True] + [False] * 9]
    assert rsna(picture).tolist() == [[True, True] + [False] * 6]
    # 3 in 5 and 7 in 10: their doubles are those of the thresholds, and no greater.
    for height, hits in ((6, 4), (7, 6)):
        assert rsna(Picture([(0, 0, 10, height)], [0.9], [(0, 0, 10, 10)])).sum() == hits


@pytest.mark.parametrize(("missing", "hit"), [(0, True), (1e-12, True), (1e-8, False)])
def test_a_threshold_of_one_forgives_rounding_as_pycocotools_does(missing: float, hit: bool) -> None:
    found = match([(0, 0, 1, 1 - missing)], [0.5], [(0, 0, 1, 1)], [1.0], strict=False)
    assert found.tolist() == [[hit]]
    assert not match([(0, 0, 1, 1 - missing)], [0.5], [(0, 0, 1, 1)], [1.0], strict=True).any()


@pytest.mark.parametrize(("boxes", "truths"), [([], []), ([], [(0, 0, 1, 1)]), ([(0, 0, 1, 1)], [])])
def test_nothing_to_match(boxes: list[tuple[int, ...]], truths: list[tuple[int, ...]]) -> None:
    found = match(boxes, [0.5] * len(boxes), truths, COCO_THRESHOLDS, strict=False)
    assert found.shape == (len(boxes), 10)
    assert not found.any()


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_noticed(score: float) -> None:
    with pytest.raises(AssertionError, match="score"):
        match([(0, 0, 1, 1)], [score], [], COCO_THRESHOLDS, strict=False)


@given(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), max_size=5))
def test_packed_hits_come_back(hits: list[list[bool]]) -> None:
    given_hits = np.array(hits, dtype=bool).reshape(-1, 10)
    packed = pack(given_hits)
    assert packed.dtype == np.int32
    assert np.array_equal(unpack(packed, 10), given_hits)
    if hits:
        assert packed[0] == sum(2**i for i, hit in enumerate(hits[0]) if hit)

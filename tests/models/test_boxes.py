"""Decoding and suppression against Ultralytics' own, and against the definition written out."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.models import yolov8  # noqa: F401 -- it imports Ultralytics as we do, before this file does
from pneumo.models.boxes import detect

SIZE = 160


def predictions(images: int, cells: int, seed: int, *, levels: int | None = None) -> torch.Tensor:
    """Random decoded predictions (images, 5, cells), in heaps that overlap; scores of few `levels` have ties."""
    random = np.random.default_rng(seed)
    heaps = random.uniform(20, 140, (images, 5, 2))
    centres = np.stack([heap[random.integers(0, 5, cells)] for heap in heaps]) + random.normal(0, 8, (images, cells, 2))
    sizes = random.uniform(10, 70, (images, cells, 2))
    scores = random.random((images, cells, 1)) ** 3
    if levels is not None:
        scores = np.ceil(scores * levels) / levels
    return torch.tensor(np.concatenate([centres, sizes, scores], axis=2), dtype=torch.float32).transpose(1, 2)


def written_out(rows: np.ndarray, floor: float, iou: float, most: int) -> np.ndarray:
    """The indices that remain, by the definition: the best first, of equal ones the first, none that overlaps one."""
    corners = np.hstack([rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2])
    kept: list[int] = []
    for index in sorted(np.flatnonzero(rows[:, 4] > floor), key=lambda i: (-rows[i, 4], i)):
        overlaps = False
        for other in kept:
            low = np.maximum(corners[index, :2], corners[other, :2])
            high = np.minimum(corners[index, 2:], corners[other, 2:])
            common = np.prod(np.maximum(high - low, 0))
            union = np.prod(rows[index, 2:4]) + np.prod(rows[other, 2:4]) - common
            overlaps |= common / union > iou
        if not overlaps:
            kept.append(int(index))
    return np.array(kept[:most], dtype=int)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 300), st.integers(0, 2**32 - 1), st.sampled_from([(0.001, 0.7), (0.25, 0.45)]))
def test_the_boxes_are_those_of_ultralytics(images: int, cells: int, seed: int, bounds: tuple[float, float]) -> None:
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import clip_boxes

    raw = predictions(images, cells, seed)
    theirs = non_max_suppression(raw.clone(), *bounds, max_det=100)
    ours = detect((raw, {}), SIZE, floor=bounds[0], iou=bounds[1])
    assert len(ours) == len(theirs) == images
    for (boxes, scores), rows in zip(ours, theirs, strict=True):
        corners = clip_boxes(rows[:, :4], (SIZE, SIZE)).numpy()
        assert boxes.dtype == scores.dtype == np.float32
        np.testing.assert_array_equal(boxes[:, :2], corners[:, :2])
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], corners[:, 2:], atol=1e-4)
        np.testing.assert_array_equal(scores, rows[:, 4].numpy())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([3, 100]))
def test_the_boxes_are_those_of_the_definition_with_ties(cells: int, seed: int, levels: int, most: int) -> None:
    raw = predictions(1, cells, seed, levels=levels)
    ((boxes, scores),) = detect(raw, 10_000, floor=0.19, iou=0.5, most=most)
    rows = raw[0].T.numpy().astype(np.float64)
    rows = rows[written_out(rows, 0.19, 0.5, most)]
    low = rows[:, :2] - rows[:, 2:4] / 2
    high = rows[:, :2] + rows[:, 2:4] / 2
    np.testing.assert_allclose(boxes[:, :2], low.clip(0), atol=1e-4)
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], high, atol=1e-4)
    np.testing.assert_allclose(scores, rows[:, 4], rtol=1e-6)


def test_a_hundred_boxes_remain_the_best_first() -> None:
    grid = np.array([(x, y) for x in range(5, 160, 10) for y in range(5, 160, 10)], np.float32)  # 256 apart
    raw = np.column_stack([grid, np.full((256, 2), 8.0), np.linspace(0.1, 0.9, 256)]).astype(np.float32).T[None]
    ((boxes, scores),) = detect(torch.from_numpy(raw), SIZE)
    assert boxes.shape == (100, 4)
    np.testing.assert_array_equal(scores, raw[0, 4, ::-1][:100])
    np.testing.assert_array_equal(boxes[0], [151, 151, 8, 8])


def test_boxes_are_cut_at_the_edges_after_the_suppression() -> None:
    """Before it, the first two would be the same box and one of them would go."""
    raw = torch.tensor([[[0.0, 0, 40, 40, 0.9], [-10, -10, 60, 60, 0.8], [150, 80, 40, 20, 0.7]]]).transpose(1, 2)
    ((boxes, scores),) = detect(raw, SIZE)
    np.testing.assert_array_equal(boxes, [[0, 0, 20, 20], [0, 0, 20, 20], [130, 70, 30, 20]])
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.7])


def test_the_floor_itself_and_what_is_no_number_are_not_found() -> None:
    raw = torch.tensor([[[40.0, 40, 9, 9, 0.5], [80, 80, 9, 9, 0.25], [9, 9, 9, 9, float("nan")]]]).transpose(1, 2)
    ((boxes, scores),) = detect(raw, SIZE, floor=0.25)
    assert scores.tolist() == [0.5]
    assert boxes.shape == (1, 4)


def test_nothing_is_found_where_nothing_is() -> None:
    ((boxes, scores),) = detect(torch.zeros(1, 5, 525), SIZE)
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))
    assert detect(torch.zeros(0, 5, 525), SIZE) == []


def test_no_box_is_lost_to_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ultralytics' suppression stops: each look at the clock finds 100 s gone."""
    import time

    from ultralytics.utils.nms import non_max_suppression

    clock = itertools.count(0, 100)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    raw = predictions(4, 50, 7)
    assert [len(rows) > 0 for rows in non_max_suppression(raw.clone(), 0.001, 0.7)] == [True, False, False, False]
    assert all(len(scores) > 0 for _, scores in detect(raw, SIZE))

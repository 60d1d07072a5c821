"""Boxes between a radiograph's pixels and the square that a model sees, against pictures that are really resized."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.data.dicom import resize
from pneumo.data.geometry import square_around, to_fractions, to_pixels

Boxes = list[tuple[float, float, float, float]]


@st.composite
def pictures_with_boxes(draw: st.DrawFn, *, whole: bool = False) -> tuple[int, int, Boxes]:
    """Rows, columns and boxes inside the picture, of positive width and height; in whole pixels if asked for."""
    rows, columns = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))

    def part(length: int) -> tuple[float, float]:
        if whole:
            begin = draw(st.integers(0, length - 1))
            return begin, draw(st.integers(1, length - begin))
        begin = draw(st.floats(0, length * 0.999))
        return begin, max((length - begin) * draw(st.floats(0.001, 1)), 1e-3)

    across = [(part(columns), part(rows)) for _ in range(draw(st.integers(0, 5)))]
    return rows, columns, [(x, y, width, height) for (x, width), (y, height) in across]


@given(case=pictures_with_boxes())
def test_there_and_back_is_the_same_box(case: tuple[int, int, Boxes]) -> None:
    rows, columns, boxes = case
    fractions = to_fractions(boxes, rows, columns)
    assert fractions.dtype == np.float32
    assert fractions.shape == (len(boxes), 4)
    assert (fractions >= 0).all()
    assert (fractions[:, :2] + fractions[:, 2:] <= 1 + 2e-7).all()
    back = to_pixels(fractions, rows, columns)
    assert back.dtype == np.float64
    # Half a unit in the last place of a float32 below 1 is 2^-25; an edge is the sum of two.
    assert np.abs(back - np.reshape(boxes, (-1, 4))).max(initial=0) <= max(rows, columns) * 2**-23


@given(case=pictures_with_boxes(whole=True))
def test_whole_pixels_come_back_exactly_where_the_side_is_a_power_of_two(case: tuple[int, int, Boxes]) -> None:
    rows, _, boxes = case
    wide = (rows, 4096)  # no picture here is wider, or higher
    assert np.array_equal(to_pixels(to_fractions(boxes, *wide), *wide), np.reshape(boxes, (-1, 4)))


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(50, 200), columns=st.integers(50, 200), size=st.sampled_from([64, 100, 250]))
def test_fractions_lie_around_what_resizing_makes_of_the_box(
    data: st.DataObject, rows: int, columns: int, size: int
) -> None:
    least = -(-max(rows, columns) * 3 // size)  # at least 3 pixels afterwards, so that none of it fades away
    x, y = data.draw(st.integers(0, columns - least)), data.draw(st.integers(0, rows - least))
    width, height = data.draw(st.integers(least, columns - x)), data.draw(st.integers(least, rows - y))
    picture = np.zeros((rows, columns), np.uint8)
    picture[y : y + height, x : x + width] = 255
    seen = np.argwhere(resize(picture, size) > 127)
    left, top, across, down = to_fractions([(x, y, width, height)], rows, columns)[0] * size
    found = np.array([[top, left], [top + down, left + across]])
    assert np.abs(found - [seen.min(0), seen.max(0) + 1]).max() <= 1


def test_a_high_picture_stands_in_the_middle() -> None:
    assert square_around(100, 60) == (100, 0, 20)
    assert square_around(60, 101) == (101, 20, 0)
    assert square_around(7, 7) == (7, 0, 0)
    assert to_fractions([(0, 0, 60, 100), (30, 50, 15, 25)], 100, 60).tolist() == pytest.approx(
        np.array([[0.2, 0, 0.6, 1], [0.5, 0.5, 0.15, 0.25]])
    )


def test_boxes_are_clipped_to_the_picture_and_not_to_the_square() -> None:
    assert to_fractions([(-10, 40, 30, 100)], 64, 32).tolist() == [[0.25, 0.625, 0.3125, 0.375]]
    assert to_pixels([(0, 0, 1, 1)], 64, 32).tolist() == [[0, 0, 32, 64]]
    beside = to_pixels([(0, 0.5, 0.2, 0.1)], 64, 32)  # in the black on the left
    assert beside[0, 2] == 0
    assert to_fractions([(70, 0, 10, 10)], 64, 32)[0, 2] == 0


def test_no_boxes_are_none() -> None:
    for none in ([], np.zeros((0, 4))):
        assert to_fractions(none, 10, 20).shape == (0, 4)
        assert to_pixels(none, 10, 20).shape == (0, 4)

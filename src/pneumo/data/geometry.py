"""Where a picture lies in the square that a model sees, and its boxes in both.

A box is x, y, width, height with its top-left corner, between pixels and not in their middles: the first pixel is the
box 0, 0, 1, 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def square_around(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the side of the smallest square around a picture, and the rows above it and the columns left of it."""
    side = max(rows, columns)
    return side, (side - rows) // 2, (side - columns) // 2


def to_fractions(boxes: npt.ArrayLike, rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Return boxes (k, 4) in pixels of a picture as float32 (k, 4) fractions of the edge of its square.

    They are clipped to the picture first, so one that lies outside of it has no width or no height left.
    """
    side, top, left = square_around(rows, columns)
    moved = _clipped(_table(boxes), rows, columns) + np.array([left, top, 0, 0])
    return np.asarray(moved / side, np.float32)


def to_pixels(boxes: npt.ArrayLike, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """Return boxes (k, 4) in fractions of the square as float64 (k, 4) pixels of the picture: undoes `to_fractions`.

    They are clipped to the picture, so one in the black beside it has no width or no height left.
    """
    side, top, left = square_around(rows, columns)
    return _clipped(_table(boxes) * side - np.array([left, top, 0, 0]), rows, columns)


def _clipped(boxes: npt.NDArray[np.float64], rows: int, columns: int) -> npt.NDArray[np.float64]:
    most = (columns, rows)
    begin = np.clip(boxes[:, :2], 0, most)
    end = np.clip(boxes[:, :2] + boxes[:, 2:], 0, most)
    return np.concatenate([begin, end - begin], axis=1)


def _table(boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return boxes as (k, 4), also where there are none: an empty list has no second dimension."""
    return np.asarray(boxes, np.float64).reshape(-1, 4)

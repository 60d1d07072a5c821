"""From what the detector's network returns to boxes: decoding and non-maximum suppression."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms

Found = tuple[NDArray[np.float32], NDArray[np.float32]]


@torch.no_grad()
def detect(raw: Any, size: int, *, floor: float = 0.001, iou: float = 0.7, most: int = 100) -> list[Found]:
    """Return for each image its boxes (k, 4) and their scores (k,), the best first, both float32.

    `raw` is what the network returns in evaluation mode, or its first part alone: (b, 5, a), centre x and y, width and
    height in pixels of a picture of size x size, and score. A box is x, y of its upper left corner, width and height in
    the same pixels, cut at the picture's edges. Kept are scores above `floor`; of two boxes that overlap by more than
    `iou` the better one, of equal scores the one that comes first in `raw`; at most `most` an image.

    Unlike Ultralytics' own suppression it does not stop after a time, with boxes lost: it takes what it takes.
    """
    decoded = (raw[0] if isinstance(raw, (tuple, list)) else raw).detach().float().cpu()
    return [_of_image(image, size, floor, iou, most) for image in decoded.transpose(1, 2)]


def _of_image(rows: torch.Tensor, size: int, floor: float, iou: float, most: int) -> Found:
    """The boxes of one image from its rows (a, 5)."""
    rows = rows[rows[:, 4] > floor]  # nor what is not a number
    rows = rows[torch.sort(rows[:, 4], descending=True, stable=True).indices]
    halves = rows[:, 2:4] / 2
    corners = torch.cat([rows[:, :2] - halves, rows[:, :2] + halves], dim=1)
    kept = nms(corners, rows[:, 4], iou)[:most]
    corners = corners[kept].clamp(0, size)
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    return boxes.numpy(), rows[kept, 4].numpy()

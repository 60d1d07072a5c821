"""Files in, rows out: batches that threads read and answer side by side, with only a few of them in memory at once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pneumo.answers import in_pixels
from pneumo.data.dicom import Undecodable, resize
from pneumo.detect.files import Picture, read
from pneumo.detect.model import Model

# A batch is the same files whoever answers it: what is beside a picture in a batch may change its last digits.
BATCH = 8


@dataclass(frozen=True, slots=True)
class Box:
    """A box in pixels of the original, with its score."""

    x: float
    y: float
    width: float
    height: float
    score: float


@dataclass(frozen=True, slots=True)
class Row:
    """The answer to one file: `error` is a sentence where there is none, and the probability is None then."""

    file: str
    probability: float | None = None
    boxes: tuple[Box, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """How files are answered: by which model, from which score on boxes are kept, and who draws the pictures if any."""

    model: Model
    threshold: float
    draw: Callable[[Path, Picture, Row], None] | None = None


def batches(files: Sequence[Path]) -> list[Sequence[Path]]:
    """Cut the files into batches, in their order."""
    return [files[begin : begin + BATCH] for begin in range(0, len(files), BATCH)]


def answer_all(work: Work, todo: Sequence[Sequence[Path]], threads: int) -> Iterator[list[Row]]:
    """Yield the rows of each batch, in their order; at most two batches a thread are in memory."""
    waiting: deque[Future[list[Row]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for files in todo:
            waiting.append(pool.submit(answer, work, files))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def answer(work: Work, files: Sequence[Path]) -> list[Row]:
    """Answer one batch: a row for each file."""
    rows = [Row(str(path)) for path in files]
    pictures: dict[int, Picture] = {}
    small: list[Picture] = []
    shapes: dict[int, tuple[int, int]] = {}
    for i, path in enumerate(files):
        try:
            picture = read(path)
        except Undecodable as why:
            rows[i] = Row(str(path), error=f"{path.name}: {why.detail}.")
            continue
        shapes[i] = (picture.shape[0], picture.shape[1])
        small.append(resize(picture, work.model.size))
        if work.draw is not None:
            pictures[i] = picture
    found = work.model.answer(small) if small else None
    for k, (i, shape) in enumerate(shapes.items()):
        assert found is not None, "there are pictures"
        boxes = found.boxes[k] if found.boxes else np.zeros((0, 5), np.float32)
        rows[i] = _row(files[i], float(found.scores[k]), boxes, shape, work.threshold)
        if work.draw is not None and rows[i].error is None:
            work.draw(files[i], pictures[i], rows[i])
    return rows


def _row(path: Path, probability: float, boxes: np.ndarray, shape: tuple[int, int], threshold: float) -> Row:
    if not np.isfinite(probability):
        return Row(str(path), error=f"{path.name}: the model's answer is not a number.")
    pixels, scores = in_pixels(boxes, *shape)
    found = zip(pixels.tolist(), scores.tolist(), strict=True)
    kept = tuple(Box(x, y, width, height, score) for (x, y, width, height), score in found if score >= threshold)
    return Row(str(path), probability, kept)

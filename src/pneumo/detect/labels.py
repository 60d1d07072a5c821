"""Where the scores of boxes are written, upon pictures and sheets alike."""

from collections.abc import Iterable, Iterator, Sequence


def label_places(
    boxes: Iterable[Sequence[float]],
    label: tuple[float, float],
    picture: tuple[float, float],
    taken: Iterable[tuple[float, float]] = (),
) -> Iterator[tuple[int, float, float]]:
    """Yield the index of a box and the lower left corner of its label, which is that of the box, within the picture.

    Boxes are x, y, width, height, best first; a label and the picture are width, height. A box has no label where it
    would lie upon that of a better one, or upon one that begins at a corner in `taken`.
    """
    used = list(taken)
    for i, (x, y, _, height) in enumerate(boxes):
        left = max(0.0, min(x, picture[0] - label[0]))
        below = max(label[1], min(y + height, picture[1]))
        if all(abs(left - a) > label[0] or abs(below - b) > label[1] for a, b in used):
            used.append((left, below))
            yield i, left, below

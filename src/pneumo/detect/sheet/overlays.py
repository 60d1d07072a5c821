"""What is drawn upon the images of a sheet, and the key to it."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pneumo.detect.labels import label_places
from pneumo.detect.sheet.cases import MOST_BOXES, Case

# Of Okabe and Ito's colours, which are told apart by all; dashes tell them apart in grey.
ORANGE, YELLOW = "#D55E00", "#F0E442"
SMALL, TEXT, HEADING = 8, 9, 11  # points
EVIDENCE: Final = "inferno"


def draw_picture(axis: Any, case: Case) -> None:
    """The picture with its true boxes."""
    axis.imshow(case.picture, cmap="gray", vmin=0, vmax=255)
    for box in case.truths:
        _box(axis, box, YELLOW, "--")


def draw_boxes(axis: Any, case: Case, kept: float) -> None:
    """The predicted boxes with a score of at least `kept`, and the best one in any case: its score is the image's."""
    count = int(np.count_nonzero(case.scores >= kept))
    for i in reversed(range(min(max(count, 1), case.scores.size))):
        _box(axis, case.boxes[i], ORANGE, "-" if i < count else ":")
    _label(axis, case.boxes[: max(count, 1)], case.scores, case.picture.shape[0])


def draw_evidence(axis: Any, case: Case) -> None:
    """The picture below its evidence, which is as opaque as it is large, and the line of half the largest."""
    assert case.evidence is not None, "asked for"
    draw_picture(axis, case)
    axis.imshow(case.evidence, cmap=EVIDENCE, vmin=0, vmax=1, alpha=0.65 * case.evidence)
    if case.evidence.any():
        axis.contour(case.evidence, levels=[0.5], colors="white", linewidths=0.8)
    # One line, beside the second one of the picture's caption, whose first may be wider than the picture.
    axis.set_title("Grad-CAM" if case.evidence.any() else "Grad-CAM: no evidence", loc="right", fontsize=SMALL)


def draw_key(figure: Any, cases: Sequence[Case], kept: float | None) -> None:
    """What the lines and colours upon these pictures mean; `kept` is as of a sheet."""
    lines = import_module("matplotlib.lines")
    handles = []
    if any(case.truths.size for case in cases):
        handles.append((YELLOW, "--", "true box"))
    if kept is not None:
        handles.append((ORANGE, "-", f"predicted box, score at least {kept:#.3g} (the best {MOST_BOXES} at most)"))
        if any(case.scores.size and case.scores[0] < kept for case in cases):
            handles.append((ORANGE, ":", "the image's best box where it scores less"))
    made = [lines.Line2D([], [], color=c, linestyle=s, linewidth=2, label=text) for c, s, text in handles]
    left, right = figure.subplots(1, 2, width_ratios=(1, 3))
    for axis in (left, right):
        axis.set_axis_off()
    if made:
        # As dark as the pictures are: yellow is as bright as paper.
        dark = {"facecolor": "0.2", "labelcolor": "white", "borderaxespad": 0}
        left.legend(handles=made, loc="center left", ncols=len(made), fontsize=TEXT, **dark)
    if any(case.evidence is not None for case in cases):
        right.set_axis_on()
        mappable = import_module("matplotlib.cm").ScalarMappable(cmap=EVIDENCE)
        bar = figure.colorbar(mappable, cax=right, orientation="horizontal")
        text = "Grad-CAM: evidence for pneumonia, as a part of the image's largest (white line: half)"
        bar.set_label(text, fontsize=TEXT)
        right.set_box_aspect(0.02)
        right.tick_params(labelsize=SMALL)


def _box(axis: Any, box: Sequence[float], colour: str, style: str) -> None:
    """A rectangle with a black rim, to be seen on white lungs and black ones."""
    patches, effects = import_module("matplotlib.patches"), import_module("matplotlib.patheffects")
    x, y, width, height = box
    # A pixel's middle has whole coordinates, and a box begins at a pixel's edge.
    patch = patches.Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linestyle=style)
    patch.set_linewidth(1.8)
    patch.set_path_effects([effects.Stroke(linewidth=3.2, foreground="black"), effects.Normal()])
    axis.add_patch(patch)


def _label(axis: Any, boxes: NDArray[np.float64], scores: NDArray[np.float64], size: int) -> None:
    """A score at the lower left corner of its box, best first; none where it would lie upon that of a better box."""
    place = {"facecolor": "black", "edgecolor": "none", "pad": 1.0}
    for i, x, y in label_places(boxes, (0.15 * size, 0.07 * size), (size, size)):
        axis.text(x, y, f"{scores[i]:.2g}", color="white", fontsize=SMALL, va="bottom", ha="left", bbox=place)

"""A sheet as a picture: images by kind of answer on the left, curves and the confusion matrix on the right."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import numpy as np

from pneumo.detect.sheet.cases import KINDS, Case
from pneumo.detect.sheet.overlays import (
    HEADING,
    ORANGE,
    SMALL,
    TEXT,
    draw_boxes,
    draw_evidence,
    draw_key,
    draw_picture,
)
from pneumo.detect.sheet.panels import LEAST_RATE, MOST_RATE, Line, Panel, Role
from pneumo.study.cells import name_of, number
from pneumo.study.curves import RATES

# Told apart by brightness, width and dashes too, so in grey as well; the colours are of Okabe and Ito's set.
BLUE = "#0072B2"
STYLES: Final[Mapping[Role, Mapping[str, Any]]] = {
    "highlighted": {"color": BLUE, "linewidth": 4, "alpha": 0.5, "linestyle": "-"},
    "other": {"color": "0.25", "linewidth": 0.9, "linestyle": "-"},
    "chosen": {"color": ORANGE, "linewidth": 1.6, "linestyle": (0, (4, 2))},
}
MEANINGS: Final = {
    "true positive": "pneumonia, and called so",
    "false positive": "no pneumonia, but called so",
    "false negative": "pneumonia, but missed",
    "true negative": "no pneumonia, and not called so",
}
DPI = 120


@dataclass(frozen=True, slots=True)
class Sheet:
    """All that is on a sheet: `counts` images of each kind of answer, from `threshold` on called positive.

    `score` is what an image's score is called. `kept` is the score from which on a detector keeps boxes, None of a
    classifier. `notes` are sentences.
    """

    title: str
    subtitle: str
    run: str
    score: str
    threshold: float
    kept: float | None
    counts: Mapping[str, int]
    cases: Mapping[str, Sequence[Case]]
    panels: Sequence[Panel]
    notes: Sequence[str]


def draw(sheet: Sheet) -> bytes:
    """Return the sheet as a PNG file's content."""
    figures = import_module("matplotlib.figure")
    count = len(sheet.panels) + 1
    if sheet.cases:
        figure = figures.Figure(figsize=(16, 11.5 if _mapped(sheet) else 12.5), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(11, 5))
        _images(left, sheet)
        axes = right.subplots(count, 1)
    else:
        figure = figures.Figure(figsize=(5.2 * count, 6), layout="constrained")
        axes = figure.subplots(1, count)
    *curves, last = np.ravel(axes)
    for axis, panel in zip(curves, sheet.panels, strict=True):
        _curves(axis, panel, sheet)
    _confusion(last, sheet)
    title = f"{sheet.title}\n{sheet.subtitle}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=HEADING + 1, parse_math=False)
    if sheet.notes:
        figure.supxlabel("\n".join(sheet.notes), x=0.01, ha="left", fontsize=TEXT, style="italic", parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def _images(figure: Any, sheet: Sheet) -> None:
    """A row for each kind of answer; where the evidence is known it has its own picture beside each."""
    mapped = _mapped(sheet)
    wide, most = 2 if mapped else 1, max(map(len, sheet.cases.values()))
    heights = [1 if sheet.cases[kind] else 0.15 for kind in KINDS]
    *rows, key = figure.subfigures(len(KINDS) + 1, 1, height_ratios=[*heights, 0.2 if mapped else 0.15])
    for row, kind in zip(rows, KINDS, strict=True):
        cases = sheet.cases[kind]
        images = f"{sheet.counts[kind]} of {sum(sheet.counts.values())} images"
        row.suptitle(f"{kind}s: {images} ({MEANINGS[kind]})", x=0.01, ha="left", fontsize=HEADING, weight="bold")
        axes = row.subplots(1, wide * most, squeeze=False)[0]
        for axis in axes:
            axis.set_axis_off()
        for i, case in enumerate(cases):
            _case(axes[wide * i], case, kind, sheet)
            if case.evidence is not None:
                draw_evidence(axes[wide * i + 1], case)
    draw_key(key, [case for cases in sheet.cases.values() for case in cases], sheet.kept)


def _mapped(sheet: Sheet) -> bool:
    """Whether any image's evidence is known."""
    return any(case.evidence is not None for cases in sheet.cases.values() for case in cases)


def _case(axis: Any, case: Case, kind: str, sheet: Sheet) -> None:
    draw_picture(axis, case)
    if sheet.kept is not None:
        draw_boxes(axis, case, sheet.kept)
    sign = "≥" if case.score >= sheet.threshold else "<"
    ours, theirs = _told_apart(case.score, sheet.threshold)
    said = f"{sheet.score} {ours}" if sheet.kept is None or case.scores.size else "no box, 0"
    caption = f"{kind}: {said} {sign} {theirs}\npatient {_short(case.patient)}"
    axis.set_title(caption, loc="left", fontsize=SMALL, parse_math=False)


def _curves(axis: Any, panel: Panel, sheet: Sheet) -> None:
    drawstyle = "default" if panel.step is None else f"steps-{panel.step}"
    others = [line for line in panel.lines if line.role == "other"]
    for line in panel.lines:
        axis.plot(line.x, line.y, drawstyle=drawstyle, label=_named(line, others, panel.figure), **STYLES[line.role])
    if panel.chance is not None:
        axis.plot(*zip(*panel.chance, strict=True), color="0.3", linestyle=":", linewidth=1, label="chance")
    if panel.point is not None:
        kept = sheet.threshold if sheet.kept is None or panel.chance is not None else sheet.kept
        style = {"color": "black", "marker": "o", "markersize": 7, "markeredgecolor": "white", "linestyle": "none"}
        axis.plot(*panel.point, label=f"{sheet.run} at {_digits(kept)}", zorder=5, clip_on=False, **style)
    axis.set_title(panel.title, fontsize=HEADING)
    axis.set_xlabel(panel.x, fontsize=TEXT)
    axis.set_ylabel(panel.y, fontsize=TEXT)
    axis.set_xlim(0, 1)
    if panel.rates:
        axis.set_xscale("log", base=2)
        axis.set_xlim(LEAST_RATE, MOST_RATE)
        axis.set_xticks(list(RATES.values()), [_fraction(rate) for rate in RATES.values()])
    axis.set_ylim(0, 1.02)
    axis.tick_params(labelsize=SMALL)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=SMALL, loc=panel.legend, framealpha=0.9)


def _named(line: Line, others: Sequence[Line], figure: str) -> str:
    """A line's entry in the legend; of several others the first one stands for all."""
    if line.role == "other" and len(others) > 1:
        low, high = (number(pick(one.figure for one in others), 3) for pick in (min, max))
        figures = low if low == high else f"{low} to {high}"
        return f"{len(others)} other runs: {figure} {figures}" if line is others[0] else "_"
    return f"{name_of(line.run)}: {figure} {number(line.figure, 3)}"


def _confusion(axis: Any, sheet: Sheet) -> None:
    """Counts, with their share of the images that have the same truth."""
    rows = ("true negative", "false positive"), ("false negative", "true positive")
    table = np.array([[sheet.counts[kind] for kind in kinds] for kinds in rows])
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(table):
        share = shares[row, column]
        text = f"{count}\n{100 * share:.1f} % of the row"
        axis.text(
            column, row, text, ha="center", va="center", fontsize=TEXT + 1, color="white" if share > 0.5 else "black"
        )
    axis.set_xticks([0, 1], [f"{sheet.score} < {_digits(sheet.threshold)}", f"≥ {_digits(sheet.threshold)}"])
    axis.set_yticks([0, 1], ["no\npneumonia", "pneumonia"])
    axis.tick_params(labelsize=TEXT, length=0)
    axis.set_xlabel("answer", fontsize=TEXT)
    axis.set_ylabel("truth", fontsize=TEXT)
    axis.set_title(f"Confusion matrix of {sheet.run} (images)", fontsize=HEADING)


def _told_apart(score: float, threshold: float) -> tuple[str, str]:
    """Both with as many digits as show which one is larger, at least three and at most nine (float32 has no more)."""
    for digits in range(3, 10):
        texts = f"{score:#.{digits}g}", f"{threshold:#.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def _digits(value: float) -> str:
    return f"{value:#.3g}"


def _fraction(rate: float) -> str:
    return f"1/{round(1 / rate)}" if rate < 1 else f"{rate:g}"


def _short(patient: str) -> str:
    return patient if len(patient) <= 12 else f"{patient[:8]}..."

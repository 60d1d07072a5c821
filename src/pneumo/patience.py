"""Early stopping: when all trainings of a study stop, since none of them gets better on the calibration patients."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pneumo.errors import Refused
from pneumo.study.statistics import MIN_BLOCKS

SAME = 1e-9  # figures closer than this are one: sums in another order differ by less
FIGURES: dict[str, Literal["AUC", "mAP@0.5"]] = {"probability": "AUC", "boxes": "mAP@0.5"}  # by what a model answers


class Patience:
    """Says after which block to stop: the one after which no run's figure has improved for `blocks` blocks.

    A figure improves where it exceeds all earlier ones of its run, as the first one does; one that is undefined
    (not-a-number) does not. At least `least` blocks are made: as many as an interval needs.
    """

    def __init__(self, blocks: int, least: int = MIN_BLOCKS) -> None:
        self._blocks, self._least = blocks, least
        self._best: dict[int, float] = {}
        self.figures: dict[int, list[float]] = {}  # of each run after each block
        self.unimproved = 0  # blocks since any figure has improved

    def stops(self, figures: Mapping[int, float]) -> bool:
        """Take the figures of all runs after one more block; returns whether it is the last one."""
        improved = False
        for run, figure in figures.items():
            best = self._best.get(run, -math.inf)
            improved |= figure > best + SAME
            self._best[run] = figure if figure > best else best
            self.figures.setdefault(run, []).append(figure)
        self.unimproved = 0 if improved else self.unimproved + 1
        made = max(map(len, self.figures.values()))
        return made >= self._least and self.unimproved >= self._blocks


def require_effect(patience: int, blocks: int) -> None:
    """Raise Refused for a patience that is negative, or that could never stop trainings of so many blocks early."""
    if patience < 0:
        raise Refused(f"--patience {patience}: this has to be at least 0, with which nothing stops early.")
    earliest = max(patience + 1, MIN_BLOCKS)
    if patience and blocks <= earliest:
        raise Refused(
            f"--patience {patience} could never stop {blocks} block(s) early: the first one always improves, and "
            f"{MIN_BLOCKS} are made in any case; ask for at least {earliest + 1} --blocks (and enough --epochs to fill "
            "them), or for less patience."
        )


def require_labels(patience: int, answers: str, labels: ArrayLike) -> None:
    """Raise Refused where the labels (n,) of the calibration patients, 0 or 1, leave nothing to have patience with."""
    found = np.unique(np.asarray(labels))
    if 1 not in found or (answers == "probability" and 0 not in found):
        kind = "positive" if 1 in found else "negative"
        raise Refused(
            f"--patience {patience}: the calibration patients are all {kind}, so that they have no {FIGURES[answers]}; "
            "give more patients, or leave --patience out."
        )

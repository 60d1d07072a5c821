"""Who is in the built-in sample: ids, classes, boxes, sex, age and view, by the RSNA challenge's distributions."""

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np

from pneumo.errors import Refused

# The challenge counts boxes and places in pictures of this many rows and columns.
RSNA_SIZE = 1024
OPACITY, ABNORMAL, NORMAL = "Lung Opacity", "No Lung Opacity / Not Normal", "Normal"

# Patients of the challenge, by class; by number of boxes; by label and view; by sex; by pixel spacing.
_NEGATIVES = {ABNORMAL: 11_821, NORMAL: 8_851}
_BOX_COUNTS = {1: 2_614, 2: 3_266, 3: 119, 4: 13}
_AP_GIVEN_POSITIVE = 12_173 * 0.38 / 6_012  # Bayes: 38 % of the 12,173 AP views are positive
_AP_GIVEN_NEGATIVE = 12_173 * 0.62 / 20_672
_SEXES = {"M": 15_166, "F": 11_518}
_SPACINGS = {
    "0.14300000000000002": 8_993,
    "0.168": 8_815,
    "0.139": 5_511,
    "0.171": 1_996,
    "0.19431099999999998": 1_294,
}
_SINGLE_LEFT, _TWO_OPPOSITE = 0.62, 0.98

# (probability, value) of piecewise linear quantile functions. x is split by the side on which the box lies: the two
# parts, mixed in the challenge's proportion of sides (53 % left), give its percentiles 65/207/324/594/739.
_WIDTH = ((0, 40), (0.01, 95), (0.25, 177), (0.5, 217), (0.75, 259), (0.99, 363), (1, 528))
_HEIGHT = ((0, 45), (0.01, 83), (0.25, 203), (0.5, 298), (0.75, 438), (0.99, 719), (1, 942))
_Y = ((0, 2), (0.01, 79), (0.25, 249), (0.5, 365), (0.75, 478), (0.99, 696), (1, 830))
_X_LEFT = ((0, 10), (0.019, 65), (0.47, 207), (0.94, 324), (1, 400))
_X_RIGHT = ((0, 450), (0.46, 594), (0.979, 739), (1, 830))
_AGE = ((0, 1), (0.01, 6), (0.05, 17), (0.25, 34), (0.5, 49), (0.75, 59), (0.95, 74), (0.99, 83), (1, 95))
_WRONG_AGES, _WRONG_AGE_SHARE = (148, 150, 151, 153, 155), 5 / 26_684
# Correlations (of the normal copula) that give the challenge's area and height-to-width percentiles, and that keep
# tall boxes from hanging below the picture.
_TALL_IS_WIDE, _TALL_IS_HIGH = 0.6, -0.55

T = TypeVar("T")
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """How many patients the sample has, from which seed, and the rows and columns of a picture in pixels.

    Raises Refused if there is no patient, the seed is negative, or the size is not within 64 to 1024.
    """

    patients: int = 800
    seed: int = 0
    size: int = RSNA_SIZE

    def __post_init__(self) -> None:
        """Refuse what cannot be generated."""
        if self.patients < 1:
            raise Refused(f"The sample needs at least 1 patient, not {self.patients}.")
        if self.seed < 0:
            raise Refused(f"The sample's seed is {self.seed}: choose one of 0 or more.")
        if not 64 <= self.size <= RSNA_SIZE:
            raise Refused(f"The sample's pictures cannot have {self.size} pixels a side: choose 64 to {RSNA_SIZE}.")


@dataclass(frozen=True, slots=True)
class Person:
    """What the tables and the header say of one patient; boxes are x, y, width, height in the picture's pixels.

    `sites` are the boxes that a patient would have, positive or not: the anatomy is fitted to them for all alike, so
    that the shape of the lungs does not give the label away.
    """

    patient_id: str
    detailed: str
    sites: tuple[Box, ...]
    sex: str
    age: str
    view: str
    spacing: str

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the label table: empty unless the class is Lung Opacity."""
        return self.sites if self.detailed == OPACITY else ()


def stream(config: SampleConfig, index: int, purpose: int) -> np.random.Generator:
    """Return the random stream of one patient for one purpose (0: tables and header, 1: picture, 2: pair)."""
    return np.random.default_rng(np.random.SeedSequence((config.seed, index, purpose)))


def person(config: SampleConfig, index: int) -> Person:
    """Draw the patient with this index; the same for any number of patients, so samples of one seed are nested."""
    # Of patients 2k and 2k + 1 one is positive: exactly half are, wherever the sample ends.
    positive = index % 2 == int(stream(config, index // 2, 2).integers(2))
    rng = stream(config, index, 0)
    patient_id = str(uuid.UUID(bytes=rng.bytes(16), version=4))
    negative = _weighted(rng, _NEGATIVES)
    sites = _sites(rng, config.size)
    ap = rng.random() < (_AP_GIVEN_POSITIVE if positive else _AP_GIVEN_NEGATIVE)
    return Person(
        patient_id=patient_id,
        detailed=OPACITY if positive else negative,
        sites=sites,
        sex=_weighted(rng, _SEXES),
        age=str(_age(rng)),
        view="AP" if ap else "PA",
        spacing=_weighted(rng, _SPACINGS),
    )


def _weighted(rng: np.random.Generator, counts: dict[T, int]) -> T:
    edges = np.cumsum(list(counts.values()))
    return list(counts)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def _quantile(table: tuple[tuple[float, float], ...], probability: float) -> float:
    for (p0, v0), (p1, v1) in pairwise(table):
        if probability <= p1:
            return v0 + (v1 - v0) * (probability - p0) / (p1 - p0)
    return table[-1][1]


def _age(rng: np.random.Generator) -> int:
    if rng.random() < _WRONG_AGE_SHARE:  # the challenge has five ages above 110
        return int(rng.choice(_WRONG_AGES))
    return round(_quantile(_AGE, rng.random()))


def _sites(rng: np.random.Generator, size: int) -> tuple[Box, ...]:
    """Draw 1 to 4 boxes that do not overlap, in no particular order."""
    count = _weighted(rng, _BOX_COUNTS)
    first_left = bool(rng.random() < (_SINGLE_LEFT if count == 1 else 0.5))
    opposite = count > 2 or bool(rng.random() < _TWO_OPPOSITE)
    boxes: list[Box] = []
    for k in range(count):
        left = first_left if k % 2 == 0 or not opposite else not first_left
        boxes.append(_apart(boxes, partial(_site, rng, left)))
    scale = size / RSNA_SIZE
    return tuple(_scaled(boxes[i], scale) for i in rng.permutation(count))


def _apart(boxes: list[Box], draw: Callable[[], Box]) -> Box:
    for _ in range(200):
        box = draw()
        if not any(_touch(box, other) for other in boxes):
            return box
    # No room was found beside a very large box: halve the height of the last try until there is.
    while any(_touch(box, other) for other in boxes) and box[3] > 2:
        box = (box[0], 0.0, box[2], box[3] // 2)
    return box


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _site(rng: np.random.Generator, left: bool) -> Box:
    """Draw one box whose centre is in the left or right half; whole pixels of a 1024x1024 picture."""
    while True:
        tall, wide, low = rng.standard_normal(3)
        wide = _TALL_IS_WIDE * tall + math.sqrt(1 - _TALL_IS_WIDE**2) * wide
        low = _TALL_IS_HIGH * tall + math.sqrt(1 - _TALL_IS_HIGH**2) * low
        width, height, y = (
            round(_quantile(table, 0.5 + 0.5 * math.erf(z / math.sqrt(2))))
            for table, z in ((_WIDTH, wide), (_HEIGHT, tall), (_Y, low))
        )
        x = round(_quantile(_X_LEFT if left else _X_RIGHT, rng.random()))
        if (x + width / 2 < RSNA_SIZE / 2) == left and x + width <= RSNA_SIZE and y + height <= RSNA_SIZE:
            return float(x), float(y), float(width), float(height)


def _scaled(box: Box, scale: float) -> Box:
    """Round to whole pixels of the scaled picture, so that a box stays inside it and keeps at least one pixel."""
    x, y = math.floor(box[0] * scale), math.floor(box[1] * scale)
    right, bottom = math.floor((box[0] + box[2]) * scale), math.floor((box[1] + box[3]) * scale)
    return float(x), float(y), float(max(right - x, 1)), float(max(bottom - y, 1))

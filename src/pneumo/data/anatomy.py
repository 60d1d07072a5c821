"""Drawing a chest X-ray: layers of attenuation that add up as in a real one, then exposure, then noise.

Coordinates are fractions of the picture, x to the right and y down; "left" is the left of the picture (the patient's
right). Layers are drawn on a 512x512 grid as 8-bit masks, blurred, weighted and added; 0 is air, 1 is the mediastinum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pneumo.data.opencv import cv2

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Points = NDArray[np.float64]
Site = tuple[float, float, float, float]

GRID = 512
_SHIFT = 4  # OpenCV draws at 1/16 of a pixel
_FILM = 1280  # side of the film noise that pictures cut their own pieces from


@dataclass(frozen=True, slots=True)
class Opacity:
    """A shadow to draw in a lung: its box in fractions of the picture, and how much of the lung's air it replaces."""

    site: Site
    strength: float


@dataclass(frozen=True, slots=True)
class Lung:
    """One lung field: the midline, its outermost x, the y of its apex and of its lowest corner, and -1 (left) or 1."""

    side: int
    middle: float
    edge: float
    apex: float
    base: float

    def place(self, u: Sequence[float] | Points, v: Sequence[float] | Points) -> Points:
        """Map u (0 midline, 1 outermost) and v (0 apex, 1 lowest corner), both (...), to points (..., 2)."""
        x = self.middle + (self.edge - self.middle) * np.asarray(u)
        return np.stack([x, self.apex + (self.base - self.apex) * np.asarray(v)], axis=-1)


@dataclass(frozen=True, slots=True)
class Looks:
    """What differs from person to person and does not depend on the opacities."""

    view: str = "PA"
    sex: str = "M"
    large_heart: bool = False
    nodule: bool = False
    blunt_angle: bool = False
    device: bool = False


def draw(
    rng: np.random.Generator, size: int, sites: Sequence[Site], opacities: Sequence[Opacity], looks: Looks
) -> Bytes:
    """Return a picture, uint8 (size, size), whose lungs reach around all `sites` and show the `opacities`."""
    lungs = [_lung(rng, side, sites, looks) for side in (-1, 1)]
    air = _lung_mask(rng, lungs, looks)
    picture = _body(rng, lungs)
    picture -= air * float(rng.uniform(0.46, 0.50))
    picture += _mediastinum(rng, lungs, looks)
    picture += _vessels(rng, lungs) * air
    picture += _bones(rng, lungs)
    if looks.sex == "F":
        picture += _breasts(rng, lungs)
    picture += _cloud(rng, GRID, 0.03) * air
    if looks.nodule:
        _add_nodule(rng, picture, lungs)
    for opacity in opacities:
        _add_opacity(rng, picture, air, opacity)
    picture += _hardware(rng, lungs, looks)
    return _expose(rng, picture, size)


def _lung(rng: np.random.Generator, side: int, sites: Sequence[Site], looks: Looks) -> Lung:
    """Draw a lung's extent, and stretch it where a site would lie outside of it."""
    middle = 0.5 + rng.normal(0, 0.008)
    width = rng.uniform(0.385, 0.415)
    apex = rng.uniform(0.07, 0.10)
    # A lying patient (AP) breathes in less; the liver lifts the diaphragm on the left of the picture.
    base = rng.uniform(0.83, 0.87) - (0.015 if looks.view == "AP" else 0.0) + (0.02 if side > 0 else 0.0)
    for x, y, w, h in sites:
        if (x + w / 2 < 0.5) == (side < 0):
            reach = middle - x if side < 0 else x + w - middle
            width = min(max(width, reach), 0.45)
            apex = max(min(apex, y - 0.03), 0.06)
            base = min(max(base, y + h), 0.92)
    return Lung(side, middle, middle + side * width, apex, base)


def _outline(points: Points, closed: bool = True, steps: int = 8) -> Points:
    """Return the Catmull-Rom spline through the points (n, 2)."""
    if closed:
        p = np.concatenate([points[-1:], points, points[:2]])
    else:
        p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (p[k : len(p) - 3 + k, None, :] for k in range(4))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.asarray(curve.reshape(-1, 2), np.float64)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.round(points * (GRID << _SHIFT)).astype(np.int32)


def _fill(mask: Bytes, points: Points, value: int = 255) -> None:
    cv2.fillPoly(mask, [_fixed(points)], [value], cv2.LINE_8, _SHIFT)


def _pixel(point: Points) -> tuple[int, int]:
    return round(float(point[0]) * GRID), round(float(point[1]) * GRID)


def _stroke(mask: Bytes, points: Points, thickness: int, value: int = 255) -> None:
    """Draw one line (n, 2) or several (lines, n, 2)."""
    fixed = _fixed(points)
    cv2.polylines(mask, [fixed] if fixed.ndim == 2 else list(fixed), False, [value], thickness, cv2.LINE_8, _SHIFT)


def _canvas() -> Bytes:
    return np.zeros((GRID, GRID), np.uint8)


def _soft(mask: Bytes, sigma: float, weight: float) -> Floats:
    """Blur a mask and scale its 255 to `weight`; wide blurs run on a smaller grid."""
    if sigma >= 8:
        small = cv2.resize(mask, (GRID // 4, GRID // 4), interpolation=cv2.INTER_AREA).astype(np.float32)
        blurred = cv2.GaussianBlur(small, (0, 0), sigma / 4, borderType=cv2.BORDER_REPLICATE)
        layer = cv2.resize(blurred, (GRID, GRID), interpolation=cv2.INTER_LINEAR)
    else:
        layer = cv2.GaussianBlur(mask, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE).astype(np.float32)
    return np.asarray(layer * np.float32(weight / 255), np.float32)


def _cloud(rng: np.random.Generator, shape: int, weight: float, cells: int = 9) -> Floats:
    """Return smooth random clouds (shape, shape) of standard deviation about `weight`: two octaves."""
    layer = np.zeros((shape, shape), np.float32)
    for octave in (1, 3):
        coarse = rng.standard_normal((cells * octave, cells * octave), np.float32) * np.float32(weight / octave)
        layer += cv2.resize(coarse, (shape, shape), interpolation=cv2.INTER_CUBIC)
    return layer


def _lung_mask(rng: np.random.Generator, lungs: Sequence[Lung], looks: Looks) -> Floats:
    """Return how much air there is, (512, 512): 1 in a lung's middle, less at its rim."""
    mask = _canvas()
    for lung in lungs:
        blunt = 0.10 if looks.blunt_angle and lung.side == 1 else 0.0
        dome = rng.uniform(0.84, 0.89)
        u = [0.45, 0.70, 0.88, 0.96, 1.00, 1.00, 0.97, 0.86, 0.66, 0.45, 0.26, 0.14, 0.13, 0.13, 0.15, 0.24]
        v = [0.00, 0.06, 0.21, 0.42, 0.68, 0.90 - blunt, 1.0 - blunt]
        v += [0.935 - blunt, dome, dome - 0.005, dome + 0.025, 0.93, 0.70, 0.45, 0.22, 0.06]
        points = lung.place(np.array(u) + rng.normal(0, 0.008, len(u)), np.array(v) + rng.normal(0, 0.006, len(v)))
        _fill(mask, _outline(points))
    return 0.45 * _soft(mask, 1.6, 1.0) + 0.55 * _soft(mask, 13, 1.0)


def _body(rng: np.random.Generator, lungs: Sequence[Lung]) -> Floats:
    """Return soft tissue: neck, shoulders, chest wall and abdomen, thicker towards the middle."""
    mask = _canvas()
    neck, slope = rng.uniform(0.085, 0.12), rng.uniform(0.10, 0.17)
    wall = rng.uniform(0.05, 0.09)
    for lung in lungs:
        side, edge = lung.side, lung.edge + lung.side * wall
        slope = min(slope, lung.apex / 0.72)  # no lung above the shoulder
        shoulder = [[0.5 - side * 0.05, -0.05], [0.5 + side * neck, -0.05], [0.5 + side * (neck + 0.02), 0.03]]
        shoulder += [[0.5 + side * 0.30, slope * 0.72], [0.5 + side * 0.45, slope + 0.02], [0.5 + side * 0.56, 0.30]]
        arm = [[0.5 + side * 0.56, 0.52], [edge + side * 0.015, 0.46], [edge, 0.62], [edge, 0.8]]
        hip = [[edge + side * 0.02, 1.06], [0.5 - side * 0.05, 1.06]]
        _fill(mask, _outline(np.array(shoulder + arm + hip)))
    layer = _soft(mask, 2.5, 0.42) + _soft(mask, 26, 0.30)
    abdomen = _canvas()
    level = min(lung.apex + 0.86 * (lung.base - lung.apex) for lung in lungs)
    _fill(abdomen, np.array([[0, level], [1, level], [1, 1.1], [0, 1.1]]))
    layer += _soft(abdomen, 20, rng.uniform(0.05, 0.12)) * (layer > 0.2)
    if rng.random() < 0.4:  # gas in the stomach
        gas = _canvas()
        lung = lungs[1]
        x, y = lung.place([rng.uniform(0.3, 0.55)], [rng.uniform(0.97, 1.06)])[0]
        axes = (round(GRID * rng.uniform(0.03, 0.07)), round(GRID * rng.uniform(0.02, 0.04)))
        cv2.ellipse(gas, (round(x * GRID), round(y * GRID)), axes, float(rng.uniform(-20, 20)), 0, 360, [255], -1)
        layer -= _soft(gas, 4, rng.uniform(0.10, 0.25))
    return layer


def _mediastinum(rng: np.random.Generator, lungs: Sequence[Lung], looks: Looks) -> Floats:
    """Return heart, great vessels, spine and (as less) the windpipe."""
    left, right = lungs
    wide = rng.uniform(0.30, 0.36) + (0.04 if looks.view == "AP" else 0.0) + (0.10 if looks.large_heart else 0.0)
    atrium = rng.uniform(0.22, 0.26) + (0.04 if looks.large_heart else 0.0)
    stem, knob = rng.uniform(0.11, 0.15), rng.uniform(0.17, 0.23)
    outline = np.concatenate([
        left.place([stem, stem, stem + 0.01, 0.18, atrium, atrium + 0.01, 0.20, 0.12],
                   [-0.1, 0.10, 0.30, 0.46, 0.62, 0.74, 0.88, 1.02]),
        right.place([0.3, 0.92 * wide + 0.14, wide + 0.14, wide + 0.08, 0.34, 0.21, knob, knob, stem, stem],
                    [1.00, 0.91, 0.80, 0.68, 0.50, 0.38, 0.31, 0.23, 0.12, -0.1]),
    ])  # fmt: skip
    mask = _canvas()
    _fill(mask, _outline(outline))
    layer = _soft(mask, 2.4, 0.13) + _soft(mask, 12, 0.11)
    spine = _canvas()
    middle, step = (left.middle + right.middle) / 2, rng.uniform(0.052, 0.062)
    half = rng.uniform(0.034, 0.042)
    for k in range(19):
        y = k * step + 0.01
        _fill(spine, np.array([[middle - half, y], [middle + half, y], [middle + half * 0.93, y + step * 0.82],
                               [middle - half * 0.93, y + step * 0.82]]))  # fmt: skip
    layer += _soft(spine, 2.2, 0.04)
    pipe = _canvas()
    bend = middle + rng.normal(0, 0.006)
    _stroke(pipe, np.array([[middle, -0.02], [bend, 0.15], [bend, 0.28]]), 15)
    _stroke(pipe, np.array([[bend - 0.07, 0.37], [bend, 0.285], [bend + 0.09, 0.38]]), 8)
    layer -= _soft(pipe, 2.8, 0.08)
    # Below the diaphragm the heart's shadow is part of the abdomen's.
    level = max(lung.apex + 0.87 * (lung.base - lung.apex) for lung in lungs)
    fade = 1 / (1 + np.exp((np.linspace(0, 1, GRID) - level - 0.01) / 0.018))
    layer *= (0.25 + 0.75 * fade).astype(np.float32)[:, None]
    return layer


def _ribs(lung: Lung, levels: Points, front: bool, slant: float) -> Points:
    """Return ribs' curves (ribs, 9, 2): helices seen from the front, behind from the spine outward, in front back."""
    turn = np.linspace(math.pi / 2, 2.55, 9) if front else np.linspace(0.02, math.pi / 2, 9)
    widest = np.interp(levels + 0.12, [0, 0.1, 0.25, 0.45, 0.7], [0.50, 0.71, 0.89, 0.965, 1.0])[:, None]
    fall = 0.085 * (1 - np.cos(turn)) + (0.10 * (turn - math.pi / 2) if front else 0)
    lift = 0.0 if front else -0.035 * np.sin(2 * turn)
    return lung.place(0.09 + (widest - 0.09) * np.sin(turn), levels[:, None] + slant * fall + lift)


def _bones(rng: np.random.Generator, lungs: Sequence[Lung]) -> Floats:
    """Return ribs, clavicles, shoulder blades and the heads of the upper arms; their rims are the brightest part."""
    behind, front, girdle = _canvas(), _canvas(), _canvas()
    gap, slant = rng.uniform(0.088, 0.102), rng.uniform(1.1, 1.9)
    thick = round(rng.uniform(10, 14))
    for lung in lungs:
        levels = -0.03 + gap * np.arange(10) + rng.normal(0, 0.004, 10)
        for mask, curves in (
            (behind, _ribs(lung, levels, False, slant)),
            (front, _ribs(lung, levels[1:-1], True, slant)),
        ):
            _stroke(mask, curves, thick)
            _stroke(mask, curves, thick - 4, 195)
        _girdle(rng, girdle, lung)
    layer = _soft(behind, 1.2, rng.uniform(0.06, 0.08)) + _soft(front, 1.4, rng.uniform(0.03, 0.05))
    layer += _soft(girdle, 1.3, rng.uniform(0.10, 0.15))
    return layer


def _girdle(rng: np.random.Generator, mask: Bytes, lung: Lung) -> None:
    side = lung.side
    tilt = rng.uniform(-0.02, 0.025)
    clavicle = np.array([[0.035, 0.20], [0.12, 0.165], [0.22, 0.16 - tilt], [0.33, 0.125 - tilt], [0.41, 0.11 - tilt]])
    curve = _outline(np.stack([lung.middle + side * clavicle[:, 0], clavicle[:, 1] + 0.02], axis=1), closed=False)
    blade = np.array([[0.40, 0.12], [0.37, 0.22], [0.385, 0.33], [0.42, 0.41], [0.455, 0.36], [0.46, 0.22]])
    rim = _outline(np.stack([0.5 + side * (blade[:, 0] + rng.uniform(0, 0.03)), blade[:, 1]], axis=1))
    _fill(mask, rim, 75)
    _stroke(mask, rim, 2, 150)
    head = (round(GRID * (0.5 + side * 0.475)), round(GRID * 0.165))
    cv2.circle(mask, head, 23, [190], -1)
    cv2.circle(mask, head, 23, [235], 2)
    _stroke(mask, np.array([[0.5 + side * 0.485, 0.18], [0.5 + side * 0.51, 0.45]]), 26, 150)
    _stroke(mask, curve, 14, 255)
    _stroke(mask, curve, 9, 195)


def _vessels(rng: np.random.Generator, lungs: Sequence[Lung]) -> Floats:
    """Return the vessels that branch from each hilum, thinner and fainter outward."""
    mask = _canvas()
    for lung in lungs:
        root = np.array([0.22, 0.44 if lung.side < 0 else 0.40])
        cv2.circle(mask, _pixel(lung.place(root[:1], root[1:])[0]), 11, [150], -1)
        angles = np.linspace(-1.75, 1.75, 13) + rng.normal(0, 0.12, 13)
        starts = root + rng.normal(0, 0.02, (13, 2))
        for thickness, value in ((5, 190), (3, 150), (2, 115)):
            paths = _paths(rng, starts, angles)
            lines = lung.place(np.clip(paths[..., 0], 0.1, 1), paths[..., 1])
            _stroke(mask, lines[:, 3:], max(thickness - 2, 1), value * 3 // 5)
            _stroke(mask, lines[:, 2:4], max(thickness - 1, 1), value * 4 // 5)
            _stroke(mask, lines[:, :3], thickness, value)
            # Two daughters leave each vessel, to either side.
            starts = np.concatenate([paths[:, 2], paths[:, 4]])
            turns = rng.uniform(0.35, 0.75, len(starts)) * np.repeat([-1, 1], len(angles))
            angles = np.concatenate([angles, angles]) + turns
    return _soft(mask, 1.1, rng.uniform(0.09, 0.16))


def _paths(rng: np.random.Generator, starts: Points, angles: Points) -> Points:
    """Return wandering paths (vessels, 6, 2) from their starts (vessels, 2) in their directions (vessels,)."""
    bends = angles[:, None] + np.cumsum(rng.normal(0, 0.16, (len(starts), 5)), axis=1)
    lengths = 0.06 * rng.uniform(0.6, 1.2, (len(starts), 5))
    moves = np.stack([np.cos(bends) * lengths, np.sin(bends) * lengths], axis=-1)
    return np.concatenate([starts[:, None], starts[:, None] + np.cumsum(moves, axis=1)], axis=1)


def _breasts(rng: np.random.Generator, lungs: Sequence[Lung]) -> Floats:
    mask = _canvas()
    low, wide = rng.uniform(0.62, 0.76), rng.uniform(0.13, 0.18)
    for lung in lungs:
        x = lung.middle + (lung.edge - lung.middle) * rng.uniform(0.58, 0.7)
        axes = (round(GRID * wide), round(GRID * wide * 0.95))
        cv2.ellipse(mask, (round(x * GRID), round(low * GRID)), axes, 0, 0, 360, [255], -1)
    return _soft(mask, 9, rng.uniform(0.03, 0.08))


def _add_nodule(rng: np.random.Generator, picture: Floats, lungs: Sequence[Lung]) -> None:
    """Add one small round well-bounded shadow, which is not an opacity of pneumonia."""
    mask = _canvas()
    lung = lungs[int(rng.integers(2))]
    x, y = lung.place([rng.uniform(0.45, 0.85)], [rng.uniform(0.2, 0.7)])[0]
    cv2.circle(mask, (round(x * GRID), round(y * GRID)), int(rng.integers(6, 15)), [255], -1)
    picture += _soft(mask, 1.8, rng.uniform(0.12, 0.22))


def _add_opacity(rng: np.random.Generator, picture: Floats, air: Floats, opacity: Opacity) -> None:
    """Fill air in the opacity's box with something like soft tissue: patchy, with an uneven soft rim."""
    x, y, w, h = (round(value * GRID) for value in opacity.site)
    w, h = min(max(w, 8), GRID - x), min(max(h, 8), GRID - y)
    across = np.abs(np.linspace(-1, 1, w, dtype=np.float32))[None, :]
    down = np.abs(np.linspace(-1, 1, h, dtype=np.float32))[:, None]
    radius = np.cbrt(across**3 + down**3)  # between an ellipse and its box
    texture = cv2.resize(_cloud(rng, 96, 1.0, cells=5), (w, h), interpolation=cv2.INTER_LINEAR)
    rim = np.clip((1.04 - radius - 0.05 * np.abs(texture)) / 0.45, 0, 1)
    share = rim * rim * (3 - 2 * rim) * np.clip(0.88 + 0.09 * texture, 0.5, 1.1) * opacity.strength
    part = (slice(y, y + h), slice(x, x + w))
    air_here = np.clip(air * 1.15, 0, 1)
    # The filled lung is as bright as the wall around it; ribs and heart still show through.
    picture[part] += share * (0.12 + 0.88 * air_here[part]) * np.float32(0.48)
    # Around it the lung is hazy, without an edge.
    x0, y0, reach = x + w / 2, y + h / 2, 1.1
    fx = np.exp(-(((np.arange(GRID, dtype=np.float32) - x0) / (reach * (w + 60))) ** 2))
    fy = np.exp(-(((np.arange(GRID, dtype=np.float32) - y0) / (reach * (h + 60))) ** 2))
    picture += fy[:, None] * fx * air_here * np.float32(0.24 * opacity.strength)


def _hardware(rng: np.random.Generator, lungs: Sequence[Lung], looks: Looks) -> Floats:
    """Return the side letter, and in a bed (AP) or with a device the leads and lines that go with it."""
    mask = _canvas()
    letter, x = ("L", 0.93) if rng.random() < 0.6 else ("R", 0.03)
    place = (round(GRID * x), round(GRID * rng.uniform(0.07, 0.3)))
    cv2.putText(mask, letter, place, cv2.FONT_HERSHEY_SIMPLEX, 0.8, [230], 2, cv2.LINE_AA)
    for _ in range(int(rng.integers(1, 4)) if looks.view == "AP" else 0):
        end = rng.uniform([0.15, 0.25], [0.85, 0.7])
        way = np.array([[rng.uniform(0.05, 0.95), 1.05], end + rng.normal(0, 0.12, 2), end])
        _stroke(mask, _outline(way, closed=False), 2, 105)
        cv2.circle(mask, _pixel(end), 6, [150], -1)
    if looks.device:
        side = float(rng.choice([-1, 1]))
        box = np.array([0.5 + side * 0.30, 0.24])
        cv2.ellipse(mask, _pixel(box), (26, 22), 20, 0, 360, [255], -1)
        way = np.array([box, [0.5 + side * 0.1, 0.17], [0.48, 0.3], [0.47, 0.55], [0.56, 0.72]])
        _stroke(mask, _outline(way, closed=False), 3, 170)
    return _soft(mask, 0.8, 0.38)


@lru_cache(maxsize=1)
def _film() -> Floats:
    """Return film noise (sigma 1) that all pictures cut their own piece from: a million normals each take longer."""
    rng = np.random.default_rng(np.random.SeedSequence(1896))
    noise = cv2.GaussianBlur(rng.standard_normal((_FILM, _FILM), np.float32), (0, 0), 0.6)
    film: Floats = np.asarray(noise / noise.std(), np.float32)
    film.setflags(write=False)
    return film


def _expose(rng: np.random.Generator, picture: Floats, size: int) -> Bytes:
    """Turn attenuation into grey levels: exposure, contrast, film noise; bright parts are compressed, not clipped."""
    gain, lift, gamma = rng.uniform(0.96, 1.04), rng.normal(0, 0.01), math.exp(rng.normal(0, 0.06))
    levels = np.maximum(np.linspace(0, 1.4, 4096) * gain + lift, 0.004)
    curve = (255 / math.tanh(1.6) * np.tanh(1.35 * levels ** (1.25 * gamma))).astype(np.float32)
    exposed = curve[np.clip(picture * 2925, 0, 4095).astype(np.uint16)]
    grey = cv2.resize(exposed, (size, size), interpolation=cv2.INTER_LINEAR)
    row, column = rng.integers(0, _FILM - size + 1, 2)
    grain = cv2.scaleAdd(_film()[row : row + size, column : column + size], float(rng.uniform(1.1, 2.1)), grey)
    return np.asarray(cv2.convertScaleAbs(grain), np.uint8)  # noise in the black reflects at 0

"""What DICOM's lookup tables, rescale and windows do to pixel values (PS3.3 C.11.1 and C.11.2).

Every function takes the levels that occur in a picture, not the picture. "Shown" values are fractions of the screen's
range, 0 black to 1 white, before MONOCHROME1 is inverted. An element that cannot be read or is not finite counts as
absent; a lookup table that is damaged raises ValueError, since the picture cannot be shown as it was meant.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer[Any]]

TAILS: Final = 0.005
"""The fraction of pixels beyond each end of the range that is shown of pictures deeper than 8 bits."""


def modality(dataset: Dataset, levels: Values) -> Values:
    """Return what the stored levels stand for: by the Modality LUT, or slope and intercept, or as they are."""
    item = _first(dataset, "ModalityLUTSequence")
    if item is not None:
        return _look_up(dataset, item, levels)[0]
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    return levels * (slope if slope else 1.0) + (intercept or 0.0)


def voi(dataset: Dataset, values: Values) -> Values | None:
    """Return what is shown of the values by the VOI LUT or the (first) window, or None if the file has neither."""
    item = _first(dataset, "VOILUTSequence")
    if item is not None:
        entries, top = _look_up(dataset, item, values)
        return np.clip(entries / top, 0.0, 1.0)
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is None or width is None:
        return None
    return window(values, centre, width, function)


def window(values: Values, centre: float, width: float, function: str = "LINEAR") -> Values | None:
    """Return what a window shows of the values; None if its width makes it none (below 1 if LINEAR, else below 0).

    The functions are those of PS3.3 C.11.2.1.2 and C.11.2.1.3: LINEAR (an unknown name means this one too), which
    counts from pixel centres, LINEAR_EXACT and SIGMOID.
    """
    if function == "SIGMOID" and width > 0:
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0))))
    if function == "LINEAR_EXACT" and width > 0:
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    if function in ("SIGMOID", "LINEAR_EXACT") or width < 1:
        return None
    if width == 1:
        return np.asarray(values > centre - 0.5, np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def whole_range(dataset: Dataset, levels: Values, values: Values, count: Callable[[], Counts]) -> Values:
    """Return what is shown without any window: 8-bit pictures whole, deeper ones between percentiles of their pixels.

    `count` gives the pixels at each level; it is called only where it is needed. Padding (Pixel Padding Value) has no
    say in the percentiles.
    """
    bits = int(_number(dataset, "BitsStored") or _number(dataset, "BitsAllocated") or 8)
    signed = _number(dataset, "PixelRepresentation") == 1
    bottom = -(2 ** (bits - 1)) if signed else 0
    ends = np.array([bottom, bottom + 2**bits - 1], np.float64)
    table = _first(dataset, "ModalityLUTSequence") is not None
    if bits <= 8 and not table and ends[0] <= levels[0] and levels[-1] <= ends[1]:
        low, high = sorted(modality(dataset, ends))
    else:
        low, high = _percentiles(dataset, levels, values, count())
    return np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(values)


def _percentiles(dataset: Dataset, levels: Values, values: Values, counts: Counts) -> tuple[float, float]:
    """Return the values below and above which TAILS of the pixels lie, padding apart."""
    padding = _number(dataset, "PixelPaddingValue")
    real = np.where(levels == padding, 0, counts) if padding is not None else counts
    if not real.any():
        real = counts
    order = np.argsort(values, kind="stable")
    below = np.cumsum(real[order])
    at = np.searchsorted(below, [below[-1] * TAILS, below[-1] * (1 - TAILS)], side="left")
    low, high = values[order][at]
    if high > low:
        return float(low), float(high)
    present = values[real > 0]  # nearly all pixels alike: what little there is to see lies in the tails
    return float(present.min()), float(present.max())


def _first(dataset: Dataset, keyword: str) -> Dataset | None:
    """Return a sequence's first item, or None."""
    sequence = dataset.get(keyword)
    return sequence[0] if sequence else None


def _number(dataset: Dataset, keyword: str) -> float | None:
    """Return a finite number, the first of several, or None."""
    try:
        value = dataset.get(keyword)
        value = value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value
        number = float(value)
    except Exception:  # absent, empty, or text that is no number: pydicom parses when a value is first touched
        return None
    return number if math.isfinite(number) else None


def _look_up(dataset: Dataset, item: Dataset, values: Values) -> tuple[Values, float]:
    """Return the values mapped by a LUT item (PS3.3 C.11.1.1), ends extended, and the largest output it can have."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 65536
    signed = dataset.get("PixelRepresentation") == 1 or float(values[0]) < 0
    if signed and first >= 32768:  # stored as unsigned, meant as signed
        first -= 65536
    data = item.LUTData
    if isinstance(data, bytes):
        little = dataset.original_encoding[1] is not False
        one_byte = len(data) < 2 * count
        data = np.frombuffer(data, np.uint8 if one_byte else ("<u2" if little else ">u2"))
    entries = np.asarray(data, np.float64).ravel()[:count]
    if entries.size < count:
        raise ValueError("a lookup table is shorter than its descriptor says")
    at = np.clip(np.rint(values) - first, 0, count - 1).astype(np.int64)
    return entries[at], max(float(2 ** min(max(bits, 1), 16) - 1), float(entries.max()))

"""From a DICOM file to the 8-bit grey picture that a radiologist would see, and the few header values that are kept.

Rules of the picture: DICOM PS3.3 C.11.1 (Modality LUT and rescale), C.11.2 (VOI LUT and window) and C.7.6.3.1.2
(MONOCHROME1). They act on one pixel at a time, so they are worked out once for each stored level that occurs (at
most 65,536) and the picture is looked up in that table.

Nothing else of a header leaves this module: a message is made of our own words and numbers, never of what an
exception says, since decoders quote what they stumble over.
"""

import os
import re
import sys
import warnings
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from pneumo.data import codestream, lut
from pneumo.data.geometry import square_around
from pneumo.data.opencv import cv2
from pneumo.errors import PneumoError

Picture = npt.NDArray[np.uint8]

RADIOGRAPHS: Final = ("CR", "DX", "DR", "RG")
"""Modalities of plain radiographs: computed, digital (DX; DR in older files) and film that was digitised (RG)."""

OTHERS: Final = ("BMD", "CT", "ES", "IO", "MG", "MR", "NM", "OPT", "OT", "PT", "PX", "RF", "SC", "SM", "US", "XA", "XC")
VIEWS: Final = ("PA", "AP", "LL", "RL", "LLD", "RLD", "LLO", "RLO", "LAT", "LATERAL")
UNCOMPRESSED: Final = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
PLUGINS: Final = {
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "pillow",
    JPEG2000Lossless: "pillow",
    JPEG2000: "pillow",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "gdcm",
    JPEGLSNearLossless: "gdcm",
}
"""pydicom's plug-in for what OpenCV does not decode: gdcm only where nothing else can, since it may end the process."""

LONGEST_SIDE: Final = 16384
OLDEST_YEARS: Final = 120

# RSNA's ages ("51") and pixel spacings (19 characters) break DICOM's rules in every single file, and pydicom says so in
# every single file. What it reads is the same; what we cannot use we refuse ourselves. Set here, once, because
# pydicom's settings and Python's filters belong to the process and must not be switched while threads read.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")


class Undecodable(PneumoError):  # noqa: N818 -- what is wrong with a file, not an accident of the program
    """This file gives no picture: `reason` is one of `rsna.REASONS`, `detail` one clause that quotes no header text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Header:
    """All that is kept of a DICOM header: statistics of the patient, and the size of the picture in pixels."""

    modality: str | None
    sex: str | None
    age: int | None
    view: str | None
    rows: int
    columns: int


def read_grey(path: str | os.PathLike[str], modalities: Collection[str] | None = None) -> tuple[Picture, Header]:
    """Return the picture of a DICOM file, as shown on a screen, and its header.

    The picture is uint8 (rows, columns), 0 black and 255 white, with modality LUT or rescale, VOI LUT or window and
    MONOCHROME1 applied. Without a window, 8-bit pictures keep their full stored range, and deeper ones are spread
    over the 0.5th to the 99.5th percentile of their pixels.
    Raises Undecodable: "wrong_modality" if `modalities` is given and lacks the file's, else "corrupt".
    """
    try:
        dataset = _read(Path(path))
        header = _header(dataset)
        if "PixelData" not in dataset:
            raise Undecodable("corrupt", "has no pixel data, or ends too early")
        if modalities is not None and header.modality not in modalities:
            found = f"modality {header.modality}" if header.modality else "no known modality"
            raise Undecodable("wrong_modality", f"has {found}, not one of {', '.join(modalities)}")
        _check(dataset, header)
        return _render(dataset, _stored(dataset, header)), header
    except Undecodable:
        raise
    except Exception as error:  # whatever a reader of hostile bytes can raise; its text may quote them
        raise Undecodable("corrupt", f"cannot be read as a radiograph ({type(error).__name__})") from None


def resize(picture: Picture, size: int) -> Picture:
    """Return the picture as uint8 (size, size), its sides in proportion, centred on black where it is not square.

    Shrinking averages over areas (linear interpolation from 1024 to 128 aliases); enlarging interpolates linearly.
    """
    rows, columns = picture.shape
    if rows != columns:
        side, top, left = square_around(rows, columns)
        square = np.zeros((side, side), np.uint8)
        square[top : top + rows, left : left + columns] = picture
        picture = square
    if picture.shape[0] == size:
        return picture.copy()
    how = cv2.INTER_AREA if picture.shape[0] > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, (size, size), interpolation=how), np.uint8)


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keep off the screen what libjpeg and gdcm write straight to descriptor 2 about damaged files.

    For the whole process, so for a whole stage of reading rather than for each file. What Python writes to sys.stderr
    meanwhile still gets there.
    """
    try:
        ours = sys.stderr.fileno() == 2
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # no standard error at all, or one that a test has replaced
        yield
        return
    before = sys.stderr
    with open(os.devnull, "wb") as nothing, os.fdopen(os.dup(kept), "w", buffering=1, errors="replace") as voice:
        os.dup2(nothing.fileno(), 2)
        sys.stderr = voice if ours else before
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(kept, 2)
            os.close(kept)


def parse_age(text: object) -> int | None:
    """Return an age in whole years from "051Y", "51", "006M", "03W" or "012D"; None if it says nothing believable."""
    match = re.fullmatch(r"\s*(\d{1,4})\s*([YMWD]?)\s*", str(text), re.ASCII | re.IGNORECASE)
    if match is None:
        return None
    a_year = {"": 1, "Y": 1, "M": 12, "W": 52.1775, "D": 365.2425}[match[2].upper()]
    years = int(int(match[1]) / a_year)
    return years if years <= OLDEST_YEARS else None


def _read(path: Path) -> Dataset:
    """Read the data set, or say in our own words why it is none."""
    try:
        if path.stat().st_size == 0:
            raise Undecodable("corrupt", "is an empty file")
        return pydicom.dcmread(path)
    except InvalidDicomError:
        raise Undecodable("corrupt", "is not a DICOM file") from None
    except OSError as error:
        why = f"cannot be read: {os.strerror(error.errno).lower()}" if error.errno else "ends too early"
        raise Undecodable("corrupt", why) from None
    except (EOFError, zlib.error):
        raise Undecodable("corrupt", "ends too early") from None


def _value(dataset: Dataset, keyword: str) -> Any:
    """Return an element's value, or None if it is absent, empty or unreadable (it is parsed when first touched)."""
    try:
        value = dataset.get(keyword)
        return None if value is None or value == "" else value
    except Exception:  # a damaged element counts as an absent one
        return None


def _code(dataset: Dataset, keyword: str, known: Collection[str]) -> str | None:
    """Return a coded string in upper case, or None if it is not one of the known codes: it could hold anything."""
    text = str(_value(dataset, keyword) or "").strip().upper()
    return text if text in known else None


def _whole(dataset: Dataset, keyword: str, default: int = 0) -> int:
    """Return a whole number of the header, or the default where there is none."""
    try:
        return int(_value(dataset, keyword))
    except (TypeError, ValueError):
        return default


def _header(dataset: Dataset) -> Header:
    return Header(
        modality=_code(dataset, "Modality", RADIOGRAPHS + OTHERS),
        sex=_code(dataset, "PatientSex", ("M", "F", "O")),
        age=parse_age(_value(dataset, "PatientAge")),
        view=_code(dataset, "ViewPosition", VIEWS),
        rows=_whole(dataset, "Rows"),
        columns=_whole(dataset, "Columns"),
    )


def _check(dataset: Dataset, header: Header) -> None:
    """Refuse what is not one grey picture of 8 to 16 bits, before memory is spent on it."""
    if header.rows < 1 or header.columns < 1:
        raise Undecodable("corrupt", "the header gives no picture size")
    if max(header.rows, header.columns) > LONGEST_SIDE:
        raise Undecodable("corrupt", f"is larger than {LONGEST_SIDE} pixels on a side")
    if _whole(dataset, "NumberOfFrames", 1) > 1:
        raise Undecodable("corrupt", "holds several frames instead of one picture")
    photometric = _value(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or _whole(dataset, "SamplesPerPixel", 1) != 1:
        raise Undecodable("corrupt", "is not a grey picture (MONOCHROME1 or MONOCHROME2)")
    if _whole(dataset, "BitsAllocated") not in (8, 16):
        raise Undecodable("corrupt", "does not store its pixels in 8 or 16 bits")


def _stored(dataset: Dataset, header: Header) -> npt.NDArray[Any]:
    """Return the stored values, 8- or 16-bit integers (rows, columns)."""
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    pixels = _decompress(dataset, header, syntax) if syntax in PLUGINS else _by_pydicom(dataset, syntax)
    if pixels.shape != (header.rows, header.columns) or pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        raise Undecodable("corrupt", "its pixel data do not have the size that its header gives")
    return pixels


def _decompress(dataset: Dataset, header: Header, syntax: UID) -> npt.NDArray[Any]:
    """Decode a JPEG, JPEG-LS or JPEG 2000 picture once it is known to be whole, and to be the one of the header."""
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
    try:
        frame = codestream.examine(stream)
    except codestream.Damaged:
        raise Undecodable("corrupt", "its compressed picture is cut short or damaged") from None
    if (frame.rows, frame.columns, frame.components) != (header.rows, header.columns, 1) or not 2 <= frame.bits <= 16:
        raise Undecodable("corrupt", "its compressed picture is not the one that its header describes")
    if frame.bits == 8 and frame.marker in codestream.SOF_JPEG[:3]:
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(stream, np.uint8), flags)
        if pixels is None:
            raise Undecodable("corrupt", f"no decoder reads its pixel data ({syntax.name})")
        return pixels
    dataset.pixel_array_options(decoding_plugin=PLUGINS[syntax])
    return _by_pydicom(dataset, syntax)


def _by_pydicom(dataset: Dataset, syntax: UID) -> npt.NDArray[Any]:
    """Decode with pydicom: by itself, or by the plug-in that was set."""
    try:
        return np.asarray(dataset.pixel_array)
    except Exception:  # each decoder has its own errors, and their texts run over many lines
        name = syntax.name if syntax.name != str(syntax) else "unknown transfer syntax"
        text = f"no decoder reads its pixel data ({name})"
        if syntax in UNCOMPRESSED:
            text = "has fewer pixel data than its header says"
        raise Undecodable("corrupt", text) from None


def _render(dataset: Dataset, stored: npt.NDArray[Any]) -> Picture:
    """Turn stored values into grey: the rules act on the levels, and the picture is looked up."""
    low, high = int(stored.min()), int(stored.max())
    if stored.dtype == np.uint8:
        low = 0  # spares the commonest pictures a subtraction
    levels = np.arange(low, high + 1, dtype=np.float64)
    shifted = stored.astype(np.int32) - low if low else stored
    with np.errstate(all="ignore"):  # a rescale may overflow; that is caught here, not printed
        values = lut.modality(dataset, levels)
        shown = lut.voi(dataset, values)
        if shown is None:
            shown = lut.whole_range(
                dataset, levels, values, lambda: np.bincount(shifted.ravel(), minlength=levels.size)
            )
    if not np.isfinite(values).all() or not np.isfinite(shown).all():
        raise Undecodable("corrupt", "its rescale or window leads beyond all numbers")
    grey = np.floor(shown * 255 + 0.5).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    if stored.dtype == np.uint8 and np.array_equal(grey, np.arange(grey.size)):  # RSNA's files: nothing to look up
        return np.ascontiguousarray(stored)
    return grey[shifted]

"""The pictures to answer: found in files and folders, and read whatever of the known formats they have."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from pneumo.data import codestream
from pneumo.data.dicom import LONGEST_SIDE, RADIOGRAPHS, Undecodable, read_grey
from pneumo.data.opencv import cv2
from pneumo.errors import Refused

Picture = npt.NDArray[np.uint8]

SUFFIXES: Final = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
_PNG, _PNG_END, _JPEG = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82", b"\xff\xd8\xff"


def find(paths: Iterable[Path]) -> list[Path]:
    """Return the files that are meant: those named, and of folders, in their order, all pictures below them, sorted.

    What a folder holds beside pictures is passed over; files without a suffix count where they begin as DICOM does. A
    file that is named is there also where it does not exist: reading it will say so. Raises Refused where none is left.
    """
    found: list[Path] = []
    for path in paths:
        found.extend(sorted(_below(path)) if path.is_dir() else [path])
    if not found:
        raise Refused("The folders hold no DICOM, PNG or JPEG files; name others.")
    return found


def _below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if path.suffix.lower() in SUFFIXES or (not path.suffix and _is_dicom(path)):
                yield path


def _is_dicom(path: Path) -> bool:
    try:
        if not path.is_file():  # looked at before it is opened, which for a pipe would last for ever
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read(path: Path) -> Picture:
    """Return the grey picture of a DICOM, PNG or JPEG file, known by its content: uint8 (rows, columns).

    Raises Undecodable, in whose text no header value is.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Undecodable("corrupt", "is no file, but a pipe, a socket or a device")
        with path.open("rb") as file:
            begin = file.read(8)
        if begin != _PNG and not begin.startswith(_JPEG):
            return read_grey(path, RADIOGRAPHS)[0]
        return _decode(path.read_bytes())
    except OSError as error:
        raise Undecodable("corrupt", f"cannot be read: {os.strerror(error.errno or 0).lower()}") from None


def _decode(content: bytes) -> Picture:
    """Decode a PNG or JPEG that is whole: decoders fill up what is missing and say nothing."""
    if content.startswith(_PNG):
        whole = _PNG_END in content
    else:
        try:
            codestream.examine(content)
            whole = True
        except codestream.Damaged:
            whole = False
    if not whole:
        raise Undecodable("corrupt", "is cut short or damaged")
    try:
        grey = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        grey = None
    if grey is None:
        raise Undecodable("corrupt", "cannot be decoded")
    if max(grey.shape) > LONGEST_SIDE:
        raise Undecodable("corrupt", f"is larger than {LONGEST_SIDE} pixels on a side")
    return np.asarray(grey, np.uint8)

"""What a compressed picture says of itself, and whether it is whole, before a decoder is let near it.

Decoders fill up what is missing and say nothing, and gdcm ends the whole process ("terminate called", or a segmentation
fault) where marker segments of a JPEG are damaged. So their chain is walked here first: ITU T.81 (JPEG) B.1 and B.2,
T.87 (JPEG-LS) C.1 and C.2, T.800 (JPEG 2000) A.5.1. Damage inside of the coded data that leaves the chain intact cannot
be seen this way, nor in any other short of decoding.
"""

import re
import struct
from dataclasses import dataclass
from typing import Final

SOI, EOI, SOS, SIZ = 0xD8, 0xD9, 0xDA, 0x51
SOF_LS: Final = 0xF7
SOF_JPEG: Final = (0xC0, 0xC1, 0xC2, 0xC3)
"""Baseline, extended and progressive (Huffman), and lossless."""

OTHERS: Final = frozenset((0xC4, 0xDB, 0xDC, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0)))
"""Tables, restart intervals, comments and application data: what a chain may also hold."""

PADDING: Final = b"\0\xff"
"""DICOM makes lengths even; some writers do so with FF."""

# In coded data FF is followed by 00 or a restart marker, in JPEG-LS by a byte below 80: anything else is a marker.
_NEXT_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_NEXT_MARKER_LS: Final = re.compile(rb"\xff[\x80-\xff]")


class Damaged(ValueError):  # noqa: N818 -- a finding about a file
    """The code stream is cut short, or not one."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a code stream says of itself: bits of a sample, size in pixels, samples of a pixel, its frame marker."""

    bits: int
    rows: int
    columns: int
    components: int
    marker: int


def examine(stream: bytes) -> Frame:
    """Return what a JPEG, JPEG-LS or JPEG 2000 code stream says of itself; Damaged if it is not whole."""
    try:
        return _jpeg_2000(stream) if stream[:4] == b"\xff\x4f\xff\x51" else _jpeg(stream)
    except (struct.error, IndexError):
        raise Damaged from None


def _jpeg_2000(stream: bytes) -> Frame:
    if not stream.rstrip(PADDING).endswith(bytes((0xFF, EOI))):
        raise Damaged
    right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
    components, bits = struct.unpack_from(">HB", stream, 40)
    return Frame((bits & 0x7F) + 1, bottom - top, right - left, components, SIZ)


def _jpeg(stream: bytes) -> Frame:
    """Walk the chain of segments from the start of the image to its end."""
    if stream[:2] != bytes((0xFF, SOI)):
        raise Damaged
    frame, scans, at = None, 0, 2
    while True:
        if stream[at] != 0xFF:
            raise Damaged
        while stream[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = stream[at + 1]
        if marker == EOI:
            break
        (length,) = struct.unpack_from(">H", stream, at + 2)
        if length < 2 or at + 2 + length > len(stream):
            raise Damaged
        if marker == SOF_LS or marker in SOF_JPEG:
            if frame is not None:
                raise Damaged
            bits, rows, columns, components = struct.unpack_from(">BHHB", stream, at + 4)
            frame = Frame(bits, rows, columns, components, marker)
        elif marker != SOS and marker not in OTHERS:
            raise Damaged
        at += 2 + length
        if marker == SOS:
            scans += 1
            found = (_NEXT_MARKER_LS if frame and frame.marker == SOF_LS else _NEXT_MARKER).search(stream, at)
            if frame is None or found is None:
                raise Damaged
            at = found.start()
    if frame is None or not scans or stream[at + 2 :].strip(PADDING):
        raise Damaged
    return frame

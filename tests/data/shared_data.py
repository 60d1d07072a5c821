"""Finds the folder of real radiographs that tests share, and makes small DICOM files of known content."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

ROOT = Path(os.environ.get("PNEUMO_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")

needs_radiographs = pytest.mark.skipif(
    not (ROOT / "dicom_derived").is_dir(),
    reason="the shared radiographs are absent (PNEUMO_SHARED_DATA, or ../shared/data beside the project)",
)


def radiographs(pattern: str = "dicom*/*.dcm") -> list[Path]:
    """Return the shared DICOM files that fit, sorted; none where the folder is absent."""
    return sorted(ROOT.glob(pattern))


def make_dicom(pixels: np.ndarray[Any, Any], *, bits: int | None = None, **elements: Any) -> Dataset:
    """Return an uncompressed data set that shows these pixels (uint8, int8, uint16 or int16), with more elements."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CR", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    """Write a data set as a DICOM file and return its path."""
    dataset.save_as(path, enforce_file_format=True)
    return path

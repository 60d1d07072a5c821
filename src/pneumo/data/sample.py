"""The built-in sample: generated chest X-rays in the RSNA challenge's layout, as real DICOM files and CSV tables.

No picture or table of the challenge is in it. Files follow the challenge's element by element, its departures from the
standard included (an age without a unit, decimal strings of 19 characters), so that a reader meets them here.
Everything about a patient comes from (seed, index) alone: any split of the range of indices writes the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom import config as pydicom_config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import UID, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo.data.anatomy import Looks, Opacity, draw
from pneumo.data.opencv import cv2
from pneumo.data.patients import ABNORMAL, OPACITY, Person, SampleConfig, person, stream

__all__ = ["SampleConfig", "picture", "plan", "write_patients", "write_tables"]

IMAGES = "stage_2_train_images"
LABELS = "stage_2_train_labels.csv"
DETAILED = "stage_2_detailed_class_info.csv"

_JPEG_QUALITY = 92
# Difficulty comes from cases that cannot be told apart, as among real readers: opacities that are hardly visible, and
# shadows like an opacity's in patients whose label says no. Together they bound the accuracy at about 95 %.
_SUBTLE, _MIMIC = 0.04, 0.09
_CLEAR_STRENGTH, _SUBTLE_STRENGTH = (0.8, 1.1), (0.05, 0.14)
_FINDINGS = {"large_heart": 0.35, "nodule": 0.25, "blunt_angle": 0.2, "device": 0.25}
_DCMTK = "1.2.276.0.7230010.3"  # the root under which the challenge's files were written


def plan(config: SampleConfig) -> list[str]:
    """Return the patients' ids in the order of the tables: random version 4 UUIDs, not sorted."""
    return [person(config, index).patient_id for index in range(config.patients)]


def write_patients(root: Path, config: SampleConfig, begin: int, end: int) -> None:
    """Write the DICOM files of the patients with index begin to end - 1 into root/stage_2_train_images.

    The files do not depend on how a range is split. They are written in place: a caller that may be killed writes into
    a folder of its own and renames it. Raises OSError where a file cannot be written.
    """
    folder = root / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(begin, min(end, config.patients)):
        who = person(config, index)
        dataset = _dataset(config, index, who, picture(config, index))
        dataset.save_as(folder / f"{who.patient_id}.dcm", enforce_file_format=True)


def write_tables(root: Path, config: SampleConfig) -> None:
    """Write the label table and the table of detailed classes (a row for each row of labels) into root.

    Coordinates are whole pixels written with one decimal, and empty for negatives, as the challenge's. Raises OSError
    where a file cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    labels, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for index in range(config.patients):
        who = person(config, index)
        rows = [",".join(f"{value:.1f}" for value in box) + ",1" for box in who.boxes] or [",,,,0"]
        labels += [f"{who.patient_id},{row}" for row in rows]
        classes += [f"{who.patient_id},{who.detailed}"] * len(rows)
    (root / LABELS).write_text("\n".join(labels) + "\n", encoding="utf-8", newline="\n")
    (root / DETAILED).write_text("\n".join(classes) + "\n", encoding="utf-8", newline="\n")


def picture(config: SampleConfig, index: int) -> np.ndarray:
    """Draw the picture of the patient with this index: uint8 (size, size), before JPEG."""
    who, rng = person(config, index), stream(config, index, 1)
    sites = [(x / config.size, y / config.size, w / config.size, h / config.size) for x, y, w, h in who.sites]
    low, high, shadowed = 0.0, 0.0, False
    if who.detailed == OPACITY:
        shadowed = True
        low, high = _SUBTLE_STRENGTH if rng.random() < _SUBTLE else _CLEAR_STRENGTH
    elif who.detailed == ABNORMAL:
        shadowed = bool(rng.random() < _MIMIC)
        low, high = _CLEAR_STRENGTH
    opacities = [Opacity(site, rng.uniform(low, high)) for site in sites] if shadowed else []
    found = {name: bool(rng.random() < share) and who.detailed == ABNORMAL for name, share in _FINDINGS.items()}
    return draw(rng, config.size, sites, opacities, Looks(view=who.view, sex=who.sex, **found))


def _dataset(config: SampleConfig, index: int, who: Person, pixels: np.ndarray) -> Dataset:
    dataset = Dataset()
    unique = _unique(config, index)
    for tag, vr, value in _elements(who, unique, pixels):
        # Elements that skip validation one by one: pydicom's global setting for it is not thread-safe.
        dataset.add(DataElement(Tag(tag), vr, value, validation_mode=pydicom_config.IGNORE))
    dataset["PixelData"].is_undefined_length = True
    meta = dataset.file_meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    meta.ImplementationClassUID = UID(f"{_DCMTK}.0.3.6.0")
    meta.ImplementationVersionName = "OFFIS_DCMTK_360"
    return dataset


def _unique(config: SampleConfig, index: int) -> tuple[str, str, str]:
    """Return the SOP instance's, the study's and the series' UID: process, seconds and a running number, as DCMTK's."""
    rng = stream(config, index, 3)
    process, second, number = int(rng.integers(1000, 32768)), 1_517_874_300 + index, int(rng.integers(100_000, 999_990))
    instance, study, series = (f"{_DCMTK}.1.{kind}.8323329.{process}.{second}." for kind in (4, 2, 3))
    return f"{instance}{number + 2}", f"{study}{number + 1}", f"{series}{number}"


def _elements(who: Person, unique: tuple[str, str, str], pixels: np.ndarray) -> Iterator[tuple[int, str, object]]:
    """Yield tag, value representation and value of every element of the challenge's files, in their order."""
    done, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done, "cv2 encodes every 8-bit picture"
    rows, columns = pixels.shape
    yield 0x00080005, "CS", "ISO_IR 100"
    yield 0x00080016, "UI", SecondaryCaptureImageStorage
    yield 0x00080018, "UI", unique[0]
    yield 0x00080020, "DA", "19010101"
    yield 0x00080030, "TM", "000000.00"
    yield 0x00080050, "SH", ""
    yield 0x00080060, "CS", "CR"
    yield 0x00080064, "CS", "WSD"
    yield 0x00080090, "PN", ""
    yield 0x0008103E, "LO", f"view: {who.view}"
    yield 0x00100010, "PN", who.patient_id
    yield 0x00100020, "LO", who.patient_id
    yield 0x00100030, "DA", ""
    yield 0x00100040, "CS", who.sex
    yield 0x00101010, "AS", who.age
    yield 0x00180015, "CS", "CHEST"
    yield 0x00185101, "CS", who.view
    yield 0x0020000D, "UI", unique[1]
    yield 0x0020000E, "UI", unique[2]
    yield 0x00200010, "SH", ""
    yield 0x00200011, "IS", "1"
    yield 0x00200013, "IS", "1"
    yield 0x00200020, "CS", ""
    yield 0x00280002, "US", 1
    yield 0x00280004, "CS", "MONOCHROME2"
    yield 0x00280010, "US", rows
    yield 0x00280011, "US", columns
    yield 0x00280030, "DS", [who.spacing, who.spacing]
    yield 0x00280100, "US", 8
    yield 0x00280101, "US", 8
    yield 0x00280102, "US", 7
    yield 0x00280103, "US", 0
    yield 0x00282110, "CS", "01"
    yield 0x00282114, "CS", "ISO_10918_1"
    yield 0x7FE00010, "OB", encapsulate([jpeg.tobytes()], has_bot=False)

"""What a patient's file turns out to be: sound with its pictures, or refused with a reason."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import RLELossless
from shared_data import make_dicom, needs_radiographs, radiographs, save

from pneumo.data.dicom import read_grey, resize
from pneumo.data.inspect import Inspection, find_duplicates, inspect
from pneumo.data.rsna import REASONS, Patient

PIXELS = np.random.default_rng(1).integers(0, 256, (64, 64)).astype(np.uint8)


def patient(path: Path, *boxes: tuple[float, float, float, float], name: str = "p") -> Patient:
    return Patient(name, int(bool(boxes)), None, boxes, path)


def test_a_sound_file_gives_its_pictures_and_statistics(tmp_path: Path) -> None:
    dataset = make_dicom(PIXELS, PatientSex="F", PatientAge="073Y", ViewPosition="AP", PatientName="Doe^Jane")
    seen, pictures = inspect(patient(save(dataset, tmp_path / "p.dcm"), (0, 0, 64, 64)), (16, 64, 128))
    assert (seen.reason, seen.detail, seen.sex, seen.age, seen.view) == (None, "", "F", 73, "AP")
    assert (seen.rows, seen.columns) == PIXELS.shape
    assert {size: picture.shape for size, picture in pictures.items()} == {16: (16, 16), 64: (64, 64), 128: (128, 128)}
    assert np.array_equal(pictures[64], PIXELS)
    assert "Doe" not in repr(seen)


@pytest.mark.parametrize("box", [(-1, 0, 9, 9), (0, -0.5, 9, 9), (60, 0, 4.5, 9), (0, 1, 9, 64), (900, 900, 40, 40)])
def test_boxes_that_leave_the_picture(box: tuple[float, float, float, float], tmp_path: Path) -> None:
    path = save(make_dicom(PIXELS), tmp_path / "p.dcm")
    seen, pictures = inspect(patient(path, (1, 1, 5, 5), box), (16,))
    assert (seen.reason, pictures) == ("box_outside", {})
    assert "64 x 64" in seen.detail


def test_wrong_modality_and_what_cannot_be_read(tmp_path: Path) -> None:
    seen, pictures = inspect(patient(save(make_dicom(PIXELS, Modality="MR"), tmp_path / "p.dcm")), (16,))
    assert (seen.reason, pictures) == ("wrong_modality", {})
    path = save(make_dicom(PIXELS), tmp_path / "q.dcm")
    for content in (path.read_bytes()[:700], b"text\n" * 100, b""):
        path.write_bytes(content)
        seen, pictures = inspect(patient(path), (16,))
        assert (seen.reason, seen.rows, pictures) == ("corrupt", 0, {})
    assert inspect(patient(tmp_path / "none.dcm"), (16,))[0].reason == "corrupt"


def test_equal_pictures_have_equal_digests_however_they_are_stored(tmp_path: Path) -> None:
    plain = inspect(patient(save(make_dicom(PIXELS), tmp_path / "a.dcm")), ())[0]
    dataset = make_dicom(PIXELS, PatientAge="12")
    dataset.compress(RLELossless)
    packed = inspect(patient(save(dataset, tmp_path / "b.dcm")), ())[0]
    inverse = make_dicom(255 - PIXELS, PhotometricInterpretation="MONOCHROME1")
    assert plain.digest == packed.digest == inspect(patient(save(inverse, tmp_path / "c.dcm")), ())[0].digest
    other = PIXELS.copy()
    other[63, 63] ^= 1
    assert inspect(patient(save(make_dicom(other), tmp_path / "d.dcm")), ())[0].digest != plain.digest
    flat = [make_dicom(np.zeros(shape, np.uint8)) for shape in ((4, 16), (16, 4), (8, 8))]
    assert len({inspect(patient(save(one, tmp_path / "e.dcm")), ())[0].digest for one in flat}) == 3


def test_of_duplicates_the_first_sound_one_is_kept() -> None:
    one = Inspection("a", None, "", None, None, None, 8, 8, "x")
    several = [
        dataclasses.replace(one, patient_id="spoiled", reason="box_outside"),
        one,
        dataclasses.replace(one, patient_id="b", digest="y"),
        dataclasses.replace(one, patient_id="c"),
        dataclasses.replace(one, patient_id="d"),
        dataclasses.replace(one, patient_id="no picture", reason="corrupt", digest=""),
    ]
    assert find_duplicates(several) == {"c": "a", "d": "a"}
    assert find_duplicates([]) == {}


@needs_radiographs
@pytest.mark.parametrize("path", [p for p in radiographs() if p.stat().st_size < 6e5], ids=lambda path: path.stem)
def test_every_real_file_is_sound_or_has_a_reason(path: Path) -> None:
    seen, pictures = inspect(patient(path), (128,))
    if seen.reason is None:
        assert np.array_equal(pictures[128], resize(read_grey(path)[0], 128))
        assert len(seen.digest) == 32
    else:
        assert seen.reason in REASONS
        assert "no_pixels" in path.name or "extended" in path.name
        assert not pictures


@needs_radiographs
def test_encodings_of_one_real_picture_are_duplicates() -> None:
    files = radiographs("dicom_derived/same512_*.dcm")
    seen = [inspect(patient(path, name=path.stem), ())[0] for path in files]
    assert find_duplicates(seen) == {path.stem: files[0].stem for path in files[1:]}

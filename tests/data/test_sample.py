"""The sample's files are RSNA's: element by element, table by table, and the same however the work is split."""

import uuid
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from pneumo.data.patients import ABNORMAL, NORMAL, OPACITY, Box, Person, person
from pneumo.data.sample import SampleConfig, picture, plan, write_patients, write_tables
from pneumo.errors import Refused

CONFIG = SampleConfig(patients=6, seed=4, size=256)
ELEMENTS = (
    "SpecificCharacterSet SOPClassUID SOPInstanceUID StudyDate StudyTime AccessionNumber Modality ConversionType "
    "ReferringPhysicianName SeriesDescription PatientName PatientID PatientBirthDate PatientSex PatientAge "
    "BodyPartExamined ViewPosition StudyInstanceUID SeriesInstanceUID StudyID SeriesNumber InstanceNumber "
    "PatientOrientation SamplesPerPixel PhotometricInterpretation Rows Columns PixelSpacing BitsAllocated "
    "BitsStored HighBit PixelRepresentation LossyImageCompression LossyImageCompressionMethod PixelData"
)


VALUES = {
    "SpecificCharacterSet": "ISO_IR 100",
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7",
    "StudyDate": "19010101",
    "StudyTime": "000000.00",
    "AccessionNumber": "",
    "Modality": "CR",
    "ConversionType": "WSD",
    "ReferringPhysicianName": "",
    "PatientBirthDate": "",
    "BodyPartExamined": "CHEST",
    "StudyID": "",
    "SeriesNumber": "1",
    "InstanceNumber": "1",
    "SamplesPerPixel": "1",
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": "8",
    "BitsStored": "8",
    "HighBit": "7",
    "PixelRepresentation": "0",
    "LossyImageCompression": "01",
    "LossyImageCompressionMethod": "ISO_10918_1",
}


def _left(box: Box) -> bool:
    return box[0] + box[2] / 2 < 512


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return [person(SampleConfig(seed=5), index) for index in range(6000)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample")
    write_tables(root, CONFIG)
    write_patients(root, CONFIG, 0, CONFIG.patients)
    return root


def test_headers_have_the_challenges_elements_in_order(sample: Path) -> None:
    for path in sorted((sample / "stage_2_train_images").glob("*.dcm")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
            assert [element.keyword for element in dataset] == ELEMENTS.split()
            assert dataset.PatientID == path.stem == str(dataset.PatientName)
            assert dataset.PatientAge.isdigit()
            assert dataset.SeriesDescription == f"view: {dataset.ViewPosition}"
            assert dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"
            assert dataset.pixel_array.shape == (256, 256)
            assert dataset.pixel_array.std() > 20


def test_any_split_of_the_range_writes_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    for begin, end in ((4, 6), (0, 1), (1, 4)):
        write_patients(tmp_path, CONFIG, begin, end)
    for path in sorted((sample / "stage_2_train_images").iterdir()):
        assert path.read_bytes() == (tmp_path / "stage_2_train_images" / path.name).read_bytes()


def test_tables_have_the_challenges_form(tmp_path: Path) -> None:
    config = SampleConfig(patients=800, seed=1)
    write_tables(tmp_path, config)
    labels = pd.read_csv(tmp_path / "stage_2_train_labels.csv")
    classes = pd.read_csv(tmp_path / "stage_2_detailed_class_info.csv")
    assert list(labels) == ["patientId", "x", "y", "width", "height", "Target"]
    assert labels["patientId"].tolist() == classes["patientId"].tolist()
    assert list(dict.fromkeys(labels["patientId"])) == plan(config)
    boxes = labels[labels["Target"] == 1]
    assert (boxes[["x", "y"]].min() >= 0).all()
    assert (boxes["x"] + boxes["width"]).max() <= 1024
    assert (boxes["y"] + boxes["height"]).max() <= 1024
    assert labels.groupby("patientId")["Target"].first().mean() == pytest.approx(0.5, abs=0.01)
    counts = boxes.groupby("patientId").size().value_counts(normalize=True)
    assert counts[1] == pytest.approx(2614 / 6012, abs=0.08)
    assert counts[2] == pytest.approx(3266 / 6012, abs=0.08)
    assert boxes["width"].median() == pytest.approx(217, rel=0.15)
    assert boxes["height"].median() == pytest.approx(298, rel=0.2)
    text = (tmp_path / "stage_2_train_labels.csv").read_text().splitlines()
    assert all(line.endswith(",,,,,0") or line.count(".0,") == 4 for line in text[1:])


def test_headers_have_the_challenges_values(sample: Path) -> None:
    spacings = {"0.14300000000000002", "0.168", "0.139", "0.171", "0.19431099999999998"}
    for index, patient in enumerate(plan(CONFIG)):
        path = sample / "stage_2_train_images" / f"{patient}.dcm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
            found = {name: "" if dataset[name].is_empty else str(dataset[name].value) for name in VALUES}
            assert found == VALUES
            who = person(CONFIG, index)
            assert (dataset.PatientSex, dataset.PatientAge, dataset.ViewPosition) == (who.sex, who.age, who.view)
            assert [spacing.original_string for spacing in dataset.PixelSpacing] == [who.spacing] * 2
            assert who.spacing in spacings
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        parts = dataset.SOPInstanceUID.split(".")
        assert ".".join(parts[:9]) == "1.2.276.0.7230010.3.1.4.8323329"
        assert len(parts) == 12
        # What JPEG has changed is below what a reader would see.
        assert np.abs(dataset.pixel_array.astype(int) - picture(CONFIG, index)).mean() < 3


def test_writing_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_patients(tmp_path, CONFIG, 0, 2)
    assert len(list(tmp_path.rglob("*.dcm"))) == 2


def test_samples_of_a_seed_are_nested_and_of_another_differ() -> None:
    assert plan(SampleConfig(patients=40, seed=2))[:15] == plan(SampleConfig(patients=15, seed=2))
    assert not set(plan(SampleConfig(patients=40, seed=2))) & set(plan(SampleConfig(patients=40, seed=3)))


def test_ids_are_random_and_unsorted(people: list[Person]) -> None:
    ids = [who.patient_id for who in people]
    assert len(set(ids)) == len(ids)
    assert all(str(uuid.UUID(each)) == each and uuid.UUID(each).version == 4 for each in ids)
    assert ids != sorted(ids)


def test_classes_views_sexes_and_ages_are_the_challenges(people: list[Person]) -> None:
    classes = pd.Series([who.detailed for who in people]).value_counts(normalize=True)
    assert classes[OPACITY] == 0.5
    assert classes[NORMAL] / classes[ABNORMAL] == pytest.approx(8851 / 11821, rel=0.1)
    anterior = [who.view == "AP" for who in people]
    positive = np.array([who.detailed == OPACITY for who in people])
    assert np.mean(np.array(anterior)[positive]) == pytest.approx(0.38 * 12173 / 6012, abs=0.03)
    assert np.mean(np.array(anterior)[~positive]) == pytest.approx(0.62 * 12173 / 20672, abs=0.03)
    assert np.mean([who.sex == "M" for who in people]) == pytest.approx(15166 / 26684, abs=0.03)
    assert np.median([int(who.age) for who in people]) == pytest.approx(49, abs=1)


def test_boxes_have_the_challenges_number_size_and_side(people: list[Person]) -> None:
    patients = [who.boxes for who in people if who.detailed == OPACITY]
    assert not any(who.boxes for who in people if who.detailed != OPACITY)
    counts = np.bincount([len(boxes) for boxes in patients], minlength=5) / len(patients)
    assert counts == pytest.approx(np.array([0, 2614, 3266, 119, 13]) / 6012, abs=0.03)
    boxes = np.array([box for of_patient in patients for box in of_patient])
    measured = np.percentile(boxes, [25, 50, 75], axis=0)
    challenge = np.array([[207, 249, 177, 203], [324, 365, 217, 298], [594, 478, 259, 438]])
    assert measured == pytest.approx(challenge, rel=0.08)
    # The sampling error of a first percentile of x is about 8 pixels here.
    assert np.percentile(boxes, 1, axis=0) == pytest.approx(np.array([65, 79, 95, 83]), abs=25)
    assert np.percentile(boxes, 99, axis=0) == pytest.approx(np.array([739, 696, 363, 719]), rel=0.06)
    area = boxes[:, 2] * boxes[:, 3] / 1024**2
    assert np.percentile(area, [50, 95]) == pytest.approx([0.062, 0.17], rel=0.15)
    assert np.median(boxes[:, 3] / boxes[:, 2]) == pytest.approx(1.45, rel=0.1)
    assert np.mean([_left(each[0]) for each in patients if len(each) == 1]) == pytest.approx(0.62, abs=0.04)
    assert np.mean([_left(a) != _left(b) for a, b in (p for p in patients if len(p) == 2)]) > 0.95


def test_boxes_of_a_patient_do_not_overlap(people: list[Person]) -> None:
    for who in people:
        for k, (x, y, w, h) in enumerate(who.boxes):
            assert 0 <= x < x + w <= 1024
            assert 0 <= y < y + h <= 1024
            for a, b, c, d in who.boxes[:k]:
                assert min(x + w, a + c) <= max(x, a) or min(y + h, b + d) <= max(y, b)


def test_opacities_are_brighter_than_the_same_place_without_one() -> None:
    # The same place across patients: inside boxes against the mean picture of negatives.
    config = SampleConfig(patients=60, seed=0, size=128)
    pictures = np.stack([picture(config, index) for index in range(config.patients)]).astype(float)
    who = [person(config, index) for index in range(config.patients)]
    healthy = pictures[[each.detailed == NORMAL for each in who]].mean(axis=0)
    differences = [
        (pictures[k] - healthy)[int(y) : int(y + h), int(x) : int(x + w)].mean()
        for k, each in enumerate(who)
        for x, y, w, h in each.boxes
    ]
    assert np.mean(differences) > 20


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"seed": -1}, {"size": 32}, {"size": 2048}])
def test_what_cannot_be_generated_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(Refused):
        SampleConfig(**wrong)

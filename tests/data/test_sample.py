"""The sample's files are RSNA's: element by element, table by table, and the same however the work is split."""

import warnings
from pathlib import Path

import pandas as pd
import pydicom
import pytest

from pneumo.data.sample import SampleConfig, plan, write_patients, write_tables

CONFIG = SampleConfig(patients=6, seed=4, size=256)
ELEMENTS = (
    "SpecificCharacterSet SOPClassUID SOPInstanceUID StudyDate StudyTime AccessionNumber Modality ConversionType "
    "ReferringPhysicianName SeriesDescription PatientName PatientID PatientBirthDate PatientSex PatientAge "
    "BodyPartExamined ViewPosition StudyInstanceUID SeriesInstanceUID StudyID SeriesNumber InstanceNumber "
    "PatientOrientation SamplesPerPixel PhotometricInterpretation Rows Columns PixelSpacing BitsAllocated "
    "BitsStored HighBit PixelRepresentation LossyImageCompression LossyImageCompressionMethod PixelData"
)


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

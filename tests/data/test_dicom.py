"""Real and made DICOM files against what pydicom, and files that show one and the same picture, say of them."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless
from shared_data import make_dicom, needs_radiographs, radiographs, save

from pneumo.data import codestream, lut
from pneumo.data.dicom import RADIOGRAPHS, Undecodable, parse_age, read_grey, resize

pytestmark = pytest.mark.filterwarnings("ignore:End of file reached:UserWarning", "ignore:overflow encountered in exp")

BAD = {"fodicom_chest_cr_japanese_no_pixels", "nema_rg3_leg_jpeg_extended_mono1_10bit"}
GOOD = [path for path in radiographs() if path.stem not in BAD]
COMPRESSED = [path for path in GOOD if any(word in path.stem for word in ("jpeg", "j2k"))]


def grey(name: str) -> np.ndarray:
    return read_grey(radiographs(f"*/{name}.dcm")[0])[0].astype(int)


def refused(path: Path) -> Undecodable:
    with pytest.raises(Undecodable) as caught:
        read_grey(path, RADIOGRAPHS)
    assert "\n" not in caught.value.detail
    assert str(path.parent) not in caught.value.detail
    return caught.value


def shown_by_pydicom(dataset: Dataset, pixels: np.ndarray, range_: tuple[float, float]) -> np.ndarray:
    """Return the grey values of pydicom's own LUT functions, whose output spans `range_`."""
    values = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset).astype(float)
    shown = (values - range_[0]) / (range_[1] - range_[0]) * 255
    return 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


@needs_radiographs
@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_every_real_file_gives_a_picture(path: Path) -> None:
    picture, header = read_grey(path, RADIOGRAPHS)
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    assert picture.dtype == np.uint8
    assert picture.shape == (dataset.Rows, dataset.Columns) == (header.rows, header.columns)
    assert picture.std() > 5
    assert header.modality == dataset.Modality
    assert np.array_equal(picture, read_grey(path)[0])


@needs_radiographs
def test_same_picture_in_eight_encodings_is_exactly_equal() -> None:
    pictures = [read_grey(path)[0] for path in radiographs("dicom_derived/same512_*.dcm")]
    assert len(pictures) == 8
    stored = pydicom.dcmread(radiographs("dicom_derived/same512_explicit_le.dcm")[0]).pixel_array
    for picture in pictures:
        assert np.array_equal(picture, stored)


@needs_radiographs
@pytest.mark.parametrize("name", ["rule512_mono1_12bit", "rule512_signed16_rescale"])
def test_window_rescale_and_inversion_give_the_same_picture_within_a_grey_level(name: str) -> None:
    assert np.abs(grey(name) - grey("same512_explicit_le")).max() <= 1


@needs_radiographs
def test_jpeg_baseline_is_near_its_source_and_mono1_its_inverse() -> None:
    source = grey("nih_chest_dx_implicit_8bit")
    assert np.abs(grey("rsna_layout_jpeg_baseline_1024") - source).mean() < 1
    assert np.abs(grey("jpeg_baseline_mono1_1024") - source).mean() < 1
    assert np.abs(grey("rsna_layout_jpeg_baseline_512") - grey("same512_rle")).mean() < 1.5


@needs_radiographs
def test_lossless_codecs_agree_on_the_leg_and_near_lossless_ones_on_the_chest() -> None:
    legs = [
        grey(f"nema_rg3_leg_{kind}_mono1_10bit") for kind in ("j2k_lossless", "jpegls_lossless", "jpeg_lossless", "rle")
    ]
    assert all(np.array_equal(leg, legs[0]) for leg in legs)
    chests = [grey(f"nema_rg1_chest_{kind}_mono1_15bit") for kind in ("j2k_lossy", "jpegls_near")]
    assert np.abs(chests[0] - chests[1]).max() <= 3


@needs_radiographs
@pytest.mark.parametrize(
    "path",
    [p for p in GOOD if "WindowWidth" in pydicom.dcmread(p, stop_before_pixels=True)],
    ids=lambda path: path.stem,
)
def test_windows_of_real_files_agree_with_pydicom(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    high = 2.0**dataset.BitsStored - 1
    low = 0.0
    if "RescaleSlope" in dataset:  # pydicom then spans the rescaled range
        if dataset.PixelRepresentation:
            low, high = -(2.0 ** (dataset.BitsStored - 1)), 2.0 ** (dataset.BitsStored - 1) - 1
        low, high = (float(v * dataset.RescaleSlope + dataset.RescaleIntercept) for v in (low, high))
    expected = shown_by_pydicom(dataset, dataset.pixel_array, (low, high))
    assert np.abs(read_grey(path)[0] - expected).max() <= 0.51


@needs_radiographs
def test_modality_lut_of_a_real_file_orders_the_pixels_as_pydicom_does() -> None:
    path = radiographs("dicom/fodicom_teeth*.dcm")[0]
    dataset = pydicom.dcmread(path)
    values = apply_modality_lut(dataset.pixel_array, dataset).astype(float)
    low, high = np.quantile(values, [0.005, 0.995], method="inverted_cdf")
    expected = 255 - np.clip((values - low) / (high - low), 0, 1) * 255
    assert np.abs(read_grey(path)[0] - expected).max() <= 0.51


@needs_radiographs
def test_real_bad_files_are_refused_without_a_word_of_their_headers() -> None:
    no_pixels = refused(radiographs("dicom/fodicom_chest_cr_japanese_no_pixels.dcm")[0])
    assert (no_pixels.reason, no_pixels.detail) == ("corrupt", "has no pixel data, or ends too early")
    twelve_bit = refused(radiographs("dicom/nema_rg3_leg_jpeg_extended_mono1_10bit.dcm")[0])
    assert twelve_bit.reason == "corrupt"
    assert "JPEG Extended" in twelve_bit.detail


@needs_radiographs
@pytest.mark.parametrize("path", [p for p in GOOD if p.stat().st_size < 9e5], ids=lambda path: path.stem)
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_truncated_files_are_corrupt(path: Path, part: float, tmp_path: Path) -> None:
    content = path.read_bytes()
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(content[: int(len(content) * part)])
    assert refused(cut).reason == "corrupt"


@needs_radiographs
@pytest.mark.parametrize("path", [p for p in COMPRESSED if p.stat().st_size < 9e5], ids=lambda path: path.stem)
@pytest.mark.parametrize("keep", [10, 700, 0.5, -3])
def test_a_picture_cut_short_inside_a_sound_file_is_corrupt(path: Path, keep: float, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(path)
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
    stream = stream[: int(len(stream) * keep) if isinstance(keep, float) else keep]
    dataset.PixelData = encapsulate([stream])
    assert refused(save(dataset, tmp_path / "cut.dcm")).reason == "corrupt"


@needs_radiographs
@pytest.mark.parametrize("path", radiographs("dicom_derived/*512*j*.dcm"), ids=lambda path: path.stem)
def test_damaged_code_streams_end_in_a_picture_or_a_reason_never_in_a_crash(path: Path, tmp_path: Path) -> None:
    """gdcm ends the process over some damage, so this runs in a process of its own."""
    code = """
import random, sys, pathlib, pydicom
from pydicom.encaps import encapsulate, get_frame
from pneumo.data.dicom import Undecodable, quiet_decoders, read_grey
source, target = map(pathlib.Path, sys.argv[1:])
dataset, seen, chance = pydicom.dcmread(source), set(), random.Random(5)
stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
for _ in range(40):
    damaged = bytearray(stream)
    for _ in range(chance.choice((1, 2, 10))):
        damaged[chance.randrange(2, chance.choice((60, 200, len(damaged))))] = chance.choice((0, 255, 18, 202))
    dataset.PixelData = encapsulate([bytes(damaged)])
    dataset.save_as(target)
    try:
        with quiet_decoders():
            read_grey(target)
    except Undecodable as why:
        seen.add(why.reason)
print(*seen)
"""
    run = [sys.executable, "-c", code, str(path), str(tmp_path / "damaged.dcm")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "corrupt", "")


@needs_radiographs
def test_reading_real_files_prints_nothing(tmp_path: Path) -> None:
    code = "import sys\nfrom pneumo.data.dicom import read_grey\nfor path in sys.argv[1:]: read_grey(path)"
    files = radiographs("dicom_derived/*512*.dcm") + radiographs("dicom/nih*.dcm") + radiographs("dicom/pydicom*.dcm")
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "is an empty file"),
        (b"Doe^John was here\n" * 40, "is not a DICOM file"),
        (b"\0" * 128 + b"DICM", "has no pixel data, or ends too early"),
        (b"\0" * 128 + b"DICM" + b"\x10\0\x10\0PN\xff\xffDoe", None),
    ],
)
def test_what_is_no_picture_is_corrupt(content: bytes, detail: str | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.dcm"
    path.write_bytes(content)
    why = refused(path)
    assert why.reason == "corrupt"
    assert detail is None or why.detail == detail
    assert "Doe" not in why.detail


def test_a_missing_file_and_a_folder_are_corrupt_in_words_without_the_path(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.dcm").detail == "cannot be read: no such file or directory"
    (tmp_path / "folder.dcm").mkdir()
    assert refused(tmp_path / "folder.dcm").reason == "corrupt"


@pytest.mark.parametrize(
    "elements",
    [
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
        {"PhotometricInterpretation": "PALETTE COLOR"},
        {"NumberOfFrames": 7},
        {"Rows": 0},
        {"Rows": 60000},
        {"Rows": 9},
        {"BitsAllocated": 32},
        {"RescaleSlope": "1e308", "RescaleIntercept": "1e308"},
    ],
    ids=str,
)
def test_headers_that_describe_no_grey_picture_are_corrupt(elements: dict[str, Any], tmp_path: Path) -> None:
    dataset = make_dicom(np.arange(64, dtype=np.uint8).reshape(8, 8), **elements)
    assert refused(save(dataset, tmp_path / "odd.dcm")).reason == "corrupt"


def test_modalities_are_checked_before_pixels_are_decoded(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    for modality in RADIOGRAPHS:
        read_grey(save(make_dicom(pixels, Modality=modality), tmp_path / "a.dcm"), RADIOGRAPHS)
    slices = save(make_dicom(pixels, Modality="CT", NumberOfFrames=4), tmp_path / "b.dcm")
    why = refused(slices)
    assert (why.reason, why.detail) == ("wrong_modality", "has modality CT, not one of CR, DX, DR, RG")
    smuggled = refused(save(make_dicom(pixels, Modality="SMITH"), tmp_path / "c.dcm"))
    assert (smuggled.reason, "SMITH" in smuggled.detail) == ("wrong_modality", False)


def test_headers_keep_known_codes_only(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6), np.uint8)
    kept = make_dicom(pixels, PatientSex="F", PatientAge="051Y", ViewPosition="pa", PatientName="Doe^Jane")
    header = read_grey(save(kept, tmp_path / "a.dcm"))[1]
    assert (header.sex, header.age, header.view, header.rows, header.columns) == ("F", 51, "PA", 4, 6)
    odd = make_dicom(pixels, PatientSex="Jane", ViewPosition="DOE JANE", PixelSpacing=[0, 0])
    header = read_grey(save(odd, tmp_path / "b.dcm"))[1]
    assert (header.sex, header.age, header.view) == (None, None, None)
    assert "DOE" not in repr(header).upper()


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("51", 51), ("051Y", 51), ("7", 7), ("006M", 0), ("018M", 1), ("012W", 0), ("104W", 1), ("003D", 0),
        ("0", 0), ("120", 120), ("148", None), ("", None), (None, None), ("abc", None), ("-5", None), ("1e1", None),
        ("٥١", None), ("5.5Y", None), ("051y", 51), (" 64 ", 64),
    ],
)  # fmt: skip
def test_ages(text: object, years: int | None) -> None:
    assert parse_age(text) == years


@given(st.text(max_size=6))
def test_ages_never_raise(text: str) -> None:
    age = parse_age(text)
    assert age is None or 0 <= age <= 120


@settings(max_examples=60, deadline=None)
@given(
    centre=st.floats(-3000, 5000),
    width=st.floats(1, 8000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    slope=st.floats(0.1, 4) | st.floats(-4, -0.1),
    intercept=st.floats(-2000, 2000),
    signed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_rescale_and_windows_agree_with_pydicom(
    centre: float, width: float, function: str, slope: float, intercept: float, signed: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    pixels = random.integers(*((-2048, 2048) if signed else (0, 4096)), (8, 8)).astype(
        np.int16 if signed else np.uint16
    )
    dataset = make_dicom(pixels, bits=12)
    for keyword, value in (
        ("RescaleSlope", slope),
        ("RescaleIntercept", intercept),
        ("WindowCenter", centre),
        ("WindowWidth", width),
    ):
        setattr(dataset, keyword, f"{value:.8g}")
    dataset.VOILUTFunction = function
    levels = np.unique(pixels).astype(float)
    ours = lut.voi(dataset, lut.modality(dataset, levels))
    ends = [
        (v * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))
        for v in ((-2048, 2047) if signed else (0, 4095))
    ]
    theirs = apply_voi_lut(apply_modality_lut(np.unique(pixels), dataset), dataset)
    assert ours is not None
    np.testing.assert_allclose(ours, (theirs - ends[0]) / (ends[1] - ends[0]), atol=1e-9)
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert (np.diff(ours) * np.sign(slope) >= 0).all()


@pytest.mark.parametrize(("width", "function"), [(0.5, "LINEAR"), (0, "LINEAR_EXACT"), (-3, "SIGMOID")])
def test_windows_without_width_are_none(width: float, function: str) -> None:
    assert lut.window(np.arange(4.0), 2, width, function) is None


def test_a_window_of_one_is_a_threshold() -> None:
    assert np.array_equal(lut.window(np.array([1.0, 1.5, 2.0]), 2, 1), [0, 0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("first", [0, 3])
def test_voi_lut_agrees_with_pydicom(depth: int, first: int, tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    item = Dataset()
    entries = (np.linspace(0, 1, 200) ** 2 * (2**depth - 1)).astype(int).tolist()
    item.LUTDescriptor, item.LUTData = [200, first, depth], entries
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    dataset = make_dicom(pixels, bits=12, WindowCenter=5, WindowWidth=3, VOILUTSequence=Sequence([item]))
    path = save(dataset, tmp_path / "lut.dcm")
    expected = apply_voi_lut(pixels, dataset, prefer_lut=True) / (2**depth - 1) * 255
    assert np.abs(read_grey(path)[0] - expected).max() <= 0.51
    item.LUTData = entries[:100]
    assert refused(save(dataset, path)).reason == "corrupt"


def test_modality_lut_as_bytes_is_read(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    item = Dataset()
    item.LUTDescriptor = [16, 0, 16]
    item["LUTDescriptor"].VR = "US"
    item.add_new("LUTData", "OW", struct.pack("<16H", *(1000 * i for i in range(16))))
    dataset = make_dicom(pixels, ModalityLUTSequence=Sequence([item]), WindowCenter=7500, WindowWidth=15001)
    picture = read_grey(save(dataset, tmp_path / "lut.dcm"))[0]
    assert np.abs(picture - pixels * 17.0).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_eight_bits_without_window_keep_their_full_range(dtype: type, photometric: str, tmp_path: Path) -> None:
    low = int(np.iinfo(dtype).min)
    pixels: np.ndarray[Any, Any] = np.linspace(low + 60, low + 190, 64).astype(dtype).reshape(8, 8)
    picture = read_grey(save(make_dicom(pixels, PhotometricInterpretation=photometric), tmp_path / "a.dcm"))[0]
    expected = pixels.astype(int) - low
    assert np.array_equal(picture, 255 - expected if photometric == "MONOCHROME1" else expected)


def test_six_bits_span_the_screen_and_values_beyond_them_are_not_clipped(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert read_grey(save(make_dicom(pixels, bits=6), tmp_path / "a.dcm"))[0].ravel()[[0, 63]].tolist() == [0, 255]
    wrong = make_dicom(np.linspace(0, 4000, 4096).astype(np.uint16).reshape(64, 64), bits=8)
    assert read_grey(save(wrong, tmp_path / "b.dcm"))[0].std() > 60


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(9, 16), hot=st.integers(0, 15))
def test_deep_pictures_without_window_span_robust_percentiles(seed: int, bits: int, hot: int) -> None:
    random = np.random.default_rng(seed)
    pixels = random.normal(2 ** (bits - 1), 2 ** (bits - 4), (64, 64)).clip(0, 2**bits - 1).astype(np.uint16)
    pixels.ravel()[:hot] = 2**bits - 1  # a bright marker must not darken all the rest
    levels = np.arange(pixels.min(), pixels.max() + 1.0)
    shown = lut.whole_range(
        make_dicom(pixels, bits=bits), levels, levels, lambda: np.bincount(pixels.ravel() - pixels.min())
    )
    low, high = np.quantile(pixels, [0.005, 0.995], method="inverted_cdf")
    np.testing.assert_allclose(shown, np.clip((levels - low) / (float(high) - low), 0, 1))


def test_padding_has_no_say_in_the_range_and_flat_pictures_are_black(tmp_path: Path) -> None:
    pixels = np.full((64, 64), 4000, np.uint16)
    pixels[:32] = np.linspace(100, 200, 2048).reshape(32, 64)
    padded = read_grey(save(make_dicom(pixels, bits=12, PixelPaddingValue=4000), tmp_path / "a.dcm"))[0]
    assert padded[:32].min() == 0
    assert padded[:32].max() == 255
    assert padded[16].std() < 20
    flat = read_grey(save(make_dicom(np.full((8, 8), 700, np.uint16), bits=12), tmp_path / "b.dcm"))[0]
    assert not flat.any()


def test_unreadable_numbers_count_as_absent(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = save(make_dicom(pixels, WindowCenter="100", WindowWidth="200", RescaleSlope="1"), tmp_path / "a.dcm")
    content = path.read_bytes()
    for old, new in ((b"100 ", b"nan "), (b"100 ", b"x^y "), (b"200 ", b"inf ")):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        assert np.array_equal(read_grey(path)[0], pixels)


def test_rle_that_is_cut_short_is_corrupt(tmp_path: Path) -> None:
    dataset = make_dicom(np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8))
    dataset.compress(RLELossless)
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
    assert read_grey(save(dataset, tmp_path / "a.dcm"))[0].std() > 50
    dataset.PixelData = encapsulate([stream[:2000]])
    assert refused(save(dataset, tmp_path / "a.dcm")).reason == "corrupt"


@given(st.binary(max_size=200))
def test_examining_any_bytes_raises_nothing_but_damaged(stream: bytes) -> None:
    for start in (b"", b"\xff\xd8", b"\xff\x4f\xff\x51"):
        with pytest.raises(codestream.Damaged):
            codestream.examine(start + stream)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), size=st.sampled_from([16, 32, 90]))
def test_resizing_keeps_proportions_and_levels(rows: int, columns: int, size: int) -> None:
    result = resize(np.full((rows, columns), 200, np.uint8), size)
    assert result.shape == (size, size)
    assert result.dtype == np.uint8
    assert result.max() <= 200
    share = min(rows, columns) / max(rows, columns)
    if min(rows, columns) >= 8:
        assert abs(result.mean() / 200 - share) < 0.1 + 1 / size


def test_resizing_averages_over_areas_and_copies_what_has_the_size() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    means = picture.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    assert np.abs(resize(picture, 16) - means).max() <= 0.51
    same = resize(picture, 64)
    assert np.array_equal(same, picture)
    assert not np.shares_memory(same, picture)

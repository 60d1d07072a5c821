"""`python -m pneumo.data` as a user types it: reports, refusals, pictures, and nothing of a person in any of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import RLELossless
from shared_data import make_dicom, needs_radiographs, radiographs, save

from pneumo.data.rsna import CLASSES, DETAILS, IMAGES, LABELS, REASONS

SECRET = "LEAKME"


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pneumo.data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 120 sound images, AP positive and PA negative but for a few, and one of each unsoundness."""
    root = tmp_path_factory.mktemp("rsna") / "folder"
    (root / IMAGES).mkdir(parents=True)
    random = np.random.default_rng(0)
    labels, details = ["patientId,x,y,width,height,Target"], ["patientId,class"]

    def add(name: str, boxes: str | None, *, image: bool = True, **elements: Any) -> Path:
        labels.append(f"{name},{boxes},1" if boxes else f"{name},,,,,0")
        details.append(f"{name},{CLASSES[-1] if boxes else CLASSES[0]}")
        identity: dict[str, Any] = dict.fromkeys(
            ("PatientName", "PatientID", "InstitutionName", "StudyDescription"), SECRET
        )
        dataset = make_dicom(random.integers(0, 256, (32, 32)).astype(np.uint8), **identity, **elements)
        if random.random() < 0.5:
            dataset.compress(RLELossless)
        path = save(dataset, root / IMAGES / f"{name}.dcm")
        if not image:
            path.unlink()
        return path

    for i in range(120):
        positive = i % 2 == 1
        view = "AP" if positive != (i % 12 == 0) else "PA"
        add(
            f"sound-{i}",
            "1,2,20,20" if positive else None,
            ViewPosition=view,
            PatientSex="MF"[i % 2],
            PatientAge=str(20 + i % 60),
        )
    for name, bytes_kept in (("empty", 0), ("cut", 900)):
        path = add(f"corrupt-{name}", None)
        path.write_bytes(path.read_bytes()[:bytes_kept])
    add("corrupt-text", None).write_text(SECRET)
    add("missing_image", None, image=False)
    add("wrong_modality", None, Modality="MR")
    add("label_without_box", ",,,")
    add("box_outside", "20,20,20,20")
    add("empty_box", "1,1,0,5")
    add("not_a_number", ",1,2,3")
    (root / IMAGES / "no_label.dcm").write_bytes((root / IMAGES / "sound-0.dcm").read_bytes())
    first = add("kept", None)
    add("duplicate", None).write_bytes(first.read_bytes())
    (root / LABELS).write_text("\n".join(labels) + "\n")
    (root / DETAILS).write_text("\n".join(details) + "\n")
    return root


def test_a_folder_is_reported_and_every_reason_found(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "--json", tmp_path / "check.json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "check.json").read_text())
    quarantine = {entry["patient"]: entry["reason"] for entry in found["quarantine"]}
    assert {name.split("-")[0] for name in quarantine} == set(quarantine.values()) == set(REASONS)
    assert all(name.split("-")[0] == reason for name, reason in quarantine.items())
    assert (found["images"], found["patients"]) == (121, 121)
    assert found["classes"] == {CLASSES[0]: 61, CLASSES[1]: 0, CLASSES[2]: 60}
    for entry in found["quarantine"]:
        assert set(entry) == {"patient", "file", "reason", "detail"}
        assert entry["file"] == f"{IMAGES}/{entry['patient']}.dcm"
    assert found["metadata"]["positive_rate"]["view"]["AP"]["positive"] == 60
    view = found["metadata"]["prediction"][0]
    assert view["features"] == "view"
    assert view["auc"] > 0.85
    everything = done.stdout + json.dumps(found)
    assert SECRET not in everything
    assert str(folder.parent) not in everything
    for word in [*quarantine, *REASONS, *CLASSES, "AP", "60-79", "foretold"]:
        assert word in done.stdout
    assert "…" not in done.stdout
    assert "\r" not in done.stdout


def test_the_same_data_give_the_same_report_for_any_number_of_threads(folder: Path, tmp_path: Path) -> None:
    reports = [
        (run(folder, "--threads", n, "--json", tmp_path / "a.json").stdout, (tmp_path / "a.json").read_text())
        for n in (1, 3)
    ]
    assert reports[0] == reports[1]


def test_strict_refuses_with_counts_after_the_report(folder: Path) -> None:
    done = run(folder, "--strict")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for reason in REASONS:
        assert reason in done.stderr
    assert "sound images" in done.stdout


def test_a_mapping_counts_persons(folder: Path, tmp_path: Path) -> None:
    entries = [{"subset_img_id": f"sound-{i}", "img_id": f"{i // 4:05d}_{i:03d}.png"} for i in range(120)]
    (tmp_path / "mapping.json").write_text(json.dumps(entries))
    done = run(folder, "--mapping", tmp_path / "mapping.json", "--json", tmp_path / "check.json")
    found = json.loads((tmp_path / "check.json").read_text())
    assert (done.returncode, found["images"], found["patients"], found["patients_are"]) == (0, 121, 31, "persons")
    assert "31 persons" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["DIR"]),
        (["nowhere"], ["nowhere"]),
        (["."], [LABELS]),
        (["file.dcm"], ["--png"]),
        (["a", "b"], ["--png"]),
        ([".", "--jsn", "x"], ["--jsn", "--json"]),
        ([".", "--size"], ["--size"]),
        ([".", "--json", "no/such/x.json"], ["no/such"]),
        ([".", "--threads", "0"], ["--threads", "0"]),
        ([".", "--mapping", "none.json"], ["none.json"]),
        ([".", "--png", "out"], ["folder"]),
        (["none.dcm", "--png", "out"], ["none.dcm"]),
        (["file.dcm", "--png", "out", "--size", "0"], ["--size", "0"]),
        (["file.dcm", "--png", "out", "--size", "big"], ["--size", "big"]),
        (["file.dcm", "sub/file.dcm", "--png", "out"], ["file.png"]),
        (["file.dcm", "--png", "file.dcm/out"], ["file.dcm/out"]),
        (["file.dcm", "--png", "out", "--strict"], ["--strict"]),
    ],
    ids=" ".join,
)
def test_refusals_are_one_sentence_and_exit_2(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "file.dcm", tmp_path / "sub" / "file.dcm"):
        save(make_dicom(np.zeros((8, 8), np.uint8)), path)
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


@needs_radiographs
def test_encodings_of_one_picture_become_the_same_png(tmp_path: Path) -> None:
    files = [path for path in radiographs("dicom_derived/*512_*.dcm") if path.name.startswith(("same512", "rule512"))]
    done = run(*files, "--png", tmp_path / "png", "--size", 512)
    assert (done.returncode, done.stderr) == (0, "")
    pictures = [np.asarray(Image.open(tmp_path / "png" / f"{path.stem}.png")).astype(int) for path in files]
    assert len(pictures) == 10
    assert pictures[0].shape == (512, 512)
    assert pictures[0].std() > 10
    assert max(np.abs(picture - pictures[0]).max() for picture in pictures) <= 1


def test_bad_files_are_named_in_a_line_and_the_others_written(tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    good = save(make_dicom(pixels, PatientName=SECRET), tmp_path / "good.dcm")
    text = tmp_path / "text.dcm"
    text.write_text(SECRET * 50)
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(good.read_bytes()[:-100])
    mr = save(make_dicom(pixels, Modality="MR", PatientName=SECRET), tmp_path / "mr.dcm")
    done = run(text, good, cut, mr, "--png", tmp_path / "out", "--size", 16, "--json", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (1, "")
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        "text.dcm: corrupt",
        "cut.dcm: corrupt",
        "mr.dcm: wrong_modality",
        f"1 of 4 written to {tmp_path / 'out'} as 16 x 16 PNG",
    ]
    assert SECRET not in done.stdout
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "good.png")), pixels)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]
    assert [one["reason"] for one in json.loads((tmp_path / "out.json").read_text())["files"]] == [
        "corrupt",
        None,
        "corrupt",
        "wrong_modality",
    ]


def test_help_explains_the_exit_codes_without_importing_what_is_slow() -> None:
    code = """
import runpy, sys
sys.argv = ["data", "--help"]
try:
    runpy.run_module("pneumo.data", run_name="__main__")
except SystemExit:
    pass
print("slow:", {"torch", "scipy", "pandas", "dask", "cv2", "pydicom"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Exit codes" in done.stdout
    assert "--png OUT" in done.stdout
    assert done.stdout.endswith("slow: set()\n")

"""`python -m pneumo.detect`: the answers are the tasks' own, for every file its row, and nothing of a header in any."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detect_inputs import SETTINGS, SIZE, write_files, write_weights
from PIL import Image
from shared_data import make_dicom, needs_radiographs, radiographs, save

from pneumo import process
from pneumo.data.dicom import read_grey, resize
from pneumo.data.geometry import to_pixels
from pneumo.data.loader import scale
from pneumo.detect import model as detect_model
from pneumo.detect.__main__ import main
from pneumo.detect.answer import Box, Row
from pneumo.detect.labels import label_places
from pneumo.detect.outputs import COLOUR, draw
from pneumo.models import load

KEYS = {"file", "probability", "boxes", "error"}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command leave this process's memory and environment as they are."""
    for name in ("keep_memory", "stay_offline"):
        monkeypatch.setattr(process, name, lambda: None)
    monkeypatch.setattr(process, "limit_threads", lambda _threads: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detect")
    for name in ("cnn", "yolo"):
        write_weights(folder, name)
    (folder / "files").mkdir()
    write_files(folder / "files", 9)
    return folder


def weights(root: Path, name: str) -> Path:
    return root / f"{name}-serial-none-1x1.safetensors"


def answers(tmp_path: Path, *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    """Run the command, and return the rows of its JSON file."""
    target = tmp_path / "answers.json"
    assert main([*map(str, arguments), "--json", str(target)]) == code
    found = json.loads(target.read_text())
    assert found.keys() == {"files"}
    assert all(row.keys() == KEYS for row in found["files"])
    rows: list[dict[str, Any]] = found["files"]
    return rows


@pytest.mark.parametrize("name", ["cnn", "yolo"])
def test_answers_are_those_of_the_task(root: Path, tmp_path: Path, name: str) -> None:
    rows = answers(tmp_path, weights(root, name), root / "files", "--threshold", 0)
    by_file = {row["file"]: row for row in rows}
    files = [path for path in sorted((root / "files").rglob("*.dcm")) if path.name != "broken.dcm"]
    pictures = [read_grey(path)[0] for path in files]
    images = torch.from_numpy(scale(np.stack([resize(picture, SIZE) for picture in pictures]))[:, None])
    task = load(name)(SETTINGS)
    network = task.build()
    from safetensors.torch import load_file

    network.load_state_dict(load_file(weights(root, name)))
    with torch.no_grad():
        expected = task.answers(network.eval(), images)
    assert len(files) == 9
    for k, (path, picture) in enumerate(zip(files, pictures, strict=True)):
        row = by_file[str(path)]
        assert row["error"] is None
        assert row["probability"] == pytest.approx(float(expected.scores[k]), abs=1e-5)
        if name == "cnn":
            assert row["boxes"] == []
            continue
        wanted = expected.boxes[k]
        assert row["boxes"][0].keys() == {"x", "y", "width", "height", "score"}
        np.testing.assert_allclose([box["score"] for box in row["boxes"]], wanted[:, 4], atol=1e-5)
        first = [row["boxes"][0][side] for side in ("x", "y", "width", "height")]
        np.testing.assert_allclose(first, to_pixels(wanted[:1, :4], *picture.shape)[0], atol=0.01)


def test_every_file_has_its_row_in_order_and_a_bad_one_its_error(root: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.dcm"
    rows = answers(tmp_path, weights(root, "cnn"), missing, root / "files", root / "files" / "wide.png")
    files = [missing, *sorted(p for p in (root / "files").rglob("*") if p.suffix in (".dcm", ".png", ".jpg"))]
    assert [row["file"] for row in rows] == [*map(str, files), str(root / "files" / "wide.png")]
    assert rows[0]["error"] == "missing.dcm: cannot be read: no such file or directory."
    bad = [row for row in rows if row["error"]]
    assert {Path(row["file"]).name for row in bad} == {"missing.dcm", "broken.dcm"}
    assert all(row["probability"] is None and row["boxes"] == [] for row in bad)


def test_nothing_answered_is_a_failure(root: Path, tmp_path: Path) -> None:
    for name in ("png", "jpg"):
        whole = next((root / "files").glob(f"*.{name}")).read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
    rows = answers(tmp_path, weights(root, "cnn"), tmp_path, code=1)
    assert [row["error"] for row in rows] == [f"cut.{name}: is cut short or damaged." for name in ("jpg", "png")]


def test_a_pipe_is_no_picture_and_is_not_waited_for(root: Path, tmp_path: Path) -> None:
    for name in ("pipe.png", "pipe.dcm", "pipe"):
        os.mkfifo(tmp_path / name)
    shutil.copy(root / "files" / "wide.png", tmp_path)
    rows = answers(tmp_path, weights(root, "cnn"), tmp_path)
    assert [Path(row["file"]).name for row in rows] == ["pipe.dcm", "pipe.png", "wide.png"], (
        "one without a suffix is not meant"
    )
    no_file = "is no file, but a pipe, a socket or a device."
    assert [row["error"] for row in rows] == [f"pipe.dcm: {no_file}", f"pipe.png: {no_file}", None]


def alike(root: Path, folder: Path) -> list[Path]:
    """Four files whose names are one without suffix and folder; the first is broken. All, sorted."""
    for place in ("a", "b"):
        (folder / place).mkdir(parents=True)
        shutil.copy(root / "files" / "wide.png", folder / place / "x.png")
    shutil.copy(root / "files" / "square.jpg", folder / "b" / "x.jpg")
    (folder / "a" / "x.dcm").write_bytes(b"no radiograph")
    return [folder / name for name in ("a/x.dcm", "a/x.png", "b/x.jpg", "b/x.png")]


def test_pictures_of_files_of_one_name_keep_their_suffixes_and_folders(root: Path, tmp_path: Path) -> None:
    files, out = alike(root, tmp_path / "files"), tmp_path / "out"
    expected = answers(tmp_path, weights(root, "yolo"), *files)
    assert answers(tmp_path, weights(root, "yolo"), tmp_path / "files", "--pictures", out) == expected
    made = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert made == ["a/x.png.png", "b/x.jpg.png", "b/x.png.png"]
    assert Image.open(out / "b" / "x.jpg.png").size == (100, 100)
    assert Image.open(out / "b" / "x.png.png").size == (160, 100)


def test_a_submission_has_one_line_of_a_patient_and_says_which_it_lacks(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "submission.csv"
    alike(root, tmp_path / "files")
    asked = [weights(root, "yolo"), tmp_path / "files", "--threshold", 0.3]
    plain = answers(tmp_path, *asked)
    capsys.readouterr()
    rows = answers(tmp_path, *asked, "--submission", target)
    assert rows[:2] == plain[:2], "the first one that has an answer gives it"
    for row, name in zip(rows[2:], ("x.jpg", "x.png"), strict=True):
        assert row["error"] == f"{name}: the submission has a line for this patient from an earlier file."
        assert (row["probability"], row["boxes"]) == (None, [])
    lines = target.read_text().splitlines()
    assert len(lines) == 2
    assert len(lines[1].removeprefix("x,").split()) == 5 * len(plain[1]["boxes"])
    assert capsys.readouterr().err.count("pneumo: ") == 0, "the one patient has a line"
    (tmp_path / "files" / "y.dcm").write_bytes(b"no radiograph")
    answers(tmp_path, *asked, "--submission", target)
    assert target.read_text().splitlines() == lines
    assert "no line for 1 of 2 patients" in capsys.readouterr().err


def test_no_header_value_gets_out(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = dict.fromkeys(("PatientName", "PatientID", "InstitutionName", "StudyDescription"), "LEAKME")
    save(make_dicom(np.zeros((32, 32), np.uint8), **secret), tmp_path / "sound.dcm")
    save(make_dicom(np.zeros((32, 32), np.uint8), **{**secret, "Modality": "LEAKME"}), tmp_path / "other.dcm")
    rows = answers(tmp_path, weights(root, "cnn"), tmp_path)
    assert [row["error"] is None for row in rows] == [False, True]
    assert "LEAKME" not in (tmp_path / "answers.json").read_text() + capsys.readouterr().out


def test_pictures_show_the_boxes(root: Path, tmp_path: Path) -> None:
    wide, out = root / "files" / "wide.png", tmp_path / "pictures"
    (row,) = answers(tmp_path, weights(root, "yolo"), wide, "--threshold", 0.001, "--pictures", out)
    drawn, grey = np.asarray(Image.open(out / "wide.png")).astype(int), np.asarray(Image.open(wide))
    assert drawn.shape == (100, 160, 3)
    for box in row["boxes"]:
        x, y = round(box["x"] + box["width"]) - 1, round(box["y"] + box["height"]) - 1
        assert tuple(drawn[y, x]) == COLOUR[::-1], "the corner of each box is drawn, the one without a label"
    untouched = (np.ptp(drawn, axis=2) == 0) & (drawn[:, :, 0] > 0)
    assert row["boxes"]
    assert untouched.mean() > 0.5
    np.testing.assert_array_equal(drawn[untouched][:, 0], grey[untouched])


def test_scores_are_read_upon_each_other_and_upon_white() -> None:
    """A worse box's label gives way to a better one's, and the picture's head to none; all lie upon black."""
    white = np.full((300, 400), 255, np.uint8)
    best, same = Box(100, 100, 120, 100, 0.9), Box(104, 98, 110, 105, 0.5)
    elsewhere, top = Box(250, 150, 100, 100, 0.4), Box(0, 0, 60, 12, 0.3)
    labels = np.s_[186:200, 104:130], np.s_[236:250, 255:280]
    found = draw(white, Row("f", 0.9, (best, same, elsewhere, top)))
    for place, alone in zip(labels, (best, elsewhere), strict=True):
        np.testing.assert_array_equal(found[place], draw(white, Row("f", 0.9, (alone,)))[place])
    head = np.s_[:12, 3:28]
    np.testing.assert_array_equal(found[head], draw(white, Row("f", 0.9))[head])
    for place in (*labels, head):
        assert (found[place] == 0).all(axis=2).mean() > 0.4, "black below"
        assert (found[place] == COLOUR).all(axis=2).any(), "with the score upon it"


def test_labels_stay_in_the_picture() -> None:
    boxes = [(-5.0, -9.0, 10.0, 10.0), (95.0, 90.0, 20.0, 40.0), (20.0, 20.0, 30.0, 30.0), (21.0, 20.0, 30.0, 33.0)]
    assert list(label_places(boxes, (10, 5), (100, 100))) == [(0, 0, 5), (1, 90, 100), (2, 20, 50)]
    assert [i for i, _, _ in label_places(boxes, (10, 5), (100, 100), [(0, 5)])] == [1, 2]


def test_pictures_do_not_replace_what_is_answered(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = root / "files" / "wide.png"
    before = wide.read_bytes()
    assert main([str(weights(root, "cnn")), str(wide), "--pictures", str(wide.parent)]) == 2
    assert "would write over" in capsys.readouterr().err
    assert wide.read_bytes() == before


def test_submission_is_in_the_challenges_format(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "submission.csv"
    rows = answers(tmp_path, weights(root, "yolo"), root / "files", "--threshold", 0.3, "--submission", target)
    with target.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert target.read_text().splitlines()[0] == "patientId,PredictionString"
    sound = [row for row in rows if row["error"] is None]
    assert [line["patientId"] for line in lines] == [Path(row["file"]).stem for row in sound]
    for line, row in zip(lines, sound, strict=True):
        values = np.array(line["PredictionString"].split(), float).reshape(-1, 5)
        wanted = [[box[key] for key in ("score", "x", "y", "width", "height")] for box in row["boxes"]]
        np.testing.assert_allclose(values, np.reshape(wanted, (-1, 5)), atol=0.051)
        assert (values[:, 0] >= 0.2999).all()
    assert any(row["boxes"] for row in sound)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{yolo}"], "at least one file"),
        (["{root}/nothing.pt", "{root}/files"], "does not exist"),
        (["{root}/files", "{root}/files"], "is a folder"),
        (["{root}/cnn.bare.safetensors", "{root}/files"], "are not YOLOv8n's"),
        (["{root}/half.safetensors", "{root}/files"], "would be random"),
        (["{cnn}", "{root}/files", "--size", "128"], "trained with 64"),
        (["{yolo}", "{root}/files", "--size", "65"], "a multiple of 32"),
        (["{cnn}", "{root}/files", "--submission", "s.csv"], "is for boxes"),
        (["{yolo}", "{root}/files", "--threshold", "2"], "from 0 to 1"),
        (["{yolo}", "{root}/files", "--treshold", "0"], "did you mean --threshold"),
        (["{yolo}", "{root}/files", "{root}/files", "--pictures", "{root}/out"], "is named twice"),
    ],
)
def test_refused(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copy(weights(root, "cnn"), root / "cnn.bare.safetensors")
    state = load_file(weights(root, "yolo"))
    save_file({name: value for name, value in state.items() if ".cv3." not in name}, root / "half.safetensors")
    names = {"root": root, "cnn": weights(root, "cnn"), "yolo": weights(root, "yolo")}
    assert main([text.format(**names) for text in arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("pneumo: ")
    assert said.count("\n") == 1


def test_a_checkpoint_of_ultralytics_answers_as_ours(root: Path, tmp_path: Path) -> None:
    from pneumo.models.weights import read, write_pt

    path = tmp_path / "best.pt"
    write_pt(read(weights(root, "yolo")), path, size=SIZE)
    ours = answers(tmp_path, weights(root, "yolo"), root / "files" / "wide.png", "--threshold", 0.1)
    theirs = answers(tmp_path, path, root / "files" / "wide.png", "--threshold", 0.1)
    assert theirs == ours
    assert ours[0]["boxes"]


@pytest.mark.parametrize("name", ["cnn", "yolo"])
def test_weights_say_themselves_what_they_are(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from pneumo.models.weights import read, write_safetensors

    files = [root / "files" / "wide.png", "--threshold", 0.1]
    expected = answers(tmp_path, weights(root, name), *files)
    write_safetensors(read(weights(root, name)), tmp_path / "alone.safetensors", model=name, size=SIZE)
    assert answers(tmp_path, tmp_path / "alone.safetensors", *files) == expected
    assert "assumed" not in capsys.readouterr().err


def test_a_size_that_nothing_says_is_assumed_aloud(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(weights(root, "yolo"), tmp_path / "bare.safetensors")
    files = [root / "files" / "wide.png", "--threshold", 0.1]
    assumed = answers(tmp_path, tmp_path / "bare.safetensors", *files)
    said = capsys.readouterr().err
    assert said.count("assumed") == said.count("416 pixels are assumed (--size)") == 1
    assert answers(tmp_path, tmp_path / "bare.safetensors", *files, "--size", 416) == assumed
    assert "assumed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [({"model": "oracle", "size": "64"}, "a model that this version does not know"), ({"size": "8192"}, "32 to 4096")],
)
def test_what_weights_say_of_themselves_is_looked_at(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: dict[str, str], sentence: str
) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "odd.safetensors"
    save_file(load_file(weights(root, "yolo")), path, metadata=metadata)
    assert main([str(path), str(root / "files")]) == 2
    assert sentence in capsys.readouterr().err


def test_the_threshold_is_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Row:
        backend, comm, ranks, threads, metrics = "serial", "none", 1, 1, {"rsna_threshold": 0.25}

    class Summary:
        rows = (Row,)

    asked: list[Path] = []
    monkeypatch.setattr("pneumo.study.results.load_summary", lambda folder: asked.append(folder) or Summary)
    known = detect_model.About("yolo", SIZE, "serial", "none", 1, 1)
    assert detect_model.threshold(tmp_path / "checkpoints" / "yolo.pt", known) == 0.25
    assert detect_model.threshold(tmp_path / "checkpoints" / "y.pt", detect_model.About("yolo", SIZE)) == 0.5
    assert detect_model.threshold(tmp_path / "yolo.pt", known) == 0.5
    assert asked == [tmp_path, tmp_path]


@needs_radiographs
def test_every_real_radiograph_is_answered_or_says_why_not(root: Path, tmp_path: Path) -> None:
    undecodable = {"fodicom_chest_cr_japanese_no_pixels.dcm", "nema_rg3_leg_jpeg_extended_mono1_10bit.dcm"}
    files = [*radiographs(), *radiographs("kermany224/*/*.png")[::20]]
    rows = answers(tmp_path, weights(root, "yolo"), *files)
    assert [row["file"] for row in rows] == [*map(str, files)]
    assert {Path(row["file"]).name for row in rows if row["error"]} == undecodable
    assert all(0 <= row["probability"] <= 1 for row in rows if row["error"] is None)

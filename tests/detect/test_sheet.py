"""`python -m pneumo.detect RESULT --sheet`: its figures are the summary's, its pictures the store's."""
# mypy: disable-error-code="import-untyped"

import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from detect_inputs import SIZE
from PIL import Image
from sheet_results import PARTS, write_study
from sklearn.metrics import average_precision_score, roc_auc_score

from pneumo import launch, process
from pneumo.data.patients import SampleConfig
from pneumo.data.sample import picture, plan
from pneumo.data.store import Store
from pneumo.detect.__main__ import main
from pneumo.detect.sheet import figure
from pneumo.detect.sheet.cases import KINDS, choose
from pneumo.detect.sheet.figure import Sheet
from pneumo.detect.sheet.images import find
from pneumo.study import results
from pneumo.study.metrics import quality
from pneumo.study.results import load_run
from pneumo.study.summary import load_answers


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command leave this process's memory and environment as they are; there is no MPI."""
    for name in ("keep_memory", "stay_offline"):
        monkeypatch.setattr(process, name, lambda: None)
    monkeypatch.setattr(process, "limit_threads", lambda _threads: None)
    monkeypatch.setitem(sys.modules, "mpi4py", None)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_study(tmp_path_factory.mktemp(name), name) for name in ("cnn", "yolo")}


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Sheet]:
    """The sheets that are drawn, which here are empty files."""
    drawn: list[Sheet] = []
    monkeypatch.setattr(figure, "draw", lambda sheet: drawn.append(sheet) or b"")
    return drawn


def change(result: Path, **changes: Any) -> None:
    results.write_json(result / "run.json", msgspec.structs.replace(load_run(result), **changes))


def copied(result: Path, folder: Path) -> Path:
    return Path(shutil.copytree(result, folder / "copy"))


@pytest.mark.parametrize("name", ["cnn", "yolo"])
def test_a_sheet_is_one_picture_in_the_result(
    studies: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(studies[name]), "--sheet"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{studies[name] / 'sheet.png'}\n"
    assert said.err == ""
    with Image.open(studies[name] / "sheet.png") as drawn:
        assert drawn.size == (1920, 1380 if name == "cnn" else 1500)


@pytest.mark.parametrize("name", ["cnn", "yolo"])
def test_figures_are_those_of_the_tables(
    studies: dict[str, Path], sheets: list[Sheet], name: str, tmp_path: Path
) -> None:
    assert main([str(studies[name]), "--sheet", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists()
    (sheet,), answers = sheets, load_answers(studies[name])[0]
    part = answers.validate
    row = quality(part.label, part.score, threshold=answers.threshold, natural_prevalence=0.5).metrics
    counts = sheet.counts
    assert all(counts[kind] > 0 for kind in KINDS), counts
    assert counts["true positive"] / row["positives"] == row["sensitivity"]
    assert counts["true negative"] / (row["n"] - row["positives"]) == row["specificity"]
    roc, precision = sheet.panels[:2]
    assert roc.lines[0].figure == pytest.approx(roc_auc_score(part.label, part.score))
    assert roc.point == pytest.approx((1 - row["specificity"], row["sensitivity"]))
    assert [line.role for line in roc.lines] == ["highlighted", "other", "other"]
    assert [line.run.run for line in roc.lines] == [0, 1, 2]
    if name == "cnn":
        assert precision.lines[0].figure == pytest.approx(average_precision_score(part.label, part.score))
        assert precision.point == pytest.approx((row["sensitivity"], row["ppv"]))
        return
    assert answers.boxes is not None
    from pneumo.study.detection import detection_quality

    boxes = detection_quality(answers.boxes["validate"], answers.boxes["calibrate"], draws=2).metrics
    assert sheet.kept == boxes["rsna_threshold"]
    assert precision.lines[0].figure == pytest.approx(boxes["map50"])
    assert precision.point == pytest.approx((boxes["recall"], boxes["precision"]))
    assert sheet.panels[2].lines[0].figure == pytest.approx(boxes["froc_mean"])


@pytest.mark.parametrize("name", ["cnn", "yolo"])
def test_images_are_the_stores_with_their_answers(studies: dict[str, Path], sheets: list[Sheet], name: str) -> None:
    assert main([str(studies[name]), "--sheet"]) == 0
    assert main([str(studies[name]), "--sheet", "--run", "0"]) == 0
    store = Store.open(studies[name].parents[1] / "cache" / "store-0")
    index = {image.patient: image for image in store.index.iloc[PARTS["validate"]].itertuples()}
    first, again = ([case for kind in KINDS for case in sheet.cases[kind]] for sheet in sheets)
    assert [case.patient for case in first] == [case.patient for case in again], "the same are chosen every time"
    part = load_answers(studies[name])[0].validate
    scores = dict(zip(part.patient, part.score, strict=True))
    assert len(first) == sum(min(3 if name == "cnn" else 4, count) for count in sheets[0].counts.values())
    for case in first:
        image = index[case.patient]
        assert case.score == scores[case.patient]
        np.testing.assert_array_equal(case.picture, store.images(SIZE)[image.row])
        # Originals of 64 rows and 80 columns lie in the middle of a square of 80.
        moved = np.reshape([[x, y + 8, w, h] for x, y, w, h in image.boxes], (-1, 4)) * SIZE / 80
        np.testing.assert_allclose(case.truths, moved, atol=1e-4)
        assert (case.evidence is not None) == (name == "cnn")
        if case.scores.size:
            assert case.scores[0] == pytest.approx(case.score)
    if name == "cnn":
        assert all(case.evidence.max() in (0.0, 1.0) for case in first if case.evidence is not None)
        return
    hit = next(case for case in first if case.truths.size and case.scores.size)
    ratio = hit.boxes[0, 2:] / hit.truths[0, 2:]
    assert ratio[0] == pytest.approx(ratio[1], rel=1e-3)


def test_kinds_are_by_label_and_threshold(studies: dict[str, Path], sheets: list[Sheet]) -> None:
    assert main([str(studies["cnn"]), "--sheet", "--run", "1"]) == 0
    (sheet,) = sheets
    assert sheet.run == "ddp gloo 2"
    assert [line.role for line in sheet.panels[0].lines] == ["highlighted", "other", "chosen"]
    for kind, (positive, called) in KINDS.items():
        for case in sheet.cases[kind]:
            assert (case.truths.size > 0, case.score >= sheet.threshold) == (positive, called)
    assert sheet.notes == ["Grad-CAM needs the trained model, and this result keeps none: train with --save."]


@pytest.mark.parametrize(("n", "expected"), [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 4, 8])])
def test_chosen_are_evenly_spaced(n: int, expected: list[int]) -> None:
    assert choose(np.arange(n), 3).tolist() == expected


def test_a_model_that_did_not_give_these_answers_is_noticed(
    studies: dict[str, Path], sheets: list[Sheet], tmp_path: Path
) -> None:
    result = copied(studies["cnn"], tmp_path)
    from safetensors.torch import load_file, save_file

    (path,) = (result / "checkpoints").glob("*.safetensors")
    state = load_file(path)
    save_file(state | {"fc2.bias": state["fc2.bias"] + 1}, path)
    assert main([str(result), "--sheet"]) == 0
    assert "do not give the recorded probabilities" in sheets[0].notes[0]


def test_without_the_cache_there_are_curves(
    studies: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = copied(studies["yolo"], tmp_path)
    change(result, config=load_run(result).config | {"cache": str(tmp_path / "gone")})
    assert main([str(result), "--sheet"]) == 0
    assert "so there are curves and no images" in capsys.readouterr().err
    with Image.open(result / "sheet.png") as drawn:
        assert drawn.width > drawn.height


def test_a_damaged_store_is_no_store(studies: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(studies["cnn"].parents[1] / "cache", cache)
    run = load_run(studies["cnn"])
    moved = msgspec.structs.replace(run, config=run.config | {"cache": str(cache)})
    assert find(moved, ["id-41"])[0].keys() == {"id-41"}
    pictures = cache / "store-0" / f"pictures-{SIZE}.npy"
    content = bytearray(pictures.read_bytes())
    content[-1] ^= 1
    pictures.write_bytes(bytes(content))
    assert find(moved, ["id-41"])[0] == {}


def test_pictures_of_the_sample_are_drawn_again(studies: dict[str, Path], tmp_path: Path) -> None:
    run, config = load_run(studies["cnn"]), SampleConfig()
    assert SampleConfig(launch.SAMPLE_PATIENTS, launch.SAMPLE_SEED) == config
    lost = msgspec.structs.replace(run, config={"data": None, "cache": str(tmp_path), "size": 128})
    patient = plan(config)[1]
    found, note = find(lost, [patient])
    assert "drawn again" in str(note)
    shown = found[patient]
    assert (shown.rows, shown.columns, shown.picture.shape) == (1024, 1024, (128, 128))
    whole = cv2.resize(picture(config, 1), (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(whole.astype(int) - shown.picture).mean() < 1, "but for JPEG"
    assert find(lost, [patient, "nobody"])[0] == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}", "--sheet"], "name the folder of a result"),
        (["{cnn}", "--sheet", "{tmp}/no/a.png"], "cannot be written"),
        (["{cnn}", "--sheet", "{tmp}/a.pdf"], "no files beside it"),
        (["{cnn}", "--sheet={tmp}/a.pdf"], "ends in .png"),
        (["{cnn}", "{tmp}/a.dcm", "--sheet"], "no files beside it"),
        (["--sheet"], "none is named"),
        (["{cnn}", "--sheet", "--run", "7"], "has the runs 0 (serial 1), 1 (ddp gloo 2), 2 (ddp pneumo 2)"),
        (["{cnn}", "--sheet", "--threshold", "0.5", "--json", "a"], "leave out --json, --threshold"),
        (["{cnn}", "{tmp}", "--run", "0"], "--run chooses among the runs"),
        (["{running}", "--sheet"], "not done (state: running)"),
        (["{silent}", "--sheet"], "predictions.parquet is missing"),
        (["{cnn}", "--shet"], "did you mean --sheet"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    studies: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    names = {"tmp": tmp_path, "cnn": studies["cnn"]}
    for name in ("running", "silent"):
        names[name] = copied(studies["cnn"], tmp_path / name)
    change(names["running"], state="running")
    (names["silent"] / "predictions.parquet").unlink()
    assert main([text.format(**names) for text in arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("pneumo: ")
    assert said.count("\n") == 1

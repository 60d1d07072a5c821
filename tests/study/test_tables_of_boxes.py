"""Boxes on their way through the files of a result."""
# mypy: disable-error-code="import-untyped"

import io
from pathlib import Path

import numpy as np
import pytest
import synthetic
from pictures import Picture, detections, drawn_pictures
from rich.console import Console

from pneumo.errors import Refused
from pneumo.study.boxes import PARTS, Detections, detection_rows, load_detections, truth_rows
from pneumo.study.detection import detection_quality
from pneumo.study.results import ResultFolder, load_table
from pneumo.study.summary import summarize
from pneumo.study.tables import show

RUNS = synthetic.DEFAULT_RUNS[:2]


def patient(part: str, i: int) -> str:
    return f"{part}-{i:04}"


def write(folder: Path, pictures: dict[str, list[Picture]], order: dict[str, list[int]]) -> Path:
    """A result of two runs whose second one predicts nothing; images are added in the order given for each part."""
    run = synthetic.run_file(RUNS)
    result = ResultFolder.create(folder, run.study)
    result.write_run(run)
    for part, of_part in pictures.items():
        for number in range(2):
            for i in order[part]:
                picture = of_part[i]
                row = {"run": number, "patient": patient(part, i), "part": part, "label": int(bool(picture.truths))}
                row |= {"score": max(picture.scores, default=0.0), "view": None, "sex": None, "age": None}
                result.add_predictions([row])
                if number == 0:
                    rows = detection_rows(0, row["patient"], part, picture.boxes, picture.scores, picture.truths)
                    result.add_detections(rows)
                    result.add_truths(truth_rows(row["patient"], part, picture.truths))
    result.flush()
    return result.path


def test_boxes_come_back_as_they_were_matched(tmp_path: Path) -> None:
    pictures = {"calibrate": drawn_pictures(15, seed=1), "validate": drawn_pictures(30, seed=2)}
    rng = np.random.default_rng(0)
    order = {part: rng.permutation(len(of_part)).tolist() for part, of_part in pictures.items()}
    found = load_detections(write(tmp_path, pictures, order))
    assert {run: tuple(parts) for run, parts in found.items()} == {0: PARTS, 1: PARTS}
    for part in PARTS:
        expected, kept = detections(pictures[part]), found[0][part]
        # Rows lie in the order in which they were added; the metrics do not mind.
        back = np.argsort(kept.image, kind="stable")
        for name in ("image", "hits_coco", "hits_rsna"):
            assert np.array_equal(getattr(kept, name)[back], getattr(expected, name)), name
        assert np.array_equal(kept.score[back], expected.score.astype(np.float32))
        assert np.array_equal(kept.truths, expected.truths)
        assert np.array_equal(kept.positive, expected.positive)
        silent = found[1][part]
        assert silent.score.size == 0
        assert np.array_equal(silent.truths, expected.truths)
    quality = detection_quality(found[0]["validate"], found[0]["calibrate"], draws=20)
    assert quality.metrics["map50"] == detection_quality(*map(detections, reversed(pictures.values()))).metrics["map50"]
    assert detection_quality(found[1]["validate"], found[1]["calibrate"], draws=20).metrics["map50"] == 0.0


def test_rows_hold_the_boxes_and_their_hits() -> None:
    boxes, truths = [(0, 0, 10, 5), (500, 500, 3, 4)], [(0, 0, 10, 10)]
    first, second = detection_rows(3, "p", "validate", boxes, [0.25, 0.5], truths)
    assert first == {
        **{"run": 3, "patient": "p", "part": "validate", "score": 0.25},
        **{"x": 0.0, "y": 0.0, "width": 10.0, "height": 5.0, "hits_coco": 0b1, "hits_rsna": 0b11},
    }
    assert (second["score"], second["width"], second["hits_coco"], second["hits_rsna"]) == (0.5, 3.0, 0, 0)
    assert truth_rows("p", "validate", truths) == [
        {"patient": "p", "part": "validate", "x": 0.0, "y": 0.0, "width": 10.0, "height": 10.0}
    ]
    assert detection_rows(3, "p", "validate", np.zeros((0, 4)), np.zeros(0), truths) == []
    assert truth_rows("p", "validate", ()) == []


def test_boxes_are_matched_as_they_are_kept() -> None:
    """Two scores that are one in float32 are tied for the match, too: the earlier box comes first."""
    boxes, truths = [(0, 0, 10, 10), (0, 0, 10, 10)], [(0, 0, 10, 10)]
    rows = detection_rows(0, "p", "validate", boxes, [0.5, 0.5 + 1e-12], truths)
    assert rows[0]["score"] == rows[1]["score"]
    assert [row["hits_rsna"] for row in rows] == [255, 0]


def test_a_result_of_classifiers_has_no_boxes_and_no_files_of_them(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, RUNS)
    assert load_detections(path) == {}
    assert not (path / "detections.parquet").exists()
    assert load_table(path, "truths").num_rows == 0
    again = ResultFolder.open(path)
    again.flush()
    assert not (path / "truths.parquet").exists()
    again.add_truths(truth_rows("p", "validate", [(1, 2, 3, 4)]))
    again.flush()
    assert load_table(path, "truths").num_rows == 1


def test_boxes_of_unknown_patients_are_refused(tmp_path: Path) -> None:
    pictures = {"calibrate": [], "validate": [Picture([(0, 0, 1, 1)], [0.5])]}
    path = write(tmp_path, pictures, {"calibrate": [], "validate": [0]})
    folder = ResultFolder.open(path)
    folder.add_detections(detection_rows(0, "stranger", "validate", [(0, 0, 1, 1)], [0.5], []))
    folder.flush()
    with pytest.raises(Refused, match=r"detections\.parquet"):
        load_detections(path)


def test_of_a_patient_predicted_twice_the_last_label_counts(tmp_path: Path) -> None:
    path = write(tmp_path, {"validate": [Picture(), Picture(truths=[(0, 0, 1, 1)])]}, {"validate": [0, 1]})
    folder = ResultFolder.open(path)
    row = {"run": 0, "patient": patient("validate", 0), "part": "validate", "label": 1, "score": 0.5}
    folder.add_predictions([row | {"view": None, "sex": None, "age": None}])
    folder.flush()
    assert load_detections(path)[0]["validate"].positive.tolist() == [True, True]
    assert load_detections(path)[1]["validate"].positive.tolist() == [False, True]


@pytest.mark.parametrize(
    "change", [{"image": [0, 2]}, {"image": [0]}, {"score": [0.5, np.nan]}, {"hits_coco": np.zeros((2, 8), dtype=bool)}]
)
def test_arrays_that_do_not_fit_are_noticed(change: dict[str, object]) -> None:
    good = {"image": [0, 1], "score": [0.5, 0.6], "truths": [1, 0], "positive": [True, False]}
    good |= {"hits_coco": np.zeros((2, 10), dtype=bool), "hits_rsna": np.zeros((2, 8), dtype=bool)}
    Detections(**{name: np.asarray(value) for name, value in good.items()})
    with pytest.raises(AssertionError):
        Detections(**{name: np.asarray(value) for name, value in (good | change).items()})


def test_a_worse_detector_differs_from_the_serial_one_by_its_paired_interval(screen: Console, tmp_path: Path) -> None:
    """The second run predicts nothing, so it is worse by all of the first one's mAP, in each resample of the images."""
    pictures = {"calibrate": drawn_pictures(15, seed=1), "validate": drawn_pictures(30, seed=2)}
    path = write(tmp_path, pictures, {part: list(range(len(of_part))) for part, of_part in pictures.items()})
    result = ResultFolder(path)
    for one in RUNS:
        entry = synthetic.entry(RUNS.index(one), *one)
        result.add_steps(synthetic.step_rows(entry, synthetic.block_lengths(entry, 6), skew_ns=1000))
    result.flush()
    serial, other = summarize(path).rows
    assert serial.map_difference is None
    assert (d := other.map_difference) is not None
    assert d.estimate == -(serial.metrics["map50"] or 0) < -0.1
    assert (-d.high, -d.low) == serial.intervals["map50"]
    show(path, screen)
    assert isinstance(screen.file, io.StringIO)
    shown = " ".join(screen.file.getvalue().split())
    assert f"largest difference from serial {d.estimate:+.3f}" in shown
    assert "95 % interval (bootstrap over images)" in shown
    assert "of the same images: beside it, rounding" in shown

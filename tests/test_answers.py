"""What all ranks answered of a part: its rows, and its figure, which is the one that a result's files would give."""
# mypy: disable-error-code="import-untyped"

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pneumo import answers
from pneumo.models.task import Answers
from pneumo.study.boxes import load_detections
from pneumo.study.detection import detection_quality
from pneumo.study.results import ResultFolder, load_table
from pneumo.train import Answered

EDGE, IMAGES = 1024, 24
BOX = (0.25, 0.25, 0.25, 0.25)


def index() -> pd.DataFrame:
    """Images of which every other one has a true box."""
    positive = np.arange(IMAGES) % 2
    boxes = [[[EDGE * side for side in BOX]] if one else [] for one in positive]
    known: dict[str, Any] = {"patient": [f"p{i}" for i in range(IMAGES)], "label": positive, "boxes": boxes}
    return pd.DataFrame(known | {"rows": EDGE, "columns": EDGE, "view": "", "sex": "", "age": np.nan})


def shares(positions: np.ndarray, scores: np.ndarray, boxes: tuple[np.ndarray, ...], ranks: int) -> list[Answered]:
    """The same answers as those of several ranks, the last of which may have none."""
    parts = np.array_split(np.arange(len(positions)), ranks)
    return [Answered(positions[p], Answers(scores[p], tuple(boxes[i] for i in p) if boxes else ())) for p in parts]


@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9]), min_size=IMAGES, max_size=IMAGES), st.integers(1, 5))
def test_the_auc_is_that_of_others(scores: list[float], ranks: int) -> None:
    table = index()
    answered = shares(np.arange(IMAGES), np.array(scores, np.float32), (), ranks)
    found = [answers.rows(3, table, {"calibrate": one}) for one in answered]
    assert answers.auc(found) == pytest.approx(roc_auc_score(table["label"], scores), abs=1e-12)


@pytest.mark.parametrize(("kind", "ranks"), [("mixed", 1), ("mixed", 3), ("mixed", 30), ("none", 2), ("perfect", 2)])
def test_the_map_is_that_of_the_results_own_metrics(tmp_path: Path, kind: str, ranks: int) -> None:
    rng, table = np.random.default_rng(4), index()
    at = np.array(BOX)
    boxes = []
    for i in range(IMAGES):
        guesses = at + rng.uniform(-0.1, 0.1, (rng.integers(0, 4), 4))
        guesses = {"mixed": guesses, "none": guesses[:0], "perfect": at[None] if i % 2 else guesses[:0]}[kind]
        scored = np.column_stack([guesses, np.sort(rng.uniform(0.1, 1, len(guesses)))[::-1]])
        boxes.append(scored.astype(np.float32).reshape(-1, 5))
    scores = np.array([max(b[:, 4], default=0.0) for b in boxes], np.float32)
    answered = shares(np.arange(IMAGES), scores, tuple(boxes), ranks)
    truths = answers.truths(table, {"calibrate": np.arange(IMAGES)})
    person = np.arange(IMAGES) // 2
    found = [answers.rows(0, table, {"calibrate": one}, person) for one in answered]
    ours = answers.map50(found, truths)
    result = ResultFolder.create(tmp_path, "main")
    for one in found:
        result.add_predictions(one.predictions)
        result.add_detections(one.detections)
    result.add_truths(truths)
    result.flush()
    kept = load_detections(result.path)[0]["calibrate"]
    assert kept.person is not None
    assert np.unique(kept.person, return_counts=True)[1].tolist() == [2] * (IMAGES // 2)
    assert ours == detection_quality(kept, kept, draws=1).metrics["map50"]
    assert {"mixed": 0 < ours < 1, "none": ours == 0, "perfect": ours == 1}[kind]


def test_without_true_boxes_there_is_no_map() -> None:
    table = index()
    negatives = np.arange(0, IMAGES, 2)
    answered = shares(
        negatives, np.zeros(len(negatives), np.float32), (np.zeros((0, 5), np.float32),) * len(negatives), 2
    )
    found = [answers.rows(0, table, {"calibrate": one}) for one in answered]
    assert np.isnan(answers.map50(found, answers.truths(table, {"calibrate": negatives})))


def test_what_a_header_does_not_tell_is_null(tmp_path: Path) -> None:
    unknown = {"patient": "a", "label": 1, "view": np.nan, "sex": np.nan, "age": np.nan}
    known = {"patient": "b", "label": 0, "view": "PA", "sex": "F", "age": 40.0}
    answered = Answered(np.array([0, 1]), Answers(np.array([0.25, 0.5], np.float32)))
    found = answers.rows(0, pd.DataFrame([unknown, known]), {"validate": answered})
    folder = ResultFolder.create(tmp_path, "tiny")
    folder.add_predictions(found.predictions)
    folder.flush()
    rows = load_table(folder.path, "predictions", columns=("patient", "view", "sex", "age")).to_pylist()
    assert rows == [
        {"patient": "a", "view": None, "sex": None, "age": None},
        {"patient": "b", "view": "PA", "sex": "F", "age": 40},
    ]

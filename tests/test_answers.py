"""Rows of what a rank answered: what the index does not know of an image is null in them."""

from pathlib import Path

import numpy as np
import pandas as pd

from pneumo import answers
from pneumo.models.task import Answers
from pneumo.study.results import ResultFolder, load_table
from pneumo.train import Answered


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

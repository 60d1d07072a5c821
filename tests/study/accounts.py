"""The account and the summary's row of a simulated study."""

import math
from pathlib import Path

import pytest

from pneumo.study.account import TERMS, Account
from pneumo.study.explain import Explainer
from pneumo.study.results import load_run
from pneumo.study.schema import Row
from pneumo.study.summary import summarize


def account_of(path: Path, run: int = 1, kind: str = "train") -> Account:
    file = load_run(path)
    found = Explainer(path, file, {0: 0, 1: 0}).account(file.runs[run], kind)
    assert found is not None
    return found


def row_of(path: Path) -> Row:
    return summarize(path, write=False).rows[1]


def closes(row: Row) -> bool:
    total = math.fsum([*(row.loss[term] or 0.0 for term in TERMS), row.residual_rank_s or 0.0])
    return total == pytest.approx(row.lost_rank_s, abs=1e-9)

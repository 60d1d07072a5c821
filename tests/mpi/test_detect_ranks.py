"""`python -m pneumo.detect` under mpirun: the same answers to the last digit for any number of ranks."""

import sys
from pathlib import Path

import pytest
from harness import Launcher

sys.path.insert(0, str(Path(__file__).parents[1] / "detect"))
from detect_inputs import write_files, write_weights


@pytest.mark.parametrize("model", ["cnn", "yolo"])
def test_the_same_answers_for_any_number_of_ranks(mpirun: Launcher, tmp_path: Path, model: str) -> None:
    weights, folder = write_weights(tmp_path, model), tmp_path / "files"
    folder.mkdir()
    write_files(folder, 20)
    found, printed = [], []
    for ranks in (None, 2) if model == "yolo" else (None, 1, 2, 3):
        target = tmp_path / f"{ranks}.json"
        arguments = [weights, folder, "--json", target]
        printed.append(mpirun(ranks, module="pneumo.detect", args=arguments).stdout)
        found.append(target.read_bytes())
    assert found[0].count(b'"file"') == 23
    assert len(set(found)) == 1
    assert len(set(printed)) == 1


def test_a_refusal_is_said_once(mpirun: Launcher, tmp_path: Path) -> None:
    weights = write_weights(tmp_path, "cnn")
    (tmp_path / "a.png").write_bytes(b"")
    weights.write_bytes(b"nothing")
    done = mpirun(2, module="pneumo.detect", args=[weights, tmp_path / "a.png"], check=False)
    assert done.returncode == 2
    assert done.stderr.count("pneumo: ") == 1

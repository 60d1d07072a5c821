"""A real study of the detector, from a checkpoint with frozen layers to its tables, its models and their answers."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from harness import Launcher, Result
from PIL import Image
from small_study import small_data

from pneumo.installed import horovod_missing, native_missing
from pneumo.models import weights, yolov8

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("models", "study")]
from lively import enliven, shades  # noqa: E402
from pictures import Picture, average_precisions, pycocotools_evaluation  # noqa: E402

pytestmark = pytest.mark.skipif(native_missing() is not None, reason="needs the native layer")

SIZE, FROZEN = 64, 10
SERIAL = "yolo-serial-none-1x1"
OTHERS = ["yolo-ddp-pneumo-2x1", "yolo-fsdp-pneumo-2x1", *([] if horovod_missing() else ["yolo-horovod-mpi-2x1"])]
HALF = (6.0, 9.0)  # pixels of such a picture, from the middle of a usual opacity to its edges
FLOOR = 0.002  # the score from which on boxes are compared
BOX = ["x", "y", "width", "height"]
# What somebody does who has Ultralytics and no pneumo: with a model, a picture, and a file for what is found.
STOCK = f"""
import json, sys
from pathlib import Path
sys.path[:] = [place for place in sys.path if not (Path(place) / "pneumo").exists()]
from ultralytics import YOLO
settings = dict(conf={FLOOR}, iou=0.7, max_det=100, verbose=False, save=False)
(result,) = YOLO(sys.argv[1]).predict(sys.argv[2], **settings)
assert "pneumo" not in sys.modules
found = dict(corners=result.boxes.xyxy.tolist(), scores=result.boxes.conf.tolist())
Path(sys.argv[3]).write_text(json.dumps(found))
"""

State = dict[str, torch.Tensor]


def a_detector() -> State:
    """The weights of a network that has learned nothing, and whose boxes are about as large as the sample's opacities.

    So a few of them are hits, and an average precision of theirs is not 0.
    """
    network: Any = enliven(yolov8.build, seed=2)
    with torch.no_grad():
        for stride, branch in zip(yolov8.STRIDES, network.model[-1].cv2, strict=True):
            sides = torch.tensor(HALF * 2)[:, None] / stride
            branch[-1].bias.copy_((-2 * (torch.arange(16) - sides) ** 2).flatten())
    state: State = network.state_dict()
    return state


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study: its data, the checkpoint that it begins with, its results."""
    folder = tmp_path_factory.mktemp("study")
    weights.write_pt(a_detector(), folder / "given.pt", size=SIZE)
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Result:
    """How the study ended: an epoch of three steps on every backend, alone and on two ranks."""
    flags = ["--model", "yolo", "--size", str(SIZE), "--ranks", "1,2", "--epochs", "1", "--save"]
    begin = ["--learning-rate", "0.0005", "--freeze", str(FROZEN), "--weights", str(place / "given.pt")]
    arguments = [*small_data(place), *flags, *begin, "--comm", "pneumo", "--threads", "1"]
    return Launcher(place)(2, module="pneumo.launch", args=arguments, timeout=280)


@pytest.fixture(scope="module")
def result(done: Result, place: Path) -> Path:
    """The folder of its result."""
    return (place / "out" / "main" / "latest").resolve()


@pytest.fixture(scope="module")
def given(place: Path) -> State:
    """The weights that it began with."""
    return weights.read(place / "given.pt")


@pytest.fixture(scope="module")
def trained(result: Path) -> dict[str, State]:
    """The weights that it ended with, by the names of their files."""
    return {path.stem: weights.read(path) for path in sorted((result / "checkpoints").glob("*.safetensors"))}


def frozen(name: str) -> bool:
    """Whether a tensor of this name is of a frozen layer."""
    return int(name.split(".")[1]) < FROZEN


def distance(ours: State, theirs: State, names: list[str]) -> float:
    """How far these tensors are apart, all together."""
    return math.sqrt(sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in names))


def test_every_backend_has_a_row_and_the_weights_are_named(done: Result, result: Path) -> None:
    assert done.returncode == 0
    assert json.loads((result / "run.json").read_text())["state"] == "done"
    rows = json.loads((result / "summary.json").read_text())["rows"]
    names = [f"{r['model']}-{r['backend']}-{r['comm']}-{r['ranks']}x{r['threads']}" for r in rows]
    assert names == [SERIAL, *OTHERS]
    assert "Traceback" not in done.text
    said = " ".join(done.stdout.split())
    assert "355 tensors of the detector" in said
    assert f"first {FROZEN} layers" in said
    assert "Localization on validation patients" in said


def test_the_maps_are_cocos_of_the_boxes_that_were_kept(result: Path) -> None:
    """By pycocotools, from the boxes alone: not from what is kept of their matches."""
    found = pd.read_parquet(result / "detections.parquet").query("part == 'validate'")
    true = pd.read_parquet(result / "truths.parquet").query("part == 'validate'")
    rows = json.loads((result / "summary.json").read_text())["rows"]
    patients = sorted({*found["patient"], *true["patient"]})
    for row in rows:
        mine = found[found["run"] == row["run"]]
        pictures = []
        for patient in patients:
            boxes, truths = mine[mine["patient"] == patient], true[true["patient"] == patient]
            pictures.append(Picture(boxes[BOX].to_numpy(), boxes["score"].to_numpy(), truths[BOX].to_numpy()))
        expected = average_precisions(pycocotools_evaluation(pictures))
        assert expected[0] > 0, "some box is a hit, so equal figures say something"
        assert (row["metrics"]["map50"], row["metrics"]["map50_95"]) == pytest.approx(expected, abs=1e-9)


def test_frozen_layers_stay_bit_for_bit_and_the_others_learn(given: State, trained: dict[str, State]) -> None:
    """Statistics of batch norm and their counts included; of the others only the constants of the boxes' bins stay."""
    assert sorted(trained) == sorted([SERIAL, *OTHERS])
    assert any(frozen(name) and "running_var" in name for name in given)
    for run, state in trained.items():
        assert state.keys() == given.keys()
        equal = {name for name in given if torch.equal(state[name], given[name])}
        assert equal == {name for name in given if frozen(name) or name == "model.22.dfl.conv.weight"}, run


def test_all_backends_end_with_serials_weights(given: State, trained: dict[str, State]) -> None:
    """Of what they learn in three steps, in float32, they differ by a thousandth at most.

    Measured were 3e-7 of all of it and 4e-5 of a tensor's. Other numbers of cores or another processor sum in another
    order, and such a training enlarges rounding from step to step; so the bounds are far wider.
    """
    serial = trained[SERIAL]
    learnt = [name for name in given if not torch.equal(serial[name], given[name])]
    names = [name for name in learnt if given[name].is_floating_point()]  # no counts of batches, which would outweigh
    for run in OTHERS:
        assert distance(trained[run], serial, names) < 1e-3 * distance(serial, given, names), run
        for name in names:
            rounding = 1e-6 * float(serial[name].double().norm())  # of one that hardly moves
            assert distance(trained[run], serial, [name]) < 1e-2 * distance(serial, given, [name]) + rounding, (
                run,
                name,
            )


def test_a_model_is_saved_for_everybody(result: Path, trained: dict[str, State]) -> None:
    """The same tensors in both files, and what they are."""
    for run, state in trained.items():
        file = result / "checkpoints" / run
        other = weights.read(file.with_suffix(".pt"))
        assert other.keys() == state.keys()
        assert all(torch.equal(other[name], value) for name, value in state.items())
        for suffix in (".pt", ".safetensors"):
            assert weights.described(file.with_suffix(suffix)) == ("yolo", SIZE)
        about = json.loads(file.with_suffix(".json").read_text())
        assert (about["model"], about["size"], about["steps"]) == ("yolo", SIZE, 3)


def test_detect_and_ultralytics_find_the_same_boxes(result: Path, tmp_path: Path) -> None:
    """By one of our files in pneumo, and by the other one in a process that has no pneumo."""
    grey = (torch.nn.functional.interpolate(shades(1, seed=8), SIZE)[0, 0] * 255).byte().numpy()
    Image.fromarray(grey).save(tmp_path / "picture.png")
    saved = result / "checkpoints" / OTHERS[0]
    start = Launcher(tmp_path)
    places: list[str | Path] = [tmp_path / "picture.png", "--json", tmp_path / "ours.json", "--threshold", str(FLOOR)]
    start(None, module="pneumo.detect", args=[saved.with_suffix(".safetensors"), *places])
    alone = {"HOME": str(tmp_path), "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}
    arguments = [saved.with_suffix(".pt"), tmp_path / "picture.png", tmp_path / "theirs.json"]
    start(None, STOCK, args=arguments, env=alone)
    (row,) = json.loads((tmp_path / "ours.json").read_text())["files"]
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    boxes = np.array([[box[key] for key in (*BOX, "score")] for box in row["boxes"]])
    assert row["error"] is None
    assert len(boxes) == len(theirs["scores"]) > 5
    np.testing.assert_allclose(boxes[:, 4], theirs["scores"], atol=1e-4)
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4]])
    apart = np.abs(corners[:, None] - np.reshape(theirs["corners"], (1, -1, 4))).max(axis=2)
    assert max(apart.min(axis=0).max(), apart.min(axis=1).max()) < 1e-2  # in whatever order equal scores come

"""Weights go to Ultralytics and come back with the same boxes; a file that means harm does nothing."""

import builtins
import fractions
import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lively import enliven, shades
from safetensors.torch import save_file

from pneumo.data.loader import scale
from pneumo.errors import PneumoError, Refused
from pneumo.models import pickles, weights, yolov8
from pneumo.models.boxes import detect

SIZE = 160


@pytest.fixture(scope="module")
def lively() -> torch.nn.Module:
    """A network of ours whose boxes and scores differ from cell to cell."""
    return enliven(yolov8.build, seed=2).eval()


@pytest.fixture(scope="module")
def stock(lively: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the report of a process that has Ultralytics and no pneumo; see stock_job."""
    folder = tmp_path_factory.mktemp("stock")
    grey = (shades(1, seed=8)[0, 0] * 255).byte().numpy()
    np.save(folder / "picture.npy", np.repeat(grey[:, :, None], 3, axis=2))
    weights.write_pt(lively.state_dict(), folder / "ours.pt", size=SIZE)
    if find_spec("onnxruntime"):
        weights.write_onnx(lively.state_dict(), folder / "ours.onnx", size=SIZE)
    environment = {
        **{"HOME": str(folder), "YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"},
        **{"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    }
    command = [sys.executable, str(Path(__file__).parent / "stock_job.py"), str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def assert_same_boxes(network: torch.nn.Module, folder: Path, theirs: dict[str, Any]) -> None:
    """Within 1e-3 px, of the picture as the loader gives it."""
    picture = np.load(folder / "picture.npy")[:, :, 0]
    images = torch.from_numpy(scale(picture))[None, None]
    with torch.no_grad():
        ((boxes, scores),) = detect(network.eval()(yolov8.pictures(images)), SIZE, floor=0.02)
    corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    assert 20 < len(boxes) < 100
    apart = np.abs(corners[:, None] - np.reshape(theirs["corners"], (1, -1, 4))).max(axis=2)
    assert apart.shape == (len(boxes), len(boxes))
    assert max(apart.min(axis=0).max(), apart.min(axis=1).max()) < 1e-3  # in whatever order rounding puts equal scores
    np.testing.assert_allclose(scores, theirs["scores"], atol=1e-3)


def test_ultralytics_finds_the_same_boxes_with_our_weights(lively: torch.nn.Module, stock) -> None:
    folder, report = stock
    assert report["ours"]["names"] == [[0, "opacity"]]
    assert report["ours"]["size"] == SIZE
    assert report["ours"]["type"] == "torch.float32"
    assert_same_boxes(lively, folder, report["ours"])


def test_we_find_the_same_boxes_with_weights_of_ultralytics(stock) -> None:
    folder, report = stock
    network = yolov8.build()
    fitted = weights.fit(network, weights.read(folder / "theirs.pt"))
    assert fitted.sentence == "All 355 tensors of the detector were taken from the weights."
    assert (fitted.initialised, fitted.unknown) == ((), ())
    assert_same_boxes(network, folder, report["theirs"])


def test_averaged_weights_are_read_from_the_midst_of_a_training(stock) -> None:
    """With an optimizer, a loss, settings, paths and NumPy's numbers beside them, of which nothing is made."""
    folder, _ = stock
    averaged, finished = weights.read(folder / "training.pt"), weights.read(folder / "theirs.pt")
    assert averaged.keys() == finished.keys()
    assert all(torch.equal(averaged[name], finished[name]) for name in finished)
    assert {value.dtype for value in averaged.values()} == {torch.float32, torch.int64}


def test_layers_for_eighty_classes_stay_initialised_and_are_named(stock) -> None:
    folder, _ = stock
    read = weights.read(folder / "coco.pt")
    network = yolov8.build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fitted = weights.fit(network, read)
    after = network.state_dict()
    misfits = {misfit.name: (misfit.ours, misfit.theirs) for misfit in fitted.initialised}
    assert misfits["model.22.cv3.0.2.weight"] == ((1, 64, 1, 1), (80, 80, 1, 1))
    assert misfits["model.22.cv3.1.0.conv.weight"] == ((64, 128, 3, 3), (80, 128, 3, 3))
    assert len(misfits) == 36
    for name in after:
        assert torch.equal(after[name], before[name] if name in misfits else read[name]), name
    assert "319 of the detector's 355" in fitted.sentence
    assert "model.22.cv3.0.2 (1 x 64 x 1 x 1 here, 80 x 80 x 1 x 1 there)" in fitted.sentence
    assert fitted.sentence.count(" here, ") == 9


@pytest.mark.parametrize(
    ("file", "told"),
    [("segments.pt", "SegmentationModel"), ("v11.pt", "another model: .*C3k2"), ("v8s.pt", "32 x 3 x 3 x 3")],
)
def test_other_models_are_refused_by_name(stock, file: str, told: str) -> None:
    folder, _ = stock
    with pytest.raises(Refused, match=told) as refused:
        weights.fit(yolov8.build(), weights.read(folder / file))
    assert_one_sentence(refused.value)


def test_our_own_file_is_read_as_it_was(lively: torch.nn.Module, tmp_path: Path) -> None:
    state = lively.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    weights.write_pt(state, tmp_path / "model.pt", size=SIZE)
    for file in ("model.safetensors", "model.pt"):
        read = weights.read(tmp_path / file)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], value) for name, value in state.items())


def test_a_file_says_which_model_it_is_and_its_size(lively: torch.nn.Module, tmp_path: Path) -> None:
    state = lively.state_dict()
    weights.write_safetensors(state, tmp_path / "model.safetensors", model="yolo", size=96)
    save_file(state, tmp_path / "bare.safetensors")
    for size, used in ((96, 96), (100, 128)):  # as Ultralytics rounds it
        weights.write_pt(state, tmp_path / f"{size}.pt", size=size)
        assert weights.described(tmp_path / f"{size}.pt") == ("yolo", used)
    assert weights.described(tmp_path / "model.safetensors") == ("yolo", 96)
    assert weights.described(tmp_path / "bare.safetensors") == (None, None)
    read = weights.read(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in state.items())


@pytest.mark.parametrize("said", [None, "96", [96, 96], 96.0, True, -32, {"imgsz": 96}])
def test_a_size_that_is_no_number_of_pixels_is_none(said: object, tmp_path: Path) -> None:
    torch.save({"model": a_network(), "train_args": {"imgsz": said}}, tmp_path / "odd.pt")
    assert weights.described(tmp_path / "odd.pt") == ("yolo", None)
    torch.save({"model": a_network(), "train_args": said}, tmp_path / "odd.pt")
    assert weights.described(tmp_path / "odd.pt") == ("yolo", 96 if isinstance(said, dict) else None)


def test_a_model_of_doubles_is_written_in_single_precision(lively: torch.nn.Module, tmp_path: Path) -> None:
    single = lively.state_dict()
    state = {name: value.double() if value.is_floating_point() else value for name, value in single.items()}
    torch.set_default_dtype(torch.float64)
    try:
        weights.write_pt(state, tmp_path / "model.pt", size=SIZE)
    finally:
        torch.set_default_dtype(torch.float32)
    read = weights.read(tmp_path / "model.pt")
    assert all(torch.equal(read[name], value) for name, value in single.items())


def test_the_checkpoint_names_no_class_of_ours_and_draws_no_random_numbers(
    lively: torch.nn.Module, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    for file in ("a.pt", "b.pt"):
        weights.write_pt(lively.state_dict(), tmp_path / file, size=SIZE, now=moment)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        named = {text for code, text, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"}
    assert any(text.startswith("ultralytics.nn.tasks") for text in named)
    assert {text.split(".")[0].split(" ")[0] for text in named} == {
        "ultralytics",
        "torch",
        "collections",
        "__builtin__",
    }
    loaded = torch.load(tmp_path / "a.pt", weights_only=False)
    assert {type(m) for m in loaded["model"].modules() if "Norm" in type(m).__name__} == {torch.nn.BatchNorm2d}
    assert not loaded["model"].training
    assert loaded["date"] == "2026-01-02T00:00:00+00:00"


def test_a_state_that_is_not_whole_is_not_written(lively: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(lively.state_dict())
    del state["model.22.cv3.0.2.bias"]
    with pytest.raises(Refused, match=r"cv3\.0\.2\.bias"):
        weights.write_pt(state, tmp_path / "model.pt", size=SIZE)
    with pytest.raises(PneumoError, match="Cannot write"):
        weights.write_pt(lively.state_dict(), tmp_path / "absent" / "model.pt", size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_a_sentence_says_what_is_missing(
    lively: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Refused, match="package onnx") as refused:
        weights.write_onnx(lively.state_dict(), tmp_path / "model.onnx", size=SIZE)
    assert_one_sentence(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_onnx_finds_the_same_boxes(lively: torch.nn.Module, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    weights.write_onnx(lively.state_dict(), tmp_path / "model.onnx", size=SIZE)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = shades(count, seed=9).contiguous()
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, lively(images)[0], atol=2e-3)


def test_ultralytics_takes_size_and_class_from_the_onnx(lively: torch.nn.Module, stock) -> None:
    """And finds the boxes that it finds with the .pt."""
    pytest.importorskip("onnxruntime")
    folder, report = stock
    assert report["onnx"]["names"] == [[0, "opacity"]]
    assert report["onnx"]["shape"] == [SIZE, SIZE]
    assert_same_boxes(lively, folder, report["onnx"])


# --- Files that mean harm. Each makes the file `canary` in the folder when it is run.


@cache
def a_network() -> torch.nn.Module:
    """Ultralytics' own, made once."""
    return yolov8.plain()


class Calls:
    """Pickles as a call: what unpickles it calls the function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Nested(torch.nn.Module):
    """A module that pickles as a call; in a network it looks like one more layer."""

    def __init__(self, call: Calls) -> None:
        super().__init__()
        self.hidden = call

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.hidden.__reduce__()


def calls_system(canary: Path) -> object:
    """The usual one."""
    return {"model": Calls(os.system, f"touch {canary}")}


def evaluates(canary: Path) -> object:
    """Needs no module."""
    return {"model": Calls(builtins.eval, f"open({str(canary)!r}, 'w').close()")}


def starts_a_process(canary: Path) -> object:
    """A class, and not a function."""
    return {"model": Calls(subprocess.check_call, ["touch", str(canary)])}


def hides_in_a_layer(canary: Path) -> object:
    """One layer of a network that is right in all else."""
    network = deepcopy(a_network())
    network.model[5].act = Nested(Calls(os.system, f"touch {canary}"))
    return {"model": network}


def hides_beside_the_weights(canary: Path) -> object:
    """The network is right; what nobody reads is not."""
    return {"model": a_network(), "date": Calls(os.system, f"touch {canary}")}


def evaluates_in_an_allowed_class(canary: Path) -> object:
    """Ultralytics' own model evaluates its description's activation as Python, where it is not told to load safely."""
    from ultralytics.nn.tasks import DetectionModel

    description = {**a_network().yaml, "activation": f"open({str(canary)!r}, 'w').close() or torch.nn.SiLU()"}
    return {"model": Calls(DetectionModel, description, 3, 1, False)}


LIVE = [calls_system, evaluates, starts_a_process, hides_in_a_layer, hides_beside_the_weights]
UNSAFE = [*LIVE, evaluates_in_an_allowed_class]


def assert_one_sentence(error: PneumoError) -> None:
    """One line, that ends as a sentence, without a traceback or torch's own advice to load the file nevertheless."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert "weights_only" not in text


def assert_refused(path: Path, canary: Path, match: str = ".", reader: Callable[[Path], object] = weights.read) -> None:
    """Refused in one sentence that names the file, with nothing executed."""
    with pytest.raises(Refused, match=match) as refused:
        reader(path)
    assert not canary.exists()
    assert str(path) in str(refused.value)
    assert_one_sentence(refused.value)


@pytest.mark.parametrize("make", LIVE, ids=lambda make: make.__name__)
def test_the_harm_is_real(make: Callable[[Path], object], tmp_path: Path) -> None:
    """Or the next test would prove nothing."""
    torch.save(make(tmp_path / "canary"), tmp_path / "harm.pt")
    torch.load(tmp_path / "harm.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("make", UNSAFE, ids=lambda make: make.__name__)
def test_a_hostile_checkpoint_is_refused_and_does_nothing(make: Callable[[Path], object], tmp_path: Path) -> None:
    torch.save(make(tmp_path / "canary"), tmp_path / "harm.pt")
    assert_refused(tmp_path / "harm.pt", tmp_path / "canary")


@pytest.mark.parametrize("make", LIVE, ids=lambda make: make.__name__)
def test_a_hostile_pickle_of_another_form_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    """torch's old format, and a pickle alone, of each protocol."""
    canary = tmp_path / "canary"
    torch.save(make(canary), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_refused(tmp_path / "old.pt", canary, "no checkpoint of PyTorch")
    (tmp_path / "alone.pt").write_bytes(pickle.dumps(make(canary)))
    assert_refused(tmp_path / "alone.pt", canary, "no checkpoint of PyTorch")
    for protocol in (0, 4):
        archive(tmp_path / "new.pt", pickle.dumps(make(canary), protocol))
        for reader in (weights.read, weights.described):
            assert_refused(tmp_path / "new.pt", canary, reader=reader)


def archive(path: Path, pickled: bytes, **entry: Any) -> None:
    """An archive as torch writes it, with this pickle in it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", **entry) as other:
        for name in whole.namelist():
            other.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))


def test_the_attribute_of_a_function_is_not_reached(tmp_path: Path) -> None:
    pickled = (
        b"\x80\x02}X\x05\x00\x00\x00modelcbuiltins\ngetattr\ncultralytics.nn.tasks\nDetectionModel\n"
        b"X\x04\x00\x00\x00load\x86Rs."
    )
    archive(tmp_path / "harm.pt", pickled)
    assert_refused(tmp_path / "harm.pt", tmp_path / "canary", r"asks for builtins\.getattr")


def test_an_allowed_class_cannot_be_given_a_method(tmp_path: Path) -> None:
    """BUILD with a `__setstate__` of the file's, then BUILD again, which would call it: with a class, or with text."""
    model = b"cultralytics.nn.tasks\nDetectionModel\n"
    for method in (model, b"ctorch._utils\n_rebuild_parameter\n", b"X\x01\x00\x00\x00x"):
        pickled = (
            b"\x80\x02}X\x05\x00\x00\x00model" + model + b")\x81}X\x0c\x00\x00\x00__setstate__" + method + b"sb}b}bs."
        )
        archive(tmp_path / "harm.pt", pickled)
        assert_refused(tmp_path / "harm.pt", tmp_path / "canary", "not built as Ultralytics")


def test_what_is_read_is_of_plain_tensors_alone(tmp_path: Path) -> None:
    """Modules without end, names that are no text, tensors that claim more than the file holds."""

    def module(state: dict[str, Any]) -> Any:
        made = torch.nn.Sequential()
        made.__dict__.update(state)
        return made

    network = deepcopy(a_network())
    circle = torch.nn.Sequential()
    circle._modules["again"] = circle
    huge = torch.nn.Parameter(torch.zeros(1).expand(300_000, 1000))
    bad = {
        "without end": circle,
        "no text": module({"_modules": {7: torch.nn.SiLU()}}),
        "no plain tensor": module({"_buffers": {"b": torch.eye(2).to_sparse()}}),
        "more numbers": module({"_parameters": {"p": huge}}),
        "no tensor": module({"_parameters": {"p": "text"}}),
        "no _buffers": module({"_buffers": None}),
        "no module": module({"_modules": {"m": "text"}}),
    }
    for told, layer in bad.items():
        network._modules["model"] = layer
        torch.save({"model": network}, tmp_path / "odd.pt")
        assert_refused(tmp_path / "odd.pt", tmp_path / "canary", told)


def test_the_words_of_a_file_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    archive(tmp_path / "loud.pt", b"\x80\x02cmod\x1b[2Jule\nname\n.")
    assert_refused(tmp_path / "loud.pt", tmp_path / "canary", r"asks for mod\?\[2Jule\.name,")
    network = deepcopy(a_network())
    network._modules["two\nlines"] = "text"
    torch.save({"model": network}, tmp_path / "loud.pt")
    assert_refused(tmp_path / "loud.pt", tmp_path / "canary", r"\(two\?lines\. is no module\)")


def test_others_permissions_do_not_widen_ours(tmp_path: Path) -> None:
    """A class that somebody else allowed in this process is not allowed to our files, and keeps its permission."""
    usual = set(torch.serialization.get_safe_globals())
    torch.save({"model": a_network(), "more": fractions.Fraction(1, 2)}, tmp_path / "more.pt")
    with torch.serialization.safe_globals([fractions.Fraction, yolov8.DetectionModel]):
        before = set(torch.serialization.get_safe_globals())
        assert_refused(tmp_path / "more.pt", tmp_path / "canary", r"asks for fractions\.Fraction")
        assert set(torch.serialization.get_safe_globals()) == before
    torch.save({"model": a_network()}, tmp_path / "right.pt")
    assert len(weights.read(tmp_path / "right.pt")) == 355
    assert set(torch.serialization.get_safe_globals()) == usual


def test_what_is_allowed_is_of_the_library_or_does_nothing() -> None:
    """Each name on the list is a class of ours meanwhile, so that the file can call it without effect."""
    for stand_in, name in pickles._STAND_INS:
        assert stand_in.__module__ == "pneumo.models.pickles"
        assert stand_in.kind == name
        made = stand_in("anything", 1)
        assert made.state is None
        assert not hasattr(made, "__dict__")
    assert not any(name.startswith(("builtins.", "os.", "posix.")) for name in pickles.ALLOWED)


def test_files_of_other_kinds_are_refused_each_in_a_sentence(lively: torch.nn.Module, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    whole = tmp_path / "whole.pt"
    weights.write_pt(lively.state_dict(), whole, size=SIZE)
    content = whole.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 10):
        (tmp_path / "part.pt").write_bytes(content[:length])
        assert_refused(tmp_path / "part.pt", canary, "only a part")
    flipped = bytearray(content)
    flipped[content.index(b"data.pkl") + 100 : content.index(b"data.pkl") + 140] = b"\xff" * 40
    (tmp_path / "flipped.pt").write_bytes(flipped)
    assert_refused(tmp_path / "flipped.pt", canary, "damaged")
    (tmp_path / "text.pt").write_text("no weights\n")
    assert_refused(tmp_path / "text.pt", canary, "no checkpoint of PyTorch")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as other:
        other.writestr("mimetype", "application/epub+zip")
    assert_refused(tmp_path / "zip.pt", canary, "is a zip file")
    archive(tmp_path / "small.pt", pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED)
    assert_refused(tmp_path / "small.pt", canary, "is a zip file")
    assert_refused(tmp_path, canary, "Is a directory")
    assert_refused(tmp_path / "absent.pt", canary, "No such file")
    with warnings.catch_warnings(action="ignore"):  # torch advises against making such files
        torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "script.pt"))
    assert_refused(tmp_path / "script.pt", canary, "is a zip file")
    for value in (
        [],
        {"model": 3},
        {"model": None},
        torch.zeros(2),
        {"weight": torch.zeros(2)},
        {"ema": torch.nn.SiLU()},
    ):
        torch.save(value, tmp_path / "other.pt")
        assert_refused(tmp_path / "other.pt", canary, "no detection model")
    archive(tmp_path / "v5.pt", b"\x80\x02}X\x05\x00\x00\x00modelcmodels.yolo\nDetectionModel\n)\x81s.")
    assert_refused(tmp_path / "v5.pt", canary, "YOLOv5")


def test_files_of_safetensors_are_refused_each_in_a_sentence(lively: torch.nn.Module, tmp_path: Path) -> None:
    path, canary = tmp_path / "model.safetensors", tmp_path / "canary"
    for reader in (weights.read, weights.described):
        path.unlink(missing_ok=True)
        assert_refused(path, canary, "No such file", reader)
        path.write_bytes(b"no weights")
        assert_refused(path, canary, "no safetensors file", reader)
        save_file(lively.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-4])
        assert_refused(path, canary, "only a part", reader)
    save_file({"conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(Refused, match="not YOLOv8n") as refused:
        weights.fit(yolov8.build(), weights.read(path))
    assert_one_sentence(refused.value)

"""The detector's network and loss against Ultralytics' own, and the process that imports them stays as it was."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pneumo
from pneumo.models import yolov8
from pneumo.models.yolov8 import Loss, build, pictures

SIZE = 64
ONE = np.array([[0.1, 0.2, 0.4, 0.5]], np.float32)
TWO = np.array([[0.5, 0.5, 0.3, 0.2], [0.05, 0.4, 0.2, 0.5]], np.float32)
NONE = np.zeros((0, 4), np.float32)


@contextmanager
def doubles() -> Iterator[None]:
    """float64 everywhere."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return build()


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Random pictures as the loader gives them: one channel, between -2 and 2."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, SIZE, SIZE, generator=random, dtype=torch.get_default_dtype()) * 4 - 2


def ultralytics_loss(network: torch.nn.Module, raw: object, boxes: list[np.ndarray]) -> torch.Tensor:
    """Ultralytics' loss of a batch by its own way in, from the network's own settings; boxes around their centres."""
    from types import SimpleNamespace

    from ultralytics.utils import DEFAULT_CFG_DICT
    from ultralytics.utils.loss import v8DetectionLoss

    network.args = SimpleNamespace(**DEFAULT_CFG_DICT)
    rows = [(i, x + w / 2, y + h / 2, w, h) for i, found in enumerate(boxes) for x, y, w, h in found.tolist()]
    table = torch.tensor(rows).reshape(-1, 5)
    batch = {"batch_idx": table[:, 0], "cls": torch.zeros(len(table)), "bboxes": table[:, 1:]}
    return v8DetectionLoss(network)(raw, batch)[0].sum()


def test_it_is_ultralytics_network_with_one_class() -> None:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(3)
    ours, after = build(), torch.rand(1)
    torch.manual_seed(3)
    theirs = DetectionModel("yolov8n.yaml", ch=3, nc=1, verbose=False)
    assert torch.equal(after, torch.rand(1))  # and the generator is where theirs would have left it
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert {n: m.eps for n, m in ours.named_modules() if isinstance(m, torch.nn.BatchNorm2d)} == {
        n: 1e-3 for n, m in theirs.named_modules() if isinstance(m, torch.nn.BatchNorm2d)
    }
    assert ours.names == {0: "opacity"}
    assert ours.training
    assert ours.stride.tolist() == list(yolov8.STRIDES)
    assert sum(p.numel() for p in ours.parameters()) == 3_011_043
    shown = pictures(images(2))
    for module in (ours, theirs):
        module.eval()
    with torch.no_grad():
        assert torch.equal(ours(shown)[0], theirs(shown)[0])


def test_building_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    build()
    assert capfd.readouterr() == ("", "")


def test_the_constants_are_ultralytics_own() -> None:
    head = yolov8.plain().model[-1]
    assert (head.nc, head.reg_max, head.stride.tolist()) == (1, yolov8.BINS, list(yolov8.STRIDES))
    assert yolov8.GAINS == {"box": 7.5, "cls": 0.5, "dfl": 1.5}


def test_pictures_are_grey_between_black_and_white() -> None:
    from pneumo.data.loader import scale

    grey = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    shown = pictures(torch.from_numpy(scale(grey)))
    assert shown.shape == (1, 3, 16, 16)
    for channel in shown[0]:
        np.testing.assert_allclose(channel, grey[0, 0] / 255.0, atol=1e-7)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("boxes", [[ONE, TWO, NONE], [TWO], [NONE, ONE], [NONE, NONE]], ids=str)
def test_loss_is_ultralytics_own_before_it_is_divided(network, boxes: list[np.ndarray], mode: str) -> None:
    network.train(mode == "training")
    raw = network(pictures(images(len(boxes))))
    total, weight = Loss()(raw, boxes)
    assert total.shape == weight.shape == ()
    theirs = ultralytics_loss(network, raw, boxes)
    ours = total / max(weight.item(), 1) * len(boxes)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (weight.item() == 0) == all(len(found) == 0 for found in boxes)


def test_a_weight_below_one_is_not_clamped(network) -> None:
    """Untrained scores are about 0.01, so one small box alone has a target sum far below what Ultralytics clamps to."""
    network.eval()
    small = np.array([[0.40, 0.40, 0.13, 0.13]], np.float32)
    with torch.no_grad():
        _, weight = Loss()(network(pictures(images(1))), [small])
    assert 0 < weight.item() < 1


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.integers(0, 2**32 - 1), st.data())
def test_losses_and_weights_of_shares_add_up(network, counts: list[int], seed: int, data: st.DataObject) -> None:
    """Whatever the shares, with images without boxes and shares without images among them."""
    double = deepcopy(network).double().eval()
    random = np.random.default_rng(seed)
    corners = [random.uniform(0, 0.6, (count, 2)) for count in counts]
    boxes = [np.hstack([c, random.uniform(0.05, 0.4, c.shape)]).astype(np.float32) for c in corners]
    cut = data.draw(st.integers(0, len(boxes)))
    with doubles(), torch.no_grad():
        shown = pictures(images(len(boxes), seed % 1000))
        whole = torch.stack(Loss()(double(shown), boxes))
        shares = [Loss()(double(shown[part]), boxes[part]) for part in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(sum(torch.stack(share) for share in shares), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("boxes", [[ONE, NONE], [NONE, NONE], []], ids=["one", "none", "no images"])
def test_every_parameter_gets_a_gradient(boxes: list[np.ndarray]) -> None:
    network = build().eval()  # batch normalisation over no images is another module's matter
    total, _ = Loss()(network(pictures(images(len(boxes)))), boxes)
    total.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert len(gradients) == len(list(network.parameters())) - 1  # the bins' own numbers are not trained
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    reached = {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    if boxes:
        assert any("22.cv3" in name for name in reached)
        assert any("22.cv2" in name for name in reached) == any(len(found) for found in boxes)
    else:
        assert reached == set()
        assert total.item() == 0


def test_float64_works_from_end_to_end() -> None:
    boxes = [ONE, NONE, TWO]
    with doubles():
        torch.manual_seed(4)
        network = build()
        raw = network(pictures(images(3)))
        total, weight = Loss()(raw, boxes)
        assert total.dtype == weight.dtype == torch.float64
        theirs = ultralytics_loss(network, raw, boxes)
        assert (total / max(weight.item(), 1) * 3).item() == pytest.approx(theirs.item(), rel=1e-14)
        total.backward()
    single, _ = Loss()(network.float()(pictures(images(3))), boxes)
    assert single.dtype == torch.float32
    assert single.isfinite()


def test_one_module_alone_imports_ultralytics() -> None:
    """Beside it only the benchmark's rival, which is a process of its own."""
    package = Path(pneumo.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "ultralytics" for name in names):
                found.add(str(file.relative_to(package)))
        if re.search(r"import_module\(\s*[\"']ultralytics", file.read_text()):
            found.add(str(file.relative_to(package)))
    assert found == {"models/yolov8.py", "bench/rival.py"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What an import in a process of its own, with an empty home, did to the process and outside it."""
    home = tmp_path_factory.mktemp("home")
    temporary = home / "tmp"
    temporary.mkdir()
    environment = {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        # As of a rank that torchrun has started, which would make Ultralytics wait for others.
        **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    }
    file = Path(__file__).parent / "import_job.py"
    done = subprocess.run(
        [sys.executable, str(file)], env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    report["stdout"], report["stderr"] = done.stdout.splitlines()[:-1], done.stderr
    report["left"] = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    return report


def test_the_import_asks_nothing_of_the_network_and_starts_nothing(imported: dict[str, object]) -> None:
    assert imported["asked"] == []


def test_the_import_writes_to_its_own_folder_alone_and_removes_it(imported: dict[str, object]) -> None:
    assert imported["written"], "the settings file was not seen: nothing was watched"
    assert imported["outside"] == []
    assert imported["left"] == ["tmp"]


def test_the_import_leaves_the_process_as_it_was(imported: dict[str, object]) -> None:
    assert imported["changed"] == {}
    undone = {"environment", "torch functions", "pillow", "threads", "printing", "warnings", "loggers"}
    assert undone <= set(imported["unguarded"]), "the comparison does not see what there is to undo"


def test_the_import_says_nothing(imported: dict[str, object]) -> None:
    assert (imported["stdout"], imported["stderr"]) == ([], "")


def test_the_import_waits_for_no_other_rank(imported: dict[str, object]) -> None:
    assert imported["barriers"] == 0

"""The detector as a task: its gradients are Ultralytics' own, and its answers are in fractions of the picture."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from pneumo.models import Settings, yolo, yolov8
from pneumo.models.task import Share, Team
from pneumo.models.yolo import YoloTask

SIZE = 64


def share(images: int, *, groups: int = 1) -> Share:
    """Pictures with a bright square each, but for the first, where it is."""
    generator = torch.Generator().manual_seed(images)
    pictures = torch.randn(images, 1, SIZE, SIZE, generator=generator) * 0.2 - 1
    pictures[1:, :, 16:40, 16:40] += 2
    square = np.array([[0.25, 0.25, 0.375, 0.375]], np.float32)
    boxes = tuple(np.zeros((0, 4), np.float32) if i == 0 else square for i in range(images))
    lengths = [images // groups] * groups
    return Share(pictures, torch.ones(images), boxes, lengths, groups, images)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of all trained parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def doubles() -> Iterator[None]:
    """New tensors are float64: in float32 rounding decides which of two nearly equal values a pool takes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
def test_gradients_are_those_of_ultralytics_network_and_loss_over_the_batch() -> None:
    """But for the number of images, with which its trainer multiplies the loss."""
    batch = share(4)
    task = YoloTask(Settings(SIZE, 1e-3, "local"))
    torch.manual_seed(1)
    model = task.build().train()
    (task.loss(model, batch) / batch.total).backward()
    factor = task.factor(batch)
    found = gradients(model)
    torch.manual_seed(1)
    theirs = yolov8.plain().train()
    total, weight = yolov8.Loss()(theirs(yolov8.pictures(batch.images)), batch.boxes)
    (total / weight.detach().clamp(min=1)).backward()
    assert found.keys() == gradients(theirs).keys()
    for name, expected in gradients(theirs).items():
        scale = expected.abs().max().clamp(min=1e-6)
        assert ((factor * found[name] - expected).abs().max() / scale) < 1e-9, name
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)


def test_an_empty_share_adds_nothing_and_takes_part() -> None:
    calls: list[torch.Tensor] = []

    def summed(tensor: torch.Tensor) -> Any:
        calls.append(tensor)
        tensor += 2.0  # the other rank's target scores

        class Pending:
            def wait(self) -> torch.Tensor:
                return tensor

        return Pending()

    task = YoloTask(Settings(SIZE, 1e-3, "ghost"), Team(2, lambda tensor: tensor, summed))
    torch.manual_seed(1)
    model = task.build().train()
    empty = Share(torch.zeros(0, 1, SIZE, SIZE), torch.zeros(0), (), [0], 1, 3)
    (task.loss(model, empty) / empty.total).backward()
    assert task.factor(empty) == 3 / 2
    assert len(calls) == 1
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(gradients(model)) == set(trained), "DDP and Horovod wait for a gradient of each"


def test_groups_do_not_see_each_other() -> None:
    """With ghost statistics a batch of two groups has the summed loss of the two by themselves."""
    torch.manual_seed(1)
    task = YoloTask(Settings(SIZE, 1e-3, "ghost"))
    model = task.build().train()
    whole = share(4, groups=2)
    together = float(task.loss(model, whole).detach())
    apart = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        part = Share(whole.images[half], whole.labels[half], whole.boxes[half], [2], 1, 2)
        apart += float(task.loss(model, part).detach())
    assert together == pytest.approx(apart, rel=1e-4)


def test_answers_are_fractions_with_the_best_first() -> None:
    task = YoloTask(Settings(SIZE, 1e-3, "local"))
    torch.manual_seed(1)
    model = task.build().eval()
    nn.init.constant_(model.model[-1].cv3[0][-1].bias, 0.0)  # so that there are boxes
    with torch.no_grad():
        answers = task.answers(model, share(3).images)
        nothing = task.answers(model, torch.zeros(0, 1, SIZE, SIZE))
    assert answers.scores.shape == (3,)
    assert len(answers.boxes) == 3
    for score, boxes in zip(answers.scores, answers.boxes, strict=True):
        assert boxes.shape[1] == 5
        assert (boxes[:, :4] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:4] <= 1 + 1e-6).all()
        assert score == boxes[0, 4] == boxes[:, 4].max()
    assert nothing.scores.shape == (0,)
    assert nothing.boxes == ()


def test_frozen_layers_are_the_first_ones() -> None:
    model = YoloTask(Settings(SIZE, 1e-3, "local", None, 10)).build()
    layers = {name: int(name.split(".")[1]) for name, _ in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    never = {"model.22.dfl.conv.weight"}  # counts from 0 to 15
    assert trained == {name for name, layer in layers.items() if layer >= 10} - never


@pytest.mark.parametrize("mode", ["sync", "ghost", "local"])
def test_frozen_layers_stay_as_they_are_to_the_bit(mode: Literal["sync", "ghost", "local"]) -> None:
    """Batch norm's statistics and the average of the weights included."""
    frozen = 4
    task = YoloTask(Settings(SIZE, 1e-3, mode, None, frozen))
    torch.manual_seed(1)
    model = task.build()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = task.optimizer(model.parameters())
    recipe = task.recipe(model, optimizer, sharded=False)
    batch = share(4)
    for progress in (0.2, 0.3):
        (task.loss(model.train(), batch) / batch.total).backward()
        recipe.adjust(task.factor(batch), progress)
        optimizer.step()
        optimizer.zero_grad()
        recipe.follow()
    with recipe.averaged():
        task.settle()
        after = model.state_dict()
        for name, value in before.items():
            if int(name.split(".")[1]) < frozen:
                assert torch.equal(after[name], value), name
            elif name.endswith("running_mean"):
                assert not torch.equal(after[name], value), f"{name} is trained, so this test can fail"


@pytest.mark.parametrize("installed", [True, False])
def test_export_writes_what_other_programs_read(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX only where its package is, which is nothing that has to be installed."""
    if not installed:
        monkeypatch.setattr(yolo, "find_spec", lambda _name: None)
    elif not find_spec("onnx"):
        pytest.skip("the package onnx is not installed")
    task = YoloTask(Settings(SIZE, 1e-3, "ghost"))
    task.export(task.build().state_dict(), tmp_path / "yolo-ddp-gloo-2x1")
    assert {path.suffix for path in tmp_path.iterdir()} == ({".pt", ".onnx"} if installed else {".pt"})


def test_a_model_that_onnx_refuses_is_kept_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nand a page of graph")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    task = YoloTask(Settings(SIZE, 1e-3, "ghost"))
    with pytest.warns(RuntimeWarning, match=r"yolo is kept without ONNX: torch \S+ cannot write .*: no such operator$"):
        task.export(task.build().state_dict(), tmp_path / "yolo")
    assert [path.name for path in tmp_path.iterdir()] == ["yolo.pt"]

"""The detector: YOLOv8n with one class, trained so that the result does not depend on the number of ranks."""

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pneumo.errors import PneumoError
from pneumo.models import yolov8
from pneumo.models.batchnorm import Norms
from pneumo.models.boxes import detect
from pneumo.models.recipe import DetectorRecipe, decay_groups
from pneumo.models.task import Answers, Pending, Recipe, Share, Task
from pneumo.models.weights import fit, read, write_onnx, write_pt

WEIGHT_DECAY = 5e-4


class YoloTask(Task):
    """Opacities and where they are: Ultralytics' network and loss, AdamW.

    Ultralytics divides a batch's loss by the sum of its target scores. Here the loss is the plain sum and the gradients
    are divided by the sum over the whole batch, which travels while the backward pass runs: any division of a batch
    among ranks gives the same gradients. They are Ultralytics' own on one device, but for its factor of the images in a
    batch, which AdamW does not see.
    """

    with_boxes = True

    def build(self) -> nn.Module:
        """Make the network; batch norm in the mode that is asked for."""
        model = yolov8.build()
        if self.settings.weights is not None:
            fit(model, read(self.settings.weights))
        for name, parameter in model.named_parameters():
            layer = int(name.split(".")[1])
            if layer < self.settings.freeze:
                parameter.requires_grad = False
        activating = yolov8.give_activations(model)
        self._norms = Norms(model, self.settings.batch_norm, self.team.sum, self.team.ranks, activating)
        self._loss = yolov8.Loss()
        self._weight: Pending | None = None
        return model

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """The network's layers."""
        return list(model.model.children())  # type: ignore[union-attr]

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Make a fused AdamW; biases and batch norm's parameters do not decay."""
        groups = decay_groups(parameters, WEIGHT_DECAY)
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, fused=True)

    def recipe(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> Recipe:
        """Warm-up, cosine, clipping and averaging."""
        return DetectorRecipe(model, optimizer, self.team.sum if sharded else lambda tensor: tensor)

    def loss(self, model: nn.Module, share: Share) -> torch.Tensor:
        """Return the sum of the loss, and begin to sum the target scores over the ranks.

        An empty share goes through the network as one blank image of no weight: its ranks take part in everything.
        """
        images, boxes, weight = share.images, share.boxes, 1.0
        if not len(images):
            images, boxes, weight = images.new_zeros(1, *images.shape[1:]), (np.zeros((0, 4), np.float32),), 0.0
        self._norms.of_batch(share.lengths, share.groups)
        total, scores = self._loss(model(_pictures(images)), boxes)
        self._weight = self.team.begin_sum((weight * scores.detach()).double().cpu().reshape(1))
        return weight * total

    def factor(self, share: Share) -> float:
        """Return the images of the batch over its sum of target scores (at least 1, as Ultralytics has it)."""
        assert self._weight is not None, "a factor belongs to a loss"
        scores = float(self._weight.wait())
        self._weight = None
        return share.total / max(scores, 1.0)

    def export(self, weights: Mapping[str, torch.Tensor], stem: Path) -> None:
        """Write STEM.pt, which `ultralytics.YOLO` loads, and STEM.onnx where the package onnx is installed.

        That ONNX cannot be written is a warning: the model is kept without it, and a study does not end for it.
        """
        write_pt(weights, stem.with_name(f"{stem.name}.pt"), size=self.size)
        if find_spec("onnx"):
            try:
                write_onnx(weights, stem.with_name(f"{stem.name}.onnx"), size=self.size)
            except PneumoError as error:
                warnings.warn(f"{stem.name} is kept without ONNX: {error}", RuntimeWarning, stacklevel=2)

    def settle(self) -> None:
        """Make the running statistics equal on all ranks."""
        self._norms.settle()

    def answers(self, model: nn.Module, images: torch.Tensor) -> Answers:
        """Return the boxes, and for each image the score of the best one as the probability."""
        found = detect(model(_pictures(images)), self.size)  # also of none: a sharded model's pass is collective
        boxes = tuple(np.column_stack([b / self.size, s]).astype(np.float32).reshape(-1, 5) for b, s in found)
        return Answers(np.array([max(s, default=0.0) for _, s in found], np.float32), boxes)


def _pictures(images: torch.Tensor) -> torch.Tensor:
    """What the network sees, in torch's default type and the memory format that its convolutions are faster in."""
    seen = yolov8.pictures(images.to(torch.get_default_dtype()))
    return seen.contiguous(memory_format=torch.channels_last)

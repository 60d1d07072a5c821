"""How a detector is updated: a rate that rises and falls, gradients that are held in bounds, averaged parameters."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pneumo.models.task import Recipe

WARMUP = 0.1  # of all steps
LAST_RATE = 0.01  # of the highest one
MOST_NORM = 10.0
# Of the average, as Ultralytics has it: the decay rises to MOST_DECAY with the number of updates.
MOST_DECAY, DECAY_UPDATES = 0.9999, 2000


def rate_factor(progress: float) -> float:
    """The part of the highest rate at a point of the training from 0 to 1: a linear rise, then half a cosine."""
    if progress < WARMUP:
        return max(progress / WARMUP, LAST_RATE)
    fallen = (progress - WARMUP) / (1 - WARMUP)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * fallen)) / 2


class DetectorRecipe(Recipe):
    """Warm-up and cosine, clipping by the norm of the whole gradient, an exponential average of the model.

    Everything acts on what a rank holds, its shards where parameters are sharded; only the norm needs the other ranks:
    `norm_sum` sums over them, and does nothing where every rank holds the whole gradient.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, norm_sum: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._optimizer, self._norm_sum = optimizer, norm_sum
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._held = [_local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
        self._held = [tensor for tensor in self._held if tensor.is_floating_point()]
        self._average = [tensor.clone() for tensor in self._held]
        self._updates = 0

    def adjust(self, factor: float, progress: float) -> None:
        """Set the rate; multiply the gradients by the factor, and by less where their norm would exceed MOST_NORM."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor(progress)
        gradients = [_local(p.grad) for p in self._parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
        squares = self._norm_sum(norms.double().square().sum().cpu())
        norm = factor * math.sqrt(float(squares))
        torch._foreach_mul_(gradients, factor * min(1.0, MOST_NORM / (norm + 1e-6)))

    def follow(self) -> None:
        """Move the average towards the parameters and buffers."""
        self._updates += 1
        decay = MOST_DECAY * (1 - math.exp(-self._updates / DECAY_UPDATES))
        torch._foreach_lerp_(self._average, self._held, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, parameters and buffers are the averaged ones; what happens to buffers there stays in the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for held, average in zip(self._held, self._average, strict=True):
            kept = held.clone()
            held.copy_(average)
            average.copy_(kept)


def decay_groups(parameters: Any, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights of layers decay, biases and scales (one dimension) do not."""
    wanted = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part

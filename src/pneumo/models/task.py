"""What the training loop needs to know of a model: how to build it, its loss, and what it answers."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class Task(ABC):
    """A model with its loss and its answers; `size` is the edge of its square input in pixels."""

    def __init__(self, size: int, learning_rate: float) -> None:
        self.size, self.learning_rate = size, learning_rate

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the model with random parameters from torch's global generator."""

    @abstractmethod
    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Make the optimizer of this task over (possibly sharded) parameters."""

    @abstractmethod
    def loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the *sum* of the loss over (b, 1, size, size) images and its weight, here their number b."""

    @abstractmethod
    def answers(self, model: nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
        """Return the probability of pneumonia of each of (b, 1, size, size) images, shape (b,)."""

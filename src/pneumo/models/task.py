"""What the training loop needs to know of a model: how to build it, its loss, its updates, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pneumo.models import Settings

Boxes = tuple[NDArray[np.float32], ...]


class Pending(Protocol):
    """A sum over the ranks that is under way."""

    def wait(self) -> torch.Tensor:
        """Return the tensor, summed; whoever waits is blocked."""


@dataclass(frozen=True, slots=True)
class _Done:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that train a model together, and how they sum small CPU tensors in place; this one is a rank alone."""

    ranks: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    begin_sum: Callable[[torch.Tensor], Pending] = _Done


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's share of a global batch, on the model's device: images (b, 1, size, size), labels (b,), possibly none.

    `boxes` are the true ones of each image, float32 (k, 4): x, y, width, height as fractions of the picture's edge;
    none where the task has no use for them. `lengths` are the images of this rank's virtual groups, and `groups` the
    number of groups that have images over all ranks. `total` counts the images of the whole batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    boxes: Boxes
    lengths: Sequence[int]
    groups: int
    total: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says of b images: `scores` (b,), the probability of pneumonia, and the boxes that it found if any.

    `boxes` is () or holds for each image float32 (k, 5): x, y, width, height as fractions of the picture's edge, and
    the score; the best first.
    """

    scores: NDArray[np.float32]
    boxes: Boxes = ()


class Recipe:
    """What goes with an update of the parameters beside the optimizer; this one adds nothing."""

    def adjust(self, factor: float, progress: float) -> None:
        """Before the update: the gradients, which are those of all ranks, are to be multiplied by `factor`.

        `progress` is the part of the training that is done, from 0 to 1. Collective where parameters are sharded.
        """

    def follow(self) -> None:
        """After the update."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model is the one that is evaluated and kept."""
        yield


class Task(ABC):
    """A model with its loss, its updates and its answers, on one of the ranks that train it together."""

    with_boxes: ClassVar[bool] = False  # whether batches have to bring the true boxes

    def __init__(self, settings: Settings, team: Team | None = None) -> None:
        self.settings, self.team = settings, team or Team()

    @property
    def size(self) -> int:
        """The edge of the pictures in pixels."""
        return self.settings.size

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the model: random parameters are from torch's global generator."""

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """The parts of a model that are computed one after the other: those that a sharded one gathers one by one."""
        return list(model.children())

    @abstractmethod
    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Make the optimizer of this task over (possibly sharded) parameters."""

    @abstractmethod
    def loss(self, model: nn.Module, share: Share) -> torch.Tensor:
        """Return the *sum* of the loss over the images of a share, a scalar; 0 for an empty one.

        The loop divides it by the images of the whole batch, and multiplies the gradients by `factor` of that batch.
        """

    def factor(self, share: Share) -> float:
        """By what the gradients of the last loss over the images of the whole batch are to be multiplied.

        That is 1 where every image weighs the same; else this ends a sum that `loss` has begun.
        """
        return 1.0

    def recipe(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> Recipe:
        """Make what goes with this task's updates of a model; `sharded`: a rank has shards of the parameters."""
        return Recipe()

    def export(self, weights: Mapping[str, torch.Tensor], stem: Path) -> None:  # noqa: B027 -- nothing is usual
        """Write a trained model, by a serial model's names, for other programs: as files STEM.something."""

    def settle(self) -> None:  # noqa: B027 -- nothing is the usual case
        """Before an evaluation: make equal on all ranks what each has kept for itself. Collective."""

    @abstractmethod
    def answers(self, model: nn.Module, images: torch.Tensor) -> Answers:
        """Return the answers to (b, 1, size, size) images; b may be 0."""

    def evidence(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Return where in (b, 1, size, size) images the evidence for pneumonia lies: (b, size, size), at least 0.

        Only of models whose entry in the table says `maps_evidence`.
        """
        raise NotImplementedError

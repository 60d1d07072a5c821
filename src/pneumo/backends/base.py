"""What a way to train in parallel has to offer to the training loop; serial is the null implementation of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pneumo.comm.records import GroupRecords
from pneumo.timing.record import Recorder

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a training runs: the ranks of its communicator, its process group (None without c10d), its device."""

    comm: Any  # mpi4py.MPI.Comm of the first k ranks
    group: Any  # torch.distributed.ProcessGroup | None
    device: torch.device


class Backend(ABC):
    """One way to train one model on the ranks of a place.

    Gradients are *summed* over the ranks, never averaged: the loop divides each rank's loss by the weight of the whole
    global batch, so uneven and empty shares are exact. A backend tells the recorder when the main thread is blocked
    and never reads the clock for the phases itself; its collectives are recorded by the process group's hooks.
    """

    sharded: ClassVar[bool] = False  # whether a rank has shards of the parameters

    def __init__(self, place: Place, recorder: Recorder) -> None:
        self.place, self.recorder = place, recorder
        if place.group is not None:
            recorder.source = GroupRecords(place.group, f"{place.group.size()} ranks")
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, parts: Sequence[nn.Module]) -> None:
        """Take the model (equal on all ranks, on the place's device); sets `model` and `optimizer`.

        `parts` are those of the model that are computed one after the other.
        """

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's scalar loss; they are complete after `synchronize`, not before."""
        loss.backward()  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:  # noqa: B027 -- complete after the backward pass is the usual case
        """Return when the gradients are the sums over all ranks."""

    def step(self) -> None:
        """Update the parameters from the gradients, and free these."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluated(self) -> None:  # noqa: B027 -- nothing to undo is the usual case
        """After forward passes without a backward pass: leave nothing of them to the next training step."""

    def pause(self) -> None:
        """Give back what other trainings of this world need while this one sleeps."""
        self.recorder.detach()

    def resume(self) -> None:
        """Undo `pause`; also called before `prepare`."""
        self.recorder.attach()

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the whole model's parameters and buffers on every rank; collective where they are sharded."""
        return {name: value.detach() for name, value in self.module.state_dict().items()}

    @property
    def module(self) -> nn.Module:
        """The model without a wrapper around it: names in it are those of a serial model."""
        return self.model

    def close(self) -> None:  # noqa: B027 -- nothing to do is the usual case
        """Free what the backend holds beyond its tensors."""


def local_bytes(tensors: Any) -> int:
    """The bytes that tensors take on this rank; of a sharded tensor only this rank's shard counts."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            total += part.numel() * part.element_size()
    return total

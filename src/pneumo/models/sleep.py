"""A model whose compute is sleep: for learning how the account works, and for proving it by injected causes.

Ranks that sleep do not fight for cores, so on any machine N ranks finish their shares in 1/N of the time, and what is
injected shows as exactly what it is. Everything else is real: parameters, gradients, collectives, the optimizer; its
answers are those of a tiny model, and no figures of the study.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name that everybody uses
from torch import nn

from pneumo.models.cnn import CnnTask

EDGE, HIDDEN = 32, 24  # about 100 KB of gradients, whatever the pictures' size
FORWARD_S, BACKWARD_S = 0.001, 0.002  # of an image


class _Sleep(torch.autograd.Function):
    """The identity, which takes its time for each row of a batch, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s * len(x)
        time.sleep(forward_s * len(x))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradients[0], None, None


class Sleeper(nn.Module):
    """Pooling to 32 x 32, fc 1024-24, a sleep, fc 24-1; returns logits, shape (b, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(EDGE * EDGE, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logit of each of (b, 1, size, size) images."""
        x = self.fc1(F.adaptive_avg_pool2d(images, EDGE).flatten(1))
        logits: torch.Tensor = self.fc2(F.relu(_Sleep.apply(x, FORWARD_S, BACKWARD_S)))
        return logits


class SleepTask(CnnTask):
    """The CNN's loss, optimizer and answers, on the model that sleeps."""

    def build(self) -> nn.Module:
        """Make the sleeper."""
        return Sleeper()

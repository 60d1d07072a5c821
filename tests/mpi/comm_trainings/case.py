"""What a case of training is, and the ranks that it gets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import distributed

# Their annotations leave out half of what they export.
dist: Any = distributed
dcp: Any = distributed.checkpoint
KEPT: list[Any] = []  # Gloo's groups, which would abort the process where a callback of theirs is the last to hold them
CASES: dict[str, Callable[["Ranks"], dict[str, Any]]] = {}
State = dict[str, torch.Tensor]


def case(function: Callable[["Ranks"], dict[str, Any]]) -> Callable[["Ranks"], dict[str, Any]]:
    """Make a function known as a case under its name."""
    CASES[function.__name__] = function
    return function


@dataclass
class Ranks:
    """The ranks of a case: the default process group is pneumo's, and Gloo has one beside it."""

    rank: int
    size: int
    folder: Path
    gloo: Any

    @property
    def groups(self) -> dict[str, Any]:
        """The process groups over which every training runs."""
        return {"pneumo": dist.group.WORLD, "gloo": self.gloo}

"""Training in one process: the reference of every comparison, and the backend that does nothing."""

from collections.abc import Sequence

from torch import nn

from pneumo.backends.base import Backend, MakeOptimizer


class Serial(Backend):
    """One process, plain PyTorch."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, parts: Sequence[nn.Module]) -> None:
        """Take the model as it is."""
        self.model, self.optimizer = model, make_optimizer(model.parameters())

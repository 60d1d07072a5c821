"""Training in one process: the reference of every comparison, and the backend that does nothing."""

from torch import nn

from pneumo.backends.base import Backend, MakeOptimizer


class Serial(Backend):
    """One process, plain PyTorch."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Take the model as it is."""
        self.model, self.optimizer = model, make_optimizer(model.parameters())

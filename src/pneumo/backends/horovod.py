"""Horovod over MPI: its DistributedOptimizer, started on the communicator of the training's ranks."""

from typing import Any

import horovod.torch as hvd
import horovod.torch.optimizer as horovod_optimizer
import torch
from torch import nn

from pneumo.backends.base import Backend, MakeOptimizer
from pneumo.timing.record import Collective


class Horovod(Backend):
    """Replicated parameters; each gradient is handed to Horovod's thread as soon as it is ready."""

    def resume(self) -> None:
        """Start Horovod on this training's ranks: it serves one communicator at a time."""
        hvd.init(comm=self.place.comm)

    def pause(self) -> None:
        """Stop Horovod, so that the next training can start it on other ranks."""
        hvd.shutdown()

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Wrap the optimizer; gradients are summed over the ranks."""
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        inner = make_optimizer(model.parameters())
        optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), op=hvd.Sum)
        self._calls: dict[int, Collective] = {}
        enqueue = optimizer._allreduce_grad_async

        def enqueue_and_record(parameter: nn.Parameter) -> Any:
            call = self.recorder.enqueue("allreduce", parameter, f"{self.place.comm.size} ranks")
            handle, context = enqueue(parameter)
            self._calls[handle] = call
            return handle, context

        optimizer._allreduce_grad_async = enqueue_and_record
        self.model, self.optimizer = model, optimizer

    def step(self) -> None:
        """Wait for all gradients, then update; the wait for each tensor is recorded as Horovod waits for it."""
        original = horovod_optimizer.synchronize

        def timed(handle: int) -> torch.Tensor:
            call = self._calls.pop(handle)
            with self.recorder.waiting(call):
                output: torch.Tensor = original(handle)
            return output

        horovod_optimizer.synchronize = timed
        try:
            self.optimizer.synchronize()  # type: ignore[attr-defined]
        finally:
            horovod_optimizer.synchronize = original
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad()  # Horovod's takes no argument; torch's default frees the gradients

"""PyTorch's DistributedDataParallel over a c10d process group."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pneumo.backends.base import Backend, MakeOptimizer
from pneumo.timing.record import Collective


class Ddp(Backend):
    """Replicated parameters; buckets of gradients are summed by allreduce while the backward pass still runs."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Wrap the model; DDP makes the parameters equal to rank 0's."""
        wrapped = DistributedDataParallel(model, process_group=self.place.group, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, self._sum_bucket)
        self.model, self.optimizer = wrapped, make_optimizer(wrapped.parameters())
        self._pending: list[Collective] = []

    @property
    def module(self) -> nn.Module:
        """The model inside DDP's wrapper."""
        return cast(nn.Module, self.model.module)

    def _sum_bucket(
        self,
        _state: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this very annotation
    ) -> torch.futures.Future[torch.Tensor]:
        """Sum one bucket over the ranks; DDP's own hook divides by their number, the loop has divided already."""
        buffer = bucket.buffer()
        call = self.recorder.enqueue("allreduce", buffer, f"{self.place.group.size()} ranks")
        self._pending.append(call)
        future = dist.all_reduce(buffer, group=self.place.group, async_op=True).get_future()

        def finished(done: Any) -> torch.Tensor:
            # Runs in the library's thread at completion: DDP waits for this future and never for the Work.
            self.recorder.finish(call)
            value: torch.Tensor = done.value()[0]
            return value

        return future.then(finished)

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass; returns when all buckets have been summed.

        The last bucket is enqueued when the last gradient is ready, so from there on the main thread does nothing but
        wait: for bucket i from the later of that moment and the end of bucket i - 1 until it is complete.
        """
        super().backward(loss)
        calls, self._pending = self._pending, []
        self.recorder.waited_in_order(calls)

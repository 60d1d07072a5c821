"""PyTorch's DistributedDataParallel over a c10d process group."""

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pneumo.backends.base import Backend, MakeOptimizer


class Ddp(Backend):
    """Replicated parameters; buckets of gradients are summed by allreduce while the backward pass still runs."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, parts: Sequence[nn.Module]) -> None:
        """Wrap the model; DDP makes the parameters equal to rank 0's. Buffers are the task's business."""
        group = self.place.group
        # Of 1x1 kernels in channels-last format: equal memory, described by other strides of an edge of one element.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        wrapped = DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        wrapped.register_comm_hook(None, self._sum_bucket)
        self.model, self.optimizer = wrapped, make_optimizer(wrapped.parameters())

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
        work = dist.all_reduce(bucket.buffer(), group=self.place.group, async_op=True)
        self.recorder.mark()
        future: torch.futures.Future[torch.Tensor] = self.recorder.tensor_of(work.get_future())
        return future

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass; returns when all buckets have been summed.

        The last bucket is enqueued when the last gradient is ready, so from there on the main thread does nothing but
        wait: for bucket i from the later of that moment and the end of bucket i - 1 until it is complete.
        """
        super().backward(loss)
        self.recorder.waited()

"""PyTorch's FSDP2 (fully_shard) over a c10d process group."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from pneumo.backends.base import Backend, MakeOptimizer
from pneumo.timing.record import Issue, Recorder


class Fsdp(Backend):
    """Parameters, gradients and optimizer state are sharded; each layer is gathered when it is needed."""

    sharded = True

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, parts: Sequence[nn.Module]) -> None:
        """Shard the model's parameters in place, over dimension 0 of each; the optimizer sees only the shards."""
        group = self.place.group
        # Meshes of the same ranks are equal but for names, and DTensor would go on with the group of the first of them.
        mesh = DeviceMesh.from_group(group, self.place.device.type, mesh_dim_names=(group.group_name,))
        for layer in parts:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        gather, scatter = _TimedAllGather(self.recorder, group), _TimedReduceScatter(self.recorder, group)
        self.model, self.optimizer = model, make_optimizer(model.parameters())
        # The root holds no parameter of its own where every layer is sharded: it has nothing to send.
        for part in self._sharded():
            part.set_custom_all_gather(gather)
            part.set_custom_reduce_scatter(scatter)
            part.set_gradient_divide_factor(1.0)  # summed: the loop has divided by the global weight already
            part.set_force_sum_reduction_for_comms(True)  # Gloo has no PREMUL_SUM, which a factor would use

    def _sharded(self) -> Sequence[FSDPModule]:
        """The parts that are gathered one by one, in the order of the forward pass."""
        root, *parts = (part for part in self.model.modules() if isinstance(part, FSDPModule))
        return parts or [root]

    def evaluated(self) -> None:
        """Forget the order of the forward passes, by which the next backward pass would gather a layer in vain."""
        self.model.reset_iter_state()  # type: ignore[operator]  # of FSDPModule, which the model has become

    def full_state(self) -> dict[str, torch.Tensor]:
        """Gather the whole model on every rank; collective."""
        return {name: self._whole(value) for name, value in self.model.state_dict().items()}

    def _whole(self, value: Any) -> torch.Tensor:
        if not hasattr(value, "full_tensor"):
            return value  # type: ignore[no-any-return]  # a tensor that is not sharded
        with self.recorder.blocking():
            return value.full_tensor()  # type: ignore[no-any-return]  # of DTensor


class FsdpAsync(Fsdp):
    """FSDP2 that gathers a layer while the one before it computes, which it does not do on CPU of itself."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, parts: Sequence[nn.Module]) -> None:
        """As FSDP2, with asynchronous gathering, a layer ahead in both directions."""
        super().prepare(model, make_optimizer, parts)
        gathered = self._sharded()
        for part, following in zip(gathered, [*gathered[1:], None], strict=True):
            part._set_unshard_async_op(True)
            if following is not None:
                part.set_modules_to_forward_prefetch([following])


class _Allocate:
    """What FSDP2 sends from and receives into: the group's own memory where it has some."""

    def __init__(self, recorder: Recorder, group: Any) -> None:
        self.recorder, self._group = recorder, group

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        backend = self._group._get_backend(device)
        if backend.supports_tensor_alloc(device):
            tensor: torch.Tensor = backend.allocate_tensor(math.prod(size), dtype=dtype, device=device)
            return tensor.view(*size)
        return torch.empty(*size, dtype=dtype, device=device)


class _TimedAllGather(_Allocate, AllGather):
    """FSDP2's all-gather, timed; blocking on CPU, as FSDP2 calls it there of itself."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        if async_op:
            with self.recorder.issuing() as issue:
                work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
            return _TimedWork(work, self.recorder, issue)
        with self.recorder.blocking():
            return dist.all_gather_single(output_tensor, input_tensor, group=group)


class _TimedWork(dist.Work):
    """A Work whose `wait` is part of the phase `comm`; FSDP2 does nothing else with it."""

    def __init__(self, work: Any, recorder: Recorder, issue: Issue) -> None:
        super().__init__()
        self._work, self._recorder, self._issue = work, recorder, issue

    def wait(self, *timeout: Any) -> bool:
        with self._recorder.waiting(self._issue):
            done: bool = self._work.wait(*timeout)
        return done


class _TimedReduceScatter(_Allocate, ReduceScatter):
    """FSDP2's reduce-scatter, timed."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        with self.recorder.blocking():
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)

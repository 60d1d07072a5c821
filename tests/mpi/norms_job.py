"""Under mpirun: a model with batch norm in each mode, against the same model on one rank, which every rank computes.

Rank 0 prints, as JSON, how far each result is from it at most, as a fraction of its largest value; "fsdp" is `sync`
with sharded parameters, on two ranks.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pneumo import process
from pneumo.comm.rendezvous import make_store
from pneumo.models.batchnorm import Mode, Norms, plain
from pneumo.world import World

SHARES = {"uneven": [[2, 1], [1], [2], [3, 1]], "empty": [[], [2, 1], [], [4]]}  # the groups of each rank
STEPS, RATE = 2, 0.1
Tensors = dict[str, torch.Tensor]


def make_model(dtype: torch.dtype) -> nn.Module:
    """Batch norm as the model's own layer and deeper, with a number of channels that ranks cannot share evenly."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5))
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), inner, nn.SiLU()).to(dtype)


@dataclass
class Share:
    """One rank's groups of the global batches of all groups, and how to reach the others."""

    groups: list[list[int]]
    rank: int
    dtype: torch.dtype
    small_sum: Callable[[torch.Tensor], torch.Tensor]

    def norms(self, model: nn.Module, mode: Mode) -> Norms:
        """Batch norm in a mode, told of the batches, which all have the same lengths."""
        norms = Norms(model, mode, self.small_sum, len(self.groups))
        norms.of_batch(self.groups[self.rank], len([n for lengths in self.groups for n in lengths if n]))
        return norms

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, or a blank one, and the weights of the pixels of the model's output in the loss."""
        generator = torch.Generator().manual_seed(step)
        images = [sum(lengths) for lengths in self.groups]
        x = torch.randn(sum(images), 1, 9, 8, generator=generator, dtype=torch.float64).to(self.dtype)
        weights = torch.randn(sum(images), 5, 5, 4, generator=generator, dtype=torch.float64).to(self.dtype)
        mine = x.split(images)[self.rank], weights.split(images)[self.rank]
        return mine if images[self.rank] else (torch.zeros_like(x[:1]), torch.zeros_like(weights[:1]))


def train(share: Share, mode: Mode) -> Tensors:
    """A few steps, summing gradients over the ranks; the model's tensors after them, and its last gradients."""
    model = make_model(share.dtype)
    norms = share.norms(model, mode)
    for step in range(STEPS):
        x, weights = share.batch(step)
        model.zero_grad()
        (model(x) * weights).sum().backward()
        gradients = torch.nn.utils.parameters_to_vector([p.grad for p in model.parameters()])  # one sum for all
        share.small_sum(gradients)
        torch.nn.utils.vector_to_parameters(gradients, [p.grad for p in model.parameters()])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-RATE)
    norms.settle()
    plain(model)
    return model.state_dict() | {f"{name}.grad": p.grad for name, p in model.named_parameters()}


def train_sharded(share: Share, comm: Any, group: Any) -> Tensors:
    """The same with FSDP, for which each child of the model is a part of its own: a batch norm, too."""
    from pneumo.backends.base import Place
    from pneumo.backends.fsdp import Fsdp
    from pneumo.timing.steps import Timing

    timing = Timing(lambda: None)
    backend = Fsdp(Place(comm, group, torch.device("cpu")), timing.recorder)
    model = make_model(share.dtype)
    norms = share.norms(model, "sync")
    backend.resume()
    backend.prepare(model, lambda parameters: torch.optim.SGD(parameters, lr=RATE), list(model.children()))
    for step in range(STEPS):
        x, weights = share.batch(step)
        backend.backward((backend.model(x) * weights).sum())
        gradients = {f"{n}.grad": p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        backend.step()
    norms.settle()
    state = backend.full_state()
    backend.pause()
    backend.close()
    timing.close()
    return state | gradients


def distance(found: Tensors, expected: Tensors) -> dict[str, float]:
    """How far each tensor is off, as a fraction of its largest value."""
    assert found.keys() == expected.keys()
    return {n: float((found[n] - v).abs().max() / v.abs().max().clamp(min=1e-9)) for n, v in expected.items()}


def whole_batch(groups: list[list[int]], dtype: torch.dtype) -> Share:
    """All groups on one rank."""
    return Share([[n for lengths in groups for n in lengths]], 0, dtype, lambda tensor: tensor)


def run(world: World) -> dict[str, Any]:
    """Every mode, type and kind of share; collective."""
    from mpi4py import MPI  # which the world starts, and an import would

    comm = world.comm

    def small_sum(tensor: torch.Tensor) -> torch.Tensor:
        comm.Allreduce(MPI.IN_PLACE, tensor.numpy(), MPI.SUM)
        return tensor

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if comm.size == 2:
        store = make_store(comm, "127.0.0.1")
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    found = {}
    for kind, dtype in ((kind, dtype) for kind in SHARES for dtype in (torch.float64, torch.float32)):
        groups = SHARES[kind][-comm.size :]  # the last have images
        share, whole = Share(groups, comm.rank, dtype, small_sum), whole_batch(groups, dtype)
        name = f"{kind}-{str(dtype).removeprefix('torch.')}"
        serial = train(whole, "sync")
        found[f"sync-{name}"] = distance(train(share, "sync"), serial)
        found[f"ghost-{name}"] = distance(train(share, "ghost"), train(whole, "ghost"))
        found[f"local-{name}"] = distance(train(share, "local"), serial)
        if comm.size == 2:
            found[f"fsdp-{name}"] = distance(train_sharded(share, comm, dist.group.WORLD), serial)
    if comm.size == 2:
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as the_world:
        seen = the_world.comm.gather(run(the_world))
        if seen is not None:
            print("RESULT " + json.dumps(seen))

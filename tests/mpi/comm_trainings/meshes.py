"""Tensors, layers and pipelines on a mesh of ranks."""

import copy
from typing import Any

import torch
from torch import nn

from comm_trainings.case import Ranks, case, dist
from comm_trainings.fsdp import (
    line,
)
from comm_trainings.models import (
    Plan,
    data,
    loss_of,
)


@case
def distributed_tensors(ranks: Ranks) -> dict[str, Any]:
    """Every change of placement, by the tensor that is whole again."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = line(ranks)
    torch.manual_seed(3)
    whole = torch.randn(13, 10)
    wrong = []
    placements: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}
    for begin, first in placements.items():
        for end, second in placements.items():
            tensor: Any = distribute_tensor(whole, mesh, [first]).redistribute(mesh, [second])
            if not torch.equal(tensor.full_tensor(), whole):
                wrong.append(f"{begin} to {end}")
    for name, placement in placements.items():
        for reduction, expected in (("sum", whole * ranks.size), ("avg", whole), ("max", whole)):
            partial = DTensor.from_local(whole.clone(), mesh, [Partial(reduction)])
            changed: Any = partial.redistribute(mesh, [placement])
            result = changed.full_tensor()
            if not torch.allclose(result, expected, rtol=1e-6):
                wrong.append(f"partial {reduction} to {name}")
    product: Any = distribute_tensor(whole, mesh, [Shard(1)]) @ distribute_tensor(
        whole.T.contiguous(), mesh, [Shard(0)]
    )
    if not torch.allclose(product.full_tensor(), whole @ whole.T, atol=1e-5):
        wrong.append("a product")
    return {"wrong": wrong, "sharded": tuple(product.placements[0].__class__.__name__.split())}


@case
def tensors_on_a_grid(ranks: Ranks) -> dict[str, Any]:
    """A mesh of two dimensions: the groups of rows and of columns overlap."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, ranks.size // 2), mesh_dim_names=("a", "b"))
    torch.manual_seed(3)
    whole = torch.randn(9, 7)
    choices: list[Any] = [Shard(0), Shard(1), Replicate()]
    pairs = [(a, b) for a in choices for b in choices]
    wrong = []
    for begin in pairs:
        for end in pairs:
            tensor: Any = distribute_tensor(whole, mesh, begin).redistribute(mesh, end)
            if not torch.equal(tensor.full_tensor(), whole):
                wrong.append(f"{begin} to {end}")
    return {"wrong": wrong}


@case
def tensor_parallel(ranks: Ranks) -> dict[str, Any]:
    """A layer split by columns and one by rows equal the two on one rank."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(7)
    alone = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    split = copy.deepcopy(alone)
    parallelize_module(split, line(ranks), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    wrong = []
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (alone, split)]
    for step in range(3):
        (inputs,), answers = data(Plan(), 0, step)
        losses = [loss_of(model(inputs), answers) for model in (alone, split)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not torch.allclose(losses[0], losses[1], rtol=1e-5):
            wrong.append(f"step {step}: {losses}")
    return {"wrong": wrong}


@case
def pipeline(ranks: Ranks) -> dict[str, Any]:
    """Stages on different ranks, which send activations and gradients to one another."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.manual_seed(7)
    alone = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(ranks.size)))
    mine = copy.deepcopy(alone[ranks.rank])
    stage = PipelineStage(mine, ranks.rank, ranks.size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    generator = torch.Generator().manual_seed(5)
    inputs, answers = torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator)
    losses: list[torch.Tensor] = []
    if ranks.rank == 0:
        schedule.step(inputs)
    elif ranks.rank == ranks.size - 1:
        schedule.step(target=answers, losses=losses)
    else:
        schedule.step()
    loss: Any = nn.functional.mse_loss(alone(inputs), answers)
    loss.backward()
    pairs: Any = zip(mine.parameters(), alone[ranks.rank].parameters(), strict=True)
    wrong = [i for i, (a, b) in enumerate(pairs) if not torch.allclose(a.grad, b.grad, atol=1e-6)]
    return {"wrong": wrong, "losses": len(losses)}

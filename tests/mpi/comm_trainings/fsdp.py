"""Trainings with FSDP2."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import nn

from comm_trainings.case import Ranks, State, case, dist
from comm_trainings.models import Plan, data, digest, distance, loss_of, still, train


def blocks() -> nn.Sequential:
    """Layers of sizes that no number of ranks divides, to be sharded one by one."""
    layers: list[nn.Module] = [nn.Linear(12, 37)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Linear(37, 37)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(37, 4))


def sharded(mesh: Any, **options: Any) -> Any:
    """The blocks, each sharded and then the whole."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(7)
    model = blocks()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def full(model: Any) -> State:
    """The whole state, collected on every rank."""
    return {name: value.full_tensor().detach().clone() for name, value in model.state_dict().items()}


def moments(optimizer: Any) -> State:
    """The whole state of an optimizer, collected on every rank."""
    found: State = {}
    for index, entry in enumerate(optimizer.state.values()):
        found |= {f"{index}.{key}": entry[key].full_tensor().clone() for key in ("exp_avg", "exp_avg_sq")}
    return found


def fsdp_steps(model: Any, optimizer: Any, ranks: Ranks, steps: Sequence[int], accumulate: int = 1) -> list[float]:
    """Train sharded blocks for some steps; returns the losses."""
    losses = []
    for step in steps:
        for part in range(accumulate):
            if accumulate > 1:
                model.set_requires_gradient_sync(part == accumulate - 1)
            (inputs,), answers = data(Plan(), ranks.rank, step * accumulate + part)
            loss = loss_of(model(inputs).float(), answers) / accumulate
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def beside_gloo(ranks: Ranks, plan: Plan, losses: list[float], state: State) -> dict[str, Any]:
    """Train by the plan with DDP over Gloo, and compare with the losses and the state of a training over pneumo."""
    expected, before, after = train(plan, ranks, ranks.gloo)
    return {
        "losses": {"pneumo": losses, "gloo": expected},
        "difference": distance(state, after),
        "still": still(before, state),
        "digest": digest(state),
    }


def against_ddp(ranks: Ranks, mesh: Any, prepare: Callable[[Any], None] | None = None, **how: Any) -> dict[str, Any]:
    """Train with FSDP2 over pneumo on a mesh, and with DDP over Gloo."""
    accumulate = how.pop("accumulate", 1)
    model = sharded(mesh, **how)
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    losses = fsdp_steps(model, optimizer, ranks, range(5), accumulate)
    return beside_gloo(ranks, Plan(blocks, accumulate=accumulate), losses, full(model))


def line(ranks: Ranks) -> Any:
    """A mesh of one dimension."""
    return dist.device_mesh.init_device_mesh("cpu", (ranks.size,))


@case
def fsdp(ranks: Ranks) -> dict[str, Any]:
    return against_ddp(ranks, line(ranks))


@case
def fsdp_kept_whole_after_forward(ranks: Ranks) -> dict[str, Any]:
    return against_ddp(ranks, line(ranks), reshard_after_forward=False)


@case
def fsdp_accumulating(ranks: Ranks) -> dict[str, Any]:
    return against_ddp(ranks, line(ranks), accumulate=2)


@case
def fsdp_in_the_groups_memory(ranks: Ranks) -> dict[str, Any]:
    """Where the group gives none, ordinary memory is used."""

    def prepare(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "set_allocate_memory_from_process_group_for_comm"):
                module.set_allocate_memory_from_process_group_for_comm(True)

    return against_ddp(ranks, line(ranks), prepare)


@case
def fsdp_with_a_divisor(ranks: Ranks) -> dict[str, Any]:
    """Another divisor than the number of ranks, by PREMUL_SUM; the learning rate makes up for it."""

    def prepare(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(float(ranks.size) + 1)

    model = sharded(line(ranks))
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * (ranks.size + 1) / ranks.size, momentum=0.5)
    losses = fsdp_steps(model, optimizer, ranks, range(5))
    return beside_gloo(ranks, Plan(blocks), losses, full(model))


@case
def fsdp_in_bf16(ranks: Ranks) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    return against_ddp(ranks, line(ranks), mp_policy=policy)


@case
def fsdp_reducing_in_fp16(ranks: Ranks) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return against_ddp(ranks, line(ranks), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))


@case
def hsdp(ranks: Ranks) -> dict[str, Any]:
    """Sharded over pairs of ranks, and copied over two of these."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, ranks.size // 2), mesh_dim_names=("copy", "shard"))
    return against_ddp(ranks, mesh)


@case
def fsdp_state(ranks: Ranks) -> dict[str, Any]:
    """The whole state on every rank, and on rank 0 alone, and from there into models with other parameters."""
    from torch.distributed.checkpoint import state_dict as states

    model = sharded(line(ranks))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fsdp_steps(model, optimizer, ranks, range(2))
    whole = states.StateDictOptions(full_state_dict=True)
    saved = states.get_state_dict(model, optimizer, options=whole)
    on_one = states.get_model_state_dict(model, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))
    third, other = sharded(line(ranks)), sharded(line(ranks))
    other_optimizer = torch.optim.AdamW(other.parameters(), 0.01)
    apart = min(distance(full(copy), full(model)) for copy in (third, other))
    from_one = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(third, on_one, options=from_one)
    states.set_state_dict(other, other_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=whole)
    return {
        "keys": len(on_one),
        "apart": apart,
        "difference": max(
            distance(full(other), full(model)),
            distance(full(third), full(model)),
            distance(moments(other_optimizer), moments(optimizer)),
        ),
    }

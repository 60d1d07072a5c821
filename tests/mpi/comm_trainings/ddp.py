"""Trainings with DDP: its options and its hooks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from comm_trainings.case import CASES, Ranks, State, case, dist
from comm_trainings.models import (
    Plan,
    Twigs,
    Waves,
    Words,
    cnn,
    compare,
    data,
    digest,
    distance,
    loss_of,
    mlp,
    pictures,
    twig,
    twigs,
    words,
)


def python_hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages by itself, in a callback in Python."""
    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    averaged: torch.futures.Future[torch.Tensor] = future.then(lambda done: done.value()[0].div_(group.size()))
    return averaged


def waiting_hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Waits in its callback for further collectives, one of them asynchronous; for a single bucket, as PowerSGD is.

    Where callbacks start collectives, those of several buckets would meet in another order on every rank.
    """

    def average(done: Any) -> torch.Tensor:
        tensor: torch.Tensor = done.value()[0]
        count = torch.ones(1)
        dist.all_reduce(count, group=group)
        again = dist.all_reduce(count, group=group, async_op=True).get_future().wait()[0]
        return tensor.div_(again.sqrt())

    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    averaged: torch.futures.Future[torch.Tensor] = future.then(average)
    return averaged


def register(hook: Any, state: Callable[[Any], Any] = lambda group: group) -> Callable[[Any, Any], None]:
    """What registers a hook with a model; its state is made of the group."""
    return lambda group, model: model.register_comm_hook(state(group), hook)


def power_sgd(group: Any) -> Any:
    """Compress from the third step on."""
    return powerSGD_hook.PowerSGDState(
        group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5
    )


def local(group: Any) -> Any:
    """Average all gradients for two steps, then those of no group but one's own."""
    state: Any = local_sgd.PostLocalSGDState
    return state(process_group=group, subgroup=group, start_localSGD_iter=2)


def zero(group: Any, parameters: Any) -> Any:
    """An optimizer whose state is divided between the ranks."""
    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, process_group=group, lr=0.01)


def in_bf16() -> nn.Module:
    """A model whose parameters and gradients are of 16 bits."""
    return nn.Sequential(Narrow(), mlp()).bfloat16()


class Narrow(nn.Module):
    """What comes in, with 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any tensor."""
        return x.bfloat16()


PLANS = {
    "plain_mlp": Plan(),
    "plain_cnn": Plan(cnn, pictures),
    "many_buckets": Plan(ddp={"bucket_cap_mb": 0.002}),
    "no_sync": Plan(accumulate=3),
    "no_sync_with_bucket_view": Plan(accumulate=2, ddp={"gradient_as_bucket_view": True}),
    "unused_parameters": Plan(Twigs, twigs, ddp={"find_unused_parameters": True}),
    "static_graph": Plan(Twigs, twig, ddp={"static_graph": True}),
    "bucket_view": Plan(cnn, pictures, ddp={"gradient_as_bucket_view": True}),
    "own_buffers": Plan(cnn, pictures, ddp={"broadcast_buffers": False}),
    "uneven": Plan(uneven=True),
    "uneven_cnn": Plan(cnn, pictures, uneven=True, ddp={"find_unused_parameters": True}),
    "uneven_zero": Plan(uneven=True, optimizer=zero),
    "zero": Plan(optimizer=zero),
    "zero_with_bucket_view": Plan(optimizer=zero, ddp={"gradient_as_bucket_view": True}),
    "allreduce_hook": Plan(hook=register(default_hooks.allreduce_hook)),
    "bf16_hook": Plan(hook=register(default_hooks.bf16_compress_hook)),
    "fp16_hook": Plan(hook=register(default_hooks.fp16_compress_hook)),
    "fp16_wrapped_power_sgd": Plan(
        hook=register(default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook), power_sgd)
    ),
    "power_sgd": Plan(hook=register(powerSGD_hook.powerSGD_hook, power_sgd)),
    "local_sgd": Plan(hook=register(local_sgd.post_localSGD_hook, local)),
    "python_hook": Plan(hook=register(python_hook), ddp={"bucket_cap_mb": 0.002}),
    "waiting_hook": Plan(hook=register(waiting_hook)),
    "sparse": Plan(Words, words),
    "mixed_precision": Plan(autocast=True),
    "in_bf16": Plan(in_bf16),
    "complex": Plan(Waves),
    "complex_with_bucket_view": Plan(Waves, ddp={"gradient_as_bucket_view": True}),
}


def plan_case(plan: Plan) -> Callable[[Ranks], dict[str, Any]]:
    """A case that compares the trainings of a plan."""
    return lambda ranks: compare(plan, ranks)


CASES.update({name: plan_case(plan) for name, plan in PLANS.items()})


@case
def divided_by_the_ranks_that_are_left(ranks: Ranks) -> dict[str, Any]:
    """DDP's own join, without the initial number of ranks as the divisor."""
    found = {}
    for name, group in ranks.groups.items():
        torch.manual_seed(7)
        model = mlp()
        ddp: Any = DistributedDataParallel(model, process_group=group)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
        with ddp.join(divide_by_initial_world_size=False):
            for step in range(3 + ranks.rank):
                (inputs,), answers = data(Plan(), ranks.rank, step)
                loss_of(ddp(inputs), answers).backward()
                optimizer.step()
                optimizer.zero_grad()
        found[name] = dict(model.state_dict())
    return {"difference": distance(found["pneumo"], found["gloo"]), "digest": digest(found["pneumo"])}


@case
def early_end_is_told(ranks: Ranks) -> dict[str, Any]:
    """Uneven inputs with throw_on_early_termination: every rank gets the error."""
    found: dict[str, Any] = {}
    for name, group in ranks.groups.items():
        ddp: Any = DistributedDataParallel(mlp(), process_group=group)
        try:
            with Join([ddp], throw_on_early_termination=True):
                for step in range(2 + ranks.rank):
                    (inputs,), answers = data(Plan(), ranks.rank, step)
                    loss_of(ddp(inputs), answers).backward()
            found[name] = "no error"
        except RuntimeError as error:
            found[name] = str(error)
    return found


@case
def logging_data(ranks: Ranks) -> dict[str, Any]:
    """What DDP logs of itself."""
    found = {}
    for name, group in ranks.groups.items():
        torch.manual_seed(7)
        ddp: Any = DistributedDataParallel(mlp(), process_group=group)
        ddp._set_ddp_runtime_logging_sample_rate(1)
        for step in range(4):
            (inputs,), answers = data(Plan(), ranks.rank, step)
            loss_of(ddp(inputs), answers).backward()
        found[name] = {key: str(value) for key, value in ddp._get_ddp_logging_data().items()}
    return found


@case
def consolidated_state(ranks: Ranks) -> dict[str, Any]:
    """ZeroRedundancyOptimizer collects its state on a rank, and a new one takes it."""
    found = {}
    for name, group in ranks.groups.items():
        torch.manual_seed(7)
        model = mlp()
        ddp: Any = DistributedDataParallel(model, process_group=group)
        optimizer = zero(group, ddp.parameters())
        for step in range(3):
            (inputs,), answers = data(Plan(), ranks.rank, step)
            loss_of(ddp(inputs), answers).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.consolidate_state_dict(to=ranks.size - 1)
        state: State = {}
        if ranks.rank == ranks.size - 1:
            for index, entry in optimizer.state_dict()["state"].items():
                state |= {f"{index}.{key}": value for key, value in entry.items() if value.dim()}
        found[name] = state
    return {
        "entries": len(found["pneumo"]),
        "difference": distance(found["pneumo"], found["gloo"]) if found["gloo"] else 0.0,
    }


@case
def profiled(ranks: Ranks) -> dict[str, Any]:
    """The profiler sees collectives by their names, with an end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dist.all_reduce(torch.ones(1 << 18), async_op=True).wait()
        dist.all_reduce(torch.ones(8))
        dist.barrier()
    return {"events": sorted({event.key for event in profile.key_averages()})}

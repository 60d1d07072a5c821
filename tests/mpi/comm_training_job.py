"""Under mpirun: trainings over the backend `pneumo`, and the same over Gloo, which is what they have to equal.

Arguments: a folder for the results, and the names of cases. Written for each rank, as RANK.json: what each case found,
or the traceback with which it failed.
"""

import copy
import datetime
import hashlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import pneumo.comm

# Their annotations leave out half of what they export.
dist: Any = distributed
dcp: Any = distributed.checkpoint
KEPT: list[Any] = []  # Gloo's groups, which would abort the process where a callback of theirs is the last to hold them
CASES: dict[str, Callable[["Ranks"], dict[str, Any]]] = {}
State = dict[str, torch.Tensor]


def case(function: Callable[["Ranks"], dict[str, Any]]) -> Callable[["Ranks"], dict[str, Any]]:
    """Make a function known as a case under its name."""
    CASES[function.__name__] = function
    return function


@dataclass
class Ranks:
    """The ranks of a case: the default process group is pneumo's, and Gloo has one beside it."""

    rank: int
    size: int
    folder: Path
    gloo: Any

    @property
    def groups(self) -> dict[str, Any]:
        """The process groups over which every training runs."""
        return {"pneumo": dist.group.WORLD, "gloo": self.gloo}


# ---- models and data


class Twigs(nn.Module):
    """Two branches of which one is taken, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(12, 12)
        self.left, self.right, self.never = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        """The branch is 0 or 1."""
        x = self.shared(torch.tanh(self.shared(x)))
        return torch.as_tensor((self.left, self.right)[branch](x))


class Words(nn.Module):
    """A table whose gradients are sparse, and a layer above it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.EmbeddingBag(50, 12, sparse=True, mode="sum"), nn.Linear(12, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Rows of word numbers."""
        return torch.as_tensor(self.top(self.table(words)))


def mlp() -> nn.Module:
    """Sizes that no number of ranks divides."""
    return nn.Sequential(nn.Linear(12, 37), nn.ReLU(), nn.Linear(37, 301), nn.ReLU(), nn.Linear(301, 4))


def cnn() -> nn.Module:
    """Convolutions with batch normalization, whose buffers rank 0 gives to the others."""
    layers = [nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 4))


def pictures(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A batch for `cnn`."""
    return (torch.randn(6, 1, 12, 12, generator=generator),)


def rows(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A batch for `mlp`."""
    return (torch.randn(6, 12, generator=generator),)


def words(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A batch for `Words`; the numbers of different words differ from rank to rank."""
    return (torch.randint(50, (6, 3), generator=generator),)


def twigs(generator: torch.Generator) -> tuple[Any, ...]:
    """A batch for `Twigs`; each rank takes another branch."""
    return (torch.randn(6, 12, generator=generator), int(torch.randint(2, (1,), generator=generator)))


def twig(generator: torch.Generator) -> tuple[Any, ...]:
    """A batch for `Twigs` in which everybody takes the same branch."""
    return (torch.randn(6, 12, generator=generator), 0)


@dataclass(frozen=True)
class Plan:
    """A training: the model, its data, DDP's options, and what is done around a step."""

    build: Callable[[], nn.Module] = mlp
    batch: Callable[[torch.Generator], tuple[Any, ...]] = rows
    ddp: dict[str, Any] = field(default_factory=dict)
    hook: Callable[[Any, DistributedDataParallel], None] | None = None
    optimizer: Callable[[Any, Any], Any] = lambda group, parameters: torch.optim.SGD(parameters, 0.1, momentum=0.5)
    accumulate: int = 1  # batches a step, all but the last within no_sync
    autocast: bool = False  # compute in bf16
    uneven: bool = False  # rank k has k batches more
    join: dict[str, Any] = field(default_factory=dict)
    steps: int = 5


@contextmanager
def joined(plan: Plan, model: Any, optimizer: Any) -> Iterator[None]:
    """The context in which ranks may have different numbers of batches."""
    joinables = [model] + ([optimizer] if isinstance(optimizer, ZeroRedundancyOptimizer) else [])
    with Join(joinables, **plan.join) if plan.uneven else nullcontext():
        yield


def data(plan: Plan, rank: int, step: int) -> tuple[tuple[Any, ...], torch.Tensor]:
    """The inputs and answers of a step, the same for every backend."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = plan.batch(generator)
    return inputs, torch.randint(4, (6,), generator=generator)


def loss_of(outputs: torch.Tensor, answers: torch.Tensor) -> Any:
    """The loss of a batch."""
    return nn.functional.cross_entropy(outputs, answers)


def train(plan: Plan, ranks: Ranks, group: Any) -> tuple[list[float], State, State]:
    """Train over a group; returns this rank's losses, and the state before and after."""
    torch.manual_seed(7)
    model = plan.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ddp: Any = DistributedDataParallel(model, process_group=group, **plan.ddp)
    if plan.hook is not None:
        plan.hook(group, ddp)
    optimizer = plan.optimizer(group, ddp.parameters())
    losses = []
    steps = plan.steps + (ranks.rank if plan.uneven else 0)
    with joined(plan, ddp, optimizer):
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(plan.accumulate):
                inputs, answers = data(plan, ranks.rank, step * plan.accumulate + part)
                with ddp.no_sync() if part < plan.accumulate - 1 else nullcontext():
                    with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
                        outputs = ddp(*inputs)
                    loss = loss_of(outputs.float(), answers) / plan.accumulate
                    loss.backward()
                losses.append(float(loss.detach()))
            optimizer.step()
    after = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return losses, before, after


def distance(one: State, other: State) -> float:
    """The largest difference of two states, of each tensor in proportion to its largest value."""
    worst = 0.0
    for name, value in one.items():
        scale = max(float(other[name].abs().max()), 1e-6)
        worst = max(worst, float((value.double() - other[name].double()).abs().max()) / scale)
    return worst


def still(before: State, after: State) -> list[str]:
    """The tensors that have not moved: of those that have, equality says something."""
    return [name for name, value in after.items() if distance({name: before[name]}, {name: value}) < 1e-3]


def digest(state: State) -> str:
    """Equal for states that are equal bit for bit."""
    text = hashlib.sha256()
    for value in state.values():
        text.update(value.detach().double().contiguous().numpy().tobytes())
    return text.hexdigest()


def compare(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """Train over pneumo and over Gloo."""
    losses, states = {}, {}
    for name, group in ranks.groups.items():
        losses[name], before, states[name] = train(plan, ranks, group)
    return {
        "losses": losses,
        "difference": distance(states["pneumo"], states["gloo"]),
        "still": still(before, states["pneumo"]),
        "digest": digest({name: states["pneumo"][name] for name, _ in plan.build().named_parameters()}),
    }


# ---- hooks


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


# ---- FSDP2


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


def against_ddp(ranks: Ranks, mesh: Any, prepare: Callable[[Any], None] | None = None, **how: Any) -> dict[str, Any]:
    """Train with FSDP2 over pneumo on a mesh, and with DDP over Gloo."""
    accumulate = how.pop("accumulate", 1)
    model = sharded(mesh, **how)
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    losses = fsdp_steps(model, optimizer, ranks, range(5), accumulate)
    expected, before, after = train(Plan(blocks, accumulate=accumulate), ranks, ranks.gloo)
    state = full(model)
    return {
        "losses": {"pneumo": losses, "gloo": expected},
        "difference": distance(state, after),
        "still": still(before, state),
        "digest": digest(state),
    }


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
    expected, before, after = train(Plan(blocks), ranks, ranks.gloo)
    state = full(model)
    return {
        "losses": {"pneumo": losses, "gloo": expected},
        "difference": distance(state, after),
        "still": still(before, state),
        "digest": digest(state),
    }


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


# ---- checkpoints


def checkpointed(ranks: Ranks, save: Callable[[Any, Path], None], load: Callable[[Any, Path], None]) -> dict[str, Any]:
    """Save a sharded model with its optimizer, and load them into others; safetensors hold the model alone."""
    model = sharded(line(ranks))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fsdp_steps(model, optimizer, ranks, range(2))
    path = ranks.folder / sys._getframe(1).f_code.co_name
    save((model, optimizer), path)
    dist.barrier()
    other = sharded(line(ranks))
    other_optimizer = torch.optim.AdamW(other.parameters(), 0.01)
    apart = distance(full(other), full(model))
    load((other, other_optimizer), path)
    return {
        "files": len(list(path.iterdir())),
        "apart": apart,
        "difference": distance(full(other), full(model)),
        "moments": distance(moments(other_optimizer), moments(optimizer)) if other_optimizer.state else None,
    }


def sharded_state(trained: Any) -> dict[str, Any]:
    """The state of a model and its optimizer, each rank with its shards."""
    from torch.distributed.checkpoint import state_dict as states

    model, optimizer = states.get_state_dict(*trained)
    return {"model": model, "optimizer": optimizer}


def load_sharded(trained: Any, path: Path) -> None:
    """Load the shards of a model and its optimizer."""
    from torch.distributed.checkpoint import state_dict as states

    state = sharded_state(trained)
    dcp.load(state, checkpoint_id=path)
    states.set_state_dict(*trained, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@case
def checkpoint(ranks: Ranks) -> dict[str, Any]:

    return checkpointed(ranks, lambda trained, path: dcp.save(sharded_state(trained), checkpoint_id=path), load_sharded)


@case
def checkpoint_in_the_background(ranks: Ranks) -> dict[str, Any]:
    """Saved by a thread, over a group of its own, while the training's collectives go on."""

    group = dist.new_group()

    def save(trained: Any, path: Path) -> None:
        saving: Any = dcp.async_save(sharded_state(trained), checkpoint_id=path, process_group=group)
        for _ in range(50):
            dist.all_reduce(torch.ones(1000))
        saving.result(timeout=60)

    return checkpointed(ranks, save, load_sharded)


@case
def checkpoint_in_safetensors(ranks: Ranks) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as states

    def save(trained: Any, path: Path) -> None:
        path.mkdir(exist_ok=True)
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(states.get_model_state_dict(trained[0]), storage_writer=writer)

    def load(trained: Any, path: Path) -> None:
        state = states.get_model_state_dict(trained[0])
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        states.set_model_state_dict(trained[0], state)

    return checkpointed(ranks, save, load)


# ---- tensors on a mesh


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


# ---- the job


def run_case(folder: Path, name: str, rank: int, size: int) -> dict[str, Any]:
    """Run a case in process groups of its own, so that none inherits what another one broke."""
    store = dist.FileStore(str(folder / f"{name}.store"), size)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("pneumo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        # In torch's debug mode DDP crashes over a second group of Gloo's: there pneumo is compared with the plain mode.
        debug = os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL"
        KEPT.append(dist.group.WORLD if debug else dist.new_group(backend="gloo", timeout=timeout))
        return CASES[name](Ranks(rank, size, folder, KEPT[-1]))
    except Exception:
        text = traceback.format_exc()
        print(f"rank {rank}, {name}: {text}", file=sys.stderr, flush=True)
        return {"failed": text}
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Run the cases one after the other."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pneumo.comm.register()
    found: dict[str, Any] = {}
    for name in names:
        begin = time.monotonic()
        found[name] = run_case(folder, name, rank, size)
        found[name]["seconds"] = time.monotonic() - begin
        (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

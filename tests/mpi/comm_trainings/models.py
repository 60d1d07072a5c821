"""The models and the data of the trainings, and how two trainings compare."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from comm_trainings.case import Ranks, State


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


class Waves(nn.Module):
    """A real layer, and complex weights above it; what comes out is real."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weights = nn.Linear(12, 7), nn.Parameter(torch.randn(7, 4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of real numbers."""
        return (self.first(x).to(torch.complex64) @ self.weights).abs()


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
        worst = max(worst, float((value.cdouble() - other[name].cdouble()).abs().max()) / scale)
    return worst


def still(before: State, after: State) -> list[str]:
    """The tensors that have not moved: of those that have, equality says something."""
    return [name for name, value in after.items() if distance({name: before[name]}, {name: value}) < 1e-3]


def digest(state: State) -> str:
    """Equal for states that are equal bit for bit."""
    text = hashlib.sha256()
    for value in state.values():
        text.update(value.detach().cdouble().contiguous().numpy().tobytes())
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

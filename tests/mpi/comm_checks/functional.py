"""torch.distributed's functional collectives, and those of torch.distributed.nn with their gradients."""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from comm_checks.reference import assert_reduced, assert_same, draw
from comm_checks.world import Ranks

functional: Any = importlib.import_module("torch.distributed._functional_collectives")
differentiable: Any = importlib.import_module("torch.distributed.nn.functional")
warnings.simplefilter("ignore", FutureWarning)


def agree(ranks: Ranks, call: Callable[[Any], Any]) -> Any:
    """Call on both groups; the results, of integral values, are the same. Returns pneumo's."""
    ours, gloos = call(ranks.pneumo), call(ranks.gloo)
    assert_same(ours, gloos)
    return ours


def waited(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a functional collective, and wait for its result or all of them."""
    results = function(*arguments)
    return (
        [functional.wait_tensor(t) for t in results] if isinstance(results, list) else functional.wait_tensor(results)
    )


def numbers(ranks: Ranks, *shape: int) -> torch.Tensor:
    """Integral floats, which sum without rounding, so that both backends have the same bits."""
    return draw(shape, torch.int8, "functional", ranks.rank).float()


def small_numbers(ranks: Ranks, *shape: int) -> torch.Tensor:
    """From 0 to 4, and no negative zeros, of which the order decides in Gloo's minimum."""
    return (draw(shape, torch.uint8, "small", ranks.rank) % 5).float()


def check_functional_reductions(ranks: Ranks) -> None:
    small = small_numbers(ranks, 40)
    for op in ("sum", "max", "min", "product"):
        agree(ranks, partial(waited, functional.all_reduce, small, op))
    ones = [torch.full((3,), float(rank)) for rank in ranks.everybody]
    assert_reduced(waited(functional.all_reduce, ones[ranks.rank], "avg", ranks.pneumo), ones, "AVG")
    whole = numbers(ranks, 3 * ranks.size, 2 * ranks.size)
    for dimension in (0, 1):
        agree(ranks, partial(waited, functional.reduce_scatter_tensor, whole, "sum", dimension))


def check_functional_movements(ranks: Ranks) -> None:
    n = ranks.size
    mine = numbers(ranks, 2 * n, 3)
    for dimension in (0, 1):
        agree(ranks, partial(waited, functional.all_gather_tensor, mine, dimension))
    for root in ranks.everybody:
        agree(ranks, partial(waited, functional.broadcast, mine, root))
    splits = [[(a + b) % 3 for b in range(n)] for a in range(n)]
    sent, takes = numbers(ranks, sum(splits[ranks.rank]), 2), [splits[a][ranks.rank] for a in range(n)]
    agree(ranks, partial(waited, functional.all_to_all_single, sent, takes, splits[ranks.rank]))
    row = numbers(ranks, 6)  # permute_tensor is for one dimension only
    targets = [(k + 1) % n for k in range(n)]
    shifted = agree(ranks, partial(waited, functional.permute_tensor, row, targets))
    assert_same(shifted, draw((6,), torch.int8, "functional", (ranks.rank - 1) % n).float())


def check_functional_coalesced(ranks: Ranks) -> None:
    n = ranks.size
    some = [numbers(ranks, 2 * n), numbers(ranks, 3 * n, 2)]
    agree(ranks, partial(waited, functional.all_reduce_coalesced, some, "sum"))
    agree(ranks, partial(waited, functional.all_gather_into_tensor_coalesced, some))
    agree(ranks, partial(waited, functional.reduce_scatter_tensor_coalesced, some, "sum", [0, 0]))


def check_functional_results_wait_when_they_are_used(ranks: Ranks) -> None:
    result = functional.all_reduce(torch.full((50_000,), 1.0), "sum", ranks.pneumo)
    assert isinstance(result, functional.AsyncCollectiveTensor)
    assert_same(result + 1, torch.full((50_000,), ranks.size + 1.0))


def check_functional_gradients(ranks: Ranks) -> None:
    n, weight = ranks.size, ranks.rank + 1.0

    def gradients(group: Any) -> list[Any]:
        x, y, z = (torch.ones(2 * n, requires_grad=True) for _ in range(3))
        turned = functional.all_to_all_single_autograd(x * weight, [2] * n, [2] * n, group)
        (turned * weight).sum().backward()
        gathered = functional.all_gather_tensor_autograd(y * weight, 0, group)
        (gathered * torch.arange(2.0 * n * n)).sum().backward()
        scattered = functional.reduce_scatter_tensor_autograd(z, "sum", 0, group)
        (scattered * weight).sum().backward()
        return [x.grad, y.grad, z.grad]

    agree(ranks, gradients)


def check_differentiable_collectives(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    weight = me + 1.0

    def one(function: Callable[[torch.Tensor], Any]) -> list[Any]:
        x = torch.ones(2, requires_grad=True)
        results = function(x * weight)
        parts = results if isinstance(results, (tuple, list)) else [results]
        sum((k + 1) * weight * part.sum() for k, part in enumerate(parts)).backward()
        return [x.grad, *[part.detach() for part in parts]]

    def several(function: Callable[[list[torch.Tensor]], Any]) -> list[Any]:
        xs = [torch.ones(2, requires_grad=True) for _ in range(n)]
        results = function([x * (weight + k) for k, x in enumerate(xs)])
        parts = results if isinstance(results, (tuple, list)) else [results]
        sum((k + 1) * weight * part.sum() for k, part in enumerate(parts)).backward()
        return [*[x.grad for x in xs], *[part.detach() for part in parts]]

    def room() -> torch.Tensor:
        return torch.zeros(2)

    def call(group: Any) -> list[Any]:
        return [
            one(lambda x: differentiable.all_reduce(x, group=group)),
            one(lambda x: differentiable.broadcast(x, 0, group=group)),
            one(lambda x: differentiable.all_gather(x, group=group)),
            one(lambda x: differentiable.reduce(x, 0, group=group))[: 2 if me == 0 else 1],
            several(lambda xs: differentiable.scatter(xs, 0, group=group)),
            several(lambda xs: differentiable.reduce_scatter(room(), xs, group=group)),
            several(lambda xs: differentiable.all_to_all([room() for _ in xs], xs, group=group)),
            several(lambda xs: differentiable.all_to_all_single(torch.zeros(2 * n), torch.cat(xs), group=group)),
        ]

    agree(ranks, call)
    # Gloo scatters the gradients, which autograd expands, without looking at their strides: here the closed form.
    gathered = one(lambda x: differentiable.gather(x, 0, group=ranks.pneumo))
    assert_same(gathered[0], torch.full((2,), weight * (me + 1)))
    if me == 0:
        assert_same(gathered[1:], [torch.full((2,), rank + 1.0) for rank in ranks.everybody])


def check_objects_that_need_the_default_group(ranks: Ranks) -> None:
    """Without a group, calls go to the default one, which is pneumo's here."""
    assert dist.get_backend() == "pneumo"
    gathered: list[Any] = [None] * ranks.size
    dist.all_gather_object(gathered, ranks.rank)
    assert gathered == ranks.everybody
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    dist.barrier()
    assert tensor.item() == ranks.size

"""Cases of failure: ranks that call different things."""

import datetime
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from comm_faults.case import LARGE, LONG_S, Rank, case, dist, future_of, ones, works


def gather_to(root: int, group: Any, count: int = 4) -> None:
    me = dist.get_rank(group)
    outputs = [ones(count) for _ in range(dist.get_world_size(group))] if me == root else None
    dist.gather(ones(count), outputs, dst=root, group=group)


def scatter_from(root: int, group: Any) -> None:
    me = dist.get_rank(group)
    inputs = [ones() for _ in range(dist.get_world_size(group))] if me == root else None
    dist.scatter(ones(), inputs, src=root, group=group)


def unequal_splits(rank: int, group: Any) -> None:
    """Rank 0 sends 3 elements to rank 1, which expects 2."""
    sends = [[1, 3, 1], [1, 1, 1], [1, 1, 1]][rank]
    takes = [[1, 1, 1], [2, 1, 1], [1, 1, 1]][rank]
    dist.all_to_all_single(ones(sum(takes)), ones(sum(sends)), takes, sends, group=group)


def expected_nothing(rank: int, group: Any) -> None:
    """Nobody sends anything, but rank 1 expects 2 elements of rank 0, which is the last to come."""
    time.sleep(rank == 0)
    takes = [2, 0, 0] if rank == 1 else [0, 0, 0]
    dist.all_to_all_single(ones(sum(takes)), ones(0), takes, [0, 0, 0], group=group)


def many_at_once(rank: int, group: Any) -> None:
    """A coalesced all_reduce of which one rank has a tensor less."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.all_reduce_coalesced([ones(), ones()][: 1 + (rank != 1)], group=group)


# For each: what the ranks of a group of three call, given the group's rank and the group.
DISAGREEMENTS: dict[str, Callable[[int, Any], Any]] = {
    "operations": lambda r, g: [
        lambda: dist.all_reduce(ones(), group=g),
        lambda: dist.broadcast(ones(), 0, group=g),
        lambda: dist.barrier(g),
    ][r](),
    "dtypes": lambda r, g: dist.all_reduce(ones(4, torch.float64 if r == 2 else torch.float32), group=g),
    "dtypes_of_one_size": lambda r, g: dist.all_reduce(ones(4, torch.bfloat16 if r == 0 else torch.float16), group=g),
    "counts": lambda r, g: dist.all_reduce(ones(4 + r), group=g),
    "small_and_large": lambda r, g: dist.all_reduce(ones(LARGE if r == 1 else 4), group=g),
    "large": lambda r, g: dist.all_reduce(ones(LARGE + (r == 1)), group=g),
    "large_operations": lambda r, g: (
        dist.broadcast(ones(LARGE), 2, group=g) if r == 2 else dist.all_reduce(ones(LARGE), group=g)
    ),
    "roots_of_broadcast": lambda r, g: dist.broadcast(ones(), min(r, 1), group=g),
    "roots_of_a_large_broadcast": lambda r, g: dist.broadcast(ones(LARGE), min(r, 1), group=g),
    "roots_of_reduce": lambda r, g: dist.reduce(ones(), min(r, 1), group=g),
    "roots_of_gather": lambda r, g: gather_to(min(r, 1), g),
    "roots_of_scatter": lambda r, g: scatter_from(min(r, 1), g),
    "reduce_ops": lambda r, g: dist.all_reduce(ones(), dist.ReduceOp.MAX if r == 1 else dist.ReduceOp.SUM, group=g),
    "sum_and_average": lambda r, g: dist.all_reduce(ones(), dist.ReduceOp.AVG if r else dist.ReduceOp.SUM, group=g),
    "all_gather_counts": lambda r, g: dist.all_gather_into_tensor(ones(3 * (4 + r)), ones(4 + r), group=g),
    "reduce_scatter_counts": lambda r, g: dist.reduce_scatter_tensor(ones(4 + r), ones(3 * (4 + r)), group=g),
    "gather_counts": lambda r, g: gather_to(0, g, 4 + r),
    "coalesced": many_at_once,
    "monitored_barrier": lambda r, g: (
        dist.monitored_barrier(g, datetime.timedelta(seconds=LONG_S)) if r else dist.all_reduce(ones(), group=g)
    ),
    "asynchronous": lambda r, g: dist.all_reduce(ones(4 + r), group=g, async_op=True).wait(),
    "futures": lambda r, g: future_of(dist.all_reduce(ones(4 + r), group=g, async_op=True))(),
    "splits": unequal_splits,
    "splits_of_nothing": expected_nothing,
}


@case
def disagree(me: Rank) -> None:
    """Every disagreement in a group of its own; afterwards that group is broken for good, and no other is."""
    me.init()
    for name, call in DISAGREEMENTS.items():
        group = dist.new_group()
        works(group)
        me.caught(name, call, me.rank, group)
        me.caught(f"{name}/next", dist.all_reduce, ones(), group=group)
    works()


@case
def disagree_in_a_subgroup(me: Rank) -> None:
    """The group's ranks 0 and 1 are the world's 2 and 1: the error has the names by which users know them."""
    me.init()
    group = dist.new_group([1, 2], timeout=datetime.timedelta(seconds=LONG_S))
    if me.rank:
        me.caught("counts", dist.all_reduce, ones(4 + me.rank), group=group)
    works()


@case
def message_sizes(me: Rank) -> None:
    """A message of another size than the receive's; the next message passes."""
    me.init()
    if me.rank == 0:
        me.caught("size", dist.send, ones(4), 1)
        me.caught("next", dist.send, ones(3), 1)
    if me.rank == 1:
        me.caught("size", dist.recv, ones(8), 0)
        me.caught("next", dist.recv, ones(3), 0)
    works()

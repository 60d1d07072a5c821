"""A collective with everything that can be chosen about it, and what its result must be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from comm_checks.reference import assert_reduced, assert_same, draw, op_of
from comm_checks.world import rng

Verify = Callable[[], None]
Begun = tuple[Any, Verify]
SAME_PATTERN = 997  # keys that differ by it differ in their values only, and not in who sends how much to whom


@dataclass(frozen=True, slots=True)
class Case:
    """One collective of a group, the same on all its ranks; `key` tells its data from any other's.

    `op` counts for reductions only, and `root`, a rank of the group, where there is one.
    """

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    op: str
    root: int
    key: int
    transposed: bool = False

    def parts(self, size: int, *extra: int) -> list[torch.Tensor]:
        """The values that each rank of the group brings."""
        return [draw((*extra, *self.shape), self.dtype, self.kind, self.key, rank) for rank in range(size)]

    def room(self, *extra: int) -> torch.Tensor:
        """Where a result goes, of the shape or of several."""
        shape = (*extra, *self.shape)
        if self.transposed:
            return torch.zeros(shape[::-1], dtype=self.dtype).permute(list(range(len(shape)))[::-1])
        return torch.zeros(shape, dtype=self.dtype)

    def laid(self, values: torch.Tensor) -> torch.Tensor:
        """The values, laid out as the case wants them."""
        return self.room(*values.shape[: values.dim() - len(self.shape)]).copy_(values)


def begin(case: Case, group: Any, asynchronous: bool) -> Begun:
    """Start a collective; returns its Work (None after a synchronous call) and what checks the result afterwards."""
    return KINDS[case.kind](case, group, dist.get_rank(group), dist.get_world_size(group), asynchronous)


def all_reduce(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    tensor = case.laid(parts[me])
    work = dist.all_reduce(tensor, op_of(case.op), group, async_op=later)
    return work, lambda: assert_reduced(tensor, parts, case.op, case)


def broadcast(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    tensor = case.laid(parts[me])
    work = dist.broadcast(tensor, group=group, async_op=later, group_src=case.root)
    return work, lambda: assert_same(tensor, parts[case.root], case)


def reduce(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    tensor = case.laid(parts[me])
    work = dist.reduce(tensor, op=op_of(case.op), group=group, async_op=later, group_dst=case.root)
    return work, lambda: assert_reduced(tensor, parts, case.op, case) if me == case.root else None


def all_gather(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    outputs = [case.room() for _ in range(size)]
    work = dist.all_gather(outputs, case.laid(parts[me]), group, async_op=later)
    return work, lambda: assert_same(outputs, parts, case)


def all_gather_single(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    output = case.room(size)
    work = dist.all_gather_single(output, case.laid(parts[me]), group, async_op=later)
    return work, lambda: assert_same(output, torch.stack(parts), case)


def gather(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    outputs = [case.room() for _ in range(size)] if me == case.root else None
    work = dist.gather(case.laid(parts[me]), outputs, group=group, async_op=later, group_dst=case.root)
    return work, lambda: assert_same(outputs, parts if outputs else None, case)


def scatter(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    parts = case.parts(size)
    output = case.room()
    inputs = [case.laid(part) for part in parts] if me == case.root else None
    work = dist.scatter(output, inputs, group=group, async_op=later, group_src=case.root)
    return work, lambda: assert_same(output, parts[me], case)


def reduce_scatter(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    wholes = case.parts(size, size)
    output = case.room()
    inputs = [case.laid(part) for part in wholes[me]]
    work = dist.reduce_scatter(output, inputs, op_of(case.op), group, async_op=later)
    return work, lambda: assert_reduced(output, [whole[me] for whole in wholes], case.op, case)


def reduce_scatter_single(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    wholes = case.parts(size, size)
    output = case.room()
    work = dist.reduce_scatter_single(output, case.laid(wholes[me]), op_of(case.op), group, async_op=later)
    return work, lambda: assert_reduced(output, [whole[me] for whole in wholes], case.op, case)


def all_to_all(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    wholes = case.parts(size, size)
    outputs = [case.room() for _ in range(size)]
    work = dist.all_to_all(outputs, [case.laid(part) for part in wholes[me]], group, async_op=later)
    return work, lambda: assert_same(outputs, [whole[me] for whole in wholes], case)


def all_to_all_single(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    """Rows of the shape, of which every pair of ranks exchanges another number."""
    splits = rng("splits", case.key % SAME_PATTERN).integers(0, 4, (size, size)).tolist()
    sent = [draw((sum(splits[k]), *case.shape), case.dtype, case.kind, case.key, k) for k in range(size)]
    takes = [splits[k][me] for k in range(size)]
    output = torch.zeros((sum(takes), *case.shape), dtype=case.dtype)
    work = dist.all_to_all_single(output, sent[me], takes, splits[me], group, async_op=later)
    expected = torch.cat([torch.split(sent[k], splits[k])[me] for k in range(size)])
    return work, lambda: assert_same(output, expected, case)


def messages(case: Case, group: Any, me: int, size: int, later: bool) -> Begun:
    """Every rank to some others, itself too; a synchronous case waits at its end."""
    random = rng("pairs", case.key % SAME_PATTERN)
    pairs = [divmod(int(pair), size) for pair in random.choice(size * size, size, replace=False)]
    works: list[Any] = []
    received = []
    for source, target in pairs:
        if me == source:
            sent = case.laid(draw(case.shape, case.dtype, "pair", case.key, source, target))
            works.append(dist.isend(sent, group=group, tag=case.key % SAME_PATTERN, group_dst=target))
    for source, target in pairs[::-1]:
        if me == target:
            received.append((source, case.room()))
            works.append(dist.irecv(received[-1][1], group=group, tag=case.key % SAME_PATTERN, group_src=source))
    everything = All(works)
    if not later:
        everything.wait()

    def verify() -> None:
        for source, tensor in received:
            assert_same(tensor, draw(case.shape, case.dtype, "pair", case.key, source, me), case)

    return everything if later else None, verify


@dataclass(frozen=True, slots=True)
class All:
    """Several works that are waited for together."""

    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


REDUCTIONS = {"all_reduce": all_reduce, "reduce": reduce, "reduce_scatter": reduce_scatter}
REDUCTIONS |= {"reduce_scatter_single": reduce_scatter_single}
MOVEMENTS = {"broadcast": broadcast, "all_gather": all_gather, "all_gather_single": all_gather_single}
MOVEMENTS |= {"gather": gather, "scatter": scatter, "all_to_all": all_to_all, "all_to_all_single": all_to_all_single}
KINDS: dict[str, Callable[[Case, Any, int, int, bool], Begun]] = {**REDUCTIONS, **MOVEMENTS, "messages": messages}

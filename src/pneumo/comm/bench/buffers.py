"""Buffers to measure on, that go round so that none is in the cache for having been used before; and their check."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pneumo.comm.bench.cases import ITEM_BYTES, Case, about
from pneumo.errors import PneumoError
from pneumo.world import Together

PERIOD = 7
CHUNK = PERIOD * (1 << 17)  # elements that are written or checked at once
_SPACING = 192  # so that buffers do not all begin at the same place of a page

Bytes = NDArray[np.uint8]
Allocate = Callable[[int], torch.Tensor]  # a number of bytes to a uint8 tensor (n,)


def own_memory(size: int) -> torch.Tensor:
    """Bytes of an anonymous mapping that malloc knows nothing of."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8))


def group_memory(group: Any) -> Allocate:
    """What allocates from a process group; raises Together where that gives ordinary memory, having no more."""
    device = torch.device("cpu")

    def allocate(size: int) -> torch.Tensor:
        tensor: torch.Tensor = group._get_backend(device).allocate_tensor(size, dtype=torch.uint8, device=device)
        if not _is_memfd(tensor.data_ptr()):
            raise Together(PneumoError(f"--shared: {about(size)} a rank are more than PNEUMO_COMM_BYTES allows."))
        return tensor

    return allocate


def _is_memfd(address: int) -> bool:
    """Whether an address lies in anonymous memory that processes share by a file descriptor."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return "/memfd:" in line
    return False


@dataclass(frozen=True, slots=True)
class Slot:
    """The tensors of one call: `input` and `output` (n or n/p elements; one tensor where the operation is in place).

    `whole` and `other` are the two different buffers of n elements that they lie in.
    """

    input: torch.Tensor
    output: torch.Tensor
    whole: torch.Tensor
    other: torch.Tensor
    root: int


class Pool:
    """`count` slots on as many buffers of a case's size, in one piece of memory."""

    def __init__(self, case: Case, count: int, allocate: Allocate = own_memory) -> None:
        self.case = case
        size, unit = max(case.bytes, ITEM_BYTES[case.dtype]), 64
        stride = -(-size // unit) * unit + _SPACING
        memory = allocate(stride * count)
        dtype = getattr(torch, case.dtype)
        rows = [memory[i * stride : i * stride + size].view(dtype) for i in range(count)]
        self.slots = [self._slot(rows, i) for i in range(count)]
        self._next, self._fills = 0, 0
        for row in rows:
            row.fill_(1)

    def _slot(self, rows: list[torch.Tensor], i: int) -> Slot:
        case, whole, other = self.case, rows[i], rows[(i + len(rows) // 2) % len(rows)]
        source = whole[: case.shard] if case.op.input_shard else whole
        target = whole if case.op.in_place else other
        return Slot(
            input=source,
            output=target[: case.shard] if case.op.output_shard else target,
            whole=whole,
            other=other,
            root=i % case.ranks,  # it changes from call to call, so that no rank can run ahead of the others for long
        )

    def take(self, calls: int) -> list[int]:
        """The numbers of the slots for the next calls, those first that were used longest ago."""
        taken = [(self._next + i) % len(self.slots) for i in range(calls)]
        self._next = (self._next + calls) % len(self.slots)
        return taken

    def refill(self, taken: list[int]) -> None:
        """Write new values to what these calls have read and written."""
        self._fills += 1
        for i in sorted(set(taken)):
            self.slots[i].whole.fill_(1 + self._fills % 2)
            self.slots[i].other.fill_(1 + self._fills % 2)


def raw(tensor: torch.Tensor) -> Bytes:
    """The bytes (n,) of a contiguous tensor, in the same memory."""
    array: Bytes = tensor.view(torch.uint8).numpy()
    return array


def write_pattern(tensor: torch.Tensor, rank: int) -> None:
    """Write what a rank brings to a check: small whole numbers that repeat after PERIOD elements."""
    period = torch.from_numpy(_pattern(rank, CHUNK)).to(tensor.dtype)
    for start in range(0, tensor.numel(), CHUNK):
        part = tensor[start : start + CHUNK]
        part.copy_(period[: part.numel()])


def mistake(case: Case, rank: int, slot: Slot, output: torch.Tensor) -> str | None:
    """What is wrong in a rank's output of an operation on everybody's pattern, None if nothing; sums are NumPy's."""
    if output.numel() != slot.output.numel():
        return f"gives {output.numel()} elements instead of {slot.output.numel()}"
    for start, length, at, ranks in _parts(case, rank, slot.root):
        numbers = sum((_pattern(r, CHUNK + PERIOD) for r in ranks), np.zeros(CHUNK + PERIOD, np.int64))
        period = torch.from_numpy(numbers).to(output.dtype)
        for begin in range(0, length, CHUNK):
            count = min(CHUNK, length - begin)
            phase = (at + begin) % PERIOD
            got, expected = output[start + begin : start + begin + count], period[phase : phase + count]
            if not _equal(got, expected, len(ranks)):
                i = int((got != expected).nonzero()[0])
                return f"has {got[i].item()} instead of {expected[i].item()} as element {start + begin + i}"
    return None


def _parts(case: Case, rank: int, root: int) -> Iterator[tuple[int, int, int, list[int]]]:
    """(start, length, place in the pattern, ranks that are summed) of each part of a rank's output."""
    op, count, shard, everyone = case.op.name, case.count, case.shard, list(range(case.ranks))
    if op == "allreduce" or (op == "reduce" and rank == root):
        yield 0, count, 0, everyone
    elif op == "reduce_scatter":
        yield 0, shard, rank * shard, everyone
    elif op == "broadcast":
        yield 0, count, 0, [root]
    elif op in ("allgather", "alltoall"):
        for other in everyone:
            yield other * shard, shard, rank * shard if op == "alltoall" else 0, [other]


def _pattern(rank: int, length: int) -> NDArray[np.int64]:
    return (np.arange(length, dtype=np.int64) + 3 * rank) % PERIOD


def _equal(got: torch.Tensor, expected: torch.Tensor, ranks: int) -> bool:
    if torch.equal(got, expected):
        return True
    dtype = got.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return False
    eps = torch.finfo(dtype).eps
    if ranks * (PERIOD - 1) <= 2 / eps:  # every partial sum is a whole number that the type can hold
        return False
    return torch.allclose(got, expected, rtol=min(ranks * eps, 0.25), atol=0)

"""Ranks that are threads of one process, so that a test can have many worlds without starting one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Ranks:
    """`count` ranks; `sums` counts the small sums of each."""

    def __init__(self, count: int) -> None:
        self.count, self.sums = count, [0] * count
        self._parts = [torch.zeros(0)] * count
        self._barrier = threading.Barrier(count, timeout=30)

    def small_sum(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What sums over the ranks, for one of them."""

        def add_up(tensor: torch.Tensor) -> torch.Tensor:
            assert tensor.device.type == "cpu"
            assert tensor.is_contiguous()
            self.sums[rank] += 1
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            total = sum(self._parts[1:], self._parts[0])
            self._barrier.wait()
            return tensor.copy_(total)

        return add_up

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Run work(rank) on all ranks at once; raises the error of the first rank that has one of its own."""
        with ThreadPoolExecutor(self.count) as pool:
            calls = [pool.submit(self._run, work, rank) for rank in range(self.count)]
        errors = [error for call in calls if (error := call.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [call.result() for call in calls]

    def _run(self, work: Callable[[int], T], rank: int) -> T:
        try:
            return work(rank)
        except BaseException:
            self._barrier.abort()
            raise

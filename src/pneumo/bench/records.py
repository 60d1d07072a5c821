"""What a collective's record costs: bursts of tiny all-reduces with the hooks attached and without, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from pneumo.bench.turns import Times, in_turns, no_collection
from pneumo.comm import native
from pneumo.comm.records import GroupRecords
from pneumo.study.statistics import Estimate, hodges_lehmann, median

if TYPE_CHECKING:
    from pneumo.world import World

Kind = Literal["blocking", "async"]
KINDS: tuple[Kind, ...] = ("blocking", "async")
WARMUP_CALLS = 5
BURST_US, LEAST_CALLS, MOST_CALLS = 2000, 20, 200  # of a burst


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one group and kind of call, microseconds a call: the call alone, and what a record adds to it.

    `native` and `in_python` are differences of wall time of the slowest rank, `native_cpu` of its issuing thread's CPU
    time; those of the native hooks are None where they are not built.
    """

    comm: str
    ranks: int
    kind: Kind
    call: Estimate
    native: Estimate | None
    native_cpu: Estimate | None
    in_python: Estimate


def record_cost(world: World, group: Any, comm: str, ranks: int, kind: Kind, seconds: float) -> Cost | None:
    """Measure one group's records; None on ranks outside of it. Collective over the world, whose other ranks sleep."""
    cost, members = None, world.first(ranks)
    if members is not None:
        world.bind(ranks, 1)
        with no_collection():
            cost = _measure(_Bursts(group, members, kind), comm, ranks, kind, seconds)
    world.wait()
    return cost


def _measure(bursts: _Bursts, comm: str, ranks: int, kind: Kind, seconds: float) -> Cost:
    hooks = {"in Python": {"in_python": True}} | ({"native": {"in_python": False}} if native() is not None else {})
    variants: dict[str, Callable[[], Times]] = {"none": bursts.bare}
    variants |= {name: lambda chosen=chosen: bursts.recorded(**chosen) for name, chosen in hooks.items()}  # type: ignore[misc]
    found = in_turns(bursts.members, variants, seconds)
    more = {name: [hodges_lehmann(more) for more in (found[name] - found["none"]).T] for name in hooks}
    native_wall, native_cpu = more.get("native", (None, None))
    return Cost(comm, ranks, kind, median(found["none"][:, 0]), native_wall, native_cpu, more["in Python"][0])


class _Bursts:
    """Bursts of calls on a group: microseconds a call."""

    def __init__(self, group: Any, members: Any, kind: Kind) -> None:
        self.members = members
        self._group, self._waits = group, kind == "async"
        self._tensor = torch.zeros(1)  # stays 0 however often it is summed
        self._count = WARMUP_CALLS
        self.bare()
        took_us = members.allreduce(self.bare().wall) / members.size
        self._count = int(min(MOST_CALLS, max(LEAST_CALLS, BURST_US / took_us)))

    def bare(self) -> Times:
        """A burst as it is."""
        self._calls(WARMUP_CALLS)
        self.members.Barrier()
        begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
        self._calls(self._count)
        end_cpu, end = time.thread_time_ns(), time.perf_counter_ns()
        return Times((end - begin) / 1000 / self._count, (end_cpu - begin_cpu) / 1000 / self._count)

    def _calls(self, count: int) -> None:
        for _ in range(count):
            work = dist.all_reduce(self._tensor, group=self._group, async_op=self._waits)
            if work is not None:
                work.wait()

    def recorded(self, *, in_python: bool) -> Times:
        """A burst whose calls leave records."""
        with _attached(self._group, in_python=in_python) as records:
            took = self.bare()
            found = records.take()
            assert len(found) == WARMUP_CALLS + self._count, f"{len(found)} records of {self._count} calls"
        return took


@contextmanager
def _attached(group: Any, *, in_python: bool) -> Iterator[GroupRecords]:
    records = GroupRecords(group, "benchmark", in_python=in_python)
    records.attach()
    try:
        yield records
    finally:
        records.detach()


def reading_cost(group: Any, seconds: float) -> tuple[Estimate, Estimate]:
    """Of a group with this rank in it: microseconds a record to take it, and to make its row. Collective over it."""
    tensor = torch.zeros(1)
    taking: list[float] = []
    making: list[float] = []
    where = {"run": 0, "block": 1, "rank": 0, "step": 0}
    end = time.monotonic() + seconds
    with _attached(group, in_python=native() is None) as records, no_collection():
        while time.monotonic() < end or len(taking) < 10:
            for _ in range(LEAST_CALLS):
                dist.all_reduce(tensor, group=group)
            begin = time.perf_counter_ns()
            found = records.take()
            taken = time.perf_counter_ns()
            rows = [{**where, "backend": "pneumo", **call.columns()} for call in found]
            made = time.perf_counter_ns()
            taking.append((taken - begin) / 1000 / len(rows))
            making.append((made - taken) / 1000 / len(rows))
    return median(taking), median(making)

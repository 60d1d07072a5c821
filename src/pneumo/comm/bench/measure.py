"""The measurement: for each case, every library checked once, then sampled in turns on buffers that go round."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pneumo import collective, machine
from pneumo.comm.bench import memory
from pneumo.comm.bench.buffers import Allocate, Pool, mistake, own_memory, write_pattern
from pneumo.comm.bench.cases import Case, about, buffers_for, buffers_that_fit, calls_a_sample, size_text
from pneumo.comm.bench.libraries import Absent, Call, Library
from pneumo.errors import PneumoError
from pneumo.world import Together, World

ENOUGH, TOO_FEW = 6, 3  # samples: for an interval, and for a range when time runs out
_LARGE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Samples:
    """A library's samples of a case: microseconds a call, of the slowest rank, in the order of the rounds."""

    library: str
    us: tuple[float, ...]
    calls: int  # in each sample
    faults: float  # page faults a call, of the rank that has most (median)
    waited: float  # of the time of all samples: how much the main thread could run and had no core (worst rank)


def turns(count: int, round_number: int) -> list[int]:
    """The order of a round: each begins with another one, and every second one goes backwards."""
    order = [(i + round_number // 2) % count for i in range(count)]
    return order[::-1] if round_number % 2 else order


def is_enough(rounds: int, elapsed_s: float, share_s: float, most: int) -> bool:
    """Whether to end a case: at `most` rounds, or when its share of the time is used and there are enough of them."""
    if rounds >= most or (rounds >= ENOUGH and elapsed_s >= share_s):
        return True
    return rounds >= TOO_FEW and elapsed_s >= 3 * share_s


class Bench:
    """Measures cases on all ranks of a world, on buffers from `allocate`; `say` takes a line of progress at times."""

    def __init__(self, world: World, repeats: int, say: Callable[[str], None], allocate: Allocate = own_memory) -> None:
        self._world, self._repeats, self._say, self._allocate = world, repeats, say, allocate
        self._comm = world.comm
        self._crowded = world.size > world.total_cores
        self._cache_bytes = memory.cache_bytes()
        torch.set_num_threads(1)

    def able(self, case: Case, libraries: Sequence[Library]) -> tuple[list[Library], dict[str, str]]:
        """Try an operation and type on a tiny case: (libraries that can do it, {name: reason} of those that cannot)."""
        pool, can, cannot = Pool(case, case.ranks, self._allocate), [], {}
        for library in libraries:
            reason = None
            with self._at_work(library, case):
                try:
                    library.call(case.op, case.dtype, pool.slots[0])()
                except Absent as error:
                    reason = str(error)
                except Exception as error:
                    reason = f"cannot do it ({' '.join(str(error).split())[:160]})"
                reasons = [why for why in self._comm.allgather(reason) if why]
            if reasons:
                cannot[library.name] = reasons[0]
            else:
                can.append(library)
        return can, cannot

    def buffers(self, case: Case) -> int | str:
        """How many buffers each rank gets for a case, or why there is no memory for it; the same on all ranks."""
        wanted, free = buffers_for(case.bytes, self._cache_bytes), memory.available_bytes()
        here = self._world.local_size
        found, free = min(self._comm.allgather((buffers_that_fit(case.bytes, wanted, here, free), free)))
        if found:
            return int(found)
        return (
            f"{size_text(case.bytes)}: two buffers and as much again for each of {here} ranks would take "
            f"{about(4 * case.bytes * here)} of a node's memory, and {about(free)} are free"
        )

    def run(self, case: Case, libraries: Sequence[Library], buffers: int, share_s: float) -> list[Samples]:
        """Check every library, then sample all in turns for about `share_s` seconds; the same on all ranks.

        Raises Together where an output is wrong.
        """
        pool = Pool(case, buffers, self._allocate)
        calls = {lib.name: [lib.call(case.op, case.dtype, slot) for slot in pool.slots] for lib in libraries}
        first_s = [self._check(library, case, pool, calls[library.name]) for library in libraries]
        first_s = list(np.max(self._comm.allgather(first_s), axis=0))
        counts = [calls_a_sample(case.bytes, call_s) for call_s in first_s]
        rounds: list[list[tuple[int, int, int]]] = []
        begin = time.monotonic()
        with _no_collection():
            while True:
                samples = [(0, 0, 0)] * len(libraries)
                for i in turns(len(libraries), len(rounds)):
                    samples[i] = self._sample(libraries[i], calls[libraries[i].name], pool, counts[i])
                rounds.append(samples)
                done = is_enough(len(rounds), time.monotonic() - begin, share_s, self._repeats)
                self._say(f"{case}: {len(rounds)} rounds")
                if self._comm.bcast(done):
                    break
        slowest = np.array(rounds, dtype=np.int64)
        from mpi4py import MPI

        self._comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
        return [
            Samples(
                library.name,
                tuple((slowest[:, i, 0] / counts[i] / 1000).tolist()),
                counts[i],
                float(np.median(slowest[:, i, 1]) / counts[i]),
                float(min(1, slowest[:, i, 2].sum() / slowest[:, i, 0].sum())),
            )
            for i, library in enumerate(libraries)
        ]

    def _check(self, library: Library, case: Case, pool: Pool, calls: Sequence[Call]) -> float:
        """Compare a library's output with NumPy's; returns the seconds of a call that is not the first."""
        slot, wrong = pool.slots[0], None
        with self._at_work(library, case):
            if case.bytes:
                write_pattern(slot.input, self._comm.rank)
            self._together()
            returned = calls[0]()
            if library.checked and case.bytes:
                output = returned if isinstance(returned, torch.Tensor) else slot.output
                wrong = mistake(case, self._comm.rank, slot, output)
            pool.refill([0])
            took = []
            for call in calls[1 : 2 if case.bytes >= _LARGE_BYTES else 4]:
                self._together()
                begin = time.monotonic()
                call()
                took.append(time.monotonic() - begin)
        mistakes = [(rank, text) for rank, text in enumerate(self._comm.allgather(wrong)) if text]
        if mistakes:
            raise Together(PneumoError(f"{library.name}: {case} {mistakes[0][1]} on rank {mistakes[0][0]}."))
        return min(took)

    def _sample(self, library: Library, calls: Sequence[Call], pool: Pool, count: int) -> tuple[int, int, int]:
        """Warm up, then time `count` calls back to back: (ns, page faults, ns without a core) of this rank."""
        with self._at_work(library, pool.case):
            for i in pool.take(1 if pool.case.bytes >= _LARGE_BYTES else 2):
                calls[i]()
            taken = pool.take(count)
            timed = [calls[i] for i in taken]
            self._together()
            waited_ns, faults, begin = _run_delay_ns(), memory.faults(), time.perf_counter_ns()
            for call in timed:
                call()
            end = time.perf_counter_ns()
            faults, waited_ns = memory.faults() - faults, _run_delay_ns() - waited_ns
        pool.refill(taken)
        return end - begin, faults, waited_ns

    @contextlib.contextmanager
    def _at_work(self, library: Library, case: Case) -> Iterator[None]:
        self._world.watchdog.at(case, "by", library.name)
        library.resume()
        yield
        library.pause()  # not after an error: that ends the job, and stopping Horovod would wait for the other ranks

    def _together(self) -> None:
        """Let all ranks begin at once; where they share cores, those that wait long sleep first."""
        if self._crowded:
            collective.wait_for_all(self._comm)
        self._comm.Barrier()


def _run_delay_ns() -> int:
    """How long this thread has been ready to run without a core, where the kernel tells: the second of schedstat."""
    return int((machine.read("/proc/thread-self/schedstat") or "0 0 0").split()[1])


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

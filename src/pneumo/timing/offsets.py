"""The offsets of the ranks' clocks from rank 0's, measured over MPI.

Ranks of one kernel (its boot id) and one time namespace read the same CLOCK_MONOTONIC: one timekeeper, which the kernel
keeps equal on all cores (a TSC that is not is given up as clock source). Their offset is 0 by construction, not by
measurement, and the error below a microsecond is that of reading it. Round trips check it all the same: an interval
that excludes 0 makes a rank a host of its own, measured like any other.

A round trip bounds an offset with certainty, whatever the delays: the asking rank reads t0, sends; the other reads T,
answers; the asking rank reads t1. T was read between t0 and t1, so T's clock was ahead by T - t1 at least and T - t0 at
most. The intervals of many trips are intersected, each widened by MOST_DRIFT for the time between, around that of the
fastest trip. Source: F. Cristian, Probabilistic clock synchronization, Distributed Computing 3 (1989).

One pair at a time spins, within a small budget; who waits for its turn, or for the end, sleeps.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter_ns as now
from typing import TYPE_CHECKING, Any

from pneumo import collective, machine
from pneumo.errors import PneumoError
from pneumo.study.common_clock import MOST_DRIFT
from pneumo.study.schema import Clock, ClockHost, ClockSample

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

RESOLUTION_NS = max(1, math.ceil(time.clock_getres(time.CLOCK_MONOTONIC) * 1e9))
SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
_TAG = 1989
_FEWEST, _MOST = 16, 300  # round trips of a pair; beyond the fewest they stop when their time is up
_CHECK_NS, _SAMPLE_NS = 20_000_000, 3_000_000  # that time: once a rank, and many times a run
_LIMIT_S = 30.0  # for one answer, once all ranks have come
_EAGER = 20  # looks at a message before the core is offered to others between looks
_NAP_S = 0.0005


@dataclass(frozen=True, slots=True)
class Trip:
    """One round trip in ns: sent and returned by the asking rank's clock, answered by the other's."""

    sent: int
    answered: int
    returned: int


def interval(trips: Sequence[Trip]) -> tuple[int, int, int]:
    """(moment of the other clock, least, greatest ns by which it was ahead then), from at least one round trip.

    The truth lies within, whatever the delays were, where the clocks drift apart by at most MOST_DRIFT.
    """
    best = min(trips, key=lambda trip: trip.returned - trip.sent)
    limits = []
    for trip in (best, *trips):
        slack = math.ceil(MOST_DRIFT * abs(trip.answered - best.answered)) + RESOLUTION_NS
        limits.append((trip.answered - trip.returned - slack, trip.answered - trip.sent + slack))
    low, high = max(least for least, _ in limits), min(most for _, most in limits)
    return best.answered, *((low, high) if low <= high else limits[0])


def identity(rank: int) -> tuple[str, ...]:
    """What two ranks have in common exactly where they read the same clock; a rank that cannot tell has its own."""
    boot = machine.read("/proc/sys/kernel/random/boot_id")
    if not boot:
        return ("unknown", str(rank))
    try:
        return boot, os.readlink("/proc/self/ns/time")
    except OSError:  # a kernel from before there were time namespaces
        return (boot,)


class Offsets:
    """The clocks of a world's ranks: who shares one, and samples of the others against rank 0's.

    Every method is collective over the communicator. A sample costs about 3 ms for each host beyond the first, and
    nothing where there is one clock. Raises PneumoError where a rank does not answer in time.
    """

    def __init__(self, comm: Intracomm) -> None:
        self._comm = comm
        self._samples: list[ClockSample] = []
        together: dict[tuple[str, ...], list[int]] = {}
        for rank, key in enumerate(collective.gather(comm, lambda: identity(comm.rank))):
            together.setdefault(key, []).append(rank)
        mine = next(ranks for ranks in together.values() if comm.rank in ranks)
        # Of each rank but its host's first: by how much its clock can differ from the first one's, and whether 0 fits.
        found: dict[int, tuple[int, bool]] = {}
        checked = self._check(mine)  # not within `gather`, which would wait for a rank that does not answer
        for part in collective.gather(comm, lambda: checked):
            found |= part
        self._name = collective.gather(comm, socket.gethostname)
        self._hosts: list[ClockHost] = []
        for ranks in together.values():
            apart = [rank for rank in ranks if rank in found and not found[rank][1]]
            same = [rank for rank in ranks if rank not in apart]
            checks = [found[rank][0] for rank in same if rank in found]
            self._add_host(same, max(checks, default=None))
            for rank in apart:
                self._add_host([rank], None)
        self._hosts.sort(key=lambda host: host.ranks[0])
        self.sample()

    def _add_host(self, ranks: list[int], check_ns: int | None) -> None:
        self._hosts.append(ClockHost(name=self._name[ranks[0]], ranks=ranks, check_ns=check_ns))

    def _check(self, ranks: list[int]) -> dict[int, tuple[int, bool]]:
        """Round trips between a host's first rank and its others, one after the other; what the first one found."""
        if self._comm.rank != ranks[0]:
            answer(self._comm, ranks[0])
            return {}
        found = {}
        for rank in ranks[1:]:
            _, low, high = interval(ask(self._comm, rank, _CHECK_NS))
            found[rank] = max(-low, high), low <= 0 <= high
        return found

    @property
    def several(self) -> bool:
        """Whether there is more than one clock."""
        return len(self._hosts) > 1

    def sample(self) -> None:
        """Measure every other host's clock against rank 0's; all ranks leave together."""
        if not self.several:
            return
        for rank in (host.ranks[0] for host in self._hosts[1:]):
            if self._comm.rank == 0:
                at, low, high = interval(ask(self._comm, rank, _SAMPLE_NS))
                middle = (low + high) // 2
                self._samples.append(ClockSample(rank=rank, at_ns=at, offset_ns=middle, bound_ns=high - middle))
            elif self._comm.rank == rank:
                answer(self._comm, 0)
        collective.wait_for_all(self._comm)

    def clock(self) -> Clock:
        """What goes into run.json, on rank 0; not collective."""
        source = machine.read(SOURCE)
        return Clock(resolution_ns=RESOLUTION_NS, source=source, hosts=self._hosts, samples=list(self._samples))


def ask(comm: Intracomm, rank: int, budget_ns: int) -> list[Trip]:
    """Make round trips to a rank that calls `answer`, for about so long."""
    word, back = array("q", [1]), array("q", [0])
    send, receive = comm.Send_init(word, rank, _TAG), comm.Recv_init(back, rank, _TAG)
    receive.Start()
    send.Start()
    _await(receive, rank, asleep=True)  # it wakes up; from here on it looks without pause
    send.Wait()
    trips: list[Trip] = []
    with _on_core(min):
        end = now() + budget_ns
        while len(trips) < _MOST and (len(trips) < _FEWEST or trips[-1].returned < end):
            receive.Start()
            sent = now()
            send.Start()
            _await(receive, rank)
            returned = now()
            trips.append(Trip(sent, back[0], returned))
            send.Wait()
    word[0] = 0
    send.Start()
    send.Wait()
    send.Free()
    receive.Free()
    return trips


def answer(comm: Intracomm, rank: int) -> None:
    """Answer the round trips of a rank that calls `ask`, until it says that it has enough; asleep until it begins."""
    stamp, word = array("q", [0]), array("q", [1])
    send, receive = comm.Send_init(stamp, rank, _TAG), comm.Recv_init(word, rank, _TAG)
    receive.Start()
    _await(receive, rank, asleep=True)
    with _on_core(max):
        while word[0]:
            stamp[0] = now()
            send.Start()
            receive.Start()
            _await(receive, rank)
            send.Wait()
    send.Free()
    receive.Free()


@contextlib.contextmanager
def _on_core(choose: Callable[[set[int]], int]) -> Iterator[None]:
    """Keep the calling thread on one of its cores: two ranks of a host that share one would take turns, 4 us each."""
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {choose(mask)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mask)


def _await(request: Any, rank: int, *, asleep: bool = False) -> None:
    """Return once a receive is complete; between looks at it sleep, or offer the core after the first few."""
    looks, end = 0, now() + int(_LIMIT_S * 1e9)
    while not request.Test():
        looks += 1
        if asleep:
            time.sleep(_NAP_S)
        elif looks > _EAGER:
            os.sched_yield()
        if now() > end:
            request.Cancel()
            request.Wait()
            raise PneumoError(
                f"Rank {rank} on the other side of a clock measurement did not answer for {_LIMIT_S:.0f} s: is it "
                "stopped, or its host out of reach?"
            )

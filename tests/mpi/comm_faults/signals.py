"""Cases of failure: signals."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from comm_faults.case import LARGE, Rank, case, dist, ones, patient, works

SIGNALS_S = 25  # the timeout that a signal has to forestall


def signalled(me: Rank, number: int, block: Callable[[], Any]) -> None:
    """Rank 0 gets a signal while it is blocked; the others wait for it in a collective."""
    me.init()
    works()
    patient(None, SIGNALS_S)
    me.meet("ready")
    if me.rank == 0:
        threading.Timer(1, lambda: os.kill(os.getpid(), number)).start()
        me.write({})
        me.caught("blocked", block)
        me.write({})
        raise SystemExit(3)
    me.caught("peer", dist.all_reduce, ones(LARGE))


@case
def interrupted_in_a_collective(me: Rank) -> None:
    """In a group of its own for the blocked rank, so that the others wait for it and not for one another."""
    group: dict[str, Any] = {}

    def block() -> None:
        dist.barrier(group["alone"])

    me.init()
    works()
    group["alone"] = dist.new_group()
    patient(None, SIGNALS_S)
    patient(group["alone"], SIGNALS_S)
    me.meet("ready")
    if me.rank == 0:
        threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        me.caught("blocked", block)
        me.write({})
        raise SystemExit(3)
    me.caught("peer", dist.all_reduce, ones())


@case
def interrupted_in_a_wait(me: Rank) -> None:
    signalled(me, signal.SIGINT, lambda: dist.irecv(ones(), 1).wait())


@case
def interrupted_in_a_recv(me: Rank) -> None:
    signalled(me, signal.SIGINT, lambda: dist.recv(ones(), 1))


@case
def terminated_in_a_recv(me: Rank) -> None:
    signalled(me, signal.SIGTERM, lambda: dist.recv(ones(), 1))

"""Cases of failure: a rank that comes too late."""

import datetime
import time
from collections.abc import Callable
from typing import Any

from comm_faults.case import LARGE, LONG_S, Rank, case, dist, future_of, ones, patient, works

LATE_S = 2.0
# For each: what the ranks call in a group of three whose rank 2 is late.
ARRIVALS: dict[str, Callable[[Any], Any]] = {
    "small": lambda g: dist.all_reduce(ones(), group=g),
    "large": lambda g: dist.all_reduce(ones(LARGE), group=g),
    "barrier": lambda g: dist.barrier(g),
    "monitored_barrier": lambda g: dist.monitored_barrier(g, datetime.timedelta(seconds=LATE_S)),
    "broadcast": lambda g: dist.broadcast(ones(), 2, group=g),
}
LATER: dict[str, Callable[[Any], Any]] = {  # the same, started and then waited for
    "future": lambda g: future_of(dist.all_reduce(ones(), group=g, async_op=True)),
    "large_future": lambda g: future_of(dist.all_reduce(ones(LARGE), group=g, async_op=True)),
    "work": lambda g: dist.all_gather_into_tensor(ones(12), ones(4), group=g, async_op=True).wait,
}


@case
def late(me: Rank) -> None:
    """Each call in a group of its own; the late rank calls when the others have given up."""
    me.init()
    groups = {name: dist.new_group() for name in (*ARRIVALS, *LATER, "queue")}
    for name, group in groups.items():
        works(group)
        patient(group, LONG_S if name == "monitored_barrier" else LATE_S)  # the barrier has a timeout of its own
    me.meet("ready")
    if me.rank < 2:
        started = {name: start(groups[name]) for name, start in LATER.items()}
        queued = [dist.all_reduce(ones(), group=groups["queue"], async_op=True) for _ in range(3)]
        for name, wait in started.items():
            me.caught(name, wait)
        for i, work in enumerate(queued):
            me.caught(f"queue/{i}", work.wait)
        for name, call in ARRIVALS.items():
            me.caught(name, call, groups[name])
            me.caught(f"{name}/next", dist.all_reduce, ones(), group=groups[name])
    me.meet("others gave up")
    if me.rank == 2:
        for name, call in ARRIVALS.items():
            me.caught(name, call, groups[name])
        for name, start in LATER.items():
            me.caught(name, start(groups[name]))
    me.meet("done")
    works()


@case
def a_listener_outlives_the_timeout(me: Rank) -> None:
    """A receive that is open for longer than the timeout, while collectives go on, until somebody sends."""
    me.init()
    group = dist.new_group()
    works(group)
    patient(group, LATE_S)
    tensor = ones()
    listener = dist.irecv(tensor, 1, group, tag=99) if me.rank == 0 else None
    for i in range(4):
        time.sleep(LATE_S / 2)
        me.caught(f"all_reduce/{i}", dist.all_reduce, ones(), group=group)
    if me.rank == 1:
        me.caught("send", dist.send, 7 * ones(), 0, group, tag=99)
    if listener is not None:
        me.caught("wait", listener.wait)
        me.notes["received"] = tensor.tolist()
    me.meet("done")
    works(group)


@case
def late_messages(me: Rank) -> None:
    """Receives that nobody sends for, a send that nobody receives, and the late rank's answers to them."""
    me.init()
    directed, undirected = dist.new_group(), dist.new_group()
    for group in (directed, undirected):
        works(group)
        patient(group, LATE_S)
    me.meet("ready")
    if me.rank == 0:
        me.caught("recv", dist.recv, ones(), 2, group=directed)
        me.caught("recv_any", dist.recv, ones(), group=undirected)
    if me.rank == 1:
        me.caught("send", dist.send, ones(), 2, group=directed)
    me.meet("others gave up")
    if me.rank == 2:
        me.caught("recv_late", dist.recv, ones(), 1, group=directed)
    me.meet("done")
    works()


@case
def two_are_late(me: Rank) -> None:
    """Both are named."""
    me.init()
    patient(None, LATE_S)
    works()
    me.meet("ready")
    if me.rank == 0:
        me.caught("barrier", dist.barrier)
    me.meet("done")


@case
def wait_with_a_timeout(me: Rank) -> None:
    """A wait that runs out harms nothing: the collective is done when the peers come."""
    me.init()
    works()
    if me.rank == 0:
        tensor = ones()
        work = dist.all_reduce(tensor, async_op=True)
        me.caught("short", lambda: work.wait(datetime.timedelta(seconds=1)))
        me.store.set("waited", "yes")
        me.caught("long", work.wait)
        me.notes["sum"] = tensor.tolist()
    else:
        me.store.wait(["waited"], datetime.timedelta(seconds=LONG_S))
        dist.all_reduce(ones())
    works()

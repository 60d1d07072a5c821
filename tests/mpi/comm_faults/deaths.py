"""Cases of failure: a rank that dies."""

import contextlib
import os
import signal
import threading
import time

import torch

from comm_faults.case import LARGE, Rank, case, dist, ones, patient, works


def die() -> None:
    """End as kill -9 ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


@case
def killed_while_others_wait(me: Rank) -> None:
    """Rank 2 is killed while rank 0 waits in all_reduce, rank 1 in recv, and both have more in flight."""
    me.init()
    groups = {name: dist.new_group() for name in ("main", "future", "receive", "recv", "untouched")}
    pair = dist.new_group([0, 1])
    for group in groups.values():
        works(group)
    me.meet("ready")
    if me.rank == 2:
        time.sleep(1)
        me.write({"died": time.time()})
        die()
    future = dist.all_reduce(ones(LARGE), group=groups["future"], async_op=True).get_future()
    receiving = dist.irecv(ones(), 2, group=groups["receive"])
    if me.rank == 0:
        me.caught("main", dist.all_reduce, ones(), group=groups["main"])
    else:
        me.caught("main", dist.recv, ones(), 2, group=groups["recv"])
    me.notes["noticed"] = time.time()
    me.caught("future", future.wait)
    me.caught("receive", receiving.wait)
    me.caught("afterwards", dist.barrier, groups["untouched"])
    me.notes["all noticed"] = time.time()
    works(pair)


@case
def killed_in_a_collective(me: Rank) -> None:
    """Rank 1 is killed in the midst of large collectives."""
    me.init()
    works()
    me.meet("ready")
    if me.rank == 1:
        threading.Timer(0.5, die).start()
        me.write({})
    tensor = torch.zeros(8 * LARGE)
    begin = time.monotonic()

    def reduce_on() -> None:
        while time.monotonic() - begin < 30:
            dist.all_reduce(tensor)

    me.caught("loop", reduce_on)
    me.notes["after"] = time.monotonic() - begin
    me.caught("next", dist.all_reduce, ones())


@case
def killed_in_a_posix_collective(me: Rank) -> None:
    """The same over memory with a name in /dev/shm."""
    os.environ["PNEUMO_COMM_SHM"] = "posix"
    killed_in_a_collective(me)


@case
def killed_while_starting(me: Rank) -> None:
    """Rank 1 is killed after some milliseconds of its start; the others get an error within their timeout."""
    victim = me.rank == 1
    for attempt in range(8):
        me.meet(f"attempt {attempt}")
        pid = os.fork()
        if pid == 0:
            if victim:
                threading.Timer(0.004 * attempt, die).start()
            with contextlib.suppress(Exception):
                me.starts = attempt
                me.init(timeout_s=3)
                dist.barrier()
            os._exit(0)
        begin = time.monotonic()
        _, status = os.waitpid(pid, 0)
        me.notes[f"attempt {attempt}"] = {"status": status, "seconds": time.monotonic() - begin}
        me.notes.setdefault("pids", []).append(pid)


@case
def leaves_with_an_exception(me: Rank) -> None:
    """Rank 1 ends by an exception; the others are told who has gone."""
    me.init()
    works()
    me.meet("ready")
    if me.rank == 1:
        me.write({})
        raise ValueError("the reason")
    me.caught("all_reduce", dist.all_reduce, ones())


@case
def leaves_in_peace(me: Rank) -> None:
    """Rank 1 ends without destroying its group, with a collective in flight; the others come when it is gone."""
    me.init()
    works()
    me.meet("ready")
    if me.rank == 1:
        dist.all_reduce(ones(LARGE), async_op=True)
        me.notes["leaves"] = time.time()
        return
    time.sleep(2)
    me.caught("all_reduce", dist.all_reduce, ones(LARGE))


@case
def leaves_with_a_blocked_thread(me: Rank) -> None:
    """Rank 1 ends while one of its threads waits for a message that never comes."""
    me.init()
    works()
    patient(None, 30)
    if me.rank == 1:
        thread = threading.Thread(target=lambda: dist.recv(ones(), 0), daemon=True)
        thread.start()
        time.sleep(1)
        me.meet("blocked")
        me.notes["leaves"] = time.time()
        return
    me.meet("blocked")
    me.caught("all_reduce", dist.all_reduce, ones())

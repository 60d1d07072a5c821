"""Cases of failure: abort and destroy."""

import contextlib
import functools
import threading
import time
from typing import Any

from torch.distributed.distributed_c10d import _abort_process_group

import pneumo.comm
from comm_faults.case import CASES, LARGE, LONG_S, Rank, backend, case, dist, ones, patient, works


def in_flight(me: Rank) -> list[Any]:
    """Operations that cannot end: rank 2 takes part in none of them."""
    if me.rank == 2:
        return []
    return [
        dist.all_reduce(ones(), async_op=True),
        dist.all_reduce(ones(LARGE), async_op=True),
        dist.irecv(ones(), 2),
        dist.isend(ones(), 2),
    ]


def give_up(me: Rank, name: str, works_: list[Any]) -> None:
    for i, work in enumerate(works_):
        me.caught(f"{name}/{i}", work.wait)


def destroyed_with_work(me: Rank, name: str) -> None:
    """All destroy, and then wait for what was in flight."""
    flying = in_flight(me)
    dist.destroy_process_group()
    give_up(me, name, flying)


def destroyed_with_open_messages(me: Rank, name: str) -> None:
    """All destroy with messages that nobody answers; they end within a second or so, not after the timeout."""
    patient(None, LONG_S)
    if me.rank < 2:
        other = 1 - me.rank
        flying = [dist.irecv(ones(), other, tag=1), dist.isend(ones(), other, tag=2), dist.irecv(ones(), tag=3)]
    else:
        flying = []
    me.caught(f"{name}/destroy", dist.destroy_process_group)
    give_up(me, name, flying)


def destroyed_and_forgotten(me: Rank, name: str) -> None:
    """All destroy, and nobody asks for what was in flight, a Future with a callback among it."""
    for work in in_flight(me):
        work.get_future().then(lambda future: None)
    dist.destroy_process_group()


def aborted_by_one(me: Rank, name: str) -> None:
    flying = in_flight(me)
    me.meet(f"{name} flying")
    if me.rank == 2:
        backend().abort()
    give_up(me, name, flying)
    me.caught(f"{name}/next", dist.barrier)
    dist.destroy_process_group()


def aborted_by_one_that_takes_part(me: Rank, name: str) -> None:
    flying = in_flight(me)
    me.meet(f"{name} flying")
    if me.rank == 1:
        backend().abort()
    give_up(me, name, flying)
    me.meet(f"{name} given up")  # rank 2 does not leave before
    dist.destroy_process_group()


def aborted_by_all_and_destroyed(me: Rank, name: str) -> None:
    flying = in_flight(me)
    _abort_process_group()
    give_up(me, name, flying)


def aborted_twice(me: Rank, name: str) -> None:
    flying = in_flight(me)
    kept = backend()
    kept.abort()
    kept.abort()
    give_up(me, name, flying)
    dist.destroy_process_group()
    kept.abort()
    kept.shutdown()


def aborted_after_destroy(me: Rank, name: str) -> None:
    flying = in_flight(me)
    kept = backend()
    dist.destroy_process_group()
    kept.abort()
    give_up(me, name, flying)


def destroyed_by_one(me: Rank, name: str) -> None:
    flying = in_flight(me)
    me.meet(f"{name} flying")
    if me.rank == 2:
        dist.destroy_process_group()
    give_up(me, name, flying)
    if me.rank != 2:
        me.caught(f"{name}/next", dist.barrier)
        dist.destroy_process_group()


def subgroups_first(me: Rank, name: str) -> None:
    groups = [dist.new_group(), dist.new_group()]
    flying = [dist.all_reduce(ones(), group=group, async_op=True) for group in groups if me.rank != 2]
    for group in groups if me.rank != 1 else groups[::-1]:
        dist.destroy_process_group(group)
    give_up(me, name, flying)
    works()
    dist.destroy_process_group()


def world_first(me: Rank, name: str) -> None:
    """The world goes, and takes the subgroup with it, of which somebody still has a reference."""
    group = dist.new_group()
    works(group)
    kept = backend(group)
    dist.destroy_process_group()
    work = None
    with contextlib.suppress(Exception):
        work = kept.allreduce([ones()])
    me.notes[f"{name}/refused"] = work is None


def aborted_by_a_thread(me: Rank, name: str) -> None:
    """The main thread is blocked meanwhile."""
    me.meet(f"{name} begins")
    kept = backend()
    timer = threading.Timer(0.5, kept.abort)
    timer.start()
    if me.rank != 2:
        me.caught(f"{name}/0", dist.barrier)
    timer.join()
    dist.destroy_process_group()


def destroyed_under_a_thread(me: Rank, name: str) -> None:
    """Destroyed by the main thread while another one is blocked in a collective."""
    thread = threading.Thread(target=lambda: me.caught(f"{name}/0", dist.barrier))
    if me.rank != 2:
        thread.start()
        time.sleep(0.5)
    me.meet(f"{name} blocked")
    dist.destroy_process_group()
    if me.rank != 2:
        thread.join()


@case
def destroyed_with_work_that_ends(me: Rank) -> None:
    """Who destroys a group waits for what it has begun there, as with Gloo: the last rank is a second late."""
    me.init()
    works()
    if me.rank == 2:
        time.sleep(1)
    tensors = [ones(count) for count in (4, LARGE, 100)]
    flying = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    if me.rank == 0:
        flying.append(dist.isend(ones() * 5, 2))
    received = ones()
    if me.rank == 2:
        flying.append(dist.irecv(received, 0))
    dist.destroy_process_group()
    for work in flying:
        work.wait()
    me.notes["sums"] = [[tensor.min().item(), tensor.max().item()] for tensor in tensors]
    me.notes["received"] = received.tolist()


@case
def callback_at_the_end(me: Rank) -> None:
    """A callback that uses the group while the process ends is refused, and holds nothing up."""
    me.init()
    works()
    begun = threading.Event()
    work = dist.irecv(ones(), (me.rank - 1) % me.size)

    def use(_: Any) -> None:
        begun.set()
        time.sleep(0.5)
        me.caught("callback", dist.all_reduce, ones())
        me.write({})

    work.get_future().add_done_callback(use)
    me.meet("all listen")  # else the callback might be called where it is added
    dist.send(ones(), (me.rank + 1) % me.size)
    begun.wait(30)
    pneumo.comm.native().shutdown()


TEARDOWNS = {
    function.__name__: function
    for function in (
        destroyed_with_work,
        destroyed_with_open_messages,
        destroyed_and_forgotten,
        aborted_by_one,
        aborted_by_one_that_takes_part,
        aborted_by_all_and_destroyed,
        aborted_twice,
        aborted_after_destroy,
        destroyed_by_one,
        subgroups_first,
        world_first,
        aborted_by_a_thread,
        destroyed_under_a_thread,
    )
}


def teardown(me: Rank, name: str) -> None:
    """Tear a world down in one way with work in flight; the next world, in the same processes, works."""
    begin = time.monotonic()
    for step in (TEARDOWNS[name], lambda me, name: dist.destroy_process_group()):
        me.init()
        works()
        patient(None, 5)
        step(me, name)
        me.notes[f"{name}/initialized"] = dist.is_initialized()
    me.notes[f"{name}/seconds"] = time.monotonic() - begin


CASES.update({name: functools.partial(teardown, name=name) for name in TEARDOWNS})

"""Under mpirun: cases of failure of the backend `pneumo`, each of them in a process of its own on every rank.

Arguments: a folder for the results, and the names of cases. The rank that mpirun started imports torch once and forks a
process for each case: that one may hang, die or be killed, which mpirun would otherwise answer by ending the whole job.
Written for each case and rank, as CASE.RANK.json: what the case noted, how its process ended and after how long.
"""

import contextlib
import datetime
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import _abort_process_group, _set_pg_timeout

import pneumo.comm

dist: Any = distributed  # whose annotations leave out half of what it exports
LIMIT_S = 90  # of a case, after which its process counts as hanging and is killed
LONG_S = 60  # a timeout that no case reaches
LARGE = 1 << 20  # elements: several chunks
CASES: dict[str, Callable[["Rank"], None]] = {}


def case(function: Callable[["Rank"], None]) -> Callable[["Rank"], None]:
    """Make a function known as a case under its name."""
    CASES[function.__name__] = function
    return function


class Rank:
    """One rank in one case: the store by which it meets the others, and what it notes for the test."""

    def __init__(self, folder: Path, name: str, rank: int, size: int) -> None:
        self.folder, self.name, self.rank, self.size = folder, name, rank, size
        self.notes: dict[str, Any] = {}
        self.starts = 0
        self.store = dist.FileStore(str(folder / f"{name}.meet"), size)

    def meet(self, where: str, ranks: Sequence[int] | None = None) -> None:
        """Wait, by way of the store, until all these ranks (all) are here."""
        self.store.set(f"{where}/{self.rank}", "here")
        keys = [f"{where}/{rank}" for rank in ranks or range(self.size)]
        self.store.wait(keys, datetime.timedelta(seconds=LONG_S))

    def init(self, timeout_s: float = LONG_S) -> None:
        """Make the default process group, as a new one at every call."""
        self.starts += 1
        store = dist.FileStore(str(self.folder / f"{self.name}.store{self.starts}"), self.size)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("pneumo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def caught(self, what: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Note how a call ended ("done", or the class and the text of what it raised), and the seconds it took."""
        begin = time.monotonic()
        try:
            function(*args, **options)
            ended, text = "done", ""
        except (Exception, KeyboardInterrupt) as error:
            ended, text = type(error).__name__, str(error)
        self.notes[what] = {"ended": ended, "text": text, "seconds": time.monotonic() - begin}

    def write(self, extra: dict[str, Any]) -> None:
        """Write what is known so far; the process may be killed at any time afterwards."""
        path = self.folder / f"{self.name}.{self.rank}.json"
        path.with_suffix(".new").write_text(json.dumps({"notes": self.notes, "pid": os.getpid(), **extra}))
        path.with_suffix(".new").rename(path)


def ones(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of ones."""
    return torch.ones(count, dtype=dtype)


def works(group: Any = None) -> None:
    """A group does collectives, small and large, and does them right."""
    for count in (4, LARGE):
        tensor = ones(count)
        dist.all_reduce(tensor, group=group)
        size = dist.get_world_size(group)
        if not bool((tensor == size).all()):
            raise AssertionError(f"all_reduce of {count} ones over {size} ranks gave {tensor.tolist()[:4]}")


def begin(me: Rank) -> None:
    """Make the default process group, and use it."""
    me.init()
    works()


def patient(group: Any, timeout_s: float) -> None:
    """Give a group another timeout, now that it stands: none should run out while it is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def future_of(work: Any) -> Callable[[], Any]:
    """What waits for a Work by way of its Future."""
    future = work.get_future()
    return lambda: future.wait()


# ---- ranks that call different things


def gather_to(root: int, group: Any, count: int = 4) -> None:
    me = dist.get_rank(group)
    outputs = [ones(count) for _ in range(dist.get_world_size(group))] if me == root else None
    dist.gather(ones(count), outputs, dst=root, group=group)


def scatter_from(root: int, group: Any) -> None:
    me = dist.get_rank(group)
    inputs = [ones() for _ in range(dist.get_world_size(group))] if me == root else None
    dist.scatter(ones(), inputs, src=root, group=group)


def unequal_splits(rank: int, group: Any) -> None:
    """Rank 0 sends 3 elements to rank 1, which expects 2."""
    sends = [[1, 3, 1], [1, 1, 1], [1, 1, 1]][rank]
    takes = [[1, 1, 1], [2, 1, 1], [1, 1, 1]][rank]
    dist.all_to_all_single(ones(sum(takes)), ones(sum(sends)), takes, sends, group=group)


def expected_nothing(rank: int, group: Any) -> None:
    """Nobody sends anything, but rank 1 expects 2 elements of rank 0, which is the last to come."""
    time.sleep(rank == 0)
    takes = [2, 0, 0] if rank == 1 else [0, 0, 0]
    dist.all_to_all_single(ones(sum(takes)), ones(0), takes, [0, 0, 0], group=group)


def many_at_once(rank: int, group: Any) -> None:
    """A coalesced all_reduce of which one rank has a tensor less."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.all_reduce_coalesced([ones(), ones()][: 1 + (rank != 1)], group=group)


# For each: what the ranks of a group of three call, given the group's rank and the group.
DISAGREEMENTS: dict[str, Callable[[int, Any], Any]] = {
    "operations": lambda r, g: [
        lambda: dist.all_reduce(ones(), group=g),
        lambda: dist.broadcast(ones(), 0, group=g),
        lambda: dist.barrier(g),
    ][r](),
    "dtypes": lambda r, g: dist.all_reduce(ones(4, torch.float64 if r == 2 else torch.float32), group=g),
    "dtypes_of_one_size": lambda r, g: dist.all_reduce(ones(4, torch.bfloat16 if r == 0 else torch.float16), group=g),
    "counts": lambda r, g: dist.all_reduce(ones(4 + r), group=g),
    "small_and_large": lambda r, g: dist.all_reduce(ones(LARGE if r == 1 else 4), group=g),
    "large": lambda r, g: dist.all_reduce(ones(LARGE + (r == 1)), group=g),
    "large_operations": lambda r, g: (
        dist.broadcast(ones(LARGE), 2, group=g) if r == 2 else dist.all_reduce(ones(LARGE), group=g)
    ),
    "roots_of_broadcast": lambda r, g: dist.broadcast(ones(), min(r, 1), group=g),
    "roots_of_a_large_broadcast": lambda r, g: dist.broadcast(ones(LARGE), min(r, 1), group=g),
    "roots_of_reduce": lambda r, g: dist.reduce(ones(), min(r, 1), group=g),
    "roots_of_gather": lambda r, g: gather_to(min(r, 1), g),
    "roots_of_scatter": lambda r, g: scatter_from(min(r, 1), g),
    "reduce_ops": lambda r, g: dist.all_reduce(ones(), dist.ReduceOp.MAX if r == 1 else dist.ReduceOp.SUM, group=g),
    "sum_and_average": lambda r, g: dist.all_reduce(ones(), dist.ReduceOp.AVG if r else dist.ReduceOp.SUM, group=g),
    "all_gather_counts": lambda r, g: dist.all_gather_into_tensor(ones(3 * (4 + r)), ones(4 + r), group=g),
    "reduce_scatter_counts": lambda r, g: dist.reduce_scatter_tensor(ones(4 + r), ones(3 * (4 + r)), group=g),
    "gather_counts": lambda r, g: gather_to(0, g, 4 + r),
    "coalesced": many_at_once,
    "monitored_barrier": lambda r, g: (
        dist.monitored_barrier(g, datetime.timedelta(seconds=LONG_S)) if r else dist.all_reduce(ones(), group=g)
    ),
    "asynchronous": lambda r, g: dist.all_reduce(ones(4 + r), group=g, async_op=True).wait(),
    "futures": lambda r, g: future_of(dist.all_reduce(ones(4 + r), group=g, async_op=True))(),
    "splits": unequal_splits,
    "splits_of_nothing": expected_nothing,
}


@case
def disagree(me: Rank) -> None:
    """Every disagreement in a group of its own; afterwards that group is broken for good, and no other is."""
    me.init()
    for name, call in DISAGREEMENTS.items():
        group = dist.new_group()
        works(group)
        me.caught(name, call, me.rank, group)
        me.caught(f"{name}/next", dist.all_reduce, ones(), group=group)
    works()


@case
def disagree_in_a_subgroup(me: Rank) -> None:
    """The group's ranks 0 and 1 are the world's 2 and 1: the error has the names by which users know them."""
    me.init()
    group = dist.new_group([1, 2], timeout=datetime.timedelta(seconds=LONG_S))
    if me.rank:
        me.caught("counts", dist.all_reduce, ones(4 + me.rank), group=group)
    works()


@case
def message_sizes(me: Rank) -> None:
    """A message of another size than the receive's; the next message passes."""
    me.init()
    if me.rank == 0:
        me.caught("size", dist.send, ones(4), 1)
        me.caught("next", dist.send, ones(3), 1)
    if me.rank == 1:
        me.caught("size", dist.recv, ones(8), 0)
        me.caught("next", dist.recv, ones(3), 0)
    works()


# ---- a rank that comes too late


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


# ---- a rank that dies


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


# ---- signals


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


# ---- abort and destroy


def backend(group: Any = None) -> Any:
    """The backend behind a process group."""
    group = group or dist.group.WORLD
    return group._get_backend(torch.device("cpu"))


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


TEARDOWNS = {
    function.__name__: function
    for function in (
        destroyed_with_work,
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


# ---- again and again


def held() -> dict[str, int]:
    """What a process holds: threads, file descriptors, mappings and, of those, the memory of groups."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(maps),
        "shared": sum("pneumo" in line for line in maps),
    }


def rounds(me: Rank, count: int, kind: str) -> None:
    os.environ["PNEUMO_COMM_SHM"] = kind
    me.notes["held"] = []
    me.notes["names"] = []
    for _ in range(count):
        me.init()
        groups = [dist.new_group(), dist.new_group([0, 2])]
        works()
        works(groups[0])
        peer = (me.rank + 1) % me.size
        work = dist.isend(ones(LARGE), peer)
        dist.recv(ones(LARGE), (me.rank - 1) % me.size)
        work.wait()
        dist.all_reduce(ones(LARGE), async_op=True).get_future().then(lambda future: future.value()).wait()
        dist.barrier()
        mine = Path("/dev/shm").glob(f"pneumo-{os.getpid()}-*")
        me.notes["names"].append([{"name": path.name, "bytes": path.stat().st_size} for path in mine])
        dist.destroy_process_group()
        del groups, work
        me.notes["held"].append(held())


@case
def again_and_again(me: Rank) -> None:
    """Init and destroy: what the process holds afterwards does not grow."""
    rounds(me, 8, "memfd")


@case
def again_and_again_posix(me: Rank) -> None:
    """The same over memory with a name in /dev/shm."""
    rounds(me, 4, "posix")


@case
def again_after_failures(me: Rank) -> None:
    """A world that is broken and torn down leaves no more behind than one that went well."""
    me.notes["held"] = []
    for _ in range(6):
        me.init()
        groups = [dist.new_group()]
        works(groups[0])
        me.caught("broken", dist.all_reduce, ones(4 + me.rank), group=groups[0])
        flying = in_flight(me)
        backend().abort()
        give_up(me, "flying", flying)
        dist.destroy_process_group()
        del groups, flying
        me.notes["held"].append(held())


# ---- settings, and a start that fails


BAD = {
    "PNEUMO_COMM_SHM": ["sysv", "MEMFD"],
    "PNEUMO_COMM_BYTES": ["lots", "-1", "nan", "64MB", "12X", "100"],
    "PNEUMO_COMM_CHUNK": ["big", "1KM", "100"],
    "PNEUMO_COMM_ONE_SHOT": ["-5", "8"],
    "PNEUMO_COMM_SPIN_US": ["soon", "5 ms", "-1"],
}


@case
def bad_settings(me: Rank) -> None:
    """Each is refused on every rank by its name and value; afterwards the same processes start well."""
    for name, values in BAD.items():
        for value in values:
            os.environ[name] = value
            me.caught(f"{name}={value}", me.init, timeout_s=20)
            if dist.is_initialized():
                dist.destroy_process_group()
            del os.environ[name]
    me.init()
    works()


@case
def good_settings(me: Rank) -> None:
    """Every setting is taken, with and without a unit."""
    for name, value in (("BYTES", "1M"), ("BYTES", "400000"), ("CHUNK", "64K"), ("ONE_SHOT", "1K"), ("SPIN_US", "0")):
        os.environ[f"PNEUMO_COMM_{name}"] = value
        me.caught(f"{name}={value}", begin, me)
        if dist.is_initialized():
            dist.destroy_process_group()
        del os.environ[f"PNEUMO_COMM_{name}"]


@case
def a_bad_setting_on_one_rank(me: Rank) -> None:
    """The others are told whom they wait for."""
    if me.rank == 1:
        os.environ["PNEUMO_COMM_SHM"] = "sysv"
    me.caught("init", me.init, timeout_s=3)


@case
def one_does_not_come(me: Rank) -> None:
    """A rank that is not there when the world is made is named; with it, the next attempt works."""
    if me.rank != 1:
        me.caught("init", me.init, timeout_s=3)
    else:  # fails as well, elsewhere: torch counts the groups, and names them by their number
        alone = dist.FileStore(str(me.folder / "alone"), me.size)
        timeout = datetime.timedelta(milliseconds=100)
        me.starts += 1
        with contextlib.suppress(dist.DistBackendError):
            dist.init_process_group("pneumo", store=alone, rank=1, world_size=me.size, timeout=timeout)
    me.meet("given up")
    me.init()
    works()
    if me.rank == 1:
        timeout = datetime.timedelta(seconds=3)
        me.caught("new_group", dist.new_group, [1, 2], timeout=timeout)
    works()


@case
def little_shared_memory(me: Rank) -> None:
    """In a small /dev/shm: too small for the default with posix, enough for what is asked for, and memfd needs none."""
    me.notes["free"] = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    os.environ["PNEUMO_COMM_SHM"] = "posix"
    me.caught("too small", me.init, timeout_s=20)
    me.notes["names after"] = os.listdir("/dev/shm")
    os.environ["PNEUMO_COMM_BYTES"] = "600K"
    me.caught("enough", begin, me)
    if dist.is_initialized():
        dist.destroy_process_group()


@case
def memfd_beside_little_shared_memory(me: Rank) -> None:
    """memfd needs no /dev/shm."""
    me.init()
    works()
    dist.destroy_process_group()
    me.notes["names after"] = os.listdir("/dev/shm")


# ---- forks


class Squares(torch.utils.data.Dataset[torch.Tensor]):
    """Numbers and their squares, with what a collective does in the worker that makes them."""

    def __getitem__(self, index: int) -> Any:
        try:
            dist.all_reduce(ones())
            said = "done"
        except Exception as error:
            said = str(error)
        return index * index, said

    def __len__(self) -> int:
        return 8


def in_fork(function: Callable[[], Any], limit_s: int = 6) -> dict[str, Any]:
    """What a function raises in a forked child; the child is ended by an alarm where it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit_s)
        said = "done"
        try:
            function()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        return {"status": status, "said": pipe.read()}


@case
def forked_worker(me: Rank) -> None:
    """A data loader forks workers while a group is alive; they work, and collectives in them raise."""
    me.init()
    works()
    flying = dist.all_reduce(ones(LARGE), async_op=True) if me.rank else None
    loader = torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        batches = list(loader)
        me.notes["squares"] = sorted(int(x) for values, _ in batches for x in values)
        me.notes["said"] = sorted({text for _, texts in batches for text in texts})
    if flying is None:
        dist.all_reduce(ones(LARGE))
    else:
        flying.wait()
    works()


@case
def forked_children(me: Rank) -> None:
    """What a forked child does to its parent's group: every call raises, and leaving or destroying harms nobody."""
    me.init()
    group = dist.new_group()
    works(group)
    pending = dist.irecv(ones(), (me.rank + 1) % me.size)
    future = pending.get_future()
    kept = backend()
    time.sleep(0.5)
    attempts: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(ones()),
        "async": lambda: dist.all_reduce(ones(), async_op=True),
        "send": lambda: dist.send(ones(), (me.rank + 1) % me.size),
        "wait": lambda: pending.wait(),
        "new_group": lambda: dist.new_group([me.rank], use_local_synchronization=True),
        "destroy": lambda: dist.destroy_process_group(),
        "abort": lambda: kept.abort(),
        "shutdown": lambda: kept.shutdown(),
        "future": lambda: future.done(),
        "leave": lambda: importlib.import_module("pneumo.comm._native").shutdown(),
    }
    for name, attempt in attempts.items():
        me.notes[name] = in_fork(attempt)
    me.meet("forked")
    dist.send(ones(), (me.rank - 1) % me.size)
    pending.wait()
    works(group)
    works()


# ---- the processes of the cases


def run_case(folder: Path, name: str, rank: int, size: int) -> None:
    """In the forked process: run a case, and write what it noted and how it ended."""
    me = Rank(folder, name, rank, size)
    with (folder / f"{name}.{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(LIMIT_S - 5, file=stack)
        failure = None
        try:
            CASES[name](me)
        except Exception:
            failure = traceback.format_exc()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            me.write({"failure": failure})


def ended(pid: int, limit_s: float) -> int | None:
    """The wait status of a process that ends within the limit, else None: it is killed."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def cases(folder: Path, names: Sequence[str], rank: int, size: int) -> Iterator[str]:
    """Fork for each case, and write how its process ended; in a forked process: yield the case, and end."""
    for name in names:
        begin = time.monotonic()
        pid = os.fork()
        if pid == 0:
            yield name
            return
        status = ended(pid, LIMIT_S)
        seconds = time.monotonic() - begin
        code = None if status is None else os.waitstatus_to_exitcode(status)
        (folder / f"{name}.{rank}.end").write_text(
            json.dumps({"code": code, "seconds": seconds, "pid": pid, "at": time.time()})
        )


def main() -> None:
    """Run all cases one after the other."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    torch.set_num_threads(1)
    pneumo.comm.register()
    gc.freeze()  # else every process ends by looking through all of torch
    for name in cases(folder, names, rank, size):
        run_case(folder, name, rank, size)


if __name__ == "__main__":
    main()

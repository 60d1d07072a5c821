"""Cases of failure: again and again."""

import gc
import os
from pathlib import Path

from comm_faults.case import LARGE, Rank, backend, case, dist, ones, works
from comm_faults.teardown import give_up, in_flight


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

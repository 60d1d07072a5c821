"""Under mpirun with 3 ranks on what looks like two nodes: mistakes and absence between nodes, and who is told what.

Rank 0 is alone on its node. Argument: a folder, into which each rank writes RANK.json, what it was told by case. With a
second argument `long` also a message that is longer than MPI's counts, by hand: it takes 5 GiB and half a minute.
"""

import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from mpi4py import MPI

import pneumo.comm
from pneumo.comm.rendezvous import make_store

assert pneumo.comm.missing() is None
torch.set_num_threads(1)
comm = MPI.COMM_WORLD
store = make_store(comm, "127.0.0.1")
dist.init_process_group("pneumo", store=store, rank=comm.rank, world_size=comm.size)
rank = comm.rank
Group = Any


def other_length(group: Group, length: int, *, posted: bool) -> None:
    """Rank 0 sends `length` elements to rank 1, which expects 5, and has said so before or says it afterwards."""
    if rank == 0:
        time.sleep(0.5 if posted else 0)
        dist.send(torch.ones(length), 1, group)
    elif rank == 1:
        time.sleep(0 if posted else 0.5)
        dist.irecv(torch.zeros(5), 0, group).wait()


def uneven_splits(group: Group) -> None:
    """Rank 1 expects three elements of rank 0, which sends it two."""
    gives, takes = [2, 2, 2], [3, 2, 2] if rank == 1 else [2, 2, 2]
    dist.all_to_all_single(torch.zeros(sum(takes)), torch.zeros(sum(gives)), takes, gives, group)


def late(group: Group) -> None:
    """Rank 2, on the second node, does not come in time."""
    if rank == 2:
        time.sleep(5)
    dist.all_reduce(torch.ones(4), group=group)


def disagree(group: Group) -> None:
    """Rank 0 calls something else than the other node."""
    if rank == 0:
        dist.broadcast(torch.ones(4), 0, group)
    else:
        dist.all_reduce(torch.ones(4), group=group)


def largest_tag(group: Group) -> None:
    """The largest tag that a refusal names can be used; MPI has fewer than c10d."""

    def pass_one(tag: int) -> None:
        if rank == 0:
            dist.send(torch.ones(1), 1, group, tag=tag)
        else:
            dist.recv(torch.zeros(1), 0, group, tag=tag)

    if rank == 2:
        return
    try:
        pass_one(2**31 - 1)
    except RuntimeError as error:
        largest = int(str(error).split("needs a tag of at most ")[1].split()[0])
    else:
        raise AssertionError("MPI leaves two tags at least to us")
    pass_one(largest)


def large_gather(group: Group) -> None:
    """What a collective needs for large parts is given back at its end."""
    part, whole = torch.ones(4 << 20), torch.empty(3, 4 << 20)
    whole.fill_(0)
    before = psutil.Process().memory_info().rss
    dist.all_gather_single(whole, part, group)
    assert bool((whole == 1).all())
    kept = psutil.Process().memory_info().rss - before
    assert kept < 40 << 20, f"{kept >> 20} MiB"


def long_message(group: Group) -> None:
    """Longer than MPI's counts are: more than 2 GiB."""
    count = (1 << 31) + (1 << 20) + 5
    if rank == 0:
        tensor = torch.zeros(count, dtype=torch.uint8)
        tensor[0], tensor[1 << 31], tensor[-1] = 1, 2, 3
        dist.send(tensor, 1, group)
    elif rank == 1:
        tensor = torch.zeros(count, dtype=torch.uint8)
        dist.recv(tensor, 0, group)
        found = tensor[0].item(), tensor[1 << 31].item(), tensor[-1].item(), tensor.sum().item()
        assert found == (1, 2, 3, 6), found


CASES: dict[str, Callable[[Group], None]] = {
    "shorter, posted": lambda group: other_length(group, 3, posted=True),
    "shorter, come": lambda group: other_length(group, 3, posted=False),
    "much longer, posted": lambda group: other_length(group, 500_000, posted=True),
    "much longer, come": lambda group: other_length(group, 500_000, posted=False),
    "uneven splits": uneven_splits,
    "late": late,
    "disagree": disagree,
    "largest tag": largest_tag,
    "large gather": large_gather,
    "long message": long_message,
}

if sys.argv[2:] != ["long"]:
    del CASES["long message"]
notes: dict[str, dict[str, Any]] = {}
for name, run in CASES.items():
    group = dist.new_group(timeout=datetime.timedelta(seconds=30 if name == "long message" else 2))
    begin, told = time.monotonic(), ""
    try:
        run(group)
    except dist.DistBackendError as error:
        told = str(error)
    notes[name] = {"told": told, "seconds": time.monotonic() - begin}
    store.set(f"{name}/{rank}", "done")
    store.wait([f"{name}/{other}" for other in range(comm.size)], datetime.timedelta(seconds=60))
    total = torch.ones(3)
    dist.all_reduce(total)  # the world goes on
    assert total.tolist() == [comm.size] * 3
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(notes))
dist.destroy_process_group()

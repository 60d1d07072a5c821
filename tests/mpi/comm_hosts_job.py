"""Ranks on several hosts: every collective over `pneumo` against its closed form, and failures between hosts."""

import datetime
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

import pneumo.comm
from pneumo.comm.rendezvous import make_store

assert pneumo.comm.missing() is None
torch.set_num_threads(1)
comm = MPI.COMM_WORLD
dist.init_process_group("pneumo", store=make_store(comm, sys.argv[1]), rank=comm.rank, world_size=comm.size)
rank, size = dist.get_rank(), dist.get_world_size()
hosts = [None] * size
dist.all_gather_object(hosts, socket.gethostname())
total = size * (size + 1) / 2

for count in (0, 1, 1000, 20_000, 300_001):
    index = torch.arange(count, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        x = (index % 16 * (rank + 1)).to(dtype)
        dist.all_reduce(x)
        assert torch.equal(x, (index % 16 * total).to(dtype)), (count, dtype)
        everywhere = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(everywhere, x)
        assert all(torch.equal(other, x) for other in everywhere)
    x = torch.full((count,), rank + 1.0)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert (x == total / size).all()
    x = torch.full((count,), rank + 1.0)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    assert (x == size).all()
    share = torch.full((count,), float(rank))
    whole = torch.empty(count * size)
    dist.all_gather_single(whole, share)
    assert torch.equal(whole, torch.arange(float(size)).repeat_interleave(count))
    dist.reduce_scatter_single(share, torch.arange(count * size, dtype=torch.float32) % 64 * (rank + 1))
    assert torch.equal(
        share, torch.arange(count * size, dtype=torch.float32)[rank * count : (rank + 1) * count] % 64 * total
    )
    for root in range(size):
        x = torch.full((count,), float(rank))
        dist.broadcast(x, root)
        assert (x == root).all()
        x = torch.full((count,), rank + 1.0)
        dist.reduce(x, root)
        assert rank != root or (x == total).all()
        parts = [torch.empty(count) for _ in range(size)] if rank == root else None
        dist.gather(torch.full((count,), float(rank)), parts, dst=root)
        assert parts is None or all((part == k).all() for k, part in enumerate(parts))
        x = torch.empty(count)
        dist.scatter(x, [torch.full((count,), float(k)) for k in range(size)] if rank == root else None, src=root)
        assert (x == rank).all()
    x, y = torch.arange(float(size)).repeat_interleave(count) + 100 * rank, torch.empty(count * size)
    dist.all_to_all_single(y, x)
    assert torch.equal(y, (100 * torch.arange(float(size)) + rank).repeat_interleave(count))

for peer in range(size):  # messages within a host and between hosts, in both directions
    if peer != rank:
        x, y = torch.full((1000,), float(rank)), torch.empty(1000)
        works = [dist.isend(x, peer, tag=7), dist.irecv(y, peer, tag=7)]
        for work in works:
            work.wait()
        assert (y == peer).all()

messages = {0: 10, 3: 70_000}  # elements by tag; who receives from any rank does so from both hosts
works = [dist.isend(torch.full((n,), float(rank)), 0, tag=tag) for tag, n in messages.items()] if rank else []
for tag, n in messages.items():
    sources = []
    for _ in range((size - 1) * (rank == 0)):
        y = torch.empty(n)
        sources.append(dist.recv(y, tag=tag))
        assert (y == sources[-1]).all()
    assert rank or sorted(sources) == list(range(1, size))
for work in works:
    work.wait()

half = dist.new_group([0, size - 1])  # one rank on the first host, one on the last
if rank in (0, size - 1):
    x = torch.full((5000,), rank + 1.0)
    dist.all_reduce(x, group=half)
    assert (x == 1 + size).all()
dist.barrier()
if "mismatch" in sys.argv:
    with pytest.raises(dist.DistBackendError, match=r"3 x float32.*4 x float32"):
        dist.all_reduce(torch.ones(3 if hosts[rank] == hosts[0] else 4))
for how in ("aborts", "does not come"):
    group = dist.new_group(timeout=datetime.timedelta(seconds=60 if how == "aborts" else 2))
    dist.barrier(group)
    begin = time.monotonic()
    if rank == size - 1:
        time.sleep(0.5)
        if how == "aborts":
            group._get_backend(torch.device("cpu")).abort()
        comm.Barrier()
        time.sleep(1)
    else:
        with pytest.raises(dist.DistBackendError, match=r"gave up|timed out"):
            dist.all_reduce(torch.ones(50_000), group=group)
        assert time.monotonic() - begin < 5
        with pytest.raises(dist.DistBackendError):  # also of what comes later
            dist.barrier(group)
        comm.Barrier()
    comm.Barrier()
if rank == 0:
    print("hosts", *sorted(set(hosts)), flush=True)
if "exception" in sys.argv:
    if rank == size - 1:
        raise RuntimeError("one rank fails")
    begin = time.monotonic()
    with pytest.raises(dist.DistBackendError, match=r"gave up|left the group|died"):
        dist.all_reduce(torch.ones(50_000))
    assert time.monotonic() - begin < 10
    if rank == 0:
        print("the others know", flush=True)
dist.destroy_process_group()

"""Tensors that the group allocates in the memory its ranks share: collectives on them, and their life."""

import os
import time
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from comm_checks.reference import DTYPES, OPS, allows, assert_reduced, assert_same, drawn, op_of
from comm_checks.world import Ranks

# Of one round and of several, with parts of unequal length; some ranks' parts are empty.
COUNTS = (1, 17, 4096, 20_000, 300_001)


def allocate(group: Any, values: torch.Tensor, *, shared: bool = True) -> torch.Tensor:
    """The values in the group's memory, or in ordinary memory."""
    if not shared:
        return values.clone()
    backend = group._get_backend(torch.device("cpu"))
    tensor: torch.Tensor = backend.allocate_tensor(values.numel(), dtype=values.dtype, device=torch.device("cpu"))
    return tensor.view(values.shape).copy_(values)


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory that processes share, as the system says."""
    address = tensor.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= address < last:
                return "/memfd:pneumo" in line
    return False


def has_arenas(ranks: Ranks) -> bool:
    """Whether the group offers such memory: it does not where the memory has a name in /dev/shm."""
    backend = ranks.pneumo._get_backend(torch.device("cpu"))
    return bool(backend.supports_tensor_alloc(torch.device("cpu")))


def check_memory_is_the_groups(ranks: Ranks) -> None:
    tensor = allocate(ranks.pneumo, torch.arange(1000.0))
    assert is_shared(tensor) == has_arenas(ranks)
    assert not is_shared(torch.arange(1000.0))
    assert not is_shared(allocate(ranks.pneumo, torch.zeros(64 << 20))), "more than there is"
    assert_same(tensor, torch.arange(1000.0))


def check_memory_of_complex_numbers(ranks: Ranks) -> None:
    """It has as many elements as are asked for, though DDP gets real numbers for its complex buckets."""
    values = torch.complex(torch.arange(1000.0), torch.ones(1000))
    tensor = allocate(ranks.pneumo, values)
    assert is_shared(tensor) == has_arenas(ranks)
    dist.all_reduce(tensor, group=ranks.pneumo)
    assert_same(tensor, values * ranks.size)


def check_reductions_in_place(ranks: Ranks) -> None:
    """Where all, some or none of the ranks' tensors are in shared memory."""
    for count in COUNTS:
        for dtype in DTYPES if count == 20_000 else (torch.float32, torch.bfloat16):
            for op in OPS if count == 20_000 else ("SUM", "AVG"):
                if not allows(op, dtype) or (dtype.is_complex and op == "AVG"):
                    continue
                parts = drawn(ranks, (count,), dtype, "arena", count, op)
                for shared in (True, ranks.rank % 2 == 0):
                    tensor = allocate(ranks.pneumo, parts[ranks.rank], shared=shared)
                    dist.all_reduce(tensor, op_of(op), ranks.pneumo)
                    assert_reduced(tensor, parts, op, (count, dtype, op, shared))


def check_gathers_and_scattered_sums(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for count in COUNTS:
        for dtype in (torch.float32, torch.float64, torch.int16):
            rows = drawn(ranks, (count,), dtype, "rows", count)
            stacks = drawn(ranks, (n, count), dtype, "stacks", count)
            for shared in (True, me % 2 == 0):
                whole = allocate(ranks.pneumo, torch.zeros(n, count, dtype=dtype), shared=shared)
                whole[me] = rows[me]
                dist.all_gather_single(whole, whole[me], ranks.pneumo)  # in place, as FSDP does
                assert_same(whole, torch.stack(rows), (count, dtype, shared))
                given = allocate(ranks.pneumo, stacks[me], shared=shared)
                result = torch.zeros(count, dtype=dtype)
                dist.reduce_scatter_single(result, given, group=ranks.pneumo)
                assert_reduced(result, [stack[me] for stack in stacks], "SUM", (count, dtype, shared))
                assert_same(given, stacks[me])


def check_tensors_may_be_altered_at_once(ranks: Ranks) -> None:
    """Nobody reads a rank's tensor any more once its call has returned, however late the others are."""
    tensor = allocate(ranks.pneumo, torch.zeros(100_000))
    whole = allocate(ranks.pneumo, torch.zeros(ranks.size, 100_000))
    for turn in range(30):
        tensor.fill_(ranks.rank + turn)
        whole[ranks.rank] = ranks.rank + turn
        if turn % ranks.size == ranks.rank:
            time.sleep(0.002)
        dist.all_reduce(tensor, group=ranks.pneumo)
        dist.all_gather_single(whole, whole[ranks.rank], ranks.pneumo)
        expected = sum(rank + turn for rank in ranks.everybody)
        assert bool((tensor == expected).all()), turn
        assert whole.mean(1).tolist() == [rank + turn for rank in ranks.everybody]


def check_bits_do_not_depend_on_where_tensors_lie(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.float16):
        mine = drawn(ranks, (70_001,), dtype, "bits")[ranks.rank]
        found = []
        for shared in (True, False):
            tensor = allocate(ranks.pneumo, mine, shared=shared)
            dist.all_reduce(tensor, group=ranks.pneumo)
            found.append(tensor)
        assert torch.equal(found[0], found[1])


def check_memory_is_given_back(ranks: Ranks) -> None:
    places = set()
    for _ in range(50):
        tensor = allocate(ranks.pneumo, torch.zeros(500_000))
        places.add(tensor.data_ptr() if has_arenas(ranks) else 0)
        del tensor
    assert len(places) == 1


def check_tensors_outlive_their_group(ranks: Ranks) -> None:
    group = ranks.fresh()
    tensor = allocate(group, torch.arange(50_000.0))
    dist.all_reduce(tensor, group=group)
    dist.destroy_process_group(group)
    del group
    assert_same(tensor, torch.arange(50_000.0) * ranks.size)
    dist.all_reduce(tensor, group=ranks.pneumo)  # for which it is an ordinary one
    assert_same(tensor, torch.arange(50_000.0) * ranks.size**2)


def check_buckets_of_ddp_are_shared(ranks: Ranks) -> None:
    """DDP asks the backend for the memory of its buckets; gradients that are views of them lie there too."""
    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(100, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10)),
        process_group=ranks.pneumo,
        gradient_as_bucket_view=True,
    )
    seen = []

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        seen.append(is_shared(bucket.buffer()))
        future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(ranks.pneumo, hook)
    for _ in range(3):
        model.zero_grad()
        model(torch.full((4, 100), float(ranks.rank))).sum().backward()
    assert set(seen) == {has_arenas(ranks)}
    assert all(is_shared(parameter.grad) == has_arenas(ranks) for parameter in model.parameters())


def check_such_a_tensor_can_be_resized(ranks: Ranks) -> None:
    """As any other can: it moves to ordinary memory, with what it holds, and the group has its room back."""
    tensor = allocate(ranks.pneumo, torch.arange(1000.0))
    place = tensor.data_ptr()
    tensor.resize_(100_000)
    assert not is_shared(tensor)
    assert_same(tensor[:1000], torch.arange(1000.0))
    if has_arenas(ranks):
        assert allocate(ranks.pneumo, torch.zeros(1000)).data_ptr() == place
    tensor.fill_(1)
    dist.all_reduce(tensor, group=ranks.pneumo)
    assert_same(tensor, torch.full((100_000,), float(ranks.size)))


def check_a_forked_child_has_its_own_copy(ranks: Ranks) -> None:
    """As of any other tensor: what it writes, its parent does not see."""
    tensor = allocate(ranks.pneumo, torch.arange(50_000.0))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        tensor.neg_()
        os.write(write, torch.tensor([tensor[1], tensor[-1], is_shared(tensor)]).numpy().tobytes())
        os._exit(0)
    os.close(write)
    told = os.read(read, 100)
    os.close(read)
    assert os.waitpid(pid, 0)[1] == 0
    assert np.frombuffer(told, np.float32).tolist() == [-1.0, -49_999.0, 0.0]
    assert is_shared(tensor) == has_arenas(ranks)
    dist.all_reduce(tensor, group=ranks.pneumo)
    assert_same(tensor, ranks.size * torch.arange(50_000.0))


def check_calls_leave_nothing_behind_while_a_receive_is_open(ranks: Ranks) -> None:
    """A receive may stay open as long as the group does, and must not keep what was called after it."""
    if ranks.size == 1:
        return
    mail, following = torch.zeros(1), (ranks.rank + 1) % ranks.size
    listening = dist.irecv(mail, (ranks.rank - 1) % ranks.size, group=ranks.pneumo)
    tensor = torch.ones(1)
    grown = []
    for _ in range(3):
        before = psutil.Process().memory_info().rss
        for _ in range(5000):
            dist.all_reduce(tensor, group=ranks.pneumo, async_op=True).wait()
        grown.append(psutil.Process().memory_info().rss - before)
    dist.send(mail, following, group=ranks.pneumo)
    listening.wait()
    assert min(grown) < 5000 * 100, grown

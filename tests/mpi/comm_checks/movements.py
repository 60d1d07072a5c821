"""Collectives that move data without changing it, and what all have in common; against NumPy, Gloo and MPI."""

import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from comm_checks.reference import (
    DTYPES,
    assert_reduced,
    assert_same,
    draw,
    drawn,
)
from comm_checks.world import Ranks

warnings.simplefilter("ignore", FutureWarning)  # the deprecated names are checked too


def check_broadcast_from_every_root(ranks: Ranks) -> None:
    for root in ranks.everybody:
        for dtype in DTYPES:
            parts = drawn(ranks, (3, 5), dtype, "broadcast", root)
            tensor = parts[ranks.rank].clone()
            dist.broadcast(tensor, root if root % 2 else None, ranks.pneumo, group_src=None if root % 2 else root)
            assert_same(tensor, parts[root], (root, dtype))


def check_all_gather(ranks: Ranks) -> None:
    for dtype in DTYPES:
        for shape in ((2, 3), (), (0, 4), (9001,)):
            parts = drawn(ranks, shape, dtype, "all_gather")
            outputs = [torch.zeros(shape, dtype=dtype) for _ in ranks.everybody]
            dist.all_gather(outputs, parts[ranks.rank], ranks.pneumo)
            assert_same(outputs, parts, (dtype, shape))


def check_all_gather_into_one_tensor(ranks: Ranks) -> None:
    for dtype in DTYPES:
        parts = drawn(ranks, (2, 3), dtype, "single")
        for gather in (dist.all_gather_single, dist.all_gather_into_tensor):
            row, stack = torch.zeros(2 * ranks.size, 3, dtype=dtype), torch.zeros(ranks.size, 2, 3, dtype=dtype)
            gather(row, parts[ranks.rank], ranks.pneumo)
            gather(stack, parts[ranks.rank], ranks.pneumo)
            assert_same(row, torch.cat(parts), dtype)
            assert_same(stack, torch.stack(parts), dtype)


def check_all_gather_coalesced(ranks: Ranks) -> None:
    shapes = ((2, 2), (1,), (3,))
    mine = [torch.full(shape, 10.0 * k + ranks.rank) for k, shape in enumerate(shapes)]
    for asynchronous in (False, True):
        outputs = [[torch.zeros(shape) for shape in shapes] for _ in ranks.everybody]
        future: Any = dist.all_gather_coalesced(outputs, mine, ranks.pneumo, async_op=asynchronous)
        if asynchronous:
            future.wait()
        expected = [[torch.full(shape, 10.0 * k + rank) for k, shape in enumerate(shapes)] for rank in ranks.everybody]
        assert_same(outputs, expected)


def check_future_of_all_gather_coalesced_has_gloos_form(ranks: Ranks) -> None:
    if ranks.size == 1:
        return  # Gloo's value is then one list of tensors, and not a list of lists
    values = []
    for group in (ranks.pneumo, ranks.gloo):
        outputs = [[torch.zeros(2), torch.zeros(1)] for _ in ranks.everybody]
        mine = [torch.full((2,), 1.0 + ranks.rank), torch.full((1,), 20.0)]
        future: Any = dist.all_gather_coalesced(outputs, mine, group, async_op=True)
        values.append(future.wait())
    assert_same(values[0], values[1])


def check_gather_and_scatter_with_every_root(ranks: Ranks) -> None:
    for root in ranks.everybody:
        for dtype in DTYPES:
            parts = drawn(ranks, (4,), dtype, "gather", root)
            mine = parts[ranks.rank]
            outputs = [torch.zeros(4, dtype=dtype) for _ in ranks.everybody] if ranks.rank == root else None
            dist.gather(mine, outputs, group=ranks.pneumo, group_dst=root)
            stack = torch.zeros(ranks.size, 4, dtype=dtype)
            dist.gather_single(mine, stack if ranks.rank == root else None, group=ranks.pneumo, group_dst=root)
            if outputs is not None:
                assert_same(outputs, parts, (root, dtype))
                assert_same(stack, torch.stack(parts), (root, dtype))
            received = torch.zeros(4, dtype=dtype)
            dist.scatter(received, parts if ranks.rank == root else None, group=ranks.pneumo, group_src=root)
            assert_same(received, mine, (root, dtype))


def check_all_to_all(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for dtype in DTYPES:
        table = [[draw(((a + 2 * b) % 5,), dtype, "all_to_all", a, b) for b in range(n)] for a in range(n)]
        outputs = [torch.zeros_like(table[other][me]) for other in range(n)]
        dist.all_to_all(outputs, table[me], ranks.pneumo)
        assert_same(outputs, [table[other][me] for other in range(n)], dtype)


def check_all_to_all_single(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for dtype in DTYPES:
        even = drawn(ranks, (2 * n, 3), dtype, "even")
        received = torch.zeros(2 * n, 3, dtype=dtype)
        dist.all_to_all_single(received, even[me], group=ranks.pneumo)
        assert_same(received, torch.cat([part[2 * me : 2 * me + 2] for part in even]), dtype)
        # Rank a sends (a + 2b) % 4 rows to b: none to some, and to some ranks nobody sends the same number.
        splits = [[(a + 2 * b) % 4 for b in range(n)] for a in range(n)]
        sent = [draw((sum(splits[a]), 3), dtype, "uneven", a) for a in range(n)]
        takes = [splits[a][me] for a in range(n)]
        received = torch.zeros(sum(takes), 3, dtype=dtype)
        dist.all_to_all_single(received, sent[me], takes, splits[me], ranks.pneumo)
        pieces = [torch.split(sent[a], splits[a])[me] for a in range(n)]
        assert_same(received, torch.cat(pieces), dtype)


def check_all_to_all_agrees_with_gloo(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    splits = [[(3 * a + b) % 4 for b in range(n)] for a in range(n)]
    takes = [splits[a][me] for a in range(n)]
    sent = draw((sum(splits[me]),), torch.float64, "gloo", me)
    results = []
    for group in (ranks.pneumo, ranks.gloo):
        received = torch.zeros(sum(takes), dtype=torch.float64)
        dist.all_to_all_single(received, sent, takes, splits[me], group)
        results.append(received)
    assert_same(results[0], results[1])


def check_outputs_that_are_views_of_inputs(ranks: Ranks) -> None:
    """FSDP gathers in place: a rank's input is its own part of the output."""
    n, me = ranks.size, ranks.rank
    for count in (5, 20_000):
        parts = drawn(ranks, (count,), torch.float32, "in place", count)
        whole = torch.zeros(n, count)
        whole[me] = parts[me]
        dist.all_gather_single(whole, whole[me], ranks.pneumo)
        assert_same(whole, torch.stack(parts), count)
        whole = torch.zeros(n, count)
        whole[me] = parts[me]
        dist.all_gather(list(whole), whole[me], ranks.pneumo)
        assert_same(whole, torch.stack(parts), count)
        inputs = drawn(ranks, (n, count), torch.int32, "in place", count)
        whole = inputs[me].clone()
        dist.reduce_scatter_single(whole[me], whole, group=ranks.pneumo)
        assert_reduced(whole[me], [part[me] for part in inputs], "SUM", count)
        whole = inputs[0].clone()
        dist.scatter(whole[me], list(whole) if me == 0 else None, group=ranks.pneumo, group_src=0)
        assert_same(whole, inputs[0], count)


def check_mpi_agrees(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    # No narrow integers: Open MPI's vectorised sums of them saturate where others, and its own scalar ones, wrap.
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.complex128):
        mine = draw((n, 6), dtype, "mpi", me)
        ours, theirs = mine.clone(), mine.clone().numpy()
        dist.all_reduce(ours, group=ranks.pneumo)
        total = theirs.copy()
        ranks.comm.Allreduce(theirs, total)
        parts = drawn(ranks, (n, 6), dtype, "mpi")
        assert_reduced(ours, parts, "SUM", dtype)
        assert_reduced(torch.from_numpy(total), parts, "SUM", dtype)
        exchanged = torch.zeros_like(mine)
        dist.all_to_all_single(exchanged, mine, group=ranks.pneumo)
        other = theirs.copy()
        ranks.comm.Alltoall(theirs, other)
        assert_same(exchanged, torch.from_numpy(other), dtype)
        gathered = torch.zeros(n, n, 6, dtype=dtype)
        dist.all_gather_single(gathered, mine, ranks.pneumo)
        assert_same(list(gathered), [torch.from_numpy(part) for part in ranks.comm.allgather(theirs)], dtype)


def check_barrier_holds_everybody_until_the_last_comes(ranks: Ranks) -> None:
    def waited(kind: str) -> None:
        if kind == "async":
            work: Any = dist.barrier(ranks.pneumo, async_op=True)
            assert work.wait()
        elif kind == "monitored":
            dist.monitored_barrier(ranks.pneumo, timedelta(seconds=30), wait_all_ranks=late % 2 == 0)
        else:
            dist.barrier(ranks.pneumo, timeout=timedelta(seconds=30) if kind == "timeout" else None)

    for kind in ("plain", "timeout", "async", "monitored"):
        for late in ranks.everybody:
            ranks.meet()
            time.sleep(0.03 * (ranks.rank == late))
            came = time.monotonic()  # of the machine, so comparable between the ranks of a node
            waited(kind)
            left = time.monotonic()
            times = ranks.share((came, left))
            assert max(came for came, _ in times) <= min(left for _, left in times), (kind, late, times)


def check_backend_says_what_it_is(ranks: Ranks) -> None:
    backend = ranks.pneumo._get_backend(torch.device("cpu"))
    assert dist.get_backend(ranks.pneumo) == "pneumo"
    assert backend.name() == "pneumo"
    assert (backend.rank(), backend.size()) == (ranks.rank, ranks.size)
    assert str(backend.get_error()) == "ErrorType.SUCCESS"
    dist.set_timeout(timedelta(seconds=77), ranks.pneumo)
    assert backend.options._timeout == timedelta(seconds=77)
    before = ranks.pneumo._get_sequence_number_for_group()
    for _ in range(3):
        dist.all_reduce(torch.ones(1), group=ranks.pneumo)
    assert ranks.pneumo._get_sequence_number_for_group() == before + 3


def check_reduce_scatter_of_unequal_parts(ranks: Ranks) -> None:
    """A list of tensors of different lengths, as Gloo takes it: rank k gets k + 1 rows, or none."""
    for rows in ([k + 1 for k in range(ranks.size)], [k % 2 for k in range(ranks.size)]):
        for dtype in (torch.float32, torch.bfloat16, torch.int32):
            for later in (False, True):
                parts = [torch.full((count, 3), float(k + ranks.rank)).to(dtype) for k, count in enumerate(rows)]
                output = torch.empty(rows[ranks.rank], 3, dtype=dtype)
                work = dist.reduce_scatter(output, parts, group=ranks.pneumo, async_op=later)
                if work is not None:
                    work.wait()
                total = sum(ranks.rank + other for other in range(ranks.size))
                assert_same(output, torch.full((rows[ranks.rank], 3), float(total)).to(dtype))

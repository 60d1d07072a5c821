"""Reductions of dense and sparse tensors, against NumPy and Gloo."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _make_nccl_premul_sum
from torch.distributed.distributed_c10d import _coalescing_manager

from comm_checks.reference import (
    DTYPES,
    FLOATS,
    OPS,
    allows,
    assert_reduced,
    assert_same,
    draw,
    drawn,
    op_of,
)
from comm_checks.world import Ranks

warnings.simplefilter("ignore", FutureWarning)  # the deprecated names are checked too


def check_all_reduce_with_every_op_and_type(ranks: Ranks) -> None:
    for dtype in DTYPES:
        for op in [op for op in OPS if allows(op, dtype)]:
            if dtype.is_complex and op == "AVG":
                continue  # refused by torch.distributed itself
            for count in (17, 9000):
                parts = drawn(ranks, (count,), dtype, op)
                tensor = parts[ranks.rank].clone()
                assert dist.all_reduce(tensor, op_of(op), ranks.pneumo) is None
                assert_reduced(tensor, parts, op, (dtype, op, count))


def check_all_reduce_agrees_with_gloo(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.int32, torch.int64, torch.uint8):
        for op in [op for op in OPS if allows(op, dtype) and op != "AVG"]:
            parts = drawn(ranks, (33,), dtype, "gloo", op)
            for group in (ranks.pneumo, ranks.gloo):
                tensor = parts[ranks.rank].clone()
                dist.all_reduce(tensor, op_of(op), group)
                assert_reduced(tensor, parts, op, (dtype, op, dist.get_backend(group)))


def check_not_a_number_reaches_every_rank(ranks: Ranks) -> None:
    for dtype in FLOATS:
        for op in ("SUM", "PRODUCT", "MIN", "MAX", "AVG"):
            tensor = torch.ones(ranks.size + 1, dtype=dtype)
            tensor[ranks.rank] = float("nan")
            dist.all_reduce(tensor, op_of(op), ranks.pneumo)
            assert tensor[:-1].isnan().all(), (dtype, op, tensor)
            assert not tensor[-1].isnan(), (dtype, op, tensor)


def check_infinities_and_signed_zeros(ranks: Ranks) -> None:
    infinity = float("inf")
    mine = torch.tensor([infinity, -infinity, infinity if ranks.rank else -infinity, -0.0 if ranks.rank else 0.0])
    for op in ("MAX", "MIN", "SUM"):
        tensor = mine.clone()
        dist.all_reduce(tensor, op_of(op), ranks.pneumo)
        assert tensor[:2].tolist() == [infinity, -infinity], (op, tensor)
        if ranks.size > 1:
            third = {"MAX": infinity, "MIN": -infinity}.get(op)
            assert tensor[2].isnan() if third is None else tensor[2] == third, (op, tensor)
            assert bool(tensor[3].signbit()) == (op == "MIN"), (op, tensor)


def check_an_average_of_integers_fits_their_type(ranks: Ranks) -> None:
    """As an average of equal numbers is that number, however large their sum."""
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        most = torch.iinfo(dtype).max
        for count in (3, 9000):
            tensor = torch.full((count,), most, dtype=dtype)
            dist.all_reduce(tensor, dist.ReduceOp.AVG, ranks.pneumo)
            assert_same(tensor, torch.full((count,), most, dtype=dtype), (dtype, count))
            part = torch.zeros(count, dtype=dtype)
            whole = torch.full((ranks.size * count,), most, dtype=dtype)
            dist.reduce_scatter_tensor(part, whole, dist.ReduceOp.AVG, ranks.pneumo)
            assert_same(part, tensor, (dtype, count))


def check_premultiplied_sum(ranks: Ranks) -> None:
    for dtype in (*FLOATS, torch.int32):
        for factor in (2.5, torch.tensor([2.5])):
            parts = [part % 64 for part in drawn(ranks, (65,), torch.uint8, "premultiplied")]
            tensor = parts[ranks.rank].to(dtype)
            dist.all_reduce(tensor, _make_nccl_premul_sum(factor), ranks.pneumo)
            # Halves up to 2.5 * 63 have 9 bits: exact but for bfloat16, which then must not round before it sums.
            wide = torch.float64 if dtype.is_floating_point else dtype
            expected = sum((part * 2.5).to(wide) for part in parts)
            assert_same(tensor, torch.as_tensor(expected).to(dtype), dtype)


def check_each_rank_premultiplies_by_its_own_factor(ranks: Ranks) -> None:
    """As ncclRedOpCreatePreMulSum says: "pre-multiplies input values by a given scalar locally"."""
    for count in (5, 20_000):
        parts = drawn(ranks, (count,), torch.float32, "own factor", count)
        op = _make_nccl_premul_sum(float(ranks.rank + 1))
        tensor = parts[ranks.rank].clone()
        dist.all_reduce(tensor, op, ranks.pneumo)
        assert_reduced(tensor, [part * (rank + 1) for rank, part in enumerate(parts)], "SUM", count)


def check_all_reduce_coalesced(ranks: Ranks) -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (0,), (), (70,), (2, 5)]
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.complex64):
        for wait in (False, True):
            parts = [drawn(ranks, shape, dtype, "coalesced", k) for k, shape in enumerate(shapes)]
            tensors = [part[ranks.rank].clone() for part in parts]
            tensors[4] = tensors[4].t().contiguous().t()
            result: Any = dist.all_reduce_coalesced(tensors, group=ranks.pneumo, async_op=wait)
            if wait:
                result.wait()
            for tensor, part in zip(tensors, parts, strict=True):
                assert_reduced(tensor, part, "SUM", dtype)


def check_coalescing_manager(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for asynchronous in (False, True):
        results = []
        for group in (ranks.pneumo, ranks.gloo):
            sums = [torch.full((k + 1,), me, dtype=torch.int32) for k in range(3)]
            with _coalescing_manager(group=group, async_ops=asynchronous) as manager:
                for tensor in sums:
                    dist.all_reduce(tensor, op_of("MAX"), group)
            manager.wait()
            gathered: list[torch.Tensor] = [torch.zeros((k + 1) * n) for k in range(3)]
            with _coalescing_manager(group=group, async_ops=asynchronous) as manager:
                for k, tensor in enumerate(gathered):
                    dist.all_gather_single(tensor, torch.arange(k + 1.0) + me, group)
            manager.wait()
            scattered = [torch.zeros(k + 1) for k in range(3)]
            with _coalescing_manager(group=group, async_ops=asynchronous) as manager:
                for k, tensor in enumerate(scattered):
                    whole = torch.arange((k + 1.0) * n)
                    dist.reduce_scatter_single(tensor, whole, group=group)
            manager.wait()
            results.append((sums, gathered, scattered))
        assert_same(results[0], results[1], asynchronous)


def sparse(rank: int, seed: int, entries: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A sparse 6 x 5 x (2) tensor whose indices repeat: one dense dimension, not coalesced."""
    rows = draw((2, entries), torch.uint8, "indices", rank, seed).to(torch.int64) % 5
    values = draw((entries, 2), torch.int8, "values", rank, seed).to(dtype)
    return torch.sparse_coo_tensor(rows, values, (6, 5, 2), check_invariants=True)


def check_sparse_all_reduce(ranks: Ranks) -> None:
    for seed in range(3):
        parts = [sparse(rank, seed, 1 + (rank + seed) % 4) for rank in ranks.everybody]
        results = []
        for group in (ranks.pneumo, ranks.gloo):
            tensor = parts[ranks.rank].clone()
            dist.all_reduce(tensor, group=group)
            results.append(tensor)
        assert_same(results[0].to_dense(), sum(part.to_dense() for part in parts))
        assert_same(results[0].to_dense(), results[1].to_dense())
        assert results[0].is_coalesced()


def check_sparse_all_reduce_where_a_rank_has_no_entries(ranks: Ranks) -> None:
    parts = [sparse(rank, 9, rank % 2 * 3) for rank in ranks.everybody]
    tensor = parts[ranks.rank].clone()
    dist.all_reduce(tensor, group=ranks.pneumo)
    assert_same(tensor.to_dense(), sum(part.to_dense() for part in parts))


def check_reduce_to_every_root(ranks: Ranks) -> None:
    for root in ranks.everybody:
        for dtype in (torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.complex64):
            for op in ("SUM", "AVG", "PRODUCT", "MAX"):
                if not allows(op, dtype):
                    continue
                parts = drawn(ranks, (40,), dtype, "reduce", root, op)
                tensor = parts[ranks.rank].clone()
                dist.reduce(tensor, op=op_of(op), group=ranks.pneumo, group_dst=root)
                if ranks.rank == root:
                    assert_reduced(tensor, parts, op, (root, dtype, op))


def check_reduce_scatter(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for dtype in DTYPES:
        for op in [op for op in OPS if allows(op, dtype)]:
            wholes = drawn(ranks, (n, 2, 3), dtype, "reduce_scatter", op)
            parts = [whole[me] for whole in wholes]
            output = torch.zeros(2, 3, dtype=dtype)
            dist.reduce_scatter(output, list(wholes[me]), op_of(op), ranks.pneumo)
            assert_reduced(output, parts, op, ("list", dtype, op))
            for name, whole in (("stack", wholes[me]), ("row", wholes[me].reshape(2 * n, 3))):
                output = torch.zeros(2, 3, dtype=dtype)
                dist.reduce_scatter_single(output, whole, op_of(op), ranks.pneumo)
                assert_reduced(output, parts, op, (name, dtype, op))
    output = torch.zeros(1)
    dist.reduce_scatter_tensor(output, torch.arange(float(n)), group=ranks.pneumo)
    assert output.tolist() == [n * me]

"""Layouts, sizes and kinds of tensors; and that results have the same bits on every rank, and in every run."""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from comm_checks.reference import DTYPES, assert_reduced, assert_same, draw, exact, raw
from comm_checks.world import Ranks, rng

# Elements, of 4 bytes, around the limits of what the engine does in one go: lines of the cache, the one-shot path
# (32 KiB), chunks (256 KiB, 1 MiB where ranks outnumber cores; 16 KiB in the world that the test gives small chunks),
# with a rank's part of them; and several megabytes, so that many chunks are under way.
LIMITS = (64, 256, 4096, 8192, 65_536, 131_072, 262_144)
COUNTS = sorted({0, 1, 2, *(limit + k for limit in LIMITS for k in (-1, 0, 1)), 349_525, 1_500_001})


def check_every_size_of_all_reduce(ranks: Ranks) -> None:
    for count in COUNTS:
        for op in ("SUM", "MAX"):
            parts = [draw((count,), torch.float32, "size", op, rank) for rank in ranks.everybody]
            tensor = parts[ranks.rank].clone()
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op), ranks.pneumo)
            assert_reduced(tensor, parts, op, (op, count))


def check_every_size_of_16_bit_and_8_bit_elements(ranks: Ranks) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.uint8):
        for count in (1, 31, 33, 16_383, 16_384, 16_385, 32_769, 131_073, 500_001):
            parts = [draw((count,), dtype, "size", rank) for rank in ranks.everybody]
            tensor = parts[ranks.rank].clone()
            dist.all_reduce(tensor, group=ranks.pneumo)
            assert_reduced(tensor, parts, "SUM", (dtype, count))


def check_every_size_of_the_others(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for count in [count for count in COUNTS if count < 300_000]:
        parts = [draw((count,), torch.int32, "size", rank) for rank in ranks.everybody]
        root = count % n
        tensor = parts[me].clone()
        dist.broadcast(tensor, group=ranks.pneumo, group_src=root)
        assert_same(tensor, parts[root], ("broadcast", count))
        tensor = parts[me].clone()
        dist.reduce(tensor, group=ranks.pneumo, group_dst=root)
        if me == root:
            assert_reduced(tensor, parts, "SUM", ("reduce", count))
        gathered = torch.zeros(n, count, dtype=torch.int32)
        dist.all_gather_single(gathered, parts[me], ranks.pneumo)
        assert_same(list(gathered), parts, ("all_gather", count))
        stack = torch.zeros(n, count, dtype=torch.int32)
        dist.gather_single(parts[me], stack if me == root else None, group=ranks.pneumo, group_dst=root)
        assert_same(list(stack), parts if me == root else [part * 0 for part in parts], ("gather", count))
        tensor = torch.zeros(count, dtype=torch.int32)
        dist.scatter(tensor, parts if me == root else None, group=ranks.pneumo, group_src=root)
        assert_same(tensor, parts[me], ("scatter", count))


def check_every_size_of_what_has_a_part_for_each_rank(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for count in [count for count in COUNTS if count < 140_000]:
        wholes = [draw((n, count), torch.int16, "part", rank) for rank in ranks.everybody]
        tensor = torch.zeros(count, dtype=torch.int16)
        dist.reduce_scatter_single(tensor, wholes[me], group=ranks.pneumo)
        assert_reduced(tensor, [whole[me] for whole in wholes], "SUM", ("reduce_scatter", count))
        received = torch.zeros(n, count, dtype=torch.int16)
        dist.all_to_all_single(received, wholes[me], group=ranks.pneumo)
        assert_same(received, torch.stack([whole[me] for whole in wholes]), ("all_to_all", count))
    # One pair exchanges many chunks, the others nothing, and the last row is empty for all.
    splits = [[300_001 if (a, b) == (0, n - 1) else a % 2 * b for b in range(n)] for a in range(n)]
    sent = [draw((sum(splits[a]),), torch.float32, "lopsided", a) for a in range(n)]
    takes = [splits[a][me] for a in range(n)]
    received = torch.zeros(sum(takes))
    dist.all_to_all_single(received, sent[me], takes, splits[me], ranks.pneumo)
    assert_same(received, torch.cat([torch.split(sent[a], splits[a])[me] for a in range(n)]))


def check_many_megabytes(ranks: Ranks) -> None:
    """Several times the whole shared memory of a group's slots."""
    count = 6_000_011 // ranks.size
    parts = [draw((count,), torch.uint8, "large", rank).to(torch.int32) for rank in ranks.everybody]
    tensor = parts[ranks.rank].clone()
    dist.all_reduce(tensor, group=ranks.pneumo)
    assert_same(tensor, torch.stack(parts).sum(0, dtype=torch.int32))
    whole = torch.zeros(ranks.size, count, dtype=torch.int32)
    dist.all_gather_single(whole, parts[ranks.rank], ranks.pneumo)
    assert_same(list(whole), parts)


# Ways to lay the elements of one 4-dimensional shape out in memory.
SHAPE = (4, 3, 5, 2)
LAYOUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "contiguous": lambda dtype: torch.zeros(SHAPE, dtype=dtype),
    "transposed": lambda dtype: torch.zeros(SHAPE[::-1], dtype=dtype).permute(3, 2, 1, 0),
    "every second": lambda dtype: torch.zeros((4, 3, 5, 4), dtype=dtype)[..., ::2],
    "a column": lambda dtype: torch.zeros((4, 3, 5, 2, 3), dtype=dtype)[..., 1],
    "a part": lambda dtype: torch.zeros((6, 3, 5, 2), dtype=dtype)[1:5],
    "channels last": lambda dtype: torch.zeros(SHAPE, dtype=dtype).to(memory_format=torch.channels_last),
    "unaligned": lambda dtype: torch.zeros(121, dtype=dtype)[1:].view(SHAPE),
}


def laid_out(layout: str, values: torch.Tensor) -> torch.Tensor:
    """A tensor of these values in a layout."""
    tensor = LAYOUTS[layout](values.dtype)
    tensor.copy_(values)
    return tensor


def check_every_layout(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
            parts = [draw(SHAPE, dtype, layout, rank) for rank in ranks.everybody]

            def room(layout: str = layout, dtype: torch.dtype = dtype) -> torch.Tensor:
                return LAYOUTS[layout](dtype)

            mine = laid_out(layout, parts[me])
            strides = mine.stride()
            dist.all_reduce(mine, group=ranks.pneumo)
            assert_reduced(mine, parts, "SUM", (layout, dtype))
            assert mine.stride() == strides
            mine = laid_out(layout, parts[me])
            dist.broadcast(mine, n - 1, ranks.pneumo)
            assert_same(mine, parts[n - 1], (layout, dtype))
            mine = laid_out(layout, parts[me])
            dist.reduce(mine, 0, group=ranks.pneumo)
            if me == 0:
                assert_reduced(mine, parts, "SUM", (layout, dtype))
            mine = laid_out(layout, parts[me])
            outputs = [room() for _ in range(n)]
            dist.all_gather(outputs, mine, ranks.pneumo)
            assert_same(outputs, parts, (layout, dtype))
            outputs = [room() for _ in range(n)]
            dist.gather(mine, outputs if me == 0 else None, 0, ranks.pneumo)
            assert_same(outputs, [part if me == 0 else room() for part in parts], (layout, dtype))
            output = room()
            dist.scatter(output, [laid_out(layout, part) for part in parts] if me == 0 else None, 0, ranks.pneumo)
            assert_same(output, parts[me], (layout, dtype))
            outputs = [room() for _ in range(n)]
            dist.all_to_all(outputs, [laid_out(layout, part) for part in parts], ranks.pneumo)
            assert_same(outputs, [parts[me]] * n, (layout, dtype))
            output = room()
            dist.reduce_scatter(output, [laid_out(layout, part) for part in parts], group=ranks.pneumo)
            assert_reduced(output, [parts[me]] * n, "SUM", (layout, dtype))


def check_layouts_of_single_tensors(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for dtype in (torch.float32, torch.int16):
        parts = [draw((4, 6), dtype, "single", rank) for rank in ranks.everybody]
        output = torch.zeros(6, 4 * n, dtype=dtype).t()
        dist.all_gather_single(output, parts[me].t().contiguous().t(), ranks.pneumo)
        assert_same(output, torch.cat(parts), dtype)
        wholes = [draw((4 * n, 6), dtype, "single", rank) for rank in ranks.everybody]
        output = torch.zeros(6, 4, dtype=dtype).t()
        whole = wholes[me].t().contiguous().t()
        dist.reduce_scatter_single(output, whole, group=ranks.pneumo)
        assert_reduced(output, [other[4 * me : 4 * me + 4] for other in wholes], "SUM", dtype)
        output = torch.zeros(6, 4 * n, dtype=dtype).t()
        dist.all_to_all_single(output, whole, group=ranks.pneumo)
        assert_same(output, torch.cat([other[4 * me : 4 * me + 4] for other in wholes]), dtype)


def check_expanded_tensors_as_inputs(ranks: Ranks) -> None:
    """Elements that share their memory can be read."""
    n, me = ranks.size, ranks.rank

    def expanded(rank: int) -> torch.Tensor:
        return torch.full((1, 3), float(rank + 1)).expand(4, 3)

    outputs = [torch.zeros(4, 3) for _ in range(n)]
    dist.all_gather(outputs, expanded(me), ranks.pneumo)
    assert_same(outputs, [expanded(rank) for rank in range(n)])
    output = torch.zeros(4, 3)
    dist.reduce_scatter(output, [expanded(k) for k in range(n)], group=ranks.pneumo)
    assert_same(output, expanded(me) * n)
    outputs = [torch.zeros(4, 3) for _ in range(n)]
    dist.all_to_all(outputs, [expanded(k) for k in range(n)], ranks.pneumo)
    assert_same(outputs, [expanded(me)] * n)
    work: Any = dist.isend(expanded(me), (me + 1) % n, ranks.pneumo)
    output = torch.zeros(4, 3)
    receiving: Any = dist.irecv(output, (me - 1) % n, ranks.pneumo)
    work.wait(), receiving.wait()
    assert_same(output, expanded((me - 1) % n))


def check_root_of_a_broadcast_may_be_expanded(ranks: Ranks) -> None:
    """It is only read."""
    tensor = torch.full((1, 3), 7.0).expand(4, 3) if ranks.rank == 0 else torch.zeros(4, 3)
    dist.broadcast(tensor, 0, ranks.pneumo)
    assert_same(tensor, torch.full((4, 3), 7.0))


def check_all_but_the_root_of_a_reduce_may_be_expanded(ranks: Ranks) -> None:
    """They keep what they have."""
    n, me = ranks.size, ranks.rank
    tensor = torch.full((1, 3), me + 1.0).expand(4, 3) if me else torch.ones(4, 3)
    dist.reduce(tensor, 0, group=ranks.pneumo)
    assert_same(tensor, torch.full((4, 3), me + 1.0 if me else n * (n + 1) / 2))


def check_empty_and_zero_dimensional_tensors(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for dtype in DTYPES:
        for shape in ((0,), (0, 3), (2, 0), ()):
            parts = [draw(shape, dtype, "empty", rank) for rank in ranks.everybody]
            tensor = parts[me].clone()
            dist.all_reduce(tensor, group=ranks.pneumo)
            assert_reduced(tensor, parts, "SUM", (dtype, shape))
            tensor = parts[me].clone()
            dist.broadcast(tensor, n - 1, ranks.pneumo)
            assert_same(tensor, parts[n - 1], (dtype, shape))
            stack = torch.zeros((n, *shape), dtype=dtype)
            dist.all_gather_single(stack, parts[me], ranks.pneumo)
            assert_same(list(stack), parts, (dtype, shape))
            tensor = torch.zeros(shape, dtype=dtype)
            dist.scatter(tensor, parts if me == 0 else None, 0, ranks.pneumo)
            assert_same(tensor, parts[me], (dtype, shape))
            tensor = torch.zeros(shape, dtype=dtype)
            dist.reduce_scatter(tensor, parts, group=ranks.pneumo)
            assert_reduced(tensor, [parts[me]] * n, "SUM", (dtype, shape))
            outputs = [torch.zeros(shape, dtype=dtype) for _ in range(n)]
            dist.all_to_all(outputs, parts, ranks.pneumo)
            assert_same(outputs, [parts[me]] * n, (dtype, shape))
    nothing = torch.zeros(0, 3)
    dist.all_to_all_single(nothing, torch.zeros(0, 3), [0] * n, [0] * n, ranks.pneumo)
    dist.all_reduce_coalesced([nothing, torch.zeros(0)], group=ranks.pneumo)


def check_tensors_that_require_gradients(ranks: Ranks) -> None:
    for layout in ("contiguous", "transposed", "every second"):
        parts = [draw(SHAPE, torch.float32, "gradient", rank) for rank in ranks.everybody]
        parameter = torch.nn.Parameter(laid_out(layout, parts[ranks.rank]))
        with torch.no_grad():
            dist.all_reduce(parameter, group=ranks.pneumo)
        assert_reduced(parameter, parts, "SUM", layout)
        dist.broadcast(parameter.data, 0, ranks.pneumo)
        outputs = [torch.zeros(SHAPE) for _ in ranks.everybody]
        dist.all_gather(outputs, parameter, ranks.pneumo)
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert not outputs[0].requires_grad
        assert_same(outputs[0], parameter.detach(), layout)
        torch.autograd.backward((parameter * 2).sum())
        assert parameter.grad is not None
        assert_same(parameter.grad + 0, torch.full(SHAPE, 2.0))


def check_inference_tensors(ranks: Ranks) -> None:
    parts = [draw(SHAPE, torch.float32, "inference", rank) for rank in ranks.everybody]
    for layout in ("contiguous", "transposed"):
        with torch.inference_mode():
            inside = laid_out(layout, parts[ranks.rank])
            work: Any = dist.all_reduce(inside, group=ranks.pneumo, async_op=True)
            work.wait()
            assert_reduced(inside, parts, "SUM", layout)
            outputs = [laid_out(layout, parts[0]) for _ in ranks.everybody]
            dist.all_gather(outputs, parts[ranks.rank], ranks.pneumo)
            assert_same(outputs, parts, layout)
        assert inside.is_inference()
        outside = laid_out(layout, parts[ranks.rank])
        with torch.inference_mode():
            inside.copy_(parts[ranks.rank])
            dist.all_reduce(outside, group=ranks.pneumo)
        dist.all_reduce(inside, group=ranks.pneumo)
        assert_reduced(inside, parts, "SUM", layout)
        assert_reduced(outside, parts, "SUM", layout)


def check_conjugated_and_negated_views_as_inputs(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    values = [draw((5,), torch.complex64, "view", rank) for rank in ranks.everybody]
    for view in (torch.conj, lambda x: x.conj().imag, lambda x: torch._neg_view(x.real.contiguous())):
        mine = view(values[me])
        outputs = [torch.zeros(5, dtype=mine.dtype) for _ in range(n)]
        ranks.pneumo.allgather([outputs], [mine]).wait()
        assert_same(outputs, [view(value) for value in values])


def digest(ranks: Ranks, dtype: torch.dtype, turn: int) -> tuple[bytes, bytes]:
    """The bytes of a large and a small all_reduce of values of all magnitudes, where rounding depends on the order."""
    results = []
    for count in (200_003, 1_000):
        mine = draw((count,), torch.float32, "bits", ranks.rank)
        scale = 2.0 ** torch.from_numpy(rng("scale", ranks.rank).integers(-20, 20, count))
        tensor = (mine * scale.float()).to(dtype)
        time.sleep(rng("late", turn, ranks.rank).choice([0, 0.002, 0.01]))
        dist.all_reduce(tensor, group=ranks.pneumo)
        results.append(raw(tensor))
    return results[0], results[1]


def check_bits_are_the_same_on_every_rank_and_every_time(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        turns = [digest(ranks, dtype, turn) for turn in range(4)]
        assert all(turn == turns[0] for turn in turns), f"{dtype}: the bits depend on who is late"
        for k, size in enumerate(("large", "small")):
            everywhere = ranks.share(hashlib.sha256(turns[0][k]).hexdigest())
            assert len(set(everywhere)) == 1, f"{dtype}, {size}: the bits differ between ranks"
        if ranks.rank == 0:  # the test compares it with another run's
            print(f"DIGEST {dtype} {everywhere[0]}", flush=True)


def check_rounding_depends_on_the_order(ranks: Ranks) -> None:
    """Says of the check before that it can fail: the same values in another order have other bits."""
    if ranks.size < 3:
        return
    tensors = []
    for shift in (0, 1):
        rank = (ranks.rank + shift) % ranks.size
        mine = draw((1_000,), torch.float32, "bits", rank)
        tensor = mine * (2.0 ** torch.from_numpy(rng("scale", rank).integers(-20, 20, 1_000))).float()
        dist.all_reduce(tensor, group=ranks.pneumo)
        tensors.append(tensor)
    assert raw(tensors[0]) != raw(tensors[1])
    assert abs(exact(tensors[0]) - exact(tensors[1])).max() > 0

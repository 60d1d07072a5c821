"""Wrong calls raise at once, with the operation's name, on the rank that makes them, and the group stays usable."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from comm_checks.reference import told
from comm_checks.world import Ranks

Calls = dict[str, tuple[str, Callable[[], Any]]]
R = dist.ReduceOp
ONE = torch.ones(1)
OPTIONS = torch._C._distributed_c10d.AllreduceCoalescedOptions


def assert_refused(ranks: Ranks, group: Any, calls: Calls) -> None:
    """The last rank makes each call alone, so it must not need any other to find the mistake."""
    for what, (name, call) in calls.items():
        said = f"{what} was not refused" if ranks.rank == ranks.size - 1 else ""
        if said:
            with suppress(AssertionError):
                text = told(call)
                said = "" if name in text else f"{what}: {text}"
        problems = [text for text in ranks.share(said) if text]
        assert not problems, problems
        tensor = ONE.clone()
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == ranks.size, what


def zeros(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Some tensors of one element."""
    return [torch.zeros(1, dtype=dtype) for _ in range(count)]


def check_unsupported_types_and_operations(ranks: Ranks) -> None:
    n, group = ranks.size, ranks.fresh(timeout_s=15)
    eight, logical = torch.ones(2).to(torch.float8_e4m3fn), torch.ones(1, dtype=torch.bool)
    complexes = torch.ones(n, dtype=torch.complex64)
    calls: Calls = {
        "float8 sum": ("all_reduce", lambda: dist.all_reduce(eight, group=group)),
        "float8 reduce": ("reduce", lambda: dist.reduce(eight, group=group, group_dst=0)),
        "float8 reduce_scatter": ("reduce_scatter", lambda: dist.reduce_scatter(eight, [eight] * n, group=group)),
        "BAND of floats": ("all_reduce", lambda: dist.all_reduce(ONE, R.BAND, group)),
        "BOR of floats": ("reduce", lambda: dist.reduce(ONE, op=R.BOR, group=group, group_dst=0)),
        "BXOR of floats": ("reduce_scatter", lambda: dist.reduce_scatter(ONE.clone(), zeros(n), R.BXOR, group)),
        "complex product": ("all_reduce", lambda: dist.all_reduce(complexes, R.PRODUCT, group)),
        "complex product to one": ("reduce", lambda: dist.reduce(complexes, 0, R.PRODUCT, group)),
        "complex maximum": (
            "reduce_scatter_single",
            lambda: dist.reduce_scatter_single(complexes[:1], complexes, R.MAX, group),
        ),
        "average of Booleans": ("all_reduce", lambda: dist.all_reduce(logical, R.AVG, group)),
        "maximum of sparse": ("all_reduce", lambda: dist.all_reduce(torch.ones(2).to_sparse(), R.MAX, group)),
        "two tensors": ("all_reduce", lambda: group.allreduce([ONE, ONE])),
    }
    assert_refused(ranks, group, calls)


def check_wrong_numbers_of_tensors(ranks: Ranks) -> None:
    n, me, group = ranks.size, ranks.rank, ranks.fresh(timeout_s=15)

    def with_tensors(k: int) -> Calls:
        lists = [zeros(1) for _ in range(k)]
        return {
            f"all_gather to {k}": ("all_gather", lambda: dist.all_gather(zeros(k), ONE, group)),
            f"gather to {k}": ("gather", lambda: dist.gather(ONE, zeros(k), me, group)),
            f"scatter of {k}": ("scatter", lambda: dist.scatter(ONE.clone(), zeros(k), me, group)),
            f"reduce_scatter of {k}": (
                "reduce_scatter",
                lambda: dist.reduce_scatter(ONE.clone(), zeros(k), group=group),
            ),
            f"all_to_all of {k}": ("all_to_all", lambda: dist.all_to_all(zeros(k), zeros(k), group)),
            f"all_gather_coalesced to {k}": (
                "all_gather_coalesced",
                lambda: dist.all_gather_coalesced(lists, [ONE], group),
            ),
        }

    long = [zeros(2) for _ in range(n)]
    lengths: Calls = {
        "lists of other lengths": ("all_gather_coalesced", lambda: dist.all_gather_coalesced(long, [ONE], group))
    }
    assert_refused(ranks, group, lengths | with_tensors(n + 1) | (with_tensors(n - 1) if n > 1 else {}))


def check_mixed_types(ranks: Ranks) -> None:
    n, me, group = ranks.size, ranks.rank, ranks.fresh(timeout_s=15)
    whole = torch.int32
    gather, scatter = torch._C._distributed_c10d.GatherOptions(), torch._C._distributed_c10d.ScatterOptions()
    gather.rootRank = scatter.rootRank = me
    calls: Calls = {
        "all_gather": ("all_gather", lambda: group.allgather([zeros(n, whole)], [ONE])),
        "all_gather_single": (
            "all_gather_single",
            lambda: dist.all_gather_single(torch.zeros(n, dtype=whole), ONE, group),
        ),
        "gather": ("gather", lambda: group.gather([zeros(n, whole)], [ONE], gather)),
        "scatter": ("scatter", lambda: group.scatter([ONE.clone()], [zeros(n, whole)], scatter)),
        "reduce_scatter": ("reduce_scatter", lambda: group.reduce_scatter([ONE.clone()], [zeros(n, whole)])),
        "reduce_scatter_single": (
            "reduce_scatter_single",
            lambda: dist.reduce_scatter_single(ONE.clone(), torch.zeros(n, dtype=whole), group=group),
        ),
        "all_to_all": ("all_to_all", lambda: group.alltoall(zeros(n), zeros(n, whole))),
        "all_to_all_single": (
            "all_to_all_single",
            lambda: group.alltoall_base(torch.zeros(n), torch.zeros(n, dtype=whole), [], []),
        ),
        "all_reduce_coalesced": (
            "all_reduce_coalesced",
            lambda: group.allreduce_coalesced([ONE.clone(), torch.ones(1, dtype=whole)], OPTIONS()),
        ),
    }
    assert_refused(ranks, group, calls)


def coalesced_gather(group: Any, output: torch.Tensor) -> None:
    """A coalesced all_gather_single of one element."""
    with _coalescing_manager(group=group):
        dist.all_gather_single(output, ONE, group)


def check_sizes_that_do_not_fit(ranks: Ranks) -> None:
    n, me, group = ranks.size, ranks.rank, ranks.fresh(timeout_s=15)
    large = torch.zeros(n + 1)
    calls: Calls = {
        "all_gather": ("all_gather", lambda: dist.all_gather([torch.zeros(2)] * n, ONE, group)),
        "all_gather_single": ("all_gather_single", lambda: dist.all_gather_single(large, ONE, group)),
        "coalesced": ("all_gather_single_coalesced", lambda: coalesced_gather(group, large)),
        "gather": ("gather", lambda: dist.gather(ONE, [torch.zeros(2)] * n, me, group)),
        "gather_single": (
            "gather_single",
            lambda: dist.gather_single(ONE, large, group=group, group_dst=me),
        ),
        "scatter": ("scatter", lambda: dist.scatter(torch.zeros(2), zeros(n), me, group)),
        "reduce_scatter": ("reduce_scatter", lambda: dist.reduce_scatter(torch.zeros(2), zeros(n), group=group)),
        "reduce_scatter_single": (
            "reduce_scatter_single",
            lambda: dist.reduce_scatter_single(ONE.clone(), large, group=group),
        ),
    }
    assert_refused(ranks, group, calls)


def check_splits_that_do_not_fit(ranks: Ranks) -> None:
    n, group = ranks.size, ranks.fresh(timeout_s=15)
    ones = [1] * n

    def exchange(count: int, takes: list[int] | None, gives: list[int] | None) -> Callable[[], Any]:
        return lambda: dist.all_to_all_single(torch.zeros(count), torch.zeros(count), takes, gives, group)

    calls: Calls = {
        "of another sum": ("all_to_all_single", exchange(n, ones, [2] * n)),
        "of another number": ("all_to_all_single", exchange(n, [*ones, 0], ones)),
        "below zero": ("all_to_all_single", exchange(n, ones, [-1, *ones[1:-1], 3] if n > 1 else [-1])),
    }
    if n > 1:
        calls["none, and a row too many"] = ("all_to_all_single", exchange(n + 1, None, None))
    assert_refused(ranks, group, calls)


def check_roots_and_peers_that_do_not_exist(ranks: Ranks) -> None:
    group = ranks.fresh(timeout_s=15)

    def with_rank(k: int) -> Calls:
        return {
            f"broadcast from {k}": ("broadcast", lambda: dist.broadcast(ONE, group=group, group_src=k)),
            f"reduce to {k}": ("reduce", lambda: dist.reduce(ONE, group=group, group_dst=k)),
            f"gather to {k}": ("gather", lambda: dist.gather(ONE, group=group, group_dst=k)),
            f"scatter from {k}": ("scatter", lambda: dist.scatter(ONE, group=group, group_src=k)),
            f"send to {k}": ("send", lambda: dist.isend(ONE, group=group, group_dst=k)),
            f"receive from {k}": ("recv", lambda: dist.irecv(ONE, group=group, group_src=k)),
        }

    assert_refused(ranks, group, with_rank(ranks.size) | with_rank(-1))


def check_expanded_outputs(ranks: Ranks) -> None:
    """Several elements share a place, which torch's own operations in place refuse. (Gloo writes past their memory.)"""
    n, me, group = ranks.size, ranks.rank, ranks.fresh(timeout_s=15)
    shared, plain = torch.zeros(1, 3).expand(4, 3), torch.zeros(4, 3)
    calls: Calls = {
        "all_reduce": ("all_reduce", lambda: dist.all_reduce(shared, group=group)),
        "all_gather": ("all_gather", lambda: dist.all_gather([shared] * n, plain, group)),
        "scatter": ("scatter", lambda: dist.scatter(shared, [plain] * n, me, group)),
        "recv": ("recv", lambda: dist.irecv(shared, me, group)),
    }
    assert_refused(ranks, group, calls)


def check_a_message_of_another_size(ranks: Ranks) -> None:
    """Both ends are told; other messages and collectives of the group are not disturbed."""
    if ranks.size == 1:
        return
    group = ranks.fresh(timeout_s=15)
    if ranks.rank < 2:
        tensor = torch.zeros(3 + ranks.rank)
        text = told(lambda: dist.send(tensor, 1, group) if ranks.rank == 0 else dist.recv(tensor, 0, group))
        expected = "sending 12 bytes to rank 1" if ranks.rank == 0 else "receiving 16 bytes from rank 0"
        assert expected in text, text
    tensor = ONE.clone()
    dist.all_reduce(tensor, group=group)
    assert tensor.item() == ranks.size
    if ranks.rank == 0:
        dist.send(torch.tensor([4.0]), 1, group)
    elif ranks.rank == 1:
        dist.recv(tensor, 0, group)
        assert tensor.item() == 4


def check_all_to_all_of_sizes_that_differ_between_ranks(ranks: Ranks) -> None:
    """What one rank cannot see alone is told to all of them, and names who sends what to whom."""
    if ranks.size == 1:
        return
    n, group = ranks.size, ranks.fresh()
    gives = [1] * n if ranks.rank else [2] + [1] * (n - 1)
    sent = torch.zeros(sum(gives))
    text = told(lambda: dist.all_to_all_single(torch.zeros(n), sent, [1] * n, gives, group))
    assert "all_to_all" in text, text
    assert "rank 0 sends 8 bytes to rank 0" in text, text


def check_negative_tags(ranks: Ranks) -> None:
    group, me = ranks.fresh(timeout_s=15), ranks.rank
    calls: Calls = {
        "send": ("send", lambda: group.send([ONE], (me + 1) % ranks.size, -1)),
        "recv": ("recv", lambda: group.recv([ONE.clone()], (me + 1) % ranks.size, -2)),
        "recv from any": ("recv", lambda: group.recv_anysource([ONE.clone()], -1)),
    }
    assert_refused(ranks, group, calls)

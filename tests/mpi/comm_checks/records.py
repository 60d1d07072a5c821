"""Records of a process group's calls, of `pneumo` and of Gloo, made natively and made in Python."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from comm_checks.world import Ranks
from pneumo.comm import records
from pneumo.comm.records import GroupRecords
from pneumo.timing.record import Collective

LATE_S = 0.1
STAMPS = ("enqueued_ns", "started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns")


def recorded(group: Any, calls: Callable[[], Any], *, native: bool = True) -> list[Collective]:
    """The records of what `calls` issues on a group."""
    kept, found = records.native, GroupRecords(group, "these")
    if not native:
        records.native = lambda: None
    try:
        found.attach()
        calls()
        time.sleep(0.02)  # Gloo stamps an end after it has woken who waits for it
        return found.take()
    finally:
        found.detach()
        records.native = kept


def each_way(ranks: Ranks) -> list[tuple[str, Any, bool]]:
    """Both backends, recorded in both ways."""
    gloo = ranks.fresh(backend="gloo")
    return [
        (name, group, native) for name, group in (("pneumo", ranks.pneumo), ("gloo", gloo)) for native in (True, False)
    ]


def check_what_a_record_says(ranks: Ranks) -> None:
    n = ranks.size
    for name, group, native in each_way(ranks):

        def calls(group: Any = group) -> None:
            dist.all_reduce(torch.ones(1000), group=group)
            dist.all_reduce(torch.ones(10, dtype=torch.int64), group=group, async_op=True).wait()
            dist.all_gather_single(torch.empty(10 * n), torch.ones(10), group=group)
            dist.broadcast(torch.ones(3, dtype=torch.uint8), group=group, group_src=0)
            dist.barrier(group)

        found = recorded(group, calls, native=native)
        said = [(r.seq, r.op, r.dtype, r.bytes, r.group) for r in found[:4]]
        assert said == [
            (0, "allreduce", "float32", 4000, "these"),
            (1, "allreduce", "int64", 80, "these"),
            (2, "allgather", "float32", 40 * n, "these"),
            (3, "broadcast", "uint8", 3, "these"),
        ], (name, native, said)
        assert found[4].op == "barrier", (name, native)
        for record in found:
            stamps = [stamp for stamp in (getattr(record, name) for name in STAMPS[:3]) if stamp is not None]
            assert stamps == sorted(stamps), (name, native, record)
            assert record.finished_ns is not None, (name, native, record)
            assert None not in (record.wait_begin_ns, record.wait_end_ns), (name, native, record)
            assert record.enqueued_ns <= record.wait_begin_ns <= record.wait_end_ns, (name, native, record)
            told = name == "pneumo" and native
            assert (record.started_ns is not None) == told, (name, native, record)
            assert (record.bound is None) == told, (name, native, record)


def check_sequence_numbers_are_the_same_everywhere(ranks: Ranks) -> None:
    """Also where calls are refused on one rank, which then do not travel, and where recording is interrupted."""
    for name, group, native in each_way(ranks):
        kept, found = records.native, GroupRecords(group, "these")
        if not native:
            records.native = lambda: None
        numbers = []
        for _ in range(2):
            found.attach()
            dist.all_reduce(torch.ones(5), group=group)
            if ranks.rank == 0:
                for _ in range(2):
                    with suppress(Exception):  # each backend has its own
                        dist.all_reduce(torch.ones(3).to_sparse(), dist.ReduceOp.MAX, group)
            dist.all_reduce(torch.ones(5), group=group)
            numbers += [record.seq for record in found.take()]
            found.detach()
        records.native = kept
        assert ranks.share(numbers) == [[0, 1, 2, 3]] * ranks.size, (name, native, numbers)


def check_who_waits_is_timed(ranks: Ranks) -> None:
    """The last rank comes late: the others are blocked as long, in the call or in the wait, and it is not."""
    if ranks.size == 1:
        return
    for name, group, native in each_way(ranks):
        for asynchronous in (False, True):
            dist.barrier(group)

            def late(group: Any = group, asynchronous: bool = asynchronous) -> None:
                if ranks.rank == ranks.size - 1:
                    time.sleep(LATE_S)
                work = dist.all_reduce(torch.ones(100), group=group, async_op=asynchronous)
                if work is not None:
                    work.wait()

            (record,) = recorded(group, late, native=native)
            blocked_s = (record.wait_end_ns - record.wait_begin_ns) / 1e9
            everybody = ranks.share((record.enqueued_ns, blocked_s))
            latest = max(enqueued for enqueued, _ in everybody)
            assert latest == everybody[-1][0], (name, native)
            if ranks.rank < ranks.size - 1:
                waited_s = (latest - record.enqueued_ns) / 1e9
                assert blocked_s > 0.8 * waited_s > 0.4 * LATE_S, (name, native, asynchronous, blocked_s, waited_s)


def check_the_end_of_what_nobody_waits_for(ranks: Ranks) -> None:
    """By the Future alone, as DDP waits."""
    for name, group, native in each_way(ranks):

        def calls(group: Any = group) -> None:
            dist.all_reduce(torch.ones(1000), group=group, async_op=True).get_future().wait()

        (record,) = recorded(group, calls, native=native)
        assert record.finished_ns is not None, (name, native, record)
        assert record.wait_begin_ns is None, (name, native, record)


def check_messages_are_numbered_by_pair(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    for name, group, native in each_way(ranks):

        def calls(group: Any = group) -> None:
            for _ in range(2):
                if ranks.rank == 0:
                    dist.send(torch.ones(4), group_dst=1, group=group)
                elif ranks.rank == 1:
                    dist.recv(torch.ones(4), group_src=0, group=group)

        found = [(r.seq, r.op, r.bytes, r.group) for r in recorded(group, calls, native=native)]
        op = {0: "send", 1: "recv"}.get(ranks.rank)
        assert found == [(k, op, 16, "these, 0 to 1") for k in range(2) if op], (name, native, found)


def check_a_wait_is_untimed_when_nobody_records(ranks: Ranks) -> None:
    before = dist.Work.wait
    recorded(ranks.pneumo, lambda: None)
    assert dist.Work.wait is before
    first, second = GroupRecords(ranks.pneumo, "a"), GroupRecords(ranks.pneumo, "b")
    first.attach()
    second.attach()
    dist.all_reduce(torch.ones(2), group=ranks.pneumo)
    assert [len(one.take()) for one in (first, second)] == [1, 1]
    first.detach()
    assert dist.Work.wait is not before
    dist.all_reduce(torch.ones(2), group=ranks.pneumo)
    assert len(second.take()) == 1
    second.detach()
    assert dist.Work.wait is before


def check_functional_collectives_are_recorded(ranks: Ranks) -> None:
    import torch.distributed._functional_collectives as functional

    def calls() -> None:
        assert float(functional.all_reduce(torch.ones(4), "sum", ranks.pneumo)[0]) == ranks.size

    (record,) = recorded(ranks.pneumo, calls)
    assert (record.op, record.bytes) == ("allreduce", 16)
    assert record.finished_ns is not None


def check_records_keep_no_tensor_alive(ranks: Ranks) -> None:
    """What was sent and received is freed when its owner lets go of it, and not when the records are taken."""
    for name, group in (("pneumo", ranks.pneumo), ("gloo", ranks.fresh(backend="gloo"))):

        def calls(name: str = name, group: Any = group) -> None:
            mine, all_of_them = torch.ones(1000), torch.empty(1000 * ranks.size)
            dist.all_gather_single(all_of_them, mine, group=group)
            work = dist.all_reduce(mine, group=group, async_op=True)
            work.wait()
            held = [StorageWeakRef(tensor.untyped_storage()) for tensor in (mine, all_of_them)]
            del mine, all_of_them, work
            deadline = time.monotonic() + 5  # Gloo's thread lets go of them a moment later
            while not all(one.expired() for one in held):
                assert time.monotonic() < deadline, f"{name}: the records keep tensors alive"
                time.sleep(0.01)

        recorded(group, calls)

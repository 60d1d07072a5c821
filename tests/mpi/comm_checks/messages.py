"""Messages between pairs of ranks, and everything that carries Python objects."""

import time
from typing import Any

import torch
import torch.distributed as dist

from comm_checks.reference import DTYPES, assert_same, draw
from comm_checks.world import Ranks

# From 0 to several pieces of a channel (64 KiB: 16384 floats), which is where pieces begin and end.
COUNTS = (0, 1, 2, 63, 64, 65, 8191, 8192, 8193, 16383, 16384, 16385, 32768, 32769, 700_001)


def message(source: int, target: int, count: int, *key: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What one rank sends to another."""
    return draw((count,), dtype, "message", source, target, *key)


def check_blocking_ring(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    n, me = ranks.size, ranks.rank
    right, left = (me + 1) % n, (me - 1) % n
    for count in COUNTS:
        received = torch.zeros(count)
        if me % 2 == 0 and right != 0:
            dist.send(message(me, right, count), right, ranks.pneumo)
            assert dist.recv(received, left, ranks.pneumo) == left
        elif right == 0:  # in an odd ring the last sends first: somebody is always ready to receive
            assert dist.recv(received, left, ranks.pneumo) == left
            dist.send(message(me, right, count), right, ranks.pneumo)
        else:
            assert dist.recv(received, group=ranks.pneumo, group_src=left) == left
            dist.send(message(me, right, count), group=ranks.pneumo, group_dst=right)
        assert_same(received, message(left, me, count), count)


def check_every_pair_and_type_at_once(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    others = [other for other in range(n) if other != me]
    works: list[Any] = []
    received = {}
    for dtype in DTYPES:
        tag = DTYPES.index(dtype)
        for other in others:
            works.append(dist.isend(message(me, other, 100, dtype=dtype), other, ranks.pneumo, tag))
            received[other, dtype] = torch.zeros(100, dtype=dtype)
            works.append(dist.irecv(received[other, dtype], other, ranks.pneumo, tag))
    for work in works:
        assert work.wait()
    for (other, dtype), tensor in received.items():
        assert_same(tensor, message(other, me, 100, dtype=dtype), (other, dtype))


def check_tags_in_crossed_order(ranks: Ranks) -> None:
    """Receives are asked for from the last tag to the first; equal tags keep the order of sending."""
    if ranks.size == 1:
        return
    n, me = ranks.size, ranks.rank
    right, left = (me + 1) % n, (me - 1) % n
    for group in (ranks.pneumo, ranks.gloo):
        tags = [5, 3, 5, 9, 3, 5, 0, 2**30]
        works: list[Any] = [dist.isend(message(me, right, 20_000, k), right, group, tag) for k, tag in enumerate(tags)]
        received: dict[int, list[torch.Tensor]] = {tag: [] for tag in tags}
        for tag in (9, 2**30, 5, 0, 3, 5, 3, 5):
            tensor = torch.zeros(20_000)
            dist.recv(tensor, left, group, tag)
            received[tag].append(tensor)
        for work in works:
            work.wait()
        for tag, tensors in received.items():
            sent = [message(left, me, 20_000, k) for k, other in enumerate(tags) if other == tag]
            assert_same(tensors, sent, tag)


def many_messages(ranks: Ranks, group: Any, count: int, length: int) -> None:
    """Rank 0 posts many sends, of which rank 1 receives the last one first, each before it asks for the next."""
    if ranks.rank == 0 and ranks.size > 1:
        works: list[Any] = [dist.isend(message(0, 1, length, tag), 1, group, tag) for tag in range(count)]
        for work in works:
            work.wait()
    elif ranks.rank == 1:
        for tag in reversed(range(count)):
            received = torch.zeros(length)
            dist.recv(received, 0, group, tag)
            assert_same(received, message(0, 1, length, tag), tag)


def check_messages_received_in_the_reverse_order(ranks: Ranks) -> None:
    for group in (ranks.pneumo, ranks.gloo):
        many_messages(ranks, group, 30, 1000)


def check_more_messages_than_a_mailbox_holds_in_the_reverse_order(ranks: Ranks) -> None:
    for backend in ("gloo", "pneumo"):
        many_messages(ranks, ranks.fresh(backend=backend, timeout_s=4), 100, 10)


def check_a_backlog_of_empty_and_small_messages(ranks: Ranks) -> None:
    """More than a mailbox holds, also of messages without any data."""
    if ranks.size == 1:
        return
    n, me = ranks.size, ranks.rank
    right, left = (me + 1) % n, (me - 1) % n
    for turn in range(3):
        works: list[Any] = [dist.isend(message(me, right, k % 3, turn), right, ranks.pneumo) for k in range(150)]
        for k in range(150):
            received = torch.zeros(k % 3)
            dist.recv(received, left, ranks.pneumo)
            assert_same(received, message(left, me, k % 3, turn), k)
        for work in works:
            work.wait()


def check_receive_from_any_source(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for tag in (0, 7):
        works: list[Any] = []
        if me:
            works = [dist.isend(message(me, 0, 300, k, tag), 0, ranks.pneumo, tag) for k in range(3)]
        seen = [0] * n
        for _ in range(3 * (n - 1) * (me == 0)):
            received = torch.zeros(300)
            source = dist.recv(received, group=ranks.pneumo, tag=tag)
            assert_same(received, message(source, 0, 300, seen[source], tag), source)
            seen[source] += 1
        assert me or seen[1:] == [3] * (n - 1)
        for work in works:
            work.wait()


def check_any_source_leaves_other_tags_alone(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    if ranks.rank == 1:
        first: Any = dist.isend(torch.tensor([1.0]), 0, ranks.pneumo, 1)
        second: Any = dist.isend(torch.tensor([2.0]), 0, ranks.pneumo, 2)
        first.wait(), second.wait()
    elif ranks.rank == 0:
        received = torch.zeros(1)
        work: Any = dist.irecv(received, group=ranks.pneumo, tag=2)
        work.wait()
        assert received.item() == 2
        assert work._source_rank() == 1
        assert dist.recv(received, group=ranks.pneumo, tag=1) == 1
        assert received.item() == 1


def check_source_rank_is_global_in_a_subgroup(ranks: Ranks) -> None:
    if ranks.size < 3:
        return
    group = ranks.group([1, 2])
    if ranks.rank == 2:
        dist.send(torch.tensor([5.0]), 1, group)
    elif ranks.rank == 1:
        received = torch.zeros(1)
        assert dist.recv(received, group=group) == 2
        assert received.item() == 5


def check_send_to_oneself(ranks: Ranks) -> None:
    """Of isend's documentation: "isend allows src == dst rank, i.e. send to self"; Gloo does not."""
    for count in (0, 5, 50_000):
        received = torch.zeros(count)
        sent: Any = dist.isend(message(ranks.rank, ranks.rank, count), ranks.rank, ranks.pneumo)
        got: Any = dist.irecv(received, ranks.rank, ranks.pneumo)
        sent.wait(), got.wait()
        assert_same(received, message(ranks.rank, ranks.rank, count), count)


def check_batch_of_sends_and_receives(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    n, me = ranks.size, ranks.rank
    right, left = (me + 1) % n, (me - 1) % n
    for group in (ranks.pneumo, ranks.gloo):
        received = [torch.zeros(40_000), torch.zeros(3)]
        ops = [
            dist.P2POp(dist.irecv, received[0], left, group, 1),
            dist.P2POp(dist.irecv, received[1], left, group, 2),
            dist.P2POp(dist.isend, message(me, right, 3, "b"), right, group, 2),
            dist.P2POp(dist.isend, message(me, right, 40_000, "a"), right, group, 1),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        assert_same(received, [message(left, me, 40_000, "a"), message(left, me, 3, "b")])


def check_messages_of_all_layouts(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    n, me = ranks.size, ranks.rank
    right, left = (me + 1) % n, (me - 1) % n
    for dtype in (torch.float32, torch.complex64, torch.int8):
        sent = draw((6, 4), dtype, "layout", me).t()
        received = torch.zeros(6, 4, 2, dtype=dtype)[..., 0].t()
        expected = draw((6, 4), dtype, "layout", left).t()
        work: Any = dist.isend(sent, right, ranks.pneumo)
        dist.recv(received, left, ranks.pneumo)
        work.wait()
        assert_same(received, expected, dtype)
    scalar = torch.tensor(0.0)
    work = dist.isend(torch.tensor(me + 0.5), right, ranks.pneumo)
    dist.recv(scalar, left, ranks.pneumo)
    work.wait()
    assert scalar.item() == left + 0.5


def check_messages_beside_collectives(ranks: Ranks) -> None:
    """A collective may run to its end between the two halves of a message, and a message between those of another."""
    if ranks.size == 1:
        return
    n, me = ranks.size, ranks.rank
    right, left = (me + 1) % n, (me - 1) % n
    for turn in range(5):
        sent: Any = dist.isend(message(me, right, 50_000, turn), right, ranks.pneumo)
        total = torch.full((30_000,), float(me))
        reduction: Any = dist.all_reduce(total, group=ranks.pneumo, async_op=True)
        dist.barrier(ranks.pneumo)
        received = torch.zeros(50_000)
        dist.recv(received, left, ranks.pneumo)
        sent.wait()
        assert reduction.is_completed()
        assert_same(received, message(left, me, 50_000, turn), turn)
        assert_same(total, torch.full((30_000,), float(sum(range(n)))), turn)


def check_a_send_waits_for_its_receiver(ranks: Ranks) -> None:
    """An asynchronous send is not complete while nobody has asked for it, and its tensor may then not be changed."""
    if ranks.size == 1:
        return
    if ranks.rank == 0:
        work: Any = dist.isend(message(0, 1, 100_000), 1, ranks.pneumo)
        time.sleep(0.05)
        assert not work.is_completed()
    ranks.meet()
    if ranks.rank == 0:
        assert work.wait()
        assert work.is_completed()
    elif ranks.rank == 1:
        received = torch.zeros(100_000)
        dist.recv(received, 0, ranks.pneumo)
        assert_same(received, message(0, 1, 100_000))


OBJECTS: list[Any] = [None, 7, "text" * 1000, {"a": [1, 2.5, (3,)]}, b"", set("xyz"), range(5)]


def check_objects_in_collectives(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    objects = [(rank, OBJECTS[rank % 7], "x" * (rank * 7000)) for rank in range(n)]
    for group in (ranks.pneumo, ranks.gloo):
        gathered: list[Any] = [None] * n
        dist.all_gather_object(gathered, objects[me], group=group)
        assert gathered == objects
        for root in range(n):
            shared = list(OBJECTS) if me == root else [None] * 7
            dist.broadcast_object_list(shared, group=group, group_src=root)
            assert shared == OBJECTS
            at_root: list[Any] | None = [None] * n if me == root else None
            dist.gather_object(objects[me], at_root, group=group, group_dst=root)
            assert at_root == (objects if me == root else None)
            mine = [None]
            dist.scatter_object_list(mine, objects if me == root else None, group=group, group_src=root)
            assert mine == [objects[me]]


def check_objects_in_messages(ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    for group in (ranks.pneumo, ranks.gloo):
        if ranks.rank == 0:
            for target in ranks.everybody[1:]:
                dist.send_object_list([*OBJECTS, target], target, group)
        else:
            received = [None] * 8
            assert dist.recv_object_list(received, 0, group) == 0
            assert received == [*OBJECTS, ranks.rank]

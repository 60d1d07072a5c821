"""Groups of some of the ranks: overlapping ones, subgroups, meshes, splits, and several threads at once."""

import itertools
import threading
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from comm_checks.reference import assert_same, told
from comm_checks.world import Ranks, rng
from pneumo.comm.groups import Groups, SmallSum


def total(ranks: Ranks, group: Any) -> float:
    """The sum of the global ranks of a group, found by its own all_reduce."""
    tensor = torch.tensor([float(ranks.rank)])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def check_every_subset(ranks: Ranks) -> None:
    subsets = [c for k in range(1, ranks.size + 1) for c in itertools.combinations(ranks.everybody, k)]
    if ranks.size > 4:
        subsets = [subsets[i] for i in rng("subsets").choice(len(subsets), 12, replace=False)]
    for subset in subsets:
        group = ranks.group(subset)
        if ranks.rank not in subset:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
            continue
        assert total(ranks, group) == sum(subset), subset
        for root in subset:
            tensor = torch.tensor([ranks.rank])
            dist.broadcast(tensor, root, group)
            assert tensor.item() == root, subset
        gathered: list[Any] = [None] * len(subset)
        dist.all_gather_object(gathered, ranks.rank, group=group)
        assert tuple(gathered) == subset


def check_those_outside_a_group_return_at_once(ranks: Ranks) -> None:
    group = ranks.group([0])
    if ranks.rank:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensor = torch.tensor([3.0])
            assert dist.all_reduce(tensor, group=group, async_op=True) is None
            assert dist.recv(tensor, 0, group) == -1
            assert dist.barrier(group) is None
            assert tensor.item() == 3
            assert dist.get_rank(group) == -1


def check_overlapping_groups_in_another_order_on_every_rank(ranks: Ranks) -> None:
    """Groups are independent of each other: only the order within one has to be the same everywhere."""
    n, me = ranks.size, ranks.rank
    subsets = [tuple(sorted({k % n, (k + 1) % n, (k + 1 + k // n) % n})) for k in range(2 * n)]
    groups = [(subset, ranks.group(subset)) for subset in dict.fromkeys([*subsets, tuple(range(n))])]
    for turn in range(6):
        mine = [(subset, group) for subset, group in groups if me in subset]
        rng("order", turn, me).shuffle(mine)
        works = []
        for subset, group in mine:
            size = (1, 9_000, 70_000)[turn % 3]
            tensor = torch.full((size,), float(2**me))
            works.append((subset, tensor, dist.all_reduce(tensor, group=group, async_op=True)))
        rng("wait", turn, me).shuffle(works)
        for subset, tensor, work in works:
            assert work is not None
            work.wait()
            assert_same(tensor, torch.full_like(tensor, float(sum(2**k for k in subset))), (turn, subset))


def check_several_groups_of_the_same_ranks_do_not_mix(ranks: Ranks) -> None:
    groups = [ranks.fresh() for _ in range(4)]
    tensors = [torch.full((2,), float(k)) for k in range(4)]
    order = list(range(4))[:: 1 if ranks.rank % 2 else -1]
    works = {k: dist.all_reduce(tensors[k], group=groups[k], async_op=True) for k in order}
    for work in works.values():
        assert work is not None
        work.wait()
    assert_same(tensors, [torch.full((2,), float(k * ranks.size)) for k in range(4)])
    for group in groups:
        dist.destroy_process_group(group)
    assert total(ranks, ranks.pneumo) == sum(ranks.everybody)


def check_threads_with_a_group_each(ranks: Ranks) -> None:
    """Several threads wait at once, one of which drives for all; each has its own group."""
    groups = [ranks.fresh() for _ in range(4)]
    wrong: list[str] = []

    def work(k: int) -> None:
        for turn in range(60):
            tensor = torch.full((1 + turn * 300,), float(ranks.rank + k))
            dist.all_reduce(tensor, group=groups[k])
            expected = float(sum(rank + k for rank in ranks.everybody))
            if not bool((tensor == expected).all()):
                wrong.append(f"thread {k}, turn {turn}: {tensor[:4]} != {expected}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def check_subgroups_by_size_and_enumeration(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    for size in [size for size in range(1, n + 1) if n % size == 0]:
        mine, everything = dist.new_subgroups(size)
        assert len(everything) == n // size
        first = me // size * size
        assert total(ranks, mine) == sum(range(first, first + size))
    evens_and_odds = [part for part in (list(range(0, n, 2)), list(range(1, n, 2))) if part]
    own, _ = dist.new_subgroups_by_enumeration(evens_and_odds)
    assert total(ranks, own) == sum(range(me % 2, n, 2))


def check_group_made_by_its_members_only(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    members = [rank for rank in range(n) if rank // 2 == me // 2]
    group = dist.new_group(members, backend="pneumo", use_local_synchronization=True)
    assert total(ranks, group) == sum(members)


def check_mesh_of_one_dimension(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data",))
    assert dist.get_backend(mesh.get_group("data")) == "pneumo"
    assert total(ranks, mesh.get_group("data")) == sum(ranks.everybody)
    assert mesh.get_local_rank("data") == ranks.rank


def check_mesh_of_two_dimensions(ranks: Ranks) -> None:
    n, me = ranks.size, ranks.rank
    rows = next(k for k in (2, 3, 1) if n % k == 0)
    columns = n // rows
    mesh = init_device_mesh("cpu", (rows, columns), mesh_dim_names=("row", "column"))
    row, column = divmod(me, columns)
    assert total(ranks, mesh.get_group("row")) == sum(range(column, n, columns))
    assert total(ranks, mesh.get_group("column")) == sum(range(row * columns, (row + 1) * columns))
    works: list[Any] = []
    tensors = [torch.full((20_000,), float(me)) for _ in range(2)]
    for name, tensor in zip(("row", "column")[:: 1 if me % 2 else -1], tensors, strict=True):
        works.append(dist.broadcast(tensor, group=mesh.get_group(name), group_src=0, async_op=True))
    for work in works:
        work.wait()
    along_row, along_column = tensors if me % 2 else tensors[::-1]
    assert_same(along_row, torch.full((20_000,), float(column)))
    assert_same(along_column, torch.full((20_000,), float(row * columns)))


def check_submeshes(ranks: Ranks) -> None:
    if ranks.size > 3:
        return  # slicing a mesh loads 900 modules, which takes ten seconds where many ranks do it at once
    mesh = init_device_mesh("cpu", (1, ranks.size), mesh_dim_names=("row", "column"))
    assert total(ranks, mesh["row"].get_group()) == ranks.rank
    assert total(ranks, mesh["column"].get_group()) == sum(ranks.everybody)
    assert total(ranks, mesh._flatten("all").get_group()) == sum(ranks.everybody)


def check_split_of_a_group(ranks: Ranks) -> None:
    """dist.split_group refuses groups without a GPU; ProcessGroup.split_group, which it calls, does not."""
    n, me = ranks.size, ranks.rank
    parts = [part for part in (list(range(0, n, 2)), list(range(1, n, 2))) if part]
    part = next(part for part in parts if me in part)
    for name, order in (("forth", part), ("back", part[::-1])):
        child = ranks.pneumo.split_group(order, timeout=timedelta(seconds=30), group_name=f"{name}{me % 2}")
        assert (child.size(), child.rank()) == (len(part), order.index(me))
        tensor = torch.tensor([float(me)])
        child.allreduce([tensor]).wait()
        assert tensor.item() == sum(part)
        tensor = torch.tensor([float(me)])
        child.broadcast(tensor, 0).wait()
        assert tensor.item() == order[0]
    assert total(ranks, ranks.pneumo) == sum(ranks.everybody), "the parent is what it was"


def check_split_of_a_split_names_its_ranks_as_users_do(ranks: Ranks) -> None:
    """An error in a group of groups speaks of global ranks, here the last two."""
    if ranks.size < 3:
        return
    group = ranks.group(ranks.everybody[1:])
    if ranks.rank == 0:
        return
    child = group.split_group([0, 1], timeout=timedelta(seconds=30), group_name="named")
    if ranks.rank > 2:
        assert child is None
        return
    text = told(lambda: child.broadcast(torch.zeros(ranks.rank), 0).wait())
    assert "rank 1 calls" in text, text
    assert "rank 2 calls" in text, text


def check_merge_into_a_new_group(ranks: Ranks) -> None:
    store = dist.distributed_c10d.PrefixStore(f"merged {ranks.comm.bcast(id(ranks))}", ranks.store)
    merged = ranks.pneumo.merge_remote_group(store, ranks.size, timedelta(seconds=30))
    tensor = torch.tensor([1.0])
    merged.allreduce([tensor]).wait()
    assert tensor.item() == ranks.size


def check_a_group_may_be_left_as_soon_as_its_last_collective_is_done(ranks: Ranks) -> None:
    """A rank that has done its part and left is not one that left the others alone: also where they look just then.

    They look for who is gone when they have waited for a tenth of a second, or for the first time since then.
    """
    for turn in range(20):
        group = ranks.pneumo.split_group(ranks.everybody, timeout=timedelta(seconds=30), group_name=f"left {turn}")
        time.sleep(0.1 + rng("skew", turn, ranks.rank).random() * 0.0005)
        tensor, said = torch.ones(1), ""
        try:
            group.allreduce([tensor]).wait()
        except RuntimeError as error:
            said = str(error)
        del group
        problems = [text for text in ranks.share(said) if text]
        assert not problems, problems
        assert tensor.item() == ranks.size, turn


def check_small_sums_through_shared_memory_and_through_mpi(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        for shape in ((), (7,), (3, 40)):
            expected = sum(torch.full(shape, 1 + rank, dtype=dtype) for rank in ranks.everybody)
            for group in (ranks.pneumo, None):
                tensor = torch.full(shape, 1 + ranks.rank, dtype=dtype)
                assert SmallSum(ranks.comm, group)(tensor) is tensor
                assert_same(tensor, expected, (dtype, shape))


def check_groups_of_the_first_ranks(ranks: Ranks) -> None:
    """As the launcher makes them, in a world that has no default group yet, with and without groups for training."""
    ranks.close()
    for wanted in ([], [("gloo", ranks.size)]):
        groups = Groups(ranks.comm, address="127.0.0.1", wanted=wanted, small=[1, ranks.size])
        assert (groups.get("gloo", ranks.size) is not None) == bool(wanted)
        tensor = groups.small_sum(ranks.comm)(torch.ones(2))
        assert tensor.tolist() == [ranks.size] * 2
        groups.close()
    ranks.start()


def check_a_split_has_a_timeout_of_its_own(ranks: Ranks) -> None:
    parent = ranks.fresh(timeout_s=50)
    before = parent._get_backend(torch.device("cpu")).options._timeout
    child = parent.split_group(list(range(ranks.size)), timeout=timedelta(seconds=7))
    assert child._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
    assert parent._get_backend(torch.device("cpu")).options._timeout == before == timedelta(seconds=50)
    assert total(ranks, child) == sum(ranks.everybody)

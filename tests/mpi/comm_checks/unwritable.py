"""Outputs without memory of their own, in a world of its own: what they are refused for is a crash."""

import torch
import torch.distributed as dist

from comm_checks.mistakes import ONE, Calls, assert_refused, zeros
from comm_checks.world import Ranks


def check_outputs_without_memory_of_their_own(ranks: Ranks) -> None:
    """Tensors of the device `meta`, and sparse ones, have no place to write to."""
    n, me, group = ranks.size, ranks.rank, ranks.fresh(timeout_s=15)

    def with_tensor(kind: torch.Tensor) -> Calls:
        lists, kinds = [[kind]] * n, [kind] * n
        return {
            "all_gather": ("all_gather", lambda: dist.all_gather(kinds, ONE, group)),
            "gather": ("gather", lambda: dist.gather(ONE, kinds, me, group)),
            "scatter": ("scatter", lambda: dist.scatter(ONE.clone(), kinds, me, group)),
            "reduce_scatter": ("reduce_scatter", lambda: dist.reduce_scatter(ONE.clone(), kinds, group=group)),
            "all_to_all": ("c10d::alltoall_", lambda: dist.all_to_all(kinds, zeros(n), group)),
            "all_gather_coalesced": ("all_gather_coalesced", lambda: dist.all_gather_coalesced(lists, [ONE], group)),
        }

    assert_refused(ranks, group, with_tensor(torch.zeros(1).to_sparse()))
    on_meta = with_tensor(torch.zeros(1, device="meta"))
    # torch's dispatcher decides about all_to_all by its outputs: sparse ones it refuses, for `meta` it does nothing.
    del on_meta["all_to_all"]
    assert_refused(ranks, group, on_meta)

"""Process groups of torch.distributed inside an MPI world, made once for each (comm, number of ranks)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pneumo.comm import missing
from pneumo.comm.rendezvous import TIMEOUT, make_store
from pneumo.comm.small_sum import SmallSum


class Groups:
    """The process groups of the first k ranks of an MPI world; collective to make and to close.

    The ranks find each other through a TCP store of rank 0 at one address, the loopback's where the world is one node.
    `small`: the numbers of ranks that small sums are wanted for.
    """

    def __init__(
        self, comm: Any, *, address: str, wanted: Sequence[tuple[str, int]], small: Sequence[int] = ()
    ) -> None:
        self._groups: dict[tuple[str, int], Any] = {}
        self._small: dict[int, Any] = {}
        several = [ranks for ranks in small if ranks > 1 and missing() is None]
        if not wanted and not several:
            return
        logging.getLogger("torch.distributed").setLevel(
            logging.ERROR
        )  # what its warnings say would be said once a rank
        self._store = make_store(comm, address)
        first = wanted[0][0] if wanted else "pneumo"
        dist.init_process_group(first, store=self._store, rank=comm.rank, world_size=comm.size, timeout=TIMEOUT)
        for comm_name, ranks in wanted:
            self._groups[comm_name, ranks] = _first(comm_name, ranks)
        for ranks in several:
            self._small[ranks] = _first("pneumo", ranks)  # of its own: a sum must not wait behind buckets

    def get(self, comm_name: str, ranks: int) -> Any:
        """Return the process group of the first `ranks` ranks over a comm, None where c10d is not used."""
        return self._groups.get((comm_name, ranks))

    def small_sum(self, comm: Any) -> SmallSum:
        """Return what sums small tensors over the ranks of an MPI communicator, the first k of the world."""
        return SmallSum(comm, self._small.get(comm.size))

    def close(self) -> None:
        """Destroy all groups; collective."""
        if self._groups or self._small:
            dist.destroy_process_group()
            self._groups, self._small = {}, {}


def _first(comm_name: str, ranks: int) -> Any:
    return dist.new_group(list(range(ranks)), backend=comm_name, timeout=TIMEOUT)

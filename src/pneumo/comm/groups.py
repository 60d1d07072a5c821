"""Process groups of torch.distributed inside an MPI world, made once for each (comm, number of ranks)."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pneumo.comm.rendezvous import TIMEOUT, make_store


class Groups:
    """The process groups of the first k ranks of an MPI world; collective to make and to close.

    The ranks find each other through a TCP store of rank 0 at one address, the loopback's where the world is one node.
    """

    def __init__(self, comm: Any, *, address: str, wanted: Sequence[tuple[str, int]]) -> None:
        self._groups: dict[tuple[str, int], Any] = {}
        if not wanted:
            return
        self._store = make_store(comm, address)
        first = wanted[0][0]
        dist.init_process_group(first, store=self._store, rank=comm.rank, world_size=comm.size, timeout=TIMEOUT)
        for comm_name, ranks in wanted:
            self._groups[comm_name, ranks] = dist.new_group(list(range(ranks)), backend=comm_name, timeout=TIMEOUT)

    def get(self, comm_name: str, ranks: int) -> Any:
        """Return the process group of the first `ranks` ranks over a comm, None where c10d is not used."""
        return self._groups.get((comm_name, ranks))

    def close(self) -> None:
        """Destroy all groups; collective."""
        if self._groups:
            dist.destroy_process_group()
            self._groups = {}

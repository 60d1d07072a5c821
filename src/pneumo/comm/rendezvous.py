"""How the ranks of an MPI world find torch.distributed's store: the rendezvous `mpi://`."""

import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from pneumo import machine
from pneumo.world import launched

TIMEOUT = datetime.timedelta(minutes=5)


def make_store(comm: Any, address: str, timeout: datetime.timedelta = TIMEOUT) -> Any:
    """Make a TCP store that rank 0 of an MPI communicator serves at `address`; collective.

    Its socket is bound here to that one address: left to itself the store would listen on all of them.
    """
    listener = None
    if comm.rank == 0:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(1024)
    address, port = comm.bcast(listener.getsockname() if listener else None)
    return dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        comm.size,
        is_master=comm.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )


def _from_mpi(url: str, timeout: datetime.timedelta = TIMEOUT, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """The rendezvous of torch.distributed for `init_method="mpi://"`: yields store, rank and world size."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = comm.allreduce(node.size == comm.size, MPI.LAND)
    node.Free()
    address = "127.0.0.1" if one_node else machine.routable_address()
    yield make_store(comm, address, timeout), comm.rank, comm.size
    raise RuntimeError("mpi:// cannot meet again within one MPI world")


def register() -> None:
    """Make `mpi://` known to torch.distributed; again does nothing.

    It is also what `init_process_group("pneumo")` means without an init_method, where an MPI launcher has started this
    process and nobody has set the RANK that torch's own default asks for.
    """
    from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

    if "mpi" in _rendezvous_handlers:
        return
    register_rendezvous_handler("mpi", _from_mpi)  # type: ignore[no-untyped-call]
    from_env = _rendezvous_handlers["env"]

    def from_env_or_mpi(url: str, timeout: datetime.timedelta = TIMEOUT, **others: Any) -> Iterator[Any]:
        if "RANK" in os.environ or "rank=" in url or launched() is None:
            return from_env(url, timeout=timeout, **others)
        return _from_mpi(url, timeout)

    _rendezvous_handlers["env"] = from_env_or_mpi

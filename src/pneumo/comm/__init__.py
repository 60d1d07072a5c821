"""The communication layer: `import pneumo.comm` registers torch.distributed's backend `pneumo` for CPU tensors.

    import torch.distributed as dist
    import pneumo.comm
    dist.init_process_group("pneumo")

Ranks of a node exchange data through shared memory, nodes through MPI where it runs; src/native/README.md explains how.
Under mpirun or srun, `init_method="mpi://"` finds rank, size and store through MPI, for any backend.
"""

import atexit
import os
import sys
from importlib import import_module
from typing import Any

import torch.distributed as dist

from pneumo.comm import rendezvous
from pneumo.errors import PneumoError

__all__ = ["missing", "native", "register", "simd_level"]

_native: Any = None
_why = ""
try:
    _native = import_module("pneumo.comm._native")
except ImportError as error:
    _why = str(error)


def missing() -> str | None:
    """Why the backend `pneumo` cannot be used, None where it can."""
    return (
        f"the native layer is not built or does not load ({_why}); run ./launch/setup.sh" if _native is None else None
    )


def native() -> Any:
    """The compiled module; None where it is not built."""
    return _native


def register() -> None:
    """Make the backend known to torch.distributed; again does nothing. Raises PneumoError where it is not built."""
    if _native is None:
        raise PneumoError(f"The backend pneumo is not available: {missing()}.")
    if "pneumo" not in dist.Backend.backend_list:
        dist.Backend.register_backend("pneumo", _create, extended_api=True, devices=["cpu"])
        atexit.register(_native.shutdown)


def simd_level() -> str | None:
    """The instructions of the reductions on this machine: avx512, avx2, neon or scalar; None where it is not built."""
    return None if _native is None else str(_native.simd_level())


def _create(options: Any, backend_options: Any = None) -> Any:
    """Make the backend of one process group; collective. Called by torch.distributed."""
    _find_mpi()
    # DDP allocates its buckets through the backend only where it is told so, before its first bucket.
    os.environ.setdefault("DDP_DISABLE_COMM_MEM", "0")
    return _native.create(options, backend_options)


def _find_mpi() -> None:
    """Let ranks on other nodes be reached through MPI, where this process has initialised it with several ranks."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return
    # Within a node MPI is not needed; beyond, the group's start says why it cannot be used.
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        _native.without_mpi("MPI was initialised without MPI_THREAD_MULTIPLE")
        return
    try:
        wires = import_module("pneumo.comm._mpi")
    except ImportError as error:
        _native.without_mpi(f"the part of the native layer for MPI does not load ({' '.join(str(error).split())})")
        return
    _native.use_mpi(wires.wire(), mpi.COMM_WORLD.rank)


rendezvous.register()
if _native is not None:
    register()

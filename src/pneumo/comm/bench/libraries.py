"""The libraries that are compared: one class each, which turns an operation on a slot into a call to be timed."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from pneumo import process
from pneumo.comm.bench.buffers import Slot, raw
from pneumo.comm.bench.cases import Op

Call = Callable[[], object]


class Absent(Exception):  # noqa: N818 -- says what a library is
    """A library that cannot take part; the text is the reason."""


class Library(ABC):
    """One way to do collectives. Between `resume` and `pause` it is the only one that is at work."""

    checked = True  # whether its outputs are those of the operation

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def call(self, op: Op, dtype: str, slot: Slot) -> Call:
        """Return what does the operation once and blocks; if it returns a tensor, that is the output.

        Raises Absent where the library has no such operation or type.
        """

    def resume(self) -> None:  # noqa: B027 -- nothing to do is the usual case, here and below
        """Get ready; collective."""

    def pause(self) -> None:  # noqa: B027
        """Leave the cores to the others; collective."""


class C10d(Library):
    """A backend of torch.distributed, called as DDP's and FSDP's users would."""

    def __init__(self, name: str, group: Any) -> None:
        super().__init__(name)
        self._group = group

    def call(self, op: Op, dtype: str, slot: Slot) -> Call:
        """Return the call of torch.distributed."""
        given, got, group = slot.input, slot.output, self._group
        calls: dict[str, Call] = {
            "allreduce": partial(dist.all_reduce, given, group=group),
            "reduce_scatter": partial(dist.reduce_scatter_single, got, given, group=group),
            "allgather": partial(dist.all_gather_single, got, given, group=group),
            "broadcast": partial(dist.broadcast, given, src=slot.root, group=group),
            "reduce": partial(dist.reduce, given, dst=slot.root, group=group),
            "alltoall": partial(dist.all_to_all_single, got, given, group=group),
            "barrier": partial(dist.barrier, group=group),
        }
        return calls[op.name]


class Mpi(Library):
    """MPI through mpi4py, in place where c10d's operation is."""

    def __init__(self, name: str, comm: Any) -> None:
        super().__init__(name)
        from mpi4py import MPI

        self._mpi, self._comm = MPI, comm
        self._types = {
            **{"float32": MPI.FLOAT, "float64": MPI.DOUBLE, "complex64": MPI.C_FLOAT_COMPLEX},
            **{"complex128": MPI.C_DOUBLE_COMPLEX, "int8": MPI.INT8_T, "uint8": MPI.UINT8_T},
            **{"int16": MPI.INT16_T, "int32": MPI.INT32_T, "int64": MPI.INT64_T},
        }

    def call(self, op: Op, dtype: str, slot: Slot) -> Call:
        """Return mpi4py's call on the raw bytes; where nothing is summed, the type is that of bytes."""
        mpi, comm = self._mpi, self._comm
        if op.reduces and dtype not in self._types:
            raise Absent(f"MPI has no type for {dtype}")
        kind = self._types[dtype] if op.reduces else mpi.BYTE
        given, got = (raw(slot.input), kind), (raw(slot.output), kind)
        at_root = comm.rank == slot.root
        calls: dict[str, Call] = {
            "allreduce": partial(comm.Allreduce, mpi.IN_PLACE, given, mpi.SUM),
            "reduce_scatter": partial(comm.Reduce_scatter_block, given, got, mpi.SUM),
            "allgather": partial(comm.Allgather, given, got),
            "broadcast": partial(comm.Bcast, given, slot.root),
            "reduce": partial(
                comm.Reduce, mpi.IN_PLACE if at_root else given, given if at_root else None, mpi.SUM, slot.root
            ),
            "alltoall": partial(comm.Alltoall, given, got),
            "barrier": comm.Barrier,
        }
        return calls[op.name]


class MpiPlain(Mpi):
    """The same MPI, with malloc as glibc has it: blocks above 32 MiB are mapped anew, page by page, in each call."""

    def resume(self) -> None:
        """Let malloc return memory."""
        process.return_memory()

    def pause(self) -> None:
        """Let malloc keep it again, as for all others."""
        process.keep_memory()


class Horovod(Library):
    """Horovod over MPI, stopped while others are measured: its thread wakes up in every cycle."""

    def __init__(self, name: str, comm: Any) -> None:
        super().__init__(name)
        try:
            import horovod.torch as hvd
        except Exception as error:
            raise Absent(f"cannot be loaded ({' '.join(str(error).split())})") from None
        self._hvd, self._comm = hvd, comm

    def resume(self) -> None:
        """Start Horovod's thread."""
        self._hvd.init(comm=self._comm)

    def pause(self) -> None:
        """Stop it."""
        self._hvd.shutdown()

    def call(self, op: Op, dtype: str, slot: Slot) -> Call:
        """Return Horovod's call; the name stays the same, so that it need not be negotiated anew each time."""
        hvd, given = self._hvd, slot.input
        name = f"bench.{op.name}.{dtype}.{given.numel()}.{slot.root if op.rooted else ''}"
        calls: dict[str, Call] = {
            "allreduce": partial(hvd.allreduce_, given, name=name, op=hvd.Sum),
            "reduce_scatter": partial(hvd.reducescatter, given, name=name, op=hvd.Sum),
            "allgather": partial(hvd.allgather, given, name=name),
            "broadcast": partial(hvd.broadcast_, given, slot.root, name=name),
            "alltoall": partial(hvd.alltoall, given, name=name),
            "barrier": hvd.barrier,
        }
        if op.name not in calls:
            raise Absent(f"Horovod has no {op.name}")
        return calls[op.name]


class Memcpy(Library):
    """The limit: every rank copies n bytes from one buffer to another, all at once, with the C library's memmove."""

    checked = False

    def call(self, op: Op, dtype: str, slot: Slot) -> Call:
        """Return the copy."""
        if op.name == "barrier":
            raise Absent("a barrier moves no bytes")
        size = slot.whole.numel() * slot.whole.element_size()
        return partial(ctypes.memmove, slot.other.data_ptr(), slot.whole.data_ptr(), size)

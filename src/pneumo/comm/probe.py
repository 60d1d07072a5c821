"""What another library's own thread does in MPI: the PMPI probe, made for Horovod."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST = 4096  # records taken at a time
_FIELDS = ("begin_ns", "end_ns", "bytes", "kind")
KINDS = ("allreduce", "allgather", "alltoall", "reduce_scatter")


class Probe:
    """The probe in this process; see src/native/probe/probe.cpp for what it records.

    `load` has to come before the library that is to be probed is loaded, and after MPI.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.pneumo_probe_take.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.pneumo_probe_take.restype = library.pneumo_probe_dropped.restype = ctypes.c_int64

    def take(self) -> NDArray[np.int64]:
        """Return the calls since the last time, oldest first: (n, 4), with begin and end in ns, bytes, kind."""
        parts = []
        while True:
            rows: NDArray[np.int64] = np.empty((_MOST, len(_FIELDS)), np.int64)
            count = self._library.pneumo_probe_take(rows.ctypes.data, _MOST)
            parts.append(rows[:count])
            if count < _MOST:
                return np.concatenate(parts)

    @property
    def dropped(self) -> int:
        """The calls that nobody took in time, since the start."""
        return int(self._library.pneumo_probe_dropped())


@cache
def load() -> Probe | None:
    """Load the probe into the process's global scope; None where it is not built or does not load."""
    path = Path(__file__).parent / "libpneumo_probe.so"
    try:
        return Probe(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    except OSError:
        return None


def kind(row: Any) -> str:
    """The name of a record's operation."""
    return KINDS[int(row[3])]

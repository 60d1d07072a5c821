"""What a process of ours settles before the large libraries start: memory, threads, cores, and no network."""

import contextlib
import ctypes
import os
from pathlib import Path

YIELD = "OMPI_MCA_mpi_yield_when_idle"  # 1: Open MPI offers its core to others between two looks for a message
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Tell glibc's malloc to keep freed memory instead of returning it; False where that cannot be told.

    A training step frees and takes the same large tensors again and again; returning them to the kernel costs a page
    fault for each 4 KiB, which was half of the CNN's step on CPU.
    """
    return _set_malloc(mmap_bytes=1 << 30, trim_bytes=(1 << 31) - 1, pad_bytes=1 << 26)


def return_memory() -> bool:
    """Make malloc behave as glibc's does by itself in a process that has used large blocks; False where it cannot be.

    glibc's threshold, from which blocks are mapped and unmapped one by one, rises with the blocks that are freed up to
    32 MiB, and the one for trimming is twice that. `mallopt` ends this adaptation for good, so its end point is set.
    What malloc has kept until now goes back too, or large blocks would still be taken from there.
    """
    if not _set_malloc(mmap_bytes=32 << 20, trim_bytes=64 << 20, pad_bytes=128 << 10):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set_malloc(*, mmap_bytes: int, trim_bytes: int, pad_bytes: int) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, mmap_bytes), (_M_TRIM_THRESHOLD, trim_bytes), (_M_TOP_PAD, pad_bytes))
    return bool(sum(mallopt(name, value) for name, value in settings) == len(settings))


def share_cores() -> None:
    """Let Open MPI give up its core while it waits, unless the user has said otherwise; call before MPI starts.

    A rank gets as many cores as it has computing threads, and Horovod's own thread waits in MPI beside them: it would
    spin on a core that the training needs. On two ranks of one core each that made Horovod's step half as long again.
    """
    os.environ.setdefault(YIELD, "1")


def stay_offline() -> None:
    """Set what keeps libraries from looking for updates or reporting at import; call before importing them."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["DO_NOT_TRACK"] = "1"


def limit_threads(threads: int) -> None:
    """Set the number of threads of the numerical libraries that are imported afterwards."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def bind(cores: set[int]) -> None:
    """Bind every thread of this process to the cores; threads that start later inherit it."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def gpu_count() -> int:
    """The number of CUDA devices that the driver shows to this process; 0 without a driver. Does not import torch."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


class PeakMemory:
    """The growth of this process's resident memory since `begin`, in bytes, at its highest.

    Source: VmHWM of /proc/self/status, which writing 5 to /proc/self/clear_refs sets to the present size (proc(5)).
    """

    def begin(self) -> None:
        """Forget earlier peaks."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._begin = self._read("VmRSS")

    def end(self) -> int:
        """Return the bytes by which the peak since `begin` lies above the size at `begin`."""
        return max(0, self._read("VmHWM") - self._begin)

    @staticmethod
    def _read(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return 0

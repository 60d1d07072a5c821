"""Memory: how much there is, how large the cache is, and the two ways in which glibc's malloc can be set."""

import ctypes
import resource
from pathlib import Path

from pneumo import machine, process

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_PLAIN = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20), (_M_TOP_PAD, 128 << 10))
_CACHE_BYTES = 32 << 20  # where the system does not tell
_LARGEST_CACHE = 256 << 20


def keep_freed() -> bool:
    """Make malloc keep what is freed, as in all our jobs; False where this C library cannot be told."""
    return process.keep_memory()


def return_freed() -> bool:
    """Make malloc behave as glibc's does by itself in a process that has used large blocks; False where it cannot be.

    glibc's threshold, from which blocks are mapped and unmapped one by one, rises with the blocks that are freed up to
    32 MiB, and the one for trimming is twice that. `mallopt` ends this adaptation for good, so its end point is set.
    What malloc has kept until now goes back too, or large blocks would still be taken from there.
    """
    try:
        libc = ctypes.CDLL(None)
        done = [libc.mallopt(name, value) for name, value in _PLAIN]
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return all(done)


def faults() -> int:
    """The page faults of this process until now that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def cache_bytes(cpu: str | Path = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """The size of the first CPU's last-level cache; at most 256 MiB, and 32 MiB where it is not told."""
    levels = []
    for index in Path(cpu).glob("index*"):
        level, size = machine.read(index / "level"), machine.read(index / "size")
        if level and size and size.endswith("K"):
            levels.append((int(level), int(size[:-1]) << 10))
    return min(max(levels)[1], _LARGEST_CACHE) if levels else _CACHE_BYTES


def available_bytes() -> float:
    """The memory that can still be taken: what the kernel says, and no more than the control groups leave."""
    text = machine.read("/proc/meminfo") or ""
    found = next((line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")), None)
    free = float(found) * 1024 if found else float(machine.memory_bytes())
    for controller, folders in machine.group_folders().items():
        if controller in ("", "memory"):
            free = min([free, *(_left(folder) for folder in folders)])
    return free


def _left(group: Path) -> float:
    """What a control group's limit leaves, files that can be dropped from memory not counted as used."""
    limit = machine.memory_limit(group)
    used = machine.read(group / "memory.current") or machine.read(group / "memory.usage_in_bytes")
    if limit is None or used is None:
        return float("inf")
    files = [line.split()[1] for line in (machine.read(group / "memory.stat") or "").splitlines() if _droppable(line)]
    return limit - int(used) + max(map(int, files), default=0)  # version 1 tells it twice: own, and with children


def _droppable(line: str) -> bool:
    return line.startswith(("inactive_file ", "total_inactive_file "))

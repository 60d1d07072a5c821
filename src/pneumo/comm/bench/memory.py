"""Memory: how much there is, how large the cache is, and what page faults it has cost."""

import resource
from pathlib import Path

from pneumo import machine
from pneumo.comm.bench.cases import MAX_BUFFERS, MIN_BUFFERS, SMALL_BYTES

_CACHE_BYTES = 32 << 20  # where the system does not tell
_LARGEST_CACHE = 256 << 20


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


def shared_bytes(largest: int, ranks_here: int) -> int:
    """The shared memory that the buffers of all cases up to this size can take on a node, with room to spare."""
    most = max(largest, 1) * max(4, MIN_BUFFERS) + MAX_BUFFERS * SMALL_BYTES + 3 * _LARGEST_CACHE
    return ranks_here * most + (64 << 20)


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

"""What this machine gives to this process: cores, CPU model, SIMD, memory, and the limits of its control groups."""

from __future__ import annotations

import fcntl
import ipaddress
import itertools
import math
import os
import platform
import re
import socket
import struct
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pneumo.errors import Refused

SIMD = (
    ("sse2", "SSE2"),
    ("avx", "AVX"),
    ("avx2", "AVX2"),
    ("fma", "FMA"),
    ("f16c", "F16C"),
    ("avx512f", "AVX-512F"),
    ("avx512_bf16", "AVX-512 BF16"),
    ("amx_bf16", "AMX BF16"),
    ("asimd", "NEON"),
    ("sve", "SVE"),
)
_SIOCGIFADDR = 0x8915  # Linux, netdevice(7)
UNLIMITED_BYTES = 1 << 60  # version 1 of the control groups writes a huge number for "no limit"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the control groups that hold this process; None means that there is no limit."""

    version: int | None
    cpus: float | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as this process sees it; `affinity` are the logical CPUs that it may run on."""

    host: str
    cpu: str
    simd: tuple[str, ...]
    logical_cpus: int
    physical_cores: int
    affinity: tuple[int, ...]
    usable_cores: int
    memory_bytes: int
    limits: Limits


def read(path: str | Path) -> str | None:
    """The text of a file of /proc or /sys without the white space around it, or None where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def affinity() -> tuple[int, ...]:
    """The logical CPUs that this process may run on now; read it before torch is imported, which may shrink it."""
    return tuple(sorted(os.sched_getaffinity(0)))


def group_folders(proc: str | Path = "/proc/self/cgroup", root: str | Path = "/sys/fs/cgroup") -> dict[str, list[Path]]:
    """The folders of this process's control groups by controller ("" for version 2), innermost first, up to the root.

    In a container the path in /proc may be the host's and not be visible: then only the root remains.
    """
    folders: dict[str, list[Path]] = {}
    for line in (read(proc) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            names = (controllers, controller) if controller else ("", "unified")
            base = next((Path(root, name) for name in names if Path(root, name).is_dir()), None)
            if base is None:
                continue
            inner = base / path.lstrip("/")
            above = [inner, *inner.parents]
            folders[controller] = [folder for folder in above if folder.is_relative_to(base) and folder.is_dir()]
    return folders


def smallest(values: list[float | None]) -> float | None:
    """The smallest of the limits that exist, or None."""
    return min((value for value in values if value is not None), default=None)


def quota_cores(folder: Path) -> float | None:
    """The CPU quota of one control group in cores, or None: `cpu.max` (version 2) or `cpu.cfs_*_us` (version 1)."""
    quota, period = (read(folder / "cpu.max") or "max 100000").split()
    if quota == "max":
        quota, period = read(folder / "cpu.cfs_quota_us") or "-1", read(folder / "cpu.cfs_period_us") or "100000"
    cores = float(quota) / float(period)
    return cores if cores > 0 else None


def memory_limit(folder: Path) -> float | None:
    """The memory limit of one control group in bytes, or None."""
    text = read(folder / "memory.max") or read(folder / "memory.limit_in_bytes") or "max"
    return None if text == "max" or int(text) >= UNLIMITED_BYTES else int(text)


def limits(proc: str | Path = "/proc/self/cgroup", root: str | Path = "/sys/fs/cgroup") -> Limits:
    """The tightest limits of this process's control groups, of either version; a parent's holds for its children."""
    folders = group_folders(proc, root)
    second = folders.get("", [])
    cpus = smallest([quota_cores(folder) for folder in folders.get("cpu", []) + second])
    memory = smallest([memory_limit(folder) for folder in folders.get("memory", []) + second])
    version = 1 if "cpu" in folders or "memory" in folders else 2 if second else None
    return Limits(version, cpus, None if memory is None else int(memory))


def by_core(mask: Collection[int], root: str | Path = "/sys/devices/system/cpu") -> tuple[int, ...]:
    """The logical CPUs of a mask, one of each physical core before the second ones, where the kernel tells which."""
    order = []
    for cpu in sorted(mask):
        text = read(Path(root, f"cpu{cpu}", "topology", "thread_siblings_list")) or ""
        siblings: set[int] = set()
        for low, high in re.findall(r"(\d+)(?:-(\d+))?", text):
            siblings.update(range(int(low), int(high or low) + 1))
        order.append((len([other for other in siblings & set(mask) if other < cpu]), cpu))
    return tuple(cpu for _, cpu in sorted(order))


def usable(mask: Collection[int] | None = None) -> tuple[int, ...]:
    """The logical CPUs that this process can keep busy: those of its affinity mask in the order of `by_core`, and no
    more than its CPU quota allows; at least 1.
    """
    order, quota = by_core(affinity() if mask is None else mask), limits().cpus
    return order if quota is None else order[: max(1, math.ceil(quota))]


def usable_cores(mask: Collection[int] | None = None) -> int:
    """How many cores this process can keep busy: the number of `usable` ones."""
    return len(usable(mask))


def cpu() -> tuple[str, tuple[str, ...]]:
    """(model, SIMD extensions by their usual names) of the first CPU."""
    text = read("/proc/cpuinfo") or ""
    fields: dict[str, str] = dict(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*)$", text, re.M))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or fields.get("Processor") or platform.machine()
    return model.strip(), tuple(name for flag, name in SIMD if flag in flags)


def physical_cores() -> int:
    """The number of physical cores of the machine: hardware threads of one core count once."""
    siblings = {
        read(folder / "topology/thread_siblings_list") for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*")
    } - {None}
    return len(siblings) or os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine() -> Machine:
    """Everything of this module at once; no torch, no MPI, a few milliseconds."""
    model, simd = cpu()
    mask = affinity()
    return Machine(
        host=platform.node(),
        cpu=model,
        simd=simd,
        logical_cpus=os.cpu_count() or 1,
        physical_cores=physical_cores(),
        affinity=mask,
        usable_cores=usable_cores(mask),
        memory_bytes=memory_bytes(),
        limits=limits(),
    )


def listening(proc: str | Path = "/proc/self") -> tuple[str, ...]:
    """The addresses, as "address:port", on which this process accepts TCP connections now.

    Source: the sockets in state LISTEN (0A) of net/tcp and net/tcp6 (proc(5)) that are among its open descriptors.
    """
    own = set()
    for link in Path(proc, "fd").iterdir():
        try:
            own.add(os.readlink(link))
        except OSError:  # the descriptor that lists the folder is closed by now
            continue
    found = []
    for name in ("tcp", "tcp6"):
        for line in (read(Path(proc, "net", name)) or "").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(endpoint(fields[1]))
    return tuple(sorted(found))


def endpoint(text: str) -> str:
    """An address and port as people write them, from the kernel's hexadecimal 32-bit words in host byte order."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8]) for i in range(0, len(address), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    host = ipaddress.ip_address(packed)
    return f"[{host}]:{int(port, 16)}" if host.version == 6 else f"{host}:{int(port, 16)}"


def is_loopback(where: str) -> bool:
    """Whether an "address:port" of `listening` can be reached from this host only."""
    host = ipaddress.ip_address(where.rsplit(":", 1)[0].strip("[]"))
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return (mapped or host).is_loopback


def clock(readings: int = 2000) -> tuple[int, float]:
    """(smallest step that was seen, cost of one reading) of the monotonic clock, in ns."""
    stamps = [time.monotonic_ns() for _ in range(readings)]
    steps = [later - earlier for earlier, later in itertools.pairwise(stamps) if later > earlier]
    return min(steps, default=0), (stamps[-1] - stamps[0]) / (readings - 1)


def free_bytes(path: str | Path) -> int:
    """The bytes that this user may still write where `path` is or would be made; 0 where nothing can be found out."""
    place = Path(path).absolute()
    try:
        while not place.exists():
            place = place.parent
        stat = os.statvfs(place)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


def routable_address() -> str:
    """Return an IPv4 address of this host that other hosts can reach.

    That is the one its name stands for, unless that is a loopback address, as on a stock Debian; then that of the first
    interface that has one, or of the one that GLOO_SOCKET_IFNAME names. Raises Refused where there is none.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named is None:
        with suppress(OSError):
            found = socket.gethostbyname(socket.gethostname())
            if not found.startswith("127."):
                return found
    for _, interface in socket.if_nameindex():
        if named is not None and interface != named:
            continue
        request = struct.pack("256s", interface.encode()[:15])
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            address = socket.inet_ntoa(answer[20:24])
            if named is not None or not address.startswith("127."):
                return address
    raise Refused(
        f"{socket.gethostname()} has no address that other hosts can reach"
        + (f" on {named}, which GLOO_SOCKET_IFNAME names." if named else "; GLOO_SOCKET_IFNAME names an interface.")
    )

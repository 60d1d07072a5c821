"""The checks of python -m pneumo.doctor, each a line of its list."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pneumo import machine, places, process
from pneumo.installed import horovod_facts, native_facts, unusable_horovod, version
from pneumo.study.common_clock import agreement, bound_ns, duration
from pneumo.study.schema import Clock
from pneumo.world import launched

# What the main job imports, by the name of the distribution.
NEEDED = {
    "numpy": "numpy",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "scipy": "scipy",
    "dask": "dask",
    "distributed": "distributed",
    "dask-mpi": "dask_mpi",
    "cryptography": "cryptography",
    "pydicom": "pydicom",
    "pillow": "PIL",
    "opencv-python-headless": "cv2",
    "albumentations": "albumentations",
    "safetensors": "safetensors",
    "torchvision": "torchvision",
    "ultralytics-opencv-headless": "ultralytics",
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LITTLE_SHM, LITTLE_DISK = 1 << 28, 2 << 30
COARSE_NS = 1e6  # an error of clocks from which peer waits of a usual step are uncertain by more than a hundredth


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the list: state is ok, info, warn or bad; advice is a sentence for warn and bad."""

    name: str
    state: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Rank:
    """What every rank tells rank 0 about itself; `affinity` was read before any library could shrink it."""

    rank: int
    host: str
    affinity: tuple[int, ...]
    listening: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mpi:
    """The MPI library as it is loaded here, and the launcher that goes, or should go, with it."""

    library: str
    path: str
    launcher: str
    launcher_path: str
    multiple: bool
    asked: int
    seen: int


def probe_mpi(world: Any, mpi: Any) -> Mpi:
    """Ask the loaded library, and the launcher: the one that started this process, else the one on PATH."""
    started = launched()
    maps = (machine.read("/proc/self/maps") or "").splitlines()
    path = next((line.split(maxsplit=5)[5] for line in maps if re.search(r"/libmpi(ch)?\.so", line)), "")
    launcher = shutil.which("mpirun") or shutil.which("mpiexec") or ""
    return Mpi(
        library=mpi.Get_library_version().strip("\0 \n").split("\n")[0].split(", package")[0],
        path=path,
        launcher=launcher_version(launcher),
        launcher_path=launcher,
        multiple=mpi.Query_thread() >= mpi.THREAD_MULTIPLE,
        asked=started[1] if started else 1,
        seen=world.size,
    )


def launcher_version(launcher: str) -> str:
    """What an mpirun says of its version, or "" """
    if not launcher:
        return ""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
    try:
        done = subprocess.run([launcher, "--version"], env=env, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if lines and lines[0].startswith("HYDRA"):
        return "MPICH " + next((line.split()[-1] for line in lines if line.startswith("Version")), "")
    return lines[0] if lines else ""


def family(text: str) -> tuple[str, str]:
    """(name, major version) of an MPI from what it says of itself, for libraries and launchers alike."""
    names = (("Open MPI", "Open MPI"), ("MPICH", "MPICH"), ("Intel", "Intel MPI"), ("MVAPICH", "MVAPICH"))
    name = next((name for word, name in names if word.lower() in text.lower()), text)
    number = re.search(r"(\d+)\.\d+", text)
    return name, number.group(1) if number else ""


def check_mpi(mpi: Mpi) -> list[Check]:
    """The library, its thread level, the launcher, and the ranks seen against those asked for."""
    checks = [Check("MPI library", "ok", f"{mpi.library}{f' ({mpi.path})' if mpi.path else ''}")]
    multiple = "MPI_THREAD_MULTIPLE" if mpi.multiple else "below MPI_THREAD_MULTIPLE"
    advice = "" if mpi.multiple else "Use an MPI library built with MPI_THREAD_MULTIPLE, which Horovod's thread needs."
    checks.append(Check("thread level", "ok" if mpi.multiple else "bad", multiple, advice))
    if not mpi.launcher:
        advice = "Activate the environment (source .venv/bin/activate), so that mpirun is found."
        checks.append(Check("mpirun", "warn", "not on PATH", advice))
    else:
        fits = family(mpi.library) == family(mpi.launcher)
        text = f"{mpi.launcher} ({mpi.launcher_path})"
        advice = f"Start jobs with the mpirun of {mpi.library}: the one on PATH belongs to another MPI."
        checks.append(Check("mpirun", "ok" if fits else "bad", text, "" if fits else advice))
    checks.append(check_ranks(mpi))
    return checks


def check_ranks(mpi: Mpi) -> Check:
    """Whether the launcher's ranks have become one world."""
    if mpi.seen == mpi.asked:
        text = f"{mpi.seen} seen, {mpi.asked} asked for" if launched() else "1 (started without mpirun)"
        return Check("ranks", "ok", text)
    started = launched()
    name = started[0] if started else "the launcher"
    return Check(
        "ranks",
        "bad",
        f"each rank sees a world of {mpi.seen}, {mpi.asked} asked for",
        f"{name} started {mpi.asked} ranks, but the library in use, {mpi.library}, does not know that launcher: "
        "every rank is alone; start with that library's own mpirun.",
    )


def check_torch() -> list[Check]:
    """torch, its threads, GPUs and NCCL; importing it takes seconds."""
    try:
        import torch
    except ImportError as error:
        advice = "Run ./launch/setup.sh: the main job trains with torch."
        return [Check("torch", "bad", f"cannot be imported: {error}", advice)]
    capability = torch.backends.cpu.get_cpu_capability()
    set_by = {name: os.environ[name] for name in THREADS if name in os.environ}
    threads = f"{torch.get_num_threads()} by default; " + (
        ", ".join(f"{name}={value}" for name, value in set_by.items()) or "no variable sets them"
    )
    count = process.gpu_count()
    checks = [
        Check("torch", "ok", f"{torch.__version__}, kernels for {capability}"),
        Check("threads of torch", "info", threads),
    ]
    if count == 0:
        return [*checks, Check("GPUs", "info", "none: training runs on the CPU, with Gloo and MPI")]
    if not torch.cuda.is_available():
        advice = "The driver shows GPUs that torch cannot use: install the driver that its CUDA version asks for."
        return [*checks, Check("GPUs", "warn", f"{count} seen by the driver, none by torch", advice)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return [*checks, Check("GPUs", "ok", f"{count}, {torch.cuda.get_device_name(0)}; NCCL {nccl}")]


def check_horovod(found: dict[str, Any] | None) -> Check:
    """Horovod, and whether it was built for the torch that is here."""
    text = "not installed"
    if found is not None:
        text = f"{found['version']} for torch {found['torch']}, built in: {', '.join(found['built_in']) or 'nothing'}"
    if why := unusable_horovod(found, version("torch")):
        advice = f"{why[0].upper()}{why[1:]}; until then the main job leaves Horovod's rows out."
        return Check("Horovod", "warn", text, advice)
    return Check("Horovod", "ok", text)


def check_packages() -> Check:
    """Whether what the main job imports is installed."""
    missing = [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return Check("packages", "bad", f"missing: {', '.join(missing)}", "Run ./launch/setup.sh to install them.")
    return Check("packages", "ok", f"all {len(NEEDED)} that the main job imports")


def check_machine(here: machine.Machine, ranks: Sequence[Rank]) -> list[Check]:
    """Cores, binding, limits and threads a rank, for the ranks that are here, or for eight."""
    on_host = [rank for rank in ranks if rank.host == here.host]
    cores = sorted(set().union(*(rank.affinity for rank in on_host)))
    quota = here.limits.cpus
    usable = machine.usable_cores(tuple(cores))
    text = f"{here.cpu}: {here.physical_cores} cores, {here.logical_cpus} logical, {usable} usable"
    crowded = len(on_host) > usable
    cores_here = f"{usable} core{'s' if usable > 1 else ''}"
    advice = f"{len(on_host)} ranks share {cores_here}: the figures show that, not what {len(on_host)} cores would do."
    memory = here.limits.memory_bytes
    limits = (
        "no limits of control groups"
        if quota is None and memory is None
        else ", ".join(
            ([f"{quota:g} cores"] if quota is not None else [])
            + ([f"{size(memory)} of memory"] if memory is not None else [])
        )
    )
    places: dict[str, list[int]] = {}
    for rank in ranks:
        places.setdefault(f"{'' if rank.host == here.host else rank.host + ' '}{spans(rank.affinity)}", []).append(
            rank.rank
        )
    binding = "; ".join(f"rank{'s' if len(who) > 1 else ''} {spans(who)} on {where}" for where, who in places.items())
    return [
        Check("cores", "warn" if crowded else "ok", text, advice if crowded else ""),
        Check("SIMD", "ok", ", ".join(here.simd) or "none known"),
        Check("binding", "info", f"{binding} at the start; pneumo binds anew for each run"),
        Check("limits", "info", f"{limits}; {size(here.memory_bytes)} of memory"),
        Check("threads a rank", "info", f"{max(1, usable // max(1, len(on_host)))} unless --threads says otherwise"),
    ]


def check_places(ranks: Sequence[Rank]) -> list[Check]:
    """Shared memory, open ports and free disk."""
    shm = machine.free_bytes("/dev/shm")
    small = f"/dev/shm has {size(shm)}: give the container more (--shm-size=1g), or ranks cannot share memory."
    disk, cache = machine.free_bytes("."), machine.free_bytes(places.user_cache())
    full = "Free some disk, or write elsewhere with --out and --cache."
    open_to = sorted({where for rank in ranks for where in rank.listening})
    others = [where for where in open_to if not machine.is_loopback(where)]
    return [
        Check(
            "/dev/shm", *(("ok", f"{size(shm)} free") if shm >= LITTLE_SHM else ("warn", f"{size(shm)} free", small))
        ),
        Check("listening on", "info" if others else "ok", ", ".join(others or open_to) or "no address"),
        Check(
            "free disk",
            "ok" if min(disk, cache) >= LITTLE_DISK else "warn",
            f"{size(disk)} here, {size(cache)} in the cache",
            "" if min(disk, cache) >= LITTLE_DISK else full,
        ),
    ]


def check_clock(clock: Clock | str | None) -> Check:
    """The clock, and how far those of the ranks may differ, as round trips between them have just told."""
    step_ns, cost_ns = machine.clock()
    own = f"steps of {step_ns} ns, {cost_ns:.0f} ns a reading"
    if not isinstance(clock, Clock):
        return Check("clock", "warn" if clock else "ok", f"{own}; {clock}" if clock else own, clock or "")
    text = f"{own}; {agreement(clock)}"
    for host in clock.hosts[1:]:
        sample = next(sample for sample in clock.samples if sample.rank == host.ranks[0])
        ahead, bound = sample.offset_ns / 1e9, duration(sample.bound_ns)
        text += f"; {host.name} is {abs(ahead):.6f} s {'ahead' if ahead > 0 else 'behind'}, known within {bound}"
    coarse = bound_ns(clock, 1 + max(rank for host in clock.hosts for rank in host.ranks)) > COARSE_NS
    advice = (
        "The clocks of the hosts are known roughly: who waited for whom is uncertain by as much; try a faster network."
    )
    return Check("clock", "warn" if coarse else "ok", text, advice if coarse else "")


def size(count: int) -> str:
    """A number of bytes as people read it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs drawn together: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def check_native(found: dict[str, Any] | None) -> Check:
    """The native communication layer: comm pneumo."""
    if found is None:
        return Check(
            "native layer", "warn", "not built: no comm pneumo", "Run ./launch/setup.sh to build the native layer."
        )
    text = "comm pneumo, " + ("several hosts through MPI" if found["mpi"] else "one host only")
    if not found["layers"]:
        again = "Run ./launch/setup.sh to build the detector's kernels: without them its steps take longer."
        return Check("native layer", "warn", f"{text}; without the detector's kernels", again)
    return Check("native layer", "ok", f"{text}; the detector's kernels")


def examine(mpi: Mpi | str, ranks: Sequence[Rank], clock: Clock | str | None = None) -> list[Check]:
    """All checks in the order of the list; `mpi` is a sentence where MPI cannot be loaded, `clock` where it failed."""
    here = machine.machine()
    python = Check("Python", "ok", f"{platform.python_version()}, pneumo {version('pneumo') or 'not installed'}")
    start = check_mpi(mpi) if isinstance(mpi, Mpi) else [Check("MPI library", "bad", mpi, "Run ./launch/setup.sh.")]
    return [
        python,
        *start,
        *check_torch(),
        check_horovod(horovod_facts()),
        check_native(native_facts()),
        check_packages(),
        *check_machine(here, ranks),
        *check_places(ranks),
        check_clock(clock),
    ]

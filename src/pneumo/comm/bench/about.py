"""What a measurement depends on, for its header and its JSON file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pneumo.comm
from pneumo import machine
from pneumo.comm.bench import memory
from pneumo.installed import version

if TYPE_CHECKING:
    from pneumo.world import World


def facts(world: World, *, horovod: bool) -> dict[str, Any]:
    """JSON values: ranks, cores, binding, CPU, versions, and settings that decide times."""
    model, simd = machine.cpu()
    return {
        "cores": world.total_cores,
        "ranks": world.size,
        "hosts": world.hosts,
        "binding": world.binding(world.size, 1),
        "cpu": model,
        "simd": list(simd),
        "cache_bytes": memory.cache_bytes(),
        "pneumo_simd": pneumo.comm.simd_level(),
        "mpi": world.mpi_version(),
        "torch": version("torch"),
        "horovod": version("horovod") if horovod else None,
        "horovod_cycle_ms": float(os.environ.get("HOROVOD_CYCLE_TIME", "1")) if horovod else None,
    }


def header(found: Mapping[str, Any], what: str) -> Iterator[tuple[str, str]]:
    """The facts as lines to print above the tables; `what` names operations and types."""
    more = ": more ranks than cores" if found["ranks"] > found["cores"] else ""
    hosts = found["hosts"][0] if len(found["hosts"]) == 1 else f"{len(found['hosts'])} hosts"
    yield "measured", what
    several = "s" if found["ranks"] > 1 else ""
    yield "ranks", f"{found['ranks']} rank{several} on {found['cores']} cores of {hosts}{more}"
    yield "binding", f"{found['binding']}, 1 thread a rank"
    if found["shared"]:
        yield "memory", "all tensors lie in memory that pneumo allocates, which its collectives use in place"
    ours = f"; pneumo uses {found['pneumo_simd']}" if found["pneumo_simd"] else ""
    cache = found["cache_bytes"] >> 20
    yield "CPU", f"{found['cpu']}, last-level cache {cache} MiB; {', '.join(found['simd'])}{ours}"
    cycle = f"; Horovod {found['horovod']}, cycle time {found['horovod_cycle_ms']:g} ms" if found["horovod"] else ""
    yield "software", f"{found['mpi']}; torch {found['torch']}{cycle}"
    yield "Intel MPI", intel_mpi(found["mpi"])


def intel_mpi(running: str) -> str:
    """Where Intel MPI stands in this run: a process has one MPI, the one that its launcher started."""
    if "Intel" in running:
        return "runs here: the rows of mpi are its"
    if version("impi-rt") or "I_MPI_ROOT" in os.environ:
        return f"installed, but the rows of mpi are those of {running}; start with its own mpirun to see it"
    return "not installed"

"""Which libraries are there, on all ranks alike, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

import pneumo.comm
from pneumo.comm.bench.deepspeed import DeepSpeed
from pneumo.comm.bench.libraries import Absent, C10d, Horovod, Library, Memcpy, Mpi, MpiPlain
from pneumo.comm.groups import Groups
from pneumo.installed import version

if TYPE_CHECKING:
    from pneumo.world import World

C10D = ("gloo", "pneumo")


@dataclass(slots=True)
class Present:
    """The libraries that take part, the process groups behind some of them, and {name: reason} of those absent."""

    libraries: list[Library]
    groups: Groups
    absent: dict[str, str] = field(default_factory=dict)


def load(names: Sequence[str], world: World) -> Present:
    """Load libraries by name, in their order; collective. What one rank lacks is absent on all."""
    absent = {name: why for name in names if (why := _missing(name, world)) is not None}
    absent = {name: why for found in world.comm.allgather(absent) for name, why in found.items()}
    wanted = [(name, world.size) for name in C10D if name in names and name not in absent]
    present = Present([], Groups(world.comm, address=world.share(world.address), wanted=wanted), absent)
    for name in names:
        library = None
        try:
            library = _make(name, world, present.groups) if name not in absent else None
        except Absent as error:
            absent[name] = str(error)
        reasons = [why for why in world.comm.allgather(absent.get(name)) if why]
        if reasons:
            absent[name] = reasons[0]
        elif library is not None:
            present.libraries.append(library)
    return present


def _missing(name: str, world: World) -> str | None:
    """Why a library cannot be loaded, as far as that shows without trying."""
    if name == "pneumo":
        why = pneumo.comm.missing()
        if why is not None or name not in dist.Backend.backend_list:
            return why or "torch.distributed does not know it"
    if name in ("horovod", "deepspeed") and version(name) is None:
        return "not installed"
    if name == "deepspeed" and not world.one_node:
        return "its operation works within one node"
    return None


def _make(name: str, world: World, groups: Groups) -> Library:
    if name in C10D:
        return C10d(name, groups.get(name, world.size))
    if name == "memcpy":
        return Memcpy(name)
    kinds: dict[str, Any] = {"mpi": Mpi, "mpi_plain": MpiPlain, "horovod": Horovod, "deepspeed": DeepSpeed}
    made: Library = kinds[name](name, world.first(world.size))
    return made

"""The table of backends and of the communication libraries each can use; readable without torch."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pneumo.backends.base import Backend


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a backend is implemented, and which comms it can use, the first being its only or usual one."""

    place: str
    comms: tuple[str, ...]
    parallel: bool = True
    usual: bool = True  # part of a study that names no backends


BACKENDS = {
    "serial": Entry("pneumo.backends.serial:Serial", ("none",), parallel=False),
    "ddp": Entry("pneumo.backends.ddp:Ddp", ("gloo", "pneumo", "nccl")),
    "fsdp": Entry("pneumo.backends.fsdp:Fsdp", ("gloo", "pneumo", "nccl")),
    "fsdp-async": Entry("pneumo.backends.fsdp:FsdpAsync", ("gloo", "pneumo", "nccl"), usual=False),
    "horovod": Entry("pneumo.backends.horovod:Horovod", ("mpi",)),
}
# What --comm chooses among: the libraries that ddp and fsdp can use.
COMMS = ("gloo", "pneumo", "nccl")


def load(name: str) -> "type[Backend]":
    """Import the class of a backend of the table; this imports torch, and for horovod Horovod's library."""
    module, attribute = BACKENDS[name].place.split(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]

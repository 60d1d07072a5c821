"""What a check gets: the ranks with their MPI communicator, and process groups of both backends over all of them."""

import datetime
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pneumo.comm.rendezvous import make_store  # which registers the backend too
from pneumo.world import World

# A rank that raised leaves the others waiting for so long; on two shared cores, Gloo's start can take some seconds.
TIMEOUT_S = 60
TIMEOUT = datetime.timedelta(seconds=TIMEOUT_S)


class Ranks:
    """The ranks of a world: `comm` is mpi4py's, `pneumo` and `gloo` are process groups of all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.comm = world.comm
        self.rank, self.size = world.rank, world.size
        self.everybody = list(range(world.size))
        self.start()

    def start(self) -> None:
        """Make all process groups; the default one is pneumo's."""
        self.store = make_store(self.comm, "127.0.0.1", TIMEOUT)
        dist.init_process_group("pneumo", store=self.store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        self._groups: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.pneumo: Any = self.group(self.everybody)
        self.gloo: Any = self.group(self.everybody, "gloo")

    def close(self) -> None:
        """Destroy the process groups."""
        dist.destroy_process_group()

    def group(self, ranks: Sequence[int], backend: str = "pneumo") -> Any:
        """The process group of some ranks, made at the first call; collective over the world."""
        key = backend, tuple(ranks)
        if key not in self._groups:
            self._groups[key] = self.fresh(ranks, backend)
        return self._groups[key]

    def fresh(self, ranks: Sequence[int] | None = None, backend: str = "pneumo", timeout_s: int = TIMEOUT_S) -> Any:
        """A new process group of some ranks, by default of all; collective over the world."""
        members = self.everybody if ranks is None else list(ranks)
        return dist.new_group(members, backend=backend, timeout=datetime.timedelta(seconds=timeout_s))

    def meet(self) -> None:
        """Wait, asleep and without either backend, until all ranks are here."""
        self._world.wait()

    def share(self, value: Any) -> list[Any]:
        """The values of all ranks, passed by MPI."""
        self.meet()
        values: list[Any] = self.comm.allgather(value)
        return values

    def together(self, function: Callable[[], None]) -> None:
        """Call a function that is collective: where it raises on one rank, this raises on all, with all that was said.

        The process groups are made anew then, since ranks may have left them at different points.
        """
        said = ""
        try:
            function()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            places = [f"\n  {frame.name}:{frame.lineno}: {frame.line}" for frame in frames]
            said = f"{type(error).__name__}: {str(error)[:600]}{''.join(places)}"
        errors = self.share(said)
        if any(errors):
            self.close()
            self.start()
            told = {text: [k for k, other in enumerate(errors) if other == text] for text in errors if text}
            raise AssertionError("\n".join(f"ranks {numbers}: {text}" for text, numbers in told.items()))


def rng(*key: object) -> np.random.Generator:
    """A generator that every rank can make alike."""
    return np.random.default_rng([ord(letter) for letter in repr(key)])


def use_loopback() -> None:
    """Have Gloo listen on the loopback interface, and both backends compute in one thread."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)

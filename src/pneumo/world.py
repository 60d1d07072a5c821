"""The MPI world: started and ended here and nowhere else."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pneumo import collective, process
from pneumo.errors import PneumoError

# What launchers tell their processes: the number of ranks, and the rank.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH or a PMI launcher", "PMI_SIZE", "PMI_RANK"),
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def launched() -> tuple[str, int, int] | None:
    """Return (launcher, number of ranks, rank) as the launcher's environment tells it, None without a launcher."""
    for name, size, rank in _LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return name, int(os.environ[size]), int(os.environ[rank])
    return None


def use_no_network(started: tuple[str, int, int] | None) -> None:
    """Choose Open MPI's transports before it starts, where the launcher (as of `launched`) says that one node is all.

    Its TCP transport listens on every address even where it is told to use `lo`, so on one node it is left out. A rank
    alone needs no shared memory either, of which Open MPI would leave 16 MiB in /dev/shm behind.
    """
    if started is None:
        os.environ.setdefault("OMPI_MCA_btl", "self")
    elif os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(started[1]):
        os.environ.setdefault("OMPI_MCA_btl", "self,sm")


class World:
    """All ranks of the job, from MPI's initialisation to its end.

    `comm` is the world's communicator (mpi4py). `cores` are the ids of the cores that the ranks of this node may use
    together, from the affinity masks that they had before any library could shrink them.
    """

    def __init__(self) -> None:
        mask = os.sched_getaffinity(0)
        started = launched()
        use_no_network(started)
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        self._mpi = MPI
        self._provided = MPI.Init_thread(MPI.THREAD_MULTIPLE)
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self._first: dict[int, Any] = {}
        self._check_start(started)
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        self.cores = tuple(sorted(set().union(*node.allgather(mask))))
        node.Free()
        everyone = self.comm.allgather((socket.gethostname(), self.local_rank, len(self.cores)))
        self.hosts = sorted({host for host, _, _ in everyone})
        self.node_sizes = [1 + max(r for h, r, _ in everyone if h == host) for host in self.hosts]
        self.total_cores = sum(cores for _, local_rank, cores in everyone if local_rank == 0)
        self._token = self.comm.bcast(os.urandom(8).hex())

    def _check_start(self, started: tuple[str, int, int] | None) -> None:
        if started and started[1] > 1 and self.size == 1:
            name, size, rank = started
            library = self._mpi.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
            self._mpi.Finalize()
            if rank == 0:
                print(
                    f"pneumo: {name} started {size} ranks, but each sees a world of one: the MPI library in use is "
                    f"{library}, another one than the launcher's; start with the mpirun of that library (in the "
                    "environment, .venv/bin/mpirun), or rebuild mpi4py for the launcher's.",
                    file=sys.stderr,
                    flush=True,
                )
            raise SystemExit(2)
        if self._provided < self._mpi.THREAD_MULTIPLE:
            raise PneumoError(
                "The MPI library does not offer MPI_THREAD_MULTIPLE, which Horovod's thread needs; use one that does."
            )

    @classmethod
    @contextmanager
    def start(cls) -> "Iterator[World]":
        """Start MPI; at the end stop it. An exception that one rank does not catch ends the job with its message."""
        world = cls()
        try:
            yield world
        except SystemExit:
            raise
        except BaseException as error:
            world._fail(error)
        world._finalize()

    @property
    def one_node(self) -> bool:
        """Whether all ranks are on one host: then nothing has to leave the loopback interface."""
        return len(self.hosts) == 1

    @property
    def interface(self) -> str | None:
        """The network interface that everything of ours listens on, None where it has to be found."""
        return "lo" if self.one_node else None

    @property
    def address(self) -> str:
        """The address at which this rank can be reached by the others."""
        return "127.0.0.1" if self.one_node else socket.gethostbyname(socket.gethostname())

    def first(self, ranks: int) -> Any:
        """Return the communicator of the first `ranks` ranks, None on the others; collective when first asked for."""
        if ranks not in self._first:
            colour = 0 if self.rank < ranks else self._mpi.UNDEFINED
            comm = self.comm.Split(colour, self.rank)
            self._first[ranks] = None if comm == self._mpi.COMM_NULL else comm
        return self._first[ranks]

    def cores_for(self, ranks: int, threads: int) -> set[int]:
        """The cores of this rank in a run: `threads` of its own where there are enough for all, else all of them."""
        here = min(ranks, self.local_size)
        if self.local_rank < here and here * threads <= len(self.cores):
            return set(self.cores[self.local_rank * threads : (self.local_rank + 1) * threads])
        return set(self.cores)

    def binding(self, ranks: int, threads: int) -> str:
        """How `cores_for` binds a run on this node, in words."""
        if min(ranks, self.local_size) * threads <= len(self.cores):
            return f"{threads} core{'s' if threads > 1 else ''} a rank"
        return f"all {len(self.cores)} cores"

    def wait(self) -> None:
        """Wait, asleep, until every rank of the world has come here."""
        collective.wait_for_all(self.comm)

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank; whoever waits for it sleeps."""
        self.wait()
        return self.comm.bcast(value)

    def run_on_first(self, function: Any) -> Any:
        """Call a function on rank 0 while the others sleep; all return its result, or raise its PneumoError."""
        result: Any = None
        if self.rank == 0:
            try:
                result = function()
            except PneumoError as error:
                result = error
        result = self.share(result)
        if isinstance(result, PneumoError):
            raise Together(result)
        return result

    def refuse(self, error: PneumoError) -> int:
        """Print an error that all ranks have found alike, once; returns the exit code. Collective."""
        if self.rank == 0:
            print(f"pneumo: {error}", file=sys.stderr, flush=True)
        # No rank may leave before the sentence is out: a launcher kills the others when one exits with an error.
        self.wait()
        return error.exit_code

    def _fail(self, error: BaseException) -> None:
        """Say what happened, once in the whole job, and end every rank."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # An abstract socket's name can be had once a host and vanishes with its owner: whoever gets it speaks.
            claim.bind(f"\0pneumo-{self._token}")
        except OSError:
            time.sleep(5)
        else:
            where = f"rank {self.rank} on {socket.gethostname()}"
            if isinstance(error, PneumoError):
                print(f"pneumo: {error} ({where})", file=sys.stderr, flush=True)
            elif isinstance(error, KeyboardInterrupt):
                print(f"pneumo: interrupted ({where})", file=sys.stderr, flush=True)
            else:
                traceback.print_exception(error)
                print(f"pneumo: {where} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.2)  # let the launcher forward the lines before it ends everything
        self._mpi.COMM_WORLD.Abort(1)

    def _finalize(self) -> None:
        for comm in self._first.values():
            if comm is not None:
                comm.Free()
        self.wait()
        self.comm.Free()
        self._mpi.Finalize()

    def bind(self, ranks: int, threads: int) -> None:
        """Bind this rank for a run."""
        process.bind(self.cores_for(ranks, threads))

    def mpi_version(self) -> str:
        """The MPI library's name and version, its first line."""
        version: str = self._mpi.Get_library_version()
        return version.split("\n")[0].split(", package")[0].strip("\0 ")


class Together(PneumoError):  # noqa: N818 -- says how it is raised
    """An error that every rank raises at once, so that one of them can print it and all can leave in order."""

    def __init__(self, cause: PneumoError) -> None:
        super().__init__(str(cause))
        self.exit_code = cause.exit_code

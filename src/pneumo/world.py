"""The MPI world: started and ended here and nowhere else."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from pneumo import collective, machine, process
from pneumo.errors import PneumoError, Refused
from pneumo.watchdog import Watchdog

# What launchers tell their processes: the number of ranks, and the rank.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH or a PMI launcher", "PMI_SIZE", "PMI_RANK"),
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)

# A launcher kills all ranks when one leaves with an error: the one that speaks may still be loading its libraries.
_PATIENCE_S = 3.0
_COLLECT_S = 15.0  # ranks that wait for each other stop within a moment, but are looked at now and then only
Started = tuple[str, int, int] | None


def launched() -> Started:
    """Return (launcher, number of ranks, rank) as the launcher's environment tells it, None without a launcher."""
    for name, size, rank in _LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return name, int(os.environ[size]), int(os.environ[rank])
    return None


def speaks() -> bool:
    """Whether this process is the one that prints, by what its launcher says: MPI need not be there yet."""
    started = launched()
    return started is None or started[2] == 0


def use_no_network(started: Started) -> None:
    """Choose Open MPI's transports before it starts, where the launcher (as of `launched`) says that one node is all.

    Its TCP transport listens on every address even where it is told to use `lo`, so on one node it is left out. A rank
    alone needs no shared memory either, of which Open MPI would leave 16 MiB in /dev/shm behind.
    """
    if started is None:
        os.environ.setdefault("OMPI_MCA_btl", "self")
    elif os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(started[1]):
        os.environ.setdefault("OMPI_MCA_btl", "self,sm")


def start_mpi(started: Started) -> Any:
    """Start MPI, asking for MPI_THREAD_MULTIPLE, and return mpi4py's module MPI; `started` is as of `launched`.

    Raises Refused where no library can be loaded. Nothing else starts MPI: `World` calls this, and so does the doctor,
    who has something to say of worlds in which nothing can run, too.
    """
    use_no_network(started)
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise Refused(f"MPI cannot be loaded ({text}); run ./launch/setup.sh, which installs it.") from error
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def stop_mpi(mpi: Any) -> None:
    """End what `start_mpi` has started; collective over all ranks."""
    mpi.Finalize()


def _leave(error: Refused, started: Started) -> NoReturn:
    """End a rank that cannot reach the others: the launcher's first one says why, and nobody leaves before it."""
    if started is None or started[2] == 0:
        print(f"pneumo: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_S)
    raise SystemExit(error.exit_code)


class World:
    """All ranks of the job, from MPI's initialisation to its end.

    `comm` is the world's communicator (mpi4py). `cores` are the ids of the cores that the ranks of this node can keep
    busy together, in the order in which they are given out: from the affinity masks that the ranks had before any
    library could shrink them, and no more than the node's CPU quota. `on_failure` is called, on the rank that says it,
    when the job fails. `watchdog` ends the job where a rank does not go on.
    """

    def __init__(self) -> None:
        self._mask = os.sched_getaffinity(0)
        self.on_failure: Callable[[], None] | None = None
        started = launched()
        try:
            self._mpi = start_mpi(started)
        except Refused as error:
            _leave(error, started)
        self.comm = self._mpi.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self._first: dict[int, Any] = {}
        self._token = self.comm.bcast(os.urandom(8).hex())
        self.watchdog = Watchdog(self._give_up)
        self._check_start(started)

    def _meet(self) -> None:
        """Find out who else is here, and on which node."""
        node = self.comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        masks = node.gather(self._mask)
        self.cores = node.bcast(machine.usable(set().union(*masks)) if masks else None)
        node.Free()
        everyone = self.comm.allgather((socket.gethostname(), self.local_rank, len(self.cores)))
        self.hosts = sorted({host for host, _, _ in everyone})
        self.node_sizes = [1 + max(r for h, r, _ in everyone if h == host) for host in self.hosts]
        self.total_cores = sum(cores for _, local_rank, cores in everyone if local_rank == 0)
        if self.one_node:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"

    def _check_start(self, started: Started) -> None:
        """End every rank, with one sentence, where this is no world that can work."""
        if started and started[1] > 1 and self.size == 1:
            library = self.mpi_version().split(",")[0]
            why = Refused(
                f"{started[0]} started {started[1]} ranks, but each sees a world of one: the MPI library in use is "
                f"{library}, another one than the launcher's; start with the mpirun of that library (in the "
                "environment, .venv/bin/mpirun), or rebuild mpi4py for the launcher's."
            )
            self._finalize()
            _leave(why, started)
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            why = Refused(
                "The MPI library does not offer MPI_THREAD_MULTIPLE, which Horovod's thread needs; use one that does."
            )
            code = self.refuse(why)
            self._finalize()
            raise SystemExit(code)

    @classmethod
    @contextmanager
    def start(cls) -> "Iterator[World]":
        """Start MPI; at the end stop it. An exception that one rank does not catch ends the job with its message."""
        world = cls()
        try:
            world._meet()
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
        return "127.0.0.1" if self.one_node else machine.routable_address()

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
        return f"all {len(self.cores)} cores" if len(self.cores) > 1 else "the one core"

    def wait(self) -> None:
        """Wait, asleep, until every rank of the world has come here."""
        self.watchdog.rest()
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
            self._note_failure()
        # No rank may leave before the sentence is out: a launcher kills the others when one exits with an error.
        self.wait()
        return error.exit_code

    def _note_failure(self) -> None:
        if self.on_failure is not None:
            with suppress(Exception):  # what went wrong has been said; what this adds to it would only hide it
                self.on_failure()

    def _give_up(self, place: str) -> None:
        """End every rank, since this one has not gone on for too long; what all of this host say is one sentence."""
        meeting, name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), f"\0pneumo-stuck-{self._token}"
        places = {self.rank: place}
        try:
            meeting.bind(name)
        except OSError:
            with suppress(OSError):
                meeting.sendto(f"{self.rank} {place}".encode(), name)
            time.sleep(2 * _COLLECT_S)  # the rank that has bound it speaks, and ends all
        else:
            meeting.settimeout(_COLLECT_S)
            with suppress(TimeoutError):
                while len(places) < self.local_size:
                    rank, other = meeting.recv(4096).decode(errors="replace").split(" ", 1)
                    places[int(rank)] = other
        said = "; ".join(f"rank {rank} in {places[rank]}" for rank in sorted(places))
        text = f"no progress for {self.watchdog.limit_s:.0f} s: {said}"
        if len(places) < self.local_size:
            text += f"; {self.local_size - len(places)} other rank(s) of this host wait for them, or are gone"
        self._fail(PneumoError(text))
        os._exit(1)  # where even MPI's abort does not return

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
            self._note_failure()
            time.sleep(0.2)  # let the launcher forward the lines before it ends everything
        self._mpi.COMM_WORLD.Abort(1)

    def _finalize(self) -> None:
        for comm in self._first.values():
            if comm is not None:
                comm.Free()
        self.wait()
        self.watchdog.close()
        self.comm.Free()
        stop_mpi(self._mpi)

    def bind(self, ranks: int, threads: int) -> None:
        """Bind this rank for a run."""
        process.bind(self.cores_for(ranks, threads))

    def mpi_version(self) -> str:
        """The MPI library's name and version, its first line."""
        version: str = self._mpi.Get_library_version()
        return version.split("\n")[0].split(", package")[0].strip("\0 ")


def in_world(work: Callable[["World"], int], refused: Refused | None) -> int:
    """Do the work of a command in an MPI world; returns its exit code, or that of the refusal, which is said once."""
    with World.start() as world:
        if refused is not None:
            return world.refuse(refused)
        try:
            return work(world)
        except Together as error:
            return world.refuse(error)
    return 1


class Together(PneumoError):  # noqa: N818 -- says how it is raised
    """An error that every rank raises at once, so that one of them can print it and all can leave in order."""

    def __init__(self, cause: PneumoError) -> None:
        super().__init__(str(cause))
        self.exit_code = cause.exit_code

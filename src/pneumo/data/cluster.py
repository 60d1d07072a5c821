"""Dask inside the MPI world: every rank becomes a worker for one piece of work, and goes on as itself afterwards.

`dask_mpi.execute` starts a scheduler and a worker on rank 0 and a worker on each other rank, in their main threads.
Around it stand: TLS with certificates that live for this call only and travel over MPI; addresses of the one
interface that was asked for; an error on any rank that reaches all of them instead of leaving the others waiting; and
a process that looks afterwards as it did before.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from pneumo import collective
from pneumo.errors import PneumoError

if TYPE_CHECKING:
    from distributed import Client
    from mpi4py.MPI import Intracomm

T = TypeVar("T")

_START_TIMEOUT_S: Final = 60
_CLOSE_TIMEOUT_S: Final = 20
_NO_PAGES: Final = "127.0.0.1:0"  # Dask starts its HTTP servers in any case: here, instead of on every interface
_NOISY_LOGGERS: Final = ("distributed", "tornado", "asyncio")


def run(comm: Intracomm, work: Callable[[Client], T], *, interface: str | None, scratch: Path) -> T | None:
    """Call `work(client)` on rank 0 with a Dask cluster of all ranks, one thread each, and return its result there.

    Collective over `comm`; returns None on the other ranks. `interface` names the network interface to listen on (as
    `lo`); None leaves the choice to Dask. Workers keep their files below `scratch`. Raises on every rank what `work`,
    a task or the cluster itself raised on one of them: Refused or PneumoError.
    """
    collective.gather(comm, lambda: _check_interface(interface))
    # Importing takes a second or two; what follows is timed by Dask's own timeouts, so it starts on all ranks together.
    settings = collective.gather(comm, lambda: _settings() if comm.rank == 0 else _import_dask())
    own = scratch / collective.from_first(comm, lambda: f"dask-{secrets.token_hex(4)}")
    outcome: list[T] = []
    collective.gather(comm, lambda: _execute(comm, work, outcome, settings[0], interface, own))
    return outcome[0] if outcome else None


def _execute(
    comm: Intracomm,
    work: Callable[[Client], T],
    outcome: list[T],
    settings: dict[str, Any],
    interface: str | None,
    scratch: Path,
) -> None:
    import dask_mpi
    import distributed

    errors: list[BaseException] = []
    threads: list[threading.Thread] = []
    guard = _Guard(comm.rank, scratch / "rank-0-has-left")

    def client() -> None:
        # Whatever happens here, this function must return: dask_mpi tells the ranks to stop only after it.
        threads.append(threading.current_thread())
        guard.started.set()
        try:
            with distributed.Client(  # type: ignore[no-untyped-call]
                set_as_default=False, timeout=_START_TIMEOUT_S
            ) as client:
                client.wait_for_workers(comm.size, timeout=_START_TIMEOUT_S)
                outcome.append(work(client))
        except BaseException as error:
            errors.append(error)
        finally:
            guard.finished.set()

    scratch.mkdir(parents=True, exist_ok=True)
    with _restored_configuration(settings), _quiet(), _Startup(comm) as startup, guard:
        dask_mpi.execute(
            client,
            client_rank=0,
            exclusive_workers=False,
            dashboard=False,
            dashboard_address=_NO_PAGES,
            protocol="tls",
            scheduler_port=0,  # any that is free: several users may share a host
            interface=interface,
            nthreads=1,
            memory_limit=0,  # batch systems and control groups limit memory; a guess of Dask's would pause workers
            local_directory=str(scratch),
            worker_options={"dashboard": False, "dashboard_address": _NO_PAGES, "death_timeout": _START_TIMEOUT_S},
            comm=startup,
        )
        _stop_loops(threads)
    if errors:
        raise errors[0]
    if comm.rank == 0 and not outcome:
        raise PneumoError("Dask's worker on rank 0 did not start: look for limits on threads, files or sockets")


class _Startup:
    """The communicator as dask_mpi sees it while it starts: waiting ranks sleep, and a start that fails frees them.

    dask_mpi broadcasts the scheduler's address in the midst of rank 0's start. Had that raised before, the others
    would wait for ever, so rank 0 then sends None for the address on its way out.
    """

    def __init__(self, comm: Intracomm) -> None:
        self._comm = comm
        self._waited = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._comm.rank == 0 and not self._waited:
            self.bcast(None)

    def Get_size(self) -> int:  # noqa: N802 -- MPI's own name
        return self._comm.size

    def Get_rank(self) -> int:  # noqa: N802 -- MPI's own name
        return self._comm.rank

    def bcast(self, address: str | None, root: int = 0) -> str | None:
        self._waited = True
        collective.wait_for_all(self._comm)
        address = self._comm.bcast(address, root=root)
        if address is None and self._comm.rank != root:
            raise PneumoError("Dask's scheduler did not start on rank 0")
        return address

    def Barrier(self) -> None:  # noqa: N802 -- MPI's own name
        collective.wait_for_all(self._comm)


class _Guard:
    """Ends this rank's part of the cluster where Dask would wait for ever for another part that has failed.

    dask_mpi starts the client from inside rank 0's worker and looks at that worker's error only after the scheduler's
    end, which only the client brings about; and a worker goes on trying to reach a scheduler that is gone. So rank 0
    closes the scheduler if the client does not start in time, and the others stop soon after rank 0 has left, which
    a file tells them: MPI may not be ready for calls from another thread.
    """

    def __init__(self, rank: int, left: Path) -> None:
        self._rank, self._left = rank, left
        self.started, self.finished, self._done = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dask-guard", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for event in (self._done, self.started, self.finished):
            event.set()
        self._thread.join()
        if self._rank == 0:
            self._left.touch()

    def _watch(self) -> None:
        if self._rank == 0:
            if not self.started.wait(_START_TIMEOUT_S):
                for scheduler, loop in _running_servers("Scheduler"):
                    asyncio.run_coroutine_threadsafe(scheduler.close(), loop)
            else:
                self.finished.wait()
        else:
            while not self._done.wait(0.2) and not self._left.exists():
                pass
        while not self._done.wait(_CLOSE_TIMEOUT_S):
            for _, loop in _running_servers("Scheduler", "Worker"):
                # asyncio.run raises then; again, since it first runs the loop to cancel what waits for other timeouts.
                with contextlib.suppress(RuntimeError):  # it was closed just now
                    loop.call_soon_threadsafe(loop.stop)


def _running_servers(*kinds: str) -> list[tuple[Any, asyncio.AbstractEventLoop]]:
    """Return Dask's servers of these kinds in this process, with their event loops, if these run."""
    import distributed

    servers = [server for kind in kinds for server in list(getattr(distributed, kind)._instances)]
    return [(server, server.loop.asyncio_loop) for server in servers if server.loop.asyncio_loop.is_running()]


def _stop_loops(threads: list[threading.Thread]) -> None:
    """Wait for the client's threads and stop their event loops.

    A client that shuts the scheduler down, as dask_mpi's does, is closed already when it would stop its own loop.
    """
    from distributed.utils import LoopRunner

    for thread in threads:
        thread.join(_START_TIMEOUT_S)
        if not thread.is_alive():
            for _, runner in list(LoopRunner._all_loops.values()):
                if runner is not None:
                    runner.stop()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _restored_configuration(settings: dict[str, Any]) -> Iterator[None]:
    """Apply Dask settings, and take back what anyone set until the end (dask_mpi and clients set some for good)."""
    import dask

    before = copy.deepcopy(dask.config.config)
    try:
        dask.config.set(settings)
        yield
    finally:
        dask.config.config.clear()
        dask.config.config.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's loggers silent for this call: what matters is raised, and the rest alarms for nothing.

    Closing logs CommClosedError with tracebacks (dask/dask-mpi #87, #94), a failed task what `run` raises in any case.
    """
    # Some of those below them have a level of their own.
    names = [*_NOISY_LOGGERS, *(name for name in logging.root.manager.loggerDict if name.startswith(_NOISY_LOGGERS))]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _settings() -> dict[str, Any]:
    """Return the settings of one cluster: a new certificate for it, and nothing that runs beside the work."""
    from distributed import Security

    temporary = Security.temporary()  # type: ignore[no-untyped-call]
    settings: dict[str, Any] = {
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": temporary.tls_ca_file,
        # No pages, no statistics of threads, no memory manager that pauses or spills; no look at GPUs, whose driver
        # would put a context into every rank.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.profile.enabled": False,
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.diagnostics.nvml": False,
    }
    for role in ("client", "scheduler", "worker"):
        settings[f"distributed.comm.tls.{role}.cert"] = getattr(temporary, f"tls_{role}_cert")
        settings[f"distributed.comm.tls.{role}.key"] = getattr(temporary, f"tls_{role}_key")
    return settings


def _import_dask() -> dict[str, Any]:
    import dask_mpi  # noqa: F401 -- on every rank at once, before the first of them waits for the others

    return {}


def _check_interface(interface: str | None) -> None:
    known = sorted(name for _, name in socket.if_nameindex())
    if interface is not None and interface not in known:
        raise PneumoError(f"there is no network interface {interface} for Dask: this host has {', '.join(known)}")

"""The plan of a study in a world: which runs, on which ranks, with how many threads and images."""

import math
from dataclasses import dataclass

from pneumo.backends import BACKENDS
from pneumo.config import Study, nearest
from pneumo.errors import Refused
from pneumo.installed import horovod_facts
from pneumo.study.schema import Absent


@dataclass(frozen=True, slots=True)
class Run:
    """One training: identified in a result by its number, and by (backend, comm, ranks, threads)."""

    run: int
    model: str
    backend: str
    comm: str
    ranks: int
    threads: int
    global_batch: int
    device: str

    def __str__(self) -> str:
        comm = "" if self.comm == "none" else f"/{self.comm}"
        return f"{self.backend}{comm} on {self.ranks} rank{'s' if self.ranks > 1 else ''}, {self.threads} thread(s)"


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a study in their order, those that are missing, and the threads of every rank."""

    runs: tuple[Run, ...]
    missing: tuple[Absent, ...]
    threads: int


def horovod_missing() -> str | None:
    """Why Horovod cannot be used, None where it can."""
    # Looked up in files: importing any of Horovod imports torch, and threads are limited only after planning.
    found = horovod_facts()
    if found is None:
        return "Horovod is not installed; see launch/build_horovod.py"
    if "mpi" not in found["built_in"]:
        return "the installed Horovod was built without PyTorch or without MPI; see launch/build_horovod.py"
    return None


def make_plan(study: Study, *, world_size: int, cores: int, local_size: int, gpus: int) -> Plan:
    """Lay out a study over a world; raises Refused for what this world cannot do.

    `cores` and `gpus` are those of one node, `local_size` the ranks on it.
    """
    asked = tuple(sorted(set(study.ranks or default_ranks(world_size))))
    if asked[-1] > world_size:
        raise Refused(
            f"--ranks {asked[-1]}: this world has {world_size} rank(s); start it with mpirun -n {asked[-1]}, "
            "or ask for fewer."
        )
    comms = _comms(study, local_size, gpus)
    batches = _batches(study, asked)
    threads = study.threads or max(1, cores // local_size)
    device = "cuda" if "nccl" in comms else "cpu"
    runs: list[Run] = []
    missing: list[Absent] = []

    def add(backend: str, comm: str, ranks: int, run_threads: int) -> None:
        if backend == "horovod" and (why := horovod_missing()):
            if study.backends is not None:
                raise Refused(f"--backends horovod: {why}.")
            missing.append(Absent(backend=backend, comm=comm, ranks=ranks, why=why))
        else:
            runs.append(Run(len(runs), study.model, backend, comm, ranks, run_threads, batches[ranks], device))

    for backend in study.backends or tuple(BACKENDS):
        entry = BACKENDS[backend]
        if not entry.parallel:
            if 1 in asked:
                add(backend, "none", 1, threads)
                if device == "cpu" and cores > threads and study.threads is None:
                    add(backend, "none", 1, cores)
            continue
        # One rank is the serial row's case; a parallel backend runs on one only where nothing else was asked for.
        for comm in comms if len(entry.comms) > 1 else entry.comms:
            for ranks in [r for r in asked if r > 1] or asked:
                add(backend, comm, ranks, threads)
    if not runs:
        raise Refused(f"--backends {','.join(study.backends or ())} --ranks {','.join(map(str, asked))} leaves no run.")
    return Plan(tuple(runs), tuple(missing), threads)


def default_ranks(world_size: int) -> tuple[int, ...]:
    """The powers of two up to the world's size, and that size."""
    powers = [1 << i for i in range(world_size.bit_length()) if 1 << i <= world_size]
    return tuple(sorted({*powers, world_size}))


def _comms(study: Study, local_size: int, gpus: int) -> tuple[str, ...]:
    enough = gpus >= local_size and gpus > 0
    if study.comm is None:
        return ("nccl",) if enough else ("gloo",)
    if "nccl" in study.comm and not enough:
        why = "no CUDA GPU was found" if gpus == 0 else f"{local_size} ranks share {gpus} GPU(s) and need one each"
        raise Refused(f"--comm nccl is not available here: {why}; use {nearest('gloo', ['gloo'])}.")
    return study.comm


def _batches(study: Study, asked: tuple[int, ...]) -> dict[int, int]:
    """The images of a global step for each number of ranks."""
    if study.rank_batch:
        return {ranks: ranks * study.rank_batch for ranks in (1, *asked)}
    common = math.lcm(*asked)
    batch = study.global_batch
    if batch is None:
        batch = next((b for b in (32, 24) if b % common == 0), common * max(1, round(32 / common)))
    for ranks in asked:
        if batch % ranks:
            raise Refused(f"--global-batch {batch} cannot be divided among {ranks} ranks; use a multiple of {common}.")
    return dict.fromkeys((1, *asked), batch)

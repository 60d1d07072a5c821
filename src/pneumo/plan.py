"""The plan of a study in a world: which runs, on which ranks, with how many threads and images."""

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pneumo.backends import BACKENDS, COMMS
from pneumo.config import Study
from pneumo.errors import Refused
from pneumo.installed import horovod_missing, native_missing
from pneumo.models import MODELS
from pneumo.study.schema import Absent, Sampling

WARMUP_STEPS = 2
GROUP_IMAGES = 8  # of a virtual group, about: statistics of batch norm are taken over one
SPAN_ROWS, ROWS_A_STEP = 100_000, 20  # rows of spans.parquet: about so many in a result, and of a rank's step
SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own variable: 1 allows several ranks on a GPU
MOST_BY_DEFAULT = 64  # images of a global step that nobody asked for


@dataclass(frozen=True, slots=True)
class Run:
    """One training: identified in a result by its number, and by (backend, comm, ranks, threads).

    `groups` are the virtual groups of a global batch, as many for any number of ranks, which divides them; 0 is one a
    rank.
    """

    run: int
    model: str
    backend: str
    comm: str
    ranks: int
    threads: int
    global_batch: int
    device: str
    groups: int = 0

    def __str__(self) -> str:
        comm = "" if self.comm == "none" else f"/{self.comm}"
        return f"{self.backend}{comm} on {self.ranks} rank{'s' if self.ranks > 1 else ''}, {self.threads} thread(s)"


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a study in their order, those that are missing, and the threads of every rank."""

    runs: tuple[Run, ...]
    missing: tuple[Absent, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of every run: `warmup` untimed ones, then `blocks` timed blocks of `steps` each; of `asked` in all."""

    warmup: int
    blocks: int
    steps: int
    asked: int

    @property
    def total(self) -> int:
        """The steps that are made."""
        return self.warmup + self.blocks * self.steps


def make_plan(study: Study, *, world_size: int, cores: int, local_size: int, gpus: int) -> Plan:
    """Lay out a study over a world; raises Refused for what this world cannot do.

    `cores` and `gpus` are those of one node, `local_size` the ranks on it; where nodes differ, of the scarcest one.
    """
    asked = tuple(sorted(set(study.ranks or default_ranks(study, world_size))))
    if asked[-1] > world_size:
        raise Refused(f"--ranks {asked[-1]}: this world has {world_size} rank(s); start more, or ask for fewer.")
    for injection in study.inject:
        if injection.rank is not None and injection.rank >= asked[-1]:
            raise Refused(f"--inject rank={injection.rank}: the runs have {asked[-1]} rank(s), counted from 0.")
    comms = _comms(study, local_size, gpus)
    batches = _batches(study, asked)
    threads = study.threads or max(1, cores // local_size)
    device = "cuda" if "nccl" in comms else "cpu"
    runs: list[Run] = []
    missing: list[Absent] = []

    def add(backend: str, comm: str, ranks: int, run_threads: int) -> None:
        if backend == "horovod" and (why := horovod_missing(device)):
            if study.backends is not None:
                raise Refused(f"--backends horovod: {why}.")
            missing.append(Absent(backend=backend, comm=comm, ranks=ranks, why=why))
        else:
            batch = batches[ranks]
            groups = _groups(study, asked, ranks)
            runs.append(Run(len(runs), study.model, backend, comm, ranks, run_threads, batch, device, groups))

    for backend in study.backends or tuple(name for name, entry in BACKENDS.items() if entry.usual):
        entry = BACKENDS[backend]
        if not entry.parallel:
            if 1 in asked:
                add(backend, "none", 1, threads)
                if device == "cpu" and cores > threads and study.threads is None:
                    add(backend, "none", 1, cores)
            continue
        # One rank is the serial row's case; a parallel backend runs on one only where nothing else was asked for.
        usable = [comm for comm in comms if comm in entry.comms] or list(entry.comms[:1])
        for comm in usable:
            parallel = [r for r in asked if r > 1] or list(asked)
            # Unless it was asked for, a second comm of the same backend runs at both ends only: time is short.
            if study.comm is None and comm != usable[0]:
                parallel = sorted({parallel[0], parallel[-1]})
            for ranks in parallel:
                add(backend, comm, ranks, threads)
    if not runs:
        raise Refused(f"--backends {','.join(study.backends or ())} --ranks {','.join(map(str, asked))} leaves no run.")
    return Plan(tuple(runs), tuple(missing), threads)


def default_ranks(study: Study, world_size: int) -> tuple[int, ...]:
    """The powers of two up to the world's size, and that size, as far as one batch of usual size can be divided by all.

    With a batch a rank anything can; a global batch that was given is no reason to leave out powers of two silently.
    """
    powers = [1 << i for i in range(world_size.bit_length())]
    if study.rank_batch:
        fits = True
    elif study.global_batch:
        fits = study.global_batch % world_size == 0
    else:
        powers = [power for power in powers if power <= MOST_BY_DEFAULT]
        fits = _usual_batch(study, [*powers, world_size]) <= MOST_BY_DEFAULT
    return tuple(sorted({*powers, world_size})) if fits else tuple(powers)


def _usual_batch(study: Study, ranks: Collection[int]) -> int:
    """The first usual batch that all numbers of ranks divide, with images enough for the virtual groups that they
    share; else the multiple of their common multiple that is nearest to the usual one."""
    common, usual = math.lcm(*ranks), MODELS[study.model].usual
    fits = (b for b in usual.batches if b % common == 0 and b >= usual.group * common)
    return next(fits, common * max(usual.group, round(usual.batches[0] / common)))


def _groups(study: Study, asked: Collection[int], ranks: int) -> int:
    """The virtual groups of a global batch: as many for any number of ranks, and of about GROUP_IMAGES images unless
    their number is given; raises Refused for one that a number of ranks does not divide.

    With a batch a rank the groups of one rank are as many for any number of ranks, instead.
    """
    if study.rank_batch:
        return ranks * max(1, study.rank_batch // GROUP_IMAGES)
    batch, common = _batch(study, asked), math.lcm(*asked)
    if study.groups and (study.groups % common or study.groups > batch):
        raise Refused(
            f"--groups {study.groups} of a batch of {batch} images cannot be shared by --ranks "
            f"{','.join(map(str, asked))}; use a multiple of {common}, at most {batch}."
        )
    return study.groups or virtual_groups(batch, common)


def virtual_groups(batch: int, common: int) -> int:
    """The groups of a global batch that all numbers of ranks share which divide `common`; see `GROUP_IMAGES`."""
    return common * max(1, batch // (GROUP_IMAGES * common))


def _batch(study: Study, asked: Collection[int]) -> int:
    return study.global_batch or _usual_batch(study, asked)


def _nccl_missing(local_size: int, gpus: int) -> str | None:
    if gpus == 0:
        return "no CUDA GPU was found"
    if gpus < local_size and os.environ.get(SHARED_GPUS) != "1":
        return f"{local_size} ranks share {gpus} GPU(s) and need one each, unless {SHARED_GPUS} is 1"
    return None


# Why a comm of the table cannot be used by `local_size` ranks on a node with `gpus` GPUs, None where it can; what is
# not named here always can.
COMM_MISSING: dict[str, Callable[[int, int], str | None]] = {
    "nccl": _nccl_missing,
    "pneumo": lambda _local_size, _gpus: native_missing(),
}


def _comms(study: Study, local_size: int, gpus: int) -> tuple[str, ...]:
    missing = {name: why for name in COMMS if name in COMM_MISSING and (why := COMM_MISSING[name](local_size, gpus))}
    if study.comm is None:
        return tuple(name for name in ("gloo", "pneumo") if name not in missing) if "nccl" in missing else ("nccl",)
    for name in study.comm:
        if name in missing:
            able = ", ".join(known for known in COMMS if known not in missing)
            raise Refused(f"--comm {name} is not available here: {missing[name]}; available: {able}.")
    return study.comm


def _batches(study: Study, asked: tuple[int, ...]) -> dict[int, int]:
    """The images of a global step for each number of ranks."""
    if study.rank_batch:
        return {ranks: ranks * study.rank_batch for ranks in (1, *asked)}
    common = math.lcm(*asked)
    batch = _batch(study, asked)
    for ranks in asked:
        if batch % ranks:
            raise Refused(f"--global-batch {batch} cannot be divided among {ranks} ranks; use a multiple of {common}.")
    return dict.fromkeys((1, *asked), batch)


def make_schedule(study: Study, plan: Plan, train_images: int) -> Schedule:
    """Divide the epochs into a warm-up and blocks of equally many steps, the same for every run.

    The epochs are those of the run with the smallest batch. Where they alone decide, the remainder of the division
    goes to the warm-up, so that they are kept; with a budget, which may shorten the blocks anyway, it is dropped. With
    too few steps for all blocks there are fewer of them; raises Refused where none would be left to time, or too few
    for --patience to act.
    """
    batch = min(run.global_batch for run in plan.runs)
    asked = study.most_epochs * -(-train_images // batch)
    warmup = max(1, min(WARMUP_STEPS, asked - study.blocks))
    blocks = min(study.blocks, asked - warmup)
    if blocks < 1:
        raise Refused(
            f"{train_images} training images in batches of {batch} make a single step, which leaves none to time after "
            "the warm-up; ask for more --epochs, or a smaller batch."
        )
    if study.patience:
        from pneumo.patience import require_effect

        require_effect(study.patience, blocks)
    steps = (asked - warmup) // blocks
    if study.budget_s is None:
        warmup = asked - blocks * steps
    return Schedule(warmup, blocks, steps, asked)


def make_sampling(plan: Plan, schedule: Schedule) -> Sampling:
    """Choose how many steps of a block go to spans.parquet: about SPAN_ROWS rows in all, but one step of each block."""
    ranks = sum(run.ranks for run in plan.runs)
    return Sampling(steps_per_block=max(1, SPAN_ROWS // (ROWS_A_STEP * schedule.blocks * ranks)))

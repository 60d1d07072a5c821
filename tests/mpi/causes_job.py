"""Under mpirun: trainings with injected causes of lost time, all in one world; writes their rows as one result.

Arguments: the folder of the result, which must exist; the names of the groups of cases, with commas. `config["cases"]`
of the result's run.json says which runs a case has, with which serial run they are compared, and what was injected.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parity_job import Pictures

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from synthetic import run_file

from pneumo import process
from pneumo.backends import COMMS
from pneumo.config import Study
from pneumo.data.split import Split
from pneumo.inject import Injection
from pneumo.installed import horovod_missing, native_missing
from pneumo.plan import Run
from pneumo.study.results import ResultFolder
from pneumo.world import World

if TYPE_CHECKING:
    from pneumo.comm.groups import Groups
    from pneumo.shares import Shares
    from pneumo.train import Training

IMAGES = 203  # 192 to train on: no batch is short
GLOO, PNEUMO, HOROVOD, FSDP = ("ddp", "gloo"), ("ddp", "pneumo"), ("horovod", "mpi"), ("fsdp", "pneumo")
ALL = (GLOO, PNEUMO, HOROVOD)
LATE = Injection(1, "backward", 0.08)
SLOW_TRANSPORT = Injection(None, "comm", 0.05)
SLOW_LOADER = Injection(None, "data", 0.05)
REPEATED = Injection(None, "optimizer", 0.02, "replicated")
ALONE = Injection(0, "validate", 0.08, "alone")
BUSY = Injection(1, None, 0.0, "busy")
WARMUP = 2  # DDP lays out its buckets again in the second step, and waits in its forward pass


@dataclass(frozen=True)
class Case:
    """What is injected into the runs of these backends; without a serial run of its own it is compared with plain's."""

    inject: tuple[Injection, ...] = ()
    backends: tuple[tuple[str, str], ...] = ALL
    serial: bool = False
    blocks: int = 6
    steps: int = 1


@dataclass(frozen=True)
class Group:
    """Cases of one model; `interleaved`: their runs take turns block by block, else one is done before the next."""

    cases: dict[str, Case]
    model: str
    size: int
    ranks: tuple[int, ...]
    batch: int
    interleaved: bool = False


# Blocks of one step: what disturbs one step then disturbs one block, and is no part of the blocks' median.
GROUPS = {
    "sleep": Group(
        {
            "plain": Case((), (*ALL, FSDP), serial=True, steps=4),
            "late": Case((LATE,), (*ALL, FSDP)),
            "transport": Case((SLOW_TRANSPORT,)),
            "loader": Case((SLOW_LOADER,)),
            "repeated": Case((REPEATED,), (GLOO,), serial=True),
            "alone": Case((ALONE,), blocks=5, steps=2),
            "together": Case((LATE, SLOW_TRANSPORT)),
        },
        **{"model": "sleep", "size": 32, "ranks": (2, 4), "batch": 16},
    ),
    "cnn": Group(
        {
            "cnn plain": Case((), (GLOO, HOROVOD), serial=True),
            "cnn late": Case((Injection(1, "backward", 0.1),), (GLOO, HOROVOD)),
            "cnn busy": Case((BUSY,), (GLOO,), steps=2),
        },
        **{"model": "cnn", "size": 64, "ranks": (2,), "batch": 32, "interleaved": True},
    ),
}


@dataclass
class Laid:
    """The runs of a case, and the trainings of them on this rank; shares belong to the serial one."""

    study: Study
    case: Case
    runs: list[Run] = field(default_factory=list)
    trainings: "list[Training]" = field(default_factory=list)
    shares: "Shares | None" = None


def lay_out(group: Group, first: int, world_size: int) -> dict[str, Laid]:
    """Number the runs of a group's cases, from `first` on."""
    missing = {PNEUMO[1]: native_missing(), HOROVOD[1]: horovod_missing()}
    found: dict[str, Laid] = {}
    for name, case in group.cases.items():
        study = Study(model=group.model, inject=case.inject, global_batch=group.batch, size=group.size, threads=1)
        laid = found[name] = Laid(study, case)
        parallel = [(*pair, n) for n in group.ranks if n <= world_size for pair in case.backends]
        for backend, comm, ranks in [*[("serial", "none", 1)] * case.serial, *parallel]:
            if not missing.get(comm):
                laid.runs.append(Run(first, group.model, backend, comm, ranks, 1, group.batch, "cpu"))
                first += 1
    return found


def train(world: World, groups: "Groups", group: Group, cases: dict[str, Laid], results: ResultFolder) -> None:
    """Train the runs of a group."""
    from pneumo.shares import Shares
    from pneumo.train import Training

    store: Any = Pictures(IMAGES)
    held = np.arange(IMAGES - 11, IMAGES)
    split = Split(np.arange(IMAGES - 11), held[:4], held)
    for laid in cases.values():
        for run in laid.runs:
            where = (run, laid.study, store, split, world, groups)
            laid.trainings.append(Training(*where))
            if run.backend == "serial":
                laid.shares = Shares([group.batch // n for n in group.ranks], *where)
    every = [(training, laid) for laid in cases.values() for training in laid.trainings]
    blocks = range(max(laid.case.blocks for laid in cases.values()) + 1)
    for turn in [[block] for block in blocks] if group.interleaved else [list(blocks)]:
        for training, laid in every:
            advance(training, laid, [block for block in turn if block <= laid.case.blocks], results)
    for training, laid in every:
        training.close()
        if laid.shares is not None and training.run.backend == "serial":
            laid.shares.close()


def advance(training: "Training", laid: Laid, blocks: Sequence[int], results: ResultFolder) -> None:
    """Do some blocks of a training, of which block 0 is the warm-up, and keep the rows on rank 0."""
    with training.awake():
        if not training.active:
            return
        found = []
        for block in blocks:
            found.append(training.advance(block, laid.case.steps if block else WARMUP, warmup=block == 0))
            if training.run.backend == "serial" and laid.shares is not None:
                found.append(laid.shares.time(block, warmup=block == 0))
        for one in (one for rows in training.comm.gather(found) or () for one in rows):
            results.add_steps(one.steps)
            results.add_collectives(one.collectives)


def run(world: World, folder: Path, names: Sequence[str]) -> None:
    """Train all runs of the groups and write what they leave."""
    from pneumo.comm.groups import Groups

    laid: dict[str, dict[str, Laid]] = {}
    for name in names:
        laid[name] = lay_out(GROUPS[name], sum(len(c.runs) for g in laid.values() for c in g.values()), world.size)
    cases = {name: case for group in laid.values() for name, case in group.items()}
    runs = [run for case in cases.values() for run in case.runs]
    sizes = sorted({run.ranks for run in runs})
    for ranks in sizes:
        world.first(ranks)
    wanted = sorted({(run.comm, run.ranks) for run in runs if run.comm in COMMS})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    groups = Groups(world.comm, address=world.share(world.address), wanted=wanted, small=sizes)
    results = ResultFolder(folder)
    for name in names:
        train(world, groups, GROUPS[name], laid[name], results)
    groups.close()
    if world.rank == 0:
        results.flush()
        said = {}
        for group in laid.values():
            plain = next(iter(group.values())).runs[0].run
            for name, case in group.items():
                first = case.runs[0]
                reference = first.run if first.backend == "serial" else plain
                inject = [asdict(one) for one in case.case.inject]
                said[name] = {"runs": [run.run for run in case.runs], "reference": reference, "inject": inject}
        rows = [(run.backend, run.comm, run.ranks, run.threads) for run in runs]
        results.write_run(run_file(rows, cores=len(world.cores), config={"cases": said}))


if __name__ == "__main__":
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as the_world:
        run(the_world, Path(sys.argv[1]), sys.argv[2].split(","))

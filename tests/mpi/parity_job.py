"""Under mpirun: the first 20 steps of every backend on the first k ranks, and prints the losses as JSON.

Arguments: the numbers of ranks, with commas; the global batch; the number of images (a remainder: a short batch); and
the comms of ddp and fsdp, with commas. With nccl all runs are on GPUs, one a rank.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pneumo import process
from pneumo.backends import BACKENDS, COMMS
from pneumo.config import Study
from pneumo.data.split import Split
from pneumo.installed import horovod_missing
from pneumo.plan import Plan, make_plan
from pneumo.world import World

if TYPE_CHECKING:
    import torch

    from pneumo.train import Training

STEPS = 20
ON_GPUS = ("serial", "ddp", "fsdp", "fsdp-async")  # Horovod is built for MPI, which takes no tensors of a GPU
State = Mapping[str, "torch.Tensor"]
Look = Callable[["Training", Any, Any, int], tuple[dict[str, Any], Any]]


@dataclass
class Pictures:
    """A store in memory: a bright spot or none, so that there is something to learn, and something to find."""

    count: int

    @property
    def index(self) -> pd.DataFrame:
        n, edge = self.count, 1024
        spot = [[edge / 4, edge / 4, edge / 4, edge / 4]]
        return pd.DataFrame(
            {
                **{"row": range(n), "patient": [f"p{i}" for i in range(n)], "label": np.arange(n) % 2},
                **{"boxes": [spot if i % 2 else [] for i in range(n)], "rows": edge, "columns": edge},
            }
        )

    def images(self, size: int) -> Any:
        rng = np.random.default_rng(5)
        pictures = rng.integers(0, 120, (self.count, size, size), dtype=np.uint8)
        pictures[1::2, size // 4 : size // 2, size // 4 : size // 2] += 80
        return pictures


def lay_out(world: World, study: Study) -> Plan:
    """Plan the runs, and make the communicators that they need; collective."""
    gpus = world.size if study.comm == ("nccl",) else 0
    plan = make_plan(study, world_size=world.size, cores=len(world.cores), local_size=world.size, gpus=gpus)
    for k in sorted({r.ranks for r in plan.runs}):
        world.first(k)
    return plan


def repeatable_on_gpus() -> None:
    """Compute in whole float32 and in one order: TF32, which convolutions use by default, has 10 bits of mantissa."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def here(backends: Iterable[str]) -> tuple[str, ...]:
    """Those of the backends that are installed."""
    return tuple(name for name in backends if name != "horovod" or not horovod_missing())


def run(world: World, study: Study, count: int, steps: int = STEPS, look: Look | None = None) -> dict[str, Any]:
    """Train all backends; returns, on rank 0, what `look` (else `compare`) found of each run, by its backend, comm and
    ranks. Its second result, of the serial run, is handed to the others.
    """
    look = look or compare
    from pneumo.comm.groups import Groups
    from pneumo.train import Training

    if study.comm == ("nccl",):
        study = replace(study, backends=ON_GPUS)
        repeatable_on_gpus()
    plan = lay_out(world, study)
    store: Any = Pictures(count)
    held = np.arange(count - 11, count)
    split = Split(np.arange(count - 11), held[:4], held)
    wanted = sorted({(r.comm, r.ranks) for r in plan.runs if r.comm in COMMS})
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    small = sorted({run.ranks for run in plan.runs})
    groups = Groups(world.comm, address=world.share(world.address), wanted=wanted, small=small)
    found: dict[str, Any] = {}
    serial: Any = first_state(study)
    for training in [Training(r, study, store, split, world, groups) for r in plan.runs]:
        with training.awake():
            if training.active:
                seen, state = look(training, held, serial, steps)
                serial = state if training.run.backend == "serial" else serial
                found[f"{training.run.backend}-{training.run.comm}-{training.run.ranks}"] = seen
        training.close()
    groups.close()
    return found


def detector(ranks: str, batch: str, batch_norm: str, comms: Iterable[str], backends: str) -> Study:
    """The detector's study of the jobs beside this one, from their arguments."""
    return Study(
        model="yolo",
        batch_norm=batch_norm,  # type: ignore[arg-type]  # checked by who calls
        ranks=tuple(map(int, ranks.split(","))),
        global_batch=int(batch),
        size=64,
        threads=1,
        comm=tuple(comms),
        backends=here(backends.split(",")),
    )


def first_state(study: Study) -> State:
    """The parameters that every training starts with."""
    import torch

    from pneumo import models

    torch.manual_seed(study.seed)
    return models.load(study.model)(study.settings).build().state_dict()


def compare(training: "Training", held: Any, reference: State, steps: int) -> tuple[dict[str, Any], State]:
    """Train and evaluate one run, on its ranks; returns what is compared, whole on rank 0, and the trained state.

    The state is compared here, tensor by tensor, since it is large: `state` has the distance of each from the
    reference (serial's, for serial the one at the start), as a fraction of the reference's length.
    """
    import torch

    from pneumo.comm.small_sum import GROUP

    blocks = training.comm.gather(training.advance(0, steps, warmup=False)) or ()
    answers = training.comm.gather(training.evaluate(0)[1]["validate"]) or ()
    made = list(zip(*(block.steps for block in blocks), strict=True))  # none but on rank 0, as all below
    images = [sum(row["images"] for row in rows) for rows in made]
    losses = [sum((row["loss"] or 0) * row["images"] for row in rows) for rows in made]
    scores = dict(
        pair for found in answers for pair in zip(found.positions.tolist(), found.answers.scores.tolist(), strict=True)
    )
    state = {name: value.detach().cpu().clone() for name, value in training.full_state().items()}
    weights = {name: value for name, value in state.items() if value.is_floating_point()}
    distance = {n: float(torch.dist(v, reference[n]) / (reference[n].norm() or 1.0)) for n, v in weights.items()}
    seen = {
        "images": images,
        "losses": [total / count for total, count in zip(losses, images, strict=True)],
        "answers": [scores.get(i) for i in held.tolist()],
        "collectives": sum(len(block.collectives) for block in blocks),
        "small sums": sum(row["group"] == GROUP for block in blocks for row in block.collectives),
        "state": distance,
    }
    return seen, state


if __name__ == "__main__":
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as the_world:
        numbers = tuple(map(int, sys.argv[1].split(",")))
        comms = tuple(sys.argv[4].split(","))
        wanted = Study(
            ranks=numbers, global_batch=int(sys.argv[2]), size=32, threads=1, comm=comms, backends=here(BACKENDS)
        )
        result = run(the_world, wanted, int(sys.argv[3]))
        if the_world.rank == 0:
            print("RESULT " + json.dumps(result))

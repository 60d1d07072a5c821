"""Under mpirun: the first 20 steps of every backend on the first k ranks, and prints the losses as JSON.

Arguments: the numbers of ranks, with commas; the global batch; the number of images (a remainder: a short batch).
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pneumo import process
from pneumo.config import Study
from pneumo.data.split import Split
from pneumo.plan import make_plan
from pneumo.world import World

STEPS = 20


@dataclass
class Pictures:
    """A store in memory: a bright spot or none, so that there is something to learn."""

    count: int

    @property
    def index(self) -> pd.DataFrame:
        n = self.count
        return pd.DataFrame({"row": range(n), "patient": [f"p{i}" for i in range(n)], "label": np.arange(n) % 2})

    def images(self, size: int) -> Any:
        rng = np.random.default_rng(5)
        pictures = rng.integers(0, 120, (self.count, size, size), dtype=np.uint8)
        pictures[1::2, size // 4 : size // 2, size // 4 : size // 2] += 80
        return pictures


def run(world: World, ranks: tuple[int, ...], batch: int, count: int) -> dict[str, Any]:
    """Train all backends and return, on rank 0, the global loss of each step and the answers, by run."""
    from pneumo.comm.groups import Groups
    from pneumo.train import Training

    study = Study(ranks=ranks, global_batch=batch, size=32, threads=1)
    plan = make_plan(study, world_size=world.size, cores=len(world.cores), local_size=world.size, gpus=0)
    store: Any = Pictures(count)
    held = np.arange(count - 11, count)
    split = Split(np.arange(count - 11), held[:4], held)
    wanted = sorted({(r.comm, r.ranks) for r in plan.runs if r.comm == "gloo"})
    for k in sorted({r.ranks for r in plan.runs}):
        world.first(k)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    groups = Groups(world.comm, address=world.share(world.address), wanted=wanted)
    found: dict[str, Any] = {}
    for training in [Training(r, study, store, split, world, groups) for r in plan.runs]:
        with training.awake():
            if training.active:
                blocks = training.comm.gather(training.advance(0, STEPS, warmup=False))
                _, answers = training.evaluate(0)
                gathered = training.comm.gather(answers["validate"])
                state = {name: float(value.double().abs().sum()) for name, value in training.full_state().items()}
                if training.comm.rank == 0:
                    losses = [[b.steps[i] for b in blocks] for i in range(STEPS)]
                    scores = dict(pair for p, s in gathered for pair in zip(p.tolist(), s.tolist(), strict=True))
                    found[f"{training.run.backend}-{training.run.ranks}"] = {
                        "losses": [
                            sum((r["loss"] or 0) * r["images"] for r in rows) / sum(r["images"] for r in rows)
                            for rows in losses
                        ],
                        "images": [sum(r["images"] for r in rows) for rows in losses],
                        "answers": [scores[i] for i in held.tolist()],
                        "collectives": len(blocks[0].collectives),
                        "state": state,
                    }
        training.close()
    groups.close()
    return found


if __name__ == "__main__":
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as the_world:
        result = run(the_world, tuple(map(int, sys.argv[1].split(","))), int(sys.argv[2]), int(sys.argv[3]))
        if the_world.rank == 0:
            print("RESULT " + json.dumps(result))

"""Under mpirun: every backend's training with answers between its blocks and without, and prints both as JSON.

Arguments: the model, the mode of batch norm, and the backends, with commas. Of each run there is what has to be equal
to the last bit: losses, what the steps send, answers, and a digest of the trained state.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from parity_job import here, run

from pneumo import process
from pneumo.config import Study
from pneumo.world import World

if TYPE_CHECKING:
    import torch

    from pneumo.train import Training

BLOCKS, STEPS, COUNT, BATCH = 3, 2, 35, 8


def train(training: "Training", *, calibrated: bool) -> tuple[dict[str, Any], None]:
    """Train and evaluate one run, on its ranks; returns what is compared, whole on rank 0."""
    training.total_steps = BLOCKS * STEPS
    blocks, between = [], 0
    for block in range(1, BLOCKS + 1):
        blocks.append(training.advance(block, STEPS, warmup=False))
        if calibrated and block < BLOCKS:
            rows, answered = training.calibrate(block)
            assert {row["kind"] for row in rows.steps} == {"validate"}
            between += len(answered.positions)
    rows, parts = training.evaluate(BLOCKS)
    found = {
        "losses": [[row["loss"] for row in block.steps] for block in blocks],
        "sent": [sent(block.collectives) for block in blocks],
        "answers": {part: digest(scores=answered.answers.scores) for part, answered in parts.items()},
        "state": digest(**training.full_state()),
    }
    gathered = training.comm.gather((found, between))
    if gathered is None:
        return {}, None
    return {"equal": [one for one, _ in gathered], "between": sum(count for _, count in gathered)}, None


def sent(collectives: list[dict[str, Any]]) -> dict[str, int]:
    """The bytes of each kind of collective in each step; in how many pieces and in what order is a matter of timing."""
    total: Counter[str] = Counter()
    for call in collectives:
        total[f"step {call['step']}, {call['op']} of {call['group']}"] += call["bytes"]
    return dict(total)


def digest(**tensors: "torch.Tensor | Any") -> str:
    """A hash of the tensors' or arrays' names and bytes."""
    total = hashlib.sha256()
    for name, values in tensors.items():
        array = values if not hasattr(values, "detach") else values.detach().cpu().contiguous().numpy()
        total.update(name.encode() + array.tobytes())
    return total.hexdigest()


def both(world: World, study: Study) -> Mapping[str, Any]:
    """All runs without answers between blocks and with them, on rank 0."""
    return {
        name: run(world, study, COUNT, look=lambda training, *_, c=calibrated: train(training, calibrated=c))
        for name, calibrated in (("without", False), ("with", True))
    }


if __name__ == "__main__":
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as the_world:
        model, batch_norm, backends = sys.argv[1:]
        wanted = Study(
            model=model,
            batch_norm=batch_norm,  # type: ignore[arg-type]  # checked by who calls
            ranks=(1, 2),
            global_batch=BATCH,
            size=64 if model == "yolo" else 32,
            threads=1,
            comm=("gloo", "pneumo") if model == "cnn" else ("pneumo",),
            backends=here(backends.split(",")),
        )
        result = both(the_world, wanted)
        if the_world.rank == 0:
            print("RESULT " + json.dumps(result))

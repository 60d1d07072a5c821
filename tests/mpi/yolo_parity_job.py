"""Under mpirun: the detector's first steps on every backend in float64, and prints the losses as JSON.

Arguments: the numbers of ranks, with commas; the global batch; the number of images; the mode of batch norm; the
backends, with commas; the number of steps.
"""

import json
import sys

from parity_job import detector, run

from pneumo import process
from pneumo.world import World

if __name__ == "__main__":
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as world:
        import torch

        torch.set_default_dtype(torch.float64)
        ranks, batch, count, batch_norm, backends, steps = sys.argv[1:]
        # What moves the gradients is the CNN's test of parity.
        study = detector(ranks, batch, batch_norm, ["pneumo"], backends)
        found = run(world, study, int(count), int(steps))
        if world.rank == 0:
            print("RESULT " + json.dumps(found))

"""Under mpirun: the detector's loss and gradients on every backend, from serial's weights at every step, as JSON.

Arguments: the global batch; the number of images; the backends, with commas; and the cases, one after the other: each
is torch's type, the mode of batch norm and the numbers of ranks with commas, as in `float64-ghost-1,2`.
"""

import json
import math
import sys
from typing import Any

import torch
from parity_job import detector, run
from torch.distributed.tensor import DTensor, distribute_tensor

from pneumo import process
from pneumo.train import Training
from pneumo.world import World

STEPS = 2


def look_forced(training: Training, _held: Any, reference: Any, steps: int) -> tuple[dict[str, Any], Any]:
    """Compare a run's gradients with serial's, on its ranks, or be serial: then the second value holds, for each step,
    the state before it and its gradients.

    `apart` is, for each step, the distance of the whole gradient from serial's as a fraction of its length, `worst` the
    same of the worst tensor.
    """
    is_serial = training.run.backend == "serial"
    states = None if is_serial else training.comm.bcast(reference)
    module, found = training._backend.module, []
    seen: dict[str, Any] = {"images": [], "losses": [], "apart": [], "worst": []}
    module.train()
    for step in range(steps):
        if states is not None:
            load(module, states[step][0])
        state = {name: value.detach().clone() for name, value in module.state_dict().items()} if is_serial else {}
        images, loss, factor, gradients = gradients_of(training, step)
        seen["images"].append(images)
        seen["losses"].append(loss)
        if states is None:
            found.append((state, gradients))
            training._recipe.adjust(factor, step / steps)
            training._backend.optimizer.step()
        else:
            distances = {n: float((gradients[n] - g).norm()) for n, g in states[step][1].items()}
            lengths = {n: float(g.norm()) for n, g in states[step][1].items()}
            seen["apart"].append(math.hypot(*distances.values()) / math.hypot(*lengths.values()))
            seen["worst"].append(max(d / (lengths[n] or 1.0) for n, d in distances.items()))
            assert gradients.keys() == lengths.keys()
        training._backend.optimizer.zero_grad()
    return seen, found if is_serial else reference


def gradients_of(training: Training, step: int) -> tuple[int, float, float, dict[str, torch.Tensor]]:
    """A step's images, its mean loss over the ranks, its factor, and the whole gradients by name, as in the loop."""
    backend, task = training._backend, training._task
    share = training._on_device(training._loader.batch(step))
    total = task.loss(backend.model, share)
    backend.backward(total / share.total)
    backend.synchronize()
    factor = task.factor(share)
    loss = training.comm.allreduce(total.item()) * factor / share.total
    named = ((name, parameter.grad) for name, parameter in backend.module.named_parameters())
    return share.total, loss, factor, {name: factor * whole(grad) for name, grad in named if grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def load(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set all parameters and buffers, in place."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if isinstance(value, DTensor):
                part = distribute_tensor(state[name], value.device_mesh, value.placements, src_data_rank=None)
                value.to_local().copy_(part.to_local())
            else:
                value.copy_(state[name])


if __name__ == "__main__":
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    with World.start() as world:
        batch, count, backends, *cases = sys.argv[1:]
        results = {}
        for case in cases:
            dtype, batch_norm, ranks = case.split("-")
            torch.set_default_dtype(getattr(torch, dtype))
            study = detector(ranks, batch, batch_norm, ["gloo", "pneumo"], backends)
            results[case] = run(world, study, int(count), STEPS, look_forced)
        if world.rank == 0:
            print("RESULT " + json.dumps(results))

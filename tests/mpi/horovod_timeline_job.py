"""Under mpirun: a few steps with Horovod and its own timeline, once for each of CASES, in one world.

Argument: a folder. Of each case it gets `<case>.timeline`, which Horovod writes on rank 0, and of each rank
`<case>-<rank>.json`: its records by step, and when each tensor was handed over (before and after).
"""

import json
import os
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns, sleep
from typing import TYPE_CHECKING, Any

from pneumo import process
from pneumo.world import World

if TYPE_CHECKING:
    import torch

STEPS, LATE = 8, (3, 5, 7)
LATE_S, LATE_RANK = 0.05, 1
# No two sets of these layers' tensors have as many bytes, and all of those do.
DISTINCT, EQUAL = (100, 301, 203, 405, 3), (128, 128, 128, 128, 128)
# The layers' widths, the bytes that Horovod fuses at most, and how many answers it remembers, to negotiate them faster.
CASES = {
    "fused": (DISTINCT, 64 << 20, 1024),
    "fused_by_twos": (DISTINCT, 300 << 10, 1024),
    "one_by_one": (DISTINCT, 0, 1024),
    "negotiated_each_time": (DISTINCT, 64 << 20, 0),
    "equal_tensors": (EQUAL, 140 << 10, 1024),
}


def train(comm: Any, widths: tuple[int, ...], timeline: Path) -> dict[str, Any]:
    """Train on this rank; returns what the module's text says of its file."""
    import torch
    from torch import nn

    from pneumo.backends.base import Place
    from pneumo.backends.horovod import Horovod, hvd  # in this order: the probe, then Horovod's library
    from pneumo.timing.clock import ThreadStamps
    from pneumo.timing.record import Recorder

    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    recorder = Recorder(ThreadStamps())
    backend = Horovod(Place(comm, None, torch.device("cpu")), recorder)
    backend.resume()
    backend.prepare(nn.Sequential(*layers), lambda parameters: torch.optim.SGD(parameters, lr=1e-3), layers)
    handed = note_what_is_handed_over(backend)
    recorder.drop()
    if comm.rank == 0:
        hvd.start_timeline(str(timeline))
    steps = []
    for step in range(STEPS):
        comm.Barrier()
        if step in LATE and comm.rank == LATE_RANK:
            sleep(LATE_S)
        backend.backward(backend.model(torch.randn(8, widths[0])).square().mean())
        backend.synchronize()
        backend.step()
        calls, _ = recorder.take()
        steps.append({"records": [asdict(call) for call in calls], "handed": dict(handed)})
        handed.clear()
    if comm.rank == 0:
        hvd.stop_timeline()
    backend.pause()
    return {"steps": steps}


def note_what_is_handed_over(backend: Any) -> dict[str, tuple[int, int]]:
    """Stamps before and after each tensor is enqueued, by its name; they are noted as the steps go on."""
    names = {value: name for name, value in backend.model.named_parameters()}
    found: dict[str, tuple[int, int]] = {}
    enqueue = backend.optimizer._allreduce_grad_async

    def noted(parameter: "torch.Tensor") -> Any:
        before = perf_counter_ns()
        handle = enqueue(parameter)
        found[names[parameter]] = before, perf_counter_ns()
        return handle

    backend.optimizer._allreduce_grad_async = noted
    return found


def main(world: World, out: Path) -> None:
    """Run all cases; Horovod reads its settings when it is started, and keeps from before what it is not told."""
    comm = world.first(world.size)
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
    for name, (widths, fused_bytes, remembered) in CASES.items():
        os.environ["HOROVOD_FUSION_THRESHOLD"] = str(fused_bytes)
        os.environ["HOROVOD_CACHE_CAPACITY"] = str(remembered)
        (out / f"{name}-{comm.rank}.json").write_text(json.dumps(train(comm, widths, out / f"{name}.timeline")))


if __name__ == "__main__":
    process.limit_threads(1)
    with World.start() as the_world:
        main(the_world, Path(sys.argv[1]))

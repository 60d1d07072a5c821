"""Under mpirun: trainings over the backend `pneumo`, and the same over Gloo, which is what they have to equal.

Arguments: a folder for the results, and the names of cases. Written for each rank, as RANK.json: what each case found,
or the traceback with which it failed.
"""

import datetime
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from comm_trainings import checkpoints, ddp, fsdp, meshes
from comm_trainings.case import CASES, KEPT, Ranks, dist

import pneumo.comm

MODULES = checkpoints, ddp, fsdp, meshes  # which make their cases known


def run_case(folder: Path, name: str, rank: int, size: int) -> dict[str, Any]:
    """Run a case in process groups of its own, so that none inherits what another one broke."""
    store = dist.FileStore(str(folder / f"{name}.store"), size)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("pneumo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        # In torch's debug mode DDP crashes over a second group of Gloo's: there pneumo is compared with the plain mode.
        debug = os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL"
        KEPT.append(dist.group.WORLD if debug else dist.new_group(backend="gloo", timeout=timeout))
        return CASES[name](Ranks(rank, size, folder, KEPT[-1]))
    except Exception:
        text = traceback.format_exc()
        print(f"rank {rank}, {name}: {text}", file=sys.stderr, flush=True)
        return {"failed": text}
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Run the cases one after the other."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pneumo.comm.register()
    found: dict[str, Any] = {}
    for name in names:
        begin = time.monotonic()
        found[name] = run_case(folder, name, rank, size)
        found[name]["seconds"] = time.monotonic() - begin
        (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

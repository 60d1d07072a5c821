"""Trainings that are saved and go on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint

from comm_trainings.case import Ranks, case, dcp, dist
from comm_trainings.fsdp import fsdp_steps, full, line, moments, sharded
from comm_trainings.models import distance


def checkpointed(ranks: Ranks, save: Callable[[Any, Path], None], load: Callable[[Any, Path], None]) -> dict[str, Any]:
    """Save a sharded model with its optimizer, and load them into others; safetensors hold the model alone."""
    model = sharded(line(ranks))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fsdp_steps(model, optimizer, ranks, range(2))
    path = ranks.folder / sys._getframe(1).f_code.co_name
    save((model, optimizer), path)
    dist.barrier()
    other = sharded(line(ranks))
    other_optimizer = torch.optim.AdamW(other.parameters(), 0.01)
    apart = distance(full(other), full(model))
    load((other, other_optimizer), path)
    return {
        "files": len(list(path.iterdir())),
        "apart": apart,
        "difference": distance(full(other), full(model)),
        "moments": distance(moments(other_optimizer), moments(optimizer)) if other_optimizer.state else None,
    }


def sharded_state(trained: Any) -> dict[str, Any]:
    """The state of a model and its optimizer, each rank with its shards."""
    from torch.distributed.checkpoint import state_dict as states

    model, optimizer = states.get_state_dict(*trained)
    return {"model": model, "optimizer": optimizer}


def load_sharded(trained: Any, path: Path) -> None:
    """Load the shards of a model and its optimizer."""
    from torch.distributed.checkpoint import state_dict as states

    state = sharded_state(trained)
    dcp.load(state, checkpoint_id=path)
    states.set_state_dict(*trained, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@case
def checkpoint(ranks: Ranks) -> dict[str, Any]:

    return checkpointed(ranks, lambda trained, path: dcp.save(sharded_state(trained), checkpoint_id=path), load_sharded)


@case
def checkpoint_in_the_background(ranks: Ranks) -> dict[str, Any]:
    """Saved by a thread, over a group of its own, while the training's collectives go on."""

    group = dist.new_group()

    def save(trained: Any, path: Path) -> None:
        saving: Any = dcp.async_save(sharded_state(trained), checkpoint_id=path, process_group=group)
        for _ in range(50):
            dist.all_reduce(torch.ones(1000))
        saving.result(timeout=60)

    return checkpointed(ranks, save, load_sharded)


@case
def checkpoint_in_safetensors(ranks: Ranks) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as states

    def save(trained: Any, path: Path) -> None:
        path.mkdir(exist_ok=True)
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(states.get_model_state_dict(trained[0]), storage_writer=writer)

    def load(trained: Any, path: Path) -> None:
        state = states.get_model_state_dict(trained[0])
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        states.set_model_state_dict(trained[0], state)

    return checkpointed(ranks, save, load)

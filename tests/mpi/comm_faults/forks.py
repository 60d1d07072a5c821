"""Cases of failure: forks."""

import importlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from comm_faults.case import LARGE, Rank, backend, case, dist, ones, works


class Squares(torch.utils.data.Dataset[torch.Tensor]):
    """Numbers and their squares, with what a collective does in the worker that makes them."""

    def __getitem__(self, index: int) -> Any:
        try:
            dist.all_reduce(ones())
            said = "done"
        except Exception as error:
            said = str(error)
        return index * index, said

    def __len__(self) -> int:
        return 8


def in_fork(function: Callable[[], Any], limit_s: int = 6) -> dict[str, Any]:
    """What a function raises in a forked child; the child is ended by an alarm where it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit_s)
        said = "done"
        try:
            function()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        return {"status": status, "said": pipe.read()}


@case
def forked_worker(me: Rank) -> None:
    """A data loader forks workers while a group is alive; they work, and collectives in them raise."""
    me.init()
    works()
    flying = dist.all_reduce(ones(LARGE), async_op=True) if me.rank else None
    loader = torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        batches = list(loader)
        me.notes["squares"] = sorted(int(x) for values, _ in batches for x in values)
        me.notes["said"] = sorted({text for _, texts in batches for text in texts})
    if flying is None:
        dist.all_reduce(ones(LARGE))
    else:
        flying.wait()
    works()


@case
def forked_children(me: Rank) -> None:
    """What a forked child does to its parent's group: every call raises, and leaving or destroying harms nobody."""
    me.init()
    group = dist.new_group()
    works(group)
    pending = dist.irecv(ones(), (me.rank + 1) % me.size)
    future = pending.get_future()
    kept = backend()
    time.sleep(0.5)
    attempts: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(ones()),
        "async": lambda: dist.all_reduce(ones(), async_op=True),
        "send": lambda: dist.send(ones(), (me.rank + 1) % me.size),
        "wait": lambda: pending.wait(),
        "new_group": lambda: dist.new_group([me.rank], use_local_synchronization=True),
        "destroy": lambda: dist.destroy_process_group(),
        "abort": lambda: kept.abort(),
        "shutdown": lambda: kept.shutdown(),
        "future": lambda: future.done(),
        "leave": lambda: importlib.import_module("pneumo.comm._native").shutdown(),
    }
    for name, attempt in attempts.items():
        me.notes[name] = in_fork(attempt)
    me.meet("forked")
    dist.send(ones(), (me.rank - 1) % me.size)
    pending.wait()
    works(group)
    works()

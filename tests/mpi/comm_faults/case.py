"""What a case of failure is, and what all of them use."""

import datetime
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import _set_pg_timeout

dist: Any = distributed  # whose annotations leave out half of what it exports
LIMIT_S = 90  # of a case, after which its process counts as hanging and is killed
LONG_S = 60  # a timeout that no case reaches
LARGE = 1 << 20  # elements: several chunks
CASES: dict[str, Callable[["Rank"], None]] = {}


def case(function: Callable[["Rank"], None]) -> Callable[["Rank"], None]:
    """Make a function known as a case under its name."""
    CASES[function.__name__] = function
    return function


class Rank:
    """One rank in one case: the store by which it meets the others, and what it notes for the test."""

    def __init__(self, folder: Path, name: str, rank: int, size: int) -> None:
        self.folder, self.name, self.rank, self.size = folder, name, rank, size
        self.notes: dict[str, Any] = {}
        self.starts = 0
        self.store = dist.FileStore(str(folder / f"{name}.meet"), size)

    def meet(self, where: str, ranks: Sequence[int] | None = None) -> None:
        """Wait, by way of the store, until all these ranks (all) are here."""
        self.store.set(f"{where}/{self.rank}", "here")
        keys = [f"{where}/{rank}" for rank in ranks or range(self.size)]
        self.store.wait(keys, datetime.timedelta(seconds=LONG_S))

    def init(self, timeout_s: float = LONG_S) -> None:
        """Make the default process group, as a new one at every call."""
        self.starts += 1
        store = dist.FileStore(str(self.folder / f"{self.name}.store{self.starts}"), self.size)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("pneumo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def caught(self, what: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Note how a call ended ("done", or the class and the text of what it raised), and the seconds it took."""
        begin = time.monotonic()
        try:
            function(*args, **options)
            ended, text = "done", ""
        except (Exception, KeyboardInterrupt) as error:
            ended, text = type(error).__name__, str(error)
        self.notes[what] = {"ended": ended, "text": text, "seconds": time.monotonic() - begin}

    def write(self, extra: dict[str, Any]) -> None:
        """Write what is known so far; the process may be killed at any time afterwards."""
        path = self.folder / f"{self.name}.{self.rank}.json"
        path.with_suffix(".new").write_text(json.dumps({"notes": self.notes, "pid": os.getpid(), **extra}))
        path.with_suffix(".new").rename(path)


def ones(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of ones."""
    return torch.ones(count, dtype=dtype)


def works(group: Any = None) -> None:
    """A group does collectives, small and large, and does them right."""
    for count in (4, LARGE):
        tensor = ones(count)
        dist.all_reduce(tensor, group=group)
        size = dist.get_world_size(group)
        if not bool((tensor == size).all()):
            raise AssertionError(f"all_reduce of {count} ones over {size} ranks gave {tensor.tolist()[:4]}")


def begin(me: Rank) -> None:
    """Make the default process group, and use it."""
    me.init()
    works()


def patient(group: Any, timeout_s: float) -> None:
    """Give a group another timeout, now that it stands: none should run out while it is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def future_of(work: Any) -> Callable[[], Any]:
    """What waits for a Work by way of its Future."""
    future = work.get_future()
    return lambda: future.wait()


def backend(group: Any = None) -> Any:
    """The backend behind a process group."""
    group = group or dist.group.WORLD
    return group._get_backend(torch.device("cpu"))

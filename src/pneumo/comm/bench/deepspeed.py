"""DeepSpeed's allreduce over shared memory, where DeepSpeed is installed; it is compiled when it is first used."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pneumo import collective
from pneumo.comm.bench.buffers import Slot
from pneumo.comm.bench.cases import Op
from pneumo.comm.bench.libraries import Absent, Call, Library
from pneumo.errors import PneumoError

DTYPES = ("float32", "bfloat16", "float16")  # for others it returns without a word and without a sum
# Its source asks for AVX-512 whatever the CPU has, so parts of it end the process on others: a process alone tries.
_TRIAL = f"""
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False).initialize(1, 0)
for name in {DTYPES}:
    for count in (1000, 1000000):
        torch.ops.deepspeed.inference_all_reduce_(torch.ones(count, dtype=getattr(torch, name)))
    print("works:", name, flush=True)
"""


class DeepSpeed(Library):
    """DeepSpeed's operation for tensor-parallel inference, for ranks of one node."""

    def __init__(self, name: str, comm: Any) -> None:
        super().__init__(name)
        port = comm.bcast(os.getpid())  # it goes into the name of its shared memory
        try:
            self._works = collective.from_first(comm, lambda: _trial(port))
            os.environ.update(_settings(comm.size, port))
            collective.gather(comm, lambda: _load().initialize(comm.size, comm.rank))
        except PneumoError as error:
            raise Absent(f"its operation cannot be loaded ({' '.join(str(error).split())[-200:]})") from None
        _forget(port, comm.rank)

    def call(self, op: Op, dtype: str, slot: Slot) -> Call:
        """Return the operation, in place."""
        if op.name != "allreduce" or dtype not in DTYPES:
            raise Absent("DeepSpeed has only an allreduce, of float32, float16 and bfloat16")
        if dtype not in self._works:
            raise Absent(f"DeepSpeed's allreduce of {dtype} does not work on this CPU")
        return partial(torch.ops.deepspeed.inference_all_reduce_, slot.input)


def _trial(port: int) -> list[str]:
    """The types for which the operation works here, tried in a process of one rank; raises PneumoError if for none."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_"))}
    done = subprocess.run(
        [sys.executable, "-c", _TRIAL], env={**inherited, **_settings(1, port)}, capture_output=True, text=True
    )
    _forget(port, 0)
    works = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("works:")]
    if not works:
        raise PneumoError(done.stderr or f"exit code {done.returncode}")
    return works


def _settings(ranks: int, port: int) -> dict[str, str]:
    """The variables, torchrun's, from which it takes the number of local ranks and the name of its memory."""
    return {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _load() -> Any:
    return import_module("deepspeed.ops.op_builder.cpu").ShareMemCommBuilder().load(verbose=False)


def _forget(port: int, rank: int) -> None:
    """Unlink its shared memory, which all have open by now, and which it never removes itself."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_{rank}"):
        left.unlink(missing_ok=True)

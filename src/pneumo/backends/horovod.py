"""Horovod over MPI: its DistributedOptimizer, started on the communicator of the training's ranks."""

from bisect import bisect_right
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

from pneumo.comm import probe

_PROBE = probe.load()  # before Horovod's library: its calls of MPI are bound when it is loaded

import horovod.torch as hvd  # noqa: E402
from torch import nn  # noqa: E402

from pneumo.backends.base import Backend, MakeOptimizer  # noqa: E402
from pneumo.timing.record import Collective, Source  # noqa: E402
from pneumo.timing.responses import assign  # noqa: E402

FOUND = "its tensors found by their bytes"
LOST = "responses that travelled after the last known one of the step and are lost, the probe's ring being full"
NOT_FOUND = "its tensors could not be found: enqueued is the step's last tensor, or the start"


class Horovod(Backend):
    """Replicated parameters; each gradient is handed to Horovod's thread as soon as it is ready."""

    def resume(self) -> None:
        """Start Horovod on this training's ranks: it serves one communicator at a time."""
        super().resume()
        hvd.init(comm=self.place.comm)

    def pause(self) -> None:
        """Stop Horovod, so that the next training can start it on other ranks."""
        hvd.shutdown()
        super().pause()

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, parts: Sequence[nn.Module]) -> None:
        """Wrap the optimizer; gradients are summed over the ranks."""
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        inner = make_optimizer(model.parameters())
        optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), op=hvd.Sum)
        responses = _Responses(f"{self.place.comm.size} ranks")
        enqueue = optimizer._allreduce_grad_async

        def enqueue_and_note(parameter: nn.Parameter) -> Any:
            responses.enqueued(parameter)
            return enqueue(parameter)

        optimizer._allreduce_grad_async = enqueue_and_note
        self.recorder.source = responses
        self.model, self.optimizer = model, optimizer

    def synchronize(self) -> None:
        """Wait for all gradients. Horovod polls: what it sleeps after the last one is part of the wait."""
        self.recorder.mark()
        self.optimizer.synchronize()  # type: ignore[attr-defined]
        self.recorder.delay()
        self.recorder.waited(to_the_end=True)

    def step(self) -> None:
        """Update, without Horovod's own waiting."""
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad()  # Horovod's takes no argument; torch's default frees the gradients


class _Responses(Source):
    """Horovod's fused responses as collectives: when they travelled tells the probe, what was in them their bytes.

    A rank arrives at a response when it has enqueued the last of its tensors; from there until the response travels
    Horovod negotiates, on this rank with the others. What travels is the same on all ranks, and so are the numbers and
    bytes of the records, whether the tensors of a response could be found out on this rank or not. Responses that the
    probe had no place for are a step's last ones: their numbers are left out, by which the study tells that they are
    lost.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._tensors: list[tuple[int, int, str]] = []  # enqueued, bytes, dtype
        self._seq = 0
        self._dropped = 0
        self._lost()  # those before count for nobody

    def enqueued(self, tensor: Any) -> None:
        """Note that a tensor is handed over now; one without elements is none to look for in what has travelled."""
        if size := tensor.numel() * tensor.element_size():
            self._tensors.append((perf_counter_ns(), size, str(tensor.dtype).removeprefix("torch.")))

    def take(self, *, ended: bool = False) -> list[Collective]:
        """Return the responses of the tensors that were enqueued since the last call: all of them have come back."""
        tensors, self._tensors = self._tensors, []
        rows = [row for row in _PROBE.take().tolist() if row[2]] if _PROBE is not None else []
        lost = self._lost()
        if not tensors:
            return []
        arrivals, sizes, dtypes = zip(*tensors, strict=True)
        if whole := sum(sizes) == sum(row[2] for row in rows):
            lost = 0  # they had no bytes
        if not whole and not (lost and rows):
            untold = "what travelled is not what was enqueued: the tensors of a step are one"
            found = [self._made(dtypes[0], sum(sizes), arrivals[-1], None, None, untold)]
            self._seq += max(lost - 1, 0)
            return found
        known = [row[2] for row in rows]
        parts = assign(sizes, known, [bisect_right(arrivals, row[0]) for row in rows]) if whole else None
        if parts is None:
            how = f"{NOT_FOUND}; {LOST}: {lost}" if lost else NOT_FOUND
            found = [
                self._made(dtypes[0], size, min(arrivals[-1], begin), begin, end, how) for begin, end, size, _ in rows
            ]
            self._seq += lost
            return found
        return [
            self._made(dtypes[part[-1]], size, arrivals[part[-1]], begin, end, FOUND)
            for part, (begin, end, size, _) in zip(parts, rows, strict=True)
        ]

    def _lost(self) -> int:
        """How many calls the probe had no place for since the last time."""
        before, self._dropped = self._dropped, _PROBE.dropped if _PROBE is not None else 0
        return self._dropped - before

    def _made(
        self, dtype: str, size: int, arrived: int, started: int | None, finished: int | None, bound: str
    ) -> Collective:
        made = Collective(self._seq, "allreduce", dtype, size, self._group, arrived, started, finished)
        made.bounded(bound)
        self._seq += 1
        return made

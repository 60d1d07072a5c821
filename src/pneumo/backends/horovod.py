"""Horovod over MPI: its DistributedOptimizer, started on the communicator of the training's ranks."""

from time import perf_counter_ns
from typing import Any

from pneumo.comm import probe

_PROBE = probe.load()  # before Horovod's library: its calls of MPI are bound when it is loaded

import horovod.torch as hvd  # noqa: E402
from torch import nn  # noqa: E402

from pneumo.backends.base import Backend, MakeOptimizer  # noqa: E402
from pneumo.timing.record import Collective  # noqa: E402
from pneumo.timing.responses import assign  # noqa: E402


class Horovod(Backend):
    """Replicated parameters; each gradient is handed to Horovod's thread as soon as it is ready."""

    def resume(self) -> None:
        """Start Horovod on this training's ranks: it serves one communicator at a time."""
        hvd.init(comm=self.place.comm)

    def pause(self) -> None:
        """Stop Horovod, so that the next training can start it on other ranks."""
        hvd.shutdown()

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
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

    def step(self) -> None:
        """Wait for all gradients, then update. Horovod polls: what it sleeps after the last one is part of the wait."""
        self.recorder.mark()
        self.optimizer.synchronize()  # type: ignore[attr-defined]
        self.recorder.delay()
        self.recorder.waited(to_the_end=True)
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad()  # Horovod's takes no argument; torch's default frees the gradients


class _Responses:
    """Horovod's fused responses as collectives: when they travelled tells the probe, what was in them their bytes.

    A rank arrives at a response when it has enqueued the last of its tensors; from there until the response travels
    Horovod negotiates, on this rank with the others.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._tensors: list[tuple[int, int, str]] = []  # enqueued, bytes, dtype
        self._seq = 0

    def enqueued(self, tensor: Any) -> None:
        """Note that a tensor is handed over now."""
        size, dtype = tensor.numel() * tensor.element_size(), str(tensor.dtype).removeprefix("torch.")
        self._tensors.append((perf_counter_ns(), size, dtype))

    def take(self, *, ended: bool = False) -> list[Collective]:
        """Return the responses of the tensors that were enqueued since the last call: all of them have come back."""
        tensors, self._tensors = self._tensors, []
        travelled = _PROBE.take() if _PROBE is not None else ()
        if not tensors:
            return []
        parts = assign([size for _, size, _ in tensors], [int(row[2]) for row in travelled])
        if parts is None:
            return [self._made(tensors, None, "its tensors' calls could not be told apart: all of the step are one")]
        return [
            self._made([tensors[i] for i in part], row, "its tensors found by their bytes")
            for part, row in zip(parts, travelled, strict=True)
        ]

    def _made(self, tensors: list[tuple[int, int, str]], row: Any, bound: str) -> Collective:
        started, finished = (None, None) if row is None else (int(row[0]), int(row[1]))
        size = sum(one[1] for one in tensors)
        made = Collective(self._seq, "allreduce", tensors[0][2], size, self._group, max(tensors)[0], started, finished)
        made.bounded(bound)
        self._seq += 1
        return made

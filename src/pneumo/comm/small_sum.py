"""Small sums over the ranks of a training: statistics, normalisers, counts; the same way under every backend."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pneumo.comm.records import GroupRecords
from pneumo.timing.record import Issue, Recorder

GROUP = "small"  # what the records of these sums are marked with


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum that is under way: `request` is what is waited for, None where there is nothing to wait for."""

    tensor: torch.Tensor
    request: Any = None

    def wait(self) -> torch.Tensor:
        """Return the tensor when it is summed."""
        if self.request is not None:
            self.request.wait()
        return self.tensor


class SmallSum:
    """Sums small tensors over the ranks of a communicator, in place.

    It goes through the shared memory of a process group of `pneumo`, and through MPI where that is None, whatever
    moves the gradients; so statistics, normalisers and counts cost the same under every backend.
    """

    def __init__(self, comm: Any, group: Any = None) -> None:
        self._comm, self.group, self.ranks = comm, group, comm.size

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous CPU tensor of any shape over the ranks; returns it. Collective and blocking."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        elif self._comm.size > 1:
            from mpi4py import MPI

            self._comm.Allreduce(MPI.IN_PLACE, tensor.numpy(), MPI.SUM)
        return tensor

    def begin(self, tensor: torch.Tensor) -> Sum:
        """Begin to sum a tensor, which is not to be touched until the sum has been waited for. Collective."""
        if self.group is not None:
            return Sum(tensor, dist.all_reduce(tensor, group=self.group, async_op=True))
        if self._comm.size > 1:
            from mpi4py import MPI

            return Sum(tensor, self._comm.Iallreduce(MPI.IN_PLACE, tensor.numpy(), MPI.SUM))
        return Sum(tensor)


class TimedSum:
    """The small sums of a training: what blocks in them is a part of its phase `comm`, and they are recorded."""

    def __init__(self, small_sum: SmallSum, recorder: Recorder) -> None:
        self._sum, self._recorder = small_sum, recorder
        if small_sum.group is not None:
            recorder.small = GroupRecords(small_sum.group, GROUP)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """As SmallSum; a rank alone is not blocked."""
        if self._sum.ranks == 1:
            return self._sum(tensor)
        with self._recorder.blocking(self._recorder.small):
            return self._sum(tensor)

    def begin(self, tensor: torch.Tensor) -> "TimedPending":
        """As SmallSum."""
        with self._recorder.issuing() as issue:
            pending = self._sum.begin(tensor)
        return TimedPending(pending, self._recorder, issue)


@dataclass(frozen=True, slots=True)
class TimedPending:
    """A sum that is under way; its wait is a part of the phase `comm`."""

    pending: Sum
    recorder: Recorder
    issue: Issue

    def wait(self) -> torch.Tensor:
        """Return the tensor when it is summed."""
        with self.recorder.waiting(self.issue, self.recorder.small):
            return self.pending.wait()

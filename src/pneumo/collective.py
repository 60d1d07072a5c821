"""MPI calls for ranks that may wait long: they sleep instead of spinning, and an error of one is an error of all.

Every function here is collective: all ranks of the communicator call it, in the same order. MPI's own blocking calls
poll without pause, which takes the cores from the ranks that still work wherever there are more ranks than cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from pneumo.errors import PneumoError, Refused

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")

_FIRST_NAP_S, _LONGEST_NAP_S = 0.0005, 0.02

_waited_s = 0.0  # of this process, in all


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What one rank brings: a value, or the text and kind of its error (an exception itself may not be picklable)."""

    value: T | None
    error: str | None
    refused: bool


def wait_for_all(comm: Intracomm) -> None:
    """Return once every rank has called; meanwhile sleep, at most 20 ms longer than necessary."""
    global _waited_s
    begin = time.monotonic()
    request, nap_s = comm.Ibarrier(), _FIRST_NAP_S
    while not request.Test():
        time.sleep(nap_s)
        nap_s = min(2 * nap_s, _LONGEST_NAP_S)
    _waited_s += time.monotonic() - begin


def waited_s() -> float:
    """Return how long this process has waited for others here, in all."""
    return _waited_s


def gather(comm: Intracomm, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and return all results, by rank, on every rank.

    Raises the error of the lowest rank that failed on all ranks: Refused if it was that, else PneumoError.
    """
    outcome, cause = _attempt(work, comm.rank)
    wait_for_all(comm)
    outcomes: list[_Outcome[T]] = comm.allgather(outcome)
    _raise_first(outcomes, cause)
    return [cast(T, outcome.value) for outcome in outcomes]


def from_first(comm: Intracomm, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank; its error is raised on every rank, as by `gather`."""
    outcome, cause = _attempt(work, 0) if comm.rank == 0 else (None, None)
    wait_for_all(comm)
    shared: _Outcome[T] = comm.bcast(outcome, root=0)
    _raise_first([shared], cause)
    return cast(T, shared.value)


def on_first(comm: Intracomm, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 and return its result there, None elsewhere; its error is raised on every rank."""
    results: list[T] = []
    gather(comm, lambda: results.append(work()) if comm.rank == 0 else None)
    return results[0] if results else None


def _attempt(work: Callable[[], T], rank: int) -> tuple[_Outcome[T], Exception | None]:
    try:
        return _Outcome(work(), None, False), None
    except PneumoError as error:
        return _Outcome(None, str(error), isinstance(error, Refused)), error
    except Exception as error:
        return _Outcome(None, f"rank {rank} failed with {type(error).__name__}: {error}", False), error


def _raise_first(outcomes: Sequence[_Outcome[T]], cause: Exception | None) -> None:
    failed = next((outcome for outcome in outcomes if outcome.error is not None), None)
    if failed is not None:
        raise (Refused if failed.refused else PneumoError)(failed.error) from cause

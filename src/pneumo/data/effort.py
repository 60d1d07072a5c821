"""What the ranks' time goes to while they preprocess: images, Dask around them, waiting for each other, and the rest.

The sums are of this process as a whole: images are read in a thread of Dask's, which knows nothing of who measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pneumo import collective
from pneumo.study.schema import Effort

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")

_images_s = _dask_s = 0.0


class _Sums(NamedTuple):
    """Seconds of this process: the clock, and what has been counted so far."""

    now: float
    images: float
    dask: float
    waiting: float


def measured(comm: Intracomm, function: Callable[[], T]) -> tuple[T, list[Effort]]:
    """Call what preprocesses; returns its result and, by rank, what each rank's time went to meanwhile. Collective."""
    begin = _sums()
    result = function()
    total, images, dask, waiting = (after - before for after, before in zip(_sums(), begin, strict=True))
    mine = Effort(data_s=images, dask_s=dask - images, comm_s=waiting, other_s=total - dask - waiting)
    return result, collective.gather(comm, lambda: mine)


@contextmanager
def on_images() -> Iterator[None]:
    """Count what happens inside as work on images; in one thread at a time, and while `in_dask` lasts."""
    global _images_s
    begin = time.monotonic()
    try:
        yield
    finally:
        _images_s += time.monotonic() - begin


@contextmanager
def in_dask() -> Iterator[None]:
    """Count what happens inside as Dask's, but for waiting by MPI and for images."""
    global _dask_s
    begin, waited = time.monotonic(), collective.waited_s()
    try:
        yield
    finally:
        _dask_s += time.monotonic() - begin - (collective.waited_s() - waited)


def sentence(efforts: Sequence[Effort]) -> str:
    """What all ranks' time went to, in words."""
    parts = {
        "images": sum(effort.data_s for effort in efforts),
        "Dask around them": sum(effort.dask_s for effort in efforts),
        "waiting for other ranks": sum(effort.comm_s for effort in efforts),
        "other": sum(effort.other_s for effort in efforts),
    }
    whole = sum(parts.values())
    shares = ", ".join(f"{100 * part / whole:.0f} % {name}" for name, part in parts.items() if part > 0.005 * whole)
    return f"{whole:.1f} rank-seconds on {len(efforts)} rank(s): {shares}"


def _sums() -> _Sums:
    return _Sums(time.monotonic(), _images_s, _dask_s, collective.waited_s())

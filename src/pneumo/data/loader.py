"""From the store to batches: an order that depends on seed and epoch alone, and each rank's share of every batch.

Nothing here has state: a batch is a function of (seed, step, rank, world_size), so that a run can resume at any step
and any number of ranks sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from pneumo.data.geometry import to_fractions
from pneumo.errors import Refused

if TYPE_CHECKING:
    from pneumo.data.store import Store

_MEAN, _DEVIATION = 0.5, 0.25
_ORDER: Final = 0x0DE5  # keeps the stream of the order apart from those of the augmentation, which have a sample in it

Pictures = npt.NDArray[np.uint8]
Boxes = tuple[npt.NDArray[np.float32], ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a global batch, possibly empty: images float32 (b, 1, size, size), labels float32 (b,),
    samples int64 (b,) positions in the index, and `total`, the images in the whole global batch.

    The global batch consists of groups, of which each rank has the same number: `lengths` are the images in each of
    this rank's, in order (together b), and `groups` counts those of the whole global batch that have any image.
    `boxes` is empty unless it was asked for, else float32 (k, 4) for each image: x, y, width and height in fractions
    of the edge. An image keeps its label where augmentation has moved the last of its boxes out.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    samples: npt.NDArray[np.int64]
    total: int
    lengths: tuple[int, ...]
    groups: int
    boxes: Boxes = ()


def shares(count: int, world_size: int) -> list[slice]:
    """Cut range(count) into one contiguous slice for each rank; lengths differ by at most one, in no simple order.

    Rank r has among N what ranks m * r to m * r + m - 1 have together among m * N.
    """
    edges = [rank * count // world_size for rank in range(world_size + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def scale(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return what a model sees of uint8 pictures of any shape: float32, black is -2 and white is 2."""
    return _SCALED[pictures]


_SCALED: Final = ((np.arange(256) / 255 - _MEAN) / _DEVIATION).astype(np.float32)


class Loader:
    """Training batches: every position once an epoch, in an order of the epoch's own; the last batch may be short.

    `positions` are positions in `store.index`, in any order: only their set matters. Epoch e consists of the steps
    e * steps_per_epoch to (e + 1) * steps_per_epoch - 1. With `boxes` the batches have them, and augmentation also
    scales and shifts. A global batch is cut into `groups` groups (as many as ranks, unless it is given), the same for
    any number of ranks that divides it. Raises Refused if there is nothing to train on, or the ranks cannot share the
    groups.
    """

    def __init__(
        self,
        store: Store,
        positions: npt.NDArray[np.int64],
        *,
        size: int,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        augment: bool,
        boxes: bool = False,
        groups: int | None = None,
    ) -> None:
        if len(positions) == 0 or global_batch < 1:
            raise Refused(f"{len(positions)} images in batches of {global_batch} are nothing to train on")
        self._groups = world_size if groups is None else groups
        if self._groups < 1 or self._groups % world_size:
            raise Refused(f"{groups} groups of a batch cannot be divided among {world_size} ranks")
        self._reader = _Reader(store, size, boxes)
        self._positions = np.sort(np.asarray(positions, np.int64))
        self._global_batch = global_batch
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._augment = augment
        self._epoch_order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The number of global batches in an epoch."""
        return -(-len(self._positions) // self._global_batch)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the order of all samples in an epoch: int64 (n,) positions in the index, read-only."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:  # only a cache: one epoch's, since it is asked
            rng = np.random.default_rng((self._seed, epoch, _ORDER))
            order = rng.permutation(self._positions)
            order.flags.writeable = False
            self._epoch_order = epoch, order
        return self._epoch_order[1]

    def batch(self, step: int) -> Batch:
        """Return this rank's share of the global batch of a step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        whole = self.order(epoch)[within * self._global_batch : (within + 1) * self._global_batch]
        each = self._groups // self._world_size
        mine = shares(len(whole), self._groups)[self._rank * each : (self._rank + 1) * each]
        return self._reader.batch(
            whole[mine[0].start : mine[-1].stop],
            total=len(whole),
            lengths=tuple(part.stop - part.start for part in mine),
            groups=min(self._groups, len(whole)),  # shares of fewer images than groups have one or none
            key=(self._seed, epoch) if self._augment else None,
        )


def evaluation(
    store: Store,
    positions: npt.NDArray[np.int64],
    *,
    size: int,
    rank: int,
    world_size: int,
    batch: int,
    boxes: bool = False,
) -> Iterator[Batch]:
    """Yield batches of this rank's share of the positions, in their order, as they are in the store.

    Over all ranks every position occurs once. `batch` is the size of a rank's batch, which is a group of its own; with
    `boxes` the batches have them. Every rank gets ceil(ceil(n / world_size) / batch) batches, since the forward pass of
    a sharded model is collective: those of a rank with fewer images end with empty ones.
    """
    reader = _Reader(store, size, boxes)
    parts = [np.asarray(positions, np.int64)[part] for part in shares(len(positions), world_size)]
    for begin in range(0, max(map(len, parts)), batch):
        lengths = [len(part[begin : begin + batch]) for part in parts]
        yield reader.batch(
            parts[rank][begin : begin + batch],
            total=sum(lengths),
            lengths=(lengths[rank],),
            groups=sum(map(bool, lengths)),
            key=None,
        )


class _Reader:
    """Reads samples from the store by their position in the index, with their boxes if they are asked for."""

    def __init__(self, store: Store, size: int, boxes: bool) -> None:
        self._pictures: Pictures = store.images(size)
        self._rows = store.index["row"].to_numpy(np.int64)
        self._labels = store.index["label"].to_numpy(np.float32)
        self._patients: list[str] = store.index["patient"].tolist()
        columns = [store.index[name].tolist() for name in ("boxes", "rows", "columns")] if boxes else []
        self._originals = list(zip(*columns, strict=True)) if boxes else None

    def batch(
        self,
        samples: npt.NDArray[np.int64],
        *,
        total: int,
        lengths: tuple[int, ...],
        groups: int,
        key: tuple[int, int] | None,
    ) -> Batch:
        """Return a batch of these samples, augmented where `key` gives the seed and the epoch."""
        pictures = self._pictures[self._rows[samples]]
        boxes = self._boxes(samples)
        if key is not None:
            boxes = self._augment(pictures, boxes, samples, key)
        images = scale(pictures)[:, None]
        return Batch(images, self._labels[samples], samples, total, lengths, groups, boxes)

    def _boxes(self, samples: npt.NDArray[np.int64]) -> Boxes:
        if self._originals is None:
            return ()
        return tuple(to_fractions(*self._originals[sample]) for sample in samples)

    def _augment(self, pictures: Pictures, boxes: Boxes, samples: npt.NDArray[np.int64], key: tuple[int, int]) -> Boxes:
        """Augment the pictures in place; returns the boxes that are left."""
        from pneumo.data.augment import augment, augment_with_boxes

        keys = [(*key, self._patients[sample]) for sample in samples]
        if self._originals is None:
            for picture, own in zip(pictures, keys, strict=True):
                picture[...] = augment(picture, own)
            return ()
        left = []
        for picture, before, own in zip(pictures, boxes, keys, strict=True):
            picture[...], after = augment_with_boxes(picture, before, own)
            left.append(after)
        return tuple(left)

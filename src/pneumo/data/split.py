"""Which patients train, which calibrate the threshold, and which validate: by seed and patient ids alone.

The order of rows plays no part, nor does which rank asks. Where a mapping says which images show the same person, a
person's images stay together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from pneumo.errors import Refused

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Split:
    """Three disjoint sets of positions in the index, int64, ascending.

    person: int64, for each position of the index a number that those of these sets which show one person share; None
    where nothing tells persons from images. It is a position itself, and says nothing of whom.
    """

    train: npt.NDArray[np.int64]
    calibrate: npt.NDArray[np.int64]
    validate: npt.NDArray[np.int64]
    person: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """The images of one person, as positions in the index; its label is 1 if any of them has an opacity."""

    rank: bytes
    label: int
    positions: tuple[int, ...]


def split(
    index: pd.DataFrame,
    *,
    seed: int,
    subset: Literal["balanced", "all"],
    validate: float = 0.5,
    calibrate: float = 0.1,
    mapping: Mapping[str, str] | None = None,
) -> Split:
    """Divide the patients of `store.index` into parts, each with the label's proportion of the whole.

    `subset` "balanced" takes as many negatives as there are positives (or the other way round), the two classes of
    negatives in their natural proportion; "all" takes everyone. `validate` and `calibrate` are fractions of what is
    taken. `mapping` gives the person of an image by patient id; an id that is not in it is a person of its own.
    Raises Refused if a part would have no image, or a label none at all.
    """
    patients: list[str] = index["patient"].tolist()
    ranks = {patient: _rank(seed, patient) for patient in patients}
    taken = range(len(index)) if subset == "all" else _balanced(index, [ranks[patient] for patient in patients])
    labels: list[int] = index["label"].tolist()
    people: dict[tuple[bool, str], list[int]] = {}
    for position in taken:
        patient = patients[position]
        known = mapping is not None and patient in mapping
        # An image's id and a person's are names of different things: a pair keeps them apart.
        who = mapping[patient] if mapping is not None and known else patient
        people.setdefault((known, who), []).append(position)
    groups = [
        _Group(_rank(seed, who), max(labels[at] for at in positions), tuple(positions))
        for (_, who), positions in people.items()
    ]
    person = None
    if mapping is not None:
        person = np.arange(len(index), dtype=np.int64)
        for positions in people.values():
            person[positions] = positions[0]
    return replace(_divided(groups, validate, calibrate), person=person)


def _divided(groups: Sequence[_Group], validate: float, calibrate: float) -> Split:
    """Deal the groups of each label, in the order of their ranks, to the parts."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in (0, 1):
        same = sorted((group for group in groups if group.label == label), key=lambda group: group.rank)
        images = sum(len(group.positions) for group in same)
        edges = (round(images * validate), round(images * validate) + round(images * calibrate))
        dealt = 0
        for group in same:
            # A person goes where their middle image falls; with one image each, parts are exact.
            middle = dealt + len(group.positions) / 2
            parts[sum(middle > edge for edge in edges)].extend(group.positions)
            dealt += len(group.positions)
    validating, calibrating, training = (np.sort(np.asarray(part, np.int64)) for part in parts)
    for name, part in (("train", training), ("calibrate", calibrating), ("validate", validating)):
        if len(part) == 0:
            raise Refused(f"no patient is left to {name}: give more data, or other fractions of it")
    return Split(training, calibrating, validating)


def _balanced(index: pd.DataFrame, ranks: Sequence[bytes]) -> list[int]:
    """Return the positions of as many negatives as positives, classes within a label in their proportion."""
    strata: dict[tuple[int, str], list[int]] = {}
    detailed = index["detailed"].fillna("").tolist()
    for position, stratum in enumerate(zip(index["label"].tolist(), detailed, strict=True)):
        strata.setdefault(stratum, []).append(position)
    sizes = {label: sum(len(members) for key, members in strata.items() if key[0] == label) for label in (0, 1)}
    wanted = min(sizes.values())
    if wanted == 0:
        raise Refused(f"there are {sizes[1]} positive and {sizes[0]} negative patients: a balanced subset needs both")
    taken: list[int] = []
    for label in (0, 1):
        keys = sorted(key for key in strata if key[0] == label)
        for key, count in zip(keys, _proportional([len(strata[key]) for key in keys], wanted), strict=True):
            taken += sorted(strata[key], key=lambda position: ranks[position])[:count]
    return taken


def _proportional(sizes: Sequence[int], wanted: int) -> list[int]:
    """Divide `wanted` in the proportion of `sizes` by largest remainders; the earlier one wins a tie."""
    exact = [wanted * size / sum(sizes) for size in sizes]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: wanted - sum(counts)]:
        counts[i] += 1
    return counts


def _rank(seed: int, name: str) -> bytes:
    """Return a patient's place in the lot of this seed: a hash, so that it depends on nobody else."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()

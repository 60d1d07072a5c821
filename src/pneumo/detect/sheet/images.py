"""The pictures that a result is about: from the cached store, or those of the built-in sample, drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from pneumo import places
from pneumo.data import cache, sample
from pneumo.data.dicom import resize
from pneumo.data.geometry import to_fractions
from pneumo.data.patients import SampleConfig, person
from pneumo.data.store import Damaged, Store, is_sound
from pneumo.detect.files import Picture, read
from pneumo.models import MODELS
from pneumo.study.metrics import is_sample
from pneumo.study.schema import RunFile


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as the model sees it, uint8 (size, size), and its true boxes in pixels of it (t, 4).

    `rows` and `columns` are the original's.
    """

    picture: Picture
    rows: int
    columns: int
    truths: NDArray[np.float64]

    def in_picture(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """From boxes x, y, width, height (k, 4) in pixels of the original to pixels of the picture."""
        return _in_picture(self.picture, boxes, self.rows, self.columns)


def find(run: RunFile, patients: Sequence[str]) -> tuple[dict[str, Shown], str | None]:
    """Return the pictures of these patients, and a sentence where they are not those of the cache.

    None of them is there where the cache has lost them and nobody can draw them again.
    """
    folder = places.picture_cache(Path(found) if (found := run.config.get("cache")) else None)
    size = edge(run)
    store = _cached(folder, run.data.fingerprint, size)
    if store is not None:
        return _of_store(store, size, patients), None
    # No path: the sentence is on a sheet that others are shown.
    gone = "The cache no longer has the preprocessed pictures of this result"
    if is_sample(run) and (drawn := _draw_again(size, patients)).keys() == set(patients):
        return drawn, f"{gone}: those of the built-in sample are drawn again, as this version draws them."
    return {}, f"{gone}, so there are curves and no images; another study of the same data at {size} pixels fills it."


def edge(run: RunFile) -> int:
    """The edge of a result's pictures in pixels."""
    return int(run.config.get("size") or MODELS[run.runs[0].model].usual.size)


def _cached(folder: Path, fingerprint: str, size: int) -> Store | None:
    """The store of this input at this size whose every byte has its checksum; of several the first by name."""
    for path in sorted(folder.glob("store-*")):
        try:
            store = Store.open(path)
        except Damaged:
            continue
        if store.fingerprint == fingerprint and size in store.sizes:
            cache.hold(path)
            if is_sound(path):
                return store
    return None


def _of_store(store: Store, size: int, patients: Sequence[str]) -> dict[str, Shown]:
    pictures, found = store.images(size), {}
    for image in store.index[store.index["patient"].isin(patients)].itertuples():
        picture = np.array(pictures[image.row])
        truths = _in_picture(picture, image.boxes, image.rows, image.columns)
        found[str(image.patient)] = Shown(picture, image.rows, image.columns, truths)
    return found


def _draw_again(size: int, patients: Sequence[str]) -> dict[str, Shown]:
    """Pictures of the built-in sample, on the way of all pictures: as DICOM files, decoded and resized."""
    config, found = SampleConfig(), {}
    places_of = {patient: index for index, patient in enumerate(sample.plan(config))}
    with TemporaryDirectory() as folder:
        for patient in patients:
            if (index := places_of.get(patient)) is None:
                continue
            sample.write_patients(Path(folder), config, index, index + 1)
            whole = read(Path(folder) / sample.IMAGES / f"{patient}.dcm")
            picture, (rows, columns) = resize(whole, size), whole.shape
            truths = _in_picture(picture, person(config, index).boxes, rows, columns)
            found[patient] = Shown(picture, rows, columns, truths)
    return found


def _in_picture(picture: Picture, boxes: object, rows: int, columns: int) -> NDArray[np.float64]:
    fractions = to_fractions(np.asarray(boxes, np.float64), rows, columns)
    return np.asarray(fractions * picture.shape[0], np.float64)

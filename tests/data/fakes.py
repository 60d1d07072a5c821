"""A small store of known content, made without DICOM files or ranks."""

from pathlib import Path

import numpy as np

from pneumo.data import store
from pneumo.data.inspect import Inspection
from pneumo.data.rsna import CLASSES, Patient, Quarantined
from pneumo.data.store import Store

REFUSED = (2, 5)  # rows whose file was no good


def make_store(folder: Path, rows: int = 12, sizes: tuple[int, ...] = (16,)) -> Store:
    """Write and open a store of random pictures, of which the rows REFUSED are left out."""
    rng = np.random.default_rng(rows)
    folder.mkdir()
    patients, inspections = [], []
    for row in range(rows):
        label = row % 2
        boxes = ((1.5, 2.0, 30.0, 40.25), (0.0, 0.0, 1.0, 1.0)) if label else ()
        patients.append(Patient(f"id-{row}", label, CLASSES[2 if label else 0], boxes, Path(f"{row}.dcm")))
        reason = "corrupt" if row in REFUSED else None
        sex, age = (None, None) if row == 0 else ("F", 40 + row)
        inspections.append(Inspection(f"id-{row}", reason, "", sex, age, "PA", 64, 80, str(row)))
    for size in sizes:
        store.create_pictures(folder, rows, size)
        for row in sorted(set(range(rows)) - set(REFUSED)):
            picture = rng.integers(0, 256, (1, size, size), dtype=np.uint8)
            store.write_pictures(folder, rows, size, row, picture)
    store.write_index(folder, patients, inspections)
    refused = [Quarantined(f"id-{row}", f"{row}.dcm", "corrupt", 'with a comma, and "quotes"') for row in REFUSED]
    store.write_quarantine(folder, refused)
    store.complete(folder, "f1", sizes, store.checksums(folder, store.file_names(sizes)))
    return Store.open(folder)

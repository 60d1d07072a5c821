"""The preprocessed pictures on disk: memory-mapped uint8 arrays, an index table, and what was left out.

A store is a folder that is written once and renamed into place when it is complete:

    pictures-<size>.npy   uint8 (rows, size, size), a row for each patient whose table rows are sound; the rows of
                          patients whose file was refused are zero
    index.parquet         the sound patients, in the label table's order
    quarantine.csv        what was left out: patient, file, reason, detail
    store.json            format, fingerprint of the input, size and SHA-256 of the other files

Checksums are hashes over the hashes of blocks, so that many ranks can work them out together and get the same.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt

from pneumo.data.rsna import Patient, Quarantined
from pneumo.errors import PneumoError

if TYPE_CHECKING:
    import pandas as pd

    from pneumo.data.inspect import Inspection

FORMAT: Final = 1
INDEX, QUARANTINE, DESCRIPTION = "index.parquet", "quarantine.csv", "store.json"
BLOCK_BYTES: Final = 1 << 22

Block = tuple[str, int]


class Damaged(PneumoError):  # noqa: N818 -- a finding about a folder
    """The folder holds no complete store; whoever can should build it again."""


class Store:
    """A complete store, opened read-only; `fingerprint` (hexadecimal) is of the input that it was made from."""

    def __init__(self, path: Path, fingerprint: str, sizes: Sequence[int]) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.sizes = tuple(sizes)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store in `path`; raises Damaged unless all its files are there at their full size.

        Contents are not read here: see `checksums`.
        """
        description = describe(path)
        for name, file in description["files"].items():
            try:
                found_bytes = (path / name).stat().st_size
            except OSError:
                found_bytes = -1
            if found_bytes != file["bytes"]:
                raise Damaged(f"{path / name} is incomplete: remove the folder to have it made again")
        return cls(path, description["fingerprint"], description["sizes"])

    def images(self, size: int) -> np.memmap[Any, np.dtype[np.uint8]]:
        """Return the pictures of one size, mapped read-only: uint8 (rows, size, size).

        Index it by the column `row` of `index`. Raises PneumoError if the store has no such size.
        """
        if size not in self.sizes:
            has = ", ".join(map(str, self.sizes))
            raise PneumoError(f"the store {self.path} has no pictures of {size}x{size} (it has {has})")
        return np.load(picture_file(self.path, size), mmap_mode="r")  # type: ignore[no-any-return]

    @cached_property
    def index(self) -> pd.DataFrame:
        """The sound patients in the label table's order: int64 `row` in `images`, `patient`, int8 `label`, `detailed`,
        `sex`, `age` (float64 years), `view`, `boxes` (a list of [x, y, width, height] in pixels of the original),
        int32 `rows` and `columns` of the original; what is not known is NaN.
        """
        import pandas as pd

        table = pd.read_parquet(self.path / INDEX)
        table["age"] = table["age"].astype("float64")
        table["boxes"] = [[[float(value) for value in box] for box in boxes] for boxes in table["boxes"]]
        return table

    @cached_property
    def quarantine(self) -> list[Quarantined]:
        """What was left out, first by the tables, then by the files, each in the label table's order."""
        with (self.path / QUARANTINE).open(encoding="utf-8", newline="") as file:
            return [Quarantined(**row) for row in csv.DictReader(file)]


def picture_file(folder: Path, size: int) -> Path:
    """Return the file of a store's pictures of one size."""
    return folder / f"pictures-{size}.npy"


def create_pictures(folder: Path, rows: int, size: int) -> None:
    """Create the file for `rows` pictures, all zero; it takes no room on the disk yet."""
    header = _npy_header(rows, size)
    with picture_file(folder, size).open("xb") as file:
        file.write(header)
        file.truncate(len(header) + rows * size * size)


def write_pictures(folder: Path, rows: int, size: int, begin: int, pictures: npt.NDArray[np.uint8]) -> None:
    """Write uint8 (n, size, size) into the rows from `begin` of a file of `rows` pictures; raises OSError.

    Written with pwrite and not through a mapping: a full disk is then an error and not a SIGBUS, and ranks on several
    nodes may write neighbouring rows, which share pages but no bytes.
    """
    data = memoryview(pictures.astype(np.uint8, order="C", copy=False).data).cast("B")
    offset = len(_npy_header(rows, size)) + begin * size * size
    handle = os.open(picture_file(folder, size), os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(handle, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(handle)


def write_index(folder: Path, patients: Sequence[Patient], inspections: Sequence[Inspection]) -> None:
    """Write index.parquet: the patients whose inspection gives no reason against them, row i being patient i."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sound = [(row, *pair) for row, pair in enumerate(zip(patients, inspections, strict=True)) if not pair[1].reason]
    columns: dict[str, tuple[Any, list[Any]]] = {
        "row": (pa.int64(), [row for row, _, _ in sound]),
        "patient": (pa.string(), [patient.patient_id for _, patient, _ in sound]),
        "label": (pa.int8(), [patient.label for _, patient, _ in sound]),
        "detailed": (pa.string(), [patient.detailed for _, patient, _ in sound]),
        "sex": (pa.string(), [seen.sex for _, _, seen in sound]),
        "age": (pa.int16(), [seen.age for _, _, seen in sound]),
        "view": (pa.string(), [seen.view for _, _, seen in sound]),
        "boxes": (pa.list_(pa.list_(pa.float64())), [patient.boxes for _, patient, _ in sound]),
        "rows": (pa.int32(), [seen.rows for _, _, seen in sound]),
        "columns": (pa.int32(), [seen.columns for _, _, seen in sound]),
    }
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()})
    pq.write_table(table, folder / INDEX)


def write_quarantine(folder: Path, quarantine: Sequence[Quarantined]) -> None:
    """Write quarantine.csv."""
    with (folder / QUARANTINE).open("x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Quarantined))
        writer.writerows(astuple(entry) for entry in quarantine)


def file_names(sizes: Sequence[int]) -> list[str]:
    """Return the names of a store's files that have checksums."""
    return [INDEX, QUARANTINE, *(picture_file(Path(), size).name for size in sizes)]


def complete(folder: Path, fingerprint: str, sizes: Sequence[int], sums: dict[str, str]) -> None:
    """Write store.json, the last file, when all others are on the disk; `sums` are their checksums by name."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": total} for name, total in sums.items()}
    description = {"format": FORMAT, "fingerprint": fingerprint, "sizes": list(sizes), "files": files}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    synchronize(*(folder / name for name in (*files, DESCRIPTION, ".")))


def describe(path: Path) -> dict[str, Any]:
    """Return what store.json says; raises Damaged if it is missing or not what this version writes."""
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        known = description["format"] == FORMAT
        known = known and set(description["files"]) == set(file_names(description["sizes"]))
        known = known and all(set(file) == {"bytes", "sha256"} for file in description["files"].values())
        known = known and isinstance(description["fingerprint"], str)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise Damaged(f"{path} holds no complete store: remove the folder to have it made again")
    return description  # type: ignore[no-any-return]


def is_sound(path: Path) -> bool:
    """Tell whether `path` is a complete store whose every byte has its checksum."""
    try:
        Store.open(path)
        files = describe(path)["files"]
        return checksums(path, list(files)) == {name: file["sha256"] for name, file in files.items()}
    except (Damaged, OSError):
        return False


def checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 (hexadecimal, over the hashes of blocks) of each of these files."""
    parts = blocks(folder, names)
    return fold(parts, [hash_block(folder, part) for part in parts])


def blocks(folder: Path, names: Sequence[str]) -> list[Block]:
    """Return the (name, offset) of each block of these files; an empty file has one."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    return [(name, offset) for name in names for offset in range(0, max(sizes[name], 1), BLOCK_BYTES)]


def hash_block(folder: Path, block: Block) -> bytes:
    """Return the SHA-256 of one block."""
    name, offset = block
    with (folder / name).open("rb", buffering=0) as file:
        file.seek(offset)
        return hashlib.sha256(file.read(BLOCK_BYTES)).digest()


def fold(parts: Sequence[Block], digests: Sequence[bytes]) -> dict[str, str]:
    """Return the checksum of each file from the hashes of its blocks, in order."""
    totals: dict[str, Any] = {name: hashlib.sha256() for name, _ in parts}
    for (name, _), digest in zip(parts, digests, strict=True):
        totals[name].update(digest)
    return {name: total.hexdigest() for name, total in totals.items()}


def synchronize(*paths: Path) -> None:
    """Return when what this host has written to these files and folders is on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _npy_header(rows: int, size: int) -> bytes:
    header = io.BytesIO()
    layout = {"descr": "|u1", "fortran_order": False, "shape": (rows, size, size)}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue()

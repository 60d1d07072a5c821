"""DICOM files to a memory-mapped store, by all ranks of the MPI world, once for each content of the input.

The input's content decides: its fingerprint, with the parameters, is the name of the store in the cache. Where that
store is complete it is opened. Otherwise Dask hands out chunks of patients to the ranks, each of which writes its
pictures into the files of the store itself and returns only what the files turned out to be. All results are
bit-identical for any number of ranks.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pneumo import collective
from pneumo.data import cache, cluster, effort, source, store
from pneumo.data.loader import shares
from pneumo.data.patients import SampleConfig
from pneumo.data.rsna import Patient, Quarantined, read_tables, refuse_if_any
from pneumo.data.source import Report
from pneumo.data.store import Store
from pneumo.errors import Refused

if TYPE_CHECKING:
    from distributed import Client
    from mpi4py.MPI import Intracomm

    from pneumo.data.inspect import Inspection

_LARGEST_CHUNK: Final = 32  # patients; smaller where there would be too few chunks for the ranks
_INDEX_BYTES: Final = 512  # of one patient in the tables, generously


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is to be preprocessed: a folder in RSNA's layout, or with `data` None the built-in sample.

    `cache` is on a file system that all ranks share; `sizes` are the sides of the pictures in pixels; `strict`
    refuses data of which anything is quarantined.
    """

    data: Path | None
    cache: Path
    sizes: tuple[int, ...] = (128,)
    sample: SampleConfig = field(default_factory=SampleConfig)
    strict: bool = False


def preprocess(config: DataConfig, comm: Intracomm, *, interface: str | None, report: Report) -> Store:
    """Return the store of this input, made now or found in the cache; collective over `comm`.

    `interface` is the network interface on which Dask may listen (`lo` on one node; None leaves it to Dask). `report`
    gets a line of progress every few seconds, on rank 0. Raises on every rank, with the same sentence: Refused if the
    data, the cache or its disk will not do (or anything is quarantined and `strict` is set), else PneumoError.
    """
    sizes = tuple(sorted(set(config.sizes)))
    collective.from_first(comm, lambda: cache.prepare(config.cache))
    if config.data is None:
        root, fingerprint = source.sample_folder(config.sample, config.cache, comm, report)
    else:
        root, fingerprint = config.data, source.fingerprint(config.data, comm, report)
    folder = config.cache / f"store-{source.cache_key(comm, fingerprint, sizes, store.FORMAT)}"
    cache.hold(folder)
    if not _is_complete(folder, comm):
        _build(root, folder, fingerprint, sizes, comm, interface, report)
        cache.hold(folder)
    opened = collective.gather(comm, lambda: Store.open(folder))[comm.rank]
    collective.from_first(comm, lambda: _accept(opened, config.strict))
    collective.from_first(comm, lambda: cache.prune(config.cache))
    return opened


def _accept(opened: Store, strict: bool) -> None:
    if strict:
        refuse_if_any(opened.quarantine)
    if opened.index.empty:
        raise Refused(f"none of the images is sound: see {opened.path / store.QUARANTINE} for the reasons")


def _is_complete(folder: Path, comm: Intracomm) -> bool:
    """Tell whether a folder is a complete store whose every byte has its checksum."""

    def expected() -> dict[str, str] | None:
        try:
            Store.open(folder)
            return {name: file["sha256"] for name, file in store.describe(folder)["files"].items()}
        except store.Damaged:
            return None

    sums = collective.from_first(comm, expected)
    return sums is not None and _checksums(folder, list(sums), comm) == sums


def _checksums(folder: Path, names: Sequence[str], comm: Intracomm) -> dict[str, str]:
    """Return what `store.checksums` returns, worked out by all ranks together."""
    parts = collective.from_first(comm, lambda: store.blocks(folder, names))
    mine = parts[shares(len(parts), comm.size)[comm.rank]]
    digests = collective.gather(comm, lambda: [store.hash_block(folder, part) for part in mine])
    return store.fold(parts, [digest for part in digests for digest in part])


def _build(
    root: Path,
    folder: Path,
    fingerprint: str,
    sizes: tuple[int, ...],
    comm: Intracomm,
    interface: str | None,
    report: Report,
) -> None:
    """Make the store of a data folder and rename it to `folder`."""
    with source.staging(folder.parent, comm) as staged:
        built = staged / "store"

        def start() -> tuple[list[Patient], list[Quarantined]]:
            patients, quarantine = read_tables(root)
            needed_bytes = len(patients) * (sum(size * size for size in sizes) + _INDEX_BYTES)
            cache.require_space(folder.parent, needed_bytes, f"a store of {len(patients)} images")
            built.mkdir()
            for size in sizes:
                store.create_pictures(built, len(patients), size)
            return patients, quarantine

        # Only rank 0 has to know the patients; the others get theirs with Dask's tasks.
        tables = collective.on_first(comm, start)

        def work(client: Client) -> list[Inspection]:
            assert tables is not None
            return _inspect_all(client, tables[0], built, sizes, comm.size, report)

        collective.gather(comm, _import_readers)
        with effort.in_dask():
            inspections = cluster.run(comm, work, interface=interface, scratch=staged)

        def write_tables() -> None:
            if tables is not None and inspections is not None:
                _write_tables(built, *tables, inspections, sizes)

        collective.gather(comm, write_tables)
        names = store.file_names(sizes)
        collective.gather(comm, lambda: store.synchronize(*(built / name for name in names)))
        sums = _checksums(built, names, comm)

        def publish() -> None:
            store.complete(built, fingerprint, sizes, sums)
            cache.publish(built, folder, store.is_sound)

        collective.from_first(comm, publish)


def _import_readers() -> None:
    """Import what reads images, on all ranks at once, so that no task has to wait for it."""
    importlib.import_module("pneumo.data.inspect")


def _inspect_all(
    client: Client, patients: list[Patient], folder: Path, sizes: tuple[int, ...], ranks: int, report: Report
) -> list[Inspection]:
    """Have the ranks write the pictures of all patients, and return their inspections in order."""
    from distributed import as_completed

    chunk = max(1, min(_LARGEST_CHUNK, len(patients) // (8 * ranks)))
    begins = range(0, len(patients), chunk)
    progress = source.Progress("preprocessed", len(patients), report)
    futures = [
        client.submit(
            _inspect_chunk, patients[begin : begin + chunk], folder, len(patients), sizes, begin, pure=False, retries=0
        )
        for begin in begins
    ]
    found: dict[int, list[Inspection]] = {}
    done = 0
    for future, (begin, inspections) in as_completed(futures, loop=client.loop, with_results=True):  # type: ignore[no-untyped-call]
        found[begin] = inspections
        done += len(inspections)
        progress.show(done)
        future.release()
    return [inspection for begin in begins for inspection in found[begin]]


def _inspect_chunk(
    patients: list[Patient], folder: Path, rows: int, sizes: tuple[int, ...], begin: int
) -> tuple[int, list[Inspection]]:
    """Write the pictures of these patients, who have the rows from `begin`; a task of Dask's, on any rank."""
    from pneumo.data.inspect import inspect

    inspections = []
    with effort.on_images():
        for row, patient in enumerate(patients, begin):
            inspection, pictures = inspect(patient, sizes)
            inspections.append(inspection)
            for size, picture in pictures.items():
                store.write_pictures(folder, rows, size, row, picture)
    return begin, inspections


def _write_tables(
    folder: Path,
    patients: list[Patient],
    quarantine: list[Quarantined],
    inspections: list[Inspection],
    sizes: tuple[int, ...],
) -> None:
    """Find the duplicates, blank their pictures, and write the index and the quarantine."""
    import numpy as np

    from pneumo.data.inspect import quarantine_of

    refused = quarantine_of(patients, inspections)
    why = {entry.patient: entry for entry in refused}
    final = [
        replace(one, reason=entry.reason, detail=entry.detail) if (entry := why.get(one.patient_id)) else one
        for one in inspections
    ]
    for row, inspection in enumerate(final):
        if inspection.reason == "duplicate":
            for size in sizes:
                store.write_pictures(folder, len(patients), size, row, np.zeros((1, size, size), np.uint8))
    store.write_index(folder, patients, final)
    store.write_quarantine(folder, [*quarantine, *refused])

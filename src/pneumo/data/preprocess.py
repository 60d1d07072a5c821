"""DICOM files to a memory-mapped store, by all ranks of the MPI world, once for each content of the input.

The input's content decides: its fingerprint, with the parameters, is the name of the store in the cache. Where that
store is complete it is opened. Otherwise Dask hands out chunks of patients to the ranks, each of which writes its
pictures into the files of the store itself and returns only what the files turned out to be. All results are
bit-identical for any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pneumo.data import cache, cluster, collective, store
from pneumo.data.loader import shares
from pneumo.data.patients import SampleConfig
from pneumo.data.rsna import DETAILS, IMAGES, LABELS, Patient, Quarantined, read_tables, refuse_if_any
from pneumo.data.store import Store
from pneumo.errors import Refused

if TYPE_CHECKING:
    from distributed import Client
    from mpi4py.MPI import Intracomm

    from pneumo.data.inspect import Inspection

Report = Callable[[str], None]

_REPORT_EVERY_S: Final = 3.0
_LARGEST_CHUNK: Final = 32  # patients; smaller where there would be too few chunks for the ranks
_INDEX_BYTES: Final = 512  # of one patient in the tables, generously
# Whatever decides the pictures: our own modules by their text, the libraries by their versions.
_READERS: Final = ("dicom", "inspect", "lut", "rsna", "store")
_GENERATORS: Final = ("sample", "patients", "anatomy")
_LIBRARIES: Final = ("numpy", "opencv-python-headless", "pillow", "pydicom", "python-gdcm")


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
    data, the cache or its disk do not do (or anything is quarantined and `strict` is set), PneumoError if a rank failed.
    """
    sizes = tuple(sorted(set(config.sizes)))
    collective.from_first(comm, lambda: cache.prepare(config.cache))
    if config.data is None:
        root, fingerprint = _sample(config.sample, config.cache, comm, report)
    else:
        root, fingerprint = config.data, _fingerprint(config.data, comm, report)
    made_by = _made_by(_READERS)
    key = hashlib.sha256(json.dumps([fingerprint, sizes, store.FORMAT, made_by]).encode()).hexdigest()[:16]
    folder = config.cache / f"store-{key}"
    if not _is_complete(folder, comm):
        _build(root, folder, fingerprint, sizes, comm, interface, report)
    opened = collective.gather(comm, lambda: Store.open(folder))[comm.rank]
    collective.from_first(comm, lambda: _accept(opened, config.strict))
    return opened


def _accept(opened: Store, strict: bool) -> None:
    if strict:
        refuse_if_any(opened.quarantine)
    if opened.index.empty:
        raise Refused(f"none of the images is sound: see {opened.path / store.QUARANTINE} for the reasons")


def _sample(config: SampleConfig, folder: Path, comm: Intracomm, report: Report) -> tuple[Path, str]:
    """Return the built-in sample's folder in the cache and its fingerprint; generate it unless it is there, intact."""
    key = hashlib.sha256(json.dumps([asdict(config), _made_by(_GENERATORS)]).encode()).hexdigest()[:16]
    root = folder / f"sample-{key}"

    def note(path: Path) -> str | None:
        return (path / "fingerprint").read_text() if (path / "fingerprint").is_file() else None

    expected = collective.from_first(comm, lambda: note(root))
    if expected is not None:
        fingerprint = _fingerprint(root, comm, report)
        if fingerprint == expected:
            return root, fingerprint
    with _staging(folder, comm) as staged:
        needed_bytes = config.patients * (config.size**2 // 5 + 4096)  # JPEG takes about an eighth
        collective.from_first(comm, lambda: cache.require_space(folder, needed_bytes, "the generated sample"))
        _generate(staged / "sample", config, comm, report)
        fingerprint = _fingerprint(staged / "sample", comm, report)

        def publish() -> None:
            (staged / "sample" / "fingerprint").write_text(fingerprint)
            # What another run has put there meanwhile is as good, if it is not what was found damaged above.
            cache.publish(staged / "sample", root, lambda path: expected is None and note(path) == fingerprint)

        collective.from_first(comm, publish)
    return root, fingerprint


def _generate(root: Path, config: SampleConfig, comm: Intracomm, report: Report) -> None:
    from pneumo.data import sample

    mine = shares(config.patients, comm.size)[comm.rank]
    progress = _Progress("generated", config.patients, report if comm.rank == 0 else None)

    def work() -> None:
        if comm.rank == 0:
            sample.write_tables(root, config)
        for index in range(mine.start, mine.stop):
            sample.write_patients(root, config, index, index + 1)
            progress.show((index + 1 - mine.start) * config.patients // (mine.stop - mine.start))

    collective.gather(comm, work)


def _fingerprint(root: Path, comm: Intracomm, report: Report) -> str:
    """Return a hash (hexadecimal) of the names and contents of the tables and images in a data folder.

    Each rank reads its share; neither their number nor the folder's place matters. Raises Refused if the folder is not
    in RSNA's layout or a file cannot be read.
    """
    names = collective.from_first(comm, lambda: _input_files(root))
    mine = names[shares(len(names), comm.size)[comm.rank]]
    progress = _Progress("checked", len(names), report if comm.rank == 0 else None)

    def work() -> list[bytes]:
        digests = []
        for done, name in enumerate(mine, 1):
            digests.append(_hash_file(root, name))
            progress.show(done * len(names) // len(mine))
        return digests

    total = hashlib.sha256()
    for name, digest in zip(names, sum(collective.gather(comm, work), []), strict=True):
        total.update(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() + digest)
    return total.hexdigest()


def _input_files(root: Path) -> list[str]:
    """Return the names, relative to a data folder, of all that is read from it."""
    folder = root / IMAGES
    if not folder.is_dir() or not (root / LABELS).is_file():
        read_tables(root)  # raises, and knows the words for it
    tables = [name for name in (LABELS, DETAILS) if (root / name).is_file()]
    images = (entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".dcm"))
    return tables + [f"{IMAGES}/{name}" for name in sorted(images)]


def _hash_file(root: Path, name: str) -> bytes:
    try:
        with (root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except IsADirectoryError:
        return b""  # is named like an image; reading it will say what it is
    except OSError as error:
        raise Refused(f"{root / name} cannot be read: {error.strerror}") from None


def _made_by(modules: Sequence[str]) -> list[str]:
    """Return the versions of what makes the pictures: a changed text or library makes other stores."""
    texts = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in modules]
    return [hashlib.sha256(b"".join(texts)).hexdigest(), *map(version, _LIBRARIES)]


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
    return store.fold(parts, sum(digests, []))


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
    with _staging(folder.parent, comm) as staged:
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
        tables = _on_first(comm, start)

        def work(client: Client) -> list[Inspection]:
            assert tables is not None
            return _inspect_all(client, tables[0], built, sizes, comm.size, report)

        inspections = cluster.run(comm, work, interface=interface, scratch=staged / "dask")

        def write_tables() -> None:
            if tables is not None and inspections is not None:
                _write_tables(built, root, *tables, inspections, sizes)

        collective.gather(comm, write_tables)
        names = store.file_names(sizes)
        collective.gather(comm, lambda: [store.synchronize(built / name) for name in names])
        sums = _checksums(built, names, comm)

        def publish() -> None:
            store.complete(built, fingerprint, sizes, sums)
            cache.publish(built, folder, store.is_sound)

        collective.from_first(comm, publish)


def _inspect_all(
    client: Client, patients: list[Patient], folder: Path, sizes: tuple[int, ...], ranks: int, report: Report
) -> list[Inspection]:
    """Have the ranks write the pictures of all patients, and return their inspections in order."""
    from distributed import as_completed

    chunk = max(1, min(_LARGEST_CHUNK, len(patients) // (8 * ranks)))
    begins = range(0, len(patients), chunk)
    progress = _Progress("preprocessed", len(patients), report)
    futures = [
        client.submit(
            _inspect_chunk, patients[begin : begin + chunk], folder, len(patients), sizes, begin, pure=False, retries=0
        )
        for begin in begins
    ]
    found: dict[int, list[Inspection]] = {}
    done = 0
    for future, (begin, inspections) in as_completed(futures, with_results=True):  # type: ignore[no-untyped-call]
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
    for row, patient in enumerate(patients, begin):
        inspection, pictures = inspect(patient, sizes)
        inspections.append(inspection)
        for size, picture in pictures.items():
            store.write_pictures(folder, rows, size, row, picture)
    return begin, inspections


def _write_tables(
    folder: Path,
    root: Path,
    patients: list[Patient],
    quarantine: list[Quarantined],
    inspections: list[Inspection],
    sizes: tuple[int, ...],
) -> None:
    """Find the duplicates, blank their pictures, and write the index and the quarantine."""
    import numpy as np

    from pneumo.data.inspect import find_duplicates

    kept = find_duplicates(inspections)
    final = [_as_duplicate(one, kept[one.patient_id]) if one.patient_id in kept else one for one in inspections]
    for row, inspection in enumerate(final):
        if inspection.patient_id in kept:
            for size in sizes:
                store.write_pictures(folder, len(patients), size, row, np.zeros((1, size, size), np.uint8))
    refused = [
        Quarantined(patient.patient_id, patient.path.relative_to(root).as_posix(), one.reason, one.detail)
        for patient, one in zip(patients, final, strict=True)
        if one.reason is not None
    ]
    store.write_index(folder, patients, final)
    store.write_quarantine(folder, [*quarantine, *refused])


def _as_duplicate(inspection: Inspection, kept: str) -> Inspection:
    from dataclasses import replace

    return replace(inspection, reason="duplicate", detail=f"the same picture as {kept}")


class _Progress:
    """Reports how far something is and how long it will take yet, at most once every few seconds."""

    def __init__(self, verb: str, total: int, report: Report | None) -> None:
        self._verb, self._total, self._report = verb, total, report
        self._begin_s = self._last_s = time.monotonic()

    def show(self, done: int) -> None:
        """Say that `done` of the images are done, if it is time to say something."""
        now_s = time.monotonic()
        if self._report is None or done == 0 or now_s - self._last_s < _REPORT_EVERY_S:
            return
        self._last_s = now_s
        left_s = (now_s - self._begin_s) * (self._total - done) / done
        self._report(f"{self._verb} {done} of {self._total} images, about {left_s:.0f} s left")

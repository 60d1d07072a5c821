"""Where the pictures come from: a data folder and the fingerprint of its content, and the built-in sample's folder.

All of it is collective over an MPI communicator, and gives the same for any number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pneumo import collective
from pneumo.data import cache
from pneumo.data.loader import shares
from pneumo.data.patients import SampleConfig
from pneumo.data.rsna import DETAILS, IMAGES, LABELS, read_tables
from pneumo.errors import Refused

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Report = Callable[[str], None]

_REPORT_EVERY_S: Final = 3.0
# Whatever decides the pictures is part of a key: our own modules by their text, except these, and the libraries.
_NO_PART: Final = frozenset(
    ["__init__", "__main__", "augment", "cache", "check", "cluster", "loader", "metadata", "split"]
)
_LIBRARIES: Final = ("numpy", "opencv-python-headless", "pillow", "pydicom", "python-gdcm")


def sample_folder(config: SampleConfig, folder: Path, comm: Intracomm, report: Report) -> tuple[Path, str]:
    """Return the built-in sample's folder in the cache and its fingerprint; generate it unless it is there, intact."""
    root = folder / f"sample-{cache_key(comm, asdict(config))}"

    def note(path: Path) -> str | None:
        return (path / "fingerprint").read_text() if (path / "fingerprint").is_file() else None

    cache.hold(root)
    expected = collective.from_first(comm, lambda: note(root))
    if expected is not None:
        found = fingerprint(root, comm, report)
        if found == expected:
            return root, found
    with staging(folder, comm) as staged:
        if expected is not None:  # somebody has changed it
            collective.from_first(comm, lambda: cache.discard(root, staged))
        needed_bytes = config.patients * (config.size**2 // 5 + 4096)  # JPEG takes about an eighth
        collective.from_first(comm, lambda: cache.require_space(folder, needed_bytes, "the generated sample"))
        _generate(staged / "sample", config, comm, report)
        made = fingerprint(staged / "sample", comm, report)

        def publish() -> None:
            (staged / "sample" / "fingerprint").write_text(made)
            cache.publish(staged / "sample", root, lambda path: note(path) == made)

        collective.from_first(comm, publish)
    cache.hold(root)
    return root, made


def _generate(root: Path, config: SampleConfig, comm: Intracomm, report: Report) -> None:
    from pneumo.data import sample

    mine = shares(config.patients, comm.size)[comm.rank]
    progress = Progress("generated", config.patients, report if comm.rank == 0 else None)

    def work() -> None:
        if comm.rank == 0:
            sample.write_tables(root, config)
        for index in range(mine.start, mine.stop):
            sample.write_patients(root, config, index, index + 1)
            progress.show((index + 1 - mine.start) * config.patients // (mine.stop - mine.start))

    collective.gather(comm, work)


def fingerprint(root: Path, comm: Intracomm, report: Report) -> str:
    """Return a hash (hexadecimal) of the names and contents of the tables and images in a data folder.

    Each rank reads its share; neither their number nor the folder's place matters. Raises Refused if the folder is not
    in RSNA's layout or a file cannot be read.
    """
    names = collective.from_first(comm, lambda: _input_files(root))
    mine = names[shares(len(names), comm.size)[comm.rank]]
    progress = Progress("checked", len(names), report if comm.rank == 0 else None)

    def work() -> list[bytes]:
        digests = []
        for done, name in enumerate(mine, 1):
            digests.append(_hash_file(root, name))
            progress.show(done * len(names) // len(mine))
        return digests

    total = hashlib.sha256()
    for name, digest in zip(names, itertools.chain(*collective.gather(comm, work)), strict=True):
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


def cache_key(comm: Intracomm, *parameters: object) -> str:
    """Return a name (hexadecimal) for what is made with these parameters by this version of the project."""

    def work() -> str:
        paths = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in _NO_PART)
        made_by = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] + [*map(version, _LIBRARIES)]
        return hashlib.sha256(json.dumps([parameters, made_by]).encode()).hexdigest()[:16]

    return collective.from_first(comm, work)


@contextlib.contextmanager
def staging(folder: Path, comm: Intracomm) -> Iterator[Path]:
    """Give all ranks one new folder in the cache to build in; rank 0 removes it when all are out of it."""
    with contextlib.ExitStack() as stack:
        yield collective.from_first(comm, lambda: stack.enter_context(cache.staging(folder)))


class Progress:
    """Reports how far something is and how long it will take yet, at most once every few seconds."""

    def __init__(self, verb: str, total: int, report: Report | None) -> None:
        self._verb, self._total, self._report = verb, total, report
        self._first: tuple[int, float] | None = None
        self._last_s = time.monotonic()

    def show(self, done: int) -> None:
        """Say that `done` of the images are done, if it is time to say something."""
        now_s = time.monotonic()
        if self._first is None:  # what comes before the first image is no measure of those that follow
            self._first = done, now_s
        since, since_s = self._first
        if self._report is None or done == since or now_s - self._last_s < _REPORT_EVERY_S:
            return
        self._last_s = now_s
        left_s = (now_s - since_s) * (self._total - done) / (done - since)
        self._report(f"{self._verb} {done} of {self._total} images, about {left_s:.0f} s left")

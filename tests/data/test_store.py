"""The store: what is written is read, what is damaged is not trusted, and a shared cache is left in order."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fakes import REFUSED, make_store

from pneumo.data import cache, store
from pneumo.data.store import Damaged, Store
from pneumo.errors import PneumoError, Refused


def test_index_and_quarantine_come_back(tmp_path: Path) -> None:
    opened = make_store(tmp_path / "store")
    index = opened.index
    assert index["row"].tolist() == [row for row in range(12) if row not in REFUSED]
    assert index["label"].tolist() == [row % 2 for row in index["row"]]
    assert index["age"].isna().tolist() == [True] + [False] * 9
    assert index["age"].tolist()[1:] == [40 + row for row in index["row"][1:]]
    assert index["sex"].isna().tolist() == [True] + [False] * 9
    assert index["boxes"].tolist()[:2] == [[], [[1.5, 2.0, 30.0, 40.25], [0.0, 0.0, 1.0, 1.0]]]
    assert (index["rows"].unique().tolist(), index["columns"].unique().tolist()) == ([64], [80])
    assert [(entry.patient, entry.detail) for entry in opened.quarantine] == [
        (f"id-{row}", 'with a comma, and "quotes"') for row in REFUSED
    ]
    assert opened.fingerprint == "f1"


def test_pictures_are_plain_npy_files(tmp_path: Path) -> None:
    opened = make_store(tmp_path / "store", sizes=(16, 24))
    for size in (16, 24):
        plain = np.load(tmp_path / "store" / f"pictures-{size}.npy")
        assert plain.shape == (12, size, size)
        assert np.array_equal(opened.images(size), plain)
        assert not plain[list(REFUSED)].any()
        assert all(plain[row].any() for row in range(12) if row not in REFUSED)
    assert not opened.images(16).flags.writeable


def test_chunks_written_in_any_order_land_in_their_rows(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).integers(0, 256, (10, 7, 7), dtype=np.uint8)
    store.create_pictures(tmp_path, 10, 7)
    for begin, end in ((6, 10), (0, 1), (1, 6)):
        store.write_pictures(tmp_path, 10, 7, begin, expected[begin:end])
    assert np.array_equal(np.load(store.picture_file(tmp_path, 7)), expected)


def test_unknown_size_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PneumoError, match=r"32x32.*it has 16"):
        make_store(tmp_path / "store").images(32)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["pictures-16.npy", "index.parquet", "quarantine.csv", "store.json"])
@pytest.mark.parametrize("spoil", [cut, Path.unlink])
def test_incomplete_store_is_not_opened(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    folder = make_store(tmp_path / "store").path
    spoil(folder / name)
    with pytest.raises(Damaged):
        Store.open(folder)
    assert not store.is_sound(folder)


@pytest.mark.parametrize("name", ["pictures-16.npy", "index.parquet", "quarantine.csv"])
def test_changed_bit_is_noticed(tmp_path: Path, name: str) -> None:
    folder = make_store(tmp_path / "store").path
    assert store.is_sound(folder)
    flip(folder / name)
    assert not store.is_sound(folder)


def test_store_of_another_format_is_not_opened(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store").path
    with mock.patch.object(store, "FORMAT", store.FORMAT + 1), pytest.raises(Damaged):
        Store.open(folder)


def test_checksum_is_over_the_hashes_of_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdefghij")
    (tmp_path / "none").touch()
    with mock.patch.object(store, "BLOCK_BYTES", 4):
        found = store.checksums(tmp_path, ["file", "none"])
    digests = b"".join(hashlib.sha256(block).digest() for block in (b"abcd", b"efgh", b"ij"))
    assert found["file"] == hashlib.sha256(digests).hexdigest()
    assert found["none"] == hashlib.sha256(hashlib.sha256(b"").digest()).hexdigest()


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_folders_of_dead_owners_are_removed(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead, alive, foreign, old = (
        tmp_path / f".staging-{name}-00ff"
        for name in (f"{host}-{dead_pid()}", f"{host}-{os.getpid()}", f"other-node-{dead_pid()}", "old-node-7")
    )
    for folder in (dead, alive, foreign, old):
        folder.mkdir()
        (folder / "owner").touch()
    os.utime(old, (0, 0))
    cache.prepare(tmp_path)
    assert not dead.exists()
    assert not old.exists()
    assert alive.exists()
    assert foreign.exists()


def test_folder_in_use_is_kept_whatever_its_process_number_says(tmp_path: Path) -> None:
    with mock.patch.object(os, "getpid", return_value=dead_pid()), cache.staging(tmp_path) as folder:
        cache.prepare(tmp_path)  # as from another container, which cannot see the process
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_published_folder_of_another_run_is_kept_and_an_unsound_one_replaced(tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    for content in ("first", "second", "third"):
        (staged / content).mkdir(parents=True)
        (staged / content / "file").write_text(content)
    target = tmp_path / "target"
    cache.publish(staged / "first", target, lambda path: False)
    assert (target / "file").read_text() == "first"
    cache.publish(staged / "second", target, lambda path: (path / "file").read_text() == "first")
    assert (target / "file").read_text() == "first"
    cache.publish(staged / "third", target, lambda path: False)
    assert (target / "file").read_text() == "third"


def test_too_little_space_is_said_in_numbers(tmp_path: Path) -> None:
    with (
        mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=3_000_000)),
        pytest.raises(Refused, match=r"3 MB free, but the test needs 2,000 MB"),
    ):
        cache.require_space(tmp_path, 2_000_000_000, "the test")


def test_unwritable_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot be written"):
        cache.prepare(tmp_path / "file" / "cache")

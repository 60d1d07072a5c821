"""The cache's bound: what was used last stays, what somebody holds stays, and what is not ours is never touched."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumo.data import cache

DAY_S = 24 * 3600


def fill(root: Path, kind: str, count: int, *, younger_s: float = 0) -> list[Path]:
    """Make folders of a kind with a file in each, last used 2, 3, ... days ago."""
    folders = []
    for i in range(count):
        folder = root / f"{kind}-{i:02}"
        folder.mkdir()
        (folder / "file").touch()
        used_s = time.time() - (i + 2) * DAY_S + younger_s
        os.utime(folder, (used_s, used_s))
        folders.append(folder)
    return folders


@pytest.fixture
def let_go() -> Iterator[None]:
    """Undo what this process holds."""
    before = len(cache._held)
    yield
    while len(cache._held) > before:
        os.close(cache._held.pop())


@pytest.mark.usefixtures("let_go")
def test_the_latest_of_each_kind_stay(tmp_path: Path) -> None:
    stores, samples = fill(tmp_path, "store", cache.KEPT + 3), fill(tmp_path, "sample", cache.KEPT + 1)
    others = [tmp_path / "horovod", tmp_path / ".staging-elsewhere-1-ab"]
    for other in others:
        other.mkdir()
        os.utime(other, (0, 0))
    cache.hold(stores[-1])  # using it makes it the latest
    cache.prune(tmp_path)
    expected = {stores[-1], *stores[: cache.KEPT - 1], *samples[: cache.KEPT], *others}
    assert set(tmp_path.iterdir()) == expected


def test_what_was_used_within_a_day_stays(tmp_path: Path) -> None:
    stores = fill(tmp_path, "store", cache.KEPT + 2, younger_s=(cache.KEPT + 2) * DAY_S)
    cache.prune(tmp_path)
    assert all(store.exists() for store in stores[:-1])
    assert not stores[-1].exists()


def test_what_another_process_holds_stays_until_it_ends(tmp_path: Path) -> None:
    *_, held, free = fill(tmp_path, "store", cache.KEPT + 2)
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom pneumo.data import cache\n"
        "cache.hold(Path(sys.argv[1]))\nos.utime(sys.argv[1], (1, 1))\nprint('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        cache.prune(tmp_path)
        assert (held / "file").exists()
        assert not free.exists()
    cache.prune(tmp_path)
    assert not held.exists()


def test_without_locks_everything_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = fill(tmp_path, "store", cache.KEPT + 2)

    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache.hold(stores[-1])
    cache.prune(tmp_path)
    assert all(store.exists() for store in stores)


def test_holding_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    before = len(cache._held)
    cache.hold(tmp_path / "store-none")
    assert len(cache._held) == before

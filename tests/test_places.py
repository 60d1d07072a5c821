"""Places that cannot be written are refused before any work, by trying: root may write where the mode says no."""

from pathlib import Path

import pytest

from pneumo import machine, places
from pneumo.errors import Refused


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    places.require_folder(tmp_path / "a/b", "--out", 1)
    assert list((tmp_path / "a/b").iterdir()) == []


def test_too_little_room_is_said_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda _path: 5_000_000)
    places.require_folder(tmp_path, "--cache", 5_000_000)
    with pytest.raises(Refused, match=r"5 MB free.*7 MB are needed.*--cache"):
        places.require_folder(tmp_path, "--cache", 7_000_000)


@pytest.mark.parametrize("place", ["/proc/nowhere", "/proc", "/dev/null/x"])
def test_a_folder_that_cannot_be_written_is_refused(place: str) -> None:
    with pytest.raises(Refused, match=f"{place}.*--out"):
        places.require_folder(Path(place), "--out", 0)


def test_a_file_stays_as_it_is_and_none_is_made(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("kept")
    for path in (old, tmp_path / "new.json"):
        places.require_file(path, "--json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "kept")]


@pytest.mark.parametrize("name", ["nowhere/x.json", ".", "/proc/x.json", "/dev/null"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="--json"):
        places.require_file(tmp_path / name, "--json")


def test_the_user_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert places.user_cache() == Path("/elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert places.user_cache() == Path("/home/somebody/.cache")

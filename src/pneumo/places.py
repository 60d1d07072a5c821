"""Places to write to: found, and refused in a sentence before any work is done that could not be kept there."""

import os
import tempfile
from pathlib import Path

from pneumo import machine
from pneumo.errors import Refused


def user_cache() -> Path:
    """The folder in which this user's programs keep what can be made again: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def picture_cache(asked: Path | None) -> Path:
    """The folder in which preprocessed pictures are kept: the one asked for, else pneumo in the user's cache."""
    return asked or user_cache() / "pneumo"


def require_folder(folder: Path, flag: str, needed_bytes: int) -> None:
    """Make a folder; raises Refused, naming the flag that chose it, where it cannot be written or is too full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_in(folder)
    except OSError as error:
        raise Refused(f"Cannot write to {folder} ({error.strerror}); choose another place with {flag}.") from None
    free_bytes = machine.free_bytes(folder)
    if free_bytes < needed_bytes:
        raise Refused(
            f"{folder} has {free_bytes / 1e6:,.0f} MB free, and {needed_bytes / 1e6:,.0f} MB are needed; free some, or "
            f"choose another place with {flag}."
        )


def require_file(path: Path, flag: str) -> None:
    """Raise Refused, naming the flag that chose it, where a file cannot be written; what is in it stays as it is."""
    if path.exists() and not path.is_file():
        raise Refused(f"{flag} {path} cannot be written: there is something that is no file.")
    try:
        _write_in(path.absolute().parent)
    except OSError as error:
        raise Refused(
            f"{flag} {path} cannot be written ({error.strerror}); name a file in a folder that exists."
        ) from None


def _write_in(folder: Path) -> None:
    """Make a file in a folder, gone again at once: only trying tells, root may write where the mode says no."""
    with tempfile.TemporaryFile(dir=folder):
        pass

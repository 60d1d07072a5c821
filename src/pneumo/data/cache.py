"""A cache folder that several runs may use at once, and that a killed run cannot spoil.

What is made is made in a staging folder and renamed into place when it is complete, so whatever has its final name is
complete. A staging folder carries its owner's host and process in its name and a file that the owner keeps locked;
later runs remove those whose owner is gone. Of what is complete the KEPT of each kind that were used last stay; of the
others those go that nobody has used for a day and no process holds. Without locks nobody can tell, and all stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pneumo.data.store import synchronize
from pneumo.errors import Refused

KEPT: Final = 8
KINDS: Final = ("sample", "store")
_PREFIX: Final = ".staging-"
_OWNER: Final = "owner"
_HOUR_S: Final = 3600.0
_held: Final[list[int]] = []  # folders that are open, and so locked, for the life of this process


def prepare(cache: Path) -> None:
    """Create the cache folder and remove what killed runs left in it; raises Refused if it cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe = cache / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"the cache {cache} cannot be written ({error.strerror}): choose another folder") from None
    for folder in cache.glob(_PREFIX + "*"):
        if _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def require_space(cache: Path, needed_bytes: int, purpose: str) -> None:
    """Raise Refused unless the cache's disk has room for this many bytes."""
    free_bytes = shutil.disk_usage(cache).free
    if free_bytes < needed_bytes:
        raise Refused(
            f"the cache {cache} has {free_bytes / 1e6:,.0f} MB free, but {purpose} needs {needed_bytes / 1e6:,.0f} MB: "
            "free some, or choose another folder"
        )


@contextlib.contextmanager
def staging(cache: Path) -> Iterator[Path]:
    """Give a new folder in the cache to build in; it is removed at the end, unless the process is killed."""
    folder = _staging_folder(cache)
    folder.mkdir()
    try:
        with (folder / _OWNER).open("x") as lock:
            _lock(lock.fileno())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _staging_folder(cache: Path) -> Path:
    return cache / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def publish(built: Path, target: Path, is_sound: Callable[[Path], bool]) -> None:
    """Rename a complete folder to its final name; one that another run has put there meanwhile is kept if sound.

    Durable: what was renamed is found after a crash of the host. An unsound folder at `target` is replaced.
    """
    with (target.parent / ".lock").open("a") as lock:
        _lock(lock.fileno(), wait=True)
        if target.exists():
            if is_sound(target):
                return
            target.rename(built.with_name(f"unsound-{target.name}"))
        built.rename(target)
        synchronize(target.parent)


def discard(folder: Path, staged: Path) -> None:
    """Take a damaged folder out of the cache; it goes with the staging folder."""
    with contextlib.suppress(FileNotFoundError):  # another run has found it too
        folder.rename(staged / f"unsound-{folder.name}")


def hold(folder: Path) -> None:
    """Keep a folder of the cache from being removed until this process ends, and note its use; call before reading it.

    Nothing happens if there is no such folder.
    """
    with contextlib.suppress(OSError):  # not there, or on a file system without locks, where nothing is removed
        while True:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                break
            os.close(handle)  # it was removed meanwhile, and made again
        _held.append(handle)
        os.utime(folder)


def prune(cache: Path) -> None:
    """Remove samples and stores that have not been used for long; never one that is held."""
    for kind in KINDS:
        used_s = {folder: _used_s(folder) for folder in cache.glob(f"{kind}-*")}
        for folder in sorted(used_s, key=used_s.__getitem__, reverse=True)[KEPT:]:
            if time.time() - used_s[folder] > 24 * _HOUR_S:
                with contextlib.suppress(OSError):
                    _remove_unless_held(folder)


def _used_s(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0  # another run is removing it


def _remove_unless_held(folder: Path) -> None:
    """Remove a folder under the lock that whoever holds it shares; raises OSError if that lock cannot be had."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = _staging_folder(folder.parent)  # what a killed run leaves of it is removed by the next
        folder.rename(gone)
    finally:
        os.close(handle)
    shutil.rmtree(gone, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    """Tell whether a staging folder's owner is gone: surely on this host, on others only when it is a week old.

    A free lock alone could be a folder whose owner is just about to lock it, and a dead process number alone could
    belong to a container with process numbers of its own.
    """
    host, _, rest = folder.name.removeprefix(_PREFIX).rpartition("-")[0].rpartition("-")
    try:
        age_s = time.time() - folder.stat().st_mtime
        if host != socket.gethostname() or not rest.isdigit():
            return age_s > 7 * 24 * _HOUR_S
        return (not _is_alive(int(rest)) or age_s > _HOUR_S) and _is_unlocked(folder / _OWNER)
    except OSError:
        return False  # another run is removing it


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_unlocked(path: Path) -> bool:
    try:
        with path.open() as file:
            return _lock(file.fileno())
    except FileNotFoundError:
        return True


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Lock a file for as long as it is open and tell whether it is ours; file systems without locks give every one."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True

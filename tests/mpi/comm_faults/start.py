"""Cases of failure: settings, and a start that fails."""

import contextlib
import datetime
import os

from comm_faults.case import Rank, begin, case, dist, works

BAD = {
    "PNEUMO_COMM_SHM": ["sysv", "MEMFD"],
    "PNEUMO_COMM_BYTES": ["lots", "-1", "nan", "64MB", "12X", "100"],
    "PNEUMO_COMM_CHUNK": ["big", "1KM", "100"],
    "PNEUMO_COMM_ONE_SHOT": ["-5", "8"],
    "PNEUMO_COMM_SPIN_US": ["soon", "5 ms", "-1"],
    "PNEUMO_COMM_STORES": ["nt"],
}
GOOD = ("BYTES=1M", "BYTES=400000", "CHUNK=64K", "ONE_SHOT=1K", "SPIN_US=0", "STORES=cached", "STORES=streamed")


@case
def bad_settings(me: Rank) -> None:
    """Each is refused on every rank by its name and value; afterwards the same processes start well."""
    for name, values in BAD.items():
        for value in values:
            os.environ[name] = value
            me.caught(f"{name}={value}", me.init, timeout_s=20)
            if dist.is_initialized():
                dist.destroy_process_group()
            del os.environ[name]
    me.init()
    works()


@case
def good_settings(me: Rank) -> None:
    """Every setting is taken, with and without a unit."""
    for setting in GOOD:
        name, value = setting.split("=")
        os.environ[f"PNEUMO_COMM_{name}"] = value
        me.caught(setting, begin, me)
        if dist.is_initialized():
            dist.destroy_process_group()
        del os.environ[f"PNEUMO_COMM_{name}"]


@case
def a_bad_setting_on_one_rank(me: Rank) -> None:
    """The others are told whom they wait for."""
    if me.rank == 1:
        os.environ["PNEUMO_COMM_SHM"] = "sysv"
    me.caught("init", me.init, timeout_s=3)


@case
def one_does_not_come(me: Rank) -> None:
    """A rank that is not there when the world is made is named; with it, the next attempt works."""
    if me.rank != 1:
        me.caught("init", me.init, timeout_s=3)
    else:  # fails as well, elsewhere: torch counts the groups, and names them by their number
        alone = dist.FileStore(str(me.folder / "alone"), me.size)
        timeout = datetime.timedelta(milliseconds=100)
        me.starts += 1
        with contextlib.suppress(dist.DistBackendError):
            dist.init_process_group("pneumo", store=alone, rank=1, world_size=me.size, timeout=timeout)
    me.meet("given up")
    me.init()
    works()
    if me.rank == 1:
        timeout = datetime.timedelta(seconds=3)
        me.caught("new_group", dist.new_group, [1, 2], timeout=timeout)
    works()


@case
def two_do_not_come(me: Rank) -> None:
    """Both are named."""
    if me.rank == 0:
        me.caught("init", me.init, timeout_s=2)


@case
def little_shared_memory(me: Rank) -> None:
    """In a small /dev/shm: too small for the default with posix, enough for what is asked for, and memfd needs none."""
    me.notes["free"] = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    os.environ["PNEUMO_COMM_SHM"] = "posix"
    me.caught("too small", me.init, timeout_s=20)
    me.notes["names after"] = os.listdir("/dev/shm")
    os.environ["PNEUMO_COMM_BYTES"] = "600K"
    me.caught("enough", begin, me)
    if dist.is_initialized():
        dist.destroy_process_group()


@case
def memfd_beside_little_shared_memory(me: Rank) -> None:
    """memfd needs no /dev/shm."""
    me.init()
    works()
    dist.destroy_process_group()
    me.notes["names after"] = os.listdir("/dev/shm")

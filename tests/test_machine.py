"""pneumo.machine against the kernel's own answers, and against control groups and sockets made for the purpose."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pneumo import machine


def group(folder: Path, **files: str) -> Path:
    """A control group's folder; "__" in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


def test_limits_of_version_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    """The parent allows 1.5 cores and the child 4: 1.5 hold. The child's memory limit is below the parent's none."""
    root = group(tmp_path / "fs", cpu__max="max 100000", memory__max="max")
    group(root / "job", cpu__max="150000 100000", memory__max="max")
    group(root / "job/step", cpu__max="400000 100000", memory__max=str(3 << 30))
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    assert machine.limits(tmp_path / "cgroup", root) == machine.Limits(2, 1.5, 3 << 30)


def test_limits_of_version_1(tmp_path: Path) -> None:
    """Quota and period in two files under a folder of both controllers' names; -1 and a huge number mean no limit."""
    root = tmp_path / "fs"
    group(root / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(root / "cpu,cpuacct/pod", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(root / "memory", memory__limit_in_bytes="9223372036854771712")
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere/hidden\n3:cpu,cpuacct:/pod\n0::/\n")
    assert machine.limits(tmp_path / "cgroup", root) == machine.Limits(1, 0.5, None)


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    """No file, no limit, no error."""
    assert machine.limits(tmp_path / "none", tmp_path) == machine.Limits(None, None, None)


def test_a_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores in the mask: 1.5 cores of quota keep two busy, none keeps four, and there is always one."""
    for quota, cores in ((1.5, 2), (None, 4), (0.2, 1), (16, 4)):
        monkeypatch.setattr(machine, "limits", lambda quota=quota: machine.Limits(2, quota, None))
        assert machine.usable_cores((0, 1, 2, 3)) == cores


def test_cores_come_before_their_second_threads(tmp_path: Path) -> None:
    """CPUs 0 and 4 are one core, as are 1 and 5; of that of 2 and 6 the mask has only 6; 9 is unknown."""
    for cpu, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: "2,6"}.items():
        group(tmp_path / f"cpu{cpu}" / "topology", thread_siblings_list=siblings)
    assert machine.by_core({0, 1, 4, 5, 6, 9}, tmp_path) == (0, 1, 6, 9, 4, 5)
    group(tmp_path / "cpu1" / "topology", thread_siblings_list="0-1")
    assert machine.by_core({0, 1}, tmp_path) == (0, 1)
    assert machine.by_core({2, 3}, tmp_path / "none") == (2, 3)


def test_a_quota_takes_the_second_threads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "by_core", lambda mask: (0, 2, 1, 3))
    monkeypatch.setattr(machine, "limits", lambda: machine.Limits(2, 1.5, None))
    assert machine.usable((0, 1, 2, 3)) == (0, 2)


def test_the_machine_is_what_other_programs_say() -> None:
    """nproc, and the memory of /proc/meminfo."""
    here = machine.machine()
    assert len(here.affinity) == int(subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout)
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert here.memory_bytes == pytest.approx(int(total.split()[1]) * 1024, rel=0.01)
    assert 1 <= here.usable_cores <= len(here.affinity) <= here.logical_cpus


def test_listening_finds_this_process_sockets_and_no_others() -> None:
    """Sockets that listen on either family are there until they are closed; a connected one never is."""
    before = set(machine.listening())
    with socket.create_server(("127.0.0.1", 0)) as four, socket.create_server(("::", 0), family=socket.AF_INET6) as six:
        with socket.create_connection(four.getsockname()):
            found = set(machine.listening()) - before
        assert found == {f"127.0.0.1:{four.getsockname()[1]}", f"[::]:{six.getsockname()[1]}"}
        child = subprocess.run(
            [sys.executable, "-c", "from pneumo.machine import listening; print(listening())"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.strip() == "()"
    assert set(machine.listening()) == before


@pytest.mark.parametrize(
    ("where", "loopback"),
    [("127.0.0.1:5", True), ("[::1]:5", True), ("[::ffff:127.0.0.1]:5", True), ("0.0.0.0:5", False), ("[::]:5", False)],
)
def test_loopback_addresses_are_known(where: str, loopback: bool) -> None:
    """What can be reached from this host only."""
    assert machine.is_loopback(where) is loopback


def test_free_bytes_of_what_does_not_exist_yet_are_those_of_its_parent(tmp_path: Path) -> None:
    """A folder to be made has its parent's space."""
    stat = os.statvfs(tmp_path)
    assert machine.free_bytes(tmp_path / "a/b") == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.05)

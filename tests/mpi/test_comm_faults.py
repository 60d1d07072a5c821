"""How the backend `pneumo` fails: in time, on every rank, naming who and what, and leaving nothing behind."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness import BIN, Launcher, run

JOB = Path(__file__).with_name("comm_faults_job.py")
KILLED = -9


# The cases that share a job, by its name: forked from the same ranks, one after the other.
JOBS: dict[str, Sequence[str]] = {
    "calls": ("disagree", "disagree_in_a_subgroup", "message_sizes"),
    "late": ("late", "late_messages", "a_listener_outlives_the_timeout", "two_are_late", "wait_with_a_timeout"),
    "killed": ("killed_while_others_wait", "killed_in_a_collective", "killed_while_starting"),
    "left": ("leaves_with_an_exception", "leaves_in_peace", "leaves_with_a_blocked_thread"),
    "signals": (
        "interrupted_in_a_collective",
        "interrupted_in_a_wait",
        "interrupted_in_a_recv",
        "terminated_in_a_recv",
    ),
    "teardown": (
        "destroyed_with_work",
        "destroyed_with_open_messages",
        "destroyed_and_forgotten",
        "aborted_by_one",
        "aborted_by_one_that_takes_part",
        "aborted_by_all_and_destroyed",
        "aborted_twice",
        "aborted_after_destroy",
        "destroyed_by_one",
        "subgroups_first",
        "world_first",
        "aborted_by_a_thread",
        "destroyed_under_a_thread",
    ),
    "ends": ("destroyed_with_work_that_ends", "callback_at_the_end"),
    "again": ("again_and_again", "again_after_failures"),
    "posix": ("again_and_again_posix", "killed_in_a_posix_collective"),
    "start": ("bad_settings", "good_settings", "a_bad_setting_on_one_rank", "one_does_not_come", "two_do_not_come"),
    "fork": ("forked_worker", "forked_children"),
}


class Watch:
    """The names that appear in a folder, however short they are there, from inotify."""

    CREATED = 0x100 | 0x80  # IN_CREATE, IN_MOVED_TO

    def __init__(self, folder: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, folder.encode(), self.CREATED) < 0:
            raise OSError(ctypes.get_errno(), f"inotify of {folder}")

    def names(self) -> set[str]:
        """What has appeared since the last look."""
        names = set()
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._fd, 1 << 16):
                at = 0
                while at < len(block):
                    length = struct.unpack_from("iIII", block, at)[3]
                    names.add(block[at + 16 : at + 16 + length].rstrip(b"\0").decode())
                    at += 16 + length
        return names

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a case went on one rank; `code` is None where its process hung and was killed."""

    notes: dict[str, Any]
    failure: str | None
    code: int | None
    seconds: float
    at: float  # by time.time
    pid: int
    stack: str


@dataclass(slots=True)
class Faults:
    """Runs the jobs of cases, each when one of its cases is first asked for."""

    folder: Path
    found: dict[str, list[Ending]] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)  # that a job's processes made in /dev/shm, by the job
    broken: dict[str, str] = field(default_factory=dict)

    def __call__(self, case: str) -> list[Ending]:
        """How a case ended on ranks 0, 1 and 2."""
        job = next(job for job, cases in JOBS.items() if case in cases)
        self.made_by(job)
        return self.found[case]

    def made_by(self, job: str) -> set[str]:
        """The names that the job's processes made in /dev/shm, those gone again too."""
        if job not in self.names and job not in self.broken:
            self.run(job)
        if job in self.broken:
            pytest.fail(f"the job of these cases: {self.broken[job]}", pytrace=False)
        return self.names[job]

    def run(self, job: str) -> None:
        """Run a job, and read how its cases ended."""
        folder = self.folder / job
        folder.mkdir()
        watch = Watch("/dev/shm")
        try:
            Launcher(folder)(3, file=JOB, args=[folder, *JOBS[job]], timeout=280, env=LOOPBACK)
        except pytest.fail.Exception as error:
            self.broken[job] = str(error)
            return
        finally:
            made = watch.names()
            watch.close()
        for case in JOBS[job]:
            self.found[case] = endings(folder, case, 3)
        self.names[job] = {name for name in made if "pneumo" in name and of_these(name, pids(folder))}


LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def endings(folder: Path, case: str, ranks: int) -> list[Ending]:
    """What a job has written of a case."""
    found = []
    for rank in range(ranks):
        end = json.loads((folder / f"{case}.{rank}.end").read_text())
        path = folder / f"{case}.{rank}.json"
        noted = json.loads(path.read_text()) if path.exists() else {"notes": {}}
        stack = (folder / f"{case}.{rank}.stack").read_text()
        found.append(
            Ending(noted["notes"], noted.get("failure"), end["code"], end["seconds"], end["at"], end["pid"], stack)
        )
    return found


def pids(folder: Path) -> set[int]:
    """The processes in which a job's cases ran."""
    found = {json.loads(path.read_text())["pid"] for path in folder.glob("*.end")}
    for path in folder.glob("*.json"):
        found.update(json.loads(path.read_text())["notes"].get("pids", ()))
    return found


def of_these(name: str, processes: set[int]) -> bool:
    """Whether a name in /dev/shm may be one of these processes': it does not name another one."""
    numbers = {int(number) for number in re.findall(r"\d+", name)}
    return not numbers or bool(numbers & processes)


def left_in_shared_memory(processes: set[int]) -> list[str]:
    """The names in /dev/shm that are ours and these processes'."""
    return [name for name in os.listdir("/dev/shm") if "pneumo" in name and of_these(name, processes)]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """How the cases of failure end."""
    if shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}") is None:
        pytest.skip("no mpirun in this environment or on PATH")
    faults = Faults(tmp_path_factory.mktemp("faults"))
    yield faults
    for name in left_in_shared_memory(set().union(*(pids(faults.folder / job) for job in faults.names))):
        os.unlink(f"/dev/shm/{name}")  # only where a test has failed


def assert_ended(found: Sequence[Ending], codes: Mapping[int, int] | None = None) -> None:
    """Every rank's process ended by itself, without an unexpected exception, and with code 0 unless said otherwise."""
    for rank, ending in enumerate(found):
        assert ending.code is not None, f"rank {rank} hung:\n{ending.stack}"
        expected = (codes or {}).get(rank, 0)
        assert ending.code == expected, f"rank {rank} ended with {ending.code}: {ending.failure}"
        assert expected or ending.failure is None, f"rank {rank}: {ending.failure}"


def error(ending: Ending, what: str) -> str:
    """The text of the error with which a call ended, which has to be one of torch.distributed's own, and ours."""
    note = ending.notes[what]
    assert note["ended"] == "DistBackendError", f"{what} ended with {note['ended']}: {note['text']}"
    text: str = note["text"]
    assert "pneumo: " in text, f"{what}: not ours: {text}"
    return text


def names_ranks(text: str, *ranks: int) -> bool:
    """Whether a sentence names exactly these ranks together."""
    listed = ", ".join(map(str, ranks))
    return re.search(rf"\branks? {listed}(?!\d|, \d)", text) is not None


# ---- ranks that call different things

SUMS = ("all_reduce", "sum", "4 x float32")
# What each of the ranks has to be said to call, as words of its call.
CALLED: dict[str, dict[str, Sequence[str]]] = {
    "operations": {"0": SUMS, "1": ("broadcast", "root 0", "4 x float32"), "2": ("barrier",)},
    "dtypes": {"0, 1": SUMS, "2": ("all_reduce", "4 x float64")},
    "dtypes_of_one_size": {"0": ("4 x bfloat16",), "1, 2": ("4 x float16",)},
    "counts": {"0": SUMS, "1": ("5 x float32",), "2": ("6 x float32",)},
    "small_and_large": {"0, 2": SUMS, "1": (f"{1 << 20} x float32",)},
    "large": {"0, 2": (f"{1 << 20} x float32",), "1": (f"{(1 << 20) + 1} x float32",)},
    "large_operations": {"0, 1": ("all_reduce",), "2": ("broadcast", "root 2")},
    "roots_of_broadcast": {"0": ("broadcast", "root 0"), "1, 2": ("broadcast", "root 1")},
    "roots_of_a_large_broadcast": {"0": ("broadcast", "root 0"), "1, 2": ("broadcast", "root 1")},
    "roots_of_reduce": {"0": ("reduce", "sum", "root 0"), "1, 2": ("reduce", "sum", "root 1")},
    "roots_of_gather": {"0": ("gather", "root 0"), "1, 2": ("gather", "root 1")},
    "roots_of_scatter": {"0": ("scatter", "root 0"), "1, 2": ("scatter", "root 1")},
    "reduce_ops": {"0, 2": SUMS, "1": ("all_reduce", "max")},
    "sum_and_average": {"0": SUMS, "1, 2": ("all_reduce", "average")},
    "all_gather_counts": {"0": ("all_gather", "4 x"), "1": ("all_gather", "5 x"), "2": ("all_gather", "6 x")},
    "reduce_scatter_counts": {"0": ("reduce_scatter", "4 x"), "1": ("5 x",), "2": ("6 x",)},
    "gather_counts": {"0": ("gather", "4 x"), "1": ("gather", "5 x"), "2": ("gather", "6 x")},
    "coalesced": {"0, 2": ("all_reduce", "8 x float32"), "1": ("all_reduce", "4 x float32")},
    "monitored_barrier": {"0": SUMS, "1, 2": ("barrier",)},
    "asynchronous": {"0": SUMS, "1": ("5 x float32",), "2": ("6 x float32",)},
    "futures": {"0": SUMS, "1": ("5 x float32",), "2": ("6 x float32",)},
}
CALL = re.compile(r"ranks? (\d+(?:, \d+)*) calls? (\w+\([^)]*\))")


def assert_calls(text: str, called: Mapping[str, Sequence[str]]) -> None:
    """The error tells of exactly these ranks that they called this."""
    said = dict(CALL.findall(text))
    assert said.keys() == called.keys(), text
    for ranks, words in called.items():
        assert all(word in said[ranks] for word in words), f"{ranks}: {words} not in {text}"


@pytest.mark.parametrize("name", CALLED)
def test_ranks_that_disagree_are_all_told_who_calls_what(faults: Faults, name: str) -> None:
    found = faults("disagree")
    assert_ended(found)
    for ending in found:
        text = error(ending, name)
        assert_calls(text, CALLED[name])
        assert "collective 3 of" in text
        assert_calls(error(ending, f"{name}/next"), CALLED[name])


@pytest.mark.parametrize(
    ("name", "sent", "expected"),
    [
        ("splits", 12, 8),
        ("splits_of_nothing", 0, 8),
    ],
)
def test_unequal_splits_are_told_to_all(faults: Faults, name: str, sent: int, expected: int) -> None:
    found = faults("disagree")
    assert_ended(found)
    for ending in found:
        assert f"rank 0 sends {sent} bytes to rank 1, which expects {expected}" in error(ending, name)
        error(ending, f"{name}/next")


def test_every_disagreement_is_looked_at(faults: Faults) -> None:
    noted = {name for name in faults("disagree")[0].notes if "/" not in name}
    assert noted == CALLED.keys() | {"splits", "splits_of_nothing"}


def test_a_subgroup_names_the_ranks_of_the_world(faults: Faults) -> None:
    found = faults("disagree_in_a_subgroup")
    assert_ended(found)
    for ending in found[1:]:
        assert_calls(error(ending, "counts"), {"1": ("5 x float32",), "2": ("6 x float32",)})


def test_messages_of_another_size_are_refused_on_both_sides(faults: Faults) -> None:
    found = faults("message_sizes")
    assert_ended(found)
    assert "to rank 1" in error(found[0], "size")
    assert "rank 0 sends 16" in error(found[1], "size")
    assert "32 bytes" in error(found[1], "size")
    assert [found[rank].notes["next"]["ended"] for rank in (0, 1)] == ["done", "done"]


# ---- a rank that comes too late


def assert_in_time(note: Mapping[str, Any], least: float = 1.5, most: float = 10) -> None:
    """A call ended when its timeout of 2 s was over: not before, and not much later on a machine that is busy."""
    assert least < note["seconds"] < most, note


@pytest.mark.parametrize("name", ["small", "large", "barrier", "monitored_barrier", "broadcast"])
def test_a_late_rank_is_named_after_the_timeout(faults: Faults, name: str) -> None:
    found = faults("late")
    assert_ended(found)
    for ending in found[:2]:
        text = error(ending, name)
        assert names_ranks(text, 2), text
        assert "collective 3 of" in text
        assert_in_time(ending.notes[name])
        assert ending.notes[f"{name}/next"]["seconds"] < 2
        error(ending, f"{name}/next")


@pytest.mark.parametrize("name", ["future", "large_future", "work"])
def test_a_late_rank_is_named_by_what_waits_for_it(faults: Faults, name: str) -> None:
    found = faults("late")
    assert_ended(found)
    for ending in found[:2]:
        note = ending.notes[name]
        assert note["ended"] != "done", note
        assert names_ranks(note["text"], 2), note
        assert "collective 3 of" in note["text"]
        assert note["seconds"] < 10


def test_what_is_queued_behind_a_late_rank_fails_too(faults: Faults) -> None:
    for ending in faults("late")[:2]:
        assert names_ranks(error(ending, "queue/0"), 2)
        assert "collective 3 of" in error(ending, "queue/0")
        for i in (1, 2):
            error(ending, f"queue/{i}")
            assert ending.notes[f"queue/{i}"]["seconds"] < 4


@pytest.mark.parametrize(
    "name", ["small", "large", "barrier", "monitored_barrier", "broadcast", "future", "large_future", "work"]
)
def test_the_late_rank_gets_an_error_when_it_comes(faults: Faults, name: str) -> None:
    note = faults("late")[2].notes[name]
    assert note["ended"] != "done", "the others have given this collective up"
    assert "rank 0" in note["text"] or "rank 1" in note["text"], note
    assert note["seconds"] < 2 + 6, note


def test_messages_that_nobody_answers_time_out(faults: Faults) -> None:
    found = faults("late_messages")
    assert_ended(found)
    assert names_ranks(error(found[0], "recv"), 2)
    assert names_ranks(error(found[0], "recv_any"), 1, 2)
    assert names_ranks(error(found[1], "send"), 2)
    for ending, what in ((found[0], "recv"), (found[0], "recv_any"), (found[1], "send")):
        assert_in_time(ending.notes[what])
    assert names_ranks(error(found[2], "recv_late"), 1), "what was withdrawn is not received"
    assert found[2].notes["recv_late"]["seconds"] < 10


def test_a_timeout_of_a_message_begins_with_the_wait_for_it(faults: Faults) -> None:
    found = faults("a_listener_outlives_the_timeout")
    assert_ended(found)
    ended = {what: note["ended"] for one in found for what, note in one.notes.items() if "/" in what or what == "send"}
    assert set(ended.values()) == {"done"}
    assert found[0].notes["wait"]["ended"] == "done", found[0].notes["wait"]
    assert found[0].notes["received"] == [7.0] * 4


def test_open_messages_do_not_hold_up_the_end_of_a_group(faults: Faults) -> None:
    for ending in faults("destroyed_with_open_messages"):
        assert ending.notes["destroyed_with_open_messages/destroy"]["seconds"] < 20  # of a timeout of 60


def test_all_late_ranks_are_named(faults: Faults) -> None:
    found = faults("two_are_late")
    assert_ended(found)
    assert names_ranks(error(found[0], "barrier"), 1, 2)


def test_a_wait_that_runs_out_harms_nothing(faults: Faults) -> None:
    found = faults("wait_with_a_timeout")
    assert_ended(found)
    assert "number 3" in error(found[0], "short")
    assert found[0].notes["long"]["ended"] == "done"
    assert found[0].notes["sum"] == [3.0] * 4


# ---- a rank that dies


def test_who_waits_for_a_killed_rank_is_told_in_time(faults: Faults) -> None:
    found = faults("killed_while_others_wait")
    assert_ended(found, {2: KILLED})
    died = json.loads((faults.folder / "killed" / "killed_while_others_wait.2.json").read_text())["died"]
    for ending in found[:2]:
        assert ending.notes["noticed"] - died < 8
        assert ending.notes["all noticed"] - died < 8 + 4
        for what in ("main", "receive", "afterwards"):
            text = error(ending, what)
            assert names_ranks(text, 2), text
            assert "died" in text, text
        assert ending.notes["future"]["ended"] != "done"
        assert names_ranks(ending.notes["future"]["text"], 2), ending.notes["future"]


@pytest.mark.parametrize("case", ["killed_in_a_collective", "killed_in_a_posix_collective"])
def test_a_rank_killed_in_a_collective_is_named(faults: Faults, case: str) -> None:
    found = faults(case)
    assert_ended(found, {1: KILLED})
    for ending in (found[0], found[2]):
        assert ending.notes["after"] < 0.5 + 8
        for what in ("loop", "next"):
            assert names_ranks(error(ending, what), 1), ending.notes[what]


def test_a_rank_killed_while_it_starts_hangs_nobody(faults: Faults) -> None:
    found = faults("killed_while_starting")
    assert_ended(found)
    attempts = [name for name in found[0].notes if name.startswith("attempt")]
    assert len(attempts) == 8
    for rank, ending in enumerate(found):
        for attempt in attempts:
            note = ending.notes[attempt]
            assert note["status"] == 0 or (rank == 1 and note["status"] == 9), f"rank {rank}, {attempt}: {note}"
            assert note["seconds"] < 20, f"rank {rank}, {attempt}: {note}"
    assert any(found[1].notes[attempt]["status"] == 9 for attempt in attempts), "nobody was killed"


# ---- a rank that leaves


def test_the_others_are_told_when_a_rank_ends_by_an_exception(faults: Faults) -> None:
    found = faults("leaves_with_an_exception")
    assert_ended(found, {1: 1})
    assert "ValueError: the reason" in str(found[1].failure)
    for ending in (found[0], found[2]):
        assert names_ranks(error(ending, "all_reduce"), 1)
        assert ending.notes["all_reduce"]["seconds"] < 8


@pytest.mark.parametrize(
    "case",
    [
        "leaves_in_peace",
        "leaves_with_a_blocked_thread",
    ],
)
def test_the_others_are_told_when_a_rank_ends(faults: Faults, case: str) -> None:
    found = faults(case)
    assert_ended(found)
    assert found[1].at - found[1].notes["leaves"] < 15, "its end was held up"
    for ending in (found[0], found[2]):
        assert names_ranks(error(ending, "all_reduce"), 1)
        assert ending.notes["all_reduce"]["seconds"] < 8


RAISES = """
import datetime, os, sys
import torch, torch.distributed as dist
import pneumo.comm
from pneumo.world import World
with World.start() as world:
    store = dist.FileStore(sys.argv[1], world.size)
    dist.init_process_group("pneumo", store=store, rank=world.rank, world_size=world.size,
                            timeout=datetime.timedelta(seconds=100))
    dist.barrier()
    if world.rank == 1:
        raise ValueError("the reason")
    dist.all_reduce(torch.ones(1 << 20))
    print("NEVER")
"""


def test_an_exception_on_one_rank_ends_the_job(mpirun: Launcher, tmp_path: Path) -> None:
    done = mpirun(3, RAISES, args=[tmp_path / "store"], timeout=90, check=False, env=LOOPBACK)
    assert done.returncode == 1, done.text
    assert "failed: ValueError: the reason" in done.text
    assert "NEVER" not in done.stdout
    assert done.seconds < 60


# ---- signals


@pytest.mark.parametrize("case", ["interrupted_in_a_collective", "interrupted_in_a_wait", "interrupted_in_a_recv"])
def test_an_interrupt_ends_a_blocked_rank(faults: Faults, case: str) -> None:
    found = faults(case)
    assert_ended(found, {0: 3})
    assert found[0].notes["blocked"]["ended"] == "KeyboardInterrupt", found[0].notes["blocked"]
    assert found[0].notes["blocked"]["seconds"] < 1 + 8
    for ending in found[1:]:
        assert names_ranks(error(ending, "peer"), 0)
        assert ending.notes["peer"]["seconds"] < 1 + 8 + 8


def test_a_termination_ends_a_blocked_rank(faults: Faults) -> None:
    found = faults("terminated_in_a_recv")
    assert_ended(found, {0: -15})
    for ending in found[1:]:
        assert names_ranks(error(ending, "peer"), 0)
        assert ending.notes["peer"]["seconds"] < 1 + 8


# ---- abort and destroy

# What the ranks 0 and 1 are told of the operations for which rank 2 does not come, where it is always the same.
TOLD = {
    "aborted_by_one": "rank 2",
    "aborted_by_one_that_takes_part": "abort",
    "aborted_by_all_and_destroyed": "abort",
    "aborted_twice": "abort",
    "destroyed_by_one": "rank 2",
    "aborted_by_a_thread": "abort",
}


@pytest.mark.parametrize("case", JOBS["teardown"])
def test_a_world_is_torn_down_in_any_order(faults: Faults, case: str) -> None:
    found = faults(case)
    assert_ended(found)
    for rank, ending in enumerate(found):
        assert ending.notes[f"{case}/seconds"] < 5 + 15, "it ran into its timeout again and again"
        assert ending.notes[f"{case}/initialized"] is False
        waits = {name: note for name, note in ending.notes.items() if re.fullmatch(rf"{case}/(\d+|next)", name)}
        for name, note in waits.items():
            assert note["ended"] == "DistBackendError", f"{name}: {note}"
            assert rank == 2 or TOLD.get(case, "") in note["text"], f"{name}: {note}"
        assert ending.notes.get(f"{case}/refused", True), "a group that is destroyed does no more"


def test_who_destroys_a_group_waits_for_its_work(faults: Faults) -> None:
    found = faults("destroyed_with_work_that_ends")
    assert_ended(found)
    for ending in found:
        assert ending.notes["sums"] == [[3, 3]] * 3
    assert found[2].notes["received"] == [5] * 4


def test_a_callback_at_the_end_of_the_process_is_refused(faults: Faults) -> None:
    found = faults("callback_at_the_end")
    assert_ended(found)
    for ending in found:
        assert ending.notes["callback"]["ended"] == "DistBackendError"


def test_every_way_of_tearing_down_is_tried(faults: Faults) -> None:
    waited = {case for case in JOBS["teardown"] if f"{case}/0" in faults(case)[0].notes}
    assert waited == set(JOBS["teardown"]) - {"destroyed_and_forgotten", "world_first"}


# ---- again and again


@pytest.mark.parametrize("case", ["again_and_again", "again_after_failures", "again_and_again_posix"])
def test_nothing_grows_when_worlds_come_and_go(faults: Faults, case: str) -> None:
    found = faults(case)
    assert_ended(found)
    for ending in found:
        second, *later = ending.notes["held"][1:]
        # A few mappings come and go with malloc and threads; those of groups are counted apart, to the last one.
        assert later[-1].pop("mappings") - second.pop("mappings") < 8, ending.notes["held"]
        assert later[-1] == second, ending.notes["held"]


def test_posix_memory_has_no_name_once_it_is_open_everywhere(faults: Faults) -> None:
    """Only the doorbell of each process keeps its own, since later groups may have other members."""
    for ending in faults("again_and_again_posix"):
        doorbell, *others = ending.notes["names"]
        assert [name["bytes"] for name in doorbell] == [4096]
        assert others == [doorbell] * 3


def test_the_watch_sees_what_is_made(faults: Faults) -> None:
    assert faults.made_by("posix")


def test_posix_memory_leaves_nothing(faults: Faults) -> None:
    assert faults.made_by("posix")
    assert left_in_shared_memory(pids(faults.folder / "posix")) == []


@pytest.mark.parametrize("job", [job for job in JOBS if job not in ("posix", "start")])
def test_nothing_of_ours_is_ever_in_shared_memory(faults: Faults, job: str) -> None:
    assert faults.made_by(job) == set()


# ---- settings, and a start that fails

SETTINGS = (
    *(f"PNEUMO_COMM_SHM={value}" for value in ("sysv", "MEMFD")),
    *(f"PNEUMO_COMM_BYTES={value}" for value in ("lots", "-1", "nan", "64MB", "12X", "100")),
    *(f"PNEUMO_COMM_CHUNK={value}" for value in ("big", "1KM", "100")),
    *(f"PNEUMO_COMM_ONE_SHOT={value}" for value in ("-5", "8")),
    *(f"PNEUMO_COMM_SPIN_US={value}" for value in ("soon", "5 ms", "-1")),
    "PNEUMO_COMM_STORES=nt",
)
GOOD_SETTINGS = (
    "BYTES=1M",
    "BYTES=400000",
    "CHUNK=64K",
    "ONE_SHOT=1K",
    "SPIN_US=0",
    "STORES=cached",
    "STORES=streamed",
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_bad_setting_is_refused_by_name(faults: Faults, setting: str) -> None:
    found = faults("bad_settings")
    assert_ended(found)
    assert {name for name in found[0].notes if "=" in name} == set(SETTINGS)
    name, value = setting.split("=")
    for ending in found:
        text = error(ending, setting)
        assert name in text, text
        assert value in text or value == "100", text


@pytest.mark.parametrize("setting", GOOD_SETTINGS)
def test_a_good_setting_is_taken(faults: Faults, setting: str) -> None:
    found = faults("good_settings")
    assert_ended(found)
    assert [ending.notes[setting]["ended"] for ending in found] == ["done"] * 3, found[0].notes[setting]


def test_a_bad_setting_on_one_rank_does_not_hang_the_others(faults: Faults) -> None:
    found = faults("a_bad_setting_on_one_rank")
    assert_ended(found)
    assert "PNEUMO_COMM_SHM" in error(found[1], "init")
    for ending in (found[0], found[2]):
        assert names_ranks(error(ending, "init"), 1)
        assert ending.notes["init"]["seconds"] < 15


def test_a_rank_that_does_not_come_to_the_start_is_named(faults: Faults) -> None:
    found = faults("one_does_not_come")
    assert_ended(found)
    for ending in (found[0], found[2]):
        assert names_ranks(error(ending, "init"), 1)
        assert 2 < ending.notes["init"]["seconds"] < 15
    assert names_ranks(error(found[1], "new_group"), 2)


def test_all_that_do_not_come_to_the_start_are_named(faults: Faults) -> None:
    assert "ranks 1, 2 did not come" in error(faults("two_do_not_come")[0], "init")


def test_too_little_shared_memory_is_said_in_a_sentence(mpirun: Launcher, tmp_path: Path) -> None:
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    tried = subprocess.run([*mounted, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no mount namespace can be made here: {tried.stderr.strip()}")
    names = ["little_shared_memory", "memfd_beside_little_shared_memory"]
    command = [*mounted, "mpirun", "-n", "2", sys.executable, str(JOB), str(tmp_path), *names]
    done = run(command, timeout=120, env=LOOPBACK, cwd=tmp_path, folder=mpirun.folder)
    assert done.returncode == 0, done.text
    found = endings(tmp_path, names[0], 2)
    assert_ended(found)
    for ending in found:
        assert 0 < ending.notes["free"] <= 1 << 20, "this is the small one"
        text = error(ending, "too small")
        assert "/dev/shm" in text, text
        assert "PNEUMO_COMM_BYTES" in text, text
        assert "\n" not in text.strip(), text
        assert ending.notes["enough"]["ended"] == "done", ending.notes["enough"]
    found = endings(tmp_path, names[1], 2)
    assert_ended(found)
    for ending in found:
        assert not [name for name in ending.notes["names after"] if f"pneumo-{ending.pid}" in name]


# ---- forks


def test_a_data_loader_may_fork_workers(faults: Faults) -> None:
    found = faults("forked_worker")
    assert_ended(found)
    for ending in found:
        assert ending.notes["squares"] == [i * i for i in range(8)]
        assert len(ending.notes["said"]) == 1
        assert "forked" in ending.notes["said"][0]


@pytest.mark.parametrize(
    "attempt",
    [
        "all_reduce",
        "async",
        "send",
        "new_group",
        "wait",
    ],
)
def test_a_forked_child_is_refused(faults: Faults, attempt: str) -> None:
    found = faults("forked_children")
    assert_ended(found)
    for ending in found:
        note = ending.notes[attempt]
        assert note["status"] == 0, f"it hung or crashed: {note}"
        assert "forked" in note["said"], note


@pytest.mark.parametrize("attempt", ["destroy", "abort", "shutdown", "future", "leave"])
def test_a_forked_child_may_leave(faults: Faults, attempt: str) -> None:
    found = faults("forked_children")
    assert_ended(found)
    for ending in found:
        assert ending.notes[attempt] == {"status": 0, "said": "done"}

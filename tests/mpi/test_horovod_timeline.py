"""Our records of Horovod's fused responses against what its own timeline says of them, to the microsecond.

Ranks share their cores with whatever else runs, and what is preempted between Horovod's stamp and ours is late by the
other's time slice. So what has to hold for each record is order, and amounts for most records.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from harness import Launcher
from horovod_timeline import Response, responses
from horovod_timeline_job import CASES, EQUAL, LATE, LATE_RANK, LATE_S, STEPS

from pneumo.installed import horovod_missing
from pneumo.study.collectives import UNKNOWN, Group, Split, split

JOB = Path(__file__).with_name("horovod_timeline_job.py")
RANKS = 2
US = 1_000
UNIT_NS = 50 * US  # for what a constant between two clocks, and a stamp in whole microseconds, leave open
MOST = 0.8  # of the records, whose amounts have to agree
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trained:
    """A case: its responses as the timeline has them, and what each rank has recorded, by rank and response.

    `handed` has, for each rank and response, when the rank handed over each tensor: before and after, in ns.
    `offset_ns` is what the records' clock is ahead of the timeline's.
    """

    responses: list[Response]
    records: list[list[Record]]
    handed: list[list[dict[str, tuple[int, int]]]]
    steps: list[int]  # of each response
    offset_ns: int

    @property
    def arrived_ns(self) -> list[int]:
        """When the last rank arrived at each response."""
        return [max(record["enqueued_ns"] for record in pair) for pair in zip(*self.records, strict=True)]

    def negotiated_ns(self, number: int) -> tuple[int, int]:
        """When negotiation of a response's tensor that was ready last began and ended, on the records' clock."""
        begin, end = max(self.responses[number].negotiations.values(), key=lambda interval: interval[1])
        return begin + self.offset_ns, end + self.offset_ns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job has written of all cases."""
    if why := horovod_missing():
        pytest.skip(why)
    found = tmp_path_factory.mktemp("timeline")
    Launcher(found)(RANKS, file=JOB, args=[found], timeout=200)
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """The name of a case."""
    return str(request.param)


@pytest.fixture
def trained(folder: Path, case: str) -> Trained:
    """One of the cases."""
    return load(folder, case)


def load(folder: Path, case: str) -> Trained:
    """A case from the job's files."""
    ranks = [json.loads((folder / f"{case}-{rank}.json").read_text())["steps"] for rank in range(RANKS)]
    records = [[record for step in steps for record in step["records"]] for steps in ranks]
    number = [step for step, made in enumerate(ranks[0]) for _ in made["records"]]
    said = responses(folder / f"{case}.timeline")
    handed = [[steps[of]["handed"] for of in number] for steps in ranks]
    ahead = [record["started_ns"] - one.begin_ns for record, one in zip(records[0], said, strict=True)]
    return Trained(said, records, handed, number, int(median(ahead)))


def test_each_response_left_a_record_with_its_bytes_on_every_rank(trained: Trained, case: str) -> None:
    said = [response.bytes for response in trained.responses]
    for rank in range(RANKS):
        records = trained.records[rank]
        assert [record["seq"] for record in records] == list(range(len(said)))
        assert [record["bytes"] for record in records] == said
        assert {(record["op"], record["dtype"], record["group"]) for record in records} == {
            ("allreduce", "float32", "2 ranks")
        }
    widths, fused_bytes, _ = CASES[case]
    whole = sum(4 * (a + 1) * b for a, b in pairwise(widths))
    for step in range(STEPS):
        assert sum(size for size, of in zip(said, trained.steps, strict=True) if of == step) == whole
    if not fused_bytes:
        assert len(said) == STEPS * 2 * (len(widths) - 1), "each tensor travelled alone"
    elif "fused" in case:
        assert any(len(response.tensors) > 1 for response in trained.responses)


def test_a_rank_arrives_with_the_last_of_the_tensors_that_the_timeline_names(trained: Trained, case: str) -> None:
    """The record's stamp was taken between the moments before and after that tensor was handed over."""
    if CASES[case][0] == EQUAL:
        pytest.skip("which of equal tensors travelled is not to be known by their bytes")
    for rank in range(RANKS):
        for response, record, handed in zip(
            trained.responses, trained.records[rank], trained.handed[rank], strict=True
        ):
            before, after = max(handed[tensor] for tensor in response.tensors)
            assert before <= record["enqueued_ns"] <= after
            assert record["bound"].startswith("its tensors found by their bytes")


def test_nothing_travels_before_its_tensors_are_there_and_all_stamps_are_in_order(trained: Trained) -> None:
    for records in trained.records:
        for record in records:
            assert record["enqueued_ns"] <= record["started_ns"] <= record["finished_ns"]
            assert record["wait_begin_ns"] <= record["wait_end_ns"]
        ends = [record["finished_ns"] for record in records]
        begins = [record["started_ns"] for record in records]
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False)), "one after the other"


def test_records_last_as_long_as_the_timelines_activities(trained: Trained) -> None:
    """The timeline is about rank 0; its activity is around the call that the probe sees."""
    said = [response.end_ns - response.begin_ns for response in trained.responses]
    ours = [record["finished_ns"] - record["started_ns"] for record in trained.records[0]]
    pairs = list(zip(said, ours, strict=True))
    assert all(b <= a + 2 * US for a, b in pairs), "no record is longer than the activity, up to its unit"
    close = [(a, b) for a, b in pairs if a - b <= max(0.2 * a, 200 * US)]
    assert len(close) >= MOST * len(pairs), pairs
    assert sum(b for _, b in close) == pytest.approx(sum(a for a, _ in close), rel=0.1, abs=3 * US * len(close))


def test_records_begin_and_end_when_the_timelines_activities_do(trained: Trained) -> None:
    """By one constant between the two clocks, which is Horovod's start."""
    apart = []
    for response, record in zip(trained.responses, trained.records[0], strict=True):
        begin, end = response.begin_ns + trained.offset_ns, response.end_ns + trained.offset_ns
        apart.append(max(abs(record["started_ns"] - begin), abs(record["finished_ns"] - end)))
    assert sum(far <= 200 * US for far in apart) >= MOST * len(apart), apart


def test_negotiation_ends_between_the_last_arrival_and_the_start(trained: Trained) -> None:
    """So the record's queue, from the last arrival to the start, is what Horovod took after all ranks were there."""
    for number, record in enumerate(trained.records[0]):
        begin, end = trained.negotiated_ns(number)
        assert trained.arrived_ns[number] <= end + UNIT_NS
        assert end <= record["started_ns"] + UNIT_NS
        handed = [before for rank in trained.handed for before, _ in rank[number].values()]
        assert min(handed) <= begin + UNIT_NS, "it begins with the first rank that is ready"


def parts(trained: Trained) -> Split:
    """The account's parts of the waits for the responses, (K, 2) each."""

    def matrix(name: str) -> Any:
        columns = [[record[name] for record in records] for records in trained.records]
        return np.array([[UNKNOWN if stamp is None else stamp for stamp in column] for column in columns]).T

    stamps = [matrix(f"{name}_ns") for name in ("enqueued", "started", "finished", "wait_begin", "wait_end")]
    steps = np.array(trained.steps)
    seq = np.arange(steps.size)
    return split(Group("2 ranks", np.arange(RANKS), steps, np.zeros_like(steps), seq, *stamps, matrix("bytes").max(1)))


def test_a_rank_that_is_late_is_waited_for_and_that_is_not_the_librarys_queue(folder: Path) -> None:
    """Of all late steps, since what else runs here may make any rank late, and Horovod's threads too.

    The timeline negotiates from rank 0's hand-over, which its thread notices within a cycle, until the late rank's
    is known there: as long as that rank was late by the records.
    """
    waited, queued, waited_by_late, negotiated = [], [], [], []
    other = 1 - LATE_RANK
    for trained in (load(folder, case) for case in CASES):
        found = parts(trained)
        for step in LATE:
            here = np.array(trained.steps) == step
            waited.append(found.peer_wait[here, other].sum())
            queued.append(found.queue[here, other].sum())
            waited_by_late.append(found.peer_wait[here, LATE_RANK].sum())
            first = trained.steps.index(step)
            begin, end = trained.negotiated_ns(first)
            arrived = [records[first]["enqueued_ns"] for records in trained.records]
            negotiated.append((end - begin) / (arrived[LATE_RANK] - arrived[other]))
    late_ns = LATE_S * 1e9
    assert median(waited) >= 0.8 * late_ns
    assert quarter(waited_by_late) <= 0.1 * late_ns
    assert quarter(queued) <= 0.2 * late_ns
    assert quarter(abs(ratio - 1) for ratio in negotiated) <= 0.1, negotiated


def quarter(values: Iterable[float]) -> float:
    """The value that a quarter of all are not above."""
    return float(np.quantile(list(values), 0.25))


PROBES = """
import json
from dataclasses import asdict
import numpy as np, torch
from pneumo.backends import horovod

class Fake:
    dropped = 0

    def take(self):
        return np.array(self.rows, np.int64).reshape(-1, 4)

def records(sizes, rows, probe=True):
    fake = horovod._PROBE = Fake() if probe else None
    responses = horovod._Responses("2 ranks")
    for size in sizes:
        responses.enqueued(torch.zeros(size, dtype=torch.int8))
    last = responses._tensors[-1][0] if responses._tensors else 0
    if probe:
        fake.rows = [(last + begin, last + end, size, 0) for begin, end, size in rows]
    made = [asdict(one) for one in responses.take()]
    return [one | {name: one[name] and one[name] - last for name in STAMPS} for one in made]

STAMPS = ("enqueued_ns", "started_ns", "finished_ns")
print(json.dumps([
    records([3, 5], [(10, 20, 8)]),
    records([3, 5], [(10, 20, 4), (20, 30, 4)]),
    records([3, 5], [(-10, 20, 5), (20, 30, 3)]),
    records([3, 5], [(10, 20, 7)]),
    records([3, 5], [], probe=False),
    records([3, 0, 5], [(5, 6, 0), (10, 20, 8)]),
    records([], [(10, 20, 8)]),
]))
"""

OVERFLOWS = """
import json
import numpy as np, torch
from pneumo.backends import horovod

class Fake:
    dropped = 7  # of a training before this one

fake = horovod._PROBE = Fake()
responses = horovod._Responses("2 ranks")

def step(sizes, rows, dropped):
    for size in sizes:
        responses.enqueued(torch.zeros(size, dtype=torch.int8))
    last = responses._tensors[-1][0] if responses._tensors else 0
    rows = [(last + begin, last + end, size, 0) for begin, end, size in rows]
    fake.take = lambda: np.array(rows, np.int64).reshape(-1, 4)
    fake.dropped += dropped
    return [(one.seq, one.bytes, one.finished_ns and one.finished_ns - last, one.bound) for one in responses.take()]

print(json.dumps([
    step([], [(0, 9, 4)], 9),
    step([3, 5, 7], [(10, 20, 3)], 2),
    step([3, 5], [(10, 20, 8)], 1),
    step([3, 5], [], 2),
    step([3], [(10, 20, 3)], 0),
]))
"""


def test_numbers_and_bytes_are_what_travelled_whether_or_not_the_tensors_are_found(mpirun: Launcher) -> None:
    """Otherwise a rank on which they are not found would number all later responses differently from its peers."""
    if why := horovod_missing():
        pytest.skip(why)
    lines = mpirun(None, PROBES).stdout.splitlines()
    found, unlike, too_late, other_bytes, no_probe, empty, nothing = json.loads(lines[-1])

    def told(records: list[Record]) -> list[tuple[Any, ...]]:
        names = ("seq", "bytes", "enqueued_ns", "started_ns", "finished_ns")
        return [tuple(record[name] for name in names) for record in records]

    assert told(found) == told(empty) == [(0, 8, 0, 10, 20)]
    assert told(unlike) == [(0, 4, 0, 10, 20), (1, 4, 0, 20, 30)]
    assert told(too_late) == [(0, 5, -10, -10, 20), (1, 3, 0, 20, 30)], "the second tensor came after the first start"
    assert told(other_bytes) == told(no_probe) == [(0, 8, 0, None, None)]
    assert nothing == []
    assert all("could not be found" in record["bound"] for record in unlike + too_late)
    assert "not what was enqueued" in no_probe[0]["bound"]


def test_responses_that_the_probe_had_no_place_for_leave_their_numbers_out(mpirun: Launcher) -> None:
    """So the study finds records lost that other ranks have, or a gap in all; what follows is numbered as theirs."""
    if why := horovod_missing():
        pytest.skip(why)
    before, two_lost, empty, all_lost, after = json.loads(mpirun(None, OVERFLOWS).stdout.splitlines()[-1])
    assert before == []
    assert [one[:3] for one in two_lost] == [[0, 3, 20]]
    assert "lost, the probe's ring being full: 2" in two_lost[0][3]
    assert [one[:3] for one in empty] == [[3, 8, 20]], "what was dropped there had no bytes"
    assert "lost" not in empty[0][3]
    assert [one[:3] for one in all_lost] == [[4, 8, None]]
    assert [one[:3] for one in after] == [[6, 3, 20]]

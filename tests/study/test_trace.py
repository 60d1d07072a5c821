"""The trace of simulated trainings: valid, whole, bounded, and pointing at whoever was late."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import simulated
from clocks import Ahead, measured, restamp, two_hosts
from hypothesis import given
from hypothesis import strategies as st
from simulated import MS, SERIAL, Network, asleep
from synthetic import START_NS, entry
from trace_format import Event, faults, ns

from pneumo import trace as command
from pneumo.errors import Refused
from pneumo.study.results import ResultFolder
from pneumo.study.schema import PHASES
from pneumo.study.trace import MOST_LANES, microseconds, trace, write_trace

RANKS = 4


def spans_of(rows: simulated.Rows) -> simulated.Rows:
    """Spans of a simulated training's steps: the phases one after the other."""
    spans = []
    for row in rows:
        at = row["begin_ns"]
        for phase in PHASES:
            end = row["begin_ns"] + row["wall_ns"] if phase == PHASES[-1] else at + row[f"{phase}_ns"]
            if end > at:
                where = {name: row[name] for name in ("run", "rank", "step")}
                spans.append({**where, "phase": phase, "begin_ns": at, "end_ns": end})
                at = end
    return spans


def result(
    out: Path,
    ranks: int = RANKS,
    *,
    style: str = "ddp",
    late: int = 2,
    network: Network | None = None,
    edit: Callable[[simulated.Rows], simulated.Rows] = lambda records: records,
    **shape: Any,
) -> Path:
    """A result of a serial run and one in which rank `late` sleeps 7 ms in its backward pass; all steps are sampled."""
    runs = [SERIAL, (style, "gloo", ranks, 1)]
    serial = simulated.serial_rows(entry(0, *runs[0]), {})

    def extra(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep(7 * MS) if (rank, phase) == (late, "backward") else None

    work = simulated.plus(simulated.even(ranks), extra)
    rows, records = simulated.train(entry(1, *runs[1]), work, network, style=style, **shape)
    path = simulated.write(out, [(serial, []), (rows, edit(records))], runs)
    folder = ResultFolder.open(path)
    folder.add_spans(spans_of(serial) + spans_of(rows))
    folder.flush()
    return path


def of(events: list[Event], ph: str, cat: str | None = None) -> list[Event]:
    return [event for event in events if event["ph"] == ph and cat in (None, event.get("cat"))]


def names(events: list[Event]) -> dict[int, str]:
    """The names of the tracks by number."""
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


@pytest.mark.parametrize("style", simulated.STYLES)
@pytest.mark.parametrize("network", [Network(), Network(tells_start=False), Network(tells_finish=False)])
def test_a_trace_is_valid_and_has_a_track_for_each_rank(tmp_path: Path, style: str, network: Network) -> None:
    found = trace(result(tmp_path, style=style, network=network))
    assert faults(found) == []
    events = found["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {1: "serial, 1 rank", 2: f"{style}/gloo, {RANKS} ranks"}
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    assert {f"rank {r}{what}" for r in range(RANKS) for what in ("", " collectives")} <= tracks
    assert found["metadata"]["shown"]["arrows_left_out"] == 0


def test_the_clock_is_told_of_one_host_and_of_several(tmp_path: Path) -> None:
    path = result(tmp_path)
    assert "rank 0's monotonic clock: ranks of one host share one clock" in trace(path)["metadata"]["clock"]
    clock = Ahead(START_NS, 10**12, 3e-6)
    samples = measured(clock, [START_NS + block * 10**12 - 10**9 for block in range(1, 4)], rank=2)
    restamp(path, clock, [2, 3], two_hosts([2, 3], samples, RANKS))
    assert "rank 0's monotonic clock: 2 hosts, offsets within " in trace(path)["metadata"]["clock"]


def test_phases_cover_the_steps_on_the_common_clock(tmp_path: Path) -> None:
    path = result(tmp_path)
    found = trace(path)
    events, origin = found["traceEvents"], found["metadata"]["origin_ns"]
    steps = {(e["pid"], e["tid"], ns(e["ts"]), ns(e["dur"])) for e in of(events, "X", "step")}
    rows = simulated_steps(path)
    assert sorted((pid, ts + origin, dur) for pid, _, ts, dur in steps) == sorted(rows)
    for pid, tid, begin, length in steps:
        inside = [e for e in of(events, "X", "phase") if (e["pid"], e["tid"]) == (pid, tid)]
        inside = [e for e in inside if begin <= ns(e["ts"]) < begin + length]
        assert (ns(inside[0]["ts"]), sum(ns(e["dur"]) for e in inside)) == (begin, length)
        assert all(ns(a["ts"]) + ns(a["dur"]) == ns(b["ts"]) for a, b in pairwise(inside))


def simulated_steps(path: Path) -> list[tuple[int, int, int]]:
    from pneumo.study.results import load_table

    rows = load_table(path, "steps").to_pylist()
    return [(row["run"] + 1, row["begin_ns"], row["wall_ns"]) for row in rows]


@pytest.mark.parametrize("style", simulated.AFTER_WORK)
def test_arrows_lead_from_the_late_rank_to_all_others_and_it_is_marked(tmp_path: Path, style: str) -> None:
    events = trace(result(tmp_path, style=style, late=2, buckets=1, blocks=1, steps=3))["traceEvents"]
    tracks = names(events)
    starts = {e["id"]: tracks[e["tid"]] for e in of(events, "s")}
    ends = {e["id"]: tracks[e["tid"]] for e in of(events, "f")}
    assert Counter(starts.values()) == {"rank 2 collectives": 3 * (RANKS - 1)}
    assert Counter(ends.values()) == {f"rank {r} collectives": 3 for r in (0, 1, 3)}
    marks = of(events, "i")
    assert Counter(tracks[e["tid"]] for e in marks) == {"rank 2": 3}
    calls = [e for e in of(events, "X", "collective") if e["name"] == "allreduce"]
    assert {e["args"]["last_rank"] for e in calls} == {2}
    assert {tracks[e["tid"]] for e in calls if "cname" in e} == {"rank 2 collectives"}
    blocked = sum(e["args"].get("blocked_before_last_us", 0) for e in calls)
    assert sum(e["args"]["others_waited_us"] for e in marks) == pytest.approx(blocked)
    assert blocked >= 3 * (RANKS - 1) * 7000 * 0.99
    assert {e["args"]["bytes"] for e in calls} == {1 << 20}


@given(st.integers(0, 2**50))
def test_a_time_in_microseconds_is_the_same_nanoseconds_again(value: int) -> None:
    assert ns(microseconds(value)) == value
    assert ns(json.loads(json.dumps(microseconds(value)))) == value
    assert abs(microseconds(value) - value / 1000) < 1e-3


@pytest.mark.parametrize("buckets", [MOST_LANES, MOST_LANES + 3])
def test_collectives_that_overlap_lie_in_lanes_as_far_as_they_go(tmp_path: Path, buckets: int) -> None:
    """Of Horovod all are on their way together."""

    def together(records: simulated.Rows) -> simulated.Rows:
        begin = {r["step"]: r["enqueued_ns"] for r in records if r["seq"] % buckets == 0}
        return [row | {"enqueued_ns": begin[row["step"]] + row["seq"] % buckets} for row in records]

    found = trace(result(tmp_path, style="horovod", buckets=buckets, edit=together))
    assert faults(found) == []
    shown, lanes = found["metadata"]["shown"], set(names(found["traceEvents"]).values())
    assert f"rank 1 collectives {MOST_LANES}" in lanes
    assert f"rank 1 collectives {MOST_LANES + 1}" not in lanes
    assert shown["records_without_a_lane"] == (buckets - MOST_LANES) * RANKS * 8


@pytest.mark.parametrize("most", [500, 250, 150, 60])
def test_a_trace_is_bounded_and_says_what_it_leaves_out(tmp_path: Path, most: int) -> None:
    found = trace(result(tmp_path), most_events=most)
    assert faults(found) == []
    shown, events = found["metadata"]["shown"], found["traceEvents"]
    assert shown["events"] == len(events) <= most
    assert shown["every_kth_sampled_step"] > 1
    assert (shown["every_kth_rank"] > 1) == (most < 250)
    assert (shown["every_kth_sampled_step"] == 8) == (most < 250), "ranks are thinned only where steps do not suffice"
    serial = [e for e in of(events, "X", "step") if e["pid"] == 1]
    assert len(serial) == -(-8 // shown["every_kth_sampled_step"])
    assert {e["pid"] for e in of(events, "X")} == {1, 2}


def test_what_records_do_not_tell_is_not_drawn(tmp_path: Path) -> None:
    """Neither end nor wait on rank 2, which is last: its collectives have no length, and no arrow can begin there."""

    def silent(records: simulated.Rows) -> simulated.Rows:
        nothing = dict.fromkeys(("started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns"))
        return [row | nothing if row["rank"] == 2 else row for row in records]

    found = trace(result(tmp_path, buckets=1, edit=silent))
    assert faults(found) == []
    assert of(found["traceEvents"], "s") == []
    assert found["metadata"]["shown"]["arrows_left_out"] == 8 * (RANKS - 1)
    assert len(of(found["traceEvents"], "i")) == 8


def test_records_that_are_lost_or_doubled_do_no_harm(tmp_path: Path) -> None:
    def damaged(records: simulated.Rows) -> simulated.Rows:
        return records[3:] + records[:2] + [row | {"enqueued_ns": row["enqueued_ns"] + MS} for row in records[5:9]]

    once = trace(result(tmp_path / "a", edit=lambda records: records[3:] + records[:2]))
    found = trace(result(tmp_path / "b", edit=damaged))
    assert faults(found) == []
    assert found["traceEvents"] == once["traceEvents"]


def test_only_sampled_steps_are_drawn(tmp_path: Path) -> None:
    path = result(tmp_path)
    spans = ResultFolder.open(path)
    kept = [row for row in spans_of_table(path) if row["step"] in (0, 5)]
    spans._chunks["spans"] = []
    spans.add_spans(kept)
    spans.flush()
    events = trace(path)["traceEvents"]
    assert {e["name"] for e in of(events, "X", "step")} == {"step 0", "step 5"}
    calls = [e for e in of(events, "X", "collective") if e["name"] == "allreduce"]
    assert {e["args"]["step"] for e in calls} == {0, 5}


def spans_of_table(path: Path) -> simulated.Rows:
    from pneumo.study.results import load_table

    rows: simulated.Rows = load_table(path, "spans").to_pylist()
    return rows


def test_the_command_writes_the_same_file_every_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = result(tmp_path)
    first = write_trace(path).read_bytes()
    (path / "trace.json.gz").unlink()
    assert command.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path / "trace.json.gz")
    assert (path / "trace.json.gz").read_bytes() == first
    assert json.loads(gzip.decompress(first)) == json.loads(json.dumps(trace(path)))


def test_a_result_without_sampled_steps_and_a_foreign_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = simulated.study(tmp_path, 2)
    with pytest.raises(Refused, match="no sampled steps"):
        write_trace(path)
    for argv in ([str(path)], [str(tmp_path)], [], ["--fast"]):
        assert command.main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("pneumo: ")
        assert said.count("\n") == 1
    assert not list(tmp_path.rglob("trace.json.gz"))


def broken(events: list[Event]) -> dict[str, Callable[[], Any]]:
    """Ways to damage a trace, each with what has to be found."""
    slices, start, end = of(events, "X", "phase"), of(events, "s")[0], of(events, "f")[0]
    mark, name = of(events, "i")[0], of(events, "M")[0]
    return {
        "no dur": lambda: slices[0].pop("dur"),
        "below 0": lambda: slices[0].update(dur=-1.0),
        "ts of a wrong type": lambda: slices[0].update(ts="0"),
        "does not nest": lambda: slices[0].update(dur=slices[0]["dur"] + 1e9),
        "not in order": lambda: events.reverse(),
        "no pair": lambda: events.remove(start),
        "ends in no slice": lambda: end.update(tid=name_thread(events, "rank 0"), ts=0.0),
        "s is not allowed": lambda: mark.update(s="x"),
        "known kind": lambda: mark.update(ph="?"),
        "without its argument": lambda: name.update(args={}),
        "needs one process_name": lambda: events.remove(name),
        "never ends": lambda: events.append({"ph": "b", "name": "x", "cat": "x", "id": 1, "pid": 1, "ts": 1e12}),
        "ends without": lambda: events.append({"ph": "E", "pid": 1, "tid": name["pid"] + 2, "ts": 1e12}),
    }


def name_thread(events: list[Event], name: str) -> int:
    return next(tid for tid, found in names(events).items() if found == name)


@pytest.mark.parametrize(
    "way",
    [
        *("no dur", "below 0", "ts of a wrong type", "does not nest", "not in order", "no pair", "ends in no slice"),
        *("s is not allowed", "known kind", "without its argument", "needs one process_name", "never ends"),
        "ends without",
    ],
)
def test_the_check_of_the_format_finds_what_is_wrong(tmp_path: Path, way: str) -> None:
    found = json.loads(json.dumps(trace(result(tmp_path, blocks=1, steps=2))))
    assert faults(found) == []
    broken(found["traceEvents"])[way]()
    assert any(way in fault for fault in faults(found)), faults(found)

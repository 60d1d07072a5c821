"""trace.json.gz: the sampled steps of a result as a timeline, for ui.perfetto.dev and chrome://tracing.

Made from run.json, spans.parquet and collectives.parquet alone, at the end of a study (--trace) or any time later
(`python -m pneumo.trace RESULT`), in the JSON object form of the Trace Event Format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):

    process     a run of the study, as in "ddp/gloo, 4 ranks"
    rank r      its main thread: each step, and within it the phases, which cover it (X); and a mark (i) where the rank
                was the last to arrive at a collective while others were blocked on it
    rank r collectives
                each collective from `enqueued` to `finished`, and within it "all arrived" from the last rank's arrival
                on (X); those that overlap lie in lanes, which are tracks of the same name with a number
    arrows      from the last rank to arrive to each other rank, at the moment of its arrival (s, f)

Stamps are microseconds on rank 0's clock, 0 being the first event's; `metadata` tells how well the ranks' clocks agree.
A trace has at most MOST_EVENTS events: beyond that only every k-th sampled step is drawn, and if need be every l-th
rank. `metadata` says so, and what was left out.
"""

import gzip
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pneumo.errors import Refused
from pneumo.study.common_clock import describe
from pneumo.study.results import load_run, write_atomic
from pneumo.study.sampled import Call, Sampled, sampled, thinning
from pneumo.study.schema import RunEntry

Event = dict[str, Any]
Placed = tuple[int, int, int, Event]  # moment, rank among events of the same moment, length in ns (-1: none), event

NAME = "trace.json.gz"
MOST_EVENTS = 200_000
MOST_LANES = 8  # for the collectives of a rank; what overlaps further is left out
EVENTS_A_RECORD = 4  # at most: two slices and both ends of an arrow; or a slice and a mark
EVENTS_A_RANK = 2 * (1 + MOST_LANES) + 2  # names and places of tracks and processes
LATE_COLOUR = "terrible"  # a name that chrome://tracing knows; Perfetto chooses colours by itself
SLICE, START, FINISH, MARK = range(4)  # the order of what happens at the same moment


@dataclass(slots=True)
class Shown:
    """What of the sampled steps is drawn, and what was left out; goes into the trace's `metadata`."""

    sampled_steps: int
    every_kth_sampled_step: int
    every_kth_rank: int
    most_events: int
    events: int = 0
    records_without_a_lane: int = 0
    arrows_left_out: int = 0


def write_trace(folder: Path) -> Path:
    """Write trace.json.gz into the folder of a result; returns its path.

    Raises Refused where the result has no sampled step or a damaged file, and PneumoError where it cannot be written.
    """
    path = folder / NAME
    write_atomic(path, gzip.compress(msgspec.json.encode(trace(folder)), mtime=0))
    return path


def trace(folder: Path, *, most_events: int = MOST_EVENTS) -> dict[str, Any]:
    """The trace of a result as JSON values; raises Refused where it has no sampled step or a damaged file."""
    run = load_run(folder)
    found = sampled(folder, run)
    if not found:
        raise Refused(f"{folder} has no sampled steps in spans.parquet; name the folder of a result that has.")
    steps, ranks = thinning(found, most_events, a_record=EVENTS_A_RECORD, a_rank=EVENTS_A_RANK)
    shown = Shown(sum(len(one.steps) for one in found), steps, ranks, most_events)
    tracks = _Tracks(first_tid=1 + max(entry.run + 1 for entry in run.runs))
    placed: list[Placed] = []
    for one in found:
        thin = one.thinned(steps, ranks)
        tracks.process(one.entry)
        placed += _phases(thin, tracks)
        placed += _collectives(thin, tracks, shown)
    # Of slices that begin together the outer one comes first, which is longer or was placed before.
    placed.sort(key=lambda event: (event[0], event[1], -event[2]))
    origin = placed[0][0]
    shown.events = len(tracks.named) + len(placed)
    return {
        "displayTimeUnit": "ms",
        "traceEvents": tracks.named + [_stamped(event, origin) for event in placed],
        "metadata": {
            "study": run.study,
            "started": run.started,
            "clock": f"microseconds from origin_ns on, on rank 0's monotonic clock: {describe(run)}",
            "origin_ns": origin,
            "sampling": msgspec.to_builtins(run.sampling),
            "shown": asdict(shown),
        },
    }


def _stamped(placed: Placed, origin: int) -> Event:
    at, _, length, event = placed
    event["ts"] = microseconds(at - origin)
    if length >= 0:
        event["dur"] = microseconds(length)
    return event


def microseconds(ns: int) -> float:
    """Microseconds that are the same ns again for a reader that cuts off fractions of a ns, as Perfetto does.

    Otherwise a slice might begin a ns before the end of the one that it follows, and they would not nest any more.
    """
    us = ns / 1000
    return us if int(us * 1000) == ns else math.nextafter(us, math.inf)


@dataclass(slots=True)
class _Tracks:
    """Gives out processes, tracks and arrows, and names them; no two threads of the trace have the same number."""

    first_tid: int
    named: list[Event] = field(default_factory=list)
    arrows: int = 0
    _tids: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def process(self, entry: RunEntry) -> None:
        """Name the process of a run."""
        comm = "" if entry.comm == "none" else f"/{entry.comm}"
        threads = f" x {entry.threads} threads" if entry.threads > 1 else ""
        name = f"{entry.backend}{comm}, {entry.ranks} rank{'s' if entry.ranks > 1 else ''}{threads}"
        self._name({"pid": entry.run + 1}, "process", name, entry.run)

    def thread(self, run: int, rank: int, lane: int = 0) -> Event:
        """Where an event of a rank goes: its main thread is lane 0, the others are for its collectives."""
        tid = self._tids.get((run, rank, lane), 0)
        if not tid:
            tid = self._tids[run, rank, lane] = self.first_tid + len(self._tids)
            name = f"rank {rank}" + (" collectives" if lane else "") + (f" {lane}" if lane > 1 else "")
            self._name({"pid": run + 1, "tid": tid}, "thread", name, rank * (1 + MOST_LANES) + lane)
        return {"pid": run + 1, "tid": tid}

    def arrow(self) -> int:
        """The number of a new arrow."""
        self.arrows += 1
        return self.arrows

    def _name(self, place: Event, kind: str, name: str, index: int) -> None:
        self.named.append({"ph": "M", **place, "name": f"{kind}_name", "args": {"name": name}})
        self.named.append({"ph": "M", **place, "name": f"{kind}_sort_index", "args": {"sort_index": index}})


def _phases(one: Sampled, tracks: _Tracks) -> Iterator[Placed]:
    """The steps and phases of the main threads."""
    for (step, rank), rows in one.phases.items():
        place = {"ph": "X", **tracks.thread(one.entry.run, rank)}
        begin, end = rows[0][1], rows[-1][2]
        yield begin, SLICE, end - begin, {**place, "cat": "step", "name": f"step {step}"}
        for phase, first, last in rows:
            yield first, SLICE, last - first, {**place, "cat": "phase", "name": phase}


def _collectives(one: Sampled, tracks: _Tracks, shown: Shown) -> Iterator[Placed]:
    """The collectives of all ranks in their lanes, with arrows from who was last, and the marks of who was late."""
    lanes = _lanes(one.calls)
    shown.records_without_a_lane += sum(len(call.records) for call in one.calls) - len(lanes)
    for i, call in enumerate(one.calls):
        places = {r: tracks.thread(one.entry.run, r, lanes[i, r]) for r in call.records if (i, r) in lanes}
        for rank, place in places.items():
            begin, end = call.records[rank].enqueued_ns, call.records[rank].end_ns
            drawn = {"ph": "X", **place, "cat": "collective", "name": call.op, "args": _about(call, rank)}
            if rank == call.last and call.waited_ns:
                drawn["cname"] = LATE_COLOUR
            yield begin, SLICE, end - begin, drawn
            if rank == call.last or call.last is None:
                continue
            if not begin <= call.arrived_ns < end:
                shown.arrows_left_out += 1
                continue
            inner = {"ph": "X", **place, "cat": "collective", "name": "all arrived"}
            yield call.arrived_ns, SLICE, end - call.arrived_ns, inner
            if call.last not in places or call.records[call.last].end_ns <= call.arrived_ns:
                shown.arrows_left_out += 1
                continue
            # Both ends bind to slices that begin now: readers that order the ends by their slices keep the direction.
            arrow = {"cat": "arrival", "name": call.op, "id": tracks.arrow()}
            yield call.arrived_ns, START, -1, {"ph": "s", **places[call.last], **arrow}
            yield call.arrived_ns, FINISH, -1, {"ph": "f", "bp": "e", **place, **arrow}
        if call.last in call.records and call.waited_ns:
            mark = {"ph": "i", "s": "t", **tracks.thread(one.entry.run, call.last), "cat": "late"}
            waited = {"seq": call.seq, "group": call.group, "others_waited_us": call.waited_ns / 1000}
            yield call.arrived_ns, MARK, -1, {**mark, "name": f"late: {call.op}", "args": waited}


def _lanes(calls: Sequence[Call]) -> dict[tuple[int, int], int]:
    """The lane, from 1, of each (call's index, rank): the first that is free; none beyond MOST_LANES."""
    lanes: dict[tuple[int, int], int] = {}
    free: dict[int, list[int]] = {}
    for begin, i, rank in sorted(
        (record.enqueued_ns, i, r) for i, c in enumerate(calls) for r, record in c.records.items()
    ):
        ends = free.setdefault(rank, [])
        lane = next((k for k, end in enumerate(ends) if end <= begin), len(ends))
        if lane < MOST_LANES:
            ends[lane : lane + 1] = [calls[i].records[rank].end_ns]
            lanes[i, rank] = lane + 1
    return lanes


def _about(call: Call, rank: int) -> Event:
    """What is known of a collective on one rank; what the library does not tell is left out."""
    record = call.records[rank]
    known = {"step": call.step, "seq": call.seq, "group": call.group, **call.about, "last_rank": call.last}
    known |= {"bound": record.bound, "blocked_us": _us(record.blocked_ns())}
    if rank != call.last:
        known["blocked_before_last_us"] = _us(record.blocked_ns(call.arrived_ns))
    if record.started_ns is not None:
        known["started_after_us"] = _us(record.started_ns - record.enqueued_ns)
    return {name: value for name, value in known.items() if value is not None}


def _us(ns: int | None) -> float | None:
    return None if ns is None else ns / 1000

"""Whether JSON is a trace that readers draw as it was meant, by the Trace Event Format and what Perfetto adds to it.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Perfetto's trace_processor
itself is a binary that its Python package downloads when it is used, so tests cannot count on it. What is known of its
reading is checked instead: times are cut off to whole ns, slices of a thread must nest, ends of an arrow bind to the
innermost slice that is open on their thread, and an arrow starts at the slice that began first.
"""

import math
from collections import defaultdict
from itertools import pairwise
from typing import Any

Event = dict[str, Any]

REQUIRED = {
    "X": ("name", "cat", "pid", "tid", "ts", "dur"),
    "B": ("name", "cat", "pid", "tid", "ts"),
    "E": ("pid", "tid", "ts"),
    "i": ("name", "pid", "tid", "ts", "s"),
    "b": ("name", "cat", "pid", "ts", "id"),
    "e": ("name", "cat", "pid", "ts", "id"),
    "s": ("name", "cat", "pid", "tid", "ts", "id"),
    "f": ("name", "cat", "pid", "tid", "ts", "id", "bp"),
    "M": ("name", "pid", "args"),
}
TYPES: dict[str, tuple[type, ...]] = {"name": (str,), "cat": (str,), "ph": (str,), "s": (str,), "bp": (str,)}
TYPES |= {"pid": (int,), "tid": (int,), "ts": (int, float), "dur": (int, float), "id": (int, str), "args": (dict,)}
ALLOWED = {"s": ("g", "p", "t"), "bp": ("e",), "cname": ("good", "bad", "terrible", "black", "grey", "white", "yellow")}
NAMED = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index"}
NAMED |= {"thread_sort_index": "sort_index", "process_labels": "labels"}
Thread = tuple[int, int]
Slice = tuple[int, int, Event]


def faults(trace: Any) -> list[str]:
    """What is wrong with a trace, in words; an empty list where nothing is."""
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        return ["not an object with a list traceEvents"]
    found = [] if trace.get("displayTimeUnit") in ("ms", "ns") else ["displayTimeUnit is neither ms nor ns"]
    events = trace["traceEvents"]
    for event in events:
        found += [f"{fault}: {event}" for fault in _of_event(event)]
    if found:
        return found
    timed = [event for event in events if event["ph"] != "M"]
    if any(a["ts"] > b["ts"] for a, b in pairwise(timed)):
        found.append("the stamps are not in order")
    slices, wrong = _slices(timed)
    return found + wrong + _pairs(timed) + _arrows(timed, slices) + _names(events)


def ns(us: float) -> int:
    """A time as Perfetto reads it."""
    return int(us * 1000)


def _of_event(event: Any) -> list[str]:
    if not isinstance(event, dict) or event.get("ph") not in REQUIRED:
        return ["no event of a known kind"]
    found = [f"no {key}" for key in REQUIRED[event["ph"]] if key not in event]
    for key, kinds in TYPES.items():
        if key in event and (isinstance(event[key], bool) or not isinstance(event[key], kinds)):
            found.append(f"{key} of a wrong type")
    if found:
        return found
    found += [f"{key} is not allowed" for key, values in ALLOWED.items() if key in event and event[key] not in values]
    found += [f"{key} below 0 or not finite" for key in ("ts", "dur") if not 0 <= event.get(key, 0) < math.inf]
    if event["ph"] == "M":
        if event["name"] not in NAMED:
            found.append("metadata of an unknown name")
        elif not isinstance(event["args"].get(NAMED[event["name"]]), int if "sort" in event["name"] else str):
            found.append("metadata without its argument")
        if event["name"].startswith("thread") and "tid" not in event:
            found.append("no tid")
    return found


def _slices(timed: list[Event]) -> tuple[dict[Thread, list[Slice]], list[str]]:
    """The slices of each thread in order, begin and end in ns, and those that neither nest nor follow one another."""
    slices: dict[Thread, list[Slice]] = defaultdict(list)
    open_: dict[Thread, list[Slice]] = defaultdict(list)
    found = []
    for event in (event for event in timed if event["ph"] == "X"):
        thread, begin = (event["pid"], event["tid"]), ns(event["ts"])
        one = begin, begin + ns(event["dur"]), event
        stack = open_[thread]
        while stack and stack[-1][1] <= begin:
            stack.pop()
        if stack and stack[-1][1] < one[1]:
            found.append(f"does not nest: {event} in {stack[-1][2]}")
        stack.append(one)
        slices[thread].append(one)
    return slices, found


def _pairs(timed: list[Event]) -> list[str]:
    """Begins without an end and the reverse: B and E by thread, b and e by category and id."""
    open_: dict[Any, int] = defaultdict(int)
    found = []
    for event in (event for event in timed if event["ph"] in "BEbe"):
        key = (event["pid"], *(event[name] for name in (("tid",) if event["ph"] in "BE" else ("cat", "id"))))
        open_[key] += 1 if event["ph"] in "Bb" else -1
        if open_[key] < 0:
            found.append(f"ends without a begin: {event}")
    return found + [f"never ends: {key}" for key, depth in open_.items() if depth > 0]


def innermost(slices: list[Slice], at: int) -> Slice | None:
    """The slice that an event at this moment belongs to."""
    return next((one for one in reversed(slices) if one[0] <= at < one[1]), None)


def _arrows(timed: list[Event], slices: dict[Thread, list[Slice]]) -> list[str]:
    """Arrows with other than one start before one end, or whose ends hang in the air or would be turned around."""
    ends: dict[Any, list[Event]] = defaultdict(list)
    for event in (event for event in timed if event["ph"] in "sf"):
        ends[event["cat"], event["name"], event["id"]].append(event)
    found = []
    for key, pair in ends.items():
        if [event["ph"] for event in pair] != ["s", "f"]:
            found.append(f"no pair of start and end: {key}")
            continue
        bound = [innermost(slices[event["pid"], event["tid"]], ns(event["ts"])) for event in pair]
        if bound[0] is None or bound[1] is None:
            found.append(f"ends in no slice: {key}")
        elif bound[0][0] > bound[1][0]:
            found.append(f"would be turned around: {key}")
    return found


def _names(events: list[Event]) -> list[str]:
    """Processes and threads without a name or with two, and numbers of threads that occur in two processes."""
    found = []
    for kind, keys in (("process", ("pid",)), ("thread", ("pid", "tid"))):
        used = {tuple(event[key] for key in keys) for event in events if all(key in event for key in keys)}
        for what in ("name", "sort_index"):
            said = [tuple(event[key] for key in keys) for event in events if event.get("name") == f"{kind}_{what}"]
            if sorted(said) != sorted(used):
                found.append(f"each {kind} needs one {kind}_{what}")
    tids = {(event["pid"], event["tid"]) for event in events if "tid" in event}
    if len({tid for _, tid in tids}) < len(tids):
        found.append("a thread's number occurs in two processes")
    return found

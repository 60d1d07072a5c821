"""What Horovod's own timeline says of the responses that it has sent: the oracle for our records of them.

Its format: the Trace Event Format, a process a tensor, with activities that nest ("B", "E"); stamps in microseconds.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIZES = {"float32": 4}
PREFIX = "allreduce."  # of a tensor's name, before that of its parameter


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that Horovod's thread did with a tensor, in ns from the timeline's begin."""

    tensor: str
    name: str
    begin_ns: int
    end_ns: int
    bytes: int  # 0 where the timeline does not say


@dataclass(frozen=True, slots=True)
class Response:
    """A fused response: its tensors, when they travelled, and when all ranks were known to be ready for each."""

    tensors: dict[str, int]  # bytes by name
    begin_ns: int
    end_ns: int
    negotiations: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> int:
        """The bytes that travelled."""
        return sum(self.tensors.values())


def activities(path: Path) -> Iterator[Activity]:
    """All activities of a timeline, in the order of their ends."""
    events = json.loads(path.read_text())
    named = [event for event in events if event.get("name") == "process_name"]
    tensors = {event["pid"]: event["args"]["name"] for event in named if "name" in event["args"]}
    begun: dict[int, list[tuple[str, int]]] = {}
    for event in events:
        if event["ph"] == "B":
            begun.setdefault(event["pid"], []).append((event["name"], event["ts"]))
        elif event["ph"] == "E":
            name, begin = begun[event["pid"]].pop()
            about = event.get("args")
            size = math.prod(json.loads(about["shape"])) * SIZES[about["dtype"]] if about else 0
            yield Activity(tensors[event["pid"]].removeprefix(PREFIX), name, begin * 1000, event["ts"] * 1000, size)
    assert not any(begun.values()), "an activity without an end"


def responses(path: Path) -> list[Response]:
    """The responses of a timeline in the order in which they travelled, one after the other.

    Each activity is marked for every tensor of a response, a few microseconds apart: it is from the last begin to the
    first end.
    """
    found: dict[str, list[Activity]] = {}
    for activity in activities(path):
        found.setdefault(activity.name, []).append(activity)
    assert found.keys() >= {"NEGOTIATE_ALLREDUCE", "ALLREDUCE", "MPI_ALLREDUCE"}
    numbers = {kind: _numbered(found[kind]) for kind in ("NEGOTIATE_ALLREDUCE", "ALLREDUCE")}
    made: list[list[Activity]] = []
    for moved in sorted(found["MPI_ALLREDUCE"], key=lambda one: one.begin_ns):
        if not made or moved.begin_ns >= made[-1][0].end_ns:
            made.append([])
        made[-1].append(moved)
    seen: dict[str, int] = {}
    whole = []
    for group in made:
        turns = {one.tensor: seen.get(one.tensor, 0) for one in group}
        seen |= {tensor: turn + 1 for tensor, turn in turns.items()}
        negotiated = {tensor: numbers["NEGOTIATE_ALLREDUCE"][tensor, turn] for tensor, turn in turns.items()}
        whole.append(
            Response(
                {tensor: numbers["ALLREDUCE"][tensor, turn].bytes for tensor, turn in turns.items()},
                max(one.begin_ns for one in group),
                min(one.end_ns for one in group),
                {tensor: (one.begin_ns, one.end_ns) for tensor, one in negotiated.items()},
            )
        )
    return whole


def _numbered(found: list[Activity]) -> dict[tuple[str, int], Activity]:
    """Activities of one kind by tensor and by which of the tensor's it is, from 0."""
    count: dict[str, int] = {}
    numbered = {}
    for one in sorted(found, key=lambda one: one.begin_ns):
        numbered[one.tensor, count.get(one.tensor, 0)] = one
        count[one.tensor] = count.get(one.tensor, 0) + 1
    return numbered

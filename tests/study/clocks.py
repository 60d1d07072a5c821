"""Clocks that run apart by a known law, what round trips tell of them, and tables stamped by them."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from pneumo.study.results import STAMPS, load_run, write_json
from pneumo.study.schema import Clock, ClockHost, ClockSample
from pneumo.timing.offsets import Trip, interval


class Ahead:
    """A clock that at rank 0's time t shows t + base + drift * (t - start), by integers as far as they reach."""

    def __init__(self, start_ns: int, base_ns: int, drift: float = 0.0) -> None:
        self.start_ns, self.base_ns, self.drift = start_ns, base_ns, drift

    def shows(self, at_ns: int) -> int:
        """What it shows at a moment of rank 0's clock."""
        return at_ns + self.base_ns + math.floor(self.drift * (at_ns - self.start_ns))


def trips(clock: Ahead, at_ns: int, delays: Sequence[tuple[int, int]]) -> list[Trip]:
    """Round trips from a moment of rank 0's clock on, each with its delays there and back in ns."""
    found = []
    for there, back in delays:
        found.append(Trip(at_ns, clock.shows(at_ns + there), at_ns + there + back))
        at_ns += there + back + 500
    return found


def sample(rank: int, made: Sequence[Trip]) -> ClockSample:
    """What is written down of round trips."""
    at, low, high = interval(made)
    middle = (low + high) // 2
    return ClockSample(rank=rank, at_ns=at, offset_ns=middle, bound_ns=high - middle)


def measured(
    clock: Ahead, moments: Sequence[int], rank: int = 1, least_ns: int = 5_000, seed: int = 0
) -> list[ClockSample]:
    """Samples at moments of rank 0's clock, of 20 trips with delays of least_ns and more, longer there than back."""
    rng = random.Random(seed)
    draw: Callable[[int], int] = lambda more: least_ns + int(rng.expovariate(1 / more))  # noqa: E731
    return [sample(rank, trips(clock, at, [(draw(9_000), draw(1_000)) for _ in range(20)])) for at in moments]


def two_hosts(ranks: Sequence[int], samples: Sequence[ClockSample], world: int) -> Clock:
    """`ranks` are on the second host, the other ones of the world on the first, with rank 0."""
    hosts = [
        ClockHost(name="a", ranks=[r for r in range(world) if r not in ranks], check_ns=600),
        ClockHost(name="b", ranks=list(ranks), check_ns=None),
    ]
    return Clock(resolution_ns=1, source="tsc", hosts=hosts, samples=list(samples))


def restamp(path: Path, clock: Ahead, ranks: Sequence[int], found: Clock) -> None:
    """Stamp the tables of a result anew, as ranks with this clock would have, and write the clocks to run.json."""
    for name in ("steps", "collectives"):
        table = pq.read_table(path / f"{name}.parquet")
        rows: list[dict[str, Any]] = table.to_pylist()
        for row in rows:
            if row["rank"] in ranks:
                row |= {c: clock.shows(row[c]) for c in STAMPS if row.get(c) is not None}
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path / f"{name}.parquet")
    write_json(path / "run.json", msgspec.structs.replace(load_run(path), clock=found))

"""What steps.parquet says of one run: its timed blocks, and where the seconds of each rank went."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pneumo.errors import Refused
from pneumo.study.results import load_run, load_table
from pneumo.study.schema import PHASES, RunEntry

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, NDArray[Any]]
COMPUTE = ("forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Block:
    """A timed block of one run: from the first rank's begin to the last rank's end, images of all ranks."""

    seconds: float
    images: int

    @property
    def images_per_s(self) -> float:
        """The speed that comparisons use; for equal work its ratio is the inverse ratio of the times."""
        return self.images / self.seconds


@dataclass(frozen=True, slots=True)
class RankPhases:
    """Where one rank's timed steps went: seconds by phase; they sum to `wall_s`."""

    rank: int
    seconds: dict[str, float]
    wall_s: float

    @property
    def compute(self) -> float:
        """The share of forward, backward and optimizer."""
        return sum(self.seconds[phase] for phase in COMPUTE) / self.wall_s if self.wall_s else 0.0

    @property
    def comm(self) -> float:
        """The share spent blocked on collectives."""
        return self.seconds["comm"] / self.wall_s if self.wall_s else 0.0


def columns(table: "pa.Table") -> Columns:
    """An Arrow table as NumPy columns; a missing integer becomes not-a-number, a missing text None."""
    return {name: table.column(name).to_numpy() for name in table.column_names}


def all_steps(folder: Path, run: int | None = None) -> Columns:
    """The steps of all kinds and of all runs or one, warm-up included, as columns; unknown clocks count as 0 ns.

    Raises Refused where the table is damaged, or has a rank that its run has not, or training without images.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = load_table(folder, "steps", run=run)
    for i, field in enumerate(table.schema):
        # A null would turn the column into floats, and a clock's nanoseconds outgrow a float's 53 bits in 104 days.
        if pa.types.is_integer(field.type):
            table = table.set_column(i, field.name, pc.fill_null(table.column(i), 0))
    steps = columns(table)
    for entry in load_run(folder).runs:
        foreign = (steps["run"] == entry.run) & ((steps["rank"] < 0) | (steps["rank"] >= entry.ranks))
        if foreign.any():
            what = f"its column rank has {steps['rank'][foreign][0]} in run {entry.run} of {entry.ranks} ranks"
            raise Refused(f"{folder / 'steps.parquet'} is damaged: {what}.")
    if missing := _without_images(steps):
        raise Refused(f"{folder / 'steps.parquet'} is damaged: {missing}.")
    return steps


def _without_images(steps: Columns) -> str | None:
    """What is wrong with the column images: it is below zero, or nothing in a block that was trained on."""
    if steps["images"].size and steps["images"].min() < 0:
        return "its column images has values below 0"
    train = select(steps, (steps["kind"] == "train") & ~steps["warmup"].astype(bool))
    key = (train["run"].astype(np.int64) << 32) + train["block"]
    first, index = np.unique(key, return_index=True, return_inverse=True)[1:]
    empty = first[np.bincount(index, weights=train["images"], minlength=first.size) == 0]
    if not empty.size:
        return None
    run, block = (train[name][empty[0]] for name in ("run", "block"))
    return f"its column images is 0 in all training steps of block {block} of run {run}"


def of_kind(steps: Columns, kind: str) -> Columns:
    """The steps of one kind."""
    return select(steps, steps["kind"] == kind)


def select(steps: Columns, mask: NDArray[Any]) -> Columns:
    """The rows where the mask (n,) holds; the columns themselves where it holds everywhere."""
    return steps if bool(mask.all()) else {name: column[mask] for name, column in steps.items()}


def training_steps(folder: Path, run: int | None = None) -> Columns:
    """The training steps of all runs or one, warm-up included, as columns; unknown clocks count as 0 ns."""
    return of_kind(all_steps(folder, run), "train")


def timed(steps: Columns, entry: RunEntry) -> Columns:
    """The timed steps of one run, of its whole blocks only: those in which every rank did the same steps."""
    mask = (steps["run"] == entry.run) & ~steps["warmup"].astype(bool)
    for block in np.unique(steps["block"][mask]).tolist():
        here = mask & (steps["block"] == block)
        ranks, counts = np.unique(steps["rank"][here], return_counts=True)
        each = np.unique(steps["step"][here]).size
        if ranks.size != entry.ranks or (counts != each).any():
            mask &= ~here
    return select(steps, mask)


def warmup_steps(steps: Columns, entry: RunEntry) -> int:
    """How many steps a rank did before the clock counted."""
    mask = (steps["run"] == entry.run) & steps["warmup"].astype(bool)
    return int(np.unique(steps["step"][mask]).size)


def blocks(steps: Columns) -> dict[int, Block]:
    """The blocks of one run's timed steps, by number."""
    found = {}
    for number in np.unique(steps["block"]).tolist():
        here = steps["block"] == number
        begin = steps["begin_ns"][here]
        length_ns = int((begin + steps["wall_ns"][here]).max()) - int(begin.min())
        found[int(number)] = Block(max(length_ns, 1) / 1e9, int(steps["images"][here].sum()))
    return found


def cpu_seconds(steps: Columns) -> float:
    """CPU seconds of one run's timed steps: all ranks, the main threads' phases and the helper threads."""
    names = [*(f"{phase}_cpu_ns" for phase in PHASES), "helpers_cpu_ns"]
    return sum(int(steps[name].sum()) for name in names) / 1e9


def by_rank(steps: Columns) -> list[RankPhases]:
    """Where the time of one run's timed steps went, a line for each rank in order."""
    found = []
    for rank in np.unique(steps["rank"]).tolist():
        here = steps["rank"] == rank
        seconds = {phase: int(steps[f"{phase}_ns"][here].sum()) / 1e9 for phase in PHASES}
        found.append(RankPhases(int(rank), seconds, int(steps["wall_ns"][here].sum()) / 1e9))
    return found


def mean_of(ranks: list[RankPhases]) -> RankPhases:
    """The mean over the ranks (its `rank` is -1)."""
    n = len(ranks)
    seconds = {phase: sum(r.seconds[phase] for r in ranks) / n for phase in PHASES}
    return RankPhases(-1, seconds, sum(r.wall_s for r in ranks) / n)

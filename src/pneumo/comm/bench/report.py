"""What the benchmark says: the rows of its JSON file, its tables, and how to read them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pneumo.comm.bench.cases import OPS, SMALL_BYTES, Case, size_text
from pneumo.comm.bench.measure import Samples
from pneumo.study.cells import NOTHING, add_columns, between, legend, new_table, put
from pneumo.study.statistics import compare, median

Row = dict[str, Any]
OURS, LIMIT = "pneumo", "memcpy"
QUIET = 0.02
SHORT = {"mpi_plain": "mpi\nplain"}


def rows(case: Case, samples: Sequence[Samples]) -> list[Row]:
    """A row for each library: medians and limits in us a call, samples, and how many times pneumo is faster.

    `ratio` is Hodges and Lehmann's over the rounds, with its exact interval: what slows down a round slows both.
    """
    ours = next((s for s in samples if s.library == OURS), None)
    found = []
    for s in samples:
        estimate, ratio = median(s.us), None
        if ours is not None and s is not ours:
            pairs = compare(_speeds(ours), _speeds(s))
            ratio = [pairs.ratio.value, pairs.ratio.low, pairs.ratio.high] if pairs else None
        found.append(
            {
                **{"op": case.op.name, "dtype": case.dtype, "bytes": case.bytes, "library": s.library},
                **{"median_us": estimate.value, "low_us": estimate.low, "high_us": estimate.high},
                **{"confidence": estimate.confidence, "calls": s.calls, "page_faults": s.faults, "ratio": ratio},
                **{"waited": s.waited, "samples_us": list(s.us)},
            }
        )
    return found


def _speeds(samples: Samples) -> dict[int, float]:
    return {i: 1 / us for i, us in enumerate(samples.us)}


def of_floor(row: Row, limit: Row, formula: str, ranks: int) -> float:
    """A row's time divided by what its bytes take at memcpy's rate, which moves 2n bytes in the limit's time."""
    moved = OPS[row["op"]].floors[formula](row["bytes"], ranks)
    return float(row["median_us"] / (limit["median_us"] * moved / (2 * row["bytes"])))


def show(content: Mapping[str, Any], console: Console, *, verbose: bool) -> None:
    """Print what `content`, the JSON file's content, says; with `verbose` every interval too."""
    for item in (*tables(content, verbose=verbose), legend(explain(content, verbose=verbose))):
        put(console, item)


def tables(content: Mapping[str, Any], *, verbose: bool) -> Iterator[RenderableType]:
    """A table for each operation and type, with a line between."""
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in content["rows"]):
        mine = [row for row in content["rows"] if (row["op"], row["dtype"]) == (op, dtype)]
        what = op if op == "barrier" else f"{op} of {dtype}"
        yield Text(f"{what}, us a call", style="bold")
        yield _medians(op, mine, content["ranks"])
        yield Text()
        if verbose:
            yield Text(f"{what}, every interval", style="bold")
            yield _intervals(mine)
            yield Text()


def _table() -> Table:
    """A table whose title, longer than some tables are wide, is printed before it."""
    table = new_table("")
    table.title = None
    return table


def _medians(op: str, mine: Sequence[Row], ranks: int) -> Table:
    names, table = list(dict.fromkeys(row["library"] for row in mine)), _table()
    add_columns(table, "bytes")
    for name in names:
        ratio = ["x"] if OURS in names and name not in (OURS, LIMIT) else []
        add_columns(table, SHORT.get(name, name), *ratio)
    floors = list(OPS[op].floors) if OURS in names and LIMIT in names else []
    add_columns(table, *(f"pneumo\n/{formula}" for formula in floors))
    for size in dict.fromkeys(row["bytes"] for row in mine):
        here = {row["library"]: row for row in mine if row["bytes"] == size}
        table.add_row(size_text(size), *_cells(here, names), *(_floor(here, f, ranks) for f in floors))
    return table


def _cells(here: Mapping[str, Row], names: Sequence[str]) -> Iterator[str]:
    ours = here.get(OURS)
    for name in names:
        row = here.get(name)
        yield figure(row["median_us"]) if row else NOTHING
        if OURS in names and name not in (OURS, LIMIT):
            yield figure(row["median_us"] / ours["median_us"]) if row and ours else NOTHING


def _floor(here: Mapping[str, Row], formula: str, ranks: int) -> str:
    ours, limit = here.get(OURS), here.get(LIMIT)
    if ours is None or limit is None or ours["bytes"] < SMALL_BYTES:
        return NOTHING
    return f"{of_floor(ours, limit, formula, ranks):.2f}"


def _intervals(mine: Sequence[Row]) -> Table:
    table = _table()
    add_columns(table, "bytes", "library<", "median us", "low", "high", "samples", "calls\neach")
    add_columns(table, "page faults\na call", "waited\n%", "of pneumo\nx low-high")
    for row in mine:
        ratio = row["ratio"]
        table.add_row(
            *(size_text(row["bytes"]), row["library"]),
            *(figure(row[name]) for name in ("median_us", "low_us", "high_us")),
            *(str(len(row["samples_us"])), str(row["calls"]), f"{row['page_faults']:.0f}", f"{row['waited']:.0%}"[:-1]),
            f"{figure(ratio[0])} {figure(ratio[1])}-{figure(ratio[2])}" if ratio else NOTHING,
        )
    return table


def figure(value: float) -> str:
    """A figure with about three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def explain(content: Mapping[str, Any], *, verbose: bool = False) -> Iterator[tuple[str, str]]:
    """How to read the tables, and what is missing in them and why."""
    mine = content["rows"]
    if not mine:
        yield "rows", "none"
    else:
        yield (
            "bytes",
            "of a rank's tensor (reduce_scatter: the input, allgather: the output); K, M, G: powers of 1024",
        )
        yield (
            "us",
            f"of the slowest rank; median of {between(len(row['samples_us']) for row in mine)} samples, the libraries "
            f"in turns; a sample is {between(row['calls'] for row in mine)} calls back to back",
        )
    if mine and verbose:
        few = any(row["confidence"] is None for row in mine)
        yield "low, high", "95 % interval from order statistics" + "; the range where samples are few" * few
        yield "waited", "for a core, of the samples' time, by a main thread that was ready to run"
    names = {row["library"] for row in mine}
    if OURS in names:
        yield "x", "the median to its left divided by pneumo's"
    if LIMIT in names:
        yield LIMIT, "the limit: all ranks copy that many bytes at once"
    if {OURS, LIMIT} <= names:
        yield "pneumo /", "pneumo's time divided by what so many bytes a rank take at memcpy's rate, which moves 2n"
        yield from _ways({row["op"] for row in mine})
    if "mpi_plain" in names:
        yield "mpi", "with malloc told to keep freed memory, as for all others; mpi plain: as glibc has it"
    yield from _faults(mine)
    yield from _busy(mine, crowded=content["ranks"] > content["cores"])
    yield from _missing(content)


def _ways(ops: Iterable[str]) -> Iterator[tuple[str, str]]:
    if "allreduce" in ops:
        yield "", "allreduce: 2n floor, 3n-n/p reduce-scatter and pull without copies, 5n+n/p copy-in and copy-out"
    others = [f"{op} {', '.join(OPS[op].floors)}" for op in OPS if op in ops and op != "allreduce" and OPS[op].floors]
    if others:
        yield "", f"floor, and with copy-in and copy-out: {'; '.join(others)}"


def _faults(mine: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """The page faults of a call at the largest size, of those libraries that have any."""
    size = max((row["bytes"] for row in mine), default=0)
    here = {row["library"]: row["page_faults"] for row in mine if row["bytes"] == size}
    having = [f"{SHORT.get(name, name)} {count:.0f}".replace("\n", " ") for name, count in here.items() if count >= 1]
    if having:
        yield "page faults", f"in a call of {size_text(size)} bytes: {', '.join(having)}; others none"


def _busy(mine: Sequence[Row], *, crowded: bool) -> Iterator[tuple[str, str]]:
    """A warning where other processes held the cores: a copy waits for nothing else."""
    copies = [row for row in mine if row["library"] == LIMIT]
    total_us = sum(sum(row["samples_us"]) * row["calls"] for row in copies)
    waited_us = sum(row["waited"] * sum(row["samples_us"]) * row["calls"] for row in copies)
    if total_us and waited_us > QUIET * total_us and not crowded:
        share = waited_us / total_us
        yield "busy", f"other processes held a core for {share:.0%} of memcpy's time: measure again when it is quiet"


def _missing(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    together: dict[tuple[str, str], list[str]] = {}
    for gone in content["absent"]:
        together.setdefault((gone["library"], gone["why"]), [])
        if gone["op"]:
            together[gone["library"], gone["why"]].append(f"{gone['op']} of {gone['dtype']}")
    for (name, why), cases in together.items():
        yield name, f"left out{' for ' * bool(cases)}{', '.join(cases)}: {why}"
    for gone in content["skipped"]:
        yield "skipped", f"{gone['op']} of {gone['dtype']}, {gone['why']}"

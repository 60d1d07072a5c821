"""How tables look: columns that are never cut short, figures with few digits, names of runs, a legend."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from pneumo.study.schema import Row, RunEntry, Spread

NOTHING = "-"


def new_table(title: str) -> Table:
    """A table without lines, two spaces between its columns."""
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )


def add_columns(table: Table, *headers: str) -> None:
    """Add columns, right-aligned unless the header ends in <; header lines are separated by newlines."""
    for header in headers:
        side = "left" if header.endswith("<") else "right"
        table.add_column(header.rstrip("<"), justify="left" if side == "left" else "right", no_wrap=True)


def legend(lines: Iterable[tuple[str, str]]) -> Table:
    """Explanations, each with the word that it explains."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="italic")
    grid.add_column(overflow="fold")
    for word, meaning in lines:
        grid.add_row(word, Text(meaning))
    return grid


def put(console: Console, item: RenderableType) -> None:
    """Print a text or table; a table that is wider than the console goes out whole, for the terminal to wrap."""
    if isinstance(item, Table) and item.columns and item.columns[-1].overflow != "fold":
        unlimited = console.options.update(width=10_000)
        needed = max(Measurement.get(console, unlimited, item).maximum, console.width)
        # print(width=) would be held to the console's own width, and then cells would be cut.
        segments = console.render(item, console.options.update(width=needed))
        console.print(Segments(segments), soft_wrap=True, end="")
    else:
        console.print(item)


def name_of(run: Row | RunEntry) -> str:
    """A run in a few characters: its backend, its comm where it has one, ranks, threads where more than one."""
    comm = "" if run.comm == "none" else f" {run.comm}"
    return f"{run.backend}{comm} {run.ranks}" + (f"x{run.threads}" if run.threads > 1 else "")


def names_of(runs: Iterable[Row | RunEntry]) -> str:
    """Runs as a phrase, those that differ in ranks alone together: "ddp gloo 2, 4, 8; fsdp gloo 2"."""
    together: dict[str, list[str]] = {}
    for run in runs:
        kind, _, ranks = name_of(run).rpartition(" ")
        together.setdefault(kind, []).append(ranks)
    return "; ".join(f"{kind} {', '.join(ranks)}" for kind, ranks in together.items())


def between(values: Iterable[int]) -> str:
    """One number, or the least and the greatest of several."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def compared_blocks(rows: Iterable[Row]) -> Iterable[tuple[str, str]]:
    """For a legend: which blocks stand for a run that has more than those that its serial run has too."""
    for row in rows:
        if row.compared is not None and len(row.compared.blocks) < row.blocks:
            numbers = ", ".join(map(str, row.compared.blocks))
            which = f"block {numbers}" if len(row.compared.blocks) == 1 else f"blocks {numbers}"
            yield "compared", f"{name_of(row)}: only {which} of its {row.blocks}, since serial lacks the others"


def number(value: float | None, digits: int) -> str:
    """A figure with so many decimals, a dash for none."""
    # What rounds to nothing has no sign.
    return NOTHING if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction in per cent, without the sign."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def decimals(values: Sequence[float]) -> int:
    """How many decimals give the least of these figures three significant digits (at most 4)."""
    least = min((abs(value) for value in values if value), default=100.0)
    return next((digits for digits, limit in ((4, 0.1), (3, 1), (2, 10), (1, 100)) if least < limit), 0)


def spread(value: Spread | None, digits: int | None = None) -> str:
    """An estimate and its limits, the estimate alone where they coincide (a reference against itself)."""
    if value is None:
        return NOTHING
    digits = (2 if value.high < 10 else 1) if digits is None else digits
    limits = f" {value.low:.{digits}f}-{value.high:.{digits}f}"
    return f"{value.median:.{digits}f}" + (" " * len(limits) if value.low == value.high else limits)


def limits(value: float | None, found: tuple[float, float] | None, form: Callable[[float | None], str]) -> str:
    """A figure and its interval where it has one."""
    return form(value) if found is None else f"{form(value)} {form(found[0])}-{form(found[1])}"

"""The printed comparison of backends: what a step takes and moves under each, and each against the first one."""

from collections.abc import Callable, Iterable, Mapping

from rich.console import RenderableType
from rich.text import Text

from pneumo.study.cells import NOTHING, add_columns, between, decimals, legend, name_of, new_table, number, spread
from pneumo.study.common_clock import describe
from pneumo.study.rivals import against
from pneumo.study.schema import Difference, Figures, Pair, Rivals, Row, RunFile, Spread, Summary
from pneumo.study.sentences import rivalry

SHOWN = ("outside_s", "peer_wait_s", "queue_and_transfer_s", "hidden_s")
MARKS = {"faster": "*", "slower": "*", "equivalent": "=", "undecided": "?"}


def standings(run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """A line for each parallel run, its difference from the first one on as many ranks, and the result in words.

    Nothing where no two runs have as many ranks and threads.
    """
    if not summary.comparisons:
        return
    rows, clock = {row.run: row for row in summary.rows}, ("clock", describe(run))
    runs = [one for found in summary.comparisons for one in found.runs]
    digits = decimals([1e3 * one.step_s.median for one in runs])
    yield _amounts(runs, rows, digits)
    yield legend([*_about_amounts(runs), clock])
    yield Text()
    yield _differences(summary.comparisons, rows, digits)
    yield legend([*_about_differences(summary.comparisons), clock])
    for found in summary.comparisons:
        said = " ".join(one.text for one in rivalry(found))
        if said:
            yield Text(said)


def _amounts(runs: Iterable[Figures], rows: Mapping[int, Row], digits: int) -> RenderableType:
    table = new_table("Backends side by side (milliseconds of a step)")
    add_columns(
        table, "run<", "step\nlow-high", "= outside\ncomm", "of it\noff-CPU", "+ exposed\ncomm", "of it\npeer wait"
    )
    add_columns(table, "queue", "trans-\nfer", "hidden\ncomm", "calls\na step", "MB\na step", "GB/s")
    for run in runs:
        parts = (
            run.outside_s,
            run.off_cpu_s,
            run.exposed_s,
            run.peer_wait_s,
            run.queue_s,
            run.transfer_s,
            run.hidden_s,
        )
        table.add_row(
            *(name_of(rows[run.run]), spread(_scaled(run.step_s, 1e3), digits)),
            # One digit more than the shortest step needs: its parts are smaller.
            *(number(_times(part, 1e3), min(4, digits + 1)) for part in parts),
            number(run.calls, 0 if run.calls is None or run.calls == round(run.calls) else 1),
            *(_figure(run.bytes, 1e-6), _figure(run.bytes_per_s, 1e-9)),
        )
    return table


def _about_amounts(runs: Iterable[Figures]) -> Iterable[tuple[str, str]]:
    runs = list(runs)
    yield (
        "step",
        f"from the first rank's begin to the last rank's end, over the steps of a block; median of "
        f"{between(run.blocks for run in runs)} blocks (of each column, so sums are not exact); the parts are the "
        "ranks' means",
    )
    yield "outside", "the rest of the step: computing, waiting for data or (off-CPU) for a core, block edges"
    yield "exposed", "blocked in collectives: peer wait (for their last rank), queue and transfer"
    queue = "from the last arrival until the library begins (Horovod: its negotiation)"
    yield "queue", queue + ("; - where it does not tell, then part of transfer" if _lacks(runs, "queue_s") else "")
    hidden = "time in which collectives were under way, after their last arrival, while the rank was in no wait"
    yield "hidden", hidden + ("; - where their end is not told" if _lacks(runs, "hidden_s") else "")
    yield "calls, MB", "of a rank, as recorded: of each tensor where the library does not tell what it fused"
    yield (
        "GB/s",
        "bytes / (end - last arrival), by the ranks' clocks, queue included; time that collectives share counts once",
    )


def _lacks(runs: Iterable[Figures], name: str) -> bool:
    return any(getattr(run, name) is None for run in runs)


def _differences(comparisons: Iterable[Rivals], rows: Mapping[int, Row], digits: int) -> RenderableType:
    table = new_table("Each against the first on as many ranks (milliseconds of a step; below 0 it takes less)")
    add_columns(table, "run<", "speed\nx", "verdict<", "outside\ncomm", "peer\nwait", "queue +\ntransfer")
    add_columns(table, "hidden\ncomm", "band-\nwidth x")
    for found in comparisons:
        first = found.runs[0].run
        for run in found.runs[1:]:
            name, pair = name_of(rows[run.run]), against(found, run.run, first)
            if pair is None:
                table.add_row(name, NOTHING, "no block in common", *[NOTHING] * 5)
            else:
                _add_pair(table.add_row, pair, name, name_of(rows[first]), digits)
    return table


def _add_pair(add_row: Callable[..., None], pair: Pair, name: str, other: str, digits: int) -> None:
    verdict = pair.speed.verdict
    more = verdict.more_blocks or 0
    wanted = f"{more} block{'s' if more > 1 else ''} more?" if more else ""
    seconds = [pair.seconds[term] for term in SHOWN]
    speed = number(pair.speed.estimate.median, 2)
    add_row(
        *(name, speed, verdict.verdict),
        *(_marked(found, _ms(found.estimate.median, digits)) if found else NOTHING for found in seconds),
        _marked(pair.bandwidth, number(pair.bandwidth.estimate.median, 2)) if pair.bandwidth else NOTHING,
    )
    add_row(
        *(f"  vs {other}", _limits(pair.speed.estimate), wanted),
        *(f"{_ms(x.estimate.low, digits)}..{_ms(x.estimate.high, digits)} " if x else "" for x in seconds),
        f"{_limits(pair.bandwidth.estimate)} " if pair.bandwidth else "",
        style="dim",
    )


def _marked(found: Difference, text: str) -> str:
    return text + MARKS[found.verdict.verdict]


def _limits(found: Spread) -> str:
    return f"{found.low:.2f}-{found.high:.2f}"


def _ms(seconds: float, digits: int) -> str:
    # What rounds to nothing has no sign.
    rounded = round(1e3 * seconds, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def _about_differences(comparisons: Iterable[Rivals]) -> Iterable[tuple[str, str]]:
    pairs = [pair for found in comparisons for pair in found.pairs]
    kinds = {pair.interval_kind for pair in pairs}
    if "interval" in kinds:
        yield "limits", "95 % interval over the blocks that both have (Hodges-Lehmann, exact signed rank)"
    if "range" in kinds:
        yield "limits", "the range of the blocks where they are fewer than 6, which decides nothing"
    margins = {pair.speed.verdict.margin for pair in pairs}
    margin = f"{max(margins, default=0.0):.0%}"
    yield "*", "differs: the interval leaves out 0 (of ratios: 1)"
    yield (
        "=",
        f"equivalent: the interval is within {margin} of the faster one's step (of bandwidths: {margin})",
    )
    yield "?", "undecided; under an undecided verdict stands about how many more blocks would decide it"
    yield "all pairs", "are in summary.json under comparisons"


def _scaled(value: Spread, factor: float) -> Spread:
    return Spread(median=factor * value.median, low=factor * value.low, high=factor * value.high)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _figure(value: float | None, factor: float) -> str:
    """A figure in another unit with three digits."""
    return NOTHING if value is None else number(factor * value, min(2, decimals([factor * value])))

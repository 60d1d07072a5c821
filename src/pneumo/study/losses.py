"""The printed account: where the efficiency went, for each run and rank, who was late, and what if."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pneumo.study.account import NO_SHARES, TERMS, Account
from pneumo.study.cells import NOTHING, add_columns, compared_blocks, decimals, legend, name_of, new_table, number
from pneumo.study.collectives import Floats
from pneumo.study.common_clock import describe
from pneumo.study.explain import KINDS
from pneumo.study.late import by_rank
from pneumo.study.scaling import Fit, fit, pop, speedups
from pneumo.study.schema import Row, RunFile, Summary
from pneumo.study.sentences import paragraphs, sentences

HEADERS = ("peer\nwait", "queue", "trans-\nfer", "data\nstall", "off-\nCPU", "repli-\ncated", "slower\non CPU", "other")
COLUMNS = ("lost", *TERMS, "residual")
MOST_LATE, MOST_RANKS = 3, 8
NOTABLE = 1.0  # points of efficiency
LIMITS = {
    "interval": "95 % interval over the fits of each block",
    "range": "the range of the fits of each block: an interval needs 6 blocks",
    "misfit": "95 % interval by how far the points are from the law",
}


def losses(run: RunFile, summary: Summary, accounts: Mapping[str, Mapping[int, Account]]) -> Iterable[RenderableType]:
    """Where the efficiency of each run went, in points, and in words; nothing where no run is compared with serial."""
    training = accounts["train"]
    rows = _compared(summary, training)
    if not rows:
        return
    table = _points_table("Where the efficiency went (points of 100: each cause's part of N*T_N)")
    for row in rows:
        account = training[row.run]
        _add_points(table, name_of(row), account)
        limits = [account.points(term) for term in COLUMNS]
        table.add_row("  low", "", *(number(x.low if x else None, 1) for x in limits), style="dim")
        table.add_row("  high", "", *(number(x.high if x else None, 1) for x in limits), style="dim")
    yield table
    yield legend([*_about(rows, training), ("clock", describe(run))])
    for paragraph in paragraphs(rows, training, run.cores):
        yield Text(paragraph)
    yield from _beside_training(run, summary, accounts)


def _beside_training(
    run: RunFile, summary: Summary, accounts: Mapping[str, Mapping[int, Account]]
) -> Iterable[RenderableType]:
    """The accounts of validation and checkpoints, in points and in words."""
    rows = {kind: _compared(summary, accounts[kind]) for kind in KINDS[1:]}
    if not any(rows.values()):
        return
    table = _points_table("Validation and checkpoints, each against the same of the serial run")
    about, said = {"validate": "all answers after the training (and between blocks, where it can stop early)"}, []
    about |= {"checkpoint": "the trained model is gathered, and written by rank 0"}
    parts = []
    for kind, row in ((kind, row) for kind, found in rows.items() for row in found):
        name, account = f"{name_of(row)} {kind}", accounts[kind][row.run]
        _add_points(table, name, account)
        parts += [f"{name}: {found}"] if (found := _parts(account)) else []
        of_kind = msgspec.structs.replace(row, **msgspec.structs.asdict(row.accounts[kind]))
        words = " ".join(one.text for one in sentences(of_kind, account, run.cores))
        said += [f"{name}: {words}"] if words else []
    yield table
    yield legend(
        [
            *((kind, about[kind]) for kind in rows if rows[kind]),
            *(("parts", text) for text in parts),
            ("clock", describe(run)),
        ]
    )
    for paragraph in said:
        yield Text(paragraph)


def _compared(summary: Summary, accounts: Mapping[int, Account]) -> list[Row]:
    """The rows of parallel runs that have a loss."""
    rows = [row for row in summary.rows if row.ranks > 1 and row.run in accounts]
    return [row for row in rows if accounts[row.run].lost_s is not None]


def _points_table(title: str) -> Table:
    table = new_table(title)
    add_columns(table, "run<", "lost\nrank-s", "lost", *HEADERS, "residual")
    return table


def _add_points(table: Table, name: str, account: Account) -> None:
    lost = account.total("lost") or 0.0
    points = (account.points(term) for term in COLUMNS)
    table.add_row(name, number(lost, decimals([lost])), *(number(x.value if x else None, 1) for x in points))


def _about(rows: Sequence[Row], accounts: Mapping[int, Account]) -> Iterable[tuple[str, str]]:
    kinds = {found.kind for row in rows if (found := accounts[row.run].points("lost"))}
    interval = "95 % interval over the blocks: the jackknife's, which leaves out each block in turn (Student's t)"
    yield "low, high", interval if kinds == {"interval"} else "range of the blocks (few blocks)"
    yield "peer wait", "blocked in a collective before its last rank has arrived"
    yield "queue", "blocked from there until the library begins; where it does not tell, part of transfer"
    yield "transfer", "blocked while data moves, waking up included"
    yield "off-CPU", "ready to run without a core, outside collectives"
    yield "replicated", "CPU time of a share beyond its part of the serial step"
    yield "slower", "CPU time of forward, backward and optimizer beyond that"
    yield "residual", "what no measurement explains, above all blocking without a name"
    if any(row.loss["replicated"] is None for row in rows):
        yield "-", NO_SHARES
    yield from compared_blocks(rows)
    for row in rows:
        if parts := _parts(accounts[row.run]):
            yield "parts", f"{name_of(row)}: {parts}"
    yield from _clock_check(rows, accounts)


def _clock_check(rows: Sequence[Row], accounts: Mapping[int, Account]) -> Iterable[tuple[str, str]]:
    """How far two ways to tell what collectives took differ, in the run where that matters most, and why they may."""
    compared = {row.run: accounts[row.run].durations for row in rows if accounts[row.run].durations.collectives}
    points = {k: 100 * (d.clocked_s - d.clock_free_s) / accounts[k].whole_s for k, d in compared.items()}
    if points:
        most = max(points, key=lambda run: abs(points[run]))
        name, two = next(name_of(row) for row in rows if row.run == most), compared[most]
        digits = decimals([two.clocked_s])
        yield (
            "check",
            f"after their last rank's arrival collectives took, blocked or hidden, {two.clocked_s:.{digits}f} "
            f"rank-seconds by the clocks and {two.clock_free_s:.{digits}f} by their least duration over the ranks, "
            f"which needs no clock ({name}, where they differ most: by {points[most]:+.1f} points); what "
            "differs beyond the clocks' error are ranks that learn late of the end",
        )


def _parts(account: Account) -> str:
    """What off-CPU and other consist of, in points, where any of it is worth the words."""
    said = []
    for term, word in (("off_cpu", "off-CPU"), ("other", "other")):
        items = {
            name: 100 * float(values.sum()) / account.whole_s for name, values in account.items.get(term, {}).items()
        }
        if any(abs(points) >= NOTABLE for points in items.values()):
            parts = (f"{name} {points:.1f}" for name, points in items.items() if abs(points) >= 0.05)
            said.append(f"{word} = {' + '.join(parts)}")
    return "; ".join(said)


def per_rank(run: RunFile, summary: Summary, accounts: Mapping[int, Account]) -> Iterable[RenderableType]:
    """The account of each rank in seconds: what it lost, and by what."""
    rows = _compared(summary, accounts)
    if not rows:
        return
    table = new_table("The same for each rank (seconds over the same blocks)")
    add_columns(table, "run<", "rank", "lost", *HEADERS, "residual", "hidden")
    for row in rows:
        account = accounts[row.run]
        columns = [account.by_rank(term) for term in COLUMNS] + [account.aside["hidden"].sum(0)]
        digits = min(2, decimals([float(np.abs(columns[0]).max()) if columns[0] is not None else 1.0]))
        shown = _most_lost(columns[0], row.ranks)
        for i, rank in enumerate(shown):
            cells = (NOTHING if column is None else number(float(column[rank]), digits) for column in columns)
            table.add_row(name_of(row) if i == 0 else "", str(rank), *cells)
        if len(shown) < row.ranks:
            table.add_row("", f"+{row.ranks - len(shown)}", *["..."] * len(columns), style="dim")
    yield table
    hidden = "seconds in which collectives were under way while the rank was in no wait: nothing is lost by them"
    yield legend([("hidden", hidden), ("clock", describe(run))])


def _most_lost(lost: Floats | None, ranks: int) -> list[int]:
    """All ranks where they are few, else those that lost most."""
    if ranks <= MOST_RANKS or lost is None:
        return list(range(min(ranks, MOST_RANKS)))
    return sorted(np.argsort(-lost, kind="stable")[:MOST_RANKS].tolist())


def late(run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """The ranks that the others waited for, worst first, and for each the most of why."""
    rows = [row for row in summary.rows if row.late]
    if not rows:
        return
    table = new_table("Who was late")
    add_columns(table, "run<", "rank", "others waited\nrank-s", "of peer\nwait %", "collec-\ntives")
    add_columns(table, "of it in<", "because<", "rank-s", "collec-\ntives")
    for row in rows:
        name, waited = name_of(row), row.loss["peer_wait"] or 1.0
        for one in by_rank(row.late)[:MOST_LATE]:
            cost = number(one.rank_s, decimals([waited])), f"{100 * one.rank_s / waited:.0f}", str(one.count)
            first = [name, str(one.rank), *cost]
            for part in one.parts[:MOST_LATE]:
                of_it = number(part.rank_s, decimals([waited])), str(part.count)
                table.add_row(*first, part.phase, part.cause, *of_it)
                first = [""] * 5
            name = ""
    yield table
    how = "the phase is where it exceeds the others' median most since its last wait, the cause what grew there"
    who = f"the last rank to arrive answers for what the others waited; {how}"
    yield legend([("late", who), ("clock", describe(run))])


def what_if(run: RunFile, summary: Summary, accounts: Mapping[int, Account]) -> Iterable[RenderableType]:
    """POP's metrics and the replayed times of each run, and the scaling laws of each kind of run."""
    rows = [row for row in summary.rows if row.ranks > 1 and row.run in accounts]
    if not rows:
        return
    table = new_table("Efficiencies after POP, and seconds of the same blocks as they would have been")
    add_columns(table, "run<", "parallel", "= load\nbalance", "x commu-\nnication", "compu-\ntation")
    add_columns(table, "as it\nwas s", "replay\n%", "no\ntransfer", "no late\npeers", "cores for\nall ranks")
    for row in rows:
        account = accounts[row.run]
        found, other = pop(account), account.what_if
        if found is None:
            continue
        cells = [found.parallel_efficiency, found.load_balance, found.communication_efficiency]
        shown = [*(number(x, 2) for x in cells), number(found.computation_scalability, 2)]
        times = [NOTHING] * 5
        if other is not None:
            digits = decimals([other.recorded_s])
            times = [number(other.recorded_s, digits), f"{100 * other.error:+.1f}"]
            times += [number(seconds, digits) for seconds in other.scenarios_s.values()]
        table.add_row(name_of(row), *shown, *times)
    yield table
    yield legend([*_about_what_if(), *_laws(summary, accounts, run.cores), ("clock", describe(run))])


def _about_what_if() -> Iterable[tuple[str, str]]:
    yield "parallel", "time outside communication over all time; computation: that of serial over that of all ranks"
    yield "replay", "by how much the replay of the recorded dependencies misses the time as it was"
    yield "no transfer", "as it would have been if collectives took nothing, queue and waking up included"
    yield "no late peers", "if no rank came to a collective later than the median one of its ranks"
    yield "cores for all", "cores for all ranks: if none had waited for a core"


def _laws(summary: Summary, accounts: Mapping[int, Account], cores: int) -> Iterable[tuple[str, str]]:
    """Amdahl's and Gunther's law fitted to the runs that differ in their ranks only, and what these cannot tell."""
    alike: dict[str, list[Row]] = {}
    for row in summary.rows:
        if row.backend != "serial" and row.speedup is not None:
            threads = f" x {row.threads} threads" if row.threads > 1 else ""
            alike.setdefault(f"{row.backend} {row.comm}{threads}", []).append(row)
    limits, untold = set(), dict[str, dict[str, None]]()  # names once each, in order, for each sentence
    for name, rows in alike.items():
        blocks = {row.ranks: speedups(accounts[row.run]) for row in rows if row.run in accounts}
        points = {row.ranks: row.speedup.median for row in rows if row.speedup is not None}
        for law in ("Amdahl", "USL"):
            found = fit(law, points, cores, blocks)
            limits.add(found.limits)
            for sentence in found.cannot_tell:
                untold.setdefault(sentence, {})[name] = None
            if found.parameters:
                yield law, f"{name}: {_parameters(found)}"
    for kind, meaning in LIMITS.items():
        if kind in limits:
            yield "limits", meaning
    for sentence, names in untold.items():
        yield "but", sentence if len(names) == len(alike) else f"{', '.join(names)}: {sentence}"


def _parameters(found: Fit) -> str:
    parts = (
        f"{name} {p.value:.3f}" + ("" if p.low is None else f" ({p.low:.3f} to {p.high:.3f})")
        for name, p in found.parameters.items()
    )
    return ", ".join(parts)

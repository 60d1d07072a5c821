"""The printed account: where the efficiency went, for each run and rank, who was late, and what if."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pneumo.study.account import NO_SHARES, TERMS, Account
from pneumo.study.cells import NOTHING, add_columns, decimals, legend, name_of, new_table, number
from pneumo.study.collectives import Floats
from pneumo.study.common_clock import describe
from pneumo.study.explain import KINDS, Explainer
from pneumo.study.scaling import fit, pop
from pneumo.study.schema import Row, RunFile, Summary
from pneumo.study.sentences import paragraphs, sentences

HEADERS = ("peer\nwait", "queue", "trans-\nfer", "data\nstall", "off-\nCPU", "repli-\ncated", "slower\non CPU", "other")
COLUMNS = ("lost", *TERMS, "residual")
MOST_LATE, MOST_RANKS = 3, 8


def explain(folder: Path, run: RunFile, summary: Summary) -> dict[str, dict[int, Account]]:
    """The accounts of all runs in a summary by kind and run number, those of training with their replays."""
    reference = {row.run: _reference(row, summary) for row in summary.rows}
    explainer = Explainer(folder, run, {k: v for k, v in reference.items() if v is not None}, replay=True)
    entries = {entry.run: entry for entry in run.runs}
    made = {(kind, row.run): explainer.account(entries[row.run], kind) for row in summary.rows for kind in KINDS}
    return {kind: {k[1]: found for k, found in made.items() if found and k[0] == kind} for kind in KINDS}


def _reference(row: Row, summary: Summary) -> int | None:
    """The serial run that a row was compared with: of those with its reference's threads the fastest one."""
    serial = [r for r in summary.rows if r.backend == "serial" and r.threads == row.reference_threads]
    return max(serial, key=lambda r: r.images / r.total_s).run if serial else None


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
    other = []
    for kind, row in ((kind, row) for kind, found in rows.items() for row in found):
        name, account = f"{name_of(row)} {kind}", accounts[kind][row.run]
        _add_points(table, name, account)
        other += [f"{name}: {parts}"] if (parts := _other_parts(account)) else []
        found = sentences(_as_row(row, account), account, run.cores)
        said += [f"{name}: " + " ".join(one.text for one in found)] if found else []
    yield table
    yield legend([*((kind, about[kind]) for kind in rows if rows[kind]), *(("other", text) for text in other)])
    for paragraph in said:
        yield Text(paragraph)


def _as_row(row: Row, account: Account) -> Row:
    """A run's row with the figures of another account of it, for what can be said of these."""
    return msgspec.structs.replace(
        row,
        steps=int(account.traffic.steps.sum()),
        total_s=account.whole_s / row.ranks,
        lost_rank_s=account.total("lost"),
        loss={term: account.total(term) for term in TERMS},
        residual_rank_s=account.total("residual"),
        late=account.late,
    )


def _other_parts(account: Account) -> str:
    """The parts of `other` in points, those below half a point left out."""
    points = {name: 100 * float(x.sum()) / account.whole_s for name, x in account.items["other"].items()}
    return ", ".join(f"{name} {value:.1f}" for name, value in points.items() if abs(value) >= 0.5)


def _compared(summary: Summary, accounts: Mapping[int, Account]) -> list[Row]:
    """The rows of parallel runs that have a loss."""
    rows = [row for row in summary.rows if row.ranks > 1 and row.run in accounts]
    return [row for row in rows if accounts[row.run].lost_s is not None]


def _points_table(title: str) -> Table:
    table = new_table(title)
    add_columns(table, "run<", "lost\nrank-s", "lost", *HEADERS, "residual")
    return table


def _add_points(table: Table, name: str, account: Account) -> None:
    lost, whole = account.total("lost") or 0.0, account.whole_s
    totals = (account.total(term) for term in COLUMNS)
    points = (None if total is None else 100 * total / whole for total in totals)
    table.add_row(name, number(lost, decimals([lost])), *(number(value, 1) for value in points))


def _about(rows: Sequence[Row], accounts: Mapping[int, Account]) -> Iterable[tuple[str, str]]:
    kinds = {found.kind for row in rows if (found := accounts[row.run].points("lost"))}
    yield "low, high", "95 % interval over the blocks" if kinds == {"interval"} else "range of the blocks (few blocks)"
    yield "peer wait", "blocked in a collective before its last rank has arrived"
    yield "queue", "blocked from there until the library begins; where it does not tell, part of transfer"
    yield "transfer", "blocked while data moves, waking up included"
    yield "off-CPU", "ready to run without a core, outside collectives"
    yield "replicated", "CPU time of a share beyond its part of the serial step"
    yield "slower", "CPU time of forward, backward and optimizer beyond that"
    yield "residual", "what no measurement explains, above all blocking without a name"
    if any(row.loss["replicated"] is None for row in rows):
        yield "-", NO_SHARES
    items: dict[str, float] = {}
    for row in rows:
        for name, values in accounts[row.run].items.get("other", {}).items():
            items[name] = max(items.get(name, 0.0), abs(float(values.sum())) / (row.ranks * row.total_s))
    parts = [f"{name} {100 * part:.1f}" for name, part in items.items() if part >= 0.0005]
    if parts:
        yield "other", "its parts, at most: " + ", ".join(parts)
    clocks = [d for row in rows if (d := accounts[row.run].durations.disagreement) is not None]
    if clocks:
        worst = max(clocks, key=abs)
        free = "least durations, which need no clock"
        yield (
            "check",
            f"after the last arrival collectives took up to {100 * worst:+.1f} % by the clocks, against {free}",
        )


def per_rank(run: RunFile, summary: Summary, accounts: Mapping[int, Account]) -> Iterable[RenderableType]:
    """The account of each rank in seconds: what it lost, and by what."""
    rows = _compared(summary, accounts)
    if not rows:
        return
    table = new_table("The same for each rank (seconds over the timed blocks)")
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
    hidden = "seconds that collectives took while the rank computed: nothing is lost by them"
    yield legend([("hidden", hidden), ("clock", describe(run))])


def _most_lost(lost: Floats | None, ranks: int) -> list[int]:
    """All ranks where they are few, else those that lost most."""
    if ranks <= MOST_RANKS or lost is None:
        return list(range(min(ranks, MOST_RANKS)))
    return sorted(np.argsort(-lost, kind="stable")[:MOST_RANKS].tolist())


def late(run: RunFile, summary: Summary) -> Iterable[RenderableType]:
    """The ranks that the others waited for, worst first."""
    rows = [row for row in summary.rows if row.late]
    if not rows:
        return
    table = new_table("Who was late")
    add_columns(
        table, "run<", "rank", "in phase<", "because<", "others waited\nrank-s", "of peer\nwait %", "collec-\ntives"
    )
    for row in rows:
        waited = row.loss["peer_wait"] or 1.0
        for i, one in enumerate(row.late[:MOST_LATE]):
            table.add_row(
                *(name_of(row) if i == 0 else "", str(one.rank), one.phase, one.cause),
                *(number(one.rank_s, decimals([waited])), f"{100 * one.rank_s / waited:.0f}", str(one.count)),
            )
    yield table
    how = "the phase is where it exceeds the others' median most since its last wait, the cause what grew there"
    who = f"the last rank to arrive answers for what the others waited; {how}"
    yield legend([("late", who), ("clock", describe(run))])


def what_if(run: RunFile, summary: Summary, accounts: Mapping[int, Account]) -> Iterable[RenderableType]:
    """POP's metrics and the replayed times of each run, and the scaling laws of each kind of run."""
    rows = [row for row in summary.rows if row.ranks > 1 and row.run in accounts]
    if not rows:
        return
    table = new_table("Efficiencies after POP, and seconds of all blocks as they would have been")
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
    yield legend(_about_what_if(run, summary))


def _about_what_if(run: RunFile, summary: Summary) -> Iterable[tuple[str, str]]:
    yield "parallel", "time outside communication over all time; computation: that of serial over that of all ranks"
    yield "replay", "by how much the replay of the recorded dependencies misses the time as it was"
    kinds: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in summary.rows:
        if row.backend != "serial" and row.speedup is not None:
            kinds.setdefault((row.backend, row.comm, row.threads), {})[row.ranks] = row.speedup.median
    limits: dict[str, None] = {}
    for (backend, comm, _), speedups in kinds.items():
        for law in ("Amdahl", "USL"):
            found = fit(law, speedups, run.cores)
            limits |= dict.fromkeys(found.cannot_tell)
            if found.parameters:
                values = (
                    f"{name} {p.value:.3f}" + ("" if p.low is None else f" ({p.low:.3f} to {p.high:.3f})")
                    for name, p in found.parameters.items()
                )
                yield law, f"{backend} {comm}: " + ", ".join(values)
    for limit in limits:
        yield "but", limit
    yield "clock", describe(run)

"""Trainings that never ran: rows of steps.parquet and collectives.parquet of ranks that follow simple rules.

Each rank computes its phases in order; a collective is on its way once all ranks have enqueued it. What a phase costs
is asked of `work`, so a cause of loss is put in by adding to one phase of one rank, and what it must do is known.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import START_NS, entry, run_file

from pneumo.study.results import ResultFolder
from pneumo.study.schema import PHASES, RunEntry

MS = 1_000_000
Cost = tuple[int, int, int]  # wall, CPU, delay in ns
Work = Callable[[int, int, str], Cost]  # of (rank, step, phase)
Rows = list[dict[str, Any]]

SERIAL = ("serial", "none", 1, 1)
AFTER_WORK = ("ddp", "fsdp", "horovod")  # styles that send a bucket behind the work for it
STYLES = (*AFTER_WORK, "fsdp-async")
WHOLE = {"data": 2 * MS, "forward": 30 * MS, "backward": 60 * MS, "optimizer": 8 * MS, "other": MS}


def even(ranks: int) -> Work:
    """The serial step divided evenly, all of it CPU time."""
    return lambda _rank, _step, phase: (WHOLE[phase] // ranks, WHOLE[phase] // ranks, 0)


def plus(work: Work, extra: Callable[[int, int, str], Cost | None]) -> Work:
    """The same work and something on top of it."""

    def both(rank: int, step: int, phase: str) -> Cost:
        base, more = work(rank, step, phase), extra(rank, step, phase) or (0, 0, 0)
        return base[0] + more[0], base[1] + more[1], base[2] + more[2]

    return both


def asleep(ns: int) -> Cost:
    """A cost that is neither CPU time nor waiting for a core."""
    return ns, 0, 0


@dataclass(frozen=True, slots=True)
class Network:
    """What a collective takes after the last arrival: the library's queue, then the transfer, in ns.

    `waking_ns` is how much later than the library's end a rank goes on that has waited for it, and `looking_ns` what a
    wait takes at least.
    """

    queue_ns: int = 0
    transfer_ns: int = 3 * MS
    tells_start: bool = True
    tells_finish: bool = True
    waking_ns: int = 0
    looking_ns: int = 0


@dataclass(slots=True)
class _Rank:
    now: int
    waits: list[tuple[str, int]]  # phase, ns; of the step


def train(
    run: RunEntry,
    work: Work,
    network: Network | None = None,
    *,
    style: str = "ddp",
    blocks: int = 2,
    steps: int = 4,
    buckets: int = 2,
    begins: Sequence[int] = (),
    validates: Mapping[tuple[int, int], int] | None = None,
) -> tuple[Rows, Rows]:
    """Rows of a run's steps and collectives.

    `begins` are the ranks' delays at each block's begin; `validates` gives {(rank, step): ns} of validation that a rank
    does alone before that step.
    """
    network, step_rows, records, seq = network or Network(), [], [], 0
    for block in range(1, blocks + 1):
        start = START_NS + block * 10**12
        ranks = [_Rank(start + (begins[r] if begins else 0), []) for r in range(run.ranks)]
        for step in range((block - 1) * steps, block * steps):
            for r, ns in ((r, ns) for (r, at), ns in (validates or {}).items() if at == step):
                row = _row(run, block, r, 10_000 + step, ranks[r].now, ranks[r].now + ns, {"forward": (ns, ns, 0)}, 0)
                step_rows.append(row | {"kind": "validate"})
                ranks[r].now += ns
            made, found = _step(run, block, step, ranks, work, network, style, 0 if run.ranks == 1 else buckets, seq)
            step_rows += made
            records += found
            seq += buckets
    return step_rows, records


def _step(
    run: RunEntry, block: int, step: int, ranks: list[_Rank], work: Work, network: Network, style: str, n: int, seq: int
) -> tuple[Rows, Rows]:
    begin = [rank.now for rank in ranks]
    calls: list[dict[str, list[int]]] = []
    for rank in ranks:
        rank.waits = []
    for phase in ("data", "forward", "backward", "optimizer", "other"):
        pieces = max(1, n) if phase == "backward" else 1
        piece = WHOLE[phase] // len(ranks) // pieces
        if phase == "optimizer" and style == "horovod":
            _wait(ranks, calls, phase, network)
        if phase == "backward" and style == "fsdp-async" and n:
            calls.append(_send(ranks, calls, network))  # a gather for later: the others are waited for before it
        for i in range(pieces):
            for r, rank in enumerate(ranks):
                # What a rank does beyond its even part it does first, before the first bucket is ready.
                rank.now += piece if i else work(r, step, phase)[0] - (pieces - 1) * piece
            if phase == "backward" and len(calls) < n:
                calls.append(_send(ranks, calls, network))
                if style.startswith("fsdp"):
                    _wait(ranks, calls[-1:], phase, network)
        if phase == "backward" and style == "fsdp-async":
            _wait(ranks, calls[:1], phase, network)
        elif phase == "backward" and style == "ddp":
            _wait(ranks, calls, phase, network)
    rows = []
    for r, rank in enumerate(ranks):
        costs = {phase: work(r, step, phase) for phase in WHOLE}
        waited = sum(ns for _, ns in rank.waits)
        rows.append(_row(run, block, r, step, begin[r], rank.now, costs, waited))
    return rows, _records(run, block, step, calls, network, seq)


def _send(ranks: list[_Rank], calls: list[dict[str, list[int]]], network: Network) -> dict[str, list[int]]:
    enqueued = [rank.now for rank in ranks]
    free = calls[-1]["finished"][0] if calls else 0
    started = max(*enqueued, free) + network.queue_ns
    size = len(ranks)
    return {"enqueued": enqueued, "started": [started] * size, "finished": [started + network.transfer_ns] * size}


def _wait(ranks: list[_Rank], calls: list[dict[str, list[int]]], phase: str, network: Network) -> None:
    for call in calls:
        call["wait_begin"] = [rank.now for rank in ranks]
        for rank, finished in zip(ranks, call["finished"], strict=True):
            wait = finished - rank.now + network.waking_ns if finished > rank.now else 0
            wait = max(wait, network.looking_ns)
            rank.waits.append((phase, wait))
            rank.now += wait
        call["wait_end"] = [rank.now for rank in ranks]


def _records(
    run: RunEntry, block: int, step: int, calls: list[dict[str, list[int]]], network: Network, seq: int
) -> Rows:
    untold = {"started": network.tells_start, "finished": network.tells_finish}
    rows = []
    for i, call in enumerate(calls):
        for r in range(run.ranks):
            stamps = {f"{name}_ns": values[r] if untold.get(name, True) else None for name, values in call.items()}
            where = {
                "run": run.run,
                "block": block,
                "rank": r,
                "step": step,
                "seq": seq + i,
                "group": f"{run.ranks} ranks",
            }
            about = {"op": "allreduce", "dtype": "float32", "bytes": 1 << 20, "backend": run.comm, "bound": None}
            rows.append({**where, **about, **stamps})
    return rows


def _row(
    run: RunEntry, block: int, rank: int, step: int, begin: int, end: int, costs: Mapping[str, Cost], comm_ns: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.run, "block": block, "rank": rank, "step": step, "kind": "train", "warmup": False}
    row |= {"images": 32 // run.ranks, "loss": 0.5, "begin_ns": begin, "wall_ns": end - begin, "helpers_cpu_ns": 0}
    for phase in PHASES:
        wall, cpu, delay = costs.get(phase, (0, 0, 0))
        row |= {f"{phase}_ns": wall, f"{phase}_cpu_ns": cpu, f"{phase}_delay_ns": delay}
    return row | {"comm_ns": comm_ns}


def serial_rows(run: RunEntry, sizes: Mapping[int, int], *, blocks: int = 2, steps: int = 4) -> Rows:
    """A serial run's rows, with two share rows a block for each size: {images: CPU ns of the three compute phases}."""
    rows, _ = train(run, even(1), blocks=blocks, steps=steps)
    for block in range(1, blocks + 1):
        for i, (images, ns) in enumerate(sizes.items()):
            for j in range(2):
                begin = START_NS + block * 10**12 + 10**11 + (2 * i + j) * 10**9
                costs = {"forward": (ns // 2, ns // 2, 0), "backward": (ns - ns // 2, ns - ns // 2, 0)}
                row = _row(run, block, 0, 20_000 + 2 * i + j, begin, begin + ns, costs, 0)
                rows.append(row | {"kind": "share", "images": images})
    return rows


def share_ns(ranks: int) -> int:
    """What a share costs where nothing is replicated."""
    return sum(WHOLE[phase] for phase in ("forward", "backward", "optimizer")) // ranks


def write(
    out: Path,
    trainings: Sequence[tuple[Rows, Rows]],
    runs: Sequence[tuple[str, str, int, int]],
    *,
    shuffle: int | None = None,
    **changes: Any,
) -> Path:
    """Write a result of these trainings' rows; with `shuffle` in another order of rows."""
    folder = ResultFolder.create(out, "main")
    folder.write_run(run_file(runs, **changes))
    steps = [row for rows, _ in trainings for row in rows]
    records = [row for _, rows in trainings for row in rows]
    if shuffle is not None:
        rng = np.random.default_rng(shuffle)
        steps, records = ([rows[i] for i in rng.permutation(len(rows))] for rows in (steps, records))
    folder.add_steps(steps)
    folder.add_collectives(records)
    folder.flush()
    return folder.path


def study(
    out: Path,
    ranks: int,
    *,
    extra: Callable[[int, int, str], Cost | None] = lambda _rank, _step, _phase: None,
    style: str = "ddp",
    share: int | None = 0,
    network: Network | None = None,
    **options: Any,
) -> Path:
    """Write a serial run and one parallel run, on which `extra` puts a cause of loss.

    `share` is what the share rows cost more than their part of the serial step; None leaves them out.
    """
    config = options.pop("config", {})
    edit = options.pop("edit", lambda rows: rows)
    runs = [SERIAL, (style, "gloo", ranks, 1)]
    shape = {name: options[name] for name in ("blocks", "steps") if name in options}
    sizes = {} if share is None else {32 // ranks: share_ns(ranks) + share}
    serial = serial_rows(entry(0, *runs[0]), sizes, **shape)
    rows, records = train(entry(1, *runs[1]), plus(even(ranks), extra), network, style=style, **options)
    return write(out, [(serial, []), (rows, edit(records))], runs, config=config)


def validated(out: Path, more: Cost, config: dict[str, Any]) -> Path:
    """A study of two ranks that validate after the training, rank 1 with so much more in each batch."""
    serial = serial_rows(entry(0, *SERIAL), {16: share_ns(2)})
    rows, records = train(entry(1, "ddp", "gloo", 2, 1), even(2))
    end = {rank: 2 * (30 * MS + rank * more[0]) for rank in (0, 1)}
    for found, ranks in ((serial, 1), (rows, 2)):
        last = next(r for r in found if (r["block"], r["kind"]) == (2, "train"))
        blank = {f"{p}_{what}": 0 for p in PHASES for what in ("ns", "cpu_ns", "delay_ns")}
        for rank, step in itertools.product(range(ranks), range(4 // ranks)):
            took, cpu, delay = (30 * MS + rank * more[0], 30 * MS + rank * more[1], rank * more[2])
            begin = last["begin_ns"] + 10**10 + step * took
            row = last | blank | {"rank": rank, "step": 100 + step, "kind": "validate", "begin_ns": begin, "images": 16}
            found.append(row | {"wall_ns": took, "forward_ns": took, "forward_cpu_ns": cpu, "forward_delay_ns": delay})
        for rank in range(ranks) if ranks > 1 else ():
            begin, over = last["begin_ns"] + 10**10 + end[rank], last["begin_ns"] + 10**10 + end[1]
            wait = {"wall_ns": over - begin, "comm_ns": over - begin, "images": 0}
            row = last | blank | {"rank": rank, "step": 102, "kind": "validate", "begin_ns": begin}
            found.append(row | wait)
            record = next(r for r in records if r["rank"] == rank)
            stamps = {"enqueued_ns": begin, "started_ns": over, "finished_ns": over}
            waited = {"wait_begin_ns": begin, "wait_end_ns": over}
            records.append(record | {"block": 2, "step": 102, "seq": 0, "group": "small"} | stamps | waited)
    runs = [SERIAL, ("ddp", "gloo", 2, 1)]
    return write(out, [(serial, []), (rows, records)], runs, config=config)
